//! Walks while somebody else writes the tables: an entry that changes between its being read and its being marked is read again,
//! by every walk alike.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Outside, Ram};
use plimsoll_mmu::format::arm::{self as arm_format, Lower};
use plimsoll_mmu::format::riscv::Sv48;
use plimsoll_mmu::format::vtd::Second4;
use plimsoll_mmu::format::x86::Long4;
use plimsoll_mmu::nested::{Purpose, SecondStage};
use plimsoll_mmu::{Access, Feature, Input, Marks, Output, TableMemory, Walked};
use plimsoll_mmu::{arm, ept, format, riscv, vtd, x86};
use std::cell::Cell;

const LEAF: u64 = 0x4000 + 7 * 8;
const PLACES: [u64; 4] = [0x1000, 0x2000, 0x3000, LEAF];

/// Memory in which somebody writes an entry just before it is exchanged.
struct Busy<'a> {
    ram: &'a Ram,
    /// Which exchange that is, from 1 on; `None` for each.
    nth: Option<u64>,
    /// What is made of its word.
    rewrite: &'a dyn Fn(u64) -> u64,
    reads: Cell<u64>,
    exchanges: Cell<u64>,
}

impl TableMemory for Busy<'_> {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.reads.set(self.reads.get() + 1);
        self.ram.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let number = self.exchanges.get() + 1;
        self.exchanges.set(number);
        if self.nth.is_none_or(|nth| nth == number) {
            self.ram.set(at.0, (self.rewrite)(self.ram.get(at.0)));
        }
        self.ram.compare_exchange(at, current, new)
    }
}

/// How a walk fails here.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    Refused,
    Contended,
}

/// A walk of four levels that writes to 0x7000 by the tables at [`PLACES`], and what their words are.
struct Walker {
    name: &'static str,
    walk: fn(&Busy<'_>) -> Result<Walked, Failure>,
    /// The entry that leads to this table.
    table: fn(u64) -> u64,
    /// The one that maps this page, which was neither accessed nor written.
    leaf: fn(u64) -> u64,
    accessed: u64,
    /// Entries that name tables have the bit and rights too.
    hierarchical: bool,
    /// The word is of a leaf that was written.
    dirty: fn(u64) -> bool,
    /// What lets write.
    right: u64,
    /// A bit that is software's.
    software: u64,
}

impl Walker {
    /// How many entries a first walk marks.
    fn marks(&self) -> u64 {
        if self.hierarchical { 4 } else { 1 }
    }

    fn ram(&self) -> Ram {
        let ram = Ram::new(1 << 20);
        for (place, next) in PLACES.into_iter().zip([0x2000, 0x3000, 0x4000]) {
            ram.set(place, (self.table)(next));
        }
        ram.set(LEAF, (self.leaf)(0x9000));
        ram
    }

    fn busy<'a>(&self, ram: &'a Ram, nth: Option<u64>, rewrite: &'a dyn Fn(u64) -> u64) -> Busy<'a> {
        Busy { ram, nth, rewrite, reads: Cell::new(0), exchanges: Cell::new(0) }
    }
}

const INPUT: Input = Input(0x7000);

const WALKERS: [Walker; 5] = [
    Walker {
        name: "x86-64",
        walk: |memory| {
            let registers = x86::Registers {
                cr3: 0x1000,
                control: x86::Control::empty(),
                pkru: 0,
                caps: format::x86::Caps::FULL,
            };
            let request = (Access::Write, x86::Mode::User);
            x86::walk::<Long4, _>(memory, &registers, INPUT, request, Marks::Set).map_err(|fault| match fault
            {
                x86::Fault::Page(fault) if fault.code.bits() == 0b111 => Failure::Refused,
                x86::Fault::Contended { input: INPUT } => Failure::Contended,
                other => panic!("{other:?}"),
            })
        },
        table: |at| at | 7,
        leaf: |at| at | 7,
        accessed: 1 << 5,
        hierarchical: true,
        dirty: |word| word & 1 << 6 != 0,
        right: 1 << 1,
        software: 1 << 9,
    },
    Walker {
        name: "EPT",
        walk: |memory| {
            let stage = ept::Stage { memory, root: Output(0x1000), caps: format::ept::Caps::FULL };
            stage.translate(INPUT, Access::Write, Purpose::Final).map_err(|fault| match fault {
                ept::Fault::Violation { .. } => Failure::Refused,
                ept::Fault::Contended { input: INPUT } => Failure::Contended,
                other => panic!("{other:?}"),
            })
        },
        table: |at| at | 7,
        leaf: |at| at | 7 | 6 << 3,
        accessed: 1 << 8,
        hierarchical: true,
        dirty: |word| word & 1 << 9 != 0,
        right: 1 << 1,
        software: 1 << 52,
    },
    Walker {
        name: "Arm",
        walk: |memory| {
            let registers = arm::Registers {
                root: Output(0x1000),
                control: arm::Control::empty(),
                access_flag: Feature::On,
                hierarchy_off: Feature::Off,
                caps: arm_format::Caps::FULL,
            };
            let request = (Access::Write, arm::Mode::User);
            arm::walk::<Lower<12, 48>, _>(memory, &registers, INPUT, request, Marks::Set).map_err(|fault| {
                match (fault.kind, fault.status()) {
                    (arm::Kind::Permission, 0b00_1111) => Failure::Refused,
                    (arm::Kind::UnsupportedUpdate, 0b11_0001) => Failure::Contended,
                    other => panic!("{other:?}"),
                }
            })
        },
        table: |at| at | 3,
        // For users, clean, and writable as far as the dirty bit modifier says.
        leaf: |at| at | 3 | 1 << 6 | 1 << 7 | 1 << 51,
        accessed: 1 << 10,
        hierarchical: false,
        dirty: |word| word & 1 << 7 == 0,
        right: 1 << 51,
        software: 1 << 56,
    },
    Walker {
        name: "RISC-V",
        walk: |memory| {
            let registers = riscv::Registers {
                root: Output(0x1000),
                control: riscv::Control::empty(),
                updates: Feature::On,
                caps: format::riscv::Caps::FULL,
            };
            let request = (riscv::Operation::Store, riscv::Mode::User);
            riscv::walk::<Sv48, _>(memory, &registers, INPUT, request, Marks::Set).map_err(
                |fault| match fault {
                    riscv::Fault::Page(riscv::PageFault { why: riscv::Why::Permissions(_), .. }) => {
                        Failure::Refused
                    }
                    riscv::Fault::Contended { input: INPUT } => {
                        assert_eq!(fault.kind(), None, "the hart would go on trying");
                        Failure::Contended
                    }
                    other => panic!("{other:?}"),
                },
            )
        },
        table: |at| at >> 2 | 1,
        leaf: |at| at >> 2 | 0b1_0111,
        accessed: 1 << 6,
        hierarchical: false,
        dirty: |word| word & 1 << 7 != 0,
        right: 1 << 2,
        software: 1 << 8,
    },
    Walker {
        name: "VT-d",
        walk: |memory| {
            let registers = vtd::Registers { root: Output(0x1000), caps: format::vtd::Caps::FULL };
            let walked = vtd::walk::<Second4, _>(memory, &registers, INPUT, vtd::Request::Write, Marks::Set);
            walked.map_err(|fault| match fault {
                vtd::Fault::Refused { .. } => Failure::Refused,
                vtd::Fault::Contended { input: INPUT } => {
                    for mode in [vtd::Mode::Legacy, vtd::Mode::Scalable] {
                        assert_eq!(fault.reason(mode), None, "the hardware would go on trying");
                    }
                    Failure::Contended
                }
                other => panic!("{other:?}"),
            })
        },
        table: |at| at | 3,
        leaf: |at| at | 3,
        accessed: 1 << 8,
        hierarchical: true,
        dirty: |word| word & 1 << 9 != 0,
        right: 1 << 1,
        software: 1 << 52,
    },
];

#[test]
fn an_entry_that_changed_once_is_read_again_and_marked_as_it_is_by_then() {
    for walker in &WALKERS {
        for nth in 1..=walker.marks() {
            let ram = walker.ram();
            let last = nth == walker.marks();
            let rewrite = |word| if last { (walker.leaf)(0xa000) } else { word } | walker.software;
            let memory = walker.busy(&ram, Some(nth), &rewrite);
            let page = (walker.walk)(&memory).map(|walked| walked.output);
            let expected = if last { 0xa000 } else { 0x9000 };
            assert_eq!(page, Ok(Output(expected)), "{}, exchange {nth}", walker.name);
            assert_eq!(memory.reads.get(), 8, "{}: a second walk", walker.name);
            assert_eq!(memory.exchanges.get(), walker.marks() + 1, "{}: one failed", walker.name);
            let changed = if last { LEAF } else { PLACES[usize::try_from(nth - 1).expect("small")] };
            for place in PLACES {
                let word = ram.get(place);
                let kept = if place == changed { walker.software } else { 0 };
                assert_eq!(word & walker.software, kept, "{}: {word:#x} at {place:#x}", walker.name);
                let marked = walker.hierarchical || place == LEAF;
                assert_eq!(word & walker.accessed != 0, marked, "{}: {word:#x} at {place:#x}", walker.name);
            }
            assert!((walker.dirty)(ram.get(LEAF)), "{}, exchange {nth}", walker.name);
        }
    }
}

#[test]
fn a_right_that_was_withdrawn_meanwhile_is_missing_and_nothing_is_dirty() {
    for walker in &WALKERS {
        for nth in 1..=walker.marks() {
            let ram = walker.ram();
            let rewrite = |word| word & !walker.right;
            let memory = walker.busy(&ram, Some(nth), &rewrite);
            let failure = (walker.walk)(&memory).expect_err(walker.name);
            assert_eq!(failure, Failure::Refused, "{}, exchange {nth}", walker.name);
            assert!(!(walker.dirty)(ram.get(LEAF)), "{}, exchange {nth}", walker.name);
            assert_eq!(ram.get(LEAF) & walker.accessed, 0, "{}, exchange {nth}", walker.name);
        }
    }
}

#[test]
fn entries_that_change_all_the_time_end_the_walk_after_eight_tries() {
    for walker in &WALKERS {
        let ram = walker.ram();
        let rewrite = |word| word ^ walker.software;
        let memory = walker.busy(&ram, None, &rewrite);
        let failure = (walker.walk)(&memory).expect_err(walker.name);
        assert_eq!(failure, Failure::Contended, "{}", walker.name);
        assert_eq!((memory.exchanges.get(), memory.reads.get()), (8, 32), "{}", walker.name);
        assert!(!(walker.dirty)(ram.get(LEAF)), "{}", walker.name);
    }
}
