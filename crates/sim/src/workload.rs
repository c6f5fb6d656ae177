//! People at work: clients that make, change and delete things, retry what failed, and remember what was promised to them.

use std::collections::BTreeMap;
use std::time::Duration;

use oblak_client::{Client, ClientError};
use oblak_model::wire::{Apply, Resource};
use oblak_model::{
    Code, Image, ImageKind, Instance, InstanceKind, InstanceSpec, Isolation, NodeKind, Power, Publish, Size, Volume,
    VolumeAttachment, VolumeFormat, VolumeKind, VolumeSpec,
};
use serde_json::{Value, json};

use crate::chance::Dice;
use crate::trace::Trace;

const PROJECT: &str = "default";
/// Most instances and volumes of one client.
const MOST: usize = 14;
const FLAVORS: [&str; 4] = ["xs", "xs", "s", "m"];
/// Most images of one client.
const MOST_IMAGES: usize = 3;
/// Host ports that clients fight for.
const HOST_PORTS: usize = 6;

/// What a client knows of a value: what was acknowledged last, or nothing certain since an answer was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known<T> {
    Surely(T),
    Perhaps,
}

/// What was promised about an object.
#[derive(Clone, Debug)]
struct Promise {
    there: Known<bool>,
    power: Known<Power>,
    restarts: u64,
    flavor: Known<&'static str>,
    attached: Vec<String>,
}

/// What a call came to.
enum Outcome<T> {
    Done(T),
    Refused(Code),
    Lost,
}

fn outcome<T>(result: Result<T, ClientError>) -> Outcome<T> {
    match result {
        Ok(value) => Outcome::Done(value),
        // A server that says that it does not know, or cannot now, may have done it.
        Err(ClientError::Api(error)) if error.status < 500 && error.status != 429 => Outcome::Refused(error.code),
        Err(_) => Outcome::Lost,
    }
}

/// A client.
pub struct Worker {
    name: String,
    client: Client,
    dice: Dice,
    trace: Trace,
    instances: BTreeMap<String, Promise>,
    volumes: BTreeMap<String, Known<bool>>,
    images: Vec<String>,
    made: u64,
    nodes: usize,
    /// Longest pause between two calls.
    pause: Duration,
}

impl Worker {
    /// A client that has nothing yet.
    #[must_use]
    pub fn new(name: &str, client: Client, seed: u64, nodes: usize, pause: Duration, trace: Trace) -> Self {
        let dice = Dice::new(seed, &format!("worker {name}"));
        let (instances, volumes, images) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { name: name.into(), client, dice, trace, instances, volumes, images, made: 0, nodes, pause }
    }

    /// Works until the future is dropped.
    pub async fn work(&mut self) {
        loop {
            let pause = self.dice.between(Duration::from_millis(20), self.pause);
            tokio::time::sleep(pause).await;
            match self.dice.below(100) {
                0..=24 => self.create().await,
                25..=38 => self.power().await,
                39..=45 => self.restart().await,
                46..=52 => self.resize().await,
                53..=66 => self.delete().await,
                67..=72 => self.create_volume().await,
                73..=80 => self.attach().await,
                81..=85 => self.detach().await,
                86..=88 => self.delete_volume().await,
                89..=91 => self.apply().await,
                92..=93 => self.cordon().await,
                94..=95 => self.create_image().await,
                96 => self.delete_image().await,
                _ => self.look().await,
            }
        }
    }

    fn note(&self, what: std::fmt::Arguments<'_>) {
        self.trace.note(&self.name, what);
    }

    fn fresh(&mut self, kind: char) -> String {
        self.made += 1;
        format!("{}-{kind}{}", self.name, self.made)
    }

    fn pick(&mut self) -> Option<String> {
        let there: Vec<String> =
            self.instances.iter().filter(|(_, p)| p.there == Known::Surely(true)).map(|(n, _)| n.clone()).collect();
        self.dice.choose(&there).cloned()
    }

    fn pick_volume(&mut self) -> Option<String> {
        let there: Vec<String> =
            self.volumes.iter().filter(|(_, there)| **there == Known::Surely(true)).map(|(n, _)| n.clone()).collect();
        self.dice.choose(&there).cloned()
    }

    fn spec(&mut self) -> (InstanceSpec, &'static str) {
        let flavor = self.dice.choose(&FLAVORS).copied().unwrap_or("xs");
        let container = self.dice.permille(500);
        let (image, isolation) = if container { ("busybox", Isolation::Container) } else { ("tiny", Isolation::Vm) };
        let own = if container && self.dice.permille(400) { self.dice.choose(&self.images).cloned() } else { None };
        let mut spec = InstanceSpec {
            image: own.unwrap_or_else(|| image.into()),
            flavor: flavor.into(),
            isolation: Some(isolation),
            ..InstanceSpec::default()
        };
        if self.dice.permille(400) {
            (spec.ha, spec.ephemeral) = (true, true);
        }
        if self.dice.permille(150) {
            let port = u16::try_from(8000 + self.dice.below(HOST_PORTS)).unwrap_or(8000);
            spec.publish = vec![Publish { host_port: port, port: 80, ..Publish::default() }];
        }
        (spec, flavor)
    }

    fn promised(&mut self, name: &str, there: Known<bool>, flavor: &'static str) {
        let promise = Promise {
            there,
            power: Known::Surely(Power::Running),
            restarts: 0,
            flavor: Known::Surely(flavor),
            attached: Vec::new(),
        };
        self.instances.insert(name.into(), promise);
    }

    async fn create(&mut self) {
        if self.instances.len() >= MOST {
            return self.delete().await;
        }
        let name = self.fresh('i');
        let (spec, flavor) = self.spec();
        let made = outcome(self.client.create(PROJECT, &Instance::new(&name, spec)).await);
        match made {
            Outcome::Done(_) => self.promised(&name, Known::Surely(true), flavor),
            Outcome::Lost => self.promised(&name, Known::Perhaps, flavor),
            Outcome::Refused(Code::NameTaken) => {
                self.trace.violation(format_args!("{name} is taken, though its creation was sent with one key only"));
            }
            Outcome::Refused(code) => self.note(format_args!("creation of {name} refused: {code}")),
        }
    }

    /// Several at once, all or none.
    async fn apply(&mut self) {
        if self.instances.len() + 3 > MOST {
            return self.look().await;
        }
        let mut names = Vec::new();
        let mut resources = Vec::new();
        for _ in 0..2 + self.dice.below(2) {
            let name = self.fresh('i');
            let (spec, flavor) = self.spec();
            let resource = json!({"kind": "instance", "metadata": {"name": name}, "spec": spec});
            resources.extend(serde_json::from_value::<Resource>(resource));
            names.push((name, flavor));
        }
        let there = match outcome(self.client.apply(PROJECT, &Apply { resources }, false).await) {
            Outcome::Done(_) => Known::Surely(true),
            Outcome::Lost => Known::Perhaps,
            Outcome::Refused(code) => return self.note(format_args!("apply refused: {code}")),
        };
        for (name, flavor) in names {
            self.promised(&name, there, flavor);
        }
    }

    /// Changes what is known of one of its instances. Before a call nothing is certain any more: it may be cut off, and have happened all the same.
    fn know<T>(&mut self, name: &str, change: impl FnOnce(&mut Promise) -> T) -> T {
        change(self.instances.get_mut(name).expect("a worker asks only about instances that it remembers"))
    }

    async fn patch(&mut self, name: &str, patch: Value) -> Outcome<Instance> {
        outcome(self.client.patch::<InstanceKind>(PROJECT, name, &patch, None).await)
    }

    /// A refusal that must not come for an object that was acknowledged.
    fn refused(&mut self, name: &str, what: &str, code: Code) {
        self.note(format_args!("{what} of {name} refused: {code}"));
        if code == Code::NotFound {
            self.trace.violation(format_args!("{name} was acknowledged, and {what} does not find it"));
        }
    }

    async fn power(&mut self) {
        let Some(name) = self.pick() else { return };
        let power = *self.dice.choose(&[Power::Running, Power::Stopped, Power::Paused]).unwrap_or(&Power::Running);
        let before = self.know(&name, |p| std::mem::replace(&mut p.power, Known::Perhaps));
        let known = match self.patch(&name, json!({"spec": {"power": power}})).await {
            Outcome::Done(_) => Known::Surely(power),
            Outcome::Lost => return,
            Outcome::Refused(code) => {
                self.refused(&name, "power", code);
                before
            }
        };
        self.know(&name, |p| p.power = known);
    }

    async fn restart(&mut self) {
        let Some(name) = self.pick() else { return };
        let next = self.instances[&name].restarts + 1;
        match self.patch(&name, json!({"spec": {"restart_generation": next}})).await {
            Outcome::Done(_) | Outcome::Lost => self.know(&name, |p| p.restarts = next),
            Outcome::Refused(code) => self.refused(&name, "restart", code),
        }
    }

    async fn resize(&mut self) {
        let Some(name) = self.pick() else { return };
        let flavor = self.dice.choose(&FLAVORS).copied().unwrap_or("xs");
        let before = self.know(&name, |p| std::mem::replace(&mut p.flavor, Known::Perhaps));
        let known = match self.patch(&name, json!({"spec": {"flavor": flavor}})).await {
            Outcome::Done(_) => Known::Surely(flavor),
            Outcome::Lost => return,
            Outcome::Refused(code) => {
                self.refused(&name, "resize", code);
                before
            }
        };
        self.know(&name, |p| p.flavor = known);
    }

    async fn delete(&mut self) {
        let Some(name) = self.pick() else { return };
        let before = self.know(&name, |p| std::mem::replace(&mut p.there, Known::Perhaps));
        let known = match outcome(self.client.delete::<InstanceKind>(PROJECT, &name).await) {
            Outcome::Done(()) => Known::Surely(false),
            Outcome::Lost => return,
            Outcome::Refused(code) => {
                self.refused(&name, "deletion", code);
                before
            }
        };
        self.know(&name, |p| p.there = known);
    }

    async fn create_volume(&mut self) {
        if self.volumes.len() >= MOST {
            return self.delete_volume().await;
        }
        let name = self.fresh('v');
        let spec = VolumeSpec { size: Size::mib(64), format: VolumeFormat::Qcow2, ..VolumeSpec::default() };
        let there = match outcome(self.client.create(PROJECT, &Volume::new(&name, spec)).await) {
            Outcome::Done(_) => Known::Surely(true),
            Outcome::Lost => Known::Perhaps,
            Outcome::Refused(code) => return self.note(format_args!("creation of {name} refused: {code}")),
        };
        self.volumes.insert(name, there);
    }

    async fn set_volumes(&mut self, name: &str, volumes: Vec<String>) {
        let list: Vec<VolumeAttachment> =
            volumes.iter().map(|v| VolumeAttachment { volume: v.clone(), ..VolumeAttachment::default() }).collect();
        match self.patch(name, json!({"spec": {"volumes": list}})).await {
            Outcome::Done(_) => self.know(name, |p| p.attached = volumes),
            Outcome::Lost => {}
            Outcome::Refused(code) => self.refused(name, "change of volumes", code),
        }
    }

    async fn attach(&mut self) {
        let (Some(name), Some(volume)) = (self.pick(), self.pick_volume()) else { return };
        let mut volumes = self.instances[&name].attached.clone();
        if !volumes.contains(&volume) {
            volumes.push(volume);
            self.set_volumes(&name, volumes).await;
        }
    }

    async fn detach(&mut self) {
        let with: Vec<String> = self
            .instances
            .iter()
            .filter(|(_, p)| p.there == Known::Surely(true) && !p.attached.is_empty())
            .map(|(n, _)| n.clone())
            .collect();
        let Some(name) = self.dice.choose(&with).cloned() else { return };
        self.set_volumes(&name, Vec::new()).await;
    }

    async fn delete_volume(&mut self) {
        let Some(name) = self.pick_volume() else { return };
        self.volumes.insert(name.clone(), Known::Perhaps);
        let known = match outcome(self.client.delete::<VolumeKind>(PROJECT, &name).await) {
            Outcome::Done(()) => Known::Surely(false),
            Outcome::Lost => return,
            Outcome::Refused(code) => {
                self.refused(&name, "deletion", code);
                Known::Surely(true)
            }
        };
        self.volumes.insert(name, known);
    }

    /// An image of its own; what is launched next may run from it.
    async fn create_image(&mut self) {
        if self.images.len() >= MOST_IMAGES {
            return self.delete_image().await;
        }
        let name = self.fresh('m');
        let spec = json!({"source": {"type": "recipe", "recipe": "busybox"}, "on_demand": self.dice.permille(500)});
        let image = json!({"kind": "image", "metadata": {"name": name}, "spec": spec});
        let Ok(image) = serde_json::from_value::<Image>(image) else {
            return self.trace.violation("the worker's own image cannot be read");
        };
        match outcome(self.client.create(PROJECT, &image).await) {
            Outcome::Done(_) | Outcome::Lost => self.images.push(name),
            Outcome::Refused(code) => self.note(format_args!("creation of {name} refused: {code}")),
        }
    }

    async fn delete_image(&mut self) {
        let Some(name) = self.dice.choose(&self.images).cloned() else { return };
        match outcome(self.client.delete::<ImageKind>(PROJECT, &name).await) {
            // One that is used stays, and is tried again.
            Outcome::Refused(Code::InUse) | Outcome::Lost => {}
            Outcome::Done(()) | Outcome::Refused(_) => self.images.retain(|known| *known != name),
        }
    }

    /// Takes a node out of service, or puts it back.
    async fn cordon(&mut self) {
        let node = format!("n{}", 1 + self.dice.below(self.nodes));
        let schedulable = self.dice.permille(700);
        let _ = self.client.patch::<NodeKind>("", &node, &json!({"spec": {"schedulable": schedulable}}), None).await;
    }

    /// Reads something back and compares it with what was promised.
    async fn look(&mut self) {
        let names: Vec<String> = self.instances.keys().cloned().collect();
        if let Some(name) = self.dice.choose(&names).cloned() {
            self.compare(&name).await;
        }
    }

    /// Whether everything that was promised holds. Returns whether every question was answered.
    pub async fn compare_all(&mut self) -> bool {
        let mut answered = true;
        for name in self.instances.keys().cloned().collect::<Vec<_>>() {
            answered &= self.compare(&name).await;
        }
        for (name, there) in self.volumes.clone() {
            match (outcome(self.client.get::<VolumeKind>(PROJECT, &name).await), there) {
                (Outcome::Refused(Code::NotFound), Known::Surely(true)) => {
                    self.trace.violation(format_args!("volume {name} was acknowledged and is gone"));
                }
                (Outcome::Lost, _) => answered = false,
                _ => {}
            }
        }
        answered
    }

    async fn compare(&mut self, name: &str) -> bool {
        let promise = self.instances[name].clone();
        let wrong = match outcome(self.client.get::<InstanceKind>(PROJECT, name).await) {
            Outcome::Lost => return false,
            Outcome::Refused(Code::NotFound) => {
                if promise.there == Known::Surely(true) {
                    Some("it is not there".to_string())
                } else {
                    self.instances.remove(name);
                    None
                }
            }
            Outcome::Refused(code) => Some(format!("it cannot be read: {code}")),
            Outcome::Done(instance) => {
                if promise.there == Known::Surely(false) && !instance.metadata.is_deleting() {
                    Some("it should be deleted".into())
                } else if matches!(promise.power, Known::Surely(power) if power != instance.spec.power) {
                    Some(format!("its power is {:?}", instance.spec.power))
                } else if matches!(promise.flavor, Known::Surely(flavor) if flavor != instance.spec.flavor) {
                    Some(format!("its flavor is {}", instance.spec.flavor))
                } else if promise.there == Known::Perhaps {
                    if let Some(known) = self.instances.get_mut(name) {
                        known.there = Known::Surely(!instance.metadata.is_deleting());
                    }
                    None
                } else {
                    None
                }
            }
        };
        if let Some(wrong) = wrong {
            self.trace.violation(format_args!("{name}: {wrong}; acknowledged was {promise:?}"));
        }
        true
    }
}
