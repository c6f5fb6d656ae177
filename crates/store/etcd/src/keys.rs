//! Where things lie in etcd, below the prefix of the cloud:
//!
//! | key | value |
//! |---|---|
//! | `m` | what is known of the cloud (`meta`) |
//! | `k` | nothing; written to move the log on |
//! | `d/<kind>/<scope>/<id>` | a key of the store, as it is |
//! | `l<lease, 16 hex digits>` | nothing; attached to the lease, so it exists while the lease does |
//! | `t<transaction id, 32 hex digits>` | nothing when committed at the key's revision, [`VOID`] when it never will be |

use oblak_store::{Key, LeaseId, Prefix, TxnId};

/// Value of the record of a transaction that was decided not to have happened.
pub const VOID: &[u8] = b"v";

/// The keys of one cloud.
#[derive(Clone, Debug)]
pub struct Space(String);

/// What a key of etcd is.
pub enum Found {
    Meta,
    Data(Key),
    /// Of no interest to readers: leases, records, ticks.
    Other,
}

impl Space {
    /// `prefix` ends with a slash.
    pub fn new(prefix: &str) -> Self {
        Self(prefix.to_owned())
    }

    fn at(&self, rest: &str) -> Vec<u8> {
        [self.0.as_bytes(), rest.as_bytes()].concat()
    }

    pub fn meta(&self) -> Vec<u8> {
        self.at("m")
    }

    pub fn tick(&self) -> Vec<u8> {
        self.at("k")
    }

    pub fn data(&self, key: &str) -> Vec<u8> {
        [self.0.as_bytes(), b"d", key.as_bytes()].concat()
    }

    pub fn lease(&self, id: LeaseId) -> Vec<u8> {
        self.at(&format!("l{:016x}", id.0))
    }

    pub fn txn(&self, id: TxnId) -> Vec<u8> {
        self.at(&format!("t{}", id.0.simple()))
    }

    /// First key of everything, and first key after it. The successor of the final slash in ASCII is `0`.
    pub fn all(&self) -> (Vec<u8>, Vec<u8>) {
        let mut end = self.0.trim_end_matches('/').to_owned();
        end.push('0');
        (self.0.clone().into_bytes(), end.into_bytes())
    }

    /// All markers of leases.
    pub fn leases(&self) -> (Vec<u8>, Vec<u8>) {
        (self.at("l"), self.at("m"))
    }

    /// All records of transactions.
    pub fn txns(&self) -> (Vec<u8>, Vec<u8>) {
        (self.at("t"), self.at("u"))
    }

    /// The keys below `prefix` after `start_after`, end excluded; none when there can be none.
    pub fn range(&self, prefix: &Prefix, start_after: Option<&Key>) -> Option<(Vec<u8>, Vec<u8>)> {
        let below = prefix.as_str();
        let end = self.data(&format!("{}0", &below[..below.len() - 1]));
        // The prefix itself, with its slash, is never a key, and the text after a key is that key with a zero byte.
        let start = match start_after {
            Some(key) if key.as_str() > below => self.data(&format!("{key}\0")),
            _ => self.data(below),
        };
        (start < end).then_some((start, end))
    }

    /// What `raw`, a key below the prefix, is.
    pub fn parse(&self, raw: &[u8]) -> Found {
        match raw.strip_prefix(self.0.as_bytes()) {
            Some(b"m") => Found::Meta,
            Some([b'd', key @ ..]) => self.key(key),
            _ => Found::Other,
        }
    }

    fn key(&self, text: &[u8]) -> Found {
        match std::str::from_utf8(text).map(Key::new) {
            Ok(Ok(key)) => Found::Data(key),
            _ => {
                tracing::warn!(prefix = self.0, "somebody else wrote a key below our prefix in etcd; it is ignored");
                Found::Other
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_segments() {
        let space = Space::new("oblak/");
        let text = |(a, b): (Vec<u8>, Vec<u8>)| (String::from_utf8(a).unwrap(), String::from_utf8(b).unwrap());
        let node = Prefix::new("/node").unwrap();
        assert_eq!(text(space.range(&node, None).unwrap()), ("oblak/d/node/".into(), "oblak/d/node0".into()));
        let after = Key::new("/node/a").unwrap();
        assert_eq!(text(space.range(&node, Some(&after)).unwrap()).0, "oblak/d/node/a\0");
        assert!(space.range(&node, Some(&Key::new("/z").unwrap())).is_none());
        assert_eq!(text(space.range(&Prefix::all(), None).unwrap()), ("oblak/d/".into(), "oblak/d0".into()));
        assert_eq!(text(space.all()), ("oblak/".into(), "oblak0".into()));
        assert!(matches!(space.parse(b"oblak/d/a/b"), Found::Data(key) if key.as_str() == "/a/b"));
        assert!(matches!(space.parse(b"oblak/m"), Found::Meta));
        assert!(matches!(space.parse(b"oblak/d//"), Found::Other));
    }
}
