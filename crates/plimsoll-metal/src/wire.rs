//! What a hypervisor is told and what it reports. Read by both sides: the library that starts it, and the image.
//!
//! Settings go in as a boot module, [`Header`], so many [`GuestSettings`], the digests that these count, and what is decided by, each line of it a [`Given`];
//! reports come out as lines of JSON on the serial port, each a [`Line`]. Other lines there are for people.
use alloc::boxed::Box;
use alloc::string::String;
use core::fmt;
use plimsoll_guest::abi::Params;
use plimsoll_policy::view::HostView;
use plimsoll_policy::{Plan, PolicyState};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `"PLIMETAL"` read as a little-endian number.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PLIMETAL");
/// Most guests of one run.
pub const GUESTS_MAX: u32 = 64;
/// Most digests of one run.
pub const DIGESTS_MAX: usize = 8192;

/// What the hypervisor does to itself once it has set up its own tables, to show that it is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Provoke {
    /// Nothing.
    Nothing = 0,
    /// Writes its own code.
    WriteCode = 1,
    /// Runs its own data.
    ExecuteData = 2,
    /// Reads address 0.
    ReadNull = 3,
    /// Recurses until its stack is used up.
    Overflow = 4,
}

impl Provoke {
    /// The one of this number.
    pub const fn from_wire(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Nothing),
            1 => Some(Self::WriteCode),
            2 => Some(Self::ExecuteData),
            3 => Some(Self::ReadNull),
            4 => Some(Self::Overflow),
            _ => None,
        }
    }
}

/// The beginning of the settings.
///
/// ```text
///  0  magic     MAGIC
///  8  guests    how many GuestSettings follow, at most GUESTS_MAX
/// 12  seconds   how long they work
/// 16  provoke   Provoke
/// 20  policy    how many bytes of JSON are behind the digests, 0 if nothing is decided
/// 24  end
/// ```
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// [`MAGIC`].
    pub magic: u64,
    /// How many guests.
    pub guests: u32,
    /// How long they work.
    pub seconds: u32,
    /// [`Provoke`].
    pub provoke: u32,
    /// How many bytes of [`Given`] lines there are.
    pub policy: u32,
}

/// Which program a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct ProgramKind(pub u64);

impl ProgramKind {
    /// That of `plimsoll-guest`, as on Linux.
    pub const WORKLOAD: Self = Self(0);
    /// One that asks the hypervisor for memory to give, lend and share: `caller/`.
    pub const CALLER: Self = Self(1);
    /// The same in ring 0, where it has address spaces of its own.
    pub const KERNEL: Self = Self(2);
}

/// How a guest's addresses become the machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Paging(pub u64);

impl Paging {
    /// The processor walks the guest's tables, and a second stage for what they name.
    pub const NESTED: Self = Self(0);
    /// It walks tables that the hypervisor makes of the guest's and of where its memory is.
    pub const SHADOW: Self = Self(1);
    /// It walks the guest's own tables, which name the machine's frames: the guest asks for every entry, and all of its memory is reserved for it.
    pub const DIRECT: Self = Self(2);
}

/// What a guest may execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Execute(pub u64);

impl Execute {
    /// Whatever it likes.
    pub const ANYTHING: Self = Self(0);
    /// Pages of its program as it was loaded, and pages whose digests are given. No page is written and executed.
    pub const KNOWN: Self = Self(1);
}

/// A device on PCI segment 0: bus, slot and function, as it signs its accesses to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Device(pub u64);

impl Device {
    /// None. The host bridge, which has this number, belongs to nobody.
    pub const NONE: Self = Self(0);

    /// The one there. Of `slot` the lowest five bits count, of `function` three.
    pub const fn at(bus: u8, slot: u8, function: u8) -> Self {
        Self((bus as u64) << 8 | ((slot & 31) as u64) << 3 | (function & 7) as u64)
    }

    /// The one that signs like this.
    pub const fn of(requester: u16) -> Self {
        Self(requester as u64)
    }

    /// How it signs.
    pub const fn requester(self) -> u16 {
        let [low, high, ..] = self.0.to_le_bytes();
        u16::from_le_bytes([low, high])
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [low, bus] = self.requester().to_le_bytes();
        write!(f, "{bus:02x}:{:02x}.{}", low >> 3, low & 7)
    }
}

/// One guest.
///
/// ```text
///   0  name     UTF-8, padded with zeros
///  32  program  ProgramKind
///  40  paging   Paging
///  48  execute  Execute
///  56  digests  how many of those behind all guests are this one's, which follow those of the guests before it
///  64  device   Device
///  72  params   the guest's parameter page; `tsc_hz` is the hypervisor's to fill in
/// 304  end
/// ```
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GuestSettings {
    /// What it is called.
    pub name: [u8; 32],
    /// What it runs.
    pub program: ProgramKind,
    /// How its addresses become the machine's.
    pub paging: Paging,
    /// What it may execute.
    pub execute: Execute,
    /// How many digests are its own.
    pub digests: u64,
    /// The device that it owns.
    pub device: Device,
    /// What it is told.
    pub params: Params,
}

const _: () = assert!(size_of::<Header>() == 24 && size_of::<GuestSettings>() == 304);

/// One line of what is decided by and about, as a record of decisions has them.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Given {
    /// Settings, and what is remembered. It comes first; of later ones the settings count, and what is remembered must have come out by itself.
    Settings(Box<PolicyState>),
    /// What a host saw, here or elsewhere. It is decided about at once, before any guest runs.
    View(Box<HostView>),
}

/// A decision: what was seen, and what was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What was given, or what the hypervisor counted.
    pub view: HostView,
    /// What is to be done.
    pub plan: Plan,
}

/// One line of a report.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A guest, at the end of the work; what the last check found is in it, too.
    Guest(GuestLine),
    /// The host at the end of the work.
    Host(HostLine),
    /// A decision, when it is made.
    Decision(Box<Decision>),
    /// Something that went wrong.
    Failure {
        /// What, in a sentence.
        why: String,
    },
}

/// What a guest did and what became of its memory. Sizes are bytes, times nanoseconds.
/// Fields are those of the demo's report (docs/demo-report.md), raw.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct GuestLine {
    /// What it is called.
    pub name: String,
    /// Memory it owns.
    pub size_bytes: u64,
    /// In its RAM.
    pub resident_bytes: u64,
    /// Unmapped, as it was.
    pub limbo_bytes: u64,
    /// In the store, as it was before.
    pub stored_bytes: u64,
    /// What it says it touched in a window.
    pub true_working_set_bytes: Option<u64>,
    /// What its tables' accessed bits say.
    pub estimated_working_set_bytes: Option<u64>,
    /// Gets and puts.
    pub operations: u64,
    /// How long its workload ran.
    pub running_ns: u64,
    /// Half of its operations took no longer.
    pub operation_p50_ns: u64,
    /// All but a hundredth of them took no longer.
    pub operation_p99_ns: u64,
    /// Nested page faults.
    pub faults: u64,
    /// From the exit to the next entry, half of them.
    pub fault_p50_ns: u64,
    /// All but a hundredth of them.
    pub fault_p99_ns: u64,
    /// In the hypervisor for its memory.
    pub stalled_ns: u64,
    /// Since its start.
    pub elapsed_ns: u64,
    /// World switches.
    pub exits: u64,
    /// Ticks of the time-stamp counter between them in the guest: see [`Self::instructions`].
    pub ticks: u64,
    /// Pages taken from it.
    pub captured_pages: u64,
    /// Pages that were to be executed and whose digest was found to be known, each time counted.
    pub verified_code_pages: u64,
    /// What it was refused: to change what it had sealed, or to execute what is not known.
    pub refused_accesses: u64,
    /// Accesses of its device's that were refused.
    pub refused_device_accesses: u64,
    /// Pages whose word and tables contradicted each other.
    pub anomalies: u64,
    /// Whole pages it compared with what they should contain.
    pub verified_pages: u64,
    /// Words it found wrong.
    pub wrong_words: u64,
    /// Why, if it did not end well.
    pub died: Option<String>,
}

/// The host. Sizes are bytes. Fields are those of the demo's report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct HostLine {
    /// All memory the firmware gave: the hard line.
    pub budget_bytes: u64,
    /// The most of it that was in use.
    pub peak_bytes: u64,
    /// What guests own.
    pub asked_bytes: u64,
    /// In its RAM.
    pub resident_bytes: u64,
    /// Unmapped, as it was.
    pub limbo_bytes: u64,
    /// Slabs and what is beside them.
    pub store_bytes: u64,
    /// Page words, bookkeeping, and both stages' tables.
    pub tables_bytes: u64,
    /// The hypervisor itself: image, frame table, and what of its heap is not bookkeeping.
    pub overhead_bytes: u64,
    /// Pages dropped because they were zero.
    pub saved_zero_bytes: u64,
    /// Pages kept once for several.
    pub saved_duplicate_bytes: u64,
    /// What compression took off the others.
    pub saved_compression_bytes: u64,
    /// Pages in the store.
    pub stored_pages: u64,
    /// Part of the store that is not data.
    pub store_metadata_bytes: u64,
    /// Of its slabs, holding nothing.
    pub store_fragmentation_permille: u64,
    /// Much like another; an estimate.
    pub near_duplicate_pages: u64,
    /// World switches.
    pub exits: u64,
    /// Those of them for a page.
    pub nested_faults: u64,
    /// Accessed bits found set and cleared.
    pub harvested_pages: u64,
}
