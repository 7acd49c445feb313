//! Whether the processor can run guests itself.
//!
//! A device node that opens proves nothing (nested virtualisation may refuse the guest's first instruction), so a
//! guest of 23 bytes is started and has to end with the number it was given.

use std::{
    fs::File,
    io::Write,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rustix::fs::{MemfdFlags, memfd_create};

use super::PROGRAM;

/// How long the small guest may take; real hardware needs a tenth of a second.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Written by the guest to the exit port; QEMU ends with `2 n + 1`.
const ANSWER: u8 = 0x10;

/// How instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// By the processor.
    Kvm,
    /// Translated: works everywhere, an order of magnitude slower.
    Tcg,
}

impl Accel {
    /// As QEMU and reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What works here.
pub(super) fn probe() -> Accel {
    let usable = File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if usable && kvm_runs_a_guest() { Accel::Kvm } else { Accel::Tcg }
}

fn kvm_runs_a_guest() -> bool {
    let Some(disk) = probe_disk() else { return false };
    let disk_node = "{\"driver\":\"raw\",\"node-name\":\"d\",\"read-only\":true,\
                     \"file\":{\"driver\":\"file\",\"filename\":\"/proc/self/fd/0\"}}";
    let child = Command::new(PROGRAM)
        .args(["-nodefaults", "-no-user-config", "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "16"])
        .args(["-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0xf4"])
        .args(["-blockdev", disk_node, "-device", "virtio-blk-pci,drive=d,bootindex=0"])
        .stdin(disk)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let deadline = Instant::now() + PROBE_TIMEOUT;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.code() == Some(2 * i32::from(ANSWER) + 1),
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Ok(None) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                return false;
            }
        }
    }
}

/// A disk in memory whose boot sector writes [`ANSWER`] to port 0xf4 and halts.
fn probe_disk() -> Option<File> {
    let mut sector = [0u8; 512];
    // mov dx, 0xf4; mov al, ANSWER; out dx, al; hlt; jmp $-1
    let code = [0xba, 0xf4, 0x00, 0xb0, ANSWER, 0xee, 0xf4, 0xeb, 0xfd];
    sector.get_mut(..code.len())?.copy_from_slice(&code);
    sector.get_mut(510..)?.copy_from_slice(&[0x55, 0xaa]);
    let mut file = File::from(memfd_create("aquifer-probe", MemfdFlags::CLOEXEC).ok()?);
    file.write_all(&sector).ok()?;
    file.set_len(1 << 20).ok()?;
    Some(file)
}
