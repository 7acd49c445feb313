//! Folders and files of a computer that loses power: names are durable apart from what they name.
//!
//! Invariants
//! - What was written to a file and not synced survives or not, each write on its own, and torn at 512 bytes. The same
//!   goes for every name that was made, moved or taken away in a folder: a sync of the file does not save its name, a
//!   sync of the folder does not save the file.
//! - After a sync has failed, nothing it was to save is ever saved by a later one.
//!
//! Not here: who made the calls (`traced`); renames from one folder to another, which nobody here does.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use crate::rng::Rng;

const SECTOR: usize = 512;

/// A file, whatever it is called.
pub type FileNumber = usize;

/// What one call did, or a word of whoever made the calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A folder was made: its path below the root.
    MadeFolder(String),
    /// A file has got a name: its path below the root.
    Named(String, FileNumber),
    /// A file or an empty folder has lost its name.
    Unnamed(String),
    /// A name took the place of another in the same folder.
    Renamed(String, String),
    /// Bytes were written.
    Wrote(FileNumber, u64, Vec<u8>),
    /// A file has this length now.
    Resized(FileNumber, u64),
    /// A file was synced, or the sync failed.
    SyncedFile(FileNumber, bool),
    /// A folder was synced, or the sync failed.
    SyncedFolder(String, bool),
    /// A word.
    Said(String),
}

/// Folder and last name of a path below the root.
pub fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Node {
    Folder,
    File(FileNumber),
}

/// Folders and files at one moment.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    files: BTreeMap<FileNumber, Vec<u8>>,
}

impl Tree {
    /// The file with this path.
    pub fn file(&self, path: &str) -> Option<FileNumber> {
        match self.nodes.get(path) {
            Some(Node::File(number)) => Some(*number),
            _ => None,
        }
    }

    /// Whether there is a folder with this path.
    pub fn is_folder(&self, path: &str) -> bool {
        path.is_empty() || self.nodes.get(path) == Some(&Node::Folder)
    }

    /// Does what was done.
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::MadeFolder(path) => {
                self.nodes.insert(path.clone(), Node::Folder);
            }
            Event::Named(path, number) => {
                self.nodes.insert(path.clone(), Node::File(*number));
            }
            Event::Unnamed(path) => {
                self.nodes.remove(path);
            }
            Event::Renamed(from, to) => {
                if let Some(node) = self.nodes.remove(from) {
                    self.nodes.insert(to.clone(), node);
                }
            }
            Event::Wrote(number, at, bytes) => self.write(*number, *at as usize, bytes),
            Event::Resized(number, len) => self.files.entry(*number).or_default().resize(*len as usize, 0),
            Event::SyncedFile(..) | Event::SyncedFolder(..) | Event::Said(_) => {}
        }
    }

    fn write(&mut self, number: FileNumber, at: usize, bytes: &[u8]) {
        let file = self.files.entry(number).or_default();
        file.resize(file.len().max(at + bytes.len()), 0);
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// What can be reached from the root.
    fn reachable(&self) -> impl Iterator<Item = (&String, &Node)> {
        self.nodes.iter().filter(|(path, _)| {
            let mut above = split(path).0;
            while self.is_folder(above) {
                if above.is_empty() {
                    return true;
                }
                above = split(above).0;
            }
            false
        })
    }

    /// Equal for equal folders and files.
    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for (path, node) in self.reachable() {
            hasher.update(path.as_bytes()).update(&[0]);
            if let Node::File(number) = node {
                let bytes = self.files.get(number).map_or(&[][..], Vec::as_slice);
                hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
            }
        }
        hasher.finalize()
    }

    /// Makes it in `root`, an empty folder.
    ///
    /// # Errors
    /// I/O.
    pub fn make(&self, root: &Path) -> io::Result<()> {
        for (path, node) in self.reachable() {
            match node {
                Node::Folder => fs::create_dir(root.join(path))?,
                Node::File(number) => {
                    let new = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(root.join(path))?;
                    new.write_all_at(self.files.get(number).map_or(&[][..], Vec::as_slice), 0)?;
                }
            }
        }
        Ok(())
    }
}

/// What one sync saves.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Saved {
    File(FileNumber),
    Folder(String),
}

fn saved_by(event: &Event) -> Saved {
    match event {
        Event::MadeFolder(path) | Event::Named(path, _) | Event::Unnamed(path) | Event::Renamed(path, _) => {
            Saved::Folder(split(path).0.to_owned())
        }
        Event::SyncedFolder(path, _) => Saved::Folder(path.clone()),
        Event::Wrote(number, ..) | Event::Resized(number, _) | Event::SyncedFile(number, _) => Saved::File(*number),
        Event::Said(_) => Saved::Folder(String::new()),
    }
}

/// All folders and files at one point of a history: what is durable, and what may or may not be.
#[derive(Clone, Debug, Default)]
pub struct PowerCut {
    durable: Tree,
    open: Vec<Event>,
    /// What a failed sync has let go of: no sync saves it any more.
    lost: Vec<Event>,
}

impl PowerCut {
    /// Moves past one event.
    pub fn pass(&mut self, event: &Event) {
        let (Event::SyncedFile(_, ok) | Event::SyncedFolder(_, ok)) = event else {
            if !matches!(event, Event::Said(_)) {
                self.open.push(event.clone());
            }
            return;
        };
        let saved = saved_by(event);
        let (now, later): (Vec<_>, Vec<_>) = self.open.drain(..).partition(|e| saved_by(e) == saved);
        self.open = later;
        if *ok {
            now.iter().for_each(|event| self.durable.apply(event));
        } else {
            self.lost.extend(now);
        }
    }

    /// How many things may or may not survive.
    pub fn open(&self) -> usize {
        self.lost.len() + self.open.len()
    }

    /// What is left if those that `kept` has a bit for survive, in order; of writes that `torn` has a bit for only
    /// some sectors.
    pub fn cut(&self, kept: u64, torn: u64, dice: &mut Rng) -> Tree {
        let mut tree = self.durable.clone();
        for (index, event) in self.lost.iter().chain(&self.open).enumerate() {
            let bit = 1 << (index % 64);
            match event {
                Event::Wrote(number, at, bytes) if torn & bit != 0 => {
                    for (part, sector) in bytes.chunks(SECTOR).enumerate() {
                        if dice.once_in(2) {
                            tree.write(*number, *at as usize + part * SECTOR, sector);
                        }
                    }
                }
                _ if kept & bit != 0 => tree.apply(event),
                _ => {}
            }
        }
        tree
    }
}
