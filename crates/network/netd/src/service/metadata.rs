//! HTTP of the metadata service.

use std::convert::Infallible;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::Context;
use crate::metadata::{Asker, respond, token};

/// Connections of one guest, and of a network.
const CONNECTIONS: (usize, usize) = (16, 256);
/// How long a guest may take to send a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection may live.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(60);
/// Headers of a request, and bytes of them together.
const MAX_HEADERS: usize = 32;
const MAX_HEAD_BYTES: usize = 8 << 10;

pub(super) async fn serve(context: Rc<Context>, listener: TcpListener) {
    super::accept(context, listener, CONNECTIONS, |context, stream, peer| async move {
        let _ = timeout(CONNECTION_TIMEOUT, connection(&context, stream, peer)).await;
    })
    .await;
}

async fn connection(context: &Context, stream: TcpStream, peer: IpAddr) {
    let service = service_fn(|request| async move { Ok::<_, Infallible>(handle(context, peer, &request)) });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(network = %context.id, %peer, %error, "a metadata connection ended");
    }
}

fn handle(context: &Context, peer: IpAddr, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    let world = context.shared.world.borrow();
    let view = world.get(context.id);
    let asker = view.as_ref().and_then(|view| Asker::find(&world, view, peer));
    let shared = &context.shared;
    let head = (request.method(), request.uri().path(), request.headers());
    let reply = respond(asker.as_ref(), &shared.secret, shared.clock.now(), head);
    tracing::debug!(network = %context.id, %peer, path = head.1, status = reply.status.as_u16(), "metadata");
    let mut response = Response::new(Full::new(Bytes::from(reply.body)));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(ttl) = reply.token_ttl_s {
        headers.insert(token::TTL, HeaderValue::from(ttl));
    }
    response
}
