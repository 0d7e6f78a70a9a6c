//! Splintering, counted by hand.
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;

use common::{Ram, pools};
use plimsoll_mmu::format::ept::{self, Ept};
use plimsoll_mmu::format::x86::{self, Long4};
use plimsoll_mmu::splinter::{Reach, Splinter, measure};
use plimsoll_mmu::{
    Cache, Format, GuestPat, Input, Leaf, Mapper, Memory, NothingCached, Output, Permissions, Pools, Span,
};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What is mapped: from where, how much, to where, and log2 of the largest leaf.
type Run = (u64, u64, u64, u32);

fn tree<F: Format>(ram: &Ram, caps: F::Caps, memory: Memory, (root, frames): (u64, u64), runs: &[Run]) {
    let (mut frames, mut caches) = (pools::<16>(frames, 0x1000), NothingCached);
    let mut mapper =
        Mapper::<F, _, _, _>::new(Output(root), caps, ram, &mut frames, &mut caches).expect("aligned");
    for &(first, bytes, output, shift) in runs {
        let span = Span::new(Input(first), bytes).expect("fits");
        mapper.map(span, Leaf::new(Output(output), shift, Permissions::all(), memory)).expect("free");
    }
}

fn splinter(guest: &[Run], host: &[Run], region: (u64, u64)) -> Splinter {
    let ram = Ram::new(1 << 40);
    tree::<Long4>(&ram, x86::Caps::FULL, Memory::Pat(0), (0x10_0000, 0x11_0000), guest);
    let wb = Memory::Ept(Cache::WriteBack, GuestPat::Combined);
    tree::<Ept>(&ram, ept::Caps::FULL, wb, (0x20_0000, 0x21_0000), host);
    let (mut none, mut other) = (Pools::<1>::default(), Pools::<1>::default());
    let (mut caches, mut others) = (NothingCached, NothingCached);
    let guest =
        Mapper::<Long4, _, _, _>::new(Output(0x10_0000), x86::Caps::FULL, &ram, &mut none, &mut caches)
            .expect("aligned");
    let host = Mapper::<Ept, _, _, _>::new(Output(0x20_0000), ept::Caps::FULL, &ram, &mut other, &mut others)
        .expect("aligned");
    measure(&guest, Span::new(Input(region.0), region.1).expect("fits"), &host).expect("well-formed")
}

#[test]
fn a_large_page_stays_whole_over_one_as_large_or_larger_and_is_split_over_small_ones() {
    let guest = [(0, 6 * MIB, 0, 21)];
    let host = [(0, 2 * MIB, GIB, 21), (2 * MIB, 2 * MIB, 2 * GIB, 12)];
    let found = splinter(&guest, &host, (0, 8 * MIB));
    assert_eq!(
        found,
        Splinter {
            leaves: 3,
            large: 3,
            whole: 1,
            entries: 1 + 512,
            bytes: 4 * MIB,
            split_by_host: 2 * MIB,
            split_by_guest: 0,
            absent: 2 * MIB,
        }
    );
    let over_a_gib = splinter(&[(0, 4 * MIB, 0, 21)], &[(0, GIB, GIB, 30)], (0, 4 * MIB));
    assert_eq!((over_a_gib.whole, over_a_gib.entries, over_a_gib.split_by_guest), (2, 2, 4 * MIB));
}

#[test]
fn a_hosts_large_page_gains_nothing_under_small_ones() {
    let found = splinter(&[(0, 2 * MIB, 0, 12)], &[(0, 2 * MIB, GIB, 21)], (0, 2 * MIB));
    assert_eq!((found.leaves, found.large, found.entries), (512, 0, 512));
    assert_eq!((found.split_by_guest, found.split_by_host), (2 * MIB, 0));
    assert_eq!(found.reach(64).lost(), 0, "the guest's own pages are as small");
}

#[test]
fn the_reach_that_is_lost_is_that_of_the_hosts_small_pages() {
    let found = splinter(
        &[(0, 64 * MIB, 0, 21)],
        &[(0, 16 * MIB, GIB, 12), (16 * MIB, 48 * MIB, 3 * GIB, 21)],
        (0, 64 * MIB),
    );
    assert_eq!((found.entries, found.whole), (8 * 512 + 24, 24));
    let reach = found.reach(103);
    assert_eq!(reach, Reach { both: 64 * MIB * 103 / 4120, guest: 64 * MIB });
    assert_eq!(reach.lost(), 64 * MIB - 1600 * KIB - 38 * KIB - 409);
}

#[test]
fn regions_add_up_to_the_whole() {
    let guest = [(0, 8 * MIB, 4 * MIB, 21), (8 * MIB, 2 * MIB, 0, 12)];
    let host = [(0, 6 * MIB, GIB, 12), (6 * MIB, 4 * MIB, 2 * GIB, 21)];
    let mut sum = Splinter::default();
    for block in 0..5 {
        sum += splinter(&guest, &host, (block * 2 * MIB, 2 * MIB));
    }
    assert_eq!(sum, splinter(&guest, &host, (0, 10 * MIB)));
    assert_eq!(sum.bytes + sum.absent, 10 * MIB);
}

#[test]
fn what_lies_beyond_the_hosts_addresses_is_absent() {
    let found = splinter(&[(0, 2 * MIB, 1 << 50, 21)], &[], (0, 2 * MIB));
    assert_eq!((found.absent, found.entries, found.whole), (2 * MIB, 0, 0));
}
