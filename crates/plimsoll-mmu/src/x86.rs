//! What an x86-64 processor does with an address: the translation, or the page fault with its error code.
//!
//! Intel SDM vol. 3, "Determination of Access Rights" (4.6.1), "Protection Keys" (4.6.2), "Page-Fault Exceptions" (4.7),
//! "Accessed and Dirty Flags" (4.8). Rights are judged after the whole walk: an absent entry further down wins over a
//! missing right further up. Bits that must be zero are judged entry by entry, after P.
use crate::address::{Input, Level, Output};
use crate::entry::{Malformed, Permissions};
use crate::format::Feature;
use crate::format::x86::{Caps, X86Format};
use crate::memory::TableMemory;
use crate::walk::{Access, Dead, End, Marks, Step, Walked, attempt};
use core::fmt;

/// Who accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// CPL 3.
    User,
    /// CPL 0 to 2, by the instruction's own operands.
    Supervisor,
    /// The processor on its own account, whatever the CPL: descriptor tables, the task state. EFLAGS.AC does not excuse it.
    Implicit,
}

bitflags::bitflags! {
    /// The control bits that decide about rights.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Control: u8 {
        /// CR0.WP: supervisors respect R/W.
        const WRITE_PROTECT = 1;
        /// CR4.SMEP: supervisors do not fetch from user pages.
        const SMEP = 1 << 1;
        /// CR4.SMAP: supervisors do not access user data.
        const SMAP = 1 << 2;
        /// EFLAGS.AC: they do, where they say so.
        const ALIGNMENT_CHECK = 1 << 3;
    }

    /// The error code of a page fault (SDM figure "Page-Fault Error Code").
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct ErrorCode: u32 {
        /// P: all entries were present.
        const PRESENT = 1;
        /// W/R.
        const WRITE = 1 << 1;
        /// U/S: the access, not the page, was a user's.
        const USER = 1 << 2;
        /// RSVD: a reserved bit was set.
        const RESERVED = 1 << 3;
        /// I/D: a fetch, where fetches can be forbidden at all.
        const FETCH = 1 << 4;
        /// PK: the page's protection key forbids it.
        const KEY = 1 << 5;
    }
}

/// What of a processor's state a walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    /// CR3. Bits that are not the root's address are not looked at.
    pub cr3: u64,
    /// Control bits.
    pub control: Control,
    /// PKRU: for each key, bit 0 forbids data accesses and bit 1 writes. Counts where [`Caps::keys`] is on.
    pub pkru: u32,
    /// EFER.NXE, CR4.PKE and what CPUID says.
    pub caps: Caps,
}

/// Why an address was not translated. `E` is what the tables' memory says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault<E> {
    /// It is not canonical, or too long: no page fault, but #GP or #SS.
    NotCanonical(Input),
    /// A page fault.
    Page(PageFault),
    /// An entry of the tables cannot be reached.
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
        /// The address.
        input: Input,
    },
}

/// A page fault, and where the walk ended: any entry on the way may have withheld the right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// CR2.
    pub input: Input,
    /// What the processor pushes.
    pub code: ErrorCode,
    /// The level of the entry where the walk ended.
    pub level: Level,
    /// That entry.
    pub step: Step,
    /// What is wrong with it, if [`ErrorCode::RESERVED`].
    pub malformed: Option<Malformed>,
}

impl<E: fmt::Debug> fmt::Display for Fault<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotCanonical(input) => write!(f, "{input} is not canonical"),
            Self::Page(fault) => {
                let (code, at) = (fault.code.bits(), fault.step.at);
                write!(
                    f,
                    "page fault at {}, code {code:#x}, and the walk ended at the entry of {} at {at}",
                    fault.input, fault.level
                )
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

/// Translates `input` for an access, as the processor would.
///
/// Accessed and dirty bits are set once the access is known to be allowed. A processor may set some earlier; both are
/// within the manual.
///
/// # Errors
/// The fault.
pub fn walk<F: X86Format, M: TableMemory>(
    memory: &M,
    registers: &Registers,
    input: Input,
    (access, mode): (Access, Mode),
    marks: Marks,
) -> Result<Walked, Fault<M::Error>> {
    if !F::accepts(input) {
        return Err(Fault::NotCanonical(input));
    }
    let root = Output(registers.cr3 & crate::format::field(12, 40));
    let code = base_code(registers, access, mode);
    let ended = |end| ended(input, code, end);
    let judge = |walked: &Walked| match refusal(registers, walked, access, mode) {
        None => Ok((marks == Marks::Set).then_some(access)),
        Some(more) => {
            let (level, step) = (walked.level, walked.step(walked.level));
            let code = code | ErrorCode::PRESENT | more;
            Err(Fault::Page(PageFault { input, code, level, step, malformed: None }))
        }
    };
    attempt::<F, M, _>(memory, root, &registers.caps, input, ended, judge)?.ok_or(Fault::Contended { input })
}

/// The bits of the error code that describe the access.
fn base_code(registers: &Registers, access: Access, mode: Mode) -> ErrorCode {
    let fetches_matter =
        registers.caps.no_execute == Feature::On || registers.control.contains(Control::SMEP);
    let mut code = ErrorCode::empty();
    code.set(ErrorCode::WRITE, access == Access::Write);
    code.set(ErrorCode::USER, mode == Mode::User);
    code.set(ErrorCode::FETCH, access == Access::Fetch && fetches_matter);
    code
}

fn ended<E>(input: Input, code: ErrorCode, end: End<E>) -> Fault<E> {
    let End { level, step, .. } = end;
    let (more, malformed) = match end.dead {
        Dead::Memory(error) => return Fault::Memory { level, at: step.at, error },
        Dead::Absent => (ErrorCode::empty(), None),
        Dead::Malformed(reason) => (ErrorCode::PRESENT | ErrorCode::RESERVED, Some(reason)),
    };
    Fault::Page(PageFault { input, code: code | more, level, step, malformed })
}

/// Whether the access is refused, and with which further bits of the error code.
fn refusal(registers: &Registers, walked: &Walked, access: Access, mode: Mode) -> Option<ErrorCode> {
    let control = registers.control;
    let permissions = walked.permissions;
    let user_page = permissions.contains(Permissions::USER);
    let by_page = match mode {
        Mode::User => !user_page || !permissions.contains(access.needs()),
        Mode::Supervisor | Mode::Implicit => {
            let excused = mode == Mode::Supervisor && control.contains(Control::ALIGNMENT_CHECK);
            let (data, fetch) = (
                user_page && control.contains(Control::SMAP) && !excused,
                user_page && control.contains(Control::SMEP),
            );
            match access {
                Access::Read => data,
                Access::Write => {
                    let read_only = !permissions.contains(Permissions::WRITE);
                    data || (read_only && control.contains(Control::WRITE_PROTECT))
                }
                Access::Fetch => fetch || !permissions.contains(Permissions::EXECUTE),
            }
        }
    };
    let by_key =
        user_page && registers.caps.keys == Feature::On && key_forbids(registers, walked, access, mode);
    match (by_page, by_key) {
        (_, true) => Some(ErrorCode::KEY),
        (true, false) => Some(ErrorCode::empty()),
        (false, false) => None,
    }
}

/// Whether PKRU forbids a data access to a user page. Write-disable binds supervisors only under CR0.WP.
fn key_forbids(registers: &Registers, walked: &Walked, access: Access, mode: Mode) -> bool {
    let rights = registers.pkru >> (2 * u32::from(walked.leaf.key));
    let (no_access, no_write) = (rights & 1 != 0, rights & 2 != 0);
    let bound = mode == Mode::User || registers.control.contains(Control::WRITE_PROTECT);
    match access {
        Access::Fetch => false,
        Access::Read => no_access,
        Access::Write => no_access || (no_write && bound),
    }
}
