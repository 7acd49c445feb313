//! Native layers from the outside: how fast a raw file becomes one, and how fast one is read.
//!
//! `native_layer write SOURCE OUT [THREADS] [LEVEL]`, `native_layer increment SOURCE PARENT OUT`,
//! `native_layer read LAYER [READS]`, `native_layer delta A B`.

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
    let at = |part: f64| spent.get((spent.len() as f64 * part) as usize).map_or(0.0, |ns| *ns as f64 / 1e3);
    println!(
        "{} 4 KiB reads that decode: median {:.1} us, 90th {:.1} us, 99th {:.1} us",
        spent.len(),
        at(0.5),
        at(0.9),
        at(0.99)
    );
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
        _ => println!("write SOURCE OUT [THREADS] [LEVEL] | increment SOURCE PARENT OUT | read LAYER | delta A B"),
    }
}
