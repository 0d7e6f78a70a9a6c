//! The same guests by each way to translate their addresses.
use crate::common::{can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::{Paging, ProgramKind};
use plimsoll_metal::{Event, Guest, Options, Ticks};
use plimsoll_types::ByteCount;

#[test]
fn a_kernel_with_address_spaces_of_its_own_sees_the_same_however_they_are_translated() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(32));
    options.ticks = Ticks::Instructions;
    options.guests.extend([Paging::NESTED, Paging::SHADOW].map(|paging| Guest {
        program: ProgramKind::KERNEL,
        paging,
        ..guest(WorkloadKind::Idle, ByteCount::mib(16), 10, 4)
    }));
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Done) && heard.has("returned: all but 0 "), "{heard:#?}");
    let guests: Vec<_> = heard.guests().collect();
    let [nested, shadow] = guests.as_slice() else { panic!("{heard:#?}") };
    for kernel in &guests {
        assert_eq!((&kernel.died, kernel.anomalies), (&None, 0), "{heard:#?}");
        assert!(kernel.verified_pages > 5_000, "{heard:#?}");
    }
    assert_eq!(
        (nested.verified_pages, nested.operations),
        (shadow.verified_pages, shadow.operations),
        "{heard:#?}"
    );
    // It is one program: what differs is the instructions that faulted and were begun again, one an exit at most.
    let instructions = [nested, shadow].map(|kernel| kernel.instructions());
    assert!(instructions[0].abs_diff(instructions[1]) <= shadow.exits, "{instructions:?} {heard:#?}");
    // And what shadow tables cost: exits for CR3, INVLPG and tables that are written.
    assert!(shadow.exits_per_million() > nested.exits_per_million(), "{heard:#?}");
}
