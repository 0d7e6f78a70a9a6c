//! Plimsoll: the policy decides once a second, and each machine has the back end that suits it.
//!
//! Enters: what machines use, as the pager's ledger and the page map show it. Leaves: targets, pages taken, balloons turned. What
//! must never happen: memory of this process, which is the manager, outside of the budget.
//!
//! **Which back end.** A machine at rest hands its memory to the pager: it is stored once where others have the same, and packed. All
//! others stay with the kernel, because a page comes back from zram in a fifth of the time: those are sampled from outside, and
//! each has a memory cgroup of its own whose limit is what [`split`] makes of what it is entitled to, so that a machine which grows
//! pays for it itself. One that is held while others keep within what they were promised then stands still until the first look after
//! [`PAYS`] times as long as that took, so that it and what is reclaimed in its place have no more of the processors together than one
//! machine. KSM runs over the kernel's machines while memory is short and pages stay long enough to be merged, and until what is there
//! is. Memory that a guest has free is taken from its allocator ([`FreeFrames`]) without asking, and what else it is to give by its
//! balloon, both in pieces of 2 MiB.
//!
//! **What the policy is shown.** The host is the budget and half of what has to stay free on such a host: so everything
//! may be used, and at the budget the host is *soft*, in which pages are compressed.
use super::split::{Sharer, split};
use super::{Cage, FreeFrames, Growth, Host, KSM_RATE, merging, offer};
use crate::density::fleet::Member;
use crate::density::mix::{Mix, Role};
use crate::guest::Guest;
use crate::pager::keepers::{MEMBERSHIP, Managed, Running};
use crate::session::{BenchError, Interrupt};
use crate::swap::{hold_to, lift, signal};
use anyhow::{Context, Result};
use plimsoll_core::ledger::Budget;
use plimsoll_guest::spec::WorkloadKind;
use plimsoll_host::trace::{Basis, Recorder, Tick};
use plimsoll_linux::cgroup::MemoryCgroup;
use plimsoll_linux::kernel::{KernelError, KernelMachine};
use plimsoll_linux::ksm::control::Ksm;
use plimsoll_linux::reclaimer::{Reclaimer, Usage};
use plimsoll_linux::uffd::manager::{Manager, Meter, Vault};
use plimsoll_linux::uffd::stats::MachineStats;
use plimsoll_policy::Costs;
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView, Phase, Reading};
use plimsoll_policy::{PolicyState, Ppm, Rung, Rungs, Step, decide};
use plimsoll_sys::pidfd::{Pidfd, Signal};
use plimsoll_sys::{ProcessId, procfs};
use plimsoll_types::{ByteCount, MachineId, PageCount};
use plimsoll_vmm::VmmConfig;
use plimsoll_vmm::control::{BalloonPiece, Command};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often is decided.
const DECIDE_EVERY: Duration = Duration::from_secs(1);
/// How often the pager draws samples.
const SAMPLE_PERIOD: Duration = Duration::from_secs(2);
/// Passes of ksmd after which what can be merged is: the first only remembers what pages are like.
const SCANS: u64 = 3;
/// So many pages of one machine that come back in a second, 3 ms of waiting, are worth ksmd's time. Of a sample there are fewer.
const WANTING: u64 = 256;
/// In so many seconds KSM at [`KSM_RATE`] has looked at all memory twice, 768 MiB if all of it is there, and so merged what it can. Where
/// pages stay for less than that, on average, it is not worth its time.
const MERGES_IN_S: u64 = 8;
/// How many times as long a machine stands still as it takes to reclaim in its place. Chosen: once as long was too little for the
/// neighbours in `noisy-neighbour/3.0` (docs/bench.md).
const PAYS: u32 = 3;
/// A machine that starts has begun to get its memory when it takes up so much.
const BEGUN: ByteCount = ByteCount::mib(1);
/// What a guest waits for a page out of zram.
const BACK_NS: u64 = Costs::MEASURED.of(Rung::Compress).back_ns;
/// No machine's part of what all share, and no limit, is smaller, or it could not run at all.
const PART_MIN: ByteCount = ByteCount::mib(16);

/// Where a machine's pages go.
enum Keeper {
    Pager(MachineId),
    Kernel { process: ProcessId, machine: Box<KernelMachine>, cgroup: MemoryCgroup },
}

/// A machine, and what of it was seen last.
struct Machine {
    id: MachineId,
    keeper: Keeper,
    target: Option<ByteCount>,
    /// What it is entitled to, if it is held to anything.
    part: Option<ByteCount>,
    /// What its stored pages take up.
    stored: ByteCount,
    /// Pages that were elsewhere, pages that had come back, and how long it had waited.
    elsewhere: PageCount,
    returned: u64,
    waited: Duration,
    /// Until when it stands still for what was reclaimed in its place.
    pays_until: Option<Instant>,
    /// What its balloon was asked for.
    balloon: ByteCount,
}

/// What the pager's governor goes by.
struct Counted(Arc<Cage>);

impl Meter for Counted {
    fn used(&mut self) -> ByteCount {
        self.0.used()
    }
}

/// Everything.
pub(in crate::density) struct Plimsoll {
    machines: Vec<Machine>,
    /// The manager of the machines at rest.
    pagers: Running,
    /// Over the kernel's machines.
    ksm: Ksm,
    /// When it has scanned so often, it has merged what it can.
    merged: u64,
    cage: Arc<Cage>,
    budget: ByteCount,
    state: PolicyState,
    recorder: Recorder,
    free: FreeFrames,
    growth: Growth,
    started: Instant,
    decided: Instant,
    interrupt: Interrupt,
}

impl Plimsoll {
    /// For the guests of a mix, within a budget. What is decided is written to `record`.
    pub(in crate::density) fn new(
        mix: &Mix,
        budget: ByteCount,
        record: &Path,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let cage = Arc::new(Cage::new(mix.asked(), Some(budget))?);
        cage.cgroup.join_self()?;
        // Guests have limits of their own, and nobody meets this one at work.
        lift(&cage.cgroup, budget)?;
        // Machines of the kernel may fill the host beyond the pager's high mark: so machines at rest always give first.
        let line = Budget::of(budget);
        let mut pagers = Running::start(Vault::new(line, mix.asked()))?;
        pagers.govern(Counted(Arc::clone(&cage)), SAMPLE_PERIOD)?;
        let mut settings = Settings::new(host_of(budget));
        for (nth, role) in mix.roles().enumerate() {
            let (size, reservation, shares) = (role.size, role.reservation, Shares::NORMAL);
            let face = Face::Guarantee { size, reservation, limit: size, shares };
            settings.machines.push(MachineSettings::new(id_of(nth)?, face));
        }
        let state = PolicyState::new(Tree::new(settings)?);
        let names =
            mix.roles().enumerate().map(|(nth, role)| Ok((id_of(nth)?, format!("{}-{nth}", role.name))));
        let (names, own) = (names.collect::<Result<_>>()?, ByteCount(0));
        let mut recorder = Recorder::create(record)?;
        recorder.settings(&Basis { state: state.clone(), names, own })?;
        let ksm = merging()?;
        let (started, interrupt) = (Instant::now(), interrupt.clone());
        Ok(Self {
            machines: Vec::new(),
            pagers,
            merged: ksm.counters()?.full_scans + SCANS,
            ksm,
            cage,
            budget,
            state,
            recorder,
            free: FreeFrames::new(),
            growth: Growth::default(),
            started,
            decided: started,
            interrupt,
        })
    }

    fn keep(&mut self, nth: usize, role: &Role, config: VmmConfig) -> Result<(Guest, Keeper), BenchError> {
        if role.program == WorkloadKind::Idle {
            // This process is in the cage, and so is whatever it starts.
            let Managed { id, guest } = self.pagers.admit(&config, &self.interrupt)?;
            return Ok((guest, Keeper::Pager(id)));
        }
        let cgroup = MemoryCgroup::create(&format!("{}-{nth}", super::PREFIX), ProcessId::own());
        let cgroup = cgroup.context("cannot make a cgroup for a guest")?;
        let guest = Guest::unmanaged_in(&cgroup, config, &self.interrupt)?;
        offer(&guest, role)?;
        let process = guest.process().process();
        let descriptor = Pidfd::open(process).context("a guest has ended")?;
        let machine = KernelMachine::attach(descriptor, guest.ram(), nth as u64, Instant::now());
        let machine = Box::new(machine.context("cannot attach to a guest")?);
        Ok((guest, Keeper::Kernel { process, machine, cgroup }))
    }

    /// What there is to see, and what is to be done about it.
    fn turn(&mut self, members: &mut [Member]) -> Result<()> {
        let elapsed = self.decided.elapsed();
        self.decided = Instant::now();
        let machines = self.look(members, elapsed)?;
        let (total, used) = (host_of(self.budget), self.cage.used());
        let now_ms = u64::try_from(self.started.elapsed().as_millis())?;
        let view = HostView::of(now_ms, total, used, machines);
        let plan = decide(&view, &mut self.state);
        // What others run all the time is run while guests wait for want of memory that stays for a while, and while one gets its memory,
        // which nobody has looked through yet.
        let is_new = |machine: &MachineView| machine.phase == Phase::Starting && machine.consumed >= BEGUN;
        let is_wanting = |machine: &MachineView| {
            let resident = machine.consumed.saturating_sub(machine.stored).pages_floor();
            machine.returned.0 >= WANTING && machine.returned.0 * MERGES_IN_S <= resident.0
        };
        let is_short = plan.state != HostState::High;
        let merges = view.machines.iter().any(|machine| is_new(machine) || is_short && is_wanting(machine));
        // What came of it is in the next view.
        let (outcomes, overheads) = (Vec::new(), Vec::new());
        self.recorder.tick(&Tick { view, plan: plan.clone(), outcomes, overheads })?;
        if merges {
            self.ksm.run(KSM_RATE)?;
            self.merged = self.ksm.counters()?.full_scans + SCANS;
        } else if self.ksm.counters()?.full_scans >= self.merged {
            // What was merged stays so.
            self.ksm.stop()?;
        }
        let manager = self.pagers.manager()?;
        // A plan replaces the one before.
        for machine in &self.machines {
            if let Keeper::Pager(id) = &machine.keeper {
                manager.squeeze(*id, 0);
            }
        }
        for position in &plan.machines {
            let nth = self.machines.iter().position(|machine| machine.id == position.machine);
            if let Some((machine, member)) =
                nth.and_then(|nth| Some((self.machines.get_mut(nth)?, members.get(nth)?)))
            {
                // One that starts grows faster than is decided: it has no line yet.
                machine.target = member.has_started().then_some(position.target);
                machine.part = Some(position.entitlement);
            }
        }
        for action in plan.actions {
            let nth = self.machines.iter().position(|machine| machine.id == action.machine);
            if let Some((machine, member)) =
                nth.and_then(|nth| Some((self.machines.get_mut(nth)?, members.get_mut(nth)?)))
            {
                machine.apply(action.step, member, manager)?;
            }
        }
        Ok(())
    }

    fn look(&mut self, members: &[Member], elapsed: Duration) -> Result<Vec<MachineView>> {
        let manager = self.pagers.manager()?;
        let store = manager.domain(MEMBERSHIP.domain).map_or(ByteCount(0), |domain| domain.held());
        let mut seen = Vec::new();
        for machine in &mut self.machines {
            seen.push(machine.look(manager)?);
        }
        let (mut stored, mut swapped) = (0, 0);
        for (machine, seen) in self.machines.iter().zip(&seen) {
            *if machine.is_paged() { &mut stored } else { &mut swapped } += seen.usage.elsewhere.0;
        }
        let zram = self.cage.held();
        let machines = self.machines.iter_mut().zip(members).zip(seen);
        let view = |((machine, member), seen): ((&mut Machine, &Member), Seen)| {
            let (all, taken_up) = if machine.is_paged() { (stored, store) } else { (swapped, zram) };
            machine.stored = ByteCount(taken_up.0 / all.max(1) * seen.usage.elsewhere.0);
            machine.view(member, &seen, elapsed)
        };
        Ok(machines.map(view).collect())
    }

    /// Keeps each of the kernel's machines to what it is entitled to, and what the others leave; and none to less than it was promised.
    fn hold(&mut self, members: &[Member]) {
        let is_within =
            |(machine, member): (&Machine, &Member)| !machine.is_paged() && member.is_within_reservation();
        let is_any_within = self.machines.iter().zip(members).any(is_within);
        let mut held = Vec::new();
        let mut sharers = Vec::new();
        for (machine, member) in self.machines.iter_mut().zip(members) {
            let Keeper::Kernel { cgroup, .. } = &machine.keeper else { continue };
            let Some(part) = machine.part else { continue };
            let uses = cgroup.used().unwrap_or_default();
            sharers.push(Sharer { uses, part: part.max(PART_MIN) });
            held.push((cgroup, &mut machine.pays_until, member, member.least(uses).max(PART_MIN)));
        }
        let theirs: ByteCount = sharers.iter().map(|sharer| sharer.uses).sum();
        let others = self.cage.cgroup.used().unwrap_or_default().saturating_sub(theirs);
        let room = self.budget.saturating_sub(self.cage.held() + others);
        for ((cgroup, pays_until, member, least), limit) in held.into_iter().zip(split(room, &sharers)) {
            let who = [&member.guest];
            // One that pays stands still already.
            let took = hold_to(cgroup, limit.max(least), if pays_until.is_some() { &[] } else { &who });
            if is_any_within && took > Duration::ZERO && !member.is_within_reservation() {
                signal(&who, Signal::STOP);
                let now = Instant::now();
                *pays_until = Some(pays_until.unwrap_or(now).max(now) + took * PAYS);
            }
        }
    }

    /// Those that stand still for what was reclaimed in their place go on when their time is over, at this look and no earlier.
    fn let_go(&mut self, members: &[Member]) {
        for (machine, member) in self.machines.iter_mut().zip(members) {
            if machine.pays_until.take_if(|until| *until <= Instant::now()).is_some() {
                signal(&[&member.guest], Signal::CONT);
            }
        }
    }
}

/// A host of which machines may use the budget: half of what has to stay free there, 6 %, is beyond it.
const fn host_of(budget: ByteCount) -> ByteCount {
    ByteCount(budget.0 / 97 * 100)
}

fn id_of(nth: usize) -> Result<MachineId> {
    Ok(MachineId(u32::try_from(nth)? + 1))
}

/// Where a machine's pages are, what it uses, and what it went through since it was started.
struct Seen {
    usage: Usage,
    active: Option<PageCount>,
    returned: u64,
    waited: Duration,
}

/// What is seen of a machine of the kernel's.
fn look_outside(process: ProcessId, machine: &mut KernelMachine) -> Result<Seen, KernelError> {
    let now = Instant::now();
    if now >= machine.due() {
        machine.tick(now)?;
    }
    let usage = machine.usage()?;
    let returned = procfs::major_faults(process)?;
    let waited = Duration::from_nanos(returned * BACK_NS);
    Ok(Seen { usage, active: machine.working_set(), returned, waited })
}

impl Machine {
    const fn is_paged(&self) -> bool {
        matches!(self.keeper, Keeper::Pager(_))
    }

    fn look(&mut self, manager: &Manager) -> Result<Seen> {
        match &mut self.keeper {
            Keeper::Pager(id) => {
                let machine = manager.machine(*id).context("a machine is not managed any more")?;
                let MachineStats { ram, working_set, waited, census, faults, .. } = machine.stats;
                let elsewhere = census.of(plimsoll_core::word::StateKind::Stored);
                let usage = Usage { resident: ram, elsewhere };
                let returned = faults.limbo + faults.stored;
                Ok(Seen { usage, active: working_set, returned, waited })
            }
            Keeper::Kernel { process, machine, .. } => match look_outside(*process, machine) {
                // One that has ended is seen as it was: the fleet says that it died.
                Err(KernelError::ProcessGone(_)) => {
                    let usage = Usage { resident: PageCount(0), elsewhere: PageCount(0) };
                    Ok(Seen { usage, active: None, returned: self.returned, waited: self.waited })
                }
                seen => Ok(seen?),
            },
        }
    }

    fn view(&mut self, member: &Member, seen: &Seen, elapsed: Duration) -> MachineView {
        let Seen { usage, active, returned, waited } = seen;
        let came_back = returned.saturating_sub(self.returned);
        let left = (usage.elsewhere.0 + came_back).saturating_sub(self.elsewhere.0);
        let waits = waited.saturating_sub(self.waited);
        (self.returned, self.waited, self.elsewhere) = (*returned, *waited, usage.elsewhere);
        let started = member.has_started();
        // What a balloon could not bring it will not bring a moment later.
        let gives = started && member.settled.is_none_or(|settled| settled >= self.balloon);
        let rungs = Rungs::NONE.with(Rung::Compress);
        let most = member.role.size.pages_floor().0;
        MachineView {
            phase: if started { Phase::Running } else { Phase::Starting },
            stored: self.stored,
            active: active.map(|pages| Reading::of(pages.bytes(), 0)),
            taken: PageCount(left),
            returned: PageCount(came_back.min(most)),
            stalled: Ppm::of(micros(waits), micros(elapsed)).min(Ppm::WHOLE),
            balloon: started.then_some(ByteCount(member.last.ballooned_bytes)),
            rungs: if gives { rungs.with(Rung::Balloon) } else { rungs },
            ..MachineView::new(self.id, usage.resident.bytes() + self.stored)
        }
    }

    fn apply(&mut self, step: Step, member: &mut Member, manager: &Manager) -> Result<()> {
        match step {
            Step::Balloon(target) if member.is_alive() => {
                self.balloon = target;
                member.settled = None;
                let piece = BalloonPiece::Frame;
                // One that is gone is found to be so when it is heard.
                let _ = member.guest.tell(&Command::Balloon { target_bytes: target.0, piece });
            }
            Step::Take { rung: Rung::Compress | Rung::Disk, pages, .. } => {
                // A machine of the kernel's is held by its cgroup, which takes what was used longest ago.
                if let Keeper::Pager(id) = &self.keeper {
                    manager.squeeze(*id, u32::try_from(pages.0).unwrap_or(u32::MAX));
                }
            }
            // Nobody reports free pages or twins here, and a machine at its limit waits by itself. Targets are those of positions.
            Step::Target(_) | Step::Take { .. } | Step::Balloon(_) | Step::Stall | Step::Resume => {}
        }
        Ok(())
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Host for Plimsoll {
    fn admit(&mut self, role: &'static Role, config: VmmConfig) -> Result<Guest, BenchError> {
        let nth = self.machines.len();
        let (guest, keeper) = self.keep(nth, role, config)?;
        self.machines.push(Machine {
            id: id_of(nth)?,
            keeper,
            target: None,
            part: None,
            stored: ByteCount(0),
            elsewhere: PageCount(0),
            returned: 0,
            waited: Duration::ZERO,
            pays_until: None,
            balloon: ByteCount(0),
        });
        Ok(guest)
    }

    fn tick(&mut self, members: &mut [Member]) -> Result<(), BenchError> {
        self.free.turn(members);
        self.let_go(members);
        // Those that grow stand still meanwhile. Each is pressed by its own limit: one over all takes from whom it finds first, whatever was
        // promised to that one.
        let grown = self.growth.of(members);
        let grown = if self.cage.is_full() { &grown[..] } else { &[] };
        signal(grown, Signal::STOP);
        self.hold(members);
        let pays = |guest: &&Guest| {
            let mut paying =
                self.machines.iter().zip(&*members).filter(|(machine, _)| machine.pays_until.is_some());
            paying.any(|(_, member)| std::ptr::eq(&member.guest, *guest))
        };
        signal(&grown.iter().copied().filter(|guest| !pays(guest)).collect::<Vec<_>>(), Signal::CONT);
        if self.decided.elapsed() >= DECIDE_EVERY {
            self.turn(members)?;
        }
        Ok(())
    }

    fn used(&self) -> ByteCount {
        self.cage.used()
    }

    fn target(&self, nth: usize) -> Option<ByteCount> {
        self.machines.get(nth)?.target
    }

    fn refaults(&self, nth: usize, member: &Member) -> u64 {
        let managed = |id| Some(self.pagers.manager().ok()?.machine(id)?.stats.faults.stored);
        let counted = match self.machines.get(nth).map(|machine| &machine.keeper) {
            Some(Keeper::Pager(id)) => managed(*id),
            _ => procfs::major_faults(member.guest.process().process()).ok(),
        };
        counted.unwrap_or_default()
    }

    fn end(self: Box<Self>) -> Result<(), BenchError> {
        let Self { machines, pagers, cage, ksm, recorder, .. } = *self;
        let recorded = recorder.finish();
        let ksm = ksm.restore();
        for machine in machines {
            if let Keeper::Kernel { cgroup, .. } = machine.keeper {
                cgroup.remove().context("cannot remove a guest's cgroup")?;
            }
        }
        drop(pagers);
        let cage = Arc::into_inner(cage).context("the governor still runs")?;
        cage.remove()?;
        ksm.context("cannot give KSM back")?;
        Ok(recorded.context("cannot end the record")?)
    }
}
