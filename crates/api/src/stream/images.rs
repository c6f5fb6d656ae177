//! Content of images: uploads on their way to a node, and from one node to another.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use oblak_identity::Action;
use oblak_model::wire::{NODE_FINALIZER, StreamRequest};
use oblak_model::{ApiError, Code, Image, ImageId, ImageKind, ImagePhase, ImageSource, NodeId, NodeKind, NodePhase};
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec, MAX_PAYLOAD};
use tokio::io::AsyncWriteExt;
use tokio_util::codec::Encoder;

use super::logs::body_of;
use super::tunnel::{Stream, answer};
use crate::auth::Caller;
use crate::commit::transact;
use crate::docs::{self, BY_NODE};
use crate::error::{Answer, store_error};
use crate::node::own_node;
use crate::request::Query;
use crate::rest::show;
use crate::state::App;

/// A body that sends nothing for so long is given up.
const STALLED: Duration = Duration::from_secs(60);
/// How long the agent may check and store the content after its last byte.
const STORING: Duration = Duration::from_secs(600);
/// How long the answer waits for the agent's report.
const REPORT: Duration = Duration::from_secs(5);

/// `PUT /v1/projects/{project}/images/{image}/content`.
pub(crate) async fn upload(
    State(app): State<App>,
    caller: Caller,
    Path((project, name)): Path<(String, String)>,
    query: Query,
    headers: HeaderMap,
    request: Request,
) -> Answer {
    query.only(&[])?;
    caller.in_project(&app, Action::Update, &project)?;
    let missing = || ApiError::not_found("image", &name);
    let image = app.find::<ImageKind>(&project, &name)?.ok_or_else(missing)?;
    let checksum = checksum(&headers, &image)?;
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let permit = app.streams.enter(&caller.principal.key())?;
    let node = choose(&app, &image)?;
    let (image, _) = transact(&app, |draft| {
        let mut image = draft.get::<ImageKind>(&project, image.metadata.id)?.ok_or_else(missing)?;
        may_upload(&image)?;
        image.status.node = Some(node);
        image.metadata.finalizers.insert(NODE_FINALIZER.into());
        image.status.phase = ImagePhase::Importing;
        image.status.reason = "Uploading".into();
        image.status.message.clear();
        draft.update(&image);
        Ok(image)
    })
    .await?;
    let put = StreamRequest::ImagePut {
        image: ImageId(image.metadata.id),
        name: image.metadata.name.clone(),
        length,
        checksum,
    };
    let sent = async {
        let mut stream = app.tunnels.open(node, &put).await?;
        send(&mut stream, request.into_body()).await
    };
    let outcome = sent.await;
    drop(permit);
    if let Err(error) = outcome {
        give_back(&app, &project, &image, &error).await;
        return Err(error.into());
    }
    let image = reported(&app, &project, &image).await?;
    let revision = app.docs.revision();
    Ok(show(StatusCode::OK, &image, revision))
}

fn may_upload(image: &Image) -> Result<(), ApiError> {
    let wrong = |why: &str| Err(ApiError::new(Code::WrongState, format!("{} {why}", image.describe())));
    if image.metadata.is_deleting() {
        return wrong("is being deleted");
    }
    if image.spec.source != (ImageSource::Upload {}) {
        return wrong("is not filled by an upload; its spec.source says where its content comes from");
    }
    if image.status.phase == ImagePhase::Ready {
        return wrong("has its content already; make a new image");
    }
    Ok(())
}

fn checksum(headers: &HeaderMap, image: &Image) -> Result<Option<String>, ApiError> {
    let given = headers.get("x-checksum").map(|v| v.to_str().unwrap_or_default().to_string());
    if let Some(text) = &given {
        let ok =
            text.strip_prefix("sha256:").is_some_and(|h| h.len() == 64 && h.bytes().all(|b| b.is_ascii_hexdigit()));
        if !ok {
            return Err(ApiError::new(Code::Malformed, "X-Checksum must be sha256: and 64 hexadecimal digits"));
        }
    }
    match (&image.spec.checksum, given) {
        (Some(spec), Some(given)) if *spec != given.to_ascii_lowercase() => {
            Err(ApiError::invalid("/spec/checksum", "differs from X-Checksum"))
        }
        (Some(spec), _) => Ok(Some(spec.clone())),
        (None, given) => Ok(given.map(|text| text.to_ascii_lowercase())),
    }
}

/// The node of a broken upload before, else any that is ready and connected here.
fn choose(app: &App, image: &Image) -> Result<NodeId, ApiError> {
    let connected = app.tunnels.nodes();
    let ready = |id: &&NodeId| {
        app.find::<NodeKind>("_", &id.to_string()).ok().flatten().is_some_and(|n| n.status.phase == NodePhase::Ready)
    };
    if let Some(node) = image.status.node {
        return Ok(node);
    }
    let none = || {
        ApiError::new(Code::NodeUnreachable, "no ready node is connected to take the content; see `oblak node list`")
    };
    connected.iter().find(ready).copied().ok_or_else(none)
}

async fn send(stream: &mut Stream, mut body: Body) -> Result<(), ApiError> {
    let early = |why: std::io::Error| {
        ApiError::new(Code::NodeUnreachable, "the node stopped taking the content").inside(why.to_string())
    };
    loop {
        let frame = tokio::time::timeout(STALLED, body.frame()).await;
        let frame = frame.map_err(|_| ApiError::new(Code::Malformed, "the upload stalled; send it again"))?;
        let Some(frame) = frame else { break };
        let frame = frame
            .map_err(|e| ApiError::new(Code::Malformed, "the upload broke off; send it again").inside(e.to_string()))?;
        let Ok(data) = frame.into_data() else { continue };
        if let Err(error) = send_frames(stream, data).await {
            // The agent has closed its side; it says why before it does.
            return match tokio::time::timeout(Duration::from_secs(5), answer(stream)).await {
                Ok(Err(said)) => Err(said),
                _ => Err(early(error)),
            };
        }
    }
    // Said aloud: a connection that breaks ends the stream too.
    send_frame(stream, Frame::control(&Control::Eof)).await.map_err(early)?;
    stream.flush().await.map_err(early)?;
    let late = |_| ApiError::new(Code::NodeUnreachable, "the node did not finish storing the content in time");
    tokio::time::timeout(STORING, answer(stream)).await.map_err(late)?
}

async fn send_frames(stream: &mut Stream, mut data: Bytes) -> std::io::Result<()> {
    while !data.is_empty() {
        let piece = data.split_to(data.len().min(MAX_PAYLOAD));
        send_frame(stream, Frame::new(Channel::Stdin, piece)).await?;
    }
    Ok(())
}

async fn send_frame(stream: &mut Stream, frame: Frame) -> std::io::Result<()> {
    let mut out = BytesMut::new();
    FrameCodec.encode(frame, &mut out)?;
    stream.write_all(&out).await
}

/// An upload that failed may be repeated.
async fn give_back(app: &App, project: &str, image: &Image, error: &ApiError) {
    let id = image.metadata.id;
    let done = transact(app, |draft| {
        if let Some(mut image) = draft.get::<ImageKind>(project, id)?
            && image.status.phase == ImagePhase::Importing
        {
            image.status.phase = ImagePhase::Pending;
            image.status.reason = "UploadFailed".into();
            image.status.message = error.detail.clone();
            draft.update(&image);
        }
        Ok(())
    })
    .await;
    if let Err(error) = done {
        tracing::warn!(%id, %error, "a failed upload stays marked as running");
    }
}

/// The image once the agent's report is in, or as it is after a while.
async fn reported(app: &App, project: &str, image: &Image) -> Result<Image, ApiError> {
    let mut changes = app.docs.subscribe();
    let deadline = tokio::time::Instant::now() + REPORT;
    loop {
        let now = app.find::<ImageKind>(project, &image.metadata.id.to_string())?;
        let now = now.ok_or_else(|| ApiError::not_found("image", &image.metadata.name))?;
        if now.status.phase != ImagePhase::Importing || tokio::time::timeout_at(deadline, changes.next()).await.is_err()
        {
            return Ok(now);
        }
    }
}

/// `GET /v1/nodes/{id}/images/{image}/content`: the agent of one node reads an image that another one has.
pub(crate) async fn image_for_node(
    State(app): State<App>,
    caller: Caller,
    Path((name, image)): Path<(String, String)>,
    query: Query,
) -> Answer {
    query.only(&[])?;
    let node = own_node(&caller, &name)?;
    let missing = || ApiError::not_found("image", &image);
    let id: ImageId = image.parse().map_err(|_| missing())?;
    let used = app.docs.view(|view| {
        view.find(BY_NODE, &format!("instance/{node}"))
            .any(|item| item.value.object().and_then(|doc| doc.image) == Some(id.0))
    });
    if !used && !docs::is_kept_everywhere(&app.docs, id.0) {
        return Err(missing().into());
    }
    let items = docs::all::<ImageKind>(&app.docs, None);
    let item = items.iter().find(|item| item.value.object().is_some_and(|doc| doc.id == id.0)).ok_or_else(missing)?;
    let object: Image = docs::object(item).map_err(|e| store_error(&e))?;
    if object.status.phase != ImagePhase::Ready {
        return Err(ApiError::new(Code::WrongState, format!("{} is not ready yet", object.describe())).into());
    }
    let source = holder(&app, &object, node).ok_or_else(|| {
        ApiError::new(Code::NodeUnreachable, format!("no node that has {} is connected now", object.describe()))
    })?;
    let permit = app.streams.enter(&caller.principal.key())?;
    let stream = app.tunnels.open(source, &StreamRequest::ImageGet { image: id }).await?;
    let mut response = body_of(&app, stream, permit).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-tar"));
    Ok(response)
}

/// A connected node with a copy, other than the one that asks; the node that imported it when there is a choice.
fn holder(app: &App, image: &Image, asks: NodeId) -> Option<NodeId> {
    let connected = app.tunnels.nodes();
    let all = image.status.node.iter().chain(&image.status.nodes).copied();
    let mut others = all.filter(|node| *node != asks && connected.binary_search(node).is_ok());
    others.next()
}
