//! Shadow paging: a guest's own page tables and where its memory is, made into tables that the processor can walk without a second
//! stage.
//!
//! Enters: what the guest does to its address space: page faults, CR3 loads, INVLPG, writes to its tables; and changes of where its
//! memory is. Leaves: shadow tables, what is to become of the access, and the [`Fence`] that must follow. A guest never gets
//! an access that its tables have not allowed since its own last fence, or that the [`P2m`] does not allow now.
//!
//! # Which tables there are
//!
//! One shadow for each table of the guest's, its level and the role it is used in, whatever address spaces lead to it. The role is
//! what the entries above permit together, and those control bits that decide what an entry means. So the leaf alone says what
//! may be done: all shadow entries that name tables permit everything. A large page of the guest that cannot be one here is a
//! *piece*: a table of ours that stands for no table of the guest's, and that is known by the page's frame and attributes instead.
//!
//! An entry is made when an access faults for it, never before. The guest's tables are walked afresh, as a processor would
//! ([`crate::x86::walk`]), and that walk is what sets the guest's accessed and dirty bits. From then on:
//!
//! * a shadow entry is there only if the guest's entry had its accessed bit by then, and writable only if it was dirty;
//! * what a processor may have cached is what a shadow table says: whatever takes a right away returns [`Fence::All`].
//!
//! # How the guest's tables may change
//!
//! A table that is shadowed is *protected*: no shadow entry maps it writable. A write to it faults; the caller carries it out
//! ([`Outcome::Emulate`]), says so ([`Shadow::wrote`]), and what was made of the old entry is gone.
//!
//! A table of the last level is let go instead: it becomes *unsync*, the guest writes it at full speed, and its shadows may say what
//! it said before, as a TLB might. They are compared with it when the guest fences: with INVLPG the one entry of each unsync
//! table that can translate the address (whoever's it is: global translations go in all address spaces), with CR3 or INVPCID
//! every entry. A fence also takes the right to write away. A table that nobody could write since the fence before is protected
//! again; one that is written between every two fences stays unsync and costs no fault.
//!
//! The order that makes it true: rights to write a frame go first, then the returned fence is executed, and only then something
//! is made of what the frame says, or it is called protected. So a fault that has to take such rights away for a new shadow
//! leaves it empty and has the guest try again.
//!
//! # What the caller owes
//!
//! The returned [`Fence`] is executed on every processor that runs the guest, before any of them goes on and before the next call. Calls are
//! made one at a time. Different roots need different tags (PCID) or a fence at each switch: the tables know nothing of tags,
//! and none of their entries is global. The processor runs with CR0.WP, with EFER.NXE, and with the guest's SMEP, SMAP, PKE and PAT. Writes to the
//! guest's memory that are not the guest's own (devices, a debugger) are told to [`Shadow::wrote`] after they happened.
//!
//! # Rights without CR0.WP
//!
//! Supervisors then write to what is read-only. A supervisor's page is mapped writable. A user's page cannot be written by supervisors and not by
//! users; it becomes a supervisor's page while the supervisor writes, not to be executed if SMEP would forbid it, and a user's
//! again when a user comes. Under SMAP or protection keys, which look at that bit, the write is emulated instead.
//!
//! # Running out
//!
//! Without a free record or frame the table goes that was unused for longest. Its frame is given back at the next call, since the fence comes
//! first; the access that needed it is tried again. Tables of loaded roots stay.
//!
//! Sources: Linux, Documentation/virt/kvm/x86/mmu.rst ("Shadow pages", "Synchronized and unsynchronized pages", "Reaction to
//! events", "Emulating cr0.wp"); Intel SDM vol. 3, 4.8 "Accessed and Dirty Flags", 4.10 "Caching Translation Information"; AMD APM
//! vol. 2, 15.25.2 "Replicated State" and 15.9 on shadow paging.
mod fault;
mod records;
mod tables;

pub use records::Record;

use crate::address::{Input, Level, Output};
use crate::entry::{Entry, Leaf, Memory, Permissions, Unencodable};
use crate::format::x86::{Caps, X86Format};
use crate::memory::{TableFrames, TableMemory};
use crate::tlb;
use crate::walk::Access;
use crate::x86::{self, Control, Registers};
use core::fmt;
use core::marker::PhantomData;
use plimsoll_types::Gpa;
use records::Lists;

/// A guest's memory: its words, by guest physical address, and where its pages are.
///
/// As [`TableMemory`] it is where the guest's tables are read and marked; marks are writes of the host's, which a dirty log has to
/// see there.
pub trait P2m: TableMemory {
    /// Where the page at `page` is; `None` if it is not there, or is no memory.
    fn backing(&self, page: Gpa) -> Option<Backing>;

    /// The guest is about to get the right to write to a page whose writes are [`Writes::Logged`].
    fn log(&self, page: Gpa);
}

/// Where a page of a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The page's frame.
    pub frame: Output,
    /// log2 of the naturally aligned run of guest memory around the page that is in one naturally aligned run here, with the same
    /// rights: 12 for the page alone, and wherever writes are logged page by page.
    pub shift: u32,
    /// What the host lets be done: nothing without [`Permissions::READ`].
    pub permissions: Permissions,
    /// Whether it wants to know of writes.
    pub writes: Writes,
}

/// Whether the host wants to know of writes to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// It does not.
    Free,
    /// It does: the page is mapped read-only until the guest writes to it, and again after [`Shadow::protect`].
    Logged,
}

/// What has to be forgotten before any processor runs the guest again, and before the next call.
#[must_use = "a processor may hold a translation that the guest no longer has"]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fence {
    /// Nothing.
    #[default]
    None,
    /// Every translation of the guest's: a table serves any number of addresses and address spaces.
    All,
}

impl Fence {
    /// The fence for a guest with this VPID.
    pub const fn vmx(self, vpid: u16) -> Option<tlb::Fence> {
        match self {
            Self::None => None,
            Self::All => Some(tlb::Fence::Vmx(tlb::Vmx::InvvpidSingle { vpid })),
        }
    }

    /// The fence for a guest with this ASID.
    pub const fn svm(self, asid: u16) -> Option<tlb::Fence> {
        match self {
            Self::None => None,
            Self::All => Some(tlb::Fence::Svm(tlb::Svm::FlushGuest { asid })),
        }
    }

    /// What a change of a shadow entry asks for. What only gains rights can be stale at the price of a fault, which the processor
    /// answers by dropping it (SDM vol. 3, 4.10.4.1).
    fn between(old: &Entry, new: &Entry) -> Self {
        match (old, new) {
            (Entry::Absent { .. }, _) => Self::None,
            (Entry::Leaf(was), Entry::Leaf(is)) => {
                let same = Leaf { permissions: is.permissions, dirty: is.dirty, ..*was } == *is;
                if same && is.permissions.contains(was.permissions) { Self::None } else { Self::All }
            }
            (was, is) if was == is => Self::None,
            _ => Self::All,
        }
    }
}

/// What is to become of an access that faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome<E> {
    /// The guest tries again. It may fault again, for the next thing that is missing.
    Resume,
    /// The guest's tables refuse it: the fault is the guest's, where it is one; or a table is where the guest has no memory.
    Refused(x86::Fault<E>),
    /// The guest's tables allow it, and the host has no memory there, or none for such an access.
    Missing {
        /// What the guest accesses.
        at: Gpa,
        /// How.
        access: Access,
    },
    /// The guest may write there, and tables cannot let it: the caller carries the write out and calls [`Shadow::wrote`].
    Emulate {
        /// Where it writes.
        at: Gpa,
    },
}

/// What becomes of an access of a guest `G`, whose shadow tables are in `M`, and the fence that must follow.
pub type Answer<G, M> = Result<(Outcome<<G as TableMemory>::Error>, Fence), Error<<M as TableMemory>::Error>>;

/// A guest's fence, but for the one that CR3 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// INVLPG, INVPCID type 0: of one address.
    Address(Input),
    /// INVPCID types 1 to 3, a change of CR4.PGE, PCIDE, PSE, PAE, SMEP: everything.
    Everything,
}

/// Whether a CR3 load is a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// It is.
    Fences,
    /// Bit 63 was set and PCIDs are on: nothing has to be forgotten.
    Keeps,
}

/// Why the shadow tables cannot go on. `E` is what their memory says. Nothing is left half done: what was made is whole, and what is
/// missing is made by a later fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error<E> {
    /// There are no records, or too many, or too few heads of lists for them.
    Storage {
        /// Records.
        records: usize,
        /// Heads.
        heads: usize,
    },
    /// This CR3, with these control bits, was not loaded: the caller's fault.
    NotLoaded {
        /// CR3.
        cr3: u64,
    },
    /// All tables are part of this access or loaded as roots: give more records, or frames for this level.
    Exhausted {
        /// What the table was for.
        level: Level,
    },
    /// A shadow table cannot be reached.
    Memory {
        /// The entry.
        at: Output,
        /// Why.
        error: E,
    },
    /// Somebody else writes this shadow entry.
    Contended {
        /// The entry.
        at: Output,
    },
    /// The host's processors have no word for what the guest or the p2m says.
    Unencodable {
        /// The entry's level.
        level: Level,
        /// Why.
        reason: Unencodable,
    },
}

impl<E: fmt::Debug> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Storage { records, heads } => write!(
                f,
                "{records} records with {heads} heads of lists; give 1 to 1048576 records and the heads that Shadow::heads says"
            ),
            Self::NotLoaded { cr3 } => {
                write!(f, "cr3 {cr3:#x} is not loaded with these control bits; load it first")
            }
            Self::Exhausted { level } => {
                write!(f, "every table is in use and one of {level} is needed; give more records or frames")
            }
            Self::Memory { at, error } => write!(f, "the shadow entry at {at} cannot be reached: {error:?}"),
            Self::Contended { at } => write!(f, "the shadow entry at {at} is written by somebody else"),
            Self::Unencodable { level, reason } => {
                write!(f, "a shadow entry of {level} cannot say this: {reason}")
            }
        }
    }
}

impl<E: fmt::Debug> core::error::Error for Error<E> {}

/// What stands behind a shadow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A table of the guest's.
    Table,
    /// A part of a large page of the guest's: all that its entry says, but for the address and the rights.
    Piece { dirty: bool, memory: Memory, key: u8 },
}

/// What a shadow table's entries depend on besides the guest's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Role {
    level: Level,
    kind: Kind,
    /// What the guest's entries on the way permit together.
    inherited: Permissions,
    /// Of the control bits those that decide what is mapped how.
    control: Control,
    caps: Caps,
}

impl Role {
    /// The role of the root that these registers name. With CR0.WP an entry means the same whatever SMEP and SMAP say: the
    /// processor looks at those itself.
    fn root<F: X86Format>(registers: &Registers) -> Self {
        let seen = if registers.control.contains(Control::WRITE_PROTECT) {
            Control::WRITE_PROTECT
        } else {
            Control::SMEP | Control::SMAP
        };
        Self {
            level: F::root(),
            kind: Kind::Table,
            inherited: Permissions::all(),
            control: registers.control & seen,
            caps: registers.caps,
        }
    }
}

/// The shadow tables of one guest.
///
/// `F` is the format of the guest's tables and of their shadows; `M` is where shadow tables are, and `P` where their frames
/// come from.
#[derive(Debug)]
pub struct Shadow<'a, F, M, P> {
    lists: Lists<'a>,
    memory: &'a M,
    frames: &'a mut P,
    /// The processor's.
    caps: Caps,
    /// Counts calls, so that it is known what is unused for how long.
    now: u64,
    format: PhantomData<F>,
}

impl<'a, F: X86Format, M: TableMemory, P: TableFrames> Shadow<'a, F, M, P> {
    /// How many heads of lists so many records need, with lists of one or two on the average.
    pub const fn heads(records: usize) -> usize {
        Lists::heads(records)
    }

    /// Shadow tables, none yet, with these records of them, for processors with `caps`.
    ///
    /// A path takes as many tables as there are levels, and every root that is loaded stays.
    ///
    /// # Errors
    /// [`Error::Storage`].
    pub fn new(
        (records, heads): (&'a mut [Record], &'a mut [u32]),
        memory: &'a M,
        frames: &'a mut P,
        caps: Caps,
    ) -> Result<Self, Error<M::Error>> {
        const {
            assert!(
                F::INDEX_BITS == Record::INDEX_BITS && F::ROOT_BITS == F::INDEX_BITS,
                "a record is for 512 entries"
            );
        }
        let (counted, given) = (records.len(), heads.len());
        let lists = Lists::new(records, heads).ok_or(Error::Storage { records: counted, heads: given })?;
        Ok(Self { lists, memory, frames, caps, now: 0, format: PhantomData })
    }

    /// The guest loads CR3. The shadow's root, which stays until [`unload`](Self::unload); `None` if the fence must be executed
    /// first, after which the call is made again.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load<G: P2m>(
        &mut self,
        guest: &G,
        registers: &Registers,
        load: Load,
    ) -> Result<(Option<Output>, Fence), Error<M::Error>> {
        self.begin();
        let mut fence = Fence::None;
        if load == Load::Fences {
            fence = self.synchronize(guest)?;
        }
        let (root, more) = self.ensure(root_page(registers), Role::root::<F>(registers))?;
        let frame = root.map(|root| {
            let record = self.lists.record_mut(root);
            record.pins = record.pins.saturating_add(1);
            record.frame
        });
        Ok((frame, fence.max(more)))
    }

    /// A processor no longer has the root that it loaded with these registers.
    pub fn unload(&mut self, registers: &Registers) {
        if let Some(root) = self.lists.find(root_page(registers), &Role::root::<F>(registers)) {
            let record = self.lists.record_mut(root);
            record.pins = record.pins.saturating_sub(1);
        }
    }

    /// The guest fences.
    ///
    /// # Errors
    /// [`Error`].
    pub fn invalidate<G: P2m>(&mut self, guest: &G, what: Invalidation) -> Result<Fence, Error<M::Error>> {
        self.begin();
        let Invalidation::Address(input) = what else { return self.synchronize(guest) };
        let mut fence = Fence::None;
        let mut next = self.lists.first_unsync();
        while let Some(table) = next {
            next = self.lists.next_unsync(table);
            fence = fence.max(self.compare(guest, table, F::index(input, Level::PAGES))?);
        }
        Ok(fence)
    }

    /// Somebody other than the guest's own instructions, or those on its behalf, wrote `bytes` bytes of its memory from `at` on.
    ///
    /// # Errors
    /// [`Error`].
    pub fn wrote<G: P2m>(&mut self, guest: &G, at: Gpa, bytes: u64) -> Result<Fence, Error<M::Error>> {
        self.begin();
        let mut fence = Fence::None;
        let Some(last) = bytes.checked_sub(1).map(|more| at.0.saturating_add(more)) else { return Ok(fence) };
        for page in at.0 >> 12..=last >> 12 {
            let first = at.0.max(page << 12) >> 3 & 511;
            let end = last.min(page << 12 | 0xfff) >> 3 & 511;
            let mut next = self.lists.first_of_page(page);
            while let Some(table) = next {
                next = self.lists.next_of_page(table, page);
                for index in first..=end {
                    fence = fence.max(self.compare(guest, table, index)?);
                }
            }
        }
        Ok(fence)
    }

    /// The pages from `page` on are taken from the guest, or other memory comes in their place: nothing maps them any more, and nothing
    /// is kept of the tables in them.
    ///
    /// # Errors
    /// [`Error`].
    pub fn taken(&mut self, page: Gpa, pages: u64) -> Result<Fence, Error<M::Error>> {
        self.begin();
        let mut fence = Fence::None;
        for page in (page.0 >> 12..).take(usize::try_from(pages).unwrap_or(usize::MAX)) {
            fence = fence.max(self.unmap(page)?);
            let mut next = self.lists.first_of_page(page);
            while let Some(table) = next {
                next = self.lists.next_of_page(table, page);
                fence = fence.max(self.clear(table)?);
            }
        }
        Ok(fence)
    }

    /// The next write to the pages from `page` on faults, and is logged.
    ///
    /// # Errors
    /// [`Error`].
    pub fn protect(&mut self, page: Gpa, pages: u64) -> Result<Fence, Error<M::Error>> {
        self.begin();
        let mut fence = Fence::None;
        for page in (page.0 >> 12..).take(usize::try_from(pages).unwrap_or(usize::MAX)) {
            fence = fence.max(self.withdraw(page)?);
        }
        Ok(fence)
    }

    /// Gives up to `tables` tables back that were unused for longest. Their frames come back at the next call, after the fence.
    ///
    /// # Errors
    /// [`Error`].
    pub fn shrink(&mut self, tables: usize) -> Result<Fence, Error<M::Error>> {
        self.begin();
        let mut fence = Fence::None;
        for _ in 0..tables {
            let Some(oldest) = self.oldest(None) else { break };
            fence = fence.max(self.zap(oldest)?);
        }
        Ok(fence)
    }

    /// Another call: the fence of the one before was executed, so that what it dropped is nobody's.
    fn begin(&mut self) {
        self.now += 1;
        while let Some((level, frame)) = self.lists.bury() {
            self.frames.give(level, frame);
        }
    }
}

/// The page of the table that CR3 names.
const fn root_page(registers: &Registers) -> u64 {
    (registers.cr3 & crate::format::field(12, 40)) >> 12
}
