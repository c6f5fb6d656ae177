//! Nodes, as operators see them. Agents use the paths of `crate::node`.

use oblak_identity::Principal;
use oblak_model::{ApiError, InstanceKind, Node, NodeId, NodeKind, SnapshotKind, VolumeKind};
use oblak_store::objects::{self, Allocation};

use super::{Access, Resource, in_use, not_creatable};
use crate::draft::Draft;
use crate::state::App;

impl Resource for NodeKind {
    const ACCESS: Access = Access::Operations;
    const NAMED_BY_OTHERS: bool = true;
    const DECORATED: bool = true;

    fn create(_: &mut Draft, _: &Principal, _: &mut Node, _: Option<&str>) -> Result<Option<String>, ApiError> {
        Err(not_creatable("node", "run `oblak join` on the machine with a token of `oblak join-token create`"))
    }

    fn may_delete(draft: &Draft, node: &Node) -> Result<(), ApiError> {
        let id = NodeId(node.metadata.id);
        let placed = draft.list::<InstanceKind>(None)?;
        if let Some(i) = placed.iter().find(|i| i.status.placement.as_ref().is_some_and(|p| p.node == id)) {
            return Err(in_use(&node.describe(), &format!("{} of project {}", i.describe(), i.scope_key())));
        }
        if let Some(v) = draft.list::<VolumeKind>(None)?.iter().find(|v| v.status.node == Some(id)) {
            return Err(in_use(&node.describe(), &format!("{} of project {}", v.describe(), v.scope_key())));
        }
        match draft.list::<SnapshotKind>(None)?.iter().find(|s| s.status.node == Some(id)) {
            Some(s) => Err(in_use(&node.describe(), &format!("{} of project {}", s.describe(), s.scope_key()))),
            None => Ok(()),
        }
    }

    fn remove(draft: &mut Draft, node: &Node) -> Result<(), ApiError> {
        let id = NodeId(node.metadata.id);
        draft.delete(objects::allocation_key(id));
        draft.delete(objects::lease_key(id));
        draft.delete(objects::secret_key("node-lease", &id.to_string()));
        // Its certificate stays valid until it ends; this shuts it out.
        draft.put(crate::node::removed_key(id), &draft.now.to_string());
        draft.delete(crate::node::key_key(id));
        draft.remove(node);
        Ok(())
    }

    /// What is given to instances is kept beside the node, where the scheduler guards it.
    fn decorate(app: &App, node: &mut Node) {
        let key = objects::allocation_key(NodeId(node.metadata.id));
        let allocation = app.docs.get(&key).and_then(|item| objects::decode_value::<Allocation>(&key, &item.raw).ok());
        let allocation = allocation.unwrap_or_default();
        node.status.allocated = allocation.resources;
        node.status.instances = allocation.instances;
    }
}
