//! Proxmox VE's archives as `vzdump` lays them out.

use std::{
    io::Write as _,
    process::{Command, Stdio},
};

use crate::rng::Rng;

const CLUSTER: usize = 64 << 10;
const BLOCK: usize = 4096;

fn put(bytes: &mut [u8], at: usize, part: &[u8]) {
    bytes[at..at + part.len()].copy_from_slice(part);
}

/// Another one's MD5, so that ours has a judge.
fn md5(bytes: &[u8]) -> [u8; 16] {
    let mut child = Command::new("md5sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("md5sum runs");
    child.stdin.take().expect("a pipe").write_all(bytes).expect("md5sum reads");
    let said = child.wait_with_output().expect("md5sum ends").stdout;
    std::array::from_fn(|i| {
        let digits = std::str::from_utf8(&said[2 * i..2 * i + 2]).expect("digits");
        u8::from_str_radix(digits, 16).expect("digits")
    })
}

fn seal(bytes: &mut [u8], at: usize) {
    let sum = md5(bytes);
    put(bytes, at, &sum);
}

/// An archive of disks, their clusters in any order and mixed, zero blocks left out.
pub fn archive(disks: &[(&str, &[u8])], rng: &mut Rng) -> Vec<u8> {
    let uuid = [0x42; 16];
    let mut blobs = vec![0u8];
    let mut blob = |bytes: &[u8]| {
        let at = blobs.len() as u32;
        blobs.extend((bytes.len() as u16).to_le_bytes());
        blobs.extend(bytes);
        at
    };
    let config = (blob(b"qemu-server.conf\0"), blob(b"memory: 2048\n"));
    let names: Vec<u32> = disks.iter().map(|(name, _)| blob(format!("{name}\0").as_bytes())).collect();
    let header_len = (12_288 + blobs.len()).next_multiple_of(512);
    let mut out = vec![0; header_len];
    put(&mut out, 0, b"VMA\0\0\0\0\x01");
    put(&mut out, 8, &uuid);
    put(&mut out, 24, &1_700_000_000u64.to_be_bytes());
    put(&mut out, 48, &12_288u32.to_be_bytes());
    put(&mut out, 52, &(blobs.len() as u32).to_be_bytes());
    put(&mut out, 56, &(header_len as u32).to_be_bytes());
    put(&mut out, 2044, &config.0.to_be_bytes());
    put(&mut out, 3068, &config.1.to_be_bytes());
    for (number, (name, (_, bytes))) in names.iter().zip(disks).enumerate() {
        put(&mut out, 4096 + 32 * (number + 1), &name.to_be_bytes());
        put(&mut out, 4096 + 32 * (number + 1) + 8, &(bytes.len() as u64).to_be_bytes());
    }
    put(&mut out, 12_288, &blobs);
    seal(&mut out, 32);

    let mut clusters: Vec<(usize, usize)> = disks
        .iter()
        .enumerate()
        .flat_map(|(d, (_, bytes))| (0..bytes.len().div_ceil(CLUSTER)).map(move |c| (d, c)))
        .collect();
    for i in (1..clusters.len()).rev() {
        clusters.swap(i, rng.below(i as u64 + 1) as usize);
    }
    for group in clusters.chunks(59) {
        let (mut head, mut data, mut blocks) = (vec![0; 512], Vec::new(), 0u16);
        put(&mut head, 0, b"VMAE");
        put(&mut head, 8, &uuid);
        for (number, (disk, cluster)) in group.iter().enumerate() {
            let bytes = disks[*disk].1;
            let bytes = &bytes[cluster * CLUSTER..bytes.len().min((cluster + 1) * CLUSTER)];
            let mut mask = 0u64;
            for (bit, block) in bytes.chunks(BLOCK).enumerate().filter(|(_, block)| block.iter().any(|b| *b != 0)) {
                mask |= 1 << bit;
                data.extend(block);
                data.resize(data.len().next_multiple_of(BLOCK), 0);
            }
            blocks += mask.count_ones() as u16;
            let info = mask << 48 | (*disk as u64 + 1) << 32 | *cluster as u64;
            put(&mut head, 40 + 8 * number, &info.to_be_bytes());
        }
        put(&mut head, 6, &blocks.to_be_bytes());
        seal(&mut head, 24);
        out.extend(head);
        out.extend(data);
    }
    out
}
