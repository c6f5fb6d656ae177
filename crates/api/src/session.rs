//! Tokens that were admitted a moment ago, so that a request does not decode again what the one before it decoded.
//!
//! Nothing is believed for longer than it is true: a session counts only while record, token and user in the cache are the very
//! items that it was made from. Whatever changes or removes one of them ends it, in the same moment in which a read would show the change.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use oblak_identity::Principal;
use oblak_identity::principal::unauthenticated;
use oblak_identity::tokens::{self, TokenRecord};
use oblak_model::{ApiError, Kind, ProjectKind, Timestamp, Token, TokenKind, User, UserKind};
use oblak_store::objects;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::docs::{self, Item};
use crate::error::store_error;
use crate::state::App;

/// Sessions, and projects, remembered; when there are more, all are forgotten and made again.
const REMEMBERED: usize = 4096;

/// Somebody who was authenticated.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub principal: Arc<Principal>,
    /// [`Principal::key`].
    pub key: Arc<str>,
}

impl Known {
    pub fn new(principal: Principal) -> Self {
        Self { key: principal.key().into(), principal: Arc::new(principal) }
    }
}

struct Session {
    known: Known,
    /// Record, token and user.
    from: [Arc<Item>; 3],
    ends: Option<Timestamp>,
}

impl Session {
    fn holds(&self, app: &App) -> bool {
        self.ends.is_none_or(|end| app.now() < end) && !self.from.iter().any(|item| item.is_gone())
    }
}

/// By SHA-256 of the token.
#[derive(Default)]
pub(crate) struct Sessions(RwLock<HashMap<[u8; 32], Arc<Session>>>);

impl Sessions {
    /// The principal behind a token.
    ///
    /// # Errors
    /// `unauthenticated`.
    pub fn bearer(&self, app: &App, secret: &str) -> Result<Known, ApiError> {
        if !tokens::is_well_formed(secret) {
            return Err(unauthenticated());
        }
        let digest: [u8; 32] = Sha256::digest(secret.as_bytes()).into();
        let session = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&digest).cloned();
        if let Some(session) = session
            && session.holds(app)
        {
            return Ok(session.known.clone());
        }
        let session = begin(app, secret)?;
        let known = session.known.clone();
        let mut sessions = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if sessions.len() >= REMEMBERED {
            sessions.clear();
        }
        sessions.insert(digest, Arc::new(session));
        Ok(known)
    }
}

/// Projects that were asked for a moment ago, so that not every request searches for its own. As with sessions, an item counts only while
/// it is the one in the cache.
#[derive(Default)]
pub(crate) struct Projects(RwLock<HashMap<Box<str>, Arc<Item>>>);

impl Projects {
    pub fn find(&self, app: &App, name: &str) -> Option<Arc<Item>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        if let Some(item) = known.filter(|item| !item.is_gone()) {
            return Some(item);
        }
        let item = docs::find::<ProjectKind>(&app.docs, "_", name)?;
        let mut projects = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if projects.len() >= REMEMBERED {
            projects.clear();
        }
        projects.insert(name.into(), Arc::clone(&item));
        Some(item)
    }
}

fn begin(app: &App, secret: &str) -> Result<Session, ApiError> {
    let key = objects::secret_key("token", &tokens::digest(secret));
    let Some(item) = app.docs.get(&key) else { return Err(unauthenticated()) };
    let record: TokenRecord = objects::decode_value(&key, &item.raw).map_err(|e| store_error(&e))?;
    let (token_item, token) = object::<TokenKind>(app, record.token.0)?;
    let (user_item, user) = object::<UserKind>(app, record.user.0)?;
    let (token, user): (Arc<Token>, Arc<User>) = (token, user);
    let principal = tokens::admit(record, Some(&token), Some(&user), app.now())?;
    Ok(Session { known: Known::new(principal), from: [item, token_item, user_item], ends: token.spec.expires_at })
}

fn object<K: Kind>(app: &App, id: Uuid) -> Result<(Arc<Item>, Arc<oblak_model::Object<K>>), ApiError> {
    let item = app.docs.get(&objects::object_key::<K>("_", id)).ok_or_else(unauthenticated)?;
    let object = docs::shared::<K>(&item).map_err(|e| store_error(&e))?;
    Ok((item, object))
}
