//! A piece of a site's work, as the leases in a repository name it: so that whoever has the work now can tell the lease
//! of whoever had it before from everybody else's.

use std::fmt;

use aquifer_formats::repo::record::Holder;

use crate::catalogue::Work;

/// A piece of work in one claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hand {
    session: Option<i64>,
    work: i64,
    epoch: i64,
    /// When it was put into the queue, in milliseconds since 1970: the numbers of a catalogue that was made anew begin anew.
    queued: i64,
}

impl Hand {
    /// Of work that was claimed.
    pub fn of(work: &Work) -> Self {
        let Work { session, id, epoch, queued, .. } = work;
        Self { session: session.map(|id| id.0), work: id.0, epoch: *epoch, queued: queued.as_millisecond() }
    }

    /// The piece of work, whatever the claim: what is made for it carries this, so that another attempt finds it.
    pub fn work(&self) -> String {
        format!("{}@{}", self.work, self.queued)
    }

    /// Whether a lease's holder had this very piece of work in an earlier claim: it has lost it, dead or alive.
    pub fn supersedes(&self, holder: &Holder) -> bool {
        let earlier = |text: &str| {
            let (work, epoch) = text.rsplit_once("work ")?.1.split_once('.')?;
            Some(work.parse::<i64>().ok()? == self.work && epoch.parse::<i64>().ok()? < self.epoch)
        };
        holder.session.as_deref().and_then(earlier).unwrap_or(false)
    }
}

impl fmt::Display for Hand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(session) = self.session {
            write!(f, "{session}, ")?;
        }
        write!(f, "work {}.{}", self.work, self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_earlier_claim_of_the_same_work_is_superseded() {
        let holder = |session: Option<String>| Holder { session, ..crate::repository::holder("backup") };
        let hand = Hand { session: Some(3), work: 12, epoch: 4, queued: 5 };
        let of = |work, epoch| holder(Some(Hand { session: None, work, epoch, queued: 5 }.to_string()));
        assert_eq!(hand.to_string(), "3, work 12.4");
        assert_eq!(hand.work(), Hand { epoch: 1, ..hand }.work());
        assert_ne!(hand.work(), Hand { queued: 6, ..hand }.work());
        assert!(hand.supersedes(&of(12, 3)));
        assert!(hand.supersedes(&holder(Some(Hand { epoch: 1, ..hand }.to_string()))));
        for other in [of(12, 4), of(12, 5), of(11, 1), of(112, 1), holder(None), holder(Some("db01".into()))] {
            assert!(!hand.supersedes(&other), "{other}");
        }
    }
}
