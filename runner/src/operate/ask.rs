//! Putting what is asked into the queue, and reading what came of it.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{Ask, KIND, Report};
use crate::{
    catalogue::{Catalogue, Left, NewSession, NewWork, SessionId, Wish, Work, WorkId, WorkState},
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    replica::{
        desk::object,
        model::ReplicaRecord,
        state::{Op, Refusal, State},
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
    let record = after_a_run(catalogue, row.record.check()?)?;
    record.state.step(ask.act.op()).map_err(|refusal| refused(&record, refusal))?;
    Ok(record)
}

/// What the state of a replica forbids, with what is possible instead: a machine that runs is not started.
pub fn refused(record: &ReplicaRecord, mut refusal: Refusal) -> Fail {
    let running = record.failover.as_ref().and_then(|failover| failover.running.as_ref());
    if running.is_some_and(|running| running.process.is_alive()) {
        refusal.allowed.retain(|op| *op != Op::Start);
    }
    let name = quoted(&record.name);
    let help = match refusal.op {
        Op::Failover if refusal.allowed.contains(&Op::Start) => {
            format!("aquifer replicas {name} --start    # where its machine has ended")
        }
        _ => format!("aquifer replicas {name}"),
    };
    Fail::from(refusal).at(object(&record.name)).help(help)
}

/// A replica as it is for whoever wants something of it now: a run that died in the middle is brought to its end before
/// anything else is done.
///
/// # Errors
/// The catalogue's.
pub fn after_a_run(catalogue: &Catalogue, record: ReplicaRecord) -> Result<ReplicaRecord> {
    let died = record.state == State::Processing && !is_worked_on(catalogue, &record.name)?;
    Ok(if died { ReplicaRecord { state: State::Ready, ..record } } else { record })
}

/// What is under way on replicas, and comes to its end before anything else is done to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UnderWay {
    /// Sessions of operations whose worker went away: they are gone on with.
    pub cut_short: Vec<SessionId>,
    /// Runs of jobs that are asked to stop.
    pub to_stop: Vec<(SessionId, WorkId)>,
}

/// What becomes of a run of a job that has a replica in its hands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunOfJob {
    /// It comes to its end first.
    Ends,
    /// The same, unless whoever asks adds `--cancel-job`.
    MayStop,
    /// It is asked to stop.
    Stops,
}

/// Looks what is under way on these replicas. Touches nothing.
///
/// # Errors
/// [`Code::Busy`] where somebody works on one of them; a run of a job that is to stop is told instead.
pub fn under_way(catalogue: &Catalogue, names: &[&str], run: RunOfJob) -> Result<UnderWay> {
    let objects: Vec<String> = names.iter().map(|name| object(name)).collect();
    let now = Timestamp::now();
    let mut found = UnderWay::default();
    for work in catalogue.open_work()?.into_iter().filter(|work| objects.contains(&work.object)) {
        let Some(session) = work.session else { continue };
        // What waits for its time, or behind others, is no hindrance.
        if work.state == WorkState::Ready && (work.run_at > now || work.kind != KIND) {
            continue;
        }
        if is_in_hands(&work, now) {
            let what = format!("{} is being worked on: session {session} by {}", work.object, owner_of(&work));
            let busy = Fail::new(Code::Busy, what);
            match run {
                _ if work.kind == KIND => return Err(busy.help(format!("aquifer sessions {session}"))),
                RunOfJob::Ends => {
                    return Err(busy.help(format!("aquifer sessions {session} --cancel    # or wait for it")));
                }
                RunOfJob::MayStop => return Err(busy.help_again("--cancel-job")),
                RunOfJob::Stops => found.to_stop.push((session, work.id)),
            }
            continue;
        }
        if work.kind == KIND && !found.cut_short.contains(&session) {
            found.cut_short.push(session);
        }
    }
    Ok(found)
}

/// Sessions of operations on these replicas whose worker went away: they come to their end before anything else does.
/// Runs of jobs are asked to stop where that is wanted.
///
/// # Errors
/// As [`under_way`]; one that was asked to stop does not.
pub fn interrupted(context: &Context, catalogue: &Catalogue, names: &[&str], run: RunOfJob) -> Result<Vec<SessionId>> {
    let found = under_way(catalogue, names, run)?;
    stop(context, catalogue, &found.to_stop)?;
    Ok(found.cut_short)
}

/// Asks the runs of jobs that have these replicas in their hands to stop, and waits until they have.
///
/// # Errors
/// One that was asked to stop does not.
pub fn stop_runs(context: &Context, catalogue: &Catalogue, names: &[String]) -> Result<()> {
    // A replica that something else is done to has no run.
    let of = |name: &String| under_way(catalogue, &[name], RunOfJob::Stops).map(|found| found.to_stop);
    let runs: Vec<_> = names.iter().filter_map(|name| of(name).ok()).flatten().collect();
    stop(context, catalogue, &runs)
}

fn stop(context: &Context, catalogue: &Catalogue, runs: &[(SessionId, WorkId)]) -> Result<()> {
    for (session, _) in runs {
        catalogue.wish(*session, Wish::Cancel, &context.user(), Some("a failover goes first"))?;
    }
    out_of_hands(context, catalogue, &runs.iter().map(|(_, work)| *work).collect::<Vec<_>>())
}

/// The operation of a replica whose worker went away, and which is still to be gone on with.
///
/// # Errors
/// As [`under_way`].
pub fn left(catalogue: &Catalogue, name: &str) -> Result<Option<(Work, Ask)>> {
    for session in under_way(catalogue, &[name], RunOfJob::Ends)?.cut_short {
        let is_ours = |work: &Work| work.object == object(name) && work.kind == KIND && is_open(work);
        let Some(work) = catalogue.work_of(session)?.into_iter().find(is_ours) else { continue };
        if catalogue.session(session)?.wish != Wish::Run {
            continue;
        }
        if let Ok(ask) = serde_json::from_value(work.spec.clone()) {
            return Ok(Some((work, ask)));
        }
    }
    Ok(None)
}

/// Whether a way home of a replica was cut short and stands as it was left: somebody can go on with it, or it was
/// cancelled since.
///
/// # Errors
/// As [`under_way`].
pub fn way_home_is_left(catalogue: &Catalogue, name: &str) -> Result<bool> {
    if left(catalogue, name)?.is_some_and(|(_, ask)| ask.act.is_way_home()) {
        return Ok(true);
    }
    is_open_operation(catalogue, name, &[Op::Failback, Op::Switchover])
}

/// Whether the journal has one of these operations of a replica that has not ended.
///
/// # Errors
/// The catalogue's.
pub fn is_open_operation(catalogue: &Catalogue, name: &str, ops: &[Op]) -> Result<bool> {
    let open = catalogue.open_operations()?;
    Ok(open.iter().any(|open| open.object == object(name) && ops.iter().any(|op| op.name() == open.op)))
}

fn is_open(work: &Work) -> bool {
    matches!(work.state, WorkState::Ready | WorkState::Running)
}

/// Lets nobody go on with an operation that was left: another one begins where it stands.
///
/// # Errors
/// Somebody has it by now.
pub fn leave(context: &Context, catalogue: &Catalogue, work: &Work) -> Result<()> {
    change_left(context, catalogue, work, &Left::Cancelled)
}

/// Tells whoever goes on with an operation that was left something else.
///
/// # Errors
/// Somebody has it by now.
pub fn tell_left(context: &Context, catalogue: &Catalogue, work: &Work, ask: &Ask) -> Result<()> {
    change_left(context, catalogue, work, &Left::Told(spec(ask)?))
}

fn change_left(context: &Context, catalogue: &Catalogue, work: &Work, left: &Left) -> Result<()> {
    Ok(catalogue.change_left(work.id, left, &context.user(), |work, now| !is_in_hands(work, now))?)
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

/// Refuses a way home while a backup reads the machine that is turned off for it.
///
/// # Errors
/// [`Code::Busy`].
pub fn refuse_backup(catalogue: &Catalogue, machine: &str) -> Result<()> {
    let now = Timestamp::now();
    let reads = |work: &Work| {
        let of_it = work.spec.get("machine").and_then(serde_json::Value::as_str) == Some(machine);
        of_it && work.kind == "backup" && is_in_hands(work, now)
    };
    match catalogue.open_work()?.into_iter().find(reads) {
        None => Ok(()),
        Some(work) => {
            let fail = Fail::new(Code::Busy, format!("{machine} is being backed up")).at(work.object);
            Err(match work.session {
                Some(session) => fail.help(format!("aquifer sessions {session}")),
                None => fail,
            })
        }
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
        Ok(NewWork { run_at: at(index), ..NewWork::new(KIND, object(&ask.replica), PRIORITY, spec(ask)?) })
    });
    let works = works.collect::<Result<Vec<_>>>()?;
    Ok(Begun { session: catalogue.begin_work(&session, &works)? })
}

fn spec(ask: &Ask) -> Result<serde_json::Value> {
    serde_json::to_value(ask).map_err(|e| Fail::new(Code::Bug, e.to_string()))
}

/// What came of an operation.
pub(crate) type Came = Result<Report>;

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
        return Ok(report);
    }
    let code = text("code").as_deref().and_then(Code::find).unwrap_or(Code::Failed);
    let what = text("why").unwrap_or_else(|| format!("the operation is {}", work.state));
    let fail = Fail::new(code, what).at(&work.object);
    Err(match text("do") {
        Some(options) if options.starts_with("--") => fail.help_again(options),
        Some(help) => fail.help(help),
        // What an explanation has nothing to say about is in what happened.
        None if matches!(code, Code::Failed | Code::Io | Code::Bug) => fail.help(format!("aquifer events {session}")),
        None => fail,
    })
}
