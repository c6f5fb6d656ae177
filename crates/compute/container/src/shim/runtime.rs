//! Calling the OCI runtime. Only options that crun, runc and youki share are used.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::process::Identity;

use super::pty::ConsoleSocket;
use super::reaper::Reaper;
use super::stdio::Streams;

/// How long one call of the runtime may take.
const DEADLINE: Duration = Duration::from_secs(30);
/// Longest part of a runtime's error text that is passed on, in characters.
const ERROR_CHARS: usize = 600;

/// The runtime with the places where its files for this container lie, all on the stage.
#[derive(Clone, Debug)]
pub struct Runtime {
    pub program: PathBuf,
    pub stage: PathBuf,
    pub id: String,
}

/// A process that the runtime has started for us; it is our child now.
#[derive(Debug)]
pub struct Started {
    pub pid: i32,
    /// None when it has ended already.
    pub identity: Option<Identity>,
    pub streams: Streams,
}

/// What to call.
#[derive(Clone, Copy, Debug)]
pub enum Action<'a> {
    /// Make and start the container of the bundle on the stage.
    Run,
    /// Start one more process, described by this file.
    Exec(&'a Path),
}

impl Runtime {
    /// `program --root ... --log ...`
    pub fn command(&self, log: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.stage.join("oci")).arg("--log").arg(log);
        command
    }

    /// Starts a process and waits until the runtime has handed it over. `name` distinguishes calls at the same time.
    pub async fn start(&self, reaper: &Reaper, action: Action<'_>, name: &str, tty: bool) -> DriverResult<Started> {
        let file = |ending: &str| self.stage.join(format!("{name}.{ending}"));
        let (log, pid_file) = (file("log"), file("pid"));
        let io = |e: std::io::Error| DriverError::io("start of a process in a container", &e);
        let mut command = self.command(&log);
        match action {
            Action::Run => command.arg("run").arg("--bundle").arg(&self.stage),
            Action::Exec(process) => command.arg("exec").arg("--process").arg(process),
        };
        command.arg("--detach").arg("--pid-file").arg(&pid_file);
        let socket = tty.then(|| ConsoleSocket::bind(file("tty"))).transpose().map_err(io)?;
        let mut pipes = None;
        match &socket {
            Some(socket) => {
                command.arg("--console-socket").arg(socket.path());
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            }
            None => pipes = Some(Streams::pipes(&mut command, matches!(action, Action::Exec(_))).map_err(io)?),
        }
        command.arg(&self.id);
        let caller = reaper.spawn(command).map_err(|e| {
            DriverError::permanent(
                "runtime_missing",
                format!("cannot execute the OCI runtime {}: {e}", self.program.display()),
            )
        })?;
        let Ok(code) = tokio::time::timeout(DEADLINE, reaper.wait(caller)).await else {
            return Err(DriverError::retry(
                "runtime_slow",
                format!("{} did not finish within {DEADLINE:?}", self.program.display()),
            ));
        };
        let result = if code == 0 {
            let text = std::fs::read_to_string(&pid_file).map_err(io)?;
            let pid: i32 = text
                .trim()
                .parse()
                .map_err(|_| DriverError::retry("runtime_pid", format!("the runtime wrote {text:?} as a pid")))?;
            let streams = match (&socket, pipes) {
                (Some(socket), _) => Streams::of_pty(socket.master().await.map_err(io)?),
                (None, Some(pipes)) => pipes,
                (None, None) => return Err(DriverError::retry("io", "a process without streams")),
            };
            Ok(Started { pid, identity: Identity::of(pid), streams })
        } else {
            let mut text = std::fs::read_to_string(&log).unwrap_or_default();
            if text.trim().is_empty()
                && let Some(mut pipes) = pipes
            {
                text = first_bytes(&mut pipes).await;
            }
            Err(DriverError::permanent("runtime_refused", short(&text)))
        };
        for path in [log, pid_file] {
            let _ = std::fs::remove_file(path);
        }
        result
    }
}

/// What the runtime printed when it failed without a log.
async fn first_bytes(pipes: &mut Streams) -> String {
    let mut buffer = [0u8; 2048];
    let read = tokio::time::timeout(Duration::from_millis(200), pipes.stderr.read(&mut buffer)).await;
    String::from_utf8_lossy(&buffer[..read.map_or(0, |n| n.unwrap_or(0))]).into_owned()
}

/// The last line of an error text in a readable length, without the time that some runtimes put in front.
pub fn short(text: &str) -> String {
    let text = without_colours(text);
    let last = |wanted: &dyn Fn(&str) -> bool| text.lines().rev().map(str::trim).find(|line| wanted(line));
    // youki writes `<time> ERROR <module>: <message>` and a backtrace after that.
    let logged = last(&|line| line.starts_with("20") && line.contains(" ERROR "));
    let logged = logged.and_then(|line| line.split_once(" ERROR ")?.1.split_once(": ")).map(|(_, message)| message);
    let line = logged.or_else(|| last(&|line| !line.is_empty())).unwrap_or("the OCI runtime failed without a message");
    // runc writes `time="..." level=error msg="..."`; the message is what people need.
    let line = line.split_once("msg=\"").map_or(line, |(_, m)| m.trim_end_matches('"'));
    let line = match line.split_once("Z: ") {
        Some((time, rest)) if time.starts_with("20") => rest,
        _ => line,
    };
    line.replace("\\\"", "\"").chars().take(ERROR_CHARS).collect()
}

/// Without the sequences of ECMA-48 that set colours: ESC `[`, parameters, `m`.
fn without_colours(text: &str) -> String {
    let mut parts = text.split("\x1b[");
    let plain = parts.next().unwrap_or_default().to_string();
    parts.fold(plain, |plain, part| plain + part.split_once('m').map_or(part, |(_, rest)| rest))
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn error_texts_become_readable() {
        assert_eq!(
            short("2026-01-02T03:04:05.678901Z: executable file `x` not found in $PATH\n"),
            "executable file `x` not found in $PATH"
        );
        assert_eq!(short("time=\"2026\" level=error msg=\"exec: \\\"x\\\": not found\"\n"), "exec: \"x\": not found");
        let youki = "\x1b[2m2026-01-02T03:04:05.6Z\x1b[0m \x1b[31mERROR\x1b[0m \x1b[2myouki\x1b[0m\x1b[2m:\x1b[0m error in executing command: no\n\nStack backtrace:\n   0: <unknown>\n";
        assert_eq!(short(youki), "error in executing command: no");
        assert_eq!(short(""), "the OCI runtime failed without a message");
    }
}
