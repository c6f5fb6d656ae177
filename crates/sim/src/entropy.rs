//! The randomness that libraries take from the operating system behind our back: the order of hash maps, the turns of `select!`, who of several waiters
//! is woken first. In a program of the simulator it comes from the seed.
//!
//! Such a program defines getrandom(2) itself with [`crate::seeded_entropy`] and calls [`seed`] first of all. The macro must stand in no library and in no
//! product: it would take the randomness of keys away.

use std::sync::atomic::{AtomicU64, Ordering};

static STATE: AtomicU64 = AtomicU64::new(0);

/// Sets the seed; not 0. Until then the operating system answers.
pub fn seed(seed: u64) {
    STATE.store(seed | 1 << 63, Ordering::SeqCst);
}

/// The next 64 bits; none before [`seed`].
#[doc(hidden)]
#[must_use]
pub fn next() -> Option<u64> {
    if STATE.load(Ordering::SeqCst) == 0 {
        return None;
    }
    let state = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::SeqCst);
    let mut z = state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Some(z ^ (z >> 31))
}

/// Defines `getrandom` for a whole program: the linker prefers it to the one of the C library.
#[macro_export]
macro_rules! seeded_entropy {
    () => {
        /// getrandom(2) of this program.
        ///
        /// # Safety
        /// As the system call: `buffer` has room for `length` bytes.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
            let mut filled = 0;
            while filled < length {
                let Some(bits) = $crate::entropy::next() else {
                    // SAFETY: the caller's buffer, passed on as it is.
                    return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) } as isize;
                };
                for byte in bits.to_le_bytes().into_iter().take(length - filled) {
                    // SAFETY: `filled` is below `length`, for which the caller vouches.
                    unsafe { buffer.add(filled).write(byte) };
                    filled += 1;
                }
            }
            length as isize
        }
    };
}
