//! Which replica of a machine takes over, and at which of its points.

use super::{Run, RunRecord};
use crate::{
    catalogue::Catalogue,
    fail::{Code, Fail, Result},
    failover::pick,
    operate::after_a_run,
    replica::{
        model::{PointRecord, ReplicaRecord},
        state::State,
    },
    site::Plan,
    source::PointRef,
};

/// The newest run of a plan.
///
/// # Errors
/// The catalogue's.
pub fn last_run(catalogue: &Catalogue, name: &str) -> Result<Option<Run>> {
    Ok(catalogue.plan_runs::<RunRecord>(name)?.pop())
}

/// The points of a replica in order.
fn points(catalogue: &Catalogue, name: &str) -> Result<Vec<PointRecord>> {
    let mut points: Vec<PointRecord> =
        catalogue.points_of::<PointRecord>(name)?.into_iter().map(|row| row.record).collect();
    points.sort_by_key(|point| point.number);
    Ok(points)
}

/// The replica of `machine` that has the newest point that fits, over all jobs, with that point; none where it has no
/// such point.
///
/// # Errors
/// [`Code::NotFound`]: there is no replica; [`Code::State`]: it was given up.
pub fn candidate(
    catalogue: &Catalogue,
    machine: &str,
    wanted: &PointRef,
) -> Result<(ReplicaRecord, Option<PointRecord>)> {
    let mut best: Option<(ReplicaRecord, Option<PointRecord>)> = None;
    let mut given_up = None;
    for row in catalogue.replicas::<ReplicaRecord>()? {
        let record = after_a_run(catalogue, row.record.check()?)?;
        if record.machine != machine || record.state == State::Absent {
            continue;
        }
        if record.state.is_final() {
            given_up = Some(record);
            continue;
        }
        let points = points(catalogue, &record.name)?;
        let point = pick(&record.name, &points, wanted).ok().cloned();
        let taken = |of: &Option<PointRecord>| of.as_ref().map(|point| point.taken);
        // One that serves already is what there is of the machine.
        let serves = !matches!(record.state, State::Ready | State::Processing);
        if best.as_ref().is_none_or(|(_, other)| serves || taken(&point) > taken(other)) {
            best = Some((record, point));
        }
        if serves {
            break;
        }
    }
    best.ok_or_else(|| match given_up {
        Some(ReplicaRecord { name, state, .. }) => {
            let what = format!("{name} of {machine} is {state}: the plan has nothing to do for it");
            Fail::new(Code::State, what).help("aquifer config show")
        }
        None => Fail::new(Code::NotFound, format!("there is no replica of {machine}")).help("aquifer replicas"),
    })
}

/// The replicas of a plan's machines that are in one of these states, in its order, and those that are not.
///
/// # Errors
/// The catalogue's.
pub fn ready_entries(catalogue: &Catalogue, plan: &Plan, states: &[State]) -> Result<(Vec<String>, Vec<String>)> {
    let (mut those, mut others) = (Vec::new(), Vec::new());
    for entry in &plan.entries {
        match candidate(catalogue, &entry.machine, &PointRef::Latest(0)) {
            Ok((record, _)) if states.contains(&record.state) => those.push(record.name),
            Ok((record, _)) => others.push(format!("{} is {}", record.name, record.state)),
            Err(fail) => others.push(fail.what),
        }
    }
    Ok((those, others))
}
