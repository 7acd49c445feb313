//! Where production's machines are, and where a way home can lead.

use std::{fs, path::PathBuf};

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    host::placed::{DESCRIPTION, Placed},
    replica::{
        images,
        model::{Home, HomeDisk, HomeKind, ReplicaRecord},
    },
    site::MachineSource,
};

/// Production's machine on its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Production {
    /// The host.
    pub host: String,
    /// Its name there.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
}

/// The machine that the site file calls `machine`; none where it is not on a host.
///
/// # Errors
/// [`Code::Config`].
pub fn production(context: &Context, machine: &str) -> Result<Option<Production>> {
    let site = context.site()?;
    Ok(site.machines.get(machine).and_then(|machine| match &machine.source {
        MachineSource::Host { host, name } => {
            let folder = site.hosts.get(host)?.images.join(name);
            Some(Production { host: host.clone(), name: name.clone(), folder })
        }
        MachineSource::Images { .. } => None,
    }))
}

/// Where a way home leads: production's own place, or `HOST:NAME`.
///
/// # Errors
/// [`Code::NotFound`]: no such host or machine; [`Code::Usage`].
pub fn target(context: &Context, record: &ReplicaRecord, kind: HomeKind, word: Option<&str>) -> Result<Home> {
    let place = match word {
        None => production(context, &record.machine)?.ok_or_else(|| {
            let what = format!("the site file does not say on which host {} is", record.machine);
            Fail::new(Code::NotFound, what).help_again("--to HOST:NAME")
        })?,
        Some(word) => named(context, word)?,
    };
    let mut home = Home {
        kind,
        machine: place.name,
        host: place.host,
        folder: place.folder.clone(),
        disks: Vec::new(),
        configured: None,
    };
    home.disks = match kind {
        HomeKind::New => {
            let tops = record.failover.iter().flat_map(|failover| &failover.tops);
            let new = |top: &crate::replica::model::Top| HomeDisk {
                disk: top.disk.clone(),
                path: place.folder.join(format!("{}.qcow2", top.disk)),
                format: aquifer_formats::probe::Format::Qcow2,
            };
            tops.map(new).collect()
        }
        HomeKind::Original | HomeKind::Restored => {
            described(record, &home)?.disks.iter().map(images::home_disk).collect()
        }
    };
    Ok(home)
}

/// The machine that is there: its description says which files are its disks, and nothing else does.
fn described(record: &ReplicaRecord, home: &Home) -> Result<Placed> {
    let Home { machine, host, folder, .. } = home;
    let description = folder.join(DESCRIPTION);
    if description.exists() {
        return Placed::read(folder);
    }
    let is_empty = fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none());
    let (what, cause, help) = if is_empty {
        (
            format!("there is no machine {machine} on {host}: {} is empty, or not there", folder.display()),
            "what holds it is not mounted, or the machine is lost; it can be made anew of what the replica has",
            format!("aquifer failback {} --new {host}:{machine}", record.name),
        )
    } else {
        let ours = record.folder.join(DESCRIPTION);
        (
            format!("nothing says which files in {} are the disks of {machine}", folder.display()),
            "machine.toml is written by whoever set the machine up; the replica's own has the same machine and names other files",
            format!("cp {} {}    # then put the files of {host} at `source`", ours.display(), description.display()),
        )
    };
    Err(Fail::new(Code::NotFound, what).at(description.display()).cause(cause).help(help))
}

fn named(context: &Context, word: &str) -> Result<Production> {
    let site = context.site()?;
    let (host, name) = word
        .split_once(':')
        .filter(|(host, name)| !host.is_empty() && !name.is_empty() && !name.contains('/') && !name.starts_with('.'))
        .ok_or_else(|| Fail::new(Code::Usage, format!("`{word}` is not HOST:NAME")))?;
    let Some(entry) = site.hosts.get(host) else {
        let known: Vec<&str> = site.hosts.keys().map(String::as_str).collect();
        let fail = Fail::new(Code::NotFound, format!("the site file has no host `{host}`"));
        return Err(fail.at("site file").cause(format!("it has {}", known.join(", "))).help("aquifer config show"));
    };
    Ok(Production { host: host.to_owned(), name: name.to_owned(), folder: entry.images.join(name) })
}
