//! Rules over labels, used on nodes (where may it run) and on instances (what it wants to be near or far from).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One condition on a set of labels. Written `disk=ssd`, `disk!=hdd`, `gpu` (the key exists), `!gpu` (it does not).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LabelRule {
    /// The key has this value.
    Is(String, String),
    /// The key has another value, or is missing.
    IsNot(String, String),
    /// The key is there, with any value.
    Exists(String),
    /// The key is missing.
    Absent(String),
}

impl LabelRule {
    /// `key = value`.
    pub fn is(key: impl Into<String>, value: impl Into<String>) -> Self {
        Self::Is(key.into(), value.into())
    }

    /// Does the rule hold, given the value of its key (none when the key is missing)?
    pub(crate) fn holds(&self, value: Option<&str>) -> bool {
        match self {
            Self::Is(_, wanted) => value == Some(wanted.as_str()),
            Self::IsNot(_, unwanted) => value != Some(unwanted.as_str()),
            Self::Exists(_) => value.is_some(),
            Self::Absent(_) => value.is_none(),
        }
    }

    /// The key that the rule looks at.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Is(key, _) | Self::IsNot(key, _) | Self::Exists(key) | Self::Absent(key) => key,
        }
    }
}

impl fmt::Display for LabelRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Is(key, value) => write!(f, "{key}={value}"),
            Self::IsNot(key, value) => write!(f, "{key}!={value}"),
            Self::Exists(key) => f.write_str(key),
            Self::Absent(key) => write!(f, "!{key}"),
        }
    }
}

/// The text is not a label rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a label rule: write key=value, key!=value, key or !key")]
pub struct ParseRuleError(String);

impl FromStr for LabelRule {
    type Err = ParseRuleError;

    fn from_str(text: &str) -> Result<Self, ParseRuleError> {
        let rule = if let Some((key, value)) = text.split_once("!=") {
            Self::IsNot(key.to_owned(), value.to_owned())
        } else if let Some((key, value)) = text.split_once('=') {
            Self::is(key, value)
        } else if let Some(key) = text.strip_prefix('!') {
            Self::Absent(key.to_owned())
        } else {
            Self::Exists(text.to_owned())
        };
        if rule.key().is_empty() || rule.key().contains(['=', '!', ' ', ',']) {
            return Err(ParseRuleError(text.chars().take(128).collect()));
        }
        Ok(rule)
    }
}

impl Serialize for LabelRule {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LabelRule {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Prints a selector as `app=web,!canary`.
pub(crate) fn join_rules(rules: &[LabelRule]) -> String {
    if rules.is_empty() {
        return "any instance".to_owned();
    }
    rules.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Labels of an instance, sorted by key, one value per key.
pub(crate) fn value_of<'a>(labels: &'a [(Box<str>, Box<str>)], key: &str) -> Option<&'a str> {
    labels.binary_search_by(|(k, _)| k.as_ref().cmp(key)).ok().map(|at| labels[at].1.as_ref())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_print_what_they_read() {
        for text in ["disk=ssd", "disk!=hdd", "gpu", "!gpu", "a=", "a=b=c"] {
            assert_eq!(text.parse::<LabelRule>().unwrap().to_string(), text);
        }
        for text in ["", "!", "=x", "!=x", "a b", "a,b", "!!a"] {
            assert!(text.parse::<LabelRule>().is_err(), "{text}");
        }
    }

    #[test]
    fn rules_hold_as_documented() {
        let rule = |text: &str| text.parse::<LabelRule>().unwrap();
        for (text, on_ssd, on_hdd, on_none) in [
            ("disk=ssd", true, false, false),
            ("disk!=ssd", false, true, true),
            ("disk", true, true, false),
            ("!disk", false, false, true),
        ] {
            assert_eq!(rule(text).holds(Some("ssd")), on_ssd);
            assert_eq!(rule(text).holds(Some("hdd")), on_hdd);
            assert_eq!(rule(text).holds(None), on_none);
        }
    }
}
