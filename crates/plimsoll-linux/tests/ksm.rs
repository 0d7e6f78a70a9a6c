//! Sharing with the running kernel's KSM. The machines are mappings of this process.
//!
//! KSM is one for the whole host, so these tests take turns, and do not run where somebody else has mergeable memory.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use plimsoll_core::twins::Limits;
use plimsoll_linux::explain;
use plimsoll_linux::ksm::control::{self, ControlError, Ksm, Rate, Takeover};
use plimsoll_linux::ksm::domains::{self, DomainError};
use plimsoll_linux::ksm::pace::{Order, Policy, Reason};
use plimsoll_linux::ksm::{Guide, KsmError, Marker, Member, Merged, Options};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Merging};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::{HvaRange, ProcessId, procfs};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, DomainId, MachineId, PAGE_SIZE};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const SETTINGS: [&str; 7] = [
    "run",
    "pages_to_scan",
    "sleep_millisecs",
    "advisor_mode",
    "smart_scan",
    "max_page_sharing",
    "use_zero_pages",
];

fn setting(name: &str) -> String {
    std::fs::read_to_string(format!("/sys/kernel/mm/ksm/{name}")).unwrap()
}

fn settings() -> Vec<String> {
    SETTINGS.map(setting).to_vec()
}

fn set(name: &str, value: &str) {
    std::fs::write(format!("/sys/kernel/mm/ksm/{name}"), value).unwrap();
}

/// KSM for one test, or why it cannot be had.
fn ksm_for_a_test() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let why = match (domains::check(&[]), Ksm::take(Takeover::IfIdle)) {
        (Err(error), _) => explain(&error),
        (_, Err(error)) => explain(&error),
        (Ok(()), Ok(ksm)) => {
            ksm.restore().unwrap();
            return Some(one);
        }
    };
    let is_required =
        std::env::var("PLIMSOLL_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name == "ksm"));
    assert!(!is_required, "KSM is required and missing: {why}");
    println!("SKIPPED: {why}");
    None
}

/// Marks blocks of a mapping, and remembers which are marked.
struct Own {
    memory: Arc<AnonymousMapping>,
    marked: Arc<Mutex<Vec<u64>>>,
}

impl Marker for Own {
    fn mark(&mut self, range: HvaRange, merging: Merging) -> std::io::Result<()> {
        self.memory.advise_merging(range, merging).map_err(std::io::Error::other)?;
        let mut marked = self.marked.lock().unwrap();
        let first = (range.start().0 - self.memory.base().0) / BLOCK_SIZE as u64;
        for block in first..first + range.len().0 / BLOCK_SIZE as u64 {
            match merging {
                Merging::Offered => marked.push(block),
                Merging::Withdrawn => marked.retain(|other| *other != block),
            }
        }
        marked.sort_unstable();
        Ok(())
    }
}

const BLOCKS: u64 = 8;

struct TestMachine {
    id: MachineId,
    memory: Arc<AnonymousMapping>,
    marked: Arc<Mutex<Vec<u64>>>,
}

impl TestMachine {
    /// Blocks 0 and 3 hold what those of every other such machine hold, in another order; the rest is its own.
    fn new(id: u32) -> Self {
        let memory = AnonymousMapping::new(ByteCount(BLOCKS * BLOCK_SIZE as u64), HugePages::Never).unwrap();
        let machine = Self { id: MachineId(id), memory: Arc::new(memory), marked: Arc::default() };
        (0..BLOCKS * u64::from(BLOCK_PAGES)).for_each(|page| machine.fill(page, machine.content(page)));
        machine
    }

    fn content(&self, page: u64) -> u64 {
        let (block, in_block) = (page / u64::from(BLOCK_PAGES), page % u64::from(BLOCK_PAGES));
        let id = u64::from(self.id.0);
        match block {
            0 | 3 => {
                let shuffled = (in_block * (2 * id + 1) + id) % u64::from(BLOCK_PAGES);
                1 << 40 | block << 20 | shuffled
            }
            _ => (id + 2) << 40 | page,
        }
    }

    fn fill(&self, page: u64, content: u64) {
        let words =
            (0..PAGE_SIZE as u64 / 8).map(|word| (content << 10 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        self.memory.copy_into(ByteCount(page * PAGE_SIZE as u64), &bytes).unwrap();
    }

    fn member(&self, domain: Option<DomainId>) -> Member {
        let marker = Own { memory: Arc::clone(&self.memory), marked: Arc::clone(&self.marked) };
        Member {
            id: self.id,
            name: self.id.to_string(),
            process: ProcessId::own(),
            domain,
            ranges: vec![self.memory.range()],
            marker: Some(Box::new(marker)),
        }
    }

    fn marked(&self) -> Vec<u64> {
        self.marked.lock().unwrap().clone()
    }
}

fn options() -> Options {
    Options { limits: Limits::default(), policy: Policy::default(), takeover: Takeover::IfIdle, seed: 7 }
}

fn in_one_domain(machines: &[TestMachine]) -> Vec<Member> {
    machines.iter().map(|machine| machine.member(Some(DomainId(1)))).collect()
}

/// Looks until exactly the blocks with twins are marked.
fn until_marked(guide: &mut Guide, machines: &[TestMachine]) {
    let start = Instant::now();
    while machines.iter().any(|machine| machine.marked() != [0, 3]) {
        guide.round().unwrap();
        assert!(start.elapsed() < PATIENCE, "{:?}", guide.report());
    }
}

/// Lets KSM work until it rests.
fn until_at_rest(guide: &mut Guide) {
    let start = Instant::now();
    while guide.tick().unwrap() != Order::Stop {
        assert!(start.elapsed() < PATIENCE, "KSM goes on: {:?}", guide.reason());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn blocks_with_twins_are_marked_merged_and_left_and_nothing_else_is_touched() {
    let Some(_one) = ksm_for_a_test() else { return };
    let before = settings();
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let mut guide = Guide::start(in_one_domain(&machines), options()).unwrap();
    assert_eq!(settings()[0].trim(), "0", "nothing is marked, so KSM rests");
    until_marked(&mut guide, &machines);
    assert_eq!(settings()[0].trim(), "1");
    until_at_rest(&mut guide);
    assert_eq!((guide.reason(), settings()[0].trim()), (Reason::DoesNotPay, "0"));
    let report = guide.report().unwrap();
    println!("{report:?}: {:?} a page", report.cost());
    assert!((1000..=1024).contains(&report.merged.0), "{report:?}");
    assert!(report.profit_bytes > 1000 * 4096 / 2, "{report:?}");
    assert_eq!(report.seen.marked, 4);
    // What was marked pays, and stays; what was seen to be nobody's twin is not marked later.
    for _ in 0..40 {
        assert_eq!(guide.round().unwrap().unmarked, 0);
    }
    assert_eq!(machines[0].marked(), [0, 3]);
    // Bytes are what they were, and a write is the writer's own.
    machines[1].fill(0, 99);
    let mut page = vec![0; PAGE_SIZE];
    let untouched = TestMachine::new(0);
    for offset in (0..BLOCKS * BLOCK_SIZE as u64).step_by(PAGE_SIZE) {
        let mut expected = vec![0; PAGE_SIZE];
        untouched.memory.copy_from(ByteCount(offset), &mut expected).unwrap();
        machines[0].memory.copy_from(ByteCount(offset), &mut page).unwrap();
        assert!(page == expected, "a wrong byte in the page at {offset:#x}");
    }
    guide.end(Merged::Undo).unwrap();
    assert_eq!(settings(), before);
    assert_eq!(procfs::ksm_stat(ProcessId::own()).unwrap().merging.0, 0);
    assert!(machines.iter().all(|machine| machine.marked().is_empty()));
}

#[test]
fn blocks_whose_twins_went_away_are_unmarked() {
    let Some(_one) = ksm_for_a_test() else { return };
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let mut guide = Guide::start(in_one_domain(&machines), options()).unwrap();
    until_marked(&mut guide, &machines);
    until_at_rest(&mut guide);
    (0..u64::from(BLOCK_PAGES)).for_each(|page| machines[1].fill(page, 7 << 40 | page));
    let start = Instant::now();
    while machines[1].marked() != [3] {
        guide.round().unwrap();
        assert!(start.elapsed() < PATIENCE, "{:?}", machines[1].marked());
    }
    guide.end(Merged::Undo).unwrap();
}

#[test]
fn machines_come_and_go_and_one_of_another_domain_is_refused_without_harm() {
    let Some(_one) = ksm_for_a_test() else { return };
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let late = TestMachine::new(2);
    let mut guide = Guide::start(in_one_domain(&machines), options()).unwrap();
    until_marked(&mut guide, &machines);
    until_at_rest(&mut guide);
    let refused = guide.add(late.member(Some(DomainId(2)))).unwrap_err();
    assert!(explain(&refused).contains("domain2"), "{}", explain(&refused));
    assert!(guide.report().unwrap().merged.0 >= 1000);
    guide.add(late.member(Some(DomainId(1)))).unwrap();
    until_marked(&mut guide, std::slice::from_ref(&late));
    until_at_rest(&mut guide);
    assert!((2000..=2048).contains(&guide.report().unwrap().merged.0), "{:?}", guide.report());
    guide.remove(late.id);
    assert_eq!(late.marked(), []);
    let pagemap = Pagemap::open(ProcessId::own()).unwrap();
    let mut entries = Vec::new();
    pagemap.read(late.memory.range(), &mut entries).unwrap();
    assert!(
        entries.iter().all(|entry| entry.contains(Entry::EXCLUSIVE)),
        "a page is still somebody else's, too"
    );
    guide.end(Merged::Undo).unwrap();
}

#[test]
fn machines_that_marked_everything_by_themselves_are_paced() {
    let Some(_one) = ksm_for_a_test() else { return };
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let members = machines.iter().map(|machine| {
        machine.memory.advise_merging(machine.memory.range(), Merging::Offered).unwrap();
        Member { marker: None, ..machine.member(Some(DomainId(1))) }
    });
    let mut guide = Guide::start(members.collect(), options()).unwrap();
    guide.round().unwrap();
    until_at_rest(&mut guide);
    assert_eq!(guide.reason(), Reason::DoesNotPay);
    let report = guide.report().unwrap();
    assert!((1000..=1024).contains(&report.merged.0), "{report:?}");
    assert_eq!((report.seen.looks, report.seen.marked), (0, 0), "there is nothing to choose");
    // It is tried again, though not at once.
    guide.round().unwrap();
    assert_eq!(setting("run").trim(), "0");
    for _ in 0..10 {
        guide.round().unwrap();
    }
    assert_eq!(setting("run").trim(), "1");
    guide.end(Merged::Undo).unwrap();
    for machine in &machines {
        machine.memory.advise_merging(machine.memory.range(), Merging::Withdrawn).unwrap();
    }
}

#[test]
fn machines_of_different_domains_are_refused_by_name_and_nothing_is_changed() {
    let Some(_one) = ksm_for_a_test() else { return };
    let before = settings();
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    for domains in [[None, None], [Some(DomainId(1)), None], [Some(DomainId(1)), Some(DomainId(2))]] {
        let members = machines.iter().zip(domains).map(|(machine, domain)| machine.member(domain)).collect();
        let Err(error) = Guide::start(members, options()) else { panic!("{domains:?} was accepted") };
        let text = explain(&error);
        assert!(
            text.contains("\"vm0\"") && text.contains("\"vm1\"") && text.contains("one sharing domain"),
            "{text}"
        );
    }
    assert_eq!(settings(), before);
}

#[test]
fn a_strangers_mergeable_memory_ends_sharing_and_unmerges_everything() {
    let Some(_one) = ksm_for_a_test() else { return };
    let before = settings();
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let mut guide = Guide::start(in_one_domain(&machines), options()).unwrap();
    until_marked(&mut guide, &machines);
    until_at_rest(&mut guide);
    assert!(procfs::ksm_stat(ProcessId::own()).unwrap().merging.0 > 1000);
    // It has the whole of its memory mergeable and waits for the end of its input.
    let stranger = "import ctypes, sys\nassert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0\nprint('x', flush=True)\nsys.stdin.read()";
    let mut stranger = match std::process::Command::new("python3")
        .args(["-c", stranger])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
    {
        Ok(child) => child,
        Err(error) => return println!("SKIPPED: no python3: {error}"),
    };
    let mut said = [0];
    std::io::Read::read_exact(stranger.stdout.as_mut().unwrap(), &mut said).unwrap();
    let refused = guide.round();
    stranger.kill().unwrap();
    stranger.wait().unwrap();
    let Err(KsmError::Domains(DomainError::Conflict { second, .. })) = &refused else {
        panic!("{refused:?}")
    };
    assert_eq!(second.process.get(), stranger.id());
    assert_eq!(procfs::ksm_stat(ProcessId::own()).unwrap().merging.0, 0);
    guide.end(Merged::Undo).unwrap();
    assert_eq!(settings(), before);
}

#[test]
fn ksm_that_runs_already_is_left_alone_unless_it_may_be_taken_over_and_is_given_back_as_it_was() {
    let Some(_one) = ksm_for_a_test() else { return };
    let before = settings();
    set("pages_to_scan", "123");
    set("sleep_millisecs", "45");
    set("run", "1");
    let found = settings();
    let refused = Ksm::take(Takeover::IfIdle).unwrap_err();
    assert!(matches!(refused, ControlError::Driven(_)), "{refused}");
    assert_eq!(settings(), found);
    let mut ksm = Ksm::take(Takeover::FromWhoever).unwrap();
    ksm.run(Rate { pages: 7, sleep_ms: 1000 }).unwrap();
    assert!(matches!(Ksm::take(Takeover::FromWhoever), Err(ControlError::Guided)));
    drop(ksm);
    assert_eq!(settings(), found);
    set("advisor_mode", "scan-time");
    let refused = Ksm::take(Takeover::IfIdle).unwrap_err().to_string();
    assert!(refused.contains("scan-time advisor"), "{refused}");
    Ksm::take(Takeover::FromWhoever).unwrap().restore().unwrap();
    assert_eq!((settings()[0].trim(), settings()[3].trim()), ("1", "none [scan-time]"));
    set("run", "0");
    set("advisor_mode", "none");
    set("pages_to_scan", before[1].trim());
    set("sleep_millisecs", before[2].trim());
    assert_eq!(settings(), before);
}

#[test]
fn what_a_killed_program_has_set_is_restored_by_the_next() {
    let Some(_one) = ksm_for_a_test() else { return };
    let before = settings();
    let mut ksm = Ksm::take(Takeover::IfIdle).unwrap();
    ksm.run(Rate { pages: 7, sleep_ms: 1000 }).unwrap();
    let record = std::fs::read_to_string("/run/plimsoll/ksm").unwrap();
    assert!(!matches!(control::sweep_stale(), Ok(true)), "it is not stale while its maker lives");
    drop(ksm);
    // As a kill would have left it: the record without its lock, KSM running.
    std::fs::write("/run/plimsoll/ksm", record).unwrap();
    set("pages_to_scan", "7");
    set("run", "1");
    assert!(control::sweep_stale().unwrap());
    assert_eq!(settings(), before);
    assert!(!control::sweep_stale().unwrap());
}

#[test]
fn looking_for_twins_brings_nothing_back() {
    let Some(_one) = ksm_for_a_test() else { return };
    // Discarded pages are as absent as swapped ones, and need no swap device.
    let machines = [TestMachine::new(0), TestMachine::new(1)];
    let away = HvaRange::new(machines[0].memory.base(), ByteCount(4 * BLOCK_SIZE as u64)).unwrap();
    machines[0].memory.discard(away).unwrap();
    let mut guide = Guide::start(in_one_domain(&machines), options()).unwrap();
    for _ in 0..70 {
        assert_eq!(guide.round().unwrap().marked, 0);
    }
    let pagemap = Pagemap::open(ProcessId::own()).unwrap();
    assert_eq!(pagemap.populated_bytes(away).unwrap(), ByteCount(0));
    guide.end(Merged::Undo).unwrap();
}
