//! The same creation sent twice creates once.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use oblak_control::lifecycle::{IDEMPOTENCY_LIFE, IdempotencyRecord, idempotency_key};
use oblak_identity::Principal;
use oblak_model::{ApiError, Code, Revision};
use oblak_store::{Guard, Key, objects};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::shown;
use crate::docs;
use crate::draft::Draft;
use crate::error::store_error;
use crate::state::App;

const HEADER: HeaderName = HeaderName::from_static("idempotency-key");
const REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");
const LONGEST: usize = 128;

/// The header, taken out by itself: most requests have none, and a copy of all headers costs more.
pub(crate) struct IdempotencyHeader(Option<HeaderValue>);

impl FromRequestParts<App> for IdempotencyHeader {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Self::Rejection> {
        Ok(Self(parts.headers.get(HEADER).cloned()))
    }
}

/// The key of a request, and what is known under it.
pub(crate) struct Idempotency {
    key: Key,
    fingerprint: String,
    /// Revision of a record that is too old to count.
    stale: Option<Revision>,
}

impl Idempotency {
    /// None when the request has no key.
    pub fn of(
        header: &IdempotencyHeader,
        principal: &Principal,
        method: &Method,
        path: &str,
        body: &[u8],
    ) -> Result<Option<Self>, ApiError> {
        let Some(value) = &header.0 else { return Ok(None) };
        let text = value.to_str().unwrap_or_default();
        if text.is_empty() || text.len() > LONGEST {
            return Err(ApiError::new(
                Code::Malformed,
                format!("Idempotency-Key must have 1 to {LONGEST} printable ASCII characters"),
            ));
        }
        let mut digest = Sha256::new();
        for part in [method.as_str().as_bytes(), path.as_bytes(), body] {
            digest.update((part.len() as u64).to_be_bytes());
            digest.update(part);
        }
        let fingerprint = data_encoding::HEXLOWER.encode(&digest.finalize());
        Ok(Some(Self { key: idempotency_key(&principal.key(), text), fingerprint, stale: None }))
    }

    /// The record of an earlier request with this key.
    ///
    /// # Errors
    /// `idempotency_mismatch` when that request was another one.
    pub async fn earlier(&mut self, app: &App) -> Result<Option<IdempotencyRecord>, ApiError> {
        let Some(entry) = app.store.get(&self.key).await.map_err(|e| store_error(&e))? else { return Ok(None) };
        let record: IdempotencyRecord = objects::decode_value(&entry.key, &entry.value).map_err(|e| store_error(&e))?;
        if app.now().since(record.at) > IDEMPOTENCY_LIFE {
            self.stale = Some(entry.revision);
            return Ok(None);
        }
        if record.fingerprint != self.fingerprint {
            return Err(ApiError::new(
                Code::IdempotencyMismatch,
                "this Idempotency-Key was used for another request within the last 24 hours; use a new key",
            ));
        }
        // The commit that wrote the record may not be in our cache yet.
        app.caught_up(entry.revision).await?;
        Ok(Some(record))
    }

    /// Adds the record to the commit.
    pub fn record(&self, draft: &mut Draft, object: Option<(&Key, Uuid)>, body: Option<String>) {
        let record = IdempotencyRecord {
            at: draft.now,
            fingerprint: self.fingerprint.clone(),
            object: object.map(|(key, _)| key.as_str().to_string()),
            id: object.map(|(_, id)| id).unwrap_or_default(),
            body,
        };
        draft.batch.guard(match self.stale {
            Some(revision) => Guard::Revision(self.key.clone(), revision),
            None => Guard::Absent(self.key.clone()),
        });
        draft.put(self.key.clone(), &record);
    }
}

/// The answer to a repeated request: the object as it is now.
pub(crate) fn replayed(app: &App, record: &IdempotencyRecord) -> Result<Response, ApiError> {
    let revision = app.docs.revision();
    let mut response = if let Some(body) = &record.body {
        shown(StatusCode::OK, body.clone().into_bytes(), revision, revision)
    } else {
        let item = record.object.as_deref().and_then(|key| app.docs.get(key));
        let Some(item) = item else {
            return Err(ApiError::new(
                Code::NotFound,
                "an earlier request with this Idempotency-Key created the object, and it has been deleted since",
            ));
        };
        shown(StatusCode::CREATED, docs::json(&item), item.revision, revision)
    };
    response.headers_mut().insert(REPLAYED, HeaderValue::from_static("true"));
    Ok(response)
}
