//! Random chains against plain bytes.

use std::ops::Range;

use proptest::prelude::*;

use super::*;

const GRAIN: usize = 16 << 10;

/// One change of a disk.
#[derive(Clone, Debug)]
enum Change {
    /// New contents.
    Fill { at: usize, len: usize, seed: u64 },
    /// Zeros.
    Zero { at: usize, len: usize },
    /// A copy of other contents of the disk.
    Copy { from: usize, at: usize, len: usize },
}

/// How a point is given to the writer.
#[derive(Clone, Copy, Debug)]
enum Given {
    /// All blocks, in order.
    All,
    /// Changed blocks only, zeros as zeros.
    Changed,
    /// Changed blocks from the last to the first, some of them twice with other contents first.
    BackwardsTwice,
}

#[derive(Clone, Debug)]
struct Step {
    size: usize,
    changes: Vec<Change>,
    given: Given,
    options: WriterOptions,
    /// Files the disk may draw from.
    files: usize,
}

fn sizes() -> impl Strategy<Value = usize> {
    prop_oneof![1..GRAIN * 4, GRAIN * 3..GRAIN * 600, Just(GRAIN * 256), Just(GRAIN * 257 + 1), Just(GRAIN * 512 - 5)]
}

fn change() -> impl Strategy<Value = Change> {
    let place = || (0..GRAIN * 600, prop_oneof![1..500usize, GRAIN..GRAIN * 3, GRAIN * 40..GRAIN * 300]);
    prop_oneof![
        4 => (place(), any::<u64>()).prop_map(|((at, len), seed)| Change::Fill { at, len, seed }),
        1 => place().prop_map(|(at, len)| Change::Zero { at, len }),
        1 => (0..GRAIN * 600, place()).prop_map(|(from, (at, len))| Change::Copy {
            from: from / GRAIN * GRAIN,
            at: at / GRAIN * GRAIN,
            len,
        }),
    ]
}

fn writer_options() -> impl Strategy<Value = WriterOptions> {
    let compression = prop_oneof![
        3 => Just(Compression::Zstd(1)),
        1 => Just(Compression::Zstd(3)),
        1 => Just(Compression::Lz4),
        1 => Just(Compression::Raw),
    ];
    let waymark = prop_oneof![Just(30_000u64), Just(200_000), Just(1 << 30)];
    (14u8..17, compression, 0usize..3, prop_oneof![Just(0usize), Just(4000), Just(1 << 20)], waymark).prop_map(
        |(block_log2, compression, threads, dedupe_bytes, waymark_bytes)| WriterOptions {
            block_log2,
            compression,
            threads,
            dedupe_bytes,
            waymark_bytes,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let given = prop_oneof![Just(Given::All), Just(Given::Changed), Just(Given::BackwardsTwice)];
    let files = prop_oneof![Just(usize::MAX), 1..4usize];
    (sizes(), proptest::collection::vec(change(), 0..5), given, writer_options(), files)
        .prop_map(|(size, changes, given, options, files)| Step { size, changes, given, options, files })
}

fn apply(bytes: &mut [u8], change: &Change) {
    let end = bytes.len();
    let cut = |at: usize, len: usize| at.min(end)..at.saturating_add(len).min(end);
    match change {
        Change::Fill { at, len, seed } => {
            let range = cut(*at, *len);
            let new = pattern(*seed, range.len());
            bytes[range].copy_from_slice(&new);
        }
        Change::Zero { at, len } => bytes[cut(*at, *len)].fill(0),
        Change::Copy { from, at, len } => {
            let len = cut(*from, *len).len().min(cut(*at, *len).len());
            if len > 0 {
                bytes.copy_within(*from..*from + len, *at);
            }
        }
    }
}

fn blocks(len: usize, grain: usize) -> impl DoubleEndedIterator<Item = (u64, Range<usize>)> {
    (0..len.div_ceil(grain)).map(move |i| (i as u64, i * grain..((i + 1) * grain).min(len)))
}

fn old_block(before: &[u8], range: &Range<usize>) -> Vec<u8> {
    let mut old = vec![0; range.len()];
    if let Some(rest) = before.get(range.start..) {
        let n = rest.len().min(old.len());
        old[..n].copy_from_slice(&rest[..n]);
    }
    old
}

fn give(writer: &mut Writer, given: Given, before: &[u8], after: &[u8]) {
    let grain = writer.block_bytes();
    let changed = |range: &Range<usize>| old_block(before, range) != after[range.clone()];
    match given {
        Given::All => writer.put(0, after).expect("put"),
        Given::Changed => {
            for (block, range) in blocks(after.len(), grain) {
                if !changed(&range) {
                    writer.keep(block..block + 1).expect("keep");
                } else if after[range.clone()].iter().all(|b| *b == 0) {
                    writer.zero(block..block + 1).expect("zero");
                } else {
                    writer.put(block, &after[range]).expect("put");
                }
            }
        }
        Given::BackwardsTwice => {
            for (block, range) in blocks(after.len(), grain).rev() {
                if changed(&range) {
                    if block % 3 == 0 {
                        writer.put(block, &pattern(block, range.len())).expect("put");
                    }
                    if block % 5 == 0 {
                        writer.zero(block..block + 1).expect("zero");
                    }
                    writer.put(block, &after[range]).expect("put");
                } else if block % 7 == 0 {
                    // Something else first, and then what it was.
                    writer.put(block, &pattern(block + 1, range.len())).expect("put");
                    writer.put(block, &after[range]).expect("put");
                }
            }
        }
    }
}

/// Delta by bytes, at the granularity of blocks.
fn true_delta(a: &[u8], b: &[u8], grain: usize) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for (_, range) in blocks(b.len(), grain) {
        if old_block(a, &range) != b[range.clone()] {
            match out.last_mut() {
                Some(last) if last.end == range.start as u64 => last.end = range.end as u64,
                _ => out.push(range.start as u64..range.end as u64),
            }
        }
    }
    out
}

/// Exact, except for a last block that `b` cuts short: `a` may differ in the part that `b` does not have.
fn check_delta(found: &[Range<u64>], a: &[u8], b: &[u8], grain: usize) {
    let expected = true_delta(a, b, grain);
    let whole = (b.len() / grain * grain) as u64;
    if a.len() > b.len() && whole < b.len() as u64 && found != expected {
        let cut = |ranges: &[Range<u64>]| -> Vec<Range<u64>> {
            let cut = ranges.iter().map(|r| r.start.min(whole)..r.end.min(whole));
            cut.filter(|r| r.start < r.end).collect()
        };
        assert_eq!(cut(found), cut(&expected));
        assert_eq!(found.last().map(|r| r.end), Some(b.len() as u64));
    } else {
        assert_eq!(found, expected);
    }
}

fn check_counts(point: &Reader, bytes: &[u8]) {
    let grain = point.block_bytes() as usize;
    let data = blocks(bytes.len(), grain).filter(|(_, r)| bytes[r.clone()].iter().any(|b| *b != 0)).count() as u64;
    assert_eq!(point.stats().data_blocks, data);
    let older: u64 = point.needed_layers().iter().map(|l| l.live_blocks).sum();
    let used = |slot: u16| {
        (0..point.blocks())
            .filter(|b| matches!(point.entry(*b), Ok(entry::Entry::Data(at)) if at.place.slot == slot))
            .count()
    };
    assert_eq!(point.root().own.blocks, used(point.identity().slot) as u64);
    assert_eq!(point.root().own.blocks + older, data);
    for (slot, record) in &point.root().layers {
        assert_eq!(record.live.blocks, used(*slot) as u64);
        assert!(!record.live.is_empty(), "a file that nothing uses is not in the table");
    }
    let stats = point.stats();
    assert_eq!(
        stats.blocks_given,
        stats.blocks_zero + stats.blocks_unchanged + stats.blocks_shared + stats.blocks_written
    );
}

fn run(steps: &[Step], reads: &[(usize, usize)]) {
    let mut chain = Chain::new();
    let mut points: Vec<(Arc<Reader>, Vec<u8>)> = Vec::new();
    let mut bytes = Vec::new();
    for step in steps {
        let before = bytes.clone();
        bytes.resize(step.size, 0);
        step.changes.iter().for_each(|change| apply(&mut bytes, change));
        let new = |parent: Option<&Arc<Reader>>| match parent {
            None => NewLayer::full(step.size as u64, key()),
            Some(parent) => {
                let mut new = NewLayer::increment(Arc::clone(parent), parent.label(), key());
                new.virtual_size = step.size as u64;
                new
            }
        };
        let parent = points.last().map(|(reader, _)| reader);
        let early = step.size % 2 == 0;
        let reader = chain.point(new(parent), step.options, |writer| {
            if early {
                writer.absorb(step.files).expect("absorb");
            }
            give(writer, step.given, &before, &bytes);
            if !early {
                writer.absorb(step.files).expect("absorb");
            }
        });
        assert!(early || reader.needed_layers().len() <= step.files, "{:?}", reader.needed_layers());
        assert_eq!(read_all(&reader), bytes);
        points.push((reader, bytes.clone()));
    }
    for (point, bytes) in &points {
        assert_eq!(read_all(point), *bytes, "older points never change");
        check_counts(point, bytes);
        let damage: Vec<_> = verify(point, Depth::Deep(Some(key()))).flat_map(|f| f.damage).collect();
        assert!(damage.is_empty(), "{damage:?}");
        for (at, len) in reads {
            let at = at % bytes.len();
            let len = (*len).min(bytes.len() - at);
            let mut out = vec![0xEE; len];
            read_into(point, at as u64, &mut out).expect("read");
            assert_eq!(out, bytes[at..at + len]);
        }
    }
    for (a, a_bytes) in &points {
        for (b, b_bytes) in &points {
            check_delta(&delta(a, b).expect("delta"), a_bytes, b_bytes, b.block_bytes() as usize);
        }
    }
}

#[test]
fn random_chains_read_back_and_differ_as_their_bytes_do() {
    let strategy =
        (proptest::collection::vec(step(), 1..7), proptest::collection::vec((any::<usize>(), 1usize..200_000), 8));
    let mut config = ProptestConfig::with_cases(40 * scale());
    config.failure_persistence = None;
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let result = runner.run(&strategy, |(steps, reads)| {
        run(&steps, &reads);
        Ok(())
    });
    result.unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn two_hundred_increments_read_as_one_and_cost_two_hops() {
    let mut chain = Chain::new();
    let mut bytes = pattern(1, GRAIN * 300);
    let mut point = chain.full(&bytes, options());
    for k in 0..200usize {
        let at = (k * 79_193) % (GRAIN * 300 - 100);
        bytes[at..at + 100].fill(k.to_le_bytes()[0] | 1);
        point = chain.increment(&point, &bytes, options());
    }
    assert_eq!(read_all(&point), bytes);
    assert_eq!(point.identity().slot, 200);
    assert!(point.needed_layers().len() > 100);
    let again = chain.open(point.label()).expect("open");
    let mut out = [0; 10];
    let (reads, opened) = chain.count(|| read_into(&again, 5, &mut out).expect("read"));
    assert_eq!(out, bytes[5..15]);
    assert!(opened <= 2 && reads <= 2 + 2 * opened, "{reads} reads, {opened} files opened: leaf, block, their seals");
}

#[test]
fn an_endless_chain_draws_from_a_bounded_number_of_files_and_takes_slots_again() {
    let mut chain = Chain::new();
    let mut bytes = pattern(1, GRAIN * 20);
    let mut point = chain.full(&bytes, options());
    let mut before = point.seal_info().identity.slot;
    let mut wrapped = false;
    for k in 0..5000usize {
        let at = (k * 79_193) % (GRAIN * 20 - 8);
        bytes[at..at + 8].copy_from_slice(&k.to_le_bytes());
        let block = at / GRAIN;
        let new = NewLayer::increment(Arc::clone(&point), point.label(), key());
        let last = point;
        point = chain.point(new, WriterOptions { dedupe_bytes: 0, ..options() }, |writer| {
            for b in block..=(at + 7) / GRAIN {
                writer.put(b as u64, &bytes[b * GRAIN..(b + 1) * GRAIN]).expect("put");
            }
            writer.absorb(6).expect("absorb");
        });
        if k % 500 == 499 {
            assert_eq!(read_all(&point), bytes);
        }
        assert!(point.needed_layers().len() <= 6);
        wrapped |= point.identity().slot < before;
        before = point.identity().slot;
        // Files nobody needs any more may go; the newest two points stay readable.
        let needed = point.needed_layers();
        let mut files = chain.files.lock().expect("lock");
        files.retain(|name, _| name == point.label() || name == last.label() || needed.iter().any(|n| n.hint == *name));
    }
    assert!(wrapped, "more layers than slots");
    let damage: Vec<_> = verify(&point, Depth::Deep(Some(key()))).flat_map(|f| f.damage).collect();
    assert!(damage.is_empty(), "{damage:?}");
}
