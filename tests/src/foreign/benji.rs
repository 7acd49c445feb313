//! A storage as Benji lays it out, with what coreutils says for checksums and names.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Bytes of a block.
const BLOCK: usize = 4 << 20;

/// The first word of what `program` says of `bytes`.
fn digits(program: &str, args: &[&str], bytes: &[u8]) -> String {
    let mut child =
        Command::new(program).args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it runs");
    child.stdin.take().expect("a pipe").write_all(bytes).expect("fed");
    let done = child.wait_with_output().expect("it ends");
    String::from_utf8_lossy(&done.stdout).split_whitespace().next().expect("a sum").to_owned()
}

/// `prefix/8b/de/KEY` in the storage.
fn place(root: &Path, prefix: &str, key: &str) -> PathBuf {
    let sum = digits("md5sum", &[], key.as_bytes());
    let folder = root.join(prefix).join(&sum[..2]).join(&sum[2..4]);
    fs::create_dir_all(&folder).expect("a folder");
    folder.join(key)
}

fn object(path: &Path, bytes: &[u8], checksum: Option<&str>) {
    let checksum = checksum.map_or_else(String::new, |sum| format!(r#","checksum":"{sum}""#));
    let meta = format!(
        r#"{{"created":"","metadata_version":"2.0.0","modified":"","object_size":{0},"size":{0}{checksum}}}"#,
        bytes.len()
    );
    fs::write(path, bytes).expect("write");
    let mut name = path.as_os_str().to_owned();
    name.push(".meta");
    fs::write(name, meta).expect("write");
}

/// Writes a version of `disk`, a volume called `vol`; answers the version's object.
///
/// # Panics
/// A file cannot be written, or a program does not run.
pub fn version(root: &Path, number: u64, disk: &[u8]) -> PathBuf {
    let mut list = Vec::new();
    for (index, part) in disk.chunks(BLOCK).enumerate() {
        if part.iter().all(|byte| *byte == 0) {
            continue;
        }
        let sum = digits("b2sum", &["-l", "256"], part);
        object(&place(root, "blocks", &format!("{number:016x}-{index:016x}")), part, Some(&sum));
        list.push(format!(
            r#"{{"idx":{index},"uid":{{"left":{number},"right":{index}}},"size":{},"valid":true,"checksum":"{sum}"}}"#,
            part.len()
        ));
    }
    let text = format!(
        r#"{{"metadata_version":"3.0.0","versions":[{{"uid":"vol-{number}","date":"2026-11-0{number}T00:00:00.000000Z","volume":"vol",
        "snapshot":"","size":{},"block_size":{BLOCK},"status":"valid","protected":false,"labels":{{}},"blocks":[{}]}}]}}"#,
        disk.len(),
        list.join(",")
    );
    let path = place(root, "versions", &format!("vol-{number}"));
    object(&path, text.as_bytes(), None);
    path
}
