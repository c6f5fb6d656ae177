//! Gives up what netd does not need of root's powers (capabilities(7)).

use std::io;

/// Capabilities that stay (linux/capability.h): reach files below directories of others, ports below 1024, enter namespaces.
const KEPT: [u32; 3] = [2, 10, 21];
/// The number of the last capability a kernel may know.
const LAST: libc::c_ulong = 63;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The capabilities that stay, as a mask.
#[must_use]
pub fn kept() -> u64 {
    KEPT.iter().fold(0, |mask, n| mask | 1 << n)
}

/// For the calling thread and those it starts. Does nothing without root.
///
/// # Errors
/// The operating system's error.
pub fn drop_all_but_needed() -> io::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    // SAFETY: prctl with integers; capset reads the two structs, which outlive the call and have the layout of version 3.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        for capability in 0..=LAST {
            if kept() >> capability & 1 == 0 {
                // Fails only for numbers this kernel does not know.
                libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
            }
        }
        let header = Header { version: VERSION, pid: 0 };
        let half = |shift: u32| {
            let mask = u32::try_from(kept() >> shift & u64::from(u32::MAX)).unwrap_or(0);
            Data { effective: mask, permitted: mask, inheritable: 0 }
        };
        let data = [half(0), half(32)];
        if libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
