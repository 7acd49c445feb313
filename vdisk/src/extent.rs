//! What a range of a disk holds, as maps, doors and copiers are told it.

/// Kind of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes that have to be read.
    Data,
    /// Reads as zeros because some layer says so.
    Zero,
    /// Reads as zeros because no layer says anything.
    Hole,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Start on the disk in bytes.
    pub offset: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// What it is.
    pub kind: ExtentKind,
}

impl Extent {
    /// Appends to `out`, merging with the last extent where kind and place allow.
    pub fn push(out: &mut Vec<Extent>, next: Extent) {
        match out.last_mut() {
            Some(last) if last.kind == next.kind && last.offset + last.len == next.offset => last.len += next.len,
            _ => out.push(next),
        }
    }
}
