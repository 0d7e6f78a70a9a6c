//! Memory that a guest has given: by the listings of its balloon, and by frames taken out of the allocator it shares.
//!
//! Enters: listings and questions of vCPUs, orders of the starter. Leaves: discards of guest memory, words changed in the guest's
//! tables, notices for the starter. What must never happen: memory dropped outside of guest RAM or while it is pinned, a frame
//! dropped after it was installed, or a number the guest wrote being believed. Every discard goes through [`Memory::give`], so
//! the manager of a machine hears of it as of any other: what a guest gives is never stored.
//!
//! # Locks
//!
//! * The gate is held from taking frames to dropping their memory, and while a frame is installed: see
//!   [`plimsoll_guest::frames`]. A discard waits there until the manager has read of it, which waits for no vCPU. vCPUs and the
//!   frames' thread take it; the main thread does not.
//! * The account is held for counting only.
use crate::control::{FrameOrder, FrameVerb};
use crate::machine::Death;
use crate::memory::{DiscardError, Memory};
use plimsoll_core::word::Gift;
use plimsoll_guest::abi::{self, BalloonTarget, Finds, Listed, Listing, Piece};
use plimsoll_guest::frames::{FRAME_SIZE, Frames, Plan, Take, Taken, Words};
use plimsoll_linux::explain;
use plimsoll_types::{ByteCount, Gpa, PageCount, PageIndex};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Frames taken under one hold of the gate: 128 MiB, so that a guest which asks for a frame waits for one or two discards.
const BATCH: usize = 64;

/// Something the starter is to hear of.
#[derive(Clone, Debug)]
pub(crate) enum Notice {
    /// The balloon has what it can have.
    Settled { target: BalloonTarget, ballooned: ByteCount, took: Duration },
    /// An order is done.
    Done { order: FrameOrder, done: ByteCount, dropped: ByteCount, took: Duration, refused: Option<String> },
}

/// What the balloon has, page by page: guests may list a page twice.
#[derive(Debug, Default)]
struct Account {
    bits: Vec<u64>,
    pages: u64,
}

impl Account {
    /// Counts these pages as given or not. All lie below the number of pages it was made for.
    fn note(&mut self, pages: Range<u32>, given: bool) {
        let (mut at, end) = (u64::from(pages.start), u64::from(pages.end));
        while at < end {
            let (bit, next) = (at % 64, (at / 64 + 1) * 64);
            let mask = u64::MAX >> (64 - (next.min(end) - at)) << bit;
            if let Some(word) = usize::try_from(at / 64).ok().and_then(|word| self.bits.get_mut(word)) {
                let before = u64::from((*word & mask).count_ones());
                *word = if given { *word | mask } else { *word & !mask };
                self.pages = self.pages - before + u64::from((*word & mask).count_ones());
            }
            at = next;
        }
    }
}

/// What is asked of the balloon and of the frames.
#[derive(Debug, Default)]
struct Desk {
    orders: VecDeque<(FrameOrder, Instant)>,
    notices: Vec<Notice>,
    /// The target set last, and when.
    target: Option<(BalloonTarget, Instant)>,
    is_closed: bool,
}

/// The frames that the host holds for good, by number.
#[derive(Debug, Default)]
struct Held(Vec<u64>);

/// All of it, of one machine.
#[derive(Debug)]
pub(crate) struct Balloon {
    /// Where frames lie, if the guest keeps frames. Computed from the parameters the VMM wrote, never from what the guest says.
    plan: Option<Plan>,
    gate: Mutex<Held>,
    account: Mutex<Account>,
    desk: Mutex<Desk>,
    ordered: Condvar,
}

/// The allocator's words in guest memory.
struct Shared<'a> {
    memory: &'a Memory,
    plan: Plan,
}

impl Words for Shared<'_> {
    fn load(&mut self, word: u64) -> u64 {
        // Inside of RAM by the plan; were it not, this is a frame in use.
        self.memory.read_u64(Gpa(self.plan.word_gpa(word))).unwrap_or(u64::MAX)
    }

    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64> {
        self.memory.exchange_u64(Gpa(self.plan.word_gpa(word)), old, new).unwrap_or(Err(u64::MAX))
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values that no panic can leave half written.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a run of addresses starts, and its bytes.
type Span = (u64, u64);

/// Appends a piece to the last run if it continues it upward or downward.
fn join(runs: &mut Vec<Span>, gpa: u64, len: u64) {
    match runs.last_mut() {
        Some((start, bytes)) if start.checked_add(*bytes) == Some(gpa) => *bytes += len,
        Some((start, bytes)) if gpa.checked_add(len) == Some(*start) => {
            (*start, *bytes) = (gpa, *bytes + len)
        }
        _ => runs.push((gpa, len)),
    }
}

impl Balloon {
    /// Of a guest with these frames and so many pages, none of which it has given.
    pub(crate) fn new(plan: Option<Plan>, pages: PageCount) -> Self {
        let words = usize::try_from(pages.0.div_ceil(64)).unwrap_or(0);
        Self {
            plan,
            gate: Mutex::default(),
            account: Mutex::new(Account { bits: vec![0; words], pages: 0 }),
            desk: Mutex::default(),
            ordered: Condvar::new(),
        }
    }

    /// Whether the guest keeps frames.
    pub(crate) fn has_frames(&self) -> bool {
        self.plan.is_some()
    }

    /// What has been given and not taken back: by the balloon, and frames held for good.
    pub(crate) fn ballooned(&self) -> ByteCount {
        PageCount(locked(&self.account).pages).bytes()
    }

    /// The next target, if the guest has a balloon. Whoever sets it writes it where the guest looks.
    pub(crate) fn aim(&self, bytes: ByteCount, piece: Piece, finds: Finds) -> Option<BalloonTarget> {
        self.plan?;
        let mut desk = locked(&self.desk);
        let before = desk.target.map_or(BalloonTarget::default(), |(target, _)| target);
        let target = before.next(bytes.pages_floor().0, piece, finds);
        desk.target = Some((target, Instant::now()));
        Some(target)
    }

    /// Does what a listing says. Adjacent pieces of it become one discard.
    pub(crate) fn listed(&self, memory: &Memory, listing: &Listing) -> Result<(), Death> {
        let Listing { what, piece, count, ref pages, .. } = *listing;
        let senseless = || Death::Listing { what, piece, count };
        let (what, piece) = Listed::from_wire(what).zip(Piece::from_wire(piece)).ok_or_else(senseless)?;
        let pages = usize::try_from(count).ok().and_then(|count| pages.get(..count)).ok_or_else(senseless)?;
        if self.plan.is_none() {
            return Err(senseless());
        }
        let mut runs = Vec::new();
        let len = piece.pages() * abi::PAGE_SIZE;
        pages.iter().for_each(|page| join(&mut runs, u64::from(*page) * abi::PAGE_SIZE, len));
        match what {
            Listed::Given => runs.into_iter().try_for_each(|(gpa, len)| {
                memory.give(Gpa(gpa), len, Gift::Ballooned).map_err(Death::Discard)?;
                self.note(memory, (gpa, len), true)
            }),
            Listed::WantedBack => runs.into_iter().try_for_each(|run| self.note(memory, run, false)),
            Listed::Settled => {
                let ballooned = self.ballooned();
                let mut desk = locked(&self.desk);
                if let Some((target, since)) = desk.target {
                    desk.notices.push(Notice::Settled { target, ballooned, took: since.elapsed() });
                }
                Ok(())
            }
        }
    }

    /// Counts a run that must lie in one region.
    fn note(&self, memory: &Memory, (gpa, len): Span, given: bool) -> Result<(), Death> {
        let not_pages = Death::Discard(DiscardError::NotPages { gpa: Gpa(gpa), len });
        let last = gpa.checked_add(len - 1).map(Gpa);
        let index = |gpa: Option<Gpa>| memory.layout().index_of(gpa?);
        let (Some(PageIndex(first)), Some(PageIndex(last))) = (index(Some(Gpa(gpa))), index(last)) else {
            return Err(not_pages);
        };
        if PageCount(u64::from(last.saturating_sub(first)) + 1).bytes() != ByteCount(len) {
            return Err(not_pages);
        }
        locked(&self.account).note(first..last + 1, given);
        Ok(())
    }

    /// Says that the frame at an address may be touched. Waits while frames are being taken.
    pub(crate) fn install(&self, memory: &Memory, gpa: u64) -> Result<(), Death> {
        let no_frame = || Death::Install { gpa: Gpa(gpa) };
        let plan = self.plan.ok_or_else(no_frame)?;
        let frame = plan.frame_at(gpa).ok_or_else(no_frame)?;
        let gate = locked(&self.gate);
        Frames::new(Shared { memory, plan }, plan.frames()).install(frame);
        drop(gate);
        Ok(())
    }

    /// Leaves an order for the frames' thread.
    pub(crate) fn order(&self, order: FrameOrder) {
        locked(&self.desk).orders.push_back((order, Instant::now()));
        self.ordered.notify_one();
    }

    /// Has the frames' thread end once it has done what it is at.
    pub(crate) fn close(&self) {
        locked(&self.desk).is_closed = true;
        self.ordered.notify_one();
    }

    /// What the starter has not heard of yet.
    pub(crate) fn notices(&self) -> Vec<Notice> {
        std::mem::take(&mut locked(&self.desk).notices)
    }

    /// The frames' thread: does orders until it is closed, calling `said` after each.
    pub(crate) fn serve(&self, memory: &Memory, said: impl Fn()) {
        let Some(plan) = self.plan else { return };
        loop {
            let desk = locked(&self.desk);
            let idle = |desk: &mut Desk| desk.orders.is_empty() && !desk.is_closed;
            let mut desk = self.ordered.wait_while(desk, idle).unwrap_or_else(PoisonError::into_inner);
            if desk.is_closed {
                return;
            }
            let Some((order, since)) = desk.orders.pop_front() else { continue };
            drop(desk);
            let mut taking = Taking { balloon: self, memory, plan, done: 0, dropped: 0 };
            let result = match order.order {
                FrameVerb::TakeSoftly => taking.take(order.bytes, Take::Softly),
                FrameVerb::TakeForGood => taking.take(order.bytes, Take::ForGood),
                FrameVerb::GiveBack => taking.give_back(order.bytes),
            };
            let Taking { done, dropped, .. } = taking;
            locked(&self.desk).notices.push(Notice::Done {
                order,
                done: ByteCount(done),
                dropped: ByteCount(dropped),
                took: since.elapsed(),
                refused: result.err().map(|death| explain(&death)),
            });
            said();
        }
    }
}

/// An order being done.
struct Taking<'a> {
    balloon: &'a Balloon,
    memory: &'a Memory,
    plan: Plan,
    /// Bytes taken or given back, and those of them that were dropped.
    done: u64,
    dropped: u64,
}

impl Taking<'_> {
    fn frames(&self) -> Frames<Shared<'_>> {
        Frames::new(Shared { memory: self.memory, plan: self.plan }, self.plan.frames())
    }

    /// Takes as many frames that nobody uses as there are in `bytes`, or all.
    fn take(&mut self, bytes: u64, take: Take) -> Result<(), Death> {
        let mut next = 0;
        while next < self.plan.frames() && self.done + FRAME_SIZE <= bytes {
            let mut held = locked(&self.balloon.gate);
            let (mut runs, mut taken) = (Vec::new(), 0);
            while next < self.plan.frames() && taken < BATCH && self.done + FRAME_SIZE <= bytes {
                let frame = next;
                next += 1;
                let Some(found) = self.frames().take(frame, take) else { continue };
                taken += 1;
                self.done += FRAME_SIZE;
                let gpa = self.plan.frame_gpa(frame);
                if found == Taken::Installed {
                    join(&mut runs, gpa, FRAME_SIZE);
                }
                if take == Take::ForGood {
                    held.0.push(frame);
                    self.balloon.note(self.memory, (gpa, FRAME_SIZE), true)?;
                }
            }
            let gift = if take == Take::ForGood { Gift::Ballooned } else { Gift::Hinted };
            for (gpa, len) in runs {
                self.memory.give(Gpa(gpa), len, gift).map_err(Death::Discard)?;
                self.dropped += len;
            }
            drop(held);
        }
        Ok(())
    }

    /// Gives frames back that are held, the last first. One that the guest says is not held is its own again already.
    fn give_back(&mut self, bytes: u64) -> Result<(), Death> {
        let mut held = locked(&self.balloon.gate);
        while self.done + FRAME_SIZE <= bytes {
            let Some(frame) = held.0.pop() else { break };
            let _ = self.frames().give_back(frame);
            self.balloon.note(self.memory, (self.plan.frame_gpa(frame), FRAME_SIZE), false)?;
            self.done += FRAME_SIZE;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{HugePages, VmmConfig, Workload};
    use plimsoll_guest::content::Mix;
    use plimsoll_guest::random::Rng;
    use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
    use std::ops::RangeInclusive;

    /// A guest of two regions that keeps frames, a word on every page of it, and what is pinned for it.
    fn guest() -> (Memory, Plan) {
        let spec = WorkloadSpec::new(WorkloadKind::Frames);
        let workload = Workload { spec, mix: Mix::default(), seed: 1, pool_seed: 1, pool_pages: 1 };
        let config = VmmConfig::new("hostile", 32 << 20, workload);
        let plan = *config.guest().unwrap().plan().unwrap();
        let memory = Memory::map(config.check().unwrap(), HugePages::Never, Vec::new(), &[]).unwrap();
        for gpa in pages(&memory) {
            memory.write_u64(Gpa(gpa), MARK).unwrap();
        }
        for (gpa, len) in [(abi::PARAMS_GPA, 4 * 4096), (plan.word_gpa(0), plan.words() * 8)] {
            memory.pin_for_life(Gpa(gpa), ByteCount(len)).unwrap();
        }
        (memory, plan)
    }

    const MARK: u64 = 0x5a5a;

    fn pages(memory: &Memory) -> Vec<u64> {
        let regions = memory.layout().regions().iter();
        regions.flat_map(|region| (region.start.0..region.start.0 + region.bytes.0).step_by(4096)).collect()
    }

    /// Addresses of pages whose word is gone.
    fn dropped(memory: &Memory) -> Vec<u64> {
        let all = pages(memory).into_iter();
        all.filter(|gpa| memory.read_u64(Gpa(*gpa)).unwrap() == 0).collect()
    }

    fn listing(what: u32, piece: u32, count: u32, page: u64) -> Listing {
        Listing { what, piece, count, pages: [u32::try_from(page).unwrap(); 256], reserved: 7 }
    }

    #[test]
    fn listings_that_name_anything_but_unpinned_pages_of_the_guest_drop_nothing() {
        let (memory, plan) = guest();
        let balloon = Balloon::new(Some(plan), memory.layout().pages());
        let end = memory.layout().regions()[1].start.0 / 4096 + 4096;
        let given = Listed::Given as u32;
        let cases: [(Listing, RangeInclusive<u32>); 8] = [
            (listing(given, 0, 1, abi::PARAMS_GPA / 4096), 1..=3),
            (listing(given, 0, 1, plan.word_gpa(0) / 4096), 1..=3),
            // In the hole, behind the end, across it, and wherever 32 bits reach.
            (listing(given, 0, 1, memory.layout().regions()[0].bytes.0 / 4096), 1..=2),
            (listing(given, 1, 1, end), 1..=2),
            (listing(given, 1, 256, end - 1), 1..=2),
            (listing(given, 1, 1, u64::from(u32::MAX)), 1..=2),
            (listing(given, 2, 1, 4000), 1..=1),
            (listing(given, 0, 257, 4000), 1..=1),
        ];
        for (listing, what) in cases {
            for purpose in what {
                let Listing { piece, count, pages: [page, ..], .. } = listing;
                let result = balloon.listed(&memory, &Listing { what: purpose, ..listing });
                // What is wanted back is only counted, so pinned pages do no harm there.
                let is_harmless = purpose != given && piece == 0 && count == 1;
                assert!(result.is_err() || is_harmless, "{purpose}: {count} of {piece} at {page:#x}");
            }
        }
        assert!(balloon.listed(&memory, &listing(77, 0, 1, 4000)).is_err());
        assert!(Balloon::new(None, PageCount(0)).listed(&memory, &listing(given, 0, 1, 2000)).is_err());
        assert_eq!((dropped(&memory), balloon.ballooned()), (vec![], ByteCount(0)));
        let page = plan.frame_gpa(0) / 4096;
        balloon.listed(&memory, &listing(given, 0, 3, page)).unwrap();
        assert_eq!((dropped(&memory), balloon.ballooned()), (vec![page * 4096], ByteCount(4096)));
        for wrong in [0, 4096, plan.frame_gpa(0) + 4096, u64::MAX] {
            assert!(matches!(balloon.install(&memory, wrong), Err(Death::Install { .. })), "{wrong:#x}");
        }
    }

    #[test]
    fn tables_that_hold_anything_cost_the_guest_its_frames_and_nothing_else() {
        let (memory, plan) = guest();
        let first_frame = plan.frame_gpa(0);
        let mut rng = Rng::new(3);
        for round in 0..200 {
            let balloon = Balloon::new(Some(plan), memory.layout().pages());
            for word in 0..plan.words() {
                // Anything, and often something that looks right.
                let lie = if rng.below(2) == 0 { rng.word() } else { rng.below(8) << 16 };
                memory.write_u64(Gpa(plan.word_gpa(word)), lie).unwrap();
            }
            let mut taking = Taking { balloon: &balloon, memory: &memory, plan, done: 0, dropped: 0 };
            let take = if round % 2 == 0 { Take::Softly } else { Take::ForGood };
            taking.take(u64::MAX, take).unwrap();
            let held = if take == Take::ForGood { taking.done } else { 0 };
            assert_eq!(balloon.ballooned(), ByteCount(held));
            assert!(taking.dropped <= taking.done && taking.done <= plan.frames() * FRAME_SIZE);
            // It says that nothing is held, and more of it.
            (0..plan.frames())
                .for_each(|frame| memory.write_u64(Gpa(plan.word_gpa(frame)), rng.word()).unwrap());
            taking.done = 0;
            taking.give_back(u64::MAX).unwrap();
            assert_eq!((taking.done, balloon.ballooned()), (held, ByteCount(0)));
        }
        let gone = dropped(&memory);
        assert!(!gone.is_empty() && gone.iter().all(|gpa| *gpa >= first_frame), "{:x?}", gone.first());
    }

    #[test]
    fn pages_are_counted_once_however_often_they_are_listed() {
        let mut account = Account { bits: vec![0; 4], pages: 0 };
        account.note(10..200, true);
        account.note(60..70, true);
        assert_eq!(account.pages, 190);
        account.note(0..64, false);
        account.note(0..64, false);
        assert_eq!(account.pages, 136);
        account.note(0..256, true);
        assert_eq!(account.pages, 256);
        account.note(0..256, false);
        assert_eq!((account.pages, account.bits), (0, vec![0; 4]));
    }

    #[test]
    fn neighbours_become_one_run_whichever_way_they_are_listed() {
        let runs = |pages: &[u64]| {
            let mut runs = Vec::new();
            pages.iter().for_each(|page| join(&mut runs, page * 4096, 4096));
            runs.into_iter().map(|(gpa, len)| (gpa / 4096, len / 4096)).collect::<Vec<_>>()
        };
        assert_eq!(runs(&[5, 6, 7, 9, 8, 20]), [(5, 3), (8, 2), (20, 1)]);
        assert_eq!(runs(&[7, 6, 5, 5]), [(5, 3), (5, 1)]);
    }
}
