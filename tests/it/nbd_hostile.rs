//! Promise: nothing a client sends or leaves unsent harms an NBD server: what is malformed is refused by its
//! number or ends its own connection, at once and for a bounded price, and the next client is served.

use std::{
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::storage::{Access, FileStorage, MemoryStorage};
use aquifer_mount::nbd::{
    Address, Client, ClientOptions, Export, Limits, Server, ServerTls,
    negotiate::Mode,
    reply::{self, Head},
    request::Request,
    wire::{self, command as cmd, command_flag as flag, option as opt, option_reply as rep},
};
use aquifer_tests::door;
use aquifer_vdisk::Disk;

const SIZE: u64 = 1 << 20;
/// Longest that a refusal or the end of a connection may take where two processors are shared.
const SOON: Duration = Duration::from_secs(8);
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];
const INVALID: u32 = 22;
const NO_SPACE: u32 = 28;
const NOT_PERMITTED: u32 = 1;

/// A server of a writable `rw` and a read-only `ro`.
struct Target {
    server: Server,
    address: Address,
    folder: tempfile::TempDir,
    bytes: Vec<u8>,
}

fn target(limits: Limits, more: Vec<Export>, tls: Option<ServerTls>) -> Target {
    let folder = tempfile::tempdir().expect("folder");
    let bytes = door::pattern(SIZE as usize, 11);
    std::fs::create_dir(folder.path().join("overlay")).expect("folder");
    let rw = door::writable("rw", Arc::new(MemoryStorage::new("m", bytes.clone())), &folder.path().join("overlay"));
    let ro = door::read_only("ro", bytes.clone());
    let mut builder = Server::builder().limits(limits).export(Export::new("rw", rw)).export(Export::new("ro", ro));
    for export in more {
        builder = builder.export(export);
    }
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let server = builder.build().expect("server");
    let address = server.listen_unix(&folder.path().join("s")).expect("listen");
    Target { server, address, folder, bytes }
}

fn plain() -> Target {
    target(Limits::default(), Vec::new(), None)
}

impl Target {
    /// A connection behind both greetings.
    fn greeted(&self) -> Peer {
        let mut peer = self.connected();
        peer.send(&3u32.to_be_bytes());
        peer
    }

    /// A connection of which the server's greeting was taken.
    fn connected(&self) -> Peer {
        let stream = UnixStream::connect(self.folder.path().join("s")).expect("connect");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        stream.set_write_timeout(Some(SOON)).expect("timeout");
        let mut peer = Peer { stream, mode: Mode::Simple };
        let greeting = peer.take(18).expect("a greeting");
        assert_eq!(greeting[..8], wire::MAGIC_NBD.to_be_bytes());
        peer
    }

    /// A connection in transmission.
    fn transmitting(&self, export: &str, mode: Mode) -> Peer {
        let mut peer = self.greeted();
        peer.begin(export, mode);
        peer
    }

    /// Everybody has left, nothing broke inside, and the next client gets its bytes.
    fn is_unharmed(&self) {
        let began = Instant::now();
        while self.server.stats().open > 0 {
            assert!(began.elapsed() < SOON, "connections stay open: {:?}", self.server.stats());
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(self.server.stats().panics, 0);
        let client = Client::connect(&self.address.with_export("ro"), &ClientOptions::default()).expect("next client");
        let mut out = vec![0; 5000];
        client.read(3000, &mut out).expect("read");
        assert!(out == self.bytes[3000..8000]);
    }
}

/// A client without manners.
struct Peer {
    stream: UnixStream,
    mode: Mode,
}

fn string(text: &[u8]) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text].concat()
}

/// The payload of `INFO` and `GO` without wishes.
fn named(export: &str) -> Vec<u8> {
    [string(export.as_bytes()), vec![0, 0]].concat()
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let head = [&wire::MAGIC_OPTION.to_be_bytes()[..], &number.to_be_bytes()].concat();
    [head, string(data)].concat()
}

fn contexts(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(export.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query.as_bytes())));
    data
}

impl Peer {
    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server takes it");
    }

    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let mut out = vec![0; len];
        self.stream.read_exact(&mut out).ok().map(|()| out)
    }

    /// The next answer to an option: its kind and payload.
    fn answer(&mut self, number: u32) -> (u32, Vec<u8>) {
        let head = self.take(20).expect("an answer");
        let mut fields = wire::Cursor::new(&head);
        assert_eq!((fields.u64(), fields.u32()), (Some(wire::MAGIC_OPTION_REPLY), Some(number)));
        let (kind, len) = (fields.u32().expect("four bytes"), fields.u32().expect("four bytes"));
        assert!(len <= 2 * 4096, "an answer of {len} bytes");
        (kind, self.take(len as usize).expect("its payload"))
    }

    /// Sends an option; the last answer to it, and how many came before.
    fn ask(&mut self, number: u32, data: &[u8]) -> (u32, Vec<u8>, usize) {
        self.send(&option(number, data));
        let mut before = 0;
        loop {
            let (kind, payload) = self.answer(number);
            if kind == rep::ACK || kind & rep::ERROR_BIT != 0 {
                return (kind, payload, before);
            }
            before += 1;
        }
    }

    fn begin(&mut self, export: &str, mode: Mode) {
        if mode >= Mode::Structured {
            let number = if mode == Mode::Extended { opt::EXTENDED_HEADERS } else { opt::STRUCTURED_REPLY };
            assert_eq!(self.ask(number, &[]).0, rep::ACK);
            assert_eq!(self.ask(opt::SET_META_CONTEXT, &contexts(export, &["base:allocation"])).0, rep::ACK);
        }
        assert_eq!(self.ask(opt::GO, &named(export)).0, rep::ACK);
        self.mode = mode;
    }

    fn request(&mut self, flags: u16, command: u16, cookie: u64, range: (u64, u64)) {
        let mut out = Vec::new();
        Request { flags, command, cookie, offset: range.0, len: range.1 }.put(self.mode, &mut out);
        self.send(&out);
    }

    /// The next reply: cookie, error number, payloads of its chunks. `data` is what a simple success carries.
    fn reply(&mut self, data: u64) -> Option<(u64, u32, Vec<Vec<u8>>)> {
        let (mut errno, mut payloads) = (0, Vec::new());
        loop {
            let bytes = self.take(reply::header_len(self.mode))?;
            match Head::parse(&bytes, self.mode).expect("in step").expect("whole").0 {
                Head::Simple { cookie, errno } => {
                    payloads.push(if errno == 0 { self.take(data as usize)? } else { Vec::new() });
                    return Some((cookie, errno, payloads));
                }
                Head::Chunk(head) => {
                    let payload = self.take(head.len as usize)?;
                    if head.kind & wire::chunk::ERROR_BIT != 0 {
                        errno = wire::Cursor::new(&payload).u32().expect("a number");
                    }
                    payloads.push(payload);
                    if head.done {
                        return Some((head.cookie, errno, payloads));
                    }
                }
            }
        }
    }

    /// A valid read works on this very connection.
    fn is_in_step(&mut self, bytes: &[u8]) {
        self.request(0, cmd::READ, u64::MAX, (4096, 512));
        let (cookie, errno, payloads) = self.reply(512).expect("a reply");
        assert_eq!((cookie, errno), (u64::MAX, 0));
        assert!(payloads.concat().ends_with(&bytes[4096..4608]));
    }

    /// The server ends the connection without being told that no more comes; what it said before.
    fn drain_to_close(mut self, why: &str) -> Vec<u8> {
        let began = Instant::now();
        let mut said = Vec::new();
        if let Err(e) = self.stream.read_to_end(&mut said) {
            assert!(e.kind() == std::io::ErrorKind::ConnectionReset, "{why}: {e} after {:?}", began.elapsed());
        }
        said
    }
}

#[test]
fn bad_requests_get_their_number_and_the_connection_lives() {
    let target = plain();
    let max = u64::from(wire::PAYLOAD_MAX);
    for mode in MODES {
        let payload = if mode == Mode::Extended { flag::PAYLOAD_LEN } else { 0 };
        let refused_df = if mode == Mode::Simple { INVALID } else { 0 };
        let cases = [
            (0, cmd::READ, (SIZE - 1, 2), INVALID),
            (0, cmd::READ, (u64::MAX, 1), INVALID),
            (0, cmd::READ, (u64::MAX - 4095, 4096), INVALID),
            (0, cmd::READ, (0, max + 1), INVALID),
            (1 << 15, cmd::READ, (0, 512), INVALID),
            (flag::DF, cmd::READ, (0, 512), refused_df),
            (payload, cmd::WRITE, (SIZE - 1, 2), NO_SPACE),
            (payload, cmd::WRITE, (u64::MAX, 8), NO_SPACE),
            (payload, cmd::WRITE, (0, max + 1), INVALID),
            (payload | flag::REQ_ONE, cmd::WRITE, (0, 700), INVALID),
            (0, cmd::WRITE_ZEROES, (SIZE, 1), NO_SPACE),
            (0, cmd::WRITE_ZEROES, (u64::MAX, 9), NO_SPACE),
            (0, cmd::TRIM, (SIZE - 1, 2), INVALID),
            (0, cmd::CACHE, (1, SIZE), INVALID),
            (0, cmd::FLUSH, (0, 5), INVALID),
            (0, cmd::FLUSH, (5, 0), INVALID),
            (0, 99, (0, 512), INVALID),
            (0, u16::MAX, (0, 512), INVALID),
            (0, cmd::BLOCK_STATUS, (0, 0), INVALID),
            (0, cmd::BLOCK_STATUS, (SIZE, 1), INVALID),
            (0, cmd::READ, (0, 0), 0),
            (0, cmd::READ, (SIZE, 0), 0),
            (payload, cmd::WRITE, (0, 0), 0),
            (payload, cmd::WRITE, (SIZE, 0), 0),
            (payload | flag::FUA, cmd::WRITE, (77, 0), 0),
            (0, cmd::TRIM, (0, 0), 0),
            (0, cmd::WRITE_ZEROES, (77, 0), 0),
            (0, cmd::CACHE, (0, 0), 0),
        ];
        let mut peer = target.transmitting("rw", mode);
        for (number, (flags, command, range, want)) in (0..).zip(cases) {
            peer.request(flags, command, number, range);
            if command == cmd::WRITE {
                peer.send(&vec![0xaa; range.1 as usize]);
            }
            let (cookie, errno, _) = peer.reply(if command == cmd::READ { range.1 } else { 0 }).expect("a reply");
            assert_eq!((cookie, errno), (number, want), "{mode:?}: {command} {range:?} flags {flags:#x}");
            peer.is_in_step(&target.bytes);
        }
        let mut peer = target.transmitting("ro", mode);
        for (command, range) in [
            (cmd::WRITE, (0, 100)),
            (cmd::WRITE, (SIZE, 70_000)),
            (cmd::WRITE, (0, max + 1)),
            (cmd::WRITE_ZEROES, (0, 512)),
            (cmd::TRIM, (0, 512)),
        ] {
            peer.request(if command == cmd::WRITE { payload } else { 0 } | flag::FUA, command, 0, range);
            if command == cmd::WRITE {
                peer.send(&vec![0xaa; range.1 as usize]);
            }
            assert_eq!(peer.reply(0).expect("a reply").1, NOT_PERMITTED, "{mode:?}: {command} {range:?}");
            peer.is_in_step(&target.bytes);
        }
    }
    target.is_unharmed();
}

#[test]
fn what_only_longer_headers_can_say() {
    let target = plain();
    let mut peer = target.transmitting("rw", Mode::Extended);
    // A payload where none belongs is taken off the stream; lengths past 32 bits are just too long.
    peer.request(flag::PAYLOAD_LEN, cmd::READ, 1, (0, 512));
    peer.send(&[0; 512]);
    assert_eq!(peer.reply(0).expect("a reply").1, INVALID);
    for (command, want) in [(cmd::READ, INVALID), (cmd::TRIM, INVALID), (cmd::WRITE_ZEROES, NO_SPACE)] {
        for len in [1 << 32, 1 << 63, u64::MAX] {
            peer.request(0, command, 1, (1, len));
            assert_eq!(peer.reply(0).expect("a reply").1, want, "{command} of {len}");
        }
    }
    // Filters of extents: cut short, of nothing, of contexts unknown or named twice, past the end.
    let filter = |len: u64, ids: &[u32]| {
        ids.iter().fold(len.to_be_bytes().to_vec(), |out, id| [out, id.to_be_bytes().to_vec()].concat())
    };
    let good = filter(4096, &[1]);
    for bad in [
        vec![0; 3],
        filter(4096, &[]),
        filter(0, &[1]),
        filter(4096, &[9]),
        filter(4096, &[1, 1]),
        filter(SIZE + 1, &[1]),
        vec![1; 5000],
    ] {
        peer.request(flag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 2, (0, bad.len() as u64));
        peer.send(&bad);
        assert_eq!(peer.reply(0).expect("a reply").1, INVALID, "{bad:?}");
    }
    peer.request(flag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 2, (0, good.len() as u64));
    peer.send(&good);
    assert_eq!(peer.reply(0).expect("a reply").1, 0);
    peer.is_in_step(&target.bytes);

    // Cookies are the client's business, also when they are all the same.
    for _ in 0..100 {
        peer.request(0, cmd::READ, 7, (8192, 512));
    }
    for _ in 0..100 {
        let (cookie, errno, payloads) = peer.reply(0).expect("a reply");
        assert!((cookie, errno) == (7, 0) && payloads.concat().ends_with(&target.bytes[8192..8704]));
    }
    drop(peer);
    target.is_unharmed();
}

#[test]
fn requests_out_of_step_end_the_connection() {
    let target = plain();
    for mode in MODES {
        let other = if mode == Mode::Extended { Mode::Structured } else { Mode::Extended };
        let mut wrong = Vec::new();
        Request { flags: 0, command: cmd::READ, cookie: 1, offset: 0, len: 512 }.put(other, &mut wrong);
        for bytes in [wrong, vec![0; 64], vec![0xff; 28]] {
            let mut peer = target.transmitting("rw", mode);
            peer.send(&bytes);
            assert!(peer.drain_to_close("wrong magic").is_empty());
        }
        // Nobody waits for gigabytes that were only announced.
        let far = if mode == Mode::Extended { u64::MAX } else { u64::from(u32::MAX) };
        let mut peer = target.transmitting("rw", mode);
        peer.request(if mode == Mode::Extended { flag::PAYLOAD_LEN } else { 0 }, cmd::WRITE, 1, (0, far));
        assert_eq!(peer.reply(0).expect("told why").1, INVALID);
        assert!(peer.drain_to_close("giant payload").is_empty());
    }
    let mut peer = target.transmitting("rw", Mode::Extended);
    peer.request(flag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 1, (0, 1 << 40));
    assert_eq!(peer.reply(0).expect("told why").1, INVALID);
    peer.drain_to_close("giant filter");
    target.is_unharmed();
}

#[test]
fn malformed_options_are_refused_by_kind() {
    let target = plain();
    let lying_name = |len: u32| [&len.to_be_bytes()[..], b"rw\0\0"].concat();
    let many = [string(b"rw"), 20_000u16.to_be_bytes().to_vec(), vec![0x77; 40_000]].concat();
    let controls = [string("\u{1b}]".repeat(2000).as_bytes()), vec![0, 0]].concat();
    let lying_query = [string(b"rw"), vec![0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat();
    let queries = [string(b"rw"), u32::MAX.to_be_bytes().to_vec()].concat();
    let cases: Vec<(u32, Vec<u8>, u32)> = vec![
        (opt::GO, lying_name(u32::MAX), rep::ERR_INVALID),
        (opt::INFO, lying_name(u32::MAX - 3), rep::ERR_INVALID),
        (opt::GO, lying_name(3), rep::ERR_INVALID),
        (opt::GO, lying_name(5), rep::ERR_INVALID),
        (opt::GO, Vec::new(), rep::ERR_INVALID),
        (opt::INFO, [string(b"rw"), vec![0xff, 0xff]].concat(), rep::ERR_INVALID),
        (opt::INFO, [string(b"rw"), vec![0, 0, 1]].concat(), rep::ERR_INVALID),
        (opt::INFO, many, rep::ACK),
        (opt::GO, [string(b"r\0w"), vec![0, 0]].concat(), rep::ERR_INVALID),
        (opt::GO, [string(b"\xff\xfe"), vec![0, 0]].concat(), rep::ERR_INVALID),
        (opt::GO, [string(&[b'x'; 4097]), vec![0, 0]].concat(), rep::ERR_INVALID),
        (opt::GO, [string(&[b'x'; 4096]), vec![0, 0]].concat(), rep::ERR_UNKNOWN),
        (opt::INFO, controls, rep::ERR_UNKNOWN),
        (opt::LIST, vec![0], rep::ERR_INVALID),
        (opt::STARTTLS, Vec::new(), rep::ERR_POLICY),
        (0x77, vec![5; 60_000], rep::ERR_UNSUP),
        (opt::SET_META_CONTEXT, contexts("rw", &["base:allocation"]), rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, vec![0], rep::ERR_INVALID),
        (opt::STRUCTURED_REPLY, Vec::new(), rep::ACK),
        (opt::STRUCTURED_REPLY, Vec::new(), rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, queries, rep::ERR_TOO_BIG),
        (opt::LIST_META_CONTEXT, lying_query, rep::ERR_INVALID),
        (opt::SET_META_CONTEXT, contexts("other", &[]), rep::ERR_UNKNOWN),
        (opt::EXTENDED_HEADERS, Vec::new(), rep::ACK),
        (opt::STRUCTURED_REPLY, Vec::new(), rep::ERR_EXT_HEADER_REQD),
    ];
    let mut peer = target.greeted();
    for (number, data, want) in cases {
        let (kind, text, before) = peer.ask(number, &data);
        assert_eq!(kind, want, "option {number}: {}", String::from_utf8_lossy(&data[..data.len().min(40)]));
        assert!(before <= 4 && text.len() <= 600, "{before} answers, {} bytes", text.len());
        assert!(!String::from_utf8(text).expect("text").chars().any(char::is_control));
    }
    assert_eq!(peer.ask(opt::GO, &named("rw")).0, rep::ACK, "and still it goes on");
    peer.mode = Mode::Extended;
    peer.is_in_step(&target.bytes);
    drop(peer);
    target.is_unharmed();
}

#[test]
fn what_is_no_handshake_is_closed() {
    let target = plain();
    let head = |magic: u64, number: u32, len: u32| {
        [&magic.to_be_bytes()[..], &number.to_be_bytes(), &len.to_be_bytes()].concat()
    };
    let good = wire::MAGIC_OPTION;
    let cases = [
        ("flags", vec![0xff; 4]),
        ("oldest style", [0u32.to_be_bytes().to_vec(), option(opt::LIST, &[])].concat()),
        ("magic", [vec![0, 0, 0, 3], head(good + 1, opt::LIST, 0)].concat()),
        ("first byte of the magic", vec![0, 0, 0, 3, b'G']),
        ("giant LIST", [vec![0, 0, 0, 3], head(good, opt::LIST, u32::MAX)].concat()),
        ("giant unknown", [vec![0, 0, 0, 3], head(good, 0x1234, 1 << 31)].concat()),
        ("giant name", [vec![0, 0, 0, 3], head(good, opt::EXPORT_NAME, u32::MAX)].concat()),
        ("just too long", [vec![0, 0, 0, 3], head(good, opt::GO, (64 << 10) + 1)].concat()),
        ("no such export", [vec![0, 0, 0, 3], option(opt::EXPORT_NAME, b"other")].concat()),
        ("no name", [vec![0, 0, 0, 3], option(opt::EXPORT_NAME, b"r\0")].concat()),
        ("long name", [vec![0, 0, 0, 3], option(opt::EXPORT_NAME, &[b'r'; 4097])].concat()),
        ("no text", [vec![0, 0, 0, 3], option(opt::EXPORT_NAME, b"\xff")].concat()),
        ("a web browser", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
    ];
    for (why, bytes) in cases {
        let mut peer = target.connected();
        peer.send(&bytes);
        assert!(peer.drain_to_close(why).is_empty(), "{why}");
    }
    let mut peer = target.greeted();
    let flood = option(0x77, &[]).repeat(5000);
    // It is cut in the middle, which the writer may notice or not.
    let mut writer = peer.stream.try_clone().expect("clone");
    let sending = std::thread::spawn(move || drop(writer.write_all(&flood)));
    let mut answers = 0;
    while let Some(head) = peer.take(20) {
        let len = u32::from_be_bytes(head[16..].try_into().unwrap());
        answers += 1;
        if peer.take(len as usize).is_none() {
            break;
        }
    }
    sending.join().expect("thread");
    assert!(answers <= 1000, "{answers} options were answered");
    drop(peer);
    target.is_unharmed();
}

#[test]
fn nothing_in_the_clear_counts_where_tls_is_required() {
    let folder = tempfile::tempdir().expect("folder");
    let tls = ServerTls::from_dir(&crate::nbd::pki(folder.path())).expect("certificates");
    let target = target(Limits::default(), Vec::new(), Some(tls));
    let mut peer = target.greeted();
    for (number, data) in [
        (opt::LIST, vec![]),
        (opt::INFO, named("rw")),
        (opt::GO, named("rw")),
        (opt::GO, named("other")),
        (opt::GO, vec![9]),
        (opt::STRUCTURED_REPLY, vec![]),
        (opt::EXTENDED_HEADERS, vec![]),
        (opt::SET_META_CONTEXT, contexts("rw", &["base:allocation"])),
        (0x77, vec![]),
    ] {
        assert_eq!(peer.ask(number, &data).0, rep::ERR_TLS_REQD, "option {number}");
    }
    assert_eq!(peer.ask(opt::STARTTLS, &[1]).0, rep::ERR_INVALID);
    peer.send(&option(opt::EXPORT_NAME, b"rw"));
    assert!(peer.drain_to_close("a name in the clear").is_empty());

    for glued in [option(opt::GO, &named("rw")), vec![0x16, 3, 1], vec![0]] {
        let mut peer = target.greeted();
        peer.send(&[option(opt::STARTTLS, &[]), glued].concat());
        assert_eq!(peer.answer(opt::STARTTLS).0, rep::ACK);
        assert!(peer.drain_to_close("glued behind the request for TLS").is_empty());
    }
    let mut peer = target.greeted();
    assert_eq!(peer.ask(opt::STARTTLS, &[]).0, rep::ACK);
    peer.send(&option(opt::GO, &named("rw")));
    let said = peer.drain_to_close("in the clear instead of TLS");
    assert!(!said.windows(8).any(|w| w == wire::MAGIC_OPTION_REPLY.to_be_bytes()), "{said:?}");
    assert!(target.server.stop());
    assert_eq!((target.server.stats().open, target.server.stats().panics), (0, 0));
}

#[test]
fn a_session_cut_at_any_byte_leaves_nothing_behind() {
    let target = plain();
    for mode in [Mode::Structured, Mode::Extended] {
        let extended = mode == Mode::Extended;
        let mut session = vec![0, 0, 0, 3];
        session.extend(option(if extended { opt::EXTENDED_HEADERS } else { opt::STRUCTURED_REPLY }, &[]));
        session.extend(option(opt::SET_META_CONTEXT, &contexts("rw", &["base:allocation"])));
        session.extend(option(opt::GO, &named("rw")));
        let write = if extended { flag::PAYLOAD_LEN } else { 0 };
        for (flags, command, len) in [
            (0, cmd::READ, 70_000),
            (write | flag::FUA, cmd::WRITE, 64),
            (0, cmd::BLOCK_STATUS, SIZE - 4096),
            (0, cmd::FLUSH, 0),
            (0, cmd::DISC, 0),
        ] {
            let offset = if len == 0 { 0 } else { 4096 };
            Request { flags, command, cookie: 5, offset, len }.put(mode, &mut session);
            if command == cmd::WRITE {
                session.extend(&target.bytes[4096..4160]);
            }
        }
        for cut in 0..session.len() {
            let mut peer = target.connected();
            peer.send(&session[..cut]);
            // Half of them say that no more comes, and listen; the others are just gone.
            if cut % 2 == 0 {
                peer.stream.shutdown(Shutdown::Write).expect("shutdown");
                peer.drain_to_close("cut");
            }
        }
    }
    target.is_unharmed();
}

/// Extents of lengths around 2^32 on a disk that is longer.
#[test]
fn extents_of_the_longest_ranges_add_up() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("vast");
    let size = (6 << 30) + 4096;
    std::fs::File::create(&path).expect("create").set_len(size).expect("sparse");
    let storage = Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("open"));
    let vast = Export::new("vast", Arc::new(Disk::read_only("vast", door::chain(storage))));
    let target = target(Limits::default(), vec![vast], None);
    for mode in [Mode::Structured, Mode::Extended] {
        let mut peer = target.transmitting("vast", mode);
        let longest = if mode == Mode::Extended { size } else { u64::from(u32::MAX) };
        for (offset, len) in [
            (0, u64::from(u32::MAX)),
            (1, u64::from(u32::MAX)),
            (size - u64::from(u32::MAX), u64::from(u32::MAX)),
            (size - 1, 1),
            (0, longest),
        ] {
            for flags in [0, flag::REQ_ONE] {
                peer.request(flags, cmd::BLOCK_STATUS, 1, (offset, len));
                let (_, errno, payloads) = peer.reply(0).expect("a reply");
                assert_eq!((errno, payloads.len()), (0, 1));
                let wide = mode == Mode::Extended;
                let body = &payloads[0][if wide { 8 } else { 4 }..];
                let lens: Vec<u64> = body
                    .chunks(if wide { 16 } else { 8 })
                    .map(|e| e[..e.len() / 2].iter().fold(0, |n, b| n << 8 | u64::from(*b)))
                    .collect();
                let total: u64 = lens.iter().sum();
                assert!(!lens.is_empty() && !lens.contains(&0) && total <= len, "{lens:?} of {offset}+{len}");
            }
        }
        peer.request(0, cmd::BLOCK_STATUS, 1, (size - u64::from(u32::MAX) + 1, u64::from(u32::MAX)));
        assert_eq!(peer.reply(0).expect("a reply").1, INVALID, "one past the end");
    }
    target.is_unharmed();
}

#[test]
fn idle_handshakes_make_way() {
    let limits = Limits { connections: 4, ..Limits::default() };
    let target = target(limits, Vec::new(), None);
    let mut working = target.transmitting("ro", Mode::Structured);
    let mut idle = Vec::new();
    for round in 0..30 {
        // Some have said hello, some nothing.
        idle.push(if round % 2 == 0 { target.greeted() } else { target.connected() });
        working.is_in_step(&target.bytes);
        assert!(target.server.stats().open <= 4, "{:?}", target.server.stats());
    }
    assert!(target.server.stats().turned_away >= 27, "{:?}", target.server.stats());
    let mut newcomer = target.transmitting("rw", Mode::Simple);
    newcomer.is_in_step(&target.bytes);
    // Those that work are never turned out: with four of them the fifth is.
    let mut others = [target.transmitting("rw", Mode::Simple), target.transmitting("rw", Mode::Simple)];
    others.iter_mut().for_each(|other| other.is_in_step(&target.bytes));
    let mut fifth = UnixStream::connect(target.folder.path().join("s")).expect("connect");
    fifth.set_read_timeout(Some(SOON)).expect("timeout");
    assert_eq!(fifth.read(&mut [0; 18]).expect("closed, not reset"), 0);
    working.is_in_step(&target.bytes);
    newcomer.is_in_step(&target.bytes);
}

#[test]
fn a_handshake_ends_in_time_whatever_the_client_does() {
    let limits = Limits { handshake: Duration::from_millis(400), ..Limits::default() };
    let target = target(limits, Vec::new(), None);
    let began = Instant::now();
    let mut silent = Vec::new();
    for said in [vec![], vec![0, 0], vec![0, 0, 0, 3], option(opt::GO, &named("rw"))[..20].to_vec()] {
        let mut peer = target.connected();
        if said.len() > 4 {
            peer.send(&[0, 0, 0, 3]);
        }
        peer.send(&said);
        silent.push(peer);
    }
    // One that is never silent, with a byte of a long option at a time.
    let mut busy = target.greeted();
    let long = option(0x77, &[1; 60_000]);
    let written = long.iter().take_while(|byte| {
        std::thread::sleep(Duration::from_millis(10));
        busy.stream.write_all(&[**byte]).is_ok()
    });
    assert!(written.count() < 1000, "a byte at a time kept the handshake alive");
    for peer in silent {
        assert!(peer.drain_to_close("deadline").is_empty());
    }
    assert!(began.elapsed() < SOON, "{:?}", began.elapsed());
    drop(busy);
    // Whoever got through has all the time in the world.
    let mut peer = target.transmitting("ro", Mode::Structured);
    std::thread::sleep(Duration::from_millis(900));
    peer.is_in_step(&target.bytes);
    drop(peer);
    target.is_unharmed();
}

/// A peer that takes a long answer in sips has no more time than one that says nothing.
#[test]
fn a_handshake_ends_in_time_however_slowly_the_client_reads() {
    let limits = Limits { handshake: Duration::from_millis(400), ..Limits::default() };
    let disk = door::read_only("m", vec![0; 4096]);
    let wordy = |n: usize| Export { description: "d".repeat(4096), ..Export::new(format!("m{n}"), Arc::clone(&disk)) };
    // Far more than the socket holds, and read so fast that the server never waits long for room.
    let exports = 6000;
    let target = target(limits, (0..exports).map(wordy).collect(), None);
    let mut slow = target.greeted();
    slow.send(&option(opt::LIST, &[]));
    let (mut sip, mut taken) = (vec![0; 200 << 10], 0);
    loop {
        match slow.stream.read(&mut sip) {
            Ok(0) | Err(_) => break,
            Ok(n) => taken += n,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(taken < exports * 4096, "all of it was served");
    drop(slow);
    target.is_unharmed();
}

/// Bytes that wait to be read.
fn waiting(stream: &UnixStream) -> u64 {
    rustix::io::ioctl_fionread(stream).expect("ioctl")
}

/// From the moment a client can know that it was taken in, it makes way for nobody: not even while the answer that
/// says so is still being sent.
#[test]
fn a_client_that_was_taken_in_stays() {
    let name = "r".repeat(4096);
    let export =
        Export { description: "d".repeat(4096), ..Export::new(&*name, door::read_only("r", vec![7; 1 << 20])) };
    let limits = Limits { connections: 5, ..Limits::default() };
    let target = target(limits, vec![export], None);
    let wishes = [string(name.as_bytes()), vec![0, 2, 0, 1, 0, 2]].concat();
    // How many answers of that length the socket holds, for a client that does not read.
    let mut probe = target.greeted();
    let (mut fit, mut len) = (0, 0);
    loop {
        let before = waiting(&probe.stream);
        probe.send(&option(opt::INFO, &wishes));
        let began = Instant::now();
        while waiting(&probe.stream) < before + len.max(1) && began.elapsed() < Duration::from_millis(500) {
            std::thread::sleep(Duration::from_micros(200));
        }
        if len == 0 {
            std::thread::sleep(Duration::from_millis(100));
            len = waiting(&probe.stream);
        }
        if waiting(&probe.stream) < before + len {
            break;
        }
        fit += 1;
    }
    drop(probe);
    let mut working: Vec<Peer> = (0..4).map(|_| target.transmitting("ro", Mode::Simple)).collect();
    let mut last = target.greeted();
    (0..fit).for_each(|_| last.send(&option(opt::INFO, &wishes)));
    last.send(&option(opt::GO, &wishes));
    let began = Instant::now();
    while waiting(&last.stream) < fit * len {
        assert!(began.elapsed() < SOON, "{} of {fit} answers of {len} bytes", waiting(&last.stream));
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(waiting(&last.stream) < (fit + 1) * len, "the answer to GO is still on its way");
    let mut newcomer = UnixStream::connect(target.folder.path().join("s")).expect("connect");
    newcomer.set_read_timeout(Some(SOON)).expect("timeout");
    assert_eq!(newcomer.read(&mut [0; 18]).expect("closed"), 0, "there is no place for it");
    last.take(((fit + 1) * len) as usize).expect("all answers");
    last.request(0, cmd::READ, 1, (0, 512));
    assert_eq!(last.take(16 + 512).expect("a reply")[16..], [7; 512]);
    working.iter_mut().for_each(|peer| peer.is_in_step(&target.bytes));
}

#[test]
fn stop_waits_for_nobody() {
    let held = door::HeldStorage::new(vec![1; 8 << 20]);
    let slow = Export::new("slow", Arc::new(Disk::read_only("slow", door::chain(Arc::clone(&held) as _))));
    let target = target(Limits::default(), vec![slow], None);
    let fresh = target.connected();
    let mut shaking = target.greeted();
    shaking.send(&option(opt::GO, &named("rw"))[..19]);
    let idle = target.transmitting("rw", Mode::Structured);
    let mut writing = target.transmitting("rw", Mode::Simple);
    writing.request(0, cmd::WRITE, 1, (1, 100_000));
    writing.send(&[0; 50_000]);
    let mut deaf = target.transmitting("ro", Mode::Structured);
    for _ in 0..200 {
        deaf.request(0, cmd::READ, 1, (0, SIZE));
    }
    held.hold();
    let mut waiting = target.transmitting("slow", Mode::Simple);
    waiting.request(0, cmd::READ, 1, (0, 4096));
    let began = Instant::now();
    while held.waiting() == 0 {
        assert!(began.elapsed() < SOON, "the read never reached its source");
        std::thread::sleep(Duration::from_millis(2));
    }
    let began = Instant::now();
    assert!(!target.server.stop(), "some had to be cut off");
    let took = began.elapsed();
    held.release();
    assert!(took < Duration::from_secs(5), "{took:?}");
    for peer in [fresh, shaking, idle, writing] {
        peer.drain_to_close("stopped");
    }
    assert_eq!(target.server.stats().panics, 0);
    drop((deaf, waiting));
}
