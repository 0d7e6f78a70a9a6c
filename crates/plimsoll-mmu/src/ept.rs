//! What an Intel processor does with a guest physical address: the translation, a violation with its qualification, or a
//! misconfiguration.
//!
//! Intel SDM vol. 3, "EPT Misconfigurations", "EPT Violations", "Accessed and Dirty Flags for EPT", and table "Exit
//! Qualification for EPT Violations". Misconfigurations come first, entry by entry; rights are judged over the whole way.
use crate::address::{Input, Level, Output};
use crate::entry::{Cache, GuestPat, Malformed, Memory, Pat, Permissions};
use crate::format::ept::{Caps, Ept};
use crate::format::{Feature, Format};
use crate::memory::TableMemory;
use crate::nested::{Nested, Purpose, SecondStage};
use crate::walk::{Access, Dead, End, Step, Walked, attempt};
use core::fmt;

bitflags::bitflags! {
    /// Why an access violates EPT, as the exit qualification says it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Qualification: u64 {
        /// A read, or one for a guest's tables.
        const READ = 1;
        /// A write; with accessed and dirty bits on, every access to a guest's tables.
        const WRITE = 1 << 1;
        /// A fetch.
        const FETCH = 1 << 2;
        /// All entries on the way let read.
        const READABLE = 1 << 3;
        /// All let write.
        const WRITABLE = 1 << 4;
        /// All let execute.
        const EXECUTABLE = 1 << 5;
        /// There is a linear address.
        const LINEAR = 1 << 7;
        /// The access was to what the linear address translates to, not to a table on the way.
        const FINAL = 1 << 8;
    }
}

/// Why a guest physical address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault<E> {
    /// It has more bits than the tables translate.
    TooLong(Input),
    /// An EPT violation.
    Violation {
        /// The guest physical address.
        input: Input,
        /// The exit qualification.
        qualification: Qualification,
        /// The level of the entry where the walk ended.
        level: Level,
        /// That entry.
        step: Step,
    },
    /// An EPT misconfiguration: the host's fault.
    Misconfiguration {
        /// The guest physical address.
        input: Input,
        /// The entry's level.
        level: Level,
        /// The entry.
        step: Step,
        /// What is wrong with it.
        reason: Malformed,
    },
    /// An entry cannot be reached.
    Memory {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
        /// Why.
        error: E,
    },
    /// An entry changed each time it was to be marked as accessed.
    Contended {
        /// The guest physical address.
        input: Input,
    },
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong(input) => write!(f, "{input} has more bits than EPT translates"),
            Self::Violation { input, qualification, level, step } => {
                let (bits, at) = (qualification.bits(), step.at);
                write!(
                    f,
                    "EPT violation at {input}, qualification {bits:#x}, and the walk ended at the entry of {level} at {at}"
                )
            }
            Self::Misconfiguration { input, level, step, reason } => {
                write!(f, "EPT misconfiguration at {input}, by the entry of {level} at {}: {reason}", step.at)
            }
            Self::Memory { level, at, error } => {
                write!(f, "the entry of {level} at {at} cannot be reached: {error:?}")
            }
            Self::Contended { input } => {
                write!(f, "the entries for {input} change faster than they can be walked")
            }
        }
    }
}

impl<E: fmt::Debug> core::error::Error for Fault<E> {}

/// An EPT pointer's tables and where they are.
#[derive(Clone, Copy, Debug)]
pub struct Stage<'a, M> {
    /// The tables' memory.
    pub memory: &'a M,
    /// Where the root is: the EPT pointer without its low twelve bits.
    pub root: Output,
    /// The processor.
    pub caps: Caps,
}

impl<M: TableMemory> SecondStage for Stage<'_, M> {
    type Fault = Fault<M::Error>;

    fn translate(&self, input: Input, access: Access, purpose: Purpose) -> Result<Walked, Self::Fault> {
        if !Ept::accepts(input) {
            return Err(Fault::TooLong(input));
        }
        let root = Output(self.root.0 & crate::format::field(12, 40));
        // "Accessed and Dirty Flags for EPT": with them on, accesses to a guest's tables count as writes, also as violations.
        let keeps = self.caps.accessed_dirty == Feature::On;
        let table = purpose == Purpose::GuestTable;
        let acts = if table && keeps { Access::Write } else { access };
        let needs = if acts == access { acts.needs() } else { acts.needs() | access.needs() };
        let base = Qualification::from_access(needs)
            | Qualification::LINEAR
            | if table { Qualification::empty() } else { Qualification::FINAL };
        let ended = |end| ended(input, base, end);
        let judge = |walked: &Walked| {
            if !walked.permissions.contains(needs) {
                let qualification = base | Qualification::from_permissions(walked.permissions);
                let (level, step) = (walked.level, walked.step(walked.level));
                return Err(Fault::Violation { input, qualification, level, step });
            }
            Ok(keeps.then_some(acts))
        };
        attempt::<Ept, M, _>(self.memory, root, &self.caps, input, ended, judge)?
            .ok_or(Fault::Contended { input })
    }
}

/// The type of an access through both stages, CR0.CD being clear: EPT's stands for that of the range registers, which
/// have no say, and is combined with the guest's page or is all that counts ("EPT and Memory Typing"). `None` where one of
/// the leaves is not of its stage, or the PAT has a reserved number.
pub fn memory_type(nested: &Nested, guest_pat: Pat) -> Option<Cache> {
    let (Memory::Pat(index), Memory::Ept(memory, combined)) =
        (nested.first.leaf.memory, nested.second.leaf.memory)
    else {
        return None;
    };
    match combined {
        GuestPat::Ignored => Some(memory),
        GuestPat::Combined => Some(memory.with_page(guest_pat.cache(index)?)),
    }
}

impl Qualification {
    /// Bits 2:0 for what an access does.
    fn from_access(needs: Permissions) -> Self {
        Self::from_bits_truncate(u64::from(needs.bits() & 7))
    }

    /// Bits 5:3 for what the entries permit.
    fn from_permissions(permissions: Permissions) -> Self {
        Self::from_bits_truncate(u64::from(permissions.bits() & 7) << 3)
    }
}

// The exit qualification has read, write and execute in the order of `Permissions`.
const _: () = assert!(Qualification::READ.bits() == Permissions::READ.bits() as u64);
const _: () = assert!(Qualification::WRITE.bits() == Permissions::WRITE.bits() as u64);
const _: () = assert!(Qualification::FETCH.bits() == Permissions::EXECUTE_USER.bits() as u64);

fn ended<E>(input: Input, base: Qualification, end: End<E>) -> Fault<E> {
    let End { level, step, .. } = end;
    match end.dead {
        // Bits 5:3 are the intersection over all entries, and an absent one permits nothing.
        Dead::Absent => Fault::Violation { input, qualification: base, level, step },
        Dead::Malformed(reason) => Fault::Misconfiguration { input, level, step, reason },
        Dead::Memory(error) => Fault::Memory { level, at: step.at, error },
    }
}
