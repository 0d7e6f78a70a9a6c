//! `plimsoll dump`: memory and registers of a running machine as an ELF core file.
//!
//! Enters: a machine, what of it is wanted, and a path that is not there yet. Leaves: a whole file, or none. What must never happen: a
//! machine that stays paused after this has ended in any way it can notice, or a file that is overwritten.
//!
//! [`source`]: registers, and a machine that stands still meanwhile; [`pause`]: the same by QEMU's monitor. [`room`]: whether it fits into memory. [`notes`]: registers. [`tables`]: what the
//! machine's manager says of its pages. [`copy`]: bytes.
mod copy;
mod notes;
mod pause;
mod room;
mod source;
mod tables;

use super::machine::{Machine, MachineArgs, ProcessorArgs, paging_of};
use super::said;
use crate::demo::Interrupt;
use crate::live::DIRECTORY;
use crate::verb::ended;
use copy::{Copied, Unfinished};
use plimsoll_attach::Hazard;
use plimsoll_attach::qmp::Registers;
use plimsoll_inspect::{GuestRam, Load, PageStates, Paging, headers, trace, visit};
use plimsoll_types::{ByteCount, Gpa, PAGE_SIZE, PageCount};
use serde_json::json;
use source::{Source, Told};
use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tables::Manager;

const PAGE: u64 = PAGE_SIZE as u64;
/// Around a stack pointer: a stack of Linux has four pages, and absent ones on both sides.
const STACK_PAGES: u64 = 8;
/// A guest of 4 GiB whose kernel maps every page apart has as many. 56 MB of headers.
const LOADS_MAX: usize = 1 << 20;

#[derive(clap::Args)]
pub(crate) struct DumpArgs {
    #[command(flatten)]
    machine: MachineArgs,
    /// The file; it must not be there yet.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// All RAM by physical addresses, all that the kernel's half of the address space maps, or registers and kernel stacks.
    #[arg(long, value_enum, default_value = "all")]
    kind: Kind,
    /// Stop the machine while its memory is copied, into memory first, so that all is of one moment. Needs --qmp or --inspect.
    #[arg(long)]
    paused: bool,
    /// Put in, too, what plimsoll's manager says of each page (resident, limbo, stored, zero...): a note called PLIMSOLL. Needs the daemon
    /// to which the machine was handed over.
    #[arg(long)]
    tables: bool,
    /// That daemon's directory, for --tables.
    #[arg(long, value_name = "DIR", default_value = DIRECTORY, env = "PLIMSOLL_DIRECTORY")]
    directory: PathBuf,
    #[command(flatten)]
    processor: ProcessorArgs,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    All,
    Kernel,
    Stacks,
}

pub(crate) fn main(args: &DumpArgs) -> ExitCode {
    ended("dump", run(args))
}

fn run(args: &DumpArgs) -> Result<ExitCode, String> {
    let interrupt = Interrupt::install()?;
    interrupt.add(signal_hook::consts::SIGQUIT)?;
    let mut machine = Machine::open(&args.machine)?;
    let teller = machine.teller.take();
    let mut source = teller.map(|teller| Source::new(teller, machine.vmm()));
    if source.is_none() && (args.paused || args.kind == Kind::Stacks) {
        return Err(
            "it takes the machine's monitor for that, or its inspection socket: give it with --qmp or --inspect".to_owned()
        );
    }
    let migration = machine.dossier.hazards.iter().find(|hazard| matches!(hazard, Hazard::Migrating { .. }));
    if let Some(hazard) = migration.filter(|_| args.paused) {
        return Err(format!("{} is not stopped: {hazard}", machine.dossier.name));
    }
    if args.kind != Kind::Stacks {
        room::check(&machine, args.paused)?;
    }
    // Before anything stands still for it.
    let manager = args.tables.then(|| Manager::of(&machine, &args.directory)).transpose()?;
    let file = Unfinished::create(&args.output)?;
    let (processors, untold) = match &mut source {
        Some(source) => source.begin(args, &interrupt)?,
        None => Told::default(),
    };
    // Before anything is read, which has what is elsewhere brought back.
    let tables = manager.map(|manager| manager.tables(args.paused, || go_on(&interrupt))).transpose()?;
    let mut found = match args.kind {
        Kind::All => all(&machine),
        Kind::Kernel => {
            let (paging, doubt) = paging(args, &processors)?;
            Found { doubts: doubt.into_iter().collect(), ..kernel(&machine, &paging, &interrupt)? }
        }
        Kind::Stacks => stacks(&machine, &processors),
    };
    found.doubts.extend(untold);
    let mut copied = Copied::new(&machine, &interrupt, args.paused, &file);
    let mut notes: Vec<u8> =
        processors.iter().flat_map(|(number, registers)| notes::notes(*number, registers)).collect();
    if let Some(tables) = &tables {
        notes.extend(tables.note().map_err(said)?);
    }
    let head = headers(&found.loads, &notes);
    copied.copy(&found.loads, head.len() as u64)?;
    let paused = match &mut source {
        Some(source) => source.end()?,
        None => None,
    };
    machine.confirm()?;
    let written = copied.finish(&head, machine.ram.size())?;
    file.keep();
    say(args, &machine, written, paused, tables.as_ref(), &found)?;
    let is_whole = found.wrong == 0 && !found.loads.is_empty();
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Fails when a signal asked for the end.
fn go_on(interrupt: &Interrupt) -> Result<(), String> {
    match interrupt.is_set() {
        true => Err("a signal asked for the end; nothing is left of the file".to_owned()),
        false => Ok(()),
    }
}

/// The paging whose kernel half is wanted, and what there is to say against it. Under page-table isolation a processor that runs a
/// user's program has tables that map next to nothing of the kernel.
fn paging(args: &DumpArgs, processors: &[(u32, Registers)]) -> Result<(Paging, Option<String>), String> {
    if let Some(given) = args.processor.given() {
        return Ok((given, None));
    }
    let (number, registers) = chosen(args.processor.named(), processors).ok_or_else(|| {
        let number = args.processor.number();
        format!("there are no registers of processor {number}: give --qmp or --inspect, or a CR3 with --cr3")
    })?;
    let doubt = (registers.privilege != 0).then(|| {
        format!(
            "processor {number} is at CPL {}: where the guest isolates its tables, these map next to nothing of its kernel; try again, \
             or name another with --cpu",
            registers.privilege
        )
    });
    Ok((paging_of(registers)?, doubt))
}

/// The processor that was named, or else one that is in its kernel, one whose tables are walked, or the first.
fn chosen(named: Option<u32>, processors: &[(u32, Registers)]) -> Option<&(u32, Registers)> {
    let rank = |registers: &Registers| (paging_of(registers).is_err(), registers.privilege != 0);
    match named {
        Some(named) => processors.iter().find(|(number, _)| *number == named),
        None => processors.iter().min_by_key(|(_, registers)| rank(registers)),
    }
}

/// What goes into the file, and what there is to say of it.
#[derive(Default)]
struct Found {
    loads: Vec<Load>,
    /// What is wrong with the tables, the first few, and all.
    wrongs: Vec<String>,
    wrong: u64,
    /// What may be missing, and why.
    doubts: Vec<String>,
}

/// All RAM, where the guest has it physically.
fn all(machine: &Machine) -> Found {
    let mut loads = Loads::default();
    for piece in machine.ram.pieces() {
        loads.add(&machine.ram, piece.gpa.0, piece.gpa, piece.hva.len().0);
    }
    Found { loads: loads.0, ..Found::default() }
}

/// RAM that the upper half of the address space maps, and what is wrong with the tables.
fn kernel(machine: &Machine, paging: &Paging, interrupt: &Interrupt) -> Result<Found, String> {
    let mut loads = Loads::default();
    let visited = visit(&machine.outside(), paging, |mapped| {
        if mapped.gva >> 63 == 1 {
            loads.add(&machine.ram, mapped.gva, mapped.gpa, 1u64.checked_shl(mapped.shift).unwrap_or(0));
        }
        match loads.0.len() > LOADS_MAX || interrupt.is_set() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    go_on(interrupt)?;
    if loads.0.len() > LOADS_MAX {
        return Err(format!(
            "the guest's tables map RAM in more than {LOADS_MAX} pieces, which no core file is written of: dump it with --kind all"
        ));
    }
    let wrongs = visited.wrongs.iter().map(ToString::to_string).collect();
    Ok(Found { loads: loads.0, wrongs, wrong: visited.wrong, doubts: Vec::new() })
}

/// Loads, of which one that goes on where the one before ends, in both address spaces, becomes a part of it.
#[derive(Default)]
struct Loads(Vec<Load>);

impl Loads {
    fn add(&mut self, ram: &GuestRam, gva: u64, gpa: Gpa, len: u64) {
        for part in ram.parts(gpa, len) {
            let gva = gva + (part.gpa.0 - gpa.0);
            self.push(Load { gva, gpa: part.gpa, len: part.hva.len().0, offset: part.offset });
        }
    }

    fn push(&mut self, next: Load) {
        let before = self.0.last_mut().filter(|load| {
            load.gva.checked_add(load.len) == Some(next.gva)
                && load.gpa.0 + load.len == next.gpa.0
                && load.offset + load.len == next.offset
        });
        match before {
            Some(load) => load.len += next.len,
            None => self.0.push(next),
        }
    }
}

/// The pages around each processor's stack pointer and instruction, and around the stacks that its task state names.
fn stacks(machine: &Machine, processors: &[(u32, Registers)]) -> Found {
    let outside = machine.outside();
    let (mut pages, mut doubts) = (Vec::new(), Vec::new());
    for (number, registers) in processors {
        let paging = match paging_of(registers) {
            Ok(paging) => paging,
            Err(error) => {
                doubts.push(format!("processor {number} is left out: {error}"));
                continue;
            }
        };
        let leads_to = |gva: u64| Some(trace(&outside, &paging, gva).end.ok()?.gpa);
        let word = |gva: u64| {
            let mut bytes = [0; 8];
            outside.bytes(leads_to(gva)?, &mut bytes).ok()?;
            Some(u64::from_le_bytes(bytes))
        };
        let [.., task] = registers.segments;
        // RSP0 to RSP2 at 4, IST1 to IST7 at 36 (SDM vol. 3, figure "64-Bit TSS Format").
        let named = [4, 12, 20].into_iter().chain((0..7).map(|stack| 36 + 8 * stack));
        let tops = named.filter_map(|at| word(task.base.checked_add(at)?)?.checked_sub(8));
        for pointer in [registers.general[7]].into_iter().chain(tops) {
            let around = |step: fn(u64, u64) -> u64| {
                let page = pointer / PAGE * PAGE;
                let gvas = (0..STACK_PAGES).map(move |count| step(page, count * PAGE));
                gvas.map_while(|gva| Some((gva, leads_to(gva)?)))
            };
            pages.extend(around(u64::wrapping_sub).chain(around(u64::wrapping_add)));
        }
        let code = registers.rip / PAGE * PAGE;
        pages.extend(leads_to(code).map(|gpa| (code, gpa)));
    }
    pages.sort_unstable();
    // Processors with other tables may have other pages at the same address: each is kept.
    pages.dedup();
    let mut loads = Loads::default();
    pages.into_iter().for_each(|(gva, gpa)| loads.add(&machine.ram, gva, gpa, PAGE));
    Found { loads: loads.0, doubts, ..Found::default() }
}

fn say(
    args: &DumpArgs,
    machine: &Machine,
    written: ByteCount,
    paused: Option<Duration>,
    tables: Option<&PageStates>,
    found: &Found,
) -> Result<(), String> {
    let (name, loads) = (&machine.dossier.name, found.loads.len());
    if args.machine.json {
        let value = json!({
            "name": name,
            "file": args.output,
            "loads": loads,
            "written_bytes": written.0,
            "paused_seconds": paused.map(|paused| paused.as_secs_f64()),
            "tables": tables.map(|tables| tables.counts().collect::<BTreeMap<_, _>>()),
            "doubts": found.doubts,
            "wrong": found.wrong,
            "wrongs": found.wrongs,
        });
        return stdout().write_all(format!("{value}\n").as_bytes()).map_err(said);
    }
    let stood =
        paused.map_or_else(String::new, |paused| format!("; it stood still for {} ms", paused.as_millis()));
    let mut text = format!(
        "{name}: {written} that are not zero, in {loads} segments, in {}{stood}\n",
        args.output.display()
    );
    if let Some(tables) = tables {
        let bytes = |(name, pages): (&str, u64)| format!("{} {name}", PageCount(pages).bytes());
        text += &format!("  by its manager: {}\n", tables.counts().map(bytes).collect::<Vec<_>>().join(", "));
    }
    found.doubts.iter().for_each(|doubt| text += &format!("  warning: {doubt}\n"));
    found.wrongs.iter().for_each(|wrong| text += &format!("  wrong: {wrong}\n"));
    match found.wrong.saturating_sub(found.wrongs.len() as u64) {
        0 => {}
        more => text += &format!("  wrong: {more} more, {} in all\n", found.wrong),
    }
    stdout().write_all(text.as_bytes()).map_err(said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_inspect::Piece;
    use plimsoll_sys::HvaRange;
    use plimsoll_types::Hva;

    #[test]
    fn loads_are_joined_as_they_come_where_both_addresses_go_on() {
        let piece =
            |gpa, hva, len| Piece { gpa: Gpa(gpa), hva: HvaRange::new(Hva(hva), ByteCount(len)).unwrap() };
        let ram =
            GuestRam::new(vec![piece(0, 0x10_0000, 4 * PAGE), piece(8 * PAGE, 0x90_0000, 4 * PAGE)]).unwrap();
        let mut loads = Loads::default();
        // Three that go on, one that does not in the guest's RAM, one half of which is no RAM.
        for (gva, gpa, len) in [(0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 8, 1), (4, 10, 4)] {
            loads.add(&ram, gva * PAGE, Gpa(gpa * PAGE), len * PAGE);
        }
        let shown: Vec<_> = loads
            .0
            .iter()
            .map(|load| [load.gva, load.gpa.0, load.len, load.offset].map(|bytes| bytes / PAGE))
            .collect();
        assert_eq!(shown, [[0, 0, 3, 0], [3, 8, 1, 4], [4, 10, 2, 6]]);
    }

    /// In 64-bit mode.
    fn processor(number: u32, privilege: u64) -> (u32, Registers) {
        let registers = Registers {
            privilege,
            control: [0x8005_0033, 0, 0x1000, 0x6f0],
            efer: 0xd01,
            ..Registers::default()
        };
        (number, registers)
    }

    #[test]
    fn a_processor_in_its_kernel_is_preferred_unless_another_was_named() {
        let reset = (0, Registers::default());
        let processors = [reset, processor(1, 3), processor(2, 0), processor(3, 0)];
        let number = |named| chosen(named, &processors).map(|(number, _)| *number);
        assert_eq!([None, Some(1), Some(7)].map(number), [Some(2), Some(1), None]);
        let in_programs = [(3, Registers::default()), processor(4, 3), processor(5, 3)];
        assert_eq!(chosen(None, &in_programs).map(|(number, _)| *number), Some(4));
        assert_eq!(chosen(None, &[]), None);
    }
}
