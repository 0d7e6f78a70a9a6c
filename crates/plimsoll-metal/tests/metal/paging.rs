//! The same guests by each way to translate their addresses.
use crate::common::{can, run};
use plimsoll_metal::{Event, Options};

#[test]
fn a_kernel_with_address_spaces_of_its_own_sees_the_same_however_they_are_translated() {
    if !can() {
        return;
    }
    let heard = run(&Options::of_modes());
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
