//! What went wrong, what to do about it, and the exit code that says so.

use std::io;

use oblak_client::ClientError;
use oblak_model::{ApiError, Code, Problem};

use crate::field;

/// General failure.
pub const FAILED: u8 = 1;
/// Wrong usage.
pub const USAGE: u8 = 2;
/// No such object.
pub const NOT_FOUND: u8 = 3;
/// No node fits.
pub const DOES_NOT_FIT: u8 = 4;
/// Not done in time.
pub const TIMEOUT: u8 = 5;
/// The reader of the output went away: 128 + SIGPIPE, as the shell counts it.
pub const BROKEN_PIPE: u8 = 141;

/// Why a command failed.
#[derive(Clone, Debug, PartialEq)]
pub struct CliError {
    /// What happened. Nothing is printed when empty.
    pub message: String,
    /// What to do, one line.
    pub hint: String,
    /// Fields at fault.
    pub problems: Vec<Problem>,
    /// Exit code.
    pub code: u8,
    /// Code of the API's problem, if it was the API that refused.
    pub api: Option<Code>,
}

/// Result of commands.
pub type Result<T, E = CliError> = std::result::Result<T, E>;

impl CliError {
    /// A failure and what to do about it.
    pub fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into(), problems: Vec::new(), code: FAILED, api: None }
    }

    /// The command was called in a way that makes no sense.
    pub fn usage(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code: USAGE, ..Self::new(message, hint) }
    }

    /// Ends with a code and says nothing more.
    pub fn silent(code: u8) -> Self {
        Self { code, ..Self::new("", "") }
    }

    /// With another exit code.
    #[must_use]
    pub fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// With another hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// A file could not be read or written.
    pub fn file(path: &std::path::Path, what: &str, error: &io::Error) -> Self {
        let hint = match error.kind() {
            io::ErrorKind::NotFound => "check the path",
            io::ErrorKind::PermissionDenied => "check who may read and write it",
            io::ErrorKind::StorageFull => "make room on the disk",
            _ => "check the file and try again",
        };
        Self::new(format!("cannot {what} {}: {error}", path.display()), hint)
    }

    /// Standard output could not be written.
    pub fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Self::silent(BROKEN_PIPE);
        }
        Self::new(format!("cannot write the output: {error}"), "check where it goes")
    }

    /// The same with fields named as people know them: by the flags of the command, or by their path in a file.
    pub fn in_words(mut self, flags: &[String]) -> Self {
        if self.api.is_some() || !self.problems.is_empty() {
            self.message = field::in_words(&self.message, flags);
            self.hint = field::in_words(&self.hint, flags);
            for problem in &mut self.problems {
                problem.field = field::in_words(&problem.field, flags);
                problem.detail = field::in_words(&problem.detail, flags);
            }
        }
        self
    }

    /// The text for standard error.
    pub fn render(&self, color: bool) -> String {
        if self.message.is_empty() {
            return String::new();
        }
        let words = self.clone().in_words(&[]);
        words.rendered(color)
    }

    fn rendered(&self, color: bool) -> String {
        let (red, bold, off) = if color { ("\x1b[31m", "\x1b[1m", "\x1b[0m") } else { ("", "", "") };
        let mut text = format!("{red}{bold}error:{off} {}\n", self.message.trim_end());
        for problem in &self.problems {
            text.push_str(&format!("  {}: {}\n", problem.field, problem.detail));
        }
        if !self.hint.is_empty() {
            text.push_str(&format!("hint: {}\n", self.hint));
        }
        text
    }
}

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Api(problem) => Self::from(*problem),
            ClientError::Unreachable { .. } => {
                Self::new(message, "start the cloud with `oblak up`, or name another with --context or --server")
            }
            ClientError::Timeout { .. } => {
                Self::new(message, "try again; the log of the server says what it is busy with").with_code(TIMEOUT)
            }
            ClientError::Config(_) => {
                Self::new(message, "check --server, OBLAK_CA and OBLAK_TOKEN, or log in again with `oblak login`")
            }
            ClientError::Answer(_) => {
                Self::new(message, "try again; `oblak version` shows whether client and server fit")
            }
        }
    }
}

impl From<ApiError> for CliError {
    fn from(error: ApiError) -> Self {
        let mut message = without_pointer(&error).to_string();
        if let Some(explanation) = error.explanation.as_ref().filter(|e| !message.contains(&e.to_string())) {
            message = format!("{message}: {explanation}");
        }
        if let (Code::Internal, Some(id)) = (error.code, &error.request_id) {
            message = format!("{message} {id}");
        }
        let code = match error.code {
            Code::NotFound => NOT_FOUND,
            Code::DoesNotFit => DOES_NOT_FIT,
            _ => FAILED,
        };
        let problems = if error.errors.len() > 1 { error.errors.clone() } else { Vec::new() };
        if error.errors.len() > 1 {
            message = format!("{} fields are not valid", error.errors.len());
        }
        Self { message, hint: hint(&error), problems, code, api: Some(error.code) }
    }
}

/// People gave names, not fields: where the text names what is missing, the pointer before it says nothing more.
fn without_pointer(error: &ApiError) -> &str {
    let rest = error.field.as_ref().and_then(|field| error.detail.strip_prefix(field)?.strip_prefix(": "));
    rest.filter(|rest| rest.contains("\" does not exist")).unwrap_or(&error.detail)
}

fn hint(error: &ApiError) -> String {
    let text = match error.code {
        Code::TooLarge => "make it smaller, or split it",
        Code::Invalid | Code::Malformed => match &error.field {
            Some(field) if error.errors.len() <= 1 => return format!("correct {field} and try again"),
            _ => "correct what is named and try again",
        },
        Code::NotFound => "check the name, and the project with -p",
        Code::NameTaken => "or delete the one that has it: `oblak delete KIND/NAME`",
        Code::Conflict | Code::PreconditionFailed | Code::IdempotencyMismatch | Code::Compacted => "try again",
        Code::InUse => "remove what uses it first",
        Code::WrongState => "`oblak list` shows the state; try again when it is another",
        Code::DoesNotFit => "ask for less, or make room: `oblak node list -o wide` shows what is free",
        Code::AddressesExhausted => "delete instances, or make another subnet with `oblak subnet create`",
        Code::QuotaExceeded => "delete something, or ask an administrator for more",
        Code::Unauthenticated if std::env::var_os("OBLAK_TOKEN").is_some_and(|v| !v.is_empty()) => {
            "the token in OBLAK_TOKEN was sent: correct it, or unset it to use the one of the context"
        }
        Code::Unauthenticated => "log in with `oblak login --server URL`, or run `oblak up` again on the server",
        Code::Forbidden => "`oblak whoami` shows your roles; an admin of the project can give you another",
        Code::NodeRemoved | Code::JoinTokenUnknown | Code::JoinTokenExpired | Code::JoinTokenUsed => {
            "make a token with `oblak join-token create` and run `oblak join` on the machine"
        }
        Code::RateLimited | Code::Unavailable => "try again in a moment",
        Code::Unsupported => "`oblak node list` shows which nodes can do what",
        Code::NodeUnreachable => "`oblak node list` shows the nodes; start the agent on the one that is down",
        Code::StorageFull => "make room on the disk that holds the server's data",
        Code::HaNeedsSharedDisks => "add --ephemeral, or --pool NAME for a root disk that other nodes can open",
        Code::Internal => "look for that id in the log of the server",
    };
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::Problems;

    #[test]
    fn says_what_and_what_to_do() {
        let error = CliError::from(ApiError::not_found("image", "tyni"));
        assert_eq!(
            error.render(false),
            "error: image \"tyni\" does not exist\nhint: check the name, and the project with -p\n"
        );
        assert_eq!(error.code, NOT_FOUND);
    }

    #[test]
    fn what_is_missing_is_said_without_the_path_of_the_field() {
        let error = CliError::from(ApiError::invalid("/spec/flavor", "flavor \"huge\" does not exist"));
        assert_eq!(error.message, "flavor \"huge\" does not exist");
        let error = CliError::from(ApiError::invalid("/spec/publish/0", "needs an interface"));
        assert_eq!(error.message, "/spec/publish/0: needs an interface");
    }

    #[test]
    fn lists_every_field_at_fault() {
        let mut problems = Problems::new();
        problems.add("/spec/a", "is wrong");
        problems.add("/spec/b", "is wrong too");
        let error = CliError::from(ApiError::from_problems(problems));
        assert_eq!(
            error.render(false),
            "error: 2 fields are not valid\n  spec.a: is wrong\n  spec.b: is wrong too\nhint: correct what is named and try again\n"
        );
    }

    #[test]
    fn an_unreachable_server_says_how_to_start_it() {
        let error = CliError::from(ClientError::Unreachable { server: "https://x".into(), reason: "refused".into() });
        assert!(error.hint.contains("oblak up"), "{}", error.hint);
        assert_eq!(CliError::output(&io::ErrorKind::BrokenPipe.into()).render(true), "");
    }
}
