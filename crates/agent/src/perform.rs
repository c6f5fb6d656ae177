//! Carrying out one action of [`crate::decide`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use oblak_compute::shim::Fence;
use oblak_compute::{ComputeDriver, GuestSpec, Observation};
use oblak_model::wire::ReportItem;
use oblak_model::{Image, ImageId, Instance, InstanceId, Isolation, Port, Resources, Severity, SnapshotId, VolumeId};
use oblak_network::PortHandle;
use oblak_platform::driver::{DriverError, DriverResult, Remedy};
use oblak_platform::fsx;
use oblak_volume::{Claim, Format, Source, VolumeHandle, VolumeSpec};

use crate::assemble::{self, Parts};
use crate::context::{Context, ImageState, lock};
use crate::decide::Action;
use crate::owner::{Owner, about};
use crate::record::Record;
use crate::services::{LocalImage, LocalPayload};

/// Time a machine has to shut down by itself when the spec names none.
const MACHINE_GRACE: Duration = Duration::from_secs(30);
/// The same for a container, as with docker: many ignore the signal because they are process 1.
const CONTAINER_GRACE: Duration = Duration::from_secs(10);
/// First host id for containers; below lie people and services of the host.
const FIRST_ID: u32 = 1 << 20;
/// Host ids per container (a full 16-bit range, as images expect).
const IDS: u32 = 1 << 16;
/// Attempts after which a failing root disk etc. no longer counts as the guest's own failure.
const MAX_FAILURES: u32 = 1000;

/// How an action ended.
pub enum Done {
    /// Look at once what comes next.
    Again,
    /// Cannot go on before something else is there: stable code and text for people.
    WaitingFor(String, String),
    /// Nothing of the instance is left here.
    Removed,
}

/// Carries out `action`.
pub async fn perform(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    observed: &Observation,
    action: &Action,
) -> DriverResult<Done> {
    let id = owner.id;
    match action {
        Action::Idle | Action::Wait(_) => return Ok(Done::Again),
        Action::Start { after_failure } => return start(ctx, owner, driver, instance, *after_failure).await,
        Action::Stop { then_start } => stop(ctx, owner, driver, instance, *then_start).await?,
        Action::Pause => ability(driver.pause(), "paused")?.pause(id).await?,
        Action::Resume => ability(driver.pause(), "resumed")?.resume(id).await?,
        Action::Attach(volume) => return attach(ctx, driver, instance, *volume).await,
        Action::Detach(volume) => detach(driver, instance, *volume).await?,
        Action::Resize(to) => resize(ctx, owner, driver, instance, *to).await?,
        Action::Fence(on) => {
            let fencing = ability(driver.fencing(), "fenced")?;
            fencing.fence(id, owner.fence.clone().filter(|_| *on)).await?;
        }
        Action::Restore(snapshot) => return restore(ctx, owner, driver, instance, *snapshot, observed).await,
        Action::Remove => return remove(ctx, owner, driver, instance).await,
    }
    Ok(Done::Again)
}

fn ability<T>(ability: Option<T>, what: &str) -> DriverResult<T> {
    ability.ok_or_else(|| DriverError::unsupported(format!("instances of this isolation cannot be {what}")))
}

fn io(context: &str) -> impl Fn(std::io::Error) -> DriverError {
    move |error| DriverError::io(context, &error)
}

fn save(ctx: &Context, record: &Record) -> DriverResult<()> {
    record.save(&ctx.instance_dir(record.id)).map_err(io("cannot write the record of the instance"))
}

/// The record, made with its directory when there is none yet.
pub fn record<'a>(ctx: &Context, owner: &'a mut Owner, instance: &Instance) -> DriverResult<&'a mut Record> {
    if owner.record.is_none() {
        let dir = ctx.instance_dir(owner.id);
        let mut record = Record { fresh: !dir.exists(), ..Record::new(instance) };
        fsx::create_dir_private(&dir, 0o711).map_err(io("cannot make the directory of the instance"))?;
        // What is asked for before the first run is done by the first run, except going back to a snapshot of an earlier life.
        if record.isolation == Isolation::Container {
            record.id_base = take_ids(ctx)?;
        }
        if let Err(error) = record.save_until_boot(&dir) {
            lock(&ctx.id_bases).remove(&record.id_base);
            return Err(io("cannot write the record of the instance")(error));
        }
        if record.id_base != 0 {
            // Only now, so that what is made for these ids is never of ids that a crash made us forget. Files of these ids come
            // after the first order, which is durable.
            lock(&ctx.container_ids).insert(record.id, record.id_base);
            ctx.wake_networks.notify_one();
        }
        owner.record = Some(record);
    }
    owner.record.as_mut().ok_or_else(|| DriverError::retry("internal", "the record was just made"))
}

fn take_ids(ctx: &Context) -> DriverResult<u32> {
    let mut taken = lock(&ctx.id_bases);
    let free = (0..(u32::MAX - FIRST_ID) / IDS).map(|n| FIRST_ID + n * IDS).find(|base| !taken.contains(base));
    let base = free.ok_or_else(|| {
        DriverError::retry(
            "ids_exhausted",
            "all user ids for containers are taken on this node; remove some containers",
        )
    })?;
    taken.insert(base);
    Ok(base)
}

async fn start(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    after_failure: bool,
) -> DriverResult<Done> {
    let (image, local) = match image(ctx, instance).await? {
        Ok(found) => found,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    let next = match next_run(ctx, owner, driver, instance)? {
        Ok(next) => next,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    let run = next.number;
    let spec = match prepare(ctx, instance, &image, &local, next).await? {
        Ok(spec) => spec,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    order(ctx, owner, instance, run, after_failure)?;
    let seen = driver.ensure(&spec).await?;
    let text = if after_failure { "started again after it ended by itself" } else { "started" };
    ctx.event(
        instance.metadata.project.as_deref(),
        about(instance),
        Severity::Normal,
        "Started",
        format!("{text} on {} ({})", ctx.config.name, seen.runtime),
    );
    Ok(Done::Again)
}

/// Writes down that run `run` is ordered, before the driver hears of it.
fn order(ctx: &Context, owner: &mut Owner, instance: &Instance, run: u64, after_failure: bool) -> DriverResult<()> {
    let now = ctx.clock.now();
    let record = record(ctx, owner, instance)?;
    record.run = run;
    record.placement = instance.status.placement.as_ref().map_or(0, |p| p.generation);
    record.stop_ordered = false;
    record.restart_generation = instance.spec.restart_generation;
    record.resources = assemble::resources(instance);
    record.boot_id.clone_from(&ctx.config.boot_id);
    record.started_micros = now.as_micros();
    if after_failure {
        record.failures = (record.failures + 1).min(MAX_FAILURES);
        record.restart_count += 1;
    } else {
        record.failures = 0;
    }
    save(ctx, record)
}

type Waiting = (String, String);
type LocalPort = (Port, PortHandle, u16);

/// The image object and the image on this node, or what it waits for.
pub async fn image(ctx: &Context, instance: &Instance) -> DriverResult<Result<(Arc<Image>, LocalImage), Waiting>> {
    let id: ImageId = instance.status.resolved.image;
    let Some(image) = ctx.world().images.get(&id).cloned() else {
        return Ok(Err((
            "waiting_for_image".into(),
            format!("the server has not told this node about image {} yet", instance.spec.image),
        )));
    };
    if let Some(local) = ctx.drivers.images.get(id).await? {
        return Ok(Ok((image, local)));
    }
    let name = &image.metadata.name;
    let state = ctx.images.borrow().get(&id).cloned();
    match state {
        Some(ImageState::Failed(_, detail)) => Err(DriverError {
            remedy: Remedy::Permanent,
            code: "image_failed".into(),
            detail: format!("image {name}: {detail}"),
        }),
        Some(ImageState::Importing(percent, step)) => {
            Ok(Err(("waiting_for_image".into(), format!("image {name}: {step} ({percent} %)"))))
        }
        _ => {
            ctx.wake_images.notify_one();
            Ok(Err(("waiting_for_image".into(), format!("image {name} is not on this node yet"))))
        }
    }
}

/// One run of a guest.
#[derive(Clone, Default)]
pub struct Run<'a> {
    /// Its number.
    pub number: u64,
    /// First of the user ids of a container.
    pub id_base: u32,
    /// Who may begin with the start while something is waited for.
    pub ahead: Option<&'a Arc<dyn ComputeDriver>>,
    /// The fence that it starts with.
    pub fence: Option<Fence>,
}

/// The next run on this node, or what it waits for.
fn next_run<'a>(
    ctx: &Context,
    owner: &mut Owner,
    driver: &'a Arc<dyn ComputeDriver>,
    instance: &Instance,
) -> DriverResult<Result<Run<'a>, Waiting>> {
    let number = record(ctx, owner, instance)?.run + 1;
    let id_base = owner.record.as_ref().map_or(0, |r| r.id_base);
    let fenced = instance.status.placement.as_ref().is_some_and(|p| p.fenced);
    if fenced && owner.fence.is_none() {
        let text =
            "the lease of this node was interrupted; it is being asked whether the instance is still placed here";
        return Ok(Err(("waiting_for_lease".into(), text.into())));
    }
    let fence = owner.fence.clone().filter(|_| fenced);
    Ok(Ok(Run { number, id_base, ahead: Some(driver), fence }))
}

/// Makes everything that a run needs except the guest, or says what it waits for. The driver [`Run::ahead`] begins with what it can meanwhile.
pub async fn prepare(
    ctx: &Context,
    instance: &Instance,
    image: &Image,
    local: &LocalImage,
    run: Run<'_>,
) -> DriverResult<Result<GuestSpec, Waiting>> {
    let id = InstanceId(instance.metadata.id);
    let dir = ctx.instance_dir(id);
    let layers = match &local.payload {
        LocalPayload::Oci { .. } => ctx.drivers.images.layers(instance.status.resolved.image).await?,
        _ => Vec::new(),
    };
    ctx.drivers.images.hold(instance.status.resolved.image, id).await?;
    // The network is made meanwhile.
    let root = root_disk(ctx, instance, local, &dir).await?;
    let volumes = match volumes(ctx, instance).await? {
        Ok(volumes) => volumes,
        Err(waiting) => return Ok(Err(waiting)),
    };
    let mut parts = Parts {
        image,
        local,
        layers,
        root,
        volumes,
        ports: Vec::new(),
        resolv_conf: String::new(),
        seed: None,
        dir,
        run: run.number,
        epoch: ctx.epoch(),
        id_base: run.id_base,
        fence: run.fence,
    };
    parts.ports = match ports(ctx, instance)? {
        Ok(ports) => ports,
        Err(waiting) => {
            let draft = assemble::guest_spec(instance, parts);
            if let Some(driver) = run.ahead
                && let Err(error) = driver.prepare(&draft).await
            {
                tracing::debug!(instance = %instance.metadata.name, %error, "nothing is prepared for the start");
            }
            return Ok(Err(waiting));
        }
    };
    if parts.layers.is_empty() {
        parts.seed = seed(ctx, instance, &parts.dir)?;
    }
    parts.resolv_conf = (parts.ports.iter())
        .find_map(|(_, handle, _)| match handle {
            PortHandle::Netns { resolv_conf, .. } => Some(resolv_conf.clone()),
            PortHandle::Tap { .. } => None,
        })
        .unwrap_or_default();
    Ok(Ok(assemble::guest_spec(instance, parts)))
}

fn ports(ctx: &Context, instance: &Instance) -> DriverResult<Result<Vec<LocalPort>, Waiting>> {
    let objects = ctx.world().ports_of(oblak_model::InstanceId(instance.metadata.id));
    if objects.len() < instance.status.resolved.ports.len() {
        return Ok(Err(("waiting_for_network".into(), "the server has not told this node about all ports yet".into())));
    }
    let state = ctx.networks.borrow().clone();
    let mut out = Vec::new();
    for port in objects {
        let id = oblak_model::PortId(port.metadata.id);
        match state.ports.get(&id) {
            // The port may have changed sides since it was made: the handle must be of the kind that the guest needs.
            Some((_, mtu, handle)) => out.push(((*port).clone(), handle.clone(), *mtu)),
            None => {
                if let Some(error) = state.errors.get(&port.status.network) {
                    return Err(error.clone());
                }
                return Ok(Err(("waiting_for_network".into(), format!("network {} is being made", port.spec.network))));
            }
        }
    }
    Ok(Ok(out))
}

async fn volumes(ctx: &Context, instance: &Instance) -> DriverResult<Result<Vec<VolumeHandle>, Waiting>> {
    let made = ctx.volumes.borrow().clone();
    let mut out = Vec::new();
    for (id, attachment) in instance.status.resolved.volumes.iter().zip(&instance.spec.volumes) {
        match made.get(id) {
            Some(Ok(handle)) => {
                let volume = ctx.world().volumes.get(id).cloned();
                if let Some(volume) = volume {
                    crate::volumes::claim(ctx, &volume).await?;
                }
                out.push(handle.clone());
            }
            Some(Err(error)) => return Err(error.clone()),
            None => {
                return Ok(Err(("waiting_for_volume".into(), format!("volume {} is being made", attachment.volume))));
            }
        }
    }
    Ok(Ok(out))
}

/// The root disk of a machine: an overlay on the image, beside the instance, made once.
async fn root_disk(
    ctx: &Context,
    instance: &Instance,
    local: &LocalImage,
    dir: &Path,
) -> DriverResult<Option<VolumeHandle>> {
    let (path, format) = match &local.payload {
        LocalPayload::Disk { path, format } | LocalPayload::Kernel { disk: Some((path, format)), .. } => {
            (path, *format)
        }
        LocalPayload::Kernel { disk: None, .. } | LocalPayload::Oci { .. } => return Ok(None),
    };
    let size = assemble::resources(instance).disk.max(local.virtual_size);
    let source = Source::Image { path: path.clone(), format };
    let spec = VolumeSpec {
        id: VolumeId(instance.metadata.id),
        size,
        format: Format::Qcow2,
        source,
        dir: instance.spec.pool.is_empty().then(|| dir.join("root")),
        owner: (0, 0),
    };
    let driver = ctx.drivers.pool(&instance.spec.pool)?;
    let claim = Claim {
        instance: instance.metadata.name.clone(),
        node: ctx.config.name.clone(),
        epoch: instance.status.placement.as_ref().map_or(0, |p| p.generation),
    };
    driver.claim(spec.id, &claim).await?;
    driver.ensure(&spec, false).await.map(Some)
}

fn seed(ctx: &Context, instance: &Instance, dir: &Path) -> DriverResult<Option<std::path::PathBuf>> {
    let plans = {
        let networks = ctx.networks.borrow();
        let of = |id: &oblak_model::PortId| {
            let (network, ..) = networks.ports.get(id)?;
            let plan = networks.plans.get(network)?;
            let port = plan.ports.iter().find(|p| p.id == *id)?;
            Some(((**plan).clone(), port.clone()))
        };
        instance.status.resolved.ports.iter().filter_map(of).collect::<Vec<_>>()
    };
    let path = dir.join("seed.img");
    let metadata = assemble::metadata(instance, &ctx.zone());
    ctx.drivers.seeds.write(&path, &metadata, &plans).map_err(io("cannot write the NoCloud seed"))?;
    Ok(Some(path))
}

pub async fn stop(
    ctx: &Context,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    then_start: bool,
) -> DriverResult<()> {
    let usual =
        if instance.status.resolved.isolation == Isolation::Container { CONTAINER_GRACE } else { MACHINE_GRACE };
    let grace = instance.spec.stop_grace.map_or(usual, |s| s.0);
    if let Some(record) = owner.record.as_mut().filter(|r| !r.stop_ordered) {
        record.stop_ordered = true;
        save(ctx, record)?;
    }
    driver.stop(owner.id, grace).await?;
    let (reason, text) =
        if then_start { ("Restarting", "stopped to be started again") } else { ("Stopped", "stopped as asked") };
    ctx.event(instance.metadata.project.as_deref(), about(instance), Severity::Normal, reason, text);
    Ok(())
}

async fn attach(
    ctx: &Context,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    volume: VolumeId,
) -> DriverResult<Done> {
    let Some(position) = instance.status.resolved.volumes.iter().position(|v| *v == volume) else {
        return Ok(Done::Again);
    };
    let attachment = instance.spec.volumes.get(position).cloned().unwrap_or_default();
    let hotplug = driver.hotplug().ok_or_else(|| {
        DriverError::unsupported(format!(
            "volume {} cannot be plugged into a running {}; `oblak restart {}` does it",
            attachment.volume, instance.status.resolved.isolation, instance.metadata.name
        ))
    })?;
    let made = ctx.volumes.borrow().get(&volume).cloned();
    match made {
        Some(Ok(handle)) => {
            hotplug
                .attach(
                    oblak_model::InstanceId(instance.metadata.id),
                    &assemble::disk_spec(&handle, attachment.read_only, attachment.mount),
                )
                .await?;
        }
        Some(Err(error)) => return Err(error),
        None => {
            return Ok(Done::WaitingFor(
                "waiting_for_volume".into(),
                format!("volume {} is being made", attachment.volume),
            ));
        }
    }
    ctx.event(
        instance.metadata.project.as_deref(),
        about(instance),
        Severity::Normal,
        "VolumeAttached",
        format!("volume {} plugged in", attachment.volume),
    );
    Ok(Done::Again)
}

async fn detach(driver: &Arc<dyn ComputeDriver>, instance: &Instance, volume: VolumeId) -> DriverResult<()> {
    let hotplug = driver.hotplug().ok_or_else(|| {
        DriverError::unsupported(format!(
            "a volume cannot be pulled from a running {}; `oblak restart {}` does it",
            instance.status.resolved.isolation, instance.metadata.name
        ))
    })?;
    hotplug.detach(oblak_model::InstanceId(instance.metadata.id), volume).await
}

/// In place where the guest can, otherwise by a restart.
async fn resize(
    ctx: &Context,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    to: Resources,
) -> DriverResult<()> {
    let outcome = match driver.resize() {
        Some(ability) => ability.resize(owner.id, to.vcpus.milli(), to.memory).await,
        None => Err(DriverError::unsupported("this isolation is resized by a restart")),
    };
    match outcome {
        Ok(()) => {
            if let Some(record) = owner.record.as_mut() {
                record.resources = to;
                save(ctx, record)?;
            }
            ctx.event(
                instance.metadata.project.as_deref(),
                about(instance),
                Severity::Normal,
                "Resized",
                format!("now {} vCPUs and {}", to.vcpus, to.memory),
            );
            Ok(())
        }
        Err(error) if error.remedy == Remedy::Unsupported => {
            ctx.event(
                instance.metadata.project.as_deref(),
                about(instance),
                Severity::Normal,
                "ResizeRestarts",
                format!("restarting to resize: {}", error.detail),
            );
            stop(ctx, owner, driver, instance, true).await
        }
        Err(error) => Err(error),
    }
}

async fn restore(
    ctx: &Arc<Context>,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
    snapshot: SnapshotId,
    _observed: &Observation,
) -> DriverResult<Done> {
    let ability = ability(driver.snapshot(), "put back to a snapshot")?;
    let (image, local) = match image(ctx, instance).await? {
        Ok(found) => found,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    let next = match next_run(ctx, owner, driver, instance)? {
        Ok(next) => next,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    let run = next.number;
    let spec = match prepare(ctx, instance, &image, &local, next).await? {
        Ok(spec) => spec,
        Err((code, text)) => return Ok(Done::WaitingFor(code, text)),
    };
    let seen = ability.restore(&spec, snapshot).await?;
    let name = instance.spec.restore.clone().unwrap_or_default();
    let runs = matches!(
        seen.state,
        oblak_compute::GuestState::Running | oblak_compute::GuestState::Paused | oblak_compute::GuestState::Starting
    );
    if runs {
        order(ctx, owner, instance, run, false)?;
    }
    let record = record(ctx, owner, instance)?;
    record.restore_generation = name.generation;
    // A snapshot without memory leaves it off: the next step starts it if it should run.
    record.stop_ordered = !runs;
    save(ctx, record)?;
    ctx.event(
        instance.metadata.project.as_deref(),
        about(instance),
        Severity::Normal,
        "Restored",
        format!("went back to snapshot {}", name.snapshot),
    );
    Ok(Done::Again)
}

async fn remove(
    ctx: &Context,
    owner: &mut Owner,
    driver: &Arc<dyn ComputeDriver>,
    instance: &Instance,
) -> DriverResult<Done> {
    driver.remove(owner.id).await?;
    if !instance.spec.pool.is_empty() {
        ctx.drivers.pool(&instance.spec.pool)?.remove(VolumeId(instance.metadata.id)).await?;
    }
    clear(ctx, owner, driver).await?;
    release(ctx, instance);
    Ok(Done::Removed)
}

/// Takes over an instance that came from another node, with the number of its run there. One that is to be started anew here looks like one
/// whose end was asked for.
pub fn adopt(ctx: &Context, owner: &mut Owner, instance: &Instance, run: u64, start: bool) -> DriverResult<()> {
    let now = ctx.clock.now();
    let record = record(ctx, owner, instance)?;
    record.run = run;
    record.stop_ordered = start;
    record.restart_generation = instance.status.observed.restart_generation;
    record.restore_generation = instance.status.observed.restore_generation;
    record.restart_count = instance.status.observed.restart_count;
    record.resources = assemble::resources(instance);
    record.boot_id.clone_from(&ctx.config.boot_id);
    record.started_micros = now.as_micros();
    save(ctx, record)
}

/// Ends the guest by force and removes everything of it that is only on this node.
pub async fn clear(ctx: &Context, owner: &mut Owner, driver: &Arc<dyn ComputeDriver>) -> DriverResult<()> {
    driver.remove(owner.id).await?;
    clear_files(ctx, owner).await
}

/// Removes what lies on disk for an instance whose guest is gone, the record last.
pub async fn clear_files(ctx: &Context, owner: &mut Owner) -> DriverResult<()> {
    ctx.drivers.volume.remove(VolumeId(owner.id.0)).await?;
    ctx.drivers.images.release(owner.id).await?;
    let dir = ctx.instance_dir(owner.id);
    let gone = oblak_platform::task::blocking(move || fsx::remove_dir_if_exists(&dir)).await;
    gone.map_err(|e| DriverError::retry("internal", e.to_string()))?
        .map_err(io("cannot remove the directory of the instance"))?;
    forget(ctx, owner);
    lock(&ctx.plugged).retain(|_, by| *by != owner.id);
    ctx.wake_volumes.notify_one();
    Ok(())
}

/// Drops the record, of which nothing is left on disk.
fn forget(ctx: &Context, owner: &mut Owner) {
    lock(&ctx.container_ids).remove(&owner.id);
    if let Some(record) = owner.record.take() {
        lock(&ctx.id_bases).remove(&record.id_base);
    }
}

/// Tells the server that nothing of the instance is left here.
pub fn release(ctx: &Context, instance: &Instance) {
    let project = instance.metadata.project.clone().unwrap_or_default();
    ctx.report(ReportItem::Released { object_kind: "instance".into(), project, id: instance.metadata.id });
}
