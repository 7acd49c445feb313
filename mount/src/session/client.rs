//! Asks a session how it stands and gives it orders, whether its door runs or not.
//!
//! Invariants
//! - Only [`Client::status`] works without a door, from the session's files, and says that it did.
//! - A door that does not answer in time is an error, never a wait without end.

use std::{
    io,
    path::Path,
    time::{Duration, Instant},
};

use aquifer_vdisk::Overlay;
use jiff::Timestamp;

use super::{
    DiskSpec, Error, Folder, Result, Spec, Status,
    control::{Answer, Clients, Request, Setting, Wire},
    disks,
    status::{DiskStatus, Door, OverlayStatus, STATUS_SCHEMA},
};

/// How long an answer to a question may take.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// How long an order that writes may take: a drain moves up to a whole journal.
const ORDER_WAIT: Duration = Duration::from_secs(600);

/// A session seen from outside its door.
#[derive(Clone, Debug)]
pub struct Client {
    folder: Folder,
}

impl Client {
    /// The session in `dir`.
    ///
    /// # Errors
    /// [`Error::NoSession`], [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self { folder: Folder::open(dir)? })
    }

    /// The session of a folder already found, as by `Registry::resolve`.
    pub fn of(folder: Folder) -> Self {
        Self { folder }
    }

    /// The session's folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// How the session stands: asked of the door, or read from its files where no door runs.
    ///
    /// # Errors
    /// [`Error::BadFile`], [`Error::Io`]; [`Error::Protocol`] where a door runs but does not answer.
    pub fn status(&self) -> Result<Status> {
        match self.ask(&Request::Status, ANSWER_WAIT) {
            Ok(Answer::Status(status)) => Ok(*status),
            Ok(other) => Err(self.unexpected(&other)),
            Err(Error::NotRunning { .. }) => self.status_from_files(),
            Err(e) => Err(e),
        }
    }

    /// Changes the limits of hydration; they are kept over a restart of the door.
    ///
    /// # Errors
    /// [`Error::NotRunning`] and those of the control socket, as for all orders.
    pub fn set(&self, rate: Setting<u64>, ready_by: Setting<Timestamp>) -> Result<()> {
        self.order(&Request::Set { rate, ready_by })
    }

    /// Holds hydration back; kept over a restart of the door.
    ///
    /// # Errors
    /// As [`Client::set`].
    pub fn pause(&self) -> Result<()> {
        self.order(&Request::Pause)
    }

    /// Lets hydration go on.
    ///
    /// # Errors
    /// As [`Client::set`].
    pub fn resume(&self) -> Result<()> {
        self.order(&Request::Resume)
    }

    /// Empties the journal of one disk or all: `disk.raw` is the whole truth when this returns.
    ///
    /// # Errors
    /// As [`Client::set`]; [`Error::Door`] while blocks are absent.
    pub fn drain(&self, disk: Option<&str>) -> Result<()> {
        self.order(&Request::Drain { disk: disk.map(str::to_owned) })
    }

    /// Records that the hypervisor writes `disk.raw` itself from now on.
    ///
    /// # Errors
    /// As [`Client::set`].
    pub fn hand_over(&self, disk: &str) -> Result<()> {
        self.order(&Request::HandOver { disk: disk.to_owned() })
    }

    /// Closes the source for good.
    ///
    /// # Errors
    /// As [`Client::set`]; [`Error::Door`] while blocks are absent.
    pub fn detach_source(&self) -> Result<()> {
        self.order(&Request::DetachSource)
    }

    /// Ends the door in order and waits until it has gone.
    ///
    /// # Errors
    /// As [`Client::set`]; [`Error::Door`] with `E_CLIENTS` where clients are connected and respected.
    pub fn stop(&self, clients: Clients) -> Result<()> {
        self.order(&Request::Stop { clients })?;
        let start = Instant::now();
        while self.folder.owner()?.is_some() {
            if start.elapsed() > ANSWER_WAIT {
                let path = self.folder.dir().display().to_string();
                return Err(Error::Protocol { path, what: "the door agreed to stop but has not".into() });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// An order to the runner's part of the door.
    ///
    /// # Errors
    /// As [`Client::set`]; [`Error::Door`] with the runner's code.
    pub fn call(&self, name: &str, args: serde_json::Value) -> Result<serde_json::Value> {
        match self.ask(&Request::Call { name: name.to_owned(), args }, ORDER_WAIT)? {
            Answer::Value(value) => Ok(value),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Waits until the door answers.
    ///
    /// # Errors
    /// [`Error::NotRunning`] once `limit` has passed; anything but that at once.
    pub fn wait_for_door(&self, limit: Duration) -> Result<Status> {
        let start = Instant::now();
        loop {
            match self.ask(&Request::Status, ANSWER_WAIT) {
                Ok(Answer::Status(status)) => return Ok(*status),
                Ok(other) => return Err(self.unexpected(&other)),
                Err(Error::NotRunning { .. }) if start.elapsed() < limit => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn order(&self, request: &Request) -> Result<()> {
        match self.ask(request, ORDER_WAIT)? {
            Answer::Done => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    fn ask(&self, request: &Request, wait: Duration) -> Result<Answer> {
        let spec = self.folder.load()?;
        let socket = spec.control_socket();
        let stream = match crate::dial::unix(&socket, ANSWER_WAIT) {
            Ok(stream) => stream,
            // Refused: the socket is the leftover of a door that was killed.
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(Error::NotRunning { path: self.folder.dir().display().to_string() });
            }
            Err(e) => return Err(Error::io(&socket, "connect", e)),
        };
        let timeouts = stream.set_read_timeout(Some(wait)).and_then(|()| stream.set_write_timeout(Some(ANSWER_WAIT)));
        timeouts.map_err(|e| Error::io(&socket, "connect", e))?;
        let mut wire = Wire::asking(stream, &socket);
        wire.send(request)?;
        match wire.receive::<Answer>() {
            Ok(Some(Answer::Error { code, what })) => Err(Error::Door { code, what }),
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(Error::NotRunning { path: self.folder.dir().display().to_string() }),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::ConnectionReset => {
                Err(Error::NotRunning { path: self.folder.dir().display().to_string() })
            }
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => {
                let what = format!("no answer within {} s", wait.as_secs());
                Err(Error::Protocol { path: socket.display().to_string(), what })
            }
            Err(e) => Err(e),
        }
    }

    fn unexpected(&self, answer: &Answer) -> Error {
        let path = self.folder.dir().display().to_string();
        Error::Protocol { path, what: format!("the door answered beside the question: {answer:?}") }
    }

    fn status_from_files(&self) -> Result<Status> {
        let spec = self.folder.load()?;
        let disks = spec.disks.iter().map(|disk| offline_disk(&spec, disk)).collect();
        Ok(Status {
            schema: STATUS_SCHEMA.to_owned(),
            id: spec.id,
            name: spec.name.clone(),
            dir: spec.dir.display().to_string(),
            state: spec.state,
            reason: spec.reason.clone(),
            created: spec.created,
            door: Door::NotRunning,
            disks,
            rate: spec.options.rate,
            ready_by: spec.options.ready_by,
            warnings: Vec::new(),
        })
    }
}

fn offline_disk(spec: &Spec, disk: &DiskSpec) -> DiskStatus {
    DiskStatus {
        name: disk.name.clone(),
        size: disk.size,
        uri: spec.uri(&disk.name),
        file: None,
        used: None,
        overlay: offline_overlay(spec, disk),
        hydration: None,
        fetched: 0,
        source_away: None,
        parked: Vec::new(),
        unused: None,
        demand: None,
        doubtful: Vec::new(),
    }
}

/// What the overlay's files say; nothing where they cannot be read, or a door has just opened them.
fn offline_overlay(spec: &Spec, disk: &DiskSpec) -> Option<OverlayStatus> {
    let of = disks::overlay_of(disk)?;
    Overlay::look(&spec.disk_dir(&disk.name), of).ok().map(OverlayStatus::from)
}
