//! What the writer leaves is an image that our own reader reads; `qemu-img` judges it in `runner/tests/replica`.

use super::*;
use crate::{Content, Layer, qcow2::Qcow2, storage::MemoryStorage};

const C: usize = 1 << CLUSTER_BITS;

fn read_back(storage: Arc<dyn Storage>) -> Vec<Content> {
    let image = Qcow2::open(storage).expect("an image");
    let layer = image.active(None).expect("its disk");
    let mut at = 0;
    let mut found = Vec::new();
    while at < layer.size() {
        let (content, n) = layer.lookup(at, CLUSTER_BYTES).expect("lookup");
        found.push(content);
        at += n;
    }
    found
}

#[test]
fn what_was_written_is_found_and_nothing_else() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("m", Vec::new()));
    let backing = BackingName { name: "base.qcow2".into(), format: "qcow2".into() };
    let size = 5 * CLUSTER_BYTES + 512;
    let image = NewQcow2::create(storage.clone(), size, Some(backing)).expect("create");
    image.write(CLUSTER_BYTES, &[1; 2 * C]).expect("write");
    image.write_zeros(3 * CLUSTER_BYTES, CLUSTER_BYTES).expect("zeros");
    image.write(5 * CLUSTER_BYTES, &[2; 512]).expect("the short end");
    assert!(image.write(512, &[0; 512]).is_err(), "no whole cluster");
    assert!(image.write(5 * CLUSTER_BYTES, &[0; C]).is_err(), "past the end");
    assert!(Qcow2::open(storage.clone()).is_err(), "not an image before it is whole");
    image.finish().expect("finish");
    let opened = Qcow2::open(storage.clone()).expect("an image");
    let named = opened.backing().expect("a backing file");
    assert_eq!((named.name.to_str(), named.format.as_deref()), (Some("base.qcow2"), Some("qcow2")));
    let found = read_back(storage);
    assert!(matches!(found[0], Content::Absent));
    assert!(matches!(found[1], Content::Plain { .. }) && matches!(found[2], Content::Plain { .. }));
    assert!(matches!(found[3], Content::Zero) && matches!(found[4], Content::Absent));
    assert!(matches!(found[5], Content::Plain { .. }));
}

#[test]
fn a_disk_that_ends_within_a_sector_keeps_its_last_bytes() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("m", Vec::new()));
    let image = NewQcow2::create(storage.clone(), CLUSTER_BYTES + 100, None).expect("create");
    image.write(CLUSTER_BYTES, &[7; 100]).expect("the short end");
    image.finish().expect("finish");
    let layer = Qcow2::open(storage.clone()).and_then(|q| q.active(None)).expect("an image");
    assert_eq!(layer.size(), CLUSTER_BYTES + 512);
    let Content::Plain { offset, .. } = layer.lookup(CLUSTER_BYTES, 512).expect("lookup").0 else { panic!("no bytes") };
    let mut end = [1; 512];
    storage.read_at(offset, &mut end).expect("read");
    assert_eq!((&end[..100], &end[100..]), ([7; 100].as_slice(), [0; 412].as_slice()));
}

#[test]
fn a_crash_goes_on_from_the_checkpoint() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("m", Vec::new()));
    let size = 8 * CLUSTER_BYTES;
    let image = NewQcow2::create(storage.clone(), size, None).expect("create");
    image.write(0, &[1; C]).expect("write");
    let (_, mut maps) = image.checkpoint().expect("checkpoint");
    image.write_zeros(CLUSTER_BYTES, CLUSTER_BYTES).expect("zeros");
    image.write(6 * CLUSTER_BYTES, &[6; C]).expect("write");
    let (at, more) = image.checkpoint().expect("checkpoint");
    maps.extend(more);
    image.write(7 * CLUSTER_BYTES, &[7; C]).expect("lost by the crash");
    drop(image);
    let image = NewQcow2::resume(storage.clone(), size, None, at, &maps).expect("resume");
    image.write(2 * CLUSTER_BYTES, &[2; C]).expect("write");
    image.finish().expect("finish");
    let layer = Qcow2::open(storage.clone()).and_then(|q| q.active(None)).expect("an image");
    for (cluster, byte) in [(0, Some(1)), (1, Some(0)), (2, Some(2)), (6, Some(6)), (7, None)] {
        match (layer.lookup(cluster * CLUSTER_BYTES, 1).expect("lookup").0, byte) {
            (Content::Plain { offset, .. }, Some(byte)) => {
                let mut got = [0];
                storage.read_at(offset, &mut got).expect("read");
                assert_eq!(got[0], byte, "cluster {cluster}");
            }
            (Content::Zero, Some(0)) | (Content::Absent, None) => {}
            other => panic!("cluster {cluster}: {other:?}"),
        }
    }
    for cut in 1..maps.len() % 16 + 16 {
        let torn = maps.get(..maps.len() - cut).unwrap_or_default();
        if !torn.len().is_multiple_of(16) {
            assert!(NewQcow2::resume(storage.clone(), size, None, at, torn).is_err());
        }
    }
    let mut wild = maps.clone();
    wild[8] = 0xff;
    wild[14] = 0xff;
    assert!(NewQcow2::resume(storage.clone(), size, None, at, &wild).is_err());
}
