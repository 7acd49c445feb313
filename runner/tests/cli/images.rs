//! Images for the tests: made by `qemu-img` and `qemu-io`, read back by them.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

/// Runs a program and expects success.
pub(crate) fn must(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().expect(program);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text} {}", String::from_utf8_lossy(&output.stdout));
    output
}

/// Bytes that no codec makes small and that differ by seed and place.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A disk of 24 MiB and a bit: noise, text that compresses, runs that repeat, holes between.
pub(crate) fn disk(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; (24 << 20) + 4096];
    bytes[1 << 20..3 << 20].copy_from_slice(&noise(seed, 2 << 20));
    for (index, byte) in bytes[5 << 20..8 << 20].iter_mut().enumerate() {
        *byte = b"restore point "[index % 14];
    }
    let again = bytes[1 << 20..2 << 20].to_vec();
    bytes[12 << 20..13 << 20].copy_from_slice(&again);
    let len = bytes.len();
    bytes[len - 5000..].copy_from_slice(&noise(seed + 1, 5000));
    bytes
}

/// Writes an image file, sparse.
pub(crate) fn write(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).expect("write an image");
}

/// A chain of three qcow2 files, zstd below: `NAME-0.qcow2` up to `NAME-2.qcow2`; answers the newest
/// one's content.
pub(crate) fn qcow2_chain(dir: &Path, name: &str, seed: u64) -> Vec<u8> {
    let text = |n: usize| dir.join(format!("{name}-{n}.qcow2")).to_str().expect("utf-8").to_owned();
    let mut bytes = disk(seed);
    let raw = dir.join(format!("{name}.tmp"));
    write(&raw, &bytes);
    let raw_text = raw.to_str().expect("utf-8").to_owned();
    must(
        "qemu-img",
        &["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", &raw_text, &text(0)],
    );
    fs::remove_file(&raw).expect("remove");
    for n in 1..3usize {
        let backing = format!("{name}-{}.qcow2", n - 1);
        must("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &backing, "-F", "qcow2", &text(n)]);
        let at = ((n * 4) << 20) + 1000 * n;
        let write = format!("write -q -P {n} {at} 300000");
        let zero = format!("write -q -z {} 128k", (6 << 20) + n * (1 << 20));
        must("qemu-io", &["-f", "qcow2", "-c", &write, "-c", &zero, &text(n)]);
        bytes[at..at + 300_000].fill(u8::try_from(n).expect("small"));
        let zero_at = (6 << 20) + n * (1 << 20);
        bytes[zero_at..zero_at + (128 << 10)].fill(0);
    }
    bytes
}

/// Whether `qemu-img` reads the same from two places.
pub(crate) fn same(a: &str, a_format: &str, b: &str, b_format: &str) {
    must("qemu-img", &["compare", "-f", a_format, "-F", b_format, a, b]);
}
