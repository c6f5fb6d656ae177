//! Label selectors: `tier=web,env!=test,gpu,!old`.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::meta::Labels;

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Requirement {
    /// `key=value`.
    Equals(String, String),
    /// `key!=value`; also holds when the key is missing.
    NotEquals(String, String),
    /// `key`.
    Exists(String),
    /// `!key`.
    Missing(String),
}

impl Requirement {
    /// Whether labels satisfy it.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Self::Equals(k, v) => labels.get(k) == Some(v),
            Self::NotEquals(k, v) => labels.get(k) != Some(v),
            Self::Exists(k) => labels.contains_key(k),
            Self::Missing(k) => !labels.contains_key(k),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equals(k, v) => write!(f, "{k}={v}"),
            Self::NotEquals(k, v) => write!(f, "{k}!={v}"),
            Self::Exists(k) => f.write_str(k),
            Self::Missing(k) => write!(f, "!{k}"),
        }
    }
}

/// All requirements must hold. An empty selector matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Selector(pub Vec<Requirement>);

impl Selector {
    /// Most requirements in one selector.
    pub const LIMIT: usize = 16;

    /// Whether labels satisfy all requirements.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|r| r.matches(labels))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, r) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str(",")?;
            }
            write!(f, "{r}")?;
        }
        Ok(())
    }
}

/// The text is not a selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a label selector; write for example tier=web,env!=test,gpu,!old")]
pub struct ParseSelectorError(String);

impl FromStr for Selector {
    type Err = ParseSelectorError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || ParseSelectorError(text.chars().take(128).collect());
        let mut out = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let requirement = if let Some((k, v)) = part.split_once("!=") {
                Requirement::NotEquals(k.trim().into(), v.trim().into())
            } else if let Some((k, v)) = part.split_once('=') {
                Requirement::Equals(k.trim().into(), v.trim_start_matches('=').trim().into())
            } else if let Some(k) = part.strip_prefix('!') {
                Requirement::Missing(k.trim().into())
            } else {
                Requirement::Exists(part.into())
            };
            let (key, value) = match &requirement {
                Requirement::Equals(k, v) | Requirement::NotEquals(k, v) => (k.as_str(), v.as_str()),
                Requirement::Exists(k) | Requirement::Missing(k) => (k.as_str(), ""),
            };
            if crate::validate::label_problem(key, value).is_some() || out.len() >= Self::LIMIT {
                return Err(bad());
            }
            out.push(requirement);
        }
        Ok(Self(out))
    }
}

impl Serialize for Selector {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Selector {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        std::borrow::Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Selector {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Selector".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "description": "Label selector such as tier=web,env!=test,gpu,!old"})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parses_and_matches() {
        let s: Selector = "tier=web,env!=test,gpu,!old".parse().unwrap();
        assert_eq!(s.to_string(), "tier=web,env!=test,gpu,!old");
        let labels =
            |list: &[(&str, &str)]| list.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect::<Labels>();
        assert!(s.matches(&labels(&[("tier", "web"), ("gpu", "")])));
        assert!(!s.matches(&labels(&[("tier", "web"), ("gpu", ""), ("old", "1")])));
        assert!(!s.matches(&labels(&[("tier", "db"), ("gpu", "")])));
        assert!("a b=c".parse::<Selector>().is_err());
    }

    proptest! {
        #[test]
        fn never_panics(text in ".{0,60}") {
            if let Ok(s) = text.parse::<Selector>() {
                prop_assert_eq!(s.to_string().parse::<Selector>().unwrap(), s);
            }
        }
    }
}
