//! A hypervisor without one: it remembers which folder's machine is on, and on which files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use aquifer_runner::host::{Attachment, Error, Happening, Host, Pivot, Places, Power, Process, Result, Running, Shape};
use parking_lot::Mutex;

use crate::stage;

/// The machines that are on, by folder.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    on: Mutex<BTreeMap<PathBuf, Vec<PathBuf>>>,
    /// The next start fails.
    pub(crate) refuses: AtomicBool,
    /// No machine can be turned off.
    pub(crate) refuses_off: AtomicBool,
    /// The next merge fails.
    pub(crate) refuses_merge: AtomicBool,
}

fn running(dir: &Path) -> Running {
    let at = |name: &str| dir.join(name);
    Running {
        process: Process::of(std::process::id()).expect("we are"),
        accel: "none".into(),
        orders: at("qmp.sock"),
        events: at("events.sock"),
        console: at("console.sock"),
        console_log: at("console.log"),
        screen: None,
        log: at("log"),
    }
}

impl Fake {
    /// The files a machine writes to.
    pub(crate) fn files(&self, dir: &Path) -> Option<Vec<PathBuf>> {
        self.on.lock().get(dir).cloned()
    }

    pub(crate) fn power_off_all(&self) {
        self.on.lock().clear();
    }

    pub(crate) fn count(&self) -> usize {
        self.on.lock().len()
    }
}

impl Host for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn check(&self, _: &Shape) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn variables(&self, dir: &Path) -> PathBuf {
        dir.join("nvram.fd")
    }

    fn logs(&self, dir: &Path) -> Vec<PathBuf> {
        vec![dir.join("log")]
    }

    fn start(&self, _: &Shape, disks: &[Attachment], places: &Places) -> Result<Running> {
        if self.refuses.swap(false, Ordering::Relaxed) {
            return Err(Error::Shape { what: "it does not want to".into() });
        }
        let files = disks.iter().map(|disk| match disk {
            Attachment::File { path, .. } => path.clone(),
            Attachment::Door(_) => panic!("no doors here"),
        });
        let files: Vec<_> = files.collect();
        assert!(files.iter().all(|file| file.exists()), "{files:?}");
        self.on.lock().entry(places.dir.clone()).or_insert(files);
        Ok(running(&places.dir))
    }

    fn keep(&self, _: &Shape, _: &[Attachment], _: &Places) -> Result<()> {
        Ok(())
    }

    fn find(&self, places: &Places) -> Option<Running> {
        self.on.lock().contains_key(&places.dir).then(|| running(&places.dir))
    }

    fn layer(&self, of: &Running, index: usize, layer: &Path) -> Result<()> {
        let dir = of.log.parent().expect("a folder").to_path_buf();
        if let Some(file) = self.on.lock().get_mut(&dir).and_then(|files| files.get_mut(index)) {
            *file = layer.to_path_buf();
        }
        Ok(())
    }

    fn merge(&self, of: &Running, index: usize, base: &Path, size: u64) -> Result<()> {
        if self.refuses_merge.swap(false, Ordering::Relaxed) {
            return Err(Error::Shape { what: "it does not want to".into() });
        }
        let dir = of.log.parent().expect("a folder").to_path_buf();
        if let Some(file) = self.on.lock().get_mut(&dir).and_then(|files| files.get_mut(index))
            && file != base
        {
            stage::img(&["commit", "-q", "-d", "-b", &base.to_string_lossy(), &file.to_string_lossy()]);
            stage::img(&["resize", "-q", "--shrink", "-f", "qcow2", &base.to_string_lossy(), &size.to_string()]);
            *file = base.to_path_buf();
        }
        Ok(())
    }

    fn power(&self, of: &Running) -> Result<Power> {
        let dir = of.log.parent().expect("a folder");
        Ok(if self.on.lock().contains_key(dir) { Power::Running } else { Power::Off })
    }

    fn resume(&self, _: &Running) -> Result<()> {
        Ok(())
    }

    fn pivot(&self, _: &Running, _: usize, _: &Path) -> Result<Pivot> {
        Err(Error::Shape { what: "no doors here".into() })
    }

    fn ask_off(&self, of: &Running, _: Duration, _: &dyn Fn() -> bool) -> Result<bool> {
        self.power_off(of).map(|()| true)
    }

    fn power_off(&self, of: &Running) -> Result<()> {
        if self.refuses_off.load(Ordering::Relaxed) {
            return Err(Error::Power { have: Power::Running });
        }
        self.on.lock().remove(of.log.parent().expect("a folder"));
        Ok(())
    }

    fn follow(&self, _: &Running, _: Duration, _: &mut dyn FnMut(Option<Happening>) -> bool) -> Result<()> {
        Ok(())
    }
}
