//! `status --metrics`: figures of the site in the text form that Prometheus reads, for its file collector or a script.
//!
//! Invariants
//! - Every figure is looked up when it is asked for; nothing is remembered between two calls.
//! - A part that cannot be looked at is left out with a warning, and the others are there.
//! - Names and labels are those of `docs/glossary.md`; times in seconds, sizes in bytes.
//!
//! Not here: a server of its own: whoever collects calls this command.

use std::fmt::Write;

use aquifer_formats::repo::Repository;
use aquifer_mount::session::{Folder, Registry};
use jiff::Timestamp;

use crate::{
    catalogue::{Catalogue, SessionFilter, SessionResult},
    context::Context,
    fail::{Code, Result},
    recover::view::View,
    replica::model::{PointRecord, ReplicaRecord},
    repository,
};

/// Sessions that are counted: the newest.
const SESSIONS: u32 = 1000;

/// One family of figures.
struct Family {
    name: &'static str,
    help: &'static str,
    rows: Vec<(Vec<(&'static str, String)>, f64)>,
}

impl Family {
    fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help, rows: Vec::new() }
    }

    fn add(&mut self, labels: &[(&'static str, &str)], value: f64) {
        let labels = labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        self.rows.push((labels, value));
    }

    /// As it is read: what a label says is escaped, so that no name can add a line.
    fn text(&self) -> String {
        let mut out = format!("# HELP {0} {1}\n# TYPE {0} gauge\n", self.name, self.help);
        for (labels, value) in &self.rows {
            let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escaped(v))).collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let _ = writeln!(out, "{}{labels} {value}", self.name);
        }
        out
    }
}

/// Shows every figure there is.
pub(super) fn show(context: &Context) -> Result<()> {
    let mut families = Vec::new();
    if let Some(catalogue) = context.catalogue_if_there()? {
        families.extend(replicas(&catalogue)?);
        families.extend(sessions(&catalogue)?);
    }
    families.extend(recoveries(context)?);
    families.push(leases(context)?);
    for family in families.iter().filter(|family| !family.rows.is_empty()) {
        for (labels, value) in &family.rows {
            let labels: serde_json::Map<_, _> =
                labels.iter().map(|(k, v)| ((*k).to_owned(), v.clone().into())).collect();
            context.out.record("metric", &serde_json::json!({ "name": family.name, "labels": labels, "value": value }));
        }
        context.out.lines(family.text().trim_end());
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "figures are shown, not counted with")]
fn number(value: u64) -> f64 {
    value as f64
}

fn seconds_since(at: Timestamp) -> f64 {
    Timestamp::now().duration_since(at).as_secs_f64().max(0.0)
}

fn replicas(catalogue: &Catalogue) -> Result<Vec<Family>> {
    let mut lag = Family::new("aquifer_replica_lag_seconds", "Age of the newest restore point of a replica.");
    let mut points = Family::new("aquifer_replica_points", "Restore points of a replica.");
    let mut state = Family::new("aquifer_replica_state", "1 for the state that a replica has.");
    for row in catalogue.replicas::<ReplicaRecord>()?.into_iter().filter(|row| !row.record.state.is_final()) {
        let labels = [("replica", row.name.as_str()), ("machine", row.source.as_str())];
        let all = catalogue.points_of::<PointRecord>(&row.name)?;
        if let Some(newest) = all.iter().map(|point| point.record.taken).max() {
            lag.add(&labels, seconds_since(newest));
        }
        points.add(&labels, number(all.len() as u64));
        state.add(&[labels[0], labels[1], ("state", row.record.state.name())], 1.0);
    }
    Ok(vec![lag, points, state])
}

fn sessions(catalogue: &Catalogue) -> Result<Vec<Family>> {
    let mut results = Family::new("aquifer_job_sessions", "Ended runs of a job by their result, of the newest runs.");
    let mut ended = Family::new("aquifer_job_last_end_timestamp_seconds", "When a job's last run ended.");
    let mut bytes = Family::new("aquifer_job_last_bytes", "Bytes that the last run of a job moved, by stage.");
    let mut busy = Family::new("aquifer_job_last_busy_seconds", "Time that the last run of a job spent, by stage.");
    let filter = SessionFilter { job: None, open: false, since: None, limit: Some(SESSIONS) };
    let all = catalogue.sessions(&filter)?;
    let mut jobs: Vec<&str> = all.iter().filter_map(|session| session.job.as_deref()).collect();
    jobs.sort_unstable();
    jobs.dedup();
    for job in jobs {
        let runs = || all.iter().filter(|session| session.job.as_deref() == Some(job) && session.ended.is_some());
        for result in [SessionResult::Success, SessionResult::Warning, SessionResult::Cancelled, SessionResult::Failed]
        {
            let count = runs().filter(|session| session.result == result).count();
            results.add(&[("job", job), ("result", &result.to_string())], number(count as u64));
        }
        let Some(last) = runs().max_by_key(|session| session.ended) else { continue };
        if let Some(at) = last.ended {
            ended.add(&[("job", job)], at.as_duration().as_secs_f64());
        }
        let progress = &last.progress;
        for (stage, count) in [
            ("source", progress.bytes_read),
            ("production", progress.bytes_read_production),
            ("target", progress.bytes_written),
        ] {
            bytes.add(&[("job", job), ("stage", stage)], number(count));
        }
        for (stage, ms) in [
            ("source", progress.busy.source_ms),
            ("target", progress.busy.target_ms),
            ("throttle", progress.busy.throttle_ms),
        ] {
            busy.add(&[("job", job), ("stage", stage)], number(ms) / 1000.0);
        }
    }
    Ok(vec![results, ended, bytes, busy])
}

fn recoveries(context: &Context) -> Result<Vec<Family>> {
    let mut local = Family::new("aquifer_recovery_local_bytes", "Used data of a recovery that is local.");
    let mut used = Family::new("aquifer_recovery_used_bytes", "Used data of a recovery in all.");
    for pointer in Registry::new(&context.home()?).list()? {
        let Ok(view) = Folder::open(&pointer.dir).map_err(crate::fail::Fail::from).and_then(|f| View::of(&f)) else {
            context.out.warn(Code::WarnSkipped, format!("{} cannot be looked at", pointer.name), None);
            continue;
        };
        local.add(&[("session", &pointer.name)], number(view.local_bytes));
        used.add(&[("session", &pointer.name)], number(view.used_bytes));
    }
    Ok(vec![local, used])
}

/// Ages of the leases of every repository of the site file, and of the one that was named.
fn leases(context: &Context) -> Result<Family> {
    let mut age = Family::new("aquifer_lease_age_seconds", "How long ago a lease on a repository was taken.");
    let me = repository::me(context)?;
    for (name, entry) in &context.site()?.repositories {
        match Repository::open(&entry.url, me.clone()).and_then(|repo| repo.leases()) {
            Ok(leases) => leases.iter().for_each(|lease| {
                let (id, holder) = (lease.id.to_string(), lease.holder.name.as_str());
                age.add(&[("repository", name), ("lease", &id), ("holder", holder)], seconds_since(lease.since));
            }),
            Err(error) => context.out.warn(Code::WarnSkipped, format!("repository {name}: {error}"), None),
        }
    }
    Ok(age)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_adds_a_line_or_a_label() {
        let mut family = Family::new("aquifer_replica_points", "Restore points of a replica.");
        family.add(&[("replica", "a\"} 1\nevil{x=\"\\")], 3.0);
        let text = family.text();
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.ends_with("aquifer_replica_points{replica=\"a\\\"} 1\\nevil{x=\\\"\\\\\"} 3\n"), "{text}");
    }
}
