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
    /// When its backup began, by a local clock.
    pub date: &'a str,
}

/// A day.
pub const DATE: &str = "2026-11-21T00:00:00";

/// Bytes of a piece.
const PIECE: usize = 64 << 10;

fn frame(kind: &str, start: usize, len: usize) -> Vec<u8> {
    format!("{kind} {start:016x} {len:016x}\r\n").into_bytes()
}

/// `bytes` as one frame, by the program `lz4`: checksums of blocks and content, its length, blocks that refer back.
fn lz4(bytes: &[u8]) -> Vec<u8> {
    let from = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(from.path(), bytes).expect("write");
    let mut lz4 = std::process::Command::new("lz4");
    // From a file it knows the length, and notes it.
    let made = lz4
        .args(["-q", "-z", "-c", "-BD", "-BX", "-B4", "--content-size"])
        .arg(from.path())
        .output()
        .expect("lz4 runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    made.stdout
}

impl Point<'_> {
    /// The file, its data in LZ4: every other piece in two frames.
    pub fn compressed(&self) -> Vec<u8> {
        let plain = String::from_utf8_lossy(&self.file()[..1 << 10]).contains("\"compressed\": false");
        assert!(plain, "the description says so");
        let file = self.file();
        let (mut out, mut at, mut lengths) = (Vec::new(), 0, Vec::new());
        loop {
            let head = file[at..at + 40].to_vec();
            let len = usize::from_str_radix(std::str::from_utf8(&head[22..38]).expect("digits"), 16).expect("a number");
            at += 40;
            match &head[..4] {
                b"meta" => {
                    let meta = String::from_utf8(file[at..at + len].to_vec()).expect("text");
                    let meta = meta.replace("\"compressed\": false", "\"compressed\": true");
                    out.extend(frame("meta", 0, meta.len()));
                    out.extend(meta.bytes());
                    out.extend(b"\r\n");
                    at += len + 2;
                }
                b"data" => {
                    let body = &file[at..at + len];
                    out.extend(head);
                    let halves =
                        if lengths.len() % 2 == 0 { vec![body] } else { body.chunks(len.div_ceil(2)).collect() };
                    let frames: Vec<Vec<u8>> = halves.into_iter().map(lz4).collect();
                    let sizes: Vec<String> = frames.iter().map(|frame| frame.len().to_string()).collect();
                    lengths.push(match sizes.as_slice() {
                        [one] => one.clone(),
                        several => format!("{{\"{len}\": [{}]}}", several.join(", ")),
                    });
                    out.extend(frames.concat());
                    out.extend(b"\r\n");
                    at += len + 2;
                }
                b"zero" => out.extend(head),
                _ => break,
            }
        }
        out.extend(frame("stop", 0, 0));
        let list = format!("[{}]", lengths.join(", "));
        out.extend(list.bytes());
        out.extend(b"\r\n");
        out.extend(frame("comp", 0, list.len()));
        out
    }

    /// The file.
    pub fn file(&self) -> Vec<u8> {
        let parent = self.below.map_or("false".to_owned(), |(name, _)| format!("\"{name}\""));
        let meta = format!(
            "{{\"virtualSize\": {}, \"dataSize\": 1, \"date\": \"{}\", \"diskName\": \"{}\", \
             \"diskFormat\": \"qcow2\", \"checkpointName\": \"{}\", \"compressed\": false, \
             \"compressionMethod\": \"lz4\", \"parentCheckpoint\": {parent}, \"incremental\": {}, \"streamVersion\": 2}}",
            self.bytes.len(),
            self.date,
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
