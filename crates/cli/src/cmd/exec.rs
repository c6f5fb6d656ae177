//! `exec`, `console`, `logs`.

use oblak_client::ExecOptions;
use oblak_model::{Code, InstanceKind};
use tokio::io::AsyncWriteExt;

use super::stream::{End, Ways, relay};
use crate::args::{ExecArgs, LogsArgs};
use crate::error::{CliError, FAILED, Result};
use crate::session::Session;
use crate::term;

/// `^]`: GS in ASCII, the escape key of telnet(1) and virsh(1).
const ESCAPE: u8 = 0x1d;

/// `exec`: the exit code of the command inside.
pub async fn exec(session: &Session, args: ExecArgs) -> Result<u8> {
    let options = ExecOptions {
        argv: args.command,
        env: args.env.into_iter().map(|(k, v)| format!("{k}={v}")).collect(),
        user: args.user,
        cwd: args.cwd,
        tty: args.tty.then(term::size),
    };
    let stream = match session.client.exec(&session.project, &args.name, &options).await {
        Ok(stream) => stream,
        Err(error) => {
            let code = error.code();
            let error = session.explain_missing::<InstanceKind>(&args.name, error).await;
            return Err(match code {
                Some(Code::Unsupported) => error.with_hint(instead(&args.name, args.tty)),
                // The instance runs: it is the command that cannot.
                Some(Code::WrongState) if !error.message.starts_with("instance/") => {
                    error.with_hint("check the command and its path inside the instance")
                }
                _ => error,
            });
        }
    };
    let guard = if args.tty && args.interactive { raw()? } else { None };
    let ways = Ways { stdin: args.interactive, raw: guard.is_some(), escape: None, resize: args.tty, interrupt: true };
    let end = relay(stream, ways).await;
    drop(guard);
    match end? {
        End::Exit(code) => Ok(exit_code(code)),
        End::Signal(n) => Ok(exit_code(128 + n)),
        End::Closed | End::Left => Err(CliError::new(
            "the connection ended before the command did",
            format!("`oblak list` shows whether {} still runs", args.name),
        )),
    }
}

/// What can be done in a machine, whose guest agent runs commands without a terminal and as root.
fn instead(name: &str, tty: bool) -> String {
    let shell = format!("`oblak ssh {name}` opens a shell, `oblak console {name}` the serial port");
    if tty { format!("{shell}; without -t `oblak exec` runs single commands there") } else { shell }
}

/// What the shell can show: codes beyond a byte stay failures.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(FAILED)
}

fn raw() -> Result<Option<term::Changed>> {
    term::raw().map_err(|e| CliError::new(format!("cannot change the terminal: {e}"), "try without -t"))
}

/// `console`.
pub async fn console(session: &Session, name: &str) -> Result<u8> {
    let stream = match session.client.console(&session.project, name).await {
        Ok(stream) => stream,
        Err(error) => return Err(session.explain_missing::<InstanceKind>(name, error).await),
    };
    let mut stream = stream;
    let (cols, rows) = term::size();
    let size = oblak_platform::frame::Control::Resize { cols, rows };
    stream.send(&oblak_platform::frame::Frame::control(&size)).await?;
    session.out.note(&format!("console of {name}; ^] leaves, Enter shows a prompt"));
    let guard = raw()?;
    let ways = Ways { stdin: true, raw: guard.is_some(), escape: Some(ESCAPE), resize: true, interrupt: false };
    let end = relay(stream, ways).await;
    drop(guard);
    match end? {
        End::Left => {
            session.out.note(&format!("\nleft the console of {name}; the instance goes on"));
            Ok(0)
        }
        End::Closed => {
            session.out.note(&format!("\nthe console of {name} was closed by the other end"));
            Ok(0)
        }
        End::Exit(_) => Ok(0),
        End::Signal(n) => Ok(exit_code(128 + n)),
    }
}

/// `logs`.
pub async fn logs(session: &Session, args: &LogsArgs) -> Result<()> {
    let mut stream = match session.client.logs(&session.project, &args.name, args.tail, args.follow).await {
        Ok(stream) => stream,
        Err(error) => return Err(session.explain_missing::<InstanceKind>(&args.name, error).await),
    };
    let mut stdout = tokio::io::stdout();
    while let Some(bytes) = stream.next().await? {
        stdout.write_all(&bytes).await.map_err(|e| CliError::output(&e))?;
        stdout.flush().await.map_err(|e| CliError::output(&e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_a_terminal_in_a_machine_is_told_what_has_one() {
        let hint = instead("web", true);
        assert!(
            hint.contains("`oblak ssh web`") && hint.contains("`oblak console web`") && hint.contains("without -t")
        );
        assert!(!instead("web", false).contains("-t"));
    }

    #[test]
    fn exit_codes() {
        assert_eq!([exit_code(0), exit_code(7), exit_code(255), exit_code(256), exit_code(-1)], [0, 7, 255, 1, 1]);
    }
}
