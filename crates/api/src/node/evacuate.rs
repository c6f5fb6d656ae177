//! A person says that a node is lost: its instances with `ha` may be started elsewhere although too many nodes were lost at once.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use oblak_control::lifecycle::event_ops;
use oblak_identity::{Action, Target};
use oblak_model::wire::{EvacuateNode, NewEvent};
use oblak_model::{About, ApiError, Code, Evacuation, Node, NodeId, NodeKind, Severity};
use oblak_store::{Guard, objects};

use crate::auth::Caller;
use crate::commit::transact;
use crate::draft::Draft;
use crate::error::Answer;
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// `POST /v1/nodes/{name}/evacuate`.
pub(crate) async fn evacuate(
    State(app): State<App>,
    caller: Caller,
    Path(name): Path<String>,
    query: Query,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    caller.check(Action::Update, &Target::Operations)?;
    let request: EvacuateNode = if body.is_empty() { EvacuateNode::default() } else { from_json(&body)? };
    drop(body);
    if !request.confirm {
        let text = "must be true: you have made sure that the node is off or can reach neither disks nor networks";
        return Err(ApiError::invalid("/confirm", text).into());
    }
    let source = caller.principal.to_string();
    let (node, _) = transact(&app, |draft| confirm(draft, &name, &source)).await?;
    Ok(Json(node).into_response())
}

fn confirm(draft: &mut Draft, name: &str, source: &str) -> Result<Node, ApiError> {
    let mut node = draft.find::<NodeKind>("_", name)?.ok_or_else(|| ApiError::not_found("node", name))?;
    let lease = objects::lease_key(NodeId(node.metadata.id));
    if node.status.phase.is_up() || draft.raw(&lease).is_some() {
        let text = format!("{} is up; `oblak node drain` moves away what is on it", node.describe());
        return Err(ApiError::new(Code::WrongState, text));
    }
    if node.status.evacuation == Evacuation::Confirmed {
        return Ok(node);
    }
    draft.batch.guard(Guard::Absent(lease));
    node.status.evacuation = Evacuation::Confirmed;
    draft.update(&node);
    let about = About { kind: "node".into(), name: node.metadata.name.clone(), id: node.metadata.id };
    let message = format!("{source} says that it is lost: its instances with ha are started elsewhere");
    let event =
        NewEvent { project: None, about, severity: Severity::Warning, reason: "EvacuationConfirmed".into(), message };
    let event = draft.app.recent().note(draft.app.uuid(), &event, "api", draft.now);
    draft.batch.absorb(event_ops(&event));
    Ok(node)
}
