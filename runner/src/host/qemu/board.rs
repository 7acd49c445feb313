//! The board of a machine, by the names QEMU has for it.
//!
//! Invariants
//! - A board that is not known here is replaced by the newest of its kind, and that is said.

use std::process::{Command, Stdio};

use super::PROGRAM;
use crate::host::shape::Board;

/// What QEMU is asked for, and what to tell if it is not what was described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) name: String,
    pub(super) note: Option<String>,
}

/// The board for what a description says.
pub(super) fn named(machine_type: Option<&str>) -> Named {
    let plain = Board::of(machine_type).name();
    match machine_type {
        None => Named { name: plain.to_owned(), note: None },
        Some(said)
            if said == plain || known().lines().any(|line| line.split_ascii_whitespace().next() == Some(said)) =>
        {
            match said {
                // Boards of another kind take none of the disks and cards a machine is given here.
                _ if !said.starts_with("pc") && said != plain => replaced(said, plain),
                _ => Named { name: said.to_owned(), note: None },
            }
        }
        Some(said) => replaced(said, plain),
    }
}

fn replaced(said: &str, plain: &str) -> Named {
    let note = format!("it was a machine of type {said}, which this QEMU does not start; it becomes {plain}");
    Named { name: plain.to_owned(), note: Some(note) }
}

/// The boards this QEMU knows, one in a line.
fn known() -> String {
    let out = Command::new(PROGRAM).args(["-machine", "help"]).stdin(Stdio::null()).output();
    out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_board_is_kept_and_another_is_replaced_by_its_kind() {
        let plain = |said: Option<&str>| named(said);
        assert_eq!(plain(None), Named { name: "q35".into(), note: None });
        assert_eq!(plain(Some("pc")), Named { name: "pc".into(), note: None });
        for known in ["q35", "pc-q35-7.2", "pc-i440fx-7.2"] {
            assert_eq!(plain(Some(known)), Named { name: known.into(), note: None });
        }
        for (said, gets) in
            [("pc-q35-rhel9.2.0", "q35"), ("pc-i440fx-focal", "pc"), ("virt", "q35"), ("microvm", "q35")]
        {
            let named = plain(Some(said));
            assert_eq!(named.name, gets, "{said}");
            assert!(named.note.is_some_and(|note| note.contains(said) && note.contains(gets)), "{said}");
        }
    }
}
