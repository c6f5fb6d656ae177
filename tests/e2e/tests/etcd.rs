//! The whole cloud with its state in a real etcd.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Settings};
use oblak_model::Phase;
use oblak_store_etcd::testing::{Server, available};

const SOON: Duration = Duration::from_secs(60);

#[test]
fn a_cloud_in_etcd_survives_its_server() {
    if !available(&["etcd", "setpriv"]) {
        return;
    }
    let Some(mut cloud) = Cloud::prepare(Settings::default()) else { return };
    let etcd = Server::start(&oblak_store_etcd::testing::Settings { durable: true, ..Default::default() });
    cloud.settings.env.insert("OBLAK_ETCD".into(), etcd.url().into());
    cloud.up();
    assert!(!cloud.data.join("store/oblak.redb").exists(), "the state is in etcd alone");
    for n in 0..5 {
        cloud.oblak(&["network", "create", &format!("net-{n}"), "--cidr", &format!("10.{}.0.0/24", 120 + n)]).ok();
    }
    let guest = Draft::container("a", &["sh", "-c", "exec sleep 100000"]).run(&mut cloud);
    let shim = cloud.shim(&guest);

    cloud.kill_server();
    cloud.up();
    let networks = cloud.oblak(&["network", "list"]).ok();
    for n in 0..5 {
        assert!(networks.contains(&format!("net-{n}")), "net-{n} is missing in\n{networks}");
    }
    let adopted = cloud.in_phase("a", Phase::Running, SOON);
    assert_eq!(cloud.shim(&adopted), shim, "the same processes");
    cloud.oblak(&["delete", "a", "--wait"]).ok();
    assert!(cloud.all::<oblak_model::InstanceKind>("default").is_empty());
    cloud.finish();
}
