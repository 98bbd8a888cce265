//! `[acme]`, and routes whose certificates come from it.

use std::path::PathBuf;

use super::*;

const SECTION: &str = "[acme]\ndirectory = \"https://acme.example:14000/dir\"\n";

/// A route behind [`SECTION`], with these lines in it; the first of them is line 7.
fn terminated(lines: &str) -> String {
    format!("{SECTION}{}", route_with(lines))
}

const BY_ACME: &str = "tls = { mode = \"terminate\", certificates = \"acme\" }";

#[test]
fn a_route_has_a_certificate_for_each_of_its_names_and_each_ca_a_folder_of_its_own() {
    let config = good(&terminated(&format!("match.sni = [\"A.example\", \"b.example\"]\n{BY_ACME}")));
    let acme = config.acme.as_ref().unwrap();
    assert_eq!(acme.account(), PathBuf::from("/var/lib/shunt/acme/acme.example-14000-dir/account.json"));
    let Certificates::Acme(certificates) = &config.routes[0].tls.as_ref().unwrap().certificates else { panic!() };
    let told: Vec<_> = certificates.iter().map(|one| (one.name.as_str(), one.file.to_str().unwrap())).collect();
    let folder = "/var/lib/shunt/acme/acme.example-14000-dir";
    assert_eq!(
        told,
        [
            ("a.example", format!("{folder}/a.example.pem").as_str()),
            ("b.example", format!("{folder}/b.example.pem").as_str())
        ]
    );
    let elsewhere = good(&format!(
        "[acme]\ndirectory = \"https://ca/../..\"\ncache = \"cache\"\n{}",
        route_with(&format!("match.sni = [\"a\"]\n{BY_ACME}"))
    ));
    let folder = elsewhere.acme.as_ref().unwrap().folder();
    assert_eq!(folder, PathBuf::from("/etc/shunt/cache/ca-..-.."), "one folder, whatever the address");
}

#[test]
fn the_whole_section_is_read_and_its_secret_is_not_shown() {
    let config = good(
        "[acme]\ndirectory = \"https://ca.example/d\"\ncontact = [\"mailto:a@b.example\"]\ncache = \"acme\"\nca = \"ca.pem\"\n\
         eab = { key_id = \"kid-1\", hmac_key = \"c2VjcmV0\" }\n",
    );
    let acme = config.acme.as_deref().unwrap();
    let eab = Eab { key_id: "kid-1".to_owned(), hmac_key: HmacKey::Given(Secret(b"secret".to_vec())) };
    let expected = Acme {
        directory: "https://ca.example/d".to_owned(),
        contact: vec!["mailto:a@b.example".to_owned()],
        cache: "/etc/shunt/acme".into(),
        ca: Some("/etc/shunt/ca.pem".into()),
        eab: Some(eab),
    };
    assert_eq!(*acme, expected);
    assert!(!format!("{acme:?}").contains("115"), "{acme:?}");
}

#[test]
fn what_keeps_a_ca_from_proving_the_names_is_said_all_at_once() {
    let needs =
        "7: route \"web\": tls.certificates: \"acme\" needs match.sni: it gets a certificate for each name there";
    assert_eq!(bad(&terminated(BY_ACME)), [needs]);
    let text = route_with(&format!("match.sni = [\"*.a.example\", \"b.example\", \"*.c.example\"]\n{BY_ACME}"));
    let wildcard = |name| {
        format!(
            "6: route \"web\": tls.certificates: \"acme\" cannot get a certificate for \"{name}\": TLS-ALPN-01 proves whole \
             names only; write out the names in match.sni, or give certificates as files"
        )
    };
    let lacks = "6: route \"web\": tls.certificates: \"acme\" needs a section [acme] that says which CA, such as directory = \
                 \"https://acme-v02.api.letsencrypt.org/directory\"";
    assert_eq!(bad(&text), [wildcard("*.a.example"), wildcard("*.c.example"), lacks.to_owned()]);
    let passed = "match.sni = [\"a.example\"]\ntls = { mode = \"passthrough\", certificates = \"acme\" }";
    assert_eq!(
        bad(&terminated(passed)),
        ["8: route \"web\": tls.certificates: needs mode = \"terminate\"; with \"passthrough\" the backend does TLS"]
    );
    let other = "match.sni = [\"a.example\"]\ntls = { mode = \"terminate\", certificates = \"letsencrypt\" }";
    assert_eq!(
        bad(&terminated(other)),
        [
            "8: route \"web\": tls.certificates: \"letsencrypt\" is neither \"acme\" nor a list of files such as [{ cert = \"api.pem\", key = \"api.key\" }]"
        ]
    );
    // The section is there: that it is wrong is said once.
    let broken =
        format!("[acme]\ndirectory = \"http://ca\"\n{}", route_with(&format!("match.sni = [\"a\"]\n{BY_ACME}")));
    assert_eq!(bad(&broken).len(), 1);
}

#[test]
fn a_bad_section_says_what_is_allowed() {
    let directory = |value: &str, why: &str| {
        let text = format!("[acme]\ndirectory = \"{value}\"\n");
        let example = "\"https://acme-v02.api.letsencrypt.org/directory\"";
        let expected =
            format!("2: acme.directory: \"{value}\" is not the address of an ACME directory such as {example}: {why}");
        assert_eq!(bad(&text), [expected]);
    };
    directory("http://ca.example/dir", "it must begin with https://");
    directory("https://a b/", "it must not have spaces, #, @ or letters beyond ASCII");
    directory("https://ca.example:0/", "port 0 is not a port (1–65535)");
    for (line, expected) in [
        ("contact = [\"a@b.example\"]", "contact[0]: \"a@b.example\" lacks the scheme; write \"mailto:a@b.example\""),
        (
            "contact = [\"mailto:x\"]",
            "contact[0]: \"mailto:x\" is not one mail address such as \"mailto:admin@example.com\"",
        ),
        ("contact = [\"tel:1\"]", "contact[0]: \"tel:1\" is not one mail address such as \"mailto:admin@example.com\""),
        ("eab = {}", "eab.key_id: missing; the name that the CA gave the key is required"),
        ("eab = { key_id = \"a\" }", "eab.hmac_key: missing; key_id needs it, or hmac_key_file"),
        (
            "eab = { key_id = \"a\", hmac_key = \"AAAA\", hmac_key_file = \"f\" }",
            "eab.hmac_key_file: hmac_key is there too; one of them is enough",
        ),
        (
            "eab = { key_id = \"a\", hmac_key = \"not it!\" }",
            "eab.hmac_key: the key is not base64url: A–Z, a–z, 0–9, - and _ as the CA gave it",
        ),
        ("cahe = \"x\"", "cahe: unknown key; did you mean \"cache\"?"),
    ] {
        let first = bad(&format!("{SECTION}{line}\n")).swap_remove(0);
        assert_eq!(first, format!("3: acme.{expected}"));
    }
    assert_eq!(
        bad("[acme]\n"),
        [
            "1: acme.directory: missing; an address such as \"https://acme-v02.api.letsencrypt.org/directory\" is required"
        ]
    );
}
