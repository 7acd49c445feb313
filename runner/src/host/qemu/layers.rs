//! The layers of a living machine's disk: one more on top, or all written down into the lowest.
//!
//! Invariants
//! - What a disk stands on is asked of the device, not remembered: its node has another name after each change.
//! - Calls are made again after a death in their middle and find what was done.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{ORDER_TIMEOUT, Qmp, nodes::observed};
use crate::host::{Error, Result};

/// How often a job is looked at.
const TICK: Duration = Duration::from_millis(50);

/// How long the last step of a merge may take: requests in flight are finished first.
const LAST_TIMEOUT: Duration = Duration::from_secs(120);

/// Disks are as long as whole sectors.
const SECTOR_BYTES: u64 = 512;

/// What a device's disk stands on.
struct Stand {
    node: String,
    file: String,
    /// Bytes of the disk.
    size: u64,
}

fn stand(orders: &mut Qmp, index: usize) -> Result<Stand> {
    let device = format!("dev{index}");
    let answer = orders.execute("query-block", json!({}), ORDER_TIMEOUT)?;
    let all = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let ours = |entry: &&Value| {
        let qdev = entry.get("qdev").and_then(Value::as_str).unwrap_or_default();
        qdev == device || qdev.split('/').any(|part| part == device)
    };
    let inserted = all.iter().find(ours).and_then(|entry| entry.get("inserted"));
    let text = |key: &str| inserted.and_then(|i| i.get(key)).and_then(Value::as_str).map(str::to_owned);
    let (Some(node), Some(file)) = (text("node-name"), text("file")) else {
        return Err(observed(&device, "a device with a disk", "none"));
    };
    // A layer that was put on while the machine ran has the whole chain for its name; its file's own node has its path.
    let nodes = orders.execute("query-named-block-nodes", json!({ "flat": true }), ORDER_TIMEOUT)?;
    let own = file_node(&node);
    let all = nodes.as_array().map(Vec::as_slice).unwrap_or_default();
    let child = all.iter().find(|known| known.get("node-name").and_then(Value::as_str) == Some(&own));
    let path = child.and_then(|child| child.get("file")).and_then(Value::as_str);
    let size = inserted.and_then(|i| i.get("image")?.get("virtual-size")?.as_u64()).unwrap_or(0);
    Ok(Stand { file: path.map_or(file, str::to_owned), node, size })
}

/// Sees that a disk writes to `path`.
pub(super) fn stands_on(orders: &mut Qmp, index: usize, path: &Path) -> Result<()> {
    let stand = stand(orders, index)?;
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    if real(Path::new(&stand.file)) == real(path) {
        return Ok(());
    }
    Err(observed(&format!("disk {index} of the machine that runs already"), &path.to_string_lossy(), &stand.file))
}

/// The node of the file of a layer that we put on.
fn file_node(layer: &str) -> String {
    format!("{layer}-file")
}

/// Puts an empty layer on top.
pub(super) fn add(orders: &mut Qmp, index: usize, layer: &Path) -> Result<()> {
    let path = layer.to_string_lossy();
    let before = stand(orders, index)?;
    if before.file == path {
        return Ok(());
    }
    let stem = layer.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let node =
        format!("layer{index}-{}", stem.chars().filter(char::is_ascii_alphanumeric).take(16).collect::<String>());
    // Left by a call that died before it was used.
    let _ = orders.execute("blockdev-del", json!({ "node-name": node }), ORDER_TIMEOUT);
    let options = json!({
        "driver": "qcow2", "node-name": node, "discard": "unmap", "backing": null,
        "file": { "driver": "file", "node-name": file_node(&node), "filename": layer, "discard": "unmap" },
    });
    orders.execute("blockdev-add", options, ORDER_TIMEOUT)?;
    let moved = orders.execute("blockdev-snapshot", json!({ "node": before.node, "overlay": node }), ORDER_TIMEOUT);
    if let Err(error) = moved {
        let _ = orders.execute("blockdev-del", json!({ "node-name": node }), ORDER_TIMEOUT);
        return Err(error.into());
    }
    let after = stand(orders, index)?;
    if after.file == path { Ok(()) } else { Err(observed(&after.node, &path, &after.file)) }
}

/// Writes all layers down into the lowest one, and cuts that to the disk's size where it is longer.
pub(super) fn merge(orders: &mut Qmp, index: usize, base: &Path, size: u64) -> Result<()> {
    let id = format!("merge{index}");
    let path = base.to_string_lossy();
    let before = stand(orders, index)?;
    if before.file == path {
        return cut(orders, &before, size);
    }
    if job(orders, &id)?.is_none() {
        orders.execute("block-commit", json!({ "job-id": id, "device": before.node }), ORDER_TIMEOUT)?;
    }
    let mut completed: Option<Instant> = None;
    while let Some(status) = job(orders, &id)? {
        match (status.as_str(), completed) {
            ("ready", None) => {
                orders.execute("job-complete", json!({ "id": id }), ORDER_TIMEOUT)?;
                completed = Some(Instant::now());
            }
            (_, Some(since)) if since.elapsed() > LAST_TIMEOUT => {
                return Err(observed(&id, "an end", &status));
            }
            _ => std::thread::sleep(TICK),
        }
    }
    let after = stand(orders, index)?;
    if after.file != path {
        return Err(observed(&after.node, &path, &after.file));
    }
    cut(orders, &after, size)
}

/// Cuts off what an image has behind the end of its disk: the length of a layer that was larger.
fn cut(orders: &mut Qmp, image: &Stand, size: u64) -> Result<()> {
    let size = size.checked_next_multiple_of(SECTOR_BYTES).unwrap_or(u64::MAX);
    if image.size > size {
        orders.execute("block_resize", json!({ "node-name": image.node, "size": size }), LAST_TIMEOUT)?;
    }
    Ok(())
}

/// The status of a job, while there is one.
fn job(orders: &mut Qmp, id: &str) -> Result<Option<String>, Error> {
    let answer = orders.execute("query-jobs", json!({}), ORDER_TIMEOUT)?;
    let all = answer.as_array().map(Vec::as_slice).unwrap_or_default();
    let ours = all.iter().find(|job| job.get("id").and_then(Value::as_str) == Some(id));
    Ok(ours.and_then(|job| job.get("status")).and_then(Value::as_str).map(str::to_owned))
}
