//! Moving a running machine: QEMU's own migration, its streams carried by the caller.
//!
//! The emulator has no network. Memory goes through a connected descriptor (`fd:` of `migrate` and `migrate-incoming`), disks
//! by NBD: the destination exports its empty disk on a socket of its directory, the source mirrors into it (QEMU docs
//! `interop/live-block-operations`, `devel/migration`). Nothing is remembered here: jobs, the state of the migration and the
//! machine's run state are asked for each time, so a new driver goes on where the old one was.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::migrate::{Lane, Limits, Migrate, Offer, OfferedDisk, Sending, Stage};
use oblak_compute::{Boot, GuestSpec, Observation};
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use oblak_platform::fsx;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::QemuDriver;
use super::record::{Accel, GuestDir, OnDisk, Record};
use super::session::{Session, refused};
use super::{disk, sock, start};

const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long the end of a mirror and the last of memory may take: the limit of the downtime is kept by the emulator, this is for one
/// that hangs.
const SWITCH_DEADLINE: Duration = Duration::from_secs(60);
/// How long the emulator may take to give up.
const CANCEL_DEADLINE: Duration = Duration::from_secs(30);
/// Bytes copied at once between the emulator and the caller's stream.
const PUMP_BYTES: usize = 256 * 1024;
/// Name of the root disk in an offer, which is its node in the emulator.
const ROOT: &str = "root";
/// Descriptor names in the monitor.
const MEMORY_FD: &str = "oblak-memory";
const NBD_FD: &str = "oblak-nbd";
const DISK_FD: &str = "oblak-disk";

/// What must be the same at both ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Machine {
    emulator: String,
    machine: String,
    accel: Accel,
    /// What the guest sees as its processor.
    cpu: String,
    vcpus_milli: u32,
    memory: u64,
    max_vcpus: u32,
    ports: u8,
    nics: usize,
    uefi: bool,
    seed: bool,
}

/// The processor behind `-cpu`: with KVM the host's own, so both hosts must have the same.
fn processor(accel: Accel) -> String {
    if accel == Accel::Tcg {
        return "max".into();
    }
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let wanted = ["vendor_id", "cpu family", "model", "model name", "stepping", "flags"];
    let of = |line: &str| line.split_once(':').map(|(k, v)| (k.trim().to_string(), v.trim().to_string()));
    first.lines().filter_map(of).filter(|(k, _)| wanted.contains(&k.as_str())).map(|(_, v)| v + ";").collect()
}

fn root_of(spec: &GuestSpec) -> Option<(&std::path::Path, oblak_compute::DiskFormat)> {
    match &spec.boot {
        Boot::Disk { root, format, .. } | Boot::Kernel { root: Some(root), format, .. } => Some((root, *format)),
        _ => None,
    }
}

fn job(disk: &str) -> String {
    format!("mirror-{disk}")
}

/// Node of the far end of a mirror.
fn target(disk: &str) -> String {
    format!("far-{disk}")
}

/// A descriptor for the emulator whose bytes go to and come from `stream`, until either end closes.
fn pump(mut stream: BoxDuplex) -> DriverResult<OwnedFd> {
    let pair = || -> std::io::Result<_> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((tokio::net::UnixStream::from_std(ours)?, theirs))
    };
    let (mut ours, theirs) = pair().map_err(|e| DriverError::io("socket pair", &e))?;
    tokio::spawn(async move {
        let ended = tokio::io::copy_bidirectional_with_sizes(&mut ours, &mut stream, PUMP_BYTES, PUMP_BYTES).await;
        tracing::debug!(?ended, "a stream of a migration ended");
    });
    Ok(theirs.into())
}

impl QemuDriver {
    fn machine(&self, record: &Record, emulator: &str, memory: u64) -> Machine {
        Machine {
            emulator: emulator.into(),
            machine: record.machine.clone(),
            accel: record.accel,
            cpu: processor(record.accel),
            vcpus_milli: record.spec.vcpus_milli,
            memory,
            max_vcpus: record.max_vcpus,
            ports: record.ports,
            nics: record.spec.nics.len(),
            uefi: record.firmware.is_some(),
            seed: record.spec.seed.is_some(),
        }
    }

    /// The record of a machine that waits for another's memory.
    async fn incoming_record(&self, spec: &GuestSpec, offer: &Offer, uid: u32) -> DriverResult<Record> {
        let wanted: Machine = serde_json::from_value(offer.machine.clone())
            .map_err(|e| DriverError::permanent("offer_unreadable", format!("the offer cannot be read: {e}")))?;
        let (emulator, accel) = (self.emulator().await?, self.accel().await?.accel);
        let mut record = start::plan(&self.config, spec, emulator, accel, uid);
        record.incoming = true;
        record.max_vcpus = wanted.max_vcpus;
        record.ports = wanted.ports;
        let here = self.machine(&record, &emulator.version, spec.memory.as_mib_ceil() << 20);
        if here == wanted {
            return Ok(record);
        }
        let text = |m: &Machine| {
            let cpu: String = m.cpu.chars().take(60).collect();
            format!("qemu {} {} {} cpu {cpu}", m.emulator, m.machine, m.accel.name())
        };
        let (code, detail) = if text(&here) == text(&wanted) {
            ("machine_differs", format!("the machine would not be the same here: {here:?}, not {wanted:?}"))
        } else {
            let detail = format!("this node has {}, the machine runs on {}", text(&here), text(&wanted));
            ("cpu_differs", detail + "; move it without --live")
        };
        Err(DriverError::permanent(code, detail))
    }
}

impl Session {
    fn failed(&self, doing: &'static str) -> impl Fn(super::qmp::QmpError) -> DriverError {
        let id = self.record.spec.id;
        move |e| refused(id, doing, &e)
    }

    async fn hand(&self, name: &str, fd: &OwnedFd) -> DriverResult<()> {
        let given = self.qmp.execute_with_fd("getfd", json!({"fdname": name}), fd.as_fd()).await;
        given.map(drop).map_err(self.failed("hand a stream to"))
    }

    async fn run_state(&self) -> DriverResult<String> {
        let status = self.qmp.execute("query-status", Value::Null).await.map_err(self.failed("look at"))?;
        Ok(status["status"].as_str().unwrap_or_default().to_string())
    }

    async fn migration(&self) -> DriverResult<Value> {
        self.qmp.execute("query-migrate", Value::Null).await.map_err(self.failed("look at"))
    }

    /// Mirrors of this machine.
    async fn mirrors(&self) -> DriverResult<Vec<Value>> {
        let jobs = self.qmp.execute("query-jobs", Value::Null).await.map_err(self.failed("look at"))?;
        let ours = |j: &&Value| j["id"].as_str().is_some_and(|id| id.starts_with("mirror-"));
        Ok(jobs.as_array().into_iter().flatten().filter(ours).cloned().collect())
    }

    /// Ends every mirror; `complete` keeps the copies whole, otherwise they are given up. Fine when there are none.
    async fn end_mirrors(&self, complete: bool) -> DriverResult<()> {
        let end = Instant::now() + SWITCH_DEADLINE;
        let mut asked = false;
        loop {
            let mirrors = self.mirrors().await?;
            if mirrors.is_empty() {
                return Ok(());
            }
            for mirror in &mirrors {
                let id = mirror["id"].as_str().unwrap_or_default();
                if mirror["status"] != "concluded" {
                    if !asked {
                        let arguments = json!({"device": id, "force": !complete});
                        let told = self.qmp.execute("block-job-cancel", arguments).await;
                        if complete {
                            told.map_err(self.failed("complete a disk of"))?;
                        }
                    }
                    continue;
                }
                let error = mirror["error"].as_str().map(str::to_string);
                let disk = id.trim_start_matches("mirror-");
                let _ = self.qmp.execute("job-dismiss", json!({"id": id})).await;
                let _ = self.qmp.execute("blockdev-del", json!({"node-name": target(disk)})).await;
                if let Some(error) = error.filter(|_| complete) {
                    return Err(DriverError::permanent(
                        "mirror_failed",
                        format!("copying disk {disk} failed: {error}"),
                    ));
                }
            }
            asked = true;
            if Instant::now() >= end {
                return Err(DriverError::retry("mirror_stuck", "the copy of a disk does not end"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Waits until the migration is in one of `states`.
    async fn wait_migration(&self, states: &[&str], deadline: Duration) -> DriverResult<String> {
        let end = Instant::now() + deadline;
        loop {
            let info = self.migration().await?;
            let state = info["status"].as_str().unwrap_or_default();
            if states.contains(&state) {
                return Ok(state.into());
            }
            if Instant::now() >= end {
                return Err(DriverError::retry("migration_stuck", format!("the emulator stays in {state:?}")));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

#[async_trait]
impl Migrate for QemuDriver {
    async fn offer(&self, id: InstanceId) -> DriverResult<Offer> {
        let emulator = self.emulator().await?.version.clone();
        let session = self.session(id).await?;
        let record = &session.record;
        if record.resized {
            return Err(DriverError::unsupported(
                "vCPUs or memory were changed while it ran; restart it first, or move it without --live",
            ));
        }
        if !record.spec.disks.is_empty() || !session.volumes().await?.is_empty() {
            return Err(DriverError::unsupported("a machine with volumes cannot move while it runs"));
        }
        let mut disks = Vec::new();
        if root_of(&record.spec).is_some() {
            let nodes = session.qmp.execute("query-named-block-nodes", json!({"flat": true})).await;
            let nodes = nodes.map_err(session.failed("look at the disks of"))?;
            let root = nodes.as_array().into_iter().flatten().find(|n| n["node-name"] == ROOT);
            let bytes = root.and_then(|n| n["image"]["virtual-size"].as_u64()).unwrap_or_default();
            disks.push(OfferedDisk { name: ROOT.into(), bytes });
        }
        let machine = self.machine(record, &emulator, record.spec.memory.as_mib_ceil() << 20);
        let machine = serde_json::to_value(machine).map_err(|e| DriverError::permanent("internal", e.to_string()))?;
        Ok(Offer { driver: "qemu".into(), run: record.spec.run, machine, disks })
    }

    async fn send_disk(&self, id: InstanceId, name: &str, stream: BoxDuplex) -> DriverResult<()> {
        let session = self.session(id).await?;
        let Some((path, format)) = root_of(&session.record.spec).filter(|_| name == ROOT) else {
            return Err(DriverError::permanent("no_such_disk", format!("machine {id} has no disk {name:?}")));
        };
        // An overlay has the image of the instance below it, which the destination has as well.
        let sync = if disk::chain(path, format)?.len() > 1 { "top" } else { "full" };
        let theirs = pump(stream)?;
        session.hand(DISK_FD, &theirs).await?;
        let node = json!({"driver": "nbd", "node-name": target(name), "export": name, "discard": "unmap",
            "server": {"type": "fd", "str": DISK_FD}});
        session
            .qmp
            .execute_with("blockdev-add", node, None, CANCEL_DEADLINE)
            .await
            .map_err(session.failed("connect the disk of"))?;
        let arguments = json!({"job-id": job(name), "device": name, "target": target(name), "sync": sync,
            "auto-dismiss": false, "on-source-error": "report", "on-target-error": "report"});
        session.qmp.execute("blockdev-mirror", arguments).await.map(drop).map_err(session.failed("copy the disk of"))
    }

    async fn send_memory(&self, id: InstanceId, limits: Limits, stream: BoxDuplex) -> DriverResult<()> {
        let session = self.session(id).await?;
        let on = |name: &str| json!({"capability": name, "state": true});
        let wanted = json!({"capabilities": [on("pause-before-switchover"), on("auto-converge"), on("events")]});
        session.qmp.execute("migrate-set-capabilities", wanted).await.map_err(session.failed("prepare"))?;
        // QEMU takes no "unlimited"; this is more than any link has.
        let bandwidth = if limits.bandwidth == 0 { 1 << 40 } else { limits.bandwidth };
        let wanted = json!({"downtime-limit": limits.downtime_ms, "max-bandwidth": bandwidth});
        session.qmp.execute("migrate-set-parameters", wanted).await.map_err(session.failed("prepare"))?;
        session.hand(MEMORY_FD, &pump(stream)?).await?;
        let arguments = json!({"uri": format!("fd:{MEMORY_FD}")});
        session.qmp.execute("migrate", arguments).await.map(drop).map_err(session.failed("send the memory of"))
    }

    async fn sending(&self, id: InstanceId, memory: bool) -> DriverResult<Sending> {
        let session = self.session(id).await?;
        let mirrors = session.mirrors().await?;
        let info = if memory { session.migration().await? } else { Value::Null };
        Ok(progress(&mirrors, &info, memory))
    }

    async fn finish_sending(&self, id: InstanceId) -> DriverResult<()> {
        let session = self.session(id).await?;
        session.wait_migration(&["pre-switchover", "completed"], CANCEL_DEADLINE).await?;
        session.end_mirrors(true).await?;
        if session.migration().await?["status"] == "pre-switchover" {
            let arguments = json!({"state": "pre-switchover"});
            session.qmp.execute("migrate-continue", arguments).await.map_err(session.failed("switch"))?;
        }
        match session.wait_migration(&["completed", "failed", "cancelled"], SWITCH_DEADLINE).await?.as_str() {
            "completed" => Ok(()),
            _ => Err(DriverError::permanent("migration_failed", reason(&session.migration().await?))),
        }
    }

    async fn stop_sending(&self, id: InstanceId) -> DriverResult<()> {
        let session = match self.session(id).await {
            Ok(session) => session,
            // It ended; there is nothing to stop.
            Err(e) if matches!(e.code.as_str(), "not_running" | "gone") => return Ok(()),
            Err(e) => return Err(e),
        };
        const OVER: [&str; 5] = ["completed", "failed", "cancelled", "none", ""];
        let state = session.migration().await?["status"].as_str().unwrap_or_default().to_string();
        if !OVER.contains(&state.as_str()) {
            session.qmp.execute("migrate_cancel", Value::Null).await.map_err(session.failed("stop moving"))?;
            session.wait_migration(&OVER, CANCEL_DEADLINE).await?;
        }
        session.end_mirrors(false).await?;
        // Anything else resumes by itself, or was standing still before.
        if session.run_state().await? == "postmigrate" {
            session.qmp.execute("cont", Value::Null).await.map_err(session.failed("resume"))?;
        }
        Ok(())
    }

    async fn expect(&self, spec: &GuestSpec, offer: &Offer) -> DriverResult<()> {
        start::check(&self.config, spec)?;
        let locks = self.locks.of(spec.id);
        let _life = locks.life.lock().await;
        let dir = self.dir(spec.id);
        match OnDisk::read(&dir)? {
            OnDisk::Nothing | OnDisk::NotStarted(..) => self.launch_incoming(&dir, spec, offer).await?,
            OnDisk::Alive(record, _) if record.incoming && record.spec.run == spec.run => {}
            _ => {
                let detail = format!("machine {} has run on this node; remove what is left of it first", spec.id);
                return Err(DriverError::permanent("already_here", detail));
            }
        }
        let session = Session::open(&dir, spec.id, &locks).await?;
        let socket = sock::listen(&dir.nbd_socket()).map_err(|e| DriverError::io("disk socket", &e))?;
        let _ = session.qmp.execute("nbd-server-stop", Value::Null).await;
        session.hand(NBD_FD, &socket.into()).await?;
        let address = json!({"addr": {"type": "fd", "data": {"str": NBD_FD}}});
        session.qmp.execute("nbd-server-start", address).await.map_err(session.failed("open the disk of"))?;
        for disk in &offer.disks {
            let export =
                json!({"type": "nbd", "id": disk.name, "node-name": disk.name, "name": disk.name, "writable": true});
            session.qmp.execute("block-export-add", export).await.map_err(session.failed("open the disk of"))?;
        }
        Ok(())
    }

    async fn accept(&self, id: InstanceId, lane: &Lane) -> DriverResult<BoxDuplex> {
        let dir = self.dir(id);
        if *lane != Lane::Memory {
            let stream = sock::connect(&dir.nbd_socket(), CANCEL_DEADLINE).await;
            return Ok(Box::new(stream.map_err(|e| DriverError::io("disk socket", &e))?));
        }
        let session = self.session(id).await?;
        let (ours, theirs) = tokio::io::duplex(PUMP_BYTES);
        session.hand(MEMORY_FD, &pump(Box::new(theirs))?).await?;
        let arguments = json!({"uri": format!("fd:{MEMORY_FD}")});
        session.qmp.execute("migrate-incoming", arguments).await.map_err(session.failed("fill"))?;
        Ok(Box::new(ours))
    }

    async fn arrived(&self, id: InstanceId) -> DriverResult<bool> {
        let session = self.session(id).await?;
        if !session.record.incoming || session.migration().await?["status"] != "completed" {
            return Ok(!session.record.incoming);
        }
        // Fine when it was stopped by an earlier call.
        let _ = session.qmp.execute("nbd-server-stop", Value::Null).await;
        let _ = fsx::remove_file_if_exists(&self.dir(id).nbd_socket());
        Ok(true)
    }

    async fn take_over(&self, id: InstanceId) -> DriverResult<Observation> {
        if !self.arrived(id).await? {
            return Err(DriverError::permanent("not_arrived", format!("machine {id} is not here as a whole")));
        }
        let dir = self.dir(id);
        let session = self.session(id).await?;
        if session.record.incoming {
            session.qmp.execute("cont", Value::Null).await.map_err(session.failed("start"))?;
            dir.write(&Record { incoming: false, ..session.record.clone() })?;
        }
        drop(session);
        self.observe_dir(&dir).await
    }
}

fn reason(info: &Value) -> String {
    info["error-desc"].as_str().unwrap_or("the connection to the other node ended").to_string()
}

fn progress(mirrors: &[Value], info: &Value, memory: bool) -> Sending {
    let number = |v: &Value, name: &str| v[name].as_u64().unwrap_or(0);
    let mut sending = Sending::at(if mirrors.is_empty() { Stage::Idle } else { Stage::DisksReady });
    for mirror in mirrors {
        let (done, all) = (number(mirror, "current-progress"), number(mirror, "total-progress"));
        sending.total += all;
        sending.remaining += all.saturating_sub(done);
        match mirror["status"].as_str().unwrap_or_default() {
            "ready" => {}
            "concluded" | "aborting" | "null" => {
                sending.stage = Stage::Failed;
                sending.message = mirror["error"].as_str().unwrap_or("copying a disk broke off").into();
                return sending;
            }
            _ => sending.stage = Stage::Disks,
        }
    }
    if !memory {
        return sending;
    }
    let ram = &info["ram"];
    sending.total += number(ram, "total");
    sending.remaining += number(ram, "remaining");
    sending.downtime_ms = info["downtime"].as_u64().or_else(|| info["expected-downtime"].as_u64());
    sending.stage = match info["status"].as_str().unwrap_or_default() {
        "pre-switchover" => Stage::Paused,
        "completed" => Stage::Sent,
        "failed" | "cancelled" | "cancelling" => {
            sending.message = reason(info);
            Stage::Failed
        }
        _ => Stage::Memory,
    };
    sending
}

impl QemuDriver {
    async fn launch_incoming(&self, dir: &GuestDir, spec: &GuestSpec, offer: &Offer) -> DriverResult<()> {
        let uids = self.uids.lock().await;
        let uid = super::record::pick_uid(&self.config.instances, spec.id, self.config.uids)?;
        let record = self.incoming_record(spec, offer, uid).await?;
        if record.firmware.is_some() {
            start::prepare_vars(&self.config, dir)?;
        }
        dir.write(&record)?;
        drop(uids);
        self.run_shim(dir, super::driver::START_DEADLINE).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_follow_what_the_emulator_says() {
        let mirror = |status: &str| json!({"id": "mirror-root", "status": status, "current-progress": 30, "total-progress": 100});
        let stage = |mirrors: &[Value], info: Value, memory| progress(mirrors, &info, memory).stage;
        assert_eq!(stage(&[], Value::Null, false), Stage::Idle);
        assert_eq!(stage(&[mirror("running")], Value::Null, false), Stage::Disks);
        assert_eq!(stage(&[mirror("ready")], json!({"status": "failed"}), false), Stage::DisksReady);
        assert_eq!(stage(&[mirror("concluded")], Value::Null, false), Stage::Failed);
        let info = json!({"status": "active", "expected-downtime": 250, "ram": {"total": 1000, "remaining": 400}});
        let seen = progress(&[mirror("ready")], &info, true);
        assert_eq!((seen.stage, seen.total, seen.remaining, seen.downtime_ms), (Stage::Memory, 1100, 470, Some(250)));
        assert_eq!(stage(&[mirror("ready")], json!({"status": "pre-switchover"}), true), Stage::Paused);
        assert_eq!(stage(&[], json!({"status": "completed"}), true), Stage::Sent);
        let broken = progress(&[mirror("ready")], &json!({"status": "failed", "error-desc": "no"}), true);
        assert_eq!((broken.stage, broken.message.as_str()), (Stage::Failed, "no"));
    }
}
