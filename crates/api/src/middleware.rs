//! What every request passes: an id, the access log, metrics, and errors written as problem documents.

use std::convert::Infallible;
use std::fmt::{self, Write};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use oblak_model::{ApiError, Code};
use oblak_platform::random::SharedRandom;
use tower::{Layer, Service};

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
        Self(given.filter(plain).cloned().unwrap_or_else(|| app.request_ids.next()))
    }
}

/// Longest text of [`plain_value`].
const PLAIN: usize = 64;

/// A header's value from short text that consists of visible ASCII. Written in place and copied once.
pub(crate) fn plain_value(text: fmt::Arguments<'_>) -> HeaderValue {
    let mut short = Short { bytes: [0; PLAIN], len: 0 };
    // What is too long is cut; nothing of ours is.
    let _ = short.write_fmt(text);
    HeaderValue::from_bytes(&short.bytes[..short.len]).unwrap_or(HeaderValue::from_static(""))
}

struct Short {
    bytes: [u8; PLAIN],
    len: usize,
}

impl Write for Short {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let rest = self.bytes.get_mut(self.len..self.len + text.len()).ok_or(fmt::Error)?;
        rest.copy_from_slice(text.as_bytes());
        self.len += text.len();
        Ok(())
    }
}

/// Gives out ids that no other request has: a word that is new with each start of a server, and a count.
pub(crate) struct RequestIds {
    /// The word, in hexadecimal digits.
    start: String,
    count: AtomicU64,
}

impl RequestIds {
    pub fn new(random: &SharedRandom) -> Self {
        let mut bytes = [0; 8];
        random.fill(&mut bytes);
        Self { start: format!("{:016x}", u64::from_be_bytes(bytes)), count: AtomicU64::new(1) }
    }

    fn next(&self) -> HeaderValue {
        let mut id = plain_value(format_args!("{}-{}", self.start, self.count.fetch_add(1, Ordering::Relaxed)));
        // Nothing secret, but never the same twice: HTTP/2 would fill its table of headers with them, and search that for each answer.
        id.set_sensitive(true);
        id
    }
}

/// The outermost layer. A service of its own and no function: axum clones and boxes what a function calls, for every request.
#[derive(Clone)]
pub(crate) struct Track(pub App);

impl<S> Layer<S> for Track {
    type Service = Tracked<S>;
    fn layer(&self, inner: S) -> Tracked<S> {
        Tracked { inner, app: self.0.clone() }
    }
}

/// A service behind [`Track`].
#[derive(Clone)]
pub(crate) struct Tracked<S> {
    inner: S,
    app: App,
}

impl<S> Service<Request> for Tracked<S>
where
    S: Service<Request, Response = Response, Error = Infallible>,
    S::Future: Unpin,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Tracking<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let seen = Seen {
            id: RequestId::of(&request, &self.app),
            method: request.method().clone(),
            uri: request.uri().clone(),
            route: request.extensions().get::<MatchedPath>().cloned(),
            // Latency is for the operator's eyes; virtual time has nothing to do with it.
            start: Instant::now(),
        };
        Tracking { answer: self.inner.call(request), seen, app: self.app.clone() }
    }
}

/// What is known of a request under way.
struct Seen {
    id: RequestId,
    method: Method,
    uri: Uri,
    route: Option<MatchedPath>,
    start: Instant,
}

/// A request under way.
pub(crate) struct Tracking<F> {
    answer: F,
    seen: Seen,
    app: App,
}

impl<F: Future<Output = Result<Response, Infallible>> + Unpin> Future for Tracking<F> {
    type Output = Result<Response, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Ok(response) = ready!(Pin::new(&mut self.answer).poll(context));
        Poll::Ready(Ok(finish(&self.app, &self.seen, response)))
    }
}

fn finish(app: &App, seen: &Seen, mut response: Response) -> Response {
    let Seen { id, method, uri, route, start } = seen;
    if let Some(fault) = response.extensions_mut().remove::<Fault>() {
        response = problem(fault, id, method, uri);
    }
    let elapsed = start.elapsed();
    let status = response.status();
    app.metrics.request(method, route.as_ref().map_or("none", MatchedPath::as_str), status.as_u16(), elapsed);
    tracing::debug!(target: "oblak::access", %id, %method, path = uri.path(), status = status.as_u16(), micros = elapsed.as_micros(), "request");
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, id.0.clone());
    if !headers.contains_key(REVISION) {
        headers.insert(REVISION, plain_value(format_args!("{}", app.docs.revision())));
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

fn problem(fault: Fault, id: &RequestId, method: &Method, uri: &Uri) -> Response {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_as_they_are_written_and_too_long_ones_are_cut() {
        assert_eq!(plain_value(format_args!("\"{}-{}\"", 1, 42)), "\"1-42\"");
        assert_eq!(plain_value(format_args!("{}{}", "a", "b".repeat(PLAIN))), "a");
        let ids = RequestIds::new(&oblak_platform::random::system());
        let (first, second) = (ids.next(), ids.next());
        assert_ne!(first, second);
        assert!(first.to_str().unwrap().ends_with("-1") && second.to_str().unwrap().ends_with("-2"));
    }
}
