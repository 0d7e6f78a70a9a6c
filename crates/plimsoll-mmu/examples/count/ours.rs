//! This crate's mapper, over a flat memory that a slice of atomics is.
use crate::{BYTES, FIRST, FRAMES, OUTPUT, Work, measured, outputs, pages};
use plimsoll_mmu::format::arm::{self, Lower};
use plimsoll_mmu::format::x86::{self, Long4, Npt};
use plimsoll_mmu::mapper::Translation;
use plimsoll_mmu::nested::{self, Counted, GuestMemory, NptStage};
use plimsoll_mmu::x86::{Control, Mode, Registers};
use plimsoll_mmu::{
    Access, Format, Found, Input, Leaf, Level, Mapper, Marks, Memory, NothingCached, Output, Permissions,
    Shareability, Span, TableFrames, TableMemory,
};
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

struct Arena(Box<[AtomicU64]>);

#[derive(Clone, Copy, Debug)]
struct Outside;

impl Arena {
    fn new(frames: usize) -> Self {
        Self((0..frames * 512).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, at: Output) -> Result<&AtomicU64, Outside> {
        usize::try_from(at.0 >> 3).ok().and_then(|index| self.0.get(index)).ok_or(Outside)
    }
}

impl TableMemory for Arena {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        Ok(self.word(at)?.load(Ordering::Acquire))
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let word = self.word(at)?;
        Ok(word
            .compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
            .unwrap_or_else(|found| found))
    }
}

/// Free frames, whatever their level.
struct Frames(Vec<Output>);

impl Frames {
    /// All but the first, which is the root's.
    fn new(count: usize) -> Self {
        Self((1..count).rev().map(|frame| Output(frame as u64 * 4096)).collect())
    }
}

impl TableFrames for Frames {
    fn left(&self, _: Level) -> usize {
        self.0.len()
    }

    fn take(&mut self, _: Level) -> Option<Output> {
        self.0.pop()
    }

    fn give(&mut self, _: Level, frame: Output) {
        self.0.push(frame);
    }
}

pub(crate) fn x86(work: Work, shift: u32) {
    let leaf = Leaf { accessed: true, dirty: true, ..leaf(shift, Memory::Pat(0)) };
    run::<Long4>(x86::Caps::FULL, leaf, work);
}

pub(crate) fn arm(work: Work, shift: u32) {
    let leaf = Leaf { accessed: true, dirty: true, ..leaf(shift, Memory::Mair(1, Shareability::Inner)) };
    run::<Lower<12, 48>>(arm::Caps::FULL, leaf, work);
}

fn leaf(shift: u32, memory: Memory) -> Leaf {
    Leaf::new(Output(OUTPUT), shift, Permissions::all(), memory)
}

fn span() -> Span {
    Span::new(Input(FIRST), BYTES).expect("fits")
}

fn run<F: Format>(caps: F::Caps, leaf: Leaf, work: Work) {
    let (arena, mut frames, mut caches) = (Arena::new(FRAMES), Frames::new(FRAMES), NothingCached);
    let mut mapper =
        Mapper::<F, _, _, _>::new(Output(0), caps, &arena, &mut frames, &mut caches).expect("aligned");
    let map =
        |mapper: &mut Mapper<'_, F, _, _, _>| mapper.map(black_box(span()), black_box(leaf)).expect("free");
    let count = BYTES >> leaf.shift;
    match work {
        Work::Map => measured(|| map(&mut mapper)),
        Work::Unmap => {
            map(&mut mapper);
            let removed = measured(|| mapper.unmap(black_box(span())).expect("mapped"));
            assert_eq!(removed, count);
            assert_eq!(frames.0.len(), FRAMES - 1);
            return;
        }
        Work::Walk => {
            map(&mut mapper);
            let show = |input, found: &Found| black_box((input, found.word, found.shift));
            assert_eq!(measured(|| go_through(&mapper, show)), outputs(leaf.shift));
        }
        Work::WalkRights => {
            map(&mut mapper);
            let show = |input, found: &Found| black_box((input, found.permissions, found.word, found.shift));
            assert_eq!(measured(|| go_through(&mapper, show)), outputs(leaf.shift));
        }
        Work::LookUp => {
            map(&mut mapper);
            let look = |found: &Found| black_box((found.word, found.shift));
            assert_eq!(measured(|| look_up(&mapper, leaf.shift, look)), outputs(leaf.shift));
        }
        Work::LookUpRights => {
            map(&mut mapper);
            let look = |found: &Found| black_box((found.permissions, found.word, found.shift));
            assert_eq!(measured(|| look_up(&mapper, leaf.shift, look)), outputs(leaf.shift));
        }
    }
    for page in pages(leaf.shift) {
        let walked = mapper.walk(Input(page + 5)).expect("well-formed");
        assert!(matches!(walked, Translation::Mapped(Output(at), _) if at == page + 5 - FIRST + OUTPUT));
    }
}

/// Goes through the range, and sums up where its pages go.
#[inline(always)]
fn go_through<F: Format, T>(
    mapper: &Mapper<'_, F, Arena, Frames, NothingCached>,
    show: impl Fn(Input, &Found) -> T,
) -> u64 {
    let mut sum = 0;
    let walked = mapper.translate_range(black_box(span()), |input, found| {
        show(input, found);
        sum += found.output.0;
    });
    walked.map_or(0, |()| sum)
}

/// Looks each page up by itself, and sums up where they go.
#[inline(always)]
fn look_up<F: Format, T>(
    mapper: &Mapper<'_, F, Arena, Frames, NothingCached>,
    shift: u32,
    look: impl Fn(&Found) -> T,
) -> u64 {
    pages(shift).fold(0, |sum, page| match mapper.translate(Input(black_box(page))) {
        Ok(Some(found)) => {
            look(&found);
            sum + found.output.0
        }
        _ => sum,
    })
}

/// A page table that a guest has, its frames where its physical addresses are; and the host's for it, below.
const GUEST_FRAMES: usize = FRAMES;

/// Walks of a guest's tables that are in memory as they are.
pub(crate) fn one_stage(work: Work, shift: u32) {
    stages(work, shift, |arena, guest, page| {
        let registers = registers(guest);
        x86_walk(arena, &registers, page).expect("mapped").output.0
    });
}

/// The same walks where the guest's memory is translated by tables of the host's.
pub(crate) fn two_stages(work: Work, shift: u32) {
    stages(work, shift, |arena, guest, page| {
        let second = NptStage { memory: arena, registers: registers(HOST_ROOT) };
        let memory = GuestMemory { second, memory: arena };
        let first = registers(guest);
        nested::walk(&memory, Access::Read, |memory| x86_walk(memory, &first, page))
            .expect("mapped")
            .second
            .output
            .0
    });
}

const HOST_ROOT: u64 = GUEST_FRAMES as u64 * 4096;

fn registers(root: u64) -> Registers {
    Registers { cr3: root, control: Control::WRITE_PROTECT, pkru: 0, caps: x86::Caps::FULL }
}

fn x86_walk<M: TableMemory>(
    memory: &M,
    registers: &Registers,
    page: u64,
) -> Result<plimsoll_mmu::Walked, plimsoll_mmu::x86::Fault<M::Error>> {
    plimsoll_mmu::x86::walk::<Long4, M>(
        memory,
        registers,
        Input(black_box(page)),
        (Access::Read, Mode::User),
        Marks::Set,
    )
}

/// Maps the guest's range in 4 KiB or 2 MiB, and the host's memory below it in 4 KiB; prints the memory references of all walks.
fn stages(work: Work, shift: u32, walk: impl Fn(&Counted<'_, Arena>, u64, u64) -> u64) {
    assert!(work == Work::LookUp, "pages are looked up through stages, and nothing else");
    // Where the guest's physical addresses are is where they were, so that both kinds of walk read the same words.
    let host_frames = FRAMES + FRAMES + 16;
    let arena = Arena::new(GUEST_FRAMES + host_frames);
    let mut caches = NothingCached;
    let mut guest = Frames::new(GUEST_FRAMES);
    let marks = |leaf: Leaf| Leaf { accessed: true, dirty: true, ..leaf };
    let mut mapper =
        Mapper::<Long4, _, _, _>::new(Output(0), x86::Caps::FULL, &arena, &mut guest, &mut caches)
            .expect("aligned");
    mapper.map(span(), marks(leaf(shift, Memory::Pat(0)))).expect("free");
    let mut host =
        Frames((1..host_frames).rev().map(|frame| Output(HOST_ROOT + frame as u64 * 4096)).collect());
    let mut mapper =
        Mapper::<Npt, _, _, _>::new(Output(HOST_ROOT), x86::Caps::FULL, &arena, &mut host, &mut caches)
            .expect("aligned");
    for (first, bytes) in [(0, HOST_ROOT), (OUTPUT, BYTES)] {
        let same = marks(Leaf { output: Output(first), ..leaf(12, Memory::Pat(0)) });
        mapper.map(Span::new(Input(first), bytes).expect("fits"), same).expect("free");
    }
    let counted = Counted::new(&arena);
    let sum = measured(|| pages(shift).fold(0u64, |sum, page| sum + walk(&counted, 0, page)));
    assert_eq!(sum, outputs(shift));
    println!("references {}", counted.reads());
}
