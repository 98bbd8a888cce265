//! The daemon under test.

mod metrics;
mod told;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

pub use metrics::Metrics;

use crate::{host::Host, process::Running, topology::Lab, wait::wait_for};

const START: Duration = Duration::from_secs(20);

/// How a daemon shall be started. [`Shunt::builder`] begins one.
#[derive(Debug, Clone)]
pub struct ShuntBuilder {
    name: String,
    host: Option<Host>,
    admin_listen: String,
    env: Vec<(String, String)>,
    args: Vec<String>,
    wait_ready: bool,
    binary: Option<PathBuf>,
    descriptors: Option<usize>,
    processors: Option<String>,
}

impl ShuntBuilder {
    /// The program; default [`shunt_binary`].
    pub fn binary(mut self, path: &Path) -> Self {
        self.binary = Some(path.to_owned());
        self
    }

    /// Stem of its files in the lab's folder; default `shunt`. A second daemon in the same lab needs another.
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Where it runs; default the gateway.
    pub fn on(mut self, host: &Host) -> Self {
        self.host = Some(host.clone());
        self
    }

    /// `admin.listen`; default `127.0.0.1:9900`, `off` for none.
    pub fn admin_listen(mut self, listen: &str) -> Self {
        self.admin_listen = listen.to_owned();
        self
    }

    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// One more argument after `run --config FILE`.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// May not have more open files, nor raise the limit.
    pub fn descriptors(mut self, most: usize) -> Self {
        self.descriptors = Some(most);
        self
    }

    /// Runs on these processors only (`0`, `0,1`), with a worker for each.
    pub fn processors(mut self, list: &str) -> Self {
        self.processors = Some(list.to_owned());
        self
    }

    /// Does not wait for readiness: for daemons that shall fail.
    pub fn without_waiting(mut self) -> Self {
        self.wait_ready = false;
        self
    }

    /// Writes the configuration, starts the daemon, waits until it says it is ready.
    ///
    /// # Errors
    /// With the log, when the daemon ends early or is not ready within 20 s.
    pub fn start(self, lab: &Lab, config: &str) -> Result<Shunt> {
        let host = self.host.clone().unwrap_or_else(|| lab.gateway().clone());
        let (config_file, socket) =
            (lab.dir().join(format!("{}.toml", self.name)), lab.dir().join(format!("{}.sock", self.name)));
        let binary = self.binary.clone().map_or_else(shunt_binary, Ok)?;
        let dir = lab.dir().to_owned();
        let mut shunt = Shunt { options: self, host, dir, binary, config_file, socket, running: None };
        shunt.write_config(config)?;
        shunt.launch()?;
        Ok(shunt)
    }
}

/// A running (or killed, to be restarted) daemon with its configuration.
#[derive(Debug)]
pub struct Shunt {
    options: ShuntBuilder,
    host: Host,
    dir: PathBuf,
    binary: PathBuf,
    config_file: PathBuf,
    socket: PathBuf,
    running: Option<Running>,
}

/// The plainest route: `web`, from port 80 of the gateway to port 80 of backend 1; `rest` is what it has besides.
pub fn web(rest: &str) -> String {
    format!("[[route]]\nname = \"web\"\nlisten = [\"10.88.1.1:80\"]\nbackends = [\"10.88.2.2:80\"]\n{rest}\n")
}

impl Shunt {
    /// Starts the daemon on the gateway with `config` (without `[admin]`, which is added) and waits until it is ready.
    pub fn start(lab: &Lab, config: &str) -> Result<Self> {
        Self::builder().start(lab, config)
    }

    pub fn builder() -> ShuntBuilder {
        ShuntBuilder {
            name: "shunt".to_owned(),
            host: None,
            admin_listen: "127.0.0.1:9900".to_owned(),
            env: Vec::new(),
            args: Vec::new(),
            wait_ready: true,
            binary: None,
            descriptors: None,
            processors: None,
        }
    }

    /// Path of its configuration file.
    pub fn config_file(&self) -> &Path {
        &self.config_file
    }

    /// Path of its admin socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Where it runs.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The process, unless it was killed or has been stopped.
    pub fn process(&mut self) -> Result<&mut Running> {
        self.running.as_mut().context("the daemon is not running")
    }

    /// # Errors
    /// When it is not running.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.running.as_ref().context("the daemon is not running")?.pid())
    }

    /// What it logged in its present life.
    pub fn log(&self) -> String {
        self.running.as_ref().map(Running::log).unwrap_or_default()
    }

    /// A `shunt` command on the daemon's host that talks to this daemon: not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.host.command(&self.binary);
        command.args(args).arg("--socket").arg(&self.socket);
        command
    }

    /// Runs `shunt ARGS --socket …` on the daemon's host. A non-zero exit is an answer, not an error.
    pub fn cli(&self, args: &[&str]) -> Result<Output> {
        self.command(args).output().with_context(|| format!("start {}", self.binary.display()))
    }

    /// Runs `shunt ARGS --json --socket …` and parses what it prints.
    ///
    /// # Errors
    /// When it exits non-zero or prints no JSON.
    pub fn cli_json(&self, args: &[&str]) -> Result<Value> {
        let output = self.cli(&[args, &["--json"]].concat())?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        ensure!(output.status.success(), "shunt {}: {}: {stderr}", args.join(" "), output.status);
        serde_json::from_str(&stdout).with_context(|| format!("shunt {}: not JSON: {stdout}", args.join(" ")))
    }

    /// One route's object of `shunt routes --json`.
    pub fn route(&self, name: &str) -> Result<Value> {
        let routes = self.cli_json(&["routes"])?;
        let list = routes.as_array().context("`shunt routes --json` is not an array")?;
        list.iter().find(|route| route["name"] == name).cloned().with_context(|| format!("no route {name}: {routes}"))
    }

    /// `/metrics`, parsed.
    pub fn metrics(&self) -> Result<Metrics> {
        let page = self.host.curl(&format!("http://{}/metrics", self.options.admin_listen))?;
        Metrics::parse(&String::from_utf8_lossy(&page))
    }

    /// Replaces the configuration file without telling the daemon.
    pub fn write_config(&self, config: &str) -> Result<()> {
        let admin = if config.contains("[admin]") { String::new() } else { self.admin_section() };
        fs::write(&self.config_file, format!("{admin}{config}"))
            .with_context(|| format!("write {}", self.config_file.display()))
    }

    /// Replaces the configuration and runs `shunt reload`; its JSON answer.
    ///
    /// # Errors
    /// When the daemon refuses it.
    pub fn reload(&self, config: &str) -> Result<Value> {
        self.write_config(config)?;
        self.cli_json(&["reload"])
    }

    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        self.process()?.signal(signal)
    }

    /// `kill -9`, and waits until the process is gone. Its kernel state stays.
    pub fn kill9(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.kill();
        }
    }

    /// SIGTERM, and waits until it has ended.
    pub fn terminate(&mut self, within: Duration) -> Result<ExitStatus> {
        let mut running = self.running.take().context("the daemon is not running")?;
        running.terminate(within)
    }

    /// Starts it again after [`Self::kill9`] or [`Self::terminate`], with the configuration as it is.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "the daemon still runs");
        self.launch()
    }

    /// Polls one route until `probe` has an answer.
    pub fn wait_route<T>(
        &self,
        name: &str,
        what: &str,
        within: Duration,
        probe: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let mut last = Value::Null;
        let outcome = wait_for(&format!("route {name}: {what}"), within, || {
            last = self.route(name).ok()?;
            probe(&last)
        });
        outcome.with_context(|| format!("route {name} was last {last}"))
    }

    fn admin_section(&self) -> String {
        format!("[admin]\nlisten = {:?}\nsocket = {:?}\n\n", self.options.admin_listen, self.socket)
    }

    fn launch(&mut self) -> Result<()> {
        let mut command = match (self.options.descriptors, &self.options.processors) {
            (None, None) => self.host.command(&self.binary),
            (None, Some(list)) => {
                let mut command = self.host.command("taskset");
                command.args(["-c", list]).arg(&self.binary);
                command
            }
            (Some(most), _) => {
                let mut command = self.host.command("setpriv");
                command.args(["--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "prlimit"]);
                command.arg(format!("--nofile={most}")).arg(&self.binary);
                command
            }
        };
        command.arg("run").arg("--config").arg(&self.config_file).args(&self.options.args);
        command.envs(self.options.env.iter().map(|(key, value)| (key, value)));
        let mut running = Running::start(&self.options.name, command, &self.dir)?;
        if self.options.wait_ready {
            let pid = running.pid();
            running.wait_ready(START, || self.is_ready(pid))?;
        }
        self.running = Some(running);
        Ok(())
    }

    /// Whether the process `pid`, and not one that had the socket before it, says it is ready.
    fn is_ready(&self, pid: u32) -> bool {
        self.socket.exists()
            && self.cli_json(&["status"]).is_ok_and(|status| status["ready"] == true && status["pid"] == pid)
    }
}

/// The daemon's binary: `$SHUNT_BIN`, or `shunt` in the target folder this program was built into.
///
/// # Errors
/// When there is none; names the command that builds it.
pub fn shunt_binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("SHUNT_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "SHUNT_BIN={} is not a file", path.display());
        return path.canonicalize().context("SHUNT_BIN");
    }
    let program = env::current_exe().context("path of this program")?;
    // target/<profile>/xtask or target/<profile>/deps/<test>
    for dir in program.ancestors().skip(1).take(2) {
        let candidate = dir.join("shunt");
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "no shunt binary beside {}: build it with `cargo build -p proxy-userspace --bin shunt`, or set SHUNT_BIN",
        program.display()
    )
}
