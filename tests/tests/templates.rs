//! `nft-templates/`: the readable spec. What is planned prints as the template says, and what is programmed by netlink
//! lists as what `nft -f` makes of the template.
//!
//! `UPDATE_TEMPLATES=1` writes them anew after a wanted change.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use proxy_core::{
    capability::Capabilities,
    config,
    diff::{Ownership, Preview, diff},
    flow::MarkLayout,
    plan::plan,
    ruleset::{print, skeleton},
};
use proxy_userspace::kernel::nft::{KernelNft, Nft};
use shunt_tests::{in_new_namespace, nft_listing, nft_load};

const SKELETON: &str = "skeleton.nft";

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../nft-templates")
}

struct Template {
    path: PathBuf,
    /// The leading comment: prose, and the configuration behind `#|`.
    header: String,
    script: String,
    preview: Preview,
}

fn template(path: PathBuf) -> Result<Template> {
    let text = fs::read_to_string(&path)?;
    let header: String = text.lines().take_while(|l| l.starts_with('#')).map(|l| format!("{l}\n")).collect();
    let script = text[header.len()..].to_owned();
    let behind = |mark: &str| header.lines().filter_map(move |l| l.strip_prefix(mark)).collect::<Vec<_>>();
    let config = config::parse(&behind("#|").join("\n"), &path).map_err(|p| anyhow::anyhow!("{p}"))?;
    let backends = || config.routes.iter().flat_map(|r| &r.backends);
    let down = behind("#down ");
    let down = backends().filter(|b| down.contains(&b.target.to_string().as_str())).map(|b| b.target.clone());
    let plan = plan(&config, &Capabilities::all());
    ensure!(plan.unserved().is_empty(), "{}: {:?}", path.display(), plan.unserved());
    let preview = plan.preview(MarkLayout::new(config.kernel.mark_mask), &down.collect::<Vec<_>>());
    Ok(Template { path, header, script, preview })
}

fn templates() -> Result<Vec<Template>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder())?.map(|e| Ok(e?.path())).collect::<Result<_>>()?;
    paths.retain(|p| p.extension().is_some_and(|e| e == "nft") && !p.ends_with(SKELETON));
    paths.sort();
    ensure!(paths.len() >= 15, "only {} templates", paths.len());
    paths.into_iter().map(template).collect()
}

fn the_skeleton() -> String {
    let header = "# The static part of the table, the same whatever the routes are: chains, and sets that routes fill.\n\
                  # Every other template adds to this one.\n\n";
    format!("{header}{}", print(&skeleton(MarkLayout::new(config::MarkMask::DEFAULT))))
}

#[test]
fn every_template_is_what_its_configuration_is_planned_to() -> Result<()> {
    let update = std::env::var_os("UPDATE_TEMPLATES").is_some();
    let skeleton = folder().join(SKELETON);
    if update {
        fs::write(&skeleton, the_skeleton())?;
    }
    ensure!(fs::read_to_string(&skeleton)? == the_skeleton(), "{SKELETON} is not what is planned");
    for template in templates()? {
        let planned = format!("\n{}", print(&template.preview.additions()));
        if update {
            fs::write(&template.path, format!("{}{planned}", template.header))?;
        } else {
            ensure!(planned == template.script, "{} is not what is planned:\n{planned}", template.path.display());
        }
    }
    Ok(())
}

#[test]
fn netlink_programs_what_nft_makes_of_the_template() -> Result<()> {
    for template in templates()? {
        let name = template.path.display().to_string();
        let script = fs::read_to_string(&template.path)?;
        let by_script = in_new_namespace(move || -> Result<String> {
            nft_load(&fs::read_to_string(folder().join(SKELETON))?)?;
            nft_load(&script)?;
            nft_listing()
        })?
        .with_context(|| format!("nft -f {name}"))?;
        let wanted = template.preview.ruleset();
        let by_netlink = in_new_namespace(move || -> Result<String> {
            let mut nft = KernelNft::open()?;
            let nothing = nft.snapshot()?;
            let changes = diff(wanted.clone(), &nothing, Ownership::Shared, |rule| nft.fingerprint(rule));
            nft.apply(&changes)?;
            let left = diff(wanted, &nft.snapshot()?, Ownership::Shared, |rule| nft.fingerprint(rule));
            ensure!(left.is_empty(), "read back, it differs: {left:?}");
            nft_listing()
        })?
        .with_context(|| format!("netlink {name}"))?;
        let (by_script, by_netlink) = (sorted(&by_script), sorted(&by_netlink));
        let only =
            |a: &[String], b: &[String]| a.iter().filter(|x| !b.contains(x)).cloned().collect::<Vec<_>>().join("\n\n");
        ensure!(
            by_script == by_netlink,
            "{name}: only nft -f made\n{}\nonly netlink made\n{}",
            only(&by_script, &by_netlink),
            only(&by_netlink, &by_script)
        );
    }
    Ok(())
}

/// Sets, chains and elements are listed in the order they were made or hashed: compared as blocks, elements sorted.
fn sorted(listing: &str) -> Vec<String> {
    let mut blocks: Vec<String> = listing
        .split("\n\t}\n")
        .map(|block| {
            let mut lines: Vec<String> = Vec::new();
            let (head, elements) = block.split_once("elements = {").unwrap_or((block, ""));
            lines.extend(head.lines().filter(|l| !l.is_empty() && !l.starts_with("table ")).map(str::to_owned));
            let mut elements: Vec<String> =
                elements.trim_end().trim_end_matches('}').split(',').map(|e| e.trim().to_owned()).collect();
            elements.sort();
            lines.extend(elements);
            lines.join("\n")
        })
        .collect();
    blocks.sort();
    blocks
}
