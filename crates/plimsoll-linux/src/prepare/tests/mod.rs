//! Preparing and undoing over a kernel that refuses, lacks parts, or sees its caller die at any step.
mod fake;
mod looks;
mod repack;
mod troubles;

use super::*;
use crate::zram::{IdleSince, Recompress};
use fake::Fake;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// A place for a record that is gone when the test is over.
struct Desk(PathBuf);

impl Desk {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("plimsoll-prepare-{}-{count}", std::process::id())))
    }

    fn place(&self) -> Place {
        Place::at(&self.0)
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn zram_request() -> ZramRequest {
    ZramRequest {
        size: ByteCount::mib(1024),
        algorithm: Some("lz4".to_owned()),
        limit: Some(ByteCount::mib(256)),
        recompress: None,
        write_back: None,
        priority: 100,
    }
}

fn zram() -> Request {
    Request::Zram(zram_request())
}

fn zswap() -> Request {
    Request::Zswap(ZswapRequest { algorithm: Some("lz4".to_owned()), limit: Some(ByteCount::mib(1024)) })
}

fn planned(fake: &Fake, place: &Place, request: &Request) -> Plan {
    match plan(fake, place, request).unwrap() {
        Outlook::Changes(plan) => plan,
        Outlook::Prepared => panic!("prepared already"),
    }
}

fn prepare(fake: &Fake, place: &Place, request: &Request) -> Result<(), PrepareError> {
    let plan = planned(fake, place, request);
    unlocked(|| apply(fake, place, &plan, &mut |_| {})).map(drop)
}

fn undo_all(fake: &Fake, place: &Place) -> Result<Undone, PrepareError> {
    unlocked(|| undo(fake, place, Fit::Required, &mut |_| {}))
}

/// What comes of it once nobody has the lock: a process that another test starts has a copy of every descriptor, and so of a lock that
/// was just let go, until it executes its program.
fn unlocked<T>(mut attempt: impl FnMut() -> Result<T, PrepareError>) -> Result<T, PrepareError> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match attempt() {
            Err(PrepareError::Locked(_)) if Instant::now() < deadline => std::thread::yield_now(),
            done => return done,
        }
    }
}

#[test]
fn a_host_is_as_before_once_preparing_is_undone() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    prepare(&fake, &desk.place(), &zram()).unwrap();
    let area = crate::zram::swap_areas(&fake).unwrap().remove(0);
    assert_eq!((area.path.to_str(), area.priority), (Some("/dev/zram1"), 100));
    assert_eq!(fake.attribute(1, "comp_algorithm"), "lzo-rle lzo [lz4]");
    assert_eq!(fake.attribute(1, "mem_limit"), (256 << 20).to_string());
    assert_eq!(fake.attribute(0, "disksize"), "0", "a device that was there is not touched");
    let record = desk.place().load().unwrap().unwrap();
    assert_eq!((record.stage, record.steps.len()), (Stage::Prepared, 6));

    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All);
    assert_eq!(fake.host(), before);
    assert!(!desk.0.exists(), "neither record nor directory");
    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::Nothing);
    assert!(!desk.0.exists(), "looking makes no directory");
}

#[test]
fn a_plan_changes_nothing_and_shows_each_value() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    let plan = planned(&fake, &desk.place(), &zram());
    assert_eq!(fake.host(), before);
    assert!(!desk.0.exists());
    let rows: Vec<String> = plan
        .changes
        .iter()
        .map(|change| {
            let Row { what, old, new } = change.row();
            format!("{what}: {old} -> {new}")
        })
        .collect();
    assert_eq!(
        rows,
        [
            "zram device: none -> /dev/zramN, N given by the kernel",
            "comp_algorithm: the kernel's default -> lz4",
            "mem_limit: none -> 256M",
            "disksize: 0 -> 1G",
            "first page: zeros -> a swap header",
            "swap: not in use -> in use, priority 100",
        ]
    );
}

#[test]
fn a_second_prepare_says_so_and_another_one_is_refused() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    prepare(&fake, &place, &zram()).unwrap();
    let prepared = fake.host();
    assert_eq!(plan(&fake, &place, &zram()).unwrap(), Outlook::Prepared);
    let other = Request::Zram(ZramRequest { size: ByteCount::mib(2048), ..zram_request() });
    let error = plan(&fake, &place, &other).unwrap_err().to_string();
    assert!(error.contains("zram of 1G, priority 100, lz4, at most 256M"), "{error}");
    assert_eq!(fake.host(), prepared);

    fake.remove_area("/dev/zram1");
    let error = plan(&fake, &place, &zram()).unwrap_err().to_string();
    assert!(error.contains("swap has changed: it is not in use as swap"), "{error}");
    assert_eq!(undo_all(&fake, &place).unwrap(), Undone::All, "what is gone is gone");
}

#[test]
fn swap_that_is_there_is_left_alone_and_explained() {
    let (fake, desk) = (Fake::small(), Desk::new());
    fake.set_attribute(0, "disksize", "536870912");
    fake.add_area("/dev/zram0", 100);
    fake.add_area("/swapfile", -2);
    let before = fake.host();
    let notes = planned(&fake, &desk.place(), &zram()).notes.join("\n");
    assert!(notes.contains("in turn with it /dev/zram0 (priority 100)"), "{notes}");
    assert!(notes.contains("after it /swapfile (priority -2)"), "{notes}");
    prepare(&fake, &desk.place(), &zram()).unwrap();
    undo_all(&fake, &desk.place()).unwrap();
    assert_eq!(fake.host(), before);
}

#[test]
fn zswap_goes_in_front_of_a_disk_swap_only_and_gets_its_old_parameters_back() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    assert!(matches!(plan(&fake, &place, &zswap()), Err(PrepareError::NoDiskSwap)));
    fake.add_area("/dev/zram0", 5);
    assert!(matches!(plan(&fake, &place, &zswap()), Err(PrepareError::NoDiskSwap)));
    fake.add_area("/dev/sda2", -2);
    let before = fake.host();
    prepare(&fake, &place, &zswap()).unwrap();
    let parameter = |which: Parameter| fake.read(&which.path()).unwrap().trim().to_owned();
    assert_eq!(parameter(Parameter::Enabled), "Y");
    assert_eq!(parameter(Parameter::Compressor), "lz4");
    assert_eq!(parameter(Parameter::MaxPoolPercent), "12", "1G of 8G, rounded down");
    assert_eq!(plan(&fake, &place, &zswap()).unwrap(), Outlook::Prepared);
    assert_eq!(undo_all(&fake, &place).unwrap(), Undone::All);
    assert_eq!(fake.host(), before);

    fake.set_file("/sys/module/zswap/parameters/enabled", "Y\n");
    let error = plan(&fake, &place, &zswap()).unwrap_err();
    assert!(matches!(error, PrepareError::ZswapOn { .. }), "{error}");
}

#[test]
fn what_others_have_changed_since_is_left_and_named() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    fake.add_area("/dev/sda2", -2);
    prepare(&fake, &place, &zswap()).unwrap();
    fake.set_file("/sys/module/zswap/parameters/compressor", "zstd\n");
    let mut left = Vec::new();
    let mut heard = |progress: Progress<'_>| {
        if let Progress::Step(change, Verdict::Left(found)) = progress {
            left.push(format!("{}: {found}", change.row().what));
        }
    };
    let undone = unlocked(|| undo(&fake, &place, Fit::Required, &mut heard));
    assert_eq!(undone.unwrap(), Undone::SomeLeft);
    assert_eq!(left, ["zswap compressor: it is zstd, not lz4"]);
    assert_eq!(fake.read(&Parameter::Compressor.path()).unwrap(), "zstd\n");
    assert_eq!(fake.read(&Parameter::Enabled.path()).unwrap(), "N\n");
    assert!(place.load().unwrap().is_none(), "what is left is others'");
}

#[test]
fn a_device_that_others_use_is_left() {
    let page = |fake: &Fake| fake.overwrite_page(1);
    let off = |fake: &Fake| fake.remove_area("/dev/zram1");
    type Meddling<'a> = &'a dyn Fn(&Fake);
    let meddled: [(Meddling<'_>, &str); 3] = [
        (&|fake| fake.set_priority("/dev/zram1", 7), "is in use with priority 7, not 100"),
        (
            &|fake| {
                off(fake);
                page(fake);
            },
            "holds something else",
        ),
        (
            &|fake| {
                off(fake);
                fake.set_attribute(1, "disksize", "4096");
            },
            "has been set to 4K by somebody else",
        ),
    ];
    for (meddle, found) in meddled {
        let (fake, desk) = (Fake::small(), Desk::new());
        prepare(&fake, &desk.place(), &zram()).unwrap();
        meddle(&fake);
        let theirs = fake.host();
        let Undo::Steps(steps) = outlook(&fake, &desk.place()).unwrap() else { panic!("no steps") };
        assert!(
            steps.iter().any(|(_, verdict)| matches!(verdict, Verdict::Left(why) if why.contains(found)))
        );
        assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::SomeLeft, "{found}");
        assert_eq!(fake.host(), theirs, "{found}");
    }
}

#[test]
fn another_device_of_the_same_number_is_not_touched() {
    let (fake, desk) = (Fake::small(), Desk::new());
    prepare(&fake, &desk.place(), &zram()).unwrap();
    fake.remove_area("/dev/zram1");
    fake.remove_disk(1);
    assert_eq!(fake.add_disk(), 1);
    let theirs = fake.host();
    assert_eq!(undo_all(&fake, &desk.place()).unwrap(), Undone::All);
    assert_eq!(fake.host(), theirs);
}

#[test]
fn a_reboot_leaves_a_record_and_nothing_else_to_undo() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    prepare(&fake, &place, &zram()).unwrap();
    fake.reboot();
    let rebooted = fake.host();
    let plan = planned(&fake, &place, &zram());
    assert!(plan.notes[0].contains("earlier boot"), "{:?}", plan.notes);
    assert_eq!(outlook(&fake, &place).unwrap(), Undo::Rebooted);
    assert_eq!(undo_all(&fake, &place).unwrap(), Undone::Rebooted);
    assert_eq!(fake.host(), rebooted);
    assert!(!desk.0.exists());
}

#[test]
fn what_does_not_fit_into_memory_is_not_read_back_unless_forced() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let before = fake.host();
    prepare(&fake, &desk.place(), &zram()).unwrap();
    fake.fill_area("/dev/zram1", ByteCount::mib(4097));
    let full = fake.host();
    let error = undo_all(&fake, &desk.place()).unwrap_err().to_string();
    assert!(error.contains("holds 4G") && error.contains("4G of memory are available"), "{error}");
    assert!(error.contains("1M are missing"), "{error}");
    assert_eq!(fake.host(), full);
    assert_eq!(desk.place().load().unwrap().unwrap().stage, Stage::Prepared);
    unlocked(|| undo(&fake, &desk.place(), Fit::Forced, &mut |_| {})).unwrap();
    assert_eq!(fake.host(), before);
}

#[test]
fn a_kernel_with_recompression_and_write_back_gets_both() {
    let (fake, desk) = (Fake::large(), Desk::new());
    fake.set_file("/sys/class/block/sdb1/size", "1000\n");
    let before = fake.host();
    let request = Request::Zram(ZramRequest {
        recompress: Some("zstd".to_owned()),
        write_back: Some("/dev/sdb1".into()),
        ..zram_request()
    });
    let notes = planned(&fake, &desk.place(), &request).notes.join("\n");
    assert!(
        notes.contains("as long as `plimsoll manage`")
            && notes.contains("writeback file")
            && notes.contains("/dev/sdb1 now is lost"),
        "{notes}"
    );
    prepare(&fake, &desk.place(), &request).unwrap();
    assert_eq!(fake.attribute(1, "recomp_algorithm"), "algo=zstd priority=1");
    assert_eq!(fake.attribute(1, "backing_dev"), "/dev/sdb1");

    let disk = crate::zram::Disk::new(&fake, 1);
    disk.mark_idle(IdleSince::Now).unwrap();
    assert_eq!(fake.attribute(1, "idle"), "all");
    disk.mark_idle(IdleSince::Longer(Duration::from_secs(3600))).unwrap();
    assert_eq!(fake.attribute(1, "idle"), "3600");
    for (pages, text) in [
        (Recompress::Idle, "type=idle"),
        (Recompress::Huge, "type=huge"),
        (Recompress::HugeIdle, "type=huge_idle"),
    ] {
        disk.recompress(pages, None).unwrap();
        assert_eq!(fake.attribute(1, "recompress"), text);
    }
    undo_all(&fake, &desk.place()).unwrap();
    assert_eq!(fake.host(), before);
}

#[test]
fn what_the_kernel_lacks_or_makes_no_sense_is_refused_in_one_sentence() {
    let good = zram_request;
    let named = |name: &str| Some(name.to_owned());
    let mib = ByteCount::mib;
    let zram_cases = [
        (ZramRequest { size: ByteCount(0), ..good() }, "cannot have 0"),
        (ZramRequest { size: mib(33 << 10), ..good() }, "more than four times this host's memory (8G)"),
        (ZramRequest { limit: Some(ByteCount(0)), ..good() }, "a limit of 0 cannot be kept"),
        (ZramRequest { limit: Some(mib(8193)), ..good() }, "between 1M and the host's memory, 8G"),
        (
            ZramRequest { algorithm: named("gzip"), ..good() },
            "none of [\"gzip\"]: it offers \"[lzo-rle] lzo lz4\"",
        ),
        (ZramRequest { recompress: named("lz4"), ..good() }, "CONFIG_ZRAM_MULTI_COMP"),
        (ZramRequest { write_back: Some("/dev/sdb1".into()), ..good() }, "CONFIG_ZRAM_WRITEBACK"),
        (ZramRequest { priority: -1, ..good() }, "use 0 to 32767"),
    ];
    let large_cases = [
        (ZramRequest { recompress: named("gzip"), ..good() }, "none of [\"gzip\"]"),
        (ZramRequest { write_back: Some("/etc/passwd".into()), ..good() }, "no block device"),
        (ZramRequest { write_back: Some("/dev/sdb1".into()), ..good() }, "in use as swap"),
        (ZramRequest { write_back: Some("/dev/sdc1".into()), ..good() }, "is mounted"),
        (
            ZramRequest { write_back: Some("/dev/sdd1".into()), ..good() },
            "another block device is made of it",
        ),
    ];
    let zswap_cases = [
        (
            ZswapRequest { algorithm: named("gzip"), limit: None },
            "no compressor \"gzip\" loaded: it has lz4, lzo",
        ),
        (ZswapRequest { algorithm: None, limit: Some(ByteCount::mib(1)) }, "a limit of 1M cannot be kept"),
    ];
    let (small, large) = (Fake::small(), Fake::large());
    small.add_area("/swapfile", -2);
    large.add_area("/dev/sdb1", -2);
    for file in ["sdb1/size", "sdc1/size", "sdd1/holders/dm-0"] {
        large.set_file(&format!("/sys/class/block/{file}"), "");
    }
    large.set_file("/proc/self/mounts", "/dev/sdc1 /data ext4 rw 0 0\n");
    let refuse = |fake: &Fake, request: Request, sentence: &str| {
        let (desk, before) = (Desk::new(), fake.host());
        let error = plan(fake, &desk.place(), &request).unwrap_err().to_string();
        assert!(error.contains(sentence), "{error}");
        assert!(!error.contains('\n') && !desk.0.exists() && fake.host() == before);
    };
    zram_cases.into_iter().for_each(|(case, sentence)| refuse(&small, Request::Zram(case), sentence));
    large_cases.into_iter().for_each(|(case, sentence)| refuse(&large, Request::Zram(case), sentence));
    zswap_cases.into_iter().for_each(|(case, sentence)| refuse(&small, Request::Zswap(case), sentence));
    small.remove_file("/sys/class/zram-control/hot_add");
    small.remove_file("/sys/class/zram-control/hot_remove");
    refuse(&small, zram(), "modprobe zram");
    small.remove_file("/sys/module/zswap/parameters/enabled");
    refuse(&small, zswap(), "CONFIG_ZSWAP");
}

#[test]
fn records_that_cannot_be_trusted_are_not_acted_on() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    prepare(&fake, &place, &zram()).unwrap();
    let prepared = fake.host();
    let good = fs::read_to_string(place.path()).unwrap();
    let newer = good.replace("\"version\": 1", "\"version\": 2").replace("steps", "other");
    let stranger = good.replace("\"stage\"", "\"colour\": 1, \"stage\"");
    let cases = [
        (newer.as_str(), "newer plimsoll (format 2, this one knows 1)"),
        (&good[..good.len() / 2], "is damaged"),
        ("", "is damaged"),
        (stranger.as_str(), "is damaged"),
    ];
    for (text, sentence) in cases {
        fs::write(place.path(), text).unwrap();
        for error in [undo_all(&fake, &place).unwrap_err(), plan(&fake, &place, &zram()).unwrap_err()] {
            assert!(error.to_string().contains(sentence), "{error}");
        }
        assert_eq!(fake.host(), prepared);
        assert_eq!(fs::read_to_string(place.path()).unwrap(), text, "nor is it replaced");
    }
    fs::write(place.path(), &good).unwrap();
    fs::set_permissions(&desk.0, fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(undo_all(&fake, &place), Err(PrepareError::UnsafeDirectory(_))));
    assert_eq!(fake.host(), prepared);
    fs::set_permissions(&desk.0, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(undo_all(&fake, &place).unwrap(), Undone::All);
}

#[test]
fn of_two_runs_at_once_one_is_told_to_wait() {
    let (fake, desk) = (Fake::small(), Desk::new());
    let place = desk.place();
    let before = fake.host();
    let plan = planned(&fake, &place, &zram());
    let mut refused = None;
    apply(&fake, &place, &plan, &mut |_| {
        refused.get_or_insert_with(|| apply(&fake, &place, &plan, &mut |_| {}).unwrap_err());
    })
    .unwrap();
    assert!(matches!(refused, Some(PrepareError::Locked(_))), "{refused:?}");
    // And one who comes with a plan made before the other had finished is told to look again.
    let error = unlocked(|| apply(&fake, &place, &plan, &mut |_| {})).unwrap_err();
    assert!(matches!(error, PrepareError::PlanOutdated), "{error}");
    undo_all(&fake, &place).unwrap();
    assert_eq!(fake.host(), before);
}
