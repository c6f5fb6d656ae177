//! One cloud for one test.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use oblak_client::{Auth, Client, ClientConfig, ListOptions};
use oblak_model::{Instance, InstanceKind, Kind, Project, ProjectKind, SnapshotKind, VolumeKind};
use oblak_platform::fsx;
use oblak_platform::process::Identity;
use serde_json::Value;

use crate::cli::{Ran, Running};
use crate::env::Env;
use crate::machine::{Machine, names, revive};
use crate::wait::eventually;

/// Directories of tests lie here: paths of sockets must stay short.
const PLACE: &str = "/tmp";
const PREFIX: &str = "oblak-e2e-";
/// Who owns a directory of a test, so that the next test can remove what a killed one left.
const OWNER: &str = "owner.json";
/// Time that one command has, unless the test says otherwise.
const COMMAND: Duration = Duration::from_secs(180);

/// How a cloud is set up.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Environment of the server beside the usual.
    pub env: BTreeMap<String, OsString>,
    /// Data directory; below the test's own directory when absent.
    pub data: Option<PathBuf>,
    /// Patterns of programs that the server does not find in any system directory.
    pub hidden: Vec<String>,
}

/// Runs a command without some programs, in a mount namespace of its own: `$HIDDEN` are patterns, `$WORK` an empty directory.
const HIDE: &str = r#"
set -e
mount -t tmpfs tmpfs "$WORK"
for place in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do
	[ -d $place ] && [ ! -L $place ] || continue
	over=$WORK/$(echo $place | tr / _)
	mkdir -p $over/upper $over/work
	mount -t overlay overlay -o lowerdir=$place,upperdir=$over/upper,workdir=$over/work $place
	for pattern in $HIDDEN; do rm -f $place/$pattern; done
done
exec "$@"
"#;

/// A cloud that dies with this value.
pub struct Cloud {
    /// What the tests are given.
    pub env: Env,
    /// The test's own directory.
    pub dir: PathBuf,
    /// The data directory.
    pub data: PathBuf,
    /// What it leaves on the machine.
    pub machine: Machine,
    /// Environment of the next start.
    pub settings: Settings,
    server: Option<Child>,
    /// Epoch of the node's lease before the next start.
    epoch: u64,
    runtime: tokio::runtime::Runtime,
}

impl Cloud {
    /// A running cloud. `None`, with the reason printed, when this machine cannot run one.
    #[must_use]
    pub fn start() -> Option<Self> {
        let mut cloud = Self::prepare(Settings::default())?;
        cloud.up();
        Some(cloud)
    }

    /// A cloud that is not started yet.
    ///
    /// # Panics
    /// When its directory cannot be made.
    #[must_use]
    pub fn prepare(settings: Settings) -> Option<Self> {
        let env = Env::find()?;
        sweep();
        let dir = tempfile::Builder::new().prefix(PREFIX).rand_bytes(5).tempdir_in(PLACE).expect("a directory").keep();
        // Guests run as users of their own and must be able to pass through.
        std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o711)).expect("our own directory");
        fsx::write_json(&dir.join(OWNER), &Identity::current()).expect("our own directory");
        let data = settings.data.clone().unwrap_or_else(|| dir.join("data"));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let machine = Machine::new(&data);
        Some(Self { env, dir, data, machine, settings, server: None, epoch: 0, runtime: runtime.expect("a runtime") })
    }

    /// The command `oblak` with the environment of this cloud's user.
    #[must_use]
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.env.binary);
        self.dress(command.args(words));
        command
    }

    fn dress(&self, command: &mut Command) {
        command
            .env("OBLAK_CONFIG", self.dir.join("config.json"))
            .env("HOME", &self.dir)
            .env("RUST_BACKTRACE", "1")
            .env_remove("SUDO_USER")
            .env_remove("OBLAK_SERVER")
            .env_remove("OBLAK_TOKEN")
            .current_dir(&self.dir);
    }

    /// `oblak up` as it is started here.
    ///
    /// # Panics
    /// When its directory cannot be made.
    #[must_use]
    pub fn up_command(&self) -> Command {
        let mut command = if self.settings.hidden.is_empty() {
            Command::new(&self.env.binary)
        } else {
            let work = self.dir.join("hide");
            std::fs::create_dir_all(&work).expect("our own directory");
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "slave", "--", "sh", "-c", HIDE, "sh"]).arg(&self.env.binary);
            command.env("WORK", work).env("HIDDEN", self.settings.hidden.join(" "));
            command
        };
        self.dress(&mut command);
        command.args(["up", "--data"]).arg(&self.data);
        command.args(["--listen", "127.0.0.1:0", "--node-name", "n1", "--recipes"]).arg(&self.env.recipes);
        command.env("OBLAK_IMAGE_CACHE", &self.env.images).envs(&self.settings.env);
        command
    }

    /// Starts the server and waits until it serves.
    ///
    /// # Panics
    /// When it does not, with the end of its log.
    pub fn up(&mut self) {
        assert!(self.server.is_none(), "the server runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).expect("our own directory");
        let mut command = self.up_command();
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        self.server = Some(command.spawn().expect("the program can be started"));
        let ready = eventually(Duration::from_secs(60), || {
            let server = self.server.as_mut().expect("just started");
            if let Ok(Some(status)) = server.try_wait() {
                panic!("oblak up ended with {status}:\n{}", tail(&self.log(), 4000));
            }
            let pid = i64::from(server.id());
            self.run_file().filter(|r| r["process"]["pid"].as_i64() == Some(pid))
        });
        assert!(ready.is_some(), "oblak up does not get ready:\n{}", tail(&self.log(), 4000));
        let client = self.client();
        let mut last = None;
        let ready = eventually(Duration::from_secs(60), || {
            let node: Result<oblak_model::Node, _> = self.wait(client.get("", "n1"));
            let epoch = node.as_ref().ok().filter(|n| n.status.phase == oblak_model::NodePhase::Ready);
            // An epoch of the life before would be that of a registration before.
            let epoch = epoch.map(|n| n.status.epoch).filter(|epoch| *epoch > self.epoch);
            last = Some(node);
            epoch
        });
        self.epoch = ready.unwrap_or_else(|| panic!("node n1 does not get ready: {last:#?}"));
        self.machine.remember();
    }

    /// `<data>/run/oblak.json`.
    #[must_use]
    pub fn run_file(&self) -> Option<Value> {
        fsx::read_json(&self.data.join("run/oblak.json")).ok().flatten()
    }

    /// Log of the server.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.dir.join("up.log")
    }

    /// Kills the server as a crash would.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill_server(&mut self) {
        self.machine.remember();
        let mut server = self.server.take().expect("the server runs");
        server.kill().expect("our own child can be killed");
        server.wait().expect("our own child can be waited for");
    }

    /// Plays a cut of the power: everything is killed and forgotten that does not survive one. The next start is another boot.
    pub fn power_cut(&mut self) {
        if self.server.is_some() {
            self.kill_server();
        }
        self.machine.power_off();
        self.settings.env.insert("OBLAK_BOOT_ID".into(), uuid::Uuid::new_v4().to_string().into());
    }

    /// `oblak down`.
    pub fn down(&mut self, words: &[&str]) {
        self.machine.remember();
        let mut server = self.server.take();
        let mut command = match &server {
            // What it mounts is only seen in its own namespace.
            Some(server) if !self.settings.hidden.is_empty() => {
                let mut command = Command::new("nsenter");
                command.args(["--mount", "--target", &server.id().to_string(), "--"]).arg(&self.env.binary);
                self.dress(&mut command);
                command
            }
            _ => self.command(&[]),
        };
        command.args(["down", "--data"]).arg(&self.data).args(words).envs(&self.settings.env);
        let down = Running::start(command);
        // The server is our child: without being waited for it would look as if it did not end.
        if let Some(server) = &mut server {
            let ended = eventually(Duration::from_secs(30), || server.try_wait().ok().flatten());
            assert!(ended.is_some(), "the server does not end");
        }
        down.wait(Duration::from_secs(60)).ok();
        assert_eq!(
            self.run_file()
                .and_then(|r| serde_json::from_value(r["process"].clone()).ok())
                .map(revive)
                .filter(Identity::is_alive),
            None
        );
    }

    /// Runs one command of a user.
    #[track_caller]
    pub fn oblak(&self, words: &[&str]) -> Ran {
        Running::start(self.command(words)).wait(COMMAND)
    }

    /// A client with the user's token.
    ///
    /// # Panics
    /// When the server has written no context.
    #[must_use]
    pub fn client(&self) -> Client {
        let text: Value = fsx::read_json(&self.dir.join("config.json")).ok().flatten().expect("up writes a context");
        let context = &text["contexts"][text["current"].as_str().unwrap_or_default()];
        let word = |name: &str| context[name].as_str().unwrap_or_default().to_string();
        let config = ClientConfig::new(word("server"), word("ca_pem"), Auth::Bearer(word("token")));
        Client::new(&config).expect("the context is good")
    }

    /// Runs a future to its end.
    pub fn wait<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// All objects of a kind in a project.
    ///
    /// # Panics
    /// When the server does not answer.
    #[must_use]
    pub fn all<K: Kind>(&self, project: &str) -> Vec<oblak_model::Object<K>> {
        self.wait(self.client().list_all::<K>(project, &ListOptions::default())).expect("a list").items
    }

    /// Removes everything through the API, stops the cloud and makes sure that nothing is left on the machine.
    ///
    /// # Panics
    /// When something is left.
    pub fn finish(mut self) {
        self.clear();
        self.nothing_left(false);
        self.down(&["--stop-guests"]);
        self.nothing_left(true);
    }

    /// Deletes all snapshots, instances and volumes of all projects and waits until they are gone.
    ///
    /// # Panics
    /// When they do not go.
    pub fn clear(&mut self) {
        self.machine.remember();
        let client = self.client();
        let projects: Vec<String> = self.all::<ProjectKind>("").into_iter().map(|p: Project| p.metadata.name).collect();
        for project in &projects {
            self.delete_all::<SnapshotKind>(&client, project);
            self.delete_all::<InstanceKind>(&client, project);
            self.delete_all::<VolumeKind>(&client, project);
        }
    }

    fn delete_all<K: Kind>(&self, client: &Client, project: &str) {
        for object in self.all::<K>(project) {
            let gone = self.wait(client.delete::<K>(project, &object.metadata.name));
            assert!(gone.is_ok() || self.wait(client.get::<K>(project, &object.metadata.name)).is_err(), "{gone:?}");
        }
        let left = || self.all::<K>(project);
        if eventually(Duration::from_secs(60), || left().is_empty().then_some(())).is_none() {
            panic!(
                "still there in {project}: {:#?}",
                left().iter().map(oblak_model::Object::describe).collect::<Vec<_>>()
            );
        }
    }

    /// Waits until nothing of any guest is left on the machine; `netd` says whether that process counts.
    ///
    /// # Panics
    /// When something stays.
    pub fn nothing_left(&self, netd: bool) {
        let clean = eventually(Duration::from_secs(30), || self.machine.leftovers(netd).is_empty().then_some(()));
        assert!(clean.is_some(), "left behind:\n{}", self.machine.leftovers(netd).join("\n"));
    }

    /// An instance of project `default`.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    #[must_use]
    pub fn instance(&self, name: &str) -> Instance {
        self.wait(self.client().get::<InstanceKind>("default", name)).unwrap_or_else(|e| panic!("instance {name}: {e}"))
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- end of the server's log ---\n{}", tail(&self.log(), 6000));
        }
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            let _ = server.wait();
        }
        self.machine.power_off();
        // A file system of the test's own may be mounted there.
        let _ = nix::mount::umount2(&self.data, nix::mount::MntFlags::MNT_DETACH);
        let keep = std::env::var_os("OBLAK_TEST_KEEP").is_some() && std::thread::panicking();
        if keep {
            eprintln!("kept: {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// The end of a file.
pub(crate) fn tail(file: &Path, bytes: usize) -> String {
    let text = std::fs::read(file).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(bytes)..]).into_owned()
}

/// Removes what tests left that were killed before they could clean up.
fn sweep() {
    for name in names(Path::new(PLACE)).iter().filter(|n| n.starts_with(PREFIX)) {
        let dir = Path::new(PLACE).join(name);
        let Ok(Some(owner)) = fsx::read_json::<Identity>(&dir.join(OWNER)) else { continue };
        if owner.is_alive() {
            continue;
        }
        let data = dir.join("data");
        let running: Option<Value> = fsx::read_json(&data.join("run/oblak.json")).ok().flatten();
        let server = running.and_then(|r| serde_json::from_value::<Identity>(r["process"].clone()).ok());
        if let Some(server) = server.map(revive) {
            server.kill();
        }
        let mut machine = Machine::new(&data);
        machine.power_off();
        // A file system of the test's own may be mounted there.
        let _ = nix::mount::umount2(&data, nix::mount::MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir_all(&dir);
    }
}
