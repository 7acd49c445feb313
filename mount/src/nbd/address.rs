//! Where an export lives: `unix:PATH`, `tcp:HOST:PORT` or an NBD URI; printed as a URI.
//!
//! URIs: `nbd://HOST[:PORT]/EXPORT`, `nbds://...`, `nbd+unix:///EXPORT?socket=PATH`, `nbds+unix://...`, with
//! percent escapes. Other parameters are refused: what is not understood is not ignored.

use std::{
    fmt,
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::PathBuf,
    str::FromStr,
};

use super::{Error, wire};

/// The registered port.
pub const PORT: u16 = 10809;

/// A place and an export there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Where the server is.
    pub place: Place,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// Whether TLS is required.
    pub tls: bool,
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A host (name or address, without brackets) and port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

impl Address {
    /// The same place, another export.
    #[must_use]
    pub fn with_export(&self, export: &str) -> Self {
        Self { export: export.into(), ..self.clone() }
    }

    /// Whether `text` has the shape of an address (rather than of a path or a machine), right or wrong.
    pub fn is_meant(text: &str) -> bool {
        ["unix:", "tcp:", "nbd:", "nbds:", "nbd+unix:", "nbds+unix:"].iter().any(|scheme| text.starts_with(scheme))
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map_err(|why| Error::Address { text: wire::shown(text), why })
    }
}

fn parse(text: &str) -> Result<Address, &'static str> {
    let (scheme, rest) = text.split_once(':').ok_or("no scheme")?;
    match scheme {
        "unix" => {
            let path = if rest.is_empty() { Err("no path") } else { Ok(PathBuf::from(rest)) }?;
            Ok(Address { place: Place::Unix(path), export: String::new(), tls: false })
        }
        "tcp" => {
            let (host, port) = host_port(rest)?;
            let place = Place::Tcp { host, port: port.ok_or("no port")? };
            Ok(Address { place, export: String::new(), tls: false })
        }
        "nbd" | "nbds" | "nbd+unix" | "nbds+unix" => uri(
            rest.strip_prefix("//").ok_or("no // after the scheme")?,
            scheme.ends_with("unix"),
            scheme.starts_with("nbds"),
        ),
        _ => Err("scheme not known (unix, tcp, nbd, nbds, nbd+unix, nbds+unix)"),
    }
}

fn uri(rest: &str, unix: bool, tls: bool) -> Result<Address, &'static str> {
    if rest.contains('#') {
        return Err("a fragment has no meaning");
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = String::from_utf8(unescape(path)?).map_err(|_| "export name is not UTF-8")?;
    if export.contains('\0') {
        return Err("export name with a zero byte");
    }
    let mut socket = None;
    for pair in query.into_iter().flat_map(|query| query.split('&')) {
        match pair.split_once('=') {
            Some(("socket", path)) if unix && socket.is_none() => socket = Some(unescape(path)?),
            // Whoever connects reads it from the text; it is no part of where the export lives.
            Some(("tls-certificates", _)) if tls => {}
            _ => return Err("parameter not known, or given twice"),
        }
    }
    let place = if unix {
        let path = socket.filter(|path| !path.is_empty()).ok_or("no ?socket=PATH")?;
        if !authority.is_empty() {
            return Err("a host and a socket");
        }
        Place::Unix(std::ffi::OsString::from_vec(path).into())
    } else {
        let (host, port) = host_port(authority)?;
        Place::Tcp { host, port: port.unwrap_or(PORT) }
    };
    Ok(Address { place, export, tls })
}

fn host_port(text: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("no ] after the address")?;
            let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or("no : before the port")?) };
            (host, port)
        }
        None => text.rsplit_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    if host.is_empty() || host.contains(['@', '%', '/']) || (host.contains(':') && !text.starts_with('[')) {
        return Err("no host, or not a host");
    }
    let port = port.map(|port| port.parse().map_err(|_| "port is not a number up to 65535")).transpose()?;
    Ok((host.into(), port))
}

fn unescape(text: &str) -> Result<Vec<u8>, &'static str> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16).and_then(|d| u8::try_from(d).ok());
        match (digit(), digit()) {
            (Some(high), Some(low)) => out.push(high << 4 | low),
            _ => return Err("bad percent escape"),
        }
    }
    Ok(out)
}

/// Escapes all but unreserved characters and `/`.
fn escape(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                write!(f, "{}", char::from(*byte))?;
            }
            _ => write!(f, "%{byte:02X}")?,
        }
    }
    Ok(())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "nbds" } else { "nbd" };
        match &self.place {
            Place::Unix(path) => {
                write!(f, "{scheme}+unix:///")?;
                escape(f, self.export.as_bytes())?;
                f.write_str("?socket=")?;
                escape(f, path.as_os_str().as_bytes())
            }
            Place::Tcp { host, port } => {
                let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
                write!(f, "{scheme}://{host}")?;
                if *port != PORT {
                    write!(f, ":{port}")?;
                }
                f.write_str("/")?;
                escape(f, self.export.as_bytes())
            }
        }
    }
}
