//! One item of a report: checked against what is in the store, then written into the status of its object.

use oblak_control::lifecycle::release_volume;
use oblak_model::wire::{NODE_FINALIZER, ReportItem};
use oblak_model::{
    ApiError, ImageKind, ImagePhase, Instance, InstanceId, InstanceKind, NodeId, Object, Phase, PortKind, SnapshotKind,
    SnapshotPhase, Volume, VolumeId, VolumeKind, VolumePhase,
};
use oblak_store::{Guard, objects};
use uuid::Uuid;

use crate::docs::{BY_NODE, is_kept_everywhere};
use crate::draft::Draft;
use crate::kinds::Resource;

/// Longest reason and message that a status keeps, in bytes.
const TEXT: usize = 2048;

/// What a refusal says; `None` when the item was taken.
type Refusal = Option<String>;

const GONE: &str = "gone";
const ELSEWHERE: &str = "not on this node";

fn refuse(why: &str) -> Result<Refusal, ApiError> {
    Ok(Some(why.to_string()))
}

/// Names come from agents and become parts of keys.
fn is_scope(project: &str) -> bool {
    oblak_model::name::problem(project).is_none()
}

/// Adds one item to the change.
pub(super) fn apply(draft: &mut Draft, node: NodeId, item: &ReportItem) -> Result<Refusal, ApiError> {
    let (ReportItem::Instance { project, .. }
    | ReportItem::Volume { project, .. }
    | ReportItem::Image { project, .. }
    | ReportItem::ImageCopy { project, .. }
    | ReportItem::Snapshot { project, .. }
    | ReportItem::Migration { project, .. }
    | ReportItem::Released { project, .. }) = item
    else {
        let ReportItem::Left { id, placement } = item else { return Ok(None) };
        return left(draft, node, *id, *placement);
    };
    if !is_scope(project) {
        return refuse(GONE);
    }
    match item {
        ReportItem::Instance { project, id, .. } => instance(draft, node, project, *id, item),
        ReportItem::Volume { project, id, .. } => volume(draft, node, project, *id, item),
        ReportItem::Image { .. } => image(draft, node, item),
        ReportItem::ImageCopy { project, id, digest, present } => copy(draft, node, project, id.0, digest, *present),
        ReportItem::Snapshot { .. } => snapshot(draft, node, item),
        ReportItem::Migration { project, id, generation, step } => {
            super::migration::apply(draft, node, project, *id, *generation, step)
        }
        ReportItem::Left { .. } => Ok(None),
        ReportItem::Released { object_kind, project, id } => match object_kind.as_str() {
            "instance" => released::<InstanceKind>(draft, node, project, *id),
            "volume" => released::<VolumeKind>(draft, node, project, *id),
            "image" => image_released(draft, node, project, *id),
            "snapshot" => released::<SnapshotKind>(draft, node, project, *id),
            _ => refuse("objects of this kind are not on nodes"),
        },
    }
}

/// Whether an object is on the node.
pub(super) fn concerns(draft: &Draft, node: NodeId, kind: &str, project: &str, id: Uuid) -> Result<bool, ApiError> {
    if !is_scope(project) {
        return Ok(false);
    }
    Ok(match kind {
        "instance" => draft.get::<InstanceKind>(project, id)?.is_some_and(|o| InstanceKind::is_on(&o, node)),
        "volume" => draft.get::<VolumeKind>(project, id)?.is_some_and(|o| VolumeKind::is_on(&o, node)),
        "image" => draft.get::<ImageKind>(project, id)?.is_some_and(|o| ImageKind::is_on(&o, node)),
        "snapshot" => draft.get::<SnapshotKind>(project, id)?.is_some_and(|o| SnapshotKind::is_on(&o, node)),
        "port" => draft.get::<PortKind>(project, id)?.is_some_and(|o| o.status.node == Some(node)),
        _ => false,
    })
}

/// Kinds of which a node has something.
trait OnNode: Resource {
    fn is_on(object: &Object<Self>, node: NodeId) -> bool;
}

impl OnNode for InstanceKind {
    fn is_on(object: &Object<Self>, node: NodeId) -> bool {
        object.status.placement.as_ref().is_some_and(|p| p.node == node)
    }
}
impl OnNode for VolumeKind {
    fn is_on(object: &Object<Self>, node: NodeId) -> bool {
        object.status.node == Some(node)
    }
}
impl OnNode for ImageKind {
    fn is_on(object: &Object<Self>, node: NodeId) -> bool {
        object.status.node == Some(node) || object.status.nodes.contains(&node)
    }
}
impl OnNode for SnapshotKind {
    fn is_on(object: &Object<Self>, node: NodeId) -> bool {
        object.status.node == Some(node)
    }
}

fn cut(text: &str) -> String {
    let end = (0..=TEXT.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text[..end].to_string()
}

/// Writes the new status unless nothing changed: a repeated report costs no commit.
fn settle<K: Resource>(draft: &mut Draft, old: &Object<K>, new: &Object<K>) -> Result<Refusal, ApiError> {
    if old != new {
        draft.update(new);
    }
    Ok(None)
}

fn instance(
    draft: &mut Draft,
    node: NodeId,
    project: &str,
    id: InstanceId,
    item: &ReportItem,
) -> Result<Refusal, ApiError> {
    let ReportItem::Instance { phase, reason, message, observed, conditions, .. } = item else { return Ok(None) };
    let Some(old) = draft.get::<InstanceKind>(project, id.0)? else { return refuse(GONE) };
    if !InstanceKind::is_on(&old, node) {
        return refuse(ELSEWHERE);
    }
    let placement = old.status.placement.as_ref().map_or(0, |p| p.generation);
    // An agent that says nothing of placements cannot be about an older one: it does not move instances.
    if observed.placement != 0 && observed.placement != placement {
        return refuse("about an older placement");
    }
    let mut new = old.clone();
    // While it is being deleted the phase stays that; the message may say how far it is.
    new.status.phase = if old.metadata.is_deleting() { Phase::Deleting } else { *phase };
    new.status.reason = if old.metadata.is_deleting() { "Deleting".into() } else { cut(reason) };
    new.status.message = cut(message);
    new.status.observed = (**observed).clone();
    new.status.observed.placement = placement;
    new.status.conditions = conditions.iter().take(32).cloned().collect();
    settle(draft, &old, &new)
}

/// Nothing is left on the node of an instance that was moved away: it has been cleaned of this one.
fn left(draft: &mut Draft, node: NodeId, id: InstanceId, placement: u64) -> Result<Refusal, ApiError> {
    let key = objects::superseded_key(node, id);
    let Some((was, revision)) = draft.value::<objects::Superseded>(&key)? else { return Ok(None) };
    if was.placement > placement {
        return refuse("it was moved away again since");
    }
    if let Some(revision) = revision {
        draft.batch.guard(Guard::Revision(key.clone(), revision));
    }
    draft.delete(key);
    Ok(None)
}

fn volume(
    draft: &mut Draft,
    node: NodeId,
    project: &str,
    id: VolumeId,
    item: &ReportItem,
) -> Result<Refusal, ApiError> {
    let ReportItem::Volume { phase, reason, message, size, used, generation, plugged, .. } = item else {
        return Ok(None);
    };
    let Some(old) = draft.get::<VolumeKind>(project, id.0)? else { return refuse(GONE) };
    if !VolumeKind::is_on(&old, node) {
        return refuse(ELSEWHERE);
    }
    let mut new = old.clone();
    new.status.reason = cut(reason);
    new.status.message = cut(message);
    new.status.size = *size;
    new.status.used = *used;
    new.status.observed_generation = *generation;
    if !*plugged {
        detach(draft, &mut new, project)?;
    }
    let healthy = matches!(phase, VolumePhase::Available | VolumePhase::InUse);
    new.status.phase = match phase {
        _ if old.metadata.is_deleting() => old.status.phase,
        _ if healthy && *plugged && new.status.attached_to.is_some() => VolumePhase::InUse,
        _ if healthy => VolumePhase::Available,
        other => *other,
    };
    settle(draft, &old, &new)
}

/// Unplugged, and no longer asked for: the attachment ends. The instance is guarded, so that it cannot be attached again at this moment.
fn detach(draft: &mut Draft, volume: &mut Volume, project: &str) -> Result<(), ApiError> {
    let Some(holder) = volume.status.attached_to else { return Ok(()) };
    let instance: Option<Instance> = draft.get::<InstanceKind>(project, holder.0)?;
    let id = VolumeId(volume.metadata.id);
    match &instance {
        Some(instance) if instance.status.resolved.volumes.contains(&id) => return Ok(()),
        Some(instance) => draft.depend(instance),
        None => draft.batch.guard(Guard::Absent(objects::object_key::<InstanceKind>(project, holder.0))),
    }
    release_volume(volume);
    Ok(())
}

fn image(draft: &mut Draft, node: NodeId, item: &ReportItem) -> Result<Refusal, ApiError> {
    let ReportItem::Image {
        project,
        id,
        phase,
        reason,
        message,
        progress,
        digest,
        size,
        virtual_size,
        content,
        generation,
        properties,
    } = item
    else {
        return Ok(None);
    };
    let Some(old) = draft.get::<ImageKind>(project, id.0)? else { return refuse(GONE) };
    if old.status.node != Some(node) {
        return refuse(ELSEWHERE);
    }
    let mut new = old.clone();
    let status = &mut new.status;
    if *phase == ImagePhase::Ready && !status.nodes.contains(&node) {
        status.nodes.push(node);
    }
    status.phase = *phase;
    status.reason = cut(reason);
    status.message = cut(message);
    status.progress = (*progress).min(100);
    status.digest.clone_from(digest);
    status.size = *size;
    status.virtual_size = *virtual_size;
    status.content = *content;
    status.observed_generation = *generation;
    status.properties = properties.iter().take(64).map(|(k, v)| (cut(k), cut(v))).collect();
    settle(draft, &old, &new)
}

/// A node has copied an image that its instances use, or dropped a copy of other content.
fn copy(
    draft: &mut Draft,
    node: NodeId,
    project: &str,
    id: Uuid,
    digest: &str,
    present: bool,
) -> Result<Refusal, ApiError> {
    let Some(old) = draft.get::<ImageKind>(project, id)? else { return refuse(GONE) };
    if old.status.node == Some(node) {
        return refuse("this node has imported it; its copy is the first one");
    }
    let mut new = old.clone();
    if present {
        if old.status.digest.as_deref() != Some(digest) {
            return refuse("the copy has other content than the image");
        }
        if !ImageKind::is_on(&old, node) {
            if !uses(draft, node, id) && !is_kept_everywhere(&draft.app.docs, id) {
                return refuse(ELSEWHERE);
            }
            new.status.nodes.push(node);
        }
    } else {
        new.status.nodes.retain(|n| *n != node);
    }
    settle(draft, &old, &new)
}

/// Whether an instance on the node runs from the image.
pub(crate) fn uses(draft: &Draft, node: NodeId, image: Uuid) -> bool {
    draft.app.docs.view(|view| {
        view.find(BY_NODE, &format!("instance/{node}"))
            .any(|item| item.value.object().and_then(|doc| doc.image) == Some(image))
    })
}

/// As [`released`], but an image goes only when no node has a copy any more.
fn image_released(draft: &mut Draft, node: NodeId, project: &str, id: Uuid) -> Result<Refusal, ApiError> {
    let Some(old) = draft.get::<ImageKind>(project, id)? else { return Ok(None) };
    let others = old.status.nodes.iter().any(|n| *n != node);
    if !others || !ImageKind::is_on(&old, node) || !old.metadata.is_deleting() {
        return released::<ImageKind>(draft, node, project, id);
    }
    let mut new = old.clone();
    new.status.nodes.retain(|n| *n != node);
    if new.status.node == Some(node) {
        // Whoever still has a copy is asked last.
        new.status.node = new.status.nodes.first().copied();
    }
    settle(draft, &old, &new)
}

fn snapshot(draft: &mut Draft, node: NodeId, item: &ReportItem) -> Result<Refusal, ApiError> {
    let ReportItem::Snapshot { project, id, phase, message, size, has_memory } = item else { return Ok(None) };
    let Some(old) = draft.get::<SnapshotKind>(project, id.0)? else { return refuse(GONE) };
    if !SnapshotKind::is_on(&old, node) {
        return refuse(ELSEWHERE);
    }
    let mut new = old.clone();
    new.status.phase = if old.metadata.is_deleting() { SnapshotPhase::Deleting } else { *phase };
    new.status.message = cut(message);
    new.status.size = *size;
    new.status.has_memory = *has_memory;
    settle(draft, &old, &new)
}

/// Nothing is left on the node: without other finalizers the object goes, with everything that was taken for it.
fn released<K: OnNode>(draft: &mut Draft, node: NodeId, project: &str, id: Uuid) -> Result<Refusal, ApiError> {
    // Gone already: the report was sent twice.
    let Some(mut object) = draft.get::<K>(project, id)? else { return Ok(None) };
    if !K::is_on(&object, node) {
        return refuse(ELSEWHERE);
    }
    if !object.metadata.is_deleting() {
        return refuse("it is not being deleted");
    }
    object.metadata.finalizers.remove(NODE_FINALIZER);
    if object.metadata.finalizers.is_empty() {
        K::remove(draft, &object)?;
    } else {
        draft.update(&object);
    }
    Ok(None)
}
