//! From the word for a kind to the kind: `instance`, `instances` and `i` are one.

use oblak_model::Kind;

use crate::error::{CliError, Result};
use crate::near::did_you_mean;
use crate::show::Show;

/// Something that can be done with any kind.
pub trait Visit {
    /// What comes out.
    type Out;
    /// Does it.
    async fn visit<K: Show>(self) -> Result<Self::Out>;
}

fn is<K: Kind>(word: &str) -> bool {
    word == K::KIND || word == K::PLURAL || K::ALIASES.contains(&word)
}

/// Does `visit` with the kind that `word` names.
///
/// # Errors
/// No such kind, and what the visit returns.
pub async fn visit<V: Visit>(word: &str, visit: V) -> Result<V::Out> {
    let word = word.to_ascii_lowercase().replace('_', "-");
    macro_rules! arms {
        ($($kind:ty),* $(,)?) => {
            $(if is::<$kind>(&word) { return Box::pin(visit.visit::<$kind>()).await; })*
        };
    }
    oblak_model::for_each_kind!(arms);
    Err(unknown(&word))
}

/// Names of all kinds.
pub fn names() -> Vec<&'static str> {
    macro_rules! names {
        ($($kind:ty),* $(,)?) => { vec![$(<$kind as Kind>::KIND),*] };
    }
    oblak_model::for_each_kind!(names)
}

/// The error for a word that is no kind.
pub fn unknown(word: &str) -> CliError {
    let guess = did_you_mean(word, names());
    let hint = if guess.is_empty() { format!("use one of {}", names().join(", ")) } else { guess };
    CliError::usage(format!("there is no kind {word:?}"), hint)
}

/// Whether a word names a kind.
pub fn is_kind(word: &str) -> bool {
    macro_rules! any {
        ($($kind:ty),* $(,)?) => { false $(|| is::<$kind>(word))* };
    }
    oblak_model::for_each_kind!(any)
}

/// Splits `KIND/NAME`, `KIND NAME` or `NAME` (an instance).
///
/// # Errors
/// Two names, or none.
pub fn split(what: &str, name: Option<&str>) -> Result<(String, String)> {
    match (what.split_once('/'), name) {
        (Some((kind, name)), None) if !kind.is_empty() && !name.is_empty() => Ok((kind.into(), name.into())),
        (None, Some(name)) => Ok((what.into(), name.into())),
        (None, None) if is_kind(what) => {
            Err(CliError::usage(format!("which {what}?"), format!("write {what}/NAME; `oblak get {what}` shows them")))
        }
        (None, None) => Ok(("instance".into(), what.into())),
        _ => {
            Err(CliError::usage(format!("{what:?} is not KIND/NAME"), "write for example instance/web or volume/data"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Name;
    impl Visit for Name {
        type Out = &'static str;
        async fn visit<K: Show>(self) -> Result<&'static str> {
            Ok(K::KIND)
        }
    }

    #[tokio::test]
    async fn words_for_kinds() {
        for (word, kind) in [
            ("instance", "instance"),
            ("instances", "instance"),
            ("i", "instance"),
            ("img", "image"),
            ("sg", "security-group"),
            ("Security_Groups", "security-group"),
            ("vol", "volume"),
        ] {
            assert_eq!(visit(word, Name).await.unwrap(), kind);
        }
        let error = visit("volum", Name).await.unwrap_err();
        assert_eq!(
            (error.message.as_str(), error.hint.as_str()),
            ("there is no kind \"volum\"", "did you mean volume?")
        );
        assert_eq!(error.code, crate::error::USAGE);
    }

    #[test]
    fn objects() {
        let pair = |a: &str, b: &str| Ok((a.to_string(), b.to_string()));
        assert_eq!(split("instance/big", None), pair("instance", "big"));
        assert_eq!(split("volume", Some("data")), pair("volume", "data"));
        assert_eq!(split("web", None), pair("instance", "web"));
        assert!(split("volume", None).is_err());
        assert!(split("volume/data", Some("x")).is_err());
        assert!(split("/x", None).is_err());
    }
}
