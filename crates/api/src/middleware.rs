//! What every request passes: an id, the access log, metrics, and errors written as problem documents.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use oblak_model::{ApiError, Code};
use oblak_platform::random::SharedRandom;

use crate::error::Fault;
use crate::state::App;

/// Header with the id of a request, both ways.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Header with the revision that an answer shows.
pub(crate) const REVISION: HeaderName = HeaderName::from_static("x-oblak-revision");

/// Id of a request: the caller's, when it is short and plain, else ours.
#[derive(Clone, Debug)]
pub(crate) struct RequestId(HeaderValue);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}

impl RequestId {
    fn of(request: &Request, app: &App) -> Self {
        let given = request.headers().get(REQUEST_ID);
        let plain = |value: &&HeaderValue| {
            let text = value.as_bytes();
            (1..=64).contains(&text.len()) && text.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
        };
        Self(given.filter(plain).cloned().unwrap_or_else(|| plain_value(app.request_ids.next())))
    }
}

/// A header's value from text that consists of visible ASCII.
pub(crate) fn plain_value(text: String) -> HeaderValue {
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static(""))
}

/// Gives out ids that no other request has: a word that is new with each start of a server, and a count.
pub(crate) struct RequestIds {
    start: u64,
    count: AtomicU64,
}

impl RequestIds {
    pub fn new(random: &SharedRandom) -> Self {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        Self { start: u64::from_be_bytes(bytes), count: AtomicU64::new(1) }
    }

    fn next(&self) -> String {
        format!("{:016x}-{}", self.start, self.count.fetch_add(1, Ordering::Relaxed))
    }
}

/// The outermost layer.
pub(crate) async fn track(State(app): State<App>, request: Request, next: Next) -> Response {
    let id = RequestId::of(&request, &app);
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let route = request.extensions().get::<MatchedPath>().cloned();
    // Latency is for the operator's eyes; virtual time has nothing to do with it.
    let start = Instant::now();
    let mut response = next.run(request).await;
    if let Some(fault) = response.extensions_mut().remove::<Fault>() {
        response = problem(&app, fault, &id, &method, &uri);
    }
    let elapsed = start.elapsed();
    let status = response.status();
    app.metrics.request(&method, route.as_ref().map_or("none", MatchedPath::as_str), status.as_u16(), elapsed);
    tracing::debug!(target: "oblak::access", %id, %method, path = uri.path(), status = status.as_u16(), micros = elapsed.as_micros(), "request");
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id.0);
    if !headers.contains_key(REVISION) {
        headers.insert(REVISION, plain_value(app.docs.revision().to_string()));
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn problem(_: &App, fault: Fault, id: &RequestId, method: &Method, uri: &Uri) -> Response {
    let mut error = fault.0;
    error.request_id = Some(id.to_string());
    let inside = error.inside.take();
    if error.status >= 500 && error.code != Code::Unsupported {
        tracing::error!(target: "oblak::access", %id, %method, path = uri.path(), code = %error.code, detail = error.detail, inside, "request failed");
    } else {
        tracing::debug!(target: "oblak::access", %id, %method, path = uri.path(), code = %error.code, detail = error.detail, inside, "request refused");
    }
    let status = StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let body = serde_json::to_vec(&*error).unwrap_or_default();
    let mut response = (status, Body::from(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
    match error.code {
        Code::Unauthenticated => {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"oblak\""));
        }
        Code::RateLimited | Code::Unavailable | Code::NodeUnreachable => {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        _ => {}
    }
    response
}

/// Paths that do not exist.
pub(crate) async fn not_found(uri: Uri) -> Fault {
    ApiError::new(Code::NotFound, format!("there is nothing at {}; see /docs", uri.path())).into()
}

/// Methods that a path does not have.
pub(crate) async fn wrong_method(method: Method, uri: Uri) -> Fault {
    let mut error = ApiError::new(Code::Unsupported, format!("{} does not take {method}; see /docs", uri.path()));
    error.status = StatusCode::METHOD_NOT_ALLOWED.as_u16();
    error.into()
}
