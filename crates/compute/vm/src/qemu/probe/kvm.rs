//! Whether /dev/kvm really runs guest code at the speed of a processor.
//!
//! A device that opens proves little: there are hosts where every guest instruction is emulated, so that translation by qemu
//! is a hundred times faster. Here a one-page guest counts down in slices through the raw interface (Linux
//! Documentation/virt/kvm/api.rst) and is timed. The vCPU runs in a thread of its own that is interrupted by a signal at the
//! deadline, so a hanging vCPU hangs nobody.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Slowest speed in instructions per second that is worth using: translation reaches about 1e8, emulated KVM 1e6.
pub const MIN_SPEED: u64 = 20_000_000;
/// Deadline of the whole probe.
pub const DEADLINE: Duration = Duration::from_secs(2);

const KVM_GET_API_VERSION: u64 = 0xae00;
const KVM_CREATE_VM: u64 = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: u64 = 0xae04;
const KVM_CREATE_VCPU: u64 = 0xae41;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
const KVM_SET_TSS_ADDR: u64 = 0xae47;
const KVM_RUN: u64 = 0xae80;
const KVM_SET_REGS: u64 = 0x4090_ae82;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_SREGS: u64 = 0x4138_ae84;
const KVM_EXIT_HLT: u32 = 5;
const KVM_API_VERSION: i32 = 12;
/// Offsets in `struct kvm_run`.
const RUN_IMMEDIATE_EXIT: usize = 1;
const RUN_EXIT_REASON: usize = 8;

const PAGE: usize = 4096;
const CODE_AT: u64 = 0x1000;
/// `dec ecx; jnz -3; hlt` in 32-bit code.
const CODE: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
const INSTRUCTIONS_PER_TURN: u64 = 2;
const FIRST_SLICE_TURNS: u64 = 5_000;
const LAST_SLICE_TURNS: u64 = 160_000_000;
/// No new slice is begun after this time. Slices grow because entering a guest may cost much where KVM itself is nested.
const ENOUGH: Duration = Duration::from_millis(600);

#[repr(C)]
#[derive(Default)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    host_address: u64,
}

#[repr(C)]
#[derive(Default)]
struct Regs {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    others: [u64; 12],
    rip: u64,
    rflags: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Segment {
    base: u64,
    limit: u32,
    selector: u16,
    kind: u8,
    present: u8,
    dpl: u8,
    db: u8,
    s: u8,
    l: u8,
    g: u8,
    avl: u8,
    unusable: u8,
    padding: u8,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sregs {
    cs: Segment,
    /// ds, es, fs, gs, ss
    data: [Segment; 5],
    tr: Segment,
    ldt: Segment,
    gdt_idt: [u64; 4],
    cr0: u64,
    rest: [u64; 10],
}

const _: () = assert!(size_of::<Regs>() == 0x90 && size_of::<Sregs>() == 0x138 && size_of::<MemoryRegion>() == 0x20);

/// Instructions per second that a guest reaches, or why there is no guest.
///
/// # Errors
/// A text for people.
pub fn measure() -> Result<u64, String> {
    measure_within(DEADLINE)
}

fn measure_within(deadline: Duration) -> Result<u64, String> {
    let shared = Arc::new(Shared::default());
    let (tell, told) = mpsc::channel();
    let for_thread = Arc::clone(&shared);
    let _kick = Kick::install().map_err(|e| format!("cannot prepare a signal: {e}"))?;
    let thread = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            let result = run(&for_thread);
            // Before the memory of the run structure goes away with `Guest`, nobody may look at it any more.
            let _ = tell.send(result);
        })
        .map_err(|e| format!("cannot start a thread: {e}"))?;
    let result = told.recv_timeout(deadline);
    let gave_up = Instant::now();
    while !thread.is_finished() && result.is_err() && gave_up.elapsed() < Duration::from_secs(1) {
        let run_structure = shared.run.load(Ordering::Acquire);
        if !run_structure.is_null() {
            // SAFETY: the mapping is leaked, so it is there as long as this process; the kernel reads this byte at any time.
            unsafe { run_structure.add(RUN_IMMEDIATE_EXIT).write_volatile(1) };
        }
        // SAFETY: the handle is not joined, so the thread id is valid; the signal has a handler that does nothing.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN() + KICK_OFFSET) };
        std::thread::sleep(Duration::from_millis(10));
    }
    let best = shared.best.load(Ordering::Acquire);
    match result {
        Ok(result) => result,
        // One slice was too long; what the ones before it gave is an answer too.
        Err(_) if thread.is_finished() && best > 0 => Ok(best),
        Err(_) if thread.is_finished() => {
            Err(format!("a guest of eight bytes did not end within {} s", deadline.as_secs()))
        }
        Err(_) => Err("a guest of eight bytes hangs and cannot be interrupted".into()),
    }
}

#[derive(Default)]
struct Shared {
    /// The vCPU's run structure, once it exists.
    run: AtomicPtr<u8>,
    /// Best speed so far.
    best: AtomicU64,
}

/// Real-time signals are not used by anything else in this program; this one interrupts KVM_RUN.
const KICK_OFFSET: i32 = 7;

struct Kick(libc::sigaction);

extern "C" fn nothing(_: i32) {}

impl Kick {
    fn install() -> io::Result<Self> {
        // SAFETY: sigaction structures are plain data; the handler does nothing, so it is safe in any context.
        unsafe {
            let mut old: libc::sigaction = std::mem::zeroed();
            let mut new: libc::sigaction = std::mem::zeroed();
            new.sa_sigaction = nothing as *const () as usize;
            if libc::sigaction(libc::SIGRTMIN() + KICK_OFFSET, &new, &mut old) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(old))
        }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // A probe that could not be interrupted may be signalled late: ignoring is the only harmless disposition to leave.
        self.0.sa_sigaction = libc::SIG_IGN;
        // SAFETY: a structure that sigaction itself filled in.
        unsafe { libc::sigaction(libc::SIGRTMIN() + KICK_OFFSET, &self.0, std::ptr::null_mut()) };
    }
}

fn run(shared: &Shared) -> Result<u64, String> {
    let guest = Guest::new()?;
    shared.run.store(guest.run.cast(), Ordering::Release);
    let begin = Instant::now();
    let mut turns = FIRST_SLICE_TURNS;
    loop {
        let nanos = guest.count(turns)?.as_nanos().max(1);
        let speed = u128::from(turns * INSTRUCTIONS_PER_TURN) * 1_000_000_000 / nanos;
        // The best slice counts: a busy host slows single slices down, nothing speeds them up.
        let speed = u64::try_from(speed).unwrap_or(u64::MAX);
        let best = shared.best.fetch_max(speed, Ordering::AcqRel).max(speed);
        if best >= MIN_SPEED || begin.elapsed() >= ENOUGH || turns >= LAST_SLICE_TURNS {
            return Ok(best);
        }
        turns *= 8;
    }
}

struct Guest {
    _kvm: File,
    _vm: OwnedFd,
    vcpu: OwnedFd,
    run: *mut libc::c_void,
}

impl Guest {
    fn new() -> Result<Self, String> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").map_err(|e| {
            if e.kind() == io::ErrorKind::NotFound {
                "/dev/kvm does not exist".into()
            } else {
                format!("/dev/kvm: {e}")
            }
        })?;
        let version = ioctl(&kvm, KVM_GET_API_VERSION, 0).map_err(|e| format!("KVM_GET_API_VERSION: {e}"))?;
        if version != KVM_API_VERSION {
            return Err(format!("KVM speaks API version {version}, not {KVM_API_VERSION}"));
        }
        let vm = owned(ioctl(&kvm, KVM_CREATE_VM, 0).map_err(|e| format!("KVM_CREATE_VM: {e}"))?);
        // Needed on Intel only, and before the first vCPU; others refuse it.
        let _ = ioctl(&vm, KVM_SET_TSS_ADDR, 0xfffb_d000);
        let page = map(PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).map_err(|e| format!("mmap: {e}"))?;
        // SAFETY: a fresh mapping of one page; the code is shorter.
        unsafe { std::ptr::copy_nonoverlapping(CODE.as_ptr(), page.cast(), CODE.len()) };
        let region = MemoryRegion {
            guest_address: CODE_AT,
            size: PAGE as u64,
            host_address: page as u64,
            ..MemoryRegion::default()
        };
        ioctl(&vm, KVM_SET_USER_MEMORY_REGION, &raw const region as u64)
            .map_err(|e| format!("KVM_SET_USER_MEMORY_REGION: {e}"))?;
        let vcpu = owned(ioctl(&vm, KVM_CREATE_VCPU, 0).map_err(|e| format!("KVM_CREATE_VCPU: {e}"))?);
        let size = ioctl(&kvm, KVM_GET_VCPU_MMAP_SIZE, 0).map_err(|e| format!("KVM_GET_VCPU_MMAP_SIZE: {e}"))?;
        let size = usize::try_from(size).unwrap_or(0).max(PAGE);
        // This mapping (and the code page) stay for the life of the process, three pages once per boot: the thread that
        // interrupts may still write to it.
        let run = map(size, libc::MAP_SHARED, vcpu.as_raw_fd()).map_err(|e| format!("mmap of the vCPU: {e}"))?;
        let guest = Self { _kvm: kvm, _vm: vm, vcpu, run };
        guest.enter_protected_mode().map_err(|e| format!("KVM_SET_SREGS: {e}"))?;
        Ok(guest)
    }

    /// Flat 32-bit segments, no paging.
    fn enter_protected_mode(&self) -> io::Result<()> {
        let mut sregs = Sregs::default();
        ioctl(&self.vcpu, KVM_GET_SREGS, &raw mut sregs as u64)?;
        let flat = Segment { limit: u32::MAX, present: 1, db: 1, s: 1, g: 1, ..Segment::default() };
        // Types of the segments: Intel SDM volume 3, table 3-1 (11: code, execute/read, accessed; 3: data, read/write, accessed).
        sregs.cs = Segment { selector: 8, kind: 11, ..flat };
        sregs.data = [Segment { selector: 16, kind: 3, ..flat }; 5];
        sregs.cr0 |= 1;
        ioctl(&self.vcpu, KVM_SET_SREGS, &raw const sregs as u64).map(drop)
    }

    /// Counts down from `turns` and returns how long it took.
    fn count(&self, turns: u64) -> Result<Duration, String> {
        // Bit 1 of the flags is always set (Intel SDM volume 1, 3.4.3).
        let regs = Regs { rcx: turns, rip: CODE_AT, rflags: 2, ..Regs::default() };
        ioctl(&self.vcpu, KVM_SET_REGS, &raw const regs as u64).map_err(|e| format!("KVM_SET_REGS: {e}"))?;
        let begin = Instant::now();
        ioctl(&self.vcpu, KVM_RUN, 0).map_err(|e| format!("KVM_RUN: {e}"))?;
        let took = begin.elapsed();
        // SAFETY: the mapping has at least one page, and the field is aligned.
        let reason = unsafe { self.run.cast::<u8>().add(RUN_EXIT_REASON).cast::<u32>().read_volatile() };
        if reason != KVM_EXIT_HLT {
            return Err(format!("a guest of eight bytes ended with exit reason {reason} instead of a halt"));
        }
        Ok(took)
    }
}

fn ioctl(fd: &impl AsRawFd, request: u64, argument: u64) -> io::Result<i32> {
    // SAFETY: every request above takes no argument, an integer, or a pointer to a live structure of the size it encodes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: KVM_CREATE_VM and KVM_CREATE_VCPU return new descriptors that nobody else owns.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn map(size: usize, flags: i32, fd: i32) -> io::Result<*mut libc::c_void> {
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_an_answer_in_time_whatever_the_host_is() {
        let begin = Instant::now();
        let answer = measure();
        println!("{answer:?} after {:?}", begin.elapsed());
        assert!(begin.elapsed() < DEADLINE + Duration::from_secs(3));
        match answer {
            Ok(speed) => assert!(speed > 1000),
            Err(why) => assert!(!why.is_empty()),
        }
    }

    #[test]
    fn an_impossible_deadline_is_an_error_and_no_hang() {
        let begin = Instant::now();
        // Either the guest cannot be made here, or it did not end in no time at all.
        assert!(measure_within(Duration::ZERO).is_err() || begin.elapsed() < Duration::from_secs(1));
        assert!(begin.elapsed() < Duration::from_secs(5));
    }
}
