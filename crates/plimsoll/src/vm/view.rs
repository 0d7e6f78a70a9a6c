//! How machines are shown: a line each, or one at length.
use plimsoll_host::api::{Host, Machine, MachineKind, Pager, Settings, SettingsKind, Waiting};
use plimsoll_policy::Ppm;
use plimsoll_types::ByteCount;
use serde::Serialize;
use std::fmt;

/// All machines.
#[derive(Default, Serialize)]
pub(super) struct All {
    pub(super) machines: Vec<Machine>,
    pub(super) waiting: Vec<Waiting>,
}

/// One machine.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct One(pub(super) Machine);

/// A machine that was let go.
#[derive(Serialize)]
pub(super) struct Done {
    pub(super) released: String,
}

/// The host's memory.
#[derive(Serialize)]
#[serde(transparent)]
pub(super) struct Shared(pub(super) Host);

impl fmt::Display for All {
    /// At most 100 columns.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.machines.is_empty() && self.waiting.is_empty() {
            return writeln!(f, "no machine is managed: `plimsoll vm attach NAME` manages a running one");
        }
        writeln!(
            f,
            "{:<24} {:>8} {:<8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9}",
            "machine", "pid", "state", "size", "target", "takes up", "stored", "uses", "waits"
        )?;
        for machine in &self.machines {
            let pid = machine.pid.map(|pid| pid.to_string()).unwrap_or_default();
            let size = ByteCount(machine.size_bytes);
            write!(f, "{:<24.24} {pid:>8} {:<8} {size:>8}", machine.name, machine.state.text())?;
            match &machine.memory {
                Some(memory) => writeln!(
                    f,
                    " {:>8} {:>8} {:>8} {:>8} {:>9}",
                    ByteCount(memory.target_bytes),
                    ByteCount(memory.consumed_bytes),
                    ByteCount(memory.stored_bytes),
                    ByteCount(memory.active_bytes),
                    Ppm(memory.stalled_ppm).to_string()
                )?,
                None => writeln!(f)?,
            }
        }
        for Waiting { name, why } in &self.waiting {
            writeln!(
                f,
                "{name} is awaited{}",
                why.as_ref().map(|why| format!(": {why}")).unwrap_or_default()
            )?;
        }
        Ok(())
    }
}

impl fmt::Display for One {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.0;
        let kind = match machine.kind {
            MachineKind::Attached => "managed from outside",
            MachineKind::HandedOver => "handed over by its VMM",
        };
        let pid = machine.pid.map(|pid| format!(", process {pid}")).unwrap_or_default();
        writeln!(
            f,
            "{}: {}, {kind}{pid}, owns {}",
            machine.name,
            machine.state.text(),
            ByteCount(machine.size_bytes)
        )?;
        if let Some(trouble) = &machine.trouble {
            writeln!(f, "  {trouble}")?;
        }
        if let Some(memory) = &machine.memory {
            let mut rows = vec![
                ("takes up", memory.consumed_bytes, "compressed pages included"),
                ("stored", memory.stored_bytes, "of that, in compressed pages"),
                ("uses", memory.active_bytes, "as sampled"),
                ("entitled", memory.entitlement_bytes, "if all wanted all they may have"),
                ("target", memory.target_bytes, "what it is to come to now"),
            ];
            let lacks = if machine.plugged.is_some() { "in it, or not plugged" } else { "what it holds" };
            rows.extend(memory.balloon_bytes.map(|bytes| ("balloon", bytes, lacks)));
            for (name, bytes, what) in rows {
                writeln!(f, "  {name:<10} {:>8}  {what}", ByteCount(bytes))?;
            }
            writeln!(f, "  {:<10} {:>8}  of the last second", "waits", Ppm(memory.stalled_ppm).to_string())?;
        }
        if let Some(plugged) = &machine.plugged {
            let [has, asked, most, block] =
                [plugged.plugged_bytes, plugged.requested_bytes, plugged.maximum_bytes, plugged.block_bytes]
                    .map(ByteCount);
            writeln!(
                f,
                "  plugged    {has:>8}  of {asked} asked for and {most} at most, in blocks of {block}"
            )?;
            if let Some(kept) = plugged.in_vain_bytes.map(ByteCount) {
                writeln!(f, "                       it was to keep {kept}, and did not unplug the rest")?;
            }
        }
        for Pager { thread, node, cpus, stores_there } in &machine.pagers {
            let cpus = cpus.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            let cpus = if cpus.is_empty() { String::new() } else { format!(", on its CPUs {cpus}") };
            let stores = if *stores_there { "stores there" } else { "stores where there is memory" };
            writeln!(f, "  {thread:<10} {:>8}  {stores}{cpus}", format!("node {node}"))?;
        }
        if let Some(pages) = &machine.pages {
            writeln!(f, "  free       {:>8}  never touched, or given back", ByteCount(pages.free_bytes))?;
            for (how, bytes) in pages.given().into_iter().filter(|(_, bytes)| *bytes > 0) {
                writeln!(f, "  {how:<10} {:>8}  of that, given back so", ByteCount(bytes))?;
            }
        }
        writeln!(f, "  settings   {}", words(&machine.settings))
    }
}

/// Settings in the words of the command line.
fn words(settings: &Settings) -> String {
    let kind = match settings.kind {
        Some(SettingsKind::Static) => Some("static"),
        Some(SettingsKind::Dedicated) => Some("dedicated"),
        _ => None,
    };
    let size = |name: &str, bytes: Option<u64>| bytes.map(|bytes| format!("{name} {}", ByteCount(bytes)));
    let part = |name: &str, ppm: Option<u32>| ppm.map(|ppm| format!("{name} {}", Ppm(ppm)));
    let number = |name: &str, value: Option<u32>| value.map(|value| format!("{name} {value}"));
    let highest = settings.highest.map(|highest| format!("highest {highest:?}").to_lowercase());
    let all = [
        kind.map(str::to_owned),
        settings.group.as_ref().map(|group| format!("group {group}")),
        size("reservation", settings.reservation_bytes),
        size("limit", settings.limit_bytes),
        number("shares", settings.shares),
        size("startup", settings.startup_bytes),
        size("min", settings.minimum_bytes),
        size("max", settings.maximum_bytes),
        part("buffer", settings.buffer_ppm),
        number("weight", settings.weight),
        highest,
        part("stall objective", settings.stall_objective_ppm),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} was let go, and goes on", self.released)
    }
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { budget_bytes, free_bytes, reserved_bytes, machines, state, .. } = &self.0;
        let (budget, free, reserved) =
            (ByteCount(*budget_bytes), ByteCount(*free_bytes), ByteCount(*reserved_bytes));
        writeln!(f, "{budget} for {machines} machines, {free} free, {reserved} reserved; the host is {state}")
    }
}
