//! Replacing and patching an object: labels and spec are the caller's, everything else is ours.

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use oblak_identity::{Action, Principal};
use oblak_model::meta::Labels;
use oblak_model::{ApiError, Code, Object, Problems, Revision};
use serde_json::Value;

use super::get::lookup;
use super::{Params, Place, show};
use crate::auth::Caller;
use crate::commit::transact;
use crate::docs;
use crate::draft::Draft;
use crate::error::Answer;
use crate::kinds::Resource;
use crate::request::{Payload, Query, from_json, from_value, if_match, merge_patch};
use crate::state::App;

/// What an object should become.
pub(crate) enum Wanted<K: Resource> {
    /// Exactly this.
    Whole(Labels, K::Spec),
    /// What it is, merged with this (RFC 7396).
    Patch(Value),
}

impl<K: Resource> Wanted<K> {
    fn apply(&self, old: &Object<K>) -> Result<Object<K>, ApiError> {
        let mut new = old.clone();
        match self {
            Self::Whole(labels, spec) => {
                new.metadata.labels.clone_from(labels);
                new.spec = spec.clone();
            }
            Self::Patch(patch) => {
                let plain = |e: serde_json::Error| ApiError::internal(e.to_string());
                if let Some(change) = patch.pointer("/metadata/labels") {
                    let mut labels = serde_json::to_value(&old.metadata.labels).map_err(plain)?;
                    merge_patch(&mut labels, change.clone());
                    new.metadata.labels = from_value(
                        if labels.is_null() { Value::Object(Default::default()) } else { labels },
                        "/metadata/labels",
                    )?;
                }
                if let Some(change) = patch.get("spec") {
                    let mut spec = serde_json::to_value(&old.spec).map_err(plain)?;
                    merge_patch(&mut spec, change.clone());
                    new.spec = from_value(spec, "/spec")?;
                }
            }
        }
        Ok(new)
    }
}

pub(super) async fn replace<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    headers: HeaderMap,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let (project, name) = place::<K>(&params);
    lookup::<K>(&app, &caller, project, name, Action::Update)?;
    let object: Object<K> = from_json(&body)?;
    // Whoever leaves it out hardly means that everything should be as if it had never been set.
    if from_json::<Value>(&body)?.get("spec").is_none_or(Value::is_null) {
        return Err(ApiError::invalid("/spec", "is missing; PUT replaces the whole spec, PATCH changes parts").into());
    }
    let given = object.metadata.revision;
    let expected = if_match(&headers)?.or((given != Revision::ZERO).then_some(given));
    let identity = Identity {
        name: Some(object.metadata.name.clone()).filter(|n| !n.is_empty()),
        id: Some(object.metadata.id).filter(|id| !id.is_nil()),
    };
    let wanted = Wanted::<K>::Whole(object.metadata.labels, object.spec);
    change::<K>(&app, &caller, (project, name), &wanted, expected, &identity).await
}

pub(super) async fn patch<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    headers: HeaderMap,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let (project, name) = place::<K>(&params);
    lookup::<K>(&app, &caller, project, name, Action::Update)?;
    let patch: Value = from_json(&body)?;
    let (expected, identity) = check_patch::<K>(&patch)?;
    let expected = if_match(&headers)?.or(expected);
    change::<K>(&app, &caller, (project, name), &Wanted::Patch(patch), expected, &identity).await
}

fn place<K: Resource>(params: &Place) -> (Option<&str>, &str) {
    (params.project(), params.item::<K>())
}

/// What a body says the object is; it must be that one.
#[derive(Default)]
struct Identity {
    name: Option<String>,
    id: Option<uuid::Uuid>,
}

impl Identity {
    fn check<K: Resource>(&self, object: &Object<K>) -> Result<(), ApiError> {
        if self.name.as_ref().is_some_and(|name| *name != object.metadata.name) {
            return Err(ApiError::invalid("/metadata/name", "cannot change"));
        }
        if self.id.is_some_and(|id| id != object.metadata.id) {
            return Err(ApiError::new(Code::Conflict, "the object with this id is gone; another one has its name now")
                .at("/metadata/id"));
        }
        Ok(())
    }
}

/// A patch may hold labels and spec, and may repeat what cannot change.
fn check_patch<K: Resource>(patch: &Value) -> Result<(Option<Revision>, Identity), ApiError> {
    let Value::Object(map) = patch else {
        return Err(ApiError::new(
            Code::Malformed,
            "a patch is a JSON object such as {\"spec\": {\"power\": \"stopped\"}}",
        ));
    };
    let refuse = |field: &str| Err(ApiError::invalid(field, "cannot be patched; only metadata.labels and spec can"));
    for (key, value) in map {
        match key.as_str() {
            "spec" if value.is_object() => {}
            "spec" => return Err(ApiError::invalid("/spec", "must be an object")),
            "metadata" => {}
            "kind" if value == K::KIND => {}
            other => return refuse(&format!("/{other}")),
        }
    }
    let mut identity = Identity::default();
    let mut revision = None;
    for (key, value) in map.get("metadata").and_then(Value::as_object).into_iter().flatten() {
        match key.as_str() {
            "labels" => {}
            "revision" => revision = Some(from_value(value.clone(), "/metadata/revision")?),
            "name" => identity.name = Some(from_value(value.clone(), "/metadata/name")?),
            "id" => identity.id = Some(from_value(value.clone(), "/metadata/id")?),
            other => return refuse(&format!("/metadata/{other}")),
        }
    }
    Ok((revision, identity))
}

async fn change<K: Resource>(
    app: &App,
    caller: &Caller,
    (project, name): (Option<&str>, &str),
    wanted: &Wanted<K>,
    expected: Option<Revision>,
    identity: &Identity,
) -> Answer {
    let scope = docs::scope_of::<K>(project);
    // A revision that the caller has seen elsewhere may be newer than our cache.
    if let Some(revision) = expected.filter(|r| *r > app.docs.revision()) {
        let current = app.store.revision().await?;
        if revision <= current {
            app.caught_up(revision).await?;
        }
    }
    let current = app.find::<K>(scope, name)?.ok_or_else(|| ApiError::not_found(K::KIND, name))?;
    let secret = K::take_secret(&mut wanted.apply(&current)?);
    check_secret::<K>(wanted, &current)?;
    let sealed = match secret {
        Some(secret) => Some(K::seal(app, secret).await?),
        None => None,
    };
    let ((mut object, changed), revision) = transact(app, |draft| {
        let old = draft.find::<K>(scope, name)?.ok_or_else(|| ApiError::not_found(K::KIND, name))?;
        identity.check(&old)?;
        if let Some(expected) = expected
            && old.metadata.revision != expected
        {
            return Err(ApiError::new(
                Code::PreconditionFailed,
                format!("{} is at revision {}, not {expected}; read it again", old.describe(), old.metadata.revision),
            ));
        }
        apply_spec::<K>(draft, &caller.principal, &old, wanted, sealed.as_deref())
    })
    .await?;
    if changed {
        object.metadata.revision = revision;
    }
    K::decorate(app, &mut object);
    Ok(show(StatusCode::OK, &object, revision))
}

/// Passwords are validated in clear, before they are sealed.
fn check_secret<K: Resource>(wanted: &Wanted<K>, current: &Object<K>) -> Result<(), ApiError> {
    let mut problems = Problems::new();
    K::validate(&wanted.apply(current)?.spec, &mut problems);
    problems.into_result()
}

/// Adds the change of an object to a commit. Answers the new object and whether anything changes.
pub(crate) fn apply_spec<K: Resource>(
    draft: &mut Draft,
    by: &Principal,
    old: &Object<K>,
    wanted: &Wanted<K>,
    sealed: Option<&str>,
) -> Result<(Object<K>, bool), ApiError> {
    if old.metadata.is_deleting() {
        return Err(ApiError::new(Code::WrongState, format!("{} is being deleted", old.describe())));
    }
    let mut new = wanted.apply(old)?;
    K::take_secret(&mut new);
    new.validate()?;
    let mut problems = Problems::new();
    K::validate_update(&old.spec, &new.spec, &mut problems);
    problems.into_result()?;
    if new != *old || sealed.is_some() {
        K::update(draft, by, old, &mut new, sealed)?;
    }
    let changed = new != *old || sealed.is_some();
    if changed {
        if new.spec != old.spec || sealed.is_some() {
            new.metadata.generation = old.metadata.generation + 1;
        }
        draft.update(&new);
    }
    Ok((new, changed))
}
