use std::{fs, os::unix::fs::symlink, path::Path};

use proxy_core::config::{self, CertificateFiles};
use rcgen::{CertificateParams, DnType, KeyPair};

use super::{resolver::Resolver, route::Looked, *};

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("shunt-tls-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a folder");
        Self(path)
    }

    /// A certificate of its own signature.
    fn pair(&self, stem: &str, names: &[&str]) -> CertificateFiles {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, stem);
        let key = KeyPair::generate().expect("a key");
        let cert = params.self_signed(&key).expect("signed");
        let files =
            CertificateFiles { cert: self.0.join(format!("{stem}.pem")), key: self.0.join(format!("{stem}.key")) };
        fs::write(&files.cert, cert.pem()).expect("written");
        fs::write(&files.key, key.serialize_pem()).expect("written");
        files
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

fn route(cert: &Path, key: &Path) -> Arc<config::Route> {
    let text = format!(
        "[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\nbackends = [\"127.0.0.1:80\"]\n\
         tls = {{ mode = \"terminate\", certificates = [{{ cert = \"{}\", key = \"{}\" }}] }}\n",
        cert.display(),
        key.display()
    );
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    config.routes[0].clone()
}

#[test]
fn the_exact_name_wins_over_the_wildcard_and_the_first_certificate_is_for_everyone_else() {
    let folder = Folder::new("names");
    let load = |stem, names: &[&str]| Certificate::load(&folder.pair(stem, names)).expect("a good pair");
    let first = load("first", &["first.example"]);
    let wild = load("wild", &["*.example.com"]);
    let exact = load("exact", &["API.example.com"]);
    let resolver = Resolver::new(&[first.clone(), wild.clone(), exact.clone()]);
    for (asked, expected) in [
        (Some("api.example.com"), &exact),
        (Some("www.example.com"), &wild),
        (Some("a.b.example.com"), &first),
        (Some("example.com"), &first),
        (None, &first),
    ] {
        let got = resolver.first(asked).expect("a certificate");
        assert!(Arc::ptr_eq(got, &expected.key), "{asked:?}");
    }
}

#[test]
fn what_is_wrong_with_a_pair_is_said_with_its_file() {
    let folder = Folder::new("wrong");
    let (a, b) = (folder.pair("a", &["a.example"]), folder.pair("b", &["b.example"]));
    let told = |cert: &Path, key: &Path| {
        let files = CertificateFiles { cert: cert.to_owned(), key: key.to_owned() };
        Certificate::load(&files).expect_err("not a pair").to_string().replace(&folder.0.display().to_string(), "")
    };
    assert_eq!(told(&a.cert, &b.key), "/b.key is not the key of the first certificate in /a.pem");
    assert_eq!(told(&a.key, &a.key), "/a.key: no certificate in it");
    assert_eq!(told(&a.cert, &a.cert), "/a.pem: no private key in it");
    assert_eq!(told(&folder.0.join("c"), &a.key), "/c: No such file or directory (os error 2)");
    let cut = folder.0.join("cut");
    fs::write(&cut, fs::read(&a.cert).expect("read").split_at(200).0).expect("written");
    assert!(told(&cut, &a.key).starts_with("/cut: not PEM"), "{}", told(&cut, &a.key));
}

#[test]
fn a_symlink_that_leads_elsewhere_is_a_change_and_a_bad_pair_keeps_the_old_one() {
    let folder = Folder::new("swap");
    let versions = ["one", "two", "bad"].map(|version| folder.0.join(version));
    for version in &versions {
        fs::create_dir_all(version).expect("a folder");
    }
    for (index, stem) in ["one", "two"].iter().enumerate() {
        let files = folder.pair(stem, &[&format!("{stem}.example")]);
        fs::rename(files.cert, versions[index].join("tls.crt")).expect("renamed");
        fs::rename(files.key, versions[index].join("tls.key")).expect("renamed");
    }
    fs::copy(versions[0].join("tls.crt"), versions[2].join("tls.crt")).expect("copied");
    fs::copy(versions[1].join("tls.key"), versions[2].join("tls.key")).expect("copied");
    // As Kubernetes does it: the files are links through `..data`, which is replaced by a rename.
    let lead_to = |version: &Path| {
        symlink(version, folder.0.join("..tmp")).expect("a link");
        fs::rename(folder.0.join("..tmp"), folder.0.join("..data")).expect("renamed");
    };
    lead_to(&versions[0]);
    let (cert, key) = (folder.0.join("tls.crt"), folder.0.join("tls.key"));
    symlink("..data/tls.crt", &cert).expect("a link");
    symlink("..data/tls.key", &key).expect("a link");
    let tls = RouteTls::load(&route(&cert, &key)).expect("good files").expect("it terminates");
    let name = || tls.certificates()[0].names[0].clone();
    assert!(matches!(tls.look(false), Looked::Same));
    lead_to(&versions[2]);
    assert!(matches!(tls.look(false), Looked::Changing));
    assert!(matches!(tls.look(false), Looked::Bad(TlsError::Mismatch { .. })));
    assert!(matches!(tls.look(false), Looked::Same), "said once");
    assert_eq!((name().as_str(), tls.problem().is_some()), ("one.example", true));
    lead_to(&versions[1]);
    assert!(matches!(tls.look(true), Looked::Renewed));
    assert_eq!((name().as_str(), tls.problem()), ("two.example", None));
}

#[test]
fn what_a_ca_issues_is_served_when_it_is_there_and_kept_when_it_is_broken() {
    let folder = Folder::new("issued");
    let text = format!(
        "[acme]\ndirectory = \"https://ca.example/\"\ncache = {:?}\n[[route]]\nname = \"web\"\nlisten = [\"127.0.0.1:443\"]\n\
         backends = [\"127.0.0.1:80\"]\nmatch.sni = [\"a.example\", \"b.example\"]\n\
         tls = {{ mode = \"terminate\", certificates = \"acme\" }}\n",
        folder.0
    );
    let config = config::parse(&text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"));
    let tls = RouteTls::load(&config.routes[0]).expect("nothing is wrong with it yet").expect("it terminates");
    assert!(tls.lacks(Some("a.example")) && tls.lacks(None) && tls.certificates().is_empty());
    let issued = |name: &str| {
        let pair = folder.pair("new", &[name]);
        let whole = [fs::read(&pair.key).expect("read"), fs::read(&pair.cert).expect("read")].concat();
        let file = config.acme.as_ref().expect("there").certificate(name);
        fs::create_dir_all(file.parent().expect("a folder")).expect("made");
        fs::write(&file, whole).expect("written");
        file
    };
    let file = issued("a.example");
    assert!(matches!(tls.look(true), Looked::Renewed));
    assert!(!tls.lacks(Some("a.example")) && tls.lacks(Some("b.example")) && !tls.lacks(None));
    fs::write(&file, "half").expect("written");
    issued("b.example");
    assert!(matches!(tls.look(true), Looked::Renewed), "the other one is good");
    assert!(!tls.lacks(Some("a.example")) && !tls.lacks(Some("b.example")));
    assert_eq!(tls.certificates().len(), 2);
    fs::remove_file(&file).expect("removed");
    assert!(matches!(tls.look(true), Looked::Renewed));
    assert!(!tls.lacks(Some("a.example")), "as long as the daemon lives");
}
