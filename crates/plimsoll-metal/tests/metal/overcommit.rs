//! Guests that own more memory than there is.
use crate::common::{can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::Paging;
use plimsoll_metal::{Event, Options, Ticks};
use plimsoll_types::ByteCount;

#[test]
fn four_guests_own_twice_the_memory_there_is_and_read_no_wrong_word() {
    if !can() {
        return;
    }
    let size = ByteCount::mib(64);
    let kinds = [WorkloadKind::Zipf, WorkloadKind::Sweep, WorkloadKind::Bursts, WorkloadKind::Phases];
    let mut options = Options::new(ByteCount::mib(128));
    options.seconds = 3;
    options.guests = kinds.into_iter().zip(1..).map(|(kind, seed)| guest(kind, size, 70, seed)).collect();
    // One that gives pages back while others are taken from it.
    options.guests[1].params.workload.discard_every_ops = 200;
    let heard = run(&options);
    heard.assert_well();
    let host = heard.host();
    assert_eq!(host.asked_bytes, 256 << 20);
    assert!(host.budget_bytes < 128 << 20 && host.peak_bytes <= host.budget_bytes, "{host:#?}");
    assert!(
        host.stored_pages > 0 && host.saved_compression_bytes > 0 && host.saved_zero_bytes > 0,
        "{host:#?}"
    );
    assert!(host.harvested_pages > 0, "{host:#?}");
    for guest in heard.guests() {
        assert!(guest.operations > 0 && guest.captured_pages > 0, "{guest:#?}");
        // Each of its pages was read at the end at least.
        assert!(guest.verified_pages * 4096 >= (guest.size_bytes - (6 << 20)) / 100 * 60, "{guest:#?}");
    }
}

#[test]
fn guests_on_shadow_tables_own_twice_the_memory_there_is_and_read_no_wrong_word() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(80));
    options.guests = [WorkloadKind::Zipf, WorkloadKind::Sweep, WorkloadKind::Phases]
        .into_iter()
        .zip(1..)
        .map(|(kind, seed)| guest(kind, ByteCount::mib(48), 70, seed))
        .collect();
    options.guests.iter_mut().for_each(|guest| guest.paging = Paging::SHADOW);
    options.guests[1].params.workload.discard_every_ops = 200;
    let heard = run(&options);
    heard.assert_well();
    let host = heard.host();
    assert!(host.asked_bytes == 144 << 20 && host.peak_bytes <= host.budget_bytes, "{host:#?}");
    assert!(host.stored_pages > 0 && host.harvested_pages > 0, "{host:#?}");
    for guest in heard.guests() {
        assert!(guest.operations > 0 && guest.captured_pages > 0, "{guest:#?}");
    }
}

#[test]
fn guests_whose_contents_do_not_fit_however_they_are_stored_end_with_a_sentence_and_the_others_go_on() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(48));
    // How long they thrash then depends on what they do, not on how busy this machine is.
    options.ticks = Ticks::Instructions;
    options.guests = (1..=2).map(|seed| guest(WorkloadKind::Idle, ByteCount::mib(64), 60, seed)).collect();
    for params in options.guests.iter_mut().map(|guest| &mut guest.params) {
        (params.mix.zero, params.mix.duplicate, params.mix.text, params.mix.random) = (0, 0, 0, 100);
    }
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Done), "{heard:#?}");
    let died = heard.guests().filter(|guest| guest.died.is_some()).count();
    assert_eq!(died, 1, "one has to go, and its memory suffices for the other: {heard:#?}");
    assert!(heard.guests().all(|guest| guest.wrong_words == 0), "{heard:#?}");
    assert!(
        heard.host().peak_bytes <= heard.host().budget_bytes && heard.has("returned: all but 0 "),
        "{heard:#?}"
    );
}

#[test]
fn a_guest_that_cannot_be_made_is_refused_with_the_reason() {
    if !can() {
        return;
    }
    let mut options = Options::new(ByteCount::mib(64));
    options.guests = vec![guest(WorkloadKind::Idle, ByteCount::mib(64), 60, 1)];
    options.guests[0].params.vcpus = 2;
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
    assert!(heard.has("refused: guest 1: it is to have 2 processors; guests here have one"), "{heard:#?}");
    // QEMU's processors have 16 address spaces, of which the hypervisor has one.
    options.guests = (1..=16).map(|seed| guest(WorkloadKind::Idle, ByteCount::mib(64), 60, seed)).collect();
    let heard = run(&options);
    assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
    assert!(heard.has("refused: 16 guests need 17 address spaces and this processor has 16"), "{heard:#?}");
}
