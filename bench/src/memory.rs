//! Memory and size: the idle cloud, its small processes, a thousand instances, the program.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use oblak_model::{Instance, InstanceSpec, Isolation};
use oblak_store::RedbOptions;

use crate::Context;
use crate::fakecloud::{FakeCloud, instance};
use crate::product;
use crate::report::{Goal, Row, Table};

const MIB: f64 = 1024.0 * 1024.0;
/// After the start, so that one-off work is over.
const SETTLE: Duration = Duration::from_secs(5);
const INSTANCES: usize = 1000;

/// Runs the measurement.
pub fn run(context: &Context, table: &mut Table) -> Result<()> {
    let mut cloud = product::cloud()?;
    product::image_ready(&cloud, "busybox")?;
    product::image_ready(&cloud, "tiny")?;
    std::thread::sleep(SETTLE);
    let pid = cloud.run_file().and_then(|r| r["process"]["pid"].as_u64()).context("the cloud does not run")?;
    let idle = Memory::of(pid)?;
    table.row(Row::value("idle `oblak up`, resident", "MiB", idle.resident / MIB).goal(Goal::AtMost(64.0)));
    table.row(Row::value("idle `oblak up`, private", "MiB", idle.private / MIB));
    table.row(Row::value("  of that anonymous (heap, stacks)", "MiB", idle.anonymous / MIB));
    let cache = RedbOptions::default().cache_bytes as f64;
    table.row(Row::value("redb cache, as configured", "MiB", cache / MIB).goal(Goal::AtMost(8.0)));
    for (isolation, image) in [(Isolation::Container, "busybox"), (Isolation::Vm, "tiny")] {
        let command = if isolation == Isolation::Container { vec!["sleep".into(), "1000".into()] } else { Vec::new() };
        let spec = InstanceSpec {
            isolation: Some(isolation),
            image: image.into(),
            flavor: "xs".into(),
            command,
            ..InstanceSpec::default()
        };
        let done = product::launch(&mut cloud, &Instance::new(&format!("m-{isolation}"), spec))?;
        std::thread::sleep(SETTLE);
        let shim = Memory::of(cloud.shim(&done.instance).shim.pid as u64)?;
        table.row(
            Row::value(format!("shim of a {isolation}, private"), "MiB", shim.private / MIB).goal(Goal::AtMost(4.0)),
        );
    }
    let netd = cloud.machine.processes().into_iter().find(|(_, command)| command.contains(" netd "));
    match netd {
        Some((process, _)) => {
            let netd = Memory::of(process.pid as u64)?;
            table.row(Row::value("netd, private", "MiB", netd.private / MIB).goal(Goal::AtMost(4.0)));
        }
        None => table.note("netd does not run"),
    }
    let guests = Memory::of(pid)?;
    table.row(Row::value("`oblak up` with these two guests, resident", "MiB", guests.resident / MIB));
    let size = std::fs::metadata(&cloud.env.binary)?.len() as f64;
    table.row(Row::value("size of the program", "MB", size / 1e6).goal(Goal::AtMost(45.0)));
    cloud.clear();
    drop(cloud);
    thousand(context, table)
}

/// Memory of one process in bytes, from /proc/<pid>/smaps_rollup.
struct Memory {
    resident: f64,
    private: f64,
    anonymous: f64,
}

impl Memory {
    fn of(pid: u64) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<f64>().ok()).unwrap_or(0.0) * 1024.0
        };
        let private = field("Private_Clean") + field("Private_Dirty");
        Ok(Self { resident: field("Rss"), private, anonymous: field("Anonymous") })
    }
}

/// A child of this program; ends when dropped.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn thousand(context: &Context, table: &mut Table) -> Result<()> {
    let dir = context.temp()?;
    let child = Command::new(std::env::current_exe()?)
        .arg("--fake-cloud")
        .arg(dir.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start a helper")?;
    let mut helper = Helper(child);
    let pid = u64::from(helper.0.id());
    let (mut to, from) = (helper.0.stdin.take().context("no pipe")?, helper.0.stdout.take().context("no pipe")?);
    let mut lines = BufReader::new(from).lines();
    let mut answer = |wanted: &str| -> Result<u64> {
        let line = lines.next().context("the helper ended")??;
        match line.split_once(' ') {
            Some((word, number)) if word == wanted => Ok(number.parse()?),
            _ => bail!("the helper says {line:?}"),
        }
    };
    let file_before = answer("ready")?;
    std::thread::sleep(SETTLE);
    let before = Memory::of(pid)?;
    writeln!(to, "go")?;
    let file_after = answer("made")?;
    std::thread::sleep(SETTLE);
    let after = Memory::of(pid)?;
    let kib = |bytes: f64| bytes / 1024.0;
    table.row(Row::value(
        format!("{INSTANCES} running instances on the fake driver, private memory"),
        "KiB",
        kib(after.private - before.private),
    ));
    table.row(Row::value("  bytes for one of them", "bytes", (after.private - before.private) / INSTANCES as f64));
    table.row(Row::value("  growth of the store's file", "KiB", kib(file_after as f64 - file_before as f64)));
    table.note("the process of the fake cloud is API, control plane, agent and a client; each instance has a port, an address, three events and a task in it");
    Ok(())
}

/// The other side of [`thousand`]: talks in lines.
pub fn helper(dir: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let cloud = runtime.block_on(FakeCloud::start(dir))?;
    let bytes = || runtime.block_on(cloud.store.stats()).map(|s| s.bytes);
    println!("ready {}", bytes()?);
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    runtime.block_on(async {
        let from = cloud.store.revision().await?;
        let mut watch = cloud.client.watch("default", from, &oblak_client::ListOptions::default()).await?;
        for n in 0..INSTANCES {
            cloud.client.create("default", &instance(&format!("i{n}"))).await?;
        }
        crate::fake::running(&mut watch, INSTANCES).await
    })?;
    println!("made {}", bytes()?);
    line.clear();
    std::io::stdin().read_line(&mut line)?;
    Ok(())
}
