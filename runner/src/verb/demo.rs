//! `demo`: the first five minutes without a backup at hand. A small machine with three restore points is made in a
//! folder of its own, recovered, moved to its local disk while it runs, and taken away again.
//!
//! Invariants
//! - Every step is a command of this program, run as a user would type it and shown with what it answers.
//! - Everything is made in one new folder with its own state and repository; it is removed at the end, and on a
//!   failure, unless it was asked to stay.
//! - The machine's own words are the proof: it reads, checks and copies sectors and says what it saw.
//!
//! Not here: what the steps do. A whole operating system (`make demo` has one).

pub mod guest;

use std::{
    fs,
    io::Write,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    cli::DryRun,
    context::{Context, quoted},
    fail::{Code, Fail, Result},
    host::{Host, Running, qemu::Qemu},
    machine::Described,
    output::Form,
    recover::shape::{Wishes, shape},
    stop::Stop,
};

/// Options of `demo`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder it is made in; it must not exist
    #[arg(long, value_name = "DIR", default_value = "aquifer-demo")]
    pub into: PathBuf,
    /// Leave the folder in place, with the machine's disk
    #[arg(long)]
    pub keep: bool,
    /// Whether only to look.
    #[command(flatten)]
    pub dry: DryRun,
}

/// The machine's disk, MiB: half of it does not compress, so that copying it takes a moment.
const DISK_MIB: usize = 64;

/// Memory the machine needs.
const MEMORY: u64 = 64 << 20;

/// How long the machine may take to say something.
const GUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How often its console is looked at.
const TICK: Duration = Duration::from_millis(50);

/// Recovers it without a network, so slowly that it is seen to run before it is copied.
const RECOVER: &[&str] =
    &["recover", "demo", "--into", "vm", "--memory", "64MiB", "--cpus", "1", "--network", "none", "--rate", "8MiB/s"];

const BACKUP: &[&str] = &["backup", "demo", "--disk", "vda=raw:disk.raw"];

pub(super) fn run(context: &Context, args: &Args) -> Result<()> {
    let dir = std::path::absolute(&args.into).map_err(|e| Fail::io(args.into.display(), "find", &e))?;
    if dir.symlink_metadata().is_ok() {
        let what = format!("{} exists already; the demo makes a folder of its own", dir.display());
        return Err(Fail::new(Code::Exists, what).at(dir.display()).help("aquifer demo --into DIR"));
    }
    let wishes = Wishes { memory: Some(MEMORY), ..Wishes::default() };
    Qemu.check(&shape("demo", &["vda".to_owned()], &Described::default(), &wishes).shape)?;
    let stop = context.stop()?;
    if args.dry.dry_run {
        let folder = dir.display().to_string();
        context.out.record("plan", &json!({ "dir": folder, "kept": args.keep }));
        context.out.line(format_args!("would make a machine of {DISK_MIB} MiB with three restore points in {folder},"));
        context.out.line("recover it, move it to its local disk while it runs, and turn it off");
        return Ok(());
    }
    fs::create_dir(&dir).map_err(|e| Fail::io(dir.display(), "create", &e))?;
    let demo = Demo { context, dir, stop, kept: args.keep };
    demo.story()?;
    if args.keep {
        let disk = quoted(&disk_of(&demo.dir).to_string_lossy());
        context.out.line(format_args!("the machine's disk is {disk}"));
    }
    context.out.closing("dir", demo.dir.display().to_string());
    context.out.next("aquifer info SOURCE    # your own: a qcow2 image, raw:PATH, an NBD URI");
    Ok(())
}

struct Demo<'a> {
    context: &'a Context,
    dir: PathBuf,
    stop: Stop,
    kept: bool,
}

impl Demo<'_> {
    fn story(&self) -> Result<()> {
        let folder = quoted(&self.dir.to_string_lossy());
        self.say(&format!("A small machine with three restore points, made in {folder}"));
        self.typed(&format!("cd {folder}; export AQUIFER_HOME=$PWD/home AQUIFER_REPO=$PWD/repo"));
        let mut disk = noise();
        self.aquifer(&["init"])?;
        for point in 1..=3usize {
            guest::put_on(&mut disk, &format!("\r\nThis machine runs from its restore point {point}.\r\n"));
            if let Some(changed) = disk.get_mut(point << 20..(point << 20) + 300_000) {
                changed.fill(0xa0);
            }
            let path = self.dir.join("disk.raw");
            fs::write(&path, &disk).map_err(|e| Fail::io(path.display(), "write", &e))?;
            self.aquifer(BACKUP)?;
        }
        self.say("The disk is lost; the chain of restore points is what there is");
        self.typed("rm disk.raw");
        let path = self.dir.join("disk.raw");
        fs::remove_file(&path).map_err(|e| Fail::io(path.display(), "remove", &e))?;
        self.aquifer(&["info", "demo"])?;
        if self.context.find_program("qemu-img").is_some() {
            self.aquifer(&["mount", "demo", "--run", "qemu-img info \"$uri\""])?;
        }
        self.say("The machine runs from the chain; nothing is copied first");
        self.aquifer(RECOVER)?;
        let (host, running) = self.machine()?;
        self.heard(&running, 3)?;
        self.aquifer(&["status", "demo"])?;
        self.say("It moves to its own disk while it runs");
        self.aquifer(&["session", "set", "demo", "--rate", "none"])?;
        self.aquifer(&["finalize", "demo", "--keep"])?;
        self.say("The restore points go; the machine goes on");
        self.typed("rm -r repo");
        let repo = self.dir.join("repo");
        fs::remove_dir_all(&repo).map_err(|e| Fail::io(repo.display(), "remove", &e))?;
        self.heard(&running, usize::try_from(guest::SECTORS).unwrap_or(16) + 1)?;
        self.turn_off(host, &running)
    }

    fn say(&self, title: &str) {
        self.context.out.line(format_args!("\n== {title}"));
    }

    fn typed(&self, line: &str) {
        self.context.out.line(format_args!("$ {line}"));
    }

    /// Runs a command of this program in the folder. What it says on stdout is data of ours in human form only.
    fn aquifer(&self, args: &[&str]) -> Result<()> {
        self.stop.check()?;
        let line = args.iter().fold("aquifer".to_owned(), |line, word| line + " " + &quoted(word));
        self.typed(&line);
        let began = Instant::now();
        let mut command = self.command(args)?;
        command.arg("--quiet");
        if self.context.out.form() == Form::Json {
            let stderr = std::io::stderr().as_fd().try_clone_to_owned();
            command.stdout(Stdio::from(stderr.map_err(|e| Fail::io("stderr", "share", &e))?));
        }
        let status = command.status().map_err(|e| Fail::io("aquifer", "start", &e))?;
        self.stop.check()?;
        let exit = status.code().unwrap_or(-1);
        let seconds = began.elapsed().as_secs_f64();
        self.context.out.record("step", &json!({ "command": line, "exit": exit, "seconds": seconds }));
        if matches!(exit, 0 | 1) {
            return Ok(());
        }
        let fail = Fail::new(Code::Failed, format!("this step of the demo ended with exit code {exit}"));
        Err(fail.at(line).help("aquifer doctor"))
    }

    fn command(&self, args: &[&str]) -> Result<Command> {
        let (program, _) = self.context.own_command()?;
        let mut command = Command::new(program);
        command.args(args).current_dir(&self.dir).stdin(Stdio::null());
        command.env("AQUIFER_HOME", self.dir.join("home")).env("AQUIFER_REPO", self.dir.join("repo"));
        Ok(command)
    }

    fn machine(&self) -> Result<(&'static dyn Host, Running)> {
        crate::recover::running_in(&self.dir.join("vm"))
    }

    /// Waits until the guest has gone through `more` further sectors, and shows what it says.
    fn heard(&self, running: &Running, more: usize) -> Result<()> {
        let said = || fs::read(&running.console_log).map(|b| String::from_utf8_lossy(&b).into_owned());
        let count = |text: &str| text.matches('.').count();
        let read = |e: &std::io::Error| Fail::io(running.console_log.display(), "read", e);
        let before = count(&said().map_err(|e| read(&e))?);
        let deadline = Instant::now() + GUEST_TIMEOUT;
        loop {
            let text = said().map_err(|e| read(&e))?;
            let sectors = text.rsplit('\n').next().unwrap_or_default();
            let place = running.console_log.display();
            if sectors.contains(['X', 'E']) {
                return Err(Fail::new(Code::Guest, "the machine read wrong bytes, or an error").at(place));
            }
            // The banner ends with a full stop of its own.
            if count(&text) >= before.max(1) + more {
                return self.tell(&text, sectors);
            }
            if Instant::now() > deadline {
                let what = format!("the machine said nothing for {} s", GUEST_TIMEOUT.as_secs());
                return Err(Fail::new(Code::Guest, what).at(place).help("aquifer demo --keep"));
            }
            self.stop.wait(TICK);
            self.stop.check()?;
        }
    }

    fn tell(&self, text: &str, sectors: &str) -> Result<()> {
        let banner = text.lines().map(str::trim).rfind(|line| line.starts_with("This")).unwrap_or_default();
        let sectors = sectors.matches('.').count();
        self.context.out.record("guest", &json!({ "said": banner, "sectors": sectors }));
        self.context.out.line(format_args!("\n  the machine says: {banner}"));
        self.context.out.line(format_args!("  it has read, checked and copied {sectors} sectors, all of them right\n"));
        Ok(())
    }

    fn turn_off(&self, host: &dyn Host, running: &Running) -> Result<()> {
        if let Ok(mut console) = aquifer_mount::dial::unix(&running.console, Duration::from_secs(5)) {
            let _ = console.write_all(b"q");
            running.process.wait_gone(Duration::from_secs(5));
        }
        host.power_off(running)?;
        self.context.out.line("the machine was turned off");
        Ok(())
    }
}

impl Drop for Demo<'_> {
    fn drop(&mut self) {
        if let Ok((host, running)) = self.machine() {
            // Its session first: a machine that is off would be started again.
            // One that was kept has none any more, and refuses.
            if let Ok(mut command) = self.command(&["finalize", "vm", "--discard", "--yes", "--quiet"]) {
                let _ = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
            }
            let _ = host.power_off(&running);
        }
        if !self.kept {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

fn disk_of(dir: &Path) -> PathBuf {
    dir.join("vm/disks/vda/disk.raw")
}

/// A disk of which the first half does not compress.
fn noise() -> Vec<u8> {
    let mut disk = vec![0; DISK_MIB << 20];
    let half = disk.len() / 2;
    if let Some(data) = disk.get_mut(..half) {
        blake3::Hasher::new().finalize_xof().fill(data);
    }
    disk
}
