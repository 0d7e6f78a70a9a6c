//! `plimsoll audit`: the frames of all machines are disjoint, but for what a sharing domain shares.
use super::born::Born;
use super::machine::{confirm, hold};
use super::{hex, said};
use crate::verb::ended;
use plimsoll_attach::vmm::Vmm;
use plimsoll_attach::{Dossier, Held, Identity, RamBacking, RamRange, Request, discover};
use plimsoll_inspect::{Audit, Census, Owner, Shared, audit};
use plimsoll_sys::HvaRange;
use plimsoll_sys::frames::Frames;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_types::PageCount;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

/// Violations that are told of as text.
const SHOWN_MAX: usize = 16;

#[derive(clap::Args)]
pub(crate) struct AuditArgs {
    /// The machines: process ids, names or UUIDs. Without any, and without --inspect: all of this host.
    machines: Vec<String>,
    /// Machines that may share merged pages with each other, separated by commas. May be repeated; a machine of none is a domain of its
    /// own.
    #[arg(long = "domain", value_name = "NAME,NAME...")]
    domains: Vec<String>,
    /// The inspection socket of a machine that was born under plimsoll, which says where its memory is. May be repeated.
    #[arg(long = "inspect", value_name = "SOCKET")]
    sockets: Vec<PathBuf>,
    /// JSON instead of text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &AuditArgs) -> ExitCode {
    ended("audit", run(args))
}

/// A machine that is audited.
struct Machine {
    held: Held,
    dossier: Dossier,
    pagemap: Pagemap,
    ranges: Vec<HvaRange>,
    /// Those that are private mappings of files.
    files: Vec<HvaRange>,
    domain: usize,
    census: Census,
}

fn run(args: &AuditArgs) -> Result<ExitCode, String> {
    let (mut machines, mut left_out) = machines(args)?;
    for (number, domain) in (machines.len()..).zip(&args.domains) {
        join(&mut machines, domain, number)?;
    }
    let frames = Frames::open().map_err(said)?;
    let gone = |machine: &Machine| {
        let why = confirm(&machine.held, &machine.pagemap).err()?;
        Some(format!("{}: {why}", machine.dossier.name))
    };
    let (found, ended) = settle(&mut machines, |machines| look(machines, &frames), gone)?;
    if machines.is_empty() && !ended.is_empty() && !args.machines.is_empty() {
        return Err(ended.join("; "));
    }
    left_out.extend(ended);
    let shown = match args.json {
        true => format!("{}\n", values(&machines, &left_out, &found)),
        false => text(&machines, &left_out, &found),
    };
    stdout().write_all(shown.as_bytes()).map_err(said)?;
    Ok(if found.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What a look at those finds that stay to its end, and why the others are left out: their frames may be another's by then.
fn settle<M, R>(
    machines: &mut Vec<M>,
    mut look: impl FnMut(&mut [M]) -> Result<R, String>,
    gone: impl Fn(&M) -> Option<String>,
) -> Result<(R, Vec<String>), String> {
    let mut ended = Vec::new();
    loop {
        let looked = look(machines);
        let count = machines.len();
        machines.retain(|machine| {
            let why = gone(machine);
            ended.extend(why.clone());
            why.is_none()
        });
        if machines.len() == count {
            return Ok((looked?, ended));
        }
    }
}

/// Counts their memory, and looks at their frames.
fn look(machines: &mut [Machine], frames: &Frames) -> Result<Audit, String> {
    for machine in &mut *machines {
        machine.census = Census::default();
        for range in &machine.ranges {
            machine.census += Census::take(&machine.pagemap, *range).map_err(said)?;
        }
    }
    let owners = machines.iter().map(|machine| {
        let Machine { pagemap, ranges, files, domain, .. } = machine;
        Owner { pagemap, ranges, files, domain: *domain }
    });
    audit(&owners.collect::<Vec<_>>(), frames).map_err(said)
}

/// The machines that were asked for, or all; and why some of all are left out.
fn machines(args: &AuditArgs) -> Result<(Vec<Machine>, Vec<String>), String> {
    let AuditArgs { machines: wanted, sockets, .. } = args;
    let (mut machines, mut left_out) = (Vec::new(), Vec::new());
    let found = discover().map_err(said)?;
    for path in sockets {
        let born = Born::connect(path)?;
        let identity = found.find(&born.process.to_string()).map_err(said)?.identity;
        add(&mut machines, &born.name, identity, Some(&born))?;
    }
    if wanted.is_empty() && sockets.is_empty() {
        if found.unreadable > 0 {
            left_out.push(format!("{} machines of other users", found.unreadable));
        }
        for sighting in &found.machines {
            match open(sighting.identity, machines.len(), None) {
                Ok(machine) => machines.push(machine),
                Err(why) => left_out.push(format!("{}: {why}", sighting.name)),
            }
        }
    }
    for name in wanted {
        let identity = found.find(name).map_err(said)?.identity;
        add(&mut machines, name, identity, None)?;
    }
    Ok((machines, left_out))
}

/// One that was asked for. Named twice, all of its frames would seem to belong to two machines.
fn add(
    machines: &mut Vec<Machine>,
    name: &str,
    identity: Identity,
    born: Option<&Born>,
) -> Result<(), String> {
    if machines.iter().any(|machine| machine.dossier.identity == identity) {
        return Err(format!("{name} is named twice"));
    }
    let machine = open(identity, machines.len(), born)?;
    machines.push(machine);
    Ok(())
}

fn open(identity: Identity, domain: usize, born: Option<&Born>) -> Result<Machine, String> {
    let (held, pagemap, mut dossier) = hold(identity, &Request::default())?;
    match born {
        Some(born) => {
            born.describe(&mut dossier, &pagemap)?;
        }
        None if dossier.vmm == Vmm::Plimsoll => {
            return Err(
                "only it knows where its memory is: give its inspection socket with --inspect".to_owned()
            );
        }
        None => {}
    }
    let ranges = dossier.ram.iter().map(|range| range.hva).collect();
    let is_file = |range: &&RamRange| {
        matches!(range.backing, RamBacking::PrivateFile { .. } | RamBacking::PrivateMemory { .. })
    };
    let files = dossier.ram.iter().filter(is_file).map(|range| range.hva).collect();
    Ok(Machine { held, dossier, pagemap, ranges, files, domain, census: Census::default() })
}

/// Puts the machines of a list into one domain.
fn join(machines: &mut [Machine], names: &str, domain: usize) -> Result<(), String> {
    for name in names.split(',').filter(|name| !name.is_empty()) {
        let is_it = |machine: &&mut Machine| {
            let Dossier { name: own, uuid, identity, .. } = &machine.dossier;
            own == name || uuid.as_deref() == Some(name) || identity.process.get().to_string() == name
        };
        let mut found = machines.iter_mut().filter(is_it);
        match (found.next(), found.next()) {
            (Some(machine), None) => machine.domain = domain,
            (Some(_), Some(_)) => {
                return Err(format!("several machines are called {name}: give process ids"));
            }
            (None, _) => {
                return Err(format!("{name} of --domain is not among the machines that are audited"));
            }
        }
    }
    Ok(())
}

/// A frame that must not be shared, in a sentence.
fn complaint(machines: &[Machine], shared: &Shared) -> String {
    let pages = shared.pages.iter().filter_map(|held| {
        let machine = machines.get(held.machine)?;
        Some(format!("{} at {:#x}", machine.dossier.name, held.hva.0))
    });
    let how =
        if shared.is_merged { "was merged across sharing domains" } else { "belongs to more than one page" };
    format!("frame {:#x} {how}: {}", shared.frame.0, pages.collect::<Vec<_>>().join(", "))
}

fn text(machines: &[Machine], left_out: &[String], found: &Audit) -> String {
    let width = machines.iter().map(|machine| machine.dossier.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for machine in machines {
        let Census { present, zero, swapped, absent, .. } = machine.census;
        text += &format!(
            "{:<width$}  {}: {present} present, {zero} zero, {swapped} swapped, {absent} absent\n",
            machine.dossier.name,
            machine.census.total()
        );
    }
    let [frames, merged] = [found.frames, found.merged].map(|count| PageCount(count).bytes());
    text += &format!("{frames} in frames; {merged} of the machines' pages share one as they may\n");
    if found.files > 0 {
        text += &format!(
            "{} of their pages are a file's, mapped private and never written, and share one as they may\n",
            PageCount(found.files).bytes()
        );
    }
    if found.passing > 0 {
        text += &format!("{} frames changed hands while they were looked at\n", found.passing);
    }
    left_out.iter().for_each(|why| text += &format!("left out: {why}\n"));
    let shown = found.violations.iter().take(SHOWN_MAX);
    shown.for_each(|shared| text += &format!("violation: {}\n", complaint(machines, shared)));
    if found.violations.len() > SHOWN_MAX {
        text += &format!("violation: {} frames more, see --json\n", found.violations.len() - SHOWN_MAX);
    }
    text + match (found.violations.len(), machines.len()) {
        (0, 0) => "there is no machine to audit\n",
        (0, _) => "no frame is shared that must not be\n",
        _ => "frames are shared that must not be\n",
    }
}

fn values(machines: &[Machine], left_out: &[String], found: &Audit) -> Value {
    let machine = |machine: &Machine| {
        let Census { present, huge, zero, swapped, absent } = machine.census;
        json!({
            "name": machine.dossier.name,
            "process": machine.dossier.identity.process.get(),
            "domain": machine.domain,
            "size": machine.census.total().0,
            "present_bytes": present.0,
            "huge_bytes": huge.0,
            "zero_bytes": zero.0,
            "swapped_bytes": swapped.0,
            "absent_bytes": absent.0,
        })
    };
    let violation = |shared: &Shared| {
        let pages = shared.pages.iter().filter_map(|held| {
            let name = &machines.get(held.machine)?.dossier.name;
            Some(json!({ "name": name, "hva": hex(held.hva.0) }))
        });
        let pages: Vec<Value> = pages.collect();
        json!({
            "frame": hex(shared.frame.0),
            "merged": shared.is_merged,
            "pages": pages,
            "text": complaint(machines, shared),
        })
    };
    json!({
        "machines": machines.iter().map(machine).collect::<Vec<_>>(),
        "left_out": left_out,
        "frames": found.frames,
        "merged_pages": found.merged,
        "file_pages": found.files,
        "passing": found.passing,
        "violations": found.violations.iter().map(violation).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_ends_meanwhile_is_left_out_and_the_others_are_looked_at_again() {
        let mut machines = vec![1, 2, 3];
        let mut looks = 0;
        let look = |machines: &mut [i32]| {
            looks += 1;
            match machines.contains(&2) {
                true => Err("2 is gone".to_owned()),
                false => Ok(machines.to_vec()),
            }
        };
        let gone = |machine: &i32| (*machine == 2).then(|| "2 ended".to_owned());
        assert_eq!(settle(&mut machines, look, gone), Ok((vec![1, 3], vec!["2 ended".to_owned()])));
        assert_eq!(looks, 2);
    }

    #[test]
    fn what_fails_while_all_are_there_is_an_error() {
        let look = |_: &mut [i32]| Err::<(), _>("no frames".to_owned());
        assert_eq!(settle(&mut vec![1], look, |_| None), Err("no frames".to_owned()));
    }
}
