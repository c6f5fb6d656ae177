//! `launch`: from words to an instance, and watching it come up.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use oblak_client::ClientError;
use oblak_model::{
    AffinityTerm, Code, ContainerSpec, FlavorKind, ImageKind, Instance, InstanceKind, InstanceSpec, Isolation, Key,
    KeyKind, KeySpec, MAX_USER_DATA, NetworkAttachment, NetworkKind, Phase, PlacementRules, SecurityGroupKind, Span,
    Topology, UserNamespace, VolumeKind,
};
use tokio::time::Instant;

use super::{check, with_value};
use crate::args::{LaunchArgs, UsernsWord};
use crate::error::{CliError, DOES_NOT_FIT, NOT_FOUND, Result};
use crate::keys;
use crate::session::Session;
use crate::show::addresses;
use crate::wait::{Progress, deleted, say_instance, took, until};

/// An instance that fits nowhere is given this long: nodes that just start may still appear.
const NO_ROOM_FOR: Duration = Duration::from_secs(3);

/// Launches an instance.
pub async fn launch(session: &Session, args: LaunchArgs) -> Result<()> {
    let (wait, timeout) = (args.wait, args.timeout);
    let keys = key_names(session, &args.keys).await?;
    let asked = object(args, keys)?;
    check(&asked)?;
    let made = match session.client.create::<InstanceKind>(&session.project, &asked).await {
        Ok(made) => made,
        Err(error) => return Err(refused(session, &asked, error).await),
    };
    let out = session.out;
    if !wait {
        return if out.machine() { out.object(&made) } else { out.data(&format!("{}\n", made.metadata.name)) };
    }
    let running = wait_running(session, &made, timeout).await?;
    if out.machine() { out.object(&running) } else { out.data(&format!("{}\n", running.metadata.name)) }
}

/// The object that the flags describe.
fn object(args: LaunchArgs, keys: Vec<String>) -> Result<Instance> {
    let name = args.name.unwrap_or_else(|| made_up(&args.image));
    let user_data = args.user_data.as_deref().map(user_data).transpose()?;
    let networks = if args.no_network {
        Some(Vec::new())
    } else if args.networks.is_empty() && args.security_groups.is_empty() {
        None
    } else {
        let mut networks = args.networks;
        if networks.is_empty() {
            networks.push(NetworkAttachment { network: oblak_model::DEFAULT_NETWORK.into(), ..Default::default() });
        }
        for attachment in &mut networks {
            attachment.security_groups.clone_from(&args.security_groups);
        }
        Some(networks)
    };
    let spec = InstanceSpec {
        isolation: args.isolation.map(Isolation::from),
        image: args.image,
        flavor: args.flavor,
        disk: args.disk,
        restart_policy: args.restart.map(Into::into),
        command: args.command,
        env: args.env.into_iter().collect(),
        keys,
        user_data,
        networks,
        publish: args.publish,
        volumes: args.volumes,
        placement: PlacementRules {
            node_selector: args.node_selector,
            zones: args.zones,
            anti_affinity: args.anti_affinity.iter().filter_map(|group| apart(group)).collect(),
            ..Default::default()
        },
        ha: args.ha,
        ephemeral: args.ephemeral,
        pool: args.pool,
        container: ContainerSpec {
            tty: args.tty,
            read_only_root: args.read_only,
            userns: match args.userns {
                Some(UsernsWord::Host) => UserNamespace::Host,
                Some(UsernsWord::Private) | None => UserNamespace::Private,
            },
            ..ContainerSpec::default()
        },
        ..InstanceSpec::default()
    };
    let mut instance = Instance::new(&name, spec);
    instance.metadata.labels = args.labels.into_iter().collect::<BTreeMap<_, _>>();
    instance.metadata.labels.extend(args.anti_affinity.map(|group| (ANTI_AFFINITY.to_string(), group)));
    Ok(instance)
}

/// Label of instances that keep apart from each other.
const ANTI_AFFINITY: &str = "anti-affinity";

/// On another node than those of the group.
fn apart(group: &str) -> Option<AffinityTerm> {
    let selector = format!("{ANTI_AFFINITY}={group}").parse().ok()?;
    Some(AffinityTerm { selector, topology: Topology::Node, required: true })
}

/// A free name in all likelihood: that of the image and four random digits.
fn made_up(image: &str) -> String {
    let base = image.rsplit('/').next().unwrap_or(image).to_ascii_lowercase();
    let plain: String = base.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(40).collect();
    let plain = plain.trim_matches('-');
    let random = &uuid::Uuid::new_v4().simple().to_string()[..4];
    if plain.is_empty() { format!("i-{random}") } else { format!("{plain}-{random}") }
}

fn user_data(file: &Path) -> Result<String> {
    let mut text = String::new();
    let limit = MAX_USER_DATA as u64 + 1;
    let read = if file == Path::new("-") {
        std::io::stdin().take(limit).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|f| f.take(limit).read_to_string(&mut text))
    };
    read.map_err(|e| CliError::file(file, "read the user data in", &e))?;
    if text.len() > MAX_USER_DATA {
        return Err(CliError::usage(
            format!("{} is larger than {MAX_USER_DATA} bytes", file.display()),
            "let it fetch the rest itself",
        ));
    }
    Ok(text)
}

/// Names of the keys; files are registered.
async fn key_names(session: &Session, words: &[String]) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for word in words {
        let path = Path::new(word);
        let is_file = word.contains('/') || word.contains(".pub") || path.is_file();
        names.push(if is_file { register(session, path, None, Vec::new()).await?.metadata.name } else { word.clone() });
    }
    names.dedup();
    Ok(names)
}

/// Makes the key object of a public key file, unless it is there already.
pub async fn register(
    session: &Session,
    file: &Path,
    name: Option<&str>,
    labels: Vec<(String, String)>,
) -> Result<Key> {
    let line = keys::read(file)?;
    let name = match name {
        Some(name) => name.to_string(),
        None => keys::object_name(file, &line).ok_or_else(|| {
            CliError::usage(format!("{} holds no key", file.display()), "give a file that ends in .pub")
        })?,
    };
    let mut key = Key::new(&name, KeySpec { public_key: line.clone() });
    key.metadata.labels.extend(labels);
    check(&key)?;
    let made = match session.client.create::<KeyKind>(&session.project, &key).await {
        Ok(made) => made,
        Err(error) if error.code() == Some(Code::NameTaken) => {
            let there = session.get::<KeyKind>(&name).await?;
            if keys::fingerprint(&there.spec.public_key) != keys::fingerprint(&line) {
                return Err(error.into());
            }
            there
        }
        Err(error) => return Err(error.into()),
    };
    keys::remember(file, &line);
    Ok(made)
}

/// Adds what may have been meant when the instance names something that does not exist.
async fn refused(session: &Session, asked: &Instance, error: ClientError) -> CliError {
    let field = match &error {
        ClientError::Api(e) if matches!(e.code, Code::NotFound | Code::Invalid) => e.field.clone().unwrap_or_default(),
        _ => return with_value(error, asked),
    };
    let spec = &asked.spec;
    let index = field.split('/').filter_map(|p| p.parse::<usize>().ok()).next().unwrap_or(0);
    let word = field.split('/').nth(2).unwrap_or_default();
    let guess = match word {
        "image" => session.suggest::<ImageKind>(&spec.image).await,
        "flavor" => session.suggest::<FlavorKind>(&spec.flavor).await,
        "keys" => match spec.keys.get(index) {
            Some(key) => session.suggest::<KeyKind>(key).await,
            None => None,
        },
        "volumes" => match spec.volumes.get(index) {
            Some(volume) => session.suggest::<VolumeKind>(&volume.volume).await,
            None => None,
        },
        "networks" => match spec.networks.as_ref().and_then(|n| n.get(index)) {
            Some(n) if field.contains("security_groups") => match n.security_groups.first() {
                Some(group) => session.suggest::<SecurityGroupKind>(group).await,
                None => None,
            },
            Some(n) => session.suggest::<NetworkKind>(&n.network).await,
            None => None,
        },
        _ => None,
    };
    let error = with_value(error, asked);
    match guess {
        Some(hint) => error.with_hint(hint).with_code(NOT_FOUND),
        None => error,
    }
}

/// Waits until an instance runs, shows what happens until then, and says why when it does not.
pub async fn wait_running(session: &Session, made: &Instance, limit: Span) -> Result<Instance> {
    let name = made.metadata.name.clone();
    let mut progress = Progress::new(session.out);
    let mut no_room: Option<Instant> = None;
    let result =
        until::<InstanceKind, Instance>(session, made.metadata.id, &format!("the start of {name}"), limit, |now| {
            let Some(instance) = now else { return deleted("instance", &name) };
            say_instance(&mut progress, instance);
            if instance.status.reason == "DoesNotFit" && instance.status.placement.is_none() {
                let since = *no_room.get_or_insert_with(Instant::now);
                return if since.elapsed() >= NO_ROOM_FOR {
                    ControlFlow::Break(Err(no_fit(instance)))
                } else {
                    ControlFlow::Continue(())
                };
            }
            no_room = None;
            started(instance)
        })
        .await;
    let time = progress.end();
    match result {
        Ok(instance) => {
            session.out.note(&up(&instance, time));
            Ok(instance)
        }
        Err(error) => Err(with_reasons(session, &name, error).await),
    }
}

/// Whether a new instance is up, or will not come up.
fn started(instance: &Instance) -> ControlFlow<Result<Instance>> {
    let (name, status) = (&instance.metadata.name, &instance.status);
    match status.phase {
        Phase::Running | Phase::Paused => ControlFlow::Break(Ok(instance.clone())),
        Phase::Stopped if status.observed.run > 0 => match status.observed.exit_code {
            Some(code) if code != 0 => ControlFlow::Break(Err(CliError::new(
                format!("{name} ended with code {code}"),
                format!("`oblak logs {name}` shows what it wrote"),
            ))),
            _ => ControlFlow::Break(Ok(instance.clone())),
        },
        Phase::Failed => ControlFlow::Break(Err(CliError::new(
            format!("{name} failed: {}", why(instance)),
            format!(
                "`oblak logs {name}` and `oblak describe instance/{name}` say more; `oblak delete {name}` removes it"
            ),
        ))),
        Phase::Deleting => deleted("instance", name),
        _ => ControlFlow::Continue(()),
    }
}

fn no_fit(instance: &Instance) -> CliError {
    let name = &instance.metadata.name;
    CliError::new(
        format!("{name} does not fit: {}", instance.status.message),
        format!("it starts by itself when there is room; `oblak delete {name}` gives up"),
    )
    .with_code(DOES_NOT_FIT)
}

/// Reason and message of an instance.
pub fn why(instance: &Instance) -> String {
    let (reason, message) = (&instance.status.reason, &instance.status.message);
    match (reason.is_empty(), message.is_empty()) {
        (false, false) => format!("{message} ({reason})"),
        (false, true) => reason.clone(),
        (true, false) => message.clone(),
        (true, true) => "no reason was given".into(),
    }
}

fn up(instance: &Instance, time: Duration) -> String {
    let name = &instance.metadata.name;
    let at = addresses(instance);
    let at = if at.is_empty() { String::new() } else { format!(" at {at}") };
    if instance.status.phase == Phase::Stopped {
        return format!("{name} has ended well after {}; `oblak logs {name}` shows what it wrote", took(time));
    }
    let next = match instance.status.resolved.isolation {
        Isolation::Container => format!("oblak exec -it {name} -- sh"),
        _ => format!("oblak ssh {name}, or oblak console {name}"),
    };
    let mut text = format!("{name} is {}{at} after {}. Next: {next}", instance.status.phase, took(time));
    for condition in instance.status.conditions.iter().filter(|c| c.status) {
        text.push_str(&format!("\nnote: {}", condition.message));
    }
    text
}

/// Adds what the scheduler and the node say, when it is not in the message anyway.
async fn with_reasons(session: &Session, name: &str, mut error: CliError) -> CliError {
    let explained = tokio::time::timeout(Duration::from_secs(5), session.client.explain(&session.project, name)).await;
    if let Ok(Ok(explain)) = explained
        && !explain.text.is_empty()
        && !error.message.contains(&explain.text)
    {
        error.message = format!("{}\n{}", error.message, explain.text);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: LaunchArgs,
    }

    fn parse(words: &[&str]) -> Instance {
        let line = Line::try_parse_from(std::iter::once(&"launch").chain(words)).unwrap();
        object(line.args, vec!["k".into()]).unwrap()
    }

    #[test]
    fn words_become_an_instance() {
        let i = parse(&[
            "busybox",
            "--name",
            "job",
            "--isolation",
            "container",
            "--publish",
            "8080:80",
            "--volume",
            "data:/srv:ro",
            "--env",
            "A=b",
            "--label",
            "tier=web",
            "--disk",
            "2GiB",
            "--zone",
            "zone-1",
            "--node-selector",
            "disk=ssd",
            "--restart",
            "always",
            "--security-group",
            "open",
            "--",
            "httpd",
            "-f",
        ]);
        assert_eq!(i.metadata.name, "job");
        assert_eq!(i.metadata.labels["tier"], "web");
        let spec = &i.spec;
        assert_eq!(spec.isolation, Some(Isolation::Container));
        assert_eq!(spec.command, ["httpd", "-f"]);
        assert_eq!((spec.publish[0].host_port, spec.publish[0].port), (8080, 80));
        assert_eq!(spec.volumes[0].mount.as_deref(), Some("/srv"));
        assert_eq!(spec.disk, Some(oblak_model::Size::gib(2)));
        assert_eq!(spec.restart_policy, Some(oblak_model::RestartPolicy::Always));
        assert_eq!(spec.networks.as_ref().unwrap()[0].security_groups, ["open"]);
        assert_eq!((spec.flavor.as_str(), spec.keys[0].as_str()), ("s", "k"));
        assert!(i.validate().is_ok());
    }

    #[test]
    fn defaults_are_left_to_the_server() {
        let i = parse(&["debian-12"]);
        assert_eq!((i.spec.isolation, i.spec.networks.clone(), i.spec.restart_policy), (None, None, None));
        assert!(i.metadata.name.starts_with("debian-12-"), "{}", i.metadata.name);
        assert!(i.validate().is_ok());
        assert_eq!(parse(&["x", "--no-network"]).spec.networks, Some(vec![]));
        assert!(made_up("registry.example:5000/team/App_1.2").starts_with("app-1-2-"));
    }

    #[test]
    fn ends_of_a_start() {
        let mut i = parse(&["tiny", "--name", "web"]);
        assert!(started(&i).is_continue());
        i.status.phase = Phase::Failed;
        i.status.reason = "NoQemu".into();
        i.status.message = "qemu-system-x86_64 is not installed".into();
        let ControlFlow::Break(Err(error)) = started(&i) else { panic!("must fail") };
        assert_eq!(error.message, "web failed: qemu-system-x86_64 is not installed (NoQemu)");
        i.status.phase = Phase::Stopped;
        i.status.observed.run = 1;
        i.status.observed.exit_code = Some(3);
        let ControlFlow::Break(Err(error)) = started(&i) else { panic!("must fail") };
        assert_eq!(error.message, "web ended with code 3");
        i.status.observed.exit_code = Some(0);
        assert!(matches!(started(&i), ControlFlow::Break(Ok(_))));
    }
}
