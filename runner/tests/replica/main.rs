//! Replicas, takeovers and the way home, against an oracle of bytes: every restore point and every disk is compared
//! whole at every stage, by our reader and by `qemu-img`.

#![allow(clippy::cast_possible_truncation, reason = "the numbers of a test are known to fit")]

mod fake;
mod model;
mod oracle;
#[path = "../../../tests/src/postgres.rs"]
#[allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "shared with the tests of the other rooms")]
mod postgres;
mod stage;
mod stuck;
mod touched;

use std::path::Path;

use aquifer_formats::{
    aql::WriterOptions,
    repo::{DiskName, DiskPlan, DiskWork, Transaction, record::Found},
};
use aquifer_runner::catalogue::{Catalogue, Fence, NewWork, Url};
use jiff::Timestamp;

/// A catalogue, with the lease everything is done under.
pub(crate) fn catalogue_of(dir: &Path) -> (Catalogue, Fence) {
    let url = if postgres::wanted() { postgres::Database::make().url() } else { Url::Sqlite(dir.join("catalogue.db")) };
    let catalogue = Catalogue::open(&url).expect("catalogue");
    let new = NewWork { run_at: Timestamp::now(), ..NewWork::new("test", "", 300, serde_json::Value::Null) };
    catalogue.enqueue(&new).expect("enqueue");
    let now = Timestamp::now().checked_add(jiff::Span::new().seconds(5)).expect("a time");
    let (_, fence) = catalogue.claim("test", &[], now).expect("claim").expect("work");
    (catalogue, fence)
}

/// Stores what differs from the parent.
pub(crate) fn write_point(transaction: &mut Transaction<'_>, disks: &stage::Disks) {
    for (name, bytes) in disks {
        let name = DiskName::new(name).expect("name");
        let options = WriterOptions { threads: 1, ..WriterOptions::default() };
        let full = transaction.parent().is_none();
        let plan = DiskPlan { size: bytes.len() as u64, sector_bytes: 512, full, options };
        if let DiskWork::Write(mut writer) = transaction.disk(&name, plan).expect("disk") {
            let block = writer.block_bytes();
            for (index, part) in (0u64..).zip(bytes.chunks(block)) {
                writer.put(index, part).expect("put");
            }
            writer.finish().expect("finish");
        }
        transaction.sealed(&name, Found::Comparison, "raw").expect("sealed");
    }
}
