//! NBD exports as layers of a chain.
//!
//! A source with TLS names its certificates as other NBD tools do: `nbds://HOST/EXPORT?tls-certificates=DIR`.

use std::{path::Path, sync::Arc, time::Duration};

use aquifer_formats::{Error, Layer};
use aquifer_mount::nbd::{self, Address, Client, ClientOptions, ClientTls, NbdLayer};
use aquifer_vdisk::Delta;

use crate::{fail::Result, job::backup::fleece};

/// How long a server that cannot come back is waited for: a connection may break by itself.
const ENDED: Duration = Duration::from_secs(2);

const CERTIFICATES: &str = "tls-certificates=";

/// The layer behind an NBD URI.
pub(crate) fn layer(uri: &str) -> aquifer_formats::Result<Arc<dyn Layer>> {
    let client = client(uri, Vec::new()).map_err(|error| match error {
        nbd::Error::Io { place, action, source } => Error::io(place, action, 0, source),
        other => Error::Refused { path: uri.into(), what: other.to_string() },
    })?;
    Ok(Arc::new(NbdLayer::new(Arc::new(client))))
}

/// What the server's dirty bitmap of that name says, or why it says nothing.
pub(crate) fn dirty(uri: &str, name: &str) -> Result<Result<Delta, String>> {
    let context = if name.contains(':') { name.to_owned() } else { format!("qemu:dirty-bitmap:{name}") };
    let client = client(uri, vec![context.clone()])?;
    if !client.has_context(&context) {
        return Ok(Err(format!("the server does not offer `{context}`")));
    }
    Ok(Ok(client.dirty(&context)?))
}

fn client(uri: &str, contexts: Vec<String>) -> nbd::Result<Client> {
    let address: Address = uri.parse()?;
    let query = uri.split_once('?').map(|(_, query)| query).unwrap_or_default();
    let folder = query.split('&').find_map(|part| part.strip_prefix(CERTIFICATES));
    let tls = if address.tls {
        let missing = || nbd::Error::Tls { place: uri.into(), why: format!("no certificates: add ?{CERTIFICATES}DIR") };
        Some(ClientTls::from_dir(Path::new(folder.ok_or_else(missing)?))?)
    } else {
        None
    };
    let usual = ClientOptions::default();
    // The caught disks of a running machine end with it: nobody is going to serve them again.
    let reconnect = if fleece::is_served_at(uri) { ENDED } else { usual.reconnect };
    Client::connect(&address, &ClientOptions { contexts, tls, reconnect, ..usual })
}
