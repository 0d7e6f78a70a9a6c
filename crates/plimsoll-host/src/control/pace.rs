//! How long a host on which nothing happens is left alone.
//!
//! Enters: what each turn saw and decided. Leaves: how long the next one may wait. What must never happen: a machine to which
//! something happened that waits longer for a decision than it ever would. So only turns that saw the very machines of the turn before,
//! on a host with room, and had nothing to do, make the next one rarer; and each second every machine is asked whether anything
//! may have happened to it, which takes nanoseconds where a look takes microseconds.
use super::PERIOD;
use plimsoll_policy::Plan;
use plimsoll_policy::host_state::HostState;
use plimsoll_policy::view::{HostView, MachineView};
use std::time::Instant;

/// How rarely is decided at most, in [`PERIOD`]s.
const RAREST: u32 = 4;

/// See the file's head.
#[derive(Debug)]
pub(super) struct Pace {
    /// As the last turn saw them.
    seen: Vec<MachineView>,
    /// From one turn to the next, in periods.
    periods: u32,
    /// When all machines are to be asked.
    asks_at: Instant,
}

impl Pace {
    pub(super) const fn new(now: Instant) -> Self {
        Self { seen: Vec::new(), periods: 1, asks_at: now }
    }

    /// A turn is over. Says when the next is due.
    pub(super) fn turned(
        &mut self,
        now: Instant,
        view: &HostView,
        plan: &Plan,
        is_in_motion: bool,
    ) -> Instant {
        let is_same = self.seen == view.machines;
        let has_room = plan.state == HostState::High;
        // Nobody could say that another machine has come where there is none.
        let is_calm =
            is_same && !view.machines.is_empty() && !is_in_motion && has_room && plan.actions.is_empty();
        self.periods = if is_calm { (self.periods * 2).min(RAREST) } else { 1 };
        if !is_same {
            self.seen.clone_from(&view.machines);
        }
        self.asks_at = now + PERIOD;
        now + PERIOD * self.periods
    }

    /// From one turn to the next.
    pub(super) const fn periods(&self) -> u32 {
        self.periods
    }

    /// Whether nothing has happened for a while.
    pub(super) const fn is_calm(&self) -> bool {
        self.periods > 1
    }

    /// Whether all machines are to be asked now, because the next turn is not due for longer.
    pub(super) fn is_to_ask(&mut self, now: Instant) -> bool {
        let is_to_ask = self.is_calm() && now >= self.asks_at;
        if is_to_ask {
            self.asks_at = now + PERIOD;
        }
        is_to_ask
    }

    /// Something happened to one of them.
    pub(super) const fn stir(&mut self) {
        self.periods = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_policy::{Action, Reason, Step};
    use plimsoll_types::{ByteCount, MachineId};

    fn view(consumed: u64) -> HostView {
        let machines = vec![MachineView::new(MachineId(1), ByteCount(consumed))];
        HostView::of(0, ByteCount::mib(64), ByteCount::mib(32), machines)
    }

    fn plan(state: HostState) -> Plan {
        let budget = ByteCount::mib(64);
        Plan { state, budget, actions: Vec::new(), reasons: Vec::new(), machines: Vec::new() }
    }

    #[test]
    fn turns_become_rarer_while_nothing_happens_on_a_host_with_room_and_not_otherwise() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let mut after = |view: &HostView, plan: &Plan, is_in_motion| {
            pace.turned(now, view, plan, is_in_motion).duration_since(now).as_secs()
        };
        let calm = plan(HostState::High);
        assert_eq!([1, 2, 4, 4].map(|_| after(&view(7), &calm, false)), [1, 2, 4, 4]);
        assert_eq!([after(&view(8), &calm, false), after(&view(8), &calm, false)], [1, 2], "it has grown");
        assert_eq!(after(&view(8), &plan(HostState::Clear), false), 1);
        assert_eq!(
            [after(&view(8), &calm, false), after(&view(8), &calm, true)],
            [2, 1],
            "something happens meanwhile"
        );
        let reason = Reason::ClockWentBack { from_ms: 1, to_ms: 0 };
        let action = Action { machine: MachineId(1), step: Step::Resume, reason };
        let busy = Plan { actions: vec![action], ..calm.clone() };
        assert_eq!([after(&view(8), &calm, false), after(&view(8), &busy, false)], [2, 1]);
        let empty = HostView { machines: Vec::new(), ..view(0) };
        assert_eq!([1, 1].map(|_| after(&empty, &calm, false)), [1, 1], "there is nobody to ask");
    }

    #[test]
    fn while_turns_are_rare_machines_are_asked_each_second() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        let (calm, view) = (plan(HostState::High), view(7));
        pace.turned(now, &view, &calm, false);
        assert!(!pace.is_to_ask(now + PERIOD), "a turn is due");
        pace.turned(now, &view, &calm, false);
        assert!(!pace.is_to_ask(now));
        assert!(pace.is_to_ask(now + PERIOD));
        assert!(!pace.is_to_ask(now + PERIOD));
        assert!(pace.is_to_ask(now + PERIOD * 2));
        pace.stir();
        assert!(!pace.is_to_ask(now + PERIOD * 3), "one has said so");
    }
}
