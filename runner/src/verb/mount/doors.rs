//! The doors of a mount: where they are, what they serve, how they end.

use std::{
    fs::{self, DirBuilder},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aquifer_mount::{
    fuse::{Audience, FuseDoor, FuseFile, FuseOptions, MountAccess},
    loopdev::{Detached, LoopAccess, LoopDevice, SectorSize},
    nbd::{self, Address, Export, Server, ServerTls, address},
    vhost::{VhostDisk, VhostDoor},
};
use aquifer_vdisk::Disk;

use super::{Args, scratch::Scratch};
use crate::{
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    mounts::MountedDisk,
    source::Selection,
    units,
};

/// Where doors are to be.
pub(super) struct Place {
    nbd: Option<Address>,
    fuse: Option<PathBuf>,
    vhost_user: Option<PathBuf>,
    loops: bool,
    tls: Option<ServerTls>,
    /// A folder made for the socket, removed at the end.
    private: Option<PathBuf>,
}

impl Place {
    /// Reads the options; makes nothing.
    pub(super) fn of(context: &Context, args: &Args) -> Result<Self> {
        let tls = args.tls.as_deref().map(ServerTls::from_dir).transpose()?;
        let (mut fuse, loops, vhost_user) = (args.fuse.clone(), args.loops, args.vhost_user.clone());
        let nbd = args.nbd.as_deref().map(str::parse).transpose()?;
        let folder = context.runtime_dir()?.join(format!("mount-{}", std::process::id()));
        if loops && fuse.is_none() {
            // A loop device stands on a file.
            fuse = Some(folder.join("disks"));
            return Ok(Self { nbd, fuse, vhost_user, loops, tls, private: Some(folder) });
        }
        if nbd.is_some() || fuse.is_some() || vhost_user.is_some() {
            return Ok(Self { nbd, fuse, vhost_user, loops, tls, private: None });
        }
        let place = address::Place::Unix(folder.join("nbd.sock"));
        let nbd = Some(Address { place, export: String::new(), tls: false });
        Ok(Self { nbd, fuse, vhost_user, loops, tls, private: Some(folder) })
    }
}

impl Place {
    /// Looks whether the doors can be opened there; makes nothing.
    pub(super) fn check(&self, selection: &Selection) -> Result<()> {
        if let Some(nbd) = &self.nbd {
            let mut builder = Server::builder();
            if let Some(tls) = &self.tls {
                builder = builder.tls(tls.clone());
            }
            builder.build()?.check(nbd)?;
        }
        if let Some(dir) = &self.fuse
            && fs::metadata(dir).is_ok_and(|meta| !meta.is_dir())
        {
            return Err(Fail::new(Code::Exists, format!("{} is no folder", dir.display())).at(dir.display()));
        }
        if let Some(dir) = &self.vhost_user {
            if fs::metadata(dir).is_ok_and(|meta| !meta.is_dir()) {
                return Err(Fail::new(Code::Exists, format!("{} is no folder", dir.display())).at(dir.display()));
            }
            VhostDoor::check(dir, selection.disks.iter().map(|disk| disk.name.as_str()))?;
        }
        if self.loops {
            let control = "/dev/loop-control";
            let opened = fs::File::options().read(true).write(true).open(control);
            opened.map_err(|e| Fail::io(control, "open", &e).help("aquifer doctor    # says who may use it"))?;
        }
        Ok(())
    }
}

/// Open doors.
pub(super) struct Doors {
    server: Server,
    loops: Vec<LoopDevice>,
    fuse: Option<FuseDoor>,
    vhost: Option<VhostDoor>,
    served: Vec<MountedDisk>,
    private: Option<PathBuf>,
}

/// Where to reach a disk: the URI, or else the device, file or socket.
pub(super) fn address(served: &MountedDisk) -> String {
    let file = || {
        served
            .device
            .as_ref()
            .or(served.path.as_ref())
            .or(served.vhost_user.as_ref())
            .map(|path| path.display().to_string())
    };
    served.uri.clone().or_else(file).unwrap_or_default()
}

impl Doors {
    pub(super) fn open(place: &Place, disks: &[Arc<Disk>], scratch: &Scratch) -> Result<Self> {
        if let Some(folder) = &place.private {
            // A folder of an earlier process with our number holds at most a dead socket.
            let _ = fs::remove_dir_all(folder);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(|e| Fail::io(folder.display(), "create", &e))?;
        }
        let mut builder = Server::builder();
        for disk in disks {
            builder = builder.export(Export::new(disk.name(), disk.clone()));
        }
        if let Some(tls) = &place.tls {
            builder = builder.tls(tls.clone());
        }
        let server = builder.build()?;
        let private = place.private.clone();
        let mut doors = Self { server, loops: Vec::new(), fuse: None, vhost: None, served: Vec::new(), private };
        let address = place.nbd.as_ref().map(|nbd| doors.server.listen(nbd)).transpose()?;
        doors.fuse = place.fuse.as_deref().map(|dir| open_fuse(dir, disks)).transpose()?;
        doors.vhost = place.vhost_user.as_deref().map(|dir| open_vhost(dir, disks, scratch)).transpose()?;
        for disk in disks {
            let path = doors.fuse.as_ref().map(|door| door.path(disk.name()));
            let device = match (&path, place.loops) {
                (Some(path), true) => {
                    let access = if disk.is_writable() { LoopAccess::ReadWrite } else { LoopAccess::ReadOnly };
                    let device = LoopDevice::attach(path, access, SectorSize::default())?;
                    let shown = device.path().to_owned();
                    doors.loops.push(device);
                    Some(shown)
                }
                _ => None,
            };
            doors.served.push(MountedDisk {
                disk: disk.name().to_owned(),
                size: disk.size(),
                writable: disk.is_writable(),
                uri: address.as_ref().map(|address| address.with_export(disk.name()).to_string()),
                path,
                vhost_user: doors.vhost.as_ref().and_then(|door| door.path(disk.name())).map(Path::to_owned),
                device,
            });
        }
        Ok(doors)
    }

    /// The disks, in order.
    pub(super) fn served(&self) -> &[MountedDisk] {
        &self.served
    }

    /// Says where the doors are. Beside a command, stdout is the command's: then it is said on stderr.
    pub(super) fn announce(&self, context: &Context, beside_command: bool) {
        for served in &self.served {
            context.out.record("serving", served);
            let shown = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
            let places = [&served.path, &served.vhost_user, &served.device].map(shown);
            for shown in served.uri.iter().cloned().chain(places.into_iter().flatten()) {
                if beside_command {
                    context.out.say(&shown);
                } else {
                    context.out.line(&shown);
                }
            }
        }
        context.out.record("ready", &serde_json::json!({ "disks": self.served.len() }));
        if let (Some(first), false) = (self.served.first(), beside_command) {
            let only_vhost = first.uri.is_none() && first.path.is_none();
            match first.vhost_user.as_ref().filter(|_| only_vhost) {
                // What QEMU needs beside it: the guest's memory is shared, and the door may be away for a while.
                Some(socket) => context.out.next_now(&format!(
                    "qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G,share=on -machine q35,memory-backend=m \
                     -chardev {} -device vhost-user-blk-pci,chardev=d",
                    quoted(&format!("socket,id=d,path={},reconnect-ms=500", socket.display().to_string().replace(',', ",,")))
                )),
                None => context.out.next_now(&format!("qemu-img info {}", quoted(&address(first)))),
            }
        }
    }

    /// What happened so far, in a sentence.
    pub(super) fn sentence(&self) -> String {
        let stats = self.stats();
        format!(
            "{} connections, {} requests, {} read, {} written, {} errors",
            stats.open,
            stats.requests,
            units::bytes(stats.bytes_read),
            units::bytes(stats.bytes_written),
            stats.errors
        )
    }

    /// What the doors that count have done.
    fn stats(&self) -> nbd::Stats {
        let mut stats = self.server.stats();
        if let Some(vhost) = self.vhost.as_ref().map(VhostDoor::stats) {
            stats.open += vhost.open;
            stats.requests += vhost.requests;
            stats.bytes_read += vhost.bytes_read;
            stats.bytes_written += vhost.bytes_written;
            stats.errors += vhost.errors;
        }
        stats
    }

    /// Ends serving: requests in the air are answered first.
    pub(super) fn close(mut self, context: &Context) {
        for device in self.loops.drain(..) {
            let path = device.path().display().to_string();
            match device.detach() {
                Ok(Detached::Gone) => {}
                Ok(Detached::InUse) => {
                    context.out.say(format_args!("{path} is still mounted or open, and fails from now on"))
                }
                Err(error) => context.out.say(error),
            }
        }
        if let Some(Err(error)) = self.fuse.take().map(FuseDoor::stop) {
            context.out.say(format_args!("the folder could not be unmounted: {error}"));
        }
        self.server.stop();
        if self.vhost.as_ref().is_some_and(|vhost| !vhost.stop()) {
            context.out.say("a machine's requests did not end in time");
        }
        let stats = self.stats();
        context.out.closing("requests", stats.requests);
        context.out.closing("bytes_read", stats.bytes_read);
        context.out.closing("bytes_written", stats.bytes_written);
        context.out.closing("request_errors", stats.errors);
    }
}

fn open_vhost(dir: &Path, disks: &[Arc<Disk>], scratch: &Scratch) -> Result<VhostDoor> {
    let served = disks.iter().map(|disk| {
        let identity = scratch.identity(disk)?;
        Ok(VhostDisk { disk: Arc::clone(disk), identity })
    });
    Ok(VhostDoor::open(dir, served.collect::<Result<_>>()?)?)
}

fn open_fuse(dir: &Path, disks: &[Arc<Disk>]) -> Result<FuseDoor> {
    let dir = std::path::absolute(dir).map_err(|e| Fail::io(dir.display(), "find", &e))?;
    let writable = disks.iter().any(|disk| disk.is_writable());
    let access = if writable { MountAccess::ReadWrite } else { MountAccess::ReadOnly };
    let files = disks.iter().map(|disk| FuseFile { disk: Arc::clone(disk), raw: None }).collect();
    Ok(FuseDoor::open(&dir, FuseOptions { audience: Audience::Owner, access }, files)?)
}

impl Drop for Doors {
    fn drop(&mut self) {
        self.server.stop();
        if let Some(folder) = &self.private {
            // Only a dead socket can be left in it.
            let _ = fs::remove_dir_all(folder);
        }
    }
}
