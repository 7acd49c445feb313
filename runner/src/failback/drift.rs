//! What a replica's machine and the machine that it comes home to do not have in common, beside the content of their
//! disks: a way home sends blocks, and nothing of this by itself.
//!
//! Invariants
//! - It is listed before anything is turned off, and somebody decides: it stays as it is, or production is described anew.
//! - Networks are compared as the job's rules map them.
//! - What is applied is written when the sides are changed, and taken back with them.
//! - A disk that only the replica has comes home to an image of its own, under a name that nothing has there, or nothing
//!   comes home: its content is not left behind unsaid. So does one whose file is gone at home.
//!
//! Not here: a disk that only production has is never touched.

use std::{
    fmt::Display,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::probe::Format;
use aquifer_vdisk::BlockCache;

use crate::{
    fail::{Fail, Result},
    host::placed::{self, DESCRIPTION, Placed},
    machine::{Described, DescribedDisk, DescribedNic},
    replica::{
        layers,
        model::{Configured, Home, HomeDisk, ReplicaRecord},
        rules::Rules,
    },
    units,
};

/// What differs, and how production would be described with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drift {
    /// Each in a sentence.
    pub lines: Vec<String>,
    /// Production's description, before and after.
    pub apply: Option<Configured>,
    /// Disks that production has not got, and the images that they would be there.
    pub made: Vec<HomeDisk>,
}

/// Compares what the replica's host starts with what production's would.
///
/// # Errors
/// A description or a disk that cannot be read.
pub fn drift(record: &ReplicaRecord, home: &Home, cache: &Arc<BlockCache>) -> Result<Drift> {
    let (ours, theirs) = (Placed::read(&record.folder)?.described, Placed::read(&home.folder)?.described);
    let mut lines = settings(&ours, &theirs);
    let (more, nics) = cards(&record.rules, &ours.nics, &theirs.nics);
    lines.extend(more);
    let described = lines.len();
    let mut made = Vec::new();
    for disk in &theirs.disks {
        if !ours.disks.iter().any(|other| other.name == disk.name) {
            lines.push(format!("the disk {} is at {} only, and stays as it is", disk.name, home.machine));
        }
    }
    for top in record.failover.iter().flat_map(|failover| &failover.tops) {
        let Some(disk) = home.disks.iter().find(|disk| disk.disk == top.disk) else {
            let path = free_name(&home.folder, &top.disk, &made);
            let size = units::bytes(top.size);
            lines.push(format!("the disk {} ({size}) is at the replica only: `--drift apply` makes it", top.disk));
            made.push(HomeDisk { disk: top.disk.clone(), path, format: Format::Qcow2 });
            continue;
        };
        let size = layers::open(&disk.path, disk.format, cache)?.size();
        if size != top.size {
            let (here, there) = (units::bytes(top.size), units::bytes(size));
            lines.push(format!("the disk {} has {here} at the replica and {there} at {}", top.disk, home.machine));
        }
    }
    let path = home.folder.join(DESCRIPTION);
    let before = fs::read_to_string(&path).map_err(|e| Fail::io(path.display(), "read", &e))?;
    let mut disks = theirs.disks.clone();
    // What is described and has no file is made like what is not described.
    disks.retain(|disk| made.iter().all(|made| made.disk != disk.name));
    disks.extend(made.iter().map(|disk| described_disk(&ours, disk)));
    let after = Described {
        disks,
        cpus: ours.cpus,
        memory: ours.memory,
        firmware: ours.firmware,
        machine_type: ours.machine_type,
        nics,
        ..theirs
    };
    let apply = (described > 0 || !made.is_empty()).then(|| Configured { before, after: placed::text(&after) });
    Ok(Drift { lines, apply, made })
}

/// A name for the image of a disk that nothing in the folder has: the disk that was taken out may have left its own.
fn free_name(folder: &Path, disk: &str, made: &[HomeDisk]) -> PathBuf {
    let names = (1_u64..).map(|n| if n == 1 { format!("{disk}.qcow2") } else { format!("{disk}-{n}.qcow2") });
    let is_free = |path: &PathBuf| path.symlink_metadata().is_err() && made.iter().all(|other| other.path != *path);
    names.map(|name| folder.join(name)).find(is_free).unwrap_or_default()
}

/// The disk as the replica's machine has it, in its new file. What starts first stays production's own choice.
fn described_disk(ours: &Described, disk: &HomeDisk) -> DescribedDisk {
    let there = ours.disks.iter().find(|there| there.name == disk.disk).cloned().unwrap_or_default();
    let file = disk.path.file_name().map(|name| name.to_string_lossy().into_owned());
    DescribedDisk { name: disk.disk.clone(), source: file, boot_order: None, ..there }
}

/// Writes one of the two descriptions of production.
///
/// # Errors
/// I/O.
pub fn put(home: &Home, text: impl FnOnce(&Configured) -> &String) -> Result<()> {
    let Some(configured) = &home.configured else { return Ok(()) };
    crate::replica::digests::put_file(&home.folder.join(DESCRIPTION), text(configured).as_bytes())
}

fn settings(ours: &Described, theirs: &Described) -> Vec<String> {
    let firmware = |described: &Described| described.firmware.map(|kind| format!("{kind:?}").to_ascii_lowercase());
    let all = [
        differs("processors", ours.cpus, theirs.cpus),
        differs("memory", ours.memory.map(units::bytes), theirs.memory.map(units::bytes)),
        differs("firmware", firmware(ours), firmware(theirs)),
        differs("machine type", ours.machine_type.as_ref(), theirs.machine_type.as_ref()),
    ];
    all.into_iter().flatten().collect()
}

fn differs<T: PartialEq + Display>(what: &str, ours: Option<T>, theirs: Option<T>) -> Option<String> {
    let word = |said: &Option<T>| said.as_ref().map_or_else(|| "unsaid".to_owned(), T::to_string);
    (ours != theirs).then(|| format!("{what}: {} at the replica, {} at home", word(&ours), word(&theirs)))
}

/// What differs between network cards, and those that production would have.
fn cards(rules: &Rules, ours: &[DescribedNic], theirs: &[DescribedNic]) -> (Vec<String>, Vec<DescribedNic>) {
    let (mut lines, mut nics) = (Vec::new(), Vec::new());
    let mut left: Vec<&DescribedNic> = theirs.iter().collect();
    for (index, card) in ours.iter().enumerate() {
        // A card is known by its address; one without by its place.
        let same = |other: &&&DescribedNic| match (&card.mac, &other.mac) {
            (Some(ours), Some(theirs)) => ours == theirs,
            (None, None) => theirs.get(index).is_some_and(|there| std::ptr::eq(there, **other)),
            _ => false,
        };
        let name = card.mac.clone().unwrap_or_else(|| (index + 1).to_string());
        let Some(other) = left.iter().find(same).copied() else {
            lines.push(format!("the network card {name} is at the replica only"));
            nics.push(DescribedNic {
                network: card.network.as_deref().map(|network| rules.back(network)),
                ..card.clone()
            });
            continue;
        };
        left.retain(|left| !std::ptr::eq(*left, other));
        let expected = other.network.as_deref().map(|network| rules.forth(network));
        let network = if card.network == expected {
            other.network.clone()
        } else {
            let what = format!("network of the card {name}");
            lines.extend(differs(&what, card.network.as_ref(), expected.as_ref()));
            card.network.as_deref().map(|network| rules.back(network))
        };
        let what = format!("model of the card {name}");
        lines.extend(differs(&what, Some(model(card)), Some(model(other))));
        nics.push(DescribedNic { network, ..card.clone() });
    }
    lines.extend(left.iter().map(|card| {
        let name = card.mac.as_deref().or(card.network.as_deref()).unwrap_or("without an address");
        format!("the network card {name} is at home only")
    }));
    (lines, nics)
}

/// A card of which nothing is said is of this model.
fn model(card: &DescribedNic) -> &str {
    card.model.as_deref().unwrap_or("virtio")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::rules::Network;

    fn card(mac: Option<&str>, network: &str) -> DescribedNic {
        DescribedNic { mac: mac.map(str::to_owned), model: None, network: Some(network.into()) }
    }

    #[test]
    fn cards_are_compared_as_networks_are_mapped() {
        let network = Network { from: "prod".into(), to: "dr".into(), from_vlan: Some(12), to_vlan: Some(112) };
        let rules = Rules { networks: vec![network], ..Rules::default() };
        let home = [card(Some("a"), "prod.12"), card(Some("b"), "store")];
        let same = [card(Some("b"), "store"), card(Some("a"), "dr.112")];
        assert_eq!(cards(&rules, &same, &home).0, Vec::<String>::new());
        let other = [card(Some("a"), "dr.112"), card(Some("b"), "dr.112"), card(Some("c"), "lan")];
        let (lines, nics) = cards(&rules, &other, &home);
        assert_eq!(
            lines,
            [
                "network of the card b: dr.112 at the replica, store at home",
                "the network card c is at the replica only"
            ]
        );
        let networks: Vec<_> = nics.iter().filter_map(|nic| nic.network.as_deref()).collect();
        assert_eq!(networks, ["prod.12", "prod.12", "lan"]);
        let (lines, nics) = cards(&rules, &[card(None, "dr.112")], &[card(None, "prod.12"), card(None, "lan")]);
        assert_eq!((lines, nics.len()), (vec!["the network card lan is at home only".to_owned()], 1));
    }
}
