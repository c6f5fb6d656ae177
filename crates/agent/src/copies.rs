//! Copies of images that another node has imported, fetched through the API.
//!
//! The content comes as the other store's export, whose parts are checked against the digest that the image has. A copy that breaks off
//! leaves nothing and begins anew, as long as an instance here needs the image.

use std::time::Duration;

use oblak_model::wire::ReportItem;
use oblak_model::{Image, ImageId, ImagePhase, ImageSource};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::context::{Context, ImageState};
use crate::images::set;
use crate::services::{ImageFailure, LocalImage};

/// Bytes between the connection and the store.
const BUFFER: usize = 256 * 1024;
/// Progress is told again after so many bytes.
const STEP: u64 = 4 << 20;
/// Copies tried before the image is got from its source.
const TRIES: u32 = 3;
/// A source that sends nothing for so long is given up.
const STALLED: Duration = Duration::from_secs(60);

/// Whether the image must be brought here: another node has it, and an instance here runs from it or may have to be started here.
pub fn is_wanted(ctx: &Context, image: &Image) -> bool {
    let elsewhere = image.status.node.is_some_and(|n| n != ctx.config.node);
    elsewhere && image.status.phase == ImagePhase::Ready && image.status.digest.is_some() && is_used(ctx, image)
}

/// Whether the server names an image for no reason but that instances elsewhere may have to be started here.
fn is_kept_ready(ctx: &Context, image: &Image) -> bool {
    let (node, status) = (ctx.config.node, &image.status);
    status.phase == ImagePhase::Ready && status.node.is_some_and(|n| n != node) && !status.nodes.contains(&node)
}

/// Whether an instance here runs from the image, or may have to be started here.
pub fn is_used(ctx: &Context, image: &Image) -> bool {
    let id = image.metadata.id;
    if is_kept_ready(ctx, image) {
        return true;
    }
    let world = ctx.world();
    world.instances.values().any(|i| i.status.resolved.image.0 == id && !i.metadata.is_deleting())
}

/// Says whether there is a copy here.
pub fn report(ctx: &Context, image: &Image, digest: &str, present: bool) {
    ctx.report(ReportItem::ImageCopy {
        project: image.metadata.project.clone().unwrap_or_default(),
        id: ImageId(image.metadata.id),
        digest: digest.into(),
        present,
    });
}

/// Fetches the copy, again and again with growing pauses, until it is here or nobody wants it any more. False when it is time to get it from
/// its source instead; an uploaded image has none.
pub async fn fetch(ctx: &Context, image: &Image, cancel: &CancellationToken) -> bool {
    let id = ImageId(image.metadata.id);
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    let mut tries = 0;
    while !cancel.is_cancelled() {
        let outcome = tokio::select! { outcome = once(ctx, image) => outcome, () = cancel.cancelled() => return false };
        match outcome {
            Ok(local) => {
                tracing::info!(image = %image.metadata.name, "copied from another node");
                report(ctx, image, &local.digest, true);
                set(ctx, id, Some(ImageState::Ready));
                return true;
            }
            Err(error) => {
                tracing::warn!(image = %image.metadata.name, code = error.code, error = error.detail, "the image cannot be copied; trying again");
                let text = format!("cannot be copied from another node yet: {}", error.detail);
                set(ctx, id, Some(ImageState::Importing(0, text)));
            }
        }
        tries += 1;
        if tries >= TRIES && !matches!(image.spec.source, ImageSource::Upload {}) {
            return false;
        }
        tokio::select! { () = tokio::time::sleep(backoff.next()) => {}, () = cancel.cancelled() => {} }
    }
    false
}

async fn once(ctx: &Context, image: &Image) -> Result<LocalImage, ImageFailure> {
    let id = ImageId(image.metadata.id);
    set(ctx, id, Some(ImageState::Importing(0, "copying from another node".into())));
    let content = ctx.client.node_image(ctx.config.node, id).await.map_err(|e| passing(e.to_string()))?;
    let (ours, theirs) = tokio::io::duplex(BUFFER);
    let digest = image.status.digest.as_deref();
    let putting = ctx.drivers.images.put(id, &image.metadata.name, Box::new(theirs), None, digest);
    let (result, fed) = tokio::join!(putting, feed(ctx, image, content, ours));
    // A connection that broke is why the store found something missing.
    fed.and(result)
}

fn passing(detail: String) -> ImageFailure {
    ImageFailure { code: "node_unreachable".into(), detail, transient: true }
}

async fn feed(
    ctx: &Context,
    image: &Image,
    mut content: oblak_client::TextStream,
    mut into: tokio::io::DuplexStream,
) -> Result<(), ImageFailure> {
    let id = ImageId(image.metadata.id);
    let (mut got, mut told) = (0u64, 0u64);
    loop {
        let piece = tokio::time::timeout(STALLED, content.next()).await;
        let piece = piece.map_err(|_| passing("the other node stopped sending".into()))?;
        let Some(bytes) = piece.map_err(|e| passing(e.to_string()))? else { break };
        got += bytes.len() as u64;
        if into.write_all(&bytes).await.is_err() {
            // The store has enough or gave up; what it says counts.
            return Ok(());
        }
        if got - told >= STEP {
            told = got;
            set(
                ctx,
                id,
                Some(ImageState::Importing(percent(got, image.status.size.0), "copying from another node".into())),
            );
        }
    }
    let _ = into.shutdown().await;
    Ok(())
}

/// Percent of the content; the export is a little larger, and storing takes a moment, so never 100.
fn percent(got: u64, size: u64) -> u8 {
    u8::try_from(got.saturating_mul(100).checked_div(size).unwrap_or(0).min(99)).unwrap_or(99)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_claims_to_be_done() {
        assert_eq!(percent(0, 0), 0);
        assert_eq!(percent(50, 200), 25);
        assert_eq!(percent(300, 200), 99);
        assert_eq!(percent(u64::MAX, 1), 99);
    }
}
