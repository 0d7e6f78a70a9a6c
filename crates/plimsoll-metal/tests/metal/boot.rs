//! From the firmware to the hypervisor's own tables.
use crate::common::{can, guest, run};
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_metal::wire::Provoke;
use plimsoll_metal::{Event, Options};
use plimsoll_types::ByteCount;

#[test]
fn it_boots_owns_the_memory_firmware_gives_and_ends() {
    if !can() {
        return;
    }
    let heard = run(&Options::new(ByteCount::mib(128)));
    assert!(matches!(heard.end, Event::Done), "{heard:#?}");
    // QEMU keeps 640 KiB to 1 MiB and some tables at the end.
    assert!(heard.has("memory: 126."), "{heard:#?}");
}

#[test]
fn nothing_is_both_written_and_executed_and_no_stray_access_goes_unseen() {
    if !can() {
        return;
    }
    // Error codes: 1 present, 2 write, 0x10 fetch.
    let cases = [
        (Provoke::WriteCode, "page fault (vector 14, error 0x3)"),
        (Provoke::ExecuteData, "page fault (vector 14, error 0x11)"),
        (Provoke::ReadNull, "page fault (vector 14, error 0x0)"),
        (Provoke::Overflow, "page fault (vector 14, error 0x2)"),
    ];
    for (provoke, screen) in cases {
        let heard = run(&Options { provoke, ..Options::new(ByteCount::mib(64)) });
        assert!(matches!(heard.end, Event::Crashed(_)), "{provoke:?}: {heard:#?}");
        assert!(heard.has(screen) && heard.has("the address was"), "{provoke:?}: {heard:#?}");
    }
}

#[test]
fn a_processor_without_svm_and_a_machine_with_too_little_memory_are_refused_in_a_sentence() {
    if !can() {
        return;
    }
    let heard = run(&Options { processor: "max,-svm", ..Options::new(ByteCount::mib(64)) });
    assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
    assert!(heard.said.last().unwrap().contains("no AMD SVM with nested paging"), "{heard:#?}");
    let guests = (1..=3).map(|seed| guest(WorkloadKind::Idle, ByteCount::mib(64), 60, seed)).collect();
    let heard = run(&Options { guests, ..Options::new(ByteCount::mib(16)) });
    assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
    let sentence = heard.said.last().unwrap();
    assert!(
        sentence.contains("for the hypervisor's own tables") && sentence.contains("firmware gives"),
        "{sentence}"
    );
}
