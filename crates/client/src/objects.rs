//! Calls about objects, generic over their kind.

use http::{HeaderMap, HeaderValue, Method};
use oblak_model::wire::{Applied, Apply, Explain, LoggedIn, Login, Usage, VersionInfo, WhoAmI};
use oblak_model::{ClusterServers, Kind, List, Object, Revision, Scope};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::Result;
use crate::transport::{Client, ClientError, IDEMPOTENCY_KEY, TextStream, full};
use crate::watch::Watch;

/// Everything but what RFC 3986 calls unreserved.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Encodes one path segment or query value.
pub(crate) fn encode(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// Label selector.
    pub label: Option<String>,
    /// Field filters, `status.phase=running`.
    pub fields: Vec<String>,
    /// Page size; the server's default when absent.
    pub limit: Option<u32>,
    /// Cursor of the page before.
    pub cursor: Option<String>,
}

impl ListOptions {
    fn query(&self) -> Vec<(String, String)> {
        let mut query = Vec::new();
        let mut add = |k: &str, v: String| query.push((k.to_string(), v));
        if let Some(label) = &self.label {
            add("label", label.clone());
        }
        for field in &self.fields {
            add("field", field.clone());
        }
        if let Some(limit) = self.limit {
            add("limit", limit.to_string());
        }
        if let Some(cursor) = &self.cursor {
            add("cursor", cursor.clone());
        }
        query
    }
}

fn with_query(path: &str, query: &[(String, String)]) -> String {
    let text: Vec<String> = query.iter().map(|(k, v)| format!("{}={}", encode(k), encode(v))).collect();
    if text.is_empty() { path.to_string() } else { format!("{path}?{}", text.join("&")) }
}

/// Path of a kind's collection. `project` is ignored for kinds that no project owns.
#[must_use]
pub fn collection_path<K: Kind>(project: &str) -> String {
    match K::SCOPE {
        Scope::Project => format!("/v1/projects/{}/{}", encode(project), K::PLURAL),
        Scope::Cloud | Scope::Organization => format!("/v1/{}", K::PLURAL),
    }
}

/// Path of one object.
#[must_use]
pub fn object_path<K: Kind>(project: &str, name: &str) -> String {
    format!("{}/{}", collection_path::<K>(project), encode(name))
}

fn revision_header(name: &'static str, revision: Option<Revision>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(value) = revision.and_then(|r| HeaderValue::from_str(&format!("\"{r}\"")).ok()) {
        headers.insert(name, value);
    }
    headers
}

impl Client {
    /// One page of a list.
    ///
    /// # Errors
    /// As every call: [`ClientError`].
    pub async fn list<K: Kind>(&self, project: &str, options: &ListOptions) -> Result<List<K>> {
        self.get_json(&with_query(&collection_path::<K>(project), &options.query())).await
    }

    /// The whole list, page after page, at most a million objects.
    ///
    /// # Errors
    /// As every call.
    pub async fn list_all<K: Kind>(&self, project: &str, options: &ListOptions) -> Result<List<K>> {
        self.pages(&collection_path::<K>(project), options).await
    }

    /// What the projects offer to every user: for images those with visibility `public`. Page after page, at most a million.
    ///
    /// # Errors
    /// `not_found` for kinds that cannot be offered, and as every call.
    pub async fn list_offered<K: Kind>(&self, options: &ListOptions) -> Result<List<K>> {
        self.pages(&format!("/v1/{}", K::PLURAL), options).await
    }

    async fn pages<K: Kind>(&self, path: &str, options: &ListOptions) -> Result<List<K>> {
        let mut options = options.clone();
        let mut whole: List<K> = self.get_json(&with_query(path, &options.query())).await?;
        while let Some(next) = whole.next.take().filter(|_| whole.items.len() < 1_000_000) {
            options.cursor = Some(next);
            let page: List<K> = self.get_json(&with_query(path, &options.query())).await?;
            whole.items.extend(page.items);
            whole.next = page.next;
        }
        Ok(whole)
    }

    /// One object by name or id.
    ///
    /// # Errors
    /// `not_found`, and as every call.
    pub async fn get<K: Kind>(&self, project: &str, name: &str) -> Result<Object<K>> {
        self.get_json(&object_path::<K>(project, name)).await
    }

    /// Creates an object. Sent with an idempotency key, so that a retry never makes two.
    ///
    /// # Errors
    /// `name_taken`, `invalid`, ..., and as every call.
    pub async fn create<K: Kind>(&self, project: &str, object: &Object<K>) -> Result<Object<K>> {
        let mut headers = HeaderMap::new();
        headers.insert(IDEMPOTENCY_KEY, self.fresh_key()?);
        let path = collection_path::<K>(project);
        let mut last = None;
        for attempt in 0u32..3 {
            match self.call(Method::POST, &path, headers.clone(), Some(object)).await {
                Err(e) if e.is_unsure() => last = Some(e),
                other => return other,
            }
            tokio::time::sleep(std::time::Duration::from_millis(100 << attempt)).await;
        }
        Err(last.unwrap_or_else(|| ClientError::Answer("no attempt was made".into())))
    }

    fn fresh_key(&self) -> Result<HeaderValue> {
        let key = self.inner.keys.next().to_string();
        HeaderValue::from_str(&key).map_err(|e| ClientError::Config(e.to_string()))
    }

    /// Replaces an object if it is still at `object.metadata.revision`.
    ///
    /// # Errors
    /// `precondition_failed`, `invalid`, ..., and as every call.
    pub async fn replace<K: Kind>(&self, object: &Object<K>) -> Result<Object<K>> {
        let path = object_path::<K>(object.metadata.project.as_deref().unwrap_or(""), &object.metadata.name);
        self.call(Method::PUT, &path, revision_header("if-match", Some(object.metadata.revision)), Some(object)).await
    }

    /// Changes some fields (RFC 7396 merge patch), if the object is still at `revision` when one is given.
    ///
    /// # Errors
    /// `not_found`, `precondition_failed`, `invalid`, ..., and as every call.
    pub async fn patch<K: Kind>(
        &self,
        project: &str,
        name: &str,
        patch: &Value,
        revision: Option<Revision>,
    ) -> Result<Object<K>> {
        let mut headers = revision_header("if-match", revision);
        headers.insert("content-type", HeaderValue::from_static("application/merge-patch+json"));
        self.call(Method::PATCH, &object_path::<K>(project, name), headers, Some(patch)).await
    }

    /// Reads, changes and writes an object, again when somebody else was faster (at most ten times).
    ///
    /// # Errors
    /// `conflict` after the last attempt, what `change` returns, and as every call.
    pub async fn update<K: Kind>(
        &self,
        project: &str,
        name: &str,
        mut change: impl FnMut(&mut Object<K>) -> Result<()>,
    ) -> Result<Object<K>> {
        let mut attempt = 0;
        loop {
            let mut object = self.get::<K>(project, name).await?;
            change(&mut object)?;
            match self.replace(&object).await {
                Err(ClientError::Api(e))
                    if matches!(e.code, oblak_model::Code::PreconditionFailed | oblak_model::Code::Conflict)
                        && attempt < 10 =>
                {
                    attempt += 1;
                }
                // Carried out or not? Doing it again could do it twice, for example count twice.
                Err(error) if error.is_unsure() && attempt < 10 => match self.get::<K>(project, name).await? {
                    now if now.metadata.revision == object.metadata.revision => {
                        attempt += 1;
                        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    }
                    now if now.spec == object.spec && now.metadata.labels == object.metadata.labels => return Ok(now),
                    _ => return Err(error),
                },
                other => return other,
            }
        }
    }

    /// Asks for deletion. The object may stay, marked, until what it stands for is gone.
    ///
    /// # Errors
    /// `not_found`, `in_use`, and as every call.
    pub async fn delete<K: Kind>(&self, project: &str, name: &str) -> Result<()> {
        let path = object_path::<K>(project, name);
        let mut unsure = false;
        for attempt in 0u32..3 {
            match self.call::<Value>(Method::DELETE, &path, HeaderMap::new(), None::<&()>).await {
                Ok(_) => return Ok(()),
                // Its answer was lost, or a server died over it: an earlier attempt has done it.
                Err(e) if unsure && e.code() == Some(oblak_model::Code::NotFound) => return Ok(()),
                Err(e) if e.is_unsure() && attempt < 2 => unsure = true,
                Err(e) => return Err(e),
            }
            tokio::time::sleep(std::time::Duration::from_millis(100 << attempt)).await;
        }
        Err(ClientError::Answer("no attempt was made".into()))
    }

    /// Changes of a collection after `from`.
    ///
    /// # Errors
    /// As every call.
    pub async fn watch<K: Kind>(&self, project: &str, from: Revision, options: &ListOptions) -> Result<Watch<K>> {
        let mut query = options.query();
        query.push(("watch".into(), "true".into()));
        Watch::open(self.clone(), with_query(&collection_path::<K>(project), &query), from).await
    }

    /// Makes many resources what they should be, all or none; with `plan` only says what would happen.
    ///
    /// # Errors
    /// As every call.
    pub async fn apply(&self, project: &str, apply: &Apply, plan: bool) -> Result<Applied> {
        let path = format!("/v1/projects/{}/apply{}", encode(project), if plan { "?plan=true" } else { "" });
        let mut headers = HeaderMap::new();
        if !plan {
            headers.insert(IDEMPOTENCY_KEY, self.fresh_key()?);
        }
        self.call(Method::POST, &path, headers, Some(apply)).await
    }

    /// Why an instance is where it is, or nowhere.
    ///
    /// # Errors
    /// As every call.
    pub async fn explain(&self, project: &str, instance: &str) -> Result<Explain> {
        self.get_json(&format!("{}/explain", object_path::<oblak_model::InstanceKind>(project, instance))).await
    }

    /// What an instance uses.
    ///
    /// # Errors
    /// As every call.
    pub async fn usage(&self, project: &str, instance: &str) -> Result<Usage> {
        let path = format!("{}/usage", object_path::<oblak_model::InstanceKind>(project, instance));
        let first = match self.get_json(&path).await {
            Err(error) if error.code() == Some(oblak_model::Code::NotFound) => error,
            other => return other,
        };
        // Samples are where the node keeps its lease.
        for server in self.servers().iter().skip(1) {
            if let Ok(usage) = self.only(server)?.get_json(&path).await {
                return Ok(usage);
            }
        }
        Err(first)
    }

    /// Console output of an instance.
    ///
    /// # Errors
    /// As every call.
    pub async fn logs(&self, project: &str, instance: &str, tail: Option<u64>, follow: bool) -> Result<TextStream> {
        let mut query = vec![("follow".to_string(), follow.to_string())];
        if let Some(n) = tail {
            query.push(("tail".into(), n.to_string()));
        }
        let path = format!("{}/logs", object_path::<oblak_model::InstanceKind>(project, instance));
        self.get_stream(&with_query(&path, &query)).await
    }

    /// Sends the content of an image.
    ///
    /// # Errors
    /// `checksum_mismatch`-like problems as `invalid`, and as every call.
    pub async fn upload_image<S>(
        &self,
        project: &str,
        image: &str,
        checksum: Option<&str>,
        length: u64,
        content: S,
    ) -> Result<oblak_model::Image>
    where
        S: futures_util::Stream<Item = std::io::Result<bytes::Bytes>> + Send + 'static,
    {
        use futures_util::TryStreamExt;
        use http_body_util::BodyExt;
        let mut headers = HeaderMap::new();
        headers.insert("content-type", HeaderValue::from_static("application/octet-stream"));
        headers.insert("content-length", HeaderValue::from(length));
        if let Some(sum) = checksum {
            headers.insert(
                "x-checksum",
                HeaderValue::from_str(sum).map_err(|_| ClientError::Config("the checksum is not text".into()))?,
            );
        }
        let body = http_body_util::StreamBody::new(content.map_ok(hyper::body::Frame::data)).boxed_unsync();
        let path = format!("{}/content", object_path::<oblak_model::ImageKind>(project, image));
        let response = self.send(Method::PUT, &path, headers, body).await?;
        let bytes = self.read(response).await?;
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer(e.to_string()))
    }

    /// Exchanges user name and password for a token.
    ///
    /// # Errors
    /// `unauthenticated`, and as every call.
    pub async fn login(&self, user: &str, password: &str) -> Result<LoggedIn> {
        self.post_json("/v1/login", &Login { user: user.into(), password: password.into() }).await
    }

    /// The servers of the cloud, and which of them leads.
    ///
    /// # Errors
    /// `unauthenticated`, and as every call.
    pub async fn cluster_servers(&self) -> Result<ClusterServers> {
        self.get_json("/v1/cluster/servers").await
    }

    /// Asks where the servers are and goes there from now on when the present one fails.
    ///
    /// # Errors
    /// As [`Client::cluster_servers`].
    pub async fn learn_servers(&self) -> Result<Vec<String>> {
        let endpoints = self.cluster_servers().await?.endpoints();
        self.learn(endpoints);
        Ok(self.servers())
    }

    /// Who this client is.
    ///
    /// # Errors
    /// `unauthenticated`, and as every call.
    pub async fn whoami(&self) -> Result<WhoAmI> {
        self.get_json("/v1/whoami").await
    }

    /// Version of the server.
    ///
    /// # Errors
    /// As every call.
    pub async fn version(&self) -> Result<VersionInfo> {
        self.get_json("/v1/version").await
    }

    /// Whether the server is ready to serve.
    pub async fn is_ready(&self) -> bool {
        self.send(Method::GET, "/readyz", HeaderMap::new(), full(bytes::Bytes::new())).await.is_ok()
    }
}
