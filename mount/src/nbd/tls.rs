//! TLS 1.3 with certificates on both sides, from the folder layout QEMU and libnbd share.
//!
//! A folder holds `ca-cert.pem`, optionally `ca-crl.pem`, and `server-cert.pem` with `server-key.pem`, or
//! `client-cert.pem` with `client-key.pem`.
//!
//! Invariants
//! - One provider (ring), one version (1.3); a peer without a certificate of the named authority is refused.
//! - No session is resumed: every connection proves its identity anew.
//!
//! Not here: sockets; who may see which export.

use std::{path::Path, sync::Arc};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject};

use super::{Error, Result};

/// What a server shows and asks of clients.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
}

/// What a client shows and asks of servers.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    /// The name the server's certificate has to carry; `None` for the host of the address.
    pub server_name: Option<String>,
}

impl ServerTls {
    /// Reads a server's folder.
    ///
    /// # Errors
    /// [`Error::Tls`] naming the file.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let ca = dir.join("ca-cert.pem");
        let failed = |why: String| Error::Tls { place: ca.display().to_string(), why };
        let mut verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(&ca)?), Arc::clone(&provider));
        let crl = dir.join("ca-crl.pem");
        if crl.exists() {
            verifier = verifier.with_crls(pem::<CertificateRevocationListDer<'static>>(&crl)?);
        }
        let verifier = verifier.build().map_err(|e| failed(e.to_string()))?;
        let (chain, key) = identity(dir, "server")?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| failed(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| Error::Tls { place: dir.join("server-cert.pem").display().to_string(), why: e.to_string() })?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self { config: Arc::new(config) })
    }
}

impl ClientTls {
    /// Reads a client's folder.
    ///
    /// # Errors
    /// [`Error::Tls`] naming the file.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let ca = dir.join("ca-cert.pem");
        let (chain, key) = identity(dir, "client")?;
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| Error::Tls { place: ca.display().to_string(), why: e.to_string() })?
            .with_root_certificates(roots(&ca)?)
            .with_client_auth_cert(chain, key)
            .map_err(|e| Error::Tls { place: dir.join("client-cert.pem").display().to_string(), why: e.to_string() })?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self { config: Arc::new(config), server_name: None })
    }
}

fn roots(path: &Path) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for cert in pem::<CertificateDer<'static>>(path)? {
        roots.add(cert).map_err(|e| Error::Tls { place: path.display().to_string(), why: e.to_string() })?;
    }
    Ok(roots)
}

fn identity(dir: &Path, role: &str) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let key = dir.join(format!("{role}-key.pem"));
    let chain = pem(&dir.join(format!("{role}-cert.pem")))?;
    let key = PrivateKeyDer::from_pem_file(&key)
        .map_err(|e| Error::Tls { place: key.display().to_string(), why: e.to_string() })?;
    Ok((chain, key))
}

/// All items of one kind in a PEM file; none is an error.
fn pem<T: PemObject>(path: &Path) -> Result<Vec<T>> {
    let failed = |why: String| Error::Tls { place: path.display().to_string(), why };
    let items = T::pem_file_iter(path).map_err(|e| failed(e.to_string()))?;
    let items = items.collect::<Result<Vec<T>, _>>().map_err(|e| failed(e.to_string()))?;
    if items.is_empty() { Err(failed("nothing usable in this file".into())) } else { Ok(items) }
}
