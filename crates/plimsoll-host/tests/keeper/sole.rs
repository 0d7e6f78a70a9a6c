//! Managers that go on when their keeper has died, and those of the next keeper.
use super::{BOARD, Board, GO, GOOD, PATIENCE, PROCESS, TURN, keeper_of, rests, slots, until};
use plimsoll_host::daemon::sole::{SoleError, claim};
use plimsoll_host::keeper::client::Client;
use plimsoll_host::keeper::serve::Keeper;
use plimsoll_sys::ProcessId;
use plimsoll_sys::mapping::Memfd;
use plimsoll_sys::pidfd::{Liveness, Pidfd};
use plimsoll_sys::process::Signal;
use plimsoll_sys::slots::Slots;
use plimsoll_types::ByteCount;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const LOCK: u32 = 5;

/// Claims the lock; the third only when it may.
pub(super) fn is_sole(
    keeper: &Client,
    mut kept: BTreeMap<u32, OwnedFd>,
    board: &Board,
    start: u64,
) -> ExitCode {
    let lock = kept.remove(&LOCK).unwrap();
    if start == 2 {
        board.set(GOOD, 3);
        board.wait_for_go(1);
        let claimed = claim(lock.as_fd(), || keeper.is_alone());
        board.set(GOOD, if matches!(claimed, Err(SoleError::Late)) { 4 } else { 5 });
        return ExitCode::SUCCESS;
    }
    claim(lock.as_fd(), || keeper.is_alone()).unwrap();
    board.set(GOOD, start + 1);
    rests()
}

pub(super) fn one_of_two() {
    let (first_slots, board) = slots();
    let board_fd = first_slots.get(BOARD).unwrap().try_clone_to_owned().unwrap();
    let lock = OwnedFd::from(Memfd::create("test-lock", ByteCount(4096)).unwrap());
    drop(first_slots);
    // Each has what the one before it had.
    let next = || -> Keeper {
        let mut slots = Slots::new(512).unwrap();
        slots.put(BOARD, board_fd.try_clone().unwrap()).unwrap();
        slots.put(LOCK, lock.try_clone().unwrap()).unwrap();
        keeper_of(slots, "is-sole", PATIENCE)
    };
    let manager = |good| {
        let mut keeper = next();
        until(&mut keeper, |_| board.get(GOOD) == good);
        let process = u32::try_from(board.get(PROCESS)).unwrap();
        // Its keeper dies here.
        Pidfd::open(ProcessId::new(process).unwrap()).unwrap()
    };
    let first = manager(1);
    assert!(first.is_alive().unwrap());
    let second = manager(2);
    assert_eq!(first.wait_exit(PATIENCE).unwrap(), Liveness::Exited);
    let third = manager(3);
    board.set(GO, 1);
    let since = Instant::now();
    while board.get(GOOD) == 3 && since.elapsed() < PATIENCE {
        std::thread::sleep(TURN);
    }
    assert_eq!(board.get(GOOD), 4, "one without a keeper has claimed what another has");
    assert_eq!(third.wait_exit(PATIENCE).unwrap(), Liveness::Exited);
    assert_eq!(second.wait_exit(Duration::ZERO).unwrap(), Liveness::Alive);
    second.send_signal(Signal::KILL).unwrap();
    assert_eq!(second.wait_exit(PATIENCE).unwrap(), Liveness::Exited);
}
