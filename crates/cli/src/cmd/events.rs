//! `events`.

use std::collections::BTreeMap;
use std::time::Duration;

use oblak_client::{ListOptions, WatchEvent};
use oblak_model::{Event, EventKind, List, Revision, Scope};
use uuid::Uuid;

use super::list::{all_projects, compact, encode};
use crate::args::EventsArgs;
use crate::error::Result;
use crate::kinds::{self, Visit};
use crate::session::Session;
use crate::show::{Names, Show, table};

/// Pause before a broken watch is begun anew.
const PAUSE: Duration = Duration::from_secs(1);

/// `events`.
pub async fn events(session: &Session, args: &EventsArgs) -> Result<()> {
    let about = About::new(args.about.as_deref()).await?;
    let everywhere = args.all_projects || about.in_cloud;
    let list = page(session, &about, everywhere).await?;
    if session.out.machine() && !args.follow {
        return session.out.list(&list);
    }
    if list.items.is_empty() && !args.follow {
        session.out.note("nothing happened in the last 24 hours");
        return Ok(());
    }
    print(session, &list.items, true)?;
    if !args.follow {
        return Ok(());
    }
    let mut seen: BTreeMap<Uuid, u64> = list.items.iter().map(|e| (e.metadata.id, e.spec.count)).collect();
    let mut from = list.revision;
    loop {
        if !everywhere {
            follow(session, &about, from, &mut seen).await?;
        }
        tokio::time::sleep(PAUSE).await;
        // What happened while nobody watched is in the list. Those of the whole cloud are only looked up now and then.
        if let Ok(list) = page(session, &about, everywhere).await {
            from = list.revision;
            for event in &list.items {
                new(session, event, &mut seen)?;
            }
        }
    }
}

async fn page(session: &Session, about: &About, everywhere: bool) -> Result<List<EventKind>> {
    let mut list = if everywhere {
        let more: Vec<String> = about.fields.iter().map(|f| format!("field={}", encode(f))).collect();
        all_projects::<EventKind>(session, None, &more.join("&")).await?
    } else {
        session.client.list_all::<EventKind>(&session.project, &about.options()).await?
    };
    list.items.sort_by_key(|e| e.spec.last_at);
    Ok(list)
}

/// One watch; comes back when it ends.
async fn follow(session: &Session, about: &About, from: Revision, seen: &mut BTreeMap<Uuid, u64>) -> Result<()> {
    let Ok(mut watch) = session.client.watch::<EventKind>(&session.project, from, &about.options()).await else {
        return Ok(());
    };
    while let Ok(event) = watch.next().await {
        match event {
            WatchEvent::Put(event, _) => new(session, &event, seen)?,
            WatchEvent::Delete(id, ..) => drop(seen.remove(&id)),
            WatchEvent::Bookmark(_) => {}
        }
    }
    Ok(())
}

/// Prints an event unless it was printed with the same count.
fn new(session: &Session, event: &Event, seen: &mut BTreeMap<Uuid, u64>) -> Result<()> {
    if seen.insert(event.metadata.id, event.spec.count) == Some(event.spec.count) {
        return Ok(());
    }
    print(session, std::slice::from_ref(event), false)
}

fn print(session: &Session, events: &[Event], heading: bool) -> Result<()> {
    if session.out.machine() {
        for event in events {
            compact(session, &serde_json::to_value(event).unwrap_or_default())?;
        }
        return Ok(());
    }
    let text = table(events, &Names::default(), session.out.wide()).render(session.out.color);
    let body = text.split_once('\n').map_or("", |(_, body)| body);
    session.out.data(if heading { &text } else { body })
}

/// Which events are meant.
struct About {
    fields: Vec<String>,
    in_cloud: bool,
}

impl About {
    async fn new(text: Option<&str>) -> Result<Self> {
        let Some(text) = text else { return Ok(Self { fields: Vec::new(), in_cloud: false }) };
        let Some((kind, name)) = text.split_once('/') else {
            return Ok(Self { fields: vec![format!("spec.about.name={text}")], in_cloud: false });
        };
        let (kind, scope) = kinds::visit(kind, KindOf).await?;
        let fields = vec![format!("spec.about.kind={kind}"), format!("spec.about.name={name}")];
        Ok(Self { fields, in_cloud: scope != Scope::Project })
    }

    fn options(&self) -> ListOptions {
        ListOptions { fields: self.fields.clone(), ..ListOptions::default() }
    }
}

struct KindOf;

impl Visit for KindOf {
    type Out = (&'static str, Scope);
    async fn visit<K: Show>(self) -> Result<Self::Out> {
        Ok((K::KIND, K::SCOPE))
    }
}
