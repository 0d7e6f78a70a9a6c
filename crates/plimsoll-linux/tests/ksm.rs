//! Sharing with the running kernel's KSM. The machines are mappings of this process.
//!
//! KSM is one for the whole host, so these tests take turns, and do not run where somebody else has mergeable memory.
#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

use plimsoll_linux::explain;
use plimsoll_linux::ksm::control::{self, ControlError, Ksm, Rate, Takeover};
use plimsoll_linux::ksm::domains::{self, Domain, DomainError};
use plimsoll_linux::ksm::pace::{Order, Reason};
use plimsoll_linux::ksm::{Guide, KsmError, Marker, Member, Merged, Options};
use plimsoll_sys::mapping::{AnonymousMapping, HugePages, Merging};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::{HvaRange, ProcessId, procfs};
use plimsoll_types::{BLOCK_PAGES, BLOCK_SIZE, ByteCount, DomainId, MachineId, PAGE_SIZE};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
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

/// Pages of this process that are merged.
fn merging() -> u64 {
    procfs::ksm_stat(ProcessId::own()).unwrap().merging.0
}

fn set(name: &str, value: &str) {
    std::fs::write(format!("/sys/kernel/mm/ksm/{name}"), value).unwrap();
}

type Tested = Result<(), KsmError>;

/// Runs a test that has KSM for itself. It is skipped where KSM cannot be had, and where a stranger's memory is mergeable or
/// becomes so meanwhile.
fn with_ksm(test: impl FnOnce() -> Tested) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let tried = domains::check(&[]).map_err(KsmError::from).and_then(|()| {
        Ksm::take(Takeover::IfIdle)?.restore()?;
        test()
    });
    let Err(error) = tried else { return };
    let is_required =
        std::env::var("PLIMSOLL_REQUIRE").is_ok_and(|list| list.split(',').any(|name| name == "ksm"));
    let is_not_ours = match &error {
        KsmError::Domains(DomainError::Conflict { second, .. }) => second.domain == Domain::Unknown,
        KsmError::Control(error) => !matches!(error, ControlError::Malformed { .. }),
        _ => false,
    };
    assert!(!is_required && is_not_ours, "{}", explain(&error));
    println!("SKIPPED: {}", explain(&error));
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

fn in_one_domain(machines: &[TestMachine]) -> Vec<Member> {
    machines.iter().map(|machine| machine.member(Some(DomainId(1)))).collect()
}

/// Looks until exactly the blocks with twins are marked.
fn until_marked(guide: &mut Guide, machines: &[TestMachine]) -> Tested {
    let start = Instant::now();
    while machines.iter().any(|machine| machine.marked() != [0, 3]) {
        guide.round()?;
        assert!(start.elapsed() < PATIENCE, "{:?}", guide.report());
    }
    Ok(())
}

/// Lets KSM work until it rests.
fn until_at_rest(guide: &mut Guide) -> Tested {
    let start = Instant::now();
    while guide.tick()? != Order::Stop {
        assert!(start.elapsed() < PATIENCE, "KSM goes on: {:?}", guide.reason());
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[test]
fn blocks_with_twins_are_marked_merged_and_left_and_nothing_else_is_touched() {
    with_ksm(|| {
        let before = settings();
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let mut guide = Guide::start(in_one_domain(&machines), Options::default())?;
        assert_eq!(settings()[0].trim(), "0", "nothing is marked, so KSM rests");
        until_marked(&mut guide, &machines)?;
        assert_eq!(settings()[0].trim(), "1");
        until_at_rest(&mut guide)?;
        assert_eq!((guide.reason(), settings()[0].trim()), (Reason::DoesNotPay, "0"));
        let report = guide.report()?;
        println!("{report:?}: {:?} a page", report.cost());
        assert!((1000..=1024).contains(&report.merged.0), "{report:?}");
        assert!(report.profit_bytes > 1000 * 4096 / 2, "{report:?}");
        assert_eq!(report.seen.marked, 4);
        // What was marked pays, and stays; what was seen to be nobody's twin is not marked later.
        for _ in 0..40 {
            assert_eq!(guide.round()?.unmarked, 0);
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
        guide.end(Merged::Undo)?;
        assert_eq!(settings(), before);
        assert_eq!(merging(), 0);
        assert!(machines.iter().all(|machine| machine.marked().is_empty()));
        Ok(())
    });
}

#[test]
fn blocks_whose_twins_went_away_are_unmarked() {
    with_ksm(|| {
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let mut guide = Guide::start(in_one_domain(&machines), Options::default())?;
        until_marked(&mut guide, &machines)?;
        until_at_rest(&mut guide)?;
        (0..u64::from(BLOCK_PAGES)).for_each(|page| machines[1].fill(page, 7 << 40 | page));
        let start = Instant::now();
        while machines[1].marked() != [3] {
            guide.round()?;
            assert!(start.elapsed() < PATIENCE, "{:?}", machines[1].marked());
        }
        guide.end(Merged::Undo)?;
        Ok(())
    });
}

#[test]
fn machines_come_and_go_and_one_of_another_domain_is_refused_without_harm() {
    with_ksm(|| {
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let late = TestMachine::new(2);
        let mut guide = Guide::start(in_one_domain(&machines), Options::default())?;
        until_marked(&mut guide, &machines)?;
        until_at_rest(&mut guide)?;
        let refused = guide.add(late.member(Some(DomainId(2)))).unwrap_err();
        assert!(explain(&refused).contains("domain2"), "{}", explain(&refused));
        assert!(guide.report()?.merged.0 >= 1000);
        guide.add(late.member(Some(DomainId(1))))?;
        until_marked(&mut guide, std::slice::from_ref(&late))?;
        until_at_rest(&mut guide)?;
        assert!((2000..=2048).contains(&guide.report()?.merged.0), "{:?}", guide.report());
        guide.remove(late.id);
        assert!(late.marked().is_empty());
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        let mut entries = Vec::new();
        pagemap.read(late.memory.range(), &mut entries).unwrap();
        assert!(
            entries.iter().all(|entry| entry.contains(Entry::EXCLUSIVE)),
            "a page is still somebody else's, too"
        );
        guide.end(Merged::Undo)?;
        Ok(())
    });
}

#[test]
fn machines_that_marked_everything_by_themselves_are_paced() {
    with_ksm(|| {
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let members = machines.iter().map(|machine| {
            machine.memory.advise_merging(machine.memory.range(), Merging::Offered).unwrap();
            Member { marker: None, ..machine.member(Some(DomainId(1))) }
        });
        let mut guide = Guide::start(members.collect(), Options::default())?;
        guide.round()?;
        until_at_rest(&mut guide)?;
        assert_eq!(guide.reason(), Reason::DoesNotPay);
        let report = guide.report()?;
        assert!((1000..=1024).contains(&report.merged.0), "{report:?}");
        assert_eq!((report.seen.looks, report.seen.marked), (0, 0), "there is nothing to choose");
        // It is tried again, though not at once.
        guide.round()?;
        assert_eq!(setting("run").trim(), "0");
        for _ in 0..10 {
            guide.round()?;
        }
        assert_eq!(setting("run").trim(), "1");
        guide.end(Merged::Undo)?;
        for machine in &machines {
            machine.memory.advise_merging(machine.memory.range(), Merging::Withdrawn).unwrap();
        }
        Ok(())
    });
}

#[test]
fn machines_of_different_domains_are_refused_by_name_and_nothing_is_changed() {
    with_ksm(|| {
        let before = settings();
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        for domains in [[None, None], [Some(DomainId(1)), None], [Some(DomainId(1)), Some(DomainId(2))]] {
            let members =
                machines.iter().zip(domains).map(|(machine, domain)| machine.member(domain)).collect();
            let Err(error) = Guide::start(members, Options::default()) else {
                panic!("{domains:?} was accepted")
            };
            let text = explain(&error);
            assert!(
                text.contains("\"vm0\"") && text.contains("\"vm1\"") && text.contains("one sharing domain"),
                "{text}"
            );
        }
        assert_eq!(settings(), before);
        Ok(())
    });
}

/// Set in the environment of this program when it is to be the stranger.
const STRANGER: &str = "PLIMSOLL_TEST_STRANGER";
const IS_READY: &str = "the stranger's memory is mergeable";

/// Has mergeable memory until its input ends.
fn be_the_stranger() {
    let memory = AnonymousMapping::new(ByteCount(BLOCK_SIZE as u64), HugePages::Never).unwrap();
    memory.advise_merging(memory.range(), Merging::Offered).unwrap();
    println!("{IS_READY}");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
}

/// A process that ends at the latest when this is dropped.
struct Other(Child);

impl Other {
    fn id(&self) -> ProcessId {
        ProcessId::new(self.0.id()).unwrap()
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// This program again, once its memory is mergeable.
fn start_the_stranger(test: &str) -> Other {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(STRANGER, "");
    let mut child = Other(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let said = BufReader::new(child.0.stdout.take().unwrap()).lines();
    assert!(said.map_while(Result::ok).any(|line| line.contains(IS_READY)), "the stranger ended");
    child
}

#[test]
fn a_strangers_mergeable_memory_suspends_sharing_and_unmerges_everything() {
    if std::env::var_os(STRANGER).is_some() {
        return be_the_stranger();
    }
    with_ksm(|| {
        let before = settings();
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let mut guide = Guide::start(in_one_domain(&machines), Options::default())?;
        until_marked(&mut guide, &machines)?;
        until_at_rest(&mut guide)?;
        assert!(merging() > 1000);
        let stranger =
            start_the_stranger("a_strangers_mergeable_memory_suspends_sharing_and_unmerges_everything");
        let (refused, tick) = (guide.round(), guide.tick());
        let process = stranger.id();
        drop(stranger);
        let Err(KsmError::Domains(DomainError::Conflict { second, .. })) = &refused else {
            panic!("{refused:?}")
        };
        assert_eq!(second.process, process);
        assert!(matches!(tick, Ok(Order::Stop)), "{tick:?}");
        assert_eq!((merging(), setting("run").trim()), (0, "0"));
        // It goes on once the stranger is gone.
        guide.round()?;
        until_at_rest(&mut guide)?;
        assert!(merging() > 1000);
        guide.end(Merged::Undo)?;
        assert_eq!(settings(), before);
        Ok(())
    });
}

#[test]
fn a_machine_that_ends_is_forgotten() {
    with_ksm(|| {
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let other = Other(Command::new("sleep").arg("60").spawn().unwrap());
        let mut members = in_one_domain(&machines);
        members.push(Member {
            id: MachineId(9),
            process: other.id(),
            ..machines[0].member(Some(DomainId(1)))
        });
        let mut guide = Guide::start(members, Options::default())?;
        assert_eq!(guide.round()?.left, []);
        drop(other);
        assert_eq!(guide.round()?.left, [MachineId(9)]);
        until_marked(&mut guide, &machines)?;
        guide.end(Merged::Undo)?;
        Ok(())
    });
}

#[test]
fn ksm_that_runs_already_is_left_alone_unless_it_may_be_taken_over_and_is_given_back_as_it_was() {
    with_ksm(|| {
        let before = settings();
        set("pages_to_scan", "123");
        set("sleep_millisecs", "45");
        set("run", "1");
        let found = settings();
        let refused = Ksm::take(Takeover::IfIdle).unwrap_err();
        assert!(matches!(refused, ControlError::Driven(_)), "{refused}");
        assert_eq!(settings(), found);
        let mut ksm = Ksm::take(Takeover::FromWhoever)?;
        ksm.run(Rate { pages: 7, sleep_ms: 1000 }).unwrap();
        assert!(matches!(Ksm::take(Takeover::FromWhoever), Err(ControlError::Guided)));
        drop(ksm);
        assert_eq!(settings(), found);
        set("advisor_mode", "scan-time");
        let refused = Ksm::take(Takeover::IfIdle).unwrap_err().to_string();
        assert!(refused.contains("scan-time advisor"), "{refused}");
        Ksm::take(Takeover::FromWhoever)?.restore()?;
        assert_eq!((settings()[0].trim(), settings()[3].trim()), ("1", "none [scan-time]"));
        set("run", "0");
        set("advisor_mode", "none");
        set("pages_to_scan", before[1].trim());
        set("sleep_millisecs", before[2].trim());
        assert_eq!(settings(), before);
        Ok(())
    });
}

#[test]
fn what_a_killed_program_has_set_is_restored_by_the_next() {
    with_ksm(|| {
        let before = settings();
        let mut ksm = Ksm::take(Takeover::IfIdle)?;
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
        Ok(())
    });
}

#[test]
fn looking_for_twins_brings_nothing_back() {
    with_ksm(|| {
        // Discarded pages are as absent as swapped ones, and need no swap device.
        let machines = [TestMachine::new(0), TestMachine::new(1)];
        let away = HvaRange::new(machines[0].memory.base(), ByteCount(4 * BLOCK_SIZE as u64)).unwrap();
        machines[0].memory.discard(away).unwrap();
        let mut guide = Guide::start(in_one_domain(&machines), Options::default())?;
        for _ in 0..70 {
            assert_eq!(guide.round()?.marked, 0);
        }
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        assert_eq!(pagemap.populated_bytes(away).unwrap(), ByteCount(0));
        guide.end(Merged::Undo)?;
        Ok(())
    });
}
