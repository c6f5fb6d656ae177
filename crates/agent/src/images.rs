//! Fetches and builds the images that are assigned to this node or that an instance on it needs, and knows which are here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use oblak_model::wire::ReportItem;
use oblak_model::{Image, ImageId, ImagePhase, ImageSource, Timestamp};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::backoff::pause;
use crate::context::{Context, ImageState};
use crate::copies;
use crate::services::{ImageFailure, ImageProgress, LocalImage};

const SWEEP: Duration = Duration::from_secs(60);
/// Imports at the same time: they are bound by the disk and the network.
const PARALLEL: usize = 2;
/// Attempts of an import that fails for a passing reason.
const ATTEMPTS: u32 = 5;
/// Pauses between them: doubling from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PAUSE: Duration = Duration::from_secs(30);

struct Job {
    cancel: CancellationToken,
    generation: u64,
}

/// Runs until the agent ends.
pub async fn run(ctx: Arc<Context>) {
    let (done_tx, mut done) = mpsc::channel::<ImageId>(16);
    let mut jobs: BTreeMap<ImageId, Job> = BTreeMap::new();
    let slots = Arc::new(tokio::sync::Semaphore::new(PARALLEL));
    loop {
        if *ctx.synced.borrow() {
            pass(&ctx, &mut jobs, &slots, &done_tx).await;
        }
        tokio::select! {
            () = ctx.wake_images.notified() => {}
            Some(id) = done.recv() => drop(jobs.remove(&id)),
            () = tokio::time::sleep(SWEEP) => {}
            () = ctx.cancel.cancelled() => break,
        }
    }
    for job in jobs.values() {
        job.cancel.cancel();
    }
}

async fn pass(
    ctx: &Arc<Context>,
    jobs: &mut BTreeMap<ImageId, Job>,
    slots: &Arc<tokio::sync::Semaphore>,
    done: &mpsc::Sender<ImageId>,
) {
    let images: Vec<Arc<Image>> = ctx.world().images.values().cloned().collect();
    for image in &images {
        let id = ImageId(image.metadata.id);
        if let Some(job) = jobs.get(&id) {
            if image.metadata.is_deleting() || job.generation != image.metadata.generation {
                job.cancel.cancel();
            }
            continue;
        }
        let mine = is_mine(ctx, image);
        if image.metadata.is_deleting() {
            remove(ctx, image).await;
        } else if let Ok(Some(local)) = ctx.drivers.images.get(id).await {
            here(ctx, image, &local, mine).await;
        } else if let Some(origin) = wanted_from(ctx, image) {
            let cancel = ctx.cancel.child_token();
            jobs.insert(id, Job { cancel: cancel.clone(), generation: image.metadata.generation });
            oblak_platform::task::spawn(bring(ctx.clone(), image.clone(), origin, slots.clone(), cancel, done.clone()));
        } else if image.status.phase == ImagePhase::Failed {
            set(ctx, id, Some(ImageState::Failed(image.status.reason.clone(), image.status.message.clone())));
        }
    }
    let known: Vec<ImageId> = ctx.images.borrow().keys().copied().collect();
    for id in known.into_iter().filter(|id| !images.iter().any(|i| i.metadata.id == id.0)) {
        jobs.get(&id).inspect(|job| job.cancel.cancel());
        set(ctx, id, None);
    }
    collect(ctx, &images, jobs).await;
}

/// Removes what an instance once needed here and the server never knew to be here: nobody else would. What cannot be got again stays.
async fn collect(ctx: &Context, known: &[Arc<Image>], jobs: &BTreeMap<ImageId, Job>) {
    let Ok(fetched) = ctx.drivers.images.fetched().await else { return };
    let stray = |id: &ImageId| !known.iter().any(|image| image.metadata.id == id.0) && !jobs.contains_key(id);
    for id in fetched.into_iter().filter(stray) {
        match ctx.drivers.images.remove(id).await {
            Ok(()) => tracing::info!(image = %id, "removed an image that nothing here needs any more"),
            Err(error) => tracing::warn!(image = %id, %error, "an image that nothing needs cannot be removed"),
        }
    }
}

/// Whether this node is the one that says how the image is. Others fetch it for their own instances and say only that they have a copy.
fn is_mine(ctx: &Context, image: &Image) -> bool {
    image.status.node == Some(ctx.config.node)
}

/// The image is on this disk: says so when the server does not know.
async fn here(ctx: &Context, image: &Image, local: &LocalImage, mine: bool) {
    let id = ImageId(image.metadata.id);
    let status = &image.status;
    let known = status.nodes.contains(&ctx.config.node);
    let outdated = status.digest.as_ref().is_some_and(|digest| *digest != local.digest);
    if !mine && outdated && !copies::is_used(ctx, image) {
        if let Err(error) = ctx.drivers.images.remove(id).await {
            tracing::warn!(image = %image.metadata.name, %error, "an outdated copy cannot be removed");
            return;
        }
        set(ctx, id, None);
        copies::report(ctx, image, &local.digest, false);
        return;
    }
    set(ctx, id, Some(ImageState::Ready));
    let fresh = status.phase == ImagePhase::Ready && status.observed_generation == image.metadata.generation;
    if mine && !(fresh && known) {
        ctx.report(ready(image, local));
    } else if !mine && status.phase == ImagePhase::Ready && !known && !outdated {
        copies::report(ctx, image, &local.digest, true);
    }
}

/// Where an image comes from when it is brought here.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// Its source.
    Source,
    /// Another node. When none can give it, its source, as on the first node.
    Node,
}

/// `None` when this node has no use for the image, or it cannot be had (again).
fn wanted_from(ctx: &Context, image: &Image) -> Option<Origin> {
    if copies::is_wanted(ctx, image) {
        return Some(Origin::Node);
    }
    let used = is_mine(ctx, image) || copies::is_used(ctx, image);
    (used && !matches!(image.spec.source, ImageSource::Upload {}) && wants_import(image)).then_some(Origin::Source)
}

/// Brings an image here, in its turn.
async fn bring(
    ctx: Arc<Context>,
    image: Arc<Image>,
    origin: Origin,
    slots: Arc<tokio::sync::Semaphore>,
    cancel: CancellationToken,
    done: mpsc::Sender<ImageId>,
) {
    let id = ImageId(image.metadata.id);
    let turn = if origin == Origin::Node { "waiting for its turn to be copied" } else { "waiting for its turn" };
    set(&ctx, id, Some(ImageState::Importing(0, turn.into())));
    let permit = tokio::select! { permit = slots.acquire() => permit.ok(), () = cancel.cancelled() => None };
    if permit.is_some() {
        let copied = origin == Origin::Node && copies::fetch(&ctx, &image, &cancel).await;
        if !copied && !cancel.is_cancelled() {
            let result = attempts(&ctx, &image, &cancel).await;
            if !cancel.is_cancelled() {
                finish(&ctx, &image, result);
            }
        }
    }
    if cancel.is_cancelled() {
        set(&ctx, id, None);
    }
    let _ = done.send(id).await;
}

/// A failed import is tried again only when its spec has changed.
fn wants_import(image: &Image) -> bool {
    let wanted = !image.spec.on_demand || image.status.wanted;
    wanted
        && !(image.status.phase == ImagePhase::Failed && image.status.observed_generation == image.metadata.generation)
}

async fn remove(ctx: &Context, image: &Image) {
    let id = ImageId(image.metadata.id);
    match ctx.drivers.images.remove(id).await {
        Ok(()) => {
            set(ctx, id, None);
            let project = image.metadata.project.clone().unwrap_or_default();
            ctx.report(ReportItem::Released { object_kind: "image".into(), project, id: image.metadata.id });
        }
        Err(error) => tracing::warn!(image = %image.metadata.name, %error, "image cannot be removed"),
    }
}

/// Notes what is known of an image on this node, and wakes the owners that may wait for it when that is news. Without news it must not: an
/// owner whose image is missing wakes us in turn, and the two would keep each other awake.
pub fn set(ctx: &Context, id: ImageId, state: Option<ImageState>) {
    let news = ctx.images.send_if_modified(|images| {
        if images.get(&id) == state.as_ref() {
            return false;
        }
        let images = Arc::make_mut(images);
        match state {
            Some(state) => drop(images.insert(id, state)),
            None => drop(images.remove(&id)),
        }
        true
    });
    if news {
        ctx.wake_owners();
    }
}

async fn attempts(ctx: &Context, image: &Image, cancel: &CancellationToken) -> Result<LocalImage, ImageFailure> {
    let id = ImageId(image.metadata.id);
    let mut attempt = 0;
    let mut before = None;
    loop {
        let (progress, seen) = watch::channel(ImageProgress::default());
        let importing = ctx.drivers.images.import(
            id,
            &image.metadata.name,
            &image.spec.source,
            image.spec.checksum.as_deref(),
            progress,
            cancel.clone(),
        );
        let result = tokio::select! { result = importing => result, () = relay(ctx, image, seen, before.as_ref()) => unreachable!("the relay ends with its sender, which the import holds") };
        match result {
            Err(e) if e.transient && attempt + 1 < ATTEMPTS && !cancel.is_cancelled() => {
                tracing::info!(image = %image.metadata.name, error = %e.detail, "import failed; trying again");
                let wait = pause(FIRST_PAUSE, LAST_PAUSE, attempt);
                attempt += 1;
                let failed = Failed { detail: e.detail.clone(), next: attempt + 1 };
                failed.tell(ctx, image, &failed.waiting(ctx.clock.now(), wait), 0);
                before = Some(failed);
                tokio::select! { () = tokio::time::sleep(wait) => {}, () = cancel.cancelled() => return Err(e) }
            }
            Err(e) if attempt > 0 => {
                return Err(ImageFailure { detail: format!("{} (tried {} times)", e.detail, attempt + 1), ..e });
            }
            other => return other,
        }
    }
}

/// An attempt that failed, for the messages of the one that follows it.
struct Failed {
    detail: String,
    next: u32,
}

impl Failed {
    fn waiting(&self, now: Timestamp, wait: Duration) -> String {
        let at = Timestamp::from_micros(now.as_micros().saturating_add_unsigned(wait.as_micros() as u64)).to_string();
        // RFC 3339: the time of day to the second is at a fixed place.
        let at = at.get(11..19).unwrap_or(&at);
        format!("{}; attempt {} of {ATTEMPTS} at {at} UTC", self.detail, self.next)
    }

    fn running(&self, step: &str) -> String {
        format!("attempt {} of {ATTEMPTS}: {step}; before: {}", self.next, self.detail)
    }

    fn tell(&self, ctx: &Context, image: &Image, message: &str, percent: u8) {
        importing(ctx, image, "Retrying", message, percent);
    }
}

/// How far an import is: for the instances here, and, where this node is the one that imports, for everybody.
fn importing(ctx: &Context, image: &Image, reason: &str, message: &str, percent: u8) {
    set(ctx, ImageId(image.metadata.id), Some(ImageState::Importing(percent, message.into())));
    if is_mine(ctx, image) {
        ctx.report(item(image, ImagePhase::Importing, reason, message, percent, None));
    }
}

/// Passes progress on, at most every half second. Never ends by itself.
async fn relay(ctx: &Context, image: &Image, mut seen: watch::Receiver<ImageProgress>, before: Option<&Failed>) {
    loop {
        if seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        let now = seen.borrow_and_update().clone();
        match before {
            // Until something has come the last error is the news.
            Some(failed) if now.percent == 0 => failed.tell(ctx, image, &failed.running(&now.message), now.percent),
            _ => importing(ctx, image, "", &now.message, now.percent),
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

fn finish(ctx: &Context, image: &Image, result: Result<LocalImage, ImageFailure>) {
    let id = ImageId(image.metadata.id);
    match result {
        Ok(local) => {
            if is_mine(ctx, image) {
                ctx.report(ready(image, &local));
            }
            set(ctx, id, Some(ImageState::Ready));
        }
        Err(e) => {
            if is_mine(ctx, image) {
                ctx.report(item(image, ImagePhase::Failed, &e.code, &e.detail, 0, None));
            }
            set(ctx, id, Some(ImageState::Failed(e.code, e.detail)));
        }
    }
}

/// The report of an image that is here.
pub fn ready(image: &Image, local: &LocalImage) -> ReportItem {
    item(image, ImagePhase::Ready, "", "", 100, Some(local))
}

fn item(
    image: &Image,
    phase: ImagePhase,
    reason: &str,
    message: &str,
    progress: u8,
    local: Option<&LocalImage>,
) -> ReportItem {
    ReportItem::Image {
        project: image.metadata.project.clone().unwrap_or_default(),
        id: ImageId(image.metadata.id),
        phase,
        reason: reason.into(),
        message: message.into(),
        progress,
        digest: local.map(|l| l.digest.clone()),
        size: local.map_or(oblak_model::Size::ZERO, |l| l.size),
        virtual_size: local.map_or(oblak_model::Size::ZERO, |l| l.virtual_size),
        content: local.map(LocalImage::content),
        generation: image.metadata.generation,
        properties: local.map(|l| l.properties.clone()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_attempt_says_why_and_when_the_next_one_is() {
        let failed = Failed { detail: "cannot connect to images.lan".into(), next: 2 };
        let now = Timestamp::from_micros(1_800_000_000_000_000);
        assert_eq!(
            failed.waiting(now, Duration::from_secs(4)),
            "cannot connect to images.lan; attempt 2 of 5 at 08:00:04 UTC"
        );
        assert_eq!(failed.running("asking"), "attempt 2 of 5: asking; before: cannot connect to images.lan");
    }
}
