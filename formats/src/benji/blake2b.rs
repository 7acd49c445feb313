//! BLAKE2b without a key (RFC 7693), of any digest length.

const IV: [u64; 8] = [
    0x6a09_e667_f3bc_c908,
    0xbb67_ae85_84ca_a73b,
    0x3c6e_f372_fe94_f82b,
    0xa54f_f53a_5f1d_36f1,
    0x510e_527f_ade6_82d1,
    0x9b05_688c_2b3e_6c1f,
    0x1f83_d9ab_fb41_bd6b,
    0x5be0_cd19_137e_2179,
];

const SIGMA: [[usize; 16]; 10] = [
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
    [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
    [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4],
    [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
    [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13],
    [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
    [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11],
    [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
    [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5],
    [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];

/// Bytes of a block.
const BLOCK: usize = 128;

#[expect(clippy::indexing_slicing, reason = "constants below sixteen")]
fn mix(v: &mut [u64; 16], [a, b, c, d]: [usize; 4], x: u64, y: u64) {
    v[a] = v[a].wrapping_add(v[b]).wrapping_add(x);
    v[d] = (v[d] ^ v[a]).rotate_right(32);
    v[c] = v[c].wrapping_add(v[d]);
    v[b] = (v[b] ^ v[c]).rotate_right(24);
    v[a] = v[a].wrapping_add(v[b]).wrapping_add(y);
    v[d] = (v[d] ^ v[a]).rotate_right(16);
    v[c] = v[c].wrapping_add(v[d]);
    v[b] = (v[b] ^ v[c]).rotate_right(63);
}

/// Columns, then diagonals.
const PLACES: [[usize; 4]; 8] = [
    [0, 4, 8, 12],
    [1, 5, 9, 13],
    [2, 6, 10, 14],
    [3, 7, 11, 15],
    [0, 5, 10, 15],
    [1, 6, 11, 12],
    [2, 7, 8, 13],
    [3, 4, 9, 14],
];

#[expect(clippy::indexing_slicing, reason = "constants below sixteen")]
fn compress(state: &mut [u64; 8], block: &[u8; BLOCK], count: u128, is_last: bool) {
    let mut words = [0; 16];
    for (word, bytes) in words.iter_mut().zip(block.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    let mut v = [0; 16];
    for (to, from) in v.iter_mut().zip(state.iter().chain(&IV)) {
        *to = *from;
    }
    v[12] ^= u64::try_from(count & u128::from(u64::MAX)).unwrap_or_default();
    v[13] ^= u64::try_from(count >> 64).unwrap_or_default();
    if is_last {
        v[14] = !v[14];
    }
    for sigma in SIGMA.iter().cycle().take(12) {
        for (place, pair) in PLACES.into_iter().zip(sigma.as_chunks::<2>().0) {
            mix(&mut v, place, words[pair[0]], words[pair[1]]);
        }
    }
    for (index, word) in state.iter_mut().enumerate() {
        *word ^= v[index] ^ v[index + 8];
    }
}

/// The digest of `bytes` in `len` bytes, of 1 to 64.
pub(super) fn blake2b(bytes: &[u8], len: u8) -> Vec<u8> {
    let mut state = IV;
    if let Some(first) = state.first_mut() {
        *first ^= 0x0101_0000 ^ u64::from(len);
    }
    // The last block is marked, be it whole or empty.
    let whole = bytes.len().saturating_sub(1) / BLOCK;
    let (head, rest) = bytes.split_at(whole * BLOCK);
    let mut count = 0u128;
    for block in head.as_chunks::<BLOCK>().0 {
        count += BLOCK as u128;
        compress(&mut state, block, count, false);
    }
    let mut last = [0; BLOCK];
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
    compress(&mut state, &last, bytes.len() as u128, true);
    state.iter().flat_map(|word| word.to_le_bytes()).take(len.into()).collect()
}
