//! `network`, `subnet`, `security-group`.

use oblak_model::{
    Network, NetworkKind, NetworkSpec, SecurityGroup, SecurityGroupKind, SecurityGroupSpec, SecurityRule, Subnet,
    SubnetKind, SubnetSpec,
};

use super::object::{AT_ONCE, delete_all};
use super::{check, create, list};
use crate::args::{
    NetworkCommand, NetworkCreateArgs, RuleAddArgs, RuleCommand, SecurityGroupCommand, SubnetCommand, SubnetCreateArgs,
};
use crate::error::{CliError, NOT_FOUND, Result};
use crate::session::Session;
use crate::show::word;
use crate::table::Table;

/// `network ...`
pub async fn network(session: &Session, command: NetworkCommand) -> Result<()> {
    match command {
        NetworkCommand::Create(args) => make(session, args).await,
        NetworkCommand::List(args) => list::kind::<NetworkKind>(session, args.label.as_ref()).await,
        NetworkCommand::Delete(args) => delete_all::<NetworkKind>(session, &args.names, AT_ONCE).await,
    }
}

async fn make(session: &Session, args: NetworkCreateArgs) -> Result<()> {
    // The range is read first: a network without its subnet would be half of what was asked for.
    let subnet = args.cidr.as_deref().map(|cidr| subnet_spec(&args.name, cidr)).transpose()?;
    if let Some(spec) = &subnet {
        check(&Subnet::new(&args.name, spec.clone()))?;
    }
    let spec = NetworkSpec { mtu: args.mtu, nat: !args.no_nat, dns_forwarders: args.dns };
    let network = create::<NetworkKind>(session, Network::new(&args.name, spec), args.labels.labels).await?;
    if let Some(spec) = subnet {
        let made = session.client.create::<SubnetKind>(&session.project, &Subnet::new(&args.name, spec)).await;
        match made {
            Ok(made) => session.out.note(&format!("{} created", made.describe())),
            Err(error) => {
                let _ = session.client.delete::<NetworkKind>(&session.project, &network.metadata.name).await;
                return Err(error.into());
            }
        }
    }
    Ok(())
}

fn subnet_spec(network: &str, cidr: &str) -> Result<SubnetSpec> {
    let cidr = cidr
        .parse()
        .map_err(|_| CliError::usage(format!("{cidr:?} is not an address range"), "write for example 10.90.0.0/24"))?;
    Ok(SubnetSpec::new(network, cidr))
}

/// `subnet ...`
pub async fn subnet(session: &Session, command: SubnetCommand) -> Result<()> {
    match command {
        SubnetCommand::Create(args) => make_subnet(session, args).await,
        SubnetCommand::List(args) => list::kind::<SubnetKind>(session, args.label.as_ref()).await,
        SubnetCommand::Delete(args) => delete_all::<SubnetKind>(session, &args.names, AT_ONCE).await,
    }
}

async fn make_subnet(session: &Session, args: SubnetCreateArgs) -> Result<()> {
    let mut spec = subnet_spec(&args.network, &args.cidr)?;
    spec.gateway = args.gateway;
    if let Some(pool) = &args.pool {
        let parsed = pool.split_once('-').and_then(|(a, b)| Some((a.trim().parse().ok()?, b.trim().parse().ok()?)));
        let bad = || {
            CliError::usage(
                format!("{pool:?} is not a pool"),
                "write it as FIRST-LAST, for example 10.90.0.10-10.90.0.99",
            )
        };
        spec.pool = Some(parsed.ok_or_else(bad)?);
    }
    if let Some(lease) = args.lease {
        spec.lease = lease;
    }
    create::<SubnetKind>(session, Subnet::new(&args.name, spec), args.labels.labels).await.map(drop)
}

/// `security-group ...`
pub async fn security_group(session: &Session, command: SecurityGroupCommand) -> Result<()> {
    match command {
        SecurityGroupCommand::Create(args) => {
            let group = SecurityGroup::new(&args.name, SecurityGroupSpec::default());
            create::<SecurityGroupKind>(session, group, args.labels.labels).await.map(drop)
        }
        SecurityGroupCommand::List(args) => list::kind::<SecurityGroupKind>(session, args.label.as_ref()).await,
        SecurityGroupCommand::Delete(args) => delete_all::<SecurityGroupKind>(session, &args.names, AT_ONCE).await,
        SecurityGroupCommand::Rule(RuleCommand::Add(args)) => add(session, &args).await,
        SecurityGroupCommand::Rule(RuleCommand::List { group }) => rules(session, &group).await,
        SecurityGroupCommand::Rule(RuleCommand::Remove { group, number }) => take(session, &group, number).await,
    }
}

fn rule(args: &RuleAddArgs) -> Result<SecurityRule> {
    let (port_min, port_max) = match args.port.as_deref() {
        None => (None, None),
        Some(text) => {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let number = |t: &str| {
                let bad =
                    || CliError::usage(format!("{text:?} is not a port or range"), "write for example 80 or 8000-8100");
                t.trim().parse::<u16>().map_err(|_| bad())
            };
            (Some(number(first)?), (first != last).then(|| number(last)).transpose()?)
        }
    };
    let cidr = match &args.cidr {
        None => None,
        Some(text) => Some(subnet_spec("", text)?.cidr),
    };
    Ok(SecurityRule {
        direction: args.direction.into(),
        protocol: args.protocol.map(Into::into),
        port_min,
        port_max,
        cidr,
        group: args.group_ref.clone(),
    })
}

async fn edit(
    session: &Session,
    name: &str,
    change: impl FnMut(&mut SecurityGroup) -> oblak_client::Result<()>,
) -> Result<SecurityGroup> {
    match session.client.update::<SecurityGroupKind>(&session.project, name, change).await {
        Ok(group) => Ok(group),
        Err(error) => Err(session.explain_missing::<SecurityGroupKind>(name, error).await),
    }
}

async fn add(session: &Session, args: &RuleAddArgs) -> Result<()> {
    let rule = rule(args)?;
    let mut known = false;
    let group = edit(session, &args.group, |group| {
        known = group.spec.rules.contains(&rule);
        if !known {
            group.spec.rules.push(rule.clone());
        }
        Ok(())
    })
    .await?;
    let text = if known { "allows that already" } else { "changed" };
    session.out.done(&group, &format!("{} {text}: {}", group.describe(), sentence(&rule)))
}

async fn take(session: &Session, name: &str, number: usize) -> Result<()> {
    let mut taken = None;
    let group = edit(session, name, |group| {
        taken = number.checked_sub(1).filter(|i| *i < group.spec.rules.len()).map(|i| group.spec.rules.remove(i));
        Ok(())
    })
    .await?;
    match taken {
        Some(rule) => session.out.done(&group, &format!("{} no longer has: {}", group.describe(), sentence(&rule))),
        None => Err(CliError::new(
            format!("{} has no rule {number}", group.describe()),
            format!("`oblak security-group rule list {name}` shows the numbers"),
        )
        .with_code(NOT_FOUND)),
    }
}

async fn rules(session: &Session, name: &str) -> Result<()> {
    let group = session.get::<SecurityGroupKind>(name).await?;
    if session.out.machine() {
        return session.out.value(&group.spec.rules);
    }
    let mut table = Table::new(&["NUMBER", "DIRECTION", "PROTOCOL", "PORTS", "PEERS"]);
    for (i, rule) in group.spec.rules.iter().enumerate() {
        let protocol = rule.protocol.map_or_else(|| "any".into(), word);
        table.row(vec![(i + 1).to_string(), word(rule.direction), protocol, ports(rule), peers(rule)]);
    }
    if table.is_empty() {
        session.out.note(&format!("{} has no rules: everything may go out, nothing in", group.describe()));
        return Ok(());
    }
    session.out.data(&table.render(session.out.color))
}

fn ports(rule: &SecurityRule) -> String {
    match (rule.port_min, rule.port_max) {
        (Some(a), Some(b)) if a != b => format!("{a}-{b}"),
        (Some(a), _) => a.to_string(),
        _ => "all".into(),
    }
}

fn peers(rule: &SecurityRule) -> String {
    let group = rule.group.as_ref().map(|g| format!("security-group/{g}"));
    group.or_else(|| rule.cidr.map(|c| c.to_string())).unwrap_or_else(|| "everyone".into())
}

fn sentence(rule: &SecurityRule) -> String {
    let protocol = rule.protocol.map_or_else(|| "anything".into(), word);
    let ports = if rule.port_min.is_some() { format!(" port {}", ports(rule)) } else { String::new() };
    let way = if rule.direction == oblak_model::Direction::Ingress { "in from" } else { "out to" };
    format!("{protocol}{ports} {way} {}", peers(rule))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{DirectionWord, ProtocolWord};

    fn args(port: Option<&str>, cidr: Option<&str>) -> RuleAddArgs {
        RuleAddArgs {
            group: "web".into(),
            direction: DirectionWord::Ingress,
            protocol: Some(ProtocolWord::Tcp),
            port: port.map(Into::into),
            cidr: cidr.map(Into::into),
            group_ref: None,
        }
    }

    #[test]
    fn rules_from_words() {
        let one = rule(&args(Some("80"), Some("10.0.0.0/8"))).unwrap();
        assert_eq!((one.port_min, one.port_max), (Some(80), None));
        assert_eq!(sentence(&one), "tcp port 80 in from 10.0.0.0/8");
        let many = rule(&args(Some("8000-8100"), None)).unwrap();
        assert_eq!((many.port_min, many.port_max), (Some(8000), Some(8100)));
        assert_eq!(sentence(&many), "tcp port 8000-8100 in from everyone");
        assert!(rule(&args(Some("80-x"), None)).is_err());
        assert!(rule(&args(None, Some("10.0.0.0/99"))).is_err());
    }
}
