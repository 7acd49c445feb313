//! `ova.xml`: the machine's objects, as nested structures of names and values.

use std::collections::HashMap;

use roxmltree::{Document, Node, ParsingOptions};

/// Most nodes of a document that is read.
const NODES_MAX: u32 = 1_000_000;

/// A disk of the export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Described {
    /// What members are named after: `Ref:11`.
    pub(super) reference: String,
    /// The device it is attached as, where that tells it from the others; else made of the reference.
    pub(super) name: String,
    /// Its size.
    pub(super) bytes: u64,
}

/// The disks that a description lists; the text says what is wrong with it.
pub(super) fn disks(bytes: &[u8]) -> Result<Vec<Described>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options).map_err(|e| e.to_string())?;
    let objects = document.descendants().filter(|node| node.has_tag_name("struct")).filter_map(object);
    let (mut found, mut devices): (Vec<Described>, HashMap<String, String>) = (Vec::new(), HashMap::new());
    for (class, id, snapshot) in objects {
        match class.as_str() {
            "VDI" => {
                let size = value_of(snapshot, "virtual_size").and_then(|size| size.parse::<u64>().ok());
                let size = size.filter(|size| *size > 0 && i64::try_from(*size).is_ok());
                let bytes = size.ok_or_else(|| format!("the disk {id} has no size"))?;
                if found.iter().any(|known| known.reference == id) {
                    return Err(format!("the disk {id} is described twice"));
                }
                found.push(Described { reference: id, name: String::new(), bytes });
            }
            "VBD" => {
                let device = value_of(snapshot, "device").filter(|device| !device.is_empty());
                if let (Some(disk), Some(device)) = (value_of(snapshot, "VDI"), device) {
                    devices.insert(disk, device);
                }
            }
            _ => {}
        }
    }
    for disk in &mut found {
        let device = devices.get(&disk.reference);
        let only = device.filter(|device| devices.values().filter(|other| other == device).count() == 1);
        disk.name = only.cloned().unwrap_or_else(|| disk.reference.replace(':', "_"));
    }
    Ok(found)
}

/// Class, id and the node of the snapshot of an object.
fn object<'a, 'd>(node: Node<'a, 'd>) -> Option<(String, String, Node<'a, 'd>)> {
    let snapshot = member(node, "snapshot")?;
    Some((value_of(node, "class")?, value_of(node, "id")?, snapshot.children().find(|n| n.has_tag_name("struct"))?))
}

/// The `value` of the member `name`.
fn member<'a, 'd>(node: Node<'a, 'd>, name: &str) -> Option<Node<'a, 'd>> {
    let members = node.children().filter(|child| child.has_tag_name("member"));
    let named = |member: &Node<'a, 'd>| {
        member.children().find(|n| n.has_tag_name("name")).and_then(|n| n.text()).is_some_and(|text| text == name)
    };
    members.into_iter().find(named)?.children().find(|n| n.has_tag_name("value"))
}

/// The text of that value, in whatever element of its own.
fn value_of(node: Node<'_, '_>, name: &str) -> Option<String> {
    let value = member(node, name)?;
    Some(value.descendants().filter(Node::is_text).filter_map(|n| n.text()).collect::<String>().trim().to_owned())
}
