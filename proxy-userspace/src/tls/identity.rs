//! What is read in certificates beyond what rustls needs of them.

use rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

/// Whom a certificate is for, and until when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// In lower case, also wildcards.
    pub names: Vec<String>,
    /// Seconds since the Unix epoch.
    pub begins: i64,
    pub expires: i64,
}

/// `Err`: not a certificate.
pub(super) fn identity(certificate: &CertificateDer<'_>) -> Result<Identity, String> {
    let (_, parsed) = parse_x509_certificate(certificate).map_err(|error| error.to_string())?;
    let alternatives = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    let mut names: Vec<String> = alternatives
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
            _ => None,
        })
        .collect();
    if alternatives.is_none() {
        // As old certificates have it; clients do not take it for a name any more (RFC 9525 §2).
        names.extend(common_name(certificate).map(|name| name.to_ascii_lowercase()));
    }
    let validity = parsed.validity();
    Ok(Identity { names, begins: validity.not_before.timestamp(), expires: validity.not_after.timestamp() })
}

/// The common name of the subject.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, parsed) = parse_x509_certificate(certificate).ok()?;
    let name = parsed.subject().iter_common_name().next()?.as_str().ok()?;
    Some(name.to_owned())
}
