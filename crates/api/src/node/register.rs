//! A node introduces itself and stays alive.

use std::collections::HashSet;

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use oblak_model::wire::{Heartbeat, HeartbeatAnswer, Register, Registered};
use oblak_model::{ApiError, Code, Evacuation, Node, NodeId, NodeKind, NodePhase, NodeSpec};
use oblak_store::objects::{self, Allocation};
use oblak_store::{Guard, LeaseId, StoreError};

use super::FromAgent;
use crate::commit::transact;
use crate::docs::BY_NODE;
use crate::draft::Draft;
use crate::error::{Answer, store_error};
use crate::state::App;

/// Samples in one heartbeat; more are dropped.
const SAMPLES: usize = 10_000;

pub(crate) async fn register(
    State(app): State<App>,
    FromAgent { node: id, said: register }: FromAgent<Register>,
) -> Answer {
    let lease = app.store.grant(app.config.node_lease).await?;
    let old_lease = lease_of(&app, id)?;
    let result = transact(&app, |draft| plan(draft, id, &register, lease.id)).await;
    let ((node, continues), _) = match result {
        Ok(done) => done,
        Err(error) => {
            let _ = app.store.revoke(lease.id).await;
            return Err(error.into());
        }
    };
    // The key of the lease now belongs to the new one, so ending the old one takes nothing away.
    if let Some(old) = old_lease {
        let _ = app.store.revoke(old).await;
    }
    tracing::info!(node = node.metadata.name, epoch = node.status.epoch, "a node has registered");
    let answer = Registered {
        name: node.metadata.name,
        epoch: node.status.epoch,
        lease_ms: u64::try_from(app.config.node_lease.as_millis()).unwrap_or(u64::MAX),
        continues,
    };
    Ok(Json(answer).into_response())
}

/// One commit: the node, its reservation when it is new, and its lease with the next epoch. Answers with the epoch of the lease that is
/// replaced, when it was alive until now: then nothing of the node can have been started elsewhere.
fn plan(draft: &mut Draft, id: NodeId, register: &Register, lease: LeaseId) -> Result<(Node, Option<u64>), ApiError> {
    let known = draft.get::<NodeKind>("_", id.0)?;
    let is_new = known.is_none();
    let mut node = match known {
        Some(node) if node.metadata.is_deleting() => {
            return Err(ApiError::new(Code::WrongState, format!("{} is being deleted", node.describe())));
        }
        Some(node) => node,
        None => new_node(draft, id, register)?,
    };
    let alive = draft.value::<u64>(&objects::lease_key(id))?;
    if let Some((_, Some(revision))) = alive {
        draft.batch.guard(Guard::Revision(objects::lease_key(id), revision));
    }
    // What was started elsewhere while the node was away is removed there before anything new comes.
    let left = draft.app.docs.all(&objects::superseded_prefix(id)).len();
    let phase = if left == 0 { NodePhase::Ready } else { NodePhase::Cleaning };
    let status = &mut node.status;
    if status.phase != phase {
        status.phase = phase;
        status.phase_since = draft.now;
    }
    status.message = if left == 0 { String::new() } else { format!("removes {left} guests that run elsewhere now") };
    status.evacuation = Evacuation::Automatic;
    status.capacity = register.capacity;
    status.facts = register.facts.clone();
    status.agent_version.clone_from(&register.version);
    status.boot_id.clone_from(&register.boot_id);
    status.epoch += 1;
    if is_new {
        draft.create(&node)?;
    } else {
        draft.update(&node);
    }
    let allocation = objects::allocation_key(id);
    if draft.raw(&allocation).is_none() {
        draft.batch.guard(Guard::Absent(allocation.clone()));
        draft.put(allocation, &Allocation::default());
    }
    draft.batch.guard(Guard::LeaseAlive(lease));
    draft.batch.write(oblak_store::Write::Put {
        key: objects::lease_key(id),
        value: objects::encode_value(&node.status.epoch),
        lease: Some(lease),
    });
    draft.put(objects::secret_key("node-lease", &id.to_string()), &lease.to_string());
    Ok((node, alive.map(|(epoch, _)| epoch)))
}

fn new_node(draft: &Draft, id: NodeId, register: &Register) -> Result<Node, ApiError> {
    let zone = if register.zone.is_empty() { NodeSpec::default().zone } else { register.zone.clone() };
    let mut node = Node::new(&register.name, NodeSpec { zone, ..NodeSpec::default() });
    draft.stamp(&mut node, None);
    node.metadata.id = id.0;
    node.metadata.labels.clone_from(&register.labels);
    node.validate()?;
    Ok(node)
}

fn lease_of(app: &App, id: NodeId) -> Result<Option<LeaseId>, ApiError> {
    let key = objects::secret_key("node-lease", &id.to_string());
    let text = app.docs.get(&key).map(|item| objects::decode_value::<String>(&key, &item.raw));
    Ok(text.transpose().map_err(|e| store_error(&e))?.and_then(|text| text.parse().ok()))
}

pub(crate) async fn heartbeat(
    State(app): State<App>,
    FromAgent { node: id, said: heartbeat }: FromAgent<Heartbeat>,
) -> Answer {
    let (epoch, lease) = (super::epoch(&app, id)?, lease_of(&app, id)?);
    let valid = match lease {
        Some(lease) if epoch == Some(heartbeat.epoch) => match app.store.renew(lease).await {
            Ok(_) => true,
            Err(StoreError::LeaseGone(_)) => false,
            Err(error) => return Err(error.into()),
        },
        _ => false,
    };
    if valid {
        // A node speaks only about its own guests.
        let term = format!("instance/{id}");
        let own: HashSet<_> =
            app.docs.view(|view| view.find(BY_NODE, &term).filter_map(|item| Some(item.value.object()?.id)).collect());
        for (instance, usage) in heartbeat.usage.into_iter().take(SAMPLES).filter(|(id, _)| own.contains(&id.0)) {
            app.usage.add(instance.0, usage);
        }
    }
    Ok(Json(HeartbeatAnswer { valid }).into_response())
}
