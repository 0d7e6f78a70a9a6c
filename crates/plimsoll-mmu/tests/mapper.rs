//! The mapper against a map of pages, in real formats and in one that nobody builds.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram};
use plimsoll_mmu::format::arm::{self, Lower, Second, Upper};
use plimsoll_mmu::format::ept::{self, Ept};
use plimsoll_mmu::format::riscv::{self, Sv39, Sv39x4};
use plimsoll_mmu::format::vtd::{self, Second3, Second5};
use plimsoll_mmu::format::x86::{self, Long4};
use plimsoll_mmu::mapper::{Clear, Translation};
use plimsoll_mmu::nested::Counted;
use plimsoll_mmu::{
    Cache, Entry, Extension, Feature, Format, GuestPat, Input, Invalidate, Leaf, Level, MapError, Mapper,
    Memory, NothingCached, Output, Permissions, Pools, Shareability, Span, Table, TableFrames, TableMemory,
    Unencodable,
};
use proptest::prelude::*;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// Pages of 256 bytes, tables of 8 entries, a root of 16, three levels. Bit 0: present; bit 1: a table; bit 2: writable;
/// bit 3: accessed; bit 4: dirty; from bit 8 on the address.
#[derive(Clone, Copy, Debug)]
struct Odd;

impl Format for Odd {
    type Caps = ();
    const NAME: &'static str = "odd";
    const LEVELS: u8 = 3;
    const PAGE_SHIFT: u32 = 8;
    const INDEX_BITS: u32 = 3;
    const ROOT_BITS: u32 = 4;
    const EXTENSION: Extension = Extension::Zero;

    fn decode(raw: u64, level: Level, (): &()) -> Entry {
        let mut permissions = Permissions::all();
        permissions.set(Permissions::WRITE, raw & 4 != 0);
        let (at, memory) = (Output(raw & !0xff), Memory::Physical);
        match raw & 3 {
            1 => Entry::Leaf(Leaf {
                accessed: raw & 8 != 0,
                dirty: raw & 16 != 0,
                ..Leaf::new(at, Self::shift(level), permissions, memory)
            }),
            3 => Entry::Table(Table::new(at, permissions, memory)),
            _ => Entry::Absent { software: raw },
        }
    }

    fn encode(entry: &Entry, level: Level, (): &()) -> Result<u64, Unencodable> {
        let writable =
            |permissions: Permissions| if permissions.contains(Permissions::WRITE) { 4 } else { 0 };
        match entry {
            Entry::Leaf(leaf) if leaf.output.0.is_multiple_of(1 << Self::shift(level)) => Ok(leaf.output.0
                | 1
                | writable(leaf.permissions)
                | u64::from(leaf.accessed) << 3
                | u64::from(leaf.dirty) << 4),
            Entry::Leaf(leaf) => Err(Unencodable::Address(leaf.output)),
            Entry::Table(table) => Ok(table.at.0 | 3 | writable(table.permissions)),
            Entry::Absent { software } => Ok(*software),
            Entry::Malformed(_) => Err(Unencodable::Kind),
        }
    }

    fn largest_leaf((): &()) -> Level {
        Level(2)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Map { first: u64, pages: u64, output: u64 },
    Unmap { first: u64, pages: u64 },
    Protect { first: u64, pages: u64 },
    Split { first: u64, pages: u64 },
    Merge { first: u64, pages: u64 },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    // Around the sizes of tables, so that ends fall on both sides of every boundary.
    let number = || prop_oneof![0..1100u64, Just(512), Just(511), Just(64), (0..3u64).prop_map(|n| n * 512)];
    let op = (0..8u8, number(), number(), number()).prop_map(|(kind, first, pages, output)| {
        let pages = pages + 1;
        match kind {
            0..=2 => Op::Map { first, pages, output },
            3 | 4 => Op::Unmap { first, pages },
            5 => Op::Protect { first, pages },
            6 => Op::Split { first, pages },
            _ => Op::Merge { first, pages },
        }
    });
    proptest::collection::vec(op, 1..12)
}

const ROOT: u64 = 0x40_0000;
const FRAMES: u64 = 0x80_0000;
const BASE: u64 = 0x1000_0000;
const OPEN: Permissions = Permissions::all();
const CLOSED: Permissions = Permissions::all().difference(Permissions::WRITE);
const FIRST_STAGE: Memory = Memory::Mair(0, Shareability::Inner);

fn pools<const N: usize>() -> Pools<N> {
    common::pools(FRAMES, 0x4000)
}

/// Runs `ops` from the page at `start` on, with `N` frames a level, and compares with a map of pages after each.
fn against_a_map<F: Format, const N: usize>(
    caps: F::Caps,
    memory: Memory,
    start: u64,
    pages: u64,
    ops: &[Op],
) {
    let page = 1u64 << F::PAGE_SHIFT;
    let span = |first: u64, count: u64| {
        let first = first.min(pages - 1);
        let count = count.min(pages - first);
        (first, count, Span::new(Input(start + first * page), count * page).expect("fits"))
    };
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), pools::<N>(), NothingCached);
    let mut model: BTreeMap<u64, (u64, Permissions)> = BTreeMap::new();
    for op in ops {
        let before = ram.image();
        let mut mapper =
            Mapper::<F, _, _, _>::new(Output(ROOT), caps, &ram, &mut frames, &mut caches).expect("aligned");
        let result = match *op {
            Op::Map { first, pages, output } => {
                let (first, count, span) = span(first, pages);
                let output = BASE + output * page;
                let result = mapper.map(span, Leaf::new(Output(output), 30, OPEN, memory));
                if result.is_ok() {
                    for number in 0..count {
                        let old = model.insert(first + number, (output + number * page, OPEN));
                        assert_eq!(old, None, "nothing is mapped over");
                    }
                } else if let Err(MapError::Mapped { wanted, there }) = result {
                    let (number, _) = model.range(first..first + count).next().expect("something is mapped");
                    let mapped = Input(start + number * page);
                    assert_eq!(
                        (wanted, wanted.first().max(there.first())),
                        (span, mapped),
                        "the first such page"
                    );
                    assert!(mapped <= there.last(), "{there} has it");
                }
                result
            }
            Op::Unmap { first, pages } => {
                let (first, count, span) = span(first, pages);
                mapper.unmap(span).map(|_| model.retain(|number, _| !(first..first + count).contains(number)))
            }
            Op::Protect { first, pages } => {
                let (first, count, span) = span(first, pages);
                mapper.protect(span, CLOSED).map(|_| {
                    model.range_mut(first..first + count).for_each(|(_, mapped)| mapped.1 = CLOSED);
                })
            }
            Op::Split { first, pages } => mapper.split(span(first, pages).2, Level::PAGES).map(|_| ()),
            Op::Merge { first, pages } => mapper.merge(span(first, pages).2).map(|_| ()),
        };
        match result {
            Ok(()) => {}
            Err(MapError::Exhausted { .. } | MapError::Mapped { .. }) => {
                assert_eq!(ram.image(), before, "{op:?}")
            }
            Err(error) => panic!("{op:?}: {error}"),
        }
        let mut found = BTreeMap::new();
        mapper
            .for_each(span(0, pages).2, |mapping| {
                let first = (mapping.input.0 - start) / page;
                for number in 0..1 << (F::shift(mapping.level) - F::PAGE_SHIFT) {
                    found
                        .insert(first + number, (mapping.leaf.output.0 + number * page, mapping.permissions));
                }
            })
            .expect("well-formed");
        assert_eq!(found, model, "{} after {op:?}", F::NAME);
        against_a_part_of_the_map(&mapper, (start, span(pages / 3, pages / 2).2), &model);
        for number in [0, 1, 63, 511, 512, 1099].map(|number: u64| number.min(pages - 1)) {
            let walked = mapper.walk(Input(start + number * page + 5)).expect("well-formed");
            let output = if let Translation::Mapped(output, _) = walked { Some(output.0 - 5) } else { None };
            assert_eq!(output, model.get(&number).map(|mapped| mapped.0));
        }
    }
    let mut mapper =
        Mapper::<F, _, _, _>::new(Output(ROOT), caps, &ram, &mut frames, &mut caches).expect("aligned");
    if mapper.unmap(span(0, pages).2).is_ok() {
        assert_eq!(ram.image(), BTreeMap::new(), "every table is zero again");
        for level in (1..=3).map(Level) {
            assert_eq!(frames.left(level), N, "every frame is back, {level}");
        }
    }
}

/// A part of the range, which may begin and end inside of a leaf, by the leaves' words.
fn against_a_part_of_the_map<F: Format, P: TableFrames, I: Invalidate>(
    mapper: &Mapper<'_, F, Ram, P, I>,
    (start, part): (u64, Span),
    model: &BTreeMap<u64, (u64, Permissions)>,
) {
    let page = 1u64 << F::PAGE_SHIFT;
    let number = |input: Input| (input.0 - start) / page;
    let mut found = BTreeMap::new();
    let shown = mapper.translate_range(part, |input, seen| {
        assert_eq!(mapper.translate(input), Ok(Some(*seen)));
        for within in 0..1 << (F::shift(seen.level) - F::PAGE_SHIFT) {
            found.insert(number(input) + within, (seen.output.0 + within * page, seen.permissions));
        }
    });
    assert_eq!(shown, Ok(()));
    let numbers = number(part.first())..=number(part.last());
    found.retain(|number, _| numbers.contains(number));
    assert!(found.iter().eq(model.range(numbers)), "{}: {found:x?}", F::NAME);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_format_does_what_a_map_of_pages_does(ops in ops()) {
        let high = 0xffff_ffff_c000_0000;
        let wb = Memory::Ept(Cache::WriteBack, GuestPat::Combined);
        against_a_map::<Long4, 16>(x86::Caps::FULL, Memory::Pat(0), high, 1500, &ops);
        against_a_map::<Ept, 16>(ept::Caps::FULL, wb, 0x7f_ffe0_0000, 1500, &ops);
        against_a_map::<Sv39, 16>(riscv::Caps::FULL, Memory::Physical, 0x3fe0_0000, 1500, &ops);
        let (first, second) = (FIRST_STAGE, Memory::MemAttr(15, Shareability::Inner));
        against_a_map::<Upper<12, 48>, 16>(arm::Caps::FULL, first, 0xffff_ffff_c000_0000, 1500, &ops);
        against_a_map::<Lower<14, 47>, 16>(arm::Caps::FULL, first, 0x1e00_0000, 3000, &ops);
        against_a_map::<Second<12, 40>, 16>(arm::Caps::FULL, second, 0x3fe0_0000, 1500, &ops);
        against_a_map::<Second5, 16>(vtd::Caps::FULL, Memory::Snooped, 0xff_ffff_ffe0_0000, 1500, &ops);
        against_a_map::<Odd, 200>((), Memory::Physical, 0, 1024, &ops);
    }

    #[test]
    fn what_lacks_a_frame_changes_nothing(ops in ops()) {
        against_a_map::<Long4, 2>(x86::Caps::FULL, Memory::Pat(0), 0x7fff_ffe0_0000, 512, &ops);
        against_a_map::<Sv39x4, 1>(riscv::Caps::FULL, Memory::Physical, 0x3fe0_0000, 1500, &ops);
        against_a_map::<Second3, 2>(vtd::Caps::FULL, Memory::Physical, 0x3fe0_0000, 1500, &ops);
        against_a_map::<Odd, 5>((), Memory::Physical, 0, 1024, &ops);
    }
}

#[test]
fn a_merge_and_a_split_keep_accessed_and_dirty_and_a_harvest_clears_them_once() {
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), pools::<8>(), NothingCached);
    let mut mapper =
        Mapper::<Long4, _, _, _>::new(Output(ROOT), x86::Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    let block = Span::new(Input(0x20_0000), 0x20_0000).expect("fits");
    mapper.map(block, Leaf::new(Output(0x4000_0000), 12, OPEN, Memory::Pat(0))).expect("free");
    // One page of 512 was written.
    let Translation::Mapped(_, page) = mapper.walk(Input(0x20_5000)).expect("mapped") else {
        panic!("mapped")
    };
    assert_eq!(page.level, Level(1));
    let at = ram
        .image()
        .into_iter()
        .find(|(_, word)| word & 0xf_ffff_ffff_f000 == 0x4000_5000)
        .expect("its entry")
        .0;
    ram.set(at, ram.get(at) | 3 << 5);
    assert_eq!(mapper.merge(block), Ok(1));
    let mut seen = Vec::new();
    mapper
        .harvest(block, Clear::Accessed, |touched| seen.push((touched.leaf.shift, touched.leaf.dirty)))
        .expect("fine");
    assert_eq!(seen, [(21, true)]);
    assert_eq!(mapper.split(block, Level::PAGES), Ok(1));
    let (mut dirty, mut accessed) = (0, 0);
    mapper.harvest(block, Clear::Accessed, |_| accessed += 1).expect("fine");
    mapper.harvest(block, Clear::Dirty, |_| dirty += 1).expect("fine");
    mapper.harvest(block, Clear::Both, |_| dirty += 1).expect("fine");
    assert_eq!((accessed, dirty), (0, 512), "each part of a dirty page is dirty, once");
}

#[test]
fn a_range_is_mapped_with_one_access_to_each_entry_and_unmapped_with_one_more_a_table() {
    let ram = Ram::new(1 << 40);
    let counted = Counted::new(&ram);
    let (mut frames, mut caches) = (pools::<8>(), NothingCached);
    let mut mapper =
        Mapper::<Long4, _, _, _>::new(Output(ROOT), x86::Caps::FULL, &counted, &mut frames, &mut caches)
            .expect("aligned");
    let span = Span::new(Input(0), 0x20_0000).expect("fits");
    mapper.map(span, Leaf::new(Output(0x4000_0000), 12, OPEN, Memory::Pat(0))).expect("free");
    assert_eq!(counted.exchanges(), 512 + 3);
    // The check reads the root's entry, and filling reads each entry that names a table. Those of pages are exchanged only.
    assert_eq!(counted.reads(), 1 + 3);
    let before = (counted.reads(), counted.exchanges());
    let mut pages = 0;
    mapper.translate_range(span, |_, _| pages += 1).expect("well-formed");
    assert_eq!((pages, counted.reads() - before.0, counted.exchanges()), (512, 512 + 3, before.1));
    let before = (counted.reads(), counted.exchanges());
    assert_eq!(mapper.unmap(span), Ok(512));
    let (reads, exchanges) = (counted.reads() - before.0, counted.exchanges() - before.1);
    // Each entry once, and three more for the tables that go; their first words are the list of what is dropped.
    assert!(exchanges <= 512 + 3 * 3, "{exchanges}");
    // The tables above are read to see that they are empty, but for what has just been cleared.
    assert!(reads <= 3 * 511 + 32, "{reads}");
}

#[test]
fn a_table_that_names_itself_is_gone_through_once_a_level_and_that_is_the_end() {
    let ram = Ram::new(1 << 40);
    (0..512).for_each(|index| ram.set(ROOT + index * 8, ROOT | 0x67));
    let counted = Counted::new(&ram);
    let (mut frames, mut caches) = (pools::<1>(), NothingCached);
    let mapper =
        Mapper::<Long4, _, _, _>::new(Output(ROOT), x86::Caps::FULL, &counted, &mut frames, &mut caches)
            .expect("aligned");
    let mut seen = 0;
    // From the middle of one table of the lowest level to the middle of the next.
    let span = Span::new(Input(0x7f10_0000), 0x20_0000).expect("fits");
    let shown = mapper.translate_range(span, |_, found| {
        assert_eq!((found.output, found.level), (Output(ROOT), Level::PAGES));
        seen += 1;
    });
    assert_eq!((shown, seen, counted.reads()), (Ok(()), 512, 512 + 2 + 1 + 1));
}

#[test]
fn sixteen_pages_as_one_come_apart_when_a_part_is_changed() {
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), pools::<8>(), NothingCached);
    let leaf = Leaf::new(Output(0x4001_0000), 16, OPEN, Memory::Physical);
    let word = Sv39::encode(&Entry::Leaf(leaf), Level(1), &riscv::Caps::FULL).expect("Svnapot");
    ram.set(ROOT, 0x50_0000 >> 2 | 1);
    ram.set(0x50_0000, 0x60_0000 >> 2 | 1);
    (16..32).for_each(|index| ram.set(0x60_0000 + index * 8, word));
    let mut mapper =
        Mapper::<Sv39, _, _, _>::new(Output(ROOT), riscv::Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    let walk = |mapper: &Mapper<'_, Sv39, _, _, _>, at| match mapper.walk(Input(at)) {
        Ok(Translation::Mapped(output, mapping)) => Some((output.0, mapping.leaf.shift)),
        _ => None,
    };
    assert_eq!(walk(&mapper, 0x1_3456), Some((0x4001_3456, 16)));
    assert_eq!(mapper.unmap(Span::new(Input(0x1_4000), 0x1000).expect("fits")), Ok(1));
    assert_eq!(walk(&mapper, 0x1_3456), Some((0x4001_3456, 12)));
    assert_eq!(walk(&mapper, 0x1_4000), None);
    assert_eq!(walk(&mapper, 0x1_5000), Some((0x4001_5000, 12)));
}

#[test]
fn ranges_that_are_not_translated_and_tables_that_are_not_there_are_errors() {
    let (ram, mut frames, mut caches) = (Ram::new(1 << 24), pools::<8>(), NothingCached);
    ram.set(ROOT, 0x1_0000_0000 | 7);
    assert!(
        Mapper::<Long4, _, _, _>::new(Output(8), x86::Caps::FULL, &ram, &mut frames, &mut caches).is_err()
    );
    let mut mapper =
        Mapper::<Long4, _, _, _>::new(Output(ROOT), x86::Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    for (first, bytes) in [(1, 0x1000), (0, 0x1001), (1 << 47, 0x1000)] {
        let span = Span::new(Input(first), bytes).expect("fits");
        assert_eq!(mapper.unmap(span), Err(MapError::Span(span)));
    }
    let error = mapper.unmap(Span::new(Input(0), 0x1000).expect("fits"));
    let at = Output(0x1_0000_0000);
    assert_eq!(error, Err(MapError::Memory { level: Level(3), at, error: Outside(at) }));
}

/// Memory and caches of a processor that must see an entry absent, and forget it, before it says another thing.
#[derive(Default)]
struct Broken {
    /// Entries that became absent and are not forgotten yet.
    since: RefCell<BTreeSet<u64>>,
    breaks: Cell<usize>,
}

struct Watched<'a> {
    ram: &'a Ram,
    broken: &'a Broken,
}

impl TableMemory for Watched<'_> {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.ram.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        // What may change in a valid entry: AP, AF, DBM, XN and software's bits (DDI 0487, D8.16.1).
        let free = 3 << 6 | 1 << 10 | 1 << 51 | 3 << 53 | 0xf << 55;
        let mut since = self.broken.since.borrow_mut();
        match (current & 1, new & 1) {
            (1, 1) => assert_eq!((current ^ new) & !free, 0, "{current:#x} to {new:#x} at {at}"),
            (1, 0) => {
                since.insert(at.0);
                self.broken.breaks.set(self.broken.breaks.get() + 1);
            }
            (0, 1) => assert!(!since.contains(&at.0), "{at} was not forgotten"),
            _ => {}
        }
        self.ram.compare_exchange(at, current, new)
    }
}

impl Invalidate for &Broken {
    fn invalidate(&mut self, _: Span) {
        self.since.borrow_mut().clear();
    }
}

#[test]
fn arm_breaks_an_entry_before_it_makes_another_of_it() {
    let (ram, broken) = (Ram::new(1 << 40), Broken::default());
    let (watched, mut caches, mut frames) = (Watched { ram: &ram, broken: &broken }, &broken, pools::<8>());
    let mut mapper = Mapper::<Second<12, 40>, _, _, _>::new(
        Output(ROOT),
        arm::Caps::FULL,
        &watched,
        &mut frames,
        &mut caches,
    )
    .expect("aligned");
    let leaf = Leaf::new(Output(0x4000_0000), 21, OPEN, Memory::MemAttr(15, Shareability::Inner));
    let span = |first: u64, bytes: u64| Span::new(Input(first), bytes).expect("fits");
    let block = span(0x20_0000, 0x20_0000);
    mapper.map(span(0x20_0000, 0x40_0000), leaf).expect("free");
    assert_eq!(mapper.protect(span(0x20_0000, 0x1000), CLOSED), Ok(1));
    assert_eq!(broken.breaks.get(), 1, "the block was broken for a table");
    assert_eq!(mapper.protect(block, OPEN), Ok(512));
    assert_eq!(mapper.merge(block), Ok(1));
    assert_eq!(broken.breaks.get(), 2 + 512, "the table was broken for a block, and its entries are gone");
    // The table is nobody's now: what was in it was forgotten with the entry that named it.
    broken.since.borrow_mut().clear();
    // Sixteen pages as one, as another's tables may have them: one of them is changed, all are broken.
    assert_eq!(mapper.split(block, Level::PAGES), Ok(1));
    let at = |page: u64| {
        let wanted = 0x4000_0000 + page * 0x1000;
        let mut words = ram.image().into_iter();
        words.find(|(_, word)| word & 0xffff_ffff_f003 == wanted | 3).expect("its entry").0
    };
    for page in 16..32 {
        ram.set(at(page), ram.get(at(page)) | 1 << 52);
    }
    let before = broken.breaks.get();
    assert_eq!(mapper.protect(span(0x20_0000 + 20 * 0x1000, 0x1000), CLOSED), Ok(1));
    assert_eq!(broken.breaks.get() - before, 16);
    for page in 16..32 {
        let walked = mapper.walk(Input(0x20_0000 + page * 0x1000)).expect("well-formed");
        let Translation::Mapped(output, mapping) = walked else { panic!("page {page}") };
        assert_eq!((output.0, mapping.leaf.shift), (0x4000_0000 + page * 0x1000, 12));
        assert_eq!(mapping.permissions == CLOSED, page == 20);
    }
    // With FEAT_BBM nothing is absent in between.
    let direct = arm::Caps { direct_resize: Feature::On, ..arm::Caps::FULL };
    assert!(!<Second<12, 40> as Format>::break_before_make(&direct));
}

#[test]
fn a_root_smaller_than_a_group_has_none_and_nothing_beyond_it_is_touched() {
    fn protect<F: Format<Caps = arm::Caps>>(first: u64) {
        let (ram, broken) = (Ram::new(1 << 40), Broken::default());
        let watched = Watched { ram: &ram, broken: &broken };
        let (mut caches, mut frames) = (&broken, pools::<8>());
        let leaf = |number: u64| {
            let leaf = Leaf { accessed: true, ..Leaf::new(Output(number << 30), 30, OPEN, FIRST_STAGE) };
            F::encode(&Entry::Leaf(leaf), F::root(), &arm::Caps::FULL).expect("a block") | 1 << 52
        };
        // Two entries of 1 GiB, each with the hint, and behind them somebody else's words that look like fourteen more.
        (0..16).for_each(|index| ram.set(ROOT + index * 8, leaf(16 + index)));
        let beyond = |ram: &Ram| (2..16).map(|index| ram.get(ROOT + index * 8)).collect::<Vec<_>>();
        let before = beyond(&ram);
        let mut mapper =
            Mapper::<F, _, _, _>::new(Output(ROOT), arm::Caps::FULL, &watched, &mut frames, &mut caches)
                .expect("aligned");
        let walk = |mapper: &Mapper<'_, F, _, _, _>, at: u64| match mapper.walk(Input(first + at)) {
            Ok(Translation::Mapped(output, mapping)) => {
                Some((output.0, mapping.leaf.shift, mapping.permissions == CLOSED))
            }
            _ => None,
        };
        assert_eq!(walk(&mapper, 0x4000_5000), Some((0x4_4000_5000, 30, false)), "each is a block by itself");
        assert_eq!(mapper.protect(Span::new(Input(first), 1 << 30).expect("fits"), CLOSED), Ok(1));
        assert_eq!(broken.breaks.get(), 0, "there is no group to be taken apart");
        assert_eq!(
            mapper.protect(Span::new(Input(first + 0x4000_5000), 0x1000).expect("fits"), CLOSED),
            Ok(1)
        );
        assert_eq!(walk(&mapper, 5), Some((0x4_0000_0005, 30, true)));
        assert_eq!(
            walk(&mapper, 0x4000_4000),
            Some((0x4_4000_4000, 12, false)),
            "nor is the block's page in one"
        );
        assert_eq!(walk(&mapper, 0x4000_5000), Some((0x4_4000_5000, 12, true)));
        assert_eq!(beyond(&ram), before, "{}", F::NAME);
    }
    protect::<Lower<12, 31>>(0);
    protect::<Upper<12, 31>>(0xffff_ffff_8000_0000);
}
