//! Codes for what the catalogue reports.

use super::{Code, Fail, table::from_io};
use crate::catalogue::Error;

impl From<Error> for Fail {
    fn from(error: Error) -> Self {
        let text = error.to_string();
        match error {
            Error::Io { path, action, source } => from_io(&path, action, None, &source),
            Error::Unreachable { url, what } => {
                Fail::new(Code::Net, "the catalogue does not answer").at(url).cause(what)
            }
            Error::Access { url, what } => Fail::new(Code::Access, "the catalogue refuses access").at(url).cause(what),
            Error::Foreign { url, what } => Fail::new(Code::Refused, format!("{url} is not a catalogue of aquifer"))
                .at(url)
                .cause(what)
                .help("aquifer config show    # says which catalogue is used, and why"),
            Error::TooNew { url, .. } => Fail::new(Code::Unsupported, text).at(url).help("aquifer --version"),
            Error::Damaged { url, what } => Fail::new(Code::Corrupt, "the catalogue is damaged").at(url).cause(what),
            Error::Full { url, what } => {
                Fail::new(Code::Capacity, "no space is left for the catalogue").at(url).cause(what)
            }
            Error::Database { url, action, what } => {
                Fail::new(Code::Failed, format!("the catalogue could not {action}")).at(url).cause(what)
            }
            Error::Fenced { .. } => Fail::new(Code::Fenced, text),
            Error::Busy { .. } => Fail::new(Code::Busy, text).help("aquifer sessions"),
            Error::Stale { .. } => Fail::new(Code::Busy, text).help_again(""),
            Error::NotFound { .. } => Fail::new(Code::NotFound, text),
            Error::State { .. } => Fail::new(Code::State, text),
        }
    }
}
