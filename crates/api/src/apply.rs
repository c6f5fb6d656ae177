//! Many resources at once: all of them become what they should be, in one commit, or none does. A plan stops before the commit.

use axum::extract::{Path, State};
use axum::http::{Method, StatusCode, Uri};
use oblak_control::lifecycle::{DEFAULT_STRATEGY, explanation, request};
use oblak_identity::{Action as Right, Principal};
use oblak_model::wire::{Action, Applied, Apply, Change, FieldChange, Resource as Item};
use oblak_model::{ApiError, Code, FlavorKind, Instance, InstanceKind, Kind, Object, Problems, Scope};
use oblak_scheduler as scheduler;
use oblak_store::MAX_TXN_OPS;
use serde_json::Value;

use crate::auth::Caller;
use crate::commit::transact;
use crate::draft::Draft;
use crate::error::Answer;
use crate::explain::world;
use crate::kinds::{Resource, instance_volumes};
use crate::request::{Payload, Query, from_json, from_value};
use crate::rest::{Idempotency, IdempotencyHeader, Wanted, accept, admit, apply_spec, replayed, shown};
use crate::state::App;

/// Fields of one resource that a plan lists.
const FIELDS: usize = 200;
/// Kinds in the order in which one may refer to another.
const ORDER: [&str; 9] =
    ["project", "key", "network", "security-group", "subnet", "image", "volume", "snapshot", "instance"];

#[allow(clippy::too_many_arguments)] // each is an extractor
pub(crate) async fn apply(
    State(app): State<App>,
    caller: Caller,
    Path(project): Path<String>,
    query: Query,
    method: Method,
    uri: Uri,
    idempotency: IdempotencyHeader,
    Payload(body): Payload,
) -> Answer {
    query.only(&["plan"])?;
    let plan = query.flag("plan")?;
    caller.in_project(&app, if plan { Right::Read } else { Right::Create }, &project)?;
    if plan {
        let apply: Apply = from_json(&body)?;
        let mut draft = Draft::new(&app);
        let mut applied = change(&mut draft, &caller.principal, &project, &apply)?;
        fits(&draft, &apply)?;
        place(&mut draft, &project, &mut applied)?;
        applied.revision = app.docs.revision();
        return answer(&applied);
    }
    let mut idempotency = Idempotency::of(&idempotency, &caller.principal, &method, uri.path(), &body)?;
    if let Some(key) = &mut idempotency
        && let Some(record) = key.earlier(&app).await?
    {
        return Ok(replayed(&app, &record)?);
    }
    let apply: Apply = from_json(&body)?;
    let outcome = transact(&app, |draft| {
        let applied = change(draft, &caller.principal, &project, &apply)?;
        let writes = !draft.batch.is_empty();
        if writes && let Some(idempotency) = &idempotency {
            let body = serde_json::to_string(&Applied { committed: true, ..applied.clone() });
            idempotency.record(draft, None, Some(body.map_err(|e| ApiError::internal(e.to_string()))?));
        }
        fits(draft, &apply)?;
        Ok((applied, writes))
    })
    .await;
    match outcome {
        Ok(((mut applied, writes), revision)) => {
            applied.committed = writes;
            applied.revision = revision;
            answer(&applied)
        }
        Err(error) => {
            if let Some(key) = &mut idempotency
                && let Ok(Some(record)) = key.earlier(&app).await
            {
                return Ok(replayed(&app, &record)?);
            }
            Err(error.into())
        }
    }
}

fn fits(draft: &Draft, apply: &Apply) -> Result<(), ApiError> {
    let ops = draft.batch.ops();
    if ops <= MAX_TXN_OPS {
        return Ok(());
    }
    let count = apply.resources.len();
    let part = (count * MAX_TXN_OPS / ops).max(1);
    Err(ApiError::new(
        Code::TooLarge,
        format!(
            "these {count} resources need {ops} operations in one commit, {MAX_TXN_OPS} are possible; apply them in parts of about {part}"
        ),
    ))
}

fn answer(applied: &Applied) -> Answer {
    let body = serde_json::to_vec(applied).map_err(|e| ApiError::internal(e.to_string()))?;
    Ok(shown(StatusCode::OK, body, applied.revision, applied.revision))
}

/// Plans all resources into the draft. Errors name the resource.
fn change(draft: &mut Draft, by: &Principal, project: &str, apply: &Apply) -> Result<Applied, ApiError> {
    if apply.resources.len() > MAX_TXN_OPS {
        return Err(ApiError::new(
            Code::TooLarge,
            format!(
                "{} resources at once, at most {MAX_TXN_OPS} are possible; apply them in several parts",
                apply.resources.len()
            ),
        ));
    }
    let mut order: Vec<usize> = (0..apply.resources.len()).collect();
    let rank = |i: &usize| ORDER.iter().position(|kind| *kind == apply.resources[*i].kind).unwrap_or(ORDER.len());
    order.sort_by_key(rank);
    let mut changes: Vec<Option<Change>> = vec![None; apply.resources.len()];
    for i in order {
        let item = &apply.resources[i];
        let twice =
            apply.resources[..i].iter().any(|o| (&o.kind, &o.metadata.name) == (&item.kind, &item.metadata.name));
        if twice {
            return Err(ApiError::invalid(
                &format!("/resources/{i}"),
                format!("{}/{} is there twice", item.kind, item.metadata.name),
            ));
        }
        changes[i] = Some(one(draft, by, project, item).map_err(|e| at_resource(e, i, item))?);
    }
    let mut applied = Applied {
        changes: changes.into_iter().flatten().collect(),
        committed: false,
        revision: draft.app.docs.revision(),
        price_per_hour_micros: 0,
    };
    applied.price_per_hour_micros = price(draft, project, apply)?;
    Ok(applied)
}

fn at_resource(mut error: ApiError, index: usize, item: &Item) -> ApiError {
    let prefix = format!("/resources/{index}");
    error.detail = format!("{}/{}: {}", item.kind, item.metadata.name, error.detail);
    error.field = Some(format!("{prefix}{}", error.field.unwrap_or_default()));
    for problem in &mut error.errors {
        problem.field = format!("{prefix}{}", problem.field);
    }
    error
}

fn one(draft: &mut Draft, by: &Principal, project: &str, item: &Item) -> Result<Change, ApiError> {
    macro_rules! dispatch {
        ($($kind:ty),* $(,)?) => {
            $(
                if item.kind == <$kind as Kind>::KIND && <$kind as Kind>::SCOPE == Scope::Project && <$kind as Kind>::CREATABLE {
                    return one_of::<$kind>(draft, by, project, item);
                }
            )*
        };
    }
    oblak_model::for_each_kind!(dispatch);
    Err(ApiError::invalid(
        "/kind",
        format!("{:?} cannot be applied; kinds of a project are {}", item.kind, ORDER[1..].join(", ")),
    ))
}

fn one_of<K: Resource>(draft: &mut Draft, by: &Principal, project: &str, item: &Item) -> Result<Change, ApiError> {
    let spec: K::Spec = from_value(
        if item.spec.is_null() { Value::Object(serde_json::Map::new()) } else { item.spec.clone() },
        "/spec",
    )?;
    let name = item.metadata.name.as_str();
    let mut wanted = Object::<K>::new(name, spec);
    wanted.metadata.labels.clone_from(&item.metadata.labels);
    let existing = if name.parse::<uuid::Uuid>().is_ok() { None } else { draft.find::<K>(project, name)? };
    let mut change = Change {
        kind: K::KIND.into(),
        name: name.into(),
        action: Action::Create,
        fields: Vec::new(),
        node: None,
        why: None,
        explanation: None,
    };
    let (old, new) = match existing {
        None => {
            let (mut object, secret) = accept::<K>(wanted, None)?;
            admit::<K>(draft, by, &mut object, Some(project), secret.as_deref())?;
            (Value::Null, object)
        }
        Some(old) => {
            wanted.metadata.project = old.metadata.project.clone();
            wanted.validate()?;
            let mut problems = Problems::new();
            fill_defaults::<K>(&mut wanted, &old);
            K::validate(&wanted.spec, &mut problems);
            problems.into_result()?;
            let secret = K::take_secret(&mut wanted);
            let target = Wanted::<K>::Whole(wanted.metadata.labels, wanted.spec);
            let (new, changed) = apply_spec::<K>(draft, by, &old, &target, secret.as_deref())?;
            change.action = if changed { Action::Update } else { Action::Unchanged };
            (shape(&old)?, new)
        }
    };
    diff("", &old, &shape(&new)?, &mut change.fields);
    change.fields.retain(|field| field.old != field.new);
    Ok(change)
}

/// What the server fills in at creation counts as the same when it is left out again.
fn fill_defaults<K: Resource>(wanted: &mut Object<K>, old: &Object<K>) {
    use std::any::Any;
    let (wanted, old): (&mut dyn Any, &dyn Any) = (&mut wanted.spec, &old.spec);
    if let (Some(wanted), Some(old)) =
        (wanted.downcast_mut::<oblak_model::ImageSpec>(), old.downcast_ref::<oblak_model::ImageSpec>())
    {
        wanted.retry_generation = wanted.retry_generation.max(old.retry_generation);
    }
    if let (Some(wanted), Some(old)) =
        (wanted.downcast_mut::<oblak_model::InstanceSpec>(), old.downcast_ref::<oblak_model::InstanceSpec>())
    {
        if wanted.flavor.is_empty() {
            wanted.flavor.clone_from(&old.flavor);
        }
        // Counters that commands have raised are not taken back by a file that does not mention them.
        wanted.restart_generation = wanted.restart_generation.max(old.restart_generation);
        if wanted.restore.is_none() {
            wanted.restore.clone_from(&old.restore);
        }
    }
}

fn shape<K: Kind>(object: &Object<K>) -> Result<Value, ApiError> {
    let internal = |e: serde_json::Error| ApiError::internal(e.to_string());
    let labels = serde_json::to_value(&object.metadata.labels).map_err(internal)?;
    let spec = serde_json::to_value(&object.spec).map_err(internal)?;
    Ok(serde_json::json!({"metadata": {"labels": labels}, "spec": spec}))
}

/// Leaves that differ, by JSON pointer.
fn diff(pointer: &str, old: &Value, new: &Value, out: &mut Vec<FieldChange>) {
    if old == new || out.len() >= FIELDS {
        return;
    }
    let empty = serde_json::Map::new();
    let maps = match (old, new) {
        (Value::Object(a), Value::Object(b)) => Some((a, b)),
        (Value::Null, Value::Object(b)) if !b.is_empty() => Some((&empty, b)),
        _ => None,
    };
    let Some((a, b)) = maps else {
        let some = |v: &Value| Some(v.clone()).filter(|v| !v.is_null());
        out.push(FieldChange { field: pointer.into(), old: some(old), new: some(new) });
        return;
    };
    let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    for key in keys {
        let below = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
        diff(&below, a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), out);
    }
}

/// An hour of all instances that were applied.
fn price(draft: &Draft, project: &str, apply: &Apply) -> Result<u64, ApiError> {
    let mut sum = 0u64;
    for item in apply.resources.iter().filter(|item| item.kind == InstanceKind::KIND) {
        if let Some(instance) = draft.find::<InstanceKind>(project, &item.metadata.name)?
            && let Some(flavor) = draft.find::<FlavorKind>("_", &instance.status.resolved.flavor)?
        {
            sum = sum.saturating_add(flavor.spec.price_per_hour_micros);
        }
    }
    Ok(sum)
}

/// Where each new instance would land, one after the other, as the scheduler would do it now.
fn place(draft: &mut Draft, project: &str, applied: &mut Applied) -> Result<(), ApiError> {
    let mut world = world(draft)?;
    for change in applied.changes.iter_mut().filter(|change| change.kind == InstanceKind::KIND) {
        let Some(instance): Option<Instance> = draft.find::<InstanceKind>(project, &change.name)? else { continue };
        if let Some(placement) = &instance.status.placement {
            change.node = Some(placement.node_name.clone());
            continue;
        }
        let request = request(&instance, &instance_volumes(draft, &instance)?, DEFAULT_STRATEGY);
        match scheduler::decide(&world, &request) {
            Ok(decision) => {
                change.node = Some(decision.name.to_string());
                change.why = Some(decision.why.to_string());
                // Reserved in this copy of the world only.
                let _ = world.place(request.placed_on(decision.node));
            }
            Err(why) => {
                let why = explanation(&why);
                change.why = Some(why.to_string());
                change.explanation = Some(why);
            }
        }
    }
    Ok(())
}
