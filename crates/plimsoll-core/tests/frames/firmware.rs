//! Maps of claims, true ones and those that contradict themselves.
use plimsoll_core::frames::firmware::{CLAIMS_MAX, Claim, HostMap, HostMapError, HostRegion, Repairs, Use};
use plimsoll_types::{ByteCount, Hpa, PageCount, Pfn};
use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};
use std::collections::BTreeMap;

const fn claim(start: u64, bytes: u64, what: Use) -> Claim {
    Claim { start: Hpa(start), bytes: ByteCount(bytes), what }
}

const fn region(first: u64, pages: u64, what: Use) -> HostRegion {
    HostRegion { first: Pfn(first), pages: PageCount(pages), what }
}

fn map(claims: &[Claim]) -> HostMap<16> {
    HostMap::new(claims).expect("there is usable memory")
}

/// An entry as firmware writes it.
fn e820(start: u64, bytes: u64, kind: u32) -> Claim {
    let mut entry = [0; 20];
    entry[..8].copy_from_slice(&start.to_le_bytes());
    entry[8..16].copy_from_slice(&bytes.to_le_bytes());
    entry[16..].copy_from_slice(&kind.to_le_bytes());
    Claim::from_e820(&entry)
}

#[test]
fn the_map_of_a_pc_is_read_as_it_is() {
    // What QEMU's firmware says of a machine of 4 GiB, 3 of them below the hole for devices.
    let claims = [
        e820(0, 0x9fc00, 1),
        e820(0x9fc00, 0x400, 2),
        e820(0xf_0000, 0x1_0000, 2),
        e820(0x10_0000, 0xbfee_0000, 1),
        e820(0xbffe_0000, 0x2_0000, 2),
        e820(0xfeff_c000, 0x4000, 2),
        e820(0xfffc_0000, 0x4_0000, 2),
        e820(0x1_0000_0000, 0x4000_0000, 1),
    ];
    let expected = [
        region(0, 0x9f, Use::Usable),
        region(0x9f, 1, Use::Reserved),
        region(0xf0, 0x10, Use::Reserved),
        region(0x100, 0xb_fee0, Use::Usable),
        region(0xb_ffe0, 0x20, Use::Reserved),
        region(0xf_effc, 4, Use::Reserved),
        region(0xf_ffc0, 0x40, Use::Reserved),
        region(0x10_0000, 0x4_0000, Use::Usable),
    ];
    assert_eq!(map(&claims).regions(), expected);
    assert_eq!(map(&claims).repairs(), Repairs::default());
}

#[test]
fn every_type_of_e820_has_its_use_and_unknown_ones_are_reserved() {
    let uses = [
        (1, Use::Usable),
        (3, Use::AcpiTables),
        (4, Use::AcpiNvs),
        (5, Use::Bad),
        (7, Use::Persistent),
        (0, Use::Reserved),
        (2, Use::Reserved),
        (6, Use::Reserved),
        (12, Use::Reserved),
        (u32::MAX, Use::Reserved),
    ];
    for (kind, what) in uses {
        assert_eq!(e820(0x1234, 0x5678, kind), claim(0x1234, 0x5678, what));
    }
}

#[test]
fn where_claims_overlap_memory_is_used_only_if_all_of_them_let_it() {
    let claims = [claim(0, 0x10_000, Use::Usable), claim(0x4000, 0x2000, Use::Reserved)];
    let expected = [region(0, 4, Use::Usable), region(4, 2, Use::Reserved), region(6, 10, Use::Usable)];
    assert_eq!(map(&claims).regions(), expected);
    assert_eq!(map(&claims).repairs().overlapping, PageCount(2));
    let reversed = [claims[1], claims[0]];
    assert_eq!(map(&reversed).regions(), expected);
}

#[test]
fn a_page_that_is_usable_in_part_is_not_used() {
    let claims = [claim(0x800, 0x3000, Use::Usable), claim(0x8800, 0x100, Use::AcpiNvs)];
    assert_eq!(map(&claims).regions(), [region(1, 2, Use::Usable), region(8, 1, Use::AcpiNvs)]);
}

#[test]
fn claims_to_nothing_are_left_out_and_counted() {
    let good = claim(0, 0x1000, Use::Usable);
    let claims = [good, claim(0x5000, 0, Use::Reserved), claim(0x7001, 0xffe, Use::Usable)];
    assert_eq!(map(&claims).regions(), [region(0, 1, Use::Usable)]);
    assert_eq!(map(&claims).repairs(), Repairs { empty: 2, ..Repairs::default() });
}

#[test]
fn memory_that_wraps_around_is_not_used_but_reserved_to_the_end() {
    let good = claim(0, 0x1000, Use::Usable);
    let usable = [good, claim(0x1000, u64::MAX, Use::Usable)];
    assert_eq!(map(&usable).regions(), [region(0, 1, Use::Usable)]);
    assert_eq!(map(&usable).repairs().wrapped, 1);
    let end = 1 << 40;
    let reserved = [good, claim(0x4000, u64::MAX, Use::Reserved)];
    let expected = [region(0, 1, Use::Usable), region(4, end - 4, Use::Reserved)];
    assert_eq!(map(&reserved).regions(), expected);
    // The last byte there is can be named without wrapping.
    let last = [good, claim(u64::MAX - 0xfff, 0x1000, Use::Reserved)];
    assert_eq!(map(&last).repairs(), Repairs { beyond: 1, ..Repairs::default() });
}

#[test]
fn memory_past_52_bits_is_cut_off() {
    let end = 1 << 52;
    let claims = [claim(end - 0x2000, 0x10_0000, Use::Usable)];
    assert_eq!(map(&claims).regions(), [region((end >> 12) - 2, 2, Use::Usable)]);
    assert_eq!(map(&claims).repairs().beyond, 1);
}

#[test]
fn maps_that_cannot_be_made_say_why() {
    let one = claim(0, 0x1000, Use::Usable);
    let found = CLAIMS_MAX + 1;
    let many = HostMap::<16>::new(&vec![one; found]);
    assert_eq!(many, Err(HostMapError::TooManyClaims { found }));
    assert!(HostMap::<16>::new(&vec![one; CLAIMS_MAX]).is_ok());
    let apart: Vec<_> = (0..3).map(|place| claim(place * 0x2000, 0x1000, Use::Usable)).collect();
    assert_eq!(HostMap::<2>::new(&apart), Err(HostMapError::TooManyRegions { most: 2 }));
    assert_eq!(HostMap::<2>::new(&[]), Err(HostMapError::NoMemory { claims: 0 }));
    let none = HostMap::<2>::new(&[one, claim(0, 1, Use::Bad)]);
    assert_eq!(none, Err(HostMapError::NoMemory { claims: 2 }));
}

fn any_claim() -> impl Strategy<Value = Claim> {
    let what = prop::sample::select(vec![
        Use::Usable,
        Use::Usable,
        Use::Persistent,
        Use::AcpiTables,
        Use::AcpiNvs,
        Use::Reserved,
        Use::Bad,
    ]);
    let near = || 0u64..0x2_0000;
    let extent = prop_oneof![
        8 => (near(), near()),
        1 => (any::<u64>(), near()),
        1 => (near(), any::<u64>()),
        1 => (any::<u64>(), any::<u64>()),
    ];
    (extent, what).prop_map(|((start, bytes), what)| claim(start, bytes, what))
}

proptest! {
    /// Page by page, over the first pages there are.
    #[test]
    fn a_page_is_usable_when_a_claim_holds_all_of_it_and_no_other_any_of_it(
        claims in prop::collection::vec(any_claim(), 0..12),
    ) {
        let mut expected = BTreeMap::new();
        for page in 0..0x50u64 {
            let (first, last) = (page * 4096, page * 4096 + 4095);
            let uses = claims.iter().filter(|claim| claim.bytes.0 > 0).filter_map(|claim| {
                let end = claim.start.0.checked_add(claim.bytes.0 - 1);
                let holds = match (claim.what, end) {
                    (Use::Usable, end) => end.is_some_and(|end| claim.start.0 <= first && last <= end),
                    (_, end) => claim.start.0 <= last && first <= end.unwrap_or(u64::MAX),
                };
                holds.then_some(claim.what)
            });
            uses.max().into_iter().for_each(|what| { expected.insert(page, what); });
        }
        match HostMap::<64>::new(&claims) {
            Ok(map) => {
                for page in 0..0x50 {
                    let holds = |region: &&HostRegion| region.first.0 <= page && page < region.end().0;
                    let found: Vec<_> = map.regions().iter().filter(holds).map(|region| region.what).collect();
                    assert_eq!(found, expected.get(&page).copied().into_iter().collect::<Vec<_>>(), "{page}");
                }
                let pairs = map.regions().iter().zip(map.regions().iter().skip(1));
                for (one, next) in pairs {
                    assert!(one.end() < next.first || (one.end() == next.first && one.what != next.what));
                }
            }
            Err(error) => {
                assert_eq!(error, HostMapError::NoMemory { claims: claims.len() });
                assert!(expected.values().all(|what| *what != Use::Usable));
            }
        }
    }
}
