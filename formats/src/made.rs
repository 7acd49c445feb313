//! Images made by hand for tests: bytes with integers put into them, and what a refusal was for.
//!
//! Not here: what a format's smallest image looks like (each format's own `tests`).

use std::marker::PhantomData;

use crate::{Error, Result};

/// Which end of an integer comes first in a format.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    Big,
    Little,
}

/// The bytes of an image of a format, whose own tests add what its fields are called.
#[derive(Debug)]
pub(crate) struct Image<Format> {
    pub(crate) bytes: Vec<u8>,
    order: Order,
    format: PhantomData<Format>,
}

impl<Format> Image<Format> {
    pub(crate) fn blank(len: usize, order: Order) -> Self {
        Self { bytes: vec![0; len], order, format: PhantomData }
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn u32(&mut self, at: usize, value: u32) {
        match self.order {
            Order::Big => self.put(at, &value.to_be_bytes()),
            Order::Little => self.put(at, &value.to_le_bytes()),
        }
    }

    pub(crate) fn u64(&mut self, at: usize, value: u64) {
        match self.order {
            Order::Big => self.put(at, &value.to_be_bytes()),
            Order::Little => self.put(at, &value.to_le_bytes()),
        }
    }
}

pub(crate) fn is_corrupt<T>(done: Result<T>) -> bool {
    matches!(done, Err(Error::Corrupt { .. }))
}

pub(crate) fn is_truncated<T>(done: Result<T>) -> bool {
    matches!(done, Err(Error::Truncated { .. }))
}

pub(crate) fn is_unsupported<T>(done: Result<T>) -> bool {
    matches!(done, Err(Error::Unsupported { .. }))
}
