//! A host that does what it is told: memory that is taken is free, a balloon moves, a machine grows into what it uses.
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView, Reading};
use plimsoll_policy::{Plan, PolicyState, Ppm, Rung, Rungs, Step, decide};
use plimsoll_types::{ByteCount, MachineId};

pub(crate) const MIB: fn(u64) -> ByteCount = ByteCount::mib;

/// Settings of a machine in ESX's face, in MiB; the limit is the size.
pub(crate) fn machine(id: u32, size: u64, reservation: u64, shares: u32) -> MachineSettings {
    let (size, reservation) = (MIB(size), MIB(reservation));
    let face = Face::Guarantee { size, reservation, limit: size, shares: Shares(shares) };
    MachineSettings::new(MachineId(id), face)
}

/// A machine whose limit is below its size.
pub(crate) fn limited(id: u32, size: u64, limit: u64) -> MachineSettings {
    let mut settings = machine(id, size, 0, 1000);
    let Face::Guarantee { limit: own, .. } = &mut settings.face else { unreachable!() };
    *own = MIB(limit);
    settings
}

/// A tree of machines of the host's own.
pub(crate) fn tree(machines: &[MachineSettings]) -> Tree {
    let settings = Settings { machines: machines.to_vec(), ..Settings::new(MIB(1 << 20)) };
    Tree::new(settings).unwrap()
}

pub(crate) fn sampled(mib: u64) -> Option<Reading> {
    Some(Reading { bytes: i64::try_from(mib << 20).unwrap(), age_ms: 0 })
}

/// A view of a machine that can be compressed, in MiB.
pub(crate) fn view(id: u32, consumed: u64, active: u64) -> MachineView {
    MachineView {
        active: sampled(active),
        rungs: Rungs::NONE.with(Rung::Compress),
        ..MachineView::new(MachineId(id), MIB(consumed))
    }
}

/// A host whose machines are in a state that can be changed between decisions.
pub(crate) struct World {
    /// All that machines and free memory share.
    pub(crate) pool: ByteCount,
    pub(crate) view: HostView,
    pub(crate) state: PolicyState,
}

impl World {
    /// A host of that memory, of which all but `own` is for machines.
    pub(crate) fn new(
        total: u64,
        own: u64,
        settings: &[MachineSettings],
        machines: Vec<MachineView>,
    ) -> Self {
        let view =
            HostView { now_ms: 0, total: MIB(total), free: ByteCount(0), overdrawn: ByteCount(0), machines };
        let mut world = Self { pool: MIB(total - own), view, state: PolicyState::new(tree(settings)) };
        world.settle();
        world
    }

    pub(crate) fn machine(&mut self, id: u32) -> &mut MachineView {
        self.view.machines.iter_mut().find(|machine| machine.id == MachineId(id)).unwrap()
    }

    pub(crate) fn consumed(&self, id: u32) -> ByteCount {
        self.view.machines.iter().find(|machine| machine.id == MachineId(id)).unwrap().consumed
    }

    fn settle(&mut self) {
        let used: ByteCount = self.view.machines.iter().map(|machine| machine.consumed).sum();
        self.view.free = self.pool.saturating_sub(used);
        self.view.overdrawn = used.saturating_sub(self.pool);
    }

    /// Decides, does what is decided, and lets a second pass.
    pub(crate) fn step(&mut self) -> Plan {
        self.settle();
        let plan = decide(&self.view, &mut self.state);
        for action in &plan.actions {
            let machine = self.view.machines.iter_mut().find(|machine| machine.id == action.machine).unwrap();
            match action.step {
                Step::Take { rung, frees, .. } => {
                    machine.consumed = machine.consumed.saturating_sub(frees);
                    if rung == Rung::GuestFree {
                        machine.reported_free = machine.reported_free.saturating_sub(frees);
                    }
                }
                Step::Balloon(holds) if machine.balloon.is_some() => {
                    let size = self.state.tree().terms(action.machine).unwrap().size.bytes();
                    machine.balloon = Some(holds);
                    machine.consumed = machine.consumed.min(size.saturating_sub(holds));
                }
                _ => {}
            }
        }
        self.settle();
        self.view.now_ms += 1000;
        plan
    }

    /// The guest touches memory until it has so much, or there is none, or its balloon is in the way.
    pub(crate) fn touch(&mut self, id: u32, mib: u64) {
        self.settle();
        let (free, size) = (self.view.free, self.state.tree().terms(MachineId(id)).unwrap().size.bytes());
        let machine = self.machine(id);
        let most = size.saturating_sub(machine.balloon.unwrap_or_default());
        let more = MIB(mib).min(most).saturating_sub(machine.consumed);
        machine.consumed += more.min(free);
        self.settle();
    }
}

/// What a plan says about a machine.
pub(crate) fn target(plan: &Plan, id: u32) -> ByteCount {
    plan.machines.iter().find(|machine| machine.machine == MachineId(id)).unwrap().target
}

pub(crate) fn entitlement(plan: &Plan, id: u32) -> ByteCount {
    plan.machines.iter().find(|machine| machine.machine == MachineId(id)).unwrap().entitlement
}

/// The steps for a machine.
pub(crate) fn steps(plan: &Plan, id: u32) -> Vec<Step> {
    let of = |action: &&plimsoll_policy::Action| action.machine == MachineId(id);
    plan.actions.iter().filter(of).map(|action| action.step).collect()
}

/// The rungs on which a machine is taken from.
pub(crate) fn rungs(plan: &Plan, id: u32) -> Vec<Rung> {
    let rung = |step: Step| match step {
        Step::Take { rung, .. } => Some(rung),
        _ => None,
    };
    steps(plan, id).into_iter().filter_map(rung).collect()
}

/// The sentences a plan gives about a machine.
pub(crate) fn why(plan: &Plan, id: u32) -> Vec<String> {
    let actions = plan.actions.iter().filter(|action| action.machine == MachineId(id));
    let notes = plan.reasons.iter().filter(|note| note.machine == Some(MachineId(id)));
    actions.map(|action| action.reason.to_string()).chain(notes.map(|note| note.reason.to_string())).collect()
}

pub(crate) const STALLED: Ppm = Ppm::percent(5);
