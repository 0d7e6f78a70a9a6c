//! The five mixes of guests, and what each guest of them is.
//!
//! Enters: nothing. Leaves: roles, the same for every way. What must never happen: a number here that depends on the way.
use crate::contents::{MIX, SEED};
use crate::guest;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_types::{BLOCK_PAGES, ByteCount, PAGE_SIZE};
use plimsoll_vmm::VmmConfig;

/// When a guest begins to work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    /// As soon as all guests have their memory: it is warm when time is taken.
    Warm,
    /// It has its memory, and touches nothing of it before time is taken.
    Late,
    /// It starts when time is taken: it has to get its memory first, and that counts as its work.
    Boots,
}

/// What a guest is.
#[derive(Clone, Debug)]
pub(super) struct Role {
    pub(super) name: &'static str,
    /// Its RAM.
    pub(super) size: ByteCount,
    /// What it keeps and works on.
    pub(super) kept: ByteCount,
    /// What it has used and freed again before.
    pub(super) freed: ByteCount,
    /// What it was promised.
    pub(super) reservation: ByteCount,
    pub(super) program: WorkloadKind,
    /// The part of what it keeps that its program favours.
    hot_permille: u32,
    /// 0: flat out.
    ops_per_second: u64,
    pub(super) begins: Begins,
}

const SIZE: ByteCount = ByteCount::mib(96);
const FREED: ByteCount = ByteCount::mib(18);

/// Works flat out on what it keeps.
const BUSY: Role = Role {
    name: "zipf",
    size: SIZE,
    kept: ByteCount::mib(48),
    freed: FREED,
    reservation: ByteCount::mib(16),
    program: WorkloadKind::Zipf,
    hot_permille: 1000,
    ops_per_second: 0,
    begins: Begins::Warm,
};
/// A system at rest: timers, clocks, 64 pages.
const IDLE: Role =
    Role { name: "idle", program: WorkloadKind::Idle, ops_per_second: 10, reservation: ByteCount(0), ..BUSY };
/// Its hot part moves on every two seconds.
const PHASES: Role = Role { name: "phases", program: WorkloadKind::Phases, hot_permille: 200, ..BUSY };
/// Within its reservation, whatever the neighbour does.
const QUIET: Role = Role { name: "quiet", kept: ByteCount::mib(24), reservation: ByteCount::mib(32), ..BUSY };
/// Has been at rest, and goes over all of its memory again and again once time is taken.
const NOISY: Role = Role {
    name: "noisy",
    size: ByteCount::mib(288),
    kept: ByteCount::mib(210),
    freed: ByteCount(0),
    reservation: ByteCount(0),
    program: WorkloadKind::Sweep,
    begins: Begins::Late,
    ..BUSY
};
const BOOTS: Role = Role { name: "boots", begins: Begins::Boots, reservation: ByteCount(0), ..BUSY };

/// Pages of a piece in which memory is got: 6 MiB.
const PIECE_PAGES: u64 = 3 * BLOCK_PAGES as u64;
/// How long the hot part of `phases` stays.
const PHASE_MS: u64 = 2000;

/// Guests that run together: so many of each role.
#[derive(Clone, Debug)]
pub(super) struct Mix {
    pub(super) name: &'static str,
    roles: &'static [(usize, Role)],
}

/// All mixes. Each owns 768 MiB.
pub(super) const MIXES: [Mix; 5] = [
    Mix { name: "mostly-idle", roles: &[(6, IDLE), (2, BUSY)] },
    Mix { name: "steady-zipfian", roles: &[(8, BUSY)] },
    Mix { name: "phase-shifting", roles: &[(8, PHASES)] },
    Mix { name: "noisy-neighbour", roles: &[(1, NOISY), (5, QUIET)] },
    Mix { name: "boot-storm", roles: &[(4, BUSY), (4, BOOTS)] },
];

impl Mix {
    /// Its guests, in order.
    pub(super) fn roles(&self) -> impl Iterator<Item = &'static Role> {
        self.roles.iter().flat_map(|(count, role)| std::iter::repeat_n(role, *count))
    }

    /// The RAM of its guests.
    pub(super) fn asked(&self) -> ByteCount {
        self.roles().map(|role| role.size).sum()
    }
}

impl Role {
    /// Whether it was promised all that it keeps.
    pub(super) fn is_guaranteed(&self) -> bool {
        self.reservation >= self.kept
    }

    /// Its machine, the nth of its fleet.
    pub(super) fn config(&self, nth: usize) -> VmmConfig {
        let seed = SEED + nth as u64;
        let mut config = guest::config(WorkloadKind::Frames, MIX);
        config.workload.seed = seed;
        config.workload.spec = WorkloadSpec {
            hot_permille: self.hot_permille,
            ops_per_second: self.ops_per_second,
            phase_ms: PHASE_MS,
            final_check: 1,
            seed,
            ..config.workload.spec
        };
        VmmConfig { name: format!("{}{}", self.name, nth + 1), ram_bytes: self.size.0, ..config }
    }

    /// Gets all the memory it will ever use, piece by piece, and frees what it no longer needs.
    pub(super) fn start(&self) -> Vec<ProbeCommand> {
        let pieces = (self.kept + self.freed).pages_floor().0 / PIECE_PAGES;
        let allocate =
            ProbeCommand { pages: PIECE_PAGES, ..ProbeCommand::new(Task::Allocate, Order::Ascending) };
        let pages = self.freed.pages_floor().0;
        let free = ProbeCommand { pages, ..ProbeCommand::new(Task::Free, Order::Ascending) };
        (0..pieces).map(|_| allocate).chain([free]).collect()
    }

    /// Works until it is stopped.
    pub(super) fn work(&self) -> ProbeCommand {
        let stride = u64::from(self.program as u32);
        ProbeCommand { passes: u64::MAX, stride, ..ProbeCommand::new(Task::Work, Order::Ascending) }
    }
}

const _: () = assert!(FREED.0.is_multiple_of(PIECE_PAGES * PAGE_SIZE as u64), "whole frames become free");
