//! All of a store: out of one, into an archive or another store.
//!
//! Keys that live and die with a lease are left out: leases do not survive a move, and neither may what they say. Into an empty store the
//! entries go in commits of bounded size, under a mark that says which copy is under way. A copy that was interrupted is recognised by its mark, wiped
//! and done again; a store with a mark is not to be served.

use bytes::Bytes;
use oblak_model::{Revision, Timestamp};
use oblak_platform::random::{Random, uuid7};
use oblak_store::{
    CommitOutcome, Key, MAX_PAGE, MAX_TXN_BYTES, MAX_TXN_OPS, Prefix, Store, StoreError, Txn, TxnId, commit_settled,
    objects,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::archive::{Head, Writer};
use crate::envelope::Sealer;
use crate::{BackupError, Result};

/// Operations in one commit; the mark's guard is one more.
const OPS: usize = MAX_TXN_OPS - 2;
const BYTES: usize = MAX_TXN_BYTES / 2;

/// Which copy is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Whose state is copied. Only a copy of the same may be wiped to begin again.
    pub origin: String,
    /// Digest of what is copied.
    pub digest: String,
    /// Whether all is there.
    pub done: bool,
}

fn mark_key() -> Key {
    objects::secret_key("import", "mark")
}

fn is_copied(key: &Key) -> bool {
    !objects::is_leased(key) && *key != mark_key()
}

/// The mark in a store: while it is there and not done, the store holds half of a copy.
///
/// # Errors
/// The store does not answer.
pub async fn mark(store: &dyn Store) -> Result<Option<Mark>> {
    let key = mark_key();
    let Some(entry) = store.get(&key).await? else { return Ok(None) };
    Ok(Some(objects::decode_value(&key, &entry.value)?))
}

/// Takes the mark of a finished copy away.
///
/// # Errors
/// The store does not answer.
pub async fn unmark(store: &dyn Store, random: &dyn Random) -> Result<()> {
    commit(store, Txn::new(id(random)).delete(mark_key())).await
}

/// A snapshot of everything, page by page.
struct Pages<'a> {
    store: &'a dyn Store,
    at: Option<Revision>,
    after: Option<Key>,
    done: bool,
}

impl<'a> Pages<'a> {
    fn new(store: &'a dyn Store) -> Self {
        Self { store, at: None, after: None, done: false }
    }

    async fn next(&mut self) -> Result<Option<Vec<(Key, Bytes)>>> {
        if self.done {
            return Ok(None);
        }
        let page = self.store.list(&Prefix::all(), MAX_PAGE, self.after.clone(), self.at).await?;
        self.at = Some(page.revision);
        self.after = page.entries.last().map(|entry| entry.key.clone()).or(self.after.take());
        self.done = !page.more;
        Ok(Some(page.entries.into_iter().filter(|e| is_copied(&e.key)).map(|e| (e.key, e.value)).collect()))
    }
}

/// Everything in a store at one moment, for [`import`].
///
/// # Errors
/// The store does not answer, or changed so fast that the moment was forgotten.
pub async fn everything(store: &dyn Store) -> Result<(Vec<(Key, Bytes)>, Revision)> {
    let mut pages = Pages::new(store);
    let mut entries = Vec::new();
    while let Some(page) = pages.next().await? {
        entries.extend(page);
    }
    Ok((entries, pages.at.unwrap_or(Revision::ZERO)))
}

/// A backup that is made piece by piece.
pub struct Export<'a> {
    pages: Pages<'a>,
    writer: Option<Writer>,
    first: Vec<(Key, Bytes)>,
}

impl<'a> Export<'a> {
    /// Reads the first page.
    ///
    /// # Errors
    /// The store does not answer.
    pub async fn begin(
        store: &'a dyn Store,
        sealer: Sealer,
        keys: &serde_json::Value,
        version: &str,
        now: Timestamp,
    ) -> Result<Self> {
        let backend = store.stats().await?.backend;
        let mut pages = Pages::new(store);
        let first = pages.next().await?.unwrap_or_default();
        let head = Head::new(version, backend, pages.at.unwrap_or(Revision::ZERO), now);
        Ok(Self { pages, writer: Some(Writer::new(sealer, &head, keys)?), first })
    }

    /// The next bytes of the file; `None` when it is whole.
    ///
    /// # Errors
    /// The store does not answer, or forgot the moment that is saved ([`StoreError::Compacted`]): begin again.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(writer) = &mut self.writer else { return Ok(None) };
        let page = match std::mem::take(&mut self.first) {
            first if !first.is_empty() => Some(first),
            _ => self.pages.next().await?,
        };
        if let Some(page) = page {
            page.iter().try_for_each(|(key, value)| writer.entry(key, value))?;
            return Ok(Some(writer.take()));
        }
        self.writer.take().map(Writer::finish).transpose()
    }
}

/// Puts entries into an empty store, or begins again where a copy of the same `origin` was not switched over. Compares afterwards, and leaves a mark that is done:
/// take it away with [`unmark`] when the switch is made.
///
/// # Errors
/// [`BackupError::NotEmpty`], [`BackupError::Differs`], or the store does not answer.
pub async fn import(store: &dyn Store, entries: &[(Key, Bytes)], origin: &str, random: &dyn Random) -> Result<()> {
    let digest = digest(entries);
    match mark(store).await? {
        Some(found) if found.origin == origin && found.digest == digest && found.done => {
            return compare(store, entries).await;
        }
        // Half of it, or all of an older state: nobody has been served from it.
        Some(found) if found.origin == origin => wipe(store, random).await?,
        _ => {
            let there = store.list(&Prefix::all(), 1, None, None).await?;
            if !there.entries.is_empty() {
                return Err(BackupError::NotEmpty(store.stats().await?.keys));
            }
        }
    }
    let put = |done: bool| {
        let mark = Mark { origin: origin.into(), digest: digest.clone(), done };
        Txn::new(id(random)).put(mark_key(), objects::encode_value(&mark))
    };
    commit(store, put(false)).await?;
    for part in parts(entries) {
        let txn = part.iter().fold(Txn::new(id(random)), |txn, (key, value)| txn.put(key.clone(), value.clone()));
        commit(store, txn).await?;
    }
    compare(store, entries).await?;
    commit(store, put(true)).await
}

/// Cuts entries into what fits one commit.
fn parts(entries: &[(Key, Bytes)]) -> Vec<&[(Key, Bytes)]> {
    let (mut parts, mut begin, mut bytes) = (Vec::new(), 0, 0);
    for (at, (key, value)) in entries.iter().enumerate() {
        let size = key.len() + value.len();
        if at > begin && (at - begin >= OPS || bytes + size > BYTES) {
            parts.push(&entries[begin..at]);
            (begin, bytes) = (at, 0);
        }
        bytes += size;
    }
    parts.push(&entries[begin..]);
    parts
}

async fn wipe(store: &dyn Store, random: &dyn Random) -> Result<()> {
    loop {
        let page = store.list(&Prefix::all(), OPS, None, None).await?;
        let keys: Vec<_> = page.entries.into_iter().map(|entry| entry.key).filter(|key| *key != mark_key()).collect();
        if keys.is_empty() {
            return Ok(());
        }
        commit(store, keys.into_iter().fold(Txn::new(id(random)), Txn::delete)).await?;
    }
}

async fn compare(store: &dyn Store, entries: &[(Key, Bytes)]) -> Result<()> {
    let (there, _) = everything(store).await?;
    let (wanted, found) = (digest(entries), digest(&there));
    if wanted != found {
        return Err(BackupError::Differs(format!("{} keys there, {} here", there.len(), entries.len())));
    }
    Ok(())
}

/// One value for all entries, in order.
#[must_use]
pub fn digest(entries: &[(Key, Bytes)]) -> String {
    let mut sha = Sha256::new();
    for (key, value) in entries {
        for part in [key.as_bytes(), value] {
            sha.update((part.len() as u64).to_le_bytes());
            sha.update(part);
        }
    }
    data_encoding::HEXLOWER.encode(&sha.finalize())
}

fn id(random: &dyn Random) -> TxnId {
    TxnId(uuid7(random, oblak_platform::clock::system().now()))
}

async fn commit(store: &dyn Store, txn: Txn) -> Result<()> {
    let unclear = || StoreError::Unreachable {
        detail: "it is not known whether a commit was made; run the command again".into(),
    };
    match commit_settled(store, txn).await? {
        CommitOutcome::Committed(_) => Ok(()),
        CommitOutcome::Unknown(id) if store.outcome(id).await?.is_some() => Ok(()),
        _ => Err(unclear().into()),
    }
}

#[cfg(test)]
mod tests {
    use oblak_platform::random::SystemRandom;
    use oblak_store::MemoryStore;

    use super::*;
    use crate::archive;

    fn key(text: &str) -> Key {
        Key::new(text).unwrap()
    }

    async fn filled() -> MemoryStore {
        let store = MemoryStore::default();
        for n in 0..250u32 {
            let value = vec![b'x'; if n % 50 == 0 { 300_000 } else { 40 }];
            commit(&store, Txn::random().put(key(&format!("/thing/a/{n:04}")), value)).await.unwrap();
        }
        commit(&store, Txn::random().put(key("/lease/_/n1"), "held")).await.unwrap();
        store
    }

    async fn exported(store: &MemoryStore, passphrase: &str) -> Vec<u8> {
        let sealer = Sealer::new(passphrase, &SystemRandom).unwrap();
        let keys = serde_json::json!({"ca_pem": "authority"});
        let now = Timestamp::from_micros(1_772_323_200_000_000);
        let mut export = Export::begin(store, sealer, &keys, "9.9", now).await.unwrap();
        let mut file = Vec::new();
        while let Some(bytes) = export.next().await.unwrap() {
            file.extend(bytes);
        }
        file
    }

    #[tokio::test]
    async fn a_backup_holds_everything_but_leases_and_goes_into_another_store() {
        let store = filled().await;
        let file = exported(&store, "correct horse battery").await;
        assert!(!file.windows(7).any(|window| window == b"/thing/"));
        assert!(matches!(archive::read("wrong horse battery", &file[..]), Err(BackupError::Passphrase)));
        assert!(archive::read("correct horse battery", &file[..file.len() - 40]).is_err());
        let archive = archive::read("correct horse battery", &file[..]).unwrap();
        assert_eq!((archive.entries.len(), archive.head.backend.as_str()), (250, "memory"));
        assert_eq!(archive.keys["ca_pem"], "authority");
        assert_eq!(archive.head.revision, store.revision().await.unwrap());

        let target = MemoryStore::default();
        import(&target, &archive.entries, "backup x", &SystemRandom).await.unwrap();
        assert!(mark(&target).await.unwrap().unwrap().done);
        // The same again finds everything there.
        import(&target, &archive.entries, "backup x", &SystemRandom).await.unwrap();
        unmark(&target, &SystemRandom).await.unwrap();
        let (there, _) = everything(&target).await.unwrap();
        assert_eq!(digest(&there), digest(&archive.entries));
        // Whoever has something is left alone.
        let refused = import(&target, &archive.entries, "backup x", &SystemRandom).await;
        assert!(matches!(refused, Err(BackupError::NotEmpty(250))), "{refused:?}");
    }

    #[tokio::test]
    async fn an_interrupted_copy_is_done_again_and_another_one_is_not_touched() {
        let (entries, _) = everything(&filled().await).await.unwrap();
        let target = MemoryStore::default();
        let half = Mark { origin: "a".into(), digest: "of something older".into(), done: false };
        commit(&target, Txn::random().put(mark_key(), objects::encode_value(&half))).await.unwrap();
        commit(&target, Txn::random().put(key("/thing/a/0001"), "torn").put(key("/other/a/1"), "x")).await.unwrap();
        assert!(matches!(import(&target, &entries, "b", &SystemRandom).await, Err(BackupError::NotEmpty(_))));
        import(&target, &entries, "a", &SystemRandom).await.unwrap();
        assert_eq!(digest(&everything(&target).await.unwrap().0), digest(&entries));
    }

    #[test]
    fn parts_fit_a_commit() {
        let entries: Vec<_> = (0..1000).map(|n| (key(&format!("/a/{n:04}")), Bytes::from(vec![0; n * 10]))).collect();
        let parts = parts(&entries);
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), 1000);
        for part in &parts {
            let bytes: usize = part.iter().map(|(key, value)| key.len() + value.len()).sum();
            assert!(part.len() <= OPS && (bytes <= BYTES || part.len() == 1));
        }
        assert_eq!(super::parts(&[]).len(), 1);
    }
}
