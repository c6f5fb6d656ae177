//! The one public error: what a user sees as an RFC 9457 problem document.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::explain::Explanation;
use crate::validate::{Problem, Problems};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:literal, $title:literal;)*) => {
        /// Stable error codes. A code never changes its meaning.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum Code { $($(#[$doc])* #[serde(rename = $text)] $name,)* }
        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];
            /// The text on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
            /// The HTTP status that goes with it (RFC 9110).
            #[must_use]
            pub const fn status(self) -> u16 { match self { $(Self::$name => $status,)* } }
            /// Short human summary, the same for every occurrence.
            #[must_use]
            pub const fn title(self) -> &'static str { match self { $(Self::$name => $title,)* } }
        }
    };
}

codes! {
    /// A field has a value that is not allowed; `errors` names each.
    Invalid = "invalid", 422, "A field is not valid";
    /// The body is not the JSON that is expected.
    Malformed = "malformed", 400, "The request cannot be read";
    /// No such object, or none that the caller may see.
    NotFound = "not_found", 404, "Not found";
    /// The name is taken.
    NameTaken = "name_taken", 409, "The name is taken";
    /// Somebody else changed the object since it was read.
    Conflict = "conflict", 409, "The object has changed";
    /// `If-Match` did not match.
    PreconditionFailed = "precondition_failed", 412, "The object has changed since the given revision";
    /// The object is used by another one.
    InUse = "in_use", 409, "The object is in use";
    /// The action does not fit the state of the object.
    WrongState = "wrong_state", 409, "Not possible in this state";
    /// No node fits.
    DoesNotFit = "does_not_fit", 409, "No node fits";
    /// An instance with `ha` has a disk that no other node could open.
    HaNeedsSharedDisks = "ha_needs_shared_disks", 422, "Another node could not open its disks";
    /// No free address left in the subnet.
    AddressesExhausted = "addresses_exhausted", 409, "No free address";
    /// A limit of the project is reached.
    QuotaExceeded = "quota_exceeded", 409, "Quota exceeded";
    /// The same idempotency key was used for another request.
    IdempotencyMismatch = "idempotency_mismatch", 422, "The idempotency key was used for another request";
    /// No or wrong credentials.
    Unauthenticated = "unauthenticated", 401, "Log in first";
    /// The caller may not do this.
    Forbidden = "forbidden", 403, "Not allowed";
    /// The node whose certificate the caller has was removed from the cloud.
    NodeRemoved = "node_removed", 403, "The node was removed";
    /// The join token is not known: mistyped, deleted or of another cloud.
    JoinTokenUnknown = "join_token_unknown", 403, "The join token is not known";
    /// The join token has expired.
    JoinTokenExpired = "join_token_expired", 403, "The join token has expired";
    /// A machine has joined with the token already.
    JoinTokenUsed = "join_token_used", 403, "The join token is used up";
    /// Too many requests.
    RateLimited = "rate_limited", 429, "Too many requests";
    /// The body or page is larger than allowed.
    TooLarge = "too_large", 413, "Too large";
    /// The node or driver cannot do it; the detail says why.
    Unsupported = "unsupported", 501, "Not supported here";
    /// The node that is needed cannot be reached now.
    NodeUnreachable = "node_unreachable", 503, "The node cannot be reached";
    /// Temporarily not able to answer.
    Unavailable = "unavailable", 503, "Temporarily unavailable";
    /// The revision asked for is not kept any more; list again.
    Compacted = "compacted", 410, "The revision is too old";
    /// The disk under the control plane is full.
    StorageFull = "storage_full", 507, "No space left";
    /// A defect in Oblak; the log has more under the request id.
    Internal = "internal", 500, "Internal error";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A problem document (RFC 9457, `application/problem+json`). `detail` is the outside message; `inside` goes to the log only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{detail}")]
pub struct ApiError {
    /// `about:blank#<code>`: the code as a URI reference.
    #[serde(rename = "type", default)]
    pub type_uri: String,
    /// Summary of the code.
    #[serde(default)]
    pub title: String,
    /// HTTP status.
    #[serde(default)]
    pub status: u16,
    /// Stable code.
    pub code: Code,
    /// What happened and what the caller can do.
    pub detail: String,
    /// JSON pointer (RFC 6901) to the field at fault, for example `/spec/flavor`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// Every field at fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<Problem>,
    /// For `does_not_fit`: what ruled out how many nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub explanation: Option<Explanation>,
    /// Id of the request, also in the server's log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// For the log, never sent.
    #[serde(skip)]
    #[schemars(skip)]
    pub inside: Option<String>,
}

impl ApiError {
    /// An error with a code and what the caller can do.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            type_uri: format!("about:blank#{code}"),
            title: code.title().into(),
            status: code.status(),
            code,
            detail: detail.into(),
            field: None,
            errors: Vec::new(),
            explanation: None,
            request_id: None,
            inside: None,
        }
    }
    /// A field that is not valid.
    pub fn invalid(field: &str, detail: impl Into<String>) -> Self {
        let mut problems = Problems::new();
        problems.add(field, detail);
        Self::from_problems(problems)
    }
    /// All fields that are not valid. `problems` must not be empty.
    #[must_use]
    pub fn from_problems(problems: Problems) -> Self {
        let errors = problems.into_vec();
        let first = errors.first().cloned().unwrap_or_default();
        let more = if errors.len() > 1 { format!(" (and {} more)", errors.len() - 1) } else { String::new() };
        let mut error = Self::new(Code::Invalid, format!("{}: {}{more}", first.field, first.detail));
        error.field = Some(first.field);
        error.errors = errors;
        error
    }
    /// No such object.
    pub fn not_found(kind: &str, name: &str) -> Self {
        Self::new(Code::NotFound, format!("{kind} {name:?} does not exist"))
    }
    /// Points at a field.
    #[must_use]
    pub fn at(mut self, field: &str) -> Self {
        self.field = Some(field.into());
        self
    }
    /// Adds what only the log may know.
    #[must_use]
    pub fn inside(mut self, text: impl Into<String>) -> Self {
        self.inside = Some(text.into());
        self
    }
    /// A defect: the caller learns that it is ours, the log learns what.
    pub fn internal(inside: impl Into<String>) -> Self {
        Self::new(Code::Internal, "something went wrong inside Oblak; the server's log has more under the request id")
            .inside(inside)
    }
}
