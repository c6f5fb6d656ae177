//! `ssh`: the system's ssh through our own tunnel, so that no address has to be reachable from here.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use oblak_client::ClientError;
use oblak_model::{Code, ImageKind, Instance, InstanceKind, Phase};
use tokio::io::AsyncReadExt;
use tokio::time::Instant;

use super::launch::why;
use crate::args::SshArgs;
use crate::context;
use crate::error::{CliError, Result, TIMEOUT};
use crate::keys;
use crate::session::Session;
use crate::wait::{Progress, say_instance};

const PORT: u16 = 22;
/// Pause between two knocks at the door.
const KNOCK: Duration = Duration::from_millis(500);
/// A door that opens but says nothing is knocked at again after this long.
const SILENCE: Duration = Duration::from_secs(10);
/// Without sshd the port may stay closed for ever; `--timeout` ends it. User when neither flag nor image says one.
const DEFAULT_USER: &str = "root";

/// `ssh`: does not come back when all is well, since this process becomes ssh.
pub async fn ssh(session: &Session, args: &SshArgs) -> Result<u8> {
    let instance = session.get::<InstanceKind>(&args.name).await?;
    let instance = answering(session, instance, args).await?;
    let user = match &args.user {
        Some(user) => user.clone(),
        None => image_user(session, &instance).await.unwrap_or_else(|| DEFAULT_USER.into()),
    };
    let hosts = known_hosts(&instance)?;
    let program = std::env::current_exe()
        .map_err(|e| CliError::new(format!("cannot find our own program: {e}"), "reinstall oblak"))?;
    let proxy = proxy_command(&program, &session.flags, &instance);
    let keys = instance.status.resolved.public_keys.values().map(String::as_str);
    let identity = args.identity.clone().or_else(|| keys::private_for(keys));
    if identity.is_none() && instance.status.resolved.public_keys.is_empty() {
        session.out.note(&format!("note: {} was launched without --key; a login may be refused", args.name));
    }
    let mut command = Command::new("ssh");
    command.args(arguments(args, &instance, &user, &hosts, &proxy, identity.as_deref()));
    // ssh takes this process over: terminal, signals and exit code are its own.
    let error = command.exec();
    let hint = match error.kind() {
        std::io::ErrorKind::NotFound => "install it (Debian: apt-get install openssh-client)",
        _ => "check that ssh can be run",
    };
    Err(CliError::new(format!("cannot run ssh: {error}"), hint))
}

fn arguments(
    args: &SshArgs,
    instance: &Instance,
    user: &str,
    hosts: &Path,
    proxy: &str,
    identity: Option<&Path>,
) -> Vec<String> {
    let mut out: Vec<String> = Vec::new();
    let mut option = |text: String| out.extend(["-o".into(), text]);
    option(format!("ProxyCommand={proxy}"));
    option(format!("UserKnownHostsFile=\"{}\"", hosts.display()));
    option("GlobalKnownHostsFile=/dev/null".into());
    option("StrictHostKeyChecking=accept-new".into());
    option(format!("HostKeyAlias={}", instance.metadata.id));
    option("LogLevel=ERROR".into());
    if let Some(identity) = identity {
        out.extend(["-i".into(), identity.display().to_string()]);
    }
    if args.tty {
        out.push("-t".into());
    }
    out.extend(["-l".into(), user.into(), "--".into(), instance.metadata.name.clone()]);
    // As with ssh itself the words are joined by the shell inside.
    out.extend(args.command.iter().cloned());
    out
}

/// The command line for `ProxyCommand`, which ssh hands to a shell after it has replaced `%`.
fn proxy_command(program: &Path, flags: &[String], instance: &Instance) -> String {
    let program = program.to_string_lossy();
    let program = program.trim_end_matches(" (deleted)");
    let id = instance.metadata.id.to_string();
    let port = PORT.to_string();
    let words = std::iter::once(program)
        .chain(flags.iter().map(String::as_str))
        .chain(["forward", &id, &port, "--stdio", "--quiet"]);
    words.map(|w| format!("'{}'", w.replace('\'', "'\\''").replace('%', "%%"))).collect::<Vec<_>>().join(" ")
}

/// The file with the host keys of one instance: another instance of the same name never meets them.
fn known_hosts(instance: &Instance) -> Result<PathBuf> {
    let file = context::default_file().with_file_name("known_hosts").join(instance.metadata.id.to_string());
    let dir = file.parent().unwrap_or(Path::new("/"));
    oblak_platform::fsx::create_dir_private(dir, 0o700).map_err(|e| CliError::file(dir, "make the directory", &e))?;
    keys::hand_over(dir);
    Ok(file)
}

/// The user that the image's maker thought of.
async fn image_user(session: &Session, instance: &Instance) -> Option<String> {
    let id = instance.status.resolved.image.to_string();
    for project in [session.project.as_str(), oblak_model::DEFAULT_PROJECT] {
        if let Ok(image) = session.client.get::<ImageKind>(project, &id).await {
            return image.status.properties.get("default_user").cloned();
        }
    }
    None
}

/// Waits until an sshd answers.
async fn answering(session: &Session, mut instance: Instance, args: &SshArgs) -> Result<Instance> {
    let deadline = Instant::now() + args.timeout.0;
    let id = instance.metadata.id.to_string();
    let mut progress = Progress::new(session.out);
    let mut reason = String::from("it is not running yet");
    let result = loop {
        if let Err(error) = may_answer(&instance) {
            break Err(error);
        }
        if instance.status.phase == Phase::Running {
            match knock(session, &id).await {
                Ok(()) => break Ok(()),
                Err(Knock::Never(error)) => break Err(error),
                Err(Knock::NotYet(text)) => reason = text,
            }
            progress.say(&format!("waiting for ssh on {}", args.name), &reason);
        } else {
            say_instance(&mut progress, &instance);
        }
        if Instant::now() >= deadline {
            break Err(CliError::new(
                format!("ssh on {} did not answer within {}: {reason}", args.name, args.timeout),
                format!("`oblak logs {}` shows how far it is; wait longer with --timeout", args.name),
            )
            .with_code(TIMEOUT));
        }
        tokio::time::sleep(KNOCK).await;
        match session.client.get::<InstanceKind>(&session.project, &id).await {
            Ok(now) => instance = now,
            Err(error) if error.is_retryable() => reason = error.to_string(),
            Err(error) => break Err(error.into()),
        }
    };
    progress.end();
    result.map(|()| instance)
}

/// Whether it makes sense to wait for an instance.
fn may_answer(instance: &Instance) -> Result<()> {
    let name = &instance.metadata.name;
    let hint = match instance.status.phase {
        Phase::Stopped => format!("`oblak start {name}` starts it"),
        Phase::Paused => format!("`oblak resume {name}` lets it go on"),
        Phase::Failed => format!("{}; `oblak start {name}` tries again", why(instance)),
        Phase::Deleting => "launch another one".into(),
        _ => return Ok(()),
    };
    Err(CliError::new(format!("{name} is {}", instance.status.phase), hint))
}

enum Knock {
    NotYet(String),
    Never(CliError),
}

/// Opens a connection and reads the greeting of an SSH server (RFC 4253, 4.2).
async fn knock(session: &Session, id: &str) -> Result<(), Knock> {
    let stream = match session.client.forward(&session.project, id, PORT).await {
        Ok(stream) => stream,
        Err(ClientError::Api(e)) if matches!(e.code, Code::Forbidden | Code::Unauthenticated | Code::NotFound) => {
            return Err(Knock::Never((*e).into()));
        }
        Err(error) => return Err(Knock::NotYet(error.to_string())),
    };
    let mut bytes = stream.into_bytes();
    let mut greeting = [0u8; 4];
    match tokio::time::timeout(SILENCE, bytes.read_exact(&mut greeting)).await {
        Ok(Ok(_)) if &greeting == b"SSH-" => Ok(()),
        Ok(Ok(_)) => Err(Knock::NotYet("something that is not ssh answers on port 22".into())),
        Ok(Err(e)) => Err(Knock::NotYet(format!("port 22: {e}"))),
        Err(_) => Err(Knock::NotYet("port 22 is silent".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::InstanceSpec;

    fn web() -> Instance {
        let mut web = Instance::new("web", InstanceSpec::default());
        web.metadata.id = "0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b".parse().unwrap();
        web
    }

    #[test]
    fn the_proxy_survives_the_shell_and_percent() {
        let flags = ["--project".to_string(), "it's 100%".to_string()];
        assert_eq!(
            proxy_command(Path::new("/opt/o b/oblak"), &flags, &web()),
            "'/opt/o b/oblak' '--project' 'it'\\''s 100%%' 'forward' '0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b' '22' '--stdio' '--quiet'"
        );
    }

    #[test]
    fn arguments_of_ssh() {
        let args = SshArgs {
            name: "web".into(),
            user: None,
            identity: None,
            tty: false,
            timeout: oblak_model::Span::secs(1),
            command: vec!["hostname".into()],
        };
        let out = arguments(&args, &web(), "root", Path::new("/k/1"), "proxy", Some(Path::new("/me/id")));
        assert_eq!(
            out,
            [
                "-o",
                "ProxyCommand=proxy",
                "-o",
                "UserKnownHostsFile=\"/k/1\"",
                "-o",
                "GlobalKnownHostsFile=/dev/null",
                "-o",
                "StrictHostKeyChecking=accept-new",
                "-o",
                "HostKeyAlias=0190a1b2-c3d4-7e5f-8a9b-0c1d2e3f4a5b",
                "-o",
                "LogLevel=ERROR",
                "-i",
                "/me/id",
                "-l",
                "root",
                "--",
                "web",
                "hostname",
            ]
        );
    }

    #[test]
    fn nobody_waits_for_what_is_off() {
        let mut i = web();
        assert!(may_answer(&i).is_ok());
        i.status.phase = Phase::Stopped;
        assert_eq!(may_answer(&i).unwrap_err().hint, "`oblak start web` starts it");
    }
}
