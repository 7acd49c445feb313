//! Where production's machines are, and where a way home can lead.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    host::{
        in_use::{self, Against},
        placed::{DESCRIPTION, Placed},
    },
    job::place::Place,
    replica::{
        images,
        model::{Home, HomeDisk, HomeKind, ReplicaRecord},
    },
    site::{MachineSource, Site},
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

impl Production {
    /// Programs that have its disks open to write, whoever they are; none where its place cannot be seen.
    pub fn written_by(&self, context: &Context) -> Option<String> {
        let host = context.site().ok()?.hosts.get(&self.host)?;
        let place = Place::find(context, &self.host, host, &self.name).ok()?;
        let holders = place.disks.iter().find_map(|(_, path)| in_use::by(path, Against::Writers).ok().flatten())?;
        Some(in_use::named(&holders))
    }
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
/// [`Code::NotFound`]: no such host or machine; [`Code::Refused`]: it is another machine's; [`Code::Usage`].
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
        made: Vec::new(),
        made_files: BTreeMap::new(),
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
            let there = described(record, &home)?.disks;
            there.iter().map(images::home_disk).filter(|disk| disk.path.symlink_metadata().is_ok()).collect()
        }
    };
    not_of_another(context.site()?, record, &home)?;
    Ok(home)
}

/// Refuses a home that the site file knows as another machine: what comes home replaces what is there.
fn not_of_another(site: &Site, record: &ReplicaRecord, home: &Home) -> Result<()> {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = real(&home.folder);
    let ours: Vec<PathBuf> = home.disks.iter().map(|disk| real(&disk.path)).collect();
    for (name, machine) in site.machines.iter().filter(|(name, _)| **name != record.machine) {
        let taken = match &machine.source {
            MachineSource::Host { host, name } => {
                let theirs = site.hosts.get(host).map(|host| real(&host.images.join(name)));
                theirs.is_some_and(|theirs| folder == theirs || ours.iter().any(|disk| disk.starts_with(&theirs)))
            }
            MachineSource::Images { disks, .. } => disks.values().any(|source| {
                let path = source.split_once(':').map_or(source.as_str(), |(_, path)| path);
                [source.as_str(), path].iter().any(|path| ours.contains(&real(Path::new(path))))
            }),
        };
        if taken {
            let what = format!(
                "{} of {} is the machine {name} of the site file, not {}",
                home.machine, home.host, record.machine
            );
            let help = format!("aquifer failback {} --new {}:NAME", quoted(&record.name), quoted(&home.host));
            return Err(Fail::new(Code::Refused, what).at(home.folder.display()).help(help));
        }
    }
    Ok(())
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
            format!("aquifer failback {} --new {}", quoted(&record.name), quoted(&format!("{host}:{machine}"))),
        )
    } else {
        let ours = record.folder.join(DESCRIPTION);
        (
            format!("nothing says which files in {} are the disks of {machine}", folder.display()),
            "machine.toml is written by whoever set the machine up; the replica's own has the same machine and names other files",
            format!(
                "cp {} {}    # then put the files of {host} at `source`",
                quoted(&ours.display().to_string()),
                quoted(&description.display().to_string())
            ),
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
