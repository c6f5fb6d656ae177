//! The screen: a viewer's connection is handed to the emulator, which then speaks RFB (RFC 6143) on it.

use std::os::fd::AsFd;

use async_trait::async_trait;
use oblak_compute::shim::ShimRecord;
use oblak_compute::{UsageSample, Vnc};
use oblak_model::InstanceId;
use oblak_platform::driver::{BoxDuplex, DriverError, DriverResult};
use serde_json::json;
use tokio::net::UnixStream;

use super::QemuDriver;
use super::session::refused;

#[async_trait]
impl Vnc for QemuDriver {
    async fn vnc(&self, id: InstanceId) -> DriverResult<BoxDuplex> {
        let session = self.session(id).await?;
        let (ours, theirs) = UnixStream::pair().map_err(|e| DriverError::io("socket pair", &e))?;
        let name = format!("viewer-{}", uuid::Uuid::new_v4().simple());
        let failed = |e| refused(id, "open the screen of", &e);
        session.qmp.execute_with_fd("getfd", json!({"fdname": name}), theirs.as_fd()).await.map_err(failed)?;
        // Whoever reached this call was let in already; there is no listening socket that needs a password.
        let client = json!({"protocol": "vnc", "fdname": name, "skipauth": true});
        session.qmp.execute("add_client", client).await.map_err(failed)?;
        Ok(Box::new(ours))
    }
}

/// CPU time and memory of the emulator from proc(5), for a machine without a cgroup.
#[must_use]
pub fn process_usage(shim: &ShimRecord) -> Option<UsageSample> {
    let emulator = shim.guest.as_ref().filter(|g| g.is_alive())?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", emulator.pid)).ok()?;
    // Fields are counted after the name, which may hold spaces: 14 and 15 are utime and stime, 24 is rss.
    let fields: Vec<u64> = stat[stat.rfind(')')? + 1..].split_whitespace().map(|f| f.parse().unwrap_or(0)).collect();
    let (ticks, pages) = (fields.get(11)? + fields.get(12)?, *fields.get(21)?);
    // USER_HZ is 100 on every Linux that this runs on; pages have 4 KiB on x86-64.
    Some(UsageSample { cpu_ns: ticks * 10_000_000, memory_bytes: pages * 4096, ..UsageSample::default() })
}
