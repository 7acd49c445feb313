//! The command line as clap sees it: the tree of verbs, the options every verb shares, help in groups.
//!
//! Invariants
//! - Every verb stands in exactly one group of the help; aliases resolve and stay hidden.
//! - A verb's own options live beside its code in `verb/`.
//!
//! Not here: what verbs do, what defaults come from the environment (`context`).

mod reference;

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Command, CommandFactory, Parser, Subcommand};

pub use reference::reference;

use crate::verb;

/// `aquifer`, parsed.
#[derive(Debug, Parser)]
#[command(
    name = "aquifer",
    version,
    about = "Boot machines straight from their backup chain",
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = false
)]
pub struct Cli {
    /// Options of every verb.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every verb.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Options of every verb")]
pub struct Globals {
    /// Repository: a folder, or a name from the site file [default: $AQUIFER_REPO, then the site file]
    #[arg(short, long, global = true, value_name = "REPO")]
    pub repo: Option<PathBuf>,
    /// Site file [default: $AQUIFER_CONFIG, then aquifer.toml in the configuration folder]
    #[arg(short, long, global = true, value_name = "SITE.toml")]
    pub config: Option<PathBuf>,
    /// Folder for state [default: $AQUIFER_HOME, then $STATE_DIRECTORY, then the XDG state folder]
    #[arg(long, global = true, value_name = "DIR")]
    pub home: Option<PathBuf>,
    /// Print JSON lines on stdout, the last one `done` or `error`
    #[arg(long, global = true)]
    pub json: bool,
    /// Treat warnings as failures (exit code 2 instead of 1)
    #[arg(long, global = true)]
    pub strict: bool,
    /// Say only warnings and errors on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
}

/// `-n`, for every verb that changes something.
#[derive(Clone, Debug, Default, Args)]
pub struct DryRun {
    /// Check everything and say what would be done; change nothing
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// `--yes`, for every verb that destroys something.
#[derive(Clone, Debug, Default, Args)]
pub struct Confirm {
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Say what a source holds: format, disks, sizes, points, machine
    Info(verb::info::Args),
    /// Serve the disks of a source over NBD, FUSE, vhost-user-blk or a loop device
    Mount(verb::mount::Args),
    /// Run a machine straight from a source
    #[command(alias = "restore")]
    Recover(verb::recover::Args),
    /// Show recoveries and mounts: running since, local share, time to independence
    Status(verb::status::Args),
    /// Wait until a recovery is running or local
    Wait(verb::wait::Args),
    /// Change a running recovery: rate, pause, resume
    Session(verb::session::Args),
    /// End a recovery: keep the machine on its local disk, or discard it
    Finalize(verb::finalize::Args),
    /// Do all of it with a small machine of its own, made and taken away
    Demo(verb::demo::Args),
    /// Make a repository
    Init(verb::init::Args),
    /// Store a restore point of a machine
    Backup(verb::backup::Args),
    /// List machines and their restore points
    #[command(alias = "snapshots", alias = "list")]
    Points(verb::points::Args),
    /// Delete restore points
    Forget(verb::forget::Args),
    /// Read everything a source stands on and check every checksum
    #[command(alias = "check")]
    Verify(verb::verify::Args),
    /// Show which ranges of a disk hold data
    Map(verb::map::Args),
    /// Show what differs between two points, from metadata
    Diff(verb::diff::Args),
    /// Copy a disk out to a raw or qcow2 file
    Export(verb::export::Args),
    /// Show who reads or writes the repository
    Leases(verb::leases::Args),
    /// Show what happened, oldest first
    Events(verb::events::Args),
    /// Do one run of a job of the site file
    Run(verb::run::Args),
    /// Carry out the site file: begin runs when they are due, and work on them
    Serve(verb::serve::Args),
    /// Work on what is in the queue of a shared catalogue
    Worker(verb::worker::Args),
    /// Show runs of jobs and operations; stop, pause or resume one
    Sessions(verb::sessions::Args),
    /// Show jobs, when they run next and how they ended last; pause or resume one
    Jobs(verb::jobs::Args),
    /// Show replicas, their state and restore points; give one up
    Replicas(verb::replicas::Args),
    /// Check or show the site file
    Config(verb::config::Args),
    /// Let a replica take over at a restore point
    Failover(verb::failover::Args),
    /// Bring production back to what the replica has, and change the sides
    Failback(verb::failback::Args),
    /// Make a failback final
    Commit(verb::commit::Args),
    /// Take the last step of a replica back: a failover, or a failback
    Undo(verb::undo::Args),
    /// Make a failover final: the replica becomes an ordinary machine
    Permanent(verb::permanent::Args),
    /// Show, check and run failover plans of the site file
    Plan(verb::plan::Args),
    /// Measure a disk behind any path or NBD URI, and peers in the same run
    Bench(verb::bench::Args),
    /// Check what this machine needs, and print commands that repair it
    Doctor(verb::doctor::Args),
    /// Explain an error or warning code
    Explain(verb::explain::Args),
    /// Print shell completions
    Completions(verb::completions::Args),
    /// Print or write the manual pages
    Man(verb::man::Args),
    /// Be the processes of a recovery
    #[command(hide = true)]
    Door(verb::door::Args),
    /// Clean up after a backup of a running machine that is killed
    #[command(hide = true)]
    Guard(crate::job::backup::guard::Args),
}

/// Help shows the verbs in these groups.
pub const GROUPS: &[(&str, &[&str])] = &[
    ("Start here", &["info", "mount", "recover", "status", "wait", "session", "finalize", "demo"]),
    ("Protect", &["init", "backup", "points", "forget", "verify"]),
    ("Look", &["map", "diff", "export", "leases", "events"]),
    ("Site", &["config", "run", "serve", "worker", "jobs", "sessions"]),
    ("Replicas", &["replicas", "failover", "failback", "commit", "undo", "permanent", "plan"]),
    ("Tools", &["bench", "doctor", "explain", "completions", "man"]),
];

const SOURCE_HELP: &str = "\
SOURCE is a path (a word with `/`, or an existing file: image, backup file or folder), raw:PATH,
an NBD URI (nbd://, nbds://, nbd+unix://), or MACHINE[@POINT][:DISK] in the repository, where POINT is
latest, latest~2, an RFC 3339 time with its zone, or the first characters of a point id.

Exit codes: 0 done, 1 done with warnings, 2 failed, 3 refused by state, 4 usage, 5 differences
(with --exit-code), 10 no repository, 11 busy, 12 key or access, 13 timeout, 14 damage, 130/143 stopped.
`serve` and `worker` that are asked to stop end with 0: what they warned of is in the sessions.";

/// The whole tree, with the grouped help of the top level.
pub fn command() -> Command {
    let command = Cli::command();
    let mut groups = String::new();
    for (title, verbs) in GROUPS {
        groups.push_str(&format!("{title}:\n"));
        for verb in *verbs {
            let about = command.find_subcommand(verb).and_then(Command::get_about);
            groups.push_str(&format!("  {verb:<12} {}\n", about.map(ToString::to_string).unwrap_or_default()));
        }
        groups.push('\n');
    }
    let template = format!(
        "{{about}}\n\n{{usage-heading}} aquifer [-r REPO] [-c SITE.toml] <VERB>\n\n{groups}{{options}}\n{SOURCE_HELP}\n"
    );
    command.help_template(template).mut_subcommands(|sub| sub.after_help(AFTER_EVERY_VERB))
}

const AFTER_EVERY_VERB: &str = "`aquifer --help` explains SOURCE and the exit codes.";

/// The verb named on a command line that did not parse, for messages and the JSON schema.
pub(crate) fn verb_among(args: &[OsString]) -> &'static str {
    let command = Cli::command();
    let valued = ["-r", "--repo", "-c", "--config", "--home"];
    let mut skip = false;
    for arg in args.iter().skip(1).filter_map(|a| a.to_str()) {
        let value = std::mem::replace(&mut skip, valued.contains(&arg));
        if value || arg.starts_with('-') {
            continue;
        }
        let name = command.find_subcommand(arg).map(|sub| sub.get_name().to_owned());
        let known = GROUPS.iter().flat_map(|(_, verbs)| verbs.iter());
        return known.copied().find(|verb| name.as_deref() == Some(*verb)).unwrap_or("cli");
    }
    "cli"
}

/// clap's message without its `error:`, and what it adds below.
pub(crate) fn split_usage_error(text: &str) -> (String, String) {
    let text = text.trim_start_matches("error: ");
    let (first, rest) = text.split_once("\n\n").unwrap_or((text, ""));
    let rest = rest.split("For more information").next().unwrap_or_default();
    let one_line = first.split_whitespace().collect::<Vec<_>>().join(" ");
    (one_line, rest.trim().to_owned())
}

#[cfg(test)]
mod tests;
