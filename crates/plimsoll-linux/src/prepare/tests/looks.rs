//! What a check says about kernels that have more and less, and in which order it names what is in the way.
use super::fake::Fake;
use super::*;
use plimsoll_sys::uffd::Features;

fn capable() -> Own {
    Own {
        kvm: Ok("KVM (EPT, kvm_intel)".to_owned()),
        userfaultfd: Ok(Features::all()),
        refused: [None, None, None],
        page_map: PageMap::Scan,
        rights: CapabilitySet::all(),
    }
}

fn state(check: &Check, name: &str) -> (State, String) {
    let finding = check.findings.iter().find(|finding| finding.name == name).unwrap();
    (finding.state, finding.found.clone())
}

#[test]
fn each_finding_says_what_it_is_for_and_how_to_have_it() {
    let check = check(&Fake::small(), &capable());
    let names: Vec<&str> = check.findings.iter().map(|finding| finding.name).collect();
    assert_eq!(
        names,
        [
            "kernel",
            "kvm",
            "userfaultfd",
            "process_madvise",
            "page maps",
            "swap",
            "zram",
            "zswap",
            "pressure",
            "cgroups",
            "ksm",
            "huge pages",
            "idle pages",
            "damon",
            "vm settings",
            "capabilities",
            "memory"
        ]
    );
    for finding in &check.findings {
        assert!(!finding.found.contains('\n') && !finding.used_for.is_empty(), "{finding:?}");
        assert_eq!(finding.remedy.is_none(), finding.state == State::Present, "{finding:?}");
    }
    let json = serde_json::to_value(&check).unwrap();
    assert_eq!(
        json["findings"][6],
        serde_json::json!({
            "name": "zram",
            "state": "limited",
            "found": "algorithms [lzo-rle] lzo lz4, idle marks; no recompression, no write-back",
            "used_for": "swap in compressed memory",
            "remedy": "a kernel built with CONFIG_ZRAM_MULTI_COMP, CONFIG_ZRAM_WRITEBACK",
        })
    );
}

#[test]
fn more_is_found_where_there_is_more() {
    let fake = Fake::large();
    for (path, text) in [
        (
            "/proc/pressure/memory",
            "some avg10=0.10 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        ("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "1\n"),
        ("/sys/kernel/mm/ksm/run", "1\n"),
        ("/sys/kernel/mm/ksm/pages_sharing", "12\n"),
        ("/sys/kernel/mm/ksm/advisor_mode", "none [scan-time]\n"),
        ("/sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        (
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
            "always within_size [advise] never deny force\n",
        ),
        ("/sys/kernel/mm/page_idle/bitmap", ""),
        ("/sys/kernel/mm/damon/admin/kdamonds/0/contexts/0/avail_operations", "vaddr\nfvaddr\npaddr\n"),
        ("/proc/sys/vm/swappiness", "60\n"),
    ] {
        fake.set_file(path, text);
    }
    fake.add_area("/dev/sda2", -2);
    fake.set_file("/sys/module/zswap/parameters/enabled", "Y\n");
    let check = check(&fake, &capable());
    assert_eq!(check.obstacle, None);
    let present = |found: &str| (State::Present, found.to_owned());
    assert_eq!(state(&check, "kernel"), present("6.18.1-test"));
    assert_eq!(state(&check, "swap"), present("/dev/sda2 (disk) 512M, 0 used, priority -2"));
    assert_eq!(
        state(&check, "zram"),
        present("algorithms [lzo-rle] lzo lz4 zstd, idle marks, recompression, write-back")
    );
    assert_eq!(
        state(&check, "zswap"),
        present("on, in front of every swap area; compressor lzo, max_pool_percent 20")
    );
    assert_eq!(
        state(&check, "pressure"),
        present("some avg10=0.10 avg60=0.00 avg300=0.00; full avg10=0.00 avg60=0.00 avg300=0.00")
    );
    assert_eq!(state(&check, "cgroups"), present("version 1, with control of swap"));
    assert_eq!(state(&check, "ksm"), present("running; pages_sharing 12, advisor scan-time"));
    assert_eq!(state(&check, "huge pages"), present("private memory madvise, shared memory advise"));
    assert_eq!(state(&check, "idle pages").0, State::Present);
    assert_eq!(state(&check, "damon"), present("sysfs; operations vaddr, fvaddr, paddr"));
    assert_eq!(state(&check, "vm settings"), present("swappiness 60"));
    assert_eq!(state(&check, "memory").1, "MemTotal 8G, MemAvailable 4G, SwapTotal 0, SwapFree 0");
    fake.add_area("/dev/zram0", 5);
    assert!(state(&super::check(&fake, &capable()), "zswap").1.contains("compressed twice"));
}

#[test]
fn version_two_of_cgroups_shows_its_swap_control_in_a_child() {
    let fake = Fake::small();
    fake.set_file("/proc/self/mounts", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
    assert_eq!(state(&check(&fake, &capable()), "cgroups").0, State::Absent);
    fake.set_file("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n");
    assert!(state(&check(&fake, &capable()), "cgroups").1.contains("no cgroup has the memory controller"));
    fake.set_file("/sys/fs/cgroup/init.scope/memory.max", "max\n");
    assert!(state(&check(&fake, &capable()), "cgroups").1.contains("without control of swap"));
    fake.set_file("/sys/fs/cgroup/init.scope/memory.swap.max", "max\n");
    assert_eq!(state(&check(&fake, &capable()), "cgroups").0, State::Present);
}

#[test]
fn what_is_in_the_way_of_attaching_is_named_one_by_one() {
    let fake = Fake::small();
    let mut own = Own {
        refused: [Some("unknown".to_owned()), None, None],
        page_map: PageMap::Refused("no".to_owned()),
        rights: CapabilitySet::SYS_NICE,
        ..capable()
    };
    let why = |own: &Own| check(&fake, own).obstacle.map(|obstacle| (obstacle.because, obstacle.fix));
    assert!(why(&own).unwrap().0.contains("does not page out"));
    own.refused[0] = None;
    assert!(why(&own).unwrap().0.contains("page maps cannot be read"));
    own.page_map = PageMap::EntriesOnly;
    assert!(why(&own).unwrap().0.ends_with("it lacks CAP_SYS_PTRACE"));
    own.rights = CapabilitySet::all();
    let no_swap =
        ("this host has no swap to page machines out to".to_owned(), "plimsoll host prepare".to_owned());
    assert_eq!(why(&own).unwrap(), no_swap);
    fake.add_area("/dev/sda2", -2);
    fake.fill_area("/dev/sda2", ByteCount::mib(512));
    assert!(why(&own).unwrap().0.contains("full"));
    fake.fill_area("/dev/sda2", ByteCount::mib(511));
    assert_eq!(why(&own), None);
}

#[test]
fn probes_work_on_memory_of_this_process() {
    let own = Own::probe(Err("not asked".to_owned()));
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let bits = u64::from_str_radix(effective.trim(), 16).unwrap();
    assert_eq!(own.rights.bits(), bits);
    // Every kernel that this project's tests run on has these.
    assert_eq!(own.page_map, PageMap::Scan);
    assert_eq!(own.refused[1], None, "COLD");
}
