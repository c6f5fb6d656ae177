//! The driver of a [`FakeWorld`].

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oblak_model::{InstanceId, Size, SnapshotId, VolumeId};
use oblak_platform::driver::{Availability, BoxDuplex, BoxRead, DriverError, DriverResult};
use tokio::time::Instant;

use super::{FakeWorld, Guest, Op, Script, stream};
use crate::shim::Fence;
use crate::{
    Capabilities, ComputeDriver, Console, DiskSpec, Exec, ExecRequest, Fencing, GuestSpec, Hotplug, Migrate,
    Observation, Pause, Resize, SnapshotGuest, UsageSample,
};

/// A driver object. It knows nothing that the world does not know, so making another one is a restart.
#[derive(Clone)]
pub struct FakeDriver {
    world: Arc<FakeWorld>,
}

impl FakeDriver {
    /// A driver of this machine.
    #[must_use]
    pub fn new(world: Arc<FakeWorld>) -> Self {
        Self { world }
    }

    /// The machine.
    #[must_use]
    pub fn world(&self) -> &Arc<FakeWorld> {
        &self.world
    }

    async fn maybe_hang(&self, id: InstanceId, op: Op) {
        let hangs = {
            let state = self.world.lock();
            let guest =
                state.guests.get(&id).map(|g| &g.script).or_else(|| state.scripts.get(&id)).unwrap_or(&state.default);
            guest.hang.contains(&op)
        };
        if hangs {
            std::future::pending::<()>().await;
        }
    }

    /// Does `f` with a guest that runs.
    fn with_live<T>(&self, id: InstanceId, f: impl FnOnce(&mut Guest, Instant) -> T) -> DriverResult<T> {
        let now = Instant::now();
        let mut state = self.world.lock();
        let guest = state.guests.get_mut(&id).filter(|g| g.is_live(now));
        let result = guest.map(|g| f(g, now)).ok_or_else(|| DriverError::gone(format!("instance {id} does not run")));
        drop(state);
        self.world.changed.notify_waiters();
        result
    }

    /// Puts the run of `spec` into the world, or fails as scripted. Returns when it will have started.
    fn begin(&self, spec: &GuestSpec) -> DriverResult<Option<Instant>> {
        let (now, wall) = (Instant::now(), self.world.clock.now());
        let from_spec = Script::from_spec(spec)?;
        let fence = self.world.fenced(spec.fence.clone());
        let mut state = self.world.lock();
        let script = state.scripts.get(&spec.id).cloned().or(from_spec).unwrap_or_else(|| state.default.clone());
        let guest = state.guests.entry(spec.id).or_insert_with(|| Guest::new(spec, script.clone()));
        if guest.is_live(now) {
            return Ok(guest.begun.map(|(at, _)| at + guest.script.start_delay));
        }
        if guest.begun.is_some() && guest.run >= spec.run {
            return Ok(None);
        }
        if guest.begun.is_some() {
            guest.script = script;
        }
        if guest.failures_left > 0 {
            guest.failures_left -= 1;
            return Err(guest.script.failure.clone());
        }
        guest.fence.clone_from(&fence);
        if self.world.is_frozen(guest, Duration::ZERO) {
            return Err(DriverError::retry("lease_ended", "the lease of this node has ended"));
        }
        guest.begin(spec, now, wall);
        let ready = now + guest.script.start_delay;
        *state.starts.entry((spec.id, spec.run)).or_default() += 1;
        drop(state);
        self.world.changed.notify_waiters();
        Ok(Some(ready))
    }
}

#[async_trait]
impl ComputeDriver for FakeDriver {
    fn name(&self) -> &'static str {
        "fake"
    }

    async fn probe(&self) -> Capabilities {
        Capabilities {
            isolations: self.world.isolations.clone(),
            probed: vec![Availability::yes("fake", env!("CARGO_PKG_VERSION"))],
            ..Capabilities::default()
        }
    }

    async fn ensure(&self, spec: &GuestSpec) -> DriverResult<Observation> {
        if !self.world.isolations.contains(&spec.isolation) {
            return Err(DriverError::unsupported(format!(
                "the fake driver was told not to run {:?} guests",
                spec.isolation
            )));
        }
        let ready = self.begin(spec)?;
        self.maybe_hang(spec.id, Op::Ensure).await;
        if let Some(ready) = ready {
            tokio::time::sleep_until(ready).await;
        }
        self.observe(spec.id).await
    }

    async fn observe(&self, id: InstanceId) -> DriverResult<Observation> {
        self.maybe_hang(id, Op::Observe).await;
        Ok(self.world.look(id))
    }

    async fn list(&self) -> DriverResult<Vec<InstanceId>> {
        Ok(self
            .world
            .lock()
            .guests
            .iter()
            .filter(|(_, g)| g.begun.is_some() || g.incoming.is_some())
            .map(|(id, _)| *id)
            .collect())
    }

    async fn stop(&self, id: InstanceId, grace: Duration) -> DriverResult<()> {
        self.maybe_hang(id, Op::Stop).await;
        let end = self.with_live(id, |guest, now| {
            // A second request may shorten the grace, never lengthen it.
            let (asked, force) =
                guest.stop.map_or((now, now + grace), |(asked, force)| (asked, force.min(now + grace)));
            guest.stop = Some((asked, force));
            let willing = asked + guest.script.stop_delay;
            if guest.script.ignore_stop || guest.paused_since.is_some() { force } else { willing.min(force) }
        });
        if let Ok(end) = end {
            tokio::time::sleep_until(end).await;
        }
        Ok(())
    }

    async fn remove(&self, id: InstanceId) -> DriverResult<()> {
        self.maybe_hang(id, Op::Remove).await;
        self.world.forget(id);
        Ok(())
    }

    async fn usage(&self, id: InstanceId) -> DriverResult<UsageSample> {
        self.with_live(id, |guest, now| {
            let ran = guest.begun.map_or(Duration::ZERO, |(at, _)| now - at).saturating_sub(guest.paused_for);
            let ns = u64::try_from(ran.as_nanos()).unwrap_or(u64::MAX);
            UsageSample {
                // A tenth of what it may use: a plausible idle guest.
                cpu_ns: ns / 10_000 * u64::from(guest.spec.vcpus_milli),
                memory_bytes: guest.spec.memory.as_u64() / 2,
                disk_read_bytes: ns / 1000,
                disk_write_bytes: ns / 2000,
            }
        })
    }

    async fn logs(&self, id: InstanceId, tail: Option<u64>, follow: bool) -> DriverResult<BoxRead> {
        if !self.world.lock().guests.contains_key(&id) {
            return Err(DriverError::gone(format!("instance {id} is not here")));
        }
        Ok(Box::new(stream::FakeLog::new(self.world.clone(), id, tail, follow)))
    }

    fn pause(&self) -> Option<&dyn Pause> {
        Some(self)
    }
    fn fencing(&self) -> Option<&dyn Fencing> {
        Some(self)
    }
    fn console(&self) -> Option<&dyn Console> {
        Some(self)
    }
    fn exec(&self) -> Option<&dyn Exec> {
        Some(self)
    }
    fn hotplug(&self) -> Option<&dyn Hotplug> {
        Some(self)
    }
    fn snapshot(&self) -> Option<&dyn SnapshotGuest> {
        Some(self)
    }
    fn resize(&self) -> Option<&dyn Resize> {
        Some(self)
    }
    fn migrate(&self) -> Option<&dyn Migrate> {
        Some(self)
    }
}

#[async_trait]
impl Fencing for FakeDriver {
    async fn fence(&self, id: InstanceId, fence: Option<Fence>) -> DriverResult<()> {
        let fence = self.world.fenced(fence);
        self.with_live(id, |guest, _| guest.fence = fence)
    }
}

#[async_trait]
impl Pause for FakeDriver {
    async fn pause(&self, id: InstanceId) -> DriverResult<()> {
        self.with_live(id, |guest, now| guest.paused_since = guest.paused_since.or(Some(now)))
    }
    async fn resume(&self, id: InstanceId) -> DriverResult<()> {
        self.with_live(id, |guest, now| {
            if let Some(since) = guest.paused_since.take() {
                guest.paused_for += now - since;
            }
        })
    }
}

#[async_trait]
impl Console for FakeDriver {
    async fn console(&self, id: InstanceId) -> DriverResult<BoxDuplex> {
        self.with_live(id, |_, _| ())?;
        Ok(stream::console(self.world.clone(), id))
    }
}

#[async_trait]
impl Exec for FakeDriver {
    async fn exec(&self, id: InstanceId, request: &ExecRequest) -> DriverResult<BoxDuplex> {
        self.with_live(id, |_, _| ())?;
        if request.argv.is_empty() {
            return Err(DriverError::permanent("empty_command", "argv: name a program to run"));
        }
        Ok(stream::exec(request))
    }
}

#[async_trait]
impl Hotplug for FakeDriver {
    async fn attach(&self, id: InstanceId, disk: &DiskSpec) -> DriverResult<()> {
        self.with_live(id, |guest, _| *guest.volumes.entry(disk.volume).or_insert(Size::ZERO)).map(drop)
    }
    async fn detach(&self, id: InstanceId, volume: VolumeId) -> DriverResult<()> {
        self.with_live(id, |guest, _| guest.volumes.remove(&volume)).map(drop)
    }
    async fn grow(&self, id: InstanceId, volume: VolumeId, size: Size) -> DriverResult<()> {
        self.with_live(id, |guest, _| guest.volumes.get_mut(&volume).map(|s| *s = size))?
            .ok_or_else(|| DriverError::gone(format!("volume {volume} is not attached to {id}")))
    }
}

#[async_trait]
impl SnapshotGuest for FakeDriver {
    async fn snapshot(&self, id: InstanceId, snapshot: SnapshotId, memory: bool) -> DriverResult<Size> {
        let now = Instant::now();
        let mut state = self.world.lock();
        let guest = state.guests.get_mut(&id).ok_or_else(|| DriverError::gone(format!("instance {id} is not here")))?;
        let with_memory = memory && guest.is_live(now);
        guest.snapshots.entry(snapshot).or_insert(with_memory);
        Ok(if with_memory { guest.spec.memory } else { Size::mib(1) })
    }

    async fn restore(&self, spec: &GuestSpec, snapshot: SnapshotId) -> DriverResult<Observation> {
        let (now, wall) = (Instant::now(), self.world.clock.now());
        let observation = {
            let mut state = self.world.lock();
            let guest = state
                .guests
                .get_mut(&spec.id)
                .ok_or_else(|| DriverError::gone(format!("instance {} is not here", spec.id)))?;
            let memory = *guest
                .snapshots
                .get(&snapshot)
                .ok_or_else(|| DriverError::gone(format!("instance {} has no snapshot {snapshot}", spec.id)))?;
            guest.end(now, wall, Some(137), "Restored", false);
            let again = memory && guest.run < spec.run;
            if again {
                guest.begin(spec, now, wall);
            }
            let observation = guest.observe(now);
            if again {
                *state.starts.entry((spec.id, spec.run)).or_default() += 1;
            }
            observation
        };
        self.world.changed.notify_waiters();
        Ok(observation)
    }

    async fn remove_snapshot(&self, id: InstanceId, snapshot: SnapshotId) -> DriverResult<()> {
        if let Some(guest) = self.world.lock().guests.get_mut(&id) {
            guest.snapshots.remove(&snapshot);
        }
        Ok(())
    }

    async fn list_snapshots(&self, id: InstanceId) -> DriverResult<Vec<SnapshotId>> {
        Ok(self.world.lock().guests.get(&id).map(|g| g.snapshots.keys().copied().collect()).unwrap_or_default())
    }
}

#[async_trait]
impl Resize for FakeDriver {
    async fn resize(&self, id: InstanceId, vcpus_milli: u32, memory: Size) -> DriverResult<()> {
        self.with_live(id, |guest, _| {
            guest.spec.vcpus_milli = vcpus_milli;
            guest.spec.memory = memory;
        })
    }
}
