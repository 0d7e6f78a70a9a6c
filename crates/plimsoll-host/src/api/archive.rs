//! What is kept of past decisions: each machine's last reasons, its last minutes, and what only grows.
//!
//! Enters: moments, on the API's thread. Leaves: answers about the past, and events for whoever listens. All of it is bounded by the
//! number of machines, and forgets a machine with its going. It begins anew with each manager.
use super::exchange::Moment;
use crate::why::{Entry, add_each};
use plimsoll_policy::{Reason, Step};
use plimsoll_types::MachineId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use utoipa::ToSchema;

/// Reasons kept of a machine: 16 of half a KiB are 8 MiB for a thousand machines.
pub(super) const ENTRIES_MAX: usize = 16;
/// Samples kept of a machine: ten minutes, 6 MiB for a thousand machines that are never alike twice. Of those that are, one is kept.
const SAMPLES_MAX: usize = 120;
/// Between two of them.
const SAMPLE_EVERY_MS: u64 = 5_000;

/// A machine at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sample {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// What it took up.
    pub consumed_bytes: u64,
    /// What it used.
    pub active_bytes: u64,
    /// What it was to come to.
    pub target_bytes: u64,
    /// How much of the second before its processors waited for memory, in millionths.
    pub stalled_ppm: u32,
}

/// What happened, for whoever listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Happening {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The machine it is about; nothing for the host.
    pub machine: Option<String>,
    /// What was done; nothing for what was only found.
    #[schema(value_type = Value)]
    pub step: Option<Step>,
    /// Why, or what was found, as a sentence.
    pub sentence: String,
}

/// What only grows, of one machine, since it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) taken_pages: u64,
    pub(crate) returned_pages: u64,
}

/// Samples one after the other that differ in their time alone.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    first: Sample,
    last_ms: u64,
    /// At least one.
    samples: usize,
}

impl Stretch {
    const fn of(sample: Sample) -> Self {
        Self { first: sample, last_ms: sample.unix_ms, samples: 1 }
    }

    /// Takes one more in, where it is like those.
    fn extend(&mut self, sample: Sample) -> bool {
        let is_alike = Sample { unix_ms: self.first.unix_ms, ..sample } == self.first;
        // Between a clock that was set and the one before nothing is even.
        let gap_ms = sample.unix_ms.checked_sub(self.last_ms);
        let is_one_more = is_alike && gap_ms.is_some_and(|gap| gap <= 4 * SAMPLE_EVERY_MS);
        if is_one_more {
            (self.last_ms, self.samples) = (sample.unix_ms, self.samples + 1);
        }
        is_one_more
    }

    /// As they were, evenly between the first and the last.
    fn samples(self) -> impl Iterator<Item = Sample> {
        (0..self.samples).map(move |number| Sample { unix_ms: self.time_of(number), ..self.first })
    }

    fn time_of(&self, number: usize) -> u64 {
        let spans = (self.samples - 1).max(1) as u64;
        let (start, all) = (self.first.unix_ms, self.last_ms - self.first.unix_ms);
        start + u64::try_from(u128::from(all) * number as u128 / u128::from(spans)).unwrap_or(all)
    }

    /// Lets the first of several go.
    fn shorten(&mut self) {
        self.first.unix_ms = self.time_of(1);
        self.samples -= 1;
    }
}

#[derive(Debug, Default)]
struct Past {
    entries: VecDeque<Entry>,
    samples: VecDeque<Stretch>,
    /// When the last sample was kept, by the loop's own clock: the host's may be set.
    sampled_ms: Option<u64>,
    counts: Counts,
}

impl Past {
    fn keep(&mut self, sample: Sample) {
        if !self.samples.back_mut().is_some_and(|last| last.extend(sample)) {
            self.samples.push_back(Stretch::of(sample));
        }
        let kept: usize = self.samples.iter().map(|stretch| stretch.samples).sum();
        if kept > SAMPLES_MAX {
            match self.samples.front_mut() {
                Some(first) if first.samples > 1 => first.shorten(),
                _ => drop(self.samples.pop_front()),
            }
        }
    }
}

/// The past of a host.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    machines: BTreeMap<MachineId, Past>,
    pub(crate) decisions: u64,
    pub(crate) actions: u64,
}

impl Archive {
    /// Takes a moment in, and says what happened in it.
    pub(super) fn add(&mut self, moment: &Moment) -> Vec<Happening> {
        let tick = &moment.tick;
        self.machines.retain(|id, _| moment.berths.contains_key(id));
        self.decisions += 1;
        self.actions += u64::try_from(tick.plan.actions.len()).unwrap_or(u64::MAX);
        // By machine, so that a host of a thousand is gone through once.
        let mut said: BTreeMap<MachineId, Vec<(Option<Step>, Reason)>> = BTreeMap::new();
        for action in &tick.plan.actions {
            said.entry(action.machine).or_default().push((Some(action.step), action.reason));
        }
        for note in &tick.plan.reasons {
            if let Some(id) = note.machine {
                said.entry(id).or_default().push((None, note.reason));
            }
        }
        let positions = tick.plan.machines.iter().map(|position| (position.machine, position));
        let positions: BTreeMap<_, _> = positions.collect();
        for view in &tick.view.machines {
            let past = self.machines.entry(view.id).or_default();
            past.counts.taken_pages += view.taken.0;
            past.counts.returned_pages += view.returned.0;
            if let Some(said) = said.remove(&view.id) {
                add_each(&mut past.entries, view.id, tick, said.into_iter());
                past.entries.drain(..past.entries.len().saturating_sub(ENTRIES_MAX));
            }
            let now_ms = tick.view.now_ms;
            let is_due = past.sampled_ms.is_none_or(|last| now_ms.saturating_sub(last) >= SAMPLE_EVERY_MS);
            if let Some(position) = positions.get(&view.id).filter(|_| is_due) {
                past.sampled_ms = Some(now_ms);
                past.keep(Sample {
                    unix_ms: moment.unix_ms,
                    consumed_bytes: position.consumed.0,
                    active_bytes: position.active.0,
                    target_bytes: position.target.0,
                    stalled_ppm: view.stalled.0,
                });
            }
        }
        happened(moment)
    }

    /// The last reasons of a machine, the newest last.
    pub(super) fn entries(&self, id: MachineId) -> Vec<Entry> {
        self.machines.get(&id).map(|past| past.entries.iter().cloned().collect()).unwrap_or_default()
    }

    /// The last reason of a machine, as a sentence.
    pub(super) fn reason(&self, id: MachineId) -> Option<String> {
        self.machines.get(&id)?.entries.back().map(|entry| entry.sentence.clone())
    }

    /// The last minutes of a machine, the newest last.
    pub(super) fn samples(&self, id: MachineId) -> Vec<Sample> {
        let past = self.machines.get(&id);
        past.map(|past| past.samples.iter().flat_map(|stretch| stretch.samples()).collect())
            .unwrap_or_default()
    }

    pub(crate) fn counts(&self, id: MachineId) -> Counts {
        self.machines.get(&id).map(|past| past.counts).unwrap_or_default()
    }
}

/// What is told to whoever listens: what was done, and what an operator should hear. What only goes on is not.
fn happened(moment: &Moment) -> Vec<Happening> {
    let unix_ms = moment.unix_ms;
    let actions = moment.tick.plan.actions.iter().map(|action| Happening {
        unix_ms,
        machine: moment.name(action.machine),
        step: Some(action.step),
        sentence: action.reason.to_string(),
    });
    let of_host = moment.tick.plan.reasons.iter().filter(|note| note.machine.is_none());
    let of_host = of_host.map(|note| note.reason.to_string());
    let texts = moment.events.iter().cloned().chain(of_host);
    actions.chain(texts.map(|sentence| Happening { unix_ms, machine: None, step: None, sentence })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Done, Trouble};
    use crate::config::MachineConfig;
    use crate::control::{Control, Pool};
    use crate::stores::Stores;
    use plimsoll_policy::settings::Settings;
    use plimsoll_policy::view::MachineView;
    use plimsoll_types::ByteCount;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    struct Idle;

    impl Backend for Idle {
        fn observe(&mut self, id: MachineId, _now: Instant) -> Result<MachineView, Trouble> {
            Ok(MachineView::new(id, ByteCount::mib(1)))
        }

        fn apply(&mut self, steps: &[Step], _now: Instant) -> Vec<Done> {
            steps.iter().map(|_| Done::Begun).collect()
        }
    }

    #[test]
    fn history_goes_on_when_the_clock_is_set_back() {
        let (budget, began) = (ByteCount::mib(64), Instant::now());
        let mut control = Control::new(Settings::new(budget), Pool::of(budget), ByteCount(0), began).unwrap();
        let settings = MachineConfig::default().settings(MachineId(0), ByteCount::mib(32));
        let id = control.admit("m", settings, Box::new(Idle)).unwrap();
        let mut archive = Archive::default();
        let clock = [10_000_000, 10_005_000, 1_000, 6_000, 99_000_000];
        for (turn, unix_ms) in (0..).zip(clock) {
            let turn = control.turn(began + Duration::from_secs(5) * turn);
            archive.add(&Moment {
                rules: BTreeMap::new(),
                unix_ms,
                tick: control.tick(&turn),
                events: Vec::new(),
                tree: Arc::new(control.tree().clone()),
                groups: Arc::default(),
                berths: control.berths(),
                waiting: Vec::new(),
                own: ByteCount(0),
                stores: Stores::default(),
            });
        }
        let kept: Vec<u64> = archive.samples(id).iter().map(|sample| sample.unix_ms).collect();
        assert_eq!(kept, clock);
    }

    #[test]
    fn a_machine_that_stays_as_it_is_has_as_many_samples_as_any_and_takes_the_room_of_one() {
        let sample = |at: u64, consumed_bytes| Sample {
            unix_ms: 1_000_000 + 5_000 * at,
            consumed_bytes,
            active_bytes: 0,
            target_bytes: 7,
            stalled_ppm: 0,
        };
        let of = |past: &Past| past.samples.iter().flat_map(|stretch| stretch.samples()).collect::<Vec<_>>();
        let mut past = Past::default();
        (0..130).for_each(|at| past.keep(sample(at, 1)));
        assert_eq!(past.samples.len(), 1);
        assert_eq!(of(&past), (10..130).map(|at| sample(at, 1)).collect::<Vec<_>>());
        (130..249).for_each(|at| past.keep(sample(at, at)));
        assert_eq!(past.samples.len(), 120);
        let mut expected = vec![sample(129, 1)];
        expected.extend((130..249).map(|at| sample(at, at)));
        assert_eq!(of(&past), expected, "the oldest go first, one by one");
        past.keep(sample(0, 248));
        assert_eq!(of(&past).last(), Some(&sample(0, 248)), "also when the clock was set back");
    }
}
