//! One address, and every entry on its way: a walk as the processor does it, that leaves no marks and remembers what it read.
use crate::paging::{Levels, Paging};
use core::cell::RefCell;
use plimsoll_mmu::format::x86::{Caps, Long4, Long5, X86Format};
use plimsoll_mmu::x86::{self, Fault, Mode, PageFault};
use plimsoll_mmu::{
    Access, Entry, Input, Level, MAX_LEVELS, Malformed, Marks, Output, Permissions, TableMemory,
};
use plimsoll_types::Gpa;

/// An entry on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Its table's level.
    pub level: Level,
    /// Where it is.
    pub at: Gpa,
    /// Its place in the table.
    pub index: u64,
    /// Its word.
    pub raw: u64,
    /// What that says.
    pub entry: Entry,
    /// The level of a table that was on the way already, if the entry names it again: a self map, or a loop.
    pub again: Option<Level>,
}

/// Where an address goes, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace<E> {
    /// The entries, from the root on.
    pub seen: Vec<Seen>,
    /// Where it goes.
    pub end: Result<Reached, Stop<E>>,
}

/// A guest physical address that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// The address.
    pub gpa: Gpa,
    /// log2 of the bytes of the page it is in.
    pub shift: u32,
    /// What all entries allow together.
    pub permissions: Permissions,
}

/// Why an address goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stop<E> {
    /// No processor takes it.
    #[error("{0:#x} is not canonical with this many levels of tables")]
    NotCanonical(u64),
    /// The entry is absent.
    #[error("the entry of {level} at {at} is absent")]
    Absent {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Gpa,
    },
    /// The processor refuses the entry.
    #[error("the entry of {level} at {at} is refused: {reason}")]
    Malformed {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Gpa,
        /// Why.
        reason: Malformed,
    },
    /// The entry cannot be had.
    #[error("the entry of {level} cannot be read: {error}")]
    Memory {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Gpa,
        /// Why.
        error: E,
    },
    /// The walk ended in a way that one without marks and rights does not.
    #[error("the walk ended unexpectedly")]
    Unexpected,
}

/// Table memory that remembers what was read of it.
struct Remembering<'a, M> {
    memory: &'a M,
    read: RefCell<Vec<(Output, u64)>>,
}

impl<M: TableMemory> TableMemory for Remembering<'_, M> {
    type Error = M::Error;

    fn read(&self, at: Output) -> Result<u64, M::Error> {
        let word = self.memory.read(at)?;
        self.read.borrow_mut().push((at, word));
        Ok(word)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, M::Error> {
        self.memory.compare_exchange(at, current, new)
    }
}

/// Goes the way of the guest virtual address `gva`.
pub fn trace<M: TableMemory>(memory: &M, paging: &Paging, gva: u64) -> Trace<M::Error> {
    match paging.levels {
        Levels::Four => walk::<Long4, M>(memory, paging, Input(gva)),
        Levels::Five => walk::<Long5, M>(memory, paging, Input(gva)),
    }
}

fn walk<F: X86Format, M: TableMemory>(memory: &M, paging: &Paging, input: Input) -> Trace<M::Error> {
    let memory = Remembering { memory, read: RefCell::new(Vec::with_capacity(MAX_LEVELS)) };
    let how = (Access::Read, Mode::Supervisor);
    let walked = x86::walk::<F, _>(&memory, &paging.registers(), input, how, Marks::Leave);
    let end = match walked {
        Ok(walked) => Ok(Reached {
            gpa: Gpa(walked.output.0),
            shift: walked.leaf.shift,
            permissions: walked.permissions,
        }),
        Err(fault) => Err(stop(fault)),
    };
    Trace { seen: seen::<F>(&memory.read.into_inner(), &paging.caps), end }
}

fn stop<E>(fault: Fault<E>) -> Stop<E> {
    match fault {
        Fault::NotCanonical(input) => Stop::NotCanonical(input.0),
        Fault::Page(PageFault { level, step, malformed, .. }) => match malformed {
            Some(reason) => Stop::Malformed { level, at: Gpa(step.at.0), reason },
            None => Stop::Absent { level, at: Gpa(step.at.0) },
        },
        Fault::Memory { level, at, error } => Stop::Memory { level, at: Gpa(at.0), error },
        // Only marks are contended.
        _ => Stop::Unexpected,
    }
}

/// What was read, from the root on, with what it says.
fn seen<F: X86Format>(read: &[(Output, u64)], caps: &Caps) -> Vec<Seen> {
    let table_of = |at: Output| at.0 >> 12 << 12;
    let levels = (1..=F::LEVELS).rev().map(Level);
    let mut seen: Vec<Seen> = Vec::with_capacity(read.len());
    for (level, &(at, raw)) in levels.zip(read) {
        let entry = F::decode(raw, level, caps);
        let before = || read.iter().zip((1..=F::LEVELS).rev().map(Level)).take(seen.len() + 1);
        let again = match entry {
            Entry::Table(next) => {
                before().find(|((at, _), _)| table_of(*at) == next.at.0).map(|(_, level)| level)
            }
            _ => None,
        };
        let index = at.0 >> 3 & ((1 << F::INDEX_BITS) - 1);
        seen.push(Seen { level, at: Gpa(at.0), index, raw, entry, again });
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{Just, any, prop_oneof, proptest};
    use proptest::strategy::Strategy;

    const PAGE: u64 = 4096;
    /// Frames of the tests' RAM.
    const FRAMES: u64 = 16;

    /// RAM from 0 on.
    struct Words(Vec<u64>);

    impl Words {
        fn new() -> Self {
            Self(vec![0; usize::try_from(FRAMES * 512).unwrap()])
        }

        fn set(&mut self, frame: u64, index: u64, word: u64) {
            self.0[usize::try_from(frame * 512 + index).unwrap()] = word;
        }
    }

    impl TableMemory for Words {
        type Error = u64;

        fn read(&self, at: Output) -> Result<u64, u64> {
            usize::try_from(at.0 / 8).ok().and_then(|place| self.0.get(place)).copied().ok_or(at.0)
        }

        fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, u64> {
            Err(at.0)
        }
    }

    fn four(root: u64) -> Paging {
        Paging::assumed(root * PAGE, Levels::Four)
    }

    /// Entry 1 of each of the frames 1 to 4 in a row, and a page at the end.
    fn chain() -> Words {
        let mut words = Words::new();
        for frame in 1..4 {
            words.set(frame, 1, ((frame + 1) * PAGE) | 3);
        }
        words.set(4, 1, (7 * PAGE) | 0x63);
        words
    }

    /// The address whose index is 1 in each of four tables.
    const ONES: u64 = (1 << 39) | (1 << 30) | (1 << 21) | (1 << 12);

    #[test]
    fn every_entry_on_the_way_is_told() {
        let trace = trace(&chain(), &four(1), ONES | 0x123);
        let reached = trace.end.unwrap();
        assert_eq!((reached.gpa, reached.shift), (Gpa(7 * PAGE + 0x123), 12));
        let shown: Vec<_> =
            trace.seen.iter().map(|seen| (seen.level.0, seen.at.0, seen.index, seen.raw)).collect();
        let expected = [
            (4, PAGE + 8, 1, (2 * PAGE) | 3),
            (3, 2 * PAGE + 8, 1, (3 * PAGE) | 3),
            (2, 3 * PAGE + 8, 1, (4 * PAGE) | 3),
            (1, 4 * PAGE + 8, 1, (7 * PAGE) | 0x63),
        ];
        assert_eq!(shown, expected);
        assert!(matches!(trace.seen[3].entry, Entry::Leaf(leaf) if leaf.accessed && leaf.dirty));
    }

    #[test]
    fn large_pages_end_the_way_early() {
        let mut words = chain();
        words.set(3, 1, 0x4000_0083);
        let found = trace(&words, &four(1), ONES | 0x123);
        let reached = found.end.unwrap();
        assert_eq!((reached.gpa.0, reached.shift), (0x4000_0000 | (1 << 12) | 0x123, 21));
        assert_eq!(found.seen.len(), 3);
    }

    #[test]
    fn what_is_wrong_is_told_with_level_and_entry() {
        let at = |level: u8, frame: u64| (Level(level), Gpa(frame * PAGE + 8));
        let (level, entry) = at(2, 3);
        for (word, expected) in [
            (0, Stop::Absent { level, at: entry }),
            // Bit 13 of a page of 2 MiB.
            ((1 << 13) | 0x83, Stop::Malformed { level, at: entry, reason: Malformed::Reserved(1 << 13) }),
            (
                (FRAMES * PAGE) | 3,
                Stop::Memory { level: Level(1), at: Gpa(FRAMES * PAGE + 8), error: FRAMES * PAGE + 8 },
            ),
        ] {
            let mut words = chain();
            words.set(3, 1, word);
            assert_eq!(trace(&words, &four(1), ONES).end, Err(expected), "{word:#x}");
        }
        let text = Stop::<u64>::Absent { level, at: entry }.to_string();
        assert_eq!(text, "the entry of level 2 at gpa:0x3008 is absent");
        assert_eq!(trace(&chain(), &four(1), 1 << 47).end, Err(Stop::NotCanonical(1 << 47)));
        assert_eq!(trace(&chain(), &four(99), 0).end.unwrap_err(), {
            Stop::Memory { level: Level(4), at: Gpa(99 * PAGE), error: 99 * PAGE }
        });
    }

    #[test]
    fn a_self_map_is_walked_as_a_processor_does_and_pointed_out() {
        let mut words = Words::new();
        words.set(1, 511, PAGE | 3);
        // The address at which a root that maps itself in its last entry is seen.
        let found = trace(&words, &four(1), 0xffff_ffff_ffff_f000);
        assert_eq!(found.end.unwrap().gpa, Gpa(PAGE));
        let again: Vec<_> = found.seen.iter().map(|seen| seen.again).collect();
        assert_eq!(again, [Some(Level(4)), Some(Level(4)), Some(Level(4)), None]);
    }

    #[test]
    fn five_levels_take_five_entries() {
        let mut words = chain();
        words.set(5, 3, PAGE | 3);
        let found = trace(&words, &Paging::assumed(5 * PAGE, Levels::Five), (3 << 48) | ONES);
        assert_eq!((found.end.unwrap().gpa, found.seen.len()), (Gpa(7 * PAGE), 5));
        assert_eq!(found.seen[0].level, Level(5));
    }

    fn word() -> impl Strategy<Value = u64> {
        let frame = (0..FRAMES + 2, 0..4096u64).prop_map(|(frame, flags)| (frame * PAGE) | flags | 1);
        prop_oneof![8 => frame, 1 => any::<u64>(), 1 => Just(0)]
    }

    proptest! {
        /// Whatever a guest writes, a walk reads at most as many entries as there are levels.
        #[test]
        fn hostile_tables_end_a_walk_within_their_levels(
            words in proptest::collection::vec(word(), usize::try_from(FRAMES * 512).unwrap()),
            cr3 in 0..(FRAMES + 2) * PAGE,
            gvas in proptest::collection::vec(any::<u64>(), 16),
        ) {
            let words = Words(words);
            for (levels, most) in [(Levels::Four, 4), (Levels::Five, 5)] {
                for &gva in &gvas {
                    let high = if gva >> 46 & 1 == 1 { !0 << 47 } else { 0 };
                    let found = trace(&words, &Paging::assumed(cr3, levels), (gva & ((1 << 47) - 1)) | high);
                    assert!(found.seen.len() <= most);
                    assert!(found.end != Err(Stop::Unexpected));
                }
            }
        }
    }
}
