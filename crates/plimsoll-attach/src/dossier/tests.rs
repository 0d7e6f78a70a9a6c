//! What people and programs read about a machine, word by word.

use super::*;
use crate::ram::{RamBacking, parse_range};
use crate::vmm::{Address, Protocol};

fn range(block: &str, place: &str, backing: RamBacking, hazards: Vec<Hazard>) -> RamRange {
    RamRange {
        hva: parse_range(place).unwrap(),
        block: block.to_owned(),
        backing,
        node: None,
        resident: ByteCount::mib(24),
        swapped: ByteCount(0),
        hazards,
    }
}

fn machine(ram: Vec<RamRange>) -> Dossier {
    Dossier {
        identity: Identity { process: ProcessId::new(4242).unwrap(), start: StartTime(99) },
        vmm: Vmm::Qemu,
        name: "web1".to_owned(),
        uuid: None,
        program: PathBuf::from("/usr/bin/qemu-system-x86_64"),
        acceleration: Acceleration::Kvm,
        run_state: None,
        sockets: Vec::new(),
        ram,
        hazards: Vec::new(),
        notes: Vec::new(),
    }
}

#[test]
fn a_machine_under_libvirt_with_nothing_in_the_way() {
    let mut dossier =
        machine(vec![range("pc.ram", "7f0000000000-7f0080000000", RamBacking::PrivateAnonymous, vec![])]);
    dossier.uuid = Some("160141fc-ec2e-4d91-bc1c-3e597643bcfd".to_owned());
    dossier.run_state = Some("running".to_owned());
    dossier.ram[0].swapped = ByteCount::mib(100);
    dossier.ram[0].node = Some(1);
    dossier
        .sockets
        .push(ControlSocket { protocol: Protocol::Qmp, address: Address::Inherited { descriptor: 22 } });
    assert_eq!(
        dossier.to_string(),
        "\
web1: QEMU, pid 4242, KVM, running
  program  /usr/bin/qemu-system-x86_64
  uuid     160141fc-ec2e-4d91-bc1c-3e597643bcfd
  control  QMP on descriptor 22, owned by libvirt
  ram      2G
    pc.ram  0x7f0000000000-0x7f0080000000  2G, 24M in memory, 100M in swap: private anonymous memory, bound to node 1
  allowed  guest-free, balloon, resident-sharing, kernel-paging, disk
"
    );
}

#[test]
fn a_machine_with_different_blocks_and_a_cgroup_without_swap() {
    let huge = RamBacking::HugeTlb { name: "/dev/hugepages/x (deleted)".to_owned() };
    let mut dossier = machine(vec![
        range("node0", "7f0000000000-7f0020000000", RamBacking::PrivateAnonymous, vec![]),
        range("n1", "7f1000000000-7f1020000000", huge, vec![Hazard::HugeTlb]),
    ]);
    dossier.hazards.push(Hazard::SwapForbidden { cgroup: "/sys/fs/cgroup/machine.slice".to_owned() });
    dossier.notes.push(Note::VhostUser);
    assert_eq!(
        dossier.to_string(),
        "\
web1: QEMU, pid 4242, KVM
  program  /usr/bin/qemu-system-x86_64
  ram      1G
    node0  0x7f0000000000-0x7f0020000000  512M, 24M in memory: private anonymous memory
    n1     0x7f1000000000-0x7f1020000000  512M, 24M in memory: huge pages of /dev/hugepages/x (deleted)
  allowed  guest-free, balloon, resident-sharing
  off      kernel-paging, disk: its cgroup /sys/fs/cgroup/machine.slice forbids swap: raise memory.swap.max (v1: memory.swappiness and memory.memsw.limit_in_bytes) there, or above it
  off for n1  balloon, resident-sharing: guest RAM lies in hugetlbfs pages, which cannot be swapped: use transparent huge pages instead
  note     vhost-user back ends share guest RAM: pages leave when the kernel has unmapped them everywhere, which is safe
"
    );
}

#[test]
fn a_machine_of_plimsolls_own() {
    let mut dossier = machine(Vec::new());
    (dossier.vmm, dossier.program) = (Vmm::Plimsoll, PathBuf::from("/usr/bin/plimsoll"));
    dossier.hazards.push(Hazard::OwnPager);
    assert_eq!(
        dossier.to_string(),
        "\
web1: plimsoll, pid 4242, KVM
  program  /usr/bin/plimsoll
  ram      known to plimsoll's pager only
  allowed  nothing
  off      guest-free, balloon, resident-sharing, kernel-paging, disk: plimsoll's own pager manages this machine's memory already
"
    );
}

#[test]
fn as_json() {
    let shared = RamBacking::SharedMemory { name: "/memfd:ram0 (deleted)".to_owned() };
    let mut dossier =
        machine(vec![range("ram0", "7f0000000000-7f0040000000", shared, vec![Hazard::SharedPages])]);
    dossier.sockets.push(ControlSocket { protocol: Protocol::Qmp, address: Address::Path("/run/q".into()) });
    dossier.notes.push(Note::HotPlug);
    let found = serde_json::to_value(&dossier).unwrap();
    let expected = serde_json::json!({
        "name": "web1",
        "vmm": "qemu",
        "process": 4242,
        "start": 99,
        "uuid": null,
        "program": "/usr/bin/qemu-system-x86_64",
        "acceleration": "kvm",
        "run_state": null,
        "sockets": [{ "protocol": "qmp", "address": { "path": "/run/q" } }],
        "size": 1 << 30,
        "ram": [{
            "hva": "0x7f0000000000-0x7f0040000000",
            "block": "ram0",
            "backing": { "kind": "shared-memory", "name": "/memfd:ram0 (deleted)" },
            "node": null,
            "resident": 24 << 20,
            "swapped": 0,
            "hazards": ["guest RAM is mapped shared, and KSM merges private anonymous pages only"],
        }],
        "rungs": {
            "guest-free": null,
            "balloon": null,
            "resident-sharing": "guest RAM is mapped shared, and KSM merges private anonymous pages only",
            "kernel-paging": null,
            "disk": null,
        },
        "notes": ["memory can be plugged in later: only its control socket (--qmp) tells the size of what was"],
    });
    assert_eq!(found, expected);
}
