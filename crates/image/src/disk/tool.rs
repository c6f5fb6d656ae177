//! `qemu-img` as a process with as little power as possible: own uid, no network, limited memory, time and files. A flaw in its parsers
//! then costs at most a failed import.

use std::fs::File;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::resource::{Resource, setrlimit};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Context, ImageError, Result};
use crate::record::DiskFormat;

/// Examines and owns nothing. 65000-65533 is reserved by Debian policy 9.2.2 and outside the dynamic range of systemd.
const UID: u32 = 65433;
const INFO_TIMEOUT: Duration = Duration::from_secs(60);
const CHECK_TIMEOUT: Duration = Duration::from_secs(600);
const CONVERT_TIMEOUT: Duration = Duration::from_secs(3600);
/// Address space; qemu-img with 1 GiB of tables still fits.
const MEMORY_BYTES: u64 = 2 << 30;
/// Of either output stream.
const OUTPUT_BYTES: u64 = 1 << 20;

struct Output {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

/// Limits of one run.
#[derive(Clone, Copy)]
struct Cage {
    file_bytes: u64,
    cpu_seconds: u64,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    virtual_size: u64,
    format: String,
    backing_filename: Option<String>,
    full_backing_filename: Option<String>,
    #[serde(default)]
    encrypted: bool,
    format_specific: Option<FormatSpecific>,
}

#[derive(Deserialize)]
struct FormatSpecific {
    #[serde(default)]
    data: serde_json::Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Check {
    #[serde(default)]
    corruptions: u64,
    #[serde(default)]
    check_errors: u64,
    #[serde(default)]
    image_end_offset: u64,
}

/// Size of the disk, once qemu agrees with what our own reading said.
pub(super) async fn info(dir: &Path, name: &str, format: DiskFormat) -> Result<u64> {
    let file = format!("./{name}");
    let args = ["info", "--output=json", "-f", format.as_str(), &file];
    let output =
        run(dir, &args, INFO_TIMEOUT, Cage { file_bytes: 0, cpu_seconds: 30 }, &CancellationToken::new()).await?;
    if output.code != Some(0) {
        return Err(broken(&output));
    }
    let info: Info = serde_json::from_slice(&output.stdout)
        .map_err(|e| ImageError::new(Code::Unsupported, format!("qemu-img gave an answer that cannot be read: {e}")))?;
    let data = info.format_specific.map(|f| f.data).unwrap_or_default();
    let extents = data.get("extents").and_then(|e| e.as_array()).map_or(0, Vec::len);
    if info.backing_filename.is_some()
        || info.full_backing_filename.is_some()
        || data.get("data-file").is_some()
        || extents > 1
    {
        return Err(ImageError::new(
            Code::UnsafeImage,
            "the disk image needs other files; merge them first (qemu-img convert)",
        ));
    }
    if info.encrypted {
        return Err(ImageError::new(Code::UnsupportedFormat, "the disk image is encrypted; decrypt it first"));
    }
    if info.format != format.as_str() {
        return Err(ImageError::new(
            Code::ImageCorrupt,
            format!("the disk image is {}, not {}", info.format, format.as_str()),
        ));
    }
    Ok(info.virtual_size)
}

/// Follows all tables of a qcow2 image.
pub(super) async fn check(dir: &Path, name: &str) -> Result<()> {
    let file = format!("./{name}");
    let args = ["check", "--output=json", "-f", "qcow2", &file];
    let output =
        run(dir, &args, CHECK_TIMEOUT, Cage { file_bytes: 0, cpu_seconds: 300 }, &CancellationToken::new()).await?;
    // 0 is clean, 3 is leaked clusters, which waste space and harm nothing (qemu-img(1)).
    let Ok(found) = serde_json::from_slice::<Check>(&output.stdout) else { return Err(broken(&output)) };
    let length = std::fs::metadata(dir.join(name)).context(|| format!("cannot read {name}"))?.len();
    // Without an error on the way the end of the last cluster is known; the last one may be a part.
    if found.image_end_offset > length.next_multiple_of(2 << 20) {
        return Err(truncated(length, found.image_end_offset));
    }
    match output.code {
        Some(0 | 3) => Ok(()),
        Some(2) if found.corruptions > 0 && outside(&output.stderr) => Err(ImageError::new(
            Code::ImageTruncated,
            format!("the qcow2 image has {length} bytes; {} of its clusters lie behind that", found.corruptions),
        )),
        Some(2) if found.corruptions > 0 => Err(ImageError::new(
            Code::ImageCorrupt,
            format!(
                "the qcow2 image has {} inconsistent clusters; copy it again from where it came",
                found.corruptions
            ),
        )),
        _ => {
            tracing::debug!(errors = found.check_errors, "qemu-img check failed");
            Err(broken(&output))
        }
    }
}

fn outside(stderr: &str) -> bool {
    stderr.contains("exceeding the end of the file")
        || stderr.contains("end of the image file")
        || stderr.contains("beyond the end")
        || stderr.contains("outside image")
}

fn truncated(length: u64, wanted: u64) -> ImageError {
    ImageError::new(Code::ImageTruncated, format!("the qcow2 image has {length} bytes but should have {wanted}"))
}

/// Writes `output` in `dir` as qcow2.
pub(super) async fn convert(
    dir: &Path,
    name: &str,
    format: DiskFormat,
    output: &str,
    limit: u64,
    cancel: &CancellationToken,
) -> Result<()> {
    let target = dir.join(output);
    let describe = || format!("cannot create {}", target.display());
    let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target).context(describe)?;
    if nix::unistd::geteuid().is_root() {
        nix::unistd::fchown(&made, Some(UID.into()), Some(UID.into())).context(describe)?;
    }
    drop(made);
    let (from, to) = (format!("./{name}"), format!("./{output}"));
    let args = ["convert", "-f", format.as_str(), "-O", "qcow2", &from, &to];
    let cage = Cage { file_bytes: limit, cpu_seconds: CONVERT_TIMEOUT.as_secs() };
    let result = run(dir, &args, CONVERT_TIMEOUT, cage, cancel).await?;
    match result.code {
        Some(0) => Ok(()),
        _ if result.stderr.contains("No space left") => {
            Err(ImageError::io("cannot convert the image", &std::io::Error::from_raw_os_error(libc::ENOSPC)))
        }
        _ if result.stderr.contains("File too large") => {
            Err(crate::blobs::too_big("the converted image", limit, limit))
        }
        _ => Err(broken(&result)),
    }
}

fn broken(output: &Output) -> ImageError {
    let line = output.stderr.lines().next().unwrap_or("no reason given");
    // qemu names the file as it was called; that name is ours and says nothing to people.
    let reason = line.rsplit_once("': ").map_or(line, |(_, r)| r);
    let code = if outside(&output.stderr) { Code::ImageTruncated } else { Code::ImageCorrupt };
    ImageError::new(code, format!("the disk image is broken: {reason}"))
}

async fn run(dir: &Path, args: &[&str], limit: Duration, cage: Cage, cancel: &CancellationToken) -> Result<Output> {
    let directory = File::open(dir).context(|| format!("cannot open {}", dir.display()))?;
    // The first path is what is read.
    let input = dir.join(args.iter().find_map(|a| a.strip_prefix("./")).unwrap_or_default());
    std::fs::set_permissions(&input, std::fs::Permissions::from_mode(0o444))
        .context(|| "cannot open the image".into())?;
    let mut command = tokio::process::Command::new("qemu-img");
    command.args(args).env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LC_ALL", "C");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    // SAFETY: the closure makes only system calls that are async-signal-safe and allocates nothing.
    unsafe { command.pre_exec(move || confine(&directory, cage)) };
    let mut child = command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => ImageError::new(Code::Unsupported, "qemu-img is missing; install qemu-utils"),
        _ => ImageError::io("cannot start qemu-img", &e),
    })?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let work = async {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let read_out =
            async { if let Some(s) = stdout { s.take(OUTPUT_BYTES).read_to_end(&mut out).await } else { Ok(0) } };
        let read_err =
            async { if let Some(s) = stderr { s.take(OUTPUT_BYTES).read_to_end(&mut err).await } else { Ok(0) } };
        let (a, b, status) = tokio::join!(read_out, read_err, child.wait());
        a.and(b).context(|| "cannot read from qemu-img".into())?;
        let status = status.context(|| "cannot wait for qemu-img".into())?;
        Ok(Output { code: status.code(), stdout: out, stderr: String::from_utf8_lossy(&err).into_owned() })
    };
    let result = tokio::select! {
        result = tokio::time::timeout(limit, work) => result,
        () = cancel.cancelled() => return Err(ImageError::cancelled()),
    };
    result.unwrap_or_else(|_| {
        Err(ImageError::new(
            Code::ImageCorrupt,
            format!("the disk image could not be examined within {} s", limit.as_secs()),
        ))
    })
}

/// In the child, before qemu-img begins. As long as we are root the directory is entered by descriptor: its parents may be private.
fn confine(directory: &File, cage: Cage) -> std::io::Result<()> {
    nix::unistd::fchdir(directory)?;
    setrlimit(Resource::RLIMIT_AS, MEMORY_BYTES, MEMORY_BYTES)?;
    setrlimit(Resource::RLIMIT_CPU, cage.cpu_seconds, cage.cpu_seconds)?;
    setrlimit(Resource::RLIMIT_FSIZE, cage.file_bytes, cage.file_bytes)?;
    setrlimit(Resource::RLIMIT_NOFILE, 64, 64)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Past the limit a write fails with an error instead of a signal, so that the reason can be told.
    // SAFETY: setting a disposition to "ignore" touches no memory.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    if nix::unistd::geteuid().is_root() {
        // Where namespaces are not allowed the rest of the cage still holds.
        let _ = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET | nix::sched::CloneFlags::CLONE_NEWIPC);
        nix::unistd::setgroups(&[])?;
        nix::unistd::setresgid(UID.into(), UID.into(), UID.into())?;
        nix::unistd::setresuid(UID.into(), UID.into(), UID.into())?;
    }
    nix::sys::prctl::set_no_new_privs()?;
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}
