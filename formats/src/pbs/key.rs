//! The key of encrypted snapshots: a key file as the client of Proxmox Backup Server writes it.
//!
//! Invariants
//! - What a key file asks for is bounded: at most 256 MiB and a few seconds for a passphrase.
//! - The key is not shown by `Debug`, and no error tells more of it than that it does not fit.

use std::fmt;

use aes_gcm::{
    AesGcm, KeyInit,
    aead::{AeadInOut, consts::U16},
    aes::Aes256,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use pbkdf2::pbkdf2_hmac;
use serde::Deserialize;
use sha2::Sha256;

use super::index::Digest;
use crate::{Error, Result};

/// Longest key file, in bytes.
const FILE_BYTES_MAX: usize = 64 << 10;
/// Bytes of nonce and tag before sealed bytes. The nonce is longer than AES-GCM's usual one.
const SEAL_BYTES: usize = 32;
/// Most memory for a passphrase, in bytes.
const SCRYPT_BYTES_MAX: u64 = 256 << 20;
const ROUNDS_MAX: u32 = 10_000_000;

/// A key, ready to open chunks.
pub struct Key {
    cipher: AesGcm<Aes256, U16>,
    /// What digests of encrypted chunks are made with beside their content.
    id_key: [u8; 32],
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// A key file, as far as it is used.
#[derive(Deserialize)]
struct KeyFile {
    kdf: Option<Derivation>,
    data: String,
}

/// How a passphrase becomes the key that the key is sealed with.
#[derive(Deserialize)]
enum Derivation {
    Scrypt {
        n: u64,
        r: u64,
        p: u64,
        salt: String,
    },
    #[serde(rename = "PBKDF2")]
    Pbkdf2 {
        iter: u32,
        salt: String,
    },
}

impl Key {
    /// Reads the key file `text`, whose name is `label`; `passphrase` opens one that is sealed.
    ///
    /// # Errors
    /// [`Error::Key`] for a file that is none, a passphrase that is missing or wrong.
    pub fn read(label: &str, text: &[u8], passphrase: Option<&[u8]>) -> Result<Self> {
        let wrong = |what: &str| Error::Key { path: label.into(), what: what.into() };
        if text.len() > FILE_BYTES_MAX {
            return Err(wrong("this is no key file: it is too long"));
        }
        let file: KeyFile = serde_json::from_slice(text).map_err(|_| wrong("this is no key file"))?;
        let data = STANDARD.decode(&file.data).map_err(|_| wrong("its data is not base64"))?;
        let key: [u8; 32] = match file.kdf {
            None => data.try_into().map_err(|_| wrong("its key has not 32 bytes"))?,
            Some(derivation) => {
                let passphrase = passphrase.ok_or_else(|| wrong("it is sealed with a passphrase"))?;
                let outer = derivation.derive(passphrase).map_err(|what| wrong(&what))?;
                let mut opened = Vec::new();
                let cipher = AesGcm::new(&outer.into());
                if !open(&cipher, &data, &mut opened) {
                    return Err(wrong("the passphrase does not fit"));
                }
                opened.try_into().map_err(|_| wrong("its key has not 32 bytes"))?
            }
        };
        let mut id_key = [0; 32];
        pbkdf2_hmac::<Sha256>(&key, b"_id_key", 10, &mut id_key);
        Ok(Self { cipher: AesGcm::new(&key.into()), id_key })
    }

    /// Opens nonce, tag and sealed bytes into `out`; false where they were not sealed with this key.
    pub(super) fn open(&self, sealed: &[u8], out: &mut Vec<u8>) -> bool {
        open(&self.cipher, sealed, out)
    }

    /// What goes into a chunk's digest behind its content.
    pub(super) fn id_key(&self) -> &Digest {
        &self.id_key
    }
}

fn open(cipher: &AesGcm<Aes256, U16>, sealed: &[u8], out: &mut Vec<u8>) -> bool {
    out.clear();
    let Some((seal, body)) = sealed.split_at_checked(SEAL_BYTES) else { return false };
    let Some((nonce, tag)) = seal.split_first_chunk::<16>() else { return false };
    let Some(tag) = tag.first_chunk::<16>() else { return false };
    out.extend_from_slice(body);
    let opened = cipher.decrypt_inout_detached(nonce.into(), &[], out.as_mut_slice().into(), tag.into()).is_ok();
    if !opened {
        out.clear();
    }
    opened
}

impl Derivation {
    fn derive(&self, passphrase: &[u8]) -> Result<[u8; 32], String> {
        let mut key = [0; 32];
        let salted = |salt: &str| STANDARD.decode(salt).map_err(|_| "its salt is not base64".to_owned());
        match self {
            Self::Scrypt { n, r, p, salt } => {
                let needed = n.checked_mul(*r).and_then(|blocks| blocks.checked_mul(128));
                let bounded = needed.is_some_and(|bytes| bytes <= SCRYPT_BYTES_MAX) && (1..=16).contains(p);
                if !n.is_power_of_two() || *n < 2 || *r == 0 || !bounded {
                    return Err(format!("a passphrase by scrypt with n={n}, r={r}, p={p}"));
                }
                let log_n = u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX);
                let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
                let params = scrypt::Params::new(log_n, small(*r), small(*p)).map_err(|e| e.to_string())?;
                scrypt::scrypt(passphrase, &salted(salt)?, &params, &mut key).map_err(|e| e.to_string())?;
            }
            Self::Pbkdf2 { iter, salt } => {
                if !(1..=ROUNDS_MAX).contains(iter) {
                    return Err(format!("a passphrase by PBKDF2 with {iter} rounds"));
                }
                pbkdf2_hmac::<Sha256>(passphrase, &salted(salt)?, *iter, &mut key);
            }
        }
        Ok(key)
    }
}
