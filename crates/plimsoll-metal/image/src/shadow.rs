//! A guest whose processor has no second stage: it walks shadow tables, which `plimsoll-mmu` makes of the guest's own and of its
//! nested tables, that no processor walks then.
//!
//! Enters: page faults, CR3 loads, fences and writes to its tables; pages that are taken from it. Leaves: what a fault wants, and whether
//! translations are stale. What must never happen: a page taken out of the nested tables that a shadow still maps; so both are
//! changed in one place, [`crate::nested`].
//!
//! A write to a protected table is carried out by the guest itself: its shadow lets it write, it runs one instruction with the trap flag
//! set, and before it runs another the right is gone and what it may have written is compared. No instruction is decoded. With
//! one processor nobody else can use the right meanwhile.
use crate::memory::{Frame, Memory, Outside, Physical};
use crate::paging::PagingError;
use crate::svm::Translations;
use alloc::boxed::Box;
use alloc::vec::Vec;
use plimsoll_core::frames::buddy::{FramesError, Kind};
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::nested::{GuestMemory, GuestMemoryFault, NestedPageFault, NptStage, Purpose, SecondStage};
use plimsoll_mmu::shadow::{Backing, Fence, Invalidation, Load, Outcome, P2m, Record, Shadow, Writes};
use plimsoll_mmu::x86::{self, Control, Mode, PageFault, Registers};
use plimsoll_mmu::{
    Access, Entry, Format, Input, Level, Marks, Output, Permissions, TableFrames, TableMemory,
};
use plimsoll_types::{BLOCK_PAGES, ByteCount, Gpa, Hpa, PAGE_SHIFT, PAGE_SIZE, PageCount};

/// Tables beside one for each block of the guest's memory: those above, and those of further address spaces.
const MORE_TABLES: u64 = 24;
/// How often a fault is tried while its tables make room for each other.
const TRIES: usize = 8;

/// Shadow tables that a guest of so many pages gets.
fn tables(pages: PageCount) -> usize {
    usize::try_from(pages.0.div_ceil(u64::from(BLOCK_PAGES)) + MORE_TABLES).unwrap_or(usize::MAX)
}

/// What they take of the hypervisor's heap.
pub fn heap_bytes(pages: PageCount) -> ByteCount {
    let tables = tables(pages);
    let heads = Tables::heads(tables).saturating_mul(size_of::<u32>());
    ByteCount(tables.saturating_mul(size_of::<Record>()).saturating_add(heads) as u64)
}

/// Frames of tables that are not used now, all zero. The last is taken first.
pub struct Stock(pub Vec<Output>);

impl TableFrames for Stock {
    fn left(&self, _: Level) -> usize {
        self.0.len()
    }

    fn take(&mut self, _: Level) -> Option<Output> {
        self.0.pop()
    }

    fn give(&mut self, _: Level, frame: Output) {
        self.0.push(frame);
    }
}

type Tables = Shadow<'static, Long4, Physical, Stock>;
type Stage = NptStage<'static, Physical>;

/// A guest's memory, by its nested tables.
pub struct Behind(GuestMemory<'static, Stage, Physical>);

impl Behind {
    /// That behind nested tables at `nested_root`.
    pub const fn new(memory: &'static Physical, nested_root: Hpa, caps: Caps) -> Self {
        let second = NptStage { memory, registers: registers(nested_root.0, caps) };
        Self(GuestMemory { second, memory })
    }
}

/// The bytes at `rip` of a guest with tables at `cr3` of `memory`, as it executes them; `None` where it could not.
pub fn instruction(memory: &impl TableMemory, cr3: u64, caps: Caps, rip: u64) -> Option<[u8; 15]> {
    let mut bytes = [0; 15];
    for (at, byte) in (rip..).zip(&mut bytes) {
        // It may be a kernel's; a user's can be fetched like that, too.
        let look = (Access::Fetch, Mode::Supervisor);
        let Ok(walked) = x86::walk::<Long4, _>(memory, &registers(cr3, caps), Input(at), look, Marks::Leave)
        else {
            // What follows the instruction need not be there.
            return (at > rip).then_some(bytes);
        };
        let word = memory.read(Output(walked.output.0 & !7)).ok()?;
        *byte = word.to_le_bytes()[usize::try_from(at & 7).ok()?];
    }
    Some(bytes)
}

impl TableMemory for Behind {
    type Error = GuestMemoryFault<NestedPageFault<Outside>, Outside>;

    fn read(&self, at: Output) -> Result<u64, Self::Error> {
        self.0.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Self::Error> {
        self.0.compare_exchange(at, current, new)
    }
}

impl P2m for Behind {
    /// A page that a shadow entry is made for was used: its accessed bit in the nested tables is set, as a processor would.
    fn backing(&self, page: Gpa) -> Option<Backing> {
        let walked = self.0.second.translate(page.into(), Access::Read, Purpose::Final).ok()?;
        let (frame, permissions) = (walked.output, walked.permissions);
        Some(Backing { frame, shift: PAGE_SHIFT, permissions, writes: Writes::Free })
    }

    fn log(&self, _: Gpa) {}
}

/// What a page fault of the guest's wants.
#[derive(Clone, Copy, Debug)]
pub enum Wanted {
    /// Nothing more: the guest tries again.
    Nothing,
    /// A page that it does not have.
    Page(Gpa),
    /// That it writes to a table: one instruction at a time from now on.
    Step,
    /// It is the guest's own.
    Refused(PageFault),
    /// The address is none: a general protection fault.
    NoAddress,
}

/// A guest's shadow tables.
pub struct Shadowed {
    tables: Tables,
    frames: Vec<Frame>,
    behind: Behind,
    /// The guest's own.
    registers: Registers,
    root: Hpa,
    /// Pages with tables that its next instruction may write.
    open: Vec<Gpa>,
}

/// The registers by which tables that start at `root` are walked.
const fn registers(root: u64, caps: Caps) -> Registers {
    Registers { cr3: root, control: Control::WRITE_PROTECT, pkru: 0, caps }
}

/// The guest does not run before the fence was executed; nor, with one processor, while this does.
fn note(fence: Fence, translations: &mut Translations) {
    if fence != Fence::None {
        *translations = Translations::Stale;
    }
}

impl Shadowed {
    /// Shadows of the tables at `cr3`, none yet, of a guest with so many pages and nested tables at `nested_root`. Records are kept as
    /// long as the machine runs; frames are given back at the [end](Self::end).
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(
        memory: &mut Memory,
        caps: Caps,
        pages: PageCount,
        (nested_root, cr3): (Hpa, u64),
    ) -> Result<Self, PagingError> {
        let count = tables(pages);
        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            match memory.take_zeroed(Kind::Host) {
                Ok(frame) => frames.push(frame),
                Err(error) => {
                    give_all(memory, frames)?;
                    return Err(error.into());
                }
            }
        }
        let stock = Box::leak(Box::new(Stock(frames.iter().map(|frame| Output(frame.at().0)).collect())));
        let records = alloc::vec![Record::EMPTY; count].leak();
        let heads = alloc::vec![0; Tables::heads(count)].leak();
        let physical = memory.physical();
        let mut shadowed = Self {
            tables: Shadow::new((records, heads), physical, stock, caps)?,
            frames,
            behind: Behind::new(physical, nested_root, caps),
            registers: registers(cr3, caps),
            root: Hpa(0),
            open: Vec::new(),
        };
        // No processor has run with these tables: whatever fence is asked for, it was executed.
        shadowed.root = shadowed.find_root(&mut Translations::Stale)?;
        Ok(shadowed)
    }

    fn find_root(&mut self, translations: &mut Translations) -> Result<Hpa, PagingError> {
        loop {
            let (root, fence) = self.tables.load(&self.behind, &self.registers, Load::Fences)?;
            note(fence, translations);
            if let Some(root) = root {
                return Ok(Hpa(root.0));
            }
        }
    }

    /// What the processor's CR3 is to be.
    pub const fn root(&self) -> Hpa {
        self.root
    }

    /// What the guest takes CR3 for.
    pub const fn cr3(&self) -> u64 {
        self.registers.cr3
    }

    /// The guest loads CR3.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn load(&mut self, cr3: u64, translations: &mut Translations) -> Result<(), PagingError> {
        self.tables.unload(&self.registers);
        self.registers.cr3 = cr3;
        // Nothing of the address space before, whose tag is the same.
        *translations = Translations::Stale;
        self.root = self.find_root(translations)?;
        Ok(())
    }

    /// The guest fences.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn invalidate(
        &mut self,
        what: Invalidation,
        translations: &mut Translations,
    ) -> Result<(), PagingError> {
        note(self.tables.invalidate(&self.behind, what)?, translations);
        Ok(())
    }

    /// A page is no longer behind the nested tables' entry.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn taken(&mut self, page: Gpa, translations: &mut Translations) -> Result<(), PagingError> {
        note(self.tables.taken(page, 1)?, translations);
        Ok(())
    }

    /// The hypervisor wrote to the guest's memory.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn wrote(&mut self, at: Gpa, bytes: u64, translations: &mut Translations) -> Result<(), PagingError> {
        note(self.tables.wrote(&self.behind, at, bytes)?, translations);
        Ok(())
    }

    /// An access of the guest's faulted.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn fault(
        &mut self,
        input: Input,
        (access, mode): (Access, Mode),
        translations: &mut Translations,
    ) -> Result<Wanted, PagingError> {
        for _ in 0..TRIES {
            let (outcome, fence) = self.tables.fault(&self.behind, &self.registers, input, (access, mode))?;
            note(fence, translations);
            return Ok(match outcome {
                // The fence is as good as executed: something may be made now of what the guest's tables say.
                Outcome::Resume if fence != Fence::None => continue,
                Outcome::Resume => Wanted::Nothing,
                Outcome::Missing { at, .. } => Wanted::Page(at),
                Outcome::Refused(x86::Fault::Page(fault)) => Wanted::Refused(fault),
                // A table of the guest's is where it has no page.
                Outcome::Refused(x86::Fault::Memory { at, .. }) => Wanted::Page(Gpa(at.0)),
                Outcome::Refused(x86::Fault::NotCanonical(_)) => Wanted::NoAddress,
                Outcome::Emulate { at } => {
                    self.open(input, at, mode, translations)?;
                    Wanted::Step
                }
                _ => Wanted::Nothing,
            });
        }
        Ok(Wanted::Nothing)
    }

    /// Lets the guest's next instruction write to the table at `input`, which its own tables let it.
    fn open(
        &mut self,
        input: Input,
        at: Gpa,
        mode: Mode,
        translations: &mut Translations,
    ) -> Result<(), PagingError> {
        let registers = Registers { cr3: self.root.0, ..self.registers };
        let memory = self.behind.0.memory;
        for _ in 0..TRIES {
            // Read, it is mapped as any other page.
            let (_, fence) = self.tables.fault(&self.behind, &self.registers, input, (Access::Read, mode))?;
            note(fence, translations);
            let look = (Access::Read, mode);
            let Ok(walked) = x86::walk::<Long4, _>(memory, &registers, input, look, Marks::Leave) else {
                continue;
            };
            let (level, step) = (walked.level, walked.step(walked.level));
            let Entry::Leaf(mut leaf) = Long4::decode(step.raw, level, &registers.caps) else { continue };
            leaf.permissions |= Permissions::WRITE;
            let Ok(word) = Long4::encode(&Entry::Leaf(leaf), level, &registers.caps) else { continue };
            if memory.compare_exchange(step.at, step.raw, word).is_ok_and(|found| found == step.raw) {
                self.open.push(Gpa(at.0 >> PAGE_SHIFT << PAGE_SHIFT));
                return Ok(());
            }
        }
        Ok(())
    }

    /// Whether the guest runs one instruction at a time.
    pub const fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// The instruction was carried out, or will not be: tables are protected again, and their shadows are what they say now.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn close(&mut self, translations: &mut Translations) -> Result<(), PagingError> {
        while let Some(page) = self.open.pop() {
            note(self.tables.protect(page, 1)?, translations);
            note(self.tables.wrote(&self.behind, page, PAGE_SIZE as u64)?, translations);
        }
        Ok(())
    }

    /// Gives the frames back: the guest runs no more.
    ///
    /// # Errors
    /// [`FramesError`]: a bug.
    pub fn end(self, memory: &mut Memory) -> Result<(), FramesError> {
        give_all(memory, self.frames)
    }
}

fn give_all(memory: &mut Memory, frames: Vec<Frame>) -> Result<(), FramesError> {
    frames.into_iter().try_for_each(|frame| memory.give(frame, Kind::Host))
}
