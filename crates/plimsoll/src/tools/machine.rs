//! The machine that is looked at, and what a walk of its tables begins with.
//!
//! Enters: a name and what the operator knows. Leaves: where guest RAM lies in both its address spaces, and a processor's paging: from
//! the machine's monitor where one is given, by the VMM's rule and from flags otherwise.
use super::born::Born;
use super::{hex, parse_address, said};
use plimsoll_attach::physical::{Placed, ask, by_rule};
use plimsoll_attach::qmp::{Limits, Qmp, Registers};
use plimsoll_attach::{Dossier, Hazard, Held, Identity, Request, find, inspect, parse_range};
use plimsoll_inspect::{GuestRam, Levels, Outside, Paging, Piece};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::pidfd::Pidfd;
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(clap::Args)]
pub(super) struct MachineArgs {
    /// The machine: its process id, its name or its UUID.
    machine: String,
    /// A QMP socket of the machine's that nobody else uses: tells of registers, and of where RAM lies in the guest.
    #[arg(long, value_name = "SOCKET")]
    qmp: Option<PathBuf>,
    /// The inspection socket of a machine that was born under plimsoll, which tells of both.
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["qmp", "ranges"])]
    inspect: Option<PathBuf>,
    /// Where guest RAM lies, as START-END in hexadecimal, when it cannot be told from outside. May be repeated.
    #[arg(long = "range", value_name = "START-END", value_parser = parse_range)]
    ranges: Vec<HvaRange>,
    /// JSON instead of text.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(clap::Args)]
pub(super) struct ProcessorArgs {
    /// The processor whose tables are walked, by its number: 0 without (`dump`: one that is in its kernel).
    #[arg(long, value_name = "N", conflicts_with = "cr3")]
    cpu: Option<u32>,
    /// The guest's CR3 in hexadecimal, instead of a processor's.
    #[arg(long, value_name = "ADDRESS", value_parser = parse_address)]
    cr3: Option<u64>,
    /// How many levels of tables there are under that CR3: 4 without.
    #[arg(long, value_name = "4|5", requires = "cr3", value_parser = clap::value_parser!(u8).range(4..=5))]
    levels: Option<u8>,
}

impl ProcessorArgs {
    /// The paging that the operator gives.
    pub(super) fn given(&self) -> Option<Paging> {
        let levels = if self.levels == Some(5) { Levels::Five } else { Levels::Four };
        self.cr3.map(|cr3| Paging::assumed(cr3, levels))
    }

    /// The number of the processor that was named.
    pub(super) const fn named(&self) -> Option<u32> {
        self.cpu
    }

    /// The processor's number.
    pub(super) fn number(&self) -> u32 {
        self.cpu.unwrap_or(0)
    }
}

/// Whose paging it is.
pub(super) enum Whose {
    /// A processor's, with all its registers.
    Processor(u32, Box<Registers>),
    /// The operator's word.
    Given,
}

/// What tells of a machine's registers.
pub(super) enum Teller {
    /// QEMU's monitor.
    Monitor(Qmp),
    /// The machine itself.
    Born(Born),
}

impl Teller {
    pub(super) fn processors(&mut self) -> Result<Vec<u32>, String> {
        match self {
            Self::Monitor(qmp) => qmp.processors().map_err(said),
            Self::Born(born) => Ok(born.processors()),
        }
    }

    pub(super) fn registers(&mut self, processor: u32) -> Result<Registers, String> {
        match self {
            Self::Monitor(qmp) => qmp.registers(processor).map_err(said),
            Self::Born(born) => born.registers(processor),
        }
    }
}

/// A machine that is looked at.
pub(super) struct Machine {
    held: Held,
    pub(super) pagemap: Pagemap,
    pub(super) dossier: Dossier,
    pub(super) teller: Option<Teller>,
    /// By whose word RAM lies where it does.
    layout: Layout,
    pub(super) placed: Vec<Placed>,
    pub(super) ram: GuestRam,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Monitor,
    Machine,
    Rule,
}

impl Machine {
    pub(super) fn open(args: &MachineArgs) -> Result<Self, String> {
        if let Some(path) = &args.inspect {
            let born = Born::connect(path)?;
            if !born.is_called(&args.machine) {
                return Err(format!("{} is of {} (pid {})", path.display(), born.name, born.process));
            }
            return Self::born(born);
        }
        let found = find(&args.machine).map_err(said)?.identity;
        let request = Request { ranges: args.ranges.clone(), qmp: args.qmp.clone(), api: None };
        let (held, pagemap, dossier) = hold(found, &request)?;
        let protected = dossier.hazards.iter().find(|hazard| matches!(hazard, Hazard::Confidential { .. }));
        if let Some(hazard) = protected {
            return Err(format!("{} cannot be looked into: {hazard}", dossier.name));
        }
        let (teller, layout, placed) = match &args.qmp {
            Some(path) => {
                let mut qmp = Qmp::connect(path, Limits::default()).map_err(said)?;
                let placed = ask(&mut qmp, &dossier).map_err(said)?;
                (Some(Teller::Monitor(qmp)), Layout::Monitor, placed)
            }
            None => (None, Layout::Rule, by_rule(&held, &dossier).map_err(said)?),
        };
        Self::new((held, pagemap, dossier), teller, layout, placed)
    }

    /// A machine that says itself where its memory is.
    pub(super) fn born(born: Born) -> Result<Self, String> {
        let found = find(&born.process.to_string()).map_err(said)?.identity;
        let (held, pagemap, mut dossier) = hold(found, &Request::default())?;
        let pieces = born.describe(&mut dossier, &pagemap)?;
        let place = |(gpa, hva)| Placed { gpa, hva, block: "ram".to_owned() };
        let placed = pieces.into_iter().map(place).collect();
        Self::new((held, pagemap, dossier), Some(Teller::Born(born)), Layout::Machine, placed)
    }

    fn new(
        (held, pagemap, dossier): (Held, Pagemap, Dossier),
        teller: Option<Teller>,
        layout: Layout,
        placed: Vec<Placed>,
    ) -> Result<Self, String> {
        let pieces = placed.iter().map(|piece| Piece { gpa: piece.gpa, hva: piece.hva }).collect();
        let ram = GuestRam::new(pieces).map_err(said)?;
        Ok(Self { held, pagemap, dossier, teller, layout, placed, ram })
    }

    /// The process that runs it.
    pub(super) fn vmm(&self) -> &Pidfd {
        self.held.pidfd()
    }

    /// Its memory.
    pub(super) fn outside(&self) -> Outside<'_> {
        Outside::new(self.held.process(), &self.ram)
    }

    /// Fails unless the machine is still the one that was looked at.
    pub(super) fn confirm(&self) -> Result<(), String> {
        confirm(&self.held, &self.pagemap)
    }

    /// The paging that was asked for.
    pub(super) fn paging(&mut self, args: &ProcessorArgs) -> Result<(Paging, Whose), String> {
        if let Some(given) = args.given() {
            return Ok((given, Whose::Given));
        }
        let Some(teller) = &mut self.teller else {
            return Err(format!(
                "the registers of {} cannot be told from outside: give its monitor with --qmp, its inspection socket with --inspect, \
                 or a CR3 with --cr3",
                self.dossier.name
            ));
        };
        let all = teller.processors()?;
        let number = args.number();
        if !all.contains(&number) {
            return Err(format!("{} has no processor {number}: it has {all:?}", self.dossier.name));
        }
        let registers = teller.registers(number)?;
        let paging = paging_of(&registers).map_err(|error| format!("processor {number}: {error}"))?;
        Ok((paging, Whose::Processor(number, Box::new(registers))))
    }

    /// The first line of what is shown.
    pub(super) fn title(&self, paging: &Paging, whose: &Whose) -> String {
        let whose = match whose {
            Whose::Processor(number, registers) => {
                format!("processor {number} at {:#x}, CPL {}", registers.rip, registers.privilege)
            }
            Whose::Given => "given".to_owned(),
        };
        let (name, vmm, process) = (&self.dossier.name, self.dossier.vmm, self.dossier.identity.process);
        let levels = levels(paging);
        format!(
            "{name}: {vmm}, {process}; CR3 {:#x} ({whose}), {levels} levels; RAM {}",
            paging.cr3,
            self.by()
        )
    }

    /// By whose word RAM lies where it does.
    pub(super) fn by(&self) -> &'static str {
        match self.layout {
            Layout::Monitor => "as its monitor says",
            Layout::Machine => "as it says itself",
            Layout::Rule => "by rule",
        }
    }

    /// The same in one word.
    pub(super) const fn layout(&self) -> &'static str {
        match self.layout {
            Layout::Monitor => "monitor",
            Layout::Machine => "machine",
            Layout::Rule => "rule",
        }
    }

    /// The first line as fields.
    pub(super) fn values(&self, paging: &Paging, whose: &Whose) -> Value {
        let processor = match whose {
            Whose::Processor(number, _) => Some(number),
            Whose::Given => None,
        };
        json!({
            "name": self.dossier.name,
            "vmm": self.dossier.vmm,
            "process": self.dossier.identity.process.get(),
            "processor": processor,
            "cr3": hex(paging.cr3),
            "levels": levels(paging),
            "layout": self.layout(),
        })
    }
}

/// Takes hold of a machine, and looks at it.
pub(super) fn hold(machine: Identity, request: &Request) -> Result<(Held, Pagemap, Dossier), String> {
    let held = Held::reopen(machine.process, machine.start).map_err(said)?;
    // Before it is looked at: once it executes another program, this is of nothing and not of that.
    let pagemap = Pagemap::open(machine.process).map_err(said)?;
    let dossier = inspect(&held, request).map_err(said)?;
    Ok((held, pagemap, dossier))
}

/// Fails unless the process is still there, with the address space of this page map: of one that is gone scans find nothing, without an
/// error.
pub(super) fn confirm(held: &Held, pagemap: &Pagemap) -> Result<(), String> {
    held.confirm().map_err(said)?;
    match pagemap.is_alive().map_err(said)? {
        true => Ok(()),
        false => Err(format!("{} ended or executed another program while it was looked at", held.process())),
    }
}

fn levels(paging: &Paging) -> u8 {
    match paging.levels {
        Levels::Four => 4,
        Levels::Five => 5,
    }
}

/// What a walk needs of these registers.
pub(super) fn paging_of(registers: &Registers) -> Result<Paging, String> {
    let [cr0, _, cr3, cr4] = registers.control;
    Paging::of(cr0, cr3, cr4, registers.efer).map_err(said)
}
