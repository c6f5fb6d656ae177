//! What to do about the members of a cluster that we run ourselves: votes, places that nobody took, space. Deciding is pure; [`Keeper`]
//! looks and acts.
//!
//! The number of votes is odd: of two members one votes, of four three do, because an even number survives no more than one less and is
//! stopped by more. etcd 3.4 has room for one learner at a time.

use std::collections::BTreeMap;
use std::time::Duration;

use oblak_store::{Result, Store, StoreError};
use tokio::time::Instant;

use crate::admin::{Admin, Alarm, AlarmKind, Member, Status};
use crate::{EtcdOptions, EtcdStore};

/// A place that nobody takes within this time is given up.
const COMING: Duration = Duration::from_secs(900);
/// Smaller databases are not worth the pause.
const WORTH_BYTES: u64 = 128 << 20;

/// All that is known of a cluster at one moment.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Its members.
    pub members: Vec<Member>,
    /// What those say that answer, by member; otherwise why they do not.
    pub statuses: BTreeMap<u64, Result<Status, String>>,
    /// Alarms.
    pub alarms: Vec<Alarm>,
}

impl View {
    /// The member that leads, in the opinion of those that answer.
    #[must_use]
    pub fn leader(&self) -> Option<u64> {
        self.statuses.values().flatten().map(|status| status.leader).find(|leader| *leader != 0)
    }

    /// How many members vote.
    #[must_use]
    pub fn voters(&self) -> usize {
        self.members.iter().filter(|member| !member.learner).count()
    }

    /// URLs for clients, voters first: learners answer nobody.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        let of = |learner: bool| self.members.iter().filter(move |member| member.learner == learner);
        of(false).chain(of(true)).filter_map(|member| member.client_urls.first().cloned()).collect()
    }

    fn answers(&self, id: u64) -> bool {
        self.statuses.get(&id).is_some_and(Result::is_ok)
    }
}

/// The largest odd number of votes among so many members.
#[must_use]
pub fn votes_wanted(members: usize) -> usize {
    if members.is_multiple_of(2) { members.saturating_sub(1) } else { members }
}

/// What should be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Give a learner a vote.
    Promote(u64),
    /// Remove a member that never came.
    GiveUp(u64),
    /// Give the unused space of our own member back.
    Defragment,
    /// Make room: compact, defragment all, clear the alarm.
    MakeRoom,
}

/// Decides. `own` is our member; `waiting` are places and since when nobody takes them; `turn` counts up with each minute, so that
/// members take turns with what stops them for a moment.
#[must_use]
pub fn plan(view: &View, own: u64, waiting: &BTreeMap<u64, Duration>, turn: u64) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut voters = view.voters();
    for member in view.members.iter().filter(|member| member.learner) {
        if member.name.is_empty() {
            if waiting.get(&member.id).is_some_and(|since| *since >= COMING) {
                steps.push(Step::GiveUp(member.id));
            }
        } else if voters < votes_wanted(view.members.len()) && view.answers(member.id) {
            steps.push(Step::Promote(member.id));
            voters += 1;
        }
    }
    let first = view.members.iter().filter(|member| view.answers(member.id)).map(|member| member.id).min();
    let no_space = view.alarms.iter().any(|alarm| alarm.kind == AlarmKind::NoSpace);
    if no_space && first == Some(own) {
        steps.push(Step::MakeRoom);
    } else if let Some(Ok(status)) = view.statuses.get(&own) {
        let half_empty =
            status.bytes >= WORTH_BYTES && status.bytes_in_use > 0 && status.bytes_in_use < status.bytes / 2;
        // All others must be there: a member that is defragmented answers nothing meanwhile.
        let all_there = view.members.iter().all(|member| view.answers(member.id));
        let index = view.members.iter().position(|member| member.id == own).unwrap_or(0) as u64;
        if half_empty && all_there && turn % view.members.len().max(1) as u64 == index {
            steps.push(Step::Defragment);
        }
    }
    steps
}

/// Looks after the members from one of their servers.
pub struct Keeper {
    admin: Admin,
    options: EtcdOptions,
    waiting: BTreeMap<u64, Instant>,
}

impl Keeper {
    /// With the options of the store; the endpoints are replaced as members come and go.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when the options contradict each other.
    pub fn new(options: EtcdOptions) -> Result<Self> {
        Ok(Self { admin: Admin::new(&options)?, options, waiting: BTreeMap::new() })
    }

    /// Uses other servers or certificates from now on.
    ///
    /// # Errors
    /// As for [`Keeper::new`].
    pub fn retarget(&mut self, options: EtcdOptions) -> Result<()> {
        self.admin = Admin::new(&options)?;
        self.options = options;
        Ok(())
    }

    /// The connections, for single questions.
    #[must_use]
    pub fn admin(&self) -> &Admin {
        &self.admin
    }

    /// Looks at all members.
    ///
    /// # Errors
    /// No member answers, or the cluster has no leader.
    pub async fn look(&mut self) -> Result<View> {
        let view = look(&self.admin, &self.options).await?;
        let now = Instant::now();
        let unstarted: Vec<u64> = view.members.iter().filter(|m| m.name.is_empty()).map(|m| m.id).collect();
        self.waiting.retain(|id, _| unstarted.contains(id));
        for id in unstarted {
            self.waiting.entry(id).or_insert(now);
        }
        Ok(view)
    }

    /// What should be done now.
    #[must_use]
    pub fn plan(&self, view: &View, own: u64, turn: u64) -> Vec<Step> {
        let waiting = self.waiting.iter().map(|(id, since)| (*id, since.elapsed())).collect();
        plan(view, own, &waiting, turn)
    }
}

impl Keeper {
    /// etcd is out of space: forgets the past, gives its space back everywhere, and takes writes again where that was enough.
    ///
    /// # Errors
    /// A member does not answer; those before it have their space back.
    pub async fn make_room(&self, view: &View, own: u64, store: &EtcdStore) -> Result<()> {
        tracing::warn!("etcd is out of space; making room");
        store.compact(store.revision().await?).await?;
        let url = |id: u64| view.members.iter().find(|member| member.id == id)?.client_urls.first().cloned();
        // The leader last, which spares an election.
        let leader = view.leader().unwrap_or(own);
        let order = view.members.iter().map(|member| member.id).filter(|id| *id != leader).chain([leader]);
        let endpoints: Vec<_> = order.filter(|id| view.answers(*id)).filter_map(url).collect();
        let ordered = Admin::new(&EtcdOptions { endpoints, ..self.options.clone() })?;
        ordered.defragment().await?;
        for alarm in view.alarms.iter().filter(|alarm| alarm.kind == AlarmKind::NoSpace) {
            // It comes back by itself when that was not enough.
            self.admin.clear(*alarm).await?;
        }
        Ok(())
    }
}

/// Looks at all members, over connections to some of them.
///
/// # Errors
/// As for [`Keeper::look`].
pub async fn look(admin: &Admin, options: &EtcdOptions) -> Result<View> {
    let members = admin.members().await?;
    let urls: Vec<(u64, String)> =
        members.iter().filter_map(|member| Some((member.id, member.client_urls.first()?.clone()))).collect();
    let each = EtcdOptions { endpoints: urls.iter().map(|(_, url)| url.clone()).collect(), ..options.clone() };
    let statuses = match urls.is_empty() {
        true => Vec::new(),
        false => Admin::new(&each)?.statuses().await,
    };
    let statuses = urls.iter().zip(statuses).map(|((id, _), (_, status))| (*id, status.map_err(|e| e.to_string())));
    let statuses = statuses.collect();
    let alarms = admin.alarms().await?;
    Ok(View { members, statuses, alarms })
}

/// Makes a place for one more member, as a learner. Doing it again changes nothing.
///
/// # Errors
/// [`StoreError::Refused`] when another member has the address, [`StoreError::Unreachable`] when the one before has not caught up yet.
pub async fn admit(admin: &Admin, options: &EtcdOptions, peer_url: &str) -> Result<View> {
    let view = look(admin, options).await?;
    if view.members.iter().any(|member| member.peer_urls.iter().any(|url| url == peer_url)) {
        return Ok(view);
    }
    let learners: Vec<_> = view.members.iter().filter(|member| member.learner).collect();
    for learner in &learners {
        if learner.name.is_empty() {
            let detail = format!("another server ({}) was let in and has not come yet", learner.peer_urls.join(", "));
            return Err(StoreError::Unreachable { detail });
        }
        admin.promote(learner.id).await.map_err(|e| not_yet(&learner.name, e))?;
    }
    admin.add_learner(peer_url).await?;
    look(admin, options).await
}

fn not_yet(name: &str, error: StoreError) -> StoreError {
    match error {
        StoreError::Refused { detail } if detail.contains("in sync") || detail.contains("not ready") => {
            StoreError::Unreachable { detail: format!("server {name} is still copying the state; {detail}") }
        }
        error => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: [Step; 0] = [];

    fn member(id: u64, learner: bool, name: &str) -> Member {
        let url = |port| vec![format!("https://192.0.2.{id}:{port}")];
        Member { id, name: name.into(), peer_urls: url(2380), client_urls: url(2379), learner }
    }

    fn status(member: u64, bytes: u64, bytes_in_use: u64) -> Result<Status, String> {
        let version = "3.4.23".into();
        Ok(Status { member, leader: 1, version, bytes, bytes_in_use, term: 2, errors: Vec::new() })
    }

    fn view(members: Vec<Member>) -> View {
        let statuses = members.iter().filter(|m| !m.name.is_empty()).map(|m| (m.id, status(m.id, 1, 1))).collect();
        View { members, statuses, alarms: Vec::new() }
    }

    #[test]
    fn votes_are_odd() {
        assert_eq!((0..8).map(votes_wanted).collect::<Vec<_>>(), [0, 1, 1, 3, 3, 5, 5, 7]);
    }

    #[test]
    fn the_second_learns_until_the_third_is_there() {
        let none = BTreeMap::new();
        let two = view(vec![member(1, false, "a"), member(2, true, "b")]);
        assert_eq!(plan(&two, 1, &none, 0), NOTHING);
        // The third is let in when the second votes already.
        let three = view(vec![member(1, false, "a"), member(2, false, "b"), member(3, true, "c")]);
        assert_eq!(plan(&three, 1, &none, 0), [Step::Promote(3)]);
        let unstarted = view(vec![member(1, false, "a"), member(2, false, "b"), member(3, true, "")]);
        assert_eq!(plan(&unstarted, 1, &none, 0), NOTHING);
        let four = view((1..4).map(|n| member(n, false, "x")).chain([member(4, true, "d")]).collect());
        assert_eq!(plan(&four, 1, &none, 0), NOTHING);
        // One that does not answer gets no vote.
        let mut silent = three.clone();
        silent.statuses.insert(3, Err("away".into()));
        assert_eq!(plan(&silent, 1, &none, 0), NOTHING);
    }

    #[test]
    fn a_place_that_nobody_takes_is_given_up() {
        let view = view(vec![member(1, false, "a"), member(2, true, "")]);
        let since = |seconds| BTreeMap::from([(2, Duration::from_secs(seconds))]);
        assert_eq!(plan(&view, 1, &since(60), 0), NOTHING);
        assert_eq!(plan(&view, 1, &since(901), 0), [Step::GiveUp(2)]);
    }

    #[test]
    fn space_is_given_back_in_turns_and_made_by_one() {
        let none = BTreeMap::new();
        let mut view = view((1..4).map(|n| member(n, false, "x")).collect());
        view.statuses.insert(2, status(2, 1 << 30, 1 << 20));
        assert_eq!((0..6).filter(|turn| !plan(&view, 2, &none, *turn).is_empty()).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(plan(&view, 1, &none, 0), NOTHING);
        view.alarms = vec![Alarm { member: 2, kind: AlarmKind::NoSpace }];
        assert_eq!(plan(&view, 1, &none, 0), [Step::MakeRoom]);
        assert_eq!(plan(&view, 2, &none, 0), NOTHING);
        view.statuses.insert(3, Err("away".into()));
        view.alarms.clear();
        assert_eq!(plan(&view, 2, &none, 1), NOTHING, "not while another is away");
    }

    #[test]
    fn voters_come_first_for_clients() {
        let view = view(vec![member(2, true, "b"), member(1, false, "a")]);
        assert_eq!(view.endpoints(), ["https://192.0.2.1:2379", "https://192.0.2.2:2379"]);
        assert_eq!((view.leader(), view.voters()), (Some(1), 1));
    }
}
