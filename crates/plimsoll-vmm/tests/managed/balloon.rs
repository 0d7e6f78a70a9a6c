//! Guests that give memory, under the pager: what they gave is nowhere kept, whoever manages them.
use crate::crash::{Random, seed};
use crate::evict::audit;
use crate::fleet::{Fleet, Guest, PATIENCE, PLENTY, machine, until};
use crate::probes::Crash;
use plimsoll_core::word::StateKind;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_vmm::control::{BalloonPiece, Command, FrameOrder, FrameVerb};
use std::sync::Arc;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const ALL: u64 = 64 * MIB;
/// Managers that are replaced at least, of which a third are to crash. Where their steps come seldom, as on a busy machine, there are more.
const MANAGERS: u64 = 10;
/// How long a manager works whose step does not come.
const LASTS: Duration = Duration::from_millis(700);

fn keeps_frames(name: &str) -> plimsoll_vmm::config::VmmConfig {
    machine(name, ALL / MIB, WorkloadSpec::new(WorkloadKind::Frames))
}

fn probe(guest: &Guest, task: Task, pages: u64, passes: u64) {
    let probe = ProbeCommand { pages, passes, ..ProbeCommand::new(task, Order::Ascending) };
    guest.command(&Command::Probe { vcpu: 0, probe });
}

/// Has it do something and waits until it is done.
fn ask(guest: &Guest, task: Task, pages: u64) {
    let before = guest.state().probed;
    probe(guest, task, pages, 1);
    until("an answer", || (guest.state().probed > before).then_some(()));
}

fn aim(guest: &Guest, target_bytes: u64, piece: BalloonPiece) {
    guest.command(&Command::Balloon { target_bytes, piece });
}

/// Sets a target and returns what the balloon then has.
fn balloon(guest: &Guest, target_bytes: u64, piece: BalloonPiece) -> u64 {
    let before = guest.state().ballooned.len();
    aim(guest, target_bytes, piece);
    until("the balloon to settle", || guest.state().ballooned.get(before).copied())
}

fn order(guest: &Guest, verb: FrameVerb) -> u64 {
    order_of(guest, verb, u64::MAX)
}

/// Has it done of so many bytes, and returns of how many it was.
fn order_of(guest: &Guest, order: FrameVerb, bytes: u64) -> u64 {
    let before = guest.state().ordered.len();
    guest.command(&Command::Frames(FrameOrder { order, bytes }));
    until("an order to be done", || guest.state().ordered.get(before).copied())
}

/// Pages that take memory somewhere, by the machine's page words as last published.
fn kept(fleet: &Fleet, guest: &Guest) -> u64 {
    let census = fleet.view(guest.id).stats.census;
    [StateKind::Resident, StateKind::Limbo, StateKind::Stored, StateKind::Capturing, StateKind::Pinned]
        .into_iter()
        .map(|kind| census.of(kind).0)
        .sum()
}

pub(crate) fn is_not_kept() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    for (name, give) in [
        ("by pages", (|guest| balloon(guest, ALL, BalloonPiece::Page)) as fn(&Guest) -> u64),
        ("by frames", |guest| balloon(guest, ALL, BalloonPiece::Frame)),
        ("taken", |guest| order(guest, FrameVerb::TakeForGood)),
    ] {
        let mut guest = fleet.add(&keeps_frames(name));
        let mine = 8 * MIB / 4096;
        ask(&guest, Task::Allocate, mine);
        ask(&guest, Task::Allocate, u64::MAX);
        let touched = kept(&fleet, &guest);
        ask(&guest, Task::Free, ALL / 4096 - mine - 6 * 512);
        // Everything is taken, what the guest has freed too, and much of it is stored by now.
        fleet.squeeze_until(guest.id, "free pages to be stored", || fleet.stored(guest.id) > 6000);
        let gave = give(&guest);
        assert!(gave >= 40 * MIB, "{name}: {gave} of {touched} pages");
        assert!(gave.is_multiple_of(4096));
        // Its own pages, the tables, and the image.
        let left = ALL / 4096 - gave / 4096;
        until("what it gave to be forgotten", || (kept(&fleet, &guest) <= left).then_some(()));
        fleet.squeeze_until(guest.id, "what is left to be stored", || fleet.stored(guest.id) > mine / 2);
        assert!(kept(&fleet, &guest) <= left, "{name}: {} of {left}", kept(&fleet, &guest));
        audit(&fleet);
        until("the report", || (guest.state().summary.ballooned_bytes == gave).then_some(()));
        balloon(&guest, 0, BalloonPiece::Page);
        order(&guest, FrameVerb::GiveBack);
        until("the report", || (guest.state().summary.ballooned_bytes == 0).then_some(()));
        ask(&guest, Task::Allocate, u64::MAX);
        guest.finish();
        fleet.until_gone(guest.id);
    }
    assert_eq!((fleet.incidents(), fleet.store_pages()), (vec![], 0));
}

/// What the guest gave back, by the machine's page words as last published: reported, hinted, ballooned.
fn given(fleet: &Fleet, guest: &Guest) -> [u64; 3] {
    let census = fleet.view(guest.id).stats.census;
    [StateKind::Reported, StateKind::Hinted, StateKind::Ballooned].map(|kind| census.of(kind).bytes().0)
}

/// True while a thread of the guest's VMM is in madvise, where a discard waits until a manager reads of it.
fn is_discarding(guest: &Guest) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{}/task", guest.process().get())).unwrap();
    threads
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("syscall")).ok())
        .any(|call| call.split_ascii_whitespace().next() == Some("28"))
}

pub(crate) fn is_counted_apart() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let spec = WorkloadSpec { discard_every_ops: 300, ..WorkloadSpec::new(WorkloadKind::Zipf) };
    let mut reporting = fleet.add(&machine("reports", 48, spec));
    let mut guest = fleet.add(&keeps_frames("gives by and by"));
    ask(&guest, Task::Allocate, u64::MAX);
    ask(&guest, Task::Free, u64::MAX);
    // Blocks that are left to the kernel are counted when they are watched again: all are, once something is taken of each.
    let left = || fleet.view(guest.id).stats.census.of(StateKind::Unwatched).0;
    fleet.squeeze_until(guest.id, "all blocks to be watched", || left() == 0);
    let ballooned = balloon(&guest, 8 * MIB, BalloonPiece::Frame);
    let hinted = order_of(&guest, FrameVerb::TakeSoftly, 12 * MIB);
    assert_eq!((ballooned, hinted), (8 * MIB, 12 * MIB));
    until("both to be counted apart", || (given(&fleet, &guest) == [0, hinted, ballooned]).then_some(()));
    fleet.squeeze_until(reporting.id, "what was reported to be counted", || given(&fleet, &reporting)[0] > 0);
    assert_eq!(given(&fleet, &reporting)[1..], [0, 0]);
    // Words say it, whoever reads them; and of what no manager asked about while it lived, the next one asks.
    fleet.replace_after(|| {
        aim(&guest, 16 * MIB, BalloonPiece::Frame);
        until("a discard that no manager reads of", || is_discarding(&guest).then_some(()));
    });
    // The guest may choose frames that it has none of the memory of: these are in its balloon then.
    until("all of it to be counted", || {
        let [reported, still_hinted, now_ballooned] = given(&fleet, &guest);
        let moved = still_hinted <= hinted && still_hinted + ballooned >= hinted;
        (reported == 0 && now_ballooned == 2 * ballooned && moved).then_some(())
    });
    until("the report", || (guest.state().summary.ballooned_bytes == 2 * ballooned).then_some(()));
    // What it uses again is not among what it gave.
    balloon(&guest, 0, BalloonPiece::Page);
    ask(&guest, Task::Allocate, u64::MAX);
    until("all of it to be used", || (given(&fleet, &guest) == [0; 3]).then_some(()));
    audit(&fleet);
    for ended in [&mut guest, &mut reporting] {
        ended.finish();
        fleet.until_gone(ended.id);
    }
    assert_eq!((fleet.incidents(), fleet.store_pages()), (vec![], 0));
}

pub(crate) fn outlives_managers() {
    let mut random = Random(seed());
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&keeps_frames("gives"));
    ask(&guest, Task::Allocate, 4096);
    probe(&guest, Task::Churn, 8192, 0);
    let (mut crashes, mut managers, begun) = (0, 0, Instant::now());
    while managers < MANAGERS || crashes < MANAGERS / 3 {
        assert!(begun.elapsed() < PATIENCE, "{crashes} of {managers} managers crashed");
        let (round, (step, nth)) = (managers, random.crash());
        println!("manager {round}: to crash at the {nth}. {step:?}");
        managers += 1;
        let crash = Arc::new(Crash::new(step, nth, vec![guest.id]));
        fleet.replace(Arc::clone(&crash) as _);
        let start = Instant::now();
        let piece = if round % 2 == 0 { BalloonPiece::Page } else { BalloonPiece::Frame };
        aim(&guest, if round % 3 == 2 { 0 } else { 24 * MIB }, piece);
        let verb = if round % 2 == 0 { FrameVerb::TakeSoftly } else { FrameVerb::TakeForGood };
        guest.command(&Command::Frames(FrameOrder { order: verb, bytes: 8 * MIB }));
        guest.command(&Command::Frames(FrameOrder { order: FrameVerb::GiveBack, bytes: u64::MAX }));
        while !crash.happened() && start.elapsed() < LASTS {
            fleet.squeeze(guest.id);
            std::thread::sleep(Duration::from_millis(50));
        }
        crashes += u64::from(crash.happened());
        assert_eq!(fleet.view(guest.id).stats.anomalies.lost, 0);
        assert_eq!(fleet.incidents(), []);
    }
    fleet.replace(Arc::new(NoProbe));
    let orders = usize::try_from(2 * managers).unwrap();
    until("every order to be done", || (guest.state().ordered.len() == orders).then_some(()));
    // The last manager's target may be reached only now: another's answer than this one's comes first then.
    let before = guest.state().ballooned.len();
    aim(&guest, 0, BalloonPiece::Page);
    until("the balloon to be empty", || guest.state().ballooned[before..].contains(&0).then_some(()));
    guest.goes_on();
    guest.command(&Command::Window { number: 1 });
    guest.finish();
    fleet.until_gone(guest.id);
    assert_eq!((fleet.incidents(), fleet.store_pages()), (vec![], 0));
}
