//! Users, tokens and ssh keys.

use oblak_identity::Principal;
use oblak_identity::tokens::{self, TokenRecord};
use oblak_model::{
    ApiError, Code, InstanceKind, Key, KeyKind, ProjectKind, Token, TokenId, TokenKind, User, UserId, UserKind,
};
use oblak_store::objects;

use super::{Access, Resource, in_use};
use crate::draft::Draft;
use crate::error::password_error;
use crate::state::App;

/// Tokens removed together with their user in one commit; a user with more must lose some first.
const TOKENS_WITH_USER: usize = 20;

impl Resource for UserKind {
    const ACCESS: Access = Access::Owned;
    const NAMED_BY_OTHERS: bool = true;

    fn owner(user: &User) -> &str {
        &user.metadata.name
    }

    fn take_secret(user: &mut User) -> Option<String> {
        user.spec.password.take()
    }

    async fn seal(app: &App, secret: String) -> Result<String, ApiError> {
        app.passwords.hash(secret).await.map_err(|e| password_error(&e))
    }

    fn create(
        draft: &mut Draft,
        by: &Principal,
        user: &mut User,
        sealed: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        only_admin(by)?;
        set_password(draft, user, sealed);
        Ok(None)
    }

    fn update(
        draft: &mut Draft,
        by: &Principal,
        old: &User,
        new: &mut User,
        sealed: Option<&str>,
    ) -> Result<(), ApiError> {
        let rights = |u: &User| (u.spec.cloud_admin, u.spec.disabled);
        if rights(old) != rights(new) {
            only_admin(by)?;
        }
        if is_admin(old) && !is_admin(new) {
            keep_an_admin(draft, old)?;
        }
        set_password(draft, new, sealed);
        Ok(())
    }

    fn may_delete(draft: &Draft, user: &User) -> Result<(), ApiError> {
        let name = &user.metadata.name;
        for project in draft.list::<ProjectKind>(None)? {
            if project.spec.grants.iter().any(|grant| grant.user == *name) {
                return Err(in_use(&user.describe(), &format!("a grant of {}", project.describe())));
            }
        }
        if is_admin(user) {
            keep_an_admin(draft, user)?;
        }
        if tokens_of(draft, user)?.len() > TOKENS_WITH_USER {
            return Err(in_use(
                &user.describe(),
                &format!("more than {TOKENS_WITH_USER} tokens; delete some of them first"),
            ));
        }
        Ok(())
    }

    fn remove(draft: &mut Draft, user: &User) -> Result<(), ApiError> {
        for token in tokens_of(draft, user)? {
            TokenKind::remove(draft, &token)?;
        }
        draft.delete(objects::secret_key("user", &user.metadata.id.to_string()));
        draft.remove(user);
        Ok(())
    }
}

fn only_admin(by: &Principal) -> Result<(), ApiError> {
    if by.is_cloud_admin() {
        return Ok(());
    }
    Err(ApiError::new(Code::Forbidden, "only a cloud admin makes users and changes cloud_admin and disabled"))
}

fn is_admin(user: &User) -> bool {
    user.spec.cloud_admin && !user.spec.disabled && !user.metadata.is_deleting()
}

fn keep_an_admin(draft: &Draft, leaving: &User) -> Result<(), ApiError> {
    let others = draft.list::<UserKind>(None)?;
    if others.iter().any(|user| is_admin(user) && user.metadata.id != leaving.metadata.id) {
        return Ok(());
    }
    Err(ApiError::new(
        Code::WrongState,
        format!("{} is the last cloud admin; make another one first", leaving.describe()),
    ))
}

fn set_password(draft: &mut Draft, user: &mut User, sealed: Option<&str>) {
    if let Some(hash) = sealed {
        draft.put(objects::secret_key("user", &user.metadata.id.to_string()), &hash);
        user.status.has_password = true;
    }
}

fn tokens_of(draft: &Draft, user: &User) -> Result<Vec<Token>, ApiError> {
    let mut tokens = draft.list::<TokenKind>(None)?;
    tokens.retain(|token| token.spec.user == user.metadata.name);
    Ok(tokens)
}

impl Resource for TokenKind {
    const ACCESS: Access = Access::Owned;

    fn owner(token: &Token) -> &str {
        &token.spec.user
    }

    fn create(
        draft: &mut Draft,
        by: &Principal,
        token: &mut Token,
        _: Option<&str>,
    ) -> Result<Option<String>, ApiError> {
        let caller = by.user()?;
        if token.spec.user.is_empty() {
            token.spec.user.clone_from(&caller.name);
        }
        let owner = token.spec.user.clone();
        if owner != caller.name && !caller.cloud_admin {
            return Err(ApiError::new(Code::Forbidden, "only a cloud admin makes tokens for others"));
        }
        if token.spec.expires_at.is_some_and(|end| end <= draft.now) {
            return Err(ApiError::invalid("/spec/expires_at", "is in the past"));
        }
        let user = draft.need::<UserKind>("_", &owner, "/spec/user")?;
        let secret = tokens::mint(&*draft.app.random);
        let digest = secret.digest();
        let record = TokenRecord { token: TokenId(token.metadata.id), user: UserId(user.metadata.id) };
        draft.put(objects::secret_key("token", &digest), &record);
        // The way back, so that removing the token removes its record.
        draft.put(objects::secret_key("token-digest", &token.metadata.id.to_string()), &digest);
        Ok(Some(secret.reveal().to_string()))
    }

    fn reveal(token: &mut Token, secret: String) {
        token.status.secret = Some(secret);
    }

    fn remove(draft: &mut Draft, token: &Token) -> Result<(), ApiError> {
        let back = objects::secret_key("token-digest", &token.metadata.id.to_string());
        if let Some((digest, _)) = draft.value::<String>(&back)? {
            draft.delete(objects::secret_key("token", &digest));
        }
        draft.delete(back);
        draft.remove(token);
        Ok(())
    }
}

impl Resource for KeyKind {
    const ACCESS: Access = Access::InProject;
    const NAMED_BY_OTHERS: bool = true;

    fn create(_: &mut Draft, _: &Principal, _: &mut Key, _: Option<&str>) -> Result<Option<String>, ApiError> {
        Ok(None)
    }

    fn may_delete(draft: &Draft, key: &Key) -> Result<(), ApiError> {
        for instance in draft.list::<InstanceKind>(Some(key.scope_key()))? {
            if instance.spec.keys.contains(&key.metadata.name) {
                return Err(in_use(&key.describe(), &instance.describe()));
            }
        }
        Ok(())
    }
}
