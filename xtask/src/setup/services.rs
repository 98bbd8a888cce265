//! Packages come with services; we want the programs only.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use crate::ui;

/// What invoke-rc.d(8) and deb-systemd-invoke(1p) ask before they start a service; 101 means no.
const POLICY: &str = "/usr/sbin/policy-rc.d";
const ASIDE: &str = "/usr/sbin/policy-rc.d.before-shunt-setup";

/// What pg_createcluster(8) reads: while it says no, the package makes no database of its own.
const NO_DATABASE: &str = "/etc/postgresql-common/createcluster.d/shunt-setup.conf";

/// Packages of ours that bring a service.
const WITH_SERVICE: [&str; 4] = ["nginx", "haproxy", "redis-server", "postgresql"];

/// While it lives, installing a package starts no service and makes no database. A policy that was there before is put back.
#[derive(Debug)]
pub struct KeepQuiet;

impl KeepQuiet {
    pub fn begin() -> Result<Self> {
        if Path::new(POLICY).exists() && !Path::new(ASIDE).exists() {
            fs::rename(POLICY, ASIDE).with_context(|| format!("move {POLICY} aside"))?;
        }
        let guard = Self;
        fs::write(POLICY, "#!/bin/sh\nexit 101\n").with_context(|| format!("write {POLICY}"))?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)).with_context(|| format!("chmod {POLICY}"))?;
        let folder = Path::new(NO_DATABASE).parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        fs::write(NO_DATABASE, "create_main_cluster = false\n").with_context(|| format!("write {NO_DATABASE}"))?;
        Ok(guard)
    }

    /// Also keeps services of the packages just installed from starting at the next boot.
    pub fn end(self, installed: &[&str]) -> Result<()> {
        for service in WITH_SERVICE.iter().filter(|name| installed.contains(name)) {
            let status = Command::new("systemctl").args(["disable", service]).stderr(Stdio::null()).status();
            match status {
                Ok(status) if status.success() => {}
                Ok(status) => {
                    ui::note(&format!("systemctl disable {service}: {status}: it may start at the next boot"))
                }
                // Without systemd the policy above is all there is to it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error).with_context(|| format!("systemctl disable {service}")),
            }
        }
        Ok(())
    }
}

impl Drop for KeepQuiet {
    fn drop(&mut self) {
        // Whoever wants a database here later shall get one.
        let _ = fs::remove_file(NO_DATABASE);
        let restored = if Path::new(ASIDE).exists() { fs::rename(ASIDE, POLICY) } else { fs::remove_file(POLICY) };
        if let Err(error) = restored {
            ui::note(&format!("{POLICY} could not be put back ({error}): remove it, or services will not start"));
        }
    }
}
