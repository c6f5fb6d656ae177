//! Chooses nodes for instances that have none. The choice and the reservation are one commit.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use oblak_model::{
    Instance, InstanceId, Node, NodeId, NodePhase, Phase, Publish, Severity, Timestamp, Transport, Volume, VolumeId,
    VolumeKind,
};
use oblak_scheduler as s;
use oblak_store::Revision;
use oblak_store::cache::Item;
use oblak_store::objects::{self, Allocation};

use crate::caches::Caches;
use crate::change::{Change, event};
use crate::drive::Reconciler;
use crate::lifecycle::{
    Assignment, DEFAULT_STRATEGY, Relocation, assign_instance, explanation, relocate, request, sub,
};
use crate::world::{LiveWorld, Turn, turn};

/// Instances placed in one pass; the rest in the next, so that a burst does not hold everything up.
const PER_PASS: usize = 256;
/// Refusals explained in one pass; who asks for the same as one who was refused costs nothing. The next pass goes on where this one ended.
const REFUSALS: usize = 64;
/// Instances looked at in one pass.
const LOOKED_AT: usize = 4096;
/// Nodes given up for a taken host port before the instance waits.
const PORT_TRIES: usize = 64;

/// The reconciler.
#[derive(Debug, Default)]
pub struct Placer {
    pub(crate) live: LiveWorld,
    /// Who was refused last when a pass ended before everybody had a turn.
    after: Option<Turn>,
}

impl Reconciler for Placer {
    fn name(&self) -> &'static str {
        "placement"
    }
    fn sweep(&self) -> Duration {
        // Somebody has not had a turn yet.
        if self.after.is_some() { Duration::from_millis(100) } else { Duration::from_secs(15) }
    }
    fn plan(&mut self, caches: &Caches, now: Timestamp) -> Vec<Change> {
        self.live.catch_up(caches);
        let waiting: Vec<Arc<Item<Instance>>> = self.live.pending(self.after.take()).take(LOOKED_AT).cloned().collect();
        let mut plan = Plan::new(caches, &mut self.live, now);
        let mut changes = Vec::new();
        for (n, item) in waiting.iter().enumerate() {
            changes.extend(plan.place(&item.value));
            if changes.len() >= PER_PASS {
                break;
            }
            if plan.refused.len() >= REFUSALS || n + 1 == LOOKED_AT {
                self.after = Some(turn(&item.value));
                break;
            }
        }
        changes
    }
}

/// What is planned in one pass, over what the store shows.
pub(crate) struct Plan<'a> {
    caches: &'a Caches,
    live: &'a mut LiveWorld,
    /// Reservations as they will be after what this plan has placed so far; the revision is that of the store.
    allocations: BTreeMap<NodeId, Option<(Allocation, Revision)>>,
    /// Host ports this plan has given away.
    ports: BTreeMap<NodeId, Vec<(u16, Transport)>>,
    /// Requests that no node can take, without the id of who asked, and why.
    refused: Vec<(s::Request, String)>,
    now: Timestamp,
}

/// A node that was chosen.
struct Choice {
    node: Arc<Item<Node>>,
    decision: s::Decision,
}

/// Why none was chosen: stable reason and text for people.
type Waits = (&'static str, String);

impl<'a> Plan<'a> {
    /// Nothing is planned yet. `live` has caught up with the mirrors.
    pub fn new(caches: &'a Caches, live: &'a mut LiveWorld, now: Timestamp) -> Self {
        let (allocations, ports, refused) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { caches, live, allocations, ports, refused, now }
    }

    fn place(&mut self, instance: &Instance) -> Option<Change> {
        let volumes = self.volumes_of(instance);
        match self.choose(instance, &volumes) {
            Ok(choice) => self.assign(instance, &volumes, &choice),
            Err((reason, message)) => waiting(instance, reason, &message),
        }
    }

    /// Moves an instance away from a lost node, or says why it cannot be moved. The caller adds the guard about that node.
    pub fn relocate(&mut self, instance: &Instance, lost: &Node) -> Option<Change> {
        let volumes = self.volumes_of(instance);
        let choice = match self.choose(instance, &volumes) {
            Ok(choice) => choice,
            Err((reason, message)) => return stuck(instance, lost, reason, &message),
        };
        let (from, to) = (NodeId(lost.metadata.id), NodeId(choice.node.value.metadata.id));
        let ports = self.caches.ports_of(InstanceId(instance.metadata.id));
        let why = format!("{} is lost; {}", lost.metadata.name, choice.decision.why);
        let (from_allocation, to_allocation) = (self.allocation(from), self.allocation(to));
        let ops = relocate(&Relocation {
            instance,
            to: &choice.node.value,
            why: &why,
            at: self.now,
            ports: &ports,
            volumes: &volumes,
            from_allocation,
            to_allocation,
            phase: if instance.metadata.is_deleting() { Phase::Deleting } else { Phase::Scheduled },
            reason: if instance.metadata.is_deleting() { "Deleting" } else { "Evacuated" },
        })?;
        let placed = &instance.status.placement.as_ref()?.resources;
        let moved = self.live.relocate(instance, placement(instance, &choice));
        moved.inspect_err(|error| not_taken(instance, error)).ok()?;
        if let Some((mut sum, revision)) = from_allocation {
            sum.resources = sub(sum.resources, *placed);
            sum.instances = sum.instances.saturating_sub(1);
            self.allocations.insert(from, Some((sum, revision)));
        }
        self.note(to, instance, to_allocation);
        Some(Change { ops, events: Vec::new() }.event(event(
            instance,
            Severity::Warning,
            "Evacuated",
            format!("started on {} because {why}", choice.node.value.metadata.name),
        )))
    }

    fn choose(&mut self, instance: &Instance, volumes: &[Volume]) -> Result<Choice, Waits> {
        if let Some(waits) = self.waits_for(instance) {
            return Err(waits);
        }
        let mut request = request(instance, volumes, DEFAULT_STRATEGY);
        if let Some(text) = self.refused_before(&request) {
            return Err(("DoesNotFit", text.into()));
        }
        let mut taken = None;
        for _ in 0..PORT_TRIES {
            match s::decide(self.live.world(), &request) {
                Ok(decision) => {
                    let id = NodeId(uuid::Uuid::from_u128(decision.node.0));
                    let free = self.taken_port(id, &instance.spec.publish);
                    match (free, self.caches.node(id)) {
                        (None, Some(node)) => return Ok(Choice { node, decision }),
                        (None, None) => {}
                        (Some(port), _) => taken = Some((port, decision.name.to_string())),
                    }
                    request.avoid_nodes.push(decision.node);
                }
                Err(unfit) => {
                    let text = match &taken {
                        Some((port, node)) => format!("host port {port} is taken on {node}; {}", explanation(&unfit)),
                        None => explanation(&unfit).to_string(),
                    };
                    if taken.is_none() {
                        self.refused.push((anonymous(request), text.clone()));
                    }
                    return Err(("DoesNotFit", text));
                }
            }
        }
        Err(("DoesNotFit", "the host ports it publishes are taken on every node that was looked at".into()))
    }

    fn volumes_of(&self, instance: &Instance) -> Vec<Volume> {
        instance.status.resolved.volumes.iter().filter_map(|id| self.volume(instance, *id)).collect()
    }

    fn volume(&self, of: &Instance, id: VolumeId) -> Option<Volume> {
        let item = self.caches.volumes.get(&objects::object_key::<VolumeKind>(of.scope_key(), id.0))?;
        Some(item.value.clone())
    }

    /// Why somebody else who asks for the same was refused. What was placed since then has only taken room; where it could have helped, by
    /// affinity, the next pass finds out.
    fn refused_before(&self, request: &s::Request) -> Option<&str> {
        let wanted = anonymous(request.clone());
        self.refused.iter().find(|(request, _)| *request == wanted).map(|(_, text)| text.as_str())
    }

    /// What has to be there before a node can be chosen.
    fn waits_for(&self, instance: &Instance) -> Option<(&'static str, String)> {
        let image = self.live.image(instance.status.resolved.image);
        if let Some(failed) = image.filter(|i| i.status.phase == oblak_model::ImagePhase::Failed) {
            let message = &failed.status.message;
            return Some(("ImageFailed", format!("image {} cannot be used: {message}", failed.metadata.name)));
        }
        let missing = instance.status.resolved.volumes.iter().find(|id| self.volume(instance, **id).is_none());
        missing.map(|id| ("VolumeMissing", format!("volume {id} does not exist any more")))
    }

    fn taken_port(&self, node: NodeId, publish: &[Publish]) -> Option<u16> {
        let taken = |p: &&Publish| {
            let protocol = if p.protocol == Transport::Udp { "udp" } else { "tcp" };
            let here = self.ports.get(&node).is_some_and(|list| list.contains(&(p.host_port, p.protocol)));
            here || self.caches.keys.get(&objects::host_port_key(node, protocol, p.host_port)).is_some()
        };
        publish.iter().find(taken).map(|p| p.host_port)
    }

    fn allocation(&mut self, node: NodeId) -> Option<(Allocation, Revision)> {
        let keys = &self.caches.keys;
        *self.allocations.entry(node).or_insert_with(|| {
            let key = objects::allocation_key(node);
            let item = keys.get(&key)?;
            let allocation = objects::decode_value(&key, &item.value)
                .inspect_err(|error| tracing::error!(%error, "a reservation cannot be read"))
                .ok()?;
            Some((allocation, item.revision))
        })
    }

    fn assign(&mut self, instance: &Instance, volumes: &[Volume], choice: &Choice) -> Option<Change> {
        let node = choice.node.clone();
        let id = NodeId(node.value.metadata.id);
        self.live.place(placement(instance, choice)).inspect_err(|error| not_taken(instance, error)).ok()?;
        let allocation = self.allocation(id);
        let ports = self.caches.ports_of(InstanceId(instance.metadata.id));
        let why = choice.decision.why.to_string();
        let assignment =
            Assignment { instance, node: &node.value, why: &why, at: self.now, ports: &ports, volumes, allocation };
        let change = Change { ops: assign_instance(&assignment), events: Vec::new() };
        self.note(id, instance, allocation);
        Some(change.event(event(
            instance,
            Severity::Normal,
            "Scheduled",
            format!("placed on {}: {why}", node.value.metadata.name),
        )))
    }

    /// Remembers what this plan has given away, for the instances that come after.
    fn note(&mut self, node: NodeId, instance: &Instance, before: Option<(Allocation, Revision)>) {
        let add = instance.status.resolved.resources;
        let (mut sum, revision) = before.unwrap_or((Allocation::default(), Revision::ZERO));
        sum.resources.vcpus.0 = sum.resources.vcpus.0.saturating_add(add.vcpus.0);
        sum.resources.memory = sum.resources.memory + add.memory;
        sum.resources.disk = sum.resources.disk + add.disk;
        sum.instances += 1;
        self.allocations.insert(node, Some((sum, revision)));
        self.ports.entry(node).or_default().extend(instance.spec.publish.iter().map(|p| (p.host_port, p.protocol)));
    }
}

/// A decision as the world takes it over.
fn placement<'a>(instance: &'a Instance, choice: &Choice) -> s::Placement<'a> {
    let request = request(instance, &[], DEFAULT_STRATEGY);
    s::Placement {
        instance: request.id,
        node: choice.decision.node,
        project: request.project,
        labels: &instance.metadata.labels,
        resources: request.resources,
    }
}

fn not_taken(instance: &Instance, error: &s::WorldError) {
    tracing::error!(instance = %instance.metadata.name, %error, "a decision could not be taken over");
}

/// A request without who asks.
fn anonymous(mut request: s::Request) -> s::Request {
    request.id = s::InstanceId(0);
    request.avoid_nodes.clear();
    request
}

/// Says why an instance waits, when it says something else now.
fn waiting(instance: &Instance, reason: &str, message: &str) -> Option<Change> {
    let status = &instance.status;
    if status.phase == Phase::Pending && status.reason == reason && status.message == message {
        return None;
    }
    let mut new = instance.clone();
    new.status.phase = Phase::Pending;
    new.status.reason = reason.into();
    new.status.message = message.into();
    // Free memory changes all the time; the event is told once per reason.
    let change = Change::update(&new);
    Some(if status.reason == reason {
        change
    } else {
        change.event(event(instance, Severity::Warning, reason, message))
    })
}

/// Says why an instance of a lost node stays there, when that is news.
fn stuck(instance: &Instance, lost: &Node, reason: &str, message: &str) -> Option<Change> {
    let text = format!("node {} is lost, and it cannot be started elsewhere: {message}", lost.metadata.name);
    let status = &instance.status;
    if instance.metadata.is_deleting() || (status.phase == Phase::Unknown && status.reason == reason) {
        return None;
    }
    let mut new = instance.clone();
    new.status.phase = Phase::Unknown;
    new.status.reason = reason.into();
    new.status.message.clone_from(&text);
    Some(Change::update(&new).event(event(instance, Severity::Warning, reason, text)))
}

/// Nodes that are alive.
pub(crate) fn ready(nodes: &[Arc<Item<Node>>]) -> Vec<Arc<Item<Node>>> {
    nodes
        .iter()
        .filter(|n| n.value.status.phase == NodePhase::Ready && !n.value.metadata.is_deleting())
        .cloned()
        .collect()
}
