//! Waiting until an object is as wanted, and saying what happens until then.

use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use oblak_client::{ListOptions, Watch, WatchEvent};
use oblak_model::{Instance, Kind, Object, Revision, Span};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::error::{CliError, Result, TIMEOUT};
use crate::out::Out;
use crate::session::Session;
use crate::table::one_line;

/// A step is asked for again after this long without a change: some of them look at the clock.
const TICK: Duration = Duration::from_secs(1);
/// Pause before a broken watch is begun anew.
const PAUSE: Duration = Duration::from_millis(300);
/// Away from a terminal a change of the message alone is not said more often.
const SAY_EVERY: Duration = Duration::from_secs(5);

/// What a step says: break with a result, or go on.
pub type Step<T> = ControlFlow<Result<T>>;

/// Calls `step` with the object (`None` when it is gone) at every change until it breaks or the time is over.
///
/// # Errors
/// What the step breaks with; code 5 when it does not in time; a server that refuses.
pub async fn until<K: Kind, T>(
    session: &Session,
    id: Uuid,
    what: &str,
    limit: Span,
    mut step: impl FnMut(Option<&Object<K>>) -> Step<T>,
) -> Result<T> {
    let deadline = Instant::now() + limit.0;
    let options = ListOptions { fields: vec![format!("metadata.id={id}")], ..ListOptions::default() };
    let mut away = Away::new(session.out);
    loop {
        let page = timeout_at(deadline, session.client.list::<K>(&session.project, &options)).await;
        let mut page = match page {
            Err(_) => return Err(late(what, limit)),
            Ok(Err(error)) if error.is_retryable() && Instant::now() < deadline => {
                away.say(&error.to_string());
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            Ok(Err(error)) => return Err(error.into()),
            Ok(Ok(page)) => page,
        };
        away.over();
        let mut last = page.items.pop();
        if let ControlFlow::Break(result) = step(last.as_ref()) {
            return result;
        }
        if let Ok(Ok(watch)) = timeout_at(deadline, watch::<K>(session, page.revision, &options)).await
            && let ControlFlow::Break(result) = follow(watch, id, deadline, &mut last, &mut away, &mut step).await
        {
            return result;
        }
        if Instant::now() >= deadline {
            return Err(late(what, limit));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn watch<K: Kind>(session: &Session, from: Revision, options: &ListOptions) -> oblak_client::Result<Watch<K>> {
    session.client.watch::<K>(&session.project, from, options).await
}

/// Says that no server answers, once for each time that it happens.
struct Away {
    out: Out,
    said: bool,
}

impl Away {
    fn new(out: Out) -> Self {
        Self { out, said: false }
    }
    fn say(&mut self, why: &str) {
        if !self.said {
            self.out.note(&format!("{}; trying again, the cloud goes on without us", one_line(why)));
            self.said = true;
        }
    }
    fn over(&mut self) {
        if std::mem::take(&mut self.said) {
            self.out.note("a server answers again");
        }
    }
}

/// Follows one watch; goes on (with a new list) when the watch ends.
async fn follow<K: Kind, T>(
    mut watch: Watch<K>,
    id: Uuid,
    deadline: Instant,
    last: &mut Option<Object<K>>,
    away: &mut Away,
    step: &mut impl FnMut(Option<&Object<K>>) -> Step<T>,
) -> Step<T> {
    loop {
        let tick = (Instant::now() + TICK).min(deadline);
        let next = timeout_at(tick, watch.next()).await;
        match watch.interrupted() {
            Some(why) => away.say(why),
            None => away.over(),
        }
        match next {
            Err(_) if Instant::now() >= deadline => return ControlFlow::Continue(()),
            Err(_) => step(last.as_ref())?,
            Ok(Ok(WatchEvent::Put(object, _))) if object.metadata.id == id => {
                *last = Some(*object);
                step(last.as_ref())?;
            }
            Ok(Ok(WatchEvent::Delete(gone, ..))) if gone == id => {
                *last = None;
                step(None)?;
            }
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return ControlFlow::Continue(()),
        }
    }
}

/// The error when the time is over.
pub fn late(what: &str, limit: Span) -> CliError {
    CliError::new(
        format!("{what} did not happen within {limit}"),
        "it goes on without us: `oblak events` shows what happens; wait longer with --timeout",
    )
    .with_code(TIMEOUT)
}

/// Live progress on standard error: one line that changes on a terminal, lines elsewhere.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    out: Out,
    kept: Kept,
    began: Instant,
}

/// What has been said last, to say only what is new.
#[derive(Debug, Default)]
struct Kept {
    state: String,
    message: String,
    at: Option<Instant>,
}

impl Progress {
    pub fn new(out: Out) -> Self {
        let bar = (!out.quiet && std::io::stderr().is_terminal()).then(|| {
            let style = if out.color_errors { "{spinner:.cyan} {wide_msg}" } else { "{spinner} {wide_msg}" };
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, out, kept: Kept::default(), began: Instant::now() }
    }

    /// Says a state and what goes on in it.
    pub fn say(&mut self, state: &str, message: &str) {
        let text = if message.is_empty() { state.to_string() } else { format!("{state}: {}", one_line(message)) };
        if let Some(bar) = &self.bar {
            bar.set_message(text);
        } else if self.is_new(state, message) {
            self.out.note(&text);
        }
    }

    fn is_new(&mut self, state: &str, message: &str) -> bool {
        let other = self.kept.message != message && self.kept.at.is_none_or(|at| at.elapsed() >= SAY_EVERY);
        let new = self.kept.state != state || other;
        if new {
            self.kept = Kept { state: state.into(), message: message.into(), at: Some(Instant::now()) };
        }
        new
    }

    /// Clears the line and gives the time since the beginning.
    pub fn end(self) -> Duration {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.began.elapsed()
    }
}

/// `web starting` and the message: what [`Progress::say`] wants to hear of an instance.
pub fn say_instance(progress: &mut Progress, instance: &Instance) {
    let status = &instance.status;
    let node = status.placement.as_ref().map(|p| format!(" on {}", p.node_name)).unwrap_or_default();
    progress.say(&format!("{} {}{node}", instance.metadata.name, status.phase), &status.message);
}

/// `4.2 s`, `3 min 10 s`.
pub fn took(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        s => format!("{} min {} s", s / 60, s % 60),
    }
}

/// The object was deleted while somebody waited for it.
pub fn deleted<T>(kind: &str, name: &str) -> Step<T> {
    ControlFlow::Break(Err(CliError::new(
        format!("{kind} {name:?} was deleted meanwhile"),
        "`oblak events` shows what happened",
    )
    .with_code(crate::error::NOT_FOUND)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_are_said_once() {
        let mut p = Progress {
            bar: None,
            out: Out { format: None, color: false, color_errors: false, quiet: true },
            kept: Kept::default(),
            began: Instant::now(),
        };
        assert!(p.is_new("web pending", ""));
        assert!(!p.is_new("web pending", ""));
        // Percentages change often: they wait.
        assert!(!p.is_new("web pending", "building 40 %"));
        p.kept.at = Instant::now().checked_sub(SAY_EVERY);
        assert!(p.is_new("web pending", "building 41 %"));
        assert!(p.is_new("web running", ""));
        assert!(p.end() < Duration::from_secs(60));
    }

    #[test]
    fn times() {
        assert_eq!(took(Duration::from_millis(4240)), "4.2 s");
        assert_eq!(took(Duration::from_secs(190)), "3 min 10 s");
    }
}
