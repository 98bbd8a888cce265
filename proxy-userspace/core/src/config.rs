//! The configuration file: text in, [`Config`] out, or every problem at once.

mod acme;
mod address;
mod choice;
mod fingerprint;
mod keys;
mod overlap;
mod problem;
mod reader;
mod route;
mod schema;
mod sections;
mod source;
mod syntax;
mod tls;
mod types;
mod value;

use std::{collections::HashMap, net::SocketAddr, path::Path, sync::Arc};

use toml::de::DeTable;

pub use acme::{Acme, Eab, HmacKey, Secret, hmac_key};
pub use problem::{Problem, Problems};
pub use schema::schema;
pub use types::*;

use acme::Known;
use overlap::Overlaps;
use reader::{Field, Section};
use sections::Defaults;
use source::{Place, Source};

/// Reads the text of a configuration file. `file` is only named, never opened: it begins every line of [`Problems`],
/// and its folder is where relative paths in the text begin.
///
/// # Errors
/// Everything that is wrong with the text, in its order.
pub fn parse(text: &str, file: &Path) -> Result<Config, Problems> {
    let (table, errors) = DeTable::parse_recoverable(text);
    let source = Source::new(text, file, syntax::describe(text, &errors));
    let config = config(&source, table.get_ref());
    let problems = source.into_problems();
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(Problems { file: file.to_owned(), problems }),
    }
}

/// `None` only when a problem has been reported.
fn config(source: &Source<'_>, table: &DeTable<'_>) -> Option<Config> {
    let root = Section::open(source, Place::Root, 0, &keys::ROOT, table);
    let admin = sections::admin(&root.child("admin")?);
    let log = sections::log(&root.child("log")?);
    let kernel = sections::kernel(&root.child("kernel")?);
    let defaults = sections::defaults(&root.child("defaults")?)?;
    let acme = acme::section(&root);
    let routes = routes(&root, &defaults, acme.as_known(), admin.as_ref().and_then(|admin| admin.listen));
    let routes = routes.into_iter().map(Arc::new).collect();
    Some(Config { admin: admin?, log: log?, kernel: kernel?, acme: acme.into_option().map(Arc::new), routes })
}

fn routes(root: &Section<'_>, defaults: &Defaults, acme: Known<&Acme>, admin: Option<SocketAddr>) -> Vec<Route> {
    let source = root.source;
    let mut routes = Vec::new();
    let mut labels = Vec::new();
    let mut claims = Vec::new();
    let mut names: HashMap<RouteName, usize> = HashMap::new();
    let mut read = |field: &Field<'_>| {
        let section = field.section()?;
        let route = route::route(&section, routes.len(), defaults, acme, &mut claims)?;
        let line = source.line(section.offset);
        if let Some(name) = section.given("name").filter(|name| name.is_text(route.name.as_str())) {
            match names.get(&route.name) {
                Some(first) => {
                    name.reject(format!("\"{}\" is the name of the route in line {first} already", route.name))
                }
                None => drop(names.insert(route.name.clone(), line)),
            }
        }
        labels.push((section.place.to_string(), line));
        routes.push(route);
        Some(())
    };
    root.given("route").and_then(|field| field.list(&mut read));
    if source.is_broken() {
        return routes;
    }
    let overlaps = Overlaps::find(source, &routes, &labels, claims);
    overlaps.report_conflicts();
    overlaps.report_headers();
    if let Some(admin) = admin {
        overlaps.report_admin(admin);
    }
    let shared = if source.has_problems() { Vec::new() } else { overlaps.shared() };
    for (route, (sharers, fingerprint, own)) in routes.iter_mut().zip(shared) {
        route.shares_port_with = sharers;
        route.fingerprint = fingerprint;
        route.own_fingerprint = own;
    }
    routes
}

#[cfg(test)]
mod tests;
