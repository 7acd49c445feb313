//! Reads ranges of a disk several at a time and hands them over in their order.
//!
//! Invariants
//! - Ranges are handed over exactly in the order they were given.
//! - Memory: as many buffers as the window is long, whatever the disk's size.
//!
//! Not here: which ranges, and what becomes of the bytes.

use std::{
    collections::VecDeque,
    num::NonZero,
    thread,
    time::{Duration, Instant},
};

use aquifer_vdisk::Disk;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use crate::fail::{Code, Fail, Result};

/// What is to become of a range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is read.
    Read,
    /// It is zeros, by the disk's map.
    Zero,
    /// It is as it was in the parent.
    Keep,
}

/// A range and what is to become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Start on the disk, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub len: u64,
    /// What is to be done.
    pub step: Step,
}

/// Whoever takes the pieces.
pub trait Taker {
    /// A buffer to read into, with any contents.
    fn buffer(&mut self) -> Vec<u8>;

    /// Told how long it had to wait for a piece to be read.
    fn waited(&mut self, time: Duration);

    /// Takes a piece, with its bytes where it was read. An error ends the work.
    fn take(&mut self, piece: Piece, bytes: Option<Vec<u8>>) -> Result<()>;
}

struct Task {
    piece: Piece,
    buffer: Vec<u8>,
    reply: Sender<Result<Vec<u8>>>,
}

enum Waiting {
    Ready(Piece),
    Reading(Piece, Receiver<Result<Vec<u8>>>),
}

/// Hands every piece of `pieces` to `taker`, in order.
///
/// # Errors
/// The first one of the pieces, the disk or the taker.
pub fn read_ahead(disk: &Disk, pieces: impl Iterator<Item = Result<Piece>>, taker: &mut impl Taker) -> Result<()> {
    let readers = thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 8);
    let window = readers * 3;
    thread::scope(|scope| {
        let (send, tasks) = unbounded::<Task>();
        for _ in 0..readers {
            let tasks = tasks.clone();
            scope.spawn(move || serve(disk, &tasks));
        }
        drop(tasks);
        let mut waiting: VecDeque<Waiting> = VecDeque::new();
        for piece in pieces {
            let piece = piece?;
            if waiting.len() >= window {
                deliver(&mut waiting, taker)?;
            }
            if piece.step != Step::Read {
                waiting.push_back(Waiting::Ready(piece));
                continue;
            }
            let (reply, answer) = bounded(1);
            let task = Task { piece, buffer: taker.buffer(), reply };
            send.send(task).map_err(|_| ended())?;
            waiting.push_back(Waiting::Reading(piece, answer));
        }
        while !waiting.is_empty() {
            deliver(&mut waiting, taker)?;
        }
        Ok(())
    })
}

fn ended() -> Fail {
    Fail::new(Code::Bug, "the readers have ended")
}

fn serve(disk: &Disk, tasks: &Receiver<Task>) {
    for Task { piece, mut buffer, reply } in tasks {
        let read =
            usize::try_from(piece.len).map_err(|_| Fail::new(Code::Bug, "a piece is too long")).and_then(|len| {
                buffer.resize(len, 0);
                disk.read(piece.offset, &mut buffer)?;
                Ok(buffer)
            });
        // Whoever asked may have given up meanwhile.
        let _ = reply.send(read);
    }
}

fn deliver(waiting: &mut VecDeque<Waiting>, taker: &mut impl Taker) -> Result<()> {
    match waiting.pop_front() {
        Some(Waiting::Ready(piece)) => taker.take(piece, None),
        Some(Waiting::Reading(piece, answer)) => {
            let began = Instant::now();
            let bytes = answer.recv().map_err(|_| ended())??;
            taker.waited(began.elapsed());
            taker.take(piece, Some(bytes))
        }
        None => Ok(()),
    }
}
