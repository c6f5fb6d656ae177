//! A real Ceph of our own for a test: one monitor, one manager, three OSDs whose disks are files, on loopback.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

pub const POOL: &str = "vms";
const OSDS: usize = 3;

pub struct Ceph {
    dir: TempDir,
    daemons: Vec<Daemon>,
}

struct Daemon {
    name: String,
    child: Child,
}

impl Drop for Ceph {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            let _ = daemon.child.kill();
            let _ = daemon.child.wait();
        }
    }
}

/// Why it cannot be had here.
pub fn missing() -> Option<String> {
    let needed = ["ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "rados", "monmaptool", "ceph-authtool", "qemu-io"];
    let found = |p: &str| Command::new(p).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    let absent: Vec<_> = needed.into_iter().filter(|p| !found(p)).collect();
    (!absent.is_empty()).then(|| format!("{} not installed", absent.join(", ")))
}

impl Ceph {
    pub fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("oblak-ceph-").tempdir().unwrap();
        let mut ceph = Self { dir, daemons: vec![] };
        ceph.monitor();
        ceph.manager();
        for number in 0..OSDS {
            ceph.osd(number);
        }
        ceph.ceph(&["osd", "pool", "create", POOL, "8"]);
        ceph.run("rbd", &["pool", "init", POOL]);
        ceph.wait_until_clean();
        ceph
    }

    /// Until every placement group has its three copies and the manager counts their space.
    fn wait_until_clean(&self) {
        let end = Instant::now() + Duration::from_secs(180);
        loop {
            let status: serde_json::Value = serde_json::from_str(&self.ceph(&["-s", "--format", "json"])).unwrap();
            let groups = &status["pgmap"];
            let clean: u64 = groups["pgs_by_state"].as_array().map_or(0, |states| {
                let clean = states.iter().filter(|s| s["state_name"] == "active+clean");
                clean.filter_map(|s| s["count"].as_u64()).sum()
            });
            if clean > 0 && Some(clean) == groups["num_pgs"].as_u64() && groups["bytes_avail"].as_u64() > Some(0) {
                return;
            }
            assert!(Instant::now() < end, "Ceph does not become clean: {status:#}");
            std::thread::sleep(Duration::from_millis(250));
        }
    }

    pub fn conf(&self) -> PathBuf {
        self.path("ceph.conf")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes a user with just the rights that the manual names.
    pub fn user(&self, name: &str) {
        let client = format!("client.{name}");
        let keyring = self.path(&format!("{client}.keyring"));
        let osd = format!("profile rbd pool={POOL}");
        let keyring = keyring.to_str().unwrap();
        self.ceph(&["auth", "get-or-create", &client, "mon", "profile rbd", "osd", &osd, "-o", keyring]);
    }

    pub fn ceph(&self, args: &[&str]) -> String {
        self.run("ceph", &[&["--connect-timeout", "60"], args].concat())
    }

    pub fn run(&self, program: &str, args: &[&str]) -> String {
        let output = self.command(program).args(args).output().unwrap();
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("--conf").arg(self.conf());
        command
    }

    /// Ends a daemon as a lost machine would.
    pub fn kill(&mut self, name: &str) {
        let daemon = self.daemons.iter_mut().find(|d| d.name == name).unwrap();
        daemon.child.kill().unwrap();
        daemon.child.wait().unwrap();
    }

    fn monitor(&mut self) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let fsid = uuid::Uuid::new_v4().to_string();
        std::fs::write(self.conf(), configuration(self.dir.path(), port, &fsid)).unwrap();
        let (mon, admin) = (self.text("mon.keyring"), self.text("client.admin.keyring"));
        let map = self.text("monmap");
        tool("ceph-authtool", &["-C", &mon, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *"]);
        let all = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"];
        tool("ceph-authtool", &[["-C", &admin, "--gen-key", "-n", "client.admin"].as_slice(), &all].concat());
        tool("ceph-authtool", &[&mon, "--import-keyring", &admin]);
        let address = format!("[v2:127.0.0.1:{port}]");
        tool("monmaptool", &["--create", "--addv", "a", &address, "--fsid", &fsid, &map]);
        std::fs::create_dir(self.path("mon")).unwrap();
        self.run("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map, "--keyring", &mon]);
        self.daemon("mon.a", "ceph-mon", "a");
    }

    fn manager(&mut self) {
        std::fs::create_dir(self.path("mgr")).unwrap();
        let keyring = self.text("mgr.x.keyring");
        self.ceph(&["auth", "get-or-create", "mgr.x", "mon", "allow profile mgr", "osd", "allow *", "-o", &keyring]);
        self.daemon("mgr.x", "ceph-mgr", "x");
    }

    fn osd(&mut self, number: usize) {
        let uuid = uuid::Uuid::new_v4().to_string();
        let number = number.to_string();
        std::fs::create_dir(self.path(&format!("osd{number}"))).unwrap();
        let secret = tool("ceph-authtool", &["--gen-print-key"]).trim().to_string();
        let mut new = self.command("ceph");
        new.args(["osd", "new", &uuid, "-i", "-"]).stdin(Stdio::piped()).stdout(Stdio::null());
        let mut new = new.spawn().unwrap();
        write!(new.stdin.take().unwrap(), r#"{{"cephx_secret":"{secret}"}}"#).unwrap();
        assert!(new.wait().unwrap().success());
        let keyring = self.text(&format!("osd.{number}.keyring"));
        tool("ceph-authtool", &["-C", &keyring, "--name", &format!("osd.{number}"), "--add-key", &secret]);
        self.run("ceph-osd", &["-i", &number, "--mkfs", "--osd-uuid", &uuid]);
        self.daemon(&format!("osd.{number}"), "ceph-osd", &number);
    }

    /// Ends with this process, also when it is killed.
    fn daemon(&mut self, name: &str, program: &str, id: &str) {
        let log = std::fs::File::create(self.path(&format!("{name}.out"))).unwrap();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", program, "-f", "-i", id, "--conf"]).arg(self.conf());
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.daemons.push(Daemon { name: name.into(), child: command.spawn().unwrap() });
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().into()
    }
}

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn configuration(dir: &Path, port: u16, fsid: &str) -> String {
    let dir = dir.display();
    format!(
        "[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {dir}/$name.keyring
log_file = {dir}/$name.log
run_dir = {dir}
admin_socket = {dir}/$name.$pid.asok
mon_data = {dir}/mon
mgr_data = {dir}/mgr
osd_data = {dir}/osd$id
mon_data_avail_warn = 1
osd_pool_default_size = 3
osd_pool_default_min_size = 2
osd_crush_chooseleaf_type = 0
osd_objectstore = bluestore
osd_memory_target = 939524096
osd_heartbeat_grace = 6
bluestore_block_size = 2147483648
bluestore_block_db_size = 0
bluestore_block_wal_size = 0
"
    )
}
