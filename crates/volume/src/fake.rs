//! A volume driver in memory that does what a test tells it: fail, be slow, be full.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, DriverError, DriverResult};

use crate::{Capabilities, Format, SnapshotVolume, Source, VolumeDriver, VolumeHandle, VolumeSpec};

/// The world of a fake driver. Clones see the same world, as a restarted driver sees the same disk.
#[derive(Clone, Default)]
pub struct FakeDriver {
    world: Arc<Mutex<World>>,
}

struct World {
    capacity: Size,
    volumes: BTreeMap<VolumeId, Volume>,
    in_use: BTreeSet<VolumeId>,
    failures: VecDeque<(&'static str, DriverError)>,
    delay: Duration,
    calls: Vec<(&'static str, VolumeId)>,
}

#[derive(Clone)]
struct Volume {
    spec: VolumeSpec,
    content: Vec<u8>,
    snapshots: BTreeMap<SnapshotId, (Size, Vec<u8>)>,
}

/// Most calls that are remembered.
const MAX_CALLS: usize = 10_000;

impl Default for World {
    fn default() -> Self {
        Self {
            capacity: Size::gib(1024),
            volumes: BTreeMap::new(),
            in_use: BTreeSet::new(),
            failures: VecDeque::new(),
            delay: Duration::ZERO,
            calls: Vec::new(),
        }
    }
}

impl FakeDriver {
    /// An empty pool of 1 TiB.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// Sets the size of the pool.
    pub fn set_capacity(&self, capacity: Size) {
        self.world().capacity = capacity;
    }
    /// The next call of this method (`ensure`, `remove`, `snapshot`, ...) fails with `error`.
    pub fn fail_next(&self, method: &'static str, error: DriverError) {
        self.world().failures.push_back((method, error));
    }
    /// Every call takes this long.
    pub fn set_delay(&self, delay: Duration) {
        self.world().delay = delay;
    }
    /// Plays a guest that has the volume open, or closes it.
    pub fn set_in_use(&self, id: VolumeId, in_use: bool) {
        let mut world = self.world();
        if in_use {
            world.in_use.insert(id);
        } else {
            world.in_use.remove(&id);
        }
    }
    /// Plays a guest that writes; false when there is no such volume.
    pub fn write(&self, id: VolumeId, content: &[u8]) -> bool {
        self.world().volumes.get_mut(&id).map(|v| v.content = content.to_vec()).is_some()
    }
    /// What [`Self::write`] wrote, or the volume was made of.
    #[must_use]
    pub fn read(&self, id: VolumeId) -> Option<Vec<u8>> {
        self.world().volumes.get(&id).map(|v| v.content.clone())
    }
    /// Calls so far: method and volume, the oldest first.
    #[must_use]
    pub fn calls(&self) -> Vec<(&'static str, VolumeId)> {
        self.world().calls.clone()
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn call(&self, method: &'static str, id: VolumeId) -> DriverResult<MutexGuard<'_, World>> {
        let delay = self.world().delay;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let mut world = self.world();
        if world.calls.len() < MAX_CALLS {
            world.calls.push((method, id));
        }
        if let Some(at) = world.failures.iter().position(|(m, _)| *m == method)
            && let Some((_, error)) = world.failures.remove(at)
        {
            return Err(error);
        }
        Ok(world)
    }
}

impl World {
    fn used(&self) -> u64 {
        self.volumes.values().map(|v| v.spec.size.0).sum()
    }

    fn check_space(&self, more: u64) -> DriverResult<()> {
        if self.used() + more > self.capacity.0 {
            return Err(DriverError::retry("disk_full", "the fake pool is full; free some or use a smaller size"));
        }
        Ok(())
    }

    fn not_in_use(&self, id: VolumeId) -> DriverResult<()> {
        if self.in_use.contains(&id) {
            return Err(DriverError::retry("volume_in_use", format!("volume {id} is in use; stop its instance first")));
        }
        Ok(())
    }

    fn volume(&mut self, id: VolumeId) -> DriverResult<&mut Volume> {
        self.volumes.get_mut(&id).ok_or_else(|| DriverError::gone(format!("volume {id} does not exist")))
    }

    /// What a new volume holds and the least size it needs.
    fn origin(&mut self, spec: &VolumeSpec) -> DriverResult<(Size, Vec<u8>)> {
        let (format, size, content) = match &spec.source {
            Source::Empty => return Ok((Size(0), vec![])),
            Source::Image { path, .. } => return Ok((Size(0), path.to_string_lossy().into_owned().into_bytes())),
            Source::Volume { id } => {
                self.not_in_use(*id)?;
                let from = self.volume(*id)?;
                (from.spec.format, from.spec.size, from.content.clone())
            }
            Source::Snapshot { volume, id } => {
                let from = self.volume(*volume)?;
                let kept = from.snapshots.get(id).cloned();
                let (size, content) = kept.ok_or_else(|| DriverError::gone(format!("snapshot {id} does not exist")))?;
                (from.spec.format, size, content)
            }
        };
        if (format == Format::Directory) != (spec.format == Format::Directory) {
            return Err(DriverError::unsupported("directories and disks cannot be made of each other"));
        }
        Ok((size, content))
    }

    fn create(&mut self, spec: &VolumeSpec) -> DriverResult<()> {
        if spec.size == Size(0) && spec.format != Format::Directory {
            return Err(DriverError::permanent("invalid_size", "the size must not be 0"));
        }
        let (least, content) = self.origin(spec)?;
        if spec.format != Format::Directory && spec.size < least {
            return Err(DriverError::permanent("too_small", format!("the original needs {least}")));
        }
        self.check_space(spec.size.0)?;
        self.volumes.insert(spec.id, Volume { spec: spec.clone(), content, snapshots: BTreeMap::new() });
        Ok(())
    }

    fn grow(&mut self, spec: &VolumeSpec) -> DriverResult<()> {
        let has = self.volume(spec.id)?.spec.clone();
        if has.format != spec.format {
            return Err(DriverError::permanent("format_fixed", format!("the format is {:?}", has.format)));
        }
        if spec.size < has.size {
            return Err(DriverError::permanent("shrink", format!("it has {} and cannot shrink", has.size)));
        }
        self.check_space(spec.size.0 - has.size.0)?;
        let volume = self.volume(spec.id)?;
        (volume.spec.size, volume.spec.owner) = (spec.size, spec.owner);
        Ok(())
    }

    fn handle(&self, id: VolumeId) -> Option<VolumeHandle> {
        let volume = self.volumes.get(&id)?;
        let dir = volume.spec.dir.clone().unwrap_or_else(|| PathBuf::from("/fake/volumes"));
        Some(VolumeHandle {
            id,
            path: dir.join(id.to_string()),
            format: volume.spec.format,
            size: volume.spec.size,
            used: Size(volume.content.len() as u64),
            snapshots: volume.snapshots.keys().copied().collect(),
            size_enforced: volume.spec.format != Format::Directory,
        })
    }
}

#[async_trait]
impl VolumeDriver for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn probe(&self) -> Capabilities {
        let world = self.world();
        let free = Size(world.capacity.0.saturating_sub(world.used()));
        Capabilities { available: true, probed: vec![Availability::yes("fake", "1")], capacity: world.capacity, free }
    }

    async fn ensure(&self, spec: &VolumeSpec, _in_use: bool) -> DriverResult<VolumeHandle> {
        let mut world = self.call("ensure", spec.id).await?;
        if world.volumes.contains_key(&spec.id) {
            world.grow(spec)?;
        } else {
            world.create(spec)?;
        }
        world.handle(spec.id).ok_or_else(|| DriverError::gone("it was removed at the same time"))
    }

    async fn observe(&self, id: VolumeId) -> DriverResult<Option<VolumeHandle>> {
        Ok(self.call("observe", id).await?.handle(id))
    }

    async fn list(&self) -> DriverResult<Vec<VolumeId>> {
        Ok(self.call("list", VolumeId::default()).await?.volumes.keys().copied().collect())
    }

    async fn remove(&self, id: VolumeId) -> DriverResult<()> {
        self.call("remove", id).await?.volumes.remove(&id);
        Ok(())
    }

    fn snapshots(&self) -> Option<&dyn SnapshotVolume> {
        Some(self)
    }
}

#[async_trait]
impl SnapshotVolume for FakeDriver {
    async fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<Size> {
        let mut world = self.call("snapshot", volume).await?;
        let known = world.volume(volume)?.snapshots.contains_key(&id);
        if !known {
            world.not_in_use(volume)?;
        }
        let volume = world.volume(volume)?;
        let (size, content) = (volume.spec.size, volume.content.clone());
        Ok(volume.snapshots.entry(id).or_insert((size, content)).0)
    }

    async fn restore(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        let mut world = self.call("restore", volume).await?;
        world.not_in_use(volume)?;
        let volume = world.volume(volume)?;
        let kept = volume.snapshots.get(&id).map(|(_, content)| content.clone());
        volume.content = kept.ok_or_else(|| DriverError::gone(format!("snapshot {id} does not exist")))?;
        Ok(())
    }

    async fn remove_snapshot(&self, volume: VolumeId, id: SnapshotId) -> DriverResult<()> {
        let mut world = self.call("remove_snapshot", volume).await?;
        if let Some(volume) = world.volumes.get_mut(&volume) {
            volume.snapshots.remove(&id);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::{Harness, suite};

    struct Fake(FakeDriver);

    #[async_trait]
    impl Harness for Fake {
        fn driver(&self) -> Arc<dyn VolumeDriver> {
            Arc::new(self.0.clone())
        }
        async fn restart(&self) {}
        async fn write(&self, handle: &VolumeHandle, text: &str) {
            assert!(self.0.write(handle.id, text.as_bytes()));
        }
        async fn read(&self, handle: &VolumeHandle) -> String {
            String::from_utf8(self.0.read(handle.id).unwrap()).unwrap()
        }
        async fn leaks(&self) -> Vec<String> {
            self.0.world().volumes.keys().map(ToString::to_string).collect()
        }
        async fn too_big(&self) -> Option<Size> {
            Some(Size::gib(2048))
        }
    }

    #[tokio::test]
    async fn conforms() {
        suite(&Fake(FakeDriver::new())).await;
    }

    #[tokio::test]
    async fn does_what_it_is_told() {
        let fake = FakeDriver::new();
        let id = VolumeId::default();
        fake.fail_next("remove", DriverError::retry("io", "told to"));
        assert_eq!(fake.remove(id).await.unwrap_err().code, "io");
        fake.remove(id).await.unwrap();
        assert_eq!(fake.calls(), [("remove", id), ("remove", id)]);
    }
}
