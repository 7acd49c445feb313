//! Tar files as archives of disks: which members there are, and where they lie.
//!
//! Invariants
//! - Every header's checksum holds, and every member lies inside the file, or the archive is refused.
//! - Members are counted: a small file cannot describe an endless archive.
//! - An archive ends with zeros and nothing behind them (POSIX.1 pax, "ustar Interchange Format"): one that was cut between two members, or whose rest
//!   was lost, is refused.
//! - What holds bytes and cannot be read where it lies (sparse members, parts of several volumes, kinds that are not known) is
//!   refused by name: passed over it would read as zeros.
//!
//! Not here: folders, devices and labels, which are passed over; what a link leads to, which is its user's to refuse.

use crate::{Error, Result, tables::TableFile};

const BLOCK: u64 = 512;
/// Longest extended header, in bytes.
const EXTENDED_MAX: u64 = 64 << 10;

/// Most zeros at the end: records of 2048 blocks, the longest that `tar` is asked for.
const END_BYTES_MAX: u64 = 1 << 20;

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Its bytes lie where it says.
    File,
    /// Another name of a file.
    Link,
}

/// One file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What extended headers say about the member behind them.
#[derive(Default)]
struct Extended {
    name: Option<String>,
    len: Option<u64>,
    is_sparse: bool,
}

impl Member {
    /// Refuses a link, of which the archive at `path` needs the bytes.
    pub(crate) fn check_file(&self, path: &str) -> Result<()> {
        match self.kind {
            Kind::File => Ok(()),
            Kind::Link => Err(Error::unsupported(path, format!("the member {:?}, which is a link", self.name))),
        }
    }
}

/// Tells `each` the files of an archive, in its order. No member is read.
pub(crate) fn walk(file: &TableFile, members_max: usize, mut each: impl FnMut(Member) -> Result<()>) -> Result<()> {
    let (mut at, mut seen, mut extended) = (0, 0usize, Extended::default());
    while at < file.len {
        let header = file.read(at, BLOCK, "a header of the archive")?;
        if header.iter().all(|byte| *byte == 0) {
            return check_end(file, at);
        }
        seen += 1;
        if seen > members_max {
            return Err(Error::unsupported(file.label(), format!("an archive of more than {members_max} members")));
        }
        let bad = |what: &str| Error::corrupt(file.label(), at, format!("header of the archive: {what}"));
        if !sum_holds(&header) {
            return Err(bad("its checksum is wrong"));
        }
        let offset = at + BLOCK;
        let stored = number(header.get(124..136).unwrap_or_default()).ok_or_else(|| bad("the length is no number"))?;
        let len = extended.len.unwrap_or(stored);
        file.check_inside(offset, len, "a member of the archive")?;
        match header.get(156).copied().unwrap_or_default() {
            b'L' | b'x' if len > EXTENDED_MAX => return Err(bad("an extended header that is too long")),
            b'L' => extended.name = Some(text(&file.read(offset, len, "a long name")?)),
            b'x' => extended.take(&file.read(offset, len, "an extended header")?),
            kind @ (b'0' | 0 | b'1' | b'2' | b'7') => {
                let name = extended.name.take().unwrap_or_else(|| name_of(&header));
                if extended.is_sparse {
                    return Err(Error::unsupported(file.label(), format!("the sparse member {name:?}")));
                }
                let kind = if matches!(kind, b'1' | b'2') { Kind::Link } else { Kind::File };
                each(Member { name, kind, offset, len })?;
                extended = Extended::default();
            }
            // Character and block devices, folders, queues; comments, names of links, contents of folders, labels.
            b'3'..=b'6' | b'g' | b'K' | b'D' | b'V' => extended = Extended::default(),
            kind => {
                let (kind, name) = (char::from(kind), name_of(&header));
                return Err(Error::unsupported(file.label(), format!("the member {name:?} of the kind {kind:?}")));
            }
        }
        let padded = len.checked_next_multiple_of(BLOCK).ok_or_else(|| bad("the length is impossible"))?;
        at = offset.saturating_add(padded);
    }
    file.check_inside(at, BLOCK, "the end of the archive")
}

/// Refuses an archive that ends at `at` although it goes on.
fn check_end(file: &TableFile, at: u64) -> Result<()> {
    let bad = |what: &str| Err(Error::corrupt(file.label(), at, format!("the archive ends here, but {what}")));
    let rest = file.len.saturating_sub(at);
    if rest > END_BYTES_MAX + BLOCK {
        return bad("so much follows that its rest was lost");
    }
    if file.read(at, rest, "the end of the archive")?.iter().any(|byte| *byte != 0) {
        return bad("more follows");
    }
    Ok(())
}

impl Extended {
    /// `LEN KEY=VALUE\n`, again and again; a line that is none ends it.
    fn take(&mut self, mut rest: &[u8]) {
        while let Some((len, line)) = record(rest) {
            if let Some(name) = line.strip_prefix("path=") {
                self.name = Some(name.into());
            } else if line.starts_with("GNU.sparse.") || line.starts_with("SCHILY.realsize=") {
                self.is_sparse = true;
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
