//! Streams of virtnbdbackup as that program lays them out, not compressed.

/// One point of a disk.
#[derive(Clone, Copy, Debug)]
pub struct Point<'a> {
    /// The disk's name.
    pub disk: &'a str,
    /// Its checkpoint.
    pub checkpoint: &'a str,
    /// The checkpoint below and the disk as it was there; `None` for a full one.
    pub below: Option<(&'a str, &'a [u8])>,
    /// The disk.
    pub bytes: &'a [u8],
}

/// Bytes of a piece.
const PIECE: usize = 64 << 10;

fn frame(kind: &str, start: usize, len: usize) -> Vec<u8> {
    format!("{kind} {start:016x} {len:016x}\r\n").into_bytes()
}

impl Point<'_> {
    /// The file.
    pub fn file(&self) -> Vec<u8> {
        let parent = self.below.map_or("false".to_owned(), |(name, _)| format!("\"{name}\""));
        let meta = format!(
            "{{\"virtualSize\": {}, \"dataSize\": 1, \"date\": \"2026-11-21T00:00:00\", \"diskName\": \"{}\", \
             \"diskFormat\": \"qcow2\", \"checkpointName\": \"{}\", \"compressed\": false, \
             \"compressionMethod\": \"lz4\", \"parentCheckpoint\": {parent}, \"incremental\": {}, \"streamVersion\": 2}}",
            self.bytes.len(),
            self.disk,
            self.checkpoint,
            self.below.is_some(),
        );
        let mut out = frame("meta", 0, meta.len());
        out.extend(meta.bytes());
        out.extend(b"\r\n");
        for (number, bytes) in self.bytes.chunks(PIECE).enumerate() {
            let start = number * PIECE;
            let old = self.below.and_then(|(_, old)| old.get(start..start + bytes.len()));
            match bytes.iter().all(|b| *b == 0) {
                _ if old == Some(bytes) => {}
                true => out.extend(frame("zero", start, bytes.len())),
                false => {
                    out.extend(frame("data", start, bytes.len()));
                    out.extend(bytes);
                    out.extend(b"\r\n");
                }
            }
        }
        out.extend(frame("stop", 0, 0));
        out
    }
}
