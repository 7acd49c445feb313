//! A run of a plan, from machine to machine.

use std::{
    sync::mpsc::{Sender, channel},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;

use super::{EntryRecord, PlanSpec, Run, RunRecord, Step, begin, find, gate, program, state};
use crate::{
    catalogue::SessionId,
    fail::{Code, Fail, Result},
    job,
    operate::{self, Act, Ask, Report},
    replica::{
        model::{PointRecord, ReplicaRecord},
        state::State,
    },
    site::{OnFailure, Plan, PlanEntry},
    source::PointRef,
    tasks::{Done, Hands, Task, Worker, owner},
};

/// How often a run looks whether something has ended or is asked.
const TICK: Duration = Duration::from_millis(100);

/// How long a program before or after the machines may take.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(600);

/// What a machine's thread tells.
enum News {
    Gating(usize, Box<Report>),
    Ended(usize, Result<(), Fail>),
}

/// Does a run of a plan, or what is left of one.
///
/// # Errors
/// A machine did not come up; a program failed; the interruption.
pub fn run(task: &Task<'_>) -> Result<Done> {
    let spec: PlanSpec = task.spec()?;
    let site = task.context.site()?;
    let plan = find(site, &spec.plan)?;
    let mut walk =
        Walk { task, plan, run: take_up(task, &spec, plan)?, spec, began: Instant::now(), rested: Vec::new() };
    walk.rested = vec![None; plan.entries.len()];
    let outcome = walk.go();
    let interrupted = task.check().is_err();
    if interrupted {
        walk.run.state = state::HALTED.to_owned();
        walk.store()?;
        task.check()?;
    }
    walk.run.record.ended = Some(Timestamp::now());
    walk.run.state = match &outcome {
        Err(_) => state::FAILED,
        Ok(Verdict::Completed) => state::COMPLETED,
        Ok(Verdict::Failed(_)) => state::FAILED,
        Ok(Verdict::Halted(_)) => state::HALTED,
    }
    .to_owned();
    walk.store()?;
    let report = serde_json::to_value(&walk.run).map_err(|e| Fail::new(Code::Bug, e.to_string()))?;
    match outcome? {
        Verdict::Completed => Ok(walk.done(report)),
        Verdict::Failed(why) => Err(Fail::new(Code::Failed, why)),
        Verdict::Halted(why) => Ok(Done::Warning { why: format!("halted: {why}"), report }),
    }
}

/// The run that this work carries out: its own from before a death, the one it goes on with, or a new one.
fn take_up(task: &Task<'_>, spec: &PlanSpec, plan: &Plan) -> Result<Run> {
    let runs = task.catalogue.plan_runs::<RunRecord>(&spec.plan)?;
    let ours = |run: &Run| run.record.work == task.work.id.0 || Some(run.id) == spec.resumes;
    let record = RunRecord::new(plan, task.work.id, task.work.session);
    let mut run = runs.into_iter().rev().find(ours).unwrap_or_else(|| Run {
        id: 0,
        plan: spec.plan.clone(),
        revision: 0,
        state: state::IN_PROGRESS.to_owned(),
        record: record.clone(),
        begun: Timestamp::now(),
    });
    let before = std::mem::replace(&mut run.record.entries, record.entries);
    // The plan may have been edited meanwhile; what is known of its machines stays.
    for entry in &mut run.record.entries {
        if let Some(known) = before.iter().find(|known| known.machine == entry.machine) {
            entry.clone_from(known);
        }
        // What failed is tried again; so is what was left out because of its state.
        if matches!(entry.step, Step::Failed | Step::Skipped) {
            // One whose gate stayed shut serves already: only its gate is tried again.
            *entry = EntryRecord { step: Step::Waiting, why: None, rto_ms: None, ..entry.clone() };
        }
    }
    (run.record.work, run.record.session) = (task.work.id.0, task.work.session.map(|session| session.0));
    (run.state, run.record.ended) = (state::IN_PROGRESS.to_owned(), None);
    Ok(task.catalogue.put_plan_run(task.fence, &run)?)
}

enum Verdict {
    Completed,
    Failed(String),
    Halted(String),
}

struct Walk<'a> {
    task: &'a Task<'a>,
    plan: &'a Plan,
    spec: PlanSpec,
    run: Run,
    began: Instant,
    /// When each machine became ready, for the delay after it.
    rested: Vec<Option<Instant>>,
}

impl Walk<'_> {
    fn store(&mut self) -> Result<()> {
        self.run = self.task.catalogue.put_plan_run(self.task.fence, &self.run)?;
        Ok(())
    }

    fn go(&mut self) -> Result<Verdict> {
        if !self.run.record.prepared {
            self.programs(&self.plan.pre)?;
            self.run.record.prepared = true;
            self.store()?;
        }
        let verdict = self.machines()?;
        if matches!(verdict, Verdict::Completed) {
            self.programs(&self.plan.post)?;
        }
        Ok(verdict)
    }

    fn programs(&self, all: &[std::path::PathBuf]) -> Result<()> {
        let variables = [("AQUIFER_PLAN", self.spec.plan.clone())];
        all.iter().try_for_each(|path| program::run(path, &variables, PROGRAM_TIMEOUT, self.task.stop))
    }

    fn machines(&mut self) -> Result<Verdict> {
        let (tell, told) = channel();
        let plan = self.plan;
        let (task, spec) = (self.task, self.spec.clone());
        let mut halt: Option<Verdict> = None;
        let mut under_way = 0usize;
        thread::scope(|scope| {
            loop {
                if halt.is_none() && task.check().is_ok() {
                    for index in self.due() {
                        if under_way >= usize::try_from(plan.at_once).unwrap_or(usize::MAX).max(1) {
                            break;
                        }
                        let Some((entry, known)) = self.begin(index)? else { continue };
                        under_way += 1;
                        let (tell, spec) = (tell.clone(), &spec);
                        scope.spawn(move || {
                            let ended = one(task, spec, entry, &known, index, &tell);
                            let _ = tell.send(News::Ended(index, ended));
                        });
                    }
                }
                let idle = under_way == 0 && (halt.is_some() || task.check().is_err() || self.is_over());
                if idle {
                    break;
                }
                match told.recv_timeout(TICK) {
                    Ok(News::Gating(index, report)) => self.gating(index, &report)?,
                    Ok(News::Ended(index, ended)) => {
                        under_way -= 1;
                        if let Some(verdict) = self.ended(index, ended)? {
                            halt.get_or_insert(verdict);
                        }
                    }
                    Err(_) => {}
                }
            }
            Ok::<(), Fail>(())
        })?;
        Ok(halt.unwrap_or_else(|| self.verdict()))
    }

    /// A run that left machines out, because they serve already, says so, and so does one whose machines have something
    /// to look at.
    fn done(&self, report: serde_json::Value) -> Done {
        let entries = &self.run.record.entries;
        let left_out = entries.iter().filter(|entry| entry.step == Step::Skipped);
        let left_out: Vec<&str> = left_out.map(|entry| entry.why.as_deref().unwrap_or(&entry.machine)).collect();
        let warned = entries.iter().flat_map(|entry| &entry.warnings);
        let mut why: Vec<String> = warned.map(|warned| format!("{}: {}", warned.code, warned.what)).collect();
        if !left_out.is_empty() {
            why.push(format!("left out: {}", left_out.join(", ")));
        }
        if why.is_empty() { Done::Success(report) } else { Done::Warning { why: why.join("; "), report } }
    }

    fn verdict(&self) -> Verdict {
        let failed: Vec<&str> =
            self.run.record.entries.iter().filter(|e| e.step == Step::Failed).map(|e| e.machine.as_str()).collect();
        match failed.as_slice() {
            [] => Verdict::Completed,
            failed => Verdict::Failed(format!("{} did not come up", failed.join(", "))),
        }
    }

    fn settled(&self, machine: &str) -> Option<Option<Instant>> {
        let index = self.run.record.entries.iter().position(|entry| entry.machine == machine)?;
        let step = self.run.record.entries.get(index)?.step;
        matches!(step, Step::Ready | Step::Failed | Step::Skipped).then(|| self.rested.get(index).copied().flatten())
    }

    /// The entries whose turn it is.
    fn due(&self) -> Vec<usize> {
        let mut due = Vec::new();
        for (index, entry) in self.plan.entries.iter().enumerate() {
            let step = self.run.record.entries.get(index).map(|known| known.step);
            let begun_before = self.rested.get(index).is_some_and(Option::is_some);
            let open = match step {
                Some(Step::Waiting) => true,
                // Left by whoever carried this run out before.
                Some(Step::Starting | Step::Gating) => !begun_before,
                _ => false,
            };
            let before: Vec<&str> = match &entry.after {
                Some(names) => names.iter().map(String::as_str).collect(),
                None => index
                    .checked_sub(1)
                    .and_then(|i| self.plan.entries.get(i))
                    .map(|e| vec![e.machine.as_str()])
                    .unwrap_or_default(),
            };
            let rested = |name: &&str| {
                let delay = self.plan.entries.iter().find(|e| e.machine == **name).map(|e| e.delay).unwrap_or_default();
                self.settled(name).is_some_and(|since| since.is_none_or(|since| since.elapsed() >= delay))
            };
            if open && before.iter().all(rested) {
                due.push(index);
            }
        }
        due
    }

    fn is_over(&self) -> bool {
        let entries = &self.run.record.entries;
        entries.iter().all(|entry| matches!(entry.step, Step::Ready | Step::Failed | Step::Skipped))
    }

    /// The replica of a machine whose turn has come; a run of a job that has it then is stopped first, if that was said.
    fn candidate(&self, machine: &str, wanted: &PointRef) -> Result<(ReplicaRecord, Option<PointRecord>)> {
        let (context, catalogue) = (self.task.context, self.task.catalogue);
        let found = begin::candidate(catalogue, machine, wanted)?;
        if !self.spec.cancel_job || found.0.state != State::Processing {
            return Ok(found);
        }
        operate::stop_runs(context, catalogue, &[found.0.name])?;
        begin::candidate(catalogue, machine, wanted)
    }

    /// Writes down that an entry begins. Nothing where it is left out.
    fn begin(&mut self, index: usize) -> Result<Option<(PlanEntry, EntryRecord)>> {
        let Some(entry) = self.plan.entries.get(index).cloned() else { return Ok(None) };
        let wanted = PointRef::parse(&self.spec.to)?;
        let (replica, point, state) = match self.candidate(&entry.machine, &wanted) {
            Ok((record, point)) => (record.name, point, record.state),
            Err(fail) => {
                let step = if fail.code == Code::State { Step::Skipped } else { Step::Failed };
                self.note(index, |known| (known.step, known.why) = (step, Some(fail.what.clone())))?;
                return Ok(None);
            }
        };
        let known = self.run.record.entries.get(index).cloned().unwrap_or_default();
        // Its own takeover may have been begun by whoever carried this run out before.
        let ours = known.session.is_some();
        if !ours && !matches!(state, State::Ready | State::FailedFailover) {
            let why = format!("{replica} is {state}");
            self.note(index, |known| {
                (known.step, known.why, known.replica) = (Step::Skipped, Some(why.clone()), Some(replica.clone()));
            })?;
            return Ok(None);
        }
        if !ours && state == State::Ready && point.is_none() {
            let why = format!("{replica} has no restore point at {}", self.spec.to);
            self.note(index, |known| (known.step, known.why) = (Step::Failed, Some(why.clone())))?;
            return Ok(None);
        }
        let session = match known.session {
            Some(session) => session,
            None => {
                let act = Act::Failover {
                    force: false,
                    point: point.as_ref().map_or_else(|| self.spec.to.clone(), |point| point.id.to_string()),
                    start: !self.spec.no_start,
                    fence: self.spec.fence.unwrap_or_else(|| self.plan.fence.into()),
                };
                let reason = self.spec.reason.clone().or_else(|| Some(format!("plan {}", self.spec.plan)));
                let (grace, network) = (self.spec.grace, self.spec.network);
                let ask = Ask { replica: replica.clone(), reason, grace, network, seen: None, act };
                operate::begin(self.task.context, self.task.catalogue, &[ask])?.session.0
            }
        };
        self.note(index, |known| {
            (known.step, known.session, known.replica) = (Step::Starting, Some(session), Some(replica.clone()));
            (known.point, known.taken) = (point.as_ref().map(|p| p.id), point.as_ref().map(|p| p.taken));
        })?;
        if let Some(rested) = self.rested.get_mut(index) {
            *rested = Some(Instant::now());
        }
        let known = self.run.record.entries.get(index).cloned().unwrap_or_default();
        Ok(Some((entry, known)))
    }

    fn note(&mut self, index: usize, change: impl FnOnce(&mut EntryRecord)) -> Result<()> {
        if let Some(entry) = self.run.record.entries.get_mut(index) {
            change(entry);
            let machine = entry.machine.clone();
            let (step, why) = (format!("{:?}", entry.step).to_lowercase(), entry.why.clone());
            self.task.event(&format!("{}/{machine}", super::object(&self.spec.plan)), &step, why)?;
        }
        self.store()
    }

    fn gating(&mut self, index: usize, report: &Report) -> Result<()> {
        let (point, taken, warnings) = (report.point, report.taken, report.warnings.clone());
        self.note(index, |known| {
            (known.step, known.point, known.taken, known.warnings) = (Step::Gating, point, taken, warnings);
        })
    }

    /// Notes how a machine's turn ended; says whether the plan ends with it.
    fn ended(&mut self, index: usize, ended: Result<(), Fail>) -> Result<Option<Verdict>> {
        let rto = i64::try_from(self.began.elapsed().as_millis()).ok();
        if let Some(rested) = self.rested.get_mut(index) {
            *rested = Some(Instant::now());
        }
        match ended {
            Ok(()) => {
                self.note(index, |known| (known.step, known.rto_ms, known.why) = (Step::Ready, rto, None))?;
                Ok(None)
            }
            // Its takeover is in its session and goes on with the run.
            Err(_) if self.task.check().is_err() => Ok(None),
            Err(fail) => {
                let machine = self.plan.entries.get(index).map(|e| e.machine.clone()).unwrap_or_default();
                let why = fail.what.clone();
                self.note(index, |known| {
                    known.session = known.session.filter(|_| known.step == Step::Gating);
                    (known.step, known.why) = (Step::Failed, Some(why));
                })?;
                let policy = self.plan.entries.get(index).map(|e| e.on_failure).unwrap_or_default();
                Ok(match policy {
                    OnFailure::Continue => None,
                    OnFailure::Stop => Some(Verdict::Failed(format!("{machine}: {}", fail.what))),
                    OnFailure::Wait => Some(Verdict::Halted(format!("{machine}: {}", fail.what))),
                })
            }
        }
    }
}

/// Lets one machine take over and waits until it is ready.
fn one(
    task: &Task<'_>,
    spec: &PlanSpec,
    entry: PlanEntry,
    known: &EntryRecord,
    index: usize,
    tell: &Sender<News>,
) -> Result<(), Fail> {
    let session = SessionId(known.session.unwrap_or_default());
    let worker = Worker {
        context: task.context,
        catalogue: task.catalogue,
        owner: owner("plan"),
        tasks: 1,
        only: Some(session),
        until_idle: true,
        body: job::run,
        hands: Hands::default(),
    };
    worker.run(task.stop)?;
    task.check()?;
    let replica = known.replica.clone().unwrap_or_default();
    let report = match operate::reports(task.catalogue, session)?.remove(&replica) {
        Some(Ok(report)) => report,
        Some(Err(fail)) => return Err(fail),
        None => return Err(Fail::new(Code::Failed, format!("session {session} did nothing"))),
    };
    let _ = tell.send(News::Gating(index, Box::new(report)));
    if entry.gates.is_empty() || spec.no_start {
        return Ok(());
    }
    let row = task.catalogue.replica::<crate::replica::model::ReplicaRecord>(&replica)?;
    let record = row.map(|row| row.record);
    let addresses = record.as_ref().map(|record| record.rules.lines()).unwrap_or_default();
    let running = record.and_then(|record| record.failover).and_then(|failover| failover.running);
    let gated = gate::Entry {
        plan: &spec.plan,
        machine: &entry.machine,
        replica: &replica,
        addresses,
        running: running.as_ref(),
    };
    gate::wait(&gated, &entry.gates, entry.timeout, task.stop)
}
