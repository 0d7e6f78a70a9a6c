//! Two stages: a guest's tables in memory that is itself translated.
//!
//! Enters: a guest's registers and a guest virtual address. Leaves: the host physical address, or whose fault it is, in
//! which stage, at which entry. Every access to a guest's table is an access of the second stage, so that four levels over
//! four take 24 reads: for each of the guest's four entries four of the host's and the entry itself, and four for the page.
//! [`Counted`] counts them.
//!
//! Nothing the guest writes can make a walk endless, leave its memory or fail otherwise than by an error: its tables are
//! read one level at a time through the second stage, and what they name is an address like any other.
use crate::address::{Input, Output};
use crate::format::x86::Npt;
use crate::memory::TableMemory;
use crate::walk::{Access, Marks, Walked};
use crate::x86::{self, Mode, Registers};
use core::cell::Cell;
use core::fmt;

/// What the second stage is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// An entry of the guest's tables.
    GuestTable,
    /// What the guest accesses.
    Final,
}

/// The translation of guest physical addresses.
pub trait SecondStage {
    /// Why it fails.
    type Fault: Copy + fmt::Debug;

    /// Where a guest physical address is, for this access.
    ///
    /// # Errors
    /// The second stage's fault, which is its host's to handle.
    fn translate(&self, input: Input, access: Access, purpose: Purpose) -> Result<Walked, Self::Fault>;
}

/// AMD nested paging: the tables of nCR3 and where they are.
#[derive(Clone, Copy, Debug)]
pub struct NptStage<'a, M> {
    /// The tables' memory.
    pub memory: &'a M,
    /// nCR3 and the host's EFER.NXE; all else does not count for accesses that are a user's.
    pub registers: Registers,
}

impl<M: TableMemory> SecondStage for NptStage<'_, M> {
    type Fault = NestedPageFault<M::Error>;

    /// All accesses are a user's, and those to a guest's tables are writes (APM vol. 2, 15.25.5 "Nested Table Walk").
    #[inline]
    fn translate(&self, input: Input, access: Access, purpose: Purpose) -> Result<Walked, Self::Fault> {
        let access = if purpose == Purpose::GuestTable { Access::Write } else { access };
        x86::walk::<Npt, M>(self.memory, &self.registers, input, (access, Mode::User), Marks::Set)
            .map_err(|fault| NestedPageFault { purpose, fault })
    }
}

/// A #NPF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedPageFault<E> {
    /// What was accessed.
    pub purpose: Purpose,
    /// Why it could not be.
    pub fault: x86::Fault<E>,
}

impl<E> NestedPageFault<E> {
    /// EXITINFO1, if it is a page fault: the error code, bit 32 for the final address, bit 33 for a table (APM vol. 2,
    /// 15.25.6 "Nested versus Guest Page Faults").
    pub fn exit_info(&self) -> Option<u64> {
        let x86::Fault::Page(fault) = &self.fault else { return None };
        let place = match self.purpose {
            Purpose::Final => 1 << 32,
            Purpose::GuestTable => 1 << 33,
        };
        Some(u64::from(fault.code.bits()) | place)
    }
}

/// A guest's memory: what its tables are read from.
#[derive(Clone, Copy, Debug)]
pub struct GuestMemory<'a, S, M> {
    /// Where guest physical addresses are.
    pub second: S,
    /// What is there.
    pub memory: &'a M,
}

/// Why a guest's table cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestMemoryFault<S, E> {
    /// The second stage's fault.
    Second(S),
    /// The second stage leads where there is no memory.
    Memory {
        /// The host physical address.
        at: Output,
        /// Why.
        error: E,
    },
}

impl<S: SecondStage, M: TableMemory> TableMemory for GuestMemory<'_, S, M> {
    type Error = GuestMemoryFault<S::Fault, M::Error>;

    fn read(&self, at: Output) -> Result<u64, Self::Error> {
        let at = self.host(at, Access::Read)?;
        self.memory.read(at).map_err(|error| GuestMemoryFault::Memory { at, error })
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Self::Error> {
        let at = self.host(at, Access::Write)?;
        self.memory.compare_exchange(at, current, new).map_err(|error| GuestMemoryFault::Memory { at, error })
    }
}

impl<S: SecondStage, M: TableMemory> GuestMemory<'_, S, M> {
    fn host(&self, at: Output, access: Access) -> Result<Output, GuestMemoryFault<S::Fault, M::Error>> {
        let walked = self.second.translate(at.as_input(), access, Purpose::GuestTable);
        walked.map(|walked| walked.output).map_err(GuestMemoryFault::Second)
    }
}

/// Where a guest virtual address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nested {
    /// Through the guest's tables.
    pub first: Walked,
    /// Through the host's.
    pub second: Walked,
}

/// Why a guest virtual address was not translated, by the stage that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault<F, S> {
    /// The guest's stage: a page fault is the guest's own; where its tables could not be reached, the fault says at which
    /// of its entries the second stage refused.
    First(F),
    /// The second stage refused what the guest accesses.
    Second(S),
}

/// Translates a guest virtual address for an access through both stages: `first` walks the guest's tables, as
/// [`x86::walk`] and [`crate::riscv::walk`] do, in the memory it is given. The guest's own rights are judged first.
///
/// # Errors
/// The fault, by stage.
pub fn walk<S: SecondStage, M: TableMemory, F>(
    guest: &GuestMemory<'_, S, M>,
    access: Access,
    first: impl FnOnce(&GuestMemory<'_, S, M>) -> Result<Walked, F>,
) -> Result<Nested, Fault<F, S::Fault>> {
    let first = first(guest).map_err(Fault::First)?;
    let second = guest.second.translate(first.output.as_input(), access, Purpose::Final);
    Ok(Nested { first, second: second.map_err(Fault::Second)? })
}

/// Memory that counts how often it is asked.
#[derive(Debug)]
pub struct Counted<'a, M> {
    memory: &'a M,
    reads: Cell<u64>,
    exchanges: Cell<u64>,
}

impl<'a, M> Counted<'a, M> {
    /// Counts from zero on.
    pub const fn new(memory: &'a M) -> Self {
        Self { memory, reads: Cell::new(0), exchanges: Cell::new(0) }
    }

    /// Words read.
    pub fn reads(&self) -> u64 {
        self.reads.get()
    }

    /// Words exchanged, or tried to.
    pub fn exchanges(&self) -> u64 {
        self.exchanges.get()
    }
}

impl<M: TableMemory> TableMemory for Counted<'_, M> {
    type Error = M::Error;

    fn read(&self, at: Output) -> Result<u64, M::Error> {
        self.reads.set(self.reads.get() + 1);
        self.memory.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, M::Error> {
        self.exchanges.set(self.exchanges.get() + 1);
        self.memory.compare_exchange(at, current, new)
    }
}
