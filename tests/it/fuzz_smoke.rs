//! Promise: no bytes, however hostile, make a parser panic, hang or allocate beyond their own size.
//!
//! Each target gets mutated seeds for a few seconds, the same ones on every run. The work is done in
//! a child process whose address space is bounded, so that a large allocation is a failure and
//! not just a slow machine. The long fuzzing is libFuzzer's (`fuzz/`), with the same targets.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use aquifer_tests::{fuzz, ledger::Ledger, oracle::cases, qemu, rng::Rng};

/// Address space of the child: its threads and libraries take about a quarter.
const ADDRESS_SPACE: &str = "1073741824";
/// Longest that one input may take; the slowest takes milliseconds where nothing else runs.
const INPUT_TIME_MAX: Duration = Duration::from_secs(5);
/// Where the child finds its seeds; set only for the child.
const SEEDS: &str = "AQUIFER_FUZZ_SEEDS";

/// Runs the ignored test `child` of this module, bounded, with the seeds in `folder`.
fn run_bounded(child: &str, folder: &Path) {
    let done = Command::new("prlimit")
        .arg(format!("--as={ADDRESS_SPACE}"))
        .arg(env::current_exe().expect("this test binary"))
        .args(["--exact", "--ignored", "--test-threads=1", child])
        .env(SEEDS, folder)
        .output()
        .expect("prlimit runs");
    let said = [done.stdout, done.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(done.status.success() && said.contains("1 passed"), "{child}: {said}");
}

/// Feeds `target` mutations of every seed; what makes it panic or dawdle is kept.
fn mutate_and_run(target: fn(&[u8]), rounds: u32) {
    let ledger = Ledger::begin("fuzzing");
    let folder = PathBuf::from(env::var_os(SEEDS).expect("started by its parent test"));
    let mut seeds: Vec<_> = fs::read_dir(&folder).expect("seeds").map(|e| e.expect("a seed").path()).collect();
    seeds.sort();
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|path| fs::read(path).expect("a seed")).collect();
    let mut rng = Rng::new(42);
    for _ in 0..rounds {
        for seed in &seeds {
            let mut input = seed.clone();
            for _ in 0..=rng.below(6) {
                mutate(&mut input, &seeds, &mut rng);
            }
            let started = Instant::now();
            let outcome = std::panic::catch_unwind(|| target(&input));
            let took = started.elapsed();
            if outcome.is_err() || took > INPUT_TIME_MAX {
                let culprit = env::temp_dir().join("aquifer-fuzz-culprit");
                fs::write(&culprit, &input).expect("write");
                panic!("an input took {took:?} or panicked; it is in {}", culprit.display());
            }
        }
    }
    ledger.tell("42", &[("inputs", u64::from(rounds) * seeds.len() as u64)]);
}

/// One change of the kind that finds parsers' mistakes: fields near their limits, cuts, splices.
fn mutate(input: &mut Vec<u8>, seeds: &[Vec<u8>], rng: &mut Rng) {
    const WORDS: [u64; 14] = [
        0,
        1,
        0x7f,
        0xff,
        0x1ff,
        0x200,
        0xffff,
        0x1_0000,
        0xffff_ffff,
        1 << 62,
        1 << 63,
        (1 << 63) - 1,
        u64::MAX - 511,
        u64::MAX,
    ];
    if input.is_empty() {
        return;
    }
    // Headers matter most: half of the changes go to the first 256 bytes.
    let reach = if rng.once_in(2) { input.len().min(256) } else { input.len() };
    let at = usize::try_from(rng.below(reach as u64)).expect("an index");
    match rng.below(8) {
        0 => input[at] ^= 1 << rng.below(8),
        1 => input[at] = u8::try_from(rng.below(256)).expect("a byte"),
        2 | 3 => {
            let width = rng.pick(&[1, 2, 4, 8]);
            let at = at / width * width;
            let word = rng.pick(&WORDS).wrapping_add(rng.below(3)).wrapping_sub(1);
            let bytes = if rng.once_in(2) { word.to_be_bytes() } else { word.swap_bytes().to_be_bytes() };
            let bytes = if rng.once_in(2) { &bytes[8 - width..] } else { &bytes[..width] };
            let end = (at + width).min(input.len());
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        4 => input.truncate(at.max(1)),
        5 => {
            // A field of another place, an offset most likely, lands here.
            let from = usize::try_from(rng.below(input.len() as u64)).expect("an index") / 8 * 8;
            let at = at / 8 * 8;
            let len = 8.min(input.len() - from.max(at));
            input.copy_within(from..from + len, at);
        }
        6 => {
            let other = &seeds[usize::try_from(rng.below(seeds.len() as u64)).expect("an index")];
            let end = (at + 512).min(other.len()).min(input.len());
            if at < end {
                input[at..end].copy_from_slice(&other[at..end]);
            }
        }
        _ => {
            let end = (at + 64).min(input.len());
            let byte = rng.pick(&[0, 0xff]);
            input[at..end].fill(byte);
        }
    }
}

/// Small qcow2 images with everything in them that the driver reads.
fn qcow2_seeds(folder: &Path) {
    let path = folder.join("image");
    let image = qemu::text(&path);
    fs::write(folder.join("base"), [3; 512]).expect("write");
    let options = [
        "cluster_size=512",
        "cluster_size=512,compression_type=zstd",
        "cluster_size=1k,compat=0.10",
        "cluster_size=16k,extended_l2=on",
    ];
    for (number, options) in options.iter().enumerate() {
        qemu::img(&["create", "-q", "-f", "qcow2", "-u", "-b", "base", "-F", "raw", "-o", options, image, "200k"]);
        let fresh: Vec<String> = (0..3).map(|i| format!("write -c -P {i} {}k 16k", 16 * i)).collect();
        qemu::io_where_possible(&path, "qcow2", &fresh);
        qemu::img(&["snapshot", "-c", "first", image]);
        if !options.contains("0.10") {
            qemu::img(&["bitmap", "--add", "-g", "512", image, "bits"]);
        }
        qemu::io_where_possible(&path, "qcow2", &["write -P 5 100k 5k".into(), "write -z 120k 20k".into()]);
        fs::rename(&path, folder.join(format!("seed{number}"))).expect("rename");
    }
    qemu::img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &format!("data_file={image}.data,cluster_size=512"),
        image,
        "64k",
    ]);
    for gone in ["image.data", "base"] {
        fs::remove_file(folder.join(gone)).expect("remove");
    }
    fs::rename(&path, folder.join("seed9")).expect("rename");
}

/// Small VMware disks of every kind that holds tables, with and without their descriptors.
fn vmdk_seeds(folder: &Path) {
    use aquifer_tests::foreign::vmdk::{Extent, Grain, descriptor};
    let data = |byte: u8, sectors: usize| Grain::Data(vec![byte; 512 * sectors]);
    let extent = |grain: u64| Extent {
        capacity: 400,
        grain,
        grains: [(0, data(1, grain as usize)), (2, Grain::Zero), (3, data(2, grain as usize))].into(),
    };
    let text = |kind: &str| descriptor(kind, 1, Some((1, "p")), &["RW 400 SPARSE \"e\"".into()]);
    let seeds = [
        extent(8).hosted(&text("monolithicSparse")),
        extent(8).stream(&text("streamOptimized")),
        extent(8).hosted(""),
        extent(1).cowd(),
        extent(8).sesparse(),
        descriptor("custom", 1, None, &["RW 8 FLAT \"f\" 0".into(), "RW 9 ZERO".into()]).into_bytes(),
    ];
    for (number, seed) in seeds.iter().enumerate() {
        fs::write(folder.join(number.to_string()), seed).expect("write");
    }
}

/// Small disks of both generations and of VirtualBox, with and without a parent.
fn hyperv_seeds(folder: &Path) {
    use aquifer_tests::foreign::hyperv::{Sectors, VhdChild, VhdxChild};
    let sectors: Sectors = [(0, [1; 512]), (9, [2; 512])].into();
    let (id, parent, paths) = ([1; 16], [2; 16], &[("relative_path", ".\\p.vhdx")][..]);
    let (size, block) = (1 << 20, 1 << 20);
    let child = VhdxChild { id, parent, paths, size, block, sectors: &sectors, zero_blocks: &[] };
    fs::write(folder.join("0"), child.bytes()).expect("write");
    let mut logged = child.bytes();
    logged[0x1_0030..0x1_0040].fill(9);
    let mut entry = vec![0; 8192];
    for (at, bytes) in [
        (0, &b"loge"[..]),
        (8, &8192u32.to_le_bytes()),
        (16, &1u64.to_le_bytes()),
        (24, &1u32.to_le_bytes()),
        (32, &[9; 16]),
        (64, b"desc"),
        (80, &(3u64 << 20).to_le_bytes()),
        (88, &1u64.to_le_bytes()),
        (4096, b"data"),
        (8188, &1u32.to_le_bytes()),
    ] {
        entry[at..at + bytes.len()].copy_from_slice(bytes);
    }
    logged[1 << 20..(1 << 20) + 8192].copy_from_slice(&entry);
    fs::write(folder.join("1"), logged).expect("write");
    let child = VhdChild { id, parent, relative: ".\\p.vhd", size: 4096 * 512, sectors: &sectors };
    fs::write(folder.join("2"), child.bytes()).expect("write");
    for (name, format, options) in
        [("3", "vhdx", "block_size=1M"), ("4", "vpc", "force_size=on"), ("5", "vdi", "static=off")]
    {
        let path = folder.join(name);
        qemu::img(&["create", "-q", "-f", format, "-o", options, qemu::text(&path), "1M"]);
    }
}

/// Blocks in every encoding, behind the three bytes that say how to ask for them.
fn codec_seeds(folder: &Path) {
    let raw: Vec<u8> = (0..40_000u32).flat_map(|i| (i / 3).to_le_bytes()).take(64 << 10).collect();
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut deflate, &raw).expect("memory");
    let mut flushed = zstd::stream::write::Encoder::new(Vec::new(), 3).expect("encoder");
    for part in raw.chunks(16 << 10) {
        std::io::Write::write_all(&mut flushed, part).expect("memory");
        std::io::Write::flush(&mut flushed).expect("memory");
    }
    let encoded = [
        (0, raw.clone()),
        (1, lz4_flex::block::compress(&raw)),
        (2, zstd::bulk::compress(&raw, 3).expect("memory")),
        (2, flushed.finish().expect("memory")),
        (3, deflate.finish().expect("memory")),
    ];
    for (number, (how, stored)) in encoded.iter().enumerate() {
        // 64 KiB is 256 << 8.
        fs::write(folder.join(number.to_string()), [&[*how, 100, 8], &stored[..]].concat()).expect("write");
    }
}

/// Small native layers: one and two leaves, several codecs, shared blocks, waymarks.
fn aql_seeds(folder: &Path) {
    use aquifer_formats::aql::{Compression, ContentKey, NewLayer, Writer, WriterOptions};
    let ways = [Compression::Zstd(1), Compression::Lz4, Compression::Raw];
    for (number, compression) in ways.into_iter().enumerate() {
        let options =
            WriterOptions { block_log2: 14, compression, threads: 0, waymark_bytes: 9000, ..WriterOptions::default() };
        let size = if number == 1 { 300 << 14 } else { 50_000 };
        let new = NewLayer::full(size, ContentKey::new([7; 32]));
        let path = folder.join(format!("layer{number}"));
        let mut writer = Writer::create_file(&path, new, options).expect("create");
        let words: Vec<u8> = (0..40_000u32).flat_map(|i| (i / 7).to_le_bytes()).take(3 << 14).collect();
        writer.put(0, &words).expect("put");
        if number == 1 {
            writer.put(280, &words[..1 << 14]).expect("put");
        }
        writer.finish().expect("finish");
    }
}

/// One record of each kind, behind the byte that says which.
fn record_seeds(folder: &Path) {
    let id = "0190a000-0000-7000-8000-000000000001";
    let hash = "ab".repeat(32);
    let owner = format!(r#"{{"id":"{id}","name":"me"}}"#);
    let holder = r#"{"name":"n","host":"h","process":1,"session":"s"}"#;
    let time = "2026-01-01T00:00:00Z";
    let records = [
        format!(
            r#""schema":"aquifer.point.v1","id":"{id}","receipt":3,"created":"{time}","kind":"increment","parent":"{id}",
            "consistency":"crash","machine":{{"name":"m","uuid":"{id}","firmware":"uefi","machine_type":"q35","cpus":2,
            "memory_bytes":4294967296,"disks":[{{"name":"vda","size":5,"bus":"virtio","boot_order":1}}],
            "nics":[{{"mac":"52:54:00:00:00:01","network":"n","model":"virtio"}}]}},
            "disks":[{{"name":"vda","size":5,"layer":"{id}","seal":"{hash}","file_bytes":12288,"stored_bytes":1,
            "data_bytes":1,"found":{{"by":"bitmap","name":"b"}},"source_format":"raw",
            "needs":[{{"point":"{id}","disk":"vda","layer":"{id}","seal":"{hash}","file_bytes":1}}]}}]"#
        ),
        format!(
            r#""schema":"aquifer.manifest.v1","machine":"{id}","generation":2,"previous":"{hash}","writer":{owner},
            "written":"{time}","name":"m","aliases":["n"],
            "points":[{{"id":"{id}","receipt":1,"record":"{hash}","retained":true,"damaged":"why","pinned":true}}]"#
        ),
        format!(
            r#""schema":"aquifer.repository.v1","id":"{id}","created":"{time}","content_key":"{hash}","owner":{owner},
            "defaults":{{"block_bytes":65536,"compression":"zstd-1"}}"#
        ),
        format!(
            r#""schema":"aquifer.lease.v1","id":"{id}","kind":"read","machine":"{id}","point":"{id}","generation":1,
            "holder":{holder},"since":"{time}","beat":9"#
        ),
        format!(r#""schema":"aquifer.begin.v1","id":"{id}","begun":"{time}","parent":null,"holder":{holder}"#),
        format!(r#""schema":"aquifer.machine.v1","id":"{id}","name":"m","created":"{time}""#),
        format!(r#""schema":"aquifer.owner.v1","number":1,"owner":{owner},"since":"{time}""#),
    ];
    for (which, body) in (0u8..).zip(records) {
        let text = format!("{{{body}}}");
        if which == 0 {
            use aquifer_formats::repo::record::{PointRecord, decode};
            decode::<PointRecord>("seed", text.as_bytes()).expect("seeds are valid");
        }
        let seed = [&[which], text.as_bytes()].concat();
        fs::write(folder.join(which.to_string()), &seed).expect("write");
    }
}

/// Whole sessions of clients, behind the byte that says how the server is set up.
fn nbd_server_seeds(folder: &Path) {
    use aquifer_mount::nbd::{
        negotiate::Mode,
        request::Request,
        wire::{self, command as cmd, command_flag as flag, option as opt},
    };
    let option = |number: u32, data: &[u8]| {
        let fields = [number.to_be_bytes(), u32::try_from(data.len()).expect("short").to_be_bytes()].concat();
        [&wire::MAGIC_OPTION.to_be_bytes()[..], &fields, data].concat()
    };
    let contexts = b"\0\0\0\x03vda\0\0\0\x01\0\0\0\x0fbase:allocation";
    let go = b"\0\0\0\x03vda\0\x02\0\x03\0\x01";
    for (how, mode) in [(2u8, Mode::Simple), (0, Mode::Structured), (2, Mode::Extended), (3, Mode::Structured)] {
        let mut seed = vec![how, 0, 0, 0, 3];
        let (headers, write) = match mode {
            Mode::Simple => (opt::LIST, 0),
            Mode::Structured => (opt::STRUCTURED_REPLY, 0),
            Mode::Extended => (opt::EXTENDED_HEADERS, flag::PAYLOAD_LEN),
        };
        let tls = if how & 1 == 1 { option(opt::STARTTLS, &[]) } else { Vec::new() };
        let options = [
            tls,
            option(headers, &[]),
            option(opt::LIST_META_CONTEXT, contexts),
            option(opt::INFO, go),
            option(0x77, &[5; 9]),
        ];
        seed.extend(options.concat());
        seed.extend(option(opt::SET_META_CONTEXT, contexts));
        seed.extend(option(opt::GO, go));
        for (flags, command, len) in [
            (0, cmd::READ, 4096),
            (write, cmd::WRITE, 16),
            (0, cmd::BLOCK_STATUS, 60 << 10),
            (0, cmd::FLUSH, 0),
            (flag::NO_HOLE, cmd::WRITE_ZEROES, 512),
            (0, cmd::TRIM, 512),
            (0, cmd::CACHE, 512),
            (0, cmd::DISC, 0),
        ] {
            let offset = if len == 0 { 0 } else { 4096 };
            Request { flags, command, cookie: 7, offset, len }.put(mode, &mut seed);
            if command == cmd::WRITE {
                seed.extend([9; 16]);
            }
        }
        assert_eq!(fuzz::nbd_server(&seed), 8, "seeds are valid to their end");
        fs::write(folder.join(format!("{mode:?}{how}")), &seed).expect("write");
    }
}

/// Whole sessions of servers that answer the requests of `fuzz::nbd_client`.
fn nbd_client_seeds(folder: &Path) {
    use aquifer_mount::nbd::{
        negotiate::Mode,
        reply::{self, Chunk, DataHead, StatusHead},
        wire::{self, chunk, option as opt, option_reply as rep},
    };
    let answer = |option: u32, kind: u32, payload: &[u8]| {
        let len = u32::try_from(payload.len()).expect("short");
        let fields = [option, kind, len].map(u32::to_be_bytes).concat();
        [&wire::MAGIC_OPTION_REPLY.to_be_bytes()[..], &fields, payload].concat()
    };
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut seed =
            [&[0xfc][..], &wire::MAGIC_NBD.to_be_bytes(), &wire::MAGIC_OPTION.to_be_bytes(), &[0, 3]].concat();
        let kind = |of: Mode| if mode == of { rep::ACK } else { rep::ERR_UNSUP };
        seed.extend(answer(opt::EXTENDED_HEADERS, kind(Mode::Extended), &[]));
        if mode != Mode::Extended {
            seed.extend(answer(opt::STRUCTURED_REPLY, kind(Mode::Structured), &[]));
        }
        if mode != Mode::Simple {
            seed.extend(answer(opt::SET_META_CONTEXT, rep::META_CONTEXT, b"\0\0\0\x01base:allocation"));
            seed.extend(answer(opt::SET_META_CONTEXT, rep::ACK, &[]));
        }
        seed.extend(answer(opt::GO, rep::INFO, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]));
        seed.extend(answer(opt::GO, rep::INFO, &[0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 0, 16, 0, 0]));
        seed.extend(answer(opt::GO, rep::ACK, &[]));
        let head = DataHead { cookie: 2, request: 8192, offset: 8192, len: 2000, done: true };
        reply::put_data(&mut seed, mode, head);
        seed.extend([8; 2000]);
        let head = DataHead { cookie: 1, request: 4096, offset: 4096, len: 1000, done: mode == Mode::Simple };
        if mode == Mode::Simple {
            reply::put_data(&mut seed, mode, head);
            seed.extend([8; 1000]);
        } else {
            reply::put_data(&mut seed, mode, DataHead { len: 600, ..head });
            seed.extend([8; 600]);
            let hole = Chunk { done: true, kind: chunk::OFFSET_HOLE, cookie: 1, offset: 4096, len: 12 };
            reply::put_chunk(&mut seed, mode, &hole);
            seed.extend([0, 0, 0, 0, 0, 0, 0x12, 0x58, 0, 0, 1, 0x90]);
            let head = StatusHead { cookie: 4, request: 16384, context: 1, done: true };
            reply::put_extents(&mut seed, mode, head, &[(3000, 0), (1000, 3)]);
        }
        reply::put_error(&mut seed, mode, (3, 12288), aquifer_mount::errno::Errno::NoSpace);
        reply::put_done(&mut seed, mode, 5, 0);
        let answered = if mode == Mode::Simple { 4 } else { 5 };
        assert_eq!(fuzz::nbd_client(&seed), answered, "seeds are valid to their end");
        fs::write(folder.join(format!("{mode:?}")), &seed).expect("write");
    }
}

#[test]
fn nbd_servers_survive_hostile_clients() {
    let folder = tempfile::tempdir().expect("temporary folder");
    nbd_server_seeds(folder.path());
    run_bounded("fuzz_smoke::nbd_server_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn nbd_server_child() {
    mutate_and_run(|data| _ = fuzz::nbd_server(data), cases(5000));
}

#[test]
fn nbd_clients_survive_hostile_servers() {
    let folder = tempfile::tempdir().expect("temporary folder");
    nbd_client_seeds(folder.path());
    run_bounded("fuzz_smoke::nbd_client_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn nbd_client_child() {
    mutate_and_run(|data| _ = fuzz::nbd_client(data), cases(5000));
}

#[test]
fn native_layers_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    aql_seeds(folder.path());
    run_bounded("fuzz_smoke::aql_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn aql_child() {
    mutate_and_run(fuzz::aql, cases(700));
}

#[test]
fn records_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    record_seeds(folder.path());
    run_bounded("fuzz_smoke::record_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn record_child() {
    mutate_and_run(fuzz::record, cases(3000));
}

#[test]
fn codecs_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    codec_seeds(folder.path());
    run_bounded("fuzz_smoke::codec_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn codec_child() {
    mutate_and_run(fuzz::codec, cases(1500));
}

#[test]
fn vmware_disks_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    vmdk_seeds(folder.path());
    run_bounded("fuzz_smoke::vmdk_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn vmdk_child() {
    mutate_and_run(fuzz::vmdk, cases(1000));
}

#[test]
fn hyper_v_disks_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    hyperv_seeds(folder.path());
    run_bounded("fuzz_smoke::hyperv_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn hyperv_child() {
    mutate_and_run(fuzz::hyperv, cases(40));
}

#[test]
fn archives_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let disk: Vec<u8> = (0..200_000u32).map(|i| if i % 50_000 < 9000 { (i / 512) as u8 } else { 0 }).collect();
    let archive =
        aquifer_tests::foreign::vma::archive(&[("a", &disk[..199_680]), ("b", &disk[..4096])], &mut Rng::new(1));
    fs::write(folder.path().join("vma"), archive).expect("write");
    vmdk_seeds(folder.path());
    for (name, seed) in [("a.vmdk", "0"), ("b.vmdk", "1")] {
        fs::rename(folder.path().join(seed), folder.path().join(name)).expect("rename");
    }
    let packed = Command::new("tar").current_dir(folder.path()).args(["-cf", "ova", "a.vmdk", "b.vmdk"]).status();
    assert!(packed.expect("tar runs").success());
    run_bounded("fuzz_smoke::archive_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn archive_child() {
    mutate_and_run(fuzz::archive, cases(200));
}

#[test]
fn qcow2_survives_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    qcow2_seeds(folder.path());
    run_bounded("fuzz_smoke::qcow2_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn qcow2_child() {
    mutate_and_run(fuzz::qcow2, cases(1500));
}

#[test]
fn boot_traces_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    let step = |start: u64, end: u64, after_ms| aquifer_vdisk::trace::Step { range: start..end, after_ms };
    let steps =
        (0..20).map(|i| step(i * 69_632, i * 69_632 + 8192, i as u32)).chain([step(16 << 20, (16 << 20) + 512, 99)]);
    let trace = aquifer_vdisk::Trace { size: (16 << 20) + 512, complete: true, steps: steps.collect() };
    fs::write(folder.path().join("seed"), trace.encode()).expect("write");
    run_bounded("fuzz_smoke::trace_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn trace_child() {
    mutate_and_run(fuzz::trace, cases(20_000));
}

/// A record of a session with two disks of different chains.
fn session_seeds(folder: &Path) {
    let text = r#"{"version":1,"id":"0190a000-0000-7000-8000-000000000001","name":"web","dir":"/var/lib/s",
        "runtime_dir":"/run/s","disks":[{"name":"vda","chain":{"kind":"image","path":"/a.qcow2","format":null},
        "size":4096,"fingerprint":"FP"}],"options":{"rate":5},
        "created":"2026-01-01T00:00:00Z","machine":{"a":[1]},"host":null,"state":"Queued"}"#;
    let text = text.replace("FP", &"ab".repeat(32));
    serde_json::from_str::<aquifer_mount::session::Spec>(&text).expect("seeds are valid");
    fs::write(folder.join("0"), &text).expect("write");
    let dir = Path::new("/var/lib/aquifer/s");
    let disk = |name: &str| aquifer_mount::session::DiskSpec {
        name: name.into(),
        chain: aquifer_tests::chains::image(Path::new("/srv/base.qcow2")),
        size: 1 << 20,
        fingerprint: "cd".repeat(32),
    };
    let disks = vec![disk("vda"), disk("vdb")];
    let options = aquifer_mount::session::Options::default();
    let created = "2026-01-01T00:00:00Z".parse().expect("a time");
    let spec = aquifer_mount::session::Spec::new("web", dir, Path::new("/run/aquifer"), disks, options, created);
    let text = serde_json::to_vec(&spec.expect("a session")).expect("text");
    fs::write(folder.join("1"), &text).expect("write");
    fuzz::session(&text);
}

#[test]
fn session_records_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    session_seeds(folder.path());
    run_bounded("fuzz_smoke::session_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn session_child() {
    mutate_and_run(fuzz::session, cases(5000));
}

#[test]
fn overlays_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    for (number, seed) in fuzz::overlay_seeds().iter().enumerate() {
        fs::write(folder.path().join(number.to_string()), seed).expect("write");
    }
    run_bounded("fuzz_smoke::overlay_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn overlay_child() {
    mutate_and_run(fuzz::overlay, cases(1200));
}

/// Small file systems of several kinds, one that says that its journal is to be replayed.
fn unused_seeds(folder: &Path) {
    let kinds: [&[&str]; 4] = [
        &["-J", "size=1"],
        &["-J", "size=1", "-O", "^metadata_csum,uninit_bg"],
        &["-O", "^metadata_csum,^uninit_bg,^has_journal"],
        &["-J", "size=1", "-O", "meta_bg,^resize_inode"],
    ];
    for (number, kind) in kinds.iter().enumerate() {
        let path = folder.join(format!("seed{number}"));
        let word = path.to_str().expect("text");
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-b", "1024"]).args(*kind).args([word, "3M"]).status();
        assert!(made.expect("mkfs.ext4").success(), "{kind:?}");
    }
    let mut live = fs::read(folder.join("seed1")).expect("seed");
    live[1024 + 0x60] |= 4;
    fs::write(folder.join("live"), live).expect("write");
}

#[test]
fn unused_space_survives_hostile_bytes() {
    let folder = tempfile::tempdir().expect("temporary folder");
    unused_seeds(folder.path());
    run_bounded("fuzz_smoke::unused_child", folder.path());
}

#[test]
#[ignore = "run by its parent test, in a bounded process"]
fn unused_child() {
    mutate_and_run(fuzz::unused, cases(150));
}

#[test]
fn guests_memories_survive_hostile_bytes() {
    let folder = tempfile::tempdir().expect("tempdir");
    for (number, seed) in fuzz::vhost_user_seeds().iter().enumerate() {
        fuzz::vhost_user(seed);
        fs::write(folder.path().join(format!("memory-{number}")), seed).expect("a seed");
    }
    run_bounded("fuzz_smoke::vhost_user_child", folder.path());
}

#[test]
#[ignore = "the bounded child of guests_memories_survive_hostile_bytes"]
fn vhost_user_child() {
    mutate_and_run(fuzz::vhost_user, cases(10_000));
}
