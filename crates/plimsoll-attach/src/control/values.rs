//! What a machine's management interface can do and says, as values that mean the same for every VMM.
//!
//! Everything here was said by a VMM or by a guest. A driver has checked its form; its truth nobody can check, so these are
//! claims: bounds for our own steps, never grounds for giving memory away.
use plimsoll_types::ByteCount;
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// What one machine's interface offers, found by asking it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Its balloon, if it has one.
    pub balloon: Option<BalloonDevice>,
    /// What else it can do.
    pub features: BTreeSet<Feature>,
    /// Memory that can be plugged and perhaps unplugged while it runs.
    pub hot_memory: Vec<HotMemory>,
}

impl Capabilities {
    /// True if the interface has the feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.features.contains(&feature)
    }
}

/// Something an interface has or has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// The guest's own memory statistics.
    Statistics,
    /// The guest gives back by itself what it has free (free page reporting is switched on).
    FreePageReporting,
    /// The guest can be asked what it has free (free page hinting).
    FreePageHinting,
    /// The guest is asked what it has free whenever the machine migrates, and only then: nobody else can ask.
    HintingInMigration,
    /// The vCPUs can be stopped and let go on.
    Pause,
    /// The interface says whether the machine is being migrated.
    Migration,
    /// The interface tells of changes without being asked.
    Events,
}

/// A balloon's fixed properties.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonDevice {
    /// Its size can be asked for in multiples of this.
    pub granularity: ByteCount,
    /// Whether the guest may take memory back from it rather than run out; `None` where the interface does not say.
    pub deflate_on_oom: Option<bool>,
}

/// A balloon now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balloon {
    /// The memory it is taken out of: what the guest has when the balloon is empty.
    pub memory: ByteCount,
    /// What the host asked it to hold; `None` if this interface does not say and we have not asked yet.
    pub target: Option<ByteCount>,
    /// What the guest says it holds; `None` where the interface does not tell (Firecracker's without statistics).
    pub actual: Option<ByteCount>,
}

/// What a guest says of its memory. Each number may be missing, old, or a lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStatistics {
    /// How long ago the guest said it; `None` where the interface does not tell.
    pub age: Option<Duration>,
    /// What could be had without swapping (MemAvailable).
    pub available: Option<ByteCount>,
    /// Used for nothing at all (MemFree).
    pub free: Option<ByteCount>,
    /// All memory the guest's kernel manages.
    pub total: Option<ByteCount>,
    /// Caches that can be dropped without I/O.
    pub caches: Option<ByteCount>,
    /// Read back from the guest's own swap since it booted.
    pub swapped_in: Option<ByteCount>,
    /// Written to the guest's own swap since it booted.
    pub swapped_out: Option<ByteCount>,
    /// Page faults that had to read, since it booted.
    pub major_faults: Option<u64>,
    /// Page faults that had not, since it booted.
    pub minor_faults: Option<u64>,
    /// Processes the guest killed for want of memory, since it booted.
    pub oom_kills: Option<u64>,
}

/// Names a piece of hot memory of one machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HotMemoryId(pub String);

impl fmt::Display for HotMemoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// How memory is plugged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HotplugMethod {
    /// A virtio-mem device: the guest plugs and unplugs blocks when it likes, up to what is requested.
    VirtioMem,
    /// Memory modules by ACPI: added at once, and not taken out again while the machine runs.
    Acpi,
}

/// Memory a machine can be given beyond what it was started with. All sizes leave out what it was started with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotMemory {
    /// Its name: a device, a zone, or the machine's memory modules.
    pub id: HotMemoryId,
    /// How it comes and goes.
    pub method: HotplugMethod,
    /// It comes in multiples of this.
    pub block: ByteCount,
    /// The most there can be; `None` where the interface does not tell.
    pub maximum: Option<ByteCount>,
    /// What the host asked for.
    pub requested: ByteCount,
    /// What the guest has taken; `None` where the interface does not tell.
    pub plugged: Option<ByteCount>,
}

/// Whether the vCPUs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Made, and not started yet.
    NotStarted,
    /// They run.
    Running,
    /// They were stopped and can go on.
    Paused,
    /// They will not go on: shut down, crashed, or waiting for repair.
    Ended,
}

/// Whether the machine's memory is on its way to another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Migration {
    /// No, nor was it.
    None,
    /// It is being set up or is under way: leave this machine's memory alone.
    Active,
    /// It has left. What is here is a husk.
    Completed,
    /// It was given up; the machine stays.
    Failed,
}

/// A run of free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hinting {
    /// None, or it was ended.
    Stopped,
    /// The guest is telling what it has free.
    Running,
    /// The guest has told all.
    Done,
}

/// What is asked of free page hinting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HintingCommand {
    /// Begin a run. The guest uses its free pages again as soon as it has told all.
    Start,
    /// End it.
    Stop,
}

/// Something changed, told without being asked: time to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlEvent {
    /// The vCPUs stopped, go on, or have ended.
    RunState,
    /// A migration began, ended or went a step further.
    Migration,
    /// The balloon's size.
    Balloon,
    /// The size of a piece of hot memory.
    HotMemory,
}
