//! Looking: what the host shows, checked and held against what is remembered.
//!
//! Enters: a view. Leaves: the host and the machines that can be decided about, by id, and a note for each thing that
//! could not be believed. A machine that cannot be believed at all is left out: its memory is then no part of any sum,
//! and nobody gains or loses by it.
use super::{Findings, Host, PolicyState, Remembered};
use crate::balloon::{Balloon, Standing};
use crate::demand::{Demand, Number, SampleFault, Use, check_consumed, startup};
use crate::part::Ppm;
use crate::reason::{self, Reason, Room};
use crate::settings;
use crate::stall::Stall;
use crate::view::{HostView, MachineView};
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, MachineId, PageCount};

/// A machine that can be decided about.
#[derive(Clone, Debug)]
pub(crate) struct Seen<'a> {
    pub(crate) view: &'a MachineView,
    /// Its place in the tree.
    pub(crate) place: usize,
    pub(crate) terms: settings::Terms,
    pub(crate) demand: Demand,
    /// What its floor is raised by.
    pub(crate) lift: PageCount,
    /// Its processors wait longer than promised.
    pub(crate) stalls: bool,
    /// What its balloon is worth, if it has one.
    pub(crate) balloon: Option<Standing>,
}

impl Seen<'_> {
    pub(crate) const fn id(&self) -> MachineId {
        self.view.id
    }

    pub(crate) fn need(&self) -> reason::Need {
        let Demand { active, wanted, basis } = self.demand;
        reason::Need { consumed: self.view.consumed, active: active.bytes(), wanted: wanted.bytes(), basis }
    }

    /// What it has a right to whatever the others want, while it starts too.
    pub(crate) fn kept(&self) -> PageCount {
        self.terms.floor.max(startup(self.view, &self.terms))
    }
}

/// Checks the host and moves its state on.
pub(crate) fn at_host(view: &HostView, state: &mut PolicyState, findings: &mut Findings) -> Host {
    let (now_ms, total, free) = (view.now_ms, view.total, view.free.min(view.total));
    if view.free > total {
        findings.note_host(Reason::FreeAboveTotal { free: view.free, total });
    }
    let before_ms = state.decided_ms.unwrap_or(now_ms);
    if now_ms < before_ms {
        findings.note_host(Reason::ClockWentBack { from_ms: before_ms, to_ms: now_ms });
        state.lately = None;
    }
    // Whoever went back stays there until the clock has caught up: what was remembered is not from the future.
    let now_ms = now_ms.max(before_ms);
    let before = state.host;
    state.host = before.next(free, total);
    state.decided_ms = Some(now_ms);
    let (elapsed_ms, overdrawn) = (now_ms - before_ms, view.overdrawn);
    let host = Host { now_ms, elapsed_ms, total, free, overdrawn, state: state.host };
    if state.host != before {
        findings.note_host(Reason::StateChanged { from: before, room: host.room(state.host.line(total)) });
    }
    host
}

impl Host {
    pub(crate) const fn room(&self, line: ByteCount) -> Room {
        Room { state: self.state, free: self.free, line }
    }
}

/// The machines that can be decided about, by id.
pub(crate) fn at_machines<'a>(
    view: &'a HostView,
    host: &Host,
    state: &mut PolicyState,
    findings: &mut Findings,
) -> Vec<Seen<'a>> {
    let mut shown: Vec<&MachineView> = view.machines.iter().collect();
    shown.sort_by_key(|machine| machine.id);
    let mut seen = Vec::with_capacity(shown.len());
    let mut before = None;
    for machine in shown {
        let id = machine.id;
        if before.replace(id) == Some(id) {
            findings.note(id, Reason::ShownTwice);
            continue;
        }
        let Some(place) = state.tree.place(id) else {
            findings.note(id, Reason::UnknownMachine);
            continue;
        };
        let terms = state.tree.machines[place].terms;
        if let Err(fault) = check_consumed(machine, &terms) {
            findings.note(id, Reason::BadSample { fault });
            continue;
        }
        let remembered = state.machines.entry(id).or_insert_with(|| Remembered::new(host.now_ms));
        seen.push(at_machine(machine, place, terms, host, remembered, findings));
    }
    seen
}

fn at_machine<'a>(
    machine: &'a MachineView,
    place: usize,
    terms: settings::Terms,
    host: &Host,
    remembered: &mut Remembered,
    findings: &mut Findings,
) -> Seen<'a> {
    let mut faults = Vec::new();
    let demand = remembered.usage.look(machine, &terms, host.now_ms, host.elapsed_ms, &mut faults);
    // A share of time beyond all of it tells nothing: neither that it stalls nor that it does not.
    let stalls = if machine.stalled > Ppm::WHOLE {
        let (found, most) = (machine.stalled.0.into(), Ppm::WHOLE.0.into());
        faults.push(SampleFault::Absurd { number: Number::Stalled, found, most });
        false
    } else {
        let consumed = machine.consumed.pages_ceil();
        remembered.stall.look(machine.stalled, consumed, demand.wanted, &terms, host.elapsed_ms)
    };
    faults.into_iter().for_each(|fault| findings.note(machine.id, Reason::BadSample { fault }));
    let lift = remembered.stall.lift(terms.floor).max(startup(machine, &terms).saturating_sub(terms.floor));
    if stalls {
        findings.note(
            machine.id,
            Reason::OverObjective {
                stalled: machine.stalled,
                objective: terms.stall_objective,
                lift: lift.bytes(),
                appetite: remembered.stall.appetite(),
            },
        );
    }
    let balloon = machine.balloon.map(|held| {
        let balloon = remembered.balloon.get_or_insert_with(|| Balloon::new(held, host.now_ms));
        let standing = balloon.look(held, host.now_ms);
        if standing != Standing::Cooperative {
            let (asked, still_ms) = (balloon.asked(), balloon.still_ms(host.now_ms));
            findings.note(machine.id, Reason::BalloonStuck { standing, asked, held, still_ms });
        }
        standing
    });
    Seen { view: machine, place, terms, demand, lift, stalls, balloon }
}

impl Remembered {
    const fn new(now_ms: u64) -> Self {
        Self {
            usage: Use::new(now_ms),
            stall: Stall::new(),
            balloon: None,
            damper: None,
            is_stalled: false,
            sliver_ms: None,
        }
    }
}
