//! The disks of a running QEMU machine as they were at one moment, while its guest goes on writing.
//!
//! ```text
//! device ── disk ─(copy before write)─▶ scratch (qcow2, backed by the disk) ── NBD export ──▶ our reader
//! ```
//! All disks are caught in one transaction of QEMU; in the same instant a new persistent bitmap begins to count for
//! the next point, and the bitmap of the last point is copied, frozen, for us to read. The last point's own bitmap goes
//! on counting: until the new point is committed it is the truth, whatever becomes of us.
//!
//! Invariants
//! - The machine's own nodes and the files of its disks are never changed; everything added has our name.
//! - A point's bitmap is taken away only after the point that replaces it was committed.
//! - Whatever is added is taken away at the end; by a guard process if we are killed; by the next run if both are.
//! - The scratch files have room, or the backup gives way before they fill: the guest never waits for us.
//!
//! Not here: what is read through the export (`backup`), the guest's agent ([`super::agent`]).

use std::{
    fs::{self, OpenOptions},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aquifer_formats::repo::DiskName;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    agent::{Agent, Frozen},
    guard::Guard,
};
use crate::{
    fail::{Code, Fail, Result},
    host::{
        self,
        qmp::{self, Qmp},
    },
    site::Freeze,
};

/// What all names of ours begin with.
pub const OURS: &str = "aquifer-";

/// Names of bitmaps that count for a stored point.
pub const MARK: &str = "aquifer-mark-";

/// Name of the socket of the exports.
const SOCKET: &str = "fleece.sock";

/// Disks of one machine.
const DISKS_MAX: usize = 64;

/// How long an order may take.
const ORDER: Duration = Duration::from_secs(20);

/// How long something may take to end.
const ENDING: Duration = Duration::from_secs(30);

/// How long a guard that cleans up is waited for.
const TURN: Duration = Duration::from_secs(10);

/// Between two looks.
const POLL: Duration = Duration::from_millis(20);

/// Below this much room beside the scratch files the backup gives way, bytes.
const ROOM_BYTES: u64 = 256 << 20;

/// Bytes of a bit of a bitmap: those of a qcow2 cluster and of a block of a point.
const GRANULARITY: u64 = 64 << 10;

/// Bitmaps of ours that a disk keeps: one for each repository it is backed up to, and some in reserve.
const MARKS_MAX: usize = 8;

/// Where a running machine is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sockets {
    /// QEMU's monitor.
    pub monitor: PathBuf,
    /// The guest's agent, where the machine has that channel.
    pub agent: Option<PathBuf>,
    /// Folder for the export's socket: short, private.
    pub runtime: PathBuf,
    /// Folder for scratch files: on storage with room.
    pub scratch: PathBuf,
}

/// A disk of a running machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveDisk {
    /// Its name.
    pub name: DiskName,
    /// QEMU's node.
    pub node: String,
    /// Whether its format keeps bitmaps over a restart.
    pub persistent: bool,
    /// Its bitmaps.
    pub bitmaps: Vec<Bitmap>,
}

/// A bitmap as QEMU lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: String,
    /// Whether it can be believed: it counts, and was closed properly whenever QEMU ended.
    pub usable: bool,
    /// Bytes it says have changed.
    pub bytes: u64,
}

/// What is read, and what begins, for one disk.
#[derive(Clone, Debug)]
pub struct Catch {
    /// The disk.
    pub disk: LiveDisk,
    /// Bitmap of the point the new one stands on; `None` where everything is compared.
    pub since: Option<String>,
}

/// The disks as they were; ends with [`Fleece::end`], or as a failure when dropped.
#[derive(Debug)]
pub struct Fleece {
    sockets: Sockets,
    caught: Vec<Catch>,
    marks: Vec<String>,
    /// Whether the guest's file systems were frozen at that moment.
    pub frozen: bool,
    /// How long the guest was frozen.
    pub freeze_time: Duration,
    guard: Option<Guard>,
    watch: Option<(Sender<()>, JoinHandle<()>)>,
    done: bool,
    _claim: Claim,
}

/// The right to add things to a machine; of several at once one has it.
#[derive(Debug)]
pub struct Claim {
    _lock: fs::File,
}

/// Claims a machine that runs, and takes down what a run that was killed has left.
///
/// # Errors
/// [`Code::Busy`] where another backup is at it; [`Code::State`] where the machine does not run.
pub fn claim(sockets: &Sockets) -> Result<Claim> {
    let path = sockets.runtime.join("fleece.lock");
    let opened = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
    let lock = opened.map_err(|e| Fail::io(path.display(), "open", &e))?;
    let deadline = Instant::now() + TURN;
    loop {
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => thread::sleep(POLL),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = "another backup of the running machine is at work";
                return Err(Fail::new(Code::Busy, what).at(path.display()));
            }
            Err(error) => return Err(Fail::io(path.display(), "lock", &error.into())),
        }
    }
    let mut qmp = connect(sockets)?.ok_or_else(|| Fail::new(Code::State, "the machine does not run"))?;
    sweep(&mut qmp, sockets)?;
    Ok(Claim { _lock: lock })
}

/// Why the guest was not frozen, in words; the point is crash-consistent then.
pub type NotFrozen = String;

fn monitor(error: qmp::Error) -> Fail {
    host::Error::from(error).into()
}

/// Connects to a machine, if it runs.
///
/// # Errors
/// Something listens and is no monitor.
pub fn connect(sockets: &Sockets) -> Result<Option<Qmp>> {
    match Qmp::connect(&sockets.monitor, ORDER) {
        Ok(qmp) => Ok(Some(qmp)),
        Err(qmp::Error::Io { source, action: "connect", .. })
            if matches!(source.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused) =>
        {
            Ok(None)
        }
        Err(error) => Err(monitor(error)),
    }
}

/// Finds the disks of a running machine by their files.
///
/// # Errors
/// A disk is not attached, or twice; the monitor fails.
pub fn disks(qmp: &mut Qmp, wanted: &[(DiskName, PathBuf)]) -> Result<Vec<LiveDisk>> {
    let devices = list(qmp, "query-block", json!({}))?;
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    let mut found = Vec::new();
    for (name, file) in wanted {
        let file = fs::canonicalize(file).unwrap_or_else(|_| file.clone());
        let on = |device: &&Value| {
            let at = |pointer| device.pointer(pointer).and_then(Value::as_str).map(PathBuf::from);
            let paths = [at("/inserted/image/filename"), at("/inserted/file")];
            paths.into_iter().flatten().any(|path| fs::canonicalize(&path).unwrap_or(path) == file)
        };
        let device = devices.iter().find(on);
        let node = device.and_then(|device| device.pointer("/inserted/node-name")).and_then(Value::as_str);
        let Some(node) = node else {
            let what = format!("the running machine has no disk on {}", file.display());
            return Err(Fail::new(Code::NotFound, what).at(file.display()));
        };
        let known = nodes.iter().find(|known| text(known, "node-name") == node);
        let bitmaps = known.and_then(|known| known.get("dirty-bitmaps")).and_then(Value::as_array);
        let truth = |bitmap: &Value, key: &str| bitmap.get(key).and_then(Value::as_bool).unwrap_or(false);
        let bitmap = |bitmap: &Value| Bitmap {
            name: text(bitmap, "name").to_owned(),
            usable: truth(bitmap, "recording") && !truth(bitmap, "inconsistent") && !truth(bitmap, "busy"),
            bytes: bitmap.get("count").and_then(Value::as_u64).unwrap_or(0),
        };
        found.push(LiveDisk {
            name: name.clone(),
            node: node.to_owned(),
            persistent: known.is_some_and(|known| text(known, "drv") == "qcow2"),
            bitmaps: bitmaps.into_iter().flatten().map(bitmap).collect(),
        });
    }
    Ok(found)
}

/// Those of the files that the running machine has not open at all: not as a disk, and not below one. None where one of
/// its files cannot be looked at: that may be any of them.
///
/// # Errors
/// The monitor fails.
pub fn unopened(qmp: &mut Qmp, files: &[(DiskName, PathBuf)]) -> Result<Vec<DiskName>> {
    // By what they are: one file has many names.
    let seen = |path: &Path| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    let mut open = Vec::new();
    for node in nodes.iter().filter(|node| ["file", "host_device"].contains(&text(node, "drv"))) {
        let path = Path::new(text(node, "file"));
        match seen(path).filter(|_| path.is_absolute()) {
            Some(file) => open.push(file),
            None => return Ok(Vec::new()),
        }
    }
    let is_strange = |file: &Path| seen(file).is_some_and(|file| !open.contains(&file));
    Ok(files.iter().filter(|(_, file)| is_strange(file)).map(|(name, _)| name.clone()).collect())
}

impl Fleece {
    /// Catches the disks. `guard` is the program that cleans up if this process is killed.
    ///
    /// # Errors
    /// The monitor refuses; no room; the guest cannot be frozen and has to be. Nothing of ours is left then.
    pub fn catch(
        claim: Claim,
        sockets: Sockets,
        caught: Vec<Catch>,
        freeze: Freeze,
        guard: &Path,
    ) -> Result<(Self, Option<NotFrozen>)> {
        if caught.len() > DISKS_MAX {
            return Err(Fail::new(Code::Unsupported, format!("{} disks; {DISKS_MAX} can be caught", caught.len())));
        }
        room(&sockets.scratch)?;
        let mut qmp = connect(&sockets)?.ok_or_else(|| Fail::new(Code::State, "the machine does not run"))?;
        let sockets = Sockets { agent: sockets.agent.clone().filter(|_| guest_listens(&mut qmp)), ..sockets };
        let marks = caught.iter().map(|_| format!("{MARK}{}", Uuid::now_v7().simple())).collect();
        let guard = Guard::start(guard, &sockets)?;
        let mut fleece = Self {
            sockets,
            caught,
            marks,
            frozen: false,
            freeze_time: Duration::ZERO,
            guard: Some(guard),
            watch: None,
            done: false,
            _claim: claim,
        };
        let held = fleece.prepare(&mut qmp).and_then(|()| fleece.moment(&mut qmp, freeze));
        let held = held.and_then(|why| fleece.serve(&mut qmp).map(|()| why));
        // The monitor has one client at a time; whoever takes things down is the next.
        drop(qmp);
        let why = held?;
        fleece.watch = watch(fleece.sockets.clone());
        Ok((fleece, why))
    }

    /// What serves a disk.
    pub fn uri(&self, disk: &DiskName) -> String {
        format!("nbd+unix:///{disk}?socket={}", escaped(&self.socket()))
    }

    /// Name of the bitmap at a disk's export, where there is one.
    pub fn bitmap(&self, disk: &DiskName) -> Option<String> {
        let index = self.caught.iter().position(|caught| caught.disk.name == *disk)?;
        self.caught.get(index)?.since.as_ref().map(|_| frozen_name(index))
    }

    /// Name of the bitmap that counts for the new point.
    pub fn mark(&self, disk: &DiskName) -> Option<&str> {
        let index = self.caught.iter().position(|caught| caught.disk.name == *disk)?;
        self.marks.get(index).map(String::as_str)
    }

    /// Takes everything down. The new point was committed: its bitmaps stay, those it replaces go.
    ///
    /// # Errors
    /// The monitor fails. The point is whole all the same; the next run takes down what is left.
    pub fn end(mut self) -> Result<()> {
        self.done = true;
        let Some(mut qmp) = self.quiet()? else { return Ok(()) };
        sweep(&mut qmp, &self.sockets)?;
        for (caught, mark) in self.caught.iter().zip(&self.marks) {
            for old in replaced(caught, mark) {
                remove_bitmap(&mut qmp, &caught.disk.node, &old)?;
            }
        }
        self.dismiss();
        Ok(())
    }

    fn socket(&self) -> PathBuf {
        self.sockets.runtime.join(SOCKET)
    }

    fn quiet(&mut self) -> Result<Option<Qmp>> {
        if let Some((end, thread)) = self.watch.take() {
            drop(end);
            let _ = thread.join();
        }
        connect(&self.sockets)
    }

    fn dismiss(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// Scratch files and their nodes: nothing of the machine is touched.
    fn prepare(&self, qmp: &mut Qmp) -> Result<()> {
        for (index, caught) in self.caught.iter().enumerate() {
            let path = scratch_file(&self.sockets.scratch, index);
            let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            made.map_err(|e| Fail::io(path.display(), "create", &e))?;
            let (node, file) = (scratch_node(index), format!("{}-file", scratch_node(index)));
            let size = size_of_node(qmp, &caught.disk.node)?;
            order(qmp, "blockdev-add", json!({ "driver": "file", "node-name": file, "filename": path }))?;
            let job = format!("{OURS}create{index}");
            let options = json!({ "driver": "qcow2", "file": file, "size": size });
            order(qmp, "blockdev-create", json!({ "job-id": job, "options": options }))?;
            concluded(qmp, &job)?;
            order(
                qmp,
                "blockdev-add",
                json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": caught.disk.node }),
            )?;
        }
        Ok(())
    }

    /// The moment itself: frozen if possible, all disks in one transaction, thawed at once.
    fn moment(&mut self, qmp: &mut Qmp, freeze: Freeze) -> Result<Option<NotFrozen>> {
        let mut actions = Vec::new();
        for (index, (caught, mark)) in self.caught.iter().zip(&self.marks).enumerate() {
            let node = &caught.disk.node;
            let mut act = |kind: &str, data: Value| actions.push(json!({ "type": kind, "data": data }));
            if let Some(since) = &caught.since {
                let name = frozen_name(index);
                act("block-dirty-bitmap-add", json!({ "node": node, "name": name, "disabled": true }));
                act("block-dirty-bitmap-merge", json!({ "node": node, "target": name, "bitmaps": [since] }));
            }
            let persistent = caught.disk.persistent;
            let add = json!({ "node": node, "name": mark, "persistent": persistent, "granularity": GRANULARITY });
            act("block-dirty-bitmap-add", add);
            act(
                "blockdev-backup",
                json!({ "job-id": format!("{OURS}job{index}"), "device": node, "target": scratch_node(index),
                        "sync": "none", "filter-node-name": format!("{OURS}filter{index}") }),
            );
        }
        let started = Instant::now();
        let (held, why) = self.freeze(freeze)?;
        let caught = order(qmp, "transaction", json!({ "actions": actions }));
        if let Some(held) = held {
            self.frozen = true;
            let thawed = held.thaw();
            self.freeze_time = started.elapsed();
            if let Err(error) = thawed {
                let what = "the guest did not say that it goes on after its file systems were frozen";
                return Err(Fail::new(Code::Guest, what).cause(error));
            }
        }
        caught.map(|_| why)
    }

    fn freeze(&self, freeze: Freeze) -> Result<(Option<Frozen>, Option<NotFrozen>)> {
        if freeze == Freeze::Off {
            return Ok((None, None));
        }
        let outcome = match &self.sockets.agent {
            None => Err("no agent runs in the machine".to_owned()),
            Some(path) => Agent::connect(path).and_then(Agent::freeze).map_err(|error| error.to_string()),
        };
        match (outcome, freeze) {
            (Ok(frozen), _) => Ok((Some(frozen), None)),
            (Err(why), Freeze::Require) => {
                Err(Fail::new(Code::Guest, format!("the guest's file systems cannot be frozen: {why}")))
            }
            (Err(why), _) => Ok((None, Some(why))),
        }
    }

    fn serve(&self, qmp: &mut Qmp) -> Result<()> {
        let socket = self.socket();
        let _ = fs::remove_file(&socket);
        let address = json!({ "addr": { "type": "unix", "data": { "path": socket } }, "max-connections": 0 });
        if order(qmp, "nbd-server-start", address.clone()).is_err() {
            // One that serves nothing was left by a run that was killed.
            if !list(qmp, "query-block-exports", json!({}))?.is_empty() {
                let what = "the machine's own NBD server is in use by another program";
                return Err(Fail::new(Code::Busy, what).at(self.sockets.monitor.display()));
            }
            order(qmp, "nbd-server-stop", json!({}))?;
            order(qmp, "nbd-server-start", address)?;
        }
        for (index, caught) in self.caught.iter().enumerate() {
            let bitmaps: Vec<Value> =
                caught.since.iter().map(|_| json!({ "node": caught.disk.node, "name": frozen_name(index) })).collect();
            order(
                qmp,
                "block-export-add",
                json!({ "type": "nbd", "id": format!("{OURS}export{index}"), "node-name": scratch_node(index),
                        "name": caught.disk.name.as_str(), "writable": false, "bitmaps": bitmaps }),
            )?;
        }
        Ok(())
    }
}

impl Fleece {
    /// Whether an agent runs in the guest, as far as that can be told.
    pub fn has_agent(&self) -> bool {
        self.sockets.agent.is_some()
    }
}

impl Drop for Fleece {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        // The new bitmaps count for a point that never came to be.
        if let Ok(Some(mut qmp)) = self.quiet()
            && sweep(&mut qmp, &self.sockets).is_ok()
        {
            for (caught, mark) in self.caught.iter().zip(&self.marks) {
                let _ = remove_bitmap(&mut qmp, &caught.disk.node, mark);
            }
            self.dismiss();
        }
    }
}

/// Bitmaps that a committed point replaces: that of the point below, broken ones, and the oldest of too many.
fn replaced(caught: &Catch, mark: &str) -> Vec<String> {
    let mut ours: Vec<&Bitmap> = caught.disk.bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(MARK)).collect();
    // Their names begin with their time.
    ours.sort_by(|a, b| b.name.cmp(&a.name));
    let keep = |place: usize, bitmap: &Bitmap| {
        bitmap.usable && place + 1 < MARKS_MAX && caught.since.as_ref() != Some(&bitmap.name)
    };
    let gone = ours.iter().enumerate().filter(|(place, bitmap)| bitmap.name != mark && !keep(*place, bitmap));
    gone.map(|(_, bitmap)| bitmap.name.clone()).collect()
}

/// Takes down everything of ours but the bitmaps that count for points.
///
/// # Errors
/// The monitor fails, or something does not end.
pub fn sweep(qmp: &mut Qmp, sockets: &Sockets) -> Result<()> {
    let mine = |values: Vec<Value>, key: &str| -> Vec<String> {
        values.iter().map(|v| text(v, key).to_owned()).filter(|name| name.starts_with(OURS)).collect()
    };
    let exports =
        |qmp: &mut Qmp| -> Result<Vec<String>> { Ok(mine(list(qmp, "query-block-exports", json!({}))?, "id")) };
    let began = exports(qmp)?;
    for id in &began {
        // It may be going already.
        let _ = order(qmp, "block-export-del", json!({ "id": id, "mode": "hard" }));
    }
    gone(qmp, "an export", exports)?;
    if !began.is_empty() && list(qmp, "query-block-exports", json!({}))?.is_empty() {
        let _ = order(qmp, "nbd-server-stop", json!({}));
    }
    // Each time it is looked for: one that was running when it was cancelled stays until it is dismissed as well.
    let jobs = |qmp: &mut Qmp| -> Result<Vec<String>> {
        let left = mine(list(qmp, "query-jobs", json!({}))?, "id");
        for id in &left {
            if order(qmp, "job-cancel", json!({ "id": id })).is_err() {
                let _ = order(qmp, "job-dismiss", json!({ "id": id }));
            }
        }
        Ok(left)
    };
    gone(qmp, "a job", jobs)?;
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    for node in &nodes {
        let bitmaps = node.get("dirty-bitmaps").and_then(Value::as_array).into_iter().flatten();
        for bitmap in bitmaps.map(|bitmap| text(bitmap, "name")).filter(|name| name.starts_with(FROZEN)) {
            remove_bitmap(qmp, text(node, "node-name"), bitmap)?;
        }
    }
    let mut names = mine(nodes, "node-name");
    // What stands on a file goes before the file.
    names.sort_by_key(|name| name.ends_with("-file"));
    for name in names {
        order(qmp, "blockdev-del", json!({ "node-name": name }))?;
    }
    for index in 0..DISKS_MAX {
        // Only names made here; most are not there.
        let _ = fs::remove_file(scratch_file(&sockets.scratch, index));
    }
    let _ = fs::remove_file(sockets.runtime.join(SOCKET));
    Ok(())
}

/// Waits until a list of ours is empty.
fn gone(qmp: &mut Qmp, what: &str, look: impl Fn(&mut Qmp) -> Result<Vec<String>>) -> Result<()> {
    let deadline = Instant::now() + ENDING;
    loop {
        let left = look(qmp)?;
        let Some(first) = left.first() else { return Ok(()) };
        if Instant::now() >= deadline {
            return Err(Fail::new(Code::Timeout, format!("{what} of QEMU does not end: {first}")));
        }
        thread::sleep(POLL);
    }
}

/// Waits for a job that has to be dismissed.
fn concluded(qmp: &mut Qmp, id: &str) -> Result<()> {
    let deadline = Instant::now() + ENDING;
    while Instant::now() < deadline {
        let jobs = list(qmp, "query-jobs", json!({}))?;
        let Some(job) = jobs.iter().find(|job| text(job, "id") == id) else { return Ok(()) };
        if text(job, "status") == "concluded" {
            let error = job.get("error").and_then(Value::as_str).map(str::to_owned);
            order(qmp, "job-dismiss", json!({ "id": id }))?;
            return match error {
                None => Ok(()),
                Some(error) => Err(Fail::new(Code::Guest, format!("QEMU cannot make a scratch file: {error}"))),
            };
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err(Fail::new(Code::Timeout, format!("QEMU's job {id} does not end")))
}

/// Gives way before the scratch files have no room left.
fn watch(sockets: Sockets) -> Option<(Sender<()>, JoinHandle<()>)> {
    let (end, ended) = channel();
    let work = move || {
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(Duration::from_secs(1)) {
            if room(&sockets.scratch).is_err() {
                if let Ok(Some(mut qmp)) = connect(&sockets) {
                    let _ = sweep(&mut qmp, &sockets);
                }
                return;
            }
        }
    };
    // Without the thread the room was only looked at once.
    thread::Builder::new().name("room".into()).spawn(work).ok().map(|thread| (end, thread))
}

fn room(dir: &Path) -> Result<()> {
    let found = rustix::fs::statvfs(dir).map_err(|e| Fail::io(dir.display(), "look at", &e.into()))?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free >= ROOM_BYTES {
        return Ok(());
    }
    let what = format!("{} are free; a backup of a running machine needs more", crate::units::bytes(free));
    Err(Fail::new(Code::Capacity, what).at(dir.display()))
}

/// Whether an NBD URI is that of caught disks.
pub(crate) fn is_served_at(uri: &str) -> bool {
    uri.starts_with("nbd+unix:") && uri.ends_with(SOCKET)
}

/// A path as a URI holds it.
fn escaped(path: &Path) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let bytes = path.as_os_str().as_bytes().iter();
    bytes.map(|b| if plain(*b) { char::from(*b).to_string() } else { format!("%{b:02X}") }).collect()
}

const FROZEN: &str = "aquifer-frozen";

fn frozen_name(index: usize) -> String {
    format!("{FROZEN}{index}")
}

fn scratch_node(index: usize) -> String {
    format!("{OURS}scratch{index}")
}

fn scratch_file(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!(".aquifer-scratch{index}.qcow2"))
}

fn remove_bitmap(qmp: &mut Qmp, node: &str, name: &str) -> Result<()> {
    match qmp.execute("block-dirty-bitmap-remove", json!({ "node": node, "name": name }), ORDER) {
        Ok(_) | Err(qmp::Error::Refused { .. }) => Ok(()),
        Err(error) => Err(monitor(error)),
    }
}

fn size_of_node(qmp: &mut Qmp, node: &str) -> Result<u64> {
    let nodes = list(qmp, "query-named-block-nodes", json!({ "flat": true }))?;
    let size = nodes.iter().find(|known| text(known, "node-name") == node);
    let size = size.and_then(|known| known.pointer("/image/virtual-size")).and_then(Value::as_u64);
    size.ok_or_else(|| Fail::new(Code::Guest, format!("QEMU does not say how large {node} is")))
}

fn order(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Value> {
    qmp.execute(command, arguments, ORDER).map_err(monitor)
}

/// Whether somebody in the guest has opened the agent's channel. A channel that is not QEMU's own may have.
fn guest_listens(qmp: &mut Qmp) -> bool {
    let all = list(qmp, "query-chardev", json!({})).unwrap_or_default();
    let agent = all.iter().find(|device| text(device, "label") == "agent");
    agent.and_then(|device| device.get("frontend-open")).and_then(Value::as_bool).unwrap_or(true)
}

fn list(qmp: &mut Qmp, command: &str, arguments: Value) -> Result<Vec<Value>> {
    match order(qmp, command, arguments)? {
        Value::Array(values) => Ok(values),
        _ => Err(Fail::new(Code::Guest, format!("QEMU answers {command} with no list"))),
    }
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}
