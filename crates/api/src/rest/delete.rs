//! Deleting an object.
//!
//! ```text
//!   asked ──► deleted_at set ──► (named by others: nobody can start to use it; does anybody?) ──► gone, or finalizers first
//!                     └── somebody does: deleted_at taken back, `in_use`
//! ```
//! After a crash in between the object says that it is being deleted; deleting it again goes on from there, and so does [`super::unfinished`]
//! when nobody asks again.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use oblak_identity::Action;
use oblak_model::{ApiError, Code, Object, Revision};
use uuid::Uuid;

use super::get::lookup;
use super::{Params, show};
use crate::auth::Caller;
use crate::commit::transact;
use crate::docs;
use crate::draft::Draft;
use crate::error::{Answer, store_error};
use crate::kinds::Resource;
use crate::request::{Query, if_match, parse_etag};
use crate::state::App;

/// Finalizer while it is looked whether something uses the object. Agents are not told yet that it is to go (see `crate::node::watch`).
pub(crate) const CHECK_FINALIZER: &str = "api";

pub(super) async fn delete<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    headers: HeaderMap,
) -> Answer {
    query.only(&["if_match"])?;
    let project = params.project();
    let name = params.item::<K>();
    let item = lookup::<K>(&app, &caller, project, name, Action::Delete)?;
    if !caller.principal.is_cloud_admin() && K::KIND == "user" {
        return Err(ApiError::new(Code::Forbidden, "only a cloud admin deletes users").into());
    }
    let object: Object<K> = docs::object(&item).map_err(|e| store_error(&e))?;
    let mut expected = if_match(&headers)?;
    if let Some(text) = query.get("if_match")? {
        let bad = || ApiError::new(Code::Malformed, "if_match must be a revision such as 1-42");
        expected = Some(parse_etag(text).ok_or_else(bad)?);
    }
    let scope = docs::scope_of::<K>(project).to_string();
    let id = object.metadata.id;
    let (outcome, revision) = mark::<K>(&app, &scope, id, expected).await?;
    match outcome {
        Marked::Gone => Ok(gone(revision)),
        Marked::Waits(object) => Ok(show(StatusCode::ACCEPTED, &*object, revision)),
        Marked::Look => finish::<K>(&app, &scope, id).await,
    }
}

enum Marked<K: Resource> {
    Gone,
    Waits(Box<Object<K>>),
    Look,
}

async fn mark<K: Resource>(
    app: &App,
    scope: &str,
    id: Uuid,
    expected: Option<Revision>,
) -> Result<(Marked<K>, Revision), ApiError> {
    let (mut outcome, revision) = transact(app, |draft| {
        let Some(mut object) = draft.get::<K>(scope, id)? else { return Ok(Marked::Gone) };
        if expected.is_some_and(|expected| expected != object.metadata.revision) {
            return Err(ApiError::new(
                Code::PreconditionFailed,
                format!("{} is at revision {}; read it again", object.describe(), object.metadata.revision),
            ));
        }
        let first = !object.metadata.is_deleting();
        if first {
            K::may_delete(draft, &object)?;
            object.metadata.deleted_at = Some(draft.now);
        }
        if K::NAMED_BY_OTHERS {
            if first {
                object.metadata.finalizers.insert(CHECK_FINALIZER.into());
                draft.update(&object);
                return Ok(Marked::Look);
            }
            let rest = &object.metadata.finalizers;
            let look = rest.is_empty() || rest.contains(CHECK_FINALIZER);
            return Ok(if look { Marked::Look } else { Marked::Waits(Box::new(object)) });
        }
        if first {
            K::begin_delete(draft, &mut object)?;
        }
        if object.metadata.finalizers.is_empty() {
            K::remove(draft, &object)?;
            return Ok(Marked::Gone);
        }
        if first {
            draft.update(&object);
        }
        Ok(Marked::Waits(Box::new(object)))
    })
    .await?;
    if let Marked::Waits(object) = &mut outcome
        && object.metadata.revision < revision
        && app.docs.revision() >= revision
        && let Some(current) = app.find::<K>(scope, &id.to_string())?
    {
        **object = current;
    }
    Ok((outcome, revision))
}

/// The mark is visible here now, and with it everything that was committed before it.
async fn finish<K: Resource>(app: &App, scope: &str, id: Uuid) -> Answer {
    let (done, revision) = transact(app, |draft| {
        let Some(object) = draft.get::<K>(scope, id)? else { return Ok(Ok(None)) };
        second_step(draft, object)
    })
    .await?;
    match done? {
        None => Ok(gone(revision)),
        Some(mut object) => {
            object.metadata.revision = revision;
            Ok(show(StatusCode::ACCEPTED, &object, revision))
        }
    }
}

/// What is left of an object, or why it stays.
type Outcome<K> = Result<Option<Object<K>>, ApiError>;

/// As the second step of a request, for an object that still waits for it; does nothing for another one.
pub(super) async fn resume<K: Resource>(app: &App, scope: &str, id: Uuid) -> Result<Outcome<K>, ApiError> {
    let (outcome, _) = transact(app, |draft| match draft.get::<K>(scope, id)? {
        Some(object) if object.metadata.finalizers.contains(CHECK_FINALIZER) => second_step(draft, object),
        other => Ok(Ok(other)),
    })
    .await?;
    Ok(outcome)
}

/// Removes the object, hands it to its finalizers, or takes the mark back because something uses it.
fn second_step<K: Resource>(draft: &mut Draft, mut object: Object<K>) -> Result<Outcome<K>, ApiError> {
    object.metadata.finalizers.remove(CHECK_FINALIZER);
    if let Err(error) = K::may_delete(draft, &object) {
        object.metadata.deleted_at = None;
        draft.update(&object);
        return Ok(Err(error));
    }
    K::begin_delete(draft, &mut object)?;
    if object.metadata.finalizers.is_empty() {
        K::remove(draft, &object)?;
        return Ok(Ok(None));
    }
    draft.update(&object);
    Ok(Ok(Some(object)))
}

fn gone(revision: Revision) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    if let Ok(value) = revision.to_string().parse() {
        response.headers_mut().insert(crate::middleware::REVISION, value);
    }
    response
}
