//! Health, version, login, and who one is.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use oblak_identity::{Action, Target};
use oblak_model::wire::{LoggedIn, Login, VersionInfo, WhoAmI};
use oblak_model::{ApiError, Code, ProjectKind, Timestamp, Token, TokenKind, TokenSpec};

use crate::auth::{Caller, PeerAddress, password_login};
use crate::commit::transact;
use crate::error::Answer;
use crate::metrics as figures;
use crate::request::{Payload, Query, from_json};
use crate::rest::admit;
use crate::state::App;

/// Life of a token from a login.
const LOGIN_LIFE: Duration = Duration::from_secs(30 * 24 * 3600);

/// The process answers.
pub(crate) async fn healthz() -> &'static str {
    "ok\n"
}

/// The store answers, and the cache follows it.
pub(crate) async fn readyz(State(app): State<App>) -> Answer {
    if app.stopping.is_cancelled() {
        return Err(ApiError::new(Code::Unavailable, "the server is stopping").into());
    }
    let revision = app.store.revision().await?;
    app.caught_up(revision).await?;
    Ok("ready\n".into_response())
}

pub(crate) async fn metrics(State(app): State<App>, caller: Caller) -> Answer {
    caller.check(Action::Read, &Target::Operations)?;
    let mut response = figures::render(&app).await.into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
    Ok(response)
}

pub(crate) async fn version() -> Json<VersionInfo> {
    Json(VersionInfo { version: env!("CARGO_PKG_VERSION").into(), api: vec!["v1".into()] })
}

/// The authority's certificate: for a first connection by people who compare it by other means.
pub(crate) async fn ca(State(app): State<App>) -> Answer {
    let Some(ca) = &app.ca else {
        return Err(ApiError::new(Code::NotFound, "this server has no authority of its own").into());
    };
    let mut response = ca.certificate_pem().to_string().into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/x-pem-file"));
    Ok(response)
}

pub(crate) async fn login(
    State(app): State<App>,
    query: Query,
    peer: Option<Extension<PeerAddress>>,
    Payload(body): Payload,
) -> Answer {
    query.only(&[])?;
    let login: Login = from_json(&body)?;
    drop(body);
    let (principal, user) = password_login(&app, &login.user, &login.password, peer.map(|p| p.0.0)).await?;
    let now = app.now();
    let expires_at = Timestamp::from_micros(
        now.as_micros().saturating_add(i64::try_from(LOGIN_LIFE.as_micros()).unwrap_or(i64::MAX)),
    );
    let spec =
        TokenSpec { user: user.metadata.name.clone(), description: "login".into(), expires_at: Some(expires_at) };
    let (secret, revision) = transact(&app, |draft| {
        let tail = app.uuid().simple().to_string();
        let mut token = Token::new(&format!("login-{}", &tail[20..]), spec.clone());
        admit::<TokenKind>(draft, &principal, &mut token, None, None)
    })
    .await?;
    let token = secret.ok_or_else(|| ApiError::internal("a token was made without a secret"))?;
    let mut response = Json(LoggedIn { token, user: user.metadata.name, expires_at }).into_response();
    if let Ok(value) = HeaderValue::from_str(&revision.to_string()) {
        response.headers_mut().insert(crate::middleware::REVISION, value);
    }
    Ok(response)
}

pub(crate) async fn whoami(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Response, crate::error::Fault> {
    query.only(&[])?;
    let user = caller.principal.user()?;
    let mut roles = BTreeMap::new();
    for project in app.all::<ProjectKind>(None)? {
        if let Some(grant) = project.spec.grants.iter().find(|grant| grant.user == user.name) {
            roles.insert(project.metadata.name, grant.role);
        }
    }
    let answer = WhoAmI { user: user.name.clone(), cloud_admin: user.cloud_admin, roles };
    Ok((StatusCode::OK, Json(answer)).into_response())
}
