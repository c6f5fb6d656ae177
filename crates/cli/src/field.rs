//! Fields of objects in the words of people: the API names them by JSON pointers (RFC 6901), people gave flags or wrote files.

/// Which flag leads to which field, where the last name of the field is not the name of the flag.
const FLAGS: [(&str, &str); 14] = [
    ("/metadata/labels", "label"),
    ("/spec/addresses", "address"),
    ("/spec/container/read_only_root", "read-only"),
    ("/spec/keys", "key"),
    ("/spec/networks", "network"),
    ("/spec/placement/node_selector", "node-selector"),
    ("/spec/placement/zones", "zone"),
    ("/spec/restart_policy", "restart"),
    ("/spec/security_groups", "security-group"),
    ("/spec/source/insecure", "insecure"),
    ("/spec/source/reference", "from-registry"),
    ("/spec/source/url", "from-url"),
    ("/spec/user_data", "user-data"),
    ("/spec/volumes", "volume"),
];

/// The text with every pointer in it replaced: by the flag when the command has one (`flags`, without dashes), by `the name`, or by the path
/// as one writes it in a file: `spec.publish[0]`.
pub fn in_words(text: &str, flags: &[String]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut before = ' ';
    while let Some(next) = rest.chars().next() {
        let begins = [' ', '(', '"', '`'].contains(&before);
        let length = if begins { pointer(rest) } else { 0 };
        if length > 0 {
            out.push_str(&word(&rest[..length], flags));
            rest = &rest[length..];
            before = '.';
        } else {
            out.push(next);
            rest = &rest[next.len_utf8()..];
            before = next;
        }
    }
    out
}

/// Length of the pointer to a field at the start of the text; 0 when there is none.
fn pointer(text: &str) -> usize {
    const ROOTS: [&str; 4] = ["/metadata", "/spec", "/status", "/resources/"];
    let ends = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-');
    let found = ROOTS.iter().find_map(|root| text.strip_prefix(root).filter(|rest| root.ends_with('/') || ends(rest)));
    if found.is_none() {
        return 0;
    }
    let part = |c: char| c.is_ascii_alphanumeric() || ['/', '_', '-', '~', '.'].contains(&c);
    text[..text.find(|c| !part(c)).unwrap_or(text.len())].trim_end_matches('.').len()
}

fn word(pointer: &str, flags: &[String]) -> String {
    // Where in a list of resources it is means nothing to people: the message names the resource.
    let inside = pointer.strip_prefix("/resources/").map(|rest| rest.find('/').map_or("", |at| &rest[at..]));
    let pointer = inside.unwrap_or(pointer);
    let has = |flag: &str| flags.iter().any(|f| f == flag);
    let listed = FLAGS
        .iter()
        .find(|(field, _)| pointer.strip_prefix(field).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')));
    let own = pointer.split('/').nth(2).unwrap_or_default().replace('_', "-");
    match listed.map_or(own.as_str(), |(_, flag)| *flag) {
        flag if has(flag) => format!("--{flag}"),
        "name" if pointer == "/metadata/name" => "the name".into(),
        _ => path(pointer),
    }
}

/// `/spec/publish/0/port` as `spec.publish[0].port`.
fn path(pointer: &str) -> String {
    let mut out = String::new();
    for part in pointer.split('/').skip(1) {
        let part = part.replace("~1", "/").replace("~0", "~");
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            out.push_str(&format!("[{part}]"));
        } else {
            out.push_str(if out.is_empty() { "" } else { "." });
            out.push_str(&part);
        }
    }
    if out.is_empty() { "the whole".into() } else { out }
}

/// The flags of the command that these words call.
pub fn flags_of(root: &clap::Command, words: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut command = root;
    for word in words {
        if let Some(below) = command.find_subcommand(&word) {
            command = below;
        }
    }
    command.get_arguments().filter_map(|a| a.get_long()).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        let flags = ["name", "publish", "from-url", "network"].map(String::from);
        in_words(text, &flags)
    }

    #[test]
    fn a_field_is_named_as_the_flag_that_sets_it() {
        assert_eq!(words("instance/Bad: /metadata/name: contains 'B'"), "instance/Bad: --name: contains 'B'");
        assert_eq!(words("correct /spec/source/url and try again"), "correct --from-url and try again");
        assert_eq!(words("/spec/publish/0/port (0): must not be 0"), "--publish (0): must not be 0");
        assert_eq!(words("/spec/networks/1/address: is taken"), "--network: is taken");
    }

    #[test]
    fn without_a_flag_it_is_a_path_as_in_a_file() {
        assert_eq!(in_words("/metadata/name: is empty", &[]), "the name: is empty");
        assert_eq!(in_words("/spec/rules/0/port: is bad.", &[]), "spec.rules[0].port: is bad.");
        assert_eq!(in_words("/resources/3/spec/image: see /spec.", &[]), "spec.image: see spec.");
        assert_eq!(in_words("/metadata/labels/a~1b: no", &[]), "metadata.labels.a/b: no");
    }

    #[test]
    fn other_text_stays() {
        for text in ["cannot read /home/spec/x", "a/spec/b", "täglich /specific", ""] {
            assert_eq!(in_words(text, &[]), text);
        }
    }
}
