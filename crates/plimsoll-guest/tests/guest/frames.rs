//! The allocator: against a model, one operation after the other; and under a scheduler, vCPUs and host at once.
use crate::machine::params;
use plimsoll_guest::frames::{Cursor, FRAME_PAGES, FRAME_SIZE, Frames, NotInUse, Plan, Take, Taken, Words};
use plimsoll_guest::spec::WorkloadKind;
use proptest::prelude::*;
use shuttle::sync::atomic::{AtomicU64, Ordering};
use shuttle::sync::{Arc, Mutex};
use shuttle::thread;
use std::collections::BTreeSet;

const FRAMES: u64 = 3;
/// Words of an allocator: one for each frame, and 8 of its bitmap.
const WORDS_EACH: u64 = 9;

struct Plain(Vec<u64>);

impl Words for Plain {
    fn load(&mut self, word: u64) -> u64 {
        self.0[usize::try_from(word).unwrap()]
    }

    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64> {
        let place = &mut self.0[usize::try_from(word).unwrap()];
        if *place == old {
            *place = new;
            return Ok(());
        }
        Err(*place)
    }
}

fn plain(frames: u64) -> Frames<Plain> {
    Frames::new(Plain(vec![0; usize::try_from(frames * WORDS_EACH).unwrap()]), frames)
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// So many pages.
    Pages(u64),
    Frame,
    FreePages(u64),
    FreeFrame(u64),
    Take(u64, bool),
    GiveBack(u64),
    FreeAPageTwice(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..700u64).prop_map(Step::Pages),
        Just(Step::Frame),
        (1..700u64).prop_map(Step::FreePages),
        (0..FRAMES).prop_map(Step::FreeFrame),
        (0..FRAMES, any::<bool>()).prop_map(|(frame, good)| Step::Take(frame, good)),
        (0..FRAMES).prop_map(Step::GiveBack),
        (0..FRAMES * FRAME_PAGES + 9).prop_map(Step::FreeAPageTwice),
    ]
}

/// What must be true, kept as plain sets.
#[derive(Default)]
struct Model {
    pages: BTreeSet<u64>,
    whole: BTreeSet<u64>,
    held: BTreeSet<u64>,
    installed: BTreeSet<u64>,
}

impl Model {
    fn pages_in(&self, frame: u64) -> usize {
        self.pages.range(frame * FRAME_PAGES..(frame + 1) * FRAME_PAGES).count()
    }

    fn is_free(&self, frame: u64) -> bool {
        self.pages_in(frame) == 0 && !self.whole.contains(&frame) && !self.held.contains(&frame)
    }

    fn has_a_page(&self, frame: u64) -> bool {
        self.pages_in(frame) < 512 && !self.whole.contains(&frame) && !self.held.contains(&frame)
    }

    fn apply(&mut self, frames: &mut Frames<Plain>, cursor: &mut Cursor, step: Step) {
        match step {
            Step::Pages(count) => (0..count).for_each(|_| self.allocate_page(frames, cursor)),
            Step::Frame => match frames.allocate_frame(cursor) {
                Some(claim) => {
                    assert!(self.is_free(claim.number), "{claim:?} was not free");
                    assert_eq!(claim.is_installed, self.installed.contains(&claim.number));
                    self.whole.insert(claim.number);
                    self.install(frames, claim.number);
                }
                None => {
                    assert!((0..FRAMES).all(|frame| !self.is_free(frame)), "a free frame was passed over")
                }
            },
            Step::FreePages(count) => {
                for _ in 0..count {
                    let Some(page) = self.pages.pop_last() else { break };
                    assert_eq!(frames.free_page(page), Ok(()));
                }
            }
            Step::FreeFrame(frame) => {
                let expected = if self.whole.remove(&frame) { Ok(()) } else { Err(NotInUse) };
                assert_eq!(frames.free_frame(frame), expected);
            }
            Step::Take(frame, for_good) => self.take(frames, frame, for_good),
            Step::GiveBack(frame) => {
                let expected = if self.held.remove(&frame) { Ok(()) } else { Err(NotInUse) };
                assert_eq!(frames.give_back(frame), expected);
            }
            Step::FreeAPageTwice(page) => {
                if !self.pages.contains(&page) {
                    assert_eq!(frames.free_page(page), Err(NotInUse));
                }
            }
        }
    }

    fn allocate_page(&mut self, frames: &mut Frames<Plain>, cursor: &mut Cursor) {
        let Some(claim) = frames.allocate_page(cursor) else {
            assert!((0..FRAMES).all(|frame| !self.has_a_page(frame)), "a free page was passed over");
            return;
        };
        let frame = claim.number / FRAME_PAGES;
        assert!(self.has_a_page(frame) && self.pages.insert(claim.number), "{claim:?} was not free");
        assert_eq!(claim.is_installed, self.installed.contains(&frame));
        self.install(frames, frame);
    }

    fn install(&mut self, frames: &mut Frames<Plain>, frame: u64) {
        frames.install(frame);
        self.installed.insert(frame);
    }

    fn take(&mut self, frames: &mut Frames<Plain>, frame: u64, for_good: bool) {
        let was_installed = self.installed.contains(&frame);
        let expected = match (self.is_free(frame), for_good, was_installed) {
            (true, _, true) => Some(Taken::Installed),
            (true, true, false) => Some(Taken::Empty),
            _ => None,
        };
        let take = if for_good { Take::ForGood } else { Take::Softly };
        assert_eq!(frames.take(frame, take), expected);
        if expected.is_some() {
            self.installed.remove(&frame);
            if for_good {
                self.held.insert(frame);
            }
        }
    }
}

proptest! {
    #[test]
    fn the_allocator_does_what_plain_sets_do(steps in prop::collection::vec(step(), 1..60)) {
        let (mut frames, mut model, mut cursor) = (plain(FRAMES), Model::default(), Cursor::default());
        for step in steps {
            model.apply(&mut frames, &mut cursor, step);
            for frame in 0..FRAMES {
                prop_assert_eq!(frames.entry(frame).is_free(), model.is_free(frame), "{} after {:?}", frame, step);
            }
        }
    }

    #[test]
    fn words_that_hold_anything_lead_nowhere_outside(
        words in prop::collection::vec(any::<u64>(), usize::try_from(FRAMES * WORDS_EACH).unwrap()),
        frame in 0..FRAMES + 2,
    ) {
        // The host alone: a guest that damages its own words may go astray in its own memory.
        let mut frames = Frames::new(Plain(words), FRAMES);
        for take in [Take::Softly, Take::ForGood] {
            if let Some(taken) = frames.take(frame, take) {
                prop_assert!(frame < FRAMES);
                let _ = taken;
            }
        }
        let _ = frames.give_back(frame);
        frames.install(frame);
    }
}

#[test]
fn pages_of_a_new_frame_come_in_order_and_a_frame_in_use_comes_before_a_free_one() {
    let (mut frames, mut cursor) = (plain(FRAMES), Cursor::at(1));
    let pages: Vec<u64> = (0..600).map(|_| frames.allocate_page(&mut cursor).unwrap().number).collect();
    assert_eq!(pages, (512..1112).collect::<Vec<u64>>());
    assert_eq!(frames.free_page(600), Ok(()));
    // The cursor's frame first, then the hole, then the frame that was free till now.
    let filled: Vec<u64> = (0..425).map(|_| frames.allocate_page(&mut cursor).unwrap().number).collect();
    assert_eq!(filled[..424], (1112..1536).collect::<Vec<u64>>());
    // Frames are looked at from the cursor on, around: the hole in frame 1 is the only one in use that has room.
    assert_eq!(filled[424], 600);
    assert_eq!(frames.allocate_page(&mut cursor).unwrap().number, 0);
}

#[test]
fn every_frame_lies_in_a_region_and_apart_from_the_tables() {
    for (pages, vcpus) in [(3000, 1), (40_000, 3)] {
        let params = params(WorkloadKind::Frames, vcpus, pages);
        let plan = Plan::new(&params).unwrap();
        let tables_end = plan.kept_gpa(vcpus - 1, plan.kept_most());
        let mut last = 0;
        for frame in 0..plan.frames() {
            let gpa = plan.frame_gpa(frame);
            assert!(gpa > last && gpa >= tables_end && gpa.is_multiple_of(FRAME_SIZE), "{frame}: {gpa:#x}");
            let inside = |region: &plimsoll_guest::abi::Region| {
                gpa >= region.gpa && gpa + FRAME_SIZE <= region.gpa + region.len
            };
            assert!(params.regions.iter().any(inside), "{frame}: {gpa:#x}");
            assert_eq!(plan.frame_at(gpa), Some(frame));
            assert_eq!(plan.frame_at(gpa + 4096), None);
            last = gpa;
        }
        assert_eq!(plan.frame_at(last + FRAME_SIZE), None);
        assert_eq!(plan.frame_at(plan.word_gpa(0)), None);
        assert!(tables_end <= params.regions[0].gpa + params.regions[0].len);
    }
    assert_eq!(Plan::new(&params(WorkloadKind::Frames, 1, 400)), None);
}

// Guest and host at once.

/// Pages whose contents are watched, of each frame.
const WATCHED: u64 = 8;
const RACED: u64 = 2;

/// A machine: the shared words, and what its memory holds.
struct World {
    words: Vec<AtomicU64>,
    memory: Vec<AtomicU64>,
    gate: Mutex<()>,
    /// Whether the host answers only when it is not between taking a frame and dropping its memory.
    install_waits: bool,
}

#[derive(Clone)]
struct Raced(Arc<World>);

impl Words for Raced {
    fn load(&mut self, word: u64) -> u64 {
        self.0.words[usize::try_from(word).unwrap()].load(Ordering::SeqCst)
    }

    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64> {
        let word = &self.0.words[usize::try_from(word).unwrap()];
        word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).map(|_| ())
    }
}

impl World {
    fn at(&self, page: u64) -> &AtomicU64 {
        assert!(page % FRAME_PAGES < WATCHED, "{page}");
        &self.memory[usize::try_from(page / FRAME_PAGES * WATCHED + page % FRAME_PAGES).unwrap()]
    }

    fn drop_frame(&self, frame: u64) {
        (0..WATCHED).for_each(|page| self.at(frame * FRAME_PAGES + page).store(0, Ordering::SeqCst));
    }

    fn install(self: &Arc<Self>, frame: u64) {
        let gate = self.install_waits.then(|| self.gate.lock().unwrap());
        Frames::new(Raced(Arc::clone(self)), RACED).install(frame);
        drop(gate);
    }

    fn uses(self: &Arc<Self>, page: u64, is_installed: bool, token: u64) {
        if !is_installed {
            self.install(page / FRAME_PAGES);
        }
        self.at(page).store(token, Ordering::SeqCst);
        thread::yield_now();
        assert_eq!(self.at(page).load(Ordering::SeqCst), token, "page {page} was lost in use");
    }
}

fn vcpu(world: &Arc<World>, token: u64) {
    let mut frames = Frames::new(Raced(Arc::clone(world)), RACED);
    let mut cursor = Cursor::default();
    for round in 0..3 {
        let page = frames.allocate_page(&mut cursor);
        if let Some(claim) = page {
            world.uses(claim.number, claim.is_installed, token + round);
        }
        let frame = (round > 0).then(|| frames.allocate_frame(&mut cursor)).flatten();
        if let Some(claim) = frame {
            world.uses(claim.number * FRAME_PAGES, claim.is_installed, token + 10);
            assert_eq!(frames.free_frame(claim.number), Ok(()));
        }
        if let Some(claim) = page {
            assert_eq!(frames.free_page(claim.number), Ok(()));
        }
    }
}

fn host(world: &Arc<World>, take: Take) {
    let mut frames = Frames::new(Raced(Arc::clone(world)), RACED);
    for frame in (0..RACED).cycle().take(8) {
        let gate = world.gate.lock().unwrap();
        let taken = frames.take(frame, take);
        if taken == Some(Taken::Installed) {
            world.drop_frame(frame);
        }
        drop(gate);
        if taken.is_some() && take == Take::ForGood {
            assert_eq!(frames.give_back(frame), Ok(()));
        }
    }
}

fn race(take: Take, install_waits: bool) {
    let zeros = |count: u64| (0..count).map(|_| AtomicU64::new(0)).collect();
    let (words, memory) = (zeros(RACED * WORDS_EACH), zeros(RACED * WATCHED));
    let world = Arc::new(World { words, memory, gate: Mutex::new(()), install_waits });
    let threads = [
        thread::spawn({
            let world = Arc::clone(&world);
            move || vcpu(&world, 100)
        }),
        thread::spawn({
            let world = Arc::clone(&world);
            move || vcpu(&world, 200)
        }),
        thread::spawn({
            let world = Arc::clone(&world);
            move || host(&world, take)
        }),
    ];
    for thread in threads {
        thread.join().unwrap();
    }
    // Everything is free again, and no bit is left.
    let mut frames = Frames::new(Raced(Arc::clone(&world)), RACED);
    assert!((0..RACED).all(|frame| frames.entry(frame).is_free()));
    let bitmaps = usize::try_from(RACED).unwrap();
    assert!(world.words[bitmaps..].iter().all(|word| word.load(Ordering::SeqCst) == 0));
}

const SCHEDULES: usize = 10_000;

#[test]
fn no_schedule_loses_a_page_in_use_or_gives_it_twice() {
    for take in [Take::Softly, Take::ForGood] {
        shuttle::check_random(move || race(take, true), SCHEDULES);
        shuttle::check_pct(move || race(take, true), SCHEDULES / 4, 3);
    }
}

#[test]
#[should_panic(expected = "was lost in use")]
fn a_host_that_installs_while_it_drops_is_caught() {
    shuttle::check_random(|| race(Take::Softly, false), SCHEDULES);
}
