//! The OpenAPI 3.1 document, assembled from the kinds and from one table of the other paths, and the page that shows it.

use axum::Json;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use oblak_model::object::default_spec;
use oblak_model::wire::{
    Applied, Apply, EvacuateNode, Explain, LoggedIn, Login, NodeRemoved, RemoveNode, Usage, VersionInfo, WhoAmI,
};
use oblak_model::{ApiError, ClusterServers, Image, Kind, Metadata, Scope};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::kinds::{Access, Resource};

/// The document. The same for every server of one version.
#[must_use]
pub fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut builder =
        Builder { generator: settings.into_generator(), paths: Map::new(), tags: Vec::new(), schemas: Vec::new() };
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => { $( builder.kind::<$kind>(); )* };
    }
    oblak_model::for_each_kind!(kinds);
    builder.others();
    let _ = builder.generator.subschema_for::<ApiError>();
    let Builder { mut generator, paths, tags, schemas: own } = builder;
    let mut schemas = generator.take_definitions(true);
    schemas.extend(lists().into_iter().chain(own));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Oblak",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": DESCRIPTION,
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {"password": []}, {"node": []}],
        "tags": tags,
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "A token from POST /v1/login or POST /v1/tokens."},
                "password": {"type": "http", "scheme": "basic", "description": "User name and password."},
                "node": {"type": "mutualTLS", "description": "Certificate of a node's agent; opens only that node's paths."},
            },
            "responses": {
                "Problem": {
                    "description": "What went wrong and what can be done (RFC 9457). `code` is stable.",
                    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ApiError"}}},
                },
            },
        },
    })
}

const DESCRIPTION: &str = "An object is {kind, metadata, spec, status}: spec is what is asked for, status what is. \
Sizes are bytes and lengths of time milliseconds in answers; strings such as \"1GiB\" and \"10s\" are accepted in requests. \
Every answer carries X-Oblak-Revision; sent back as X-Oblak-Min-Revision it makes a read wait until it shows that revision. \
X-Request-Id is taken from the request or made, and is also in the server's log.";

struct Builder {
    generator: SchemaGenerator,
    paths: Map<String, Value>,
    tags: Vec<Value>,
    /// Schemas that are put together here.
    schemas: Vec<(String, Value)>,
}

fn lists() -> Vec<(String, Value)> {
    let mut out = Vec::new();
    macro_rules! kinds {
        ($($kind:ty),* $(,)?) => { $( out.push(list_schema::<$kind>()); )* };
    }
    oblak_model::for_each_kind!(kinds);
    out
}

fn pascal<K: Kind>() -> String {
    oblak_model::object::pascal(K::KIND)
}

fn list_schema<K: Kind>() -> (String, Value) {
    let name = pascal::<K>();
    let schema = json!({
        "type": "object",
        "required": ["items", "revision", "next"],
        "properties": {
            "items": {"type": "array", "items": {"$ref": format!("#/components/schemas/{name}")}},
            "revision": {"type": "string", "description": "What the page shows; watch from here."},
            "next": {"type": ["string", "null"], "description": "Cursor of the next page; null on the last."},
        },
    });
    (format!("{name}List"), schema)
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn parameter(place: &str, name: &str, schema: &Value, description: &str) -> Value {
    json!({"in": place, "name": name, "required": place == "path", "schema": schema, "description": description})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn content(media: &str, schema: &Value) -> Value {
    json!({media: {"schema": schema}})
}

#[allow(clippy::needless_pass_by_value)] // callers build the lists for it
fn operation(id: &str, tag: &str, summary: &str, parameters: Vec<Value>, body: Option<Value>, answers: Value) -> Value {
    let mut answers = answers;
    answers["default"] = json!({"$ref": "#/components/responses/Problem"});
    let mut operation = json!({
        "operationId": id, "tags": [tag], "summary": summary, "parameters": parameters, "responses": answers,
    });
    if let Some(content) = body {
        operation["requestBody"] = json!({"required": true, "content": content});
    }
    operation
}

impl Builder {
    fn schema<T: JsonSchema>(&mut self) -> Value {
        self.generator.subschema_for::<T>().to_value()
    }

    /// An object as it is sent to be created: a spec that consists of defaults may be left out.
    fn new_object<K: Resource>(&mut self) -> Value {
        let (metadata, spec) = (self.schema::<Metadata>(), self.schema::<K::Spec>());
        let required: &[&str] = if default_spec::<K>().is_ok() { &["metadata"] } else { &["metadata", "spec"] };
        let schema = json!({
            "type": "object",
            "required": required,
            "properties": {
                "kind": {"const": K::KIND},
                "metadata": metadata,
                "spec": spec,
                "status": {"description": "Not looked at, so that what was read can be sent back."},
            },
        });
        let name = format!("New{}", pascal::<K>());
        let body = content("application/json", &reference(&name));
        self.schemas.push((name, schema));
        body
    }

    fn add(&mut self, path: &str, method: &str, operation: Value) {
        let item = self.paths.entry(path.to_string()).or_insert_with(|| json!({}));
        item[method] = operation;
    }

    fn kind<K: Resource>(&mut self) {
        let object = self.schema::<oblak_model::Object<K>>();
        let (name, tag) = (pascal::<K>(), K::PLURAL);
        self.tags.push(json!({"name": tag}));
        let (base, outer) = match K::SCOPE {
            Scope::Project => (
                format!("/v1/projects/{{project}}/{}", K::PLURAL),
                vec![parameter("path", "project", &text(), "Project.")],
            ),
            _ => (format!("/v1/{}", K::PLURAL), vec![]),
        };
        let list = content("application/json", &reference(&format!("{name}List")));
        let mut answer = list;
        answer["text/event-stream"] = json!({"schema": {"type": "string", "description": "With watch=true: events put, delete, bookmark and error."}});
        self.add(
            &base,
            "get",
            operation(
                &format!("list{name}s"),
                tag,
                &format!("List or watch {}.", spoken(K::PLURAL)),
                [outer.clone(), list_parameters()].concat(),
                None,
                json!({"200": {"description": "A page in the order of names.", "content": answer}}),
            ),
        );
        let everywhere = match K::KIND {
            "instance" | "event" => Some("of all projects (cloud admins)"),
            "image" => Some("that projects offer to everybody: those with visibility public"),
            _ => None,
        };
        if let Some(which) = everywhere {
            self.add(
                &format!("/v1/{}", K::PLURAL),
                "get",
                operation(
                    &format!("listAll{name}s"), tag, &format!("List or watch {} {which}.", spoken(K::PLURAL)),
                    list_parameters(), None,
                    json!({"200": {"description": "A page.", "content": content("application/json", &reference(&format!("{name}List")))}}),
                ),
            );
        }
        let one = content("application/json", &object);
        if K::CREATABLE {
            let idempotency = parameter(
                "header",
                "Idempotency-Key",
                &text(),
                "The same request with the same key creates once within 24 hours.",
            );
            let asked = self.new_object::<K>();
            self.add(
                &base,
                "post",
                operation(
                    &format!("create{name}"),
                    tag,
                    &format!("Create {}.", article(K::KIND)),
                    [outer.clone(), vec![idempotency]].concat(),
                    Some(asked),
                    json!({"201": {"description": "Created.", "content": one}}),
                ),
            );
        }
        self.item::<K>(&base, &outer, &one);
    }

    fn item<K: Resource>(&mut self, base: &str, outer: &[Value], one: &Value) {
        let (name, tag) = (pascal::<K>(), K::PLURAL);
        let param = crate::rest::item_param::<K>();
        let path = format!("{base}/{{{param}}}");
        let of = [outer.to_vec(), vec![parameter("path", param, &text(), "Name or id.")]].concat();
        let matching = parameter("header", "If-Match", &text(), "ETag that the object must still have.");
        let guarded = [of.clone(), vec![matching]].concat();
        let shown = json!({"200": {"description": "The object; ETag is its revision.", "content": one}});
        let what = spoken(K::KIND);
        self.add(
            &path,
            "get",
            operation(&format!("get{name}"), tag, &format!("Get {}.", article(K::KIND)), of, None, shown.clone()),
        );
        if K::ACCESS == Access::InProject && K::KIND == "event" {
            return;
        }
        self.add(
            &path,
            "put",
            operation(
                &format!("replace{name}"),
                tag,
                &format!("Replace labels and spec of a {what}."),
                guarded.clone(),
                Some(one.clone()),
                shown.clone(),
            ),
        );
        let patch = content(
            "application/merge-patch+json",
            &json!({"type": "object", "description": "RFC 7396; metadata.labels and spec."}),
        );
        self.add(
            &path,
            "patch",
            operation(
                &format!("patch{name}"),
                tag,
                &format!("Change some of a {what}."),
                guarded.clone(),
                Some(patch),
                shown,
            ),
        );
        let gone = json!({
            "204": {"description": "Gone."},
            "202": {"description": "Marked; it goes when everything of it has been cleaned up.", "content": one},
        });
        let by_query = parameter("query", "if_match", &text(), "Revision that the object must still have.");
        self.add(
            &path,
            "delete",
            operation(
                &format!("delete{name}"),
                tag,
                &format!("Delete {}.", article(K::KIND)),
                [guarded, vec![by_query]].concat(),
                None,
                gone,
            ),
        );
    }

    fn json<T: JsonSchema>(&mut self, description: &str) -> Value {
        let schema = self.schema::<T>();
        json!({"200": {"description": description, "content": content("application/json", &schema)}})
    }

    fn others(&mut self) {
        let tag = "cloud";
        self.tags.push(json!({"name": tag}));
        for (path, summary) in [
            ("/healthz", "The process answers."),
            ("/readyz", "Store and cache answer."),
            ("/metrics", "Figures for Prometheus (cloud admins)."),
            ("/v1/ca.pem", "Certificate of the authority."),
        ] {
            let id = path.trim_start_matches("/v1").replace(['/', '.'], "");
            let answers = json!({"200": {"description": "Text.", "content": content("text/plain", &text())}});
            self.add(path, "get", operation(&id, tag, summary, vec![], None, answers));
        }
        let version = self.json::<VersionInfo>("Version.");
        self.add("/v1/version", "get", operation("version", tag, "Versions of server and API.", vec![], None, version));
        let whoami = self.json::<WhoAmI>("The caller.");
        self.add(
            "/v1/whoami",
            "get",
            operation("whoami", tag, "Who calls, and with which roles.", vec![], None, whoami),
        );
        let servers = self.json::<ClusterServers>("Servers that are alive, and the leader.");
        let summary = "Where the servers of the cloud answer, and which of them leads.";
        self.add("/v1/cluster/servers", "get", operation("clusterServers", tag, summary, vec![], None, servers));
        let login = self.schema::<Login>();
        let answers = self.json::<LoggedIn>("A token.");
        self.add(
            "/v1/login",
            "post",
            operation(
                "login",
                tag,
                "Exchange a password for a token.",
                vec![],
                Some(content("application/json", &login)),
                answers,
            ),
        );
        self.apply();
        self.instances();
        self.images();
        self.nodes();
        self.members();
    }

    fn apply(&mut self) {
        let body = self.schema::<Apply>();
        let answers = self.json::<Applied>("What was, or would be, done.");
        let parameters = vec![
            parameter("path", "project", &text(), "Project."),
            parameter(
                "query",
                "plan",
                &json!({"type": "boolean"}),
                "Only say what would happen, where instances would land, why, and what an hour costs.",
            ),
        ];
        let summary = "Make many resources what they should be: all in one commit, or none.";
        self.add(
            "/v1/projects/{project}/apply",
            "post",
            operation("apply", "cloud", summary, parameters, Some(content("application/json", &body)), answers),
        );
    }

    fn instances(&mut self) {
        let base = "/v1/projects/{project}/instances/{name}";
        let of =
            vec![parameter("path", "project", &text(), "Project."), parameter("path", "name", &text(), "Name or id.")];
        let query = |name: &str, schema: Value, description: &str| parameter("query", name, &schema, description);
        let explain = self.json::<Explain>("Why.");
        self.add(
            &format!("{base}/explain"),
            "get",
            operation("explainInstance", "instances", "Why it is where it is, or nowhere.", of.clone(), None, explain),
        );
        let usage = self.json::<Usage>("The newest sample.");
        let all = query("all", json!({"type": "boolean"}), "All samples that are kept, as {items}.");
        self.add(
            &format!("{base}/usage"),
            "get",
            operation("instanceUsage", "instances", "What it uses.", [of.clone(), vec![all]].concat(), None, usage),
        );
        let logs = json!({"200": {"description": "Console output.", "content": content("text/plain", &text())}});
        let tail = vec![
            query("tail", json!({"type": "integer"}), "Last lines only."),
            query("follow", json!({"type": "boolean"}), "Go on."),
        ];
        self.add(
            &format!("{base}/logs"),
            "get",
            operation("instanceLogs", "instances", "Console output.", [of.clone(), tail].concat(), None, logs),
        );
        let exec = vec![
            query(
                "argv",
                json!({"type": "array", "items": {"type": "string"}}),
                "Program and arguments, one parameter each.",
            ),
            query("env", json!({"type": "array", "items": {"type": "string"}}), "NAME=value, one parameter each."),
            query("tty", json!({"type": "boolean"}), "With a terminal."),
            query("cols", json!({"type": "integer"}), "Its columns."),
            query("rows", json!({"type": "integer"}), "Its rows."),
            query("user", text(), "User inside."),
            query("cwd", text(), "Working directory."),
        ];
        let port = vec![query("port", json!({"type": "integer"}), "TCP port of the instance.")];
        for (name, summary, more) in [
            ("console", "Serial console (WebSocket).", vec![]),
            ("exec", "Run a program inside (WebSocket).", exec),
            ("vnc", "Screen: RFB in stdin and stdout frames (WebSocket).", vec![]),
            ("forward", "A TCP port from inside its network (WebSocket).", port),
        ] {
            let answers = json!({"101": {"description": "WebSocket. Each binary message is one byte of channel (0 stdin, 1 stdout, 2 stderr, 3 control as JSON) and the payload."}});
            let id = format!("{name}Instance");
            self.add(
                &format!("{base}/{name}"),
                "get",
                operation(&id, "instances", summary, [of.clone(), more].concat(), None, answers),
            );
        }
    }

    fn images(&mut self) {
        let of = vec![
            parameter("path", "project", &text(), "Project."),
            parameter("path", "name", &text(), "Name or id."),
            parameter("header", "X-Checksum", &text(), "sha256:<hex> that the content must have."),
        ];
        let body = content("application/octet-stream", &json!({"type": "string", "format": "binary"}));
        let answers = self.json::<Image>("The image.");
        self.add(
            "/v1/projects/{project}/images/{name}/content",
            "put",
            operation(
                "uploadImage",
                "images",
                "Send the content of an image whose source is an upload.",
                of,
                Some(body),
                answers,
            ),
        );
    }

    fn nodes(&mut self) {
        let body = self.schema::<crate::node::Enroll>();
        let answer = self.schema::<oblak_model::wire::NodeCertificate>();
        let answers =
            json!({"201": {"description": "A certificate.", "content": content("application/json", &answer)}});
        self.add(
            "/v1/nodes/enroll",
            "post",
            operation(
                "enrollNode",
                "nodes",
                "Exchange a join token, or a cloud admin's token, for the certificate of a node.",
                vec![],
                Some(content("application/json", &body)),
                answers,
            ),
        );
        let body = self.schema::<RemoveNode>();
        let answers = self.json::<NodeRemoved>("What was lost with it.");
        let summary = "Remove a node from the cloud for good; with force also what lives there.";
        let of = vec![parameter("path", "name", &text(), "Name or id of the node.")];
        self.add(
            "/v1/nodes/{name}/remove",
            "post",
            operation("removeNode", "nodes", summary, of, Some(content("application/json", &body)), answers),
        );
        let body = self.schema::<EvacuateNode>();
        let answers = self.json::<oblak_model::Node>("The node.");
        let summary = "Say that a node which is down is lost: its instances with ha are started elsewhere.";
        let of = vec![parameter("path", "name", &text(), "Name or id of the node.")];
        self.add(
            "/v1/nodes/{name}/evacuate",
            "post",
            operation("evacuateNode", "nodes", summary, of, Some(content("application/json", &body)), answers),
        );
    }
}

impl Builder {
    /// The servers and their store.
    fn members(&mut self) {
        use oblak_model::members as m;
        let tag = "cluster";
        let status = self.json::<m::ClusterStatus>("How they are.");
        let summary = "How the servers and their store are, and what should be done.";
        self.add("/v1/cluster/status", "get", operation("clusterStatus", tag, summary, vec![], None, status.clone()));
        let summary = "Give unused space back, one server after the other, and clear the alarm about space.";
        self.add("/v1/cluster/defragment", "post", operation("defragment", tag, summary, vec![], None, status));
        let answers = self.json::<m::JoinTokenFor>("What it is for.");
        let body = Some(content("application/json", &self.schema::<m::InspectJoinToken>()));
        let summary = "Say what a join token is for. Nothing is used up.";
        self.add("/v1/cluster/join-token", "post", operation("inspectJoinToken", tag, summary, vec![], body, answers));
        let answer = self.schema::<m::ServerAdmitted>();
        let answers =
            json!({"201": {"description": "Place and keys.", "content": content("application/json", &answer)}});
        let body = Some(content("application/json", &self.schema::<m::JoinServer>()));
        let summary =
            "Become one more server, with a join token of role server: a place among the members, and the keys.";
        self.add("/v1/cluster/join", "post", operation("joinServer", tag, summary, vec![], body, answers));
        let answers = self.json::<m::ServerRemoved>("What is left.");
        let of = vec![parameter("path", "name", &text(), "Name of the server.")];
        let summary = "Remove a server from the members of the store for good.";
        self.add(
            "/v1/cluster/servers/{name}/remove",
            "post",
            operation("removeServer", tag, summary, of, None, answers),
        );
        let binary = content("application/octet-stream", &json!({"type": "string", "format": "binary"}));
        let answers = json!({"200": {"description": "The encrypted archive.", "content": binary}});
        let body = Some(content("application/json", &self.schema::<m::BackupRequest>()));
        let summary = "Everything in the store and the keys of the cloud, encrypted with a passphrase (cloud admins).";
        self.add("/v1/cluster/backup", "post", operation("backup", tag, summary, vec![], body, answers));
    }
}

fn list_parameters() -> Vec<Value> {
    vec![
        parameter(
            "query",
            "limit",
            &json!({"type": "integer", "minimum": 1, "maximum": 1000, "default": 500}),
            "Most items on the page.",
        ),
        parameter("query", "cursor", &text(), "`next` of the page before."),
        parameter("query", "label", &text(), "Label selector such as tier=web,env!=test,gpu,!old."),
        parameter(
            "query",
            "field",
            &json!({"type": "array", "items": {"type": "string"}}),
            "Field filter such as status.phase=running; may be repeated.",
        ),
        parameter("query", "watch", &json!({"type": "boolean"}), "Server-sent events instead of a list."),
        parameter("query", "from", &text(), "With watch: the revision after which events begin; now when absent."),
    ]
}

fn spoken(word: &str) -> String {
    word.replace('-', " ")
}

fn article(kind: &str) -> String {
    let an = kind.starts_with(['a', 'e', 'i', 'o']);
    format!("{} {}", if an { "an" } else { "a" }, spoken(kind))
}

pub(crate) async fn serve() -> Json<Value> {
    Json(document())
}

/// A page without anything from elsewhere: it reads `/openapi.json` of the same server.
pub(crate) async fn page() -> Response {
    let mut response = Html(include_str!("docs.html")).into_response();
    let policy = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn committed() -> std::path::PathBuf {
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../openapi/oblak.json")
    }

    #[test]
    fn the_committed_document_is_the_one_of_the_code() {
        let text = std::fs::read_to_string(committed()).unwrap();
        let committed: Value = serde_json::from_str(&text).unwrap();
        assert!(
            committed == document(),
            "openapi/oblak.json is out of date; run `cargo run -p oblak-api --example openapi > openapi/oblak.json`"
        );
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn walk(value: &Value, root: &Value, seen: &mut usize) {
            match value {
                Value::Object(map) => {
                    if let Some(Value::String(target)) = map.get("$ref") {
                        *seen += 1;
                        let pointer = target.strip_prefix('#').expect("references stay in the document");
                        assert!(root.pointer(pointer).is_some(), "{target}");
                    }
                    map.values().for_each(|v| walk(v, root, seen));
                }
                Value::Array(items) => items.iter().for_each(|v| walk(v, root, seen)),
                _ => {}
            }
        }
        let document = document();
        let mut seen = 0;
        walk(&document, &document, &mut seen);
        assert!(seen > 100, "{seen}");
        let ids: Vec<_> = document["paths"]
            .as_object()
            .unwrap()
            .values()
            .flat_map(|p| p.as_object().unwrap().values())
            .map(|o| o["operationId"].to_string())
            .collect();
        let unique: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(ids.len(), unique.len());
    }
}
