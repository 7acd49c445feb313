//! A machine that is on the target already becomes the replica of another one: mapping.
//!
//! ```text
//! <replica>/vda.qcow2   ->  <replica>/vda/1.qcow2
//! <replica>/vdb.raw     ->  <replica>/vdb/0.raw, with an empty layer vdb/1.qcow2 on it
//! ```
//!
//! Invariants
//! - Nothing of the machine is copied: its images are moved within its folder and never written to again.
//! - Cut short before its point is known, the next run goes on with it; failed, everything is back where it was.
//!
//! Not here: what differs from the source (the first run finds out by digests).

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_formats::{
    Storage,
    probe::Format,
    qcow2::Qcow2,
    repo::{
        DiskName,
        record::{DiskDescription, MachineDescription},
    },
    storage::{Access, FileStorage},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    desk::{Desk, Stamp, Went, Work},
    digests::{Digests, put_file, sync_folder},
    images, keep, layers,
    model::{Carried, Origin, PointRecord, ReplicaRecord, Top, VERSION},
    run::{ReplicaSpec, describe, fresh, store_fresh},
    state::{Op, State},
    trust::{self, Holds},
};
use crate::{
    backup::describe::of_described,
    fail::{Code, Fail, Result},
    host::placed::{self, Placed},
    step::{AfterCrash, Plan},
};

/// The first layer's number; what a raw image is moved to has the one before.
const FIRST: u64 = 1;

/// An image that is moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Image {
    from: PathBuf,
    to: PathBuf,
    format: Format,
    top: Top,
}

/// A mapping under way.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdoptWork {
    kind: String,
    name: String,
    images: Vec<Image>,
    /// The description, as it was.
    original: String,
    /// The restore point that the machine's own state becomes.
    pub point: PointRecord,
}

/// Makes the machine in the replica's folder the replica, if it is not yet; its state is the first restore point.
///
/// # Errors
/// [`Code::NotFound`]: there is no such machine; [`Code::State`]: it runs; [`Code::Unsupported`]: its disks lie
/// elsewhere, or stand on other images.
pub fn adopt(desk: &Desk<'_>, spec: &ReplicaSpec) -> Result<Option<PointRecord>> {
    if desk.catalogue.replica::<ReplicaRecord>(&spec.name)?.is_some() {
        super::recover::recover(desk, &spec.name)?;
        let row = desk.load(&spec.name)?;
        if row.record.state != State::Absent || row.record.unfinished.is_some() {
            return Ok(None);
        }
    }
    let missing = |_| {
        let what = format!("{} is mapped to {}, which is not there", spec.machine, spec.folder.display());
        Fail::new(Code::NotFound, what).at(spec.folder.display()).help("aquifer config check")
    };
    let folder = fs::canonicalize(&spec.folder).map_err(missing)?;
    if let Some(stamp) = Stamp::read(&folder)? {
        let known = desk.catalogue.replica::<ReplicaRecord>(&spec.name)?;
        if known.is_none_or(|known| known.record.lineage != stamp.lineage) {
            let what = format!("{} is a replica of {} already", folder.display(), stamp.owner_name);
            return Err(Fail::new(Code::ForeignOwner, what).at(folder.display()));
        }
    }
    if desk.running(&folder).is_some() {
        let what = format!("the machine in {} runs; it has to be off to become a replica", folder.display());
        return Err(Fail::new(Code::State, what).at(folder.display()));
    }
    let work = plan_of(desk, spec, &folder)?;
    if desk.catalogue.replica::<ReplicaRecord>(&spec.name)?.is_none() {
        store_fresh(desk, fresh(spec, folder))?;
    }
    desk.ready_for(&spec.name, Op::Replicate)?;
    Ok(Some(desk.carry_out(&spec.name, work, None)?.point))
}

fn plan_of(desk: &Desk<'_>, spec: &ReplicaSpec, folder: &Path) -> Result<AdoptWork> {
    let placed = Placed::read(folder)?;
    let path = folder.join(placed::DESCRIPTION);
    let original = fs::read_to_string(&path).map_err(|e| Fail::io(path.display(), "read", &e))?;
    let (mut found, mut disks, mut taken) = (Vec::new(), Vec::new(), 0);
    for disk in &placed.disks {
        let format = images::format(disk.format);
        let from = fs::canonicalize(&disk.path).map_err(|e| Fail::io(disk.path.display(), "find", &e))?;
        let unfit = |why: &str| {
            let fail = Fail::new(Code::Unsupported, format!("the disk {} of {} {why}", disk.name, spec.name));
            Err(fail.at(from.display()).help(format!("aquifer export {} OUT.qcow2", from.display())))
        };
        if !from.starts_with(folder) {
            return unfit("lies outside of its machine's folder");
        }
        if format == Format::Qcow2 {
            let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(&from, Access::ReadOnly)?);
            if Qcow2::open(storage)?.backing().is_some() {
                return unfit("stands on another image");
            }
        }
        let size = layers::open(&from, format, desk.cache)?.size();
        let name = DiskName::new(disk.name.as_str())?;
        let to = match format {
            Format::Raw => folder.join(format!("{name}/{}.raw", FIRST - 1)),
            _ => folder.join(ReplicaRecord::layer_name(name.as_str(), FIRST)),
        };
        let top_file = folder.join(ReplicaRecord::layer_name(name.as_str(), FIRST));
        if let Some(taken) = [&to, &top_file].into_iter().find(|path| **path != from && path.exists()) {
            let what = format!("{} is there already, and would be replaced", taken.display());
            return Err(Fail::new(Code::Exists, what).at(taken.display()));
        }
        taken = taken.max(super::run::written(&from)?);
        let top = Top { disk: disk.name.clone(), file: ReplicaRecord::layer_name(name.as_str(), FIRST), size };
        found.push(Image { from, to, format, top });
        let known = placed.described.disks.iter().find(|known| known.name == disk.name);
        disks.push(DiskDescription {
            name,
            size: Some(size),
            bus: known.and_then(|known| known.bus.clone()),
            boot_order: known.and_then(|known| known.boot_order),
        });
    }
    let description = of_described(placed.described, &spec.machine, disks, None);
    let point = point_of(description, found.iter().map(|image| image.top.clone()).collect(), taken);
    Ok(AdoptWork { kind: AdoptWork::KIND.into(), name: spec.name.clone(), images: found, original, point })
}

fn point_of(description: MachineDescription, disks: Vec<Top>, taken_ns: i64) -> PointRecord {
    PointRecord {
        version: VERSION,
        id: Uuid::now_v7(),
        number: FIRST,
        taken: Timestamp::from_nanosecond(i128::from(taken_ns)).unwrap_or(Timestamp::UNIX_EPOCH),
        made: Timestamp::now(),
        origin: Origin::Mapped,
        source: None,
        disks,
        description,
        carried: Carried::default(),
        gone: Vec::new(),
    }
}

impl AdoptWork {
    fn arrange(&self) -> Result<()> {
        for image in &self.images {
            rename(&image.from, &image.to)?;
            if image.format == Format::Raw {
                let top = image.to.with_file_name(format!("{FIRST}.qcow2"));
                if !top.exists() {
                    layers::make_empty(&top, (&image.to, Format::Raw), image.top.size, |_| Ok(()))?;
                }
            }
        }
        Ok(())
    }

    /// Enters what was moved, and what was put on it.
    fn enter(&self, record: &ReplicaRecord) -> Result<()> {
        let holds = Holds::Point(self.point.id);
        self.images.iter().try_for_each(|image| {
            let file = image.to.strip_prefix(&record.folder).unwrap_or(&image.to).to_string_lossy();
            trust::enter(record, &file, &image.to, holds)?;
            trust::enter(record, &image.top.file, &record.folder.join(&image.top.file), holds)
        })
    }

    fn back(&self) -> Result<()> {
        for image in &self.images {
            if image.format == Format::Raw {
                super::build::discard(&image.to.with_file_name(format!("{FIRST}.qcow2")))?;
            }
            rename(&image.to, &image.from)?;
        }
        Ok(())
    }
}

/// Moves a file; one that was moved already has been.
fn rename(from: &Path, to: &Path) -> Result<()> {
    if from == to || (!from.exists() && to.exists()) {
        return Ok(());
    }
    let folder = to.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(|e| Fail::io(folder.display(), "create", &e))?;
    fs::rename(from, to).map_err(|e| Fail::io(from.display(), "move", &e))?;
    sync_folder(folder)?;
    sync_folder(from.parent().unwrap_or(Path::new("/")))
}

impl Work for AdoptWork {
    const OP: Op = Op::Replicate;
    const KIND: &'static str = "adopt";

    fn plan<'a>(desk: &'a Desk<'a>) -> Plan<'a, Self> {
        Plan::new(AfterCrash::On)
            .step(
                "stamp",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    desk.stamp(&record.folder, record.lineage, record.epoch)
                },
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    trust::forget(&record.folder)
                },
            )
            .step("arrange", |work: &mut Self| work.arrange(), |work: &mut Self| work.back())
            .step(
                "describe",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    describe(&record, &work.point.description, &work.point.disks)
                },
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    put_file(&record.folder.join(placed::DESCRIPTION), work.original.as_bytes())
                },
            )
            .step(
                "digests",
                |work: &mut Self| {
                    let record = desk.load(&work.name)?.record;
                    for top in &work.point.disks {
                        (desk.alive)()?;
                        let disk = layers::disk(&record.folder.join(&top.file), desk.cache)?;
                        let digests = Digests::of(&disk, record.digest_block, desk.pace)?;
                        digests.store(&keep::digest_file(&record, &work.point, &top.disk))?;
                    }
                    work.enter(&record)
                },
                |_| Ok(()),
            )
            .final_step("point", |work: &mut Self| desk.put_point(&work.name, &work.point))
    }

    fn settle(&self, record: &mut ReplicaRecord, went: &Went) {
        record.state = match went {
            Went::Undone(_) => State::Absent,
            Went::Done | Went::Stuck(_) => {
                record.next_layer = record.next_layer.max(FIRST + 1);
                State::Ready
            }
        };
    }
}
