//! The NoCloud seed: what the metadata service tells, on a small disk labelled `CIDATA`, for guests that look there first.
//!
//! Format: <https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html>. The agent writes it beside the
//! instance and gives it to the machine as a read-only disk.

use std::fmt::Write as _;
use std::io::{self, Cursor, Write as _};
use std::net::IpAddr;
use std::path::Path;

use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use ipnet::IpNet;
use oblak_network::{InstanceMetadata, NetworkPlan, PortPlan};
use oblak_platform::fsx;
use sha2::{Digest, Sha256};

use crate::view::ROOT_ZONE;

/// Label of the disk, 11 bytes padded with spaces (FAT specification, section on the root directory).
const LABEL: [u8; 11] = *b"CIDATA     ";
/// Smallest image, bytes.
const MIN_IMAGE_BYTES: usize = 128 << 10;
/// Room for the tables, the directory and the unused ends of the last clusters, bytes.
const OVERHEAD_BYTES: usize = 48 << 10;
/// Longest user data, bytes. The API allows far less; this bounds the image whoever calls.
pub const MAX_USER_DATA_BYTES: usize = 1 << 20;
const SECTOR_BYTES: usize = 512;

/// One interface of the instance.
#[derive(Clone, Copy, Debug)]
pub struct Nic<'a> {
    /// Its network.
    pub plan: &'a NetworkPlan,
    /// Its port in that network.
    pub port: &'a PortPlan,
}

impl Nic<'_> {
    fn fqdn(&self) -> String {
        format!("{}.{}.{}.{ROOT_ZONE}", self.port.hostname, self.plan.name, self.plan.project)
    }
}

/// The texts of a seed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// File `meta-data`.
    pub meta_data: String,
    /// File `user-data`.
    pub user_data: String,
    /// File `network-config`, version 2.
    pub network_config: String,
}

/// The texts for an instance with these interfaces.
#[must_use]
pub fn nocloud_seed(metadata: &InstanceMetadata, nics: &[Nic<'_>]) -> Seed {
    // The full name: cloud-init makes the short one and /etc/hosts of it.
    let hostname = nics.iter().min_by_key(|nic| nic.port.index).map_or_else(|| metadata.name.clone(), Nic::fqdn);
    let mut meta = format!("instance-id: {}\n", metadata.instance);
    let _ = writeln!(meta, "local-hostname: {}", quoted(&hostname));
    let _ = writeln!(meta, "availability-zone: {}", quoted(&metadata.availability_zone));
    let _ = writeln!(meta, "instance-type: {}", quoted(&metadata.instance_type));
    if !metadata.public_keys.is_empty() {
        meta.push_str("public-keys:\n");
        for line in metadata.public_keys.values() {
            let _ = writeln!(meta, "  - {}", quoted(line.trim_end()));
        }
    }
    // cloud-init wants the file even when there is nothing to do, and then this first line.
    let user_data = metadata.user_data.clone().unwrap_or_else(|| "#cloud-config\n{}\n".into());
    Seed { meta_data: meta, user_data, network_config: network_config(nics) }
}

/// Writes the seed as a disk image, replacing an older one at once (mode 0640).
///
/// # Errors
/// `InvalidInput` when the user data is too long, any other I/O error.
pub fn write_seed(path: &Path, metadata: &InstanceMetadata, nics: &[Nic<'_>]) -> io::Result<()> {
    let id = Sha256::digest(metadata.instance.0.as_bytes());
    let volume_id = u32::from_le_bytes([id[0], id[1], id[2], id[3]]);
    let image = fat_image(&nocloud_seed(metadata, nics), volume_id)?;
    fsx::write_atomic(path, &image, 0o640)
}

fn network_config(nics: &[Nic<'_>]) -> String {
    if nics.is_empty() {
        return "version: 2\nethernets: {}\n".into();
    }
    let mut text = String::from("version: 2\nethernets:\n");
    for Nic { plan, port } in nics {
        let name = format!("eth{}", port.index);
        let _ = writeln!(text, "  {name}:\n    match:\n      macaddress: {}\n    set-name: {name}", quoted(&port.mac));
        let _ = writeln!(text, "    mtu: {}\n    dhcp4: {}", plan.mtu, port.addresses.iter().any(IpAddr::is_ipv4));
        fixed_v6(&mut text, plan, port);
    }
    text
}

/// IPv6 is fixed: routers are not announced in our networks.
fn fixed_v6(text: &mut String, plan: &NetworkPlan, port: &PortPlan) {
    let subnets = port.addresses.iter().filter_map(|address| {
        let subnet = plan.subnets.iter().find(|s| s.cidr.contains(address))?;
        matches!(subnet.cidr, IpNet::V6(_)).then_some((address, subnet))
    });
    let v6: Vec<_> = subnets.collect();
    let Some((_, first)) = v6.first() else { return };
    text.push_str("    dhcp6: false\n    addresses:\n");
    for (address, subnet) in &v6 {
        let _ = writeln!(text, "      - \"{address}/{}\"", subnet.cidr.prefix_len());
    }
    if port.index == 0 {
        let _ = writeln!(text, "    routes:\n      - to: \"::/0\"\n        via: \"{}\"", first.gateway);
    }
    let _ = writeln!(text, "    nameservers:\n      addresses: [\"{}\"]", first.gateway);
}

/// A JSON string, which YAML takes as a double-quoted scalar (YAML 1.2 section 1.3).
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn fat_image(seed: &Seed, volume_id: u32) -> io::Result<Vec<u8>> {
    if seed.user_data.len() > MAX_USER_DATA_BYTES {
        let problem =
            format!("user data has {} bytes; at most {MAX_USER_DATA_BYTES} fit into a seed", seed.user_data.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    let files =
        [("meta-data", &seed.meta_data), ("user-data", &seed.user_data), ("network-config", &seed.network_config)];
    let content: usize = files.iter().map(|(_, text)| text.len()).sum();
    let size = (content + OVERHEAD_BYTES).max(MIN_IMAGE_BYTES).next_multiple_of(SECTOR_BYTES);
    let mut image = vec![0; size];
    // Up to 2 MiB in sectors of 512 bytes: below 4085 clusters it must be FAT12, whatever the formatter would guess.
    let options = FormatVolumeOptions::new()
        .volume_label(LABEL)
        .volume_id(volume_id)
        .fat_type(FatType::Fat12)
        .bytes_per_cluster(512);
    fatfs::format_volume(Cursor::new(&mut image[..]), options)?;
    let disk = FileSystem::new(Cursor::new(&mut image[..]), FsOptions::new())?;
    for (name, text) in files {
        let mut file = disk.root_dir().create_file(name)?;
        file.write_all(text.as_bytes())?;
        file.flush()?;
    }
    disk.unmount()?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::testing;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    fn metadata() -> (InstanceMetadata, NetworkPlan) {
        let plan = testing::plan();
        (plan.ports[0].metadata.clone().unwrap(), plan)
    }

    #[test]
    fn texts() {
        let (mut metadata, mut plan) = metadata();
        metadata.public_keys.insert("evil".into(), "ssh-rsa A\"\ninjected: true".into());
        plan.subnets.push(oblak_network::SubnetPlan {
            cidr: "fd00:1::/64".parse().unwrap(),
            gateway: "fd00:1::1".parse().unwrap(),
            lease_s: 60,
        });
        plan.ports[0].addresses.push("fd00:1::a".parse().unwrap());
        let seed = nocloud_seed(&metadata, &[Nic { plan: &plan, port: &plan.ports[0] }]);
        assert!(seed.meta_data.starts_with(&format!(
            "instance-id: {}\nlocal-hostname: \"web.blue.p1.oblak.internal\"\n",
            metadata.instance
        )));
        assert!(seed.meta_data.contains("  - \"ssh-ed25519 AAAA me@host\"\n"));
        assert!(!seed.meta_data.lines().any(|l| l.starts_with("injected")), "{}", seed.meta_data);
        assert_eq!(seed.user_data, "#cloud-config\n{}\n");
        let expected = "version: 2\nethernets:\n  eth0:\n    match:\n      macaddress: \"02:00:00:00:00:0a\"\n    set-name: eth0\n    \
            mtu: 1450\n    dhcp4: true\n    dhcp6: false\n    addresses:\n      - \"fd00:1::a/64\"\n    routes:\n      - to: \"::/0\"\n        \
            via: \"fd00:1::1\"\n    nameservers:\n      addresses: [\"fd00:1::1\"]\n";
        assert_eq!(seed.network_config, expected);
    }

    #[test]
    fn the_image_is_a_disk_that_others_can_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("seed.img");
        let (mut metadata, plan) = metadata();
        let nics = [Nic { plan: &plan, port: &plan.ports[0] }];
        for length in [10, 70_000, MAX_USER_DATA_BYTES] {
            metadata.user_data = Some("x".repeat(length));
            write_seed(&path, &metadata, &nics).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
            let disk =
                FileSystem::new(std::fs::File::options().read(true).write(true).open(&path).unwrap(), FsOptions::new())
                    .unwrap();
            let mut text = String::new();
            disk.root_dir().open_file("user-data").unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text.len(), length);
            drop(disk);
            let Ok(blkid) = Command::new("blkid").args(["-p", "-o", "export"]).arg(&path).output() else {
                eprintln!("skipped: blkid is not installed");
                continue;
            };
            let blkid = String::from_utf8(blkid.stdout).unwrap();
            assert!(blkid.contains("LABEL=CIDATA\n") && blkid.contains("TYPE=vfat\n"), "{blkid}");
            assert!(!blkid.contains("UUID=1234-5678"), "the formatter's own volume id: {blkid}");
            let Ok(fsck) = Command::new("fsck.vfat").arg("-n").arg(&path).output() else {
                eprintln!("skipped: fsck.vfat is not installed");
                continue;
            };
            assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
        }
        metadata.user_data = Some("x".repeat(MAX_USER_DATA_BYTES + 1));
        assert_eq!(write_seed(&path, &metadata, &nics).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing half-made is left");
    }
}
