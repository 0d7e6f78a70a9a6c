//! Memory cgroups of this machine with real processes in them; cgroup v2 by texts and a fake tree.

use super::*;
use crate::procsum::test_child::{self, HELD, TestChild};

const HELD_BYTES: ByteCount = ByteCount(HELD as u64);

/// A cgroup of a prefix no other test uses, or `None`, said aloud, where this machine allows none.
pub(crate) fn cgroup_or_skip(prefix: &str) -> Option<MemoryCgroup> {
    match MemoryCgroup::create(prefix, ProcessId::own()) {
        Err(error) if error.is_of_the_host() => {
            println!("SKIPPED: no memory cgroup can be made here: {error}");
            None
        }
        made => Some(made.unwrap()),
    }
}

#[test]
fn what_a_process_inside_allocates_is_counted_and_its_end_lets_the_cgroup_go() {
    let Some(cgroup) = cgroup_or_skip("plimsoll-test-count") else { return };
    let path = cgroup.path().to_owned();
    let mut child = TestChild::start("hold");
    cgroup.enter(child.id()).unwrap();
    let before = cgroup.used().unwrap();
    assert!(before < ByteCount::mib(8), "{before} in a cgroup just made");
    child.ask("take", "taken");
    let held = cgroup.used().unwrap();
    assert!(held >= HELD_BYTES && held < HELD_BYTES + ByteCount::mib(8), "{held} of {HELD_BYTES}");
    assert!(cgroup.peak().unwrap() >= held);
    assert!(cgroup.stat().unwrap().anonymous >= HELD_BYTES);
    assert_eq!(cgroup.oom_kills().unwrap(), 0);
    child.kill();
    let peak = cgroup.peak().unwrap();
    assert!(peak >= held, "the peak outlives the process");
    cgroup.reset_peak().unwrap();
    assert!(cgroup.peak().unwrap() < ByteCount::mib(8));
    cgroup.remove().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_cgroup_with_a_process_inside_is_not_removed_and_the_process_is_named() {
    let Some(cgroup) = cgroup_or_skip("plimsoll-test-busy") else { return };
    let path = cgroup.path().to_owned();
    let child = TestChild::start("hold");
    let id = child.id();
    cgroup.enter(id).unwrap();
    match cgroup.remove() {
        Err(CgroupError::NotEmpty { processes, .. }) => assert_eq!(processes, [id.get()]),
        other => panic!("{other:?}"),
    }
    // The owner, this process, lives: the cgroup is not stale. Its removal is up to this test.
    assert!(!sweep_stale("plimsoll-test-busy").unwrap().contains(&path));
    child.kill();
    fs::remove_dir(&path).unwrap();
}

#[test]
fn a_limit_without_swap_ends_in_a_counted_kill() {
    let Some(cgroup) = cgroup_or_skip("plimsoll-test-limit") else { return };
    // With swappiness 0 a v1 cgroup never swaps, whatever other tests add; v2 has no such knob.
    let never_swaps = cgroup.set_swappiness(Swappiness::new(0).unwrap());
    if never_swaps.is_err() && !crate::zram::host_swap().unwrap().is_empty() {
        println!("SKIPPED: the host has swap, so the limit would not kill");
        return;
    }
    let mut child = TestChild::start("hold");
    cgroup.enter(child.id()).unwrap();
    cgroup.set_limit(ByteCount::mib(16)).unwrap();
    child.send("take");
    assert!(!child.succeeds());
    assert_eq!(cgroup.oom_kills().unwrap(), 1);
    cgroup.remove().unwrap();
}

/// The part of the child in the next test.
pub(crate) fn join_and_leave() {
    let home = Home::find().unwrap().path;
    let cgroup = MemoryCgroup::create("plimsoll-test-join", ProcessId::own()).unwrap();
    let path = cgroup.path().to_owned();
    cgroup.join_self().unwrap();
    assert_eq!(Home::find().unwrap().path, path);
    let twice = MemoryCgroup::create_at(path.clone(), Home::find().unwrap());
    assert!(matches!(twice, Err(CgroupError::Exists(_))), "{twice:?}");
    let memory = std::hint::black_box(vec![1_u8; 16 << 20]);
    assert!(cgroup.used().unwrap() >= ByteCount(memory.len() as u64));
    cgroup.leave_self().unwrap();
    assert_eq!(Home::find().unwrap().path, home);
    cgroup.join_self().unwrap();
    drop(cgroup);
    assert_eq!(Home::find().unwrap().path, home, "dropping moves this process back");
    assert!(!path.exists(), "and removes the cgroup");
}

#[test]
fn a_process_goes_in_and_back_to_where_it_came_from() {
    if cgroup_or_skip("plimsoll-test-join").is_some() {
        assert!(TestChild::start("join").succeeds());
    }
}

/// The part of the child in the next test.
pub(crate) fn abandon() {
    let cgroup = MemoryCgroup::create("plimsoll-test-stale", ProcessId::own()).unwrap();
    cgroup.join_self().unwrap();
    test_child::answer("inside");
    test_child::await_order("never comes");
}

#[test]
fn what_a_killed_run_leaves_is_swept() {
    let Some(own) = cgroup_or_skip("plimsoll-test-stale") else { return };
    let mut child = TestChild::start("abandon-cgroup");
    child.expect("inside");
    let started = procfs::start_time(child.id()).unwrap().0;
    let path = own.path().with_file_name(format!("plimsoll-test-stale-{}-{started}", child.id().get()));
    assert!(path.exists());
    let inner = path.join("inner");
    std::fs::create_dir(&inner).unwrap();
    assert!(!sweep_stale("plimsoll-test-stale").unwrap().contains(&path), "its owner lives");
    assert!(inner.exists());
    child.kill();
    // The kernel may take a moment to see the cgroup empty.
    let swept = (0..REMOVAL_TRIES).any(|_| {
        let swept = sweep_stale("plimsoll-test-stale").unwrap().contains(&path);
        if !swept {
            std::thread::sleep(REMOVAL_PAUSE);
        }
        swept
    });
    assert!(swept && !path.exists());
    assert!(own.path().exists(), "the cgroup of a living process stays");
}

#[test]
fn names_that_are_no_names_are_refused() {
    for bad in ["", "..", "a/b", "x y", "../../x"] {
        assert!(matches!(MemoryCgroup::create(bad, ProcessId::own()), Err(CgroupError::BadName(_))), "{bad}");
    }
    let found = parse_name("plimsoll-demo", "plimsoll-demo-17-99");
    assert_eq!(found.map(|(id, time)| (id.get(), time.0)), Some((17, 99)));
    for other in ["plimsoll-demo-17", "plimsoll-demo-0-1", "plimsoll-demo-x-1", "plimsoll-demon-1-1"] {
        assert_eq!(parse_name("plimsoll-demo", other), None, "{other}");
    }
}

const V1_MOUNTS: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
    33 31 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
    35 31 0:32 /docker/abc /sys/fs/cgroup/mem\\040ory rw,relatime shared:1 - cgroup cgroup rw,memory\n\
    41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

#[test]
fn the_own_cgroup_is_found_through_mount_roots_and_escapes() {
    let home = Home::parse("4:memory:/docker/abc/x\n0::/\n", V1_MOUNTS).unwrap();
    assert_eq!((home.version, &*home.path), (Version::V1, Path::new("/sys/fs/cgroup/mem ory/x")));
    let home = Home::parse("0::/user.slice/a b\n", V1_MOUNTS).unwrap();
    assert_eq!(
        (home.version, &*home.path),
        (Version::V2, Path::new("/sys/fs/cgroup/unified/user.slice/a b"))
    );
    for outside in ["4:memory:/docker/other\n", "0::/../x\n"] {
        assert!(matches!(Home::parse(outside, V1_MOUNTS), Err(CgroupError::NotMounted { .. })), "{outside}");
    }
    assert!(matches!(Home::parse("3:cpu:/\n", V1_MOUNTS), Err(CgroupError::NoController)));
}

/// A directory tree that looks like cgroup v2 as far as choosing a place and reading counters go.
pub(crate) struct FakeV2(PathBuf);

impl FakeV2 {
    pub(crate) fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("plimsoll-{name}-{}", std::process::id()));
        let tree = Self(root);
        fs::create_dir_all(tree.0.join("a.slice/b.scope")).unwrap();
        for directory in ["", "a.slice", "a.slice/b.scope"] {
            tree.put(&format!("{directory}/cgroup.subtree_control"), "cpu\n");
        }
        tree.put("cgroup.controllers", "cpu memory\n");
        tree
    }

    pub(crate) fn put(&self, name: &str, text: &str) {
        fs::write(self.0.join(name.trim_start_matches('/')), text).unwrap();
    }

    pub(super) fn home(&self) -> Home {
        let mounts = format!("41 31 0:38 / {} rw - cgroup2 cgroup2 rw", self.0.display());
        Home::parse("0::/a.slice/b.scope\n", &mounts).unwrap()
    }
}

impl Drop for FakeV2 {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn on_v2_the_nearest_ancestor_that_hands_out_the_controller_is_the_parent() {
    let tree = FakeV2::new("v2-place");
    assert!(matches!(tree.home().parent_of_new(), Err(CgroupError::NotDelegated { .. })));
    tree.put("cgroup.subtree_control", "memory pids\n");
    assert_eq!(tree.home().parent_of_new().unwrap(), tree.0);
    tree.put("a.slice/cgroup.subtree_control", "memory\n");
    assert_eq!(tree.home().parent_of_new().unwrap(), tree.0.join("a.slice"));
    tree.put("a.slice/cgroup.subtree_control", "");
    tree.put("cgroup.subtree_control", "memory_other\n");
    tree.put("cgroup.controllers", "cpu\n");
    assert!(matches!(tree.home().parent_of_new(), Err(CgroupError::NoController)));
}

#[test]
fn v2_counters_are_read_by_their_own_names() {
    let tree = FakeV2::new("v2-read");
    tree.put("memory.current", "4096\n");
    tree.put("memory.peak", "8192\n");
    tree.put("memory.stat", "anon 1\nanon_thp 9\nfile 2\nkernel 3\nkernel_stack 9\n");
    tree.put("memory.events", "oom 7\noom_kill 5\n");
    let usage = open_to_read(&tree.0.join("memory.current")).unwrap();
    let peak = open_to_read(&tree.0.join("memory.peak")).unwrap();
    // Marked as removed: dropping it must not try to remove the directory of plain files.
    let (version, path, origin) = (Version::V2, tree.0.clone(), tree.home().path);
    let cgroup = MemoryCgroup { version, path, origin, usage, peak, is_removed: true };
    assert_eq!((cgroup.used().unwrap(), cgroup.peak().unwrap()), (ByteCount(4096), ByteCount(8192)));
    assert!(matches!(cgroup.reset_peak(), Err(CgroupError::Unsupported { version: "v2", .. })));
    assert_eq!(cgroup.oom_kills().unwrap(), 5);
    let stat = cgroup.stat().unwrap();
    assert_eq!((stat.anonymous, stat.file_cache, stat.kernel), (ByteCount(1), ByteCount(2), ByteCount(3)));
    assert_eq!(stat.swapped, None);
    tree.put("memory.swap.current", "max\n");
    assert!(matches!(cgroup.stat(), Err(CgroupError::Malformed { .. })));
}
