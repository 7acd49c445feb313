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
    vmdk::{Vmdk, VmdkLayer},
};

const BLOCK: u64 = 512;
/// Most members that are looked at.
const MEMBERS_MAX: usize = 4096;
/// Longest extended header, in bytes.
const EXTENDED_MAX: u64 = 64 << 10;

/// One file of the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    name: String,
    offset: u64,
    len: u64,
}

/// An archive, its members known.
#[derive(Debug)]
pub struct Ova {
    file: TableFile,
    members: Vec<Member>,
}

/// What extended headers say about the member behind them.
#[derive(Default)]
struct Extended {
    name: Option<String>,
    len: Option<u64>,
}

impl Ova {
    /// Walks the archive's headers. No member is read.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Truncated`], [`Error::Unsupported`], [`Error::Io`].
    pub fn open(storage: Arc<dyn Storage>) -> Result<Self> {
        let file = TableFile::open(storage)?;
        let (mut at, mut members, mut extended) = (0, Vec::new(), Extended::default());
        let mut seen = 0usize;
        while at < file.len {
            let header = file.read(at, BLOCK, "a header of the archive")?;
            if header.iter().all(|byte| *byte == 0) {
                break;
            }
            seen += 1;
            if seen > MEMBERS_MAX {
                return Err(Error::unsupported(file.label(), format!("an archive of more than {MEMBERS_MAX} members")));
            }
            let bad = |what: &str| Error::corrupt(file.label(), at, format!("header of the archive: {what}"));
            if !sum_holds(&header) {
                return Err(bad("its checksum is wrong"));
            }
            let offset = at + BLOCK;
            let stored =
                number(header.get(124..136).unwrap_or_default()).ok_or_else(|| bad("the length is no number"))?;
            let len = extended.len.unwrap_or(stored);
            file.check_inside(offset, len, "a member of the archive")?;
            let kind = header.get(156).copied().unwrap_or_default();
            match kind {
                b'L' | b'x' if len > EXTENDED_MAX => return Err(bad("an extended header that is too long")),
                b'L' => extended.name = Some(text(&file.read(offset, len, "a long name")?)),
                b'x' => extended.take(&file.read(offset, len, "an extended header")?),
                b'0' | 0 => {
                    let name = extended.name.take().unwrap_or_else(|| name_of(&header));
                    members.push(Member { name, offset, len });
                    extended = Extended::default();
                }
                _ => extended = Extended::default(),
            }
            let padded = len.checked_next_multiple_of(BLOCK).ok_or_else(|| bad("the length is impossible"))?;
            at = offset.saturating_add(padded);
        }
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

impl Extended {
    /// `LEN KEY=VALUE\n`, again and again; a line that is none ends it.
    fn take(&mut self, mut rest: &[u8]) {
        while let Some((len, line)) = record(rest) {
            if let Some(name) = line.strip_prefix("path=") {
                self.name = Some(name.into());
            } else if let Some(size) = line.strip_prefix("size=") {
                self.len = size.parse().ok();
            }
            rest = rest.get(len..).unwrap_or_default();
        }
    }
}

fn record(bytes: &[u8]) -> Option<(usize, String)> {
    let space = bytes.iter().position(|b| *b == b' ')?;
    let len: usize = std::str::from_utf8(bytes.get(..space)?).ok()?.parse().ok()?;
    let line = bytes.get(space + 1..len)?.strip_suffix(b"\n")?;
    Some((len, String::from_utf8_lossy(line).into_owned()))
}

fn sum_holds(header: &[u8]) -> bool {
    let sum: u64 = (0..).zip(header).map(|(i, b)| if (148..156).contains(&i) { 32 } else { u64::from(*b) }).sum();
    number(header.get(148..156).unwrap_or_default()) == Some(sum)
}

/// Octal digits, or big-endian bytes behind a set bit.
fn number(field: &[u8]) -> Option<u64> {
    if let Some((0x80, rest)) = field.split_first() {
        let (high, low) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
        return high.iter().all(|b| *b == 0).then(|| low.iter().fold(0, |sum, b| sum << 8 | u64::from(*b)));
    }
    let text = std::str::from_utf8(field).ok()?;
    u64::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|b| *b == 0).next().unwrap_or_default()).into_owned()
}

fn name_of(header: &[u8]) -> String {
    let name = text(header.get(..100).unwrap_or_default());
    let is_posix = header.get(257..263) == Some(b"ustar\0");
    let prefix = if is_posix { text(header.get(345..500).unwrap_or_default()) } else { String::new() };
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

#[cfg(test)]
mod tests;
