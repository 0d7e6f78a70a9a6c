//! One machine's RAM: the part pages may be taken from, and the rest, which is counted only.
//!
//! Enters: a dossier, and each later one. Leaves: what the machine takes and uses. What must never happen: a page asked for
//! where the dossier says the rung is off, or memory left out of the sum because it cannot be managed.
use super::chart::Chart;
use plimsoll_attach::{Dossier, Held, RamRange, Rung};
use plimsoll_linux::explain;
use plimsoll_linux::kernel::{Counter, KernelError, KernelMachine, Totals};
use plimsoll_linux::reclaimer::{Reclaimer, Usage};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::PageCount;
use std::sync::Arc;
use std::time::Instant;

/// A machine's RAM, from outside.
#[derive(Debug)]
pub struct Memory {
    /// `None` where nothing may be taken.
    pub managed: Option<KernelMachine>,
    /// What was done before the last time nothing could be taken.
    past: Totals,
    rest: Counter,
    /// What was last seen of the rest.
    counted: Usage,
}

impl Memory {
    /// Opens it. Nothing is taken.
    ///
    /// # Errors
    /// When its process may not be looked at, in words.
    pub fn open(held: &Held, dossier: &Dossier) -> Result<Self, String> {
        let rest = Counter::open(held.pidfd(), unmanageable(dossier)).map_err(|error| explain(&error))?;
        let mut memory = Self { managed: None, past: Totals::default(), rest, counted: Usage::default() };
        memory.follow(held, dossier)?;
        Ok(memory)
    }

    /// Keeps to what may be managed now.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn follow(&mut self, held: &Held, dossier: &Dossier) -> Result<(), String> {
        let failed = |error: KernelError| explain(&error);
        let ranges = manageable(dossier);
        match &mut self.managed {
            _ if ranges.is_empty() => {
                self.past = self.totals();
                self.managed = None;
            }
            Some(machine) if machine.ranges().eq(ranges.iter().copied()) => {}
            Some(machine) => machine.set_ranges(ranges).map_err(failed)?,
            none => {
                let process = reopen(held)?;
                let machine = KernelMachine::attach(process, ranges, seed(dossier), Instant::now());
                *none = Some(machine.map_err(failed)?);
            }
        }
        self.rest.set_ranges(unmanageable(dossier)).map_err(failed)
    }

    /// Where its pages are, managed or not. Reads the whole page map: about 2 ms for a GiB.
    ///
    /// # Errors
    /// [`KernelError::ProcessGone`], for example.
    pub fn usage(&mut self) -> Result<Usage, KernelError> {
        self.counted = self.rest.usage()?;
        let managed = self.managed.as_mut().map(Reclaimer::usage).transpose()?.unwrap_or_default();
        Ok(Usage {
            resident: managed.resident + self.counted.resident,
            elsewhere: managed.elsewhere + self.counted.elsewhere,
        })
    }

    /// Pages of the part that is managed that were somewhere when [`usage`](Self::usage) looked before, and were nowhere when it
    /// looked last.
    pub fn gone(&self) -> PageCount {
        self.managed.as_ref().map_or(PageCount(0), KernelMachine::gone)
    }

    /// What [`usage`](Self::usage) saw last, of the part that is managed.
    pub(super) fn chart(&self) -> Chart {
        let managed = self.managed.as_ref().map(|machine| Chart::of_blocks(machine.blocks()));
        managed.unwrap_or_else(|| Chart::Seen(Arc::default()))
    }

    /// What the machine uses, when that is known: all there is in RAM of what nothing may be taken from, since nothing tells
    /// which of it.
    pub fn working_set(&self) -> Option<PageCount> {
        Some(self.managed.as_ref()?.working_set()? + self.counted.resident)
    }

    /// What was done to it so far.
    pub fn totals(&self) -> Totals {
        self.past + self.managed.as_ref().map(KernelMachine::totals).unwrap_or_default()
    }
}

/// Why nothing may be taken from the machine, if so.
pub fn why_counted_only(dossier: &Dossier) -> Option<String> {
    let why =
        || dossier.rungs().off(Rung::KernelPaging).map_or("it has no RAM".to_owned(), ToString::to_string);
    manageable(dossier).is_empty().then(why)
}

/// A pidfd of the same process: as long as the first is alive, the number is its own.
///
/// # Errors
/// When the process has ended, in words.
pub fn reopen(held: &Held) -> Result<Pidfd, String> {
    let process = Pidfd::open(held.process()).map_err(|error| explain(&error))?;
    held.confirm().map_err(|refusal| explain(&refusal))?;
    Ok(process)
}

/// The parts of guest RAM from which pages may be taken, ascending.
fn manageable(dossier: &Dossier) -> Vec<HvaRange> {
    ranges(dossier, |range| dossier.rungs_of(range).allows(Rung::KernelPaging))
}

fn unmanageable(dossier: &Dossier) -> Vec<HvaRange> {
    ranges(dossier, |range| !dossier.rungs_of(range).allows(Rung::KernelPaging))
}

fn ranges(dossier: &Dossier, is_wanted: impl Fn(&RamRange) -> bool) -> Vec<HvaRange> {
    let wanted = dossier.ram.iter().filter(|range| is_wanted(range));
    let mut ranges: Vec<HvaRange> = wanted.map(|range| range.hva).collect();
    ranges.sort_by_key(|range| range.start());
    ranges
}

/// Another one for each machine, the same each time it is attached to.
const fn seed(dossier: &Dossier) -> u64 {
    dossier.identity.start.0 ^ (dossier.identity.process.get() as u64) << 40
}
