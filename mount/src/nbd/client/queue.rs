//! Many requests in flight from one thread over one connection.
//!
//! Invariants
//! - Every request submitted is completed exactly once, with its result: whoever waits for all completions
//!   and sees no error has had every block confirmed.
//! - Requests leave in batches: when a completion is waited for, or the flight is full.
//! - A READ's buffer comes back with the bytes, or with an error.

use std::collections::HashMap;

use super::{Channel, Client, Ended, Error, IN_FLIGHT_MAX, Loss, Request, Result, asked, cmd};
use crate::nbd::{negotiate::Mode, wire::command_flag as flag};

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The caller's own number.
    pub tag: u64,
    /// Of a READ: the bytes, if it succeeded. Of a WRITE: the buffer that was handed in.
    pub buf: Vec<u8>,
    /// Whether it succeeded.
    pub result: Result<()>,
}

/// One connection for one thread.
#[derive(Debug)]
pub struct Queue {
    client: std::sync::Arc<Client>,
    channel: Channel,
    flights: HashMap<u64, Waiting>,
    /// Requests that failed before they could be sent.
    failed: Vec<Completion>,
    unsent: bool,
}

#[derive(Debug)]
struct Waiting {
    tag: u64,
    request: Request,
    payload: Vec<u8>,
    sent: std::time::Instant,
    /// Connections that were lost under it.
    losses: u32,
}

impl Queue {
    pub(super) fn new(client: std::sync::Arc<Client>, channel: Channel) -> Self {
        Self { client, channel, flights: HashMap::new(), failed: Vec::new(), unsent: false }
    }

    /// Requests submitted and not yet completed.
    pub fn in_flight(&self) -> usize {
        self.flights.len() + self.failed.len()
    }

    /// Asks for `len` bytes from `offset`; `buf` is used for them, whatever is in it.
    pub fn read(&mut self, tag: u64, offset: u64, len: u32, buf: Vec<u8>) {
        let request = self.client.plain(cmd::READ, offset, len.into());
        let checked = self.client.check_range(offset, len.into()).and_then(|()| self.check_block(offset, len));
        self.submit(tag, request, buf, Vec::new(), checked);
    }

    /// Writes `bytes` at `offset`.
    pub fn write(&mut self, tag: u64, offset: u64, bytes: Vec<u8>) {
        let len = bytes.len() as u64;
        let mut request = self.client.plain(cmd::WRITE, offset, len);
        if self.client.offer.mode == Mode::Extended {
            request.flags |= flag::PAYLOAD_LEN;
        }
        let checked = self.client.check_change(offset, len, u16::MAX);
        let checked = checked.and_then(|()| self.check_block(offset, u32::try_from(len).unwrap_or(u32::MAX)));
        self.submit(tag, request, Vec::new(), bytes, checked);
    }

    /// Asks that everything completed so far be durable.
    pub fn flush(&mut self, tag: u64) {
        let request = self.client.plain(cmd::FLUSH, 0, 0);
        self.submit(tag, request, Vec::new(), Vec::new(), Ok(()));
    }

    fn check_block(&self, offset: u64, len: u32) -> Result<()> {
        let grain = u64::from(self.client.offer.block_min);
        let ends_at_grain = u64::from(len).is_multiple_of(grain) || offset + u64::from(len) == self.client.offer.size;
        if len == 0 || len > self.client.offer.block_max || !offset.is_multiple_of(grain) || !ends_at_grain {
            return Err(self.client.impossible(format!("{offset}+{len} does not fit the server's block sizes")));
        }
        Ok(())
    }

    fn submit(&mut self, tag: u64, request: Request, buf: Vec<u8>, payload: Vec<u8>, checked: Result<()>) {
        if let Err(error) = checked {
            let buf = if payload.is_empty() { buf } else { payload };
            return self.failed.push(Completion { tag, buf, result: Err(error) });
        }
        let cookie = self.channel.queue(request, asked(&request, buf), &payload);
        self.flights.insert(cookie, Waiting { tag, request, payload, sent: std::time::Instant::now(), losses: 0 });
        self.unsent = true;
        // Payloads are not piled up, and a full flight has to move.
        if request.command == cmd::WRITE || self.channel.in_flight() >= IN_FLIGHT_MAX {
            self.send();
        }
    }

    /// Sends what was submitted, without waiting for replies.
    pub fn send(&mut self) {
        if std::mem::take(&mut self.unsent) {
            self.channel.kick();
        }
    }

    /// Waits for the next completion, in any order; `None` where nothing is in flight.
    pub fn complete(&mut self) -> Option<Completion> {
        if let Some(failed) = self.failed.pop() {
            return Some(failed);
        }
        self.send();
        loop {
            let (cookie, ended) = self.channel.wait_any()?;
            let Some(waiting) = self.flights.remove(&cookie) else { continue };
            match ended {
                Ended::Done(done) => {
                    let Waiting { tag, request, payload, .. } = waiting;
                    return Some(match self.client.judge(&request, done) {
                        Ok(done) => {
                            let buf = if payload.is_empty() { done.asked.buf } else { payload };
                            Completion { tag, buf, result: Ok(()) }
                        }
                        Err(error) => Completion { tag, buf: payload, result: Err(error) },
                    });
                }
                Ended::Lost(asked_, loss) => {
                    if let Some(failed) = self.again(waiting, asked_.buf, loss) {
                        return Some(failed);
                    }
                }
            }
        }
    }

    /// Sends a request again, over a new connection if need be; its failure where that is in vain.
    fn again(&mut self, mut waiting: Waiting, buf: Vec<u8>, loss: Loss) -> Option<Completion> {
        let in_vain = |waiting: Waiting, error: Error| {
            Some(Completion { tag: waiting.tag, buf: waiting.payload, result: Err(error) })
        };
        waiting.losses += 1;
        let is_late = waiting.sent.elapsed() > self.client.reconnect + self.client.target.patience;
        if let Err(error) = self.client.may_go_on(loss, waiting.losses, is_late) {
            return in_vain(waiting, error);
        }
        self.client.note_loss();
        if self.channel.is_lost() {
            match self.client.come_back() {
                // What else was in flight on the old connection is orphaned there: move it over.
                Ok(channel) => {
                    let old = std::mem::replace(&mut self.channel, channel);
                    while let Some((cookie, ended)) = old.wait_any() {
                        if let (Some(mut waiting), Ended::Lost(asked, _)) = (self.flights.remove(&cookie), ended) {
                            waiting.losses += 1;
                            self.resubmit(waiting, asked.buf);
                        }
                    }
                }
                Err(error) => return in_vain(waiting, error),
            }
        }
        self.resubmit(waiting, buf);
        self.channel.kick();
        None
    }

    fn resubmit(&mut self, waiting: Waiting, buf: Vec<u8>) {
        let cookie = self.channel.queue(waiting.request, asked(&waiting.request, buf), &waiting.payload);
        self.flights.insert(cookie, waiting);
    }
}
