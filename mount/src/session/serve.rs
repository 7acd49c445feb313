//! The process that is a session: it owns the disks and their doors, and ends with them.
//!
//! Order of a start: lock, mount (which needs privileges), confine, and only then look at sources and
//! overlays, which strangers may have written. Order of an end: copying, doors, flush, sockets.
//!
//! Invariants
//! - Without the session's lock nothing is opened, and what an earlier door left (sockets, dead mounts)
//!   is removed only with it.
//! - A door that was killed at any point is followed by one that serves the same bytes; clients that
//!   reconnect notice only the wait.
//! - The states Mounted, Migrating and Interrupted follow what is really so; all other states are the
//!   runner's to set.
//!
//! Not here: restarting a door that died (`supervise`), starting machines (`Hooks`).

use std::{fmt::Debug, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use aquifer_formats::Layer;
use aquifer_vdisk::{BlockCache, Hydrator};
use jiff::Timestamp;
use parking_lot::{Condvar, Mutex};

use super::{
    Access, Error, Folder, Hydrate, Result, Spec,
    disks::{Opened, open, raw_file, source_folders},
    folder::make_private_dir,
    listen::Control,
    live::{Live, LiveDisk},
    traces::Traced,
    watch,
};
use crate::{
    confine::{self, Confinement, Jail},
    fuse::{Audience, FuseFile, FuseMount, FuseOptions, MountAccess},
    nbd,
};

/// What the runner is told as it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// The doors answer.
    Ready,
    /// Reads wait for the source.
    SourceAway,
    /// Nothing waits any more.
    SourceBack,
    /// Every disk is local and durable.
    AllLocal,
    /// Hydration gave up on something.
    HydrationFailed,
    /// The doors are about to close.
    Ending,
}

impl Happening {
    /// Its name in `events`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "door_ready",
            Self::SourceAway => "source_away",
            Self::SourceBack => "source_back",
            Self::AllLocal => "all_local",
            Self::HydrationFailed => "hydration_failed",
            Self::Ending => "door_ending",
        }
    }
}

/// The runner's part of the process. It runs confined: it can use the session's files and sockets, and
/// cannot start programs.
pub trait Hooks: Debug + Send + Sync {
    /// Something happened. Called from the session's own thread: whatever takes long belongs on another.
    fn happened(&self, live: &Arc<Live>, what: Happening);

    /// An order of [`super::Client::call`].
    ///
    /// # Errors
    /// Whatever the caller is to be told; [`Error::Door`] carries any code.
    fn call(&self, live: &Arc<Live>, name: &str, args: serde_json::Value) -> Result<serde_json::Value>;
}

/// No runner: a session that only serves.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn happened(&self, _live: &Arc<Live>, _what: Happening) {}

    fn call(&self, _live: &Arc<Live>, name: &str, _args: serde_json::Value) -> Result<serde_json::Value> {
        Err(Error::Door { code: "E_USAGE".into(), what: format!("this door knows no `{name}`") })
    }
}

/// Whether the process confines itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Confine {
    /// As far as the kernel can, with these further folders to read.
    Reading(Vec<PathBuf>),
    /// Not at all, for the reason given; status says so.
    Not(String),
}

/// Makes a layer of the NBD server a URI names. It may be called at any time, on any thread.
pub type ConnectNbd = fn(&str) -> aquifer_formats::Result<Arc<dyn Layer>>;

/// What a door needs beside its folder.
pub struct Serving<'a> {
    /// Makes layers of NBD sources.
    pub connect: ConnectNbd,
    /// The runner's part.
    pub hooks: Arc<dyn Hooks>,
    /// Whether to confine the process.
    pub confine: Confine,
    /// The NBD socket, bound and listening, as [`super::inherited_listener`] finds it; `None` binds it here.
    pub listener: Option<OwnedFd>,
    /// Process that restarts this one, for status.
    pub supervisor: Option<u32>,
    /// Asked several times a second: whether to end in order, as after SIGTERM.
    pub stop: &'a (dyn Fn() -> bool + Sync),
}

/// How often the watcher looks.
const TICK: Duration = Duration::from_millis(100);

/// Serves the session in `folder` until it is told to end. This process is the session from here on.
///
/// # Errors
/// [`Error::Busy`] where another process serves it; [`Error::State`] where it is not to be served;
/// [`Error::OtherChain`]; whatever keeps the disks or doors from opening. What was opened is closed again.
pub fn serve(folder: &Folder, serving: &Serving<'_>) -> Result<()> {
    let _owner = folder.own()?;
    let spec = folder.load()?;
    if !spec.state.serves() {
        let need = super::State::ALL.into_iter().filter(|s| s.serves()).collect();
        return Err(Error::State { have: spec.state, need, allowed: spec.state.allowed().to_vec() });
    }
    make_private_dir(&spec.runtime_dir)?;
    let mut warnings = Vec::new();
    match spare_from_reclaim() {
        // A machine's own connection is at no such risk: only what this host itself mounts.
        Err(what) if spec.options.fuse_dir.is_some() => warnings.push(what),
        Ok(()) | Err(_) => {}
    }
    let mount = spec.options.fuse_dir.as_deref().map(|dir| FuseMount::new(dir, fuse_options(&spec))).transpose()?;
    let confinement = match &serving.confine {
        Confine::Reading(more) => confine::enter(&jail(&spec, more)),
        Confine::Not(why) => Confinement::none(why),
    };
    warnings.extend(confinement.missing.iter().map(|m| format!("not fully confined: {m}")));
    let live = Arc::new(start(folder, spec, serving, confinement, warnings)?);
    if let Some(mount) = mount {
        let file = |(live_disk, disk): (&LiveDisk, _)| FuseFile {
            disk: live_disk.disk.clone(),
            raw: live_disk.disk.is_writable().then(|| raw_file(&live.spec, disk)).flatten(),
        };
        let door = mount.serve(live.disks.iter().zip(&live.spec.disks).map(file).collect())?;
        *live.fuse.lock() = Some(door);
    }
    run(&live, serving)
}

fn start(
    folder: &Folder,
    spec: Spec,
    serving: &Serving<'_>,
    confinement: Confinement,
    warnings: Vec<String>,
) -> Result<Live> {
    let cache = Arc::new(BlockCache::new(spec.options.cache_bytes));
    let mut disks = Vec::with_capacity(spec.disks.len());
    let mut server = nbd::Server::builder();
    for disk in &spec.disks {
        let Opened { disk: opened, opening } = open(&spec, disk, &cache, serving.connect)?;
        opened.set_patience(Duration::from_secs(spec.options.source_wait_s));
        server = server.export(nbd::Export::new(&disk.name, opened.clone()));
        let traced = if opened.is_writable() { Traced::start(&spec, &opened) } else { Traced::default() };
        disks.push(LiveDisk {
            disk: opened,
            hydrator: Mutex::new(None),
            opening: Mutex::new(opening),
            traced: Mutex::new(traced),
        });
    }
    Ok(Live {
        folder: folder.clone(),
        options: Mutex::new(spec.options.clone()),
        spec,
        disks,
        connect: serving.connect,
        cache,
        server: server.build()?,
        fuse: Mutex::new(None),
        started: Timestamp::now(),
        confinement,
        supervisor: serving.supervisor,
        warnings: Mutex::new(warnings),
        risk: Mutex::new(None),
        ending: (Mutex::new(false), Condvar::new()),
    })
}

/// From the first answer to the last.
fn run(live: &Arc<Live>, serving: &Serving<'_>) -> Result<()> {
    if live.spec.options.access == Access::Writable && live.spec.options.hydrate != Hydrate::Off {
        live.hydrate()?;
        if live.spec.options.hydrate == Hydrate::Paused {
            live.disks.iter().for_each(|d| _ = d.hydrator.lock().as_ref().map(Hydrator::pause));
        }
    }
    match &serving.listener {
        Some(listener) => {
            let again = listener.try_clone().map_err(|e| Error::io(&live.spec.nbd_socket(), "share", e))?;
            live.server.listen_fd(again)?;
        }
        None => _ = live.server.listen_unix(&live.spec.nbd_socket())?,
    }
    let control = Control::bind(&live.spec.control_socket())?;
    std::thread::scope(|scope| {
        let hooks = &serving.hooks;
        let answering = std::thread::Builder::new().name("control".into());
        let spawned = answering.spawn_scoped(scope, || control.serve(live, hooks));
        spawned.map_err(|e| Error::io(live.folder.dir(), "start a thread", e))?;
        live.tell(&*serving.hooks, Happening::Ready, None);
        let mut watcher = watch::Watcher::new(live.is_local());
        while !(serving.stop)() && !live.wait_for_end(TICK) {
            watcher.look(live, &*serving.hooks);
        }
        live.tell(&*serving.hooks, Happening::Ending, None);
        live.end();
        live.shut()
    })
}

fn fuse_options(spec: &Spec) -> FuseOptions {
    let access = match spec.options.access {
        Access::ReadOnly => MountAccess::ReadOnly,
        Access::Writable => MountAccess::ReadWrite,
    };
    FuseOptions { audience: Audience::Owner, access }
}

fn jail(spec: &Spec, more: &[PathBuf]) -> Jail {
    let mut read_only: Vec<PathBuf> = spec.disks.iter().flat_map(|d| source_folders(&d.chain)).collect();
    read_only.extend_from_slice(more);
    // Names of hosts, for sources across the network; what a process may know of itself.
    for path in ["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/proc", "/dev/urandom"] {
        read_only.push(path.into());
    }
    Jail { read_write: vec![spec.dir.clone(), spec.runtime_dir.clone()], read_only }
}

/// Keeps this thread, and all it makes later, from being made to wait for their own writes when memory
/// is short: disks they serve may be mounted on this very host. Without `CAP_SYS_RESOURCE` only such
/// disks are at risk.
fn spare_from_reclaim() -> Result<(), String> {
    rustix::process::configure_io_flusher_behavior(true).map_err(|e| {
        format!("without CAP_SYS_RESOURCE a disk mounted on this very host may stall when memory is short ({e})")
    })
}
