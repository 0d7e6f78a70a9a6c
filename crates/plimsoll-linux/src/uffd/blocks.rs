//! Huge pages: blocks that are left to the kernel, taken back from it, and brought back whole.
//!
//! Memory that is registered gets no huge pages from the kernel. So a block that the guest touches for the first time is
//! *left to the kernel* while the host has plenty: it is unregistered, charged whole, and served as if nobody managed it.
//! Reclaim and sampling *watch* it again before they take anything of it. A huge page they take moves to the airlock as
//! one page of 2 MiB; when it is touched there, it moves back as one.
//!
//! What must never happen: a page taken from a block that is not registered. The guest's next touch would find zeros.
use super::pager::{Pager, PagerError, Served};
use super::probe::Step;
use super::space::{Space, SpaceError};
use super::wire::{Item, Outcome, Stop};
use plimsoll_core::ledger::Purpose;
use plimsoll_core::map::Words;
use plimsoll_core::replacement::{Round, Run};
use plimsoll_store::SlabMemory;
use plimsoll_types::{BlockIndex, PageIndex, SlotPage};
use std::time::{Duration, Instant};

/// How long blocks are kept from a kernel that makes no huge pages of them.
const DISAPPOINTMENT: Duration = Duration::from_secs(10);
/// Blocks in a row that were left to the kernel and did not become huge, after which it is taken not to make any.
const MISSES_MAX: u32 = 2;

/// What came of leaving blocks to the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Kernel {
    /// The block that was left to it last.
    last: Option<BlockIndex>,
    misses: u32,
    shunned_until: Option<Instant>,
}

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// Leaves an untouched block to the kernel if memory is plentiful and it makes huge pages. True if it was done:
    /// whoever waits there goes on.
    pub(super) fn leave_to_kernel(&mut self, block: BlockIndex) -> Result<bool, PagerError> {
        let run = self.machine.block(block);
        if !self.machine.is_untouched(block) || !self.makes_huge_pages()? {
            return Ok(false);
        }
        // A discard that is read only when the kernel serves the block would, after a crash, be taken for one of what the
        // guest has put there since.
        if self.space.has_events()? || !self.charge(run.pages, Purpose::Block) {
            return Ok(false);
        }
        let outcome = self.space.unwatch(run)?;
        self.reached(Step::Unwatched)?;
        match outcome.stop {
            None => {}
            Some(Stop::StaleEpoch) => return Err(PagerError::Superseded),
            // The mapping cannot be split further, or the like: the block stays ours, and the charge is settled.
            Some(_) => {
                self.kernel.shunned_until = Some(Instant::now() + DISAPPOINTMENT);
                return Ok(false);
            }
        }
        self.machine.unwatched(block)?;
        self.kernel.last = Some(block);
        self.stats.blocks.left += 1;
        self.settle_faults_of(run);
        Ok(true)
    }

    /// Whether the block left to the kernel last became huge, as far as that can be told.
    fn makes_huge_pages(&mut self) -> Result<bool, PagerError> {
        if let Some(until) = self.kernel.shunned_until {
            if Instant::now() < until {
                return Ok(false);
            }
            self.kernel = Kernel::default();
        }
        let Some(block) = self.kernel.last.filter(|block| self.machine.is_unwatched(*block)) else {
            return Ok(true);
        };
        if self.space.is_huge(self.machine.block(block))? {
            self.kernel.misses = 0;
            return Ok(true);
        }
        // It was charged whole for the few pages it has: they are counted again.
        self.watch(block)?;
        self.kernel.last = None;
        self.kernel.misses += 1;
        if self.kernel.misses < MISSES_MAX {
            return Ok(true);
        }
        self.kernel.shunned_until = Some(Instant::now() + DISAPPOINTMENT);
        Ok(false)
    }

    /// Takes a block back from the kernel. False if it will not have it.
    pub(super) fn watch(&mut self, block: BlockIndex) -> Result<bool, PagerError> {
        let run = self.machine.block(block);
        match self.space.watch(run)?.stop {
            None => {}
            Some(Stop::StaleEpoch) => return Err(PagerError::Superseded),
            Some(_) => return Ok(false),
        }
        self.reached(Step::Watched)?;
        // A discard from before has gone; one from now on is an event, newer than what is seen here.
        let presence = self.space.run_presence(run)?;
        self.machine.watched(block, |page| presence.has_page(page))?;
        self.stats.blocks.watched += 1;
        self.wonder(run);
        Ok(true)
    }

    /// The runs that can be taken: of a block that was left to the kernel, what is found there.
    pub(super) fn takeable(&mut self, runs: Vec<Run>) -> Result<Vec<Run>, PagerError> {
        let mut found = Vec::with_capacity(runs.len());
        for run in runs {
            let block = run.first.block();
            if !self.machine.is_unwatched(block) {
                found.push(run);
            } else if self.watch(block)? {
                found.extend(self.machine.resident_runs(block));
            }
        }
        Ok(found)
    }

    /// Whether the run is one huge page that is to be taken, and brought back, as one.
    pub(super) fn goes_whole(&mut self, run: Run, round: Round) -> Result<bool, PagerError> {
        let is_block = run == self.machine.block(run.first.block());
        Ok(is_block && round == Round::Whole && self.space.is_huge(run)?)
    }

    /// Moves a block back from its slot.
    pub(super) fn return_block(&mut self, first: PageIndex, at: SlotPage) -> Result<Served, PagerError> {
        let run = self.machine.block(first.block());
        self.machine.begin_return(run, at)?;
        let outcomes = self.space.move_in(&[Item::new(first, at, run.pages)])?;
        self.reached(Step::MovedBack)?;
        let outcome = outcomes.first().copied().unwrap_or(Outcome { done: 0, stop: Some(Stop::Again) });
        for offset in 0..run.pages {
            let (page, at) = (PageIndex(first.0 + offset), SlotPage(at.0 + offset));
            if offset < outcome.done {
                self.machine.returned(page, at)?;
            } else {
                self.machine.stayed(page, at)?;
            }
        }
        let next = PageIndex(first.0 + outcome.done);
        match outcome.stop {
            None => {
                self.stats.blocks.returned += 1;
                self.stats.faults.limbo += 1;
                self.settle_faults_of(run);
                Ok(Served::Done)
            }
            Some(Stop::StaleEpoch) => Err(PagerError::Superseded),
            Some(Stop::Missing) => {
                Err(SpaceError::EmptySlot { first: at.0.saturating_add(outcome.done) }.into())
            }
            // An event has to be read first.
            Some(Stop::Again) if outcome.done == 0 => Ok(Served::Later),
            // What is left of the block goes back page by page.
            Some(Stop::Again | Stop::Busy | Stop::Exists | Stop::Failed { .. }) => {
                self.machine.keep_apart(at);
                Ok(Served::Later)
            }
            Some(stop @ (Stop::Pinned | Stop::Invalid | Stop::Given { .. })) => {
                let cause = format!("{stop:?}");
                Err(SpaceError::Call { call: "move in", first: next.0, pages: run.pages, cause }.into())
            }
        }
    }

    /// Forgets faults whose waiters have been woken with the pages of the run.
    pub(super) fn settle_faults_of(&mut self, run: Run) {
        let pages = run.first.0..run.first.0 + run.pages;
        self.pending.retain(|fault| !pages.contains(&fault.page.0));
    }
}
