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
    let mut options = Options::new(ByteCount::mib(48));
    options.ticks = Ticks::Instructions;
    // The third asks for its entries: the same program otherwise.
    let kernels = [(Paging::NESTED, 4), (Paging::SHADOW, 4), (Paging::DIRECT, 5)];
    options.guests.extend(kernels.map(|(paging, seed)| Guest {
        program: ProgramKind::KERNEL,
        paging,
        ..guest(WorkloadKind::Idle, ByteCount::mib(16), 10, seed)
    }));
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Done) && heard.has("returned: all but 0 "), "{heard:#?}");
    let guests: Vec<_> = heard.guests().collect();
    let [nested, shadow, direct] = guests.as_slice() else { panic!("{heard:#?}") };
    for kernel in &guests {
        println!(
            "{} exits, {} of them for pages, {} instructions, {} exits per million",
            kernel.exits,
            kernel.faults,
            kernel.instructions(),
            kernel.exits_per_million()
        );
        assert_eq!((&kernel.died, kernel.anomalies), (&None, 0), "{heard:#?}");
        assert!(kernel.verified_pages > 5_000, "{heard:#?}");
    }
    for other in [shadow, direct] {
        let [one, other] = [nested, other].map(|kernel| (kernel.verified_pages, kernel.operations));
        assert_eq!(one, other, "{heard:#?}");
    }
    // It is one program: what differs is the instructions that faulted and were begun again, one an exit at most.
    let instructions = [nested, shadow].map(|kernel| kernel.instructions());
    assert!(instructions[0].abs_diff(instructions[1]) <= shadow.exits, "{instructions:?} {heard:#?}");
    // And what shadow tables cost: exits for CR3, INVLPG and tables that are written.
    assert!(shadow.exits_per_million() > nested.exits_per_million(), "{heard:#?}");
    // Entries that are asked for by the batch cost fewer than entries that are written.
    assert!(direct.exits_per_million() < shadow.exits_per_million(), "{heard:#?}");
    // Its memory was there from the start and stayed.
    assert_eq!((direct.faults, direct.captured_pages), (0, 0), "{heard:#?}");
}
