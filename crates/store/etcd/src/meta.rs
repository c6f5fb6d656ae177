//! What is known of a cloud as a whole: which life of the store it is, and which records of transactions are still needed.

use etcd_client::{Compare, CompareOp, GetResponse, KeyValue, Txn, TxnOp, TxnOpResponse};
use oblak_store::{Result, StoreError};
use serde::{Deserialize, Serialize};

use crate::cluster::Cluster;
use crate::failure::{Failure, Kind};
use crate::keys::Space;

/// Version of the layout in `keys` that this program reads and writes.
const FORMAT: u32 = 1;

/// The value of the key `m`, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub format: u32,
    /// Which life of the store; grows with each restore.
    pub incarnation: u32,
    /// Identity of the etcd cluster. A cluster made from a snapshot has another one.
    pub cluster: String,
    /// Number of the window of records. A commit names, by the revision of this key, the window that it believes to be open.
    pub window: u64,
    /// Records at or before this revision belong to windows before the last one.
    pub since: u64,
}

/// [`Meta`] with the revisions of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub meta: Meta,
    /// When it was last written; compared by every commit.
    pub modified: i64,
    /// When the cloud was made.
    pub created: i64,
}

impl Known {
    pub fn parse(kv: &KeyValue) -> Result<Self, Failure> {
        let fail = |detail: String| Failure::new(Kind::Refused, detail);
        let meta: Meta = serde_json::from_slice(kv.value()).map_err(|error| {
            fail(format!("{} in etcd is not what this program wrote: {error}", String::from_utf8_lossy(kv.key())))
        })?;
        if meta.format != FORMAT {
            return Err(fail(format!(
                "the data in etcd has format {}, this program reads {FORMAT}; use the program version that wrote it",
                meta.format
            )));
        }
        Ok(Self { meta, modified: kv.mod_revision(), created: kv.create_revision() })
    }
}

/// Reads what is known; makes it when the cloud is new.
pub async fn open(cluster: &Cluster, space: &Space, first_incarnation: u32) -> Result<Known> {
    // The first answer says which cluster this is.
    let status = cluster.call(|mut client| async move { client.status().await }).await;
    let status = status.map_err(Failure::into_store_error)?;
    cluster.note(status.header()).map_err(Failure::into_store_error)?;
    let id = format!("{:x}", cluster.id().unwrap_or_default());
    let meta = Meta { format: FORMAT, incarnation: first_incarnation, cluster: id.clone(), window: 0, since: 0 };
    let known = replace(cluster, space, 0, &meta).await.map_err(Failure::into_store_error)?;
    if known.meta.cluster == id {
        return Ok(known);
    }
    tracing::warn!(
        was = known.meta.cluster,
        is = id,
        "etcd was made from a snapshot: the store begins a new incarnation"
    );
    next_incarnation(cluster, space, known, &id).await
}

/// Begins a new incarnation, unless somebody else just did.
pub async fn next_incarnation(cluster: &Cluster, space: &Space, known: Known, id: &str) -> Result<Known> {
    let meta = Meta { incarnation: known.meta.incarnation + 1, cluster: id.to_owned(), ..known.meta.clone() };
    let now = replace(cluster, space, known.modified, &meta).await.map_err(Failure::into_store_error)?;
    if now.meta.incarnation == known.meta.incarnation {
        return Err(StoreError::Unreachable { detail: "somebody else changes the cloud in etcd at the moment".into() });
    }
    Ok(now)
}

/// Writes `meta` where the key was last modified at `expected` (0: where it does not exist), and answers what is there afterwards.
pub async fn replace(cluster: &Cluster, space: &Space, expected: i64, meta: &Meta) -> Result<Known, Failure> {
    let value = serde_json::to_vec(meta)
        .map_err(|error| Failure::new(Kind::Refused, format!("cannot write down what is known: {error}")))?;
    let key = space.meta();
    let txn = Txn::new()
        .when([Compare::mod_revision(key.clone(), CompareOp::Equal, expected)])
        .and_then([TxnOp::put(key.clone(), value, None), TxnOp::get(key.clone(), None)])
        .or_else([TxnOp::get(key, None)]);
    let answer = cluster
        .call(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        })
        .await?;
    cluster.note(answer.header())?;
    match answer.op_responses().iter().rev().find_map(found) {
        Some(kv) => Known::parse(&kv),
        None => Err(Failure::new(Kind::Refused, "what is known of the cloud was deleted from etcd; restore a backup")),
    }
}

/// The key that a get inside a transaction found.
pub fn found(answer: &TxnOpResponse) -> Option<KeyValue> {
    match answer {
        TxnOpResponse::Get(get) => first(get),
        _ => None,
    }
}

fn first(get: &GetResponse) -> Option<KeyValue> {
    get.kvs().first().cloned()
}
