//! The side that a guest leaves.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use oblak_compute::ComputeDriver;
use oblak_compute::migrate::{Lane, Limits, Migrate, Sending, Stage};
use oblak_model::{Instance, InstanceId, MigrationStatus, MigrationStep, Power, Size};
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use tokio::io::AsyncWriteExt;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::wire::{Hello, Wants, answered, ask};
use super::{Mark, Role, report, stop_sending, target};
use crate::context::{Context, lock};
use crate::owner::Owner;
use crate::perform;

/// How long a guest may stand still for the last of its memory.
const DOWNTIME_MS: u64 = 300;
/// How often the emulator is asked.
const LOOK_EVERY: Duration = Duration::from_millis(15);
/// How often people are told.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// How long the kernel may take to let go of a writable layer.
const RELEASE: Duration = Duration::from_secs(20);
/// A transfer that gets nothing done for so long is given up.
const STALLED: Duration = Duration::from_secs(300);

/// Tasks that send, one per instance.
#[derive(Default)]
pub struct Moves(pub(super) Mutex<BTreeMap<InstanceId, CancellationToken>>);

/// Begins to send, in a task of its own. What is not to run while it moves is stopped first.
pub async fn begin(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Arc<Instance>,
) -> DriverResult<()> {
    let Some(migration) = instance.status.open_migration().cloned() else { return Ok(()) };
    if !migration.live && owner.record.as_ref().is_some_and(|r| r.run > 0) {
        perform::stop(ctx, owner, driver, instance, instance.spec.power == Power::Running).await?;
    }
    let token = ctx.cancel.child_token();
    lock(&ctx.moves.0).insert(owner.id, token.clone());
    let (ctx, driver, instance) = (ctx.clone(), driver.clone(), instance.clone());
    oblak_platform::task::spawn(async move {
        let id = InstanceId(instance.metadata.id);
        let sent = async {
            // Left by a task of an earlier agent.
            stop_sending(&driver, id).await?;
            send(&ctx, &driver, &instance, &migration).await
        };
        let outcome = tokio::select! { outcome = sent => Some(outcome), () = token.cancelled() => None };
        if let Some(Err(error)) = outcome {
            tracing::warn!(instance = %instance.metadata.name, %error, "an instance could not be moved");
            if let Err(error) = stop_sending(&driver, id).await {
                tracing::warn!(instance = %instance.metadata.name, %error, "it stands still; trying again");
            }
            let reason = oblak_model::object::pascal(&error.code.replace('_', "-"));
            report(&ctx, &instance, migration.generation, MigrationStep::Failed { reason, message: error.detail });
        }
        lock(&ctx.moves.0).remove(&id);
        if let Some(owner) = lock(&ctx.owners).get(&id) {
            owner.notify_one();
        }
    });
    Ok(())
}

struct Sender<'a> {
    ctx: &'a Context,
    instance: &'a Instance,
    migration: &'a MigrationStatus,
    address: SocketAddr,
    told: Option<Instant>,
}

impl Sender<'_> {
    fn id(&self) -> InstanceId {
        InstanceId(self.instance.metadata.id)
    }
    async fn ask(&self, wants: Wants) -> DriverResult<BoxDuplex> {
        let hello = Hello { instance: self.id(), generation: self.migration.generation, wants };
        ask(self.ctx, self.migration.to, self.address, &hello).await
    }
    fn tell(&mut self, total: u64, remaining: u64) {
        if self.told.is_none_or(|at| at.elapsed() >= TELL_EVERY) {
            self.told = Some(Instant::now());
            let step = MigrationStep::Progress { total: Size(total), remaining: Size(remaining) };
            report(self.ctx, self.instance, self.migration.generation, step);
        }
    }
    /// Waits for a stage while telling how far it is.
    async fn until(&mut self, ability: &dyn Migrate, memory: bool, stage: Stage) -> DriverResult<Sending> {
        let (mut least, mut since) = (u64::MAX, Instant::now());
        loop {
            let seen = ability.sending(self.id(), memory).await?;
            if seen.stage == stage {
                return Ok(seen);
            }
            if matches!(seen.stage, Stage::Failed | Stage::Idle) {
                return Err(DriverError::permanent(
                    "transfer_failed",
                    format!("the transfer broke off: {}", seen.message),
                ));
            }
            self.tell(seen.total, seen.remaining);
            if seen.remaining < least {
                (least, since) = (seen.remaining, Instant::now());
            }
            if since.elapsed() >= STALLED {
                return Err(DriverError::permanent("transfer_stalled", "the transfer gets nothing done any more"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// Everything up to the moment at which the other node may have it.
async fn send(
    ctx: &Context,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    migration: &MigrationStatus,
) -> DriverResult<()> {
    let address = migration.address.ok_or_else(|| DriverError::permanent("no_address", "the target has no address"))?;
    let mut sender = Sender { ctx, instance, migration, address, told: None };
    let downtime_ms = if migration.live { live(&mut sender, driver).await? } else { files(&mut sender).await? };
    let mark = Mark { generation: migration.generation, role: Role::HandedOver, downtime_ms };
    mark.save(&ctx.instance_dir(sender.id()))?;
    report(ctx, instance, migration.generation, MigrationStep::HandOver { downtime_ms });
    Ok(())
}

async fn live(sender: &mut Sender<'_>, driver: &Arc<dyn ComputeDriver>) -> DriverResult<Option<u64>> {
    let ability = driver
        .migrate()
        .ok_or_else(|| DriverError::unsupported("instances of this isolation cannot move while they run"))?;
    let id = sender.id();
    let offer = ability.offer(id).await?;
    sender.tell(0, 0);
    sender.ask(Wants::Offer(Box::new(offer.clone()))).await?;
    for disk in &offer.disks {
        let stream = sender.ask(Wants::Lane(Lane::Disk(disk.name.clone()))).await?;
        ability.send_disk(id, &disk.name, stream).await?;
    }
    if !offer.disks.is_empty() {
        sender.until(ability, false, Stage::DisksReady).await?;
    }
    let stream = sender.ask(Wants::Lane(Lane::Memory)).await?;
    ability.send_memory(id, Limits { downtime_ms: DOWNTIME_MS, bandwidth: 0 }, stream).await?;
    sender.until(ability, true, Stage::Paused).await?;
    let still = Instant::now();
    ability.finish_sending(id).await?;
    sender.ask(Wants::Arrived).await?;
    Ok(Some(u64::try_from(still.elapsed().as_millis()).unwrap_or(u64::MAX)))
}

/// Waits until the kernel has let go of the file systems in files below `dir`: what was written last is in the files only then.
async fn let_go(dir: &std::path::Path) -> DriverResult<()> {
    let end = Instant::now() + RELEASE;
    let dir = dir.to_string_lossy().into_owned();
    let busy = move || {
        let devices = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
        let backing = |e: std::fs::DirEntry| std::fs::read_to_string(e.path().join("loop/backing_file")).ok();
        devices.filter_map(backing).any(|file| file.starts_with(&dir))
    };
    while busy() {
        if Instant::now() >= end {
            return Err(DriverError::retry("files_busy", "the writable layer of the container is still in use"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Sends the files of an instance that does not run.
async fn files(sender: &mut Sender<'_>) -> DriverResult<Option<u64>> {
    let dir = sender.ctx.instance_dir(sender.id());
    let_go(&dir).await?;
    let names: Vec<&str> = target::FILES.into_iter().filter(|name| dir.join(name).exists()).collect();
    sender.tell(0, 0);
    let mut stream = sender.ask(Wants::Files).await?;
    if !names.is_empty() {
        let mut tar = tokio::process::Command::new("tar");
        tar.arg("-C").arg(&dir).args(target::TAR).args(["-cf", "-", "--"]).args(&names);
        tar.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let failed = |e: std::io::Error| DriverError::io("tar", &e);
        let mut child = tar.spawn().map_err(failed)?;
        if let Some(mut out) = child.stdout.take() {
            tokio::io::copy_buf(&mut tokio::io::BufReader::with_capacity(256 * 1024, &mut out), &mut stream)
                .await
                .map_err(failed)?;
        }
        let ended = child.wait().await.map_err(failed)?;
        if !ended.success() {
            return Err(DriverError::permanent("tar_failed", format!("tar ended with {ended}")));
        }
    }
    stream.shutdown().await.map_err(|e| DriverError::io("the connection to the other node", &e))?;
    answered(&mut stream).await?;
    Ok(None)
}
