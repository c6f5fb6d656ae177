use std::rc::Rc;

use http::HeaderValue;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::view::testing;

struct World1 {
    world: World,
    view: Rc<View>,
    secret: token::Secret,
}

impl World1 {
    fn new() -> Self {
        let view = Rc::new(testing::view());
        let mut world = World::default();
        world.set(Rc::clone(&view));
        Self { world, view, secret: token::Secret::random() }
    }

    fn ask(&self, peer: &str, method: &Method, path: &str, headers: &[(&'static str, &str)]) -> Reply {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(*name, HeaderValue::from_str(value).unwrap());
        }
        let asker = Asker::find(&self.world, &self.view, peer.parse().unwrap());
        respond(asker.as_ref(), &self.secret, Timestamp::from_micros(1_000_000_000_000), (method, path, &map))
    }

    fn get(&self, path: &str) -> Option<String> {
        let reply = self.ask("10.1.2.10", &Method::GET, path, &[]);
        (reply.status == StatusCode::OK).then(|| String::from_utf8(reply.body).unwrap())
    }
}

#[test]
fn ec2_tree() {
    let w = World1::new();
    let id = testing::port(10, "web", PortKind::Tap).instance.to_string();
    for (path, text) in [
        ("/latest/meta-data/instance-id", id.as_str()),
        ("/2009-04-04/meta-data/instance-id/", id.as_str()),
        ("/latest/meta-data/local-hostname", "web"),
        ("/latest/meta-data/hostname", "web.blue.p1.oblak.internal"),
        ("/latest/meta-data/local-ipv4", "10.1.2.10"),
        ("/latest/meta-data/mac", "02:00:00:00:00:0a"),
        ("/latest/meta-data/public-keys/", "0=me"),
        ("/latest/meta-data/public-keys/0/", "openssh-key"),
        ("/latest/meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA me@host"),
        ("/latest/meta-data/placement/availability-zone", "z1"),
        ("//latest//meta-data/instance-type", "s"),
        ("/latest/meta-data/tags/instance/role", "db"),
        ("/latest/meta-data/network/interfaces/macs/", "02:00:00:00:00:0a/"),
        ("/latest/user-data", "#cloud-config\n{}\n"),
        ("/latest/", "meta-data\nuser-data"),
    ] {
        assert_eq!(w.get(path).as_deref(), Some(text), "{path}");
    }
    let root = w.get("/latest/meta-data/").unwrap();
    for name in ["instance-id", "placement/", "public-keys/", "network/"] {
        assert!(root.lines().any(|l| l == name), "{name} in {root}");
    }
    for path in ["/nope", "/latest/nope", "/latest/meta-data/nope", "/latest/meta-data/public-keys/1/openssh-key"] {
        assert_eq!(w.get(path), None, "{path}");
    }
}

#[test]
fn openstack_documents() {
    let w = World1::new();
    assert!(w.get("/openstack").unwrap().lines().any(|v| v == "latest"));
    assert!(w.get("/openstack/latest").unwrap().lines().any(|v| v == "meta_data.json"));
    let meta: Value = serde_json::from_str(&w.get("/openstack/latest/meta_data.json").unwrap()).unwrap();
    assert_eq!(meta["hostname"], "web.blue.p1.oblak.internal");
    assert_eq!(meta["public_keys"]["me"], "ssh-ed25519 AAAA me@host");
    assert_eq!(meta["meta"]["role"], "db");
    assert_eq!(meta["project_id"], "p1");
    let network: Value = serde_json::from_str(&w.get("/openstack/2018-08-27/network_data.json").unwrap()).unwrap();
    assert_eq!(network["links"][0]["ethernet_mac_address"], "02:00:00:00:00:0a");
    assert_eq!(network["networks"][0]["type"], "ipv4_dhcp");
    assert_eq!(network["services"][0]["address"], "10.1.2.1");
    assert_eq!(w.get("/openstack/latest/user_data").unwrap(), "#cloud-config\n{}\n");
    assert_eq!(w.get("/openstack/latest/vendor_data.json").unwrap(), "{}");
    assert_eq!(w.get("/openstack/1999-01-01/meta_data.json"), None);
}

#[test]
fn everybody_sees_only_itself() {
    let w = World1::new();
    let name = |peer: &str| w.ask(peer, &Method::GET, "/latest/meta-data/local-hostname", &[]);
    assert_eq!(name("10.1.2.11").body, b"job");
    for stranger in ["10.1.2.99", "10.1.2.12", "192.0.2.1", "fe80::1"] {
        assert_eq!(name(stranger).status, StatusCode::NOT_FOUND, "{stranger}");
    }
}

#[test]
fn tokens_and_proxies() {
    let w = World1::new();
    let put = |headers: &[(&'static str, &str)]| w.ask("10.1.2.10", &Method::PUT, "/latest/api/token", headers);
    let issued = put(&[(token::TTL, "60")]);
    assert_eq!((issued.status, issued.token_ttl_s), (StatusCode::OK, Some(60)));
    let good = String::from_utf8(issued.body).unwrap();
    let get = |peer, token: &str| {
        w.ask(peer, &Method::GET, "/latest/meta-data/instance-id", &[("x-aws-ec2-metadata-token", token)]).status
    };
    assert_eq!(get("10.1.2.10", &good), StatusCode::OK);
    assert_eq!(get("10.1.2.11", &good), StatusCode::UNAUTHORIZED, "a token is for one instance");
    let long = good.replacen("1000060", "9000060", 1);
    assert_ne!(long, good);
    for bad in ["", "x", "1.2", &long, "99999999999999999999.a"] {
        assert_eq!(get("10.1.2.10", bad), StatusCode::UNAUTHORIZED, "{bad}");
    }
    let expired = w.secret_token_at(-61);
    assert_eq!(get("10.1.2.10", &expired), StatusCode::UNAUTHORIZED);
    for bad in ["0", "21601", "x"] {
        assert_eq!(put(&[(token::TTL, bad)]).status, StatusCode::BAD_REQUEST);
    }
    assert_eq!(put(&[]).status, StatusCode::BAD_REQUEST);
    assert_eq!(put(&[(token::TTL, "60"), ("x-forwarded-for", "1.2.3.4")]).status, StatusCode::FORBIDDEN);
    let through = w.ask("10.1.2.10", &Method::GET, "/latest/user-data", &[("x-forwarded-for", "1.2.3.4")]);
    assert_eq!(through.status, StatusCode::FORBIDDEN);
    let post = w.ask("10.1.2.10", &Method::POST, "/latest/user-data", &[]);
    assert_eq!(post.status, StatusCode::METHOD_NOT_ALLOWED);
}

impl World1 {
    fn secret_token_at(&self, offset_s: i64) -> String {
        let asker = Asker::find(&self.world, &self.view, "10.1.2.10".parse().unwrap()).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(token::TTL, HeaderValue::from_static("60"));
        let then = Timestamp::from_micros((1_000_000 + offset_s) * 1_000_000);
        let reply = token::issue(&asker, &self.secret, then, &Method::PUT, &headers);
        String::from_utf8(reply.body).unwrap()
    }
}

proptest! {
    #[test]
    fn any_path_is_answered(path in "[/a-z0-9.=%_\\-]{0,60}", token in "[ -~]{0,40}") {
        let w = World1::new();
        let reply = w.ask("10.1.2.10", &Method::GET, &path, &[("x-aws-ec2-metadata-token", &token)]);
        prop_assert!(reply.status.as_u16() < 500);
    }
}
