//! The shipped keeper with managers that misbehave: this program, started again in a role.
//!
//! Enters: the names of tests to run, or a role. Leaves: the standard harness's lines. Tests run one after the other, each on the main
//! thread of a process of its own: a keeper owns numbers of descriptors of its process and catches its signals for good, and its allocations
//! are counted by thread.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

mod sole;
mod store;

use plimsoll_host::control::host_pressure;
use plimsoll_host::keeper::client::Client;
use plimsoll_host::keeper::protocol::Request;
use plimsoll_host::keeper::serve::{End, Keeper};
use plimsoll_linux::uffd::estate::Keep;
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass;
use plimsoll_sys::launch::{Ending, HANDED, Program};
use plimsoll_sys::mapping::{Memfd, SharedMapping};
use plimsoll_sys::pidfd::{Liveness, Pidfd, Signal};
use plimsoll_sys::process::adopt_inherited;
use plimsoll_sys::psi::PressureTrigger;
use plimsoll_sys::slots::Slots;
use plimsoll_types::ByteCount;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The first argument of a manager, and of a process that runs one test.
const ROLE: &str = "role-manager";
const ONE: &str = "role-test";
/// Slots below this one are the daemon's; the board, on which managers count, is one of them.
const RESERVED: u32 = 8;
const BOARD: u32 = 3;
/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(180);
const TURN: Duration = Duration::from_millis(20);

type Test = (&'static str, fn());

const TESTS: [Test; 16] = [
    ("what_a_killed_manager_gave_is_there_for_the_next", a_killed_manager),
    ("more_descriptors_than_fit_in_a_message_come_back_each_in_its_slot", many_descriptors),
    ("a_keeper_allocates_nothing_once_it_runs", allocates_nothing),
    ("what_is_kept_is_stored_what_was_let_go_is_not_and_nothing_is_allocated_for_it", store::supervised),
    ("a_slot_filled_anew_for_which_the_supervisor_did_not_listen_comes_back_empty", store::comes_back_empty),
    ("a_manager_is_told_that_something_is_kept_when_the_supervisor_has_it_or_that_it_is_not", store::is_told),
    (
        "of_two_that_come_back_for_a_slot_the_last_one_is_in_it_and_the_other_is_dropped",
        store::two_of_one_slot,
    ),
    ("what_moves_to_another_slot_while_nobody_listens_is_stored", store::moves),
    ("a_manager_that_has_lost_its_keeper_is_ended_by_the_next_and_ends_none_itself", sole::one_of_two),
    ("requests_that_make_no_sense_are_refused_and_change_nothing", nonsense),
    ("managers_that_never_serve_are_started_ever_later_and_for_ever_while_machines_are_kept", never_serves),
    ("a_keeper_without_machines_gives_up_a_manager_that_cannot_be", cannot_be),
    ("a_manager_that_hangs_is_replaced", hangs),
    ("the_keeper_rests_while_the_kernel_takes_its_time_to_end_a_manager", ends_slowly),
    ("a_keeper_that_is_told_to_stop_ends_with_its_manager", told_to_stop),
    ("being_told_to_stop_outlives_a_manager_that_dies_of_it_until_one_goes_on", told_and_dies),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, conduct] = &arguments[..]
        && role == ROLE
    {
        return manager(conduct);
    }
    if let [role, name] = &arguments[..]
        && role == ONE
    {
        let (_, test) = TESTS.iter().find(|(known, _)| known == name).unwrap();
        test();
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let is_chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let tests: Vec<Test> = TESTS.into_iter().filter(|(name, _)| is_chosen(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", tests.len());
    let mut failed = 0;
    let own = std::env::current_exe().unwrap();
    for (name, _) in &tests {
        let passed = Command::new(&own).args([ONE, name]).status().unwrap().success();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    let (passed, others) = (tests.len() - failed, TESTS.len() - tests.len());
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {others} filtered out"
    );
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A memfd on which managers count and the test reads.
struct Board(SharedMapping);

impl Board {
    fn word(&self, at: usize) -> &AtomicU64 {
        &self.0.as_atomic_u64s()[at]
    }

    fn get(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::SeqCst)
    }

    fn set(&self, at: usize, value: u64) {
        self.word(at).store(value, Ordering::SeqCst);
    }

    /// Waits, in a manager, until the test lets it go so far.
    fn wait_for_go(&self, far: u64) {
        while self.get(GO) < far {
            std::thread::park_timeout(TURN);
        }
    }
}

/// What managers write where.
const STARTS: usize = 0;
const GOOD: usize = 1;
const PROCESS: usize = 2;
/// Here the test writes how far managers may go.
const GO: usize = 3;

// The roles.

fn manager(conduct: &str) -> ExitCode {
    let (keeper, mut kept) = Client::connect(adopt_inherited(HANDED).unwrap()).unwrap();
    let board = Board(SharedMapping::new(&Memfd::try_from(kept.remove(&BOARD).unwrap()).unwrap()).unwrap());
    let start = board.word(STARTS).fetch_add(1, Ordering::SeqCst);
    board.word(PROCESS).store(u64::from(std::process::id()), Ordering::SeqCst);
    match conduct {
        "gives" => gives(&keeper, kept, &board, start, 3),
        "gives-many" => gives(&keeper, kept, &board, start, 200),
        "nonsense" => talks_nonsense(&keeper, &board),
        "never-serves" => ExitCode::FAILURE,
        "never-serves-a-machine" => {
            if start == 0 {
                keeper.keep(RESERVED, labelled(RESERVED).as_fd()).unwrap();
            }
            ExitCode::FAILURE
        }
        "cannot-be" => ExitCode::from(2),
        "refills" => store::refills(&keeper, &board),
        "moves" => store::moves_one(&keeper, &board),
        "is-sole" => sole::is_sole(&keeper, kept, &board, start),
        "hangs" => {
            keeper.serving().unwrap();
            rests()
        }
        "ends-slowly" => {
            let error = Command::new(std::env::current_exe().unwrap())
                .args([ROLE, "ends-slowly-indeed"])
                .stdin(Stdio::from(OwnedFd::from(trigger())))
                .exec();
            panic!("{error}")
        }
        "ends-slowly-indeed" => {
            // Of this one and the first that it has open the kernel closes one before the socket and one after it.
            let _last = trigger();
            keeper.serving().unwrap();
            board.word(GOOD).store(1, Ordering::SeqCst);
            rests()
        }
        "waits" => {
            keeper.serving().unwrap();
            board.word(GOOD).store(1, Ordering::SeqCst);
            let signals = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            signal_hook::flag::register(signal_hook::consts::SIGTERM, std::sync::Arc::clone(&signals))
                .unwrap();
            board.word(GOOD).store(2, Ordering::SeqCst);
            while !signals.load(Ordering::SeqCst) {
                std::thread::park_timeout(TURN);
            }
            ExitCode::SUCCESS
        }
        "dies-when-told" => {
            let signals = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
            signal_hook::flag::register(signal_hook::consts::SIGTERM, std::sync::Arc::clone(&signals))
                .unwrap();
            let is_told = || {
                while !signals.swap(false, Ordering::SeqCst) {
                    std::thread::park_timeout(TURN);
                }
            };
            if start == 0 {
                keeper.keep(RESERVED, labelled(RESERVED).as_fd()).unwrap();
                keeper.serving().unwrap();
                board.word(GOOD).store(1, Ordering::SeqCst);
                is_told();
                Pidfd::open(ProcessId::own()).unwrap().send_signal(Signal::KILL).unwrap();
            }
            keeper.serving().unwrap();
            is_told();
            keeper.staying().unwrap();
            // Once is enough: what it says after that brings no signal.
            keeper.serving().unwrap();
            keeper.let_go(RESERVED).unwrap();
            board.word(GOOD).store(2, Ordering::SeqCst);
            is_told();
            ExitCode::SUCCESS
        }
        other => panic!("{other}"),
    }
}

/// A descriptor that can be told from others.
fn labelled(number: u32) -> Memfd {
    let memfd = Memfd::create("test-kept", ByteCount(4096)).unwrap();
    SharedMapping::new(&memfd).unwrap().as_atomic_u64s()[0].store(u64::from(number) + 1, Ordering::SeqCst);
    memfd
}

/// What the kernel closes only when no processor can be looking at it any more.
fn trigger() -> PressureTrigger {
    host_pressure().unwrap()
}

/// A manager that does nothing more.
fn rests() -> ! {
    loop {
        std::thread::park();
    }
}

fn label(kept: OwnedFd) -> u64 {
    SharedMapping::new(&Memfd::try_from(kept).unwrap()).unwrap().as_atomic_u64s()[0].load(Ordering::SeqCst)
}

/// The first gives descriptors away and is killed; every other one checks them, and is killed as long as the test wants.
fn gives(keeper: &Client, kept: BTreeMap<u32, OwnedFd>, board: &Board, start: u64, count: u32) -> ExitCode {
    if start == 0 {
        for slot in RESERVED..RESERVED + count {
            keeper.keep(slot, labelled(slot).as_fd()).unwrap();
        }
        keeper.let_go(RESERVED + 1).unwrap();
    } else {
        let expected: Vec<u32> = (RESERVED..RESERVED + count).filter(|slot| *slot != RESERVED + 1).collect();
        let kept: BTreeMap<u32, OwnedFd> = kept.into_iter().filter(|(slot, _)| *slot >= RESERVED).collect();
        assert_eq!(kept.keys().copied().collect::<Vec<_>>(), expected);
        assert!(kept.into_iter().all(|(slot, fd)| label(fd) == u64::from(slot) + 1));
        board.word(GOOD).fetch_add(1, Ordering::SeqCst);
    }
    keeper.serving().unwrap();
    Pidfd::open(ProcessId::own()).unwrap().send_signal(Signal::KILL).unwrap();
    ExitCode::FAILURE
}

fn talks_nonsense(keeper: &Client, board: &Board) -> ExitCode {
    keeper.keep(RESERVED, labelled(RESERVED).as_fd()).unwrap();
    let taken = keeper.keep(RESERVED, labelled(9).as_fd());
    let beyond = keeper.keep(u32::MAX, labelled(9).as_fd());
    let empty = keeper.let_go(RESERVED + 7);
    assert!(taken.is_err() && beyond.is_err() && empty.is_err());
    let socket = adopt_inherited(HANDED).unwrap();
    let board_fd = labelled(1);
    let both = [board_fd.as_fd(), board_fd.as_fd()];
    let messages: [(&[u8], &[_]); 6] = [
        (b"x", &[]),
        (&[0xff; 8], &[]),
        (&[0; 64], &[]),
        (&Request::Keep(20).encode(), &[]),
        (&Request::Keep(20).encode(), &both),
        (&Request::LetGo(RESERVED).encode(), &both[..1]),
    ];
    for (bytes, descriptors) in messages {
        fdpass::send(&socket, bytes, descriptors).unwrap();
        let mut answer = [0; 8];
        assert_eq!(fdpass::recv(&socket, &mut answer, 0).unwrap().unwrap().bytes, 8);
        assert_eq!(answer[0], 1, "{bytes:?} was not refused");
    }
    let (_, kept) = Client::connect(socket).unwrap();
    assert_eq!(kept.keys().copied().collect::<Vec<_>>(), [BOARD, RESERVED]);
    board.word(GOOD).store(1, Ordering::SeqCst);
    keeper.let_go(RESERVED).unwrap();
    ExitCode::from(2)
}

// The tests.

fn keeper(conduct: &str) -> (Keeper, Board) {
    keeper_that_waits(conduct, PATIENCE)
}

fn keeper_that_waits(conduct: &str, silence_max: Duration) -> (Keeper, Board) {
    let (slots, board) = slots();
    (keeper_of(slots, conduct, silence_max), board)
}

/// Slots with nothing but a board in them.
fn slots() -> (Slots, Board) {
    let memfd = Memfd::create("test-board", ByteCount(4096)).unwrap();
    let board = Board(SharedMapping::new(&memfd).unwrap());
    let mut slots = Slots::new(512).unwrap();
    slots.put(BOARD, memfd.into()).unwrap();
    (slots, board)
}

fn keeper_of(slots: Slots, conduct: &str, silence_max: Duration) -> Keeper {
    let own = std::env::current_exe().unwrap();
    let words = [OsStr::new("keeper"), OsStr::new(ROLE), OsStr::new(conduct)];
    let environment: Vec<OsString> = Vec::new();
    let program =
        Program::new(own.as_os_str(), words.into_iter(), environment.iter().map(OsString::as_os_str))
            .unwrap();
    Keeper::new(slots, RESERVED, program, silence_max).unwrap()
}

/// Has the keeper work until something is so.
fn until(keeper: &mut Keeper, mut condition: impl FnMut(&Keeper) -> bool) -> Option<End> {
    let since = Instant::now();
    while !condition(keeper) {
        assert!(since.elapsed() < PATIENCE, "it takes too long");
        if let Some(end) = keeper.turn(TURN).unwrap() {
            return Some(end);
        }
    }
    None
}

/// What a slot of the keeper holds.
fn held(keeper: &Keeper, slot: u32) -> Option<u64> {
    keeper.slots().get(slot).map(|held| label(held.try_clone_to_owned().unwrap()))
}

/// The keeper dies, and so does its manager.
fn die(keeper: Keeper) {
    let manager = keeper.manager().unwrap();
    manager.send_signal(Signal::KILL).unwrap();
    assert_eq!(manager.wait_exit(PATIENCE).unwrap(), Liveness::Exited);
    drop(keeper);
}

/// Ends a keeper's manager before the test ends.
fn end(mut keeper: Keeper) {
    if let Some(manager) = keeper.manager() {
        let _ = manager.send_signal(Signal::KILL);
        let first = manager.process();
        until(&mut keeper, |keeper| keeper.manager().is_none_or(|next| next.process() != first));
    }
}

fn a_killed_manager() {
    let (mut keeper, board) = keeper("gives");
    assert_eq!(until(&mut keeper, |_| board.get(GOOD) >= 5), None);
    assert!(board.get(STARTS) >= 6);
    assert_eq!(keeper.slots().taken().count(), 3, "the board, and two of the three");
    end(keeper);
}

fn many_descriptors() {
    let (mut keeper, board) = keeper("gives-many");
    assert_eq!(until(&mut keeper, |_| board.get(GOOD) >= 2), None);
    end(keeper);
}

fn allocates_nothing() {
    let (mut keeper, board) = keeper("gives-many");
    let counted = allocation_counter::measure(|| {
        until(&mut keeper, |_| board.get(GOOD) >= 3);
    });
    assert_eq!((counted.count_total, counted.bytes_total), (0, 0), "in {} starts", board.get(STARTS));
    let control = allocation_counter::measure(|| drop(std::hint::black_box(vec![1_u8; 100])));
    assert_eq!(control.count_total, 1, "allocations are not counted");
    end(keeper);
}

fn nonsense() {
    let (mut keeper, board) = keeper("nonsense");
    let end = until(&mut keeper, |_| false);
    assert_eq!((end, board.get(GOOD)), (Some(End::Failed(Ending::Status(2))), 1));
}

fn never_serves() {
    const TRIES: usize = 10;
    // A machine that does something else for as long as the first pauses take makes them look longer than later ones, now and then.
    let mut tries = std::iter::repeat_with(starts_of_one_that_never_serves).take(TRIES);
    assert!(tries.any(|(quick, slow)| slow > quick), "the pauses do not grow");
}

/// How long three starts take at first, and how long later.
fn starts_of_one_that_never_serves() -> (Duration, Duration) {
    let (mut keeper, board) = keeper("never-serves-a-machine");
    // More often than one without machines would be tried: it does not give up. The pauses add up to about 20 + 40 + 80 ms.
    let since = Instant::now();
    let mut seen = Vec::new();
    until(&mut keeper, |_| {
        let starts = board.get(STARTS);
        if seen.len() < usize::try_from(starts).unwrap() {
            seen.push(since.elapsed());
        }
        starts >= 10
    });
    let (quick, slow) = (seen[3] - seen[0], seen[9] - seen[6]);
    assert!(slow > Duration::from_millis(100), "{seen:?}");
    assert_eq!(keeper.slots().taken().count(), 2, "the board and the machine's");
    end(keeper);
    (quick, slow)
}

fn cannot_be() {
    let (mut keeper, board) = keeper("cannot-be");
    assert_eq!(until(&mut keeper, |_| false), Some(End::Failed(Ending::Status(2))));
    assert_eq!(board.get(STARTS), 1, "a manager that says it cannot be is not asked again");
    drop(keeper);
    let (mut keeper, board) = self::keeper("never-serves");
    assert_eq!(until(&mut keeper, |_| false), Some(End::Failed(Ending::Status(1))));
    assert_eq!(board.get(STARTS), 8);
}

fn hangs() {
    let (mut keeper, board) = keeper_that_waits("hangs", Duration::from_millis(100));
    assert_eq!(until(&mut keeper, |_| board.get(STARTS) >= 3), None);
    end(keeper);
}

fn ends_slowly() {
    if host_pressure().is_none() {
        return println!("SKIPPED: this kernel tells nobody of memory pressure");
    }
    let (mut keeper, board) = keeper("ends-slowly");
    until(&mut keeper, |_| board.get(GOOD) == 1);
    keeper.manager().unwrap().send_signal(Signal::KILL).unwrap();
    let mut turns = 0;
    until(&mut keeper, |_| {
        turns += 1;
        board.get(STARTS) > 2
    });
    end(keeper);
    // That it parted, that it ended, a signal for the latter, what the next one asks, and now and then that nothing happened.
    assert!(turns < 100, "{turns} turns for one manager's end");
}

fn told_to_stop() {
    let (mut keeper, board) = keeper("waits");
    until(&mut keeper, |_| board.get(GOOD) == 2);
    let own = Pidfd::open(ProcessId::own()).unwrap();
    own.send_signal(Signal::TERM).unwrap();
    assert_eq!(until(&mut keeper, |_| false), Some(End::Stopped));
}

fn told_and_dies() {
    let (mut keeper, board) = keeper("dies-when-told");
    let own = Pidfd::open(ProcessId::own()).unwrap();
    until(&mut keeper, |_| board.get(GOOD) == 1);
    own.send_signal(Signal::TERM).unwrap();
    until(&mut keeper, |_| board.get(GOOD) == 2);
    assert_eq!(board.get(STARTS), 2);
    own.send_signal(Signal::TERM).unwrap();
    assert_eq!(until(&mut keeper, |_| false), Some(End::Stopped));
}
