//! What this node offers: which emulator, which accelerator, and what to tell people about it.

mod kvm;

use std::path::{Path, PathBuf};
use std::time::Duration;

use oblak_platform::driver::{Availability, DriverError, DriverResult};
use oblak_platform::{fsx, process};
use serde::{Deserialize, Serialize};

use super::config::{QemuConfig, find_program};
use super::record::Accel;

/// How long a program may take to tell its version.
const VERSION_DEADLINE: Duration = Duration::from_secs(20);

/// The verdict on KVM, kept per boot: the answer changes only with the kernel or the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmVerdict {
    /// Boot it holds for.
    pub boot_id: String,
    /// Instructions per second; none when no guest could be run.
    pub speed: Option<u64>,
    /// Why not.
    pub reason: String,
}

impl KvmVerdict {
    /// Whether KVM is worth using.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.speed.is_some_and(|s| s >= kvm::MIN_SPEED)
    }
    fn notice(&self) -> String {
        match self.speed {
            Some(speed) => format!(
                "KVM is present but emulated ({:.1} million instructions/s); using TCG, expect slow machines",
                speed as f64 / 1e6
            ),
            None => format!("KVM cannot be used ({}); using TCG, expect slow machines", self.reason),
        }
    }
}

/// Which accelerator is used, and what to say about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccelChoice {
    /// The accelerator.
    pub accel: Accel,
    /// What a person should know; empty when all is well.
    pub notice: String,
    /// What the probe found.
    pub probed: Availability,
}

/// Decides between KVM and TCG. Blocks for up to about three seconds at the first call after a boot.
///
/// # Errors
/// `bad_accel` when a person forced something that does not exist.
pub fn choose_accel(config: &QemuConfig) -> DriverResult<AccelChoice> {
    match config.accel.as_str() {
        "" => {
            let verdict = verdict(&config.state);
            Ok(if verdict.usable() {
                let detail =
                    format!("at least {} million instructions/s", verdict.speed.unwrap_or_default() / 1_000_000);
                AccelChoice { accel: Accel::Kvm, notice: String::new(), probed: Availability::yes("kvm", detail) }
            } else {
                let notice = verdict.notice();
                AccelChoice { accel: Accel::Tcg, probed: Availability::no("kvm", notice.clone()), notice }
            })
        }
        "tcg" => Ok(AccelChoice {
            accel: Accel::Tcg,
            notice: "OBLAK_ACCEL=tcg: machines run without KVM, expect them to be slow".into(),
            probed: Availability::no("kvm", "switched off by OBLAK_ACCEL=tcg"),
        }),
        "kvm" => Ok(AccelChoice {
            accel: Accel::Kvm,
            notice: "OBLAK_ACCEL=kvm: KVM is used without testing it".into(),
            probed: Availability::yes("kvm", "forced by OBLAK_ACCEL=kvm"),
        }),
        other => Err(DriverError::permanent(
            "bad_accel",
            format!("OBLAK_ACCEL={other} is not known; use kvm or tcg, or leave it out"),
        )),
    }
}

fn verdict(state: &Path) -> KvmVerdict {
    let file = state.join("kvm-probe.json");
    let boot_id = process::boot_id();
    if let Ok(Some(kept)) = fsx::read_json::<KvmVerdict>(&file)
        && kept.boot_id == boot_id
    {
        return kept;
    }
    let fresh = match kvm::measure() {
        Ok(speed) => KvmVerdict { boot_id, speed: Some(speed), reason: String::new() },
        Err(reason) => KvmVerdict { boot_id, speed: None, reason },
    };
    if let Err(e) = fsx::create_dir_private(state, 0o700).and_then(|()| fsx::write_json(&file, &fresh)) {
        tracing::warn!(file = %file.display(), error = %e, "the answer of the KVM probe is not kept");
    }
    fresh
}

/// The emulator of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulator {
    /// Program.
    pub program: PathBuf,
    /// Its version, `7.2.22`.
    pub version: String,
    /// What its `q35` means, `pc-q35-7.2`.
    pub machine: String,
}

/// Asks the emulator who it is.
///
/// # Errors
/// `qemu_missing`, `qemu_broken`.
pub async fn emulator(config: &QemuConfig) -> DriverResult<Emulator> {
    let program = find_program(&config.qemu).ok_or_else(|| {
        DriverError::permanent(
            "qemu_missing",
            format!("{} is not installed; run `apt install qemu-system-x86`", config.qemu.display()),
        )
    })?;
    let (version, machines) =
        tokio::try_join!(output(&program, &["--version"]), output(&program, &["-machine", "help"]))?;
    let version = parse_version(&version).ok_or_else(|| broken(&program, "it does not tell its version"))?;
    let machine = parse_machine(&machines).ok_or_else(|| broken(&program, "it has no q35 machine"))?;
    Ok(Emulator { program, version, machine })
}

/// Whether qemu-img is there, with its path.
///
/// # Errors
/// `qemu_img_missing`.
pub fn image_tool(config: &QemuConfig) -> DriverResult<PathBuf> {
    find_program(&config.qemu_img).ok_or_else(|| {
        DriverError::permanent(
            "qemu_img_missing",
            format!("{} is not installed; run `apt install qemu-utils`", config.qemu_img.display()),
        )
    })
}

fn broken(program: &Path, why: &str) -> DriverError {
    DriverError::permanent("qemu_broken", format!("{} cannot be used: {why}", program.display()))
}

async fn output(program: &Path, args: &[&str]) -> DriverResult<String> {
    let mut command = tokio::process::Command::new(program);
    command.args(args).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let result = tokio::time::timeout(VERSION_DEADLINE, command.output())
        .await
        .map_err(|_| broken(program, &format!("`{}` does not end", args.join(" "))))?
        .map_err(|e| broken(program, &e.to_string()))?;
    if !result.status.success() {
        let said = String::from_utf8_lossy(&result.stderr);
        return Err(broken(program, said.lines().next().unwrap_or("it fails without a word")));
    }
    Ok(String::from_utf8_lossy(&result.stdout).into_owned())
}

fn parse_version(text: &str) -> Option<String> {
    text.split_whitespace().skip_while(|word| *word != "version").nth(1).map(|v| v.trim_end_matches(',').to_string())
}

/// `q35    Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)`
fn parse_machine(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.split_whitespace().next() == Some("q35"))?;
    let alias = line.split("(alias of ").nth(1).and_then(|rest| rest.split(')').next());
    Some(alias.unwrap_or("q35").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_prints() {
        let version =
            "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022 Fabrice Bellard";
        assert_eq!(parse_version(version).unwrap(), "7.2.22");
        let machines = "Supported machines are:\npc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)\n\
            q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\n";
        assert_eq!(parse_machine(machines).unwrap(), "pc-q35-7.2");
        assert_eq!(parse_machine("Supported machines are:\nnone   empty machine\n"), None);
    }

    #[test]
    fn keeps_the_verdict_for_this_boot_only() {
        let dir = tempfile::tempdir().unwrap();
        let kept = KvmVerdict { boot_id: process::boot_id(), speed: Some(3_000_000_000), reason: String::new() };
        fsx::write_json(&dir.path().join("kvm-probe.json"), &kept).unwrap();
        assert_eq!(verdict(dir.path()), kept);
        let old = KvmVerdict { boot_id: "another".into(), ..kept };
        fsx::write_json(&dir.path().join("kvm-probe.json"), &old).unwrap();
        let fresh = verdict(dir.path());
        assert_eq!(fresh.boot_id, process::boot_id());
        assert_eq!(verdict(dir.path()), fresh);
    }

    #[test]
    fn a_person_decides() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = QemuConfig::new(dir.path(), dir.path(), vec![]);
        for (forced, accel) in [("tcg", Accel::Tcg), ("kvm", Accel::Kvm)] {
            config.accel = forced.into();
            let choice = choose_accel(&config).unwrap();
            assert_eq!(choice.accel, accel);
            assert!(choice.notice.contains("OBLAK_ACCEL"));
        }
        config.accel = "xen".into();
        assert_eq!(choose_accel(&config).unwrap_err().code, "bad_accel");
    }

    #[tokio::test]
    async fn says_what_to_install() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = QemuConfig::new(dir.path(), dir.path(), vec![]);
        config.qemu = dir.path().join("qemu-system-x86_64");
        let error = emulator(&config).await.unwrap_err();
        assert_eq!(error.code, "qemu_missing");
        assert!(error.detail.contains("apt install qemu-system-x86"));
    }
}
