//! `plimsoll translate`: guest virtual addresses through both stages to the host's frames.
use super::machine::{Machine, MachineArgs, ProcessorArgs};
use super::{entry, hex, parse_address, said, size_of};
use crate::verb::ended;
use plimsoll_inspect::{HostPage, Reached, State, Stop, Trace, Unreadable, trace};
use plimsoll_sys::HvaRange;
use plimsoll_types::{ByteCount, Hva, PAGE_SHIFT};
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct TranslateArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// Guest virtual addresses, in hexadecimal.
    #[arg(value_name = "GVA", value_parser = parse_address, required = true)]
    gvas: Vec<u64>,
    #[command(flatten)]
    processor: ProcessorArgs,
}

pub(crate) fn main(args: &TranslateArgs) -> ExitCode {
    ended("translate", run(args))
}

/// What the host has under the address, as far as it goes.
enum Host {
    /// The guest's tables lead nowhere.
    Nowhere,
    /// They lead to something that is not the guest's RAM.
    NotRam,
    /// A page of the VMM's.
    Page { hva: Hva, block: String, backing: String, page: HostPage },
}

fn run(args: &TranslateArgs) -> Result<ExitCode, String> {
    let mut machine = Machine::open(&args.machine)?;
    let (paging, whose) = machine.paging(&args.processor)?;
    let mut code = ExitCode::SUCCESS;
    let mut found = String::new();
    if !args.machine.json {
        found += &format!("{}\n", machine.title(&paging, &whose));
    }
    for &gva in &args.gvas {
        let trace = trace(&machine.outside(), &paging, gva);
        let host = match &trace.end {
            Ok(reached) => under(&machine, reached)?,
            Err(_) => Host::Nowhere,
        };
        if !matches!(host, Host::Page { .. }) {
            code = ExitCode::FAILURE;
        }
        found += &match args.machine.json {
            true => format!("{}\n", values(gva, machine.values(&paging, &whose), &trace, &host)),
            false => text(gva, &trace, &host),
        };
    }
    machine.confirm()?;
    stdout().write_all(found.as_bytes()).map_err(said)?;
    Ok(code)
}

fn under(machine: &Machine, reached: &Reached) -> Result<Host, String> {
    let Some(hva) = machine.ram.hva(reached.gpa, 1) else { return Ok(Host::NotRam) };
    let range = HvaRange::new(hva, ByteCount(1)).and_then(|byte| machine.dossier.range_with(byte));
    let (block, backing) =
        range.map(|range| (range.block.clone(), range.backing.to_string())).unwrap_or_default();
    let page = HostPage::look(&machine.pagemap, hva).map_err(said)?;
    Ok(Host::Page { hva, block, backing, page })
}

/// The address in its frame.
fn physical(page: &HostPage, hva: Hva) -> Option<u64> {
    page.frame.map(|frame| frame.0 << PAGE_SHIFT | (hva.0 & ((1 << PAGE_SHIFT) - 1)))
}

fn text(gva: u64, trace: &Trace<Unreadable>, host: &Host) -> String {
    let mut text = format!("  guest virtual   {gva:#x}\n");
    for seen in &trace.seen {
        let again = seen.again.map(|level| format!(" (the table of {level} again)")).unwrap_or_default();
        text += &format!(
            "  {}  {:#012x} [{:>3}]  {:#018x}  {}{again}\n",
            seen.level,
            seen.at.0,
            seen.index,
            seen.raw,
            entry::words(&seen.entry)
        );
    }
    match &trace.end {
        Err(stop) => return text + &format!("  goes nowhere    {}\n", why(stop)),
        Ok(reached) => {
            let (size, may) = (size_of(reached.shift), entry::may(reached.permissions));
            text += &format!("  guest physical  {:#x}, in a page of {size}: {may}\n", reached.gpa.0);
        }
    }
    match host {
        Host::Nowhere => text,
        Host::NotRam => text + "  host            nothing: this is no RAM, but a device's or firmware's\n",
        Host::Page { hva, block, backing, page } => {
            text += &format!("  host virtual    {:#x}, block {block}: {backing}\n", hva.0);
            let huge = if page.is_huge { "a part of a huge page" } else { "a page of 4K" };
            text += &match (page.state, physical(page, *hva)) {
                (State::Present | State::Zero, Some(at)) => {
                    let zero = if page.state == State::Zero { ", the one page of zeros" } else { "" };
                    format!("  host physical   {at:#x}, {huge}{zero}\n")
                }
                (State::Present | State::Zero, None) => {
                    format!("  host physical   in RAM, {huge}; it takes CAP_SYS_ADMIN to see its frame\n")
                }
                (State::Swapped, _) => "  host physical   none: the page is in swap\n".to_owned(),
                (State::Absent, _) => {
                    "  host physical   none: the page has not been touched, or was given back\n".to_owned()
                }
            };
            text
        }
    }
}

fn why(stop: &Stop<Unreadable>) -> String {
    plimsoll_linux::explain(stop)
}

fn values(gva: u64, mut object: Value, trace: &Trace<Unreadable>, host: &Host) -> Value {
    object["gva"] = hex(gva);
    object["entries"] = trace.seen.iter().map(entry::values).collect();
    match &trace.end {
        Ok(reached) => {
            object["gpa"] = hex(reached.gpa.0);
            object["guest_page"] = size_of(reached.shift).0.into();
            object["may"] = entry::may_values(reached.permissions);
        }
        Err(stop) => {
            let (level, at) = match stop {
                Stop::Absent { level, at }
                | Stop::Malformed { level, at, .. }
                | Stop::Memory { level, at, .. } => (Some(level.0), Some(hex(at.0))),
                _ => (None, None),
            };
            object["fault"] = json!({ "level": level, "at": at, "text": why(stop) });
        }
    }
    object["host"] = match host {
        Host::Nowhere | Host::NotRam => Value::Null,
        Host::Page { hva, block, backing, page } => json!({
            "hva": hex(hva.0),
            "block": block,
            "backing": backing,
            "state": page.state.word(),
            "huge": page.is_huge,
            "frame": page.frame.map(|frame| hex(frame.0)),
            "physical": physical(page, *hva).map(hex),
        }),
    };
    object
}
