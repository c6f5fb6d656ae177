//! The process: its record on disk, start and end.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use oblak_platform::fsx;
use oblak_platform::process::Identity;

use super::{Settings, SuperviseError, limits};

const RECORD: &str = "process.json";
/// A log above this size is begun anew when etcd is started; one old log is kept.
const LOG_BYTES: u64 = 16 << 20;

/// The process of one etcd, known by pid, start time and boot.
pub struct Slot {
    record: PathBuf,
    known: Option<Identity>,
    /// When it is our own child: it has to be waited for.
    child: Option<Child>,
}

impl Slot {
    pub fn load(dir: &Path) -> Result<Self, SuperviseError> {
        let record = dir.join(RECORD);
        let known = fsx::read_json(&record).map_err(|e| SuperviseError::io("read", &record, e))?;
        Ok(Self { record, known, child: None })
    }

    pub fn pid(&self) -> Option<i32> {
        self.known.as_ref().map(|known| known.pid)
    }

    pub fn is_known_alive(&self) -> bool {
        self.known.as_ref().is_some_and(Identity::is_alive)
    }

    /// Also takes the end of a child, so that none stays a zombie.
    pub fn is_alive(&mut self) -> bool {
        if let Some(child) = &mut self.child
            && !matches!(child.try_wait(), Ok(None))
        {
            self.child = None;
        }
        self.is_known_alive()
    }

    /// Starts it, or takes on one that was started and not recorded.
    pub fn start(&mut self, program: &Path, settings: &Settings) -> Result<(), SuperviseError> {
        if let Some(found) = orphan(&settings.data()) {
            fsx::write_json(&self.record, &found).map_err(|e| SuperviseError::io("write", &self.record, e))?;
            self.known = Some(found);
            return Ok(());
        }
        let failed = |action, path: &Path| {
            let path = path.to_path_buf();
            move |source| SuperviseError::Io { action, path, source }
        };
        // etcd insists that nobody else can look into it.
        fsx::create_dir_private(&settings.data(), 0o700).map_err(failed("make", &settings.data()))?;
        let log = open_log(settings).map_err(failed("open", &settings.log()))?;
        let mut command = Command::new(program);
        command.args(settings.flags()).current_dir(&settings.dir).stdin(Stdio::null());
        command.stdout(log.try_clone().map_err(failed("open", &settings.log()))?).stderr(log);
        // Flags win over the environment, but what is not given as a flag could come from there.
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("ETCD_")) {
            command.env_remove(name);
        }
        // A session of its own: the end of our terminal, or ^C there, is not its end.
        // SAFETY: setsid is async-signal-safe and touches no memory of the parent.
        unsafe { command.pre_exec(|| nix::unistd::setsid().map(drop).map_err(Into::into)) };
        let mut child = command.spawn().map_err(failed("start", program))?;
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let identity = Identity::of(pid);
        limits::apply(pid, settings);
        // A crash before this line leaves an etcd without a record; `orphan` finds it.
        if let Some(identity) = &identity
            && let Err(error) = fsx::write_json(&self.record, identity)
        {
            // What is not recorded would not be found again.
            let _ = child.kill();
            let _ = child.wait();
            return Err(SuperviseError::io("write", &self.record, error));
        }
        tracing::info!(pid, name = settings.name, "etcd was started");
        (self.known, self.child) = (identity, Some(child));
        Ok(())
    }
}

fn open_log(settings: &Settings) -> std::io::Result<File> {
    let path = settings.log();
    if std::fs::metadata(&path).is_ok_and(|meta| meta.len() > LOG_BYTES) {
        std::fs::rename(&path, path.with_extension("log.old"))?;
    }
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// An etcd that was started on this data directory and not recorded, because its starter was killed in between. Told by its command line,
/// which names the directory.
pub fn orphan(data: &Path) -> Option<Identity> {
    let flag = format!("--data-dir={}", data.display());
    let pids = std::fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == flag.as_bytes())
    })
    .find_map(Identity::of)
}

/// Ends the process: politely, then not.
pub async fn stop(dir: &Path, patience: Duration) -> Result<bool, SuperviseError> {
    let slot = Slot::load(dir)?;
    let known = slot.known.clone().filter(Identity::is_alive).or_else(|| orphan(&dir.join("data")));
    let Some(known) = known else { return Ok(false) };
    known.signal(Signal::SIGTERM);
    if !known.wait_gone(patience).await {
        known.kill();
        if !known.wait_gone(patience).await {
            let source = std::io::Error::other(format!("process {} does not end", known.pid));
            return Err(SuperviseError::io("stop etcd of", dir, source));
        }
    }
    // Where etcd was not our child, somebody else waits for it, when it pleases them.
    let end = tokio::time::Instant::now() + patience;
    while !limits::clear(dir) && tokio::time::Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    fsx::remove_file_if_exists(&slot.record).map_err(|e| SuperviseError::io("remove", &slot.record, e))?;
    Ok(true)
}
