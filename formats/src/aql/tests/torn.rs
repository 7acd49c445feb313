//! Files cut off anywhere while being written: resumed, and salvaged.

use super::*;
use crate::Error;

const GRAIN: usize = 16 << 10;

fn small_waymarks() -> WriterOptions {
    WriterOptions { waymark_bytes: 60_000, ..options() }
}

/// A full and an increment on it, both unsealed: the bytes of their files, and of their disks.
struct Torn {
    chain: Chain,
    parent: Arc<Reader>,
    before: Vec<u8>,
    after: Vec<u8>,
    /// The increment's whole file, and where its root begins.
    file: Vec<u8>,
    root: u64,
}

fn torn() -> Torn {
    let mut chain = Chain::new();
    let before = pattern(21, GRAIN * 40);
    let parent = chain.full(&before, options());
    let mut after = before.clone();
    for block in (0..40).step_by(2) {
        after[block * GRAIN..(block + 1) * GRAIN].copy_from_slice(&pattern(100 + block as u64, GRAIN));
    }
    after[GRAIN * 7..GRAIN * 9].fill(0);
    let point = chain.increment(&parent, &after, small_waymarks());
    let mut file = vec![0; usize::try_from(point.file_bytes()).expect("small")];
    chain.storage(point.label()).read_at(0, &mut file).expect("read");
    let root = point.seal_info().root_a;
    Torn { chain, parent, before, after, file, root }
}

impl Torn {
    fn cut(&self, len: usize) -> Arc<dyn Storage> {
        Arc::new(MemoryStorage::new("torn.aql", self.file[..len].to_vec()))
    }

    fn parent(&self) -> Option<(Arc<Reader>, String)> {
        Some((Arc::clone(&self.parent), self.parent.label().to_owned()))
    }
}

/// Every cut near a boundary of a frame, and a spread of others.
fn cuts(torn: &Torn) -> Vec<usize> {
    let mut cuts: Vec<usize> = (4096..torn.file.len()).step_by(777).collect();
    let frames = torn.file.windows(4).enumerate().filter(|(_, w)| *w == b"AQF1").map(|(at, _)| at);
    cuts.extend(frames.flat_map(|at| [at - 1, at, at + 1, at + 63, at + 64, at + 65]));
    cuts.extend([4096, torn.file.len() - 8192, torn.file.len() - 4097, torn.file.len() - 1]);
    cuts.retain(|at| (4096..torn.file.len()).contains(at));
    cuts.sort_unstable();
    cuts.dedup();
    cuts
}

#[test]
fn a_writer_cut_off_anywhere_goes_on_and_writes_nothing_twice() {
    let torn = torn();
    let whole = Reader::open(torn.cut(torn.file.len()), torn.chain.resolver()).expect("open").stats();
    let mut kept = 0;
    for cut in cuts(&torn) {
        let storage = torn.cut(cut);
        let mut writer = Writer::resume(Arc::clone(&storage), torn.parent(), key(), small_waymarks())
            .unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
        let from = writer.resume_from();
        assert!(from <= 40);
        kept += from;
        // Only what follows the promised place is given again.
        let start = usize::try_from(from).expect("small") * GRAIN;
        if from < 40 {
            writer.put(from, &torn.after[start..]).expect("put");
        }
        let sealed = writer.finish().expect("finish");
        let reader = Reader::open(storage, torn.chain.resolver()).expect("open");
        assert_eq!(read_all(&reader), torn.after, "cut at {cut}, resumed from {from}");
        assert_eq!(reader.stats(), whole, "cut at {cut}: counted as if nothing had happened");
        assert_eq!(sealed.stats.blocks_written, reader.root().own.blocks, "cut at {cut}: every stored block is used");
        let damage: Vec<_> = verify(&reader, Depth::Deep(Some(key()))).flat_map(|f| f.damage).collect();
        assert!(damage.is_empty(), "cut at {cut}: {damage:?}");
        assert!(reader.file_bytes() < torn.file.len() as u64 + 5 * 8400, "cut at {cut}: {}", reader.file_bytes());
    }
    assert!(kept > 0, "waymarks were used");
}

#[test]
fn a_writer_cut_off_twice_goes_on_twice() {
    let torn = torn();
    let step = 4096 * 3 + 11;
    for cut in (8000..usize::try_from(torn.root).expect("small")).step_by(step) {
        let storage = torn.cut(cut);
        let mut writer = Writer::resume(Arc::clone(&storage), torn.parent(), key(), small_waymarks()).expect("resume");
        let from = usize::try_from(writer.resume_from()).expect("small");
        let until = (from + 8).min(40);
        writer.put(from as u64, &torn.after[from * GRAIN..until * GRAIN]).expect("put");
        drop(writer);
        let mut writer =
            Writer::resume(Arc::clone(&storage), torn.parent(), key(), small_waymarks()).expect("resume again");
        let from = usize::try_from(writer.resume_from()).expect("small");
        if from < 40 {
            writer.put(from as u64, &torn.after[from * GRAIN..]).expect("put");
        }
        writer.finish().expect("finish");
        let reader = Reader::open(storage, torn.chain.resolver()).expect("open");
        assert_eq!(read_all(&reader), torn.after, "cut at {cut}");
    }
}

#[test]
fn a_marked_writer_promises_all_it_was_given() {
    let chain = Chain::new();
    let bytes = pattern(9, GRAIN * 30);
    let storage = chain.storage("marked");
    let mut writer =
        Writer::create(Arc::clone(&storage), NewLayer::full(bytes.len() as u64, key()), options()).expect("create");
    writer.put(0, &bytes[..GRAIN * 20]).expect("put");
    writer.mark().expect("mark");
    writer.put(20, &bytes[GRAIN * 20..GRAIN * 25]).expect("put");
    drop(writer);
    let mut writer = Writer::resume(Arc::clone(&storage), None, key(), options()).expect("resume");
    assert_eq!(writer.resume_from(), 20);
    assert_eq!(writer.stats().blocks_given, 20);
    writer.put(20, &bytes[GRAIN * 20..]).expect("put");
    writer.finish().expect("finish");
    let reader = Reader::open(storage, Resolver::none()).expect("open");
    assert_eq!(read_all(&reader), bytes);
}

#[test]
fn a_shrunk_disk_keeps_what_its_last_block_was_given() {
    for size in [GRAIN * 2 + 100, 100] {
        let mut chain = Chain::new();
        let parent = chain.full(&vec![7; GRAIN * 4], options());
        let named = || Some((Arc::clone(&parent), parent.label().to_owned()));
        let mut new = NewLayer::increment(Arc::clone(&parent), parent.label(), key());
        new.virtual_size = size as u64;
        let mut writer = Writer::create(chain.storage("small"), new, options()).expect("create");
        writer.mark().expect("mark");
        drop(writer);
        let mut writer = Writer::resume(chain.storage("small"), named(), key(), options()).expect("resume");
        assert_eq!(writer.resume_from(), 0, "nothing was given");
        writer.put(0, &vec![8; size]).expect("put");
        writer.mark().expect("mark");
        drop(writer);
        let writer = Writer::resume(chain.storage("small"), named(), key(), options()).expect("resume");
        assert_eq!(writer.resume_from(), writer.blocks(), "all of it was given");
        writer.finish().expect("finish");
        assert_eq!(read_all(&chain.open("small").expect("open")), vec![8; size]);
    }
}

#[test]
fn a_shrunk_disk_that_is_gone_on_with_counts_its_parent_once_and_keeps_what_it_was_given() {
    let mut chain = Chain::new();
    let before = pattern(5, GRAIN * 40);
    let parent = chain.full(&before, options());
    let named = || Some((Arc::clone(&parent), parent.label().to_owned()));
    // More is cut off than is left of the parent: counted twice it would look as if nothing of it were needed.
    let mut after = before[..GRAIN * 22].to_vec();
    after[..GRAIN * 10].copy_from_slice(&pattern(6, GRAIN * 10));
    after[GRAIN * 12..GRAIN * 13].copy_from_slice(&pattern(7, GRAIN));
    let mut new = NewLayer::increment(Arc::clone(&parent), parent.label(), key());
    new.virtual_size = after.len() as u64;
    let mut writer = Writer::create(chain.storage("cut"), new, options()).expect("create");
    writer.put(0, &after[..GRAIN * 10]).expect("put");
    writer.mark().expect("mark");
    drop(writer);
    let mut writer = Writer::resume(chain.storage("cut"), named(), key(), options()).expect("resume");
    assert_eq!(writer.resume_from(), 10);
    writer.put(10, &after[GRAIN * 10..]).expect("put");
    writer.finish().expect("finish");
    let reader = chain.open("cut").expect("open");
    assert_eq!(read_all(&reader), after);
    let damage: Vec<_> = verify(&reader, Depth::Deep(Some(key()))).flat_map(|f| f.damage).collect();
    assert!(damage.is_empty(), "{damage:?}");
}

#[test]
fn a_writer_whose_storage_fails_at_any_call_says_so_stops_and_can_go_on() {
    let bytes = pattern(31, GRAIN * 60);
    for threads in [0, 2] {
        let options = WriterOptions { threads, waymark_bytes: 100_000, ..options() };
        let mut failures = 0;
        for writes in 0.. {
            let storage = Arc::new(support::Counted::failing_after(writes));
            let new = NewLayer::full(bytes.len() as u64, key());
            let write = |storage: Arc<dyn Storage>, new| -> crate::Result<()> {
                let mut writer = Writer::create(storage, new, options)?;
                for (k, part) in bytes.chunks(GRAIN * 4).enumerate() {
                    writer.put(k as u64 * 4, part)?;
                    // Small chunks, so that errors arise in the middle.
                    writer.keep(0..1)?;
                }
                writer.finish().map(|_| ())
            };
            let done = write(storage.clone(), new);
            storage.left.store(i64::MAX, std::sync::atomic::Ordering::SeqCst);
            let Err(e) = done else { break };
            failures += 1;
            assert!(matches!(&e, Error::Io { path, .. } if path == "failing.aql"), "{writes}: {e}");
            if storage.len().expect("length") < 4096 {
                continue;
            }
            if is_sealed(storage.as_ref()).expect("readable") {
                // The very last sync failed: nobody was told that it is finished, and it has to be looked at again.
                assert!(confirm_sealed(storage.as_ref()).expect("readable"));
                continue;
            }
            let mut writer = Writer::resume(storage.clone(), None, key(), options).expect("resume");
            let from = usize::try_from(writer.resume_from()).expect("small");
            if from < 60 {
                writer.put(from as u64, &bytes[from * GRAIN..]).expect("put");
            }
            writer.finish().expect("finish");
            assert_eq!(read_all(&Reader::open(storage, Resolver::none()).expect("open")), bytes, "{writes}");
        }
        assert!(failures > 10, "{failures} calls failed with {threads} threads");
    }
}

#[test]
fn a_sealed_file_whose_last_sync_is_in_doubt_is_looked_at_again() {
    let torn = torn();
    assert!(confirm_sealed(torn.cut(torn.file.len()).as_ref()).expect("whole"));
    let root = usize::try_from(torn.root).expect("small");
    let last_waymark = torn.file.windows(5).rposition(|w| w == b"AQF1\x04").expect("a waymark");
    for lost in (last_waymark + 200..root).step_by(4096) {
        let mut file = torn.file.clone();
        file[lost / 4096 * 4096..][..4096].fill(0);
        let storage = MemoryStorage::new("torn.aql", file);
        assert!(is_sealed(&storage).expect("its seal is there"));
        assert!(!confirm_sealed(&storage).expect("readable"), "page at {lost} never reached the disk");
    }
    for copy in [1, 2] {
        let mut file = torn.file.clone();
        let at = file.len() - copy * 4096 + 100;
        file[at] ^= 1;
        let storage = MemoryStorage::new("torn.aql", file);
        assert!(is_sealed(&storage).expect("one of two seals is whole"));
        assert!(!confirm_sealed(&storage).expect("readable"), "of two seals the last but {} is torn", copy - 1);
    }
}

#[test]
fn a_writer_after_a_failure_stays_failed() {
    let storage = Arc::new(support::Counted::failing_after(1));
    let mut writer =
        Writer::create(storage.clone(), NewLayer::full(GRAIN as u64 * 4, key()), options()).expect("create");
    assert!(writer.put(0, &pattern(1, GRAIN * 4)).and_then(|()| writer.mark()).is_err());
    storage.left.store(i64::MAX, std::sync::atomic::Ordering::SeqCst);
    assert!(matches!(writer.put(0, &[1; GRAIN]).and_then(|()| writer.mark()), Err(Error::Refused { .. })));
    assert!(writer.finish().is_err(), "the storage may work again; what it lost does not come back");
}

#[test]
fn what_must_not_be_resumed_is_refused() {
    let torn = torn();
    let sealed = torn.cut(torn.file.len());
    let resume = |storage, parent| Writer::resume(storage, parent, key(), options()).map(|_| ());
    assert!(matches!(resume(sealed, torn.parent()), Err(Error::Refused { .. })), "finished");
    assert!(matches!(resume(torn.cut(9000), None), Err(Error::Refused { .. })), "another parent");
    let other = Writer::resume(torn.cut(9000), torn.parent(), ContentKey::new([1; 32]), options());
    assert!(matches!(other, Err(Error::Refused { .. })), "another key");
    assert!(resume(torn.cut(4000), torn.parent()).is_err_and(|e| e.is_damage()), "no first page");
}

#[test]
fn a_torn_file_is_salvaged_without_one_wrong_byte() {
    let torn = torn();
    let mut complete = 0;
    for cut in cuts(&torn) {
        for unseen in [Unseen::Error, Unseen::Parent] {
            let found = salvage(torn.cut(cut), torn.parent(), torn.chain.resolver(), unseen)
                .unwrap_or_else(|e| panic!("cut at {cut}: {e}"));
            complete += u32::from(found.complete);
            assert!(found.frames_end <= cut as u64 && found.lost_blocks.is_empty());
            let mut out = vec![0; GRAIN];
            for block in 0..40 {
                let range = block * GRAIN..(block + 1) * GRAIN;
                match read_into(&found.reader, range.start as u64, &mut out) {
                    Ok(()) if unseen == Unseen::Error => {
                        assert_eq!(out, torn.after[range], "cut at {cut}, block {block}")
                    }
                    Ok(()) => {
                        let known = out == torn.after[range.clone()] || out == torn.before[range];
                        assert!(known, "cut at {cut}, block {block}");
                    }
                    Err(e) => assert!(unseen == Unseen::Error && e.is_damage(), "cut at {cut}, block {block}: {e}"),
                }
            }
            if found.complete {
                assert_eq!(read_all(&found.reader), torn.after, "cut at {cut}");
            }
        }
    }
    assert!(complete > 0, "with a whole root the point is complete");
}

#[test]
fn salvage_goes_on_after_a_damaged_block_and_names_it() {
    let torn = torn();
    let last = usize::try_from(torn.root).expect("small");
    // Without waymarks, so that everything is found by walking forward.
    let mut file = torn.file[..last].to_vec();
    let marks: Vec<usize> =
        file.windows(5).enumerate().filter(|(_, w)| *w == b"AQF1\x04").map(|(at, _)| at + 70).collect();
    assert!(!marks.is_empty());
    marks.iter().for_each(|at| file[*at] ^= 1);
    let first = file.windows(5).position(|w| w == b"AQF1\x01").expect("a block");
    file[first + 80] ^= 1;
    let storage = Arc::new(MemoryStorage::new("torn.aql", file));
    let found = salvage(storage, torn.parent(), torn.chain.resolver(), Unseen::Error).expect("salvage");
    assert_eq!(found.lost_blocks, vec![0]);
    let mut out = vec![0; GRAIN];
    assert!(read_into(&found.reader, 0, &mut out).is_err_and(|e| e.is_damage()));
    read_into(&found.reader, 2 * GRAIN as u64, &mut out).expect("the next one is whole");
    assert_eq!(out, torn.after[2 * GRAIN..3 * GRAIN]);
}

#[test]
fn a_layer_file_inside_a_stored_block_is_not_taken_for_frames() {
    let torn = torn();
    let chain = Chain::new();
    let mut bytes = torn.file.clone();
    bytes.resize(bytes.len().next_multiple_of(GRAIN), 0);
    let storage = chain.storage("outer");
    let raw = WriterOptions { compression: Compression::Raw, ..options() };
    let mut writer =
        Writer::create(Arc::clone(&storage), NewLayer::full(bytes.len() as u64, key()), raw).expect("create");
    writer.put(0, &bytes).expect("put");
    writer.mark().expect("mark");
    drop(writer);
    let writer = Writer::resume(Arc::clone(&storage), None, key(), raw).expect("resume");
    assert_eq!(writer.resume_from(), (bytes.len() / GRAIN) as u64);
    writer.finish().expect("finish");
    assert_eq!(read_all(&Reader::open(storage, Resolver::none()).expect("open")), bytes);
}
