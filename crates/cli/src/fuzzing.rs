//! Ways into the parsers for the fuzzer; nobody else calls them.

/// What is said about the text of a file for `apply`; empty when it is good.
#[must_use]
pub fn documents(text: &str) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let read = runtime.map(|r| r.block_on(crate::cmd::documents("file", text)));
    match read {
        Ok(Ok(_)) => String::new(),
        Ok(Err(error)) => error.message,
        Err(error) => error.to_string(),
    }
}
