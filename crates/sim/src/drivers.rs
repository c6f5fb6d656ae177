//! Drivers of a pretended machine: the fakes of each family, with bad days.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use oblak_agent::fake::FakeImages;
use oblak_agent::{ImageFailure, ImageProgress, ImageService, LocalImage};
use oblak_compute::fake::{FakeDriver, FakeWorld};
use oblak_compute::{
    Capabilities, ComputeDriver, Console, Exec, Fencing, GuestSpec, Hotplug, Observation, Pause, Resize, SnapshotGuest,
    UsageSample, Vnc,
};
use oblak_model::{ImageId, ImageSource, InstanceId};
use oblak_platform::driver::{BoxRead, DriverError, DriverResult};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::chance::Dice;
use crate::mutation::Mutation;

/// How often a call that hangs looks whether the day is over.
const HANG: Duration = Duration::from_millis(500);

/// How the drivers of a node behave now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Day {
    /// Calls that fail, per thousand.
    pub fails: u32,
    /// Longest time of a call.
    pub delay: Duration,
    /// Calls that do not come back before the day is over, per thousand.
    pub hangs: u32,
}

/// The mood of one node's drivers; shared with them, outlives the agent.
#[derive(Clone)]
pub struct Days(Arc<Mutex<(Day, Dice)>>);

impl Days {
    /// Good days.
    #[must_use]
    pub fn new(seed: u64, node: &str) -> Self {
        Self(Arc::new(Mutex::new((Day::default(), Dice::new(seed, &format!("drivers of {node}"))))))
    }

    fn lock(&self) -> MutexGuard<'_, (Day, Dice)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes them.
    pub fn set(&self, day: Day) {
        self.lock().0 = day;
    }

    /// Before the work: it may take long, and fail. Returns whether it fails only after the work was done.
    async fn begin(&self) -> DriverResult<bool> {
        let (pause, hangs, fails, late) = {
            let mut state = self.lock();
            let day = state.0;
            let dice = &mut state.1;
            let most = if dice.permille(100) { day.delay } else { day.delay / 50 };
            let (pause, hangs) = (dice.between(Duration::ZERO, most), dice.permille(day.hangs));
            (pause, hangs, dice.permille(day.fails), dice.permille(500))
        };
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
        while hangs && self.lock().0.hangs > 0 {
            tokio::time::sleep(HANG).await;
        }
        if fails && !late { Err(bad_day()) } else { Ok(fails) }
    }
}

fn bad_day() -> DriverError {
    DriverError::retry("bad_day", "the machine has a bad day")
}

/// The fake compute driver with bad days and, for tests, with defects.
pub struct Compute {
    fake: FakeDriver,
    days: Days,
    mutation: Option<Mutation>,
    /// Where a defect starts a guest a second time.
    neighbour: Option<FakeDriver>,
}

impl Compute {
    /// The driver of a machine.
    #[must_use]
    pub fn new(
        world: &Arc<FakeWorld>,
        days: Days,
        mutation: Option<Mutation>,
        neighbour: Option<&Arc<FakeWorld>>,
    ) -> Self {
        let neighbour = neighbour.map(|world| FakeDriver::new(world.clone()));
        Self { fake: FakeDriver::new(world.clone()), days, mutation, neighbour }
    }
}

#[async_trait]
impl ComputeDriver for Compute {
    fn name(&self) -> &'static str {
        "fake"
    }
    async fn probe(&self) -> Capabilities {
        self.fake.probe().await
    }
    async fn ensure(&self, spec: &GuestSpec) -> DriverResult<Observation> {
        let late = self.days.begin().await?;
        if let Some(neighbour) = self.neighbour.as_ref().filter(|_| self.mutation == Some(Mutation::StartTwice)) {
            neighbour.ensure(spec).await?;
        }
        let seen = self.fake.ensure(spec).await?;
        if late { Err(bad_day()) } else { Ok(seen) }
    }
    async fn observe(&self, id: InstanceId) -> DriverResult<Observation> {
        self.fake.observe(id).await
    }
    async fn list(&self) -> DriverResult<Vec<InstanceId>> {
        self.fake.list().await
    }
    async fn stop(&self, id: InstanceId, grace: Duration) -> DriverResult<()> {
        let late = self.days.begin().await?;
        self.fake.stop(id, grace).await?;
        if late { Err(bad_day()) } else { Ok(()) }
    }
    async fn remove(&self, id: InstanceId) -> DriverResult<()> {
        let late = self.days.begin().await?;
        if self.mutation != Some(Mutation::LeakGuests) {
            self.fake.remove(id).await?;
        }
        if late { Err(bad_day()) } else { Ok(()) }
    }
    async fn usage(&self, id: InstanceId) -> DriverResult<UsageSample> {
        self.fake.usage(id).await
    }
    async fn logs(&self, id: InstanceId, tail: Option<u64>, follow: bool) -> DriverResult<BoxRead> {
        self.fake.logs(id, tail, follow).await
    }
    fn pause(&self) -> Option<&dyn Pause> {
        ComputeDriver::pause(&self.fake)
    }
    fn fencing(&self) -> Option<&dyn Fencing> {
        ComputeDriver::fencing(&self.fake)
    }
    fn console(&self) -> Option<&dyn Console> {
        ComputeDriver::console(&self.fake)
    }
    fn exec(&self) -> Option<&dyn Exec> {
        ComputeDriver::exec(&self.fake)
    }
    fn vnc(&self) -> Option<&dyn Vnc> {
        ComputeDriver::vnc(&self.fake)
    }
    fn hotplug(&self) -> Option<&dyn Hotplug> {
        ComputeDriver::hotplug(&self.fake)
    }
    fn snapshot(&self) -> Option<&dyn SnapshotGuest> {
        ComputeDriver::snapshot(&self.fake)
    }
    fn resize(&self) -> Option<&dyn Resize> {
        ComputeDriver::resize(&self.fake)
    }
}

/// Images of a node: an import takes a while, and everything has its bad days. Clones are the same disk.
#[derive(Clone)]
pub struct Images {
    fake: FakeImages,
    days: Days,
    mutation: Option<Mutation>,
}

impl Images {
    /// None.
    #[must_use]
    pub fn new(days: Days) -> Self {
        Self { fake: FakeImages::default(), days, mutation: None }
    }

    /// The same disk with a defect.
    #[must_use]
    pub fn with(&self, mutation: Option<Mutation>) -> Self {
        Self { mutation, ..self.clone() }
    }

    /// Those on the disk.
    #[must_use]
    pub fn here(&self) -> Vec<ImageId> {
        self.fake.here()
    }
}

#[async_trait]
impl ImageService for Images {
    async fn get(&self, id: ImageId) -> DriverResult<Option<LocalImage>> {
        self.fake.get(id).await
    }
    async fn import(
        &self,
        id: ImageId,
        name: &str,
        source: &ImageSource,
        password: Option<&str>,
        progress: watch::Sender<ImageProgress>,
        cancel: CancellationToken,
    ) -> Result<LocalImage, ImageFailure> {
        let failed = |error: DriverError| ImageFailure { code: error.code, detail: error.detail, transient: true };
        self.days.begin().await.map_err(failed)?;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        self.fake.import(id, name, source, password, progress, cancel).await
    }
    async fn put(
        &self,
        _: ImageId,
        _: &str,
        _: BoxRead,
        _: Option<u64>,
        _: Option<&str>,
    ) -> Result<LocalImage, ImageFailure> {
        Err(ImageFailure {
            code: "unsupported".into(),
            detail: "uploads need a tunnel, and a simulation has none".into(),
            transient: false,
        })
    }
    async fn export(&self, id: ImageId) -> DriverResult<BoxRead> {
        self.fake.export(id).await
    }
    async fn layers(&self, id: ImageId) -> DriverResult<Vec<PathBuf>> {
        self.fake.layers(id).await
    }
    async fn hold(&self, id: ImageId, instance: InstanceId) -> DriverResult<()> {
        self.fake.hold(id, instance).await
    }
    async fn release(&self, instance: InstanceId) -> DriverResult<()> {
        self.fake.release(instance).await
    }
    async fn remove(&self, id: ImageId) -> DriverResult<()> {
        let late = self.days.begin().await?;
        if self.mutation != Some(Mutation::LeakImages) {
            self.fake.remove(id).await?;
        }
        if late { Err(bad_day()) } else { Ok(()) }
    }
    async fn fetched(&self) -> DriverResult<Vec<ImageId>> {
        self.fake.fetched().await
    }
}
