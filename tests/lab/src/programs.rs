//! Real programs with configurations of their own: proxies, TLS, WebSocket, events, a database.

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{
    host::Host,
    process::{Running, run},
    servers::tcp_listens,
    topology::Lab,
};

/// A database writes its files first.
const START: Duration = Duration::from_secs(30);

/// A key and its self-signed certificate, PEM.
#[derive(Debug, Clone)]
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

impl Lab {
    /// nginx with `main` (the contexts `http`, `stream`, …) as its configuration, ready when `port` listens.
    pub fn nginx_with(&self, host: &Host, main: &str, port: u16) -> Result<Running> {
        let dir = tempfile::Builder::new().prefix("nginx-").tempdir_in(self.dir())?.keep();
        for dir in [self.dir(), &dir] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).context("permissions")?;
        }
        let path = dir.display();
        // A distribution that has the stream module built in has no such file.
        let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
        let load = if module.exists() { format!("load_module {};\n", module.display()) } else { String::new() };
        let config = format!(
            "{load}daemon off;\nworker_processes 1;\nerror_log stderr warn;\npid {path}/pid;\n\
             events {{ worker_connections 4096; }}\n{main}\n"
        );
        let file = dir.join("nginx.conf");
        fs::write(&file, config).context("write nginx.conf")?;
        let file = file.to_str().context("path of nginx.conf")?;
        self.serve(host, "nginx", "nginx", &["-e", "stderr", "-p", &path.to_string(), "-c", file], port)
    }

    /// HAProxy with `sections` (`frontend`, `listen`, …) after defaults with generous timeouts, ready when `port` listens.
    pub fn haproxy(&self, host: &Host, sections: &str, port: u16) -> Result<Running> {
        let mut file = tempfile::Builder::new().prefix("haproxy-").suffix(".cfg").tempfile_in(self.dir())?;
        let config = format!(
            "global\n  maxconn 4096\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1m\n  timeout server 1m\n{sections}\n"
        );
        file.write_all(config.as_bytes()).context("write haproxy.cfg")?;
        let path = file.into_temp_path().keep().context("keep haproxy.cfg")?;
        self.serve(host, "haproxy", "haproxy", &["-db", "-f", path.to_str().context("path of haproxy.cfg")?], port)
    }

    /// The distribution's Python running `script`, with its packages, ready when `port` listens.
    pub fn python(&self, host: &Host, name: &str, script: &str, port: u16) -> Result<Running> {
        let path = self.dir().join(format!("{name}-{port}.py"));
        fs::write(&path, script).context("write script")?;
        self.serve(host, name, "/usr/bin/python3", &["-u", path.to_str().context("path of script")?], port)
    }

    /// A database server with an empty database `postgres` whose user `postgres` needs no password.
    pub fn postgres(&self, host: &Host, port: u16) -> Result<Running> {
        let programs = postgres_programs()?;
        let dir = tempfile::Builder::new().prefix("postgres-").tempdir_in(self.dir())?.keep();
        fs::set_permissions(self.dir(), fs::Permissions::from_mode(0o755)).context("permissions")?;
        // It refuses to run as root.
        let (user, group) = postgres_user()?;
        chown(&dir, Some(user), Some(group)).context("chown of the data folder")?;
        let as_user = |program: &str| {
            let mut command = host.command("setpriv");
            command.args([&format!("--reuid={user}"), &format!("--regid={group}"), "--clear-groups"]);
            command.arg(programs.join(program)).current_dir(&dir);
            command
        };
        let data = dir.join("data");
        let mut initdb = as_user("initdb");
        initdb.args(["-A", "trust", "-U", "postgres", "--no-sync", "--locale=C", "-D"]).arg(&data);
        run(&mut initdb)?;
        // Clients of the lab come from other hosts.
        let mut access = fs::OpenOptions::new().append(true).open(data.join("pg_hba.conf")).context("pg_hba.conf")?;
        writeln!(access, "host all all all trust").context("pg_hba.conf")?;
        let mut server = as_user("postgres");
        server.args(["-p", &port.to_string(), "-c", "listen_addresses=*", "-c", "fsync=off", "-k"]).arg(&dir);
        server.args(["-c", "logging_collector=off", "-D"]).arg(&data);
        let mut running = Running::start("postgres", server, self.dir())?;
        // It listens before it answers.
        let answers = || {
            let mut ask = host.command("psql");
            ask.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres", "-c", "select 1"]);
            tcp_listens(host, port) && run(&mut ask).is_ok()
        };
        running.wait_ready(START, answers)?;
        Ok(running)
    }

    /// A certificate for `names`, valid for a day.
    pub fn certificate(&self, names: &[&str]) -> Result<Certificate> {
        let dir = tempfile::Builder::new().prefix("tls-").tempdir_in(self.dir())?.keep();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).context("permissions")?;
        let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
        let alternatives: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
        let mut openssl = Command::new("openssl");
        openssl.args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "1",
        ]);
        openssl.args(["-subj", &format!("/CN={}", names.first().context("a name")?)]);
        openssl.args(["-addext", &format!("subjectAltName={}", alternatives.join(","))]);
        openssl.arg("-out").arg(&cert).arg("-keyout").arg(&key);
        run(&mut openssl)?;
        Ok(Certificate { cert, key })
    }
}

/// Where the newest version's programs are: Debian keeps them out of PATH.
fn postgres_programs() -> Result<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").context("/usr/lib/postgresql (package postgresql)")?;
    let newest = versions.flatten().map(|e| e.path().join("bin")).filter(|p| p.join("initdb").exists()).max();
    newest.context("no initdb below /usr/lib/postgresql (package postgresql)")
}

fn postgres_user() -> Result<(u32, u32)> {
    let user = nix::unistd::User::from_name("postgres")?.context("no user postgres (package postgresql)")?;
    ensure!(!user.uid.is_root(), "the user postgres is root");
    Ok((user.uid.as_raw(), user.gid.as_raw()))
}
