//! One at a time per key: two imports of the same content wait for each other instead of doing it twice.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::error::{ImageError, Result};

type Map = Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>;

/// A lock per key.
#[derive(Clone, Default)]
pub(crate) struct Locks {
    map: Map,
}

/// Holds one key.
pub(crate) struct Held {
    key: String,
    map: Map,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Locks {
    pub async fn hold(&self, key: String, cancel: &CancellationToken) -> Result<Held> {
        let lock = {
            let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
            map.entry(key.clone()).or_default().clone()
        };
        let guard = tokio::select! {
            guard = lock.lock_owned() => guard,
            () = cancel.cancelled() => return Err(ImageError::cancelled()),
        };
        Ok(Held { key, map: self.map.clone(), guard: Some(guard) })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.guard = None;
        let mut map = self.map.lock().unwrap_or_else(PoisonError::into_inner);
        // Only the map knows it: nobody waits.
        if map.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            map.remove(&self.key);
        }
    }
}
