use super::*;

fn job(temp: &Path, script: &str, fds: Vec<RawFd>, namespaces: bool) -> Job {
    let mount_point = temp.join("root");
    std::fs::create_dir_all(&mount_point).unwrap();
    let shown = temp.join("shown");
    std::fs::write(&shown, "visible\n").unwrap();
    Job {
        program: "/bin/sh".into(),
        arguments: vec!["-c".into(), script.into()],
        uid: 543_210,
        groups: Vec::new(),
        fds,
        files: vec![(shown, "/guest/shown".into())],
        devices: vec!["full"],
        mount_point,
        namespaces,
    }
}

/// Runs the job to its end: what it printed, and its exit code.
fn run(job: &Job) -> (String, i32) {
    let waiting = prepare(job).unwrap();
    let pid = waiting.identity.pid;
    let mut text = String::new();
    File::from(waiting.execute().unwrap()).read_to_string(&mut text).unwrap();
    (text, reaped(pid))
}

fn reaped(pid: i32) -> i32 {
    for _ in 0..1000 {
        if let Some(code) = reap(pid) {
            return code;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    panic!("{pid} should have ended");
}

fn root() -> bool {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: needs root");
        return false;
    }
    true
}

#[test]
fn the_child_has_nothing_that_it_was_not_given() {
    if !root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let secret = File::open("/etc/passwd").unwrap();
    let given = File::open("/etc/hostname").unwrap();
    // A descriptor number that the test can tell from others.
    // SAFETY: duplicates a descriptor to a free number.
    let given_at = unsafe { libc::fcntl(given.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 77) };
    // SAFETY: as above; not even marked as closed on exec.
    let secret_at = unsafe { libc::fcntl(secret.as_raw_fd(), libc::F_DUPFD, 90) };
    let script = "grep -E '^(Uid|Gid|CapEff|CapBnd|NoNewPrivs|Groups):' /proc/self/status | tr -s '\\t ' ' '; \
        echo pid $$; ls /proc/self/fd | tr '\\n' ' '; echo; ls /; cat /guest/shown; \
        ls /etc; (echo x > /guest/shown) 2>/dev/null && echo WRITABLE; ulimit -c; ls /sys/class/net 2>/dev/null; \
        tail -n +3 /proc/net/dev | cut -d: -f1; cat /proc/self/oom_score_adj; ls /dev | tr '\\n' ' '; echo; \
        test -r /dev/full && echo x >/dev/null && echo USABLE; ls /root 2>/dev/null && echo HOST";
    let (text, code) = run(&job(temp.path(), script, vec![given_at], true));
    println!("{text}");
    assert_ne!(code, 0, "the last command finds no /root");
    assert!(text.contains("Uid: 543210 543210 543210 543210"));
    assert!(text.contains("Gid: 543210 543210 543210 543210"));
    assert!(text.contains("CapEff: 0000000000000000") && text.contains("CapBnd: 0000000000000000"));
    assert!(text.contains("NoNewPrivs: 1"));
    assert!(text.contains("pid 1\n"), "it is the first process of its namespace");
    let fds: Vec<&str> = text.lines().find(|l| l.starts_with("0 1 2")).unwrap().split_whitespace().collect();
    assert!(fds.contains(&given_at.to_string().as_str()) && !fds.contains(&secret_at.to_string().as_str()), "{fds:?}");
    assert!(text.contains("visible\n") && !text.contains("WRITABLE") && !text.contains("HOST"));
    assert!(
        text.contains("full null random urandom zero \n") && text.contains("USABLE"),
        "only the devices that it needs"
    );
    assert!(!text.contains("passwd"), "of /etc only what the loader needs");
    let links: Vec<&str> = text.lines().filter(|l| l.trim() == "lo" || l.contains("eth")).collect();
    assert_eq!(links.len(), 1, "a network namespace of its own has only a loopback: {links:?}");
    assert!(text.lines().any(|l| l == OOM_SCORE_ADJ));
    nix::unistd::close(secret_at).unwrap();
    nix::unistd::close(given_at).unwrap();
}

#[test]
fn without_namespaces_it_still_has_no_rights() {
    if !root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (text, code) = run(&job(temp.path(), "id -u; grep CapEff /proc/self/status", vec![], false));
    assert_eq!(code, 0);
    assert!(text.starts_with("543210\n") && text.contains("0000000000000000"), "{text}");
}

#[test]
fn nothing_runs_when_the_shim_dies_first() {
    if !root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let waiting = prepare(&job(temp.path(), "echo ran", vec![], true)).unwrap();
    let pid = waiting.identity.pid;
    drop(waiting);
    assert_eq!(reaped(pid), 127, "dropped before it was let go");
    let waiting = prepare(&job(temp.path(), "echo ran", vec![], true)).unwrap();
    let pid = waiting.identity.pid;
    // Told to go by a shim that is dead by the time the child has given up its rights.
    let Waiting { mut go, mut errors, .. } = waiting;
    go.write_all(b"!").unwrap();
    drop(go);
    let mut problem = String::new();
    errors.read_to_string(&mut problem).unwrap();
    assert!(problem.contains("the shim died"), "{problem}");
    assert_eq!(reaped(pid), 127);
}

#[test]
fn says_which_step_failed() {
    if !root() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let mut job = job(temp.path(), "", vec![], true);
    job.program = "/usr/bin/no-such-emulator".into();
    let waiting = prepare(&job).unwrap();
    let pid = waiting.identity.pid;
    let problem = waiting.execute().unwrap_err();
    assert!(problem.contains("no-such-emulator"), "{problem}");
    assert_eq!(reaped(pid), 127);
}
