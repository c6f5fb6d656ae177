//! Who leads, and what a leader of before can still do: nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oblak_control::election::{Election, Fence, LEASE};
use oblak_control::{Candidate, run};
use oblak_model::cluster::PROTOCOL;
use oblak_model::{
    ClusterLeader, ClusterServer, Cpus, Instance, InstanceKind, InstanceSpec, Isolation, Kind, Node, NodeFacts, NodeId,
    NodePhase, NodeSpec, Object, Resources, ServerId, Size, Timestamp,
};
use oblak_platform::clock::{Clock, SharedClock};
use oblak_platform::random;
use oblak_store::objects::{self, Allocation};
use oblak_store::{HistoryLimits, MemoryStore, SharedStore, Txn, list_all};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// The clock of the runtime, which may stand still: then a leader believes for ever that its lease lives.
struct TestClock {
    begun: Instant,
    stands_at: AtomicU64,
}

impl TestClock {
    fn new() -> Arc<Self> {
        Arc::new(Self { begun: Instant::now(), stands_at: AtomicU64::new(0) })
    }
    fn stop(&self) {
        self.stands_at.store(u64::try_from(self.begun.elapsed().as_micros()).unwrap(), Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(1_800_000_000_000_000 + i64::try_from(self.boottime().as_micros()).unwrap())
    }
    fn boottime(&self) -> Duration {
        match self.stands_at.load(Ordering::Relaxed) {
            0 => self.begun.elapsed(),
            at => Duration::from_micros(at),
        }
    }
}

fn store(clock: SharedClock) -> SharedStore {
    let limits = HistoryLimits { revisions: 10_000, age: Duration::from_secs(3600) };
    Arc::new(MemoryStore::with(clock, limits))
}

fn candidate(n: u128) -> Candidate {
    let server = ClusterServer {
        id: ServerId(Uuid::from_u128(n)),
        name: format!("s{n}"),
        endpoints: vec![format!("https://s{n}:7443")],
        version: "1".into(),
        protocol: PROTOCOL,
        started_at: Timestamp::EPOCH,
    };
    Candidate { server, alone: false }
}

async fn leader(store: &SharedStore) -> Option<ClusterLeader> {
    let entry = store.get(&objects::leader_key()).await.unwrap()?;
    Some(objects::decode_value(&entry.key, &entry.value).unwrap())
}

async fn is_registered(store: &SharedStore, n: u128) -> bool {
    store.get(&objects::server_key(ServerId(Uuid::from_u128(n)))).await.unwrap().is_some()
}

/// A server that only takes part in elections; each of its terms is told.
struct Server {
    terms: mpsc::UnboundedReceiver<(Fence, Instant)>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Server {
    fn start(store: &SharedStore, clock: &Arc<TestClock>, candidate: Candidate) -> Self {
        let (sender, terms) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        let clock: SharedClock = clock.clone();
        let election = Election::new(store.clone(), clock, random::system(), candidate, cancel.clone());
        let task = tokio::spawn(election.run(move |fence| {
            let _ = sender.send((fence, Instant::now()));
            std::future::pending()
        }));
        Self { terms, cancel, task }
    }

    async fn leads(&mut self, within: Duration) -> Fence {
        timeout(within, self.terms.recv()).await.expect("it is elected in time").unwrap().0
    }
}

#[tokio::test(start_paused = true)]
async fn one_leads_and_the_next_takes_over() {
    let clock = TestClock::new();
    let store = store(clock.clone());
    let mut one = Server::start(&store, &clock, candidate(1));
    let first = one.leads(Duration::from_secs(1)).await;
    assert_eq!(first.epoch, 1);
    let mut two = Server::start(&store, &clock, candidate(2));
    sleep(LEASE * 4).await;
    assert!(two.terms.try_recv().is_err() && first.stands(clock.boottime()), "the lease is renewed");
    assert!(is_registered(&store, 1).await && is_registered(&store, 2).await, "both serve");

    // An orderly end: the next one need not wait for the lease.
    let asked = Instant::now();
    one.cancel.cancel();
    let second = two.leads(Duration::from_secs(1)).await;
    assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
    assert_eq!((second.epoch, leader(&store).await.unwrap().epoch), (2, 2));
    assert!(first.over.is_cancelled() && !is_registered(&store, 1).await);
    assert!(leader(&store).await.unwrap().server == ServerId(Uuid::from_u128(2)));

    // A crash: the lease has to end.
    let mut three = Server::start(&store, &clock, candidate(3));
    sleep(LEASE).await;
    let killed = Instant::now();
    two.task.abort();
    let third = three.leads(LEASE * 2).await;
    let took = killed.elapsed();
    assert!(third.epoch == 3 && took <= LEASE + Duration::from_secs(2), "{took:?}");
    assert!(!is_registered(&store, 2).await);

    // The same server again, before its lease has ended: nobody else can be it, so it need not wait.
    three.task.abort();
    let mut again = Server::start(&store, &clock, candidate(3));
    assert_eq!(again.leads(Duration::from_millis(100)).await.epoch, 4);
    again.task.abort();
    // Whoever has the store alone neither.
    let mut alone = Server::start(&store, &clock, Candidate { alone: true, ..candidate(9) });
    assert_eq!(alone.leads(Duration::from_millis(100)).await.epoch, 5);
}

async fn put<K: Kind>(store: &SharedStore, object: &Object<K>) {
    let txn = Txn::random().put(objects::key_of(object), objects::encode(object));
    assert!(store.commit(txn).await.unwrap().revision().is_some());
}

async fn node(store: &SharedStore) {
    let mut node = Node::new("n1", NodeSpec::default());
    node.metadata.id = Uuid::now_v7();
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources { vcpus: Cpus(64_000), memory: Size::gib(64), disk: Size::gib(1024) };
    node.status.facts = NodeFacts { isolations: vec![Isolation::Container], ..NodeFacts::default() };
    put(store, &node).await;
    let id = NodeId(node.metadata.id);
    let txn = Txn::random()
        .put(objects::allocation_key(id), objects::encode_value(&Allocation::default()))
        .put(objects::lease_key(id), objects::encode_value(&1u64));
    assert!(store.commit(txn).await.unwrap().revision().is_some());
}

async fn instance(store: &SharedStore, name: &str) {
    let mut instance = Instance::new(name, InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() });
    instance.metadata.id = Uuid::now_v7();
    instance.metadata.project = Some("default".into());
    instance.status.resolved.isolation = Isolation::Container;
    instance.status.resolved.resources = Resources { vcpus: Cpus(500), memory: Size::mib(64), disk: Size::gib(1) };
    put(store, &instance).await;
}

async fn placed(store: &SharedStore) -> Vec<String> {
    let (entries, _) = list_all(store.as_ref(), &objects::object_prefix::<InstanceKind>(None), None).await.unwrap();
    let all = entries.iter().map(|e| objects::decode::<InstanceKind>(e).unwrap());
    all.filter(|i: &Instance| i.status.placement.is_some()).map(|i| i.metadata.name).collect()
}

/// A leader whose clock stands still believes in its lease for ever. Once another one leads the store takes nothing of it, until it has
/// been elected again.
#[tokio::test(start_paused = true)]
async fn a_leader_of_before_commits_nothing() {
    let clock = TestClock::new();
    let store = store(TestClock::new());
    node(&store).await;
    let cancel = CancellationToken::new();
    let control = tokio::spawn(run(store.clone(), clock.clone(), random::system(), candidate(1), cancel.clone()));
    instance(&store, "before").await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(placed(&store).await, ["before"]);

    clock.stop();
    let held = store.grant(LEASE * 10).await.unwrap();
    let value = ClusterLeader { server: ServerId(Uuid::from_u128(2)), epoch: 2, since: Timestamp::EPOCH };
    let other = Txn::random()
        .put_leased(objects::leader_key(), objects::encode_value(&value), held.id)
        .put(objects::election_key(), objects::encode_value(&2u64));
    assert!(store.commit(other).await.unwrap().revision().is_some());
    instance(&store, "meanwhile").await;
    sleep(LEASE * 4).await;
    assert_eq!(placed(&store).await, ["before"], "placed by a server that does not lead");
    assert_eq!(leader(&store).await, Some(value), "a leader that lives is not replaced");

    store.revoke(held.id).await.unwrap();
    sleep(Duration::from_secs(3)).await;
    assert_eq!(placed(&store).await, ["before", "meanwhile"]);
    assert_eq!(leader(&store).await.map(|l| (l.server, l.epoch)), Some((ServerId(Uuid::from_u128(1)), 3)));
    cancel.cancel();
    control.await.unwrap().unwrap();
    assert_eq!(leader(&store).await, None, "an orderly end resigns");
}
