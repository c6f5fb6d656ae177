//! Console output of an instance, as plain text.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderValue, header};
use axum::response::IntoResponse;
use bytes::BytesMut;
use oblak_identity::Action;
use oblak_model::InstanceId;
use oblak_model::wire::StreamRequest;
use tokio::io::AsyncReadExt;

use super::guest::placed;
use super::tunnel::Stream;
use crate::auth::Caller;
use crate::error::Answer;
use crate::limits::StreamPermit;
use crate::request::Query;
use crate::state::App;

const CHUNK: usize = 32 * 1024;

pub(crate) async fn logs(
    State(app): State<App>,
    caller: Caller,
    Path(place): Path<(String, String)>,
    query: Query,
) -> Answer {
    query.only(&["tail", "follow"])?;
    let (instance, node) = placed(&app, &caller, &place, Action::Read)?;
    let (tail, follow) = (query.parsed::<u64>("tail", "a number of lines")?, query.flag("follow")?);
    let permit = app.streams.enter(&caller.principal.key())?;
    let request = StreamRequest::Logs { instance: InstanceId(instance.metadata.id), tail, follow };
    let stream = app.tunnels.open(node, &request).await?;
    let mut response = body_of(&app, stream, permit).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The bytes of a stream as a body, until it ends or the server stops. An error cuts the body off, so that it cannot be taken for whole.
pub(super) fn body_of(app: &App, stream: Stream, permit: StreamPermit) -> Body {
    let stopping = app.stopping.clone();
    let state = (stream, permit, stopping, BytesMut::new());
    Body::from_stream(futures_util::stream::try_unfold(
        state,
        |(mut stream, permit, stopping, mut buffer)| async move {
            buffer.reserve(CHUNK);
            let n = tokio::select! {
                biased;
                () = stopping.cancelled() => return Ok(None),
                n = stream.read_buf(&mut buffer) => n?,
            };
            if n == 0 {
                return Ok::<_, std::io::Error>(None);
            }
            let chunk = buffer.split().freeze();
            Ok(Some((chunk, (stream, permit, stopping, buffer))))
        },
    ))
}
