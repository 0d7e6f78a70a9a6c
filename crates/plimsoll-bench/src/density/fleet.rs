//! Guests that run together under one way: from their start to the last check of their memory.
//!
//! Enters: a mix and a way. Leaves: what each guest did while time was taken. What must never happen: a wrong word, or a guest
//! with less memory than its like had under another way.
use super::mix::{Begins, Mix, Role};
use super::score::{Swings, Work};
use super::ways::Host;
use crate::guest::Guest;
use crate::session::{BenchError, Interrupt};
use anyhow::{anyhow, ensure};
use plimsoll_sys::procfs;
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::{Command, Event, StopMode};
use plimsoll_vmm::report::Summary;
use std::time::{Duration, Instant};

/// How often a way gets its turn, and guests are heard.
const PERIOD: Duration = Duration::from_millis(20);
/// How long guests work before time is taken: the kernel has merged what it can, estimates are there.
const WARM: Duration = Duration::from_secs(6);
/// How long time is taken.
pub(super) const MEASURED: Duration = Duration::from_secs(6);
/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often it is looked whether guarantees are kept.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Pages that must have come back in that time for a guest to count as one that wants memory.
const WANTING: u64 = 32;
/// What of a machine's memory the counters of its process may be wrong by: 64 pages for each processor.
const UNCOUNTED: ByteCount = ByteCount(512 << 10);

/// What the kernel may take beyond a limit at most: its batches, and pages that KSM has charged to another guest's group and that this one
/// has to copy.
const MISSED: ByteCount = ByteCount::mib(2);

/// A guest and what it said last.
pub(super) struct Member {
    pub(super) role: &'static Role,
    pub(super) guest: Guest,
    pub(super) last: Summary,
    /// Commands it has done, and the pages of all of them.
    answered: usize,
    answered_pages: u64,
    /// What its balloon has settled at since it was told a target.
    pub(super) settled: Option<ByteCount>,
    died: Option<String>,
    is_done: bool,
}

impl Member {
    fn new(role: &'static Role, guest: Guest) -> Self {
        let last = Summary::default();
        Self { role, guest, last, answered: 0, answered_pages: 0, settled: None, died: None, is_done: false }
    }

    /// Whether it has all its memory.
    pub(super) fn has_started(&self) -> bool {
        self.answered >= self.role.start().len()
    }

    /// Whether it is at work on no more than it was promised.
    pub(super) fn is_within_reservation(&self) -> bool {
        self.is_alive() && self.has_started() && self.has().is_some_and(|has| has <= self.role.reservation)
    }

    /// What it cannot be denied: what it was promised and has use for.
    fn due(&self) -> ByteCount {
        self.role.reservation.min(self.role.kept)
    }

    /// Its memory that is there, unless it has ended.
    fn has(&self) -> Option<ByteCount> {
        let anonymous = |statm: procfs::Statm| statm.resident.saturating_sub(statm.shared).bytes();
        procfs::statm(self.guest.process().process()).ok().map(anonymous)
    }

    /// The least that its control group, in which is so much, may be held to: what it was promised, and what is no memory of the guest's.
    pub(super) fn least(&self, used: ByteCount) -> ByteCount {
        self.role.reservation + used.saturating_sub(self.has().unwrap_or_default()) + MISSED
    }

    /// Whether it can be told anything.
    pub(super) const fn is_alive(&self) -> bool {
        self.died.is_none() && !self.is_done
    }

    /// Whether it had all its memory, and found it as it should be in the end.
    fn check(&self) -> anyhow::Result<()> {
        let Self { role: Role { name, kept, .. }, last, died, .. } = self;
        ensure!(
            last.wrong_words == 0,
            "{name} found {} wrong words: the numbers mean nothing",
            last.wrong_words
        );
        if let Some(why) = died {
            eprintln!("  {name} died: {why}");
            return Ok(());
        }
        if self.role.begins == Begins::Boots && !self.has_started() {
            // It has done nothing, which counts.
            eprintln!("  {name} had not got all its memory when time was over");
            return Ok(());
        }
        let asked: u64 = self.role.start().iter().map(|probe| probe.pages).sum();
        ensure!(
            self.answered_pages >= asked,
            "{name} got and freed {} pages of {asked}",
            self.answered_pages
        );
        ensure!(
            last.checked_pages >= kept.pages_floor().0,
            "{name} checked {} pages of its {kept}",
            last.checked_pages
        );
        Ok(())
    }

    fn listen(&mut self) -> Result<(), BenchError> {
        while self.is_alive() {
            match self.guest.heard() {
                Ok(None) => return Ok(()),
                Ok(Some(Event::Report(summary))) => self.last = summary,
                Ok(Some(Event::Done(summary))) => (self.last, self.is_done) = (summary, true),
                Ok(Some(Event::Probed(report))) => {
                    self.answered += 1;
                    self.answered_pages += report.pages;
                }
                Ok(Some(Event::Ballooned { ballooned_bytes, .. })) => {
                    self.settled = Some(ByteCount(ballooned_bytes))
                }
                Ok(Some(Event::Merging { refused: Some(why), .. })) => {
                    return Err(anyhow!("a guest could not offer its memory to KSM: {why}").into());
                }
                Ok(Some(Event::Died { reason, .. } | Event::Error { message: reason })) => {
                    self.died = Some(reason)
                }
                Ok(Some(_)) => {}
                Err(BenchError::Failed(error)) => self.died = Some(format!("{error:#}")),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What one way came to.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) works: Vec<Work>,
    /// Looks at which a guest had less than it was promised and wanted more.
    pub(super) violations: u64,
    /// Targets that moved back and forth.
    pub(super) swings: u64,
    /// Memory in use while time was taken, zram's included.
    pub(super) used: Used,
}

/// What looks found in use.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Used {
    /// The most.
    pub(super) peak: ByteCount,
    /// Over time.
    byte_micros: u128,
    micros: u128,
}

impl Used {
    /// So much, for so long.
    fn note(&mut self, now: ByteCount, elapsed: Duration) {
        self.peak = self.peak.max(now);
        self.micros += elapsed.as_micros();
        self.byte_micros += u128::from(now.0) * elapsed.as_micros();
    }

    /// On average.
    pub(super) fn mean(&self) -> ByteCount {
        ByteCount(u64::try_from(self.byte_micros / self.micros.max(1)).unwrap_or(u64::MAX))
    }
}

struct Fleet<'a> {
    members: Vec<Member>,
    way: &'a mut dyn Host,
    interrupt: &'a Interrupt,
    /// In use since it was cleared.
    used: Used,
}

/// Runs the guests of a mix under a way.
pub(super) fn run(mix: &Mix, way: &mut dyn Host, interrupt: &Interrupt) -> Result<Outcome, BenchError> {
    let mut fleet = Fleet { members: Vec::new(), way, interrupt, used: Used::default() };
    for (nth, role) in mix.roles().enumerate() {
        let guest = fleet.way.admit(role, role.config(nth))?;
        fleet.members.push(Member::new(role, guest));
    }
    // One after the other, so that the kernel alone is not asked for more than it reclaims in that time.
    for nth in 0..fleet.members.len() {
        if fleet.members[nth].role.begins != Begins::Boots {
            fleet.populate(nth)?;
        }
    }
    fleet.begin(|begins| begins == Begins::Warm);
    fleet.go_on(WARM)?;
    let outcome = fleet.measure()?;
    fleet.finish()?;
    Ok(outcome)
}

impl Fleet<'_> {
    /// Hears the guests, and has the way do what it does every few milliseconds.
    fn turn(&mut self) -> Result<(), BenchError> {
        let begun = Instant::now();
        self.interrupt.check()?;
        self.members.iter_mut().try_for_each(Member::listen)?;
        self.way.tick(&mut self.members)?;
        self.used.note(self.way.used(), begun.elapsed().max(PERIOD));
        std::thread::sleep(PERIOD.saturating_sub(begun.elapsed()));
        Ok(())
    }

    fn go_on(&mut self, time: Duration) -> Result<(), BenchError> {
        let start = Instant::now();
        while start.elapsed() < time {
            self.turn()?;
        }
        Ok(())
    }

    fn until(&mut self, what: &str, is_so: impl Fn(&[Member]) -> bool) -> Result<(), BenchError> {
        let start = Instant::now();
        while !is_so(&self.members) {
            if start.elapsed() >= PATIENCE {
                return Err(anyhow!("waited in vain for {what}").into());
            }
            self.turn()?;
        }
        Ok(())
    }

    fn populate(&mut self, nth: usize) -> Result<(), BenchError> {
        let role = self.members[nth].role;
        for (done, probe) in role.start().into_iter().enumerate() {
            let _ = self.members[nth].guest.ask(probe);
            self.until("a guest to have its memory", |members| {
                members[nth].answered > done || members[nth].died.is_some()
            })?;
        }
        Ok(())
    }

    /// Starts the work of those that begin now. One that is gone is found to be so when it is heard.
    fn begin(&self, now: impl Fn(Begins) -> bool) {
        for member in self.members.iter().filter(|member| now(member.role.begins)) {
            let start = if member.role.begins == Begins::Boots { member.role.start() } else { Vec::new() };
            for probe in start.into_iter().chain([member.role.work()]) {
                let _ = member.guest.ask(probe);
            }
        }
    }

    fn measure(&mut self) -> Result<Outcome, BenchError> {
        let before: Vec<Summary> = self.members.iter().map(|member| member.last.clone()).collect();
        self.begin(|begins| begins != Begins::Warm);
        let start = Instant::now();
        let (mut violations, mut swings) = (0, Swings::default());
        self.used = Used::default();
        let mut refaults: Vec<u64> = self.refaults();
        while start.elapsed() < MEASURED {
            self.go_on(LOOK_EVERY)?;
            let now = self.refaults();
            let came_back = now.iter().zip(&refaults).map(|(now, before)| now.saturating_sub(*before));
            let looks = self.members.iter().zip(came_back);
            violations += looks.filter(|(member, pages)| is_cheated(member, *pages)).count() as u64;
            refaults = now;
            for nth in 0..self.members.len() {
                if let Some(target) = self.way.target(nth) {
                    swings.note(nth, target, start.elapsed());
                }
            }
        }
        let work = |(member, before): (&Member, &Summary)| {
            Work::between(before, &member.last, member.died.as_ref().map(|_| start.elapsed()))
        };
        let works = self.members.iter().zip(&before).map(work).collect();
        Ok(Outcome { works, violations, swings: swings.count, used: self.used })
    }

    fn refaults(&self) -> Vec<u64> {
        self.members.iter().enumerate().map(|(nth, member)| self.way.refaults(nth, member)).collect()
    }

    /// Has every guest compare all its memory once more and end.
    fn finish(&mut self) -> Result<(), BenchError> {
        for member in self.members.iter().filter(|member| member.is_alive()) {
            let _ = member.guest.tell(&Command::Stop { mode: StopMode::Finish });
        }
        self.until("guests to check their memory", |members| !members.iter().any(Member::is_alive))?;
        self.members.iter().try_for_each(Member::check)?;
        Ok(())
    }
}

/// Whether it has less than it was promised and has use for, although it brings memory back. A tenth less is none: samples of
/// what it uses are taken from it, too.
fn is_cheated(member: &Member, came_back: u64) -> bool {
    came_back >= WANTING
        && member.has().is_some_and(|has| has + UNCOUNTED < ByteCount(member.due().0 / 10 * 9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_on_average_goes_by_how_long_it_was() {
        let mut used = Used::default();
        assert_eq!((used.mean(), used.peak), (ByteCount(0), ByteCount(0)));
        used.note(ByteCount(300), Duration::from_secs(3));
        used.note(ByteCount(100), Duration::from_secs(1));
        assert_eq!((used.mean(), used.peak), (ByteCount(250), ByteCount(300)));
    }
}
