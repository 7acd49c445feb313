//! Descriptions of machines, as people have them: TOML, or a libvirt domain's XML.
//!
//! Invariants
//! - A file is at most [`FILE_BYTES_MAX`] long, and everything in it is checked before it is believed.
//! - What a description does not say stays unsaid; defaults are the host's business.
//! - Paths in a description are never opened: they only tell which disk is which.
//!
//! Not here: how a description is stored with a point; how a machine is started from it.

mod libvirt;
mod plain;

use std::{fs, path::Path};

use crate::{
    fail::{Code, Fail, Result},
    strict,
};

/// Longest description that is read, bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// Most disks and most network cards of a machine.
pub const DEVICES_MAX: usize = 64;

/// What starts a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirmwareKind {
    /// A BIOS.
    Bios,
    /// UEFI.
    Uefi,
}

/// A machine, as somebody described it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub name: Option<String>,
    /// Its identity.
    pub uuid: Option<uuid::Uuid>,
    /// What starts it.
    pub firmware: Option<FirmwareKind>,
    /// The board, like `q35` or `pc-q35-7.2`.
    pub machine_type: Option<String>,
    /// The file its UEFI variables were in when the description was made.
    pub nvram: Option<String>,
    /// Number of processors.
    pub cpus: Option<u32>,
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// Its disks, in order.
    pub disks: Vec<DescribedDisk>,
    /// Its network cards, in order.
    pub nics: Vec<DescribedNic>,
}

/// A disk of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DescribedDisk {
    /// Its name, like `vda`.
    pub name: String,
    /// What it hangs on: `virtio`, `scsi`, `sata`, `nvme`, `ide`, `usb`.
    pub bus: Option<String>,
    /// Where its content was when the description was made.
    pub source: Option<String>,
    /// Place in the boot order, from 1.
    pub boot_order: Option<u32>,
}

/// A network card of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DescribedNic {
    /// Its address, `52:54:00:...` in small letters.
    pub mac: Option<String>,
    /// Its model, like `virtio`.
    pub model: Option<String>,
    /// The network or bridge it was plugged into.
    pub network: Option<String>,
}

impl Described {
    /// Reads a file of either form.
    ///
    /// # Errors
    /// [`Code::Config`] with every problem and its place; I/O.
    pub fn read(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let len = fs::metadata(path).map_err(|e| Fail::io(&label, "read", &e))?.len();
        if len > FILE_BYTES_MAX {
            let what = format!("{label} has {len} bytes; a machine's description has at most {FILE_BYTES_MAX}");
            return Err(Fail::new(Code::Config, what).at(label));
        }
        Self::parse(&label, &strict::text(path)?)
    }

    /// Reads a text of either form; `label` is for messages.
    pub fn parse(label: &str, text: &str) -> Result<Self> {
        let text = text.trim_start_matches('\u{feff}');
        if text.trim_start().starts_with('<') { libvirt::parse(label, text) } else { plain::parse(label, text) }
    }
}

/// Names of machines and disks: they become file and export names.
pub(crate) fn plain_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    match text.chars().all(plain) && !text.is_empty() && text.len() <= 64 && !text.starts_with('.') {
        true => Ok(text.to_owned()),
        false => Err(format!("`{text}` is not 1 to 64 of letters (a to z, A to Z), digits, `.`, `_`, `-`")),
    }
}

/// A hardware address in its usual form, where `text` is one.
fn mac_of(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split([':', '-']).collect();
    let good = parts.len() == 6 && parts.iter().all(|p| p.len() == 2 && p.chars().all(|c| c.is_ascii_hexdigit()));
    good.then(|| parts.join(":").to_ascii_lowercase())
}

#[cfg(test)]
mod tests;
