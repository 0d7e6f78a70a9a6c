//! The governor: a thread that looks at the host every few milliseconds and says how much each machine gives up.
//!
//! Enters: what the kernel counts, what the ledger holds, what machines gave and took back. Leaves: numbers in each
//! machine's [`Orders`], which a late reader reads a little later; nothing depends on their being
//! seen at once, because pages are charged before they are installed.
//!
//! Reclaim is kept ahead of demand: it starts at the high mark and goes down to the low one, while guests' faults find
//! room up to the install line. It backs off in two cases. A machine that *gives nothing* is passed over for a while, so
//! that it cannot keep the host at its hard line. A machine that *thrashes*, because most of what is taken from it comes
//! back, is passed over as long as another one can give; and when all thrash, no more is taken than must be. A machine
//! whose pager is told to take nothing is not asked at all.
use super::bustle::Bustle;
use super::host::{Host, Orders};
use super::manager::Governed;
use crate::system::{Linux, System};
use plimsoll_core::ledger::Budget;
use plimsoll_sys::procfs::nodes::parse_list;
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How often the governor looks where memory is short. At 10 us a page, two pagers on two cores fill 400 pages (1.6 MiB) between two
/// looks: well within the distance from the high mark to the hard line.
pub(super) const PERIOD: Duration = Duration::from_millis(2);
/// Where there is little room and nothing happens it looks every 8 ms: each look in a row that shows nothing new doubles the time to the next.
const CALM_DOUBLINGS: u32 = 2;
/// What is nobody's may be more by so much and be as it was: the kernel counts it in batches of 64 pages, each processor its own.
const CALM_GROWTH: ByteCount = ByteCount::mib(1);
/// How rarely it looks at most, at a host with room.
const PERIOD_MAX: Duration = Duration::from_millis(250);
/// The same while no pager does anything, of which the first that does wakes it. Only what is no guest's grows meanwhile, unseen.
/// It looks the more often the less room there is, so that what a meter told it last is how things are for whoever asks next.
pub const PERIOD_QUIET: Duration = Duration::from_secs(1);
/// A host with so much below its high mark has room: it may be looked at more rarely yet while no pager does anything, and machines that
/// touch nothing be sampled more rarely.
const ROOMY: ByteCount = ByteCount::mib(128);
/// What one processor is reckoned to fill in a [`PERIOD`]: 4 GiB/s (`docs/bench.md`, *What a look costs*). While no pager does anything, on
/// a host with room, it is taken to be one that does.
const FILLED_BY_ONE: ByteCount = ByteCount::mib(8);
/// More processors than that are reckoned to fill no faster: 32 GiB/s.
const FILLERS_MAX: u64 = 8;
/// The processors of this host, those that are offline now among them. Guests may have more of them than this process.
const PROCESSORS: &str = "/sys/devices/system/cpu/present";
/// Samples of a machine without a page that came back, after which it is sampled ever more rarely while the host has room.
const SAMPLES_ALIKE: u32 = 8;
/// The rarest: every so many periods.
const SAMPLE_STRIDE_MAX: u32 = 64;
/// How often pinned pages may be tried again.
const UNPIN_PERIOD: Duration = Duration::from_secs(1);
/// How long a machine that is asked for pages may give none before others are asked in its place, for
/// [`UNPIN_PERIOD`].
const GIVE_PATIENCE: Duration = Duration::from_millis(200);
/// Looks over which the largest overhead counts.
const OVERHEAD_LOOKS: usize = 16;
/// Over which time what came back is held against what was taken.
const THRASH_PERIOD: Duration = Duration::from_millis(250);
/// Pages that must have been taken in that time for it to mean anything: more than a sampling period draws.
const THRASH_TAKEN_MIN: u64 = 256;

/// What the kernel counts for everybody the budget is for.
pub trait Meter: Send {
    /// Bytes in use now.
    fn used(&mut self) -> ByteCount;
}

/// Looks until it is told to stop.
pub(super) fn govern(
    host: &Host,
    governed: &Governed,
    mut meter: Box<dyn Meter>,
    sample_period: Duration,
    stop: &AtomicBool,
) {
    let (now, overheads, watched) = (Instant::now(), VecDeque::new(), BTreeMap::new());
    let (sampled, unpinned, is_asking) = (now, now, false);
    let mut governor =
        Governor { host, governed, sample_period, sampled, unpinned, overheads, watched, is_asking };
    let fillers = fillers(&Linux.read(Path::new(PROCESSORS)).unwrap_or_default());
    let own = std::thread::current();
    host.bustle().on_begin(move || own.unpark());
    let mut seen = None;
    let mut calm = Calm::default();
    while !stop.load(Ordering::Relaxed) {
        let served = host.bustle().served();
        // Who comes after this is counted after that, so that it is not slept through.
        let is_alone = governed.lock().is_empty();
        let room = governor.look(is_alone, &mut *meter, Instant::now());
        let pause = pause(room, fillers);
        let was_quiet = seen.replace(served) == Some(served);
        let patience = patience(room, was_quiet, is_alone, sample_period).max(calm.look(room, was_quiet));
        let is_long = patience > pause && is_quiet(host.bustle(), served);
        std::thread::park_timeout(if is_long { patience } else { pause });
    }
}

/// Whether no pager has done anything since that was counted, and the first that does calls.
fn is_quiet(bustle: &Bustle, served: u64) -> bool {
    bustle.expect();
    // Counted again after that: what happened before it called nobody.
    bustle.served() == served
}

/// Notices that nothing is new on a host with little room. What nobody is charged for may grow there unseen for the longer time once;
/// whoever is charged for a page is seen as soon as that turn of its pager is over, which calls the governor.
#[derive(Debug, Default)]
struct Calm {
    /// What there was below the high mark at the last look.
    room: ByteCount,
    /// Looks since then that showed nothing new.
    looks: u32,
}

impl Calm {
    /// How long the host may be left alone as long as no pager does anything. Where somebody is asked for pages there is no `room`.
    fn look(&mut self, room: ByteCount, was_quiet: bool) -> Duration {
        let is_new = !was_quiet || room == ByteCount(0) || room + CALM_GROWTH < self.room;
        self.looks = if is_new { 0 } else { (self.looks + 1).min(CALM_DOUBLINGS) };
        self.room = room;
        PERIOD * (1 << self.looks)
    }
}

/// Everything the thread has of its own.
struct Governor<'a> {
    host: &'a Host,
    governed: &'a Governed,
    sample_period: Duration,
    sampled: Instant,
    unpinned: Instant,
    overheads: VecDeque<ByteCount>,
    watched: BTreeMap<MachineId, Watched>,
    /// At the last look somebody was asked for pages.
    is_asking: bool,
}

impl Governor<'_> {
    /// Looks at the host, and at each machine if there is anything to be said to any, or has not been for a while. Says what there is
    /// below the high mark. Where nobody can be asked it is alone.
    fn look(&mut self, is_alone: bool, meter: &mut dyn Meter, now: Instant) -> ByteCount {
        let governed = self.governed;
        let spared = || {
            let governed = governed.lock();
            governed.iter().filter(|(_, one)| one.orders.is_spared()).map(|(id, _)| *id).collect()
        };
        if is_alone {
            // Nobody is charged for a page meanwhile: this look does not err, and it may be long since the one before.
            self.overheads.clear();
        }
        let (asked, room) = ask(self.host, meter, &mut self.overheads, &self.watched, spared);
        let sample = now.duration_since(self.sampled) >= self.sample_period;
        let unpin = now.duration_since(self.unpinned) >= UNPIN_PERIOD;
        let was_asking = std::mem::replace(&mut self.is_asking, !asked.is_empty());
        if !self.is_asking && !was_asking && !sample && !unpin {
            return room;
        }
        let asked: BTreeMap<MachineId, u32> = asked.into_iter().collect();
        let is_demand_near = self.host.ledger(|ledger| ledger.is_demand_near());
        let has_room = room >= ROOMY;
        let mut stuck = Vec::new();
        // No copies: what a machine holds is freed when it is forgotten.
        let machines = governed.lock();
        for (id, controls) in machines.iter() {
            let orders = &controls.orders;
            let want = asked.get(id).copied().unwrap_or(0);
            // What is as it was is not written, and what is written is exchanged: a pager that gives the last of it between a look and a
            // store would be told nothing of what is wanted now.
            let is_said = orders.reclaim.load(Ordering::Relaxed) == want;
            let before = if is_said { want } else { orders.reclaim.swap(want, Ordering::Relaxed) };
            let watched = self.watched.entry(*id).or_default();
            self.host.ledger(|ledger| {
                let Ok(ram) = ledger.ram(*id) else { return };
                let _ = ledger.set_floor(*id, watched.look(want, ram, orders, now));
            });
            let sample = sample && watched.samples.is_due(orders, has_room);
            if sample {
                orders.sample.store(true, Ordering::Relaxed);
            }
            if unpin {
                orders.unpin.store(true, Ordering::Relaxed);
                // One that waits for events sees the end itself.
                if !orders.is_waiting.load(Ordering::Relaxed) && !controls.is_buried.load(Ordering::Acquire) {
                    stuck.push(Arc::downgrade(&controls.custody));
                }
            }
            // So near the line it needs no time of its own, which it does not know while it sleeps.
            let is_held_up = is_demand_near && orders.is_out_of_time.load(Ordering::Relaxed);
            if sample || is_held_up || (want > 0 && before == 0) {
                let _ = controls.kick.signal();
            }
        }
        if unpin {
            self.unpinned = now;
            self.watched.retain(|id, _| machines.contains_key(id));
        }
        drop(machines);
        if sample {
            self.sampled = now;
        }
        for custody in stuck.iter().filter_map(Weak::upgrade) {
            if custody.has_ended(Duration::ZERO) {
                // Its pager may wait in the kernel for memory that nobody will bring.
                custody.release_readers();
            }
        }
        room
    }
}

/// Processors that fill a host which has these. Where the kernel does not say, they are as many as matter.
fn fillers(present: &str) -> u64 {
    let known = parse_list(present).filter(|processors| !processors.is_empty());
    known.map_or(FILLERS_MAX, |processors| FILLERS_MAX.min(processors.len() as u64))
}

/// How long the host needs not be looked at: as long as nobody should have come to the high mark.
fn pause(room: ByteCount, fillers: u64) -> Duration {
    filled_in(room, fillers).clamp(PERIOD, PERIOD_MAX)
}

/// How long it may be left alone as long as no pager does anything. Where there is none, nobody could be asked for anything.
fn patience(room: ByteCount, was_quiet: bool, is_alone: bool, sample_period: Duration) -> Duration {
    let quiet = filled_in(room, 1).min(PERIOD_QUIET).min(sample_period);
    let alone = if is_alone { PERIOD_MAX } else { Duration::ZERO };
    if was_quiet && room >= ROOMY { quiet.max(alone) } else { alone }
}

/// In which time so many processors fill that.
fn filled_in(room: ByteCount, fillers: u64) -> Duration {
    let periods = room.0 / (FILLED_BY_ONE.0 * fillers);
    PERIOD.saturating_mul(u32::try_from(periods).unwrap_or(u32::MAX))
}

/// How many pages each machine is to give up now; those that are spared none. And what there is below the high mark.
fn ask(
    host: &Host,
    meter: &mut dyn Meter,
    overheads: &mut VecDeque<ByteCount>,
    watched: &BTreeMap<MachineId, Watched>,
    spared: impl FnOnce() -> BTreeSet<MachineId>,
) -> (Vec<(MachineId, u32)>, ByteCount) {
    // Charges precede use and follow release, so the smaller sum is the one that hides no overhead. What is charged
    // in between, and the batches in which the kernel counts, make single looks err: the largest of some counts.
    let before = host.ledger(|ledger| ledger.charged());
    let counted = meter.used();
    let room = host.ledger(|ledger| {
        overheads.push_back(counted.saturating_sub(before.min(ledger.charged())));
        overheads.drain(..overheads.len().saturating_sub(OVERHEAD_LOOKS));
        ledger.set_overhead(overheads.iter().copied().max().unwrap_or_default());
        ledger.budget().high.saturating_sub(ledger.used())
    });
    if room > ByteCount(0) {
        return (Vec::new(), room);
    }
    let spared = spared();
    let (asked, room) = host.ledger(|ledger| {
        let Budget { high, low, .. } = ledger.budget();
        let is_passed_over = Cell::new(false);
        let thrashes = |id: MachineId| {
            let is_on = watched.get(&id).is_some_and(|watched| watched.thrash.is_on);
            is_passed_over.set(is_passed_over.get() || is_on);
            is_on
        };
        let asked = ledger.reclaim(low, |id| spared.contains(&id) || thrashes(id));
        let gives: PageCount = asked.iter().map(|(_, pages)| *pages).sum();
        // Those who would want back what they give are spared as long as the others have enough; when they have not,
        // all give, and only what must be given.
        let is_enough = gives.bytes() >= ledger.used().saturating_sub(high);
        let asked = if is_enough { asked } else { ledger.reclaim(high, |id| spared.contains(&id)) };
        if is_enough && is_passed_over.get() {
            host.backed_off();
        }
        (asked, high.saturating_sub(ledger.used()))
    });
    let pages = |(id, pages): (MachineId, PageCount)| (id, u32::try_from(pages.0).unwrap_or(u32::MAX));
    let asked: Vec<_> = asked.into_iter().map(pages).collect();
    // Whoever is asked for something is looked at until it has given it.
    let room = if asked.is_empty() { room } else { ByteCount(0) };
    (asked, room)
}

/// What the governor remembers of one machine.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    giver: Giver,
    thrash: Thrash,
    samples: Samples,
}

impl Watched {
    /// What the machine is reckoned not to go below for now, because it gives nothing.
    fn look(&mut self, want: u32, ram: ByteCount, orders: &Orders, now: Instant) -> ByteCount {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        // Whoever is kept from giving is not one that has nothing to give.
        let want = if orders.is_out_of_time.load(Ordering::Relaxed) { 0 } else { want };
        self.thrash.watch(count(&orders.taken), count(&orders.returned), now);
        self.giver.watch(want, ram, count(&orders.given), now)
    }
}

/// Notices a machine that gives nothing when asked (pinned pages, an agent that does not answer, a full store) and has
/// others asked in its place for a while. A machine that gives and takes as much again is none of these.
#[derive(Clone, Copy, Debug, Default)]
struct Giver {
    /// When it last gave, or was asked first; what it had then, and had given. None of one that is not asked, whom nobody looks at.
    gave: Option<(Instant, ByteCount, u64)>,
    /// What it is taken not to go below, and until when.
    excused: Option<(Instant, ByteCount)>,
}

impl Giver {
    /// The machine is asked for `want` pages, has `ram` and has given `given` pages in its life. Returns the floor to
    /// reckon with.
    fn watch(&mut self, want: u32, ram: ByteCount, given: u64, now: Instant) -> ByteCount {
        match self.excused {
            Some((until, floor)) if now < until => return floor,
            Some(_) => *self = Self::default(),
            None => {}
        }
        match self.gave {
            Some((since, had, before)) if want > 0 && ram >= had && given == before => {
                if now.duration_since(since) >= GIVE_PATIENCE {
                    self.excused = Some((now + UNPIN_PERIOD, ram));
                    return ram;
                }
            }
            _ => self.gave = (want > 0).then_some((now, ram, given)),
        }
        ByteCount(0)
    }
}

/// Notices a machine of which more than half of what is taken comes back soon.
#[derive(Clone, Copy, Debug, Default)]
struct Thrash {
    is_on: bool,
    /// When the period began; what had been taken and had come back by then.
    since: Option<(Instant, u64, u64)>,
}

impl Thrash {
    /// So much has been taken in its life, and so much of that has come back.
    fn watch(&mut self, taken: u64, returned: u64, now: Instant) {
        match self.since {
            Some((since, ..)) if now.duration_since(since) < THRASH_PERIOD => return,
            Some((_, before_taken, before_returned)) => {
                let taken = taken.saturating_sub(before_taken);
                let returned = returned.saturating_sub(before_returned);
                self.is_on = taken >= THRASH_TAKEN_MIN && returned > taken / 2;
            }
            None => {}
        }
        self.since = Some((now, taken, returned));
    }
}

/// Notices a machine that does not touch what is taken for its samples: that it is idle is known, and looking costs. Whatever comes
/// back, and a host that is nearly full, have it sampled each period again.
#[derive(Clone, Copy, Debug, Default)]
struct Samples {
    /// What had come back at the last one.
    returned: u64,
    /// Those since then, and periods without one.
    alike: u32,
    skipped: u32,
}

impl Samples {
    /// Whether this period is one to sample in, of a host that `has_room` or not.
    fn is_due(&mut self, orders: &Orders, has_room: bool) -> bool {
        self.next(orders.returned.load(Ordering::Relaxed), has_room)
    }

    fn next(&mut self, returned: u64, has_room: bool) -> bool {
        if !has_room || returned != self.returned {
            *self = Self { returned, alike: 0, skipped: 0 };
        }
        let stride = 1_u32.checked_shl(self.alike.saturating_sub(SAMPLES_ALIKE)).unwrap_or(u32::MAX);
        self.skipped += 1;
        if self.skipped < stride.min(SAMPLE_STRIDE_MAX) {
            return false;
        }
        (self.alike, self.skipped) = (self.alike.saturating_add(1), 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_core::ledger::{Kind, Terms};
    use plimsoll_types::GroupId;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_machine_that_touches_nothing_is_sampled_ever_more_rarely_until_it_does_or_memory_is_short() {
        let mut samples = Samples::default();
        let mut due =
            |count: u32, returned, has_room| (0..count).filter(|_| samples.next(returned, has_room)).count();
        assert_eq!(due(8, 0, true), 8);
        assert!((10..30).contains(&due(1000, 0, true)), "one in 64 in the end");
        assert_eq!(due(8, 1, true), 8, "something came back");
        due(1000, 1, true);
        assert_eq!(due(100, 1, false), 100, "memory is short");
    }

    #[test]
    fn a_governor_that_sleeps_because_nothing_happens_is_called_by_what_happens_first() {
        struct Looks(std::sync::mpsc::Sender<()>);
        impl Meter for Looks {
            fn used(&mut self) -> ByteCount {
                // Nobody counts the last.
                let _ = self.0.send(());
                ByteCount(0)
            }
        }
        const CALLS: u32 = 100;
        let host = Host::new(Budget::within(ByteCount::mib(1 << 20)));
        let (governed, stop) = (Governed::default(), AtomicBool::new(false));
        let (say, looks) = std::sync::mpsc::channel();
        std::thread::scope(|threads| {
            let meter = Box::new(Looks(say));
            let governor = threads.spawn(|| govern(&host, &governed, meter, HOUR, &stop));
            let start = Instant::now();
            for _ in 0..CALLS {
                looks.recv_timeout(Duration::from_secs(120)).unwrap();
                let served = host.bustle().served();
                assert!(is_quiet(host.bustle(), served));
                host.bustle().count_served();
                assert!(!is_quiet(host.bustle(), served));
            }
            // By itself it looks after so long at the earliest.
            assert!(start.elapsed() < PERIOD_MAX * CALLS / 2, "nobody called it");
            stop.store(true, Ordering::Relaxed);
            // However long it sleeps.
            host.bustle().count_served();
            governor.join().unwrap();
        });
    }

    #[test]
    fn a_host_is_looked_at_the_more_often_the_less_room_there_is() {
        assert_eq!(pause(ByteCount(0), 1), PERIOD);
        assert_eq!(pause(FILLED_BY_ONE, 1), PERIOD);
        assert_eq!(pause(ByteCount(FILLED_BY_ONE.0 * 3), 1), PERIOD * 3);
        assert_eq!(pause(ByteCount(u64::MAX), 1), PERIOD_MAX);
    }

    #[test]
    fn a_host_of_more_processors_is_looked_at_more_often_up_to_what_memory_takes() {
        let looked_at_every = |present| pause(ByteCount::mib(512), fillers(present));
        assert_eq!(looked_at_every("0\n"), PERIOD * 64);
        assert_eq!(looked_at_every("0-1\n"), PERIOD * 32);
        assert_eq!(looked_at_every("0,2-4\n"), PERIOD * 16);
        assert_eq!(looked_at_every("0-7\n"), PERIOD * 8);
        assert_eq!(looked_at_every("0-191\n"), PERIOD * 8);
        // Not known.
        for nonsense in ["", "many\n", "0-\n"] {
            assert_eq!(looked_at_every(nonsense), PERIOD * 8, "{nonsense:?}");
        }
    }

    #[test]
    fn a_host_is_left_alone_for_longer_where_it_has_room_and_nothing_happens_or_nobody_could_give() {
        let patience = |mib, was_quiet, is_alone| patience(ByteCount::mib(mib), was_quiet, is_alone, HOUR);
        assert_eq!(patience(1024, true, false), PERIOD * 128);
        assert_eq!(patience(1 << 20, true, false), PERIOD_QUIET);
        assert_eq!(patience(1 << 20, true, true), PERIOD_QUIET);
        assert_eq!(patience(1 << 20, false, false), Duration::ZERO, "something happens");
        assert_eq!(patience(100, true, false), Duration::ZERO, "it is nearly full");
        for (mib, was_quiet) in [(0, false), (100, true), (1 << 20, false)] {
            assert_eq!(patience(mib, was_quiet, true), PERIOD_MAX);
        }
    }

    #[test]
    fn a_nearly_full_host_is_looked_at_less_often_while_nothing_is_new() {
        let mut calm = Calm::default();
        let mut look =
            |mib: u64, was_quiet| calm.look(ByteCount::mib(mib), was_quiet).as_micros() / PERIOD.as_micros();
        assert_eq!([15, 15, 15, 15].map(|mib| look(mib, true)), [2, 4, 4, 4]);
        assert_eq!(look(15, false), 1, "a pager did something");
        assert_eq!([14, 13, 12, 20].map(|mib| look(mib, true)), [2, 4, 4, 4]);
        assert_eq!(look(18, true), 1, "somebody whom no pager knows has grown");
        assert_eq!([18, 18, 0, 0].map(|mib| look(mib, true)), [2, 4, 1, 1], "somebody is asked for pages");
    }

    const RAM: ByteCount = ByteCount::mib(64);

    #[test]
    fn a_machine_that_gives_and_takes_as_much_again_goes_on_being_asked() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        for look in 0..5000u32 {
            let now = start + PERIOD * look;
            assert_eq!(giver.watch(100, RAM, u64::from(look / 50), now), ByteCount(0), "look {look}");
        }
    }

    #[test]
    fn a_machine_that_gives_nothing_is_excused_for_a_while_and_then_asked_again() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(giver.watch(100, RAM, 7, at(0)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(199)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(200)), RAM);
        assert_eq!(giver.watch(100, ByteCount::mib(70), 7, at(900)), RAM);
        assert_eq!(giver.watch(100, RAM, 7, at(1200)), ByteCount(0));
    }

    #[test]
    fn a_machine_that_has_no_time_is_not_taken_for_one_that_has_nothing_to_give() {
        let (mut watched, orders, start) = (Watched::default(), Orders::default(), Instant::now());
        let mut floors = |from: u32, to: u32| -> BTreeSet<ByteCount> {
            (from..to).map(|look| watched.look(100, RAM, &orders, start + PERIOD * look)).collect()
        };
        orders.is_out_of_time.store(true, Ordering::Relaxed);
        assert_eq!(floors(0, 5000), BTreeSet::from([ByteCount(0)]));
        orders.is_out_of_time.store(false, Ordering::Relaxed);
        assert!(floors(5000, 5200).contains(&RAM), "it gives nothing, and has time");
    }

    #[test]
    fn a_machine_that_is_not_asked_is_not_excused() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        for look in 0..5000u32 {
            assert_eq!(giver.watch(0, RAM, 7, start + PERIOD * look), ByteCount(0));
        }
    }

    #[test]
    fn the_patience_with_a_machine_begins_when_it_is_asked_and_not_when_it_was_last_looked_at() {
        let (mut giver, start) = (Giver::default(), Instant::now());
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(giver.watch(0, RAM, 7, at(0)), ByteCount(0));
        // Nobody looks at machines of a host with room.
        assert_eq!(giver.watch(100, RAM, 7, at(900)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(1099)), ByteCount(0));
        assert_eq!(giver.watch(100, RAM, 7, at(1100)), RAM);
    }

    #[test]
    fn a_machine_thrashes_when_most_of_what_is_taken_comes_back_and_recovers_when_it_does_not() {
        let (mut thrash, start) = (Thrash::default(), Instant::now());
        let mut at = |period: u32, taken, returned| {
            thrash.watch(taken, returned, start + THRASH_PERIOD * period);
            thrash.is_on
        };
        assert!(!at(0, 0, 0));
        assert!(at(1, 1000, 600), "600 of 1000 came back");
        assert!(!at(2, 2000, 1000), "400 of 1000 came back");
        assert!(!at(3, 2128, 1128), "a sample says nothing");
    }

    /// Counts nothing but what is charged.
    struct NoOverhead;

    impl Meter for NoOverhead {
        fn used(&mut self) -> ByteCount {
            ByteCount(0)
        }
    }

    /// One that has lost 1000 pages and wanted 600 of them back.
    fn thrashing() -> Watched {
        let (mut watched, start) = (Watched::default(), Instant::now());
        watched.thrash.watch(0, 0, start);
        watched.thrash.watch(1000, 600, start + THRASH_PERIOD);
        watched
    }

    /// What machines that use so many MiB each are asked for, in MiB by machine, and the room there is. The high mark is
    /// at 155 MiB, the low one at 150.
    fn asked(ram: &[u64], thrash: &[u32], spared: &[u32]) -> (Vec<(u32, u64)>, ByteCount) {
        let (asked, room, _) = asked_and_backed_off(ram, thrash, spared);
        (asked, room)
    }

    /// The same, and how often somebody was passed over.
    fn asked_and_backed_off(
        ram: &[u64],
        thrash: &[u32],
        spared: &[u32],
    ) -> (Vec<(u32, u64)>, ByteCount, u64) {
        const GROUP: GroupId = GroupId(1);
        let host = Host::new(Budget::of(ByteCount::mib(160)));
        host.ledger(|ledger| {
            ledger.add_group(GROUP);
            for (id, mib) in (0..).map(MachineId).zip(ram) {
                let terms = Terms { size: ByteCount::mib(1024), reservation: ByteCount(0) };
                ledger.admit(id, GROUP, terms).unwrap();
                ledger.settle(id, Kind::Resident, ByteCount::mib(*mib)).unwrap();
            }
        });
        let watched = (0..).zip(ram).map(|(id, _)| {
            (MachineId(id), if thrash.contains(&id) { thrashing() } else { Watched::default() })
        });
        let spared = spared.iter().copied().map(MachineId).collect();
        let (asked, room) = ask(&host, &mut NoOverhead, &mut VecDeque::new(), &watched.collect(), || spared);
        // The ledger's levels are finer than a page, so that it may ask for one more.
        let mib = |pages: u32| PageCount(pages.into()).bytes().0 >> 20;
        (asked.into_iter().map(|(id, pages)| (id.0, mib(pages))).collect(), room, host.backoffs())
    }

    #[test]
    fn to_pass_over_one_that_thrashes_is_counted_and_to_find_that_all_must_give_is_not() {
        let backed_off = |ram: &[u64], thrash: &[u32]| asked_and_backed_off(ram, thrash, &[]).2;
        assert_eq!(backed_off(&[110, 60], &[0]), 1);
        assert_eq!(backed_off(&[110, 60], &[]), 0, "nobody thrashes");
        assert_eq!(backed_off(&[100, 52], &[0]), 0, "nobody is asked");
        assert_eq!(backed_off(&[160, 10], &[0]), 0, "the other one has not enough");
    }

    #[test]
    fn the_largest_gives_down_to_the_low_mark_and_nobody_below_the_high_one() {
        assert_eq!(asked(&[110, 60], &[], &[]), (vec![(0, 20)], ByteCount(0)));
        assert_eq!(asked(&[100, 52], &[], &[]), (vec![], ByteCount::mib(3)));
    }

    #[test]
    fn a_machine_that_thrashes_is_passed_over_as_long_as_the_others_can_bring_the_host_to_the_high_mark() {
        assert_eq!(asked(&[110, 60], &[0], &[]).0, [(1, 20)], "down to the low mark");
        assert_eq!(asked(&[154, 16], &[0], &[]).0, [(1, 16)], "all it has, short of the low mark");
        assert_eq!(asked(&[160, 10], &[0], &[]).0, [(0, 15)], "10 of 15 MiB are not enough");
    }

    #[test]
    fn when_all_machines_thrash_no_more_is_taken_than_brings_the_host_to_the_high_mark() {
        assert_eq!(asked(&[110, 60], &[0, 1], &[]).0, [(0, 15)]);
    }

    #[test]
    fn a_machine_that_is_to_be_left_alone_gives_nothing_although_all_others_thrash() {
        assert_eq!(asked(&[110, 60], &[], &[0]).0, [(1, 20)]);
        assert_eq!(asked(&[110, 60], &[1], &[0]).0, [(1, 15)]);
        assert_eq!(asked(&[110, 60], &[0], &[0, 1]).0, []);
    }
}
