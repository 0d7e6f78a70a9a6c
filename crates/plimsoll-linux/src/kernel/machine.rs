//! One machine managed from outside.
use super::KernelError;
use super::idle::{IdleFlags, IdleSamples};
use super::layout::Layout;
use super::signs::{PressureScope, Watch};
use super::take::Begun;
use super::view::View;
use crate::cgroup::foreign::ProcessCgroup;
use crate::reclaimer::{Collapsed, Reclaimed, Reclaimer, Short, Usage};
use plimsoll_core::outside::{Outside, Pace, Samples, Verdict};
use plimsoll_sys::HvaRange;
use plimsoll_sys::pagemap::Pagemap;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process_memory::may_advise;
use plimsoll_types::{BLOCK_PAGES, BlockIndex, Hva, PAGE_SIZE, PageCount, PageIndex};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How often a machine is looked at that does something.
pub const PERIOD: Duration = Duration::from_secs(2);
/// How often at least: each look that shows an idle machine doubles the time to the next.
pub const PERIOD_MAX: Duration = Duration::from_secs(32);

/// Samples of a period that are to come back. They are what an estimate is worth: so many have an error of 8 % at most. And they are
/// what the guest pays for, with about 60 us each.
const SAMPLES_USED: u32 = 160;
/// Pages drawn for a period, however few of them are used.
const SAMPLES_MAX: u32 = 512;
/// Of a small machine, one page in so many: an error of the same share is fewer pages there, and hosts have many of them.
const SAMPLED_ONE_IN: u32 = 32;
const SAMPLES_MIN: u32 = 64;
/// A machine is idle when no more than one sample in so many was used.
const IDLE_SHARE: u32 = 64;
/// Refaults a period of an idle machine: timers and clocks of its guest.
const IDLE_REFAULTS: u64 = 64;
/// Blocks whose whereabouts are read in one call of the kernel.
pub(super) const AHEAD: u32 = 32;
/// Blocks looked at in a period, after faults, for pages that came back.
const RETURN_LOOKS: u32 = 512;
/// Pages that one fault of the machine may bring: the kernel reads no more ahead.
const READ_AHEAD_MAX: u64 = 32;
/// Periods after which the machine's cgroup is looked up anew.
const CGROUP_PERIODS: u64 = 16;

/// What a period showed and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Samples of the period that could be judged.
    pub judged: u32,
    /// Those of them that were used.
    pub used: u32,
    /// Pages that came back from swap in it, samples not counted.
    pub refaults: PageCount,
    /// What the refaults and the kernel's pressure counters say of the pace.
    pub verdict: Verdict,
    /// Pages taken as samples for the next period.
    pub sampled: PageCount,
    /// Pages whose idle flags are watched for the next period instead: where the kernel has them, for pages that are not huge.
    pub marked: PageCount,
    /// Why no samples were taken although some were in RAM. The estimate then stays what it was.
    pub short: Option<Short>,
}

/// What was done since the machine was attached to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Periods.
    pub periods: u64,
    /// Pages that left because memory was wanted.
    pub taken: PageCount,
    /// Pages that left as samples.
    pub sampled: PageCount,
    /// Pages that came back, samples not counted.
    pub refaults: PageCount,
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            periods: self.periods + other.periods,
            taken: self.taken + other.taken,
            sampled: self.sampled + other.sampled,
            refaults: self.refaults + other.refaults,
        }
    }
}

/// Where the pages of a block of 2 MiB were when they were last looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockUse {
    /// Pages in RAM.
    pub resident: u16,
    /// Pages elsewhere.
    pub elsewhere: u16,
    /// Pages that came back, halved with each period since.
    pub heat: u16,
}

/// One machine. One thread drives it; different machines may have different threads.
///
/// ```no_run
/// use plimsoll_linux::kernel::KernelMachine;
/// use plimsoll_linux::reclaimer::Reclaimer;
/// use plimsoll_sys::{HvaRange, ProcessId, pidfd::Pidfd};
/// use plimsoll_types::{ByteCount, Hva};
/// use std::time::Instant;
///
/// let qemu = Pidfd::open(ProcessId::new(4242).expect("a process id"))?;
/// let ram = HvaRange::new(Hva(0x7f00_0000_0000), ByteCount::mib(4096)).expect("a range");
/// let mut machine = KernelMachine::attach(qemu, vec![ram], 1, Instant::now())?;
/// loop {
///     std::thread::sleep(machine.due().saturating_duration_since(Instant::now()));
///     let tick = machine.tick(Instant::now())?;
///     let got = machine.reclaim(ByteCount::mib(64).pages_floor(), Instant::now())?;
///     println!("uses {:?}; took {}; {tick:?}", machine.working_set(), got.taken);
///     if let Some(short) = got.short {
///         println!("no more, because {short}");
///     }
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct KernelMachine {
    pub(super) process: Pidfd,
    pub(super) view: View,
    pub(super) known: Outside,
    pub(super) pace: Pace,
    watch: Watch,
    pub(super) cgroup: Option<ProcessCgroup>,
    /// What the pace counts time from.
    pub(super) started: Instant,
    period: Duration,
    ticked: Instant,
    due: Instant,
    /// Pages drawn for the period.
    drawn: Vec<PageIndex>,
    /// Those of them that are watched by the kernel's idle flags, where it has them.
    pub(super) idle: Option<IdleSamples>,
    /// Whether memory was wanted since the last tick.
    is_pressed: bool,
    /// The next block to look at for pages that came back, and for collapsing.
    returning: u32,
    pub(super) collapsing: u32,
    pub(super) totals: Totals,
    /// Of each block, pages in RAM and elsewhere when all were last looked at.
    seen: Vec<(u16, u16)>,
    /// Of each block, the most that it was ever seen to have, here or elsewhere.
    most: Vec<u16>,
    /// Pages that it was seen to have before its use was last estimated.
    had: Option<PageCount>,
}

impl KernelMachine {
    /// Attaches to a process whose guest has its memory in `ranges`. Nothing is taken. The seed makes samples repeatable.
    ///
    /// # Errors
    /// [`KernelError::Permission`], [`KernelError::ProcessGone`], or [`KernelError::BadRange`].
    pub fn attach(
        process: Pidfd,
        ranges: Vec<HvaRange>,
        seed: u64,
        now: Instant,
    ) -> Result<Self, KernelError> {
        let id = process.process();
        let layout = Layout::new(ranges)?;
        let pagemap = Pagemap::open(id)?;
        may_advise(&process).map_err(|refusal| KernelError::refused(id, refusal))?;
        let cgroup = ProcessCgroup::of(id).ok();
        let machine = Self {
            known: Outside::new(layout.blocks(), seed),
            view: View::new(pagemap, layout),
            pace: Pace::new(Duration::ZERO),
            watch: Watch::new(id, cgroup.as_ref())?,
            process,
            cgroup,
            started: now,
            period: PERIOD,
            ticked: now,
            due: now,
            drawn: Vec::new(),
            idle: IdleFlags::open().ok().map(IdleSamples::new),
            is_pressed: false,
            returning: 0,
            collapsing: 0,
            totals: Totals::default(),
            seen: Vec::new(),
            most: Vec::new(),
            had: None,
        };
        // The page map was opened by number: as long as the process of the descriptor lives, the number is its own.
        machine.check_alive()?;
        Ok(machine)
    }

    /// From now on samples are taken even where idle flags would show their use: to compare the two, or since somebody else sets
    /// these flags, as DAMON does with each page it looks at. What was marked before tells nothing.
    pub fn ignore_idle_flags(&mut self) {
        if self.idle.take().is_some() {
            self.drawn.iter().for_each(|page| self.known.stayed(*page));
        }
    }

    /// Whether the kernel's idle flags show the use of samples, which then need not be taken.
    pub const fn has_idle_flags(&self) -> bool {
        self.idle.is_some()
    }

    /// True once the process has ended or executed another program. Ticks and requests then fail with
    /// [`KernelError::ProcessGone`].
    ///
    /// # Errors
    /// When that cannot be found out.
    pub fn is_gone(&self) -> Result<bool, KernelError> {
        Ok(!self.process.is_alive().map_err(KernelError::Pidfd)? || !self.view.is_alive()?)
    }

    pub(super) fn check_alive(&self) -> Result<(), KernelError> {
        if self.is_gone()? { Err(KernelError::ProcessGone(self.process.process())) } else { Ok(()) }
    }

    /// When [`tick`](Self::tick) wants to be called next.
    pub const fn due(&self) -> Instant {
        self.due
    }

    /// What was done so far.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Whose waiting for memory slows taking down.
    pub const fn pressure_scope(&self) -> PressureScope {
        self.watch.scope()
    }

    /// Pages a second that may be taken at the moment.
    pub const fn rate(&self) -> PageCount {
        self.pace.rate()
    }

    /// The memory cgroup the process was in when last looked up, if one was found.
    pub const fn cgroup(&self) -> Option<&ProcessCgroup> {
        self.cgroup.as_ref()
    }

    /// Where the guest's memory is, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = HvaRange> {
        self.view.layout().ranges()
    }

    /// Bytes of bookkeeping.
    pub fn table_bytes(&self) -> usize {
        let of_blocks =
            self.seen.capacity() * size_of::<(u16, u16)>() + self.most.capacity() * size_of::<u16>();
        self.known.table_bytes() + of_blocks
    }

    /// The blocks of its memory, as [`usage`](Reclaimer::usage) saw them last.
    pub fn blocks(&self) -> impl Iterator<Item = BlockUse> {
        self.seen.iter().zip(0..).map(|((resident, elsewhere), block)| BlockUse {
            resident: *resident,
            elsewhere: *elsewhere,
            heat: self.known.heat(BlockIndex(block)),
        })
    }

    /// Pages that it had, here and elsewhere, when its usage was last read.
    fn has(&self) -> Option<PageCount> {
        let pages = |(resident, elsewhere): &(u16, u16)| u64::from(*resident) + u64::from(*elsewhere);
        (!self.seen.is_empty()).then(|| PageCount(self.seen.iter().map(pages).sum()))
    }

    /// Pages that were in RAM or elsewhere at an earlier [`usage`](Reclaimer::usage) and were nowhere at the last: the guest, or its
    /// VMM, gave them back. Counted by the most that a block ever had, so a page that came in the place of another hides one, and
    /// what went before this machine was attached to is not known; nor is what went after it was taken, until it is used again.
    pub fn gone(&self) -> PageCount {
        let had = self.most.iter().zip(&self.seen);
        had.map(|(most, (resident, elsewhere))| {
            PageCount(u64::from(most.saturating_sub(resident + elsewhere)))
        })
        .sum()
    }

    /// The guest's memory has grown or shrunk. What is known of memory that stays is kept.
    ///
    /// # Errors
    /// [`KernelError::BadRange`]; the machine is then as before.
    pub fn set_ranges(&mut self, ranges: Vec<HvaRange>) -> Result<(), KernelError> {
        let new = Layout::new(ranges)?;
        let old = self.view.layout();
        self.known = self.known.rearranged(new.blocks(), |block| old.block_at_base(new.base_of(block)?));
        self.view.set_layout(new);
        // What went of blocks that stay is not known any more: they are counted by their places.
        (self.seen, self.most) = (Vec::new(), Vec::new());
        // Samples are drawn anew; these pages would be looked for where others are now.
        self.drawn.clear();
        self.idle.iter_mut().for_each(IdleSamples::forget);
        Ok(())
    }

    /// Parts of the machine's memory in which somebody saw use, who watches it: what lies in others is taken first. It stands until
    /// the next.
    pub fn heed(&mut self, used: &[HvaRange]) {
        let layout = self.view.layout();
        let last = |range: &HvaRange| Hva(range.end().0 - PAGE_SIZE as u64);
        let places = |range: &HvaRange| Some((layout.place(range.start())?.0, layout.place(last(range))?.0));
        let blocks = used.iter().filter(|range| !range.is_empty()).filter_map(places);
        let blocks: Vec<BlockIndex> =
            blocks.flat_map(|(first, last)| (first.0..=last.0).map(BlockIndex)).collect();
        self.known.hint(blocks);
    }

    /// Ends a period and begins the next: judges the samples and takes new ones, adapts the pace. To be called when it is
    /// [due](Self::due).
    ///
    /// # Errors
    /// [`KernelError::ProcessGone`], for example.
    pub fn tick(&mut self, now: Instant) -> Result<Tick, KernelError> {
        self.check_alive()?;
        self.totals.periods += 1;
        if self.totals.periods.is_multiple_of(CGROUP_PERIODS) {
            let cgroup = ProcessCgroup::of(self.process.process()).ok();
            if cgroup != self.cgroup {
                self.watch.follow(cgroup.as_ref());
                self.cgroup = cgroup;
            }
        }
        self.view.forget();
        let came_back = self.watch.came_back()?;
        self.leave_out_what_was_read_back(came_back)?;
        let count = draws(self.known.block_count(), self.known.estimate());
        let judged = self.judge_marked();
        let stayed_used = judged.values().filter(|is_used| **is_used).count() as u64;
        let (view, ahead) = (&mut self.view, sampling_ahead(&self.known));
        let samples = self.known.end_period(count, |page| match judged.get(&page) {
            Some(is_used) => Ok::<_, KernelError>(*is_used),
            None => Ok(view.look(page.block(), ahead)?.present.contains(page)),
        })?;
        let length = now.saturating_duration_since(std::mem::replace(&mut self.ticked, now));
        // Samples that stayed in RAM came back from nowhere.
        let refaults =
            came_back.saturating_sub(PageCount(u64::from(samples.used).saturating_sub(stayed_used)));
        let signs = self.watch.signs(length, refaults);
        let verdict = self.pace.judge(signs);
        if signs.refaults.0 > 0 {
            self.look_for_returned()?;
        }
        let Begun { taken: sampled, marked, short } = self.begin_samples(&samples.drawn, ahead)?;
        self.totals.sampled += sampled;
        self.totals.refaults += signs.refaults;
        let Samples { judged, used, drawn } = samples;
        if judged > 0 {
            self.had = self.has().or(self.had);
        }
        self.drawn = drawn;
        let is_idle = used * IDLE_SHARE <= judged && signs.refaults.0 <= IDLE_REFAULTS;
        self.set_rhythm(is_idle, now);
        Ok(Tick { judged, used, refaults: signs.refaults, verdict, sampled, marked, short })
    }

    /// What the idle flags say of the samples that were marked.
    fn judge_marked(&mut self) -> BTreeMap<PageIndex, bool> {
        match self.idle.as_mut().map(|idle| idle.judge(&self.view)) {
            Some(Ok(judged)) => judged,
            Some(Err(_)) => {
                self.ignore_idle_flags();
                BTreeMap::new()
            }
            None => BTreeMap::new(),
        }
    }

    /// Somebody who takes swap away has the kernel read back all that is in it: samples are in RAM then that the machine did
    /// not touch. More of them than its faults can have brought tell nothing, and nor do those that are still away.
    fn leave_out_what_was_read_back(&mut self, came_back: PageCount) -> Result<(), KernelError> {
        let ahead = sampling_ahead(&self.known);
        let mut back = 0;
        for page in &self.drawn {
            // Those that were never taken, since something holds them, came back from nowhere.
            let was_away = self.known.away(page.block()).contains(*page);
            back += u64::from(was_away && self.view.look(page.block(), ahead)?.present.contains(*page));
        }
        if back > (came_back.0 + 1) * READ_AHEAD_MAX {
            self.drawn.iter().for_each(|page| self.known.stayed(*page));
        }
        Ok(())
    }

    /// The first period shows nothing, for nothing was taken before it.
    fn set_rhythm(&mut self, is_idle: bool, now: Instant) {
        let is_pressed = std::mem::take(&mut self.is_pressed);
        let may_rest = is_idle && !is_pressed && self.totals.periods > 1;
        self.period = if may_rest { (self.period * 2).min(PERIOD_MAX) } else { PERIOD };
        self.due = now + self.period;
    }

    /// Memory is wanted: the machine is looked at again as often as one that does something.
    pub(super) fn quicken(&mut self, now: Instant) {
        self.is_pressed = true;
        self.period = PERIOD;
        self.due = self.due.min(now + PERIOD);
    }

    /// Looks at blocks pages were taken from, in turn, so that pages that came back are known before their block is chosen.
    fn look_for_returned(&mut self) -> Result<(), KernelError> {
        let blocks = self.known.block_count();
        let mut looks = 0;
        for _ in 0..blocks {
            if looks == RETURN_LOOKS {
                break;
            }
            let block = BlockIndex(self.returning % blocks);
            self.returning = (block.0 + 1) % blocks;
            if !self.known.away(block).is_empty() {
                looks += 1;
                let presence = self.view.look(block, AHEAD)?;
                self.known.see(block, &presence);
            }
        }
        Ok(())
    }
}

/// How many pages to draw of a machine that is believed to use so many: as many as bring [`SAMPLES_USED`] back. Where nothing is
/// known yet all may be used.
fn draws(blocks: u32, estimate: Option<PageCount>) -> u32 {
    let pages = u64::from(blocks) * u64::from(BLOCK_PAGES);
    let used = estimate.map_or(pages, |PageCount(used)| used).max(1);
    let enough = u64::from(SAMPLES_USED) * pages / used;
    let most = blocks.saturating_mul(BLOCK_PAGES / SAMPLED_ONE_IN).clamp(SAMPLES_MIN, SAMPLES_MAX);
    u32::try_from(enough).unwrap_or(u32::MAX).clamp(SAMPLES_MIN, most)
}

/// Samples of a small machine lie in neighbouring blocks, those of a large one far apart.
fn sampling_ahead(known: &Outside) -> u32 {
    if known.is_sampled_whole() { AHEAD } else { 1 }
}

impl Reclaimer for KernelMachine {
    type Error = KernelError;

    /// Reads the whole page map of the guest: about 2 ms for a GiB.
    fn usage(&mut self) -> Result<Usage, KernelError> {
        self.check_alive()?;
        self.view.forget();
        let mut usage = Usage::default();
        self.seen.clear();
        for block in (0..self.known.block_count()).map(BlockIndex) {
            let presence = self.view.look(block, AHEAD)?;
            self.known.see(block, &presence);
            let elsewhere = presence.swapped | (self.known.away(block) - presence.present);
            usage.resident += PageCount(u64::from(presence.present.len()));
            usage.elsewhere += PageCount(u64::from(elsewhere.len()));
            // A block has 512 pages.
            let counted = |pages: u32| u16::try_from(pages).unwrap_or(u16::MAX);
            self.seen.push((counted(presence.present.len()), counted(elsewhere.len())));
        }
        self.most.resize(self.seen.len(), 0);
        for (most, (resident, elsewhere)) in self.most.iter_mut().zip(&self.seen) {
            *most = (*most).max(resident + elsewhere);
        }
        Ok(usage)
    }

    /// Takes at most what the [pace](Self::rate) allows, so a large request takes several calls, some time apart.
    fn reclaim(&mut self, want: PageCount, now: Instant) -> Result<Reclaimed, KernelError> {
        self.take(want, now)
    }

    /// Pages used in a period, which is [`PERIOD`] while the machine does something, and those that came to be since, since whoever
    /// starts has used nothing yet; no more than it had when its usage was last read, however long what its guest has given back
    /// stays in the samples.
    fn working_set(&self) -> Option<PageCount> {
        let estimate = self.known.estimate()?;
        let Some(has) = self.has() else { return Some(estimate) };
        let grown = self.had.map_or(PageCount(0), |had| has.saturating_sub(had));
        Some((estimate + grown).min(has))
    }

    fn collapse_hot(&mut self, blocks_max: u32) -> Result<Collapsed, KernelError> {
        self.collapse(blocks_max)
    }
}

#[cfg(test)]
mod tests {
    use super::super::idle::tests::MadeUp;
    use super::*;
    use plimsoll_sys::ProcessId;
    use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::ByteCount;

    #[test]
    fn a_machine_is_sampled_the_less_the_more_of_it_is_used_and_a_small_one_little() {
        let drawn = |blocks, used: u64| draws(blocks, Some(PageCount(used)));
        let pages = 1 << 16;
        for (used, draws) in [(0, 512), (pages / 4, 512), (pages / 2, 320), (pages, 160), (2 * pages, 80)] {
            assert_eq!(drawn(128, used), draws, "{used} of {pages} pages used");
        }
        assert_eq!(draws(128, None), 160);
        assert_eq!((drawn(8, 1), drawn(4, 1), drawn(1, 512)), (128, 64, 64));
    }

    #[test]
    fn a_machine_that_grows_between_two_estimates_uses_what_it_took() {
        let memory = AnonymousMapping::new(ByteCount::mib(4), HugePages::Never).unwrap();
        let process = Pidfd::open(ProcessId::own()).unwrap();
        let mut machine = KernelMachine::attach(process, vec![memory.range()], 1, Instant::now()).unwrap();
        machine.usage().unwrap();
        machine.tick(Instant::now()).unwrap();
        machine.tick(Instant::now()).unwrap();
        machine.usage().unwrap();
        assert_eq!(machine.working_set(), Some(PageCount(0)), "nothing is there that could be used");
        let half = HvaRange::new(memory.range().start(), ByteCount::mib(2)).unwrap();
        memory.populate_write(half).unwrap();
        machine.usage().unwrap();
        assert_eq!(machine.working_set(), Some(ByteCount::mib(2).pages_floor()));
        // What is given back again is not used.
        memory.discard(half).unwrap();
        machine.usage().unwrap();
        assert_eq!(machine.working_set(), Some(PageCount(0)));
    }

    #[test]
    fn samples_that_idle_flags_watch_stay_in_ram_and_are_used_where_their_flag_is_gone() {
        let memory = AnonymousMapping::new(ByteCount::mib(4), HugePages::Never).unwrap();
        memory.populate_write(memory.range()).unwrap();
        let files = MadeUp::new("machine");
        let process = Pidfd::open(ProcessId::own()).unwrap();
        let mut machine = KernelMachine::attach(process, vec![memory.range()], 1, Instant::now()).unwrap();
        machine.idle = Some(IdleSamples::new(files.open().unwrap()));
        let begun = machine.tick(Instant::now()).unwrap();
        if machine.idle.is_none() {
            return println!("SKIPPED: the page map hides frame numbers: run with CAP_SYS_ADMIN");
        }
        assert!(begun.marked.0 >= u64::from(SAMPLES_MIN) / 2, "{begun:?}");
        assert_eq!((begun.sampled, begun.short), (PageCount(0), None));
        let idle = machine.tick(Instant::now()).unwrap();
        assert_eq!((u64::from(idle.judged), idle.used), (begun.marked.0, 0), "all flags stand");
        let pages =
            (0..memory.range().len().pages_floor().0).map(|page| PageIndex(u32::try_from(page).unwrap()));
        for frame in pages.filter_map(|page| machine.view.frame(page).unwrap()) {
            files.use_frame(frame);
        }
        let used = machine.tick(Instant::now()).unwrap();
        assert_eq!((u64::from(used.used), used.refaults), (idle.marked.0, PageCount(0)), "{used:?}");
        assert_eq!(machine.working_set(), Some(memory.range().len().pages_floor()));
        assert_eq!(machine.usage().unwrap().resident, memory.range().len().pages_floor(), "none has left");
        // What the guest gives back is in no estimate once it was seen to be gone, however it was used before.
        let rest = HvaRange::new(memory.range().start(), ByteCount::mib(3)).unwrap();
        memory.discard(rest).unwrap();
        machine.usage().unwrap();
        assert_eq!(machine.working_set(), Some(ByteCount::mib(1).pages_floor()));
        // All of these are in RAM, which says nothing of marks that nobody looks at.
        machine.ignore_idle_flags();
        let ignored = machine.tick(Instant::now()).unwrap();
        assert_eq!((ignored.judged, ignored.used), (0, 0), "{ignored:?}");
    }
}
