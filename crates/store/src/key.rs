//! Keys and prefixes: slash-separated paths such as `/instance/default/web`.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::StoreError;

/// Longest key in bytes, slashes included.
pub const MAX_KEY_BYTES: usize = 512;

/// Room for nearly every key.
const USUAL_KEY_BYTES: usize = 128;

/// The name of one value: `/kind/scope/id`. Cheap to clone. Ordered bytewise.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// Checks and takes a key.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`] unless it starts with `/`, has at least one segment, none of them empty, `.`, `..` or with control
    /// characters, and is at most [`MAX_KEY_BYTES`] long.
    pub fn new(text: impl Into<Arc<str>>) -> Result<Self, StoreError> {
        let text = text.into();
        match fault(&text) {
            None => Ok(Self(text)),
            Some(reason) => Err(StoreError::InvalidKey { key: text.chars().take(128).collect(), reason }),
        }
    }

    /// A key from its segments, in order.
    ///
    /// # Errors
    /// As [`Key::new`]; also when a segment contains a slash.
    pub fn from_segments<S: AsRef<str>>(segments: impl IntoIterator<Item = S>) -> Result<Self, StoreError> {
        let mut text = String::with_capacity(USUAL_KEY_BYTES);
        for segment in segments {
            let segment = segment.as_ref();
            if segment.contains('/') {
                return Err(StoreError::InvalidKey {
                    key: segment.chars().take(128).collect(),
                    reason: "a segment contains a slash",
                });
            }
            text.push('/');
            text.push_str(segment);
        }
        Self::new(text)
    }

    /// The whole key.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The parts between slashes.
    pub fn segments(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0[1..].split('/')
    }

    /// The last part, for objects their id.
    #[must_use]
    pub fn last(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// For text that this crate itself wrote, and therefore checked, before.
    pub(crate) fn trusted(text: &str) -> Self {
        Self(text.into())
    }
}

fn fault(text: &str) -> Option<&'static str> {
    if text.len() > MAX_KEY_BYTES {
        return Some("it is longer than 512 bytes");
    }
    let Some(rest) = text.strip_prefix('/') else {
        return Some("it does not start with a slash");
    };
    segments_fault(rest)
}

fn segments_fault(rest: &str) -> Option<&'static str> {
    for segment in rest.split('/') {
        match segment {
            "" => return Some("it has an empty segment"),
            "." | ".." => return Some("it has a segment of dots"),
            // Nearly all keys are plain ASCII, of which nothing has to be decoded.
            _ if segment.bytes().all(|byte| (b' '..0x7f).contains(&byte)) => {}
            _ if segment.chars().any(char::is_control) => return Some("it has a control character"),
            _ => {}
        }
    }
    None
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl Deref for Key {
    type Target = str;
    fn deref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl FromStr for Key {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

impl TryFrom<&str> for Key {
    type Error = StoreError;
    fn try_from(text: &str) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

impl TryFrom<String> for Key {
    type Error = StoreError;
    fn try_from(text: String) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A folder of keys: always whole segments, so `/node` never matches `/nodes/a`. Kept with a trailing slash.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix(Arc<str>);

impl Prefix {
    /// Every key.
    #[must_use]
    pub fn all() -> Self {
        Self("/".into())
    }

    /// The keys below `text`; a trailing slash may be given or left out.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`] on the same grounds as [`Key::new`].
    pub fn new(text: &str) -> Result<Self, StoreError> {
        if text == "/" {
            return Ok(Self::all());
        }
        let bare = text.strip_suffix('/').unwrap_or(text);
        let key = Key::new(bare)?;
        Ok(Self(format!("{key}/").into()))
    }

    /// With the trailing slash.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether `key` lies below.
    #[must_use]
    pub fn contains(&self, key: &str) -> bool {
        key.starts_with(&*self.0)
    }

    /// The key `rest` below this prefix; `rest` may have several segments.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`] when the result is not a valid key.
    pub fn key(&self, rest: &str) -> Result<Key, StoreError> {
        Key::new(format!("{}{rest}", self.0))
    }

    /// First text after every key below: the trailing slash replaced by its successor in ASCII, `0`.
    pub(crate) fn end(&self) -> String {
        format!("{}0", &self.0[..self.0.len() - 1])
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

impl FromStr for Prefix {
    type Err = StoreError;
    fn from_str(text: &str) -> Result<Self, StoreError> {
        Self::new(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_could_confuse_are_refused() {
        for bad in ["", "/", "a", "/a//b", "/a/", "/a/../b", "/./a", "/a\0", &format!("/{}", "x".repeat(512))] {
            assert!(Key::new(bad).is_err(), "{bad:?}");
        }
        assert!(Key::from_segments(["a", "b/c"]).is_err());
        let key = Key::from_segments(["instance", "default", "web"]).unwrap();
        assert_eq!(key.as_str(), "/instance/default/web");
        assert_eq!(key.last(), "web");
        assert_eq!(key.segments().collect::<Vec<_>>(), ["instance", "default", "web"]);
    }

    #[test]
    fn a_prefix_matches_whole_segments_only() {
        let node = Prefix::new("/node").unwrap();
        assert!(node.contains("/node/a") && !node.contains("/nodes/a") && !node.contains("/node"));
        assert_eq!(node.end(), "/node0");
        assert!(Prefix::all().contains("/x"));
        assert_eq!(node.key("a/b").unwrap().as_str(), "/node/a/b");
    }
}
