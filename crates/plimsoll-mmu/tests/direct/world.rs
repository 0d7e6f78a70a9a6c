//! A guest on a processor that walks its own tables, in a few tiny frames: all that it can ask for, and all that it can write.
//!
//! Enters: one action. Leaves: the world after it. The processor caches, at once, everything that can be cached: where tables
//! are and what pages are mapped how. It makes new translations of what is cached already, stale or not, and forgets at a fence only.
use plimsoll_mmu::direct::{Direct, Frame, Kind, Marks, Update};
use plimsoll_mmu::format::{Extension, Format};
use plimsoll_mmu::{Entry, Leaf, Level, Memory, Output, Permissions, Table, TableMemory, Unencodable};
use plimsoll_types::MachineId;
use std::cell::RefCell;
use std::collections::BTreeSet;

pub(crate) const GUEST: MachineId = MachineId(0);
pub(crate) const OTHER: MachineId = MachineId(1);
const FIRST: u64 = 0x40;
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 2;
const ENOUGH: u64 = 1000;

/// What software makes of entries, for mistakes that are made on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Clear,
    /// Entries of this level are not looked at.
    Blind(Level),
    /// Rights to write are not counted.
    Writeless,
}

/// A format of so many levels with 2^BITS entries to a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiny<const LEVELS: u8, const BITS: u32>;

impl<const LEVELS: u8, const BITS: u32> Format for Tiny<LEVELS, BITS> {
    type Caps = Sight;
    const NAME: &'static str = "tiny";
    const LEVELS: u8 = LEVELS;
    const PAGE_SHIFT: u32 = 4;
    const INDEX_BITS: u32 = BITS;
    const EXTENSION: Extension = Extension::Zero;

    fn decode(raw: u64, level: Level, sight: &Sight) -> Entry {
        if raw & PRESENT == 0 || *sight == Sight::Blind(level) {
            return Entry::Absent { software: 0 };
        }
        let at = Output(raw >> 4 << 4);
        let mut permissions = Permissions::all();
        permissions.set(Permissions::WRITE, raw & WRITE != 0 && *sight != Sight::Writeless);
        let (accessed, memory) = (raw & ACCESSED != 0, Memory::Physical);
        if level > Level::PAGES {
            return Entry::Table(Table { accessed, ..Table::new(at, permissions, memory) });
        }
        Entry::Leaf(Leaf { accessed, ..Leaf::new(at, 4, permissions, memory) })
    }

    fn encode(entry: &Entry, _: Level, _: &Sight) -> Result<u64, Unencodable> {
        let word = |at: Output, permissions: Permissions, accessed| {
            let write = if permissions.contains(Permissions::WRITE) { WRITE } else { 0 };
            at.0 | PRESENT | write | if accessed { ACCESSED } else { 0 }
        };
        match entry {
            Entry::Absent { .. } => Ok(0),
            Entry::Table(table) => Ok(word(table.at, table.permissions, table.accessed)),
            Entry::Leaf(leaf) => Ok(word(leaf.output, leaf.permissions, leaf.accessed)),
            Entry::Malformed(_) => Err(Unencodable::Kind),
        }
    }

    fn largest_leaf(_: &Sight) -> Level {
        Level::PAGES
    }
}

/// What a processor has cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Cached {
    /// A table of the level is in the frame.
    Table(u8, usize),
    /// A page is in the frame, and may be written.
    Page(usize, bool),
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Pin(usize, Level, u64),
    Unpin(usize),
    Load(usize, u64),
    Unload,
    /// The host begins or ceases to write to it.
    Keep(usize),
    Unkeep(usize),
    Update(usize, usize, u64),
    /// The guest writes to what it can write.
    Write(usize, usize, u64),
    Fence,
    Work,
    Release(usize),
    Give(MachineId, usize),
}

/// A host with its frames, and what it gets wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host<const LEVELS: u8, const BITS: u32> {
    pub(crate) frames: usize,
    pub(crate) sight: Sight,
    /// Fences are said to be executed, and are not.
    pub(crate) unfenced: bool,
}

/// Everything that an action depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) records: Vec<Frame>,
    pub(crate) words: Vec<u64>,
    pub(crate) root: Option<u32>,
    pub(crate) cached: BTreeSet<Cached>,
}

/// The words of all frames.
struct Words(RefCell<Vec<u64>>, usize);

impl Words {
    fn place(&self, at: Output) -> usize {
        let offset = usize::try_from(at.0 - FIRST).expect("small");
        (offset >> 4) * self.1 + (offset & 15) / 8
    }
}

impl TableMemory for Words {
    type Error = ();

    fn read(&self, at: Output) -> Result<u64, ()> {
        Ok(self.0.borrow()[self.place(at)])
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, ()> {
        let place = &mut self.0.borrow_mut()[self.place(at)];
        let found = *place;
        if found == current {
            *place = new;
        }
        Ok(found)
    }
}

pub(crate) const fn address(frame: usize) -> Output {
    Output(FIRST + 16 * frame as u64)
}

impl<const LEVELS: u8, const BITS: u32> Host<LEVELS, BITS> {
    const ENTRIES: usize = 1 << BITS;

    /// All frames are the guest's, and empty.
    pub(crate) fn world(&self) -> World {
        let mut world = World {
            records: vec![Frame::FREE; self.frames],
            words: vec![0; self.frames * Self::ENTRIES],
            root: None,
            cached: BTreeSet::new(),
        };
        for frame in 0..self.frames {
            world = self.after(&world, Action::Give(GUEST, frame)).expect("it is free");
        }
        world
    }

    /// Words that name a frame, and none. One frame can be named without the right to write, which is enough to see what that does.
    pub(crate) fn alphabet(&self) -> impl Iterator<Item = u64> {
        let writable = (0..self.frames).map(|frame| address(frame).0 | PRESENT | WRITE);
        writable.chain([0, address(0).0 | PRESENT])
    }

    /// What happens next; `None` where nothing does.
    pub(crate) fn after(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        if let Action::Write(frame, index, word) = action {
            next.words[frame * Self::ENTRIES + index] = word;
        } else {
            self.ask(&mut next, action);
        }
        if action == Action::Fence && !self.unfenced {
            next.cached.clear();
        }
        self.cache(&mut next);
        (next != *world).then_some(next)
    }

    fn ask(&self, world: &mut World, action: Action) {
        let memory = Words(RefCell::new(std::mem::take(&mut world.words)), Self::ENTRIES);
        let (mut fences, mut roots) = ([0; 2], [world.root]);
        let frames = (Output(FIRST), &mut world.records[..]);
        let mut direct =
            Direct::<Tiny<LEVELS, BITS>, _>::resume(&memory, self.sight, frames, &mut fences, &mut roots);
        // Refusals are no matter here: what a guest is refused, it has not got.
        let _ = match action {
            Action::Pin(frame, level, mut budget) => direct.pin(GUEST, address(frame), level, &mut budget),
            Action::Unpin(frame) => direct.unpin(GUEST, address(frame)),
            Action::Load(frame, mut budget) => direct
                .load(0, GUEST, address(frame), &mut budget)
                .map(|root| assert_eq!(root, address(frame))),
            Action::Unload => {
                direct.unload(0);
                Ok(())
            }
            Action::Keep(frame) => direct.keep(GUEST, address(frame)),
            Action::Unkeep(frame) => direct.unkeep(GUEST, address(frame)),
            Action::Update(frame, index, word) => {
                let at = Output(address(frame).0 + 8 * index as u64);
                direct.update(GUEST, Update { at, word, marks: Marks::Keep }, &mut { ENOUGH })
            }
            Action::Fence => {
                direct.fenced(GUEST);
                Ok(())
            }
            Action::Work => direct.work(&mut 1).map(|_| ()),
            Action::Release(frame) => direct.release(GUEST, address(frame)),
            Action::Give(owner, frame) => direct.give(owner, address(frame)),
            Action::Write(..) => Ok(()),
        };
        // Without this the count of fences would make every world a new one.
        Direct::<Tiny<LEVELS, BITS>, _>::resume(
            &memory,
            self.sight,
            (Output(FIRST), &mut world.records[..]),
            &mut fences,
            &mut roots,
        );
        world.words = memory.0.into_inner();
        [world.root] = roots;
    }

    /// Caches what can be cached, of tables as they are and of what is cached already.
    fn cache(&self, world: &mut World) {
        let number = |at: Output| (0..self.frames).find(|frame| address(*frame) == at);
        let mut todo: Vec<Cached> = world.cached.iter().copied().collect();
        todo.extend(world.root.map(|root| Cached::Table(LEVELS, root as usize)));
        world.cached.clear();
        while let Some(cached) = todo.pop() {
            if !world.cached.insert(cached) {
                continue;
            }
            let Cached::Table(level, frame) = cached else { continue };
            for index in 0..Self::ENTRIES {
                let word = world.words[frame * Self::ENTRIES + index];
                match Tiny::<LEVELS, BITS>::decode(word, Level(level), &Sight::Clear) {
                    Entry::Table(table) => {
                        todo.extend(number(table.at).map(|below| Cached::Table(level - 1, below)));
                    }
                    Entry::Leaf(leaf) => {
                        let writable = leaf.permissions.contains(Permissions::WRITE);
                        todo.extend(number(leaf.output).map(|page| Cached::Page(page, writable)));
                    }
                    _ => {}
                }
            }
        }
    }

    /// How often each frame is used and needed, counted anew.
    pub(crate) fn counted(&self, world: &World) -> Vec<(u32, u32)> {
        let mut counts = vec![(0, 0); self.frames];
        let mut count = |at: Output, needs: bool| {
            if let Some(frame) = (0..self.frames).find(|frame| address(*frame) == at) {
                counts[frame].0 += 1;
                counts[frame].1 += u32::from(needs);
            }
        };
        for (number, frame) in world.records.iter().enumerate() {
            for needs in [frame.pinned(), frame.kept()] {
                if needs {
                    count(address(number), true);
                }
            }
            if world.root.is_some_and(|root| root as usize == number) {
                count(address(number), true);
            }
            let Kind::Table(level) = frame.kind() else { continue };
            for index in 0..frame.held() as usize {
                let word = world.words[number * Self::ENTRIES + index];
                match Tiny::<LEVELS, BITS>::decode(word, level, &self.sight) {
                    Entry::Table(table) => count(table.at, true),
                    Entry::Leaf(leaf) => count(leaf.output, leaf.permissions.contains(Permissions::WRITE)),
                    _ => {}
                }
            }
        }
        counts
    }
}
