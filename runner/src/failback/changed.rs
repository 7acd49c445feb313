//! What production itself has noted of its changes: with it, only what can differ is compared.
//!
//! Invariants
//! - A note counts only if every disk has it, and its image says that it was closed properly and kept up: one of a
//!   machine that was killed does not, and everything is compared instead.
//! - Notes are read while production is off; nothing is written.
//!
//! Not here: who makes the notes (a backup begins one for each disk at its point).

use std::{collections::BTreeMap, path::Path, sync::Arc};

use aquifer_formats::{
    Storage,
    probe::Format,
    qcow2::{BitmapTrust, Qcow2},
    storage::{Access, FileStorage},
};
use aquifer_vdisk::Delta;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{fail::Result, replica::model::HomeDisk};

/// What production has changed since it looked like a restore point, by disk: from a map that can be trusted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// The restore point of the replica that production looked like when the maps began.
    pub since: Option<Uuid>,
    /// What was written since, by disk.
    pub disks: BTreeMap<String, Delta>,
    /// Notes that production's images may hold; the first that can be trusted is taken, once production is off.
    #[serde(default)]
    pub marks: Vec<Mark>,
    /// Whether everything is compared once more after the first pass: nothing may differ that was not noted.
    #[serde(default)]
    pub verify: bool,
}

/// Bitmaps that began with a restore point.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The restore point of the replica.
    pub since: Uuid,
    /// Name of the bitmap, by disk.
    pub bitmaps: BTreeMap<String, String>,
}

impl Changed {
    /// Reads the notes of a machine that is off, where there are any.
    ///
    /// # Errors
    /// An image whose tables cannot be read.
    pub fn read(&mut self, disks: &[HomeDisk]) -> Result<()> {
        if self.since.is_some() {
            return Ok(());
        }
        for mark in &self.marks {
            let mut found = BTreeMap::new();
            for disk in disks {
                let Some(name) = mark.bitmaps.get(&disk.disk).filter(|_| disk.format == Format::Qcow2) else { break };
                let Some(dirty) = dirty(&disk.path, name)? else { break };
                found.insert(disk.disk.clone(), dirty);
            }
            if !disks.is_empty() && found.len() == disks.len() {
                (self.since, self.disks) = (Some(mark.since), found);
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What a bitmap of an image says; nothing where it cannot be trusted.
fn dirty(path: &Path, name: &str) -> Result<Option<Delta>> {
    let storage: Arc<dyn Storage> = Arc::new(FileStorage::open(path, Access::ReadOnly)?);
    let image = Qcow2::open(storage)?;
    let bitmaps = image.bitmaps()?;
    let known = bitmaps.iter().find(|bitmap| bitmap.name == name && bitmap.trust == BitmapTrust::Consistent);
    let Some(bitmap) = known.filter(|bitmap| bitmap.recording) else { return Ok(None) };
    let mut dirty = Delta::new();
    image.dirty_ranges(bitmap, &mut |offset, len| dirty.insert(offset..offset.saturating_add(len)))?;
    Ok(Some(dirty))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn tool(program: &str, args: &[&str]) {
        let output = Command::new(program).args(args).output().expect("the tool is installed");
        assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn the_newest_note_that_every_disk_has_is_taken() {
        let dir = tempfile::tempdir().expect("folder");
        let mut disks = Vec::new();
        for name in ["vda", "vdb"] {
            let path = dir.path().join(format!("{name}.qcow2"));
            let text = path.display().to_string();
            tool("qemu-img", &["create", "-q", "-f", "qcow2", &text, "16M"]);
            tool("qemu-img", &["bitmap", "--add", &text, "old"]);
            tool("qemu-io", &["-f", "qcow2", "-c", "write 1M 64k", &text]);
            if name == "vda" {
                tool("qemu-img", &["bitmap", "--add", &text, "new"]);
            }
            tool("qemu-io", &["-f", "qcow2", "-c", "write 3M 64k", &text]);
            disks.push(HomeDisk { disk: name.into(), path, format: Format::Qcow2 });
        }
        let mark = |name: &str| Mark {
            since: Uuid::new_v4(),
            bitmaps: ["vda", "vdb"].map(|disk| (disk.to_owned(), name.to_owned())).into(),
        };
        let (new, old) = (mark("new"), mark("old"));
        let mut changed = Changed { marks: vec![new.clone(), old.clone()], ..Changed::default() };
        changed.read(&disks).expect("read");
        assert_eq!(changed.since, Some(old.since), "the newer one is not on every disk");
        let all: Vec<_> = changed.disks["vda"].iter().collect();
        assert_eq!(all, [1 << 20..(1 << 20) + 65536, 3 << 20..(3 << 20) + 65536]);

        let mut one = Changed { marks: vec![new.clone(), old], ..Changed::default() };
        one.read(&disks[..1]).expect("read");
        assert_eq!(one.since, Some(new.since));

        let mut none = Changed { marks: vec![mark("missing")], ..Changed::default() };
        none.read(&disks).expect("read");
        assert_eq!((none.since, none.disks.len()), (None, 0));
    }
}
