//! A machine under our own pager.
//!
//! Enters: steps. Leaves: a target in the ledger, which the governor works towards whenever the host is short, and orders
//! to its pager. The pager's statistics say what came of them. Nothing here waits: the manager's lock is held for reading
//! counters and writing numbers.
use super::chart::{Chart, Pages, Whereabouts};
use super::overhead::{Overhead, measure};
use super::{Backend, Departure, Done, Kind, Refused, Trouble};
use crate::homecoming::{Homecoming, Progress, stored};
use parking_lot::Mutex;
use plimsoll_linux::uffd::host::Host;
use plimsoll_linux::uffd::manager::Manager;
use plimsoll_linux::uffd::stats::MachineStats;
use plimsoll_policy::admission::Overheads;
use plimsoll_policy::view::{MachineView, Phase, Reading};
use plimsoll_policy::{Ppm, Rung, Rungs, Step};
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::maps::{MeasuredMapping, VmFlags};
use plimsoll_types::{ByteCount, MachineId, PageCount};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a machine is taken to be starting: our guests run within a second, those with a kernel within about ten.
const STARTING: Duration = Duration::from_secs(10);
/// How long an operator's order lasts of which nothing comes.
const BARREN: Duration = Duration::from_secs(3);
/// How often is looked whether a machine that is given back is home.
const HOMECOMING: Duration = Duration::from_millis(50);

/// A machine under our own pager.
pub struct Managed {
    manager: Arc<Mutex<Manager>>,
    host: Arc<Host>,
    /// What pagers of the host had done for guests when this machine was observed.
    served: u64,
    /// Pagers of the host that had ended when this machine was seen not to be gone.
    endings: AtomicU64,
    /// The manager's name for it.
    id: MachineId,
    process: Option<ProcessId>,
    /// The RAM its guest owns, once it was looked at.
    size: Option<ByteCount>,
    processors: u32,
    born: Instant,
    is_starting: bool,
    /// What the policy last wanted it to come to.
    target: Option<ByteCount>,
    /// Pages an operator asked for that were not taken yet.
    ordered: PageCount,
    /// When it last gave any, or was asked.
    gave: Instant,
    /// While it is given back.
    leaving: Option<Homecoming>,
    /// Why it was not.
    stayed: Option<String>,
    last: Option<(Instant, Counters)>,
    whereabouts: Option<Whereabouts>,
}

/// Counts that only grow.
#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    captured: u64,
    taken: u64,
    returned: u64,
    waited: Duration,
}

impl Counters {
    fn of(stats: &MachineStats) -> Self {
        // Pages on their way through limbo have not been taken yet. Those of zeros come back as if never touched.
        let stored = stats.stored;
        let taken = stored.same + stored.duplicate + stored.compressed + stored.raw;
        let captured = stats.captured;
        Self { captured, taken, returned: stats.faults.stored, waited: stats.waited }
    }
}

impl Managed {
    /// A machine that the manager has admitted under `id` just `now`, with so many virtual processors.
    pub fn new(manager: Arc<Mutex<Manager>>, id: MachineId, processors: u32, now: Instant) -> Self {
        let processors = processors.max(1);
        let host = Arc::clone(manager.lock().host());
        Self {
            manager,
            host,
            served: 0,
            endings: AtomicU64::new(u64::MAX),
            id,
            process: None,
            size: None,
            processors,
            born: now,
            is_starting: true,
            target: None,
            ordered: PageCount(0),
            gave: now,
            leaving: None,
            stayed: None,
            last: None,
            whereabouts: None,
        }
    }

    /// Its VMM is that process: what it costs can be measured.
    #[must_use]
    pub fn in_process(mut self, process: ProcessId) -> Self {
        self.process = Some(process);
        self
    }

    fn step(&mut self, step: Step) -> Done {
        match step {
            Step::Target(target) => {
                self.target = Some(target);
                self.aim(&self.manager.lock());
                Done::Begun
            }
            // The ledger already has whoever is above its target wait for the others.
            Step::Stall | Step::Resume => Done::Begun,
            Step::Balloon(_) => Done::Refused(Refused::NoBalloon),
            Step::Take { rung: Rung::Compress, .. } => Done::Begun,
            Step::Take { rung, .. } => Done::Refused(Refused::NoSuchRung(rung)),
        }
    }

    /// What a target leaves for pages in RAM: the rest of it is taken up by those in the store. One that comes home is to come to
    /// all it has.
    fn aim(&self, manager: &Manager) {
        if self.leaving.is_some() {
            manager.set_target(self.id, self.size);
            return;
        }
        let Some(target) = self.target else { return };
        manager.set_target(self.id, Some(target.saturating_sub(manager.stored(self.id))));
    }
}

impl Backend for Managed {
    fn observe(&mut self, id: MachineId, now: Instant) -> Result<MachineView, Trouble> {
        self.served = self.host.bustle().served();
        let (machine, stored, words, disk, seats) = {
            let manager = self.manager.lock();
            let machine = manager.machine(self.id).filter(|_| !manager.is_gone(self.id));
            let machine = machine.ok_or_else(|| match self.leaving {
                Some(leaving) if leaving.is_final() => Trouble::GivenBack,
                _ => Trouble::Gone("its VMM has ended".to_owned()),
            })?;
            self.aim(&manager);
            let (stored, disk) = (manager.stored(self.id), manager.on_disk(self.id));
            (machine, stored, manager.words(self.id), disk, manager.seats(self.id))
        };
        self.size = Some(machine.size);
        let stats = machine.stats;
        let counters = Counters::of(&stats);
        // Its pagers publish what they have counted once they have taken it over.
        let is_counted = stats.census.total() > PageCount(0);
        self.whereabouts = is_counted.then(|| Whereabouts {
            pages: Pages::of_census(&stats.census, disk),
            plugged: None,
            seats: seats.into_iter().filter_map(|(shard, place)| Some((shard, place?))).collect(),
            faults: stats.faults.total(),
            chart: Chart::Words(words),
        });
        let (then, before) = self.last.replace((now, counters)).unwrap_or((now, counters));
        let taken = PageCount(counters.taken.saturating_sub(before.taken));
        let captured = PageCount(counters.captured.saturating_sub(before.captured));
        if captured > PageCount(0) {
            self.gave = now;
        }
        // Where there is no more to be had now, an order is over: it is not kept for better times.
        let is_barren = now.saturating_duration_since(self.gave) >= BARREN;
        self.ordered = if is_barren { PageCount(0) } else { self.ordered.saturating_sub(captured) };
        let elapsed = now.saturating_duration_since(then) * self.processors;
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let waited = counters.waited.saturating_sub(before.waited).min(elapsed);
        self.is_starting = now.saturating_duration_since(self.born) < STARTING;
        Ok(MachineView {
            phase: if self.is_starting { Phase::Starting } else { Phase::Running },
            stored,
            active: stats.working_set.map(|pages| Reading::of(pages.bytes(), 0)),
            taken,
            returned: PageCount(counters.returned.saturating_sub(before.returned)),
            stalled: Ppm::of(nanoseconds(waited), nanoseconds(elapsed)),
            rungs: if self.leaving.is_some() { Rungs::NONE } else { Rungs::NONE.with(Rung::Compress) },
            ..MachineView::new(id, stats.ram.bytes() + stored)
        })
    }

    fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
        let pages = steps.iter().find_map(|step| match step {
            Step::Take { rung: Rung::Compress, pages, .. } => Some(*pages),
            _ => None,
        });
        // No pages are an order, too: what an earlier plan asked for is not wanted any more.
        let pages = pages.unwrap_or_default().max(self.ordered);
        let pages = u32::try_from(pages.0).unwrap_or(u32::MAX);
        let manager = self.manager.lock();
        // Of one that is parked everything is taken, whatever a plan has no need of.
        if !manager.is_parked(self.id) {
            manager.squeeze(self.id, pages);
        }
        drop(manager);
        steps.iter().map(|step| self.step(*step)).collect()
    }

    fn work(&mut self, now: Instant) -> Result<Option<Instant>, Trouble> {
        let Some(leaving) = &mut self.leaving else { return Ok(None) };
        let manager = self.manager.lock();
        // One that is gone is seen to be when it is looked at.
        let Some(machine) = manager.machine(self.id) else { return Ok(None) };
        if let Progress::Vain(why) = leaving.look(&manager, &[machine]) {
            (self.leaving, self.stayed) = (None, Some(why.to_string()));
            return Ok(None);
        }
        Ok(Some(now + HOMECOMING))
    }

    fn hold(&mut self, is_to: bool) {
        self.manager.lock().hold(self.id, is_to);
    }

    fn give_back(&mut self, budget: ByteCount) -> Result<(), String> {
        if self.leaving.is_some() {
            return Ok(());
        }
        let manager = self.manager.lock();
        let machine = manager.machine(self.id).filter(|_| !manager.is_lost(self.id));
        let machines = [machine.ok_or_else(|| "its pager cannot go on: end its VMM".to_owned())?];
        let leaving = Homecoming::begin(&manager, &machines, budget).map_err(|lack| {
            format!("{} of its memory are stored; {lack} for giving it back", stored(&machines))
        })?;
        drop(manager);
        (self.leaving, self.stayed) = (Some(leaving), None);
        self.aim(&self.manager.lock());
        Ok(())
    }

    fn departure(&self) -> Departure {
        match (&self.leaving, &self.stayed) {
            (Some(_), _) => Departure::UnderWay,
            (None, Some(why)) => Departure::Vain(why.clone()),
            (None, None) => Departure::None,
        }
    }

    fn reclaim(&mut self, pages: PageCount, now: Instant) -> Done {
        if self.leaving.is_some() && pages > PageCount(0) {
            return Done::Refused(Refused::Short("it is being given back to its VMM".to_owned()));
        }
        let manager = self.manager.lock();
        let there = manager.machine(self.id).map_or(PageCount(0), |machine| machine.stats.ram);
        (self.ordered, self.gave) = (pages.min(there), now);
        manager.squeeze(self.id, u32::try_from(self.ordered.0).unwrap_or(u32::MAX));
        Done::Begun
    }

    fn kind(&self) -> Kind {
        Kind::HandedOver
    }

    fn process(&self) -> Option<ProcessId> {
        self.process
    }

    fn size(&self) -> Option<ByteCount> {
        self.size
    }

    fn whereabouts(&self) -> Option<Whereabouts> {
        self.whereabouts.clone()
    }

    fn may_have_changed(&self) -> bool {
        let is_in_motion = self.is_starting || self.leaving.is_some() || self.ordered > PageCount(0);
        is_in_motion || self.host.bustle().served() != self.served
    }

    fn is_gone(&self) -> bool {
        let endings = self.host.bustle().endings();
        if self.endings.load(Ordering::Relaxed) == endings {
            return false;
        }
        let is_gone = self.manager.lock().is_gone(self.id);
        if !is_gone {
            self.endings.store(endings, Ordering::Relaxed);
        }
        is_gone
    }

    fn predicted(&self) -> Overheads {
        super::overhead::OWN_VMM
    }

    fn overhead(&mut self) -> Option<Overhead> {
        let tables = {
            let manager = self.manager.lock();
            let machine = manager.machine(self.id)?;
            // A page word of 8 bytes for each page, and what is beside them.
            ByteCount(machine.size.pages_floor().0 * 8) + ByteCount(machine.stats.table_bytes as u64)
        };
        // RAM and airlock are what our VMM keeps from its children.
        let is_guest = |one: &MeasuredMapping| one.flags.contains(VmFlags::DONT_FORK);
        Some(Overhead { tables, ..measure(self.process?, is_guest).ok()? })
    }
}

impl Drop for Managed {
    /// Whoever governs next starts from equal shares.
    fn drop(&mut self) {
        let manager = self.manager.lock();
        manager.set_target(self.id, None);
        manager.squeeze(self.id, 0);
    }
}

impl std::fmt::Debug for Managed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Managed").field("id", &self.id).field("target", &self.target).finish_non_exhaustive()
    }
}
