//! A machine becomes a server: one join token, one commit, one place among the members, and the keys.
//!
//! ```text
//!   token known, of role server, not used by another ──► commit: token used, name and key noted ──► place in etcd ──► keys handed over
//! ```
//! The machine repeats all of it with the same key until it has the answer; each step finds what it did before. A place that nobody takes is
//! removed by the servers after a while.

use axum::extract::{Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use axum::{Extension, Json};
use oblak_control::lifecycle::event_ops;
use oblak_identity::members::Keys;
use oblak_identity::{Action, Target, tokens};
use oblak_model::members::{
    InspectJoinToken, JoinServer, JoinTokenFor, MemberRole, ServerAdmitted, ServerRemoved, StoreMember,
};
use oblak_model::wire::NewEvent;
use oblak_model::{About, ApiError, Code, JoinRole, JoinToken, JoinTokenId, Severity, Timestamp};
use oblak_store::{Key, Prefix, objects};
use serde::{Deserialize, Serialize};

use super::Cluster;
use crate::auth::{Caller, PeerAddress};
use crate::commit::transact;
use crate::draft::Draft;
use crate::error::{Answer, store_error};
use crate::node::{not_expired, token_of, used};
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// Fewer characters are no secret.
const LEAST_KEY: usize = 32;

/// Who was let in.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Admission {
    /// Digest of the machine's own secret.
    key: String,
    peer_url: String,
    token: JoinTokenId,
    at: Timestamp,
}

fn admission_key(name: &str) -> Key {
    objects::secret_key("server-admission", name)
}

fn admission(app: &App, name: &str) -> Result<Option<Admission>, ApiError> {
    let key = admission_key(name);
    let found = app.docs.get(&key).map(|item| objects::decode_value(&key, &item.raw));
    found.transpose().map_err(|e| store_error(&e))
}

/// Gives members that have not come yet the names under which they were let in.
pub(super) fn name_them(app: &App, members: &mut [StoreMember]) -> Result<(), ApiError> {
    let prefix = Prefix::new("/secret/server-admission").map_err(|e| store_error(&e))?;
    for item in app.docs.all(&prefix) {
        let known: Admission = objects::decode_value(&item.key, &item.raw).map_err(|e| store_error(&e))?;
        let coming = members.iter_mut().find(|member| member.name.is_empty() && member.peer_url == known.peer_url);
        if let Some(member) = coming {
            item.key.last().clone_into(&mut member.name);
        }
    }
    Ok(())
}

/// `POST /v1/cluster/join-token`.
pub(crate) async fn join_token(
    State(app): State<App>,
    query: Query,
    peer: Option<Extension<PeerAddress>>,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let request: InspectJoinToken = from_json(&body)?;
    drop(body);
    let digest = tokens::digest(&request.join_token);
    let token = guarded(&app, peer, |draft| token_of(draft, &digest)).await?;
    Ok(Json(JoinTokenFor { role: token.spec.role, expires_at: token.status.expires_at }).into_response())
}

/// `POST /v1/cluster/join`.
pub(crate) async fn join(
    State(app): State<App>,
    query: Query,
    peer: Option<Extension<PeerAddress>>,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let request: JoinServer = from_json(&body)?;
    drop(body);
    check(&request)?;
    let cluster = cluster(&app)?;
    if let Some(known) = cluster.look().await?.members.iter().find(|member| member.name == request.name)
        && admission(&app, &request.name)?.is_none()
    {
        return Err(name_taken(&known.name).into());
    }
    let from = peer.as_ref().map(|p| p.0.0.to_string());
    let (digest, key) = (tokens::digest(&request.join_token), tokens::digest(&request.key));
    guarded(&app, peer, |draft| admit(draft, &digest, &key, &request, from.as_deref())).await?;
    let room = cluster.admit(&request.name, &request.peer_url).await?;
    let keys = Keys::load(&app.config.pki).map_err(|e| ApiError::internal(e.to_string()))?;
    let missing = || ApiError::internal("this server has no authority of etcd");
    let answer = ServerAdmitted {
        ca_pem: keys.ca_pem,
        ca_key_pem: keys.ca_key_pem,
        etcd_ca_pem: keys.etcd_ca_pem.ok_or_else(missing)?,
        etcd_ca_key_pem: keys.etcd_ca_key_pem.ok_or_else(missing)?,
        members: room.members,
        endpoints: room.endpoints,
        prefix: room.prefix,
        quota_bytes: room.quota_bytes,
    };
    tracing::info!(server = request.name, from, "a server was handed the keys of this cloud");
    let mut response = (StatusCode::CREATED, Json(answer)).into_response();
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// `POST /v1/cluster/servers/{name}/remove`.
pub(crate) async fn remove(State(app): State<App>, caller: Caller, Path(name): Path<String>, query: Query) -> Answer {
    query.only(&[])?;
    caller.check(Action::Delete, &Target::Operations)?;
    let cluster = cluster(&app)?;
    let admission = admission(&app, &name)?;
    let voters = match cluster.remove(&name, admission.as_ref().map(|known| known.peer_url.as_str())).await {
        // It was let in, and its place was never made or is gone already.
        Err(error) if error.code == Code::NotFound && admission.is_some() => {
            let members = cluster.look().await?.members;
            members.iter().filter(|member| member.role == MemberRole::Voter).count()
        }
        other => other?,
    };
    let by = caller.principal.to_string();
    transact(&app, |draft| {
        if draft.raw(&admission_key(&name)).is_some() {
            draft.delete(admission_key(&name));
        }
        audit(draft, &name, uuid::Uuid::nil(), "ServerRemoved", format!("removed by {by}"));
        Ok(())
    })
    .await?;
    Ok(Json(ServerRemoved { name, voters }).into_response())
}

/// The members, where this server runs one.
pub(super) fn cluster(app: &App) -> Result<&dyn Cluster, ApiError> {
    app.cluster.get().map(AsRef::as_ref).ok_or_else(|| {
        ApiError::new(
            Code::Unsupported,
            "this cloud does not look after its store as a cluster: its state is in a file, or in an etcd of others",
        )
    })
}

/// As [`transact`]; whoever guesses join tokens is slowed down.
async fn guarded<R>(
    app: &App,
    peer: Option<Extension<PeerAddress>>,
    build: impl FnMut(&mut Draft) -> Result<R, ApiError>,
) -> Result<R, ApiError> {
    let limit = peer.map_or_else(|| "enroll".into(), |peer| format!("enroll {}", peer.0.0));
    app.failed_logins.check(&limit, app.clock.boottime())?;
    let done = transact(app, build).await.inspect_err(|error| {
        if error.code == Code::JoinTokenUnknown {
            let _ = app.failed_logins.take(&limit, app.clock.boottime());
        }
    });
    done.map(|(result, _)| result)
}

fn check(request: &JoinServer) -> Result<(), ApiError> {
    if let Some(problem) = oblak_model::name::problem(&request.name) {
        return Err(ApiError::invalid("/name", problem));
    }
    let address = request.peer_url.strip_prefix("https://").and_then(|rest| rest.parse::<std::net::SocketAddr>().ok());
    match address {
        Some(address) if !address.ip().is_unspecified() && address.port() != 0 => {}
        _ => {
            return Err(ApiError::invalid(
                "/peer_url",
                "must be https://ADDRESS:PORT with the address of the new server",
            ));
        }
    }
    if request.key.len() < LEAST_KEY || request.key.len() > 4 * LEAST_KEY {
        return Err(ApiError::invalid("/key", format!("must have {LEAST_KEY} to {} characters", 4 * LEAST_KEY)));
    }
    Ok(())
}

fn name_taken(name: &str) -> ApiError {
    ApiError::new(
        Code::NameTaken,
        format!(
            "there is a server {name:?} already; choose another name with --node-name, or, if this machine is to take its place, run `oblak cluster remove-server {name}` first"
        ),
    )
}

/// The commit: the token is used up, and the name belongs to the machine with this key.
fn admit(draft: &mut Draft, digest: &str, key: &str, request: &JoinServer, from: Option<&str>) -> Result<(), ApiError> {
    let mut token = token_of(draft, digest)?;
    is_for_servers(&token)?;
    let id = JoinTokenId(token.metadata.id);
    let known = draft.value::<Admission>(&admission_key(&request.name))?.map(|(known, _)| known);
    if let Some(known) = &known
        && known.key != key
    {
        return Err(name_taken(&request.name));
    }
    if token.status.used_at.is_some() {
        return match known {
            Some(known) if known.token == id && known.peer_url == request.peer_url => Ok(()),
            _ => Err(used(&token)),
        };
    }
    not_expired(&token, draft.now)?;
    let admission = Admission { key: key.into(), peer_url: request.peer_url.clone(), token: id, at: draft.now };
    draft.put(admission_key(&request.name), &admission);
    token.status.used_at = Some(draft.now);
    token.status.node_name.clone_from(&request.name);
    draft.update(&token);
    let by = from.map(|ip| format!(" from {ip}")).unwrap_or_default();
    audit(draft, &request.name, token.metadata.id, "ServerJoined", format!("joined with {}{by}", token.describe()));
    Ok(())
}

fn is_for_servers(token: &JoinToken) -> Result<(), ApiError> {
    if token.spec.role == JoinRole::Server {
        return Ok(());
    }
    Err(ApiError::new(
        Code::Forbidden,
        format!(
            "the join token {} makes a node, not a server; make one with `oblak join-token create --role server`",
            token.metadata.name
        ),
    ))
}

/// What people can look up later: who became a server, or stopped being one.
fn audit(draft: &mut Draft, name: &str, id: uuid::Uuid, reason: &str, message: String) {
    let about = About { kind: "server".into(), name: name.into(), id };
    let event = NewEvent { project: None, about, severity: Severity::Normal, reason: reason.into(), message };
    let event = draft.app.recent().note(draft.app.uuid(), &event, "api", draft.now);
    draft.batch.absorb(event_ops(&event));
}
