//! The load: random requests of one size, so many in flight on so many connections, for so long.
//!
//! Invariants
//! - Equal loads ask for equal places in the same order, whoever serves.
//! - A request counts when its reply is complete; errors are counted apart and never as work.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aquifer_mount::nbd::{Client, Queue, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

/// Longest latency that is told apart, in nanoseconds.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// What requests do.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Read,
    /// With a flush after every so many writes of a connection.
    Write {
        flush_every: u32,
    },
}

/// What is asked of a server.
#[derive(Clone, Debug)]
pub(super) struct Load {
    pub(super) work: Work,
    pub(super) depth: usize,
    pub(super) connections: usize,
    /// Bytes of each request.
    pub(super) block: u64,
    pub(super) duration: Duration,
}

/// What came of it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Figures {
    pub(super) per_second: f64,
    pub(super) bytes_per_second: u64,
    pub(super) requests: u64,
    pub(super) errors: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
}

impl Figures {
    /// What a chart shows of them.
    pub(super) const DRAWN: [&str; 4] = ["requests each second", "p50, us", "p99, us", "p99.9, us"];

    pub(super) fn drawn(&self) -> Vec<f64> {
        vec![self.per_second, self.p50_us, self.p99_us, self.p999_us]
    }
}

impl Load {
    pub(super) fn is_write(&self) -> bool {
        matches!(self.work, Work::Write { .. })
    }

    pub(super) fn name(&self) -> &'static str {
        if self.is_write() { "write" } else { "read" }
    }

    /// Runs against one export.
    pub(super) fn run(&self, client: &Arc<Client>) -> Result<Figures> {
        let queues = (0..self.connections).map(|_| client.queue()).collect::<Result<Vec<Queue>>>()?;
        let places = (client.size() / self.block).max(1);
        let start = Instant::now();
        let tallies: Vec<Tally> = thread::scope(|scope| {
            let threads: Vec<_> = queues
                .into_iter()
                .zip(1u64..)
                .map(|(queue, seed)| scope.spawn(move || self.one_connection(queue, places, seed, start)))
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let seconds = start.elapsed().as_secs_f64();
        let mut all = Tally::new();
        for tally in &tallies {
            all.errors += tally.errors;
            all.requests += tally.requests;
            // Both have the same bounds, so adding cannot fail.
            let _ = all.latency.add(&tally.latency);
        }
        let at = |q: f64| Duration::from_nanos(all.latency.value_at_quantile(q)).as_secs_f64() * 1e6;
        let per_second = Duration::from_secs(all.requests).as_secs_f64() / seconds;
        let bytes = u128::from(all.requests) * u128::from(self.block) * 1000 / start.elapsed().as_millis().max(1);
        Ok(Figures {
            per_second,
            bytes_per_second: u64::try_from(bytes).unwrap_or(u64::MAX),
            requests: all.requests,
            errors: all.errors,
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
        })
    }

    fn one_connection(&self, mut queue: Queue, places: u64, seed: u64, start: Instant) -> Tally {
        let mut tally = Tally::new();
        let mut order = Order(seed);
        let mut begun = vec![start; self.depth];
        let mut since_flush = 0;
        for (tag, begin) in (0u64..).zip(begun.iter_mut()) {
            *begin = Instant::now();
            self.submit(&mut queue, tag, &mut order, places, Vec::new(), &mut since_flush);
        }
        while let Some(done) = queue.complete() {
            let Some(begin) = usize::try_from(done.tag).ok().and_then(|tag| begun.get_mut(tag)) else { break };
            let took = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(LATENCY_MAX_NS).clamp(1, LATENCY_MAX_NS);
            match done.result {
                Ok(()) => {
                    tally.requests += 1;
                    tally.latency.saturating_record(took);
                }
                Err(_) => tally.errors += 1,
            }
            if start.elapsed() < self.duration {
                *begin = Instant::now();
                self.submit(&mut queue, done.tag, &mut order, places, done.buf, &mut since_flush);
            }
        }
        tally
    }

    fn submit(&self, queue: &mut Queue, tag: u64, order: &mut Order, places: u64, mut buf: Vec<u8>, since: &mut u32) {
        let offset = order.next() % places * self.block;
        match self.work {
            Work::Read => queue.read(tag, offset, u32::try_from(self.block).unwrap_or(u32::MAX), buf),
            Work::Write { flush_every } if flush_every > 0 && *since >= flush_every => {
                *since = 0;
                queue.flush(tag);
            }
            Work::Write { .. } => {
                *since += 1;
                buf.resize(usize::try_from(self.block).unwrap_or(0), 0);
                for word in buf.chunks_exact_mut(8) {
                    word.copy_from_slice(&order.next().to_le_bytes());
                }
                queue.write(tag, offset, buf);
            }
        }
    }
}

/// A count of latencies in nanoseconds. It has bounds: one without them counts all as its smallest at first.
pub(super) fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("these bounds and 3 digits are possible")
}

struct Tally {
    requests: u64,
    errors: u64,
    latency: Histogram<u64>,
}

impl Tally {
    fn new() -> Self {
        Self { requests: 0, errors: 0, latency: latencies() }
    }
}

/// Numbers that look random and are the same in every run (xorshift64*).
pub(super) struct Order(pub(super) u64);

impl Order {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 1
    }
}
