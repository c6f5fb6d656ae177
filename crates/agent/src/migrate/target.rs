//! The side that a guest comes to.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use oblak_compute::ComputeDriver;
use oblak_compute::migrate::{Lane, Migrate, Offer};
use oblak_model::{Instance, InstanceId, Isolation, MigrationStep};
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use tokio::time::Instant;

use super::wire::unreachable_here;
use super::{Mark, Role, Then, report};
use crate::context::Context;
use crate::owner::Owner;
use crate::perform;

/// What of an instance's directory moves with it when it does not run: the writable layer of a container.
pub const FILES: [&str; 1] = ["upper"];
/// How both sides call tar: numbers and not names, holes stay holes, attributes as overlayfs needs them.
pub const TAR: [&str; 4] = ["--numeric-owner", "--sparse", "--xattrs", "--xattrs-include=*"];
/// How long the last of a guest's memory may take to be there after it was sent.
const ARRIVE_DEADLINE: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(5);
const WAIT: Duration = Duration::from_millis(500);

/// Makes everything but the guest and says so.
pub async fn prepare(ctx: &Arc<Context>, owner: &mut Owner, instance: &Instance) -> DriverResult<Then> {
    let Some(migration) = instance.status.open_migration() else { return Ok(Then::Again) };
    let dir = ctx.instance_dir(owner.id);
    let fail = |reason: &str, message: String| {
        report(ctx, instance, migration.generation, MigrationStep::Failed { reason: reason.into(), message });
        Ok(Then::Wait { pause: Duration::from_secs(2), quiet: true })
    };
    if ctx.peers.is_none() {
        return fail("Unsupported", unreachable_here().detail);
    }
    let Some(address) = *ctx.listening.borrow() else { return Ok(Then::Wait { pause: WAIT, quiet: true }) };
    if Mark::load(&dir).ok().flatten().is_none() {
        if dir.join(crate::record::FILE).exists() {
            return fail("AlreadyHere", "something of the instance is left on this node from an earlier time".into());
        }
        Mark { generation: migration.generation, role: Role::Target, downtime_ms: None }.save(&dir)?;
    }
    let ready = match perform::image(ctx, instance).await {
        Ok(Ok((image, local))) if instance.status.resolved.isolation != Isolation::Container => {
            perform::prepare(ctx, instance, &image, &local, perform::Run::default()).await.map(|made| made.map(drop))
        }
        Ok(Ok(_)) => Ok(Ok(())),
        Ok(Err(waiting)) => Ok(Err(waiting)),
        Err(error) => Err(error),
    };
    match ready {
        Ok(Ok(())) => report(ctx, instance, migration.generation, MigrationStep::Prepared { address }),
        Ok(Err((_, text))) => {
            tracing::debug!(instance = %instance.metadata.name, waits_for = text, "an instance that is to come waits");
            return Ok(Then::Wait { pause: WAIT, quiet: true });
        }
        Err(error) => return fail("TargetNotReady", error.detail),
    }
    Ok(Then::Wait { pause: Duration::from_secs(1), quiet: true })
}

fn driver(ctx: &Context, instance: &Instance) -> DriverResult<Arc<dyn ComputeDriver>> {
    let isolation = instance.status.resolved.isolation;
    let found = ctx.drivers.compute.get(&isolation).cloned();
    found.ok_or_else(|| DriverError::unsupported(format!("this node has no driver for isolation {isolation}")))
}

fn ability(driver: &Arc<dyn ComputeDriver>) -> DriverResult<&dyn Migrate> {
    driver.migrate().ok_or_else(|| DriverError::unsupported("instances of this isolation cannot move while they run"))
}

/// Makes the guest that waits.
pub async fn expect(ctx: &Arc<Context>, instance: &Instance, offer: &Offer) -> DriverResult<()> {
    let driver = driver(ctx, instance)?;
    let waits = |(code, text): (String, String)| DriverError::retry(&code, text);
    let (image, local) = perform::image(ctx, instance).await?.map_err(waits)?;
    // Without a fence: it does not run before it is placed here, and its owner fences it then. The placement says that none is in force.
    let run = perform::Run { number: offer.run, ..perform::Run::default() };
    let spec = perform::prepare(ctx, instance, &image, &local, run).await?.map_err(waits)?;
    ability(&driver)?.expect(&spec, offer).await
}

/// A lane into it.
pub async fn accept(ctx: &Context, instance: &Instance, lane: &Lane) -> DriverResult<BoxDuplex> {
    let driver = driver(ctx, instance)?;
    ability(&driver)?.accept(InstanceId(instance.metadata.id), lane).await
}

/// Waits until the whole guest is here.
pub async fn arrived(ctx: &Context, instance: &Instance) -> DriverResult<()> {
    let driver = driver(ctx, instance)?;
    let end = Instant::now() + ARRIVE_DEADLINE;
    while !ability(&driver)?.arrived(InstanceId(instance.metadata.id)).await? {
        if Instant::now() >= end {
            return Err(DriverError::permanent("not_arrived", "the target has not got everything"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

/// Takes the files of an instance that does not run. Only those that move: a tar of another node writes nothing else.
pub async fn files(ctx: &Context, instance: &Instance, stream: &mut BoxDuplex) -> DriverResult<()> {
    let dir = ctx.instance_dir(InstanceId(instance.metadata.id));
    let failed = |e: std::io::Error| DriverError::io("tar", &e);
    let mut first = [0u8; 1];
    if tokio::io::AsyncReadExt::read(stream, &mut first).await.map_err(failed)? == 0 {
        return Ok(());
    }
    for name in FILES {
        oblak_platform::fsx::remove_dir_if_exists(&dir.join(name)).map_err(failed)?;
    }
    let mut tar = tokio::process::Command::new("tar");
    tar.arg("-C").arg(&dir).args(TAR).args(["--same-owner", "-xpf", "-", "--"]).args(FILES);
    tar.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child = tar.spawn().map_err(failed)?;
    if let Some(mut into) = child.stdin.take() {
        tokio::io::AsyncWriteExt::write_all(&mut into, &first).await.map_err(failed)?;
        let mut from = tokio::io::BufReader::with_capacity(256 * 1024, stream);
        tokio::io::copy_buf(&mut from, &mut into).await.map_err(failed)?;
    }
    let ended = child.wait().await.map_err(failed)?;
    if ended.success() {
        return Ok(());
    }
    Err(DriverError::permanent("tar_failed", format!("tar ended with {ended}")))
}

/// The instance is ours: what waits may run.
pub async fn arrive(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
) -> DriverResult<()> {
    let Some(migration) = &instance.status.migration else { return Ok(()) };
    let observed = driver.observe(owner.id).await?;
    let run = observed.run.max(instance.status.observed.run);
    perform::adopt(ctx, owner, instance, run, !migration.live)?;
    if migration.live {
        let took = match ability(driver) {
            Ok(ability) => ability.take_over(owner.id).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = took {
            let now = driver.observe(owner.id).await?;
            if now.state == oblak_compute::GuestState::Starting {
                return Err(error);
            }
            // It broke here after it was whole: a guest that crashed, which its policy starts again.
            tracing::warn!(instance = %instance.metadata.name, %error, "a guest that came from another node is lost");
        }
    }
    Mark::remove(&ctx.instance_dir(owner.id))?;
    report(ctx, instance, migration.generation, MigrationStep::Arrived {});
    Ok(())
}
