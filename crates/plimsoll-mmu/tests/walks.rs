//! Walks: rights and error codes against the manual's rules written out, and guests' tables through a second stage.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram, random};
use plimsoll_mmu::format::ept::{self, Ept};
use plimsoll_mmu::format::x86::{Caps, Long4, Npt};
use plimsoll_mmu::nested::{self, Counted, GuestMemory, GuestMemoryFault, NptStage, Purpose, SecondStage};
use plimsoll_mmu::x86::{self, Control, ErrorCode, Fault, Mode, Registers};
use plimsoll_mmu::{
    Access, Feature, Format, Input, Level, Marks, Output, Pat, TableMemory, Walked, ept as walk,
};

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const XD: u64 = 1 << 63;

/// Four tables at 0x1000, 0x2000, 0x3000, 0x4000; `leaf` for the address 0x7000.
fn chain(ram: &Ram, upper: u64, leaf: u64) {
    ram.set(0x1000, 0x2000 | upper);
    ram.set(0x2000, 0x3000 | upper);
    ram.set(0x3000, 0x4000 | upper);
    ram.set(0x4000 + 7 * 8, leaf);
}

fn registers(cr3: u64) -> Registers {
    Registers { cr3, control: Control::empty(), pkru: 0, caps: Caps::FULL }
}

#[test]
fn rights_are_the_manuals_for_every_page_access_mode_and_control_bit() {
    let mut cases = 0;
    for bits in 0..1u64 << 3 {
        let leaf = 0x9000 | P | (bits & 3) << 1 | if bits & 4 != 0 { XD } else { 0 } | 5 << 59;
        for control in (0..16).map(Control::from_bits_truncate) {
            for pkru in [0, 1 << 10, 2 << 10, 3 << 10] {
                for (no_execute, access, mode) in accesses() {
                    let caps = Caps { no_execute, ..Caps::FULL };
                    let registers = Registers { control, pkru, caps, ..registers(0x1000) };
                    let ram = Ram::new(1 << 20);
                    chain(&ram, P | RW | US, leaf);
                    let result =
                        x86::walk::<Long4, _>(&ram, &registers, Input(0x7008), (access, mode), Marks::Leave);
                    let code = match result {
                        Ok(walked) => {
                            assert_eq!(walked.output, Output(0x9008));
                            None
                        }
                        Err(Fault::Page(fault)) => Some(fault.code.bits()),
                        Err(other) => panic!("{other}"),
                    };
                    assert_eq!(
                        code,
                        expected(leaf, &registers, access, mode),
                        "{leaf:#x} {registers:?} {access:?} {mode:?}"
                    );
                    cases += 1;
                }
            }
        }
    }
    assert_eq!(cases, 8 * 16 * 4 * 18);
}

fn accesses() -> Vec<(Feature, Access, Mode)> {
    let mut all = Vec::new();
    for feature in [Feature::On, Feature::Off] {
        for access in [Access::Read, Access::Write, Access::Fetch] {
            for mode in [Mode::User, Mode::Supervisor, Mode::Implicit] {
                all.push((feature, access, mode));
            }
        }
    }
    all
}

/// SDM 4.6 and 4.7, sentence by sentence, from the leaf's own bits.
fn expected(leaf: u64, registers: &Registers, access: Access, mode: Mode) -> Option<u32> {
    let (user_page, writable) = (leaf & US != 0, leaf & RW != 0);
    let nxe = registers.caps.no_execute == Feature::On;
    let has = |bit| registers.control.contains(bit);
    let (wp, smep, smap, ac) =
        (has(Control::WRITE_PROTECT), has(Control::SMEP), has(Control::SMAP), has(Control::ALIGNMENT_CHECK));
    let mut code = 0;
    if access == Access::Write {
        code |= 2;
    }
    if mode == Mode::User {
        code |= 4;
    }
    if access == Access::Fetch && (nxe || smep) {
        code |= 16;
    }
    if leaf & XD != 0 && !nxe {
        return Some(code | 1 | 8);
    }
    let smap_stops = user_page && smap && !(ac && mode == Mode::Supervisor);
    let page_allows = match (mode, access) {
        (Mode::User, Access::Read) => user_page,
        (Mode::User, Access::Write) => user_page && writable,
        (Mode::User, Access::Fetch) => user_page && leaf & XD == 0,
        (_, Access::Read) => !smap_stops,
        (_, Access::Write) => !smap_stops && (writable || !wp),
        (_, Access::Fetch) => !(user_page && smep) && leaf & XD == 0,
    };
    let (ad, wd) = (registers.pkru >> 10 & 1 != 0, registers.pkru >> 11 & 1 != 0);
    let key_stops = user_page
        && match access {
            Access::Read => ad,
            Access::Write => ad || (wd && (mode == Mode::User || wp)),
            Access::Fetch => false,
        };
    if key_stops {
        return Some(code | 1 | 32);
    }
    (!page_allows).then_some(code | 1)
}

#[test]
fn an_absent_entry_below_wins_over_a_missing_right_above_and_names_its_level() {
    let ram = Ram::new(1 << 20);
    chain(&ram, P, 0);
    let access = (Access::Write, Mode::User);
    let fault = x86::walk::<Long4, _>(&ram, &registers(0x1000), Input(0x7000), access, Marks::Set);
    let Err(Fault::Page(fault)) = fault else { panic!("{fault:?}") };
    assert_eq!((fault.code, fault.level), (ErrorCode::WRITE | ErrorCode::USER, Level(1)));
    assert_eq!(fault.step.at, Output(0x4000 + 7 * 8));
}

#[test]
fn a_right_that_a_table_withholds_is_not_laid_at_the_leafs_door() {
    let ram = Ram::new(1 << 20);
    chain(&ram, P | US, 0x9000 | P | RW | US);
    let access = (Access::Write, Mode::User);
    let fault = x86::walk::<Long4, _>(&ram, &registers(0x1000), Input(0x7000), access, Marks::Set);
    assert_eq!(
        fault.expect_err("all tables withhold it").to_string(),
        "page fault at in:0x7000, code 0x7, and the walk ended at the entry of level 1 at out:0x4038"
    );
    chain(&ram, 0b101, 0x9000 | 7 | 6 << 3);
    let stage = walk::Stage { memory: &ram, root: Output(0x1000), caps: ept::Caps::FULL };
    let fault = stage.translate(Input(0x7000), Access::Write, Purpose::Final);
    assert_eq!(
        fault.expect_err("as do these").to_string(),
        "EPT violation at in:0x7000, qualification 0x1aa, and the walk ended at the entry of level 1 at out:0x4038"
    );
}

#[test]
fn an_allowed_access_marks_every_entry_and_a_refused_one_none() {
    let ram = Ram::new(1 << 20);
    chain(&ram, P | US, 0x9000 | P | US);
    let before = ram.image();
    let walk = |access| x86::walk::<Long4, _>(&ram, &registers(0x1000), Input(0x7000), access, Marks::Set);
    assert!(walk((Access::Write, Mode::User)).is_err());
    assert_eq!(ram.image(), before);
    assert!(walk((Access::Read, Mode::User)).is_ok());
    assert!(before.iter().all(|(at, word)| ram.get(*at) == word | A));
    // CR0.WP is off: the supervisor writes, and the leaf is dirty.
    assert!(walk((Access::Write, Mode::Supervisor)).is_ok());
    assert_eq!(ram.get(0x4000 + 7 * 8), 0x9000 | P | US | A | D);
}

/// Host tables from 0x10_0000 on map guest pages 0 to 15 to 0x20_0000 on; the guest's tables are there.
fn host(leaf: impl Fn(u64) -> u64, upper: u64) -> Ram {
    let ram = Ram::new(1 << 30);
    for (at, next) in [(0x10_0000, 0x10_1000), (0x10_1000, 0x10_2000), (0x10_2000, 0x10_3000)] {
        ram.set(at, next | upper);
    }
    for page in 0..16 {
        ram.set(0x10_3000 + page * 8, leaf(page));
    }
    for (at, word) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000), (0x4000 + 7 * 8, 0x9000)] {
        ram.set(0x20_0000 + at, word | P | RW | US | A | D);
    }
    ram
}

fn npt_leaf(page: u64) -> u64 {
    (0x20_0000 + page * 0x1000) | P | RW | US | A | D
}

fn ept_leaf(page: u64) -> u64 {
    (0x20_0000 + page * 0x1000) | 7 | 6 << 3 | 3 << 8
}

/// The guest's own walk, for a user.
fn guests<M: TableMemory>(memory: &M, input: Input, access: Access) -> Result<Walked, Fault<M::Error>> {
    x86::walk::<Long4, _>(memory, &registers(0x1000), input, (access, Mode::User), Marks::Set)
}

type Answer<S> = Result<u64, nested::Fault<Fault<GuestMemoryFault<S, Outside>>, S>>;

fn through_npt(ram: &Ram, access: Access) -> (Answer<nested::NestedPageFault<Outside>>, u64) {
    let counted = Counted::new(ram);
    let second = NptStage { memory: &counted, registers: registers(0x10_0000) };
    let guest = GuestMemory { second, memory: &counted };
    let result = nested::walk(&guest, access, |memory| guests(memory, Input(0x7010), access));
    (result.map(|nested| nested.second.output.0), counted.reads())
}

fn through_ept(ram: &Ram, caps: ept::Caps, access: Access) -> (Answer<walk::Fault<Outside>>, u64) {
    let counted = Counted::new(ram);
    let second = walk::Stage { memory: &counted, root: Output(0x10_0000), caps };
    let guest = GuestMemory { second, memory: &counted };
    let result = nested::walk(&guest, access, |memory| guests(memory, Input(0x7010), access));
    (result.map(|nested| nested.second.output.0), counted.reads())
}

#[test]
fn four_levels_over_four_take_24_reads() {
    let npt = through_npt(&host(npt_leaf, P | RW | US | A), Access::Write);
    assert_eq!(npt, (Ok(0x20_9010), 24));
    let ept = through_ept(&host(ept_leaf, 7 | 1 << 8), ept::Caps::FULL, Access::Write);
    assert_eq!(ept, (Ok(0x20_9010), 24));
}

#[test]
fn memory_types_of_guest_and_ept_combine_as_the_manual_tabulates() {
    // Columns: the page's type by the PAT, UC, WC, WT, WP, WB, UC-. Rows: EPT's UC, WC, WT, WP, WB.
    let expected = [
        (0, [0, 1, 0, 0, 0, 0]),
        (1, [0, 1, 0, 0, 1, 1]),
        (4, [0, 1, 4, 5, 4, 0]),
        (5, [0, 1, 4, 5, 5, 1]),
        (6, [0, 1, 4, 5, 6, 0]),
    ];
    let types = [0u64, 1, 4, 5, 6, 7];
    for (memory, row) in expected {
        for (page, effective) in types.into_iter().zip(row) {
            for ignored in [false, true] {
                let bits = memory << 3 | u64::from(ignored) << 6;
                let ram = host(|number| (0x20_0000 + number * 0x1000) | 7 | bits | 3 << 8, 7 | 1 << 8);
                // The guest's page has index 5: PAT and PWT are set.
                ram.set(0x20_4000 + 7 * 8, 0x9000 | P | RW | US | A | D | 1 << 7 | 1 << 3);
                let second = walk::Stage { memory: &ram, root: Output(0x10_0000), caps: ept::Caps::FULL };
                let guest = GuestMemory { second, memory: &ram };
                let access = Access::Read;
                let nested = nested::walk(&guest, access, |memory| guests(memory, Input(0x7010), access));
                let pat = Pat(Pat::RESET.0 & !(0xff << 40) | page << 40);
                let found = nested.ok().and_then(|nested| walk::memory_type(&nested, pat));
                let wanted = if ignored { memory } else { effective };
                assert_eq!(
                    found.map(|cache| u64::from(cache.number())),
                    Some(wanted),
                    "{memory} {page} {ignored}"
                );
            }
        }
    }
}

#[test]
fn a_guests_table_that_its_host_protects_is_a_nested_fault_for_a_write() {
    let ram = host(|page| if page == 3 { npt_leaf(page) & !RW } else { npt_leaf(page) }, P | RW | US | A);
    let (Err(nested::Fault::First(Fault::Memory { level, at, error })), _) = through_npt(&ram, Access::Read)
    else {
        panic!("the guest's level 2 table is read-only")
    };
    assert_eq!((level, at), (Level(2), Output(0x3000)));
    let GuestMemoryFault::Second(fault) = error else { panic!("{error:?}") };
    assert_eq!(fault.purpose, Purpose::GuestTable);
    assert_eq!(fault.exit_info(), Some(1 << 33 | 7), "present, write, user");
}

#[test]
fn a_page_that_its_host_keeps_from_users_is_refused_at_the_final_access() {
    let ram = host(|page| if page == 9 { npt_leaf(page) & !US } else { npt_leaf(page) }, P | RW | US | A);
    let (Err(nested::Fault::Second(fault)), _) = through_npt(&ram, Access::Read) else { panic!("page 9") };
    assert_eq!(fault.exit_info(), Some(1 << 32 | 5), "present, user");
}

#[test]
fn ept_reads_a_protected_table_unless_it_keeps_accessed_bits_itself() {
    let ram = host(|page| if page == 3 { ept_leaf(page) & !2 } else { ept_leaf(page) }, 7 | 1 << 8);
    let without = ept::Caps { accessed_dirty: Feature::Off, ..ept::Caps::FULL };
    assert_eq!(through_ept(&ram, without, Access::Read).0, Ok(0x20_9010));
    let (Err(nested::Fault::First(Fault::Memory { level, error, .. })), _) =
        through_ept(&ram, ept::Caps::FULL, Access::Read)
    else {
        panic!("with them on it is a write")
    };
    let GuestMemoryFault::Second(walk::Fault::Violation { qualification, .. }) = error else {
        panic!("{error:?}")
    };
    assert_eq!((level, qualification.bits()), (Level(2), 3 | 0b101 << 3 | 1 << 7));
}

#[test]
fn a_misconfigured_entry_says_where_and_why() {
    let ram = host(|page| if page == 9 { 0b010 } else { ept_leaf(page) }, 7 | 1 << 8);
    let (Err(nested::Fault::Second(walk::Fault::Misconfiguration { level, step, .. })), _) =
        through_ept(&ram, ept::Caps::FULL, Access::Read)
    else {
        panic!("page 9 is write-only")
    };
    assert_eq!((level, step.at), (Level(1), Output(0x10_3000 + 9 * 8)));
    let stage = walk::Stage { memory: &ram, root: Output(0x10_0000), caps: ept::Caps::FULL };
    let far = stage.translate(Input(1 << 48), Access::Read, Purpose::Final);
    assert!(
        matches!(far, Err(walk::Fault::TooLong(_)))
            && !Ept::accepts(Input(1 << 48))
            && !Npt::accepts(Input(1 << 48))
    );
}

/// Tables of random words that name each other, themselves and places where nothing is: every walk ends, and says where.
#[test]
fn hostile_tables_end_in_an_answer_or_an_error() {
    let mut next = random(0x9e37_79b9_7f4a_7c15);
    let (mut answers, mut faults) = (0, 0);
    for _ in 0..20_000 {
        let ram = host(npt_leaf, P | RW | US | A);
        for table in 1..5u64 {
            let frame = if next().is_multiple_of(8) { next() } else { (next() % 20) << 12 };
            let flags = if next().is_multiple_of(4) { next() & 0xfff } else { P | RW | US };
            ram.set(0x20_0000 + table * 0x1000, (frame & 0x000f_ffff_ffff_f000) | flags);
        }
        let counted = Counted::new(&ram);
        let second = NptStage { memory: &counted, registers: registers(0x10_0000) };
        let guest = GuestMemory { second, memory: &counted };
        let access = Access::Write;
        let result = nested::walk(&guest, access, |memory| guests(memory, Input(0), access));
        match result {
            Ok(nested) => {
                answers += 1;
                assert!((0x20_0000..0x21_0000).contains(&nested.second.output.0), "inside the guest");
            }
            Err(_) => faults += 1,
        }
        assert!(counted.reads() <= 24 * 8, "{} reads", counted.reads());
    }
    assert!(answers > 100 && faults > 100, "{answers} answers, {faults} faults");
}

#[test]
fn a_table_that_names_itself_is_walked_once_a_level() {
    let ram = Ram::new(1 << 20);
    ram.set(0x1000, 0x1000 | P | RW | US);
    let counted = Counted::new(&ram);
    let access = (Access::Read, Mode::User);
    let walked = x86::walk::<Long4, _>(&counted, &registers(0x1000), Input(0), access, Marks::Leave);
    assert_eq!((walked.map(|walked| walked.output), counted.reads()), (Ok(Output(0x1000)), 4));
}
