//! One disk under one name.

use std::sync::Arc;

use aquifer_vdisk::{Delta, Disk};

use super::wire::{self, transmission as flag};

/// What a client may learn about changes: the ranges that differ, under a name.
#[derive(Clone, Debug)]
pub struct DirtyContext {
    name: String,
    delta: Arc<Delta>,
}

impl DirtyContext {
    /// `label` is a restore point's id or name; clients ask for `qemu:dirty-bitmap:LABEL`.
    pub fn new(label: &str, delta: Arc<Delta>) -> Self {
        Self { name: format!("{}{label}", wire::CONTEXT_DIRTY), delta }
    }

    /// The whole name, as clients ask for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ranges that differ.
    pub fn delta(&self) -> &Arc<Delta> {
        &self.delta
    }
}

/// One disk under one name, as a server offers it.
#[derive(Clone, Debug)]
pub struct Export {
    /// Name, at most 4096 bytes. A client that asks for the empty name gets the first export.
    pub name: String,
    /// The disk.
    pub disk: Arc<Disk>,
    /// Refuse writes even where the disk could take them.
    pub read_only: bool,
    /// Dirty contexts beside `base:allocation`.
    pub contexts: Vec<DirtyContext>,
    /// Text for people, shown by `nbdinfo`; may be empty.
    pub description: String,
}

impl Export {
    /// An export without dirty contexts, writable where the disk is.
    pub fn new(name: impl Into<String>, disk: Arc<Disk>) -> Self {
        let read_only = !disk.is_writable();
        Self { name: name.into(), disk, read_only, contexts: Vec::new(), description: String::new() }
    }

    /// Whether a client may write.
    pub fn is_writable(&self) -> bool {
        !self.read_only && self.disk.is_writable()
    }

    /// The transmission flags. Multi-conn is always true: [`Disk::flush`] covers every connection.
    pub(crate) fn flags(&self, structured: bool, extended: bool) -> u16 {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
        if self.is_writable() {
            flags |= flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO;
        } else {
            flags |= flag::READ_ONLY;
        }
        if structured || extended {
            flags |= flag::SEND_DF;
        }
        if extended {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}
