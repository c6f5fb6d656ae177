//! Lists: pages in the order of names, filtered by labels and fields, straight from the cache.

use std::sync::{Arc, Mutex, PoisonError};

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::Response;
use base64::Engine;
use bytes::Bytes;
use oblak_identity::{Action, Principal, Target};
use oblak_model::meta::Metadata;
use oblak_model::selector::Selector;
use oblak_model::{ApiError, Code, EventKind, Kind, Object, Revision};
use oblak_store::objects;
use oblak_store::{Key, Prefix};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Params, watch};
use crate::auth::Caller;
use crate::docs::{self, Item};
use crate::error::{Answer, store_error};
use crate::kinds::{Access, Resource, allow};
use crate::middleware::{REVISION, plain_value};
use crate::request::Query;
use crate::state::App;

const KNOWN: &[&str] = &["limit", "cursor", "label", "field", "watch", "from"];
/// Filters on fields in one request.
const FIELD_FILTERS: usize = 16;
/// Objects taken from the cache at once, so that its lock is held shortly.
const CHUNK: usize = 512;

pub(super) async fn list<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    Path(params): Params,
    query: Query,
    headers: HeaderMap,
) -> Answer {
    let project = params.project().filter(|_| K::ACCESS == Access::InProject);
    match K::ACCESS {
        Access::Owned | Access::Project => {
            caller.principal.user()?;
        }
        _ => allow::<K>(&app, &caller, Action::Read, project, None)?,
    }
    let filter = Filter::new::<K>(&query, Only::personal::<K>(&caller.principal))?;
    answer::<K>(&app, filter, Some(docs::scope_of::<K>(project)), &query, &headers).await
}

/// Objects of all projects.
pub(super) async fn everywhere<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    headers: HeaderMap,
) -> Answer {
    caller.check(Action::Read, &Target::Operations)?;
    answer::<K>(&app, Filter::new::<K>(&query, None)?, None, &query, &headers).await
}

/// What projects offer to everybody.
pub(super) async fn offered<K: Resource>(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    headers: HeaderMap,
) -> Answer {
    caller.check(Action::Read, &Target::Catalog)?;
    answer::<K>(&app, Filter::new::<K>(&query, Some(Only::Offered))?, None, &query, &headers).await
}

async fn answer<K: Resource>(
    app: &App,
    filter: Filter,
    scope: Option<&str>,
    query: &Query,
    headers: &HeaderMap,
) -> Answer {
    query.only(KNOWN)?;
    if query.flag("watch")? {
        return watch::watch::<K>(app, scope, filter, query, headers).await;
    }
    if query.get("from")?.is_some() {
        return Err(ApiError::new(Code::Malformed, "from goes with watch=true").into());
    }
    let limits = &app.config.limits;
    let limit = query.parsed::<usize>("limit", "a number from 1 to 1000")?.unwrap_or(limits.page_items_default);
    if limit == 0 || limit > limits.page_items {
        return Err(ApiError::new(Code::Malformed, format!("limit must be 1 to {}", limits.page_items)).into());
    }
    let after = query.get("cursor")?.map(|text| cursor::<K>(text, scope)).transpose()?;
    let plain = filter.is_plain() && !K::DECORATED;
    let name =
        plain.then(|| format!("{}/{}/{limit}/{}", K::KIND, scope.unwrap_or("*"), after.as_deref().unwrap_or("")));
    if let Some((revision, body)) = name.as_ref().and_then(|name| app.pages.get(name, app.docs.revision())) {
        return Ok(respond(body, revision));
    }
    let (body, revision) = page::<K>(app, scope, limit, after.as_deref(), &filter)?;
    let body = Bytes::from(body);
    if let Some(name) = name {
        app.pages.put(name, revision, body.clone());
    }
    Ok(respond(body, revision))
}

fn respond(body: Bytes, revision: Revision) -> Response {
    let mut response = Response::new(Body::from(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(REVISION, plain_value(format_args!("{revision}")));
    response
}

fn page<K: Resource>(
    app: &App,
    scope: Option<&str>,
    limit: usize,
    after: Option<&str>,
    filter: &Filter,
) -> Result<(Vec<u8>, Revision), ApiError> {
    let mut walk = Walk::<K>::new(app, scope, after)?;
    let mut body = Vec::with_capacity(4096);
    body.extend_from_slice(b"{\"items\":[");
    let (mut count, mut next, mut last) = (0, None, None);
    'pages: while let Some(chunk) = walk.next_chunk() {
        for (position, item) in chunk {
            let value = filter.value::<K>(app, &item)?;
            if !filter.matches::<K>(&item, value.as_ref())? {
                continue;
            }
            if count == limit {
                next = last.take();
                break 'pages;
            }
            if count > 0 {
                body.push(b',');
            }
            match value.filter(|_| K::DECORATED) {
                Some(value) => {
                    serde_json::to_writer(&mut body, &value).map_err(|e| ApiError::internal(e.to_string()))?;
                }
                None => docs::write_json(&item, &mut body),
            }
            count += 1;
            last = Some(position);
        }
    }
    let revision = walk.revision;
    let next = next.map_or_else(
        || "null".into(),
        |position: Key| format!("\"{}\"", Cursor::encode::<K>(scope, position.as_str())),
    );
    body.extend_from_slice(format!("],\"revision\":\"{revision}\",\"next\":{next}}}").as_bytes());
    Ok((body, revision))
}

/// Goes through the objects of a kind in the order of names (events, which have none, in the order of time).
struct Walk<'a, K> {
    app: &'a App,
    prefix: Prefix,
    named: bool,
    after: Option<Key>,
    /// Of the first chunk: whoever watches from here misses nothing that the later ones did not show.
    revision: Revision,
    done: bool,
    kind: std::marker::PhantomData<K>,
}

impl<'a, K: Resource> Walk<'a, K> {
    fn new(app: &'a App, scope: Option<&str>, after: Option<&str>) -> Result<Self, ApiError> {
        let named = K::KIND != EventKind::KIND;
        let prefix = if named {
            let text = scope.map_or_else(|| format!("/name/{}", K::KIND), |s| format!("/name/{}/{s}", K::KIND));
            Prefix::new(&text).map_err(|e| store_error(&e))?
        } else {
            objects::object_prefix::<K>(scope)
        };
        let bad = |_| ApiError::new(Code::Malformed, "the cursor is not one of ours; start from the first page");
        let after = after.map(|text| Key::new(text.to_string())).transpose().map_err(bad)?;
        if after.as_ref().is_some_and(|key| !prefix.contains(key)) {
            return Err(ApiError::new(
                Code::Malformed,
                "the cursor belongs to another list; start from the first page",
            ));
        }
        Ok(Self { app, prefix, named, after, revision: Revision::ZERO, done: false, kind: std::marker::PhantomData })
    }

    fn next_chunk(&mut self) -> Option<Vec<(Key, Arc<Item>)>> {
        if self.done {
            return None;
        }
        let (chunk, last, revision) = self.app.docs.view(|view| {
            let range: Vec<_> = view.range(&self.prefix, self.after.as_ref()).take(CHUNK).collect();
            let last = range.last().map(|item| item.key.clone());
            let full = range.len() == CHUNK;
            let chunk: Vec<_> = range
                .into_iter()
                .filter_map(|item| {
                    if !self.named {
                        return Some((item.key.clone(), Arc::clone(item)));
                    }
                    let scope = item.key.segments().nth(2)?;
                    let object = view.get(&objects::object_key::<K>(scope, docs::named_id(item)?))?;
                    Some((item.key.clone(), Arc::clone(object)))
                })
                .collect();
            (chunk, last.filter(|_| full), view.revision())
        });
        if self.revision == Revision::ZERO {
            self.revision = revision;
        }
        self.done = last.is_none();
        self.after = last;
        Some(chunk)
    }
}

/// The key after which the page begins that a cursor stands for.
pub(crate) fn cursor<K: Kind>(text: &str, scope: Option<&str>) -> Result<String, ApiError> {
    Cursor::decode::<K>(text, scope)
}

/// Where a page ended. Opaque to callers.
#[derive(Serialize, Deserialize)]
struct Cursor {
    kind: String,
    scope: Option<String>,
    after: String,
}

impl Cursor {
    fn encode<K: Kind>(scope: Option<&str>, after: &str) -> String {
        let cursor = Self { kind: K::KIND.into(), scope: scope.map(String::from), after: after.into() };
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(serde_json::to_vec(&cursor).unwrap_or_default())
    }

    fn decode<K: Kind>(text: &str, scope: Option<&str>) -> Result<String, ApiError> {
        let bad = || ApiError::new(Code::Malformed, "the cursor is not one of ours; start from the first page");
        let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).map_err(|_| bad())?;
        let cursor: Self = serde_json::from_slice(&bytes).map_err(|_| bad())?;
        if cursor.kind != K::KIND || cursor.scope.as_deref() != scope {
            return Err(ApiError::new(
                Code::Malformed,
                "the cursor belongs to another list; start from the first page",
            ));
        }
        Ok(cursor.after)
    }
}

/// `status.phase=running`: a path of names and indexes with dots, and the text that the value there must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FieldFilter {
    path: Vec<String>,
    equal: bool,
    value: String,
}

impl FieldFilter {
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let bad = || {
            let short: String = text.chars().take(64).collect();
            ApiError::new(
                Code::Malformed,
                format!("field filter {short:?} must look like status.phase=running or status.phase!=running"),
            )
        };
        let (path, equal, value) = match (text.split_once("!="), text.split_once('=')) {
            (Some((path, value)), Some((plain, _))) if path.len() < plain.len() => (path, false, value),
            (_, Some((path, value))) => (path, true, value),
            _ => return Err(bad()),
        };
        let path: Vec<String> = path.split('.').map(String::from).collect();
        let plain =
            |s: &String| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        if !path.iter().all(plain) || !matches!(path[0].as_str(), "metadata" | "spec" | "status") || path.len() > 16 {
            return Err(bad());
        }
        Ok(Self { path, equal, value: value.into() })
    }

    /// A value that is absent counts as empty text; a list matches when one of its plain elements does.
    pub fn matches(&self, object: &Value) -> bool {
        let found = self.path.iter().try_fold(object, |value, segment| match value {
            Value::Array(items) => items.get(segment.parse::<usize>().ok()?),
            other => other.get(segment),
        });
        let same = |value: &Value| match value {
            Value::String(text) => *text == self.value,
            Value::Null => self.value.is_empty(),
            Value::Bool(on) => self.value == if *on { "true" } else { "false" },
            Value::Number(number) => *number.to_string() == *self.value,
            _ => false,
        };
        let equal = match found {
            None => self.value.is_empty(),
            Some(Value::Array(items)) => items.iter().any(same),
            Some(value) => same(value),
        };
        equal == self.equal
    }
}

/// What a list or watch shows.
#[derive(Clone, Debug)]
pub(crate) struct Filter {
    labels: Selector,
    fields: Vec<FieldFilter>,
    only: Option<Only>,
}

/// What the caller may see of a list.
#[derive(Clone, Debug)]
enum Only {
    /// What belongs to this user.
    Of(String),
    /// What is offered to everybody.
    Offered,
}

impl Only {
    fn personal<K: Resource>(principal: &Principal) -> Option<Self> {
        let personal = matches!(K::ACCESS, Access::Owned | Access::Project);
        let user = principal.user().ok().filter(|user| personal && !user.cloud_admin)?;
        Some(Self::Of(user.name.clone()))
    }

    fn shows<K: Resource>(&self, item: &Item) -> Result<bool, ApiError> {
        match self {
            Self::Of(user) => belongs_to::<K>(item, user),
            Self::Offered => docs::object::<K>(item).map(|o| K::offered(&o)).map_err(|e| store_error(&e)),
        }
    }
}

#[derive(Deserialize)]
struct OnlyMeta {
    metadata: Metadata,
}

impl Filter {
    fn new<K: Resource>(query: &Query, only: Option<Only>) -> Result<Self, ApiError> {
        let mut labels = Selector::default();
        for text in query.all("label") {
            let more: Selector = text.parse().map_err(|e| ApiError::new(Code::Malformed, format!("label: {e}")))?;
            labels.0.extend(more.0);
        }
        let fields: Vec<_> = query.all("field").map(FieldFilter::parse).collect::<Result<_, _>>()?;
        if fields.len() > FIELD_FILTERS || labels.0.len() > Selector::LIMIT {
            return Err(ApiError::new(Code::Malformed, format!("at most {FIELD_FILTERS} filters may be given")));
        }
        Ok(Self { labels, fields, only })
    }

    fn is_plain(&self) -> bool {
        self.labels.0.is_empty() && self.fields.is_empty() && self.only.is_none()
    }

    /// Whether some of what the list goes through is not for the caller's eyes.
    pub fn hides(&self) -> bool {
        self.only.is_some()
    }

    /// The object as JSON, where something has to look into it.
    pub fn value<K: Resource>(&self, app: &App, item: &Item) -> Result<Option<Value>, ApiError> {
        let internal = |e: serde_json::Error| ApiError::internal(format!("{}: {e}", item.key));
        if K::DECORATED {
            let mut object: Object<K> = docs::object(item).map_err(|e| store_error(&e))?;
            K::decorate(app, &mut object);
            return serde_json::to_value(&object).map(Some).map_err(internal);
        }
        if self.fields.is_empty() {
            return Ok(None);
        }
        serde_json::from_slice(&docs::json(item)).map(Some).map_err(internal)
    }

    /// Whether an object is shown; `value` is what [`Filter::value`] answered.
    pub fn matches<K: Resource>(&self, item: &Item, value: Option<&Value>) -> Result<bool, ApiError> {
        if self.is_plain() {
            return Ok(true);
        }
        if let Some(only) = &self.only
            && !only.shows::<K>(item)?
        {
            return Ok(false);
        }
        if !self.labels.0.is_empty() {
            let raw = item.raw.get(1..).unwrap_or_default();
            let head: OnlyMeta =
                serde_json::from_slice(raw).map_err(|e| ApiError::internal(format!("{}: {e}", item.key)))?;
            if !self.labels.matches(&head.metadata.labels) {
                return Ok(false);
            }
        }
        Ok(value.is_none_or(|value| self.fields.iter().all(|field| field.matches(value))))
    }
}

fn belongs_to<K: Resource>(item: &Item, user: &str) -> Result<bool, ApiError> {
    if K::ACCESS == Access::Project {
        let project: oblak_model::Project = docs::object(item).map_err(|e| store_error(&e))?;
        return Ok(project.spec.grants.iter().any(|grant| grant.user == user));
    }
    let object: Object<K> = docs::object(item).map_err(|e| store_error(&e))?;
    Ok(K::owner(&object) == user)
}

/// Bodies of plain pages, used again while nothing at all has changed. Bounded by number and bytes.
#[derive(Default)]
pub(crate) struct PageCache(Mutex<Vec<CachedPage>>);

struct CachedPage {
    name: String,
    revision: Revision,
    body: Bytes,
}

const CACHED_PAGES: usize = 16;
const CACHED_PAGE_BYTES: usize = 1 << 20;
const CACHED_BYTES: usize = 4 << 20;

impl PageCache {
    fn get(&self, name: &str, now: Revision) -> Option<(Revision, Bytes)> {
        let pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let page = pages.iter().find(|page| page.revision == now && page.name == name)?;
        Some((page.revision, page.body.clone()))
    }

    fn put(&self, name: String, revision: Revision, body: Bytes) {
        if body.len() > CACHED_PAGE_BYTES {
            return;
        }
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|page| page.revision == revision && page.name != name);
        let mut bytes: usize = pages.iter().map(|page| page.body.len()).sum();
        while !pages.is_empty() && (pages.len() >= CACHED_PAGES || bytes + body.len() > CACHED_BYTES) {
            bytes -= pages.remove(0).body.len();
        }
        pages.push(CachedPage { name, revision, body });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oblak_model::InstanceKind;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn field_filters() {
        let object = json!({"metadata": {"name": "web"}, "spec": {"n": 3, "on": true, "list": ["a", "b"]}, "status": {"phase": "running", "at": [{"ip": "x"}]}});
        for (text, expected) in [
            ("status.phase=running", true),
            ("status.phase!=running", false),
            ("spec.n=3", true),
            ("spec.on=true", true),
            ("spec.list=b", true),
            ("spec.list=c", false),
            ("spec.list.0=a", true),
            ("status.at.0.ip=x", true),
            ("status.gone=", true),
            ("status.gone=x", false),
            ("metadata.name!=web", false),
            ("metadata.name=a!=b", false),
        ] {
            assert_eq!(FieldFilter::parse(text).unwrap().matches(&object), expected, "{text}");
        }
        for bad in ["", "phase", "phase=x", "=x", "status..phase=x", "kind=instance"] {
            assert!(FieldFilter::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn cursors_round_trip_and_others_are_refused(after in "[a-z/0-9-]{0,40}", junk in "\\PC{0,40}") {
            let text = Cursor::encode::<InstanceKind>(Some("default"), &after);
            prop_assert_eq!(Cursor::decode::<InstanceKind>(&text, Some("default")).unwrap(), after);
            prop_assert!(Cursor::decode::<InstanceKind>(&text, Some("other")).is_err());
            prop_assert!(Cursor::decode::<EventKind>(&text, Some("default")).is_err());
            let _ = Cursor::decode::<InstanceKind>(&junk, None);
        }
        #[test]
        fn filters_never_panic(text in "\\PC{0,40}") {
            if let Ok(filter) = FieldFilter::parse(&text) {
                filter.matches(&json!({"metadata": {}, "spec": [], "status": null}));
            }
        }
    }
}
