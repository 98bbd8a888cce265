//! `[route.tls]` and `[route.backend_tls]`.

use super::{
    address,
    reader::{Field, Section},
    types::{BackendTls, CertificateFiles, Tls, TlsMode, TlsVersion},
};

pub(super) fn tls(section: &Section<'_>) -> Option<Tls> {
    let mode = section.given("mode").and_then(|field| field.choice());
    let certificates = section.given("certificates").and_then(|field| field.list(certificate));
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
        certificates: certificates.unwrap_or_default(),
        min_version: min_version?,
        alpn: alpn?,
        client_ca,
    })
}

fn needs_certificates(section: &Section<'_>) {
    let example = "{ cert = \"api.pem\", key = \"api.key\" }";
    match section.given("certificates") {
        None => section
            .reject_missing("certificates", &format!("mode = \"terminate\" needs at least one, such as [{example}]")),
        Some(field) if field.is_empty_list() => {
            field.reject(format!("[] is empty; mode = \"terminate\" needs at least one, such as {example}"));
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
