//! From a draft to an answer: commit, and when somebody else was faster look again and try again.

use std::time::Duration;

use oblak_model::{ApiError, Code, Revision};
use oblak_store::{CommitOutcome, TxnId, commit_settled};

use crate::draft::Draft;
use crate::error::store_error;
use crate::state::App;

/// How often a change is planned anew because something it depends on has changed.
const ATTEMPTS: u32 = 12;
/// First pause after a conflict; doubled each time, with jitter.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(50);
/// How long to wait until the cache shows our own commit; reads of other callers do not depend on it.
const OWN_COMMIT: Duration = Duration::from_secs(2);

/// Plans with `build`, commits, and plans again when a guard failed. `build` decides with what the cache shows, so a conflict that is the
/// caller's (name taken, wrong revision) comes out of it as an error in the next round.
///
/// Answers the revision of the commit, or the current one when there was nothing to write.
pub(crate) async fn transact<R>(
    app: &App,
    mut build: impl FnMut(&mut Draft) -> Result<R, ApiError>,
) -> Result<(R, Revision), ApiError> {
    let mut pause = FIRST_PAUSE;
    let mut blocked = None;
    for attempt in 0..ATTEMPTS {
        let mut draft = Draft::new(app);
        let result = build(&mut draft)?;
        let (batch, claimed) = draft.finish();
        if batch.is_empty() {
            return Ok((result, app.docs.revision()));
        }
        let txn = batch.into_txn(TxnId(app.uuid()));
        match commit_settled(&*app.store, txn).await.map_err(|e| store_error(&e))? {
            CommitOutcome::Committed(revision) => {
                app.metrics.committed();
                shown(app, revision).await;
                drop(claimed);
                return Ok((result, revision));
            }
            CommitOutcome::GuardFailed { guard, actual, .. } => {
                app.metrics.conflicted();
                drop(claimed);
                catch_up(app, actual).await?;
                blocked = Some(guard);
                if attempt > 0 {
                    tokio::time::sleep(jitter(app, pause)).await;
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
            CommitOutcome::Unknown(id) => match app.store.outcome(id).await {
                Ok(Some(revision)) => {
                    shown(app, revision).await;
                    return Ok((result, revision));
                }
                Ok(None) => {}
                Err(error) => return Err(unknown(&error.to_string())),
            },
        }
    }
    Err(match blocked {
        Some(guard) => ApiError::new(Code::Conflict, "what this change depends on kept changing; try again")
            .inside(format!("guard failed {ATTEMPTS} times, last {guard:?}")),
        None => unknown("the outcome stayed unknown"),
    })
}

fn unknown(inside: &str) -> ApiError {
    ApiError::new(
        Code::Unavailable,
        "the store did not say whether the change was made; repeat the request with the same Idempotency-Key",
    )
    .inside(inside)
}

async fn shown(app: &App, revision: Revision) {
    if app.docs.wait_for(revision, OWN_COMMIT).await.is_err() {
        tracing::warn!(%revision, "the cache is behind our own commit");
    }
}

/// Waits until the cache shows what made the guard fail.
async fn catch_up(app: &App, actual: Option<Revision>) -> Result<(), ApiError> {
    let target = match actual {
        Some(revision) => revision,
        None => app.store.revision().await.map_err(|e| store_error(&e))?,
    };
    app.caught_up(target).await
}

fn jitter(app: &App, pause: Duration) -> Duration {
    let mut byte = [0u8; 1];
    app.random.fill(&mut byte);
    pause / 2 + pause * u32::from(byte[0]) / 512
}
