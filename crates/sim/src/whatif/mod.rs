//! What would happen if: the control plane's own reconcilers over a copy of the live state, under virtual time.
//!
//! The copy lies in a store of its own in memory, so nothing that happens here reaches the cloud it was taken from. Placement, liveness and
//! every other decision are those of the product; the nodes are stand-ins that keep their lease, or lose it, and start what is placed on
//! them after a while.
//!
//! Start reading at [`ask`], then [`seed`](self) (what is copied) and [`play`](self) (what the stand-ins do).

mod play;
pub mod scale;
mod seed;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use oblak_model::{Image, Instance, InstanceId, Isolation, Node, NodeId, Phase, Port, Timestamp, Volume};
use serde::Serialize;

/// Longest virtual time that is played; what has not come to rest by then is said to be still moving.
pub const LONGEST: Duration = Duration::from_secs(1800);

/// A cloud as it was read: everything that a placement looks at.
#[derive(Clone, Debug, Default)]
pub struct LiveState {
    /// When it was read.
    pub at: Timestamp,
    /// Nodes.
    pub nodes: Vec<Node>,
    /// Instances of all projects.
    pub instances: Vec<Instance>,
    /// Their ports.
    pub ports: Vec<Port>,
    /// Volumes of all projects.
    pub volumes: Vec<Volume>,
    /// Images of all projects.
    pub images: Vec<Image>,
}

/// What is to happen.
#[derive(Clone, Debug)]
pub enum Question {
    /// These nodes lose their power, all at once.
    NodesDown(BTreeSet<NodeId>),
    /// These nodes join.
    NodesAdded(Vec<Node>),
}

/// What becomes of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It runs on another node.
    Moves,
    /// It waited, and gets a node.
    Placed,
    /// It fits on no node that is left.
    DoesNotFit,
    /// It was being moved when the time was over.
    Moving,
}

/// One instance of which something changes.
#[derive(Clone, Debug, Serialize)]
pub struct Fate {
    /// Project.
    pub project: String,
    /// Name.
    pub instance: String,
    /// Id.
    pub id: InstanceId,
    /// How it is isolated.
    pub isolation: Isolation,
    /// Where it is; none when it waits.
    pub from: Option<String>,
    /// Where it would be.
    pub to: Option<String>,
    /// What becomes of it.
    pub outcome: Outcome,
    /// Virtual seconds from the event until it runs again; none when it does not.
    pub seconds: Option<f64>,
    /// Why there, or why nowhere.
    pub why: String,
}

/// What would happen.
#[derive(Clone, Debug, Serialize)]
pub struct Answer {
    /// Of every instance that is concerned, by outcome, project and name.
    pub instances: Vec<Fate>,
    /// Virtual seconds from the event until nothing moved any more.
    pub seconds: f64,
    /// Commits of the control plane and its nodes on the way.
    pub commits: u64,
}

impl Answer {
    /// How many have this outcome.
    #[must_use]
    pub fn count(&self, outcome: Outcome) -> usize {
        self.instances.iter().filter(|fate| fate.outcome == outcome).count()
    }
}

/// Why a question could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum WhatIfError {
    /// The copy.
    #[error("the copy of the state cannot be used: {0}")]
    Store(#[from] oblak_store::StoreError),
    /// The copy refused something that must be possible there.
    #[error("the copy of the state cannot be used: {0}")]
    Copy(String),
    /// No thread or timer.
    #[error("the simulation cannot start: {0}")]
    Runtime(#[from] std::io::Error),
}

/// Plays it through and tells what becomes of every instance concerned. Everything happens in this thread; must not be called from within a
/// runtime.
///
/// A node that goes down is noticed when its lease ends, `lease` after its last heartbeat, as in the product. Then its instances are
/// evacuated: each gives back its reservation there and waits for another node.
///
/// # Errors
/// The copy cannot be set up; that something does not fit is no error but the answer.
pub fn ask(state: &LiveState, question: &Question, lease: Duration) -> Result<Answer, WhatIfError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    runtime.block_on(async {
        let mut play = play::Play::begin(state, question, lease).await?;
        play.run().await?;
        Ok(answer(state, question, &play.end().await?))
    })
}

/// What the copy looks like at the end.
struct Ending {
    instances: BTreeMap<InstanceId, Instance>,
    /// When it ran again after the event.
    running: BTreeMap<InstanceId, Duration>,
    took: Duration,
    commits: u64,
}

fn answer(state: &LiveState, question: &Question, ending: &Ending) -> Answer {
    let mut instances: Vec<Fate> = state.instances.iter().filter_map(|before| fate(before, question, ending)).collect();
    instances.sort_by(|a, b| (a.outcome, &a.project, &a.instance).cmp(&(b.outcome, &b.project, &b.instance)));
    Answer { instances, seconds: round(ending.took), commits: ending.commits }
}

/// To the millisecond.
fn round(time: Duration) -> f64 {
    time.as_millis() as f64 / 1000.0
}

fn fate(before: &Instance, question: &Question, ending: &Ending) -> Option<Fate> {
    let id = InstanceId(before.metadata.id);
    let old = before.status.placement.as_ref();
    let concerned = match question {
        Question::NodesDown(down) => old.is_some_and(|placement| down.contains(&placement.node)),
        Question::NodesAdded(_) => old.is_none(),
    };
    let after = ending.instances.get(&id)?;
    if !concerned || before.metadata.is_deleting() {
        return None;
    }
    let (status, seconds) = (&after.status, ending.running.get(&id).copied().map(round));
    let new = status.placement.as_ref();
    let (outcome, why) = match (new, status.phase) {
        (Some(placement), _) if old.is_some_and(|old| old.node == placement.node) => {
            (Outcome::Moving, status.message.clone())
        }
        (Some(placement), Phase::Scheduled) => (Outcome::Moving, placement.why.clone()),
        (Some(placement), _) => (if old.is_some() { Outcome::Moves } else { Outcome::Placed }, placement.why.clone()),
        (None, _) if status.reason == play::EVACUATED => (Outcome::Moving, status.message.clone()),
        (None, _) => (Outcome::DoesNotFit, status.message.clone()),
    };
    Some(Fate {
        project: before.scope_key().into(),
        instance: before.metadata.name.clone(),
        id,
        isolation: before.status.resolved.isolation,
        from: old.map(|placement| placement.node_name.clone()),
        to: new.filter(|_| outcome != Outcome::Moving).map(|placement| placement.node_name.clone()),
        outcome,
        seconds,
        why,
    })
}
