//! Which other nodes an agent is told of: those that have a port of a network that it is told of, and of each only where to reach it.

use std::collections::BTreeMap;

use oblak_model::wire::{NodeEvent, PEER, Peer};
use oblak_model::{Kind, Node, NodeId, NodeKind};
use oblak_store::{Key, objects};
use uuid::Uuid;

use crate::docs::{self, Docs};

/// What one agent has been told.
pub(super) struct Peers {
    own: Uuid,
    /// The node of each port that is on another one.
    ports: BTreeMap<Key, Uuid>,
    nodes: BTreeMap<Uuid, Told>,
}

#[derive(Default)]
struct Told {
    /// Ports that make the node relevant.
    ports: usize,
    /// As it was sent last; `None` when the node does not exist.
    peer: Option<Peer>,
}

impl Peers {
    pub fn new(own: NodeId) -> Self {
        Self { own: own.0, ports: BTreeMap::new(), nodes: BTreeMap::new() }
    }

    /// A port is now on `node`. Answers what has to be sent before it.
    pub fn port_comes(&mut self, docs: &Docs, port: &Key, node: Option<Uuid>) -> Option<NodeEvent> {
        let node = node.filter(|node| *node != self.own);
        if self.ports.get(port).copied() == node {
            return None;
        }
        self.port_goes(port);
        let node = node?;
        self.ports.insert(port.clone(), node);
        let told = self.nodes.entry(node).or_default();
        told.ports += 1;
        if told.peer.is_some() {
            return None;
        }
        told.peer = current(docs, node);
        told.peer.as_ref().and_then(put)
    }

    /// A port is gone. Whether it was on another node.
    pub fn port_goes(&mut self, port: &Key) -> bool {
        let Some(node) = self.ports.remove(port) else { return false };
        if let Some(told) = self.nodes.get_mut(&node) {
            told.ports -= 1;
        }
        true
    }

    /// What has to be sent about nodes that have no port left. Not before the last port is away from there.
    pub fn gone(&mut self) -> Vec<NodeEvent> {
        let mut events = Vec::new();
        self.nodes.retain(|id, told| {
            if told.ports == 0 && told.peer.is_some() {
                events.push(NodeEvent::Delete { kind: PEER.into(), id: *id });
            }
            told.ports > 0
        });
        events
    }

    /// What has to be sent when the object at `key` has changed and is such a node.
    pub fn node_changed(&mut self, docs: &Docs, key: &Key) -> Option<NodeEvent> {
        if key.segments().next() != Some(NodeKind::KIND) {
            return None;
        }
        let id: Uuid = key.last().parse().ok()?;
        let told = self.nodes.get_mut(&id)?;
        let now = current(docs, id);
        if now == told.peer {
            return None;
        }
        told.peer = now;
        match &told.peer {
            Some(peer) => put(peer),
            None => Some(NodeEvent::Delete { kind: PEER.into(), id }),
        }
    }
}

fn current(docs: &Docs, node: Uuid) -> Option<Peer> {
    let item = docs.get(&objects::object_key::<NodeKind>("_", node))?;
    let node: Node = docs::object(&item).ok()?;
    Some(Peer { id: NodeId(node.metadata.id), name: node.metadata.name, underlay: node.status.facts.underlay })
}

fn put(peer: &Peer) -> Option<NodeEvent> {
    Some(NodeEvent::Put { kind: PEER.into(), object: serde_json::to_value(peer).ok()? })
}
