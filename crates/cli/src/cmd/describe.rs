//! `describe`: one object on a page, with what happened to it.

use std::fmt::Write;

use oblak_client::ListOptions;
use oblak_model::{Event, EventKind, Kind, Object};
use serde_json::Value;

use crate::args::ObjectArgs;
use crate::error::Result;
use crate::kinds::{self, Visit};
use crate::session::Session;
use crate::show::{Names, Show, labels};
use crate::table::{Table, age, now, one_line};

/// `describe`.
pub async fn describe(session: &Session, args: &ObjectArgs) -> Result<()> {
    let (kind, name) = kinds::split(&args.what, args.name.as_deref())?;
    kinds::visit(&kind, Describe { session, name }).await
}

struct Describe<'a> {
    session: &'a Session,
    name: String,
}

impl Visit for Describe<'_> {
    type Out = ();
    async fn visit<K: Show>(self) -> Result<()> {
        let session = self.session;
        let object = session.get::<K>(&self.name).await?;
        if session.out.machine() {
            return session.out.object(&object);
        }
        let names = if K::NAMES { Names::load(session).await } else { Names::default() };
        let mut text = page(&object, &names);
        let events = events(session, &object).await;
        if !events.is_empty() {
            text.push_str("\nEvents:\n");
            for line in event_table(&events).render(session.out.color).lines() {
                let _ = writeln!(text, "  {line}");
            }
        }
        session.out.data(&text)
    }
}

/// What happened to the object; nothing when this user may not see events.
async fn events<K: Kind>(session: &Session, object: &Object<K>) -> Vec<Event> {
    let field = format!("spec.about.id={}", object.metadata.id);
    let list = if object.metadata.project.is_some() {
        let options = ListOptions { fields: vec![field], ..ListOptions::default() };
        session.client.list_all::<EventKind>(&session.project, &options).await.map_err(Into::into)
    } else {
        super::list::all_projects::<EventKind>(session, None, &format!("field={}", super::list::encode(&field))).await
    };
    let mut items = list.map(|l| l.items).unwrap_or_default();
    items.sort_by_key(|e| e.spec.last_at);
    items
}

/// Events without their object, oldest first.
fn event_table(events: &[Event]) -> Table {
    let mut table = Table::new(&["AGE", "COUNT", "REASON", "SOURCE", "MESSAGE"]);
    let now = now();
    for event in events {
        let spec = &event.spec;
        table.row(vec![
            age(spec.last_at, now),
            spec.count.to_string(),
            spec.reason.clone(),
            spec.source.clone(),
            spec.message.clone(),
        ]);
    }
    table
}

fn page<K: Show>(object: &Object<K>, names: &Names) -> String {
    let meta = &object.metadata;
    let mut rows = vec![("Kind".to_string(), K::KIND.to_string()), ("Name".into(), meta.name.clone())];
    if let Some(project) = &meta.project {
        rows.push(("Project".into(), project.clone()));
    }
    rows.push(("Id".into(), meta.id.to_string()));
    rows.push(("Created".into(), format!("{} ({} ago)", meta.created_at, age(meta.created_at, now()))));
    if let Some(at) = meta.deleted_at {
        let finalizers = meta.finalizers.iter().cloned().collect::<Vec<_>>().join(", ");
        rows.push(("Deleted".into(), format!("{at}, waiting for {finalizers}")));
    }
    if !meta.labels.is_empty() {
        rows.push(("Labels".into(), labels(&meta.labels)));
    }
    let (head, wide) = K::cells(object, names);
    let titles = K::HEAD.iter().chain(K::WIDE).zip(head.into_iter().chain(wide)).skip(1);
    rows.extend(titles.filter(|(k, v)| !v.is_empty() && **k != "PROJECT").map(|(k, v)| (title(k), one_line(&v))));
    let width = rows.iter().map(|(k, _)| k.len()).max().unwrap_or(0) + 3;
    let mut text = String::new();
    for (key, value) in rows {
        let _ = writeln!(text, "{:width$}{value}", format!("{key}:"));
    }
    for (heading, value) in
        [("Spec", serde_json::to_value(&object.spec)), ("Status", serde_json::to_value(&object.status))]
    {
        let Ok(value) = value else { continue };
        let mut body = String::new();
        tree(&mut body, &value, 1);
        if !body.is_empty() {
            let _ = write!(text, "\n{heading}:\n{body}");
        }
    }
    text
}

/// `FULL NAME` and `full_name` become `Full name`.
fn title(key: &str) -> String {
    let lower = key.to_lowercase().replace('_', " ");
    let mut chars = lower.chars();
    chars.next().map(|c| c.to_uppercase().collect::<String>() + chars.as_str()).unwrap_or_default()
}

/// Values as an indented tree; what is empty is left out.
fn tree(out: &mut String, value: &Value, depth: usize) {
    let pad = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (key, value) in map.iter().filter(|(_, v)| !is_empty(v)) {
                match plain(key, value) {
                    Some(text) => {
                        let _ = writeln!(out, "{pad}{}: {text}", title(key));
                    }
                    None => {
                        let _ = writeln!(out, "{pad}{}:", title(key));
                        tree(out, value, depth + 1);
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                if let Some(text) = plain("", item) {
                    let _ = writeln!(out, "{pad}- {text}");
                    continue;
                }
                let mut inner = String::new();
                tree(&mut inner, item, depth + 1);
                let rest = inner.strip_prefix(&format!("{pad}  ")).unwrap_or(&inner);
                let _ = write!(out, "{pad}- {rest}");
            }
        }
        other => {
            let _ = writeln!(out, "{pad}{}", plain("", other).unwrap_or_default());
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(is_empty),
        _ => false,
    }
}

/// Fields that hold a number of bytes.
const SIZES: &[&str] = &["memory", "disk", "size", "virtual_size", "used", "free", "min_memory"];

/// A value that fits on a line.
fn plain(key: &str, value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::Bool(b) => Some(if *b { "yes" } else { "no" }.into()),
        Value::Number(n) => match n.as_u64().filter(|_| SIZES.contains(&key)) {
            Some(bytes) => Some(oblak_model::Size(bytes).to_string()),
            None => Some(n.to_string()),
        },
        Value::String(text) => Some(one_line(text)),
        Value::Array(items) => {
            let short: Option<Vec<String>> =
                items.iter().map(|i| plain("", i).filter(|_| !i.is_array() && !i.is_object())).collect();
            short.filter(|s| s.iter().map(String::len).sum::<usize>() < 80).map(|s| s.join(", "))
        }
        Value::Object(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::{Size, VolumeSpec};

    #[test]
    fn pages() {
        let mut volume = oblak_model::Volume::new("data", VolumeSpec { size: Size::gib(1), ..VolumeSpec::default() });
        volume.metadata.project = Some("default".into());
        volume.metadata.labels.insert("tier".into(), "db".into());
        volume.status.message = "waits for its first use".into();
        let text = page(&volume, &Names::default());
        let body: Vec<&str> = text.lines().filter(|l| !l.starts_with("Created") && !l.starts_with("Id")).collect();
        assert_eq!(
            body,
            [
                "Kind:     volume",
                "Name:     data",
                "Project:  default",
                "Labels:   tier=db",
                "Size:     1 GiB",
                "State:    pending",
                "Format:   qcow2",
                "Message:  waits for its first use",
                "",
                "Spec:",
                "  Format: qcow2",
                "  Size: 1 GiB",
                "",
                "Status:",
                "  Message: waits for its first use",
                "  Observed generation: 0",
                "  Phase: pending",
                "  Size: 0 B",
                "  Used: 0 B",
            ]
        );
    }

    #[test]
    fn trees() {
        let mut out = String::new();
        let value = serde_json::json!({
            "rules": [{"port_min": 80, "protocol": "tcp"}, {"cidr": "10.0.0.0/8"}],
            "memory": 1_073_741_824_u64, "names": ["a", "b"], "nothing": {"deep": []}, "on": true
        });
        tree(&mut out, &value, 0);
        assert_eq!(
            out,
            "Memory: 1 GiB\nNames: a, b\nOn: yes\nRules:\n  - Port min: 80\n    Protocol: tcp\n  - Cidr: 10.0.0.0/8\n"
        );
    }
}
