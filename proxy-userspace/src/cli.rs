//! The command line: what there is to say, and which part of the program does it.

mod client;
mod commands;
mod failure;
mod render;
mod top;

use std::{net::IpAddr, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use failure::{Exit, Failure};

/// A Linux kernel-offload proxy.
#[derive(Debug, Parser)]
#[command(
    name = "shunt",
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 fine, 1 the request failed, 2 wrong usage, 3 no daemon to talk to, \
                  4 missing privilege or kernel feature."
)]
struct Cli {
    #[command(flatten)]
    place: Place,
    #[command(subcommand)]
    command: Command,
}

/// Which configuration, which daemon.
#[derive(Debug, Clone, Args)]
struct Place {
    /// Configuration file [default: /etc/shunt/shunt.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Admin socket of the daemon [default: admin.socket of the configuration, else /run/shunt/admin.sock]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Run,
    /// Parse and validate a configuration; every problem at once
    Check {
        /// The configuration file
        file: Option<PathBuf>,
    },
    /// Show which engine serves each route and why. Touches nothing
    Plan {
        /// The configuration file
        file: Option<PathBuf>,
        /// `nft` prints the exact ruleset
        #[arg(long, value_enum, default_value_t)]
        format: PlanFormat,
    },
    /// What this kernel and these privileges allow, and how to mend what is missing
    Doctor(Output),
    /// What the daemon is doing
    Status(Output),
    /// The routes with their traffic
    Routes {
        /// Only this route, with its backends
        route: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// The live connections
    Connections {
        /// Only of this route
        #[arg(long)]
        route: Option<String>,
        /// Only from this client address
        #[arg(long, value_name = "IP")]
        client: Option<IpAddr>,
        /// At most so many; 0 = all
        #[arg(long, default_value_t = 1000)]
        limit: usize,
        #[command(flatten)]
        output: Output,
    },
    /// Why a route or connection runs on its engine, and where its bytes go
    Explain {
        /// A route, a connection's id, or client:port
        what: String,
        #[command(flatten)]
        output: Output,
    },
    /// Live terminal view
    Top,
    /// Read the configuration again: all or nothing
    Reload(Output),
    /// Set a backend's state until the daemon ends or the state is set again
    Backend {
        /// The route's name
        route: String,
        /// As written in the configuration
        backend: String,
        #[arg(value_enum)]
        state: BackendState,
        #[command(flatten)]
        output: Output,
    },
    /// End a connection
    Kill {
        /// The connection's id, as `shunt connections` has it
        id: String,
        #[command(flatten)]
        output: Output,
    },
    /// Remove everything the daemon ever put into the kernel
    Cleanup,
    /// Print the completion script of a shell
    Completions { shell: clap_complete::Shell },
    /// Print the JSON Schema of the configuration file
    Schema,
}

#[derive(Debug, Clone, Copy, Args)]
struct Output {
    /// As JSON, as the API answers
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum PlanFormat {
    #[default]
    Table,
    Json,
    Nft,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendState {
    /// Takes new connections when healthy
    Ready,
    /// Takes no new connections; those it has go on
    Drain,
    /// Takes no new connections; UDP flows move to another backend
    Down,
}

impl BackendState {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Drain => "drain",
            Self::Down => "down",
        }
    }
}

/// The whole program: reads the arguments, does it, says what went wrong.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(cli) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_promised_command_is_taken() {
        for line in [
            "run --config a.toml",
            "check a.toml",
            "plan a.toml --format nft",
            "doctor --json",
            "status --json",
            "routes --json",
            "connections --route web --client 10.0.0.1 --json",
            "explain 10.0.0.1:80 --json",
            "top",
            "reload --json",
            "backend web 10.0.0.1:80 drain --json",
            "kill c1 --json",
            "cleanup",
            "completions bash",
            "schema",
            "--socket /run/x.sock status",
            "status --socket /run/x.sock",
        ] {
            let arguments = std::iter::once("shunt").chain(line.split(' '));
            assert!(Cli::try_parse_from(arguments).is_ok(), "{line}");
        }
    }

    #[test]
    fn wrong_usage_exits_2() {
        for line in ["backend web b sleeping", "connections --client nobody", "plan --format yaml", "fly", "kill"] {
            let arguments = std::iter::once("shunt").chain(line.split(' '));
            assert_eq!(Cli::try_parse_from(arguments).expect_err("an error").exit_code(), 2, "{line}");
        }
    }
}
