//! Creating, opening, backing up and restoring the database file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oblak_model::Revision;
use redb::backends::FileBackend;
use redb::{Builder, Database, DatabaseError, ReadableDatabase, ReadableTable};

use super::backend::{Meter, MeteredFile};
use super::layout::{self, HISTORY, LEASE_KEYS, LEASES, LIVE, META, SUPERSEDED};
use crate::{Result, StoreError, TXN_IDS_KEPT, TxnId};

/// What the file says when it is opened.
pub struct Loaded {
    pub head: Revision,
    pub floor: u64,
    /// Oldest first.
    pub txns: Vec<(TxnId, Revision)>,
    /// Number and time to live in milliseconds.
    pub leases: Vec<(u64, u64)>,
    pub lease_counter: u32,
}

/// Says what failed and what to do.
pub fn explain(action: &'static str, path: &Path, error: redb::Error) -> StoreError {
    let path = path.to_path_buf();
    match error {
        redb::Error::Io(source) => explain_io(action, path, source),
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => StoreError::Locked { path },
        redb::Error::PreviousIo => {
            StoreError::Io { action, path, source: io::Error::other("an earlier operation failed") }
        }
        redb::Error::DatabaseClosed => StoreError::Closed,
        redb::Error::UpgradeRequired(version) => StoreError::Corrupt {
            path,
            detail: format!("file format {version} of another release of the storage engine"),
        },
        other => StoreError::Corrupt { path, detail: other.to_string() },
    }
}

pub fn explain_io(action: &'static str, path: PathBuf, source: io::Error) -> StoreError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => StoreError::DiskFull { path },
        // The reader ran past the end of the file, or found what the format does not allow.
        io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData => {
            StoreError::Corrupt { path, detail: source.to_string() }
        }
        _ => StoreError::Io { action, path, source },
    }
}

/// Opens the file, creating it when there is none.
pub fn open_or_create(path: &Path, cache_bytes: usize, meter: &Arc<Meter>) -> Result<(Database, Loaded)> {
    if !path.try_exists().map_err(|source| explain_io("look for", path.to_path_buf(), source))? {
        create(path, cache_bytes)?;
    }
    open(path, cache_bytes, meter)
}

/// Opens a file that must exist and checks all of it.
pub fn open(path: &Path, cache_bytes: usize, meter: &Arc<Meter>) -> Result<(Database, Loaded)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| explain_io("open", path.to_path_buf(), source))?;
    let len = file.metadata().map_err(|source| explain_io("read", path.to_path_buf(), source))?.len();
    if len == 0 {
        // redb would take it for new, and everything in it would silently be gone.
        return Err(StoreError::Corrupt { path: path.to_path_buf(), detail: "the file is empty".into() });
    }
    // A damaged file must not take the process down, whatever assertion it trips.
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let database = builder(cache_bytes).create_with_backend(metered(file, meter)?)?;
        let loaded = load(&database, path)?;
        Ok::<_, OpenError>((database, loaded))
    }));
    match opened {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(OpenError::Store(error))) => Err(error),
        Ok(Err(OpenError::Redb(error))) => Err(explain("open", path, error)),
        Err(_) => {
            Err(StoreError::Corrupt { path: path.to_path_buf(), detail: "the storage engine gave up on it".into() })
        }
    }
}

enum OpenError {
    Store(StoreError),
    Redb(redb::Error),
}

impl<E: Into<redb::Error>> From<E> for OpenError {
    fn from(error: E) -> Self {
        Self::Redb(error.into())
    }
}

fn metered(file: File, meter: &Arc<Meter>) -> Result<MeteredFile, DatabaseError> {
    Ok(MeteredFile::new(FileBackend::new(file)?, Arc::clone(meter)))
}

fn builder(cache_bytes: usize) -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(cache_bytes).set_check_integrity_on_open(true);
    builder
}

/// Makes an empty database under another name and links it into place, so that a crash leaves none or a whole one.
fn create(path: &Path, cache_bytes: usize) -> Result<()> {
    let fail = |source| explain_io("create", path.to_path_buf(), source);
    let parent = parent(path);
    std::fs::create_dir_all(parent).map_err(fail)?;
    let temp = fresh(path).map_err(fail)?;
    let made = (|| {
        let database = builder(cache_bytes).create_with_backend(metered(temp.file()?, &Arc::default())?)?;
        initialise(&database, Revision::new(1, 0), 0)
    })();
    made.map_err(|error: redb::Error| explain("create", path, error))?;
    match std::fs::hard_link(&temp.path, path) {
        // Somebody else was faster; the lock decides who gets it.
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(fail(error)),
        _ => {}
    }
    sync_dir(parent).map_err(fail)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// A file that is removed again whatever happens.
struct Temp {
    path: PathBuf,
}

impl Temp {
    fn file(&self) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.path)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "temporary database is gone already");
        }
    }
}

/// A new empty file next to `path`, readable by its owner only.
fn fresh(path: &Path) -> io::Result<Temp> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", uuid::Uuid::now_v7()));
    let temp = Temp { path: path.with_file_name(name) };
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp.path)?;
    Ok(temp)
}

fn initialise(database: &Database, head: Revision, lease_counter: u64) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        meta.insert(layout::META_SCHEMA, u64::from(layout::SCHEMA))?;
        meta.insert(layout::META_INCARNATION, u64::from(head.incarnation))?;
        meta.insert(layout::META_BASE, head.n)?;
        meta.insert(layout::META_FLOOR, head.n)?;
        meta.insert(layout::META_LEASES, lease_counter)?;
        txn.open_table(LIVE)?;
        txn.open_table(SUPERSEDED)?;
        txn.open_table(HISTORY)?;
        txn.open_table(LEASES)?;
        txn.open_table(LEASE_KEYS)?;
    }
    Ok(txn.commit()?)
}

fn load(database: &Database, path: &Path) -> Result<Loaded, OpenError> {
    let txn = database.begin_read()?;
    let meta = txn.open_table(META)?;
    let number = |name: &str| -> Result<u64, OpenError> {
        let value = meta.get(name)?.ok_or_else(|| redb::Error::Corrupted(format!("it has no {name}")))?;
        Ok(value.value())
    };
    let schema = u32::try_from(number(layout::META_SCHEMA)?).unwrap_or(u32::MAX);
    if schema != layout::SCHEMA {
        return Err(OpenError::Store(StoreError::Schema {
            path: path.to_path_buf(),
            found: schema,
            supported: layout::SCHEMA,
        }));
    }
    let incarnation =
        u32::try_from(number(layout::META_INCARNATION)?).map_err(|_| redb::Error::Corrupted("incarnation".into()))?;
    let history = txn.open_table(HISTORY)?;
    let newest = history.last()?.map_or(0, |(n, _)| n.value());
    let head = Revision::new(incarnation, number(layout::META_BASE)?.max(newest));
    let mut txns = Vec::new();
    for row in history.iter()?.rev() {
        let (last, row) = row?;
        let events = layout::decode_history(last.value(), row.value()).map_err(redb::Error::from)?;
        txns.extend(events.into_iter().rev().map(|event| (event.id, Revision::new(incarnation, event.n))));
        if txns.len() >= TXN_IDS_KEPT {
            break;
        }
    }
    txns.reverse();
    let mut leases = Vec::new();
    for row in txn.open_table(LEASES)?.iter()? {
        let (id, ttl) = row?;
        leases.push((id.value(), ttl.value()));
    }
    let lease_counter = u32::try_from(number(layout::META_LEASES)?).unwrap_or(u32::MAX);
    Ok(Loaded { head, floor: number(layout::META_FLOOR)?, txns, leases, lease_counter })
}

/// Writes the live values, as of now, into a new file at `path`. History and leases stay behind: a restore starts without them.
pub fn backup(database: &Database, path: &Path, cache_bytes: usize) -> Result<Revision> {
    let fail = |source| explain_io("write", path.to_path_buf(), source);
    let temp = fresh(path).map_err(fail)?;
    let copied = (|| {
        let from = database.begin_read()?;
        let meta = from.open_table(META)?;
        let number = |name: &str| -> Result<u64, redb::Error> { Ok(meta.get(name)?.map_or(0, |value| value.value())) };
        let newest = from.open_table(HISTORY)?.last()?.map_or(0, |(n, _)| n.value());
        let incarnation = u32::try_from(number(layout::META_INCARNATION)?).unwrap_or(u32::MAX);
        let head = Revision::new(incarnation, number(layout::META_BASE)?.max(newest));
        let to = builder(cache_bytes).create_with_backend(metered(temp.file()?, &Arc::default())?)?;
        initialise(&to, head, number(layout::META_LEASES)?)?;
        let txn = to.begin_write()?;
        {
            let mut live = txn.open_table(LIVE)?;
            for row in from.open_table(LIVE)?.iter()? {
                let (key, value) = row?;
                live.insert(key.value(), value.value())?;
            }
        }
        txn.commit()?;
        Ok(head)
    })();
    let head = copied.map_err(|error: redb::Error| explain("write", path, error))?;
    std::fs::hard_link(&temp.path, path).map_err(fail)?;
    sync_dir(parent(path)).map_err(fail)?;
    Ok(head)
}

/// Makes the database at `target` from a backup, in a new incarnation: higher than the one in the backup and not below `floor`.
///
/// Pass as `floor` one more than the highest incarnation that anybody has seen (agents remember it), so that restoring the same backup twice
/// does not make two histories with the same name. Leases end, and keys attached to them are gone; revisions known before are answered with `Compacted`.
///
/// # Errors
/// When `target` exists, or the backup cannot be read.
pub fn restore(backup: &Path, target: &Path, floor: Option<u32>) -> Result<Revision> {
    let fail = |source| explain_io("restore", target.to_path_buf(), source);
    if target.try_exists().map_err(fail)? {
        return Err(fail(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a database is there already; move it away first",
        )));
    }
    std::fs::create_dir_all(parent(target)).map_err(fail)?;
    let temp = fresh(target).map_err(fail)?;
    std::fs::copy(backup, &temp.path).map_err(|source| explain_io("read", backup.to_path_buf(), source))?;
    std::fs::set_permissions(&temp.path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).map_err(fail)?;
    let (database, loaded) = open(&temp.path, super::CACHE_BYTES, &Arc::default())?;
    let head = Revision::new((loaded.head.incarnation + 1).max(floor.unwrap_or(0)), loaded.head.n);
    new_incarnation(&database, head).map_err(|error| explain("restore", target, error))?;
    drop(database);
    std::fs::hard_link(&temp.path, target).map_err(fail)?;
    sync_dir(parent(target)).map_err(fail)?;
    Ok(head)
}

fn new_incarnation(database: &Database, head: Revision) -> Result<(), redb::Error> {
    let txn = database.begin_write()?;
    {
        let mut meta = txn.open_table(META)?;
        meta.insert(layout::META_INCARNATION, u64::from(head.incarnation))?;
        meta.insert(layout::META_BASE, head.n)?;
        meta.insert(layout::META_FLOOR, head.n)?;
        meta.insert(layout::META_LEASES, 0)?;
        txn.delete_table(HISTORY)?;
        txn.delete_table(SUPERSEDED)?;
        txn.delete_table(LEASES)?;
        txn.delete_table(LEASE_KEYS)?;
        txn.open_table(HISTORY)?;
        txn.open_table(SUPERSEDED)?;
        txn.open_table(LEASES)?;
        txn.open_table(LEASE_KEYS)?;
        // A row that does not decode stays: it is reported when somebody reads it.
        txn.open_table(LIVE)?
            .retain(|_, row| layout::decode_live(row).map_or(true, |(head, _)| head.lease.is_none()))?;
    }
    Ok(txn.commit()?)
}
