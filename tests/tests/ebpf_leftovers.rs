//! What the daemon ever put into the kernel's eBPF, with every engine at work: gone after its death and `shunt cleanup`.

use std::{collections::BTreeSet, fs, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::{
    maps::loaded_maps,
    programs::{loaded_links, loaded_programs},
};
use shunt_lab::{
    GATEWAY, Lab, Shunt,
    dialog::echo,
    relay::{Relay, servers},
    scripted::{Behaviour, TcpServer},
    wait_for,
};

const SOON: Duration = Duration::from_secs(10);

/// Ids of eBPF objects, each kind counted by itself.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Objects {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
    links: BTreeSet<u32>,
}

impl Objects {
    /// Of everybody.
    fn of_the_kernel() -> Result<Self> {
        // One that goes while it is asked for is not there.
        Ok(Self {
            programs: loaded_programs().filter_map(|program| Some(program.ok()?.id())).collect(),
            maps: loaded_maps().filter_map(|map| Some(map.ok()?.id())).collect(),
            links: loaded_links().filter_map(|link| Some(link.ok()?.id())).collect(),
        })
    }

    /// Of which a process has descriptors.
    fn of_process(pid: u32) -> Result<Self> {
        let mut objects = Self::default();
        for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
            let number = |name: &str| -> Option<u32> {
                text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
            };
            objects.programs.extend(number("prog_id").filter(|id| *id != 0));
            objects.maps.extend(number("map_id"));
            objects.links.extend(number("link_id"));
        }
        Ok(objects)
    }

    fn and(&self, other: &Self) -> Self {
        let both = |one: &BTreeSet<u32>, other: &BTreeSet<u32>| one.intersection(other).copied().collect();
        Self {
            programs: both(&self.programs, &other.programs),
            maps: both(&self.maps, &other.maps),
            links: both(&self.links, &other.links),
        }
    }
}

#[test]
fn a_killed_daemon_and_cleanup_leave_no_program_map_link_or_pin_of_any_engine() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let _many = TcpServer::start(lab.backend(1), 7, Behaviour::Echo)?;
    let others = format!(
        "[[route]]\nname = \"many\"\nlisten = [\"{GATEWAY}:20000-29999\"]\nengine = \"splice\"\nbackends = [\"10.88.2.2:7\"]\n\
         [[route]]\nname = \"fast\"\nlisten = [\"{GATEWAY}:80\"]\nengine = \"nft\"\nbackends = [\"10.88.2.2:7\"]\n"
    );
    let mut shunt = Shunt::start(&lab, &format!("{}{others}", Relay::routes("")))?;
    let mut streams = Relay::ALL.iter().map(|relay| relay.connect(&lab, &shunt)).collect::<Result<Vec<_>>>()?;
    for port in [24_680, 80] {
        streams.push(lab.client().connect((GATEWAY, port))?);
    }
    streams.iter_mut().try_for_each(|stream| echo(stream, b"at work"))?;
    let held = Objects::of_process(shunt.pid()?)?;
    println!(
        "the daemon holds {} programs, {} maps, {} links; pinned: {:?}",
        held.programs.len(),
        held.maps.len(),
        held.links.len(),
        lab.pins().left()?
    );
    // The verdicts of joined sockets (one for each worker), of ports that are led, of handed-over connections.
    ensure!(held.programs.len() >= 3 && held.maps.len() >= 12 && !held.links.is_empty(), "{held:?}");
    ensure!(held.and(&Objects::of_the_kernel()?) == held, "ids of objects that are there: {held:?}");
    ensure!(!lab.pins().left()?.is_empty(), "handed-over connections have pins");

    shunt.kill9();
    let cleaned = shunt.cli(&["cleanup"])?;
    ensure!(cleaned.status.success(), "{}", String::from_utf8_lossy(&cleaned.stderr));
    ensure!(lab.pins().left()?.is_empty(), "{:?}", lab.pins().left()?);
    // The kernel frees them a while after their last user has gone.
    let mut left = held.clone();
    wait_for("nothing is left", SOON, || {
        left = held.and(&Objects::of_the_kernel().ok()?);
        (left == Objects::default()).then_some(())
    })
    .with_context(|| format!("left: {left:?} of {held:?}"))
}
