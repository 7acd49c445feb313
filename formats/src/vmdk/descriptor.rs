//! The descriptor: a short text that names a disk's extents, its content id and its parent.
//!
//! Invariants
//! - Names stay bytes: a descriptor may be in any encoding, and a name is only opened through the gate.
//! - A kind of extent, an access or a disk type that is not known refuses the disk by its name.
//!
//! Not here: what a name leads to.

use std::{ffi::OsString, os::unix::ffi::OsStringExt};

use crate::{Error, Result, SECTOR_BYTES};

/// First line of a descriptor.
pub(super) const SIGNATURE: &[u8] = b"# Disk DescriptorFile";

/// Longest descriptor that is read, in bytes.
pub(super) const BYTES_MAX: u64 = 1 << 20;

/// Most extents of one disk: each is an open file. 2 GiB extents make 4 TiB of it.
const EXTENTS_MAX: usize = 2048;

/// The parent's content id where there is no parent.
const NO_PARENT: u32 = u32::MAX;

/// Disk types whose extents are files of this disk alone.
const TYPES: [&str; 11] = [
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
    "vmfs",
    "vmfsSparse",
    "vmfsThin",
    "vmfsEagerZeroedThick",
    "seSparse",
    "custom",
];

/// What an extent holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Bytes of a file from an offset on, in bytes.
    Flat { offset: u64 },
    /// A sparse extent file of the hosted products (`KDMV`).
    Hosted,
    /// A delta of older VMFS versions (`COWD`).
    Cowd,
    /// A delta of newer VMFS versions.
    SeSparse,
    /// Zeros, and no file.
    Zero,
}

/// One line of the extent section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) kind: Kind,
    /// Length on the disk in bytes.
    pub(super) len: u64,
    /// File as the descriptor spells it; empty for zeros.
    pub(super) name: OsString,
}

/// The file a disk falls back to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// As the descriptor spells it, often a path of another computer; never to be opened but through
    /// the gate.
    pub hint: OsString,
    /// Content id that the parent had when this disk was made on it, and must still have.
    pub cid: u32,
}

impl Parent {
    /// Names to try, in order: the hint's last part beside the disk, then the hint itself.
    pub fn names(&self) -> Vec<OsString> {
        let bytes = self.hint.as_encoded_bytes();
        let last = bytes.rsplit(|b| matches!(b, b'/' | b'\\')).next().unwrap_or_default();
        let last = OsString::from_vec(last.to_vec());
        if last.is_empty() || last == self.hint { vec![self.hint.clone()] } else { vec![last, self.hint.clone()] }
    }
}

/// A checked descriptor.
#[derive(Clone, Debug)]
pub(super) struct Descriptor {
    pub(super) create_type: String,
    pub(super) cid: u32,
    pub(super) parent: Option<Parent>,
    pub(super) extents: Vec<Extent>,
    /// Size of the disk in bytes.
    pub(super) size: u64,
}

impl Descriptor {
    /// Reads the text of a descriptor that lies at `offset` of `path`.
    pub(super) fn parse(text: &[u8], path: &str, offset: u64) -> Result<Self> {
        let mut lines =
            Lines { path, offset, cid: None, parent_cid: None, hint: None, create_type: None, extents: vec![] };
        let text = text.split(|b| *b == 0).next().unwrap_or_default();
        for line in text.split(|b| *b == b'\n') {
            lines.take(line.trim_ascii())?;
        }
        lines.finish()
    }
}

/// What has been read of a descriptor so far.
struct Lines<'a> {
    path: &'a str,
    offset: u64,
    cid: Option<u32>,
    parent_cid: Option<u32>,
    hint: Option<Vec<u8>>,
    create_type: Option<String>,
    extents: Vec<Extent>,
}

impl Lines<'_> {
    fn bad(&self, what: impl Into<String>) -> Error {
        Error::corrupt(self.path, self.offset, format!("descriptor: {}", what.into()))
    }

    fn take(&mut self, line: &[u8]) -> Result<()> {
        if line.is_empty() || line.starts_with(b"#") {
            return Ok(());
        }
        let access = line.split(u8::is_ascii_whitespace).next().unwrap_or_default();
        match access {
            b"RW" | b"RDONLY" => return self.take_extent(line),
            b"NOACCESS" => return Err(Error::unsupported(self.path, "an extent without access (NOACCESS)")),
            _ => {}
        }
        let Some(middle) = line.iter().position(|b| *b == b'=') else {
            return Err(self.bad(format!("line {:?} is neither a setting nor an extent", shown(line))));
        };
        let (key, value) = line.split_at(middle);
        let (key, value) = (key.trim_ascii().to_ascii_lowercase(), unquoted(value.get(1..).unwrap_or_default()));
        let again = match key.as_slice() {
            b"cid" => self.cid.replace(self.hex(value)?).is_some(),
            b"parentcid" => self.parent_cid.replace(self.hex(value)?).is_some(),
            b"parentfilenamehint" => self.hint.replace(value.to_vec()).is_some(),
            b"createtype" => self.create_type.replace(shown(value)).is_some(),
            _ => false,
        };
        if again { Err(self.bad(format!("{} is given twice", shown(&key)))) } else { Ok(()) }
    }

    fn hex(&self, value: &[u8]) -> Result<u32> {
        let text = shown(value);
        u32::from_str_radix(&text, 16).map_err(|_| self.bad(format!("content id {text:?} is no hexadecimal number")))
    }

    /// `RW 4192256 SPARSE "disk-s001.vmdk"`, a flat one with the first sector in its file at the end.
    fn take_extent(&mut self, line: &[u8]) -> Result<()> {
        let bad = |what: &str| self.bad(format!("extent {:?}: {what}", shown(line)));
        if self.extents.len() >= EXTENTS_MAX {
            return Err(Error::unsupported(self.path, format!("a disk of more than {EXTENTS_MAX} extents")));
        }
        let (head, rest) = match line.iter().position(|b| *b == b'"') {
            Some(quote) => line.split_at(quote),
            None => (line, &[][..]),
        };
        let mut words = head.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty()).skip(1);
        let number =
            |word: Option<&[u8]>| word.and_then(|w| std::str::from_utf8(w).ok()).and_then(|w| w.parse::<u64>().ok());
        let sectors = number(words.next()).ok_or_else(|| bad("it has no length"))?;
        let word = words.next().unwrap_or_default();
        let (name, behind) = match rest.split_first() {
            None => (&[][..], &[][..]),
            Some((_, rest)) => {
                let quote = rest.iter().position(|b| *b == b'"').ok_or_else(|| bad("its name does not end"))?;
                let (name, behind) = rest.split_at(quote);
                (name, behind.get(1..).unwrap_or_default().trim_ascii())
            }
        };
        let first = || match behind {
            [] => Ok(0),
            text => number(text.split(u8::is_ascii_whitespace).next())
                .and_then(|sector| sector.checked_mul(SECTOR_BYTES))
                .ok_or_else(|| bad("its offset is no number of sectors")),
        };
        let kind = match word {
            b"FLAT" | b"VMFS" => Kind::Flat { offset: first()? },
            b"SPARSE" => Kind::Hosted,
            b"VMFSSPARSE" => Kind::Cowd,
            b"SESPARSE" => Kind::SeSparse,
            b"ZERO" => Kind::Zero,
            other => {
                let what = format!("an extent of type {:?}, which may be a device", shown(other));
                return Err(Error::unsupported(self.path, what));
            }
        };
        let len =
            sectors.checked_mul(SECTOR_BYTES).filter(|len| *len > 0).ok_or_else(|| bad("its length is impossible"))?;
        if name.is_empty() && kind != Kind::Zero {
            return Err(bad("it names no file"));
        }
        let name = OsString::from_vec(name.to_vec());
        self.extents.push(Extent { kind, len, name });
        Ok(())
    }

    fn finish(self) -> Result<Descriptor> {
        let create_type = self.create_type.clone().unwrap_or_default();
        if !TYPES.iter().any(|known| known.eq_ignore_ascii_case(&create_type)) {
            return Err(Error::unsupported(self.path, format!("a disk of type {create_type:?}")));
        }
        let size = self.extents.iter().try_fold(0u64, |sum, extent| sum.checked_add(extent.len));
        let size =
            size.filter(|size| i64::try_from(*size).is_ok()).ok_or_else(|| self.bad("the disk is larger than any"))?;
        if self.extents.is_empty() {
            return Err(self.bad("it names no extent"));
        }
        let cid = self.cid.ok_or_else(|| self.bad("it has no content id"))?;
        let parent = match (self.parent_cid.unwrap_or(NO_PARENT), self.hint.clone()) {
            (NO_PARENT, _) => None,
            (cid, Some(hint)) if !hint.is_empty() => Some(Parent { hint: OsString::from_vec(hint), cid }),
            (cid, _) => return Err(self.bad(format!("it stands on content {cid:08x} and names no file for it"))),
        };
        Ok(Descriptor { create_type, cid, parent, extents: self.extents, size })
    }
}

fn unquoted(value: &[u8]) -> &[u8] {
    let value = value.trim_ascii();
    value.strip_prefix(b"\"").and_then(|v| v.strip_suffix(b"\"")).unwrap_or(value)
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.get(..200).unwrap_or(bytes)).into_owned()
}
