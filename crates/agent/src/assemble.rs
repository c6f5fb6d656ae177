//! From objects to what drivers are told: pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use oblak_compute::{Boot, ContainerOptions, DiskFormat, DiskSpec, GuestSpec, NicAttach, NicSpec};
use oblak_model::{
    Direction, Image, Instance, InstanceId, Isolation, Network, NetworkId, NodeId, Port, PortId, RuleProtocol,
    SecurityRule, Size, Subnet, Transport, UserNamespace,
};
use oblak_network::{
    InstanceMetadata, NetworkPlan, OverlayPlan, PortHandle, PortKind, PortPlan, Protocol, PublishPlan, Rule, SubnetPlan,
};
use oblak_volume::{Format, VolumeHandle};

use crate::services::{LocalImage, LocalPayload, OciDefaults, firmware};
use crate::tunnels::Tunnels;
use crate::world::World;

/// Most processes in a container.
const PIDS_MAX: u32 = 4096;

/// Networks that have a port of an instance on this node.
#[must_use]
pub fn local_networks(world: &World, node: NodeId) -> BTreeSet<NetworkId> {
    world
        .ports
        .values()
        .filter(|p| world.is_local(p, node) || world.is_coming(p, node))
        .map(|p| p.status.network)
        .collect()
}

/// What a plan depends on besides the world.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// This node.
    pub node: NodeId,
    /// Its zone.
    pub zone: &'a str,
    /// First host id of each container that has got its ids.
    pub container_ids: &'a BTreeMap<InstanceId, u32>,
}

/// The whole wanted state of a network on this node; `None` when the network or its subnets are not known yet.
#[must_use]
pub fn network_plan(world: &World, here: &Here<'_>, id: NetworkId) -> Option<NetworkPlan> {
    let network: &Network = world.networks.get(&id)?;
    let subnets: Vec<SubnetPlan> =
        world.subnets.values().filter(|s| s.status.network == id).map(|s| subnet_plan(s)).collect();
    if subnets.is_empty() {
        return None;
    }
    let mut ports: Vec<PortPlan> = Vec::new();
    let tunnels = Tunnels::of(world, here.node);
    let overlay = network.status.vni.zip(tunnels.own()).map(|(vni, own)| OverlayPlan { vni, local: own.address });
    for port in world.ports.values().filter(|p| p.status.network == id) {
        let mut plan = port_plan(world, here, port);
        if plan.kind == PortKind::Remote && overlay.is_some() {
            plan.tunnel = port.status.node.and_then(|node| tunnels.to(node));
        }
        ports.push(plan);
    }
    Some(NetworkPlan {
        id,
        name: network.metadata.name.clone(),
        project: network.metadata.project.clone().unwrap_or_default(),
        mtu: tunnels.mtu(network.spec.mtu),
        nat: network.spec.nat,
        subnets,
        ports,
        forwarders: network.spec.dns_forwarders.clone(),
        overlay,
    })
}

fn subnet_plan(subnet: &Subnet) -> SubnetPlan {
    let lease_s = u32::try_from(subnet.spec.lease.0.as_secs()).unwrap_or(u32::MAX);
    SubnetPlan { cidr: subnet.spec.cidr, gateway: subnet.spec.gateway_address(), lease_s }
}

fn port_plan(world: &World, here: &Here<'_>, port: &Port) -> PortPlan {
    let id = PortId(port.metadata.id);
    let instance = world.is_local(port, here.node).then(|| world.instances.get(&port.spec.instance)).flatten();
    let userns = here.container_ids.get(&port.spec.instance).copied();
    // Before a container has its ids nothing is plugged: its namespace would have the wrong owner for ever.
    let local = instance.filter(|i| userns.is_some() || !has_userns(i));
    let kind = match local.map(|i| i.status.resolved.isolation) {
        None => PortKind::Remote,
        Some(Isolation::Container) => PortKind::Netns,
        Some(_) => PortKind::Tap,
    };
    let (ingress, egress) = rules(world, port);
    let mut plan = PortPlan {
        id,
        instance: port.spec.instance,
        index: port.spec.index,
        kind,
        mac: port.status.mac.clone(),
        addresses: port.status.addresses.clone(),
        hostname: port.status.hostname.clone(),
        ingress,
        egress,
        publish: Vec::new(),
        metadata: None,
        userns: userns.filter(|_| local.is_some_and(|i| has_userns(i))),
        tunnel: None,
        standby: world.is_coming(port, here.node),
        midstream: local.is_some_and(|i| i.status.came_by_migration(here.node)),
    };
    if let Some(instance) = local {
        plan.metadata = Some(metadata(instance, here.zone));
        if port.spec.index == 0 {
            publish(instance, &mut plan);
        }
    }
    plan
}

/// Whether the instance is a container with a user namespace of its own.
fn has_userns(instance: &Instance) -> bool {
    instance.status.resolved.isolation == Isolation::Container && instance.spec.container.userns != UserNamespace::Host
}

/// A published port lets its flow in: whoever asks for it wants it to be reached.
fn publish(instance: &Instance, plan: &mut PortPlan) {
    for p in &instance.spec.publish {
        let protocol = match p.protocol {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
        };
        let host = SocketAddr::new(p.host_address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), p.host_port);
        plan.publish.push(PublishPlan { host, guest_port: p.port, protocol });
        plan.ingress.push(Rule { protocol: Some(protocol), ports: Some((p.port, p.port)), peers: Vec::new() });
    }
}

fn rules(world: &World, port: &Port) -> (Vec<Rule>, Option<Vec<Rule>>) {
    let groups = port.status.security_groups.iter().filter_map(|id| world.groups.get(id));
    let (mut ingress, mut egress) = (Vec::new(), Vec::new());
    for rule in groups.flat_map(|g| &g.spec.rules) {
        let Some(plan) = rule_plan(world, port, rule) else { continue };
        match rule.direction {
            Direction::Ingress => ingress.push(plan),
            Direction::Egress => egress.push(plan),
        }
    }
    (ingress, if egress.is_empty() { None } else { Some(egress) })
}

/// `None` when the rule allows nothing now: its peer group has no members.
fn rule_plan(world: &World, port: &Port, rule: &SecurityRule) -> Option<Rule> {
    let protocol = rule.protocol.map(|p| match p {
        RuleProtocol::Tcp => Protocol::Tcp,
        RuleProtocol::Udp => Protocol::Udp,
        RuleProtocol::Icmp => Protocol::Icmp,
    });
    let ports = rule.port_min.map(|min| (min, rule.port_max.unwrap_or(min)));
    let mut peers: Vec<IpNet> = rule.cidr.into_iter().collect();
    if let Some(group) = &rule.group {
        peers = members(world, port, group);
        if peers.is_empty() {
            return None;
        }
    }
    Some(Rule { protocol, ports, peers })
}

/// Addresses of the ports of the same network that carry the group.
fn members(world: &World, port: &Port, group: &str) -> Vec<IpNet> {
    let project = &port.metadata.project;
    let Some(id) = world
        .groups
        .iter()
        .find(|(_, g)| g.metadata.name == group && g.metadata.project == *project)
        .map(|(id, _)| *id)
    else {
        return Vec::new();
    };
    let carriers = world
        .ports
        .values()
        .filter(|p| p.status.network == port.status.network && p.status.security_groups.contains(&id));
    carriers.flat_map(|p| p.status.addresses.iter().map(|a| IpNet::from(*a))).collect()
}

/// What the metadata service tells an instance.
#[must_use]
pub fn metadata(instance: &Instance, zone: &str) -> InstanceMetadata {
    InstanceMetadata {
        instance: InstanceId(instance.metadata.id),
        name: instance.metadata.name.clone(),
        project: instance.metadata.project.clone().unwrap_or_default(),
        public_keys: instance.status.resolved.public_keys.clone(),
        user_data: instance.spec.user_data.clone(),
        availability_zone: zone.into(),
        instance_type: instance.status.resolved.flavor.clone(),
        meta: instance.metadata.labels.clone(),
    }
}

/// Everything besides the objects that a start needs.
#[derive(Debug)]
pub struct Parts<'a> {
    /// The image object.
    pub image: &'a Image,
    /// The image on this node.
    pub local: &'a LocalImage,
    /// Unpacked layers of an OCI image.
    pub layers: Vec<PathBuf>,
    /// Root disk of a machine.
    pub root: Option<VolumeHandle>,
    /// Volumes in order of the spec.
    pub volumes: Vec<VolumeHandle>,
    /// Port objects with their handles, in order of the interfaces.
    pub ports: Vec<(Port, PortHandle, u16)>,
    /// Names of other guests for /etc/hosts are left to DNS; this is the text for resolv.conf.
    pub resolv_conf: String,
    /// NoCloud seed.
    pub seed: Option<PathBuf>,
    /// Directory of the instance.
    pub dir: PathBuf,
    /// Run to start.
    pub run: u64,
    /// Epoch of the node's lease.
    pub epoch: u64,
    /// The lease that the guest depends on.
    pub fence: Option<oblak_compute::shim::Fence>,
    /// First host id for a container.
    pub id_base: u32,
}

/// The resources an instance is given.
#[must_use]
pub fn resources(instance: &Instance) -> oblak_model::Resources {
    instance.status.placement.as_ref().map_or(instance.status.resolved.resources, |p| p.resources)
}

/// What the driver is told.
#[must_use]
pub fn guest_spec(instance: &Instance, parts: Parts<'_>) -> GuestSpec {
    let given = resources(instance);
    let boot = boot(&parts, given.disk);
    let container = match &parts.local.payload {
        LocalPayload::Oci { config } => container_options(instance, config, &parts),
        _ => ContainerOptions::default(),
    };
    let disks = instance
        .spec
        .volumes
        .iter()
        .zip(&parts.volumes)
        .map(|(a, handle)| disk_spec(handle, a.read_only, a.mount.clone()))
        .collect();
    GuestSpec {
        id: InstanceId(instance.metadata.id),
        name: instance.metadata.name.clone(),
        project: instance.metadata.project.clone().unwrap_or_default(),
        isolation: instance.status.resolved.isolation,
        dir: parts.dir,
        run: parts.run,
        epoch: parts.epoch,
        vcpus_milli: given.vcpus.milli(),
        memory: given.memory,
        boot,
        disks,
        nics: parts.ports.into_iter().map(|(port, handle, mtu)| nic_spec(&port, handle, mtu)).collect(),
        hostname: instance.metadata.name.clone(),
        seed: parts.seed,
        container,
        fence: parts.fence,
    }
}

/// A volume as a disk.
#[must_use]
pub fn disk_spec(handle: &VolumeHandle, read_only: bool, mount: Option<String>) -> DiskSpec {
    let format = if handle.format == Format::Qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
    DiskSpec { volume: handle.id, path: handle.path.clone(), format, read_only, mount }
}

fn nic_spec(port: &Port, handle: PortHandle, mtu: u16) -> NicSpec {
    let attach = match handle {
        PortHandle::Tap { netns, device, vnet_hdr } => NicAttach::Tap { netns, device, vnet_hdr },
        PortHandle::Netns { netns, userns, .. } => NicAttach::Netns { netns, userns },
    };
    NicSpec { port: PortId(port.metadata.id), mac: port.status.mac.clone(), mtu, attach }
}

fn boot(parts: &Parts<'_>, disk: Size) -> Boot {
    let root = || parts.root.as_ref().map(|h| h.path.clone());
    let format = match parts.root.as_ref().map(|h| h.format) {
        Some(Format::Raw) => DiskFormat::Raw,
        _ => DiskFormat::Qcow2,
    };
    match &parts.local.payload {
        LocalPayload::Disk { path, .. } => Boot::Disk {
            root: root().unwrap_or_else(|| path.clone()),
            format,
            firmware: firmware(parts.image.spec.firmware),
        },
        LocalPayload::Kernel { kernel, initrd, cmdline, .. } => Boot::Kernel {
            kernel: kernel.clone(),
            initrd: initrd.clone(),
            cmdline: cmdline.clone(),
            root: root(),
            format,
        },
        LocalPayload::Oci { .. } => {
            Boot::Oci { layers: parts.layers.clone(), upper: parts.dir.join("upper"), upper_size: disk }
        }
    }
}

fn container_options(instance: &Instance, image: &OciDefaults, parts: &Parts<'_>) -> ContainerOptions {
    let spec = &instance.spec.container;
    let mut env: BTreeMap<String, String> = BTreeMap::new();
    env.insert("PATH".into(), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into());
    env.extend(image.env.iter().filter_map(|e| e.split_once('=')).map(|(k, v)| (k.to_string(), v.to_string())));
    env.extend(instance.spec.env.clone());
    ContainerOptions {
        argv: argv(instance, image),
        env,
        cwd: spec
            .workdir
            .clone()
            .or_else(|| Some(image.workdir.clone()).filter(|w| !w.is_empty()))
            .unwrap_or_else(|| "/".into()),
        user: spec.user.clone().unwrap_or_else(|| image.user.clone()),
        tty: spec.tty,
        read_only_root: spec.read_only_root,
        userns_host: spec.userns == UserNamespace::Host,
        id_base: parts.id_base,
        cap_add: spec.cap_add.clone(),
        cap_drop: spec.cap_drop.clone(),
        pids_max: PIDS_MAX,
        resolv_conf: parts.resolv_conf.clone(),
        hosts: hosts(instance),
        stop_signal: image.stop_signal,
    }
}

/// As `docker run` merges them: a given entrypoint drops the image's command, a given command replaces it.
fn argv(instance: &Instance, image: &OciDefaults) -> Vec<String> {
    let given = &instance.spec.command;
    let mut argv = instance.spec.container.entrypoint.clone().unwrap_or_else(|| image.entrypoint.clone());
    if !given.is_empty() {
        argv.extend(given.iter().cloned());
    } else if instance.spec.container.entrypoint.is_none() {
        argv.extend(image.cmd.iter().cloned());
    }
    argv
}

fn hosts(instance: &Instance) -> Vec<(String, String)> {
    instance
        .status
        .addresses
        .first()
        .map(|a| (a.address.to_string(), instance.metadata.name.clone()))
        .into_iter()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::InstanceSpec;

    fn instance(entrypoint: Option<&[&str]>, command: &[&str]) -> Instance {
        let own = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut spec = InstanceSpec { image: "busybox".into(), command: own(command), ..InstanceSpec::default() };
        spec.container.entrypoint = entrypoint.map(own);
        Instance::new("job", spec)
    }

    #[test]
    fn entrypoint_and_command_merge_as_docker_does() {
        let image = OciDefaults { entrypoint: vec!["/init".into()], cmd: vec!["run".into()], ..OciDefaults::default() };
        assert_eq!(argv(&instance(None, &[]), &image), ["/init", "run"]);
        assert_eq!(argv(&instance(None, &["x", "y"]), &image), ["/init", "x", "y"]);
        assert_eq!(argv(&instance(Some(&["/bin/sh"]), &[]), &image), ["/bin/sh"]);
        assert_eq!(argv(&instance(Some(&["/bin/sh"]), &["-c"]), &image), ["/bin/sh", "-c"]);
    }

    #[test]
    fn a_published_port_is_let_in() {
        let mut i = instance(None, &[]);
        i.spec.publish.push(oblak_model::Publish { host_port: 8080, port: 80, ..Default::default() });
        let mut plan = PortPlan {
            id: PortId::default(),
            instance: InstanceId::default(),
            index: 0,
            kind: PortKind::Netns,
            mac: String::new(),
            addresses: vec![],
            hostname: String::new(),
            ingress: vec![],
            egress: None,
            publish: vec![],
            metadata: None,
            userns: None,
            tunnel: None,
            standby: false,
            midstream: false,
        };
        publish(&i, &mut plan);
        assert_eq!(plan.publish[0].host.to_string(), "0.0.0.0:8080");
        assert_eq!(plan.ingress, [Rule { protocol: Some(Protocol::Tcp), ports: Some((80, 80)), peers: vec![] }]);
    }

    #[test]
    fn a_container_is_plugged_when_its_ids_are_known_and_for_them() {
        let node = NodeId(uuid::Uuid::from_u128(1));
        let id = InstanceId(uuid::Uuid::from_u128(2));
        let mut job = instance(None, &[]);
        job.metadata.id = id.0;
        let mut port = Port::new("eth0", oblak_model::PortSpec { instance: id, ..Default::default() });
        port.status.node = Some(node);
        let planned = |job: &Instance, isolation: Isolation, ids: &BTreeMap<InstanceId, u32>| {
            let mut job = job.clone();
            job.status.resolved.isolation = isolation;
            let mut world = World::default();
            world.instances.insert(id, std::sync::Arc::new(job));
            let plan = port_plan(&world, &Here { node, zone: "z", container_ids: ids }, &port);
            (plan.kind, plan.userns, plan.metadata.is_some())
        };
        let (none, some) = (BTreeMap::new(), BTreeMap::from([(id, 65_536)]));
        assert_eq!(planned(&job, Isolation::Container, &none), (PortKind::Remote, None, false));
        assert_eq!(planned(&job, Isolation::Container, &some), (PortKind::Netns, Some(65_536), true));
        assert_eq!(planned(&job, Isolation::Vm, &none), (PortKind::Tap, None, true));
        job.spec.container.userns = UserNamespace::Host;
        assert_eq!(planned(&job, Isolation::Container, &none), (PortKind::Netns, None, true));
        assert_eq!(planned(&job, Isolation::Container, &some), (PortKind::Netns, None, true));
    }
}
