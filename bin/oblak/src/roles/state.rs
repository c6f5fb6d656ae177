//! Where the control plane keeps its state: a file of its own, or etcd.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use oblak_api::Cluster;
use oblak_platform::layout::Layout;
use oblak_store::{RedbOptions, RedbStore, SharedStore};
use oblak_store_etcd::{EtcdOptions, EtcdStore, Tls};

use super::cluster::MemberFile;
use crate::args::EtcdArgs;

/// The state of the control plane.
pub struct State {
    /// The store.
    pub store: SharedStore,
    /// The servers among which it is spread, where we run them.
    pub cluster: Option<Arc<dyn Cluster>>,
    /// Whether nobody else can have the store open.
    pub alone: bool,
}

/// Opens the store that the command line names, or that this machine is a member of.
pub async fn open(layout: &Layout, etcd: &EtcdArgs) -> Result<State> {
    let file = layout.store().join("oblak.redb");
    let member = MemberFile::load(layout)?;
    // Beside the file a member is one that a migration has not switched over to.
    if (member.is_none() || file.exists()) && !etcd.cluster && etcd.endpoints.is_empty() {
        // Opening reads the whole file.
        let opened = tokio::task::spawn_blocking(move || RedbStore::open(&file, RedbOptions::default())).await?;
        let store = Arc::new(opened.context("cannot open the store")?);
        return Ok(State { store, cluster: None, alone: true });
    }
    // Starting empty beside the old state would look like the loss of everything.
    if file.exists() {
        bail!(
            "the state of this cloud is in {}; start without --etcd and --cluster to use it, move it into etcd with `oblak cluster migrate-store`, or move that file away to begin a new cloud in etcd",
            file.display()
        );
    }
    if let Some(what) = member.as_ref().and_then(|member| member.filling.as_ref()) {
        bail!("the store in etcd is not filled yet: run `oblak cluster {what}` again, which was interrupted");
    }
    if member.as_ref().is_some_and(|member| member.removed) {
        bail!(
            "this server was removed from its cluster; to join again, remove {} and {} and run `oblak join` with a new token of role server",
            super::cluster::file::dir(layout).display(),
            layout.pki().display()
        );
    }
    let state = match member {
        Some(member) if etcd.endpoints.is_empty() => cluster_state(layout, member, etcd).await?,
        Some(_) => bail!(
            "this server is a member of an etcd of its own ({}); start it without --etcd",
            super::cluster::file::dir(layout).display()
        ),
        None if etcd.cluster => {
            let member = MemberFile::first(etcd, layout)?;
            member.save(layout)?;
            cluster_state(layout, member, etcd).await?
        }
        None => {
            let store = EtcdStore::open(options(etcd)?).await.context("cannot open the store in etcd")?;
            State { store: Arc::new(store), cluster: None, alone: false }
        }
    };
    if let Some(mark) = oblak_backup::copy::mark(&*state.store).await? {
        bail!(
            "the store holds a copy of {} that is not switched over yet; run `oblak cluster migrate-store` again, which was interrupted",
            mark.origin
        );
    }
    Ok(state)
}

async fn cluster_state(layout: &Layout, mut member: MemberFile, etcd: &EtcdArgs) -> Result<State> {
    if let Some(quota) = etcd.quota.map(oblak_model::Size::as_u64)
        && quota != member.quota_bytes
    {
        member.quota_bytes = quota;
        member.save(layout)?;
    }
    let life = etcd.member_certificate_life.map(|life| life.0);
    let member = super::cluster::member::start(layout, member, life).await?;
    Ok(State { store: member.store, cluster: Some(member.gate), alone: false })
}

/// How to reach an etcd of others.
pub fn options(etcd: &EtcdArgs) -> Result<EtcdOptions> {
    let mut options = EtcdOptions::new(etcd.endpoints.iter().map(|url| url.trim()));
    options.prefix.clone_from(&etcd.prefix);
    if let Some(ca) = &etcd.ca {
        let identity = match (&etcd.cert, &etcd.key) {
            (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
            _ => None,
        };
        options.tls = Some(Tls { ca: read(ca)?, identity, server_name: None });
    }
    if let (Some(user), Some(file)) = (&etcd.user, &etcd.password_file) {
        let text = String::from_utf8(read(file)?).with_context(|| format!("{} is not text", file.display()))?;
        let password = text.lines().next().unwrap_or_default().to_owned();
        options.user = Some((user.clone(), password));
    }
    Ok(options)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn etcd_is_not_begun_beside_the_state_in_a_file() {
        let dir = std::env::temp_dir().join(format!("oblak-beside-{}", std::process::id()));
        let layout = Layout::new(&dir);
        std::fs::create_dir_all(layout.store()).unwrap();
        std::fs::write(layout.store().join("oblak.redb"), "").unwrap();
        let args = EtcdArgs { endpoints: vec!["http://127.0.0.1:1".into()], ..EtcdArgs::default() };
        let error = open(&layout, &args).await.err().unwrap().to_string();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(error.contains("oblak.redb") && error.contains("without --etcd"), "{error}");
    }

    #[test]
    fn the_password_is_the_first_line_and_files_are_read() {
        let dir = std::env::temp_dir().join(format!("oblak-state-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let put = |name: &str, text: &str| {
            std::fs::write(dir.join(name), text).unwrap();
            Some(dir.join(name))
        };
        let args = EtcdArgs {
            endpoints: vec!["https://a:2379".into(), " https://b:2379".into()],
            ca: put("ca", "authority"),
            cert: put("cert", "certificate"),
            key: put("key", "key"),
            user: Some("cloud".into()),
            password_file: put("password", "secret\n"),
            prefix: "mine/".into(),
            ..EtcdArgs::default()
        };
        let options = options(&args).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(options.endpoints, ["https://a:2379", "https://b:2379"]);
        assert_eq!(options.user, Some(("cloud".into(), "secret".into())));
        let tls = options.tls.unwrap();
        assert_eq!((tls.ca, tls.identity), (b"authority".to_vec(), Some((b"certificate".to_vec(), b"key".to_vec()))));
        assert!(options.prefix == "mine/");
    }
}
