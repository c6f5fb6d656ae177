//! What the control plane has told this node, kept in memory only: after a restart it is told again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use oblak_model::wire::{NodeEvent, PEER, Peer, SUPERSEDED, SupersededInstance};
use oblak_model::{
    Image, ImageId, Instance, InstanceId, Isolation, Kind, Network, NetworkId, Node, NodeId, Object, Port, PortId,
    SecurityGroup, SecurityGroupId, Snapshot, SnapshotId, Subnet, SubnetId, Volume, VolumeId,
};
use serde_json::Value;
use uuid::Uuid;

/// Objects that concern this node.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Instances placed here.
    pub instances: BTreeMap<InstanceId, Arc<Instance>>,
    /// Volumes placed here.
    pub volumes: BTreeMap<VolumeId, Arc<Volume>>,
    /// Images that are imported here or used by instances here.
    pub images: BTreeMap<ImageId, Arc<Image>>,
    /// Snapshots here.
    pub snapshots: BTreeMap<SnapshotId, Arc<Snapshot>>,
    /// Networks of the projects that have instances here.
    pub networks: BTreeMap<NetworkId, Arc<Network>>,
    /// Their subnets.
    pub subnets: BTreeMap<SubnetId, Arc<Subnet>>,
    /// Their ports, local or not.
    pub ports: BTreeMap<PortId, Arc<Port>>,
    /// Security groups of those projects.
    pub groups: BTreeMap<SecurityGroupId, Arc<SecurityGroup>>,
    /// This node.
    pub node: Option<Arc<Node>>,
    /// Other nodes that have ports of those networks.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Instances that were moved elsewhere and of which something may be left here, with the placement that this was.
    pub superseded: BTreeMap<InstanceId, u64>,
}

/// What an event touched.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Owners to wake.
    pub instances: BTreeSet<InstanceId>,
    /// Volumes changed.
    pub volumes: bool,
    /// Images changed.
    pub images: bool,
    /// Networks changed.
    pub networks: bool,
}

impl Touched {
    /// Everything.
    #[must_use]
    pub fn all(world: &World) -> Self {
        let instances = world.instances.keys().chain(world.superseded.keys()).copied().collect();
        Self { instances, volumes: true, images: true, networks: true }
    }
    /// Adds what another event touched.
    pub fn merge(&mut self, other: Self) {
        self.instances.extend(other.instances);
        self.volumes |= other.volumes;
        self.images |= other.images;
        self.networks |= other.networks;
    }
}

/// Whether both are at the same place and on the same way: ports are plugged by it.
fn same_way(a: &Instance, b: &Instance) -> bool {
    let place = |of: &Instance| of.status.placement.as_ref().map(|p| (p.node, p.generation));
    let way = |of: &Instance| of.status.migration.as_ref().map(|m| (m.to, m.phase));
    place(a) == place(b) && way(a) == way(b)
}

fn read<K: Kind>(object: Value) -> Option<Arc<Object<K>>> {
    match serde_json::from_value(object) {
        Ok(object) => Some(Arc::new(object)),
        Err(error) => {
            // A newer server may send what this agent cannot read; what it knows stays as it was.
            tracing::warn!(kind = K::KIND, %error, "cannot read an object from the server");
            None
        }
    }
}

impl World {
    /// Takes one event in.
    pub fn apply(&mut self, event: NodeEvent) -> Touched {
        match event {
            NodeEvent::Put { kind, object } => self.put(&kind, object).unwrap_or_default(),
            NodeEvent::Delete { kind, id } => self.delete(&kind, id),
            NodeEvent::Synced { .. } => Touched::default(),
        }
    }

    fn put(&mut self, kind: &str, object: Value) -> Option<Touched> {
        let mut touched = Touched::default();
        match kind {
            "instance" => {
                let o: Arc<Instance> = read(object)?;
                let id = InstanceId(o.metadata.id);
                let old = self.instances.insert(id, o.clone());
                // Status changes are mostly our own reports coming back; the network plan depends on spec and labels only.
                let same = old.is_some_and(|old| {
                    old.spec == o.spec
                        && old.metadata.labels == o.metadata.labels
                        && old.status.resolved == o.status.resolved
                        && same_way(&old, &o)
                });
                touched.networks = !same;
                touched.images = !same;
                touched.instances.insert(id);
            }
            "volume" => {
                let o: Arc<Volume> = read(object)?;
                touched.instances.extend(o.status.attached_to);
                touched.volumes = true;
                self.volumes.insert(VolumeId(o.metadata.id), o);
            }
            "image" => {
                let o: Arc<Image> = read(object)?;
                let id = ImageId(o.metadata.id);
                touched.instances = self.users_of_image(id);
                touched.images = true;
                self.images.insert(id, o);
            }
            "snapshot" => {
                let o: Arc<Snapshot> = read(object)?;
                touched.instances.extend(o.status.instance);
                touched.volumes = o.status.volume.is_some();
                self.snapshots.insert(SnapshotId(o.metadata.id), o);
            }
            "network" => self
                .networks_put(read(object)?, &mut touched, |w, o| drop(w.networks.insert(NetworkId(o.metadata.id), o))),
            "subnet" => self
                .networks_put(read(object)?, &mut touched, |w, o| drop(w.subnets.insert(SubnetId(o.metadata.id), o))),
            "port" => {
                self.networks_put(read(object)?, &mut touched, |w, o| drop(w.ports.insert(PortId(o.metadata.id), o)));
            }
            "security-group" => self.networks_put(read(object)?, &mut touched, |w, o| {
                drop(w.groups.insert(SecurityGroupId(o.metadata.id), o));
            }),
            "node" => {
                let o: Arc<Node> = read(object)?;
                let was = self.node.as_ref().map(|n| n.status.facts.underlay);
                touched.networks = was != Some(o.status.facts.underlay);
                self.node = Some(o);
            }
            PEER => {
                let peer = serde_json::from_value::<Peer>(object).ok()?;
                touched.networks = self.peers.get(&peer.id) != Some(&peer);
                self.peers.insert(peer.id, peer);
            }
            SUPERSEDED => {
                let moved = serde_json::from_value::<SupersededInstance>(object).ok()?;
                touched.instances.insert(moved.id);
                self.superseded.insert(moved.id, moved.placement);
            }
            _ => {} // kinds that this version does not know do not concern it
        }
        Some(touched)
    }

    fn networks_put<K: Kind>(
        &mut self,
        object: Arc<Object<K>>,
        touched: &mut Touched,
        insert: impl FnOnce(&mut Self, Arc<Object<K>>),
    ) {
        touched.networks = true;
        insert(self, object);
    }

    fn delete(&mut self, kind: &str, id: Uuid) -> Touched {
        let mut touched = Touched::default();
        match kind {
            "instance" => {
                self.instances.remove(&InstanceId(id));
                touched.instances.insert(InstanceId(id));
                touched.networks = true;
            }
            "volume" => {
                touched.volumes = true;
                touched.instances.extend(self.volumes.remove(&VolumeId(id)).and_then(|v| v.status.attached_to));
            }
            "image" => {
                touched.images = true;
                self.images.remove(&ImageId(id));
            }
            "snapshot" => {
                let old = self.snapshots.remove(&SnapshotId(id));
                touched.volumes = old.as_ref().is_some_and(|s| s.status.volume.is_some());
                touched.instances.extend(old.and_then(|s| s.status.instance));
            }
            "network" | "subnet" | "port" | "security-group" => {
                touched.networks = true;
                self.networks.remove(&NetworkId(id));
                self.subnets.remove(&SubnetId(id));
                self.ports.remove(&PortId(id));
                self.groups.remove(&SecurityGroupId(id));
            }
            SUPERSEDED => drop(self.superseded.remove(&InstanceId(id))),
            PEER => touched.networks = self.peers.remove(&NodeId(id)).is_some(),
            _ => {}
        }
        touched
    }

    fn users_of_image(&self, image: ImageId) -> BTreeSet<InstanceId> {
        self.instances.iter().filter(|(_, i)| i.status.resolved.image == image).map(|(id, _)| *id).collect()
    }

    /// Ports of an instance in the order of its interfaces.
    #[must_use]
    pub fn ports_of(&self, instance: InstanceId) -> Vec<Arc<Port>> {
        let mut ports: Vec<_> = self.ports.values().filter(|p| p.spec.instance == instance).cloned().collect();
        ports.sort_by_key(|p| p.spec.index);
        ports
    }

    /// Whether a port's instance is on this node.
    #[must_use]
    pub fn is_local(&self, port: &Port, node: NodeId) -> bool {
        port.status.node == Some(node) && self.instances.contains_key(&port.spec.instance)
    }

    /// Whether a port's instance may come to this node: a machine finds its tap there. Also when it has just come and the port, which is told
    /// of separately, has not: the machine has its tap open already, which must not be made anew.
    #[must_use]
    pub fn is_coming(&self, port: &Port, node: NodeId) -> bool {
        let machine = |i: &Arc<Instance>| i.status.resolved.isolation != Isolation::Container;
        port.status.node != Some(node)
            && self
                .instances
                .get(&port.spec.instance)
                .is_some_and(|i| machine(i) && (i.status.moves_to(node) || i.status.came_by_migration(node)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::InstanceSpec;
    use oblak_model::MigrationPhase;

    fn put(world: &mut World, instance: &Instance) -> Touched {
        world.apply(NodeEvent::Put { kind: "instance".into(), object: serde_json::to_value(instance).unwrap() })
    }

    #[test]
    fn a_report_coming_back_does_not_touch_networks() {
        let mut world = World::default();
        let mut web = Instance::new("web", InstanceSpec { image: "tiny".into(), ..InstanceSpec::default() });
        web.metadata.id = Uuid::now_v7();
        assert!(put(&mut world, &web).networks);
        web.status.phase = oblak_model::Phase::Running;
        let touched = put(&mut world, &web);
        assert!(!touched.networks);
        assert_eq!(touched.instances.len(), 1);
        let gone = world.apply(NodeEvent::Delete { kind: "instance".into(), id: web.metadata.id });
        assert!(gone.networks && world.instances.is_empty());
    }

    #[test]
    fn the_tap_stays_between_the_news_of_the_machine_and_of_its_port() {
        use oblak_model::{MigrationStatus, Placement, PortSpec, Resources, Size, Timestamp};
        let [from, to] = [1, 2].map(|n| NodeId(Uuid::from_u128(n)));
        let mut db = Instance::new("db", InstanceSpec::default());
        db.metadata.id = Uuid::now_v7();
        db.status.resolved.isolation = Isolation::Vm;
        let placement = |node| Placement {
            node,
            node_name: String::new(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 1,
            fenced: false,
            fence_turn: 0,
        };
        db.status.placement = Some(placement(from));
        db.status.migration = Some(MigrationStatus {
            generation: 1,
            phase: MigrationPhase::Copying,
            live: true,
            from,
            from_name: String::new(),
            to,
            to_name: String::new(),
            resources: Resources::default(),
            address: None,
            total: Size::ZERO,
            remaining: Size::ZERO,
            downtime_ms: None,
            arrived: false,
            left: false,
            reason: String::new(),
            message: String::new(),
            started_at: Timestamp::EPOCH,
            ended_at: None,
        });
        let mut port = Port::new("port", PortSpec { instance: InstanceId(db.metadata.id), ..PortSpec::default() });
        port.status.node = Some(from);
        let mut world = World::default();
        put(&mut world, &db);
        assert!(world.is_coming(&port, to) && !world.is_coming(&port, from));
        // The switch; the port is told of next.
        db.status.placement = Some(placement(to));
        db.status.migration.as_mut().unwrap().phase = MigrationPhase::Finishing;
        assert!(put(&mut world, &db).networks);
        assert!(world.is_coming(&port, to) && !world.is_local(&port, to));
        port.status.node = Some(to);
        assert!(!world.is_coming(&port, to) && world.is_local(&port, to));
    }

    #[test]
    fn what_cannot_be_read_changes_nothing() {
        let mut world = World::default();
        let touched =
            world.apply(NodeEvent::Put { kind: "instance".into(), object: serde_json::json!({"metadata": 7}) });
        assert_eq!(touched, Touched::default());
    }
}
