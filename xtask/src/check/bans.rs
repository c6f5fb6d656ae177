//! Calls that must not be used, each with its reason and the places that may.

use anyhow::{Result, bail};

use crate::tools;

struct Ban {
    call: &'static str,
    reason: &'static str,
    /// Path prefixes where it is fine.
    except: &'static [&'static str],
}

const BANS: &[Ban] = &[
    Ban {
        call: "SystemTime::now(",
        reason: "time comes from platform::clock, so that a simulation can replace it",
        except: &["crates/platform/", "crates/image/src/store.rs", "xtask/", "tests/", "bench/"],
    },
    Ban {
        call: "thread::sleep(",
        reason: "it blocks a worker and hides a missing condition",
        except: &[
            "crates/compute/",
            "crates/network/",
            "crates/volume/",
            "crates/image/",
            "crates/store/etcd/src/testing/",
            "bin/",
            "xtask/",
            "tests/",
            "bench/",
        ],
    },
    Ban {
        call: "println!(",
        reason: "libraries log through tracing; only programs print",
        except: &["crates/cli/", "bin/", "xtask/", "tests/", "bench/", "crates/sim/src/bin/", "fuzz/src/main.rs"],
    },
    Ban { call: "unreachable!(\"TODO", reason: "unfinished work is named in an error, not hidden", except: &[] },
    Ban {
        call: "std::process::exit(",
        reason: "it skips destructors; return an exit code",
        except: &["crates/compute/", "crates/network/", "bin/"],
    },
    Ban { call: "danger_accept_invalid", reason: "TLS is always verified", except: &[] },
    Ban {
        call: "std::mem::forget(",
        reason: "leaks; use an owner that says so",
        except: &["crates/network/linux/", "crates/compute/"],
    },
];

/// Looks at every Rust file, up to its test module.
pub fn check() -> Result<()> {
    let mut found = Vec::new();
    for file in tools::files(".", ".rs")? {
        let path = file.display().to_string();
        if path.contains("/tests/")
            || path.contains("/examples/")
            || path.ends_with("/conformance.rs")
            || path.ends_with("/tests.rs")
            || path.ends_with("check/bans.rs")
        {
            continue;
        }
        let text = std::fs::read_to_string(&file)?;
        let product = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in product.lines().enumerate().filter(|(_, l)| !l.trim_start().starts_with("//")) {
            let line = line.replace("eprintln!(", "");
            for ban in BANS.iter().filter(|b| line.contains(b.call) && !b.except.iter().any(|e| path.starts_with(e))) {
                found.push(format!("{path}:{}: {} ({})", number + 1, ban.call.trim_end_matches('('), ban.reason));
            }
        }
    }
    if found.is_empty() { Ok(()) } else { bail!("\n  {}", found.join("\n  ")) }
}
