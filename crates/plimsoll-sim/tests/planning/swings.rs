//! Targets that move back and forth in the shipped scenarios do so only because what is due to their machine does.
//!
//! What is due is what a machine's demand comes to beside all others', undamped: it is in the plan wherever it is not the
//! target. A target goes towards it and never past it, so it can swing for no other reason; how often it has to is here.
use crate::shipped;
use plimsoll_policy::damper::{DEAD_BAND, REVERSAL_MS};
use plimsoll_policy::{Plan, Reason};
use plimsoll_sim::Scenario;
use plimsoll_sim::fleet::Stage;
use plimsoll_sim::host::LONGEST;
use plimsoll_sim::time::Millis;
use plimsoll_types::{ByteCount, MachineId};
use std::collections::{BTreeMap, VecDeque};

/// What came after what, of the last while.
#[derive(Default)]
struct Past(VecDeque<(u64, ByteCount)>);

impl Past {
    fn next(&mut self, now_ms: u64, amount: ByteCount, lasts_ms: u64) {
        if self.0.back().is_none_or(|(_, last)| *last != amount) {
            self.0.push_back((now_ms, amount));
        }
        // The one before the first move of that while is where it moved from.
        while self.0.get(1).is_some_and(|(moved_ms, _)| now_ms - moved_ms >= lasts_ms) {
            self.0.pop_front();
        }
    }

    /// The less of what it rose and what it sank, and the highest it was.
    fn swing(&self) -> (ByteCount, ByteCount) {
        let pairs = || self.0.iter().zip(self.0.iter().skip(1)).map(|((_, from), (_, to))| (*from, *to));
        let up = pairs().map(|(from, to)| to.saturating_sub(from)).sum::<ByteCount>();
        let down = pairs().map(|(from, to)| from.saturating_sub(to)).sum();
        (up.min(down), self.0.iter().map(|(_, amount)| *amount).max().unwrap_or_default())
    }
}

/// What each machine is due by a plan, damped by nothing.
fn dues(plan: &Plan) -> BTreeMap<MachineId, ByteCount> {
    let mut dues: BTreeMap<_, _> = plan.machines.iter().map(|one| (one.machine, one.target)).collect();
    for action in &plan.actions {
        if let Reason::TargetMoved { due, .. } = action.reason {
            dues.insert(action.machine, due);
        }
    }
    for note in &plan.reasons {
        if let (Some(machine), Reason::TargetHeld { due, .. }) = (note.machine, note.reason) {
            dues.insert(machine, due);
        }
    }
    dues
}

/// How often targets swing, and how often one does of a machine whose due does not.
fn swings(scenario: &Scenario) -> (u32, u32) {
    let (mut all, mut ours) = (0, 0);
    for host in 0.. {
        let Some(stage) = Stage::of(scenario, host).unwrap() else { return (all, ours) };
        let mut pasts: BTreeMap<MachineId, (Past, Past)> = BTreeMap::new();
        stage.run(LONGEST, &mut |_, view, plan| {
            let dues = dues(plan);
            // One that starts again is another one.
            pasts.retain(|id, _| dues.contains_key(id));
            for one in &plan.machines {
                let (target, due) = pasts.entry(one.machine).or_default();
                target.next(view.now_ms, one.target, REVERSAL_MS);
                // A target that was held follows what has been due for a minute.
                due.next(view.now_ms, dues[&one.machine], 2 * REVERSAL_MS);
                let ((swing, highest), (dues_swing, _)) = (target.swing(), due.swing());
                if swing.0 > DEAD_BAND.apply(highest.0) {
                    all += 1;
                    // What it shivered before it moved with its due is not what it swings by.
                    ours += u32::from(swing.0 - dues_swing.0.min(swing.0) > DEAD_BAND.apply(highest.0) / 5);
                    *target = Past::default();
                }
            }
        });
    }
    unreachable!("there are no more hosts than can be counted")
}

#[test]
fn what_swings_in_the_shipped_scenarios_is_what_is_due_and_no_target_of_its_own() {
    let hours = |name, hours: u64| Scenario { duration: Millis(hours * 3_600_000), ..shipped(name) };
    for (scenario, most) in [
        (hours("idle-fleet", 1), 16),
        (hours("boot-storm", 2), 19),
        (hours("leak", 18), 0),
        (hours("noisy-neighbour", 6), 6),
        (hours("restart-under-pressure", 2), 5),
        (hours("daily-cycle", 24), 0),
    ] {
        let (all, ours) = swings(&scenario);
        println!("{}: {all} swings, {ours} of them of targets alone", scenario.title);
        assert!(all <= most && ours == 0, "{}: {all} swings, {ours} of targets alone", scenario.title);
    }
}
