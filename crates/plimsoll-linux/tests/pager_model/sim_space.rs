//! [`Space`] over a [`Kernel`]: what one pager sees of its machine.
//!
//! Before and after each effect is a scheduling point. A call of a manager that was killed has no effect beyond what it
//! had already; a request that it had queued stays queued.
use super::kernel::{Kernel, Notice, Op, Ram, Request, State, one_in, point, zeros};
use super::life::{Flaw, Life};
use super::world::SEEN;
use plimsoll_core::replacement::Run;
use plimsoll_core::word::Gift;
use plimsoll_linux::uffd::space::{InstallStop, Installed, Presence, Space, SpaceError, SpaceEvent};
use plimsoll_linux::uffd::wire::{Item, Outcome, Stop};
use plimsoll_types::{PageBytes, PageIndex, SlotPage};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `ENOMEM`: a mapping cannot be split further.
const REFUSED: Outcome = Outcome { done: 0, stop: Some(Stop::Failed { errno: 12 }) };

/// The memory of one machine in the hands of one manager.
pub(crate) struct SimSpace {
    kernel: Arc<Kernel>,
    life: Arc<Life>,
    epoch: u64,
    flaw: Flaw,
    /// Whether what an earlier manager left unapplied has been read again.
    has_replayed: bool,
    /// Discards that a flaw holds back.
    late: Vec<SpaceEvent>,
    /// This is the call in which the manager dies.
    dying: bool,
    /// It has yet to look at what is where.
    taking_over: bool,
}

impl SimSpace {
    /// In the hands of `life`.
    pub(crate) fn new(kernel: Arc<Kernel>, life: Arc<Life>, epoch: u64, flaw: Flaw) -> Self {
        Self {
            kernel,
            life,
            epoch,
            flaw,
            has_replayed: false,
            late: Vec::new(),
            dying: false,
            taking_over: epoch > 0,
        }
    }

    /// It serves from now on.
    pub(crate) const fn took_over(&mut self) {
        self.taking_over = false;
    }

    /// The dead do nothing; and this may be the call in which the manager dies: then before it has any effect, or, if
    /// the agent is asked, with the request queued.
    fn enter(&mut self) -> Result<(), SpaceError> {
        point();
        if self.life.is_alive() && self.life.dies_in_call() {
            self.dying = true;
        }
        if !self.life.is_alive() {
            return Err(SpaceError::Gone);
        }
        Ok(())
    }

    /// Dies here if this is the call.
    fn leave<T>(&mut self, outcome: T) -> Result<T, SpaceError> {
        point();
        if self.dying {
            self.life.die_in_call();
        }
        if self.life.is_alive() { Ok(outcome) } else { Err(SpaceError::Gone) }
    }

    fn ask(&mut self, op: Op, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.enter()?;
        let ticket = {
            let mut state = self.kernel.state();
            let ticket = state.ticket();
            state.requests.push_back(Request { ticket, epoch: self.epoch, op, items: items.to_vec() });
            ticket
        };
        self.kernel.ring();
        if self.dying {
            return self.leave(Vec::new());
        }
        if self.taking_over && self.flaw == Flaw::NoBarrier {
            return self.leave(items.iter().map(|item| Outcome { done: item.pages, stop: None }).collect());
        }
        let life = Arc::clone(&self.life);
        let reply = self.kernel.manager_waits(|state| {
            let place = state.replies.iter().position(|(replied, _)| *replied == ticket);
            match place {
                _ if !life.is_alive() => Some(None),
                Some(place) => Some(Some(state.replies.swap_remove(place).1)),
                None => None,
            }
        });
        reply.ok_or(SpaceError::Gone)
    }

    fn ask_of(&mut self, op: Op, run: Run) -> Result<Outcome, SpaceError> {
        let outcomes = self.ask(op, &[Item::new(run.first, SlotPage(0), run.pages)])?;
        Ok(*outcomes.first().expect("one outcome an item"))
    }

    /// An answer that needs no agent.
    fn answered(&mut self, outcome: Outcome) -> Result<Outcome, SpaceError> {
        self.enter()?;
        self.leave(outcome)
    }

    /// Which of the pages are there. The page map is read piece by piece while the guest runs.
    fn look(&self, pages: Range<u32>) -> Vec<Range<u32>> {
        let mut ram: Vec<Range<u32>> = Vec::new();
        for page in pages {
            point();
            let mut state = self.kernel.state();
            if matches!(state.ram[page as usize], Ram::Present(_)) {
                ram.push(page..page + 1);
                state.note("seen present", page, 1);
            }
        }
        ram
    }

    /// Installs from `bytes`, page by page. No discard begins meanwhile; the guest runs.
    fn install(
        &mut self,
        first: u32,
        pages: u32,
        bytes: impl Fn(usize) -> Box<PageBytes>,
    ) -> Result<Installed, SpaceError> {
        self.enter()?;
        let mut state = self.kernel.state();
        let is_refused = state.changing > 0 || state.mischief(16);
        if is_refused {
            let is_hidden = self.flaw == Flaw::AgainHidden;
            drop(state);
            let told = Installed { pages: if is_hidden { pages } else { 0 }, stop: Some(InstallStop::Again) };
            return self.leave(if is_hidden { Installed { stop: None, ..told } } else { told });
        }
        let pages_asked = first as usize..(first + pages) as usize;
        assert!(
            state.watched[pages_asked].iter().all(|watched| *watched),
            "model: {pages} pages from {first} are installed where nothing is registered"
        );
        state.installing += 1;
        let mut done = 0;
        let mut stop = None;
        while done < pages {
            let page = (first + done) as usize;
            if !matches!(state.ram[page], Ram::Absent) {
                stop = Some(if done == 0 { InstallStop::Present } else { InstallStop::Again });
                break;
            }
            state.ram[page] = Ram::Present(bytes(done as usize));
            state.note("installed", first + done, 1);
            done += 1;
            if done < pages {
                drop(state);
                point();
                state = self.kernel.state();
                // A fatal signal, a page of the source that has to be brought: the kernel may stop anywhere.
                if !self.life.is_alive() || state.mischief(8) {
                    stop = Some(InstallStop::Again);
                    break;
                }
            }
        }
        state.installing -= 1;
        // Who was killed meanwhile may not come to the wake-up.
        if self.life.is_alive() {
            state.wake(first, done);
        }
        drop(state);
        self.kernel.ring();
        self.leave(Installed { pages: done, stop })
    }
}

impl Space for SimSpace {
    fn read_events(&mut self, events: &mut Vec<SpaceEvent>) -> Result<(), SpaceError> {
        self.enter()?;
        events.append(&mut self.late);
        {
            let mut state = self.kernel.state();
            let State { faults, discards, unapplied, trace, .. } = &mut *state;
            if !std::mem::replace(&mut self.has_replayed, true) {
                for discard in &*unapplied {
                    trace.push(("discard read again", discard.first, discard.pages()));
                    SEEN.replayed.fetch_add(1, Ordering::Relaxed);
                    events.push(discard.event());
                }
            }
            // The kernel hands out faults first, whatever the order in which things happened.
            for fault in faults.iter_mut().filter(|fault| !fault.is_read) {
                fault.is_read = true;
                trace.push(("fault read", fault.page, 1));
                events.push(SpaceEvent::Fault { page: PageIndex(fault.page), access: fault.access });
            }
            for discard in discards.iter_mut().filter(|discard| discard.notice == Notice::Unread) {
                discard.notice = Notice::Read;
                trace.push(("discard read", discard.first, discard.pages()));
                unapplied.push(discard.clone());
                let event = discard.event();
                let to = if self.flaw == Flaw::DiscardsLate { &mut self.late } else { &mut *events };
                to.push(event);
            }
        }
        self.kernel.ring();
        self.leave(())
    }

    fn applied(&mut self) {
        self.kernel.state().unapplied.clear();
    }

    fn copy(&mut self, first: PageIndex, pages: &[PageBytes]) -> Result<Installed, SpaceError> {
        let count = u32::try_from(pages.len()).expect("at most a batch");
        self.install(first.0, count, |place| Box::new(pages[place]))
    }

    fn zero(&mut self, first: PageIndex, pages: u32) -> Result<Installed, SpaceError> {
        self.install(first.0, pages, |_| zeros())
    }

    fn wake(&mut self, first: PageIndex, pages: u32) -> Result<(), SpaceError> {
        self.enter()?;
        self.kernel.state().wake(first.0, pages);
        self.kernel.ring();
        self.leave(())
    }

    fn poison(&mut self, page: PageIndex) -> Result<Installed, SpaceError> {
        self.enter()?;
        let installed = {
            let mut state = self.kernel.state();
            if state.changing > 0 {
                Installed { pages: 0, stop: Some(InstallStop::Again) }
            } else if matches!(state.ram[page.get()], Ram::Present(_)) {
                Installed { pages: 0, stop: Some(InstallStop::Present) }
            } else {
                state.ram[page.get()] = Ram::Poisoned;
                state.wake(page.0, 1);
                Installed { pages: 1, stop: None }
            }
        };
        self.kernel.ring();
        self.leave(installed)
    }

    fn move_out(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.ask(Op::MoveOut, items)
    }

    fn move_in(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.ask(Op::MoveIn, items)
    }

    /// The mapping cannot be split, now and then: then the manager keeps the block.
    fn unwatch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
        if self.kernel.state().mischief(4) {
            return self.answered(REFUSED);
        }
        self.ask_of(Op::Unwatch, run)
    }

    fn watch(&mut self, run: Run) -> Result<Outcome, SpaceError> {
        if self.taking_over && self.flaw == Flaw::TakeOverUnwatched {
            return self.answered(Outcome { done: run.pages, stop: None });
        }
        if !self.taking_over && self.kernel.state().mischief(8) {
            return self.answered(REFUSED);
        }
        self.ask_of(Op::Watch, run)
    }

    /// What it says of how pages were given back is for counting: it may say anything, also of what is there again.
    fn gifts(&mut self, items: &[Item]) -> Result<Vec<Outcome>, SpaceError> {
        self.enter()?;
        let told = |item: &Item| {
            if one_in(2) {
                Outcome { done: 0, stop: Some(Stop::Given { gift: Gift::Ballooned, pages: 1 }) }
            } else {
                Outcome { done: item.pages, stop: None }
            }
        };
        self.leave(items.iter().map(told).collect())
    }

    fn run_presence(&mut self, run: Run) -> Result<Presence, SpaceError> {
        self.enter()?;
        let ram = self.look(run.first.0..run.first.0 + run.pages);
        self.leave(Presence::new(ram, Vec::new()))
    }

    /// What is all there may have been made a huge page meanwhile.
    fn is_huge(&mut self, run: Run) -> Result<bool, SpaceError> {
        self.enter()?;
        let pages = run.first.get()..(run.first.0 + run.pages) as usize;
        let is_full = self.kernel.state().ram[pages].iter().all(|page| matches!(page, Ram::Present(_)));
        self.leave(is_full && one_in(2))
    }

    fn has_events(&mut self) -> Result<bool, SpaceError> {
        self.enter()?;
        let has_event = self.kernel.state().has_event();
        self.leave(has_event)
    }

    fn populate(&mut self, items: &[Item]) -> Result<(), SpaceError> {
        self.ask(Op::Populate, items).map(drop)
    }

    fn zap(&mut self, items: &[Item]) -> Result<(), SpaceError> {
        let outcomes = self.ask(Op::Zap, items)?;
        assert!(
            outcomes.iter().all(|outcome| outcome.stop.is_none()),
            "model: a zap of this epoch was refused"
        );
        Ok(())
    }

    fn read_slots(&mut self, first: SlotPage, pages: &mut [PageBytes]) -> Result<(), SpaceError> {
        self.enter()?;
        {
            let state = self.kernel.state();
            for (at, page) in (first.get()..).zip(pages) {
                let machine = state.machine;
                let Some(held) = &state.slots[at] else {
                    panic!("model: slot page {at} of machine {machine} is empty and read");
                };
                page.copy_from_slice(&held[..]);
            }
        }
        self.leave(())
    }

    fn begin_epoch(&mut self, epoch: u64) -> Result<(), SpaceError> {
        self.epoch = epoch;
        self.ask(Op::SetEpoch, &[]).map(drop)
    }

    fn presence(&mut self) -> Result<Presence, SpaceError> {
        self.enter()?;
        let pages = self.kernel.state().ram.len();
        let ram = self.look(0..u32::try_from(pages).expect("a few pages"));
        point();
        let mut slots = Vec::new();
        for (at, held) in (0..).zip(&self.kernel.state().slots) {
            if held.is_some() && self.flaw != Flaw::AirlockOverlooked {
                slots.push(at..at + 1);
            }
        }
        self.leave(Presence::new(ram, slots))
    }
}
