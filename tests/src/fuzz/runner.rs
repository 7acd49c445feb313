//! What the runner and the door's control socket read: replies of a hypervisor, orders, descriptions, partition tables.

use std::{
    io::Write,
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::{raw::RawLayer, storage::MemoryStorage};
use aquifer_mount::session::control::{Request, Wire};
use aquifer_runner::{
    host::{
        partition::{Kinds, Table},
        qmp::Qmp,
    },
    machine::{DEVICES_MAX, Described},
};
use aquifer_vdisk::{BlockCache, Chain, Disk};
use serde_json::json;

use super::sparse;
use crate::mend;

/// Longest input of the targets over sockets: it waits in the socket's buffer as a whole.
const SOCKET_BYTES_MAX: usize = 128 << 10;

/// A connection on whose other end `data` was written, and nothing follows.
fn said(data: &[u8]) -> (UnixStream, UnixStream) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair of sockets");
    theirs.set_nonblocking(true).expect("a socket");
    theirs.write_all(&data[..data.len().min(SOCKET_BYTES_MAX)]).expect("the buffer of a socket takes it");
    theirs.shutdown(Shutdown::Write).expect("a socket");
    (ours, theirs)
}

/// Any bytes as what QEMU's monitor says: the greeting, events, replies to commands numbered from one.
pub fn qmp(data: &[u8]) {
    let (ours, _theirs) = said(data);
    let (place, patience) = (Path::new("fuzz"), Duration::from_secs(20));
    let begun = Instant::now();
    let Ok(mut qmp) = Qmp::over(ours, place, patience) else { return };
    for _ in 0..8 {
        if let Err(error) = qmp.execute("query-block", json!({}), patience) {
            assert!(error.to_string().len() < 4 * 700, "{error}");
        }
    }
    while let Ok(Some(event)) = qmp.event(Duration::ZERO) {
        assert!(event.name.chars().count() <= 64 && !event.name.contains(char::is_control), "{event:?}");
    }
    assert!(begun.elapsed() < patience, "waited for a peer that had ended");
}

/// Any bytes as orders to a door: what is understood can be said again.
pub fn control(data: &[u8]) {
    let (ours, _theirs) = said(data);
    let mut wire = Wire::answering(ours, Path::new("fuzz"));
    while let Ok(Some(request)) = wire.receive::<Request>() {
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        Wire::asking(near, Path::new("fuzz")).send(&request).expect("sent");
        let again = Wire::answering(far, Path::new("fuzz")).receive::<Request>().expect("what we write we read");
        // The last bit of a number with a point may be another one: no order has such, only arguments that nobody reads.
        if !has_float(&serde_json::to_value(&request).expect("json")) {
            assert_eq!(again, Some(request));
        }
    }
}

fn has_float(value: &serde_json::Value) -> bool {
    match value {
        serde_json::Value::Number(number) => number.is_f64(),
        serde_json::Value::Array(all) => all.iter().any(has_float),
        serde_json::Value::Object(all) => all.values().any(has_float),
        _ => false,
    }
}

/// Any bytes as the description of a machine, TOML or a libvirt domain.
pub fn machine(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for label in ["fuzz.toml", "fuzz.xml"] {
        let Ok(machine) = Described::parse(label, text) else { continue };
        assert!(machine.disks.len() <= DEVICES_MAX && machine.nics.len() <= DEVICES_MAX);
        assert!(machine.memory != Some(0) && machine.cpus.is_none_or(|cpus| (1..=4096).contains(&cpus)));
        let mut names: Vec<_> = machine.disks.iter().map(|disk| &disk.name).collect();
        names.sort();
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "two disks of one name: {names:?}");
        for mac in machine.nics.iter().filter_map(|nic| nic.mac.as_deref()) {
            let parts: Vec<_> = mac.split(':').collect();
            assert!(parts.len() == 6 && parts.iter().all(|part| part.len() == 2), "{mac}");
        }
    }
}

/// Any sectors as a disk whose partitions say which firmware it needs: as they are, and with a GPT's checksums made right.
pub fn partitions(data: &[u8]) {
    let mut file = sparse::unpack(data);
    read_table(file.clone());
    mend::gpt(&mut file);
    read_table(file);
}

fn read_table(file: Vec<u8>) {
    let Ok(layer) = RawLayer::open(Arc::new(MemoryStorage::new("fuzz", file))) else { return };
    let chain = Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(1 << 20))).expect("a chain");
    match Table::read(&Disk::read_only("fuzz", Arc::new(chain))).expect("memory reads") {
        Table::Mbr(kinds) => assert!(kinds.count <= 4 + 4 * 2 * 128 && !kinds.bios_boot, "{kinds:?}"),
        Table::Gpt(Kinds { esp, bios_boot, count }) => assert!(count <= 1024 && (count > 0 || !(esp || bios_boot))),
        Table::None | Table::Damaged(_) => {}
    }
}
