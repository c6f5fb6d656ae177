//! Pages of lists, cut by number and bytes, the same for every backend.

use bytes::Bytes;
use oblak_model::Revision;

use crate::engine::Row;
use crate::{Entry, Key, MAX_PAGE, MAX_PAGE_BYTES, Page, Prefix};

/// The texts between which the keys of a page lie, both excluded; none when the page is empty whatever the store holds.
pub(crate) fn bounds(prefix: &Prefix, start_after: Option<&Key>) -> Option<(String, String)> {
    let start = match start_after {
        Some(key) if key.as_str() > prefix.as_str() => key.as_str(),
        // The prefix itself, with its trailing slash, is never a key.
        _ => prefix.as_str(),
    };
    let end = prefix.end();
    (start < end.as_str()).then(|| (start.to_owned(), end))
}

/// A page without entries.
pub(crate) fn empty(revision: Revision) -> Page {
    Page { entries: Vec::new(), revision, more: false }
}

/// Takes rows until the page is full.
pub(crate) fn collect<V, E>(
    rows: impl Iterator<Item = Result<Row<V>, E>>,
    limit: usize,
    revision: Revision,
    bytes: impl Fn(V) -> Bytes,
) -> Result<Page, E> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut page = empty(revision);
    let mut size = 0;
    for row in rows {
        let row = row?;
        if page.entries.len() >= limit || size >= MAX_PAGE_BYTES {
            page.more = true;
            break;
        }
        let value = bytes(row.value);
        size += value.len();
        page.entries.push(Entry { key: row.key, value, revision: row.head.revision, created: row.head.created });
    }
    Ok(page)
}
