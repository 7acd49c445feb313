//! The tree: folders, and files made of blocks.

use super::{
    pages::{NONE, Pages},
    slot::{u16_at, u32_at, u64_at},
};
use crate::{Error, Result};

pub(super) const ITEM_BYTES: usize = 0xc0;

/// Properties that only a disk has.
const DISK_PROPERTIES: [&[u8]; 2] = [b"DefinedBlocksMask", b"LogicalSectorSize"];

/// One entry of a folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) name: String,
    /// Where the entry lies in the file.
    pub(super) at: u64,
    pub(super) kind: Kind,
    properties: u64,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Folder {
        root: u64,
        count: u64,
    },
    /// A file with all its blocks.
    Whole(Blocks),
    /// A file of which the changed blocks are here.
    Changed(Blocks),
    /// Something that is not read; its number.
    Other(u32),
}

/// Where the blocks of a file are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) root: u64,
    pub(super) count: u64,
    /// Length of the file in bytes.
    pub(super) len: u64,
    /// Whether a backup was still writing it.
    pub(super) unfinished: bool,
}

impl Item {
    pub(super) fn read(pages: &Pages, at: u64, bytes: &[u8]) -> Result<Self> {
        let bad = |what: String| Error::corrupt(pages.file.label(), at, format!("entry of a folder: {what}"));
        let len = usize::try_from(u32_at(bytes, 4)).unwrap_or(usize::MAX);
        let name = bytes.get(8..0x88).and_then(|field| field.get(..len));
        let name = name.ok_or_else(|| bad(format!("a name of {len} bytes")))?;
        let name = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
        // Names become names of disks and parts of messages.
        if name.is_empty() || name.contains(['/', '\0']) {
            return Err(bad(format!("the name {name:?}")));
        }
        let blocks = Blocks {
            root: u64_at(bytes, 0x98),
            count: u64_at(bytes, 0xa0),
            len: u64_at(bytes, 0xa8),
            unfinished: u16_at(bytes, 0x94) != 0,
        };
        let kind = match u32_at(bytes, 0) {
            1 => Kind::Folder { root: u64_at(bytes, 0x94), count: u32_at(bytes, 0x9c).into() },
            3 => Kind::Whole(blocks),
            5 => Kind::Changed(blocks),
            other => Kind::Other(other),
        };
        if let Kind::Whole(blocks) | Kind::Changed(blocks) = kind
            && i64::try_from(blocks.len).is_err()
        {
            return Err(bad(format!("a file of {} bytes", blocks.len)));
        }
        Ok(Self { name, at, kind, properties: u64_at(bytes, 0x88) })
    }

    /// Length of the file in bytes; `None` for what is no file that is read.
    pub(super) fn bytes(&self) -> Option<u64> {
        match self.kind {
            Kind::Whole(blocks) | Kind::Changed(blocks) => Some(blocks.len),
            Kind::Folder { .. } | Kind::Other(_) => None,
        }
    }

    /// For a disk its length in bytes, and whether only its changed blocks are here. What a disk is, a file's
    /// properties tell, or its name: an agent's device or GUID, an image of a hypervisor.
    pub(super) fn disk(&self, pages: &Pages) -> Result<Option<(u64, bool)>> {
        let (blocks, changed) = match self.kind {
            Kind::Whole(blocks) => (blocks, false),
            Kind::Changed(blocks) => (blocks, true),
            // What an unknown kind of file with a disk's name is gets said when somebody opens it.
            Kind::Other(_) => return Ok(is_disk_name(&self.name).then_some((0, true))),
            Kind::Folder { .. } => return Ok(None),
        };
        let is_disk = changed || is_disk_name(&self.name) || self.has_disk_property(pages)?;
        Ok((is_disk && blocks.len > 0).then_some((blocks.len, changed)))
    }

    /// Whether the first page of the properties names one that only disks have.
    fn has_disk_property(&self, pages: &Pages) -> Result<bool> {
        if matches!(self.properties, 0 | NONE) {
            return Ok(false);
        }
        pages.with(self.properties, |_, page| {
            let mut at = 12;
            for _ in 0..64 {
                let kind = u32_at(page, at);
                let name_len = usize::try_from(u32_at(page, at + 4)).unwrap_or(usize::MAX);
                let name = page.get(at + 8..).and_then(|rest| rest.get(..name_len));
                let Some(name) = name.filter(|_| (1..=6).contains(&kind)) else { return false };
                if DISK_PROPERTIES.contains(&name) {
                    return true;
                }
                let value = at + 8 + name_len;
                let len = match kind {
                    1 | 6 => 4,
                    2 => 8,
                    _ => 4usize.saturating_add(usize::try_from(u32_at(page, value)).unwrap_or(usize::MAX)),
                };
                at = value.saturating_add(len);
                if at >= page.len() {
                    return false;
                }
            }
            false
        })
    }
}

fn is_disk_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let image = ["-flat.vmdk", ".vhdx", ".avhdx", ".vhd", ".avhd"].iter().any(|end| lower.ends_with(end));
    image || lower.starts_with("dev__") || uuid::Uuid::try_parse(&lower).is_ok()
}
