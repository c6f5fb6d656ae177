//! A cluster whose members each have a network namespace, joined by a bridge in the namespace of the test.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use tempfile::TempDir;

use super::{run, server};

const SUBNET: &str = "10.91.7";
const READY: Duration = Duration::from_secs(30);

struct Member {
    /// Holds the namespace; ends when its standard input does, so with this process.
    holder: Child,
    etcd: Option<Child>,
}

/// A cluster of etcd, reachable from the thread that [`Members::with`] runs.
pub struct Members {
    members: Vec<Member>,
    dir: TempDir,
}

impl Drop for Members {
    fn drop(&mut self) {
        for member in &mut self.members {
            for child in member.etcd.iter_mut().chain([&mut member.holder]) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Members {
    /// Runs `test` with a cluster of `count` members, in a network namespace of its own, on a thread and runtime of its own. Prints
    /// `skipped: reason` where that is not possible.
    pub fn with<F: Future<Output = ()>>(count: usize, test: impl FnOnce(Self) -> F + Send + 'static) {
        if !super::available(&["etcd", "ip", "nsenter", "unshare", "setpriv"]) {
            return;
        }
        if !Uid::effective().is_root() {
            eprintln!("skipped: only root can make network namespaces");
            return;
        }
        let body = move || {
            if let Err(error) = unshare(CloneFlags::CLONE_NEWNET) {
                eprintln!("skipped: cannot make a network namespace: {error}");
                return;
            }
            // Threads of this runtime inherit the namespace.
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            let members = Self::start(count);
            runtime.block_on(test(members));
        };
        if let Err(panic) = std::thread::spawn(body).join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn start(count: usize) -> Self {
        run("ip link set lo up");
        run("ip link add br0 type bridge");
        run(&format!("ip addr add {SUBNET}.254/24 dev br0"));
        run("ip link set br0 up");
        let dir = tempfile::Builder::new().prefix("oblak-etcds-").tempdir().unwrap();
        let mut cluster = Self { members: Vec::new(), dir };
        for n in 0..count {
            let holder = hold();
            let pid = holder.id();
            cluster.members.push(Member { holder, etcd: None });
            run(&format!("ip link add v{n} type veth peer name p{n} netns {pid}"));
            run(&format!("ip link set v{n} master br0 up"));
            let address = format!("addr add {}/24 dev p{n}", address(n));
            for line in ["link set lo up", &address, &format!("link set p{n} up")] {
                run(&format!("nsenter -t {pid} -n ip {line}"));
            }
        }
        for n in 0..count {
            cluster.run_member(n);
        }
        for n in 0..count {
            cluster.until_answers(n);
        }
        cluster
    }

    fn run_member(&mut self, n: usize) {
        let all: Vec<_> = (0..self.members.len()).map(|n| format!("m{n}=http://{}:2380", address(n))).collect();
        let (client, peer) = (format!("http://{}:2379", address(n)), format!("http://{}:2380", address(n)));
        let flags = [
            format!("--name=m{n}"),
            format!("--data-dir={}", self.dir.path().join(format!("m{n}")).display()),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster={}", all.join(",")),
        ];
        let member = &mut self.members[n];
        let enter = ["nsenter", "-t", &member.holder.id().to_string(), "-n"].map(String::from);
        member.etcd = Some(server::spawn(&enter, &flags, &self.dir.path().join(format!("m{n}.log"))));
    }

    fn until_answers(&self, n: usize) {
        let start = Instant::now();
        while std::net::TcpStream::connect((address(n), 2379)).is_err() {
            assert!(start.elapsed() < READY, "member {n} does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Where clients connect, beginning with the member `first`.
    pub fn urls(&self, first: usize) -> Vec<String> {
        let count = self.members.len();
        (0..count).map(|n| format!("http://{}:2379", address((first + n) % count))).collect()
    }

    /// Which member leads at the moment; none when there is none or nobody answers.
    pub async fn leader(&self) -> Option<usize> {
        for (n, url) in self.urls(0).iter().enumerate() {
            let asked = async {
                let mut client = etcd_client::Client::connect([url], None).await.ok()?;
                let status = client.status().await.ok()?;
                Some((status.leader(), status.header()?.member_id()))
            };
            if let Ok(Some((leader, member))) = tokio::time::timeout(Duration::from_secs(1), asked).await
                && leader == member
                && leader != 0
            {
                return Some(n);
            }
        }
        None
    }

    fn signal(&self, n: usize, signal: Signal) {
        let child = self.members[n].etcd.as_ref().unwrap();
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
    }

    /// Kills a member at once.
    pub fn kill(&mut self, n: usize) {
        let mut child = self.members[n].etcd.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts a member again with its data. On the thread that [`Members::with`] made.
    pub fn restart(&mut self, n: usize) {
        self.run_member(n);
        self.until_answers(n);
    }

    /// Stops the processor time of a member: connections stay, requests pile up.
    pub fn freeze(&self, n: usize) {
        self.signal(n, Signal::SIGSTOP);
    }

    /// Goes on.
    pub fn thaw(&self, n: usize) {
        self.signal(n, Signal::SIGCONT);
    }

    /// Takes a member's network away: nobody reaches it, it reaches nobody, and no connection is closed.
    pub fn cut(&self, n: usize) {
        run(&format!("ip link set v{n} down"));
    }

    /// Gives it back.
    pub fn mend(&self, n: usize) {
        run(&format!("ip link set v{n} up"));
    }
}

fn address(n: usize) -> String {
    format!("{SUBNET}.{}", n + 1)
}

/// A process in a new network namespace that does nothing until its standard input ends.
fn hold() -> Child {
    let before = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
    let child =
        Command::new("unshare").args(["--net", "cat"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    loop {
        match std::fs::read_link(format!("/proc/{}/ns/net", child.id())) {
            Ok(now) if now != before => return child,
            _ => assert!(start.elapsed() < READY, "no namespace was made"),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
