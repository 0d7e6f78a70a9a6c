//! The pager as it is shipped: a manager in this process, and guests that hand their memory over.
use super::{Keeper, STAY_MAX, Taken, check_away};
use crate::guest::Guest;
use crate::pager::Scene;
use crate::report::Sample;
use crate::session::{BenchError, Interrupt};
use anyhow::{Context, Result, anyhow};
use plimsoll_core::ledger::{Budget, Kind, Usage};
use plimsoll_linux::uffd::host::Host;
use plimsoll_linux::uffd::manager::{Manager, Membership, Meter, Vault};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_linux::uffd::stats::MachineStats;
use plimsoll_linux::uffd::waiting::Waiting;
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{BLOCK_PAGES, ByteCount, DomainId, GroupId, MachineId, PAGE_SIZE, PageCount};
use plimsoll_vmm::VmmConfig;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// So much that nobody is ever short.
const PLENTY: ByteCount = ByteCount::mib(8192);
/// Of all guests of benchmarks.
pub(crate) const MEMBERSHIP: Membership =
    Membership { group: GroupId(1), domain: DomainId(1), reservation: ByteCount(0) };
/// How often the ledger is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// Longer than taking any guest's pages takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory that has not grown for so long is as full as it gets.
const QUIET: Duration = Duration::from_millis(20);

/// A pager publishes what it has counted at least so often.
const TOLD_AFTER: Duration = Duration::from_millis(250);

/// A manager that is stopped when it is dropped.
pub(crate) struct Running(Option<Manager>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(manager) = self.0.take() {
            // The guests have ended: nobody needs what is in the vault.
            drop(manager.stop());
        }
    }
}

impl Running {
    pub(crate) fn start(vault: Vault) -> Result<Self> {
        let manager = Manager::start(vault, Arc::new(NoProbe)).context("cannot start a manager")?;
        Ok(Self(Some(manager)))
    }

    pub(crate) fn manager(&self) -> Result<&Manager> {
        self.0.as_ref().context("the manager was stopped")
    }

    pub(crate) fn govern(&mut self, meter: impl Meter + 'static, sample_period: Duration) -> Result<()> {
        let manager = self.manager_mut()?;
        manager.govern(Box::new(meter), sample_period).context("cannot start the governor")
    }

    /// Starts a guest that hands its memory over.
    pub(crate) fn admit(&mut self, config: &VmmConfig, interrupt: &Interrupt) -> Result<Managed, BenchError> {
        let (mut guest, socket) = Guest::launch(config, interrupt)?;
        let process = Pidfd::open(guest.process().process()).context("a guest has ended")?;
        let admitted = self.manager_mut()?.admit(socket, process, MEMBERSHIP);
        let id = admitted.context("a guest was not admitted")?;
        guest.until_started()?;
        Ok(Managed { id, guest })
    }

    fn manager_mut(&mut self) -> Result<&mut Manager> {
        self.0.as_mut().context("the manager was stopped")
    }
}

/// A guest and its identity under the manager.
pub(crate) struct Managed {
    pub(crate) id: MachineId,
    pub(crate) guest: Guest,
}

/// Managed guests and their manager. The guests end first.
pub(crate) struct Ours {
    first: Managed,
    others: Vec<Managed>,
    manager: Running,
    interrupt: Interrupt,
}

/// Everything that is charged is what is used.
struct Charged(Arc<Host>);

impl Meter for Charged {
    fn used(&mut self) -> ByteCount {
        self.0.ledger(|ledger| ledger.host_usage().total())
    }
}

/// Memory that a machine's pages take.
fn in_memory(usage: &Usage) -> ByteCount {
    usage.of(Kind::Resident) + usage.of(Kind::Limbo)
}

impl Ours {
    /// So many guests, at least one, with one manager.
    pub(crate) fn start_many(
        config: &VmmConfig,
        count: usize,
        scene: &Scene<'_>,
    ) -> Result<Self, BenchError> {
        let mut all = Self::within(Budget::of(PLENTY), config, scene.waiting, scene.interrupt)?;
        for _ in 1..count {
            let other = all.manager.admit(config, scene.interrupt)?;
            all.others.push(other);
        }
        Ok(all)
    }

    /// One guest, with a manager that has this budget once it [governs](Self::govern).
    pub(crate) fn within(
        budget: Budget,
        config: &VmmConfig,
        waiting: Waiting,
        interrupt: &Interrupt,
    ) -> Result<Self, BenchError> {
        let mut manager = Running::start(Vault::new(budget, PLENTY))?;
        manager.manager()?.host().set_waiting(waiting);
        let first = manager.admit(config, interrupt)?;
        Ok(Self { first, others: Vec::new(), manager, interrupt: interrupt.clone() })
    }

    /// All that the ledger has charged: guests' pages, stored ones, tables.
    pub(crate) fn charged(&mut self) -> Result<ByteCount> {
        Ok(Charged(Arc::clone(self.manager.manager()?.host())).used())
    }

    fn machines(&mut self) -> impl Iterator<Item = &mut Managed> {
        std::iter::once(&mut self.first).chain(&mut self.others)
    }

    /// The first guest.
    pub(crate) fn first(&mut self) -> &mut Guest {
        &mut self.first.guest
    }

    /// All guests.
    pub(crate) fn guests(&mut self) -> impl Iterator<Item = &mut Guest> {
        self.machines().map(|machine| &mut machine.guest)
    }

    /// Starts the governor.
    pub(crate) fn govern(&mut self, sample_period: Duration) -> Result<()> {
        let meter = Charged(Arc::clone(self.manager.manager()?.host()));
        self.manager.govern(meter, sample_period)
    }

    /// Takes so many pages of the first guest, which may go on meanwhile.
    pub(crate) fn take(&mut self, pages: u64) -> Result<(), BenchError> {
        let id = self.first.id;
        let goal = in_memory(&self.usage(id)?).saturating_sub(PageCount(pages).bytes());
        self.squeeze(id, u32::try_from(pages).unwrap_or(u32::MAX))?;
        self.until(id, "pages to be taken", |usage| in_memory(usage) <= goal)?;
        Ok(self.squeeze(id, 0)?)
    }

    /// Has the first guest's limbo filled, and as little stored as can be.
    pub(crate) fn fill_limbo(&mut self) -> Result<(), BenchError> {
        let id = self.first.id;
        self.squeeze(id, 1)?;
        let mut last = (ByteCount(0), Instant::now());
        self.until(id, "limbo to fill", |usage| {
            let limbo = usage.of(Kind::Limbo);
            if limbo != last.0 {
                last = (limbo, Instant::now());
            }
            limbo > ByteCount(0) && last.1.elapsed() >= QUIET
        })?;
        Ok(self.squeeze(id, 0)?)
    }

    /// Wakes the first guest, and waits until what it used last is back.
    pub(crate) fn bring_back(&mut self) -> Result<(), BenchError> {
        let id = self.first.id;
        self.manager.manager()?.wake(id);
        let mut last = (ByteCount(0), Instant::now());
        self.until(id, "the working set to come back", |usage| {
            let resident = usage.of(Kind::Resident);
            if resident != last.0 {
                last = (resident, Instant::now());
            }
            last.1.elapsed() >= QUIET
        })
    }

    /// How many of the first guest's faults found their page in limbo, ever.
    pub(crate) fn limbo_faults(&mut self) -> Result<u64> {
        // The pager tells what it has counted after at most this.
        std::thread::sleep(TOLD_AFTER);
        let id = self.first.id;
        let machine = self.manager.manager()?.machine(id).context("a guest is gone")?;
        Ok(machine.stats.faults.limbo)
    }

    /// What the first guest does in a second from now on for so long, with what its manager is told at the beginning.
    pub(crate) fn operations_for(
        &mut self,
        length: Duration,
        begin: impl FnOnce(&Manager, MachineId),
    ) -> Result<Sample, BenchError> {
        let Self { first: Managed { id, guest }, manager, .. } = self;
        let manager = manager.manager()?;
        let ns = u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
        guest.operations_for(0, ns, || {
            begin(manager, *id);
            Ok(())
        })
    }

    /// How many of the first guest's pages came back to it, ever, as far as its pager has told yet.
    pub(crate) fn came_back(&mut self) -> Result<u64> {
        let machine = self.manager.manager()?.machine(self.first.id).context("a guest is gone")?;
        let MachineStats { faults, blocks, .. } = machine.stats;
        Ok(faults.limbo + faults.stored + blocks.returned * u64::from(BLOCK_PAGES - 1))
    }

    fn squeeze(&mut self, id: MachineId, pages: u32) -> Result<()> {
        self.manager.manager()?.squeeze(id, pages);
        Ok(())
    }

    fn usage(&mut self, id: MachineId) -> Result<Usage> {
        Ok(self.manager.manager()?.host().ledger(|ledger| ledger.usage(id))?)
    }

    /// Waits until the ledger says something of a machine.
    fn until(
        &mut self,
        id: MachineId,
        what: &str,
        mut condition: impl FnMut(&Usage) -> bool,
    ) -> Result<(), BenchError> {
        let start = Instant::now();
        loop {
            self.interrupt.check()?;
            let usage = self.usage(id)?;
            if condition(&usage) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                return Err(anyhow!("waited {} s in vain for {what}: {usage:?}", PATIENCE.as_secs()).into());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

impl Keeper for Ours {
    fn start(config: &VmmConfig, scene: &Scene<'_>) -> Result<Self, BenchError> {
        Self::start_many(config, 1, scene)
    }

    fn guest(&mut self) -> &mut Guest {
        self.first()
    }

    fn page_out(&mut self) -> Result<Taken, BenchError> {
        let ids: Vec<MachineId> = self.machines().map(|machine| machine.id).collect();
        let before = self.first.guest.present()?;
        let (cpu, start) = (self.first.guest.cpu_seconds()?, Instant::now());
        for id in &ids {
            self.squeeze(*id, u32::MAX)?;
        }
        let goal = ByteCount((STAY_MAX * PAGE_SIZE) as u64);
        for id in &ids {
            self.until(*id, "pages to leave", |usage| in_memory(usage) <= goal)?;
        }
        let seconds = start.elapsed().as_secs_f64();
        let cpu_seconds = self.first.guest.cpu_seconds()? - cpu;
        for id in &ids {
            self.squeeze(*id, 0)?;
        }
        for guest in self.guests() {
            check_away("plimsoll", guest)?;
        }
        let pages = before.saturating_sub(self.first.guest.present()?) as u64;
        Ok(Taken { pages, seconds, cpu_seconds })
    }
}
