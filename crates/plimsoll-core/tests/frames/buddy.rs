//! The allocator under random requests, beside an oracle that knows of every page whether it is free, and nothing else.
#![expect(clippy::unwrap_used, reason = "an unexpected refusal is a failure of the test")]
use plimsoll_core::frames::buddy::{
    Cpu, Found, FrameEntry, Frames, FramesError, Kind, Order, Piece, TableLevel, entries_for,
};
use plimsoll_core::frames::firmware::{Claim, HostMap, Use};
use plimsoll_types::{ByteCount, Hpa, PageCount, Pfn};
use proptest::prelude::{Just, Strategy, any, prop, prop_oneof, proptest};
use std::time::Instant;

type Heap = Frames<Vec<FrameEntry>>;

fn order(order: u8) -> Order {
    Order::new(order).unwrap()
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap()
}

/// Frames of one run, in a table that has room for no more.
fn frames(first: u64, pages: u64) -> Heap {
    let mut frames = Frames::new(vec![FrameEntry::default(); index(first + pages)], Pfn(0));
    frames.add(Pfn(first), PageCount(pages)).unwrap();
    frames
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Allocate(u8),
    /// One of those that are held.
    Free(usize),
    /// Anything.
    FreeWrong(u64, u8),
    /// Another processor asks from now on; with `None`, nobody has a cache.
    Serve(Option<u32>),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        5 => (0u8..8).prop_map(Event::Allocate),
        4 => any::<usize>().prop_map(Event::Free),
        // Enough single pages to fill caches and to overflow them.
        8 => prop_oneof![Just(Event::Allocate(0)), any::<usize>().prop_map(Event::Free)],
        2 => (0u64..400, 0u8..9).prop_map(|(frame, order)| Event::FreeWrong(frame, order)),
        1 => prop::option::weighted(0.8, 0u32..3).prop_map(Event::Serve),
    ]
}

/// The naive oracle: every page, free or not.
struct Oracle {
    free: Vec<bool>,
}

impl Oracle {
    fn has_room(&self, order: Order) -> bool {
        self.free.chunks_exact(index(order.pages().0)).any(|run| run.iter().all(|free| *free))
    }

    fn mark(&mut self, piece: Piece, free: bool) {
        let first = index(piece.first.0);
        for page in &mut self.free[first..first + index(piece.order.pages().0)] {
            assert_ne!(*page, free, "{piece} overlaps another");
            *page = free;
        }
    }
}

proptest! {
    #[test]
    fn a_request_fails_only_when_no_aligned_run_is_free_and_nothing_is_given_twice(
        runs in prop::collection::vec((0u64..40, 1u64..100), 1..4),
        events in prop::collection::vec(event(), 1..400),
    ) {
        let mut heap = Frames::new(vec![FrameEntry::default(); 512], Pfn(0));
        let mut oracle = Oracle { free: vec![false; 512] };
        let mut at = 0;
        for (gap, pages) in runs {
            heap.add(Pfn(at + gap), PageCount(pages)).unwrap();
            (at + gap..at + gap + pages).for_each(|page| oracle.free[index(page)] = true);
            at += gap + pages;
        }
        let all = oracle.free.clone();
        let mut held: Vec<Piece> = Vec::new();
        for event in events {
            match event {
                Event::Allocate(size) => match heap.allocate(order(size), Kind::Host) {
                    Ok(piece) => {
                        assert_eq!(piece.order, order(size));
                        assert!(piece.first.0.is_multiple_of(piece.order.pages().0));
                        oracle.mark(piece, false);
                        held.push(piece);
                    }
                    Err(error) => {
                        assert_eq!(error, FramesError::NoMemory { order: order(size), free: heap.free_pages() });
                        assert!(!oracle.has_room(order(size)));
                    }
                },
                Event::Free(which) if !held.is_empty() => {
                    let piece = held.swap_remove(which % held.len());
                    heap.free(piece, Kind::Host).unwrap();
                    oracle.mark(piece, true);
                }
                Event::Free(_) => {}
                Event::Serve(cpu) => heap.serve(cpu.map(Cpu::new)),
                Event::FreeWrong(frame, size) => {
                    let piece = Piece { first: Pfn(frame), order: order(size) };
                    let before = heap.clone();
                    if !held.contains(&piece) {
                        assert!(heap.free(piece, Kind::Host).is_err(), "{piece}");
                    }
                    assert!(heap.free(piece, Kind::Device).is_err());
                    assert_eq!(heap, before);
                }
            }
            heap.audit().unwrap();
            assert!((0..3).all(|cpu| heap.cached(Cpu::new(cpu)) <= PageCount(32)));
            assert_eq!(heap.free_pages(), PageCount(oracle.free.iter().filter(|free| **free).count() as u64));
        }
        for (page, is_free) in (0..).zip(&oracle.free) {
            let found = heap.look(Pfn(page)).unwrap();
            assert_eq!(matches!(found, Found::Free(_)), *is_free);
            assert_eq!(matches!(found, Found::Gap), !all[index(page)]);
            if let Found::Used(piece, _) = found {
                assert!(held.contains(&piece));
            }
        }
        held.into_iter().for_each(|piece| heap.free(piece, Kind::Host).unwrap());
        oracle.free = all;
        heap.drain();
        heap.audit().unwrap();
        (0..9).for_each(|size| assert_eq!(heap.free_from(order(size)) > PageCount(0), oracle.has_room(order(size))));
    }
}

#[test]
fn what_is_given_back_twice_whole_for_part_or_as_something_else_is_refused_and_said() {
    let mut heap = frames(0, 16);
    let piece = heap.allocate(order(2), Kind::Host).unwrap();
    let refused = |heap: &mut Heap, given, kind| {
        let before = heap.clone();
        let error = heap.free(given, kind).unwrap_err();
        assert_eq!(*heap, before);
        error
    };
    let found = Found::Used(piece, Kind::Host);
    let smaller = Piece { order: order(1), ..piece };
    let inside = Piece { first: Pfn(piece.first.0 + 1), order: Order::PAGE };
    for (given, kind) in [(smaller, Kind::Host), (inside, Kind::Host), (piece, Kind::Guest { extent: 0 })] {
        let expected = FramesError::Mistaken { given, kind, found };
        assert_eq!(refused(&mut heap, given, kind), expected);
    }
    let far = Piece { first: Pfn(16), order: Order::PAGE };
    let expected = FramesError::NoSuchFrame { frame: Pfn(16) };
    assert_eq!(refused(&mut heap, far, Kind::Host), expected);
    heap.free(piece, Kind::Host).unwrap();
    let error = refused(&mut heap, piece, Kind::Host);
    let whole = Piece { first: Pfn(0), order: order(4) };
    assert_eq!(error, FramesError::Mistaken { given: piece, kind: Kind::Host, found: Found::Free(whole) });
    assert_eq!(error.to_string(), "16K at pfn:0x0 was given back as the host's, but 64K at pfn:0x0 is free");
}

#[test]
fn frames_beyond_the_table_or_given_before_are_not_added() {
    let mut heap = frames(4, 12);
    let before = heap.clone();
    let last = Pfn(16);
    assert_eq!(heap.add(Pfn(16), PageCount(1)), Err(FramesError::OutOfTable { last, room: 16 }));
    assert_eq!(heap.add(Pfn(0), PageCount(5)), Err(FramesError::Twice { frame: Pfn(4) }));
    assert!(heap.add(Pfn(u64::MAX), PageCount(2)).is_err());
    assert_eq!(heap, before);
    heap.add(Pfn(0), PageCount(4)).unwrap();
    assert_eq!(heap.pieces(order(4)), 1);
}

#[test]
fn tables_come_zeroed_from_their_levels_pool_and_are_given_to_nobody_else() {
    let mut heap = frames(0, 8);
    let (pages, blocks) = (TableLevel::new(1).unwrap(), TableLevel::new(2).unwrap());
    let piece = heap.allocate(Order::PAGE, Kind::Table(pages)).unwrap();
    assert!(heap.pool(piece, blocks).is_err());
    heap.pool(piece, pages).unwrap();
    assert!(heap.pool(piece, pages).is_err(), "it is in the pool");
    assert!(heap.free(piece, Kind::Table(pages)).is_err(), "it is in the pool");
    assert_eq!(heap.look(piece.first), Ok(Found::Pooled(piece, pages)));
    assert_eq!((heap.pooled(pages), heap.pooled(blocks)), (1, 0));
    assert_eq!(heap.take_pooled(blocks), None);
    heap.audit().unwrap();
    assert_eq!(heap.take_pooled(pages), Some(piece));
    assert_eq!(heap.take_pooled(pages), None);
    heap.free(piece, Kind::Table(pages)).unwrap();
    assert_eq!(heap.free_pages(), PageCount(8));
    assert!(TableLevel::new(0).is_none() && TableLevel::new(6).is_none());
}

#[test]
fn a_hosts_map_becomes_frames_whose_largest_pieces_are_of_a_gib() {
    let usable = |start, bytes| Claim { start: Hpa(start), bytes: ByteCount(bytes), what: Use::Usable };
    let claims = [usable(0x10_0000, 0x7ff0_0000), usable(1 << 32, 1 << 30)];
    let map = HostMap::<4>::new(&claims).unwrap();
    let table = vec![FrameEntry::default(); index(entries_for(&map))];
    let mut heap = Frames::of_map(table, &map).unwrap();
    assert_eq!(heap.pages(), PageCount(0x8_0000 - 0x100 + 0x4_0000));
    assert_eq!(heap.pieces(Order::MAX), 2);
    assert_eq!(heap.look(Pfn(0xff)), Ok(Found::Gap));
    assert_eq!(heap.look(Pfn(0x8_0000)), Ok(Found::Gap));
    let first = heap.allocate(Order::MAX, Kind::Host).unwrap().first;
    assert!(first == Pfn(0x4_0000) || first == Pfn(0x10_0000));
    let small = vec![FrameEntry::default(); 0x8_0000];
    assert!(matches!(Frames::of_map(small, &map), Err(FramesError::OutOfTable { .. })));
}

#[test]
fn a_processor_s_pages_come_from_its_cache_in_batches_and_count_as_free() {
    let mut heap = frames(0, 1024);
    let [one, other] = [0, 1].map(Cpu::new);
    heap.serve(Some(one));
    let piece = heap.allocate(Order::PAGE, Kind::Host).unwrap();
    assert_eq!((heap.cached(one), heap.cached(other)), (PageCount(15), PageCount(0)));
    // One block was cut up for all of them, and 1023 pages are free.
    assert_eq!((heap.free_pages(), heap.free_from(order(4))), (PageCount(1023), PageCount(1008)));
    heap.free(piece, Kind::Host).unwrap();
    // What was given back last is warm: it is had first.
    assert_eq!(heap.allocate(Order::PAGE, Kind::Device), Ok(piece));
    // It is a device's now, and is given back as nothing else.
    assert!(heap.free(piece, Kind::Host).is_err());
    heap.free(piece, Kind::Device).unwrap();
    let twice = heap.free(piece, Kind::Device).unwrap_err();
    assert_eq!(twice, FramesError::Mistaken { given: piece, kind: Kind::Device, found: Found::Free(piece) });
    // A cache that overflows gives a batch to the buddies, which join it.
    heap.serve(Some(other));
    let held: Vec<_> = (0..64).map(|_| heap.allocate(Order::PAGE, Kind::Host).unwrap()).collect();
    for piece in held {
        heap.free(piece, Kind::Host).unwrap();
        assert!(heap.cached(other) <= PageCount(32), "{}", heap.cached(other));
    }
    assert_eq!((heap.cached(one), heap.free_pages()), (PageCount(16), PageCount(1024)));
    heap.audit().unwrap();
}

#[test]
fn what_lies_in_caches_makes_no_request_fail() {
    let mut heap = frames(0, 32);
    let mut held = Vec::new();
    for cpu in [0, 1] {
        heap.serve(Some(Cpu::new(cpu)));
        held.push(heap.allocate(Order::PAGE, Kind::Host).unwrap());
    }
    held.into_iter().for_each(|piece| heap.free(piece, Kind::Host).unwrap());
    // All pages lie in two caches: nothing larger than a page is free.
    assert_eq!((heap.free_pages(), heap.free_from(order(1))), (PageCount(32), PageCount(0)));
    let all = heap.allocate(order(5), Kind::Host).unwrap();
    assert_eq!(heap.free_pages(), PageCount(0));
    heap.free(all, Kind::Host).unwrap();
    // A processor has the pages of another one's cache before it is refused one.
    heap.serve(Some(Cpu::new(0)));
    let first = heap.allocate(Order::PAGE, Kind::Host).unwrap();
    heap.serve(Some(Cpu::new(1)));
    let rest: Vec<_> = (0..31).map(|_| heap.allocate(Order::PAGE, Kind::Host).unwrap()).collect();
    assert!(!rest.contains(&first));
    assert!(heap.allocate(Order::PAGE, Kind::Host).is_err());
    heap.audit().unwrap();
}

/// Numbers as random as a shuffle needs them, the same every time.
struct Chance(u64);

impl Chance {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        index(self.0 >> 33) % end
    }
}

/// 1 GiB of pieces of 4 to 32 KiB, replaced at random at nine tenths full, then given back at random: how much of what is
/// free can be had in blocks of 2 MiB.
#[test]
fn fragmentation_goes_when_memory_is_given_back_and_is_reported_until_then() {
    let mut heap = frames(0, 1 << 18);
    let mut chance = Chance(1);
    let mut held = Vec::new();
    let start = Instant::now();
    let mut calls = 0u32;
    for _ in 0..400_000 {
        if heap.free_pages().0 * 10 < 1 << 18 {
            let piece = held.swap_remove(chance.below(held.len()));
            heap.free(piece, Kind::Host).unwrap();
        } else {
            held.push(heap.allocate(order(u8::try_from(chance.below(4)).unwrap()), Kind::Host).unwrap());
        }
        calls += 1;
    }
    println!("{:.0} ns a call", start.elapsed().as_secs_f64() * 1e9 / f64::from(calls));
    let full = held.len();
    for tenths in [10, 9, 7, 5, 3, 1, 0] {
        while held.len() * 10 > full * tenths {
            let piece = held.swap_remove(chance.below(held.len()));
            heap.free(piece, Kind::Host).unwrap();
        }
        let (free, blocks) = (heap.free_pages(), heap.free_from(Order::BLOCK));
        println!(
            "{} % of the pieces held: {} free, {} of it in blocks of 2 MiB",
            tenths * 10,
            free.bytes(),
            blocks.bytes()
        );
    }
    heap.audit().unwrap();
    assert_eq!(heap.free_from(Order::MAX), PageCount(1 << 18));
}

/// Pages of a burst of single ones: fewer than a cache takes at once.
const BURST: usize = 8;

/// Calls, in so many bursts that take pages and give all of them back, after which another number of runs of 16 pages is
/// whole.
fn reshaped(bursts: usize, cpu: Option<Cpu>) -> usize {
    let mut heap = frames(0, 1 << 10);
    heap.serve(cpu);
    let whole = |heap: &Heap| heap.free_from(order(4));
    let mut seen = vec![whole(&heap)];
    for _ in 0..bursts {
        let mut held = Vec::new();
        for _ in 0..BURST {
            held.push(heap.allocate(Order::PAGE, Kind::Host).unwrap());
            seen.push(whole(&heap));
        }
        for piece in held {
            heap.free(piece, Kind::Host).unwrap();
            seen.push(whole(&heap));
        }
    }
    seen.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

/// Single pages, taken and given back as a host that pages does, in bursts. What a call costs with and without a cache is for
/// people to read: it depends on the machine.
#[test]
fn a_cache_saves_the_dividing_and_joining_of_blocks() {
    // The first of a burst divides a block and the last joins it, unless a cache keeps the pages of one it has divided once.
    assert_eq!(reshaped(100, None), 200);
    assert_eq!(reshaped(100, Some(Cpu::FIRST)), 1);
    let mut costs = [0.0; 2];
    for (cost, cpu) in costs.iter_mut().zip([None, Some(Cpu::FIRST)]) {
        let mut heap = frames(0, 1 << 18);
        heap.serve(cpu);
        let mut held = Vec::new();
        let start = Instant::now();
        for _ in 0..50_000 {
            held.extend((0..BURST).map(|_| heap.allocate(Order::PAGE, Kind::Host).unwrap()));
            held.drain(..).for_each(|piece| heap.free(piece, Kind::Host).unwrap());
        }
        *cost = start.elapsed().as_secs_f64() * 1e9 / 800_000.0;
        heap.drain();
        heap.audit().unwrap();
        assert_eq!(heap.free_from(Order::MAX), PageCount(1 << 18));
    }
    println!("{:.0} ns a call without a cache, {:.0} with one", costs[0], costs[1]);
}
