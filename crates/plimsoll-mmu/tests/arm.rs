//! Arm: shapes of trees, every combination of rights against the manual's sentences, faults by stage, memory types.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram};
use plimsoll_mmu::arm::{
    self, Attributes, Caching, Control, Device, Kind, Mode, Registers, SecondRegisters, Stage,
};
use plimsoll_mmu::format::arm::{Caps, Lower, Second, Upper};
use plimsoll_mmu::nested::{self, Counted, GuestMemory, Nested, Purpose, SecondStage};
use plimsoll_mmu::{
    Access, Entry, Feature, Format, Input, Level, Malformed, Marks, Memory, Output, Permissions,
    Shareability, Unencodable,
};
use proptest::prelude::*;

const PAGE: u64 = 3;
const BLOCK: u64 = 1;
const USER: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const INNER: u64 = 3 << 8;
const AF: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
const PXN: u64 = 1 << 53;
const UXN: u64 = 1 << 54;
const S2_READ: u64 = 1 << 6;
const S2_WRITE: u64 = 1 << 7;
const WRITE_BACK: u64 = 0xf << 2;
/// A page of the second stage that anyone may use for anything.
const S2_OPEN: u64 = PAGE | S2_READ | S2_WRITE | WRITE_BACK | INNER | AF;

const ACCESSES: [Access; 3] = [Access::Read, Access::Write, Access::Fetch];
const MODES: [Mode; 2] = [Mode::User, Mode::Privileged];
const PLAIN: Caps = Caps { dirty_management: Feature::Off, ..Caps::FULL };

fn registers(root: u64) -> Registers {
    Registers {
        root: Output(root),
        control: Control::empty(),
        access_flag: Feature::On,
        hierarchy_off: Feature::Off,
        caps: PLAIN,
    }
}

#[test]
fn trees_have_the_shapes_that_the_manual_tabulates() {
    fn shape<F: Format>() -> (u8, u64) {
        (F::LEVELS, F::entries(F::root()))
    }
    // D8.2: initial levels and their entries.
    assert_eq!(shape::<Lower<12, 48>>(), (4, 512));
    assert_eq!(shape::<Lower<12, 39>>(), (3, 512));
    assert_eq!(shape::<Lower<12, 42>>(), (4, 8));
    assert_eq!(shape::<Upper<14, 48>>(), (4, 2));
    assert_eq!(shape::<Lower<14, 47>>(), (3, 2048));
    assert_eq!(shape::<Lower<16, 48>>(), (3, 64));
    assert_eq!(shape::<Lower<16, 42>>(), (2, 8192));
    // The second stage joins up to 16 roots rather than have one more level.
    assert_eq!(shape::<Second<12, 40>>(), (3, 1024));
    assert_eq!(shape::<Second<12, 43>>(), (3, 8192));
    assert_eq!(shape::<Second<12, 44>>(), (4, 32));
    assert_eq!(shape::<Second<12, 48>>(), (4, 512));
    assert_eq!(shape::<Second<14, 48>>(), (3, 4096));
    assert_eq!(shape::<Second<16, 44>>(), (2, 32768));
    assert!(Upper::<12, 48>::accepts(Input(0xffff_0000_0000_0000)) && !Upper::<12, 48>::accepts(Input(0)));
    assert_eq!(Upper::<12, 48>::extend(0x1000), Input(0xffff_0000_0000_1000));
}

fn round_trip<F: Format<Caps = Caps>>(raw: u64, level: Level, caps: &Caps) {
    let entry = F::decode(raw, level, caps);
    match F::encode(&entry, level, caps) {
        Ok(word) => assert_eq!(word, raw, "{} {level} {caps:?} {entry:?}", F::NAME),
        // Bits that the manual reserves, and faults: read, and not written.
        Err(Unencodable::Kind) => assert!(matches!(entry, Entry::Malformed(_)), "{level} {raw:#x} {entry:?}"),
        Err(Unencodable::Software(bits)) => assert!(raw & bits == bits && bits != 0, "{level} {raw:#x}"),
        Err(Unencodable::Memory(Memory::Mair(_, share) | Memory::MemAttr(_, share))) => {
            assert_eq!((share, raw >> 8 & 3), (Shareability::Reserved, 1));
        }
        Err(error) => panic!("{} {level} {raw:#x} {entry:?}: {error}", F::NAME),
    }
}

fn round_trip_everywhere(raw: u64) {
    let weak = Caps {
        physical_bits: 40,
        dirty_management: Feature::Off,
        separate_execute: Feature::Off,
        ..Caps::FULL
    };
    for caps in [Caps::FULL, PLAIN, weak] {
        for level in (1..=4).map(Level) {
            round_trip::<Lower<12, 48>>(raw, level, &caps);
            round_trip::<Upper<14, 48>>(raw, level, &caps);
            round_trip::<Second<12, 48>>(raw, level, &caps);
            if level == Level::PAGES {
                // A root of 64 entries, where the contiguous hint would join 128.
                round_trip::<Second<14, 20>>(raw, level, &caps);
            }
            if level.0 < 4 {
                round_trip::<Lower<12, 31>>(raw, level, &caps);
                round_trip::<Lower<16, 48>>(raw, level, &caps);
                round_trip::<Second<14, 48>>(raw, level, &caps);
                round_trip::<Second<16, 48>>(raw, level, &caps);
            }
        }
    }
}

#[test]
fn every_combination_of_attributes_reads_and_writes_back() {
    for low in 0..1 << 12 {
        for high in [0, DBM, CONTIGUOUS, PXN, UXN, PXN | UXN, DBM | 1 << 55, 0x1ff << 55, 1 << 50, 1 << 62] {
            round_trip_everywhere(high | low | 0x8000_0000);
        }
    }
}

proptest! {
    #[test]
    fn every_word_reads_and_writes_back(raw: u64) {
        round_trip_everywhere(raw);
        round_trip_everywhere(raw | 3);
    }

    #[test]
    fn a_word_with_three_clear_bits_is_absent(raw: u64, level in 1..=4u8) {
        let raw = raw & !7;
        prop_assert_eq!(Second::<12, 48>::decode(raw, Level(level), &Caps::FULL), Entry::Absent { software: raw });
    }
}

#[test]
fn what_was_written_stays_dirty_when_it_may_be_written_no_longer() {
    let leaf = |raw| match Lower::<12, 48>::decode(raw, Level::PAGES, &Caps::FULL) {
        Entry::Leaf(leaf) => leaf,
        other => panic!("{other:?}"),
    };
    let clean = leaf(PAGE | DBM | READ_ONLY | AF);
    assert!(clean.permissions.contains(Permissions::WRITE) && !clean.dirty);
    let mut written = leaf(PAGE | DBM | AF);
    assert!(written.permissions.contains(Permissions::WRITE) && written.dirty);
    written.permissions.remove(Permissions::WRITE);
    let word = Lower::<12, 48>::encode(&Entry::Leaf(written), Level::PAGES, &Caps::FULL);
    let Ok(word) = word else { panic!("{word:?}") };
    assert_eq!(word & (DBM | READ_ONLY), READ_ONLY, "hardware must not make it writable again");
    assert!(leaf(word).dirty && !leaf(word).permissions.contains(Permissions::WRITE));
}

#[test]
fn blocks_are_where_the_granule_has_them() {
    fn maps<F: Format<Caps = Caps>>(level: u8) -> bool {
        match F::decode(BLOCK | AF, Level(level), &Caps::FULL) {
            Entry::Leaf(_) => true,
            Entry::Malformed(Malformed::LeafAtThisLevel) => false,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!([2, 3, 4].map(maps::<Lower<12, 48>>), [true, true, false]);
    assert_eq!([2, 3, 4].map(maps::<Lower<14, 48>>), [true, false, false]);
    assert_eq!([2, 3].map(maps::<Lower<16, 48>>), [true, false]);
    // A page without bit 1 is no page.
    assert!(!maps::<Lower<12, 48>>(1));
    let groups = [(12, 1, 16), (12, 2, 16), (14, 1, 128), (14, 2, 32), (16, 1, 32), (16, 2, 32)];
    for (granule, level, expected) in groups {
        let raw = CONTIGUOUS | AF | if level == 1 { PAGE } else { BLOCK };
        let entry = match granule {
            12 => Lower::<12, 48>::decode(raw, Level(level), &PLAIN),
            14 => Lower::<14, 48>::decode(raw, Level(level), &PLAIN),
            _ => Lower::<16, 48>::decode(raw, Level(level), &PLAIN),
        };
        let Entry::Leaf(leaf) = entry else { panic!("{entry:?}") };
        let alone = granule + (granule - 3) * u32::from(level - 1);
        assert_eq!(1 << (leaf.shift - alone), expected, "granule 2^{granule}, level {level}");
    }
}

/// Four tables of 4 KiB from `root` on, the last with `leaf` for the address 0x7000.
fn chain(ram: &Ram, root: u64, leaf: u64) {
    for level in 0..3 {
        ram.set(root + level * 0x1000, (root + (level + 1) * 0x1000) | PAGE);
    }
    ram.set(root + 3 * 0x1000 + 7 * 8, leaf);
}

#[test]
fn rights_are_the_manuals_for_every_leaf_access_mode_and_control_bit() {
    let mut cases = 0;
    for bits in 0..16u64 {
        let flag = |number: u64, bit| if bits >> number & 1 != 0 { bit } else { 0 };
        let leaf = 0x9000 | PAGE | AF | flag(0, USER) | flag(1, READ_ONLY) | flag(2, PXN) | flag(3, UXN);
        // APTable, UXNTable, PXNTable in the table of the highest level.
        for upper in (0..16u64).map(|bits| bits << 59) {
            for control in (0..8).map(Control::from_bits_truncate) {
                for hierarchy_off in [Feature::On, Feature::Off] {
                    for access in ACCESSES {
                        for mode in MODES {
                            let ram = Ram::new(1 << 20);
                            chain(&ram, 0x1000, leaf);
                            ram.set(0x1000, 0x2000 | PAGE | upper);
                            let registers = Registers { control, hierarchy_off, ..registers(0x1000) };
                            let how = (access, mode);
                            let walked = arm::walk::<Lower<12, 48>, _>(
                                &ram,
                                &registers,
                                Input(0x7008),
                                how,
                                Marks::Set,
                            );
                            let upper = if hierarchy_off == Feature::On { 0 } else { upper };
                            let expected = expected(leaf, upper, control, access, mode);
                            match walked {
                                Ok(walked) => {
                                    assert!(expected, "{leaf:#x} {upper:#x} {control:?} {how:?}");
                                    assert_eq!(walked.output, Output(0x9008));
                                }
                                Err(fault) => {
                                    assert!(!expected, "{leaf:#x} {upper:#x} {control:?} {how:?}");
                                    assert_eq!((fault.kind, fault.status()), (Kind::Permission, 0b00_1111));
                                }
                            }
                            cases += 1;
                        }
                    }
                }
            }
        }
    }
    assert_eq!(cases, 16 * 16 * 8 * 2 * 6);
}

/// D8.4.1, from the bits of the leaf and the table above it: AP\[2:1\] after APTable, then PXN and UXN, WXN, PAN.
fn expected(leaf: u64, upper: u64, control: Control, access: Access, mode: Mode) -> bool {
    let no_user = upper >> 61 & 1 != 0;
    let no_write = upper >> 62 & 1 != 0;
    let ap1 = leaf & USER != 0 && !no_user;
    let ap2 = leaf & READ_ONLY != 0 || no_write;
    let pxn = leaf & PXN != 0 || upper >> 59 & 1 != 0;
    let uxn = leaf & UXN != 0 || upper >> 60 & 1 != 0;
    let (wxn, pan, epan) =
        (control.contains(Control::WXN), control.contains(Control::PAN), control.contains(Control::EPAN));
    let (user_writes, privileged_writes) = (ap1 && !ap2, !ap2);
    match (mode, access) {
        (Mode::User, Access::Read) => ap1,
        (Mode::User, Access::Write) => user_writes,
        (Mode::User, Access::Fetch) => !(uxn || wxn && user_writes),
        (Mode::Privileged, Access::Fetch) => !(pxn || user_writes || wxn && privileged_writes),
        (Mode::Privileged, data) => {
            !(pan && (ap1 || (epan && !uxn))) && (data == Access::Read || privileged_writes)
        }
    }
}

#[test]
fn the_access_flag_and_dirty_state_are_hardwares_or_a_fault() {
    let ram = Ram::new(1 << 20);
    let leaf = 0x9000 | PAGE | USER | READ_ONLY | DBM;
    chain(&ram, 0x1000, leaf);
    let walk = |registers: Registers, access| {
        arm::walk::<Lower<12, 48>, _>(&ram, &registers, Input(0x7000), (access, Mode::User), Marks::Set)
            .map(|walked| walked.output)
            .map_err(|fault| (fault.kind, fault.status()))
    };
    let software = Registers { access_flag: Feature::Off, ..registers(0x1000) };
    assert_eq!(walk(software, Access::Read), Err((Kind::AccessFlag, 0b00_1011)));
    assert_eq!(walk(registers(0x1000), Access::Write), Err((Kind::Permission, 0b00_1111)));
    assert_eq!(ram.get(0x4000 + 7 * 8), leaf);
    assert!(walk(registers(0x1000), Access::Read).is_ok());
    assert_eq!(ram.get(0x4000 + 7 * 8), leaf | AF);
    let managed = Registers { caps: Caps::FULL, ..registers(0x1000) };
    assert!(walk(managed, Access::Write).is_ok());
    assert_eq!(ram.get(0x4000 + 7 * 8), (leaf | AF) & !READ_ONLY);
}

#[test]
fn entries_that_the_crate_would_not_write_are_marked_all_the_same() {
    // An address bit below the block's size, and a shareability that is reserved: hardware passes over both.
    for odd in [1 << 13, 1 << 8] {
        let ram = Ram::new(1 << 40);
        ram.set(0x1000, 0x2000 | PAGE);
        let leaf = 0x20_0000 | BLOCK | READ_ONLY | DBM | odd;
        ram.set(0x2000, leaf);
        let caps = Caps { dirty_management: Feature::On, ..PLAIN };
        let registers = Registers { caps, ..registers(0x1000) };
        let walked = arm::walk::<Lower<12, 39>, _>(
            &ram,
            &registers,
            Input(0x10),
            (Access::Write, Mode::Privileged),
            Marks::Set,
        );
        assert_eq!(walked.map(|walked| walked.output), Ok(Output(0x20_0010)), "{odd:#x}");
        assert_eq!(ram.get(0x2000), (leaf | AF) & !READ_ONLY, "{odd:#x}");
    }
}

#[test]
fn a_fault_has_the_level_of_the_entry_that_is_to_blame() {
    let walk = |change: &dyn Fn(&Ram), input| {
        let ram = Ram::new(1 << 20);
        chain(&ram, 0x1000, 0x9000 | PAGE | AF | USER);
        change(&ram);
        let small = Registers { caps: Caps { physical_bits: 36, ..PLAIN }, ..registers(0x1000) };
        arm::walk::<Lower<12, 48>, _>(&ram, &small, Input(input), (Access::Read, Mode::User), Marks::Set)
            .map(|walked| walked.output.0)
            .map_err(|fault| (fault.kind, fault.status()))
    };
    assert_eq!(walk(&|_| {}, 0x7000), Ok(0x9000));
    assert_eq!(walk(&|_| {}, 1 << 48), Err((Kind::Translation, 0b00_0100)));
    assert_eq!(walk(&|ram| ram.set(0x2000, 0), 0x7000), Err((Kind::Translation, 0b00_0101)));
    assert_eq!(walk(&|ram| ram.set(0x1000, BLOCK | AF), 0x7000), Err((Kind::Translation, 0b00_0100)));
    assert_eq!(
        walk(&|ram| ram.set(0x4038, 0x9000 | BLOCK | AF), 0x7000),
        Err((Kind::Translation, 0b00_0111))
    );
    assert_eq!(walk(&|ram| ram.set(0x3000, 1 << 36 | PAGE), 0x7000), Err((Kind::AddressSize, 0b00_0010)));
    assert_eq!(walk(&|ram| ram.set(0x3000, 1 << 35 | PAGE), 0x7000), Err((Kind::External, 0b01_0111)));
}

/// The second stage, of 4 KiB and four levels, from 1 MiB on: guest page n is at 2 MiB + n pages. The guest's four tables
/// are at guest address 0x1000, and map 0x7000 to 0x9000.
fn two_stages(page: impl Fn(u64) -> u64) -> Ram {
    let ram = Ram::new(1 << 30);
    chain(&ram, 0x10_0000, 0);
    for number in 0..16 {
        ram.set(0x10_3000 + number * 8, page(number));
    }
    let guest = Ram::new(1 << 20);
    chain(&guest, 0x1000, 0x9000 | PAGE | AF | USER | 1 << 11);
    for (at, word) in guest.image() {
        ram.set(0x20_0000 + at, word);
    }
    ram
}

fn open(page: u64) -> u64 {
    (0x20_0000 + page * 0x1000) | S2_OPEN
}

fn second_registers() -> SecondRegisters {
    SecondRegisters {
        root: Output(0x10_0000),
        access_flag: Feature::On,
        protected_walks: Feature::Off,
        forced_write_back: Feature::Off,
        caps: Caps::FULL,
    }
}

type Answer = Result<Nested, arm::TwoStageFault<Outside>>;

fn through(ram: &Ram, second: SecondRegisters, (access, mode): (Access, Mode)) -> (Answer, u64) {
    let counted = Counted::new(ram);
    let second = Stage::<Second<12, 48>, _>::new(&counted, second, mode);
    let guest = GuestMemory { second, memory: &counted };
    let answer = nested::walk(&guest, access, |memory| {
        arm::walk::<Lower<12, 48>, _>(memory, &registers(0x1000), Input(0x7010), (access, mode), Marks::Set)
    });
    (answer, counted.reads())
}

#[test]
fn four_levels_over_four_take_24_reads_and_over_two_less() {
    let (answer, reads) = through(&two_stages(open), second_registers(), (Access::Write, Mode::User));
    assert_eq!((answer.map(|nested| nested.second.output), reads), (Ok(Output(0x20_9010)), 24));
    // 64 KiB granule, 44-bit addresses: two levels, of which the first has 32768 entries.
    let ram = Ram::new(1 << 30);
    ram.set(0x10_0000, 0x14_0000 | PAGE);
    ram.set(0x14_0000, 0x20_0000 | S2_OPEN);
    let guest = two_stages(open);
    for (at, word) in guest.image().range(0x20_0000..) {
        ram.set(*at, *word);
    }
    let counted = Counted::new(&ram);
    let second = Stage::<Second<16, 44>, _>::new(&counted, second_registers(), Mode::User);
    let memory = GuestMemory { second, memory: &counted };
    let answer = nested::walk(&memory, Access::Read, |memory| {
        let how = (Access::Read, Mode::User);
        arm::walk::<Lower<12, 48>, _>(memory, &registers(0x1000), Input(0x7010), how, Marks::Leave)
    });
    assert_eq!(answer.map(|nested| nested.second.output), Ok(Output(0x20_9010)));
    assert_eq!(counted.reads(), (4 + 1) * (2 + 1) - 1);
}

#[test]
fn a_fault_of_the_second_stage_says_whether_it_was_a_walk() {
    let ram = two_stages(|page| if page == 3 { open(page) & !S2_READ } else { open(page) });
    let (Err(fault), _) = through(&ram, second_registers(), (Access::Read, Mode::User)) else {
        panic!("page 3")
    };
    let Some(second) = arm::second_fault(&fault) else { panic!("{fault:?}") };
    assert_eq!((second.on_a_walk(), second.fault.status(), second.hpfar()), (true, 0b00_1111, 3 << 4));
    let ram = two_stages(|page| if page == 9 { 0 } else { open(page) });
    let (Err(fault), _) = through(&ram, second_registers(), (Access::Write, Mode::User)) else {
        panic!("page 9")
    };
    // The guest's own rights are judged first: its page is writable, so it is the second stage that refuses.
    let Some(second) = arm::second_fault(&fault) else { panic!("{fault:?}") };
    assert_eq!((second.on_a_walk(), second.fault.status(), second.hpfar()), (false, 0b00_0111, 9 << 4));
}

#[test]
fn who_executes_is_told_apart_by_the_second_stage() {
    // XN[1:0]: 00 all, 01 users, 10 nobody, 11 privileged code (D8.4.5).
    for (number, users, privileged) in
        [(0, true, true), (1, true, false), (2, false, false), (3, false, true)]
    {
        let page = |page| open(page) | if page == 9 { number << 53 } else { 0 };
        let ram = two_stages(page);
        let fetch = |mode| {
            let how = (Access::Fetch, mode);
            // The guest's own page is a user's and writable, which privileged code never executes: make it read-only.
            ram.set(0x20_0000 + 0x4000 + 7 * 8, 0x9000 | PAGE | AF | READ_ONLY | USER);
            through(&ram, second_registers(), how).0.is_ok()
        };
        assert_eq!((fetch(Mode::User), fetch(Mode::Privileged)), (users, privileged), "XN {number}");
    }
}

#[test]
fn a_guests_tables_in_a_devices_memory_are_refused_if_so_asked() {
    let ram = two_stages(|page| if page == 2 { open(page) & !WRITE_BACK } else { open(page) });
    let how = (Access::Read, Mode::User);
    assert!(through(&ram, second_registers(), how).0.is_ok());
    let protected = SecondRegisters { protected_walks: Feature::On, ..second_registers() };
    let (Err(fault), _) = through(&ram, protected, how) else { panic!("HCR_EL2.PTW") };
    let second = arm::second_fault(&fault).map(|fault| (fault.on_a_walk(), fault.fault.kind));
    assert_eq!(second, Some((true, Kind::Permission)));
}

#[test]
fn joined_roots_are_one_table() {
    let ram = Ram::new(1 << 30);
    // Second<12, 40>: two roots of 4 KiB, the second for addresses from 512 GiB on.
    ram.set(0x10_1000, 0x10_2000 | PAGE);
    ram.set(0x10_2000, 0x4000_0000 | BLOCK | S2_OPEN & !2);
    let stage = Stage::<Second<12, 40>, _>::new(&ram, second_registers(), Mode::User);
    let at =
        |input| stage.translate(Input(input), Access::Read, Purpose::Final).map(|walked| walked.output.0);
    assert_eq!(at(1 << 39 | 0x1234).ok(), Some(0x4000_1234));
    assert!(at(0x1234).is_err());
}

#[test]
fn memory_types_combine_to_the_stricter_and_write_back_is_forced() {
    use Caching::{NonCacheable, WriteBack, WriteThrough};
    let normal = |caching| Attributes::Normal { inner: caching, outer: caching };
    let first = [
        (0x00, Attributes::Device(Device::NGnRnE)),
        (0x04, Attributes::Device(Device::NGnRE)),
        (0x08, Attributes::Device(Device::NGRE)),
        (0x0c, Attributes::Device(Device::Gre)),
        (0x44, normal(NonCacheable)),
        (0xbb, normal(WriteThrough)),
        (0xff, normal(WriteBack)),
    ];
    let second = [
        (0, Attributes::Device(Device::NGnRnE)),
        (1, Attributes::Device(Device::NGnRE)),
        (2, Attributes::Device(Device::NGRE)),
        (3, Attributes::Device(Device::Gre)),
        (0b0101, normal(NonCacheable)),
        (0b1010, normal(WriteThrough)),
        (0b1111, normal(WriteBack)),
    ];
    // The lists go from the strictest to the weakest, so that what is combined is the one that comes first.
    for (own, (mair, attributes)) in first.iter().enumerate() {
        assert_eq!(Attributes::first(*mair), Some(*attributes));
        for (hosts, (number, limit)) in second.iter().enumerate() {
            assert_eq!(Attributes::second(*number, Feature::Off), Some(*limit));
            let combined = attributes.combine(*limit, Feature::Off);
            assert_eq!(combined, first[own.min(hosts)].1, "{mair:#x} with {number}");
        }
        // FWB (D8.6.6): 7 leaves the guest's, 6 forces write-back, 5 makes normal memory uncached, 1 is a device.
        let forced = |number| {
            Attributes::second(number, Feature::On).map(|second| attributes.combine(second, Feature::On))
        };
        assert_eq!(forced(7), Some(*attributes));
        assert_eq!(forced(6), Some(normal(WriteBack)));
        assert_eq!(forced(5), Some(first[own.min(4)].1));
        assert_eq!(forced(1), Some(first[own.min(1)].1));
    }
    for reserved in [4, 8, 9, 12] {
        let read = Attributes::second(reserved, Feature::On);
        assert_eq!(read, None, "MemAttr {reserved} under FWB");
    }
    assert_eq!(Attributes::second(0b0100, Feature::Off), None);
    assert_eq!((Attributes::first(0x01), Attributes::first(0x40)), (None, None));
    let (non, inner, outer) = (Shareability::Non, Shareability::Inner, Shareability::Outer);
    assert_eq!(normal(WriteBack).shareability(non, inner), inner);
    assert_eq!(normal(WriteBack).shareability(outer, inner), outer);
    assert_eq!(normal(WriteBack).shareability(non, non), non);
    assert_eq!(normal(NonCacheable).shareability(non, non), outer);
}
