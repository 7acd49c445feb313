//! Fuzz targets as plain functions: one per parser, each taking any bytes at all.
//!
//! The same functions run under libFuzzer (`fuzz/`) and, for a few seconds over mutated seeds, in
//! `tests/it/fuzz_smoke.rs`. They may only panic where the parser broke a promise.

mod overlay;
mod runner;
mod seeds;
mod sparse;
mod store;
mod vhost_user;

use std::{path::Path, sync::Arc};

use aquifer_formats::{
    Codec, Content, Layer,
    codec::{self, Tail},
    ova::Ova,
    probe::{Format, probe},
    qcow2::{BitmapTrust, Qcow2},
    storage::MemoryStorage,
    vbk::Vbk,
    vdi::VdiLayer,
    vhd::Vhd,
    vhdx::Vhdx,
    virtnbd::VirtnbdLayer,
    vma::Vma,
    vmdk::Vmdk,
    xva::Xva,
};

pub use self::{
    overlay::overlay,
    runner::{control, machine, partitions, qmp},
    store::store,
    vhost_user::vhost_user,
};
use crate::{door, mend, rng::Rng};

/// Most blocks that are decoded of one input; one hostile table can name the same one a thousand times.
const UNPACKS_MAX: usize = 64;

/// A target with what it needs to be run.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, also that of its file in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Judges one input; panics where a promise is broken.
    pub run: fn(&[u8]),
    /// Writes its seeds into a folder.
    pub seeds: fn(&Path),
    /// Mutations in the short form: as many as take a second or two.
    pub mutations: u32,
}

/// All targets.
pub const TARGETS: [Target; 21] = {
    const fn target(name: &'static str, run: fn(&[u8]), seeds: fn(&Path), mutations: u32) -> Target {
        Target { name, run, seeds, mutations }
    }
    [
        target("aql", aql, seeds::aql, 2_100),
        target("archive", archive, seeds::archive, 400),
        target("codec", codec, seeds::codec, 7_500),
        target("control", control, seeds::control, 15_000),
        target("hyperv", hyperv, seeds::hyperv, 600),
        target("lzop", lzop, seeds::lzop, 4_000),
        target("machine", machine, seeds::machine, 10_000),
        target("nbd_client", |data| _ = nbd_client(data), seeds::nbd_client, 15_000),
        target("nbd_server", |data| _ = nbd_server(data), seeds::nbd_server, 20_000),
        target("overlay", overlay, seeds::overlay, 6_000),
        target("partitions", partitions, seeds::partitions, 1_000),
        target("qcow2", qcow2, seeds::qcow2, 7_500),
        target("qmp", qmp, seeds::qmp, 10_000),
        target("record", record, seeds::record, 20_000),
        target("session", session, seeds::session, 10_000),
        target("store", store, seeds::store, 1_500),
        target("trace", trace, seeds::trace, 20_000),
        target("unused", unused, seeds::unused, 1_000),
        target("vbk", vbk, seeds::vbk, 500),
        target("vhost_user", vhost_user, seeds::vhost_user, 10_000),
        target("vmdk", vmdk, seeds::vmdk, 6_000),
    ]
};

/// Any bytes as a stored block: the first says how it is encoded, the next two how it is asked for.
pub fn codec(data: &[u8]) {
    let Some((&[how, need, size], stored)) = data.split_first_chunk::<3>() else { return };
    let codec = [Codec::Raw, Codec::Lz4, Codec::Zstd, Codec::Deflate][usize::from(how & 3)];
    let tail = if how & 4 == 0 { Tail::Exact } else { Tail::Ignored };
    let raw_len = 256 << (size % 13);
    let need = raw_len * usize::from(need) / 255;
    let mut out = b"what another tenant left".to_vec();
    match codec::decode(codec, stored, raw_len, need, tail, &mut out) {
        Ok(()) => assert!(out.len() >= need && out.len() <= raw_len, "{} for {need} of {raw_len}", out.len()),
        Err(_) => assert!(out.is_empty(), "bytes left of a block that failed"),
    }
    assert!(out.capacity() <= 2 * raw_len.max(64), "{} allocated for {raw_len}", out.capacity());
    assert_ne!(probe(&MemoryStorage::new("fuzz", data.to_vec())).expect("memory reads"), Some(Format::Raw));
}

/// Any bytes as a qcow2 image: header, snapshots, bitmaps, maps, blocks.
pub fn qcow2(data: &[u8]) {
    let Ok(image) = Qcow2::open(Arc::new(MemoryStorage::new("fuzz", data.to_vec()))) else { return };
    let info = image.info();
    assert_eq!(info.backing.is_some(), image.backing().is_some());
    for bitmap in image.bitmaps().unwrap_or_default() {
        let mut last = 0;
        let told = image.dirty_ranges(&bitmap, &mut |at, len| {
            assert!(at >= last && len > 0 && at + len <= info.size_bytes, "range {at}+{len} behind {last}");
            last = at + len;
        });
        assert!(told.is_err() || bitmap.trust == BitmapTrust::Consistent);
    }
    for snapshot in image.snapshots().unwrap_or_default().iter().take(8) {
        if let Ok(layer) = image.snapshot(&snapshot.id) {
            walk_layer(&layer, 16);
        }
    }
    let external = image
        .data_file()
        .map(|_| -> Arc<dyn aquifer_formats::Storage> { Arc::new(MemoryStorage::new("fuzz data", vec![7; 1 << 20])) });
    if let Ok(layer) = image.active(external) {
        walk_layer(&layer, UNPACKS_MAX);
    }
}

/// Any bytes as a VMware disk: as they are, and behind a descriptor as an extent of each kind.
pub fn vmdk(data: &[u8]) {
    let storage = |bytes: Vec<u8>| -> Arc<dyn aquifer_formats::Storage> { Arc::new(MemoryStorage::new("fuzz", bytes)) };
    if let Ok(disk) = Vmdk::open(storage(data.to_vec())) {
        let _ = disk.check_parent(&disk);
        assert!(disk.parent().is_none_or(|parent| !parent.names().is_empty()));
        if let Ok(layer) = disk.layer(|_| Ok(storage(data.to_vec()))) {
            assert_eq!(layer.size(), disk.size());
            walk_layer(&layer, UNPACKS_MAX);
        }
    }
    for kind in ["SPARSE", "VMFSSPARSE", "SESPARSE"] {
        let text = format!(
            "# Disk DescriptorFile\nCID=1\nparentCID=2\nparentFileNameHint=\"p\"\ncreateType=\"custom\"\nRW 400 {kind} \"e\"\nRW 7 ZERO\n"
        );
        let disk = Vmdk::open(storage(text.into_bytes())).expect("a good descriptor");
        if let Ok(layer) = disk.layer(|_| Ok(storage(data.to_vec()))) {
            walk_layer(&layer, 16);
        }
    }
}

/// Any sectors ([`sparse`]) as a Hyper-V or VirtualBox disk: as they are, and with the checksums on the way made right.
pub fn hyperv(data: &[u8]) {
    let file = sparse::unpack(data);
    let mended = mend::hyperv(&file);
    tables(file);
    tables(mended);
}

fn tables(file: Vec<u8>) {
    let storage: Arc<dyn aquifer_formats::Storage> = Arc::new(MemoryStorage::new("fuzz", file));
    let storage = || Arc::clone(&storage);
    if let Ok(disk) = Vhdx::open(storage()) {
        let _ = disk.check_parent(&disk);
        if let Ok(layer) = disk.layer() {
            assert_eq!(layer.size(), disk.size());
            walk_layer(&layer, 16);
        }
    }
    if let Ok(disk) = Vhd::open(storage()) {
        let _ = disk.check_parent(&disk);
        if let Ok(layer) = disk.layer() {
            assert_eq!(layer.size(), disk.size());
            walk_layer(&layer, 16);
        }
    }
    if let Ok(layer) = VdiLayer::open(storage()) {
        walk_layer(&layer, 16);
    }
}

/// Any bytes as an archive of disks: a machine's export of either kind, or Proxmox VE's; and as a stream of virtnbdbackup.
pub fn archive(data: &[u8]) {
    let storage = || -> Arc<dyn aquifer_formats::Storage> { Arc::new(MemoryStorage::new("fuzz", data.to_vec())) };
    if let Ok(archive) = Ova::open(storage()) {
        for name in archive.disks().unwrap_or_default().iter().take(4) {
            if let Ok(layer) = archive.disk(name) {
                walk_layer(&layer, 16);
            }
        }
    }
    if let Ok(layer) = VirtnbdLayer::open(storage()) {
        let _ = layer.below();
        walk_layer(&layer, 16);
    }
    if let Ok(archive) = Xva::open(storage()) {
        for name in archive.disks().iter().take(4) {
            if let Ok(layer) = archive.disk(name) {
                walk_layer(&layer, 16);
            }
        }
    }
    if let Ok(archive) = Vma::open(storage()) {
        for name in archive.disks().iter().take(4) {
            if let Ok(layer) = archive.disk(name) {
                walk_layer(&layer, 16);
            }
        }
    }
}

/// Any bytes as a stream of lzop: as they are, and as one block of it, whose lengths are honest.
pub fn lzop(data: &[u8]) {
    use std::io::Read as _;
    let mut out = Vec::new();
    if let Ok(stream) = aquifer_formats::lzop::Lzop::new(data) {
        let _ = stream.take(4 << 20).read_to_end(&mut out);
    }
    let Some((len, block)) = data.split_first_chunk::<2>() else { return };
    let len = usize::from(u16::from_le_bytes(*len));
    match aquifer_formats::lzop::decode(block, len, &mut out) {
        Ok(()) => assert_eq!(out.len(), len),
        Err(_) => assert!(out.capacity() < (8 << 20), "{} allocated for {len}", out.capacity()),
    }
}

/// Any sectors ([`sparse`]) as a backup file of Veeam's: as they are, and with the checksums on the way made right.
pub fn vbk(data: &[u8]) {
    let file = sparse::unpack(data);
    let mended = mend::vbk(&file);
    for bytes in [file, mended] {
        let Ok(backup) = Vbk::open(Arc::new(MemoryStorage::new("fuzz", bytes))) else { continue };
        for machine in backup.backups().unwrap_or_default().iter().take(4) {
            assert!(machine.id().is_none_or(|id| id.len() == 36));
            for disk in machine.disks.iter().take(4) {
                if let Ok(layer) = backup.disk(machine, &disk.name) {
                    assert_eq!(layer.size(), disk.bytes);
                    walk_layer(&layer, 16);
                }
            }
        }
    }
}

/// Any bytes as a native layer: as they are, and with every checksum on the way made right, because no
/// mutation would get past one otherwise. Opened, walked, verified, salvaged.
pub fn aql(data: &[u8]) {
    native(data);
    native(&mend::layer(data));
}

fn native(data: &[u8]) {
    use aquifer_formats::aql::{Depth, Reader, Resolver, Unseen, salvage, verify};
    let storage = || Arc::new(MemoryStorage::new("fuzz", data.to_vec()));
    if let Ok(reader) = Reader::open(storage(), Resolver::none()) {
        walk_layer(&reader, UNPACKS_MAX);
        let damage: usize = verify(&reader, Depth::Deep(None)).take(64).map(|found| found.damage.len()).sum();
        assert!(damage <= 64 * 256 + 16);
        let _ = reader.check_layers();
    }
    for unseen in [Unseen::Error, Unseen::Parent] {
        if let Ok(found) = salvage(storage(), None, Resolver::none(), unseen) {
            assert!(found.frames_end <= data.len() as u64);
            walk_layer(&found.reader, 16);
        }
    }
}

/// Any bytes as a record of a repository; the first byte says which.
pub fn record(data: &[u8]) {
    use aquifer_formats::repo::record as r;
    let Some((which, data)) = data.split_first() else { return };
    match which % 7 {
        0 => drop(r::decode::<r::PointRecord>("fuzz", data)),
        1 => drop(r::decode::<r::ManifestRecord>("fuzz", data)),
        2 => drop(r::decode::<r::RepositoryRecord>("fuzz", data)),
        3 => drop(r::decode::<r::LeaseRecord>("fuzz", data)),
        4 => drop(r::decode::<r::BeginRecord>("fuzz", data)),
        5 => drop(r::decode::<r::MachineRecord>("fuzz", data)),
        _ => drop(r::decode::<r::OwnerRecord>("fuzz", data)),
    }
}

/// Any bytes as `session.json`: what passes the check is within its bounds and survives being written again.
pub fn session(data: &[u8]) {
    use aquifer_mount::session::{Spec, is_name};
    let Ok(spec) = serde_json::from_slice::<Spec>(data) else { return };
    if spec.check(std::path::Path::new("session.json")).is_err() {
        return;
    }
    assert!(is_name(&spec.name) && spec.dir.is_absolute() && (1..=64).contains(&spec.disks.len()));
    for disk in &spec.disks {
        assert!(is_name(&disk.name) && i64::try_from(disk.size).is_ok_and(|size| size > 0), "{disk:?}");
        assert!(spec.disk_dir(&disk.name).starts_with(&spec.dir), "{disk:?} leaves its folder");
    }
    let text = serde_json::to_vec(&spec).expect("a record");
    let again: Spec = serde_json::from_slice(&text).expect("what we write we read");
    assert_eq!(serde_json::to_vec(&again).expect("a record"), text);
}

/// Bytes of the disk that the NBD targets serve and read.
const NBD_SIZE: u64 = 64 << 10;

/// Any bytes as what a client sends to an NBD server, handshake and requests; the first says whether TLS is needed.
/// Returns how many requests were judged.
pub fn nbd_server(data: &[u8]) -> usize {
    use aquifer_mount::nbd::{
        Export,
        negotiate::{Catalogue, Negotiation, Outcome, TlsState},
        request::{Request, Rules},
        wire::{self, command as cmd},
    };
    static CATALOGUE: std::sync::OnceLock<Catalogue> = std::sync::OnceLock::new();
    let catalogue = CATALOGUE.get_or_init(|| {
        let disk = door::read_only("vda", vec![1; usize::try_from(NBD_SIZE).expect("small")]);
        vec![Arc::new(Export::new("vda", disk))].into()
    });
    let Some((&[how], mut input)) = data.split_first_chunk::<1>() else { return 0 };
    let tls = [TlsState::Off, TlsState::Required][usize::from(how & 1)];
    let mut negotiation = Negotiation::new(Arc::clone(catalogue), tls);
    let mut out = Vec::new();
    let agreed = loop {
        out.clear();
        let (used, outcome) = negotiation.advance(input, &mut out);
        assert!(out.len() <= 1024, "{} bytes of answers to one option", out.len());
        input = &input[used..];
        match outcome {
            Outcome::More if used == 0 => return 0,
            Outcome::More => {}
            Outcome::StartTls => {
                assert!(tls == TlsState::Required);
                negotiation.tls_began();
            }
            Outcome::Begin(agreed) => break agreed,
            Outcome::End(_) => return 0,
        }
    };
    let rules = Rules { size: NBD_SIZE, writable: how & 2 != 0, mode: agreed.mode, contexts: agreed.contexts.len() };
    let mut judged = 0;
    while let Ok(Some(request)) = Request::parse(input, rules.mode) {
        let mut again = Vec::new();
        request.put(rules.mode, &mut again);
        assert_eq!(again, input[..again.len()], "a header says what was read from it");
        let payload = request.payload_len(rules.mode);
        let filter = request.command == cmd::BLOCK_STATUS && request.has(wire::command_flag::PAYLOAD_LEN);
        if request.validate(&rules).is_ok() {
            let inside = request.offset.checked_add(request.len).is_some_and(|end| end <= rules.size);
            assert!(filter || inside, "{request:?} is said to be legal");
            assert!(rules.writable || !matches!(request.command, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM));
            assert!(filter || payload <= u64::from(wire::PAYLOAD_MAX));
        }
        let rest = usize::try_from(payload).ok().and_then(|payload| input[again.len()..].get(payload..));
        judged += 1;
        let Some(rest) = rest else { break };
        input = rest;
    }
    judged
}

/// Any bytes as what an NBD server sends to our client, handshake and replies; the first says how they are cut.
/// Returns how many requests were answered.
pub fn nbd_client(data: &[u8]) -> usize {
    use aquifer_mount::nbd::{
        client::{
            hello::{Hello, Purpose, Step, Wish},
            inbox::{Asked, Inbox},
        },
        wire::{self, command as cmd},
    };
    let Some((&[how], mut input)) = data.split_first_chunk::<1>() else { return 0 };
    let purpose = [Purpose::Transmit, Purpose::Transmit, Purpose::ListExports, Purpose::ListContexts];
    let purpose = purpose[usize::from(how & 3)].clone();
    let contexts = vec![wire::CONTEXT_ALLOCATION.to_owned()];
    let mut hello = Hello::new(Wish { export: "vda".into(), contexts, tls: false, purpose });
    let mut out = Vec::new();
    let offer = loop {
        let (used, step) = hello.advance(input, &mut out);
        input = &input[used..];
        match step {
            Step::More if used == 0 => return 0,
            Step::More => {}
            Step::Ready(offer) => break offer,
            Step::StartTls => panic!("TLS was not wanted"),
            Step::Refused(text) | Step::Broken(text) => {
                assert!(text.len() < 600, "{text}");
                return 0;
            }
            Step::Listed(list) => {
                assert!(list.len() <= 10_000);
                return 0;
            }
        }
    };
    assert!(i64::try_from(offer.size).is_ok() && offer.block_min.is_power_of_two());
    assert!(offer.contexts.len() <= 1 && offer.block_max <= wire::PAYLOAD_MAX);
    let mut inbox = Inbox::new(offer.mode, offer.contexts.iter().map(|(id, _)| *id).collect());
    let commands = [cmd::READ, cmd::READ, cmd::WRITE, cmd::BLOCK_STATUS, cmd::FLUSH];
    for (cookie, command) in (1..).zip(commands) {
        let (offset, len) = if command == cmd::FLUSH { (0, 0) } else { (4096 * cookie, 1000 * cookie) };
        let len_here = if command == cmd::READ { usize::try_from(len).expect("small") } else { 0 };
        inbox.expect(cookie, Asked { command, offset, len, buf: vec![0; len_here] });
    }
    let mut ended = 0;
    for part in input.chunks(1 + usize::from(how >> 2) * 7) {
        let fed = inbox.feed(part);
        while let Some(done) = inbox.next_done() {
            ended += 1;
            let (asked, known) = (done.asked, done.error.is_none());
            assert!(asked.command != cmd::READ || asked.buf.len() as u64 == asked.len);
            assert!(!known || (asked.command == cmd::BLOCK_STATUS) != done.status.is_empty());
            for (_, extents) in &done.status {
                let told: u64 = extents.iter().map(|(len, _)| *len).sum();
                assert!(told <= asked.len && extents.iter().all(|(len, _)| *len > 0));
            }
        }
        if fed.is_err() {
            break;
        }
    }
    assert_eq!(ended + inbox.abandon().len(), commands.len(), "every request ends once");
    ended
}

/// Looks all over a layer and checks what the trait promises of each answer.
fn walk_layer(layer: &dyn Layer, unpacks: usize) {
    let size = layer.size();
    let mut told = Vec::new();
    let mut last = 0;
    let _ = layer.scan(0, size, &mut |at, len, content| {
        assert!(at >= last && len > 0 && at + len <= size && content != Content::Absent, "scan told {at}+{len}");
        last = at + len;
        if told.len() < 4 * unpacks {
            told.push((at, len, content));
        }
    });
    let mut out = Vec::new();
    for (number, (at, len, content)) in told.iter().enumerate() {
        assert_eq!(layer.lookup(*at, *len).expect("what scan told"), (*content, *len));
        match content {
            Content::Plain { file, offset } => {
                let mut bytes = vec![0; usize::try_from((*len).min(4096)).expect("small")];
                // A cluster that the map names lies in the file, at least its first byte.
                layer.file(*file).expect("the file it names").read_at(*offset, &mut bytes[..1]).expect("reads");
                let _ = layer.file(*file).expect("the file it names").read_at(*offset, &mut bytes);
            }
            Content::Packed { block, skip } if number < unpacks => {
                let raw_len = block.raw_len as usize;
                assert!(u64::from(*skip) + len <= u64::from(block.raw_len), "past its block");
                for need in [1, raw_len] {
                    match layer.unpack(block, need, &mut out) {
                        Ok(()) => assert!(out.len() >= need && out.len() <= raw_len, "{} for {need}", out.len()),
                        Err(_) => assert!(out.is_empty(), "bytes left of a block that failed"),
                    }
                }
            }
            _ => {}
        }
    }
    let mut rng = Rng::new(size);
    for _ in 0..32 {
        let at = rng.below(size.max(1));
        let max = 1 + rng.below(1 << 20);
        if let Ok((_, len)) = layer.lookup(at, max) {
            assert!(len >= 1 && len <= max && at + len <= size, "lookup {at}+{max} answered for {len}");
        }
    }
    for at in [size, u64::MAX] {
        assert!(layer.lookup(at, 1).is_err(), "past the end");
    }
    let _ = layer.fingerprint();
}

/// Any bytes as a boot trace: as they are, and with the checksum made right.
pub fn trace(data: &[u8]) {
    let mut mended = data.to_vec();
    if let Some(field) = mended.get_mut(12..16) {
        field.fill(0);
        let crc = crc32c::crc32c(&mended).to_le_bytes();
        mended[12..16].copy_from_slice(&crc);
    }
    for bytes in [data, &mended] {
        let Ok(trace) = aquifer_vdisk::Trace::decode("fuzz", bytes) else { continue };
        assert!(trace.steps.len() * 16 + 64 == bytes.len() && trace.bytes() <= aquifer_vdisk::trace::BYTES_MAX);
        let again = aquifer_vdisk::Trace::decode("again", &trace.encode()).expect("what it encodes, it reads");
        assert_eq!(again, trace);
        for size in [0, 1 << 20, trace.size, u64::MAX] {
            let fetches = trace.fetches(size);
            assert!(fetches.iter().all(|f| f.start < f.end && f.end <= size && f.end - f.start <= 256 << 10));
            assert!(fetches.len() <= trace.steps.len() + (1 << 14));
        }
    }
}

/// Any sectors ([`sparse`]) as a disk whose unused space is looked for: as they are, and with a GPT's checksums made right.
pub fn unused(data: &[u8]) {
    let mut file = sparse::unpack(data);
    look_for_unused(&file);
    mend::gpt(&mut file);
    look_for_unused(&file);
}

fn look_for_unused(data: &[u8]) {
    let size = data.len() as u64;
    let read = |at: u64, buf: &mut [u8]| -> aquifer_vdisk::Result<()> {
        let at = usize::try_from(at).expect("inside");
        buf.copy_from_slice(&data[at..at + buf.len()]);
        Ok(())
    };
    let found = aquifer_vdisk::unused::find(size, &read).expect("memory reads");
    let mut last = 0;
    for range in found.ranges.iter() {
        assert!(range.start >= last && range.end <= size && range.start % 4096 == 0 && range.end % 4096 == 0);
        last = range.end;
    }
    assert!(found.doubt.is_none() || found.ranges.is_empty());
    let mut believed = 0;
    for volume in &found.volumes {
        let unused = found.ranges.clip(volume.range.clone()).bytes();
        let may_be = volume.doubt.is_none() && volume.file_system == aquifer_vdisk::unused::FileSystem::Ext4;
        assert!(unused == volume.unused && (may_be || unused == 0), "{volume:?}");
        believed += unused;
    }
    assert_eq!(believed, found.ranges.bytes(), "what lies in no volume is used");
}
