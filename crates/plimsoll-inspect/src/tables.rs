//! All that a guest maps: a root enters, leaves leave in the order of addresses, and what is wrong with the tables.
//!
//! Tables that a guest wrote may lead in circles, or from 512 entries to one table whose 512 entries lead to one table, and so on: few
//! frames that map everything. So each table is entered once at each level, however many entries name it, and never below itself.
//! That bounds a visit by the frames of RAM times the levels.
use crate::outside::{Outside, Unreadable};
use crate::paging::{Levels, Paging};
use core::fmt;
use core::ops::ControlFlow;
use plimsoll_mmu::format::x86::{Long4, Long5, X86Format};
use plimsoll_mmu::{Entry, Input, Level, Malformed, Permissions};
use plimsoll_types::Gpa;
use std::collections::HashSet;

/// What is wrong is kept one by one up to so many times, and counted beyond.
const WRONGS_MAX: usize = 16;
/// Entries of a table.
const ENTRIES: usize = 512;

/// Memory from which whole tables are read.
pub trait Tables {
    /// Why one cannot be had.
    type Error: Copy + fmt::Debug + fmt::Display;

    /// Reads the table at `at`, which is the beginning of a page.
    ///
    /// # Errors
    /// It is not in the guest's RAM, or cannot be read.
    fn table(&self, at: Gpa, words: &mut [u64; ENTRIES]) -> Result<(), Self::Error>;
}

impl Tables for Outside<'_> {
    type Error = Unreadable;

    fn table(&self, at: Gpa, words: &mut [u64; ENTRIES]) -> Result<(), Unreadable> {
        let mut bytes = [0; ENTRIES * 8];
        self.bytes(at, &mut bytes)?;
        let each = bytes.as_chunks::<8>().0.iter();
        words.iter_mut().zip(each).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
        Ok(())
    }
}

/// A page that the guest maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Where it begins in the guest's virtual address space.
    pub gva: u64,
    /// Where in the physical one.
    pub gpa: Gpa,
    /// log2 of its bytes.
    pub shift: u32,
    /// What all entries on the way allow together.
    pub permissions: Permissions,
}

/// Something in the tables that no processor would use, or that leads nowhere new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong<E> {
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
    /// The table that the entry names cannot be had.
    #[error("the entry of {level} at {at} names a table that cannot be read: {error}")]
    Table {
        /// The level of the table that names it; the root is named by CR3, at the level above.
        level: Level,
        /// The entry.
        at: Gpa,
        /// Why.
        error: E,
    },
    /// The entry names a table on the way to itself. It is not followed.
    #[error("the entry of {level} at {at} names a table of {again} on the way to itself")]
    Loop {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Gpa,
        /// The level at which the table was entered.
        again: Level,
    },
}

/// What a visit came by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visited<E> {
    /// Tables that were read.
    pub tables: u64,
    /// Entries that name a table that was entered by another one already; what is below was shown once.
    pub aliases: u64,
    /// Entries of the root that name the root: kernels that reach their tables by themselves (Windows, FreeBSD) have one. It is not
    /// followed.
    pub self_maps: u64,
    /// What is wrong, the first few.
    pub wrongs: Vec<Wrong<E>>,
    /// All that is wrong.
    pub wrong: u64,
}

/// Shows every page that is mapped, each table's once, until `show` has enough.
pub fn visit<M: Tables>(
    memory: &M,
    paging: &Paging,
    mut show: impl FnMut(&Mapped) -> ControlFlow<()>,
) -> Visited<M::Error> {
    match paging.levels {
        Levels::Four => Visit::<Long4, M>::all(memory, paging, &mut show).found,
        Levels::Five => Visit::<Long5, M>::all(memory, paging, &mut show).found,
    }
}

struct Visit<'a, F: X86Format, M: Tables> {
    memory: &'a M,
    caps: F::Caps,
    show: &'a mut dyn FnMut(&Mapped) -> ControlFlow<()>,
    /// Tables that were read: no others, of which hostile ones name any number.
    entered: HashSet<(Level, u64)>,
    path: Vec<(Level, u64)>,
    found: Visited<M::Error>,
}

impl<'a, F: X86Format, M: Tables> Visit<'a, F, M> {
    fn all(memory: &'a M, paging: &Paging, show: &'a mut dyn FnMut(&Mapped) -> ControlFlow<()>) -> Self {
        let found = Visited { tables: 0, aliases: 0, self_maps: 0, wrongs: Vec::new(), wrong: 0 };
        let (entered, path) = (HashSet::new(), Vec::new());
        let mut visit = Self { memory, caps: paging.caps, show, entered, path, found };
        let from = (Level(F::LEVELS + 1), Gpa(paging.cr3));
        // Whoever has enough knows of it.
        let _ = visit.table(paging.root(), F::root(), from, 0, Permissions::all());
        visit
    }

    fn wrong(&mut self, wrong: Wrong<M::Error>) {
        self.found.wrong += 1;
        if self.found.wrongs.len() < WRONGS_MAX {
            self.found.wrongs.push(wrong);
        }
    }

    /// Goes through a table that an entry of `from` names.
    fn table(
        &mut self,
        table: u64,
        level: Level,
        from: (Level, Gpa),
        offset: u64,
        permissions: Permissions,
    ) -> ControlFlow<()> {
        let (above, entry) = from;
        if matches!(self.path.as_slice(), &[(_, root)] if root == table) {
            self.found.self_maps += 1;
            return ControlFlow::Continue(());
        }
        if let Some(&(again, _)) = self.path.iter().find(|(_, other)| *other == table) {
            self.wrong(Wrong::Loop { level: above, at: entry, again });
            return ControlFlow::Continue(());
        }
        if self.entered.contains(&(level, table)) {
            self.found.aliases += 1;
            return ControlFlow::Continue(());
        }
        let mut words = [0; ENTRIES];
        if let Err(error) = self.memory.table(Gpa(table), &mut words) {
            self.wrong(Wrong::Table { level: above, at: entry, error });
            return ControlFlow::Continue(());
        }
        self.entered.insert((level, table));
        self.found.tables += 1;
        self.path.push((level, table));
        for (index, &raw) in (0..).zip(&words) {
            let at = Gpa(table | index << 3);
            let offset = offset | index << F::shift(level);
            match (F::decode(raw, level, &self.caps), level.below()) {
                (Entry::Absent { .. }, _) => {}
                (Entry::Malformed(reason), _) => self.wrong(Wrong::Malformed { level, at, reason }),
                (Entry::Table(next), Some(below)) => {
                    self.table(next.at.0, below, (level, at), offset, permissions & next.permissions)?;
                }
                (Entry::Table(_), None) => {
                    self.wrong(Wrong::Malformed { level, at, reason: Malformed::TableAtLastLevel });
                }
                (Entry::Leaf(leaf), _) => {
                    let Input(gva) = F::extend(offset);
                    let permissions = permissions & leaf.permissions;
                    (self.show)(&Mapped { gva, gpa: Gpa(leaf.base().0), shift: leaf.shift, permissions })?;
                }
            }
        }
        self.path.pop();
        ControlFlow::Continue(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::{any, prop_oneof, proptest};
    use proptest::strategy::Strategy;

    const PAGE: u64 = 4096;
    const FRAMES: usize = 12;

    /// RAM from 0 on.
    struct Frames(Vec<[u64; ENTRIES]>);

    impl Tables for Frames {
        type Error = Unreadable;

        fn table(&self, at: Gpa, words: &mut [u64; ENTRIES]) -> Result<(), Unreadable> {
            let frame = usize::try_from(at.0 / PAGE).ok().and_then(|frame| self.0.get(frame));
            *words = *frame.ok_or(Unreadable::OutsideRam(at))?;
            Ok(())
        }
    }

    fn frames(entries: &[(usize, usize, u64)]) -> Frames {
        let mut frames = Frames(vec![[0; ENTRIES]; FRAMES]);
        entries.iter().for_each(|(frame, index, word)| frames.0[*frame][*index] = *word);
        frames
    }

    fn all(frames: &Frames, levels: Levels) -> (Vec<Mapped>, Visited<Unreadable>) {
        let mut mapped = Vec::new();
        let visited = visit(frames, &Paging::assumed(PAGE, levels), |one| {
            mapped.push(*one);
            ControlFlow::Continue(())
        });
        (mapped, visited)
    }

    #[test]
    fn pages_of_all_sizes_are_shown_in_the_order_of_addresses() {
        let frames = frames(&[
            (1, 0, 0x2007),
            (1, 511, 0x2003),
            (2, 0, 0x3007),
            (2, 1, 0x4000_0083),
            (3, 5, 0x20_0087),
            (3, 6, 0x4007),
            (4, 7, 0x9005),
        ]);
        let (mapped, visited) = all(&frames, Levels::Four);
        let shown: Vec<_> = mapped.iter().map(|one| (one.gva, one.gpa.0, one.shift)).collect();
        assert_eq!(
            shown,
            [(5 << 21, 0x20_0000, 21), ((6 << 21) + (7 << 12), 0x9000, 12), (1 << 30, 0x4000_0000, 30)]
        );
        assert!(!mapped[1].permissions.contains(Permissions::WRITE));
        // The upper half names the same table, which was shown already.
        assert_eq!((visited.tables, visited.aliases, visited.wrong), (4, 1, 0));
    }

    #[test]
    fn what_is_wrong_is_told_with_level_and_entry_and_the_rest_is_shown() {
        let frames = frames(&[
            (1, 3, 0x1003),
            (1, 4, 0x2003),
            (2, 0, 0x2003),
            (2, 3, 0x1003),
            (2, 1, 0x99_0000_0003),
            (2, 2, 0x2083),
            (2, 9, 0x83),
        ]);
        let (mapped, visited) = all(&frames, Levels::Four);
        // The root's own entry for itself is none of them.
        assert_eq!((mapped.len(), visited.wrong, visited.self_maps), (1, 4, 1));
        let beyond = Unreadable::OutsideRam(Gpa(0x99_0000_0000));
        let expected = [
            Wrong::Loop { level: Level(3), at: Gpa(0x2000), again: Level(3) },
            Wrong::Table { level: Level(3), at: Gpa(0x2008), error: beyond },
            Wrong::Malformed { level: Level(3), at: Gpa(0x2010), reason: Malformed::Reserved(0x2000) },
            Wrong::Loop { level: Level(3), at: Gpa(0x2018), again: Level(4) },
        ];
        assert_eq!(visited.wrongs, expected);
        assert_eq!(
            visited.wrongs[3].to_string(),
            "the entry of level 3 at gpa:0x2018 names a table of level 4 on the way to itself"
        );
    }

    #[test]
    fn a_few_tables_that_map_everything_are_gone_through_once() {
        // Each entry of each table names the next table: 2^45 pages in four frames.
        let mut frames = frames(&[]);
        for frame in 1..5 {
            frames.0[frame] = [((frame as u64 + 1) * PAGE) | 3; ENTRIES];
        }
        let (mapped, visited) = all(&frames, Levels::Four);
        assert_eq!((mapped.len(), visited.tables, visited.aliases), (512, 4, 3 * 511));
    }

    #[test]
    fn a_visit_ends_when_whoever_is_shown_pages_has_enough() {
        let frames = frames(&[(1, 0, 0x2003), (2, 0, 0x83), (2, 1, 0x83), (1, 1, 0x3003)]);
        let mut shown = 0;
        let visited = visit(&frames, &Paging::assumed(PAGE, Levels::Four), |_| {
            shown += 1;
            ControlFlow::Break(())
        });
        assert_eq!((shown, visited.tables), (1, 2));
    }

    #[test]
    fn tables_outside_of_ram_are_not_remembered() {
        let mut frames = frames(&[(1, 0, 0x2003), (1, 1, 0x3003)]);
        for (place, frame) in [(0, 2), (1, 3)] {
            frames.0[frame] =
                std::array::from_fn(|index| ((1 << 30) + (place * 512 + index as u64) * PAGE) | 3);
        }
        let paging = Paging::assumed(PAGE, Levels::Four);
        let mut show = |_: &Mapped| ControlFlow::Continue(());
        let visit = Visit::<Long4, _>::all(&frames, &paging, &mut show);
        assert_eq!((visit.found.wrong, visit.entered.len()), (1024, 3));
    }

    fn word() -> impl Strategy<Value = u64> {
        let table = (0..FRAMES as u64 + 1, 0..4096u64).prop_map(|(frame, flags)| (frame * PAGE) | flags | 1);
        prop_oneof![4 => table, 1 => any::<u64>()]
    }

    proptest! {
        #![proptest_config(proptest::test_runner::Config::with_cases(64))]
        #[test]
        fn hostile_tables_are_entered_at_most_once_at_each_level(
            words in proptest::collection::vec(word(), FRAMES * ENTRIES),
        ) {
            let frames = Frames(words.chunks(ENTRIES).map(|words| words.try_into().unwrap()).collect());
            for (levels, count) in [(Levels::Four, 4), (Levels::Five, 5)] {
                let (mapped, visited) = all(&frames, levels);
                assert!(visited.tables <= count * FRAMES as u64);
                assert!(mapped.len() <= ENTRIES * usize::try_from(visited.tables).unwrap());
                let mut show = |_: &Mapped| ControlFlow::Continue(());
                let entered = match levels {
                    Levels::Four => Visit::<Long4, _>::all(&frames, &Paging::assumed(PAGE, levels), &mut show).entered,
                    Levels::Five => Visit::<Long5, _>::all(&frames, &Paging::assumed(PAGE, levels), &mut show).entered,
                };
                assert_eq!(entered.len() as u64, visited.tables);
            }
        }
    }
}
