//! Tar entries with their extension headers: GNU long names, pax records (POSIX.1-2008 pax "Extended Header"), with limits.

use std::io::Read;

use tar::EntryType;

use crate::error::{Code, ImageError, Result};
use crate::unpack::broken;

/// Of one extension header. Names have at most 4 KiB, all extended attributes of a file 64 KiB; the rest is room for both.
const EXTENSION_BYTES: u64 = 1 << 20;
/// `PATH_MAX` of Linux.
const NAME_BYTES: usize = 4096;
/// `XATTR_SIZE_MAX` and a sane number of them.
const XATTRS: usize = 64;

/// One file of an archive, after its extension headers.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: Vec<u8>,
    pub link: Vec<u8>,
    pub kind: EntryType,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub mtime: (i64, i64),
    pub device: (u32, u32),
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Extension headers that wait for their file.
#[derive(Default)]
pub(super) struct Pending {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    pax: Vec<(Vec<u8>, Vec<u8>)>,
    waiting: bool,
}

fn corrupt(what: &str) -> ImageError {
    ImageError::new(Code::ImageCorrupt, format!("an archive of the image is broken: {what}"))
}

impl Pending {
    /// The entry, unless `raw` is an extension header, which is kept for the next one.
    pub fn take<R: Read>(&mut self, raw: &mut tar::Entry<'_, R>) -> Result<Option<Entry>> {
        let kind = raw.header().entry_type();
        match kind {
            EntryType::GNULongName => self.name = Some(text(extension(raw)?)?),
            EntryType::GNULongLink => self.link = Some(text(extension(raw)?)?),
            EntryType::XHeader => self.pax = records(&extension(raw)?)?,
            // Global headers hold comments (git) and nothing that layers use.
            EntryType::XGlobalHeader => drop(extension(raw)?),
            EntryType::GNUSparse => {
                return Err(ImageError::new(Code::UnsupportedFormat, "a layer holds sparse tar entries"));
            }
            _ => return self.build(raw, kind).map(Some),
        }
        self.waiting = true;
        Ok(None)
    }

    /// At the end nothing may wait.
    pub fn finish(&self) -> Result<()> {
        if self.waiting { Err(corrupt("it ends after an extension header")) } else { Ok(()) }
    }

    fn build<R: Read>(&mut self, raw: &tar::Entry<'_, R>, kind: EntryType) -> Result<Entry> {
        let this = std::mem::take(self);
        let header = raw.header();
        let fields = header.as_old();
        // Some writers leave numbers out that are zero.
        let blank = |field: &[u8; 8]| field.iter().all(|b| matches!(b, 0 | b' '));
        let bad = |e: std::io::Error| broken(&e);
        let number = |what: &str, value: u64| {
            u32::try_from(value).map_err(|_| corrupt(&format!("{what} {value} is out of range")))
        };
        let mut entry = Entry {
            name: this.name.unwrap_or_else(|| header.path_bytes().into_owned()),
            link: this
                .link
                .unwrap_or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned).unwrap_or_default()),
            kind,
            mode: if blank(&fields.mode) { 0o644 } else { header.mode().map_err(bad)? & 0o7777 },
            uid: if blank(&fields.uid) { 0 } else { number("user id", header.uid().map_err(bad)?)? },
            gid: if blank(&fields.gid) { 0 } else { number("group id", header.gid().map_err(bad)?)? },
            size: header.entry_size().map_err(bad)?,
            mtime: (i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0), 0),
            device: (
                header.device_major().ok().flatten().unwrap_or(0),
                header.device_minor().ok().flatten().unwrap_or(0),
            ),
            xattrs: Vec::new(),
        };
        for (key, value) in this.pax {
            let parsed = || std::str::from_utf8(&value).ok().and_then(|v| v.parse::<u64>().ok());
            match key.as_slice() {
                b"path" => entry.name = value,
                b"linkpath" => entry.link = value,
                b"uid" => entry.uid = number("user id", parsed().ok_or_else(|| corrupt("a user id"))?)?,
                b"gid" => entry.gid = number("group id", parsed().ok_or_else(|| corrupt("a group id"))?)?,
                b"mtime" => entry.mtime = time(&value).unwrap_or(entry.mtime),
                // The reader below knows only the size of the header; another one would shift everything behind it.
                b"size" if parsed() != Some(entry.size) => {
                    return Err(ImageError::new(
                        Code::UnsupportedFormat,
                        "a layer holds a file of more than 8 GiB in a form that is not known",
                    ));
                }
                key if key.starts_with(b"GNU.sparse.") => {
                    return Err(ImageError::new(Code::UnsupportedFormat, "a layer holds sparse tar entries"));
                }
                key => {
                    if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                        entry.xattrs.push((name.to_vec(), value));
                    }
                }
            }
        }
        if entry.name.len() > NAME_BYTES || entry.link.len() > NAME_BYTES {
            return Err(corrupt("a name is longer than 4096 bytes"));
        }
        if entry.name.contains(&0) || entry.link.contains(&0) {
            return Err(corrupt("a name holds a zero byte"));
        }
        if entry.xattrs.len() > XATTRS {
            return Err(corrupt("a file has too many extended attributes"));
        }
        Ok(entry)
    }
}

fn extension<R: Read>(raw: &mut tar::Entry<'_, R>) -> Result<Vec<u8>> {
    let size = raw.header().entry_size().map_err(|e| broken(&e))?;
    if size > EXTENSION_BYTES {
        return Err(corrupt("an extension header is too long"));
    }
    let mut bytes = Vec::new();
    raw.read_to_end(&mut bytes).map_err(|e| broken(&e))?;
    if bytes.len() as u64 != size {
        return Err(broken(&std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(bytes)
}

/// GNU names end with a zero.
fn text(mut bytes: Vec<u8>) -> Result<Vec<u8>> {
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    if bytes.is_empty() { Err(corrupt("a long name is empty")) } else { Ok(bytes) }
}

/// `<length> <key>=<value>\n`, where the length counts the whole record.
pub(super) fn records(mut bytes: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let space =
            bytes.iter().take(8).position(|b| *b == b' ').ok_or_else(|| corrupt("a pax record has no length"))?;
        let length: usize = std::str::from_utf8(&bytes[..space])
            .ok()
            .and_then(|t| t.parse().ok())
            .filter(|n| *n > space + 2 && *n <= bytes.len())
            .ok_or_else(|| corrupt("a pax record has a wrong length"))?;
        let record =
            bytes[space + 1..length].strip_suffix(b"\n").ok_or_else(|| corrupt("a pax record does not end"))?;
        let equals = record.iter().position(|b| *b == b'=').ok_or_else(|| corrupt("a pax record has no value"))?;
        found.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[length..];
    }
    Ok(found)
}

/// Seconds with an optional fraction.
fn time(value: &[u8]) -> Option<(i64, i64)> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    Some((seconds.parse().ok()?, digits.parse().ok()?))
}
