//! Places of a site file that lie in each other's way: what one of them does there, the other takes for its own.
//!
//! Invariants
//! - A warning each, naming both: a file may be right for a reason that is not in it.
//! - Folders are compared as they are on disk, where they are there; hosts of one cluster share theirs by right.

use std::path::{Path, PathBuf};

use crate::{
    context::Context,
    fail::Code,
    site::{MachineSource, Site},
};

/// A folder that the site file names, and what for.
struct Named {
    what: String,
    path: PathBuf,
}

/// Warns of every pair.
pub(super) fn check(context: &Context, site: &Site) {
    for clash in clashes(site) {
        context.out.warn(Code::WarnCheck, clash, None);
    }
}

fn clashes(site: &Site) -> Vec<String> {
    let named = |what: String, path: &Path| Named { what, path: real(path) };
    let images: Vec<Named> =
        site.hosts.iter().map(|(name, host)| named(format!("host.{name}"), &host.images)).collect();
    let runtimes: Vec<Named> = site
        .hosts
        .iter()
        .filter_map(|(name, host)| Some(named(format!("host.{name}.runtime"), host.runtime.as_ref()?)))
        .collect();
    let repositories: Vec<Named> =
        site.repositories.iter().map(|(name, repo)| named(format!("repository.{name}"), &repo.url)).collect();
    let machines: Vec<Named> = site
        .machines
        .iter()
        .filter_map(|(name, machine)| match &machine.source {
            MachineSource::Host { host, name: there } => {
                Some(named(format!("machine.{name}"), &site.hosts.get(host)?.images.join(there)))
            }
            MachineSource::Images { .. } => None,
        })
        .collect();
    let share = |one: &str, other: &str| {
        let of = |what: &str| what.trim_start_matches("host.").split('.').next().unwrap_or_default().to_owned();
        site.clusters.values().any(|c| c.members.contains(&of(one)) && c.members.contains(&of(other)))
    };
    let mut found = Vec::new();
    for (one, other) in pairs(&images).chain(pairs(&runtimes)).filter(|(one, other)| !share(&one.what, &other.what)) {
        let nested = one.path.starts_with(&other.path) || other.path.starts_with(&one.path);
        if nested {
            found.push(format!(
                "{} and {} have one folder, or one inside the other: {}",
                one.what,
                other.what,
                longer(one, other)
            ));
        }
    }
    for (one, other) in pairs(&machines).filter(|(one, other)| one.path == other.path) {
        found.push(format!("{} and {} are the same machine: {}", one.what, other.what, one.path.display()));
    }
    for host in &images {
        for repository in repositories.iter().filter(|repository| repository.path.starts_with(&host.path)) {
            let (what, path) = (&repository.what, repository.path.display());
            found.push(format!("{what} lies among the machines of {}, and is lost with them: {path}", host.what));
        }
        for machine in machines.iter().filter(|machine| host.path.starts_with(&machine.path)) {
            found.push(format!("{} lies inside of {}: {}", host.what, machine.what, host.path.display()));
        }
    }
    found
}

fn pairs(all: &[Named]) -> impl Iterator<Item = (&Named, &Named)> {
    all.iter().enumerate().flat_map(|(at, one)| all.iter().skip(at + 1).map(move |other| (one, other)))
}

fn longer(one: &Named, other: &Named) -> String {
    let (one, other) = (&one.path, &other.path);
    if one.starts_with(other) { one } else { other }.display().to_string()
}

fn real(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}
