//! Bytes at rest: positional, shared, never seeking.
//!
//! Invariants
//! - Every method takes `&self`; any number of threads may call at once.
//! - `read_at` fills the whole buffer or fails; a read past the end is `UnexpectedEof`.
//! - Nothing is durable before [`Storage::sync`] has returned `Ok`. A failed sync proves nothing
//!   about earlier writes, and a later successful one does not either (Rebello et al., ATC 2020).
//!
//! Not here: names and folders. Whoever opens a storage knows where it came from and what
//! [`Storage::label`] should say.

mod behind;
mod file;
mod memory;
mod view;

pub use behind::{Readers, WriteBehind};
pub use file::{Access, FileStorage};
pub use memory::MemoryStorage;
pub(crate) use view::{Patch, View};

use std::{fmt::Debug, io};

/// One file, object or byte buffer.
#[expect(
    clippy::len_without_is_empty,
    reason = "a length here is a system call that can fail; nobody asks for emptiness"
)]
pub trait Storage: Debug + Send + Sync {
    /// Name for messages: a path or a URI.
    fn label(&self) -> &str;

    /// Identity of the stored bytes, where the storage can tell: equal ones mean the same file in the
    /// same state, so what was decoded from it may be shared. `None` where nothing proves that.
    fn identity(&self) -> Option<u64>;

    /// Length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`, or fails.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// As [`Storage::read_at`], but only where nothing has to be waited for (bytes in memory, or in
    /// the page cache): `Ok(false)` leaves `buf` in any state. A storage that cannot tell says `false`.
    fn read_now(&self, offset: u64, buf: &mut [u8]) -> io::Result<bool>;

    /// Writes all of `buf` at `offset`, growing the storage where needed.
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Whether bytes are stored at `offset`, and for how many bytes of `1..=len_max` that answer holds.
    /// `false` is a hole that reads as zeros; a storage that cannot tell says `true` for all.
    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)>;

    /// Makes `offset..offset + len` read as zeros and gives its space back where that is possible.
    /// The length of the storage does not change; a range past the end is cut.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Cuts or extends (with zeros, sparse) to `len` bytes.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Makes sure that writes to a range cannot fail for lack of space, growing the storage where needed;
    /// what the range holds does not change. A storage that cannot promise that does nothing.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Asks for write-back of a range to begin. A hint: no durability, errors only if the call itself is refused.
    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Says that nobody will read a range soon, so its memory is better used for something else. A hint, and only about
    /// bytes that have been written back: nothing is lost by it.
    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes everything written so far durable (data and length).
    fn sync(&self) -> io::Result<()>;
}

/// The methods of a [`Storage`] that change bytes, for one that has none to change: all are refused, and what only gives
/// hints or makes durable has nothing to do.
#[macro_export]
macro_rules! storage_is_read_only {
    () => {
        fn write_at(&self, _offset: u64, _buf: &[u8]) -> std::io::Result<()> {
            Err($crate::storage::read_only())
        }

        fn punch(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
            Err($crate::storage::read_only())
        }

        fn set_len(&self, _len: u64) -> std::io::Result<()> {
            Err($crate::storage::read_only())
        }

        fn reserve(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
            Err($crate::storage::read_only())
        }

        fn start_writeback(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
            Ok(())
        }

        fn forget_cached(&self, _offset: u64, _len: u64) -> std::io::Result<()> {
            Ok(())
        }

        fn sync(&self) -> std::io::Result<()> {
            Ok(())
        }
    };
}

/// What a write to a source is answered.
pub fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "a source is never written to")
}
