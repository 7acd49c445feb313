//! A machine with a vhost-user disk, both of its halves: the hypervisor that talks over the socket and shares memory, and
//! the guest's driver that fills rings. Written from the specifications, with no code of the door's.
//!
//! Invariants
//! - The guest kicks only when the device asks for it and sleeps until it is interrupted: a wake-up that is forgotten is
//!   a test that fails.
//! - Whatever is put into memory is put there through the memory's file, as another process would.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    path::Path,
    time::Duration,
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, ftruncate, memfd_create},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
};

use crate::rng::Rng;

/// Numbers of messages.
#[allow(missing_docs, reason = "names of the protocol's own")]
pub mod message {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
}

/// Feature bits.
#[allow(missing_docs, reason = "names of the specification's own")]
pub mod feature {
    pub const RO: u64 = 1 << 5;
    pub const FLUSH: u64 = 1 << 9;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
}

/// Places of each ring.
pub const RING: u16 = 64;
/// Requests of a ring at once: each has four descriptors of its own.
pub const SLOTS: u16 = RING / 4;
/// Bytes of data of one request.
pub const DATA_MAX: usize = 120 << 10;
/// Where the second region begins; the first slot's data lies in both.
const SPLIT: u64 = 1 << 20;
const MEMORY: u64 = 17 << 20;
const DATA: u64 = 0xf_0000;
const SLOT: u64 = 0x2_0000;
const USER: [u64; 2] = [0x10_0000_0000, 0x20_0000_0000];
const PATIENCE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };

/// What adds one to an event counter.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads a number of this machine's own")]
const ONE: [u8; 8] = 1u64.to_ne_bytes();

/// One ring, from the driver's side.
#[derive(Debug)]
struct DriverRing {
    offered: u16,
    seen: u16,
    free: Vec<u16>,
    kick: OwnedFd,
    call: OwnedFd,
    error: OwnedFd,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its slot.
    pub slot: u16,
    /// The status byte, if the device wrote anything.
    pub status: Option<u8>,
    /// Bytes the device says it wrote, the status included.
    pub written: u32,
    /// The data it wrote.
    pub data: Vec<u8>,
}

/// A machine.
#[derive(Debug)]
pub struct Machine {
    socket: UnixStream,
    memory: File,
    features: u64,
    rings: Vec<DriverRing>,
    inflight: Option<(Vec<u8>, OwnedFd)>,
    wanted: Vec<[usize; SLOTS as usize]>,
    dice: Rng,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")
}

/// A header, as a guest sends it.
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut out = [0; 16];
    out[..4].copy_from_slice(&kind.to_le_bytes());
    out[8..].copy_from_slice(&sector.to_le_bytes());
    out
}

/// One range of a DISCARD or WRITE_ZEROES.
pub fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

impl Machine {
    /// A machine with `queues` queues whose guest knows `features`, connected to the socket at `path`.
    ///
    /// # Errors
    /// What the door refused.
    pub fn plug(path: &Path, queues: u16, features: u64) -> Result<Self, String> {
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&memory, MEMORY).expect("memory");
        let ring = || DriverRing {
            offered: 0,
            seen: 0,
            free: (0..SLOTS).rev().collect(),
            kick: event(),
            call: event(),
            error: event(),
        };
        let mut machine = Self {
            socket: UnixStream::connect(path).map_err(|e| e.to_string())?,
            memory: memory.into(),
            features,
            rings: (0..queues).map(|_| ring()).collect(),
            inflight: None,
            wanted: vec![[0; SLOTS as usize]; queues.into()],
            dice: Rng::new(7),
        };
        machine.start()?;
        Ok(machine)
    }

    /// Connects again, as a hypervisor does that lost its door.
    ///
    /// # Errors
    /// What the door refused.
    pub fn reconnect(&mut self, path: &Path) -> Result<(), String> {
        // It is gone already, where it was the door that ended.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
        self.socket = UnixStream::connect(path).map_err(|e| e.to_string())?;
        self.start()
    }

    /// What the device offers.
    pub fn offered(&mut self) -> u64 {
        u64_of(&self.ask(message::GET_FEATURES, &[]).expect("features").0)
    }

    /// A part of the configuration space.
    pub fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let mut body = [offset.to_le_bytes(), len.to_le_bytes(), 0u32.to_le_bytes()].concat();
        body.resize(body.len() + len as usize, 0);
        self.ask(message::GET_CONFIG, &body).expect("configuration").0[12..].to_vec()
    }

    /// Writes a part of the configuration space.
    ///
    /// # Errors
    /// What the door refused.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), String> {
        let len = bytes.len() as u32;
        let body = [&offset.to_le_bytes()[..], &len.to_le_bytes(), &0u32.to_le_bytes(), bytes].concat();
        self.tell(message::SET_CONFIG, &body, &[])
    }

    fn start(&mut self) -> Result<(), String> {
        self.socket.set_read_timeout(Some(Duration::from_secs(20))).expect("timeout");
        self.send(message::SET_OWNER, 0, &[], &[])?;
        let offered = u64_of(&self.ask(message::GET_FEATURES, &[])?.0);
        let features = self.features & offered | 1 << 30 | 1 << 32;
        // Queues, acknowledgements, configuration, requests in the air.
        let (ours, theirs) = (0x1209u64, u64_of(&self.ask(message::GET_PROTOCOL_FEATURES, &[])?.0));
        assert_eq!(theirs & ours, ours, "protocol features {theirs:#x}");
        self.send(message::SET_PROTOCOL_FEATURES, 0, &ours.to_le_bytes(), &[])?;
        self.tell(message::SET_FEATURES, &features.to_le_bytes(), &[])?;
        match &self.inflight {
            Some((body, file)) => {
                let (body, file) = (body.clone(), file.try_clone().expect("a descriptor"));
                self.tell(message::SET_INFLIGHT_FD, &body, &[file.as_fd()])?;
            }
            None => {
                let shape = [(self.rings.len() as u16).to_le_bytes(), RING.to_le_bytes()].concat();
                let body = [vec![0; 16], shape, vec![0; 4]].concat();
                let (body, fds) = self.ask(message::GET_INFLIGHT_FD, &body)?;
                self.inflight = Some((body, fds.into_iter().next().expect("a file")));
                let (body, file) = self.inflight.as_ref().expect("just put");
                let (body, file) = (body.clone(), file.try_clone().expect("a descriptor"));
                self.tell(message::SET_INFLIGHT_FD, &body, &[file.as_fd()])?;
            }
        }
        self.share_memory()?;
        for index in 0..self.rings.len() {
            self.start_ring(index)?;
        }
        Ok(())
    }

    /// Tells of the memory, in two regions.
    ///
    /// # Errors
    /// What the door refused.
    pub fn share_memory(&mut self) -> Result<(), String> {
        let region = |guest: u64, len: u64, user: u64| [guest, len, user, guest].map(u64::to_le_bytes).concat();
        let regions = [region(0, SPLIT, USER[0]), region(SPLIT, MEMORY - SPLIT, USER[1])].concat();
        let memory = self.memory.try_clone().expect("a descriptor");
        self.tell(
            message::SET_MEM_TABLE,
            &[vec![2, 0, 0, 0, 0, 0, 0, 0], regions].concat(),
            &[memory.as_fd(), memory.as_fd()],
        )
    }

    fn start_ring(&mut self, index: usize) -> Result<(), String> {
        let state = |n: u32| [(index as u32).to_le_bytes(), n.to_le_bytes()].concat();
        let base = USER[0] + ring_at(index);
        // What the hypervisor believes after a loss: it is the device that knows better.
        let seen = self.used_index(index);
        self.tell(message::SET_VRING_NUM, &state(RING.into()), &[])?;
        self.tell(message::SET_VRING_BASE, &state(seen.into()), &[])?;
        let addresses = [base, base + 0x2000, base + 0x1000, 0].map(u64::to_le_bytes).concat();
        self.tell(message::SET_VRING_ADDR, &[state(0), addresses].concat(), &[])?;
        let ring = &self.rings[index];
        let fds = [&ring.error, &ring.call, &ring.kick].map(|fd| fd.try_clone().expect("a descriptor"));
        let number = (index as u64).to_le_bytes();
        for (what, fd) in
            [message::SET_VRING_ERR, message::SET_VRING_CALL, message::SET_VRING_KICK].into_iter().zip(&fds)
        {
            self.tell(what, &number, &[fd.as_fd()])?;
        }
        self.tell(message::SET_VRING_ENABLE, &state(1), &[])?;
        // Whatever was offered while nobody looked.
        let _ = rustix::io::write(&self.rings[index].kick, &ONE);
        Ok(())
    }

    /// Stops a ring; the index of the request the device would take next.
    pub fn stop_ring(&mut self, index: usize) -> u32 {
        let body = [(index as u32).to_le_bytes(), [0; 4]].concat();
        let (reply, _) = self.ask(message::GET_VRING_BASE, &body).expect("stopped");
        u32::from_le_bytes(reply[4..8].try_into().expect("four bytes"))
    }

    /// Starts a ring that was stopped.
    ///
    /// # Errors
    /// What the door refused.
    pub fn start_again(&mut self, index: usize) -> Result<(), String> {
        self.start_ring(index)
    }

    /// Sends a message that is acknowledged.
    ///
    /// # Errors
    /// What the door refused.
    pub fn tell(&mut self, what: u32, body: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), String> {
        self.send(what, 8, body, fds)?;
        match u64_of(&self.receive(what)?.0) {
            0 => Ok(()),
            code => Err(format!("message {what} was refused with {code}")),
        }
    }

    fn ask(&mut self, what: u32, body: &[u8]) -> Result<(Vec<u8>, Vec<OwnedFd>), String> {
        self.send(what, 0, body, &[])?;
        self.receive(what)
    }

    fn send(&mut self, what: u32, flags: u32, body: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), String> {
        let head = [what, 1 | flags, body.len() as u32].map(u32::to_le_bytes).concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let message = [head, body.to_vec()].concat();
        rustix::net::sendmsg(&self.socket, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL)
            .map(drop)
            .map_err(|e| e.to_string())
    }

    fn receive(&mut self, what: u32) -> Result<(Vec<u8>, Vec<OwnedFd>), String> {
        let mut head = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut head)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .map_err(|e| e.to_string())?;
        if got.bytes != head.len() {
            return Err(format!("message {what}: the connection ended"));
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(found) = message {
                fds.extend(found);
            }
        }
        assert_eq!(u32::from_le_bytes(head[..4].try_into().expect("four")), what, "the answer of another message");
        let mut body = vec![0; u32::from_le_bytes(head[8..].try_into().expect("four")) as usize];
        self.socket.read_exact(&mut body).map_err(|e| e.to_string())?;
        Ok((body, fds))
    }

    /// Puts bytes into the guest's memory.
    pub fn poke(&self, addr: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, addr).expect("memory");
    }

    /// Bytes of the guest's memory.
    pub fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_exact_at(&mut out, addr).expect("memory");
        out
    }

    fn peek_u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.peek(addr, 2).try_into().expect("two"))
    }

    fn used_index(&self, ring: usize) -> u16 {
        self.peek_u16(ring_at(ring) + 0x2002)
    }

    /// Whether a request can be made without waiting for another.
    pub fn has_room(&self, ring: usize) -> bool {
        !self.rings[ring].free.is_empty()
    }

    /// Makes a request, cut into descriptors in any way, and offers it. Returns its slot.
    pub fn submit(&mut self, ring: usize, header: [u8; 16], output: &[u8], input_len: usize) -> u16 {
        let slot = self.rings[ring].free.pop().expect("a free slot");
        let base = slot_at(ring, slot);
        self.poke(base, &header);
        self.poke(base + 64, &[0xff]);
        assert!(output.len().max(input_len) <= DATA_MAX);
        self.poke(base + 4096, &vec![0xee; input_len]);
        self.poke(base + 4096, output);
        let mut pieces = vec![(base, 16, false)];
        pieces.extend(self.cut(base + 4096, output.len()).into_iter().map(|(addr, len)| (addr, len, false)));
        pieces.extend(self.cut(base + 4096, input_len).into_iter().map(|(addr, len)| (addr, len, true)));
        pieces.push((base + 64, 1, true));
        self.wanted[ring][usize::from(slot)] = input_len;
        self.offer_pieces(ring, slot, &pieces);
        slot
    }

    fn cut(&mut self, addr: u64, len: usize) -> Vec<(u64, u32)> {
        let mut out = Vec::new();
        let mut at = 0;
        let most = if self.features & feature::INDIRECT != 0 { 12 } else { 2 };
        while at < len {
            let last = out.len() + 1 >= most || self.dice.once_in(2);
            let n = if last { len - at } else { 1 + self.dice.below((len - at) as u64) as usize };
            out.push((addr + at as u64, n as u32));
            at += n;
        }
        out
    }

    /// Offers any descriptors: address, length, whether the device writes. Uses a table where they are too many.
    pub fn offer_pieces(&mut self, ring: usize, slot: u16, pieces: &[(u64, u32, bool)]) {
        let (own, table) = (ring_at(ring) + 64 * u64::from(slot), ring_at(ring) + 0x4000 + 0x200 * u64::from(slot));
        let direct = pieces.len() <= 4 && (self.features & feature::INDIRECT == 0 || self.dice.once_in(2));
        let (start, first) = if direct { (own, slot * 4) } else { (table, 0) };
        assert!(direct || self.features & feature::INDIRECT != 0 && pieces.len() <= 32);
        for (at, (addr, len, writable)) in pieces.iter().enumerate() {
            let more = at + 1 < pieces.len();
            let flags = u16::from(more) | u16::from(*writable) << 1;
            self.poke(start + 16 * at as u64, &descriptor(*addr, *len, flags, first + at as u16 + 1));
        }
        if !direct {
            self.poke(own, &descriptor(table, 16 * pieces.len() as u32, 4, 0));
        }
        self.offer(ring, slot * 4);
    }

    /// Offers the chain that begins at descriptor `head`, and kicks if the device wants that.
    pub fn offer(&mut self, ring: usize, head: u16) {
        let base = ring_at(ring);
        let offered = self.rings[ring].offered;
        self.poke(base + 0x1004 + 2 * u64::from(offered % RING), &head.to_le_bytes());
        self.poke(base + 0x1002, &offered.wrapping_add(1).to_le_bytes());
        self.rings[ring].offered = offered.wrapping_add(1);
        let wants = if self.features & feature::EVENT_IDX != 0 {
            self.peek_u16(base + 0x2004 + 8 * u64::from(RING)) == offered
        } else {
            self.peek(base + 0x2000, 2) == [0, 0]
        };
        if wants {
            self.kick(ring);
        }
    }

    /// Kicks.
    pub fn kick(&self, ring: usize) {
        let _ = rustix::io::write(&self.rings[ring].kick, &ONE);
    }

    /// Makes the slot of a request that was taken back usable again.
    pub fn forget(&mut self, ring: usize, slot: u16) {
        self.rings[ring].free.push(slot);
    }

    /// A slot for pieces of any kind.
    pub fn slot(&mut self, ring: usize) -> u16 {
        let slot = self.rings[ring].free.pop().expect("a free slot");
        self.wanted[ring][usize::from(slot)] = 0;
        slot
    }

    /// The next answer, if it is there already.
    pub fn answer_now(&mut self, ring: usize) -> Option<Answer> {
        let seen = self.rings[ring].seen;
        if self.used_index(ring) == seen {
            return None;
        }
        let element = self.peek(ring_at(ring) + 0x2004 + 8 * u64::from(seen % RING), 8);
        let (head, written) = element.split_at(4);
        let head = u32::from_le_bytes(head.try_into().expect("four"));
        let written = u32::from_le_bytes(written.try_into().expect("four"));
        assert!(head < u32::from(RING) && head.is_multiple_of(4), "answer of {head}");
        let slot = head as u16 / 4;
        assert!(!self.rings[ring].free.contains(&slot), "slot {slot} was answered twice");
        self.rings[ring].free.push(slot);
        self.rings[ring].seen = seen.wrapping_add(1);
        let base = slot_at(ring, slot);
        let status = (written > 0).then(|| self.peek(base + 64, 1)[0]);
        let data = self.peek(base + 4096, self.wanted[ring][usize::from(slot)]);
        Some(Answer { slot, status, written, data })
    }

    /// The next answer; sleeps until the device interrupts.
    pub fn answer(&mut self, ring: usize) -> Answer {
        self.answer_within(ring, PATIENCE).expect("an interrupt was forgotten, or a request")
    }

    /// The next answer, if the device interrupts in time.
    pub fn answer_within(&mut self, ring: usize, patience: Timespec) -> Option<Answer> {
        loop {
            if let Some(answer) = self.answer_now(ring) {
                return Some(answer);
            }
            let seen = self.rings[ring].seen;
            self.poke(ring_at(ring) + 0x1004 + 2 * u64::from(RING), &seen.to_le_bytes());
            if let Some(answer) = self.answer_now(ring) {
                return Some(answer);
            }
            if !wait(&self.rings[ring].call, patience) {
                return None;
            }
        }
    }

    /// Whether the device says that a ring cannot go on.
    pub fn is_broken(&self, ring: usize) -> bool {
        wait(&self.rings[ring].error, PATIENCE)
    }

    /// Where the ring at `index` begins: descriptors, at 0x1000 what is offered, at 0x2000 what is answered.
    pub fn ring_at(index: usize) -> u64 {
        ring_at(index)
    }

    /// Where a slot's header is; its status is 64 bytes on, its data 4096.
    pub fn slot_at(ring: usize, slot: u16) -> u64 {
        slot_at(ring, slot)
    }

    /// Bytes of memory.
    pub fn memory_len() -> u64 {
        MEMORY
    }
}

fn wait(event: &OwnedFd, patience: Timespec) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(event.as_fd(), PollFlags::IN)];
    let rung = poll(&mut fds, Some(&patience)).expect("poll") > 0;
    if rung {
        let _ = rustix::io::read(event, &mut [0; 8]);
    }
    rung
}

fn u64_of(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}

fn ring_at(index: usize) -> u64 {
    0x1_0000 * index as u64
}

fn slot_at(ring: usize, slot: u16) -> u64 {
    DATA + SLOT * (u64::from(SLOTS) * ring as u64 + u64::from(slot))
}

/// One descriptor.
pub fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}
