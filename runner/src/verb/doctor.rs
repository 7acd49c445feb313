//! `doctor`: what this machine can do, what it lacks, and the commands that repair it.
//!
//! Invariants
//! - Nothing is changed; a probe socket is made in a private folder and removed.
//! - Lacking comfort is a warning; only what makes every verb fail is a failure.

use std::{
    fs::{self, OpenOptions},
    os::unix::net::UnixListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use serde::Serialize;

use crate::{
    context::Context,
    fail::{Code, Result},
    units,
};

/// Options of `doctor`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print nothing that passes
    #[arg(long)]
    pub brief: bool,
}

/// Oldest QEMU whose `blockdev-reopen` and NBD reconnect are known to work here.
const QEMU_MIN: (u32, u32) = (7, 2);
/// Free space below which a recovery is likely to end with a full disk, bytes.
const SPACE_MIN: u64 = 2 << 30;
/// UEFI firmware images, in the order they are looked for.
const OVMF: [&str; 5] = [
    "/usr/share/OVMF/OVMF_CODE_4M.fd",
    "/usr/share/OVMF/OVMF_CODE.fd",
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.fd",
    "/usr/share/qemu/edk2-x86_64-code.fd",
];
/// Longest path a Unix socket address holds, bytes.
const SOCKET_PATH_MAX: usize = 107;

#[derive(Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    needed_for: Option<&'static str>,
    #[serde(rename = "do", skip_serializing_if = "Option::is_none")]
    do_: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, ok: true, found: found.into(), needed_for: None, do_: None }
    }

    fn bad(name: &'static str, found: impl Into<String>, needed_for: &'static str, do_: impl Into<String>) -> Self {
        Self { name, ok: false, found: found.into(), needed_for: Some(needed_for), do_: Some(do_.into()) }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let checks = [
        kvm(),
        fuse(),
        loop_devices(),
        qemu(context),
        qemu_tools(context),
        ovmf(),
        space(context),
        sockets(context),
        clock(),
    ];
    for check in &checks {
        context.out.record("check", check);
        if check.ok && !args.brief {
            context.out.line(format_args!("ok    {:<8} {}", check.name, check.found));
        }
        if let (false, Some(needed_for)) = (check.ok, check.needed_for) {
            context.out.line(format_args!("lacks {:<8} {}; needed for {needed_for}", check.name, check.found));
            let what = format!("{}: {}", check.name, check.found);
            context.out.warn(Code::WarnCheck, what, check.do_.as_deref());
        }
    }
    Ok(())
}

/// Whether a device node opens for reading and writing, as its users open it.
fn device(name: &'static str, path: &str, needed_for: &'static str, load: &str) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => Check::good(name, format!("{path} opens")),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let repair = match name {
                "kvm" => "sudo usermod -aG kvm $USER    # then log in again",
                "fuse" => "sudo chmod 666 /dev/fuse    # as udev does it",
                _ => "sudo usermod -aG disk $USER    # then log in again",
            };
            Check::bad(name, format!("{path}: access denied"), needed_for, repair)
        }
        Err(error) => Check::bad(name, format!("{path}: {}", crate::fail::errno_name(&error)), needed_for, load),
    }
}

fn kvm() -> Check {
    let load = "sudo modprobe kvm_intel || sudo modprobe kvm_amd    # and virtualisation on in the firmware setup";
    device("kvm", "/dev/kvm", "guests at full speed (without it they are emulated, slowly)", load)
}

fn fuse() -> Check {
    device("fuse", "/dev/fuse", "mount --fuse and --loop", "sudo modprobe fuse")
}

fn loop_devices() -> Check {
    let check = device("loop", "/dev/loop-control", "mount --loop", "sudo modprobe loop");
    match check.do_ {
        Some(repair) if repair.contains("usermod") => {
            Check::bad("loop", check.found, "mount --loop", "sudo -E aquifer mount SOURCE --loop")
        }
        do_ => Check { do_, ..check },
    }
}

fn qemu(context: &Context) -> Check {
    let needed = "recover --host qemu";
    let install = "sudo apt-get install qemu-system-x86    # 7.2 or newer";
    let Some(program) = context.find_program("qemu-system-x86_64") else {
        return Check::bad("qemu", "qemu-system-x86_64 is not in PATH", needed, install);
    };
    let output = Command::new(&program).arg("--version").output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    match version_in(&text) {
        Some(version) if version >= QEMU_MIN => {
            Check::good("qemu", format!("{} is version {}.{}", program.display(), version.0, version.1))
        }
        Some((major, minor)) => Check::bad("qemu", format!("version {major}.{minor} is too old"), needed, install),
        None => Check::bad("qemu", format!("{} does not say its version", program.display()), needed, install),
    }
}

/// `version 10.0.2` somewhere in a program's greeting.
fn version_in(text: &str) -> Option<(u32, u32)> {
    let (_, after) = text.split_once("version ")?;
    let mut numbers = after.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn qemu_tools(context: &Context) -> Check {
    let install = "sudo apt-get install qemu-utils";
    match context.find_program("qemu-img") {
        Some(path) => Check::good("tools", format!("{}", path.display())),
        None => Check::bad("tools", "qemu-img is not in PATH", "the recipes that look at a door with it", install),
    }
}

fn ovmf() -> Check {
    match OVMF.iter().find(|path| Path::new(path).is_file()) {
        Some(path) => Check::good("ovmf", *path),
        None => {
            Check::bad("ovmf", "no UEFI firmware image found", "guests that boot by UEFI", "sudo apt-get install ovmf")
        }
    }
}

/// The nearest folder that exists, at or above `path`.
fn existing_above(path: &Path) -> PathBuf {
    let found = path.ancestors().find(|p| p.is_dir());
    found.map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

fn space(context: &Context) -> Check {
    let home = match context.home() {
        Ok(home) => home,
        Err(fail) => return Check::bad("space", fail.what, "anything that keeps state", "export AQUIFER_HOME=DIR"),
    };
    let folder = existing_above(&home);
    match rustix::fs::statvfs(&folder) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{} free for {}", units::bytes(free), home.display());
            if free >= SPACE_MIN {
                Check::good("space", found)
            } else {
                Check::bad("space", found, "recoveries", "export AQUIFER_HOME=DIR    # on a larger disk")
            }
        }
        Err(error) => {
            let found = format!("{}: {}", folder.display(), crate::fail::errno_name(&error.into()));
            Check::bad("space", found, "recoveries", "export AQUIFER_HOME=DIR")
        }
    }
}

fn sockets(context: &Context) -> Check {
    let needed = "every NBD door on this machine";
    let repair = "export XDG_RUNTIME_DIR=/run/user/$(id -u)";
    let dir = match context.runtime_dir() {
        Ok(dir) => dir,
        Err(fail) => return Check::bad("sockets", fail.what, needed, repair),
    };
    let longest = dir.as_os_str().len() + "/00000000-0000-0000-0000-000000000000/nbd.sock".len();
    if longest > SOCKET_PATH_MAX {
        return Check::bad("sockets", format!("{} is too long for socket names", dir.display()), needed, repair);
    }
    let base = existing_above(&dir);
    let probe = base.join(format!(".aquifer-doctor-{}", std::process::id()));
    let bound = fs::create_dir(&probe).and_then(|()| UnixListener::bind(probe.join("s")).map(drop));
    // Nothing to report where the probe was never made.
    let _ = fs::remove_dir_all(&probe);
    match bound {
        Ok(()) => Check::good("sockets", format!("{} takes sockets", base.display())),
        Err(error) => {
            let found = format!("{}: {}", base.display(), crate::fail::errno_name(&error));
            Check::bad("sockets", found, needed, repair)
        }
    }
}

/// A clock that is behind the program's own file is certainly wrong; one that runs free drifts.
fn clock() -> Check {
    let repair = "sudo timedatectl set-ntp true";
    let needed = "points named by time, certificates";
    let built = std::env::current_exe().and_then(fs::metadata).and_then(|m| m.modified());
    let now = SystemTime::now();
    match built {
        Ok(built) if now + Duration::from_secs(86_400) < built => {
            Check::bad("clock", "the clock is behind the date of this program", needed, repair)
        }
        _ if now.duration_since(SystemTime::UNIX_EPOCH).is_err() => {
            Check::bad("clock", "the clock is before 1970", needed, repair)
        }
        _ => Check::good("clock", jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_greetings() {
        assert_eq!(version_in("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"), Some((10, 0)));
        assert_eq!(version_in("QEMU emulator version 7.2"), Some((7, 2)));
        assert_eq!(version_in("nonsense"), None);
    }
}
