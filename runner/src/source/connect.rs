//! NBD exports as layers of a chain.

use std::sync::Arc;

use aquifer_formats::{Error, Layer};
use aquifer_vdisk::Delta;

use crate::fail::Result;

/// The layer behind an NBD URI.
pub(crate) fn layer(uri: &str) -> aquifer_formats::Result<Arc<dyn Layer>> {
    Err(Error::unsupported(uri, "NBD sources are not part of this build"))
}

/// What the server's dirty bitmap of that name says, or why it says nothing.
pub(crate) fn dirty(uri: &str, _name: &str) -> Result<Result<Delta, String>> {
    Err(Error::unsupported(uri, "NBD sources are not part of this build").into())
}
