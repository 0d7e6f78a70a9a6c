//! The taking half of the pager: capture into limbo, store what ages out, give its memory back.
//!
//! Enters: how many pages the governor wants. Leaves: fewer pages of RAM in use. Each call does one bounded step, in
//! this order of preference: give back memory that nobody names, fill limbo up to its goal, store the oldest of limbo.
use super::allowance::Cause;
use super::charges::pass;
use super::host::Incident;
use super::housekeeper::cpu_time;
use super::kit::Tools;
use super::pager::{Pager, PagerError};
use super::probe::Step;
use super::space::{Space, SpaceError};
use super::wire::{ITEMS_MAX, Item, Outcome, Stop};
use plimsoll_core::map::Words;
use plimsoll_core::replacement::{Round, Run};
use plimsoll_core::word::{ObjectRef, PAYLOAD_BITS, PageState, PinCause, StateKind};
use plimsoll_store::{Digest, HANDLE_BITS, Handle, How, SlabMemory, Sought, Stored, digest};
use plimsoll_types::{BLOCK_PAGES, BlockIndex, ByteCount, PageCount, PageIndex, SlotPage};
use std::sync::atomic::{AtomicU32, Ordering};

const _: () = assert!(HANDLE_BITS <= PAYLOAD_BITS, "a page word has room for every handle");

/// Slot pages read in one go, about 1 us each. A fault need not wait for all of them to be stored: it is looked for after
/// every other page that had to be compressed, which takes about 6 us.
pub(super) const AGE_BATCH: usize = 32;
/// Pages of residue worth a message to the agent while faults keep coming and memory is short, here or on the host.
pub(super) const ZAP_BATCH: u64 = 64;
/// The same while there is memory: a message costs about as much as freeing a hundred pages.
const ZAP_BATCH_AT_EASE: u64 = 512;
/// Pages that are compressed before it is looked for faults again.
const COMPRESSED_MAX: u64 = 2;
/// Limbo's share of a machine's RAM. S3-FIFO's small queue is a tenth.
const LIMBO_SHARE: u64 = 10;
/// Limbo is at least this large, or a small machine's pages would age out before they could prove themselves.
const LIMBO_MIN: u64 = 128;
/// Pages drawn in a sampling period; ESX draws 100.
const SAMPLES: u32 = 128;
/// Blocks of a machine with huge pages taken in a sampling period: each costs its guest about a millisecond if it is
/// touched, and a period lasts seconds.
const BLOCK_SAMPLES: usize = 4;
/// Blocks looked at for hot small pages in a sampling period.
const HOT_LOOKS: u32 = 64;
/// A machine keeps a thousandth of its pages, at most [`FLOOR_MAX`], however much is wanted: an instruction needs its code,
/// its data, its stack and their page tables at the same time, or the guest never gets past it.
const FLOOR_SHARE: u64 = 1024;
/// Enough for some vCPUs.
const FLOOR_MAX: u64 = 64;
/// Rounds without a page to take after which there is none: more than a page can have credit.
const BARREN_ROUNDS_MAX: u32 = 4;
/// `ENOMEM`: a move needs page tables for the airlock, and the VMM's memory cgroup may have none left just now.
const NO_MEMORY: u16 = 12;
/// How often a move that makes no progress is repeated before its page is left alone.
const TRIES_MAX: u32 = 4;

/// What became of a page that was to be stored.
enum Put {
    Stored,
    /// The store takes no more: it stays in limbo, where its bytes are safe.
    Full,
    /// The store would have to grow beyond the hard line for it.
    Crowded,
}

impl<S: Space, M: SlabMemory, W: Words> Pager<S, M, W> {
    /// One step of reclaim; `served` faults were served in this turn. True if something was done.
    pub(super) fn reclaim(&mut self, served: usize) -> Result<bool, PagerError> {
        if self.orders.unpin.swap(false, Ordering::Relaxed) {
            self.machine.unpin()?;
        }
        let is_held = self.orders.hold.load(Ordering::Relaxed);
        // A sample is taken, too.
        if self.orders.sample.swap(false, Ordering::Relaxed) && !is_held {
            self.sample()?;
            return Ok(true);
        }
        let residue = self.machine.airlock().residue().0;
        let wanted = |order: &AtomicU32| !is_held && order.load(Ordering::Relaxed) > 0;
        let is_wanted = wanted(&self.orders.reclaim) || wanted(&self.orders.squeeze);
        let is_short = wanted(&self.orders.reclaim) || self.is_tight;
        let batch = if is_short { ZAP_BATCH } else { ZAP_BATCH_AT_EASE };
        if residue >= batch || (residue > 0 && served == 0 && !is_wanted) {
            self.zap()?;
            return Ok(true);
        }
        if !is_wanted {
            self.orders.is_out_of_time.store(false, Ordering::Relaxed);
            return Ok(false);
        }
        let goal = (self.machine.ram().0 / LIMBO_SHARE).max(LIMBO_MIN);
        if self.machine.airlock().limbo().0 < goal && self.capture()? {
            return Ok(true);
        }
        if let Some(cause) = self.cause()
            && self.age(cause)?
        {
            return Ok(true);
        }
        // There is nothing left to wait for.
        if residue > 0 {
            self.zap()?;
        }
        Ok(residue > 0)
    }

    /// For whom pages are to be stored now; nobody if they would be ahead of demand and there is no time for that (`allowance`).
    fn cause(&self) -> Option<Cause> {
        let is_demand = self.has_refused_faults()
            || self.orders.squeeze.load(Ordering::Relaxed) > 0
            || self.host.ledger(|ledger| ledger.is_demand_near());
        let is_held_up =
            !is_demand && self.machine.airlock().limbo() > PageCount(0) && !self.host.allowance().has_time();
        self.orders.is_out_of_time.store(is_held_up, Ordering::Relaxed);
        match is_demand {
            true => Some(Cause::Demand),
            false => (!is_held_up).then_some(Cause::Ahead),
        }
    }

    /// Takes about a block of pages into limbo. False when there is nothing to take or no room.
    fn capture(&mut self) -> Result<bool, PagerError> {
        let floor = (self.machine.layout().pages().0 / FLOOR_SHARE).min(FLOOR_MAX);
        let census = self.machine.census();
        let above = census.of(StateKind::Resident) + census.of(StateKind::Unwatched);
        let above = above.0.saturating_sub(floor);
        let above = u32::try_from(above).unwrap_or(u32::MAX);
        let room = self.machine.airlock().room();
        let want = BLOCK_PAGES.min(room).min(above);
        if want == 0 {
            return Ok(false);
        }
        let mut runs = Vec::new();
        let choice = self.machine.choose(want, &mut runs)?;
        let runs = self.takeable(runs)?;
        if runs.is_empty() {
            // Every page has paid a credit, or blocks turned out to be empty. Guests get their turn before the next round.
            self.barren_rounds = self.barren_rounds.saturating_add(1);
            return Ok(self.barren_rounds < BARREN_ROUNDS_MAX);
        }
        self.barren_rounds = 0;
        // A whole block is cut only where the floor or the airlock leaves no room for it.
        let most = if room < BLOCK_PAGES { above.min(room) } else { above };
        Ok(self.capture_runs(&within(most, runs), choice.round)? > 0)
    }

    /// Ends a sampling period: takes what was drawn, so that its use shows. A page of a huge page is not taken alone,
    /// which would split it: its whole block is, of few blocks.
    fn sample(&mut self) -> Result<(), PagerError> {
        let (mut pages, mut blocks) = (Vec::new(), Vec::new());
        let hot = self.find_hot()?;
        for page in self.machine.draw(SAMPLES) {
            let block = page.block();
            if hot.contains(&block) {
                // Without one of its pages it cannot be made huge.
                self.machine.undraw(page);
                continue;
            }
            let is_huge = self.machine.is_unwatched(block)
                || (self.machine.state(page)? == PageState::Resident
                    && self.space.is_huge(self.machine.block(block))?);
            if !is_huge {
                pages.push(Run { first: page, pages: 1 });
            } else if blocks.len() < BLOCK_SAMPLES && !blocks.contains(&block) {
                blocks.push(block);
            } else if !blocks.contains(&block) {
                self.machine.undraw(page);
            }
        }
        let mut whole = Vec::new();
        for block in blocks {
            if !self.machine.is_unwatched(block) || self.watch(block)? {
                whole.extend(self.machine.resident_runs(block));
            } else {
                let run = self.machine.block(block);
                (run.first.0..run.first.0 + run.pages).for_each(|page| self.machine.undraw(PageIndex(page)));
            }
        }
        self.capture_runs(&whole, Round::Whole)?;
        pages.retain(|run| self.machine.state(run.first) == Ok(PageState::Resident));
        self.capture_runs(&pages, Round::Split)?;
        // What found no room in the airlock would show as used.
        for page in pages.iter().chain(&whole).flat_map(|run| run.first.0..run.first.0 + run.pages) {
            if self.machine.state(PageIndex(page))? == PageState::Resident {
                self.machine.undraw(PageIndex(page));
            }
        }
        Ok(())
    }

    /// Asks for huge pages where small ones became hot: looks at some blocks each time. Returns those asked for.
    fn find_hot(&mut self) -> Result<Vec<BlockIndex>, PagerError> {
        let mut hot = Vec::new();
        let blocks = self.machine.layout().page_limit().0.div_ceil(BLOCK_PAGES);
        for _ in 0..HOT_LOOKS.min(blocks) {
            let block = BlockIndex(self.hot_hand % blocks);
            self.hot_hand = (block.0 + 1) % blocks;
            let run = self.machine.block(block);
            if self.machine.is_hot(block)
                && self.machine.resident_runs(block) == [run]
                && !self.space.is_huge(run)?
            {
                self.host.want_huge(self.id, run);
                hot.push(block);
            }
        }
        Ok(hot)
    }

    /// Takes the runs, as many as limbo has room for, and returns how many pages were captured.
    ///
    /// From the request to its reply no event is applied: a page that is discarded and touched anew meanwhile could
    /// otherwise be taken with its new bytes under the old intent.
    fn capture_runs(&mut self, runs: &[Run], round: Round) -> Result<u64, PagerError> {
        let mut items = Vec::new();
        for run in runs.iter().take(ITEMS_MAX) {
            let is_whole = self.goes_whole(*run, round)?;
            let Some(at) = self.machine.begin_capture(*run)? else { break };
            items.push(Item::new(run.first, at, run.pages));
            if is_whole {
                self.machine.keep_whole(at);
                self.stats.blocks.taken += 1;
            }
        }
        self.reached(Step::CaptureBegun)?;
        let mut captured = 0;
        let mut tries = 0;
        // Pages that were populated once already: a second refusal is final.
        let mut populated: Vec<PageIndex> = Vec::new();
        while !items.is_empty() {
            let outcomes = self.space.move_out(&items)?;
            self.reached(Step::Moved)?;
            let mut rest = Vec::new();
            let mut populate = Vec::new();
            let mut progressed = false;
            for (item, outcome) in items.iter().zip(outcomes) {
                for offset in 0..outcome.done {
                    self.machine
                        .captured(PageIndex(item.page().0 + offset), SlotPage(item.slot().0 + offset))?;
                }
                captured += u64::from(outcome.done);
                progressed |= outcome.done > 0;
                let Some(stop) = outcome.stop else { continue };
                let page = PageIndex(item.page().0 + outcome.done);
                let retries = match stop {
                    Stop::Busy if !populated.contains(&page) => {
                        populated.push(page);
                        populate.push(Item::new(page, SlotPage(0), 1));
                        true
                    }
                    Stop::Again => tries < TRIES_MAX,
                    _ => false,
                };
                let skipped = if retries { 0 } else { self.not_moved(item, outcome, stop)? };
                let done = outcome.done + skipped;
                if done < item.pages {
                    let (page, slot) = (PageIndex(item.page().0 + done), SlotPage(item.slot().0 + done));
                    rest.push(Item::new(page, slot, item.pages - done));
                }
            }
            tries = if progressed { 0 } else { tries + 1 };
            if !populate.is_empty() {
                self.space.populate(&populate)?;
            }
            items = rest;
        }
        self.stats.captured += captured;
        self.reached(Step::CaptureMarked)?;
        Ok(captured)
    }

    /// Settles the page that stopped a move; returns how many pages that was.
    fn not_moved(&mut self, item: &Item, outcome: Outcome, stop: Stop) -> Result<u32, PagerError> {
        let page = PageIndex(item.page().0 + outcome.done);
        let at = SlotPage(item.slot().0 + outcome.done);
        let cause = match stop {
            Stop::Missing => {
                self.machine.vanished(page, at)?;
                return Ok(1);
            }
            Stop::Busy => Some(PinCause::Kernel),
            Stop::Pinned => Some(PinCause::Device),
            Stop::Again => None,
            // Not the page's fault, and the next page would fare no better: the whole run stays.
            Stop::Failed { errno: NO_MEMORY } => {
                for offset in outcome.done..item.pages {
                    let (page, at) = (PageIndex(item.page().0 + offset), SlotPage(item.slot().0 + offset));
                    self.machine.refused(page, at, None)?;
                }
                self.stats.refused += u64::from(item.pages - outcome.done);
                return Ok(item.pages - outcome.done);
            }
            Stop::StaleEpoch => return Err(PagerError::Superseded),
            Stop::Exists | Stop::Invalid | Stop::Given { .. } | Stop::Failed { .. } => {
                let cause = format!("{stop:?}");
                return Err(
                    SpaceError::Call { call: "move out", first: page.0, pages: item.pages, cause }.into()
                );
            }
        };
        self.stats.refused += 1;
        self.machine.refused(page, at, cause)?;
        Ok(1)
    }

    /// Stores the oldest pages of limbo, and enters what that took. False when limbo is empty or the store took none of them.
    fn age(&mut self, cause: Cause) -> Result<bool, PagerError> {
        let before = cpu_time();
        let stored = self.store_oldest();
        self.host.allowance().spend(cause, cpu_time().saturating_sub(before));
        stored
    }

    fn store_oldest(&mut self) -> Result<bool, PagerError> {
        let oldest: Vec<(SlotPage, PageIndex)> = self.machine.oldest_limbo(AGE_BATCH).collect();
        let mut left = &oldest[..];
        let (mut stored, mut tried, mut crowded) = (0_u64, 0_u64, 0_u64);
        let mut looked = self.compressed();
        'runs: while let Some((first, _)) = left.first() {
            let run = (first.0..).zip(left).take_while(|(at, (slot, _))| slot.0 == *at).count();
            self.space.read_slots(*first, self.kit.tools().room(run))?;
            self.reached(Step::SlotRead)?;
            for (place, (at, page)) in left[..run].iter().enumerate() {
                match self.store(place, *page, *at)? {
                    Put::Stored => (stored, tried) = (stored + 1, tried + 1),
                    Put::Full => tried += 1,
                    Put::Crowded => crowded += 1,
                }
                if self.compressed() >= looked + COMPRESSED_MAX {
                    looked = self.compressed();
                    if self.space.has_events()? {
                        break 'runs;
                    }
                }
            }
            left = &left[run..];
        }
        self.settle_store()?;
        // Pages of zeros, and those for which a slab has room, free what others need to grow into. If there are none of these, the
        // store grows all the same the next time: nothing else would ever free anything.
        self.is_stuck = stored == 0 && crowded > 0;
        if stored == tried {
            self.store_was_full = false;
        } else if !std::mem::replace(&mut self.store_was_full, true) {
            self.host.report(Incident::StoreFull { machine: self.id });
        }
        self.orders.given.fetch_add(stored, Ordering::Relaxed);
        Ok(stored > 0)
    }

    /// Pages that were compressed, ever.
    const fn compressed(&self) -> u64 {
        self.stats.stored.compressed + self.stats.stored.raw
    }

    /// Stores one page whose bytes are in the buffer. Where the store has no room for it, another page may still be zero or a
    /// duplicate.
    fn store(&mut self, place: usize, page: PageIndex, at: SlotPage) -> Result<Put, PagerError> {
        let Tools { fetched, scratch, buffer, .. } = self.kit.tools();
        let bytes = &buffer[place];
        let digest = digest(bytes);
        if digest == Digest::Zero {
            self.machine.found_zero(page, at)?;
            self.prefetch.left(page);
            self.stats.stored.zero += 1;
            return Ok(Put::Stored);
        }
        let sought = self.domain.store(|store| store.seek(bytes, &digest, fetched));
        let shared = match sought {
            Ok(Sought::Shared(handle)) => Some(handle),
            Ok(Sought::Candidate) => {
                let confirmed = fetched.confirm(bytes, scratch, &mut *self.dense);
                confirmed.and_then(|confirmed| self.domain.store(|store| store.share_confirmed(confirmed)))
            }
            _ => None,
        };
        let (handle, how) = match shared {
            Some(handle) => (handle, How::Duplicate),
            None => match self.insert(place, &digest)? {
                Ok(stored) => (stored.handle, stored.how),
                Err(put) => return Ok(put),
            },
        };
        self.reached(Step::ObjectInserted)?;
        self.name(page, at, handle)?;
        let counts = &mut self.stats.stored;
        *match how {
            How::Same => &mut counts.same,
            How::Duplicate => &mut counts.duplicate,
            How::Lz4 => &mut counts.compressed,
            How::Raw => &mut counts.raw,
        } += 1;
        Ok(Put::Stored)
    }

    /// Has the store take a page that it does not have. The slabs it grows by are charged first: what it takes in is given back later,
    /// in a batch.
    fn insert(&mut self, place: usize, digest: &Digest) -> Result<Result<Stored, Put>, PagerError> {
        let mut may_grow = false;
        loop {
            let Tools { encoder, buffer, .. } = self.kit.tools();
            let bytes = &buffer[place];
            // Once more if something has to go first.
            let encoded = encoder.encode(bytes, digest);
            let lane = self.lane;
            let insert = |may_grow: bool| {
                self.domain.store(|store| match store.growth(encoded, lane) {
                    growth if growth > ByteCount(0) && !may_grow => Err(growth),
                    _ => Ok(store.insert(bytes, digest, encoded, lane)),
                })
            };
            let mut inserted = insert(may_grow);
            if let Err(growth) = inserted
                && pass(&self.host, self.id, growth)
            {
                may_grow = true;
                inserted = insert(may_grow);
            }
            match inserted {
                Ok(inserted) => {
                    if may_grow {
                        // By what was charged, or by nothing.
                        self.settle_store()?;
                        self.settle()?;
                    }
                    return Ok(inserted.map_err(|_| Put::Full));
                }
                // Near the hard line, what nobody names any more goes first.
                Err(_) => {
                    may_grow = !self.shed()?;
                    if may_grow && !std::mem::take(&mut self.is_stuck) {
                        return Ok(Err(Put::Crowded));
                    }
                }
            }
        }
    }

    fn name(&mut self, page: PageIndex, at: SlotPage, handle: Handle) -> Result<(), PagerError> {
        let object = ObjectRef::new(handle.to_bits()).ok_or(PagerError::Handle)?;
        if let Err(error) = self.machine.stored(page, at, object) {
            self.release(object);
            return Err(error.into());
        }
        self.prefetch.left(page);
        Ok(self.reached(Step::StoredMarked)?)
    }

    /// Gives back memory that no word names.
    pub(super) fn zap(&mut self) -> Result<(), PagerError> {
        let runs = self.machine.zap_runs(ITEMS_MAX);
        let items: Vec<Item> = runs.iter().map(|(at, pages)| Item::new(PageIndex(0), *at, *pages)).collect();
        self.space.zap(&items)?;
        self.reached(Step::Zapped)?;
        let mut freed = 0;
        for (at, pages) in runs {
            self.machine.zapped(at, pages);
            freed += pages;
        }
        // The governor states the want anew each time it looks; between two looks it only falls.
        for order in [&self.orders.reclaim, &self.orders.squeeze] {
            let fall = |want: u32| Some(want.saturating_sub(freed));
            let _ = order.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fall);
        }
        Ok(())
    }
}

/// The runs, cut to `most` pages.
fn within(most: u32, runs: Vec<Run>) -> Vec<Run> {
    let mut left = most;
    let cut = runs.into_iter().map(|run| {
        let pages = run.pages.min(left);
        left -= pages;
        Run { first: run.first, pages }
    });
    cut.take_while(|run| run.pages > 0).collect()
}
