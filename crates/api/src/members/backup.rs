//! A backup of everything, encrypted here before it leaves.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use oblak_backup::BackupError;
use oblak_backup::copy::Export;
use oblak_backup::envelope::{Sealer, check_passphrase};
use oblak_identity::members::Keys;
use oblak_model::members::BackupRequest;
use oblak_model::{ApiError, Code};
use oblak_platform::task;
use tokio::sync::mpsc;

use crate::auth::Caller;
use crate::error::{Answer, store_error};
use crate::request::{Payload, Query, from_json};
use crate::state::App;

/// Pieces that wait for a slow reader.
const WAITING: usize = 4;

/// `POST /v1/cluster/backup`.
pub(crate) async fn backup(State(app): State<App>, caller: Caller, query: Query, Payload(body): Payload) -> Answer {
    query.only(&[])?;
    // Whoever has a backup and its passphrase can be anybody in this cloud.
    if !caller.principal.user()?.cloud_admin {
        return Err(ApiError::new(Code::Forbidden, "only a cloud admin can make a backup").into());
    }
    let request: BackupRequest = from_json(&body)?;
    drop(body);
    check_passphrase(&request.passphrase).map_err(|e| ApiError::invalid("/passphrase", e.to_string()))?;
    let permit = app.streams.enter(&caller.principal.key())?;
    let keys = Keys::load(&app.config.pki).map_err(|e| ApiError::internal(e.to_string()))?;
    let keys = serde_json::to_value(&keys).map_err(|e| ApiError::internal(e.to_string()))?;
    let random = app.random.clone();
    let sealer = task::blocking(move || Sealer::new(&request.passphrase, &*random)).await;
    let sealer = sealer.map_err(|e| ApiError::internal(e.to_string()))?.map_err(refusal)?;
    tracing::info!(by = %caller.principal, "a backup is made");
    let (send, receive) = mpsc::channel::<Result<Bytes, std::io::Error>>(WAITING);
    let stopping = app.stopping.clone();
    task::spawn(async move {
        let work = async {
            let mut export = Export::begin(&*app.store, sealer, &keys, env!("CARGO_PKG_VERSION"), app.now()).await?;
            while let Some(bytes) = export.next().await? {
                if send.send(Ok(bytes.into())).await.is_err() {
                    break;
                }
            }
            Ok::<_, BackupError>(())
        };
        let outcome = tokio::select! {
            biased;
            () = stopping.cancelled() => Err("the server is stopping".to_owned()),
            outcome = work => outcome.map_err(|e| e.to_string()),
        };
        if let Err(error) = outcome {
            tracing::warn!(error, "a backup was not finished");
            // The reader sees a broken body, not a short file.
            let _ = send.send(Err(std::io::Error::other(error))).await;
        }
        drop(permit);
    });
    let stream = futures_util::stream::unfold(receive, |mut receive| async move {
        receive.recv().await.map(|piece| (piece, receive))
    });
    let mut response: Response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn refusal(error: BackupError) -> ApiError {
    match error {
        BackupError::Store(error) => store_error(&error),
        error => ApiError::internal(error.to_string()),
    }
}
