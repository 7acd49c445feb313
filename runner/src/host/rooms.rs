//! Which folder the sockets of a machine are in: told by the folder of its files alone, so that whoever looks for a
//! running machine looks where whoever started it put them.
//!
//! Invariants
//! - A machine in a host's folder of images has its sockets in that host's runtime folder, under its own name.
//! - A socket's path fits into an address of the system; where it would not, a shorter one is made of a digest.
//!
//! Not here: whether anything runs there (`Host::find`).

use std::path::{Path, PathBuf};

use super::Places;

/// Longest path of a socket, bytes.
const SOCKET_PATH_MAX: usize = 107;

/// Longest name of a socket that a machine makes, with its slash.
const LONGEST_SOCKET: usize = "/console.sock".len();

/// Folders of sockets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rooms {
    /// Folders of images, with the runtime folder of each.
    pub hosts: Vec<(PathBuf, PathBuf)>,
    /// For machines elsewhere.
    pub others: PathBuf,
}

impl Rooms {
    /// One folder for all.
    pub fn only(others: impl Into<PathBuf>) -> Self {
        Self { hosts: Vec::new(), others: others.into() }
    }

    /// Where the files and sockets of the machine in `folder` are.
    pub fn places(&self, folder: &Path) -> Places {
        let name = folder.file_name().unwrap_or_default();
        let host = self.hosts.iter().find(|(images, _)| folder.parent() == Some(images.as_path()));
        let named = host.map(|(_, runtime)| runtime.join(name));
        let fits = |dir: &PathBuf| dir.as_os_str().len() + LONGEST_SOCKET <= SOCKET_PATH_MAX;
        let runtime_dir = named.filter(fits).unwrap_or_else(|| self.others.join(short(folder)));
        Places { dir: folder.to_path_buf(), runtime_dir }
    }
}

/// A short name; two folders of one name are told apart by a digest of the whole.
fn short(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default();
    let digest = blake3::hash(folder.as_os_str().as_encoded_bytes()).to_hex();
    let part: String = name.to_string_lossy().chars().take(24).collect();
    format!("{part}-{}", digest.chars().take(8).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_of_a_host_has_its_name_there_and_others_a_digest() {
        let hosts = vec![("/prod".into(), "/run/prod".into()), ("/dr".into(), "/run/dr".into())];
        let rooms = Rooms { hosts, others: "/run/aquifer".into() };
        assert_eq!(rooms.places(Path::new("/dr/db01")).runtime_dir, Path::new("/run/dr/db01"));
        assert_eq!(rooms.places(Path::new("/prod/db01")).runtime_dir, Path::new("/run/prod/db01"));
        let (a, b) = (rooms.places(Path::new("/x/db01")), rooms.places(Path::new("/y/db01")));
        assert!(a.runtime_dir.starts_with("/run/aquifer") && a.runtime_dir != b.runtime_dir);
    }

    #[test]
    fn no_socket_has_a_path_that_does_not_fit() {
        let long = "m".repeat(120);
        let rooms = Rooms { hosts: vec![("/dr".into(), "/run/dr".into())], others: "/run/aquifer".into() };
        let places = rooms.places(&Path::new("/dr").join(&long));
        assert!(places.runtime_dir.as_os_str().len() + LONGEST_SOCKET <= SOCKET_PATH_MAX, "{places:?}");
        assert!(places.dir.ends_with(&long));
    }
}
