//! NBD exports as layers of a chain.

use std::sync::Arc;

use aquifer_formats::{Error, Layer};

/// The layer behind an NBD URI.
pub(super) fn layer(uri: &str) -> aquifer_formats::Result<Arc<dyn Layer>> {
    Err(Error::unsupported(uri, "NBD sources are not part of this build"))
}
