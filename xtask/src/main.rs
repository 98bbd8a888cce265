mod ebpf;
fn main() -> std::process::ExitCode {
    let result = match std::env::args().nth(2).as_deref() {
        Some("build") => ebpf::build(),
        _ => ebpf::check(),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) if e.is::<ebpf::Unavailable>() => {
            eprintln!("{e:#}");
            std::process::ExitCode::from(ebpf::EXIT_UNAVAILABLE)
        }
        Err(e) => {
            eprintln!("{e:#}");
            std::process::ExitCode::FAILURE
        }
    }
}
