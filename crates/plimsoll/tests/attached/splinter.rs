//! `plimsoll splinter` of a stock kernel, against what its own QEMU says it maps.
use crate::manager::{Manager, STOCK, alone, ask, bytes, can, page_out, swap};
use crate::translate::{Shown, kernel_mappings, resume, stop};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::Value;

fn splinter(guest: &Guest) -> Value {
    let (process, qmp) = (guest.process().get().to_string(), guest.qmp().display().to_string());
    let (status, lines, said) = Manager::run("splinter", &[&process, "--qmp", &qmp]).end();
    assert!(status.success() && lines.len() == 1, "{said} {lines:?}");
    lines.into_iter().next().unwrap()
}

#[test]
fn a_kernels_pages_are_those_that_its_qemu_lists_and_splinter_when_the_hosts_do() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let options = Options::new(ByteCount::mib(192));
    let mut guest = Guest::start(options).unwrap();
    ask(&mut guest, Command::Alloc { pages: 10_000 });
    stop(&mut guest);
    // Beyond its RAM are devices.
    let in_ram = |shown: &Shown| shown.gpa < 192 << 20;
    let (listed, devices): (Vec<Shown>, Vec<Shown>) =
        kernel_mappings(&mut guest).into_iter().partition(in_ram);
    let large = listed.iter().filter(|shown| shown.size > 4096).count() as u64;
    let listed = listed.len() as u64;
    let found = splinter(&guest);
    let kernel = &found["kernel"];
    assert_eq!((&found["wrong"], &found["aliases"]), (&0.into(), &0.into()), "{found}");
    assert_eq!((bytes(kernel, "pages"), bytes(kernel, "large")), (listed, large), "{found}");
    assert_eq!(bytes(kernel, "device_bytes"), devices.iter().map(|shown| shown.size).sum::<u64>(), "{found}");
    assert!(bytes(&found["user"], "mapped_bytes") > 10_000 * 4096, "{found}");
    for half in ["kernel", "user"] {
        let half = &found[half];
        assert!(bytes(half, "whole") <= bytes(half, "large"), "{found}");
        assert!(
            bytes(half, "lost_bytes") == bytes(half, "guest_reach_bytes") - bytes(half, "reach_bytes"),
            "{found}"
        );
    }

    // What is in swap is mapped by nobody, and a huge page comes back as small ones.
    page_out(&guest);
    let after = splinter(&guest);
    println!("{listed} listed, {large} large; {found}; paged out: {after}");
    assert_eq!(bytes(&after["kernel"], "large"), bytes(kernel, "large"), "{after}");
    assert!(bytes(&after["kernel"], "absent_bytes") > bytes(kernel, "absent_bytes"), "{after}");
    assert!(bytes(&after["kernel"], "whole") <= bytes(kernel, "whole"), "{after}");
    resume(&mut guest);
}
