//! Where a catalogue lies: `sqlite:PATH` or `postgres://...`.
//!
//! Invariants
//! - A password is never shown: neither `Display` nor `Debug` has it.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

/// Where a catalogue lies.
#[derive(Clone, PartialEq, Eq)]
pub enum Url {
    /// A file of this machine, for one controller.
    Sqlite(PathBuf),
    /// A PostgreSQL server, for several controllers and workers. The text as libpq takes it.
    Postgres(String),
}

impl Url {
    /// The same with a password, which is kept apart from the site file.
    #[must_use]
    pub fn with_password(self, password: &[u8]) -> Self {
        match self {
            Self::Postgres(mut text) => {
                text.push(if text.contains('?') { '&' } else { '?' });
                text.push_str("password=");
                text.push_str(&escaped_bytes(password));
                Self::Postgres(text)
            }
            sqlite @ Self::Sqlite(_) => sqlite,
        }
    }

    /// The text the database driver takes.
    pub(super) fn driver_text(&self) -> String {
        match self {
            Self::Sqlite(path) => format!("sqlite:{}?mode=rwc", escaped(path)),
            Self::Postgres(text) => text.clone(),
        }
    }
}

/// Every byte that could mean something in a URL, as `%xx`.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    escaped_bytes(path.as_os_str().as_bytes())
}

fn escaped_bytes(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"/-_.".contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err("`sqlite:` needs a path, like sqlite:/var/lib/aquifer/catalogue.db".to_owned()),
                path => Ok(Self::Sqlite(path.into())),
            };
        }
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Self::Postgres(text.to_owned()));
        }
        Err(format!("`{}` is neither sqlite:PATH nor postgres://USER@HOST/DATABASE", without_password(text)))
    }
}

/// The text with `***` where a URL has its password: after the user, or among the parameters.
fn without_password(text: &str) -> String {
    let (head, parameters) = text.split_once('?').unwrap_or((text, ""));
    let mut shown = match (head.find("://"), head.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => {
            let user = head.get(scheme + 3..at).unwrap_or_default();
            match user.split_once(':') {
                Some((user, _)) => {
                    format!(
                        "{}{user}:***{}",
                        head.get(..scheme + 3).unwrap_or_default(),
                        head.get(at..).unwrap_or_default()
                    )
                }
                None => head.to_owned(),
            }
        }
        _ => head.to_owned(),
    };
    for (i, parameter) in parameters.split('&').filter(|p| !p.is_empty()).enumerate() {
        shown.push(if i == 0 { '?' } else { '&' });
        match parameter.split_once('=') {
            Some((key, _)) if key.contains("password") => shown.push_str(&format!("{key}=***")),
            _ => shown.push_str(parameter),
        }
    }
    shown
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(text) => f.write_str(&without_password(text)),
        }
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (text, shown) in [
            ("postgres://u:s3cret@db/aquifer", "postgres://u:***@db/aquifer"),
            ("postgres://u:p@ss@db/aquifer", "postgres://u:***@db/aquifer"),
            (
                "postgres://u@db/aquifer?password=s3cret&sslmode=require",
                "postgres://u@db/aquifer?password=***&sslmode=require",
            ),
            ("postgres:///aquifer?host=/run/pg", "postgres:///aquifer?host=/run/pg"),
        ] {
            let url: Url = text.parse().expect(text);
            assert_eq!(url.to_string(), shown);
            assert_eq!(format!("{url:?}"), shown);
        }
        let wrong = "mysql://u:s3cret@db/x".parse::<Url>().expect_err("another database");
        assert!(!wrong.contains("s3cret"), "{wrong}");
    }

    #[test]
    fn a_password_is_bytes() {
        let url: Url = "postgres://u@db/aquifer?sslmode=require".parse().expect("a url");
        let url = url.with_password(b"a&b=`c d%");
        assert_eq!(url.driver_text(), "postgres://u@db/aquifer?sslmode=require&password=a%26b%3D%60c%20d%25");
        assert_eq!(url.to_string(), "postgres://u@db/aquifer?sslmode=require&password=***");
    }

    #[test]
    fn a_path_is_a_path_whatever_is_in_it() {
        let url: Url = "sqlite:/a b/c?d#e%20.db".parse().expect("a path");
        assert_eq!(url, Url::Sqlite("/a b/c?d#e%20.db".into()));
        assert_eq!(url.driver_text(), "sqlite:/a%20b/c%3Fd%23e%2520.db?mode=rwc");
        assert!("sqlite:".parse::<Url>().is_err());
    }
}
