//! Server-sent events (WHATWG HTML, section 9.2), the part that our server speaks.

use bytes::BytesMut;

/// Longest event in bytes.
const MAX_EVENT: usize = 16 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// `event:` field; empty when absent.
    pub name: String,
    /// `id:` field; empty when absent.
    pub id: String,
    /// `data:` lines, joined by newlines.
    pub data: String,
}

/// Finds events in pieces of a body.
#[derive(Debug, Default)]
pub struct Parser {
    buffer: BytesMut,
    event: Event,
    has_data: bool,
}

impl Parser {
    /// Adds a piece.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event; `Err` when an event is too long or not UTF-8.
    pub fn next_event(&mut self) -> Result<Option<Event>, String> {
        while let Some(end) = self.buffer.iter().position(|b| *b == b'\n') {
            let line = self.buffer.split_to(end + 1);
            let line = std::str::from_utf8(&line[..end])
                .map_err(|_| "an event is not UTF-8".to_string())?
                .trim_end_matches('\r');
            if line.is_empty() {
                let event = std::mem::take(&mut self.event);
                if std::mem::take(&mut self.has_data) {
                    return Ok(Some(event));
                }
                continue;
            }
            self.field(line);
        }
        if self.buffer.len() + self.event.data.len() > MAX_EVENT {
            Err("an event is too long".into())
        } else {
            Ok(None)
        }
    }

    fn field(&mut self, line: &str) {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match name {
            "event" => self.event.name = value.into(),
            "id" => self.event.id = value.into(),
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.has_data = true;
                self.event.data.push_str(value);
            }
            _ => {} // comments (empty name) keep the connection alive; other fields are not ours
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(pieces: &[&[u8]]) -> Vec<Event> {
        let mut parser = Parser::default();
        let mut out = Vec::new();
        for piece in pieces {
            parser.push(piece);
            while let Some(event) = parser.next_event().unwrap() {
                out.push(event);
            }
        }
        out
    }

    #[test]
    fn finds_events() {
        let events = all(&[b": hi\n\nevent: put\nid: 1-2\nda", b"ta: {\"a\":1}\n", b"\ndata: x\ndata: y\n\n"]);
        assert_eq!(events.len(), 2);
        assert_eq!(
            (events[0].name.as_str(), events[0].id.as_str(), events[0].data.as_str()),
            ("put", "1-2", "{\"a\":1}")
        );
        assert_eq!(events[1].data, "x\ny");
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut parser = Parser::default();
            parser.push(&bytes);
            while let Ok(Some(_)) = parser.next_event() {}
        }
    }
}
