//! Answers of the store that get lost, and starts that are cut off.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)] // a panic is how a test fails

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Cloud, INSTANCES, TestClock};
use oblak_api::bootstrap;
use oblak_store::memory::{Fault, Faults, Lost};
use oblak_store::{HistoryLimits, MemoryStore, SharedStore, Store, Txn};

/// Loses one answer of three, now on the way there, now on the way back.
#[derive(Default)]
struct Lossy(AtomicU64);

impl Faults for Lossy {
    fn commit(&self, _: &Txn) -> Fault {
        let n = self.0.fetch_add(1, Ordering::SeqCst);
        let lost = match n % 6 {
            2 => Lost::Request,
            5 => Lost::Reply,
            _ => Lost::No,
        };
        Fault { lost, ..Fault::default() }
    }
}

#[tokio::test]
async fn lost_answers_neither_lose_nor_repeat_anything() {
    let cloud =
        Cloud::with(|_| {}, |clock| MemoryStore::with_faults(clock, HistoryLimits::default(), Lossy::default())).await;
    for i in 0..20 {
        cloud.launch(&format!("i{i}")).await;
    }
    assert_eq!(cloud.get(INSTANCES).await.ok()["items"].as_array().unwrap().len(), 20);
    assert_eq!(cloud.keys("/address").await.len(), 20);
    for i in 0..20 {
        cloud.delete(&format!("{INSTANCES}/i{i}")).await.ok();
    }
    assert!(cloud.keys("/address").await.is_empty() && cloud.keys("/port").await.is_empty());
}

/// Every answer is lost for good.
struct Silent(Arc<AtomicU64>);

impl Faults for Silent {
    fn commit(&self, _: &Txn) -> Fault {
        let on = self.0.load(Ordering::SeqCst) > 0;
        Fault { lost: if on { Lost::Reply } else { Lost::No }, ..Fault::default() }
    }
}

#[tokio::test]
async fn what_became_of_a_commit_is_asked() {
    let on = Arc::new(AtomicU64::new(0));
    let faults = Silent(on.clone());
    let cloud = Cloud::with(|_| {}, |clock| MemoryStore::with_faults(clock, HistoryLimits::default(), faults)).await;
    on.store(1, Ordering::SeqCst);
    let web = cloud.launch("web").await;
    on.store(0, Ordering::SeqCst);
    assert_eq!(cloud.get(&format!("{INSTANCES}/web")).await.ok()["metadata"]["id"], web["metadata"]["id"]);
}

/// Starting again after a crash at any commit gives the same cloud, and only the first start tells a password.
#[tokio::test]
async fn a_bootstrap_that_was_cut_off_is_finished_by_the_next() {
    let clock = Arc::new(TestClock::default());
    let random = oblak_platform::random::system();
    let whole = Arc::new(MemoryStore::new());
    let first = bootstrap(whole.clone() as SharedStore, clock.clone(), random.clone()).await.unwrap();
    assert!(first.admin_password.is_some());
    let (all, _) = oblak_store::list_all(&*whole, &oblak_store::Prefix::all(), None).await.unwrap();
    let again = bootstrap(whole.clone() as SharedStore, clock.clone(), random.clone()).await.unwrap();
    assert!(again.admin_password.is_none());
    let commits = whole.stats().await.unwrap().commits;
    for crash_after in 1..commits {
        let store = Arc::new(MemoryStore::new());
        let limited = Arc::new(Limited { store: store.clone(), left: AtomicU64::new(crash_after) });
        let cut = bootstrap(limited as SharedStore, clock.clone(), random.clone()).await;
        assert!(cut.is_err(), "after {crash_after}");
        bootstrap(store.clone() as SharedStore, clock.clone(), random.clone()).await.unwrap();
        let (healed, _) = oblak_store::list_all(&*store, &oblak_store::Prefix::all(), None).await.unwrap();
        assert_eq!(healed.len(), all.len(), "after {crash_after}");
    }
}

#[tokio::test]
async fn deleted_defaults_stay_deleted() {
    let cloud = Cloud::new().await;
    cloud.delete("/v1/projects/default/images/tiny").await.ok();
    cloud.delete("/v1/flavors/xl").await.ok();
    bootstrap(cloud.store.clone() as SharedStore, cloud.clock.clone(), oblak_platform::random::system()).await.unwrap();
    assert_eq!(cloud.get("/v1/flavors").await.ok()["items"].as_array().unwrap().len(), 4);
    assert_eq!(cloud.get("/v1/projects/default/images").await.ok()["items"].as_array().unwrap().len(), 2);
    let token = oblak_api::admin_token(&*cloud.store, &*cloud.clock, &oblak_platform::random::SystemRandom, "test")
        .await
        .unwrap()
        .unwrap();
    let settle = cloud.store.revision().await.unwrap().to_string();
    cloud.send("GET", "/v1/flavors", &cloud.admin, None, &[("x-oblak-min-revision", &settle)]).await.ok();
    assert_eq!(cloud.send("GET", "/v1/whoami", &token, None, &[]).await.ok()["user"], "admin");
}

/// A store that ends after some commits.
struct Limited {
    store: Arc<MemoryStore>,
    left: AtomicU64,
}

#[async_trait::async_trait]
impl Store for Limited {
    async fn get(&self, key: &oblak_store::Key) -> oblak_store::Result<Option<oblak_store::Entry>> {
        self.store.get(key).await
    }
    async fn list(
        &self,
        prefix: &oblak_store::Prefix,
        limit: usize,
        start_after: Option<oblak_store::Key>,
        at: Option<oblak_store::Revision>,
    ) -> oblak_store::Result<oblak_store::Page> {
        self.store.list(prefix, limit, start_after, at).await
    }
    async fn commit(&self, txn: Txn) -> oblak_store::Result<oblak_store::CommitOutcome> {
        if self.left.load(Ordering::SeqCst) == 0 {
            return Err(oblak_store::StoreError::Closed);
        }
        self.left.fetch_sub(1, Ordering::SeqCst);
        self.store.commit(txn).await
    }
    async fn outcome(&self, id: oblak_store::TxnId) -> oblak_store::Result<Option<oblak_store::Revision>> {
        self.store.outcome(id).await
    }
    async fn watch(
        &self,
        prefix: &oblak_store::Prefix,
        from: oblak_store::Revision,
    ) -> Result<oblak_store::WatchStream, oblak_store::WatchError> {
        self.store.watch(prefix, from).await
    }
    async fn grant(&self, ttl: std::time::Duration) -> oblak_store::Result<oblak_store::Lease> {
        self.store.grant(ttl).await
    }
    async fn renew(&self, id: oblak_store::LeaseId) -> oblak_store::Result<oblak_store::Lease> {
        self.store.renew(id).await
    }
    async fn revoke(&self, id: oblak_store::LeaseId) -> oblak_store::Result<()> {
        self.store.revoke(id).await
    }
    async fn revision(&self) -> oblak_store::Result<oblak_store::Revision> {
        self.store.revision().await
    }
    async fn compact(&self, keep_from: oblak_store::Revision) -> oblak_store::Result<()> {
        self.store.compact(keep_from).await
    }
    async fn stats(&self) -> oblak_store::Result<oblak_store::StoreStats> {
        self.store.stats().await
    }
}
