//! What a failed call to etcd means: whether it can have had an effect, and who can help.
//!
//! Codes are those of gRPC (grpc.io, "status codes"), texts those of etcd (`api/v3rpc/rpctypes/error.go`).

use std::time::Duration;

use oblak_store::StoreError;

/// The kinds of failure that are treated differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was certainly not carried out; another server, or the same one later, may do it.
    NotSent,
    /// Nobody knows whether it was carried out.
    Lost,
    /// The revision asked for is gone.
    Compacted,
    /// The revision asked for has not happened.
    Future,
    /// The lease does not exist.
    NoLease,
    /// The quota is exceeded; nothing was written.
    Full,
    /// Anything that stays refused until somebody changes something; nothing was written.
    Refused,
}

/// A failed call.
#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: Kind,
    pub detail: String,
}

const UNKNOWN: i32 = 2;
const INVALID_ARGUMENT: i32 = 3;
const NOT_FOUND: i32 = 5;
const PERMISSION_DENIED: i32 = 7;
const RESOURCE_EXHAUSTED: i32 = 8;
const FAILED_PRECONDITION: i32 = 9;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const UNAVAILABLE: i32 = 14;
const DATA_LOSS: i32 = 15;
const UNAUTHENTICATED: i32 = 16;

impl Failure {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    pub fn timeout(url: &str, after: Duration) -> Self {
        Self::new(Kind::Lost, format!("{url} did not answer within {} ms", after.as_millis()))
    }

    /// Judges an error of the client library.
    pub fn from_client(url: &str, error: &etcd_client::Error) -> Self {
        use etcd_client::Error;
        let (kind, text) = match error {
            Error::GRpcStatus(status) => {
                let chain = chain(status);
                (of_status(status.code() as i32, status.message(), &chain), words(status.message(), status))
            }
            Error::LeaseKeepAliveError(text) if text == "lease not found" => (Kind::NoLease, text.clone()),
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                (Kind::Refused, error.to_string())
            }
            Error::TransportError(source) => (Kind::NotSent, words("cannot connect", source)),
            _ => (Kind::Lost, error.to_string()),
        };
        Self::new(kind, format!("{url}: {text}"))
    }

    /// Whether asking again, perhaps elsewhere, makes sense.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind, Kind::NotSent | Kind::Lost)
    }

    /// For callers to whom the special kinds mean nothing special.
    pub fn into_store_error(self) -> StoreError {
        let detail = self.detail;
        match self.kind {
            Kind::NotSent | Kind::Lost => StoreError::Unreachable { detail },
            Kind::Full => StoreError::Quota { detail },
            Kind::Compacted | Kind::Future | Kind::NoLease | Kind::Refused => StoreError::Refused { detail },
        }
    }
}

/// What rustls says of certificates that we or the server do not accept: asking again does not help.
const TLS: &[&str] = &["invalid peer certificate", "received fatal alert"];

/// The error and what it came from: whether a connection was made at all is only said by the source.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

/// What happened, and the deepest reason for it.
fn words(what: &str, error: &dyn std::error::Error) -> String {
    let mut deepest = error.source();
    while let Some(source) = deepest.and_then(std::error::Error::source) {
        deepest = Some(source);
    }
    match deepest.map(ToString::to_string) {
        Some(reason) if reason != what => format!("{what}: {reason}"),
        _ => what.to_owned(),
    }
}

fn of_status(code: i32, message: &str, chain: &str) -> Kind {
    match code {
        OUT_OF_RANGE if message.contains("has been compacted") => Kind::Compacted,
        OUT_OF_RANGE if message.contains("future revision") => Kind::Future,
        NOT_FOUND if message.contains("lease not found") => Kind::NoLease,
        RESOURCE_EXHAUSTED if message.contains("space exceeded") => Kind::Full,
        // Said before anything is proposed.
        RESOURCE_EXHAUSTED if message.contains("too many requests") => Kind::NotSent,
        UNAVAILABLE if message == "etcdserver: no leader" => Kind::NotSent,
        // A voter has to be asked.
        UNAVAILABLE if message == "etcdserver: rpc not supported for learner" => Kind::NotSent,
        INVALID_ARGUMENT if message.contains("revision of auth store is old") => Kind::NotSent,
        UNAVAILABLE | UNKNOWN if TLS.iter().any(|words| chain.contains(words)) => Kind::Refused,
        UNAVAILABLE | UNKNOWN if chain.contains("tcp connect error") || chain.contains("dns error") => Kind::NotSent,
        INVALID_ARGUMENT | PERMISSION_DENIED | RESOURCE_EXHAUSTED | FAILED_PRECONDITION | OUT_OF_RANGE
        | UNIMPLEMENTED | DATA_LOSS | UNAUTHENTICATED | NOT_FOUND => Kind::Refused,
        _ => Kind::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_have_happened_is_called_not_sent() {
        let kind = |code, message: &str| of_status(code, message, message);
        assert_eq!(kind(UNAVAILABLE, "etcdserver: no leader"), Kind::NotSent);
        assert_eq!(kind(UNAVAILABLE, "error trying to connect: tcp connect error: refused"), Kind::NotSent);
        for lost in ["etcdserver: leader changed", "etcdserver: request timed out", "broken pipe", ""] {
            assert_eq!(kind(UNAVAILABLE, lost), Kind::Lost, "{lost}");
        }
        assert_eq!(kind(4, "deadline"), Kind::Lost);
        assert_eq!(kind(RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded"), Kind::Full);
        assert_eq!(kind(OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted"), Kind::Compacted);
        assert_eq!(kind(NOT_FOUND, "etcdserver: requested lease not found"), Kind::NoLease);
        assert_eq!(kind(PERMISSION_DENIED, "etcdserver: permission denied"), Kind::Refused);
    }
}
