//! What the shim answers on its socket.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::shim::{Answer, Call, Fanout, FenceCall, Input, Service, serve_console};
use oblak_model::VolumeId;
use oblak_platform::clock::SystemClock;
use oblak_platform::driver::{DriverError, DriverResult};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::watch::Watch;

/// Answer to `state`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Run state of the emulator (QEMU `RunState`).
    pub status: String,
    /// Frozen because a disk is full.
    pub disk_full: bool,
    /// The machine was let run.
    pub started: bool,
    /// Somebody asked for the end.
    pub stopping: bool,
    /// Volumes plugged in.
    pub volumes: Vec<VolumeId>,
    /// As in [`oblak_compute::Observation::warnings`].
    pub warnings: Vec<(String, String, String)>,
}

/// Answer to `usage`: what the guest read from and wrote to its disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
}

/// Arguments of `stop`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct StopCall {
    /// How long the guest may take to end by itself, in milliseconds.
    pub grace_ms: u64,
}

/// The service of one machine.
pub struct VmService {
    /// State.
    pub watch: Arc<Watch>,
    /// Console output.
    pub fanout: Fanout,
    /// Console input.
    pub input: mpsc::Sender<Input>,
}

#[async_trait]
impl Service for VmService {
    async fn call(&self, call: Call) -> DriverResult<Answer> {
        match call.op.as_str() {
            "state" => {
                let view = self.watch.view().await;
                Ok(Answer::Value(
                    serde_json::to_value(view).map_err(|e| DriverError::permanent("bad_answer", e.to_string()))?,
                ))
            }
            "usage" => {
                let usage = self
                    .watch
                    .usage()
                    .await
                    .ok_or_else(|| DriverError::retry("monitor", "the emulator does not answer"))?;
                Ok(Answer::Value(
                    serde_json::to_value(usage).map_err(|e| DriverError::permanent("bad_answer", e.to_string()))?,
                ))
            }
            "console" => {
                let (attachment, input) = (self.fanout.attach()?, self.input.clone());
                Ok(Answer::stream(move |stream| serve_console(stream, attachment, input)))
            }
            "fence" => {
                let state = self.watch.fencer().set(call.parse::<FenceCall>()?.fence).await;
                Ok(Answer::Value(
                    serde_json::to_value(state).map_err(|e| DriverError::permanent("bad_answer", e.to_string()))?,
                ))
            }
            "resume" => {
                self.watch.fencer().resume(&SystemClock, &*self.watch).await?;
                Ok(Answer::done())
            }
            "stop" => {
                self.watch.ask_to_stop(Duration::from_millis(call.parse::<StopCall>()?.grace_ms));
                Ok(Answer::done())
            }
            "shutdown" => {
                self.watch.ask_to_stop(Duration::ZERO);
                Ok(Answer::done())
            }
            other => Err(DriverError::unsupported(format!("the shim of a machine does not know {other:?}"))),
        }
    }
}
