//! Machines change while they are followed.

use crate::fake::{Fake, program};
use crate::{MIB_64, nothing_known, unique};
use plimsoll_attach::{Change, Follower, Held, Refusal, Request, inspect};
use plimsoll_sys::procfs::StartTime;
use plimsoll_types::ByteCount;
use std::process::Command;

fn follow(fake: &Fake, request: Request) -> Follower {
    Follower::new(fake.held(), request).unwrap()
}

#[test]
fn a_machine_that_does_not_change_has_no_changes() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    fake.tell(&format!("anonymous {MIB_64}"));
    let mut follower = follow(&fake, nothing_known());
    assert_eq!(follower.poll().unwrap(), []);
    // Not anonymous: beside the RAM, which a VMM keeps apart by guard pages, the kernel would join the two.
    fake.tell(&format!("memfd small {}", 1 << 20));
    assert_eq!(follower.poll().unwrap(), [], "small mappings come and go");
}

#[test]
fn ram_that_goes_is_reported_although_the_rest_no_longer_adds_up() {
    let line = "-m 64 -object memory-backend-memfd,id=d,size=32M -device pc-dimm,memdev=d";
    let mut fake = Fake::start("qemu-system-x86_64", line);
    let base = fake.map(&format!("anonymous {MIB_64}"));
    let dimm = fake.map(&format!("memfd d {}", 32 << 20));
    let mut follower = follow(&fake, nothing_known());
    assert_eq!(follower.dossier().size(), ByteCount::mib(96));

    fake.tell("unmap");
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Went(range)] if range.hva == dimm), "{changes:?}");
    assert_eq!(follower.dossier().ram.iter().map(|range| range.hva).collect::<Vec<_>>(), [base]);
    assert_eq!(follower.poll().unwrap(), [], "once");
}

#[test]
fn ram_that_comes_back_is_reported() {
    let line = "-m 64 -object memory-backend-memfd,id=d,size=32M -device pc-dimm,memdev=d";
    let mut fake = Fake::start("qemu-system-x86_64", line);
    fake.tell(&format!("anonymous {MIB_64}"));
    fake.tell(&format!("memfd d {}", 32 << 20));
    let mut follower = follow(&fake, nothing_known());
    fake.tell("unmap");
    follower.poll().unwrap();
    let back = fake.map(&format!("memfd d {}", 32 << 20));
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Came(range)] if range.hva == back), "{changes:?}");
    assert_eq!(follower.poll().unwrap(), []);
}

#[test]
fn the_end_of_a_machine_is_reported_once_with_its_ram() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    let place = fake.map(&format!("anonymous {MIB_64}"));
    let mut follower = follow(&fake, nothing_known());
    fake.end();
    let changes = follower.poll().unwrap();
    assert!(
        matches!(&changes[..], [Change::Went(range), Change::Exited] if range.hva == place),
        "{changes:?}"
    );
    assert_eq!(follower.poll().unwrap(), []);
}

#[test]
fn another_program_in_the_same_process_ends_the_machine() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    fake.tell(&format!("anonymous {MIB_64}"));
    let mut follower = follow(&fake, nothing_known());
    let start = follower.held().start();
    let other = program(fake.folder.path(), "something-else");
    // It has the same amount of memory, as far as its number and start time go it is the same process.
    fake.tell(&format!("exec {}", other.display()));
    fake.tell(&format!("anonymous {MIB_64}"));
    let changes = follower.poll().unwrap();
    assert!(
        matches!(&changes[..], [Change::Went(_), Change::Execed { program }] if *program == other),
        "{changes:?}"
    );
    assert_eq!(fake.held().start(), start);
}

#[test]
fn the_same_program_again_in_the_same_process_ends_the_machine() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    let place = fake.map(&format!("anonymous {MIB_64}"));
    let request = Request { ranges: vec![place], ..Request::default() };
    let mut follower = follow(&fake, request);
    let same = fake.folder.path().join("qemu-system-x86_64");
    fake.tell(&format!("exec {} -m 64", same.display()));
    let changes = follower.poll().unwrap();
    assert!(matches!(&changes[..], [Change::Went(_), Change::Execed { .. }]), "{changes:?}");
}

#[test]
fn a_process_that_keeps_executing_others_is_never_taken_for_a_machine_with_their_memory() {
    const TRIES: usize = 20;
    // It may have executed the last of them before it is looked at once more.
    assert!(std::iter::repeat_with(looks_at_one_that_executes_others).take(TRIES).any(|looks| looks > 1));
}

/// How often it was looked at before it had executed all of them.
fn looks_at_one_that_executes_others() -> u32 {
    let folder = tempfile::tempdir().unwrap();
    let (vmm, other) = (program(folder.path(), "qemu-system-x86_64"), program(folder.path(), "other"));
    let mut command = Command::new(&vmm);
    command
        .args(["-name", "flap", "-m", "64"])
        .env("FLAP", "200")
        .env("FLAP_VMM", &vmm)
        .env("FLAP_OTHER", &other);
    let mut fake = Fake::run(folder, &mut command);
    let held = fake.held();
    let mut looks = 0;
    loop {
        match inspect(&held, &nothing_known()) {
            Ok(dossier) => panic!("the VMM has no memory: {dossier}"),
            // Between an exec and the next, /proc has no executable or an empty command line.
            Err(Refusal::NotVmm { .. } | Refusal::Restless(_) | Refusal::Ram(_) | Refusal::Procfs(_)) => {}
            Err(Refusal::Ended(_) | Refusal::NoProcess(_)) => {}
            Err(error) => panic!("{error}"),
        }
        looks += 1;
        let environment =
            std::fs::read(format!("/proc/{}/environ", held.process().get())).unwrap_or_default();
        if String::from_utf8_lossy(&environment).split('\0').any(|one| one == "FLAP=0") {
            break;
        }
    }
    fake.end();
    assert!(matches!(held.confirm(), Err(Refusal::Ended(_))));
    looks
}

#[test]
fn a_number_that_another_process_has_now_is_noticed() {
    let fake = Fake::start("qemu-system-x86_64", &format!("-name {} -m 64", unique("reused")));
    let start = fake.held().start();
    assert!(Held::reopen(fake.process(), start).is_ok());
    let error = Held::reopen(fake.process(), StartTime(start.0 - 1)).unwrap_err();
    assert!(matches!(error, Refusal::Reused { .. }), "{error}");
}
