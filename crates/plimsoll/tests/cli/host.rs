//! `plimsoll host` as a user starts it: what it says, what it changes, and that it is all gone afterwards.
use super::run::{Ended, Run, alone, can};
use plimsoll_sys::ProcessId;
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process_memory::{Advice, advise};
use plimsoll_sys::swap::{SwapPriority, swapoff, swapon};
use plimsoll_types::{ByteCount, PAGE_SIZE};
use rustix::process::Signal;
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// One test at a time, in whatever processes, adds zram devices: the lock is that of the tests of `plimsoll_linux::zram`.
fn alone_with_swap() -> File {
    let user = rustix::process::geteuid().as_raw();
    let file = File::create(std::env::temp_dir().join(format!("plimsoll-zram-tests-{user}.lock"))).unwrap();
    file.lock().unwrap();
    file
}

/// A directory for a record; it must be gone when nothing is on record.
struct Desk(PathBuf);

impl Desk {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("plimsoll-host-{}-{name}", std::process::id())))
    }

    fn run(&self, verb: &str, words: &[&str]) -> Run {
        let first = ["host", verb, "--record", self.0.to_str().unwrap()];
        Run::new(&first.iter().chain(words).copied().collect::<Vec<_>>())
    }

    fn prepare(&self) -> Run {
        // Before all other swap, so that what a test pages out goes there.
        self.run("prepare", &["--zram", "64M", "--priority", "32767", "--yes"])
    }

    fn undo(&self) -> Ended {
        self.run("undo", &[]).output()
    }

    fn record(&self) -> Value {
        serde_json::from_slice(&fs::read(self.0.join("host.json")).unwrap()).unwrap()
    }

    /// Number and sequence number of the device on record.
    fn device(&self) -> (u64, u64) {
        let record = self.record();
        let made = &record["steps"][0]["made"];
        (made["number"].as_u64().unwrap(), made["disk_sequence"].as_u64().unwrap())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if self.0.exists() {
            // A test has failed half-way: its device must not outlive it.
            let _ = std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll"))
                .args(["host", "undo", "--force", "--record"])
                .arg(&self.0)
                .output();
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// Whether the device of that number and sequence number exists.
fn exists(device: (u64, u64)) -> bool {
    let sequence = fs::read_to_string(format!("/sys/block/zram{}/diskseq", device.0));
    sequence.is_ok_and(|text| text.trim() == device.1.to_string())
}

/// Size, use and priority of the area on that device.
fn area(number: u64) -> Option<[i64; 3]> {
    let swaps = fs::read_to_string("/proc/swaps").unwrap();
    let line = swaps.lines().find(|line| line.starts_with(&format!("/dev/zram{number} ")))?;
    let numbers: Vec<i64> = line.split_whitespace().skip(2).map(|word| word.parse().unwrap()).collect();
    numbers.try_into().ok()
}

#[test]
fn a_check_says_the_same_in_text_in_json_and_as_exit_status() {
    // Whether KSM runs is said as well, and guests of other tests share.
    let (_alone, _swap) = (alone(), alone_with_swap());
    let words = ["host", "check", "--json"];
    let ended = Run::new(&words).output();
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    let can_attach = json["can_attach"].as_bool().unwrap();
    ended.expect_code(i32::from(!can_attach));
    assert_eq!(json["version"], 1);
    assert_eq!(json["obstacle"].is_null(), can_attach);
    if !can_attach {
        assert!(!json["obstacle"]["because"].as_str().unwrap().is_empty());
        assert!(!json["obstacle"]["fix"].as_str().unwrap().is_empty());
    }
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 17);
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(findings[0]["found"], release.trim());
    for finding in findings {
        let state = finding["state"].as_str().unwrap();
        assert!(["present", "limited", "absent"].contains(&state), "{finding}");
        assert_eq!(finding["remedy"].is_null(), state == "present", "{finding}");
    }
    ended.expect_nothing_left();

    let text = Run::new(&words[..2]).output();
    for finding in findings {
        let name = finding["name"].as_str().unwrap();
        let line = text.stdout.lines().find(|line| line.starts_with(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in {}", text.stdout));
        assert!(line[17..].starts_with(finding["state"].as_str().unwrap()), "{line}");
    }
    text.expect_nothing_left();
}

/// Memory of this process with different content in each page.
struct Content(AnonymousMapping);

impl Content {
    const SIZE: ByteCount = ByteCount::mib(8);

    /// Each page's place, and what it contains.
    fn pages() -> impl Iterator<Item = (ByteCount, u64)> {
        (0..Self::SIZE.0).step_by(PAGE_SIZE).map(|place| (ByteCount(place), !place))
    }

    fn new() -> Self {
        let memory = AnonymousMapping::new(Self::SIZE, HugePages::Never).unwrap();
        Self::pages().for_each(|(place, content)| memory.write_u64(place, content).unwrap());
        Self(memory)
    }

    fn page_out(&self) {
        let own = Pidfd::open(ProcessId::own()).unwrap();
        assert_eq!(advise(&own, &[self.0.range()], Advice::PageOut).stop, None);
    }

    fn check(&self) {
        Self::pages().for_each(|(place, content)| assert_eq!(self.0.read_u64(place).unwrap(), content));
    }
}

#[test]
fn a_prepared_host_pages_out_to_its_device_and_is_as_before_once_that_is_undone() {
    let (_alone, _swap) = (alone(), alone_with_swap());
    if !can("zram") {
        return;
    }
    let desk = Desk::new("whole");
    let ended = desk.prepare().output();
    ended.expect_code(0);
    let device = desk.device();
    let node = format!("/dev/zram{}", device.0);
    assert!(ended.stdout.contains(&node) && ended.stdout.contains("host undo --record"), "{}", ended.stdout);
    let [size, _, priority] = area(device.0).unwrap();
    assert_eq!((size, priority), ((64 << 10) - 4, 32767));
    let chosen = fs::read_to_string(format!("/sys/block/zram{}/comp_algorithm", device.0)).unwrap();
    assert!(chosen.contains("[lz4]") || !chosen.contains("lz4"), "{chosen}");
    assert_eq!(desk.record()["stage"], "prepared");
    let content = Content::new();
    content.page_out();
    let [_, used, _] = area(device.0).unwrap();
    assert!(used << 10 > (Content::SIZE.0 / 2).cast_signed(), "only {used} KiB were paged out");
    content.check();
    // Out again: undoing has to read it back.
    content.page_out();

    let again = desk.prepare().output();
    again.expect_code(0);
    assert!(again.stdout.contains("prepared already"), "{}", again.stdout);
    let other = desk.run("prepare", &["--zram", "32M", "--yes"]).output();
    other.expect_code(2);
    assert!(other.stderr.contains("in another way"), "{}", other.stderr);
    let shown = desk.run("undo", &["--dry-run"]).output();
    shown.expect_code(0);
    assert!(exists(device) && area(device.0).is_some() && shown.stdout.contains(&node), "{}", shown.stdout);
    assert!(area(device.0).unwrap()[1] > 0, "there is something to read back");

    desk.undo().expect_code(0);
    assert!(!exists(device) && !desk.0.exists());
    content.check();
    let nothing = desk.undo();
    nothing.expect_code(0);
    assert!(nothing.stdout.contains("nothing to undo"), "{}", nothing.stdout);
}

/// A swap file in use, of 16 MiB.
struct SwapFile(PathBuf);

impl SwapFile {
    /// `None` where swap cannot be switched, or no file system here can hold it.
    fn new() -> Option<Self> {
        let path = std::env::temp_dir().join(format!("plimsoll-swap-file-{}", std::process::id()));
        fs::write(&path, vec![0; 16 << 20]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let file = Self(path);
        let formatted = std::process::Command::new("mkswap").arg(&file.0).output();
        let is_formatted = formatted.is_ok_and(|output| output.status.success());
        match swapon(&file.0, SwapPriority::Lowest) {
            Ok(()) if is_formatted => Some(file),
            done => {
                println!("SKIPPED: no swap file here (mkswap: {is_formatted}, swapon: {done:?})");
                None
            }
        }
    }
}

impl Drop for SwapFile {
    fn drop(&mut self) {
        let _ = swapoff(&self.0);
        let _ = fs::remove_file(&self.0);
    }
}

#[test]
fn zswap_is_turned_on_in_front_of_a_swap_file_and_is_off_again_once_that_is_undone() {
    let (_alone, _swap) = (alone(), alone_with_swap());
    let parameters = || {
        let read = |name| fs::read_to_string(format!("/sys/module/zswap/parameters/{name}")).ok();
        ["enabled", "compressor", "max_pool_percent"].map(read)
    };
    let before = parameters();
    if before[0].as_deref() != Some("N\n") {
        println!("SKIPPED: zswap of this kernel is {:?}, not off", before[0]);
        return;
    }
    let Some(_file) = SwapFile::new() else { return };
    let desk = Desk::new("zswap");
    let ended = desk.run("prepare", &["--zswap", "--limit", "1G", "--yes"]).output();
    ended.expect_code(0);
    let on = parameters();
    assert_eq!(on[0].as_deref(), Some("Y\n"));
    assert_ne!(on[2], before[2], "{}", ended.stdout);
    desk.undo().expect_code(0);
    assert_eq!(parameters(), before);
    assert!(!desk.0.exists());
}

#[test]
fn a_prepare_that_is_killed_is_undone_from_wherever_it_was() {
    let (_alone, _swap) = (alone(), alone_with_swap());
    if !can("zram") {
        return;
    }
    let mut cut_short = 0;
    for round in 0..12_u64 {
        let desk = Desk::new(&format!("killed-{round}"));
        let running = desk.prepare().start();
        // The instant is what is tried out here, not waited for: later rounds let it come further.
        std::thread::sleep(Duration::from_millis(round * 2));
        running.signal(Signal::KILL);
        running.wait();
        let device = desk.0.join("host.json").exists().then(|| desk.record()["steps"][0]["made"].clone());
        cut_short += i32::from(device.is_some() && desk.record()["stage"] == "preparing");
        desk.undo().expect_code(0);
        assert!(!desk.0.join("host.json").exists());
        if let Some(device) = device.filter(|device| device.is_object()) {
            let id = (device["number"].as_u64().unwrap(), device["disk_sequence"].as_u64().unwrap());
            assert!(!exists(id), "round {round}");
        }
    }
    println!("{cut_short} of 12 were cut short while they changed something");
}

#[test]
fn of_four_prepares_at_once_one_prepares() {
    let (_alone, _swap) = (alone(), alone_with_swap());
    if !can("zram") {
        return;
    }
    let desk = Desk::new("four");
    let running: Vec<_> = (0..4).map(|_| desk.prepare().start()).collect();
    let ended: Vec<Ended> = running.into_iter().map(super::run::Running::wait).collect();
    let said = |words: &str| ended.iter().filter(|ended| ended.stdout.contains(words)).count();
    assert_eq!(said("on record in"), 1, "exactly one has prepared");
    for ended in &ended {
        let is_refused = ["is running on", "has changed since", "cut short while preparing"];
        let is_told = ended.code() == Some(2) && is_refused.iter().any(|words| ended.stderr.contains(words));
        assert!(ended.code() == Some(0) || is_told, "{:?} {} {}", ended.code(), ended.stdout, ended.stderr);
    }
    let device = desk.device();
    assert!(exists(device));
    desk.undo().expect_code(0);
    assert!(!exists(device) && !desk.0.exists());
}

#[test]
fn without_consent_nothing_is_changed() {
    let _swap = alone_with_swap();
    let desk = Desk::new("consent");
    for (words, code, said) in [(&["--dry-run"][..], 0, "nothing was changed"), (&[], 2, "agree with --yes")]
    {
        let ended = desk.run("prepare", &[&["--zram", "64M"], words].concat()).output();
        if ended.stderr.contains("zram") {
            println!("SKIPPED: {}", ended.stderr.trim());
            return;
        }
        if ended.stderr.contains("CAP_SYS_ADMIN") {
            continue;
        }
        ended.expect_code(code);
        assert!(ended.stdout.contains("disksize") && ended.stdout.contains("64M"), "{}", ended.stdout);
        assert!((ended.stdout.clone() + &ended.stderr).contains(said), "{} {}", ended.stdout, ended.stderr);
        ended.expect_nothing_left();
        assert!(!desk.0.exists());
    }
}

#[test]
fn a_no_on_a_terminal_is_obeyed_and_a_yes_too() {
    let (_alone, _swap) = (alone(), alone_with_swap());
    if !can("zram") {
        return;
    }
    if !Path::new("/usr/bin/script").exists() {
        println!("SKIPPED: no `script` here to make a terminal with");
        return;
    }
    let desk = Desk::new("terminal");
    let answer = |answer: &str| {
        let program = env!("CARGO_BIN_EXE_plimsoll");
        let command = format!("{program} host prepare --zram 64M --record {}", desk.0.display());
        let shell = format!("echo {answer} | script -qec '{command}' /dev/null");
        std::process::Command::new("sh").args(["-c", &shell]).output().unwrap()
    };
    let no = answer("n");
    let text = String::from_utf8_lossy(&no.stdout);
    assert!(
        no.status.code() == Some(1) && text.contains("[y/N]") && text.contains("nothing was changed"),
        "{text}"
    );
    assert!(!desk.0.exists());
    let yes = answer("y");
    assert_eq!(yes.status.code(), Some(0), "{}", String::from_utf8_lossy(&yes.stdout));
    let device = desk.device();
    assert!(area(device.0).is_some());
    desk.undo().expect_code(0);
    assert!(!exists(device));
}

/// Words that cannot be obeyed on this kernel or on any, and what the one sentence about them must name.
const BAD: [(&[&str], &str); 6] = [
    (&["--zram", "0"], "cannot have 0"),
    (&["--zram", "4K"], "at least 1M"),
    (&["--zram", "900T"], "less than 16T"),
    (&["--zram", "15T"], "more than four times"),
    (&["--algorithm", "gzip"], "it offers"),
    (&["--limit", "1"], "a limit of 1"),
];

#[test]
fn what_cannot_be_set_up_is_refused_in_one_sentence_and_nothing_is_left() {
    let _swap = alone_with_swap();
    if !can("zram") {
        return;
    }
    let desk = Desk::new("bad");
    for (words, said) in BAD {
        let ended = desk.run("prepare", &[words, &["--yes"]].concat()).output();
        ended.expect_code(2);
        let sentence = ended.stderr.trim();
        assert_eq!(sentence.lines().count(), 1, "{sentence}");
        assert!(sentence.contains(said), "{words:?}: {sentence}");
        ended.expect_nothing_left();
        assert!(!desk.0.exists());
    }
    for words in [&["--zram", "banana"][..], &["--priority", "-1"], &["--zswap", "--write-back", "/dev/x"]] {
        let ended = desk.run("prepare", words).output();
        ended.expect_code(2);
        assert!(ended.stderr.contains(words[0]) || ended.stderr.contains(words[1]), "{}", ended.stderr);
        assert!(!desk.0.exists());
    }
    let unwritable =
        Run::new(&["host", "prepare", "--zram", "64M", "--yes", "--record", "/proc/plimsoll"]).output();
    unwritable.expect_code(2);
    assert!(unwritable.stderr.contains("nothing is changed without a record"), "{}", unwritable.stderr);
    unwritable.expect_nothing_left();
}

#[test]
fn a_user_without_the_right_is_told_which() {
    let _swap = alone_with_swap();
    if !can("root") || !can("zram") {
        return;
    }
    let program = std::env::temp_dir().join(format!("plimsoll-of-all-{}", std::process::id()));
    fs::copy(env!("CARGO_BIN_EXE_plimsoll"), &program).unwrap();
    let ended = Run::of(&program, &["host", "prepare", "--zram", "64M", "--yes"]).by(65534).output();
    fs::remove_file(&program).unwrap();
    ended.expect_code(2);
    assert!(ended.stderr.contains("needs CAP_SYS_ADMIN"), "{}", ended.stderr);
    ended.expect_nothing_left();
}

#[test]
fn a_damaged_record_is_named_and_kept() {
    let desk = Desk::new("damaged");
    fs::create_dir(&desk.0).unwrap();
    fs::write(desk.0.join("host.json"), "{\"version\": 1, \"boot\"").unwrap();
    let ended = desk.undo();
    ended.expect_code(2);
    assert!(ended.stderr.contains("is damaged"), "{}", ended.stderr);
    assert_eq!(ended.stderr.trim().lines().count(), 1);
    assert!(desk.0.join("host.json").exists());
    fs::remove_dir_all(&desk.0).unwrap();
}
