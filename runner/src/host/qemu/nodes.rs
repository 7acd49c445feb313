//! The block nodes of a machine's disks: what they are, and how one is moved to another ground.
//!
//! ```text
//! device dev<n> -> disk<n> (raw, stays) -> door<n>  (nbd)      before
//!                                       -> local<n> (file)     after the pivot
//! ```

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{ORDER_TIMEOUT, Qmp, qmp};
use crate::host::{Attachment, Door, Error, ImageFormat, Pivot, Result};

/// Names of the nodes of disk number `index`: raw, door, local.
pub(super) fn names(index: usize) -> [String; 3] {
    [format!("disk{index}"), format!("door{index}"), format!("local{index}")]
}

/// Options of a door's node.
pub(super) fn door(node: &str, door: &Door) -> Value {
    json!({
        "driver": "nbd", "node-name": node, "export": door.export, "discard": "unmap",
        "server": { "type": "unix", "path": door.socket }, "reconnect-delay": door.reconnect_s,
    })
}

/// Options of the node a device sits on. A reopen sets whatever is left out back to its default, so both uses are here.
pub(super) fn raw(node: &str, on: &str) -> Value {
    json!({ "driver": "raw", "node-name": node, "file": on, "discard": "unmap" })
}

/// Options of the local file's node. The page cache stays in use: the door has just written the file through it, so it
/// is warm, and a sparse file reads and grows faster there; flushes reach the file system either way.
fn local(node: &str, file: &Path) -> Value {
    json!({
        "driver": "file", "node-name": node, "filename": file, "discard": "unmap",
        "cache": { "direct": false, "no-flush": false },
    })
}

/// Options of the node a device sits on where its disk is a local image.
pub(super) fn image(node: &str, file: &Path, format: ImageFormat) -> Value {
    json!({
        "driver": format.name(), "node-name": node, "discard": "unmap",
        "file": { "driver": "file", "filename": file, "discard": "unmap" },
    })
}

/// What a monitor says its nodes are.
#[derive(Debug)]
pub(super) struct Nodes(Vec<Value>);

impl Nodes {
    pub(super) fn query(orders: &mut Qmp) -> Result<Self> {
        match orders.execute("query-named-block-nodes", json!({ "flat": true }), ORDER_TIMEOUT)? {
            Value::Array(nodes) => Ok(Self(nodes)),
            other => Err(observed("query-named-block-nodes", "a list", &other.to_string())),
        }
    }

    fn node(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|node| node.get("node-name").and_then(Value::as_str) == Some(name))
    }

    fn text<'a>(&'a self, name: &str, field: &str) -> &'a str {
        self.node(name).and_then(|node| node.get(field)).and_then(Value::as_str).unwrap_or("nothing")
    }

    /// Whether every disk stands on what it was given.
    pub(super) fn check(&self, disks: &[Attachment]) -> Result<()> {
        for (index, disk) in disks.iter().enumerate() {
            let [raw, nbd, _] = names(index);
            let door = match disk {
                Attachment::Door(door) => door,
                Attachment::File { path, format } => {
                    if self.text(&raw, "drv") != format.name() {
                        return Err(observed(&raw, format.name(), self.text(&raw, "drv")));
                    }
                    let path = path.to_string_lossy();
                    if self.text(&raw, "file") != path {
                        return Err(observed(&raw, &path, self.text(&raw, "file")));
                    }
                    continue;
                }
            };
            for (node, driver) in [(&raw, "raw"), (&nbd, "nbd")] {
                if self.text(node, "drv") != driver {
                    return Err(observed(node, driver, self.text(node, "drv")));
                }
            }
            let socket = door.socket.to_string_lossy();
            if !self.text(&nbd, "file").contains(&*socket) {
                return Err(observed(&nbd, &socket, self.text(&nbd, "file")));
            }
        }
        Ok(())
    }
}

/// Moves disk number `index` to `file`.
pub(super) fn pivot(orders: &mut Qmp, index: usize, file: &Path, timeout: Duration) -> Result<Pivot> {
    let [raw_node, door_node, local_node] = names(index);
    let before = Nodes::query(orders)?;
    if before.node(&raw_node).is_none() {
        return Err(observed(&raw_node, "a node of that name", "none"));
    }
    let path = file.to_string_lossy();
    if before.text(&raw_node, "file") == path && before.text(&raw_node, "drv") == "raw" {
        // Moved by an earlier call that did not live to say so.
        forget(orders, &before, &door_node)?;
        return Ok(Pivot { pause_us: 0 });
    }
    forget(orders, &before, &local_node)?;
    orders.execute("blockdev-add", local(&local_node, file), ORDER_TIMEOUT)?;
    let moved = Instant::now();
    let reopened = orders.execute("blockdev-reopen", json!({ "options": [raw(&raw_node, &local_node)] }), timeout);
    let pause = moved.elapsed();
    if let Err(error) = reopened {
        if matches!(error, qmp::Error::Refused { .. }) {
            let _ = orders.execute("blockdev-del", json!({ "node-name": local_node }), ORDER_TIMEOUT);
        }
        return Err(error.into());
    }
    let after = Nodes::query(orders)?;
    if after.text(&raw_node, "file") != path {
        return Err(observed(&raw_node, &path, after.text(&raw_node, "file")));
    }
    forget(orders, &after, &door_node)?;
    Ok(Pivot { pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX) })
}

/// Takes a node away that nothing stands on.
fn forget(orders: &mut Qmp, nodes: &Nodes, name: &str) -> Result<()> {
    if nodes.node(name).is_some() {
        orders.execute("blockdev-del", json!({ "node-name": name }), ORDER_TIMEOUT)?;
    }
    Ok(())
}

pub(super) fn observed(what: &str, expected: &str, found: &str) -> Error {
    Error::Observed { what: what.to_owned(), expected: expected.to_owned(), found: found.to_owned() }
}
