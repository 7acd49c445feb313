//! Promise: what a disk holds is what every NBD client gets, and what a client has flushed is there:
//! judged by nbdinfo, nbdcopy, QEMU, libnbd, fio and the `nbd` crate, over Unix sockets, TCP and TLS.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use aquifer_formats::{Layer as _, storage::MemoryStorage};
use aquifer_mount::nbd::{Client, ClientOptions, ClientTls, DirtyContext, Export, NbdLayer, Server, ServerTls};
use aquifer_tests::{door, qemu, rng::Rng};
use aquifer_vdisk::{Delta, Disk};

const SIZE: usize = 24 << 20;

/// Runs a program; its output if it succeeds, what it said if not.
fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let done = Command::new(program).args(args).stdin(Stdio::null()).output().expect(program);
    let (out, said) = (String::from_utf8_lossy(&done.stdout).into_owned(), String::from_utf8_lossy(&done.stderr));
    if done.status.success() { Ok(out) } else { Err(format!("{program} {args:?}: {out}{said}")) }
}

fn must(program: &str, args: &[&str]) -> String {
    run(program, args).unwrap_or_else(|said| panic!("{said}"))
}

/// libnbd's Python, connected as `h`.
fn libnbd(uri: &str, script: &str) -> Result<String, String> {
    let head = format!(
        "import nbd\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\nh.set_uri_allow_local_file(True)\n\
         h.connect_uri({uri:?})\n"
    );
    run("/usr/bin/python3", &["-c", &(head + script)])
}

struct Served {
    server: Server,
    uri: String,
    folder: tempfile::TempDir,
}

fn serve(exports: Vec<Export>) -> Served {
    let folder = tempfile::tempdir().expect("folder");
    let mut builder = Server::builder();
    for export in exports {
        builder = builder.export(export);
    }
    let server = builder.build().expect("server");
    let uri = server.listen_unix(&folder.path().join("s")).expect("listen").to_string();
    Served { server, uri, folder }
}

fn writable(folder: &Path) -> (Arc<Disk>, Vec<u8>) {
    let bytes = door::pattern(SIZE, 3);
    (door::writable("vda", Arc::new(MemoryStorage::new("m", bytes.clone())), folder), bytes)
}

#[test]
fn readers_get_the_disk_and_its_map() {
    let bytes = door::pattern(SIZE, 1);
    let delta = Arc::new([4096..8192, (3 << 20)..(5 << 20)].into_iter().collect::<Delta>());
    let mut first = Export::new("vda", door::read_only("vda", bytes.clone()));
    first.contexts.push(DirtyContext::new("p1", delta));
    let second = Export::new("vdb", door::read_only("vdb", vec![7; 1 << 20]));
    let served = serve(vec![first, second]);
    let (uri, want) = (served.uri.as_str(), served.folder.path().join("want"));
    fs::write(&want, &bytes).expect("write");

    let list = must("nbdinfo", &["--list", "--json", uri]);
    assert!(list.contains("\"vda\"") && list.contains("\"vdb\""), "{list}");
    let info = must("nbdinfo", &["--json", uri]);
    assert!(info.contains(&format!("\"export-size\": {SIZE}")) && info.contains("\"is_read_only\": true"), "{info}");
    let map = must("nbdinfo", &["--map=qemu:dirty-bitmap:p1", uri]);
    let dirty: Vec<(u64, u64)> = map
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .filter(|f| f[2] == "1")
        .map(|f| (f[0].parse().unwrap(), f[1].parse().unwrap()))
        .collect();
    assert_eq!(dirty, [(4096, 4096), (3 << 20, 2 << 20)], "{map}");

    let copy = served.folder.path().join("copy");
    must("nbdcopy", &[uri, qemu::text(&copy)]);
    assert!(fs::read(&copy).expect("copy") == bytes, "nbdcopy");
    qemu::img(&["compare", "-f", "raw", "-F", "raw", uri, qemu::text(&want)]);
    qemu::img(&["bench", "-f", "raw", "-c", "2000", "-d", "16", uri]);
    qemu::img(&["convert", "-f", "raw", "-O", "raw", uri, qemu::text(&copy)]);
    assert!(fs::read(&copy).expect("copy") == bytes, "qemu-img convert");
    let told =
        libnbd(uri, "print(h.get_structured_replies_negotiated(), h.can_multi_conn(), h.get_size(), h.is_read_only())");
    assert_eq!(told.expect("libnbd").trim(), format!("True True {SIZE} True"));
    let refused = libnbd(
        uri,
        "h.set_strict_mode(0)\ntry:\n  h.pwrite(b'x'*512, 0)\nexcept nbd.Error as e:\n  print(e.errno)\nh.pread(512, 0)\n",
    );
    assert_eq!(refused.expect("libnbd").trim(), "EPERM", "and the connection lives on");
    assert!(served.server.stop(), "stops in order");
}

/// The crate that shares no line with us, with its own handshake and one request at a time.
#[test]
fn an_independent_client_reads_and_writes() {
    let folder = tempfile::tempdir().expect("folder");
    let (disk, mut bytes) = writable(folder.path());
    let served = serve(vec![Export::new("vda", disk)]);
    let socket = served.folder.path().join("s");
    let mut stream = UnixStream::connect(socket).expect("connect");
    let export = nbd::client::handshake(&mut stream, b"vda").expect("handshake");
    assert_eq!(export.size, SIZE as u64);
    let mut peer = nbd::client::NbdClient::new(&mut stream, &export);
    let mut rng = Rng::new(5);
    for _ in 0..200 {
        let (at, len) = (rng.below(SIZE as u64 - 9000), 1 + rng.below(9000) as usize);
        peer.seek(SeekFrom::Start(at)).expect("seek");
        let here = at as usize..at as usize + len;
        if rng.once_in(2) {
            bytes[here.clone()].fill(rng.next_u64() as u8);
            std::io::Write::write_all(&mut peer, &bytes[here]).expect("write");
        } else {
            let mut out = vec![0; len];
            peer.read_exact(&mut out).expect("read");
            assert!(out == bytes[here], "at {at}");
        }
    }
}

#[test]
fn writers_leave_what_they_wrote() {
    let folder = tempfile::tempdir().expect("folder");
    let (disk, mut bytes) = writable(folder.path());
    let served = serve(vec![Export::new("vda", Arc::clone(&disk))]);
    let commands = [
        "write -P 17 1000 70000",
        "write -z 1M 1M",
        "write -zu 3M 512k",
        "write -f -P 3 5M 4k",
        "discard 6M 1M",
        "flush",
        "aio_write -P 9 8M 1M",
        "aio_write -P 10 9M 1M",
        "aio_flush",
        "read -P 17 1000 70000",
        "read -P 0 6M 1M",
        "read -P 9 8M 1M",
    ];
    qemu::io(Path::new(&served.uri), "raw", &commands.map(str::to_owned));
    bytes[1000..71000].fill(17);
    for (at, len, with) in [
        (1 << 20, 1 << 20, 0),
        (3 << 20, 512 << 10, 0),
        (5 << 20, 4096, 3),
        (6 << 20, 1 << 20, 0),
        (8 << 20, 1 << 20, 9),
        (9 << 20, 1 << 20, 10),
    ] {
        bytes[at..at + len].fill(with);
    }
    let mut out = vec![0; SIZE];
    disk.read(0, &mut out).expect("read");
    assert!(out == bytes, "qemu-io");

    // nbdcopy writes over several connections at once; only a flush that covers all of them is enough.
    let image = served.folder.path().join("image");
    bytes = door::pattern(SIZE, 77);
    fs::write(&image, &bytes).expect("image");
    must("nbdcopy", &["--flush", "--connections=4", qemu::text(&image), &served.uri]);
    disk.read(0, &mut out).expect("read");
    assert!(out == bytes, "nbdcopy");
    let argv = [
        "--name=v",
        "--ioengine=nbd",
        &format!("--uri={}", served.uri),
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=16",
        "--size=8m",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--fsync=8",
        "--randseed=3",
        "--verify_state_save=0",
    ];
    must("fio", &argv);
    let script = "h.pwrite(b'q'*4096, 4096, nbd.CMD_FLAG_FUA); h.trim(4096, 0)\n\
                  h.zero(8192, 16384, nbd.CMD_FLAG_NO_HOLE); h.cache(65536, 0); h.flush()";
    libnbd(&served.uri, script).expect("libnbd");
    disk.read(4096, &mut out[..4096]).expect("read");
    assert!(out[..4096].iter().all(|b| *b == b'q'));
}

/// A reader whose server goes away for a while and comes back does not notice.
#[test]
fn clients_survive_a_restart() {
    let bytes = door::pattern(SIZE, 9);
    let disk = door::read_only("vda", bytes.clone());
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("s");
    let start = || {
        let server = Server::builder().export(Export::new("vda", Arc::clone(&disk))).build().expect("server");
        let address = server.listen_unix(&socket).expect("listen");
        (server, address)
    };
    let (server, address) = start();
    let client = Client::connect(&address, &ClientOptions::default()).expect("connect");
    let mut out = vec![0; 1 << 20];
    client.read(0, &mut out).expect("read");
    let mut child = Command::new("qemu-io")
        .args([
            "--image-opts",
            &format!(
                "driver=nbd,server.type=unix,server.path={},export=vda,reconnect-delay=20,read-only=on",
                socket.display()
            ),
            "-r",
        ])
        .args(["-c", "read 0 1M", "-c", "sleep 1500", "-c", "read 2M 1M"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("qemu-io");
    std::thread::sleep(Duration::from_millis(500));
    assert!(server.stop(), "stops with clients connected");
    drop(server);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut out = vec![0; 1 << 20];
            client.read(4 << 20, &mut out).map(|()| out)
        });
        std::thread::sleep(Duration::from_millis(400));
        let again = start();
        assert!(reader.join().expect("thread").expect("read after the restart") == bytes[4 << 20..5 << 20]);
        let status = child.wait().expect("qemu-io ends");
        let mut said = String::new();
        child.stdout.take().expect("pipe").read_to_string(&mut said).expect("utf-8");
        assert!(status.success() && said.matches("read 1048576/1048576").count() == 2, "{said}");
        drop(again);
    });
}

pub(super) fn pki(folder: &Path) -> PathBuf {
    use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    let dir = folder.join("pki");
    fs::create_dir(&dir).expect("folder");
    let ca_key = KeyPair::generate().expect("key");
    let mut params = CertificateParams::new(Vec::new()).expect("params");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
    fs::write(dir.join("ca-cert.pem"), params.self_signed(&ca_key).expect("ca").pem()).expect("write");
    let issuer = Issuer::new(params, ca_key);
    for (name, usage) in
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)]
    {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).expect("params");
        params.extended_key_usages = vec![usage];
        params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature, rcgen::KeyUsagePurpose::KeyEncipherment];
        fs::write(dir.join(format!("{name}-cert.pem")), params.signed_by(&key, &issuer).expect("signed").pem())
            .expect("write");
        fs::write(dir.join(format!("{name}-key.pem")), key.serialize_pem()).expect("write");
    }
    dir
}

#[test]
fn tls_lets_in_who_has_a_certificate_and_nobody_else() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = pki(folder.path());
    let bytes = door::pattern(SIZE, 4);
    let tls = ServerTls::from_dir(&dir).expect("certificates");
    let server = Server::builder()
        .export(Export::new("vda", door::read_only("vda", bytes.clone())))
        .tls(tls)
        .build()
        .expect("server");
    let address = server.listen_tcp("127.0.0.1:0").expect("listen");
    let uri = address.to_string();
    assert!(uri.starts_with("nbds://"), "{uri}");
    let with = format!("{uri}?tls-certificates={}", dir.display());
    let out = folder.path().join("out");
    must("nbdcopy", &[&with, qemu::text(&out)]);
    assert!(fs::read(&out).expect("out") == bytes, "libnbd with a certificate");
    let place = uri.trim_start_matches("nbds://").trim_end_matches("/vda").trim_end_matches('/');
    let (host, port) = place.split_once(':').expect("host and port");
    let opts = format!(
        "driver=nbd,server.type=inet,server.host={host},server.port={port},export=vda,tls-creds=t,tls-hostname=localhost"
    );
    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.display());
    must("qemu-img", &["info", "--object", &creds, "--image-opts", &opts]);
    assert!(run("nbdinfo", &[&uri.replace("nbds:", "nbd:")]).is_err(), "a client without TLS");
    let bare = folder.path().join("bare");
    fs::create_dir(&bare).expect("folder");
    fs::copy(dir.join("ca-cert.pem"), bare.join("ca-cert.pem")).expect("copy");
    assert!(
        run("nbdinfo", &[&format!("{uri}?tls-certificates={}", bare.display())]).is_err(),
        "a client without a certificate"
    );

    let options =
        ClientOptions { tls: Some(ClientTls::from_dir(&dir).expect("certificates")), ..ClientOptions::default() };
    let client = Client::connect(&address, &options).expect("our client");
    let mut part = vec![0; 300_000];
    client.read(1 << 20, &mut part).expect("read");
    assert!(part == bytes[1 << 20..(1 << 20) + 300_000]);
    assert!(server.listen_tcp("0.0.0.0:0").is_ok(), "with TLS any address will do");
    let plain =
        Server::builder().export(Export::new("vda", door::read_only("vda", vec![0; 4096]))).build().expect("server");
    assert!(plain.listen_tcp("0.0.0.0:0").is_err(), "off loopback needs TLS");
}

/// Our client against other people's servers: what it maps and reads is what the image holds.
#[test]
fn the_client_reads_other_servers() {
    let folder = tempfile::tempdir().expect("folder");
    let image = folder.path().join("i.qcow2");
    qemu::img(&["create", "-f", "qcow2", qemu::text(&image), "40M"]);
    qemu::img(&["bitmap", "--add", qemu::text(&image), "b"]);
    qemu::io(&image, "qcow2", &["write -P 5 1M 3M".into(), "write -z 2M 64k".into(), "write -P 6 39M 100k".into()]);
    let want = qemu::contents(&image, "qcow2");
    let socket = folder.path().join("s");
    let servers: [(&str, Vec<String>); 3] = [
        (
            "qemu-nbd",
            ["-k", "SOCKET", "-f", "qcow2", "-r", "-t", "--shared=8", "-B", "b", qemu::text(&image)]
                .map(str::to_owned)
                .to_vec(),
        ),
        ("nbdkit", ["-f", "-U", "SOCKET", "--filter=delay", "memory", "40M", "rdelay=2ms"].map(str::to_owned).to_vec()),
        (
            "nbdkit",
            ["-f", "-U", "SOCKET", "--filter=error", "memory", "40M", "error-rate=50%", "error-pread=EIO"]
                .map(str::to_owned)
                .to_vec(),
        ),
    ];
    for (index, (program, args)) in servers.into_iter().enumerate() {
        let args = args.into_iter().map(|a| if a == "SOCKET" { socket.display().to_string() } else { a });
        let mut child = Command::new(program).args(args).stderr(Stdio::null()).spawn().expect(program);
        let start = Instant::now();
        while !socket.exists() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let address = format!("nbd+unix:///?socket={}", socket.display()).parse().expect("address");
        let options = ClientOptions { contexts: vec!["qemu:dirty-bitmap:b".into()], ..ClientOptions::default() };
        let client = Arc::new(Client::connect(&address, &options).expect("connect"));
        let mut rng = Rng::new(2);
        let mut failed = 0;
        for _ in 0..100 {
            let (at, len) = (rng.below(40 << 20), 1 + rng.below(300_000));
            let len = len.min((40 << 20) - at) as usize;
            let mut out = vec![0xee; len];
            match client.read(at, &mut out) {
                Ok(()) if index == 0 => assert!(out == want[at as usize..at as usize + len], "at {at}"),
                Ok(()) => assert!(out.iter().all(|b| *b == 0), "at {at}"),
                Err(_) => failed += 1,
            }
        }
        assert_eq!(failed > 0, index == 2, "{program} {index}: {failed} errors");
        if index == 0 {
            let dirty = client.dirty("qemu:dirty-bitmap:b").expect("dirty");
            let (must, may) = ((1 << 20)..(4 << 20), 4 << 20);
            assert!(dirty.clip(must).bytes() == 3 << 20 && dirty.bytes() <= may, "{dirty:?}");
            let layer = NbdLayer::new(Arc::clone(&client));
            let (mut at, mut zeros) = (0, 0);
            while at < layer.size() {
                let (content, len) = layer.lookup(at, layer.size() - at).expect("lookup");
                if content == aquifer_formats::Content::Zero {
                    zeros += len;
                    assert!(want[at as usize..(at + len) as usize].iter().all(|b| *b == 0), "at {at}");
                }
                at += len;
            }
            assert!(zeros > 30 << 20, "{zeros} bytes of zeros");
        }
        child.kill().expect("ours");
        child.wait().expect("ended");
        let _ = fs::remove_file(&socket);
    }
}
