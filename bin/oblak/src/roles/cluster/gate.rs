//! What the API may ask and do about the members.

use std::time::Duration;

use async_trait::async_trait;
use oblak_api::{Cluster, ClusterLook, Room};
use oblak_model::members::{MemberAddress, MemberRole, StoreMember};
use oblak_model::{ApiError, Code};
use oblak_platform::layout::Layout;
use oblak_store::StoreError;
use oblak_store_etcd::EtcdOptions;
use oblak_store_etcd::admin::{Admin, AlarmKind, Member};
use oblak_store_etcd::members::{self, View};
use tokio::time::Instant;

use super::file::MemberFile;

/// A server that has just come back counts as one that is there after so long.
const CONNECTED: Duration = Duration::from_secs(12);
const PAUSE: Duration = Duration::from_millis(500);

/// The members, seen from this server.
pub struct Gate {
    layout: Layout,
    own: String,
}

impl Gate {
    pub fn new(layout: Layout, own: String) -> Self {
        Self { layout, own }
    }

    fn file(&self) -> Result<MemberFile, ApiError> {
        let file = MemberFile::load(&self.layout).map_err(|e| ApiError::internal(format!("{e:#}")))?;
        file.ok_or_else(|| ApiError::internal("the file of this member is gone"))
    }

    fn options(&self) -> Result<(MemberFile, EtcdOptions, Admin), ApiError> {
        let file = self.file()?;
        let options = file.options(&self.layout).map_err(|e| ApiError::internal(format!("{e:#}")))?;
        let admin = Admin::new(&options).map_err(|e| problem(&e))?;
        Ok((file, options, admin))
    }
}

fn problem(error: &StoreError) -> ApiError {
    match error {
        StoreError::Unreachable { .. } => ApiError::new(Code::Unavailable, error.to_string()),
        StoreError::Quota { .. } => ApiError::new(Code::StorageFull, error.to_string()),
        _ => ApiError::new(Code::WrongState, error.to_string()),
    }
}

fn shown(view: &View, member: &Member) -> StoreMember {
    let mut shown = StoreMember {
        name: member.name.clone(),
        id: format!("{:x}", member.id),
        role: match (member.name.is_empty(), member.learner) {
            (true, _) => MemberRole::Unstarted,
            (_, true) => MemberRole::Learner,
            _ => MemberRole::Voter,
        },
        leader: view.leader() == Some(member.id),
        url: member.client_urls.first().cloned().unwrap_or_default(),
        peer_url: member.peer_urls.first().cloned().unwrap_or_default(),
        ..StoreMember::default()
    };
    match view.statuses.get(&member.id) {
        Some(Ok(status)) => {
            shown.healthy = status.errors.is_empty();
            shown.problem = status.errors.join("; ");
            shown.version.clone_from(&status.version);
            (shown.bytes, shown.bytes_in_use) = (status.bytes, status.bytes_in_use);
        }
        Some(Err(error)) => shown.problem.clone_from(error),
        None => shown.problem = "it has not come yet".into(),
    }
    shown
}

#[async_trait]
impl Cluster for Gate {
    async fn look(&self) -> Result<ClusterLook, ApiError> {
        let (file, options, admin) = self.options()?;
        let view = members::look(&admin, &options).await.map_err(|e| problem(&e))?;
        let alarm = |alarm: &oblak_store_etcd::admin::Alarm| {
            let kind = match alarm.kind {
                AlarmKind::NoSpace => "nospace",
                AlarmKind::Corrupt => "corrupt",
            };
            let name = view.members.iter().find(|member| member.id == alarm.member).map(|member| member.name.clone());
            format!("{kind} on {}", name.unwrap_or_else(|| format!("{:x}", alarm.member)))
        };
        let mut shown: Vec<_> = view.members.iter().map(|member| shown(&view, member)).collect();
        shown.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ClusterLook {
            members: shown,
            alarms: view.alarms.iter().map(alarm).collect(),
            quota_bytes: file.quota_bytes,
        })
    }

    async fn admit(&self, name: &str, peer_url: &str) -> Result<Room, ApiError> {
        let (file, options, admin) = self.options()?;
        let view = members::admit(&admin, &options, peer_url).await.map_err(|e| problem(&e))?;
        let mut addresses = Vec::new();
        for member in &view.members {
            for url in &member.peer_urls {
                let own = url == peer_url;
                if own && !member.name.is_empty() && member.name != name {
                    return Err(ApiError::new(
                        Code::NameTaken,
                        format!("server {:?} has the address {peer_url} already", member.name),
                    ));
                }
                let name = if own { name.to_owned() } else { member.name.clone() };
                addresses.push(MemberAddress { name, peer_url: url.clone() });
            }
        }
        Ok(Room { members: addresses, endpoints: view.endpoints(), prefix: file.prefix, quota_bytes: file.quota_bytes })
    }

    async fn remove(&self, name: &str, peer_url: Option<&str>) -> Result<usize, ApiError> {
        let (_, options, admin) = self.options()?;
        let view = members::look(&admin, &options).await.map_err(|e| problem(&e))?;
        // A place that nobody took has no name; it is told by its number, or by the address that it was let in with.
        let found = view.members.iter().find(|member| {
            let nobody = member.name.is_empty();
            let waited_for = nobody && peer_url.is_some_and(|url| member.peer_urls.iter().any(|known| known == url));
            (!nobody && member.name == name) || format!("{:x}", member.id) == name || waited_for
        });
        let member = found.ok_or_else(|| ApiError::not_found("server", name))?;
        let voters = view.voters() - usize::from(!member.learner);
        if voters == 0 {
            return Err(ApiError::new(
                Code::WrongState,
                format!("{name} holds the only copy of the state that votes; join another server first"),
            ));
        }
        let answering = view
            .members
            .iter()
            .filter(|other| other.id != member.id && !other.learner)
            .filter(|other| view.statuses.get(&other.id).is_some_and(Result::is_ok))
            .count();
        if answering <= voters / 2 {
            return Err(ApiError::new(
                Code::WrongState,
                format!(
                    "without {name} there would be {voters} votes and only {answering} of them answer: nothing would work; start the others first"
                ),
            ));
        }
        let end = Instant::now() + CONNECTED;
        loop {
            match admin.remove_member(member.id).await {
                Ok(()) => break,
                // The others must have been connected for five seconds (`HealthInterval` of etcd).
                Err(StoreError::Unreachable { .. }) if Instant::now() < end => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(problem(&error)),
            }
            let now = members::look(&admin, &options).await.map_err(|e| problem(&e))?;
            if now.members.iter().all(|other| other.id != member.id) {
                break;
            }
        }
        tracing::info!(server = name, by = self.own, "a server was removed");
        Ok(voters)
    }

    async fn defragment(&self) -> Result<(), ApiError> {
        let (_, options, admin) = self.options()?;
        let view = members::look(&admin, &options).await.map_err(|e| problem(&e))?;
        // The leader last, which spares an election.
        let leader = view.leader();
        let mut endpoints: Vec<_> = view
            .members
            .iter()
            .filter(|member| view.statuses.get(&member.id).is_some_and(Result::is_ok))
            .filter_map(|member| Some((Some(member.id) == leader, member.client_urls.first()?.clone())))
            .collect();
        endpoints.sort();
        let endpoints = endpoints.into_iter().map(|(_, url)| url).collect();
        let all = Admin::new(&EtcdOptions { endpoints, ..options }).map_err(|e| problem(&e))?;
        all.defragment().await.map_err(|e| problem(&e))?;
        for alarm in view.alarms.iter().filter(|alarm| alarm.kind == AlarmKind::NoSpace) {
            admin.clear(*alarm).await.map_err(|e| problem(&e))?;
        }
        Ok(())
    }
}
