//! A device that a guest drives itself: QEMU's `edu` behind `intel-iommu`, which keeps translations until it is told to forget them.
use crate::common::{caller, can, greedy, run};
use plimsoll_metal::wire::{Device, Paging};
use plimsoll_metal::{Board, Event, Guest, Options};
use plimsoll_types::ByteCount;

const EDU: Device = Device::at(0, 4, 0);

fn machine(guests: Vec<Guest>) -> Options {
    let mut options = Options::new(ByteCount::mib(36));
    (options.board, options.guests) = (Board::Remapping, guests);
    // Every address of the machine is one that it could access.
    options.arguments = ["-device", "edu,addr=04.0,dma_mask=0xffffffffffff"].map(str::to_owned).into();
    // Who waits longer says so.
    options.seconds = 600;
    options
}

#[test]
fn a_device_reaches_what_its_guest_has_named_and_nothing_else() {
    if !can() {
        return;
    }
    let heard = run(&machine(vec![Guest { device: EDU, ..caller("driver", 9) }, greedy()]));
    heard.assert_sound();
    let guests: Vec<_> = heard.guests().collect();
    let [driver, greedy] = guests.as_slice() else { panic!("{heard:#?}") };
    // Its own checks, one in every 6 MiB of the machine's memory, and a page that came back for each that it had held.
    assert_eq!((&driver.died, driver.verified_pages), (&None, 30 + 7 + 256), "{heard:#?}");
    assert_eq!((driver.refused_device_accesses, driver.refused_accesses), (6 + 7, 1), "{heard:#?}");
    for line in [
        // Its direction, and the hypervisor's own code.
        "refused: device 00:04.0 of driver may not read gpa:0x701000 (reason 0x6)",
        "refused: device 00:04.0 of driver may not write gpa:0x700000 (reason 0x5)",
        "refused: device 00:04.0 of driver may not write gpa:0x200000 (reason 0x5)",
    ] {
        assert!(heard.has(line), "{line}: {heard:#?}");
    }
    assert_eq!((&greedy.died, greedy.wrong_words), (&None, 0), "{heard:#?}");
    assert!(greedy.verified_pages > 0 && greedy.captured_pages > 0, "{heard:#?}");
}

#[test]
fn a_device_that_nothing_contains_or_that_two_guests_want_is_given_to_nobody() {
    if !can() {
        return;
    }
    let driver = Guest { device: EDU, ..caller("driver", 9) };
    let plain = Options { board: Board::Plain, ..machine(vec![driver.clone()]) };
    let twice = machine(vec![driver.clone(), driver.clone()]);
    let shadowed = machine(vec![Guest { paging: Paging::SHADOW, ..driver }]);
    for (options, sentence) in [
        (plain, "a guest is to own a device, and firmware names no remapping hardware"),
        (
            twice,
            "guest 2: it is to own the device 00:04.0, and there is none there with registers in memory, or another guest has it",
        ),
        (shadowed, "guest 1: it is to execute known code only, or to own a device, and has no nested paging"),
    ] {
        let heard = run(&options);
        assert!(matches!(heard.end, Event::Refused), "{heard:#?}");
        assert!(heard.said.last().unwrap().contains(sentence), "{sentence}: {heard:#?}");
    }
}
