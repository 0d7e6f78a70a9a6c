//! All that a guest maps: a visit ends, and shows what a walk finds.
use super::{Everywhere, words_of};
use plimsoll_inspect::{Levels, Paging, Tables, trace, visit};
use plimsoll_mmu::{Output, TableMemory};
use plimsoll_types::Gpa;
use std::cell::Cell;
use std::fmt;
use std::ops::ControlFlow;

/// Frames of the guest's RAM.
const FRAMES: u64 = 16;
/// Pages whose way is gone again.
const LOOKED_AT: usize = 8;

/// An address beyond RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Beyond;

impl fmt::Display for Beyond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("beyond RAM")
    }
}

struct Ram {
    words: Everywhere,
    tables: Cell<u64>,
}

impl Tables for Ram {
    type Error = Beyond;

    fn table(&self, at: Gpa, words: &mut [u64; 512]) -> Result<(), Beyond> {
        assert!(at.0.is_multiple_of(4096));
        if at.0 / 4096 >= FRAMES {
            return Err(Beyond);
        }
        self.tables.set(self.tables.get() + 1);
        (at.0..).step_by(8).zip(words).for_each(|(at, word)| *word = self.words.at(at));
        Ok(())
    }
}

impl TableMemory for Ram {
    type Error = Beyond;

    fn read(&self, at: Output) -> Result<u64, Beyond> {
        if at.0 / 4096 < FRAMES { Ok(self.words.at(at.0)) } else { Err(Beyond) }
    }

    fn compare_exchange(&self, at: Output, _: u64, _: u64) -> Result<u64, Beyond> {
        panic!("a look at tables has written at {at}");
    }
}

/// Reads one word for CR3, and memory.
pub(crate) fn read(bytes: &[u8]) -> bool {
    let mut words = words_of(bytes);
    if words.is_empty() {
        return false;
    }
    let Some(memory) = Everywhere::new(words.split_off(1)) else { return false };
    let ram = Ram { words: memory, tables: Cell::new(0) };
    let levels = if words[0] & 1 == 0 { Levels::Four } else { Levels::Five };
    let (most, paging) = (if levels == Levels::Four { 4 } else { 5 }, Paging::assumed(words[0], levels));
    let (mut shown, mut some) = (0_u64, Vec::new());
    let visited = visit(&ram, &paging, |mapped| {
        shown += 1;
        if some.len() < LOOKED_AT {
            some.push(*mapped);
        }
        ControlFlow::Continue(())
    });
    // Each table once at each level: that is what bounds a visit.
    assert_eq!(visited.tables, ram.tables.get());
    assert!(visited.tables <= FRAMES * most, "{visited:?}");
    assert!(shown <= visited.tables * 512);
    assert!(visited.wrongs.len() as u64 <= visited.wrong);
    for mapped in &some {
        assert!(
            mapped.gva.is_multiple_of(1 << mapped.shift) && mapped.gpa.0.is_multiple_of(1 << mapped.shift)
        );
        let reached = trace(&ram, &paging, mapped.gva).end;
        let found = reached.as_ref().map(|reached| (reached.gpa, reached.shift, reached.permissions));
        assert_eq!(found, Ok((mapped.gpa, mapped.shift, mapped.permissions)), "{mapped:?}");
    }
    shown > 0
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    // One word everywhere: from the root on a table of itself, or large pages.
    let all = |cr3: u64, words: &[u64]| {
        let words = std::iter::once(cr3).chain(words.iter().copied());
        words.flat_map(u64::to_le_bytes).collect::<Vec<u8>>()
    };
    // Sixteen frames, each of whose tables is the next one, at last pages.
    let mut frames = vec![0_u64; 512 * 5];
    for (table, at) in (0..4_u64).zip((0..).step_by(512)) {
        frames[at] = (table + 2) << 12 | 7;
        frames[at + 511] = 0x20_0000 | 0xe7;
    }
    frames[512 * 4..].fill(0x7027);
    vec![all(0x1000, &frames), all(0x1001, &[&[0; 512][..], &frames].concat())]
}
