//! Whether what a site file names is there: folders of hosts, machines on them, secrets.
//!
//! Invariants
//! - What is not there is a warning, not an error: the file is right, and a site that has lost a host still has to
//!   be read.
//! - Nothing is started, connected to or changed; the command of a secret is not run.

use std::io::ErrorKind;

use crate::{
    context::{Context, quoted},
    fail::{Code, Fail},
    host::shape::{CPUS_DEFAULT, MEMORY_DEFAULT},
    job::{self, place::Place},
    site::{Host, JobKind, MachineSource, Site},
    units,
};

/// Warns of everything that is not there.
pub(super) fn check(context: &Context, site: &Site) {
    for (name, host) in &site.hosts {
        if let Some(why) = absent(host) {
            let images = host.images.display().to_string();
            let what = format!("host.{name}: the folder of its machines, {images}, {why}");
            context.out.warn(Code::WarnCheck, what, Some(&format!("mkdir -p {}    # or mount it", quoted(&images))));
        }
    }
    for (name, machine) in &site.machines {
        if let MachineSource::Host { host, name: there } = &machine.source
            && let Some(on) = site.hosts.get(host).filter(|on| absent(on).is_none())
        {
            placed(context, (name, &machine.exclude_disks), host, on, there);
        }
    }
    renamed(context, site);
    if let Some(Err(fail)) = site.catalogue.as_ref().and_then(|c| c.password.as_ref()).map(|s| context.check_secret(s))
    {
        warn(context, "catalogue.password", &fail);
    }
}

/// Tells of points that a machine may have under another name.
fn renamed(context: &Context, site: &Site) {
    let backups = site.jobs.values().filter_map(|job| match &job.kind {
        JobKind::Backup(backup) => Some(backup),
        _ => None,
    });
    for (to, machine) in backups.flat_map(|job| job.machines.iter().map(|machine| (&job.to, machine))) {
        // A repository that is not there yet is told of elsewhere.
        let Ok(repo) = crate::repository::open_named(context, to) else { continue };
        match job::unnamed(&repo, site, machine) {
            Ok(unnamed) if unnamed.is_empty() => {}
            Ok(unnamed) => {
                context.out.say(format_args!("note: {}", job::told_of_unnamed(machine, to, &unnamed)));
                let record = serde_json::json!({ "machine": machine, "repository": to, "others": unnamed });
                context.out.record("unnamed", &record);
            }
            Err(fail) => warn(context, &format!("repository.{to}"), &fail),
        }
    }
}

/// Why the folder of a host's machines cannot be used.
fn absent(host: &Host) -> Option<String> {
    match std::fs::read_dir(&host.images) {
        Ok(_) => None,
        Err(error) if error.kind() == ErrorKind::NotFound => Some("is not there".to_owned()),
        Err(error) => Some(format!("cannot be listed: {error}")),
    }
}

fn placed(context: &Context, (name, excluded): (&str, &[String]), host: &str, on: &Host, there: &str) {
    let place = match Place::find(context, host, on, there) {
        Ok(place) => place,
        Err(fail) => return warn(context, &format!("machine.{name}"), &fail),
    };
    for what in place.doubtful(excluded) {
        context.out.warn(Code::WarnCheck, format!("machine.{name}: {what}"), None);
    }
    if place.description.is_none() {
        context.out.say(format_args!(
            "note: machine.{name} has no machine.toml in {}: it is backed up and replicated all the same, and started \
             with {} of memory and {}; failback needs one (docs/machines.md)",
            place.folder.display(),
            units::bytes(MEMORY_DEFAULT),
            units::count(usize::try_from(CPUS_DEFAULT).unwrap_or(usize::MAX), "CPU"),
        ));
        let record = serde_json::json!({
            "machine": name, "host": host, "folder": place.folder, "memory_bytes": MEMORY_DEFAULT, "cpus": CPUS_DEFAULT,
        });
        context.out.record("undescribed", &record);
    }
}

fn warn(context: &Context, who: &str, fail: &Fail) {
    let at = fail.at.as_ref().map(|at| format!(" ({})", at.path)).unwrap_or_default();
    let help = fail.do_.as_ref().map(ToString::to_string);
    context.out.warn(Code::WarnCheck, format!("{who}: {}{at}", fail.what), help.as_deref());
}
