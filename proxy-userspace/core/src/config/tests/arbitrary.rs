//! No text makes the parser panic.

use proptest::prelude::*;

use super::*;

/// Pieces of files, good and bad, so that random texts get past the first line.
fn piece() -> impl Strategy<Value = String> {
    let word = prop::sample::select(vec![
        "route",
        "defaults",
        "admin",
        "log",
        "kernel",
        "name",
        "listen",
        "backends",
        "match",
        "sni",
        "tls",
        "mode",
        "certificates",
        "cert",
        "timeouts",
        "idle",
        "limits",
        "rate_per_client",
        "health",
        "allow",
        "protocol",
        "engine",
        "mark_mask",
        "x",
    ]);
    let value = prop_oneof![
        prop::sample::select(vec![
            "\"web\"",
            "\"never\"",
            "\"0.0.0.0:80\"",
            "[\"0.0.0.0:80\"]",
            "[\"0.0.0.0:1-65535\", \"[::]:5\"]",
            "[\"10.0.0.0/8\"]",
            "[\"10.0.0.1\"]",
            "{ address = \"a\", weight = 2 }",
            "\"terminate\"",
            "[]",
            "{}",
            "[[1], {}]",
            "true",
            "-1",
            "0xffffff00",
            "1e9",
            "nan",
            "2020-01-01",
            "\"5m\"",
            "\"300/minute\"",
            "\"",
            "[",
            "{",
            "'''",
            "=",
            ",",
        ])
        .prop_map(str::to_owned),
        "[a-z0-9.:/*\\[\\]-]{0,12}".prop_map(|text| format!("{text:?}")),
        "\\PC{0,8}".prop_map(|text| format!("{text:?}")),
    ];
    prop_oneof![
        6 => (word.clone(), value).prop_map(|(key, value)| format!("{key} = {value}\n")),
        2 => word.clone().prop_map(|name| format!("[{name}]\n")),
        2 => Just("[[route]]\n".to_owned()),
        1 => (word.clone(), word.clone()).prop_map(|(a, b)| format!("[{a}.{b}]\n")),
        1 => (word.clone(), word.clone()).prop_map(|(a, b)| format!("[[{a}.{b}]]\n")),
        1 => (word.clone(), word).prop_map(|(a, b)| format!("{a}.{b} = 1\n")),
        1 => "\\PC{0,10}\n?",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        let _ = read(&text);
    }

    #[test]
    fn no_shuffled_file_makes_it_panic_and_every_refusal_says_why(pieces in prop::collection::vec(piece(), 0..30)) {
        if let Err(problems) = read(&pieces.concat()) {
            prop_assert!(!problems.problems.is_empty());
            for problem in &problems.problems {
                prop_assert!(problem.line >= 1 && problem.column >= 1);
                prop_assert!(!problem.to_string().contains('\n'), "{problem}");
            }
        }
    }

    #[test]
    fn a_duration_reads_back_as_it_is_shown(milliseconds in 1u64..86_400_000 * 365) {
        let duration = std::time::Duration::from_millis(milliseconds);
        prop_assert_eq!(value::duration(&value::show_duration(duration)), Ok(duration));
    }

    #[test]
    fn a_backend_reads_back_as_it_is_shown(ip in any::<std::net::IpAddr>(), port in prop::option::of(1u16..)) {
        let target = Target::Address { ip, port };
        if let Ok(read) = address::target(&target.to_string()) {
            prop_assert_eq!(read, target);
        }
    }
}
