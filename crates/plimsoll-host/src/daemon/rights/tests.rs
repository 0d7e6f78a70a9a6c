use super::table::{BEGINNING, Capability, printed};
use super::*;
use std::collections::BTreeSet;
use std::fs;

/// What the groups of systemd.exec(5) that the unit names hold on x86-64, by `systemd-analyze syscall-filter`.
const SYSTEMDS: [(&str, &str); 8] = [
    ("@clock", "adjtimex clock_adjtime clock_adjtime64 clock_settime clock_settime64 settimeofday"),
    ("@cpu-emulation", "modify_ldt subpage_prot switch_endian vm86 vm86old"),
    ("@module", "delete_module finit_module init_module"),
    (
        "@mount",
        "chroot fsconfig fsmount fsopen fspick mount mount_setattr move_mount open_tree pivot_root umount umount2",
    ),
    (
        "@obsolete",
        "_sysctl afs_syscall bdflush break create_module ftime get_kernel_syms getpmsg gtty idle lock mpx prof profil putpmsg \
         query_module security sgetmask ssetmask stime stty sysfs tuxcall ulimit uselib ustat vserver",
    ),
    ("@raw-io", "ioperm iopl pciconfig_iobase pciconfig_read pciconfig_write"),
    ("@reboot", "kexec_file_load kexec_load reboot"),
    ("@swap", "swapoff swapon"),
];

fn file(path: &str) -> String {
    fs::read_to_string(format!("{}/../../{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// What a directive of the unit says, each time it is there.
fn said<'a>(unit: &'a str, directive: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(directive)?.strip_prefix('=')).collect()
}

fn names(capabilities: &[Capability]) -> impl Iterator<Item = &'static str> {
    capabilities.iter().map(|capability| capability.name)
}

/// The calls that a role may make with some arguments at least.
fn calls(role: Role) -> BTreeSet<&'static str> {
    GROUPS
        .iter()
        .filter(|group| role.includes(group.whose))
        .flat_map(|group| group.calls)
        .map(Call::name)
        .collect()
}

#[test]
fn the_documentation_prints_the_table() {
    let (text, table) = (file("docs/rights.md"), printed());
    assert!(text.contains(&table), "docs/rights.md has not the table as it is:\n{table}");
}

#[test]
fn the_unit_has_the_capabilities_of_the_table_and_forbids_no_call_of_it() {
    let unit = file("contrib/plimsoll.service");
    let bounding: BTreeSet<&str> =
        said(&unit, "CapabilityBoundingSet").iter().flat_map(|line| line.split(' ')).collect();
    assert_eq!(bounding, names(KEPT).chain(names(BEGINNING)).collect());
    let mut forbidden = BTreeSet::new();
    for line in said(&unit, "SystemCallFilter") {
        let Some(groups) = line.strip_prefix('~') else {
            forbidden.retain(|call| !line.split(' ').any(|again| again == *call));
            continue;
        };
        for group in groups.split(' ') {
            let known = SYSTEMDS.iter().find(|(name, _)| *name == group);
            let (_, calls) = known.unwrap_or_else(|| panic!("what {group} holds is to be said here"));
            forbidden.extend(calls.split_ascii_whitespace());
        }
    }
    let needed = calls(Role::Keeper).into_iter().chain(["fsopen", "fsconfig", "fsmount"]);
    let missing: Vec<&str> = needed.filter(|call| forbidden.contains(call)).collect();
    assert_eq!(missing, Vec::<&str>::new());
    assert_eq!(said(&unit, "NoNewPrivileges"), ["yes"]);
}

#[test]
fn whoever_is_started_by_another_needs_no_more_than_that_one_has_left() {
    let [keeper, manager, alone] = [Role::Keeper, Role::Manager, Role::Alone].map(calls);
    assert!(manager.is_subset(&keeper) && alone.is_subset(&manager));
    // A ring is made before the manager's list holds, and used after.
    assert!(keeper.contains("io_uring_setup") && !manager.contains("io_uring_setup"));
    assert!(alone.contains("io_uring_enter"));
    assert!(!manager.contains("seccomp") && manager.contains("execve") && !alone.contains("execve"));
}

#[test]
fn what_takes_a_host_over_is_on_no_list() {
    let keeper = calls(Role::Keeper);
    for call in [
        "mount",
        "umount2",
        "pivot_root",
        "chroot",
        "setns",
        "unshare",
        "ptrace",
        "process_vm_writev",
        "bpf",
        "init_module",
        "finit_module",
        "kexec_load",
        "reboot",
        "swapon",
        "iopl",
        "perf_event_open",
        "userfaultfd",
        "keyctl",
        "setuid",
        "setresuid",
        "mknod",
        "mknodat",
        "open_by_handle_at",
        "fsopen",
        "personality",
    ] {
        assert!(!keeper.contains(call), "{call}");
    }
}

#[test]
fn every_list_makes_a_filter_and_the_calls_of_a_group_have_each_one_entry() {
    for role in [Role::Keeper, Role::Manager, Role::Alone] {
        for filter in [Filter::Refuse, Filter::Log] {
            let length = instructions(role, filter).unwrap().len();
            // Keeper's and manager's together, once: an upgrade adds none.
            assert!((100..4096 / 2).contains(&length), "{role:?}: {length} instructions");
        }
    }
    for group in GROUPS {
        let numbers: BTreeSet<i64> = group.calls.iter().map(|call| call.number).collect();
        assert_eq!(numbers.len(), group.calls.len(), "{}", group.why);
    }
}
