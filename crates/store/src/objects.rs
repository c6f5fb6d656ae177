//! How objects of the model lie in the store: the keys, the encoding, and the guards that belong to each change.
//!
//! | key | value | why |
//! |---|---|---|
//! | `/<kind>/<scope>/<id>` | object | scope is the project, `_` for kinds of the cloud |
//! | `/name/<kind>/<scope>/<name>` | id | makes names unique |
//! | `/address/<subnet id>/<ip>` | port id | an address is given once |
//! | `/allocation/_/<node id>` | [`Allocation`] | what is reserved on a node; written in the commit that assigns |
//! | `/hostport/<node id>/<tcp or udp>-<port>` | instance id | a port of a host is published once |
//! | `/vni/_/<number>` | network id | two networks never share a number between nodes |
//! | `/lease/_/<node id>` | epoch | attached to the lease of the node: gone means that the node is gone |
//! | `/server/_/<server id>` | [`oblak_model::ClusterServer`] | attached to the lease of the server: who serves, and where |
//! | `/leader/_/control` | [`oblak_model::ClusterLeader`] | attached to the lease of the leader; every commit of a reconciler is guarded by its revision |
//! | `/election/_/control` | epoch | of the last leader; outlives its lease, so that no two leaders have the same |
//! | `/superseded/<node id>/<instance id>` | [`Superseded`] | the instance was moved, and the node may still have something of it |
//! | `/secret/<kind>/<id>` | hash or secret | never served |

use std::cell::RefCell;
use std::net::IpAddr;

use bytes::Bytes;
use oblak_model::{InstanceId, Kind, NodeId, Object, Resources, ServerId, SubnetId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{Entry, Guard, Key, Prefix, Result, StoreError, Write};

/// First byte of every value: the version of its schema. The rest is JSON.
pub const SCHEMA_VERSION: u8 = b'1';

/// What is reserved on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Sum over the instances placed there.
    pub resources: Resources,
    /// How many they are.
    pub instances: u64,
}

/// Most bytes that the buffer of a thread keeps.
const SCRATCH_BYTES: usize = 64 << 10;

thread_local! {
    /// Values grow in here and are then copied once: what is kept has no spare room, and nothing is copied while it grows.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Encodes a value with its schema version.
///
/// # Panics
/// Never for types of the model: they serialize into JSON.
pub fn encode_value<T: Serialize>(value: &T) -> Bytes {
    SCRATCH.with_borrow_mut(|out| {
        out.clear();
        out.shrink_to(SCRATCH_BYTES);
        out.push(SCHEMA_VERSION);
        serde_json::to_writer(&mut *out, value).expect("types of the model serialize into JSON");
        Bytes::copy_from_slice(out)
    })
}

/// Decodes what [`encode_value`] wrote.
///
/// # Errors
/// [`StoreError::Codec`] naming the key when the version is unknown or the JSON is not what is expected.
pub fn decode_value<T: for<'de> Deserialize<'de>>(key: &Key, bytes: &[u8]) -> Result<T> {
    let corrupt = |detail: String| StoreError::Codec { key: key.clone(), reason: detail };
    match bytes.split_first() {
        Some((&SCHEMA_VERSION, json)) => serde_json::from_slice(json).map_err(|e| corrupt(e.to_string())),
        Some((version, _)) => Err(corrupt(format!("schema version {version} is newer than this program; upgrade it"))),
        None => Err(corrupt("empty value".into())),
    }
}

/// Decodes an object and stamps the revision it was read at.
///
/// # Errors
/// As [`decode_value`].
pub fn decode<K: Kind>(entry: &Entry) -> Result<Object<K>> {
    let mut object: Object<K> = decode_value(&entry.key, &entry.value)?;
    object.metadata.revision = entry.revision;
    Ok(object)
}

/// Encodes an object. The revision inside is meaningless: readers take the one of the entry.
#[must_use]
pub fn encode<K: Kind>(object: &Object<K>) -> Bytes {
    encode_value(object)
}

fn key(segments: &[&str]) -> Key {
    Key::from_segments(segments).expect("kinds, validated names, ids and addresses are valid segments")
}

/// Key of an object by scope (project or `_`) and id.
#[must_use]
pub fn object_key<K: Kind>(scope: &str, id: Uuid) -> Key {
    key(&[K::KIND, scope, id.as_hyphenated().encode_lower(&mut Uuid::encode_buffer())])
}

/// Key of this object.
#[must_use]
pub fn key_of<K: Kind>(object: &Object<K>) -> Key {
    object_key::<K>(object.scope_key(), object.metadata.id)
}

/// All objects of a kind, or those of one scope.
///
/// # Panics
/// When `scope` is not a valid segment; validated names are.
#[must_use]
pub fn object_prefix<K: Kind>(scope: Option<&str>) -> Prefix {
    let text = scope.map_or_else(|| format!("/{}", K::KIND), |s| format!("/{}/{s}", K::KIND));
    Prefix::new(&text).expect("kinds and validated names are valid segments")
}

/// Key of a name.
#[must_use]
pub fn name_key<K: Kind>(scope: &str, name: &str) -> Key {
    key(&["name", K::KIND, scope, name])
}

/// Key of an address.
#[must_use]
pub fn address_key(subnet: SubnetId, address: IpAddr) -> Key {
    key(&["address", &subnet.to_string(), &address.to_string()])
}

/// All addresses of a subnet that are taken.
///
/// # Panics
/// Never: an id is a valid segment.
#[must_use]
pub fn address_prefix(subnet: SubnetId) -> Prefix {
    Prefix::new(&format!("/address/{subnet}")).expect("an id is a valid segment")
}

/// Key of what is reserved on a node.
#[must_use]
pub fn allocation_key(node: NodeId) -> Key {
    key(&["allocation", "_", &node.to_string()])
}

/// Key of a published port of a host; `protocol` is `tcp` or `udp`.
#[must_use]
pub fn host_port_key(node: NodeId, protocol: &str, port: u16) -> Key {
    key(&["hostport", &node.to_string(), &format!("{protocol}-{port}")])
}

/// Key of a network's number between nodes.
#[must_use]
pub fn vni_key(vni: u32) -> Key {
    key(&["vni", "_", &vni.to_string()])
}

/// Numbers for a network, in the order in which they should be tried. They begin at a place that comes from the network's id, so that
/// clouds that share an underlay seldom meet. Those below [`VNI_FIRST`] are left to people.
pub fn vni_candidates(network: Uuid) -> impl Iterator<Item = u32> {
    const COUNT: u32 = VNI_LAST - VNI_FIRST + 1;
    let [.., a, b, c, d] = *network.as_bytes();
    let start = u32::from_be_bytes([a, b, c, d]) % COUNT;
    (0..VNI_TRIES).map(move |n| VNI_FIRST + (start + n) % COUNT)
}

/// The smallest number that is given by itself.
pub const VNI_FIRST: u32 = 4096;
/// The largest that 24 bits can hold (RFC 7348).
pub const VNI_LAST: u32 = (1 << 24) - 1;
/// Numbers that are tried for one network. With half of all numbers taken this fails once in 2^4096.
const VNI_TRIES: u32 = 4096;

/// Key that lives as long as the lease of a node.
#[must_use]
pub fn lease_key(node: NodeId) -> Key {
    key(&["lease", "_", &node.to_string()])
}

/// Kinds of keys that live and die with a lease. They mean nothing in another store, where the lease does not exist.
const LEASED: &[&str] = &["lease", "leader", "server"];

/// Whether a key lives and dies with a lease.
#[must_use]
pub fn is_leased(key: &Key) -> bool {
    key.segments().next().is_some_and(|kind| LEASED.contains(&kind))
}

/// Key of a server that is alive.
#[must_use]
pub fn server_key(server: ServerId) -> Key {
    key(&["server", "_", &server.to_string()])
}

/// Key of the leader of the control plane.
#[must_use]
pub fn leader_key() -> Key {
    key(&["leader", "_", "control"])
}

/// Key of the epoch of the last leader.
#[must_use]
pub fn election_key() -> Key {
    key(&["election", "_", "control"])
}

/// Key that says that a node may still have something of an instance that was moved elsewhere; its value is the [`Superseded`] placement.
#[must_use]
pub fn superseded_key(node: NodeId, instance: InstanceId) -> Key {
    key(&["superseded", &node.to_string(), &instance.to_string()])
}

/// Prefix of the instances that a node may still have something of although they are elsewhere.
#[must_use]
pub fn superseded_prefix(node: NodeId) -> Prefix {
    Prefix::new(&format!("/superseded/{node}")).expect("an id is a valid segment")
}

/// A placement that has been taken from a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superseded {
    /// `status.placement.generation` of the instance when it was there.
    pub placement: u64,
}

/// Key of what is never served.
#[must_use]
pub fn secret_key(kind: &str, id: &str) -> Key {
    key(&["secret", kind, id])
}

/// What the creation of an object needs: neither the object nor its name exists, then both do.
#[must_use]
pub fn create_ops<K: Kind>(object: &Object<K>) -> (Vec<Guard>, Vec<Write>) {
    let (object_key, name_key) = (key_of(object), name_key::<K>(object.scope_key(), &object.metadata.name));
    let id = encode_value(&object.metadata.id);
    (
        vec![Guard::Absent(object_key.clone()), Guard::Absent(name_key.clone())],
        vec![put(object_key, encode(object)), put(name_key, id)],
    )
}

/// What a change needs: the object is still the one that was read (`object.metadata.revision`), then it is the new one.
#[must_use]
pub fn update_ops<K: Kind>(object: &Object<K>) -> (Guard, Write) {
    let key = key_of(object);
    (Guard::Revision(key.clone(), object.metadata.revision), put(key, encode(object)))
}

/// What the final removal needs: the object is still the one that was read, then it and its name are gone.
#[must_use]
pub fn delete_ops<K: Kind>(object: &Object<K>) -> (Guard, Vec<Write>) {
    let key = key_of(object);
    let name = name_key::<K>(object.scope_key(), &object.metadata.name);
    (Guard::Revision(key.clone(), object.metadata.revision), vec![Write::Delete { key }, Write::Delete { key: name }])
}

/// A write without a lease.
#[must_use]
pub fn put(key: Key, value: Bytes) -> Write {
    Write::Put { key, value, lease: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{Instance, InstanceKind, InstanceSpec};

    #[test]
    fn objects_round_trip_with_the_revision_of_the_entry() {
        let mut web = Instance::new("web", InstanceSpec { image: "tiny".into(), ..InstanceSpec::default() });
        web.metadata.id = Uuid::now_v7();
        web.metadata.project = Some("default".into());
        let revision = oblak_model::Revision::new(1, 7);
        let entry = Entry { key: key_of(&web), value: encode(&web), revision, created: revision };
        let read = decode::<InstanceKind>(&entry).unwrap();
        assert_eq!(read.metadata.revision, revision);
        assert_eq!(read.spec, web.spec);
        assert_eq!(entry.key.as_str(), format!("/instance/default/{}", web.metadata.id));
    }

    #[test]
    fn numbers_of_networks_are_in_range_and_wrap() {
        for tail in [0, 1, u128::from(u32::MAX), u128::from(VNI_LAST - VNI_FIRST)] {
            let all: Vec<u32> = vni_candidates(Uuid::from_u128(tail)).collect();
            assert_eq!(all.len(), 4096);
            assert!(all.iter().all(|vni| (VNI_FIRST..=VNI_LAST).contains(vni)));
            assert_eq!(all.iter().collect::<std::collections::BTreeSet<_>>().len(), 4096, "each once");
        }
    }

    #[test]
    fn unknown_versions_are_named() {
        let key = name_key::<InstanceKind>("default", "web");
        let error = decode_value::<Uuid>(&key, b"9\"x\"").unwrap_err().to_string();
        assert!(error.contains("/name/instance/default/web"), "{error}");
    }
}
