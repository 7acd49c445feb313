//! What the tests of the doors share: reproducible bytes and numbers, a source that can be held up.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aquifer_formats::{Layer, Storage, raw::RawLayer, storage::MemoryStorage};
use aquifer_mount::nbd::{Address, Client, ClientOptions, NbdLayer};
use aquifer_vdisk::{BlockCache, Chain, Disk, Overlay, OverlayOf, OverlayOptions};

use crate::rng::Rng;

/// `AQUIFER_TEST_SCALE`: how much longer than usual a test is to run.
pub fn scale() -> u64 {
    std::env::var("AQUIFER_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1)
}

/// Bytes of which every 4 KiB block differs, with every third 64 KiB zero.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut numbers = Rng::new(seed);
    let mut out = vec![0; len];
    for (index, block) in out.chunks_mut(4096).enumerate() {
        if (index / 16) % 3 != 2 {
            for word in block.chunks_mut(8) {
                let n = numbers.next_u64().to_le_bytes();
                word.copy_from_slice(&n[..word.len()]);
            }
        }
    }
    out
}

/// A chain of one raw layer over `source`.
pub fn chain(source: Arc<dyn Storage>) -> Arc<Chain> {
    let layer = RawLayer::open(source).expect("layer");
    Arc::new(Chain::new(vec![Arc::new(layer)], Arc::new(BlockCache::new(64 << 20))).expect("chain"))
}

/// A read-only disk that holds `bytes`.
pub fn read_only(name: &str, bytes: Vec<u8>) -> Arc<Disk> {
    Arc::new(Disk::read_only(name, chain(Arc::new(MemoryStorage::new(name, bytes)))))
}

/// A writable disk over `source` with its overlay in `dir`.
pub fn writable(name: &str, source: Arc<dyn Storage>, dir: &std::path::Path) -> Arc<Disk> {
    let chain = chain(source);
    let of = OverlayOf { size: chain.size(), chain: chain.fingerprint().expect("fingerprint") };
    let overlay = Overlay::create(dir, of, OverlayOptions::default()).expect("overlay");
    Arc::new(Disk::writable(name, chain, overlay).expect("disk"))
}

/// The export a URI names as a layer, as a door of a session opens it.
///
/// # Errors
/// Whatever the server or the way to it does.
pub fn nbd_layer(uri: &str) -> aquifer_formats::Result<Arc<dyn Layer>> {
    let failed = |e| aquifer_formats::Error::io(uri, "connect", 0, io::Error::other(e));
    let client =
        Client::connect(&uri.parse::<Address>().map_err(failed)?, &ClientOptions::default()).map_err(failed)?;
    Ok(Arc::new(NbdLayer::new(Arc::new(client))))
}

/// A file whose reads or syncs can be held up, and that counts what it gives.
#[derive(Debug)]
pub struct HeldStorage {
    inner: MemoryStorage,
    held: AtomicBool,
    syncs_held: AtomicBool,
    waiting: AtomicU64,
    read: AtomicU64,
}

impl HeldStorage {
    /// A source of `bytes`, not held.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        let inner = MemoryStorage::new("held", bytes);
        let (held, syncs_held) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { inner, held, syncs_held, waiting: AtomicU64::new(0), read: AtomicU64::new(0) })
    }

    /// Makes every read from now on wait until [`HeldStorage::release`], or fail after half a minute.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// The same for every sync.
    pub fn hold_syncs(&self) {
        self.syncs_held.store(true, Ordering::SeqCst);
    }

    /// Lets all go.
    pub fn release(&self) {
        self.held.store(false, Ordering::SeqCst);
        self.syncs_held.store(false, Ordering::SeqCst);
    }

    fn wait_while(&self, held: &AtomicBool) -> io::Result<()> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        while held.load(Ordering::SeqCst) {
            if start.elapsed() > Duration::from_secs(30) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    /// Calls that wait now.
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Bytes given so far.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::SeqCst)
    }
}

impl Storage for HeldStorage {
    fn label(&self) -> &str {
        self.inner.label()
    }

    fn identity(&self) -> Option<u64> {
        None
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.wait_while(&self.held)?;
        self.read.fetch_add(buf.len() as u64, Ordering::SeqCst);
        self.inner.read_at(offset, buf)
    }

    fn read_now(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<bool> {
        Ok(false)
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.inner.write_at(offset, buf)
    }

    fn allocated(&self, offset: u64, len_max: u64) -> io::Result<(bool, u64)> {
        self.inner.allocated(offset, len_max)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.reserve(offset, len)
    }

    fn start_writeback(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.start_writeback(offset, len)
    }

    fn forget_cached(&self, offset: u64, len: u64) -> io::Result<()> {
        self.inner.forget_cached(offset, len)
    }

    fn sync(&self) -> io::Result<()> {
        self.wait_while(&self.syncs_held)?;
        self.inner.sync()
    }
}
