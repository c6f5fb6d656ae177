//! The cache's view of a value: just enough decoded to find it and to serve its JSON without decoding the rest.

use std::any::Any;
use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};

use oblak_model::{Kind, MigrationPhase, Object, Revision, Scope};
use oblak_store::objects::{self, SCHEMA_VERSION};
use oblak_store::{Cache, CacheSource, Entry, Prefix, StoreError};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use uuid::Uuid;

use crate::rest::CHECK_FINALIZER;

/// First segments of the keys of values that are no objects.
const PLAIN: [&str; 10] =
    ["name", "address", "allocation", "hostport", "leader", "lease", "secret", "server", "superseded", "vni"];

/// A cached value with its place.
pub(crate) type Item = oblak_store::cache::Item<Doc>;
/// The cache of this server.
pub(crate) type Docs = Cache<Doc>;

/// Index over [`ObjectDoc::node`]: term `<kind>/<node>`.
pub(crate) const BY_NODE: &str = "node";
/// Index over [`ObjectDoc::image`]: term is the image of an instance.
pub(crate) const BY_IMAGE: &str = "image";
/// Index over [`ObjectDoc::ha`]: the one term is [`HA`].
pub(crate) const BY_HA: &str = "ha";
/// Term of instances that may be started on any node.
pub(crate) const HA: &str = "ha";
/// Index over [`ObjectDoc::owner`]: term `<kind>/<instance>`: ports, volumes and snapshots of an instance.
pub(crate) const BY_INSTANCE: &str = "instance";

/// Index over [`ObjectDoc::checking`]; its only term is empty.
pub(crate) const UNFINISHED: &str = "unfinished";

/// What is known of a value.
#[derive(Debug)]
pub(crate) enum Doc {
    /// An object.
    Object(Box<ObjectDoc>),
    /// A name, with the id of what has it.
    Name(Uuid),
    /// An address, a reservation, a secret.
    Plain,
}

/// What is known of an object.
#[derive(Debug)]
pub(crate) struct ObjectDoc {
    pub id: Uuid,
    pub name: Box<str>,
    /// The node it is on.
    pub node: Option<Uuid>,
    /// Other nodes that have a copy of it.
    pub copies: Box<[Uuid]>,
    /// The image that an instance uses.
    pub image: Option<Uuid>,
    /// An instance that may be started on any node.
    pub ha: bool,
    /// The instance that a port, volume or snapshot belongs to.
    pub owner: Option<Uuid>,
    /// Its deletion began, and it is not decided yet whether it may go.
    pub checking: bool,
    /// Where the text of the revision lies in the stored value. It is replaced when served: the value was written before it had one.
    revision: (u32, u32),
    /// The whole object, once [`shared`] has decoded it. An item never changes, so this is never outdated.
    whole: OnceLock<Arc<dyn Any + Send + Sync>>,
    /// What a value from before these fields were always written lacks, and where it belongs.
    missing: (u32, &'static str),
}

#[derive(Deserialize)]
struct Head {
    metadata: HeadMeta,
    #[serde(default)]
    spec: HeadSpec,
    #[serde(default)]
    status: HeadStatus,
}
#[derive(Deserialize)]
struct HeadMeta {
    id: Uuid,
    name: Box<str>,
    #[serde(default, deserialize_with = "is_there")]
    project: bool,
    #[serde(default, deserialize_with = "is_there")]
    labels: bool,
    #[serde(default)]
    finalizers: BTreeSet<Box<str>>,
}

#[derive(Deserialize, Default)]
struct HeadSpec {
    #[serde(default)]
    ha: bool,
}

fn is_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}
#[derive(Deserialize, Default)]
struct HeadStatus {
    #[serde(default)]
    node: Option<Uuid>,
    #[serde(default)]
    nodes: Vec<Uuid>,
    #[serde(default)]
    placement: Option<HeadPlacement>,
    #[serde(default)]
    migration: Option<HeadMigration>,
    #[serde(default)]
    resolved: Option<HeadResolved>,
    #[serde(default)]
    attached_to: Option<Uuid>,
    #[serde(default)]
    instance: Option<Uuid>,
}
#[derive(Deserialize)]
struct HeadMigration {
    phase: MigrationPhase,
    from: Uuid,
    to: Uuid,
}
#[derive(Deserialize)]
struct HeadPlacement {
    node: Uuid,
}
#[derive(Deserialize)]
struct HeadResolved {
    image: Uuid,
}
#[derive(Deserialize)]
struct PortHead {
    metadata: HeadMeta,
    spec: PortHeadSpec,
    #[serde(default)]
    status: HeadStatus,
}
#[derive(Deserialize)]
struct PortHeadSpec {
    instance: Uuid,
}

/// Everything that the API reads, idempotency records excepted: they are many and asked for once.
pub(crate) fn source() -> CacheSource<Doc> {
    let prefix = |text: &str| Prefix::new(text).expect("a constant segment");
    let mut source = CacheSource::new(prefix("/name"), decode);
    for kind in PLAIN.iter().filter(|kind| **kind != "name") {
        source = source.and(prefix(&format!("/{kind}")));
    }
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => {
            $( source = source.and(objects::object_prefix::<$kind>(None)); )*
        };
    }
    oblak_model::for_each_kind!(kinds);
    source
        .index(BY_NODE, |item: &Item| terms(item, ObjectDoc::nodes))
        .index(BY_HA, |item: &Item| {
            item.value.object().filter(|doc| doc.ha).map(|_| HA.to_string()).into_iter().collect()
        })
        .index(BY_INSTANCE, |item: &Item| terms(item, |doc| doc.owner.iter().copied().collect()))
        .index(UNFINISHED, |item: &Item| {
            item.value.object().filter(|doc| doc.checking).map(|_| String::new()).into_iter().collect()
        })
        .index(BY_IMAGE, |item: &Item| {
            item.value.object().and_then(|doc| doc.image).map(|id| id.to_string()).into_iter().collect()
        })
}

fn terms(item: &Item, of: impl Fn(&ObjectDoc) -> Vec<Uuid>) -> Vec<String> {
    let kind = item.key.segments().next().unwrap_or_default();
    let ids = item.value.object().map(of).unwrap_or_default();
    ids.iter().map(|id| format!("{kind}/{id}")).collect()
}

impl ObjectDoc {
    /// Every node that has something of it, each once.
    pub fn nodes(&self) -> Vec<Uuid> {
        let mut all: Vec<Uuid> = self.node.into_iter().chain(self.copies.iter().copied()).collect();
        all.sort_unstable();
        all.dedup();
        all
    }
}

pub(crate) fn decode(entry: &Entry) -> Result<Doc, StoreError> {
    let kind = entry.key.segments().next().unwrap_or_default();
    if kind == "name" {
        let id = entry.value.get(1..).and_then(|json| serde_json::from_slice(json).ok());
        return Ok(id.map_or(Doc::Plain, Doc::Name));
    }
    if PLAIN.contains(&kind) {
        return Ok(Doc::Plain);
    }
    let corrupt = |reason: String| StoreError::Codec { key: entry.key.clone(), reason };
    let json = match entry.value.split_first() {
        Some((&SCHEMA_VERSION, json)) => json,
        Some((version, _)) => {
            return Err(corrupt(format!("schema version {version} is newer than this program; upgrade it")));
        }
        None => return Err(corrupt("empty value".into())),
    };
    // What a spec calls `instance` is an id in ports only.
    let (head, port) = if kind == "port" {
        let port: PortHead = serde_json::from_slice(json).map_err(|e| corrupt(e.to_string()))?;
        let PortHead { metadata, spec, status } = port;
        (Head { metadata, spec: HeadSpec::default(), status }, Some(spec.instance))
    } else {
        (serde_json::from_slice::<Head>(json).map_err(|e| corrupt(e.to_string()))?, None)
    };
    let (generation, revision) =
        revision_span(&entry.value).ok_or_else(|| corrupt("it has no revision field".into()))?;
    let missing = match (head.metadata.project, head.metadata.labels) {
        (true, true) => "",
        (true, false) => "\"labels\":{},",
        (false, true) => "\"project\":null,",
        (false, false) => "\"project\":null,\"labels\":{},",
    };
    let owner = port.or(head.status.attached_to).or(head.status.instance);
    let placement = head.status.placement.map(|p| p.node);
    let moving = head.status.migration.filter(|m| !m.phase.is_over());
    let copies = match (kind, moving) {
        ("image", _) => head.status.nodes,
        // Both ends of a migration have something of the instance until it is over.
        ("instance", Some(migration)) => vec![migration.from, migration.to],
        _ => Vec::new(),
    };
    Ok(Doc::Object(Box::new(ObjectDoc {
        id: head.metadata.id,
        name: head.metadata.name,
        node: placement.or(head.status.node),
        copies: copies.into(),
        image: head.status.resolved.map(|r| r.image).filter(|_| kind == "instance"),
        ha: head.spec.ha && kind == "instance",
        owner,
        checking: head.metadata.finalizers.contains(CHECK_FINALIZER),
        revision,
        whole: OnceLock::new(),
        missing: (generation, missing),
    })))
}

/// Where `metadata.generation` begins, and where the text of `metadata.revision` lies. Our own serializer writes `"generation":<number>,"revision":"<text>"`; no label can look like that,
/// because a label's value is always a string.
fn revision_span(value: &[u8]) -> Option<(u32, (u32, u32))> {
    const GENERATION: &[u8] = b"\"generation\":";
    const REVISION: &[u8] = b",\"revision\":\"";
    let mut from = 0;
    loop {
        let at = from + value[from..].windows(GENERATION.len()).position(|w| w == GENERATION)?;
        from = at + GENERATION.len();
        let digits = value[from..].iter().take_while(|b| b.is_ascii_digit()).count();
        let rest = &value[from + digits..];
        if digits > 0 && rest.starts_with(REVISION) {
            let start = from + digits + REVISION.len();
            let len = value[start..].iter().position(|b| *b == b'"')?;
            let at = |n: usize| u32::try_from(n).ok();
            return Some((at(from - GENERATION.len())?, (at(start)?, at(start + len)?)));
        }
    }
}

impl Doc {
    pub fn object(&self) -> Option<&ObjectDoc> {
        match self {
            Self::Object(doc) => Some(doc),
            Self::Name(_) | Self::Plain => None,
        }
    }
}

/// Whether an instance that may be started on any node runs from the image: then every node keeps a copy.
pub(crate) fn is_kept_everywhere(docs: &Docs, image: Uuid) -> bool {
    let of = |item: &Arc<Item>| item.value.object().and_then(|doc| doc.image) == Some(image);
    docs.view(|view| view.find(BY_HA, HA).any(of))
}

/// Appends the JSON of an object as the API shows it.
pub(crate) fn write_json(item: &Item, out: &mut Vec<u8>) {
    match item.value.object() {
        Some(doc) => write_value(&item.raw, doc, item.revision, out),
        None => out.extend_from_slice(item.raw.get(1..).unwrap_or_default()),
    }
}

fn write_value(raw: &[u8], doc: &ObjectDoc, revision: Revision, out: &mut Vec<u8>) {
    use std::io::Write;
    let ((start, end), (at, missing)) = (doc.revision, doc.missing);
    out.reserve(raw.len() + missing.len() + 24);
    out.extend_from_slice(&raw[1..at as usize]);
    out.extend_from_slice(missing.as_bytes());
    out.extend_from_slice(&raw[at as usize..start as usize]);
    let _ = write!(out, "{revision}");
    out.extend_from_slice(&raw[end as usize..]);
}

/// The JSON of an object as the API shows it.
pub(crate) fn json(item: &Item) -> Vec<u8> {
    let mut out = Vec::new();
    write_json(item, &mut out);
    out
}

/// The id that a name key holds.
pub(crate) fn named_id(item: &Item) -> Option<Uuid> {
    match item.value {
        Doc::Name(id) => Some(id),
        Doc::Object(_) | Doc::Plain => None,
    }
}

/// The object of a kind by name or id.
pub(crate) fn find<K: Kind>(docs: &Docs, scope: &str, name_or_id: &str) -> Option<Arc<Item>> {
    if scope.contains('/') || name_or_id.contains('/') {
        return None;
    }
    // The keys are only looked up, so they are put together in one buffer and never checked: no key is stored that is not valid.
    let mut path = String::with_capacity(LOOKUP);
    docs.view(|view| {
        let id = match name_or_id.parse::<Uuid>() {
            Ok(id) => id,
            Err(_) => {
                put_path(&mut path, &["name", K::KIND, scope, name_or_id]);
                named_id(view.get(&path)?)?
            }
        };
        put_path(&mut path, &[K::KIND, scope, id.as_hyphenated().encode_lower(&mut Uuid::encode_buffer())]);
        view.get(&path).cloned()
    })
}

/// Room for nearly every key that is looked up.
const LOOKUP: usize = 128;

fn put_path(path: &mut String, segments: &[&str]) {
    path.clear();
    for segment in segments {
        path.push('/');
        path.push_str(segment);
    }
}

/// Decodes an item that [`find`] or a range found.
pub(crate) fn object<K: Kind>(item: &Item) -> Result<Object<K>, StoreError> {
    let mut object: Object<K> = objects::decode_value(&item.key, &item.raw)?;
    object.metadata.revision = item.revision;
    Ok(object)
}

/// As [`object`], decoded once for all who ask: for what many requests need (tokens, users, projects, flavors, networks and their like).
pub(crate) fn shared<K: Kind>(item: &Item) -> Result<Arc<Object<K>>, StoreError> {
    let known = item.value.object().and_then(|doc| doc.whole.get());
    if let Some(object) = known.and_then(|whole| Arc::clone(whole).downcast::<Object<K>>().ok()) {
        return Ok(object);
    }
    let decoded = Arc::new(object::<K>(item)?);
    if let Some(doc) = item.value.object() {
        // Somebody may have been faster, with the same.
        let _ = doc.whole.set(Arc::clone(&decoded) as Arc<dyn Any + Send + Sync>);
    }
    Ok(decoded)
}

/// All objects of a kind in a scope, in the order of their ids.
pub(crate) fn all<K: Kind>(docs: &Docs, scope: Option<&str>) -> Vec<Arc<Item>> {
    docs.all(&objects::object_prefix::<K>(scope))
}

/// The scope segment of keys of a kind: the project, or `_`.
pub(crate) fn scope_of<K: Kind>(project: Option<&str>) -> &str {
    match K::SCOPE {
        Scope::Project => project.unwrap_or("_"),
        Scope::Cloud | Scope::Organization => "_",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{Instance, InstanceKind, InstanceSpec};
    use oblak_store::Key;
    use proptest::prelude::*;

    proptest! {
        /// Whatever labels say, the served JSON is the object with the revision of the entry.
        #[test]
        fn served_json_is_the_object(
            labels in proptest::collection::btree_map("generation|revision|[a-z]{1,8}", "[a-z0-9.-]{0,8}", 0..5),
            generation in any::<u64>(),
            n in any::<u64>(),
            data in "\\PC{0,40}",
        ) {
            let mut object = Instance::new("web", InstanceSpec { image: "tiny".into(), user_data: Some(data), ..InstanceSpec::default() });
            object.metadata.labels = labels;
            object.metadata.generation = generation;
            object.metadata.project = Some("default".into());
            let revision = Revision::new(3, n);
            let entry = Entry { key: objects::key_of(&object), value: objects::encode(&object), revision, created: revision };
            let doc = decode(&entry).unwrap();
            let mut out = Vec::new();
            write_value(&entry.value, doc.object().unwrap(), revision, &mut out);
            object.metadata.revision = revision;
            prop_assert_eq!(serde_json::from_slice::<serde_json::Value>(&out).unwrap(), serde_json::to_value(&object).unwrap());
            prop_assert_eq!(objects::decode::<InstanceKind>(&entry).unwrap(), object);
        }
    }

    /// A store may still hold values that were written without empty fields.
    #[test]
    fn fields_that_older_values_lack_are_served() {
        let id = Uuid::from_u128(7);
        let older = |metadata: &str| {
            format!(
                "1{{\"kind\":\"key\",\"metadata\":{{\"id\":\"{id}\",\"name\":\"a\",{metadata}\"generation\":2,\"revision\":\"0-0\",\"created_at\":\"1970-01-01T00:00:00.000000Z\"}},\"spec\":{{}},\"status\":{{}}}}"
            )
        };
        for (metadata, project, labels) in [
            ("", serde_json::json!(null), serde_json::json!({})),
            ("\"project\":\"p\",", "p".into(), serde_json::json!({})),
            ("\"labels\":{\"a\":\"b\"},", serde_json::json!(null), serde_json::json!({"a": "b"})),
            ("\"project\":null,\"labels\":{},", serde_json::json!(null), serde_json::json!({})),
        ] {
            let revision = Revision::new(1, 9);
            let key = Key::from_segments(["key", "p", &id.to_string()]).unwrap();
            let entry = Entry { key, value: older(metadata).into(), revision, created: revision };
            let doc = decode(&entry).unwrap();
            let mut out = Vec::new();
            write_value(&entry.value, doc.object().unwrap(), revision, &mut out);
            let shown: serde_json::Value = serde_json::from_slice(&out).unwrap();
            let found = &shown["metadata"];
            assert_eq!((found.get("project"), found.get("labels")), (Some(&project), Some(&labels)), "{shown}");
            assert_eq!(found["revision"], "1-9");
        }
    }
}
