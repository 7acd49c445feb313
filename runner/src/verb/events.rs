//! `events`: what happened to sessions, oldest first.
//!
//! Not here: why; a session's own log has that.

use aquifer_mount::session::{Event, Folder, Registry};
use serde::Serialize;

use crate::{context::Context, fail::Result};

/// Options of `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this session: a name or the first characters of an id
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
}

#[derive(Serialize)]
struct EventRecord<'a> {
    session: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let registry = Registry::new(&context.home()?);
    let mut all = Vec::new();
    match &args.session {
        Some(word) => all.extend(of(&registry.resolve(word)?)?),
        None => {
            // A session whose folder is gone has no events left to show.
            for folder in registry.list()?.iter().filter_map(|pointer| Folder::open(&pointer.dir).ok()) {
                all.extend(of(&folder)?);
            }
        }
    }
    all.sort_by_key(|(_, event)| event.time);
    for (name, event) in &all {
        context.out.record("event", &EventRecord { session: name, event });
        let from = event.from.map(|from| format!("{from} -> ")).unwrap_or_default();
        let reason = event.reason.as_deref().map(|reason| format!("  {reason}")).unwrap_or_default();
        context.out.line(format_args!(
            "{}  {name}  {}: {from}{}{reason}",
            event.time,
            event.op,
            event.to.map(|to| to.to_string()).unwrap_or_default()
        ));
    }
    context.out.closing("events", all.len());
    Ok(())
}

fn of(folder: &Folder) -> Result<Vec<(String, Event)>> {
    let name = folder.load()?.name;
    Ok(folder.events()?.into_iter().map(|event| (name.clone(), event)).collect())
}
