//! Machines whose memory must not be taken are looked at as a whole, and what must not be done with it is off, each for its
//! reason.

use crate::fake::Fake;
use crate::{MIB_64, nothing_known, skip};
use plimsoll_attach::{Dossier, Hazard, Rung, inspect};

fn look(fake: &Fake) -> Dossier {
    inspect(&fake.held(), &nothing_known()).unwrap()
}

/// A QEMU with RAM of its own that has done those things, too.
fn qemu_that(commands: &[&str]) -> Fake {
    let mut fake = Fake::start("qemu-system-x86_64", "-m 64");
    fake.tell(&format!("anonymous {MIB_64}"));
    commands.iter().for_each(|command| drop(fake.tell(command)));
    fake
}

fn assert_all_off(dossier: &Dossier, why: &Hazard) {
    assert!(Rung::ALL.iter().all(|&rung| dossier.rungs().off(rung) == Some(why)), "{why:?}: {dossier}");
}

#[test]
fn a_device_with_direct_access_turns_every_rung_off() {
    if !rustix::process::geteuid().is_root() {
        return skip("root", "not root, so no file can look like a device's");
    }
    for file in ["/dev/vfio/42", "/dev/vfio/devices/vfio0", "/dev/iommu", "/dev/vhost-vdpa-0"] {
        let fake = qemu_that(&["open /dev/vhost-net", &format!("open {file}")]);
        assert_all_off(&look(&fake), &Hazard::DirectDevice { file: file.to_owned() });
    }
    assert!(look(&qemu_that(&["open /dev/vhost-net"])).rungs().allows(Rung::GuestFree));
}

#[test]
fn memory_that_kvm_keeps_from_the_host_turns_every_rung_off() {
    let mut fake = qemu_that(&[]);
    assert!(look(&fake).rungs().allows(Rung::GuestFree));
    // Where KVM makes none for machines like this one, another file looks like it.
    let made = fake.ask("guest-memfd 2097152");
    let file = if made.is_ok() { "anon_inode:[kvm-gmem]" } else { "/anon_inode:[kvm-gmem]" };
    if made.is_err() && fake.ask(&format!("open {file}")).is_err() {
        return skip("root", "no guest_memfd can be made, and not root, so no file can look like one");
    }
    assert_all_off(&look(&fake), &Hazard::Confidential { evidence: format!("{file} is open") });
}
