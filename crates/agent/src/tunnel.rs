//! The tunnel: the API opens streams on it, the agent serves them.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use oblak_compute::{ComputeDriver, ExecRequest};
use oblak_model::InstanceId;
use oblak_model::wire::{StreamAnswer, StreamRequest};
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio_util::compat::{FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::context::Context;
use crate::servers::End;

/// Streams served at the same time.
const MAX_STREAMS: usize = 512;
/// Bytes copied at once from a guest.
const CHUNK: usize = 16 * 1024;
/// Longest first line.
const MAX_HEADER: u64 = 256 * 1024;

/// Keeps one tunnel to each server until the agent ends, so that every server can open streams.
pub async fn run(ctx: Arc<Context>) {
    let mut changes = ctx.servers.subscribe();
    let mut open: BTreeMap<End, (Vec<String>, CancellationToken)> = BTreeMap::new();
    loop {
        let wanted = changes.borrow_and_update().ends();
        open.retain(|end, (urls, stop)| {
            let stays = wanted.get(end) == Some(urls);
            if !stays {
                stop.cancel();
            }
            stays
        });
        for (end, urls) in wanted {
            open.entry(end).or_insert_with(|| {
                let stop = ctx.cancel.child_token();
                oblak_platform::task::spawn(keep(ctx.clone(), urls.clone(), stop.clone()));
                (urls, stop)
            });
        }
        tokio::select! {
            biased;
            () = ctx.cancel.cancelled() => return,
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Serves until stopped; dials again when the connection breaks.
async fn keep(ctx: Arc<Context>, urls: Vec<String>, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
    while !stop.is_cancelled() {
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            outcome = serve(&ctx, &urls, &mut backoff) => outcome,
        };
        tracing::debug!(?outcome, ?urls, "a tunnel ended; dialling again");
        tokio::select! { biased; () = stop.cancelled() => return, () = tokio::time::sleep(backoff.next()) => {} }
    }
}

async fn serve(ctx: &Arc<Context>, urls: &[String], backoff: &mut Backoff) -> Result<(), String> {
    let mut dialled = Err("the server has no address".to_string());
    for url in urls {
        dialled = match ctx.client.only(url) {
            Ok(client) => client.node_tunnel(ctx.config.node).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if dialled.is_ok() {
            break;
        }
    }
    let bytes = dialled?;
    backoff.reset();
    let mut connection = yamux::Connection::new(bytes.compat(), yamux::Config::default(), yamux::Mode::Server);
    let slots = Arc::new(tokio::sync::Semaphore::new(MAX_STREAMS));
    while let Some(stream) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
        let stream = stream.map_err(|e| e.to_string())?;
        let (ctx, slots) = (ctx.clone(), slots.clone());
        oblak_platform::task::spawn(async move {
            let Ok(_slot) = slots.try_acquire() else { return };
            let cancel = ctx.cancel.clone();
            tokio::select! { () = one(&ctx, stream.compat()) => {}, () = cancel.cancelled() => {} }
        });
    }
    Ok(())
}

/// One stream.
async fn one(ctx: &Arc<Context>, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), (&mut stream).take(MAX_HEADER).read_line(&mut line)).await;
    let request: Result<StreamRequest, String> = match read {
        Ok(Ok(_)) => serde_json::from_str(&line).map_err(|e| e.to_string()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err("no request came".into()),
    };
    let outcome = match request {
        Ok(request) => handle(ctx, request, &mut stream).await,
        Err(e) => Err(DriverError::permanent("malformed", format!("the stream request cannot be read: {e}"))),
    };
    if let Err(error) = outcome {
        let _ = answer(&mut stream, &StreamAnswer::Error { code: error.code, detail: error.detail }).await;
    }
    let _ = stream.shutdown().await;
}

async fn answer(stream: &mut (impl AsyncWrite + Unpin), answer: &StreamAnswer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}

fn driver(ctx: &Context, id: InstanceId) -> DriverResult<Arc<dyn ComputeDriver>> {
    let isolation = ctx.world().instances.get(&id).map(|i| i.status.resolved.isolation);
    let isolation = isolation.ok_or_else(|| DriverError::gone("the instance is not on this node"))?;
    ctx.drivers
        .compute
        .get(&isolation)
        .cloned()
        .ok_or_else(|| DriverError::unsupported(format!("no driver for {isolation}")))
}

fn lacking(what: &str) -> DriverError {
    DriverError::unsupported(format!("instances of this isolation have no {what}"))
}

async fn handle<S: AsyncRead + AsyncWrite + Unpin + Send>(
    ctx: &Arc<Context>,
    request: StreamRequest,
    stream: &mut BufReader<S>,
) -> DriverResult<()> {
    match request {
        StreamRequest::Console { instance } => {
            let driver = driver(ctx, instance)?;
            let guest = driver.console().ok_or_else(|| lacking("console"))?.console(instance).await?;
            join(stream, guest).await
        }
        StreamRequest::Exec { instance, argv, env, cwd, user, tty } => {
            let driver = driver(ctx, instance)?;
            let request = ExecRequest { argv, env, cwd, user, tty };
            let guest = driver.exec().ok_or_else(|| lacking("exec"))?.exec(instance, &request).await?;
            join(stream, guest).await
        }
        StreamRequest::Vnc { instance } => {
            let driver = driver(ctx, instance)?;
            let guest = driver.vnc().ok_or_else(|| lacking("screen"))?.vnc(instance).await?;
            join(stream, guest).await
        }
        StreamRequest::Forward { instance, port } => {
            let guest = dial(ctx, instance, port).await?;
            join(stream, guest).await
        }
        StreamRequest::Logs { instance, tail, follow } => {
            let mut logs = driver(ctx, instance)?.logs(instance, tail, follow).await?;
            ok(stream).await?;
            copy_until_closed(stream, &mut logs).await;
            Ok(())
        }
        StreamRequest::ImageGet { image } => {
            let mut content = ctx.drivers.images.export(image).await?;
            ok(stream).await?;
            copy_until_closed(stream, &mut content).await;
            Ok(())
        }
        StreamRequest::ImagePut { image, name, length, checksum } => {
            image_put(ctx, stream, image, &name, length, checksum.as_deref()).await
        }
    }
}

async fn ok(stream: &mut (impl AsyncWrite + Unpin)) -> DriverResult<()> {
    answer(stream, &StreamAnswer::Ok).await.map_err(|e| DriverError::io("the tunnel", &e))
}

async fn join<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: &mut BufReader<S>,
    guest: BoxDuplex,
) -> DriverResult<()> {
    ok(stream).await?;
    let (mut from_api, mut to_api) = tokio::io::split(stream);
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    // The guest's end decides. When it takes nothing more, what it said last still has to go up; that is why an error of this
    // direction ends nothing. What went wrong is told inside the frames, not here.
    let up = drain(&mut from_guest, &mut to_api);
    let down = async {
        let _ = tokio::io::copy(&mut from_api, &mut to_guest).await;
        let _ = to_guest.shutdown().await;
        std::future::pending::<()>().await;
    };
    tokio::select! { () = up => {}, () = down => {} }
    Ok(())
}

/// Copies until the source ends or breaks. Unlike tokio's copy it never reads ahead of what is written: a source that breaks after
/// its last words does not take them along.
async fn drain(source: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) {
    let mut buffer = vec![0u8; CHUNK];
    while let Ok(n @ 1..) = source.read(&mut buffer).await {
        if to.write_all(&buffer[..n]).await.is_err() || to.flush().await.is_err() {
            return;
        }
    }
}

/// Copies towards the API and stops as soon as the other end goes away, even when nothing comes from the source.
async fn copy_until_closed<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: &mut BufReader<S>,
    source: &mut (impl AsyncRead + Unpin),
) {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut nothing = [0u8; 64];
    tokio::select! {
        copied = tokio::io::copy(source, &mut write) => tracing::trace!(?copied, "source ended"),
        () = async { while matches!(read.read(&mut nothing).await, Ok(n) if n > 0) {} } => {}
    }
}

async fn dial(ctx: &Context, instance: InstanceId, port: u16) -> DriverResult<BoxDuplex> {
    let first = ctx.world().ports_of(instance).into_iter().next();
    let address = first.as_ref().and_then(|p| Some((p.status.network, *p.status.addresses.first()?)));
    let (network, address) =
        address.ok_or_else(|| DriverError::permanent("no_address", "the instance has no network interface"))?;
    ctx.drivers.network.dial(network, std::net::SocketAddr::new(address, port)).await
}

async fn image_put<S: AsyncRead + AsyncWrite + Unpin + Send>(
    ctx: &Arc<Context>,
    stream: &mut BufReader<S>,
    image: oblak_model::ImageId,
    name: &str,
    length: Option<u64>,
    checksum: Option<&str>,
) -> DriverResult<()> {
    ok(stream).await?;
    let (ours, theirs) = tokio::io::duplex(256 * 1024);
    let putting = ctx.drivers.images.put(image, name, Box::new(theirs), length, checksum);
    let feeding = feed(stream, ours);
    let (result, fed) = tokio::join!(putting, feeding);
    let last = match (result, fed) {
        (Err(e), _) => StreamAnswer::Error { code: e.code, detail: e.detail },
        (Ok(_), Err(e)) => {
            StreamAnswer::Error { code: "truncated".into(), detail: format!("the upload broke off: {e}") }
        }
        (Ok(local), Ok(())) => {
            let object = ctx.world().images.get(&image).cloned();
            if let Some(object) = object {
                ctx.report(crate::images::ready(&object, &local));
            }
            crate::images::set(ctx, image, Some(crate::context::ImageState::Ready));
            StreamAnswer::Ok
        }
    };
    answer(stream, &last).await.map_err(|e| DriverError::io("the tunnel", &e))
}

/// The upload comes as frames: Stdin with bytes, then `Eof`. So its end can be told from a broken connection.
async fn feed<S: AsyncRead + AsyncWrite + Unpin + Send>(
    stream: &mut BufReader<S>,
    mut into: tokio::io::DuplexStream,
) -> std::io::Result<()> {
    use oblak_platform::frame::{Channel, Control, FrameCodec};
    let mut frames = tokio_util::codec::FramedRead::new(stream, FrameCodec);
    while let Some(frame) = frames.next().await {
        let frame = frame?;
        if frame.channel == Channel::Stdin {
            into.write_all(&frame.payload).await?;
        } else if frame.as_control() == Some(Control::Eof) {
            return into.shutdown().await;
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection broke"))
}
