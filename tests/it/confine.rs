//! Promise: a door that is taken over by what it reads stays a prisoner. It can use its own folders and
//! sockets, and nothing else: no other files, no programs, no processes, no mounts, no new powers.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::Command,
};

use aquifer_mount::confine::{Confinement, Jail, enter};

/// Runs `inside` on a thread that has entered a jail with `own` to write and `source` to read.
fn in_jail<T: Send>(own: &Path, source: &Path, inside: impl FnOnce(&Confinement) -> T + Send) -> T {
    let jail = Jail { read_write: vec![own.to_owned()], read_only: vec![source.to_owned(), "/nonexistent".into()] };
    std::thread::scope(|scope| scope.spawn(|| inside(&enter(&jail))).join().expect("the jailed thread"))
}

fn folders() -> (tempfile::TempDir, std::path::PathBuf, std::path::PathBuf) {
    let tmp = tempfile::tempdir().expect("tempdir");
    let (own, source) = (tmp.path().join("own"), tmp.path().join("source"));
    fs::create_dir(&own).expect("folder");
    fs::create_dir(&source).expect("folder");
    fs::write(own.join("disk.raw"), "mine").expect("write");
    fs::write(source.join("image"), "theirs").expect("write");
    fs::write(tmp.path().join("other"), "somebody else's").expect("write");
    (tmp, own, source)
}

#[test]
fn what_a_door_needs_still_works() {
    let (_tmp, own, source) = folders();
    in_jail(&own, &source, |confinement| {
        assert!(confinement.seccomp && confinement.no_new_privs, "{confinement:?}");
        assert_eq!(fs::read(source.join("image")).expect("read the source"), b"theirs");
        assert_eq!(fs::read(own.join("disk.raw")).expect("read"), b"mine");
        fs::write(own.join("draft"), "x").expect("write");
        File::open(own.join("draft")).and_then(|f| f.sync_all()).expect("sync");
        fs::rename(own.join("draft"), own.join("record")).expect("rename");
        fs::hard_link(own.join("record"), own.join("again")).expect("link");
        fs::remove_file(own.join("again")).expect("remove");
        fs::create_dir(own.join("disks")).expect("folder");
        assert_eq!(fs::read_dir(&own).expect("list").count(), 3);
        let file = File::options().write(true).open(own.join("disk.raw")).expect("open");
        file.set_len(1 << 20).expect("extend");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096).expect("reserve");
        file.try_lock().expect("lock");
        // A source that went away is opened again.
        fs::read(source.join("image")).expect("again");

        // Stepping back behind others, and nothing else, for itself and nobody else.
        let step = |whose, nice| rustix::process::setpriority_process(whose, nice);
        step(None, aquifer_vdisk::YIELDING).expect("a thread that copies makes way");
        assert_eq!(step(None, 0), Err(rustix::io::Errno::PERM));
        assert_eq!(step(Some(rustix::process::getpid()), aquifer_vdisk::YIELDING), Err(rustix::io::Errno::PERM));

        let listener = UnixListener::bind(own.join("sock")).expect("bind");
        let client = std::thread::spawn({
            let path = own.join("sock");
            move || UnixStream::connect(path).and_then(|mut s| s.write_all(b"hello"))
        });
        let mut got = String::new();
        listener.accept().and_then(|(mut s, _)| s.read_to_string(&mut got)).expect("serve");
        client.join().expect("a thread").expect("connect");
        assert_eq!(got, "hello");
        let tcp = TcpListener::bind("127.0.0.1:0").expect("bind");
        TcpStream::connect(tcp.local_addr().expect("address")).expect("connect");
        std::thread::Builder::new()
            .name("named".into())
            .spawn(|| vec![0u8; 8 << 20])
            .expect("thread")
            .join()
            .expect("join");
        assert!(std::panic::catch_unwind(|| panic!("contained")).is_err());
        let _ = std::process::id();
        assert!(std::time::SystemTime::now() > std::time::UNIX_EPOCH);
    });
}

#[test]
fn nothing_else_does() {
    let (tmp, own, source) = folders();
    let other = tmp.path().join("other");
    let refused = in_jail(&own, &source, |confinement| {
        let mut got: Vec<(&str, io::Result<()>)> = vec![
            ("start a program", Command::new("/bin/true").status().map(drop)),
            ("start a shell", Command::new("sh").arg("-c").arg("true").status().map(drop)),
        ];
        if confinement.landlock_abi > 0 {
            got.extend([
                ("read another file", fs::read(&other).map(drop)),
                ("read /etc/shadow", fs::read("/etc/shadow").map(drop)),
                ("list /", fs::read_dir("/").map(drop)),
                ("read through ..", fs::read(own.join("../other")).map(drop)),
                ("write the source", OpenOptions::new().write(true).open(source.join("image")).map(drop)),
                ("add to the source", File::create(source.join("new")).map(drop)),
                ("remove the source", fs::remove_file(source.join("image"))),
                ("cut the source", truncate(&source.join("image"))),
                ("leave a file behind", File::create("/tmp/aquifer-escaped").map(drop)),
                ("move a file out", fs::rename(own.join("disk.raw"), tmp.path().join("out"))),
                ("link a file in", fs::hard_link(&other, own.join("in"))),
                ("open a device", OpenOptions::new().read(true).open("/dev/loop0").map(drop)),
                (
                    "look into its parent",
                    fs::read(format!("/proc/{}/environ", std::os::unix::process::parent_id())).map(drop),
                ),
            ]);
        }
        got.extend(calls());
        got
    });
    assert!(refused.len() > 30, "{}", refused.len());
    for (what, result) in refused {
        let error = result.expect_err(what);
        let known = [libc::EPERM, libc::EACCES, libc::EXDEV, libc::ENOSYS];
        assert!(error.raw_os_error().is_some_and(|e| known.contains(&e)), "{what}: {error}");
    }
    assert!(!Path::new("/tmp/aquifer-escaped").exists());
    assert_eq!(fs::read(source.join("image")).expect("read"), b"theirs");
    Command::new("/bin/true").status().expect("this process itself is free");
}

fn truncate(path: &Path) -> io::Result<()> {
    let path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("path");
    call(libc::SYS_truncate, [path.as_ptr() as usize, 0, 0, 0, 0])
}

#[expect(unsafe_code, reason = "the calls that are to be refused have no safe wrappers")]
fn call(number: libc::c_long, a: [usize; 5]) -> io::Result<()> {
    // SAFETY: every call made through here is refused by the filter before the kernel looks at its
    // arguments, or takes only integers and addresses that are valid or null.
    let code = unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4]) };
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bare system calls that a prisoner would like to have.
fn calls() -> Vec<(&'static str, io::Result<()>)> {
    let parent = usize::try_from(std::os::unix::process::parent_id()).expect("pid");
    let (fork, newuser) = (usize::try_from(libc::SIGCHLD).expect("flag"), 0x1000_0000);
    let term = usize::try_from(libc::SIGTERM).expect("signal");
    let family = |f: i32| usize::try_from(f).expect("family");
    vec![
        ("fork", call(libc::SYS_clone, [fork, 0, 0, 0, 0])),
        ("clone3", call(libc::SYS_clone3, [0; 5])),
        ("execve", call(libc::SYS_execve, [0; 5])),
        ("execveat", call(libc::SYS_execveat, [0; 5])),
        ("ptrace", call(libc::SYS_ptrace, [16, parent, 0, 0, 0])),
        ("read another's memory", call(libc::SYS_process_vm_readv, [parent, 0, 0, 0, 0])),
        ("write another's memory", call(libc::SYS_process_vm_writev, [parent, 0, 0, 0, 0])),
        ("take another's file", call(libc::SYS_pidfd_getfd, [0; 5])),
        ("signal the parent", call(libc::SYS_kill, [parent, term, 0, 0, 0])),
        ("mount", call(libc::SYS_mount, [0; 5])),
        ("unmount", call(libc::SYS_umount2, [0; 5])),
        ("a new mount", call(libc::SYS_fsopen, [0; 5])),
        ("pivot_root", call(libc::SYS_pivot_root, [0; 5])),
        ("chroot", call(libc::SYS_chroot, [0; 5])),
        ("unshare", call(libc::SYS_unshare, [newuser, 0, 0, 0, 0])),
        ("setns", call(libc::SYS_setns, [0; 5])),
        ("io_uring", call(libc::SYS_io_uring_setup, [8, 0, 0, 0, 0])),
        ("userfaultfd", call(libc::SYS_userfaultfd, [0; 5])),
        ("bpf", call(libc::SYS_bpf, [0; 5])),
        ("perf", call(libc::SYS_perf_event_open, [0; 5])),
        ("keys", call(libc::SYS_keyctl, [0; 5])),
        ("add a key", call(libc::SYS_add_key, [0; 5])),
        ("load a module", call(libc::SYS_finit_module, [0; 5])),
        ("kexec", call(libc::SYS_kexec_load, [0; 5])),
        ("reboot", call(libc::SYS_reboot, [0; 5])),
        ("set the clock", call(libc::SYS_clock_settime, [0; 5])),
        ("change user", call(libc::SYS_setuid, [0; 5])),
        ("change owner", call(libc::SYS_fchownat, [0; 5])),
        ("make a device", call(libc::SYS_mknodat, [0; 5])),
        ("open by handle", call(libc::SYS_open_by_handle_at, [0; 5])),
        ("a raw socket", call(libc::SYS_socket, [family(libc::AF_PACKET), family(libc::SOCK_RAW), 0, 0, 0])),
        ("a netlink socket", call(libc::SYS_socket, [family(libc::AF_NETLINK), family(libc::SOCK_RAW), 0, 0, 0])),
        ("a vsock", call(libc::SYS_socket, [family(libc::AF_VSOCK), family(libc::SOCK_STREAM), 0, 0, 0])),
        ("memory as a file", call(libc::SYS_memfd_create, [0; 5])),
        ("type into a terminal", call(libc::SYS_ioctl, [0, 0x5412, 0, 0, 0])),
        ("another personality", call(libc::SYS_personality, [0; 5])),
    ]
}
