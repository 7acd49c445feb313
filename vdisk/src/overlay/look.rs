//! How a fill tells which blocks of a region are absent: under the lock it stores under.
//!
//! With the feature `schedule` a test may plant a look from before that lock, to see that it finds what goes wrong then.

#[cfg(feature = "schedule")]
use super::region::Line;
use super::{
    core::Core,
    region::{BlockState, Region},
};

/// A look at a region.
pub(super) struct Look {
    #[cfg(feature = "schedule")]
    early: Option<Line>,
}

impl Look {
    /// Begins before the region is locked, and sees nothing yet.
    #[cfg_attr(not(feature = "schedule"), expect(unused_variables, reason = "only what is planted looks so early"))]
    pub(super) fn begin(core: &Core, region: u32) -> Self {
        Self {
            #[cfg(feature = "schedule")]
            early: crate::sync::is_planted().then(|| core.stripe(region).read().view(region).states()),
        }
    }

    /// Whether a block of the region, now locked, is absent.
    pub(super) fn is_absent(&self, region: &Region, block: usize) -> bool {
        #[cfg(feature = "schedule")]
        if let Some(early) = &self.early {
            return early.get(block) == BlockState::Absent;
        }
        region.ram.get(block) == BlockState::Absent
    }
}
