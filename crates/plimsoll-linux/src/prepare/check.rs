//! What this kernel offers for taking guests' memory, and what it lacks.
//!
//! The kernel's files and what this process has tried on itself enter; a list of findings leaves, and whether machines
//! can be attached with kernel paging. What must never happen here: a write, or a finding that was not looked at.
use super::plan::is_zswap_on;
use super::probe::{ADVICE, Own, PageMap};
use crate::system::System;
use crate::zram::{Disk, SwapKind, is_offered, swap_areas};
use plimsoll_sys::process::CapabilitySet;
use plimsoll_sys::uffd::Features;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::path::Path;

/// How much of something there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// All that plimsoll uses.
    Present,
    /// Some of it, or it is off.
    Limited,
    /// None.
    Absent,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub name: &'static str,
    /// How much of it there is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What plimsoll uses it for.
    pub used_for: &'static str,
    /// What to do to have all of it, where there is something.
    pub remedy: Option<String>,
}

/// Why machines cannot be attached with kernel paging.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Obstacle {
    /// A sentence.
    pub because: String,
    /// The command, or the step, that changes it.
    pub fix: String,
}

/// What was found on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The first thing in the way of attaching machines with kernel paging; `None` if they can be attached.
    pub obstacle: Option<Obstacle>,
    /// All findings.
    pub findings: Vec<Finding>,
}

/// A look at one thing.
struct Topic {
    name: &'static str,
    used_for: &'static str,
    look: fn(&dyn System, &Own) -> Look,
}

/// Its result.
struct Look {
    state: State,
    found: String,
    remedy: Option<String>,
}

impl Look {
    fn present(found: impl Into<String>) -> Self {
        Self { state: State::Present, found: found.into(), remedy: None }
    }

    fn limited(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Limited, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn absent(found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { state: State::Absent, found: found.into(), remedy: Some(remedy.into()) }
    }
}

const TOPICS: [Topic; 17] = [
    Topic { name: "kernel", used_for: "everything below", look: kernel },
    Topic { name: "kvm", used_for: "running machines of its own", look: kvm },
    Topic {
        name: "userfaultfd",
        used_for: "the pager of machines that hand their memory over",
        look: userfaultfd,
    },
    Topic {
        name: "process_madvise",
        used_for: "paging out, cooling and collapsing attached machines",
        look: advice,
    },
    Topic { name: "page maps", used_for: "seeing which pages came back: the working set", look: page_maps },
    Topic { name: "swap", used_for: "keeping what is paged out of attached machines", look: swap },
    Topic { name: "zram", used_for: "swap in compressed memory", look: zram },
    Topic { name: "zswap", used_for: "compressed memory in front of a disk swap", look: zswap },
    Topic { name: "pressure", used_for: "the share of time that work waits for memory", look: pressure },
    Topic { name: "cgroups", used_for: "exact accounting and limits", look: cgroups },
    Topic { name: "ksm", used_for: "sharing equal pages of machines of one domain", look: ksm },
    Topic { name: "huge pages", used_for: "whole blocks for hot memory", look: huge_pages },
    Topic {
        name: "idle pages",
        used_for: "nothing yet (a second opinion on the working set)",
        look: idle_pages,
    },
    Topic { name: "damon", used_for: "nothing yet (access patterns without sampling)", look: damon },
    Topic { name: "vm settings", used_for: "explaining how the kernel chooses what to swap", look: settings },
    Topic {
        name: "capabilities",
        used_for: "reaching other processes and changing swap",
        look: capabilities,
    },
    Topic { name: "memory", used_for: "what there is to manage", look: memory },
];

/// Looks at everything.
pub fn check(system: &dyn System, own: &Own) -> Check {
    let finding = |topic: &Topic| {
        let Look { state, found, remedy } = (topic.look)(system, own);
        Finding { name: topic.name, state, found, used_for: topic.used_for, remedy }
    };
    Check { obstacle: obstacle(system, own), findings: TOPICS.iter().map(finding).collect() }
}

/// What paging from outside needs, in the order in which it would fail.
fn obstacle(system: &dyn System, own: &Own) -> Option<Obstacle> {
    let obstacle = |because: String, fix: &str| Some(Obstacle { because, fix: fix.to_owned() });
    if let [Some(why), ..] = &own.refused {
        return obstacle(
            format!("the kernel does not page out what it is asked to: {why}"),
            "use Linux 5.10 or newer (CONFIG_ADVISE_SYSCALLS), and no filter that forbids process_madvise",
        );
    }
    if let PageMap::Refused(why) = &own.page_map {
        return obstacle(
            format!("page maps cannot be read: {why}"),
            "use a kernel with CONFIG_PROC_PAGE_MONITOR",
        );
    }
    let missing = missing_rights(own, &[CapabilitySet::SYS_PTRACE, CapabilitySet::SYS_NICE]);
    if !missing.is_empty() {
        return obstacle(
            format!(
                "this process may not advise about other users' processes: it lacks {}",
                missing.join(", ")
            ),
            "run plimsoll as root, or give it these capabilities",
        );
    }
    let areas = swap_areas(system).unwrap_or_default();
    if areas.is_empty() {
        return obstacle("this host has no swap to page machines out to".to_owned(), "plimsoll host prepare");
    }
    if areas.iter().all(|area| area.used >= area.size) {
        return obstacle("this host's swap is full".to_owned(), "plimsoll host prepare");
    }
    None
}

fn text(system: &dyn System, path: &str) -> Option<String> {
    Some(system.read(path.as_ref()).ok()?.trim().to_owned())
}

/// `name value` of each file of a directory that is there.
fn values(system: &dyn System, directory: &str, names: &[&str]) -> String {
    let value = |name: &&str| Some(format!("{name} {}", text(system, &format!("{directory}/{name}"))?));
    names.iter().filter_map(value).collect::<Vec<_>>().join(", ")
}

/// The word in brackets: what is chosen of a list.
fn chosen(list: &str) -> &str {
    list.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or(list, |(name, _)| name)
}

fn kernel(system: &dyn System, _: &Own) -> Look {
    let release = text(system, "/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|word| word.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    match version {
        (0, _) => Look::absent("/proc/sys/kernel/osrelease cannot be read", "mount /proc"),
        version if version >= (6, 8) => Look::present(release),
        version if version >= (5, 10) => {
            Look::limited(release, "Linux 6.8 or newer: without UFFDIO_MOVE there is no pager of our own")
        }
        _ => Look::absent(release, "Linux 5.10 or newer has process_madvise, 6.8 all that is used"),
    }
}

fn kvm(_: &dyn System, own: &Own) -> Look {
    match &own.kvm {
        Ok(found) => Look::present(found),
        Err(why) => {
            Look::absent(why, "load kvm_intel or kvm_amd, and give this user read and write to /dev/kvm")
        }
    }
}

fn userfaultfd(_: &dyn System, own: &Own) -> Look {
    let features = match &own.userfaultfd {
        Ok(features) => *features,
        Err(why) => return Look::absent(why, "run plimsoll as root"),
    };
    let needed = Features::MOVE | Features::POISON | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let names = |set: Features| set.iter_names().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    if features.contains(needed) {
        return Look::present(format!("all that is needed ({})", names(needed)));
    }
    Look::limited(format!("no {}", names(needed - features)), "Linux 6.8 or newer")
}

fn advice(_: &dyn System, own: &Own) -> Look {
    let named = || own.refused.iter().zip(ADVICE);
    let taken: Vec<&str> = named().filter_map(|(why, (_, name))| why.is_none().then_some(name)).collect();
    let refused: Vec<String> =
        named().filter_map(|(why, (_, name))| Some(format!("{name} refused ({})", why.as_ref()?))).collect();
    let found = [taken.join(", "), refused.join(", ")].into_iter().filter(|part| !part.is_empty());
    let found = found.collect::<Vec<_>>().join("; ");
    match (taken.len(), &own.refused[0]) {
        (3, _) => Look::present(format!("{found}: accepted on memory of our own")),
        (_, None) => Look::limited(found, "Linux 6.1 or newer has COLLAPSE"),
        _ => Look::absent(found, "Linux 5.10 or newer"),
    }
}

fn page_maps(_: &dyn System, own: &Own) -> Look {
    match &own.page_map {
        PageMap::Scan => Look::present("PAGEMAP_SCAN"),
        PageMap::EntriesOnly => {
            Look::limited("entries, one by one", "Linux 6.7 or newer has PAGEMAP_SCAN, which skips holes")
        }
        PageMap::Refused(why) => Look::absent(why, "a kernel with CONFIG_PROC_PAGE_MONITOR"),
    }
}

fn swap(system: &dyn System, _: &Own) -> Look {
    let areas = match swap_areas(system) {
        Ok(areas) => areas,
        Err(error) => return Look::absent(crate::explain(&error), "mount /proc"),
    };
    let describe = |area: &crate::zram::SwapArea| {
        let kind = match area.kind {
            SwapKind::Zram => "zram",
            SwapKind::Partition => "disk",
            SwapKind::File => "file",
        };
        let (path, size, used, priority) = (area.path.display(), area.size, area.used, area.priority);
        format!("{path} ({kind}) {size}, {used} used, priority {priority}")
    };
    let found = areas.iter().map(describe).collect::<Vec<_>>().join("; ");
    if areas.is_empty() {
        Look::absent("none", "plimsoll host prepare")
    } else if areas.iter().all(|area| area.used >= area.size) {
        Look::limited(format!("full: {found}"), "plimsoll host prepare")
    } else {
        Look::present(found)
    }
}

fn zram(system: &dyn System, _: &Own) -> Look {
    if !is_offered(system) {
        return Look::absent(
            "no /sys/class/zram-control",
            "modprobe zram, or a kernel built with CONFIG_ZRAM",
        );
    }
    let Some(disk) = Disk::all(system).ok().and_then(|disks| disks.into_iter().next()) else {
        return Look::present("devices can be added; what they can do shows on the first one");
    };
    let algorithms = disk.get("comp_algorithm").unwrap_or_default();
    let parts = [
        ("idle", "idle marks", "CONFIG_ZRAM"),
        ("recomp_algorithm", "recompression", "CONFIG_ZRAM_MULTI_COMP"),
        ("backing_dev", "write-back", "CONFIG_ZRAM_WRITEBACK"),
    ];
    let (has, lacks): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(attribute, ..)| disk.has(attribute));
    let list = |parts: &[(&str, &'static str, &'static str)]| -> Vec<&'static str> {
        parts.iter().map(|(_, name, _)| *name).collect()
    };
    let mut found = format!("algorithms {algorithms}");
    for name in list(&has) {
        found = format!("{found}, {name}");
    }
    if lacks.is_empty() {
        return Look::present(found);
    }
    let options: Vec<&str> = lacks.iter().map(|(_, _, option)| *option).collect();
    Look::limited(
        format!("{found}; no {}", list(&lacks).join(", no ")),
        format!("a kernel built with {}", options.join(", ")),
    )
}

fn zswap(system: &dyn System, _: &Own) -> Look {
    const PARAMETERS: &str = "/sys/module/zswap/parameters";
    if !system.exists(Path::new(PARAMETERS)) {
        return Look::absent("this kernel has none", "a kernel built with CONFIG_ZSWAP");
    }
    let found = values(
        system,
        PARAMETERS,
        &["compressor", "max_pool_percent", "accept_threshold_percent", "shrinker_enabled"],
    );
    let areas = swap_areas(system).unwrap_or_default();
    match (is_zswap_on(system), areas.iter().any(|area| area.kind == SwapKind::Zram)) {
        (true, true) => Look::limited(
            format!("on, in front of every swap area, zram among them (compressed twice); {found}"),
            "echo N > /sys/module/zswap/parameters/enabled",
        ),
        (true, false) if areas.is_empty() => Look::limited(
            format!("on, with no swap behind it; {found}"),
            "add a disk swap, or use plimsoll host prepare",
        ),
        (true, false) => Look::present(format!("on, in front of every swap area; {found}")),
        (false, _) => Look::limited(
            format!("off; {found}"),
            "plimsoll host prepare --zswap, on a host that swaps to disk",
        ),
    }
}

fn pressure(system: &dyn System, _: &Own) -> Look {
    match text(system, "/proc/pressure/memory") {
        Some(lines) => {
            let averages = lines.lines().map(|line| line.split(" total=").next().unwrap_or_default());
            Look::present(averages.collect::<Vec<_>>().join("; "))
        }
        None => Look::absent("no /proc/pressure/memory", "boot with psi=1, a kernel built with CONFIG_PSI"),
    }
}

fn cgroups(system: &dyn System, _: &Own) -> Look {
    let mounts = text(system, "/proc/self/mounts").unwrap_or_default();
    let mut mounts = mounts.lines().filter_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        let [_, point, kind, options, ..] = *words else { return None };
        Some((point.to_owned(), kind.to_owned(), options.to_owned()))
    });
    let is_v1 =
        |kind: &str, options: &str| kind == "cgroup" && options.split(',').any(|name| name == "memory");
    let all: Vec<_> = mounts.by_ref().collect();
    let with_swap = |version: &str, file: &str| {
        if system.exists(Path::new(file)) {
            Look::present(format!("{version}, with control of swap"))
        } else {
            Look::limited(format!("{version}, without control of swap"), "boot with swapaccount=1")
        }
    };
    if let Some((point, ..)) = all.iter().find(|(_, kind, options)| is_v1(kind, options)) {
        return with_swap("version 1", &format!("{point}/memory.memsw.limit_in_bytes"));
    }
    let unified = all.iter().find(|(_, kind, _)| kind == "cgroup2").map(|(point, ..)| point);
    let controllers = unified.and_then(|point| text(system, &format!("{point}/cgroup.controllers")));
    match (unified, controllers) {
        (Some(point), Some(list)) if list.split(' ').any(|name| name == "memory") => {
            // The root has no limits: a child says whether there are any of swap.
            let children = system.list(Path::new(point)).unwrap_or_default();
            let child =
                children.iter().find(|child| system.exists(&Path::new(point).join(child).join("memory.max")));
            match child {
                Some(child) => with_swap("version 2", &format!("{point}/{child}/memory.swap.max")),
                None => Look::limited(
                    "version 2, and no cgroup has the memory controller",
                    format!("echo +memory > {point}/cgroup.subtree_control"),
                ),
            }
        }
        _ => Look::absent(
            "no memory controller is mounted",
            "boot without cgroup_disable=memory, and mount cgroup2",
        ),
    }
}

fn ksm(system: &dyn System, _: &Own) -> Look {
    const KSM: &str = "/sys/kernel/mm/ksm";
    let Some(run) = text(system, &format!("{KSM}/run")) else {
        return Look::absent("this kernel has none", "a kernel built with CONFIG_KSM");
    };
    let mut found = values(
        system,
        KSM,
        &["pages_shared", "pages_sharing", "use_zero_pages", "ksm_zero_pages", "smart_scan"],
    );
    if let Some(advisor) = text(system, &format!("{KSM}/advisor_mode")) {
        found = format!("{found}, advisor {}", chosen(&advisor));
    }
    match run.as_str() {
        "1" => Look::present(format!("running; {found}")),
        "0" => Look::limited(format!("stopped; {found}"), format!("echo 1 > {KSM}/run")),
        _ => Look::limited(format!("told to unmerge (run is {run}); {found}"), format!("echo 1 > {KSM}/run")),
    }
}

fn huge_pages(system: &dyn System, _: &Own) -> Look {
    const HUGE: &str = "/sys/kernel/mm/transparent_hugepage";
    let Some(anonymous) = text(system, &format!("{HUGE}/enabled")) else {
        return Look::absent("this kernel has none", "a kernel built with CONFIG_TRANSPARENT_HUGEPAGE");
    };
    let shared = text(system, &format!("{HUGE}/shmem_enabled")).unwrap_or_default();
    let found = format!("private memory {}, shared memory {}", chosen(&anonymous), chosen(&shared));
    match (chosen(&anonymous), chosen(&shared)) {
        ("never", _) => Look::limited(found, format!("echo madvise > {HUGE}/enabled")),
        (_, "never" | "deny") => Look::limited(found, format!("echo advise > {HUGE}/shmem_enabled")),
        _ => Look::present(found),
    }
}

fn idle_pages(system: &dyn System, _: &Own) -> Look {
    if system.exists("/sys/kernel/mm/page_idle/bitmap".as_ref()) {
        return Look::present("/sys/kernel/mm/page_idle/bitmap");
    }
    Look::absent("no /sys/kernel/mm/page_idle", "a kernel built with CONFIG_IDLE_PAGE_TRACKING")
}

fn damon(system: &dyn System, _: &Own) -> Look {
    const ADMIN: &str = "/sys/kernel/mm/damon/admin";
    if !system.exists(ADMIN.as_ref()) {
        return Look::absent("no /sys/kernel/mm/damon", "a kernel built with CONFIG_DAMON_SYSFS");
    }
    // The kernel names its operations only in a context, and making one would be a change.
    let operations = text(system, &format!("{ADMIN}/kdamonds/0/contexts/0/avail_operations"));
    match operations.map(|names| names.split_whitespace().collect::<Vec<_>>().join(", ")) {
        Some(names) if names.split(", ").any(|name| name == "vaddr") => {
            Look::present(format!("sysfs; operations {names}"))
        }
        Some(names) => Look::limited(
            format!("sysfs; operations {names}"),
            "a kernel built with CONFIG_DAMON_VADDR, to watch processes",
        ),
        None => {
            Look::limited("sysfs; operations unknown until somebody sets up a context", "set up a context")
        }
    }
}

fn settings(system: &dyn System, _: &Own) -> Look {
    Look::present(values(
        system,
        "/proc/sys/vm",
        &[
            "swappiness",
            "page-cluster",
            "min_free_kbytes",
            "watermark_scale_factor",
            "watermark_boost_factor",
        ],
    ))
}

fn missing_rights(own: &Own, rights: &[CapabilitySet]) -> Vec<String> {
    let missing = rights.iter().filter(|right| !own.rights.contains(**right));
    missing.flat_map(|right| right.iter_names()).map(|(name, _)| format!("CAP_{name}")).collect()
}

fn capabilities(_: &dyn System, own: &Own) -> Look {
    const NEEDED: [CapabilitySet; 3] =
        [CapabilitySet::SYS_PTRACE, CapabilitySet::SYS_NICE, CapabilitySet::SYS_ADMIN];
    let none = Own { rights: CapabilitySet::empty(), ..own.clone() };
    let (all, missing) = (missing_rights(&none, &NEEDED), missing_rights(own, &NEEDED));
    let has: Vec<String> = all.iter().filter(|name| !missing.contains(name)).cloned().collect();
    match (has.is_empty(), missing.is_empty()) {
        (_, true) => Look::present(has.join(", ")),
        (true, _) => Look::absent(format!("none of {}", all.join(", ")), "run plimsoll as root"),
        _ => {
            Look::limited(format!("{}; no {}", has.join(", "), missing.join(", no ")), "run plimsoll as root")
        }
    }
}

fn memory(system: &dyn System, _: &Own) -> Look {
    let fields = ["MemTotal", "MemAvailable", "SwapTotal", "SwapFree"];
    let sizes =
        fields.map(|field| super::memory(system, field).map(|size: ByteCount| format!("{field} {size}")));
    let found: Vec<String> = sizes.into_iter().flatten().collect();
    match found.is_empty() {
        true => Look::absent("/proc/meminfo cannot be read", "mount /proc"),
        false => Look::present(found.join(", ")),
    }
}
