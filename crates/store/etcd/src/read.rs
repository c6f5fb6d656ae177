//! Reads: linearizable, and lists from one snapshot.

use etcd_client::{Client, GetOptions, GetResponse, KeyValue, WatchOptions};
use oblak_store::{Entry, Key, MAX_PAGE, MAX_PAGE_BYTES, Page, Prefix, Result, Revision, StoreError};

use crate::cluster::ATTEMPT;
use crate::failure::{Failure, Kind};
use crate::keys::Found;
use crate::store::Core;

/// Keys asked for first. Values are at most about 1 MiB each, and how large they are is only known afterwards.
const FIRST_CHUNK: usize = 64;
/// Bytes that a later chunk should have.
const CHUNK_BYTES: usize = 4 << 20;
const MOST_IN_CHUNK: usize = 2048;
/// Largest answer: `FIRST_CHUNK` values of the largest size, and as much again.
const ANSWER_BYTES: usize = 160 << 20;

/// The newest value of a key.
pub async fn get(core: &Core, key: &Key) -> Result<Option<Entry>> {
    let mut answer = range(core, core.space.data(key), None).await.map_err(Failure::into_store_error)?;
    Ok(answer.take_kvs().pop().and_then(|kv| entry(core, kv)))
}

/// The newest revision of etcd.
pub async fn newest(core: &Core) -> Result<u64> {
    let options = GetOptions::new().with_count_only();
    let answer = range(core, core.space.meta(), Some(options)).await.map_err(Failure::into_store_error)?;
    core.cluster.note(answer.header()).map_err(Failure::into_store_error)
}

/// Whether a watch can start after `n`: it has happened, and what follows is kept.
pub async fn is_kept(core: &Core, n: u64) -> Result<bool> {
    if n < core.hub.floor() {
        return Ok(false);
    }
    let options = GetOptions::new().with_count_only().with_revision(i64::try_from(n.max(1)).unwrap_or(i64::MAX));
    match range(core, core.space.meta(), Some(options)).await {
        Ok(_) => Ok(true),
        Err(failure) if failure.kind == Kind::Future => Ok(false),
        Err(failure) if failure.kind == Kind::Compacted => {
            find_floor(core).await?;
            Ok(false)
        }
        Err(failure) => Err(failure.into_store_error()),
    }
}

/// A page.
pub async fn list(
    core: &Core,
    prefix: &Prefix,
    limit: usize,
    start_after: Option<Key>,
    at: Option<Revision>,
) -> Result<Page> {
    let now = core.at(0);
    if at.is_some_and(|at| at.incarnation != now.incarnation || at.n < core.hub.floor() || at.n == 0) {
        return Err(StoreError::Compacted { oldest: core.oldest() });
    }
    let limit = limit.clamp(1, MAX_PAGE);
    let mut page = Page { entries: Vec::new(), revision: at.unwrap_or(now), more: false };
    // Where nothing can be, the revision is still asked for and checked.
    let (mut start, end) =
        core.space.range(prefix, start_after.as_ref()).unwrap_or_else(|| (core.space.meta(), Vec::new()));
    let nothing = end.is_empty();
    let (mut bytes, mut chunk) = (0, FIRST_CHUNK);
    loop {
        let wanted = chunk.min(limit - page.entries.len());
        let mut options = GetOptions::new().with_limit(i64::try_from(wanted).unwrap_or(1));
        if page.revision.n > 0 {
            options = options.with_revision(i64::try_from(page.revision.n).unwrap_or(i64::MAX));
        }
        options = if nothing { options.with_count_only() } else { options.with_range(end.clone()) };
        let mut answer = match range(core, start.clone(), Some(options)).await {
            Ok(answer) => answer,
            Err(failure) => return Err(snapshot_gone(core, failure).await),
        };
        if page.revision.n == 0 {
            page.revision.n = core.cluster.note(answer.header()).map_err(Failure::into_store_error)?;
        }
        if nothing {
            return Ok(page);
        }
        page.more = answer.more();
        let mut found = answer.take_kvs().into_iter();
        for kv in found.by_ref() {
            start = [kv.key(), b"\0"].concat();
            bytes += kv.value().len();
            page.entries.extend(entry(core, kv));
            if bytes >= MAX_PAGE_BYTES {
                break;
            }
        }
        page.more |= found.next().is_some();
        if !page.more || page.entries.len() >= limit || bytes >= MAX_PAGE_BYTES {
            return Ok(page);
        }
        chunk = (CHUNK_BYTES / (bytes / page.entries.len().max(1)).max(1)).clamp(1, MOST_IN_CHUNK);
    }
}

async fn snapshot_gone(core: &Core, failure: Failure) -> StoreError {
    match failure.kind {
        Kind::Compacted => match find_floor(core).await {
            Ok(()) => StoreError::Compacted { oldest: core.oldest() },
            Err(error) => error,
        },
        Kind::Future => StoreError::Compacted { oldest: core.oldest() },
        _ => failure.into_store_error(),
    }
}

async fn range(core: &Core, start: Vec<u8>, options: Option<GetOptions>) -> Result<GetResponse, Failure> {
    let answer = core
        .cluster
        .call(|client| {
            let (start, options) = (start.clone(), options.clone());
            async move { client.kv_client().max_decoding_message_size(ANSWER_BYTES).get(start, options).await }
        })
        .await?;
    core.cluster.note(answer.header())?;
    Ok(answer)
}

fn entry(core: &Core, kv: KeyValue) -> Option<Entry> {
    let (revision, created) = (core.revision(kv.mod_revision()), core.revision(kv.create_revision()));
    let (raw, value) = kv.into_key_value();
    match core.space.parse(&raw) {
        Found::Data(key) => Some(Entry { key, value: value.into(), revision, created }),
        _ => None,
    }
}

/// Finds out up to where etcd was compacted. It says so only to a watch that asks for more than there is.
async fn find_floor(core: &Core) -> Result<()> {
    let mut pauses = core.cluster.pauses();
    loop {
        let probed = core.cluster.attempt(|client| probe(client, core.space.meta())).await;
        match probed {
            Ok(floor) => {
                core.hub.raise_floor(u64::try_from(floor).unwrap_or(0));
                return Ok(());
            }
            Err(failure) => {
                if !failure.is_transient() || !pauses.pause().await {
                    return Err(failure.into_store_error());
                }
            }
        }
    }
}

async fn probe(client: Client, key: Vec<u8>) -> Result<i64, etcd_client::Error> {
    let mut stream = client.watch_client().watch(key, Some(WatchOptions::new().with_start_revision(1))).await?;
    // Whoever asks has just been told that something is compacted, so the answer comes, in at most 100 ms (etcd's `syncWatchersLoop`).
    while let Some(answer) = stream.message().await? {
        if answer.canceled() {
            return Ok(answer.compact_revision());
        }
    }
    Err(etcd_client::Error::WatchError(format!("no answer within {} ms", ATTEMPT.as_millis())))
}
