//! Console, exec, screen and ports of an instance.

use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::{Path, State};
use oblak_identity::Action;
use oblak_model::wire::StreamRequest;
use oblak_model::{ApiError, Code, Instance, InstanceId, InstanceKind, NodeId, Phase};
use oblak_platform::frame::MAX_PAYLOAD;

use super::relay::{Mode, relay};
use super::tunnel::not_websocket;
use crate::auth::Caller;
use crate::error::Answer;
use crate::request::Query;
use crate::state::App;

type Upgrade = Result<WebSocketUpgrade, WebSocketUpgradeRejection>;
type Place = Path<(String, String)>;

/// Program and arguments together, in bytes.
const ARGUMENTS: usize = 64 * 1024;

pub(crate) async fn console(
    State(app): State<App>,
    caller: Caller,
    Path(place): Place,
    query: Query,
    upgrade: Upgrade,
) -> Answer {
    query.only(&[])?;
    let (instance, node) = running(&app, &caller, &place, Action::Use)?;
    let request = StreamRequest::Console { instance: InstanceId(instance.metadata.id) };
    open(app, &caller, node, request, Mode::Frames, upgrade).await
}

pub(crate) async fn exec(
    State(app): State<App>,
    caller: Caller,
    Path(place): Place,
    query: Query,
    upgrade: Upgrade,
) -> Answer {
    query.only(&["argv", "env", "tty", "cols", "rows", "user", "cwd"])?;
    let (instance, node) = running(&app, &caller, &place, Action::Use)?;
    let list = |name| query.all(name).map(String::from).collect::<Vec<_>>();
    let (argv, env) = (list("argv"), list("env"));
    if argv.first().is_none_or(String::is_empty) {
        return Err(ApiError::new(
            Code::Malformed,
            "exec needs argv=<program>, then argv=<argument> for each argument",
        )
        .into());
    }
    if argv.iter().chain(&env).map(String::len).sum::<usize>() > ARGUMENTS {
        return Err(ApiError::new(
            Code::TooLarge,
            format!("program, arguments and environment exceed {ARGUMENTS} bytes"),
        )
        .into());
    }
    if argv.iter().chain(&env).any(|text| text.contains('\0')) {
        return Err(ApiError::new(Code::Malformed, "arguments and environment cannot contain NUL").into());
    }
    let size = |name, default| query.parsed::<u16>(name, "a number up to 65535").map(|n| n.unwrap_or(default));
    let tty = if query.flag("tty")? { Some((size("cols", 80)?, size("rows", 24)?)) } else { None };
    let text = |name| query.get(name).map(|t| t.unwrap_or_default().to_string());
    let request = StreamRequest::Exec {
        instance: InstanceId(instance.metadata.id),
        argv,
        env,
        cwd: text("cwd")?,
        user: text("user")?,
        tty,
    };
    open(app, &caller, node, request, Mode::Frames, upgrade).await
}

pub(crate) async fn vnc(
    State(app): State<App>,
    caller: Caller,
    Path(place): Place,
    query: Query,
    upgrade: Upgrade,
) -> Answer {
    query.only(&[])?;
    let (instance, node) = running(&app, &caller, &place, Action::Use)?;
    let request = StreamRequest::Vnc { instance: InstanceId(instance.metadata.id) };
    open(app, &caller, node, request, Mode::Raw, upgrade).await
}

pub(crate) async fn forward(
    State(app): State<App>,
    caller: Caller,
    Path(place): Place,
    query: Query,
    upgrade: Upgrade,
) -> Answer {
    query.only(&["port"])?;
    let (instance, node) = running(&app, &caller, &place, Action::Use)?;
    let port = query.parsed::<u16>("port", "a TCP port")?.filter(|port| *port != 0);
    let port = port.ok_or_else(|| ApiError::new(Code::Malformed, "forward needs port=<1 to 65535>"))?;
    let request = StreamRequest::Forward { instance: InstanceId(instance.metadata.id), port };
    open(app, &caller, node, request, Mode::Raw, upgrade).await
}

async fn open(app: App, caller: &Caller, node: NodeId, request: StreamRequest, mode: Mode, upgrade: Upgrade) -> Answer {
    let upgrade = upgrade.map_err(|e| not_websocket(&e.to_string()))?;
    let permit = app.streams.enter(&caller.principal.key())?;
    // The agent is asked before the connection changes its protocol, so that a refusal is an ordinary answer.
    let stream = app.tunnels.open(node, &request).await?;
    let limit = MAX_PAYLOAD + 1;
    let upgrade = upgrade.max_message_size(limit).max_frame_size(limit).write_buffer_size(0);
    Ok(upgrade.on_upgrade(move |socket| async move {
        let stopping = app.stopping.clone();
        tokio::select! {
            biased;
            () = stopping.cancelled() => {}
            () = relay(socket, stream, mode, app.config.limits.stream_idle) => {}
        }
        drop(permit);
    }))
}

/// The instance, and the node that has it.
pub(super) fn placed(
    app: &App,
    caller: &Caller,
    (project, name): &(String, String),
    action: Action,
) -> Result<(Instance, NodeId), ApiError> {
    caller.in_project(app, action, project)?;
    let instance = app.find::<InstanceKind>(project, name)?.ok_or_else(|| ApiError::not_found("instance", name))?;
    match &instance.status.placement {
        Some(placement) => {
            let node = placement.node;
            Ok((instance, node))
        }
        None => Err(ApiError::new(
            Code::WrongState,
            format!(
                "{} is {} and on no node yet; `oblak explain {}` says why",
                instance.describe(),
                instance.status.phase,
                instance.describe()
            ),
        )),
    }
}

fn running(
    app: &App,
    caller: &Caller,
    place: &(String, String),
    action: Action,
) -> Result<(Instance, NodeId), ApiError> {
    let (instance, node) = placed(app, caller, place, action)?;
    match instance.status.phase {
        Phase::Stopped | Phase::Failed | Phase::Pending | Phase::Scheduled => Err(ApiError::new(
            Code::WrongState,
            format!("{} is {}; it must be running", instance.describe(), instance.status.phase),
        )),
        _ => Ok((instance, node)),
    }
}
