//! Tar files as archives of disks: which members there are, and where they lie.
//!
//! Invariants
//! - Every header's checksum holds, and every member lies inside the file, or the archive is refused.
//! - Members are counted: a small file cannot describe an endless archive.
//!
//! Not here: sparse members, links and folders, which are passed over.

use crate::{Error, Result, tables::TableFile};

const BLOCK: u64 = 512;
/// Longest extended header, in bytes.
const EXTENDED_MAX: u64 = 64 << 10;

/// One file of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What extended headers say about the member behind them.
#[derive(Default)]
struct Extended {
    name: Option<String>,
    len: Option<u64>,
}

/// Tells `each` the files of an archive, in its order. No member is read.
pub(crate) fn walk(file: &TableFile, members_max: usize, mut each: impl FnMut(Member) -> Result<()>) -> Result<()> {
    let (mut at, mut seen, mut extended) = (0, 0usize, Extended::default());
    while at < file.len {
        let header = file.read(at, BLOCK, "a header of the archive")?;
        if header.iter().all(|byte| *byte == 0) {
            break;
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
            b'0' | 0 => {
                let name = extended.name.take().unwrap_or_else(|| name_of(&header));
                each(Member { name, offset, len })?;
                extended = Extended::default();
            }
            _ => extended = Extended::default(),
        }
        let padded = len.checked_next_multiple_of(BLOCK).ok_or_else(|| bad("the length is impossible"))?;
        at = offset.saturating_add(padded);
    }
    Ok(())
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
