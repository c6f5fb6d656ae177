//! What agents report: many items, few commits.

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use oblak_control::lifecycle::event_ops;
use oblak_model::wire::{NewEvent, REPORT_LIMIT, Report, ReportAnswer, ReportItem, STALE_EPOCH};
use oblak_model::{ApiError, Code, NodeId};
use oblak_store::{MAX_TXN_BYTES, MAX_TXN_OPS};

use super::{FromAgent, epoch, registered, status};
use crate::commit::transact;
use crate::draft::Draft;
use crate::error::Answer;
use crate::state::App;

/// Bytes planned for one commit, with room for what a single item may add.
const CHUNK_BYTES: usize = MAX_TXN_BYTES / 2;
/// Bytes that one object may take; specs are bounded by the body limit and user data.
const ITEM_BYTES: usize = 96 * 1024;

pub(crate) async fn report(State(app): State<App>, FromAgent { node, said: report }: FromAgent<Report>) -> Answer {
    if report.items.len() > REPORT_LIMIT || report.events.len() > REPORT_LIMIT {
        return Err(ApiError::new(
            Code::TooLarge,
            format!("a report holds at most {REPORT_LIMIT} items and as many events; send several"),
        )
        .into());
    }
    // The agent may have learned of its instances from another server that is ahead of this one.
    let newest = app.store.revision().await?;
    app.caught_up(newest).await?;
    let current = registered(&app, node)?;
    // Without a lease nobody is believed: control has called the guests unknown, and a report that says otherwise would make them
    // change for ever. The agent keeps its reports until it has registered again.
    if epoch(&app, node)?.is_none_or(|live| report.epoch < live) {
        let refused = (0..report.items.len()).map(|i| (i, STALE_EPOCH.to_string())).collect();
        return Ok(Json(ReportAnswer { refused }).into_response());
    }
    let source = format!("agent/{}", current.metadata.name);
    let mut refused = Vec::new();
    let mut rest: &[ReportItem] = &report.items;
    let mut events: &[NewEvent] = &report.events;
    let mut first = 0;
    while !rest.is_empty() || !events.is_empty() {
        let ((taken, taken_events, not), _) =
            transact(&app, |draft| chunk(draft, node, rest, events, first, &source)).await?;
        refused.extend(not);
        rest = &rest[taken..];
        events = &events[taken_events..];
        first += taken;
    }
    Ok(Json(ReportAnswer { refused }).into_response())
}

type Chunk = (usize, usize, Vec<(usize, String)>);

/// As many items as fit into one commit, then events.
fn chunk(
    draft: &mut Draft,
    node: NodeId,
    items: &[ReportItem],
    events: &[NewEvent],
    first: usize,
    source: &str,
) -> Result<Chunk, ApiError> {
    let mut refused = Vec::new();
    let mut taken = 0;
    for item in items {
        let before = draft.batch.clone();
        if let Some(why) = status::apply(draft, node, item)? {
            draft.batch = before;
            refused.push((first + taken, why));
        } else if taken > 0 && is_full(draft) {
            // This one did not fit any more; it is the first of the next commit.
            draft.batch = before;
            return Ok((taken, 0, refused));
        }
        taken += 1;
    }
    let mut taken_events = 0;
    for event in events {
        if draft.batch.ops() + 1 > MAX_TXN_OPS || draft.batch.bytes() > CHUNK_BYTES {
            break;
        }
        taken_events += 1;
        if !may_say(draft, node, event)? {
            tracing::warn!(%node, about = %event.about.id, "an event about an object that is not on the node was dropped");
            continue;
        }
        let event = draft.app.recent().note(draft.app.uuid(), event, source, draft.now);
        draft.batch.absorb(event_ops(&event));
    }
    Ok((taken, taken_events, refused))
}

fn is_full(draft: &Draft) -> bool {
    draft.batch.ops() > MAX_TXN_OPS || draft.batch.bytes() > MAX_TXN_BYTES - ITEM_BYTES
}

/// Agents speak about what is on their node, and about the node itself.
fn may_say(draft: &Draft, node: NodeId, event: &NewEvent) -> Result<bool, ApiError> {
    let about = &event.about;
    match &event.project {
        None => Ok(about.kind == "node" && about.id == node.0),
        Some(project) => status::concerns(draft, node, &about.kind, project, about.id),
    }
}
