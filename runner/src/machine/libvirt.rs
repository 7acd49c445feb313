//! A machine described by a libvirt domain's XML, as `virsh dumpxml` prints it.
//!
//! Invariants
//! - No document type is read, so entities cannot grow; the number of nodes is bounded.
//! - CD drives and floppies are no disks of the machine; what is not understood is left out.
//!
//! Not supported: templates with `<transient/>` disks, several domains in one file.

use roxmltree::{Document, Node, ParsingOptions};

use super::{DEVICES_MAX, Described, DescribedDisk, DescribedNic, FirmwareKind, mac_of, plain_name};
use crate::fail::{Code, Fail, Result};

/// Most nodes of a document; a domain with 64 disks and cards has about 3,000.
const NODES_MAX: u32 = 100_000;

pub(super) fn parse(label: &str, text: &str) -> Result<Described> {
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|error| {
        let place = format!("{label}:{}:{}", error.pos().row, error.pos().col);
        Fail::new(Code::Config, format!("{place}: not XML that is read here: {error}")).at(place)
    })?;
    let domain = document.root_element();
    let wrong = |node: Node<'_, '_>, what: String| {
        let pos = document.text_pos_at(node.range().start);
        let place = format!("{label}:{}:{}", pos.row, pos.col);
        Fail::new(Code::Config, format!("{place}: {what}")).at(place)
    };
    if domain.tag_name().name() != "domain" {
        return Err(wrong(domain, format!("<{}> is not a libvirt <domain>", domain.tag_name().name())));
    }
    let mut described = Described { name: text_of(domain, "name"), ..Described::default() };
    if let Some(node) = child(domain, "uuid") {
        let text = node.text().unwrap_or_default().trim();
        let uuid = uuid::Uuid::try_parse(text).map_err(|_| wrong(node, format!("`{text}` is not a UUID")))?;
        described.uuid = Some(uuid);
    }
    if let Some(node) = child(domain, "memory") {
        described.memory = Some(memory(node).ok_or_else(|| wrong(node, "not an amount of memory".into()))?);
    }
    if let Some(node) = child(domain, "vcpu") {
        let cpus = node.text().and_then(|text| text.trim().parse().ok()).filter(|cpus| (1..=4096).contains(cpus));
        described.cpus = Some(cpus.ok_or_else(|| wrong(node, "not a number of processors".into()))?);
    }
    if let Some(os) = child(domain, "os") {
        described.firmware = Some(firmware(os));
        described.nvram = text_of(os, "nvram");
        described.machine_type = child(os, "type").and_then(|kind| kind.attribute("machine")).map(str::to_owned);
    }
    let Some(devices) = child(domain, "devices") else { return Ok(described) };
    for node in devices.children().filter(|node| node.has_tag_name("disk")) {
        let Some(disk) = disk(node) else { continue };
        if let Err(what) = plain_name(&disk.name) {
            return Err(wrong(node, what));
        }
        if described.disks.iter().any(|known| known.name == disk.name) {
            return Err(wrong(node, format!("two disks are called `{}`", disk.name)));
        }
        described.disks.push(disk);
    }
    for node in devices.children().filter(|node| node.has_tag_name("interface")) {
        described.nics.push(nic(node));
    }
    if described.disks.len() > DEVICES_MAX || described.nics.len() > DEVICES_MAX {
        return Err(wrong(devices, format!("more than {DEVICES_MAX} disks or network cards")));
    }
    Ok(described)
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

fn text_of(node: Node<'_, '_>, name: &str) -> Option<String> {
    let text = child(node, name)?.text()?.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// libvirt's units; KiB where none is said.
fn memory(node: Node<'_, '_>) -> Option<u64> {
    let amount: u64 = node.text()?.trim().parse().ok()?;
    let scale = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1_000,
        "k" | "K" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    amount.checked_mul(scale).filter(|bytes| *bytes > 0)
}

/// UEFI where libvirt was asked for it, or where a flash image is loaded.
fn firmware(os: Node<'_, '_>) -> FirmwareKind {
    let asked = os.attribute("firmware") == Some("efi");
    let flash = child(os, "loader").is_some_and(|loader| {
        let path = loader.text().unwrap_or_default().to_ascii_lowercase();
        loader.attribute("type") == Some("pflash") || path.contains("ovmf") || path.contains("edk2")
    });
    if asked || flash { FirmwareKind::Uefi } else { FirmwareKind::Bios }
}

/// A disk with a name; `None` for drives of removable media.
fn disk(node: Node<'_, '_>) -> Option<DescribedDisk> {
    if !matches!(node.attribute("device"), None | Some("disk" | "lun")) {
        return None;
    }
    let target = child(node, "target")?;
    let source = child(node, "source").and_then(|source| {
        ["file", "dev", "volume", "name"].iter().find_map(|kind| source.attribute(*kind)).map(str::to_owned)
    });
    Some(DescribedDisk {
        name: target.attribute("dev")?.to_owned(),
        bus: target.attribute("bus").map(str::to_owned),
        source,
        boot_order: child(node, "boot").and_then(|boot| boot.attribute("order")?.parse().ok()),
    })
}

fn nic(node: Node<'_, '_>) -> DescribedNic {
    let source = child(node, "source");
    let network = source.and_then(|s| ["network", "bridge", "dev"].iter().find_map(|kind| s.attribute(*kind)));
    DescribedNic {
        mac: child(node, "mac").and_then(|mac| mac.attribute("address")).and_then(mac_of),
        model: child(node, "model").and_then(|model| model.attribute("type")).map(str::to_owned),
        network: network.map(str::to_owned),
    }
}
