//! Which catalogue applies, and opening it.

use std::{env, time::Duration};

use super::Context;
use crate::{
    catalogue::{Catalogue, LEASE, Url},
    fail::{Code, Fail, Result},
};

impl Context {
    /// Where the catalogue lies, with its password.
    ///
    /// # Errors
    /// [`Code::Config`]; what revealing the password fails with.
    fn catalogue_place(&self) -> Result<Url> {
        let url: Url = self.catalogue_url()?.parse().map_err(|what: String| {
            let fail = Fail::new(Code::Config, format!("`url` of the catalogue: {what}"));
            fail.help("aquifer config check")
        })?;
        match self.site()?.catalogue.as_ref().and_then(|entry| entry.password.as_ref()) {
            Some(secret) => Ok(url.with_password(&self.reveal(secret)?)),
            None => Ok(url),
        }
    }

    /// The catalogue, made where there is none.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn catalogue(&self) -> Result<Catalogue> {
        self.catalogue_with_lease(LEASE)
    }

    /// The same, with leases of another length.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn catalogue_with_lease(&self, lease: Duration) -> Result<Catalogue> {
        Ok(Catalogue::open_with_lease(&self.catalogue_place()?, lease)?)
    }

    /// The catalogue, if there is one: whoever only looks makes none.
    ///
    /// # Errors
    /// The catalogue's.
    pub fn catalogue_if_there(&self) -> Result<Option<Catalogue>> {
        match self.catalogue_place()? {
            Url::Sqlite(path) if !path.exists() => Ok(None),
            url => Ok(Some(Catalogue::open(&url)?)),
        }
    }

    /// Who asks, for records of what was done.
    pub fn user(&self) -> String {
        let named = ["SUDO_USER", "USER", "LOGNAME"].into_iter().find_map(|name| env::var(name).ok());
        let named = named.filter(|name| !name.is_empty() && name.len() <= 64);
        named.unwrap_or_else(|| format!("user {}", rustix::process::geteuid().as_raw()))
    }
}
