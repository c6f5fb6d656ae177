//! Frames of interactive streams (console, exec, logs, vnc, port-forward), the same on every hop:
//! shim socket, tunnel and WebSocket.
//!
//! On byte streams a frame is `channel: u8`, `length: u32` big endian, payload. In a WebSocket binary message it is
//! `channel: u8`, payload (the message has its own length). Control payloads are JSON of [`Control`].

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use tokio_util::codec::{Decoder, Encoder};

/// Largest payload of one frame in bytes.
pub const MAX_PAYLOAD: usize = 256 * 1024;
const HEADER: usize = 5;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    /// Towards the guest.
    Stdin,
    /// From the guest. Also carries console, log, VNC and forwarded bytes.
    Stdout,
    /// From the guest, errors of an exec without a terminal.
    Stderr,
    /// [`Control`] as JSON, both directions.
    Control,
}

impl Channel {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Stdin => 0,
            Self::Stdout => 1,
            Self::Stderr => 2,
            Self::Control => 3,
        }
    }
    /// From the number on the wire.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Stdin),
            1 => Some(Self::Stdout),
            2 => Some(Self::Stderr),
            3 => Some(Self::Control),
            _ => None,
        }
    }
}

/// Messages beside the bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Control {
    /// The stream is open; sent once by the far end before any output.
    Ready,
    /// The terminal of the person changed its size.
    Resize {
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
    /// No more stdin will come.
    Eof,
    /// Send this signal (number) to the process of an exec.
    Signal {
        /// signal(7) number.
        signal: i32,
    },
    /// The process ended; the last frame of an exec.
    Exit {
        /// Exit code; 128 + n when ended by signal n.
        code: i32,
    },
    /// The stream failed; the last frame.
    Error {
        /// Stable code.
        code: String,
        /// For people.
        detail: String,
    },
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it carries.
    pub channel: Channel,
    /// The bytes.
    pub payload: Bytes,
}

impl Frame {
    /// A frame of bytes.
    #[must_use]
    pub fn new(channel: Channel, payload: impl Into<Bytes>) -> Self {
        Self { channel, payload: payload.into() }
    }
    /// A control frame.
    #[must_use]
    pub fn control(message: &Control) -> Self {
        Self::new(Channel::Control, serde_json::to_vec(message).expect("a plain enum serializes"))
    }
    /// The control message in a control frame; `None` for other channels and unknown messages.
    #[must_use]
    pub fn as_control(&self) -> Option<Control> {
        if self.channel == Channel::Control { serde_json::from_slice(&self.payload).ok() } else { None }
    }
    /// As one WebSocket message.
    #[must_use]
    pub fn to_message(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(1 + self.payload.len());
        out.put_u8(self.channel.code());
        out.put_slice(&self.payload);
        out.freeze()
    }
    /// From one WebSocket message; `None` when empty, oversized or of an unknown channel.
    #[must_use]
    pub fn from_message(mut message: Bytes) -> Option<Self> {
        if message.is_empty() || message.len() > MAX_PAYLOAD + 1 {
            return None;
        }
        let channel = Channel::from_code(message.get_u8())?;
        Some(Self { channel, payload: message })
    }
}

/// Codec of frames on byte streams, for `tokio_util::codec::Framed`.
#[derive(Debug, Default, Clone, Copy)]
pub struct FrameCodec;

impl Decoder for FrameCodec {
    type Item = Frame;
    type Error = std::io::Error;

    fn decode(&mut self, src: &mut BytesMut) -> Result<Option<Frame>, std::io::Error> {
        if src.len() < HEADER {
            return Ok(None);
        }
        let bad = |text: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, text.to_string());
        let channel = Channel::from_code(src[0]).ok_or_else(|| bad("unknown channel in a stream frame"))?;
        let length = u32::from_be_bytes([src[1], src[2], src[3], src[4]]) as usize;
        if length > MAX_PAYLOAD {
            return Err(bad("stream frame is too long"));
        }
        if src.len() < HEADER + length {
            src.reserve(HEADER + length - src.len());
            return Ok(None);
        }
        src.advance(HEADER);
        Ok(Some(Frame { channel, payload: src.split_to(length).freeze() }))
    }
}

impl Encoder<Frame> for FrameCodec {
    type Error = std::io::Error;

    fn encode(&mut self, frame: Frame, dst: &mut BytesMut) -> Result<(), std::io::Error> {
        if frame.payload.len() > MAX_PAYLOAD {
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "stream frame is too long"));
        }
        dst.reserve(HEADER + frame.payload.len());
        dst.put_u8(frame.channel.code());
        dst.put_u32(u32::try_from(frame.payload.len()).expect("checked against MAX_PAYLOAD"));
        dst.put_slice(&frame.payload);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn control_round_trip() {
        let frame = Frame::control(&Control::Resize { cols: 80, rows: 24 });
        assert_eq!(
            Frame::from_message(frame.to_message()).unwrap().as_control(),
            Some(Control::Resize { cols: 80, rows: 24 })
        );
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(payload in proptest::collection::vec(any::<u8>(), 0..2000), cut in 0usize..2005) {
            let frame = Frame::new(Channel::Stdout, payload);
            let mut whole = BytesMut::new();
            FrameCodec.encode(frame.clone(), &mut whole).unwrap();
            let cut = cut.min(whole.len());
            let tail = whole.split_off(cut);
            let mut buffer = whole;
            if let Some(early) = FrameCodec.decode(&mut buffer).unwrap() {
                prop_assert_eq!(early, frame);
            } else {
                buffer.extend_from_slice(&tail);
                prop_assert_eq!(FrameCodec.decode(&mut buffer).unwrap(), Some(frame));
            }
        }
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = FrameCodec.decode(&mut BytesMut::from(&bytes[..]));
            let _ = Frame::from_message(Bytes::from(bytes));
        }
    }
}
