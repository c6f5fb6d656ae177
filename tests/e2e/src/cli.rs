//! Running the command line as a user does.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a command printed and how it ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// The command, for messages.
    pub command: String,
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ran {
    /// Standard output of a command that must succeed.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "{} ended with {}:\n{}{}", self.command, self.code, self.out, self.err);
        self.out
    }

    /// Standard error of a command that must fail.
    ///
    /// # Panics
    /// When it succeeded, or when what it says looks like a defect.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(self.code != 0, "{} succeeded:\n{}", self.command, self.out);
        assert!(!self.err.contains("panicked"), "{}: {}", self.command, self.err);
        assert!(!self.err.trim().is_empty(), "{} failed with {} and no word", self.command, self.code);
        self.err
    }
}

/// A command that goes on while the test looks at what it prints.
pub struct Running {
    child: Child,
    command: String,
    out: Arc<Mutex<Vec<u8>>>,
    err: Arc<Mutex<Vec<u8>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
}

impl Running {
    /// Starts it without a terminal.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(mut command: Command) -> Self {
        let text = describe(&command);
        let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|e| panic!("{text}: {e}"));
        let (out, err) = (Arc::default(), Arc::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, &out));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, &err));
        }
        Self { child, command: text, out, err, readers }
    }

    /// What it has printed so far.
    #[must_use]
    pub fn out(&self) -> String {
        text(&self.out)
    }

    /// Waits until it has printed `wanted`.
    ///
    /// # Panics
    /// When it does not in time.
    #[track_caller]
    pub fn expect(&self, wanted: &str, deadline: Duration) -> String {
        let found = crate::wait::eventually(deadline, || Some(self.out()).filter(|o| o.contains(wanted)));
        found.unwrap_or_else(|| panic!("{}: no {wanted:?} in\n{}\n{}", self.command, self.out(), text(&self.err)))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    #[track_caller]
    pub fn wait(mut self, deadline: Duration) -> Ran {
        let end = Instant::now() + deadline;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our own child can be waited for") {
                break status;
            }
            if Instant::now() >= end {
                let (out, err) = (self.out(), text(&self.err));
                let _ = self.child.kill();
                panic!("{}: not over after {} s:\n{out}{err}", self.command, deadline.as_secs());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        // A grandchild may hold the pipe open; what has been printed by the command itself is there by now.
        for reader in self.readers.drain(..) {
            let _ = crate::wait::eventually(Duration::from_secs(2), || reader.is_finished().then_some(()));
        }
        Ran { command: self.command.clone(), code: code(status), out: self.out(), err: text(&self.err) }
    }

    /// Ends it as ^C does and waits.
    pub fn interrupt(self) -> Ran {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT);
        self.wait(Duration::from_secs(10))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut pipe: impl Read + Send + 'static, into: &Arc<Mutex<Vec<u8>>>) -> std::thread::JoinHandle<()> {
    let into = into.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 8192];
        while let Ok(n) = pipe.read(&mut buffer) {
            if n == 0 {
                break;
            }
            into.lock().expect("no reader panics").extend_from_slice(&buffer[..n]);
        }
    })
}

fn text(bytes: &Arc<Mutex<Vec<u8>>>) -> String {
    String::from_utf8_lossy(&bytes.lock().expect("no reader panics")).into_owned()
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

pub(crate) fn describe(command: &Command) -> String {
    let program = command.get_program().to_string_lossy();
    let name = program.rsplit('/').next().unwrap_or(&program).to_string();
    let words = command.get_args().map(|a| a.to_string_lossy().into_owned());
    std::iter::once(name).chain(words).collect::<Vec<_>>().join(" ")
}
