//! A record held against a simulation of it.
//!
//! Enters: what was seen and decided on a host, and in a simulation of it, decision by decision. Leaves: for each machine and
//! quantity what came, what was predicted, and how wrong that was. What must not happen: means over other decisions
//! on one side than on the other.
use crate::record::{mean, ppm};
use plimsoll_policy::view::{HostView, MachineView};
use plimsoll_policy::{Plan, Ppm};
use plimsoll_types::{ByteCount, MachineId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;

/// What was predicted beside what came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// The record.
    pub record: String,
    /// Its length.
    pub seconds: u64,
    /// By machine.
    pub machines: Vec<MachineComparison>,
}

/// The same of a machine. Sizes are means over decisions, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MachineComparison {
    /// Its name.
    pub machine: String,
    /// Decisions that were compared.
    pub decisions: u64,
    /// What it took up.
    pub consumed: Compared,
    /// Of that, what was in its RAM.
    pub resident: Compared,
    /// Of that, what its compressed pages took up.
    pub stored: Compared,
    /// Its target.
    pub target: Compared,
    /// Pages that came back, in all.
    pub returned: Compared,
    /// The share of the time that it waited for memory, in millionths.
    pub stall: Compared,
}

/// A quantity, real and predicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// What came.
    pub recorded: u64,
    /// What was predicted.
    pub predicted: u64,
    /// By how much that was too much, in parts of what came; nothing where nothing came and something was predicted.
    pub error_ppm: Option<i64>,
    /// How far apart the two were, in parts of the machine's size: mean over decisions. For sizes only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apart_ppm: Option<u32>,
}

impl Compared {
    fn of([recorded, predicted]: [u64; 2], apart_ppm: Option<u32>) -> Self {
        let error = i128::from(predicted) - i128::from(recorded);
        let parts = (error * i128::from(Ppm::WHOLE.0)).checked_div(recorded.into());
        let error_ppm = match parts {
            Some(parts) => i64::try_from(parts).ok(),
            None => (error == 0).then_some(0),
        };
        Self { recorded, predicted, error_ppm, apart_ppm }
    }
}

/// Sizes of a machine at a decision: what it consumes, of that what is resident and stored, its target.
type Sizes = [u64; 4];

fn sizes(seen: &MachineView, plan: &Plan) -> Sizes {
    let position = plan.machines.iter().find(|position| position.machine == seen.id);
    let target = position.map_or(ByteCount(0), |position| position.target);
    [seen.consumed, seen.consumed.saturating_sub(seen.stored), seen.stored, target].map(|size| size.0)
}

/// Sums of one side: of sizes over the decisions that are compared, of what is counted over all.
#[derive(Clone, Copy, Debug, Default)]
struct Side {
    sizes: [u128; 4],
    returned: u64,
    stalled: u128,
    time_ms: u64,
    before_ms: Option<u64>,
}

impl Side {
    fn count(&mut self, seen: &MachineView, now_ms: u64) {
        // It was counted since the view before; what was before the first, the other side knows nothing of.
        let Some(before_ms) = self.before_ms.replace(now_ms) else { return };
        let elapsed_ms = now_ms.saturating_sub(before_ms);
        self.returned = self.returned.saturating_add(seen.returned.0);
        self.stalled += u128::from(seen.stalled.0) * u128::from(elapsed_ms);
        self.time_ms += elapsed_ms;
    }

    fn size(&mut self, sizes: Sizes) {
        self.sizes.iter_mut().zip(sizes).for_each(|(sum, size)| *sum += u128::from(size));
    }
}

/// Both sides of a machine.
#[derive(Clone, Copy, Debug, Default)]
struct Pair {
    count: u64,
    real: Side,
    predicted: Side,
    apart: [u128; 4],
}

impl Pair {
    fn of(&self, machine: String, size: ByteCount) -> MachineComparison {
        let sized = |which: usize| {
            let count = u128::from(self.count);
            let apart = ppm(self.apart[which], u128::from(size.0) * count).0;
            let means = [&self.real, &self.predicted].map(|side| mean(side.sizes[which], count));
            Compared::of(means, Some(apart))
        };
        let counted = |value: fn(&Side) -> u64| Compared::of([&self.real, &self.predicted].map(value), None);
        MachineComparison {
            machine,
            decisions: self.count,
            consumed: sized(0),
            resident: sized(1),
            stored: sized(2),
            target: sized(3),
            returned: counted(|side| side.returned),
            stall: counted(|side| mean(side.stalled, side.time_ms.into())),
        }
    }
}

/// What is compared, while it is.
#[derive(Debug, Default)]
pub(crate) struct Pairs(BTreeMap<MachineId, Pair>);

impl Pairs {
    /// What is counted in a view of the record.
    pub(crate) fn came(&mut self, view: &HostView) {
        self.count(view, |pair| &mut pair.real);
    }

    /// What is counted in a view of the simulation.
    pub(crate) fn would(&mut self, view: &HostView) {
        self.count(view, |pair| &mut pair.predicted);
    }

    fn count(&mut self, view: &HostView, side: fn(&mut Pair) -> &mut Side) {
        for seen in &view.machines {
            side(self.0.entry(seen.id).or_default()).count(seen, view.now_ms);
        }
    }

    /// A decision of the record, and the one of the simulation at that time.
    pub(crate) fn compare(&mut self, real: (&HostView, &Plan), predicted: (&HostView, &Plan)) {
        for would in &predicted.0.machines {
            let Some(came) = real.0.machines.iter().find(|came| came.id == would.id) else { continue };
            let pair = self.0.entry(would.id).or_default();
            let (is, was) = (sizes(would, predicted.1), sizes(came, real.1));
            pair.count += 1;
            pair.real.size(was);
            pair.predicted.size(is);
            for (sum, (is, was)) in pair.apart.iter_mut().zip(is.into_iter().zip(was)) {
                *sum += u128::from(is.abs_diff(was));
            }
        }
    }

    /// What came of it, with each machine's name and size.
    pub(crate) fn machines(
        &self,
        named: impl Fn(MachineId) -> (String, ByteCount),
    ) -> Vec<MachineComparison> {
        let of = |(id, pair): (&MachineId, &Pair)| {
            let (name, size) = named(*id);
            pair.of(name, size)
        };
        self.0.iter().filter(|(_, pair)| pair.count > 0).map(of).collect()
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} s, what came and what was predicted", self.record, self.seconds)?;
        for machine in &self.machines {
            let MachineComparison { consumed, resident, stored, target, returned, stall, .. } = machine;
            let size = |bytes: u64| ByteCount(bytes).to_string();
            let pages = |pages: u64| format!("{pages} pages");
            let part = |ppm: u64| Ppm(u32::try_from(ppm).unwrap_or(u32::MAX)).to_string();
            let (came, predicted, error, apart) = ("came", "predicted", "error", "apart by");
            writeln!(f, "\n{:<24.24} {came:>14} {predicted:>14} {error:>12} {apart:>12}", machine.machine)?;
            let rows = [
                ("takes up", consumed, &size as &dyn Fn(u64) -> String),
                ("  in its RAM", resident, &size),
                ("  compressed", stored, &size),
                ("target", target, &size),
                ("came back", returned, &pages),
                ("waited", stall, &part),
            ];
            for (what, compared, shown) in rows {
                let [came, predicted] = [compared.recorded, compared.predicted].map(shown);
                let error = compared.error_ppm.map_or_else(|| "-".to_owned(), signed);
                let apart = compared.apart_ppm.map_or_else(String::new, |ppm| tenths(ppm).to_string());
                let row = format!("{what:<24} {came:>14} {predicted:>14} {error:>12} {apart:>12}");
                writeln!(f, "{}", row.trim_end())?;
            }
        }
        Ok(())
    }
}

/// To a tenth of a hundredth: no model is better.
const fn tenths(ppm: u32) -> Ppm {
    Ppm(ppm / 1000 * 1000)
}

/// Beyond it an error is no number any more: the model is wrong.
const ERROR_MAX: Ppm = Ppm::percent(1000);

fn signed(ppm: i64) -> String {
    let size = tenths(u32::try_from(ppm.unsigned_abs()).unwrap_or(u32::MAX));
    match ppm {
        _ if size == Ppm::ZERO => size.to_string(),
        _ if size > ERROR_MAX => format!("> {ERROR_MAX}"),
        ..0 => format!("-{size}"),
        _ => format!("+{size}"),
    }
}
