//! vCPUs and memory of a running machine: vCPUs are plugged in, memory is taken and given back by the balloon below what the
//! machine was started with. Everything else needs a restart, and says so.

use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::Resize;
use oblak_compute::shim::cgroup;
use oblak_model::{InstanceId, Size};
use oblak_platform::driver::{DriverError, DriverResult};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::QemuDriver;
use super::agent::Agent;
use super::record::{Record, vcpus};
use super::session::{Session, refused};
use super::shim;

/// How long a guest may take to give memory back.
const BALLOON_DEADLINE: Duration = Duration::from_secs(20);
const LOOK_EVERY: Duration = Duration::from_millis(250);

fn restart(why: &str) -> DriverError {
    DriverError::unsupported(format!("{why}; restart the machine for it"))
}

#[async_trait]
impl Resize for QemuDriver {
    async fn resize(&self, id: InstanceId, vcpus_milli: u32, memory: Size) -> DriverResult<()> {
        let locks = self.locks.of(id);
        let _life = locks.life.lock().await;
        let session = self.session(id).await?;
        let started_with = session.memory_at_start().await?;
        let (now, want) = (session.vcpus_now().await?, vcpus(vcpus_milli));
        // All refusals come before the first change.
        if want < now {
            return Err(restart(&format!("a running machine cannot lose vCPUs (it has {now})")));
        }
        if want > session.record.max_vcpus {
            return Err(restart(&format!("this machine was started for at most {} vCPUs", session.record.max_vcpus)));
        }
        if memory > started_with {
            return Err(restart(&format!(
                "a running machine cannot get more memory than it was started with ({started_with})"
            )));
        }
        let mut record = session.record.clone();
        let target =
            Record { spec: oblak_compute::GuestSpec { vcpus_milli, memory, ..record.spec.clone() }, ..record.clone() };
        if memory > record.spec.memory {
            set_limits(&target)?;
        }
        session.set_balloon(memory, started_with).await?;
        if want > now {
            session.plug_vcpus(want - now).await?;
        }
        set_limits(&target)?;
        record.spec.vcpus_milli = vcpus_milli;
        record.spec.memory = memory;
        record.resized = true;
        self.dir(id).write(&record)?;
        drop(session);
        if want > now {
            self.wake_vcpus(id).await;
        }
        Ok(())
    }
}

fn set_limits(record: &Record) -> DriverResult<()> {
    // Without cgroups the machine has no limits; that was reported when it started.
    let Ok(cgroups) = cgroup::Cgroups::detect() else { return Ok(()) };
    let group = cgroups.group(&record.cgroup);
    if !group.exists() {
        return Ok(());
    }
    group.limit(&shim::limits(record)).map_err(|e| DriverError::io("cannot set the machine's limits", &e))
}

impl Session {
    async fn get(&self, command: &str) -> DriverResult<Value> {
        self.qmp.execute(command, Value::Null).await.map_err(|e| refused(self.record.spec.id, "look at", &e))
    }

    async fn memory_at_start(&self) -> DriverResult<Size> {
        Ok(Size(self.get("query-memory-size-summary").await?["base-memory"].as_u64().unwrap_or_default()))
    }

    async fn vcpus_now(&self) -> DriverResult<u32> {
        let all = self.get("query-cpus-fast").await?;
        Ok(u32::try_from(all.as_array().map_or(0, Vec::len)).unwrap_or(u32::MAX))
    }

    async fn balloon_now(&self) -> DriverResult<u64> {
        Ok(self.get("query-balloon").await?["actual"].as_u64().unwrap_or_default())
    }

    async fn set_balloon(&self, target: Size, started_with: Size) -> DriverResult<()> {
        let failed = |e| refused(self.record.spec.id, "set the memory of", &e);
        let before = self.balloon_now().await?;
        if before == target.as_u64() {
            return Ok(());
        }
        self.qmp.execute("balloon", json!({"value": target.as_u64()})).await.map_err(failed)?;
        let end = Instant::now() + BALLOON_DEADLINE;
        while self.balloon_now().await? != target.as_u64() {
            if Instant::now() >= end {
                let back = before.min(started_with.as_u64());
                self.qmp.execute("balloon", json!({"value": back})).await.map_err(failed)?;
                return Err(restart("the guest does not give its memory back"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Ok(())
    }

    async fn plug_vcpus(&self, count: u32) -> DriverResult<()> {
        let slots = self.get("query-hotpluggable-cpus").await?;
        let free = slots.as_array().into_iter().flatten().filter(|slot| slot.get("qom-path").is_none());
        let mut free: Vec<&Value> = free.collect();
        // The kernel of the guest numbers them in this order.
        free.sort_by_key(|slot| slot["props"]["core-id"].as_u64());
        for slot in free.into_iter().take(usize::try_from(count).unwrap_or(usize::MAX)) {
            let mut device = slot["props"].clone();
            device["driver"] = slot["type"].clone();
            device["id"] = json!(format!("cpu-{}", slot["props"]["core-id"]));
            let failed = |e| refused(self.record.spec.id, "plug a vCPU into", &e);
            self.qmp.execute("device_add", device).await.map_err(failed)?;
        }
        Ok(())
    }
}

impl QemuDriver {
    /// Most guests leave new vCPUs asleep until somebody tells them to use them.
    async fn wake_vcpus(&self, id: InstanceId) {
        let work = async {
            let mut agent = Agent::open(&self.dir(id), id, &self.locks.of(id)).await?;
            let all = agent.ask("guest-get-vcpus", json!({})).await?;
            let asleep = all.as_array().into_iter().flatten().filter(|c| c["online"] == false);
            let wake: Vec<Value> = asleep.map(|c| json!({"logical-id": c["logical-id"], "online": true})).collect();
            if !wake.is_empty() {
                agent.ask("guest-set-vcpus", json!({"vcpus": wake})).await?;
            }
            Ok::<(), DriverError>(())
        };
        if let Err(e) = work.await {
            tracing::info!(instance = %id, error = %e, "new vCPUs are plugged in, but nobody inside was told to use them");
        }
    }
}
