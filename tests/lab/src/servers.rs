//! Real programs as servers, clients and services.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{host::Host, process::Running, topology::Lab};

/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);

/// A file name and its content, for [`Lab::nginx`].
pub type HttpFiles<'a> = [(&'a str, Vec<u8>)];

impl Lab {
    /// Starts `program` on `host`, waits until TCP `port` there listens. The log is `<name>.log` in [`Lab::dir`].
    pub fn serve(&self, host: &Host, name: &str, program: &str, args: &[&str], port: u16) -> Result<Running> {
        let mut command = host.command(program);
        command.args(args).current_dir(self.dir());
        let mut running = Running::start(name, command, self.dir())?;
        running.wait_ready(START, || tcp_listens(host, port))?;
        Ok(running)
    }

    /// nginx on `port`, both families, serving `files`. Keep-alive without limits, one worker, no access log.
    pub fn nginx(&self, host: &Host, port: u16, files: &HttpFiles<'_>) -> Result<Running> {
        let dir = tempfile::Builder::new().prefix("nginx-").tempdir_in(self.dir())?.keep();
        let root = dir.join("www");
        fs::create_dir(&root).context("folder for nginx")?;
        for (name, content) in files {
            fs::write(root.join(name), content).with_context(|| format!("write {name}"))?;
        }
        open_to_workers(self.dir(), &[&dir, &root])?;
        let config = dir.join("nginx.conf");
        fs::write(&config, nginx_config(&dir, &root, port)).context("write nginx.conf")?;
        let config = config.to_str().context("path of nginx.conf")?;
        // -e: the compiled-in error log is opened before the configuration is read
        self.serve(host, "nginx", "nginx", &["-e", "stderr", "-c", config], port)
    }

    /// `iperf3 -s` on `port`.
    pub fn iperf3(&self, host: &Host, port: u16) -> Result<Running> {
        self.serve(host, "iperf3", "iperf3", &["-s", "-p", &port.to_string()], port)
    }

    /// redis without persistence on `port`.
    pub fn redis(&self, host: &Host, port: u16) -> Result<Running> {
        let port_text = port.to_string();
        let args = ["--port", &port_text, "--save", "", "--appendonly", "no", "--protected-mode", "no"];
        self.serve(host, "redis", "redis-server", &args, port)
    }

    /// socat as a TCP echo server, one process per connection; `family` is 4 or 6.
    pub fn socat_tcp_echo(&self, host: &Host, family: u8, port: u16) -> Result<Running> {
        let listen = format!("TCP{family}-LISTEN:{port},fork,reuseaddr,backlog=1024");
        self.serve(host, "socat-tcp", "socat", &[&listen, "PIPE"], port)
    }

    /// socat as a UDP echo server; `family` is 4 or 6.
    pub fn socat_udp_echo(&self, host: &Host, family: u8, port: u16) -> Result<Running> {
        let mut command = host.command("socat");
        command.args([&format!("UDP{family}-RECVFROM:{port},fork"), "PIPE"]);
        let mut running = Running::start("socat-udp", command, self.dir())?;
        running.wait_ready(START, || udp_is_bound(host, port))?;
        Ok(running)
    }

    /// Runs iperf3 from the client against `to` and gives its JSON report. `args` as in iperf3(1): `-t 5 -P 8 -R`.
    pub fn iperf3_client(&self, to: impl Into<SocketAddr>, args: &str) -> Result<serde_json::Value> {
        let to = to.into();
        let mut command = self.client().command("iperf3");
        command.args(["-J", "-c", &to.ip().to_string(), "-p", &to.port().to_string()]).args(args.split_whitespace());
        let output = command.output().context("start iperf3")?;
        // On failure it exits non-zero and says why in the JSON.
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("iperf3: {}", String::from_utf8_lossy(&output.stderr)))?;
        ensure!(report["error"].is_null(), "iperf3 -c {to} {args}: {}", report["error"]);
        Ok(report)
    }
}

/// Whether anything listens on TCP `port` in `host`.
pub(crate) fn tcp_listens(host: &Host, port: u16) -> bool {
    has_socket(host, &["-Hltn"], port)
}

fn udp_is_bound(host: &Host, port: u16) -> bool {
    has_socket(host, &["-Huan"], port)
}

fn has_socket(host: &Host, flags: &[&str], port: u16) -> bool {
    let mut command = host.command("ss");
    command.args(flags).args(["sport", "=", &port.to_string()]);
    command.output().is_ok_and(|output| !output.stdout.is_empty())
}

/// nginx drops its workers to another user, who must be able to reach the files.
fn open_to_workers(lab: &Path, dirs: &[&Path]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for dir in dirs.iter().copied().chain([lab]) {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).context("permissions")?;
    }
    Ok(())
}

fn nginx_config(dir: &Path, root: &Path, port: u16) -> String {
    let (dir, root) = (dir.display(), root.display());
    format!(
        "daemon off;\n\
         worker_processes 1;\n\
         worker_rlimit_nofile 65536;\n\
         error_log stderr warn;\n\
         pid {dir}/nginx.pid;\n\
         events {{ worker_connections 32768; }}\n\
         http {{\n\
           access_log off;\n\
           sendfile on;\n\
           tcp_nopush on;\n\
           keepalive_requests 1000000000;\n\
           client_body_temp_path {dir}/body;\n\
           proxy_temp_path {dir}/proxy;\n\
           fastcgi_temp_path {dir}/fastcgi;\n\
           uwsgi_temp_path {dir}/uwsgi;\n\
           scgi_temp_path {dir}/scgi;\n\
           server {{\n\
             listen {port} backlog=4096 reuseport;\n\
             listen [::]:{port} backlog=4096 reuseport;\n\
             root {root};\n\
           }}\n\
         }}\n"
    )
}
