//! Counts for the ledger of proofs (`docs/proofs.md`): what was looked at, not that it was fine, which is the test's word.
//!
//! A test tells its counts as it ends; each becomes one line of JSON in the file that `AQUIFER_LEDGER` names. Without
//! that nothing is written. `scripts/proofs.py` folds the lines.

use std::{
    fs::OpenOptions,
    io::Write,
    time::{Duration, Instant},
};

/// Measures a proof, and tells what it counted.
#[derive(Debug)]
pub struct Ledger {
    proof: &'static str,
    started: Instant,
}

impl Ledger {
    /// Begins the proof of this name.
    pub fn begin(proof: &'static str) -> Self {
        Self { proof, started: Instant::now() }
    }

    /// How long it has taken so far.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Tells the counts, each with its name; `seeds` says how to repeat it.
    #[expect(clippy::print_stdout, reason = "whoever runs a test by hand wants its counts")]
    pub fn tell(&self, seeds: &str, counts: &[(&str, u64)]) {
        let took = self.elapsed();
        println!("{}: {counts:?} in {took:?}, seeds {seeds}", self.proof);
        let Some(path) = std::env::var_os("AQUIFER_LEDGER") else { return };
        let counts: serde_json::Map<_, _> = counts.iter().map(|(n, c)| ((*n).to_owned(), (*c).into())).collect();
        let line = serde_json::json!({
            "proof": self.proof, "counts": counts, "seeds": seeds, "seconds": took.as_secs_f64(),
        });
        let mut file = OpenOptions::new().create(true).append(true).open(path).expect("the ledger's file");
        // One write: tests of several processes append to the same file.
        file.write_all(format!("{line}\n").as_bytes()).expect("a line of the ledger");
    }
}
