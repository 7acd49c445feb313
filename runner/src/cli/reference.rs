//! The command line as a Markdown page, for `docs/cli.md`.

use std::fmt::Write;

use clap::{Arg, ArgAction, Command};

use super::{GROUPS, SOURCE_HELP, command};
use crate::fail::Code;

/// The whole page.
pub fn reference() -> String {
    let mut command = command();
    command.build();
    let mut page = String::from("# The command line\n\nGenerated from the program's own tree; a test keeps it so.\n");
    page.push_str("\n`aquifer [-r REPO] [-c SITE.toml] VERB`\n\n");
    for line in SOURCE_HELP.lines() {
        let _ = writeln!(page, "{line}");
    }
    page.push_str("\n## Options of every verb\n\n");
    options(&mut page, &command, |arg| arg.is_global_set());
    for (title, verbs) in GROUPS {
        let _ = write!(page, "\n## {title}\n");
        for verb in verbs.iter().filter_map(|verb| command.find_subcommand(verb)) {
            section(&mut page, verb, "###");
        }
    }
    page.push_str("\n## Codes\n\n| Code | Exit | Retry | Meaning |\n| --- | --- | --- | --- |\n");
    for code in Code::ALL {
        let again = if code.retryable() { "yes" } else { "no" };
        let text = code.text().replace('|', "\\|");
        let _ = writeln!(page, "| `{}` | {} | {again} | {text} |", code.name(), code.exit());
    }
    page
}

fn section(page: &mut String, command: &Command, level: &str) {
    let mut command = command.clone();
    let name = command.get_bin_name().unwrap_or_default().to_owned();
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ");
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let _ = write!(page, "\n{level} {name}\n\n{about}.\n\n`{usage}`\n\n");
    options(page, &command, |arg| !arg.is_global_set());
    for below in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        section(page, below, "####");
    }
}

fn options(page: &mut String, command: &Command, keep: impl Fn(&Arg) -> bool) {
    for arg in command.get_arguments().filter(|arg| keep(arg) && !arg.is_hide_set()) {
        let id = arg.get_id().as_str();
        if id == "help" || id == "version" {
            continue;
        }
        let mut name = String::new();
        if let Some(short) = arg.get_short() {
            let _ = write!(name, "-{short}, ");
        }
        if let Some(long) = arg.get_long() {
            let _ = write!(name, "--{long}");
        }
        let valued = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        let value = arg.get_value_names().and_then(|names| names.first());
        if let (true, Some(value)) = (valued, value) {
            let space = if name.is_empty() { "" } else { " " };
            let _ = write!(name, "{space}{value}");
        }
        let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
        let words = arg.get_possible_values();
        let words: Vec<String> =
            words.iter().filter(|w| !w.is_hide_set()).map(|w| format!("`{}`", w.get_name())).collect();
        let words = match words.is_empty() || !valued {
            true => String::new(),
            false => format!(" (one of {})", words.join(", ")),
        };
        let _ = writeln!(page, "- `{name}`: {help}{words}");
    }
}
