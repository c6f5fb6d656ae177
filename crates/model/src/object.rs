//! The shape that all resources share: `{kind, metadata, spec, status}`.

use std::fmt::Debug;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::meta::{Metadata, Revision};
use crate::validate::{self, Problems};

/// Who owns objects of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// The whole cloud: nodes, users, flavors.
    Cloud,
    /// An organization: projects.
    Organization,
    /// A project: what tenants make.
    Project,
}

/// A resource kind: its names, its types, its rules.
pub trait Kind: Sized + Send + Sync + Debug + Clone + PartialEq + 'static {
    /// Singular, as in the `kind` field: `security-group`.
    const KIND: &'static str;
    /// Plural, as in paths: `security-groups`.
    const PLURAL: &'static str;
    /// Who owns it.
    const SCOPE: Scope;
    /// Short forms that the command line accepts.
    const ALIASES: &'static [&'static str] = &[];
    /// Whether users create it through the API (events and ports of instances are made by the system too).
    const CREATABLE: bool = true;
    /// What is asked for.
    type Spec: Serialize + DeserializeOwned + JsonSchema + Clone + Debug + PartialEq + Send + Sync;
    /// What is.
    type Status: Serialize + DeserializeOwned + JsonSchema + Clone + Debug + PartialEq + Default + Send + Sync;

    /// Notes what is wrong with a spec. Pure: references to other objects are checked by the API.
    fn validate(spec: &Self::Spec, problems: &mut Problems);

    /// Notes what may not change from `old` to `new`.
    fn validate_update(_old: &Self::Spec, _new: &Self::Spec, _problems: &mut Problems) {}

    /// Why `name` is not a name for this kind.
    fn name_problem(name: &str) -> Option<String> {
        crate::name::problem(name)
    }
}

/// One resource.
#[derive(Clone, Debug, PartialEq)]
pub struct Object<K: Kind> {
    /// Identity.
    pub metadata: Metadata,
    /// What is asked for.
    pub spec: K::Spec,
    /// What is.
    pub status: K::Status,
}

impl<K: Kind> Object<K> {
    /// A new object that no server has seen yet.
    pub fn new(name: &str, spec: K::Spec) -> Self {
        Self { metadata: Metadata { name: name.into(), ..Metadata::default() }, spec, status: K::Status::default() }
    }

    /// `kind/name`, as people write it.
    #[must_use]
    pub fn describe(&self) -> String {
        format!("{}/{}", K::KIND, self.metadata.name)
    }

    /// The scope segment of store keys: the project, or `_` for kinds that no project owns.
    #[must_use]
    pub fn scope_key(&self) -> &str {
        self.metadata.project.as_deref().unwrap_or("_")
    }

    /// Everything that is wrong with the object by itself.
    ///
    /// # Errors
    /// An `invalid` error that names each field.
    pub fn validate(&self) -> Result<(), crate::ApiError> {
        let mut problems = Problems::new();
        problems.add_some("/metadata/name", K::name_problem(&self.metadata.name));
        validate::labels(&self.metadata.labels, "/metadata/labels", &mut problems);
        K::validate(&self.spec, &mut problems);
        problems.into_result()
    }
}

#[derive(Serialize)]
struct OutShape<'a, K: Kind> {
    kind: &'static str,
    metadata: &'a Metadata,
    spec: &'a K::Spec,
    status: &'a K::Status,
}

#[derive(Deserialize)]
#[serde(bound = "", deny_unknown_fields)]
struct InShape<K: Kind> {
    #[serde(default)]
    kind: Option<String>,
    metadata: Metadata,
    #[serde(default)]
    spec: Option<K::Spec>,
    #[serde(default)]
    status: Option<K::Status>,
}

impl<K: Kind> Serialize for Object<K> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        OutShape::<K> { kind: K::KIND, metadata: &self.metadata, spec: &self.spec, status: &self.status }
            .serialize(serializer)
    }
}

impl<'de, K: Kind> Deserialize<'de> for Object<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let shape = InShape::<K>::deserialize(deserializer)?;
        if let Some(kind) = shape.kind.as_deref().filter(|k| *k != K::KIND) {
            return Err(serde::de::Error::custom(format!("kind is {kind:?}; expected {:?}", K::KIND)));
        }
        let spec = match shape.spec {
            Some(spec) => spec,
            None => default_spec::<K>().map_err(serde::de::Error::custom)?,
        };
        Ok(Self { metadata: shape.metadata, spec, status: shape.status.unwrap_or_default() })
    }
}

/// The spec of somebody who wrote none: what `spec: {}` would be.
///
/// # Errors
/// When a field has no default; the text names it.
pub fn default_spec<K: Kind>() -> Result<K::Spec, String> {
    let nothing = std::iter::empty::<(&str, &str)>();
    let empty = serde::de::value::MapDeserializer::<_, serde::de::value::Error>::new(nothing);
    K::Spec::deserialize(empty).map_err(|e| format!("spec: {e}"))
}

impl<K: Kind> JsonSchema for Object<K> {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        pascal(K::KIND).into()
    }
    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let metadata = generator.subschema_for::<Metadata>();
        let spec = generator.subschema_for::<K::Spec>();
        let status = generator.subschema_for::<K::Status>();
        schemars::json_schema!({
            "type": "object",
            "required": ["metadata", "spec"],
            "properties": {"kind": {"const": K::KIND}, "metadata": metadata, "spec": spec, "status": status}
        })
    }
}

/// `security-group` → `SecurityGroup`.
#[must_use]
pub fn pascal(kind: &str) -> String {
    kind.split('-')
        .map(|part| {
            let mut chars = part.chars();
            chars.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(chars).collect::<String>()
        })
        .collect()
}

/// A page of objects.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct List<K: Kind> {
    /// The objects, by name.
    pub items: Vec<Object<K>>,
    /// The revision that the page shows; watch from here.
    pub revision: Revision,
    /// Cursor of the next page; null on the last.
    #[serde(default)]
    pub next: Option<String>,
}

/// Calls a macro with every kind: `for_each_kind!(m)` expands to `m!(ProjectKind, UserKind, ...)`.
#[macro_export]
macro_rules! for_each_kind {
    ($callback:ident) => {
        $callback! {
            $crate::ProjectKind, $crate::UserKind, $crate::TokenKind, $crate::KeyKind, $crate::FlavorKind, $crate::ImageKind,
            $crate::InstanceKind, $crate::NetworkKind, $crate::SubnetKind, $crate::PortKind, $crate::SecurityGroupKind,
            $crate::VolumeKind, $crate::SnapshotKind, $crate::NodeKind, $crate::JoinTokenKind,
            $crate::EventKind
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Key, KeyKind, KeySpec};

    #[test]
    fn every_promised_field_is_there_and_is_taken_back() {
        let mut key = Key::new("id", KeySpec { public_key: "ssh-ed25519 AAAA".into() });
        let text = serde_json::to_string(&key).unwrap();
        assert!(text.contains("\"project\":null,\"labels\":{},"), "{text}");
        key.metadata.project = Some("default".into());
        let text = serde_json::to_string(&key).unwrap();
        assert_eq!(
            text,
            "{\"kind\":\"key\",\"metadata\":{\"id\":\"00000000-0000-0000-0000-000000000000\",\"name\":\"id\",\
             \"project\":\"default\",\"labels\":{},\"generation\":0,\"revision\":\"0-0\",\
             \"created_at\":\"1970-01-01T00:00:00.000000Z\"},\"spec\":{\"public_key\":\"ssh-ed25519 AAAA\"},\"status\":{}}"
        );
        assert_eq!(serde_json::from_str::<Key>(&text).unwrap(), key);
        let list = List { items: vec![key], revision: Revision::new(1, 2), next: None };
        let text = serde_json::to_string(&list).unwrap();
        assert!(
            text.starts_with("{\"items\":[{\"kind\":") && text.ends_with("],\"revision\":\"1-2\",\"next\":null}"),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<List<KeyKind>>(&text).unwrap(), list);
    }

    #[test]
    fn a_spec_of_defaults_may_be_left_out() {
        let network: crate::Network = serde_json::from_str(r#"{"metadata": {"name": "blue"}}"#).unwrap();
        assert_eq!(network.spec, crate::NetworkSpec::default());
        for empty in [r#"{"metadata": {"name": "web"}}"#, r#"{"metadata": {"name": "web"}, "spec": null}"#] {
            let error = serde_json::from_str::<crate::Instance>(empty).unwrap_err().to_string();
            assert!(error.starts_with("spec: missing field `image`"), "{error}");
        }
    }
}
