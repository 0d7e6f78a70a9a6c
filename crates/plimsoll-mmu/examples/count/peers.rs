//! The peers' own ways to the same tables, as their documentation has them used.
#![expect(
    unsafe_code,
    reason = "the peers leave it to their users that frames are frames and tables are not shared"
)]
use crate::{BYTES, FIRST, FRAMES, OUTPUT, Work, measured, outputs, pages};
use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{Constraints, El1And0, MemoryRegion, Translation};
use aarch64_paging::{Mapping, paging};
use std::fmt::Debug;
use std::hint::black_box;
use std::ptr::NonNull;
use x86_64::structures::paging::mapper::{
    MappedPageTable, PageTableFrameMapping, Translate, TranslateResult,
};
use x86_64::structures::paging::{
    FrameAllocator, Mapper, Page, PageSize, PageTable, PageTableFlags, PhysFrame, Size2MiB, Size4KiB,
};
use x86_64::{PhysAddr, VirtAddr};

/// An address as the peers have it.
fn place(address: u64) -> usize {
    usize::try_from(address).expect("a processor of 64 bits")
}

/// Frames of tables by physical address, which is their place in the pool.
struct Pool<T> {
    first: NonNull<T>,
    taken: usize,
}

impl<T> Pool<T> {
    /// [`FRAMES`] tables that stay for as long as the program runs.
    fn new(empty: impl Fn() -> T) -> Self {
        let tables: Vec<T> = (0..FRAMES).map(|_| empty()).collect();
        Self { first: NonNull::from(Vec::leak(tables)).cast(), taken: 0 }
    }

    fn take(&mut self) -> usize {
        assert!(self.taken < FRAMES, "the pool is as large as the work needs");
        self.taken += 1;
        self.taken - 1
    }

    fn table(&self, index: usize) -> NonNull<T> {
        assert!(index < FRAMES, "tables lead to tables of the pool");
        // SAFETY: the pool has FRAMES tables from `first` on, and the index is below that.
        unsafe { self.first.add(index) }
    }
}

impl Pool<PageTable> {
    fn frame(index: usize) -> PhysFrame {
        PhysFrame::containing_address(PhysAddr::new(index as u64 * 4096))
    }
}

// SAFETY: a frame is a table of the pool by its number, and nothing else refers to the pool's tables.
unsafe impl PageTableFrameMapping for Pool<PageTable> {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        self.table(place(frame.start_address().as_u64()) / 4096).as_ptr()
    }
}

struct Frames(Pool<PageTable>);

// SAFETY: each table of the pool is taken once, and all are zero.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        Some(Pool::frame(self.0.take()))
    }
}

pub(crate) fn x86_64(work: Work, shift: u32) {
    match shift {
        12 => x86_64_pages::<Size4KiB>(work, shift),
        _ => x86_64_pages::<Size2MiB>(work, shift),
    }
}

fn x86_64_pages<S: PageSize + Debug>(work: Work, shift: u32)
where
    for<'a> MappedPageTable<'a, Pool<PageTable>>: Mapper<S>,
{
    let mut pool = Pool::new(PageTable::new);
    let root = pool.take();
    // SAFETY: the root is a table of the pool that nothing else refers to.
    let root = unsafe { pool.table(root).as_mut() };
    let places = Pool { first: pool.first, taken: FRAMES };
    // SAFETY: the root is empty, and frames are tables of the pool.
    let mut mapper = unsafe { MappedPageTable::new(root, places) };
    let mut frames = Frames(pool);
    let flags = PageTableFlags::PRESENT
        | PageTableFlags::WRITABLE
        | PageTableFlags::USER_ACCESSIBLE
        | PageTableFlags::ACCESSED
        | PageTableFlags::DIRTY;
    let page = |first| Page::<S>::containing_address(VirtAddr::new(first));
    let mut map = |mapper: &mut MappedPageTable<'_, _>| {
        for first in pages(shift) {
            let frame = PhysFrame::containing_address(PhysAddr::new(black_box(first) - FIRST + OUTPUT));
            // SAFETY: no processor uses these tables.
            let flush = unsafe { mapper.map_to(page(black_box(first)), frame, flags, &mut frames) };
            flush.expect("free").ignore();
        }
    };
    match work {
        Work::Map => measured(|| map(&mut mapper)),
        Work::Unmap => {
            map(&mut mapper);
            measured(|| {
                for first in pages(shift) {
                    let (_, flush) = mapper.unmap(page(black_box(first))).expect("mapped");
                    flush.ignore();
                }
            });
            assert!(mapper.translate_addr(VirtAddr::new(FIRST)).is_none());
            return;
        }
        // It has no other way through a range, and does not know what tables withhold.
        Work::Walk | Work::WalkRights | Work::LookUp | Work::LookUpRights => {
            map(&mut mapper);
            let sum = measured(|| {
                pages(shift).fold(0u64, |sum, first| {
                    match mapper.translate(VirtAddr::new(black_box(first))) {
                        TranslateResult::Mapped { frame, offset, .. } => {
                            sum + frame.start_address().as_u64() + offset
                        }
                        _ => sum,
                    }
                })
            });
            assert_eq!(sum, outputs(shift));
        }
    }
    for first in pages(shift) {
        let found = mapper.translate_addr(VirtAddr::new(first + 5));
        assert_eq!(found, Some(PhysAddr::new(first + 5 - FIRST + OUTPUT)));
    }
}

type ArmTable = paging::PageTable<El1Attributes>;

impl Translation<El1Attributes> for Pool<ArmTable> {
    fn allocate_table(&mut self) -> (NonNull<ArmTable>, PhysicalAddress) {
        let index = self.take();
        (self.table(index), PhysicalAddress(index * 4096))
    }

    unsafe fn deallocate_table(&mut self, _: NonNull<ArmTable>) {}

    fn physical_to_virtual(&self, at: PhysicalAddress) -> NonNull<ArmTable> {
        self.table(at.0 / 4096)
    }
}

pub(crate) fn aarch64_paging(work: Work, shift: u32) {
    let pool = Pool::new(|| ArmTable::EMPTY);
    let mut mapping = Mapping::with_asid_and_va_range(pool, 0, 0, El1And0, paging::VaRange::Lower);
    let attributes = El1Attributes::VALID
        | El1Attributes::ACCESSED
        | El1Attributes::USER
        | El1Attributes::INNER_SHAREABLE
        | El1Attributes::ATTRIBUTE_INDEX_1;
    let constraints = match shift {
        12 => Constraints::NO_BLOCK_MAPPINGS | Constraints::NO_CONTIGUOUS_HINT,
        _ => Constraints::NO_CONTIGUOUS_HINT,
    };
    let region = |first: u64, bytes: u64| MemoryRegion::new(place(first), place(first + bytes));
    let whole = || region(black_box(FIRST), BYTES);
    let map = |mapping: &mut Mapping<_, El1And0>| {
        let output = PhysicalAddress(place(black_box(OUTPUT)));
        mapping.map_range(&whole(), output, attributes, constraints).expect("free");
    };
    let look = |mapping: &Mapping<Pool<ArmTable>, El1And0>, first: u64| {
        let mut found = 0;
        mapping
            .walk_range(&region(first, 1 << shift), &mut |_, descriptor, _| {
                found = descriptor.output_address().0 as u64;
                Ok(())
            })
            .map(|()| found)
    };
    match work {
        Work::Map => measured(|| map(&mut mapping)),
        Work::Unmap => {
            map(&mut mapping);
            let nothing = El1Attributes::empty();
            measured(|| mapping.map_range(&whole(), PhysicalAddress(0), nothing, constraints))
                .expect("mapped");
            let mut valid = 0;
            mapping
                .walk_range(&whole(), &mut |_, descriptor, _| {
                    valid += usize::from(descriptor.flags().contains(El1Attributes::VALID));
                    Ok(())
                })
                .expect("well-formed");
            assert_eq!(valid, 0);
            return;
        }
        Work::Walk | Work::WalkRights => {
            map(&mut mapping);
            let sum = measured(|| {
                let mut sum = 0;
                let walked = mapping.walk_range(&whole(), &mut |_, descriptor, _| {
                    sum += descriptor.output_address().0 as u64;
                    Ok(())
                });
                walked.map(|()| sum)
            });
            assert_eq!(sum.ok(), Some(outputs(shift)));
        }
        Work::LookUp | Work::LookUpRights => {
            map(&mut mapping);
            let sum = measured(|| {
                pages(shift).fold(0u64, |sum, first| sum + look(&mapping, black_box(first)).unwrap_or(0))
            });
            assert_eq!(sum, outputs(shift));
        }
    }
    for first in pages(shift) {
        assert_eq!(look(&mapping, first).expect("well-formed"), first - FIRST + OUTPUT);
    }
}
