//! What each target begins with: small inputs that are right, from our own writers and from the peers' tools.

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
};

use super::sparse;
use crate::{qemu, rng::Rng};

/// Small qcow2 images with everything in them that the driver reads.
pub(super) fn qcow2(folder: &Path) {
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
pub(super) fn vmdk(folder: &Path) {
    use crate::foreign::vmdk::{Extent, Grain, descriptor};
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
pub(super) fn hyperv(folder: &Path) {
    use crate::foreign::hyperv::{Sectors, VhdChild, VhdxChild};
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
    pack(folder);
}

/// Blocks in every encoding, behind the three bytes that say how to ask for them.
pub(super) fn codec(folder: &Path) {
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
pub(super) fn aql(folder: &Path) {
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
pub(super) fn record(folder: &Path) {
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
pub(super) fn nbd_server(folder: &Path) {
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
        assert_eq!(super::nbd_server(&seed), 8, "seeds are valid to their end");
        fs::write(folder.join(format!("{mode:?}{how}")), &seed).expect("write");
    }
}

/// Whole sessions of servers that answer the requests of `fuzz::nbd_client`.
pub(super) fn nbd_client(folder: &Path) {
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
        assert_eq!(super::nbd_client(&seed), answered, "seeds are valid to their end");
        fs::write(folder.join(format!("{mode:?}")), &seed).expect("write");
    }
}

/// A record of a session with two disks of different chains.
pub(super) fn session(folder: &Path) {
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
        chain: crate::chains::image(Path::new("/srv/base.qcow2")),
        size: 1 << 20,
        fingerprint: "cd".repeat(32),
    };
    let disks = vec![disk("vda"), disk("vdb")];
    let options = aquifer_mount::session::Options::default();
    let created = "2026-01-01T00:00:00Z".parse().expect("a time");
    let spec = aquifer_mount::session::Spec::new("web", dir, Path::new("/run/aquifer"), disks, options, created);
    let text = serde_json::to_vec(&spec.expect("a session")).expect("text");
    fs::write(folder.join("1"), &text).expect("write");
    super::session(&text);
}

/// Small file systems of several kinds, one that says that its journal is to be replayed.
pub(super) fn unused(folder: &Path) {
    let kinds: [&[&str]; 4] = [
        &["-J", "size=1"],
        &["-J", "size=1", "-O", "^metadata_csum,uninit_bg"],
        &["-O", "^metadata_csum,^uninit_bg,^has_journal"],
        &["-J", "size=1", "-O", "meta_bg,^resize_inode"],
    ];
    for (number, kind) in kinds.iter().enumerate() {
        let path = folder.join(format!("seed{number}"));
        let word = path.to_str().expect("text");
        let made = Command::new("mkfs.ext4").args(["-q", "-F", "-b", "1024"]).args(*kind).args([word, "3M"]).output();
        assert!(made.expect("mkfs.ext4").status.success(), "{kind:?}");
    }
    let mut live = fs::read(folder.join("seed1")).expect("seed");
    live[1024 + 0x60] |= 4;
    fs::write(folder.join("live"), live).expect("write");
    tables(folder);
    pack(folder);
}

/// Disks with partitions of every kind of table.
pub(super) fn partitions(folder: &Path) {
    tables(folder);
    fs::write(folder.join("none"), [0; 4096]).expect("write");
    pack(folder);
}

/// A GPT and an MBR with logical partitions, each with a file system in one of them where `folder` has one.
fn tables(folder: &Path) {
    let filesystem = fs::read(folder.join("seed0")).unwrap_or_default();
    for (name, first, program, args) in [
        ("gpt", 2048, "sgdisk", &["-a", "8", "-n", "1:40:47", "-t", "1:ef00", "-n", "2:48:55", "-t", "2:ef02"][..]),
        ("mbr", 2080, "sfdisk", &["-q", "--no-tell-kernel"][..]),
    ] {
        let path = folder.join(name);
        let mut disk = vec![0; 6 << 20];
        disk[first * 512..][..filesystem.len()].copy_from_slice(&filesystem);
        fs::write(&path, disk).expect("write");
        let mut command = Command::new(program);
        command.args(args).args(if name == "gpt" { &["-n", "3:2048:10000"][..] } else { &[] }).arg(&path);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect(program);
        let script = "label: dos\nstart=32,size=16,type=ef\nstart=64,size=11000,type=5\nstart=80,size=16\nstart=2080,size=8000\n";
        if name == "mbr" {
            child.stdin.take().expect("a pipe").write_all(script.as_bytes()).expect("a script");
        }
        assert!(child.wait().expect(program).success(), "{program}");
    }
}

/// Makes lists of sectors of all files in `folder`.
fn pack(folder: &Path) {
    for entry in fs::read_dir(folder).expect("seeds") {
        let path = entry.expect("a seed").path();
        let list = sparse::pack(&fs::read(&path).expect("a seed"));
        fs::write(path, list).expect("write");
    }
}

/// A trace of steps near and far.
pub(super) fn trace(folder: &Path) {
    let step = |start: u64, end: u64, after_ms| aquifer_vdisk::trace::Step { range: start..end, after_ms };
    let steps =
        (0..20).map(|i| step(i * 69_632, i * 69_632 + 8192, i as u32)).chain([step(16 << 20, (16 << 20) + 512, 99)]);
    let trace = aquifer_vdisk::Trace { size: (16 << 20) + 512, complete: true, steps: steps.collect() };
    fs::write(folder.join("seed"), trace.encode()).expect("write");
}

/// Maps and journals of overlays with something in them.
pub(super) fn overlay(folder: &Path) {
    for (number, seed) in super::overlay::overlay_seeds().iter().enumerate() {
        fs::write(folder.join(number.to_string()), seed).expect("write");
    }
}

/// What a monitor says that is asked `query-block` a few times, with events between and an error at the end.
pub(super) fn qmp(folder: &Path) {
    let greeting = r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}"#;
    let lines = [
        greeting,
        r#"{"return": {}, "id": 1}"#,
        r#"{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}"#,
        r#"{"return": [{"device": "vda", "inserted": {"ro": false, "node-name": "n0"}}], "id": 2}"#,
        "",
        r#"{"return": "late", "id": 77}"#,
        r#"{"event": "BLOCK_IO_ERROR", "data": {"action": "stop", "nospace": true, "reason": "\u00e9\ud83d\ude00"}}"#,
        r#"{"id": 3, "error": {"class": "DeviceNotFound", "desc": "no \u001b such"}}"#,
    ];
    fs::write(folder.join("0"), lines.join("\r\n") + "\n").expect("write");
}

/// Orders of every kind.
pub(super) fn control(folder: &Path) {
    let orders = [
        r#"{"verb":"status"}"#,
        r#"{"verb":"set","rate":{"to":5},"ready_by":{"to":"2026-01-01T00:00:00Z"}}"#,
        r#"{"verb":"set","rate":"clear"}"#,
        r#"{"verb":"pause"}"#,
        r#"{"verb":"resume"}"#,
        r#"{"verb":"drain","disk":"vda"}"#,
        r#"{"verb":"hand_over","disk":"vda"}"#,
        r#"{"verb":"detach_source"}"#,
        r#"{"verb":"stop","clients":"respect"}"#,
        r#"{"verb":"call","name":"traces","args":{"a":[1,2.5,null]}}"#,
        // Read, written and read again it is another number by its last bit.
        r#"{"verb":"call","name":"traces","args":16666666666666666666666666666666666666666666666666666666}"#,
    ];
    let lines = orders.map(|order| format!("{{\"version\":1,\"body\":{order}}}\n"));
    fs::write(folder.join("all"), lines.concat()).expect("write");
    for (number, line) in lines.iter().enumerate() {
        fs::write(folder.join(number.to_string()), line).expect("write");
    }
}

/// One machine in both forms.
pub(super) fn machine(folder: &Path) {
    let plain = r#"version = 1
name = "db01"
uuid = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
firmware = "uefi"
machine_type = "pc-q35-7.2"
nvram = "/v"
cpus = 2
memory = "4GiB"
[[disk]]
name = "vda"
bus = "virtio"
source = "/a.qcow2"
boot_order = 1
[[nic]]
mac = "52-54-00-ab-cd-ef"
model = "virtio"
network = "default"
"#;
    let domain = r#"<?xml version="1.0"?><domain type='kvm' xmlns:q='http://e/1'><name>db01</name>
<uuid>1b4e28ba-2fa1-11d2-883f-0016d3cca427</uuid><memory unit='GiB'>4</memory><vcpu>2</vcpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><nvram>/v&amp;w</nvram><loader type='pflash'/></os>
<devices><disk type='file' device='disk'><source file='/a.qcow2'/><target dev='vda' bus='virtio'/><boot order='1'/></disk>
<disk device='cdrom'><target dev='sda'/></disk><!-- c --><interface type='network'><mac address='52:54:00:AB:CD:EF'/>
<source network='default'/><model type='virtio'/></interface></devices></domain>"#;
    for (name, text) in [("plain", plain), ("domain", domain)] {
        let read = aquifer_runner::machine::Described::parse(name, text).expect("seeds are valid");
        assert_eq!((read.disks.len(), read.nics.len()), (1, 1), "{name}");
        fs::write(folder.join(name), text).expect("write");
    }
}

/// Machines' exports and an archive of Proxmox VE; streams of virtnbdbackup, plain and compressed.
pub(super) fn archive(folder: &Path) {
    let disk: Vec<u8> = (0..200_000u32).map(|i| if i % 50_000 < 9000 { (i / 512) as u8 } else { 0 }).collect();
    let archive = crate::foreign::vma::archive(&[("a", &disk[..199_680]), ("b", &disk[..4096])], &mut Rng::new(1));
    fs::write(folder.join("vma"), archive).expect("write");
    for (name, below) in [("full", None), ("inc", Some(("c0", &[0; 199_680][..])))] {
        let (disk, checkpoint, date) = (&disk[..199_680], "c1", crate::foreign::virtnbd::DATE);
        let point = crate::foreign::virtnbd::Point { disk: "sda", checkpoint, below, bytes: disk, date };
        fs::write(folder.join(name), point.file()).expect("write");
        fs::write(folder.join(format!("{name}-lz4")), point.compressed()).expect("write");
    }
    let members = tempfile::tempdir().expect("a folder");
    crate::foreign::xva::export(members.path(), &folder.join("xva"), &[("xvda", &disk[..40_960])]);
    vmdk(folder);
    for (name, seed) in [("a.vmdk", "0"), ("b.vmdk", "1")] {
        fs::rename(folder.join(seed), folder.join(name)).expect("rename");
    }
    let packed = Command::new("tar").current_dir(folder).args(["-cf", "ova", "a.vmdk", "b.vmdk"]).status();
    assert!(packed.expect("tar runs").success());
}

/// A full and an increment in both layouts of lists, with each encoding.
pub(super) fn vbk(folder: &Path) {
    use crate::foreign::vbk::{Body, Encoding, File, Machine, changes};
    let disk: Vec<u8> = (0..150_000u32).map(|i| if i % 50_000 < 9000 { (i / 300) as u8 } else { 0 }).collect();
    let disk = &disk[..292 * 512];
    let mut later = disk.to_vec();
    later[40_000..60_000].fill(7);
    let encodings = [Encoding::Lz4, Encoding::Plain, Encoding::Zlib, Encoding::Zstd];
    for version in [9, 13] {
        for (below, body) in [(0, Body::Whole(disk)), (1, changes(disk, &later, 4096))] {
            let files = vec![("DEV__dev_sda", body), ("x.vmx", Body::Whole(b"x"))];
            let machines = vec![Machine { folder: "f", name: "m", id: below + 1, below, files }];
            let file = File { version, block: 4096, encodings: &encodings, machines };
            fs::write(folder.join(format!("{version}-{below}")), file.bytes()).expect("write");
        }
    }
    pack(folder);
}

/// Memories of honest guests.
pub(super) fn vhost_user(folder: &Path) {
    for (number, seed) in super::vhost_user::vhost_user_seeds().iter().enumerate() {
        fs::write(folder.join(number.to_string()), seed).expect("write");
    }
}

/// A file of each kind of store.
pub(super) fn store(folder: &Path) {
    for (number, seed) in super::store::store_seeds().iter().enumerate() {
        fs::write(folder.join(number.to_string()), seed).expect("write");
    }
}

/// A stream of two blocks, and a block behind its length: literals, then a copy of them.
pub(super) fn lzop(folder: &Path) {
    let block = [21, b'a', b'b', b'c', b'd', 0x20 | 28, 12, 0, 17, 0, 0];
    fs::write(folder.join("block"), [&34u16.to_le_bytes()[..], &block].concat()).expect("write");
    let mut stream = b"\x89LZO\0\r\n\x1a\n".to_vec();
    let mut header = vec![0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 1, 3];
    header.extend(1u32.to_be_bytes());
    header.extend([0; 12]);
    header.extend([1, b'x']);
    let adler = |bytes: &[u8]| {
        let (a, b) = bytes.iter().fold((1u32, 0u32), |(a, b), byte| {
            let a = (a + u32::from(*byte)) % 65_521;
            (a, (b + a) % 65_521)
        });
        b << 16 | a
    };
    let sum = adler(&header);
    header.extend(sum.to_be_bytes());
    stream.extend(header);
    for plain in [&b"stored as it is"[..], b"and again"] {
        let len = (plain.len() as u32).to_be_bytes();
        stream.extend([len, len].concat());
        stream.extend(adler(plain).to_be_bytes());
        stream.extend(plain);
    }
    stream.extend([0; 4]);
    fs::write(folder.join("stream"), stream).expect("write");
}
