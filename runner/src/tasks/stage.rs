//! Where the time of a task goes: reading the source, writing the target, waiting for a rate.
//!
//! Invariants
//! - Each moment of a thread that moves bytes counts for one stage at most; what is left is comparing.
//! - The bottleneck is the stage with the largest share of all that was counted.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

/// A stage of moving bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Reading, with decoding.
    Source,
    /// Writing, with encoding.
    Target,
    /// Waiting for a rate that somebody set.
    Throttle,
}

/// Time that was spent in each stage, of all threads of a task.
#[derive(Debug, Default)]
pub struct Stages {
    source: AtomicU64,
    target: AtomicU64,
    throttle: AtomicU64,
}

impl Stages {
    /// Adds to a stage.
    pub fn add(&self, stage: Stage, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.of(stage).fetch_add(nanos, Ordering::Relaxed);
    }

    /// Does something that belongs to a stage.
    pub fn time<T>(&self, stage: Stage, act: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let done = act();
        self.add(stage, began.elapsed());
        done
    }

    fn of(&self, stage: Stage) -> &AtomicU64 {
        match stage {
            Stage::Source => &self.source,
            Stage::Target => &self.target,
            Stage::Throttle => &self.throttle,
        }
    }

    /// As it is stored.
    pub fn busy(&self) -> Busy {
        let ms = |stage| self.of(stage).load(Ordering::Relaxed) / 1_000_000;
        Busy { source_ms: ms(Stage::Source), target_ms: ms(Stage::Target), throttle_ms: ms(Stage::Throttle) }
    }
}

/// Milliseconds in each stage, of all threads together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Busy {
    /// Reading.
    pub source_ms: u64,
    /// Writing.
    pub target_ms: u64,
    /// Waiting for a rate.
    pub throttle_ms: u64,
}

impl Busy {
    /// Adds another task's.
    pub fn add(&mut self, other: Self) {
        self.source_ms = self.source_ms.saturating_add(other.source_ms);
        self.target_ms = self.target_ms.saturating_add(other.target_ms);
        self.throttle_ms = self.throttle_ms.saturating_add(other.throttle_ms);
    }

    /// The stage with the largest share, and that share in hundredths; none where nothing was counted.
    pub fn bottleneck(self) -> Option<(Stage, u64)> {
        let all =
            [(Stage::Throttle, self.throttle_ms), (Stage::Target, self.target_ms), (Stage::Source, self.source_ms)];
        let sum: u128 = all.iter().map(|(_, ms)| u128::from(*ms)).sum();
        let (stage, most) = all.into_iter().max_by_key(|(_, ms)| *ms).filter(|(_, ms)| *ms > 0)?;
        Some((stage, u64::try_from(u128::from(most) * 100 / sum.max(1)).unwrap_or(100)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bottleneck_is_the_stage_with_the_largest_share() {
        let stages = Stages::default();
        assert_eq!(stages.busy().bottleneck(), None);
        stages.add(Stage::Source, Duration::from_millis(300));
        stages.add(Stage::Throttle, Duration::from_millis(600));
        stages.add(Stage::Target, Duration::from_millis(100));
        assert_eq!(stages.busy().bottleneck(), Some((Stage::Throttle, 60)));
        let mut sum = stages.busy();
        sum.add(Busy { target_ms: 2000, ..Busy::default() });
        assert_eq!(sum.bottleneck(), Some((Stage::Target, 70)));
    }
}
