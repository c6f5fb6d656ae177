//! A new machine joins: a one-time join token, or a cloud admin's own token, is exchanged for a certificate of its own.
//!
//! With a join token everything is one commit: the token is used up, the node with its name exists, its key is known. A machine that lost
//! the answer asks again with the same key and gets the same node.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::{Extension, Json};
use oblak_control::lifecycle::event_ops;
use oblak_identity::{Principal, tokens};
use oblak_model::meta::Labels;
use oblak_model::wire::NewEvent;
use oblak_model::{
    About, ApiError, Code, JoinRole, JoinToken, JoinTokenId, JoinTokenKind, Node, NodeId, NodeKind, NodeSpec, Severity,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::certificate::{key_key, key_of, sign};
use super::removed_key;
use crate::auth::{Caller, PeerAddress};
use crate::commit::transact;
use crate::draft::Draft;
use crate::error::Answer;
use crate::kinds::by_digest;
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// `POST /v1/nodes/enroll`. Answered with a `NodeCertificate`.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Enroll {
    /// Secret part of a join token.
    #[serde(default)]
    join_token: Option<String>,
    /// Instead of a join token: token of a cloud admin; may be given in `Authorization`.
    #[serde(default)]
    token: Option<String>,
    /// Certificate request (PKCS #10, PEM). Only its public key is used.
    csr_pem: String,
    /// Name that the node wants to have.
    name: String,
    /// Zone; the default one when empty. Only with a join token.
    #[serde(default)]
    zone: String,
    /// Labels. Only with a join token.
    #[serde(default)]
    labels: Labels,
}

/// The source of events about joining.
const SOURCE: &str = "api";

pub(crate) async fn enroll(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    peer: Option<Extension<PeerAddress>>,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let enroll: Enroll = from_json(&body)?;
    drop(body);
    if let Some(problem) = oblak_model::name::problem(&enroll.name) {
        return Err(ApiError::invalid("/name", problem).into());
    }
    let key = key_of(&enroll.csr_pem)?;
    let from = peer.map(|p| p.0.0.to_string());
    let limit = from.as_ref().map_or_else(|| "enroll".into(), |ip| format!("enroll {ip}"));
    let id = match &enroll.join_token {
        Some(secret) => {
            app.failed_logins.check(&limit, app.clock.boottime())?;
            let digest = tokens::digest(secret);
            let joined = transact(&app, |draft| join(draft, &digest, &enroll, &key, from.as_deref())).await;
            let ((id, outcome), _) = joined.inspect_err(|error| {
                if error.code == Code::JoinTokenUnknown {
                    let _ = app.failed_logins.take(&limit, app.clock.boottime());
                }
            })?;
            tracing::info!(node = enroll.name, %id, from, ?outcome, "a machine has joined with a token");
            id
        }
        None => with_admin(&app, &caller, &enroll, &key, &limit).await?,
    };
    let answer = sign(&app, id, &enroll.name, &enroll.csr_pem)?;
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// What joining did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
enum Outcome {
    New,
    /// The same machine asked again.
    Again,
}

/// The commit with a join token.
fn join(
    draft: &mut Draft,
    digest: &str,
    enroll: &Enroll,
    key: &str,
    from: Option<&str>,
) -> Result<(NodeId, Outcome), ApiError> {
    let mut token = token_of(draft, digest)?;
    if token.spec.role != JoinRole::Node {
        return Err(ApiError::new(
            Code::Forbidden,
            format!(
                "the join token {} makes a server, not a node; use a newer version of oblak to join with it",
                token.metadata.name
            ),
        ));
    }
    if let Some(node) = token.status.node {
        return match draft.value::<String>(&key_key(node))? {
            Some((known, _)) if known == key && token.status.node_name == enroll.name => Ok((node, Outcome::Again)),
            _ => Err(used(&token)),
        };
    }
    not_expired(&token, draft.now)?;
    let (id, outcome) = match draft.find::<NodeKind>("_", &enroll.name)? {
        // With the key that the node has: its certificate has ended, or its disk has lost it.
        Some(node) if is_key_of(draft, &node, key)? => (NodeId(node.metadata.id), Outcome::Again),
        Some(_) => {
            return Err(ApiError::new(
                Code::NameTaken,
                format!(
                    "there is a node {0:?} already; choose another name with --node-name, or, if this machine is to take its place, run `oblak node remove {0}` first",
                    enroll.name
                ),
            ));
        }
        None => {
            let node = new_node(draft, enroll)?;
            draft.create(&node)?;
            (NodeId(node.metadata.id), Outcome::New)
        }
    };
    draft.put(key_key(id), &key);
    token.status.used_at = Some(draft.now);
    token.status.node = Some(id);
    token.status.node_name.clone_from(&enroll.name);
    draft.update(&token);
    let by = from.map(|ip| format!(" from {ip}")).unwrap_or_default();
    audit(draft, &enroll.name, id, format!("joined with {}{by}", token.describe()));
    Ok((id, outcome))
}

/// Refuses a token whose time is over.
pub(crate) fn not_expired(token: &JoinToken, now: oblak_model::Timestamp) -> Result<(), ApiError> {
    if token.status.expires_at > now {
        return Ok(());
    }
    Err(ApiError::new(
        Code::JoinTokenExpired,
        format!(
            "the join token {} expired at {}; make a new one with `oblak join-token create`",
            token.metadata.name, token.status.expires_at
        ),
    ))
}

/// The join token with a secret of this digest.
pub(crate) fn token_of(draft: &Draft, digest: &str) -> Result<JoinToken, ApiError> {
    let unknown = || {
        ApiError::new(
            Code::JoinTokenUnknown,
            "the cloud does not know this join token: it was deleted, or is of another cloud; make a new one with `oblak join-token create`",
        )
    };
    let (id, _) = draft.value::<JoinTokenId>(&by_digest(digest))?.ok_or_else(unknown)?;
    draft.get::<JoinTokenKind>("_", id.0)?.filter(|t| !t.metadata.is_deleting()).ok_or_else(unknown)
}

pub(crate) fn used(token: &JoinToken) -> ApiError {
    let status = &token.status;
    let at = status.used_at.map(|at| format!(" at {at}")).unwrap_or_default();
    ApiError::new(
        Code::JoinTokenUsed,
        format!(
            "the join token {} is used up: node {:?} joined with it{at}; each machine needs a token of its own from `oblak join-token create`. If that was not you, run `oblak node remove {}`",
            token.metadata.name, status.node_name, status.node_name
        ),
    )
}

fn is_key_of(draft: &Draft, node: &Node, key: &str) -> Result<bool, ApiError> {
    Ok(draft.value::<String>(&key_key(NodeId(node.metadata.id)))?.is_some_and(|(known, _)| known == key))
}

fn new_node(draft: &Draft, enroll: &Enroll) -> Result<Node, ApiError> {
    let mut spec = NodeSpec::default();
    if !enroll.zone.is_empty() {
        spec.zone.clone_from(&enroll.zone);
    }
    let mut node = Node::new(&enroll.name, spec);
    draft.stamp(&mut node, None);
    node.metadata.labels.clone_from(&enroll.labels);
    node.status.message = "it has joined and has not been heard of since".into();
    node.status.phase_since = draft.now;
    node.validate()?;
    Ok(node)
}

/// What people can look up later: who became a node, when and how.
fn audit(draft: &mut Draft, name: &str, id: NodeId, message: String) {
    let about = About { kind: "node".into(), name: name.into(), id: id.0 };
    let event = NewEvent { project: None, about, severity: Severity::Normal, reason: "Joined".into(), message };
    let event = draft.app.recent().note(draft.app.uuid(), &event, SOURCE, draft.now);
    draft.batch.absorb(event_ops(&event));
}

/// Without a join token: the caller is, or gives the token of, a cloud admin. The node object is made when the agent registers.
async fn with_admin(app: &App, caller: &Caller, enroll: &Enroll, key: &str, limit: &str) -> Result<NodeId, ApiError> {
    let principal = match (&*caller.principal, &enroll.token) {
        (Principal::User(_), _) | (_, None) => Arc::clone(&caller.principal),
        (_, Some(token)) => {
            app.failed_logins.check(limit, app.clock.boottime())?;
            let known = app.sessions.bearer(app, token).inspect_err(|_| {
                let _ = app.failed_logins.take(limit, app.clock.boottime());
            })?;
            known.principal
        }
    };
    if !principal.user()?.cloud_admin {
        return Err(ApiError::new(
            Code::Forbidden,
            "enrolling a node needs a join token or the token of a cloud admin",
        ));
    }
    let id = match app.find::<NodeKind>("_", &enroll.name)? {
        // The machine lost its disk and comes back; while its old agent is alive there must not be two.
        Some(node) if super::epoch(app, NodeId(node.metadata.id))?.is_none() => NodeId(node.metadata.id),
        Some(_) => {
            return Err(ApiError::new(
                Code::NameTaken,
                format!("node {:?} is alive; stop its agent first or choose another name", enroll.name),
            ));
        }
        None => NodeId(app.uuid()),
    };
    transact(app, |draft| {
        if draft.raw(&removed_key(id)).is_some() {
            draft.delete(removed_key(id));
        }
        draft.put(key_key(id), &key);
        audit(draft, &enroll.name, id, format!("enrolled by {principal}"));
        Ok(())
    })
    .await?;
    Ok(id)
}
