//! Instances: everything that the spec names is resolved when it is accepted, so that the agent needs nothing but the object.

use std::collections::BTreeMap;
use std::sync::Arc;

use oblak_control::lifecycle::{InstanceParts, finalize_instance, host_port_ops, release_volume, resize};
use oblak_identity::{Action, Principal, Target, authorize};
use oblak_model::{
    ApiError, Code, FlavorKind, Image, ImageContent, ImageKind, ImagePhase, ImageSource, Instance, InstanceId,
    InstanceKind, InstanceSpec, Isolation, KeyKind, NodeKind, Phase, PortKind, Power, Resources, Size, Snapshot,
    SnapshotId, SnapshotKind, SnapshotPhase, UserNamespace, Visibility, Volume, VolumeFormat, VolumeId, VolumeKind,
};
use oblak_store::objects;
use oblak_store::{Guard, MAX_TXN_OPS};

use super::migration;
use super::ports::create_ports;
use super::{Access, Resource, can_clean, needs_node};
use crate::docs::{self, BY_INSTANCE};
use crate::draft::Draft;
use crate::error::store_error;

/// Flavor when the spec names none.
const DEFAULT_FLAVOR: &str = "s";
/// Snapshots that go together with their instance in one commit.
const SNAPSHOTS_WITH_INSTANCE: usize = 30;

impl Resource for InstanceKind {
    const ACCESS: Access = Access::InProject;

    fn create(
        draft: &mut Draft,
        by: &Principal,
        instance: &mut Instance,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        may_use_host_ids(draft, by, instance)?;
        fits_one_commit(&instance.spec)?;
        let image = resolve_image(draft, instance)?;
        instance.status.resolved.isolation = isolation(&instance.spec, &image)?;
        resolve_size(draft, instance, &image)?;
        resolve_keys(draft, instance)?;
        if instance.spec.restore.is_some() {
            return Err(ApiError::invalid(
                "/spec/restore",
                "is for instances that exist; make a new volume from a snapshot instead",
            ));
        }
        if instance.spec.migration.is_some() {
            return Err(ApiError::invalid("/spec/migration", "is for instances that have a node"));
        }
        if !instance.spec.publish.is_empty() && instance.spec.interfaces().is_empty() {
            return Err(ApiError::invalid("/spec/publish", "needs an interface"));
        }
        create_ports(draft, instance)?;
        attach_volumes(draft, None, instance)?;
        super::ha::check(draft, instance)?;
        instance.status.phase = Phase::Pending;
        instance.status.reason = "Accepted".into();
        instance.status.message = "waits for a node".into();
        Ok(None)
    }

    fn update(
        draft: &mut Draft,
        by: &Principal,
        old: &Instance,
        new: &mut Instance,
        _: Option<&str>,
    ) -> Result<(), ApiError> {
        if old.spec.container.userns != new.spec.container.userns {
            may_use_host_ids(draft, by, new)?;
        }
        fits_one_commit(&new.spec)?;
        migration::keep_still(old, new)?;
        if old.spec.migration != new.spec.migration {
            migration::ask(draft, old, new)?;
        }
        if old.spec.power == Power::Stopped && new.spec.power == Power::Paused {
            return Err(ApiError::new(
                Code::WrongState,
                format!("{} is stopped; start it before pausing it", old.describe()),
            ));
        }
        if old.spec.flavor != new.spec.flavor || old.spec.disk != new.spec.disk {
            change_size(draft, old, new)?;
        }
        if old.spec.keys != new.spec.keys {
            resolve_keys(draft, new)?;
        }
        if old.spec.volumes != new.spec.volumes {
            attach_volumes(draft, Some(old), new)?;
        }
        let promise = |s: &InstanceSpec| (s.ha, s.ephemeral, s.volumes.clone(), s.publish.clone());
        if promise(&old.spec) != promise(&new.spec) {
            super::ha::check(draft, new)?;
        }
        if old.spec.publish != new.spec.publish {
            change_publish(draft, old, new)?;
        }
        if old.spec.restore != new.spec.restore {
            resolve_restore(draft, new)?;
        }
        Ok(())
    }

    fn begin_delete(draft: &mut Draft, instance: &mut Instance) -> Result<(), ApiError> {
        instance.status.phase = Phase::Deleting;
        instance.status.reason = "Deleting".into();
        instance.status.message = String::new();
        migration::overtake(draft, instance)?;
        if can_clean(draft, instance.status.placement.as_ref().map(|p| p.node)) {
            needs_node(instance);
        }
        // Snapshots of its disk lie beside the disk and go with it.
        let id = InstanceId(instance.metadata.id);
        let mut snapshots = draft.list::<SnapshotKind>(Some(instance.scope_key()))?;
        snapshots.retain(|s| s.status.instance == Some(id) && !s.metadata.is_deleting());
        if snapshots.len() > SNAPSHOTS_WITH_INSTANCE {
            return Err(super::in_use(
                &instance.describe(),
                &format!("{} snapshots; delete all but {SNAPSHOTS_WITH_INSTANCE} of them first", snapshots.len()),
            ));
        }
        for mut snapshot in snapshots {
            snapshot.metadata.deleted_at = Some(draft.now);
            SnapshotKind::begin_delete(draft, &mut snapshot)?;
            if snapshot.metadata.finalizers.is_empty() {
                SnapshotKind::remove(draft, &snapshot)?;
            } else {
                draft.update(&snapshot);
            }
        }
        Ok(())
    }

    fn remove(draft: &mut Draft, instance: &Instance) -> Result<(), ApiError> {
        let scope = instance.scope_key();
        let owned = |kind: &str| format!("{kind}/{}", instance.metadata.id);
        let id = InstanceId(instance.metadata.id);
        let mut ports = draft.indexed::<PortKind>(BY_INSTANCE, &owned("port"), scope)?;
        ports.retain(|port| port.spec.instance == id);
        let mut volumes = draft.indexed::<VolumeKind>(BY_INSTANCE, &owned("volume"), scope)?;
        volumes.retain(|volume| volume.status.attached_to == Some(id));
        let allocation = match &instance.status.placement {
            Some(placement) => draft.allocation(placement.node)?,
            None => None,
        };
        let parts = InstanceParts { instance, ports: &ports, volumes: &volumes, allocation };
        draft.batch.absorb(finalize_instance(&parts));
        draft.app.usage.forget(instance.metadata.id);
        Ok(())
    }
}

/// Volumes that an instance's spec names, as far as they exist.
pub(crate) fn instance_volumes(draft: &Draft, instance: &Instance) -> Result<Vec<Volume>, ApiError> {
    let ids = &instance.status.resolved.volumes;
    ids.iter().filter_map(|id| draft.get::<VolumeKind>(instance.scope_key(), id.0).transpose()).collect()
}

/// Placing and removing an instance are one commit each, and each thing below costs two or more operations of it.
fn fits_one_commit(spec: &InstanceSpec) -> Result<(), ApiError> {
    let things = spec.publish.len() + spec.volumes.len() + spec.interfaces().len();
    let most = (MAX_TXN_OPS - 8) / 2;
    if things <= most {
        return Ok(());
    }
    Err(ApiError::invalid(
        "/spec/publish",
        format!(
            "an instance may have at most {most} published ports, volumes and interfaces together; this one has {things}"
        ),
    ))
}

fn may_use_host_ids(draft: &Draft, by: &Principal, instance: &Instance) -> Result<(), ApiError> {
    if instance.spec.container.userns != UserNamespace::Host {
        return Ok(());
    }
    let project = instance.scope_key();
    let found = draft.app.granting(project)?;
    let grants = found.as_deref().map(|project| project.spec.grants.as_slice());
    authorize(by, Action::Administer, &Target::InProject { project, grants })
        .map_err(|e| e.at("/spec/container/userns"))
}

/// The project's own image of that name or id, else one that is offered to every project: the oldest, so that nobody can put another one
/// in front of it later.
fn resolve_image(draft: &mut Draft, instance: &mut Instance) -> Result<Arc<Image>, ApiError> {
    let (scope, name) = (instance.scope_key().to_string(), instance.spec.image.clone());
    let mut found = draft.find_shared::<ImageKind>(&scope, &name)?;
    if found.is_none() {
        let mut public = draft.list_shared::<ImageKind>(None)?;
        public.retain(|image| {
            image.spec.visibility == Visibility::Public
                && (image.metadata.name == name || image.metadata.id.to_string() == name)
        });
        found = public.into_iter().min_by_key(|image| (image.metadata.created_at, image.metadata.id));
    }
    let Some(image) = found else {
        return Err(ApiError::invalid(
            "/spec/image",
            format!("image {name:?} does not exist; `oblak image list` shows them"),
        ));
    };
    if image.metadata.is_deleting() {
        return Err(ApiError::invalid("/spec/image", format!("image {name:?} is being deleted")));
    }
    if image.status.phase == ImagePhase::Failed {
        return Err(ApiError::new(
            Code::WrongState,
            format!("image {name:?} cannot be used: {}; change its spec to try again", image.status.message),
        )
        .at("/spec/image"));
    }
    if image.spec.on_demand && !image.status.wanted {
        let mut wanted = Image::clone(&image);
        wanted.status.wanted = true;
        draft.update(&wanted);
    } else {
        draft.depend(&image);
    }
    instance.status.resolved.image = image.metadata.id.into();
    Ok(image)
}

fn content_of(image: &Image) -> Option<ImageContent> {
    image.status.content.or(image.spec.content).or(match image.spec.source {
        ImageSource::Registry { .. } => Some(ImageContent::Oci),
        ImageSource::Url { .. } => Some(ImageContent::Disk),
        ImageSource::Recipe { .. } | ImageSource::Upload {} => None,
    })
}

fn isolation(spec: &InstanceSpec, image: &Image) -> Result<Isolation, ApiError> {
    let content = content_of(image);
    let isolation = spec.isolation.unwrap_or(match content {
        Some(ImageContent::Oci) => Isolation::Container,
        _ => Isolation::Vm,
    });
    let fits = match content {
        None => true,
        Some(ImageContent::Oci) => isolation == Isolation::Container,
        Some(ImageContent::Disk | ImageContent::Kernel) => isolation != Isolation::Container,
    };
    if fits {
        return Ok(isolation);
    }
    let (holds, needs) = if isolation == Isolation::Container {
        ("a disk for machines", "an OCI image")
    } else {
        ("an OCI image for containers", "a disk image")
    };
    Err(ApiError::invalid(
        "/spec/isolation",
        format!("{isolation} needs {needs}, but image {:?} holds {holds}", image.metadata.name),
    ))
}

fn resolve_size(draft: &mut Draft, instance: &mut Instance, image: &Image) -> Result<(), ApiError> {
    if instance.spec.flavor.is_empty() {
        instance.spec.flavor = DEFAULT_FLAVOR.into();
    }
    let flavor = draft.need::<FlavorKind>("_", &instance.spec.flavor.clone(), "/spec/flavor")?;
    instance.spec.flavor.clone_from(&flavor.metadata.name);
    if instance.spec.disk.is_some_and(|disk| disk < flavor.spec.disk) {
        return Err(ApiError::invalid(
            "/spec/disk",
            format!("must be at least {}, the disk of flavor {}", flavor.spec.disk, flavor.metadata.name),
        ));
    }
    let resources = Resources {
        vcpus: flavor.spec.vcpus,
        memory: flavor.spec.memory,
        disk: instance.spec.disk.unwrap_or(flavor.spec.disk),
    };
    if resources.memory < image.spec.min_memory {
        return Err(ApiError::invalid(
            "/spec/flavor",
            format!(
                "has {} of memory; image {} needs {}",
                resources.memory, image.metadata.name, image.spec.min_memory
            ),
        ));
    }
    if image.status.virtual_size > resources.disk && resources.disk > Size::ZERO {
        return Err(ApiError::invalid(
            "/spec/disk",
            format!("must be at least {}, the size of image {}", image.status.virtual_size, image.metadata.name),
        ));
    }
    instance.status.resolved.flavor.clone_from(&flavor.metadata.name);
    instance.status.resolved.resources = resources;
    Ok(())
}

/// A new size needs room on the node that the instance is on; it is reserved in the commit that accepts the change.
fn change_size(draft: &mut Draft, old: &Instance, new: &mut Instance) -> Result<(), ApiError> {
    let image = find_image(draft, new)?;
    resolve_size(draft, new, &image)?;
    let wanted = new.status.resolved.resources;
    if wanted.disk < old.status.resolved.resources.disk {
        return Err(ApiError::invalid(
            "/spec/flavor",
            format!(
                "the root disk cannot shrink from {} to {}; set disk to keep its size",
                old.status.resolved.resources.disk, wanted.disk
            ),
        ));
    }
    let Some(placement) = &old.status.placement else { return Ok(()) };
    let node = draft.get::<NodeKind>("_", placement.node.0)?;
    let (Some(node), Some(allocation)) = (node, draft.allocation(placement.node)?) else {
        return Err(ApiError::new(Code::WrongState, format!("the node of {} is gone", old.describe())));
    };
    let (ops, placement) = resize(placement, wanted, &node, allocation).map_err(|explanation| {
        let mut error = ApiError::new(
            Code::DoesNotFit,
            format!("{} cannot grow on node {}: {explanation}", old.describe(), node.metadata.name),
        )
        .at("/spec/flavor");
        error.explanation = Some(explanation);
        error
    })?;
    draft.batch.absorb(ops);
    new.status.placement = Some(placement);
    Ok(())
}

fn find_image(draft: &Draft, instance: &Instance) -> Result<Arc<Image>, ApiError> {
    let id = instance.status.resolved.image.0;
    if let Some(image) = draft.shared_at::<ImageKind>(&objects::object_key::<ImageKind>(instance.scope_key(), id))? {
        return Ok(image);
    }
    let images = docs::all::<ImageKind>(&draft.app.docs, None);
    let item = images.iter().find(|item| item.value.object().is_some_and(|doc| doc.id == id));
    let item = item.ok_or_else(|| ApiError::new(Code::WrongState, "the image of the instance is gone"))?;
    docs::shared::<ImageKind>(item).map_err(|e| store_error(&e))
}

fn resolve_keys(draft: &mut Draft, instance: &mut Instance) -> Result<(), ApiError> {
    let scope = instance.scope_key().to_string();
    let mut lines = BTreeMap::new();
    for (i, name) in instance.spec.keys.iter().enumerate() {
        let key = draft.need::<KeyKind>(&scope, name, &format!("/spec/keys/{i}"))?;
        lines.insert(key.metadata.name.clone(), key.spec.public_key.trim().to_string());
    }
    instance.status.resolved.public_keys = lines;
    Ok(())
}

fn attach_volumes(draft: &mut Draft, old: Option<&Instance>, new: &mut Instance) -> Result<(), ApiError> {
    let scope = new.scope_key().to_string();
    let id = InstanceId(new.metadata.id);
    let node = new.status.placement.as_ref().map(|p| (p.node, p.node_name.clone()));
    let mut ids = Vec::new();
    for (i, attachment) in new.spec.volumes.iter().enumerate() {
        let field = format!("/spec/volumes/{i}");
        let found = draft.need::<VolumeKind>(&scope, &attachment.volume, &format!("{field}/volume"))?;
        let mut volume = Volume::clone(&found);
        check_volume(draft, new, &volume, attachment.mount.is_some(), &field)?;
        if let Some((node, node_name)) = &node {
            match volume.status.node {
                None => {
                    volume.status.node = Some(*node);
                    needs_node(&mut volume);
                }
                Some(other) if other != *node && !volume.spec.pool.is_empty() => {
                    // In a shared pool: the bytes are there too.
                    volume.status.node = Some(*node);
                    volume.status.epoch += 1;
                }
                Some(other) if other != *node => {
                    let name = draft.get::<NodeKind>("_", other.0)?.map_or(other.to_string(), |n| n.metadata.name);
                    return Err(ApiError::new(
                        Code::DoesNotFit,
                        format!("{} is on node {name}, the instance on {node_name}", volume.describe()),
                    )
                    .at(&format!("{field}/volume")));
                }
                Some(_) => {}
            }
        }
        if volume.status.attached_to != Some(id) {
            volume.status.epoch += 1;
        }
        volume.status.attached_to = Some(id);
        // Written even when nothing in it changes: who detaches it at the same moment has to look again.
        draft.update(&volume);
        ids.push(VolumeId(volume.metadata.id));
    }
    // What is no longer named stays attached until the node says that it is unplugged; without a node it is free at once.
    if node.is_none() {
        for gone in old.iter().flat_map(|o| &o.status.resolved.volumes).filter(|v| !ids.contains(v)) {
            if let Some(mut volume) =
                draft.get::<VolumeKind>(&scope, gone.0)?.filter(|v| v.status.attached_to == Some(id))
            {
                release_volume(&mut volume);
                draft.update(&volume);
            }
        }
    }
    new.status.resolved.volumes = ids;
    Ok(())
}

fn check_volume(
    draft: &Draft,
    instance: &Instance,
    volume: &Volume,
    mounted: bool,
    field: &str,
) -> Result<(), ApiError> {
    let id = InstanceId(instance.metadata.id);
    if let Some(other) = volume.status.attached_to.filter(|other| *other != id) {
        let name = draft
            .get::<InstanceKind>(volume.scope_key(), other.0)?
            .map_or_else(|| other.to_string(), |other| other.metadata.name);
        return Err(ApiError::new(
            Code::InUse,
            format!("{} is attached to instance/{name}; detach it there first", volume.describe()),
        )
        .at(&format!("{field}/volume")));
    }
    let container = instance.status.resolved.isolation == Isolation::Container;
    let directory = volume.spec.format == VolumeFormat::Directory;
    if container != directory {
        let needed = if container {
            "containers take volumes of format directory"
        } else {
            "machines take volumes of format qcow2 or raw"
        };
        return Err(ApiError::invalid(&format!("{field}/volume"), format!("has the wrong format: {needed}")));
    }
    if container && !mounted {
        return Err(ApiError::invalid(&format!("{field}/mount"), "must say where the container sees the volume"));
    }
    Ok(())
}

fn change_publish(draft: &mut Draft, old: &Instance, new: &Instance) -> Result<(), ApiError> {
    let Some(placement) = &old.status.placement else { return Ok(()) };
    let ops = host_port_ops(placement.node, new, &old.spec.publish, &new.spec.publish);
    for guard in &ops.guards {
        if let Guard::Absent(key) = guard
            && let Some((raw, _)) = draft.raw(key)
        {
            let owner: uuid::Uuid = objects::decode_value(key, &raw).map_err(|e| store_error(&e))?;
            // Ports of other projects are named without saying whose they are.
            let name =
                draft.get::<InstanceKind>(new.scope_key(), owner)?.map_or("another instance".into(), |o| o.describe());
            return Err(ApiError::new(
                Code::InUse,
                format!(
                    "host port {} of node {} is published by {name}; choose another",
                    key.last(),
                    placement.node_name
                ),
            )
            .at("/spec/publish"));
        }
    }
    draft.batch.absorb(ops);
    Ok(())
}

fn resolve_restore(draft: &mut Draft, new: &mut Instance) -> Result<(), ApiError> {
    let Some(restore) = new.spec.restore.clone() else {
        new.status.resolved.restore = None;
        return Ok(());
    };
    let snapshot: Arc<Snapshot> =
        draft.need::<SnapshotKind>(new.scope_key(), &restore.snapshot, "/spec/restore/snapshot")?;
    if snapshot.status.instance != Some(InstanceId(new.metadata.id)) {
        return Err(ApiError::invalid("/spec/restore/snapshot", "is not a snapshot of this instance"));
    }
    if snapshot.status.phase != SnapshotPhase::Ready {
        return Err(ApiError::new(Code::WrongState, format!("{} is not ready yet", snapshot.describe()))
            .at("/spec/restore/snapshot"));
    }
    new.status.resolved.restore = Some(SnapshotId(snapshot.metadata.id));
    Ok(())
}
