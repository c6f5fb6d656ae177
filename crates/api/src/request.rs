//! What is read from a request: query parameters, bodies, preconditions.

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use oblak_model::{ApiError, Code, Revision};
use serde::de::DeserializeOwned;

use crate::error::Fault;
use crate::state::App;

/// Query parameters in order. Handlers say which they know; others are refused.
#[derive(Debug, Default)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    /// Parses `application/x-www-form-urlencoded` text.
    pub fn parse(raw: Option<&str>) -> Result<Self, ApiError> {
        let mut out = Vec::new();
        for part in raw.unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
            let (name, value) = part.split_once('=').unwrap_or((part, ""));
            out.push((unescape(name)?, unescape(value)?));
        }
        Ok(Self(out))
    }

    /// Refuses parameters that are not in the list.
    pub fn only(&self, known: &[&str]) -> Result<(), ApiError> {
        match self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) if known.is_empty() => {
                Err(ApiError::new(Code::Malformed, format!("unknown query parameter {name:?}; this path takes none")))
            }
            Some((name, _)) => Err(ApiError::new(
                Code::Malformed,
                format!("unknown query parameter {name:?}; known are {}", known.join(", ")),
            )),
        }
    }

    /// The value of a parameter that may be given once.
    pub fn get(&self, name: &str) -> Result<Option<&str>, ApiError> {
        let mut values = self.0.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str());
        let first = values.next();
        if values.next().is_some() {
            return Err(ApiError::new(Code::Malformed, format!("query parameter {name:?} is given twice")));
        }
        Ok(first)
    }

    /// All values of a parameter.
    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// A parameter of another type.
    pub fn parsed<T: std::str::FromStr>(&self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        self.get(name)?
            .map(|text| {
                text.parse().map_err(|_| {
                    let short: String = text.chars().take(64).collect();
                    ApiError::new(Code::Malformed, format!("query parameter {name} is {short:?}; expected {expected}"))
                })
            })
            .transpose()
    }

    /// `true`, `1` or nothing after the name is yes.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name)? {
            None | Some("false" | "0") => Ok(false),
            Some("" | "true" | "1") => Ok(true),
            Some(_) => Err(ApiError::new(Code::Malformed, format!("query parameter {name} must be true or false"))),
        }
    }
}

fn unescape(text: &str) -> Result<String, ApiError> {
    let bad = || ApiError::new(Code::Malformed, "the query is not valid percent-encoded UTF-8");
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'+' => out.push(b' '),
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16)).ok_or_else(bad);
                let (high, low) = (digit()?, digit()?);
                out.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
            }
            other => out.push(other),
        }
    }
    String::from_utf8(out).map_err(|_| bad())
}

impl FromRequestParts<App> for Query {
    type Rejection = Fault;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Fault> {
        Ok(Self::parse(parts.uri.query())?)
    }
}

/// A whole body within the limit.
pub(crate) struct Payload(pub Bytes);

impl FromRequest<App> for Payload {
    type Rejection = Fault;
    async fn from_request(request: Request, app: &App) -> Result<Self, Fault> {
        let limit = app.config.limits.body_bytes;
        let too_large = || ApiError::new(Code::TooLarge, format!("the body is larger than {limit} bytes"));
        let declared = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if declared.is_some_and(|length| length > limit as u64) {
            return Err(too_large().into());
        }
        match Limited::new(request.into_body(), limit).collect().await {
            Ok(body) => Ok(Self(body.to_bytes())),
            Err(error) if error.is::<LengthLimitError>() => Err(too_large().into()),
            Err(error) => Err(ApiError::new(Code::Malformed, "the body ended early").inside(error.to_string()).into()),
        }
    }
}

/// Decodes a JSON body; an error names the field.
pub(crate) fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // Keeping track of the path costs as much as decoding, so it is only done for a body that is known to be wrong.
    if let Ok(value) = serde_json::from_slice(bytes) {
        return Ok(value);
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| malformed(&e, ""))?;
    reader.end().map_err(|e| ApiError::new(Code::Malformed, format!("the body is not one JSON value: {e}")))?;
    Ok(value)
}

/// Decodes a JSON value that lies at `base`.
pub(crate) fn from_value<T: DeserializeOwned>(value: serde_json::Value, base: &str) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|e| malformed(&e, base))
}

fn malformed(error: &serde_path_to_error::Error<serde_json::Error>, base: &str) -> ApiError {
    use serde_path_to_error::Segment;
    let mut pointer = base.to_string();
    for segment in error.path() {
        pointer.push('/');
        match segment {
            Segment::Seq { index } => pointer.push_str(&index.to_string()),
            Segment::Map { key } => pointer.push_str(&key.replace('~', "~0").replace('/', "~1")),
            Segment::Enum { variant } => pointer.push_str(variant),
            Segment::Unknown => pointer.push('?'),
        }
    }
    let inner = error.inner();
    if pointer.is_empty() || inner.is_syntax() || inner.is_eof() {
        return ApiError::new(Code::Malformed, format!("the body is not the JSON that is expected: {inner}"));
    }
    ApiError::new(Code::Malformed, format!("{pointer}: {inner}")).at(&pointer)
}

/// The revision of `If-Match`. `*` asks only that the object exists.
pub(crate) fn if_match(headers: &HeaderMap) -> Result<Option<Revision>, ApiError> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    parse_etag(text).map(Some).ok_or_else(|| {
        ApiError::new(Code::Malformed, "If-Match must be one ETag as it was sent, for example \"1-42\" in quotes")
    })
}

/// The revision of `If-None-Match`, when there is one. Taken out by itself, so that reads need no copy of all headers.
pub(crate) struct IfNoneMatch(pub Option<Revision>);

impl FromRequestParts<App> for IfNoneMatch {
    type Rejection = std::convert::Infallible;
    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Self::Rejection> {
        Ok(Self(parts.headers.get(header::IF_NONE_MATCH).and_then(|v| parse_etag(v.to_str().ok()?))))
    }
}

/// The revision in an ETag; quotes may be left out.
pub(crate) fn parse_etag(text: &str) -> Option<Revision> {
    text.trim().trim_start_matches("W/").trim_matches('"').parse().ok()
}

/// RFC 7396: objects are merged, null removes, anything else replaces.
pub(crate) fn merge_patch(target: &mut serde_json::Value, patch: serde_json::Value) {
    use serde_json::Value;
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(map) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            map.remove(&key);
        } else {
            merge_patch(map.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    #[test]
    fn the_examples_of_rfc_7396() {
        let cases = [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
        ];
        for (mut target, patch, expected) in cases {
            merge_patch(&mut target, patch.clone());
            assert_eq!(target, expected, "{patch}");
        }
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf =
            prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), any::<u8>().prop_map(Value::from)];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::btree_map("[a-c]", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn merging_twice_is_merging_once(target in value(), patch in value()) {
            let mut once = target;
            merge_patch(&mut once, patch.clone());
            let mut twice = once.clone();
            merge_patch(&mut twice, patch);
            prop_assert_eq!(once, twice);
        }
        #[test]
        fn queries_never_panic(text in "\\PC{0,40}") {
            let _ = Query::parse(Some(&text));
        }
        #[test]
        fn queries_round_trip(value in "\\PC{0,20}") {
            let escaped: String = value.bytes().map(|b| format!("%{b:02X}")).collect();
            let query = Query::parse(Some(&format!("label={escaped}"))).unwrap();
            prop_assert_eq!(query.get("label").unwrap(), Some(value.as_str()));
        }
    }

    #[test]
    fn unknown_parameters_are_refused_with_the_known_ones() {
        let query = Query::parse(Some("limit=1&lable=x")).unwrap();
        let error = query.only(&["limit", "label"]).unwrap_err();
        assert!(error.detail.contains("lable") && error.detail.contains("limit, label"), "{error}");
    }

    #[test]
    fn errors_name_the_field() {
        #[derive(serde::Deserialize, Debug)]
        struct Inner {
            #[allow(dead_code)]
            port: u16,
        }
        #[derive(serde::Deserialize, Debug)]
        struct Outer {
            #[allow(dead_code)]
            publish: Vec<Inner>,
        }
        let error = from_json::<Outer>(br#"{"publish":[{"port":1},{"port":"x"}]}"#).unwrap_err();
        assert_eq!(error.field.as_deref(), Some("/publish/1/port"));
        assert!(from_json::<Outer>(b"{").unwrap_err().field.is_none());
    }
}
