//! `plimsoll splinter`: how many of a guest's large pages are large through both stages, and what of a TLB's reach the rest costs.
use super::machine::{Machine, MachineArgs, ProcessorArgs};
use super::said;
use crate::verb::ended;
use plimsoll_inspect::{Under, Unreadable, Visited, visit};
use plimsoll_mmu::splinter::Splinter;
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::ops::ControlFlow;
use std::process::ExitCode;

/// Entries of the second-level TLB of Intel's server cores since 2015, for pages of 4 KiB and 2 MiB together.
const TLB_ENTRIES: u64 = 1536;

#[derive(clap::Args)]
pub(crate) struct SplinterArgs {
    #[command(flatten)]
    machine: MachineArgs,
    #[command(flatten)]
    processor: ProcessorArgs,
    /// Entries of the TLB whose reach is told.
    #[arg(long, value_name = "N", default_value_t = TLB_ENTRIES)]
    tlb: u64,
}

pub(crate) fn main(args: &SplinterArgs) -> ExitCode {
    ended("splinter", run(args))
}

/// One half of the address space.
#[derive(Default)]
struct Half {
    splinter: Splinter,
    /// Bytes that the guest maps to something that is no RAM: devices.
    devices: ByteCount,
}

fn run(args: &SplinterArgs) -> Result<ExitCode, String> {
    let mut machine = Machine::open(&args.machine)?;
    let (paging, whose) = machine.paging(&args.processor)?;
    let under = Under::look(&machine.pagemap, &machine.ram).map_err(said)?;
    let (mut user, mut kernel) = (Half::default(), Half::default());
    let visited = visit(&machine.outside(), &paging, |mapped| {
        let half = if mapped.gva >> 63 == 0 { &mut user } else { &mut kernel };
        let size = super::size_of(mapped.shift);
        if machine.ram.reaches(mapped.gpa, size.0) {
            half.splinter += under.splinter(mapped);
        } else {
            half.devices += size;
        }
        ControlFlow::Continue(())
    });
    machine.confirm()?;
    let halves = [("kernel", kernel), ("user", user)];
    let shown = match args.machine.json {
        true => format!("{}\n", values(machine.values(&paging, &whose), &halves, &visited, args.tlb)),
        false => format!("{}\n{}", machine.title(&paging, &whose), text(&halves, &visited, args.tlb)),
    };
    stdout().write_all(shown.as_bytes()).map_err(said)?;
    Ok(if visited.wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn text(halves: &[(&str, Half)], visited: &Visited<Unreadable>, tlb: u64) -> String {
    let title = ["pages", "large", "whole", "maps", "absent", "entries", "reach", "of", "lost"];
    let title: String = title.iter().map(|word| format!("{word:>9}")).collect();
    let mut text = format!("  {:<7}{title}\n", "");
    for (name, half) in halves {
        let (found, reach) = (&half.splinter, half.splinter.reach(tlb));
        let sizes = [found.bytes + found.absent, found.absent].map(|bytes| ByteCount(bytes).to_string());
        let reaches = [reach.both, reach.guest, reach.lost()].map(|bytes| ByteCount(bytes).to_string());
        let counts = [found.leaves, found.large, found.whole].map(|count| count.to_string());
        let entries = found.entries.to_string();
        let all = counts.iter().chain(&sizes).chain([&entries]).chain(&reaches).cloned();
        text += &format!("  {name:<7}{}\n", all.map(|text| format!("{text:>9}")).collect::<String>());
    }
    for (name, half) in halves {
        let [host, guest] = [half.splinter.split_by_host, half.splinter.split_by_guest].map(ByteCount);
        text += &format!(
            "  {name}: {host} in large pages of the guest's over small ones, {guest} the other way round"
        );
        text += &match half.devices {
            ByteCount(0) => "\n".to_owned(),
            devices => format!("; {devices} that are no RAM left out\n"),
        };
    }
    text += &format!(
        "  {} tables read, {} entries name one of them again; reach is of {tlb} entries\n",
        visited.tables, visited.aliases
    );
    if visited.self_maps > 0 {
        text += &format!("  {} entries of the root name the root: a self map, left out\n", visited.self_maps);
    }
    for wrong in &visited.wrongs {
        text += &format!("  wrong: {wrong}\n");
    }
    let told = visited.wrongs.len() as u64;
    if visited.wrong > told {
        text += &format!("  wrong: {} more\n", visited.wrong - told);
    }
    text
}

fn values(mut object: Value, halves: &[(&str, Half)], visited: &Visited<Unreadable>, tlb: u64) -> Value {
    for (name, half) in halves {
        let (found, reach) = (&half.splinter, half.splinter.reach(tlb));
        object[*name] = json!({
            "pages": found.leaves,
            "large": found.large,
            "whole": found.whole,
            "entries": found.entries,
            "mapped_bytes": found.bytes + found.absent,
            "absent_bytes": found.absent,
            "split_by_host_bytes": found.split_by_host,
            "split_by_guest_bytes": found.split_by_guest,
            "device_bytes": half.devices.0,
            "reach_bytes": reach.both,
            "guest_reach_bytes": reach.guest,
            "lost_bytes": reach.lost(),
        });
    }
    object["tlb_entries"] = tlb.into();
    object["tables"] = visited.tables.into();
    object["aliases"] = visited.aliases.into();
    object["self_maps"] = visited.self_maps.into();
    object["wrong"] = visited.wrong.into();
    object["wrongs"] = visited.wrongs.iter().map(ToString::to_string).collect();
    object
}
