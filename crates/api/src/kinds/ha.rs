//! What `ha` promises must be possible: another node can open the disks, or they need not survive.

use oblak_model::{ApiError, Code, Instance, Isolation, NodeKind, VolumeKind};
use oblak_store::MAX_TXN_OPS;

use crate::draft::Draft;

/// Refuses an instance whose pool or promise cannot be kept. Isolation and volumes are resolved already.
pub(super) fn check(draft: &Draft, instance: &Instance) -> Result<(), ApiError> {
    let spec = &instance.spec;
    let container = instance.status.resolved.isolation == Isolation::Container;
    if !spec.pool.is_empty() {
        if container {
            let text = "is for machines; the root file system of a container is on its node, declare it ephemeral";
            return Err(ApiError::invalid("/spec/pool", text));
        }
        if spec.ephemeral {
            return Err(ApiError::invalid("/spec/ephemeral", "an ephemeral root disk is on the node, not in a pool"));
        }
        check_pool(draft, &spec.pool, "/spec/pool")?;
    }
    if !spec.ha {
        return Ok(());
    }
    if !matches!(instance.status.resolved.isolation, Isolation::Container | Isolation::Vm) {
        return Err(ApiError::new(
            Code::Unsupported,
            "only containers and virtual machines can be restarted elsewhere",
        )
        .at("/spec/ha"));
    }
    let refuse = |what: &str| {
        let text = format!(
            "no other node could start the instance with its data: {what}. Put the disk into a shared pool, or say that it need not survive the node (ephemeral)"
        );
        ApiError::new(Code::HaNeedsSharedDisks, text).at("/spec/ha")
    };
    if spec.pool.is_empty() && !spec.ephemeral {
        return Err(refuse("its root disk is only on the node where it runs"));
    }
    for id in &instance.status.resolved.volumes {
        let volume = draft.get::<VolumeKind>(instance.scope_key(), id.0)?;
        if let Some(volume) = volume.filter(|volume| volume.spec.pool.is_empty()) {
            return Err(refuse(&format!("{} is only on one node", volume.describe())));
        }
    }
    fits_one_move(instance)
}

/// Pools with a name are those that nodes were given with `--shared-pool`.
pub(super) fn check_pool(draft: &Draft, pool: &str, field: &str) -> Result<(), ApiError> {
    let nodes = draft.list_shared::<NodeKind>(None)?;
    let known = nodes.iter().flat_map(|n| &n.status.facts.pools).any(|p| p.name == pool && p.shared);
    if known {
        return Ok(());
    }
    let text = format!("no node has a shared pool {pool:?}; `oblak up --shared-pool {pool}=DIR` gives a node one");
    Err(ApiError::invalid(field, text))
}

/// Moving frees and takes host ports in one commit with everything else.
fn fits_one_move(instance: &Instance) -> Result<(), ApiError> {
    let spec = &instance.spec;
    let needed = spec.publish.len() * 3 + (spec.volumes.len() + spec.interfaces().len()) * 2 + 12;
    if needed <= MAX_TXN_OPS {
        return Ok(());
    }
    let text = format!(
        "an instance with ha is moved in one commit: three times its published ports and twice its volumes and interfaces may be {} together",
        MAX_TXN_OPS - 12
    );
    Err(ApiError::invalid("/spec/publish", text))
}
