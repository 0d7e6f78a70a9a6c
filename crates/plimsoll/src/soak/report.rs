//! What a soak counted and what it found, for people and (`--json`) for programs.
use plimsoll_linux::uffd::host::Host;
use plimsoll_linux::uffd::probe::Step;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Counts over all guests of a run, those that were killed included.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(super) struct Pages {
    pub(super) captured: u64,
    /// Brought back before they were touched.
    pub(super) brought_ahead: u64,
    /// Of a working set that was recorded, asked for when the guest came back to it.
    pub(super) replayed: u64,
    /// In blocks that were taken as one huge page.
    pub(super) taken_whole: u64,
    /// Moves that the kernel refused twice.
    pub(super) refused: u64,
    /// Given back by guests.
    pub(super) discarded: u64,
    /// Compared whole by guests with what they should contain.
    pub(super) verified: u64,
    /// Read from outside to make moves fail.
    pub(super) read_from_outside: u64,
    /// Discards that met a page in use; they read as zeros, as they should.
    pub(super) anomalies: u64,
}

impl std::ops::AddAssign for Pages {
    fn add_assign(&mut self, other: Self) {
        self.captured += other.captured;
        self.brought_ahead += other.brought_ahead;
        self.replayed += other.replayed;
        self.taken_whole += other.taken_whole;
        self.refused += other.refused;
        self.discarded += other.discarded;
        self.verified += other.verified;
        self.read_from_outside += other.read_from_outside;
        self.anomalies += other.anomalies;
    }
}

/// The outcome of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct SoakReport {
    /// Of this schema. A field is never renamed, only added.
    pub(super) version: u32,
    pub(super) seed: u64,
    pub(super) run_by: String,
    pub(super) seconds: u64,
    pub(super) guests: usize,
    pub(super) size_bytes: u64,
    pub(super) budget_bytes: u64,
    pub(super) peak_bytes: u64,
    pub(super) peak_source: String,
    /// Actions of the schedule that were done.
    pub(super) actions: u64,
    /// Managers that took over from another.
    pub(super) takeovers: u64,
    /// Crashes by the step at which they struck.
    pub(super) crashes: BTreeMap<String, u64>,
    /// Ordered crashes whose step was not reached in time; the manager was stopped in good order instead.
    pub(super) crashes_not_struck: u64,
    pub(super) guests_killed: u64,
    pub(super) pages: Pages,
    /// Stored pages that were packed densely.
    pub(super) packed: u64,
    /// Stored pages that were moved to empty slabs.
    pub(super) moved: u64,
    /// Blocks of small pages that were made huge again.
    pub(super) collapsed: u64,
    /// Looks of the governor at which it passed over a guest because most of what is taken from it comes back.
    pub(super) backoffs: u64,
    pub(super) wrong_words: u64,
    /// Everything that went wrong; empty when the run passed.
    pub(super) failures: Vec<String>,
}

impl SoakReport {
    pub(super) fn crashed(&mut self, step: Step) {
        *self.crashes.entry(format!("{step:?}")).or_default() += 1;
    }

    /// Adds what the housekeeper of a manager that is gone has done.
    pub(super) fn tidied(&mut self, host: &Host) {
        let tidied = host.tidied(|tidied| *tidied);
        self.packed += tidied.packed;
        self.moved += tidied.moved;
        self.collapsed += tidied.collapsed;
        self.backoffs += host.backoffs();
    }

    /// One line while it runs.
    pub(super) fn progress(&self, second: u64, pages: Pages, wrong_words: u64) -> String {
        format!(
            "{second:>5} s: {} actions, {} takeovers ({} after a crash), {} guests killed; pages: {} captured, {} refused, \
             {} discarded, {} verified; {wrong_words} wrong words",
            self.actions,
            self.takeovers,
            self.crashes.values().sum::<u64>(),
            self.guests_killed,
            pages.captured,
            pages.refused,
            pages.discarded,
            pages.verified,
        )
    }

    /// The tally a person reads.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Pages {
            captured,
            brought_ahead,
            replayed,
            taken_whole,
            refused,
            discarded,
            verified,
            read_from_outside,
            anomalies,
        } = self.pages;
        writeln!(
            out,
            "{} actions: {} takeovers, {} guests killed",
            self.actions, self.takeovers, self.guests_killed
        )?;
        let not_struck = self.crashes_not_struck;
        writeln!(out, "crashes by step ({not_struck} more were ordered at steps not reached in time):")?;
        for step in Step::ALL {
            let name = format!("{step:?}");
            writeln!(out, "  {name:<16} {:>5}", self.crashes.get(&name).unwrap_or(&0))?;
        }
        writeln!(
            out,
            "pages: {captured} captured ({taken_whole} of them in whole blocks), {brought_ahead} brought ahead, {replayed} asked for \
             as a working set, {refused} refused, {discarded} discarded ({anomalies} of them while in use), {verified} verified, \
             {read_from_outside} read from outside"
        )?;
        writeln!(out, "in the store: {} packed, {} moved", self.packed, self.moved)?;
        writeln!(
            out,
            "{} blocks made huge again; {} times somebody who thrashed was passed over",
            self.collapsed, self.backoffs
        )?;
        let (budget, peak) = (ByteCount(self.budget_bytes), ByteCount(self.peak_bytes));
        writeln!(out, "budget {budget}, peak {peak} ({})", self.peak_source)?;
        for failure in &self.failures {
            writeln!(out, "FAILED: {failure}")?;
        }
        if self.failures.is_empty() {
            writeln!(out, "passed: {} wrong words", self.wrong_words)?;
        }
        Ok(())
    }
}
