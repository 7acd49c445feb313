//! `events`: what happened, oldest first: to recoveries and mounts, and to everything the catalogue knows.
//!
//! Not here: why; a session's own log has that.

use aquifer_mount::session::{Event, Folder, Registry};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    catalogue::{EventFilter, EventRecord as Stored, SessionId},
    context::Context,
    fail::Result,
    tasks::follow,
};

/// Options of `events`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this session: a recovery's name or the first characters of its id, or the number of a run
    #[arg(value_name = "SESSION")]
    pub session: Option<String>,
    /// Only of this object of the catalogue: job/NAME, replica/NAME, work/N; all of a kind where it ends in `/`
    #[arg(long, value_name = "OBJECT", conflicts_with = "session")]
    pub object: Option<String>,
    /// Only events of the catalogue with numbers above this one
    #[arg(long, value_name = "N", conflicts_with = "session")]
    pub since: Option<i64>,
}

#[derive(Serialize)]
struct EventRecord<'a> {
    session: &'a str,
    #[serde(flatten)]
    event: &'a Event,
}

/// An event, wherever it was kept.
enum Shown {
    Recovery(String, Event),
    Catalogue(Box<Stored>),
}

impl Shown {
    fn time(&self) -> Timestamp {
        match self {
            Self::Recovery(_, event) => event.time,
            Self::Catalogue(record) => record.time,
        }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let number = args.session.as_ref().and_then(|word| word.parse().ok()).map(SessionId);
    let mut all = Vec::new();
    if number.is_none() && args.object.is_none() && args.since.is_none() {
        all.extend(of_recoveries(context, args)?);
    }
    if number.is_some() || args.session.is_none() {
        let filter = EventFilter { object: args.object.clone(), session: number, limit: None };
        if let Some(catalogue) = context.catalogue_if_there()? {
            // One that there is not is no session without events.
            number.map(|number| catalogue.session(number)).transpose()?;
            let stored = catalogue.events(args.since.unwrap_or(0), &filter)?;
            all.extend(stored.into_iter().map(|record| Shown::Catalogue(Box::new(record))));
        }
    }
    // Stable: events of the catalogue keep their order.
    all.sort_by_key(Shown::time);
    for shown in &all {
        match shown {
            Shown::Recovery(name, event) => {
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
            Shown::Catalogue(record) => {
                context.out.record("transition", record.as_ref());
                context.out.line(follow::line(record));
            }
        }
    }
    context.out.closing("events", all.len());
    Ok(())
}

fn of_recoveries(context: &Context, args: &Args) -> Result<Vec<Shown>> {
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
    Ok(all)
}

fn of(folder: &Folder) -> Result<Vec<Shown>> {
    let name = folder.load()?.name;
    Ok(folder.events()?.into_iter().map(|event| Shown::Recovery(name.clone(), event)).collect())
}
