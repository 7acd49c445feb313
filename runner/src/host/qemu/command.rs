//! The command line of a machine.
//!
//! Invariants
//! - Everything that came from a description is passed as JSON or checked text, so that no name can add an option.
//! - Formats are named; nothing is probed.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};

use super::{Accel, FirmwareFiles, alone, board, nodes, socket};
use crate::host::{
    Attachment, Bus, Error, Host, Network, Nic, Places, Process, Result, Running, Shape,
    firmware::Firmware,
    shape::{Board, NicModel},
};

const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// What the serial console said, in the machine's folder.
pub(super) const CONSOLE_LOG: &str = "console.log";

/// A command line, ready to be started.
#[derive(Debug)]
pub(super) struct Line {
    args: Vec<OsString>,
    places: Places,
    accel: Accel,
    firmware: Option<FirmwareFiles>,
}

impl Line {
    pub(super) fn new(shape: &Shape, disks: &[Attachment], places: &Places, accel: Accel) -> Result<Self> {
        if disks.len() != shape.disks.len() {
            let what = format!("{} attachments for {} disks", disks.len(), shape.disks.len());
            return Err(Error::Shape { what });
        }
        let firmware = match shape.firmware {
            Firmware::Uefi => Some(FirmwareFiles::find(shape.variables)?),
            Firmware::Bios => None,
        };
        let mut line = Self { args: Vec::new(), places: places.clone(), accel, firmware };
        line.board(shape);
        line.monitors();
        for (index, disk) in disks.iter().enumerate() {
            line.disk(shape, index, disk);
        }
        for (index, nic) in shape.nics.iter().enumerate() {
            line.nic(index, nic, shape.network);
        }
        line.agent();
        Ok(line)
    }

    pub(super) fn args(&self) -> &[OsString] {
        &self.args
    }

    pub(super) fn places(&self) -> &Places {
        &self.places
    }

    /// Makes what the command names: the machine's own copy of the firmware's variables (an existing one is kept: the
    /// guest has written to it), and the command itself for whoever wants to read it.
    pub(super) fn prepare(&self) -> Result<()> {
        if let Some(files) = &self.firmware {
            let own = self.variables();
            if !own.exists() {
                let bytes = fs::read(&files.variables).map_err(|e| Error::io(&files.variables, "read", e))?;
                let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own);
                let written =
                    file.and_then(|mut f| std::io::Write::write_all(&mut f, &bytes).and_then(|()| f.sync_all()));
                written.map_err(|e| Error::io(&own, "write", e))?;
            }
        }
        self.write_down(&self.args)
    }

    /// Leaves how the machine is started by hand, without anything of ours: it is let go at once.
    pub(super) fn keep(&self) -> Result<()> {
        let let_go: Vec<OsString> = self.args.iter().filter(|arg| *arg != "-S").cloned().collect();
        self.write_down(&let_go)
    }

    fn write_down(&self, args: &[OsString]) -> Result<()> {
        let mut text = super::PROGRAM.to_owned();
        for arg in args {
            let arg = arg.to_string_lossy();
            let plain = arg.chars().all(|c| c.is_ascii_alphanumeric() || "-_=,./:".contains(c));
            text.push_str(if arg.starts_with('-') { " \\\n  " } else { " " });
            text.push_str(&if plain { arg.into_owned() } else { format!("'{}'", arg.replace('\'', r"'\''")) });
        }
        text.push('\n');
        let path = self.places.dir.join("qemu.command");
        fs::write(&path, text).map_err(|e| Error::io(&path, "write", e))
    }

    /// The record of the machine once its process exists.
    pub(super) fn running(&self, process: Process, log: PathBuf) -> Running {
        running(process, &self.places, self.accel, log)
    }

    fn variables(&self) -> PathBuf {
        super::Qemu.variables(&self.places.dir)
    }

    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.args.push(option.into());
        self.args.push(value.into());
    }

    fn json(&mut self, option: &str, value: &Value) {
        self.add(option, value.to_string());
    }

    fn board(&mut self, shape: &Shape) {
        self.args.extend(["-nodefaults", "-no-user-config", "-S"].map(Into::into));
        self.add("-name", format!("guest={}", shape.name));
        self.add("-uuid", shape.uuid.to_string());
        self.add("-sandbox", SANDBOX);
        self.add("-pidfile", alone::number_file(&self.places.dir));
        self.add("-msg", "timestamp=on");
        let mut machine = format!("{},vmport=off", board::named(shape.machine_type.as_deref()).name);
        if let Some(files) = self.firmware.clone() {
            machine.push_str(",pflash0=code,pflash1=variables");
            let flash = |name: &str, file: &Path, read_only: bool| {
                json!({ "driver": "raw", "node-name": name, "read-only": read_only,
                        "file": { "driver": "file", "filename": file, "read-only": read_only } })
            };
            self.json("-blockdev", &flash("code", &files.code, true));
            self.json("-blockdev", &flash("variables", &self.variables(), false));
        }
        self.add("-machine", machine);
        self.add("-accel", self.accel.name());
        self.add("-cpu", if self.accel == Accel::Kvm { "host" } else { "max" });
        self.add("-smp", shape.cpus.to_string());
        self.add("-m", format!("{}M", shape.memory >> 20));
        self.add("-rtc", "base=utc,driftfix=slew");
        self.json("-object", &json!({ "qom-type": "rng-random", "id": "rng", "filename": "/dev/urandom" }));
        self.json("-device", &json!({ "driver": "virtio-rng-pci", "rng": "rng" }));
        if old_board(shape) && shape.disks.iter().any(|d| d.bus == Bus::Sata) {
            self.json("-device", &json!({ "driver": "ich9-ahci", "id": "ahci" }));
        }
        if shape.disks.iter().any(|d| d.bus == Bus::Scsi) {
            self.json("-device", &json!({ "driver": "virtio-scsi-pci", "id": "scsi" }));
        }
    }

    fn monitors(&mut self) {
        for (id, name) in [("orders", "qmp.sock"), ("events", "events.sock")] {
            let path = escaped(&socket(&self.places, name));
            self.add("-chardev", joined(&[&format!("socket,id={id},server=on,wait=off,path="), &path]));
            self.add("-mon", format!("chardev={id},mode=control"));
        }
        let console = escaped(&socket(&self.places, "console.sock"));
        let log = escaped(&self.places.dir.join(CONSOLE_LOG));
        let socket_options = "socket,id=console,server=on,wait=off,logappend=on,path=";
        self.add("-chardev", joined(&[&socket_options, &console, &",logfile=", &log]));
        self.add("-serial", "chardev:console");
        self.json("-device", &json!({ "driver": "VGA" }));
        self.add("-vnc", joined(&[&"unix:", &escaped(&socket(&self.places, "vnc.sock"))]));
    }

    fn disk(&mut self, shape: &Shape, index: usize, attachment: &Attachment) {
        let Some(disk) = shape.disks.get(index) else { return };
        // Its place among those on the same controller.
        let place = shape.disks.iter().take(index).filter(|other| other.bus == disk.bus).count();
        let [raw, nbd, _] = nodes::names(index);
        match attachment {
            Attachment::Door(door) => {
                self.json("-blockdev", &nodes::door(&nbd, door));
                self.json("-blockdev", &nodes::raw(&raw, &nbd));
            }
            Attachment::File { path, format } => self.json("-blockdev", &nodes::image(&raw, path, *format)),
        }
        let mut device = json!({ "drive": raw, "id": format!("dev{index}") });
        let more = match disk.bus {
            Bus::Virtio => json!({ "driver": "virtio-blk-pci", "rerror": "stop", "werror": "stop" }),
            Bus::Scsi => {
                json!({ "driver": "scsi-hd", "bus": "scsi.0", "scsi-id": index, "rerror": "stop", "werror": "stop" })
            }
            Bus::Sata => {
                let bus = format!("{}.{place}", if old_board(shape) { "ahci" } else { "ide" });
                json!({ "driver": "ide-hd", "bus": bus, "rerror": "stop", "werror": "stop" })
            }
            Bus::Ide => {
                let bus = format!("ide.{}", place / 2);
                json!({ "driver": "ide-hd", "bus": bus, "unit": place % 2, "rerror": "stop", "werror": "stop" })
            }
            // NVMe has no such setting: it reports errors to the guest, after the whole of the door's patience.
            Bus::Nvme => json!({ "driver": "nvme", "serial": format!("disk{index}") }),
        };
        if let (Value::Object(device), Value::Object(more)) = (&mut device, more) {
            device.extend(more);
            if let Some(order) = order(shape, index) {
                device.insert("bootindex".into(), json!(order));
            }
        }
        self.json("-device", &device);
    }

    /// After all else, so that nothing else has another place than it had.
    fn agent(&mut self) {
        // The guest's own agent, where it has one, is asked through this.
        let agent = escaped(&socket(&self.places, "agent.sock"));
        self.json("-device", &json!({ "driver": "virtio-serial-pci", "id": "serial" }));
        self.add("-chardev", joined(&[&"socket,id=agent,server=on,wait=off,path=", &agent]));
        let port = json!({ "driver": "virtserialport", "bus": "serial.0", "chardev": "agent", "name": "org.qemu.guest_agent.0" });
        self.json("-device", &port);
    }

    fn nic(&mut self, index: usize, nic: &Nic, network: Network) {
        let model = match nic.model {
            NicModel::Virtio => "virtio-net-pci",
            NicModel::E1000e => "e1000e",
            NicModel::E1000 => "e1000",
            NicModel::Rtl8139 => "rtl8139",
        };
        // Without an image of its own for starting from the network: the machine starts from its disk.
        let mut device = json!({ "driver": model, "mac": nic.mac, "romfile": "", "id": format!("nic{index}") });
        if network == Network::User {
            self.json("-netdev", &json!({ "type": "user", "id": format!("net{index}") }));
            device["netdev"] = json!(format!("net{index}"));
        }
        self.json("-device", &device);
    }
}

/// The record of a machine whose files and sockets are in `places`.
pub(super) fn running(process: Process, places: &Places, accel: Accel, log: PathBuf) -> Running {
    Running {
        process,
        accel: accel.name().to_owned(),
        orders: socket(places, "qmp.sock"),
        events: socket(places, "events.sock"),
        console: socket(places, "console.sock"),
        console_log: places.dir.join(CONSOLE_LOG),
        screen: Some(socket(places, "vnc.sock")),
        log,
    }
}

/// Removes the sockets that a machine made and has left.
pub(super) fn forget_sockets(places: &Places) {
    for name in ["qmp.sock", "events.sock", "console.sock", "agent.sock", "vnc.sock"] {
        let _ = std::fs::remove_file(socket(places, name));
    }
}

fn old_board(shape: &Shape) -> bool {
    Board::of(shape.machine_type.as_deref()) == Board::Pc
}

/// A disk's place in the boot order, if it has one.
fn order(shape: &Shape, index: usize) -> Option<u32> {
    if shape.disks.iter().all(|disk| disk.boot_order.is_none()) {
        return (index == 0).then_some(0);
    }
    shape.disks.get(index).and_then(|disk| disk.boot_order)
}

/// A path inside an option of the old kind, where a comma ends a value.
fn escaped(path: &Path) -> OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes();
    OsString::from_vec(bytes.iter().flat_map(|b| std::iter::repeat_n(*b, 1 + usize::from(*b == b','))).collect())
}

fn joined(parts: &[&dyn AsRef<OsStr>]) -> OsString {
    parts.iter().fold(OsString::new(), |mut all, part| {
        all.push(part);
        all
    })
}

/// Makes the program a session of its own, deaf to its starter's terminal, whose files only its user can reach.
#[expect(unsafe_code, reason = "only a hook between fork and exec can leave the session; it makes two system calls")]
pub(super) fn leave_terminal(program: &mut Command) {
    let hook = || {
        rustix::process::setsid()?;
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        Ok(())
    };
    // SAFETY: the hook is async-signal-safe: two system calls, no allocation, no lock.
    unsafe { program.pre_exec(hook) };
}

#[cfg(test)]
mod tests;
