//! Runs Ceph's programs: our user always named, a deadline always set, little of what they say kept.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use oblak_platform::driver::{DriverError, DriverResult};
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

use crate::RbdConfig;

/// For work that does not depend on the size of an image. A cluster without a majority of monitors answers nothing at all.
pub const QUICK: Duration = Duration::from_secs(30);
/// For work that reads or writes whole images.
pub const COPY: Duration = Duration::from_secs(2 * 3600);
/// Times that a program which crashes is run.
const CRASH_TRIES: u32 = 3;
/// Code of a program that was ended by a signal.
const CRASHED: i32 = -1;
/// Most output that is read: a list of some hundred thousand images.
const MAX_OUTPUT_BYTES: u64 = 32 << 20;
/// Most of a message that is passed on.
const MAX_MESSAGE_BYTES: u64 = 4096;

/// How a program that ran to its end ended.
#[derive(Debug)]
pub struct Failed {
    /// Exit code: an errno(3) for Ceph's programs.
    pub code: i32,
    /// Last line of what it said.
    pub message: String,
}

impl Failed {
    /// ENOENT.
    pub fn is_missing(&self) -> bool {
        self.code == 2
    }
    /// EEXIST.
    pub fn is_there(&self) -> bool {
        self.code == 17
    }
    /// EBUSY: locked, or watched by somebody.
    pub fn is_busy(&self) -> bool {
        self.code == 16
    }

    /// As the error of a driver call.
    pub fn into_error(self, what: &str) -> DriverError {
        let Self { code, message } = &self;
        match *code {
            // ENOSPC, EDQUOT: the pool or its quota is full.
            28 | 122 => DriverError::retry("disk_full", format!("{what}: the Ceph pool is full; free some of it")),
            // EPERM, EACCES; EROFS is what a client on the blocklist gets.
            1 | 13 => DriverError::permanent(
                "ceph_denied",
                format!(
                    "{what}: Ceph refuses the user ({message}); it needs: mon 'profile rbd' osd 'profile rbd pool=...'"
                ),
            ),
            // EBUSY.
            16 => DriverError::retry("volume_in_use", format!("{what}: the volume is in use; stop its instance first")),
            _ => DriverError::retry("ceph_failed", format!("{what}: {message}")),
        }
    }
}

/// The cluster.
pub struct Ceph {
    pub config: RbdConfig,
}

impl Ceph {
    pub const fn new(config: RbdConfig) -> Self {
        Self { config }
    }

    /// `pool/name` for `rbd`.
    pub fn image(&self, name: &str) -> String {
        format!("{}/{name}", self.config.pool)
    }

    /// Runs `rbd`, `rados` or `ceph` as our user. The outer error says that it did not run to its end.
    pub async fn run(&self, program: &str, args: &[&str], deadline: Duration) -> DriverResult<Result<String, Failed>> {
        let mut tries = CRASH_TRIES;
        loop {
            let mut command = Command::new(program);
            command.arg("--conf").arg(&self.config.conf).args(["--id", &self.config.user]).args(args);
            let ended = run(command, program, deadline).await?;
            tries -= 1;
            // librbd asserts now and then on its way out. What may be done twice is done again.
            match &ended {
                Err(failed)
                    if failed.code == CRASHED && tries > 0 && deadline == QUICK && args.first() != Some(&"rename") =>
                {
                    tracing::warn!(program, ?args, message = failed.message, "crashed; once more");
                }
                _ => return Ok(ended),
            }
        }
    }

    /// Runs `rbd`; failures other than those that the caller looks for become errors.
    pub async fn rbd(&self, what: &str, args: &[&str], deadline: Duration) -> DriverResult<String> {
        self.run("rbd", args, deadline).await?.map_err(|f| f.into_error(what))
    }

    /// Runs `rbd --format json`; `None` when the image does not exist.
    pub async fn rbd_json<T: DeserializeOwned>(&self, what: &str, args: &[&str]) -> DriverResult<Option<T>> {
        let args = [args, &["--format", "json"]].concat();
        match self.run("rbd", &args, QUICK).await? {
            Ok(text) => parse(what, &text).map(Some),
            Err(failed) if failed.is_missing() => Ok(None),
            Err(failed) => Err(failed.into_error(what)),
        }
    }

    /// Copies a disk image into an existing RBD image. qemu-img is given both formats, so nothing is guessed from content.
    pub async fn import(&self, what: &str, from: &Path, format: &str, name: &str) -> DriverResult<()> {
        let mut command = Command::new("qemu-img");
        // The backing file of a qcow2 is not followed: content of our own store has none.
        command.args(["convert", "-n", "-f", format, "-O", "raw", "-t", "none"]).arg(from).arg(self.uri(name));
        run(command, "qemu-img", COPY).await?.map_err(|f| f.into_error(what))?;
        Ok(())
    }

    /// The name that qemu's block layer knows an image by (QEMU block/rbd.c).
    pub fn uri(&self, name: &str) -> String {
        let RbdConfig { conf, user, pool } = &self.config;
        let escape = |text: &str| text.replace('\\', "\\\\").replace(':', "\\:").replace('@', "\\@");
        format!("rbd:{}/{}:id={}:conf={}", escape(pool), escape(name), escape(user), escape(&conf.to_string_lossy()))
    }
}

/// JSON that one of the programs printed.
pub fn parse<T: DeserializeOwned>(what: &str, text: &str) -> DriverResult<T> {
    serde_json::from_str(text)
        .map_err(|e| DriverError::retry("ceph_answer", format!("{what}: the answer of Ceph cannot be read: {e}")))
}

async fn run(mut command: Command, program: &str, deadline: Duration) -> DriverResult<Result<String, Failed>> {
    command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => {
            let package = if program == "qemu-img" { "qemu-utils" } else { "ceph-common" };
            DriverError::permanent("ceph_missing", format!("{program} is not installed; install the package {package}"))
        }
        _ => DriverError::io(&format!("starting {program}"), &e),
    })?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let talk = async {
        let (out, err) = tokio::join!(read(stdout, MAX_OUTPUT_BYTES), read(stderr, MAX_MESSAGE_BYTES));
        child.wait().await.map(|status| (status, out, err))
    };
    let ended = tokio::time::timeout(deadline, talk).await.map_err(|_| {
        let seconds = deadline.as_secs();
        DriverError::retry("ceph_timeout", format!("{program} did not end within {seconds} s; is the Ceph cluster up?"))
    })?;
    let (status, out, err) = ended.map_err(|e| DriverError::io(&format!("running {program}"), &e))?;
    if status.success() {
        return Ok(Ok(out));
    }
    let message = reason(&err);
    Ok(Err(Failed { code: errno(status.code().unwrap_or(CRASHED), message), message: message.into() }))
}

/// The line that says why: the assertion when it crashed, else the last one, without the progress before it.
fn reason(said: &str) -> &str {
    let assertion = said.lines().find(|l| l.contains("ceph_assert") || l.contains("terminate called"));
    let line = assertion.or_else(|| said.lines().rfind(|l| !l.trim().is_empty())).unwrap_or("no message");
    line.split("failed.").last().unwrap_or(line).trim()
}

/// `rbd` and `ceph` exit with the errno; `rados` always with 1, and says `(16) Device or resource busy`.
fn errno(code: i32, message: &str) -> i32 {
    if code != 1 {
        return code;
    }
    let said = message.split('(').skip(1).filter_map(|rest| rest.split_once(')')?.0.parse().ok());
    said.last().unwrap_or(code)
}

/// Reads at most `limit` bytes and lets the rest go by, so that the program can end.
async fn read(from: Option<impl tokio::io::AsyncRead + Unpin>, limit: u64) -> String {
    let Some(mut from) = from else { return String::new() };
    let mut bytes = vec![];
    let _ = (&mut from).take(limit).read_to_end(&mut bytes).await;
    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_for_qemu_are_escaped() {
        let config = RbdConfig { conf: "/etc/ceph/a:b.conf".into(), user: "oblak".into(), pool: "vms".into() };
        assert_eq!(Ceph::new(config).uri("oblak-1"), "rbd:vms/oblak-1:id=oblak:conf=/etc/ceph/a\\:b.conf");
    }

    #[test]
    fn what_ceph_says_becomes_something_to_do() {
        let error = |code| Failed { code, message: "rbd: no".into() }.into_error("volume 1");
        assert_eq!(error(28).code, "disk_full");
        assert_eq!(error(1).code, "ceph_denied");
        assert_eq!(error(16).code, "volume_in_use");
        assert_eq!((error(5).code.as_str(), error(5).detail.as_str()), ("ceph_failed", "volume 1: rbd: no"));
    }

    #[test]
    fn the_reason_is_found_in_code_or_message() {
        assert_eq!(errno(2, "rbd: error opening image zz: (2) No such file or directory"), 2);
        assert_eq!(errno(1, "error 16: (16) Device or resource busy"), 16);
        assert_eq!(errno(1, "error removing vms>nope: (2) No such file or directory"), 2);
        assert_eq!(errno(1, "something (else)"), 1);
    }

    #[tokio::test]
    async fn a_program_that_never_ends_is_ended() {
        let mut command = Command::new("sh");
        command.args(["-c", "exec sleep 1000"]);
        let error = run(command, "sh", Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.code, "ceph_timeout");
    }
}
