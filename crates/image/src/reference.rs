//! `host[:port]/repository[:tag|@digest]`, as in the distribution specification.

use crate::digest::Digest;
use crate::error::{Code, ImageError, Result};

/// The registry that is meant when a reference names none, by convention of container tools.
const DEFAULT_HOST: &str = "registry-1.docker.io";

/// A parsed reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reference {
    /// `host[:port]`.
    pub host: String,
    pub repository: String,
    /// Tag or digest: what the manifest is asked by.
    pub version: Version,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Tag(String),
    Digest(Digest),
}

impl Version {
    pub fn as_str(&self) -> &str {
        match self {
            Self::Tag(tag) => tag,
            Self::Digest(digest) => digest.as_str(),
        }
    }
}

impl Reference {
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = |why: &str| {
            let shown: String = text.chars().take(120).collect();
            ImageError::new(Code::Invalid, format!("\"{shown}\" is not an image reference: {why}"))
        };
        if text.len() > 512 {
            return Err(invalid("it is too long"));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>()?)),
            None => (text, None),
        };
        // A first part is a host when it could not be a part of a repository's name.
        let (host, path) = match rest.split_once('/') {
            Some((h, p)) if h.contains('.') || h.contains(':') || h == "localhost" => (h.to_owned(), p.to_owned()),
            Some(_) => (DEFAULT_HOST.to_owned(), rest.to_owned()),
            None => (DEFAULT_HOST.to_owned(), format!("library/{rest}")),
        };
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository.to_owned(), Some(tag.to_owned())),
            None => (path, None),
        };
        let host_ok = host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.:[]".contains(&b));
        if !host_ok || host.is_empty() {
            return Err(invalid("the host is wrong"));
        }
        let part_ok = |p: &str| {
            p.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && p.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b))
        };
        if !repository.split('/').all(part_ok) {
            return Err(invalid("a repository has lower-case letters, digits, '.', '_', '-' and '/' only"));
        }
        let tag_ok = |t: &str| {
            t.len() <= 128
                && t.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
                && t.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if tag.as_deref().is_some_and(|t| !tag_ok(t)) {
            return Err(invalid("the tag is wrong"));
        }
        let version = digest.map_or_else(|| Version::Tag(tag.unwrap_or_else(|| "latest".into())), Version::Digest);
        Ok(Self { host, repository, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_apart() {
        let of = |t: &str| {
            let r = Reference::parse(t).unwrap();
            format!("{} {} {}", r.host, r.repository, r.version.as_str())
        };
        assert_eq!(of("busybox"), format!("{DEFAULT_HOST} library/busybox latest"));
        assert_eq!(of("team/app:1.0"), format!("{DEFAULT_HOST} team/app 1.0"));
        assert_eq!(of("localhost/app"), "localhost app latest");
        assert_eq!(of("127.0.0.1:5000/a/b:t"), "127.0.0.1:5000 a/b t");
        let digest = Digest::of(b"").to_string();
        assert_eq!(of(&format!("r.example/a:ignored@{digest}")), format!("r.example a {digest}"));
        for bad in [
            "",
            "r.example/",
            "r.example/A",
            "r.example/../x",
            "r.example/a:",
            "a@sha256:12",
            "http://r.example/a",
            "r.example/a b",
        ] {
            assert!(Reference::parse(bad).is_err(), "{bad}");
        }
    }
}
