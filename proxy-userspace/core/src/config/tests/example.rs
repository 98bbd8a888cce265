//! Whole files.

use std::{num::NonZeroU32, path::PathBuf, time::Duration};

use super::*;

const EXAMPLE: &str = include_str!("../../../../../deploy/shunt.toml");

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn networks(list: &[&str]) -> Vec<ipnet::IpNet> {
    list.iter().map(|text| text.parse().unwrap()).collect()
}

fn listen(address: &str, first: u16, last: u16) -> Listen {
    Listen { address: address.parse().unwrap(), ports: PortRange { first, last } }
}

fn backend(ip: &str, port: u16, weight: u16) -> Backend {
    Backend { target: Target::Address { ip: ip.parse().unwrap(), port: Some(port) }, weight }
}

/// What a route is that says no more than it must.
fn plain(name: &str, listen: Vec<Listen>, backends: Vec<Backend>) -> Route {
    Route {
        name: RouteName::new(name).unwrap(),
        listen,
        protocol: Protocol::Tcp,
        matches: Match::default(),
        backends,
        balance: Balance::RoundRobin,
        engine: EngineChoice::Auto,
        source_address: SourceAddress::Gateway,
        allow: Vec::new(),
        deny: Vec::new(),
        keepalive: Keepalive::Standard,
        limits: Limits::default(),
        timeouts: Timeouts {
            connect: seconds(30),
            initial_data: seconds(60),
            tls_handshake: seconds(10),
            idle: Some(seconds(4 * 3600)),
            half_closed: Some(seconds(1800)),
            lifetime: None,
            drain: seconds(30),
        },
        health: None,
        tls: None,
        backend_tls: None,
        proxy_protocol: ProxyProtocol::default(),
        fingerprint: 0,
        own_fingerprint: 0,
        shares_port_with: Arc::default(),
    }
}

fn routes(config: &Config) -> Vec<Route> {
    config.routes.iter().map(|route| Route { fingerprint: 0, own_fingerprint: 0, ..(**route).clone() }).collect()
}

#[test]
fn the_empty_file_is_all_defaults() {
    let config = good("");
    assert_eq!(
        config,
        Config {
            admin: Admin {
                listen: Some("127.0.0.1:9900".parse().unwrap()),
                socket: PathBuf::from("/run/shunt/admin.sock")
            },
            log: Log { level: "info".to_owned(), format: LogFormat::Text, access: AccessLog::All },
            kernel: Kernel { mark_mask: MarkMask::DEFAULT, lock_table: true },
            acme: None,
            routes: Vec::new(),
        }
    );
}

#[test]
fn a_route_that_says_only_what_it_must_has_every_default() {
    let config = good(&route_with("health = {}"));
    let expected = Route {
        health: Some(Health { check: HealthCheck::Tcp, interval: seconds(2), timeout: seconds(1), rise: 2, fall: 3 }),
        ..plain("web", vec![listen("0.0.0.0", 80, 80)], vec![backend("10.0.0.2", 8080, 1)])
    };
    assert_eq!(routes(&config), [expected]);
}

#[test]
fn the_example_is_read_as_it_is_meant() {
    let config = good(include_str!("reference.toml"));
    let limit = NonZeroU32::new;
    let postgres = Route {
        allow: networks(&["10.88.0.0/16"]),
        deny: networks(&["10.88.9.0/24"]),
        limits: Limits {
            connections: limit(10_000),
            connections_per_client: limit(100),
            rate_per_client: limit(300).map(|count| Rate { count, per: RateUnit::Minute }),
        },
        health: Some(Health { check: HealthCheck::Tcp, interval: seconds(2), timeout: seconds(1), rise: 2, fall: 3 }),
        ..plain(
            "postgres",
            vec![listen("10.88.1.1", 5432, 5432), listen("fd88::1", 5432, 5432)],
            vec![backend("10.88.2.2", 5432, 1), backend("10.88.2.3", 5432, 2)],
        )
    };
    let shop = Route {
        matches: Match {
            sni: vec!["shop.example.com".to_owned(), "*.shop.example.com".to_owned()],
            alpn: vec!["h2".to_owned()],
            client: networks(&["10.0.0.0/8"]),
        },
        tls: Some(Tls {
            mode: TlsMode::Passthrough,
            certificates: Certificates::Files(Vec::new()),
            min_version: TlsVersion::Tls12,
            alpn: Vec::new(),
            client_ca: None,
        }),
        shares_port_with: [1, 2].into(),
        ..plain("shop", vec![listen("0.0.0.0", 443, 443)], vec![backend("10.88.2.4", 443, 1)])
    };
    let file = |name: &str| PathBuf::from("/etc/shunt").join(name);
    let api = Route {
        matches: Match { sni: vec!["api.example.com".to_owned()], ..Match::default() },
        tls: Some(Tls {
            mode: TlsMode::Terminate,
            certificates: Certificates::Files(vec![CertificateFiles { cert: file("api.pem"), key: file("api.key") }]),
            min_version: TlsVersion::Tls12,
            alpn: vec!["h2".to_owned(), "http/1.1".to_owned()],
            client_ca: Some(file("clients.pem")),
        }),
        backend_tls: Some(BackendTls {
            ca: Some(file("internal-ca.pem")),
            server_name: Some("api.internal".to_owned()),
            cert: Some(file("gw.pem")),
            key: Some(file("gw.key")),
        }),
        shares_port_with: [1, 2].into(),
        ..plain("api", vec![listen("0.0.0.0", 443, 443)], vec![backend("10.88.2.5", 8080, 1)])
    };
    let smtp = Route {
        proxy_protocol: ProxyProtocol { accept_from: networks(&["10.0.0.0/8"]), send: Some(ProxyVersion::V2) },
        ..plain("smtp", vec![listen("0.0.0.0", 25, 25)], vec![backend("10.88.2.6", 25, 1)])
    };
    assert_eq!(routes(&config), [postgres, shop, api, smtp]);
}

#[test]
fn the_example_that_is_shipped_is_valid_as_it_is_and_with_every_setting_turned_on() {
    good(EXAMPLE);
    // Settings that are off stand behind `#` without a space; prose stands behind `# `.
    let on: String = EXAMPLE
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(setting) if !setting.is_empty() && !setting.starts_with([' ', ':']) => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert!(good(&on).routes.len() > good(EXAMPLE).routes.len());
}

#[test]
fn the_configuration_in_the_kubernetes_manifest_is_valid() {
    let manifest = include_str!("../../../../../deploy/daemonset.yaml");
    let block = manifest.split_once("shunt.toml: |\n").unwrap().1.split("\n---").next().unwrap();
    let file: String = block.lines().map(|line| format!("{}\n", line.trim_start())).collect();
    assert_eq!(good(&file).routes.len(), 1);
}

#[test]
fn defaults_reach_every_route_and_a_route_overrides_them_key_by_key() {
    for defaults in [
        "[defaults]\nbalance = \"maglev\"\nengine = \"copy\"\nkeepalive = \"extended\"\ntimeouts = { connect = \"5s\", idle = \"never\" }\nlimits = { connections = 7, connections_per_client = 3 }\n",
        "[defaults]\nbalance = \"maglev\"\nengine = \"copy\"\nkeepalive = \"extended\"\n[defaults.timeouts]\nconnect = \"5s\"\nidle = \"never\"\n[defaults.limits]\nconnections = 7\nconnections_per_client = 3\n",
    ] {
        let route = |lines: &str| (*good(&format!("{defaults}{}", route_with(lines))).routes[0]).clone();
        let plain = route("");
        assert_eq!(
            (plain.balance, plain.engine, plain.keepalive),
            (Balance::Maglev, EngineChoice::Forced(Engine::Copy), Keepalive::Extended)
        );
        assert_eq!(
            (plain.timeouts.connect, plain.timeouts.idle, plain.timeouts.drain),
            (seconds(5), None, seconds(30))
        );
        assert_eq!(
            (plain.limits.connections, plain.limits.connections_per_client),
            (NonZeroU32::new(7), NonZeroU32::new(3))
        );

        let own = route("balance = \"random\"\nengine = \"auto\"\ntimeouts.idle = \"1m\"\nlimits.connections = 0");
        assert_eq!(
            (own.balance, own.engine, own.keepalive),
            (Balance::Random, EngineChoice::Auto, Keepalive::Extended)
        );
        assert_eq!((own.timeouts.connect, own.timeouts.idle), (seconds(5), Some(seconds(60))));
        assert_eq!((own.limits.connections, own.limits.connections_per_client), (None, NonZeroU32::new(3)));
    }
}

#[test]
fn values_are_read_in_every_form_they_may_have() {
    let route = |lines: &str| (*good(&route_with(lines)).routes[0]).clone();
    let timeouts = route("timeouts = { connect = \"500ms\", idle = \"1d\", half_closed = \"never\", lifetime = \"1h30m\", drain = \"0s\" }").timeouts;
    assert_eq!(timeouts.connect, Duration::from_millis(500));
    assert_eq!(
        (timeouts.idle, timeouts.half_closed, timeouts.lifetime),
        (Some(seconds(86_400)), None, Some(seconds(5400)))
    );
    assert_eq!(timeouts.drain, Duration::ZERO);
    for zero in ["0", "\"0\"", "\"0/second\""] {
        assert_eq!(route(&format!("limits.rate_per_client = {zero}")).limits.rate_per_client, None);
    }
    let count = NonZeroU32::new(5).unwrap();
    for (text, per) in [("second", RateUnit::Second), ("minute", RateUnit::Minute), ("hour", RateUnit::Hour)] {
        assert_eq!(
            route(&format!("limits.rate_per_client = \"5/{text}\"")).limits.rate_per_client,
            Some(Rate { count, per })
        );
    }
    for mask in ["0xffff0000", "\"0xffff0000\"", "4294901760", "\"4294901760\""] {
        assert_eq!(good(&format!("kernel.mark_mask = {mask}")).kernel.mark_mask.bits(), 0xffff_0000);
    }
    assert_eq!(
        route("allow = [\"10.0.0.1\", \"fd00::1\", \"0.0.0.0/0\"]").allow,
        networks(&["10.0.0.1/32", "fd00::1/128", "0.0.0.0/0"])
    );
}

#[test]
fn a_backend_is_an_address_or_a_name_with_or_without_a_port() {
    let text = "[[route]]\nname = \"a\"\nlisten = [\"0.0.0.0:30000-30999\", \"[::]:30000-30999\"]\n\
        backends = [\"10.0.0.2\", \"10.0.0.2:80\", \"fd00::2\", \"[fd00::3]\", \"[fd00::2]:80\", \"DB.Internal.\", { address = \"my_db:5432\", weight = 256 }]";
    let route = &good(text).routes[0];
    let shown: Vec<String> = route.backends.iter().map(|backend| backend.target.to_string()).collect();
    assert_eq!(shown, ["10.0.0.2", "10.0.0.2:80", "fd00::2", "fd00::3", "[fd00::2]:80", "db.internal.", "my_db:5432"]);
    assert_eq!(route.backends[6].weight, 256);
    assert_eq!(route.listen, [listen("0.0.0.0", 30000, 30999), listen("::", 30000, 30999)]);
}

#[test]
fn paths_begin_at_the_folder_of_the_file() {
    let text = "[admin]\nsocket = \"admin.sock\"";
    let socket = |file: &str| parse(text, Path::new(file)).unwrap().admin.socket;
    assert_eq!(socket("/etc/shunt/shunt.toml"), Path::new("/etc/shunt/admin.sock"));
    assert_eq!(socket("shunt.toml"), Path::new("admin.sock"));
    assert_eq!(good("[admin]\nsocket = \"/run/a.sock\"").admin.socket, Path::new("/run/a.sock"));
}
