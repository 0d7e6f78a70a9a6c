//! Shadow tables against the guest's own tables, whatever the guest, its devices and its host do.
mod cases;
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;
mod world;

use plimsoll_mmu::format::x86::Long4;
use plimsoll_mmu::shadow::{Backing, Load, Writes};
use plimsoll_mmu::x86::{Control, Mode};
use plimsoll_mmu::{Access, Format, Input, Output, Permissions};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::cell::Cell;
use world::{CPUS, Guest, Mistake, Op, Place, Seen, World};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const SIZE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;

/// The guest's first pages: two roots, tables, and a table that maps all of them at `direct`.
const ROOTS: [u64; 2] = [1, 2];
const TABLES: u64 = 10;
const DIRECT: u64 = 9;
/// Pages by themselves end here; a run of 512 begins at `BLOCK`.
const PAGES: u64 = 20;
const BLOCK: u64 = 512;

/// An address by its four indices.
fn address(indices: [u64; 4], inside: u64) -> Input {
    let [fourth, third, second, first] = indices;
    Long4::extend(fourth << 39 | third << 30 | second << 21 | first << 12 | inside)
}

/// Where the guest sees its own tables and pages.
fn direct(at: u64) -> Input {
    address([0, 0, 3, at >> 12], at & 0xfff)
}

/// A guest whose kernel has just switched paging on.
fn guest() -> Guest {
    let guest = Guest::default();
    let everything = Permissions::READ | Permissions::WRITE | Permissions::EXECUTE;
    for page in 0..PAGES {
        let frame = Output((0x40 + page) << 12);
        let backing = Backing { frame, shift: 12, permissions: everything, writes: Writes::Free };
        guest.back(page, backing);
    }
    for page in BLOCK..BLOCK + 512 {
        let frame = Output((0x2000 + page) << 12);
        let backing = Backing { frame, shift: 21, permissions: everything, writes: Writes::Free };
        guest.back(page, backing);
    }
    let table = |at: u64| at << 12 | PRESENT | WRITE | USER;
    for root in ROOTS {
        guest.set(root << 12, table(3));
        guest.set(root << 12 | 8, table(4));
        // The root names itself: its tables are at an address of their own.
        guest.set(root << 12 | 16, table(root));
    }
    guest.set(3 << 12, table(5));
    guest.set(4 << 12, table(5));
    guest.set(3 << 12 | 8, table(6));
    // The same tables of pages once more, with fewer rights.
    guest.set(6 << 12, table(7) & !WRITE);
    guest.set(6 << 12 | 8, table(8) & !USER);
    guest.set(6 << 12 | 16, table(7) | NO_EXECUTE);
    // A large page with the table in it that maps it.
    guest.set(4 << 12 | 8, table(BLOCK + 2));
    guest.set((BLOCK + 2) << 12, BLOCK << 12 | PRESENT | WRITE | USER | SIZE);
    guest.set((BLOCK + 2) << 12 | 8, table(8));
    guest.set(5 << 12, table(7));
    guest.set(5 << 12 | 8, table(8));
    guest.set(5 << 12 | 16, BLOCK << 12 | PRESENT | WRITE | USER | SIZE);
    guest.set(5 << 12 | 24, table(DIRECT));
    for page in 0..PAGES {
        guest.set(DIRECT << 12 | page << 3, page << 12 | PRESENT | WRITE);
        guest.set(7 << 12 | (page & 3) << 3, (TABLES + page % TABLES) << 12 | PRESENT | WRITE | USER);
    }
    guest
}

/// Words that a hostile guest has in its tables.
fn entries() -> impl Strategy<Value = u64> {
    let page = prop_oneof![
        4 => 0..PAGES,
        2 => Just(BLOCK),
        1 => BLOCK..BLOCK + 3,
        1 => Just(PAGES + 1),
    ];
    let often = |bit: u64| prop_oneof![3 => Just(bit), 1 => Just(0)];
    let seldom = |bit: u64| prop_oneof![1 => Just(bit), 4 => Just(0)];
    let flags = (often(WRITE), often(USER), often(ACCESSED), seldom(DIRTY));
    let rare = (seldom(SIZE), seldom(NO_EXECUTE), seldom(GLOBAL));
    let entry = (page, often(PRESENT), flags, rare).prop_map(|(page, present, flags, rare)| {
        page << 12 | present | flags.0 | flags.1 | flags.2 | flags.3 | rare.0 | rare.1 | rare.2
    });
    prop_oneof![20 => entry, 1 => any::<u64>()]
}

/// Words that a sane one has in those of the last level.
fn leaves() -> impl Strategy<Value = u64> {
    let flags = prop_oneof![
        Just(PRESENT | WRITE | USER),
        Just(PRESENT | WRITE | USER | ACCESSED | DIRTY),
        Just(PRESENT | USER | ACCESSED),
        Just(PRESENT | WRITE | NO_EXECUTE),
        Just(0),
    ];
    let page = prop_oneof![6 => TABLES..PAGES, 1 => 7..9u64];
    (page, flags).prop_map(|(page, flags)| page << 12 | flags)
}

/// Mostly what the first two tables of pages map.
fn addresses() -> impl Strategy<Value = Input> {
    let near = (0..2u64, 0..2u64, 0..4u64, 0..4u64, 0..4u64)
        .prop_map(|(a, b, c, d, e)| address([a, b, c, d], e << 3));
    let indices = (0..3u64, 0..3u64, 0..4u64, 0..4u64, 0..512u64);
    prop_oneof![
        8 => near,
        1 => indices.prop_map(|(a, b, c, d, e)| address([a, b, c, d], e << 3)),
        1 => (0..4u64, 0..2u64).prop_map(|(page, word)| address([0, 0, 2, page], word << 3)),
        1 => (0..PAGES, 0..4u64).prop_map(|(page, word)| direct(page << 12 | word << 3)),
        1 => (0..4u64).prop_map(|word| address([2, 2, 2, 2], word << 3)),
    ]
}

fn controls() -> impl Strategy<Value = Control> {
    prop_oneof![
        2 => Just(Control::WRITE_PROTECT),
        1 => Just(Control::empty()),
        1 => (0..16u8).prop_map(Control::from_bits_truncate),
    ]
}

fn ops() -> impl Strategy<Value = Op> {
    let cpu = || 0..CPUS;
    let access = || prop_oneof![4 => Just(Access::Read), 3 => Just(Access::Write), 1 => Just(Access::Fetch)];
    let mode = prop_oneof![2 => Just(Mode::User), 2 => Just(Mode::Supervisor), 1 => Just(Mode::Implicit)];
    // A kernel at work on its tables: of pages, and others.
    let edit = |tables: std::ops::Range<u64>, word: BoxedStrategy<u64>| {
        (cpu(), tables, 0..4u64, word).prop_map(|(cpu, page, index, word)| {
            Op::Touch(cpu, direct(page << 12 | index << 3), Access::Write, Mode::Supervisor, word)
        })
    };
    let page = || prop_oneof![4 => 0..PAGES, 1 => BLOCK..BLOCK + 3];
    let rights = prop_oneof![
        3 => Just(Permissions::READ | Permissions::WRITE | Permissions::EXECUTE),
        1 => Just(Permissions::READ | Permissions::EXECUTE),
        1 => Just(Permissions::READ | Permissions::WRITE),
    ];
    let writes = prop_oneof![Just(Writes::Free), Just(Writes::Logged)];
    let root = (0..2usize).prop_map(|root| ROOTS[root] << 12);
    prop_oneof![
        24 => (cpu(), addresses(), access(), mode, leaves())
            .prop_map(|(cpu, input, access, mode, word)| Op::Touch(cpu, input, access, mode, word)),
        8 => edit(7..9, leaves().boxed()),
        2 => edit(1..TABLES, entries().boxed()),
        4 => (cpu(), addresses()).prop_map(|(cpu, input)| Op::Invlpg(cpu, input)),
        1 => cpu().prop_map(Op::Flush),
        2 => (cpu(), root, prop_oneof![Just(Load::Fences), Just(Load::Keeps)])
            .prop_map(|(cpu, root, load)| Op::Cr3(cpu, root, load)),
        1 => (cpu(), controls()).prop_map(|(cpu, control)| Op::Control(cpu, control)),
        1 => (1..TABLES, 0..4u64, entries()).prop_map(|(page, word, entry)| Op::Device(page << 12 | word << 3, entry)),
        1 => page().prop_map(Op::Take),
        2 => (page(), rights, writes).prop_map(|(page, rights, writes)| Op::Give(page, rights, writes)),
        1 => page().prop_map(Op::Log),
        1 => (1..4usize).prop_map(Op::Shrink),
    ]
}

fn run(ops: &[Op], records: usize, mistake: Mistake) -> Result<Seen, String> {
    let (guest, mut place) = (guest(), Place::new(records));
    let mut world = World::new(&guest, &mut place, ROOTS[0] << 12, mistake);
    for (number, op) in ops.iter().enumerate() {
        let step = world.step(*op).and_then(|()| world.nothing_foreign_is_mapped());
        step.map_err(|error| format!("step {number}, {op:?}: {error}"))?;
    }
    Ok(world.seen)
}

/// Runs so many cases, from `PLIMSOLL_SEED` on if it is set. Says which seed it was; proptest shows the case that fails.
fn runner(cases: u32, max_shrink_iters: u32) -> TestRunner {
    let of_clock =
        || std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| u64::from(time.subsec_nanos()));
    let seed =
        std::env::var("PLIMSOLL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(of_clock);
    println!("PLIMSOLL_SEED={seed}");
    let rng_seed = RngSeed::Fixed(seed);
    TestRunner::new(Config {
        cases,
        max_shrink_iters,
        rng_seed,
        failure_persistence: None,
        ..Config::default()
    })
}

#[test]
fn the_guest_sees_what_its_own_tables_would_have_shown_it() {
    let sum = Cell::new(Seen::default());
    let cases = (proptest::collection::vec(ops(), 1..80), 8..24usize);
    let result = runner(4096, 20_000).run(&cases, |(ops, records)| {
        let seen = run(&ops, records, Mistake::None).map_err(TestCaseError::fail)?;
        sum.set(sum.get().with(seen));
        Ok(())
    });
    result.expect("as on real tables");
    let seen = sum.get();
    println!("{seen:?}");
    assert!(seen.is_everything(), "{seen:?}");
}

#[test]
fn every_mistake_of_a_host_is_found() {
    let mistakes = [
        Mistake::Unfenced,
        Mistake::Untold,
        Mistake::Uninvalidated,
        Mistake::Kept,
        Mistake::Stolen,
        Mistake::Unlogged,
    ];
    for mistake in mistakes {
        let cases = (proptest::collection::vec(ops(), 1..120), 8..24usize);
        // It ends with the first case that shows the mistake, most often long before the last.
        let found = runner(65_536, 0).run(&cases, |(ops, records)| {
            run(&ops, records, mistake).map(|_| ()).map_err(TestCaseError::fail)
        });
        let error = found.expect_err("a guest that sees what it must not");
        println!("{mistake:?}: {}", error.to_string().lines().next().unwrap_or_default());
    }
}
