//! Guests whose tables name the machine's frames.
use crate::common::{can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::{Paging, ProgramKind};
use plimsoll_metal::{Event, Guest, Options};
use plimsoll_types::ByteCount;

fn forger(seed: u64, size: ByteCount) -> Guest {
    let idle = guest(WorkloadKind::Idle, size, 10, seed);
    Guest { program: ProgramKind::KERNEL, paging: Paging::DIRECT, ..idle }
}

#[test]
fn a_kernel_that_forges_entries_roots_and_batches_is_refused_each_and_costs_the_others_nothing() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(48));
    let still = guest(WorkloadKind::Sweep, ByteCount::mib(12), 60, 1);
    options.guests.push(Guest { paging: Paging::DIRECT, ..still });
    options.guests.push(guest(WorkloadKind::Zipf, ByteCount::mib(56), 70, 2));
    options.guests.push(forger(6, ByteCount::mib(16)));
    let heard = run(&options);
    heard.assert_sound();
    let guests: Vec<_> = heard.guests().collect();
    let [still, paged, forger] = guests.as_slice() else { panic!("{heard:#?}") };
    // It ended by a write to its own table, after every check.
    let died = forger.died.as_deref().unwrap_or_default();
    assert!(died.contains("it took exception 14 (error 0x7, address 0x100000)"), "{heard:#?}");
    assert!(forger.verified_pages > 25_000, "{heard:#?}");
    for other in [still, paged] {
        assert_eq!((&other.died, other.wrong_words, other.anomalies), (&None, 0, 0), "{heard:#?}");
        assert!(other.verified_pages > 500, "{heard:#?}");
    }
    // The others' memory is short; what tables may name is not taken for that.
    assert_eq!((still.captured_pages, still.faults), (0, 0), "{heard:#?}");
    assert!(paged.captured_pages > 0, "{heard:#?}");
}

#[test]
fn a_kernel_that_switches_write_protection_off_or_loads_a_root_by_itself_ends() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(32));
    options.guests.extend([7, 8].map(|seed| forger(seed, ByteCount::mib(8))));
    let heard = run(&options);
    heard.assert_sound();
    assert_eq!(heard.guests().count(), 2, "{heard:#?}");
    for kernel in heard.guests() {
        let died = kernel.died.as_deref().unwrap_or_default();
        assert!(died.contains("it left with 0x10, which it has no reason to"), "{heard:#?}");
    }
}

#[test]
fn a_guest_whose_memory_cannot_be_reserved_is_refused_with_the_arithmetic() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(64));
    let direct = Guest { paging: Paging::DIRECT, ..guest(WorkloadKind::Idle, ByteCount::mib(64), 10, 1) };
    options.guests = vec![direct];
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
    assert!(heard.has("+ 64M for the guests to run in is needed at least"), "{heard:#?}");
}
