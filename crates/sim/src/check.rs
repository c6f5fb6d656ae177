//! What must hold after every commit. The checks read the store's own events, in order, so nothing between two commits is missed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use futures_util::FutureExt;
use oblak_model::{
    ClusterLeader, Image, ImageId, ImageKind, Instance, InstanceId, InstanceKind, Kind, Node, NodeId, NodeKind, Object,
    Port, PortKind, Resources, Revision, ServerId, Transport, Volume, VolumeKind,
};
use oblak_store::objects::{self, Allocation};
use oblak_store::{Change, Entry, Key, Prefix, Store, WatchItem, WatchStream};
use uuid::Uuid;

use crate::trace::Trace;

/// The checks, and what they know of the store.
#[derive(Clone)]
pub struct Checks {
    mirror: Arc<Mutex<Mirror>>,
    watch: Arc<tokio::sync::Mutex<Option<WatchStream>>>,
    trace: Trace,
}

/// The store as the checks see it.
#[derive(Default)]
pub struct Mirror {
    /// Who led from which revision on; the newest few.
    leaders: BTreeMap<Revision, Option<ServerId>>,
    /// Every key.
    pub keys: BTreeMap<Key, Bytes>,
    /// Instances by id.
    pub instances: BTreeMap<InstanceId, Instance>,
    /// Ports by id.
    pub ports: BTreeMap<Uuid, Port>,
    /// Volumes by id.
    pub volumes: BTreeMap<Uuid, Volume>,
    /// Nodes by id.
    pub nodes: BTreeMap<NodeId, Node>,
    /// Images by id.
    pub images: BTreeMap<ImageId, Image>,
    allocations: BTreeMap<NodeId, Allocation>,
    sums: BTreeMap<NodeId, Allocation>,
    ports_of: BTreeMap<InstanceId, BTreeSet<Uuid>>,
    addresses_of: BTreeMap<Uuid, BTreeSet<Key>>,
    host_ports_of: BTreeMap<Uuid, BTreeSet<Key>>,
}

impl Checks {
    /// Checks that have seen nothing yet.
    #[must_use]
    pub fn new(trace: Trace) -> Self {
        Self { mirror: Arc::default(), watch: Arc::default(), trace }
    }

    /// A look at the mirror; do not hold it across an await.
    pub fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where violations are noted.
    #[must_use]
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// Takes in what happened since the last call.
    pub async fn catch_up(&self, store: &dyn Store) {
        let mut watch = self.watch.lock().await;
        let stream = match watch.as_mut() {
            Some(stream) => stream,
            None => match store.watch(&Prefix::all(), Revision::ZERO).await {
                Ok(stream) => watch.insert(stream),
                Err(error) => return self.trace.violation(format_args!("the checks cannot watch the store: {error}")),
            },
        };
        while let Some(item) = stream.next().now_or_never().flatten() {
            match item {
                Ok(WatchItem::Event(event)) => self.event(event.revision, &event.changes),
                Ok(WatchItem::Progress(_)) => {}
                Err(error) => {
                    return self.trace.violation(format_args!("a watch that reads all the time was cut off: {error}"));
                }
            }
        }
    }

    fn event(&self, revision: Revision, changes: &[Change]) {
        self.trace.note("store", Summary { revision, changes });
        let wrong = {
            let mut mirror = self.mirror();
            mirror.elect(revision, changes);
            let touched = mirror.apply(revision, changes);
            mirror.check(&touched)
        };
        for text in wrong {
            self.trace.violation(format_args!("at revision {revision}: {text}"));
        }
    }
}

impl Checks {
    /// A reconciler of this server has committed something: it must have led at that moment.
    pub fn leader_commits(&self, server: ServerId, at: Revision) {
        let led = self.mirror().leaders.range(..=at).next_back().and_then(|(_, leader)| *leader);
        if led != Some(server) {
            self.trace.violation(format_args!("at revision {at}: server {server} commits, but the leader is {led:?}"));
        }
    }
}

/// Leaders that are remembered.
const LEADERS: usize = 64;

impl Mirror {
    fn elect(&mut self, revision: Revision, changes: &[Change]) {
        let key = objects::leader_key();
        for change in changes.iter().filter(|change| change.key == key) {
            let leader = change.value.as_ref().and_then(|v| objects::decode_value::<ClusterLeader>(&key, v).ok());
            self.leaders.insert(revision, leader.map(|l| l.server));
        }
        while self.leaders.len() > LEADERS {
            self.leaders.pop_first();
        }
    }
}

/// A commit in one line: which keys, and a digest of what was written.
struct Summary<'a> {
    revision: Revision,
    changes: &'a [Change],
}

impl std::fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.revision)?;
        for change in self.changes {
            match &change.value {
                Some(value) => {
                    let hash = value
                        .iter()
                        .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3));
                    write!(f, " {}={hash:016x}", change.key)?;
                }
                None => write!(f, " -{}", change.key)?,
            }
        }
        Ok(())
    }
}

/// The name of an object of any kind; the rest is not even built.
#[derive(Default, serde::Deserialize)]
struct Named {
    metadata: Name,
}

#[derive(Default, serde::Deserialize)]
struct Name {
    name: String,
}

/// What a commit was about.
#[derive(Default)]
struct Touched {
    instances: BTreeSet<InstanceId>,
    ports: BTreeSet<Uuid>,
    volumes: BTreeSet<Uuid>,
    nodes: BTreeMap<NodeId, Option<Allocation>>,
    objects: BTreeSet<Key>,
}

fn id(text: &str) -> Uuid {
    text.parse().unwrap_or_default()
}

fn object<K: Kind>(key: &Key, value: &Bytes, revision: Revision) -> Option<Object<K>> {
    objects::decode(&Entry { key: key.clone(), value: value.clone(), revision, created: revision }).ok()
}

fn add(to: &mut Allocation, what: &Resources) {
    to.resources.vcpus.0 += what.vcpus.0;
    to.resources.memory.0 += what.memory.0;
    to.resources.disk.0 += what.disk.0;
    to.instances += 1;
}

fn take(from: &mut Allocation, what: &Resources) {
    from.resources.vcpus.0 -= what.vcpus.0;
    from.resources.memory.0 -= what.memory.0;
    from.resources.disk.0 -= what.disk.0;
    from.instances -= 1;
}

impl Mirror {
    /// What is reserved on a node.
    #[must_use]
    pub fn reserved(&self, node: NodeId) -> Allocation {
        self.allocations.get(&node).copied().unwrap_or_default()
    }

    fn apply(&mut self, revision: Revision, changes: &[Change]) -> Touched {
        let mut touched = Touched::default();
        for change in changes {
            self.change(revision, change, &mut touched);
            match &change.value {
                Some(value) => self.keys.insert(change.key.clone(), value.clone()),
                None => self.keys.remove(&change.key),
            };
        }
        touched
    }

    fn change(&mut self, revision: Revision, change: &Change, touched: &mut Touched) {
        let segments: Vec<&str> = change.key.segments().collect();
        let value = change.value.as_ref();
        match segments.as_slice() {
            ["allocation", _, node] => {
                let node = NodeId(id(node));
                let new: Option<Allocation> = value.and_then(|v| objects::decode_value(&change.key, v).ok());
                let old = self.allocations.remove(&node);
                self.allocations.extend(new.map(|new| (node, new)));
                touched.nodes.entry(node).or_insert(old);
            }
            ["hostport", ..] => {
                index(&mut self.host_ports_of, &mut touched_host_ports(touched), &self.keys, change);
            }
            ["address", ..] => {
                index(&mut self.addresses_of, &mut |id| _ = touched.ports.insert(id), &self.keys, change);
            }
            ["name", ..] => _ = touched.objects.insert(change.key.clone()),
            ["instance", _, name] => {
                touched.objects.insert(change.key.clone());
                self.instance(InstanceId(id(name)), value.and_then(|v| object(&change.key, v, revision)), touched);
            }
            ["port", _, name] => {
                touched.objects.insert(change.key.clone());
                self.port(id(name), value.and_then(|v| object(&change.key, v, revision)), touched);
            }
            ["volume", _, name] => {
                touched.objects.insert(change.key.clone());
                let old = self.volumes.remove(&id(name));
                self.volumes
                    .extend(value.and_then(|v| Some((id(name), object::<VolumeKind>(&change.key, v, revision)?))));
                touched.volumes.insert(id(name));
                touched.instances.extend(old.and_then(|v| v.status.attached_to));
            }
            ["image", _, name] => {
                touched.objects.insert(change.key.clone());
                self.images.remove(&ImageId(id(name)));
                let image = value.and_then(|v| object::<ImageKind>(&change.key, v, revision));
                self.images.extend(image.map(|image| (ImageId(id(name)), image)));
            }
            ["node", _, name] => {
                touched.objects.insert(change.key.clone());
                self.nodes.remove(&NodeId(id(name)));
                let node = value.and_then(|v| object::<NodeKind>(&change.key, v, revision));
                self.nodes.extend(node.map(|node| (NodeId(id(name)), node)));
            }
            _ => {}
        }
    }

    fn instance(&mut self, id: InstanceId, new: Option<Object<InstanceKind>>, touched: &mut Touched) {
        let old = self.instances.remove(&id);
        for (instance, sign) in old.iter().map(|i| (i, false)).chain(new.iter().map(|i| (i, true))) {
            let Some(placement) = &instance.status.placement else { continue };
            let sum = self.sums.entry(placement.node).or_default();
            if sign {
                add(sum, &placement.resources);
            } else {
                take(sum, &placement.resources);
            }
            let known = self.allocations.get(&placement.node).copied();
            touched.nodes.entry(placement.node).or_insert(known);
        }
        self.instances.extend(new.map(|new| (id, new)));
        touched.instances.insert(id);
    }

    fn port(&mut self, id: Uuid, new: Option<Object<PortKind>>, touched: &mut Touched) {
        if let Some(old) = self.ports.remove(&id) {
            self.ports_of.entry(old.spec.instance).or_default().remove(&id);
            touched.instances.insert(old.spec.instance);
        }
        if let Some(new) = new {
            self.ports_of.entry(new.spec.instance).or_default().insert(id);
            touched.instances.insert(new.spec.instance);
            self.ports.insert(id, new);
        }
        touched.ports.insert(id);
    }

    fn check(&self, touched: &Touched) -> Vec<String> {
        let mut wrong = Vec::new();
        for (node, before) in &touched.nodes {
            self.check_allocation(*node, *before, &mut wrong);
        }
        for key in &touched.objects {
            self.check_name(key, &mut wrong);
        }
        for port in &touched.ports {
            self.check_port(*port, &mut wrong);
        }
        for instance in &touched.instances {
            self.check_instance(*instance, &mut wrong);
        }
        for volume in &touched.volumes {
            let owner = self.volumes.get(volume).and_then(|v| v.status.attached_to);
            if let Some(owner) = owner.filter(|owner| !self.instances.contains_key(owner)) {
                wrong.push(format!("volume {volume} is attached to instance {owner}, which does not exist"));
            }
        }
        wrong
    }

    /// What is reserved is the sum of what is placed, and a reservation that grows stays within the limit.
    fn check_allocation(&self, id: NodeId, before: Option<Allocation>, wrong: &mut Vec<String>) {
        let reserved = self.allocations.get(&id).copied().unwrap_or_default();
        let sum = self.sums.get(&id).copied().unwrap_or_default();
        if reserved != sum {
            wrong.push(format!("node {id}: reserved is {reserved:?}, placed there is {sum:?}"));
        }
        let Some(node) = self.nodes.get(&id) else { return };
        let before = before.unwrap_or_default().resources;
        let (now, capacity, over) = (reserved.resources, node.status.capacity, node.spec.overcommit);
        let figures = [
            ("vcpus", u64::from(before.vcpus.0), u64::from(now.vcpus.0), u64::from(capacity.vcpus.0), over.cpu_percent),
            ("memory", before.memory.0, now.memory.0, capacity.memory.0, over.memory_percent),
            ("disk", before.disk.0, now.disk.0, capacity.disk.0, over.disk_percent),
        ];
        for (what, before, now, capacity, percent) in figures {
            let limit = u128::from(capacity) * u128::from(percent) / 100;
            if now > before && u128::from(now) > limit {
                wrong.push(format!("node {id}: {now} of {what} are promised, the limit is {limit}"));
            }
        }
    }

    /// Every object has its name and every name its object.
    fn check_name(&self, key: &Key, wrong: &mut Vec<String>) {
        let segments: Vec<&str> = key.segments().collect();
        if let ["name", kind, scope, name] = segments.as_slice() {
            let Some(value) = self.keys.get(key) else { return };
            let id: Uuid = objects::decode_value(key, value).unwrap_or_default();
            let owner = Key::from_segments([*kind, *scope, &id.to_string()]);
            if !owner.is_ok_and(|owner| self.keys.contains_key(&owner)) {
                wrong.push(format!("the name {name} of {kind} belongs to {id}, which does not exist"));
            }
        } else if let [kind, scope, id] = segments.as_slice() {
            let Some(value) = self.keys.get(key) else { return };
            let named: Named = objects::decode_value(key, value).unwrap_or_default();
            let name = named.metadata.name.as_str();
            let holder =
                Key::from_segments(["name", kind, scope, name]).ok().and_then(|key| self.keys.get(&key).cloned());
            let holds =
                holder.is_some_and(|value| objects::decode_value::<String>(key, &value).is_ok_and(|h| h == **id));
            if !holds {
                wrong.push(format!("{kind} {id} does not own its name {name:?}"));
            }
        }
    }

    /// A port has its addresses, and nobody else has them.
    fn check_port(&self, id: Uuid, wrong: &mut Vec<String>) {
        let keys = self.addresses_of.get(&id).cloned().unwrap_or_default();
        let has: BTreeSet<String> = keys.iter().map(|key| key.last().to_string()).collect();
        let Some(port) = self.ports.get(&id) else {
            if !has.is_empty() {
                wrong.push(format!("addresses {has:?} belong to port {id}, which does not exist"));
            }
            return;
        };
        let wants: BTreeSet<String> = port.status.addresses.iter().map(ToString::to_string).collect();
        if wants != has {
            wrong.push(format!("port {id} has the addresses {wants:?}, and owns {has:?}"));
        }
    }

    fn check_instance(&self, id: InstanceId, wrong: &mut Vec<String>) {
        let ports = self.ports_of.get(&id).cloned().unwrap_or_default();
        let host_ports = self.host_ports_of.get(&id.0).cloned().unwrap_or_default();
        let Some(instance) = self.instances.get(&id) else {
            if !ports.is_empty() || !host_ports.is_empty() {
                wrong.push(format!("instance {id} is gone, its ports {ports:?} or host ports {host_ports:?} are not"));
            }
            return;
        };
        let name = &instance.metadata.name;
        let node = instance.status.placement.as_ref().map(|p| p.node);
        for port in &instance.status.resolved.ports {
            match self.ports.get(&port.0) {
                None => wrong.push(format!("instance {name}: its port {port} does not exist")),
                Some(port) if node.is_some() && port.status.node != node => {
                    wrong.push(format!(
                        "instance {name} is on {node:?}, its port {} on {:?}",
                        port.metadata.id, port.status.node
                    ));
                }
                Some(_) => {}
            }
        }
        for volume in &instance.status.resolved.volumes {
            let owner = self.volumes.get(&volume.0).map(|v| v.status.attached_to);
            if owner != Some(Some(id)) {
                wrong.push(format!("instance {name} uses volume {volume}, which belongs to {owner:?}"));
            }
        }
        let Some(node) = node else { return };
        let wanted: BTreeSet<Key> = instance
            .spec
            .publish
            .iter()
            .map(|p| {
                let protocol = if p.protocol == Transport::Udp { "udp" } else { "tcp" };
                objects::host_port_key(node, protocol, p.host_port)
            })
            .collect();
        if wanted != host_ports {
            wrong.push(format!("instance {name} publishes {wanted:?}, and owns {host_ports:?}"));
        }
    }
}

fn touched_host_ports(touched: &mut Touched) -> impl FnMut(Uuid) {
    |id| _ = touched.instances.insert(InstanceId(id))
}

/// Keeps an index of keys by the id that is their value.
fn index(
    by_id: &mut BTreeMap<Uuid, BTreeSet<Key>>,
    touch: &mut impl FnMut(Uuid),
    keys: &BTreeMap<Key, Bytes>,
    change: &Change,
) {
    let decoded = |value: &Bytes| objects::decode_value::<Uuid>(&change.key, value).unwrap_or_default();
    if let Some(old) = keys.get(&change.key).map(decoded) {
        by_id.entry(old).or_default().remove(&change.key);
        touch(old);
    }
    if let Some(new) = change.value.as_ref().map(decoded) {
        by_id.entry(new).or_default().insert(change.key.clone());
        touch(new);
    }
}
