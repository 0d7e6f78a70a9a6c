//! Words and what they say: back and forth without loss, each bit by itself, and against another's reading of them.
use plimsoll_mmu::format::ept::{self, Ept};
use plimsoll_mmu::format::riscv::{self, Sv39, Sv39x4, Sv48, Sv48x4, Sv57, Sv57x4};
use plimsoll_mmu::format::x86::{self, Long4, Long5, Maker, Npt};
use plimsoll_mmu::{
    Access, Cache, Entry, Feature, Format, GuestPat, Input, Leaf, Level, Malformed, Memory, Output, Pat,
    Permissions, Span, Table, Unencodable,
};
use proptest::prelude::*;

/// What is read is written back as the same word, unless the hardware refuses it or nobody could use it.
fn round_trip<F: Format>(raw: u64, level: Level, caps: &F::Caps) {
    let entry = F::decode(raw, level, caps);
    match F::encode(&entry, level, caps) {
        Ok(word) => assert_eq!(word, raw, "{} {level} {entry:?}", F::NAME),
        Err(Unencodable::Kind) => {
            assert!(matches!(entry, Entry::Malformed(_)), "{} {level} {entry:?}", F::NAME)
        }
        Err(Unencodable::Permissions(permissions)) => assert!(!permissions.contains(Permissions::USER)),
        Err(error) => panic!("{} {level} {raw:#x} {entry:?}: {error}", F::NAME),
    }
}

/// An access marks an entry, and nothing else of it changes.
fn marks<F: Format>(raw: u64, level: Level, caps: &F::Caps) {
    for access in [Access::Read, Access::Write, Access::Fetch] {
        let marked = F::decode(F::marked(raw, level, caps, access), level, caps);
        let expected = match F::decode(raw, level, caps) {
            Entry::Table(table) => Entry::Table(Table { accessed: true, ..table }),
            Entry::Leaf(leaf) => {
                Entry::Leaf(Leaf { accessed: true, dirty: leaf.dirty || access == Access::Write, ..leaf })
            }
            _ => continue,
        };
        assert_eq!(marked, expected, "{} {level} {raw:#x} {access:?}", F::NAME);
    }
}

const WEAK_X86: x86::Caps = x86::Caps {
    physical_bits: 36,
    gib_pages: Feature::Off,
    no_execute: Feature::Off,
    keys: Feature::Off,
    maker: Maker::Amd,
};
const WEAK_EPT: ept::Caps = ept::Caps {
    physical_bits: 36,
    execute_only: Feature::Off,
    largest_leaf: Level(1),
    accessed_dirty: Feature::Off,
};
const WEAK_RISCV: riscv::Caps = riscv::Caps { napot: Feature::Off, memory_types: Feature::Off };

fn round_trip_everywhere(raw: u64) {
    for level in (1..=5).map(Level) {
        for caps in [x86::Caps::FULL, WEAK_X86] {
            round_trip::<Long5>(raw, level, &caps);
            marks::<Long5>(raw, level, &caps);
            if level.0 < 5 {
                round_trip::<Long4>(raw, level, &caps);
                round_trip::<Npt>(raw, level, &caps);
            }
        }
        for caps in [ept::Caps::FULL, WEAK_EPT] {
            if level.0 < 5 {
                round_trip::<Ept>(raw, level, &caps);
            }
        }
        for caps in [riscv::Caps::FULL, WEAK_RISCV] {
            round_trip::<Sv57>(raw, level, &caps);
            round_trip::<Sv57x4>(raw, level, &caps);
            if level.0 < 5 {
                round_trip::<Sv48>(raw, level, &caps);
                round_trip::<Sv48x4>(raw, level, &caps);
            }
            if level.0 < 4 {
                round_trip::<Sv39>(raw, level, &caps);
                round_trip::<Sv39x4>(raw, level, &caps);
            }
        }
    }
}

#[test]
fn every_combination_of_the_low_bits_reads_and_writes_back() {
    for low in 0..1 << 13 {
        for high in [0, 1 << 63, 1 << 62, 3 << 61, 0x7ff << 52, 1 << 54, 1 << 51, 1 << 40, 1 << 30, 1 << 21] {
            round_trip_everywhere(high | low);
        }
    }
}

#[test]
fn every_combination_of_the_high_bits_reads_and_writes_back() {
    for high in 0..1 << 12 {
        for low in [0, 1, 3, 7, 0x0f, 0xe7, 0x63, 0xcf, 0x237, 1 << 13] {
            round_trip_everywhere(high << 52 | low);
        }
    }
}

proptest! {
    #[test]
    fn every_word_reads_and_writes_back(raw: u64) {
        round_trip_everywhere(raw);
    }

    #[test]
    fn a_word_with_three_clear_bits_is_absent_in_every_format(raw: u64, level in 1..=3u8) {
        let (raw, level) = (raw & !7, Level(level));
        let absent = Entry::Absent { software: raw };
        prop_assert_eq!(Long4::decode(raw, level, &x86::Caps::FULL), absent);
        prop_assert_eq!(Ept::decode(raw, level, &ept::Caps::FULL), absent);
        prop_assert_eq!(Sv39::decode(raw, level, &riscv::Caps::FULL), absent);
    }

    /// The crate `x86_64` reads the same flags and addresses out of page entries.
    #[test]
    fn x86_pages_are_what_the_crate_x86_64_reads(raw: u64) {
        use x86_64::structures::paging::{PageTableFlags as Flags, page_table::PageTableEntry};
        let mut theirs = PageTableEntry::new();
        let address = raw & 0x000f_ffff_ffff_f000;
        theirs.set_addr(x86_64::PhysAddr::new(address), Flags::from_bits_truncate(raw & !address | 1));
        let flags = theirs.flags();
        // A word of ours with the bits that they took over.
        let word = address | flags.bits();
        let Entry::Leaf(leaf) = Long4::decode(word, Level::PAGES, &x86::Caps::FULL) else {
            panic!("{word:#x} maps a page");
        };
        prop_assert_eq!(leaf.output.0, theirs.addr().as_u64());
        prop_assert_eq!(leaf.permissions.contains(Permissions::WRITE), flags.contains(Flags::WRITABLE));
        prop_assert_eq!(leaf.permissions.contains(Permissions::USER), flags.contains(Flags::USER_ACCESSIBLE));
        prop_assert_eq!(leaf.permissions.contains(Permissions::EXECUTE), !flags.contains(Flags::NO_EXECUTE));
        prop_assert_eq!(leaf.accessed, flags.contains(Flags::ACCESSED));
        prop_assert_eq!(leaf.dirty, flags.contains(Flags::DIRTY));
        prop_assert_eq!(leaf.global, flags.contains(Flags::GLOBAL));
        let pat = u8::from(flags.contains(Flags::WRITE_THROUGH)) | u8::from(flags.contains(Flags::NO_CACHE)) << 1
            | u8::from(flags.contains(Flags::HUGE_PAGE)) << 2;
        prop_assert_eq!(leaf.memory, Memory::Pat(pat), "at level 1 their HUGE_PAGE is PAT");
    }
}

fn reserved<F: Format>(raw: u64, level: u8, caps: &F::Caps) -> u64 {
    match F::decode(raw, Level(level), caps) {
        Entry::Malformed(Malformed::Reserved(bits)) => bits,
        _ => 0,
    }
}

#[test]
fn x86_reserves_what_the_manual_reserves() {
    let full = x86::Caps::FULL;
    let narrow = x86::Caps { physical_bits: 39, ..full };
    for bit in 12..52 {
        let word = 1 | 1 << bit;
        assert_eq!(
            reserved::<Long4>(word, 1, &narrow),
            if bit >= 39 { 1 << bit } else { 0 },
            "page, bit {bit}"
        );
        assert_eq!(
            reserved::<Long4>(word, 4, &narrow),
            if bit >= 39 { 1 << bit } else { 0 },
            "table, bit {bit}"
        );
        let large = word | 1 << 7;
        assert_eq!(
            reserved::<Long4>(large, 2, &full),
            if (13..21).contains(&bit) { 1 << bit } else { 0 },
            "2M, {bit}"
        );
        assert_eq!(
            reserved::<Long4>(large, 3, &full),
            if (13..30).contains(&bit) { 1 << bit } else { 0 },
            "1G, {bit}"
        );
    }
    assert_eq!(reserved::<Long4>(1 | 1 << 7, 4, &full), 1 << 7, "PS in a PML4E");
    assert_eq!(reserved::<Long5>(1 | 1 << 7, 5, &full), 1 << 7, "PS in a PML5E");
    assert_eq!(reserved::<Long4>(1 | 1 << 8, 4, &full), 0, "Intel ignores bit 8 of a PML4E");
    assert_eq!(
        reserved::<Long4>(1 | 1 << 8, 4, &x86::Caps { maker: Maker::Amd, ..full }),
        1 << 8,
        "AMD does not"
    );
    assert_eq!(
        reserved::<Long4>(1 | 1 << 8, 3, &x86::Caps { maker: Maker::Amd, ..full }),
        0,
        "in a PDPTE it does"
    );
    let small = x86::Caps { gib_pages: Feature::Off, ..full };
    assert_eq!(reserved::<Long4>(1 | 1 << 7, 3, &small), 1 << 7, "PS in a PDPTE without 1 GiB pages");
    let executable = x86::Caps { no_execute: Feature::Off, ..full };
    assert_eq!(reserved::<Long4>(1 | 1 << 63, 1, &executable), 1 << 63, "XD without EFER.NXE");
    assert_eq!(reserved::<Long4>(u64::MAX - 1, 1, &narrow), 0, "nothing is reserved in an absent entry");
}

#[test]
fn ept_is_misconfigured_where_the_manual_says_so() {
    let full = ept::Caps::FULL;
    let weak = ept::Caps { execute_only: Feature::Off, ..full };
    for level in (1..=4).map(Level) {
        let says = |raw, caps| match Ept::decode(raw, level, caps) {
            Entry::Malformed(reason) => Some(reason),
            _ => None,
        };
        assert_eq!(says(0b010, &full), Some(Malformed::WriteWithoutRead));
        assert_eq!(says(0b110, &full), Some(Malformed::WriteWithoutRead));
        assert_eq!(says(0b100, &full), None);
        assert_eq!(says(0b100, &weak), Some(Malformed::ExecuteWithoutRead));
    }
    for number in 0..8 {
        let leaf = Ept::decode(0b111 | number << 3, Level(1), &full);
        let refused = [2, 3, 7].contains(&number);
        assert_eq!(matches!(leaf, Entry::Malformed(Malformed::MemoryType(_))), refused, "type {number}");
        let table = reserved::<Ept>(0b111 | number << 3, 2, &full);
        assert_eq!(table, number << 3, "a table has no type");
    }
    assert_eq!(reserved::<Ept>(0b111 | 1 << 6, 3, &full), 1 << 6, "nor does it ignore a PAT");
    assert_eq!(reserved::<Ept>(0b111 | 1 << 7, 4, &full), 1 << 7, "a PML4E maps no page");
    let small = ept::Caps { largest_leaf: Level(2), ..full };
    assert_eq!(reserved::<Ept>(0b111 | 1 << 7, 3, &small), 1 << 7, "1 GiB pages are a capability");
    for bit in 12..21 {
        assert_eq!(reserved::<Ept>(0b111 | 1 << 7 | 1 << bit, 2, &full), 1 << bit, "2 MiB alignment, {bit}");
    }
    let Entry::Leaf(leaf) = Ept::decode(0b111 | 6 << 3 | 1 << 6, Level(1), &full) else { panic!("a page") };
    assert_eq!(leaf.memory, Memory::Ept(Cache::WriteBack, GuestPat::Ignored));
    let Entry::Leaf(leaf) = Ept::decode(0b111 | 3 << 8, Level(1), &WEAK_EPT) else { panic!("a page") };
    assert_eq!(
        (leaf.accessed, leaf.dirty, leaf.software),
        (false, false, 3 << 8),
        "without A/D they are software's"
    );
}

#[test]
fn riscv_faults_on_what_is_reserved_and_joins_sixteen_pages() {
    let full = riscv::Caps::FULL;
    const RWX: u64 = 0b1111;
    for bit in 54..61 {
        assert_eq!(reserved::<Sv39>(RWX | 1 << bit, 1, &full), 1 << bit);
    }
    for bit in [4, 6, 7, 61, 62, 63] {
        assert_eq!(reserved::<Sv39>(1 | 1 << bit, 2, &full), 1 << bit, "bit {bit} of a table");
    }
    assert_eq!(Sv39::decode(1, Level(1), &full), Entry::Malformed(Malformed::TableAtLastLevel));
    assert_eq!(Sv39::decode(0b101, Level(1), &full), Entry::Malformed(Malformed::WriteWithoutRead));
    assert_eq!(Sv39::decode(RWX | 3 << 61, Level(1), &full), Entry::Malformed(Malformed::MemoryType(3)));
    assert_eq!(reserved::<Sv39>(RWX | 1 << 61, 1, &WEAK_RISCV), 1 << 61, "PBMT without Svpbmt");
    assert_eq!(reserved::<Sv39>(RWX | 1 << 10, 2, &full), 1 << 10, "a superpage that is not aligned");
    // Svnapot: only 1000 in the lowest PPN bits is a size.
    for low in 0..16 {
        let entry = Sv39::decode(RWX | 1 << 63 | (0x120 | low) << 10, Level(1), &full);
        match entry {
            Entry::Leaf(leaf) => assert_eq!((low, leaf.shift, leaf.output), (8, 16, Output(0x120 << 12))),
            _ => assert_ne!(low, 8, "{entry:?}"),
        }
    }
    assert_eq!(reserved::<Sv39>(RWX | 1 << 63, 2, &full), 1 << 63, "of pages only");
}

#[test]
fn addresses_that_are_not_translated_are_refused() {
    assert!(Long4::accepts(Input(0xffff_8000_0000_0000)) && !Long4::accepts(Input(0x0000_8000_0000_0000)));
    assert!(Long5::accepts(Input(0x0000_8000_0000_0000)) && !Long5::accepts(Input(0x0100_0000_0000_0000)));
    assert!(Npt::accepts(Input(0x0000_8000_0000_0000)) && !Npt::accepts(Input(1 << 48)));
    assert!(Sv39x4::accepts(Input((1 << 41) - 1)) && !Sv39x4::accepts(Input(1 << 41)));
    assert_eq!(Sv39x4::index(Input((1 << 41) - 1), Sv39x4::root()), 2047);
    // Both ends are canonical and the hole is between them.
    let across = Span::new(Input(0x0000_7fff_ffff_f000), 0xffff_0000_0000_2000).expect("fits");
    assert!(!Long4::accepts_span(across));
}

#[test]
fn nobody_is_given_a_page_that_nobody_could_use() {
    let page = |memory| Leaf::new(Output(0x1000), 12, Permissions::READ, memory);
    let refused = Err(Unencodable::Permissions(Permissions::READ));
    assert_eq!(Npt::encode(&Entry::Leaf(page(Memory::Pat(0))), Level(1), &WEAK_X86), refused);
    assert_eq!(Sv39x4::encode(&Entry::Leaf(page(Memory::Physical)), Level(1), &riscv::Caps::FULL), refused);
    let table = Leaf { shift: 21, ..page(Memory::Physical) };
    let error = Sv39::encode(&Entry::Leaf(table), Level(2), &riscv::Caps::FULL);
    assert_eq!(error, Err(Unencodable::Address(Output(0x1000))));
}

#[test]
fn the_pat_after_reset_is_the_manuals() {
    let types = [0, 1, 2, 3].map(|index| Pat::RESET.cache(index));
    use Cache::{Uncacheable, UncacheableMinus, WriteBack, WriteThrough};
    assert_eq!(types, [Some(WriteBack), Some(WriteThrough), Some(UncacheableMinus), Some(Uncacheable)]);
}

/// The word of the leaf behind is more by [`Format::step`], wherever it is.
fn steps<F: Format>(caps: &F::Caps, memory: Memory) {
    for level in (1..=F::largest_leaf(caps).0).map(Level) {
        let size = 1u64 << F::shift(level);
        let word = |number: u64| {
            let leaf = Leaf::new(Output(number * size), F::shift(level), Permissions::all(), memory);
            F::encode(&Entry::Leaf(leaf), level, caps)
        };
        let last = (1u64 << 44) / size;
        for number in [0, 1, 2, 7, 0xff, 0x1234, last / 2, last.saturating_sub(2), last.saturating_sub(1)]
            .map(|number| number.min(last))
        {
            let (one, other) = (word(number).expect("aligned"), word(number + 1).expect("aligned"));
            assert_eq!(one + F::step(level), other, "{} {level} {number:#x}", F::NAME);
        }
    }
}

#[test]
fn the_word_of_the_leaf_behind_is_one_step_more() {
    use plimsoll_mmu::Shareability;
    use plimsoll_mmu::format::amdvi::{self, Host};
    use plimsoll_mmu::format::arm::{self, Lower, Second};
    use plimsoll_mmu::format::vtd::{self, Second4};
    let (first, second) = (Memory::Mair(1, Shareability::Inner), Memory::MemAttr(15, Shareability::Inner));
    steps::<Long4>(&x86::Caps::FULL, Memory::Pat(5));
    steps::<Npt>(&x86::Caps::FULL, Memory::Pat(0));
    steps::<Ept>(&ept::Caps::FULL, Memory::Ept(Cache::WriteBack, GuestPat::Combined));
    steps::<Sv39>(&riscv::Caps::FULL, Memory::Physical);
    steps::<Sv57x4>(&riscv::Caps::FULL, Memory::Physical);
    steps::<Lower<12, 48>>(&arm::Caps::FULL, first);
    steps::<Lower<14, 47>>(&arm::Caps::FULL, first);
    steps::<Second<16, 48>>(&arm::Caps::FULL, second);
    steps::<Second4>(&vtd::Caps::FULL, Memory::Snooped);
    steps::<Host<4>>(&amdvi::Caps::FULL, Memory::Snooped);
}
