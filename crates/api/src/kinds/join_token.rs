//! Join tokens. What a machine does with one is in `crate::node::enroll`.

use oblak_identity::Principal;
use oblak_identity::join::{JoinToken as Secret, Pin};
use oblak_model::{ApiError, Code, JoinRole, JoinToken, JoinTokenId, JoinTokenKind, Timestamp};
use oblak_store::{Key, objects};

use super::{Access, Resource};
use crate::draft::Draft;

/// Where the token lies that has a secret with this digest.
pub(crate) fn by_digest(digest: &str) -> Key {
    objects::secret_key("join-token", digest)
}

fn digest_of(id: JoinTokenId) -> Key {
    objects::secret_key("join-token-digest", &id.to_string())
}

impl Resource for JoinTokenKind {
    const ACCESS: Access = Access::Operations;

    fn create(
        draft: &mut Draft,
        _: &Principal,
        token: &mut JoinToken,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        if token.spec.role == JoinRole::Server && draft.app.cluster.get().is_none() {
            return Err(ApiError::new(
                Code::Unsupported,
                "servers cannot join this cloud: its state is in a file of its only server, which cannot be shared, or in an etcd of others; move a file with `oblak cluster migrate-store`, and start with `oblak up --cluster`",
            )
            .at("/spec/role"));
        }
        let ca = draft.app.ca.as_ref();
        let ca = ca.ok_or_else(|| ApiError::new(Code::Unsupported, "this server has no authority of its own"))?;
        let pin = Pin::of_pem(ca.certificate_pem()).map_err(|e| ApiError::internal(e.to_string()))?;
        let micros = i64::try_from(token.spec.ttl.0.as_micros()).unwrap_or(i64::MAX);
        token.status.expires_at = Timestamp::from_micros(draft.now.as_micros().saturating_add(micros));
        let secret = Secret::mint(pin, &*draft.app.random);
        let id = JoinTokenId(token.metadata.id);
        draft.put(by_digest(&secret.digest()), &id);
        // The way back, so that removing the token removes its record.
        draft.put(digest_of(id), &secret.digest());
        Ok(Some(secret.reveal()))
    }

    fn reveal(token: &mut JoinToken, secret: String) {
        token.status.secret = Some(secret);
    }

    fn remove(draft: &mut Draft, token: &JoinToken) -> Result<(), ApiError> {
        let back = digest_of(JoinTokenId(token.metadata.id));
        if let Some((digest, _)) = draft.value::<String>(&back)? {
            draft.delete(by_digest(&digest));
        }
        draft.delete(back);
        draft.remove(token);
        Ok(())
    }
}
