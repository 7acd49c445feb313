//! Bugs on purpose. Tests that cannot catch them prove nothing, so a test plants each one and expects to be told.
//!
//! Invariants
//! - Without the feature `planted` (which nothing but that test asks for) [`planted`] is a constant `false`: no code of
//!   a bug is in any other build.
//! - With it, one thread at a time may have one bug; other threads have none.
//!
//! Not here: what catches them (`tests/planted`).

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// One planted bug.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Bug {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// What is wrong with it.
            pub fn what(self) -> &'static str {
                match self {
                    $(Self::$name => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

bugs! {
    /// A flush is acknowledged before its record is synced.
    RecordNotSynced,
    /// Bytes stored in place are not synced before the record that marks them.
    InPlaceNotSynced,
    /// Bytes stored in place are synced after the record that marks them.
    InPlaceSyncedLate,
    /// A flush does not hear of bytes that were stored in place.
    InPlaceUncounted,
    /// A write that is to be durable before it is acknowledged is not synced.
    PaidNotSynced,
    /// Trims are dropped when a flush takes what is pending.
    TrimNotRecorded,
    /// What a failed flush took is not pending again.
    FailedFlushForgets,
    /// A failed sync is forgotten.
    FailureForgotten,
    /// The ranges in doubt after a failed sync are not told.
    DoubtNotTold,
    /// A guest's bytes go over a hydrated block before its mark is durable.
    WrittenBeforeMark,
    /// The marks of an intent are taken for durable without a record.
    IntentNotRecorded,
    /// A mark that a record made durable is not kept for the map.
    DirtyBitLost,
    /// Replay brings older bytes over a newer mark.
    ReplayOlderBytes,
    /// Replay ends one record early.
    ReplayOneShort,
    /// Replay begins one record late.
    ReplayOneLate,
    /// The checksum of a record's bytes is not looked at.
    RecordBytesUnchecked,
    /// The checksum of a record's head and entries is not looked at.
    RecordHeadUnchecked,
    /// A broken record is the journal's end, whatever later ones say of it.
    BrokenRecordEndsJournal,
    /// The sequence of the next record is not raised.
    SequenceNotRaised,
    /// A half of the journal is written again before it is settled.
    HalfNotSettled,
    /// Marks are stored before the bytes they speak of are synced.
    MarksBeforeBytes,
    /// More records count as settled than were.
    FloorTooHigh,
    /// Map pages are written in place before their images are synced.
    ImagesNotSynced,
    /// Map pages are not synced before their half of the journal is reused.
    MapNotSynced,
    /// A torn map page is not repaired from its image.
    ImageNotUsed,
    /// The checksum of a map page is not looked at.
    MapPageUnchecked,
    /// A trimmed block keeps the bytes that `disk.raw` holds under it.
    TrimLeavesBytes,
    /// A trimmed block is still read from memory.
    TrimLeavesPage,
    /// A range below without data is not cleared when it is hydrated.
    LeftoversKept,
    /// A write of a part of a block takes zeros, not the chain's bytes, for the rest.
    EdgeOfZeros,
    /// Pages are written back before their mark is durable.
    WriteBackEarly,
    /// The last block of a disk is taken for a whole one when it is written back.
    LastBlockWhole,
    /// Recovery stores marks before the bytes it replayed are synced.
    RecoveryNotSynced,
    /// Recovery does not store the marks it replayed.
    RecoveryMarksLost,
    /// Recovery counts too few written bytes.
    CountsWrong,
    /// A drain leaves pending what was not flushed.
    DrainWithoutFlush,
    /// After a drain, writes still wait in memory.
    DrainNotThrough,
    /// What an earlier life left under trimmed blocks stays after a drain.
    SweepSkipped,
    /// That an overlay was handed over is not recorded.
    HandOverNotRecorded,
    /// An overlay of another chain is opened.
    WrongChainAccepted,
    /// A journal of another overlay is replayed.
    WrongJournalAccepted,
    /// A shortened `disk.raw` is accepted.
    ShortRawAccepted,
    /// Unflushed writes of another boot are replayed.
    OtherBootReplayed,
    /// A write is acknowledged without being kept for the next process.
    WriteNotKept,
    /// Writes kept in two files are replayed the newer file first.
    KeptOutOfOrder,
    /// A kept write of an earlier life is replayed.
    KeptTooLong,
    /// The checksum of a kept write is not looked at.
    KeptUnchecked,
    /// The checksum of a stored block is not looked at.
    BlockUnchecked,
    /// A whole block at a wrong place is accepted.
    BlockMisplaced,
    /// A layer that is shorter than the disk does not end the walk.
    ShortLayerIsAbsent,
    /// The cache tells blocks of different files apart by their place only.
    CacheMixesFiles,
    /// A record gets its name before its bytes are synced.
    RecordUnsynced,
    /// A record is announced before its name is durable.
    RecordNameUnsynced,
    /// A new folder is used before its name is durable.
    FolderNameUnsynced,
    /// A folder that is there is taken for durable, whoever made it.
    FolderTrusted,
    /// A generation is put on one that may not be durable.
    GenerationTrusted,
    /// A lease that beats takes its place before its bytes are synced.
    LeaseUnsynced,
    /// The name of a new layer file is not durable when its point is committed.
    LayerNameUnsynced,
    /// A layer counts as sealed before its seal is synced.
    SealUnsynced,
    /// A waymark promises frames that were not synced.
    WaymarkUnsynced,
    /// What a keeper deletes is not looked up in the points that stay.
    NeededDeleted,
}

#[cfg(feature = "planted")]
std::thread_local! {
    static BUG: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Plants a bug for the calling thread, or removes it.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    BUG.set(bug);
}

/// Whether the calling thread is to behave wrongly in this way.
#[cfg(feature = "planted")]
pub fn planted(bug: Bug) -> bool {
    BUG.get() == Some(bug)
}

/// Never: this is not the test that plants bugs.
#[cfg(not(feature = "planted"))]
#[inline]
pub const fn planted(_bug: Bug) -> bool {
    false
}
