//! Giving a machine back to its VMM: everything of it into guest RAM, and then all of it to the kernel.
//!
//! Enters: the manager's order to bring a machine *home*, and later the one to let go. Leaves: a machine that goes on as if
//! nobody had ever managed it. What must never happen: a page that is unregistered while its bytes are elsewhere. The
//! guest's next touch would find zeros.
//!
//! ```text
//!  1  pagers: take nothing more, bring back what is in limbo and in the store, give the airlock back
//!     ... a shard of which nothing is elsewhere is home, and stays so: discards and first touches need nobody's bytes ...
//!  2  manager: all shards of the machine are home; orders them to let go
//!  3  agents: UNREGISTER everything           waiters go on; the kernel serves touches, with zeros
//!     ... pagers go on reading events, until the VMM is told ...
//!  4  manager: enters into the register that the machine is left, tells the VMM, shard by shard, strikes it, and closes
//! ```
//!
//! The interleavings that worry us:
//!
//! * **The manager dies before 4.** The next one registers everything again and looks, as at every take-over: what the guest has
//!   put there since is found, and what it has discarded unheard is not. The order is dropped whole: the machine is managed as
//!   before, and whoever gave it gives it again.
//! * **It dies in 4.** What the register says is final: nothing of the machine is registered, nothing of it elsewhere. The next
//!   manager goes on: it registers nothing, tells every shard, also those that have been told, and strikes the machine. Without
//!   a register, in one process, nobody can die there and leave somebody else.
//! * **A discard that saw its pages registered and queues its event after 3.** Nobody of the manager reads it any more. The VMM
//!   reads such events until no discard is left that began before (`plimsoll_vmm::agent`).
//! * **A region cannot be unregistered**, for want of memory in the kernel. It is tried again. Meanwhile its faults are served, and
//!   those of regions that can are nobody's: whoever waited there has gone on.
//! * **Memory runs out on the way**, because the guests of the host use more meanwhile and nobody takes anything from them. A
//!   page that is refused memory is tried again, and the pager says that it is short, so that the order can be withdrawn before
//!   guests wait for long; then the machine is managed as before.
//! * **A page is lost on the way.** It is poisoned as if it had been touched, and the mark stays. A mark that the guest has
//!   discarded unheard before a manager dies is a mark again for the next one.
use super::pager::{Pager, PagerError, Served};
use super::probe::Step;
use super::reclaim::ZAP_BATCH;
use super::recovery::regions;
use super::space::Space;
use super::wire::Stop;
use plimsoll_core::machine::FaultEffect;
use plimsoll_core::map::Words;
use plimsoll_core::word::{PageState, StateKind};
use plimsoll_store::SlabMemory;
use plimsoll_types::{PageCount, PageIndex};
use std::sync::atomic::Ordering;

/// Pages brought between two looks at the guest's faults.
const BROUGHT_MAX: usize = 64;
/// Pages looked at between two looks at the guest's faults.
const LOOKED_MAX: u32 = 1 << 16;

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// A step of bringing the machine home. True if something was done.
    pub(super) fn come_home(&mut self) -> Result<bool, PagerError> {
        let limit = self.machine.layout().page_limit().0;
        let last = limit.min(self.homeward.saturating_add(LOOKED_MAX));
        let (mut brought, mut is_short, mut is_far) = (0, false, false);
        while self.homeward < last && brought < BROUGHT_MAX {
            let page = PageIndex(self.homeward);
            if is_elsewhere(self.machine.state(page)?) {
                match self.bring_home(page)? {
                    Served::Done => brought += 1,
                    Served::Later => break,
                    // Whoever reads it says so.
                    Served::Far => {
                        is_far = true;
                        break;
                    }
                    Served::NoMemory => {
                        is_short = true;
                        break;
                    }
                }
            }
            self.homeward += 1;
        }
        // What came out of limbo is there twice until its slot page is given back, and what came out of the store is charged
        // twice until that is settled.
        let residue = self.machine.airlock().residue().0;
        let is_through = self.homeward == limit;
        if residue >= ZAP_BATCH || (residue > 0 && (is_short || is_through)) {
            self.zap()?;
        }
        if brought > 0 {
            self.settle_store()?;
        }
        let census = self.machine.census();
        let kinds = [StateKind::Capturing, StateKind::Limbo, StateKind::Stored, StateKind::File];
        let is_home = is_through && residue == 0 && kinds.iter().all(|kind| census.of(*kind) == PageCount(0));
        self.orders.is_home.store(is_home, Ordering::Release);
        // Faults lack memory before this does: they may take the last of it.
        self.orders.is_short.store(is_short || self.has_refused_faults(), Ordering::Relaxed);
        Ok(!(is_short || is_far || is_through && residue == 0))
    }

    /// Takes nothing as done: the order may be given anew.
    pub(super) fn stay(&mut self) {
        self.homeward = 0;
        self.orders.is_home.store(false, Ordering::Release);
        self.orders.is_short.store(false, Ordering::Relaxed);
    }

    fn bring_home(&mut self, page: PageIndex) -> Result<Served, PagerError> {
        match self.machine.fault(page)? {
            FaultEffect::Return { first, at } => self.return_block(first, at),
            FaultEffect::Install(source) => match self.install(page, source)? {
                Ok(installed) => self.finish(page, installed),
                Err(served) => Ok(served),
            },
            // The mark is in place of the page when the kernel is alone with it.
            FaultEffect::Poison => self.poison(page),
            FaultEffect::Wait => Ok(Served::Later),
            FaultEffect::InstallIfMissing | FaultEffect::Nothing => Ok(Served::Done),
        }
    }

    /// Leaves all of a machine that is home to the kernel. False if the kernel will not have all of it just now: to be tried
    /// again, and until then what is left is served. Its pager takes no turn once it is true.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn let_go(&mut self) -> Result<bool, PagerError> {
        for run in regions(self.machine.layout()).collect::<Vec<_>>() {
            match self.space.unwatch(run)?.stop {
                // Whoever waited there has been woken.
                None => self.settle_faults_of(run),
                Some(Stop::StaleEpoch) => return Err(PagerError::Superseded),
                Some(_) => return Ok(false),
            }
        }
        self.reached(Step::Unwatched)?;
        Ok(true)
    }

    /// Reads events of a machine that was let go, for those who wait for that: what they tell is nobody's business.
    ///
    /// # Errors
    /// [`PagerError`].
    pub fn see_off(&mut self) -> Result<(), PagerError> {
        let mut events = Vec::new();
        self.space.read_events(&mut events)?;
        self.space.applied();
        Ok(())
    }
}

const fn is_elsewhere(state: PageState) -> bool {
    matches!(
        state,
        PageState::Capturing(_)
            | PageState::Limbo(_)
            | PageState::Stored(_)
            | PageState::File(_)
            | PageState::Poisoned
    )
}
