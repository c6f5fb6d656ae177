//! The file under redb, with a meter: how often it was synced, and whether a sync ever failed.

use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

/// Figures of the file, shared with the store that owns it.
#[derive(Debug, Default)]
pub struct Meter {
    pub syncs: AtomicU64,
    /// After a failed fsync(2) Linux marks the lost pages clean, so neither a retry nor a reread tells the truth (see fsync(2), EIO).
    pub sync_failed: AtomicBool,
    /// Writes to the page that says which tree is the committed one. A batch that failed before it touched that page is not in the file.
    pub header_writes: AtomicU64,
    #[cfg(test)]
    pub fail_writes: AtomicBool,
    #[cfg(test)]
    pub fail_syncs: AtomicBool,
    /// What reached the file, when a test wants to know.
    #[cfg(test)]
    pub trace: std::sync::Mutex<Option<Vec<Traced>>>,
}

/// An operation on the file.
#[cfg(test)]
#[derive(Clone, Debug)]
pub enum Traced {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

#[cfg(test)]
impl Meter {
    fn trace(&self, op: impl FnOnce() -> Traced) {
        if let Some(trace) = self.trace.lock().unwrap().as_mut() {
            trace.push(op());
        }
    }
}

/// redb keeps its header at the start of the first page.
const HEADER_BYTES: u64 = 4096;

/// The file as redb uses it.
#[derive(Debug)]
pub struct MeteredFile {
    file: FileBackend,
    meter: Arc<Meter>,
}

impl MeteredFile {
    pub fn new(file: FileBackend, meter: Arc<Meter>) -> Self {
        Self { file, meter }
    }

    fn injected_write(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.meter.fail_writes.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn injected_sync(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.meter.fail_syncs.load(Ordering::Relaxed) {
            return Err(io::Error::other("injected"));
        }
        Ok(())
    }
}

impl StorageBackend for MeteredFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.injected_write()?;
        #[cfg(test)]
        self.meter.trace(|| Traced::SetLen(len));
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.meter.syncs.fetch_add(1, Ordering::Relaxed);
        self.injected_sync()
            .and_then(|()| self.file.sync_data())
            .inspect(|()| {
                #[cfg(test)]
                self.meter.trace(|| Traced::Sync);
            })
            .inspect_err(|_| self.meter.sync_failed.store(true, Ordering::Relaxed))
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.injected_write()?;
        #[cfg(test)]
        self.meter.trace(|| Traced::Write(offset, data.to_vec()));
        if offset < HEADER_BYTES {
            self.meter.header_writes.fetch_add(1, Ordering::Relaxed);
        }
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.file.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.file.query_lock_range(start, end)
    }
}
