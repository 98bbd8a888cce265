//! `cargo xtask`: what one does with this repository. `cargo xtask --help` lists it.

mod apt;
mod bench;
mod cargo;
mod checks;
mod demo;
mod ebpf;
mod fuzz;
mod root;
mod setup;
mod stop;
mod ui;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Tasks of the shunt repository")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install the system packages that building and testing need (Debian, Ubuntu)
    Setup(setup::Options),
    /// See shunt work in a lab of its own: traffic, a dying backend, a killed daemon, a reload
    Demo(demo::Options),
    /// Build everything and run all tests, on this kernel, in network namespaces of their own
    Test(checks::TestOptions),
    /// Compare shunt with a hand-written nft rule, plain routing, HAProxy and nginx
    Bench(bench::Options),
    /// Build the eBPF object from nothing, or check that the committed one is what the sources give
    Ebpf {
        #[command(subcommand)]
        what: Ebpf,
    },
    /// Run tests on other kernels, Debian's, each in a machine that qemu makes
    Vm(vm::Options),
    /// Throw bytes at everything that reads what strangers send, guided by coverage
    Fuzz(fuzz::Options),
    /// Everything a change must pass: formatting, lints, the eBPF objects, tests, a minute of fuzzing, documentation
    Ci(checks::CiOptions),
}

#[derive(Debug, Clone, Copy, Subcommand)]
enum Ebpf {
    /// Build proxy-ebpf/objects and their checksums
    Build,
    /// Build it elsewhere and compare; exit 77 where no toolchain can be had
    Check,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = stop::on_signals().and_then(|()| match cli.task {
        Task::Setup(options) => setup::run(&options),
        Task::Demo(options) => demo::run(&options),
        Task::Test(options) => checks::test(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Ebpf { what: Ebpf::Build } => ebpf::build(),
        Task::Ebpf { what: Ebpf::Check } => ebpf::check(),
        Task::Vm(options) => vm::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Ci(options) => checks::ci(&options),
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<ebpf::Unavailable>() => {
            ui::error(&error);
            ExitCode::from(ebpf::EXIT_UNAVAILABLE)
        }
        Err(error) => {
            ui::error(&error);
            ExitCode::FAILURE
        }
    }
}
