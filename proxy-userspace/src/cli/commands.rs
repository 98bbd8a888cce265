//! What each command does.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use clap::CommandFactory;
use proxy_core::{capability::Capabilities, config::Config, flow::MarkLayout, view};
use serde::Serialize;
use serde_json::Value;

use super::{
    Cli, Command, Exit, Failure, Place, PlanFormat,
    client::{Client, DEFAULT_CONFIG},
    render, top,
};
use crate::{
    acme,
    app::{self, Refusal},
    doctor,
    kernel::capability,
    reconcile::task,
    stream,
    tls::RouteTls,
};

pub(super) fn run(cli: Cli) -> Result<Exit, Failure> {
    let Cli { place, command } = cli;
    match command {
        Command::Run => app::run(&config_file(&place, None)).map(|()| Exit::Fine).map_err(refused),
        Command::Check { file } => check(&config_file(&place, file)),
        Command::Plan { file, format } => plan(&config_file(&place, file), format),
        Command::Doctor(output) => doctor(&place, output.json),
        Command::Status(output) => ask(&place, output.json, "/v1/status", &[], render::status),
        Command::Routes { route, output } => routes(&place, output.json, route.as_deref()),
        Command::Connections { route, client, limit, output } => {
            let (client, limit) = (client.map(|client| client.to_string()), limit.to_string());
            let mut query = vec![("limit", limit.as_str())];
            query.extend(route.as_deref().map(|route| ("route", route)));
            query.extend(client.as_deref().map(|client| ("client", client)));
            ask(&place, output.json, "/v1/connections", &query, |found: &Vec<_>| render::connections(found))
        }
        Command::Explain { what, output } => {
            ask(&place, output.json, "/v1/explain", &[("what", &what)], render::explain)
        }
        Command::Top => top::run(&Client::new(&place)?),
        Command::Reload(output) => change(&place, output.json, "/v1/reload", &[], render::reload),
        Command::Backend { route, backend, state, output } => {
            let query = [("route", route.as_str()), ("backend", &backend), ("state", state.as_str())];
            change(&place, output.json, "/v1/backend", &query, render::backend)
        }
        Command::Kill { id, output } => change(&place, output.json, "/v1/kill", &[("id", &id)], render::killed),
        Command::Cleanup => cleanup(&place),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "shunt", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Schema => print_json(&proxy_core::config::schema()),
    }
}

fn config_file(place: &Place, file: Option<PathBuf>) -> PathBuf {
    file.or_else(|| place.config.clone()).unwrap_or_else(|| DEFAULT_CONFIG.into())
}

fn load(file: &Path) -> Result<Config, Failure> {
    task::load(file).map_err(|failure| Failure { what: failure.error, mend: failure.hint, exit: Exit::Failed })
}

fn refused(refusal: Refusal) -> Failure {
    let exit = if refusal.code == 4 { Exit::Missing } else { Exit::Failed };
    Failure { what: refusal.what, mend: refusal.mend, exit }
}

fn check(file: &Path) -> Result<Exit, Failure> {
    let corrected = "correct what it names; `shunt schema` and docs/configuration.md have every key";
    let config = load(file).map_err(|failure| match file.exists() {
        true => Failure { mend: Some(corrected.to_owned()), ..failure },
        false => failure,
    })?;
    let loaded = config.routes.iter().map(|route| (&route.name, RouteTls::load(route)));
    let bad: Vec<_> = loaded.filter_map(|(name, tls)| Some((name, tls.err()?))).collect();
    let mut mend: Vec<String> = bad.iter().map(|(_, error)| error.mend()).collect();
    let mut told: Vec<String> = bad.iter().map(|(route, error)| format!("route \"{route}\": {error}")).collect();
    if let Some(error) = config.acme.as_ref().and_then(|acme| acme::check(acme).err()) {
        mend.push(error.mend());
        told.push(error.to_string());
    }
    // What no kernel and no privilege would mend.
    for unserved in proxy_core::plan::plan(&config, &Capabilities::all()).unserved() {
        mend.push("`shunt plan` shows every route and what rules its engines out".to_owned());
        told.push(unserved.to_string());
    }
    if let Some(mend) = mend.into_iter().next() {
        return Err(Failure::new(told.join("\n"), mend));
    }
    print(&format!("{}: fine, {}\n", file.display(), render::routes_counted(config.routes.len())))
}

fn plan(file: &Path, format: PlanFormat) -> Result<Exit, Failure> {
    let config = load(file)?;
    let mut capabilities = capability::probe(&config, stream::trust_in_sockmap());
    if !capabilities.net_admin {
        // A plan touches nothing: it is of use also to somebody who may not carry it out.
        eprintln!(
            "note: without CAP_NET_ADMIN the kernel cannot be asked; this is the plan for a kernel that has everything"
        );
        capabilities.net_admin = true;
    }
    let plan = proxy_core::plan::plan(&config, &capabilities);
    match format {
        PlanFormat::Table => print(&render::plan(&plan))?,
        PlanFormat::Json => print_json(&render::plan_json(&plan))?,
        PlanFormat::Nft => {
            let layout = MarkLayout::new(config.kernel.mark_mask);
            print(&proxy_core::ruleset::print(&plan.preview(layout, &[]).ruleset()))?
        }
    };
    match plan.unserved().as_slice() {
        [] => Ok(Exit::Fine),
        unserved => {
            let what = unserved.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
            Err(Failure::new(what, "change what rules the engines out, or leave the route away until they are there"))
        }
    }
}

fn doctor(place: &Place, json: bool) -> Result<Exit, Failure> {
    let config = match &place.config {
        Some(file) => Some(load(file)?),
        // Its problems are for `shunt check`: what the kernel allows is of use before there is a file, or with a broken one.
        None => load(Path::new(DEFAULT_CONFIG)).ok(),
    };
    let socket = Client::new(place).map(|client| client.socket().to_owned()).ok();
    let report = doctor::examine(config.as_ref(), socket.as_deref());
    if json {
        print_json(&report)?
    } else {
        print(&render::doctor(&report))?
    };
    Ok(if report.can_run() { Exit::Fine } else { Exit::Missing })
}

fn routes(place: &Place, json: bool, only: Option<&str>) -> Result<Exit, Failure> {
    let mut routes: Vec<view::Route> = Client::new(place)?.get("/v1/routes", &[])?;
    if let Some(only) = only {
        routes.retain(|route| route.name == only);
        if routes.is_empty() {
            return Err(Failure::new(format!("there is no route \"{only}\""), "shunt routes lists them"));
        }
    }
    match (json, routes.as_slice()) {
        (true, routes) => print_json(&routes),
        (false, [route]) if only.is_some() => print(&render::route(route)),
        (false, routes) => print(&render::routes(routes)),
    }
}

/// A question to the daemon, answered as JSON or rendered.
fn ask<T: serde::de::DeserializeOwned>(
    place: &Place,
    json: bool,
    path: &str,
    query: &[(&str, &str)],
    render: fn(&T) -> String,
) -> Result<Exit, Failure> {
    let client = Client::new(place)?;
    if json { print_json(&client.get::<Value>(path, query)?) } else { print(&render(&client.get(path, query)?)) }
}

/// A change, which the daemon takes over its socket only.
fn change<T: serde::de::DeserializeOwned>(
    place: &Place,
    json: bool,
    path: &str,
    query: &[(&str, &str)],
    render: fn(&T) -> String,
) -> Result<Exit, Failure> {
    let client = Client::new(place)?;
    if json { print_json(&client.post::<Value>(path, query)?) } else { print(&render(&client.post(path, query)?)) }
}

fn cleanup(place: &Place) -> Result<Exit, Failure> {
    let client = Client::new(place)?;
    match client.get::<view::Status>("/v1/status", &[]) {
        Ok(status) => {
            return Err(Failure::new(
                format!("a daemon (pid {}) is running", status.pid),
                format!("stop it first: systemctl stop shunt, or kill {}", status.pid),
            ));
        }
        Err(failure) if failure.exit == Exit::NoDaemon => {}
        Err(failure) => return Err(failure),
    }
    let done = app::cleanup(client.socket()).map_err(refused)?;
    if done.is_empty() {
        return print("there was nothing to clean up\n");
    }
    print(&done.into_iter().map(|line| line + "\n").collect::<String>())
}

fn print_json(value: &impl Serialize) -> Result<Exit, Failure> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Failure::new(format!("a defect in shunt: {error}"), "report it"))?;
    print(&(text + "\n"))
}

fn print(text: &str) -> Result<Exit, Failure> {
    let mut stdout = anstream::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(Exit::Fine),
        // `shunt routes | head`
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Fine),
        Err(error) => Err(Failure::new(format!("cannot write to stdout: {error}"), "look at where it goes")),
    }
}
