//! `[route.tls]` and `[route.backend_tls]`.

use super::{
    acme::{Acme, Known},
    address,
    reader::{Field, Section},
    source::quoted,
    types::{AcmeCertificate, BackendTls, CertificateFiles, Certificates, Tls, TlsMode, TlsVersion},
};

/// `names`: the route's `match.sni`.
pub(super) fn tls(section: &Section<'_>, acme: Known<&Acme>, names: &[String]) -> Option<Tls> {
    let mode = section.given("mode").and_then(|field| field.choice());
    let certificates = section.given("certificates").and_then(|field| match field.is_string() {
        // With "passthrough" there is one thing wrong with it, not two.
        true if mode == Some(TlsMode::Passthrough) => None,
        true => by_acme(&field, acme, names),
        false => field.list(certificate).map(Certificates::Files),
    });
    let min_version = section.value("min_version", Field::choice::<TlsVersion>);
    let alpn = section.value("alpn", |field| field.unique_list(|item| item.parse(address::alpn), Clone::clone));
    let client_ca = section.given("client_ca").and_then(|field| field.file());
    match mode {
        Some(TlsMode::Terminate) => needs_certificates(section),
        Some(TlsMode::Passthrough) => holds_only_mode(section),
        None => {}
    }
    Some(Tls {
        mode: mode?,
        certificates: certificates.unwrap_or(Certificates::Files(Vec::new())),
        min_version: min_version?,
        alpn: alpn?,
        client_ca,
    })
}

fn needs_certificates(section: &Section<'_>) {
    let example = "{ cert = \"api.pem\", key = \"api.key\" }";
    let needs = "mode = \"terminate\" needs at least one";
    match section.given("certificates") {
        None => section.reject_missing("certificates", &format!("{needs}, such as [{example}], or \"acme\"")),
        Some(field) if field.is_empty_list() => {
            field.reject(format!("[] is empty; {needs}, such as {example}"));
        }
        Some(_) => {}
    }
}

fn holds_only_mode(section: &Section<'_>) {
    for key in ["certificates", "min_version", "alpn", "client_ca"] {
        if section.given(key).is_some() {
            section.reject_key(key, "needs mode = \"terminate\"; with \"passthrough\" the backend does TLS".to_owned());
        }
    }
}

/// `certificates = "acme"`: everything that keeps a CA from proving the names.
fn by_acme(field: &Field<'_>, acme: Known<&Acme>, names: &[String]) -> Option<Certificates> {
    if !field.is_text("acme") {
        let text = field.text()?;
        let example = "[{ cert = \"api.pem\", key = \"api.key\" }]";
        field.reject(format!("{} is neither \"acme\" nor a list of files such as {example}", quoted(text)));
        return None;
    }
    if names.is_empty() {
        field.reject("\"acme\" needs match.sni: it gets a certificate for each name there".to_owned());
    }
    for name in names.iter().filter(|name| name.starts_with("*.")) {
        field.reject(format!(
            "\"acme\" cannot get a certificate for {name:?}: TLS-ALPN-01 proves whole names only; \
             write out the names in match.sni, or give certificates as files"
        ));
    }
    match acme {
        Known::Absent if field.source.is_broken() => None,
        Known::Absent => {
            field.reject("\"acme\" needs a section [acme] that says which CA, such as directory = \"https://acme-v02.api.letsencrypt.org/directory\"".to_owned());
            None
        }
        Known::Broken => None,
        Known::Good(acme) => {
            let certificate = |name: &String| AcmeCertificate { name: name.clone(), file: acme.certificate(name) };
            Some(Certificates::Acme(names.iter().map(certificate).collect()))
        }
    }
}

fn certificate(field: &Field<'_>) -> Option<CertificateFiles> {
    let section = field.section()?;
    let cert = section.given("cert").and_then(|field| field.file());
    let key = section.given("key").and_then(|field| field.file());
    Some(CertificateFiles { cert: cert?, key: key? })
}

pub(super) fn backend_tls(section: &Section<'_>) -> Option<BackendTls> {
    let file = |key| section.given(key).and_then(|field| field.file());
    let server_name = section.given("server_name").and_then(|field| field.parse(address::server_name));
    for (one, other) in [("cert", "key"), ("key", "cert")] {
        if section.given(one).is_some() && section.given(other).is_none() {
            section.reject_missing(other, &format!("{one} needs it"));
        }
    }
    Some(BackendTls { ca: file("ca"), server_name, cert: file("cert"), key: file("key") })
}
