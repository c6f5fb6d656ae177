//! The protocol of agents: enroll, register, heartbeat, report, watch. The tunnel is in `crate::stream`.

mod certificate;
mod enroll;
mod evacuate;
mod migration;
mod peers;
mod register;
mod remove;
mod report;
mod status;
mod watch;

pub(crate) use self::certificate::{key_key, renew};
pub(crate) use self::enroll::{Enroll, enroll, not_expired, token_of, used};
pub(crate) use self::evacuate::evacuate;
pub(crate) use self::register::{heartbeat, register};
pub(crate) use self::remove::remove;
pub(crate) use self::report::report;
pub(crate) use self::watch::watch;

use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use oblak_identity::{Action, Target};
use oblak_model::{ApiError, Code, Node, NodeId, NodeKind};
use oblak_store::cache::Notice;
use oblak_store::{Key, objects};
use serde::de::DeserializeOwned;

use crate::auth::Caller;
use crate::error::{Fault, store_error};
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// The node of a path, when the caller is its agent.
pub(crate) fn own_node(caller: &Caller, text: &str) -> Result<NodeId, ApiError> {
    let node: NodeId = text.parse().map_err(|_| ApiError::not_found("node", text))?;
    caller.check(Action::Update, &Target::NodeProtocol(node))?;
    Ok(node)
}

/// What the agent of a node sends about its own node. Others are refused before the body is read.
pub(crate) struct FromAgent<T> {
    /// The node.
    pub node: NodeId,
    /// The body.
    pub said: T,
}

impl<T: DeserializeOwned> FromRequest<App> for FromAgent<T> {
    type Rejection = Fault;
    async fn from_request(request: Request, app: &App) -> Result<Self, Fault> {
        let (mut parts, body) = request.into_parts();
        let caller = Caller::from_request_parts(&mut parts, app).await?;
        let name = Path::<String>::from_request_parts(&mut parts, app).await;
        let Path(name) = name.map_err(|e| ApiError::new(Code::Malformed, e.body_text()))?;
        Query::from_request_parts(&mut parts, app).await?.only(&[])?;
        let node = own_node(&caller, &name)?;
        let Payload(bytes) = Payload::from_request(Request::from_parts(parts, body), app).await?;
        Ok(Self { node, said: from_json(&bytes)? })
    }
}

/// Whether a node was removed: its certificate stays valid until it ends, but opens nothing.
pub(crate) fn is_removed(app: &App, node: NodeId) -> bool {
    app.docs.get(&removed_key(node)).is_some()
}

/// Says that a node was removed.
pub(crate) fn removed_key(node: NodeId) -> Key {
    objects::secret_key("revoked-node", &node.to_string())
}

/// Resolves when the node is removed.
pub(crate) async fn until_removed(app: &App, node: NodeId) {
    let mut changes = app.docs.subscribe();
    let key = removed_key(node);
    while !is_removed(app, node) {
        loop {
            match changes.next().await {
                Some(Notice::Change(change)) if change.key != key => {}
                Some(_) => break,
                None => return std::future::pending().await,
            }
        }
    }
}

/// The object of a node that has registered.
fn registered(app: &App, id: NodeId) -> Result<Node, ApiError> {
    app.find::<NodeKind>("_", &id.to_string())?.ok_or_else(|| ApiError::not_found("node", &id.to_string()))
}

/// The epoch of the node's lease; none when the lease has ended.
fn epoch(app: &App, id: NodeId) -> Result<Option<u64>, ApiError> {
    let key = objects::lease_key(id);
    app.docs.get(&key).map(|item| objects::decode_value(&key, &item.raw)).transpose().map_err(|e| store_error(&e))
}
