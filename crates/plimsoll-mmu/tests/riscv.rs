//! RISC-V walks: every combination of rights against the manual's sentences, exceptions by stage, references counted.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram, random};
use plimsoll_mmu::format::riscv::{Caps, Sv39, Sv39x4, Sv48, Sv48x4, Sv57, Sv57x4};
use plimsoll_mmu::nested::{self, Counted, GuestMemory, Nested, Purpose, SecondStage};
use plimsoll_mmu::riscv::{self, Control, Fault, Kind, Mode, Operation, PageFault, Registers, Stage, Why};
use plimsoll_mmu::{Feature, Format, Input, Level, Malformed, Marks, Memory, Output};

const V: u64 = 1;
const R: u64 = 2;
const W: u64 = 4;
const X: u64 = 8;
const U: u64 = 16;
const A: u64 = 64;
const D: u64 = 128;
const ALL: u64 = V | R | W | X | U | A | D;
const OPERATIONS: [Operation; 4] =
    [Operation::Load, Operation::Store, Operation::Fetch, Operation::LoadExecutable];
const MODES: [Mode; 2] = [Mode::User, Mode::Supervisor];

const fn word(at: u64, bits: u64) -> u64 {
    at >> 2 | bits
}

fn registers(root: u64) -> Registers {
    Registers { root: Output(root), control: Control::empty(), updates: Feature::On, caps: Caps::FULL }
}

/// `levels` tables from `root` on, 16 KiB apart, each naming the next in its first entry, the last one with `leaf` for
/// the address 0x7000.
fn chain(ram: &Ram, root: u64, levels: u64, leaf: u64) {
    for level in 1..levels {
        ram.set(root + (level - 1) * 0x4000, word(root + level * 0x4000, V));
    }
    ram.set(root + (levels - 1) * 0x4000 + 7 * 8, leaf);
}

#[test]
fn rights_are_the_manuals_for_every_leaf_operation_mode_and_control_bit() {
    let mut cases = 0;
    for bits in (0..256).filter(|bits| bits & V != 0 && bits & 32 == 0) {
        for control in (0..4).map(Control::from_bits_truncate) {
            for updates in [Feature::On, Feature::Off] {
                for operation in OPERATIONS {
                    for mode in MODES {
                        let ram = Ram::new(1 << 20);
                        chain(&ram, 0x10000, 3, word(0x9000, bits));
                        let registers = Registers { control, updates, ..registers(0x10000) };
                        let walked = riscv::walk::<Sv39, _>(
                            &ram,
                            &registers,
                            Input(0x7008),
                            (operation, mode),
                            Marks::Set,
                        );
                        let (kind, after) = expected(bits, &registers, operation, mode);
                        match &walked {
                            Ok(walked) => assert_eq!((walked.output, kind), (Output(0x9008), None)),
                            Err(fault) => {
                                assert_eq!(
                                    fault.kind(),
                                    kind,
                                    "{bits:#x} {registers:?} {operation:?} {mode:?}"
                                )
                            }
                        }
                        assert_eq!(ram.get(0x18000 + 7 * 8), word(0x9000, after), "{bits:#x} {operation:?}");
                        cases += 1;
                    }
                }
            }
        }
    }
    assert_eq!(cases, 64 * 4 * 2 * 8);
}

/// "Virtual Address Translation Process", steps 3 to 9, from the leaf's own bits: the kind of fault, and the bits after.
fn expected(bits: u64, registers: &Registers, operation: Operation, mode: Mode) -> (Option<Kind>, u64) {
    let fault = (Some(Kind::Page), bits);
    let has = |bit| bits & bit != 0;
    // Step 3, and step 4 where a table ends the tables.
    if (!has(R) && has(W)) || (!has(R) && !has(X)) {
        return fault;
    }
    // Step 7.
    let mxr = registers.control.contains(Control::MXR);
    let right = match operation {
        Operation::Load => has(R) || (has(X) && mxr),
        Operation::Store => has(W),
        Operation::Fetch | Operation::LoadExecutable => has(X),
    };
    let reachable = match mode {
        Mode::User => has(U),
        Mode::Supervisor if has(U) => {
            registers.control.contains(Control::SUM) && operation != Operation::Fetch
        }
        Mode::Supervisor => true,
    };
    if !right || !reachable {
        return fault;
    }
    // Step 9.
    let store = operation == Operation::Store;
    if (!has(A) || (store && !has(D))) && registers.updates == Feature::Off {
        return fault;
    }
    (None, bits | A | if store { D } else { 0 })
}

#[test]
fn a_fault_names_the_entry_and_what_about_it() {
    let walk = |leaf, input| {
        let ram = Ram::new(1 << 20);
        chain(&ram, 0x10000, 3, leaf);
        let registers = Registers { updates: Feature::Off, ..registers(0x10000) };
        riscv::walk::<Sv39, _>(&ram, &registers, Input(input), (Operation::Store, Mode::User), Marks::Set)
    };
    let why = |leaf| match walk(leaf, 0x7000) {
        Err(Fault::Page(PageFault { level: Level(1), step, why, .. })) => {
            assert_eq!((step.at, step.raw), (Output(0x18000 + 7 * 8), leaf));
            why
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(why(0), Why::Absent);
    assert_eq!(why(V), Why::Malformed(Malformed::TableAtLastLevel));
    assert_eq!(why(V | W), Why::Malformed(Malformed::WriteWithoutRead));
    assert_eq!(why(ALL | 1 << 54), Why::Malformed(Malformed::Reserved(1 << 54)));
    assert_eq!(why(ALL & !D), Why::Unmarked);
    assert!(matches!(why(ALL & !W), Why::Permissions(_)));
    // Bit 39 is not bit 38: a page fault that reads nothing.
    assert_eq!(walk(ALL, 1 << 39), Err(Fault::Untranslated(Input(1 << 39))));
    assert_eq!(walk(ALL, 1 << 39).map_err(|fault| fault.kind()), Err(Some(Kind::Page)));
}

#[test]
fn a_superpage_that_is_not_aligned_is_a_page_fault_and_sixteen_pages_are_one_leaf() {
    let ram = Ram::new(1 << 20);
    ram.set(0x10000, word(0x20_0000 + 0x1000, ALL));
    ram.set(0x10000 + 8, word(0x4000_0000, ALL));
    ram.set(0x10000 + 16, word(0x14000, V));
    ram.set(0x14000, word(0x18000, V));
    ram.set(0x18000 + 5 * 8, 1 << 63 | word(0x5_8000, ALL));
    let walk = |input| {
        riscv::walk::<Sv39, _>(
            &ram,
            &registers(0x10000),
            Input(input),
            (Operation::Load, Mode::User),
            Marks::Leave,
        )
    };
    assert!(matches!(walk(0), Err(Fault::Page(PageFault { why: Why::Malformed(_), level: Level(3), .. }))));
    assert_eq!(walk(0x4123_4567).map(|walked| walked.output), Ok(Output(0x4123_4567)));
    let napot = walk(0x8000_5678).map(|walked| (walked.output, walked.leaf.shift));
    assert_eq!(napot, Ok((Output(0x5_5678), 16)));
}

/// The host's tables, from 1 MiB on, map guest page n to 2 MiB + n pages; `page` may say otherwise. The guest's tables are
/// at guest address 0x10000, and map 0x7000 to 0x9000.
fn two_stages(levels: u64, page: impl Fn(u64) -> u64) -> Ram {
    let ram = Ram::new(1 << 30);
    chain(&ram, 0x10_0000, levels, 0);
    for number in 0..64 {
        ram.set(0x10_0000 + (levels - 1) * 0x4000 + number * 8, page(number));
    }
    let guest = Ram::new(1 << 20);
    chain(&guest, 0x10000, levels, word(0x9000, ALL));
    for (at, word) in guest.image() {
        ram.set(0x20_0000 + at, word);
    }
    ram
}

fn plain(page: u64) -> u64 {
    word(0x20_0000 + page * 0x1000, ALL)
}

type Answer = Result<Nested, riscv::TwoStageFault<Outside>>;

fn through<F: Format<Caps = Caps>, G: Format<Caps = Caps>>(
    ram: &Ram,
    (first, second): (Registers, Registers),
    (operation, mode): (Operation, Mode),
) -> (Answer, u64) {
    let counted = Counted::new(ram);
    let guest = GuestMemory { second: Stage::<G, _>::new(&counted, second), memory: &counted };
    let result = nested::walk(&guest, operation.access(), |memory| {
        riscv::walk::<F, _>(memory, &first, Input(0x7010), (operation, mode), Marks::Set)
    });
    (result, counted.reads())
}

fn usual() -> (Registers, Registers) {
    (registers(0x10000), registers(0x10_0000))
}

#[test]
fn n_levels_over_n_take_the_square_of_n_plus_one_less_one_reads() {
    let store = (Operation::Store, Mode::User);
    let three = through::<Sv39, Sv39x4>(&two_stages(3, plain), usual(), store);
    let four = through::<Sv48, Sv48x4>(&two_stages(4, plain), usual(), store);
    let five = through::<Sv57, Sv57x4>(&two_stages(5, plain), usual(), store);
    for ((answer, reads), levels) in [(three, 3), (four, 4), (five, 5)] {
        assert_eq!(answer.map(|nested| nested.second.output), Ok(Output(0x20_9010)));
        assert_eq!(reads, (levels + 1) * (levels + 1) - 1);
    }
}

#[test]
fn a_fault_of_the_second_stage_is_of_the_original_access_and_says_for_what() {
    // Guest page 0x14 holds the guest's second table.
    let ram = two_stages(3, |page| if page == 0x14 { plain(page) & !R & !W } else { plain(page) });
    for operation in OPERATIONS {
        let (Err(fault), _) = through::<Sv39, Sv39x4>(&ram, usual(), (operation, Mode::User)) else {
            panic!("{operation:?}: the table cannot be read")
        };
        assert_eq!(riscv::kind(&fault), Some(Kind::GuestPage));
        let nested::Fault::First(Fault::Memory { level: Level(2), at: Output(0x14000), error }) = fault
        else {
            panic!("{fault:?}")
        };
        let nested::GuestMemoryFault::Second(fault) = error else { panic!("{error:?}") };
        assert_eq!((fault.htval(), fault.htinst()), (0x14000 >> 2, Some(0x3000)));
    }
    assert_eq!(OPERATIONS.map(|operation| Kind::GuestPage.cause(operation)), [21, 23, 20, 21]);
    assert_eq!(OPERATIONS.map(|operation| Kind::Page.cause(operation)), [13, 15, 12, 13]);
    assert_eq!(OPERATIONS.map(|operation| Kind::Access.cause(operation)), [5, 7, 1, 5]);
    // The final page, for what the instruction does itself; U is needed in any mode.
    for (bits, failing) in [(ALL & !W, vec![1]), (ALL & !X, vec![2, 3]), (ALL & !U, vec![0, 1, 2, 3])] {
        let ram = two_stages(3, |page| if page == 9 { word(0x20_9000, bits) } else { plain(page) });
        for (number, operation) in OPERATIONS.into_iter().enumerate() {
            let (answer, _) = through::<Sv39, Sv39x4>(&ram, usual(), (operation, Mode::User));
            match answer {
                Ok(_) => assert!(!failing.contains(&number), "{bits:#x} {operation:?}"),
                Err(nested::Fault::Second(fault)) => {
                    assert!(failing.contains(&number), "{bits:#x} {operation:?}");
                    assert_eq!((fault.purpose, fault.kind()), (Purpose::Final, Some(Kind::GuestPage)));
                    assert_eq!((fault.htval(), fault.htinst()), (0x9010 >> 2, None));
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn marking_a_guests_entry_needs_the_right_to_write_its_table() {
    // Guest page 0x18 holds the guest's leaf, whose A and D are clear.
    let ram = two_stages(3, |page| if page == 0x18 { plain(page) & !W & !D } else { plain(page) });
    let leaf = 0x20_0000 + 0x18000 + 7 * 8;
    ram.set(leaf, word(0x9000, ALL & !A & !D));
    let (Err(fault), _) = through::<Sv39, Sv39x4>(&ram, usual(), (Operation::Load, Mode::User)) else {
        panic!("A cannot be set")
    };
    let nested::Fault::First(Fault::Memory { error: nested::GuestMemoryFault::Second(inner), .. }) = fault
    else {
        panic!("{fault:?}")
    };
    assert_eq!((riscv::kind(&fault), inner.htinst()), (Some(Kind::GuestPage), Some(0x3020)));
    // Under Svade it is the guest that sets A: its own page fault.
    let (first, second) = usual();
    let svade = (Registers { updates: Feature::Off, ..first }, second);
    let (Err(fault), _) = through::<Sv39, Sv39x4>(&ram, svade, (Operation::Load, Mode::User)) else {
        panic!("A is clear")
    };
    assert_eq!(riscv::kind(&fault), Some(Kind::Page));
    assert_eq!(ram.get(leaf), word(0x9000, ALL & !A & !D));
}

#[test]
fn a_guest_reads_what_it_can_only_execute_if_the_hosts_mxr_says_so() {
    let ram = two_stages(3, |page| if page == 9 { word(0x20_9000, V | X | U | A) } else { plain(page) });
    let (first, second) = usual();
    let load =
        |second| through::<Sv39, Sv39x4>(&ram, (first, second), (Operation::Load, Mode::User)).0.is_ok();
    assert!(!load(second));
    assert!(load(Registers { control: Control::MXR, ..second }));
    let own = Registers { control: Control::MXR | Control::SUM, ..first };
    assert!(through::<Sv39, Sv39x4>(&ram, (own, second), (Operation::Load, Mode::User)).0.is_err());
}

#[test]
fn the_second_stage_has_two_more_bits_and_refuses_the_rest() {
    let ram = Ram::new(1 << 30);
    ram.set(0x10_0000 + 2047 * 8, word(0x4000_0000, ALL));
    let stage = Stage::<Sv39x4, _>::new(&ram, registers(0x10_0fff));
    let translate = |input| {
        stage
            .translate(Input(input), plimsoll_mmu::Access::Read, Purpose::Final)
            .map(|walked| walked.output)
            .map_err(|fault| fault.kind())
    };
    assert_eq!(translate((1 << 41) - 8), Ok(Output(0x7fff_fff8)));
    assert_eq!(translate(1 << 41), Err(Some(Kind::GuestPage)));
}

#[test]
fn memory_types_combine_as_svpbmt_says() {
    let types = [(0, Memory::Physical), (1, Memory::NonCacheable), (2, Memory::Io)];
    for (first, own) in types {
        for (second, hosts) in types {
            let ram = two_stages(3, |page| if page == 9 { plain(page) | second << 61 } else { plain(page) });
            ram.set(0x20_0000 + 0x18000 + 7 * 8, word(0x9000, ALL) | first << 61);
            let (answer, _) = through::<Sv39, Sv39x4>(&ram, usual(), (Operation::Load, Mode::User));
            let expected = if first == 0 { hosts } else { own };
            assert_eq!(answer.as_ref().map(riscv::memory_type), Ok(expected), "{first} over {second}");
        }
    }
}

/// Guest tables of random words: every walk ends within its references, inside the guest or with a fault.
#[test]
fn hostile_tables_end_in_an_answer_or_a_fault() {
    let mut next = random(0x2545_f491_4f6c_dd1d);
    let (mut answers, mut faults) = (0, 0);
    for _ in 0..20_000 {
        let ram = two_stages(3, plain);
        for (table, index) in [(0x10000, 0), (0x14000, 0), (0x18000, 7)] {
            if next().is_multiple_of(2) {
                continue;
            }
            let flags = if next().is_multiple_of(4) {
                next()
            } else {
                V | if next().is_multiple_of(2) { ALL } else { 0 }
            };
            let at = if next().is_multiple_of(4) { next() } else { (next() % 70) << 12 };
            ram.set(0x20_0000 + table + index * 8, (at >> 2 & !0x3ff) | (flags & 0x3ff) | (flags & 7 << 61));
        }
        let (answer, reads) = through::<Sv39, Sv39x4>(&ram, usual(), (Operation::Store, Mode::User));
        match answer {
            Ok(nested) => {
                answers += 1;
                assert!((0x20_0000..0x24_0000).contains(&nested.second.output.0), "inside the guest");
            }
            Err(fault) => {
                faults += 1;
                assert!(riscv::kind(&fault).is_some(), "{fault:?}");
            }
        }
        assert!(reads <= 15 * 8, "{reads} reads");
    }
    assert!(answers > 100 && faults > 100, "{answers} answers, {faults} faults");
}
