//! Why an instance is where it is, and what it uses.

use axum::Json;
use axum::extract::{Path, State};
use axum::response::IntoResponse;
use oblak_control::lifecycle::{DEFAULT_STRATEGY, build_world, explanation, request};
use oblak_identity::Action;
use oblak_model::wire::Explain;
use oblak_model::{ApiError, Code, ImageKind, ImagePhase, Instance, InstanceKind, NodeKind, Phase, VolumeKind};
use oblak_scheduler as scheduler;

use crate::auth::Caller;
use crate::draft::Draft;
use crate::error::Answer;
use crate::kinds::instance_volumes;
use crate::request::Query;
use crate::state::App;

pub(crate) async fn explain(
    State(app): State<App>,
    caller: Caller,
    Path((project, name)): Path<(String, String)>,
    query: Query,
) -> Answer {
    query.only(&[])?;
    caller.in_project(&app, Action::Read, &project)?;
    let instance = app.find::<InstanceKind>(&project, &name)?.ok_or_else(|| ApiError::not_found("instance", &name))?;
    let status = &instance.status;
    let answer = match &status.placement {
        Some(placement) => {
            let mut text =
                format!("{} is {} on {}: {}.", instance.describe(), status.phase, placement.node_name, placement.why);
            text.push_str(&detail(&instance));
            Explain { text, phase: status.phase, node: Some(placement.node_name.clone()), explanation: None }
        }
        None => unplaced(&app, &instance)?,
    };
    Ok(Json(answer).into_response())
}

/// Reason and message, where they say more than the phase.
fn detail(instance: &Instance) -> String {
    let status = &instance.status;
    match (status.reason.as_str(), status.message.as_str()) {
        ("" | "Scheduled", _) | (_, "") => String::new(),
        (reason, message) => format!(" {reason}: {message}"),
    }
}

fn unplaced(app: &App, instance: &Instance) -> Result<Explain, ApiError> {
    let draft = Draft::new(app);
    let world = world(&draft)?;
    let request = request(instance, &instance_volumes(&draft, instance)?, DEFAULT_STRATEGY);
    let why = explanation(&scheduler::explain(&world, &request));
    let image = app.all::<ImageKind>(None)?.into_iter().find(|i| i.metadata.id == instance.status.resolved.image.0);
    let text = match image {
        Some(image) if image.status.phase == ImagePhase::Failed => {
            format!(
                "{} waits for image {}, which failed: {}",
                instance.describe(),
                image.metadata.name,
                image.status.message
            )
        }
        _ if instance.status.phase == Phase::Deleting => format!("{} is being deleted.", instance.describe()),
        // The scheduler knows nothing of host ports: what was said when it was tried last tells more.
        _ if why.fitting > 0 && instance.status.reason == "DoesNotFit" => instance.status.message.clone(),
        _ if why.fitting > 0 => format!("{} waits to be placed: {why}.", instance.describe()),
        _ => why.to_string(),
    };
    Ok(Explain { text, phase: instance.status.phase, node: None, explanation: Some(why) })
}

/// The scheduler's world as a change sees it.
pub(crate) fn world(draft: &Draft) -> Result<scheduler::World, ApiError> {
    let nodes = draft.list::<NodeKind>(None)?;
    let instances = draft.list::<InstanceKind>(None)?;
    let volumes = draft.list::<VolumeKind>(None)?;
    let images = draft.list::<ImageKind>(None)?;
    Ok(build_world(&nodes, &instances, &volumes, &images))
}

/// `GET .../instances/{name}/usage`: the newest sample, or with `all=true` a list of those that are kept.
pub(crate) async fn usage(
    State(app): State<App>,
    caller: Caller,
    Path((project, name)): Path<(String, String)>,
    query: Query,
) -> Answer {
    query.only(&["all"])?;
    caller.in_project(&app, Action::Read, &project)?;
    let instance = app.find::<InstanceKind>(&project, &name)?.ok_or_else(|| ApiError::not_found("instance", &name))?;
    let id = instance.metadata.id;
    if query.flag("all")? {
        return Ok(Json(serde_json::json!({"items": app.usage.all(id)})).into_response());
    }
    let missing = || {
        ApiError::new(
            Code::NotFound,
            format!("there are no samples of {} yet; it must run for a moment", instance.describe()),
        )
    };
    Ok(Json(app.usage.latest(id).ok_or_else(missing)?).into_response())
}
