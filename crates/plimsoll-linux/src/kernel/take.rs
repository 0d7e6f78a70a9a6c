//! Asking the kernel for pages, and counting those that left.
use super::machine::{AHEAD, KernelMachine};
use super::{KernelError, gate};
use crate::reclaimer::{Reclaimed, Short};
use plimsoll_core::outside::{PageSet, Want};
use plimsoll_core::replacement::Run;
use plimsoll_sys::HvaRange;
use plimsoll_sys::process_memory::{Advice, Refusal, advise};
use plimsoll_types::{PageCount, PageIndex};
use std::time::Instant;

/// Pages the kernel is asked for at a time before their leaving is checked: 4 MiB, 14 ms with zram.
const PIECE: u32 = 1024;
/// Pieces in a row of which nothing leaves, after which no more are tried.
const HELD_PIECES: u32 = 4;
/// Blocks one request looks at: 32 GiB of memory.
const LOOKS: u32 = 16_384;

/// What came of asking.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    pages: u32,
    left: u32,
    /// The last refusal that concerned some of the pages only.
    refusal: Option<Refusal>,
}

/// How the samples of a period began.
#[derive(Clone, Debug, Default)]
pub(super) struct Begun {
    pub(super) taken: PageCount,
    pub(super) marked: PageCount,
    pub(super) short: Option<Short>,
}

impl KernelMachine {
    /// Takes pages the machine uses least.
    pub(super) fn take(&mut self, want: PageCount, now: Instant) -> Result<Reclaimed, KernelError> {
        self.check_alive()?;
        self.quicken(now);
        let nothing = |short| Ok(Reclaimed { taken: PageCount(0), short });
        if want.0 == 0 {
            return nothing(None);
        }
        if let Some(short) = self.gate()? {
            return nothing(Some(short));
        }
        let allowed = self.pace.allowed(now.saturating_duration_since(self.started));
        if allowed.0 == 0 {
            return nothing(Some(Short::Paced { rate: self.pace.rate() }));
        }
        let pages = u32::try_from(want.min(allowed).0).unwrap_or(u32::MAX);
        self.view.forget();
        let (mut runs, mut present) = (Vec::new(), 0_u64);
        let view = &mut self.view;
        let look = |block| {
            let presence = view.look(block, AHEAD)?;
            present += u64::from(presence.present.len());
            Ok::<_, KernelError>(presence)
        };
        let choice = self.known.choose(Want { pages, looks: LOOKS }, look, &mut runs)?;
        let (taken, stopped) = self.page_out_all(&runs)?;
        self.pace.spent(taken);
        self.totals.taken += taken;
        let held = PageCount(u64::from(choice.pages)).saturating_sub(taken);
        let short = (taken < want).then(|| match stopped {
            Some(short) => short,
            None if held.0 > 0 && choice.pages >= pages => Short::Held { pages: held },
            None if choice.pages >= pages => Short::Paced { rate: self.pace.rate() },
            None if choice.looks >= LOOKS => Short::Unseen,
            None if choice.resting > 0 || present > u64::from(choice.pages) => Short::InUse,
            None => Short::NothingLeft,
        });
        Ok(Reclaimed { taken, short })
    }

    /// Why nothing may be taken now, if so.
    fn gate(&self) -> Result<Option<Short>, KernelError> {
        Ok(gate::host()?.or_else(|| self.cgroup.as_ref().and_then(gate::cgroup)))
    }

    /// Pages out in pieces until all were tried, or trying is in vain. A run that is longer than a piece is one.
    fn page_out_all(&mut self, runs: &[Run]) -> Result<(PageCount, Option<Short>), KernelError> {
        let mut rest = runs;
        let mut taken = 0;
        let mut held = Asked::default();
        let mut pieces_held = 0;
        while !rest.is_empty() {
            let mut pages = 0;
            let fits = |run: &&Run| {
                pages += run.pages;
                pages - run.pages < PIECE
            };
            let (piece, tail) = rest.split_at(rest.iter().take_while(fits).count());
            rest = tail;
            let asked = self.page_out(piece, AHEAD)?;
            taken += u64::from(asked.left);
            if asked.left > 0 {
                (held, pieces_held) = (Asked::default(), 0);
                continue;
            }
            held.pages += asked.pages;
            held.refusal = asked.refusal.or(held.refusal);
            pieces_held += 1;
            // Swap may have become full meanwhile, which is the better reason.
            if let Some(short) = gate::host()? {
                return Ok((PageCount(taken), Some(short)));
            }
            if pieces_held == HELD_PIECES || rest.is_empty() {
                return Ok((PageCount(taken), Some(why_held(held))));
            }
        }
        Ok((PageCount(taken), None))
    }

    /// Pages drawn as samples that are in RAM are marked idle where that shows their use, and otherwise taken. One that does
    /// not leave, or is back at once, counts as used at the end of the period; where no page may be taken at all, those that
    /// are not marked tell nothing.
    pub(super) fn begin_samples(&mut self, drawn: &[PageIndex], ahead: u32) -> Result<Begun, KernelError> {
        let mut present = Vec::new();
        for page in drawn {
            if self.view.look(page.block(), ahead)?.present.contains(*page) {
                present.push(*page);
            }
        }
        let marked = match self.idle.as_mut().map(|idle| idle.mark(&self.view, &present)) {
            Some(Ok(marked)) => {
                present.retain(|page| !marked.contains(page));
                PageCount(marked.len() as u64)
            }
            // Flags that cannot be had are one way less.
            Some(Err(_)) => {
                self.idle = None;
                PageCount(0)
            }
            None => PageCount(0),
        };
        let begun = Begun { marked, ..Begun::default() };
        if present.is_empty() {
            return Ok(begun);
        }
        if let Some(short) = self.gate()? {
            present.iter().for_each(|page| self.known.stayed(*page));
            return Ok(Begun { short: Some(short), ..begun });
        }
        let runs: Vec<Run> = present.iter().map(|page| Run { first: *page, pages: 1 }).collect();
        let asked = self.page_out(&runs, ahead)?;
        Ok(Begun { taken: PageCount(u64::from(asked.left)), ..begun })
    }

    /// Asks for runs of which those of one block stand together, and looks which of their pages left.
    fn page_out(&mut self, runs: &[Run], ahead: u32) -> Result<Asked, KernelError> {
        let layout = self.view.layout();
        let ranges: Vec<HvaRange> = runs.iter().filter_map(|run| layout.addresses(*run)).collect();
        let mut asked = Asked { refusal: self.advise_out(&ranges)?, ..Asked::default() };
        self.view.forget();
        for runs in runs.chunk_by(|one, next| one.first.block() == next.first.block()) {
            let Some(first) = runs.first() else { continue };
            let block = first.first.block();
            let places = runs.iter().map(|run| run.first.in_block()..run.first.in_block() + run.pages);
            let pages = places.map(PageSet::from_range).fold(PageSet::EMPTY, |all, run| all | run);
            let left = pages - self.view.look(block, ahead)?.present;
            self.known.took(block, left);
            asked.pages += pages.len();
            asked.left += left.len();
        }
        Ok(asked)
    }

    /// Asks for all ranges, whatever the kernel says of one: memory is locked, or was unplugged a moment ago.
    fn advise_out(&self, ranges: &[HvaRange]) -> Result<Option<Refusal>, KernelError> {
        let mut rest = ranges;
        let mut last = None;
        while !rest.is_empty() {
            let transfer = advise(&self.process, rest, Advice::PageOut);
            let Some(refusal) = transfer.stop else { break };
            if matches!(refusal, Refusal::NoProcess | Refusal::NotPermitted) {
                return Err(KernelError::refused(self.process.process(), refusal));
            }
            last = Some(refusal);
            let mut done = transfer.done.0;
            let is_done =
                |range: &&HvaRange| done.checked_sub(range.len().0).map(|left| done = left).is_some();
            let refused = rest.iter().take_while(is_done).count();
            rest = rest.get(refused + 1..).unwrap_or_default();
        }
        Ok(last)
    }
}

/// Locked memory is "unsuitable" to the kernel; pinned and shared pages it passes over without a word.
fn why_held(held: Asked) -> Short {
    match held.refusal {
        None | Some(Refusal::Unsuitable) => Short::Held { pages: PageCount(u64::from(held.pages)) },
        Some(refusal) => Short::Refused(refusal),
    }
}
