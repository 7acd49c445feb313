//! OVA, read-only: a machine's export as one tar file, whose VMDK members are read where they lie.
//!
//! Invariants
//! - Every header's checksum holds, and every member lies inside the file, or the archive is refused.
//! - A disk that needs anything beside its own member (other extents, a parent) is refused.
//!
//! Not here: the machine's description (`.ovf`), the checksums of the manifest (`.mf`), split and
//! compressed members, which are refused by name.

use std::{ffi::OsStr, sync::Arc};

use crate::{
    Error, Result, Storage,
    storage::View,
    tables::TableFile,
    tar::{self, Member},
    vmdk::{Vmdk, VmdkLayer},
};

/// Most members that are looked at.
const MEMBERS_MAX: usize = 4096;

/// An archive, its members known.
#[derive(Debug)]
pub struct Ova {
    file: TableFile,
    members: Vec<Member>,
}

impl Ova {
    /// Walks the archive's headers. No member is read.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let mut members = Vec::new();
        tar::walk(&file, MEMBERS_MAX, |member| {
            members.push(member);
            Ok(())
        })?;
        Ok(Self { file, members })
    }

    /// Names of the disks, in the archive's order.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an archive with split or compressed disks, or with none;
    /// [`Error::Corrupt`] for two of one name.
    pub fn disks(&self) -> Result<Vec<&str>> {
        let path = self.file.label();
        let mut names: Vec<&str> = Vec::new();
        for member in &self.members {
            let lower = member.name.to_ascii_lowercase();
            if lower.ends_with(".vmdk") {
                member.check_file(path)?;
                if names.contains(&member.name.as_str()) {
                    return Err(Error::corrupt(
                        path,
                        member.offset,
                        format!("two members are named {:?}", member.name),
                    ));
                }
                names.push(&member.name);
            } else if lower.contains(".vmdk.") {
                return Err(Error::unsupported(path, format!("the split or compressed disk {:?}", member.name)));
            }
        }
        if names.is_empty() {
            return Err(Error::unsupported(path, "an archive without a .vmdk member"));
        }
        Ok(names)
    }

    /// The disk `name`.
    ///
    /// # Errors
    /// [`Error::ChainBroken`] if there is none, or it needs another file; those of [`Vmdk::open`].
    pub fn disk(&self, name: &str) -> Result<VmdkLayer> {
        let path = self.file.label();
        let broken = |what: String| Error::ChainBroken { path: path.into(), what };
        let member = self.members.iter().find(|member| member.name == name);
        let member = member.ok_or_else(|| broken(format!("has no member {name:?}")))?;
        member.check_file(path)?;
        let label = format!("{path} ({name})");
        let disk = Vmdk::open(Arc::new(View::part(self.file.storage.clone(), member.offset, member.len, label)))?;
        if disk.parent().is_some() {
            return Err(broken(format!("member {name:?} stands on another disk")));
        }
        disk.layer(|extent: &OsStr| {
            Err(broken(format!("member {name:?} needs the file {:?}", extent.to_string_lossy())))
        })
    }
}

#[cfg(test)]
mod tests;
