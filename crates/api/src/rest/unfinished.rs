//! Deletions that a server began and did not live to end.
//!
//! A deletion in two steps (see [`super::delete`]) that was cut off between them leaves an object that nobody can use and nobody removes.
//! Every server looks for such objects and does what the request would have done next: one guarded commit that removes the object, or takes the
//! mark back while something uses it. Two servers that do so at once are harmless, as is one that is killed meanwhile.

use std::sync::Arc;
use std::time::Duration;

use oblak_model::{Kind, Timestamp};

use super::delete::resume;
use crate::docs::{self, Item, UNFINISHED};
use crate::state::App;

/// How often it is looked.
const LOOK: Duration = Duration::from_secs(30);
/// A request that is alive has taken its second step long before.
const ALIVE: Duration = Duration::from_secs(60);
/// Deletions that are finished in one look.
const PER_LOOK: usize = 100;

/// Looks at the start and from time to time until the server stops.
pub(crate) async fn finish_deletions(app: App) {
    let stopping = app.stopping.clone();
    loop {
        for item in app.docs.find(UNFINISHED, "").into_iter().take(PER_LOOK) {
            finish(&app, &item).await;
        }
        tokio::select! {
            biased;
            () = stopping.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Whether the request that began at `since` must have ended by now.
fn is_left(since: Option<Timestamp>, now: Timestamp) -> bool {
    since.is_some_and(|since| now.since(since) > ALIVE)
}

async fn finish(app: &App, item: &Arc<Item>) {
    let mut segments = item.key.segments();
    let (Some(kind), Some(scope)) = (segments.next(), segments.next()) else { return };
    macro_rules! of_kind {
        ($($kind:ty),* $(,)?) => {
            $(
                if kind == <$kind>::KIND {
                    let object = match docs::object::<$kind>(item) {
                        Ok(object) => object,
                        Err(error) => return tracing::warn!(%error, "a deletion that was cut off cannot be finished"),
                    };
                    if !is_left(object.metadata.deleted_at, app.now()) {
                        return;
                    }
                    let about = object.describe();
                    match resume::<$kind>(app, scope, object.metadata.id).await {
                        Ok(Ok(_)) => tracing::info!(object = about, scope, "finished a deletion that was cut off"),
                        Ok(Err(error)) => {
                            tracing::info!(object = about, scope, why = error.detail, "took back a deletion that was cut off");
                        }
                        Err(error) => tracing::warn!(object = about, scope, %error, "cannot finish a deletion yet"),
                    }
                }
            )*
        };
    }
    oblak_model::for_each_kind!(of_kind);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_under_way_is_left_alone() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        assert!(!is_left(None, at(1000)));
        assert!(!is_left(Some(at(1000)), at(1060)));
        assert!(!is_left(Some(at(1000)), at(900)), "the clock was set back");
        assert!(is_left(Some(at(1000)), at(1061)));
    }
}
