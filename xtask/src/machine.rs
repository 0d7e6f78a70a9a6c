//! What this machine can run.
//!
//! Enters: device files, the control group file system, programs. Leaves: the capabilities that tests above level 0 need,
//! present or missing. A test may be skipped only where one that its level needs is missing.
use crate::setup::{
    PYELFTOOLS, SYSTEMD, has_all_of, has_browser, has_kernel, has_promtool, has_schemathesis, is_root,
    is_there,
};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

/// A capability and whether it is here.
pub(crate) struct Capability {
    /// What tests and messages call it.
    pub(crate) name: &'static str,
    /// The lowest level whose tests need it.
    pub(crate) level: u8,
    /// Whether it can be used by this user.
    pub(crate) is_here: bool,
}

/// Looks at all of them.
pub(crate) fn capabilities() -> Vec<Capability> {
    let has_libvirt = is_root() && is_there("libvirtd") && is_there("virtlogd") && is_there("virsh");
    [
        (1, "root", is_root()),
        (1, "kvm", can_open("/dev/kvm")),
        (1, "userfaultfd", can_fault()),
        (1, "cgroup", can_make_cgroup()),
        (1, "zram", is_root() && Path::new("/sys/class/zram-control/hot_add").exists()),
        (1, "ksm", is_root() && can_merge()),
        (1, "systemd", is_root() && is_there(SYSTEMD)),
        (1, "promtool", has_promtool()),
        (1, "schemathesis", has_schemathesis()),
        (1, "browser", has_browser()),
        (2, "qemu", is_there("qemu-system-x86_64")),
        (2, "libvirt", has_libvirt),
        (2, "gdb", is_there("gdb")),
        (2, "pyelftools", is_there(PYELFTOOLS)),
        (2, "cloud-kernel", has_kernel()),
        (3, "models", is_there("qemu-system-x86_64") && has_all_of(3)),
    ]
    .map(|(level, name, is_here)| Capability { name, level, is_here })
    .into()
}

/// KSM is there and rests, and nobody on this machine has memory that tests would see merged with theirs.
fn can_merge() -> bool {
    let has_mergeable = |entry: io::Result<fs::DirEntry>| {
        let stat = entry.and_then(|entry| fs::read_to_string(entry.path().join("ksm_stat")));
        stat.is_ok_and(|stat| {
            stat.lines().any(|line| matches!(line, "ksm_mergeable: yes" | "ksm_merge_any: yes"))
        })
    };
    let is_at_rest = fs::read_to_string("/sys/kernel/mm/ksm/run").is_ok_and(|run| run.trim() != "1");
    is_at_rest && fs::read_dir("/proc").is_ok_and(|mut entries| !entries.any(has_mergeable))
}

fn can_open(device: &str) -> bool {
    OpenOptions::new().read(true).write(true).open(device).is_ok()
}

fn can_fault() -> bool {
    let switch = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    can_open("/dev/userfaultfd") || switch.is_ok_and(|text| is_root() || text.trim() == "1")
}

/// Makes a memory control group and removes it.
fn can_make_cgroup() -> bool {
    let root = Path::new("/sys/fs/cgroup");
    let unified = fs::read_to_string(root.join("cgroup.controllers"));
    let parent = match unified {
        Ok(controllers) if controllers.split_whitespace().any(|name| name == "memory") => root.to_owned(),
        Ok(_) => return false,
        Err(_) => root.join("memory"),
    };
    let group = parent.join(format!("plimsoll-xtask-{}", std::process::id()));
    fs::create_dir(&group).is_ok() && fs::remove_dir(&group).is_ok()
}
