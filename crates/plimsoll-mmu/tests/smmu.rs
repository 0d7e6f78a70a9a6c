//! SMMUv3's second stage: stream table entries field by field, walks against the processor's with the same tables, and events.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Ram, random};
use plimsoll_mmu::arm::{self, Mode, SecondRegisters};
use plimsoll_mmu::format::arm::{Caps, Second};
use plimsoll_mmu::nested::{Purpose, SecondStage as _};
use plimsoll_mmu::smmu::{BadStream, Event, OnFault, Reason, SecondStage, SmmuFormat, Stream, Unit};
use plimsoll_mmu::{Access, Feature, Input, Marks, Output};
use std::collections::BTreeMap;

const UNIT: Unit = Unit { physical_bits: 48, input_bits: 48 };
const V: u64 = 1;
const SECOND: u64 = 6 << 1;
const AA64: u64 = 1 << 51;
const ROOT: u64 = 0x1_0000;

/// Word 2 for tables of 2^`granule` bytes (S2TG), `levels` of them, which translate `bits`.
fn geometry(granule: u32, bits: u64, levels: u64) -> u64 {
    let (granule, start) = match granule {
        12 => (0, levels - 2),
        14 => (2, levels - 1),
        _ => (1, levels - 1),
    };
    AA64 | 5 << 48 | granule << 46 | start << 38 | (64 - bits) << 32
}

fn decode(words: [u64; 4]) -> Result<Stream, BadStream> {
    let [first, second, third, fourth] = words;
    Stream::decode([first, second, third, fourth, 0, 0, 0, 0], &UNIT)
}

fn second(third: u64) -> SecondStage {
    match decode([V | SECOND, 0, third, ROOT]) {
        Ok(Stream::Second(stage)) => stage,
        other => panic!("{third:#x}: {other:?}"),
    }
}

#[test]
fn a_stream_table_entry_says_each_thing_where_the_specification_has_it() {
    let plain = geometry(12, 40, 3);
    let stage = second(plain);
    let caps = Caps { dirty_management: Feature::Off, ..Caps::FULL };
    let expected = SecondStage {
        root: Output(ROOT),
        vmid: 0,
        granule: 12,
        input_bits: 40,
        levels: 3,
        caps,
        access_flag: Feature::Off,
        ignore_access_flag: Feature::Off,
        on_fault: OnFault::Abort,
        remote: false,
    };
    assert_eq!(stage, expected);
    let on = Feature::On;
    let dirty = Caps { dirty_management: on, ..caps };
    for (bits, stage) in [
        (0x1234, SecondStage { vmid: 0x1234, ..expected }),
        (1 << 53, SecondStage { ignore_access_flag: on, ..expected }),
        (1 << 55, expected),
        (1 << 56, SecondStage { access_flag: on, ..expected }),
        (3 << 55, SecondStage { access_flag: on, caps: dirty, ..expected }),
        (1 << 57, SecondStage { on_fault: OnFault::Stall, ..expected }),
        (1 << 58, SecondStage { on_fault: OnFault::Record, ..expected }),
        // S2PTW is about a first stage's tables; S2SH0, S2OR0 and S2IR0 about how these are read.
        (1 << 54 | 0xfc << 38 & !(3 << 38), expected),
    ] {
        assert_eq!(second(plain | bits), stage, "{bits:#x}");
    }
    assert_eq!(
        decode([V | SECOND, 1 << 28, plain, ROOT]),
        Ok(Stream::Second(SecondStage { remote: true, ..expected }))
    );
    for (number, bits) in [(0, 32), (1, 36), (2, 40), (3, 42), (4, 44), (5, 48), (6, 48), (7, 48)] {
        let said = second(plain & !(7 << 48) | number << 48);
        assert_eq!(said.caps.physical_bits, bits, "S2PS {number}");
    }
    let narrow = Unit { physical_bits: 42, input_bits: 42 };
    let words = [V | SECOND, 0, plain, ROOT, 0, 0, 0, 0];
    assert!(
        matches!(Stream::decode(words, &narrow), Ok(Stream::Second(stage)) if stage.caps.physical_bits == 42)
    );
    for config in 0..4 {
        assert_eq!(decode([V | config << 1, 0, 0, 0]), Ok(Stream::Abort));
    }
    assert_eq!(decode([V | 4 << 1, 0, 0, 0]), Ok(Stream::Bypass));
}

#[test]
fn what_the_unit_refuses_has_a_reason() {
    let plain = geometry(12, 40, 3);
    let bad = |third| decode([V | SECOND, 0, third, ROOT]).expect_err("it is refused");
    assert_eq!(decode([SECOND, 0, plain, ROOT]), Err(BadStream::Invalid));
    assert_eq!(bad(plain | 3 << 46), BadStream::Granule);
    assert_eq!(bad(geometry(12, 24, 2)), BadStream::InputBits(24));
    assert_eq!(bad(geometry(12, 49, 4)), BadStream::InputBits(49));
    for third in [plain & !AA64, plain | 1 << 52] {
        assert_eq!(bad(third), BadStream::Unspoken);
    }
    for config in [5, 7] {
        assert_eq!(decode([V | config << 1, 0, plain, ROOT]), Err(BadStream::Unspoken));
    }
    assert_eq!(decode([V | SECOND, 0, plain, 1 << 50 | ROOT]), Err(BadStream::Root(Output(1 << 50 | ROOT))));
    let small = plain & !(7 << 48) | 1 << 48;
    assert_eq!(decode([V | SECOND, 0, small, 1 << 36]), Err(BadStream::Root(Output(1 << 36))));
    // DDI 0487 D8.2.2: between one bit and four more than an index are left for the root.
    for (granule, index) in [(12, 9), (14, 11), (16, 13)] {
        for levels in if granule == 12 { 2..=4 } else { 1..=3 } {
            for bits in 25..=48 {
                let left = i64::try_from(bits - granule).expect("small") - index * (levels - 1);
                let third = geometry(
                    u32::try_from(granule).expect("small"),
                    bits,
                    u64::try_from(levels).expect("small"),
                );
                let found = decode([V | SECOND, 0, third, ROOT]);
                assert_eq!(
                    found.is_ok(),
                    (1..=index + 4).contains(&left),
                    "2^{granule}, {levels}, {bits}: {found:?}"
                );
            }
        }
    }
}

#[test]
fn a_stage_is_of_the_one_format_that_has_its_pages_bits_and_levels() {
    let stage = second(geometry(12, 40, 3));
    assert!(stage.of::<Second<12, 40>>().is_some());
    assert!(stage.of::<Second<12, 39>>().is_none());
    assert!(stage.of::<Second<14, 40>>().is_none());
    // The same bits with a level more, and no joined roots.
    assert!(second(geometry(12, 40, 4)).of::<Second<12, 40>>().is_none());
    assert!(second(geometry(14, 47, 3)).of::<Second<14, 47>>().is_some());
    assert!(second(geometry(16, 48, 3)).of::<Second<16, 48>>().is_some());
}

const LIMIT: u64 = 0x40_0000;
const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];

/// The event's number for a fault status code, by D17.2 of DDI 0487 and 7.3 of IHI 0070.
fn number(status: u8) -> u64 {
    match status & !3 {
        0b00_0000 => 0x11,
        0b00_0100 => 0x10,
        0b00_1000 => 0x12,
        0b00_1100 => 0x13,
        0b01_0100 => 0x0b,
        other => panic!("{other:#b}"),
    }
}

fn compare<F: SmmuFormat>(next: &mut impl FnMut() -> u64, seen: &mut BTreeMap<u64, u32>) {
    let granule = F::PAGE_SHIFT;
    let table = |level: u8| ROOT + (u64::from(F::LEVELS - level) << (granule + 4));
    let choice = next();
    let flags = (choice & 7) << 53 & (1 << 53 | 1 << 55) | (choice >> 3 & 1) << 56;
    let stage = second(
        geometry(granule, u64::from(F::INPUT_BITS), u64::from(F::LEVELS)) & !(7 << 48)
            | if choice & 16 == 0 { 5 << 48 } else { 1 << 48 }
            | flags
            | 1 << 58,
    );
    let ram = Ram::new(LIMIT);
    let input = match next() % 12 {
        0 => next(),
        _ => next() & ((1 << F::INPUT_BITS) - 1),
    };
    for level in (1..=F::LEVELS).rev() {
        let mut word = if level == 1 || next().is_multiple_of(8) {
            let kind = if level == 1 { 3 } else { 1 };
            let shift = F::shift(plimsoll_mmu::Level(level));
            (next() & 0xf_ffff_ffff) >> shift << shift | kind | 0xf << 2 | 3 << 6 | 3 << 8 | 1 << 10
        } else {
            table(level - 1) | 3
        };
        if next().is_multiple_of(5) {
            word ^= 1 << (next() % 64);
        }
        if next().is_multiple_of(30) {
            word = word & !0xffff_ffff_f000 | LIMIT;
        }
        let index = (input & ((1 << F::INPUT_BITS) - 1)) >> F::shift(plimsoll_mmu::Level(level));
        let mask = F::entries(plimsoll_mmu::Level(level)) - 1;
        ram.set(table(level) + (index & mask) * 8, word);
    }
    let registers = SecondRegisters {
        root: stage.root,
        access_flag: stage.access_flag,
        protected_walks: Feature::Off,
        forced_write_back: Feature::Off,
        caps: stage.caps,
    };
    let typed = stage.of::<F>().expect("its format");
    let ignored = stage.ignore_access_flag == Feature::On && stage.access_flag == Feature::Off;
    for access in ACCESSES {
        for mode in [Mode::User, Mode::Privileged] {
            let before = ram.image();
            let found = typed.translate(&ram, Input(input), (access, mode), Marks::Set);
            let left = ram.image();
            for (at, word) in &before {
                ram.set(*at, *word);
            }
            if let Err(fault) = found {
                let event = stage.event(&fault, access, mode).expect("faults are recorded");
                let [first, about, at, _] = event.words(7);
                assert_eq!((first >> 32, at), (7, input));
                assert_eq!(first & 0xff, number(fault.status()));
                assert_eq!(about & 1 << 35 == 0, access == Access::Write);
                assert_eq!(about & 1 << 39, 1 << 39, "the second stage");
                *seen.entry(first & 0xff).or_default() += 1;
            } else {
                *seen.entry(0).or_default() += 1;
            }
            if ignored {
                assert_eq!(left, before, "what ignores the access flag sets none");
                assert!(!matches!(found, Err(fault) if fault.kind == arm::Kind::AccessFlag));
                continue;
            }
            let processor = arm::Stage::<F, _>::new(&ram, registers, mode);
            let expected = processor.translate(Input(input), access, Purpose::Final);
            assert_eq!(found, expected.map_err(|fault| fault.fault), "{input:#x} {access:?} {mode:?}");
            assert_eq!(left, ram.image(), "the marks are the processor's");
            for (at, word) in &before {
                ram.set(*at, *word);
            }
        }
    }
}

#[test]
fn a_device_goes_where_a_processor_goes_and_a_fault_becomes_its_event() {
    let mut next = random(0x9e37_79b9_7f4a_7c15);
    let mut seen = BTreeMap::new();
    for _ in 0..6_000 {
        compare::<Second<12, 40>>(&mut next, &mut seen);
        compare::<Second<12, 48>>(&mut next, &mut seen);
        compare::<Second<14, 47>>(&mut next, &mut seen);
        compare::<Second<16, 42>>(&mut next, &mut seen);
    }
    for end in [0, 0x0b, 0x10, 0x11, 0x12, 0x13] {
        assert!(seen.get(&end).is_some_and(|times| *times > 100), "{end:#x}: {seen:?}");
    }
}

#[test]
fn what_is_not_to_be_recorded_is_not_and_what_stalls_says_so() {
    let ram = Ram::new(LIMIT);
    let event = |bits: u64, root: u64| {
        let third = geometry(12, 40, 3) | bits;
        let Ok(Stream::Second(stage)) = decode([V | SECOND, 0, third, root]) else { panic!("well-formed") };
        let typed = stage.of::<Second<12, 40>>().expect("its format");
        let about = (Access::Fetch, Mode::Privileged);
        let fault =
            typed.translate(&ram, Input(0x1234_5678), about, Marks::Set).expect_err("nothing is there");
        stage.event(&fault, about.0, about.1)
    };
    assert_eq!(event(0, ROOT), None);
    let recorded = event(1 << 58, ROOT).expect("S2R");
    assert_eq!((recorded.reason, recorded.stalled), (Reason::Translation, false));
    // PnU, InD, RnW, S2 and CLASS 2.
    let about = 1 << 33 | 1 << 34 | 1 << 35 | 1 << 39 | 2 << 40;
    assert_eq!(recorded.words(0x42), [0x42_0000_0010, about, 0x1234_5678, 0x1234_5000]);
    let stalled = event(1 << 57, ROOT).expect("S2S");
    assert_eq!(stalled.words(0)[1], about | 1 << 31);
    let unread: Event = event(0, LIMIT).expect("an abort of the walk's own is always recorded");
    assert_eq!(unread.words(0), [0x0b, about, 0x1234_5678, LIMIT]);
}
