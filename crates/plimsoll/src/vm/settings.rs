//! A machine's settings as options of the command line: the words of the settings file.
use clap::ValueEnum;
use plimsoll_host::api::{Highest, Settings, SettingsKind};
use plimsoll_host::config::Part;
use plimsoll_types::ByteCount;

#[derive(clap::Args)]
pub(super) struct SettingsArgs {
    /// The group it belongs to; empty for none.
    #[arg(long)]
    group: Option<String>,
    /// All of its memory always (static), also untouched (dedicated); or one of the two ways that follow.
    #[arg(long, value_enum)]
    kind: Option<KindArg>,
    /// What it keeps whatever the others want.
    #[arg(long, value_name = "SIZE", conflicts_with_all = DYNAMIC)]
    reservation: Option<ByteCount>,
    /// What it never exceeds.
    #[arg(long, value_name = "SIZE", conflicts_with_all = DYNAMIC)]
    limit: Option<ByteCount>,
    /// Its weight for what lies between; 5000 is normal.
    #[arg(long, conflicts_with_all = DYNAMIC)]
    shares: Option<u32>,
    /// What it is to have until it has started.
    #[arg(long, value_name = "SIZE")]
    startup: Option<ByteCount>,
    /// What it keeps.
    #[arg(long, value_name = "SIZE")]
    min: Option<ByteCount>,
    /// What it never exceeds.
    #[arg(long, value_name = "SIZE")]
    max: Option<ByteCount>,
    /// What it is to have beyond what it uses.
    #[arg(long, value_name = "PERCENT")]
    buffer: Option<Part>,
    /// Its weight, up to 10000.
    #[arg(long)]
    weight: Option<u32>,
    /// The dearest way to take memory from it that is allowed; sharing never moves its bytes.
    #[arg(long, value_enum)]
    highest: Option<HighestArg>,
    /// How much of the time its processors may wait for memory.
    #[arg(long, value_name = "PERCENT")]
    stall_objective: Option<Part>,
}

const DYNAMIC: [&str; 5] = ["startup", "min", "max", "buffer", "weight"];

#[derive(Clone, Copy, ValueEnum)]
enum KindArg {
    Guarantee,
    Dynamic,
    Static,
    Dedicated,
}

#[derive(Clone, Copy, ValueEnum)]
enum HighestArg {
    GuestFree,
    Balloon,
    Sharing,
    Compress,
    Disk,
}

impl SettingsArgs {
    /// As the API takes them.
    pub(super) fn said(&self) -> Settings {
        let bytes = |size: Option<ByteCount>| size.map(|size| size.0);
        let ppm = |part: Option<Part>| part.map(|part| part.ppm().0);
        Settings {
            group: self.group.clone(),
            kind: self.kind.map(|kind| match kind {
                KindArg::Guarantee => SettingsKind::Guarantee,
                KindArg::Dynamic => SettingsKind::Dynamic,
                KindArg::Static => SettingsKind::Static,
                KindArg::Dedicated => SettingsKind::Dedicated,
            }),
            reservation_bytes: bytes(self.reservation),
            limit_bytes: bytes(self.limit),
            shares: self.shares,
            startup_bytes: bytes(self.startup),
            minimum_bytes: bytes(self.min),
            maximum_bytes: bytes(self.max),
            buffer_ppm: ppm(self.buffer),
            weight: self.weight,
            highest: self.highest.map(|highest| match highest {
                HighestArg::GuestFree => Highest::GuestFree,
                HighestArg::Balloon => Highest::Balloon,
                HighestArg::Sharing => Highest::Sharing,
                HighestArg::Compress => Highest::Compress,
                HighestArg::Disk => Highest::Disk,
            }),
            stall_objective_ppm: ppm(self.stall_objective),
        }
    }
}
