//! The servers of the cloud.

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use oblak_identity::{Action, Target};
use oblak_model::{ApiError, ClusterServer, ClusterServers};
use oblak_store::{Prefix, objects};

use crate::auth::Caller;
use crate::error::{Answer, store_error};
use crate::request::Query;
use crate::state::App;

/// `GET /v1/cluster/servers`: clients and agents learn from it where else to go.
pub(crate) async fn servers(State(app): State<App>, caller: Caller, query: Query) -> Answer {
    query.only(&[])?;
    caller.check(Action::Read, &Target::Servers)?;
    Ok(Json(seen(&app)?).into_response())
}

pub(crate) fn seen(app: &App) -> Result<ClusterServers, ApiError> {
    let prefix = Prefix::new("/server").map_err(|e| store_error(&e))?;
    let servers = app.docs.all(&prefix);
    let decoded = servers.iter().map(|item| objects::decode_value::<ClusterServer>(&item.key, &item.raw));
    let servers = decoded.collect::<Result<_, _>>().map_err(|e| store_error(&e))?;
    let key = objects::leader_key();
    let leader = app.docs.get(&key).map(|item| objects::decode_value(&key, &item.raw)).transpose();
    Ok(ClusterServers { servers, leader: leader.map_err(|e| store_error(&e))? })
}
