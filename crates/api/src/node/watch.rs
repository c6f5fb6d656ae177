//! What concerns a node: first everything, then changes as they happen.
//!
//! The rules are those of `oblak_model::wire`: instances placed on it, volumes, snapshots and images that are on it, images that its
//! instances use, and the networks of all projects that have an instance on it, with the ports of all instances in them (for DNS), and where the
//! nodes of those ports are to be reached ([`super::peers`]).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, State};
use bytes::Bytes;
use oblak_model::wire::{NodeEvent, SUPERSEDED, SupersededInstance};
use oblak_model::{
    ImageKind, ImageSource, InstanceId, InstanceKind, Kind, NetworkKind, NodeId, NodeKind, PortKind, Revision,
    SecurityGroupKind, SnapshotKind, SubnetKind, VolumeKind,
};
use oblak_store::cache::Notice;
use oblak_store::{Key, objects};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::peers::Peers;
use super::{own_node, registered};
use crate::auth::Caller;
use crate::docs::{self, BY_HA, BY_NODE, HA, Item};
use crate::error::Answer;
use crate::request::Query;
use crate::rest::{CHECK_FINALIZER, event_stream};
use crate::state::App;

/// Events written ahead of a slow agent. When it falls further behind than the cache's own buffer the stream ends and it starts over.
const AHEAD: usize = 256;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Kinds of a project that its nodes need, in an order in which an agent can use them.
const OF_PROJECT: [&str; 4] = [NetworkKind::KIND, SubnetKind::KIND, SecurityGroupKind::KIND, PortKind::KIND];
const ON_NODE: [&str; 4] = [ImageKind::KIND, VolumeKind::KIND, SnapshotKind::KIND, InstanceKind::KIND];

pub(crate) async fn watch(State(app): State<App>, caller: Caller, Path(name): Path<String>, query: Query) -> Answer {
    query.only(&[])?;
    let node = own_node(&caller, &name)?;
    registered(&app, node)?;
    // What another server has committed must not be missed: the agent takes everything from now on for newer than its lease.
    let newest = app.store.revision().await?;
    app.caught_up(newest).await?;
    let (sender, mut receiver) = mpsc::channel::<Bytes>(AHEAD);
    oblak_platform::task::spawn(async move {
        let stopping = app.stopping.clone();
        let (projects, images, peers) = (BTreeSet::new(), HashSet::new(), Peers::new(node));
        let view = View { app, node, sent: BTreeMap::new(), projects, images, peers, sender };
        tokio::select! {
            biased;
            () = stopping.cancelled() => {}
            _ = view.run() => {}
        }
    });
    let body = Body::from_stream(futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|item| item.map(Ok::<_, std::convert::Infallible>))
    }));
    Ok(event_stream(body))
}

/// The agent is gone, or too slow.
struct Ended;

struct View {
    app: App,
    node: NodeId,
    /// What the agent has, with the revision it has it at.
    sent: BTreeMap<Key, Revision>,
    /// Projects with an instance here.
    projects: BTreeSet<String>,
    /// Images that instances here use.
    images: HashSet<Uuid>,
    /// Other nodes that have ports of what was sent.
    peers: Peers,
    sender: mpsc::Sender<Bytes>,
}

impl View {
    async fn run(mut self) -> Result<(), Ended> {
        let mut changes = self.app.docs.subscribe();
        self.derive();
        for item in self.app.docs.all(&objects::superseded_prefix(self.node)) {
            self.superseded(&item.key, Some(&item.raw[..])).await?;
        }
        for item in self.everything() {
            self.put(&item).await?;
        }
        let revision = self.app.docs.revision();
        self.send(&NodeEvent::Synced { revision }).await?;
        loop {
            let notice = tokio::select! {
                biased;
                () = self.sender.closed() => return Err(Ended),
                notice = tokio::time::timeout(KEEP_ALIVE, changes.next()) => notice,
            };
            match notice {
                Err(_) => self.raw(Bytes::from_static(b": still here\n\n")).await?,
                Ok(Some(Notice::Change(change))) => {
                    self.change(&change.key, change.old.as_deref(), change.new.as_ref()).await?;
                }
                // Missed changes: a new stream shows everything again.
                Ok(Some(Notice::Resync) | None) => return Err(Ended),
            }
        }
    }

    /// Which projects and images instances on this node make relevant.
    fn derive(&mut self) {
        let term = format!("{}/{}", InstanceKind::KIND, self.node);
        let (mut projects, mut images) = (BTreeSet::new(), HashSet::new());
        self.app.docs.view(|view| {
            for item in view.find(BY_NODE, &term) {
                projects.extend(item.key.segments().nth(1).map(String::from));
                images.extend(item.value.object().and_then(|doc| doc.image));
            }
            // They may be started here, and in a hurry: their images are fetched before.
            images.extend(view.find(BY_HA, HA).filter_map(|item| item.value.object().and_then(|doc| doc.image)));
        });
        (self.projects, self.images) = (projects, images);
    }

    /// Everything that concerns the node now, in an order in which an agent can use it.
    fn everything(&self) -> Vec<Arc<Item>> {
        let mut items: Vec<Arc<Item>> =
            self.app.docs.get(&objects::object_key::<NodeKind>("_", self.node.0)).into_iter().collect();
        for project in &self.projects {
            items.extend(self.of_project(project));
        }
        for kind in ON_NODE {
            items.extend(self.app.docs.find(BY_NODE, &format!("{kind}/{}", self.node)));
            if kind == ImageKind::KIND {
                items.extend(self.used_images(&self.images));
            }
        }
        items
    }

    fn of_project(&self, project: &str) -> Vec<Arc<Item>> {
        let docs = &self.app.docs;
        let mut items = docs::all::<NetworkKind>(docs, Some(project));
        items.extend(docs::all::<SubnetKind>(docs, Some(project)));
        items.extend(docs::all::<SecurityGroupKind>(docs, Some(project)));
        items.extend(docs::all::<PortKind>(docs, Some(project)));
        items
    }

    fn used_images(&self, ids: &HashSet<Uuid>) -> Vec<Arc<Item>> {
        if ids.is_empty() {
            return Vec::new();
        }
        let prefix = objects::object_prefix::<ImageKind>(None);
        self.app.docs.view(|view| {
            view.range(&prefix, None)
                .filter(|item| item.value.object().is_some_and(|doc| ids.contains(&doc.id)))
                .cloned()
                .collect()
        })
    }

    fn concerns(&self, item: &Item) -> bool {
        let mut segments = item.key.segments();
        let (kind, scope) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
        let Some(doc) = item.value.object() else { return false };
        if kind == NodeKind::KIND {
            return doc.id == self.node.0;
        }
        if OF_PROJECT.contains(&kind) {
            return self.projects.contains(scope);
        }
        ON_NODE.contains(&kind)
            && (doc.nodes().contains(&self.node.0) || (kind == ImageKind::KIND && self.images.contains(&doc.id)))
    }

    async fn change(&mut self, key: &Key, old: Option<&Item>, new: Option<&Arc<Item>>) -> Result<(), Ended> {
        if new.is_none() && *key == objects::object_key::<NodeKind>("_", self.node.0) {
            // The node was removed: its certificate opens nothing any more, and what is open ends.
            return Err(Ended);
        }
        if key.starts_with(&format!("/superseded/{}/", self.node)) {
            return self.superseded(key, new.map(|item| &item.raw[..])).await;
        }
        let here = |item: &Item| item.value.object().is_some_and(|doc| doc.nodes().contains(&self.node.0));
        let instance = key.starts_with("/instance/");
        let keeps = |item: &Item| item.value.object().filter(|doc| doc.ha).and_then(|doc| doc.image);
        let kept = new.and_then(|item| keeps(item));
        // The last instance elsewhere for which the image was kept ready here may have gone.
        let given_up = |image: &Uuid| kept != Some(*image) && !docs::is_kept_everywhere(&self.app.docs, *image);
        let given_up = old.and_then(keeps).is_some_and(|image| given_up(&image));
        if instance && (given_up || old.is_some_and(here) || new.is_some_and(|item| here(item))) {
            self.rederive().await?;
        }
        if let Some(image) = kept.filter(|image| self.images.insert(*image)) {
            for item in self.used_images(&HashSet::from([image])) {
                self.put(&item).await?;
            }
        }
        if let Some(event) = self.peers.node_changed(&self.app.docs, key) {
            self.send(&event).await?;
        }
        if let Some(item) = new.filter(|item| self.concerns(item)) {
            self.put(item).await?;
        } else if self.sent.contains_key(key) {
            self.delete(key).await?;
        }
        if instance {
            self.drop_irrelevant().await?;
        }
        Ok(())
    }

    /// An instance came or went: what it needs is sent before it.
    async fn rederive(&mut self) -> Result<(), Ended> {
        let (projects, images) = (self.projects.clone(), self.images.clone());
        self.derive();
        let mut items = Vec::new();
        for project in self.projects.difference(&projects) {
            items.extend(self.of_project(project));
        }
        let new_images: HashSet<Uuid> = self.images.difference(&images).copied().collect();
        items.extend(self.used_images(&new_images));
        for item in items {
            self.put(&item).await?;
        }
        Ok(())
    }

    /// What no instance makes relevant any more is taken back.
    async fn drop_irrelevant(&mut self) -> Result<(), Ended> {
        let gone: Vec<Key> = self
            .sent
            .keys()
            .filter(|key| {
                let mut segments = key.segments();
                let (kind, scope) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
                if OF_PROJECT.contains(&kind) {
                    return !self.projects.contains(scope);
                }
                kind == ImageKind::KIND && self.app.docs.get(key).is_none_or(|item| !self.concerns(&item))
            })
            .cloned()
            .collect();
        for key in gone {
            self.delete(&key).await?;
        }
        Ok(())
    }

    async fn put(&mut self, item: &Item) -> Result<(), Ended> {
        if self.sent.get(&item.key).is_some_and(|revision| *revision >= item.revision) {
            return Ok(());
        }
        let mut object: serde_json::Value = serde_json::from_slice(&docs::json(item)).map_err(|_| Ended)?;
        let kind = item.key.segments().next().unwrap_or_default().to_string();
        hide_check(&mut object);
        if kind == ImageKind::KIND {
            self.add_password(&mut object, item);
        }
        self.sent.insert(item.key.clone(), item.revision);
        // The node of a port is known before the port, and forgotten after it.
        let is_port = kind == PortKind::KIND;
        if is_port {
            let node = item.value.object().and_then(|doc| doc.node);
            if let Some(event) = self.peers.port_comes(&self.app.docs, &item.key, node) {
                self.send(&event).await?;
            }
        }
        self.send(&NodeEvent::Put { kind, object }).await?;
        self.forget_peers(is_port).await
    }

    /// Something of an instance that is elsewhere now may be left on the node, or no longer is.
    async fn superseded(&mut self, key: &Key, raw: Option<&[u8]>) -> Result<(), Ended> {
        let Ok(id) = key.last().parse::<InstanceId>() else { return Ok(()) };
        let event = match raw.map(|raw| objects::decode_value::<objects::Superseded>(key, raw)) {
            Some(Ok(was)) => {
                let moved = SupersededInstance { id, placement: was.placement };
                let object = serde_json::to_value(moved).map_err(|_| Ended)?;
                NodeEvent::Put { kind: SUPERSEDED.into(), object }
            }
            Some(Err(_)) => return Ok(()),
            None => NodeEvent::Delete { kind: SUPERSEDED.into(), id: id.0 },
        };
        self.send(&event).await
    }

    async fn forget_peers(&mut self, ports_changed: bool) -> Result<(), Ended> {
        if ports_changed {
            for event in self.peers.gone() {
                self.send(&event).await?;
            }
        }
        Ok(())
    }

    async fn delete(&mut self, key: &Key) -> Result<(), Ended> {
        self.sent.remove(key);
        let kind = key.segments().next().unwrap_or_default().to_string();
        let Ok(id) = key.last().parse() else { return Ok(()) };
        let was_port = self.peers.port_goes(key);
        self.send(&NodeEvent::Delete { kind, id }).await?;
        self.forget_peers(was_port).await
    }

    /// The password for a registry goes to the node that pulls, and to nobody else.
    fn add_password(&self, object: &mut serde_json::Value, item: &Item) {
        let Some(doc) = item.value.object().filter(|doc| doc.node == Some(self.node.0)) else { return };
        let key = objects::secret_key("image", &doc.id.to_string());
        let Some(secret) = self.app.docs.get(&key) else { return };
        let Ok(text) = objects::decode_value::<String>(&key, &secret.raw) else { return };
        let Some(source) = object.pointer_mut("/spec/source") else { return };
        let Ok(ImageSource::Registry { reference, insecure, username, .. }) = serde_json::from_value(source.clone())
        else {
            return;
        };
        let whole = ImageSource::Registry { reference, insecure, username, password: Some(text) };
        if let Ok(value) = serde_json::to_value(whole) {
            *source = value;
        }
    }

    async fn send(&self, event: &NodeEvent) -> Result<(), Ended> {
        let data = serde_json::to_string(event).map_err(|_| Ended)?;
        self.raw(format!("data: {data}\n\n").into()).await
    }

    async fn raw(&self, bytes: Bytes) -> Result<(), Ended> {
        self.sender.send(bytes).await.map_err(|_| Ended)
    }
}

/// While the API still looks whether something uses an object, its deletion is not decided: the agent must not begin.
fn hide_check(object: &mut serde_json::Value) {
    let checking = object
        .pointer("/metadata/finalizers")
        .and_then(serde_json::Value::as_array)
        .is_some_and(|list| list.iter().any(|f| f == CHECK_FINALIZER));
    if checking && let Some(metadata) = object.pointer_mut("/metadata").and_then(serde_json::Value::as_object_mut) {
        metadata.remove("deleted_at");
    }
}
