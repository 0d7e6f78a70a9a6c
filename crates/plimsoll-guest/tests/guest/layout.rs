//! Where things lie: nothing twice, nothing in a hole, nothing outside, and nonsense refused by name.
use crate::machine::params;
use plimsoll_guest::Guest;
use plimsoll_guest::GuestError;
use plimsoll_guest::abi::{PAGE_SIZE, Params, Region, WORKLOAD_GPA, latency_bucket, latency_floor};
use plimsoll_guest::layout::LayoutError;
use plimsoll_guest::spec::WorkloadKind;
use std::collections::HashMap;

/// Pages of all kinds, each with the vCPU that uses it.
fn users(params: &Params) -> HashMap<u64, u32> {
    let layout = Guest::new(params).unwrap().layout().clone();
    let mut users = HashMap::new();
    let mut use_page = |gpa: u64, vcpu: u32| {
        let page = gpa / PAGE_SIZE;
        let inside = params
            .regions
            .iter()
            .any(|region| gpa >= region.gpa.max(WORKLOAD_GPA) && gpa + 8 <= region.gpa + region.len);
        assert!(inside, "{gpa:#x} is in no region");
        let other = users.insert(page, vcpu);
        assert!(other.is_none_or(|other| other == vcpu), "{gpa:#x} is used by {vcpu} and {other:?}");
    };
    let mut owned = 0;
    for vcpu in 0..params.vcpus {
        for local in 0..layout.owned_pages(vcpu) {
            let page = layout.data_page(vcpu, local);
            assert!(page < layout.data_pages(), "{vcpu} {local}");
            use_page(layout.data_gpa(page), vcpu);
            use_page(layout.version_gpa(vcpu, local), vcpu);
            use_page(layout.bitmap_gpa(vcpu, local), vcpu);
            owned += 1;
        }
    }
    assert_eq!(owned, layout.data_pages());
    users
}

#[test]
fn no_page_has_two_users_and_none_lies_outside() {
    for vcpus in [1, 2, 3, 5, 32] {
        for pages in [900, 1024, 5000, 40_001] {
            let params = params(WorkloadKind::Zipf, vcpus, pages);
            let layout = Guest::new(&params).unwrap().layout().clone();
            let users = users(&params);
            let used = u64::try_from(users.len()).unwrap();
            assert!(used >= layout.data_pages() && used <= pages, "{used}");
            // A footprint of "all that fits" leaves no more than the granularity of tables.
            assert!(layout.data_pages() + layout.table_pages() + 2 * u64::from(vcpus) >= pages);
        }
    }
}

#[test]
fn a_footprint_is_kept_exactly_and_no_larger_one_fits_than_the_largest() {
    let mut params = params(WorkloadKind::Zipf, 2, 1000);
    params.workload.footprint_bytes = 333 * PAGE_SIZE;
    assert_eq!(Guest::new(&params).unwrap().layout().data_pages(), 333);
    params.workload.footprint_bytes = 0;
    let most = Guest::new(&params).unwrap().layout().data_pages();
    params.workload.footprint_bytes = (most + 1) * PAGE_SIZE;
    assert_eq!(
        Guest::new(&params).unwrap_err(),
        GuestError::Layout(LayoutError::TooLarge { wanted_pages: most + 1, most_pages: most })
    );
}

#[test]
fn nonsense_is_refused_by_name() {
    let good = params(WorkloadKind::Zipf, 2, 1000);
    let region = |gpa, len| {
        let mut params = good;
        params.regions[1] = Region { gpa, len };
        (params, LayoutError::Region { region: Region { gpa, len } })
    };
    let cases = [
        (Params { version: 7, ..good }, LayoutError::OtherAbi { magic: good.magic, version: 7 }),
        (Params { vcpus: 0, ..good }, LayoutError::Vcpus { found: 0 }),
        (Params { vcpus: 33, ..good }, LayoutError::Vcpus { found: 33 }),
        (Params { tsc_hz: 0, ..good }, LayoutError::NoClock),
        (Params { region_count: 0, ..good }, LayoutError::RegionCount { found: 0 }),
        (Params { region_count: 5, ..good }, LayoutError::RegionCount { found: 5 }),
        region(0, PAGE_SIZE),
        region(u64::MAX - 4095, 2 * PAGE_SIZE),
        region(1 << 51, 1 << 51 | 4096),
        region(0x1000_0001, PAGE_SIZE),
        region(0x1000_0000, 100),
        region(0x1000_0000, 0),
    ];
    for (params, error) in cases {
        assert_eq!(Guest::new(&params).unwrap_err(), GuestError::Layout(error), "{error}");
    }
    let tiny = params(WorkloadKind::Zipf, 32, 100);
    assert!(matches!(Guest::new(&tiny).unwrap_err(), GuestError::Layout(LayoutError::TooSmall { .. })));
}

#[test]
fn latency_buckets_are_a_quarter_of_an_octave_and_in_order() {
    for bucket in 8..256 {
        assert_eq!(latency_bucket(latency_floor(bucket)), bucket);
        assert_eq!(latency_bucket(latency_floor(bucket) - 1), if bucket == 8 { 6 } else { bucket - 1 });
    }
    assert_eq!([0, 1, 2, 3].map(latency_bucket), [0, 0, 4, 6]);
}
