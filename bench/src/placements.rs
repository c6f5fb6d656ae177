//! Placements per second that the control plane commits: instances wait, the real reconcilers run, the clock stops when all have a node.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use oblak_model::{
    Cpus, Instance, InstanceId, InstanceKind, InstanceSpec, Isolation, Node, NodeFacts, NodeId, NodePhase, NodeSpec,
    Object, Placement, Port, PortId, PortSpec, Resources, Size, Timestamp,
};
use oblak_platform::{clock, random};
use oblak_store::objects::{self, Allocation};
use oblak_store::{
    CommitOutcome, MemoryStore, Prefix, RedbOptions, RedbStore, SharedStore, StoreStats, Txn, WatchItem, Write,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::Context;
use crate::report::{Row, Table};
use crate::stats::Samples;

/// Rounds of the small world; the stores take turns.
const ROUNDS: usize = 21;
const SMALL: World = World { nodes: 1000, placed: 1000, pending: 1000 };
const ONE_NODE: World = World { nodes: 1, placed: 0, pending: 500 };
const LARGE: World = World { nodes: 10_000, placed: 100_000, pending: 2000 };
/// Longest time to wait for all placements of a round.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct World {
    nodes: usize,
    placed: usize,
    pending: usize,
}

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let (mut memory, mut redb, mut commits, mut fsyncs) =
        (Samples::default(), Samples::default(), Samples::default(), Samples::default());
    for round in 0..ROUNDS {
        for side in if round % 2 == 0 { [0, 1] } else { [1, 0] } {
            let dir = context.temp()?;
            if side == 0 {
                let store: SharedStore = Arc::new(MemoryStore::new());
                memory.push(runtime.block_on(round_on(&store, SMALL))?.per_second);
            } else {
                let store: SharedStore =
                    Arc::new(RedbStore::open(&dir.path().join("bench.redb"), RedbOptions::default())?);
                let done = runtime.block_on(round_on(&store, SMALL))?;
                redb.push(done.per_second);
                commits.push(done.commits);
                fsyncs.push(done.fsyncs);
            }
        }
    }
    let world = |w: World| format!("{} nodes, {} instances placed, {} waiting", w.nodes, w.placed, w.pending);
    let what = format!("committed placements, {}: redb beside memory", world(SMALL));
    table.row(Row::beside(what, "placements/s", &memory, &redb));
    table.row(Row::median("  placements in one commit (redb)", "placements", &commits));
    table.row(Row::median("  placements in one fsync (redb)", "placements", &fsyncs));
    let mut single = Samples::default();
    for _ in 0..ROUNDS {
        let dir = context.temp()?;
        let store: SharedStore = Arc::new(RedbStore::open(&dir.path().join("bench.redb"), RedbOptions::default())?);
        single.push(runtime.block_on(round_on(&store, ONE_NODE))?.per_second);
    }
    table.row(Row::median(format!("committed placements, {}: redb", world(ONE_NODE)), "placements/s", &single));
    let store: SharedStore = Arc::new(MemoryStore::new());
    let large = runtime.block_on(round_on(&store, LARGE))?;
    table.row(Row::value(format!("committed placements, {}: memory", world(LARGE)), "placements/s", large.per_second));
    runtime.shutdown_timeout(Duration::from_secs(5));
    table.note("from the first placement seen to the last: world, decision, reservation, port, event, commit; one reconciler, as in the product");
    Ok(())
}

struct Done {
    per_second: f64,
    commits: f64,
    fsyncs: f64,
}

async fn round_on(store: &SharedStore, world: World) -> Result<Done> {
    seed(store, world).await?;
    let before = store.stats().await?;
    let mut watch = store.watch(&prefix_of_instances(), store.revision().await?).await.context("cannot watch")?;
    let cancel = CancellationToken::new();
    let (time, chance) = (clock::system(), random::system());
    let control = oblak_control::run(store.clone(), time, chance, crate::fakecloud::candidate(), cancel.clone());
    let control = tokio::spawn(control);
    let (mut seen, mut first) = (0usize, None);
    let all = async {
        while seen < world.pending {
            let Some(item) = watch.next().await else { bail!("the watch ended") };
            let WatchItem::Event(event) = item? else { continue };
            let new = event.changes.len();
            if first.is_none() {
                // The first commit starts the clock and does not count.
                first = Some((Instant::now(), new));
            }
            seen += new;
        }
        Ok(())
    };
    let outcome = tokio::time::timeout(DEADLINE, all).await;
    let ended = Instant::now();
    let after = store.stats().await?;
    cancel.cancel();
    control.await.context("the control plane panicked")??;
    outcome.with_context(|| format!("{seen} of {} placed", world.pending))??;
    let (started, not_counted) = first.context("nothing was placed")?;
    let counted = (world.pending - not_counted) as f64;
    let each = |of: fn(&StoreStats) -> u64| world.pending as f64 / (of(&after) - of(&before)).max(1) as f64;
    Ok(Done {
        per_second: counted / (ended - started).as_secs_f64(),
        commits: each(|s| s.commits),
        fsyncs: each(|s| s.fsyncs),
    })
}

fn prefix_of_instances() -> Prefix {
    objects::object_prefix::<InstanceKind>(None)
}

/// Writes, many per commit.
struct Seeder<'a> {
    store: &'a SharedStore,
    writes: Vec<Write>,
}

impl Seeder<'_> {
    fn object<K: oblak_model::Kind>(&mut self, object: &Object<K>) {
        self.writes.push(objects::put(objects::key_of(object), objects::encode(object)));
    }

    async fn flush(&mut self, at_least: usize) -> Result<()> {
        while self.writes.len() >= at_least.max(1) {
            let some = self.writes.drain(..self.writes.len().min(100)).collect();
            let txn = Txn { writes: some, ..Txn::random() };
            if !matches!(self.store.commit(txn).await?, CommitOutcome::Committed(_)) {
                bail!("the world could not be written");
            }
        }
        Ok(())
    }
}

async fn seed(store: &SharedStore, world: World) -> Result<()> {
    let mut seeder = Seeder { store, writes: Vec::new() };
    let now = clock::system().now();
    let size = Resources { vcpus: Cpus(1000), memory: Size::gib(2), disk: Size::gib(10) };
    let nodes: Vec<Node> = (0..world.nodes).map(|i| node(i, now)).collect();
    for (i, node) in nodes.iter().enumerate() {
        let here = (world.placed / world.nodes + usize::from(i < world.placed % world.nodes)) as u64;
        let resources = Resources {
            vcpus: Cpus(1000 * here as u32),
            memory: Size(size.memory.0 * here),
            disk: Size(size.disk.0 * here),
        };
        seeder.object(node);
        let key = objects::allocation_key(NodeId(node.metadata.id));
        seeder.writes.push(objects::put(key, objects::encode_value(&Allocation { resources, instances: here })));
        seeder.writes.push(objects::put(objects::lease_key(NodeId(node.metadata.id)), objects::encode_value(&1u64)));
        seeder.flush(100).await?;
    }
    for i in 0..world.placed + world.pending {
        let (mut instance, port) = instance(i, now, size);
        if i < world.placed {
            let node = &nodes[i % world.nodes];
            instance.status.placement = Some(Placement {
                node: NodeId(node.metadata.id),
                node_name: node.metadata.name.clone(),
                resources: size,
                at: now,
                why: String::new(),
                generation: 1,
                fenced: false,
                fence_turn: 0,
            });
        }
        seeder.object(&instance);
        seeder.object(&port);
        seeder.flush(100).await?;
    }
    seeder.flush(1).await
}

fn node(i: usize, now: Timestamp) -> Node {
    let mut node = Node::new(&format!("n{i}"), NodeSpec { zone: format!("zone-{}", i % 8), ..NodeSpec::default() });
    node.metadata.id = Uuid::now_v7();
    node.metadata.created_at = now;
    node.status.phase = NodePhase::Ready;
    node.status.capacity = Resources { vcpus: Cpus(512_000), memory: Size::gib(4096), disk: Size::gib(65_536) };
    node.status.facts = NodeFacts { isolations: vec![Isolation::Container, Isolation::Vm], ..NodeFacts::default() };
    node
}

fn instance(i: usize, now: Timestamp, size: Resources) -> (Instance, Port) {
    let mut instance =
        Instance::new(&format!("i{i}"), InstanceSpec { image: "busybox".into(), ..InstanceSpec::default() });
    instance.metadata.id = Uuid::now_v7();
    instance.metadata.project = Some(format!("p{}", i % 50));
    instance.metadata.created_at = now;
    instance.metadata.labels.insert("app".into(), format!("a{}", i % 20));
    instance.status.resolved.isolation = Isolation::Container;
    instance.status.resolved.resources = size;
    let mut port = Port::new(
        &format!("i{i}-0"),
        PortSpec { network: "default".into(), instance: InstanceId(instance.metadata.id), ..PortSpec::default() },
    );
    port.metadata.id = Uuid::now_v7();
    port.metadata.project.clone_from(&instance.metadata.project);
    port.metadata.created_at = now;
    port.status.addresses.push([10, 80, (i / 250 % 250) as u8, (i % 250) as u8].into());
    instance.status.resolved.ports.push(PortId(port.metadata.id));
    (instance, port)
}
