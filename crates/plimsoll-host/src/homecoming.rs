//! Giving machines of our own pager back to their VMMs: one that is released, or all of a daemon that stops.
//!
//! Enters: machines. Leaves: machines that go on alone, or the reason why they are managed as before. What must never happen: a
//! machine that is let go before all are home that go together, or guests that wait for memory because nobody takes any while
//! theirs comes back. How one is given back stands at the head of `plimsoll_linux::uffd`'s `giveback`; nothing here waits for it.
//! An order that is under way when the manager dies is dropped whole, unless the register says already that the machine is left;
//! then the next manager sees it off.
use plimsoll_core::word::StateKind;
use plimsoll_linux::uffd::manager::{MachineView, Manager};
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use std::fs;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long machines are given to come home before they are managed as before, and the bytes that add a second to that.
const PATIENCE: Duration = Duration::from_secs(60);
const PACE: u64 = 64 << 20;
/// How long guests may wait for memory meanwhile.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);

/// What of machines is in stores, as last published.
pub fn stored(machines: &[MachineView]) -> ByteCount {
    machines.iter().map(|view| view.stats.census.of(StateKind::Stored).bytes()).sum()
}

/// What is elsewhere has no room in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoRoom {
    /// Not within the budget.
    #[error("the budget of {budget} has {left} left ({used} in use)")]
    Budget {
        /// What everybody may use.
        budget: ByteCount,
        /// What of it may be installed. Nearer to the line than this nobody gets a page.
        left: ByteCount,
        /// What is used of it.
        used: ByteCount,
    },
    /// Not on the host.
    #[error("the host has {available} available")]
    Host {
        /// What it has.
        available: ByteCount,
    },
}

/// Why machines did not come home. They are managed as before.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Vain {
    /// Its pager could not go on.
    #[error("{0} is no longer managed")]
    Lost(String),
    /// Guests wait for memory, because nobody gives any.
    #[error("the guests need the memory that is left")]
    Short,
    /// It has taken longer than what is elsewhere accounts for.
    #[error("it takes too long")]
    Late,
}

/// How far they have come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// On their way, or let go and not forgotten yet.
    UnderWay,
    /// Let go, and the kernel or an agent does not let us: there is no way back.
    Stuck,
    /// Managed as before.
    Vain(Vain),
}

/// Machines on their way home.
#[derive(Clone, Copy, Debug)]
pub struct Homecoming {
    /// By when they must be home.
    due: Instant,
    /// Since when there was no memory for that.
    short_since: Option<Instant>,
    /// All were home, and have been let go.
    is_final: bool,
}

impl Homecoming {
    /// Has everything of the machines brought back into their RAM, where there is room for it within `budget` and on the host.
    ///
    /// # Errors
    /// [`NoRoom`]; nothing was begun.
    pub fn begin(manager: &Manager, machines: &[MachineView], budget: ByteCount) -> Result<Self, NoRoom> {
        let away = stored(machines);
        let (left, used) = manager.host().ledger(|ledger| (ledger.left(), ledger.used()));
        if away > left {
            return Err(NoRoom::Budget { budget, left, used });
        }
        let available = fs::read_to_string("/proc/meminfo").ok();
        let available = available.and_then(|text| parse_meminfo(&text, "MemAvailable"));
        if let Some(available) = available.filter(|available| away > *available) {
            return Err(NoRoom::Host { available });
        }
        machines.iter().for_each(|view| manager.go_home(view.id, true));
        let due = Instant::now() + PATIENCE + Duration::from_secs(away.0 / PACE);
        Ok(Self { due, short_since: None, is_final: false })
    }

    /// Goes on: lets them go when all that are left of them are home, withdraws the order when that is in vain.
    pub fn look(&mut self, manager: &Manager, machines: &[MachineView]) -> Progress {
        if self.is_final {
            let is_late = Instant::now() >= self.due + PATIENCE;
            return if is_late { Progress::Stuck } else { Progress::UnderWay };
        }
        if machines.iter().all(|view| manager.is_home(view.id)) {
            // All are home, so each of them is.
            machines.iter().for_each(|view| {
                manager.let_go(view.id);
            });
            self.is_final = true;
            return Progress::UnderWay;
        }
        let is_short = machines.iter().any(|view| manager.is_short(view.id));
        self.short_since = is_short.then(|| self.short_since.unwrap_or_else(Instant::now));
        let is_long = |since: Instant| since.elapsed() >= SHORT_PATIENCE;
        let why = match machines.iter().find(|view| manager.is_lost(view.id)) {
            Some(view) => Vain::Lost(view.name.clone()),
            None if self.short_since.is_some_and(is_long) => Vain::Short,
            None if Instant::now() >= self.due => Vain::Late,
            None => return Progress::UnderWay,
        };
        machines.iter().for_each(|view| manager.go_home(view.id, false));
        Progress::Vain(why)
    }

    /// True once they have been let go: there is no way back.
    pub const fn is_final(&self) -> bool {
        self.is_final
    }
}
