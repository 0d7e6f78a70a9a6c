//! VT-d's second stage: words back and forth, what is reserved bit by bit, and walks against a model written from the
//! specification's tables.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram, random};
use plimsoll_mmu::format::vtd::{Caps, Second3, Second4, Second5, VtdFormat};
use plimsoll_mmu::vtd::{self, Fault, Mode, Registers, Request};
use plimsoll_mmu::{
    Entry, Feature, Format, Input, Leaf, Level, Malformed, Marks, Memory, Output, Permissions, Unencodable,
};
use proptest::prelude::*;

const R: u64 = 1;
const W: u64 = 1 << 1;
const PS: u64 = 1 << 7;
const A: u64 = 1 << 8;
const D: u64 = 1 << 9;
const SNP: u64 = 1 << 11;
const TM: u64 = 1 << 62;
const WEAK: Caps = Caps {
    physical_bits: 39,
    input_bits: 39,
    largest_leaf: Level(1),
    snoop_control: Feature::Off,
    transient: Feature::Off,
    accessed_dirty: Feature::Off,
};
/// Before revision 3.2.
const EARLY: Caps = Caps { transient: Feature::On, ..Caps::FULL };
const REQUESTS: [Request; 3] = [Request::Read, Request::Write, Request::Atomic];

fn round_trip<F: Format<Caps = Caps>>(raw: u64, level: Level) {
    for caps in [Caps::FULL, EARLY, WEAK] {
        let entry = F::decode(raw, level, &caps);
        match F::encode(&entry, level, &caps) {
            Ok(word) => assert_eq!(word, raw, "{} {level} {entry:?}", F::NAME),
            Err(Unencodable::Kind) => assert!(matches!(entry, Entry::Malformed(_)), "{level} {entry:?}"),
            Err(error) => panic!("{} {level} {raw:#x} {entry:?}: {error}", F::NAME),
        }
    }
}

fn round_trip_everywhere(raw: u64) {
    for level in (1..=5).map(Level) {
        round_trip::<Second5>(raw, level);
        if level.0 < 5 {
            round_trip::<Second4>(raw, level);
        }
        if level.0 < 4 {
            round_trip::<Second3>(raw, level);
        }
    }
}

#[test]
fn every_combination_of_the_low_and_of_the_high_bits_reads_and_writes_back() {
    for bits in 0..1 << 13 {
        for others in [0, 1 << 63, TM, 0x3ff << 52, 1 << 51, 1 << 40, 1 << 30, 1 << 21] {
            round_trip_everywhere(others | bits);
        }
    }
    for high in 0..1 << 12 {
        for low in [0, R, W, R | W, R | PS, R | W | A | D | SNP, 0x7c] {
            round_trip_everywhere(high << 52 | low);
        }
    }
}

proptest! {
    #[test]
    fn every_word_reads_and_writes_back(raw: u64) {
        round_trip_everywhere(raw);
    }
}

/// What 9.8 has as "Reserved (0)" in an entry of `level` that is present.
fn reserved(word: u64, level: u8, caps: &Caps) -> u64 {
    let large = word & PS != 0;
    let maps = level == 1 || (level <= 3 && large);
    let mut bits = Vec::new();
    bits.extend(u64::from(caps.physical_bits)..52);
    if !maps || caps.snoop_control == Feature::Off {
        bits.push(11);
    }
    if !maps || caps.transient == Feature::Off {
        bits.push(62);
    }
    match level {
        1 => {}
        2 | 3 if caps.largest_leaf.0 < level => bits.push(7),
        2 | 3 => {}
        _ => bits.push(7),
    }
    match (level, maps) {
        (2, true) => bits.extend(12..21),
        (3, true) => bits.extend(12..30),
        _ => {}
    }
    bits.into_iter().fold(0, |all, bit| all | 1 << bit)
}

#[test]
fn what_is_reserved_is_refused_bit_by_bit_and_all_else_is_not() {
    let narrow = Caps { physical_bits: 42, ..Caps::FULL };
    let mib = Caps { largest_leaf: Level(2), ..Caps::FULL };
    for caps in [Caps::FULL, EARLY, narrow, mib, WEAK] {
        for level in 1..=5 {
            for bit in 2..64 {
                for base in [R, W, R | W, R | W | PS] {
                    // A leaf that begins at 0, so that no other bit is in the way.
                    let word = base | 1 << bit;
                    let found = match Second5::decode(word, Level(level), &caps) {
                        Entry::Malformed(Malformed::Reserved(bits)) => bits,
                        Entry::Malformed(other) => panic!("{other}"),
                        _ => 0,
                    };
                    let expected = word & reserved(word, level, &caps);
                    assert_eq!(found, expected, "level {level}, {word:#x}, {caps:?}");
                }
            }
        }
    }
    assert_eq!(
        Second4::decode(!(R | W), Level(4), &WEAK),
        Entry::Absent { software: !(R | W) },
        "nothing is reserved in an absent entry"
    );
}

#[test]
fn a_leaf_says_rights_size_and_snooping() {
    let read_only = Permissions::all() - Permissions::WRITE;
    let large = Leaf { accessed: true, ..Leaf::new(Output(0x4000_0000), 30, read_only, Memory::Snooped) };
    let word = 0x4000_0000 | R | PS | A | SNP;
    assert_eq!(Second3::decode(word, Level(3), &Caps::FULL), Entry::Leaf(large));
    assert_eq!(Second3::encode(&Entry::Leaf(large), Level(3), &Caps::FULL), Ok(word));
    let says = |leaf: Leaf, caps| Second3::encode(&Entry::Leaf(leaf), Level(1), caps);
    let page = Leaf::new(Output(0x1000), 12, Permissions::all(), Memory::Physical);
    assert_eq!(says(page, &WEAK), Ok(0x1000 | R | W));
    let write_only = Leaf { permissions: Permissions::all() - Permissions::READ, ..page };
    assert_eq!(says(write_only, &WEAK), Ok(0x1000 | W), "a device may write what it cannot read");
    let transient = Leaf { software: TM, ..page };
    assert_eq!(says(transient, &EARLY), Ok(0x1000 | R | W | TM));
    assert_eq!(says(transient, &Caps::FULL), Err(Unencodable::Software(TM)), "the bit has gone");
    let snooped = Leaf { memory: Memory::Snooped, ..page };
    assert_eq!(says(snooped, &WEAK), Err(Unencodable::Memory(Memory::Snooped)));
    assert_eq!(says(Leaf { accessed: true, ..page }, &WEAK), Err(Unencodable::Flag));
    assert_eq!(
        says(Leaf { output: Output(1 << 39), ..page }, &WEAK),
        Err(Unencodable::Address(Output(1 << 39)))
    );
    for permissions in [Permissions::EXECUTE | Permissions::USER, Permissions::READ | Permissions::USER] {
        let refused = Err(Unencodable::Permissions(permissions));
        assert_eq!(says(Leaf { permissions, ..page }, &Caps::FULL), refused);
    }
    let block = Leaf { shift: 21, output: Output(0), ..page };
    let error = Second3::encode(&Entry::Leaf(block), Level(2), &WEAK);
    assert_eq!(error, Err(Unencodable::Size { shift: 21 }), "2 MiB are a capability");
}

const LIMIT: u64 = 0x10_0000;

/// Reasons of legacy mode and what they are called in scalable mode.
const REASONS: [(u8, u8); 7] =
    [(0x3, 0x7b), (0x4, 0x84), (0x5, 0x85), (0x6, 0x86), (0x7, 0x78), (0xc, 0x7a), (0xe, 0x87)];

/// Where the specification has an address go through `levels` tables, the first of them at `root`, or the fault reason of
/// legacy mode.
fn model(ram: &Ram, (root, levels): (u64, u8), input: u64, request: Request, caps: &Caps) -> Result<u64, u8> {
    if input >> caps.input_bits.min(12 + 9 * u32::from(levels)) != 0 {
        return Err(0x4);
    }
    let lacks = |read: bool, write: bool| match request {
        Request::Read => (!read).then_some(0x6),
        Request::Write => (!write).then_some(0x5),
        Request::Atomic if !write => Some(0x5),
        Request::Atomic => (!read).then_some(0x6),
    };
    let (mut table, mut read, mut write) = (root, true, true);
    for level in (1..=levels).rev() {
        let below = 12 + 9 * (level - 1);
        let at = table + (input >> below & 511) * 8;
        if at >= LIMIT {
            return Err(if level == levels { 0x3 } else { 0x7 });
        }
        let word = ram.get(at);
        if word & (R | W) == 0 {
            return Err(lacks(false, false).expect("everything needs a right"));
        }
        if word & reserved(word, level, caps) != 0 {
            return Err(0xc);
        }
        (read, write) = (read && word & R != 0, write && word & W != 0);
        table = word & 0x000f_ffff_ffff_f000;
        if level == 1 || word & PS != 0 {
            let inside = (1 << below) - 1;
            let output = (table & !inside) | (input & inside);
            return match lacks(read, write) {
                Some(reason) => Err(reason),
                None if (0xfee0_0000..=0xfeef_ffff).contains(&output) => Err(0xe),
                None => Ok(output),
            };
        }
    }
    unreachable!("level 1 ends every walk")
}

fn compare<F: VtdFormat>(next: &mut impl FnMut() -> u64, seen: &mut [u32; 16]) {
    let caps = Caps {
        physical_bits: if next().is_multiple_of(4) { 36 } else { 52 },
        input_bits: [57, 57, 48, 36][usize::try_from(next() % 4).expect("small")],
        largest_leaf: Level([3, 3, 2, 1][usize::try_from(next() % 4).expect("small")]),
        snoop_control: if next().is_multiple_of(4) { Feature::Off } else { Feature::On },
        transient: if next().is_multiple_of(4) { Feature::On } else { Feature::Off },
        accessed_dirty: if next().is_multiple_of(2) { Feature::Off } else { Feature::On },
    };
    let ram = Ram::new(LIMIT);
    // One table a level at 0x1000, 0x2000, ..., and words in each that mostly lead on.
    let within = next() & 0xf_ffff;
    let input = match next() % 16 {
        0 => next(),
        // An interrupt's address, and what pages of 2 MiB and of 1 GiB lead there.
        2 => 0xfee0_0000 | within,
        3 => 0x00e0_0000 | within,
        4 => 0x3ee0_0000 | within,
        1 => next() & ((1 << F::INPUT_BITS) - 1),
        _ => next() & ((1 << caps.input_bits.min(F::INPUT_BITS)) - 1),
    };
    for level in (1..=F::LEVELS).rev() {
        let table = 0x1000 * u64::from(F::LEVELS - level + 1);
        let frame = match next() % 24 {
            0 => next() & 0x000f_ffff_ffff_f000,
            1 => LIMIT,
            // A page that is an interrupt's, or memory just above.
            2 | 3 if level == 1 => 0xfee0_0000 | (next() & 0x1f_f000),
            _ => table + 0x1000,
        };
        let mut word = frame | R | W;
        if level > 1 && next().is_multiple_of(12) {
            // Aligned, so that it may be a page; half of the one of 2 MiB is memory.
            word = if level == 2 { 0xfee0_0000 } else { (next() % 4) << 30 } | R | W | PS;
        }
        if next().is_multiple_of(6) {
            word &= !(1 << (next() % 2));
        }
        if next().is_multiple_of(12) {
            word &= !(R | W);
        }
        if next().is_multiple_of(8) {
            word |= 1 << (next() % 64);
        }
        if level == 1 {
            word |= next() & (SNP | TM) & if next().is_multiple_of(4) { u64::MAX } else { 0 };
        }
        ram.set(table + (input >> (12 + 9 * (level - 1)) & 511) * 8, word);
    }
    let root = if next().is_multiple_of(24) { LIMIT } else { 0x1000 };
    let registers = Registers { root: Output(root | (next() & 0xfff)), caps };
    for request in REQUESTS {
        let expected = match input >> 20 {
            0xfee => Err(None),
            _ => model(&ram, (root, F::LEVELS), input, request, &caps).map_err(Some),
        };
        let before = ram.image();
        let walked = vtd::walk::<F, _>(&ram, &registers, Input(input), request, Marks::Leave);
        assert_eq!(ram.image(), before, "an observer leaves nothing behind");
        let said = |mode| walked.map(|walked| walked.output.0).map_err(|fault| fault.reason(mode));
        let case = format!("{} {input:#x} {request:?} {caps:?} {before:#x?}", F::NAME);
        assert_eq!(said(Mode::Legacy), expected, "{case}");
        let renamed = |reason| REASONS.iter().find(|(legacy, _)| *legacy == reason).expect("one of them").1;
        assert_eq!(said(Mode::Scalable), expected.map_err(|reason| reason.map(renamed)), "{case}");
        // 1 stands for no reason.
        seen[expected.err().map_or(0, |reason| usize::from(reason.unwrap_or(1)))] += 1;
    }
}

#[test]
fn walks_end_where_the_model_does_with_its_fault_reasons() {
    let mut next = random(0x9e37_79b9_7f4a_7c15);
    let mut seen = [0; 16];
    for _ in 0..10_000 {
        compare::<Second3>(&mut next, &mut seen);
        compare::<Second4>(&mut next, &mut seen);
        compare::<Second5>(&mut next, &mut seen);
    }
    for end in [0x0, 0x1, 0x3, 0x4, 0x5, 0x6, 0x7, 0xc, 0xe] {
        assert!(seen[end] > 500, "{end:#x}: {seen:?}");
    }
}

#[test]
fn a_permitted_request_marks_every_entry_and_a_refused_one_none() {
    let off = Caps { accessed_dirty: Feature::Off, ..Caps::FULL };
    for caps in [Caps::FULL, off] {
        for leaf in [R, W, R | W] {
            for request in REQUESTS {
                let ram = Ram::new(LIMIT);
                (1..4).for_each(|table| ram.set(table * 0x1000, ((table + 1) * 0x1000) | R | W));
                ram.set(0x4000 + 7 * 8, 0x9000 | leaf);
                let before = ram.image();
                let registers = Registers { root: Output(0x1000), caps };
                let walked = vtd::walk::<Second4, _>(&ram, &registers, Input(0x7008), request, Marks::Set);
                let needs = match request {
                    Request::Read => R,
                    Request::Write => W,
                    Request::Atomic => R | W,
                };
                assert_eq!(walked.is_ok(), leaf & needs == needs, "{request:?} of {leaf:#x}");
                let marked = walked.is_ok() && caps.accessed_dirty == Feature::On;
                for (at, word) in before {
                    let dirty = if at == 0x4000 + 7 * 8 && request != Request::Read { D } else { 0 };
                    let expected = if marked { word | A | dirty } else { word };
                    assert_eq!(ram.get(at), expected, "{request:?} of {leaf:#x} at {at:#x}, {caps:?}");
                }
            }
        }
    }
}

#[test]
fn a_fault_names_the_entry_that_is_to_blame() {
    let ram = Ram::new(LIMIT);
    (1..4).for_each(|table| ram.set(table * 0x1000, ((table + 1) * 0x1000) | R | W));
    let registers = Registers { root: Output(0x1000), caps: WEAK };
    let walk = |input| vtd::walk::<Second4, _>(&ram, &registers, Input(input), Request::Read, Marks::Set);
    let error = walk(0x7008).expect_err("nothing is there");
    assert!(
        matches!(error, Fault::Refused { level: Level(1), step, .. } if step.at == Output(0x4038)),
        "{error}"
    );
    assert_eq!(walk(1 << 39), Err(Fault::TooLong(Input(1 << 39))), "the unit has 39 bits");
    assert_eq!(walk(1 << 48), Err(Fault::TooLong(Input(1 << 48))));
    ram.set(0x2000, 0x3000 | W);
    ram.set(0x4038, 0x9000 | R | W);
    let error = walk(0x7008).expect_err("its table withholds the right");
    assert!(matches!(error, Fault::Refused { permissions, .. } if !permissions.contains(Permissions::READ)));
    assert_eq!(
        error.to_string(),
        "Read of in:0x7008 is refused, and the walk ended at the entry of level 1 at out:0x4038"
    );
    ram.set(0x2000, 0x3000 | R | W);
    ram.set(0x3000, 0x4000 | R | SNP);
    let error = walk(0x7008).expect_err("a table has no SNP");
    assert!(
        matches!(error, Fault::Reserved { level: Level(2), reason: Malformed::Reserved(SNP), .. }),
        "{error}"
    );
    ram.set(0x2000, LIMIT | R);
    let at = Output(LIMIT);
    assert_eq!(walk(0x7008), Err(Fault::Memory { level: Level(2), at, error: Outside(at) }));
}

#[test]
fn an_interrupts_address_is_not_translated_and_not_translated_to() {
    let ram = Ram::new(LIMIT);
    let registers = Registers { root: Output(0x1000), caps: Caps::FULL };
    // The fourth GiB is translated to itself, and 2 MiB to where interrupts are.
    ram.set(0x1000, 0x2000 | R | W);
    ram.set(0x2000 + 3 * 8, 0xc000_0000 | R | W | PS);
    ram.set(0x2000, 0x3000 | R | W);
    ram.set(0x3000 + 8, 0xfee0_0000 | R | W | PS);
    let before = ram.image();
    let walk = |input| vtd::walk::<Second4, _>(&ram, &registers, Input(input), Request::Write, Marks::Set);
    let end = |input| walk(input).map(|walked| walked.output.0).map_err(|fault| fault.reason(Mode::Legacy));
    for input in [0xfee0_0000, 0xfeef_ffff] {
        assert_eq!(walk(input), Err(Fault::Interrupt { input: Input(input), output: None }));
        assert_eq!(end(input), Err(None), "it is for interrupt remapping");
    }
    for (input, output) in [(0x20_0000, 0xfee0_0000), (0x2f_ffff, 0xfeef_ffff)] {
        let fault = Fault::Interrupt { input: Input(input), output: Some(Output(output)) };
        assert_eq!((walk(input), end(input)), (Err(fault), Err(Some(0xe))));
    }
    assert_eq!(ram.image(), before, "nothing was accessed");
    for (input, output) in [(0xfedf_ffff, 0xfedf_ffff), (0xfef0_0000, 0xfef0_0000), (0x30_0000, 0xfef0_0000)]
    {
        assert_eq!(end(input), Ok(output), "the addresses are an interrupt's, not their whole page");
    }
}
