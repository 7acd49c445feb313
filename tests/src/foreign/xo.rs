//! Remotes of Xen Orchestra: folders of VHD parts with their aliases and the points' descriptions.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};

/// Bytes of a block.
pub const BLOCK: usize = 2 << 20;
/// Bytes of a block's bitmap.
const BITMAP: usize = 512;
/// What the only machine is called.
pub const MACHINE: &str = "7ba1f5e8-54d5-4b61-8d52-0a35f3bd9f21";

/// What every part is passed through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// Nothing, and nothing says so.
    Unsaid,
    /// gzip.
    Gzip,
    /// Brotli, in blocks that are not compressed.
    Brotli,
}

impl Filter {
    /// `bytes` passed through it.
    pub fn pass(self, bytes: &[u8]) -> Vec<u8> {
        match self {
            Self::Unsaid => bytes.to_vec(),
            Self::Gzip => {
                let mut to = GzEncoder::new(Vec::new(), Compression::fast());
                to.write_all(bytes).expect("memory");
                to.finish().expect("memory")
            }
            Self::Brotli => stored_brotli(bytes),
        }
    }
}

/// A Brotli stream whose blocks are stored as they are.
fn stored_brotli(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (number, part) in bytes.chunks(1 << 16).enumerate() {
        // Not the last; four nibbles of the length; not compressed. Before the first one the window: one bit.
        let head = (part.len() as u32 - 1) << 3 | 1 << 19;
        let head = if number == 0 { head << 1 } else { head };
        out.extend(&head.to_le_bytes()[..3]);
        out.extend(part);
    }
    out.push(if bytes.is_empty() { 6 } else { 3 });
    out
}

fn seal(bytes: &mut [u8], at: usize) {
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// An id of version 4.
fn id(number: u8) -> [u8; 16] {
    let mut id = [number; 16];
    (id[6], id[8]) = (0x40, 0x80);
    id
}

/// One disk in parts: what it holds, and what its parent held and is called.
#[derive(Debug)]
pub struct Parts<'a> {
    /// Which one of its chain, from 1.
    pub number: u8,
    /// Its bytes.
    pub disk: &'a [u8],
    /// Bytes and alias of the one before.
    pub parent: Option<(&'a [u8], &'a str)>,
    /// What its parts are passed through.
    pub filter: Filter,
    /// Bytes of a block.
    pub block: usize,
}

impl Parts<'_> {
    /// Writes the parts into `folder`.
    ///
    /// # Panics
    /// A file cannot be written.
    pub fn write(&self, folder: &Path) {
        let count = self.disk.len().div_ceil(self.block);
        let size = (self.disk.len() as u64).to_be_bytes();
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[12..16].copy_from_slice(&0x1_0000u32.to_be_bytes());
        footer[16..24].copy_from_slice(&512u64.to_be_bytes());
        footer[28..32].copy_from_slice(b"tap\0");
        footer[40..48].copy_from_slice(&size);
        footer[48..56].copy_from_slice(&size);
        footer[63] = if self.parent.is_some() { 4 } else { 3 };
        footer[68..84].copy_from_slice(&id(self.number));
        seal(&mut footer, 64);
        let mut header = vec![0; 1024];
        header[..16].copy_from_slice(b"cxsparse\xff\xff\xff\xff\xff\xff\xff\xff");
        header[24..28].copy_from_slice(&0x1_0000u32.to_be_bytes());
        header[28..32].copy_from_slice(&(count as u32).to_be_bytes());
        header[32..36].copy_from_slice(&(self.block as u32).to_be_bytes());
        if let Some((_, name)) = self.parent {
            header[40..56].copy_from_slice(&id(self.number - 1));
            for (to, unit) in header[64..576].chunks_mut(2).zip(name.encode_utf16()) {
                to.copy_from_slice(&unit.to_be_bytes());
            }
        }
        seal(&mut header, 36);
        let mut table = vec![0u8; count];
        for number in 0..count {
            let part = |disk: &[u8]| {
                let mut part = disk.get(number * self.block..).unwrap_or_default().to_vec();
                part.resize(self.block, 0);
                part
            };
            let block = part(self.disk);
            if block == part(self.parent.map_or(&[][..], |(disk, _)| disk)) {
                continue;
            }
            table[number / 8] |= 0x80 >> (number % 8);
            let bytes = [vec![0xff; BITMAP], block].concat();
            self.part(folder, &format!("blocks/{}/{}", number / 1000, number % 1000), &bytes);
        }
        for (name, bytes) in [("footer", footer), ("header", header), ("bat", table)] {
            self.part(folder, name, &bytes);
        }
        let filters = match self.filter {
            Filter::Unsaid => return,
            Filter::Gzip => "[\"gzip\"]",
            Filter::Brotli => "[\"brotli\"]",
        };
        fs::write(folder.join("chunk-filters.json"), filters).expect("write");
    }

    fn part(&self, folder: &Path, name: &str, bytes: &[u8]) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, self.filter.pass(bytes)).expect("write");
    }
}

/// Writes a description of a point of disks, each a device and the name of its VHD in its own folder below `vdis/job`.
///
/// # Panics
/// The file cannot be written.
pub fn describe(root: &Path, day: usize, disks: &[(&str, usize, &str)]) -> PathBuf {
    let (mut vhds, mut vdis, mut vbds, mut kinds) = (String::new(), String::new(), String::new(), String::new());
    for (number, (device, size, vhd)) in disks.iter().enumerate() {
        let comma = if number == 0 { "" } else { "," };
        _ = write!(vhds, r#"{comma}"OpaqueRef:{number}":"vdis/job/{device}/{vhd}""#);
        _ = write!(vdis, r#"{comma}"OpaqueRef:{number}":{{"uuid":"id-{number}","virtual_size":{size}}}"#);
        _ = write!(vbds, r#"{comma}"OpaqueRef:b{number}":{{"VDI":"OpaqueRef:{number}","device":"{device}"}}"#);
        _ = write!(kinds, r#"{comma}"OpaqueRef:{number}":{}"#, day > 1);
    }
    let time = 1_793_491_200_000 + 86_400_000 * (day as i64 - 1);
    let text = format!(
        r#"{{"isVhdDifferencing":{{{kinds}}},"jobId":"job","mode":"delta","scheduleId":"s","timestamp":{time},"vbds":{{{vbds}}},
        "vdis":{{{vdis}}},"version":"2.0.0","vhds":{{{vhds}}},"vm":{{"uuid":"{MACHINE}","name_label":"db01"}}}}"#
    );
    let path = machine(root).join(format!("2026110{day}T000000Z.json"));
    fs::create_dir_all(machine(root)).expect("a folder");
    fs::write(&path, text).expect("write");
    path
}

/// The machine's folder in a remote.
pub fn machine(root: &Path) -> PathBuf {
    root.join("xo-vm-backups").join(MACHINE)
}

/// The name of the alias of a day.
pub fn alias(day: usize) -> String {
    format!("2026110{day}T000000Z.alias.vhd")
}

/// Writes a chain of a disk's `states`, a point a day, in parts; answers the points' descriptions.
///
/// # Panics
/// A file cannot be written.
pub fn chain(root: &Path, states: &[&[u8]], filter: Filter) -> Vec<PathBuf> {
    let folder = machine(root).join("vdis/job/xvda");
    let mut points = Vec::new();
    for (number, disk) in states.iter().enumerate() {
        let day = number + 1;
        let before = alias(number);
        let parent = number.checked_sub(1).map(|older| (states[older], before.as_str()));
        let place = format!("data/{day}.vhd");
        Parts { number: day as u8, disk, parent, filter, block: BLOCK }.write(&folder.join(&place));
        fs::write(folder.join(alias(day)), place).expect("write");
        points.push(describe(root, day, &[("xvda", disk.len(), &alias(day))]));
    }
    points
}
