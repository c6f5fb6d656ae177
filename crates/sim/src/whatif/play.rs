//! The stand-ins of the nodes, and what is done about nodes that are down.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use oblak_control::Candidate;
use oblak_control::lifecycle::{Batch, Ops};
use oblak_model::cluster::PROTOCOL;
use oblak_model::{
    ClusterServer, Instance, InstanceId, InstanceKind, Isolation, Node, NodeId, NodeKind, NodePhase, Object, Phase,
    Port, PortKind, Power, Revision, ServerId, Timestamp, Transport,
};
use oblak_platform::clock::SharedClock;
use oblak_platform::task::Process;
use oblak_store::objects::{self, Allocation};
use oblak_store::{
    CommitOutcome, Entry, HistoryLimits, Key, MemoryStore, SharedStore, Store, Txn, WatchItem, WatchStream,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Ending, LONGEST, LiveState, Question, WhatIfError, seed};
use crate::chance::{SeededRandom, VirtualClock};

/// Reason of an instance that has left its node and has not been looked at since.
pub const EVACUATED: &str = "Evacuated";
/// How often the stand-ins look around.
const TICK: Duration = Duration::from_millis(100);
/// Nothing has happened for so long: nothing will. Longer than any sweep of a reconciler that places or moves something.
const REST: Duration = Duration::from_secs(35);

/// How long a node takes to start a guest whose image it has. A container's figure and a machine's until its main process runs, rounded up
/// from `docs/performance.md`.
fn start_time(isolation: Isolation) -> Duration {
    match isolation {
        Isolation::Container => Duration::from_millis(500),
        _ => Duration::from_secs(1),
    }
}

/// The copy has one server, which leads at once.
fn alone(now: Timestamp) -> Candidate {
    let server = ClusterServer {
        id: ServerId(uuid::Uuid::nil()),
        name: "whatif".into(),
        endpoints: vec![],
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
        started_at: now,
    };
    Candidate { server, alone: true }
}

/// A play that has begun.
pub struct Play {
    store: Arc<MemoryStore>,
    watch: WatchStream,
    down: BTreeSet<NodeId>,
    begun: Instant,
    instances: BTreeMap<InstanceId, Instance>,
    /// Guests that are being started, and when they run.
    starting: BTreeMap<InstanceId, Instant>,
    running: BTreeMap<InstanceId, Duration>,
    /// Nodes that have been noticed to be down, and whose instances have not left yet.
    noticed: BTreeSet<NodeId>,
    /// Revision of the last change of an instance, and when it was seen.
    last: Instant,
    ports: BTreeMap<InstanceId, Vec<Key>>,
    commits: u64,
    control: Process,
}

impl Play {
    /// Copies the state and lets the control plane begin.
    pub async fn begin(state: &LiveState, question: &Question, lease: Duration) -> Result<Self, WhatIfError> {
        let begun = Instant::now();
        let clock: SharedClock = Arc::new(VirtualClock::from(begun, state.at));
        let limits = HistoryLimits { revisions: 100_000, age: Duration::from_secs(600) };
        let store = Arc::new(MemoryStore::with(clock.clone(), limits));
        let none = BTreeSet::new();
        let (down, added): (_, &[Node]) = match question {
            Question::NodesDown(down) => (down, &[]),
            Question::NodesAdded(added) => (&none, added),
        };
        seed::seed(&store, state, added, down, lease).await?;
        let head = store.revision().await?;
        let watch =
            store.watch(&oblak_store::Prefix::all(), head).await.map_err(|e| WhatIfError::Copy(e.to_string()))?;
        let mut ports: BTreeMap<InstanceId, Vec<Key>> = BTreeMap::new();
        for port in &state.ports {
            ports.entry(port.spec.instance).or_default().push(objects::key_of(port));
        }
        let dynamic: SharedStore = store.clone();
        let control = Process::new();
        let random = Arc::new(SeededRandom::new(1, "control"));
        let reconcilers = oblak_control::run(dynamic, clock, random, alone(state.at), CancellationToken::new());
        control.spawn(async move {
            if let Err(error) = reconcilers.await {
                tracing::error!(%error, "the reconcilers ended");
            }
        });
        let instances = state.instances.iter().map(|i| (InstanceId(i.metadata.id), i.clone())).collect();
        // Those that are away already are no news to anybody.
        let away = state.nodes.iter().filter(|n| n.status.phase != NodePhase::Ready).map(|n| NodeId(n.metadata.id));
        let noticed = away.filter(|id| down.contains(id)).collect();
        Ok(Self {
            store,
            watch,
            down: down.clone(),
            begun,
            instances,
            starting: BTreeMap::new(),
            running: BTreeMap::new(),
            noticed,
            last: begun,
            ports,
            commits: head.n,
            control,
        })
    }

    /// Plays until nothing moves any more.
    pub async fn run(&mut self) -> Result<(), WhatIfError> {
        while self.begun.elapsed() < LONGEST {
            tokio::time::sleep(TICK).await;
            // Leases end by themselves only when somebody looks.
            let _ = self.store.expire();
            self.take_in()?;
            for node in std::mem::take(&mut self.noticed) {
                self.evacuate(node).await?;
            }
            self.start_guests().await?;
            if self.is_at_rest() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What became of everything.
    pub async fn end(self) -> Result<Ending, WhatIfError> {
        self.control.kill();
        let commits = self.store.revision().await?.n - self.commits;
        Ok(Ending { instances: self.instances, running: self.running, took: self.last - self.begun, commits })
    }

    fn is_at_rest(&self) -> bool {
        let waits = |i: &Instance| i.status.phase == Phase::Pending && i.status.reason == EVACUATED;
        let left = |i: &Instance| i.status.placement.as_ref().is_none_or(|p| !self.down.contains(&p.node));
        self.last.elapsed() >= REST
            && self.starting.is_empty()
            && self.instances.values().all(|i| i.metadata.is_deleting() || (left(i) && !waits(i)))
    }

    /// Everything that was committed since the last look.
    fn take_in(&mut self) -> Result<(), WhatIfError> {
        while let Some(item) = self.watch.next().now_or_never().flatten() {
            let event = match item {
                Ok(WatchItem::Event(event)) => event,
                Ok(WatchItem::Progress(_)) => continue,
                Err(error) => return Err(WhatIfError::Copy(error.to_string())),
            };
            for change in &event.changes {
                let Some(value) = &change.value else { continue };
                let (key, revision) = (&change.key, event.revision);
                let entry = Entry { key: key.clone(), value: value.clone(), revision, created: change.created };
                if key.starts_with("/instance/") {
                    self.instance_changed(objects::decode::<InstanceKind>(&entry)?);
                } else if key.starts_with("/node/") {
                    self.node_changed(&objects::decode::<NodeKind>(&entry)?);
                }
            }
        }
        Ok(())
    }

    fn instance_changed(&mut self, new: Instance) {
        let id = InstanceId(new.metadata.id);
        let on = new.status.placement.as_ref().map(|placement| placement.node);
        let is_new = self.instances.get(&id).is_none_or(|old| old.status.placement.as_ref().map(|p| p.node) != on);
        if is_new && on.is_some_and(|node| !self.down.contains(&node)) {
            self.starting.insert(id, Instant::now() + start_time(new.status.resolved.isolation));
        }
        // That a node cannot be reached is news about instances, not a movement of them.
        if new.status.phase != Phase::Unknown {
            self.last = Instant::now();
        }
        self.instances.insert(id, new);
    }

    fn node_changed(&mut self, node: &Object<NodeKind>) {
        let id = NodeId(node.metadata.id);
        if node.status.phase == NodePhase::Down && self.down.contains(&id) {
            self.noticed.insert(id);
        }
    }

    /// Nodes report that what was placed on them runs, or is ready to.
    async fn start_guests(&mut self) -> Result<(), WhatIfError> {
        let now = Instant::now();
        let due: Vec<InstanceId> = self.starting.iter().filter(|(_, at)| **at <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.starting.remove(&id);
            let Some(mut instance) = self
                .read::<InstanceKind>(&objects::object_key::<InstanceKind>(self.instances[&id].scope_key(), id.0))
                .await?
            else {
                continue;
            };
            instance.status.phase = match instance.spec.power {
                Power::Running => Phase::Running,
                Power::Paused => Phase::Paused,
                Power::Stopped => Phase::Stopped,
            };
            instance.status.reason.clear();
            instance.status.message.clear();
            let mut ops = Ops::new();
            ops.update(&instance);
            if self.commit(ops).await?.is_some() {
                if instance.spec.power != Power::Stopped {
                    self.running.insert(id, self.begun.elapsed());
                }
            } else {
                // Somebody was faster: it is told again at the next look.
                self.starting.insert(id, now);
            }
        }
        Ok(())
    }

    /// Takes every instance off a node that is known to be down: it gives back what it has there and waits for another.
    async fn evacuate(&mut self, node: NodeId) -> Result<(), WhatIfError> {
        let here = |i: &&Instance| i.status.placement.as_ref().is_some_and(|p| p.node == node);
        let keys: Vec<Key> = self.instances.values().filter(here).map(objects::key_of).collect();
        for key in keys {
            // The liveness reconciler writes to the same instances at the same time.
            for _ in 0..8 {
                let Some(instance) = self.read::<InstanceKind>(&key).await? else { break };
                if instance.metadata.is_deleting() {
                    break;
                }
                let ops = self.leave(&instance, node).await?;
                if self.commit(ops).await?.is_some() {
                    break;
                }
            }
        }
        Ok(())
    }

    async fn leave(&self, instance: &Instance, node: NodeId) -> Result<Ops, WhatIfError> {
        let mut ops = Ops::new();
        let mut moved = instance.clone();
        let placement = moved.status.placement.take();
        moved.status.phase = Phase::Pending;
        moved.status.reason = EVACUATED.into();
        moved.status.message = "its node is down".into();
        ops.update(&moved);
        let key = objects::allocation_key(node);
        if let (Some(entry), Some(placement)) = (self.store.get(&key).await?, placement) {
            let mut sum: Allocation = objects::decode_value(&key, &entry.value)?;
            let (resources, less) = (&mut sum.resources, placement.resources);
            resources.vcpus.0 = resources.vcpus.0.saturating_sub(less.vcpus.0);
            resources.memory = resources.memory - less.memory;
            resources.disk = resources.disk - less.disk;
            sum.instances = sum.instances.saturating_sub(1);
            ops.guard(oblak_store::Guard::Revision(key.clone(), entry.revision));
            ops.put(key, objects::encode_value(&sum));
        }
        for publish in &instance.spec.publish {
            let protocol = if publish.protocol == Transport::Udp { "udp" } else { "tcp" };
            ops.delete(objects::host_port_key(node, protocol, publish.host_port));
        }
        for key in self.ports.get(&InstanceId(instance.metadata.id)).into_iter().flatten() {
            let port: Option<Port> = self.read::<PortKind>(key).await?;
            if let Some(mut port) = port {
                port.status.node = None;
                ops.update(&port);
            }
        }
        Ok(ops)
    }

    async fn read<K: oblak_model::Kind>(&self, key: &Key) -> Result<Option<Object<K>>, WhatIfError> {
        Ok(self.store.get(key).await?.map(|entry| objects::decode(&entry)).transpose()?)
    }

    async fn commit(&self, ops: Ops) -> Result<Option<Revision>, WhatIfError> {
        let mut batch = Batch::new();
        batch.absorb(ops);
        match self.store.commit(batch.into_txn(Txn::random().id)).await? {
            CommitOutcome::Committed(revision) => Ok(Some(revision)),
            CommitOutcome::GuardFailed { .. } | CommitOutcome::Unknown(_) => Ok(None),
        }
    }
}
