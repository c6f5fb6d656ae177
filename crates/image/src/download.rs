//! Downloads that go on where they stopped: `tmp/downloads/<key>.part` holds the bytes, `<key>.json` says of what.

use std::fs;
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::header::{self, HeaderMap, HeaderValue};
use http::{StatusCode, Uri};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Code, Context, ImageError, Result};
use crate::http::{Http, Response};
use crate::progress::Reporter;

/// Breaks in a row without a single new byte before giving up.
const MAX_BREAKS: u32 = 4;
/// Breaks in all: a server that sends one byte per connection is not served for ever.
const MAX_ATTEMPTS: u32 = 200;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// What to download.
pub(crate) struct Wanted<'a> {
    pub uri: Uri,
    pub headers: HeaderMap,
    /// Names the partial file; the same for the same content.
    pub key: String,
    /// For whom; lets a removed image take its download along.
    pub image: &'a str,
    pub limit: u64,
    /// The name of the content is its digest: partial bytes are good whatever the server says about their version.
    pub immutable: bool,
}

/// Beside the partial file: which version of the content it belongs to.
#[derive(Default, Serialize, Deserialize)]
struct Sidecar {
    image: String,
    /// Strong `ETag`, else `Last-Modified`.
    validator: Option<String>,
    total: Option<u64>,
    /// Boot in which the bytes were written. They are not synced one by one, so after a power cut they prove nothing.
    boot: String,
}

/// A URL without what may be secret in it.
pub(crate) fn shown(uri: &Uri) -> String {
    format!(
        "{}://{}{}",
        uri.scheme_str().unwrap_or_default(),
        uri.authority().map_or("", http::uri::Authority::as_str),
        uri.path()
    )
}

pub(crate) fn key_of(text: &str) -> String {
    Digest::of(text.as_bytes()).hex()[..40].to_owned()
}

/// Removes the partial downloads of an image.
pub(crate) fn forget(dir: &Path, image: &str) {
    let Ok(entries) = fs::read_dir(dir.join("tmp/downloads")) else { return };
    for path in entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "json")) {
        if fsx::read_json::<Sidecar>(&path).is_ok_and(|s| s.is_some_and(|s| s.image == image)) {
            let _ = fs::remove_file(path.with_extension("part"));
            let _ = fs::remove_file(&path);
        }
    }
}

/// Downloads to a partial file and returns it when it is whole. The caller moves it away or calls [`discard`].
pub(crate) async fn fetch(http: &Http, dir: &Path, wanted: &Wanted<'_>, reporter: &Reporter) -> Result<PathBuf> {
    let part = dir.join("tmp/downloads").join(format!("{}.part", wanted.key));
    let mut breaks = 0;
    let mut counted = 0;
    for _ in 0..MAX_ATTEMPTS {
        let before = part_len(&part);
        let error = match attempt(http, &part, wanted, &mut counted, reporter).await {
            Ok(()) => return Ok(part),
            Err(e) if e.code == Code::Network => e,
            Err(e) => return Err(e),
        };
        breaks = if part_len(&part) > before { 0 } else { breaks + 1 };
        if breaks >= MAX_BREAKS {
            return Err(ended_early(&part, wanted, error));
        }
        tracing::info!(url = %shown(&wanted.uri), %error, "download broke; going on");
        reporter.trouble(&error);
        tokio::select! {
            () = tokio::time::sleep(FIRST_PAUSE * 2u32.pow(breaks)) => {}
            () = reporter.cancel().cancelled() => return Err(ImageError::cancelled()),
        }
    }
    Err(ImageError::new(Code::Network, format!("{} broke the connection {MAX_ATTEMPTS} times", shown(&wanted.uri))))
}

pub(crate) fn discard(part: &Path) {
    let _ = fs::remove_file(part);
    let _ = fs::remove_file(part.with_extension("json"));
}

/// A server that always ends before the length it announced has a truncated file.
fn ended_early(part: &Path, wanted: &Wanted<'_>, error: ImageError) -> ImageError {
    let total = fsx::read_json::<Sidecar>(&part.with_extension("json")).ok().flatten().and_then(|s| s.total);
    match total {
        Some(total) if part_len(part) > 0 && part_len(part) < total && error.detail.contains("end of file") => {
            ImageError::new(
                Code::ImageTruncated,
                format!("{} ends after {} of {total} bytes", shown(&wanted.uri), part_len(part)),
            )
        }
        _ => error,
    }
}

fn part_len(part: &Path) -> u64 {
    fs::metadata(part).map_or(0, |m| m.len())
}

async fn attempt(http: &Http, part: &Path, wanted: &Wanted<'_>, counted: &mut u64, reporter: &Reporter) -> Result<()> {
    let sidecar_path = part.with_extension("json");
    let known: Sidecar = fsx::read_json(&sidecar_path).ok().flatten().unwrap_or_default();
    let boot = oblak_platform::process::boot_id();
    let resumable = wanted.immutable || (known.validator.is_some() && known.boot == boot);
    let offset = if resumable { part_len(part) } else { 0 };
    if offset > 0 && known.total == Some(offset) {
        return Ok(());
    }
    let mut headers = wanted.headers.clone();
    // Bytes as they are stored, not packed for the way: offsets must mean the same in both.
    headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    if offset > 0 {
        insert(&mut headers, header::RANGE, &format!("bytes={offset}-"));
        if let Some(validator) = known.validator.as_deref().filter(|_| !wanted.immutable) {
            insert(&mut headers, header::IF_RANGE, validator);
        }
    }
    let response = http.get(&wanted.uri, &headers, reporter.cancel()).await?;
    reporter.going_on();
    let (start, total) = match response.status {
        StatusCode::OK => (0, length(&response)),
        StatusCode::PARTIAL_CONTENT => content_range(&response, offset)?,
        StatusCode::RANGE_NOT_SATISFIABLE => {
            // What is here does not fit to what is there: begin anew.
            discard(part);
            return Err(ImageError::new(Code::Network, format!("{} has changed", shown(&wanted.uri))));
        }
        status => return Err(refused(&wanted.uri, status)),
    };
    if total.is_some_and(|t| t > wanted.limit) {
        discard(part);
        return Err(crate::blobs::too_big(&shown(&wanted.uri), total.unwrap_or(0), wanted.limit));
    }
    let sidecar = Sidecar { image: wanted.image.to_owned(), validator: validator(&response.headers), total, boot };
    fsx::write_json(&sidecar_path, &sidecar).context(|| "cannot write the download".into())?;
    receive(response, part, start, total, wanted, counted, reporter).await
}

async fn receive(
    mut response: Response,
    part: &Path,
    start: u64,
    total: Option<u64>,
    wanted: &Wanted<'_>,
    counted: &mut u64,
    reporter: &Reporter,
) -> Result<()> {
    let describe = || format!("cannot write the download of {}", shown(&wanted.uri));
    let mut file =
        fs::OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(part).context(describe)?;
    file.set_len(start).context(describe)?;
    file.seek(std::io::SeekFrom::Start(start)).context(describe)?;
    let mut at = start;
    // Bytes that an earlier attempt or process brought count once.
    if start > *counted {
        reporter.add(start - *counted);
        *counted = start;
    }
    while let Some(chunk) = response.body.chunk().await? {
        at += chunk.len() as u64;
        if at > wanted.limit {
            drop(file);
            discard(part);
            return Err(crate::blobs::too_big(&shown(&wanted.uri), at, wanted.limit));
        }
        file.write_all(&chunk).context(describe)?;
        if at > *counted {
            reporter.add(at - *counted);
            *counted = at;
        }
    }
    match total {
        Some(total) if at != total => Err(ImageError::new(
            Code::Network,
            format!("{} came to its end of file at {at} of {total} bytes", shown(&wanted.uri)),
        )),
        _ => Ok(()),
    }
}

fn insert(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn length(response: &Response) -> Option<u64> {
    response.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// `bytes 5-9/10` must begin where was asked (RFC 9110 14.4).
fn content_range(response: &Response, offset: u64) -> Result<(u64, Option<u64>)> {
    let parsed = response
        .headers
        .get(header::CONTENT_RANGE)
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("bytes "))
        .and_then(|v| v.split_once('/'))
        .and_then(|(range, total)| Some((range.split_once('-')?.0.parse::<u64>().ok()?, total.parse::<u64>().ok())));
    match parsed {
        Some((start, total)) if start == offset => Ok((start, total)),
        _ => Err(ImageError::new(
            Code::Network,
            format!("{} answered with another range than asked", shown(&response.uri)),
        )),
    }
}

/// A weak `ETag` does not promise equal bytes (RFC 9110 13.1.5), a date does well enough.
fn validator(headers: &HeaderMap) -> Option<String> {
    let text = |name| headers.get(name).and_then(|v| v.to_str().ok());
    text(header::ETAG).filter(|t| !t.starts_with("W/")).or_else(|| text(header::LAST_MODIFIED)).map(str::to_owned)
}

pub(crate) fn refused(uri: &Uri, status: StatusCode) -> ImageError {
    let (code, hint) = match status.as_u16() {
        404 | 410 => (Code::NotFound, "; check the address"),
        401 | 403 => (Code::Invalid, "; it wants credentials"),
        408 | 429 | 500..=599 => (Code::Network, "; try again later"),
        _ => (Code::Invalid, ""),
    };
    ImageError::new(code, format!("{} answered {status}{hint}", shown(uri)))
}
