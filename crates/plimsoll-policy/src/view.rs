//! What a host shows of itself at one moment.
//!
//! Enters: nothing; the host fills these in. Leaves: plain values, which are all that a decision depends on besides
//! what was remembered from earlier ones, so that a recorded view is a recorded decision. Numbers that guests or
//! samplers give are [`Reading`]s, which [`demand`](crate::demand) checks before it believes them.
use crate::ladder::Rungs;
use crate::part::Ppm;
use alloc::vec::Vec;
use plimsoll_types::{ByteCount, MachineId, PageCount};

/// The host at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct HostView {
    /// Milliseconds since any fixed moment, by a clock that does not go back.
    pub now_ms: u64,
    /// All memory of the host.
    pub total: ByteCount,
    /// Memory that could be given out at once.
    pub free: ByteCount,
    /// What is used beyond `total` where that is a part of a host, beyond which there is more: 0 while anything is free.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "is_nothing"))]
    pub overdrawn: ByteCount,
    /// The running machines, in any order.
    pub machines: Vec<MachineView>,
}

impl HostView {
    /// A host of `total`, of which so much is used: by machines and by whatever else there is.
    pub fn of(now_ms: u64, total: ByteCount, used: ByteCount, machines: Vec<MachineView>) -> Self {
        Self {
            now_ms,
            total,
            free: total.saturating_sub(used),
            overdrawn: used.saturating_sub(total),
            machines,
        }
    }
}

#[cfg(feature = "serde")]
fn is_nothing(size: &ByteCount) -> bool {
    *size == ByteCount(0)
}

/// How far a machine's guest has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Phase {
    /// It boots.
    Starting,
    /// It has started: its agent or its balloon driver was heard, or it has run long enough.
    #[default]
    Running,
}

/// A number somebody measured or claims, in bytes. It may be anything; whoever uses it checks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Reading {
    /// The number.
    pub bytes: i64,
    /// How long ago it was taken, in milliseconds.
    pub age_ms: u64,
}

impl Reading {
    /// A size that was found so long ago.
    pub fn of(size: ByteCount, age_ms: u64) -> Self {
        Self { bytes: i64::try_from(size.0).unwrap_or(i64::MAX), age_ms }
    }
}

/// What a guest says about its own memory. It is a hint: nothing is granted for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct GuestStatistics {
    /// Memory its kernel manages, in bytes.
    pub total: i64,
    /// Memory nothing in it is kept in, in bytes. Not what it could free: caches may be in use.
    pub free: i64,
    /// How long ago it said so, in milliseconds.
    pub age_ms: u64,
}

/// One machine at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct MachineView {
    /// Which one.
    pub id: MachineId,
    /// How far its guest has come.
    pub phase: Phase,
    /// Host memory its guest's pages take up, wherever they are: in guest RAM, in limbo, compressed. Without its VMM's
    /// own.
    pub consumed: ByteCount,
    /// Of that, what its compressed pages take up.
    pub stored: ByteCount,
    /// Of that, what cannot be moved: locked, or held by a device.
    pub pinned: ByteCount,
    /// Of that, what the guest said it does not use and what was not taken yet.
    pub reported_free: ByteCount,
    /// Of that, pages that were found to have a twin in the machine's domain, and were not merged yet.
    pub mergeable: ByteCount,
    /// What the host sampled it to use; `None` where it has not sampled yet.
    pub active: Option<Reading>,
    /// What its guest says, if it says anything.
    pub guest: Option<GuestStatistics>,
    /// Pages compressed or moved to disk since the last view.
    pub taken: PageCount,
    /// Pages that came back from there since the last view, because they were touched.
    pub returned: PageCount,
    /// The share of the time since the last view that its processors waited for memory.
    pub stalled: Ppm,
    /// What its balloon holds; `None` where it has none.
    pub balloon: Option<ByteCount>,
    /// The ways to take memory that work for it here: not what it is allowed, which settings say.
    pub rungs: Rungs,
}

impl MachineView {
    /// A running machine that consumes so much, about which nothing else is known and from which nothing can be taken.
    pub const fn new(id: MachineId, consumed: ByteCount) -> Self {
        Self {
            id,
            phase: Phase::Running,
            consumed,
            stored: ByteCount(0),
            pinned: ByteCount(0),
            reported_free: ByteCount(0),
            mergeable: ByteCount(0),
            active: None,
            guest: None,
            taken: PageCount(0),
            returned: PageCount(0),
            stalled: Ppm::ZERO,
            balloon: None,
            rungs: Rungs::NONE,
        }
    }
}
