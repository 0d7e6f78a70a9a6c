//! What a machine's interface says, row by row: what there is, or why there is nothing.
//!
//! Enters: an interface. Leaves: rows that are shown as text or JSON. What must never happen: a capability shown as there because
//! it was not asked about.
use super::Guest;
use plimsoll_attach::control::{
    Balloon, BalloonDevice, Capabilities, Control, ControlError, Feature, GuestStatistics, HotMemory,
    HotplugMethod, Migration, RunState,
};
use plimsoll_linux::explain;
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How much longer than its interval a guest may take for its first statistics: its driver answers when it is scheduled.
const SLACK: Duration = Duration::from_secs(5);
/// How often statistics are looked at until they are there.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Capabilities that are there or not, and where they come from when they are not.
const FEATURES: [(Feature, &str, &str); 4] = [
    (
        Feature::FreePageReporting,
        "free page reporting",
        "the machine would have to be started with a balloon that has it on",
    ),
    (
        Feature::FreePageHinting,
        "free page hinting",
        "the interface does not offer it, or the balloon was started without",
    ),
    (Feature::Pause, "pause", "the interface does not offer it"),
    (Feature::Events, "events", "the interface tells nothing unasked"),
];

/// One thing about a machine.
pub(super) struct Row {
    pub(super) name: &'static str,
    /// What there is, or why there is nothing.
    pub(super) found: Result<Found, String>,
}

/// What there is, in words and as a value.
pub(super) struct Found {
    pub(super) text: String,
    pub(super) value: Value,
}

/// Has the guest tell its statistics so often, and waits for the first.
pub(super) fn have_told(guest: &mut Guest, every: Duration) -> Result<(), String> {
    guest.control.poll_statistics(every).map_err(|error| explain(&error))?;
    let deadline = Instant::now() + every + SLACK;
    while Instant::now() < deadline {
        // An interface that does not tell an age may show old numbers. They are shown without an age, then.
        let is_told = guest.control.statistics().is_ok_and(|said| said.total.is_some());
        if is_told {
            break;
        }
        guest.wait_until(Instant::now() + LOOK_EVERY)?;
    }
    Ok(())
}

/// Asks for everything. Fails only when the interface does not answer at all.
pub(super) fn look(control: &mut dyn Control) -> Result<Vec<Row>, String> {
    let capabilities = control.probe().map_err(|error| explain(&error))?;
    let mut rows =
        vec![row("state", control.run_state(), run_state), row("migration", control.migration(), migration)];
    rows.push(match capabilities.balloon {
        Some(device) => row("balloon", control.balloon(), |balloon| held(&balloon, &device)),
        None => without("balloon", "the machine was started without one"),
    });
    rows.push(match capabilities.has(Feature::Statistics) {
        true => Row {
            name: "statistics",
            found: control.statistics().map_err(|error| explain(&error)).and_then(|said| statistics(&said)),
        },
        false => without("statistics", "no balloon driver of the guest's tells any: try --statistics 1"),
    });
    rows.extend(FEATURES.map(|(feature, name, why_not)| match feature {
        feature if capabilities.has(feature) => {
            Row { name, found: Ok(Found { text: "yes".to_owned(), value: json!({}) }) }
        }
        Feature::FreePageHinting if capabilities.has(Feature::HintingInMigration) => {
            Row { name, found: Ok(word("whenever the machine migrates, and only then")) }
        }
        _ => without(name, why_not),
    }));
    rows.push(hot(&capabilities, HotplugMethod::VirtioMem, "virtio-mem", "the machine has no such device"));
    let none = "the machine has no room for memory modules, or the interface does not tell";
    rows.push(hot(&capabilities, HotplugMethod::Acpi, "hot add", none));
    Ok(rows)
}

fn row<T>(name: &'static str, answer: Result<T, ControlError>, show: impl FnOnce(T) -> Found) -> Row {
    Row { name, found: answer.map(show).map_err(|error| explain(&error)) }
}

fn without(name: &'static str, why: &str) -> Row {
    Row { name, found: Err(why.to_owned()) }
}

fn word(word: &str) -> Found {
    Found { text: word.to_owned(), value: json!({ "is": word }) }
}

fn run_state(state: RunState) -> Found {
    word(match state {
        RunState::NotStarted => "not started",
        RunState::Running => "running",
        RunState::Paused => "paused",
        RunState::Ended => "ended",
    })
}

fn migration(state: Migration) -> Found {
    word(match state {
        Migration::None => "none",
        Migration::Active => "active",
        Migration::Completed => "completed",
        Migration::Failed => "failed",
    })
}

fn held(balloon: &Balloon, device: &BalloonDevice) -> Found {
    let Balloon { memory, target, actual } = *balloon;
    let holds = actual.map_or_else(
        || format!("the guest owns {memory}; what is in the balloon is not told"),
        |actual| format!("the guest has {} of {memory}, {actual} are in it", memory.saturating_sub(actual)),
    );
    let asked = target.map(|target| format!(" and {target} are asked for")).unwrap_or_default();
    let oom = match device.deflate_on_oom {
        Some(true) => "; the guest may take it back before it runs out",
        Some(false) | None => "",
    };
    let value = json!({
        "memory_bytes": memory.0,
        "target_bytes": bytes(target),
        "actual_bytes": bytes(actual),
        "granularity_bytes": device.granularity.0,
        "deflate_on_oom": device.deflate_on_oom,
    });
    Found { text: format!("{holds}{asked}; in steps of {}{oom}", device.granularity), value }
}

fn bytes(size: Option<ByteCount>) -> Option<u64> {
    size.map(|size| size.0)
}

fn statistics(said: &GuestStatistics) -> Result<Found, String> {
    let sizes = [
        ("available", said.available),
        ("free", said.free),
        ("total", said.total),
        ("caches", said.caches),
        ("swapped in", said.swapped_in),
        ("swapped out", said.swapped_out),
    ];
    let counts = [
        ("major faults", said.major_faults),
        ("minor faults", said.minor_faults),
        ("killed for want of memory", said.oom_kills),
    ];
    let sizes_told = sizes.iter().filter_map(|(name, size)| size.map(|size| format!("{name} {size}")));
    let counts_told = counts.iter().filter_map(|(name, count)| count.map(|count| format!("{name} {count}")));
    let told: Vec<String> = sizes_told.chain(counts_told).collect();
    if told.is_empty() {
        return Err("the guest has not told any yet: --statistics 1 has it tell them".to_owned());
    }
    let age = said.age.map(|age| format!("; told {} s ago", age.as_secs())).unwrap_or_default();
    Ok(Found { text: told.join(", ") + &age, value: statistics_json(said) })
}

pub(super) fn statistics_json(said: &GuestStatistics) -> Value {
    json!({
        "age_seconds": said.age.map(|age| age.as_secs()),
        "available_bytes": bytes(said.available),
        "free_bytes": bytes(said.free),
        "total_bytes": bytes(said.total),
        "caches_bytes": bytes(said.caches),
        "swapped_in_bytes": bytes(said.swapped_in),
        "swapped_out_bytes": bytes(said.swapped_out),
        "major_faults": said.major_faults,
        "minor_faults": said.minor_faults,
        "oom_kills": said.oom_kills,
    })
}

fn hot(capabilities: &Capabilities, method: HotplugMethod, name: &'static str, none: &str) -> Row {
    let found: Vec<&HotMemory> =
        capabilities.hot_memory.iter().filter(|memory| memory.method == method).collect();
    if found.is_empty() {
        return without(name, none);
    }
    let texts: Vec<String> = found.iter().map(|memory| hot_text(memory)).collect();
    let values: Vec<Value> = found.iter().map(|memory| hot_json(memory)).collect();
    Row { name, found: Ok(Found { text: texts.join("; "), value: json!({ "pieces": values }) }) }
}

/// A piece of hot memory in words.
pub(super) fn hot_text(memory: &HotMemory) -> String {
    let HotMemory { id, block, maximum, requested, plugged, .. } = memory;
    let plugged = plugged
        .map_or_else(|| "what is plugged is not told".to_owned(), |plugged| format!("{plugged} plugged"));
    let maximum = maximum.map(|maximum| format!(", at most {maximum}")).unwrap_or_default();
    format!("{id}: {plugged}, {requested} requested{maximum}, in blocks of {block}")
}

/// A piece of hot memory as a value.
pub(super) fn hot_json(memory: &HotMemory) -> Value {
    json!({
        "id": memory.id.0,
        "block_bytes": memory.block.0,
        "maximum_bytes": bytes(memory.maximum),
        "requested_bytes": memory.requested.0,
        "plugged_bytes": bytes(memory.plugged),
    })
}
