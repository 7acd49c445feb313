//! Blocks by the library that the tool uses, where it is installed, and streams made of them.

use std::process::Command;

use super::*;

/// Packs each line of hexadecimal digits by LZO1X-1 (`lzop -3`, which Proxmox uses) and LZO1X-999 (`lzop -9`).
const PACK: &str = r"
import ctypes, sys
lzo = ctypes.CDLL('liblzo2.so.2')
for line in sys.stdin:
    raw = bytes.fromhex(line.strip())
    for name, work in (('lzo1x_1_compress', 1 << 19), ('lzo1x_999_compress', 1 << 20)):
        out = ctypes.create_string_buffer(len(raw) + len(raw) // 16 + 80)
        length = ctypes.c_size_t(len(out))
        memory = ctypes.create_string_buffer(work)
        assert getattr(lzo, name)(raw, ctypes.c_size_t(len(raw)), out, ctypes.byref(length), memory) == 0
        print(out.raw[:length.value].hex())
";

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn bytes_of(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).expect("digits")).collect()
}

/// Bytes that make copies near and far, short and long, and runs of literals of every kind.
fn samples() -> Vec<Vec<u8>> {
    let mut state = 7u32;
    let mut roll = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % below
    };
    let mut all = vec![vec![1], vec![2; 5], vec![0; 9000], (0..=255).collect()];
    for size in [20usize, 300, 5000, 70_000] {
        let mut bytes: Vec<u8> = Vec::new();
        while bytes.len() < size {
            let len = [1, 3, 18, 40, 300, 3000][roll(6) as usize];
            if roll(2) == 0 && !bytes.is_empty() {
                let from = bytes.len() - 1 - roll(u32::try_from(bytes.len().min(50_000)).expect("small")) as usize;
                for i in 0..len {
                    bytes.push(bytes[from + i]);
                }
            } else {
                bytes.extend((0..len).map(|_| roll(256).to_le_bytes()[0]));
            }
        }
        bytes.truncate(size);
        all.push(bytes);
    }
    all
}

/// What each sample is packed to, twice; `None` where the library is not installed.
fn packed(samples: &[Vec<u8>]) -> Option<Vec<Vec<u8>>> {
    use std::io::Write as _;
    let mut python = Command::new("python3");
    // Without looking for packages: that takes longer than all else here.
    python.args(["-I", "-S", "-c", PACK]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut python = python.stderr(std::process::Stdio::null()).spawn().expect("python3 runs");
    let mut to = python.stdin.take().expect("its input");
    let lines: String = samples.iter().map(|sample| hexadecimal(sample) + "\n").collect();
    // It may have ended already, without the library.
    let _ = to.write_all(lines.as_bytes());
    drop(to);
    let output = python.wait_with_output().expect("it ends");
    if !output.status.success() {
        eprintln!("liblzo2 is not installed: nothing was compared with it");
        return None;
    }
    Some(String::from_utf8(output.stdout).expect("text").lines().map(bytes_of).collect())
}

fn stream(blocks: &[(&[u8], &[u8])]) -> Vec<u8> {
    let flags = FLAG_ADLER_DECODED | FLAG_ADLER_STORED | FLAG_CRC_DECODED | FLAG_CRC_STORED;
    let mut header = vec![0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 1, 3];
    header.extend(flags.to_be_bytes());
    header.extend([0; 12]);
    header.extend([1, b'x']);
    let sum = adler32(&header);
    let mut out = [&MAGIC[..], &header, &sum.to_be_bytes()].concat();
    for (raw, packed) in blocks {
        let body = if packed.len() < raw.len() { packed } else { raw };
        out.extend(u32::try_from(raw.len()).expect("small").to_be_bytes());
        out.extend(u32::try_from(body.len()).expect("small").to_be_bytes());
        out.extend(adler32(raw).to_be_bytes());
        out.extend(crc32fast::hash(raw).to_be_bytes());
        if packed.len() < raw.len() {
            out.extend(adler32(body).to_be_bytes());
            out.extend(crc32fast::hash(body).to_be_bytes());
        }
        out.extend(*body);
    }
    out.extend([0; 4]);
    out
}

fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    Lzop::new(bytes)?.read_to_end(&mut out)?;
    Ok(out)
}

#[test]
fn what_the_library_packs_comes_out_again() {
    let samples = samples();
    let Some(packed) = packed(&samples) else { return };
    assert_eq!(packed.len(), 2 * samples.len());
    let mut out = Vec::new();
    for (raw, block) in samples.iter().flat_map(|raw| [raw, raw]).zip(&packed) {
        decode(block, raw.len(), &mut out).expect("decodes");
        assert!(out == *raw);
        assert!(decode(block, raw.len() + 1, &mut out).is_err() && decode(block, raw.len() - 1, &mut out).is_err());
        assert!(decode(&block[..block.len() - 1], raw.len(), &mut out).is_err());
    }
    let blocks: Vec<(&[u8], &[u8])> = samples.iter().zip(packed.chunks(2)).map(|(a, b)| (&a[..], &b[1][..])).collect();
    let whole = stream(&blocks);
    assert!(read(&whole).expect("reads") == samples.concat());
    for cut in (0..whole.len()).step_by(whole.len() / 24) {
        assert!(read(&whole[..cut]).is_err(), "cut at {cut}");
    }
    for flip in (MAGIC.len()..whole.len()).step_by(whole.len() / 24) {
        let mut torn = whole.clone();
        torn[flip] ^= 8;
        assert!(read(&torn).is_err(), "flipped at {flip}");
    }
}

#[test]
fn adler32_gives_its_published_value() {
    assert_eq!(adler32(b"Wikipedia"), 0x11E6_0398);
    assert_eq!(adler32(&[0xFF; 100_000]), {
        let (mut a, mut b) = (1u64, 0u64);
        for _ in 0..100_000 {
            a = (a + 255) % 65_521;
            b = (b + a) % 65_521;
        }
        u32::try_from(b << 16 | a).expect("32 bits")
    });
}

#[test]
fn any_bytes_end_with_an_answer() {
    let mut state = 1u32;
    let mut out = Vec::new();
    for round in 0..20_000u32 {
        let block: Vec<u8> = (0..round % 64)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            })
            .collect();
        let _ = decode(&block, 4096, &mut out);
        assert!(out.len() <= 4096);
    }
    // 255 more for each zero: a length of its own cannot outgrow what may come out.
    assert!(decode(&[&[0; 1 << 16][..], &[1]].concat(), 4096, &mut out).is_err());
}
