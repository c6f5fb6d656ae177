//! Who is asking.

use std::fmt;

use oblak_model::{ApiError, Code, NodeId, TokenId, UserId};

/// A logged-in person or program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserPrincipal {
    /// Id; a user made later under the same name is somebody else.
    pub id: UserId,
    /// Name, as grants have it.
    pub name: String,
    /// May do everything.
    pub cloud_admin: bool,
    /// The token it came with; none for a password.
    pub token: Option<TokenId>,
}

/// Whoever sent a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Principal {
    /// Nobody in particular.
    Anonymous,
    /// A user.
    User(UserPrincipal),
    /// The agent of a node, known by its client certificate.
    Node(NodeId),
}

impl Principal {
    /// The user.
    ///
    /// # Errors
    /// `unauthenticated` for nobody, `forbidden` for a node.
    pub fn user(&self) -> Result<&UserPrincipal, ApiError> {
        match self {
            Self::User(user) => Ok(user),
            Self::Anonymous => Err(unauthenticated()),
            Self::Node(_) => {
                Err(ApiError::new(Code::Forbidden, "a node's certificate opens only that node's own paths"))
            }
        }
    }

    /// Whether it is a cloud admin.
    #[must_use]
    pub fn is_cloud_admin(&self) -> bool {
        matches!(self, Self::User(user) if user.cloud_admin)
    }

    /// What counts as one caller for limits and idempotency keys. No two principals share it.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Self::Anonymous => "anonymous".into(),
            Self::User(user) => format!("user:{}", user.id),
            Self::Node(node) => format!("node:{node}"),
        }
    }
}

/// For logs and the `source` of events.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("anonymous"),
            Self::User(user) => write!(f, "user/{}", user.name),
            Self::Node(node) => write!(f, "node/{node}"),
        }
    }
}

/// The answer to a caller without usable credentials. The same for a wrong password, an unknown user and a dead token.
#[must_use]
pub fn unauthenticated() -> ApiError {
    ApiError::new(Code::Unauthenticated, "credentials are missing, wrong or no longer valid; log in with `oblak login`")
}
