//! A terminal for commands that want one.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A command on a terminal of its own.
pub struct Terminal {
    child: Child,
    master: File,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts a command on a new terminal of 80 columns and 24 rows.
    ///
    /// # Panics
    /// When there is no terminal to be had or the command cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let size = libc::winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(Some(&size), None).expect("a terminal");
        let slave = File::from(pty.slave);
        let end = || Stdio::from(slave.try_clone().expect("a descriptor"));
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: both calls are async-signal-safe and take no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", crate::cli::describe(&command)));
        let master = File::from(pty.master);
        let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let (into, mut from) = (seen.clone(), master.try_clone().expect("a descriptor"));
        // Ends with EIO when the last process closes the terminal.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                into.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
            }
        });
        Self { child, master, seen }
    }

    /// Everything on the screen so far.
    #[must_use]
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().expect("no reader panics")).into_owned()
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn send(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Waits until `wanted` is on the screen.
    ///
    /// # Panics
    /// When it does not come in time.
    #[track_caller]
    pub fn expect(&self, wanted: &str, deadline: Duration) {
        let found = crate::wait::eventually(deadline, || self.seen().contains(wanted).then_some(()));
        assert!(found.is_some(), "no {wanted:?} on the terminal within {} s:\n{}", deadline.as_secs(), self.seen());
    }

    /// Changes the size, as a user does by pulling the window's corner.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn resize(&self, columns: u16, rows: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the descriptor is open and the structure lives during the call.
        let done = unsafe { libc::ioctl(self.master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        assert_eq!(done, 0, "the terminal takes a size");
    }

    /// Waits for the end of the command and returns its exit code.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> i32 {
        let ended = crate::wait::eventually(deadline, || self.child.try_wait().ok().flatten());
        let status = ended.unwrap_or_else(|| panic!("the command does not end:\n{}", self.seen()));
        status.code().unwrap_or(-1)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
