//! Conformance suite of compute drivers: what every driver, fake or real, keeps.
//!
//! A test implements [`Harness`] for its driver and calls [`suite`] (or single checks). A check panics with what was
//! expected; what a harness cannot arrange is printed as `skipped: reason`.

#![allow(clippy::unwrap_used, reason = "a check fails by panicking")]

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::{SinkExt, StreamExt};
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, Remedy};
use oblak_platform::frame::{Channel, Control, Frame, FrameCodec};
use tokio::io::AsyncReadExt;
use tokio::time::Instant;
use tokio_util::codec::Framed;
use uuid::Uuid;

use crate::migrate::{Lane, Limits, Migrate, Stage};
use crate::{ComputeDriver, ExecRequest, GuestSpec, GuestState, Observation};

/// What a guest of a check should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behaviour {
    /// Runs until it is asked to end, then ends within a second or two.
    Runs,
    /// Ends by itself soon after its start, with this code.
    Exits(i32),
    /// Runs and does not end when asked.
    IgnoresStop,
    /// Prints the lines `one`, `two` and `three` on its console, then runs.
    Prints,
    /// Uses CPU time all the time.
    Busy,
}

/// What the suite needs to know about a driver.
#[async_trait]
pub trait Harness: Send + Sync {
    /// A driver object, the same each time until [`Self::restart`].
    fn driver(&self) -> Arc<dyn ComputeDriver>;
    /// Throws the driver object away, as a killed agent would, and makes a new one.
    async fn restart(&self);
    /// A spec with a fresh id and `run` 1; the reason when this driver cannot arrange such a guest here.
    async fn spec(&self, behaviour: Behaviour) -> Result<GuestSpec, String>;
    /// What is left on the machine of a removed guest: processes, mounts, groups, sockets. Empty is right.
    async fn leaks(&self, spec: &GuestSpec) -> Vec<String>;
    /// Longest time for one transition.
    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }
    /// How many points of cancellation are tried; fewer for slow drivers.
    fn cancellations(&self) -> usize {
        12
    }
}

/// All checks, one after the other.
pub async fn suite(h: &dyn Harness) {
    unknown_ids(h).await;
    ensure_twice(h).await;
    prepared(h).await;
    runs(h).await;
    exit_codes(h).await;
    survives_the_driver(h).await;
    stop_with_grace_and_force(h).await;
    remove_while_running(h).await;
    pause_and_resume(h).await;
    exec(h).await;
    console(h).await;
    logs(h).await;
    usage_grows(h).await;
    cancellation(h).await;
}

async fn spec(h: &dyn Harness, check: &str, behaviour: Behaviour) -> Option<GuestSpec> {
    match h.spec(behaviour).await {
        Ok(spec) => Some(spec),
        Err(reason) => {
            println!("skipped: {check}: {reason}");
            None
        }
    }
}

async fn start(h: &dyn Harness, spec: &GuestSpec) -> Observation {
    let seen = h.driver().ensure(spec).await.unwrap_or_else(|e| panic!("ensure: {} ({e:?})", e.detail));
    assert_eq!(seen.run, spec.run, "ensure reports the run it was asked for: {seen:?}");
    seen
}

/// Waits until the guest is in one of `states`.
///
/// # Panics
/// After the harness's patience.
pub async fn wait_for(h: &dyn Harness, id: InstanceId, states: &[GuestState]) -> Observation {
    let end = Instant::now() + h.patience();
    loop {
        let seen = h.driver().observe(id).await.unwrap_or_else(|e| panic!("observe: {e:?}"));
        if states.contains(&seen.state) {
            return seen;
        }
        assert!(Instant::now() < end, "{id} should be in one of {states:?} but is {seen:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn clean(h: &dyn Harness, spec: &GuestSpec) {
    h.driver().remove(spec.id).await.unwrap_or_else(|e| panic!("remove: {e:?}"));
    assert_eq!(h.driver().observe(spec.id).await.unwrap().state, GuestState::Absent, "removed means absent");
    assert!(!h.driver().list().await.unwrap().contains(&spec.id), "removed means not listed");
    // A shim that was being executed when its guest was removed finds that out by itself and ends.
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let leaks = h.leaks(spec).await;
        if leaks.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "left behind after remove: {leaks:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Calls about a guest that does not exist: observe says absent, stop and remove succeed, the rest says gone.
pub async fn unknown_ids(h: &dyn Harness) {
    let (driver, id) = (h.driver(), InstanceId(Uuid::new_v4()));
    assert_eq!(driver.observe(id).await.unwrap().state, GuestState::Absent);
    driver.stop(id, Duration::from_secs(1)).await.unwrap();
    driver.remove(id).await.unwrap();
    driver.remove(id).await.unwrap();
    let gone =
        |what: &str, remedy: Option<Remedy>| assert_eq!(remedy, Some(Remedy::Gone), "{what} of an unknown guest");
    gone("usage", driver.usage(id).await.err().map(|e| e.remedy));
    gone("logs", driver.logs(id, None, false).await.err().map(|e| e.remedy));
    if let Some(pause) = driver.pause() {
        gone("pause", pause.pause(id).await.err().map(|e| e.remedy));
        gone("resume", pause.resume(id).await.err().map(|e| e.remedy));
    }
    if let Some(console) = driver.console() {
        gone("console", console.console(id).await.err().map(|e| e.remedy));
    }
    if let Some(exec) = driver.exec() {
        let request = ExecRequest { argv: vec!["true".into()], ..ExecRequest::default() };
        gone("exec", exec.exec(id, &request).await.err().map(|e| e.remedy));
    }
    if let Some(resize) = driver.resize() {
        gone("resize", resize.resize(id, 1000, oblak_model::Size::mib(64)).await.err().map(|e| e.remedy));
    }
}

/// `ensure` twice, also at the same time, is one guest.
pub async fn ensure_twice(h: &dyn Harness) {
    let Some(spec) = spec(h, "ensure_twice", Behaviour::Runs).await else { return };
    let driver = h.driver();
    let (one, two) = tokio::join!(driver.ensure(&spec), driver.ensure(&spec));
    // One of two at the same time may ask to be called again; never both, and never two guests.
    assert!(one.is_ok() || two.is_ok(), "{one:?} {two:?}");
    for error in [one.err(), two.err()].into_iter().flatten() {
        assert_eq!(error.remedy, Remedy::Retry, "{error:?}");
    }
    let first = wait_for(h, spec.id, &[GuestState::Running]).await;
    let again = start(h, &spec).await;
    assert_eq!((again.state, again.pid, again.started_at), (GuestState::Running, first.pid, first.started_at));
    assert_eq!(driver.list().await.unwrap().iter().filter(|i| **i == spec.id).count(), 1);
    clean(h, &spec).await;
}

/// What is prepared is not there before `ensure`, helps it whatever the draft was, and goes with the driver object or by `remove`.
pub async fn prepared(h: &dyn Harness) {
    for (same, restart, begin) in
        [(true, false, true), (false, false, true), (true, true, true), (true, false, false), (true, true, false)]
    {
        let Some(spec) = spec(h, "prepared", Behaviour::Runs).await else { return };
        let mut draft = GuestSpec { nics: Vec::new(), ..spec.clone() };
        if !same {
            draft.hostname = "another".into();
        }
        for _ in 0..2 {
            h.driver().prepare(&draft).await.unwrap_or_else(|e| panic!("prepare: {} ({e:?})", e.detail));
        }
        let seen = h.driver().observe(spec.id).await.unwrap();
        assert_eq!(seen.state, GuestState::Absent, "what is prepared is no guest: {seen:?}");
        if restart {
            h.restart().await;
        }
        if begin {
            start(h, &spec).await;
            wait_for(h, spec.id, &[GuestState::Running]).await;
        }
        clean(h, &spec).await;
    }
}

/// An ended run is not started again; a larger run is; a smaller one changes nothing.
pub async fn runs(h: &dyn Harness) {
    let Some(mut spec) = spec(h, "runs", Behaviour::Runs).await else { return };
    start(h, &spec).await;
    let first = wait_for(h, spec.id, &[GuestState::Running]).await;
    h.driver().stop(spec.id, Duration::ZERO).await.unwrap();
    let ended = wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await;
    assert_eq!(ended.state, GuestState::Stopped, "an end that was asked for is no failure: {ended:?}");
    assert!(ended.ended_at >= ended.started_at, "{ended:?}");
    for _ in 0..2 {
        let again = start(h, &spec).await;
        assert_eq!(again.state, GuestState::Stopped, "run 1 has ended and stays so: {again:?}");
    }
    spec.run = 5;
    start(h, &spec).await;
    let second = wait_for(h, spec.id, &[GuestState::Running]).await;
    assert_eq!(second.run, 5);
    assert!(second.started_at > first.started_at);
    clean(h, &spec).await;
}

/// A guest that ends by itself keeps its exit code, also for a new driver.
pub async fn exit_codes(h: &dyn Harness) {
    for (code, state) in [(0, GuestState::Stopped), (3, GuestState::Failed)] {
        let Some(spec) = spec(h, "exit_codes", Behaviour::Exits(code)).await else { return };
        start(h, &spec).await;
        let seen = wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await;
        assert_eq!((seen.state, seen.exit_code), (state, Some(code)), "{seen:?}");
        assert!(!seen.reason.is_empty() && seen.pid.is_none(), "{seen:?}");
        h.restart().await;
        let later = h.driver().observe(spec.id).await.unwrap();
        assert_eq!((later.state, later.exit_code, later.ended_at), (seen.state, seen.exit_code, seen.ended_at));
        clean(h, &spec).await;
    }
}

/// A new driver object finds the guest running, lists it, and can end it.
pub async fn survives_the_driver(h: &dyn Harness) {
    let Some(spec) = spec(h, "survives_the_driver", Behaviour::Runs).await else { return };
    start(h, &spec).await;
    let before = wait_for(h, spec.id, &[GuestState::Running]).await;
    h.restart().await;
    assert!(h.driver().list().await.unwrap().contains(&spec.id));
    let after = h.driver().observe(spec.id).await.unwrap();
    assert_eq!(
        (after.state, after.pid, after.run, after.started_at),
        (before.state, before.pid, before.run, before.started_at)
    );
    let adopted = start(h, &spec).await;
    assert_eq!(adopted.pid, before.pid, "ensure adopts");
    clean(h, &spec).await;
}

/// Asked, a guest ends within the grace; one that does not listen ends by force.
pub async fn stop_with_grace_and_force(h: &dyn Harness) {
    if let Some(spec) = spec(h, "stop with grace", Behaviour::Runs).await {
        start(h, &spec).await;
        wait_for(h, spec.id, &[GuestState::Running]).await;
        let began = Instant::now();
        h.driver().stop(spec.id, h.patience()).await.unwrap();
        assert!(began.elapsed() < h.patience(), "a guest that listens ends before the grace is over");
        assert_eq!(wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await.state, GuestState::Stopped);
        h.driver().stop(spec.id, Duration::from_secs(1)).await.unwrap();
        clean(h, &spec).await;
    }
    if let Some(spec) = spec(h, "stop by force", Behaviour::IgnoresStop).await {
        start(h, &spec).await;
        wait_for(h, spec.id, &[GuestState::Running]).await;
        // Long enough for the guest's first instructions, which make it deaf.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let began = Instant::now();
        h.driver().stop(spec.id, Duration::from_millis(500)).await.unwrap();
        assert!(began.elapsed() >= Duration::from_millis(450), "the grace was granted");
        let seen = wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await;
        assert_eq!((seen.state, seen.exit_code), (GuestState::Stopped, Some(137)), "{seen:?}");
        clean(h, &spec).await;
    }
}

/// `remove` of a running guest leaves nothing.
pub async fn remove_while_running(h: &dyn Harness) {
    let Some(spec) = spec(h, "remove_while_running", Behaviour::IgnoresStop).await else { return };
    start(h, &spec).await;
    clean(h, &spec).await;
    h.driver().remove(spec.id).await.unwrap();
}

/// A frozen guest says so, also to a new driver, and runs on.
pub async fn pause_and_resume(h: &dyn Harness) {
    if h.driver().pause().is_none() {
        return println!("skipped: pause_and_resume: the driver has no such ability");
    }
    let Some(spec) = spec(h, "pause_and_resume", Behaviour::Runs).await else { return };
    start(h, &spec).await;
    wait_for(h, spec.id, &[GuestState::Running]).await;
    for _ in 0..2 {
        h.driver().pause().unwrap().pause(spec.id).await.unwrap();
    }
    wait_for(h, spec.id, &[GuestState::Paused]).await;
    h.restart().await;
    assert_eq!(h.driver().observe(spec.id).await.unwrap().state, GuestState::Paused);
    for _ in 0..2 {
        h.driver().pause().unwrap().resume(spec.id).await.unwrap();
    }
    wait_for(h, spec.id, &[GuestState::Running]).await;
    h.driver().pause().unwrap().pause(spec.id).await.unwrap();
    h.driver().stop(spec.id, Duration::ZERO).await.unwrap();
    assert_eq!(wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await.state, GuestState::Stopped);
    clean(h, &spec).await;
}

/// What an exec gave: stdout, stderr, exit code.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code; none when the stream ended without one.
    pub code: Option<i32>,
    /// Error that ended the stream.
    pub error: Option<String>,
}

/// Runs an exec stream to its end, sending `stdin` and then end of file.
///
/// # Panics
/// When it takes longer than `limit`.
pub async fn run_exec(stream: BoxDuplex, stdin: &[u8], limit: Duration) -> ExecOutput {
    let mut stream = Framed::new(stream, FrameCodec);
    let work = async {
        let mut out = ExecOutput::default();
        let first = stream.next().await.expect("a frame").expect("a whole frame");
        if first.as_control() != Some(Control::Ready) {
            out.error = Some(format!("{:?}", first.as_control()));
            return out;
        }
        if !stdin.is_empty() {
            stream.send(Frame::new(Channel::Stdin, stdin.to_vec())).await.expect("stdin");
        }
        let _ = stream.send(Frame::control(&Control::Eof)).await;
        while let Some(Ok(frame)) = stream.next().await {
            match (frame.channel, frame.as_control()) {
                (Channel::Stdout, _) => out.stdout.extend_from_slice(&frame.payload),
                (Channel::Stderr, _) => out.stderr.extend_from_slice(&frame.payload),
                (_, Some(Control::Exit { code })) => out.code = Some(code),
                (_, Some(Control::Error { detail, .. })) => out.error = Some(detail),
                _ => {}
            }
        }
        out
    };
    tokio::time::timeout(limit, work).await.expect("the exec should have ended")
}

/// Exit codes, output, standard input and errors of commands inside.
pub async fn exec(h: &dyn Harness) {
    if h.driver().exec().is_none() {
        return println!("skipped: exec: the driver has no such ability");
    }
    let Some(spec) = spec(h, "exec", Behaviour::Runs).await else { return };
    start(h, &spec).await;
    wait_for(h, spec.id, &[GuestState::Running]).await;
    let driver = h.driver();
    let run = async |argv: &[&str], stdin: &[u8]| {
        let request = ExecRequest { argv: argv.iter().map(ToString::to_string).collect(), ..ExecRequest::default() };
        let stream =
            driver.exec().unwrap().exec(spec.id, &request).await.unwrap_or_else(|e| panic!("exec {argv:?}: {e:?}"));
        run_exec(stream, stdin, h.patience()).await
    };
    let out = run(&["echo", "hello"], b"").await;
    assert_eq!((out.stdout.as_slice(), out.code), (&b"hello\n"[..], Some(0)), "{out:?}");
    assert_eq!(run(&["sh", "-c", "exit 7"], b"").await.code, Some(7));
    let big = vec![b'z'; 100_000];
    let out = run(&["cat"], &big).await;
    assert_eq!((out.stdout.len(), out.code), (big.len(), Some(0)), "{:?}", out.error);
    let request = ExecRequest { argv: vec!["/no/such/program".into()], ..ExecRequest::default() };
    match driver.exec().unwrap().exec(spec.id, &request).await {
        Err(e) => assert_eq!(e.remedy, Remedy::Permanent, "{e:?}"),
        Ok(stream) => {
            let out = run_exec(stream, b"", h.patience()).await;
            assert!(out.error.is_some() || matches!(out.code, Some(126 | 127)), "{out:?}");
        }
    }
    // A person who hangs up in the middle harms nobody.
    let request = ExecRequest { argv: vec!["sleep".into(), "1000".into()], ..ExecRequest::default() };
    drop(driver.exec().unwrap().exec(spec.id, &request).await.unwrap());
    assert_eq!(run(&["true"], b"").await.code, Some(0));
    clean(h, &spec).await;
}

/// The console opens for several people and ends with the guest's removal.
pub async fn console(h: &dyn Harness) {
    if h.driver().console().is_none() {
        return println!("skipped: console: the driver has no such ability");
    }
    let Some(spec) = spec(h, "console", Behaviour::Runs).await else { return };
    start(h, &spec).await;
    wait_for(h, spec.id, &[GuestState::Running]).await;
    let driver = h.driver();
    let mut streams = Vec::new();
    for _ in 0..2 {
        let stream = driver.console().unwrap().console(spec.id).await.unwrap_or_else(|e| panic!("console: {e:?}"));
        let mut stream = Framed::new(stream, FrameCodec);
        let first = tokio::time::timeout(h.patience(), stream.next()).await.expect("a first frame in time");
        assert_eq!(first.expect("a frame").expect("a whole frame").as_control(), Some(Control::Ready));
        streams.push(stream);
    }
    clean(h, &spec).await;
}

/// Output so far, the last lines, following across a restart of the guest, and the end with its removal.
pub async fn logs(h: &dyn Harness) {
    let Some(mut spec) = spec(h, "logs", Behaviour::Prints).await else { return };
    start(h, &spec).await;
    let driver = h.driver();
    let read = async |tail: Option<u64>| {
        let mut text = Vec::new();
        driver.logs(spec.id, tail, false).await.unwrap().read_to_end(&mut text).await.unwrap();
        String::from_utf8_lossy(&text).replace('\r', "")
    };
    let end = Instant::now() + h.patience();
    while !read(None).await.contains("one\ntwo\nthree\n") {
        assert!(Instant::now() < end, "the output should be in the log: {:?}", read(None).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(read(Some(1)).await, "three\n");
    assert_eq!(read(Some(2)).await, "two\nthree\n");
    assert_eq!(read(Some(0)).await, "");
    let mut follower = driver.logs(spec.id, Some(1), true).await.unwrap();
    driver.stop(spec.id, Duration::ZERO).await.unwrap();
    wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await;
    spec.run += 1;
    start(h, &spec).await;
    let mut seen = String::new();
    let mut buffer = [0u8; 1024];
    while !seen.contains("three\none\ntwo\nthree\n") {
        let n = tokio::time::timeout(h.patience(), follower.read(&mut buffer))
            .await
            .expect("output of the second run")
            .unwrap();
        assert!(n > 0, "a follower goes on across restarts: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..n]).replace('\r', ""));
    }
    clean(h, &spec).await;
    let rest = tokio::time::timeout(h.patience(), follower.read_to_end(&mut Vec::new())).await;
    assert!(rest.is_ok(), "a follower ends when the guest is removed");
}

/// CPU time grows, memory is not zero.
pub async fn usage_grows(h: &dyn Harness) {
    let Some(spec) = spec(h, "usage_grows", Behaviour::Busy).await else { return };
    start(h, &spec).await;
    wait_for(h, spec.id, &[GuestState::Running]).await;
    let first = h.driver().usage(spec.id).await.unwrap();
    let end = Instant::now() + h.patience();
    loop {
        let later = h.driver().usage(spec.id).await.unwrap();
        if later.cpu_ns > first.cpu_ns && later.memory_bytes > 0 {
            break;
        }
        assert!(Instant::now() < end, "usage should grow: {first:?} {later:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    h.driver().stop(spec.id, Duration::ZERO).await.unwrap();
    wait_for(h, spec.id, &[GuestState::Stopped, GuestState::Failed]).await;
    assert_eq!(h.driver().usage(spec.id).await.unwrap_err().remedy, Remedy::Gone, "usage of a guest that does not run");
    clean(h, &spec).await;
}

/// Polls `future` until it was not ready `times` times, then drops it.
async fn cancel_after<F: Future>(future: F, times: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = times;
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}

/// Futures dropped at every await in turn: a later call goes on, and nothing is left at the end.
pub async fn cancellation(h: &dyn Harness) {
    for times in 0..h.cancellations() {
        let Some(spec) = spec(h, "cancellation", Behaviour::Runs).await else { return };
        let driver = h.driver();
        let whole = cancel_after(driver.ensure(&spec), times).await.is_some();
        if times % 2 == 0 {
            // Straight to removal, in the middle of a start.
            drop(cancel_after(driver.remove(spec.id), times / 2).await);
        } else {
            let end = Instant::now() + h.patience();
            while let Err(e) = driver.ensure(&spec).await {
                assert!(e.remedy == Remedy::Retry && Instant::now() < end, "ensure after a cancelled one: {e:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            wait_for(h, spec.id, &[GuestState::Running]).await;
            drop(cancel_after(driver.stop(spec.id, Duration::ZERO), times / 2).await);
        }
        clean(h, &spec).await;
        if whole && times >= 6 {
            return;
        }
    }
}

/// Sends a guest up to the moment at which both sides hold all of it, and tells how long it has stood still by then.
///
/// # Panics
/// When it breaks off, or does not end within `patience`.
pub async fn send(from: &dyn Migrate, to: &dyn Migrate, target: &GuestSpec, patience: Duration) -> Duration {
    let id = target.id;
    let end = Instant::now() + patience;
    let until = async |memory: bool, stage: Stage| loop {
        let seen = from.sending(id, memory).await.unwrap();
        if seen.stage == stage {
            return;
        }
        assert!(seen.stage != Stage::Failed && Instant::now() < end, "waiting for {stage:?}: {seen:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let offer = from.offer(id).await.unwrap();
    to.expect(&GuestSpec { run: offer.run, ..target.clone() }, &offer).await.unwrap();
    for disk in &offer.disks {
        let lane = to.accept(id, &Lane::Disk(disk.name.clone())).await.unwrap();
        from.send_disk(id, &disk.name, lane).await.unwrap();
    }
    if !offer.disks.is_empty() {
        until(false, Stage::DisksReady).await;
    }
    let limits = Limits { downtime_ms: 300, bandwidth: 0 };
    from.send_memory(id, limits, to.accept(id, &Lane::Memory).await.unwrap()).await.unwrap();
    until(true, Stage::Paused).await;
    let still = Instant::now();
    from.finish_sending(id).await.unwrap();
    until(true, Stage::Sent).await;
    while !to.arrived(id).await.unwrap() {
        assert!(Instant::now() < end, "it should arrive");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    still.elapsed()
}

/// A running guest of `a` moves to `b`, a driver of another node: first it stays after all, then it moves. `target` is its spec there, made
/// anew for each try by the caller's `fresh`. Between the two neither side runs it by itself, also after a restart of both drivers.
pub async fn migration(a: &dyn Harness, b: &dyn Harness, spec: &GuestSpec, fresh: impl Fn() -> GuestSpec) {
    let id = spec.id;
    let patience = a.patience() + b.patience();
    for moves in [false, true] {
        let target = fresh();
        let (from, to) = (a.driver(), b.driver());
        send(from.migrate().unwrap(), to.migrate().unwrap(), &target, patience).await;
        for _ in 0..2 {
            let here = a.driver().observe(id).await.unwrap();
            assert_eq!((here.state, here.reason.as_str()), (GuestState::Paused, "Moving"), "{here:?}");
            let there = b.driver().observe(id).await.unwrap();
            assert_eq!((there.state, there.reason.as_str()), (GuestState::Starting, "Arriving"), "{there:?}");
            a.restart().await;
            b.restart().await;
        }
        assert!(b.driver().list().await.unwrap().contains(&id), "what waits is found again");
        if moves {
            for _ in 0..2 {
                let there = b.driver().migrate().unwrap().take_over(id).await.unwrap();
                assert_eq!((there.state, there.run), (GuestState::Running, spec.run), "{there:?}");
            }
            clean(a, spec).await;
        } else {
            clean(b, &target).await;
            for _ in 0..2 {
                a.driver().migrate().unwrap().stop_sending(id).await.unwrap();
            }
        }
        let alive = if moves { b } else { a };
        wait_for(alive, id, &[GuestState::Running]).await;
    }
}
