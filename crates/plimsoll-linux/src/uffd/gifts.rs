//! Hearing from a VMM how its guest gave pages back.
//!
//! Enters: pages that the guest gave back, of which the kernel says no more than that. Leaves: page words that say how. The VMM's
//! agent is asked, but only when there is nothing else to do, or when much has come together: it is for counting only. Whoever
//! takes a machine over asks about all that earlier managers did not ask. What must never happen: a fault that waits for that.
use super::pager::{Pager, PagerError};
use super::space::Space;
use super::wire::{Item, Stop};
use plimsoll_core::map::Words;
use plimsoll_core::replacement::Run;
use plimsoll_store::SlabMemory;
use plimsoll_types::{BlockIndex, PageIndex, SlotPage};
use std::collections::{BTreeSet, VecDeque};

/// Asked about at a time: an answer names one run of an item.
const ASKED_MAX: usize = 64;
/// Blocks that are looked through at a time: 32,768 words.
const LOOKED_MAX: usize = 64;
/// Blocks of which something came together before they are asked about in between other work.
const PATIENT_WITH: usize = 64;

/// What there is to ask about. A guest can give the same pages again and again, faster than anybody asks: it adds nothing here.
#[derive(Clone, Debug, Default)]
pub(super) struct Curious {
    /// Blocks of which pages were given back.
    blocks: BTreeSet<BlockIndex>,
    /// Runs of those that are looked through already.
    runs: VecDeque<Run>,
}

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// Of these pages those that were given back nobody knows how are to be asked about.
    pub(super) fn wonder(&mut self, run: Run) {
        if let Some(last) = run.pages.checked_sub(1).map(|more| PageIndex(run.first.0.saturating_add(more))) {
            self.curious.blocks.extend((run.first.block().0..=last.block().0).map(BlockIndex));
        }
    }

    /// Asks about some of them, unless there is other work. True if there is more to ask about.
    pub(super) fn explain(&mut self, is_at_work: bool) -> Result<bool, PagerError> {
        let is_patient = self.curious.blocks.len() < PATIENT_WITH;
        if !self.pending.is_empty() || (is_at_work && is_patient) {
            return Ok(false);
        }
        let Curious { blocks, runs } = &mut self.curious;
        for _ in 0..LOOKED_MAX {
            let Some(block) = (runs.len() < ASKED_MAX).then(|| blocks.pop_first()).flatten() else { break };
            runs.extend(self.machine.unexplained(self.machine.block(block)));
        }
        let asked: Vec<Run> = runs.drain(..runs.len().min(ASKED_MAX)).collect();
        if !asked.is_empty() {
            self.ask_how(asked)?;
        }
        Ok(!(self.curious.blocks.is_empty() && self.curious.runs.is_empty()))
    }

    fn ask_how(&mut self, asked: Vec<Run>) -> Result<(), PagerError> {
        let items: Vec<Item> = asked.iter().map(|run| Item::new(run.first, SlotPage(0), run.pages)).collect();
        for (run, outcome) in asked.into_iter().zip(self.space.gifts(&items)?) {
            let told = match outcome.stop {
                Some(Stop::StaleEpoch) => return Err(PagerError::Superseded),
                Some(Stop::Given { gift, pages }) => {
                    let first = run.first.0 + outcome.done;
                    self.machine.explained(first..first + u32::from(pages), gift)?;
                    outcome.done + u32::from(pages)
                }
                // A VMM that has nothing to say of them keeps that to itself.
                _ => run.pages,
            };
            if told < run.pages {
                let rest = Run { first: PageIndex(run.first.0 + told), pages: run.pages - told };
                self.curious.runs.push_front(rest);
            }
        }
        Ok(())
    }
}
