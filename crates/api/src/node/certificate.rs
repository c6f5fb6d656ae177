//! Certificates of nodes: signing, and renewing well before the end.

use axum::Json;
use axum::extract::State;
use axum::response::IntoResponse;
use oblak_identity::pki;
use oblak_model::wire::{NodeCertificate, RenewCertificate};
use oblak_model::{ApiError, Code, NodeId, Timestamp};
use oblak_store::{Key, objects};

use super::{FromAgent, registered};
use crate::commit::transact;
use crate::error::Answer;
use crate::state::App;

/// Where the digest of the key lies that a node's newest certificate is for.
pub(crate) fn key_key(node: NodeId) -> Key {
    objects::secret_key("node-key", &node.to_string())
}

/// Digest of the key in a request.
pub(super) fn key_of(csr_pem: &str) -> Result<String, ApiError> {
    pki::key_of_csr(csr_pem).map_err(|e| ApiError::invalid("/csr_pem", e.to_string()))
}

/// A certificate for the key in a request.
pub(super) fn sign(app: &App, node: NodeId, name: &str, csr_pem: &str) -> Result<NodeCertificate, ApiError> {
    let ca =
        app.ca.as_ref().ok_or_else(|| ApiError::new(Code::Unsupported, "this server has no authority of its own"))?;
    let (now, life) = (app.now(), app.config.node_certificate_life.max(pki::NODE_LIFE_LEAST));
    let certificate_pem =
        pki::sign_csr(ca, csr_pem, node, now, life).map_err(|e| ApiError::invalid("/csr_pem", e.to_string()))?;
    // After two thirds of its life, up to a twelfth of it earlier: nodes that joined together do not come together.
    let mut byte = [0u8; 1];
    app.random.fill(&mut byte);
    let wait = life * 2 / 3 - life / 12 * u32::from(byte[0]) / 256;
    let after = |span: std::time::Duration| {
        let micros = i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(now.as_micros().saturating_add(micros))
    };
    Ok(NodeCertificate {
        id: node,
        name: name.into(),
        certificate_pem,
        ca_pem: ca.certificate_pem().into(),
        renew_at: after(wait),
        expires_at: after(life),
    })
}

/// `POST /v1/nodes/{id}/certificate`: the agent of the node asks with the certificate that it has.
pub(crate) async fn renew(
    State(app): State<App>,
    FromAgent { node: id, said: request }: FromAgent<RenewCertificate>,
) -> Answer {
    let node = registered(&app, id)?;
    let key = key_of(&request.csr_pem)?;
    let answer = sign(&app, id, &node.metadata.name, &request.csr_pem)?;
    transact(&app, |draft| {
        let node = draft.get::<oblak_model::NodeKind>("_", id.0)?;
        // Removed meanwhile: nothing may be written about it any more.
        draft.depend(&node.ok_or_else(|| ApiError::not_found("node", &id.to_string()))?);
        draft.put(key_key(id), &key);
        Ok(())
    })
    .await?;
    tracing::info!(node = node.metadata.name, until = %answer.expires_at, "a node has renewed its certificate");
    Ok(Json(answer).into_response())
}
