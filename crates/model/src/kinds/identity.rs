//! Projects, users, tokens and ssh keys.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::object::{Kind, Object, Scope};
use crate::time::Timestamp;
use crate::validate::Problems;

/// Name of the project that exists from the start.
pub const DEFAULT_PROJECT: &str = "default";
/// Name of the organization that exists from the start.
pub const DEFAULT_ORGANIZATION: &str = "default";

fn default_organization() -> String {
    DEFAULT_ORGANIZATION.into()
}

/// Kind of projects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProjectKind;
/// A tenant: owns resources, quota and bill.
pub type Project = Object<ProjectKind>;

/// What a role lets its holder do inside a project. Ordered: each includes the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Sees everything of the project, secrets excepted.
    Reader,
    /// Creates, changes, uses and deletes resources.
    Member,
    /// Also grants roles.
    Admin,
}

/// One grant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    /// User name.
    pub user: String,
    /// What the user may do.
    pub role: Role,
}

/// What is asked for of a project.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProjectSpec {
    /// Free text.
    #[serde(default)]
    pub description: String,
    /// The organization it belongs to.
    #[serde(default = "default_organization")]
    pub organization: String,
    /// Who may do what.
    #[serde(default)]
    pub grants: Vec<Grant>,
}

impl Default for ProjectSpec {
    fn default() -> Self {
        Self { description: String::new(), organization: default_organization(), grants: Vec::new() }
    }
}

/// What is, of a project.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectStatus {}

impl Kind for ProjectKind {
    const KIND: &'static str = "project";
    const PLURAL: &'static str = "projects";
    const SCOPE: Scope = Scope::Organization;
    type Spec = ProjectSpec;
    type Status = ProjectStatus;
    fn validate(spec: &ProjectSpec, problems: &mut Problems) {
        problems.require(spec.description.len() <= 1024, "/spec/description", "is longer than 1024 bytes");
        problems.require(spec.grants.len() <= 1000, "/spec/grants", "has more than 1000 grants");
        problems.add_some("/spec/organization", crate::name::problem(&spec.organization));
        for (i, grant) in spec.grants.iter().enumerate() {
            problems.add_some(format!("/spec/grants/{i}/user"), crate::name::dotted_problem(&grant.user));
            let twice = spec.grants[..i].iter().any(|g| g.user == grant.user);
            problems.require(!twice, format!("/spec/grants/{i}/user"), "has a grant already; give each user one role");
        }
    }
}

/// Kind of users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserKind;
/// A person or program that logs in.
pub type User = Object<UserKind>;

/// What is asked for of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UserSpec {
    /// Full name.
    #[serde(default)]
    pub full_name: String,
    /// Mail address.
    #[serde(default)]
    pub email: String,
    /// May do everything in the whole cloud.
    #[serde(default)]
    pub cloud_admin: bool,
    /// May not log in.
    #[serde(default)]
    pub disabled: bool,
    /// New password; stored only as an argon2id hash and never shown again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password: Option<String>,
}

/// What is, of a user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UserStatus {
    /// Whether a password is set.
    #[serde(default)]
    pub has_password: bool,
}

impl Kind for UserKind {
    const KIND: &'static str = "user";
    const PLURAL: &'static str = "users";
    const SCOPE: Scope = Scope::Cloud;
    type Spec = UserSpec;
    type Status = UserStatus;
    fn validate(spec: &UserSpec, problems: &mut Problems) {
        problems.require(spec.full_name.len() <= 256, "/spec/full_name", "is longer than 256 bytes");
        problems.require(spec.email.len() <= 254, "/spec/email", "is longer than 254 bytes");
        if let Some(password) = &spec.password {
            problems.require((8..=1024).contains(&password.len()), "/spec/password", "must have 8 to 1024 bytes");
        }
    }
    fn name_problem(name: &str) -> Option<String> {
        crate::name::dotted_problem(name)
    }
}

/// Kind of API tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenKind;
/// A secret that stands for a user.
pub type Token = Object<TokenKind>;

/// What is asked for of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenSpec {
    /// The user it stands for; the caller when empty.
    #[serde(default)]
    pub user: String,
    /// What it is for.
    #[serde(default)]
    pub description: String,
    /// When it stops working.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
}

/// What is, of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenStatus {
    /// The secret; only in the answer to its creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<String>,
}

impl Kind for TokenKind {
    const KIND: &'static str = "token";
    const PLURAL: &'static str = "tokens";
    const SCOPE: Scope = Scope::Cloud;
    type Spec = TokenSpec;
    type Status = TokenStatus;
    fn validate(spec: &TokenSpec, problems: &mut Problems) {
        problems.require(spec.description.len() <= 256, "/spec/description", "is longer than 256 bytes");
    }
    fn validate_update(old: &TokenSpec, new: &TokenSpec, problems: &mut Problems) {
        problems.require(old.user == new.user, "/spec/user", "cannot change; make a new token");
    }
}

/// Kind of ssh keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyKind;
/// A public ssh key that instances accept.
pub type Key = Object<KeyKind>;

/// What is asked for of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeySpec {
    /// One line in OpenSSH format: `ssh-ed25519 AAAA... comment`.
    pub public_key: String,
}

/// What is, of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct KeyStatus {}

impl Kind for KeyKind {
    const KIND: &'static str = "key";
    const PLURAL: &'static str = "keys";
    const SCOPE: Scope = Scope::Project;
    type Spec = KeySpec;
    type Status = KeyStatus;
    fn validate(spec: &KeySpec, problems: &mut Problems) {
        problems.add_some("/spec/public_key", public_key_problem(&spec.public_key));
    }
    fn validate_update(old: &KeySpec, new: &KeySpec, problems: &mut Problems) {
        problems.require(old == new, "/spec/public_key", "cannot change; make a new key");
    }
}

/// Why a line is not an OpenSSH public key. The formats are those of sshd(8), AUTHORIZED_KEYS FILE FORMAT, without options.
#[must_use]
pub fn public_key_problem(line: &str) -> Option<String> {
    if line.contains("PRIVATE KEY") {
        return Some("is a private key; give the public one (the file that ends in .pub)".into());
    }
    if line.trim().contains(['\n', '\r', '\0']) || line.len() > 16 * 1024 {
        return Some("must be one line of at most 16 KiB".into());
    }
    let mut words = line.split_ascii_whitespace();
    let (Some(kind), Some(blob)) = (words.next(), words.next()) else {
        return Some("must look like `ssh-ed25519 AAAA... comment`".into());
    };
    let known = ["ssh-ed25519", "ssh-rsa", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521"];
    if !known.contains(&kind) && !kind.starts_with("sk-") {
        return Some(format!("has the unknown type {kind:?}; use one of {}", known.join(", ")));
    }
    let base64 = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '/' | '=');
    if blob.len() < 40 || !blob.starts_with("AAAA") || !blob.chars().all(base64) {
        return Some("has no base64 key after its type".into());
    }
    None
}
