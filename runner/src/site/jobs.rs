//! The reading of jobs.

use std::{collections::BTreeMap, time::Duration};

use super::{
    BackupJob, CatchUpPoints, CopyJob, CopyMode, Freeze, HealthJob, HealthPoints, Job, JobKind, Keep, NetworkMap,
    OnImpossible, ReIp, Reading, ReplicaSource, ReplicationJob, Through, prove::What, schedules, shape::Values,
};

/// Bytes of a digest's block where nothing is said.
const DIGEST_BYTES: u64 = 256 << 10;

impl Reading<'_> {
    pub(super) fn jobs(&mut self, top: Values<'_, '_>) -> BTreeMap<String, Job> {
        let mut jobs = BTreeMap::new();
        for (name, table, _) in top.named("job") {
            self.names.jobs.insert(name.clone());
            let by = format!("job.{name}");
            let kind = match table.text("kind").as_deref() {
                Some("backup") => self.backup(&by, table).map(JobKind::Backup),
                Some("replication") => self.replication(&by, table).map(JobKind::Replication),
                Some("copy") => self.copy(&by, table).map(JobKind::Copy),
                Some("health") => self.health(&by, table).map(JobKind::Health),
                Some("verification") => {
                    let what = format!(
                        "{by}: the kind `verification` is not built yet; `health` reads points back, `recover` boots them"
                    );
                    self.reader.unbuilt(table.place("kind"), what);
                    self.refer_all(What::Machine, "machines", &by, table);
                    None
                }
                _ => None,
            };
            if table.has("ping") {
                self.left_undone.push(format!("{by}: `ping` is not called by this build"));
            }
            let schedule = self.schedule(&name, table);
            let limits = self.limits(table);
            let Some(kind) = kind else { continue };
            let scripts = table.table("scripts");
            let job = Job {
                enabled: table.truth("enabled").unwrap_or(true),
                high_priority: table.truth("high_priority").unwrap_or(false),
                schedule,
                retry: schedules::retry(table),
                pre: scripts.and_then(|scripts| scripts.path("pre")),
                post: scripts.and_then(|scripts| scripts.path("post")),
                limits,
                kind,
            };
            jobs.insert(name, job);
        }
        jobs
    }

    /// Names in a list, each to be proven.
    pub(super) fn refer_all(&mut self, what: What, key: &str, by: &str, table: Values<'_, '_>) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for (name, place) in table.texts(key) {
            if names.contains(&name) {
                self.reader.problem(place, format!("{by} names `{name}` twice"));
                continue;
            }
            self.names.refer(what, &name, by, place);
            names.push(name);
        }
        names
    }

    /// As [`Self::refer_all`], and at least one.
    fn some(&mut self, what: What, key: &str, by: &str, table: Values<'_, '_>) -> Vec<String> {
        let names = self.refer_all(what, key, by, table);
        if names.is_empty() && table.has(key) {
            self.reader.problem(table.place(key), format!("{by}: `{key}` is empty"));
        }
        names
    }

    fn refer_one(&mut self, what: What, key: &str, by: &str, table: Values<'_, '_>) -> Option<String> {
        let name = table.text(key)?;
        self.names.refer(what, &name, by, table.place(key));
        Some(name)
    }

    fn backup(&mut self, by: &str, table: Values<'_, '_>) -> Option<BackupJob> {
        Some(BackupJob {
            machines: self.some(What::Machine, "machines", by, table),
            to: self.refer_one(What::Repository, "to", by, table)?,
            keep: self.keep(by, table),
            on_incremental_impossible: match table.text("on_incremental_impossible").as_deref() {
                Some("fail") => OnImpossible::Fail,
                _ => OnImpossible::Full,
            },
            freeze: match table.text("freeze").as_deref() {
                Some("require") => Freeze::Require,
                Some("off") => Freeze::Off,
                _ => Freeze::Try,
            },
            parallel_disks: table.number("parallel_disks").unwrap_or(4),
        })
    }

    fn keep(&mut self, by: &str, above: Values<'_, '_>) -> Option<Keep> {
        let table = above.table("keep")?;
        let keep = Keep {
            last: table.number("last"),
            days: table.number("days"),
            hourly: table.number("hourly"),
            daily: table.number("daily"),
            weekly: table.number("weekly"),
            monthly: table.number("monthly"),
            yearly: table.number("yearly"),
        };
        if keep == Keep::default() {
            self.reader
                .problem(above.place("keep"), format!("{by}: `keep` has no rule; leave it out to keep everything"));
        }
        Some(keep)
    }

    fn replication(&mut self, by: &str, table: Values<'_, '_>) -> Option<ReplicationJob> {
        let machines = self.some(What::Machine, "machines", by, table);
        let source = table.table("source").and_then(|source| self.replica_source(by, source));
        let target = table.table("target")?;
        let host = self.refer_one(What::Host, "host", by, target);
        let metadata = self.refer_one(What::Repository, "metadata_repository", by, table);
        let mut mapping = BTreeMap::new();
        for (machine, (replica, place)) in table.text_map("mapping") {
            if !machines.contains(&machine) {
                self.reader.problem(place, format!("{by} maps `{machine}`, which is not among its machines"));
            }
            mapping.insert(machine, replica);
        }
        let block_bytes = table.size("block_size").unwrap_or(DIGEST_BYTES);
        if !block_bytes.is_power_of_two() || !((64 << 10)..=(1 << 20)).contains(&block_bytes) {
            self.reader.problem(table.place("block_size"), "`block_size` is a power of two from 64KiB to 1MiB");
        }
        Some(ReplicationJob {
            machines,
            source: source?,
            host: host?,
            path: target.path("path"),
            name_suffix: table.text("name_suffix").unwrap_or_else(|| "_replica".to_owned()),
            points_to_keep: table.number("restore_points_to_keep").unwrap_or(7),
            metadata,
            network_map: network_map(table),
            reip: reip(table),
            mapping,
            parallel_disks: table.number("parallel_disks").unwrap_or(4),
            block_bytes,
            rpo_warn: table.duration("rpo_warn"),
            verify: table.truth("verify").unwrap_or(false),
            imported: table.table("source").and_then(|source| source.truth("imported")).unwrap_or(false),
        })
    }

    fn replica_source(&mut self, by: &str, table: Values<'_, '_>) -> Option<ReplicaSource> {
        let repositories = self.refer_all(What::Repository, "repositories", by, table);
        let seed = self.refer_one(What::Repository, "seed", by, table);
        let only = |reading: &mut Self, key: &str, from: &str| {
            if table.has(key) {
                reading.reader.problem(table.place(key), format!("`{key}` belongs to `from = \"{from}\"`"));
            }
        };
        match table.text("from")?.as_str() {
            "backup" => {
                only(self, "prefer_backup", "production");
                only(self, "seed", "production");
                if repositories.is_empty() {
                    self.reader.problem(table.place("from"), format!("{by}: `repositories` says where the points are"));
                }
                let catch_up = match table.text("catch_up").as_deref() {
                    Some("all") => CatchUpPoints::All,
                    _ => CatchUpPoints::Latest,
                };
                Some(ReplicaSource::Backup { repositories, catch_up })
            }
            _ => {
                only(self, "catch_up", "backup");
                let prefer_backup: Option<Duration> = table.duration("prefer_backup");
                if prefer_backup.is_some() && repositories.is_empty() {
                    let what = format!("{by}: `prefer_backup` needs `repositories`");
                    self.reader.problem(table.place("prefer_backup"), what);
                }
                Some(ReplicaSource::Production { prefer_backup, seed, repositories })
            }
        }
    }

    fn copy(&mut self, by: &str, table: Values<'_, '_>) -> Option<CopyJob> {
        let machines = self.some(What::Machine, "machines", by, table);
        let from = self.some(What::Repository, "from", by, table);
        let to = self.refer_one(What::Repository, "to", by, table);
        let keep = self.keep(by, table);
        let to = to?;
        if from.contains(&to) {
            self.reader.problem(table.place("to"), format!("{by} copies `{to}` to itself"));
        }
        let mode = match table.text("mode").as_deref() {
            Some("immediate") => CopyMode::Immediate,
            _ => CopyMode::Periodic,
        };
        Some(CopyJob { machines, from, to, mode, keep })
    }

    fn health(&mut self, by: &str, table: Values<'_, '_>) -> Option<HealthJob> {
        let repository = self.refer_one(What::Repository, "repository", by, table);
        let machines = self.refer_all(What::Machine, "machines", by, table);
        let repair_from = self.refer_all(What::Repository, "repair_from", by, table);
        let repository = repository?;
        if repair_from.contains(&repository) {
            let what = format!("{by} repairs `{repository}` from itself");
            self.reader.problem(table.place("repair_from"), what);
        }
        let points = match table.text("points").as_deref() {
            Some("all") => HealthPoints::All,
            _ => HealthPoints::Latest,
        };
        Some(HealthJob { repository, machines, points, repair_from })
    }
}

fn network_map(table: Values<'_, '_>) -> Vec<NetworkMap> {
    let entries = table.tables("network_map").into_iter();
    entries
        .filter_map(|(entry, _)| {
            Some(NetworkMap {
                from: entry.text("from")?,
                to: entry.text("to")?,
                from_vlan: entry.number("from_vlan"),
                to_vlan: entry.number("to_vlan"),
            })
        })
        .collect()
}

fn reip(table: Values<'_, '_>) -> Vec<ReIp> {
    let entries = table.tables("reip").into_iter();
    entries
        .filter_map(|(entry, _)| {
            Some(ReIp {
                from: entry.text("from")?,
                to: entry.text("to")?,
                mask: entry.text("mask")?,
                gateway: entry.text("gateway"),
                dns: entry.plain_texts("dns"),
                through: match entry.text("through").as_deref() {
                    Some("agent") => Through::Agent,
                    _ => Through::Programs,
                },
            })
        })
        .collect()
}
