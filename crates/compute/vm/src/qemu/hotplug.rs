//! Volumes that come and go while the machine runs. Each sits behind a PCIe port of its own.

use std::os::fd::AsFd;
use std::time::Duration;

use async_trait::async_trait;
use oblak_compute::{DiskSpec, Hotplug};
use oblak_model::{InstanceId, Size, VolumeId};
use oblak_platform::driver::{DriverError, DriverResult};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::QemuDriver;
use super::cmdline::{
    block_node_names, block_nodes, device_id, lock_as_needed, node_name, port_id, volume_device, volume_of_device,
};
use super::disk::{self, MAX_CHAIN};
use super::qmp::QmpError;
use super::session::{Session, refused};
use super::shim::open::open_file;

/// How long a guest may take to let go of a disk.
const DETACH_DEADLINE: Duration = Duration::from_secs(30);
/// How often it is reminded: a guest that is still booting does not notice the first request.
const REMIND_EVERY: Duration = Duration::from_secs(4);
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often, and how long apart, a node that is still in use is closed again.
const CLOSE_TRIES: u32 = 50;
const CLOSE_PAUSE: Duration = Duration::from_millis(200);

impl Session {
    fn id(&self) -> InstanceId {
        self.record.spec.id
    }

    /// Volumes plugged in, each with its port.
    pub(super) async fn volumes(&self) -> DriverResult<Vec<(VolumeId, Option<u8>)>> {
        let failed = |e| refused(self.id(), "look at the disks of", &e);
        let children = self.qmp.execute("qom-list", json!({"path": "/machine/peripheral"})).await.map_err(failed)?;
        let mut volumes = Vec::new();
        for name in children.as_array().into_iter().flatten().filter_map(|c| c["name"].as_str()) {
            let Some(volume) = volume_of_device(name) else { continue };
            let question = json!({"path": format!("/machine/peripheral/{name}"), "property": "parent_bus"});
            // Unplugged between the two questions: then it has no port any more.
            let bus = self.qmp.execute("qom-get", question).await.unwrap_or_default();
            let port = bus
                .as_str()
                .and_then(|path| path.rsplit('/').next())
                .and_then(|name| name.strip_prefix("port")?.parse().ok());
            volumes.push((volume, port));
        }
        Ok(volumes)
    }

    async fn nodes(&self) -> DriverResult<Vec<Value>> {
        let failed = |e| refused(self.id(), "look at the disks of", &e);
        let nodes = self.qmp.execute("query-named-block-nodes", json!({"flat": true})).await.map_err(failed)?;
        Ok(nodes.as_array().cloned().unwrap_or_default())
    }

    /// Closes a block node. The emulator says that a device is gone before its last reference to the node is: it is freed after an RCU grace
    /// period, which takes long where the host is busy.
    async fn close(&self, name: &str) -> DriverResult<()> {
        let mut tries = CLOSE_TRIES;
        loop {
            tries -= 1;
            match self.qmp.execute("blockdev-del", json!({"node-name": name})).await {
                Ok(_) => return Ok(()),
                Err(e) if e.says("find node") => return Ok(()),
                Err(e) if e.says("is in use") && tries > 0 => tokio::time::sleep(CLOSE_PAUSE).await,
                Err(e) => return Err(refused(self.id(), "close a disk of", &e)),
            }
        }
    }

    /// Takes a volume's block nodes and descriptors away. Fine when there are none.
    async fn release(&self, volume: VolumeId) -> DriverResult<()> {
        let present = self.nodes().await?;
        let is_present = |name: &str| present.iter().any(|n| n["node-name"] == name);
        for name in block_node_names(&node_name(volume), MAX_CHAIN).into_iter().filter(|n| is_present(n)) {
            self.close(&name).await?;
        }
        let failed = |e| refused(self.id(), "look at the descriptors of", &e);
        let sets = self.qmp.execute("query-fdsets", Value::Null).await.map_err(failed)?;
        for set in sets.as_array().into_iter().flatten() {
            let ours = set["fds"].as_array().into_iter().flatten().any(|fd| fd["opaque"] == node_name(volume).as_str());
            if ours {
                // The emulator drops unused sets by itself at times; gone is what we want.
                let _ = self.qmp.execute("remove-fd", json!({"fdset-id": set["fdset-id"]})).await;
            }
        }
        Ok(())
    }

    async fn plug(&self, spec: &DiskSpec, port: u8) -> DriverResult<()> {
        let name = node_name(spec.volume);
        let failed = |e: QmpError| refused(self.id(), &format!("plug volume {} into", spec.volume), &e);
        let mut links = Vec::new();
        for (depth, link) in disk::chain(&spec.path, spec.format)?.into_iter().enumerate() {
            let file = open_file(&link.path, depth > 0 || spec.read_only)?;
            let answer =
                self.qmp.execute_with_fd("add-fd", json!({"opaque": name}), file.as_fd()).await.map_err(failed)?;
            let set = answer["fdset-id"].as_i64().and_then(|n| i32::try_from(n).ok());
            let set = set.ok_or_else(|| {
                DriverError::retry("monitor", "the emulator does not tell the number of a descriptor")
            })?;
            links.push((link, set));
        }
        for node in block_nodes(&name, &links, spec.read_only) {
            let node = lock_as_needed(node, self.record.spec.fence.is_some());
            self.qmp.execute("blockdev-add", node).await.map_err(failed)?;
        }
        let device = volume_device(spec.volume, port, self.record.vcpus());
        self.qmp.execute("device_add", device).await.map_err(failed).map(drop)
    }

    async fn wait_unplugged(&self, volume: VolumeId) -> DriverResult<()> {
        let id = device_id(volume);
        let mut events = self.qmp.events();
        let end = Instant::now() + DETACH_DEADLINE;
        let mut remind = Instant::now();
        while self.volumes().await?.iter().any(|(v, _)| *v == volume) {
            if Instant::now() >= end {
                let detail = format!(
                    "the guest of machine {} does not let go of volume {volume}; unmount it inside, or stop the machine",
                    self.id()
                );
                return Err(DriverError::retry("detach_timeout", detail));
            }
            if Instant::now() >= remind {
                remind = Instant::now() + REMIND_EVERY;
                match self.qmp.execute("device_del", json!({"id": id})).await {
                    Ok(_) => {}
                    Err(e) if e.is_class("DeviceNotFound") || e.says("in the process of unplug") => {}
                    Err(e) => return Err(refused(self.id(), &format!("unplug volume {volume} from"), &e)),
                }
            }
            match tokio::time::timeout(LOOK_EVERY, events.recv()).await {
                Ok(Ok(event)) if event.name == "DEVICE_UNPLUG_GUEST_ERROR" && event.text("device") == id => {
                    let detail = format!("the guest of machine {} refused to let go of volume {volume}", self.id());
                    return Err(DriverError::retry("detach_refused", detail));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn grow(&self, volume: VolumeId, size: Size) -> DriverResult<()> {
        let name = node_name(volume);
        let nodes = self.nodes().await?;
        let node = nodes.iter().find(|n| n["node-name"] == name.as_str());
        let now = node.and_then(|n| n["image"]["virtual-size"].as_u64());
        let now =
            now.ok_or_else(|| DriverError::gone(format!("volume {volume} is not plugged into machine {}", self.id())))?;
        if size.as_u64() < now {
            let detail = format!("volume {volume} has {} already; disks only grow", Size(now));
            return Err(DriverError::permanent("would_shrink", detail));
        }
        let arguments = json!({"node-name": name, "size": size.as_u64()});
        let failed = |e| refused(self.id(), &format!("grow volume {volume} of"), &e);
        self.qmp.execute("block_resize", arguments).await.map_err(failed).map(drop)
    }
}

#[async_trait]
impl Hotplug for QemuDriver {
    async fn attach(&self, id: InstanceId, disk: &DiskSpec) -> DriverResult<()> {
        let session = self.session(id).await?;
        let present = session.volumes().await?;
        if present.iter().any(|(volume, _)| *volume == disk.volume) {
            return Ok(());
        }
        // What a call that was interrupted left.
        session.release(disk.volume).await?;
        let taken = |port: u8| present.iter().any(|(_, p)| *p == Some(port));
        let port = (0..session.record.ports).find(|port| !taken(*port)).ok_or_else(|| {
            let detail = format!(
                "machine {id} has all {} ports for volumes in use; restart it to get more",
                session.record.ports
            );
            DriverError::permanent("no_free_port", detail)
        })?;
        if let Err(error) = session.plug(disk, port).await {
            tracing::debug!(instance = %id, volume = %disk.volume, port = port_id(port), "plugging failed, cleaning up");
            let _ = session.release(disk.volume).await;
            return Err(error);
        }
        Ok(())
    }

    async fn detach(&self, id: InstanceId, volume: VolumeId) -> DriverResult<()> {
        let session = self.session(id).await?;
        session.wait_unplugged(volume).await?;
        session.release(volume).await
    }

    async fn grow(&self, id: InstanceId, volume: VolumeId, size: Size) -> DriverResult<()> {
        self.session(id).await?.grow(volume, size).await
    }
}
