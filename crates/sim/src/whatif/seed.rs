//! Copies a state into a store: the objects, and the keys that the control plane keeps beside them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use oblak_model::{Kind, Node, NodeId, NodePhase, Object, Transport};
use oblak_store::objects::{self, Allocation};
use oblak_store::{CommitOutcome, LeaseId, MAX_TXN_OPS, MemoryStore, Store, Txn, Write};

use super::{LiveState, WhatIfError};

/// The lease of nodes that stay: longer than anything that is played.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

struct Seeder<'a> {
    store: &'a MemoryStore,
    writes: Vec<Write>,
}

impl Seeder<'_> {
    async fn write(&mut self, write: Write) -> Result<(), WhatIfError> {
        self.writes.push(write);
        if self.writes.len() == MAX_TXN_OPS { self.flush().await } else { Ok(()) }
    }

    async fn objects<K: Kind>(&mut self, all: &[Object<K>]) -> Result<(), WhatIfError> {
        for object in all {
            self.write(objects::put(objects::key_of(object), objects::encode(object))).await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), WhatIfError> {
        let writes = std::mem::take(&mut self.writes);
        if writes.is_empty() {
            return Ok(());
        }
        match self.store.commit(Txn { writes, ..Txn::random() }).await? {
            CommitOutcome::Committed(_) => Ok(()),
            other => Err(WhatIfError::Copy(format!("{other:?}"))),
        }
    }
}

/// Writes everything. Nodes of `down` have a lease of `lease` that nobody renews; of the others those that are ready now have one that stays.
pub async fn seed(
    store: &MemoryStore,
    state: &LiveState,
    added: &[Node],
    down: &BTreeSet<NodeId>,
    lease: Duration,
) -> Result<(), WhatIfError> {
    let mut seeder = Seeder { store, writes: Vec::new() };
    seeder.objects(&state.nodes).await?;
    seeder.objects(added).await?;
    seeder.objects(&state.images).await?;
    seeder.objects(&state.volumes).await?;
    seeder.objects(&state.ports).await?;
    seeder.objects(&state.instances).await?;
    let mut reserved: BTreeMap<NodeId, Allocation> = BTreeMap::new();
    for node in state.nodes.iter().chain(added) {
        reserved.insert(NodeId(node.metadata.id), Allocation::default());
    }
    for instance in &state.instances {
        let Some(placement) = &instance.status.placement else { continue };
        let sum = reserved.entry(placement.node).or_default();
        let (resources, more) = (&mut sum.resources, placement.resources);
        resources.vcpus.0 = resources.vcpus.0.saturating_add(more.vcpus.0);
        resources.memory = resources.memory + more.memory;
        resources.disk = resources.disk + more.disk;
        sum.instances += 1;
        for publish in &instance.spec.publish {
            let protocol = if publish.protocol == Transport::Udp { "udp" } else { "tcp" };
            let key = objects::host_port_key(placement.node, protocol, publish.host_port);
            seeder.write(objects::put(key, objects::encode_value(&instance.metadata.id))).await?;
        }
    }
    for (node, sum) in &reserved {
        seeder.write(objects::put(objects::allocation_key(*node), objects::encode_value(sum))).await?;
    }
    let (stays, ends) = (store.grant(FOR_EVER).await?.id, store.grant(lease).await?.id);
    for node in state.nodes.iter().chain(added).filter(|node| node.status.phase == NodePhase::Ready) {
        let id = NodeId(node.metadata.id);
        seeder.write(leased(id, if down.contains(&id) { ends } else { stays })).await?;
    }
    seeder.flush().await
}

fn leased(node: NodeId, lease: LeaseId) -> Write {
    Write::Put { key: objects::lease_key(node), value: objects::encode_value(&1u64), lease: Some(lease) }
}
