//! Contradictions: each is refused whole, and its message names both values.
use crate::world::{MIB, machine};
use plimsoll_policy::Ppm;
use plimsoll_policy::admission::{AdmissionError, Capacity, Overheads, admit};
use plimsoll_policy::settings::{Face, GroupSettings, MachineSettings, Settings, SettingsError, Shares};
use plimsoll_policy::tree::{DEPTH_MAX, Tree};
use plimsoll_types::{ByteCount, GroupId, MachineId};
use std::error::Error;

fn dynamic(startup: u64, minimum: u64, maximum: u64, buffer: u32, weight: u32) -> MachineSettings {
    let [startup, minimum, maximum] = [startup, minimum, maximum].map(MIB);
    let buffer = Ppm::percent(buffer);
    MachineSettings::new(MachineId(1), Face::Dynamic { startup, minimum, maximum, buffer, weight })
}

fn group(id: u32, parent: Option<u32>) -> GroupSettings {
    GroupSettings { parent: parent.map(GroupId), ..GroupSettings::new(GroupId(id)) }
}

fn inside(group: u32, machine: MachineSettings) -> MachineSettings {
    MachineSettings { parent: Some(GroupId(group)), ..machine }
}

fn refused(groups: &[GroupSettings], machines: &[MachineSettings]) -> String {
    let settings =
        Settings { groups: groups.to_vec(), machines: machines.to_vec(), ..Settings::new(MIB(4096)) };
    Tree::new(settings).unwrap_err().to_string()
}

#[test]
fn a_machine_that_contradicts_itself_is_refused_with_both_values() {
    let odd = ByteCount(5000);
    let face = Face::Static { size: odd };
    let vast = Face::Static { size: ByteCount(1 << 62) };
    let limit = Face::Guarantee { size: MIB(1), reservation: MIB(0), limit: MIB(2), shares: Shares(1) };
    for (settings, message) in [
        (machine(1, 0, 0, 1), "vm1 has a size of 0: give it at least one page"),
        (MachineSettings::new(MachineId(1), face), "vm1 has a size of 5000 bytes: use a multiple of 4096"),
        (MachineSettings::new(MachineId(1), vast), "vm1 has a size of 4194304T: use at most 4096T"),
        (machine(1, 1, 2, 1), "vm1 reserves 2M, more than its limit of 1M: lower one or raise the other"),
        (
            MachineSettings::new(MachineId(1), limit),
            "vm1 has a limit of 2M, more than its size of 1M: use at most its size",
        ),
        (machine(1, 1, 0, 0), "vm1 has 0 shares: give it at least 1"),
        (machine(1, 1, 0, 1_000_001), "vm1 has 1000001 shares: use at most 1000000"),
        (dynamic(3, 4, 2, 0, 1), "vm1 has a minimum of 4M, more than its maximum of 2M: exchange them"),
        (
            dynamic(1, 2, 4, 0, 1),
            "vm1 starts with 1M, which is not between its minimum of 2M and its maximum of 4M: use a value between them",
        ),
        (dynamic(2, 2, 4, 2001, 1), "vm1 has a buffer of 2001 %: use at most 2000 %"),
        (dynamic(2, 2, 4, 0, 10_001), "vm1 has a weight of 10001: use at most 10000"),
        (
            MachineSettings { stall_objective: Ppm::percent(101), ..machine(1, 1, 0, 1) },
            "vm1 has a stall objective of 101 %: use at most 100 %",
        ),
    ] {
        assert_eq!(refused(&[], &[settings]), message);
    }
}

#[test]
fn groups_that_cannot_be_nested_are_refused() {
    let one = machine(1, 1, 0, 1);
    for (groups, machines, message) in [
        (vec![], vec![one, one], "vm1 is there twice: give each a number of its own"),
        (
            vec![group(1, None), group(1, None)],
            vec![],
            "group1 is there twice: give each a number of its own",
        ),
        (
            vec![],
            vec![inside(7, one)],
            "vm1 belongs to group7, which is not there: add it, or leave the parent out",
        ),
        (
            vec![group(1, Some(7))],
            vec![],
            "group1 belongs to group7, which is not there: add it, or leave the parent out",
        ),
        (
            vec![group(1, Some(1))],
            vec![],
            "group1 is nested in group1, which is nested in group1: leave out one of the two",
        ),
    ] {
        assert_eq!(refused(&groups, &machines), message);
    }
    // A cycle is found behind groups that merely hang from it.
    let knot = [group(1, Some(2)), group(2, Some(3)), group(3, Some(4)), group(4, Some(3))];
    let settings = Settings { groups: knot.to_vec(), ..Settings::new(MIB(1)) };
    let error = Tree::new(settings).unwrap_err();
    assert!(
        matches!(error, SettingsError::Cycle { group: GroupId(3 | 4), parent: GroupId(3 | 4) }),
        "{error}"
    );
    let deep: Vec<GroupSettings> = (1..=17).map(|id| group(id, (id > 1).then_some(id - 1))).collect();
    assert_eq!(refused(&deep, &[]), format!("group17 is nested too deep: use at most {DEPTH_MAX} levels"));
    let settings = Settings { groups: deep[..DEPTH_MAX].to_vec(), ..Settings::new(MIB(1)) };
    assert!(Tree::new(settings).is_ok());
}

#[test]
fn guarantees_that_do_not_fit_into_the_one_above_are_refused() {
    let sized = |reservation, limit| GroupSettings {
        reservation: Some(MIB(reservation)),
        limit: Some(MIB(limit)),
        ..group(1, None)
    };
    let two = [inside(1, machine(1, 100, 60, 1)), inside(1, machine(2, 100, 60, 1))];
    for (groups, machines, message) in [
        (
            vec![sized(3, 2)],
            vec![],
            "group1 reserves 3M, more than its limit of 2M: lower one or raise the other",
        ),
        (
            vec![sized(100, 200)],
            two.to_vec(),
            "group1 reserves 100M, but what is nested in it reserves 120M: raise the one or lower the other",
        ),
        (
            vec![sized(0, 100)],
            two.to_vec(),
            "group1 has a limit of 100M, but what is nested in it reserves 120M: raise the one or lower the other",
        ),
        (
            vec![sized(50, 100), group(2, Some(1))],
            vec![inside(2, machine(1, 100, 60, 1))],
            "group1 reserves 50M, but what is nested in it reserves 60M: raise the one or lower the other",
        ),
        (
            vec![],
            vec![machine(1, 4000, 4000, 1), machine(2, 4000, 200, 1)],
            "the host has 4G for machines, but 4.1G is reserved: lower a reservation",
        ),
    ] {
        assert_eq!(refused(&groups, &machines), message);
    }
}

#[test]
fn a_reservation_that_its_group_covers_is_not_paid_twice() {
    let host = Capacity { total: MIB(4096), own: MIB(100), overheads: Overheads::MEASURED };
    let covers = GroupSettings { reservation: Some(MIB(3000)), ..group(1, None) };
    let tree = Tree::new(Settings { groups: vec![covers], ..Settings::new(MIB(4096)) }).unwrap();
    let member = |id, mib| inside(1, machine(id, mib, mib, 1));
    let tree = admit(&tree, member(1, 2000), &host).unwrap();
    let tree = admit(&tree, member(2, 1000), &host).unwrap();
    let error = admit(&tree, member(3, 1), &host).unwrap_err();
    assert!(matches!(error, AdmissionError::Settings(SettingsError::Overreserved { .. })), "{error}");
    assert!(error.source().is_some_and(|source| source.to_string().starts_with("group1 reserves 2.9G")));
    let error = admit(&tree, machine(3, 1000, 900, 1), &host).unwrap_err();
    let AdmissionError::NoRoom { charge, account, .. } = error else { panic!("{error}") };
    assert_eq!((charge.reserved, account.reserved), (MIB(900), MIB(3000)));
    assert!(charge.total() > account.left());
}

#[test]
fn what_a_machine_starts_with_must_fit_too() {
    let host = Capacity { total: MIB(4096), own: MIB(100), overheads: Overheads::MEASURED };
    let tree = Tree::new(Settings::new(MIB(4096))).unwrap();
    assert!(admit(&tree, dynamic(1000, 500, 8000, 20, 5000), &host).is_ok());
    let error = admit(&tree, dynamic(4000, 500, 8000, 20, 5000), &host).unwrap_err();
    assert!(error.to_string().contains("500M reserved + 3.4G to start"), "{error}");
}

#[test]
fn settings_read_from_a_file_are_checked_as_any_others() {
    let settings = Settings { machines: vec![machine(1, 1, 0, 1)], ..Settings::new(MIB(4096)) };
    let good = serde_json::to_string(&Tree::new(settings).unwrap()).unwrap();
    assert!(serde_json::from_str::<Tree>(&good).is_ok());
    let bad = good.replace("\"shares\":1", "\"shares\":0");
    assert_ne!(good, bad);
    assert_eq!(
        serde_json::from_str::<Tree>(&bad).unwrap_err().to_string(),
        "vm1 has 0 shares: give it at least 1"
    );
    let taxed = good.replace("\"tax\":750000", "\"tax\":1000000");
    assert_ne!(good, taxed);
    assert!(serde_json::from_str::<Tree>(&taxed).is_err());
}
