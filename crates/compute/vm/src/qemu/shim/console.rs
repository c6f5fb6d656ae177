//! Bytes between the guest's serial port, the log and the people attached.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use oblak_compute::shim::{Fanout, Input, LogWriter};
use oblak_platform::frame::{Channel, Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::mpsc;

const BUFFER_BYTES: usize = 4096;
/// How much of the emulator's own words is kept for the message of a failure.
const TAIL_BYTES: usize = 2048;
/// A guest that does not read its serial port for this long loses what was typed.
const TYPE_DEADLINE: Duration = Duration::from_secs(2);

/// Runs until the emulator closes its end.
pub async fn pump(serial: UnixStream, mut log: LogWriter, fanout: Fanout, mut input: mpsc::Receiver<Input>) {
    let (mut read, mut write) = serial.into_split();
    let typing = tokio::spawn(async move {
        while let Some(input) = input.recv().await {
            let Input::Bytes(bytes) = input else { continue };
            if let Ok(Err(_)) = tokio::time::timeout(TYPE_DEADLINE, write.write_all(&bytes)).await {
                return;
            }
        }
    });
    let mut buffer = vec![0u8; BUFFER_BYTES];
    loop {
        match read.read(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                // A full disk costs lines of the log, never the guest.
                let _ = log.write(&buffer[..n]);
                fanout.publish(&Frame::new(Channel::Stdout, Bytes::copy_from_slice(&buffer[..n])));
            }
        }
    }
    typing.abort();
}

/// The last words of the emulator.
#[derive(Clone, Default)]
pub struct Words(Arc<Mutex<VecDeque<u8>>>);

impl Words {
    fn add(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let excess = kept.len().saturating_sub(TAIL_BYTES);
        kept.drain(..excess);
    }
    /// The last line that is not empty, without the name of the program.
    pub fn tail(&self) -> String {
        let kept: Vec<u8> = self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
        let text = String::from_utf8_lossy(&kept).into_owned();
        let line = text.lines().map(str::trim).rfind(|l| !l.is_empty()).unwrap_or_default();
        line.split_once("qemu-system-x86_64: ").map_or(line, |(_, rest)| rest).to_string()
    }
}

/// Keeps what the emulator writes to standard output and error.
pub async fn listen(mut output: tokio::net::unix::pipe::Receiver, mut log: LogWriter, words: Words) {
    let mut buffer = vec![0u8; BUFFER_BYTES];
    while let Ok(n) = output.read(&mut buffer).await {
        if n == 0 {
            return;
        }
        words.add(&buffer[..n]);
        let _ = log.write(&buffer[..n]);
    }
}
