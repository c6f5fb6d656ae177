//! The terminal: raw mode that is always undone, its size, and questions without echo.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::termios::{self, LocalFlags, SetArg, Termios};

use crate::error::{CliError, Result};

/// Most bytes of a secret that is read.
const SECRET_LIMIT: u64 = 4096;

/// Changed settings of a terminal. Dropping it puts the old ones back, also when a panic unwinds.
#[derive(Debug)]
pub struct Changed {
    fd: OwnedFd,
    saved: Termios,
}

impl Changed {
    fn new(fd: &impl AsFd, change: impl FnOnce(&mut Termios)) -> io::Result<Self> {
        // A descriptor of its own: standard input may be closed or locked when the settings go back.
        let fd = fd.as_fd().try_clone_to_owned()?;
        let saved = termios::tcgetattr(&fd)?;
        let mut settings = saved.clone();
        change(&mut settings);
        termios::tcsetattr(&fd, SetArg::TCSANOW, &settings)?;
        Ok(Self { fd, saved })
    }
}

impl Drop for Changed {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(&self.fd, SetArg::TCSANOW, &self.saved);
    }
}

/// Standard input in raw mode: every key goes to the program as it is. `None` when it is not a terminal.
pub fn raw() -> io::Result<Option<Changed>> {
    if !io::stdin().is_terminal() {
        return Ok(None);
    }
    Changed::new(&io::stdin(), termios::cfmakeraw).map(Some)
}

nix::ioctl_read_bad!(
    /// tty_ioctl(4), TIOCGWINSZ.
    window_size,
    nix::libc::TIOCGWINSZ,
    nix::libc::winsize
);

/// Columns and rows of the terminal; 80 x 24 when there is none.
pub fn size() -> (u16, u16) {
    let mut size = nix::libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    for fd in [io::stdout().as_raw_fd(), io::stdin().as_raw_fd()] {
        // SAFETY: TIOCGWINSZ writes one winsize, which `size` is; the descriptors are open for the life of the process.
        if unsafe { window_size(fd, &raw mut size) }.is_ok() && size.ws_col > 0 && size.ws_row > 0 {
            return (size.ws_col, size.ws_row);
        }
    }
    (80, 24)
}

/// Reads a secret: one line of standard input, or what a person types without seeing it.
///
/// # Errors
/// Nobody to ask, Ctrl-C, or an empty answer.
pub fn secret(prompt: &str, from_stdin: bool) -> Result<String> {
    let text = if from_stdin { from_pipe()? } else { ask(prompt)? };
    if text.is_empty() {
        return Err(CliError::new("the password is empty", "give one"));
    }
    Ok(text)
}

fn from_pipe() -> Result<String> {
    let mut text = String::new();
    io::stdin().take(SECRET_LIMIT).read_to_string(&mut text).map_err(|e| {
        CliError::new(format!("cannot read the password from standard input: {e}"), "pipe it as UTF-8 text")
    })?;
    Ok(text.trim_end_matches(['\n', '\r']).to_string())
}

fn ask(prompt: &str) -> Result<String> {
    if !io::stdin().is_terminal() {
        return Err(CliError::usage(
            "a password is needed and there is no terminal to ask on",
            "pipe it and give --password-stdin",
        ));
    }
    let broken = |e: &io::Error| CliError::new(format!("cannot read from the terminal: {e}"), "use --password-stdin");
    // Signals are off too, so that Ctrl-C comes as a byte and the echo is put back before we end.
    let quiet = Changed::new(&io::stdin(), |t| {
        t.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG | LocalFlags::ICANON);
    })
    .map_err(|e| broken(&e))?;
    let _ = write!(io::stderr(), "{prompt}: ");
    let mut text = Vec::new();
    let mut byte = [0u8];
    let result = loop {
        match io::stdin().lock().read(&mut byte) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Err(broken(&e)),
            Ok(0) => break Ok(()),
            Ok(_) => match byte[0] {
                b'\n' | b'\r' | 4 => break Ok(()),
                3 => break Err(CliError::silent(130)),
                8 | 127 => drop(text.pop()),
                21 => text.clear(),
                _ if text.len() as u64 >= SECRET_LIMIT => break Err(CliError::new("the password is too long", "")),
                other => text.push(other),
            },
        }
    };
    drop(quiet);
    let _ = writeln!(io::stderr());
    result?;
    String::from_utf8(text)
        .map_err(|_| CliError::new("the password is not UTF-8 text", "check the terminal's settings"))
}
