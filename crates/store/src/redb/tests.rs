//! The conformance suite on redb.

use std::sync::Arc;
use std::time::Duration;

use super::{RedbOptions, RedbStore};
use crate::conformance::Subject;

async fn subject() -> Subject {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let store = RedbStore::open(&dir.path().join("state.redb"), RedbOptions::default()).expect("an empty store");
    Subject { store: Arc::new(store), ttl: Duration::from_secs(1), keep: Box::new(dir) }
}

crate::conformance_tests!(subject());

mod disasters;
mod power;
