//! The doors as guests use them: the kernel's own NBD client inside a machine, a machine on a vhost-user disk whose door is
//! killed under it, and a machine started from a file that the FUSE door serves.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use aquifer_tests::{
    boot_sector,
    door::pattern,
    qemu,
    site::{Site, eventually},
};
use parking_lot::Mutex;
use serde_json::Value;
use tempfile::TempDir;

/// A process that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `aquifer mount`, once it serves; and what it serves.
fn mount(site: &Site, args: &[&str]) -> (Ended, Value) {
    let mut command = site.command(&[&["--json", "mount"], args].concat());
    let mut door = Ended(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("aquifer"));
    let lines = BufReader::new(door.0.stdout.take().expect("a pipe")).lines();
    let mut records = lines.map_while(Result::ok).map(|l| serde_json::from_str::<Value>(&l).expect("a JSON line"));
    let served = records.find(|record| record["type"] == "serving").expect("it serves");
    (door, served)
}

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn sha256(path: &Path) -> String {
    tool("sha256sum", &[qemu::text(path)])[..64].to_owned()
}

/// Kernel and memory of a guest made of Debian's own packages, that runs one of `scripts/guest/`.
fn guest_in_memory(init: &str, with: &[&str]) -> TempDir {
    // Two at once would download the same package twice.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    let dir = tempfile::tempdir().expect("folder");
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts");
    let mut make = Command::new(scripts.join("make-memory-guest.sh"));
    make.arg("--out").arg(dir.path()).arg("--init").arg(scripts.join("guest").join(init)).args(with);
    let made = make.output().expect("bash");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    dir
}

/// A machine of 256 MiB that runs such a guest with nothing else; its console is its stdout.
fn machine_of(guest: &TempDir, machine: &str, cmdline: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["240", "qemu-system-x86_64", "-nodefaults", "-machine", machine, "-accel", "tcg", "-cpu", "max"]);
    command.args(["-m", "256", "-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.arg("-kernel").arg(guest.path().join("vmlinuz")).arg("-initrd").arg(guest.path().join("initrd"));
    command.args(["-append", &format!("console=ttyS0 quiet panic=-1 {cmdline}")]).stdin(Stdio::null());
    command
}

/// What the guest said behind `guest: WORD`.
fn told(said: &str, word: &str) -> Vec<String> {
    said.lines().filter_map(|l| l.strip_prefix(&format!("guest: {word}"))).map(str::to_owned).collect()
}

/// Mounts what a guest left, once more, and finds its files as it says they are.
fn finds_what_it_wrote(site: &Site, kept: &[&str], sums: &[String]) {
    let out = site.path("found.raw");
    let copied = site.run(&[&["mount"], kept, &["--run", &format!("nbdcopy \"$uri\" {}", qemu::text(&out))]].concat());
    assert_eq!(copied.code, 0, "{copied:#?}");
    tool("e2fsck", &["-fn", qemu::text(&out)]);
    fs::create_dir(site.path("files")).expect("folder");
    tool("debugfs", &["-R", &format!("rdump / {}", site.word("files")), qemu::text(&out)]);
    for line in sums {
        let (sum, name) = line.split_once("  ").expect("a line of sha256sum");
        assert_eq!(sha256(&site.path("files").join(name)), sum, "{name}");
    }
}

#[test]
fn the_kernels_client_in_a_guest_gets_back_what_it_wrote() {
    let site = Site::new();
    let source = site.path("source.raw");
    fs::write(&source, pattern(32 << 20, 7)).expect("source");
    let before = sha256(&source);
    let (word, overlay) = (format!("raw:{}", site.word("source.raw")), site.word("overlay"));
    let kept = [&*word, "--writable", "--overlay", &*overlay];
    let (mut door, served) = mount(&site, &[&kept[..], &["--nbd", "tcp:127.0.0.1:0"]].concat());
    let uri = served["uri"].as_str().expect("a URI");
    let port = uri.strip_prefix("nbd://127.0.0.1:").and_then(|rest| rest.split('/').next()).expect(uri);
    let guest = guest_in_memory("nbd-init", &["--module", "virtio_net", "--module", "nbd", "--with", "nbd-client"]);
    let mut machine = machine_of(&guest, "q35", &format!("door=10.0.2.2:{port}:source"));
    machine.args(["-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile="]);
    let said = machine.output().expect("QEMU").stdout;
    let said = String::from_utf8_lossy(&said).replace('\r', "");
    assert_eq!(told(&said, "DONE"), [""], "{said}");
    assert_eq!(told(&said, "FOUND "), [&*before], "it read the source's own bytes");

    // It detached in order, so all of it was flushed: the door may die now.
    door.0.kill().expect("kill");
    door.0.wait().expect("reap");
    let sums = told(&said, "SUM ");
    assert_eq!(sums.len(), 39, "{said}");
    finds_what_it_wrote(&site, &kept, &sums);
    assert_eq!(sha256(&source), before, "nobody wrote to the source");
}

#[test]
fn a_guest_on_a_vhost_user_disk_survives_its_doors() {
    let site = Site::new();
    let source = site.path("source.raw");
    fs::write(&source, pattern(64 << 20, 8)).expect("source");
    let before = sha256(&source);
    let (word, overlay, sockets) =
        (format!("raw:{}", site.word("source.raw")), site.word("overlay"), site.word("doors"));
    let kept = [&*word, "--writable", "--overlay", &*overlay];
    let open = || mount(&site, &[&kept[..], &["--vhost-user", &sockets]].concat());
    let (mut door, served) = open();
    let socket = served["vhost_user"].as_str().expect("a socket").to_owned();
    let guest = guest_in_memory("vhost-init", &[]);
    let mut machine = machine_of(&guest, "q35,memory-backend=m", "");
    machine.args(["-smp", "2", "-object", "memory-backend-memfd,id=m,size=256M,share=on", "-chardev"]);
    machine.arg(format!("socket,id=d,path={socket},reconnect-ms=100"));
    machine.args(["-device", "vhost-user-blk-pci,chardev=d,num-queues=2"]);
    let mut machine = Ended(machine.stdout(Stdio::piped()).spawn().expect("QEMU"));
    let mut said = String::new();
    let mut kills = 0;
    for line in BufReader::new(machine.0.stdout.take().expect("a pipe")).lines().map_while(Result::ok) {
        said += line.trim_end_matches('\r');
        said += "\n";
        if line.contains("guest: WRITING") {
            door.0.kill().expect("kill");
            door.0.wait().expect("reap");
            (door, _) = open();
            kills += 1;
        }
    }
    assert_eq!((told(&said, "DONE"), kills), (vec![String::new()], 3), "{said}");
    assert_eq!(told(&said, "FOUND "), [&*before], "it read the source's own bytes");
    assert_eq!(told(&said, "QUEUES "), ["2"]);
    assert_eq!(told(&said, "LIMITS "), ["4096 write back 2147483648 2147483648"]);
    assert_eq!(told(&said, "SERIAL "), ["source"]);
    // The guest unmounted, so all of it was flushed.
    door.0.kill().expect("kill");
    door.0.wait().expect("reap");
    let sums = told(&said, "SUM ");
    assert_eq!(sums.len(), 59, "{said}");
    finds_what_it_wrote(&site, &kept, &sums);
    assert_eq!(sha256(&source), before, "nobody wrote to the source");
}

/// A machine on the file, until it has gone through all its sectors; then it is turned off from inside.
fn starts_from(site: &Site, file: &str, cache: &str) {
    let (said, keys) = (site.path("said"), site.path("keys"));
    let _ = fs::remove_file(&said);
    let mut machine = Command::new("qemu-system-x86_64");
    machine.args(["-nodefaults", "-machine", "q35", "-accel", "tcg", "-m", "64", "-display", "none"]);
    machine.arg("-chardev").arg(format!(
        "socket,id=c,server=on,wait=off,path={},logfile={}",
        qemu::text(&keys),
        qemu::text(&said)
    ));
    machine.args(["-serial", "chardev:c", "-device", "virtio-blk-pci,drive=d,bootindex=0", "-blockdev"]);
    machine.arg(format!("driver=raw,node-name=d,discard=unmap,file.driver=file,file.filename={file},{cache}"));
    let mut machine = Ended(machine.stdin(Stdio::null()).spawn().expect("QEMU"));
    let seen = || fs::read_to_string(&said).unwrap_or_default().rsplit("READY").next().unwrap_or_default().to_owned();
    eventually("a whole round", || seen().contains("R.").then_some(()));
    assert!(!seen().contains(['X', 'E']), "wrong bytes or an error: {}", seen());
    let mut console = std::os::unix::net::UnixStream::connect(&keys).expect("console");
    std::io::Write::write_all(&mut console, b"q").expect("type");
    eventually("it is off", || machine.0.try_wait().expect("wait"));
}

#[test]
fn a_machine_starts_from_the_fuse_door() {
    let site = Site::new();
    let disk = boot_sector::disk(24, 20);
    fs::write(site.path("source.raw"), &disk).expect("disk");
    let (base, newest) = (site.word("base.qcow2"), site.word("db01.qcow2"));
    qemu::img(&["convert", "-f", "raw", "-O", "qcow2", "-c", &site.word("source.raw"), &base]);
    qemu::img(&["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &newest]);
    qemu::io(&site.path("db01.qcow2"), "qcow2", &["write -P 0x5a 9M 300k".to_owned()]);
    let expected = boot_sector::after_a_round(&qemu::contents(&site.path("db01.qcow2"), "qcow2"));

    let (files, overlay) = (site.word("files"), site.word("overlay"));
    let kept = [&*newest, "--writable", "--overlay", &*overlay];
    let caches = ["file.cache.direct=off", "file.cache.direct=on,file.aio=native"];
    for cache in caches {
        let (door, served) = mount(&site, &[&kept[..], &["--fuse", &files]].concat());
        let file = served["path"].as_str().expect("a file").to_owned();
        starts_from(&site, &file, cache);
        let pid = rustix::process::Pid::from_raw(i32::try_from(door.0.id()).expect("a pid")).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("stop");
        eventually("the files are gone", || (!Path::new(&file).exists()).then_some(()));
    }
    let out = site.word("found.raw");
    let copied = site.run(&[&["mount"], &kept[..], &["--run", &format!("nbdcopy \"$uri\" {out}")]].concat());
    assert_eq!(copied.code, 0, "{copied:#?}");
    assert!(fs::read(&out).expect("disk") == expected, "the restore point and what the guest wrote, nothing else");
}
