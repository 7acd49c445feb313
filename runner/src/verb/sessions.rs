//! `sessions`: runs of jobs and operations, what came of them, and how to stop one.

use serde::Serialize;

use crate::{
    catalogue::{Session, SessionFilter, SessionId, SessionState, Wish, Work},
    cli::DryRun,
    context::Context,
    fail::{Code, Fail, Result},
    tasks::follow::at,
    units,
};

/// Options of `sessions`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only this one, with its work
    #[arg(value_name = "SESSION")]
    pub session: Option<i64>,
    /// Only runs of this job
    #[arg(long, value_name = "JOB")]
    pub job: Option<String>,
    /// Only those that have not ended
    #[arg(long)]
    pub open: bool,
    /// At most so many: the newest
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub last: u32,
    /// Ask it to stop: what is stored is kept, the next run goes on from it
    #[arg(long, requires = "session", conflicts_with_all = ["pause", "resume"])]
    pub cancel: bool,
    /// Ask it to give its work back and wait
    #[arg(long, requires = "session", conflicts_with = "resume")]
    pub pause: bool,
    /// Let a paused one go on
    #[arg(long, requires = "session")]
    pub resume: bool,
    /// Why, for the record
    #[arg(long, value_name = "TEXT")]
    pub reason: Option<String>,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

impl Args {
    fn wish(&self) -> Option<Wish> {
        let wishes = [(self.cancel, Wish::Cancel), (self.pause, Wish::Pause), (self.resume, Wish::Run)];
        wishes.into_iter().find(|(asked, _)| *asked).map(|(_, wish)| wish)
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let Some(catalogue) = context.catalogue_if_there()? else {
        if let Some(id) = args.session {
            return Err(Fail::new(Code::NotFound, format!("there is no session {id}")).help("aquifer jobs"));
        }
        context.out.say("nothing has run yet");
        context.out.closing("sessions", 0);
        return Ok(());
    };
    if let Some(id) = args.session.map(SessionId) {
        if let Some(wish) = args.wish() {
            let session = catalogue.session(id)?;
            if args.dry.dry_run {
                if session.state == SessionState::Stopped {
                    return Err(Fail::new(Code::State, format!("session {id} is stopped")).help("aquifer sessions"));
                }
                context.out.line(format_args!("would ask session {id}: {} -> {wish}", session.wish));
                return Ok(());
            }
            catalogue.wish(id, wish, &context.user(), args.reason.as_deref())?;
        }
        let session = catalogue.session(id)?;
        context.out.record("session", &listed(&session));
        context.out.line(line(&session));
        for work in catalogue.work_of(id)? {
            context.out.line(work_line(&work));
            context.out.record("work", &work);
        }
        return Ok(());
    }
    let filter = SessionFilter { job: args.job.clone(), open: args.open, since: None, limit: Some(args.last) };
    let sessions = catalogue.sessions(&filter)?;
    for session in &sessions {
        context.out.record("session", &listed(session));
        context.out.line(line(session));
    }
    if sessions.is_empty() {
        context.out.say("no session fits");
    }
    context.out.closing("sessions", sessions.len());
    Ok(())
}

/// A session with what may be asked of it now.
#[derive(Serialize)]
struct Listed<'a> {
    #[serde(flatten)]
    session: &'a Session,
    allowed_operations: &'static [&'static str],
}

fn listed(session: &Session) -> Listed<'_> {
    let allowed_operations: &[&str] = match (session.state, session.wish) {
        (SessionState::Stopped, _) | (_, Wish::Cancel) => &[],
        (_, Wish::Pause) => &["cancel", "resume"],
        (_, Wish::Run) => &["cancel", "pause"],
    };
    Listed { session, allowed_operations }
}

/// A session as a line.
pub(super) fn line(session: &Session) -> String {
    let job = session.job.as_deref().map(|job| format!(" {job}")).unwrap_or_default();
    let how = match (session.state, session.wish) {
        (SessionState::Stopped, _) => session.result.to_string(),
        (state, Wish::Run) => state.to_string(),
        (state, wish) => format!("{state}, asked to {wish}"),
    };
    let progress = &session.progress;
    let moved = match progress.bytes_read + progress.bytes_written {
        0 => String::new(),
        _ => format!(", {} read, {} written", units::bytes(progress.bytes_read), units::bytes(progress.bytes_written)),
    };
    let merged = match progress.bytes_merged {
        0 => String::new(),
        bytes => format!(", {} merged on the target", units::bytes(bytes)),
    };
    let took = session.ended.map_or(String::new(), |ended| {
        let seconds = u64::try_from(ended.duration_since(session.begun).as_secs()).unwrap_or(0);
        format!(" in {}", units::seconds(seconds))
    });
    let reason = session.reason.as_deref().map(|reason| format!("  ({reason})")).unwrap_or_default();
    format!("{:>5}  {}  {}{job}: {how}{took}{moved}{merged}{reason}", session.id.0, at(session.begun), session.kind)
}

fn work_line(work: &Work) -> String {
    let owner = work.owner.as_deref().map(|owner| format!(" by {owner}")).unwrap_or_default();
    let why = work.outcome.as_ref().and_then(|o| o.get("why")).and_then(|w| w.as_str());
    let why = why.map(|why| format!("  ({why})")).unwrap_or_default();
    let progress = &work.progress;
    let limit = progress.rate_limit.map(|limit| format!(" of {}/s", units::bytes(limit))).unwrap_or_default();
    let rate = match progress.rate {
        0 => String::new(),
        rate => format!(", {}/s{limit}", units::bytes(rate)),
    };
    let tried = if work.attempts > 1 { format!(", attempt {}", work.attempts) } else { String::new() };
    format!("       work {}  {}: {}{tried}{rate}{owner}{why}", work.id, work.object, work.state)
}
