//! Every key of the file: its kind, range, default and meaning. The parser and the JSON Schema both read this table,
//! so neither can know a key that the other does not.

use std::{sync::OnceLock, time::Duration};

use toml::{Spanned, de::DeValue};

use super::choice::Choice;

/// A TOML table and the keys it may hold.
#[derive(Debug)]
pub(super) struct Table {
    pub doc: &'static str,
    pub keys: &'static [Key],
    defaults: OnceLock<Vec<Option<Spanned<DeValue<'static>>>>>,
}

/// One key of a [`Table`].
#[derive(Debug)]
pub(super) struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub required: bool,
    /// As it would be written in the file.
    pub default: Option<&'static str>,
    /// A valid value other than the default, as it would be written in the file.
    pub example: &'static str,
    pub doc: &'static str,
}

/// What a value may be.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Bool,
    Integer {
        min: u64,
        max: u64,
    },
    Duration {
        min: Duration,
        max: Duration,
        never: bool,
    },
    Choice(&'static [&'static str]),
    Rate,
    AdminListen,
    LogFilter,
    MarkMask,
    RouteName,
    Listen,
    /// A [`Kind::Target`], or a table of it and a weight.
    Backend,
    Target,
    /// An address on its own or with a prefix length.
    Network,
    /// A host name, or `*.` and a host name.
    Sni,
    Alpn,
    /// A host name or an IP address.
    ServerName,
    File,
    /// The address of an ACME directory.
    Directory,
    Contact,
    KeyId,
    /// Base64url; never shown.
    Secret,
    /// `"acme"`, or a list of [`CERTIFICATE`].
    Certificates,
    /// Nothing may be in it twice.
    List(&'static Kind),
    Table(&'static Table),
    /// `[[name]]`, or an array of inline tables.
    Tables(&'static Table),
}

impl Table {
    /// The default of the key at `index` of `keys`.
    pub fn default(&self, index: usize) -> Option<&Spanned<DeValue<'static>>> {
        let defaults = self.defaults.get_or_init(|| {
            self.keys.iter().map(|key| key.default.and_then(|text| DeValue::parse(text).ok())).collect()
        });
        defaults.get(index)?.as_ref()
    }

    pub fn position(&self, name: &str) -> Option<usize> {
        self.keys.iter().position(|key| key.name == name)
    }
}

impl Kind {
    /// The table this kind is, or is a list of.
    pub fn table(self) -> Option<&'static Table> {
        match self {
            Self::Table(table) | Self::Tables(table) => Some(table),
            Self::Backend => Some(&BACKEND),
            Self::Certificates => Some(&CERTIFICATE),
            Self::List(kind) => kind.table(),
            _ => None,
        }
    }
}

const fn key(name: &'static str, kind: Kind, example: &'static str, doc: &'static str) -> Key {
    Key { name, kind, required: false, default: None, example, doc }
}

impl Key {
    const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    const fn default(mut self, toml: &'static str) -> Self {
        self.default = Some(toml);
        self
    }
}

const fn choice<T: Choice>() -> Kind {
    Kind::Choice(T::NAMES)
}

const MILLISECOND: Duration = Duration::from_millis(1);
const DAY: Duration = Duration::from_secs(86_400);
/// The longest any timeout may be.
const YEAR: Duration = Duration::from_secs(365 * 86_400);
const TIMEOUT: Kind = Kind::Duration { min: MILLISECOND, max: YEAR, never: false };
const TIMEOUT_OR_NEVER: Kind = Kind::Duration { min: MILLISECOND, max: YEAR, never: true };
const COUNT: Kind = Kind::Integer { min: 0, max: u32::MAX as u64 };

macro_rules! tables {
    ($($(#[$meta:meta])* $name:ident: $doc:literal { $($key:expr),+ $(,)? })+) => {$(
        $(#[$meta])*
        pub(super) static $name: Table = Table { doc: $doc, keys: &[$($key),+], defaults: OnceLock::new() };
    )+};
}

tables! {
    ROOT: "The configuration of shunt, a kernel-offload proxy." {
        key("admin", Kind::Table(&ADMIN), "{ socket = \"/run/other.sock\" }",
            "Where the daemon can be asked and steered."),
        key("log", Kind::Table(&LOG), "{ level = \"debug\" }",
            "What is logged, and how."),
        key("kernel", Kind::Table(&KERNEL), "{ lock_table = false }",
            "How shunt shares the kernel with other software on the machine."),
        key("acme", Kind::Table(&ACME), "{ directory = \"https://acme-v02.api.letsencrypt.org/directory\" }",
            "The CA that certificates come from where a route has certificates = \"acme\". Naming it here is to agree \
             to its terms of service."),
        key("defaults", Kind::Table(&DEFAULTS), "{ balance = \"maglev\" }",
            "Settings for every route; a route overrides them key by key."),
        key("route", Kind::Tables(&ROUTE), "[{ name = \"db\", listen = [\"0.0.0.0:5432\"], backends = [\"10.0.0.2:5432\"] }]",
            "One service: where it listens and who serves it."),
    }

    ADMIN: "Where the daemon can be asked and steered." {
        key("listen", Kind::AdminListen, "\"[::1]:9901\"",
            "Address and port of the dashboard, /metrics, /healthz, /readyz and the JSON API; \"off\" for none of \
             them.").default("\"127.0.0.1:9900\""),
        key("socket", Kind::File, "\"/run/other.sock\"",
            "The Unix socket that the command line talks to. Mode 0660; at most 107 \
             bytes.").default("\"/run/shunt/admin.sock\""),
    }

    LOG: "What is logged, and how." {
        key("level", Kind::LogFilter, "\"info,shunt::health=debug\"",
            "trace, debug, info, warn, error or off; or several, separated by commas, each for one module: \
             module=level.").default("\"info\""),
        key("format", choice::<super::LogFormat>(), "\"json\"",
            "Text for people or JSON for machines.").default("\"text\""),
        key("access", choice::<super::AccessLog>(), "\"errors\"",
            "Which ended connections get a line: all, those that did not end normally, or none.").default("\"all\""),
    }

    KERNEL: "How shunt shares the kernel with other software on the machine." {
        key("mark_mask", Kind::MarkMask, "\"0xffff0000\"",
            "The bits of the conntrack mark that shunt may use: one contiguous run of 8 to 32 bits. Leave the \
             bits that other software uses out of it.").default("\"0xffffff00\""),
        key("lock_table", Kind::Bool, "false",
            "Ask the kernel to refuse changes by others to shunt's own nftables table (Linux 6.9 and \
             later).").default("true"),
    }

    ACME: "The CA that certificates come from where a route has certificates = \"acme\"." {
        key("directory", Kind::Directory, "\"https://acme-v02.api.letsencrypt.org/directory\"",
            "The address of the CA's ACME directory (RFC 8555).").required(),
        key("contact", Kind::List(&Kind::Contact), "[\"mailto:admin@example.com\"]",
            "Whom the CA may write to.").default("[]"),
        key("cache", Kind::File, "\"acme\"",
            "The folder that keeps the account and the certificates, with their keys: mode 0700. Each directory has a \
             folder of its own in it.").default("\"/var/lib/shunt/acme\""),
        key("ca", Kind::File, "\"internal-ca.pem\"",
            "PEM file of the authorities that sign the ACME server's own certificate. Absent: those of the system."),
        key("eab", Kind::Table(&EAB), "{ key_id = \"kid-1\", hmac_key = \"c2VjcmV0\" }",
            "What binds the account to one that exists at the CA (external account binding), where the CA asks for it."),
    }

    EAB: "What binds the ACME account to one that exists at the CA." {
        key("key_id", Kind::KeyId, "\"kid-1\"",
            "The name of the key, from the CA.").required(),
        key("hmac_key", Kind::Secret, "\"c2VjcmV0\"",
            "The key, from the CA, in base64url. Or hmac_key_file."),
        key("hmac_key_file", Kind::File, "\"eab.key\"",
            "A file with the key in base64url, so that it need not stand here."),
    }

    DEFAULTS: "Settings for every route; a route overrides them key by key." {
        key("balance", choice::<super::Balance>(), "\"maglev\"",
            "See route.balance."),
        key("engine", choice::<super::EngineChoice>(), "\"nft\"",
            "See route.engine."),
        key("keepalive", choice::<super::Keepalive>(), "\"extended\"",
            "See route.keepalive."),
        key("limits", Kind::Table(&LIMITS), "{ connections = 1000 }",
            "See route.limits."),
        key("timeouts", Kind::Table(&TIMEOUTS), "{ connect = \"5s\" }",
            "See route.timeouts."),
    }

    ROUTE: "One service: where it listens and who serves it." {
        key("name", Kind::RouteName, "\"web\"",
            "Unique; 1 to 63 of a–z, 0–9 and -. The route label of every metric.").required(),
        key("listen", Kind::List(&Kind::Listen), "[\"0.0.0.0:443\", \"[::]:443\", \"10.0.0.1:30000-30999\"]",
            "Addresses of this machine, each with a port or a port range. 0.0.0.0 is every IPv4 address, [::] \
             every IPv6 address and no IPv4 one.").required(),
        key("protocol", choice::<super::Protocol>(), "\"udp\"",
            "The transport protocol.").default("\"tcp\""),
        key("match", Kind::Table(&MATCH), "{ client = [\"10.0.0.0/8\"] }",
            "What tells this route apart from others on the same port. The most specific match wins, then the \
             order of the file; a route without match is the default of its port."),
        key("backends", Kind::List(&Kind::Backend), "[\"10.0.0.2:8080\", { address = \"10.0.0.3:8080\", weight = 2 }]",
            "Who serves the route. An address or name without a port keeps the port that the client \
             dialled.").required(),
        key("balance", choice::<super::Balance>(), "\"maglev\"",
            "How new connections are shared among the backends.").default("\"round-robin\""),
        key("engine", choice::<super::EngineChoice>(), "\"nft\"",
            "Who moves the bytes. auto takes the cheapest that can serve the route on this \
             kernel.").default("\"auto\""),
        key("source_address", choice::<super::SourceAddress>(), "\"client\"",
            "Whose address the backend sees. client needs the backends' return path to run through this \
             machine.").default("\"gateway\""),
        key("allow", Kind::List(&Kind::Network), "[\"10.0.0.0/8\"]",
            "Clients that may connect; empty is everyone.").default("[]"),
        key("deny", Kind::List(&Kind::Network), "[\"10.9.0.0/16\"]",
            "Clients that may not connect, even where allow has them.").default("[]"),
        key("keepalive", choice::<super::Keepalive>(), "\"extended\"",
            "What the idle limit is multiplied by: standard 1, extended 6, immortal: no idle \
             limit.").default("\"standard\""),
        key("limits", Kind::Table(&LIMITS), "{ connections = 1000 }",
            "How much of the route may be used at once. 0 or absent is unlimited."),
        key("timeouts", Kind::Table(&TIMEOUTS), "{ connect = \"5s\" }",
            "How long each phase of a connection may last."),
        key("health", Kind::Table(&HEALTH), "{ check = \"tcp\" }",
            "Active checks of the backends. Absent: a backend that cannot be connected to is left out for a while."),
        key("tls", Kind::Table(&TLS), "{ mode = \"passthrough\" }",
            "What happens to TLS from the client."),
        key("backend_tls", Kind::Table(&BACKEND_TLS), "{ server_name = \"api.internal\" }",
            "Present: TLS towards the backends."),
        key("proxy_protocol", Kind::Table(&PROXY_PROTOCOL), "{ send = \"v2\" }",
            "PROXY headers, from a proxy in front of this one or to the backends."),
    }

    MATCH: "What tells a route apart from others on the same port." {
        key("sni", Kind::List(&Kind::Sni), "[\"shop.example.com\", \"*.shop.example.com\"]",
            "Server names of the TLS ClientHello. *.example.com stands for one or more labels before \
             .example.com.").default("[]"),
        key("alpn", Kind::List(&Kind::Alpn), "[\"h2\"]",
            "Protocols that the TLS ClientHello offers.").default("[]"),
        key("client", Kind::List(&Kind::Network), "[\"10.0.0.0/8\"]",
            "Networks that the client's address is in.").default("[]"),
    }

    BACKEND: "A backend with its share of new connections." {
        key("address", Kind::Target, "\"10.0.0.2:8080\"",
            "IP:port, IP, name:port or name. Without a port, the port that the client dialled is kept.").required(),
        key("weight", Kind::Integer { min: 1, max: 256 }, "2",
            "The share of new connections, relative to the other backends.").default("1"),
    }

    LIMITS: "How much of a route may be used at once. 0 or absent is unlimited." {
        key("connections", COUNT, "10000",
            "Connections open at once on this route.").default("0"),
        key("connections_per_client", COUNT, "100",
            "Connections open at once from one client address.").default("0"),
        key("rate_per_client", Kind::Rate, "\"300/minute\"",
            "New connections per client address: N/second, N/minute or N/hour.").default("0"),
    }

    TIMEOUTS: "How long each phase of a connection may last." {
        key("connect", TIMEOUT, "\"5s\"",
            "To reach a backend.").default("\"30s\""),
        key("initial_data", TIMEOUT, "\"5s\"",
            "To receive enough to choose a route: the ClientHello, the PROXY header.").default("\"60s\""),
        key("tls_handshake", TIMEOUT, "\"5s\"",
            "To finish the TLS handshake.").default("\"10s\""),
        key("idle", TIMEOUT_OR_NEVER, "\"10m\"",
            "Without a byte in either direction; 2m for a UDP route unless it or [defaults] says otherwise.").default("\"4h\""),
        key("half_closed", TIMEOUT_OR_NEVER, "\"5m\"",
            "After one side has finished; counted only while no byte moves.").default("\"30m\""),
        key("lifetime", TIMEOUT_OR_NEVER, "\"1d\"",
            "From accept to end, however busy.").default("\"never\""),
        key("drain", Kind::Duration { min: Duration::ZERO, max: YEAR, never: false }, "\"2m\"",
            "How long a stopping daemon or a removed route lets connections finish.").default("\"30s\""),
    }

    HEALTH: "Active checks of the backends." {
        key("check", choice::<super::HealthCheck>(), "\"http\"",
            "tcp: the port accepts. tls: the handshake succeeds. http: GET / answers 2xx or 3xx.").default("\"tcp\""),
        key("interval", Kind::Duration { min: Duration::from_millis(10), max: DAY, never: false }, "\"5s\"",
            "From one check to the next.").default("\"2s\""),
        key("timeout", Kind::Duration { min: MILLISECOND, max: DAY, never: false }, "\"500ms\"",
            "How long one check may take.").default("\"1s\""),
        key("rise", Kind::Integer { min: 1, max: 1000 }, "1",
            "Successes in a row until a backend is up.").default("2"),
        key("fall", Kind::Integer { min: 1, max: 1000 }, "5",
            "Failures in a row until a backend is down.").default("3"),
    }

    TLS: "What happens to TLS from the client." {
        key("mode", choice::<super::TlsMode>(), "\"terminate\"",
            "passthrough: the backend holds the certificate. terminate: TLS ends here.").required(),
        key("certificates", Kind::Certificates, "[{ cert = \"api.pem\", key = \"api.key\" }]",
            "Files: chosen by the names inside them; the first is the default; read again when they change. Or \"acme\": \
             one for each name of match.sni, from the CA of [acme]. Only with mode = \"terminate\", and required \
             there."),
        key("min_version", choice::<super::TlsVersion>(), "\"1.3\"",
            "The oldest TLS version spoken. Only with mode = \"terminate\".").default("\"1.2\""),
        key("alpn", Kind::List(&Kind::Alpn), "[\"h2\", \"http/1.1\"]",
            "Protocols offered to the client, best first. Only with mode = \"terminate\".").default("[]"),
        key("client_ca", Kind::File, "\"clients.pem\"",
            "PEM file of the authorities that sign client certificates; present: a client certificate is \
             required. Only with mode = \"terminate\"."),
    }

    CERTIFICATE: "A certificate chain and its key." {
        key("cert", Kind::File, "\"api.pem\"",
            "PEM file of the certificate and its intermediates.").required(),
        key("key", Kind::File, "\"api.key\"",
            "PEM file of the private key.").required(),
    }

    BACKEND_TLS: "TLS towards the backends." {
        key("ca", Kind::File, "\"internal-ca.pem\"",
            "PEM file of the authorities that sign the backends' certificates. Absent: those of the system."),
        key("server_name", Kind::ServerName, "\"api.internal\"",
            "The name asked for and verified. Absent: the backend's own name or address."),
        key("cert", Kind::File, "\"gw.pem\"",
            "PEM file of the certificate shown to the backend; needs key."),
        key("key", Kind::File, "\"gw.key\"",
            "PEM file of its private key; needs cert."),
    }

    PROXY_PROTOCOL: "PROXY headers, from a proxy in front of this one or to the backends." {
        key("accept_from", Kind::List(&Kind::Network), "[\"10.0.0.0/8\"]",
            "Networks whose connections must begin with a PROXY header, v1 or v2. From anywhere else a header is \
             never interpreted.").default("[]"),
        key("send", choice::<super::ProxyVersion>(), "\"v2\"",
            "Begin every connection to a backend with a header of this version."),
    }
}
