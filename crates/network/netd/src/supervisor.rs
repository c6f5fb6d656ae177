//! Makes what is served equal to the files in the directory, again and again. Watches only wake; every pass looks at everything.
//!
//! ```text
//! netd.json appears ──► view + sockets ──► served ──► netd.json changes: new view, the same sockets
//!                            ▲    │                   gateways, namespace or bridge changed: new sockets
//!                  back off ─┘    └─ not possible     netd.json or its directory is gone: sockets closed
//! ```

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use oblak_model::NetworkId;
use oblak_platform::process::Identity;
use oblak_platform::{clock, fsx};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use crate::config::{LOCK_FILE, MAX_NET_FILE_BYTES, NET_FILE, NetConfig, NetStatus, STATUS_FILE, Status, generation};
use crate::dns::forward::Outside;
use crate::metadata::token::Secret;
use crate::netns;
use crate::service::{Service, Shared};
use crate::view::View;

/// Where the servers of a network without forwarders come from.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Name of the file with the key of metadata tokens.
const SECRET_FILE: &str = "netd.secret";
/// Time between passes when nothing wakes us: finds namespaces and bridges that were made anew.
const SWEEP: Duration = Duration::from_secs(1);
/// The same when the kernel gives us no inotify instance.
const SWEEP_BLIND: Duration = Duration::from_millis(200);
/// First and longest pause before sockets are tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// Serves until an error that no later pass could repair.
///
/// # Errors
/// The directory cannot be used.
pub async fn run(dir: &Path) -> io::Result<()> {
    fsx::create_dir_private(dir, 0o700)?;
    let lock = File::create(dir.join(LOCK_FILE))?;
    let _lock = match Flock::lock(lock, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            tracing::info!(dir = %dir.display(), "another netd already serves this directory");
            return Ok(());
        }
        Err((_, errno)) => return Err(errno.into()),
    };
    let shared = Rc::new(Shared {
        world: RefCell::default(),
        outside: Outside::new(Path::new(RESOLV_CONF)),
        secret: Secret::load(&dir.join(SECRET_FILE))?,
        clock: clock::system(),
    });
    let watch =
        Watch::new(dir).inspect_err(|error| tracing::warn!(%error, "no inotify; looking every {SWEEP_BLIND:?}")).ok();
    let mut supervisor = Supervisor { dir: dir.into(), shared, watch, nets: BTreeMap::new(), written: None };
    tokio::task::LocalSet::new().run_until(supervisor.live()).await
}

struct Supervisor {
    dir: PathBuf,
    shared: Rc<Shared>,
    watch: Option<Watch>,
    nets: BTreeMap<NetworkId, Net>,
    written: Option<Status>,
}

/// Device, inode, size and time of change of a file: what tells that it was replaced.
type Stamp = (u64, u64, u64, i64, i64);

#[derive(Default)]
struct Net {
    stamp: Option<Stamp>,
    config: Option<Wanted>,
    service: Option<Service>,
    error: Option<String>,
    retry: Option<(Instant, Duration)>,
}

/// The part of a [`NetConfig`] that decides about sockets.
#[derive(Clone, PartialEq)]
struct Wanted {
    netns: PathBuf,
    bridge: String,
    gateways: Vec<IpAddr>,
    generation: String,
}

impl Wanted {
    fn same_sockets(&self, other: &Self) -> bool {
        (&self.netns, &self.bridge, &self.gateways) == (&other.netns, &other.bridge, &other.gateways)
    }
}

impl Supervisor {
    async fn live(&mut self) -> io::Result<()> {
        loop {
            let ids = self.networks()?;
            for gone in self.nets.keys().filter(|id| !ids.contains(id)).copied().collect::<Vec<_>>() {
                tracing::info!(network = %gone, "no longer served");
                self.nets.remove(&gone);
                self.shared.world.borrow_mut().remove(gone);
            }
            for id in ids {
                self.pass(id);
            }
            self.report();
            self.wait().await;
        }
    }

    /// Networks with a file, watched before they are looked at so that no change falls between.
    fn networks(&self) -> io::Result<Vec<NetworkId>> {
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            if let Some(watch) = self.watch.as_ref().filter(|_| !self.nets.contains_key(&id)) {
                watch.add(&entry.path());
            }
            if entry.path().join(NET_FILE).exists() {
                ids.push(id);
            }
        }
        Ok(ids)
    }

    fn pass(&mut self, id: NetworkId) {
        let path = self.dir.join(id.to_string()).join(NET_FILE);
        let net = self.nets.entry(id).or_default();
        let stamp = std::fs::metadata(&path).ok().map(|m| (m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()));
        if stamp != net.stamp {
            net.stamp = stamp;
            match load(&path, id) {
                Ok((wanted, view)) => {
                    net.error = None;
                    if !net.config.as_ref().is_some_and(|old| old.same_sockets(&wanted)) {
                        net.service = None;
                        net.retry = None;
                    }
                    net.config = Some(wanted);
                    self.shared.world.borrow_mut().set(Rc::new(view));
                }
                // What was served before goes on.
                Err(error) => net.fail(id, format!("{}: {error}", path.display())),
            }
        }
        net.serve(id, &self.shared);
    }

    fn report(&mut self) {
        let networks = self.nets.iter().map(|(id, net)| (*id, net.status())).collect();
        let status = Status { process: Some(Identity::current()), networks };
        if self.written.as_ref() != Some(&status) {
            match fsx::write_json(&self.dir.join(STATUS_FILE), &status) {
                Ok(()) => self.written = Some(status),
                Err(error) => tracing::warn!(%error, "cannot write the status"),
            }
        }
    }

    async fn wait(&self) {
        let sweep = if self.watch.is_some() { SWEEP } else { SWEEP_BLIND };
        let retry = self.nets.values().filter_map(|net| net.retry.map(|(at, _)| at)).min();
        let until = retry.map_or(Instant::now() + sweep, |at| at.min(Instant::now() + sweep));
        match &self.watch {
            Some(watch) => {
                let _ = tokio::time::timeout_at(until, watch.changed()).await;
            }
            None => tokio::time::sleep_until(until).await,
        }
    }
}

impl Net {
    fn status(&self) -> NetStatus {
        let served = self.config.as_ref().filter(|_| self.service.is_some());
        NetStatus { generation: served.map(|c| c.generation.clone()).unwrap_or_default(), error: self.error.clone() }
    }

    fn fail(&mut self, id: NetworkId, error: String) {
        if self.error.as_ref() != Some(&error) {
            tracing::warn!(network = %id, %error, "cannot serve");
        }
        self.error = Some(error);
    }

    /// Makes the sockets if there are none that are of use.
    fn serve(&mut self, id: NetworkId, shared: &Rc<Shared>) {
        let Some(wanted) = self.config.clone() else { return };
        if self.service.as_ref().is_some_and(|s| s.is_in_place(&wanted.netns, &wanted.bridge)) {
            return;
        }
        // Sockets keep a namespace alive that its owner has removed, so useless ones go at once.
        self.service = None;
        if self.retry.is_some_and(|(at, _)| at > Instant::now()) {
            return;
        }
        let opened = netns::open(&wanted.netns, &wanted.bridge, &wanted.gateways)
            .and_then(|sockets| Service::start(Rc::clone(shared), id, sockets));
        match opened {
            Ok(service) => {
                tracing::info!(network = %id, netns = %wanted.netns.display(), "served");
                self.service = Some(service);
                self.error = None;
                self.retry = None;
            }
            Err(error) => {
                let pause = self.retry.map_or(RETRY.0, |(_, pause)| (pause * 2).min(RETRY.1));
                self.retry = Some((Instant::now() + pause, pause));
                self.fail(id, error.to_string());
            }
        }
    }
}

fn load(path: &Path, id: NetworkId) -> Result<(Wanted, View), String> {
    let len = std::fs::metadata(path).map_err(|e| e.to_string())?.len();
    if len > MAX_NET_FILE_BYTES {
        return Err(format!("has {len} bytes; at most {MAX_NET_FILE_BYTES} are read"));
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let config: NetConfig = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    if config.plan.id != id {
        return Err(format!("describes network {}, not the one its directory is named after", config.plan.id));
    }
    let view = View::new(config.plan)?;
    let gateways = view.gateways().collect();
    Ok((Wanted { netns: config.netns, bridge: config.bridge, gateways, generation: generation(&bytes) }, view))
}

/// Tells that something changed below the directory, not what.
struct Watch {
    fd: AsyncFd<Fd>,
}

struct Fd(Inotify);

impl AsRawFd for Fd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    fn new(dir: &Path) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        // SAFETY: `Fd` owns the descriptor, always returns the same one, and the `AsyncFd` owns `Fd`.
        let fd = unsafe { AsyncFd::register(Fd(inotify)) }.map_err(io::Error::other)?;
        let watch = Self { fd };
        watch.add(dir);
        Ok(watch)
    }

    /// Watches a directory too. One that is already gone is found missing by the pass that follows.
    fn add(&self, dir: &Path) {
        let flags = AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_ONLYDIR;
        if let Err(errno) = self.fd.get_ref().0.add_watch(dir, flags) {
            tracing::debug!(dir = %dir.display(), error = %errno, "cannot watch");
        }
    }

    /// Returns after a change; takes all changes there are.
    async fn changed(&self) {
        let Ok(mut ready) = self.fd.readable().await else {
            // Only when the runtime shuts down.
            return std::future::pending().await;
        };
        while self.fd.get_ref().0.read_events().is_ok_and(|events| !events.is_empty()) {}
        ready.clear_ready();
    }
}
