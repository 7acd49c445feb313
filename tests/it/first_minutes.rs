//! The first five minutes of somebody who has a backup and nothing else: five commands, word for word, with a qcow2
//! chain as the backup. No configuration, no daemon, no account; no root for the first two. Every `next:` line that is
//! printed is executed.

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::{PermissionsExt, chown},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use aquifer_tests::{
    boot_sector,
    program::aquifer,
    qemu,
    site::{Guest, Said, Site, eventually},
};
use serde_json::Value;

/// Somebody without rights.
const NOBODY: u32 = 65_534;

/// The whole of it, installation included.
const FIVE_MINUTES: Duration = Duration::from_secs(300);

/// A computer on which the program has just been installed.
struct Newcomer {
    site: Site,
}

impl Newcomer {
    fn new() -> Self {
        let newcomer = Self { site: Site::new() };
        let site = &newcomer.site;
        fs::set_permissions(site.path(""), fs::Permissions::from_mode(0o755)).expect("open to all");
        for folder in ["bin", "mnt/veeam", "vm", "nobody"] {
            fs::create_dir_all(site.path(folder)).expect("folder");
        }
        chown(site.path("nobody"), Some(NOBODY), Some(NOBODY)).expect("a home");
        let installed = Command::new("install").args(["-m", "755"]).arg(aquifer()).arg(site.path("bin")).status();
        assert!(installed.expect("install").success());
        newcomer
    }

    /// A chain of three files, the newest `db01.qcow2`; what its disk holds.
    fn backups(&self) -> Vec<u8> {
        let path = |name: &str| self.site.path("mnt/veeam").join(name);
        let raw = self.site.path("source.raw");
        fs::write(&raw, boot_sector::disk(48, 40)).expect("disk");
        let zstd = ["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"];
        qemu::img(&[&zstd[..], &[qemu::text(&raw), qemu::text(&path("full.qcow2"))]].concat());
        for (name, base, change) in
            [("monday.qcow2", "full.qcow2", "write -P 0x5a 9M 300k"), ("db01.qcow2", "monday.qcow2", "write -z 12M 1M")]
        {
            qemu::img(&["create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", qemu::text(&path(name))]);
            qemu::io(&path(name), "qcow2", &[change.to_owned()]);
        }
        fs::remove_file(raw).expect("the machine is lost");
        qemu::contents(&path("db01.qcow2"), "qcow2")
    }

    /// A line of the script as it is typed here: its two folders lie below the test's own.
    fn typed(&self, line: &str) -> String {
        let here = |folder: &str| self.site.word(folder.trim_start_matches('/'));
        line.replace("/mnt/veeam/", &format!("{}/", here("/mnt/veeam"))).replace("/vm/", &format!("{}/", here("/vm")))
    }

    /// A shell with an empty environment but for its paths.
    fn shell(&self, program: &str) -> Command {
        let mut shell = Command::new(program);
        shell.env_clear().current_dir("/").stdin(Stdio::null());
        shell.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", self.site.word("bin")));
        shell
    }

    fn as_nobody(&self, line: &str) -> Said {
        let mut shell = self.shell("setpriv");
        shell.args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", line]);
        shell.env("HOME", self.site.path("nobody"));
        said(&mut shell)
    }

    fn root_shell(&self, program: &str) -> Command {
        let mut shell = self.shell(program);
        shell.env("HOME", self.site.path("root")).env("AQUIFER_HOME", self.site.path("home"));
        shell.env("XDG_RUNTIME_DIR", self.site.path("runtime"));
        shell
    }

    fn as_root(&self, line: &str) -> Said {
        said(self.root_shell("sh").args(["-c", line]))
    }

    /// A line on a terminal, left with Ctrl-C once `seen` is on the screen. What was shown, and the exit code.
    fn watched_as_root(&self, line: &str, seen: &str) -> (String, Option<i32>) {
        let mut terminal = self.root_shell("timeout");
        // The shell outlives the key, to say how its command ended.
        let marked = format!("trap : INT; {line}; echo code=$?");
        terminal.args(["60", "script", "-qc", &marked, "/dev/null"]).env("TERM", "xterm").env("SHELL", "/bin/sh");
        let mut child =
            terminal.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("script");
        let (mut keys, mut screen) = (child.stdin.take().expect("keys"), child.stdout.take().expect("screen"));
        let (mut text, mut part, mut left) = (String::new(), [0; 4096], false);
        while let Ok(len @ 1..) = screen.read(&mut part) {
            text.push_str(&String::from_utf8_lossy(&part[..len]));
            if !left && text.contains(seen) {
                keys.write_all(&[3]).expect("Ctrl-C");
                left = true;
            }
        }
        child.wait().expect("script ends");
        let code = text.rsplit_once("code=").and_then(|(_, code)| code.trim().parse().ok());
        (text, code)
    }
}

fn said(command: &mut Command) -> Said {
    let output = command.output().expect("a shell");
    let said = Said {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    };
    assert_eq!(said.code, 0, "{command:?}: {said:#?}");
    said
}

/// The command after `next:`, of which there is one at most, and it comes last.
fn next(said: &Said) -> Option<String> {
    let found: Vec<&str> = said.err.lines().filter_map(|line| line.strip_prefix("next: ")).collect();
    assert!(found.len() <= 1, "{said:#?}");
    let last = said.err.lines().last().is_some_and(|line| line.starts_with("next: "));
    assert!(found.is_empty() || last, "{said:#?}");
    found.first().map(|line| (*line).to_owned())
}

#[test]
fn five_commands_from_a_backup_to_a_machine_of_its_own() {
    let began = Instant::now();
    let here = Newcomer::new();
    let expected = boot_sector::after_a_round(&here.backups());
    let lines = [
        "aquifer info /mnt/veeam/db01.qcow2",
        "aquifer mount /mnt/veeam/db01.qcow2 --run 'qemu-img info \"$uri\"'",
        "aquifer recover /mnt/veeam/db01.qcow2 --into /vm/db01",
        "aquifer status --watch",
        "aquifer finalize db01 --keep",
    ];
    let [info, mount, recover, status, finalize] = lines.map(|line| here.typed(line));

    let clock = Instant::now();
    let shown = here.as_nobody(&info);
    assert!(clock.elapsed() < Duration::from_secs(5), "a second on a machine that has nothing else to do");
    for fact in ["disk db01", "qcow2", "48.0 MiB", "layers      3"] {
        assert!(shown.out.contains(fact), "{fact}: {}", shown.out);
    }
    assert_eq!(next(&shown).as_deref(), Some(&*mount), "the script's own second line");

    let shown = here.as_nobody(&mount);
    assert!(shown.out.contains("virtual size: 48 MiB"), "{}", shown.out);
    if let Some(more) = next(&shown) {
        here.as_nobody(&more);
    }

    let shown = here.as_root(&recover);
    for fact in ["db01 is RUNNING, ", "session  ", "console  ", "aquifer finalize db01 --keep"] {
        assert!(shown.out.contains(fact), "{fact}: {}", shown.out);
    }
    let record = here.as_root("aquifer status db01 --json").record("session");
    let guest = Guest::of(&record);
    guest.goes_on(1);
    let after_recover = here.as_root(&next(&shown).expect("a next command"));
    assert!(after_recover.out.contains("RUNNING for "), "{}", after_recover.out);
    assert_eq!(next(&after_recover).as_deref(), Some(&*finalize), "the script's own last line");

    let (screen, code) = here.watched_as_root(&status, "Ctrl-C leaves this view");
    let facts = ["db01", "RUNNING for ", "  local    "];
    assert!(facts.iter().all(|fact| screen.contains(fact)), "{screen}");
    assert_eq!(code, Some(0), "leaving a view is no failure: {screen}");
    guest.goes_on(1);

    let shown = here.as_root(&finalize);
    let checked = here.as_root(&next(&shown).expect("a next command"));
    assert!(checked.out.contains("file format: raw") && checked.out.contains("48 MiB"), "{}", checked.out);

    // "Aquifer may now be removed", with the backups and everything it kept.
    for gone in ["bin", "mnt", "home"] {
        fs::remove_dir_all(here.site.path(gone)).expect(gone);
    }
    guest.whole_round();
    guest.turn_off();
    let disk = here.site.path("vm/db01/disks/db01/disk.raw");
    eventually("the machine is off", || fs::read(&disk).ok().filter(|found| *found == expected).map(drop));
    assert!(began.elapsed() < FIVE_MINUTES, "{:?}", began.elapsed());
}

#[test]
fn those_without_a_backup_see_it_on_a_generated_one() {
    let here = Newcomer::new();
    let folder = here.site.word("try");
    let line = format!("aquifer demo --into {folder}");
    let dry = here.as_root(&format!("{line} -n"));
    assert!(dry.out.contains("three restore points") && !here.site.path("try").exists(), "{}", dry.out);
    let shown = here.as_root(&line);
    for fact in [
        "$ aquifer backup demo --disk vda=raw:disk.raw",
        "the machine says: This machine runs from its restore point 3.",
        "demo is RUNNING, ",
        "$ aquifer finalize demo --keep",
        "the machine was turned off",
    ] {
        assert!(shown.out.contains(fact), "{fact}: {}", shown.out);
    }
    assert!(!here.site.path("try").exists(), "it is taken away");
    assert!(!here.site.path("home").exists(), "the user's own state was not touched");

    let kept = here.as_root(&format!("{line} --keep --json"));
    let steps = kept.records("step");
    assert!(steps.len() >= 9 && steps.iter().all(|step| step["exit"] == 0), "{steps:#?}");
    let words: Vec<Value> = kept.records("guest").into_iter().map(|record| record["said"].clone()).collect();
    assert_eq!(words, ["This machine runs from its restore point 3."; 2]);
    assert_eq!(kept.record("done")["dir"], folder);
    let disk = here.site.path("try/vm/disks/vda/disk.raw");
    assert_eq!(fs::metadata(disk).expect("the machine's disk").len(), 64 << 20);
    let refused = here.root_shell("sh").args(["-c", &line]).output().expect("sh");
    assert_eq!(refused.status.code(), Some(3), "never over something that is there");
}
