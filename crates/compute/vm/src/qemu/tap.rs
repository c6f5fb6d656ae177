//! Tap devices: opened inside the network namespace in which they live, handed to the emulator as descriptors.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use oblak_compute::NicAttach;
use oblak_platform::driver::{DriverError, DriverResult};

/// `linux/if_tun.h`
const TUNSETIFF: u64 = 0x4004_54ca;
const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
/// IFNAMSIZ of `linux/if.h`, with the final zero.
const NAME_BYTES: usize = 16;

#[repr(C)]
struct IfReq {
    name: [u8; NAME_BYTES],
    flags: i16,
    padding: [u8; 22],
}

/// Opens the tap. Only for a process with one thread: it visits the other namespace and comes back.
///
/// # Errors
/// `port_missing` when namespace or device are gone, `port_busy` when another process has it, `no_tun`.
pub fn open(attach: &NicAttach) -> DriverResult<File> {
    let NicAttach::Tap { netns, device, vnet_hdr } = attach else {
        return Err(DriverError::permanent(
            "bad_port",
            "a machine needs a tap device; this port was made for a container",
        ));
    };
    let home = File::open("/proc/self/ns/net").map_err(|e| DriverError::io("/proc/self/ns/net", &e))?;
    let there = File::open(netns).map_err(|e| missing(device, netns, &e.to_string()))?;
    setns(&there, CloneFlags::CLONE_NEWNET)
        .map_err(|e| DriverError::io(&format!("cannot enter {}", netns.display()), &e.into()))?;
    let result = open_here(device, netns, *vnet_hdr);
    // A shim that cannot come home would put its guest into a tenant's network: nothing may go on then.
    setns(&home, CloneFlags::CLONE_NEWNET)
        .map_err(|e| DriverError::io("cannot return from a network namespace", &e.into()))?;
    result
}

fn missing(device: &str, netns: &Path, why: &str) -> DriverError {
    DriverError::retry(
        "port_missing",
        format!(
            "the tap {device} in {} is gone ({why}); the network of this node has to make it again",
            netns.display()
        ),
    )
}

fn open_here(device: &str, netns: &Path, vnet_hdr: bool) -> DriverResult<File> {
    // Opening a name that does not exist would make a new tap which nobody knows.
    nix::net::if_::if_nametoindex(device).map_err(|e| missing(device, netns, e.desc()))?;
    if device.len() >= NAME_BYTES {
        return Err(DriverError::permanent("bad_port", format!("the interface name {device:?} is too long")));
    }
    let tun = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")
        .map_err(|e| {
            DriverError::permanent("no_tun", format!("/dev/net/tun cannot be opened ({e}); load the kernel module tun"))
        })?;
    let mut request = IfReq { name: [0; NAME_BYTES], flags: IFF_TAP | IFF_NO_PI, padding: [0; 22] };
    request.name[..device.len()].copy_from_slice(device.as_bytes());
    if vnet_hdr {
        request.flags |= IFF_VNET_HDR;
    }
    // SAFETY: TUNSETIFF reads a struct ifreq, which has the size of IfReq (40 bytes on 64-bit).
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EBUSY) => {
                DriverError::retry("port_busy", format!("the tap {device} is in use by another process"))
            }
            Some(libc::EINVAL) => {
                DriverError::permanent("bad_port", format!("{device} is not a tap, or was made with other flags"))
            }
            _ => DriverError::io(&format!("tap {device}"), &error),
        });
    }
    Ok(tun)
}

/// vhost-net, which moves packets in the kernel; `None` where it is missing.
#[must_use]
pub fn open_vhost() -> Option<File> {
    File::options().read(true).write(true).open("/dev/vhost-net").ok()
}

const _: () = assert!(size_of::<IfReq>() == 40);
