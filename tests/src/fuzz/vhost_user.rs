//! Any bytes as a guest's memory with a ring in it, and as requests.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use aquifer_mount::vhost::{
    memory::{Memory, RegionSpec},
    request::{HEADER_LEN, Layout, Request, Rules},
    ring::{Addresses, CHAIN_MAX, Ring, Wakeups},
};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::machine::{descriptor, header, range};

/// Where things lie in the input: 16 places, two regions.
const ADDRESSES: Addresses = Addresses { descriptors: 0, available: 0x200, used: 0x300 };
const PLACES: u32 = 16;
const SPLIT: u64 = 0x1000;
const LEN: u64 = 0x2000;
const RULES: Rules = Rules { size: 1 << 30, writable: true };

/// Any bytes as a guest's memory: the ring is walked, each request is taken apart, and answered.
pub fn vhost_user(data: &[u8]) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory"));
    ftruncate(&file, LEN).expect("memory");
    let data = &data[..data.len().min(LEN as usize)];
    file.write_all_at(data, 0).expect("memory");
    let region = |from: u64, to: u64| RegionSpec { guest: from, user: from, len: to - from, file_offset: from };
    let again = file.try_clone().expect("a descriptor");
    let regions = vec![(region(0, SPLIT), file), (region(SPLIT, LEN), again)];
    let memory = Arc::new(Memory::map(regions).expect("two regions"));
    let wakeups = if data.first().is_some_and(|byte| byte & 1 == 1) { Wakeups::ByIndex } else { Wakeups::ByFlag };
    let mut ring = Ring::new(Arc::clone(&memory), ADDRESSES, PLACES, wakeups, 0).expect("a ring");
    let mut descriptors = Vec::new();
    let mut taken = 0;
    while let Ok(Some(head)) = ring.take() {
        taken += 1;
        assert!(taken <= PLACES, "more requests than places");
        let walked = ring.chain(head, &mut descriptors);
        assert!(descriptors.len() <= CHAIN_MAX);
        let layout = walked.ok().and_then(|()| Layout::of(&descriptors).ok());
        if let Some(layout) = &layout {
            one(&memory, layout);
        }
        ring.answer(head, u32::from(layout.is_some())).expect("the ring is in memory");
    }
    let _ = (ring.want_kicks(), ring.want_no_kicks(), ring.wants_interrupt());
}

fn one(memory: &Memory, layout: &Layout) {
    let sum = |spans: &[aquifer_mount::vhost::request::Span]| spans.iter().map(|s| u64::from(s.len)).sum::<u64>();
    assert_eq!((sum(&layout.output), sum(&layout.input)), (layout.output_len, layout.input_len));
    assert_eq!(sum(&layout.header), HEADER_LEN as u64);
    let mut header = [0; HEADER_LEN];
    if memory.gather(&layout.header, 0, &mut header).is_err() {
        return;
    }
    let Ok(request) = Request::parse(header, layout.output_len, layout.input_len, RULES) else { return };
    let mut data = vec![0; layout.output_len.min(4096) as usize];
    let copied = memory.gather(&layout.output, 0, &mut data).is_ok();
    match request {
        Request::Read { offset, len } => {
            assert!(offset + len <= RULES.size && len == layout.input_len);
            let some = vec![0x5a; len.min(4096) as usize];
            let _ = memory.scatter(&layout.input, len - some.len() as u64, &some);
        }
        Request::Write { offset, len } => assert!(offset + len <= RULES.size && len == layout.output_len),
        _ if copied => {
            for range in request.ranges(&data, RULES).into_iter().flatten() {
                assert!(range.offset + range.len <= RULES.size);
            }
        }
        _ => {}
    }
}

/// Memories of honest guests: requests of each kind, direct and in a table.
pub(super) fn vhost_user_seeds() -> Vec<Vec<u8>> {
    let kinds: [(u32, Vec<u8>, u32); 6] = [
        (0, Vec::new(), 512),
        (1, vec![7; 512], 0),
        (4, Vec::new(), 0),
        (8, Vec::new(), 20),
        (11, range(8, 8, 0), 0),
        (13, [range(8, 8, 1), range(64, 8, 0)].concat(), 0),
    ];
    [false, true].into_iter().map(|table| guest(&kinds, table)).collect()
}

fn guest(kinds: &[(u32, Vec<u8>, u32)], table: bool) -> Vec<u8> {
    let mut memory = vec![0; LEN as usize];
    let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
    let mut next = 0;
    for (number, (kind, output, input)) in kinds.iter().enumerate() {
        // The first one's data lies in both regions.
        let at = 0xff0 + 0x240 * number;
        put(at, &header(*kind, 8));
        put(at + 16, output);
        let mut pieces = vec![(at, 16 + output.len() as u32, 0), (at + 16, *input, 2), (at + 0x220, 1, 2)];
        pieces.retain(|(_, len, _)| *len > 0);
        let (head, count) = (next, pieces.len() as u16);
        let place = if table { 0x400 + 0x40 * number } else { 16 * usize::from(head) };
        let first = if table { 0 } else { head };
        for (index, (addr, len, flags)) in pieces.iter().enumerate() {
            let more = u16::from(index + 1 < pieces.len());
            put(place + 16 * index, &descriptor(*addr as u64, *len, flags | more, first + index as u16 + 1));
        }
        if table {
            put(16 * usize::from(head), &descriptor(place as u64, 16 * u32::from(count), 4, 0));
        }
        put(0x204 + 2 * number, &head.to_le_bytes());
        next += if table { 1 } else { count };
    }
    put(0x202, &(kinds.len() as u16).to_le_bytes());
    memory
}
