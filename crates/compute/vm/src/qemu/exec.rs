//! Commands inside a machine, through its guest agent.
//!
//! The agent takes all input at the start and gives all output at the end (at most 16 MiB of each stream), so this is for
//! short commands; people use ssh. Input is collected until the caller says that there is no more, or falls silent.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use data_encoding::BASE64;
use futures_util::{SinkExt, StreamExt};
use oblak_compute::{Exec, ExecRequest};
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult, Remedy};
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec, MAX_PAYLOAD};
use serde_json::{Value, json};
use tokio::io::DuplexStream;
use tokio::time::Instant;
use tokio_util::codec::Framed;

use super::QemuDriver;
use super::agent::Agent;
use super::record::GuestDir;
use super::session::{Locks, running};

/// Most input of a command in bytes: it travels in one message to the agent.
const MAX_INPUT: usize = 1 << 20;
/// A caller that sent nothing for this long has nothing to send.
const SILENCE: Duration = Duration::from_millis(500);
/// How long a machine that is still booting is waited for.
const BOOT_DEADLINE: Duration = Duration::from_secs(45);
/// Longest run of a command.
const RUN_DEADLINE: Duration = Duration::from_secs(3600);
const LOOK_FIRST: Duration = Duration::from_millis(20);
const LOOK_LAST: Duration = Duration::from_millis(500);

type Stream = Framed<DuplexStream, FrameCodec>;

/// What the task of one command needs of the driver.
struct Guest {
    dir: GuestDir,
    id: InstanceId,
    locks: Arc<Locks>,
}

impl Guest {
    async fn agent(&self) -> DriverResult<Agent> {
        Agent::open(&self.dir, self.id, &self.locks).await
    }
}

#[async_trait]
impl Exec for QemuDriver {
    async fn exec(&self, id: InstanceId, request: &ExecRequest) -> DriverResult<BoxDuplex> {
        running(&self.dir(id), id)?;
        if request.tty.is_some() {
            return Err(DriverError::unsupported(
                "a machine's guest agent has no terminals; use `oblak ssh` or `oblak console`",
            ));
        }
        if !matches!(request.user.as_str(), "" | "root" | "0" | "0:0") {
            return Err(DriverError::unsupported(
                "a machine's guest agent runs commands as root only; use `oblak ssh` for other users",
            ));
        }
        let command = command(request)?;
        let guest = Guest { dir: self.dir(id), id, locks: self.locks.of(id) };
        let (near, far) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let mut stream = Framed::new(far, FrameCodec);
            if let Err(error) = serve(&guest, command, &mut stream).await {
                let _ = stream.send(Frame::control(&Control::Error { code: error.code, detail: error.detail })).await;
            }
            let _ = stream.close().await;
        });
        Ok(Box::new(near))
    }
}

/// Arguments of guest-exec. The agent knows neither directory nor added variables; tools inside do.
fn command(request: &ExecRequest) -> DriverResult<Value> {
    let mut argv: Vec<String> = request.argv.clone();
    if argv.is_empty() || argv[0].is_empty() {
        return Err(DriverError::permanent("bad_request", "a command is missing"));
    }
    if let Some(bad) = request.env.iter().find(|e| e.split_once('=').is_none_or(|(name, _)| name.is_empty())) {
        return Err(DriverError::permanent("bad_request", format!("{bad:?} is not NAME=value")));
    }
    if !request.env.is_empty() {
        argv = std::iter::once("env".to_string()).chain(request.env.iter().cloned()).chain(argv).collect();
    }
    if !request.cwd.is_empty() {
        let script = "cd \"$1\" && shift && exec \"$@\"";
        let shell = ["sh", "-c", script, "sh", &request.cwd].map(String::from);
        argv = shell.into_iter().chain(argv).collect();
    }
    let program = argv.remove(0);
    Ok(json!({"path": program, "arg": argv, "capture-output": true}))
}

async fn serve(guest: &Guest, mut command: Value, stream: &mut Stream) -> DriverResult<()> {
    wait_for_agent(guest).await?;
    if stream.send(Frame::control(&Control::Ready)).await.is_err() {
        return Ok(());
    }
    let Some(input) = collect_input(stream).await? else { return Ok(()) };
    if !input.is_empty() {
        command["input-data"] = json!(BASE64.encode(&input));
    }
    let answer = guest.agent().await?.ask("guest-exec", command).await?;
    let pid = answer["pid"]
        .as_i64()
        .ok_or_else(|| DriverError::retry("agent_broken", "the guest agent started no process"))?;
    let Some(status) = wait_for_end(guest, pid, stream).await? else { return Ok(()) };
    for (field, channel) in [("out-data", Channel::Stdout), ("err-data", Channel::Stderr)] {
        let bytes = BASE64.decode(status[field].as_str().unwrap_or_default().as_bytes()).unwrap_or_default();
        for part in bytes.chunks(MAX_PAYLOAD) {
            if stream.send(Frame::new(channel, part.to_vec())).await.is_err() {
                return Ok(());
            }
        }
    }
    let cut = status["out-truncated"] == true || status["err-truncated"] == true;
    if cut {
        let _ = stream.send(Frame::new(Channel::Stderr, "oblak: the guest agent cut the output off\n")).await;
    }
    let _ = stream.send(Frame::control(&Control::Exit { code: exit_code(&status) })).await;
    Ok(())
}

fn exit_code(status: &Value) -> i32 {
    let number = |field: &str| status[field].as_i64().and_then(|n| i32::try_from(n).ok());
    number("signal").map_or_else(|| number("exitcode").unwrap_or(-1), |signal| 128 + signal)
}

async fn wait_for_agent(guest: &Guest) -> DriverResult<()> {
    let end = Instant::now() + BOOT_DEADLINE;
    loop {
        match guest.agent().await {
            Ok(_) => return Ok(()),
            Err(e) if e.remedy != Remedy::Retry || Instant::now() >= end => return Err(e),
            Err(_) => tokio::time::sleep(LOOK_LAST).await,
        }
    }
}

/// What the command shall read; `None` when the caller hung up.
async fn collect_input(stream: &mut Stream) -> DriverResult<Option<Vec<u8>>> {
    let mut input = Vec::new();
    loop {
        let Ok(frame) = tokio::time::timeout(SILENCE, stream.next()).await else { return Ok(Some(input)) };
        let Some(Ok(frame)) = frame else { return Ok(None) };
        if frame.channel == Channel::Stdin {
            input.extend_from_slice(&frame.payload);
            if input.len() > MAX_INPUT {
                let detail = format!(
                    "a machine's guest agent takes at most {} KiB of input; copy a file with ssh",
                    MAX_INPUT >> 10
                );
                return Err(DriverError::permanent("input_too_long", detail));
            }
        } else if frame.as_control() == Some(Control::Eof) {
            return Ok(Some(input));
        }
    }
}

/// Asks until the command has ended; `None` when the caller hung up (the command runs on: the agent cannot end it).
async fn wait_for_end(guest: &Guest, pid: i64, stream: &mut Stream) -> DriverResult<Option<Value>> {
    let end = Instant::now() + RUN_DEADLINE;
    let mut pause = LOOK_FIRST;
    let mut told = false;
    loop {
        let status = guest.agent().await?.ask("guest-exec-status", json!({"pid": pid})).await?;
        if status["exited"] == true {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            return Err(DriverError::permanent(
                "exec_timeout",
                "the command still runs after an hour; use ssh for long ones",
            ));
        }
        let wake = Instant::now() + pause;
        pause = (pause * 2).min(LOOK_LAST);
        while let Ok(frame) = tokio::time::timeout_at(wake, stream.next()).await {
            let Some(Ok(frame)) = frame else { return Ok(None) };
            if frame.channel == Channel::Stdin && !told {
                told = true;
                let note = "oblak: input after the start does not reach a command in a machine; use ssh\n";
                let _ = stream.send(Frame::new(Channel::Stderr, note)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(argv: &[&str]) -> ExecRequest {
        ExecRequest { argv: argv.iter().map(ToString::to_string).collect(), ..ExecRequest::default() }
    }

    #[test]
    fn wraps_directory_and_environment() {
        let mut r = request(&["ls", "-l"]);
        assert_eq!(command(&r).unwrap(), json!({"path": "ls", "arg": ["-l"], "capture-output": true}));
        r.env = vec!["A=b c".into()];
        r.cwd = "/tmp/$x".into();
        let wrapped = command(&r).unwrap();
        assert_eq!(wrapped["path"], "sh");
        assert_eq!(
            wrapped["arg"],
            json!(["-c", "cd \"$1\" && shift && exec \"$@\"", "sh", "/tmp/$x", "env", "A=b c", "ls", "-l"])
        );
        r.env = vec!["=x".into()];
        assert_eq!(command(&r).unwrap_err().code, "bad_request");
        assert_eq!(command(&request(&[])).unwrap_err().code, "bad_request");
    }

    #[test]
    fn codes_and_signals() {
        assert_eq!(exit_code(&json!({"exited": true, "exitcode": 7})), 7);
        assert_eq!(exit_code(&json!({"exited": true, "signal": 9})), 137);
    }
}
