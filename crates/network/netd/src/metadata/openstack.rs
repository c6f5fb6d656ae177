//! The layout of OpenStack: a few JSON documents.

use std::net::IpAddr;

use ipnet::IpNet;
use oblak_network::PortPlan;
use serde_json::{Map, Value, json};

use super::{Asker, Reply};
use crate::view::View;

/// Versions that clients ask for; all are answered alike. 2018-08-27 is the first with `vendor_data2.json` and device tags.
const VERSIONS: &[&str] = &[
    "2012-08-10",
    "2013-04-04",
    "2013-10-17",
    "2015-10-15",
    "2016-06-30",
    "2016-10-06",
    "2017-02-22",
    "2018-08-27",
    "latest",
];

pub(super) fn get(asker: &Asker<'_>, path: &[&str]) -> Option<Reply> {
    let (version, rest) = match path.split_first() {
        None => return Some(Reply::text(VERSIONS.join("\n"))),
        Some((version, rest)) => (version, rest),
    };
    if !VERSIONS.contains(version) {
        return None;
    }
    match rest {
        [] => {
            let user_data = asker.metadata.user_data.as_ref().map_or("", |_| "user_data\n");
            Some(Reply::text(format!(
                "meta_data.json\nnetwork_data.json\n{user_data}vendor_data.json\nvendor_data2.json"
            )))
        }
        ["meta_data.json"] => Some(Reply::json(&meta_data(asker))),
        ["network_data.json"] => Some(Reply::json(&network_data(asker))),
        ["vendor_data.json" | "vendor_data2.json"] => Some(Reply::json(&json!({}))),
        ["user_data"] => asker
            .metadata
            .user_data
            .as_ref()
            .map(|data| Reply { content_type: "application/octet-stream", ..Reply::text(data.as_bytes()) }),
        _ => None,
    }
}

fn meta_data(asker: &Asker<'_>) -> Value {
    let metadata = asker.metadata;
    let keys = metadata.public_keys.iter().map(|(name, line)| json!({"name": name, "type": "ssh", "data": line}));
    json!({
        "uuid": metadata.instance,
        "name": metadata.name,
        "hostname": asker.fqdn(),
        "project_id": metadata.project,
        "availability_zone": metadata.availability_zone,
        "instance_type": metadata.instance_type,
        "launch_index": 0,
        "meta": metadata.meta,
        "public_keys": metadata.public_keys,
        "keys": keys.collect::<Vec<_>>(),
        "devices": [],
    })
}

/// IPv4 by DHCP, so that guests follow later changes; IPv6 fixed, because nothing else configures it.
fn network_data(asker: &Asker<'_>) -> Value {
    let (mut links, mut networks, mut services) = (vec![], vec![], vec![]);
    for (view, i) in asker.world.ports_of(asker.metadata.instance) {
        let port = &view.plan.ports[i];
        let link = format!("eth{}", port.index);
        links.push(json!({
            "id": link, "type": "phy", "vif_id": port.id, "ethernet_mac_address": port.mac, "mtu": view.plan.mtu,
        }));
        if view.lease(port).is_some() {
            networks.push(json!({
                "id": format!("{link}-v4"), "type": "ipv4_dhcp", "link": link, "network_id": view.plan.id,
            }));
        }
        networks.extend(port.addresses.iter().filter_map(|address| fixed_v6(&view, port, &link, *address)));
        for gateway in view.gateways() {
            let entry = json!({"type": "dns", "address": gateway});
            if port.index == 0 && !services.contains(&entry) {
                services.push(entry);
            }
        }
    }
    json!({"links": links, "networks": networks, "services": services})
}

fn fixed_v6(view: &View, port: &PortPlan, link: &str, address: IpAddr) -> Option<Value> {
    let subnet = view.subnet_of(address)?;
    let IpNet::V6(cidr) = subnet.cidr else { return None };
    let mut network = Map::new();
    let mut put = |key: &str, value: Value| {
        network.insert(key.to_string(), value);
    };
    put("id", json!(format!("{link}-v6")));
    put("type", json!("ipv6"));
    put("link", json!(link));
    put("network_id", json!(view.plan.id));
    put("ip_address", json!(address));
    put("netmask", json!(cidr.netmask()));
    if port.index == 0 {
        put("routes", json!([{"network": "::", "netmask": "::", "gateway": subnet.gateway}]));
    }
    Some(Value::Object(network))
}
