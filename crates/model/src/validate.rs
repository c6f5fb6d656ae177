//! Collecting what is wrong with a value, each with the path of the field (RFC 6901 JSON pointer).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::meta::Labels;
use crate::name;

/// One field at fault.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// JSON pointer, for example `/spec/publish/0/host_port`.
    pub field: String,
    /// What is wrong and what would be valid.
    pub detail: String,
}

/// Everything that is wrong, at most [`Problems::LIMIT`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// More than this is not reported.
    pub const LIMIT: usize = 32;

    /// Nothing wrong yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
    /// Notes a problem.
    pub fn add(&mut self, field: impl Into<String>, detail: impl Into<String>) {
        if self.0.len() < Self::LIMIT {
            self.0.push(Problem { field: field.into(), detail: detail.into() });
        }
    }
    /// Notes a problem if there is one.
    pub fn add_some(&mut self, field: impl Into<String>, detail: Option<String>) {
        if let Some(detail) = detail {
            self.add(field, detail);
        }
    }
    /// Notes a problem unless `ok`.
    pub fn require(&mut self, ok: bool, field: impl Into<String>, detail: impl Into<String>) {
        if !ok {
            self.add(field, detail);
        }
    }
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
    /// The problems.
    #[must_use]
    pub fn into_vec(self) -> Vec<Problem> {
        self.0
    }
    /// `Ok` when nothing is wrong.
    ///
    /// # Errors
    /// An `invalid` error that names each field.
    pub fn into_result(self) -> Result<(), crate::ApiError> {
        if self.0.is_empty() { Ok(()) } else { Err(crate::ApiError::from_problems(self)) }
    }
}

/// Most labels on one object.
pub const MAX_LABELS: usize = 64;

/// Checks labels: keys are dotted names with an optional `prefix/`, values up to 63 characters.
pub fn labels(labels: &Labels, field: &str, problems: &mut Problems) {
    problems.require(
        labels.len() <= MAX_LABELS,
        field,
        format!("has {} labels; at most {MAX_LABELS} are allowed", labels.len()),
    );
    for (key, value) in labels {
        problems.add_some(format!("{field}/{}", key.replace('~', "~0").replace('/', "~1")), label_problem(key, value));
    }
}

/// Why a label is not valid.
#[must_use]
pub fn label_problem(key: &str, value: &str) -> Option<String> {
    let (prefix, base) = key.split_once('/').map_or((None, key), |(p, b)| (Some(p), b));
    if let Some(problem) = prefix.and_then(name::dotted_problem) {
        return Some(format!("label key {key:?}: its prefix {problem}"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if base.is_empty() || base.len() > 63 || !base.chars().all(plain) {
        return Some(format!(
            "label key {key:?} must be 1 to 63 letters, digits, '-', '_' or '.', with an optional prefix before '/'"
        ));
    }
    if value.len() > 63 || !value.chars().all(plain) {
        return Some(format!("label value {value:?} must be at most 63 letters, digits, '-', '_' or '.'"));
    }
    None
}
