//! Pulling from a registry (OCI distribution specification 1.1): basic and bearer authentication, index selection, layers in parallel,
//! each resumed where it broke.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use futures_util::{StreamExt, TryStreamExt, stream};
use http::header::{self, HeaderMap, HeaderValue};
use http::{StatusCode, Uri};
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::digest::Digest;
use crate::download::{self, Wanted};
use crate::error::{Code, ImageError, Result};
use crate::http::{Response, parse_url};
use crate::oci::{self, Descriptor, Document, Manifest, Resolved};
use crate::progress::{Phase, Reporter};
use crate::reference::{Reference, Version};
use crate::store::{Inner, blocking};

/// Layers at a time; more only shares the same line.
const PARALLEL: usize = 4;
const MAX_DEPTH: usize = 4;
const TOKEN_BYTES: usize = 256 * 1024;
/// For documents; layers have their own way of going on.
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// User and password (or access token) of a registry.
#[derive(Clone)]
pub struct BasicAuth {
    /// User.
    pub username: String,
    /// Password; never logged.
    pub password: String,
}

impl std::fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BasicAuth").field("username", &self.username).finish_non_exhaustive()
    }
}

pub(crate) struct Registry<'a> {
    inner: &'a Inner,
    reference: Reference,
    base: String,
    auth: Option<BasicAuth>,
    /// Value of `Authorization` that worked last.
    authorization: Mutex<Option<HeaderValue>>,
}

/// `Www-Authenticate` (RFC 9110 11.6.1).
#[derive(Debug, PartialEq)]
pub(crate) enum Challenge {
    Basic,
    Bearer(HashMap<String, String>),
}

#[derive(Deserialize)]
struct Token {
    #[serde(alias = "access_token")]
    token: String,
}

impl<'a> Registry<'a> {
    pub fn new(inner: &'a Inner, reference: Reference, auth: Option<BasicAuth>, insecure_http: bool) -> Self {
        let scheme = if insecure_http { "http" } else { "https" };
        let base = format!("{scheme}://{}/v2/{}", reference.host, reference.repository);
        Self { inner, reference, base, auth, authorization: Mutex::new(None) }
    }

    /// The manifest for this machine and its config.
    pub async fn resolve(&self, reporter: &Reporter) -> Result<Resolved> {
        reporter.phase(
            Phase::Resolving,
            None,
            format!("asking {} for {}", self.reference.host, self.reference.repository),
        );
        let mut version = self.reference.version.clone();
        for _ in 0..MAX_DEPTH {
            let bytes = self.document(&format!("manifests/{}", version.as_str()), oci::ACCEPT, reporter).await?;
            if let Version::Digest(digest) = &version {
                let found = Digest::of(&bytes);
                if found != *digest {
                    return Err(ImageError::new(
                        Code::ImageCorrupt,
                        format!("{} answered with {found} where {digest} was asked for", self.reference.host),
                    ));
                }
            }
            match Document::parse(&bytes)? {
                Document::Index(index) => version = Version::Digest(index.select()?.digest.clone()),
                Document::Manifest(manifest) => {
                    manifest.check(&self.inner.options.limits)?;
                    let config = &manifest.config;
                    let config_bytes = self.document(&format!("blobs/{}", config.digest), "*/*", reporter).await?;
                    oci::verify(&config_bytes, config)?;
                    return Ok(Resolved { manifest_bytes: bytes, manifest, config_bytes });
                }
            }
        }
        Err(ImageError::new(Code::ImageCorrupt, "the registry nests indexes too deeply"))
    }

    /// Brings the layers into the store.
    pub async fn layers(
        &self,
        manifest: &Manifest,
        image: &str,
        work: &std::path::Path,
        reporter: &Arc<Reporter>,
    ) -> Result<()> {
        let total = manifest.layers.iter().map(|l| l.size).sum();
        reporter.phase(Phase::Downloading, Some(total), format!("pulling {} layers", manifest.layers.len()));
        // Futures first, so that no closure over references becomes part of the stream's type: the whole must be `Send`.
        let jobs: Vec<_> = manifest.layers.iter().map(|layer| self.layer(layer, image, work, reporter)).collect();
        stream::iter(jobs).buffer_unordered(PARALLEL).try_collect::<Vec<()>>().await.map(drop)
    }

    async fn layer(
        &self,
        layer: &Descriptor,
        image: &str,
        work: &std::path::Path,
        reporter: &Arc<Reporter>,
    ) -> Result<()> {
        let _one = self.inner.locks.hold(format!("blob:{}", layer.digest), reporter.cancel()).await?;
        if self.inner.blobs.has(&layer.digest) {
            reporter.add(layer.size);
            return Ok(());
        }
        let uri = parse_url(&format!("{}/blobs/{}", self.base, layer.digest))?;
        let mut retried = false;
        let part = loop {
            let mut headers = HeaderMap::new();
            if let Some(value) = self.authorization.lock().await.clone() {
                headers.insert(header::AUTHORIZATION, value);
            }
            let wanted = Wanted {
                uri: uri.clone(),
                headers,
                key: format!("blob-{}", layer.digest.hex()),
                image,
                limit: layer.size,
                immutable: true,
            };
            match download::fetch(&self.inner.http, &self.inner.dir, &wanted, reporter).await {
                // A token may have run out during a long pull: get a fresh one, once.
                Err(e) if e.code == Code::Invalid && !retried => {
                    retried = true;
                    *self.authorization.lock().await = None;
                    let ping = parse_url(&format!("{}/manifests/{}", self.base, self.reference.version.as_str()))?;
                    drop(self.request(&ping, oci::ACCEPT, reporter).await?);
                }
                other => break other?,
            }
        };
        let (blobs, expected, size) = (self.inner.blobs.clone(), layer.digest.clone(), layer.size);
        let (reporter, temp) = (Arc::clone(reporter), work.join(layer.digest.hex()));
        blocking(move || {
            // The bytes were counted when they came.
            let silent = Reporter::silent(reporter.cancel().clone());
            let (found, length) = crate::blobs::hash(&part, &silent)?;
            if found != expected || length != size {
                download::discard(&part);
                return Err(ImageError::new(
                    Code::ImageCorrupt,
                    format!("layer {expected} of {size} bytes arrived as {found} of {length} bytes"),
                ));
            }
            std::fs::rename(&part, &temp).map_err(|e| ImageError::io("cannot store a layer", &e))?;
            download::discard(&part);
            blobs.commit(&temp, &expected).map(drop)
        })
        .await
    }

    async fn document(&self, path: &str, accept: &str, reporter: &Reporter) -> Result<Vec<u8>> {
        let uri = parse_url(&format!("{}/{path}", self.base))?;
        let mut attempt = 0;
        loop {
            let result = match self.request(&uri, accept, reporter).await {
                Ok(response) => response.body.all(oci::DOCUMENT_BYTES).await,
                Err(e) => Err(e),
            };
            attempt += 1;
            match result {
                Err(e) if e.code == Code::Network && attempt < ATTEMPTS => {
                    reporter.trouble(&e);
                    tokio::select! {
                        () = tokio::time::sleep(FIRST_PAUSE * 2u32.pow(attempt)) => {}
                        () = reporter.cancel().cancelled() => return Err(ImageError::cancelled()),
                    }
                }
                other => {
                    reporter.going_on();
                    return other;
                }
            }
        }
    }

    /// GET; on a challenge it authenticates and asks once more.
    async fn request(&self, uri: &Uri, accept: &str, reporter: &Reporter) -> Result<Response> {
        let mut asked = false;
        loop {
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_str(accept) {
                headers.insert(header::ACCEPT, value);
            }
            if let Some(value) = self.authorization.lock().await.clone() {
                headers.insert(header::AUTHORIZATION, value);
            }
            let response = self.inner.http.get(uri, &headers, reporter.cancel()).await?;
            match response.status {
                StatusCode::OK => return Ok(response),
                StatusCode::UNAUTHORIZED if !asked => {
                    asked = true;
                    let challenge = challenge(&response.headers)
                        .ok_or_else(|| self.denied("asks for credentials in a way that is not known"))?;
                    let value = self.authenticate(challenge, reporter).await?;
                    *self.authorization.lock().await = Some(value);
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(self.denied(if self.auth.is_some() {
                        "refused the user name or password"
                    } else {
                        "wants a user name and a password"
                    }));
                }
                StatusCode::NOT_FOUND => {
                    return Err(ImageError::new(
                        Code::NotFound,
                        format!(
                            "{} has no {}:{}",
                            self.reference.host,
                            self.reference.repository,
                            self.reference.version.as_str()
                        ),
                    ));
                }
                status => return Err(download::refused(uri, status)),
            }
        }
    }

    async fn authenticate(&self, challenge: Challenge, reporter: &Reporter) -> Result<HeaderValue> {
        match challenge {
            Challenge::Basic => self.basic().ok_or_else(|| self.denied("wants a user name and a password")),
            Challenge::Bearer(parameters) => {
                let realm =
                    parameters.get("realm").ok_or_else(|| self.denied("does not say where tokens come from"))?;
                let realm_uri = parse_url(realm)?;
                // A password for an https registry must not travel in the clear.
                if self.base.starts_with("https:") && realm_uri.scheme_str() != Some("https") {
                    return Err(self.denied("wants credentials to be sent without encryption"));
                }
                let mut query = vec![("scope", format!("repository:{}:pull", self.reference.repository))];
                query.extend(parameters.get("service").map(|s| ("service", s.clone())));
                let pairs: Vec<String> = query.iter().map(|(k, v)| format!("{k}={}", encode(v))).collect();
                let separator = if realm_uri.query().is_some() { '&' } else { '?' };
                let uri = parse_url(&format!("{realm}{separator}{}", pairs.join("&")))?;
                let mut headers = HeaderMap::new();
                if let Some(basic) = self.basic() {
                    headers.insert(header::AUTHORIZATION, basic);
                }
                let response = self.inner.http.get(&uri, &headers, reporter.cancel()).await?;
                if !response.status.is_success() {
                    return Err(self.denied(&format!("gave no token: {}", response.status)));
                }
                let bytes = response.body.all(TOKEN_BYTES).await?;
                let token: Token =
                    serde_json::from_slice(&bytes).map_err(|_| self.denied("gave a token that cannot be read"))?;
                secret(&format!("Bearer {}", token.token))
                    .ok_or_else(|| self.denied("gave a token that cannot be sent"))
            }
        }
    }

    fn basic(&self) -> Option<HeaderValue> {
        let auth = self.auth.as_ref()?;
        let pair = format!("{}:{}", auth.username, auth.password);
        secret(&format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
    }

    fn denied(&self, what: &str) -> ImageError {
        ImageError::new(Code::RegistryAuth, format!("{} {what} for {}", self.reference.host, self.reference.repository))
    }
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// Percent-encodes all but unreserved characters (RFC 3986 2.3).
fn encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, b| {
        if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
            out.push(char::from(b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
        out
    })
}

/// The strongest challenge that is known.
pub(crate) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let all: Vec<&str> = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|v| v.to_str().ok()).collect();
    let scheme = |name: &str| {
        all.iter().find_map(|v| {
            let (head, rest) = v.trim().split_once(' ').unwrap_or((v.trim(), ""));
            head.eq_ignore_ascii_case(name).then_some(rest)
        })
    };
    if let Some(rest) = scheme("bearer") {
        return Some(Challenge::Bearer(parameters(rest)));
    }
    scheme("basic").map(|_| Challenge::Basic)
}

/// `a="b", c=d` with commas allowed inside of quotes.
fn parameters(text: &str) -> HashMap<String, String> {
    let mut found = HashMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(key.trim_matches([' ', ',']).to_ascii_lowercase(), value.trim().to_owned());
        rest = next;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read() {
        let mut headers = HeaderMap::new();
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"x\""));
        assert_eq!(challenge(&headers), Some(Challenge::Basic));
        let bearer = "Bearer realm=\"https://a.example/t?x=1\",service=\"r.example\",scope=\"repository:a:pull,push\"";
        headers.append(header::WWW_AUTHENTICATE, HeaderValue::from_static(bearer));
        let Some(Challenge::Bearer(found)) = challenge(&headers) else { panic!("no bearer challenge") };
        assert_eq!(found["realm"], "https://a.example/t?x=1");
        assert_eq!(found["service"], "r.example");
        assert_eq!(found["scope"], "repository:a:pull,push");
        assert_eq!(encode("repository:a/b:pull"), "repository%3Aa%2Fb%3Apull");
    }

    #[test]
    fn passwords_are_not_shown() {
        let shown = format!("{:?}", BasicAuth { username: "u".into(), password: "secret".into() });
        assert!(!shown.contains("secret"), "{shown}");
    }
}
