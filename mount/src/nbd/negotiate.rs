//! The server's side of the handshake, without I/O.
//!
//! Invariants
//! - [`Negotiation::advance`] takes one greeting or one whole option at a time; an option longer than
//!   [`OPTION_MAX`] ends the connection instead of being drained.
//! - At most [`OPTIONS_MAX`] options; at most [`QUERIES_MAX`] context queries in one of them.
//! - Where TLS is required nothing but `STARTTLS` and `ABORT` has an effect before it, and
//!   [`Negotiation::tls_began`] forgets all that was chosen.
//! - Replies never carry more than 256 bytes of what the client sent.
//!
//! Not here: deadlines, sockets, TLS itself.

use std::sync::Arc;

use super::{
    export::Export,
    wire::{self, Cursor, handshake, info, option as opt, option_reply as rep},
};

/// Longest option in bytes.
pub const OPTION_MAX: usize = 64 << 10;
/// Options a client may send in all.
pub const OPTIONS_MAX: u32 = 1_000;
/// Context queries in one option.
pub const QUERIES_MAX: u32 = 64;
/// Preferred request size in bytes: one block of the native format.
pub const BLOCK_PREFERRED: u32 = 64 << 10;

/// The exports of a server, in order of offering.
pub type Catalogue = Arc<[Arc<Export>]>;

/// Where a connection stands with TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsState {
    /// Not set up on this listener.
    Off,
    /// Must come before anything else.
    Required,
    /// In force.
    Active,
}

/// How replies look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// A header and the bytes.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with 64-bit lengths.
    Extended,
}

/// What a context tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContextKind {
    /// `base:allocation`.
    Allocation,
    /// The dirty context with this index in [`Export::contexts`].
    Dirty(usize),
}

/// A context the client chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Number in replies.
    pub id: u32,
    /// What it tells.
    pub kind: ContextKind,
}

/// What both sides agreed on.
#[derive(Clone, Debug)]
pub struct Agreed {
    /// The export.
    pub export: Arc<Export>,
    /// How replies look.
    pub mode: Mode,
    /// Contexts of BLOCK_STATUS, in the order of their ids.
    pub contexts: Vec<Context>,
}

/// What to do after a step.
#[derive(Debug)]
pub enum Outcome {
    /// Send what there is to send and go on; with nothing used, more input is needed.
    More,
    /// Send what there is to send, then begin TLS; nothing may be left in the input.
    StartTls,
    /// Send what there is to send, then begin transmission.
    Begin(Agreed),
    /// Send what there is to send, then close.
    End(&'static str),
}

/// The handshake of one connection.
#[derive(Debug)]
pub struct Negotiation {
    catalogue: Catalogue,
    tls: TlsState,
    greeted: bool,
    fixed: bool,
    no_zeroes: bool,
    options: u32,
    mode: Mode,
    contexts: Option<(String, Vec<Context>)>,
}

impl Negotiation {
    /// A fresh connection; [`Negotiation::greeting`] goes first.
    pub fn new(catalogue: Catalogue, tls: TlsState) -> Self {
        Self {
            catalogue,
            tls,
            greeted: false,
            fixed: false,
            no_zeroes: false,
            options: 0,
            mode: Mode::Simple,
            contexts: None,
        }
    }

    /// What the server says first.
    pub fn greeting(&self, out: &mut Vec<u8>) {
        out.extend(wire::MAGIC_NBD.to_be_bytes());
        out.extend(wire::MAGIC_OPTION.to_be_bytes());
        out.extend((handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES).to_be_bytes());
    }

    /// TLS is in force: everything chosen in the clear is forgotten.
    pub fn tls_began(&mut self) {
        self.tls = TlsState::Active;
        self.mode = Mode::Simple;
        self.contexts = None;
    }

    /// Takes the next greeting or option from the front of `input`, appends the answer to `out`, and
    /// tells how many bytes were used.
    pub fn advance(&mut self, input: &[u8], out: &mut Vec<u8>) -> (usize, Outcome) {
        let mut cursor = Cursor::new(input);
        if !self.greeted {
            return match cursor.u32() {
                None => (0, Outcome::More),
                Some(flags) => (4, self.client_flags(flags)),
            };
        }
        let (Some(magic), Some(number), Some(len)) = (cursor.u64(), cursor.u32(), cursor.u32()) else {
            return (0, self.refuse_early(input));
        };
        if magic != wire::MAGIC_OPTION {
            return (0, Outcome::End("option without its magic"));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > OPTION_MAX {
            return (0, Outcome::End("option too long"));
        }
        let Some(data) = cursor.take(len) else { return (0, Outcome::More) };
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return (0, Outcome::End("too many options"));
        }
        (wire::OPTION_LEN + len, self.option(number, data, out))
    }

    /// A wrong magic is refused with its first wrong byte, not after sixteen.
    fn refuse_early(&self, input: &[u8]) -> Outcome {
        let magic = wire::MAGIC_OPTION.to_be_bytes();
        if input.iter().zip(magic).all(|(have, want)| *have == want) {
            Outcome::More
        } else {
            Outcome::End("option without its magic")
        }
    }

    fn client_flags(&mut self, flags: u32) -> Outcome {
        let (fixed, no_zeroes) = (u32::from(handshake::FIXED_NEWSTYLE), u32::from(handshake::NO_ZEROES));
        if flags & !(fixed | no_zeroes) != 0 {
            return Outcome::End("unknown handshake flags");
        }
        self.greeted = true;
        self.fixed = flags & fixed != 0;
        self.no_zeroes = flags & no_zeroes != 0;
        Outcome::More
    }

    fn option(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        if !self.fixed && number != opt::EXPORT_NAME {
            return Outcome::End("an option other than the export's name from a client without fixed newstyle");
        }
        if self.tls == TlsState::Required && !matches!(number, opt::STARTTLS | opt::ABORT) {
            if number == opt::EXPORT_NAME {
                return Outcome::End("an export was named before TLS");
            }
            refuse(out, number, rep::ERR_TLS_REQD, "TLS is required");
            return Outcome::More;
        }
        match number {
            opt::EXPORT_NAME => return self.export_name(data, out),
            opt::ABORT => {
                reply(out, number, rep::ACK, &[]);
                return Outcome::End("aborted by the client");
            }
            opt::STARTTLS => return self.start_tls(data, out),
            opt::GO => return self.go(number, data, out),
            opt::INFO => drop(self.go(number, data, out)),
            opt::LIST => self.list(data, out),
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => self.headers(number, data, out),
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_contexts(number, data, out),
            _ => refuse(out, number, rep::ERR_UNSUP, "option not known"),
        }
        Outcome::More
    }

    /// Unknown and forbidden exports get the same answer: none.
    fn find(&self, name: &str) -> Option<&Arc<Export>> {
        if name.is_empty() {
            return self.catalogue.first();
        }
        self.catalogue.iter().find(|export| export.name == name)
    }

    /// Contexts hold only for the export they were chosen for.
    fn agree(&self, name: &str, export: &Arc<Export>) -> Agreed {
        let contexts = match &self.contexts {
            Some((chosen_for, contexts)) if chosen_for == name => contexts.clone(),
            _ => Vec::new(),
        };
        Agreed { export: Arc::clone(export), mode: self.mode, contexts }
    }

    fn export_flags(&self, export: &Export) -> u16 {
        export.flags(self.mode >= Mode::Structured, self.mode == Mode::Extended)
    }

    fn export_name(&self, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        let Some(name) = wire::text(data) else { return Outcome::End("export name is not a name") };
        let Some(export) = self.find(name) else { return Outcome::End("no such export") };
        out.extend(export.disk.size().to_be_bytes());
        out.extend(self.export_flags(export).to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Outcome::Begin(self.agree(name, export))
    }

    fn start_tls(&self, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        let (kind, why) = match self.tls {
            TlsState::Off => (rep::ERR_POLICY, "TLS is not set up"),
            TlsState::Active => (rep::ERR_INVALID, "TLS is in force already"),
            TlsState::Required if !data.is_empty() => (rep::ERR_INVALID, "no payload belongs here"),
            TlsState::Required => {
                reply(out, opt::STARTTLS, rep::ACK, &[]);
                return Outcome::StartTls;
            }
        };
        refuse(out, opt::STARTTLS, kind, why);
        Outcome::More
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) {
        if !data.is_empty() {
            return refuse(out, opt::LIST, rep::ERR_INVALID, "no payload belongs here");
        }
        for export in self.catalogue.iter() {
            let mut entry = Vec::with_capacity(4 + export.name.len() + export.description.len());
            put_string(&mut entry, &export.name);
            entry.extend(export.description.as_bytes());
            reply(out, opt::LIST, rep::SERVER, &entry);
        }
        reply(out, opt::LIST, rep::ACK, &[]);
    }

    /// `INFO` and `GO`: only the latter begins.
    fn go(&self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Outcome {
        let mut cursor = Cursor::new(data);
        let (name, requests) = match (cursor.string(), cursor.u16()) {
            (Some(name), Some(count)) if cursor.rest().len() == 2 * usize::from(count) => (name, cursor),
            _ => {
                refuse(out, number, rep::ERR_INVALID, "lengths do not add up");
                return Outcome::More;
            }
        };
        let Some(export) = self.find(name) else {
            let text = format!("export '{}' not known", wire::shown(name));
            refuse(out, number, rep::ERR_UNKNOWN, &text);
            return Outcome::More;
        };
        let mut piece = info::EXPORT.to_be_bytes().to_vec();
        piece.extend(export.disk.size().to_be_bytes());
        piece.extend(self.export_flags(export).to_be_bytes());
        reply(out, number, rep::INFO, &piece);
        self.go_extras(number, requests, export, out);
        reply(out, number, rep::ACK, &[]);
        if number == opt::GO { Outcome::Begin(self.agree(name, export)) } else { Outcome::More }
    }

    /// Block sizes always; name and description once each, where asked for.
    fn go_extras(&self, number: u32, mut requests: Cursor<'_>, export: &Export, out: &mut Vec<u8>) {
        let mut piece = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [1, BLOCK_PREFERRED, wire::PAYLOAD_MAX] {
            piece.extend(size.to_be_bytes());
        }
        reply(out, number, rep::INFO, &piece);
        let (mut name, mut description) = (false, false);
        while let Some(kind) = requests.u16() {
            name |= kind == info::NAME;
            description |= kind == info::DESCRIPTION;
        }
        for (kind, text, wanted) in
            [(info::NAME, &export.name, name), (info::DESCRIPTION, &export.description, description)]
        {
            if wanted && !(kind == info::DESCRIPTION && text.is_empty()) {
                let mut piece = kind.to_be_bytes().to_vec();
                piece.extend(text.as_bytes());
                reply(out, number, rep::INFO, &piece);
            }
        }
    }

    fn headers(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) {
        let wanted = if number == opt::EXTENDED_HEADERS { Mode::Extended } else { Mode::Structured };
        if !data.is_empty() {
            refuse(out, number, rep::ERR_INVALID, "no payload belongs here");
        } else if wanted == self.mode {
            refuse(out, number, rep::ERR_INVALID, "chosen already");
        } else if wanted < self.mode {
            refuse(out, number, rep::ERR_EXT_HEADER_REQD, "extended headers are chosen already");
        } else {
            self.mode = wanted;
            reply(out, number, rep::ACK, &[]);
        }
    }

    /// A failed choice leaves none.
    fn meta_contexts(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) {
        let setting = number == opt::SET_META_CONTEXT;
        if setting {
            self.contexts = None;
        }
        if self.mode < Mode::Structured {
            return refuse(out, number, rep::ERR_INVALID, "structured replies come first");
        }
        let mut cursor = Cursor::new(data);
        let (Some(name), Some(count)) = (cursor.string(), cursor.u32()) else {
            return refuse(out, number, rep::ERR_INVALID, "lengths do not add up");
        };
        if count > QUERIES_MAX {
            return refuse(out, number, rep::ERR_TOO_BIG, "too many queries");
        }
        let Some(export) = self.find(name) else {
            let text = format!("export '{}' not known", wire::shown(name));
            return refuse(out, number, rep::ERR_UNKNOWN, &text);
        };
        let mut chosen = Chosen::of(export);
        for _ in 0..count {
            match cursor.string() {
                Some(query) => chosen.take(query, setting),
                None => return refuse(out, number, rep::ERR_INVALID, "lengths do not add up"),
            }
        }
        if !cursor.is_empty() {
            return refuse(out, number, rep::ERR_INVALID, "lengths do not add up");
        }
        if count == 0 && !setting {
            chosen.all();
        }
        let contexts = chosen.contexts();
        for context in &contexts {
            let mut entry = if setting { context.id } else { 0 }.to_be_bytes().to_vec();
            entry.extend(context_name(export, context.kind).as_bytes());
            reply(out, number, rep::META_CONTEXT, &entry);
        }
        reply(out, number, rep::ACK, &[]);
        if setting {
            self.contexts = Some((name.to_owned(), contexts));
        }
    }
}

/// Which contexts of an export a client's queries match.
struct Chosen<'a> {
    export: &'a Export,
    allocation: bool,
    dirty: Vec<bool>,
}

impl<'a> Chosen<'a> {
    fn of(export: &'a Export) -> Self {
        Self { export, allocation: false, dirty: vec![false; export.contexts.len()] }
    }

    /// An empty leaf is a wildcard when listing and nothing when choosing.
    fn take(&mut self, query: &str, setting: bool) {
        self.allocation |= query == wire::CONTEXT_ALLOCATION || (!setting && query == "base:");
        let all = !setting && matches!(query, "qemu:" | wire::CONTEXT_DIRTY);
        for (chosen, context) in self.dirty.iter_mut().zip(&self.export.contexts) {
            *chosen |= all || query == context.name();
        }
    }

    fn all(&mut self) {
        self.allocation = true;
        self.dirty.fill(true);
    }

    /// Numbered from 1 in the order of the export.
    fn contexts(&self) -> Vec<Context> {
        let dirty = self.dirty.iter().enumerate().filter(|(_, chosen)| **chosen);
        let dirty = dirty.map(|(i, _)| ContextKind::Dirty(i));
        let kinds = self.allocation.then_some(ContextKind::Allocation).into_iter().chain(dirty);
        kinds.zip(1..).map(|(kind, id)| Context { id, kind }).collect()
    }
}

fn context_name(export: &Export, kind: ContextKind) -> &str {
    match kind {
        ContextKind::Allocation => wire::CONTEXT_ALLOCATION,
        ContextKind::Dirty(index) => export.contexts.get(index).map_or("", |context| context.name()),
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend(u32::try_from(text.len()).unwrap_or(0).to_be_bytes());
    out.extend(text.as_bytes());
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.extend(wire::MAGIC_OPTION_REPLY.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(u32::try_from(payload.len()).unwrap_or(0).to_be_bytes());
    out.extend(payload);
}

fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, why: &str) {
    reply(out, option, kind, why.as_bytes());
}
