//! QEMU's own tools as oracle: they make the images, and they say what is in them.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// Runs `qemu-img`; its output.
///
/// # Panics
/// If it fails, with what it said.
pub fn img(args: &[&str]) -> String {
    let done = Command::new("qemu-img").args(args).output().expect("qemu-img runs");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "qemu-img {}: {said}", args.join(" "));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Makes an image of `format`, with its `options`, of the raw image `raw`.
///
/// # Panics
/// `qemu-img` fails.
pub fn from_raw(raw: &Path, to: &Path, format: &str, options: &str) {
    img(&["convert", "-f", "raw", "-O", format, "-o", options, text(raw), text(to)]);
}

/// Runs `commands` of `qemu-io` on one image, with discards really done.
///
/// # Panics
/// If one fails.
pub fn io(path: &Path, format: &str, commands: &[String]) {
    let (done, said) = run_io(path, format, commands);
    let failed = ["failed", "rror", "not found", "can't open"].iter().any(|word| said.contains(word));
    assert!(done && !failed, "qemu-io {}: {said}", path.display());
}

/// As [`io`], but single commands may fail: QEMU compresses into fresh clusters only.
///
/// # Panics
/// If the image does not open.
pub fn io_where_possible(path: &Path, format: &str, commands: &[String]) {
    let (_, said) = run_io(path, format, commands);
    assert!(!said.contains("can't open"), "qemu-io {}: {said}", path.display());
    assert!(!said.contains("not found"), "qemu-io {}: {said}", path.display());
}

fn run_io(path: &Path, format: &str, commands: &[String]) -> (bool, String) {
    let mut child = Command::new("qemu-io")
        .args(["-d", "unmap", "-f", format])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-io runs");
    let mut script = commands.join("\n");
    script.push('\n');
    child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("qemu-io reads");
    let done = child.wait_with_output().expect("qemu-io ends");
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&said).into_owned())
}

/// What QEMU reads from an image, from its first byte to its last.
pub fn contents(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("oracle");
    img(&["convert", "-f", format, "-O", "raw", text(path), text(&raw)]);
    let bytes = fs::read(&raw).expect("the converted image");
    fs::remove_file(&raw).expect("the converted image");
    bytes
}

/// What QEMU reads from an internal snapshot.
pub fn snapshot_contents(path: &Path, name: &str) -> Vec<u8> {
    let raw = path.with_extension("oracle");
    img(&["convert", "-l", name, "-O", "raw", text(path), text(&raw)]);
    let bytes = fs::read(&raw).expect("the converted snapshot");
    fs::remove_file(&raw).expect("the converted snapshot");
    bytes
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in utf-8")
}
