//! What a watcher receives.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::stream::{BoxStream, Stream, StreamExt};
use oblak_model::Revision;

use crate::{Key, StoreError};

/// One key changed by a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which key.
    pub key: Key,
    /// The new value; none when deleted.
    pub value: Option<Bytes>,
    /// Revision that the key had before; none when it did not exist.
    pub prev: Option<Revision>,
    /// When the key (for a deletion: the deleted key) came into being.
    pub created: Revision,
}

/// All changes below the watched prefix that one commit made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// Revision of the commit.
    pub revision: Revision,
    /// In the order of the transaction's writes; never empty.
    pub changes: Vec<Change>,
}

/// An item of a watch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchItem {
    /// Something below the prefix changed.
    Event(WatchEvent),
    /// Everything up to here has been delivered; nothing below the prefix changed in between.
    Progress(Revision),
}

impl WatchItem {
    /// How far the reader is after this item.
    #[must_use]
    pub fn revision(&self) -> Revision {
        match self {
            Self::Event(event) => event.revision,
            Self::Progress(revision) => *revision,
        }
    }
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The changes after the reader's revision are no longer kept, or belong to another incarnation: list again.
    #[error("the history up to revision {oldest} is gone; list again")]
    Compacted {
        /// First revision from which a watch can start.
        oldest: Revision,
    },
    /// The store failed or was closed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Events strictly after the revision asked for, in order, none lost, none twice. Ends after the first error.
pub struct WatchStream(BoxStream<'static, Result<WatchItem, WatchError>>);

impl WatchStream {
    /// For implementations of [`crate::Store`].
    pub fn new(stream: impl Stream<Item = Result<WatchItem, WatchError>> + Send + 'static) -> Self {
        Self(stream.boxed())
    }

    /// The next item; none after an error. Cancel-safe: dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<Result<WatchItem, WatchError>> {
        self.0.next().await
    }
}

impl Stream for WatchStream {
    type Item = Result<WatchItem, WatchError>;
    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_next_unpin(context)
    }
}

impl fmt::Debug for WatchStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WatchStream")
    }
}
