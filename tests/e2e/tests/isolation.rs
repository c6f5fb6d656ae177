//! Projects and security groups keep guests apart.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::time::Duration;

use oblak_e2e::{Cloud, Draft, Ran};
use oblak_model::{Project, ProjectSpec, SecurityGroup, SecurityGroupSpec, SecurityRule};

fn fetch(cloud: &Cloud, project: &str, from: &str, to: &str) -> Ran {
    let url = format!("http://{to}/");
    let mut command = cloud.command(&["exec", from, "--", "timeout", "3", "wget", "-qO-", &url]);
    command.env("OBLAK_PROJECT", project);
    oblak_e2e::Running::start(command).wait(Duration::from_secs(30))
}

#[test]
fn projects_and_groups_are_apart() {
    let Some(mut cloud) = Cloud::start() else { return };
    let client = cloud.client();
    let other = Project::new("other", ProjectSpec::default());
    cloud.wait(client.create("", &other)).unwrap();

    // The same address in both projects, each with its own neighbours.
    let address = "10.80.0.50";
    Draft::server("shop", "default-shop").at(Some(address), &[]).run(&mut cloud);
    Draft::server("shop", "other-shop").project("other").at(Some(address), &[]).run(&mut cloud);
    Draft::container("guest", &["sleep", "1000"]).run(&mut cloud);
    Draft::container("guest", &["sleep", "1000"]).project("other").run(&mut cloud);
    // Something that only the other project has.
    Draft::server("secret", "secret").project("other").at(Some("10.80.0.77"), &[]).run(&mut cloud);

    assert_eq!(fetch(&cloud, "default", "guest", address).ok().trim(), "default-shop");
    assert_eq!(fetch(&cloud, "other", "guest", address).ok().trim(), "other-shop");
    assert_eq!(fetch(&cloud, "default", "guest", "shop").ok().trim(), "default-shop");
    assert_eq!(fetch(&cloud, "other", "guest", "shop").ok().trim(), "other-shop");
    assert_eq!(fetch(&cloud, "other", "guest", "secret").ok().trim(), "secret");
    assert_ne!(fetch(&cloud, "default", "guest", "10.80.0.77").code, 0);
    assert_ne!(fetch(&cloud, "default", "guest", "secret").code, 0);

    // Groups: `default` lets its members in and nobody else; a rule opens one port.
    let closed = SecurityGroup::new("closed", SecurityGroupSpec::default());
    let group = cloud.wait(client.create("default", &closed)).unwrap();
    Draft::server("vault", "vault").at(None, &["closed"]).run(&mut cloud);
    assert_ne!(fetch(&cloud, "default", "guest", "vault").code, 0);
    assert_ne!(fetch(&cloud, "default", "vault", "shop").code, 0);
    let rule: SecurityRule = serde_json::from_value(
        serde_json::json!({"direction": "ingress", "protocol": "tcp", "port_min": 80, "group": "default"}),
    )
    .unwrap();
    let mut opened = group;
    opened.spec.rules.push(rule);
    cloud.wait(client.replace(&opened)).unwrap();
    oblak_e2e::until("the opened port answers", Duration::from_secs(15), || {
        let ran = fetch(&cloud, "default", "guest", "vault");
        (ran.code == 0 && ran.out.trim() == "vault").then_some(())
    });
    assert_ne!(fetch(&cloud, "default", "vault", "shop").code, 0);

    // What is used cannot be deleted, and the answer names who uses it.
    let error =
        cloud.wait(client.delete::<oblak_model::SecurityGroupKind>("default", "closed")).unwrap_err().to_string();
    assert!(error.contains("vault"), "{error}");
    let error = cloud.wait(client.delete::<oblak_model::ProjectKind>("", "other")).unwrap_err().to_string();
    assert!(error.contains("other"), "{error}");
    cloud.clear();
    cloud.wait(client.delete::<oblak_model::ProjectKind>("", "other")).unwrap();
    cloud.finish();
}
