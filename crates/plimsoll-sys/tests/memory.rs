//! Mappings, page maps and reading of process memory against the running kernel.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use plimsoll_sys::mapping::{
    AnonymousMapping, ExclusiveMapping, HugePages, MapError, Memfd, MemfdError, Merging, RangeError,
    SharedMapping, large_folio_folder, make_files_in,
};
use plimsoll_sys::pagemap::{Categories, Entry, Filter, Pagemap, PagemapError};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::CapabilitySet;
use plimsoll_sys::process_memory::{self, Advice, Refusal};
use plimsoll_sys::rights::keep_capabilities;
use plimsoll_sys::{HvaRange, ProcessId, procfs};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Hva, PAGE_SIZE};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

const PAGE: u64 = PAGE_SIZE as u64;

fn map(pages: u64) -> AnonymousMapping {
    AnonymousMapping::new(ByteCount(pages * PAGE), HugePages::Never).unwrap()
}

fn pages(mapping: &AnonymousMapping, first: u64, count: u64) -> HvaRange {
    HvaRange::new(Hva(mapping.base().0 + first * PAGE), ByteCount(count * PAGE)).unwrap()
}

#[test]
fn mappings_are_aligned_to_blocks_and_start_as_zeros() {
    for count in [1, 511, 512, 513] {
        let memory = map(count);
        assert_eq!(memory.base().0 % BLOCK_SIZE as u64, 0);
        assert_eq!(memory.read_u64(ByteCount(count * PAGE - 8)).unwrap(), 0);
    }
    for len in [0, 1, PAGE + 1, u64::MAX, u64::MAX - PAGE + 1] {
        let error = AnonymousMapping::new(ByteCount(len), HugePages::Never).unwrap_err();
        assert!(matches!(error, MapError::Size { .. } | MapError::Kernel { .. }), "{len}: {error}");
    }
}

#[test]
fn bytes_copied_in_come_out_and_a_discard_makes_zeros() {
    let memory = map(2);
    let bytes: Vec<u8> = (0..=255).cycle().take(PAGE_SIZE).collect();
    memory.copy_into(ByteCount(PAGE / 2), &bytes).unwrap();
    let mut back = vec![0; PAGE_SIZE];
    memory.copy_from(ByteCount(PAGE / 2), &mut back).unwrap();
    assert_eq!(back, bytes);
    memory.discard(pages(&memory, 0, 1)).unwrap();
    memory.copy_from(ByteCount(PAGE / 2), &mut back).unwrap();
    assert_eq!(
        (&back[..PAGE_SIZE / 2], &back[PAGE_SIZE / 2..]),
        (&[0; PAGE_SIZE / 2][..], &bytes[PAGE_SIZE / 2..])
    );
}

#[test]
fn nothing_outside_a_mapping_is_reached_through_it() {
    let memory = map(2);
    for offset in [2 * PAGE, u64::MAX - 7, 1 << 60] {
        let error = memory.read_u64(ByteCount(offset)).unwrap_err();
        assert!(matches!(error, RangeError::OffsetOutside { .. }), "{offset}: {error}");
    }
    assert!(matches!(memory.read_u64(ByteCount(4)), Err(RangeError::Unaligned { .. })));
    assert!(memory.copy_into(ByteCount(2 * PAGE - 8), &[0; 16]).is_err());
    let other = map(1);
    assert!(matches!(memory.discard(other.range()), Err(RangeError::Outside { .. })));
    let too_long = HvaRange::new(memory.base(), ByteCount(3 * PAGE)).unwrap();
    assert!(memory.unborrowed(too_long).is_err());
}

#[test]
fn populated_reports_pages_with_contents_only() {
    let memory = map(64);
    for page in [3, 4, 5, 40] {
        memory.write_u64(ByteCount(page * PAGE), 1).unwrap();
    }
    let map = Pagemap::open(ProcessId::own()).unwrap();
    let mut runs = Vec::new();
    map.populated(memory.range(), |run| runs.push(run)).unwrap();
    assert_eq!(runs, [pages(&memory, 3, 3), pages(&memory, 40, 1)]);

    let mut entries = Vec::new();
    map.read(memory.range(), &mut entries).unwrap();
    let populated: Vec<usize> = (0..64).filter(|page| entries[*page].is_populated()).collect();
    assert_eq!(populated, [3, 4, 5, 40], "entries and scan agree");
    assert!(
        entries[3].contains(Entry::PRESENT | Entry::EXCLUSIVE) && !entries[3].contains(Entry::FILE_OR_SHARED)
    );
}

#[test]
fn a_scan_with_more_runs_than_fit_in_one_call_is_complete() {
    let memory = map(4096);
    for page in (0..4096).step_by(2) {
        memory.write_u64(ByteCount(page * PAGE), 1).unwrap();
    }
    let map = Pagemap::open(ProcessId::own()).unwrap();
    assert_eq!(map.populated_bytes(memory.range()).unwrap(), ByteCount(2048 * PAGE));
    let mut count = 0;
    map.populated(memory.range(), |run| count += run.len().0 / PAGE).unwrap();
    assert_eq!(count, 2048);
    let mut entries = Vec::new();
    map.read(memory.range(), &mut entries).unwrap();
    assert_eq!(entries.iter().filter(|entry| entry.is_populated()).count(), 2048);
}

#[test]
fn a_scan_tells_huge_pages_apart() {
    let memory = AnonymousMapping::new(ByteCount(2 * BLOCK_SIZE as u64), HugePages::Prefer).unwrap();
    let first = pages(&memory, 0, 512);
    memory.populate_write(first).unwrap();
    memory.collapse(first).unwrap();
    memory.advise_huge_pages(pages(&memory, 512, 512), HugePages::Never).unwrap();
    memory.write_u64(ByteCount(BLOCK_SIZE as u64), 1).unwrap();
    let filter =
        Filter { all_of: Categories::PRESENT, any_of: Categories::empty(), report: Categories::HUGE };
    let mut runs = Vec::new();
    Pagemap::open(ProcessId::own()).unwrap().scan(memory.range(), filter, |run| runs.push(run)).unwrap();
    let found: Vec<_> = runs.iter().map(|run| (run.range, run.categories)).collect();
    assert_eq!(found, [(first, Categories::HUGE), (pages(&memory, 512, 1), Categories::empty())]);
}

#[test]
fn unaligned_ranges_and_missing_processes_are_errors() {
    let map = Pagemap::open(ProcessId::own()).unwrap();
    let odd = HvaRange::new(Hva(0x1001), ByteCount(PAGE)).unwrap();
    assert!(matches!(map.populated_bytes(odd), Err(PagemapError::Unaligned { .. })));
    assert!(matches!(map.read(odd, &mut Vec::new()), Err(PagemapError::Unaligned { .. })));
    let nobody = ProcessId::new(i32::MAX.cast_unsigned()).unwrap();
    assert!(matches!(Pagemap::open(nobody), Err(PagemapError::NoProcess(_))));
}

#[test]
fn many_pages_are_read_in_order_and_a_gap_stops_with_its_reason() {
    let memory = map(3000);
    for page in 0..3000 {
        memory.write_u64(ByteCount(page * PAGE), page).unwrap();
    }
    // Backwards, so that nothing is right by accident, and more than one system call's worth.
    let ranges: Vec<HvaRange> = (0..3000)
        .rev()
        .map(|page| HvaRange::new(Hva(memory.base().0 + page * PAGE), ByteCount(8)).unwrap())
        .collect();
    let mut bytes = vec![0; 3000 * 8];
    let read = process_memory::read_vectored(ProcessId::own(), &ranges, &mut bytes);
    assert_eq!((read.done, read.stop), (ByteCount(24000), None));
    let words: Vec<u64> = bytes.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
    assert_eq!(words, (0..3000).rev().collect::<Vec<u64>>());

    let unmapped = HvaRange::new(Hva(PAGE), ByteCount(8)).unwrap();
    let with_gap = [ranges[0], unmapped, ranges[1]];
    let mut bytes = [0; 24];
    let read = process_memory::read_vectored(ProcessId::own(), &with_gap, &mut bytes);
    assert_eq!((read.done, read.stop), (ByteCount(8), Some(Refusal::NotMapped)));
    let short = process_memory::read_vectored(ProcessId::own(), &with_gap, &mut [0; 23]);
    assert_eq!(short.stop, Some(Refusal::LengthMismatch));
}

#[test]
fn advice_is_given_through_a_pidfd() {
    let memory = map(8);
    memory.populate_write(memory.range()).unwrap();
    memory.write_u64(ByteCount(0), 5).unwrap();
    let own = Pidfd::open(ProcessId::own()).unwrap();
    let advised = process_memory::advise(&own, &[pages(&memory, 0, 2), pages(&memory, 4, 2)], Advice::Cold);
    assert_eq!((advised.done, advised.stop), (ByteCount(4 * PAGE), None));
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 5);
    let unmapped = HvaRange::new(Hva(PAGE), ByteCount(PAGE)).unwrap();
    let refused = process_memory::advise(&own, &[unmapped], Advice::PageOut);
    assert_eq!((refused.done, refused.stop), (ByteCount(0), Some(Refusal::NotMapped)));
}

#[test]
fn two_mappings_of_a_memfd_show_the_same_words() {
    let memfd = Memfd::create("plimsoll-test", ByteCount(2 * PAGE)).unwrap();
    let first = SharedMapping::new(&memfd).unwrap();
    let second =
        SharedMapping::new(&Memfd::try_from(OwnedFd::from(memfd.try_clone().unwrap())).unwrap()).unwrap();
    assert_eq!(first.as_atomic_u64s().len(), 1024);
    first.as_atomic_u64s()[512].store(9, Ordering::Relaxed);
    assert_eq!(second.as_atomic_u64s()[512].load(Ordering::Relaxed), 9);
    memfd.punch_hole(ByteCount(PAGE), ByteCount(PAGE)).unwrap();
    assert_eq!(second.as_atomic_u64s()[512].load(Ordering::Relaxed), 0);
    assert!(matches!(memfd.punch_hole(ByteCount(PAGE), ByteCount(2 * PAGE)), Err(MemfdError::Range { .. })));
}

#[test]
fn a_memfd_cannot_change_its_size_and_an_unsealed_one_is_not_adopted() {
    let memfd = Memfd::create("plimsoll-test", ByteCount(PAGE)).unwrap();
    assert!(rustix::fs::ftruncate(&memfd, 0).is_err());
    assert!(rustix::fs::ftruncate(&memfd, 2 * PAGE).is_err());
    let mode = rustix::fs::fstat(&memfd).unwrap().st_mode & 0o7777;
    assert_eq!(mode, 0o600);

    let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::CLOEXEC;
    let unsealed = rustix::fs::memfd_create("plimsoll-test", flags).unwrap();
    rustix::fs::ftruncate(&unsealed, PAGE).unwrap();
    assert!(matches!(Memfd::try_from(unsealed), Err(MemfdError::Unsealed)));
    let (socket, _) = plimsoll_sys::fdpass::seqpacket_pair().unwrap();
    assert!(matches!(Memfd::try_from(socket), Err(MemfdError::NotMemfd)));
}

#[test]
fn an_exclusive_mapping_is_bytes_and_keeps_them_in_its_file() {
    let limit = ByteCount(4 * PAGE);
    let mut memory = ExclusiveMapping::create("plimsoll-test", limit).unwrap();
    assert!(memory.is_empty());
    memory.grow(ByteCount(2 * PAGE)).unwrap();
    memory.grow(ByteCount(PAGE)).unwrap();
    assert_eq!(memory.len(), 2 * PAGE_SIZE, "it does not shrink");
    memory.fill(7);
    memory.punch_hole(ByteCount(0), ByteCount(PAGE)).unwrap();
    assert!(memory[..PAGE_SIZE].iter().all(|byte| *byte == 0));
    let kept = || memory.keepsake().try_clone_to_owned().unwrap();
    let (first, second) = (kept(), kept());
    let early = ExclusiveMapping::inherit(kept(), limit, Duration::ZERO);
    assert!(matches!(early, Err(MemfdError::InUse)), "two mappings of one file: {early:?}");
    drop(memory);
    let again = ExclusiveMapping::inherit(first, limit, Duration::ZERO).unwrap();
    assert_eq!(again.len(), 2 * PAGE_SIZE);
    assert!(again[PAGE_SIZE..].iter().all(|byte| *byte == 7));
    drop(again);
    let short = ExclusiveMapping::inherit(second, ByteCount(PAGE), Duration::ZERO);
    assert!(matches!(short, Err(MemfdError::Size { size: ByteCount(8192) })), "{short:?}");
}

#[test]
fn a_mapping_that_whoever_had_it_is_still_letting_go_of_is_waited_for() {
    let limit = ByteCount(4 * PAGE);
    let mut memory = ExclusiveMapping::create("plimsoll-test", limit).unwrap();
    memory.grow(ByteCount(PAGE)).unwrap();
    memory.fill(7);
    let kept = memory.keepsake().try_clone_to_owned().unwrap();
    // As a process that was killed and is slow to end.
    let ends = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        drop(memory);
    });
    let again = ExclusiveMapping::inherit(kept, limit, Duration::from_secs(600)).unwrap();
    assert!(again.iter().all(|byte| *byte == 7));
    ends.join().unwrap();
}

#[test]
fn whoever_was_given_a_folder_needs_no_right_to_mount_one() {
    let folder = match large_folio_folder() {
        Ok(folder) => folder,
        Err(errno) => {
            let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name == "root"), "root is required: {errno}");
            return println!("SKIPPED: no tmpfs can be mounted: {errno}");
        }
    };
    make_files_in(folder);
    // This thread's, and nobody else's.
    keep_capabilities(CapabilitySet::empty(), CapabilitySet::empty()).unwrap();
    assert!(large_folio_folder().is_err());
    let mut memory = ExclusiveMapping::create("plimsoll-test", ByteCount(4 * PAGE)).unwrap();
    memory.populate(ByteCount(0), ByteCount(PAGE)).unwrap();
    memory[0] = 7;
    let file = std::fs::read_link(format!("/proc/self/fd/{}", memory.keepsake().as_raw_fd())).unwrap();
    assert!(!file.to_string_lossy().contains("memfd:"), "{}", file.display());
}

#[test]
fn populating_an_exclusive_mapping_takes_memory_and_changes_no_byte() {
    let mut memory = ExclusiveMapping::create("plimsoll-test", ByteCount(4 * PAGE)).unwrap();
    memory.grow(ByteCount(2 * PAGE)).unwrap();
    memory[PAGE_SIZE] = 7;
    memory.populate(ByteCount(PAGE), ByteCount(2 * PAGE)).unwrap();
    assert_eq!(memory.len(), 3 * PAGE_SIZE, "it grew to the end of what was populated");
    let start = Hva(memory.as_ptr().addr() as u64);
    let (range, mut entries) = (HvaRange::new(start, ByteCount(4 * PAGE)).unwrap(), Vec::new());
    Pagemap::open(ProcessId::own()).unwrap().read(range, &mut entries).unwrap();
    let present: Vec<_> = entries.iter().map(|entry| entry.contains(Entry::PRESENT)).collect();
    assert_eq!(present, [false, true, true, false]);
    assert_eq!((memory[PAGE_SIZE], memory[2 * PAGE_SIZE]), (7, 0));
    for (offset, len) in [(0, 0), (1, PAGE), (PAGE, 1), (PAGE, 4 * PAGE), (u64::MAX - PAGE + 1, PAGE)] {
        let refused = memory.populate(ByteCount(offset), ByteCount(len));
        assert!(matches!(refused, Err(MemfdError::Range { .. })), "{offset} {len}: {refused:?}");
    }
}

#[test]
fn proc_files_of_this_process_are_understood() {
    let own = ProcessId::own();
    let memory = map(1024);
    memory.populate_write(memory.range()).unwrap();
    let rollup = procfs::smaps_rollup(own).unwrap();
    assert!(rollup.anonymous >= memory.len() && rollup.rss >= rollup.anonymous, "{rollup:?}");
    let status = procfs::status(own).unwrap();
    assert!(status.peak_rss >= memory.len() && status.threads >= 1, "{status:?}");
    assert!(procfs::statm(own).unwrap().resident.bytes() >= memory.len());
    assert_eq!(procfs::start_time(own).unwrap(), procfs::start_time(own).unwrap());
    let nobody = ProcessId::new(i32::MAX.cast_unsigned()).unwrap();
    assert!(matches!(procfs::statm(nobody), Err(procfs::ProcfsError::NoProcess(_))));
}

#[test]
fn memory_is_mergeable_while_it_is_offered_and_only_by_its_owner() {
    let memory = map(2);
    let own = ProcessId::own();
    memory.write_u64(ByteCount(0), 7).unwrap();
    if let Err(RangeError::Advise { source, .. }) = memory.advise_merging(memory.range(), Merging::Offered) {
        return println!("SKIPPED: no KSM in this kernel: {source}");
    }
    assert!(procfs::is_mergeable(own).unwrap());
    memory.advise_merging(pages(&memory, 1, 1), Merging::Withdrawn).unwrap();
    assert!(procfs::is_mergeable(own).unwrap());
    memory.advise_merging(memory.range(), Merging::Withdrawn).unwrap();
    assert_eq!(memory.read_u64(ByteCount(0)).unwrap(), 7);
    let error = memory.advise_merging(pages(&memory, 1, 2), Merging::Offered).unwrap_err();
    assert!(matches!(error, RangeError::Outside { .. }), "{error}");
}
