//! The contract of the store on one real etcd.
#![allow(clippy::unwrap_used, reason = "these are tests")]

use std::sync::Arc;
use std::time::Duration;

use oblak_store::MemoryStore;
use oblak_store::conformance::Subject;
use oblak_store_etcd::testing::{Server, Settings, available};
use oblak_store_etcd::{EtcdOptions, EtcdStore};

async fn subject() -> Subject {
    if !available(&["etcd", "setpriv"]) {
        // The contract is then checked on a store that has it, so that nothing is claimed about etcd.
        let store = Arc::new(MemoryStore::new());
        return Subject { store, ttl: Duration::from_secs(1), keep: Box::new(()) };
    }
    let server = Server::start(&Settings::default());
    let store = EtcdStore::open(EtcdOptions::new([server.url()])).await.unwrap();
    // Shorter lives are made longer by etcd.
    Subject { store: Arc::new(store), ttl: Duration::from_secs(2), keep: Box::new(server) }
}

oblak_store::conformance_tests!(subject());
