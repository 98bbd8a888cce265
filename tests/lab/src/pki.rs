//! An authority and what it has signed, as files.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{process::run, topology::Lab};

/// A folder of the lab with `ca.pem` and pairs of it.
#[derive(Debug)]
pub struct Pki(PathBuf);

impl Pki {
    pub fn new(lab: &Lab) -> Result<Self> {
        Self::named(lab, "pki")
    }

    /// In a folder of its own, an authority of its own.
    pub fn named(lab: &Lab, folder: &str) -> Result<Self> {
        let pki = Self(lab.dir().join(folder));
        fs::create_dir_all(&pki.0)?;
        // Some servers read as users of their own.
        for dir in [lab.dir(), &pki.0] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).context("permissions")?;
        }
        pki.sh("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=lab-ca \
                -out ca.pem -keyout ca.key")?;
        Ok(pki)
    }

    /// The pair `stem`.pem and `stem`.key for `name`. `kind`: `ec` or `rsa`.
    pub fn issue(&self, stem: &str, kind: &str, name: &str) -> Result<()> {
        let key = match kind {
            "ec" => "ec -pkeyopt ec_paramgen_curve:prime256v1",
            _ => "rsa:2048",
        };
        self.sh(&format!(
            "openssl req -newkey {key} -nodes -subj /CN={name} -addext subjectAltName=DNS:{name} -keyout {stem}.key -out {stem}.csr \
             && openssl x509 -req -in {stem}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -copy_extensions copy -days 1 -out {stem}.pem"
        ))?;
        Ok(())
    }

    /// A shell line in its folder.
    pub fn sh(&self, line: &str) -> Result<String> {
        run(Command::new("bash").args(["-c", line]).current_dir(&self.0))
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }

    /// `[route.tls]` with these pairs.
    pub fn terminate(&self, stems: &[&str], more: &str) -> String {
        let pair = |stem: &&str| {
            let (cert, key) = (self.file(&format!("{stem}.pem")), self.file(&format!("{stem}.key")));
            format!("{{ cert = \"{cert}\", key = \"{key}\" }}")
        };
        let pairs: Vec<String> = stems.iter().map(pair).collect();
        format!("[route.tls]\nmode = \"terminate\"\ncertificates = [{}]\n{more}\n", pairs.join(", "))
    }

    /// `[route.backend_tls]` that believes this authority.
    pub fn again(&self, server_name: &str) -> String {
        format!("[route.backend_tls]\nca = \"{}\"\nserver_name = \"{server_name}\"\n", self.file("ca.pem"))
    }
}
