//! The guest agent: JSON lines over a serial port to a program inside the guest (QEMU docs/interop/qemu-ga).
//!
//! The far end is the guest and may be hostile: every line has a limit, every question a deadline, and nothing it says is
//! trusted beyond the call that asked.

use std::sync::Arc;
use std::time::Duration;

use oblak_model::InstanceId;
use oblak_platform::driver::{DriverError, DriverResult};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::OwnedMutexGuard;

use super::qmp::{LineReader, QmpError};
use super::record::GuestDir;
use super::session::{Locks, running};
use super::sock;

/// Longest answer in bytes. The agent keeps at most 16 MiB of a command's output, which base64 makes a third longer, twice
/// (stdout and stderr).
const MAX_ANSWER: usize = 48 << 20;
/// How long the agent may take to greet.
const SYNC_DEADLINE: Duration = Duration::from_secs(2);
/// How long it may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(15);

/// An open line to the agent of one machine. Others wait until it is dropped.
pub struct Agent {
    id: InstanceId,
    lines: LineReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    _turn: OwnedMutexGuard<()>,
}

impl Agent {
    /// Reaches the guest agent of a running machine.
    ///
    /// # Errors
    /// `gone`, `not_running`; `agent_missing` (retry) when nothing inside answers.
    pub async fn open(dir: &GuestDir, id: InstanceId, locks: &Locks) -> DriverResult<Self> {
        running(dir, id)?;
        let turn = Arc::clone(&locks.agent).lock_owned().await;
        let stream = sock::connect(&dir.agent_socket(), SYNC_DEADLINE).await.map_err(|e| {
            DriverError::retry("agent_missing", format!("cannot reach the guest agent of machine {id}: {e}"))
        })?;
        let mut agent = Self::new(id, stream, turn);
        agent.sync().await?;
        Ok(agent)
    }

    fn new(id: InstanceId, stream: UnixStream, turn: OwnedMutexGuard<()>) -> Self {
        let (read, writer) = stream.into_split();
        Self { id, lines: LineReader::with_limit(read, MAX_ANSWER), writer, _turn: turn }
    }

    /// Throws away what is in the pipe from earlier users and makes sure that somebody is there.
    async fn sync(&mut self) -> DriverResult<()> {
        let id = i64::from(uuid::Uuid::new_v4().as_fields().0 >> 1);
        // 0xff ends half a message that an interrupted user may have left in the agent's parser.
        let mut hello = vec![0xff];
        hello.extend(json!({"execute": "guest-sync-delimited", "arguments": {"id": id}}).to_string().bytes());
        hello.push(b'\n');
        let work = async {
            self.writer.write_all(&hello).await.map_err(|_| QmpError::Closed)?;
            loop {
                let line = self.lines.next().await?.ok_or(QmpError::Closed)?;
                // Answers to others come first; the one to us begins after 0xff.
                let clean = line.iter().rposition(|b| *b == 0xff).map_or(&line[..], |at| &line[at + 1..]);
                let answer: Value = serde_json::from_slice(clean).unwrap_or_default();
                if answer["return"].as_i64() == Some(id) {
                    return Ok::<(), QmpError>(());
                }
            }
        };
        match tokio::time::timeout(SYNC_DEADLINE, work).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(QmpError::Protocol(why))) => {
                Err(DriverError::retry("agent_broken", format!("guest agent of machine {}: {why}", self.id)))
            }
            _ => Err(DriverError::retry(
                "agent_missing",
                format!(
                    "the guest agent of machine {} does not answer; wait until it has booted, or install qemu-guest-agent in it",
                    self.id
                ),
            )),
        }
    }

    /// Asks the agent.
    ///
    /// # Errors
    /// `agent_refused` (permanent) with the agent's words; retry when it does not answer.
    pub async fn ask(&mut self, command: &str, arguments: Value) -> DriverResult<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string().into_bytes();
        line.push(b'\n');
        let work = async {
            self.writer.write_all(&line).await.map_err(|_| QmpError::Closed)?;
            self.lines.next().await?.ok_or(QmpError::Closed)
        };
        let broken =
            |why: String| DriverError::retry("agent_broken", format!("guest agent of machine {}: {why}", self.id));
        let line = match tokio::time::timeout(ANSWER_DEADLINE, work).await {
            Ok(Ok(line)) => line,
            Ok(Err(e)) => return Err(broken(e.to_string())),
            Err(_) => return Err(broken(format!("no answer to {command}"))),
        };
        let mut answer: Value = serde_json::from_slice(&line).map_err(|e| broken(e.to_string()))?;
        if let Some(desc) = answer["error"]["desc"].as_str() {
            return Err(DriverError::permanent("agent_refused", format!("guest agent of machine {}: {desc}", self.id)));
        }
        Ok(answer["return"].take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn agent_with(far: impl FnOnce(UnixStream) -> tokio::task::JoinHandle<()>) -> Agent {
        let (near, far_end) = UnixStream::pair().unwrap();
        far(far_end);
        let turn = Arc::new(tokio::sync::Mutex::new(())).lock_owned().await;
        Agent::new(InstanceId::default(), near, turn)
    }

    #[tokio::test]
    async fn skips_what_was_meant_for_others() {
        let mut agent = agent_with(|mut far| {
            tokio::spawn(async move {
                far.write_all(b"{\"return\": {\"pid\": 77}}\nhalf a li").await.unwrap();
                let mut buffer = vec![0u8; 4096];
                let n = far.read(&mut buffer).await.unwrap();
                let asked: Value = serde_json::from_slice(&buffer[1..n]).unwrap();
                let answer = json!({"return": asked["arguments"]["id"]});
                far.write_all(b"ne\n").await.unwrap();
                far.write_all(&[0xff]).await.unwrap();
                far.write_all(format!("{answer}\n").as_bytes()).await.unwrap();
                assert!(far.read(&mut buffer).await.unwrap() > 0);
                far.write_all(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no such thing\"}}\n")
                    .await
                    .unwrap();
                assert!(far.read(&mut buffer).await.unwrap() > 0);
                far.write_all(b"{\"return\": {\"x\": 1}}\n").await.unwrap();
            })
        })
        .await;
        agent.sync().await.unwrap();
        let error = agent.ask("guest-x", Value::Null).await.unwrap_err();
        assert_eq!(error.code, "agent_refused");
        assert!(error.detail.contains("no such thing"));
        assert_eq!(agent.ask("guest-x", Value::Null).await.unwrap()["x"], 1);
    }

    #[tokio::test]
    async fn a_silent_or_mad_guest_is_an_error() {
        let mut agent = agent_with(|far| tokio::spawn(async move { drop(far) })).await;
        assert_eq!(agent.sync().await.unwrap_err().code, "agent_missing");
        let mut agent = agent_with(|mut far| {
            tokio::spawn(async move {
                let junk = vec![b'x'; 1 << 20];
                while far.write_all(&junk).await.is_ok() {}
            })
        })
        .await;
        agent.lines = {
            let (near, mut far) = UnixStream::pair().unwrap();
            tokio::spawn(async move {
                let junk = vec![b'x'; 1 << 16];
                while far.write_all(&junk).await.is_ok() {}
            });
            LineReader::with_limit(near.into_split().0, 1 << 18)
        };
        assert_eq!(agent.sync().await.unwrap_err().code, "agent_broken");
    }
}
