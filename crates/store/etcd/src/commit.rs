//! How a transaction becomes one transaction of etcd, and how its outcome is found out when an answer is lost.
//!
//! A commit that writes also puts a *record* under its id, on the condition that there is none. So it can be sent again, and happens once.
//! A request that was given up may still lie somewhere and arrive later. Therefore, before anybody is told that it did not happen, the record
//! is written as *void*: then the condition cannot hold any more. Both last until two more windows of records have begun (`janitor`), and a
//! request names the window in which it was sent, so it cannot arrive after its record was dropped.

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn as EtcdTxn, TxnOp, TxnResponse};
use oblak_store::{CommitOutcome, Guard, LeaseId, Result, Revision, StoreError, Txn, TxnId, Write};

use crate::failure::{Failure, Kind};
use crate::keys::VOID;
use crate::meta::{Known, found};
use crate::store::Core;

/// A revision that no key ever has.
const NEVER: i64 = -1;

/// What there is under a transaction's id before an attempt.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Record {
    Absent,
    /// Written at this revision, by an earlier call that has told its outcome.
    Void(i64),
}

impl Record {
    fn compare(self, key: Vec<u8>) -> Compare {
        let at = match self {
            Self::Absent => 0,
            Self::Void(at) => at,
        };
        Compare::mod_revision(key, CompareOp::Equal, at)
    }
}

/// What a call that was carried out and wrote nothing says.
enum Verdict {
    /// This id was committed before.
    Committed(i64),
    /// The cloud's window or life is another one.
    Moved(Known),
    Void(i64),
    /// The void record that was expected is so old that it was dropped.
    Forgotten,
    Refused(Result<CommitOutcome>),
}

/// Commits, or says why not.
pub async fn commit(core: &Core, txn: Txn) -> Result<CommitOutcome> {
    txn.check()?;
    let seen = core.cluster.seen();
    let mut record = Record::Absent;
    // The window in which a request was sent whose fate is open.
    let mut doubt: Option<u64> = None;
    let mut pauses = core.cluster.pauses();
    loop {
        let known = core.known();
        if doubt.is_some_and(|window| known.meta.window > window + 1) {
            // The record may be gone; only the caller can judge now.
            return Ok(CommitOutcome::Unknown(txn.id));
        }
        let request = request(core, &known, &txn, record);
        let failure = match core.cluster.attempt(|mut client| async move { client.txn(request).await }).await {
            Err(failure) => failure,
            Ok(answer) => match judge(core, &known, &txn, record, &answer)? {
                Verdict::Moved(known) => {
                    core.adopt(known);
                    if pauses.pause().await {
                        continue;
                    }
                    Failure::new(Kind::NotSent, "the cloud in etcd changed again and again")
                }
                Verdict::Committed(n) => {
                    let outcome = Ok(CommitOutcome::Committed(core.revision(n)));
                    // What had no effect may still get one when an earlier copy arrives.
                    return if doubt.is_some() && no_effect(&txn, &answer) {
                        settle(core, &known, txn.id, record, outcome).await
                    } else {
                        outcome
                    };
                }
                Verdict::Void(at) if doubt.is_none() && u64::try_from(at).is_ok_and(|at| at <= seen) => {
                    record = Record::Void(at);
                    continue;
                }
                Verdict::Forgotten => {
                    record = Record::Absent;
                    continue;
                }
                // Somebody was told, during this call, that it did not happen.
                Verdict::Void(_) => return Ok(CommitOutcome::Unknown(txn.id)),
                Verdict::Refused(outcome) if doubt.is_some() => {
                    return settle(core, &known, txn.id, record, outcome).await;
                }
                Verdict::Refused(outcome) => return outcome,
            },
        };
        if failure.kind == Kind::Lost {
            doubt.get_or_insert(known.meta.window);
        }
        if failure.is_transient() && pauses.pause().await {
            continue;
        }
        return match doubt {
            Some(_) if failure.is_transient() => Ok(CommitOutcome::Unknown(txn.id)),
            Some(_) => settle(core, &known, txn.id, record, Err(failure.into_store_error())).await,
            None => Err(failure.into_store_error()),
        };
    }
}

/// What became of a transaction. When nothing did, nothing will.
pub async fn outcome(core: &Core, id: TxnId) -> Result<Option<Revision>> {
    Ok(void(core, id, Record::Absent, None).await.map_err(Failure::into_store_error)?.map(|n| core.revision(n)))
}

/// Answers `outcome` once no earlier copy of the request can change it.
async fn settle(
    core: &Core,
    known: &Known,
    id: TxnId,
    record: Record,
    outcome: Result<CommitOutcome>,
) -> Result<CommitOutcome> {
    match void(core, id, record, Some(known)).await {
        Ok(None) => outcome,
        Ok(Some(n)) => Ok(CommitOutcome::Committed(core.revision(n))),
        Err(failure) => {
            tracing::warn!(%id, failure = failure.detail, "the outcome of a transaction stays open");
            Ok(CommitOutcome::Unknown(id))
        }
    }
}

/// Makes the record void if it still is as `record` says; answers the revision of the commit if there was one. With `known`, only while the
/// window is still that one: later a missing record proves nothing.
async fn void(core: &Core, id: TxnId, record: Record, known: Option<&Known>) -> Result<Option<i64>, Failure> {
    let key = core.space.txn(id);
    let mut compares = vec![record.compare(key.clone())];
    compares.extend(known.map(|known| Compare::mod_revision(core.space.meta(), CompareOp::Equal, known.modified)));
    let txn =
        EtcdTxn::new().when(compares).and_then([TxnOp::put(key.clone(), VOID, None)]).or_else([TxnOp::get(key, None)]);
    let answer = core
        .cluster
        .call(|mut client| {
            let txn = txn.clone();
            async move { client.txn(txn).await }
        })
        .await?;
    core.cluster.note(answer.header())?;
    if answer.succeeded() {
        return Ok(None);
    }
    match answer.op_responses().first().and_then(found) {
        Some(kv) if kv.value() == VOID => Ok(None),
        Some(kv) => Ok(Some(kv.mod_revision())),
        None => Err(Failure::new(Kind::Lost, "a new window of records began meanwhile")),
    }
}

/// Conditions: the cloud is as known, the record is as expected, the guards, and that leases to attach to live. When one does not hold,
/// everything is read that says which.
pub fn request(core: &Core, known: &Known, txn: &Txn, record: Record) -> EtcdTxn {
    let space = &core.space;
    let own = space.txn(txn.id);
    let mut compares =
        vec![Compare::mod_revision(space.meta(), CompareOp::Equal, known.modified), record.compare(own.clone())];
    let heads = || Some(GetOptions::new().with_keys_only());
    let mut otherwise = vec![TxnOp::get(space.meta(), None), TxnOp::get(own.clone(), None)];
    for guard in &txn.guards {
        let (key, compare) = condition(core, known, guard);
        compares.push(compare);
        otherwise.push(TxnOp::get(key, heads()));
    }
    for lease in leases(txn) {
        let marker = space.lease(lease);
        compares.push(Compare::create_revision(marker.clone(), CompareOp::Greater, 0));
        otherwise.push(TxnOp::get(marker, heads()));
    }
    EtcdTxn::new().when(compares).and_then(effects(core, txn, own)).or_else(otherwise)
}

fn condition(core: &Core, known: &Known, guard: &Guard) -> (Vec<u8>, Compare) {
    let exists = |key: Vec<u8>| (key.clone(), Compare::create_revision(key, CompareOp::Greater, 0));
    match guard {
        Guard::Revision(key, wanted) => {
            let key = core.space.data(key);
            (key.clone(), Compare::mod_revision(key, CompareOp::Equal, wanted_revision(known, *wanted)))
        }
        Guard::Absent(key) => {
            let key = core.space.data(key);
            (key.clone(), Compare::create_revision(key, CompareOp::Equal, 0))
        }
        Guard::Present(key) => exists(core.space.data(key)),
        Guard::LeaseAlive(id) => exists(core.space.lease(*id)),
    }
}

/// Zero would mean "absent" to etcd, and a revision of another life means nothing in this one.
fn wanted_revision(known: &Known, wanted: Revision) -> i64 {
    match i64::try_from(wanted.n) {
        Ok(n) if n > 0 && wanted.incarnation == known.meta.incarnation => n,
        _ => NEVER,
    }
}

/// Leases that writes attach to, in the order of the writes, each once.
fn leases(txn: &Txn) -> Vec<LeaseId> {
    let mut leases = Vec::new();
    for write in &txn.writes {
        if let Write::Put { lease: Some(lease), .. } = write
            && !leases.contains(lease)
        {
            leases.push(*lease);
        }
    }
    leases
}

fn effects(core: &Core, txn: &Txn, own: Vec<u8>) -> Vec<TxnOp> {
    if txn.writes.is_empty() {
        return Vec::new();
    }
    let mut ops: Vec<_> = txn.writes.iter().map(|write| operation(core, write)).collect();
    ops.push(TxnOp::put(own, "", None));
    if txn.writes.iter().any(|write| matches!(write, Write::Put { .. })) {
        return ops;
    }
    // Deletions of what is not there change nothing, so they must leave no record either: that would take a revision.
    let absent = |write: &Write| Compare::create_revision(core.space.data(write.key()), CompareOp::Equal, 0);
    let all_absent: Vec<_> = txn.writes.iter().map(absent).collect();
    vec![TxnOp::txn(EtcdTxn::new().when(all_absent).or_else(ops))]
}

fn operation(core: &Core, write: &Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0.cast_signed()));
            TxnOp::put(core.space.data(key), &value[..], options)
        }
        Write::Delete { key } => TxnOp::delete(core.space.data(key), None),
    }
}

/// Whether a transaction that has writes was carried out and found nothing to do.
fn no_effect(txn: &Txn, answer: &TxnResponse) -> bool {
    use etcd_client::TxnOpResponse;
    let nothing = |op: &TxnOpResponse| matches!(op, TxnOpResponse::Txn(inner) if inner.succeeded());
    answer.succeeded() && !txn.writes.is_empty() && answer.op_responses().iter().any(nothing)
}

fn judge(core: &Core, known: &Known, txn: &Txn, expected: Record, answer: &TxnResponse) -> Result<Verdict> {
    let n = core.cluster.note(answer.header()).map_err(Failure::into_store_error)?;
    if answer.succeeded() {
        if txn.writes.is_empty() || no_effect(txn, answer) {
            core.hub.want(n);
        } else {
            core.count_commit();
        }
        return Ok(Verdict::Committed(i64::try_from(n).unwrap_or(i64::MAX)));
    }
    let answers = answer.op_responses();
    let mut heads = answers.iter().map(found);
    let (meta, record) = (heads.next().flatten(), heads.next().flatten());
    match (record, expected) {
        (Some(kv), _) if kv.value() != VOID => return Ok(Verdict::Committed(kv.mod_revision())),
        (Some(kv), Record::Void(at)) if kv.mod_revision() == at => {}
        (Some(kv), _) => return Ok(Verdict::Void(kv.mod_revision())),
        (None, Record::Void(_)) => return Ok(Verdict::Forgotten),
        (None, Record::Absent) => {}
    }
    let Some(meta) = meta else {
        let detail = "what is known of the cloud was deleted from etcd; restore a backup".into();
        return Err(StoreError::Refused { detail });
    };
    if meta.mod_revision() != known.modified {
        return Ok(Verdict::Moved(Known::parse(&meta).map_err(Failure::into_store_error)?));
    }
    let heads: Vec<_> = heads.collect();
    refusal(core, known, txn, &heads).map(Verdict::Refused).ok_or_else(|| StoreError::Refused {
        detail: "etcd says that a condition does not hold, and shows that all hold; this is an error of etcd or of this program".into(),
    })
}

/// The first guard that does not hold, or the first lease that is gone.
fn refusal(core: &Core, known: &Known, txn: &Txn, heads: &[Option<KeyValue>]) -> Option<Result<CommitOutcome>> {
    let (guarded, leased) = heads.split_at_checked(txn.guards.len())?;
    for (index, (guard, head)) in txn.guards.iter().zip(guarded).enumerate() {
        let at = head.as_ref().map(KeyValue::mod_revision);
        let holds = match guard {
            Guard::Revision(_, wanted) => at == Some(wanted_revision(known, *wanted)),
            Guard::Absent(_) => at.is_none(),
            Guard::Present(_) | Guard::LeaseAlive(_) => at.is_some(),
        };
        if !holds {
            let actual = at.filter(|_| !matches!(guard, Guard::LeaseAlive(_))).map(|n| core.revision(n));
            return Some(Ok(CommitOutcome::GuardFailed { index, guard: guard.clone(), actual }));
        }
    }
    let gone = leases(txn).into_iter().zip(leased).find(|(_, marker)| marker.is_none());
    gone.map(|(lease, _)| Err(StoreError::LeaseGone(lease)))
}
