//! Guards and writes of a change, and several changes folded into one commit.

use std::collections::BTreeMap;

use bytes::Bytes;
use oblak_model::{Kind, Object, Revision};
use oblak_store::{Guard, Key, MAX_TXN_BYTES, MAX_TXN_OPS, Txn, TxnId, Write, objects};

/// Guards and writes that belong together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ops {
    /// Conditions.
    pub guards: Vec<Guard>,
    /// Changes.
    pub writes: Vec<Write>,
}

impl Ops {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds a condition.
    pub fn guard(&mut self, guard: Guard) {
        self.guards.push(guard);
    }
    /// Adds a put.
    pub fn put(&mut self, key: Key, value: Bytes) {
        self.writes.push(objects::put(key, value));
    }
    /// Adds a deletion.
    pub fn delete(&mut self, key: Key) {
        self.writes.push(Write::Delete { key });
    }
    /// Adds the creation of an object and of its name.
    pub fn create<K: Kind>(&mut self, object: &Object<K>) {
        let (guards, writes) = objects::create_ops(object);
        self.guards.extend(guards);
        self.writes.extend(writes);
    }
    /// Adds a change of an object that was read at `metadata.revision`.
    pub fn update<K: Kind>(&mut self, object: &Object<K>) {
        let (guard, write) = objects::update_ops(object);
        self.guards.push(guard);
        self.writes.push(write);
    }
    /// Adds the final removal of an object that was read at `metadata.revision`.
    pub fn remove<K: Kind>(&mut self, object: &Object<K>) {
        let (guard, writes) = objects::delete_ops(object);
        self.guards.push(guard);
        self.writes.extend(writes);
    }
    /// Adds all of another change.
    pub fn extend(&mut self, other: Self) {
        self.guards.extend(other.guards);
        self.writes.extend(other.writes);
    }
}

/// Bytes of values in one commit; below the limit of the store, because keys and guards count there too.
const BYTES: usize = MAX_TXN_BYTES / 2;

fn size(write: &Write) -> usize {
    match write {
        Write::Put { key, value, .. } => key.len() + value.len(),
        Write::Delete { key } => key.len(),
    }
}

/// Several changes as one commit: a later write to a key replaces an earlier one, the first guard of a key stays, because it is the one
/// about what is in the store.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    guards: BTreeMap<Key, Guard>,
    leases: Vec<Guard>,
    writes: BTreeMap<Key, Write>,
}

impl Batch {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a change.
    pub fn absorb(&mut self, ops: Ops) {
        for guard in ops.guards {
            self.guard(guard);
        }
        for write in ops.writes {
            self.write(write);
        }
    }

    /// Adds a condition.
    pub fn guard(&mut self, guard: Guard) {
        let key = match &guard {
            Guard::Revision(key, _) | Guard::Absent(key) | Guard::Present(key) => key.clone(),
            Guard::LeaseAlive(_) => {
                self.leases.push(guard);
                return;
            }
        };
        match self.guards.get(&key) {
            Some(Guard::Revision(..) | Guard::Absent(_)) => {}
            _ => {
                self.guards.insert(key, guard);
            }
        }
    }

    /// Adds a write.
    pub fn write(&mut self, write: Write) {
        self.writes.insert(write.key().clone(), write);
    }

    /// What the batch does to `key`: `Some(None)` when it deletes it.
    #[must_use]
    pub fn pending(&self, key: &Key) -> Option<Option<&Bytes>> {
        self.writes.get(key).map(|write| match write {
            Write::Put { value, .. } => Some(value),
            Write::Delete { .. } => None,
        })
    }

    /// Writes below a prefix, in key order.
    pub fn pending_below<'a>(&'a self, prefix: &'a oblak_store::Prefix) -> impl Iterator<Item = &'a Write> {
        self.writes.values().filter(|write| prefix.contains(write.key()))
    }

    /// The revision that `key` must have, when there is such a guard.
    #[must_use]
    pub fn guarded_at(&self, key: &Key) -> Option<Revision> {
        match self.guards.get(key) {
            Some(Guard::Revision(_, revision)) => Some(*revision),
            _ => None,
        }
    }

    /// Operations that count towards the limit of a commit.
    #[must_use]
    pub fn ops(&self) -> usize {
        self.guards.len() + self.leases.len() + self.writes.len()
    }

    /// Whether another change can go into the same commit. A single change always can: its size is checked when it is accepted.
    #[must_use]
    pub fn has_room_for(&self, ops: &Ops) -> bool {
        let new_guard = |guard: &&Guard| match guard {
            Guard::Revision(key, _) | Guard::Absent(key) | Guard::Present(key) => !self.guards.contains_key(key),
            Guard::LeaseAlive(_) => true,
        };
        let guards = ops.guards.iter().filter(new_guard).count();
        let writes = ops.writes.iter().filter(|write| !self.writes.contains_key(write.key())).count();
        let bytes: usize = ops.writes.iter().map(size).sum();
        self.is_empty() || (self.ops() + guards + writes <= MAX_TXN_OPS && self.bytes() + bytes <= BYTES)
    }

    /// Keys to be written.
    pub fn keys(&self) -> impl Iterator<Item = &Key> {
        self.writes.keys()
    }

    /// Expects keys at the revisions that earlier parts of the same plan gave them.
    pub fn follow(&mut self, written: &BTreeMap<Key, Revision>) {
        for guard in self.guards.values_mut() {
            if let Guard::Revision(key, revision) = guard
                && let Some(newer) = written.get(key)
            {
                *revision = *newer;
            }
        }
    }

    /// Bytes of the values to be written.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.writes.values().map(size).sum()
    }

    /// Whether nothing would be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The commit.
    #[must_use]
    pub fn into_txn(self, id: TxnId) -> Txn {
        Txn {
            id,
            guards: self.guards.into_values().chain(self.leases).collect(),
            writes: self.writes.into_values().collect(),
        }
    }
}
