//! Instances as tests make and watch them.

use std::time::Duration;

use oblak_client::ClientError;
use oblak_model::{
    Instance, InstanceKind, InstanceSpec, Isolation, NetworkAttachment, Phase, Publish, RestartPolicy, Transport,
};
use oblak_platform::fsx;
use oblak_platform::process::Identity;
use serde::Deserialize;

use crate::cli::Ran;
use crate::cloud::Cloud;
use crate::machine::revive;
use crate::wait::eventually;

/// Time that a container has to run, the import of its image included.
const SOON: Duration = Duration::from_secs(60);

/// Part of the file in which a shim says which processes a run is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ShimFile {
    /// Number of the run.
    pub run: u64,
    /// The shim.
    pub shim: Identity,
    /// The guest's main process.
    pub guest: Option<Identity>,
}

impl ShimFile {
    /// The guest's main process.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn guest(&self) -> Identity {
        self.guest.clone().expect("a guest that has started")
    }
}

/// An instance to be made.
#[derive(Clone, Debug)]
pub struct Draft {
    project: String,
    object: Instance,
}

impl Draft {
    /// A busybox container that runs a command.
    #[must_use]
    pub fn container(name: &str, command: &[&str]) -> Self {
        let spec = InstanceSpec {
            isolation: Some(Isolation::Container),
            image: "busybox".into(),
            command: command.iter().map(ToString::to_string).collect(),
            flavor: "xs".into(),
            ..InstanceSpec::default()
        };
        Self { project: "default".into(), object: Instance::new(name, spec) }
    }

    /// A container that serves a file with this text on port 80 and answers shells until it is stopped.
    #[must_use]
    pub fn server(name: &str, text: &str) -> Self {
        let script = format!("mkdir -p /srv; echo {text} >/srv/index.html; exec httpd -f -p 80 -h /srv");
        Self::container(name, &["sh", "-c", &script])
    }

    /// A virtual machine of the tiny image.
    #[must_use]
    pub fn machine(name: &str) -> Self {
        let mut draft = Self::container(name, &[]);
        draft.object.spec.isolation = Some(Isolation::Vm);
        draft.object.spec.image = "tiny".into();
        draft
    }

    /// In this project.
    #[must_use]
    pub fn project(mut self, project: &str) -> Self {
        self.project = project.into();
        self
    }

    /// With this policy.
    #[must_use]
    pub fn policy(mut self, policy: RestartPolicy) -> Self {
        self.object.spec.restart_policy = Some(policy);
        self
    }

    /// With a TCP port of the host that leads into it.
    #[must_use]
    pub fn publish(mut self, host_port: u16, port: u16) -> Self {
        let publish = Publish { host_port, port, protocol: Transport::Tcp, host_address: None };
        self.object.spec.publish.push(publish);
        self
    }

    /// In the default network, with this address and these groups.
    #[must_use]
    pub fn at(mut self, address: Option<&str>, groups: &[&str]) -> Self {
        self.object.spec.networks = Some(vec![NetworkAttachment {
            network: "default".into(),
            address: address.map(|a| a.parse().expect("an address")),
            security_groups: groups.iter().map(ToString::to_string).collect(),
        }]);
        self
    }

    /// With changes of the spec.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut InstanceSpec)) -> Self {
        change(&mut self.object.spec);
        self
    }

    /// What is asked for.
    #[must_use]
    pub fn object(&self) -> &Instance {
        &self.object
    }

    /// Makes it.
    ///
    /// # Errors
    /// What the API says.
    pub fn create(&self, cloud: &Cloud) -> Result<Instance, ClientError> {
        cloud.wait(cloud.client().create::<InstanceKind>(&self.project, &self.object))
    }

    /// Makes it and waits until it runs.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn run(&self, cloud: &mut Cloud) -> Instance {
        let name = self.object.metadata.name.clone();
        self.create(cloud).unwrap_or_else(|e| panic!("instance {name}: {e}"));
        let running = cloud.in_phase_of(&self.project, &name, Phase::Running, SOON);
        cloud.machine.remember();
        running
    }
}

impl Cloud {
    /// Waits until an instance of project `default` is in a phase.
    #[track_caller]
    pub fn in_phase(&self, name: &str, phase: Phase, deadline: Duration) -> Instance {
        self.in_phase_of("default", name, phase, deadline)
    }

    /// Waits until an instance is in a phase.
    ///
    /// # Panics
    /// When it does not get there in time.
    #[track_caller]
    pub fn in_phase_of(&self, project: &str, name: &str, phase: Phase, deadline: Duration) -> Instance {
        self.when_of(project, name, &format!("phase {phase}"), deadline, |i| i.status.phase == phase)
    }

    /// Waits until an instance of project `default` is as `good` wants it.
    #[track_caller]
    pub fn when(&self, name: &str, what: &str, deadline: Duration, good: impl Fn(&Instance) -> bool) -> Instance {
        self.when_of("default", name, what, deadline, good)
    }

    #[track_caller]
    fn when_of(
        &self,
        project: &str,
        name: &str,
        what: &str,
        deadline: Duration,
        good: impl Fn(&Instance) -> bool,
    ) -> Instance {
        let client = self.client();
        let mut last = None;
        let found = eventually(deadline, || {
            let seen = self.wait(client.get::<InstanceKind>(project, name));
            let good = seen.as_ref().ok().filter(|i| good(i)).cloned();
            last = Some(seen);
            good
        });
        found.unwrap_or_else(|| match last {
            Some(Ok(i)) => panic!(
                "{name}: no {what} within {} s; it is {} ({} {}), observed {:#?}, conditions {:?}",
                deadline.as_secs(),
                i.status.phase,
                i.status.reason,
                i.status.message,
                i.status.observed,
                i.status.conditions
            ),
            other => panic!("{name}: no {what}: {other:?}"),
        })
    }

    /// Waits until an instance of project `default` is gone.
    ///
    /// # Panics
    /// When it stays.
    #[track_caller]
    pub fn gone(&self, name: &str) {
        let client = self.client();
        let gone = eventually(Duration::from_secs(60), || self.wait(client.get::<InstanceKind>("default", name)).err());
        assert!(gone.is_some(), "{name} does not go: {:?}", self.instance(name).status);
    }

    /// Runs a program in a container of project `default`.
    #[track_caller]
    pub fn exec(&self, name: &str, argv: &[&str]) -> Ran {
        self.oblak(&[&["exec", name, "--"], argv].concat())
    }

    /// What the shim of an instance wrote down.
    ///
    /// # Panics
    /// When there is no such file.
    #[track_caller]
    #[must_use]
    pub fn shim(&self, instance: &Instance) -> ShimFile {
        let dir = self.data.join("instances").join(instance.metadata.id.to_string());
        let found =
            ["container/shim.json", "shim.json"].iter().find_map(|f| fsx::read_json(&dir.join(f)).ok().flatten());
        let file: ShimFile =
            found.unwrap_or_else(|| panic!("no shim of {} below {}", instance.metadata.name, dir.display()));
        ShimFile { shim: revive(file.shim), guest: file.guest.map(revive), ..file }
    }

    /// Waits until `oblak explain` says all of these words.
    ///
    /// # Panics
    /// When it does not, with what it says.
    #[track_caller]
    pub fn explained(&self, name: &str, words: &[&str]) -> String {
        let mut last = String::new();
        let found = eventually(SOON, || {
            last = self.oblak(&["explain", &format!("instance/{name}")]).ok();
            words.iter().all(|w| last.contains(w)).then_some(())
        });
        assert!(found.is_some(), "`oblak explain instance/{name}` does not say all of {words:?}: {last}");
        last
    }
}
