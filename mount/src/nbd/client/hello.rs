//! The client's side of the handshake, without I/O.
//!
//! Invariants
//! - Where TLS is wanted nothing of the export is asked before it is in force, and a server that will not
//!   is left; where it is not wanted it is not tried.
//! - Each answer belongs to the option that is open, is bounded by [`ANSWER_MAX`], and there are at most
//!   [`ANSWERS_MAX`] per option; contexts are only taken if they were asked for.
//! - [`Offer`] holds checked values: the size fits 63 bits, block sizes are ordered powers of two.
//!
//! Not here: sockets, deadlines, TLS itself.

use crate::nbd::{
    negotiate::Mode,
    wire::{self, Cursor, handshake, info, option as opt, option_reply as rep, transmission},
};

/// Longest answer to an option in bytes.
const ANSWER_MAX: usize = 64 << 10;
/// Most answers to one option.
const ANSWERS_MAX: usize = 10_000;
/// Largest minimum block size that is believed in bytes.
const BLOCK_MIN_MAX: u32 = 64 << 10;

/// What is asked of the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Use an export.
    Transmit,
    /// Names and descriptions of all exports.
    ListExports,
    /// Names of all contexts of the export.
    ListContexts,
}

/// What the client wants.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Name of the export.
    pub export: String,
    /// Contexts of BLOCK_STATUS.
    pub contexts: Vec<String>,
    /// Whether TLS is required.
    pub tls: bool,
    /// What for.
    pub purpose: Purpose,
}

/// What the server offers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags; see [`wire::transmission`].
    pub flags: u16,
    /// Smallest request in bytes; offsets and lengths are multiples of it.
    pub block_min: u32,
    /// Preferred request in bytes.
    pub block_preferred: u32,
    /// Longest READ or WRITE in bytes.
    pub block_max: u32,
    /// How replies look.
    pub mode: Mode,
    /// Contexts the server took, with their numbers.
    pub contexts: Vec<(u32, String)>,
}

/// What to do after a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Send what there is to send and go on; with nothing used, more input is needed.
    More,
    /// Begin TLS; nothing may be left in the input.
    StartTls,
    /// Transmission has begun.
    Ready(Offer),
    /// The list that was wanted: names with descriptions.
    Listed(Vec<(String, String)>),
    /// The server said no, in words that are safe to show.
    Refused(String),
    /// The server broke the protocol.
    Broken(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    Tls,
    Extended,
    Structured,
    Contexts,
    Go,
    ExportName,
    List,
    Over,
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Hello {
    wish: Wish,
    state: State,
    no_zeroes: bool,
    answers: usize,
    listed: Vec<(String, String)>,
    offer: Offer,
    sized: bool,
}

impl Hello {
    /// A fresh connection; the server speaks first.
    pub fn new(wish: Wish) -> Self {
        let offer = Offer {
            size: 0,
            flags: 0,
            block_min: 1,
            block_preferred: 4096,
            block_max: wire::PAYLOAD_MAX,
            mode: Mode::Simple,
            contexts: Vec::new(),
        };
        Self { wish, state: State::Greeting, no_zeroes: false, answers: 0, listed: Vec::new(), offer, sized: false }
    }

    /// TLS is in force: go on with what was wanted.
    pub fn tls_began(&mut self, out: &mut Vec<u8>) {
        self.begin(out);
    }

    /// Takes the next greeting or answer from the front of `input`, appends what to send to `out`, and tells
    /// how many bytes were used.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        match self.state {
            State::Greeting => self.greeting(input, out),
            State::ExportName => self.export_name(input),
            State::Over => (0, Step::Broken("bytes after the end of the handshake".into())),
            _ => self.answer(input, out),
        }
    }

    fn greeting(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        let mut cursor = Cursor::new(input);
        let (Some(magic), Some(style), Some(flags)) = (cursor.u64(), cursor.u64(), cursor.u16()) else {
            return (0, Step::More);
        };
        if magic != wire::MAGIC_NBD {
            return broken("not an NBD server");
        }
        if style != wire::MAGIC_OPTION || flags & handshake::FIXED_NEWSTYLE == 0 {
            return (0, Step::Refused("the server does not speak fixed newstyle".into()));
        }
        self.no_zeroes = flags & handshake::NO_ZEROES != 0;
        out.extend(u32::from(flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES)).to_be_bytes());
        if self.wish.tls {
            self.state = State::Tls;
            put_option(out, opt::STARTTLS, &[]);
        } else {
            self.begin(out);
        }
        (18, Step::More)
    }

    /// First option of what is wanted.
    fn begin(&mut self, out: &mut Vec<u8>) {
        self.ask(
            match self.wish.purpose {
                Purpose::ListExports => State::List,
                Purpose::Transmit | Purpose::ListContexts => State::Extended,
            },
            out,
        );
    }

    /// Sends the option of a state and waits for its answers there.
    fn ask(&mut self, state: State, out: &mut Vec<u8>) {
        self.state = state;
        self.answers = 0;
        match state {
            State::Extended => put_option(out, opt::EXTENDED_HEADERS, &[]),
            State::Structured => put_option(out, opt::STRUCTURED_REPLY, &[]),
            State::List => put_option(out, opt::LIST, &[]),
            State::Contexts => {
                let listing = self.wish.purpose == Purpose::ListContexts;
                let queries: &[String] = if listing { &[] } else { &self.wish.contexts };
                let mut data = Vec::new();
                put_string(&mut data, &self.wish.export);
                data.extend(u32::try_from(queries.len()).unwrap_or(0).to_be_bytes());
                queries.iter().for_each(|query| put_string(&mut data, query));
                put_option(out, if listing { opt::LIST_META_CONTEXT } else { opt::SET_META_CONTEXT }, &data);
            }
            State::Go => {
                let mut data = Vec::new();
                put_string(&mut data, &self.wish.export);
                data.extend(1u16.to_be_bytes());
                data.extend(info::BLOCK_SIZE.to_be_bytes());
                put_option(out, opt::GO, &data);
            }
            State::ExportName => put_option(out, opt::EXPORT_NAME, self.wish.export.as_bytes()),
            State::Greeting | State::Tls | State::Over => {}
        }
    }

    fn option(&self) -> u32 {
        match self.state {
            State::Tls => opt::STARTTLS,
            State::Extended => opt::EXTENDED_HEADERS,
            State::Structured => opt::STRUCTURED_REPLY,
            State::Contexts if self.wish.purpose == Purpose::ListContexts => opt::LIST_META_CONTEXT,
            State::Contexts => opt::SET_META_CONTEXT,
            State::List => opt::LIST,
            _ => opt::GO,
        }
    }

    fn answer(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
        let mut cursor = Cursor::new(input);
        let (Some(magic), Some(option), Some(kind), Some(len)) =
            (cursor.u64(), cursor.u32(), cursor.u32(), cursor.u32())
        else {
            return (0, Step::More);
        };
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if magic != wire::MAGIC_OPTION_REPLY || option != self.option() {
            return broken("an answer to something that was not asked");
        }
        if len > ANSWER_MAX {
            return broken("an answer too long to be one");
        }
        let Some(data) = cursor.take(len) else { return (0, Step::More) };
        self.answers += 1;
        if self.answers > ANSWERS_MAX {
            return broken("answers without end");
        }
        let step = match kind {
            rep::ACK => self.acknowledged(out),
            _ if kind & rep::ERROR_BIT != 0 => self.refused(kind, data, out),
            _ => self.piece(kind, data),
        };
        (wire::OPTION_REPLY_LEN + len, step)
    }

    fn acknowledged(&mut self, out: &mut Vec<u8>) -> Step {
        match self.state {
            State::Tls => return Step::StartTls,
            State::Extended | State::Structured => {
                let extended = self.state == State::Extended;
                self.offer.mode = if extended { Mode::Extended } else { Mode::Structured };
                let wanted = self.wish.purpose == Purpose::ListContexts || !self.wish.contexts.is_empty();
                self.ask(if wanted { State::Contexts } else { State::Go }, out);
            }
            State::Contexts if self.wish.purpose == Purpose::Transmit => self.ask(State::Go, out),
            State::List | State::Contexts => {
                self.state = State::Over;
                put_option(out, opt::ABORT, &[]);
                return Step::Listed(std::mem::take(&mut self.listed));
            }
            _ if !self.sized => return Step::Broken("no size was told".into()),
            _ => {
                self.state = State::Over;
                return self.checked();
            }
        }
        Step::More
    }

    /// A refusal ends the handshake only where there is no other way.
    fn refused(&mut self, kind: u32, text: &[u8], out: &mut Vec<u8>) -> Step {
        let unknown = matches!(kind, rep::ERR_UNSUP | rep::ERR_POLICY | rep::ERR_INVALID | rep::ERR_TOO_BIG);
        match self.state {
            State::Extended => self.ask(State::Structured, out),
            State::Structured if self.wish.purpose == Purpose::ListContexts => {
                return Step::Listed(Vec::new());
            }
            State::Structured => self.ask(State::Go, out),
            State::Contexts if self.wish.purpose == Purpose::Transmit => {
                self.offer.contexts.clear();
                self.ask(State::Go, out);
            }
            // The option itself is not known: the export may still be there for the asking.
            State::Go if kind == rep::ERR_UNSUP => self.ask(State::ExportName, out),
            State::Contexts if unknown => return Step::Listed(Vec::new()),
            _ => return Step::Refused(words(kind, text)),
        }
        Step::More
    }

    fn piece(&mut self, kind: u32, data: &[u8]) -> Step {
        let mut cursor = Cursor::new(data);
        let taken = match (self.state, kind) {
            (State::List, rep::SERVER) => cursor.string().map(|name| {
                let description = String::from_utf8_lossy(cursor.rest()).into_owned();
                self.listed.push((name.to_owned(), wire::shown(&description)));
            }),
            (State::Contexts, rep::META_CONTEXT) => {
                let id = cursor.u32();
                let name = id.and_then(|_| wire::text(cursor.rest()));
                id.zip(name).and_then(|(id, name)| self.context(id, name))
            }
            (State::Go, rep::INFO) => self.info(&mut cursor),
            _ => None,
        };
        match taken {
            Some(()) => Step::More,
            None => Step::Broken(format!("answer of kind {kind:#x} is malformed or out of place")),
        }
    }

    /// A context only counts if it was asked for, and once.
    fn context(&mut self, id: u32, name: &str) -> Option<()> {
        if self.wish.purpose == Purpose::ListContexts {
            self.listed.push((name.to_owned(), String::new()));
            return Some(());
        }
        let known = self.offer.contexts.iter().any(|(other, text)| *other == id || text == name);
        if known || !self.wish.contexts.iter().any(|wanted| wanted == name) {
            return None;
        }
        self.offer.contexts.push((id, name.to_owned()));
        Some(())
    }

    fn info(&mut self, cursor: &mut Cursor<'_>) -> Option<()> {
        match cursor.u16()? {
            info::EXPORT => {
                self.offer.size = cursor.u64()?;
                self.offer.flags = cursor.u16()?;
                self.sized = true;
                cursor.is_empty().then_some(())
            }
            info::BLOCK_SIZE => {
                self.offer.block_min = cursor.u32()?;
                self.offer.block_preferred = cursor.u32()?;
                self.offer.block_max = cursor.u32()?;
                cursor.is_empty().then_some(())
            }
            // What was not asked for may be sent all the same, and means nothing.
            _ => Some(()),
        }
    }

    fn export_name(&mut self, input: &[u8]) -> (usize, Step) {
        let len = if self.no_zeroes { 10 } else { 134 };
        let mut cursor = Cursor::new(input);
        if input.len() < len {
            return (0, Step::More);
        }
        let (Some(size), Some(flags)) = (cursor.u64(), cursor.u16()) else { return (0, Step::More) };
        self.offer.size = size;
        self.offer.flags = flags;
        self.state = State::Over;
        (len, self.checked())
    }

    fn checked(&mut self) -> Step {
        let Offer { size, flags, block_min, block_preferred, block_max, .. } = self.offer;
        if i64::try_from(size).is_err() {
            return Step::Broken(format!("a size of {size} bytes"));
        }
        if flags & transmission::HAS_FLAGS == 0 {
            return Step::Broken("transmission flags without their mark".into());
        }
        let ordered = block_min <= block_preferred && block_preferred <= block_max;
        if !block_min.is_power_of_two() || !block_preferred.is_power_of_two() || !ordered || block_min > BLOCK_MIN_MAX {
            return Step::Broken(format!("block sizes {block_min}, {block_preferred}, {block_max}"));
        }
        self.offer.block_max = (block_max - block_max % block_min).min(wire::PAYLOAD_MAX);
        Step::Ready(self.offer.clone())
    }
}

fn broken(what: &str) -> (usize, Step) {
    (0, Step::Broken(what.into()))
}

fn words(kind: u32, text: &[u8]) -> String {
    let said = wire::shown(&String::from_utf8_lossy(text));
    let phrase = match kind {
        rep::ERR_UNSUP => "not supported",
        rep::ERR_POLICY => "forbidden",
        rep::ERR_TLS_REQD => "TLS is required",
        rep::ERR_UNKNOWN => "no such export",
        rep::ERR_SHUTDOWN => "the server is stopping",
        rep::ERR_BLOCK_SIZE_REQD => "block sizes are required",
        _ => "not possible",
    };
    if said.is_empty() { phrase.into() } else { format!("{phrase} ({said})") }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text.as_bytes());
}

fn put_option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend(wire::MAGIC_OPTION.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
    out.extend(data);
}
