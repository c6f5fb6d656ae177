//! What the commands do, one module per family.

mod apply;
mod cluster;
mod describe;
mod documents;
mod events;
mod exec;
mod forward;
mod identity;
mod image;
mod join;
mod launch;
mod list;
mod login;
mod migrate;
mod network;
mod node;
mod object;
mod power;
mod snapshot;
mod ssh;
mod status;
mod stream;
mod volume;

pub use self::cluster::passphrase;
pub(crate) use self::cluster::run as cluster;
pub use documents::read as documents;

use oblak_client::ClientError;
use oblak_model::{Code, Kind, Object};
use serde_json::Value;

use crate::args::{Command, Global};
use crate::error::{CliError, Result};
use crate::out::Out;
use crate::session::Session;

/// Runs a command and gives its exit code.
pub async fn run(command: Command, global: &Global, out: Out, root: &clap::Command) -> Result<u8> {
    match command {
        Command::Completion(args) => return status::completion(out, &args, root).map(|()| 0),
        Command::Context(command) => return login::context(out, &command).map(|()| 0),
        Command::Login(args) => return login::login(global, out, &args).await.map(|()| 0),
        Command::Version => return status::version(global, out).await.map(|()| 0),
        _ => {}
    }
    let session = Session::open(global, out)?;
    let s = &session;
    s.refresh_servers().await;
    match command {
        Command::Launch(args) => Box::pin(launch::launch(s, *args)).await?,
        Command::List(args) => list::list(s, &args).await?,
        Command::Get(args) => object::get(s, &args).await?,
        Command::Describe(args) => describe::describe(s, &args).await?,
        Command::Delete(args) => object::delete(s, &args).await?,
        Command::Stop(args) => power::run(s, power::Change::Stop, &args).await?,
        Command::Start(args) => power::run(s, power::Change::Start, &args).await?,
        Command::Restart(args) => power::run(s, power::Change::Restart, &args).await?,
        Command::Pause(args) => power::run(s, power::Change::Pause, &args).await?,
        Command::Resume(args) => power::run(s, power::Change::Resume, &args).await?,
        Command::Resize(args) => power::resize(s, &args).await?,
        Command::Migrate(args) => Box::pin(migrate::migrate(s, &args)).await?,
        Command::Snapshot(args) => snapshot::snapshot(s, &args).await?,
        Command::Restore(args) => snapshot::restore(s, &args).await?,
        Command::Snapshots(args) => snapshot::list(s, &args).await?,
        Command::Exec(args) => return Box::pin(exec::exec(s, args)).await,
        Command::Console(args) => return Box::pin(exec::console(s, &args.name)).await,
        Command::Logs(args) => exec::logs(s, &args).await?,
        Command::Ssh(args) => return Box::pin(ssh::ssh(s, &args)).await,
        Command::Forward(args) => Box::pin(forward::forward(s, &args)).await?,
        Command::Vnc(args) => Box::pin(forward::vnc(s, &args)).await?,
        Command::Usage(args) => status::usage(s, &args.name).await?,
        Command::Explain(args) => status::explain(s, &args).await?,
        Command::Apply(args) => return Box::pin(apply::apply(s, &args)).await,
        Command::Image(command) => Box::pin(image::run(s, command)).await?,
        Command::Volume(command) => Box::pin(volume::run(s, command)).await?,
        Command::Network(command) => network::network(s, command).await?,
        Command::Subnet(command) => network::subnet(s, command).await?,
        Command::SecurityGroup(command) => network::security_group(s, command).await?,
        Command::Key(command) => identity::key(s, command).await?,
        Command::Flavor(command) => identity::flavor(s, command).await?,
        Command::Project(command) => identity::project(s, command).await?,
        Command::User(command) => identity::user(s, command).await?,
        Command::Token(command) => identity::token(s, command).await?,
        Command::Node(command) => node::run(s, command).await?,
        Command::JoinToken(command) => join::run(s, command).await?,
        Command::Events(args) => events::events(s, &args).await?,
        Command::Whoami => status::whoami(s).await?,
        Command::Completion(_) | Command::Context(_) | Command::Login(_) | Command::Version => {}
    }
    Ok(0)
}

/// Creates an object and says so.
async fn create<K: Kind>(session: &Session, mut object: Object<K>, labels: Vec<(String, String)>) -> Result<Object<K>> {
    object.metadata.labels.extend(labels);
    // What can be seen without the server is said at once, with all fields.
    check(&object)?;
    let made = session.client.create::<K>(&session.project, &object).await;
    let made = made.map_err(|error| with_value(error, &object))?;
    session.out.done(&made, &format!("{} created", made.describe()))?;
    Ok(made)
}

/// Looks for what is wrong with a new object without asking the server, and names the object.
fn check<K: Kind>(object: &Object<K>) -> Result<()> {
    object.validate().map_err(|problem| {
        let mut error = CliError::from(problem);
        error.message = format!("{}: {}", object.describe(), error.message);
        error
    })
}

/// A refusal of a new object, with the value of the field at fault: people gave values, not fields.
fn with_value<K: Kind>(error: ClientError, sent: &Object<K>) -> CliError {
    let field = match &error {
        ClientError::Api(e) if e.code == Code::Invalid => e.field.clone().unwrap_or_default(),
        _ => return error.into(),
    };
    let mut error = CliError::from(error);
    let value = serde_json::to_value(sent).ok().and_then(|v| match v.pointer(&field)? {
        Value::String(text) if text.len() < 200 && !field.contains("password") => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    });
    if let Some(value) = value.filter(|v| !v.is_empty() && !error.message.contains(v.as_str())) {
        error.message = error.message.replacen(&field, &format!("{field} ({value})"), 1);
    }
    error
}

/// Changes some fields of an object's spec.
async fn patch_spec<K: Kind>(session: &Session, name: &str, spec: Value) -> Result<Object<K>> {
    let patch = serde_json::json!({ "spec": spec });
    match session.client.patch::<K>(&session.project, name, &patch, None).await {
        Ok(object) => Ok(object),
        Err(error) => Err(session.explain_missing::<K>(name, error).await),
    }
}

/// Does something with each name; goes on after errors and returns the first, the others are printed.
async fn each<F>(session: &Session, names: &[String], mut action: impl FnMut(String) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let mut first = None;
    for name in names {
        let Err(error) = action(name.clone()).await else { continue };
        if error.code == crate::error::BROKEN_PIPE {
            return Err(error);
        }
        if first.is_none() {
            first = Some(error);
        } else {
            session.out.error(&error);
        }
    }
    first.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{ApiError, Instance, InstanceSpec, NetworkAttachment};

    #[test]
    fn refusals_name_the_value() {
        let attachment =
            NetworkAttachment { network: "default".into(), address: "192.168.7.7".parse().ok(), ..Default::default() };
        let spec = InstanceSpec { networks: Some(vec![attachment]), ..InstanceSpec::default() };
        let web = Instance::new("web", spec);
        let refused = |field: &str, text: &str| with_value(ApiError::invalid(field, text).into(), &web).message;
        assert_eq!(
            refused("/spec/networks/0/address", "no subnet of network \"default\" can give it"),
            "/spec/networks/0/address (192.168.7.7): no subnet of network \"default\" can give it"
        );
        assert_eq!(
            refused("/spec/networks/0/network", "\"default\" is bad"),
            "/spec/networks/0/network: \"default\" is bad"
        );
        assert_eq!(refused("/spec/image", "must name an image"), "/spec/image: must name an image");
    }
}
