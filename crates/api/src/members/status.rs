//! How the servers and their store are.

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use oblak_identity::members::certificates;
use oblak_identity::{Action, Target};
use oblak_model::members::{CertificateLife, ClusterStatus, MemberRole, StoreHealth, StoreMember};
use oblak_model::{ApiError, Timestamp};

use super::ClusterLook;
use super::join::{cluster, name_them};
use crate::auth::Caller;
use crate::error::Answer;
use crate::request::Query;
use crate::state::App;

/// Below this much unused space nobody gains from defragmentation.
const WORTH_BYTES: u64 = 256 << 20;

/// `GET /v1/cluster/status`.
pub(crate) async fn status(State(app): State<App>, caller: Caller, query: Query) -> Answer {
    query.only(&[])?;
    caller.check(Action::Read, &Target::Operations)?;
    let stats = app.store.stats().await?;
    let mut look = match app.cluster.get() {
        Some(cluster) => cluster.look().await?,
        None => ClusterLook::default(),
    };
    name_them(&app, &mut look.members)?;
    let certificates: Vec<_> = certificates(&app.config.pki)
        .into_iter()
        .map(|seen| CertificateLife { name: seen.file, not_before: seen.from, expires_at: seen.until })
        .collect();
    let store = StoreHealth {
        backend: stats.backend.into(),
        revision: stats.revision.to_string(),
        keys: stats.keys,
        bytes: stats.bytes,
        quota_bytes: look.quota_bytes,
        writable: look.alarms.is_empty(),
        alarms: look.alarms,
    };
    let advice = advice(&store, &look.members, &certificates, app.now());
    let answer = ClusterStatus {
        version: env!("CARGO_PKG_VERSION").into(),
        store,
        members: look.members,
        control_leader: leading(&app)?,
        certificates,
        advice,
    };
    Ok(Json(answer).into_response())
}

/// Name of the server whose controllers work.
fn leading(app: &App) -> Result<Option<String>, ApiError> {
    let seen = crate::cluster::seen(app)?;
    let Some(leader) = seen.leader else { return Ok(None) };
    let server = seen.servers.into_iter().find(|server| server.id == leader.server);
    Ok(Some(server.map_or_else(|| leader.server.to_string(), |server| server.name)))
}

/// `POST /v1/cluster/defragment`.
pub(crate) async fn defragment(State(app): State<App>, caller: Caller, query: Query) -> Answer {
    query.only(&[])?;
    caller.check(Action::Update, &Target::Operations)?;
    cluster(&app)?.defragment().await?;
    status(State(app), caller, query).await
}

/// What a person should do. Pure.
fn advice(
    store: &StoreHealth,
    members: &[StoreMember],
    certificates: &[CertificateLife],
    now: Timestamp,
) -> Vec<String> {
    let mut advice = Vec::new();
    if store.alarms.iter().any(|alarm| alarm.starts_with("nospace")) {
        advice.push("the store takes no writes because its quota is used up, and making room did not help: on one server after the other run `oblak down --stop-etcd` and `oblak up --etcd-quota SIZE` with more, then `oblak cluster defragment`".into());
    }
    if store.alarms.iter().any(|alarm| alarm.starts_with("corrupt")) {
        advice.push("the data of a member differ from those of the others: remove that server and join it anew, or restore a backup".into());
    }
    if store.quota_bytes > 0 && store.bytes > store.quota_bytes / 10 * 8 {
        advice.push(format!(
            "the database has {} of its quota of {} bytes; delete what is not needed, or give it more with `oblak up --etcd-quota`",
            store.bytes, store.quota_bytes
        ));
    }
    for member in members {
        if member.healthy && member.bytes.saturating_sub(member.bytes_in_use) > WORTH_BYTES.max(member.bytes / 2) {
            advice.push(format!("half of the database on {} is unused: run `oblak cluster defragment`", member.name));
        }
        if member.role == MemberRole::Unstarted {
            advice.push(format!("server {} was let in and has not come: run `oblak join` on it again, or `oblak cluster remove-server {}`", member.name, member.name));
        } else if !member.healthy {
            advice.push(format!("server {} does not answer: start it, or replace it (`oblak cluster remove-server {}`, then join another)", member.name, member.name));
        }
    }
    let voters = members.iter().filter(|member| member.role == MemberRole::Voter).count();
    match voters {
        1 => advice.push("one vote: when that server is lost, so is the state since the last backup; join servers until there are three".into()),
        2 => advice.push("two votes: nothing works when one of them is away; join a third server".into()),
        _ => {}
    }
    for certificate in certificates {
        let life = certificate.expires_at.since(certificate.not_before);
        if certificate.expires_at <= now {
            advice.push(format!("the certificate {} has ended; restart this server to renew it", certificate.name));
        } else if certificate.expires_at.since(now) < life / 10 {
            advice.push(format!(
                "the certificate {} ends at {} and was not renewed; look at the log of this server",
                certificate.name, certificate.expires_at
            ));
        }
    }
    advice
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, role: MemberRole, healthy: bool) -> StoreMember {
        StoreMember { name: name.into(), role, healthy, ..StoreMember::default() }
    }

    #[test]
    fn three_healthy_voters_need_nothing() {
        let members = ["a", "b", "c"].map(|name| member(name, MemberRole::Voter, true));
        let store = StoreHealth { writable: true, quota_bytes: 100, bytes: 50, ..StoreHealth::default() };
        assert_eq!(advice(&store, &members, &[], Timestamp::default()), Vec::<String>::new());
        assert_eq!(advice(&StoreHealth::default(), &[], &[], Timestamp::default()), Vec::<String>::new(), "a file");
    }

    #[test]
    fn what_is_wrong_is_said_with_what_to_do() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let members = [
            member("a", MemberRole::Voter, true),
            member("b", MemberRole::Learner, false),
            member("c", MemberRole::Unstarted, false),
        ];
        let store =
            StoreHealth { alarms: vec!["nospace on a".into()], quota_bytes: 100, bytes: 95, ..StoreHealth::default() };
        let certificates = [
            CertificateLife { name: "old.pem".into(), not_before: at(0), expires_at: at(1000) },
            CertificateLife { name: "late.pem".into(), not_before: at(0), expires_at: at(2050) },
            CertificateLife { name: "good.pem".into(), not_before: at(0), expires_at: at(9000) },
        ];
        let said = advice(&store, &members, &certificates, at(2000)).join("\n");
        for word in [
            "takes no writes",
            "quota of 100",
            "server b does not answer",
            "server c was let in",
            "one vote",
            "old.pem has ended",
            "late.pem ends",
        ] {
            assert!(said.contains(word), "{word} in {said}");
        }
        assert!(!said.contains("good.pem"));
    }
}
