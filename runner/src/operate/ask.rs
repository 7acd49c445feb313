//! Putting what is asked into the queue, and reading what came of it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{Ask, KIND, Report};
use crate::{
    catalogue::{Catalogue, NewSession, NewWork, Retries, SessionId, Wish, Work, WorkId, WorkState},
    context::Context,
    fail::{Code, Fail, Result},
    replica::{
        desk::object,
        model::ReplicaRecord,
        state::{Op, State},
    },
    tasks::is_gone,
};

/// Before backups and copies: a site waits for it.
const PRIORITY: i32 = 800;

/// How long a run that was asked to stop may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A session of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Begun {
    /// Its number.
    pub session: SessionId,
}

/// Refuses what the state of a replica forbids. Touches nothing.
///
/// # Errors
/// [`Code::State`]; [`Code::NotFound`].
pub fn check(catalogue: &Catalogue, ask: &Ask) -> Result<ReplicaRecord> {
    let name = &ask.replica;
    let Some(row) = catalogue.replica::<ReplicaRecord>(name)? else {
        return Err(Fail::new(Code::NotFound, format!("there is no replica `{name}`")).help("aquifer replicas"));
    };
    let mut record = row.record.check()?;
    if record.state == State::Processing && !is_worked_on(catalogue, name)? {
        // A run that died in the middle: it is brought to its end before anything else is done.
        record.state = State::Ready;
    }
    let help = match (ask.act.op(), record.state) {
        (Op::Failover, State::Failover | State::ReadyToSwitch) => {
            format!("aquifer replicas {name} --start    # where its machine has ended")
        }
        _ => format!("aquifer replicas {name}"),
    };
    let refused = |refusal| Fail::from(refusal).at(object(name)).help(help.clone());
    record.state.step(ask.act.op()).map_err(refused)?;
    Ok(record)
}

/// Sessions of operations on these replicas whose worker went away: they come to their end before anything else does.
///
/// # Errors
/// [`Code::Busy`] where somebody works on one of them; with `cancel` a run of a job is asked to stop instead.
pub fn interrupted(context: &Context, catalogue: &Catalogue, names: &[&str], cancel: bool) -> Result<Vec<SessionId>> {
    let objects: Vec<String> = names.iter().map(|name| object(name)).collect();
    let now = Timestamp::now();
    let (mut found, mut cancelled) = (Vec::new(), Vec::new());
    for work in catalogue.open_work()?.into_iter().filter(|work| objects.contains(&work.object)) {
        let Some(session) = work.session else { continue };
        // What waits for its time, or behind others, is no hindrance.
        if work.state == WorkState::Ready && (work.run_at > now || work.kind != KIND) {
            continue;
        }
        if is_in_hands(&work, now) {
            if cancel && work.kind != KIND {
                catalogue.wish(session, Wish::Cancel, &context.user(), Some("a failover goes first"))?;
                cancelled.push(work.id);
                continue;
            }
            let what = format!("{} is being worked on: session {session} by {}", work.object, owner_of(&work));
            return Err(Fail::new(Code::Busy, what).help(format!("aquifer sessions {session}")));
        }
        if work.kind == KIND && !found.contains(&session) {
            found.push(session);
        }
    }
    out_of_hands(context, catalogue, &cancelled)?;
    Ok(found)
}

/// Waits until runs that were asked to stop have stopped: they hear of it with their next sign of life.
fn out_of_hands(context: &Context, catalogue: &Catalogue, works: &[WorkId]) -> Result<()> {
    let (stop, began) = (context.stop()?, Instant::now());
    loop {
        let now = Timestamp::now();
        let open = catalogue.open_work()?;
        let Some(held) = open.iter().find(|work| works.contains(&work.id) && is_in_hands(work, now)) else {
            return Ok(());
        };
        if began.elapsed() > PATIENCE {
            let what = format!("{} does not stop: it is worked on by {}", held.object, owner_of(held));
            return Err(Fail::new(Code::Busy, what));
        }
        stop.wait(Duration::from_millis(200));
        stop.check()?;
    }
}

fn is_worked_on(catalogue: &Catalogue, name: &str) -> Result<bool> {
    let now = Timestamp::now();
    Ok(catalogue.open_work()?.iter().any(|work| work.object == object(name) && is_in_hands(work, now)))
}

fn owner_of(work: &Work) -> String {
    work.owner.clone().unwrap_or_else(|| "somebody".to_owned())
}

/// Whether somebody alive has it: a lease that runs on is no sign of life where its process is gone.
fn is_in_hands(work: &Work, now: Timestamp) -> bool {
    let leased = work.state == WorkState::Running && work.lease_until.is_some_and(|until| until > now);
    leased && !work.owner.as_deref().is_some_and(is_gone)
}

/// So many operations at a time, and so long between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batches {
    /// Operations that begin together.
    pub size: usize,
    /// How long after each other.
    pub gap: Duration,
}

/// Puts operations into the queue, in one session.
///
/// # Errors
/// The catalogue's.
pub fn begin(context: &Context, catalogue: &Catalogue, asks: &[Ask]) -> Result<Begun> {
    begin_in(context, catalogue, asks, None)
}

/// The same, so many at a time.
///
/// # Errors
/// The catalogue's.
pub fn begin_in(context: &Context, catalogue: &Catalogue, asks: &[Ask], batches: Option<Batches>) -> Result<Begun> {
    let now = Timestamp::now();
    let at = |index: usize| match batches {
        Some(Batches { size, gap }) if index >= size.max(1) => {
            let wait = gap.saturating_mul(u32::try_from(index / size.max(1)).unwrap_or(u32::MAX));
            now.checked_add(wait).unwrap_or(now)
        }
        _ => Timestamp::UNIX_EPOCH,
    };
    put(catalogue, &context.user(), asks, &at)
}

/// Puts an operation into the queue for its time.
///
/// # Errors
/// The catalogue's.
pub fn schedule(context: &Context, catalogue: &Catalogue, ask: &Ask, time: Timestamp) -> Result<Begun> {
    put(catalogue, &context.user(), std::slice::from_ref(ask), &|_| time)
}

fn put(catalogue: &Catalogue, user: &str, asks: &[Ask], at: &dyn Fn(usize) -> Timestamp) -> Result<Begun> {
    let kind = asks.first().map_or(KIND, |ask| ask.act.op().name()).to_owned();
    let reason = asks.first().and_then(|ask| ask.reason.clone());
    let session = NewSession { kind, job: None, initiator: user.to_owned(), reason, retry_of: None };
    let works = asks.iter().enumerate().map(|(index, ask)| {
        Ok(NewWork {
            kind: KIND.to_owned(),
            object: object(&ask.replica),
            job: None,
            session: None,
            priority: PRIORITY,
            run_at: at(index),
            needs: Vec::new(),
            retries: Retries::default(),
            spec: serde_json::to_value(ask).map_err(|e| Fail::new(Code::Bug, e.to_string()))?,
        })
    });
    let works = works.collect::<Result<Vec<_>>>()?;
    Ok(Begun { session: catalogue.begin_work(&session, &works)? })
}

/// What came of an operation: its report, and what is to be looked at.
pub(crate) type Came = Result<(Report, Option<String>)>;

/// What came of each operation of a session that has ended, by replica.
///
/// # Errors
/// The catalogue's.
pub fn reports(catalogue: &Catalogue, session: SessionId) -> Result<BTreeMap<String, Came>> {
    let all = catalogue.work_of(session)?.into_iter().filter(|work| work.kind == KIND).map(|work| {
        let name = work.object.strip_prefix("replica/").unwrap_or(&work.object).to_owned();
        let done = outcome(session, &work);
        (name, done)
    });
    Ok(all.collect())
}

fn outcome(session: SessionId, work: &Work) -> Came {
    let text = |key: &str| {
        work.outcome.as_ref().and_then(|outcome| outcome.get(key)).and_then(|v| v.as_str()).map(str::to_owned)
    };
    if let Some(report) = work.outcome.as_ref().and_then(|outcome| outcome.get("report")) {
        let report = serde_json::from_value(report.clone()).map_err(|e| {
            Fail::new(Code::Corrupt, "the report of an operation cannot be read").at(&work.object).cause(e)
        })?;
        return Ok((report, text("why")));
    }
    let code = text("code").as_deref().and_then(Code::find).unwrap_or(Code::Failed);
    let what = text("why").unwrap_or_else(|| format!("the operation is {}", work.state));
    let help = text("do").unwrap_or_else(|| format!("aquifer events {session}"));
    Err(Fail::new(code, what).at(&work.object).help(help))
}
