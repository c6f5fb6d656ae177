//! What people see of each kind: the columns of its table.

use std::collections::BTreeMap;

use oblak_model::{
    EventKind, FlavorKind, ImageKind, ImageSource, Instance, InstanceKind, JoinTokenKind, KeyKind, Kind, NetworkKind,
    NodeKind, NodePhase, Object, PortKind, ProjectKind, Resources, SecurityGroupKind, Severity, Size, SnapshotKind,
    SubnetKind, Timestamp, TokenKind, UserKind, Visibility, VolumeKind,
};
use serde::Serialize;
use uuid::Uuid;

use crate::session::Session;
use crate::table::{Table, age, now};

/// Names of objects that others know by id.
#[derive(Clone, Debug, Default)]
pub struct Names(BTreeMap<Uuid, String>);

impl Names {
    /// The name, or the end of the id when it is not known.
    pub fn of(&self, id: impl Into<Uuid>) -> String {
        let id = id.into();
        self.0.get(&id).cloned().unwrap_or_else(|| oblak_model::id::short(&id))
    }

    /// Names of instances and nodes, as far as this user may see them.
    pub async fn load(session: &Session) -> Self {
        let mut names = BTreeMap::new();
        let (instances, nodes) = tokio::join!(session.list::<InstanceKind>(None), session.list::<NodeKind>(None));
        names.extend(instances.into_iter().flat_map(|l| l.items).map(|i| (i.metadata.id, i.metadata.name)));
        names.extend(nodes.into_iter().flat_map(|l| l.items).map(|n| (n.metadata.id, n.metadata.name)));
        Self(names)
    }
}

/// A kind that has a table.
pub trait Show: Kind {
    /// Headings.
    const HEAD: &'static [&'static str];
    /// More headings, for `-o wide`.
    const WIDE: &'static [&'static str] = &[];
    /// Whether ids of instances or nodes are shown by name.
    const NAMES: bool = false;

    /// Cells under `HEAD` and `WIDE`, without `AGE`, which is the last of `HEAD`.
    fn cells(object: &Object<Self>, names: &Names) -> (Vec<String>, Vec<String>);

    /// What is wrong with it, for people who look at a list and not at this object.
    fn trouble(_: &Object<Self>) -> Option<String> {
        None
    }

    /// When the age began.
    fn since(object: &Object<Self>) -> Timestamp {
        object.metadata.created_at
    }
}

/// The table of some objects.
pub fn table<K: Show>(items: &[Object<K>], names: &Names, wide: bool) -> Table {
    let mut head: Vec<&str> = K::HEAD.to_vec();
    head.push("AGE");
    if wide {
        head.extend(K::WIDE);
    }
    let mut table = Table::new(&head);
    let now = now();
    for object in items {
        let (mut cells, more) = K::cells(object, names);
        cells.push(age(K::since(object), now));
        if wide {
            cells.extend(more);
        }
        table.row(cells);
    }
    table
}

/// The word that a plain enum has on the wire.
pub fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(text)) => text,
        _ => String::new(),
    }
}

/// A size, or nothing for zero.
fn size(size: Size) -> String {
    if size == Size::ZERO { String::new() } else { size.to_string() }
}

pub fn labels(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(k, v)| if v.is_empty() { k.clone() } else { format!("{k}={v}") }).collect::<Vec<_>>().join(",")
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|i| i.to_string()).collect::<Vec<_>>().join(",")
}

/// The addresses of an instance.
pub fn addresses(instance: &Instance) -> String {
    list(instance.status.addresses.iter().map(|a| a.address))
}

impl Show for InstanceKind {
    const HEAD: &'static [&'static str] = &["NAME", "ISOLATION", "STATE", "ADDRESSES", "NODE"];
    const WIDE: &'static [&'static str] = &["IMAGE", "FLAVOR", "RUNTIME", "RESTARTS", "MESSAGE"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let status = &o.status;
        let node = status.placement.as_ref().map(|p| p.node_name.clone()).unwrap_or_default();
        let head = vec![
            o.metadata.name.clone(),
            status.resolved.isolation.to_string(),
            status.phase.to_string(),
            addresses(o),
            node,
        ];
        let message = if status.message.is_empty() { &status.reason } else { &status.message };
        let wide = vec![
            o.spec.image.clone(),
            status.resolved.flavor.clone(),
            status.observed.runtime.clone(),
            status.observed.restart_count.to_string(),
            message.clone(),
        ];
        (head, wide)
    }
}

impl Show for ImageKind {
    const HEAD: &'static [&'static str] = &["NAME", "TYPE", "STATE", "SIZE", "PROJECT"];
    const WIDE: &'static [&'static str] = &["DISK", "VISIBILITY", "SOURCE", "DIGEST", "NODES", "MESSAGE"];
    const NAMES: bool = true;
    fn cells(o: &Object<Self>, names: &Names) -> (Vec<String>, Vec<String>) {
        let content = o.status.content.or(o.spec.content);
        // A kernel with its disk is a disk to the person who boots it.
        let kind = content.map_or("", |c| match c {
            oblak_model::ImageContent::Disk | oblak_model::ImageContent::Kernel => "disk",
            oblak_model::ImageContent::Oci => "oci",
        });
        let state = match o.status.phase {
            oblak_model::ImagePhase::Importing if o.status.reason == "Retrying" => "retrying".into(),
            oblak_model::ImagePhase::Importing => format!("importing {} %", o.status.progress),
            oblak_model::ImagePhase::Pending if o.spec.on_demand && !o.status.wanted => match o.spec.source {
                ImageSource::Recipe { .. } => "built on first use".into(),
                _ => "fetched on first use".into(),
            },
            phase => word(phase),
        };
        let source = match &o.spec.source {
            ImageSource::Url { url } => url.clone(),
            ImageSource::Registry { reference, .. } => reference.clone(),
            ImageSource::Recipe { recipe } => format!("recipe {recipe}"),
            ImageSource::Upload {} => "upload".into(),
        };
        let public = if o.spec.visibility == Visibility::Public { "public" } else { "private" };
        let nodes = list(o.status.nodes.iter().map(|node| names.of(*node)));
        let digest: String = o.status.digest.as_deref().unwrap_or_default().chars().take(19).collect();
        let project = o.metadata.project.clone().unwrap_or_default();
        (
            vec![o.metadata.name.clone(), kind.into(), state, size(o.status.size), project],
            vec![size(o.status.virtual_size), public.into(), source, digest, nodes, o.status.message.clone()],
        )
    }
    fn trouble(object: &Object<Self>) -> Option<String> {
        image_trouble(object)
    }
}

/// What keeps an image from being ready.
fn image_trouble(image: &oblak_model::Image) -> Option<String> {
    let name = &image.metadata.name;
    match image.status.phase {
        oblak_model::ImagePhase::Failed => Some(format!("image {name} failed: {}", image.status.message)),
        // Within one attempt the download goes on by itself and only says so.
        oblak_model::ImagePhase::Importing
            if image.status.reason == "Retrying" || image.status.message.ends_with("; trying again") =>
        {
            Some(format!("image {name} is retried: {}", image.status.message))
        }
        _ => None,
    }
}

impl Show for VolumeKind {
    const HEAD: &'static [&'static str] = &["NAME", "SIZE", "STATE", "INSTANCE", "NODE"];
    const WIDE: &'static [&'static str] = &["FORMAT", "USED", "MESSAGE"];
    const NAMES: bool = true;
    fn cells(o: &Object<Self>, names: &Names) -> (Vec<String>, Vec<String>) {
        let head = vec![
            o.metadata.name.clone(),
            o.spec.size.to_string(),
            word(o.status.phase),
            o.status.attached_to.map(|i| names.of(i)).unwrap_or_default(),
            o.status.node.map(|n| names.of(n)).unwrap_or_default(),
        ];
        (head, vec![word(o.spec.format), size(o.status.used), o.status.message.clone()])
    }
}

impl Show for SnapshotKind {
    const HEAD: &'static [&'static str] = &["NAME", "OF", "STATE", "MEMORY", "SIZE"];
    const WIDE: &'static [&'static str] = &["NODE", "MESSAGE"];
    const NAMES: bool = true;
    fn cells(o: &Object<Self>, names: &Names) -> (Vec<String>, Vec<String>) {
        let instance = o.spec.instance.as_ref().map(|i| format!("instance/{i}"));
        let of = instance.or_else(|| o.spec.volume.as_ref().map(|v| format!("volume/{v}"))).unwrap_or_default();
        let memory = if o.status.has_memory { "yes" } else { "no" };
        (
            vec![o.metadata.name.clone(), of, word(o.status.phase), memory.into(), size(o.status.size)],
            vec![o.status.node.map(|n| names.of(n)).unwrap_or_default(), o.status.message.clone()],
        )
    }
}

impl Show for NetworkKind {
    const HEAD: &'static [&'static str] = &["NAME", "MTU", "NAT", "DNS"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let nat = if o.spec.nat { "yes" } else { "no" };
        (vec![o.metadata.name.clone(), o.spec.mtu.to_string(), nat.into(), list(&o.spec.dns_forwarders)], vec![])
    }
}

impl Show for SubnetKind {
    const HEAD: &'static [&'static str] = &["NAME", "NETWORK", "RANGE", "GATEWAY"];
    const WIDE: &'static [&'static str] = &["POOL", "LEASE"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let (first, last) = o.spec.pool_range();
        let head = vec![
            o.metadata.name.clone(),
            o.spec.network.clone(),
            o.spec.cidr.to_string(),
            o.spec.gateway_address().to_string(),
        ];
        (head, vec![format!("{first}-{last}"), o.spec.lease.to_string()])
    }
}

impl Show for PortKind {
    const HEAD: &'static [&'static str] = &["NAME", "NETWORK", "ADDRESSES", "MAC", "GROUPS"];
    const WIDE: &'static [&'static str] = &["INSTANCE", "NODE"];
    const NAMES: bool = true;
    fn cells(o: &Object<Self>, names: &Names) -> (Vec<String>, Vec<String>) {
        let head = vec![
            o.metadata.name.clone(),
            o.spec.network.clone(),
            list(&o.status.addresses),
            o.status.mac.clone(),
            list(&o.spec.security_groups),
        ];
        (head, vec![names.of(o.spec.instance), o.status.node.map(|n| names.of(n)).unwrap_or_default()])
    }
}

impl Show for SecurityGroupKind {
    const HEAD: &'static [&'static str] = &["NAME", "RULES"];
    const WIDE: &'static [&'static str] = &["DESCRIPTION"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        (vec![o.metadata.name.clone(), o.spec.rules.len().to_string()], vec![o.spec.description.clone()])
    }
}

impl Show for KeyKind {
    const HEAD: &'static [&'static str] = &["NAME", "TYPE", "FINGERPRINT", "COMMENT"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let mut words = o.spec.public_key.split_ascii_whitespace();
        let kind = words.next().unwrap_or_default().to_string();
        let comment = words.skip(1).collect::<Vec<_>>().join(" ");
        let print = crate::keys::fingerprint(&o.spec.public_key).unwrap_or_default();
        (vec![o.metadata.name.clone(), kind, print, comment], vec![])
    }
}

impl Show for FlavorKind {
    const HEAD: &'static [&'static str] = &["NAME", "VCPUS", "MEMORY", "DISK"];
    const WIDE: &'static [&'static str] = &["CPU-POLICY", "PRICE/HOUR"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let head =
            vec![o.metadata.name.clone(), o.spec.vcpus.to_string(), o.spec.memory.to_string(), o.spec.disk.to_string()];
        (head, vec![word(o.spec.cpu_policy), price(o.spec.price_per_hour_micros)])
    }
}

/// Millionths as a decimal number.
pub fn price(micros: u64) -> String {
    let text = format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

impl Show for ProjectKind {
    const HEAD: &'static [&'static str] = &["NAME", "USERS", "DESCRIPTION"];
    const WIDE: &'static [&'static str] = &["GRANTS"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let grants = list(o.spec.grants.iter().map(|g| format!("{}:{}", g.user, word(g.role))));
        (vec![o.metadata.name.clone(), o.spec.grants.len().to_string(), o.spec.description.clone()], vec![grants])
    }
}

impl Show for UserKind {
    const HEAD: &'static [&'static str] = &["NAME", "ADMIN", "STATE"];
    const WIDE: &'static [&'static str] = &["FULL NAME", "EMAIL", "PASSWORD"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let yes = |b: bool| if b { "yes" } else { "no" }.to_string();
        let state = if o.spec.disabled { "disabled" } else { "active" };
        (
            vec![o.metadata.name.clone(), yes(o.spec.cloud_admin), state.into()],
            vec![o.spec.full_name.clone(), o.spec.email.clone(), yes(o.status.has_password)],
        )
    }
}

impl Show for TokenKind {
    const HEAD: &'static [&'static str] = &["NAME", "USER", "EXPIRES", "DESCRIPTION"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let expires = o.spec.expires_at.map_or_else(|| "never".into(), |t| t.to_string());
        (vec![o.metadata.name.clone(), o.spec.user.clone(), expires, o.spec.description.clone()], vec![])
    }
}

impl Show for JoinTokenKind {
    const HEAD: &'static [&'static str] = &["NAME", "ROLE", "STATE", "EXPIRES", "NODE", "DESCRIPTION"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let state = match o.status.used_at {
            Some(_) => "used",
            None if o.status.expires_at <= now() => "expired",
            None => "open",
        };
        let status = &o.status;
        let cells = vec![
            o.metadata.name.clone(),
            word(o.spec.role),
            state.into(),
            status.expires_at.to_string(),
            status.node_name.clone(),
            o.spec.description.clone(),
        ];
        (cells, vec![])
    }
}

/// `1.5 of 4`-like: what is given and what there is.
fn share(resources: &Resources, of: &Resources) -> [String; 3] {
    [
        format!("{}/{}", resources.vcpus, of.vcpus),
        format!("{}/{}", resources.memory, of.memory),
        format!("{}/{}", resources.disk, of.disk),
    ]
}

/// State of a node in one word.
pub fn node_state(node: &oblak_model::Node) -> String {
    match node.status.phase {
        NodePhase::Ready if !node.spec.schedulable => "cordoned".into(),
        phase => word(phase),
    }
}

impl Show for NodeKind {
    const HEAD: &'static [&'static str] = &["NAME", "STATE", "ZONE", "INSTANCES", "VCPUS", "MEMORY", "ISOLATION"];
    const WIDE: &'static [&'static str] = &["DISK", "ACCELERATOR", "VERSION", "KERNEL", "ADDRESSES", "NOTICES"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let [cpu, memory, disk] = share(&o.status.allocated, &o.status.capacity);
        let facts = &o.status.facts;
        let head = vec![
            o.metadata.name.clone(),
            node_state(o),
            o.spec.zone.clone(),
            o.status.instances.to_string(),
            cpu,
            memory,
            list(&facts.isolations),
        ];
        let wide = vec![
            disk,
            facts.accelerator.clone(),
            o.status.agent_version.clone(),
            facts.kernel.clone(),
            list(&facts.addresses),
            facts.notices.join("; "),
        ];
        (head, wide)
    }
}

impl Show for EventKind {
    const HEAD: &'static [&'static str] = &["ABOUT", "SEVERITY", "REASON", "MESSAGE"];
    const WIDE: &'static [&'static str] = &["COUNT", "SOURCE"];
    fn cells(o: &Object<Self>, _: &Names) -> (Vec<String>, Vec<String>) {
        let severity = if o.spec.severity == Severity::Warning { "warning" } else { "normal" };
        let about = format!("{}/{}", o.spec.about.kind, o.spec.about.name);
        (
            vec![about, severity.into(), o.spec.reason.clone(), o.spec.message.clone()],
            vec![o.spec.count.to_string(), o.spec.source.clone()],
        )
    }
    fn since(object: &Object<Self>) -> Timestamp {
        object.spec.last_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{InstanceSpec, Isolation, NodeId, Phase, Placement};

    fn web() -> Instance {
        let mut web = Instance::new("web", InstanceSpec { image: "tiny".into(), ..InstanceSpec::default() });
        web.status.phase = Phase::Running;
        web.status.resolved.isolation = Isolation::Vm;
        web.status.resolved.flavor = "s".into();
        web.status.observed.runtime = "tcg".into();
        web.status.addresses = vec![oblak_model::InstanceAddress {
            network: "default".into(),
            address: "10.80.0.2".parse().unwrap(),
            mac: "02:00:00:00:00:01".into(),
        }];
        web.status.placement = Some(Placement {
            node: NodeId::default(),
            node_name: "n1".into(),
            resources: Resources::default(),
            at: Timestamp::EPOCH,
            why: String::new(),
            generation: 1,
            fenced: false,
            fence_turn: 1,
        });
        web.metadata.created_at = Timestamp::from_micros(now().as_micros() - 300_000_000);
        web
    }

    #[test]
    fn instances() {
        assert_eq!(
            table(&[web()], &Names::default(), false).render(false),
            "NAME  ISOLATION  STATE    ADDRESSES  NODE  AGE\nweb   vm         running  10.80.0.2  n1    5m\n"
        );
        assert_eq!(
            table(&[web()], &Names::default(), true).render(false),
            "NAME  ISOLATION  STATE    ADDRESSES  NODE  AGE  IMAGE  FLAVOR  RUNTIME  RESTARTS  MESSAGE\n\
             web   vm         running  10.80.0.2  n1    5m   tiny   s       tcg      0         -\n"
        );
    }

    #[test]
    fn images() {
        let spec = |recipe: &str, on_demand: bool| oblak_model::ImageSpec {
            source: ImageSource::Recipe { recipe: recipe.into() },
            checksum: None,
            firmware: oblak_model::ImageFirmware::default(),
            on_demand,
            visibility: Visibility::Public,
            min_memory: Size::ZERO,
            content: Some(oblak_model::ImageContent::Disk),
            retry_generation: 0,
        };
        let mut tiny = oblak_model::Image::new("tiny", spec("tiny", false));
        tiny.status.phase = oblak_model::ImagePhase::Ready;
        tiny.status.size = Size::mib(24);
        tiny.metadata.project = Some("default".into());
        let debian = oblak_model::Image::new("debian-12", spec("debian-12", true));
        assert_eq!(
            table(&[tiny, debian], &Names::default(), false).render(false),
            "NAME       TYPE  STATE               SIZE    PROJECT  AGE\n\
             tiny       disk  ready               24 MiB  default  -\n\
             debian-12  disk  built on first use  -       -        -\n"
        );
    }

    #[test]
    fn images_in_trouble() {
        let source = ImageSource::Url { url: "https://images.lan/a".into() };
        let mut image =
            oblak_model::Image::new("a", serde_json::from_value(serde_json::json!({ "source": source })).unwrap());
        image.status.phase = oblak_model::ImagePhase::Importing;
        assert_eq!(ImageKind::trouble(&image), None);
        image.status.reason = "Retrying".into();
        image.status.message = "no answer; attempt 2 of 5 at 08:00:04 UTC".into();
        let text = "image a is retried: no answer; attempt 2 of 5 at 08:00:04 UTC";
        assert_eq!(ImageKind::trouble(&image).as_deref(), Some(text));
        assert!(table(&[image], &Names::default(), false).render(false).contains("retrying"));
    }

    #[test]
    fn prices() {
        assert_eq!([price(0), price(1_500_000), price(12)], ["0", "1.5", "0.000012"]);
    }
}
