//! Guests that own, lend and share memory, and one that asks for what it must not have.
use crate::common::{caller, can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::{Paging, ProgramKind};
use plimsoll_metal::{Event, Guest, Options};
use plimsoll_types::ByteCount;

#[test]
fn extents_are_shared_lent_and_taken_back_zeroed_while_a_third_guest_is_refused_everything() {
    if !can() {
        return;
    }
    for paging in [Paging::NESTED, Paging::SHADOW] {
        share_lend_and_refuse(paging);
    }
}

fn share_lend_and_refuse(paging: Paging) {
    let caller = |seed| {
        let guest = guest(WorkloadKind::Idle, ByteCount::mib(16), 10, seed);
        Guest { program: ProgramKind::CALLER, paging, name: format!("caller{seed}"), ..guest }
    };
    let mut options = Options::new(ByteCount::mib(64));
    // Who waits longer says so.
    options.seconds = 600;
    options.guests = (1..=3).map(caller).collect();
    // Beside them one that is paged, so that calls and paging meet.
    options.guests.push(guest(WorkloadKind::Sweep, ByteCount::mib(64), 60, 4));
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Done), "{heard:#?}");
    let guests: Vec<_> = heard.guests().collect();
    let [owner, borrower, hostile, paged] = guests.as_slice() else { panic!("{heard:#?}") };
    assert_eq!((&owner.died, owner.verified_pages), (&None, 17), "{heard:#?}");
    // It died of its stray access, not of a check that failed.
    let died = borrower.died.as_deref().unwrap_or_default();
    assert!(died.contains("it accessed gpa:0x1002000, where it has no memory"), "{heard:#?}");
    assert_eq!((&hostile.died, hostile.verified_pages), (&None, 20_000), "{heard:#?}");
    assert_eq!((&paged.died, paged.wrong_words), (&None, 0), "{heard:#?}");
    assert!(heard.host().peak_bytes <= heard.host().budget_bytes, "{heard:#?}");
    assert!(heard.has("returned: all but 0 "), "{heard:#?}");
}

/// Two guests that own extents make calls at random, with handles, addresses and machines of each other's, beside one that is paged: of 40,000 calls
/// none is answered but with a status, and at the end every frame is back.
#[test]
fn calls_made_at_random_by_guests_that_own_extents_harm_nobody() {
    if !can() {
        return;
    }
    // Others are to be had: whoever looks for a mistake gives another number each time.
    let seed = std::env::var("PLIMSOLL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for paging in [Paging::NESTED, Paging::SHADOW] {
        let mut options = Options::new(ByteCount::mib(64));
        options.seconds = 600;
        for number in 1..=2 {
            let mut fuzz = Guest { paging, ..caller(&format!("fuzz{number}"), 13) };
            fuzz.params.workload.seed = seed * 2 + number;
            options.guests.push(fuzz);
        }
        options.guests.push(guest(WorkloadKind::Sweep, ByteCount::mib(64), 60, 4));
        let heard = run(&options);
        heard.assert_well();
        let calls: Vec<_> = heard.guests().map(|guest| guest.verified_pages).collect();
        assert_eq!(calls[..2], [20_000; 2], "{heard:#?}");
    }
}
