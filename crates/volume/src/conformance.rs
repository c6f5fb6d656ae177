//! Conformance suite of volume drivers: what every driver, fake or real, keeps.
//!
//! A test implements [`Harness`] for its driver and calls [`suite`]. A check panics with what was expected.

#![allow(clippy::unwrap_used, reason = "a check fails by panicking")]

use std::sync::Arc;
use std::task::Poll;

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::Remedy;
use uuid::Uuid;

use crate::{Format, Source, VolumeDriver, VolumeHandle, VolumeSpec};

/// What the suite needs to know about a driver.
#[async_trait]
pub trait Harness: Send + Sync {
    /// A driver object, the same each time until [`Self::restart`].
    fn driver(&self) -> Arc<dyn VolumeDriver>;
    /// Throws the driver object away, as a killed agent would, and makes a new one.
    async fn restart(&self);
    /// Plays a guest: puts a text at the start of the volume (for a directory: into a file).
    async fn write(&self, handle: &VolumeHandle, text: &str);
    /// Reads the text back; trailing zeros are left out.
    async fn read(&self, handle: &VolumeHandle) -> String;
    /// What is left of removed volumes when all are removed. Empty is right.
    async fn leaks(&self) -> Vec<String>;
    /// A size that does not fit into the pool; `None` when none can be named.
    async fn too_big(&self) -> Option<Size> {
        None
    }
    /// Formats the driver is expected to know here.
    fn formats(&self) -> Vec<Format> {
        vec![Format::Qcow2, Format::Raw, Format::Directory]
    }
    /// How many points of cancellation are tried.
    fn cancellations(&self) -> usize {
        8
    }
}

/// All checks, one after the other.
pub async fn suite(harness: &dyn Harness) {
    assert!(harness.driver().probe().await.available, "the driver must be available where its suite runs");
    for format in harness.formats() {
        life(harness, format).await;
        growth(harness, format).await;
        copies(harness, format).await;
        snapshots(harness, format).await;
        cancellation(harness, format).await;
    }
    refusals(harness).await;
    assert_eq!(harness.leaks().await, Vec::<String>::new(), "something is left");
}

fn spec(format: Format) -> VolumeSpec {
    let id = VolumeId(Uuid::now_v7());
    VolumeSpec { id, size: Size::mib(8), format, source: Source::Empty, dir: None, owner: (0, 0) }
}

/// Made once, found again, removed once.
pub async fn life(harness: &dyn Harness, format: Format) {
    let driver = harness.driver();
    let spec = spec(format);
    assert_eq!(driver.observe(spec.id).await.unwrap(), None);
    driver.remove(spec.id).await.unwrap();
    let made = driver.ensure(&spec, false).await.unwrap();
    assert_eq!((made.id, made.format, made.size), (spec.id, format, spec.size));
    harness.write(&made, "kept").await;
    let again = driver.ensure(&spec, false).await.unwrap();
    assert_eq!(again.path, made.path);
    assert_eq!(harness.read(&again).await, "kept", "ensure must not touch the content");
    harness.restart().await;
    let driver = harness.driver();
    assert!(driver.list().await.unwrap().contains(&spec.id));
    let found = driver.observe(spec.id).await.unwrap().unwrap();
    assert_eq!((found.path, found.size, found.format), (made.path, spec.size, format));
    driver.remove(spec.id).await.unwrap();
    driver.remove(spec.id).await.unwrap();
    assert_eq!(driver.observe(spec.id).await.unwrap(), None);
    assert!(!driver.list().await.unwrap().contains(&spec.id));
}

/// Grows and keeps its content, never shrinks, never changes its format.
pub async fn growth(harness: &dyn Harness, format: Format) {
    let driver = harness.driver();
    let mut spec = spec(format);
    let made = driver.ensure(&spec, false).await.unwrap();
    harness.write(&made, "kept").await;
    spec.size = Size::mib(16);
    assert_eq!(driver.ensure(&spec, true).await.unwrap().size, spec.size, "in use: the record changes");
    let grown = driver.ensure(&spec, false).await.unwrap();
    assert_eq!((grown.size, harness.read(&grown).await.as_str()), (spec.size, "kept"));
    let mut bad = spec.clone();
    bad.size = Size::mib(8);
    let error = driver.ensure(&bad, false).await.unwrap_err();
    assert_eq!((error.remedy, error.code.as_str()), (Remedy::Permanent, "shrink"));
    bad = spec.clone();
    bad.format = if format == Format::Raw { Format::Qcow2 } else { Format::Raw };
    let error = driver.ensure(&bad, false).await.unwrap_err();
    assert_eq!((error.remedy, error.code.as_str()), (Remedy::Permanent, "format_fixed"));
    assert_eq!(driver.observe(spec.id).await.unwrap().unwrap().size, spec.size, "a refusal changes nothing");
    driver.remove(spec.id).await.unwrap();
}

/// A clone is a copy that needs nothing of its original.
pub async fn copies(harness: &dyn Harness, format: Format) {
    let driver = harness.driver();
    let original = spec(format);
    let handle = driver.ensure(&original, false).await.unwrap();
    harness.write(&handle, "first").await;
    let mut copy = spec(format);
    copy.source = Source::Volume { id: original.id };
    copy.size = Size::mib(12);
    let copied = driver.ensure(&copy, false).await.unwrap();
    assert_eq!(copied.size, copy.size);
    harness.write(&handle, "second").await;
    assert_eq!(harness.read(&copied).await, "first");
    driver.remove(original.id).await.unwrap();
    assert_eq!(harness.read(&copied).await, "first", "the original is gone");
    driver.ensure(&copy, false).await.unwrap();
    driver.remove(copy.id).await.unwrap();
}

/// Taken, restored, cloned, removed; each as often as one likes.
pub async fn snapshots(harness: &dyn Harness, format: Format) {
    let driver = harness.driver();
    let Some(snapshots) = driver.snapshots() else {
        println!("skipped: {} takes no snapshots", driver.name());
        return;
    };
    let mut spec = spec(format);
    let handle = driver.ensure(&spec, false).await.unwrap();
    let (one, two) = (SnapshotId(Uuid::now_v7()), SnapshotId(Uuid::now_v7()));
    harness.write(&handle, "one").await;
    let size = snapshots.snapshot(spec.id, one).await.unwrap();
    harness.write(&handle, "two").await;
    assert_eq!(snapshots.snapshot(spec.id, one).await.unwrap(), size, "a second time changes nothing");
    snapshots.snapshot(spec.id, two).await.unwrap();
    let seen = driver.observe(spec.id).await.unwrap().unwrap();
    assert_eq!(seen.snapshots, [one, two]);
    let mut clone = self::spec(format);
    clone.source = Source::Snapshot { volume: spec.id, id: one };
    let cloned = driver.ensure(&clone, false).await.unwrap();
    assert_eq!(harness.read(&cloned).await, "one");
    // Grown after the snapshot: restoring keeps the size and brings back the content.
    spec.size = Size::mib(16);
    driver.ensure(&spec, false).await.unwrap();
    harness.restart().await;
    let driver = harness.driver();
    let snapshots = driver.snapshots().unwrap();
    for (id, text) in [(one, "one"), (two, "two"), (one, "one"), (one, "one")] {
        snapshots.restore(spec.id, id).await.unwrap();
        let handle = driver.observe(spec.id).await.unwrap().unwrap();
        assert_eq!((harness.read(&handle).await.as_str(), handle.size), (text, spec.size));
    }
    for _ in 0..2 {
        snapshots.remove_snapshot(spec.id, one).await.unwrap();
    }
    assert_eq!(driver.observe(spec.id).await.unwrap().unwrap().snapshots, [two]);
    assert_eq!(snapshots.restore(spec.id, one).await.unwrap_err().remedy, Remedy::Gone);
    assert_eq!(harness.read(&cloned).await, "one", "a clone needs no snapshot");
    driver.remove(spec.id).await.unwrap();
    assert_eq!(harness.read(&cloned).await, "one");
    snapshots.remove_snapshot(spec.id, two).await.unwrap();
    assert_eq!(snapshots.snapshot(spec.id, two).await.unwrap_err().remedy, Remedy::Gone);
    driver.remove(clone.id).await.unwrap();
}

/// A call that is given up leaves nothing half-made: afterwards the volume can be made or removed as ever.
pub async fn cancellation(harness: &dyn Harness, format: Format) {
    for polls in 1..=harness.cancellations() {
        let driver = harness.driver();
        let spec = spec(format);
        {
            let mut call = std::pin::pin!(driver.ensure(&spec, false));
            for _ in 0..polls {
                let done = std::future::poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx).is_ready())).await;
                if done {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        if polls % 2 == 0 {
            let handle = driver.ensure(&spec, false).await.unwrap();
            assert_eq!(harness.read(&handle).await, "");
        }
        driver.remove(spec.id).await.unwrap();
        assert_eq!(driver.observe(spec.id).await.unwrap(), None);
    }
}

/// What cannot be done is refused in words, and nothing is left of it.
pub async fn refusals(harness: &dyn Harness) {
    let driver = harness.driver();
    let refused = async |spec: &VolumeSpec| {
        let error = driver.ensure(spec, false).await.unwrap_err();
        assert_eq!(driver.observe(spec.id).await.unwrap(), None);
        assert!(!driver.list().await.unwrap().contains(&spec.id), "{error}");
        assert!(!error.detail.is_empty());
        (error.remedy, error.code)
    };
    let mut bad = spec(Format::Raw);
    bad.size = Size(0);
    assert_eq!(refused(&bad).await, (Remedy::Permanent, "invalid_size".into()));
    bad = spec(Format::Raw);
    bad.source = Source::Volume { id: VolumeId(Uuid::now_v7()) };
    assert_eq!(refused(&bad).await.0, Remedy::Gone);
    let original = spec(Format::Raw);
    driver.ensure(&original, false).await.unwrap();
    bad = spec(Format::Raw);
    bad.source = Source::Volume { id: original.id };
    bad.size = Size::mib(4);
    assert_eq!(refused(&bad).await, (Remedy::Permanent, "too_small".into()));
    bad = spec(Format::Directory);
    bad.source = Source::Volume { id: original.id };
    assert_eq!(refused(&bad).await.0, Remedy::Unsupported);
    bad = spec(Format::Raw);
    bad.source = Source::Snapshot { volume: original.id, id: SnapshotId(Uuid::now_v7()) };
    assert_eq!(refused(&bad).await.0, Remedy::Gone);
    driver.remove(original.id).await.unwrap();
    if let Some(size) = harness.too_big().await {
        bad = spec(Format::Raw);
        bad.size = size;
        assert_eq!(refused(&bad).await, (Remedy::Retry, "disk_full".into()));
    }
}
