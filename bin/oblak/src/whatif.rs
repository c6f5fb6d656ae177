//! `oblak whatif ...` and `oblak cluster balance`: questions about the live cloud, answered here on a copy of its state.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

use oblak_api::ApiConfig;
use oblak_cli::{CliError, Global, Out, Session, Table};
use oblak_client::{Client, ListOptions};
use oblak_control::lifecycle::{build_world, request};
use oblak_model::{
    ApiError, Code, ImageKind, Instance, InstanceId, InstanceKind, Kind, Node, NodeId, NodeKind, NodePhase, Object,
    PortKind, ProjectKind, VolumeKind,
};
use oblak_platform::random::uuid7;
use oblak_scheduler as s;
use oblak_sim::whatif::{Answer, Fate, LiveState, Outcome, Question, ask};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::args::{BalanceArgs, NodeAddArgs, WhatifCommand};

/// Exit code: something fits on no node.
const DOES_NOT_FIT: u8 = 4;

type Result<T> = std::result::Result<T, CliError>;

/// `oblak whatif ...`
pub fn whatif(command: &WhatifCommand, global: &Global) -> ExitCode {
    oblak_cli::with_session(
        global,
        async |session| read(session).await,
        |out, state| {
            let question = match command {
                WhatifCommand::NodeDown(args) => Question::NodesDown(named(&state, &args.nodes)?),
                WhatifCommand::NodeAdd(args) => Question::NodesAdded(more(&state, args)?),
            };
            let lease = ApiConfig::new(([127, 0, 0, 1], 0).into(), ".").node_lease;
            let answer = ask(&state, &question, lease)
                .map_err(|e| CliError::new(e.to_string(), "this is a defect of oblak; please report it"))?;
            print(out, &question, &answer)?;
            Ok(if answer.count(Outcome::DoesNotFit) > 0 { DOES_NOT_FIT } else { 0 })
        },
    )
}

/// Everything that a placement looks at. Read kind after kind, so what changes meanwhile may be seen half.
async fn read(session: &Session) -> Result<LiveState> {
    let client = &session.client;
    let nodes = list::<NodeKind>(client, "").await?;
    let mut state = LiveState { at: oblak_platform::clock::system().now(), nodes, ..LiveState::default() };
    for project in list::<ProjectKind>(client, "").await? {
        let name = project.metadata.name.as_str();
        state.images.extend(list::<ImageKind>(client, name).await?);
        state.volumes.extend(list::<VolumeKind>(client, name).await?);
        state.ports.extend(list::<PortKind>(client, name).await?);
        state.instances.extend(list::<InstanceKind>(client, name).await?);
    }
    Ok(state)
}

async fn list<K: Kind>(client: &Client, project: &str) -> Result<Vec<Object<K>>> {
    Ok(client.list_all::<K>(project, &ListOptions::default()).await?.items)
}

fn node<'a>(state: &'a LiveState, name: &str) -> Result<&'a Node> {
    let found = state.nodes.iter().find(|n| n.metadata.name == name || n.metadata.id.to_string() == name);
    found.ok_or_else(|| {
        let mut error = CliError::from(ApiError::not_found("node", name));
        error.hint = "`oblak node list` shows those there are".into();
        error
    })
}

fn named(state: &LiveState, names: &[String]) -> Result<BTreeSet<NodeId>> {
    names.iter().map(|name| node(state, name).map(|node| NodeId(node.metadata.id))).collect()
}

/// Nodes like the one named, empty and ready.
fn more(state: &LiveState, args: &NodeAddArgs) -> Result<Vec<Node>> {
    let like = node(state, &args.like)?;
    let taken: BTreeSet<&str> = state.nodes.iter().map(|n| n.metadata.name.as_str()).collect();
    let names = (1u32..).map(|n| format!("new-{n}")).filter(|name| !taken.contains(name.as_str()));
    let random = oblak_platform::random::system();
    let fresh = |name: String| {
        let mut node = like.clone();
        node.metadata.id = uuid7(random.as_ref(), state.at);
        node.metadata.name = name;
        node.metadata.deleted_at = None;
        node.spec.schedulable = true;
        node.status.phase = NodePhase::Ready;
        node
    };
    Ok(names.take(usize::from(args.count)).map(fresh).collect())
}

fn print(out: &Out, question: &Question, answer: &Answer) -> Result<()> {
    if out.machine() {
        return out.value(answer);
    }
    let mut table = Table::new(&["INSTANCE", "PROJECT", "ISOLATION", "FROM", "TO", "AFTER", "WHY"]);
    for fate in &answer.instances {
        let Fate { instance, project, isolation, from, to, why, .. } = fate;
        let to = match fate.outcome {
            Outcome::DoesNotFit => "nowhere".into(),
            _ => to.clone().unwrap_or_default(),
        };
        let after = fate.seconds.map(|s| format!("{s:.1} s")).unwrap_or_default();
        table.row(vec![
            instance.clone(),
            project.clone(),
            isolation.to_string(),
            from.clone().unwrap_or_default(),
            to,
            after,
            why.clone(),
        ]);
    }
    if !table.is_empty() {
        out.data(&table.render(out.color))?;
    }
    out.note(&summary(question, answer));
    Ok(())
}

fn summary(question: &Question, answer: &Answer) -> String {
    let (unfit, seconds) = (answer.count(Outcome::DoesNotFit), answer.seconds);
    match question {
        Question::NodesDown(_) => format!(
            "{} would run elsewhere after at most {seconds:.1} s, {unfit} would fit nowhere, if all of them were evacuated when the nodes are noticed to be down; nothing was changed",
            answer.count(Outcome::Moves)
        ),
        Question::NodesAdded(nodes) => format!(
            "with {} more: {} that wait would run, {unfit} would still fit nowhere; nothing was changed",
            match nodes.len() {
                1 => "one node".to_string(),
                n => format!("{n} nodes"),
            },
            answer.count(Outcome::Placed)
        ),
    }
}

/// `oblak cluster balance`
pub fn balance(args: &BalanceArgs, global: &Global) -> ExitCode {
    let plan = args.plan;
    oblak_cli::with_session(
        global,
        async |session| {
            if !plan {
                let text = "this moves nothing by itself; `oblak cluster balance --plan` says which moves would help, `oblak migrate` makes them";
                return Err(CliError::from(ApiError::new(Code::Unsupported, text)));
            }
            read(session).await
        },
        |out, state| {
            let advice = advise(&state, usize::from(args.moves));
            print_advice(out, &state, &advice)?;
            Ok(0)
        },
    )
}

fn advise(state: &LiveState, most: usize) -> s::Advice {
    let world = build_world(&state.nodes, &state.instances, &state.volumes, &state.images);
    let placed = state.instances.iter().filter(|i| i.status.placement.is_some() && !i.metadata.is_deleting());
    let requests: Vec<s::Request> = placed
        .map(|instance| {
            let attached = &instance.status.resolved.volumes;
            let volumes: Vec<_> =
                state.volumes.iter().filter(|v| attached.iter().any(|id| id.0 == v.metadata.id)).cloned().collect();
            request(instance, &volumes, s::Strategy::Spread)
        })
        .collect();
    s::balance(&world, &requests, most)
}

fn print_advice(out: &Out, state: &LiveState, advice: &s::Advice) -> Result<()> {
    let by_id: BTreeMap<InstanceId, &Instance> =
        state.instances.iter().map(|i| (InstanceId(i.metadata.id), i)).collect();
    let percent = |ppm: u32| f64::from(ppm) / 10_000.0;
    let moves: Vec<(&Instance, &s::Move)> = advice
        .moves
        .iter()
        .filter_map(|step| Some((*by_id.get(&InstanceId(Uuid::from_u128(step.instance.0)))?, step)))
        .collect();
    if out.machine() {
        let used = |of: Option<(u32, u32)>| {
            of.map_or(
                Value::Null,
                |(most, least)| json!({"fullest_percent": percent(most), "emptiest_percent": percent(least)}),
            )
        };
        let moves: Vec<Value> = moves
            .iter()
            .map(|(instance, step)| {
                json!({
                    "project": instance.scope_key(), "instance": instance.metadata.name, "id": instance.metadata.id,
                    "from": step.from_name, "to": step.to_name,
                    "gain_percent": percent(step.gain_ppm()), "reason": step.to_string(),
                })
            })
            .collect();
        return out.value(&json!({"moves": moves, "before": used(advice.before), "after": used(advice.after)}));
    }
    let mut table = Table::new(&["INSTANCE", "PROJECT", "FROM", "TO", "GAIN", "REASON"]);
    for (instance, step) in &moves {
        table.row(vec![
            instance.metadata.name.clone(),
            instance.scope_key().into(),
            step.from_name.to_string(),
            step.to_name.to_string(),
            format!("{:.1} %", percent(step.gain_ppm())),
            step.to_string(),
        ]);
    }
    if !table.is_empty() {
        out.data(&table.render(out.color))?;
    }
    out.note(&match (advice.before, advice.after) {
        (Some(before), Some(after)) if !moves.is_empty() => format!(
            "the fullest node would use {:.1} % instead of {:.1} %, the emptiest {:.1} % instead of {:.1} %; nothing was changed",
            percent(after.0),
            percent(before.0),
            percent(after.1),
            percent(before.1)
        ),
        _ => "no move would make the nodes clearly more even".into(),
    });
    Ok(())
}
