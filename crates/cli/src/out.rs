//! Where output goes and how it looks: data to standard output, notices to standard error.

use std::io::{self, IsTerminal, Write};

use oblak_model::{Kind, List, Object};
use serde::Serialize;

use crate::args::{Format, Global};
use crate::error::{CliError, Result};

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Out {
    /// What `-o` said.
    pub format: Option<Format>,
    /// Colours on standard output.
    pub color: bool,
    /// Colours on standard error.
    pub color_errors: bool,
    /// No notices.
    pub quiet: bool,
}

impl Out {
    /// From flags, environment (<https://no-color.org>) and where the output goes.
    pub fn new(global: &Global) -> Self {
        let off = global.no_color
            || std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty())
            || std::env::var_os("TERM").is_some_and(|t| t == "dumb");
        Self {
            format: global.output,
            color: !off && io::stdout().is_terminal(),
            color_errors: !off && io::stderr().is_terminal(),
            quiet: global.quiet,
        }
    }

    /// Whether more columns are wanted.
    pub fn wide(&self) -> bool {
        self.format == Some(Format::Wide)
    }

    /// Whether the API's own shapes are wanted.
    pub fn machine(&self) -> bool {
        matches!(self.format, Some(Format::Json | Format::Yaml))
    }

    /// Writes data.
    pub fn data(&self, text: &str) -> Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| CliError::output(&e))
    }

    /// Writes a value as JSON or YAML.
    pub fn value(&self, value: &impl Serialize) -> Result<()> {
        self.data(&self.text_of(value)?)
    }

    fn text_of(&self, value: &impl Serialize) -> Result<String> {
        let bad =
            |e: &dyn std::fmt::Display| CliError::new(format!("the answer cannot be written: {e}"), "try -o json");
        if self.format == Some(Format::Yaml) {
            return serde_norway::to_string(value).map_err(|e| bad(&e));
        }
        serde_json::to_string_pretty(value).map(|t| t + "\n").map_err(|e| bad(&e))
    }

    /// Writes an object in the form of the API.
    pub fn object<K: Kind>(&self, object: &Object<K>) -> Result<()> {
        self.value(object)
    }

    /// Writes a list in the form of the API.
    pub fn list<K: Kind>(&self, list: &List<K>) -> Result<()> {
        self.value(list)
    }

    /// Writes an object when `-o json` or `-o yaml` asked for it; otherwise says `text` as a notice.
    pub fn done<K: Kind>(&self, object: &Object<K>, text: &str) -> Result<()> {
        if self.machine() {
            return self.object(object);
        }
        self.note(text);
        Ok(())
    }

    /// Says something to the person. Lost when nobody can hear it.
    pub fn note(&self, text: &str) {
        if !self.quiet && !text.is_empty() {
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// Prints an error.
    pub fn error(&self, error: &CliError) {
        let _ = io::stderr().lock().write_all(error.render(self.color_errors).as_bytes());
    }
}
