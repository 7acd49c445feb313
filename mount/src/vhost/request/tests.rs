//! Requests in any pieces mean the same, and hostile ones are refused.

use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules { size: 1 << 30, writable: true };

/// One buffer in pieces of these lengths.
fn pieces(addr: u64, len: u32, cuts: &[u32], writable: bool) -> Vec<Descriptor> {
    let (mut out, mut at) = (Vec::new(), 0);
    for cut in cuts.iter().chain([&u32::MAX]) {
        let n = (*cut).min(len - at);
        out.push(Descriptor { addr: addr + u64::from(at), len: n, writable });
        at += n;
    }
    out
}

/// Every address of some spans.
fn addresses(spans: &[Span]) -> Vec<u64> {
    spans.iter().flat_map(|span| span.addr..span.addr + u64::from(span.len)).collect()
}

proptest! {
    #[test]
    fn cuts_do_not_matter(
        output in 0u32..600,
        input in 0u32..600,
        cuts in prop::collection::vec(0u32..40, 0..20),
        more in prop::collection::vec(0u32..40, 0..20),
    ) {
        let mut all = pieces(1000, 16 + output, &cuts, false);
        all.extend(pieces(9000, input + 1, &more, true));
        let layout = Layout::of(&all).expect("a request");
        prop_assert_eq!(addresses(&layout.header), (1000..1016).collect::<Vec<_>>());
        prop_assert_eq!(addresses(&layout.output), (1016..1016 + u64::from(output)).collect::<Vec<_>>());
        prop_assert_eq!(addresses(&layout.input), (9000..9000 + u64::from(input)).collect::<Vec<_>>());
        prop_assert_eq!((layout.output_len, layout.input_len), (output.into(), input.into()));
        prop_assert_eq!(layout.status, 9000 + u64::from(input));
    }

    #[test]
    fn what_is_parsed_lies_inside_the_disk(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0u64..(1 << 21) + 8, any::<u64>()],
        (output, input) in (0u64..(1 << 33), 0u64..(1 << 33)),
    ) {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        match Request::parse(header, output, input, RULES) {
            Ok(Request::Read { offset, len } | Request::Write { offset, len }) => {
                prop_assert!(offset + len <= RULES.size && len % SECTOR == 0 && offset == sector * SECTOR);
            }
            Ok(Request::Discard { ranges } | Request::WriteZeroes { ranges }) => {
                prop_assert!(ranges > 0 && ranges <= RANGES_MAX && u64::from(ranges) * 16 == output);
            }
            Ok(_) | Err(Status::IoError | Status::Unsupported) => {}
            Err(Status::Ok) => prop_assert!(false, "a refusal that says it was done"),
        }
    }

    #[test]
    fn ranges_lie_inside_the_disk(data in prop::collection::vec(any::<u8>(), 0..600), discard: bool) {
        let ranges = u32::try_from(data.len() / RANGE_LEN).expect("few");
        let request = if discard { Request::Discard { ranges } } else { Request::WriteZeroes { ranges } };
        for range in request.ranges(&data, RULES).into_iter().flatten() {
            prop_assert!(range.offset + range.len <= RULES.size);
        }
    }
}

#[test]
fn what_is_no_request_is_told() {
    let at = |addr, len, writable| Descriptor { addr, len, writable };
    let whole = [at(0, 16, false), at(100, 1, true)];
    assert!(Layout::of(&whole).is_ok());
    for (descriptors, why) in [
        (vec![], Malformed::NoHeader),
        (vec![at(0, 15, false), at(100, 1, true)], Malformed::NoHeader),
        (vec![at(0, 16, false)], Malformed::NoStatus),
        (vec![at(0, 16, false), at(100, 0, true)], Malformed::NoStatus),
        (vec![at(0, 16, false), at(100, 1, true), at(50, 1, false)], Malformed::Order),
        (vec![at(0, 16, false), at(u64::MAX, 2, true)], Malformed::TooLong),
        (vec![at(0, u32::MAX, false), at(0, u32::MAX, true)], Malformed::TooLong),
    ] {
        assert_eq!(Layout::of(&descriptors), Err(why), "{descriptors:?}");
    }
}
