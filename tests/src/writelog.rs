//! The writes of a real file system to its disk, logged by QEMU, and what a loss of power leaves of them.
//!
//! `blklogwrites` lies under an NBD export, that under `nbdfuse`, and on its file a loop device can stand: no device
//! mapper, no kernel module. The log has the format of the kernel's `dm-log-writes`, in sectors of 4096 bytes. QEMU's
//! own FUSE export will not do: in QEMU 10.0 a write that arrives while another is under way lands in its buffer, so
//! image and log both hold bytes that nobody wrote there.
//!
//! Invariants
//! - What was written before the last flush is there; of what was written later any subset is, each write on its own.
//!
//! Not here: what lives in the file system.

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use crate::rng::Rng;

const SECTOR: u64 = 4096;
const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

/// An image whose writes are logged.
#[derive(Debug)]
pub struct Logged {
    daemons: [Child; 2],
    image: PathBuf,
    log: PathBuf,
    path: PathBuf,
}

impl Logged {
    /// Starts to log the writes to `image`, with files of its own in `dir`.
    pub fn start(dir: &Path, image: &Path) -> Self {
        let (log, mount, socket) = (dir.join("log"), dir.join("logged"), dir.join("nbd"));
        fs::write(&log, []).expect("a log");
        fs::create_dir(&mount).expect("a mount point");
        let storage = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &format!("driver=file,node-name=image,filename={}", image.display())])
            .args(["--blockdev", &format!("driver=file,node-name=log,filename={}", log.display())])
            .args(["--blockdev", "driver=blklogwrites,node-name=logged,file=image,log=log,log-sector-size=4096"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", socket.display())])
            .args(["--export", "type=nbd,id=e,name=e,node-name=logged,writable=on"])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon");
        comes(&socket);
        let path = mount.join("disk");
        let fuse = Command::new("nbdfuse")
            .arg(&path)
            .arg(format!("nbd+unix:///e?socket={}", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("nbdfuse");
        comes(&path);
        Self { daemons: [fuse, storage], image: image.to_path_buf(), log, path }
    }

    /// The file whose writes are logged.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How far the log has come, in bytes: what was acknowledged lies before.
    pub fn position(&self) -> u64 {
        fs::metadata(&self.log).expect("the log").len()
    }

    /// Ends the log and reads it.
    ///
    /// # Panics
    /// The log does not lead from `base`, the image as it was, to the image as it is.
    pub fn stop(mut self, base: &Path) -> Vec<Entry> {
        self.end();
        let log = read_log(&self.log).expect("a whole log");
        let mut bytes = fs::read(base).expect("the base");
        for entry in &log {
            bytes[entry.offset as usize..][..entry.bytes.len()].copy_from_slice(&entry.bytes);
        }
        assert!(fs::read(&self.image).expect("the image") == bytes, "the log is not what was written");
        log
    }

    fn end(&mut self) {
        let mount = self.path.parent().expect("a folder");
        let _may_be_gone = Command::new("umount").arg(mount).stderr(Stdio::null()).status();
        for daemon in &mut self.daemons {
            let _may_be_gone = daemon.kill();
            let _may_be_gone = daemon.wait();
        }
    }
}

fn comes(path: &Path) {
    let started = Instant::now();
    while !path.exists() {
        assert!(started.elapsed() < Duration::from_secs(30), "{} does not come", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        self.end();
    }
}

/// One write or flush.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Where it ends in the log, in bytes.
    pub ends: u64,
    /// Everything before it is durable.
    pub flush: bool,
    /// Where it lands, in bytes.
    offset: u64,
    bytes: Vec<u8>,
}

fn read_log(path: &Path) -> io::Result<Vec<Entry>> {
    let log = fs::read(path)?;
    let field = |at: usize| -> u64 {
        let bytes = log.get(at..at + 8).expect("a log that is whole");
        u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
    };
    assert_eq!(field(0), MAGIC, "a log of writes");
    let (mut at, mut out) = (SECTOR as usize, Vec::new());
    // The count in the first sector may be behind; an entry of nothing ends the log.
    while at + 32 <= log.len() {
        let (place, sectors, flags) = (field(at), field(at + 8), field(at + 16));
        if place == 0 && sectors == 0 && flags == 0 {
            break;
        }
        at += SECTOR as usize;
        let len = (sectors * SECTOR) as usize;
        let bytes = if flags & DISCARD != 0 {
            vec![0; len]
        } else {
            at += len;
            log[at - len..at].to_vec()
        };
        out.push(Entry { ends: at as u64, flush: flags & FLUSH != 0, offset: place * SECTOR, bytes });
    }
    Ok(out)
}

/// Makes of `image`, a copy of what was there before the log, what a loss of power may leave `upto` entries into it.
///
/// # Errors
/// I/O.
pub fn lose_power(image: &Path, log: &[Entry], upto: usize, dice: &mut Rng) -> io::Result<()> {
    let file = fs::File::options().write(true).open(image)?;
    let durable = log[..upto].iter().rposition(|entry| entry.flush).map_or(0, |last| last + 1);
    let all = dice.once_in(3);
    for (number, entry) in log[..upto].iter().enumerate() {
        if number < durable || all || dice.once_in(2) {
            file.write_all_at(&entry.bytes, entry.offset)?;
        }
    }
    Ok(())
}
