//! One machine's memory: events in, effects out.
//!
//! Enters: what happened (a fault, a page that was moved or refused, a discard by the guest, a tick). Leaves: what the
//! host must do (install from where, move which run to which slot pages, store which slot page, give back which
//! memory). The host executes effects and reports back; nothing here waits, does I/O or knows what a byte is.
//!
//! The rules a host relies on, and the model checker checks:
//!
//! 1. **Intent precedes action.** [`Machine::begin_capture`] has written *capturing* into every word of a run before
//!    the host is told to move it. So wherever a manager dies, the words name every slot page that can hold bytes.
//! 2. **A word names bytes until other bytes are in place.** A slot page is given back only after the word names the
//!    stored object or guest RAM; an object is released only after the word has stopped naming it.
//! 3. **A discard wins.** It may come at any point of a capture. The word forgets what it named, whatever the move under
//!    it brings is dropped, and the page is not installed anew before that move has been reported: the move would take
//!    the new bytes.
//! 4. **Looking beats remembering.** [`Machine::recover`] believes memory that is present in guest RAM over any word.
mod gifts;

use crate::airlock::{Airlock, Shape};
use crate::layout::GuestLayout;
use crate::map::{Census, MapError, PageMap, Words};
use crate::replacement::{Choice, Origin, Replacement, Run};
use crate::sampler::Sampler;
use crate::word::{ObjectRef, PageState, PinCause, StateKind, Transition};
use alloc::vec::Vec;
use core::ops::Range;
use plimsoll_types::{BLOCK_PAGES, BlockIndex, PageCount, PageIndex, SlotPage};

/// Where the host finds the bytes of a page to install.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Zeros.
    Zero,
    /// A slot page.
    Limbo(SlotPage),
    /// An object of the store.
    Stored(ObjectRef),
    /// The snapshot file, at this page offset.
    File(u32),
}

/// What to do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultEffect {
    /// Put these bytes into guest RAM, wake the waiter, then report [`Machine::installed`].
    Install(Source),
    /// The word says that the page is in RAM. Either somebody else's fault has been served since (the install will
    /// find the page present: wake the waiter), or the guest discarded the page and its event is still to come:
    /// then it reads as zeros. Install zeros where nothing is, wake, report [`Machine::confirmed`].
    InstallIfMissing,
    /// The page rests in limbo as part of a huge page: move all of it back and report [`Machine::returned`] for each
    /// page.
    Return {
        /// The first page of the block.
        first: PageIndex,
        /// The first page of its slot.
        at: SlotPage,
    },
    /// The kernel serves the page: nothing is to be done, the waiter has been woken.
    Nothing,
    /// The page is being moved out. Ask again when the move has been reported.
    Wait,
    /// The bytes are lost. Make the touch fail.
    Poison,
}

/// What a page's old word named and no word names any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Released {
    /// Nothing.
    Nothing,
    /// An object: release one reference to it.
    Object(ObjectRef),
}

/// What looking at the memory of a machine found that its words could not explain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Anomalies {
    /// Pages that should have been in RAM and were not. They read as zeros: the guest discarded them in an instant
    /// that no event reached us from.
    pub missing: u64,
    /// Pages whose slot page was empty. They are poisoned.
    pub lost: u64,
}

/// The memory of one machine. One thread drives it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine<W> {
    layout: GuestLayout,
    map: PageMap<W>,
    airlock: Airlock,
    replacement: Replacement,
    sampler: Sampler,
    anomalies: Anomalies,
    /// Pages discarded while they were being captured, until the move has been reported.
    doomed: Vec<(PageIndex, SlotPage)>,
}

impl<W: Words> Machine<W> {
    /// A machine whose words are fresh: nothing has been taken from it yet. Pages that `is_present` reports are
    /// resident already.
    ///
    /// # Errors
    /// [`MapError`] when there are fewer words than pages, or words that are not fresh.
    pub fn new(
        layout: GuestLayout,
        words: W,
        airlock: Shape,
        seed: u64,
        is_present: impl Fn(PageIndex) -> bool,
    ) -> Result<Self, MapError> {
        let mut machine = Self::adopt(layout, words, Airlock::new(airlock), seed)?;
        for page in (0..machine.layout.page_limit().0).map(PageIndex).filter(|page| is_present(*page)) {
            machine.map.apply(page, Transition::Install)?;
        }
        Ok(machine)
    }

    fn adopt(layout: GuestLayout, words: W, airlock: Airlock, seed: u64) -> Result<Self, MapError> {
        let pages = layout.page_limit();
        let map = PageMap::adopt(words)?;
        if map.len() != pages.get() {
            return Err(MapError::NoSuchPage { page: pages });
        }
        Ok(Self {
            layout,
            map,
            airlock,
            replacement: Replacement::new(pages.0),
            sampler: Sampler::new(pages.0, seed),
            anomalies: Anomalies::default(),
            doomed: Vec::new(),
        })
    }

    /// A machine whose earlier manager is gone. Words are made to agree with what is present in guest RAM and in the
    /// airlock; everything else is rebuilt. Discards that wait to be read are to be read *after* looking, and reported
    /// to [`Machine::discarded`] before any fault is served. The objects that words name afterwards are
    /// [`Machine::objects`]; the store drops all others.
    ///
    /// | word | RAM present | else, slot page present | else |
    /// |---|---|---|---|
    /// | resident, pinned, never-page | unchanged | absent, counted | absent, counted |
    /// | capturing | resident | limbo | absent: the guest discarded it before the move |
    /// | limbo | resident | unchanged | poisoned, counted |
    /// | absent, given | pinned for a while | unchanged | unchanged |
    /// | unwatched | resident | absent | absent |
    /// | poisoned | unchanged | unchanged | unchanged |
    /// | any other | resident | unchanged | unchanged |
    ///
    /// An absent page that is present was discarded and has not gone yet, or was brought back and not yet marked. Which
    /// of the two shows in a moment: it is not taken before, because in the first case it must not come back.
    ///
    /// All of the machine's memory is registered before this looks, so nothing is unwatched afterwards.
    ///
    /// # Errors
    /// [`MapError::Damaged`] for a word that no transition writes.
    pub fn recover(
        layout: GuestLayout,
        words: W,
        airlock: Shape,
        seed: u64,
        is_present: impl Fn(PageIndex) -> bool,
        is_slot_present: impl Fn(SlotPage) -> bool,
    ) -> Result<Self, MapError> {
        let mut machine = Self::adopt(layout, words, Airlock::new(airlock), seed)?;
        let mut named = Vec::new();
        for page in (0..machine.layout.page_limit().0).map(PageIndex) {
            let state = machine.map.state(page)?;
            let found = match state {
                PageState::Poisoned => state,
                PageState::Pinned(_) | PageState::NeverPage if is_present(page) => state,
                PageState::Absent | PageState::Given(_) if is_present(page) => {
                    PageState::Pinned(PinCause::Kernel)
                }
                _ if is_present(page) => PageState::Resident,
                PageState::Resident | PageState::Pinned(_) | PageState::NeverPage => {
                    machine.anomalies.missing += 1;
                    PageState::Absent
                }
                PageState::Capturing(at) | PageState::Limbo(at) if is_slot_present(at) => {
                    PageState::Limbo(at)
                }
                PageState::Capturing(_) | PageState::Unwatched => PageState::Absent,
                PageState::Limbo(_) => {
                    machine.anomalies.lost += 1;
                    PageState::Poisoned
                }
                PageState::Zero
                | PageState::Stored(_)
                | PageState::File(_)
                | PageState::Absent
                | PageState::Given(_) => state,
            };
            if found != state {
                machine.map.overwrite(page, found)?;
            }
            if let PageState::Limbo(at) = found {
                named.push((at, page));
            }
        }
        machine.airlock = Airlock::recover(airlock, named.into_iter(), is_slot_present);
        Ok(machine)
    }

    /// The guest physical layout.
    pub fn layout(&self) -> &GuestLayout {
        &self.layout
    }

    /// Pages by state.
    pub fn census(&self) -> &Census {
        self.map.census()
    }

    /// The airlock's counts.
    pub fn airlock(&self) -> &Airlock {
        &self.airlock
    }

    /// Pages that came back from the store soon after they went there.
    pub fn ghost_hits(&self) -> u64 {
        self.replacement.ghost_hits()
    }

    /// What looking found that words could not explain.
    pub fn anomalies(&self) -> Anomalies {
        self.anomalies
    }

    /// A page's state.
    ///
    /// # Errors
    /// [`MapError`] past the last page or for a damaged word.
    pub fn state(&self, page: PageIndex) -> Result<PageState, MapError> {
        self.map.state(page)
    }

    /// Pages of RAM the machine's bytes take, wherever they are but in the store.
    pub fn ram(&self) -> PageCount {
        self.census().in_ram()
            + self.census().of(StateKind::Capturing)
            + self.airlock.limbo()
            + self.airlock.residue()
    }

    /// Every object a word names, once per word.
    pub fn objects(&self) -> impl Iterator<Item = (PageIndex, ObjectRef)> + '_ {
        (0..self.layout.page_limit().0).map(PageIndex).filter_map(|page| match self.map.state(page) {
            Ok(PageState::Stored(object)) => Some((page, object)),
            _ => None,
        })
    }

    /// Recounts everything that is counted.
    ///
    /// # Errors
    /// [`MapError::Miscounted`] or [`MapError::Damaged`].
    pub fn audit(&self) -> Result<(), MapError> {
        self.map.audit()
    }

    /// Bytes of bookkeeping beside the words.
    pub fn table_bytes(&self) -> usize {
        self.airlock.table_bytes() + self.replacement.table_bytes()
    }

    /// The guest touched a page that is not in its RAM.
    ///
    /// # Errors
    /// [`MapError`] past the last page or for a damaged word.
    #[inline]
    pub fn fault(&self, page: PageIndex) -> Result<FaultEffect, MapError> {
        Ok(match self.map.state(page)? {
            PageState::Absent | PageState::Given(_)
                if self.doomed.iter().any(|(doomed, _)| *doomed == page) =>
            {
                FaultEffect::Wait
            }
            PageState::Zero | PageState::Absent | PageState::Given(_) => FaultEffect::Install(Source::Zero),
            PageState::Limbo(at) => match self.airlock.whole(at) {
                Some((at, first)) => FaultEffect::Return { first, at },
                None => FaultEffect::Install(Source::Limbo(at)),
            },
            PageState::Unwatched => FaultEffect::Nothing,
            PageState::Stored(object) => FaultEffect::Install(Source::Stored(object)),
            PageState::File(offset) => FaultEffect::Install(Source::File(offset)),
            PageState::Capturing(_) => FaultEffect::Wait,
            PageState::Resident | PageState::Pinned(_) | PageState::NeverPage => {
                FaultEffect::InstallIfMissing
            }
            PageState::Poisoned => FaultEffect::Poison,
        })
    }

    /// The page's bytes are in guest RAM.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when they were there before.
    #[inline]
    pub fn installed(&mut self, page: PageIndex) -> Result<Released, MapError> {
        let before = self.map.apply(page, Transition::Install)?;
        let origin = match before {
            PageState::Limbo(_) => Origin::Limbo,
            PageState::Stored(_) => Origin::Store,
            _ => Origin::Nowhere,
        };
        self.replacement.came_back(page, origin);
        Ok(self.release(before))
    }

    /// The page's bytes were brought into guest RAM before anybody touched it.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when they were there before.
    pub fn brought(&mut self, page: PageIndex) -> Result<Released, MapError> {
        let before = self.map.apply(page, Transition::Install)?;
        self.replacement.came_back(page, Origin::Ahead);
        Ok(self.release(before))
    }

    /// The page's accessed bit was found set, by a host that reads its guests' second stage.
    pub fn used(&mut self, page: PageIndex) {
        self.replacement.used(page);
    }

    /// Writes the intent to move a run of pages back from the slot pages that start at `at`.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when a page of the run does not rest there.
    pub fn begin_return(&mut self, run: Run, at: SlotPage) -> Result<(), MapError> {
        for offset in 0..run.pages {
            let at = SlotPage(at.0 + offset);
            self.map.apply(PageIndex(run.first.0 + offset), Transition::BeginReturn(at))?;
        }
        Ok(())
    }

    /// The page was not moved back: it rests in its slot page as before.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it was not to be moved.
    pub fn stayed(&mut self, page: PageIndex, at: SlotPage) -> Result<(), MapError> {
        self.map.apply(page, Transition::Capture(at)).map(drop)
    }

    /// The page was moved back from its slot page, in which nothing is left.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it was not to be moved.
    pub fn returned(&mut self, page: PageIndex, at: SlotPage) -> Result<(), MapError> {
        self.map.apply(page, Transition::Refuse(at))?;
        self.replacement.came_back(page, Origin::Limbo);
        self.airlock.emptied(at);
        Ok(())
    }

    /// What is on its way to the slot that starts at `at` is a block that is one huge page: once there, a touch brings back
    /// all of it. If not all of it arrives, what does comes back page by page.
    pub fn keep_whole(&mut self, at: SlotPage) {
        self.airlock.keep_whole(at);
    }

    /// What is left in the slot that starts at `at` goes back page by page after all.
    pub fn keep_apart(&mut self, at: SlotPage) {
        self.airlock.keep_apart(at);
    }

    /// True when nothing of the block is anywhere and nothing of it was ever given back: it may be left to the kernel. A
    /// page that was given back may still be there for a moment, and must not be found when the block is watched again.
    pub fn is_untouched(&self, block: BlockIndex) -> bool {
        self.pages_of(block).all(|page| self.map.state(page) == Ok(PageState::Zero))
    }

    /// All pages of a block.
    pub fn block(&self, block: BlockIndex) -> Run {
        let first = block.first_page();
        let limit = self.layout.page_limit().0;
        Run { first, pages: limit.saturating_sub(first.0).min(BLOCK_PAGES) }
    }

    fn pages_of(&self, block: BlockIndex) -> impl Iterator<Item = PageIndex> + use<W> {
        let run = self.block(block);
        (run.first.0..run.first.0 + run.pages).map(PageIndex)
    }

    /// The block is no longer registered.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when a page of it is anywhere.
    pub fn unwatched(&mut self, block: BlockIndex) -> Result<(), MapError> {
        for page in self.pages_of(block) {
            self.map.apply(page, Transition::Unwatch)?;
        }
        Ok(())
    }

    /// True when the kernel serves the block.
    pub fn is_unwatched(&self, block: BlockIndex) -> bool {
        self.map.state(block.first_page()) == Ok(PageState::Unwatched)
    }

    /// The block has been registered, and these of its pages found in guest RAM afterwards.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it was registered before.
    pub fn watched(
        &mut self,
        block: BlockIndex,
        is_present: impl Fn(PageIndex) -> bool,
    ) -> Result<(), MapError> {
        for page in self.pages_of(block) {
            let found = if is_present(page) { Transition::Find } else { Transition::Miss };
            self.map.apply(page, found)?;
        }
        Ok(())
    }

    /// True when the block's pages have a credit of one each on average: they came back soon after they were taken.
    pub fn is_hot(&self, block: BlockIndex) -> bool {
        u32::from(self.replacement.heat(block)) >= self.block(block).pages
    }

    /// The runs of resident pages of a block.
    pub fn resident_runs(&self, block: BlockIndex) -> Vec<Run> {
        self.runs(self.block(block), PageState::Resident)
    }

    /// Zeros were installed for a page whose word said it was in RAM, because nothing was there.
    pub fn confirmed(&mut self, _page: PageIndex) {
        self.anomalies.missing += 1;
    }

    /// How many never-touched pages follow `page` in its block, at most `most`: what a guest that touches its memory
    /// in order will touch next.
    pub fn untouched_after(&self, page: PageIndex, most: u32) -> u32 {
        let end = (page.block().first_page().0 + BLOCK_PAGES).min(self.layout.page_limit().0);
        let following = (page.0 + 1..end.min(page.0.saturating_add(1).saturating_add(most))).map(PageIndex);
        let untouched = following.take_while(|page| matches!(self.map.state(*page), Ok(PageState::Zero)));
        u32::try_from(untouched.count()).unwrap_or(0)
    }

    fn release(&mut self, before: PageState) -> Released {
        match before {
            PageState::Limbo(at) | PageState::Capturing(at) => {
                self.airlock.abandon(at);
                Released::Nothing
            }
            PageState::Stored(object) => Released::Object(object),
            _ => Released::Nothing,
        }
    }

    /// The guest gave pages back. `released` is told of each object that no word names any more.
    ///
    /// # Errors
    /// [`MapError`] past the last page or for a damaged word; pages before it are done.
    pub fn discarded(
        &mut self,
        pages: Range<u32>,
        mut released: impl FnMut(ObjectRef),
    ) -> Result<(), MapError> {
        for page in pages.map(PageIndex) {
            let before = self.map.apply(page, Transition::Discard)?;
            if let PageState::Capturing(at) = before {
                // Whether the slot page holds bytes shows when the move is reported.
                self.doomed.push((page, at));
            } else if let Released::Object(object) = self.release(before) {
                released(object);
            }
        }
        Ok(())
    }

    /// Chooses what to take next, about `want` pages. A block that is unwatched counts as resident: watch it, then take
    /// its [`resident_runs`](Self::resident_runs).
    ///
    /// # Errors
    /// [`MapError::Damaged`].
    pub fn choose(&mut self, want: u32, out: &mut Vec<Run>) -> Result<Choice, MapError> {
        self.replacement.choose(&self.map, want, out)
    }

    /// Writes the intent to move a run of resident pages and names the slot pages to move it to. `None` when the
    /// airlock has no room: limbo has to age first.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when a page of the run is not resident; none of the run is then changed.
    pub fn begin_capture(&mut self, run: Run) -> Result<Option<SlotPage>, MapError> {
        let pages = run.first.0..run.first.0.saturating_add(run.pages);
        let Some(start) = self.airlock.reserve(run.pages) else { return Ok(None) };
        for (page, at) in pages.clone().zip(start.0..) {
            let begun = self.map.apply(PageIndex(page), Transition::BeginCapture(SlotPage(at)));
            if let Err(error) = begun {
                for (page, at) in (pages.start..page).zip(start.0..) {
                    self.map.apply(PageIndex(page), Transition::Refuse(SlotPage(at)))?;
                }
                (start.0..start.0 + run.pages).for_each(|at| self.airlock.cancel(SlotPage(at)));
                return Err(error);
            }
        }
        Ok(Some(start))
    }

    /// The page was moved to its slot page.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when no such move was begun.
    pub fn captured(&mut self, page: PageIndex, at: SlotPage) -> Result<(), MapError> {
        match self.map.apply(page, Transition::Capture(at)) {
            Ok(_) => self.airlock.arrive(at, page),
            Err(MapError::Illegal { .. }) if self.is_doomed(page, at) => self.airlock.abandon(at),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The page was not moved and is still in RAM; with a cause it is not tried again until [`Machine::unpin`].
    ///
    /// # Errors
    /// [`MapError::Illegal`] when no such move was begun.
    pub fn refused(
        &mut self,
        page: PageIndex,
        at: SlotPage,
        cause: Option<PinCause>,
    ) -> Result<(), MapError> {
        self.airlock.cancel(at);
        match self.map.apply(page, Transition::Refuse(at)) {
            Ok(_) => {}
            Err(MapError::Illegal { .. }) if self.is_doomed(page, at) => return Ok(()),
            Err(error) => return Err(error),
        }
        if let Some(cause) = cause {
            self.map.apply(page, Transition::Pin(cause))?;
        }
        Ok(())
    }

    /// The move found nothing in RAM.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when no such move was begun.
    pub fn vanished(&mut self, page: PageIndex, at: SlotPage) -> Result<(), MapError> {
        self.airlock.cancel(at);
        match self.map.apply(page, Transition::Vanish(at)) {
            Ok(_) => Ok(()),
            Err(MapError::Illegal { .. }) if self.is_doomed(page, at) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// True if the page was discarded while this move of it was under way; the move is over now.
    fn is_doomed(&mut self, page: PageIndex, at: SlotPage) -> bool {
        let before = self.doomed.len();
        self.doomed.retain(|doomed| *doomed != (page, at));
        self.doomed.len() < before
    }

    /// The page is in guest RAM and never to be taken: the host itself writes it at any time.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it is not there, or on its way out.
    pub fn exclude(&mut self, page: PageIndex) -> Result<(), MapError> {
        self.map.apply(page, Transition::Exclude).map(drop)
    }

    /// A device reaches the page, as the host itself has seen to: it stays in guest RAM until it is let go. Such a host does not
    /// [`unpin`](Self::unpin), which is for one that is told of pins by refused moves.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it is not there, on its way out, or stays for another reason.
    pub fn hold(&mut self, page: PageIndex) -> Result<(), MapError> {
        self.map.apply(page, Transition::Pin(PinCause::Device)).map(drop)
    }

    /// No device reaches the page any more, nor has a translation to it.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when it was not held.
    pub fn let_go(&mut self, page: PageIndex) -> Result<(), MapError> {
        self.map.apply(page, Transition::Unpin).map(drop)
    }

    /// Lets every pinned page be tried again.
    ///
    /// # Errors
    /// [`MapError::Damaged`].
    pub fn unpin(&mut self) -> Result<(), MapError> {
        if self.census().of(StateKind::Pinned).0 == 0 {
            return Ok(());
        }
        for page in (0..self.layout.page_limit().0).map(PageIndex) {
            if matches!(self.map.state(page)?, PageState::Pinned(_)) {
                self.map.apply(page, Transition::Unpin)?;
            }
        }
        Ok(())
    }

    /// The bytes of a limbo page are in the store.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when the page is no longer in that slot page: release the object.
    pub fn stored(&mut self, page: PageIndex, at: SlotPage, object: ObjectRef) -> Result<(), MapError> {
        self.map.apply(page, Transition::Store(at, object))?;
        self.left_limbo(page, at);
        Ok(())
    }

    /// The bytes of a limbo page are all zero and need no keeping.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when the page is no longer in that slot page.
    pub fn found_zero(&mut self, page: PageIndex, at: SlotPage) -> Result<(), MapError> {
        self.map.apply(page, Transition::DropZero(at))?;
        self.left_limbo(page, at);
        Ok(())
    }

    fn left_limbo(&mut self, page: PageIndex, at: SlotPage) {
        self.airlock.abandon(at);
        self.replacement.stored(page);
    }

    /// The bytes a word names are lost. Returns what to release.
    ///
    /// # Errors
    /// [`MapError::Illegal`] when the page's bytes are in RAM.
    pub fn poisoned(&mut self, page: PageIndex) -> Result<Released, MapError> {
        let before = self.map.apply(page, Transition::Poison)?;
        self.anomalies.lost += 1;
        Ok(self.release(before))
    }

    /// The oldest pages in limbo, at most `most`.
    pub fn oldest_limbo(&self, most: usize) -> impl Iterator<Item = (SlotPage, PageIndex)> + '_ {
        self.airlock.oldest(most)
    }

    /// Runs of slot pages whose memory can be given back, at most `most`; report each to [`Machine::zapped`].
    pub fn zap_runs(&self, most: usize) -> Vec<(SlotPage, u32)> {
        self.airlock.zap_runs(most)
    }

    /// The run's memory was given back.
    pub fn zapped(&mut self, start: SlotPage, pages: u32) {
        self.airlock.zapped(start, pages);
    }

    /// Stops filling the newest slot, so that all of limbo can age out.
    pub fn close_limbo(&mut self) {
        self.airlock.close();
    }

    /// Ends a sampling period and starts the next: returns the pages drawn, to be taken where they are in RAM. What is
    /// not taken is to be [`undrawn`](Self::undraw).
    pub fn draw(&mut self, count: u32) -> Vec<PageIndex> {
        let map = &self.map;
        let in_ram = |page| map.state(page).is_ok_and(PageState::is_in_ram);
        self.sampler.turn(count, in_ram).to_vec()
    }

    /// The drawn page could not be taken, so that its use will not show.
    pub fn undraw(&mut self, page: PageIndex) {
        self.sampler.forget(page);
    }

    /// Pages the machine uses in a sampling period, or `None` before the first full one.
    pub fn working_set(&self) -> Option<PageCount> {
        self.sampler.estimate()
    }
}
