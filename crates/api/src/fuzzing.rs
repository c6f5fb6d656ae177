//! Ways into the parsers for the fuzzer; nobody else calls them.

use oblak_model::{ApiError, InstanceKind};

/// A cursor of a list of instances.
///
/// # Errors
/// As a list.
pub fn cursor(text: &str) -> Result<String, ApiError> {
    crate::rest::cursor::<InstanceKind>(text, Some("default"))
}
