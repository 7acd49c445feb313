//! The site file: what a site says once instead of in every command.
//!
//! ```toml
//! version = 1
//! home = "/var/lib/aquifer"          # folder for state
//! cache = "1GiB"                     # decoded blocks kept in memory, per process
//! [repository]
//! nas = { url = "/srv/aquifer", default = true }
//! ```
//!
//! Invariants
//! - Unknown keys, wrong types and names that are not there are errors with line and column, all in one pass.
//! - Keys exist in one list only ([`keys`]): the reader, the JSON schema and `docs/site.md` are made from it.
//! - A literal secret has no place here.
//! - What this build cannot carry out is refused by name with what to use instead; what is harmless to leave undone
//!   (`notify`, `api`, `ping`) is read, checked and listed in [`Site::not_carried_out`], so that it can be said.
//!
//! Not here: the carrying out.

mod jobs;
pub mod keys;
mod model;
mod plans;
mod prove;
mod schedules;
pub mod schema;
mod shape;

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use jiff::tz::TimeZone;

pub use model::*;

use self::{prove::Names, shape::Values};
use crate::{
    fail::{Fail, Result},
    schedule::Window,
    strict::{self, Reader},
};

/// Format of the site file this build reads.
pub const SITE_VERSION: u64 = 1;

/// Largest site file that is read, in bytes.
const SITE_BYTES_MAX: u64 = 4 << 20;

/// A site file, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Name in reports.
    pub name: Option<String>,
    /// Zone of all clock times in schedules; `None` is UTC.
    pub zone: Option<TimeZone>,
    /// Folder for state.
    pub home: Option<PathBuf>,
    /// Decoded blocks kept in memory, bytes.
    pub cache: Option<u64>,
    /// The catalogue; `None` is SQLite in the folder for state.
    pub catalogue: Option<CatalogueEntry>,
    /// How much one worker does at once.
    pub proxy: Proxy,
    /// Repositories by name.
    pub repositories: BTreeMap<String, RepositoryEntry>,
    /// Hosts by name.
    pub hosts: BTreeMap<String, Host>,
    /// Clusters of hosts by name.
    pub clusters: BTreeMap<String, Cluster>,
    /// Machines by name.
    pub machines: BTreeMap<String, Machine>,
    /// Jobs by name.
    pub jobs: BTreeMap<String, Job>,
    /// Failover plans by name.
    pub plans: BTreeMap<String, Plan>,
    /// What the file asks for and this build leaves undone, with its place.
    pub not_carried_out: Vec<String>,
}

/// A file being read.
struct Reading<'a> {
    reader: Reader<'a>,
    names: Names,
    left_undone: Vec<String>,
    zone: TimeZone,
}

impl Site {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`crate::fail::Code::Config`] with every problem; I/O.
    pub fn read(path: &Path) -> Result<Self> {
        let label = path.display().to_string();
        let len = fs::metadata(path).map_err(|e| Fail::io(&label, "read", &e))?.len();
        if len > SITE_BYTES_MAX {
            let what = format!("{label} has {len} bytes; a site file has at most {SITE_BYTES_MAX}");
            return Err(Fail::new(crate::fail::Code::Config, what).at(&label));
        }
        Self::parse(&label, &strict::text(path)?)
    }

    /// Checks a text; `label` is for messages.
    ///
    /// # Errors
    /// [`crate::fail::Code::Config`] with every problem; [`crate::fail::Code::Unsupported`] where the only problem is
    /// what this build cannot do.
    pub fn parse(label: &str, text: &str) -> Result<Self> {
        let mut reader = Reader::new(label, text);
        let top = reader.parse();
        let top = top.get_ref();
        shape::check(&mut reader, top, &keys::SITE, keys::SITE.name, 0..0);
        let top = Values(top);
        let mut reading = Reading { reader, names: Names::default(), left_undone: Vec::new(), zone: TimeZone::UTC };
        let about = top.table("site");
        let zone = about.and_then(|about| reading.time_zone(about));
        reading.zone = zone.clone().unwrap_or(TimeZone::UTC);
        let mut site = Self {
            name: about.and_then(|about| about.text("name")),
            zone,
            home: top.path("home"),
            cache: top.size("cache"),
            catalogue: reading.catalogue(top),
            proxy: proxy(top),
            repositories: reading.repositories(top),
            hosts: reading.hosts(top),
            clusters: reading.clusters(top),
            machines: reading.machines(top),
            jobs: reading.jobs(top),
            plans: reading.plans(top),
            not_carried_out: Vec::new(),
        };
        reading.unbuilt_services(top);
        prove::prove(&mut reading, top, &site);
        site.not_carried_out = std::mem::take(&mut reading.left_undone);
        reading.reader.finish(Some(site))
    }

    /// The repository commands use when none is named: the marked one, or the only one.
    pub fn default_repository(&self) -> Option<&RepositoryEntry> {
        let marked = self.repositories.values().find(|r| r.default);
        marked.or_else(|| self.repositories.values().next().filter(|_| self.repositories.len() == 1))
    }

    /// The hosts that a name stands for: the members of a cluster, or the host itself.
    pub fn members(&self, name: &str) -> Vec<(&str, &Host)> {
        let names = self.clusters.get(name).map_or_else(|| vec![name.to_owned()], |cluster| cluster.members.clone());
        names
            .iter()
            .filter_map(|name| self.hosts.get_key_value(name))
            .map(|(name, host)| (name.as_str(), host))
            .collect()
    }

    /// The cluster that a host is a member of.
    pub fn cluster_of(&self, host: &str) -> Option<&str> {
        let mut clusters = self.clusters.iter();
        clusters.find(|(_, cluster)| cluster.members.iter().any(|member| member == host)).map(|(name, _)| name.as_str())
    }

    /// The zone of clock times.
    pub fn zone(&self) -> TimeZone {
        self.zone.clone().unwrap_or(TimeZone::UTC)
    }
}

fn proxy(top: Values<'_, '_>) -> Proxy {
    let default = Proxy::default();
    let Some(table) = top.table("proxy") else { return default };
    Proxy {
        max_tasks: table.number("max_tasks").unwrap_or(default.max_tasks),
        read: table.rate("read"),
        write: table.rate("write"),
    }
}

impl Reading<'_> {
    fn time_zone(&mut self, about: Values<'_, '_>) -> Option<TimeZone> {
        let name = about.text("timezone")?;
        match TimeZone::get(&name) {
            Ok(zone) => Some(zone),
            Err(_) => {
                let what = format!("`timezone`: there is no zone `{}`", name.escape_debug());
                self.reader.problem(about.place("timezone"), what);
                None
            }
        }
    }

    fn catalogue(&mut self, top: Values<'_, '_>) -> Option<CatalogueEntry> {
        let table = top.table("catalogue")?;
        let url = table.text("url")?;
        let good = ["sqlite:", "postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
        let secret = url
            .split_once("://")
            .and_then(|(_, rest)| rest.split_once('@'))
            .is_some_and(|(user, _)| user.contains(':'));
        if !good {
            let what = "`url` of the catalogue must begin with `sqlite:` or `postgres://`";
            self.reader.problem(table.place("url"), what);
        } else if secret {
            let what = "a secret does not stand in this file; take the password out of `url` and write `password = { file = \"...\" }`";
            self.reader.problem(table.place("url"), what);
        }
        Some(CatalogueEntry { url, password: secret_of(table, "password") })
    }

    fn repositories(&mut self, top: Values<'_, '_>) -> BTreeMap<String, RepositoryEntry> {
        let mut repositories = BTreeMap::new();
        let mut default = false;
        for (name, table, place) in top.named("repository") {
            let Some(url) = table.text("url") else { continue };
            let at = table.place("url");
            if let Some((scheme, _)) = url.split_once("://") {
                let what = format!(
                    "repository.{name}: `{scheme}://` is not built yet; use a folder, for example a mounted bucket"
                );
                self.reader.unbuilt(at, what);
            }
            for (key, instead) in [
                ("foreign", "read its files with `info`, `mount` and `recover`"),
                ("s3", "use a folder"),
                ("key", "keep the folder on an encrypted file system"),
            ] {
                if table.has(key) {
                    let what = format!("repository.{name}: `{key}` is not built yet; {instead}");
                    self.reader.unbuilt(table.place(key), what);
                }
            }
            let is_default = table.truth("default").unwrap_or(false);
            if is_default && default {
                self.reader.problem(place.clone(), "only one repository can be the default");
            }
            default |= is_default;
            let limits = self.limits(table);
            let max_tasks = table.number("max_tasks");
            repositories.insert(name, RepositoryEntry { url: url.into(), default: is_default, max_tasks, limits });
        }
        repositories
    }

    fn limits(&mut self, above: Values<'_, '_>) -> Limits {
        let Some(table) = above.table("limits") else { return Limits::default() };
        let mut hours = Vec::new();
        for (table, place) in table.tables("hours") {
            let (Some(from), Some(to)) = (table.text("from"), table.text("to")) else { continue };
            match Window::parse(&format!("{from}-{to}")) {
                Ok(window) => hours.push(LimitHours { window, read: table.rate("read"), write: table.rate("write") }),
                Err(what) => self.reader.problem(place, format!("`hours`: {what}")),
            }
        }
        Limits { read: table.rate("read"), write: table.rate("write"), hours }
    }

    fn hosts(&mut self, top: Values<'_, '_>) -> BTreeMap<String, Host> {
        let mut hosts = BTreeMap::new();
        for (name, table, _) in top.named("host") {
            self.names.hosts.insert(name.clone());
            let kind = table.text("kind").unwrap_or_default();
            if ["libvirt", "proxmox"].contains(&kind.as_str()) {
                let what =
                    format!("host.{name}: the kind `{kind}` is not built yet; use `qemu`, or `disks` of the machines");
                self.reader.unbuilt(table.place("kind"), what);
            }
            if table.has("address") {
                let what = format!(
                    "host.{name}: a mover at an `address` is not built yet; mount the folder of its images here and name that"
                );
                self.reader.unbuilt(table.place("address"), what);
            }
            let Some(images) = table.path("images") else { continue };
            hosts.insert(name, Host { images, runtime: table.path("runtime"), max_tasks: table.number("max_tasks") });
        }
        hosts
    }

    fn clusters(&mut self, top: Values<'_, '_>) -> BTreeMap<String, Cluster> {
        let mut clusters = BTreeMap::new();
        for (name, table, _) in
            top.named("host").into_iter().filter(|(_, table, _)| table.text("kind").as_deref() == Some("cluster"))
        {
            let members = self.refer_all(prove::What::OneHost, "members", &format!("host.{name}"), table);
            if table.has("members") && members.is_empty() {
                self.reader.problem(table.place("members"), format!("host.{name}: `members` is empty"));
            }
            self.names.clusters.insert(name.clone());
            clusters.insert(name, Cluster { members, max_tasks: table.number("max_tasks") });
        }
        clusters
    }

    fn machines(&mut self, top: Values<'_, '_>) -> BTreeMap<String, Machine> {
        let mut machines = BTreeMap::new();
        for (name, table, place) in top.named("machine") {
            self.names.machines.insert(name.clone());
            let Some(source) = self.machine_source(&name, table, place) else { continue };
            let exclude_disks = table.plain_texts("exclude_disks");
            machines.insert(name, Machine { source, rpo: table.duration("rpo"), exclude_disks });
        }
        machines
    }

    fn machine_source(&mut self, name: &str, table: Values<'_, '_>, place: Range<usize>) -> Option<MachineSource> {
        match (table.text("from"), table.has("disks")) {
            (Some(_), true) | (None, false) => {
                self.reader.problem(place, format!("machine.{name} needs either `from` or `disks`"));
                None
            }
            (Some(from), false) => match from.split_once(':') {
                Some((host, there)) if !host.is_empty() && shape::is_name(there) => {
                    self.names.refer(prove::What::OneHost, host, &format!("machine.{name}"), table.place("from"));
                    Some(MachineSource::Host { host: host.to_owned(), name: there.to_owned() })
                }
                _ => {
                    self.reader.problem(table.place("from"), "`from` must be `HOST:NAME`");
                    None
                }
            },
            (None, true) => {
                let disks = table.text_map("disks").into_iter().map(|(disk, (source, _))| (disk, source)).collect();
                Some(MachineSource::Images { disks, description: table.path("description") })
            }
        }
    }

    /// Notes what is read but left undone.
    fn unbuilt_services(&mut self, top: Values<'_, '_>) {
        if top.has("notify") {
            self.left_undone.push("[notify]: nothing is sent by this build".to_owned());
        }
        if top.has("api") {
            self.left_undone.push("[api]: not served by this build".to_owned());
        }
    }
}

/// A reference to a secret that passed the check.
fn secret_of(table: Values<'_, '_>, key: &str) -> Option<Secret> {
    let table = table.table(key)?;
    let found = [
        table.text("credential").map(Secret::Credential),
        table.path("file").map(Secret::File),
        table.text("command").map(Secret::Command),
        table.text("env").map(Secret::Env),
    ];
    found.into_iter().flatten().next()
}

#[cfg(test)]
mod tests;
