//! `[acme]`: the CA that certificates come from.

use std::{fmt, path::PathBuf};

use base64::{
    Engine as _,
    alphabet::URL_SAFE,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};

use super::{
    address,
    reader::{Field, Section},
    source::quoted,
};

/// `[acme]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acme {
    /// `https://`, a host, and what is behind it.
    pub directory: String,
    /// `mailto:` addresses.
    pub contact: Vec<String>,
    pub cache: PathBuf,
    /// `None`: the authorities of the system.
    pub ca: Option<PathBuf>,
    pub eab: Option<Eab>,
}

/// `acme.eab`: binds the ACME account to one that exists at the CA (RFC 8555 §7.3.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eab {
    pub key_id: String,
    pub hmac_key: HmacKey,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HmacKey {
    Given(Secret),
    /// Holds what [`hmac_key`] reads.
    File(PathBuf),
}

/// Bytes that nobody is to see: `Debug` does not show them.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Acme {
    /// The folder of this CA in the cache: what a CA for tests has issued is not taken for another's.
    pub fn folder(&self) -> PathBuf {
        let host_and_path = self.directory.strip_prefix("https://").unwrap_or(&self.directory);
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
        let name: String = host_and_path.trim_end_matches('/').chars().map(plain).collect();
        // `.` and `..` are no names.
        self.cache.join(name.trim_start_matches('.'))
    }

    /// Where the account is kept.
    pub fn account(&self) -> PathBuf {
        self.folder().join("account.json")
    }

    /// Where the certificate for `name` is kept, with its key.
    pub fn certificate(&self, name: &str) -> PathBuf {
        self.folder().join(format!("{name}.pem"))
    }
}

/// A section that other parts of the file need.
#[derive(Debug, Clone, Copy)]
pub(super) enum Known<T> {
    Absent,
    /// It has problems of its own, which have been reported.
    Broken,
    Good(T),
}

impl<T> Known<T> {
    pub fn as_known(&self) -> Known<&T> {
        match self {
            Self::Absent => Known::Absent,
            Self::Broken => Known::Broken,
            Self::Good(value) => Known::Good(value),
        }
    }

    pub fn into_option(self) -> Option<T> {
        match self {
            Self::Absent | Self::Broken => None,
            Self::Good(value) => Some(value),
        }
    }
}

pub(super) fn section(root: &Section<'_>) -> Known<Acme> {
    match root.given("acme") {
        None => Known::Absent,
        Some(field) => field.section().and_then(|section| acme(&section)).map_or(Known::Broken, Known::Good),
    }
}

fn acme(section: &Section<'_>) -> Option<Acme> {
    let directory = section.given("directory").and_then(|field| field.parse(directory));
    let contact = section.value("contact", |field| field.unique_list(|item| item.parse(contact), Clone::clone));
    let cache = section.value("cache", Field::file);
    let ca = section.given("ca").and_then(|field| field.file());
    let eab = match section.given("eab") {
        None => Some(None),
        Some(field) => field.section().and_then(|section| eab(&section)).map(Some),
    };
    Some(Acme { directory: directory?, contact: contact?, cache: cache?, ca, eab: eab? })
}

fn eab(section: &Section<'_>) -> Option<Eab> {
    let key_id = section.given("key_id").and_then(|field| {
        field.parse(|text| match text {
            "" => Err("\"\" is not a name of a key".to_owned()),
            _ => Ok(text.to_owned()),
        })
    });
    let given = section.given("hmac_key").map(|field| field.parse(hmac_key).map(HmacKey::Given));
    let file = section.given("hmac_key_file").map(|field| field.file().map(HmacKey::File));
    let hmac_key = match (given, file) {
        (Some(_), Some(_)) => {
            section.reject_key("hmac_key_file", "hmac_key is there too; one of them is enough".to_owned());
            None
        }
        (Some(key), None) | (None, Some(key)) => key,
        (None, None) => {
            section.reject_missing("hmac_key", "key_id needs it, or hmac_key_file");
            None
        }
    };
    Some(Eab { key_id: key_id?, hmac_key: hmac_key? })
}

/// RFC 8555 §6.1: only over HTTPS.
fn directory(text: &str) -> Result<String, String> {
    let not = |why: &str| {
        let example = "https://acme-v02.api.letsencrypt.org/directory";
        format!("{} is not the address of an ACME directory such as {example:?}: {why}", quoted(text))
    };
    let rest = text.strip_prefix("https://").ok_or_else(|| not("it must begin with https://"))?;
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) || text.contains(['#', '@', '\\']) {
        return Err(not("it must not have spaces, #, @ or letters beyond ASCII"));
    }
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    match address::target(authority) {
        Ok(_) => Ok(text.to_owned()),
        Err(why) => Err(not(&why)),
    }
}

/// CAs take mail addresses and nothing else.
fn contact(text: &str) -> Result<String, String> {
    let address = text.strip_prefix("mailto:").unwrap_or(text);
    let plain = !address.contains(|c: char| c.is_whitespace() || matches!(c, ',' | '?' | ':' | '/'));
    match address.split_once('@').filter(|(user, host)| plain && !user.is_empty() && host.contains('.')) {
        Some(_) if text.starts_with("mailto:") => Ok(text.to_owned()),
        Some(_) => Err(format!("{} lacks the scheme; write \"mailto:{address}\"", quoted(text))),
        None => Err(format!("{} is not one mail address such as \"mailto:admin@example.com\"", quoted(text))),
    }
}

/// Base64url as CAs hand it out, with or without `=`. The error does not show it.
pub fn hmac_key(text: &str) -> Result<Secret, String> {
    const CONFIG: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    match GeneralPurpose::new(&URL_SAFE, CONFIG).decode(text.trim()) {
        Ok(key) if !key.is_empty() => Ok(Secret(key)),
        Ok(_) => Err("the key is empty".to_owned()),
        Err(_) => Err("the key is not base64url: A–Z, a–z, 0–9, - and _ as the CA gave it".to_owned()),
    }
}
