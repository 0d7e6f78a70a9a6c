//! The four ways to run the same guests.
//!
//! Enters: roles. Leaves: guests in one memory cgroup, and whatever keeps them to it. What must never happen: memory of the way
//! itself outside of the budget; what zram takes, which no cgroup counts, is taken off the cgroup's limit.
//!
//! * [`Alone`]: the kernel, with enough memory or too little, with KSM, and with a balloon loop on top.
//! * [`ours::Plimsoll`]: the policy, our pager, and the kernel's back end.
pub(super) mod ours;
mod proxmox;
mod split;

use super::fleet::Member;
use super::mix::Role;
use crate::guest::Guest;
use crate::ksm::not_here_or_failed;
use crate::session::{BenchError, Interrupt};
use crate::swap::{device, hold_to};
use anyhow::{Context, Result};
use plimsoll_linux::cgroup::{MemoryCgroup, sweep_stale};
use plimsoll_linux::ksm::KsmError;
use plimsoll_linux::ksm::control::{Ksm, Rate, Takeover};
use plimsoll_linux::zram::ZramSwap;
use plimsoll_sys::{ProcessId, procfs};
use plimsoll_types::ByteCount;
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::control::{Command, FrameOrder, FrameVerb, MergeMode, MergeRange};
use proxmox::Balloons;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// What our control groups are called.
const PREFIX: &str = "plimsoll-density";
/// How fast KSM scans: all memory of a fleet twice while the guests get warm, which is what merging takes. The default of the
/// kernel's advisor would merge nothing in so short a life.
const KSM_RATE: Rate = Rate { pages: 1000, sleep_ms: 20 };
/// The limit never falls below this part of the budget, or nobody could run at all.
const LIMIT_MIN_PART: u64 = 8;

/// Whether there can be memory cgroups here, and KSM is nobody's.
pub(super) fn check_here() -> Result<(), BenchError> {
    sweep_stale(PREFIX).map_err(|error| BenchError::NotHere(error.to_string()))?;
    let ksm = Ksm::take(Takeover::IfIdle).map_err(KsmError::from).map_err(not_here_or_failed)?;
    Ok(ksm.restore().context("cannot give KSM back")?)
}

/// A host that runs guests in one of the ways.
pub(super) trait Host {
    /// Starts a guest that works in this role.
    fn admit(&mut self, role: &'static Role, config: VmmConfig) -> Result<Guest, BenchError>;
    /// Does what is to be done every few milliseconds.
    fn tick(&mut self, members: &mut [Member]) -> Result<(), BenchError>;
    /// Memory in use now, of guests, way and zram.
    fn used(&self) -> ByteCount;
    /// What the nth guest is to come to, if anybody says so.
    fn target(&self, nth: usize) -> Option<ByteCount>;
    /// Pages that the nth guest has brought back so far by touching them.
    fn refaults(&self, nth: usize, member: &Member) -> u64;
    /// Ends it. The guests have ended before.
    fn end(self: Box<Self>) -> Result<(), BenchError>;
}

/// A memory cgroup, and the zram device that its guests are swapped to.
pub(super) struct Cage {
    cgroup: MemoryCgroup,
    /// None where there is enough memory.
    limited: Option<(ZramSwap, ByteCount)>,
}

impl Cage {
    /// One whose guests own so much, and may use the budget.
    fn new(asked: ByteCount, budget: Option<ByteCount>) -> Result<Self> {
        let cgroup = MemoryCgroup::create(PREFIX, ProcessId::own())?;
        sweep(&cgroup)?;
        let limited = budget.map(|budget| {
            let zram = device(ByteCount(asked.0 * 2)).context("cannot make a zram device")?;
            cgroup.set_limit(budget)?;
            anyhow::Ok((zram, budget))
        });
        Ok(Self { cgroup, limited: limited.transpose()? })
    }

    /// What zram takes.
    fn held(&self) -> ByteCount {
        self.limited.as_ref().and_then(|(zram, _)| zram.memory_used().ok()).unwrap_or_default()
    }

    fn used(&self) -> ByteCount {
        self.cgroup.used().unwrap_or_default() + self.held()
    }

    /// What guests and all else may use: what zram leaves of the budget.
    fn limit(&self) -> Option<ByteCount> {
        let (_, budget) = self.limited.as_ref()?;
        Some(budget.saturating_sub(self.held()).max(ByteCount(budget.0 / LIMIT_MIN_PART)))
    }

    fn is_full(&self) -> bool {
        self.limit().is_some_and(|limit| self.cgroup.used().unwrap_or_default() > limit)
    }

    /// Keeps all guests together to that. Those that have grown stand still meanwhile.
    fn hold(&self, grown: &[&Guest]) {
        if let Some(limit) = self.limit() {
            hold_to(&self.cgroup, limit, grown);
        }
    }

    fn remove(self) -> Result<()> {
        // The cgroup goes first, so that swapoff has nothing to read back into it.
        self.cgroup.remove()?;
        Ok(self.limited.map_or(Ok(()), |(zram, _)| zram.remove())?)
    }
}

/// Removes what killed runs have left beside this cgroup: theirs, and those of guests in them. No other run goes on.
fn sweep(own: &MemoryCgroup) -> Result<()> {
    let is_ours = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with(PREFIX);
    let list = |path: &Path| {
        fs::read_dir(path).map(|entries| entries.flatten().filter(is_ours).map(|entry| entry.path()))
    };
    let home = own.path().parent().context("a cgroup without a parent")?;
    for cgroup in list(home)? {
        // One that is in use is not empty, and stays.
        list(&cgroup)?.for_each(|guest| _ = fs::remove_dir(guest));
    }
    sweep_stale(PREFIX)?;
    Ok(())
}

/// The kernel without plimsoll.
pub(super) struct Alone {
    cage: Cage,
    ksm: Option<Ksm>,
    balloons: Option<(Balloons, FreeFrames)>,
    growth: Growth,
    interrupt: Interrupt,
}

impl Alone {
    /// Enough memory for all.
    pub(super) fn enough(asked: ByteCount, interrupt: &Interrupt) -> Result<Self> {
        let (cage, growth, interrupt) = (Cage::new(asked, None)?, Growth::default(), interrupt.clone());
        Ok(Self { cage, ksm: None, balloons: None, growth, interrupt })
    }

    /// Reclaim to zram, and KSM.
    pub(super) fn short(asked: ByteCount, budget: ByteCount, interrupt: &Interrupt) -> Result<Self> {
        let (cage, ksm) = (Cage::new(asked, Some(budget))?, Some(merging()?));
        Ok(Self { cage, ksm, balloons: None, growth: Growth::default(), interrupt: interrupt.clone() })
    }

    /// The same, and a loop that turns the guests' balloons as Proxmox does.
    pub(super) fn ballooned(asked: ByteCount, budget: ByteCount, interrupt: &Interrupt) -> Result<Self> {
        Ok(Self {
            balloons: Some((Balloons::new(budget), FreeFrames::new())),
            ..Self::short(asked, budget, interrupt)?
        })
    }
}

/// Takes what guests have free, as guests with free page reporting give it: whole frames of 2 MiB, without being asked.
struct FreeFrames(Instant);

impl FreeFrames {
    /// How often: a Linux guest reports after two seconds.
    const EVERY: Duration = Duration::from_secs(2);

    fn new() -> Self {
        Self(Instant::now())
    }

    fn turn(&mut self, members: &[Member]) {
        if self.0.elapsed() < Self::EVERY {
            return;
        }
        self.0 = Instant::now();
        for member in members.iter().filter(|member| member.is_alive()) {
            let order = FrameOrder { order: FrameVerb::TakeSoftly, bytes: member.role.size.0 };
            // One that is gone is found to be so when it is heard.
            let _ = member.guest.tell(&Command::Frames(order));
        }
    }
}

/// Of each guest, pages it had brought back and pages it had, when it was looked at last.
#[derive(Default)]
struct Growth(Vec<(u64, u64)>);

impl Growth {
    /// Guests that have taken memory since: on a host they would have to reclaim first.
    fn of<'a>(&mut self, members: &'a [Member]) -> Vec<&'a Guest> {
        let taken = |member: &Member| {
            let process = member.guest.process().process();
            let resident = procfs::statm(process).map_or(0, |statm| statm.resident.0);
            (procfs::major_faults(process).unwrap_or_default(), resident)
        };
        let now: Vec<(u64, u64)> = members.iter().map(taken).collect();
        let before = std::mem::replace(&mut self.0, now.clone());
        let has_grown = |nth: usize, (faults, resident): (u64, u64)| {
            before.get(nth).is_none_or(|before| faults > before.0 || resident > before.1)
        };
        let grown = members.iter().zip(now).enumerate().filter(|(nth, (_, now))| has_grown(*nth, *now));
        grown.map(|(_, (member, _))| &member.guest).collect()
    }
}

/// KSM, at work.
fn merging() -> Result<Ksm> {
    let mut ksm = Ksm::take(Takeover::IfIdle)?;
    ksm.run(KSM_RATE)?;
    Ok(ksm)
}

/// Offers all memory of a guest to KSM.
fn offer(guest: &Guest, role: &Role) -> Result<()> {
    guest.tell(&Command::Merge(MergeRange { gpa: 0, bytes: role.size.0, merging: MergeMode::Offered }))
}

impl Host for Alone {
    fn admit(&mut self, role: &'static Role, config: VmmConfig) -> Result<Guest, BenchError> {
        let guest = Guest::unmanaged_in(&self.cage.cgroup, config, &self.interrupt)?;
        if self.ksm.is_some() {
            offer(&guest, role)?;
        }
        Ok(guest)
    }

    fn tick(&mut self, members: &mut [Member]) -> Result<(), BenchError> {
        self.cage.hold(&self.growth.of(members));
        let used = self.cage.used();
        if let Some((balloons, free)) = &mut self.balloons {
            free.turn(members);
            balloons.turn(members, used);
        }
        Ok(())
    }

    fn used(&self) -> ByteCount {
        self.cage.used()
    }

    fn target(&self, nth: usize) -> Option<ByteCount> {
        self.balloons.as_ref()?.0.target(nth)
    }

    fn refaults(&self, _: usize, member: &Member) -> u64 {
        // One that has died brings nothing back.
        procfs::major_faults(member.guest.process().process()).unwrap_or_default()
    }

    fn end(self: Box<Self>) -> Result<(), BenchError> {
        let ksm = self.ksm.map_or(Ok(()), Ksm::restore);
        self.cage.remove()?;
        Ok(ksm.context("cannot give KSM back")?)
    }
}
