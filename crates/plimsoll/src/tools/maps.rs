//! `plimsoll maps`: the guest's physical address space, and what the host has under each piece of it.
use super::machine::{Machine, MachineArgs};
use super::{hex, said};
use crate::verb::ended;
use plimsoll_attach::Hazard;
use plimsoll_inspect::{Census, merged};
use plimsoll_sys::frames::Frames;
use plimsoll_sys::{HvaRange, procfs};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::io::{Write, stdout};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(crate) struct MapsArgs {
    #[command(flatten)]
    machine: MachineArgs,
}

pub(crate) fn main(args: &MapsArgs) -> ExitCode {
    ended("maps", run(args))
}

/// A piece of guest RAM and what the host has of it.
struct Row {
    gpa: u64,
    hva: HvaRange,
    block: String,
    backing: String,
    census: Census,
    /// What KSM has merged, where that can be told.
    merged: Option<ByteCount>,
}

fn run(args: &MapsArgs) -> Result<ExitCode, String> {
    let machine = Machine::open(&args.machine)?;
    let process = machine.dossier.identity.process;
    let pagemap = &machine.pagemap;
    let frames = match procfs::is_mergeable(process).map_err(said)? {
        true => Frames::open().map(Some),
        // Nothing of it can be merged, whoever asks.
        false => Ok(None),
    };
    let rows = machine.placed.iter().map(|piece| {
        let range = machine.dossier.range_with(piece.hva);
        let backing = range.map(|range| range.backing.to_string()).unwrap_or_default();
        let merged = match &frames {
            Ok(Some(frames)) => merged(pagemap, frames, piece.hva).map_err(said)?,
            Ok(None) => Some(ByteCount(0)),
            Err(_) => None,
        };
        let census = Census::take(pagemap, piece.hva).map_err(said)?;
        Ok(Row { gpa: piece.gpa.0, hva: piece.hva, block: piece.block.clone(), backing, census, merged })
    });
    let rows = rows.collect::<Result<Vec<Row>, String>>()?;
    machine.confirm()?;
    let shown = match args.machine.json {
        true => format!("{}\n", values(&machine, &rows)),
        false => text(&machine, &rows),
    };
    stdout().write_all(shown.as_bytes()).map_err(said)?;
    Ok(ExitCode::SUCCESS)
}

/// What devices reach, in a sentence.
fn reach(machine: &Machine) -> String {
    match direct(machine).as_slice() {
        [] => "none has direct access to guest RAM; the VMM's own reach all of it".to_owned(),
        files => format!(
            "{} may reach all guest RAM by physical address, and pins what it was given; what its IOMMU maps does not show",
            files.join(", ")
        ),
    }
}

/// Files through which a device has direct access.
fn direct(machine: &Machine) -> Vec<&str> {
    let files = machine.dossier.hazards.iter().filter_map(|hazard| match hazard {
        Hazard::DirectDevice { file } => Some(file.as_str()),
        _ => None,
    });
    files.collect()
}

fn sum(rows: &[Row]) -> (Census, Option<ByteCount>) {
    let mut all = Census::default();
    rows.iter().for_each(|row| all += row.census);
    (all, rows.iter().map(|row| row.merged).sum())
}

fn text(machine: &Machine, rows: &[Row]) -> String {
    let (dossier, by) = (&machine.dossier, machine.by());
    let size: ByteCount = rows.iter().map(|row| row.hva.len()).sum();
    let mut text =
        format!("{}: {}, {}; {size} of RAM, {by}\n", dossier.name, dossier.vmm, dossier.identity.process);
    let width = rows.iter().map(|row| row.block.len()).max().unwrap_or(0).max("block".len());
    let title = ["size", "present", "as huge", "zero", "swapped", "absent", "merged"]
        .map(|word| format!("{word:>8}"));
    text += &format!("  {:<27}{}  {:<width$}  host virtual\n", "guest physical", title.concat(), "block");
    let mut next = 0;
    for row in rows {
        if row.gpa > next {
            let hole = ByteCount(row.gpa - next);
            text += &format!("  {next:#013x}-{:#013x}{:>8}  not RAM\n", row.gpa, hole.to_string());
        }
        next = row.gpa + row.hva.len().0;
        text += &format!(
            "  {:#013x}-{next:#013x}{:>8}{}  {:<width$}  {:#x}: {}\n",
            row.gpa,
            row.hva.len().to_string(),
            counted(&row.census, row.merged),
            row.block,
            row.hva.start().0,
            row.backing
        );
    }
    let (all, merged) = sum(rows);
    text += &format!("  {:<27}{:>8}{}\n", "together", size.to_string(), counted(&all, merged));
    text += &format!("  devices  {}\n", reach(machine));
    if merged.is_none() {
        text += "  note     it takes CAP_SYS_ADMIN to see which pages are merged\n";
    }
    dossier.notes.iter().for_each(|note| text += &format!("  note     {note}\n"));
    text
}

fn counted(census: &Census, merged: Option<ByteCount>) -> String {
    let known = [census.present, census.huge, census.zero, census.swapped, census.absent]
        .map(|bytes| bytes.to_string());
    let merged = merged.map_or_else(|| "?".to_owned(), |bytes| bytes.to_string());
    known.iter().chain([&merged]).map(|text| format!("{text:>8}")).collect()
}

fn values(machine: &Machine, rows: &[Row]) -> Value {
    let census = |census: &Census, merged: Option<ByteCount>| {
        json!({
            "present_bytes": census.present.0,
            "huge_bytes": census.huge.0,
            "zero_bytes": census.zero.0,
            "swapped_bytes": census.swapped.0,
            "absent_bytes": census.absent.0,
            "merged_bytes": merged.map(|bytes| bytes.0),
        })
    };
    let pieces = rows.iter().map(|row| {
        json!({
            "gpa": hex(row.gpa),
            "size": row.hva.len().0,
            "hva": hex(row.hva.start().0),
            "block": row.block,
            "backing": row.backing,
            "states": census(&row.census, row.merged),
        })
    });
    let (all, merged) = sum(rows);
    json!({
        "name": machine.dossier.name,
        "vmm": machine.dossier.vmm,
        "process": machine.dossier.identity.process.get(),
        "layout": machine.layout(),
        "size": rows.iter().map(|row| row.hva.len().0).sum::<u64>(),
        "pieces": pieces.collect::<Vec<_>>(),
        "states": census(&all, merged),
        "direct_devices": direct(machine),
        "notes": machine.dossier.notes,
    })
}
