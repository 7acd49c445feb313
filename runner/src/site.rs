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
//! - Unknown keys, wrong types and names that are not there are errors with line and column.
//! - A literal secret has no place here.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use crate::{
    fail::{Fail, Result},
    strict::Reader,
    units,
};

/// Format of the site file this build reads.
pub const SITE_VERSION: u64 = 1;

/// Largest site file that is read, in bytes.
const SITE_BYTES_MAX: u64 = 4 << 20;

/// A site file, checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Site {
    /// Folder for state.
    pub home: Option<PathBuf>,
    /// Decoded blocks kept in memory, bytes.
    pub cache: Option<u64>,
    /// Repositories by name.
    pub repositories: BTreeMap<String, RepositoryEntry>,
}

/// One repository of a site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryEntry {
    /// Its folder.
    pub url: PathBuf,
    /// Whether commands use it when none is named.
    pub default: bool,
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
        let text = fs::read_to_string(path).map_err(|e| Fail::io(&label, "read", &e))?;
        Self::parse(&label, &text)
    }

    /// Checks a text; `label` is for messages.
    pub fn parse(label: &str, text: &str) -> Result<Self> {
        let mut reader = Reader::new(label, text);
        let top = reader.parse();
        let top = top.get_ref();
        reader.only(top, "the site file", &["version", "home", "cache", "repository"]);
        match reader.integer(top, "version", SITE_VERSION..=SITE_VERSION) {
            Some(_) => {}
            None if top.get("version").is_none() => {
                reader.problem(0..0, format!("`version = {SITE_VERSION}` is missing"));
            }
            None => {}
        }
        let home = reader.string(top, "home").map(PathBuf::from);
        let cache = reader.parsed(top, "cache", |text| units::parse_bytes(text).map_err(|fail| fail.what));
        let mut repositories = BTreeMap::new();
        if let Some(tables) = reader.table(top, "repository") {
            for name in tables.keys().map(|key| key.get_ref().to_string()) {
                let Some(table) = reader.table(tables, &name) else { continue };
                reader.only(table, &format!("repository.{name}"), &["url", "default"]);
                match reader.string(table, "url") {
                    Some(url) => {
                        let default = reader.truth(table, "default").unwrap_or(false);
                        repositories.insert(name, RepositoryEntry { url: url.into(), default });
                    }
                    None if table.get("url").is_none() => {
                        reader.problem(Reader::place_of(tables, &name), format!("repository.{name} has no `url`"));
                    }
                    None => {}
                }
            }
            let defaults: Vec<&String> = repositories.iter().filter(|(_, r)| r.default).map(|(n, _)| n).collect();
            if let [_, second, ..] = defaults.as_slice() {
                reader.problem(Reader::place_of(tables, second), "only one repository can be the default");
            }
        }
        reader.finish(Some(Self { home, cache, repositories }))
    }

    /// The repository commands use when none is named: the marked one, or the only one.
    pub fn default_repository(&self) -> Option<&RepositoryEntry> {
        let marked = self.repositories.values().find(|r| r.default);
        marked.or_else(|| self.repositories.values().next().filter(|_| self.repositories.len() == 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_sample_is_read() {
        let sample: String = include_str!("site.rs")
            .lines()
            .skip_while(|l| *l != "//! ```toml")
            .skip(1)
            .take_while(|l| *l != "//! ```")
            .map(|l| format!("{}\n", l.trim_start_matches("//! ")))
            .collect();
        let site = Site::parse("sample", &sample).expect("the sample is valid");
        assert_eq!(site.cache, Some(1 << 30));
        assert_eq!(site.default_repository().map(|r| r.url.as_path()), Some(Path::new("/srv/aquifer")));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let wrong = |text: &str| Site::parse("s.toml", text).expect_err(text).what;
        assert!(wrong("home = \"/x\"\n").contains("s.toml:1:1: `version = 1` is missing"));
        assert!(wrong("version = 2\n").contains("s.toml:1:11: `version` must be a whole number from 1 to 1"));
        assert!(
            wrong("version = 1\ncahe = \"1GiB\"\n")
                .contains("s.toml:2:1: unknown key `cahe` in the site file; did you mean `cache`?")
        );
        assert!(wrong("version = 1\ncache = \"9\"\n").contains("s.toml:2:9: `cache`: `9` is not a size"));
        assert!(wrong("version = 1\n[repository.a]\n").contains("repository.a has no `url`"));
        let two =
            "version = 1\n[repository]\na = { url = \"/a\", default = true }\nb = { url = \"/b\", default = true }\n";
        assert!(wrong(two).contains("s.toml:4:1: only one repository can be the default"), "{}", wrong(two));
        assert!(wrong("version = 1\n[repository\n").contains("s.toml:2:"));
    }
}
