//! `list`, and what all lists share.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

use oblak_client::{ListOptions, WatchEvent};
use oblak_model::selector::Selector;
use oblak_model::{InstanceKind, Kind, List, Object, Revision};
use uuid::Uuid;

use crate::args::ListArgs;
use crate::error::{CliError, Result};
use crate::session::Session;
use crate::show::{Names, Show, table};

/// Pages of a list over all projects; more than a million objects are not shown.
const PAGES: usize = 2000;
/// Pause before a broken watch is begun anew.
const PAUSE: Duration = Duration::from_millis(500);

/// `list`.
pub async fn list(session: &Session, args: &ListArgs) -> Result<()> {
    if args.watch {
        return watch::<InstanceKind>(session, args.label.as_ref()).await;
    }
    if args.all_projects {
        return everywhere(session, args.label.as_ref()).await;
    }
    kind::<InstanceKind>(session, args.label.as_ref()).await
}

/// Prints everything of a kind.
pub async fn kind<K: Show>(session: &Session, label: Option<&Selector>) -> Result<()> {
    let list = session.list::<K>(label).await?;
    print(session, &list).await
}

/// Prints a list in the form that was asked for.
pub async fn print<K: Show>(session: &Session, list: &List<K>) -> Result<()> {
    if session.out.machine() {
        return session.out.list(list);
    }
    if list.items.is_empty() {
        session.out.note(&nothing::<K>(session));
        return Ok(());
    }
    session.out.data(&text(session, &list.items).await)?;
    // The table of a wide list has it in a column.
    if !session.out.wide() {
        list.items.iter().filter_map(K::trouble).for_each(|text| session.out.note(&text));
    }
    Ok(())
}

fn nothing<K: Kind>(session: &Session) -> String {
    let what = K::PLURAL.replace('-', " ");
    if K::SCOPE == oblak_model::Scope::Project {
        format!("there are no {what} in project {}", session.project)
    } else {
        format!("there are no {what}")
    }
}

async fn text<K: Show>(session: &Session, items: &[Object<K>]) -> String {
    let names = if K::NAMES { Names::load(session).await } else { Names::default() };
    table(items, &names, session.out.wide()).render(session.out.color)
}

/// Instances of all projects, with the project before the name.
async fn everywhere(session: &Session, label: Option<&Selector>) -> Result<()> {
    let list = all_projects::<InstanceKind>(session, label, "").await?;
    if session.out.machine() {
        return session.out.list(&list);
    }
    let items: Vec<_> = list.items.into_iter().map(in_project).collect();
    session.out.data(&table(&items, &Names::default(), session.out.wide()).render(session.out.color))
}

/// Puts the project before the name, for people.
fn in_project(mut object: oblak_model::Instance) -> oblak_model::Instance {
    let project = object.metadata.project.clone().unwrap_or_default();
    object.metadata.name = format!("{project}/{}", object.metadata.name);
    object
}

/// All objects of a kind in all projects; `more` is added to the query.
pub async fn all_projects<K: Kind>(session: &Session, label: Option<&Selector>, more: &str) -> Result<List<K>> {
    let mut query = vec!["limit=1000".to_string()];
    query.extend(label.map(|l| format!("label={}", encode(&l.to_string()))));
    query.extend((!more.is_empty()).then(|| more.to_string()));
    let base = format!("/v1/{}?{}", K::PLURAL, query.join("&"));
    let mut whole: List<K> = session.client.get_json(&base).await?;
    for _ in 0..PAGES {
        let Some(next) = whole.next.take() else { break };
        let page: List<K> = session.client.get_json(&format!("{base}&cursor={}", encode(&next))).await?;
        whole.items.extend(page.items);
        whole.next = page.next;
    }
    Ok(whole)
}

/// Everything but what RFC 3986 calls unreserved, escaped.
pub fn encode(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Shows a list and its changes until interrupted.
async fn watch<K: Show>(session: &Session, label: Option<&Selector>) -> Result<()> {
    let options = ListOptions { label: label.map(ToString::to_string), ..ListOptions::default() };
    let screen = std::io::stdout().is_terminal() && !session.out.machine();
    let mut shown: Option<BTreeMap<Uuid, Object<K>>> = None;
    loop {
        let list = match session.client.list_all::<K>(&session.project, &options).await {
            Ok(list) => list,
            // A server that was there before comes back.
            Err(error) if shown.is_some() && error.is_retryable() => {
                session.out.note(&format!("{error}; trying again"));
                tokio::time::sleep(PAUSE * 4).await;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let revision = list.revision;
        let items: BTreeMap<Uuid, Object<K>> = list.items.into_iter().map(|o| (o.metadata.id, o)).collect();
        let first = shown.is_none();
        let old = shown.take().unwrap_or_default();
        if screen {
            redraw(session, &items).await?;
        } else {
            // Only after a compaction: what was deleted meanwhile.
            for gone in old.values().filter(|o| !items.contains_key(&o.metadata.id)) {
                gone_line(session, gone, &gone.metadata.name)?;
            }
            let new: Vec<_> = items.values().filter(|o| old.get(&o.metadata.id) != Some(o)).cloned().collect();
            lines(session, &new, first).await?;
        }
        let mut items = items;
        follow(session, revision, &options, screen, &mut items).await?;
        shown = Some(items);
        tokio::time::sleep(PAUSE).await;
    }
}

/// One watch; comes back when it ends.
async fn follow<K: Show>(
    session: &Session,
    revision: Revision,
    options: &ListOptions,
    screen: bool,
    items: &mut BTreeMap<Uuid, Object<K>>,
) -> Result<()> {
    let Ok(mut watch) = session.client.watch::<K>(&session.project, revision, options).await else { return Ok(()) };
    // Ages grow: the screen is drawn anew now and then.
    let mut tick = tokio::time::interval(Duration::from_secs(if screen { 5 } else { 3600 }));
    tick.tick().await;
    loop {
        let event = tokio::select! {
            event = watch.next() => event,
            _ = tick.tick() => {
                if screen {
                    redraw(session, items).await?;
                }
                continue;
            }
        };
        match event {
            Ok(WatchEvent::Put(object, _)) => {
                if !screen {
                    lines(session, std::slice::from_ref(&*object), false).await?;
                }
                items.insert(object.metadata.id, *object);
            }
            Ok(WatchEvent::Delete(id, name, _)) => {
                let Some(gone) = items.remove(&id) else { continue };
                if !screen {
                    gone_line(session, &gone, &name)?;
                }
            }
            Ok(WatchEvent::Bookmark(_)) => continue,
            Err(_) => return Ok(()),
        }
        if screen {
            redraw(session, items).await?;
        }
    }
}

async fn redraw<K: Show>(session: &Session, items: &BTreeMap<Uuid, Object<K>>) -> Result<()> {
    let mut sorted: Vec<Object<K>> = items.values().cloned().collect();
    sorted.sort_by(|a, b| a.metadata.name.cmp(&b.metadata.name));
    let body = if sorted.is_empty() { nothing::<K>(session) + "\n" } else { text(session, &sorted).await };
    // ECMA-48: cursor home, erase to the end of the screen.
    session.out.data(&format!("\x1b[H\x1b[J{body}"))
}

/// Away from a terminal: one line for each change, the heading once.
async fn lines<K: Show>(session: &Session, items: &[Object<K>], heading: bool) -> Result<()> {
    if session.out.machine() {
        for object in items {
            compact(session, &serde_json::json!({"event": "put", "object": object}))?;
        }
        return Ok(());
    }
    let text = text(session, items).await;
    let body = text.split_once('\n').map_or("", |(_, body)| body);
    session.out.data(if heading { &text } else { body })
}

fn gone_line<K: Show>(session: &Session, gone: &Object<K>, name: &str) -> Result<()> {
    if session.out.machine() {
        let object = serde_json::json!({"id": gone.metadata.id, "name": name});
        return compact(session, &serde_json::json!({"event": "delete", "object": object}));
    }
    session.out.data(&format!("{}  deleted\n", gone.metadata.name))
}

/// A change as one line of JSON, or one YAML document.
pub fn compact(session: &Session, value: &serde_json::Value) -> Result<()> {
    if session.out.format == Some(crate::args::Format::Yaml) {
        let text = serde_norway::to_string(value).map_err(|e| CliError::new(e.to_string(), "try -o json"))?;
        return session.out.data(&format!("---\n{text}"));
    }
    session.out.data(&format!("{value}\n"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn queries_are_escaped() {
        assert_eq!(super::encode("tier=web,!old"), "tier%3Dweb%2C%21old");
        assert_eq!(super::encode("a-b._~1"), "a-b._~1");
    }
}
