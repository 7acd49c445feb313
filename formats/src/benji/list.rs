//! The list of a version's blocks, read entry by entry.
//!
//! Invariants
//! - A block is zeros only where its entry says so with all it says: no name and no checksum. Half a name, a name
//!   without a checksum, a checksum without a name, an entry that does not speak of a name: damage.
//! - No index occurs twice, be it of zeros or not.
//! - No more entries are kept than the volume has blocks.
//!
//! Not here: whether indexes lie in the volume.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess},
};

use crate::objects::from_hexadecimal;

/// Most entries where the size of the volume is not known before them: no document has room for more.
const ENTRIES_MAX: u64 = 8 << 20;

/// What is kept of a list.
pub(super) trait Kept: Sized {
    /// Reads the list that is next in `map`, of at most `most` entries where that is known.
    ///
    /// # Errors
    /// A list that breaks the format.
    fn next<'de, A: MapAccess<'de>>(map: &mut A, most: Option<u64>) -> Result<Self, A::Error>;
}

/// A list of versions needs no blocks.
impl Kept for IgnoredAny {
    fn next<'de, A: MapAccess<'de>>(map: &mut A, _most: Option<u64>) -> Result<Self, A::Error> {
        map.next_value()
    }
}

/// Blocks that are stored, by index.
#[derive(Debug)]
pub(super) struct Blocks {
    pub(super) stored: Vec<Block>,
    /// Entries of the list, with those of zeros.
    pub(super) entries: u64,
}

impl Kept for Blocks {
    fn next<'de, A: MapAccess<'de>>(map: &mut A, most: Option<u64>) -> Result<Self, A::Error> {
        map.next_value_seed(Bounded(most.unwrap_or(ENTRIES_MAX)))
    }
}

/// A block that is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) index: u64,
    pub(super) uid: (u64, u64),
    pub(super) len: u32,
    pub(super) sum: Sum,
}

/// Which of the digests that Benji can be told to use is not kept: its length leaves two of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sum {
    /// 64 digits.
    Short([u8; 32]),
    /// 128 digits.
    Long([u8; 64]),
}

/// The two halves of a block's name, both said.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Uid {
    #[serde(deserialize_with = "Option::deserialize")]
    left: Option<u64>,
    #[serde(deserialize_with = "Option::deserialize")]
    right: Option<u64>,
}

/// One block of the list. What it does not say is no word for zeros: `uid` is there, be it null.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Listed {
    #[serde(alias = "id")]
    idx: u64,
    #[serde(deserialize_with = "Option::deserialize")]
    uid: Option<Uid>,
    size: u32,
    #[serde(default, deserialize_with = "sum")]
    checksum: Option<Sum>,
}

impl Listed {
    /// The block; `None` for one of zeros, which has neither a name nor a checksum.
    fn block(self) -> Result<Option<Block>, String> {
        let name = match self.uid {
            None | Some(Uid { left: None, right: None }) => None,
            Some(Uid { left: Some(left), right: Some(right) }) => Some((left, right)),
            Some(_) => return Err(format!("block {} has half a name", self.idx)),
        };
        match (name, self.checksum) {
            (None, None) => Ok(None),
            (Some(uid), Some(sum)) => Ok(Some(Block { index: self.idx, uid, len: self.size, sum })),
            (None, Some(_)) => Err(format!("block {} has a checksum and no name", self.idx)),
            (Some(_), None) => Err(format!("block {} has a name and no checksum", self.idx)),
        }
    }
}

fn sum<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Sum>, D::Error> {
    struct Digits;
    impl<'de> de::Visitor<'de> for Digits {
        type Value = Option<Sum>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("64 or 128 hexadecimal digits")
        }

        fn visit_none<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            from.deserialize_str(self)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            let found = match text.len() {
                64 => from_hexadecimal(text).map(Sum::Short),
                _ => from_hexadecimal(text).map(Sum::Long),
            };
            found.map(Some).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
        }
    }
    from.deserialize_option(Digits)
}

/// At most so many entries.
struct Bounded(u64);

impl<'de> DeserializeSeed<'de> for Bounded {
    type Value = Blocks;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Blocks, D::Error> {
        from.deserialize_seq(self)
    }
}

impl<'de> de::Visitor<'de> for Bounded {
    type Value = Blocks;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {} blocks", self.0)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Blocks, A::Error> {
        let (mut stored, mut zeros) = (Vec::new(), Vec::new());
        let mut entries = 0u64;
        while let Some(entry) = list.next_element::<Listed>()? {
            entries += 1;
            if entries > self.0 {
                return Err(de::Error::custom(format!("more than the {} blocks that the volume has", self.0)));
            }
            match entry.block().map_err(de::Error::custom)? {
                Some(block) => stored.push(block),
                None => zeros.push(entry.idx),
            }
        }
        stored.sort_unstable_by_key(|block: &Block| block.index);
        zeros.sort_unstable();
        let twice = |index: u64| Err(de::Error::custom(format!("block {index} is listed twice")));
        if let Some([first, _]) = stored.array_windows::<2>().find(|[a, b]| a.index == b.index) {
            return twice(first.index);
        }
        if let Some([first, _]) = zeros.array_windows::<2>().find(|[a, b]| a == b) {
            return twice(*first);
        }
        let is_stored = |index: &&u64| stored.binary_search_by_key(*index, |block| block.index).is_ok();
        match zeros.iter().find(is_stored) {
            Some(both) => twice(*both),
            None => Ok(Blocks { stored, entries }),
        }
    }
}
