//! Small storages made by hand; those of the program itself are compared in `tests/it/foreign/stores.rs`.

use std::fs;

use md5::{Digest as _, Md5};

use super::{blake2b::blake2b, *};
use crate::{
    Content, Layer as _,
    made::{is_corrupt, is_unsupported},
    objects::hexadecimal,
    storage::{Access, FileStorage},
};

const BLOCK: usize = 4096;

struct Made {
    dir: tempfile::TempDir,
}

impl Made {
    fn new() -> Self {
        let made = Self { dir: tempfile::tempdir().expect("a folder") };
        fs::create_dir_all(made.dir.path().join("blocks")).expect("a folder");
        fs::create_dir_all(made.dir.path().join("versions/9c/5e")).expect("a folder");
        made
    }

    /// Stores the bytes of a block; answers its entry in a list.
    fn block(&self, index: u64, bytes: &[u8], stored: &[u8], transforms: &str) -> String {
        let sum = hexadecimal(&blake2b(bytes, 32));
        let meta = format!(
            r#"{{"created":"","modified":"","metadata_version":"2.0.0","object_size":{},"size":{},"checksum":"{sum}"{transforms}}}"#,
            stored.len(),
            bytes.len()
        );
        let path = self.path(index);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(format!("{}.meta", path.display()), meta).expect("write");
        fs::write(path, stored).expect("write");
        format!(
            r#"{{"idx":{index},"uid":{{"left":{index},"right":1}},"size":{},"valid":true,"checksum":"{sum}"}}"#,
            bytes.len()
        )
    }

    fn path(&self, index: u64) -> PathBuf {
        let key = format!("{index:016x}-{:016x}", 1);
        let place = hexadecimal(&Md5::digest(key.as_bytes()));
        self.dir.path().join("blocks").join(&place[..2]).join(&place[2..4]).join(key)
    }

    fn open(&self, more: &str, size: usize, blocks: &[String]) -> Result<BenjiLayer> {
        self.raw(&format!(
            r#"{{"metadata_version":"3.0.0","versions":[{{"uid":"V1","date":"2026-11-01T00:00:00.000000Z","volume":"v","snapshot":"",
            "size":{size},"block_size":{BLOCK},{more}"blocks":[{}]}}]}}"#,
            blocks.join(",")
        ))
    }

    fn raw(&self, text: &str) -> Result<BenjiLayer> {
        let found = self.all(text)?;
        let name = found.disks().first().map(|name| (*name).to_owned()).unwrap_or_default();
        found.disk(&name)
    }

    fn all(&self, text: &str) -> Result<Versions> {
        let path = self.dir.path().join("versions/9c/5e/V1");
        fs::write(&path, text).expect("write");
        Versions::open(Arc::new(FileStorage::open(&path, Access::ReadOnly)?), &path)
    }
}

const ZSTD: &str = r#","transforms":[{"name":"z","module":"zstd","materials":{"original_size":4096}}]"#;

fn read(layer: &BenjiLayer, at: u64) -> Result<Vec<u8>> {
    let Content::Packed { block, .. } = layer.lookup(at, 1)?.0 else { panic!("packed") };
    let mut out = b"what another left".to_vec();
    let done = layer.unpack(&block, 1, &mut out);
    assert_eq!(out.is_empty(), done.is_err());
    done.map(|()| out)
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).expect("memory")
}

#[test]
fn blake2b_gives_its_published_values() {
    let digest = |text: &[u8], len| hexadecimal(&blake2b(text, len));
    assert_eq!(
        digest(b"abc", 64),
        "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d17d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923"
    );
    assert_eq!(digest(b"", 32), "0e5751c026e543b2e8ab2eb06099daa1d1e5df47778f7787faab45cdf12fe3a8");
    // Python's: a block, a block and a byte, many.
    assert_eq!(digest(&[7; 128], 32), PYTHON[0]);
    assert_eq!(digest(&[7; 129], 32), PYTHON[1]);
    assert_eq!(digest(&[7; 4096], 32), PYTHON[2]);
}

#[test]
fn blocks_read_and_what_is_not_listed_is_zeros() {
    let (made, a, b) = (Made::new(), [1; BLOCK], [2; 512]);
    let blocks = [made.block(3, &b, &b, ""), made.block(1, &a, &zstd(&a), ZSTD)];
    let layer = made.open(r#""status":"valid","#, 3 * BLOCK + 512, &blocks).expect("opens");
    assert_eq!((layer.size(), layer.grain()), (3 * 4096 + 512, 4096));
    assert_eq!(read(&layer, 5000).expect("bytes"), a);
    let last = read(&layer, 3 * 4096).expect("bytes");
    assert_eq!((&last[..512], last.len()), (&b[..], BLOCK), "what is behind the end reads as zeros");
    assert_eq!(layer.lookup(0, u64::MAX).expect("zeros"), (Content::Zero, 4096));
    assert_eq!(layer.lookup(8192, u64::MAX).expect("zeros"), (Content::Zero, 4096));
}

#[test]
fn documents_of_older_releases_and_of_several_versions_read() {
    let (made, a) = (Made::new(), [1; BLOCK]);
    let listed = made.block(0, &a, &a, "").replace("\"idx\"", "\"id\"");
    let sparse = r#"{"id":1,"uid":{"left":null,"right":null},"size":4096,"valid":true,"checksum":null}"#;
    let version = |uid: u32| {
        format!(
            r#"{{"uid":{uid},"name":"v","date":"2019-01-01T00:00:00","size":8192,"block_size":4096,"valid":true,"blocks":[{listed},{sparse}]}}"#
        )
    };
    let one = made.all(&format!(r#"{{"metadata_version":"1.1.0","versions":[{}]}}"#, version(1))).expect("reads");
    assert_eq!(one.disks(), ["v"]);
    assert_eq!(one.versions[0].0.created().expect("a time").to_string(), "2019-01-01T00:00:00Z");
    let layer = one.disk("v").expect("opens");
    assert_eq!((read(&layer, 0).expect("bytes"), layer.lookup(4096, 1).expect("zeros").0), (a.into(), Content::Zero));
    let two = made.all(&format!(r#"{{"metadata_version":"2.0.0","versions":[{},{}]}}"#, version(1), version(2)));
    assert_eq!(two.expect("reads").disks(), ["V0000000001", "V0000000002"]);
    assert!(is_unsupported(made.all(r#"{"metadata_version":"4.0.0","versions":[]}"#)));
    // An object that is compressed, as those of a storage with a transform are.
    let text = format!(r#"{{"metadata_version":"3.0.0","versions":[{}]}}"#, version(1));
    let path = made.dir.path().join("versions/9c/5e/V1");
    let meta = format!(r#"{{"metadata_version":"2.0.0","object_size":1,"size":{}{ZSTD}}}"#, text.len());
    fs::write(description_of(&path), meta).expect("write");
    fs::write(&path, zstd(text.as_bytes())).expect("write");
    let opened = Versions::open(Arc::new(FileStorage::open(&path, Access::ReadOnly).expect("opens")), &path);
    assert_eq!(opened.expect("reads").disks(), ["v"]);
    assert!(is_object(&path) && !is_object(&made.path(0).with_extension("none")));
    let listed = versions(made.dir.path()).expect("lists").expect("a storage");
    assert!(listed.len() == 1 && listed[0].versions.is_ok());
    fs::write(&path, &zstd(text.as_bytes())[..40]).expect("write");
    assert!(versions(made.dir.path()).expect("lists").expect("a storage")[0].versions.is_err(), "cut");
    assert!(versions(&made.dir.path().join("blocks")).expect("looks").is_none());
}

use super::object::description_of;

#[test]
fn what_is_not_served_is_refused_by_name() {
    let (made, a) = (Made::new(), [1; BLOCK]);
    let plain = made.block(0, &a, &a, "");
    assert!(is_unsupported(made.open(r#""status":"incomplete","#, BLOCK, std::slice::from_ref(&plain))));
    assert!(is_unsupported(made.open(r#""status":"invalid","#, BLOCK, std::slice::from_ref(&plain))));
    assert!(is_unsupported(made.open(r#""valid":false,"#, BLOCK, &[plain])));
    for module in ["aes_256_gcm", "aes_256_gcm_ecc", "other"] {
        let transforms = format!(r#","transforms":[{{"name":"k","module":"{module}","materials":{{}}}}]"#);
        let sealed = made.block(0, &a, &a, &transforms);
        assert!(is_unsupported(made.open("", BLOCK, &[sealed])), "{module}");
    }
    // A frame that says it was made with a dictionary.
    let listed = made.block(0, &a, b"\x28\xb5\x2f\xfd\x01\x00\x07\x00\x00\x00\x00", ZSTD);
    assert!(is_unsupported(read(&made.open("", BLOCK, &[listed]).expect("opens"), 0)));
}

#[test]
fn lists_that_do_not_fit_together_are_damage() {
    let (made, a) = (Made::new(), [1; BLOCK]);
    let block = made.block(0, &a, &a, "");
    let at = |index: &str| block.replace("\"idx\":0", &format!("\"idx\":{index}"));
    for blocks in [vec![block.clone(), block.clone()], vec![at("1")], vec![at("18446744073709551615")]] {
        assert!(is_corrupt(made.open("", BLOCK, &blocks)), "{blocks:?}");
    }
    for wrong in [block.replace("4096", "4095"), block.replace("checksum\":\"", "checksum\":\"0"), "7".into()] {
        assert!(is_corrupt(made.open("", BLOCK, &[wrong])));
    }
    assert!(is_corrupt(made.open("", 0, &[])) && is_corrupt(made.open("", 100, &[])));
    for text in ["", "{}", r#"{"metadata_version":"3.0.0","versions":7}"#, &"[".repeat(100_000)] {
        assert!(is_corrupt(made.all(text)), "{text:.20}");
    }
    let sizes = r#"{"metadata_version":"3.0.0","versions":[{"uid":"V1","volume":"v","size":4096,"block_size":BS,"blocks":[]}]}"#;
    for size in ["0", "512", "5000", "8388608"] {
        assert!(is_unsupported(made.raw(&sizes.replace("BS", size))), "{size}");
    }
}

#[test]
fn only_an_entry_that_says_so_is_zeros() {
    let (made, a) = (Made::new(), [1; BLOCK]);
    let block = made.block(0, &a, &a, "");
    let (name, sum) = (r#""uid":{"left":0,"right":1}"#, block.split(r#","checksum""#).nth(1).expect("a checksum"));
    let bare = block.replace(&format!(r#","checksum"{sum}"#), "}");
    assert!(block.contains(name) && !bare.contains("checksum"));
    for zeros in [r#""uid":null"#, r#""uid":{"left":null,"right":null}"#] {
        for checksum in ["}", r#","checksum":null}"#] {
            let entry = bare.replace(name, zeros).replace("true}", &format!("true{checksum}"));
            let layer = made.open("", BLOCK, &[entry]).expect("opens");
            assert_eq!(layer.lookup(0, 1).expect("zeros").0, Content::Zero);
        }
        assert!(is_corrupt(made.open("", BLOCK, &[block.replace(name, zeros)])), "{zeros} and a checksum");
    }
    assert!(is_corrupt(made.open("", BLOCK, std::slice::from_ref(&bare))), "no checksum");
    for damaged in [
        r#""uid":{"left":0,"right":null}"#,
        r#""uid":{"left":null,"right":1}"#,
        r#""uid":{"Left":0,"Right":1}"#,
        r#""uid":{"left":null}"#,
        r#""uid":{}"#,
        r#""UID":null"#,
        r#""uid":7"#,
    ] {
        for entry in [&block, &bare] {
            assert!(is_corrupt(made.open("", BLOCK, &[entry.replace(name, damaged)])), "{damaged}");
        }
    }
    // Twice, once or each time as zeros.
    let zeros = bare.replace(name, r#""uid":null"#);
    let last = zeros.replace(r#""idx":0"#, r#""idx":1"#);
    for twice in [[&block, &zeros], [&zeros, &block], [&zeros, &zeros], [&block, &block]] {
        assert!(is_corrupt(made.open("", 2 * BLOCK, &twice.map(Clone::clone))), "{twice:?}");
    }
    assert!(made.open("", 2 * BLOCK, &[last.clone(), block.clone()]).is_ok());
    // More entries than blocks, wherever the document says its sizes.
    assert!(is_corrupt(made.open("", BLOCK, &[last.clone(), block.clone()])));
    for (sizes, is_read) in [((4096, 4096), false), ((8192, 4096), true), ((70_368_744_181_760u64, 4096), false)] {
        let text = format!(
            r#"{{"metadata_version":"3.0.0","versions":[{{"uid":"V1","volume":"v","blocks":[{last},{block}],"size":{},"block_size":{}}}]}}"#,
            sizes.0, sizes.1
        );
        assert_eq!(made.raw(&text).is_ok(), is_read, "{sizes:?}");
    }
}

#[test]
fn a_list_of_versions_keeps_no_blocks_and_waits_for_no_pipe() {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    let made = Made::new();
    // What a list of blocks would stumble over shows that it is not read.
    let text = r#"{"metadata_version":"3.0.0","versions":[{"uid":"V1","volume":"v","size":4096,"block_size":4096,"blocks":[7,7,7]}]}"#;
    assert!(is_corrupt(made.all(text)));
    let state = || {
        let listed = versions(made.dir.path()).expect("lists").expect("a storage");
        listed.into_iter().map(|stored| stored.versions.map(|versions| versions.len())).next()
    };
    assert!(matches!(state(), Some(Ok(1))));
    let path = made.dir.path().join("versions/9c/5e/V1");
    mknodat(CWD, description_of(&path), FileType::Fifo, Mode::RUSR, 0).expect("a pipe");
    assert!(matches!(state(), Some(Err(Error::Refused { .. }))));
    fs::remove_file(description_of(&path)).expect("remove");
    std::os::unix::fs::symlink(made.dir.path().join("none"), description_of(&path)).expect("a link");
    assert!(matches!(state(), Some(Err(Error::Io { .. }))));
}

#[test]
fn a_block_that_is_gone_or_damaged_is_an_error_and_never_zeros() {
    let (made, a) = (Made::new(), [1; BLOCK]);
    let listed = made.block(0, &a, &zstd(&a), ZSTD);
    let layer = made.open("", BLOCK, &[listed]).expect("opens");
    assert!(read(&layer, 0).is_ok());
    let (path, description) = (made.path(0), description_of(&made.path(0)));
    let whole = zstd(&a);
    for bytes in [whole[..whole.len() - 1].to_vec(), zstd(&[2; BLOCK]), vec![0; whole.len()], vec![1; 1 << 20], vec![]]
    {
        fs::write(&path, &bytes).expect("write");
        assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })), "{} bytes", bytes.len());
    }
    // Another block with a description that fits it.
    made.block(0, &[2; BLOCK], &zstd(&[2; BLOCK]), ZSTD);
    assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })));
    let bomb = zstd(&vec![0; 64 << 20]);
    made.block(0, &a, &bomb, r#","transforms":[{"name":"z","module":"zstd","materials":{"original_size":67108864}}]"#);
    assert!(matches!(read(&layer, 0), Err(Error::BadBlock { .. })), "a bomb");
    fs::remove_file(&description).expect("remove");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })));
    made.block(0, &a, &zstd(&a), ZSTD);
    fs::remove_file(&path).expect("remove");
    assert!(matches!(read(&layer, 0), Err(Error::ChainBroken { .. })));
}

const PYTHON: [&str; 3] = [
    "332f1f712b03a6a6f6c28db7d96c62f170744119ab0f831b9e0d80f800e3aad7",
    "a04de7247309966b2b2afc367838071ea523f897e6a405286f2b5627032a8dea",
    "62945e6d677bf49a2c8923fbb29436bc143757d5458dbb7bac09ea3c73dca399",
];
