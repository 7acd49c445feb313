//! A machine's `summary.xml`: which point of it this is, and which one it stands on.

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use roxmltree::{Document, Node, ParsingOptions};

/// Most nodes of a document that is read.
const NODES_MAX: u32 = 200_000;

/// What a summary says, as far as it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Id of the machine's point, a UUID in small letters.
    pub id: String,
    /// Id of the point below; `None` for a full one.
    pub below: Option<String>,
    /// The machine's name.
    pub machine: String,
    /// When the backup was made.
    pub created: Option<Timestamp>,
    /// Whether the product that wrote it found damage in it.
    pub is_corrupted: bool,
    /// Whether the product that wrote it says that it is not complete.
    pub is_inconsistent: bool,
}

impl Summary {
    /// Reads the summary of the folder `folder`. `None` for what is no summary of a point.
    pub(super) fn parse(bytes: &[u8], folder: &str) -> Option<Self> {
        let text = std::str::from_utf8(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)).ok()?;
        let options = ParsingOptions { allow_dtd: false, nodes_limit: NODES_MAX, ..ParsingOptions::default() };
        let document = Document::parse_with_options(text.trim_end_matches('\0'), options).ok()?;
        let points: Vec<Node<'_, '_>> =
            document.root_element().children().filter(|node| node.has_tag_name("OIB")).collect();
        let inside =
            |node: &&Node<'_, '_>| node.attribute("InsideDir").is_some_and(|dir| dir.trim_start_matches('/') == folder);
        let point = match points.as_slice() {
            [only] => only,
            several => several.iter().find(inside)?,
        };
        let id = uuid_of(point.attribute("Id")?)?;
        let says = |name: &str, what: &str| point.attribute(name).is_some_and(|said| said.eq_ignore_ascii_case(what));
        let machine = point.attribute("VmName").or(point.attribute("DisplayName")).unwrap_or(folder);
        Some(Self {
            id: id.to_string(),
            below: point
                .attribute("LinkId")
                .and_then(uuid_of)
                .filter(|link| !link.is_nil())
                .map(|link| link.to_string()),
            machine: if machine.is_empty() { folder } else { machine }.to_owned(),
            created: point.attribute("CreationTimeUtc").and_then(time_of),
            is_corrupted: says("IsCorrupted", "true"),
            is_inconsistent: says("IsConsistent", "false"),
        })
    }
}

/// With braces or without.
fn uuid_of(text: &str) -> Option<uuid::Uuid> {
    uuid::Uuid::try_parse(text.trim_start_matches('{').trim_end_matches('}')).ok()
}

/// `02/27/2024 14:57:04`, in UTC.
fn time_of(text: &str) -> Option<Timestamp> {
    let time = DateTime::strptime("%m/%d/%Y %H:%M:%S", text).ok()?;
    time.to_zoned(TimeZone::UTC).ok().map(|zoned| zoned.timestamp())
}
