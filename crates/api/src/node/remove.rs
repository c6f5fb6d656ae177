//! A node leaves the cloud for good.
//!
//! ```text
//!   cordoned ──► anything there? refused ──► (force) its agent shut out ──► what lived there marked as lost ──► gone
//! ```
//! Every step may be repeated: after a crash in between, removing the node again goes on from there. What is lost is not started
//! elsewhere: guests run on when their agent is shut out, and nothing tells us when they end.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use oblak_control::lifecycle::event_ops;
use oblak_identity::{Action, Target};
use oblak_model::wire::{NODE_FINALIZER, NewEvent, NodeRemoved, RemoveNode};
use oblak_model::{
    About, ApiError, Code, Image, ImageKind, ImagePhase, ImageSource, InstanceKind, Kind, Node, NodeId, NodeKind,
    Object, Phase, Severity, SnapshotKind, SnapshotPhase, VolumeKind, VolumePhase,
};
use oblak_store::{Guard, objects};
use uuid::Uuid;

use super::removed_key;
use crate::auth::Caller;
use crate::commit::transact;
use crate::docs::{BY_NODE, Item};
use crate::draft::Draft;
use crate::error::Answer;
use crate::kinds::Resource;
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// Objects marked in one commit; each costs at most four operations of it.
const AT_ONCE: usize = 16;
/// Something may be placed while we look; after so many rounds somebody must see why.
const ROUNDS: usize = 8;
/// Names in a message; the answer has all of them.
const NAMED: usize = 5;
/// Reason of everything that went with a node.
pub(crate) const REASON: &str = "NodeRemoved";

/// `POST /v1/nodes/{name}/remove`.
pub(crate) async fn remove(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    query: Query,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    caller.check(Action::Delete, &Target::Operations)?;
    let request: RemoveNode = if body.is_empty() { RemoveNode::default() } else { from_json(&body)? };
    drop(body);
    let node = app.find::<NodeKind>("_", &name)?.ok_or_else(|| ApiError::not_found("node", &name))?;
    let id = NodeId(node.metadata.id);
    let mut lost = lives_there(&app, &node)?;
    if !request.force {
        refuse_if_any(&node, &lost)?;
    }
    close(&app, id, request.force).await?;
    for _ in 0..ROUNDS {
        if request.force {
            merge(&mut lost, lives_there(&app, &node)?);
            mark_all(&app, &node).await?;
        }
        let source = caller.principal.to_string();
        let (done, _) = transact(&app, |draft| forget(draft, &node, &lost, request.force, &source)).await?;
        if done {
            tracing::info!(node = node.metadata.name, force = request.force, "a node was removed");
            return Ok(Json(lost).into_response());
        }
    }
    Err(ApiError::new(Code::Conflict, "something kept being placed on the node; try again").into())
}

/// Nothing new comes; with force the agent is shut out too, so that its reports do not undo what follows.
async fn close(app: &App, id: NodeId, force: bool) -> Result<(), ApiError> {
    transact(app, |draft| {
        let Some(mut node) = draft.get::<NodeKind>("_", id.0)? else { return Ok(()) };
        if node.spec.schedulable {
            node.spec.schedulable = false;
            node.metadata.generation += 1;
            draft.update(&node);
        }
        if force && draft.raw(&removed_key(id)).is_none() {
            draft.put(removed_key(id), &draft.now.to_string());
        }
        Ok(())
    })
    .await
    .map(drop)
}

/// The last commit. Answers whether it is the last: false when something has come that is not marked yet.
fn forget(draft: &mut Draft, node: &Node, lost: &NodeRemoved, force: bool, source: &str) -> Result<bool, ApiError> {
    let id = NodeId(node.metadata.id);
    let Some(current) = draft.get::<NodeKind>("_", id.0)? else { return Ok(true) };
    // Whatever is placed changes the reservation, also when this server has not seen it yet.
    if let Some((_, revision)) = draft.allocation(id)? {
        draft.batch.guard(Guard::Revision(objects::allocation_key(id), revision));
    }
    if !force {
        refuse_if_any(node, &lives_there(&draft.app, node)?)?;
    } else if !unmarked(&draft.app, id).is_empty() {
        return Ok(false);
    }
    NodeKind::remove(draft, &current)?;
    let about = About { kind: "node".into(), name: node.metadata.name.clone(), id: id.0 };
    let message = format!("removed by {source}{}", with_it(lost));
    let event = NewEvent { project: None, about, severity: Severity::Warning, reason: REASON.into(), message };
    let event = draft.app.recent().note(draft.app.uuid(), &event, "api", draft.now);
    draft.batch.absorb(event_ops(&event));
    Ok(true)
}

fn with_it(lost: &NodeRemoved) -> String {
    let text = summary(lost);
    if text.is_empty() { String::new() } else { format!("; lost with it: {text}") }
}

fn refuse_if_any(node: &Node, lost: &NodeRemoved) -> Result<(), ApiError> {
    let text = summary(lost);
    if text.is_empty() {
        return Ok(());
    }
    Err(ApiError::new(
        Code::InUse,
        format!(
            "{} still has {text}; delete them first, or repeat with --force, which loses them: their data is only there",
            node.describe()
        ),
    ))
}

fn summary(lost: &NodeRemoved) -> String {
    let all = [
        ("instance", &lost.instances),
        ("volume", &lost.volumes),
        ("snapshot", &lost.snapshots),
        ("uploaded image", &lost.images),
    ];
    let some = all.iter().filter(|(_, names)| !names.is_empty()).map(|(kind, names)| {
        let shown = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if names.len() > NAMED { format!(" and {} more", names.len() - NAMED) } else { String::new() };
        let plural = if names.len() == 1 { "" } else { "s" };
        format!("{} {kind}{plural} ({shown}{more})", names.len())
    });
    some.collect::<Vec<_>>().join(", ")
}

fn merge(into: &mut NodeRemoved, more: NodeRemoved) {
    let lists = [
        (&mut into.instances, more.instances),
        (&mut into.volumes, more.volumes),
        (&mut into.snapshots, more.snapshots),
        (&mut into.images, more.images),
    ];
    for (list, more) in lists {
        list.extend(more);
        list.sort();
        list.dedup();
    }
}

/// What would be lost, by name.
fn lives_there(app: &App, node: &Node) -> Result<NodeRemoved, ApiError> {
    let id = NodeId(node.metadata.id);
    let images: Vec<Image> = on_node::<ImageKind>(app, id)?;
    Ok(NodeRemoved {
        name: node.metadata.name.clone(),
        instances: names(&on_node::<InstanceKind>(app, id)?),
        volumes: names(&on_node::<VolumeKind>(app, id)?),
        snapshots: names(&on_node::<SnapshotKind>(app, id)?),
        images: names(&images.into_iter().filter(|i| is_only_copy(i, id)).collect::<Vec<_>>()),
    })
}

/// Uploaded, and nowhere else: nobody can fetch it again.
fn is_only_copy(image: &Image, node: NodeId) -> bool {
    matches!(image.spec.source, ImageSource::Upload {})
        && image.status.phase == ImagePhase::Ready
        && image.status.nodes.iter().all(|n| *n == node)
}

fn names<K: Kind>(objects: &[Object<K>]) -> Vec<String> {
    let mut names: Vec<String> = objects.iter().map(|o| format!("{}/{}", o.scope_key(), o.metadata.name)).collect();
    names.sort();
    names
}

fn on_node<K: Kind>(app: &App, node: NodeId) -> Result<Vec<Object<K>>, ApiError> {
    let items = app.docs.find(BY_NODE, &format!("{}/{node}", K::KIND));
    // An instance that moves to or from the node is where its placement says.
    let here = |item: &&std::sync::Arc<Item>| {
        K::KIND != InstanceKind::KIND || item.value.object().is_some_and(|doc| doc.node == Some(node.0))
    };
    let objects = items.iter().filter(here).map(|item| crate::docs::object::<K>(item)).collect::<Result<_, _>>();
    objects.map_err(|e| crate::error::store_error(&e))
}

/// An object that the removal has to change.
#[derive(Clone, Debug)]
struct Place {
    kind: &'static str,
    scope: String,
    id: Uuid,
}

/// What is there and does not say yet that it is lost.
fn unmarked(app: &App, node: NodeId) -> Vec<Place> {
    fn places<K: Kind>(app: &App, node: NodeId, marked: impl Fn(&Object<K>) -> bool) -> Vec<Place> {
        let all = on_node::<K>(app, node).unwrap_or_default();
        let open = all.iter().filter(|o| !marked(o));
        open.map(|o| Place { kind: K::KIND, scope: o.scope_key().to_string(), id: o.metadata.id }).collect()
    }
    let mut all = places::<InstanceKind>(app, node, |o| o.status.reason == REASON);
    all.extend(places::<VolumeKind>(app, node, |o| o.status.reason == REASON));
    all.extend(places::<SnapshotKind>(app, node, |o| o.status.phase == SnapshotPhase::Failed));
    all.extend(places::<ImageKind>(app, node, |_| false));
    all
}

async fn mark_all(app: &App, node: &Node) -> Result<(), ApiError> {
    let id = NodeId(node.metadata.id);
    for chunk in unmarked(app, id).chunks(AT_ONCE) {
        transact(app, |draft| {
            for place in chunk {
                mark(draft, node, place)?;
            }
            Ok(())
        })
        .await?;
    }
    Ok(())
}

fn mark(draft: &mut Draft, node: &Node, place: &Place) -> Result<(), ApiError> {
    let (scope, id, on) = (place.scope.as_str(), place.id, NodeId(node.metadata.id));
    let name = &node.metadata.name;
    match place.kind {
        InstanceKind::KIND => ended::<InstanceKind>(draft, scope, id, |o| {
            o.status.phase = Phase::Failed;
            o.status.reason = REASON.into();
            o.status.message =
                format!("node {name}, where it was, was removed from the cloud; delete it and launch another one");
        }),
        VolumeKind::KIND => ended::<VolumeKind>(draft, scope, id, |o| {
            o.status.phase = VolumePhase::Failed;
            o.status.reason = REASON.into();
            o.status.message = format!("node {name}, which had its data, was removed from the cloud");
        }),
        SnapshotKind::KIND => ended::<SnapshotKind>(draft, scope, id, |o| {
            o.status.phase = SnapshotPhase::Failed;
            o.status.message = format!("node {name}, which had its data, was removed from the cloud");
        }),
        _ => image(draft, name, on, scope, id),
    }
}

/// Nobody cleans up for it any more; what was being deleted is gone with the node.
fn ended<K: Resource>(
    draft: &mut Draft,
    scope: &str,
    id: Uuid,
    change: impl FnOnce(&mut Object<K>),
) -> Result<(), ApiError> {
    let Some(mut object) = draft.get::<K>(scope, id)? else { return Ok(()) };
    object.metadata.finalizers.remove(NODE_FINALIZER);
    if object.metadata.is_deleting() && object.metadata.finalizers.is_empty() {
        return K::remove(draft, &object);
    }
    change(&mut object);
    draft.update(&object);
    Ok(())
}

/// Another copy becomes the first one; without one the image is fetched again where that is possible.
fn image(draft: &mut Draft, name: &str, on: NodeId, scope: &str, id: Uuid) -> Result<(), ApiError> {
    let Some(mut image) = draft.get::<ImageKind>(scope, id)? else { return Ok(()) };
    let uploaded = matches!(image.spec.source, ImageSource::Upload {});
    let status = &mut image.status;
    status.nodes.retain(|n| *n != on);
    if status.node == Some(on) {
        status.node = status.nodes.first().copied();
        if status.node.is_none() {
            image.metadata.finalizers.remove(NODE_FINALIZER);
            let had_it = status.phase == ImagePhase::Ready;
            status.phase = if uploaded && had_it { ImagePhase::Failed } else { ImagePhase::Pending };
            status.reason = REASON.into();
            status.message = match (uploaded, had_it) {
                (true, true) => {
                    format!("its content was only on node {name}, which was removed; upload it as a new image")
                }
                (true, false) => format!("node {name}, which took the upload, was removed; send it again"),
                (false, _) => format!("node {name}, which had it, was removed; it is fetched again"),
            };
        }
    }
    if image.metadata.is_deleting() && image.metadata.finalizers.is_empty() {
        return ImageKind::remove(draft, &image);
    }
    draft.update(&image);
    Ok(())
}
