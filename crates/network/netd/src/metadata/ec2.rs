//! The layout of EC2: a tree of small texts.

use std::collections::BTreeMap;

use super::{Asker, Reply};

/// Versions that clients ask for; all are answered alike.
pub const VERSIONS: &[&str] = &["1.0", "2009-04-04", "2021-03-23", "latest"];

pub(super) fn get(asker: &Asker<'_>, path: &[&str]) -> Option<Reply> {
    match path {
        [] => {
            let user_data = asker.metadata.user_data.as_ref().map_or("", |_| "\nuser-data");
            Some(Reply::text(format!("meta-data{user_data}")))
        }
        ["user-data"] => asker
            .metadata
            .user_data
            .as_ref()
            .map(|data| Reply { content_type: "application/octet-stream", ..Reply::text(data.as_bytes()) }),
        ["meta-data", rest @ ..] => node(asker, &tree(asker), rest),
        _ => None,
    }
}

/// A leaf's text, or the names in a directory: those of directories end in `/`.
fn node(asker: &Asker<'_>, tree: &BTreeMap<String, String>, path: &[&str]) -> Option<Reply> {
    let path = path.join("/");
    if let Some(text) = tree.get(&path) {
        return Some(Reply::text(text.as_bytes()));
    }
    if path == "public-keys" {
        // Not names but `<number>=<name>`.
        let keys: Vec<_> =
            asker.metadata.public_keys.keys().enumerate().map(|(i, name)| format!("{i}={name}")).collect();
        return (!keys.is_empty()).then(|| Reply::text(keys.join("\n")));
    }
    let prefix = if path.is_empty() { path } else { path + "/" };
    let mut names: Vec<String> = tree
        .keys()
        .filter_map(|key| key.strip_prefix(&prefix))
        .map(|rest| rest.split_once('/').map_or_else(|| rest.to_string(), |(dir, _)| format!("{dir}/")))
        .collect();
    names.dedup();
    (!names.is_empty()).then(|| Reply::text(names.join("\n")))
}

fn tree(asker: &Asker<'_>) -> BTreeMap<String, String> {
    let metadata = asker.metadata;
    let mut tree = BTreeMap::new();
    let mut put = |path: &str, text: String| {
        tree.insert(path.to_string(), text);
    };
    put("instance-id", metadata.instance.to_string());
    put("instance-type", metadata.instance_type.clone());
    put("instance-action", "none".into());
    put("local-hostname", asker.port.hostname.clone());
    put("hostname", asker.fqdn());
    put("mac", asker.port.mac.clone());
    put("placement/availability-zone", metadata.availability_zone.clone());
    put("services/domain", asker.view.domain.clone());
    if let Some(address) = asker.ipv4() {
        put("local-ipv4", address.to_string());
    }
    for (i, line) in metadata.public_keys.values().enumerate() {
        put(&format!("public-keys/{i}/openssh-key"), line.trim_end().to_string());
    }
    for (key, value) in metadata.meta.iter().filter(|(key, _)| !key.contains('/')) {
        put(&format!("tags/instance/{key}"), value.clone());
    }
    for (view, i) in asker.world.ports_of(metadata.instance) {
        let port = &view.plan.ports[i];
        let mac = format!("network/interfaces/macs/{}", port.mac);
        put(&format!("{mac}/device-number"), port.index.to_string());
        put(&format!("{mac}/interface-id"), port.id.to_string());
        put(&format!("{mac}/mac"), port.mac.clone());
        put(&format!("{mac}/local-hostname"), view.fqdn(port));
        let v4 = port.addresses.iter().filter(|a| a.is_ipv4());
        put(&format!("{mac}/local-ipv4s"), v4.map(ToString::to_string).collect::<Vec<_>>().join("\n"));
        if let Some((_, subnet)) = view.lease(port) {
            put(&format!("{mac}/subnet-ipv4-cidr-block"), subnet.cidr.to_string());
        }
    }
    tree
}
