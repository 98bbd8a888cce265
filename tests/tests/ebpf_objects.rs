//! Every eBPF object of the repository, given to the verifier of the kernel at hand. `cargo xtask vm` asks other kernels.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use aya::{Ebpf, programs::Program};

/// What the verifier says of a program of a kind that can be loaded without something to attach it to.
fn load(program: &mut Program) -> Option<Result<(), aya::programs::ProgramError>> {
    Some(match program {
        Program::SchedClassifier(program) => program.load(),
        Program::SkSkb(program) => program.load(),
        Program::SkMsg(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::SocketFilter(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        _ => return None,
    })
}

#[test]
fn this_kernel_takes_every_program_of_every_object() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy-ebpf/objects");
    let mut objects: Vec<_> = fs::read_dir(&folder)?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    objects.retain(|path| path.extension().is_some_and(|extension| extension == "o"));
    objects.sort();
    ensure!(!objects.is_empty(), "no object in {}", folder.display());
    let mut refused = Vec::new();
    for path in objects {
        let name = path.file_name().and_then(|name| name.to_str()).context("name of an object")?.to_owned();
        let mut say = |what: &str, outcome: Result<(), String>| match outcome {
            Ok(()) => println!("ebpf: {name} {what}: loaded"),
            Err(error) => {
                println!("ebpf: {name} {what}: {error}");
                refused.push(format!("{name} {what}"));
            }
        };
        let mut object = match Ebpf::load_file(&path) {
            Ok(object) => object,
            Err(error) => {
                say("maps", Err(format!("{:#}", anyhow::Error::from(error))));
                continue;
            }
        };
        for (program, loaded) in object.programs_mut().map(|(program, kind)| (program.to_owned(), load(kind))) {
            match loaded {
                Some(loaded) => say(&program, loaded.map_err(|error| format!("{:#}", anyhow::Error::from(error)))),
                None => println!("ebpf: {name} {program}: of a kind that is not tried here"),
            }
        }
    }
    ensure!(refused.is_empty(), "refused: {}", refused.join(", "));
    Ok(())
}
