//! Files for `apply`: YAML documents or JSON, read strictly, with the line of what is wrong.

use oblak_model::meta::Labels;
use oblak_model::object::default_spec;
use oblak_model::wire::{Resource, ResourceMeta};
use oblak_model::{Kind, Object, Problem, Scope};
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::error::{CliError, Result};
use crate::kinds::{self, Visit};
use crate::near::did_you_mean;
use crate::show::Show;

/// Largest file that is read, in bytes.
pub const LIMIT: u64 = 8 << 20;

/// Metadata as people write it and as `get -o yaml` prints it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Meta {
    name: String,
    #[serde(default)]
    labels: Labels,
    #[serde(default, rename = "id")]
    _id: IgnoredAny,
    #[serde(default, rename = "project")]
    _project: IgnoredAny,
    #[serde(default, rename = "generation")]
    _generation: IgnoredAny,
    #[serde(default, rename = "revision")]
    _revision: IgnoredAny,
    #[serde(default, rename = "created_at")]
    _created_at: IgnoredAny,
    #[serde(default, rename = "deleted_at")]
    _deleted_at: IgnoredAny,
    #[serde(default, rename = "finalizers")]
    _finalizers: IgnoredAny,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, bound = "")]
struct Typed<K: Kind> {
    #[serde(rename = "kind")]
    _kind: IgnoredAny,
    metadata: Meta,
    #[serde(default)]
    spec: Option<K::Spec>,
    #[serde(default, rename = "status")]
    _status: IgnoredAny,
}

#[derive(Debug, Deserialize)]
struct Peek {
    #[serde(default)]
    kind: Option<String>,
    #[serde(default)]
    items: Option<Vec<serde_json::Value>>,
}

/// Reads all resources of a file. `file` is its name, for messages.
///
/// # Errors
/// What is wrong, with file and line.
pub async fn read(file: &str, text: &str) -> Result<Vec<Resource>> {
    let mut resources = Vec::new();
    for (first, document) in documents(text) {
        read_document(file, first, document, &mut resources).await?;
    }
    Ok(resources)
}

async fn read_document(file: &str, first: usize, text: &str, out: &mut Vec<Resource>) -> Result<()> {
    let value: serde_json::Value =
        serde_norway::from_str(text).map_err(|e| bad(file, first, &e, "the file is not YAML"))?;
    match value {
        serde_json::Value::Null => Ok(()),
        serde_json::Value::Array(items) => each(file, first, items, out).await,
        _ => {
            let peek: Peek = serde_norway::from_str(text).map_err(|e| bad(file, first, &e, "not a resource"))?;
            match (peek.kind, peek.items) {
                (Some(kind), _) => {
                    out.push(kinds::visit(&kind, One { file, first, text }).await.map_err(|e| at(file, first, e))?);
                    Ok(())
                }
                (None, Some(items)) => each(file, first, items, out).await,
                (None, None) => Err(CliError::usage(
                    format!("{file}:{first}: the resource has no kind"),
                    "begin it with `kind:`, for example `kind: instance`",
                )),
            }
        }
    }
}

/// Items of a list: they have no lines of their own, so they are named by number.
async fn each(file: &str, first: usize, items: Vec<serde_json::Value>, out: &mut Vec<Resource>) -> Result<()> {
    for (i, item) in items.into_iter().enumerate() {
        let text = serde_norway::to_string(&item).map_err(|e| bad(file, first, &e, "cannot be read"))?;
        let kind = item.get("kind").and_then(|k| k.as_str()).ok_or_else(|| {
            CliError::usage(
                format!("{file}:{first}: item {} has no kind", i + 1),
                "give each item kind, metadata and spec",
            )
        })?;
        let name = format!("{file}, item {}", i + 1);
        let resource = kinds::visit(kind, One { file: &name, first: 1, text: &text }).await;
        out.push(resource.map_err(|e| at(&name, 1, e))?);
    }
    Ok(())
}

struct One<'a> {
    file: &'a str,
    first: usize,
    text: &'a str,
}

impl Visit for One<'_> {
    type Out = Resource;
    async fn visit<K: Show>(self) -> Result<Resource> {
        let (file, first) = (self.file, self.first);
        if !K::CREATABLE {
            return Err(CliError::usage(
                format!("{file}:{first}: kind {:?} cannot be applied", K::KIND),
                "the system makes it by itself; take it out of the file",
            ));
        }
        if K::SCOPE != Scope::Project {
            return Err(CliError::usage(
                format!("{file}:{first}: kind {:?} cannot be applied: it is of the whole cloud", K::KIND),
                format!("`oblak {} --help` shows how to make one; take it out of the file", K::KIND),
            ));
        }
        // Read as what it is, so that a wrong field is found here, with its line.
        let typed: Typed<K> =
            serde_norway::from_str(self.text).map_err(|e| bad(file, first, &e, &format!("{} is wrong", K::KIND)))?;
        let spec = match typed.spec {
            Some(spec) => spec,
            None => default_spec::<K>().map_err(|text| {
                let missing = text.split('`').nth(1).unwrap_or_default();
                let what = format!("{file}:{first}: {}/{} is wrong: {text}", K::KIND, typed.metadata.name);
                CliError::usage(what, format!("give it a spec with {missing}"))
            })?,
        };
        let mut object = Object::<K>::new(&typed.metadata.name, spec);
        object.metadata.labels = typed.metadata.labels;
        if let Err(problem) = object.validate() {
            let what = format!("{file}:{first}: {}", object.describe());
            let mut error = CliError::usage(format!("{what} is not valid"), "correct what is named and try again");
            error.problems = problem.errors;
            if error.problems.is_empty() {
                error.problems = vec![Problem { field: problem.field.unwrap_or_default(), detail: problem.detail }];
            }
            return Err(error);
        }
        let spec = serde_json::to_value(&object.spec)
            .map_err(|e| CliError::new(format!("{file}:{first}: {e}"), "check the spec"))?;
        let metadata = ResourceMeta { name: object.metadata.name, labels: object.metadata.labels };
        Ok(Resource { kind: K::KIND.into(), metadata, spec, status: None })
    }
}

/// Puts file and line before a message that has none.
fn at(file: &str, first: usize, mut error: CliError) -> CliError {
    if !error.message.starts_with(file) {
        error.message = format!("{file}:{first}: {}", error.message);
    }
    error
}

/// An error of the YAML reader, with the line counted in the whole file.
fn bad(file: &str, first: usize, error: &serde_norway::Error, what: &str) -> CliError {
    let line = error.location().map_or(first, |l| first + l.line().saturating_sub(1));
    let text = error.to_string();
    // The reader counts within the document and says so at the end of its message.
    let text = text.split(" at line ").next().unwrap_or(&text);
    // serde names all fields there are; the one that was meant is enough.
    let mut quoted = text.split('`').skip(1).step_by(2);
    let guess = match (text.split_once(", expected"), quoted.next()) {
        (Some(_), Some(wrong)) => did_you_mean(wrong, quoted),
        _ => String::new(),
    };
    let text = text.split_once(", expected").filter(|_| !guess.is_empty()).map_or(text, |(head, _)| head);
    let hint = if guess.is_empty() { "correct the line and try again".into() } else { guess };
    CliError::usage(format!("{file}:{line}: {what}: {text}"), hint)
}

/// The documents of a YAML stream with their first lines. A line `---` always separates (YAML 1.2.2, 9.1.4).
fn documents(text: &str) -> Vec<(usize, &str)> {
    let mut out = Vec::new();
    let (mut start, mut first, mut offset) = (0, 1, 0);
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.trim_end();
        if marker == "---" || marker.starts_with("--- ") || marker == "..." {
            out.push((first, &text[start..offset]));
            // What follows the dashes on the same line belongs to the document.
            start = offset + marker.len().min(3);
            first = i + 1;
        }
        offset += line.len();
    }
    out.push((first, &text[start..]));
    out.retain(|(_, text)| text.lines().any(|l| !l.trim().is_empty() && !l.trim_start().starts_with('#')));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
# A stack
---
kind: volume
metadata:
  name: data
  labels: {tier: db}
spec:
  size: 1GiB
---
kind: instance
metadata: {name: web}
spec:
  image: tiny
  volumes:
    - volume: data
";

    #[tokio::test]
    async fn reads_documents() {
        let resources = read("stack.yaml", GOOD).await.unwrap();
        assert_eq!(resources.len(), 2);
        assert_eq!((resources[0].kind.as_str(), resources[0].metadata.name.as_str()), ("volume", "data"));
        assert_eq!(resources[0].metadata.labels["tier"], "db");
        assert_eq!(resources[0].spec["size"], 1_073_741_824_u64);
        assert_eq!(resources[1].spec["volumes"][0]["volume"], "data");
    }

    #[tokio::test]
    async fn reads_json_lists_and_what_get_printed() {
        let volume = oblak_model::Volume::new(
            "data",
            oblak_model::VolumeSpec { size: oblak_model::Size::gib(1), ..Default::default() },
        );
        let one = serde_json::to_string_pretty(&volume).unwrap();
        assert_eq!(read("a.json", &one).await.unwrap()[0].metadata.name, "data");
        let list = serde_json::json!({"items": [volume], "revision": "1-2"}).to_string();
        assert_eq!(read("a.json", &list).await.unwrap()[0].kind, "volume");
        let array = serde_json::json!([volume]).to_string();
        assert_eq!(read("a.json", &array).await.unwrap().len(), 1);
        assert!(read("a.yaml", "# nothing\n---\n").await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_spec_of_defaults_may_be_left_out() {
        for text in ["kind: network\nmetadata: {name: blue}\n", "kind: network\nmetadata: {name: blue}\nspec:\n"] {
            let resources = read("a.yaml", text).await.unwrap();
            assert_eq!(resources[0].spec["mtu"], 1500, "{text}");
        }
    }

    async fn message(text: &str) -> String {
        read("s.yaml", text).await.unwrap_err().message
    }

    #[tokio::test]
    async fn errors_name_the_line() {
        // An unknown field in the second document.
        let text = GOOD.replace("  image: tiny", "  image: tiny\n  flavour: m");
        let error = read("s.yaml", &text).await.unwrap_err();
        assert_eq!(error.message, "s.yaml:14: instance is wrong: spec: unknown field `flavour`");
        assert_eq!(error.hint, "did you mean flavor?");
        // A value of the wrong type.
        let error = message(&GOOD.replace("1GiB", "much")).await;
        assert!(error.contains("\"much\" is not a size"), "{error}");
        // Broken YAML.
        let error = message("kind: volume\nmetadata: {name: data\nspec: x\n").await;
        assert!(error.starts_with("s.yaml:"), "{error}");
    }

    #[tokio::test]
    async fn errors_say_what_would_be_right() {
        let error = read("s.yaml", "kind: instanse\nmetadata: {name: a}\n").await.unwrap_err();
        assert_eq!(error.message, "s.yaml:1: there is no kind \"instanse\"");
        assert_eq!(error.hint, "did you mean instance?");
        assert_eq!(message("metadata: {name: a}\n").await, "s.yaml:1: the resource has no kind");
        let error = message("kind: flavor\nmetadata: {name: a}\n").await;
        assert_eq!(error, "s.yaml:1: kind \"flavor\" cannot be applied: it is of the whole cloud");
        let error = message("kind: event\nmetadata: {name: a}\nspec: {}\n").await;
        assert_eq!(error, "s.yaml:1: kind \"event\" cannot be applied");
        let error = read("s.yaml", "kind: volume\nmetadata: {name: A_b}\nspec: {size: 1}\n").await.unwrap_err();
        assert_eq!(error.message, "s.yaml:1: volume/A_b is not valid");
        assert_eq!(error.problems.len(), 3, "{:?}", error.problems);
        assert_eq!(error.code, crate::error::USAGE);
        let error = read("s.yaml", "kind: key\nmetadata: {name: a}\n").await.unwrap_err();
        assert_eq!(error.message, "s.yaml:1: key/a is wrong: spec: missing field `public_key`");
        assert_eq!(error.hint, "give it a spec with public_key");
    }
}
