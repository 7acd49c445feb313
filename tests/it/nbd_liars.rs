//! Promise: whatever a server answers, our NBD client delivers what was asked for or an error, soon: bytes that
//! did not come are never made up, and nobody is waited for in vain.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use aquifer_mount::nbd::{
    Address, Client, ClientOptions, Error,
    address::Place,
    client::list_exports,
    negotiate::Mode,
    reply::{self, Chunk, DataHead},
    request::Request,
    wire::{self, chunk, info, option as opt, option_reply as rep},
};

const SIZE: u64 = 1 << 20;
/// The read that is lied about.
const AT: u64 = 4096;
const LEN: u64 = 8192;
/// Longest that a client may take to find out.
const SOON: Duration = Duration::from_secs(6);
const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Answers to an option, in place of the true ones.
type Lie = Box<dyn Fn(u32) -> Option<Vec<u8>> + Send>;
/// What follows a request.
type Answer = Box<dyn Fn(&Request) -> Vec<u8> + Send>;

/// What a server says.
struct Script {
    mode: Mode,
    greeting: Vec<u8>,
    lie: Lie,
    answer: Answer,
    /// Whether it closes the connection behind an answer to a request, or keeps silent.
    hangs_up: bool,
}

impl Script {
    fn honest(mode: Mode) -> Self {
        let greeting = [&wire::MAGIC_NBD.to_be_bytes()[..], &wire::MAGIC_OPTION.to_be_bytes(), &[0, 3]].concat();
        Self {
            mode,
            greeting,
            lie: Box::new(|_| None),
            answer: Box::new(move |request| good(mode, request)),
            hangs_up: false,
        }
    }
}

fn said(option: u32, kind: u32, payload: &[u8]) -> Vec<u8> {
    let len = payload.len() as u32;
    let head = [&wire::MAGIC_OPTION_REPLY.to_be_bytes()[..], &option.to_be_bytes(), &kind.to_be_bytes()].concat();
    [head, len.to_be_bytes().to_vec(), payload.to_vec()].concat()
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    said(opt::GO, rep::INFO, &[&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat())
}

fn blocks(sizes: [u32; 3]) -> Vec<u8> {
    let sizes: Vec<u8> = sizes.iter().flat_map(|size| size.to_be_bytes()).collect();
    said(opt::GO, rep::INFO, &[&info::BLOCK_SIZE.to_be_bytes()[..], &sizes].concat())
}

fn ack(option: u32) -> Vec<u8> {
    said(option, rep::ACK, &[])
}

fn context(id: u32, name: &str) -> Vec<u8> {
    said(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

fn truth(mode: Mode, option: u32) -> Vec<u8> {
    match option {
        opt::EXTENDED_HEADERS if mode == Mode::Extended => ack(option),
        opt::STRUCTURED_REPLY if mode == Mode::Structured => ack(option),
        opt::SET_META_CONTEXT => [context(1, wire::CONTEXT_ALLOCATION), ack(option)].concat(),
        opt::GO => [export(SIZE, 1), blocks([1, 4096, 1 << 20]), ack(option)].concat(),
        _ => said(option, rep::ERR_UNSUP, b""),
    }
}

/// The byte of the disk at an offset, never 0.
fn byte(at: u64) -> u8 {
    (at % 255) as u8 + 1
}

fn disk(at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(byte).collect()
}

fn data(mode: Mode, request: &Request, at: u64, bytes: &[u8], done: bool) -> Vec<u8> {
    let head = DataHead { cookie: request.cookie, request: request.offset, offset: at, len: bytes.len() as u64, done };
    let mut out = Vec::new();
    reply::put_data(&mut out, mode, head);
    out.extend(bytes);
    out
}

fn any(mode: Mode, request: &Request, kind: u16, payload: &[u8], done: bool) -> Vec<u8> {
    let (cookie, offset, len) = (request.cookie, request.offset, payload.len() as u64);
    let mut out = Vec::new();
    reply::put_chunk(&mut out, mode, &Chunk { done, kind, cookie, offset, len });
    out.extend(payload);
    out
}

fn hole(at: u64, len: u32) -> Vec<u8> {
    [&at.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn good(mode: Mode, request: &Request) -> Vec<u8> {
    data(mode, request, request.offset, &disk(request.offset, request.len), true)
}

/// A server that keeps to its script, one connection after the other.
struct Liar {
    address: Address,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    folder: tempfile::TempDir,
}

fn liar(script: Script) -> Liar {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).expect("bind");
    let over = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&over);
    let thread = std::thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            if seen.load(Ordering::SeqCst) {
                return;
            }
            // However the client goes away, the next one is served.
            let _ = converse(stream, &script);
        }
    });
    let address = Address { place: Place::Unix(path), export: String::new(), tls: false };
    Liar { address, over, thread: Some(thread), folder }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        drop(UnixStream::connect(self.folder.path().join("s")));
        let ended = self.thread.take().is_none_or(|thread| thread.join().is_ok());
        assert!(ended || std::thread::panicking(), "the script broke");
    }
}

fn converse(mut stream: UnixStream, script: &Script) -> std::io::Result<()> {
    stream.set_read_timeout(Some(SOON))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.write_all(&script.greeting)?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let mut fields = wire::Cursor::new(&head[8..]);
        let (option, len) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(0));
        stream.read_exact(&mut vec![0; len as usize])?;
        let lie = (script.lie)(option);
        stream.write_all(&lie.unwrap_or_else(|| truth(script.mode, option)))?;
        if option == opt::GO {
            break;
        }
    }
    let mut head = vec![0; Request::header_len(script.mode)];
    loop {
        stream.read_exact(&mut head)?;
        if let Ok(Some(request)) = Request::parse(&head, script.mode) {
            stream.write_all(&(script.answer)(&request))?;
        }
        if script.hangs_up {
            return Ok(());
        }
    }
}

fn options() -> ClientOptions {
    ClientOptions {
        connections: 1,
        connect_timeout: Duration::from_secs(1),
        patience: Duration::from_secs(1),
        reconnect: Duration::ZERO,
        ..ClientOptions::default()
    }
}

/// `work` ends soon.
fn soon<T>(what: &str, work: impl FnOnce() -> T) -> T {
    let began = Instant::now();
    let out = work();
    assert!(began.elapsed() < SOON, "{what} took {:?}", began.elapsed());
    out
}

/// Reads from a server that answers so.
fn read_from(mode: Mode, len: u64, hangs_up: bool, answer: Answer) -> Result<Vec<u8>, Error> {
    let server = liar(Script { answer, hangs_up, ..Script::honest(mode) });
    soon("a read", || {
        let client = Client::connect(&server.address, &options()).expect("the handshake is true");
        let mut out = vec![0; len as usize];
        client.read(AT, &mut out).map(|()| out)
    })
}

#[test]
fn what_no_reply_to_a_read_may_be() {
    type Make = fn(Mode, &Request) -> Vec<u8>;
    let lies: &[(&str, Make)] = &[
        ("before the request", |m, r| data(m, r, AT - 1, &disk(AT - 1, LEN), true)),
        ("behind the request", |m, r| data(m, r, AT + LEN, &disk(AT, 1), true)),
        ("across the end", |m, r| data(m, r, AT + 1, &disk(AT + 1, LEN), true)),
        ("at the end of all offsets", |m, r| data(m, r, u64::MAX, &disk(AT, 2), true)),
        ("twice", |m, r| [data(m, r, AT, &disk(AT, LEN), false), data(m, r, AT, &disk(AT, LEN), true)].concat()),
        ("overlapping by one", |m, r| {
            [data(m, r, AT, &disk(AT, 4097), false), data(m, r, AT + 4096, &disk(AT + 4096, 4096), true)].concat()
        }),
        ("a hole over data", |m, r| {
            [data(m, r, AT, &disk(AT, LEN), false), any(m, r, chunk::OFFSET_HOLE, &hole(AT, 512), true)].concat()
        }),
        ("a hole outside", |m, r| any(m, r, chunk::OFFSET_HOLE, &hole(AT, u32::MAX), true)),
        ("an empty hole", |m, r| any(m, r, chunk::OFFSET_HOLE, &hole(AT, 0), true)),
        ("a short hole", |m, r| any(m, r, chunk::OFFSET_HOLE, &hole(AT, 1)[..11], true)),
        ("an empty chunk of data", |m, r| data(m, r, AT, &[], true)),
        ("no offset", |m, r| any(m, r, chunk::OFFSET_DATA, &[0; 7], true)),
        ("the first half", |m, r| data(m, r, AT, &disk(AT, LEN / 2), true)),
        ("the second half", |m, r| data(m, r, AT + LEN / 2, &disk(AT, LEN / 2), true)),
        ("all but a byte in the middle", |m, r| {
            [data(m, r, AT, &disk(AT, 100), false), data(m, r, AT + 101, &disk(AT + 101, LEN - 101), true)].concat()
        }),
        ("nothing", |m, r| any(m, r, chunk::NONE, &[], true)),
        ("nothing, and not the end", |m, r| any(m, r, chunk::NONE, &[], false)),
        ("nothing with a payload", |m, r| any(m, r, chunk::NONE, &[1; 8], true)),
        ("another's cookie", |m, r| good(m, &Request { cookie: r.cookie + 1, ..*r })),
        ("the highest cookie", |m, r| good(m, &Request { cookie: u64::MAX, ..*r })),
        ("a simple success", |_, r| {
            let mut out = Vec::new();
            reply::put_simple(&mut out, r.cookie, 0);
            [out, disk(AT, LEN)].concat()
        }),
        ("extents", |m, r| any(m, r, chunk::BLOCK_STATUS, &[0; 12], true)),
        ("an unknown kind", |m, r| any(m, r, 77, &[0; 64], true)),
        ("an unknown error", |m, r| any(m, r, chunk::ERROR_BIT | 99, &[0, 0, 0, 5, 0, 0], true)),
        ("an error without a number", |m, r| any(m, r, chunk::ERROR, &[0; 6], true)),
        ("an error cut short", |m, r| any(m, r, chunk::ERROR, &[0, 0, 0, 5], true)),
        ("an error whose text is longer than it", |m, r| any(m, r, chunk::ERROR, &[0, 0, 0, 5, 255, 255, 65], true)),
        ("an error of a megabyte", |m, r| any(m, r, chunk::ERROR, &[1; 1 << 20], true)),
        ("an error behind all data", |m, r| {
            [data(m, r, AT, &disk(AT, LEN), false), any(m, r, chunk::ERROR, &[0, 0, 0, 5, 0, 0], true)].concat()
        }),
        ("a reply before its request", |m, r| [good(m, &Request { cookie: r.cookie + 9, ..*r }), good(m, r)].concat()),
        ("no magic", |_, _| vec![0x67; 64]),
        ("the other magic", |m, r| good(if m == Mode::Extended { Mode::Structured } else { Mode::Extended }, r)),
    ];
    for mode in [Mode::Structured, Mode::Extended] {
        for &(what, make) in lies {
            let told = read_from(mode, LEN, false, Box::new(move |request| make(mode, request)));
            let error = told.expect_err(what);
            assert!(error.to_string().len() < 1000, "{what}: {error}");
        }
        // Headers that announce more than there is.
        for announced in [LEN + 9, 1 << 31, u64::from(u32::MAX)] {
            let lie = move |request: &Request| {
                let mut out = Vec::new();
                let head =
                    Chunk { done: true, kind: chunk::OFFSET_DATA, cookie: request.cookie, offset: AT, len: announced };
                reply::put_chunk(&mut out, mode, &head);
                [out, AT.to_be_bytes().to_vec(), disk(AT, LEN)].concat()
            };
            read_from(mode, LEN, false, Box::new(lie)).expect_err("a long chunk");
        }
    }
    let elsewhere = |r: &Request| good(Mode::Extended, &Request { offset: r.offset + 1, ..*r });
    read_from(Mode::Extended, LEN, false, Box::new(elsewhere)).expect_err("another request's offset");
    for cookie in [0, u64::MAX] {
        let stray = move |r: &Request| good(Mode::Simple, &Request { cookie, ..*r });
        read_from(Mode::Simple, LEN, false, Box::new(stray)).expect_err("another's cookie");
    }
}

/// What is true, in one piece or several and in any order, is taken: the cases above fail for their lies.
#[test]
fn true_replies_are_taken() {
    for mode in MODES {
        let told = read_from(mode, LEN, false, Box::new(move |request| good(mode, request)));
        assert!(told.expect("a true reply") == disk(AT, LEN), "{mode:?}");
    }
    for mode in [Mode::Structured, Mode::Extended] {
        let told = read_from(
            mode,
            LEN,
            false,
            Box::new(move |r| {
                let parts = [
                    data(mode, r, AT + 4096, &disk(AT + 4096, 4000), false),
                    any(mode, r, chunk::OFFSET_HOLE, &hole(AT + 8096, 96), false),
                    data(mode, r, AT, &disk(AT, 4096), false),
                    any(mode, r, chunk::NONE, &[], true),
                ];
                parts.concat()
            }),
        );
        assert!(told.expect("a true reply") == [disk(AT, 8096), vec![0; 96]].concat(), "{mode:?}");
    }
}

#[test]
fn a_reply_cut_at_any_byte_is_an_error() {
    const SHORT: u64 = 64;
    for mode in MODES {
        let whole = reply::data_header_len(mode) + SHORT as usize;
        for cut in 0..=whole {
            let answer = move |request: &Request| good(mode, request)[..cut].to_vec();
            match read_from(mode, SHORT, true, Box::new(answer)) {
                Ok(bytes) => assert!(cut == whole && bytes == disk(AT, SHORT), "{mode:?} cut at {cut}"),
                Err(error) => assert!(cut < whole, "{mode:?} cut at {cut}: {error}"),
            }
        }
        // Silence in place of the rest.
        let cut = match mode {
            Mode::Simple => 0,
            Mode::Structured => 5,
            Mode::Extended => whole - 1,
        };
        let answer = move |request: &Request| good(mode, request)[..cut].to_vec();
        read_from(mode, SHORT, false, Box::new(answer)).expect_err("silence");
    }
}

/// Neither a reply without end nor a server that breaks each new connection is followed for ever.
#[test]
fn lies_without_end_are_not_listened_to() {
    for mode in [Mode::Structured, Mode::Extended] {
        let endless = move |r: &Request| any(mode, r, chunk::ERROR, &[0, 0, 0, 5, 0, 0], false).repeat(100_000);
        let error = read_from(mode, LEN, false, Box::new(endless)).expect_err("errors without end");
        assert!(error.to_string().contains("without end"), "{error}");
    }
    let answer = Box::new(|_: &Request| vec![0; 64]);
    let server = liar(Script { answer, ..Script::honest(Mode::Structured) });
    let options = ClientOptions { reconnect: Duration::from_millis(300), ..options() };
    soon("a read that is lied about each time", || {
        let client = Client::connect(&server.address, &options).expect("connect");
        client.read(AT, &mut [0; 512]).expect_err("a lie each time");
    });
}

/// A server that breaks the protocol is given a few more chances, further and further apart, and then an error.
#[test]
fn a_server_that_lies_each_time_is_asked_a_few_times_only() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&asked);
    let answer = Box::new(move |_: &Request| {
        counted.fetch_add(1, Ordering::SeqCst);
        vec![0; 64]
    });
    let server = liar(Script { answer, ..Script::honest(Mode::Structured) });
    let options = ClientOptions { reconnect: Duration::from_secs(60), ..options() };
    let client = Arc::new(Client::connect(&server.address, &options).expect("connect"));
    let began = Instant::now();
    let error = soon("a read", || client.read(AT, &mut [0; 512]).expect_err("a lie each time"));
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    assert_eq!(asked.swap(0, Ordering::SeqCst), 4);
    assert!(began.elapsed() >= Duration::from_millis(20 + 40), "{:?}", began.elapsed());
    let mut queue = client.queue().expect("a connection");
    queue.read(7, AT, 512, Vec::new());
    let done = soon("a queue", || queue.complete().expect("a completion"));
    assert!(done.tag == 7 && matches!(done.result, Err(Error::Protocol { .. })), "{done:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 4);
}

#[test]
fn what_no_answer_about_extents_may_be() {
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<u8>>();
    let lies: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("no extent", vec![words(&[1])]),
        ("an empty extent", vec![words(&[1, 0, 0])]),
        ("an empty extent behind another", vec![words(&[1, 4096, 0, 0, 3])]),
        ("half an extent", vec![words(&[1, 4096])]),
        ("no context", vec![vec![0, 0]]),
        ("another context", vec![words(&[2, 4096, 0])]),
        ("the same context twice", vec![words(&[1, 4096, 0]), words(&[1, 4096, 3])]),
    ];
    let status = |payloads: Vec<Vec<u8>>, kind: u16| {
        let answer = move |r: &Request| {
            let mut out = Vec::new();
            payloads.iter().for_each(|payload| out.extend(any(Mode::Structured, r, kind, payload, false)));
            out.extend(any(Mode::Structured, r, chunk::NONE, &[], true));
            out
        };
        let server = liar(Script { answer: Box::new(answer), ..Script::honest(Mode::Structured) });
        soon("a question", || {
            let client = Client::connect(&server.address, &options()).expect("connect");
            client.status(wire::CONTEXT_ALLOCATION, AT, LEN)
        })
    };
    for (what, payloads) in lies {
        assert!(status(payloads, chunk::BLOCK_STATUS).is_err(), "{what}");
    }
    assert!(status(Vec::new(), chunk::BLOCK_STATUS).is_err(), "nothing");
    assert!(status(vec![words(&[1, 9, 0, 4096, 0, 0])], chunk::BLOCK_STATUS_EXT).is_err(), "a wrong count");
    assert!(status(vec![vec![0; 16]], chunk::OFFSET_DATA).is_err(), "data");
    let told = status(vec![words(&[1, u32::MAX, 3])], chunk::BLOCK_STATUS).expect("an extent past the question");
    assert_eq!((told.len(), told[0].offset, told[0].len), (1, AT, LEN), "is cut");
}

fn connect(script: Script) -> Result<Client, Error> {
    let server = liar(script);
    soon("a handshake", || Client::connect(&server.address, &options()))
}

#[test]
fn handshakes_that_cannot_be_true() {
    let go = |parts: &[Vec<u8>]| [parts.concat(), ack(opt::GO)].concat();
    let sizes = [1, 4096, 1 << 20];
    let lies: Vec<(&str, u32, Vec<u8>)> = vec![
        ("a size of 2^63", opt::GO, go(&[export(1 << 63, 1), blocks(sizes)])),
        ("a size of 2^64 - 1", opt::GO, go(&[export(u64::MAX, 1), blocks(sizes)])),
        ("no size", opt::GO, go(&[blocks(sizes)])),
        ("no mark in the flags", opt::GO, go(&[export(SIZE, 0), blocks(sizes)])),
        ("smallest block of 0", opt::GO, go(&[export(SIZE, 1), blocks([0, 4096, 1 << 20])])),
        ("smallest block of 3", opt::GO, go(&[export(SIZE, 1), blocks([3, 4096, 1 << 20])])),
        ("preferred block of 1000", opt::GO, go(&[export(SIZE, 1), blocks([512, 1000, 1 << 20])])),
        ("smallest above preferred", opt::GO, go(&[export(SIZE, 1), blocks([8192, 4096, 1 << 20])])),
        ("preferred above largest", opt::GO, go(&[export(SIZE, 1), blocks([1, 4096, 512])])),
        ("vast smallest block", opt::GO, go(&[export(SIZE, 1), blocks([1 << 31, 1 << 31, u32::MAX])])),
        ("a short size", opt::GO, go(&[said(opt::GO, rep::INFO, &[0, 0, 1])])),
        ("a long size", opt::GO, go(&[said(opt::GO, rep::INFO, &[0; 13])])),
        ("an info without kind", opt::GO, go(&[said(opt::GO, rep::INFO, &[0])])),
        ("answers to another option", opt::GO, ack(opt::LIST)),
        ("no magic", opt::STRUCTURED_REPLY, vec![7; 20]),
        ("a giant answer", opt::GO, [&ack(opt::GO)[..16], &u32::MAX.to_be_bytes()].concat()),
        ("a long answer", opt::GO, said(opt::GO, rep::INFO, &vec![9; (64 << 10) + 1])),
        ("answers without end", opt::GO, said(opt::GO, rep::INFO, &[0, 99]).repeat(11_000)),
        ("a long refusal", opt::GO, said(opt::GO, rep::ERR_UNKNOWN, &[b'!'; 60_000])),
        ("a refusal of control characters", opt::GO, said(opt::GO, rep::ERR_POLICY, &[0x1b; 60_000])),
        ("a context nobody wanted", opt::SET_META_CONTEXT, [context(1, "x:y"), ack(opt::SET_META_CONTEXT)].concat()),
        ("a context twice", opt::SET_META_CONTEXT, context(1, wire::CONTEXT_ALLOCATION).repeat(2)),
        ("a context without name", opt::SET_META_CONTEXT, said(opt::SET_META_CONTEXT, rep::META_CONTEXT, &[0; 3])),
        ("bytes behind the end", opt::GO, [go(&[export(SIZE, 1)]), vec![0; 4]].concat()),
        ("silence", opt::GO, Vec::new()),
        ("half an answer", opt::GO, ack(opt::GO)[..11].to_vec()),
    ];
    for (what, number, bytes) in lies {
        let lie = Box::new(move |option| (option == number).then(|| bytes.clone()));
        let error = connect(Script { lie, ..Script::honest(Mode::Structured) }).expect_err(what);
        let text = error.to_string();
        assert!(text.len() < 1000 && !text.chars().any(char::is_control), "{what}: {} bytes: {text}", text.len());
    }
    let old = [&wire::MAGIC_NBD.to_be_bytes()[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 136]].concat();
    let unfixed = [&wire::MAGIC_NBD.to_be_bytes()[..], &wire::MAGIC_OPTION.to_be_bytes(), &[0, 2]].concat();
    for greeting in [old, unfixed, b"SSH-2.0-OpenSSH_9.9\r\n".to_vec(), vec![0; 18], vec![]] {
        connect(Script { greeting, ..Script::honest(Mode::Structured) }).expect_err("no greeting");
    }
    connect(Script::honest(Mode::Structured)).expect("the truth");
}

#[test]
fn lists_without_end_are_bounded() {
    let entry = said(opt::LIST, rep::SERVER, &[0, 0, 0, 1, b'a']);
    let malformed = said(opt::LIST, rep::SERVER, &[0xff, 0xff, 0xff, 0xff, b'a']);
    for bytes in [entry.repeat(11_000), malformed] {
        let lie = Box::new(move |option| (option == opt::LIST).then(|| bytes.clone()));
        let server = liar(Script { lie, ..Script::honest(Mode::Simple) });
        assert!(soon("a list", || list_exports(&server.address, &options())).is_err());
    }
}
