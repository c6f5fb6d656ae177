//! Values of one type below one prefix: reads that decode, and the guards and writes that belong to each change.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::objects::{decode_value, encode_value};
use crate::{CommitOutcome, Entry, Guard, Key, Prefix, Result, Revision, SharedStore, Store, StoreError, Txn, Write};

/// How often a commit with an unknown outcome is asked again before the caller is told that it is unknown.
const ASK_AGAIN: usize = 5;

/// A decoded value with its place in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored<T> {
    /// The key.
    pub key: Key,
    /// The decoded value.
    pub value: T,
    /// When it was last modified.
    pub revision: Revision,
    /// When it came into being.
    pub created: Revision,
}

/// Values of type `T` below a prefix, named by the rest of the key.
pub struct Collection<T> {
    store: SharedStore,
    prefix: Prefix,
    values: PhantomData<fn() -> T>,
}

impl<T> Clone for Collection<T> {
    fn clone(&self) -> Self {
        Self { store: SharedStore::clone(&self.store), prefix: self.prefix.clone(), values: PhantomData }
    }
}

impl<T: Serialize + DeserializeOwned> Collection<T> {
    /// The collection below `prefix`.
    #[must_use]
    pub fn new(store: SharedStore, prefix: Prefix) -> Self {
        Self { store, prefix, values: PhantomData }
    }

    /// Where the values are.
    #[must_use]
    pub fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// The key of `name`, which may have several segments.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`].
    pub fn key(&self, name: &str) -> Result<Key> {
        self.prefix.key(name)
    }

    /// Decodes an entry of this collection.
    ///
    /// # Errors
    /// [`StoreError::Codec`].
    pub fn decode(entry: Entry) -> Result<Stored<T>> {
        let value = decode_value(&entry.key, &entry.value)?;
        Ok(Stored { key: entry.key, value, revision: entry.revision, created: entry.created })
    }

    /// The value called `name`.
    ///
    /// # Errors
    /// As [`Store::get`] and [`Collection::decode`].
    pub async fn get(&self, name: &str) -> Result<Option<Stored<T>>> {
        self.store.get(&self.key(name)?).await?.map(Self::decode).transpose()
    }

    /// Every value, from one snapshot, with the revision of that snapshot.
    ///
    /// # Errors
    /// As [`Store::list`] and [`Collection::decode`].
    pub async fn all(&self) -> Result<(Vec<Stored<T>>, Revision)> {
        let (entries, revision) = list_all(&*self.store, &self.prefix, None).await?;
        Ok((entries.into_iter().map(Self::decode).collect::<Result<_>>()?, revision))
    }

    /// What a creation needs.
    ///
    /// # Errors
    /// [`StoreError::InvalidKey`].
    pub fn create_ops(&self, name: &str, value: &T) -> Result<(Guard, Write)> {
        let key = self.key(name)?;
        Ok((Guard::Absent(key.clone()), Write::Put { key, value: encode_value(value), lease: None }))
    }

    /// What a change of what was read needs.
    #[must_use]
    pub fn replace_ops(&self, read: &Stored<T>) -> (Guard, Write) {
        let write = Write::Put { key: read.key.clone(), value: encode_value(&read.value), lease: None };
        (Guard::Revision(read.key.clone(), read.revision), write)
    }

    /// What the deletion of what was read needs.
    #[must_use]
    pub fn delete_ops(&self, read: &Stored<T>) -> (Guard, Write) {
        (Guard::Revision(read.key.clone(), read.revision), Write::Delete { key: read.key.clone() })
    }

    /// Creates a value on its own.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn create(&self, name: &str, value: &T) -> Result<CommitOutcome> {
        let (guard, write) = self.create_ops(name, value)?;
        commit_settled(&*self.store, Txn::random().guard(guard).write(write)).await
    }

    /// Writes back a value that was read and changed.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn replace(&self, read: &Stored<T>) -> Result<CommitOutcome> {
        let (guard, write) = self.replace_ops(read);
        commit_settled(&*self.store, Txn::random().guard(guard).write(write)).await
    }

    /// Deletes a value that was read.
    ///
    /// # Errors
    /// As [`Store::commit`].
    pub async fn delete(&self, read: &Stored<T>) -> Result<CommitOutcome> {
        let (guard, write) = self.delete_ops(read);
        commit_settled(&*self.store, Txn::random().guard(guard).write(write)).await
    }
}

/// Commits, and while the outcome is unknown commits the same id again, a few times. Still `Unknown` when the answer stays away.
///
/// # Errors
/// As [`Store::commit`].
pub async fn commit_settled(store: &dyn Store, txn: Txn) -> Result<CommitOutcome> {
    for _ in 0..ASK_AGAIN {
        match store.commit(txn.clone()).await? {
            CommitOutcome::Unknown(_) => {}
            known => return Ok(known),
        }
    }
    Ok(CommitOutcome::Unknown(txn.id))
}

/// Everything below `prefix`, page by page from one snapshot: `at`, or now.
///
/// # Errors
/// As [`Store::list`]. When the snapshot of now is compacted before the last page, it starts over a few times.
pub async fn list_all(store: &dyn Store, prefix: &Prefix, at: Option<Revision>) -> Result<(Vec<Entry>, Revision)> {
    let mut attempt = 0;
    loop {
        match list_snapshot(store, prefix, at).await {
            Err(StoreError::Compacted { .. }) if at.is_none() && attempt < ASK_AGAIN => attempt += 1,
            other => return other,
        }
    }
}

async fn list_snapshot(store: &dyn Store, prefix: &Prefix, mut at: Option<Revision>) -> Result<(Vec<Entry>, Revision)> {
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let after = entries.last().map(|entry| entry.key.clone());
        let page = store.list(prefix, crate::MAX_PAGE, after, at).await?;
        entries.extend(page.entries);
        if !page.more {
            return Ok((entries, page.revision));
        }
        at = Some(page.revision);
    }
}
