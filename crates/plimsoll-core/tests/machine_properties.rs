//! One machine under random sequences of events, beside an oracle that does only what the documentation says.
//!
//! Enters: sequences of captures, answers, stores, discards, faults and takeovers over two blocks. Leaves: a failing
//! sequence, shrunk, if the machine and the oracle ever disagree. The oracle is an ordered map from page to a plain
//! state; it knows no census, no queue and no slot but those the machine itself handed out.
#![expect(clippy::unwrap_used, reason = "an unexpected refusal by the machine is a failure of the test")]
use plimsoll_core::airlock::Shape;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_core::machine::{FaultEffect, Machine, Released, Source};
use plimsoll_core::map::{HeapWords, Words};
use plimsoll_core::replacement::Run;
use plimsoll_core::word::{ObjectRef, PageState, PageWord, PinCause, StateKind};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, Gpa, PageCount, PageIndex, SlotPage};
use proptest::prelude::{Just, ProptestConfig, Strategy, prop, prop_oneof, proptest};
use proptest::test_runner::FileFailurePersistence;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

const PAGES: u32 = 2 * BLOCK_PAGES;
const SHAPE: Shape = Shape { slots: 3, slot_pages: 64 };

#[derive(Clone, Copy, Debug)]
enum Event {
    /// Fault on a page and serve it as the machine says.
    Fault(u32),
    /// Capture a run that may hold pages that cannot be captured.
    Begin {
        first: u32,
        pages: u32,
    },
    /// The oldest unanswered move is answered.
    Moved,
    Refused(Option<PinCause>),
    Missing,
    Discard {
        first: u32,
        pages: u32,
    },
    Store {
        object: u64,
    },
    FoundZero,
    Zap,
    Close,
    Unpin,
    Choose {
        want: u32,
    },
    /// The agent's barrier, then a new manager.
    TakeOver,
}

fn event() -> impl Strategy<Value = Event> {
    // Few distinct pages, so that events meet, on both sides of the border between the blocks.
    let page = || prop_oneof![4 => 500u32..524, 1 => 0..PAGES];
    prop_oneof![
        8 => page().prop_map(Event::Fault),
        6 => (page(), 1u32..70).prop_map(|(first, pages)| Event::Begin { first, pages }),
        12 => Just(Event::Moved),
        3 => prop_oneof![Just(None), Just(Some(PinCause::Kernel)), Just(Some(PinCause::Device))]
            .prop_map(Event::Refused),
        2 => Just(Event::Missing),
        3 => (page(), 1u32..40).prop_map(|(first, pages)| Event::Discard { first, pages }),
        6 => (0u64..5).prop_map(|object| Event::Store { object }),
        2 => Just(Event::FoundZero),
        4 => Just(Event::Zap),
        1 => Just(Event::Close),
        1 => Just(Event::Unpin),
        2 => (1..PAGES).prop_map(|want| Event::Choose { want }),
        1 => Just(Event::TakeOver),
    ]
}

struct Twin {
    machine: Machine<HeapWords>,
    /// What each page's state should be.
    oracle: BTreeMap<u32, PageState>,
    /// Slot pages that hold memory.
    filled: BTreeSet<u32>,
    /// Moves that were asked for and not answered, in order.
    moves: Vec<(u32, u32)>,
}

fn layout() -> GuestLayout {
    let block =
        |block: u64| Region { start: Gpa(block * BLOCK_SIZE as u64), bytes: ByteCount(BLOCK_SIZE as u64) };
    GuestLayout::new(vec![block(0), block(7)]).unwrap()
}

impl Twin {
    fn new() -> Self {
        let is_present = |page: PageIndex| page.0.is_multiple_of(3) || page.0 >= 505;
        let machine = Machine::new(layout(), HeapWords::new(PAGES as usize), SHAPE, 1, is_present).unwrap();
        let first = |page| {
            if is_present(PageIndex(page)) { PageState::Resident } else { PageState::Zero }
        };
        let oracle = (0..PAGES).map(|page| (page, first(page))).collect();
        Self { machine, oracle, filled: BTreeSet::new(), moves: Vec::new() }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Fault(page) => self.fault(page),
            Event::Begin { first, pages } => self.begin(first, pages),
            Event::Moved => self.answer(|twin, page, at| {
                twin.filled.insert(at);
                twin.machine.captured(PageIndex(page), SlotPage(at)).unwrap();
                twin.settle(page, at, PageState::Limbo(SlotPage(at)));
            }),
            Event::Refused(cause) => self.answer(|twin, page, at| {
                twin.machine.refused(PageIndex(page), SlotPage(at), cause).unwrap();
                twin.settle(page, at, cause.map_or(PageState::Resident, PageState::Pinned));
            }),
            Event::Missing => self.answer(|twin, page, at| {
                twin.machine.vanished(PageIndex(page), SlotPage(at)).unwrap();
                twin.settle(page, at, PageState::Absent);
            }),
            Event::Discard { first, pages } => self.discard(first, pages),
            Event::Store { object } => {
                let Some((at, page)) = self.machine.oldest_limbo(1).next() else { return };
                assert_eq!(self.oracle[&page.0], PageState::Limbo(at));
                let object = ObjectRef::new(object).unwrap();
                self.machine.stored(page, at, object).unwrap();
                self.oracle.insert(page.0, PageState::Stored(object));
            }
            Event::FoundZero => {
                let Some((at, page)) = self.machine.oldest_limbo(1).next() else { return };
                self.machine.found_zero(page, at).unwrap();
                self.oracle.insert(page.0, PageState::Zero);
            }
            Event::Zap => {
                for (start, pages) in self.machine.zap_runs(2) {
                    for at in start.0..start.0 + pages {
                        assert!(self.filled.remove(&at), "slot page {at} was zapped without memory in it");
                    }
                    self.machine.zapped(start, pages);
                }
            }
            Event::Close => self.machine.close_limbo(),
            Event::Unpin => {
                self.machine.unpin().unwrap();
                for state in self.oracle.values_mut() {
                    if matches!(state, PageState::Pinned(_)) {
                        *state = PageState::Resident;
                    }
                }
            }
            Event::Choose { want } => self.choose(want),
            Event::TakeOver => self.take_over(),
        }
    }

    /// Calls `tell` with the oldest unanswered move.
    fn answer(&mut self, tell: impl FnOnce(&mut Self, u32, u32)) {
        if !self.moves.is_empty() {
            let (page, at) = self.moves.remove(0);
            tell(self, page, at);
        }
    }

    /// A move ended; only a page that is still on its way to that slot page changes.
    fn settle(&mut self, page: u32, at: u32, state: PageState) {
        if self.oracle[&page] == PageState::Capturing(SlotPage(at)) {
            self.oracle.insert(page, state);
        }
    }

    fn fault(&mut self, page: u32) {
        // A fault is kept waiting while a move of the page is unanswered, whatever its word says.
        if self.moves.iter().any(|(moving, _)| *moving == page) {
            return;
        }
        let expected = match self.oracle[&page] {
            PageState::Zero | PageState::Absent => FaultEffect::Install(Source::Zero),
            PageState::Limbo(at) => FaultEffect::Install(Source::Limbo(at)),
            PageState::Stored(object) => FaultEffect::Install(Source::Stored(object)),
            PageState::Resident | PageState::Pinned(_) => FaultEffect::InstallIfMissing,
            state => panic!("the oracle has {state:?}"),
        };
        assert_eq!(self.machine.fault(PageIndex(page)), Ok(expected));
        if let FaultEffect::Install(source) = expected {
            let released = match source {
                Source::Stored(object) => Released::Object(object),
                _ => Released::Nothing,
            };
            assert_eq!(self.machine.installed(PageIndex(page)), Ok(released));
            self.oracle.insert(page, PageState::Resident);
        } else {
            assert!(self.machine.installed(PageIndex(page)).is_err(), "a page in RAM was installed again");
        }
    }

    fn begin(&mut self, first: u32, pages: u32) {
        let room = self.machine.airlock().room();
        let run = first..first + pages;
        let is_resident = |page| self.oracle.get(&page) == Some(&PageState::Resident);
        let all_resident = run.clone().all(is_resident);
        match self.machine.begin_capture(Run { first: PageIndex(first), pages }) {
            Ok(Some(start)) => {
                assert!(all_resident && pages <= room, "{run:?} was captured with room for {room}");
                for (page, at) in run.zip(start.0..) {
                    assert!(!self.filled.contains(&at), "slot page {at} was handed out with memory in it");
                    assert!(
                        !self.moves.iter().any(|(_, taken)| *taken == at),
                        "slot page {at} was handed out twice"
                    );
                    self.oracle.insert(page, PageState::Capturing(SlotPage(at)));
                    self.moves.push((page, at));
                }
            }
            Ok(None) => assert!(pages > room, "{run:?} was turned away with room for {room}"),
            Err(_) => assert!(!all_resident, "{run:?} is resident and was refused"),
        }
    }

    fn discard(&mut self, first: u32, pages: u32) {
        let run = first..(first + pages).min(PAGES);
        let mut released = Vec::new();
        self.machine.discarded(run.clone(), |object| released.push(object)).unwrap();
        let mut expected = Vec::new();
        for page in run {
            if let Some(PageState::Stored(object)) = self.oracle.insert(page, PageState::Absent) {
                expected.push(object);
            }
        }
        assert_eq!(released, expected);
    }

    fn choose(&mut self, want: u32) {
        let mut runs = Vec::new();
        let count = self.machine.choose(want, &mut runs).unwrap();
        let pages = runs.iter().flat_map(|run| run.first.0..run.first.0 + run.pages);
        let mut chosen = BTreeSet::new();
        for page in pages {
            assert_eq!(self.oracle[&page], PageState::Resident, "page {page} was chosen");
            assert!(chosen.insert(page), "page {page} was chosen twice");
        }
        assert_eq!(chosen.len(), count as usize);
        assert!(
            runs.iter().all(|run| run.first.block().get() == (run.first.0 + run.pages - 1) as usize / 512)
        );
        let resident = self.oracle.values().filter(|state| **state == PageState::Resident).count();
        assert_eq!(count == 0, resident == 0, "of {resident} resident pages {count} were chosen");
    }

    fn recovered(&self) -> Machine<HeapWords> {
        let words = HeapWords::new(PAGES as usize);
        for (page, word) in (0..).map(PageIndex).zip(words.words()) {
            word.store(PageWord::new(self.machine.state(page).unwrap()).0, Ordering::Relaxed);
        }
        let is_present = |page: PageIndex| {
            let state = self.oracle[&page.0];
            state.is_in_ram() || matches!(state, PageState::Capturing(_))
        };
        let has_memory = |at: SlotPage| self.filled.contains(&at.0);
        Machine::recover(layout(), words, SHAPE, 1, is_present, has_memory).unwrap()
    }

    fn take_over(&mut self) {
        self.moves.clear();
        self.machine = self.recovered();
        for state in self.oracle.values_mut() {
            // What the agent had not answered it has not done; why a page could not be moved is still known.
            if let PageState::Capturing(_) = state {
                *state = PageState::Resident;
            }
        }
        let again = self.recovered();
        assert_eq!(self.machine, again, "a second takeover found something else");
        assert_eq!((again.anomalies().lost, again.anomalies().missing), (0, 0));
    }

    fn agree(&self) {
        self.machine.audit().unwrap();
        assert_eq!(self.machine.census().total(), PageCount(u64::from(PAGES)));
        for (page, state) in &self.oracle {
            assert_eq!(self.machine.state(PageIndex(*page)), Ok(*state), "page {page}");
        }
        for kind in StateKind::ALL {
            let counted = self.oracle.values().filter(|state| state.kind() == kind).count() as u64;
            assert_eq!(self.machine.census().of(kind), PageCount(counted), "{}", kind.name());
        }
        let stored = self.oracle.iter().filter_map(|(page, state)| match state {
            PageState::Stored(object) => Some((PageIndex(*page), *object)),
            _ => None,
        });
        assert!(self.machine.objects().eq(stored));
        let airlock = self.machine.airlock();
        let limbo = self.machine.census().of(StateKind::Limbo);
        assert_eq!(airlock.limbo(), limbo);
        assert_eq!(airlock.limbo() + airlock.residue(), PageCount(self.filled.len() as u64));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 128,
        // A failing seed is kept beside this file and tried first from then on.
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_machine_does_what_its_documentation_says(events in prop::collection::vec(event(), 1..200)) {
        let mut twin = Twin::new();
        twin.agree();
        for event in events {
            twin.apply(event);
            twin.agree();
        }
    }
}

#[test]
fn an_airlock_that_is_full_has_room_again_when_its_oldest_slot_has_drained() {
    let mut twin = Twin::new();
    twin.begin(512, 64);
    twin.begin(576, 64);
    twin.begin(640, 64);
    twin.begin(704, 1);
    assert_eq!(twin.moves.len(), 192, "the fourth run found no room");
    (0..192).for_each(|_| twin.apply(Event::Moved));
    (0..64).for_each(|_| twin.apply(Event::Store { object: 1 }));
    twin.begin(704, 1);
    assert!(twin.moves.is_empty(), "stored pages leave memory behind until it is zapped");
    twin.apply(Event::Zap);
    twin.begin(704, 64);
    assert_eq!(twin.moves.len(), 64);
    twin.agree();
}

#[test]
fn words_and_tables_take_at_most_half_a_percent_of_a_machine() {
    for megabytes in [64u32, 128, 256, 1024, 4096] {
        let bytes = u64::from(megabytes) << 20;
        let layout = GuestLayout::new(vec![Region { start: Gpa(0), bytes: ByteCount(bytes) }]).unwrap();
        let pages = layout.page_limit();
        let slots = pages.0 / BLOCK_PAGES / 16;
        let mut machine =
            Machine::new(layout, HeapWords::new(pages.get()), Shape::blocks(slots), 1, |_| true).unwrap();
        // A slot's table exists only while the slot is in use: fill them all.
        for first in (0..slots).map(|slot| PageIndex(slot * BLOCK_PAGES)) {
            machine.begin_capture(Run { first, pages: BLOCK_PAGES }).unwrap().unwrap();
        }
        let taken = pages.get() as u64 * 8 + machine.table_bytes() as u64;
        println!("{megabytes} MiB: {taken} bytes, {:.3} %", taken as f64 * 100.0 / bytes as f64);
        assert!(taken * 200 <= bytes, "{megabytes} MiB: {taken} bytes of words and tables");
    }
}
