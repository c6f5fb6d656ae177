//! `node ...`

use oblak_model::wire::{EvacuateNode, NodeRemoved, RemoveNode};
use oblak_model::{Node, NodeKind};
use serde_json::json;

use super::object::{AT_ONCE, delete_all};
use super::{each, list, object, patch_spec};
use crate::args::{NodeCommand, NodeEvacuateArgs, NodeRemoveArgs, ObjectArgs};
use crate::error::Result;
use crate::session::Session;

/// `node ...`
pub async fn run(session: &Session, command: NodeCommand) -> Result<()> {
    match command {
        NodeCommand::List(args) => {
            let nodes = session.list::<NodeKind>(args.label.as_ref()).await?;
            list::print(session, &nodes).await?;
            for node in &nodes.items {
                for notice in &node.status.facts.notices {
                    session.out.note(&format!("note: {}: {notice}", node.metadata.name));
                }
            }
            Ok(())
        }
        NodeCommand::Get(args) => object::some::<NodeKind>(session, &args.names).await,
        NodeCommand::Cordon(args) => schedulable(session, &args.names, false).await,
        NodeCommand::Uncordon(args) => schedulable(session, &args.names, true).await,
        NodeCommand::Show(args) => {
            let object = ObjectArgs { what: format!("node/{}", args.name), name: None };
            super::describe::describe(session, &object).await
        }
        NodeCommand::Drain(args) => Box::pin(super::migrate::drain(session, &args)).await,
        NodeCommand::Remove(args) => remove(session, &args).await,
        NodeCommand::Evacuate(args) => evacuate(session, &args).await,
        NodeCommand::Delete(args) => delete_all::<NodeKind>(session, &args.names, AT_ONCE).await,
    }
}

async fn schedulable(session: &Session, names: &[String], on: bool) -> Result<()> {
    each(session, names, |name| async move {
        let node = patch_spec::<NodeKind>(session, &name, json!({"schedulable": on})).await?;
        let text = if on { "takes new instances again" } else { "takes no new instances; those there go on" };
        session.out.done(&node, &format!("{} {text}", node.describe()))
    })
    .await
}

async fn evacuate(session: &Session, args: &NodeEvacuateArgs) -> Result<()> {
    let path = format!("/v1/nodes/{}/evacuate", list::encode(&args.name));
    let node: Node = session.client.post_json(&path, &EvacuateNode { confirm: args.confirm }).await?;
    session.out.done(&node, &format!("{} is given up: its instances with ha are started elsewhere", node.describe()))
}

async fn remove(session: &Session, args: &NodeRemoveArgs) -> Result<()> {
    let path = format!("/v1/nodes/{}/remove", list::encode(&args.name));
    let removed: NodeRemoved = session.client.post_json(&path, &RemoveNode { force: args.force }).await?;
    if session.out.machine() {
        return session.out.value(&removed);
    }
    session.out.note(&format!("node/{} was removed; its certificate opens nothing any more", removed.name));
    let lost = [
        ("instance", &removed.instances),
        ("volume", &removed.volumes),
        ("snapshot", &removed.snapshots),
        ("image", &removed.images),
    ];
    for (kind, names) in lost {
        for name in names {
            session.out.data(&format!("lost {kind} {name}\n"))?;
        }
    }
    if !removed.instances.is_empty() {
        session.out.note("guests there run on without the cloud until somebody stops them: `oblak down --stop-guests` on that machine");
    }
    Ok(())
}
