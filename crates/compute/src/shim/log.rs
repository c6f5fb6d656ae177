//! Console log with a bounded size that readers can follow.
//!
//! The log is one endless byte stream of which the last few parts are kept. A part is a file named by the offset of its
//! first byte in that stream (20 decimal digits), so a reader that knows its offset finds its place again after any
//! number of rotations and restarts of the guest.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::time::Sleep;

/// Default size of one part in bytes.
pub const PART_BYTES: u64 = 1 << 20;
/// Default number of parts kept.
pub const PARTS: usize = 4;

/// Starts of the parts in `dir`, ascending. An absent directory has none.
fn parts(dir: &Path) -> io::Result<Vec<u64>> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut starts: Vec<u64> = Vec::new();
    for entry in entries {
        if let Some(start) = entry?.file_name().to_str().filter(|n| n.len() == 20).and_then(|n| n.parse().ok()) {
            starts.push(start);
        }
    }
    starts.sort_unstable();
    Ok(starts)
}

fn part_path(dir: &Path, start: u64) -> PathBuf {
    dir.join(format!("{start:020}"))
}

/// The one writer of a log.
#[derive(Debug)]
pub struct LogWriter {
    dir: PathBuf,
    file: File,
    start: u64,
    len: u64,
    part_bytes: u64,
    keep: usize,
}

impl LogWriter {
    /// Opens the log in `dir` (created with mode 0700) and goes on where it ended. Keeps `keep` parts of `part_bytes`.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn open(dir: &Path, part_bytes: u64, keep: usize) -> io::Result<Self> {
        oblak_platform::fsx::create_dir_private(dir, 0o700)?;
        let start = parts(dir)?.last().copied().unwrap_or(0);
        let file = Self::open_part(dir, start)?;
        let len = file.metadata()?.len();
        Ok(Self { dir: dir.to_path_buf(), file, start, len, part_bytes: part_bytes.max(1), keep: keep.max(1) })
    }

    fn open_part(dir: &Path, start: u64) -> io::Result<File> {
        OpenOptions::new().append(true).create(true).mode(0o600).open(part_path(dir, start))
    }

    /// Appends bytes; rotates as needed.
    ///
    /// # Errors
    /// Any I/O error, such as a full disk. What was not written is lost, later calls may work again.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.len >= self.part_bytes {
                self.rotate()?;
            }
            let room = usize::try_from(self.part_bytes - self.len).unwrap_or(usize::MAX).min(bytes.len());
            self.file.write_all(&bytes[..room])?;
            self.len += room as u64;
            bytes = &bytes[room..];
        }
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        let next = self.start + self.len;
        self.file = Self::open_part(&self.dir, next)?;
        self.start = next;
        self.len = 0;
        let all = parts(&self.dir)?;
        for old in &all[..all.len().saturating_sub(self.keep)] {
            oblak_platform::fsx::remove_file_if_exists(&part_path(&self.dir, *old))?;
        }
        Ok(())
    }
}

/// Shortest and longest pause between two looks of a following reader at an idle log.
const LOOK_MIN: Duration = Duration::from_millis(10);
const LOOK_MAX: Duration = Duration::from_millis(200);

/// Reads a log; see [`LogReader::open`]. Needs no task: dropping it ends everything.
#[derive(Debug)]
pub struct LogReader {
    dir: PathBuf,
    position: u64,
    part: Option<(u64, File)>,
    follow: bool,
    sleep: Option<Pin<Box<Sleep>>>,
    pause: Duration,
}

impl LogReader {
    /// Reads the log in `dir` from its oldest kept byte, or from the last `tail` lines. With `follow` the stream ends only
    /// when the directory is removed. A log that does not exist yet is empty.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn open(dir: &Path, tail: Option<u64>, follow: bool) -> io::Result<Self> {
        let position = match tail {
            None => parts(dir)?.first().copied().unwrap_or(0),
            Some(lines) => tail_position(dir, lines)?,
        };
        Ok(Self { dir: dir.to_path_buf(), position, part: None, follow, sleep: None, pause: LOOK_MIN })
    }

    /// Reads what is there now; 0 at the end.
    fn read_now(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // Each turn reads, or moves to a later part, of which only a few exist; rotation during the loop is bounded by it.
        for _ in 0..64 {
            if let Some((start, file)) = &self.part {
                let n = file.read_at(buffer, self.position - start)?;
                if n > 0 {
                    self.position += n as u64;
                    return Ok(n);
                }
            }
            let all = parts(&self.dir)?;
            let current = self.part.as_ref().map(|(start, _)| *start);
            // The part that holds the position; when that one was rotated away, the oldest that is left.
            let Some(want) = all.iter().rev().find(|s| **s <= self.position).or(all.first()).copied() else {
                return Ok(0);
            };
            if current == Some(want) {
                return Ok(0);
            }
            match File::open(part_path(&self.dir, want)) {
                Ok(file) => {
                    self.position = self.position.max(want);
                    self.part = Some((want, file));
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(0)
    }
}

impl AsyncRead for LogReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                std::task::ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            // Small regular files in the page cache: a plain read is cheaper than a trip to a thread pool.
            let n = self.read_now(out.initialize_unfilled())?;
            if n > 0 {
                out.advance(n);
                self.pause = LOOK_MIN;
                return Poll::Ready(Ok(()));
            }
            if !self.follow || out.remaining() == 0 || !self.dir.exists() {
                return Poll::Ready(Ok(()));
            }
            self.sleep = Some(Box::pin(tokio::time::sleep(self.pause)));
            self.pause = (self.pause * 2).min(LOOK_MAX);
        }
    }
}

/// Offset at which the last `lines` lines begin.
fn tail_position(dir: &Path, lines: u64) -> io::Result<u64> {
    let all = parts(dir)?;
    let mut wanted = lines;
    let mut at_end = true;
    for start in all.iter().rev() {
        let mut file = match File::open(part_path(dir, *start)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => break,
            other => other?,
        };
        let mut end = file.metadata()?.len();
        let mut chunk = [0u8; 8192];
        while end > 0 {
            let n = usize::try_from(end).unwrap_or(usize::MAX).min(chunk.len());
            end -= n as u64;
            file.seek(SeekFrom::Start(end))?;
            file.read_exact(&mut chunk[..n])?;
            for (i, byte) in chunk[..n].iter().enumerate().rev() {
                // The newline that ends the last line does not begin another.
                if *byte == b'\n' && !at_end {
                    wanted -= 1;
                }
                if wanted == 0 {
                    return Ok(start + end + i as u64 + 1);
                }
                at_end = false;
            }
        }
    }
    Ok(all.first().copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn text(dir: &Path, tail: Option<u64>) -> String {
        let mut out = String::new();
        LogReader::open(dir, tail, false).unwrap().read_to_string(&mut out).await.unwrap();
        out
    }

    #[tokio::test]
    async fn keeps_a_bounded_size_and_the_newest_bytes() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("log");
        let mut log = LogWriter::open(&dir, 100, 3).unwrap();
        for n in 0..1000 {
            log.write(format!("line {n}\n").as_bytes()).unwrap();
        }
        let size: u64 = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(size <= 300, "{size}");
        assert!(text(&dir, None).await.ends_with("line 998\nline 999\n"));
        assert_eq!(text(&dir, Some(2)).await, "line 998\nline 999\n");
        assert_eq!(text(&dir, Some(0)).await, "");
        // A restart of the guest goes on in the same stream.
        drop(log);
        let mut log = LogWriter::open(&dir, 100, 3).unwrap();
        log.write(b"again").unwrap();
        assert_eq!(text(&dir, Some(2)).await, "line 999\nagain");
    }

    #[tokio::test]
    async fn a_follower_sees_every_byte_across_rotations_and_ends_with_the_directory() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("log");
        let mut reader = LogReader::open(&dir, None, true).unwrap();
        let mut log = LogWriter::open(&dir, 64, 4).unwrap();
        let mut want = Vec::new();
        let mut got = Vec::new();
        for n in 0..200u32 {
            let line = format!("{n} {}\n", "x".repeat((n % 50) as usize));
            log.write(line.as_bytes()).unwrap();
            want.extend_from_slice(line.as_bytes());
            while got.len() < want.len() {
                let n = reader.read_buf(&mut got).await.unwrap();
                assert!(n > 0);
            }
        }
        assert_eq!(got, want);
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(
            tokio::time::timeout(Duration::from_secs(5), reader.read_u8()).await.unwrap().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[tokio::test]
    async fn a_reader_that_fell_behind_goes_on_with_what_is_left() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("log");
        let mut log = LogWriter::open(&dir, 10, 2).unwrap();
        log.write(b"0123456789").unwrap();
        let mut reader = LogReader::open(&dir, None, false).unwrap();
        log.write(&[b'x'; 35]).unwrap();
        let mut out = Vec::new();
        reader.read_to_end(&mut out).await.unwrap();
        assert_eq!(out, [b'x'; 15]);
    }
}
