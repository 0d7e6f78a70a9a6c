//! Processes that look like VMMs are found, looked at, followed and refused; each is started by the test that needs it.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

mod fake;
mod following;
mod hazards;
mod refusals;
mod sockets;

use fake::Fake;
use plimsoll_attach::{
    Acceleration, Hazard, RamBacking, Request, Rung, discover, find, inspect,
    vmm::{Note, Vmm},
};
use plimsoll_types::ByteCount;

const MIB_64: u64 = 64 << 20;

fn nothing_known() -> Request {
    Request::default()
}

/// A machine name that no other process of this host has.
fn unique(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// Says that a test needs something that is not here. A machine that `PLIMSOLL_REQUIRE` says has it is at fault.
fn skip(capability: &str, why: &str) {
    let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == capability), "{capability} is required: {why}");
    println!("SKIPPED: {why}");
}

#[test]
fn a_machine_is_found_by_name_and_number_and_its_ram_by_size() {
    let name = unique("found");
    let mut fake =
        Fake::start("qemu-system-x86_64", &format!("-name guest={name},debug-threads=on -m 64 -uuid 1-2-3"));
    let place = fake.map(&format!("anonymous {MIB_64}"));
    fake.tell("memfd other 67108864");

    let seen = find(&name).unwrap();
    assert_eq!(
        (seen.identity.process, seen.vmm, seen.uuid.as_deref()),
        (fake.process(), Vmm::Qemu, Some("1-2-3"))
    );
    assert_eq!(find(&fake.process().get().to_string()).unwrap(), seen);
    assert!(discover().unwrap().machines.contains(&seen));

    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    assert_eq!((dossier.name.as_str(), dossier.acceleration), (name.as_str(), Acceleration::Emulated));
    assert_eq!(dossier.ram.iter().map(|range| range.hva).collect::<Vec<_>>(), [place]);
    assert_eq!(dossier.ram[0].backing, RamBacking::PrivateAnonymous);
    assert!(dossier.rungs().allows(Rung::GuestFree));
}

#[test]
fn a_machine_without_a_name_is_named_by_kind_and_number() {
    let fake = Fake::start("qemu-kvm", "-m 64");
    assert_eq!(
        find(&fake.process().get().to_string()).unwrap().name,
        format!("qemu-{}", fake.process().get())
    );
}

#[test]
fn blocks_of_different_kinds_are_matched_to_their_memory() {
    let line = "-m 128 -object memory-backend-ram,id=a,size=64M -object memory-backend-memfd,id=b,size=64M,share=on \
                -numa node,memdev=a -numa node,memdev=b";
    let mut fake = Fake::start("qemu-system-x86_64", line);
    let anonymous = fake.map(&format!("anonymous {MIB_64}"));
    let shared = fake.map(&format!("memfd memory-backend-memfd {MIB_64}"));
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    let found: Vec<_> = dossier.ram.iter().map(|range| (range.block.as_str(), range.hva)).collect();
    assert_eq!(found, [("a", anonymous), ("b", shared)]);
    assert_eq!(dossier.rungs_of(&dossier.ram[1]).off(Rung::ResidentSharing), Some(&Hazard::SharedPages));
    assert!(dossier.rungs().allows(Rung::ResidentSharing), "one of its blocks allows it");
}

#[test]
fn the_other_vmms_are_found_by_what_they_map() {
    for (program, line, memory, vmm) in [
        (
            "cloud-hypervisor",
            "--api-socket /run/none/web.sock --memory size=64M,shared=on",
            "memfd ch_ram",
            Vmm::CloudHypervisor,
        ),
        ("crosvm", "run --mem 64 kernel", "memfd crosvm_guest", Vmm::Crosvm),
        ("firecracker", "--no-api --id fc1", "anonymous", Vmm::Firecracker),
    ] {
        let mut fake = Fake::start(program, line);
        let place = fake.map(&format!("{memory} {MIB_64}"));
        let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
        assert_eq!((dossier.vmm, dossier.ram[0].hva), (vmm, place), "{program}");
        assert_eq!(dossier.notes.contains(&Note::ByLooks), vmm == Vmm::Firecracker);
    }
}

#[test]
fn a_firecracker_says_its_size_in_its_configuration_file() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    std::fs::write(&config, r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 48}}"#).unwrap();
    let mut fake = Fake::start("firecracker", &format!("--no-api --config-file {}", config.display()));
    fake.tell(&format!("anonymous {MIB_64}"));
    let place = fake.map(&format!("anonymous {}", 48 << 20));
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    assert_eq!(dossier.ram.iter().map(|range| range.hva).collect::<Vec<_>>(), [place]);
}

#[test]
fn plimsolls_own_machines_are_left_to_their_pager() {
    let fake = Fake::start("plimsoll", "vmm --control-fd 3");
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    assert_eq!((dossier.vmm, dossier.ram.len()), (Vmm::Plimsoll, 0));
    assert!(Rung::ALL.iter().all(|&rung| dossier.rungs().off(rung) == Some(&Hazard::OwnPager)));
}

#[test]
fn locked_ram_turns_every_rung_off_and_is_still_counted() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64 -overcommit mem-lock=on");
    fake.tell(&format!("anonymous {MIB_64}"));
    fake.tell("lock");
    let dossier = inspect(&fake.held(), &nothing_known()).unwrap();
    let locked = Hazard::Locked { locked: ByteCount(MIB_64) };
    assert_eq!(dossier.size(), ByteCount(MIB_64));
    assert!(Rung::ALL.iter().all(|&rung| dossier.rungs().off(rung) == Some(&locked)), "{dossier}");
}

#[test]
fn named_ranges_are_taken_instead_of_looking() {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 512");
    let place = fake.map(&format!("anonymous {MIB_64}"));
    let request = Request { ranges: vec![place], ..Request::default() };
    let dossier = inspect(&fake.held(), &request).unwrap();
    assert_eq!((dossier.ram[0].hva, dossier.ram[0].block.as_str()), (place, "given"));
}
