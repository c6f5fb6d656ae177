//! Errors: what leaves the server is always a problem document (RFC 9457).

use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use oblak_identity::PasswordError;
use oblak_identity::pki::PkiError;
use oblak_model::{ApiError, Code};
use oblak_store::StoreError;

/// Why the server cannot start or run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address is taken or not ours.
    #[error("cannot listen on {address}: {reason}; choose another address with --listen")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// Why, in the words of the system.
        reason: std::io::Error,
    },
    /// Keys and certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// TLS does not take the certificates.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// First objects cannot be made.
    #[error("cannot make the first objects: {0}")]
    Bootstrap(#[from] ApiError),
}

/// An error on its way out. The outermost layer writes it, with the id of the request.
#[derive(Clone, Debug)]
pub(crate) struct Fault(pub Box<ApiError>);

pub(crate) type Answer = Result<Response, Fault>;

impl From<ApiError> for Fault {
    fn from(error: ApiError) -> Self {
        Self(Box::new(error))
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        store_error(&error).into()
    }
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// A store error in outside words.
pub(crate) fn store_error(error: &StoreError) -> ApiError {
    let text = error.to_string();
    match error {
        StoreError::TooLarge { .. } => ApiError::new(Code::TooLarge, text),
        // While the disk is full the file may not even open again; then the cause is only in the words of the system.
        StoreError::Quota { .. } => ApiError::new(
            Code::StorageFull,
            "the store of the control plane is full; an administrator must free some space",
        )
        .inside(text),
        StoreError::DiskFull { .. } | StoreError::Io { .. } if is_full(error, &text) => {
            ApiError::new(Code::StorageFull, "the disk of the control plane is full; free some space and try again")
                .inside(text)
        }
        StoreError::Compacted { .. } => {
            ApiError::new(Code::Compacted, "the revision is no longer kept; list again and watch from the new revision")
        }
        StoreError::Behind { .. } => ApiError::new(
            Code::Unavailable,
            "this server has not caught up with the revision asked for; try again in a moment",
        )
        .inside(text),
        StoreError::Closed
        | StoreError::Io { .. }
        | StoreError::DiskFull { .. }
        | StoreError::Unreachable { .. }
        | StoreError::Refused { .. } => {
            ApiError::new(Code::Unavailable, "the store does not answer; try again in a moment").inside(text)
        }
        _ => ApiError::internal(text),
    }
}

fn is_full(error: &StoreError, text: &str) -> bool {
    matches!(error, StoreError::DiskFull { .. }) || text.contains("No space left on device")
}

pub(crate) fn password_error(error: &PasswordError) -> ApiError {
    match error {
        PasswordError::Busy => ApiError::new(Code::RateLimited, error.to_string()),
        PasswordError::Failed(_) => ApiError::internal(error.to_string()),
    }
}
