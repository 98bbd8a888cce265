use proxy_core::config::Engine;
use ratatui::{Terminal, backend::TestBackend, crossterm::event::KeyEvent};

use super::*;

fn route(name: &str, bytes_in_rate: f64, connections_active: u64) -> view::Route {
    view::Route {
        name: name.into(),
        protocol: "tcp".into(),
        listen: vec!["10.9.9.9:80".into()],
        engine: Engine::Nft,
        balance: "round-robin".into(),
        state: view::RouteState::Active,
        mark: 0x100,
        backends: Vec::new(),
        stats: view::RouteStats { bytes_in_rate, connections_active, ..Default::default() },
    }
}

fn screen() -> Screen {
    let status = view::Status {
        version: "0.1.0".into(),
        pid: 7,
        uptime_seconds: 1.0,
        config_file: String::new(),
        ready: true,
        routes: 2,
        connections_active: 0,
        connections_total: 0,
        reconcile: view::ReconcileStatus::default(),
        conntrack: view::ConntrackStatus::default(),
        handoff: None,
        reloads_ok: 0,
        reloads_failed: 0,
        acme: Vec::new(),
        warnings: vec!["conntrack is nearly full".into()],
    };
    let routes = vec![route("busy", 5e6, 1), route("crowded", 10.0, 500)];
    Screen { status, routes, order: Order::Bytes, selected: TableState::default(), problem: None }
}

fn drawn(screen: &mut Screen) -> String {
    let mut terminal = Terminal::new(TestBackend::new(100, 12)).expect("terminal");
    terminal.draw(|frame| draw(frame, screen)).expect("drawn");
    terminal.backend().to_string()
}

fn key(code: KeyCode) -> Event {
    Event::Key(KeyEvent::new(code, KeyModifiers::NONE))
}

#[test]
fn routes_and_warnings_are_on_the_screen() {
    let text = drawn(&mut screen());
    for part in ["busy", "crowded", "4.8 MiB/s", "conntrack is nearly full", "q quit"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn the_order_changes_with_a_key() {
    let mut screen = screen();
    assert!(screen.take(&key(KeyCode::Char('s'))));
    assert_eq!(screen.order, Order::Connections);
    assert_eq!(screen.routes[0].name, "crowded");
    assert!(!screen.take(&key(KeyCode::Char('q'))));
}

#[test]
fn a_daemon_that_is_gone_is_said_and_the_last_numbers_stay() {
    let mut screen = screen();
    screen.refresh(Err(Failure::new("no daemon answers", "start it")));
    let text = drawn(&mut screen);
    assert!(text.contains("no answer: no daemon answers") && text.contains("busy"), "{text}");
}
