//! The generic part: list, get, watch, create, replace, patch and delete are written once for all kinds.

mod change;
mod create;
mod delete;
mod get;
mod idempotency;
mod list;
mod unfinished;
mod watch;

use axum::Router;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get};
use oblak_model::{Object, Revision, Scope};

pub(crate) use self::change::{Wanted, apply_spec};
pub(crate) use self::create::{accept, admit};
pub(crate) use self::delete::CHECK_FINALIZER;
pub(crate) use self::idempotency::{Idempotency, replayed};
pub(crate) use self::list::{PageCache, cursor};
pub(crate) use self::unfinished::finish_deletions;
pub(crate) use self::watch::event_stream;

use crate::kinds::Resource;
use crate::middleware::{REVISION, plain_value};
use crate::state::App;

/// Path parameters: `project` and the name of the object.
pub(crate) type Params = axum::extract::Path<std::collections::HashMap<String, String>>;

/// Name of the path parameter with the object's name or id. The path of a project itself shares its parameter with everything below it.
pub(crate) fn item_param<K: Resource>() -> &'static str {
    if K::SCOPE == Scope::Organization { "project" } else { "name" }
}

/// The routes of a kind.
pub(crate) fn routes<K: Resource>(router: Router<App>) -> Router<App> {
    let base = match K::SCOPE {
        Scope::Project => format!("/v1/projects/{{project}}/{}", K::PLURAL),
        Scope::Cloud | Scope::Organization => format!("/v1/{}", K::PLURAL),
    };
    let collection: MethodRouter<App> = get(list::list::<K>).post(create::create::<K>);
    let item: MethodRouter<App> =
        get(get::get::<K>).put(change::replace::<K>).patch(change::patch::<K>).delete(delete::delete::<K>);
    router.route(&base, collection).route(&format!("{base}/{{{}}}", item_param::<K>()), item)
}

/// A kind of the projects seen through all projects; read only, for cloud admins.
pub(crate) fn everywhere<K: Resource>(router: Router<App>) -> Router<App> {
    router.route(&format!("/v1/{}", K::PLURAL), get(list::everywhere::<K>))
}

/// What the projects offer to every user of a kind; read only.
pub(crate) fn offered<K: Resource>(router: Router<App>) -> Router<App> {
    router.route(&format!("/v1/{}", K::PLURAL), get(list::offered::<K>))
}

/// The answer that shows one object.
pub(crate) fn show<K: Resource>(status: StatusCode, object: &Object<K>, revision: Revision) -> Response {
    let body = serde_json::to_vec(object).unwrap_or_default();
    shown(status, body, object.metadata.revision, revision)
}

pub(crate) fn shown(status: StatusCode, body: Vec<u8>, etag: Revision, revision: Revision) -> Response {
    let mut response = (status, body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::ETAG, plain_value(format!("\"{etag}\"")));
    headers.insert(REVISION, plain_value(revision.to_string()));
    response
}
