//! A host made of numbers: machines that grow into what they use, and give what is taken.
use plimsoll_host::backend::{Backend, Done, Refused, Trouble};
use plimsoll_host::control::{Control, Pool, Turn};
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::view::{MachineView, Reading};
use plimsoll_policy::{Costs, Rung, Rungs, Step};
use plimsoll_types::{ByteCount, MachineId};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(crate) const MIB: fn(u64) -> ByteCount = ByteCount::mib;
pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// What a machine has and does, seen and changed from both sides.
#[derive(Debug)]
pub(crate) struct Body {
    pub(crate) consumed: ByteCount,
    /// What it uses: it grows into it by as much a turn.
    pub(crate) active: i64,
    pub(crate) grows: ByteCount,
    pub(crate) trouble: Option<Trouble>,
    pub(crate) obeys: bool,
    pub(crate) steps: Vec<Step>,
    pub(crate) turns: usize,
    /// What a page that comes back is said to cost its guest.
    pub(crate) back_ns: Option<u64>,
}

pub(crate) type Shared = Arc<Mutex<Body>>;

pub(crate) struct Fake(pub(crate) Shared);

impl Backend for Fake {
    fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
        let mut body = self.0.lock().unwrap();
        if let Some(trouble) = &body.trouble {
            return Err(trouble.clone());
        }
        let wanted = ByteCount(u64::try_from(body.active).unwrap_or(0));
        body.consumed = body.consumed.max(wanted.min(body.consumed + body.grows));
        Ok(MachineView {
            active: Some(Reading { bytes: body.active, age_ms: 0 }),
            rungs: Rungs::NONE.with(Rung::Compress),
            ..MachineView::new(id, body.consumed)
        })
    }

    fn learn(&mut self, costs: &Costs) {
        self.0.lock().unwrap().back_ns = Some(costs.of(Rung::Compress).back_ns);
    }

    fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
        let mut body = self.0.lock().unwrap();
        body.turns += 1;
        body.steps = steps.to_vec();
        let mut apply = |step: &Step| match step {
            Step::Take { frees, .. } if body.obeys => {
                body.consumed = body.consumed.saturating_sub(*frees);
                Done::Begun
            }
            Step::Take { rung, .. } => Done::Refused(Refused::NoSuchRung(*rung)),
            _ => Done::Begun,
        };
        steps.iter().map(&mut apply).collect()
    }

    fn is_gone(&self) -> bool {
        matches!(self.0.lock().unwrap().trouble, Some(Trouble::Gone(_)))
    }
}

/// Counts what all bodies have, and something beside them.
pub(crate) struct Scale(pub(crate) Vec<Shared>, pub(crate) ByteCount);

impl Meter for Scale {
    fn used(&mut self) -> ByteCount {
        self.0.iter().map(|body| body.lock().unwrap().consumed).sum::<ByteCount>() + self.1
    }
}

/// Machines of a host, the loop, and its time.
pub(crate) struct Host {
    pub(crate) control: Control,
    pub(crate) bodies: Vec<Shared>,
    pub(crate) ids: Vec<MachineId>,
    pub(crate) now: Instant,
}

/// A machine of that size and reservation, in MiB.
pub(crate) fn settings(size: u64, reservation: u64) -> MachineSettings {
    let (size, reservation) = (MIB(size), MIB(reservation));
    let face = Face::Guarantee { size, reservation, limit: size, shares: Shares::NORMAL };
    MachineSettings::new(MachineId(0), face)
}

pub(crate) fn body(consumed: u64, active: u64) -> Shared {
    let active = i64::try_from(active << 20).unwrap();
    let (trouble, steps) = (None, Vec::new());
    let (consumed, grows) = (MIB(consumed), MIB(64));
    Arc::new(Mutex::new(Body {
        consumed,
        active,
        grows,
        trouble,
        obeys: true,
        steps,
        turns: 0,
        back_ns: None,
    }))
}

impl Host {
    /// `total` MiB for machines of (size, reservation, consumed, active), in MiB.
    pub(crate) fn new(total: u64, machines: &[(u64, u64, u64, u64)]) -> Self {
        let bodies: Vec<Shared> =
            machines.iter().map(|(_, _, consumed, active)| body(*consumed, *active)).collect();
        let pool = Pool::metered(MIB(total), Box::new(Scale(bodies.clone(), MIB(0))));
        let now = Instant::now();
        let mut control = Control::new(Settings::new(MIB(total)), pool, MIB(0), now).unwrap();
        let mut ids = Vec::new();
        for (place, (size, reservation, ..)) in machines.iter().enumerate() {
            let backend = Box::new(Fake(Arc::clone(&bodies[place])));
            ids.push(control.admit(&format!("m{place}"), settings(*size, *reservation), backend).unwrap());
        }
        Self { control, bodies, ids, now }
    }

    pub(crate) fn turn(&mut self) -> Turn {
        self.now += SECOND;
        self.control.turn(self.now)
    }

    pub(crate) fn consumed(&self, place: usize) -> ByteCount {
        self.bodies[place].lock().unwrap().consumed
    }

    pub(crate) fn set(&self, place: usize, change: impl FnOnce(&mut Body)) {
        change(&mut self.bodies[place].lock().unwrap());
    }
}

pub(crate) fn target(turn: &Turn, id: MachineId) -> ByteCount {
    turn.plan.machines.iter().find(|machine| machine.machine == id).unwrap().target
}
