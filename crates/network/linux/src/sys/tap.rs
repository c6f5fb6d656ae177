//! Taps (Documentation/networking/tuntap.rst).

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

// _IOW('T', 202, int) and _IOW('T', 203, int), linux/if_tun.h.
nix::ioctl_write_int!(tunsetiff, b'T', 202);
nix::ioctl_write_int!(tunsetpersist, b'T', 203);

/// Makes a tap with virtio-net headers in the namespace of the calling thread; it stays when nobody has it open.
pub(crate) fn create_persistent(name: &str) -> io::Result<()> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/net/tun")?;
    // SAFETY: all zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("`{name}` is too long for an interface")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the ioctl reads and writes one ifreq, which lives across the call.
    unsafe { tunsetiff(device.as_raw_fd(), (&raw mut request) as libc::c_ulong) }?;
    // SAFETY: takes a plain integer.
    unsafe { tunsetpersist(device.as_raw_fd(), 1) }?;
    Ok(())
}
