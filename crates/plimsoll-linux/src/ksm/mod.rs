//! Resident sharing: KSM, told which blocks have twins, and run only while that pays.
//!
//! Enters: the machines of one sharing domain, with a way to have their blocks marked. Leaves: machines whose equal pages are
//! kept once while they stay in use, and what that cost. What must never happen: pages of two domains merged with each
//! other; KSM left running, or set otherwise than it was found; a page brought back from swap to be looked at.
//!
//! The kernel's samepage merging finds equal pages by looking at everything that is mergeable, over and over; what does not
//! merge costs as much as what does, and it never stops. So:
//!
//! * `scout` looks at few pages of each block, and [`plimsoll_core::twins`] says which blocks are worth it.
//! * A [`Marker`] has the machine's own process mark those blocks. Nobody else can: `process_madvise` refuses
//!   MADV_MERGEABLE (EINVAL, Linux 6.18), and `PR_SET_MEMORY_MERGE` is the process's own, too. A machine that marked all its
//!   memory when it started (QEMU's mem-merge=on) has none; KSM looks at all of that, and only the pace helps.
//! * [`pace`] runs ksmd after something was marked, and stops it when it does not pay any more.
//! * [`domains`] refuses what must not share. [`control`] is KSM itself.
//!
//! A [`Guide`] has no thread and no clock. Its owner calls [`Guide::round`] every some seconds (about 1.5 us a page looked at, 1/32
//! of memory a round at first) and [`Guide::tick`] some times a second while KSM runs.
//!
//! # Known holes
//! * Marking a block splits its mapping; a process has at most 65,530 of them (vm.max_map_count), so neighbours are marked
//!   together. A machine that refuses keeps its block unmarked for a while.
//! * KSM's counters go on counting pages of processes that ended until ksmd comes by: what is saved is overstated while it rests.
//! * Memory of a file (a memfd) cannot be merged, and marking it does nothing: it is marked in vain once, and rests.
//! * The rest of a range beyond whole blocks is never marked.
pub mod control;
pub mod domains;
pub mod pace;
mod scout;

use self::control::{ControlError, Counters, Ksm, Takeover};
use self::domains::{Domain, DomainError, Party};
use self::pace::{Order, Pace, Policy, Reason};
use self::scout::{Blocks, Scout};
use plimsoll_core::twins::{Limits, Place, Seen, Twins, Verdict};
use plimsoll_sys::mapping::Merging;
use plimsoll_sys::procfs;
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{BlockIndex, DomainId, MachineId, PageCount, PageIndex};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

/// Rounds after which marked blocks are judged again although nothing was merged: their pages may have changed.
const JUDGE_EVERY: u64 = 32;
/// Rounds between two tries of KSM over machines that marked everything by themselves, and what they grow to.
const TRY_FIRST: u64 = 8;
const TRY_MAX: u64 = 512;

/// Has the process of a machine change what KSM may merge.
pub trait Marker {
    /// Marks a range of whole blocks, or takes the mark back. On return it is done.
    ///
    /// # Errors
    /// Whatever keeps the process from it; the blocks count as unmarked then.
    fn mark(&mut self, range: HvaRange, merging: Merging) -> io::Result<()>;
}

/// A machine whose pages may be merged.
pub struct Member {
    /// Its identity.
    pub id: MachineId,
    /// What the operator calls it.
    pub name: String,
    /// Its process.
    pub process: ProcessId,
    /// Its sharing domain; none is one of its own.
    pub domain: Option<DomainId>,
    /// Where its memory is, in whole blocks.
    pub ranges: Vec<HvaRange>,
    /// Marks its blocks. None for a machine that has marked all its memory by itself.
    pub marker: Option<Box<dyn Marker>>,
}

/// How to share.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What finding twins may cost.
    pub limits: Limits,
    /// What merging is worth.
    pub policy: Policy,
    /// Whether KSM is taken from somebody else.
    pub takeover: Takeover,
    /// Makes the order of looking repeatable.
    pub seed: u64,
}

impl Default for Options {
    /// KSM is taken from nobody.
    fn default() -> Self {
        let (limits, policy) = (Limits::default(), Policy::default());
        Self { limits, policy, takeover: Takeover::IfIdle, seed: 0x5eed }
    }
}

/// Why there is no sharing, or none any more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KsmError {
    /// KSM cannot be had.
    #[error("KSM cannot be guided")]
    Control(#[from] ControlError),
    /// It would cross a border. If KSM ran, everything was unmerged.
    #[error("memory cannot be shared")]
    Domains(#[from] DomainError),
}

/// What is to become of merged pages at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merged {
    /// They stay merged until they are written.
    Keep,
    /// Marks are withdrawn, and every page is its machine's own again.
    Undo,
}

/// What a round did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Round {
    /// Blocks marked, and the pages that saves at least.
    pub marked: usize,
    /// As far as was seen.
    pub saves: PageCount,
    /// Blocks whose marks were taken back because they did not pay.
    pub unmarked: usize,
    /// Machines that ended, or could not be looked at, and are forgotten.
    pub left: Vec<MachineId>,
}

/// What sharing has brought and cost since it began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Pages saved now on the whole host.
    pub saved: PageCount,
    /// Pages merged since the guide began, those that were unmerged meanwhile taken off.
    pub merged: PageCount,
    /// Bytes saved, less KSM's own tables.
    pub profit_bytes: i64,
    /// Processor time of ksmd.
    pub ksmd: Duration,
    /// Our own, for looking at pages.
    pub scout: Duration,
    /// What was looked at, and how many blocks are marked.
    pub seen: Seen,
    /// Blocks that machines did not mark when asked.
    pub refused: u64,
    /// Pages of each machine that are merged, as its process counts them.
    pub machines: Vec<(MachineId, PageCount)>,
}

impl Report {
    /// Processor time for each page merged; none before there is one.
    pub fn cost(&self) -> Option<Duration> {
        let pages = u32::try_from(self.merged.0).ok().filter(|pages| *pages > 0)?;
        Some((self.ksmd + self.scout) / pages)
    }
}

/// A block of a machine.
type Key = (MachineId, BlockIndex);

struct Machine {
    member: Member,
    blocks: Blocks,
    scout: Scout,
}

/// Shares the pages of the machines of one domain. Dropping it gives KSM back as it was found; marks and what is merged stay.
pub struct Guide {
    ksm: Ksm,
    machines: BTreeMap<MachineId, Machine>,
    twins: Twins,
    pace: Pace,
    rounds: u64,
    /// Something was merged, perhaps, since marks were judged.
    is_judging_due: bool,
    /// Everything was unmerged because somebody was in the way.
    is_suspended: bool,
    /// The round of the next try over machines that marked everything, and how long that is from the last.
    next_try: (u64, u64),
    /// Counters at the beginning.
    began: Counters,
    scout: Duration,
    refused: u64,
}

impl Guide {
    /// Takes KSM, which does not run before something is marked.
    ///
    /// # Errors
    /// [`KsmError::Domains`] when machines of different domains, or processes that are none of these machines, could be
    /// merged; nothing is changed then. [`KsmError::Control`] when somebody else drives KSM or it cannot be set.
    pub fn start(members: Vec<Member>, options: Options) -> Result<Self, KsmError> {
        domains::check(&members.iter().map(party).collect::<Vec<_>>())?;
        let mut ksm = Ksm::take(options.takeover)?;
        // Whoever else's memory is mergeable was in the way of those whose is.
        let has_nothing_merged = |member: &Member| {
            !procfs::is_mergeable(member.process).unwrap_or(true)
                || merged(member).is_some_and(|pages| pages == PageCount(0))
        };
        if members.iter().all(has_nothing_merged) {
            // Nothing of anybody who is there is merged, so this unmerges nothing. It settles the counters, which otherwise go on
            // counting pages of processes that are gone until ksmd gets there.
            ksm.unmerge_all()?;
        }
        let began = ksm.counters()?;
        let mut guide = Self {
            ksm,
            machines: BTreeMap::new(),
            twins: Twins::new(options.limits, options.seed),
            pace: Pace::new(options.policy),
            rounds: 0,
            is_judging_due: false,
            is_suspended: false,
            next_try: (1, TRY_FIRST),
            began,
            scout: Duration::ZERO,
            refused: 0,
        };
        members.into_iter().for_each(|member| guide.enlist(member));
        Ok(guide)
    }

    /// Takes one more machine, whose identity no other has.
    ///
    /// # Errors
    /// [`KsmError::Domains`]: it must not share with those that are here, which go on as before.
    pub fn add(&mut self, member: Member) -> Result<(), KsmError> {
        let mut parties = self.parties();
        parties.push(party(&member));
        domains::check(&parties)?;
        self.enlist(member);
        Ok(())
    }

    /// Lets a machine go. Its pages are its own again.
    pub fn remove(&mut self, id: MachineId) {
        let marked: Vec<Key> = self.twins.marked().filter(|(machine, _)| *machine == id).collect();
        // One that does not answer any more is gone, or will be.
        self.mark(&marked, Merging::Withdrawn);
        self.forget(id);
    }

    fn enlist(&mut self, member: Member) {
        // One that ended meanwhile is none.
        let Ok(scout) = Scout::open(member.process) else { return };
        let blocks = Blocks::of(&member.ranges);
        if member.marker.is_some() {
            self.twins.add(member.id, blocks.count());
        }
        self.machines.insert(member.id, Machine { member, blocks, scout });
    }

    fn forget(&mut self, id: MachineId) {
        self.machines.remove(&id);
        self.twins.remove(id);
    }

    fn parties(&self) -> Vec<Party> {
        self.machines.values().map(|machine| party(&machine.member)).collect()
    }

    /// Looks at pages, has blocks marked and unmarked, and wakes KSM if there is something new.
    ///
    /// # Errors
    /// [`KsmError`]. After [`KsmError::Domains`] nothing is merged any more and KSM rests, until a round finds that nobody
    /// is in the way any more.
    pub fn round(&mut self) -> Result<Round, KsmError> {
        self.check_domains()?;
        self.rounds += 1;
        let mut round = Round::default();
        if self.pace.is_idle() && (self.is_judging_due || self.rounds.is_multiple_of(JUDGE_EVERY)) {
            self.is_judging_due = false;
            round.unmarked = self.judge();
        }
        let before = thread_time();
        round.left = self.look();
        let worth = self.twins.turn();
        self.scout += thread_time().saturating_sub(before);
        let blocks: Vec<Key> = worth.iter().map(|worth| (worth.machine, worth.block)).collect();
        let refused = self.mark(&blocks, Merging::Offered);
        for (machine, block) in &refused {
            self.twins.unmark(*machine, *block);
        }
        self.refused += refused.len() as u64;
        round.marked = worth.len() - refused.len();
        round.saves = worth.iter().map(|worth| worth.saves).sum();
        if round.marked > 0 || std::mem::take(&mut self.is_suspended) || self.is_try_due() {
            self.pace.wake(&self.ksm.counters()?);
            self.tick()?;
        }
        Ok(round)
    }

    /// Sees what KSM saves and at what cost, and sets its pace. To be called some times a second while it runs.
    ///
    /// # Errors
    /// [`KsmError::Control`].
    pub fn tick(&mut self) -> Result<Order, KsmError> {
        if self.pace.is_idle() {
            return Ok(Order::Stop);
        }
        let order = self.pace.decide(&self.ksm.counters()?);
        match order {
            Order::Run(rate) => self.ksm.run(rate)?,
            Order::Stop => {
                self.ksm.stop()?;
                self.is_judging_due = true;
            }
        }
        Ok(order)
    }

    /// Why KSM runs or rests.
    pub const fn reason(&self) -> Reason {
        self.pace.reason()
    }

    /// What sharing has brought and cost so far.
    ///
    /// # Errors
    /// [`KsmError::Control`].
    pub fn report(&self) -> Result<Report, KsmError> {
        let now = self.ksm.counters()?;
        let of_machine =
            |(id, machine): (&MachineId, &Machine)| (*id, merged(&machine.member).unwrap_or_default());
        Ok(Report {
            saved: now.saved(),
            merged: now.saved().saturating_sub(self.began.saved()),
            profit_bytes: now.profit_bytes,
            ksmd: now.cpu.saturating_sub(self.began.cpu),
            scout: self.scout,
            seen: self.twins.seen(),
            refused: self.refused,
            machines: self.machines.iter().map(of_machine).collect(),
        })
    }

    /// Gives KSM back as it was found, and returns the last report.
    ///
    /// # Errors
    /// [`KsmError::Control`]: settings that could not be restored stay on record.
    pub fn end(mut self, merged: Merged) -> Result<Report, KsmError> {
        self.ksm.stop()?;
        let report = self.report()?;
        if merged == Merged::Undo {
            let marked: Vec<Key> = self.twins.marked().collect();
            // A machine that is gone has nothing merged.
            self.mark(&marked, Merging::Withdrawn);
            // Nothing of the host is mergeable that is not ours.
            self.ksm.unmerge_all()?;
        }
        self.ksm.restore()?;
        Ok(report)
    }

    fn check_domains(&mut self) -> Result<(), KsmError> {
        let checked = domains::check(&self.parties());
        if checked.is_err() {
            self.is_suspended = true;
            self.is_judging_due = false;
            self.pace.rest();
            // Pages may have been merged across the border since the last look.
            self.ksm.unmerge_all()?;
        }
        Ok(checked?)
    }

    /// Looks at the pages drawn. Returns the machines that could not be looked at, which are forgotten.
    fn look(&mut self) -> Vec<MachineId> {
        let has_left = |(id, machine): (&MachineId, &Machine)| machine.scout.has_left().then_some(*id);
        let mut left: Vec<MachineId> = self.machines.iter().filter_map(has_left).collect();
        left.iter().for_each(|id| self.forget(*id));
        let mut places: Vec<Place> = Vec::new();
        self.twins.draw(&mut places);
        for of_machine in places.chunk_by(|one, next| one.machine == next.machine) {
            let Some(id) = of_machine.first().map(|place| place.machine) else { continue };
            let Some(Machine { blocks, scout, .. }) = self.machines.get_mut(&id) else { continue };
            let pages: Vec<PageIndex> = of_machine.iter().map(|place| place.page).collect();
            let saw = |page, look| self.twins.saw(Place { machine: id, page }, look);
            if scout.look(blocks, &pages, saw).is_err() {
                left.push(id);
            }
        }
        left.iter().for_each(|id| self.forget(*id));
        left
    }

    /// Sees how much merged in marked blocks, and has those that do not pay unmarked. Returns how many.
    fn judge(&mut self) -> usize {
        let marked: Vec<Key> = self.twins.marked().collect();
        let mut barren = Vec::new();
        for (id, block) in marked {
            let merged = self.machines.get(&id).and_then(|machine| {
                let range = machine.blocks.block(block)?;
                machine.scout.merged(range).ok()
            });
            if self.twins.judge(id, block, PageCount(merged.unwrap_or(0))) == Verdict::Unmark {
                barren.push((id, block));
            }
        }
        // A process that does not answer keeps its marks, which cost a little and harm nobody.
        self.mark(&barren, Merging::Withdrawn);
        barren.len()
    }

    /// Has blocks, ascending, marked or unmarked, neighbours together. Returns those that were not.
    fn mark(&mut self, blocks: &[Key], merging: Merging) -> Vec<Key> {
        let mut refused = Vec::new();
        let place =
            |key: &Key| (*key, self.machines.get(&key.0).and_then(|machine| machine.blocks.block(key.1)));
        let placed: Vec<(Key, Option<HvaRange>)> = blocks.iter().map(place).collect();
        let are_neighbours = |(one, before): &(Key, Option<HvaRange>),
                              (next, after): &(Key, Option<HvaRange>)| {
            one.0 == next.0 && before.zip(*after).is_some_and(|(before, after)| before.end() == after.start())
        };
        for run in placed.chunk_by(are_neighbours) {
            let [(first, from), ..] = run else { continue };
            let to = run.last().and_then(|(_, to)| *to);
            let range = from.zip(to).and_then(|(from, to)| HvaRange::between(from.start(), to.end()));
            let marker = self.machines.get_mut(&first.0).and_then(|machine| machine.member.marker.as_mut());
            if marker.zip(range).is_none_or(|(marker, range)| marker.mark(range, merging).is_err()) {
                refused.extend(run.iter().map(|(key, _)| *key));
            }
        }
        refused
    }

    /// Whether KSM is to be tried on machines that marked everything by themselves: less often the longer it does not pay.
    fn is_try_due(&mut self) -> bool {
        let (due, interval) = self.next_try;
        let is_blanket = self.machines.values().any(|machine| machine.member.marker.is_none());
        if !is_blanket || self.rounds < due || !self.pace.is_idle() {
            return false;
        }
        self.next_try = (self.rounds + interval, (interval * 2).min(TRY_MAX));
        true
    }
}

fn party(member: &Member) -> Party {
    let domain = member.domain.map_or(Domain::Own, Domain::Shared);
    Party { name: member.name.clone(), process: member.process, domain }
}

/// Pages of a machine that are merged, as its process counts them, if that can be seen.
fn merged(member: &Member) -> Option<PageCount> {
    procfs::ksm_stat(member.process).ok().map(|stat| stat.merging + stat.zero)
}

/// User and system time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}
