//! The servers that a client knows, and which of them it talks to.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::Result;
use crate::transport::ClientError;

/// Most servers that are remembered.
const MOST: usize = 32;

/// Addresses in the order in which they are tried, beginning with the one that answered last.
pub(crate) struct Servers {
    state: Mutex<State>,
}

struct State {
    all: Vec<String>,
    current: usize,
    /// Stays with what it has.
    pinned: bool,
}

/// An address as it is used in URLs.
///
/// # Errors
/// [`ClientError::Config`] unless it is `https://` and names a host.
pub(crate) fn checked(server: &str) -> Result<String> {
    let server = server.trim_end_matches('/').to_string();
    let uri: http::Uri = server
        .parse()
        .map_err(|_| ClientError::Config(format!("{server:?} is not a URL such as https://127.0.0.1:7443")))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("https"), Some(_)) => Ok(server),
        _ => Err(ClientError::Config(format!("{server:?} must start with https:// and name a host"))),
    }
}

impl Servers {
    /// `first` is tried first.
    pub fn new(first: String, others: impl IntoIterator<Item = String>) -> Self {
        let servers = Self { state: Mutex::new(State { all: vec![first], current: 0, pinned: false }) };
        servers.learn(others);
        servers
    }

    /// One that is never left.
    pub fn pinned(server: String) -> Self {
        Self { state: Mutex::new(State { all: vec![server], current: 0, pinned: true }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one that is talked to.
    pub fn current(&self) -> String {
        let state = self.lock();
        state.all[state.current].clone()
    }

    /// All, in the order in which they should be tried.
    pub fn in_turn(&self) -> Vec<String> {
        let state = self.lock();
        let count = state.all.len();
        (0..count).map(|n| state.all[(state.current + n) % count].clone()).collect()
    }

    /// It does not answer: others first, unless somebody has found another meanwhile.
    pub fn failed(&self, server: &str) {
        let mut state = self.lock();
        if state.all[state.current] == server {
            state.current = (state.current + 1) % state.all.len();
        }
    }

    /// It answers.
    pub fn answered(&self, server: &str) {
        let mut state = self.lock();
        if let Some(at) = state.all.iter().position(|known| known == server) {
            state.current = at;
        }
    }

    /// These are all there are. The present one is kept until another answers instead, and nothing changes when the list is of no use.
    pub fn learn(&self, servers: impl IntoIterator<Item = String>) {
        let mut state = self.lock();
        if state.pinned {
            return;
        }
        let mut all = vec![state.all[state.current].clone()];
        for server in servers.into_iter().filter_map(|server| checked(&server).ok()) {
            if all.len() < MOST && !all.contains(&server) {
                all.push(server);
            }
        }
        if all.len() > 1 || state.all.len() == 1 {
            (state.all, state.current) = (all, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(of: &[&str]) -> Vec<String> {
        of.iter().map(|n| format!("https://{n}")).collect()
    }

    #[test]
    fn who_fails_is_tried_last_and_who_answers_first() {
        let servers = Servers::new("https://a".into(), names(&["b", "a", "c"]));
        assert_eq!(servers.in_turn(), names(&["a", "b", "c"]));
        servers.failed("https://a");
        servers.failed("https://a");
        assert_eq!(servers.in_turn(), names(&["b", "c", "a"]), "two calls that failed at once move on once");
        servers.answered("https://c");
        assert_eq!(servers.current(), "https://c");
    }

    #[test]
    fn what_is_learnt_keeps_the_present_one() {
        let servers = Servers::new("https://a".into(), []);
        servers.learn(names(&["b", "c"]));
        assert_eq!(servers.in_turn(), names(&["a", "b", "c"]));
        servers.failed("https://a");
        servers.learn(["http://evil".into(), "https://d".into()]);
        assert_eq!(servers.in_turn(), names(&["b", "d"]));
        servers.learn([]);
        assert_eq!(servers.in_turn(), names(&["b", "d"]), "an empty answer is no reason to forget");
        let pinned = Servers::pinned("https://a".into());
        pinned.learn(names(&["b"]));
        pinned.failed("https://a");
        assert_eq!(pinned.in_turn(), names(&["a"]));
    }

    #[test]
    fn addresses_are_checked() {
        assert_eq!(checked("https://a:1/").unwrap(), "https://a:1");
        for bad in ["http://a", "a", "https://", ""] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
