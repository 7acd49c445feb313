//! Other people's servers, started on the same image for a comparison.
//!
//! Invariants
//! - A peer serves read-only, on a socket in a private folder; both are gone at the end.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use aquifer_formats::probe::Format;
use aquifer_mount::nbd::{Address, address::Place};
use aquifer_vdisk::ChainSpec;

use crate::{
    context::Context,
    fail::{Code, Fail, Result},
    source::SelectedDisk,
};

const START_WAIT: Duration = Duration::from_secs(10);

/// A private folder, removed when dropped.
pub(super) struct Folder(PathBuf);

impl Folder {
    pub(super) fn make(context: &Context) -> Result<Self> {
        let path =
            context.runtime_dir()?.join(format!("bench-{}-{}", std::process::id(), uuid::Uuid::now_v7().simple()));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(|e| Fail::io(path.display(), "create", &e))?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Only dead sockets are in it.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running peer. Dropping it ends it.
pub(super) struct Peer {
    child: Child,
    pub(super) address: Address,
    _folder: Folder,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Ours alone, and it has nothing to lose.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Refuses peers that do not serve, before anything is measured.
pub(super) fn check(names: &[String]) -> Result<()> {
    match names.iter().find(|name| *name != "qemu-nbd") {
        None => Ok(()),
        Some(name) => {
            let what = format!("the peer `{name}` is not known here; qemu-nbd is");
            Err(Fail::new(Code::Usage, what).help("aquifer bench --help"))
        }
    }
}

/// The file of a source that others can read too, and what QEMU calls its format.
pub(super) fn image_of(selected: &SelectedDisk) -> Result<(&Path, &'static str)> {
    match &selected.spec {
        ChainSpec::Image { path, format, .. } => Ok((path, if *format == Some(Format::Raw) { "raw" } else { "qcow2" })),
        _ => {
            let what = "a peer can read image files only";
            Err(Fail::new(Code::Usage, what).help("aquifer bench read FILE --peer qemu-nbd"))
        }
    }
}

pub(super) fn start(context: &Context, selected: &SelectedDisk) -> Result<Peer> {
    let (path, format) = image_of(selected)?;
    let folder = Folder::make(context)?;
    let socket = folder.path().join("peer.sock");
    let mut command = Command::new("qemu-nbd");
    command.arg("-k").arg(&socket).args(["-r", "-t", "--shared=0", "-f", format]).arg(path);
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let mut child = spawned.map_err(|e| Fail::io("qemu-nbd", "start", &e).help("apt-get install qemu-utils"))?;
    let start = Instant::now();
    while !socket.exists() {
        let ended = child.try_wait().map_err(|e| Fail::io("qemu-nbd", "wait for", &e))?;
        if ended.is_some() || start.elapsed() > START_WAIT {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Fail::new(Code::Child, "qemu-nbd does not serve this image").at(path.display()));
        }
        thread::sleep(Duration::from_millis(5));
    }
    let address = Address { place: Place::Unix(socket), export: String::new(), tls: false };
    Ok(Peer { child, address, _folder: folder })
}
