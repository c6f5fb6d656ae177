//! The product itself: `oblak up` of the binary beside this one, with real guests. Everything is gone when the cloud is dropped.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use oblak_client::{ListOptions, WatchEvent};
use oblak_e2e::Cloud;
use oblak_model::{Image, ImageKind, ImagePhase, Instance, InstanceKind, Phase};
use oblak_platform::clock;

const IMAGE_WITHIN: Duration = Duration::from_secs(120);
const RUNNING_WITHIN: Duration = Duration::from_secs(60);

/// Names what the harness needs, unless the caller has: the program beside this one, the recipes and the images of the source tree.
pub fn set_environment(binary: Option<&Path>) -> Result<()> {
    let here = std::env::current_exe()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the source tree")?.to_path_buf();
    let beside = here.parent().context("a directory")?.join("oblak");
    let target = here.parent().and_then(Path::parent).context("a target directory")?.join("images");
    let set = |name: &str, value: PathBuf| {
        if std::env::var_os(name).is_none() {
            // SAFETY: called at the start of main, before there are threads.
            unsafe { std::env::set_var(name, value) };
        }
    };
    set("OBLAK_TEST_BINARY", binary.map_or(beside, Path::to_path_buf));
    set("OBLAK_RECIPES", source.join("images"));
    set("OBLAK_TEST_IMAGES", target);
    Ok(())
}

/// A running cloud.
pub fn cloud() -> Result<Cloud> {
    Cloud::start().context(
        "no cloud can run here (build it with `cargo build --release -p oblak`, images with `cargo xtask images`)",
    )
}

/// Waits until an image can be used.
pub fn image_ready(cloud: &Cloud, name: &str) -> Result<()> {
    let end = Instant::now() + IMAGE_WITHIN;
    let client = cloud.client();
    loop {
        let image: Image = cloud.wait(client.get::<ImageKind>("default", name))?;
        match image.status.phase {
            ImagePhase::Ready => return Ok(()),
            ImagePhase::Failed => bail!("image {name}: {}", image.status.message),
            _ if Instant::now() > end => bail!("image {name} does not get ready: {}", image.status.message),
            _ => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// A launch that worked.
pub struct Launch {
    /// The instance, running.
    pub instance: Instance,
    /// When the request was sent: wall time and time since boot.
    pub began: SystemTime,
    /// The same since boot.
    pub began_boot: Duration,
    /// Until the request was answered.
    pub accepted: Duration,
    /// Until a watcher heard that it runs.
    pub running: Duration,
}

/// Creates an instance and waits until a watcher of the API hears that it runs.
pub fn launch(cloud: &mut Cloud, instance: &Instance) -> Result<Launch> {
    let client = cloud.client();
    let name = &instance.metadata.name;
    let launched = cloud.wait(async {
        let from = client.list::<InstanceKind>("default", &ListOptions::default()).await?.revision;
        let mut watch = client.watch::<InstanceKind>("default", from, &ListOptions::default()).await?;
        let (began, began_boot, started) = (SystemTime::now(), clock::system().boottime(), Instant::now());
        client.create("default", instance).await?;
        let accepted = started.elapsed();
        loop {
            let event = tokio::time::timeout(RUNNING_WITHIN, watch.next()).await.context("it does not run in time")?;
            if let WatchEvent::Put(seen, _) = event? {
                if seen.metadata.name != *name {
                    continue;
                }
                match seen.status.phase {
                    Phase::Running => {
                        let running = started.elapsed();
                        return Ok(Launch { instance: *seen, began, began_boot, accepted, running });
                    }
                    Phase::Failed | Phase::Stopped => {
                        bail!("{name} ended: {} {}", seen.status.reason, seen.status.message)
                    }
                    _ => {}
                }
            }
        }
    })?;
    cloud.machine.remember();
    Ok(launched)
}

/// Deletes an instance and waits until it is gone.
pub fn delete(cloud: &mut Cloud, instance: &Instance) -> Result<()> {
    let client = cloud.client();
    cloud.wait(client.delete::<InstanceKind>("default", &instance.metadata.name))?;
    cloud.gone(&instance.metadata.name);
    Ok(())
}
