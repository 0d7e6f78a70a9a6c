//! What a manager says about itself and its machines.
//!
//! Enters: the manager's own numbers. Leaves: one JSON object a request. A field is never renamed, only added.
use crate::stores::Storing;
use serde::{Deserialize, Serialize};

/// What an operator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Say how things are.
    Status,
    /// Take so many pages from a machine, once.
    Squeeze {
        /// Its identity.
        machine: u32,
        /// How many.
        pages: u32,
    },
    /// Take everything from a machine that is going to sleep, to the disk where there is one.
    Park {
        /// Its identity.
        machine: u32,
    },
    /// Bring back what a parked machine used.
    Wake {
        /// Its identity.
        machine: u32,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// How things are.
    Status(Box<Status>),
    /// It was done.
    Done,
    /// It was not, for this reason.
    Refused(String),
}

/// How things are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Of this schema.
    pub version: u32,
    /// The manager's process.
    pub pid: u32,
    /// Counts managers.
    pub epoch: u64,
    /// The keeper is gone: this process holds all there is.
    pub is_alone: bool,
    /// When this manager's program began, in nanoseconds of CLOCK_MONOTONIC.
    pub started_ns: u64,
    /// When it had taken everything over.
    pub serving_ns: u64,
    /// When it brought the first page; 0 if it has not yet.
    pub first_page_ns: u64,
    /// Memory in use, as it is counted.
    pub used_bytes: u64,
    /// What the ledger has as resident, in limbo, in stores and in tables.
    pub charged_bytes: [u64; 4],
    /// Machines.
    pub machines: Vec<MachineStatus>,
    /// Sharing domains.
    pub domains: Vec<DomainStatus>,
    /// What storing pages takes of processors.
    #[serde(default)]
    pub storing: Storing,
    /// The disk tier, if there is one.
    #[serde(default)]
    pub disk: Option<DiskStatus>,
    /// What the operator must know; the newest hundred since this manager began.
    pub incidents: Vec<String>,
}

/// How a machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineStatus {
    /// Its identity.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Its VMM.
    pub pid: u32,
    /// Its size.
    pub size_bytes: u64,
    /// In its RAM, in limbo and stored.
    pub resident_bytes: u64,
    /// In limbo.
    pub limbo_bytes: u64,
    /// In the store, before compression.
    pub stored_bytes: u64,
    /// Pages taken by this manager.
    pub captured: u64,
    /// Pages whose bytes were gone. Never anything but 0.
    pub lost: u64,
}

/// How a domain's store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainStatus {
    /// Its identity.
    pub id: u32,
    /// Objects.
    pub objects: u64,
    /// Pages they stand for.
    pub pages: u64,
    /// Memory it takes.
    pub held_bytes: u64,
    /// Objects on the disk.
    #[serde(default)]
    pub away: u64,
    /// Of the memory it takes, what is in slots for pages' bytes; of that, what is in slots that hold nothing, and behind the bytes
    /// in slots that do.
    #[serde(default)]
    pub data_slab_bytes: u64,
    /// See there.
    #[serde(default)]
    pub free_slot_bytes: u64,
    /// See there.
    #[serde(default)]
    pub slot_waste_bytes: u64,
}

/// How the disk tier is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// What it may take.
    pub limit_bytes: u64,
    /// Its segments in use.
    pub used_bytes: u64,
    /// Of these, what somebody needs.
    pub live_bytes: u64,
    /// Segments that the disk refused.
    pub failed_bytes: u64,
    /// Written by this manager.
    pub written_bytes: u64,
    /// Pages read by this manager, and in how many reads.
    pub pages_read: u64,
    /// See there.
    pub reads: u64,
    /// How often the disk had no room, and how often it refused a write, for this manager.
    #[serde(default)]
    pub no_room: u64,
    /// See there.
    #[serde(default)]
    pub refused: u64,
    /// How it is read.
    #[serde(default)]
    pub reads_by: ReadsBy,
}

/// How the disk tier is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadsBy {
    /// By threads, one read each at a time.
    #[default]
    Threads,
    /// By io_uring.
    Ring,
}
