//! Recorded decisions: demands to simulate, and a reality to hold the simulation against.
//!
//! Enters: a file that `plimsoll manage --record` has written. Leaves: what each machine demanded, and what a simulation of
//! those demands comes to beside what really came. The file is JSON lines in a zstd frame, or bare: a line is
//! `{"begin": ...}`, `{"settings": {"state", "names", "own"}}` or `{"tick": {"view", "plan", ...}}`; what else is in
//! them is not needed here.
//!
//! What a guest keeps is not on record: it is what it has in RAM, and what its compressed pages were before, at the costs of
//! the record's settings. Pages on a disk are not seen, so a record of a host that uses one shows too little.
use crate::comparison::{Comparison, Pairs};
use crate::demand::{Curve, Demand, Locality, Track};
use crate::host::{Host, Placed, SECOND};
use crate::machine::{Begin, Boot, Class, Estimator, Keeper, Physics};
use crate::scenario::{Hosts, Order, Placement, Scenario};
use crate::time::Millis;
use plimsoll_policy::Costs;
use plimsoll_policy::admission::{Capacity, Overheads};
use plimsoll_policy::settings::MachineSettings;
use plimsoll_policy::view::{HostView, MachineView};
use plimsoll_policy::{Plan, PolicyState, Ppm, Rung, Rungs, Step};
use plimsoll_types::{ByteCount, MachineId, PageCount};
use serde::Deserialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

/// How a zstd frame begins (RFC 8878, 3.1.1).
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// The newest form that is read.
const VERSION: u32 = 2;

/// A record cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TraceError {
    /// It cannot be read.
    #[error("the record {file} cannot be read")]
    Unreadable {
        /// Which one.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is not what a recorder writes.
    #[error(
        "line {line} of {file} is no record of decisions: give a file that `plimsoll manage --record` has written"
    )]
    Foreign {
        /// Which file.
        file: String,
        /// Its line, from 1.
        line: usize,
        /// What was found.
        #[source]
        source: serde_json::Error,
    },
    /// It was made by a newer plimsoll.
    #[error("{file} is a record of version {found}, and up to {VERSION} are read: use a newer plimsoll")]
    Newer {
        /// Which file.
        file: String,
        /// Its version.
        found: u32,
    },
    /// There is nothing to simulate in it.
    #[error("{file} holds no settings or fewer than two decisions: record for longer")]
    Empty {
        /// Which file.
        file: String,
    },
    /// It knows no such machine.
    #[error("{file} knows no machine {name}: it has {known}")]
    UnknownMachine {
        /// Which file.
        file: String,
        /// The name.
        name: String,
        /// Those it has.
        known: String,
    },
}

#[derive(Deserialize)]
struct Start {
    version: u32,
}

#[derive(Deserialize)]
struct Basis {
    state: PolicyState,
    #[serde(default)]
    names: Vec<(MachineId, String)>,
}

#[derive(Deserialize)]
struct Tick {
    view: HostView,
    plan: Plan,
    #[serde(default)]
    outcomes: Vec<Outcome>,
}

/// What became of a step; what else than this can be, and why, is the loop's.
#[derive(Deserialize)]
struct Outcome {
    machine: MachineId,
    step: Step,
    done: serde_json::Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Begin(Start),
    Settings(Box<Basis>),
    Tick(Box<Tick>),
}

/// What was recorded, up to the first change of settings.
pub struct Record {
    file: String,
    basis: Basis,
    ticks: Vec<Tick>,
}

impl Record {
    /// Reads a record. One that was cut off is used as far as it goes.
    ///
    /// # Errors
    /// See [`TraceError`].
    pub fn read(path: &Path) -> Result<Self, TraceError> {
        let file = path.display().to_string();
        let unreadable = |source| TraceError::Unreadable { file: file.clone(), source };
        let mut bytes = BufReader::new(File::open(path).map_err(unreadable)?);
        let is_packed = bytes.fill_buf().map_err(unreadable)?.starts_with(&MAGIC);
        let bytes: Box<dyn Read> = if is_packed {
            Box::new(zstd::stream::read::Decoder::new(bytes).map_err(unreadable)?)
        } else {
            Box::new(bytes)
        };
        let (mut basis, mut ticks) = (None, Vec::new());
        for (line, number) in BufReader::new(bytes).lines().zip(1..) {
            let line = match line {
                Ok(line) => line,
                // Its recorder was killed: what was flushed is whole.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(source) => return Err(unreadable(source)),
            };
            let foreign = |source| TraceError::Foreign { file: file.clone(), line: number, source };
            match serde_json::from_str(&line).map_err(foreign)? {
                Line::Begin(Start { version }) if version > VERSION => {
                    return Err(TraceError::Newer { file, found: version });
                }
                Line::Begin(_) => {}
                // Machines that come and go are on the record of the loop, and no demand.
                Line::Settings(_) if !ticks.is_empty() => break,
                Line::Settings(settings) => basis = Some(*settings),
                Line::Tick(tick) => ticks.push(*tick),
            }
        }
        match basis {
            Some(basis) if ticks.len() > 1 => Ok(Self { file, basis, ticks }),
            _ => Err(TraceError::Empty { file }),
        }
    }

    /// What a machine demanded, from the start of the record.
    ///
    /// # Errors
    /// [`TraceError::UnknownMachine`].
    pub fn track(&self, name: &str) -> Result<Track, TraceError> {
        let named = self.basis.names.iter().find(|(_, given)| given == name).map(|(id, _)| *id);
        let id = named.or_else(|| self.ids().find(|id| id.to_string() == name));
        id.map(|id| self.track_of(id)).ok_or_else(|| {
            let known: Vec<String> = self.ids().map(|id| self.name_of(id)).collect();
            TraceError::UnknownMachine {
                file: self.file.clone(),
                name: name.to_owned(),
                known: known.join(", "),
            }
        })
    }

    fn ids(&self) -> impl Iterator<Item = MachineId> {
        self.basis.state.tree().machines().map(|(id, _)| id)
    }

    fn name_of(&self, id: MachineId) -> String {
        let named = self.basis.names.iter().find(|(machine, _)| *machine == id);
        named.map_or_else(|| id.to_string(), |(_, name)| name.clone())
    }

    fn start_ms(&self) -> u64 {
        self.ticks.first().map_or(0, |tick| tick.view.now_ms)
    }

    fn at(&self, tick: &Tick) -> Millis {
        Millis(tick.view.now_ms.saturating_sub(self.start_ms()))
    }

    fn length(&self) -> Millis {
        self.ticks.last().map_or(Millis(0), |tick| self.at(tick))
    }

    fn views(&self, id: MachineId) -> impl Iterator<Item = (Millis, &MachineView)> {
        self.ticks.iter().filter_map(move |tick| {
            let machine = tick.view.machines.iter().find(|machine| machine.id == id)?;
            Some((self.at(tick), machine))
        })
    }

    fn track_of(&self, id: MachineId) -> Track {
        let costs = &self.basis.state.tree().settings().costs;
        let demand = |(at, view): (Millis, &MachineView)| {
            let sampled = view.active.and_then(|reading| u64::try_from(reading.bytes).ok()).map(ByteCount);
            let kept = places(view, costs);
            let keeps = (kept.resident + kept.stored).saturating_sub(view.reported_free.pages_ceil());
            let active = sampled.unwrap_or(view.consumed).pages_ceil().min(keeps);
            (at, Demand { active, keeps: Some(keeps) })
        };
        let mut track: Vec<(Millis, Demand)> = self.views(id).map(demand).collect();
        // Only what changed is an event.
        track.dedup_by_key(|(_, demand)| *demand);
        Track(track)
    }

    /// The host of the record, with the demands that were recorded.
    fn scenario(&self) -> Scenario {
        let settings = self.basis.state.tree().settings();
        let view = &self.ticks[0].view;
        let consumed: ByteCount = view.machines.iter().map(|machine| machine.consumed).sum();
        // Measured, so that whatever else uses the host's memory needs no estimate.
        let own = (view.total + view.overdrawn).saturating_sub(view.free + consumed);
        let none =
            Overheads { tables_per_page: 0, page_tables_per_page: 0, store_per_page: 0, vmm: ByteCount(0) };
        // Up to and with the first second that is not before the last decision.
        let duration = Millis(self.length().0.next_multiple_of(SECOND.0) + 1);
        let class = |(index, machine): (usize, &MachineSettings)| self.class(index, machine, &settings.costs);
        Scenario {
            title: format!("The host of {}", self.file),
            seed: 1,
            duration,
            hosts: Hosts { count: 1, capacity: Capacity { total: view.total, own, overheads: none } },
            placement: Placement { order: Order::FirstFit, overcommit: None, within: Millis(0) },
            physics: Physics {
                costs: settings.costs,
                mistakes: Physics::MISTAKES_USUAL,
                takers: Physics::TAKERS_USUAL,
            },
            estimator: Estimator { period: Millis(10_000), samples: 100 },
            tax: settings.tax,
            groups: settings.groups.iter().map(|group| (group.id.to_string(), *group)).collect(),
            classes: settings.machines.iter().enumerate().map(class).collect(),
            restarts: Vec::new(),
        }
    }

    fn class(&self, index: usize, settings: &MachineSettings, costs: &Costs) -> Class {
        let first = self.views(settings.id).next();
        let begin =
            first.map_or(Begin::Booting, |(at, view)| Begin::Running { at, places: places(view, costs) });
        let rungs = first.map_or(Rungs::NONE, |(_, view)| view.rungs);
        Class {
            index,
            name: self.name_of(settings.id),
            count: 1,
            group: settings.parent,
            face: settings.face,
            highest: settings.highest,
            objective: settings.stall_objective,
            rungs,
            curve: Curve::Trace(Arc::new(self.track_of(settings.id))),
            keeps: None,
            touches: Class::TOUCHES_USUAL,
            locality: Locality::zipf(Class::SKEW_USUAL),
            grows: Class::GROWS_USUAL.pages_floor(),
            processors: Class::PROCESSORS_USUAL,
            twins: Ppm::ZERO,
            boot: Boot { lasts: Millis(0), touches: PageCount(0) },
            begin,
            keeper: self.keeper_of(settings.id),
        }
    }

    /// A machine that was to wait and could not is the kernel's.
    fn keeper_of(&self, id: MachineId) -> Keeper {
        let mut outcomes = self.ticks.iter().flat_map(|tick| &tick.outcomes);
        let is_refused = |one: &Outcome| one.machine == id && one.step == Step::Stall && one.done != "Begun";
        if outcomes.any(is_refused) { Keeper::Kernel } else { Keeper::Pager }
    }

    /// Simulates the record's host with the record's demands, and holds it against the record.
    pub fn compare(&self) -> Comparison {
        let scenario = self.scenario();
        let tree = self.basis.state.tree().clone();
        let placed: Vec<Placed> = scenario
            .classes
            .iter()
            .zip(&tree.settings().machines)
            .map(|(class, machine)| Placed { id: machine.id, class: class.index })
            .collect();
        let mut pairs = Pairs::default();
        let mut next = self.ticks.iter().peekable();
        Host::new(&scenario, 0, tree, &placed).run(SECOND, &mut |_, view, plan| {
            pairs.would(view);
            // A host does not decide at whole seconds: with the nearest.
            while let Some(tick) = next.next_if(|tick| self.at(tick).0 <= view.now_ms + SECOND.0 / 2) {
                pairs.came(&tick.view);
                pairs.compare((&tick.view, &tick.plan), (view, plan));
            }
        });
        let tree = self.basis.state.tree();
        let size = |id| tree.terms(id).map_or(ByteCount(0), |terms| terms.size.bytes());
        Comparison {
            record: self.file.clone(),
            seconds: self.length().0 / 1000,
            machines: pairs.machines(|id| (self.name_of(id), size(id))),
        }
    }
}

/// Where a machine's pages are, by what is seen of it.
fn places(view: &MachineView, costs: &Costs) -> crate::machine::Seen {
    let keeps = u64::from(costs.of(Rung::Compress).keeps.0).max(1);
    let stored = u128::from(view.stored.0) * u128::from(Ppm::WHOLE.0) / u128::from(keeps);
    crate::machine::Seen {
        resident: view.consumed.saturating_sub(view.stored).pages_ceil(),
        stored: ByteCount(u64::try_from(stored).unwrap_or(u64::MAX)).pages_ceil(),
        balloon: view.balloon.unwrap_or_default().pages_floor(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_policy::tree::Tree;
    use std::fmt::Write as _;
    use std::io::Write as _;
    use std::path::PathBuf;

    /// A host on which two machines are compressed and one bursts.
    const SCENARIO: &str = r#"
title = "recorded"
duration = "20m"
seed = 3
hosts = { count = 1, memory = "8G" }
placement = { within = "2m" }
[[class]]
name = "steady"
count = 2
memory = { size = "4G", reservation = "512M" }
demand = { constant = { active = "1G" } }
keeps = "3G"
[[class]]
name = "burst"
count = 1
memory = { size = "4G", reservation = "512M" }
demand = { bursts = { low = "500M", high = "2G", every = "5m", lasts = "1m" } }
"#;

    /// Its decisions from the `from`th on, as a recorder writes them.
    fn recorded(from: usize) -> String {
        let scenario = Scenario::parse(SCENARIO, Path::new("")).unwrap();
        let placements = crate::placement::place(&scenario).unwrap();
        let loaded = placements.hosts.into_iter().next().unwrap();
        let tree: Tree = loaded.tree.clone();
        let mut lines = String::from("{\"begin\":{\"version\":1,\"by\":\"test\"}}\n");
        let basis = serde_json::json!({
            "settings": {"state": PolicyState::new(tree.clone()), "names": [[3, "noisy"]], "own": 1 << 30}
        });
        writeln!(lines, "{basis}").unwrap();
        let mut count = 0;
        Host::new(&scenario, 0, tree, &loaded.placed).run(SECOND, &mut |_, view, plan| {
            count += 1;
            if count > from {
                writeln!(
                    lines,
                    "{}",
                    serde_json::json!({"tick": {"view": view, "plan": plan, "outcomes": []}})
                )
                .unwrap();
            }
        });
        lines
    }

    fn written(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record");
        std::fs::write(&path, bytes).unwrap();
        (folder, path)
    }

    #[test]
    fn a_record_that_the_model_made_is_predicted_closely() {
        // From when all have booted on.
        let (_folder, path) = written(recorded(240).as_bytes());
        let comparison = Record::read(&path).unwrap().compare();
        assert_eq!(comparison.machines.len(), 3);
        for machine in &comparison.machines {
            assert!(machine.decisions > 900, "{comparison}");
            assert!(machine.consumed.apart_ppm.unwrap() < Ppm::percent(5).0, "{comparison}");
            assert!(machine.stall.recorded.abs_diff(machine.stall.predicted) < 10_000, "{comparison}");
        }
        let noisy = comparison.machines.iter().find(|machine| machine.machine == "noisy").unwrap();
        assert!(noisy.consumed.recorded > 0 && comparison.to_string().contains("noisy"));
    }

    #[test]
    fn a_packed_record_that_was_cut_off_is_read_as_far_as_it_goes() {
        let whole = recorded(1100);
        // Flushed after each decision, as a recorder does.
        let mut packer = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        for line in whole.split_inclusive('\n') {
            packer.write_all(line.as_bytes()).unwrap();
            packer.flush().unwrap();
        }
        let packed = packer.finish().unwrap();
        let ticks = |bytes: &[u8]| {
            let (_folder, path) = written(bytes);
            Record::read(&path).map(|record| record.ticks.len())
        };
        assert_eq!(ticks(whole.as_bytes()).unwrap(), 100);
        assert_eq!(ticks(&packed).unwrap(), 100);
        assert!((1..100).contains(&ticks(&packed[..packed.len() * 9 / 10]).unwrap()));
    }

    #[test]
    fn a_demand_is_that_of_the_record() {
        let (_folder, path) = written(recorded(240).as_bytes());
        let track = Record::read(&path).unwrap().track("noisy").unwrap();
        let most = track.0.iter().map(|(_, demand)| demand.active).max().unwrap().bytes();
        assert!((ByteCount::mib(1500)..=ByteCount::mib(2600)).contains(&most), "{most}");
        let error = Record::read(&path).unwrap().track("nobody").unwrap_err();
        assert!(error.to_string().ends_with("knows no machine nobody: it has vm1, vm2, noisy"), "{error}");
    }

    #[test]
    fn what_is_no_record_is_refused_with_its_line() {
        for (text, sentence) in [
            ("", "holds no settings or fewer than two decisions"),
            ("hello\n", "line 1 of"),
            ("{\"begin\":{\"version\":9}}\n", "is a record of version 9"),
            ("{\"begin\":{\"version\":1}}\n{\"tick\":{}}\n", "line 2 of"),
        ] {
            let (_folder, path) = written(text.as_bytes());
            let Err(error) = Record::read(&path) else { panic!("{text:?} was read") };
            assert!(error.to_string().contains(sentence), "{text:?}: {error}");
        }
    }
}
