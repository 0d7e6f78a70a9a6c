//! Machines that do nothing, and what a manager costs that has a thousand of them.
//!
//! Enters: nothing, or a role when this program starts itself as the VMM of some of the machines. Leaves: the standard harness's lines.
//! A machine here is memory that is really handed over, a few touched pages, and an agent that does what it is asked: no processors,
//! so that what is measured is the manager's. `PLIMSOLL_IDLE_MACHINES` says how many there are: 1000 for what docs/daemon.md reports.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails the test")]

#[path = "../../../plimsoll-vmm/tests/managed/goods.rs"]
mod goods;

use goods::Goods;
use plimsoll_host::api::Host;
use plimsoll_host::api::client::Client;
use plimsoll_linux::uffd::wire::{self, Item, Op, Outcome, Stop, Welcome};
use plimsoll_sys::HvaRange;
use plimsoll_sys::fdpass;
use plimsoll_sys::uffd::{Holes, Mode, MoveMode, RegisterMode, Userfaultfd, Wake};
use plimsoll_types::{ByteCount, Hva, PAGE_SIZE, PageCount};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The first argument of a process that is to be the VMM of some machines.
const ROLE: &str = "be-idle";
/// Machines of one such process.
const TOGETHER: usize = 10;
/// What each has touched of its memory.
const TOUCHED: u64 = 32;
/// How long the manager is watched: longer than from one decision about idle machines to the next.
const WATCHED: Duration = Duration::from_secs(8);
/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(180);
/// Machines, unless it is said otherwise.
const USUAL: usize = 200;
/// What the manager may take of a processor with so many machines, in percent: the goal for a thousand, and much for fewer, as the machine
/// does other things, too. It is waited for.
const PERCENT: f64 = 1.0;
/// What it may have of its own memory, by itself and for each machine: 60 MiB with a thousand of them. A development build's text is in it.
const OWN: ByteCount = ByteCount::mib(14);
const OWN_EACH: ByteCount = ByteCount((46 << 20) / 1000);
/// How long a page of a hundred machines may take.
const LIST_MAX: Duration = Duration::from_millis(20);
const NAME: &str = "idle_machines_cost_a_manager_no_more_than_is_said_and_leave_nothing_behind";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [role, first, count, socket] = &words[..]
        && role == ROLE
    {
        return vmm(first.parse().unwrap(), count.parse().unwrap(), Path::new(socket));
    }
    if words.iter().any(|word| word == "--list") {
        println!("{NAME}: test");
        return ExitCode::SUCCESS;
    }
    let is_chosen = words.iter().filter(|word| !word.starts_with('-')).all(|word| NAME.contains(&**word));
    let (chosen, start) = (usize::from(is_chosen), Instant::now());
    println!("\nrunning {chosen} tests");
    let is_good = !is_chosen || passes();
    let (verdict, failed) = if is_good { ("ok", 0) } else { ("FAILED", 1) };
    println!(
        "\ntest result: {verdict}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s",
        chosen - failed,
        1 - chosen,
        start.elapsed().as_secs_f64()
    );
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn passes() -> bool {
    if let Err(error) = Userfaultfd::open(Mode::KernelAndUser) {
        let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
        if required.split(',').any(|required| required == "userfaultfd") {
            println!("test {NAME} ... FAILED: userfaultfd is required and missing: {error}");
            return false;
        }
        println!("SKIPPED: {NAME}: no userfaultfd: {error}");
        println!("test {NAME} ... ok");
        return true;
    }
    let passed = catch_unwind(AssertUnwindSafe(idle)).is_ok();
    println!("test {NAME} ... {}", if passed { "ok" } else { "FAILED" });
    passed
}

impl Goods {
    /// Does what an agent is asked.
    fn oblige(&self, op: Op, item: &Item) -> Outcome {
        let bytes = |pages: u32| PageCount(u64::from(pages)).bytes();
        let range =
            |base: Hva, first: u32| HvaRange::new(Hva(base.0 + bytes(first).0), bytes(item.pages)).unwrap();
        let (guest, slot) =
            (range(self.memory.base(), item.page().0), range(self.slots.base(), item.slot().0));
        let mode = MoveMode { wake: Wake::Yes, holes: Holes::Refuse };
        let moved = |outcome: plimsoll_sys::uffd::Outcome| Outcome {
            done: u32::try_from(outcome.done.pages_floor().0).unwrap(),
            stop: (!outcome.is_complete()).then_some(Stop::Missing),
        };
        match op {
            Op::MoveOut => {
                return moved(self.airlock.move_pages(
                    slot.start(),
                    self.memory.unborrowed(guest).unwrap(),
                    mode,
                ));
            }
            Op::MoveIn => {
                return moved(self.ram.move_pages(guest.start(), self.slots.unborrowed(slot).unwrap(), mode));
            }
            Op::Zap => self.slots.discard(slot).unwrap(),
            Op::Watch => {
                let memory = self.memory.unborrowed(guest).unwrap();
                self.ram.register(memory, RegisterMode::MISSING).map(drop).unwrap();
            }
            Op::Unwatch => self.ram.unregister(guest).unwrap(),
            Op::Populate | Op::SetEpoch | Op::Gifts => {}
        }
        Outcome { done: item.pages, stop: None }
    }

    /// The machine's agent, until the manager or this process ends.
    fn serve(&self, socket: &OwnedFd) {
        let mut bytes = [0; wire::DATAGRAM_MAX];
        while let Ok(Some(received)) = fdpass::recv(socket, &mut bytes, 0) {
            let (ticket, items) = wire::decode_request(&bytes[..received.bytes]).unwrap();
            let outcomes: Vec<Outcome> = items.iter().map(|item| self.oblige(ticket.op, item)).collect();
            let mut reply = Vec::new();
            wire::encode_reply(&mut reply, ticket, &outcomes);
            if fdpass::send(socket, &reply, &[]).is_err() {
                return;
            }
        }
    }
}

/// The VMM of `count` machines, until its standard input closes.
fn vmm(first: usize, count: usize, socket: &Path) -> ExitCode {
    for number in first..first + count {
        let goods = Arc::new(Goods::new(&format!("idle{number}")));
        let socket = fdpass::seqpacket_connect(socket).unwrap();
        fdpass::send(&socket, &goods.hello.encode(), &[goods.ram.as_fd(), goods.airlock.as_fd()]).unwrap();
        let mut bytes = [0; wire::DATAGRAM_MAX];
        let received = fdpass::recv(&socket, &mut bytes, 0).unwrap().unwrap();
        let welcome = Welcome::decode(&bytes[..received.bytes]).unwrap();
        assert!(matches!(welcome, Welcome::Accepted { .. }), "{welcome:?}");
        let agent = Arc::clone(&goods);
        std::thread::spawn(move || agent.serve(&socket));
        for page in 0..TOUCHED {
            goods.memory.write_u64(ByteCount(page * PAGE_SIZE as u64), page + 1).unwrap();
        }
        // Unmapping would wait for the manager to read of it.
        std::mem::forget(goods);
    }
    println!("ready");
    let _ = std::io::stdin().read(&mut [0]);
    std::process::exit(0)
}

/// Ends what was started, and removes what it had.
struct Site {
    directory: PathBuf,
    daemon: Child,
    vmms: Vec<Child>,
}

impl Drop for Site {
    fn drop(&mut self) {
        for vmm in &mut self.vmms {
            let _ = vmm.kill();
            let _ = vmm.wait();
        }
        let keeper = rustix::process::Pid::from_child(&self.daemon);
        let _ = rustix::process::kill_process(keeper, rustix::process::Signal::TERM);
        let _ = self.daemon.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Site {
    fn start() -> Self {
        let directory = std::env::temp_dir().join(format!("plimsoll-idle-{}", std::process::id()));
        let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
        command.args(["daemon", "--budget", "4G", "--directory"]).arg(&directory);
        let daemon = command.stdin(Stdio::null()).spawn().unwrap();
        Self { directory, daemon, vmms: Vec::new() }
    }

    fn host(&self) -> Option<Host> {
        Client::of(&self.directory).get("/v1/host").ok()
    }

    /// So many machines, each handed over.
    fn admit(&mut self, machines: usize) {
        for first in (0..machines).step_by(TOGETHER) {
            let count = TOGETHER.min(machines - first);
            let mut command = Command::new(std::env::current_exe().unwrap());
            command
                .args([ROLE, &first.to_string(), &count.to_string()])
                .arg(self.directory.join("handover.sock"));
            let mut vmm = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut said = String::new();
            BufReader::new(vmm.stdout.take().unwrap()).read_line(&mut said).unwrap();
            self.vmms.push(vmm);
            assert_eq!(said, "ready\n", "machines {first} to {} were not all taken", first + count);
        }
    }
}

/// What a process's threads have taken of processors, in nanoseconds; numbers in their names apart.
fn spent(process: u32) -> BTreeMap<String, u64> {
    let mut spent = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{process}/task")).unwrap() {
        let task = task.unwrap().path();
        let read = |file| fs::read_to_string(task.join(file));
        // One that has just ended takes nothing more.
        let (Ok(name), Ok(text)) = (read("comm"), read("schedstat")) else { continue };
        let name = name.trim_end().trim_end_matches(|c: char| c.is_ascii_digit()).to_owned();
        *spent.entry(name).or_default() += text.split(' ').next().unwrap().parse::<u64>().unwrap();
    }
    spent
}

/// What they take of one, in percent.
fn watch(process: u32) -> BTreeMap<String, f64> {
    let (before, start) = (spent(process), Instant::now());
    std::thread::sleep(WATCHED);
    let (after, elapsed) = (spent(process), start.elapsed().as_nanos());
    let percent = |(name, spent): (String, u64)| {
        let more = spent.saturating_sub(before.get(&name).copied().unwrap_or(0));
        (name, more as f64 * 100.0 / elapsed as f64)
    };
    after.into_iter().map(percent).collect()
}

/// What is a process's own, in bytes: whatever nobody else has mapped.
fn own_memory(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
    let of = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    };
    of("Private_Clean:") + of("Private_Dirty:")
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn idle() {
    let machines = std::env::var("PLIMSOLL_IDLE_MACHINES").map_or(USUAL, |count| count.parse().unwrap());
    let mut site = Site::start();
    wait_until("the API is served", || site.host().is_some());
    let empty = site.host().unwrap();
    let began = Instant::now();
    let (descriptors, memory) = (open_files(empty.pid), own_memory(empty.pid));
    site.admit(machines);
    wait_until("all are decided about", || site.host().is_some_and(|host| host.machines == machines));
    println!("{machines} machines handed over and decided about in {:.1} s", began.elapsed().as_secs_f64());

    let manager = site.host().unwrap().pid;
    assert_eq!(manager, empty.pid, "the manager was replaced");
    let told = fs::read_to_string(format!("/proc/{manager}/environ")).unwrap();
    assert!(told.contains("tcache_count=0"), "its threads keep what they free: {told}");
    // Machines are new for a while, and what they use is looked at ever more rarely.
    let mut watched = watch(manager);
    wait_until("the manager is as idle as its machines", || {
        let (percent, own) = (watched.values().sum::<f64>(), own_memory(manager));
        let is_idle = percent <= PERCENT && own <= OWN.0 + OWN_EACH.0 * machines as u64;
        if !is_idle {
            println!("{percent:.2} % of one processor, {}", ByteCount(own));
            watched = watch(manager);
        }
        is_idle
    });
    let own = own_memory(manager);
    println!(
        "manager: {:.2} % of one processor over {} s, {} of its own memory ({} without machines), {} descriptors",
        watched.values().sum::<f64>(),
        WATCHED.as_secs(),
        ByteCount(own),
        ByteCount(memory),
        open_files(manager)
    );
    watched.iter().for_each(|(thread, percent)| println!("  {thread}: {percent:.3} %"));
    let client = Client::of(&site.directory);
    let measured = || {
        let mut times: Vec<Duration> = (0..100)
            .map(|_| {
                let start = Instant::now();
                let answer = client.exchange("GET", "/v1/machines", &[], Vec::new()).unwrap();
                assert_eq!(answer.status, 200);
                start.elapsed()
            })
            .collect();
        times.sort();
        println!("a page of 100 machines: median {:?}, p99 {:?}", times[50], times[98]);
        times[98]
    };
    // Two of a hundred that others than the manager kept waiting are enough: it is measured until they leave it alone.
    let mut p99 = measured();
    wait_until(&format!("a page is listed in {LIST_MAX:?}"), || {
        let is_quick = p99 < LIST_MAX;
        if !is_quick {
            p99 = measured();
        }
        is_quick
    });
    for vmm in &mut site.vmms {
        vmm.kill().unwrap();
        vmm.wait().unwrap();
    }
    wait_until("all are forgotten", || site.host().is_some_and(|host| host.machines == 0));
    wait_until("nothing of them is open", || open_files(manager) <= descriptors + 2);
    // But for the keeper's register, and what lies in a page with something that is still in use.
    let kept = OWN.0 + (machines as u64) * (16 << 10);
    wait_until("what they had is given back", || own_memory(manager) <= kept);
    println!(
        "after their end: {} of its own memory, {} descriptors",
        ByteCount(own_memory(manager)),
        open_files(manager)
    );
    let _ = std::io::stdout().flush();
}

fn open_files(process: u32) -> usize {
    fs::read_dir(format!("/proc/{process}/fd")).unwrap().count()
}
