//! Production as a replication reads it: the images of a machine that is off, or a running one caught at a moment.
//!
//! Invariants
//! - A machine that runs is never read from its files: its hypervisor serves them as they were.
//! - Whatever was put into a running machine is taken out again, also where the copy failed.

use std::collections::BTreeMap;

use aquifer_formats::{
    probe::Format,
    repo::{DiskName, record::MachineDescription},
};
use aquifer_vdisk::ChainSpec;
use jiff::Timestamp;

use super::super::{
    backup::fleece::{self, Catch, Fleece},
    place::Place,
};
use crate::{
    backup::{self, Hint, Wanted, describe},
    context::Context,
    fail::{Code, Fail, Result},
    replica::{
        desk::Desk,
        model::HomeDisk,
        production::{Look, Moment},
        run::{RunSource, SourceDoor},
    },
    site::{Freeze, Machine, MachineSource, Site},
    source::{SelectedDisk, SourceOptions},
};

/// Production, held still as far as it runs, until this is dropped.
pub(super) struct Watched {
    pub(super) look: Look,
    // The moment is over before what serves it ends.
    _held: Option<(Moment, Option<Fleece>)>,
}

impl Watched {
    /// Finds the machine and holds it still.
    ///
    /// # Errors
    /// There is no such machine; a disk that cannot be read.
    pub(super) fn begin(context: &Context, desk: &Desk<'_>, site: &Site, machine: &str) -> Result<Self> {
        if let Some(look) = Self::images(context, desk, site, machine)? {
            return Ok(Self { look, _held: None });
        }
        let entry = entry(site, machine)?;
        if let MachineSource::Images { disks, .. } = &entry.source {
            return served(context, entry, machine, disks);
        }
        let place = place(context, site, entry)?.ok_or_else(|| Fail::new(Code::Bug, "a machine without a place"))?;
        caught(context, desk, entry, machine, &place)
    }

    /// Its images, where the machine does not run.
    ///
    /// # Errors
    /// As [`Watched::begin`].
    pub(super) fn images(context: &Context, desk: &Desk<'_>, site: &Site, machine: &str) -> Result<Option<Look>> {
        let entry = entry(site, machine)?;
        let place = place(context, site, entry)?;
        if let Some(place) = &place
            && fleece::connect(&place.sockets())?.is_some()
        {
            return Ok(None);
        }
        let words: Vec<(DiskName, String)> = match (&entry.source, &place) {
            (MachineSource::Images { disks, .. }, _) => {
                let name = |(name, word): (&String, &String)| Ok((DiskName::new(name.as_str())?, word.clone()));
                disks.iter().map(name).collect::<Result<_>>()?
            }
            (_, Some(place)) => place.disks.iter().map(|(name, path)| (name.clone(), word(path))).collect(),
            (_, None) => Vec::new(),
        };
        if words.iter().all(|(_, word)| is_served(word)) && !words.is_empty() {
            return Ok(None);
        }
        let allow_backing = place.iter().map(|place| place.folder.clone()).collect();
        let options = SourceOptions { allow_backing, ..SourceOptions::default() };
        let (mut wanted, mut disks) = (Vec::new(), Vec::new());
        for (name, word) in words.iter().filter(|(name, _)| !is_out(entry, name)) {
            let disk = backup::open_source(context, name, word, &options, Hint::None)?;
            disks.push(home_disk(&disk)?);
            wanted.push(disk);
        }
        some(machine, &disks)?;
        for what in place.iter().flat_map(|place| place.doubtful(&entry.exclude_disks)) {
            (desk.warn)(Code::WarnHost, format!("{machine}: {what}"));
        }
        let description = about(context, entry, machine, place.as_ref(), &wanted)?;
        drop(wanted);
        Ok(Some(Look::at_images(desk, disks, description)?))
    }
}

fn entry<'s>(site: &'s Site, machine: &str) -> Result<&'s Machine> {
    let missing = || Fail::new(Code::NotFound, format!("the site file has no machine `{machine}`"));
    site.machines.get(machine).ok_or_else(missing)
}

fn place(context: &Context, site: &Site, entry: &Machine) -> Result<Option<Place>> {
    let MachineSource::Host { host, name } = &entry.source else { return Ok(None) };
    let missing = || Fail::new(Code::NotFound, format!("the site file has no host `{host}`"));
    Place::find(context, host, site.hosts.get(host).ok_or_else(missing)?, name).map(Some)
}

fn is_out(entry: &Machine, name: &DiskName) -> bool {
    entry.exclude_disks.iter().any(|out| out == name.as_str())
}

fn some<T>(machine: &str, disks: &[T]) -> Result<()> {
    if disks.is_empty() {
        return Err(Fail::new(Code::NotFound, format!("every disk of {machine} is excluded")));
    }
    Ok(())
}

fn word(path: &std::path::Path) -> String {
    let raw = path.extension().is_none_or(|end| end != "qcow2");
    if raw { format!("raw:{}", path.display()) } else { path.display().to_string() }
}

fn home_disk(disk: &Wanted) -> Result<HomeDisk> {
    let refused =
        |what: String| Fail::new(Code::Unsupported, format!("{what}: its job takes it `from = \"backup\"` only"));
    let ChainSpec::Image { path, .. } = &disk.selected.spec else {
        return Err(refused(format!("the disk {} is no image of production", disk.name)));
    };
    let format = match disk.format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => return Err(refused(format!("the disk {} is an image of the format {other}", disk.name))),
    };
    Ok(HomeDisk { disk: disk.name.as_str().to_owned(), path: path.clone(), format })
}

fn about(
    context: &Context,
    entry: &Machine,
    machine: &str,
    place: Option<&Place>,
    wanted: &[Wanted],
) -> Result<MachineDescription> {
    let (description, nvram) = match (&entry.source, place) {
        (MachineSource::Images { description, .. }, _) => (description.as_deref(), None),
        (_, Some(place)) => (place.description.as_deref(), place.variables.as_deref()),
        (_, None) => (None, None),
    };
    describe::describe(
        context,
        &describe::About { machine, description, nvram, left_out: &entry.exclude_disks },
        wanted,
    )
}

/// Whether a SOURCE is an export of a server: then whoever serves it holds it still.
fn is_served(word: &str) -> bool {
    ["nbd://", "nbds://", "nbd+unix://", "nbds+unix://"].iter().any(|scheme| word.starts_with(scheme))
}

/// Disks that their own computer serves: what is compared and left out is so here, and only reading is done there.
fn served(context: &Context, entry: &Machine, machine: &str, disks: &BTreeMap<String, String>) -> Result<Watched> {
    let (mut wanted, mut doors, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    let taken = Timestamp::now();
    for (name, word) in disks {
        let name = DiskName::new(name.as_str())?;
        if is_out(entry, &name) {
            continue;
        }
        let disk = backup::open_source(context, &name, word, &SourceOptions::default(), Hint::None)?;
        let ChainSpec::Nbd { uri } = &disk.selected.spec else {
            return Err(Fail::new(Code::Unsupported, format!("the disks of {machine} are served in part only")));
        };
        sizes.push((name.as_str().to_owned(), disk.disk.size()));
        doors.push(SourceDoor { disk: name.as_str().to_owned(), uri: uri.clone() });
        wanted.push(disk);
    }
    some(machine, &wanted)?;
    let description = about(context, entry, machine, None, &wanted)?;
    let moment = Moment::begin();
    let source = RunSource::Doors { moment: moment.id(), disks: doors };
    Ok(Watched { look: Look { source, disks: sizes, description, taken }, _held: Some((moment, None)) })
}

/// A running machine, caught.
fn caught(context: &Context, desk: &Desk<'_>, entry: &Machine, machine: &str, place: &Place) -> Result<Watched> {
    let sockets = place.sockets();
    let files: Vec<_> = place.disks.iter().filter(|(name, _)| !is_out(entry, name)).cloned().collect();
    some(machine, &files)?;
    let claim = fleece::claim(&sockets)?;
    let mut qmp = fleece::connect(&sockets)?.ok_or_else(|| Fail::new(Code::State, "the machine has just ended"))?;
    let tell = |what: String| (desk.warn)(Code::WarnHost, format!("{machine}: {what}"));
    let files = place.opened(&mut qmp, files, &tell)?;
    let disks = fleece::disks(&mut qmp, &files)?;
    drop(qmp);
    let catches = disks.into_iter().map(|disk| Catch { disk, since: None }).collect();
    let (guard, _) = context.own_command()?;
    let taken = Timestamp::now();
    let (fleece, not_frozen) = Fleece::catch(claim, sockets, catches, Freeze::Try, &guard)?;
    if let Some(why) = not_frozen.filter(|_| fleece.has_agent()) {
        (desk.warn)(Code::WarnHost, format!("{machine}: the point is as after a loss of power: {why}"));
    }
    let (mut wanted, mut doors, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    for (name, _) in &files {
        let uri = fleece.uri(name);
        let selected = SelectedDisk { name: name.as_str().to_owned(), spec: ChainSpec::Nbd { uri: uri.clone() } };
        let disk = backup::open_selected(context, name, selected, Hint::None)?;
        sizes.push((name.as_str().to_owned(), disk.disk.size()));
        doors.push(SourceDoor { disk: name.as_str().to_owned(), uri });
        wanted.push(disk);
    }
    let description = about(context, entry, machine, Some(place), &wanted)?;
    drop(wanted);
    let moment = Moment::begin();
    let source = RunSource::Doors { moment: moment.id(), disks: doors };
    let look = Look { source, disks: sizes, description, taken };
    Ok(Watched { look, _held: Some((moment, Some(fleece))) })
}
