//! Who sent the request: bearer token, password or a node's certificate; and the roles that decide what may be done.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::http::header;
use axum::http::request::Parts;
use base64::Engine;
use oblak_identity::principal::unauthenticated;
use oblak_identity::{Action, Principal, Target, UserPrincipal, authorize};
use oblak_model::{ApiError, Code, NodeId, Revision, User, UserId, UserKind};
use oblak_store::objects;
use sha2::{Digest, Sha256};

use crate::error::{Fault, password_error, store_error};
use crate::session::Known;
use crate::state::App;

/// Extension of a request: the node that the verified client certificate names. Set by the TLS server only; tests that drive the router
/// directly set it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerNode(pub NodeId);

/// Extension of a request: when the certificate behind [`PeerNode`] ends. A connection may live longer than that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerUntil(pub oblak_model::Timestamp);

/// Extension of a request: where it came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerAddress(pub IpAddr);

/// How long a password that was right is not computed again.
const BASIC_LIFE: Duration = Duration::from_secs(60);
const BASIC_REMEMBERED: usize = 256;

/// Passwords that were right a moment ago, as digests over user, password and stored hash.
#[derive(Default)]
pub(crate) struct BasicCache(Mutex<HashMap<[u8; 32], Duration>>);

/// Who calls, after authentication and rate limiting. Also waits for the revision that the caller has seen.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub principal: Arc<Principal>,
}

impl FromRequestParts<App> for Caller {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Fault> {
        let Known { principal, key } = authenticate(app, parts).await?;
        app.requests.take(&key, app.clock.boottime())?;
        if let Some(value) = parts.headers.get("x-oblak-min-revision") {
            let revision: Revision =
                value.to_str().unwrap_or_default().parse().map_err(|_| {
                    ApiError::new(Code::Malformed, "X-Oblak-Min-Revision must be a revision such as 1-42")
                })?;
            app.caught_up(revision).await?;
        }
        Ok(Self { principal })
    }
}

impl Caller {
    /// The choke point for objects in a project.
    pub fn in_project(&self, app: &App, action: Action, project: &str) -> Result<(), ApiError> {
        let found = app.granting(project)?;
        let grants = found.as_deref().map(|project| project.spec.grants.as_slice());
        authorize(&self.principal, action, &Target::InProject { project, grants })
    }

    pub fn check(&self, action: Action, target: &Target<'_>) -> Result<(), ApiError> {
        authorize(&self.principal, action, target)
    }
}

async fn authenticate(app: &App, parts: &Parts) -> Result<Known, ApiError> {
    let Some(value) = parts.headers.get(header::AUTHORIZATION) else {
        return match parts.extensions.get::<PeerNode>() {
            Some(PeerNode(node)) => {
                node_principal(app, *node, parts.extensions.get::<PeerUntil>().map(|until| until.0)).map(Known::new)
            }
            None => Ok(Known::new(Principal::Anonymous)),
        };
    };
    let text = value.to_str().map_err(|_| unauthenticated())?;
    let (scheme, rest) = text.split_once(' ').ok_or_else(unauthenticated)?;
    if scheme.eq_ignore_ascii_case("bearer") {
        app.sessions.bearer(app, rest.trim())
    } else if scheme.eq_ignore_ascii_case("basic") {
        let decoded = base64::engine::general_purpose::STANDARD.decode(rest.trim()).map_err(|_| unauthenticated())?;
        let pair = String::from_utf8(decoded).map_err(|_| unauthenticated())?;
        let (user, password) = pair.split_once(':').ok_or_else(unauthenticated)?;
        let peer = parts.extensions.get::<PeerAddress>().map(|p| p.0);
        password_login(app, user, password, peer).await.map(|(principal, _)| Known::new(principal))
    } else {
        Err(unauthenticated())
    }
}

/// A node whose object was deleted is shut out for good; its machine may join again as another node.
fn node_principal(app: &App, node: NodeId, until: Option<oblak_model::Timestamp>) -> Result<Principal, ApiError> {
    if crate::node::is_removed(app, node) {
        return Err(ApiError::new(
            Code::NodeRemoved,
            "this node was removed from the cloud; to bring its machine back, remove node/node.json of its data directory and run `oblak join` with a new token",
        ));
    }
    if until.is_some_and(|end| end <= app.now()) {
        return Err(ApiError::new(
            Code::Unauthenticated,
            "the certificate of this node has ended; run `oblak join` on it with a new token",
        ));
    }
    Ok(Principal::Node(node))
}

/// Checks a password. Failures are counted by user name and by address, and too many make the next ones wait.
pub(crate) async fn password_login(
    app: &App,
    name: &str,
    password: &str,
    peer: Option<IpAddr>,
) -> Result<(Principal, User), ApiError> {
    let now = app.clock.boottime();
    let by_user = format!("user {}", name.chars().take(64).collect::<String>());
    let by_peer = peer.map(|ip| format!("address {ip}"));
    for key in by_peer.iter().chain([&by_user]) {
        app.failed_logins.check(key, now)?;
    }
    let user = if name.parse::<uuid::Uuid>().is_ok() { None } else { app.find::<UserKind>("_", name)? };
    let user = user.filter(|user| !user.spec.disabled && !user.metadata.is_deleting());
    let hash = match &user {
        Some(user) => stored_hash(app, user)?,
        None => None,
    };
    if app.is_right(name, password, hash, now).await?
        && let Some(user) = user
    {
        let principal = UserPrincipal {
            id: UserId(user.metadata.id),
            name: user.metadata.name.clone(),
            cloud_admin: user.spec.cloud_admin,
            token: None,
        };
        return Ok((Principal::User(principal), user));
    }
    for key in by_peer.iter().chain([&by_user]) {
        let _ = app.failed_logins.take(key, now);
    }
    Err(unauthenticated())
}

fn stored_hash(app: &App, user: &User) -> Result<Option<String>, ApiError> {
    let key = objects::secret_key("user", &user.metadata.id.to_string());
    app.docs.get(&key).map(|item| objects::decode_value(&key, &item.raw)).transpose().map_err(|e| store_error(&e))
}

impl App {
    async fn is_right(
        &self,
        name: &str,
        password: &str,
        hash: Option<String>,
        now: Duration,
    ) -> Result<bool, ApiError> {
        // The stored hash is part of the digest: a changed password is not remembered.
        let digest: Option<[u8; 32]> = hash.as_ref().map(|hash| {
            let mut sha = Sha256::new();
            for part in [name, password, hash] {
                sha.update((part.len() as u64).to_be_bytes());
                sha.update(part);
            }
            sha.finalize().into()
        });
        if let Some(digest) = &digest {
            let cache = self.basic.0.lock().unwrap_or_else(PoisonError::into_inner);
            if cache.get(digest).is_some_and(|end| *end > now) {
                return Ok(true);
            }
        }
        let right = self.passwords.verify(password.to_string(), hash).await.map_err(|e| password_error(&e))?;
        if right && let Some(digest) = digest {
            let mut cache = self.basic.0.lock().unwrap_or_else(PoisonError::into_inner);
            if cache.len() >= BASIC_REMEMBERED {
                cache.retain(|_, end| *end > now);
            }
            if cache.len() < BASIC_REMEMBERED {
                cache.insert(digest, now + BASIC_LIFE);
            }
        }
        Ok(right)
    }
}
