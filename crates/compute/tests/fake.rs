//! The fake driver passes the conformance suite, in no time, and does what its scripts say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::conformance::{self, Behaviour, Harness};
use oblak_compute::fake::{FakeDriver, FakeWorld, Op, Script};
use oblak_compute::{Boot, ComputeDriver, ContainerOptions, GuestSpec, GuestState};
use oblak_model::{InstanceId, Isolation, Size};
use oblak_platform::driver::Remedy;
use tokio::time::Instant;
use uuid::Uuid;

fn spec(argv: &[&str]) -> GuestSpec {
    GuestSpec {
        id: InstanceId(Uuid::new_v4()),
        name: "guest".into(),
        project: "default".into(),
        isolation: Isolation::Container,
        dir: PathBuf::from("/nonexistent"),
        run: 1,
        epoch: 1,
        vcpus_milli: 1000,
        memory: Size::mib(64),
        boot: Boot::Oci { layers: Vec::new(), upper: PathBuf::new(), upper_size: Size::ZERO },
        disks: Vec::new(),
        nics: Vec::new(),
        hostname: "guest".into(),
        seed: None,
        fence: None,
        container: ContainerOptions {
            argv: argv.iter().map(ToString::to_string).collect(),
            env: BTreeMap::new(),
            ..ContainerOptions::default()
        },
    }
}

struct FakeHarness {
    world: Arc<FakeWorld>,
    driver: Mutex<Arc<FakeDriver>>,
}

#[async_trait]
#[allow(clippy::unwrap_used, reason = "a test")]
impl Harness for FakeHarness {
    fn driver(&self) -> Arc<dyn ComputeDriver> {
        self.driver.lock().unwrap().clone()
    }
    async fn restart(&self) {
        *self.driver.lock().unwrap() = Arc::new(FakeDriver::new(self.world.clone()));
    }
    async fn spec(&self, behaviour: Behaviour) -> Result<GuestSpec, String> {
        Ok(match behaviour {
            Behaviour::Runs | Behaviour::Busy => spec(&["fake", "start_delay=5ms", "stop_delay=10ms"]),
            Behaviour::Exits(code) => spec(&["fake", "run_for=20ms", &format!("exit={code}")]),
            Behaviour::IgnoresStop => spec(&["fake", "ignore_stop"]),
            Behaviour::Prints => spec(&["fake", "output=one\ntwo\nthree"]),
        })
    }
    async fn leaks(&self, spec: &GuestSpec) -> Vec<String> {
        self.world.running().contains(&spec.id).then(|| "still runs".to_string()).into_iter().collect()
    }
}

fn world() -> Arc<FakeWorld> {
    FakeWorld::new(oblak_platform::clock::system())
}

#[tokio::test(start_paused = true)]
async fn conformance() {
    let world = world();
    let driver = Mutex::new(Arc::new(FakeDriver::new(world.clone())));
    conformance::suite(&FakeHarness { world: world.clone(), driver }).await;
    assert_eq!(world.started_twice(), vec![]);
}

#[tokio::test(start_paused = true)]
async fn scripts_delay_fail_lose_and_hang() {
    let world = world();
    let driver = FakeDriver::new(world.clone());

    let failing = spec(&["fake", "fail=2:permanent", "start_delay=3s", "run_for=10s", "exit=4"]);
    for _ in 0..2 {
        assert_eq!(driver.ensure(&failing).await.unwrap_err().remedy, Remedy::Permanent);
        assert_eq!(driver.list().await.unwrap(), vec![]);
    }
    let began = Instant::now();
    assert_eq!(driver.ensure(&failing).await.unwrap().state, GuestState::Running);
    assert_eq!(began.elapsed(), Duration::from_secs(3));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let seen = driver.observe(failing.id).await.unwrap();
    assert_eq!((seen.state, seen.exit_code, seen.reason.as_str()), (GuestState::Failed, Some(4), "Error"));

    let lost = spec(&[]);
    driver.ensure(&lost).await.unwrap();
    world.lose(lost.id);
    let seen = driver.observe(lost.id).await.unwrap();
    assert_eq!((seen.state, seen.exit_code, seen.reason.as_str()), (GuestState::Failed, None, "ShimLost"));

    let stuck = spec(&[]);
    world.script(stuck.id, Script { hang: vec![Op::Stop], ..Script::default() });
    driver.ensure(&stuck).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(60), driver.stop(stuck.id, Duration::ZERO)).await.is_err());
    world.reboot();
    assert_eq!(driver.observe(stuck.id).await.unwrap().reason, "NodeRebooted");
    assert_eq!(world.starts(failing.id, 1), 1);

    let wrong = spec(&["fake", "explode"]);
    assert!(driver.ensure(&wrong).await.unwrap_err().detail.contains("explode"));
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_guests_are_cheap() {
    let began = std::time::Instant::now();
    let driver = FakeDriver::new(world());
    for _ in 0..10_000 {
        driver.ensure(&spec(&[])).await.unwrap();
    }
    for id in driver.list().await.unwrap() {
        assert_eq!(driver.observe(id).await.unwrap().state, GuestState::Running);
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn guests_move_between_two_machines() {
    let machine = || {
        let world = FakeWorld::new(oblak_platform::clock::system());
        FakeHarness { driver: Mutex::new(Arc::new(FakeDriver::new(world.clone()))), world }
    };
    let (a, b) = (machine(), machine());
    let guest = spec(&["fake"]);
    a.driver().ensure(&guest).await.unwrap();
    conformance::migration(&a, &b, &guest, || guest.clone()).await;
    assert_eq!(a.world.running().len() + b.world.running().len(), 1);
    let other = GuestSpec { memory: Size::mib(32), ..guest.clone() };
    let offer = b.driver().migrate().unwrap().offer(guest.id).await.unwrap();
    assert_eq!(a.driver().migrate().unwrap().expect(&other, &offer).await.unwrap_err().code, "machine_differs");
}
