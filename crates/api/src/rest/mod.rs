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
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{MethodRouter, get};
use oblak_model::{Object, Revision, Scope};
use serde::Deserialize;

pub(crate) use self::change::{Wanted, apply_spec};
pub(crate) use self::create::{accept, admit};
pub(crate) use self::delete::CHECK_FINALIZER;
pub(crate) use self::idempotency::{Idempotency, IdempotencyHeader, replayed};
pub(crate) use self::list::{PageCache, cursor};
pub(crate) use self::unfinished::finish_deletions;
pub(crate) use self::watch::event_stream;

use crate::kinds::Resource;
use crate::middleware::{REVISION, plain_value};
use crate::state::App;

/// Path parameters.
pub(crate) type Params = axum::extract::Path<Place>;

/// Where an object is.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Place {
    #[serde(default)]
    project: Option<String>,
    #[serde(default)]
    name: Option<String>,
}

impl Place {
    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// The object's name or id.
    pub fn item<K: Resource>(&self) -> &str {
        let item = if K::SCOPE == Scope::Organization { &self.project } else { &self.name };
        item.as_deref().unwrap_or_default()
    }
}

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

/// Room for the headers of an answer with those that the layers around add, so that it is made once.
const HEADERS: usize = 10;

pub(crate) fn shown(status: StatusCode, body: Vec<u8>, etag: Revision, revision: Revision) -> Response {
    let mut response = Response::new(Body::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.reserve(HEADERS);
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::ETAG, plain_value(format_args!("\"{etag}\"")));
    headers.insert(REVISION, plain_value(format_args!("{revision}")));
    response
}
