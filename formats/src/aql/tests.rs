//! Tests of the native layer: writer against reader, with a `Vec<u8>` as the oracle.

use std::sync::Arc;

use super::*;

use crate::{Content, Layer, Storage, storage::MemoryStorage};

mod damage;
mod document;
mod linking;
mod oracle;
mod support;
mod torn;
mod wide_delta;
mod writing;

use support::{Chain, key, options, pattern, read_all, read_into};

/// How many times the usual number of cases is run.
fn scale() -> u32 {
    std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}
