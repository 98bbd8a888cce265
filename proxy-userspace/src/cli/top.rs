//! `shunt top`: the routes, live, those that carry most first.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use proxy_core::view;
use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers},
    layout::{Constraint, Layout},
    style::{Color, Style, Stylize},
    text::{Line, Span},
    widgets::{Cell, Row, Table, TableState},
};

use super::{
    Exit, Failure,
    client::Client,
    render::{
        listens, routes_counted,
        units::{bytes, count, rate, seconds},
    },
};

const EVERY: Duration = Duration::from_secs(1);

/// What the daemon said last.
#[derive(Debug)]
struct Screen {
    status: view::Status,
    routes: Vec<view::Route>,
    order: Order,
    selected: TableState,
    /// Why the last question had no answer.
    problem: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Bytes,
    Connections,
    Rate,
    Name,
}

impl Order {
    const fn next(self) -> Self {
        match self {
            Self::Bytes => Self::Connections,
            Self::Connections => Self::Rate,
            Self::Rate => Self::Name,
            Self::Name => Self::Bytes,
        }
    }

    const fn label(self) -> &'static str {
        match self {
            Self::Bytes => "bytes per second",
            Self::Connections => "open connections",
            Self::Rate => "new connections",
            Self::Name => "name",
        }
    }

    fn sort(self, routes: &mut [view::Route]) {
        routes.sort_by(|one, other| one.name.cmp(&other.name));
        let most_first = |key: fn(&view::Route) -> f64| {
            move |one: &view::Route, other: &view::Route| key(other).total_cmp(&key(one))
        };
        match self {
            Self::Bytes => routes.sort_by(most_first(|route| route.stats.bytes_in_rate + route.stats.bytes_out_rate)),
            Self::Connections => routes.sort_by(most_first(|route| route.stats.connections_active as f64)),
            Self::Rate => routes.sort_by(most_first(|route| route.stats.connections_rate)),
            Self::Name => {}
        }
    }
}

pub(super) fn run(client: &Client) -> Result<Exit, Failure> {
    let (status, routes) = ask(client)?;
    if !io::stdout().is_terminal() {
        return Err(Failure::new("top needs a terminal", "use shunt routes, or shunt routes --json"));
    }
    let mut screen = Screen { status, routes, order: Order::Bytes, selected: TableState::default(), problem: None };
    screen.order.sort(&mut screen.routes);
    let broken = |error: io::Error| Failure::new(format!("the terminal does not answer: {error}"), "use shunt routes");
    let mut terminal = ratatui::try_init().map_err(broken)?;
    let ended = live(&mut terminal, client, &mut screen);
    ratatui::restore();
    ended.map(|()| Exit::Fine).map_err(broken)
}

fn ask(client: &Client) -> Result<(view::Status, Vec<view::Route>), Failure> {
    Ok((client.get("/v1/status", &[])?, client.get("/v1/routes", &[])?))
}

fn live(terminal: &mut DefaultTerminal, client: &Client, screen: &mut Screen) -> io::Result<()> {
    let mut asked = Instant::now();
    loop {
        terminal.draw(|frame| draw(frame, screen))?;
        if event::poll(EVERY.saturating_sub(asked.elapsed()))? && !screen.take(&event::read()?) {
            return Ok(());
        }
        if asked.elapsed() >= EVERY {
            screen.refresh(ask(client));
            asked = Instant::now();
        }
    }
}

impl Screen {
    fn refresh(&mut self, answer: Result<(view::Status, Vec<view::Route>), Failure>) {
        match answer {
            Ok((status, routes)) => {
                (self.status, self.routes, self.problem) = (status, routes, None);
                self.order.sort(&mut self.routes);
            }
            Err(failure) => self.problem = Some(failure.what),
        }
    }

    /// False: the user wants to leave.
    fn take(&mut self, event: &Event) -> bool {
        let Event::Key(key) = event else { return true };
        if key.kind == KeyEventKind::Release {
            return true;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return false,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
            KeyCode::Char('s') => {
                self.order = self.order.next();
                self.order.sort(&mut self.routes);
            }
            KeyCode::Down | KeyCode::Char('j') => self.selected.select_next(),
            KeyCode::Up | KeyCode::Char('k') => self.selected.select_previous(),
            KeyCode::PageDown => self.selected.scroll_down_by(20),
            KeyCode::PageUp => self.selected.scroll_up_by(20),
            KeyCode::Home => self.selected.select_first(),
            KeyCode::End => self.selected.select_last(),
            _ => {}
        }
        true
    }
}

fn draw(frame: &mut Frame, screen: &mut Screen) {
    let warnings = warnings(screen);
    let heights = [
        Constraint::Length(2),
        Constraint::Min(3),
        Constraint::Length(u16::try_from(warnings.len()).unwrap_or(u16::MAX)),
        Constraint::Length(1),
    ];
    let [head, middle, below, foot] = Layout::vertical(heights).areas(frame.area());
    frame.render_widget(ratatui::widgets::Paragraph::new(heading(screen)), head);
    frame.render_stateful_widget(table(&screen.routes), middle, &mut screen.selected);
    frame.render_widget(ratatui::widgets::Paragraph::new(warnings), below);
    let keys = format!("q quit · s order: {} · ↑↓ scroll", screen.order.label());
    frame.render_widget(Line::from(keys).dim(), foot);
}

fn heading(screen: &Screen) -> Vec<Line<'static>> {
    let status = &screen.status;
    let sum = |key: fn(&view::RouteStats) -> f64| screen.routes.iter().map(|route| key(&route.stats)).sum::<f64>();
    let ready = if status.ready { Span::from("ready").green() } else { Span::from("not ready").red() };
    let up = seconds(status.uptime_seconds);
    // Without a limit nobody has read it: the daemon relays every route.
    let conntrack = match status.conntrack.max {
        0 => String::new(),
        max => format!(" · conntrack {} of {}", count(status.conntrack.entries), count(max)),
    };
    vec![
        Line::from(vec![format!("shunt {} · pid {} · up {up} · ", status.version, status.pid).into(), ready]),
        Line::from(format!(
            "{} · {} open · {} new/s · in {}/s · out {}/s{conntrack}",
            routes_counted(status.routes),
            count(status.connections_active),
            rate(sum(|stats| stats.connections_rate)),
            bytes(sum(|stats| stats.bytes_in_rate)),
            bytes(sum(|stats| stats.bytes_out_rate)),
        )),
    ]
}

/// At most a few lines: the table is what one looks at.
fn warnings(screen: &Screen) -> Vec<Line<'static>> {
    let problem = screen.problem.iter().map(|problem| Line::from(format!("no answer: {problem}")).red());
    problem.chain(screen.status.warnings.iter().map(|warning| Line::from(warning.clone()).yellow())).take(5).collect()
}

fn table(routes: &[view::Route]) -> Table<'static> {
    let words = ["ROUTE", "LISTENS ON", "ENGINE"].map(Cell::from);
    let numbers = ["OPEN", "NEW/S", "IN", "OUT", "UP"].map(|title| right(title.to_owned()));
    let widths = [
        Constraint::Fill(2),
        Constraint::Fill(2),
        Constraint::Length(8),
        Constraint::Length(7),
        Constraint::Length(7),
        Constraint::Length(11),
        Constraint::Length(11),
        Constraint::Length(7),
    ];
    let rows = routes.iter().map(|route| {
        let up = route.backends.iter().filter(|backend| backend.up).count();
        let colour = match up {
            0 => Color::Red,
            some if some < route.backends.len() => Color::Yellow,
            _ => Color::Green,
        };
        Row::new([
            Cell::from(route.name.clone()),
            Cell::from(listens(route)),
            Cell::from(route.engine.as_str()),
            right(count(route.stats.connections_active)),
            right(rate(route.stats.connections_rate)),
            right(format!("{}/s", bytes(route.stats.bytes_in_rate))),
            right(format!("{}/s", bytes(route.stats.bytes_out_rate))),
            right(format!("{up}/{}", route.backends.len())).style(Style::new().fg(colour)),
        ])
    });
    Table::new(rows, widths)
        .header(Row::new(words.into_iter().chain(numbers)).dim())
        .row_highlight_style(Style::new().reversed())
}

fn right(text: String) -> Cell<'static> {
    Cell::from(Line::from(text).right_aligned())
}

#[cfg(test)]
mod tests;
