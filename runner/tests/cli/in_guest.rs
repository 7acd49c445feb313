//! Promise: a guest with a network and QEMU's own agent is frozen for the moment of its point, with its programs told, and
//! goes on whatever becomes of the run; and a plan goes on behind it when its port, its page and its agent answer, not before.
//!
//! The guest is Debian's kernel with busybox and Debian's agent, on a disk that it starts from: `scripts/make-agent-guest.sh`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use aquifer_runner::{
    host::{Host, Network, Places, Power, Rooms, Running, placed::Placed, qemu::Qemu},
    recover::shape::Wishes,
    verb::demo::guest::{DISK_BYTES_MIN, put_on},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    harness::{Outcome, Room},
    running::newest_point,
    storm::{Dice, rounds},
};

/// Longest wait for a guest that is emulated on a busy machine.
const WAIT: Duration = Duration::from_secs(150);

/// Where the guest's file system begins on its disk.
const FILE_SYSTEM: &str = "offset=1048576";

fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("the tool is installed");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The guest's disk, made once for all tests.
fn disk() -> &'static Path {
    static MADE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("guest.raw");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-agent-guest.sh");
        tool(&script.display().to_string(), &["--out", &path.display().to_string()]);
        (dir, path)
    });
    path
}

/// A site with that guest as `db01`, a small one without an agent as `web01`, jobs for points and for replicas of each, and
/// a plan.
struct Site {
    room: Room,
}

impl Site {
    /// `etc` are files that tell the guest what to do.
    fn new(etc: &[(&str, &str)]) -> Self {
        let room = Room::new();
        for folder in ["prod/db01", "prod/web01", "dr"] {
            fs::create_dir_all(room.path(folder)).expect("a folder");
        }
        let raw = room.text("db01.raw");
        fs::copy(disk(), &raw).expect("a disk");
        for (name, content) in etc {
            fs::write(room.path("told"), content).expect("a file");
            let image = format!("{raw}?{FILE_SYSTEM}");
            tool("debugfs", &["-w", "-R", &format!("write {} /etc/{name}", room.text("told")), &image]);
        }
        let mut small = vec![0; DISK_BYTES_MIN.max(4 << 20)];
        put_on(&mut small, "READY\r\n");
        fs::write(room.path("web01.raw"), small).expect("a disk");
        for (name, memory) in [("db01", "160MiB"), ("web01", "32MiB")] {
            let text = format!(
                "version = 1\nname = \"{name}\"\ncpus = 1\nmemory = \"{memory}\"\nfirmware = \"bios\"\n\
                 [[disk]]\nname = \"vda\"\n[[nic]]\nmodel = \"virtio\"\n"
            );
            fs::write(room.path(format!("prod/{name}/machine.toml")), text).expect("a description");
            let to = room.text(&format!("prod/{name}/vda.qcow2"));
            tool("qemu-img", &["convert", "-O", "qcow2", "-f", "raw", &room.text(&format!("{name}.raw")), &to]);
        }
        room.write_site(&format!(
            "version = 1\n[repository]\nnas = {{ url = \"{0}/repo\", default = true }}\n[host]\n\
             prod = {{ kind = \"qemu\", images = \"{0}/prod\", runtime = \"{0}/rp\" }}\n\
             dr = {{ kind = \"qemu\", images = \"{0}/dr\", runtime = \"{0}/rd\" }}\n\
             [machine]\ndb01 = {{ from = \"prod:db01\" }}\nweb01 = {{ from = \"prod:web01\" }}\n\
             [job.night]\nkind = \"backup\"\nmachines = [\"db01\"]\nto = \"nas\"\nfreeze = \"require\"\nretry = {{ count = 0 }}\n\
             [job.small]\nkind = \"backup\"\nmachines = [\"web01\"]\nto = \"nas\"\n\
             [job.dr]\nkind = \"replication\"\nmachines = [\"db01\"]\n\
             source = {{ from = \"backup\", repositories = [\"nas\"] }}\ntarget = {{ host = \"dr\" }}\nretry = {{ count = 0 }}\n\
             [job.plain]\nkind = \"replication\"\nmachines = [\"web01\"]\n\
             source = {{ from = \"backup\", repositories = [\"nas\"] }}\ntarget = {{ host = \"dr\" }}\nretry = {{ count = 0 }}\n\
             [plan.all]\nentries = [{{ machine = \"db01\", GATES, on_failure = \"wait\" }}, {{ machine = \"web01\" }}]\n",
            room.dir.path().display()
        ).replace("GATES", "gate = \"tcp:81\", timeout = \"1s\""));
        room.ok(["init"]);
        Self { room }
    }

    fn json(&self, args: &[&str]) -> Outcome {
        self.room.json(["-c", "site.toml"].iter().chain(args).copied())
    }

    fn does(&self, args: &[&str]) -> Outcome {
        let outcome = self.json(args);
        assert!(outcome.code <= 1, "{args:?}: {}\n{}", outcome.stdout, outcome.stderr);
        outcome
    }

    fn places(&self, folder: &str) -> Places {
        let host = |images: &str, run: &str| (self.room.path(images), self.room.path(run));
        let rooms = Rooms { hosts: vec![host("prod", "rp"), host("dr", "rd")], others: self.room.path("none") };
        rooms.places(&self.room.path(folder))
    }

    fn running(&self, folder: &str) -> Option<Running> {
        Qemu.find(&self.places(folder)).filter(|r| Qemu.power(r).is_ok_and(|power| power != Power::Off))
    }

    fn start(&self, folder: &str) {
        let placed = Placed::read(&self.room.path(folder)).expect("a machine");
        let wishes = Wishes { network: Network::User, ..Wishes::default() };
        let shape = placed.shape("db01", &wishes, &[]).expect("a shape");
        let places = self.places(folder);
        fs::create_dir_all(&places.runtime_dir).expect("a folder");
        Qemu.start(&shape, &placed.attachments(), &places).expect("it starts");
    }

    /// What the guest in a folder has said.
    fn said(&self, folder: &str) -> Vec<String> {
        let console = fs::read(self.room.path(folder).join("console.log")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console).replace('\r', "");
        console.lines().filter_map(|line| line.split("guest: ").nth(1)).map(str::to_owned).collect()
    }

    fn says(&self, folder: &str, word: &str) {
        until(&format!("{folder} says {word}"), || self.said(folder).iter().any(|said| said == word));
    }

    /// Asks the guest's agent, as its host may.
    fn asks(&self, folder: &str, command: &str, arguments: &Value) -> Value {
        let socket = self.places(folder).runtime_dir.join("agent.sock");
        let until = Instant::now() + WAIT;
        loop {
            if let Some(answer) = ask(&socket, command, arguments) {
                return answer;
            }
            assert!(Instant::now() < until, "the agent does not answer {command}");
        }
    }

    /// Tells the guest what to do from now on.
    fn tells(&self, file: &str, content: &str) {
        let shell =
            format!("printf '%s' '{content}' > /data/etc/{file}; [ -s /data/etc/{file} ] || rm /data/etc/{file}; sync");
        self.asks("prod/db01", "guest-exec", &json!({ "path": "/bin/sh", "arg": ["-c", shell] }));
        thread::sleep(Duration::from_millis(700));
    }

    fn is_thawed(&self) -> bool {
        self.asks("prod/db01", "guest-fsfreeze-status", &json!({})) == "thawed"
    }

    /// Whether the guest's programs go on: what they count grows.
    fn goes_on(&self) {
        let count = || {
            let shell = json!({ "path": "/bin/cat", "arg": ["/data/srv/count"], "capture-output": true });
            let pid = self.asks("prod/db01", "guest-exec", &shell)["pid"].clone();
            loop {
                let status = self.asks("prod/db01", "guest-exec-status", &json!({ "pid": pid }));
                if status["exited"] == true {
                    return status["out-data"].clone();
                }
            }
        };
        let before = count();
        until("its programs go on", || count() != before);
    }

    /// The file system of a point of `db01`, as a raw disk.
    fn disk_of(&self, point: &str) -> String {
        let out = self.room.text("point.raw");
        let _ = fs::remove_file(&out);
        self.room.ok(["export", &format!("db01@{point}"), &out]);
        format!("{out}?{FILE_SYSTEM}")
    }

    /// Points of both machines, and their replicas.
    fn replicate(&self) {
        self.does(&["run", "small"]);
        let vda = format!("vda={}", self.room.text("prod/db01/vda.qcow2"));
        let machine = self.room.text("prod/db01/machine.toml");
        self.room.ok(["backup", "db01", "--disk", &vda, "--machine", &machine]);
        self.does(&["run", "dr"]);
        self.does(&["run", "plain"]);
    }

    fn gates(&self, gates: &str) {
        let path = self.room.path("site.toml");
        let text = fs::read_to_string(&path).expect("a site file");
        let (before, rest) = text.split_once("machine = \"db01\", ").expect("the plan");
        let (_, after) = rest.split_once(", on_failure").expect("the plan");
        fs::write(path, format!("{before}machine = \"db01\", {gates}, on_failure{after}")).expect("a site file");
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        for folder in ["prod/db01", "dr/db01_replica", "dr/web01_replica"] {
            if let Some(running) = self.running(folder) {
                let _ = Qemu.power_off(&running);
            }
        }
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + WAIT;
    while !is_so() {
        assert!(Instant::now() < until, "not within {} s: {what}", WAIT.as_secs());
        thread::sleep(Duration::from_millis(100));
    }
}

/// One order to an agent; none where it did not answer in time.
fn ask(socket: &Path, command: &str, arguments: &Value) -> Option<Value> {
    let mut stream = UnixStream::connect(socket).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    writeln!(stream, "{}", json!({ "execute": "guest-sync", "arguments": { "id": number } })).ok()?;
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines().map_while(Result::ok);
    let mut answer = || lines.find_map(|line| serde_json::from_str::<Value>(&line).ok());
    while answer()?["return"] != number {}
    writeln!(stream, "{}", json!({ "execute": command, "arguments": arguments })).ok()?;
    let answer = answer()?;
    assert!(answer.get("error").is_none(), "{command}: {answer}");
    Some(answer["return"].clone())
}

#[test]
fn a_guest_is_frozen_for_its_point_told_of_it_and_goes_on_whatever_becomes_of_the_run() {
    let site = Site::new(&[]);
    site.start("prod/db01");
    site.says("prod/db01", "AGENT");
    let ran = site.does(&["run", "night"]);
    assert_eq!(newest_point(&site.room)["consistency"], "file_system", "{}", ran.stdout);
    assert!(site.is_thawed());
    let hooks = |site: &Site| -> Vec<String> {
        site.said("prod/db01").into_iter().filter(|line| line.starts_with("HOOK")).collect()
    };
    until("the program is told of both", || hooks(&site) == ["HOOK freeze", "HOOK thaw"]);
    // What the point holds: the program was told of the freeze before it and of the thaw behind it, and the file system
    // was at rest, with nothing left to repair.
    let point = site.disk_of("latest");
    assert_eq!(tool("debugfs", &["-R", "cat /srv/hook.log", &point]), "freeze\n");
    let features = tool("debugfs", &["-R", "features", &point]);
    assert!(!features.contains("needs_recovery"), "{features}");
    tool("e2fsck", &["-fn", &point]);
    site.goes_on();

    // A program that refuses: nothing is frozen, and there is no point of it.
    site.tells("refuse", "yes");
    let refused = site.json(&["run", "night"]);
    assert_eq!(refused.one("error")["exit"], 2, "{}", refused.stdout);
    assert!(site.is_thawed());
    site.goes_on();
    // Where a freeze is only tried, the point is as after a loss of power, and that is said.
    let path = site.room.path("site.toml");
    let text = fs::read_to_string(&path).expect("a site file");
    fs::write(&path, text.replace("\"require\"", "\"try\"")).expect("a site file");
    let tried = site.json(&["run", "night"]);
    assert_eq!((tried.code, &newest_point(&site.room)["consistency"]), (1, &json!("crash")), "{}", tried.stdout);
    let features = tool("debugfs", &["-R", "features", &site.disk_of("latest")]);
    assert!(features.contains("needs_recovery"), "it was in use: {features}");
    site.tells("refuse", "");
    fs::write(&path, text).expect("a site file");

    // Killed while the guest is being frozen, and at any moment around it: it goes on.
    site.tells("slow", "2");
    let mut dice = Dice(30);
    let mut cut = 0;
    for round in 0..rounds(2) {
        let before = hooks(&site).len();
        let mut run = site.room.command(["-c", "site.toml", "run", "night"]);
        let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a run");
        if round == 0 {
            // The program has been told, and the freeze is on its way.
            until("it is being frozen", || hooks(&site).len() > before);
        } else {
            thread::sleep(Duration::from_millis(dice.below(3500) as u64));
        }
        run.kill().expect("kill");
        run.wait().expect("it is gone");
        until("it is thawed", || {
            let told = hooks(&site);
            told.len().is_multiple_of(2) && site.is_thawed()
        });
        cut += u32::from(hooks(&site).len() > before);
        site.goes_on();
    }
    assert!(cut > 0);
    site.tells("slow", "");
    let after = site.does(&["run", "night"]);
    assert_eq!(newest_point(&site.room)["consistency"], "file_system", "{}", after.stdout);
}

#[test]
fn a_plan_goes_on_when_port_page_and_agent_answer_and_not_before() {
    // Its page is there from the start; its agent comes when the page `start` is asked for.
    let site = Site::new(&[("no-agent", "")]);
    site.replicate();

    let halted = |args: &[&str], why: &str| {
        let halt = site.json(&[args, &["--grace", "1s"]].concat());
        let plan = halt.one("plan");
        assert_eq!((halt.code, &plan["state"]), (1, &json!("halted")), "{}", halt.stdout);
        let entries = &plan["run"]["record"]["entries"];
        assert_eq!((&entries[0]["step"], &entries[1]["step"]), (&json!("failed"), &json!("waiting")), "{plan}");
        assert!(entries[0]["why"].as_str().is_some_and(|said| said.contains(why)), "{why}: {plan}");
        assert!(
            halt.one("warning")["do"].as_str().is_some_and(|help| help.ends_with("plan resume all")),
            "{}",
            halt.stdout
        );
        assert!(site.running("dr/db01_replica").is_some(), "what runs goes on running");
        assert!(site.running("dr/web01_replica").is_none(), "nobody goes on behind a gate that is shut");
    };
    let resume = ["plan", "resume", "all"];
    halted(&["plan", "run", "all"], "db01 was not ready within 1 s");
    let process = site.running("dr/db01_replica").expect("it runs").process;
    site.says("dr/db01_replica", "PAGE");
    halted(&resume, "the port takes no connections");
    site.gates("gates = [\"tcp:80\", \"http:80/none\"], timeout = \"1s\"");
    halted(&resume, "the page answers `404`");
    site.gates("gates = [\"tcp:80\", \"http:80/\", \"agent\"], timeout = \"1s\"");
    halted(&resume, "its agent does not answer");
    assert!(!site.said("dr/db01_replica").iter().any(|said| said == "AGENT"));

    site.gates("gates = [\"tcp:80\", \"http:80/cgi-bin/start\", \"agent\"], timeout = \"120s\"");
    let run = site.does(&[&resume[..], &["--grace", "1s"]].concat());
    let plan = run.one("plan");
    let steps: Vec<&Value> =
        plan["run"]["record"]["entries"].as_array().expect("entries").iter().map(|e| &e["step"]).collect();
    assert_eq!((&plan["state"], steps), (&json!("completed"), vec![&json!("ready"), &json!("ready")]), "{plan}");
    assert!(site.said("dr/db01_replica").iter().any(|said| said == "AGENT"));
    assert_eq!(site.running("dr/db01_replica").expect("it runs").process, process, "it was started once");
    assert!(site.running("dr/web01_replica").is_some(), "and then the next one");
    // Nothing of the ways into its network stays.
    let orders = site.running("dr/db01_replica").expect("it runs").orders;
    let mut monitor = aquifer_runner::host::qmp::Qmp::connect(&orders, WAIT).expect("a monitor");
    let table =
        monitor.execute("human-monitor-command", json!({ "command-line": "info usernet" }), WAIT).expect("a table");
    assert!(!table.to_string().contains("HOST_FORWARD"), "{table}");
    site.does(&["undo", "plan/all", "--yes"]);
    assert!(site.running("dr/db01_replica").is_none() && site.running("dr/web01_replica").is_none());
}

#[test]
fn a_guest_that_takes_over_has_the_addresses_of_the_other_side() {
    // What looks for it on the other side finds only 10.0.2.15.
    let site = Site::new(&[("address", "192.168.7.15/24")]);
    let path = site.room.path("site.toml");
    let text = fs::read_to_string(&path).expect("a site file");
    let rule = "target = { host = \"dr\" }\nreip = [{ from = \"192.168.7.*\", to = \"10.0.2.*\", mask = \"255.255.255.0\", \
                gateway = \"10.0.2.2\", dns = [\"10.0.2.3\"], through = \"agent\" }]";
    // Only for the job of the machine with an agent: it is the first.
    fs::write(&path, text.replacen("target = { host = \"dr\" }", rule, 1)).expect("a site file");
    site.gates("gates = [\"tcp:80\", \"http:80/\"], timeout = \"20s\"");
    site.replicate();

    let run = site.does(&["plan", "run", "all", "--grace", "1s"]);
    assert_eq!(
        (run.code, &run.one("plan")["state"]),
        (0, &json!("completed")),
        "nobody waited in vain: {}",
        run.stdout
    );
    let events = site.json(&["events"]).kind("transition");
    let told = events.iter().find(|event| event["op"] == "readdress").expect("an event");
    assert_eq!(told["reason"], "192.168.7.15 is now 10.0.2.15", "{told}");
    let interfaces = site.asks("dr/db01_replica", "guest-network-get-interfaces", &json!({})).to_string();
    assert!(interfaces.contains("\"10.0.2.15\"") && !interfaces.contains("192.168.7.15"), "{interfaces}");
    // Asked for once more, there is nothing to do, and nothing to complain about.
    let again = site.json(&["replicas", "db01_replica", "--start"]);
    assert_eq!(again.code, 0, "{}", again.stdout);
    // A point keeps the machine as it was: what is taken back has the addresses of production.
    site.does(&["undo", "plan/all", "--yes"]);
    let disk = site.disk_of("latest");
    assert_eq!(tool("debugfs", &["-R", "cat /etc/address", &disk]), "192.168.7.15/24");
}
