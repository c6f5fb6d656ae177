//! What a fake guest does.

use std::time::Duration;

use oblak_model::Span;
use oblak_platform::driver::{DriverError, Remedy};

use crate::GuestSpec;

/// A call that can be made to hang.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// `ensure`
    Ensure,
    /// `observe`
    Observe,
    /// `stop`
    Stop,
    /// `remove`
    Remove,
}

/// The script of one guest.
#[derive(Clone, Debug)]
pub struct Script {
    /// Time in `Starting`.
    pub start_delay: Duration,
    /// How many calls of `ensure` fail before one works.
    pub fail_starts: u32,
    /// With what they fail.
    pub failure: DriverError,
    /// After this time it ends by itself; none: it runs until stopped.
    pub run_for: Option<Duration>,
    /// Its exit code when it ends by itself.
    pub exit_code: i32,
    /// How long it takes to end when asked.
    pub stop_delay: Duration,
    /// Ends by force only.
    pub ignore_stop: bool,
    /// After this time it vanishes (`ShimLost`).
    pub lost_after: Option<Duration>,
    /// Calls that never return.
    pub hang: Vec<Op>,
    /// Printed on the console at the start.
    pub output: String,
}

impl Default for Script {
    fn default() -> Self {
        Self {
            start_delay: Duration::ZERO,
            fail_starts: 0,
            failure: DriverError::retry("fake", "the fake driver was told to fail"),
            run_for: None,
            exit_code: 0,
            stop_delay: Duration::ZERO,
            ignore_stop: false,
            lost_after: None,
            hang: Vec::new(),
            output: String::new(),
        }
    }
}

impl Script {
    /// What the spec itself asks for; none when it says nothing.
    ///
    /// # Errors
    /// Permanent, naming the word that is not understood.
    pub fn from_spec(spec: &GuestSpec) -> Result<Option<Self>, DriverError> {
        let options = &spec.container;
        if let Some(text) = options.env.get("OBLAK_FAKE") {
            return Self::parse(text.split(' ').filter(|w| !w.is_empty())).map(Some);
        }
        match options.argv.split_first() {
            Some((program, words)) if program == "fake" => Self::parse(words.iter().map(String::as_str)).map(Some),
            _ => Ok(None),
        }
    }

    fn parse<'a>(words: impl Iterator<Item = &'a str>) -> Result<Self, DriverError> {
        let mut script = Self::default();
        for word in words {
            script.apply(word).ok_or_else(|| {
                DriverError::permanent("bad_script", format!("the fake driver does not know {word:?}"))
            })?;
        }
        Ok(script)
    }

    fn apply(&mut self, word: &str) -> Option<()> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let time = || value.parse::<Span>().ok().map(|s| s.0);
        match name {
            "start_delay" => self.start_delay = time()?,
            "run_for" => self.run_for = Some(time()?),
            "stop_delay" => self.stop_delay = time()?,
            "lost_after" => self.lost_after = Some(time()?),
            "exit" => self.exit_code = value.parse().ok()?,
            "ignore_stop" => self.ignore_stop = true,
            "output" => self.output = value.to_string(),
            "hang" => self.hang.push(match value {
                "ensure" => Op::Ensure,
                "observe" => Op::Observe,
                "stop" => Op::Stop,
                "remove" => Op::Remove,
                _ => return None,
            }),
            "fail" => {
                let (times, remedy) = value.split_once(':').unwrap_or((value, "retry"));
                self.fail_starts = times.parse().ok()?;
                self.failure.remedy = match remedy {
                    "retry" => Remedy::Retry,
                    "permanent" => Remedy::Permanent,
                    "gone" => Remedy::Gone,
                    "unsupported" => Remedy::Unsupported,
                    _ => return None,
                };
            }
            _ => return None,
        }
        Some(())
    }
}
