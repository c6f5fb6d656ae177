//! Creating an object.

use axum::extract::{Path, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use oblak_identity::{Action, Principal};
use oblak_model::{ApiError, Code, Kind, Object, ProjectKind};
use oblak_store::objects;

use super::{Idempotency, IdempotencyHeader, Params, replayed, show, shown};
use crate::auth::Caller;
use crate::commit::transact;
use crate::docs;
use crate::draft::{Draft, name_taken};
use crate::error::Answer;
use crate::kinds::{Resource, allow};
use crate::request::{Payload, Query, from_json};
use crate::state::App;

#[allow(clippy::too_many_arguments)] // each is an extractor
pub(super) async fn create<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    method: Method,
    uri: Uri,
    idempotency: IdempotencyHeader,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let project = params.project();
    // Rights come before the body is looked at; kinds whose rights depend on the object are checked again below.
    if matches!(K::ACCESS, crate::kinds::Access::Owned) {
        caller.principal.user()?;
    } else {
        allow::<K>(&app, &caller, Action::Create, project, None)?;
    }
    let mut idempotency = Idempotency::of(&idempotency, &caller.principal, &method, uri.path(), &body)?;
    if let Some(key) = &mut idempotency
        && let Some(record) = key.earlier(&app).await?
    {
        return Ok(replayed(&app, &record)?);
    }
    let object: Object<K> = from_json(&body)?;
    drop(body);
    match commit::<K>(&app, &caller, project, object, idempotency.as_ref()).await {
        Ok(response) => Ok(response),
        Err(error) => {
            // The same request may have been carried out meanwhile by another connection.
            if let Some(key) = &mut idempotency
                && let Ok(Some(record)) = key.earlier(&app).await
            {
                return Ok(replayed(&app, &record)?);
            }
            Err(error.into())
        }
    }
}

async fn commit<K: Resource>(
    app: &App,
    caller: &Caller,
    project: Option<&str>,
    object: Object<K>,
    idempotency: Option<&Idempotency>,
) -> Result<axum::response::Response, ApiError> {
    let (object, secret) = accept::<K>(object, project)?;
    let sealed = match secret {
        Some(secret) => Some(K::seal(app, secret).await?),
        None => None,
    };
    let ((mut object, reveal), revision) = transact(app, |draft| {
        let mut object = object.clone();
        let reveal = admit::<K>(draft, &caller.principal, &mut object, project, sealed.as_deref())?;
        if let Some(idempotency) = idempotency {
            idempotency.record(draft, Some((&objects::key_of(&object), object.metadata.id)), None);
        }
        Ok((object, reveal))
    })
    .await?;
    object.metadata.revision = revision;
    let known = app.docs.get(&objects::key_of(&object)).filter(|item| item.revision == revision);
    let mut response = match (known, reveal) {
        // It is in the cache as it will be served; no need to encode it once more.
        (Some(item), None) if !K::DECORATED => shown(StatusCode::CREATED, docs::json(&item), revision, revision),
        (_, reveal) => {
            K::decorate(app, &mut object);
            if let Some(secret) = reveal {
                K::reveal(&mut object, secret);
            }
            show(StatusCode::CREATED, &object, revision)
        }
    };
    if let Ok(location) = HeaderValue::from_str(&location::<K>(project, &object)) {
        response.headers_mut().insert(header::LOCATION, location);
    }
    Ok(response)
}

fn location<K: Kind>(project: Option<&str>, object: &Object<K>) -> String {
    let name = &object.metadata.name;
    match project.filter(|_| K::SCOPE == oblak_model::Scope::Project) {
        Some(project) => format!("/v1/projects/{project}/{}/{name}", K::PLURAL),
        None => format!("/v1/{}/{name}", K::PLURAL),
    }
}

/// Checks an object by itself and takes out its secret.
pub(crate) fn accept<K: Resource>(
    mut object: Object<K>,
    project: Option<&str>,
) -> Result<(Object<K>, Option<String>), ApiError> {
    if let Some(named) = object.metadata.project.as_deref()
        && Some(named) != project
    {
        return Err(ApiError::invalid(
            "/metadata/project",
            format!("is {named:?}, but the path says {:?}", project.unwrap_or("none")),
        ));
    }
    object.status = K::Status::default();
    object.validate()?;
    let secret = K::take_secret(&mut object);
    Ok((object, secret))
}

/// Adds a new object to a change, with everything that comes with it.
pub(crate) fn admit<K: Resource>(
    draft: &mut Draft,
    by: &Principal,
    object: &mut Object<K>,
    project: Option<&str>,
    sealed: Option<&str>,
) -> Result<Option<String>, ApiError> {
    let project = project.filter(|_| K::SCOPE == oblak_model::Scope::Project);
    if let Some(project) = project {
        let owner =
            draft.find_shared::<ProjectKind>("_", project)?.ok_or_else(|| ApiError::not_found("project", project))?;
        if owner.metadata.is_deleting() {
            return Err(ApiError::new(Code::WrongState, format!("project {project:?} is being deleted")));
        }
        draft.depend(&owner);
    }
    if draft.exists::<K>(project.unwrap_or("_"), &object.metadata.name)? {
        return Err(name_taken::<K>(&object.metadata.name));
    }
    draft.stamp(object, project);
    let reveal = K::create(draft, by, object, sealed)?;
    draft.create(object)?;
    Ok(reveal)
}
