//! A change in the making: reads see the cache and what the change itself has done so far; the result is one commit.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use oblak_control::lifecycle::{Batch, Ops};
use oblak_model::{ApiError, Code, Kind, NodeId, Object, Revision, Timestamp};
use oblak_store::objects::{self, Allocation};
use oblak_store::{Guard, Key, Prefix, Write};
use serde::de::DeserializeOwned;
use uuid::Uuid;

use crate::docs;
use crate::error::store_error;
use crate::state::App;

/// Claims on keys that end when the commit is decided.
pub(crate) struct Claimed {
    app: App,
    keys: Vec<Key>,
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut claims = self.app.lock_claims();
        for key in &self.keys {
            claims.keys.remove(key);
        }
    }
}

/// The change.
pub(crate) struct Draft {
    pub app: App,
    pub now: Timestamp,
    pub batch: Batch,
    claimed: Claimed,
}

impl Draft {
    pub fn new(app: &App) -> Self {
        Self {
            app: app.clone(),
            now: app.now(),
            batch: Batch::new(),
            claimed: Claimed { app: app.clone(), keys: Vec::new() },
        }
    }

    pub fn finish(self) -> (Batch, Claimed) {
        (self.batch, self.claimed)
    }

    /// Reserves a key for this change among the requests of this server.
    pub fn claim(&mut self, key: &Key) -> bool {
        let fresh = self.app.lock_claims().keys.insert(key.clone());
        if fresh {
            self.claimed.keys.push(key.clone());
        }
        fresh
    }

    /// The value at a key with the revision that is in the store (none when this change creates it).
    pub fn raw(&self, key: &Key) -> Option<(Bytes, Option<Revision>)> {
        match self.batch.pending(key) {
            Some(pending) => pending.map(|value| (value.clone(), self.batch.guarded_at(key))),
            None => self.app.docs.get(key).map(|item| (item.raw.clone(), Some(item.revision))),
        }
    }

    pub fn value<T: DeserializeOwned>(&self, key: &Key) -> Result<Option<(T, Option<Revision>)>, ApiError> {
        let Some((raw, revision)) = self.raw(key) else { return Ok(None) };
        let value = objects::decode_value(key, &raw).map_err(|e| store_error(&e))?;
        Ok(Some((value, revision)))
    }

    pub fn at<K: Kind>(&self, key: &Key) -> Result<Option<Object<K>>, ApiError> {
        let pending = self.batch.pending(key);
        let decoded = match pending {
            Some(Some(raw)) => objects::decode_value(key, raw).map(Some),
            Some(None) => Ok(None),
            None => self.app.docs.get(key).map(|item| docs::object::<K>(&item)).transpose(),
        };
        decoded.map_err(|e| store_error(&e))
    }

    /// As [`Draft::at`], decoded once for all changes that look at it.
    pub fn shared_at<K: Kind>(&self, key: &Key) -> Result<Option<Arc<Object<K>>>, ApiError> {
        if self.batch.pending(key).is_some() {
            return Ok(self.at::<K>(key)?.map(Arc::new));
        }
        self.app.docs.get(key).map(|item| docs::shared::<K>(&item)).transpose().map_err(|e| store_error(&e))
    }

    pub fn get<K: Kind>(&self, scope: &str, id: Uuid) -> Result<Option<Object<K>>, ApiError> {
        self.at(&objects::object_key::<K>(scope, id))
    }

    /// By name or id.
    pub fn find<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<Option<Object<K>>, ApiError> {
        self.key_of::<K>(scope, name_or_id)?.map_or(Ok(None), |key| self.at(&key))
    }

    /// Whether [`Draft::find`] would find something.
    pub fn exists<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<bool, ApiError> {
        if self.batch.is_empty() {
            return Ok(docs::find::<K>(&self.app.docs, scope, name_or_id).is_some());
        }
        Ok(self.find::<K>(scope, name_or_id)?.is_some())
    }

    /// As [`Draft::find`], decoded once for all changes that look at it.
    pub fn find_shared<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<Option<Arc<Object<K>>>, ApiError> {
        if self.batch.is_empty() {
            return self.app.shared::<K>(scope, name_or_id);
        }
        self.key_of::<K>(scope, name_or_id)?.map_or(Ok(None), |key| self.shared_at(&key))
    }

    /// The key that a name or id leads to; there may be nothing at it.
    fn key_of<K: Kind>(&self, scope: &str, name_or_id: &str) -> Result<Option<Key>, ApiError> {
        if let Ok(id) = name_or_id.parse::<Uuid>() {
            return Ok(Some(objects::object_key::<K>(scope, id)));
        }
        let Ok(key) = Key::from_segments(["name", K::KIND, scope, name_or_id]) else { return Ok(None) };
        Ok(self.value::<Uuid>(&key)?.map(|(id, _)| objects::object_key::<K>(scope, id)))
    }

    /// As [`Draft::find`], for an object that a field names: it must exist, must not be on its way out, and must still be the same when
    /// the change is committed.
    pub fn need<K: Kind>(&mut self, scope: &str, name_or_id: &str, field: &str) -> Result<Arc<Object<K>>, ApiError> {
        let object = self
            .find_shared::<K>(scope, name_or_id)?
            .ok_or_else(|| ApiError::invalid(field, format!("{} {name_or_id:?} does not exist", K::KIND)))?;
        if object.metadata.is_deleting() {
            return Err(ApiError::invalid(field, format!("{} {name_or_id:?} is being deleted", K::KIND)));
        }
        self.depend(&object);
        Ok(object)
    }

    /// The commit only happens while the object is still as it was read.
    pub fn depend<K: Kind>(&mut self, object: &Object<K>) {
        self.batch.guard(Guard::Revision(objects::key_of(object), object.metadata.revision));
    }

    /// All objects of a kind in a scope, or in all scopes.
    pub fn list<K: Kind>(&self, scope: Option<&str>) -> Result<Vec<Object<K>>, ApiError> {
        let prefix: Prefix = objects::object_prefix::<K>(scope);
        let mut keys: BTreeSet<Key> = self.app.docs.all(&prefix).iter().map(|item| item.key.clone()).collect();
        keys.extend(self.batch.pending_below(&prefix).map(|write| write.key().clone()));
        keys.iter().filter_map(|key| self.at(key).transpose()).collect()
    }

    /// As [`Draft::list`], decoded once for all changes that look at them.
    pub fn list_shared<K: Kind>(&self, scope: Option<&str>) -> Result<Vec<Arc<Object<K>>>, ApiError> {
        let prefix: Prefix = objects::object_prefix::<K>(scope);
        let items = self.app.docs.all(&prefix);
        if self.batch.pending_below(&prefix).next().is_none() {
            return items
                .iter()
                .map(|item| docs::shared::<K>(item))
                .collect::<Result<_, _>>()
                .map_err(|e| store_error(&e));
        }
        let mut keys: BTreeSet<Key> = items.iter().map(|item| item.key.clone()).collect();
        keys.extend(self.batch.pending_below(&prefix).map(|write| write.key().clone()));
        keys.iter().filter_map(|key| self.shared_at(key).transpose()).collect()
    }

    /// Objects that an index of the cache finds, as this change sees them, and those that the change itself wrote.
    pub fn indexed<K: Kind>(&self, index: &str, term: &str, scope: &str) -> Result<Vec<Object<K>>, ApiError> {
        let mut keys: BTreeSet<Key> = self.app.docs.find(index, term).iter().map(|item| item.key.clone()).collect();
        let prefix = objects::object_prefix::<K>(Some(scope));
        keys.extend(self.batch.pending_below(&prefix).map(|write| write.key().clone()));
        keys.iter().filter(|key| prefix.contains(key)).filter_map(|key| self.at(key).transpose()).collect()
    }

    pub fn create<K: Kind>(&mut self, object: &Object<K>) -> Result<(), ApiError> {
        let name = objects::name_key::<K>(object.scope_key(), &object.metadata.name);
        if self.raw(&name).is_some() {
            return Err(name_taken::<K>(&object.metadata.name));
        }
        let mut ops = Ops::new();
        ops.create(object);
        self.batch.absorb(ops);
        Ok(())
    }

    pub fn update<K: Kind>(&mut self, object: &Object<K>) {
        let mut ops = Ops::new();
        ops.update(object);
        self.batch.absorb(ops);
    }

    pub fn remove<K: Kind>(&mut self, object: &Object<K>) {
        let mut ops = Ops::new();
        ops.remove(object);
        self.batch.absorb(ops);
    }

    pub fn put<T: serde::Serialize>(&mut self, key: Key, value: &T) {
        self.batch.write(objects::put(key, objects::encode_value(value)));
    }

    pub fn delete(&mut self, key: Key) {
        self.batch.write(Write::Delete { key });
    }

    /// What is reserved on a node.
    pub fn allocation(&self, node: NodeId) -> Result<Option<(Allocation, Revision)>, ApiError> {
        let found = self.value::<Allocation>(&objects::allocation_key(node))?;
        Ok(found.and_then(|(allocation, revision)| Some((allocation, revision?))))
    }

    /// A fresh object with everything that the server gives it.
    pub fn stamp<K: Kind>(&self, object: &mut Object<K>, project: Option<&str>) {
        object.metadata.id = self.app.uuid();
        object.metadata.project = project.map(String::from);
        object.metadata.created_at = self.now;
        object.metadata.generation = 1;
        object.metadata.revision = Revision::ZERO;
        object.metadata.deleted_at = None;
        object.metadata.finalizers.clear();
    }
}

pub(crate) fn name_taken<K: Kind>(name: &str) -> ApiError {
    ApiError::new(Code::NameTaken, format!("{} {name:?} exists already; choose another name", K::KIND))
        .at("/metadata/name")
}
