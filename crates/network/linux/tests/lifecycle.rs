//! What exists when: conformance, idempotence, repair, leftovers, kill -9, netd.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use oblak_network::{NetworkDriver, PortHandle, PortKind};
use oblak_network_linux::LinuxNetwork;
use support::{Bed, PATIENCE, guest, output, pings, plan_with, v4};

use PortKind::{Netns, Tap};

#[tokio::test]
async fn conforms() {
    let Some(bed) = Bed::new() else { return };
    let before = bed.traces();
    oblak_network::conformance::run(&bed).await;
    assert_eq!(bed.traces(), before, "nothing is left behind");
}

#[tokio::test]
async fn tap_is_persistent_and_opens_with_virtio_headers() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let plan = plan_with("tap", &[Tap]);
    let handle = driver.ensure(&plan).await.unwrap();
    let PortHandle::Tap { netns, device, vnet_hdr: true } = &handle.ports[&plan.ports[0].id] else {
        panic!("{handle:?}")
    };
    let shown = output(netns, "ip", &["-d", "link", "show", device]);
    assert!(shown.contains("tun type tap pi off vnet_hdr on persist on"), "{shown}");
    assert!(shown.contains("learning off flood off"), "{shown}");
    assert!(shown.contains("mtu 1400"), "{shown}");
}

#[tokio::test]
async fn ensure_again_changes_no_rules_and_a_flush_is_repaired() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("again", &[Netns, Tap]);
    let handle = driver.ensure(&plan).await.unwrap();
    let netns = handle.netns.clone().unwrap();
    // Handles are new numbers whenever a table is made anew.
    let rules =
        || [output(&netns, "nft", &["-a", "list", "ruleset"]), output(&bed.host, "nft", &["-a", "list", "ruleset"])];
    let before = rules();
    assert!(before[0].contains("oblak") && before[1].contains("oblak_"), "{before:?}");
    driver.ensure(&plan).await.unwrap();
    bed.linux().ensure(&plan).await.unwrap();
    assert_eq!(rules(), before);
    for place in [&netns, &bed.host] {
        output(place, "nft", &["flush", "ruleset"]);
    }
    driver.ensure(&plan).await.unwrap();
    assert!(rules().iter().all(|r| r.contains("chain forward")), "flushed rules are put back");
    let before = rules();
    plan.ports[1].ingress.clear();
    driver.ensure(&plan).await.unwrap();
    let after = rules();
    assert_ne!(before[0], after[0]);
    assert_eq!(before[1], after[1], "the host's table does not depend on security groups");
}

#[tokio::test]
async fn a_new_port_is_quick() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("quick", &[]);
    let started = Instant::now();
    driver.ensure(&plan).await.unwrap();
    let first = started.elapsed();
    let mut times = Vec::new();
    for last in 10..31 {
        plan.ports.push(oblak_network::conformance::port(&plan, if last % 2 == 0 { Netns } else { Tap }, last));
        let started = Instant::now();
        driver.ensure(&plan).await.unwrap();
        times.push(started.elapsed());
    }
    times.sort();
    let started = Instant::now();
    driver.ensure(&plan).await.unwrap();
    let (median, again) = (times[times.len() / 2], started.elapsed());
    println!("new network {first:?}, new port median {median:?} max {:?}, unchanged {again:?}", times[times.len() - 1]);
    // The goal is 40 ms on an idle machine; the limit here only catches a different order of magnitude under load.
    assert!(median < Duration::from_millis(400), "{times:?}");
}

#[tokio::test]
async fn addresses_change_in_place() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("moves", &[Netns, Netns]);
    let handle = driver.ensure(&plan).await.unwrap();
    let from = guest(&handle, &plan.ports[0]);
    plan.ports[1].addresses = vec!["10.77.0.99".parse().unwrap()];
    driver.ensure(&plan).await.unwrap();
    assert!(pings(&from, "10.77.0.99".parse().unwrap(), PATIENCE));
    let shown = output(&guest(&handle, &plan.ports[1]), "ip", &["-4", "-o", "addr", "show", "eth0"]);
    assert!(shown.contains("10.77.0.99/24") && !shown.contains("10.77.0.11"), "{shown}");
}

#[tokio::test]
async fn one_instance_in_two_networks() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let (mut one, two) = (plan_with("one", &[Netns]), plan_with("two", &[Netns, Netns]));
    one.subnets[0].cidr = "10.78.0.0/24".parse().unwrap();
    one.subnets[0].gateway = "10.78.0.1".parse().unwrap();
    let mut second = oblak_network::conformance::port(&one, Netns, 20);
    second.instance = two.ports[0].instance;
    second.index = 1;
    one.ports = vec![second.clone()];
    let first = driver.ensure(&two).await.unwrap();
    let both = driver.ensure(&one).await.unwrap();
    let netns = guest(&first, &two.ports[0]);
    assert_eq!(guest(&both, &second), netns);
    assert!(pings(&netns, v4(&two.ports[1]).into(), PATIENCE));
    let routes = output(&netns, "ip", &["route"]);
    assert!(routes.contains("default via 10.77.0.1 dev eth0") && routes.contains("10.78.0.0/24 dev eth1"), "{routes}");
    driver.remove(two.id).await.unwrap();
    assert!(netns.exists(), "still plugged elsewhere");
    driver.remove(one.id).await.unwrap();
    assert!(!netns.exists(), "gone with its last port");
}

/// Ends by kill -9 of a process that makes and removes the same network all the time, at different moments.
#[tokio::test]
async fn converges_after_kill_9() {
    let Some(bed) = Bed::new() else { return };
    let before = bed.traces();
    let mut plan = plan_with("killed", &[Netns, Tap, Netns, PortKind::Remote]);
    plan.overlay = Some(oblak_network::OverlayPlan { vni: 7, local: support::HOST.into() });
    plan.ports[3].tunnel = Some(support::OUTSIDE.into());
    plan.ports[0].userns = Some(7 << 16);
    let file = bed.data().with_extension("plan");
    std::fs::write(&file, serde_json::to_vec(&plan).unwrap()).unwrap();
    for millis in [3, 9, 14, 21, 27, 33, 48, 64] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_is_killed", "--ignored", "--nocapture"])
            .env("OBLAK_TEST_PLAN", &file)
            .env("OBLAK_TEST_DATA", bed.data())
            .env("OBLAK_TEST_RUN", bed.run_dir())
            .env("OBLAK_TEST_HOST", &bed.host)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("begin") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut output, &mut line).unwrap() > 0, "the child ended early");
        }
        std::thread::sleep(Duration::from_millis(millis));
        child.kill().unwrap();
        child.wait().unwrap();
        let driver = bed.linux();
        let handle = driver.ensure(&plan).await.unwrap();
        assert_eq!(handle.ports.len(), 3);
        let from = guest(&handle, &plan.ports[0]);
        assert!(pings(&from, v4(&plan.ports[2]).into(), PATIENCE), "after {millis} ms");
    }
    bed.linux().remove(plan.id).await.unwrap();
    assert_eq!(bed.traces(), before);
}

#[tokio::test]
#[ignore = "run by converges_after_kill_9 only"]
async fn child_that_is_killed() {
    let Ok(file) = std::env::var("OBLAK_TEST_PLAN") else { return };
    let plan: oblak_network::NetworkPlan = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut config = oblak_network_linux::Config::new(std::env::var("OBLAK_TEST_DATA").unwrap(), Vec::new());
    config.run = std::env::var("OBLAK_TEST_RUN").unwrap().into();
    config.host_netns = Some(std::env::var("OBLAK_TEST_HOST").unwrap().into());
    let driver = LinuxNetwork::new(&config).unwrap();
    println!("begin");
    loop {
        driver.ensure(&plan).await.unwrap();
        driver.remove(plan.id).await.unwrap();
    }
}

#[tokio::test]
async fn files_left_by_a_reboot_are_used_again() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let plan = plan_with("reboot", &[Netns]);
    let handle = driver.ensure(&plan).await.unwrap();
    // After a power cut on a /run that is kept on disk: files without mounts, no host rules, no links.
    for path in [handle.netns.clone().unwrap(), guest(&handle, &plan.ports[0])] {
        nix::mount::umount2(&path, nix::mount::MntFlags::MNT_DETACH).unwrap();
        assert!(path.exists());
    }
    output(&bed.host, "nft", &["flush", "ruleset"]);
    let driver = bed.linux();
    assert_eq!(driver.observe(plan.id).await.unwrap(), None);
    assert_eq!(driver.list().await.unwrap(), [plan.id]);
    assert_eq!(driver.ensure(&plan).await.unwrap(), handle);
    assert!(pings(&guest(&handle, &plan.ports[0]), "10.77.0.1".parse().unwrap(), PATIENCE));
}

#[tokio::test]
async fn two_data_directories_do_not_meet() {
    let Some(bed) = Bed::new() else { return };
    let mut config = bed.config(&[]);
    let one = LinuxNetwork::new(&config).unwrap();
    config.data = bed.data().with_extension("other");
    let two = LinuxNetwork::new(&config).unwrap();
    let (a, b) = (plan_with("a", &[Netns]), plan_with("b", &[Netns]));
    one.ensure(&a).await.unwrap();
    let handle = two.ensure(&b).await.unwrap();
    assert_eq!(one.list().await.unwrap(), [a.id]);
    assert_eq!(two.list().await.unwrap(), [b.id]);
    one.remove(a.id).await.unwrap();
    assert!(pings(&guest(&handle, &b.ports[0]), support::OUTSIDE.into(), PATIENCE), "NAT of the other still works");
    two.remove(b.id).await.unwrap();
}

#[tokio::test]
async fn bad_plans_are_refused_before_anything_is_made() {
    let Some(bed) = Bed::new() else { return };
    let (driver, before) = (bed.linux(), bed.traces());
    let good = plan_with("bad", &[Netns, Netns]);
    let spoil: [fn(&mut oblak_network::NetworkPlan); 5] = [
        |p| p.ports[0].mac = "02:00:00:00:00:01\" : accept; #".into(),
        |p| p.ports[0].mac = p.ports[1].mac.clone(),
        |p| p.ports[0].addresses = p.ports[1].addresses.clone(),
        |p| p.ports[0].addresses = vec!["10.99.0.1".parse().unwrap()],
        |p| p.subnets[0].gateway = "10.99.0.1".parse().unwrap(),
    ];
    for spoil in spoil {
        let mut plan = good.clone();
        spoil(&mut plan);
        assert_eq!(driver.ensure(&plan).await.unwrap_err().code, "plan_invalid");
    }
    assert_eq!(bed.traces(), before);
    assert_eq!(driver.list().await.unwrap(), []);
}

#[tokio::test]
async fn netd_is_started_once_adopted_and_restarted() {
    use oblak_platform::{fsx, process::Identity};
    let Some(bed) = Bed::new() else { return };
    let config = bed.config(&["sh", "-c", "exec sleep 1000"]);
    let record = bed.data().join("network/netd.pid.json");
    let running = || fsx::read_json::<Identity>(&record).unwrap().unwrap();
    struct Kill<F: Fn() -> Identity>(F);
    impl<F: Fn() -> Identity> Drop for Kill<F> {
        fn drop(&mut self) {
            (self.0)().kill();
        }
    }
    let driver = LinuxNetwork::new(&config).unwrap();
    driver.ensure_services().await.unwrap();
    let _kill = Kill(running);
    let first = running();
    assert!(first.is_alive());
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(first.pid))).unwrap();
    assert_eq!(session.as_raw(), first.pid, "it has a session of its own");
    drop(driver);
    let driver = LinuxNetwork::new(&config).unwrap();
    driver.ensure_services().await.unwrap();
    assert_eq!(running(), first, "adopted");
    first.kill();
    assert!(first.wait_gone(PATIENCE).await);
    driver.ensure_services().await.unwrap();
    assert_ne!(running(), first);
    assert!(running().is_alive());
    let missing = LinuxNetwork::new(&bed.config(&[])).unwrap();
    running().kill();
    assert!(missing.ensure_services().await.unwrap_err().detail.contains("no command for netd"));
}

/// Whether a raw socket may be opened in `netns` with the capabilities of root in the user namespace `user`.
fn raw_ping(user: &std::path::Path, netns: &std::path::Path, to: &str) -> std::process::Output {
    let namespaces = [format!("--user={}", user.display()), format!("--net={}", netns.display())];
    Command::new("nsenter").args(namespaces).args(["busybox", "ping", "-c1", "-W5", to]).output().unwrap()
}

#[tokio::test]
async fn a_user_namespace_owns_the_network_of_its_instance() {
    let Some(bed) = Bed::new() else { return };
    let (driver, before) = (bed.linux(), bed.traces());
    let mut plan = plan_with("owned", &[Netns, Netns]);
    plan.ports[0].userns = Some(7 << 16);
    let handle = driver.ensure(&plan).await.unwrap();
    let of = |handle: &oblak_network::NetworkHandle, n: usize| match &handle.ports[&plan.ports[n].id] {
        PortHandle::Netns { netns, userns, .. } => (netns.clone(), userns.clone()),
        PortHandle::Tap { .. } => panic!("a tap"),
    };
    let ((netns, Some(user)), (plain, None)) = (of(&handle, 0), of(&handle, 1)) else { panic!("{handle:?}") };
    let map =
        Command::new("nsenter").arg(format!("--user={}", user.display())).args(["cat", "/proc/self/gid_map"]).output();
    // Read from inside, the second column is the number in the namespace above.
    let map = String::from_utf8(map.unwrap().stdout).unwrap();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "458752", "65536"]);
    assert!(pings(&netns, v4(&plan.ports[1]).into(), PATIENCE), "it is plugged like any other");
    if std::path::Path::new("/bin/busybox").exists() {
        let out = raw_ping(&user, &netns, "10.77.0.1");
        assert!(out.status.success(), "{out:?}");
        let out = raw_ping(&user, &plain, "10.77.0.1");
        assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("permission denied"), "{out:?}");
    } else {
        println!("skipped: raw sockets: needs /bin/busybox (package busybox-static)");
    }

    // Found again by another process, and kept as it is, whoever is asked to own it now.
    plan.ports[0].userns = None;
    plan.ports[1].userns = Some(8 << 16);
    let later = bed.linux();
    assert_eq!(later.ensure(&plan).await.unwrap(), handle);
    assert_eq!(later.observe(plan.id).await.unwrap(), Some(handle));
    later.remove(plan.id).await.unwrap();
    assert!(!user.exists() && !netns.exists());
    assert_eq!(bed.traces(), before);
}

#[tokio::test]
async fn half_made_owned_namespaces_are_made_again_or_swept() {
    let Some(bed) = Bed::new() else { return };
    let driver = bed.linux();
    let mut plan = plan_with("half", &[Netns]);
    plan.ports[0].userns = Some(7 << 16);
    let handle = driver.ensure(&plan).await.unwrap();
    let PortHandle::Netns { netns, userns: Some(user), .. } = handle.ports[&plan.ports[0].id].clone() else {
        panic!("{handle:?}")
    };
    // As a kill -9 between the two mounts leaves it.
    nix::mount::umount2(&netns, nix::mount::MntFlags::MNT_DETACH).unwrap();
    assert_eq!(driver.ensure(&plan).await.unwrap(), handle);
    nix::mount::umount2(&netns, nix::mount::MntFlags::MNT_DETACH).unwrap();
    std::fs::remove_file(&netns).unwrap();
    plan.ports.clear();
    bed.linux().ensure(&plan).await.unwrap();
    assert!(!user.exists(), "swept");
    driver.remove(plan.id).await.unwrap();
}
