//! Real swap devices, swapped to by a real process, abandoned and swept; texts and records without any.

use super::disk::{choose, node, sysfs};
use super::*;
use crate::cgroup::Swappiness;
use crate::cgroup::tests::cgroup_or_skip;
use crate::disk::device::{FileDisk, OpenError};
use crate::procsum::test_child::{self, HELD, TestChild};
use plimsoll_sys::swap::SwapRank;
use plimsoll_types::PAGE_SIZE;
use std::time::{Duration, Instant};

const DISK_SIZE: ByteCount = ByteCount::mib(64);

/// Tests with devices run one after the other, in whatever processes: the kernel reuses numbers, and one test's sweep
/// would find what another has just abandoned. Whoever holds the file's lock goes on.
fn alone() -> File {
    let user = rustix::process::geteuid().as_raw();
    let file = File::create(std::env::temp_dir().join(format!("plimsoll-zram-tests-{user}.lock"))).unwrap();
    file.lock().unwrap();
    file
}

/// Before all other swap, so that what a test pushes out goes to the test's device.
fn first() -> SwapPriority {
    SwapPriority::Fixed(SwapRank::new(i16::MAX).unwrap())
}

fn create() -> Result<ZramSwap, ZramError> {
    ZramSwap::create(DISK_SIZE, &["no-such-algorithm", "lz4", "lzo-rle"], first())
}

fn swap_or_skip() -> Option<ZramSwap> {
    match create() {
        Err(error @ (ZramError::NoModule | ZramError::NotPermitted { .. })) => {
            println!("SKIPPED: no zram device can be made here: {error}");
            None
        }
        made => Some(made.unwrap()),
    }
}

fn is_swap(path: &Path) -> bool {
    host_swap().unwrap().iter().any(|area| area.path == path)
}

fn assert_gone(number: u32, identity: &Identity) {
    let is_it = |other: Option<Identity>| other.is_some_and(|other| other.is_same_device(identity));
    assert!(!is_it(Identity::current(Disk::new(&Linux, number)).unwrap()), "zram{number} still exists");
    assert!(!is_it(recorded(number)), "zram{number} is still on record");
    // Unless others have added a device of that number meanwhile, nothing of it is to be seen at all.
    if Identity::current(Disk::new(&Linux, number)).unwrap().is_none() {
        assert!(!is_swap(&node(number)) && !node(number).exists());
    }
}

fn recorded(number: u32) -> Option<Identity> {
    Identity::parse(&fs::read_to_string(record_path(number)).ok()?)
}

#[test]
fn a_device_that_is_swapped_to_is_nobodys_disk_tier_also_where_a_link_names_it() {
    let _alone = alone();
    let Some(swap) = swap_or_skip() else { return };
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("by-id");
    std::os::unix::fs::symlink(swap.path(), &link).unwrap();
    for path in [swap.path(), &link] {
        let opened = FileDisk::create(path);
        assert!(matches!(opened, Err(OpenError::InUse { .. })), "{opened:?}");
    }
}

#[test]
fn a_limited_process_swaps_to_the_device_keeps_its_bytes_and_nothing_stays() {
    let _alone = alone();
    let Some(cgroup) = cgroup_or_skip("plimsoll-test-swap") else { return };
    let Some(swap) = swap_or_skip() else { return };
    let (number, identity) = (swap.number(), swap.device.identity.clone());
    let area = host_swap().unwrap().into_iter().find(|area| area.path == swap.path()).unwrap();
    assert_eq!((area.kind, area.priority), (SwapKind::Zram, i32::from(i16::MAX)));
    assert_eq!(area.size, DISK_SIZE - ByteCount(PAGE_SIZE as u64), "all but the header");
    let before = swap.stat().unwrap();

    let mut child = TestChild::start("hold");
    cgroup.enter(child.id()).unwrap();
    let limit = ByteCount::mib(32);
    cgroup.set_limit(limit).unwrap();
    cgroup.set_swappiness(Swappiness::new(200).unwrap()).unwrap();
    child.ask("take", "taken");
    assert!(cgroup.peak().unwrap() <= limit);
    let full = swap.stat().unwrap();
    let out = ByteCount(HELD as u64) - limit;
    assert!(full.original >= out, "{full:?}: {out} cannot be in memory");
    // Half of each page is zeros, the other half does not compress.
    assert!(full.compressed.0 > full.original.0 / 2 && full.compressed < full.original, "{full:?}");
    assert!(full.memory_used >= full.compressed && swap.memory_used().unwrap() > before.memory_used);
    assert!(full.memory_peak >= full.memory_used);
    assert!(cgroup.stat().unwrap().swapped.is_none_or(|swapped| swapped >= out));
    // The child needs room for a second copy to compare with.
    cgroup.set_limit(ByteCount::mib(256)).unwrap();
    child.ask("check", "unchanged");
    assert_eq!(cgroup.oom_kills().unwrap(), 0);

    child.kill();
    let path = cgroup.path().to_owned();
    cgroup.remove().unwrap();
    swap.remove().unwrap();
    assert!(!path.exists());
    assert_gone(number, &identity);
}

#[test]
fn two_devices_of_one_process_do_not_meet_and_the_best_algorithm_on_offer_is_taken() {
    let _alone = alone();
    let (Some(first), Some(second)) = (swap_or_skip(), swap_or_skip()) else { return };
    let numbers = [first.number(), second.number()];
    let identities = [first.device.identity.clone(), second.device.identity.clone()];
    assert_ne!(numbers[0], numbers[1]);
    assert_ne!(identities[0], identities[1]);
    assert!(["lz4", "lzo-rle"].contains(&first.algorithm()));
    let chosen = read(&sysfs(numbers[0], "comp_algorithm")).unwrap();
    assert!(chosen.contains(&format!("[{}]", first.algorithm())), "{chosen}");
    assert!(!sweep_stale().unwrap().iter().any(|swept| numbers.contains(swept)), "their maker lives");
    drop(first);
    assert_gone(numbers[0], &identities[0]);
    assert!(is_swap(second.path()));
    second.remove().unwrap();
    assert_gone(numbers[1], &identities[1]);
}

/// The zram devices that exist, each with the number that tells it from a later one of the same name.
fn devices() -> Vec<(String, String)> {
    let disks = fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap());
    let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
    let zram = disks.map(name).filter(|name| name.starts_with("zram"));
    zram.map(|name| (fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap(), name)).collect()
}

#[test]
fn a_failure_half_way_leaves_no_device() {
    let _alone = alone();
    let Some(probe) = swap_or_skip() else { return };
    assert!(devices().iter().any(|(_, name)| probe.path().ends_with(name)));
    probe.remove().unwrap();
    let before = devices();
    let error = ZramSwap::create(DISK_SIZE, &["no-such-algorithm"], first()).unwrap_err();
    assert!(matches!(&error, ZramError::NoAlgorithm { offered, .. } if offered.contains('[')), "{error}");
    assert_eq!(devices(), before);
}

/// The part of the child in the next test.
pub(crate) fn abandon() {
    let swap = create().unwrap();
    test_child::answer("made");
    println!("{}", swap.number());
    test_child::await_order("never comes");
}

#[test]
fn what_a_killed_run_leaves_is_swept() {
    let _alone = alone();
    let Some(probe) = swap_or_skip() else { return };
    probe.remove().unwrap();
    let mut child = TestChild::start("abandon-swap");
    child.expect("made");
    let number: u32 = child.line().trim().parse().unwrap();
    let identity = recorded(number).unwrap();
    assert!(!sweep_stale().unwrap().contains(&number), "its maker lives");
    child.kill();
    assert!(is_swap(&node(number)), "death alone does not remove it");
    assert!(sweep_stale().unwrap().contains(&number));
    assert_gone(number, &identity);
}

#[test]
fn a_record_of_another_device_is_deleted_and_the_device_left_alone() {
    let _alone = alone();
    let Some(swap) = swap_or_skip() else { return };
    // A number no device has: the record of a device that is gone.
    let unused = 1_000_000 + std::process::id();
    let other = Identity { disk_sequence: u64::MAX, ..swap.device.identity.clone() };
    drop(write_record(unused, &other).unwrap());
    let mistaken = Device::recorded(swap.number(), other, File::open("/dev/null").unwrap());
    mistaken.undo(&RecordsLock::take().unwrap()).unwrap();
    assert!(is_swap(swap.path()), "a device of another sequence number is not touched");
    assert!(record_path(swap.number()).exists(), "nor its record");
    // A process that another test starts has a copy of the record's lock until it executes its program.
    let deadline = Instant::now() + Duration::from_secs(60);
    while record_path(unused).exists() {
        assert!(!sweep_stale().unwrap().contains(&unused));
        assert!(Instant::now() < deadline, "the record of no device stays");
    }
    swap.remove().unwrap();
}

#[test]
fn a_missing_node_is_made() {
    let _alone = alone();
    let Some(swap) = swap_or_skip() else { return };
    let path = std::env::temp_dir().join(format!("plimsoll-node-{}", std::process::id()));
    let made = make_node(&path, swap.device.disk.device_id().unwrap());
    let found = fs::metadata(&path);
    remove_file(&path).unwrap();
    made.unwrap();
    assert_eq!(found.unwrap().rdev(), fs::metadata(swap.path()).unwrap().rdev());
    swap.remove().unwrap();
}

#[test]
fn the_header_says_what_the_kernel_reads() {
    let header = swap_header(ByteCount(DISK_SIZE.0 - 1)).unwrap();
    assert_eq!(header.disk_size, DISK_SIZE, "rounded up to a page");
    let number = |at: usize| u32::from_ne_bytes(header.bytes[at..at + 4].try_into().unwrap());
    assert_eq!((number(1024), number(1028), number(1032)), (1, 16_383, 0));
    assert_eq!(&header.bytes[4086..], b"SWAPSPACE2");
    for bad in [0, 4096, (1 << 44) + 1, u64::MAX] {
        assert!(matches!(swap_header(ByteCount(bad)), Err(ZramError::BadSize(_))), "{bad}");
    }
}

#[test]
fn tables_of_swap_and_statistics_are_read() {
    let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
        /dev/zram3                              partition\t65532\t\t8\t\t100\n\
        /swap\\040file\\040(deleted)            file\t\t4\t\t0\t\t-2\n";
    let areas = parse_swaps(text).unwrap();
    assert_eq!((areas[0].kind, areas[0].used, areas[0].priority), (SwapKind::Zram, ByteCount(8192), 100));
    assert_eq!((areas[1].kind, &*areas[1].path), (SwapKind::File, Path::new("/swap file (deleted)")));
    for bad in ["x", "x partition 1 2", "x partition -1 2 3", "x partition 99999999999999999999 2 3"] {
        assert!(parse_swaps(&format!("Filename\n{bad}\n")).is_err(), "{bad}");
    }
    let stat = parse_mm_stat("  1 2 3 0 5 6 7 8 9 10\n").unwrap();
    assert_eq!((stat.original.0, stat.compressed.0, stat.memory_used.0), (1, 2, 3));
    assert_eq!((stat.memory_peak.0, stat.same_pages.0), (5, 6));
    assert!(parse_mm_stat("1 2 3").is_none() && parse_mm_stat("1 2 x 4 5 6").is_none());
}

#[test]
fn algorithms_are_matched_whole() {
    assert_eq!(choose(&["lz4", "lzo"], "[lzo-rle] lzo lz4hc"), Some("lzo"));
    assert_eq!(choose(&["lzo-rle"], "[lzo-rle] lzo"), Some("lzo-rle"));
    assert_eq!(choose(&["lz"], "[lzo-rle] lz4"), None);
}

#[test]
fn a_record_is_read_back_and_one_cut_short_is_none() {
    let identity = Identity { boot: "b-1".to_owned(), disk_sequence: 17, origin: NodeOrigin::Made };
    let text = identity.text();
    assert_eq!(Identity::parse(&text), Some(identity));
    let last_line = text.rfind("pid").unwrap();
    for length in 0..last_line {
        assert_eq!(Identity::parse(&text[..length]), None, "{length} bytes");
    }
}

#[test]
fn what_the_kernel_was_built_without_is_a_typed_refusal() {
    let _alone = alone();
    let Some(swap) = swap_or_skip() else { return };
    let disk = swap.device.disk;
    for (attribute, done) in
        [("idle", disk.mark_idle(IdleSince::Now)), ("recompress", disk.recompress(Recompress::Huge, None))]
    {
        match done {
            Err(ZramError::NotOffered { attribute: missing }) => {
                assert_eq!(missing, attribute);
                assert!(!disk.has(attribute));
            }
            // No second algorithm was chosen for this device.
            Err(error) => assert!(disk.has(attribute) && attribute == "recompress", "{error}"),
            Ok(()) => assert!(disk.has(attribute)),
        }
    }
    swap.remove().unwrap();
}
