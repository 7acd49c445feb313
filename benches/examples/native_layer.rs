//! Native layers from the outside: how fast a raw file becomes one, and how fast one is read.
//!
//! `native_layer write SOURCE OUT [THREADS] [LEVEL]`, `native_layer increment SOURCE PARENT OUT`,
//! `native_layer read LAYER [READS]`, `native_layer delta A B`, `native_layer giant FOLDER`,
//! `native_layer open LAYER`.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a measuring program")]

use std::{fs::File, os::unix::fs::FileExt, path::Path, sync::Arc, time::Instant};

use aquifer_formats::{
    Content, Layer,
    aql::{Compression, ContentKey, NewLayer, Reader, Writer, WriterOptions, delta},
};

fn key() -> ContentKey {
    ContentKey::new([7; 32])
}

fn copy(source: &File, size: u64, mut writer: Writer) {
    let start = Instant::now();
    let block = writer.block_bytes() as u64;
    let mut at = 0;
    while at < size {
        let len = usize::try_from((size - at).min(1 << 20)).unwrap();
        let mut buffer = writer.buffer();
        buffer.resize(len, 0);
        source.read_exact_at(&mut buffer, at).unwrap();
        writer.put_buffer(at / block, buffer).unwrap();
        at += len as u64;
    }
    let given = start.elapsed();
    let sealed = writer.finish().unwrap();
    let took = start.elapsed();
    println!(
        "{:.3} s ({:.3} s given), {:.0} MB/s, {} bytes of {size}, ratio {:.4}, {:?}",
        took.as_secs_f64(),
        given.as_secs_f64(),
        size as f64 / 1e6 / took.as_secs_f64(),
        sealed.file_bytes,
        sealed.file_bytes as f64 / size as f64,
        sealed.stats
    );
}

fn read(reader: &Reader, reads: u64) {
    let blocks = reader.size() / 4096;
    let mut state = 88_172_645_463_325_252u64;
    let mut out = Vec::new();
    let mut spent = Vec::new();
    for _ in 0..reads {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = state % blocks * 4096;
        let start = Instant::now();
        let (content, _) = reader.lookup(at, 4096).unwrap();
        if let Content::Packed { block, skip } = content {
            reader.unpack(&block, skip as usize + 4096, &mut out).unwrap();
            spent.push(start.elapsed().as_nanos());
        }
    }
    spent.sort_unstable();
    let at = |percent: usize| spent.get(spent.len() * percent / 100).map_or(0.0, |ns| *ns as f64 / 1e3);
    println!(
        "{} 4 KiB reads that decode: median {:.1} us, 90th {:.1} us, 99th {:.1} us",
        spent.len(),
        at(50),
        at(90),
        at(99)
    );
}

/// 1 TiB with a block in every leaf, and a hundred increments of one leaf in a hundred: what opening costs.
fn giant(folder: &Path) {
    let path = |k: u64| folder.join(format!("giant{k}.aql"));
    let (size, leaf) = (1u64 << 40, 256);
    let mut parent: Option<Arc<Reader>> = None;
    for k in 0..=100u64 {
        let new = match &parent {
            None => NewLayer::full(size, key()),
            Some(parent) => NewLayer::increment(Arc::clone(parent), format!("giant{}.aql", k - 1), key()),
        };
        let options = WriterOptions { dedupe_bytes: 0, ..WriterOptions::default() };
        let mut writer = Writer::create_file(&path(k), new, options).unwrap();
        let leaves = size / (65536 * leaf);
        for l in (0..leaves).filter(|l| k == 0 || l % 100 == k - 1) {
            let mut block = vec![0; 65536];
            block[..16].copy_from_slice(&[l.to_le_bytes(), (k + 1).to_le_bytes()].concat());
            writer.put(l * leaf, &block).unwrap();
        }
        writer.finish().unwrap();
        parent = Some(Arc::new(Reader::open_path(&path(k)).unwrap()));
    }
}

fn rss() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// First byte, memory, and lookups of a layer.
fn open(path: &Path) {
    let before = rss();
    let start = Instant::now();
    let reader = Reader::open_path(path).unwrap();
    let opened = start.elapsed();
    reader.check_layers().unwrap();
    let checked = start.elapsed();
    println!(
        "opened in {:.2} ms, {} older files identified after {:.2} ms, {} KiB resident",
        opened.as_secs_f64() * 1e3,
        reader.needed_layers().len(),
        checked.as_secs_f64() * 1e3,
        rss() - before
    );
    let blocks = reader.size() / 65536;
    for (name, span) in [("in one leaf", 256), ("in 1000 leaves", 256_000), ("anywhere", blocks)] {
        let mut at = 1u64;
        let rounds = 200_000u32;
        let start = Instant::now();
        for _ in 0..rounds {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::hint::black_box(reader.lookup((at >> 20) % span * 65536, 4096).unwrap());
        }
        println!("lookup {name}: {:.0} ns", start.elapsed().as_nanos() as f64 / f64::from(rounds));
    }
    println!("{} KiB resident after that", rss() - before);
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let arg = |i: usize| args.get(i).map(String::as_str);
    let number = |i: usize, default: u64| arg(i).map_or(default, |n| n.parse().unwrap());
    match (arg(1), arg(2), arg(3)) {
        (Some("write"), Some(source), Some(out)) => {
            let source = File::open(source).unwrap();
            let size = source.metadata().unwrap().len();
            let level = number(5, 1);
            let compression = Compression::Zstd(i32::try_from(level).unwrap());
            let threads = usize::try_from(number(4, 2)).unwrap();
            let options = WriterOptions { threads, compression, ..WriterOptions::default() };
            copy(&source, size, Writer::create_file(Path::new(out), NewLayer::full(size, key()), options).unwrap());
        }
        (Some("increment"), Some(source), Some(parent)) => {
            let source = File::open(source).unwrap();
            let size = source.metadata().unwrap().len();
            let start = Instant::now();
            let reader = Arc::new(Reader::open_path(Path::new(parent)).unwrap());
            let name = Path::new(parent).file_name().unwrap().to_string_lossy().into_owned();
            let new = NewLayer::increment(reader, name, key());
            let writer = Writer::create_file(Path::new(arg(4).unwrap()), new, WriterOptions::default()).unwrap();
            println!("opened in {:.3} s", start.elapsed().as_secs_f64());
            copy(&source, size, writer);
        }
        (Some("read"), Some(layer), _) => read(&Reader::open_path(Path::new(layer)).unwrap(), number(3, 20_000)),
        (Some("delta"), Some(a), Some(b)) => {
            let open = |path| Reader::open_path(Path::new(path)).unwrap();
            let (a, b) = (open(a), open(b));
            let start = Instant::now();
            let ranges = delta(&a, &b).unwrap();
            println!("{} ranges in {:.1} ms", ranges.len(), start.elapsed().as_secs_f64() * 1e3);
        }
        (Some("giant"), Some(folder), _) => giant(Path::new(folder)),
        (Some("open"), Some(layer), _) => open(Path::new(layer)),
        _ => println!(
            "write SOURCE OUT [THREADS] [LEVEL] | increment SOURCE PARENT OUT | read LAYER | delta A B | giant FOLDER | open LAYER"
        ),
    }
}
