//! The first objects of a cloud. Idempotent: what exists is left alone, what is missing is made, so a crash in between is healed by the
//! next start.

use std::sync::Arc;

use data_encoding::BASE32_NOPAD;
use oblak_identity::Passwords;
use oblak_identity::tokens::{self, TokenRecord};
use oblak_model::{
    ApiError, Cpus, DEFAULT_PROJECT, Flavor, FlavorKind, FlavorSpec, Image, ImageContent, ImageSource, ImageSpec, Kind,
    Network, NetworkKind, Object, Project, ProjectKind, ProjectSpec, Size, Token, TokenId, TokenSpec, User, UserId,
    UserKind, UserSpec, Visibility,
};
use oblak_platform::clock::{Clock, SharedClock};
use oblak_platform::random::{Random, SharedRandom, uuid7};
use oblak_store::{CommitOutcome, Guard, SharedStore, Store, Txn, TxnId, commit_settled, list_all, objects};
use uuid::Uuid;

use crate::error::{ServerError, password_error};

/// Name of the first user.
pub const ADMIN: &str = "admin";

/// What was made.
#[derive(Clone, Default)]
pub struct Bootstrap {
    /// Password of the user `admin`; only when it was made just now. Shown once, stored nowhere.
    pub admin_password: Option<String>,
}

/// Makes sure that admin user, default project with network, default flavors and default images exist, and that every network has a number.
///
/// # Errors
/// The store does not answer.
pub async fn bootstrap(store: SharedStore, clock: SharedClock, random: SharedRandom) -> Result<Bootstrap, ServerError> {
    let maker = Maker { passwords: Passwords::new(Arc::clone(&random)), store, clock, random };
    let admin_password = maker.admin().await?;
    maker.project().await?;
    maker.numbers().await?;
    // Deleted defaults stay deleted: they are made only together, the first time.
    if maker.exists::<FlavorKind>(None).await? {
        return Ok(Bootstrap { admin_password });
    }
    for (name, spec) in images() {
        maker.make(Image::new(name, spec), Some(DEFAULT_PROJECT)).await?;
    }
    let mut txn = maker.txn();
    for (name, spec) in flavors() {
        txn = with(txn, &maker.stamped(Flavor::new(name, spec), None));
    }
    maker.commit(txn).await?;
    Ok(Bootstrap { admin_password })
}

fn flavors() -> [(&'static str, FlavorSpec); 5] {
    let flavor =
        |vcpus, memory, disk| FlavorSpec { vcpus: Cpus(vcpus), memory, disk: Size::gib(disk), ..FlavorSpec::default() };
    [
        ("xs", flavor(500, Size::mib(128), 1)),
        ("s", flavor(1000, Size::mib(512), 4)),
        ("m", flavor(2000, Size::gib(2), 10)),
        ("l", flavor(4000, Size::gib(8), 40)),
        ("xl", flavor(8000, Size::gib(32), 160)),
    ]
}

fn images() -> [(&'static str, ImageSpec); 3] {
    let image = |recipe: &str, content, on_demand| ImageSpec {
        source: ImageSource::Recipe { recipe: recipe.into() },
        checksum: None,
        firmware: oblak_model::ImageFirmware::default(),
        on_demand,
        visibility: Visibility::Public,
        min_memory: Size::ZERO,
        content: Some(content),
        retry_generation: 0,
    };
    [
        ("tiny", image("tiny", ImageContent::Kernel, false)),
        ("busybox", image("busybox", ImageContent::Oci, false)),
        ("debian-12", image("debian-12", ImageContent::Disk, true)),
    ]
}

struct Maker {
    store: SharedStore,
    clock: SharedClock,
    random: SharedRandom,
    passwords: Passwords,
}

fn with<K: Kind>(mut txn: Txn, object: &Object<K>) -> Txn {
    let (guards, writes) = objects::create_ops(object);
    txn.guards.extend(guards);
    txn.writes.extend(writes);
    txn
}

impl Maker {
    fn uuid(&self) -> Uuid {
        uuid7(&*self.random, self.clock.now())
    }

    fn txn(&self) -> Txn {
        Txn::new(TxnId(self.uuid()))
    }

    fn stamped<K: Kind>(&self, mut object: Object<K>, project: Option<&str>) -> Object<K> {
        object.metadata.id = self.uuid();
        object.metadata.project = project.map(String::from);
        object.metadata.created_at = self.clock.now();
        object.metadata.generation = 1;
        object
    }

    /// Whether anything of a kind exists.
    async fn exists<K: Kind>(&self, scope: Option<&str>) -> Result<bool, ServerError> {
        Ok(!self.store.list(&objects::object_prefix::<K>(scope), 1, None, None).await?.entries.is_empty())
    }

    async fn named<K: Kind>(&self, scope: &str, name: &str) -> Result<bool, ServerError> {
        Ok(self.store.get(&objects::name_key::<K>(scope, name)).await?.is_some())
    }

    /// Another server may have been faster: a failed guard means that the objects are there.
    async fn commit(&self, txn: Txn) -> Result<bool, ServerError> {
        match commit_settled(&*self.store, txn).await? {
            CommitOutcome::Committed(_) => Ok(true),
            CommitOutcome::GuardFailed { .. } => Ok(false),
            CommitOutcome::Unknown(id) => Ok(self.store.outcome(id).await?.is_some()),
        }
    }

    async fn make<K: Kind>(&self, object: Object<K>, project: Option<&str>) -> Result<(), ServerError> {
        if !self.named::<K>(project.unwrap_or("_"), &object.metadata.name).await? {
            self.commit(with(self.txn(), &self.stamped(object, project))).await?;
        }
        Ok(())
    }

    /// The admin is made when there is no user at all, so that a deleted or renamed one does not come back.
    async fn admin(&self) -> Result<Option<String>, ServerError> {
        if self.exists::<UserKind>(None).await? {
            return Ok(None);
        }
        let mut bytes = [0u8; 15];
        self.random.fill(&mut bytes);
        let password = BASE32_NOPAD.encode(&bytes).to_ascii_lowercase();
        let hash =
            self.passwords.hash(password.clone()).await.map_err(|e| ApiError::internal(password_error(&e).detail))?;
        let spec = UserSpec { full_name: "Administrator".into(), cloud_admin: true, ..UserSpec::default() };
        let mut user = self.stamped(User::new(ADMIN, spec), None);
        user.status.has_password = true;
        let secret = objects::secret_key("user", &user.metadata.id.to_string());
        let txn = with(self.txn(), &user).put(secret, objects::encode_value(&hash));
        Ok(self.commit(txn).await?.then_some(password))
    }

    async fn project(&self) -> Result<(), ServerError> {
        if self.named::<ProjectKind>("_", DEFAULT_PROJECT).await? {
            return Ok(());
        }
        let spec = ProjectSpec { description: "Made with the cloud.".into(), ..ProjectSpec::default() };
        let project = self.stamped(Project::new(DEFAULT_PROJECT, spec), None);
        let (network, subnet, group) = crate::kinds::default_objects(self.uuid());
        let name = Some(DEFAULT_PROJECT);
        let mut network = self.stamped(network, name);
        network.metadata.id = subnet.status.network.0;
        let mut txn = with(self.txn(), &project);
        txn = self.numbered(txn, &mut network).await?;
        txn = with(txn, &network);
        txn = with(txn, &self.stamped(subnet, name));
        txn = with(txn, &self.stamped(group, name));
        self.commit(txn).await?;
        Ok(())
    }

    /// Gives a network the first number that is free now; the commit fails if it is not any more.
    async fn numbered(&self, txn: Txn, network: &mut Network) -> Result<Txn, ServerError> {
        for vni in objects::vni_candidates(network.metadata.id) {
            let key = objects::vni_key(vni);
            if self.store.get(&key).await?.is_none() {
                network.status.vni = Some(vni);
                let id = objects::encode_value(&network.metadata.id);
                return Ok(txn.guard(Guard::Absent(key.clone())).put(key, id));
            }
        }
        // The network works on one node, and gets its number when a number is free.
        Ok(txn)
    }

    /// Networks of older versions get their numbers. Where somebody changes one at the same time it is left for the next start, or for the
    /// next instance in it.
    async fn numbers(&self) -> Result<(), ServerError> {
        let (networks, _) = list_all(&*self.store, &objects::object_prefix::<NetworkKind>(None), None).await?;
        for entry in &networks {
            let mut network: Network = objects::decode(entry)?;
            if network.status.vni.is_some() || network.metadata.is_deleting() {
                continue;
            }
            let mut txn = self.numbered(self.txn(), &mut network).await?;
            let (guard, write) = objects::update_ops(&network);
            txn.guards.push(guard);
            txn.writes.push(write);
            self.commit(txn).await?;
        }
        Ok(())
    }
}

/// Makes a token of the first usable cloud admin, for the command line of the person who owns the machine. None when there is no such user.
///
/// # Errors
/// The store does not answer.
pub async fn admin_token(
    store: &dyn Store,
    clock: &dyn Clock,
    random: &dyn Random,
    description: &str,
) -> Result<Option<String>, ServerError> {
    let (users, _) = list_all(store, &objects::object_prefix::<UserKind>(None), None).await?;
    for entry in &users {
        let user: User = objects::decode(entry)?;
        if !user.spec.cloud_admin || user.spec.disabled || user.metadata.is_deleting() {
            continue;
        }
        let now = clock.now();
        let id = uuid7(random, now);
        let tail = id.simple().to_string();
        let spec = TokenSpec { user: user.metadata.name.clone(), description: description.into(), expires_at: None };
        let mut token = Token::new(&format!("local-{}", &tail[20..]), spec);
        token.metadata.id = id;
        token.metadata.created_at = now;
        token.metadata.generation = 1;
        let secret = tokens::mint(random);
        let record = TokenRecord { token: TokenId(id), user: UserId(user.metadata.id) };
        let digest = secret.digest();
        let txn = with(Txn::new(TxnId(uuid7(random, now))), &token)
            .guard(Guard::Revision(entry.key.clone(), entry.revision))
            .put(objects::secret_key("token", &digest), objects::encode_value(&record))
            .put(objects::secret_key("token-digest", &id.to_string()), objects::encode_value(&digest));
        let txn_id = txn.id;
        let done = match commit_settled(store, txn).await? {
            CommitOutcome::Committed(_) => true,
            CommitOutcome::GuardFailed { .. } => false,
            CommitOutcome::Unknown(_) => store.outcome(txn_id).await?.is_some(),
        };
        if done {
            return Ok(Some(secret.reveal().to_string()));
        }
    }
    Ok(None)
}
