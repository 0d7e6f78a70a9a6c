//! The caches that run, behind a mapper that fences: what they translate is what the tables say, at every moment.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Ram, pools};
use plimsoll_mmu::format::arm::{self, Lower, Second};
use plimsoll_mmu::format::riscv::{self, Sv39, Sv39x4};
use plimsoll_mmu::format::x86::{self, Long4};
use plimsoll_mmu::mapper::Translation;
use plimsoll_mmu::tlb::{
    Architecture, Arm, Bank, Breaks, Change, Consequence, Fence, Found, Kind, Owner, Regime, RiscV, Stage,
    Stages, Tables, Tag, Tlb, UnevenBank, X86, needed,
};
use plimsoll_mmu::{
    Access, Entry, Format, Input, Invalidate, Leaf, Level, MapError, Mapper, Memory, NothingCached, Output,
    Permissions, Shareability, Span,
};
use proptest::prelude::*;
use std::cell::RefCell;

const ROOT: u64 = 0x40_0000;
const FRAMES: u64 = 0x80_0000;
const BASE: u64 = 0x1000_0000;
const OPEN: Permissions = Permissions::all();
const CLOSED: Permissions = Permissions::all().difference(Permissions::WRITE);
const ASID: u16 = 5;
const HOST: Tag = Tag { owner: Owner::Host, space: Some(ASID) };
const GUEST: Tag = Tag { owner: Owner::Guest(1), space: None };

/// A mapper's caches: executes a fence for each range.
struct Fenced<'t, 's> {
    tlb: &'t RefCell<Tlb<'s>>,
    fence: fn(Span) -> Fence,
}

impl Invalidate for Fenced<'_, '_> {
    fn invalidate(&mut self, span: Span) {
        self.tlb.borrow_mut().fence(&(self.fence)(span));
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Map(u64),
    Unmap,
    Protect,
    Split,
    Merge,
    Touch,
}

fn ops() -> impl Strategy<Value = Vec<(Op, u64, u64)>> {
    let op = prop_oneof![
        3 => (0..3u64).prop_map(|block| Op::Map(block * 512)),
        2 => Just(Op::Unmap),
        1 => Just(Op::Protect),
        1 => Just(Op::Split),
        1 => Just(Op::Merge),
        6 => Just(Op::Touch),
    ];
    let number = || prop_oneof![0..1100u64, (0..3u64).prop_map(|block| block * 512)];
    proptest::collection::vec((op, number(), number()), 1..40)
}

/// Runs `ops` and compares, after each, what the caches translate with what the tables say.
fn follow<F: Format>(
    caps: F::Caps,
    memory: Memory,
    (stage, tag): (Stage, Tag),
    fence: fn(Span) -> Fence,
    ops: &[(Op, u64, u64)],
) {
    let page = 1u64 << F::PAGE_SHIFT;
    let pages = 1500;
    let mut slots = ([None; 8], [None; 16], [None; 64], [None; 16]);
    let tlb = RefCell::new(banks(&mut slots));
    let (ram, mut frames) = (Ram::new(1 << 40), pools::<16>(FRAMES, 0x4000));
    let mut caches = Fenced { tlb: &tlb, fence };
    let tables = Tables::<F, _> { memory: &ram, root: Output(ROOT), caps, stage, tag };
    for &(op, first, count) in ops {
        let first = first.min(pages - 1);
        let span = Span::new(Input(first * page), (count + 1).min(pages - first) * page).expect("fits");
        let mut mapper =
            Mapper::<F, _, _, _>::new(Output(ROOT), caps, &ram, &mut frames, &mut caches).expect("aligned");
        let result = match op {
            Op::Map(output) => {
                mapper.map(span, Leaf::new(Output(BASE + (output + first) * page), 30, OPEN, memory))
            }
            Op::Unmap => mapper.unmap(span).map(|_| ()),
            Op::Protect => mapper.protect(span, CLOSED).map(|_| ()),
            Op::Split => mapper.split(span, Level::PAGES).map(|_| ()),
            Op::Merge => mapper.merge(span).map(|_| ()),
            Op::Touch => Ok(()),
        };
        assert!(matches!(result, Ok(()) | Err(MapError::Mapped { .. } | MapError::Exhausted { .. })));
        let beside = [0, 1, 511, 512, 513, 1024, 1499, first, (first + count).min(pages - 1)];
        for (number, access) in beside.into_iter().zip([Access::Read, Access::Fetch].into_iter().cycle()) {
            let input = Input(number * page + 5);
            let expected = match mapper.walk(input).expect("well-formed") {
                Translation::Mapped(output, mapping) => Some((output, mapping.permissions)),
                Translation::Absent { .. } => None,
            };
            let found = tlb.borrow_mut().translate(&tables, input, access).ok();
            assert_eq!(found, expected, "{}: {input} after {op:?} of {span}", F::NAME);
        }
    }
}

type Slots = ([Option<Found>; 8], [Option<Found>; 16], [Option<Found>; 64], [Option<Found>; 16]);

fn banks(slots: &mut Slots) -> Tlb<'_> {
    Tlb {
        instruction: Bank::new(&mut slots.0, 8).expect("one set"),
        data: Bank::new(&mut slots.1, 4).expect("four sets"),
        shared: Bank::new(&mut slots.2, 4).expect("sixteen sets"),
        structures: Bank::new(&mut slots.3, 16).expect("one set"),
    }
}

fn invlpg(pages: Span) -> Fence {
    Fence::X86 { by: Owner::Host, fence: X86::Invlpg { pcid: ASID, pages } }
}

fn vae1(pages: Span) -> Fence {
    Fence::Arm { by: Owner::Host, fence: Arm::Vae1 { asid: ASID, pages } }
}

fn ipas2e1(pages: Span) -> Fence {
    Fence::Arm { by: GUEST.owner, fence: Arm::Ipas2e1 { pages } }
}

fn sfence(_: Span) -> Fence {
    Fence::RiscV(RiscV::SfenceVma { by: Owner::Host, pages: None, asid: Some(ASID) })
}

fn hfence(_: Span) -> Fence {
    Fence::RiscV(RiscV::HfenceGvma { pages: None, vmid: Some(1) })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn with_its_fences_no_change_leaves_anything_stale(ops in ops()) {
        let host = (Stage::First, HOST);
        follow::<Long4>(x86::Caps::FULL, Memory::Pat(0), host, invlpg, &ops);
        follow::<Sv39>(riscv::Caps::FULL, Memory::Physical, host, sfence, &ops);
        let (first, second) = (Memory::Mair(0, Shareability::Inner), Memory::MemAttr(15, Shareability::Inner));
        follow::<Lower<12, 48>>(arm::Caps::FULL, first, host, vae1, &ops);
        follow::<Sv39x4>(riscv::Caps::FULL, Memory::Physical, (Stage::Second, GUEST), hfence, &ops);
        follow::<Second<12, 40>>(arm::Caps::FULL, second, (Stage::Second, GUEST), ipas2e1, &ops);
    }
}

/// Maps 512 pages by a table, walks, replaces the table by one leaf to other memory, fences page by page, and looks where the
/// block's last page leads.
fn replaced<F: Format>(caps: F::Caps, memory: Memory, fence: fn(Span) -> Fence) -> (u64, bool) {
    let mut slots = ([None; 8], [None; 16], [None; 64], [None; 16]);
    let mut tlb = banks(&mut slots);
    let (ram, mut frames, mut caches) = (Ram::new(1 << 40), pools::<16>(FRAMES, 0x4000), NothingCached);
    let tables = Tables::<F, _> { memory: &ram, root: Output(ROOT), caps, stage: Stage::First, tag: HOST };
    let block = Span::new(Input(0), 0x20_0000).expect("fits");
    let mut mapper =
        Mapper::<F, _, _, _>::new(Output(ROOT), caps, &ram, &mut frames, &mut caches).expect("aligned");
    mapper.map(block, Leaf::new(Output(BASE), 12, OPEN, memory)).expect("free");
    tlb.translate(&tables, Input(0x1000), Access::Read).expect("mapped");
    mapper.unmap(block).expect("whole pages");
    mapper.map(block, Leaf::new(Output(BASE * 2), 30, OPEN, memory)).expect("free");
    tlb.fence(&fence(block));
    let structures =
        tlb.structures.iter().any(|found| found.cached.kind == Kind::Structure && found.level == Level(2));
    let end = tlb.translate(&tables, Input(0x1f_f000), Access::Read);
    (end.map_or(0, |(output, _)| output.0), structures)
}

#[test]
fn by_address_a_riscv_fence_leaves_the_way_through_a_table_that_is_gone() {
    fn by_address(pages: Span) -> Fence {
        Fence::RiscV(RiscV::SfenceVma { by: Owner::Host, pages: Some(pages), asid: Some(ASID) })
    }
    fn last_level(pages: Span) -> Fence {
        Fence::Arm { by: Owner::Host, fence: Arm::Vale1 { asid: ASID, pages } }
    }
    let new = BASE * 2 + 0x1f_f000;
    let riscv = (riscv::Caps::FULL, Memory::Physical);
    assert_eq!(replaced::<Sv39>(riscv.0, riscv.1, by_address), (0, true), "the old table is walked");
    assert_eq!(replaced::<Sv39>(riscv.0, riscv.1, sfence), (new, false));
    let arm = (arm::Caps::FULL, Memory::Mair(0, Shareability::Inner));
    assert_eq!(replaced::<Lower<12, 48>>(arm.0, arm.1, last_level), (0, true), "the old table is walked");
    assert_eq!(replaced::<Lower<12, 48>>(arm.0, arm.1, vae1), (new, false));
    assert_eq!(replaced::<Long4>(x86::Caps::FULL, Memory::Pat(0), invlpg), (new, false));
}

#[test]
fn what_two_words_say_is_a_change_of_all_that_their_entry_translates() {
    let of = |input, level, words| {
        Change::of::<Long4>((Stage::First, HOST, None), Input(input), level, &x86::Caps::FULL, words)
    };
    let (writable, read_only) = (0x4000_00e7, 0x4000_00e5);
    let high = 0xffff_8000_4020_0000;
    let change = of(high + 0x5678, Level(2), (writable, read_only)).expect("canonical");
    let block =
        Leaf { accessed: true, dirty: true, ..Leaf::new(Output(0x4000_0000), 21, OPEN, Memory::Pat(0)) };
    let expected = Change {
        stage: Stage::First,
        tag: HOST,
        root: None,
        span: Span::new(Input(high), 0x20_0000).expect("fits"),
        page_shift: 12,
        table_shift: 21,
        old: Entry::Leaf(block),
        new: Entry::Leaf(Leaf { permissions: CLOSED, ..block }),
    };
    assert_eq!(change, expected);
    let regime = Regime { architecture: Architecture::Intel, stages: Stages::One, breaks: Breaks::Spared };
    let recipe = needed(&change, &regime, Consequence::MoreRights).expect("there is one");
    assert_eq!(recipe.as_slice(), [invlpg(expected.span)]);
    assert_eq!(of(1 << 47, Level(1), (writable, 0)), None, "the address is not canonical");
}

#[test]
fn a_bank_is_made_of_whole_sets() {
    for (slots, ways) in [(0, 1), (8, 0), (8, 3)] {
        let mut room = vec![None; slots];
        assert_eq!(Bank::new(&mut room, ways).err(), Some(UnevenBank { slots, ways }));
    }
}
