//! The conformance suite of compute drivers on real qemu.

mod support;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::conformance::{Behaviour, Harness, suite};
use oblak_compute::{Boot, ComputeDriver, GuestSpec};
use support::{World, tiny};

struct Qemu(World);

#[async_trait]
impl Harness for Qemu {
    fn driver(&self) -> Arc<dyn ComputeDriver> {
        self.0.driver()
    }
    async fn restart(&self) {
        self.0.restart();
    }
    async fn spec(&self, behaviour: Behaviour) -> Result<GuestSpec, String> {
        let init = match behaviour {
            Behaviour::Runs | Behaviour::Busy => return Ok(self.0.spec()),
            Behaviour::Exits(_) => return Err("a machine that switches itself off has no exit code".into()),
            Behaviour::IgnoresStop => "exec sleep 100000",
            Behaviour::Prints => "echo one; echo two; echo three; exec sleep 100000",
        };
        let mut spec = self.0.spec();
        let initrd = self.0.temp.path().join(format!("{}.initrd", spec.id));
        let mut bytes = std::fs::read(self.0.tiny.join("initrd.img")).map_err(|e| e.to_string())?;
        // The kernel unpacks archives one after the other; the later file replaces the earlier one.
        let script = format!("#!/bin/sh\nmount -t devtmpfs dev /dev\nexec >/dev/ttyS0 2>&1\n{init}\n");
        bytes.extend(archive("init", script.as_bytes()));
        std::fs::write(&initrd, bytes).map_err(|e| e.to_string())?;
        if let Boot::Kernel { initrd: there, cmdline, .. } = &mut spec.boot {
            *there = Some(initrd);
            *cmdline = "console=ttyS0 quiet loglevel=0 panic=10".into();
        }
        Ok(spec)
    }
    async fn leaks(&self, spec: &GuestSpec) -> Vec<String> {
        self.0.leaks(spec.id)
    }
    fn patience(&self) -> Duration {
        Duration::from_secs(120)
    }
    fn cancellations(&self) -> usize {
        8
    }
}

/// A cpio archive with one executable file, in the format that the kernel reads (Linux
/// Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(name: &str, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content, mode) in [(name, content, 0o100_755), ("TRAILER!!!", &b""[..], 0)] {
        let mut header = String::from("070701");
        for field in [1, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0] {
            header += &format!("{field:08x}");
        }
        out.extend(header.bytes());
        out.extend(name.bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(content);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn qemu_keeps_the_promises_of_a_compute_driver() {
    let Some(tiny) = tiny() else { return };
    suite(&Qemu(World::new(tiny))).await;
}
