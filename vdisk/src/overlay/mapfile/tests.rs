//! Batches of pages that were interrupted, more than once.

use aquifer_formats::storage::MemoryStorage;

use super::{
    super::region::{BlockState, Line},
    *,
};

const OF: OverlayOf = OverlayOf { size: 4 << 20, chain: [3; 32] };

fn open(bytes: &[u8]) -> (Arc<dyn Storage>, MapFile, Vec<Line>) {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("map", bytes.to_vec()));
    let mut map = MapFile::open(storage.clone(), &OF).expect("open");
    let mut lines = Vec::new();
    map.load(&mut Vec::new(), &mut |_, line| lines.push(line)).expect("load");
    (storage, map, lines)
}

fn contents(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().expect("len")).expect("small")];
    storage.read_at(0, &mut bytes).expect("read");
    bytes
}

/// What a file holds after a batch that says that all of region 0 is in `state`.
fn after_batch(before: &[u8], state: BlockState) -> Vec<u8> {
    let (storage, mut map, _) = open(before);
    let line = |region| Line::uniform(if region == 0 { state } else { BlockState::Absent });
    map.store(1, &[0], &mut |region| line(region)).expect("store");
    contents(&*storage)
}

#[test]
fn an_image_of_an_interrupted_batch_never_passes_for_one_of_the_next() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("map", Vec::new()));
    MapFile::create(storage.clone(), &OF, [9; 16]).expect("create");
    let empty = contents(&*storage);
    let (list, image) = (narrow(LIST_AT)..narrow(IMAGES_AT), narrow(IMAGES_AT)..narrow(IMAGES_AT + PAGE));
    // Of the first batch only the image reached the disk, of the second only the list.
    let mut disk = empty.clone();
    disk[image.clone()].copy_from_slice(&after_batch(&empty, BlockState::Hydrated)[image]);
    let second = after_batch(&disk, BlockState::Written);
    disk[list.clone()].copy_from_slice(&second[list]);
    let (_, _, lines) = open(&disk);
    assert_eq!(lines, vec![], "neither batch was finished");
    assert_eq!(open(&second).2, vec![Line::uniform(BlockState::Written)]);
}

/// Found by fuzzing: a count at its end made the next one overflow.
#[test]
fn counts_that_nobody_reaches_are_damage() {
    let storage: Arc<dyn Storage> = Arc::new(MemoryStorage::new("map", Vec::new()));
    MapFile::create(storage.clone(), &OF, [9; 16]).expect("create");
    let good = after_batch(&contents(&*storage), BlockState::Written);
    let headers = |change: &dyn Fn(&mut MapHeader), copies: &[u64]| {
        let mut bytes = good.clone();
        for at in copies.iter().map(|copy| narrow(copy * PAGE)) {
            let (header, _) = MapHeader::mut_from_prefix(&mut bytes[at..]).expect("a header");
            change(header);
            header.crc = U32::new(header_crc(header));
        }
        bytes
    };
    for count in [SEQUENCE_END, u64::MAX] {
        for change in [|h: &mut MapHeader, n| h.sequence = U64::new(n), |h: &mut MapHeader, n| h.floor = U64::new(n)] {
            let change = |header: &mut MapHeader| change(header, count);
            let both = Arc::new(MemoryStorage::new("map", headers(&change, &[0, 1])));
            assert!(MapFile::open(both, &OF).is_err(), "{count} in both copies");
            let again = after_batch(&headers(&change, &[0]), BlockState::Hydrated);
            assert_eq!(open(&again).2, vec![Line::uniform(BlockState::Hydrated)], "{count} in one copy");
        }
        let mut image = good.clone();
        let (head, _) = MapPageHead::mut_from_prefix(&mut image[narrow(IMAGES_AT)..]).expect("a head");
        head.sequence = U64::new(count);
        assert_eq!(open(&after_batch(&image, BlockState::Trimmed)).2, vec![Line::uniform(BlockState::Trimmed)]);
    }
}

fn narrow(at: u64) -> usize {
    usize::try_from(at).expect("small")
}
