//! A CA that issues by itself: Pebble, the ACME server that Let's Encrypt makes for tests, with the DNS server that comes
//! with it. It looks at names for real, on port 443 of the gateway.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{
    host::Host,
    process::{Running, run},
    servers::tcp_listens,
    topology::{GATEWAY, Lab},
};

const START: Duration = Duration::from_secs(10);
const PORT: u16 = 14000;
const MANAGEMENT: u16 = 15000;
/// Of nginx in front of it.
const FRONT: u16 = 14443;
const DNS: u16 = 8053;

/// How a CA issues.
#[derive(Debug, Clone, Default)]
pub struct AcmeOptions {
    /// Of certificates, in seconds; five years unless it is given.
    pub validity: Option<u64>,
    /// Accounts must be bound to one of these: names and keys in base64url.
    pub external: Vec<(String, String)>,
}

/// A CA at its address, which may be down now and then.
#[derive(Debug)]
pub struct AcmeCa {
    host: Host,
    dir: PathBuf,
    config: PathBuf,
    server: Option<Running>,
    _dns: Running,
}

impl Lab {
    /// A CA on `host` that finds every name at the gateway.
    pub fn acme_ca(&self, host: &Host, options: &AcmeOptions) -> Result<AcmeCa> {
        let dir = tempfile::Builder::new().prefix("acme-").tempdir_in(self.dir())?.keep();
        let sh = |line: &str| run(Command::new("bash").args(["-ec", line]).current_dir(&dir));
        let ec = "ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
        sh(&format!(
            "openssl req -x509 -newkey {ec} -days 1 -subj /CN=acme-https-ca -out https-ca.pem -keyout https-ca.key
             openssl req -newkey {ec} -subj /CN=acme -addext subjectAltName=IP:{ip} -keyout https.key -out https.csr
             openssl x509 -req -in https.csr -CA https-ca.pem -CAkey https-ca.key -CAcreateserial -copy_extensions copy \
             -days 1 -out https.pem",
            ip = host.ip
        ))?;
        let mut pebble = json!({
            "listenAddress": format!("{}:{PORT}", host.ip),
            "managementListenAddress": format!("127.0.0.1:{MANAGEMENT}"),
            "certificate": dir.join("https.pem"),
            "privateKey": dir.join("https.key"),
            "httpPort": 80,
            "tlsPort": 443,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": !options.external.is_empty(),
            "externalAccountMACKeys": options.external.iter().map(|(id, key)| (id.clone(), key.clone().into())).collect::<serde_json::Map<String, Value>>(),
        });
        if let Some(seconds) = options.validity {
            pebble["certificateValidityPeriod"] = seconds.into();
        }
        let config = dir.join("pebble.json");
        fs::write(&config, json!({ "pebble": pebble }).to_string()).context("write pebble.json")?;
        let (dns, at) = (format!("127.0.0.1:{DNS}"), GATEWAY.to_string());
        let mut command = host.command("pebble-challtestsrv");
        command.args(["-dns01", &dns, "-defaultIPv4", &at, "-defaultIPv6", "", "-management", "127.0.0.1:8055"]);
        command.args(["-http01", "", "-https01", "", "-tlsalpn01", ""]);
        let mut dns = Running::start("pebble-dns", command, self.dir())?;
        dns.wait_ready(START, || tcp_listens(host, DNS))?;
        let mut ca = AcmeCa { host: host.clone(), dir, config, server: None, _dns: dns };
        ca.start(self)?;
        Ok(ca)
    }
}

impl AcmeCa {
    /// Again after [`Self::stop`]; it then knows nothing of before, and signs with a new key.
    pub fn start(&mut self, lab: &Lab) -> Result<()> {
        let mut command = self.host.command("pebble");
        command.arg("-config").arg(&self.config).args(["-dnsserver", &format!("127.0.0.1:{DNS}")]);
        // It looks at once, at every name anew, and does not refuse good requests now and then.
        let quiet = [("PEBBLE_VA_NOSLEEP", "1"), ("PEBBLE_AUTHZREUSE", "0"), ("PEBBLE_WFE_NONCEREJECT", "0")];
        command.envs(quiet);
        let mut server = Running::start("pebble", command, lab.dir())?;
        server.wait_ready(START, || tcp_listens(&self.host, PORT))?;
        self.server = Some(server);
        Ok(())
    }

    pub fn stop(&mut self) {
        self.server = None;
    }

    /// What a daemon on the gateway needs to use it, with its cache in `cache`.
    pub fn section(&self, cache: &Path) -> String {
        let (https_ca, ip) = (self.dir.join("https-ca.pem"), self.host.ip);
        format!("[acme]\ndirectory = \"https://{ip}:{PORT}/dir\"\ncache = {cache:?}\nca = {https_ca:?}\n")
    }

    /// nginx in front of it that adds renewal information (RFC 9773) to what it offers: `first` to `last`, whichever
    /// certificate it is. With what a daemon needs to use that, with its cache in `cache`. It writes down what is ordered
    /// ([`Self::ordered`]).
    pub fn with_advice(&self, lab: &Lab, first: &str, last: &str, cache: &Path) -> Result<(Running, String)> {
        let (ip, dir) = (self.host.ip, self.dir.display());
        let info = format!("{{\"suggestedWindow\":{{\"start\":\"{first}\",\"end\":\"{last}\"}}}}");
        let offer = format!("\"renewalInfo\": \"https://{ip}:{FRONT}/advice\", \"keyChange\"");
        let config = format!(
            "http {{ access_log off; log_format body escape=none '$request_body'; server {{ listen {FRONT} ssl; ssl_certificate {dir}/https.pem; \
             ssl_certificate_key {dir}/https.key; \
             location / {{ proxy_pass https://{ip}:{PORT}; proxy_set_header Host $http_host; \
             sub_filter_types application/json; sub_filter '\"keyChange\"' '{offer}'; }} \
             location /order-plz {{ access_log {dir}/orders body; proxy_pass https://{ip}:{PORT}; \
             proxy_set_header Host $http_host; }} \
             location /advice/ {{ default_type application/json; add_header Retry-After 21600; return 200 '{info}'; }} }} }}"
        );
        let front = lab.nginx_with(&self.host, &config, FRONT)?;
        Ok((front, self.section(cache).replace(&PORT.to_string(), &FRONT.to_string())))
    }

    /// A file with the authority that its certificates lead to.
    pub fn root(&self) -> Result<PathBuf> {
        let file = self.dir.join("root.pem");
        let pem = self.host.sh(&format!("curl -sSfk https://127.0.0.1:{MANAGEMENT}/roots/0"))?;
        fs::write(&file, pem).context("write root.pem")?;
        Ok(file)
    }

    /// Orders it has been given in its present life.
    pub fn orders(&self) -> usize {
        self.log().lines().filter(|line| line.contains("POST /order-plz ")).count()
    }

    /// Through the front of [`Self::with_advice`]: what each order was for, in JSON (RFC 8555 §7.4).
    pub fn ordered(&self) -> Result<Vec<Value>> {
        let lines = fs::read_to_string(self.dir.join("orders")).context("what was ordered")?;
        let payload = |line: &str| {
            let signed: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let payload = signed["payload"].as_str().context("payload")?;
            Ok(serde_json::from_slice(&from_base64url(payload)?)?)
        };
        lines.lines().map(payload).collect()
    }

    /// Serial numbers of what it has issued in its present life, the oldest first.
    pub fn serials(&self) -> Vec<String> {
        let serial = |line: &str| Some(line.split("Issued certificate serial ").nth(1)?.split(' ').next()?.to_owned());
        self.log().lines().filter_map(serial).collect()
    }

    /// Requests of any kind it has been sent in its present life.
    pub fn requests(&self) -> usize {
        self.log().lines().filter(|line| line.contains("calling handler()")).count()
    }

    /// From now on `name` leads to `ip`.
    pub fn lead(&self, name: &str, ip: &str) -> Result<()> {
        let body: Value = json!({ "host": name, "addresses": [ip] });
        self.host.sh(&format!("curl -sSf -d '{body}' http://127.0.0.1:8055/add-a")).map(drop)
    }

    pub fn log(&self) -> String {
        self.server.as_ref().map(Running::log).unwrap_or_default()
    }
}

/// Without padding (RFC 4648 §5).
pub fn from_base64url(text: &str) -> Result<Vec<u8>> {
    let value = |byte: u8| {
        let at = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".iter().position(|b| *b == byte);
        at.with_context(|| format!("not base64url: {text}"))
    };
    let mut bytes = Vec::new();
    for group in text.as_bytes().chunks(4) {
        let sum = group.iter().try_fold(0, |sum, byte| Ok::<_, anyhow::Error>(sum << 6 | value(*byte)? as u32))?;
        let sum = sum << (6 * (4 - group.len()));
        bytes.extend_from_slice(&sum.to_be_bytes()[1..group.len()]);
    }
    Ok(bytes)
}
