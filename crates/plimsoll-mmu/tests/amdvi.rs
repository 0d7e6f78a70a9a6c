//! AMD-Vi's host tables: words back and forth, sizes and levels, walks against a model written from the specification, and the mapper
//! against a map of pages where levels are left out.
mod common;

use common::{Ram, pools, random};
use plimsoll_mmu::amdvi::{self, BadDevice, Device, Event, Fault, Flags, Translation};
use plimsoll_mmu::format::amdvi::{Caps, Host, Keeps};
use plimsoll_mmu::mapper;
use plimsoll_mmu::vtd::Request;
use plimsoll_mmu::{
    Entry, Format, Input, Leaf, Level, Malformed, MapError, Mapper, Marks, Memory, NothingCached, Output,
    Permissions, Pools, Span, Table, TableFrames, Unencodable,
};
use proptest::prelude::*;
use std::collections::BTreeMap;

const PR: u64 = 1;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const U: u64 = 1 << 59;
const FC: u64 = 1 << 60;
const IR: u64 = 1 << 61;
const IW: u64 = 1 << 62;
const OPEN: Permissions = Permissions::all();
const CLOSED: Permissions = Permissions::all().difference(Permissions::WRITE);
const WEAK: Caps = Caps { physical_bits: 40, keeps: Keeps::Nothing };
const SOME: Caps = Caps { physical_bits: 48, keeps: Keeps::Accessed };
const REQUESTS: [Request; 3] = [Request::Read, Request::Write, Request::Atomic];

const fn next_level(level: u64) -> u64 {
    level << 9
}

fn round_trip_everywhere(raw: u64) {
    for caps in [Caps::FULL, SOME, WEAK] {
        for level in (1..=5).map(Level) {
            let entry = Host::<5>::decode(raw, level, &caps);
            match Host::<5>::encode(&entry, level, &caps) {
                Ok(word) => assert_eq!(word, raw, "{level} {entry:?}"),
                Err(Unencodable::Kind) => assert!(matches!(entry, Entry::Malformed(_)), "{level} {entry:?}"),
                Err(error) => panic!("{level} {raw:#x} {entry:?}: {error}"),
            }
        }
    }
}

#[test]
fn every_combination_of_the_low_and_of_the_high_bits_reads_and_writes_back() {
    for low in 0..1 << 13 {
        for others in [0, IR | IW, 1 << 63, FC | U, 0x7f << 52, 1 << 51, 1 << 40, 1 << 30, 1 << 21] {
            round_trip_everywhere(others | low);
        }
    }
    for high in 0..1 << 12 {
        for low in [0, PR, PR | A | D, PR | next_level(1), PR | next_level(7), PR | next_level(7) | 0xf_f000]
        {
            round_trip_everywhere(high << 52 | low);
        }
    }
}

proptest! {
    #[test]
    fn every_word_reads_and_writes_back(raw: u64) {
        round_trip_everywhere(raw);
        round_trip_everywhere(raw | PR);
    }
}

#[test]
fn a_page_of_every_power_of_two_has_one_level_and_one_word() {
    for shift in 12..=52 {
        let leaf = Leaf::new(Output(0), shift, OPEN, Memory::Physical);
        let words = (1..=5).map(Level).filter_map(|level| {
            let word = Host::<5>::encode(&Entry::Leaf(leaf), level, &Caps::FULL).ok()?;
            assert_eq!(Host::<5>::decode(word, level, &Caps::FULL), Entry::Leaf(leaf));
            Some((level.0, word))
        });
        let found: Vec<_> = words.collect();
        let level = (shift - 12) / 9 + 1;
        let expected = match (shift - 12) % 9 {
            0 => PR | IR | IW,
            // 2.2.3, example page size encodings: 8 KiB has bit 12 clear, 16 KiB bit 13 above a one, and so on.
            _ => PR | IR | IW | next_level(7) | (((1 << (shift - 1)) - 1) & !0xfff),
        };
        assert_eq!(found, [(u8::try_from(level).expect("small"), expected)], "2^{shift}");
    }
}

#[test]
fn wrong_sizes_and_levels_are_malformed_and_not_reserved_bits() {
    let decode = |word, level| Host::<5>::decode(word, Level(level), &Caps::FULL);
    let sized = |low: u64| PR | IR | next_level(7) | low;
    for (word, level, shift) in [
        (sized(0), 2, 13),
        (sized(0xf_f000), 1, 21),
        (sized(0xf_f000), 2, 21),
        (sized(0x7f_f000), 1, 24),
        (sized(0x000f_ffff_ffff_f000), 5, 53),
    ] {
        assert_eq!(decode(word, level), Entry::Malformed(Malformed::PageSize(shift)), "{word:#x}, {level}");
    }
    for level in 1..=5 {
        for next in 1..=6 {
            let entry = decode(0x5000 | PR | IR | IW | next_level(u64::from(next)), level);
            if next < level {
                assert!(
                    matches!(entry, Entry::Table(table) if table.skips == level - next - 1),
                    "{level} to {next}: {entry:?}"
                );
            } else {
                assert_eq!(entry, Entry::Malformed(Malformed::NextLevel(Level(next))));
            }
        }
    }
    let table = |skips| {
        let table = Table { skips, ..Table::new(Output(0x5000), OPEN, Memory::Physical) };
        Host::<4>::encode(&Entry::Table(table), Level(3), &Caps::FULL)
    };
    assert_eq!(table(1), Ok(0x5000 | PR | IR | IW | next_level(1)));
    assert_eq!(table(2), Err(Unencodable::Skips(2)));
    assert_eq!(decode(0x5000 | PR | IR | next_level(2) | FC, 3), Entry::Malformed(Malformed::Reserved(FC)));
    assert_eq!(
        decode(0x5000 | PR | IR | U, 1),
        Entry::Leaf(Leaf {
            software: U,
            ..Leaf::new(Output(0x5000), 12, OPEN - Permissions::WRITE, Memory::Physical)
        })
    );
}

const LIMIT: u64 = 0x10_0000;

/// Where the specification has an address go, or the flags of the event; `None` for an entry that cannot be read.
fn model(
    ram: &Ram,
    (root, levels, device): (u64, u64, u64),
    input: u64,
    request: Request,
    caps: &Caps,
) -> Result<u64, Option<u16>> {
    const NOT_PRESENT: Result<u64, Option<u16>> = Err(Some(0));
    let write = if request == Request::Read { 0 } else { 1 << 5 };
    let fault = |more: u16| Err(Some(1 << 4 | write | more));
    if input >> (12 + 9 * levels) != 0 {
        return NOT_PRESENT;
    }
    let (mut table, mut level, mut rights) = (root, levels, device & (IR | IW));
    loop {
        let shift = 12 + 9 * (level - 1);
        let at = table + (input >> shift & 511) * 8;
        if at >= LIMIT {
            return Err(None);
        }
        let word = ram.get(at);
        if word & PR == 0 {
            return NOT_PRESENT;
        }
        rights &= word;
        let next = word >> 9 & 7;
        let address = word & 0x000f_ffff_ffff_f000;
        let size = match next {
            0 => shift,
            7 => {
                let zero = (12..52).find(|bit| address >> bit & 1 == 0).unwrap_or(52);
                if zero < shift || zero + 1 >= shift + 9 || zero == 52 {
                    return fault(0);
                }
                zero + 1
            }
            next if next >= level => return fault(0),
            _ => 0,
        };
        let mut reserved = 0x7f << 52;
        for bit in u64::from(caps.physical_bits)..52 {
            // Those that say the size of a page are not the address's.
            reserved |= if bit < size && next == 7 { 0 } else { 1 << bit };
        }
        if size == 0 {
            reserved |= U | FC;
        } else if next == 0 {
            reserved |= ((1 << size) - 1) & !0xfff;
        }
        if word & reserved != 0 {
            return fault(1 << 7);
        }
        if size > 0 {
            let needs = match request {
                Request::Read => IR,
                Request::Write => IW,
                Request::Atomic => IR | IW,
            };
            let inside = (1 << size) - 1;
            return if rights & needs == needs {
                Ok((address & !inside) | (input & inside))
            } else {
                fault(1 << 6)
            };
        }
        if input & ((1 << shift) - 1) >> (12 + 9 * next) << (12 + 9 * next) != 0 {
            return fault(0);
        }
        (table, level) = (address, next);
    }
}

/// Words that lead an address through tables at 0x1000, 0x2000 and so on, mostly. Answers the address, and how often levels are left out
/// that it has no bits of.
fn a_way(next: &mut impl FnMut() -> u64, ram: &Ram, levels: u64) -> (u64, u32) {
    let mut skipped = 0;
    let mut input = match next() % 16 {
        0 => next(),
        _ => next() & ((1 << (12 + 9 * levels)) - 1),
    };
    let (mut level, mut table) = (levels, 0x1000);
    let mut route = Vec::new();
    loop {
        let below = match next() % 5 {
            0 => 1 + next() % levels,
            _ => level.saturating_sub(1),
        };
        route.push((level, table, below));
        if below == 0 || below >= level {
            break;
        }
        if level - below > 1 && !next().is_multiple_of(3) {
            // The bits of the levels left out, mostly zero.
            input &= !(((1 << (9 * (level - below - 1))) - 1) << (12 + 9 * below));
            skipped += 1;
        }
        (level, table) = (below, table + 0x1000);
    }
    for (level, table, below) in route {
        let shift = 12 + 9 * (level - 1);
        let mut word = PR
            | IR
            | IW
            | if below == 0 || below >= level {
                let sized = next().is_multiple_of(2);
                let size = shift + 1 + next() % 9;
                let base = (next() & 0xf_ffff_f000) >> size.min(63) << size.min(63);
                let code = ((1u64 << (size - 1)) - 1) & 0x000f_ffff_ffff_f000;
                if sized { base | code | next_level(7) } else { (next() & 0xf_ffff_f000) >> shift << shift }
            } else {
                (table + 0x1000) | next_level(below)
            };
        if next().is_multiple_of(8) {
            word ^= 1 << (next() % 64);
        }
        if next().is_multiple_of(8) {
            word &= !(if next().is_multiple_of(2) { IR } else { IW });
        }
        if next().is_multiple_of(40) {
            word = word & !0x000f_ffff_ffff_f000 | LIMIT;
        }
        ram.set(table + (input >> shift & 511) * 8, word);
    }
    (input, skipped)
}

fn device(words: [u64; 2]) -> Device {
    Device::decode([words[0], words[1], 0, 0]).expect("well-formed")
}

#[test]
fn walks_end_where_the_model_does_with_the_flags_of_its_events() {
    let mut next = random(0x2545_f491_4f6c_dd1d);
    let mut seen = BTreeMap::<Result<(), Option<u16>>, u32>::new();
    let mut skipped = 0;
    for _ in 0..40_000 {
        let levels = 1 + next() % 5;
        let physical_bits = [36, 40, 52, 52][usize::try_from(next() % 4).expect("small")];
        let had = [0, 1, 3][usize::try_from(next() % 3).expect("small")];
        let ram = Ram::new(LIMIT);
        let (input, left_out) = a_way(&mut next, &ram, levels);
        skipped += left_out;
        let rights = [IR | IW, IR | IW, IR, IW][usize::try_from(next() % 4).expect("small")];
        let first = 0x3 | had << 7 | levels << 9 | 0x1000 | rights;
        let device = device([first, 7]);
        let caps = Caps { physical_bits, keeps: device.keeps };
        for request in REQUESTS {
            let expected = model(&ram, (0x1000, levels, first), input, request, &caps);
            let before = ram.image();
            let walked = amdvi::translate(&ram, &device, physical_bits, Input(input), request, Marks::Leave);
            assert_eq!(ram.image(), before, "an observer leaves nothing behind");
            let said = walked.map(|reached| reached.output().0).map_err(|fault| {
                match fault.event(request).expect("it is logged") {
                    Event::PageFault { flags, input: at } => {
                        assert_eq!(at, Input(input));
                        Some(flags.bits())
                    }
                    Event::TableError { .. } => None,
                }
            });
            assert_eq!(said, expected, "{input:#x} {request:?} {device:?} {before:#x?}");
            *seen.entry(expected.map(|_| ())).or_default() += 1;
            let marked = amdvi::translate(&ram, &device, physical_bits, Input(input), request, Marks::Set);
            assert_eq!(marked, walked);
            for (at, word) in before {
                let leaf = matches!(word >> 9 & 7, 0 | 7);
                let dirty = if leaf && had == 3 && request != Request::Read { D } else { 0 };
                let marks = if walked.is_ok() && had != 0 { A | dirty } else { 0 };
                assert_eq!(ram.get(at), word | marks, "{request:?} at {at:#x}, {device:?}");
                ram.set(at, word);
            }
        }
    }
    assert!(skipped > 2_000, "levels are left out: {skipped}");
    let flag = |flags: Flags| Err(Some(flags.bits()));
    let write = Flags::PRESENT | Flags::WRITE;
    for end in [
        Ok(()),
        Err(None),
        flag(Flags::empty()),
        flag(write),
        flag(Flags::PRESENT | Flags::PERMISSION),
        flag(write | Flags::RESERVED),
    ] {
        assert!(seen.get(&end).is_some_and(|times| *times > 500), "{end:?}: {seen:?}");
    }
}

#[test]
fn a_device_table_entry_says_how_and_what_may_be_done_at_most() {
    let input = Input(0xabc_d123);
    let ram = Ram::new(LIMIT);
    let ask = |first, request| {
        amdvi::translate(&ram, &device([first, 0]), 52, input, request, Marks::Leave)
            .map(|reached| reached.output().0)
    };
    assert_eq!(ask(IR, Request::Write), Ok(input.0), "what is not valid is not translated");
    assert_eq!(ask(0x1 | IR, Request::Read), Err(Fault::Untranslated(input)));
    assert_eq!(ask(0x3 | IR, Request::Read), Ok(input.0));
    let refused = ask(0x3 | IR, Request::Write).expect_err("IW is clear");
    let event = refused.event(Request::Write).expect("it is logged");
    let expected = Flags::PRESENT | Flags::WRITE | Flags::PERMISSION;
    assert_eq!(event, Event::PageFault { flags: expected, input });
    assert_eq!(event.words(0x1234, 0x5678), [0x2070_5678_0000_1234, input.0]);

    let whole = device([0x3 | 3 << 7 | 4 << 9 | 0x9000 | IR | IW, 0xffff_0001_0000_0042 & !(1 << 42)]);
    let tables = Translation::Tables { levels: 4, root: Output(0x9000) };
    assert_eq!(
        whole,
        Device {
            translation: tables,
            permissions: OPEN,
            keeps: Keeps::AccessedAndDirty,
            domain: 0x42,
            remote: true
        }
    );
    let bad = |first, second| Device::decode([first, second, 0, 0]).expect_err("it is refused");
    assert_eq!(bad(0x3 | 1 << 4, 0), BadDevice::Reserved { word: 0, bits: 1 << 4 });
    assert_eq!(bad(0x3, 1 << 42), BadDevice::Reserved { word: 1, bits: 1 << 42 });
    assert_eq!(bad(0x3 | 7 << 9, 0), BadDevice::ReservedField);
    assert_eq!(bad(0x3 | 2 << 7 | 4 << 9, 0), BadDevice::ReservedField);
    assert_eq!(bad(0x3 | 6 << 9, 0), BadDevice::Unspoken);
    assert_eq!(bad(0x3 | 4 << 9 | 1 << 55, 0), BadDevice::Unspoken);
}

#[derive(Clone, Debug)]
enum Op {
    Map {
        first: u64,
        pages: u64,
        shift: u32,
    },
    Unmap {
        first: u64,
        pages: u64,
    },
    Protect {
        first: u64,
        pages: u64,
    },
    Split {
        first: u64,
        pages: u64,
    },
    Merge {
        first: u64,
        pages: u64,
    },
    /// Another hand leaves out every level that has nothing but its first table.
    LeaveOut,
    /// Another hand joins the neighbours that make one page of more than their level's.
    Join {
        size: u32,
    },
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    // Where the first entries of tables are, and where they end.
    let base = prop_oneof![6 => Just(0u64), 1 => Just(1 << 9), 1 => Just(1 << 18), 1 => Just(1 << 27)];
    let small = || prop_oneof![0..1100u64, Just(512), Just(511), (0..3u64).prop_map(|n| n * 512)];
    let op = (0..12u8, base, small(), small()).prop_map(|(kind, base, first, pages)| {
        let (first, pages) = (base + first, pages + 1);
        match kind {
            0..=2 => Op::Map { first, pages, shift: if kind == 0 { 30 } else { 12 } },
            3 | 4 => Op::Unmap { first, pages },
            5 => Op::Protect { first, pages },
            6 => Op::Split { first, pages },
            7 => Op::Merge { first, pages },
            8 => Op::Join { size: 1 + u32::try_from(pages % 8).expect("small") },
            _ => Op::LeaveOut,
        }
    });
    proptest::collection::vec(op, 1..16)
}

const ROOT: u64 = 0x40_0000;
type Tree<'a, const N: usize> = (&'a Ram, &'a mut Pools<N>);

/// Leaves levels out below the table at `table`; says how often.
fn leave_out<const N: usize>((ram, frames): Tree<'_, N>, table: u64, level: u8) -> usize {
    let mut times = 0;
    for index in 0..512 {
        let at = table + index * 8;
        loop {
            let word = ram.get(at);
            let Entry::Table(next) = Host::<4>::decode(word, Level(level), &Caps::FULL) else { break };
            let below = next.leads_to(Level(level)).expect("a level");
            let first = Host::<4>::decode(ram.get(next.at.0), below, &Caps::FULL);
            let alone = (1..512).all(|index| ram.get(next.at.0 + index * 8) == 0);
            if !(alone && matches!(first, Entry::Table(_))) {
                times += leave_out((ram, frames), next.at.0, below.0);
                break;
            }
            ram.set(at, ram.get(next.at.0));
            ram.set(next.at.0, 0);
            frames.give(below, next.at);
            times += 1;
        }
    }
    times
}

/// Joins what can be joined into pages of `1 << size` times the level's.
fn join(ram: &Ram, table: u64, level: Level, size: u32) {
    for index in 0..512 {
        let entry = |index: u64| Host::<4>::decode(ram.get(table + index * 8), level, &Caps::FULL);
        match entry(index) {
            Entry::Table(next) => join(ram, next.at.0, next.leads_to(level).expect("a level"), size),
            Entry::Leaf(leaf) if index.is_multiple_of(1 << size) => {
                let shift = Host::<4>::shift(level);
                let whole = Leaf { shift: shift + size, ..leaf };
                let inline = |member: u64| {
                    entry(index + member)
                        == Entry::Leaf(Leaf { output: Output(leaf.output.0 + (member << shift)), ..leaf })
                };
                let word = Host::<4>::encode(&Entry::Leaf(whole), level, &Caps::FULL);
                if let Ok(word) = word
                    && leaf.shift == shift
                    && (0..1 << size).all(inline)
                {
                    (0..1 << size).for_each(|member| ram.set(table + (index + member) * 8, word));
                }
            }
            _ => {}
        }
    }
}

/// Runs `ops` with `N` frames a level, and compares with a map of pages after each. Says how often a level was left out.
fn against_a_map<const N: usize>(ops: &[Op]) -> usize {
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), pools::<N>(0x80_0000, 0x1000), NothingCached);
    let mut model: BTreeMap<u64, (u64, Permissions)> = BTreeMap::new();
    let mut times = 0;
    let span = |first: u64, pages: u64| Span::new(Input(first << 12), pages << 12).expect("fits");
    for op in ops {
        let before = ram.image();
        let mut mapper =
            Mapper::<Host<4>, _, _, _>::new(Output(ROOT), Caps::FULL, &ram, &mut frames, &mut caches)
                .expect("aligned");
        let result = match *op {
            Op::Map { first, pages, shift } => {
                // In line with the address, so that large pages and groups are possible.
                let output = (1 << 28) + (first & 0xfff);
                let leaf = Leaf::new(Output(output << 12), shift, OPEN, Memory::Snooped);
                mapper.map(span(first, pages), leaf).map(|()| {
                    for number in 0..pages {
                        assert_eq!(model.insert(first + number, (output + number, OPEN)), None);
                    }
                })
            }
            Op::Unmap { first, pages } => mapper.unmap(span(first, pages)).map(|_| {
                model.retain(|number, _| !(first..first + pages).contains(number));
            }),
            Op::Protect { first, pages } => mapper.protect(span(first, pages), CLOSED).map(|_| {
                model.range_mut(first..first + pages).for_each(|(_, mapped)| mapped.1 = CLOSED);
            }),
            Op::Split { first, pages } => mapper.split(span(first, pages), Level::PAGES).map(|_| ()),
            Op::Merge { first, pages } => mapper.merge(span(first, pages)).map(|_| ()),
            Op::LeaveOut => {
                times += leave_out((&ram, &mut frames), ROOT, 4);
                Ok(())
            }
            Op::Join { size } => {
                join(&ram, ROOT, Level(4), size);
                Ok(())
            }
        };
        match result {
            Ok(()) => {}
            Err(MapError::Exhausted { .. } | MapError::Mapped { .. }) => {
                assert_eq!(ram.image(), before, "{op:?}")
            }
            Err(error) => panic!("{op:?}: {error}"),
        }
        let mapper =
            Mapper::<Host<4>, _, _, _>::new(Output(ROOT), Caps::FULL, &ram, &mut frames, &mut caches)
                .expect("aligned");
        let mut found = BTreeMap::new();
        mapper
            .for_each(Span::new(Input(0), 1 << 48).expect("fits"), |mapping| {
                let first = mapping.input.0 >> 12;
                let begin = mapping.input.0 >> mapping.leaf.shift << mapping.leaf.shift >> 12;
                let output = (mapping.leaf.base().0 >> 12) + (first - begin);
                for number in 0..1 << (Host::<4>::shift(mapping.level) - 12) {
                    found.insert(first + number, (output + number, mapping.permissions));
                }
            })
            .expect("well-formed");
        assert_eq!(found, model, "after {op:?} of {ops:?}");
        for number in [0, 1, 511, 512, 1099, 1 << 18, (1 << 18) + 512, 1 << 27, 3 << 27] {
            let walked = mapper.walk(Input((number << 12) + 5)).expect("well-formed");
            let output = match walked {
                mapper::Translation::Mapped(output, _) => Some((output.0 - 5) >> 12),
                mapper::Translation::Absent { .. } => None,
            };
            assert_eq!(output, model.get(&number).map(|mapped| mapped.0), "{number:#x} after {op:?}");
        }
    }
    let mut mapper =
        Mapper::<Host<4>, _, _, _>::new(Output(ROOT), Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    if mapper.unmap(Span::new(Input(0), 1 << 48).expect("fits")).is_ok() {
        assert_eq!(ram.image(), BTreeMap::new(), "every table is zero again");
        for level in (1..=3).map(Level) {
            assert_eq!(frames.left(level), N, "every frame is back, {level}");
        }
    }
    times
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_mapper_does_what_a_map_of_pages_does_where_levels_are_left_out(ops in ops()) {
        against_a_map::<16>(&ops);
    }

    #[test]
    fn what_lacks_a_frame_changes_nothing_where_levels_are_left_out(ops in ops()) {
        against_a_map::<3>(&ops);
    }
}

#[test]
fn what_is_mapped_beside_a_table_that_leaves_levels_out_puts_them_back() {
    let ops = [
        Op::Map { first: 3, pages: 2, shift: 12 },
        Op::LeaveOut,
        Op::Map { first: 1 << 9, pages: 1, shift: 12 },
        Op::Map { first: 1 << 18, pages: 1, shift: 12 },
        Op::Map { first: 1 << 27, pages: 1, shift: 12 },
        Op::Unmap { first: 1 << 9, pages: 1 },
        Op::LeaveOut,
    ];
    assert_eq!(against_a_map::<16>(&ops), 6, "two at first; then one, one and two of what has come");
    // The tables of levels 3 and 2 that are put back are counted before anything is changed.
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), Pools::<4>::default(), NothingCached);
    ram.set(ROOT, 0x5000 | PR | IR | IW | next_level(1));
    ram.set(0x5000, 0x9000 | PR | IR);
    frames.add(Level(1), Output(0x6000));
    frames.add(Level(2), Output(0x7000));
    let mut mapper =
        Mapper::<Host<4>, _, _, _>::new(Output(ROOT), Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    let leaf = Leaf::new(Output(0xa000), 12, OPEN, Memory::Physical);
    let beside = Span::new(Input(0x20_0000), 0x1000).expect("fits");
    let lacks = MapError::Exhausted { level: Level(3), needed: 1, left: 0 };
    assert_eq!(mapper.map(beside, leaf), Err(lacks));
    assert_eq!(ram.get(ROOT), 0x5000 | PR | IR | IW | next_level(1));
    frames.add(Level(3), Output(0x8000));
    let mut mapper =
        Mapper::<Host<4>, _, _, _>::new(Output(ROOT), Caps::FULL, &ram, &mut frames, &mut caches)
            .expect("aligned");
    assert_eq!(mapper.map(beside, leaf), Ok(()));
    assert_eq!(ram.get(0x8000), 0x7000 | PR | IR | IW | next_level(2));
    assert_eq!(ram.get(0x7000), 0x5000 | PR | IR | IW | next_level(1), "as it was, one level down");
    assert_eq!(ram.get(0x7008), 0x6000 | PR | IR | IW | next_level(1));
}
