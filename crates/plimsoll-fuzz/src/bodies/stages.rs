//! Walks through hostile tables of hosts: second stages of processors, and remapping hardware's. What holds of a guest's walks holds here.
//!
//! A host writes these itself; but a table that it gave back too early is a guest's page.
use super::Everywhere;
use super::walks::{ON_OFF, bits, chain, twice};
use plimsoll_mmu::format::{amdvi as amdvis, arm as arms, ept as epts, vtd as vtds, x86 as x86s};
use plimsoll_mmu::mapper::{MapError, Mapper};
use plimsoll_mmu::nested::{self, GuestMemory, Purpose, SecondStage};
use plimsoll_mmu::vtd::Request;
use plimsoll_mmu::{
    Access, Feature, Format, Input, Level, Marks, NothingCached, Output, Permissions, Pools, Span,
};
use plimsoll_mmu::{amdvi, arm, ept, smmu, vtd, x86};
use std::convert::Infallible;

/// The most pages a range is gone through.
const PAGES: u64 = 96;

/// Has `input` go through each kind of tables.
pub(crate) fn walk(memory: &Everywhere, input: Input, root: u64, how: u64, access: Access) -> bool {
    let request = [Request::Read, Request::Write, Request::Atomic][bits(how, 24, 3)];
    ept_walk(memory, input, root, how, access)
        | over_ept(memory, input, root, how, access)
        | npt_walk(memory, input, root, how, access)
        | vtd_walk::<vtds::Second3>(memory, input, root, how, request)
        | vtd_walk::<vtds::Second4>(memory, input, root, how, request)
        | vtd_walk::<vtds::Second5>(memory, input, root, how, request)
        | amdvi_walk::<amdvis::Host<1>>(memory, input, root, how, request)
        | amdvi_walk::<amdvis::Host<4>>(memory, input, root, how, request)
        | amdvi_walk::<amdvis::Host<5>>(memory, input, root, how, request)
        | smmu_walk::<arms::Second<12, 40>>(memory, input, root, how, access)
        | smmu_walk::<arms::Second<16, 48>>(memory, input, root, how, access)
}

/// Goes through a range of tables of each kind, a few pages of them.
pub(crate) fn ranges(memory: &Everywhere, input: Input, root: u64, how: u64) {
    range::<x86s::Long4>(memory, x86s::Caps::FULL, input, root, how);
    range::<epts::Ept>(memory, epts::Caps::FULL, input, root, how);
    range::<vtds::Second4>(memory, vtds::Caps::FULL, input, root, how);
    range::<amdvis::Host<4>>(memory, amdvis::Caps::FULL, input, root, how);
    range::<arms::Second<12, 40>>(memory, arms::Caps::FULL, input, root, how);
}

/// Without accessed bits, as the memory takes no marks.
fn ept_stage<'a>(memory: &'a Everywhere, root: u64, how: u64) -> ept::Stage<'a, Everywhere> {
    let caps = epts::Caps {
        accessed_dirty: Feature::Off,
        execute_only: ON_OFF[bits(how, 17, 2)],
        ..epts::Caps::FULL
    };
    ept::Stage { memory, root: Output(root), caps }
}

fn ept_walk(memory: &Everywhere, input: Input, root: u64, how: u64, access: Access) -> bool {
    let stage = ept_stage(memory, root, how);
    let purpose = [Purpose::Final, Purpose::GuestTable][bits(how, 18, 2)];
    twice::<epts::Ept, ept::Fault<Infallible>>(memory, || stage.translate(input, access, purpose))
}

/// A guest's tables over EPT's, both of the same words: at most 24 entries are read.
fn over_ept(memory: &Everywhere, input: Input, root: u64, how: u64, access: Access) -> bool {
    let guest = GuestMemory { second: ept_stage(memory, root, how), memory };
    let control = x86::Control::from_bits_truncate(u8::try_from(how >> 8 & 0xff).unwrap());
    let registers = x86::Registers { cr3: root, control, pkru: 0, caps: x86s::Caps::FULL };
    memory.reads.set(0);
    let walked = nested::walk(&guest, access, |memory| {
        let access = (access, x86::Mode::User);
        x86::walk::<x86s::Long4, _>(memory, &registers, input, access, Marks::Leave)
    });
    let reads = memory.reads.get();
    assert!(reads <= 24, "{reads} reads of four levels over four");
    walked.is_ok()
}

fn npt_walk(memory: &Everywhere, input: Input, cr3: u64, how: u64, access: Access) -> bool {
    let no_execute = ON_OFF[bits(how, 19, 2)];
    let caps = x86s::Caps { no_execute, ..x86s::Caps::FULL };
    let registers = x86::Registers { cr3, control: x86::Control::empty(), pkru: 0, caps };
    twice::<x86s::Npt, x86::Fault<Infallible>>(memory, || {
        x86::walk::<x86s::Npt, _>(memory, &registers, input, (access, x86::Mode::User), Marks::Leave)
    })
}

fn vtd_walk<F: vtds::VtdFormat>(
    memory: &Everywhere,
    input: Input,
    root: u64,
    how: u64,
    request: Request,
) -> bool {
    let caps = vtds::Caps {
        snoop_control: ON_OFF[bits(how, 20, 2)],
        transient: ON_OFF[bits(how, 21, 2)],
        ..vtds::Caps::FULL
    };
    let registers = vtd::Registers { root: Output(root), caps };
    twice::<F, vtd::Fault<Infallible>>(memory, || {
        vtd::walk::<F, _>(memory, &registers, input, request, Marks::Leave)
    })
}

fn amdvi_walk<F: amdvis::AmdViFormat>(
    memory: &Everywhere,
    input: Input,
    root: u64,
    how: u64,
    request: Request,
) -> bool {
    use amdvis::Keeps;
    let keeps = [Keeps::Nothing, Keeps::Accessed, Keeps::AccessedAndDirty][bits(how, 22, 3)];
    let permissions = Permissions::from_bits_truncate(u8::try_from(how >> 8 & 3).unwrap());
    let caps = amdvis::Caps { keeps, ..amdvis::Caps::FULL };
    let registers = amdvi::Registers { root: Output(root), permissions, caps };
    twice::<F, amdvi::Fault<Infallible>>(memory, || {
        amdvi::walk::<F, _>(memory, &registers, input, request, Marks::Leave)
    })
}

fn smmu_walk<F: smmu::SmmuFormat>(
    memory: &Everywhere,
    input: Input,
    root: u64,
    how: u64,
    access: Access,
) -> bool {
    let stage = smmu::SecondStage {
        root: Output((root & ((1 << 48) - 1)) >> 16 << 16),
        vmid: 1,
        granule: F::PAGE_SHIFT,
        input_bits: F::INPUT_BITS,
        levels: F::LEVELS,
        caps: arms::Caps::FULL,
        access_flag: ON_OFF[bits(how, 23, 2)],
        ignore_access_flag: ON_OFF[bits(how, 26, 2)],
        on_fault: smmu::OnFault::Record,
        remote: false,
    };
    let stage = stage.of::<F>().unwrap();
    let mode = [arm::Mode::User, arm::Mode::Privileged][bits(how, 27, 2)];
    twice::<F, arm::Fault<Infallible>>(memory, || {
        stage.translate(memory, input, (access, mode), Marks::Leave)
    })
}

/// What a range shows is what each of its pages is translated to, with a read for each entry of the range and no more.
fn range<F: Format>(memory: &Everywhere, caps: F::Caps, input: Input, root: u64, how: u64) {
    let (mut frames, mut caches) = (Pools::<1>::default(), NothingCached);
    let root = Output((root & ((1 << 40) - 1)) >> 16 << 16);
    let mapper = Mapper::<F, _, _, _>::new(root, caps, memory, &mut frames, &mut caches).unwrap();
    let page = 1 << F::PAGE_SHIFT;
    // Below the end of the lower half, so that it does not run out of what is translated.
    let first = F::offset(input) >> F::PAGE_SHIFT << F::PAGE_SHIFT & ((1 << (F::INPUT_BITS - 2)) - 1);
    let pages = 1 + (how >> 32) % PAGES;
    let span = Span::new(Input(first), pages * page).unwrap();
    let mut shown = Vec::new();
    memory.reads.set(0);
    let ended = mapper.translate_range(span, |input, found| shown.push((input, *found)));
    // Ends of the range lie in a table of each level; those between are of the lowest but for two of each.
    let most = pages + 3 * u64::from(F::LEVELS);
    let reads = memory.reads.get();
    assert!(reads <= most, "{}: {reads} reads of {pages} pages", F::NAME);
    for (input, found) in &shown {
        assert_eq!(mapper.translate(*input), Ok(Some(*found)), "{} at {input}", F::NAME);
    }
    match ended {
        Ok(()) => {}
        Err(MapError::Malformed { level, .. }) => assert!(level >= Level::PAGES && level <= F::root()),
        Err(error) => panic!("all of this memory can be read: {error}"),
    }
}

/// A chain of tables each of whose entries is one word.
pub(crate) fn examples() -> Vec<Vec<u8>> {
    // Readable, writable, executable: a table at every even word, and at the odd ones a page, write-back.
    let ept = [chain(0x7008, 0, 0x2007), 0x3037_u64.to_le_bytes().to_vec()].concat();
    // Present, next level 0, readable, writable.
    let amdvi = chain(0x7008, 0x300, 0x2000 | 1 | 3 << 61);
    // Readable, writable.
    let vtd = chain(0x7008, 0, 0x2003);
    vec![ept, amdvi, vtd]
}
