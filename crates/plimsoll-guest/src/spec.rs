//! What a guest does: the kinds of program and their numbers, as they stand in the parameter page.
//!
//! What enters is text from a command line or a page from a VMM; what leaves is a [`WorkloadSpec`] of which
//! [`WorkloadSpec::check`] says whether it can run. A number out of range must never reach a program.
use core::{fmt, str::FromStr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The kinds of program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum WorkloadKind {
    /// Key-value gets and puts whose keys follow a Zipf law with exponent 1 over the hot part.
    Zipf = 1,
    /// One page after the other, round and round the hot part.
    Sweep = 2,
    /// 15 of 16 operations in the hot part, which moves from time to time, the others anywhere.
    Phases = 3,
    /// Asleep most of the time, then a burst of operations in a hot part that is another each time.
    Bursts = 4,
    /// A few pages, rarely: at most 64 of each vCPU's hot part.
    Idle = 5,
    /// Whatever the host asks, command by command, see [`crate::probe`]. Nothing by itself: not even population.
    Probe = 6,
    /// As `Probe`, over an allocator whose free memory the host sees: see [`crate::frames`].
    Frames = 7,
}

impl WorkloadKind {
    /// All kinds that work on their own, in the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Zipf, Self::Sweep, Self::Phases, Self::Bursts, Self::Idle];

    /// The kind with this number, or `None` if there is none.
    pub const fn from_wire(kind: u32) -> Option<Self> {
        match kind {
            1 => Some(Self::Zipf),
            2 => Some(Self::Sweep),
            3 => Some(Self::Phases),
            4 => Some(Self::Bursts),
            5 => Some(Self::Idle),
            6 => Some(Self::Probe),
            7 => Some(Self::Frames),
            _ => None,
        }
    }

    /// The kind's name; [`FromStr`] reads those of [`ALL`](Self::ALL).
    pub const fn name(self) -> &'static str {
        match self {
            Self::Zipf => "zipf",
            Self::Sweep => "sweep",
            Self::Phases => "phases",
            Self::Bursts => "bursts",
            Self::Idle => "idle",
            Self::Probe => "probe",
            Self::Frames => "frames",
        }
    }
}

impl fmt::Display for WorkloadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for WorkloadKind {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == text.trim()).ok_or(SpecError::UnknownName)
    }
}

/// What a guest does. Every number holds for the whole guest unless it says "each vCPU".
///
/// ```text
///  0  kind                 WorkloadKind
///  4  write_permille       puts among 1000 operations, 0 to 1000
///  8  hot_permille         part of the footprint that is hot, 1 to 1000; see each program
/// 12  final_check          1: read every page once more at the end; 0: do not
/// 16  footprint_bytes      bytes of pages with contents, a multiple of the page size; 0: all that fits
/// 24  ops_per_second       each vCPU's pace; 0: flat out (idle: 10)
/// 32  operations           each vCPU ends after so many; 0: when it is told to stop
/// 40  discard_every_ops    each vCPU gives a range of its pages back every so many operations; 0: never
/// 48  discard_pages_max    longest such range, 1 to 512; ignored when discard_every_ops is 0
/// 56  phase_ops            phases: the hot set moves after so many operations of a vCPU; 0: not by count
/// 64  phase_ms             phases: the hot set moves after so many milliseconds; 0: not by time
/// 72  burst_ops            bursts: operations of one burst, not 0; each burst has another hot set
/// 80  burst_idle_ms        bursts: sleep between bursts
/// 88  seed                 randomness of the order of operations, apart from that of contents
/// 96  end
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WorkloadSpec {
    /// [`WorkloadKind`].
    pub kind: u32,
    /// Puts among 1000 operations.
    pub write_permille: u32,
    /// Part of the footprint that is hot.
    pub hot_permille: u32,
    /// 1 when every page shall be read once more at the end, else 0.
    pub final_check: u32,
    /// Bytes of pages with contents; 0 is all that fits.
    pub footprint_bytes: u64,
    /// Pace of each vCPU; 0 is flat out.
    pub ops_per_second: u64,
    /// Operations of each vCPU; 0 is until told to stop.
    pub operations: u64,
    /// Operations of a vCPU between two ranges it gives back; 0 is never.
    pub discard_every_ops: u64,
    /// Pages of the longest range given back at once.
    pub discard_pages_max: u64,
    /// Operations of a vCPU after which the hot set moves; 0 is not by count.
    pub phase_ops: u64,
    /// Milliseconds after which the hot set moves; 0 is not by time.
    pub phase_ms: u64,
    /// Operations of one burst.
    pub burst_ops: u64,
    /// Milliseconds of sleep between bursts.
    pub burst_idle_ms: u64,
    /// Randomness of the order of operations.
    pub seed: u64,
}

impl WorkloadSpec {
    /// A program of this kind with numbers that suit a guest of some hundred MiB; change what you care about.
    pub const fn new(kind: WorkloadKind) -> Self {
        Self {
            kind: kind as u32,
            write_permille: 200,
            hot_permille: match kind {
                WorkloadKind::Phases | WorkloadKind::Bursts => 100,
                WorkloadKind::Zipf
                | WorkloadKind::Sweep
                | WorkloadKind::Idle
                | WorkloadKind::Probe
                | WorkloadKind::Frames => 1000,
            },
            final_check: 0,
            footprint_bytes: 0,
            ops_per_second: 0,
            operations: 0,
            discard_every_ops: 0,
            discard_pages_max: 64,
            phase_ops: 0,
            phase_ms: 5000,
            burst_ops: 20_000,
            burst_idle_ms: 2000,
            seed: 1,
        }
    }

    /// The program's kind, if every number is in its range.
    pub fn check(&self) -> Result<WorkloadKind, SpecError> {
        let kind = WorkloadKind::from_wire(self.kind).ok_or(SpecError::UnknownKind { kind: self.kind })?;
        if self.write_permille > 1000 {
            return Err(SpecError::WritePermille { found: self.write_permille });
        }
        if !(1..=1000).contains(&self.hot_permille) {
            return Err(SpecError::HotPermille { found: self.hot_permille });
        }
        if self.final_check > 1 {
            return Err(SpecError::FinalCheck { found: self.final_check });
        }
        if !self.footprint_bytes.is_multiple_of(crate::abi::PAGE_SIZE) {
            return Err(SpecError::Footprint { found: self.footprint_bytes });
        }
        if self.discard_every_ops != 0 && !(1..=DISCARD_PAGES_LIMIT).contains(&self.discard_pages_max) {
            return Err(SpecError::DiscardPages { found: self.discard_pages_max });
        }
        if kind == WorkloadKind::Bursts && self.burst_ops == 0 {
            return Err(SpecError::EmptyBurst);
        }
        Ok(kind)
    }
}

/// The most pages one range given back may have: a block.
pub const DISCARD_PAGES_LIMIT: u64 = 512;

/// Why a specification cannot run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpecError {
    /// No program has this name.
    UnknownName,
    /// No program has this number.
    UnknownKind {
        /// The number.
        kind: u32,
    },
    /// The share of writes is more than all.
    WritePermille {
        /// The share asked for.
        found: u32,
    },
    /// The hot set is nothing, or more than all.
    HotPermille {
        /// The share asked for.
        found: u32,
    },
    /// The final check is neither wanted nor unwanted.
    FinalCheck {
        /// The value found.
        found: u32,
    },
    /// The footprint is not whole pages.
    Footprint {
        /// The bytes asked for.
        found: u64,
    },
    /// Ranges given back would be empty or longer than a block.
    DiscardPages {
        /// The pages asked for.
        found: u64,
    },
    /// A burst would have no operation.
    EmptyBurst,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownName => {
                f.write_str("unknown workload: use one of")?;
                for (index, kind) in WorkloadKind::ALL.into_iter().enumerate() {
                    write!(f, "{}{kind}", if index == 0 { " " } else { ", " })?;
                }
                Ok(())
            }
            Self::UnknownKind { kind } => write!(f, "no workload has number {kind}: use 1 to 6"),
            Self::WritePermille { found } => {
                write!(f, "a write share of {found} permille was asked for: use 0 to 1000")
            }
            Self::HotPermille { found } => {
                write!(f, "a hot set of {found} permille was asked for: use 1 to 1000")
            }
            Self::FinalCheck { found } => write!(f, "the final check is {found}: use 0 or 1"),
            Self::Footprint { found } => {
                write!(f, "a footprint of {found} bytes is not whole pages: use a multiple of 4096")
            }
            Self::DiscardPages { found } => {
                write!(
                    f,
                    "ranges of up to {found} pages cannot be given back: use 1 to {DISCARD_PAGES_LIMIT}"
                )
            }
            Self::EmptyBurst => f.write_str("a burst of 0 operations does nothing: use at least 1"),
        }
    }
}

impl core::error::Error for SpecError {}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::string::ToString;

    #[test]
    fn every_kind_reads_its_own_name_and_number() {
        for kind in WorkloadKind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(WorkloadKind::from_wire(kind as u32), Some(kind));
            assert_eq!(WorkloadSpec::new(kind).check(), Ok(kind));
        }
        assert_eq!(
            "mystery".parse::<WorkloadKind>().unwrap_err().to_string(),
            "unknown workload: use one of zipf, sweep, phases, bursts, idle"
        );
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        let good = WorkloadSpec::new(WorkloadKind::Bursts);
        let cases = [
            (WorkloadSpec { kind: 9, ..good }, SpecError::UnknownKind { kind: 9 }),
            (WorkloadSpec { write_permille: 1001, ..good }, SpecError::WritePermille { found: 1001 }),
            (WorkloadSpec { hot_permille: 0, ..good }, SpecError::HotPermille { found: 0 }),
            (WorkloadSpec { final_check: 2, ..good }, SpecError::FinalCheck { found: 2 }),
            (WorkloadSpec { footprint_bytes: 5000, ..good }, SpecError::Footprint { found: 5000 }),
            (
                WorkloadSpec { discard_every_ops: 1, discard_pages_max: 513, ..good },
                SpecError::DiscardPages { found: 513 },
            ),
            (WorkloadSpec { burst_ops: 0, ..good }, SpecError::EmptyBurst),
        ];
        for (spec, error) in cases {
            assert_eq!(spec.check(), Err(error));
        }
    }
}
