//! One console, many readers: everybody attached sees the output; nobody can slow the guest down.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use oblak_platform::driver::{DriverError, DriverResult};
use oblak_platform::frame::{Channel, Control, Frame};
use tokio::sync::{Notify, mpsc};

use super::server::ShimStream;

/// Bytes kept for a reader that does not keep up; older ones are lost to it.
pub const READER_BYTES: usize = 64 * 1024;
/// Most readers at once.
pub const READERS: usize = 16;

/// What people send towards the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Bytes typed.
    Bytes(Bytes),
    /// The terminal changed its size (columns, rows).
    Resize(u16, u16),
    /// No more bytes will come.
    Eof,
    /// A signal for the process (exec only).
    Signal(i32),
}

#[derive(Debug, Default)]
struct Reader {
    queue: VecDeque<Frame>,
    bytes: usize,
    lost: u64,
}

#[derive(Debug, Default)]
struct State {
    readers: Vec<(u64, Reader)>,
    next: u64,
    closed: bool,
}

/// Spreads output over the attached readers. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Fanout {
    state: Arc<Mutex<State>>,
    wake: Arc<Notify>,
}

impl Fanout {
    /// Nobody is attached yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a frame to every reader. Never waits.
    pub fn publish(&self, frame: &Frame) {
        let mut state = self.lock();
        for (_, reader) in &mut state.readers {
            reader.bytes += frame.payload.len();
            reader.queue.push_back(frame.clone());
            while reader.bytes > READER_BYTES && reader.queue.len() > 1 {
                if let Some(old) = reader.queue.pop_front() {
                    reader.bytes -= old.payload.len();
                    reader.lost += old.payload.len() as u64;
                }
            }
        }
        drop(state);
        self.wake.notify_waiters();
    }

    /// Ends all attachments after they read what is queued.
    pub fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_waiters();
    }

    /// Attaches a reader; it sees what is published from now on.
    ///
    /// # Errors
    /// Retry when [`READERS`] are attached already.
    pub fn attach(&self) -> DriverResult<Attachment> {
        let mut state = self.lock();
        if state.readers.len() >= READERS {
            return Err(DriverError::retry(
                "console_busy",
                format!("{READERS} consoles are attached already; close one"),
            ));
        }
        let id = state.next;
        state.next += 1;
        state.readers.push((id, Reader::default()));
        drop(state);
        Ok(Attachment { fanout: self.clone(), id })
    }
}

/// One attached reader; dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    fanout: Fanout,
    id: u64,
}

impl Attachment {
    /// The next frame; `None` after [`Fanout::close`]. Cancellation loses nothing.
    pub async fn next(&self) -> Option<Frame> {
        loop {
            let notified = self.fanout.wake.notified();
            tokio::pin!(notified);
            // Registered before looking, so a frame published in between wakes us.
            notified.as_mut().enable();
            {
                let mut state = self.fanout.lock();
                let closed = state.closed;
                if let Some((_, reader)) = state.readers.iter_mut().find(|(id, _)| *id == self.id)
                    && let Some(frame) = reader.queue.pop_front()
                {
                    reader.bytes -= frame.payload.len();
                    return Some(frame);
                }
                if closed {
                    return None;
                }
            }
            notified.await;
        }
    }

    /// Bytes this reader missed because it was slow.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.fanout.lock().readers.iter().find(|(id, _)| *id == self.id).map_or(0, |(_, r)| r.lost)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let id = self.id;
        self.fanout.lock().readers.retain(|(other, _)| *other != id);
    }
}

/// Serves one attached person: output frames out, [`Input`] in, until either side ends. Sends `Control::Ready` first.
pub async fn serve_console(mut stream: ShimStream, attachment: Attachment, input: mpsc::Sender<Input>) {
    if stream.send(Frame::control(&Control::Ready)).await.is_err() {
        return;
    }
    loop {
        tokio::select! {
            frame = attachment.next() => match frame {
                Some(frame) => if stream.send(frame).await.is_err() { return },
                None => {
                    let _ = stream.close().await;
                    return;
                }
            },
            frame = stream.next() => {
                let Some(Ok(frame)) = frame else { return };
                if let Some(message) = input_of(&frame) && input.send(message).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What a frame from a person means; `None` for frames that only the other direction uses.
#[must_use]
pub fn input_of(frame: &Frame) -> Option<Input> {
    if frame.channel == Channel::Stdin {
        return Some(Input::Bytes(frame.payload.clone()));
    }
    match frame.as_control()? {
        Control::Resize { cols, rows } => Some(Input::Resize(cols, rows)),
        Control::Eof => Some(Input::Eof),
        Control::Signal { signal } => Some(Input::Signal(signal)),
        Control::Ready | Control::Exit { .. } | Control::Error { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_see_it_and_a_slow_one_loses_only_its_own_past() {
        let fanout = Fanout::new();
        let quick = fanout.attach().unwrap();
        let slow = fanout.attach().unwrap();
        let chunk = Bytes::from(vec![b'x'; 1024]);
        for _ in 0..200 {
            fanout.publish(&Frame::new(Channel::Stdout, chunk.clone()));
            assert_eq!(quick.next().await.unwrap().payload.len(), 1024);
        }
        assert_eq!(quick.lost(), 0);
        assert_eq!(slow.lost(), 200 * 1024 - READER_BYTES as u64);
        fanout.close();
        let mut left = 0;
        while let Some(frame) = slow.next().await {
            left += frame.payload.len();
        }
        assert_eq!(left, READER_BYTES);
        drop(slow);
        drop(quick);
        assert!(fanout.lock().readers.is_empty());
    }

    #[test]
    fn readers_are_limited() {
        let fanout = Fanout::new();
        let held: Vec<_> = (0..READERS).map(|_| fanout.attach().unwrap()).collect();
        assert!(fanout.attach().is_err());
        drop(held);
        assert!(fanout.attach().is_ok());
    }
}
