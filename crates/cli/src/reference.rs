//! The reference of the command line, made from what clap knows.

use std::fmt::Write;

use clap::{Arg, ArgAction, Command};

/// Markdown of every visible command and flag. The same program always gives the same text.
#[must_use]
pub fn reference(root: &Command) -> String {
    let mut root = root.clone();
    root.build();
    let mut out = String::from("# Command line\n\n");
    if let Some(about) = root.get_about() {
        let _ = writeln!(out, "{about}\n");
    }
    out.push_str(EXIT_CODES);
    out.push_str("\n## Options of every command\n");
    let global: Vec<&Arg> = root.get_arguments().filter(|a| a.is_global_set() && shown(a)).collect();
    arguments(&mut out, &global);
    for command in root.get_subcommands().filter(|c| !c.is_hide_set()) {
        section(&mut out, command, root.get_name(), 2);
    }
    out
}

const EXIT_CODES: &str = "\
Data goes to standard output, progress and notices to standard error.

| Exit code | Meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage |
| 3 | not found |
| 4 | does not fit on any node |
| 5 | not done in time |
| 141 | the reader of the output went away |

`exec` and `ssh` pass the exit code of the command inside on.
";

fn shown(arg: &Arg) -> bool {
    !arg.is_hide_set() && arg.get_id() != "help" && arg.get_id() != "version"
}

fn section(out: &mut String, command: &Command, parent: &str, level: usize) {
    let path = format!("{parent} {}", command.get_name());
    let _ = writeln!(out, "\n{} {path}\n", "#".repeat(level));
    if let Some(about) = command.get_long_about().or(command.get_about()) {
        let _ = writeln!(out, "{}\n", sentence(&about.to_string()));
    }
    let aliases: Vec<String> = command.get_visible_aliases().map(|a| format!("`{a}`")).collect();
    if !aliases.is_empty() {
        let _ = writeln!(out, "Also: {}\n", aliases.join(", "));
    }
    let usage = command.clone().render_usage().to_string();
    let usage = usage.trim_start_matches("Usage:").split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(out, "```\n{usage}\n```");
    let own: Vec<&Arg> = command.get_arguments().filter(|a| !a.is_global_set() && shown(a)).collect();
    arguments(out, &own);
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        section(out, sub, &path, level + 1);
    }
}

fn arguments(out: &mut String, args: &[&Arg]) {
    if args.is_empty() {
        return;
    }
    out.push_str("\n| Argument | Meaning |\n|---|---|\n");
    for arg in args {
        let _ = writeln!(out, "| `{}` | {} |", cell(&spelling(arg)), cell(&meaning(arg)));
    }
}

/// A `|` would end the cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// clap takes the full stop of a help text away.
fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() || text.ends_with(['.', '!', '?', ')']) { text.into() } else { format!("{text}.") }
}

fn spelling(arg: &Arg) -> String {
    let value = if matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::Count) {
        String::new()
    } else {
        let names = arg.get_value_names().unwrap_or_default();
        names.iter().map(|n| format!(" <{n}>")).collect()
    };
    let flags: Vec<String> =
        arg.get_short().map(|s| format!("-{s}")).into_iter().chain(arg.get_long().map(|l| format!("--{l}"))).collect();
    if flags.is_empty() { value.trim_start().to_string() } else { format!("{}{value}", flags.join(", ")) }
}

fn meaning(arg: &Arg) -> String {
    let mut text = arg.get_help().map(|h| sentence(&h.to_string())).unwrap_or_default();
    let flag = matches!(arg.get_action(), ArgAction::SetTrue);
    let words: Vec<String> = arg.get_possible_values().iter().map(|v| format!("`{}`", v.get_name())).collect();
    if !flag && !words.is_empty() {
        let _ = write!(text, " One of {}.", words.join(", "));
    }
    if !flag && !arg.is_hide_default_value_set() {
        let defaults: Vec<_> = arg.get_default_values().iter().map(|d| d.to_string_lossy()).collect();
        if !defaults.is_empty() {
            let _ = write!(text, " Default: `{}`.", defaults.join(" "));
        }
    }
    if let Some(env) = arg.get_env() {
        let _ = write!(text, " Environment: `{}`.", env.to_string_lossy());
    }
    if matches!(arg.get_action(), ArgAction::Append) {
        text.push_str(" May be given several times.");
    }
    text
}
