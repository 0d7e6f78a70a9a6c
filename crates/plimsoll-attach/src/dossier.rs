//! What is known about a machine: everything that was found, what it allows, and why not more. As text it is what
//! `plimsoll attach --dry-run` prints; as JSON, what `--json` does. Nothing here looks anything up.

use crate::json;
use crate::ram::{RamRange, show};
use crate::rungs::{Hazard, Rung, Rungs};
use crate::vmm::{ControlSocket, Note, Vmm};
use core::fmt;
use plimsoll_sys::procfs::StartTime;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::ByteCount;
use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use std::path::PathBuf;

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Acceleration {
    /// The processor, by KVM.
    Kvm,
    /// The VMM itself: QEMU's TCG.
    Emulated,
}

impl fmt::Display for Acceleration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulated => "emulated, without KVM",
        })
    }
}

/// Which process it is, for ever: numbers come again, numbers with start times do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Identity {
    /// The process.
    #[serde(serialize_with = "json::process")]
    pub process: ProcessId,
    /// When it started.
    #[serde(serialize_with = "json::start")]
    pub start: StartTime,
}

/// A machine as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dossier {
    /// Which process.
    pub identity: Identity,
    /// What kind.
    pub vmm: Vmm,
    /// The machine's name: as given, or made of kind and process id.
    pub name: String,
    /// Its UUID, if it has one.
    pub uuid: Option<String>,
    /// The program.
    pub program: PathBuf,
    /// Who executes the guest.
    pub acceleration: Acceleration,
    /// Whether the guest runs, in the VMM's word, if its control socket was asked.
    pub run_state: Option<String>,
    /// Where it listens.
    pub sockets: Vec<ControlSocket>,
    /// Guest RAM. Empty only for a machine whose memory plimsoll's own pager has.
    pub ram: Vec<RamRange>,
    /// What turns rungs off for the whole machine.
    pub hazards: Vec<Hazard>,
    /// What else is worth knowing.
    pub notes: Vec<Note>,
}

impl Dossier {
    /// The size of all guest RAM.
    pub fn size(&self) -> ByteCount {
        self.ram.iter().map(|range| range.hva.len()).sum()
    }

    /// The range of guest RAM that has all of these addresses.
    pub fn range_with(&self, hva: HvaRange) -> Option<&RamRange> {
        self.ram.iter().find(|range| range.hva.contains(hva))
    }

    /// True when something turns rungs off that ends of itself.
    pub(crate) fn is_passing(&self) -> bool {
        let of_ranges = self.ram.iter().flat_map(|range| &range.hazards);
        self.hazards.iter().chain(of_ranges).any(Hazard::is_passing)
    }

    /// The rungs that are allowed for a range of this machine.
    pub fn rungs_of(&self, range: &RamRange) -> Rungs {
        Rungs::under(self.hazards.iter().chain(&range.hazards))
    }

    /// The rungs that are allowed for some of the machine's RAM.
    pub fn rungs(&self) -> Rungs {
        if self.ram.is_empty() {
            return Rungs::under(self.hazards.iter());
        }
        let parts: Vec<Rungs> = self.ram.iter().map(|range| self.rungs_of(range)).collect();
        Rungs::of_parts(&parts)
    }
}

impl Serialize for Dossier {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Dossier", 13)?;
        fields.serialize_field("name", &self.name)?;
        fields.serialize_field("vmm", &self.vmm)?;
        fields.serialize_field("process", &self.identity.process.get())?;
        fields.serialize_field("start", &self.identity.start.0)?;
        fields.serialize_field("uuid", &self.uuid)?;
        fields.serialize_field("program", &self.program)?;
        fields.serialize_field("acceleration", &self.acceleration)?;
        fields.serialize_field("run_state", &self.run_state)?;
        fields.serialize_field("sockets", &self.sockets)?;
        fields.serialize_field("size", &self.size().0)?;
        fields.serialize_field("ram", &self.ram)?;
        fields.serialize_field("rungs", &self.rungs())?;
        fields.serialize_field("notes", &self.notes)?;
        fields.end()
    }
}

impl fmt::Display for Dossier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}, {}, {}", self.name, self.vmm, self.identity.process, self.acceleration)?;
        writeln!(f, "{}", self.run_state.as_ref().map_or(String::new(), |state| format!(", {state}")))?;
        writeln!(f, "  program  {}", self.program.display())?;
        if let Some(uuid) = &self.uuid {
            writeln!(f, "  uuid     {uuid}")?;
        }
        for socket in &self.sockets {
            writeln!(f, "  control  {socket}")?;
        }
        self.write_ram(f)?;
        let whole = self.rungs();
        let allowed: Vec<Rung> = Rung::ALL.into_iter().filter(|rung| whole.allows(*rung)).collect();
        writeln!(f, "  allowed  {}", if allowed.is_empty() { "nothing".to_owned() } else { list(&allowed) })?;
        write_off(f, "off", &whole, &Rung::ALL)?;
        for range in &self.ram {
            // What is off for this range and on for another.
            write_off(f, &format!("off for {}", range.block), &self.rungs_of(range), &allowed)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "  note     {note}"))
    }
}

fn list(rungs: &[Rung]) -> String {
    rungs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Those of the rungs that are off, each reason once.
fn write_off(f: &mut fmt::Formatter<'_>, title: &str, rungs: &Rungs, among: &[Rung]) -> fmt::Result {
    let mut reasons: Vec<(&Hazard, Vec<Rung>)> = Vec::new();
    for (rung, hazard) in among.iter().filter_map(|&rung| Some((rung, rungs.off(rung)?))) {
        match reasons.iter_mut().find(|(other, _)| *other == hazard) {
            Some((_, same)) => same.push(rung),
            None => reasons.push((hazard, vec![rung])),
        }
    }
    reasons.iter().try_for_each(|(hazard, rungs)| writeln!(f, "  {title:<7}  {}: {hazard}", list(rungs)))
}

impl Dossier {
    fn write_ram(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ram.is_empty() {
            return writeln!(f, "  ram      known to plimsoll's pager only");
        }
        writeln!(f, "  ram      {}", self.size())?;
        let width = self.ram.iter().map(|range| range.block.len()).max().unwrap_or(0);
        for range in &self.ram {
            let (block, size) = (&range.block, range.hva.len());
            write!(f, "    {block:<width$}  {}  {size}, {} in memory", show(range.hva), range.resident)?;
            if range.swapped > ByteCount(0) {
                write!(f, ", {} in swap", range.swapped)?;
            }
            write!(f, ": {}", range.backing)?;
            match range.node {
                Some(node) => writeln!(f, ", bound to node {node}")?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
