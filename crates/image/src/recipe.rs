//! Recipes: scripts that build images from distribution packages. They come with the binary; each runs in namespaces of its own, so that
//! killing it leaves neither process nor mount behind.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use crate::digest::Digest;
use crate::error::{Code, Context, ImageError, Result};
use crate::progress::{Phase, Reporter};
use crate::record::DiskFormat;

/// A build of a whole distribution on two slow cores took three minutes; a mirror may be slow too.
const TIMEOUT: Duration = Duration::from_secs(3600);
/// Last words of a recipe that are kept.
const TAIL_LINES: usize = 20;
const LINE_BYTES: usize = 2000;

macro_rules! file {
    ($path:literal) => {
        ($path, include_bytes!(concat!("../../../images/", $path)).as_slice())
    };
}

/// Everything below `images/` of the source tree; a test compares.
const FILES: &[(&str, &[u8])] = &[
    file!("busybox/build.sh"),
    file!("debian-12/build.sh"),
    file!("debian-12/customize.sh"),
    file!("lib.sh"),
    file!("tiny/build.sh"),
    file!("tiny/initrd/init"),
    file!("tiny/rootfs/etc/acpi/power"),
    file!("tiny/rootfs/etc/acpid.conf"),
    file!("tiny/rootfs/etc/group"),
    file!("tiny/rootfs/etc/hostname"),
    file!("tiny/rootfs/etc/hosts"),
    file!("tiny/rootfs/etc/init.d/rcK"),
    file!("tiny/rootfs/etc/init.d/rcS"),
    file!("tiny/rootfs/etc/inittab"),
    file!("tiny/rootfs/etc/mdev.conf"),
    file!("tiny/rootfs/etc/nsswitch.conf"),
    file!("tiny/rootfs/etc/os-release"),
    file!("tiny/rootfs/etc/passwd"),
    file!("tiny/rootfs/etc/profile"),
    file!("tiny/rootfs/etc/shadow"),
    file!("tiny/rootfs/etc/shells"),
    file!("tiny/rootfs/sbin/shutdown"),
    file!("tiny/rootfs/usr/lib/oblak/disk-link"),
    file!("tiny/rootfs/usr/lib/oblak/late-up"),
    file!("tiny/rootfs/usr/lib/oblak/metadata"),
    file!("tiny/rootfs/usr/lib/oblak/nic-event"),
    file!("tiny/rootfs/usr/lib/oblak/nic-up"),
    file!("tiny/rootfs/usr/lib/oblak/ssh-up"),
    file!("tiny/rootfs/usr/lib/oblak/udhcpc"),
];

/// What a recipe says about its result, `manifest.json`.
#[derive(Debug, Deserialize)]
pub(crate) struct Manifest {
    pub schema: u32,
    #[serde(flatten)]
    pub content: Content,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub description: String,
    #[serde(default)]
    pub default_user: String,
    #[serde(default)]
    pub guest_agent: bool,
    #[serde(default)]
    pub min_memory_bytes: u64,
    /// Of the files.
    #[serde(default)]
    pub digests: BTreeMap<String, Digest>,
}

/// The files of a result by kind.
#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub(crate) enum Content {
    Disk { disk: String, disk_format: DiskFormat },
    Kernel { kernel: String, initrd: Option<String>, cmdline: String, disk: Option<String>, disk_format: DiskFormat },
    Oci { tag: Option<String> },
}

/// Names of recipes: directories with a `build.sh`.
pub(crate) fn names(dir: Option<&Path>) -> Vec<String> {
    let mut found: Vec<String> = match dir.and_then(|d| std::fs::read_dir(d).ok()) {
        Some(entries) => entries
            .flatten()
            .filter(|e| e.path().join("build.sh").is_file())
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect(),
        None => FILES.iter().filter_map(|(path, _)| path.strip_suffix("/build.sh")).map(str::to_owned).collect(),
    };
    found.sort();
    found
}

pub(crate) fn check_name(name: &str, dir: Option<&Path>) -> Result<()> {
    let known = names(dir);
    if known.iter().any(|k| k == name) {
        return Ok(());
    }
    Err(ImageError::new(Code::NotFound, format!("there is no recipe \"{name}\"; there are {}", known.join(", "))))
}

/// Runs a recipe. Its result lies in `<work>/out` then.
pub(crate) async fn build(
    name: &str,
    recipes: Option<&Path>,
    work: &Path,
    cache: &Path,
    reporter: &Reporter,
) -> Result<PathBuf> {
    check_name(name, recipes)?;
    if !nix::unistd::geteuid().is_root() {
        return Err(ImageError::new(Code::Unsupported, format!("recipe {name} can only be built by root")));
    }
    let recipes = match recipes {
        Some(dir) => dir.canonicalize().context(|| format!("cannot open {}", dir.display()))?,
        None => write_out(&work.join("recipes"))?,
    };
    let out = work.join("out");
    reporter.phase(Phase::Building, None, format!("building {name}"));
    let mut child = spawn(&recipes.join(name).join("build.sh"), &out, work, cache)?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let work_done = async {
        let progress = lines(stdout, |line| {
            if let Some((percent, text)) = line.strip_prefix("progress ").and_then(|r| r.split_once(' ')) {
                reporter.recipe(percent.parse().unwrap_or(0), text);
            }
        });
        let mut tail = std::collections::VecDeque::new();
        let errors = lines(stderr, |line| {
            tracing::debug!(recipe = name, "{line}");
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            tail.push_back(line);
        });
        let (status, (), ()) = tokio::join!(child.wait(), progress, errors);
        (status, tail)
    };
    let ended = tokio::select! {
        ended = tokio::time::timeout(TIMEOUT, work_done) => ended.ok(),
        () = reporter.cancel().cancelled() => {
            // Waited for: nothing may write into the directory that is removed next.
            let _ = child.kill().await;
            return Err(ImageError::cancelled());
        }
    };
    let Some((status, tail)) = ended else {
        let _ = child.kill().await;
        return Err(ImageError::new(Code::RecipeFailed, format!("recipe {name} did not end within an hour")));
    };
    let status = status.context(|| format!("cannot wait for recipe {name}"))?;
    if status.success() && out.join("manifest.json").is_file() {
        return Ok(out);
    }
    let said: Vec<String> = tail.into();
    let reason =
        said.iter().rev().find_map(|l| l.strip_prefix("error ")).filter(|r| !r.starts_with("the recipe ended"));
    let reason =
        said.iter().find_map(|l| l.strip_prefix("error ")).or(reason).map_or_else(|| said.join("; "), str::to_owned);
    let code = match () {
        () if said.iter().any(|l| l.contains("No space left")) => Code::DiskFull,
        () if reason.starts_with("missing packages") => Code::Unsupported,
        () => Code::RecipeFailed,
    };
    Err(ImageError::new(code, format!("recipe {name} failed: {reason}")))
}

fn spawn(script: &Path, out: &Path, work: &Path, cache: &Path) -> Result<tokio::process::Child> {
    // A process namespace, so that the death of its first process takes all others along; a mount namespace, so that what the recipe
    // mounts (proc, sys) is never in the way of whoever removes the directory.
    let mut command = tokio::process::Command::new("unshare");
    command
        .args([
            "--mount",
            "--propagation=private",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "--ipc",
            "--",
            "bash",
        ])
        .arg(script)
        .arg("--out")
        .arg(out)
        .arg("--cache")
        .arg(cache)
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("TMPDIR", work)
        .envs(["http_proxy", "https_proxy", "no_proxy"].into_iter().filter_map(|n| std::env::var_os(n).map(|v| (n, v))))
        .current_dir(work)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    // SAFETY: prctl and setrlimit are async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(|| {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            Ok(())
        });
    }
    command.spawn().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => ImageError::new(Code::Unsupported, "unshare is missing; install util-linux"),
        _ => ImageError::io("cannot start a recipe", &e),
    })
}

/// Feeds each line of a stream; over-long lines are cut.
async fn lines(stream: Option<impl AsyncRead + Unpin>, mut each: impl FnMut(String)) {
    let Some(stream) = stream else { return };
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    loop {
        let Ok(buffer) = reader.fill_buf().await else { return };
        if buffer.is_empty() {
            break;
        }
        let end = buffer.iter().position(|b| *b == b'\n');
        let taken = end.unwrap_or(buffer.len());
        let room = LINE_BYTES.saturating_sub(line.len()).min(taken);
        line.extend_from_slice(&buffer[..room]);
        reader.consume(taken + usize::from(end.is_some()));
        if end.is_some() {
            each(String::from_utf8_lossy(&line).into_owned());
            line.clear();
        }
    }
    if !line.is_empty() {
        each(String::from_utf8_lossy(&line).into_owned());
    }
}

fn write_out(dir: &Path) -> Result<PathBuf> {
    let describe = || format!("cannot write {}", dir.display());
    for (path, bytes) in FILES {
        let path = dir.join(path);
        std::fs::create_dir_all(path.parent().unwrap_or(dir)).context(describe)?;
        std::fs::write(&path, bytes).context(describe)?;
        let mode = if bytes.starts_with(b"#!") { 0o755 } else { 0o644 };
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).context(describe)?;
    }
    Ok(dir.to_owned())
}

/// Reads `manifest.json` of a result; every file it names is a plain name.
pub(crate) fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join("manifest.json");
    let bytes = std::fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
    let bad = |why: &str| ImageError::new(Code::RecipeFailed, format!("{} {why}", path.display()));
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| bad(&format!("cannot be read: {e}")))?;
    if manifest.schema != 1 {
        return Err(bad("is of another version of this product"));
    }
    let files: Vec<&String> = match &manifest.content {
        Content::Disk { disk, .. } => vec![disk],
        Content::Kernel { kernel, initrd, disk, .. } => std::iter::once(kernel).chain(initrd).chain(disk).collect(),
        Content::Oci { .. } => Vec::new(),
    };
    if files.iter().any(|f| f.is_empty() || f.contains('/') || f.starts_with('.')) {
        return Err(bad("names a file outside of its directory"));
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_has_every_file_of_the_recipes() {
        fn walk(dir: &Path, root: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap().flatten() {
                if entry.file_type().unwrap().is_dir() {
                    walk(&entry.path(), root, found);
                } else {
                    found.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned());
                }
            }
        }
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images");
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found.retain(|f| !f.ends_with(".md"));
        found.sort();
        let mut known: Vec<&str> = FILES.iter().map(|(p, _)| *p).collect();
        known.sort_unstable();
        assert_eq!(found, known);
        assert_eq!(names(None), ["busybox", "debian-12", "tiny"]);
        assert_eq!(names(Some(&root)), names(None));
    }

    #[tokio::test]
    async fn lines_are_cut_not_lost() {
        let text = format!("a\n{}\nend", "x".repeat(10_000));
        let mut seen = Vec::new();
        lines(Some(text.as_bytes()), |l| seen.push(l)).await;
        assert_eq!((seen.len(), seen[1].len(), seen[2].as_str()), (3, LINE_BYTES, "end"));
    }
}
