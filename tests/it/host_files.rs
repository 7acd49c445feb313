//! The `qemu` host on local images: a machine starts on them, goes over to a new layer and back down while it runs, and
//! is found, stopped and told from one that somebody started by hand.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use aquifer_runner::host::{
    Attachment, Bus, Disk, Error, Host, ImageFormat, Network, Places, Power, Running, Shape, firmware::Firmware,
    qemu::Qemu,
};
use aquifer_tests::{boot_sector, qemu, site::eventually};

/// A folder with a machine's images. Ends what it started.
struct Stage {
    dir: tempfile::TempDir,
    disk: Vec<u8>,
    running: Option<Running>,
}

impl Stage {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().expect("folder"), disk: boot_sector::disk(16, 8), running: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self, name: &str, format: ImageFormat) -> Attachment {
        let raw = self.path("content.raw");
        fs::write(&raw, &self.disk).expect("write");
        let path = self.path(name);
        qemu::img(&["convert", "-f", "raw", "-O", format.name(), qemu::text(&raw), qemu::text(&path)]);
        fs::remove_file(raw).expect("remove");
        Attachment::File { path, format }
    }

    fn layer(&self, name: &str, below: &str) -> PathBuf {
        let path = self.path(name);
        qemu::img(&["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", qemu::text(&path)]);
        path
    }

    fn places(&self) -> Places {
        Places { dir: self.dir.path().into(), runtime_dir: self.dir.path().into() }
    }

    fn start(&mut self, disks: &[Attachment]) -> Running {
        let names =
            (0..disks.len()).map(|index| Disk { name: format!("vd{index}"), bus: Bus::Virtio, boot_order: None });
        let shape = Shape { disks: names.collect(), ..shape() };
        let running = Qemu.start(&shape, disks, &self.places()).expect("start");
        self.running = Some(running.clone());
        running
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            let _ = Qemu.power_off(running);
        }
    }
}

fn shape() -> Shape {
    Shape {
        name: "test".into(),
        uuid: uuid::Uuid::nil(),
        firmware: Firmware::Bios,
        machine_type: None,
        variables: None,
        memory: 64 << 20,
        cpus: 1,
        disks: Vec::new(),
        nics: Vec::new(),
        network: Network::None,
    }
}

fn seen(running: &Running) -> String {
    let said = fs::read_to_string(&running.console_log).unwrap_or_default();
    said.split_once("READY").map(|(_, seen)| seen.to_owned()).unwrap_or_default()
}

fn goes_on(running: &Running, more: usize) {
    let before = seen(running).matches('.').count();
    eventually("the guest goes on", || (seen(running).matches('.').count() >= before + more).then_some(()));
    assert!(!seen(running).contains(['X', 'E']), "the guest saw wrong bytes or an error: {}", seen(running));
}

fn sum(path: &Path) -> blake3::Hash {
    blake3::hash(&fs::read(path).expect("read"))
}

#[test]
fn a_running_machine_goes_over_to_a_layer_and_is_merged_down_again() {
    let mut stage = Stage::new();
    let disks = [stage.image("base.qcow2", ImageFormat::Qcow2), stage.image("other.raw", ImageFormat::Raw)];
    let running = stage.start(&disks);
    goes_on(&running, 3);

    let layer = stage.layer("1.qcow2", "base.qcow2");
    Qemu.layer(&running, 0, &layer).expect("layer");
    let still = sum(&stage.path("base.qcow2"));
    let empty = fs::metadata(&layer).expect("layer").len();
    Qemu.layer(&running, 0, &layer).expect("it is there already");
    goes_on(&running, 20);
    assert_eq!(sum(&stage.path("base.qcow2")), still, "nobody writes below the layer");
    assert!(fs::metadata(&layer).expect("layer").len() > empty, "the guest writes to the layer");

    let above = stage.layer("2.qcow2", "1.qcow2");
    Qemu.layer(&running, 0, &above).expect("a layer on a layer");
    goes_on(&running, 3);
    Qemu.merge(&running, 0, &stage.path("base.qcow2"), u64::MAX).expect("merge");
    Qemu.merge(&running, 0, &stage.path("base.qcow2"), u64::MAX).expect("it is merged already");
    fs::remove_file(&layer).expect("nothing needs it");
    fs::remove_file(&above).expect("nothing needs it");
    eventually("a whole round on the merged disk", || seen(&running).matches('R').nth(1).map(drop));
    assert_eq!(Qemu.power(&running).expect("power"), Power::Running);

    Qemu.power_off(&running).expect("off");
    assert_eq!(Qemu.power(&running).expect("power"), Power::Off);
    let whole = boot_sector::after_a_round(&stage.disk);
    assert!(qemu::contents(&stage.path("base.qcow2"), "qcow2") == whole, "the guest's own copies, nothing else");
    assert!(fs::read(stage.path("other.raw")).expect("read") == stage.disk, "the other disk is as it was");
}

#[test]
fn a_layer_that_cannot_be_opened_changes_nothing() {
    let mut stage = Stage::new();
    let running = stage.start(&[stage.image("base.qcow2", ImageFormat::Qcow2)]);
    goes_on(&running, 3);
    let text = stage.path("1.qcow2");
    fs::write(&text, "this is no image").expect("write");
    assert!(matches!(Qemu.layer(&running, 0, &text), Err(Error::Monitor(_))));
    assert!(matches!(Qemu.layer(&running, 7, &text), Err(Error::Observed { .. })), "there is no such disk");
    assert!(matches!(Qemu.merge(&running, 7, &text, u64::MAX), Err(Error::Observed { .. })));
    goes_on(&running, 3);
}

#[test]
fn a_guest_that_does_not_listen_is_turned_off_after_its_grace() {
    let mut stage = Stage::new();
    let running = stage.start(&[stage.image("base.qcow2", ImageFormat::Qcow2)]);
    goes_on(&running, 1);
    let began = Instant::now();
    assert!(!Qemu.ask_off(&running, Duration::from_secs(2), &|| true).expect("asked"), "it does not listen");
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(2) && took < Duration::from_secs(20), "{took:?}");
    // Whoever does not want to wait any more does not.
    let began = Instant::now();
    let asked = Qemu.ask_off(&running, Duration::from_secs(600), &|| began.elapsed() < Duration::from_millis(200));
    assert!(!asked.expect("asked") && began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    goes_on(&running, 1);
    Qemu.power_off(&running).expect("off");
    assert_eq!(Qemu.find(&stage.places()), None);
    assert!(Qemu.ask_off(&running, Duration::from_secs(2), &|| true).expect("it is off already"));
    Qemu.power_off(&running).expect("it is off already");
}

#[test]
fn a_machine_that_somebody_started_by_hand_is_found_by_its_monitor() {
    let stage = Stage::new();
    assert_eq!(Qemu.find(&stage.places()), None);
    let monitor = format!("unix:{},server=on,wait=off", qemu::text(&stage.path("qmp.sock")));
    let child = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-S", "-accel", "tcg", "-m", "32M", "-display", "none", "-qmp", &monitor])
        .stdin(Stdio::null())
        .spawn();
    let mut child = child.expect("qemu");
    let running = eventually("it is found", || Qemu.find(&stage.places()));
    assert_eq!(running.process.pid, child.id());
    assert_eq!(eventually("it answers", || Qemu.power(&running).ok()), Power::Paused);
    Qemu.power_off(&running).expect("off");
    child.wait().expect("reap");
    assert_eq!(Qemu.find(&stage.places()), None, "a socket that nobody listens at is nobody");
}
