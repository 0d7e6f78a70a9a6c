//! What a machine shall be, as its starter writes it, and the check that it can be.
//!
//! Enters: a [`VmmConfig`], usually read from JSON. Leaves: the same, of which [`VmmConfig::check`] has said that every
//! number is in range and that the pieces fit together, with the guest physical layout that follows from it. Nothing
//! here asks the host anything: what this host cannot do is found out by the modules that try.
use plimsoll_core::layout::{GuestLayout, LayoutError, Region};
use plimsoll_guest::abi;
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_guest::{Guest, GuestError};
use plimsoll_linux::uffd::wire::SHARDS_MAX;
use plimsoll_sys::numa::{NODES_MAX, NodeId};
use plimsoll_types::{BLOCK_SIZE, ByteCount, Gpa};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use thiserror::Error;

/// Most airlock slots a machine may have: 16 GiB of address space, far more than ever rests in limbo.
pub const AIRLOCK_SLOTS_MAX: u32 = 8192;
/// Longest name, in bytes: what the hand-over message has room for.
pub const NAME_MAX: usize = 32;

/// Everything that decides what a machine is. All sizes are bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmConfig {
    /// What the operator calls the machine, at most [`NAME_MAX`] bytes.
    pub name: String,
    /// Guest memory, a multiple of 2 MiB.
    pub ram_bytes: u64,
    /// The hole in the guest's physical address space.
    #[serde(default)]
    pub hole: Hole,
    /// 1 to [`abi::MAX_VCPUS`].
    pub vcpus: u32,
    /// What the guest does.
    pub workload: Workload,
    /// Parts of the memory that a manager serves each by itself: 1 to [`SHARDS_MAX`], and not more than there are blocks
    /// of 2 MiB. `None`: as many as its size and the host's NUMA nodes call for, 1 up to 16 GiB on one node.
    #[serde(default)]
    pub shards: Option<u32>,
    /// NUMA nodes of the host that have the memory in equal parts, cut between blocks, in the order of guest addresses: pages come from
    /// there and nowhere else. A shard is of one node, so there are as many shards at least. None: wherever the kernel puts it.
    #[serde(default)]
    pub nodes: Vec<u16>,
    /// Slots of 2 MiB in each shard for pages on their way out, 1 to [`AIRLOCK_SLOTS_MAX`]. Unmanaged machines have none.
    #[serde(default = "default_airlock_slots")]
    pub airlock_slots: u32,
    /// What runs the guest.
    #[serde(default)]
    pub accel: AccelChoice,
    /// Whether all memory is touched before the guest starts.
    #[serde(default)]
    pub prefault: Prefault,
    /// Whether a manager serves the memory.
    #[serde(default)]
    pub management: Management,
    /// Whether the kernel is asked for huge pages.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Whether the process gives up its rights once set up.
    #[serde(default)]
    pub sandbox: Sandbox,
    /// Milliseconds between two reports on the control socket, 10 to 60,000.
    #[serde(default = "default_report_ms")]
    pub report_ms: u32,
    /// Where tools may ask for registers: a socket that is not there yet, and stays there.
    #[serde(default)]
    pub inspect: Option<PathBuf>,
}

const fn default_airlock_slots() -> u32 {
    16
}

const fn default_report_ms() -> u32 {
    250
}

/// What the guest program does and what its pages contain.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The program and its numbers.
    #[serde(with = "SpecFields")]
    pub spec: WorkloadSpec,
    /// Percent of each kind of page.
    #[serde(with = "MixFields")]
    pub mix: Mix,
    /// The machine's own randomness.
    pub seed: u64,
    /// Randomness of the pool of duplicate pages, equal in machines that shall have pages in common.
    pub pool_seed: u64,
    /// Distinct pages in that pool, not 0.
    pub pool_pages: u64,
}

/// The fields of [`WorkloadSpec`], which itself lives in a crate that knows no serialisation.
#[derive(Serialize, Deserialize)]
#[serde(remote = "WorkloadSpec", deny_unknown_fields)]
struct SpecFields {
    kind: u32,
    write_permille: u32,
    hot_permille: u32,
    final_check: u32,
    footprint_bytes: u64,
    ops_per_second: u64,
    operations: u64,
    discard_every_ops: u64,
    discard_pages_max: u64,
    phase_ops: u64,
    phase_ms: u64,
    burst_ops: u64,
    burst_idle_ms: u64,
    seed: u64,
}

/// The fields of [`Mix`], for the same reason.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Mix", deny_unknown_fields)]
struct MixFields {
    zero: u32,
    duplicate: u32,
    text: u32,
    random: u32,
}

/// The hole in the guest's physical address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Hole {
    /// As on a PC: 3 to 4 GiB for machines of at least 6 GiB. Smaller machines get 256 MiB in their middle, so that
    /// every machine has a hole and code that forgets it fails on all of them.
    #[default]
    Pc,
    /// None: one region from 0.
    None,
    /// Where and how large, both multiples of 2 MiB.
    At {
        /// First byte.
        start: u64,
        /// Bytes.
        bytes: u64,
    },
}

/// What shall run the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AccelChoice {
    /// KVM where it works, else threads of this process.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// Threads of this process.
    InProcess,
}

/// Whether all memory is touched before the guest starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefault {
    /// Pages come when the guest first touches them.
    #[default]
    OnDemand,
    /// All pages are present when the guest starts.
    All,
}

/// Whether a manager serves the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Management {
    /// Handed over before the first vCPU starts.
    #[default]
    Managed,
    /// Plain memory of the kernel's, for comparison.
    Unmanaged,
}

/// Whether the kernel is asked for huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HugePages {
    /// `MADV_HUGEPAGE` before the first touch.
    #[default]
    Advise,
    /// `MADV_NOHUGEPAGE`.
    Never,
}

/// What the process gives up once it is set up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sandbox {
    /// Root becomes this user and group; then seccomp. The process must have one thread when `run` is called.
    #[default]
    Nobody,
    /// As `Nobody`, with another user and group.
    User {
        /// User, not 0.
        uid: u32,
        /// Group, not 0.
        gid: u32,
    },
    /// Nothing: only for machines that live in a thread of a test.
    Off,
}

/// A machine that cannot be. Whoever wrote the configuration is at fault.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The name is empty, too long or not printable.
    #[error("the machine's name {name:?} must have 1 to {NAME_MAX} bytes and no control characters")]
    Name {
        /// As given.
        name: String,
    },
    /// Not whole blocks.
    #[error("{bytes} bytes of memory are not a multiple of 2 MiB")]
    Unaligned {
        /// As given.
        bytes: u64,
    },
    /// Image, stacks and the smallest workload do not fit.
    #[error("{found} of memory are too little: a machine needs at least {minimum}")]
    TooSmall {
        /// Usable memory found.
        found: ByteCount,
        /// What is needed.
        minimum: ByteCount,
    },
    /// The lowest region ends before the workload's memory starts.
    #[error("the hole starts at {start}, inside the guest image; move it to {minimum} or above")]
    HoleInImage {
        /// Where the hole starts.
        start: Gpa,
        /// The lowest place for it.
        minimum: Gpa,
    },
    /// The hole makes an impossible layout.
    #[error("the hole does not fit the memory")]
    Layout(#[source] LayoutError),
    /// The layout has more regions than the guest's parameter page holds.
    #[error("the machine has {found} memory regions; at most {} are supported", abi::MAX_REGIONS)]
    TooManyRegions {
        /// As laid out.
        found: usize,
    },
    /// The number of vCPUs is out of range.
    #[error("{found} vCPUs are not supported: use 1 to {}", abi::MAX_VCPUS)]
    Vcpus {
        /// As given.
        found: u32,
    },
    /// The number of shards is out of range.
    #[error("{found} shards are not supported: use 1 to {SHARDS_MAX}, and not more than blocks of 2 MiB")]
    Shards {
        /// As given.
        found: u32,
    },
    /// The nodes are too many, or one cannot be.
    #[error("memory on nodes {found:?} is not supported: as many as shards at most, each below {NODES_MAX}")]
    Nodes {
        /// As given.
        found: Vec<u16>,
    },
    /// The number of airlock slots is out of range.
    #[error("{found} airlock slots are not supported: use 1 to {AIRLOCK_SLOTS_MAX}")]
    AirlockSlots {
        /// As given.
        found: u32,
    },
    /// The workload's numbers are wrong, or it does not fit into what image and stacks leave.
    #[error("the workload cannot run on this machine")]
    Workload(#[source] GuestError),
    /// Duplicates of nothing.
    #[error("the pool of duplicate pages is empty: use at least 1 page")]
    EmptyPool,
    /// Reports too often or too rarely.
    #[error("a report every {found} ms is not supported: use 10 to 60000")]
    ReportInterval {
        /// As given.
        found: u32,
    },
    /// Staying root is not giving up rights.
    #[error("the sandbox cannot run as user or group 0: name another one")]
    SandboxAsRoot,
}

impl VmmConfig {
    /// A machine with one vCPU and everything else as it is by default.
    pub fn new(name: impl Into<String>, ram_bytes: u64, workload: Workload) -> Self {
        Self {
            name: name.into(),
            ram_bytes,
            hole: Hole::default(),
            vcpus: 1,
            workload,
            shards: None,
            nodes: Vec::new(),
            airlock_slots: default_airlock_slots(),
            accel: AccelChoice::default(),
            prefault: Prefault::default(),
            management: Management::default(),
            huge_pages: HugePages::default(),
            sandbox: Sandbox::default(),
            report_ms: default_report_ms(),
            inspect: None,
        }
    }

    /// Checks everything and lays the memory out.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(&self) -> Result<GuestLayout, ConfigError> {
        if self.name.is_empty() || self.name.len() > NAME_MAX || self.name.chars().any(char::is_control) {
            return Err(ConfigError::Name { name: self.name.clone() });
        }
        if self.vcpus == 0 || self.vcpus > abi::MAX_VCPUS {
            return Err(ConfigError::Vcpus { found: self.vcpus });
        }
        let blocks = self.ram_bytes / BLOCK_SIZE as u64;
        if let Some(found) = self.shards
            && (!(1..=SHARDS_MAX).contains(&found) || u64::from(found) > blocks)
        {
            return Err(ConfigError::Shards { found });
        }
        let most = self.shards.unwrap_or(SHARDS_MAX).min(u32::try_from(blocks).unwrap_or(SHARDS_MAX));
        if self.nodes.len() > most as usize || self.nodes().len() < self.nodes.len() {
            return Err(ConfigError::Nodes { found: self.nodes.clone() });
        }
        if !(1..=AIRLOCK_SLOTS_MAX).contains(&self.airlock_slots) {
            return Err(ConfigError::AirlockSlots { found: self.airlock_slots });
        }
        if !(10..=60_000).contains(&self.report_ms) {
            return Err(ConfigError::ReportInterval { found: self.report_ms });
        }
        if let Sandbox::User { uid: 0, .. } | Sandbox::User { gid: 0, .. } = self.sandbox {
            return Err(ConfigError::SandboxAsRoot);
        }
        if self.workload.pool_pages == 0 {
            return Err(ConfigError::EmptyPool);
        }
        self.layout()
    }

    /// The nodes that have the memory, those that can be.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.nodes.iter().copied().filter_map(NodeId::new).collect()
    }

    /// The guest program's own view of the machine: where it puts which page. Its clock says nothing yet.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn guest(&self) -> Result<Guest, ConfigError> {
        Guest::new(&self.parameters()?).map_err(ConfigError::Workload)
    }

    /// What the guest program is told, with a clock that says nothing yet: for a host that fills it in.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn parameters(&self) -> Result<abi::Params, ConfigError> {
        Ok(self.params(&self.check()?, 1))
    }

    fn layout(&self) -> Result<GuestLayout, ConfigError> {
        const MINIMUM: ByteCount = ByteCount(abi::WORKLOAD_GPA + BLOCK_SIZE as u64);
        let ram = ByteCount(self.ram_bytes);
        if ram < MINIMUM {
            return Err(ConfigError::TooSmall { found: ram, minimum: MINIMUM });
        }
        if !ram.is_multiple_of(BLOCK_SIZE) {
            return Err(ConfigError::Unaligned { bytes: ram.0 });
        }
        let regions = self.hole.split(ram);
        if let Some(low) = regions.first()
            && low.bytes.0 < abi::WORKLOAD_GPA
        {
            let minimum = Gpa(abi::WORKLOAD_GPA);
            return Err(ConfigError::HoleInImage { start: Gpa(low.bytes.0), minimum });
        }
        if regions.len() > abi::MAX_REGIONS {
            return Err(ConfigError::TooManyRegions { found: regions.len() });
        }
        let layout = GuestLayout::new(regions).map_err(ConfigError::Layout)?;
        // The guest program's own opinion, with a clock that says nothing yet.
        Guest::new(&self.params(&layout, 1)).map_err(ConfigError::Workload)?;
        Ok(layout)
    }

    /// The parameter page for a guest whose clock has `tsc_hz` ticks to a second.
    pub(crate) fn params(&self, layout: &GuestLayout, tsc_hz: u64) -> abi::Params {
        let mut regions = [abi::Region::default(); abi::MAX_REGIONS];
        let mut region_count = 0;
        for (raw, region) in regions.iter_mut().zip(layout.regions()) {
            *raw = abi::Region { gpa: region.start.0, len: region.bytes.0 };
            region_count += 1;
        }
        abi::Params {
            magic: abi::PARAMS_MAGIC,
            version: abi::ABI_VERSION,
            vcpus: self.vcpus,
            tsc_hz,
            seed: self.workload.seed,
            pool_seed: self.workload.pool_seed,
            pool_pages: self.workload.pool_pages,
            region_count,
            reserved: 0,
            regions,
            mix: self.workload.mix,
            workload: self.workload.spec,
        }
    }
}

impl Hole {
    /// The regions that `ram` is cut into. Whether they are acceptable is for [`GuestLayout::new`] to say.
    fn split(self, ram: ByteCount) -> Vec<Region> {
        const GIB: u64 = 1 << 30;
        let (start, bytes) = match self {
            Self::None => return vec![Region { start: Gpa(0), bytes: ram }],
            Self::Pc if ram.0 >= 6 * GIB => (3 * GIB, GIB),
            Self::Pc => {
                // Half the memory, but never less than the image needs.
                let half = ram.0 / 2 / BLOCK_SIZE as u64 * BLOCK_SIZE as u64;
                (half.max(abi::WORKLOAD_GPA), 256 << 20)
            }
            Self::At { start, bytes } => (start, bytes),
        };
        if start >= ram.0 || bytes == 0 {
            return vec![Region { start: Gpa(0), bytes: ram }];
        }
        let low = Region { start: Gpa(0), bytes: ByteCount(start) };
        // A hole that reaches past the address space saturates, and the layout check then refuses it.
        let high = Region { start: Gpa(start.saturating_add(bytes)), bytes: ByteCount(ram.0 - start) };
        vec![low, high]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_guest::spec::WorkloadKind;

    fn config(ram_bytes: u64) -> VmmConfig {
        let mix = Mix { zero: 10, duplicate: 20, text: 40, random: 30 };
        let spec = WorkloadSpec::new(WorkloadKind::Zipf);
        VmmConfig::new("m", ram_bytes, Workload { spec, mix, seed: 1, pool_seed: 2, pool_pages: 64 })
    }

    fn regions(ram_bytes: u64, hole: Hole) -> Vec<(u64, u64)> {
        let layout = VmmConfig { hole, ..config(ram_bytes) }.check().unwrap();
        layout.regions().iter().map(|region| (region.start.0 >> 20, region.bytes.0 >> 20)).collect()
    }

    #[test]
    fn machines_of_every_size_get_the_hole_of_a_pc() {
        assert_eq!(regions(8 << 20, Hole::Pc), [(0, 6), (262, 2)]);
        assert_eq!(regions(64 << 20, Hole::Pc), [(0, 32), (288, 32)]);
        assert_eq!(regions(66 << 20, Hole::Pc), [(0, 32), (288, 34)]);
        assert_eq!(regions(8 << 30, Hole::Pc), [(0, 3072), (4096, 5120)]);
        assert_eq!(regions(64 << 20, Hole::None), [(0, 64)]);
        assert_eq!(regions(64 << 20, Hole::At { start: 16 << 20, bytes: 2 << 20 }), [(0, 16), (18, 48)]);
    }

    #[test]
    fn what_cannot_be_is_refused_in_one_sentence() {
        let good = config(64 << 20);
        let mut endless = good.clone();
        endless.workload.spec.footprint_bytes = 1 << 40;
        let mut unmixed = good.clone();
        unmixed.workload.mix.zero = 99;
        let mut no_pool = good.clone();
        no_pool.workload.pool_pages = 0;
        let at = |start, bytes| VmmConfig { hole: Hole::At { start, bytes }, ..good.clone() };
        let cases = [
            (config(0), "are too little"),
            (config(6 << 20), "are too little"),
            (config((64 << 20) + 4096), "not a multiple of 2 MiB"),
            (VmmConfig { name: String::new(), ..good.clone() }, "must have 1 to"),
            (VmmConfig { name: "a\nb".into(), ..good.clone() }, "control characters"),
            (VmmConfig { vcpus: 0, ..good.clone() }, "0 vCPUs"),
            (VmmConfig { vcpus: 33, ..good.clone() }, "33 vCPUs"),
            (VmmConfig { shards: Some(0), ..good.clone() }, "0 shards are not"),
            (VmmConfig { shards: Some(33), ..good.clone() }, "33 shards are not"),
            (VmmConfig { shards: Some(65), ..config(1 << 30) }, "65 shards are not"),
            (VmmConfig { nodes: vec![0; 33], ..good.clone() }, "memory on nodes"),
            (VmmConfig { nodes: vec![0, 1], shards: Some(1), ..good.clone() }, "memory on nodes"),
            (VmmConfig { nodes: vec![1024], ..good.clone() }, "memory on nodes"),
            (VmmConfig { airlock_slots: 0, ..good.clone() }, "airlock slots"),
            (VmmConfig { airlock_slots: 8193, ..good.clone() }, "airlock slots"),
            (VmmConfig { report_ms: 0, ..good.clone() }, "report every 0 ms"),
            (VmmConfig { sandbox: Sandbox::User { uid: 0, gid: 1 }, ..good.clone() }, "user or group 0"),
            (at(4 << 20, 2 << 20), "inside the guest image"),
            (at((32 << 20) + 4096, 2 << 20), "does not fit"),
            (at(32 << 20, u64::MAX), "does not fit"),
            (endless, "cannot run"),
            (unmixed, "cannot run"),
            (no_pool, "pool of duplicate pages is empty"),
        ];
        for (config, words) in cases {
            let message = config.check().expect_err(words).to_string();
            assert!(message.contains(words), "{message:?} should contain {words:?}");
        }
    }

    #[test]
    fn a_configuration_survives_json_and_unknown_fields_do_not() {
        let text = serde_json::to_string(&config(64 << 20)).unwrap();
        let back: VmmConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        let typo = text.replace("\"vcpus\"", "\"vpcus\"");
        assert!(serde_json::from_str::<VmmConfig>(&typo).is_err());
    }
}
