//! `qemu-img` as the peer of whole copies: compressed as a backup is, or plain as a machine's disk is.
//!
//! Invariants
//! - A copy counts when it is durable.
//! - The image is read as the format that its source was opened as.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{Args, chart, peer};
use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    source::SelectedDisk,
    units,
};

/// What one side made of a whole disk.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Whole {
    pub(super) side: String,
    pub(super) seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes_stored: Option<u64>,
}

/// What a copy is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    Backup,
    Hydration,
}

impl Purpose {
    fn options(self, peer: &str) -> Option<&'static [&'static str]> {
        match (self, peer) {
            (Self::Backup, "qemu-img") => Some(&["-O", "qcow2", "-c", "-o", "compression_type=zstd"]),
            (Self::Backup, "qemu-img-parallel") => {
                Some(&["-O", "qcow2", "-c", "-o", "compression_type=zstd", "-m", "16", "-W"])
            }
            (Self::Hydration, "qemu-img") => Some(&["-O", "raw", "-m", "4", "-W"]),
            _ => None,
        }
    }

    fn peers(self) -> &'static str {
        match self {
            Self::Backup => "qemu-img and qemu-img-parallel are",
            Self::Hydration => "qemu-img is",
        }
    }
}

/// A folder for what is written, removed when dropped.
#[derive(Debug)]
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn make() -> Result<Self> {
        let name = format!("aquifer-bench-{}", uuid::Uuid::now_v7().simple());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).map_err(|e| Fail::io(path.display(), "create", &e))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nothing of value is in it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Refuses peers that cannot do this, before anything is measured.
pub(super) fn check_peers(args: &Args, purpose: Purpose) -> Result<()> {
    match args.peer.iter().find(|name| purpose.options(name).is_none()) {
        None => Ok(()),
        Some(name) => {
            let what = format!("the peer `{name}` is not known here; {}", purpose.peers());
            Err(Fail::new(Code::Usage, what).help("aquifer bench --help"))
        }
    }
}

/// Has a peer copy the image, and waits until the copy is durable.
pub(super) fn measure(name: &str, purpose: Purpose, selected: &SelectedDisk, folder: &Path) -> Result<Whole> {
    let (path, format) = peer::image_of(selected)?;
    let out = folder.join("peer.img");
    let start = Instant::now();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", format]).args(purpose.options(name).unwrap_or_default()).arg(path).arg(&out);
    finish(&mut command, "qemu-img")?;
    let file = File::open(&out).map_err(|e| Fail::io(out.display(), "open", &e))?;
    file.sync_all().map_err(|e| Fail::io(out.display(), "sync", &e))?;
    let seconds = start.elapsed().as_secs_f64();
    let bytes_stored = file.metadata().map_err(|e| Fail::io(out.display(), "stat", &e))?.len();
    fs::remove_file(&out).map_err(|e| Fail::io(out.display(), "remove", &e))?;
    let bytes_stored = matches!(purpose, Purpose::Backup).then_some(bytes_stored);
    Ok(Whole { side: name.to_owned(), seconds, bytes_stored })
}

/// Runs a program to its end and gives what it printed.
pub(super) fn finish(command: &mut Command, name: &str) -> Result<Vec<u8>> {
    let done = command.stdin(Stdio::null()).output().map_err(|e| Fail::io(name, "start", &e))?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let last = said.lines().next_back().unwrap_or("no message").to_owned();
    Err(Fail::new(Code::Child, format!("{name} ended with {}", done.status)).at(name).cause(last))
}

/// Prints all sides, the ratios to the first, and the chart where one is wanted.
pub(super) fn report(context: &Context, args: &Args, work: &str, sides: &[Whole]) -> Result<()> {
    let Some((ours, others)) = sides.split_first() else { return Ok(()) };
    for side in others {
        let stored = side.bytes_stored.map(|n| format!(", {} stored", units::bytes(n))).unwrap_or_default();
        context.out.record("measured", side);
        context.out.line(format_args!("{}: durable after {:.2} s{stored}", side.side, side.seconds));
        let ratio = side.seconds / ours.seconds.max(Duration::from_millis(1).as_secs_f64());
        context.out.record("ratio", &serde_json::json!({ "peer": side.side, "ratio": ratio }));
        context.out.line(format_args!("against {}: {ratio:.2} x", side.side));
    }
    let Some(path) = &args.svg else { return Ok(()) };
    let figures: Vec<_> = sides.iter().map(|side| (side.side.clone(), vec![side.seconds])).collect();
    chart::write(path, &format!("{work} {}", args.target), &chart::groups(&["seconds until durable"], &figures))
}
