//! The decision: from what a host shows and what is remembered to what is to be done.
//!
//! Enters: a [`HostView`] and a [`PolicyState`]. Leaves: a [`Plan`], and the state changed. There is no clock here, no
//! chance and no float: the same state and view give the same plan, to the bit, wherever they are replayed.
//!
//! In this order, each step from the results of those before it:
//!
//! 1. [`look`]: the host's state; of each machine what it needs, whether it stalls, whether its balloon works.
//! 2. [`targets`]: what all machines share is what they have and what is free, less minFree. It is shared out twice.
//!    Once as if all wanted all they may have: *entitlement*, a machine's right. Once up to what each wants: the
//!    *target*, which is damped. So memory nobody wants stays where it is, and a machine loses memory only when
//!    another one that is due it wants it, or the host is short.
//! 3. [`limits`]: what machines have beyond a limit, of their own or of a group, and who of them gives how much of it.
//! 4. [`moves`]: who has more than its target gives, up the ladder; then who has less is granted what is free.
pub(crate) mod limits;
pub(crate) mod look;
pub(crate) mod moves;
pub(crate) mod targets;

use crate::balloon::Balloon;
use crate::damper::{Damper, Lately};
use crate::demand::Use;
use crate::host_state::HostState;
use crate::plan::{Action, Note, Plan};
use crate::reason::Reason;
use crate::stall::Stall;
use crate::tree::Tree;
use crate::view::HostView;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, MachineId};

/// What decisions rest on besides what the host shows: the settings, and what earlier decisions left.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct PolicyState {
    tree: Tree,
    host: HostState,
    decided_ms: Option<u64>,
    /// Older records have none: what they share at first counts.
    #[cfg_attr(feature = "serde", serde(default))]
    lately: Option<Lately>,
    machines: BTreeMap<MachineId, Remembered>,
}

/// What is remembered of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct Remembered {
    pub(crate) usage: Use,
    pub(crate) stall: Stall,
    pub(crate) balloon: Option<Balloon>,
    pub(crate) damper: Option<Damper>,
    pub(crate) is_stalled: bool,
    /// When it was last asked for a sliver above a limit.
    pub(crate) sliver_ms: Option<u64>,
}

impl PolicyState {
    /// A state that remembers nothing yet.
    pub const fn new(tree: Tree) -> Self {
        Self { tree, host: HostState::High, decided_ms: None, lately: None, machines: BTreeMap::new() }
    }

    /// The settings in force.
    pub const fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Puts other settings in force. What is remembered of machines that are still there stays.
    pub fn set_tree(&mut self, tree: Tree) {
        self.machines.retain(|id, _| tree.terms(*id).is_some());
        self.tree = tree;
    }

    /// How short of memory the host was at the last decision.
    pub const fn host_state(&self) -> HostState {
        self.host
    }
}

/// What a decision collects on its way.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) actions: Vec<Action>,
    pub(crate) notes: Vec<Note>,
}

impl Findings {
    pub(crate) fn note(&mut self, machine: MachineId, reason: Reason) {
        self.notes.push(Note { machine: Some(machine), reason });
    }

    pub(crate) fn note_host(&mut self, reason: Reason) {
        self.notes.push(Note { machine: None, reason });
    }
}

/// The host, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host {
    pub(crate) now_ms: u64,
    pub(crate) elapsed_ms: u64,
    pub(crate) total: ByteCount,
    pub(crate) free: ByteCount,
    pub(crate) overdrawn: ByteCount,
    pub(crate) state: HostState,
}

/// Decides what to do now. Call it about once a second, or when a machine comes or goes; the time between two calls is
/// read from the views.
///
/// ```
/// use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
/// use plimsoll_policy::view::{HostView, MachineView, Reading};
/// use plimsoll_policy::{PolicyState, Rung, Rungs, Step, decide, tree::Tree};
/// use plimsoll_types::{ByteCount, MachineId};
///
/// // Two machines of 8 GiB on a host of 16 GiB. One is idle, the other works in all it has.
/// let mut settings = Settings::new(ByteCount::mib(15 << 10));
/// for id in [1, 2] {
///     let (size, shares) = (ByteCount::mib(8 << 10), Shares::NORMAL);
///     let face = Face::Guarantee { size, reservation: ByteCount::mib(1024), limit: size, shares };
///     settings.machines.push(MachineSettings::new(MachineId(id), face));
/// }
/// let mut state = PolicyState::new(Tree::new(settings)?);
/// let machine = |id, consumed_mib, active_mib: i64| MachineView {
///     active: Some(Reading { bytes: active_mib << 20, age_ms: 0 }),
///     rungs: Rungs::NONE.with(Rung::Compress),
///     ..MachineView::new(MachineId(id), ByteCount::mib(consumed_mib))
/// };
/// let (total, used) = (ByteCount::mib(16 << 10), ByteCount::mib(15_984));
/// let view = HostView::of(0, total, used, vec![machine(1, 7680, 512), machine(2, 7680, 7680)]);
/// let plan = decide(&view, &mut state);
/// // 400 MiB free are too few for a host of 16 GiB, which keeps 655: the idle machine gives what is missing.
/// let [first, ..] = &plan.actions[..] else { panic!("nothing to do") };
/// assert_eq!(first.machine, MachineId(1));
/// assert!(plan.actions.iter().all(|action| !matches!(
///     (action.machine, action.step), (MachineId(2), Step::Take { .. })
/// )));
/// let taken: Vec<String> = plan.actions.iter()
///     .filter(|action| matches!(action.step, Step::Take { .. }))
///     .map(|action| action.reason.to_string())
///     .collect();
/// assert_eq!(taken, [
///     "it is taken from by compressing pages: its target is 7.2G, it has 7.5G, uses 512M (sampled) and wants 7.5G; \
///      this costs 33 us a freed page where 10 % come back; the host is soft, 400M free of 655.3M that are to be"
/// ]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn decide(view: &HostView, state: &mut PolicyState) -> Plan {
    let mut findings = Findings::default();
    let host = look::at_host(view, state, &mut findings);
    let seen = look::at_machines(view, &host, state, &mut findings);
    let budget = targets::budget(&host, view, &seen);
    state.lately = Some(Lately::with(state.lately, (host.total, seen.len()), budget, host.now_ms));
    let entitled = targets::entitle(budget, &seen, &state.tree, &mut findings);
    let aims = targets::aim(&host, budget, &seen, state, &mut findings);
    moves::take(&host, &seen, &aims, state, &mut findings);
    moves::give(&host, &seen, &aims, state, &mut findings);
    let machines = targets::positions(&seen, &entitled, &aims);
    let Findings { actions, notes } = findings;
    Plan { state: host.state, budget: budget.bytes(), actions, reasons: notes, machines }
}
