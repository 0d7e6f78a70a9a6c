//! A guest on two processors that have nothing but shadow tables and what they cached of them, and the judge of each access.
//!
//! Enters: what the guest, its devices and its host do. Leaves: nothing, or the first thing that a guest on real tables could not
//! have seen. The judge knows every word that was ever in the guest's memory, and since when: an access is right if the guest's
//! tables allowed it with words each of which was there at some time since the processor's last fence, with the accessed and dirty bits
//! that a processor would have set in them by then.
use crate::common::{Outside, Ram, pools};
use plimsoll_mmu::format::Feature;
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::shadow::{Backing, Fence, Invalidation, Load, Outcome, P2m, Record, Shadow, Writes};
use plimsoll_mmu::tlb::{
    self, Architecture, Bank, Breaks, Change, Consequence, Found, Owner, Regime, Stage, Stages, Tables, Tag,
    Tlb, X86,
};
use plimsoll_mmu::x86::{self, Control, Mode, Registers};
use plimsoll_mmu::{
    Access, Entry, Format, Input, Leaf, Level, Marks, Output, Permissions, Pools, Span, TableMemory,
};
use plimsoll_types::Gpa;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// What the guest's processor has. Keys have a test of their own.
pub(crate) const CAPS: Caps = Caps { keys: Feature::Off, ..Caps::FULL };
pub(crate) const CPUS: usize = 2;
const VPID: u16 = 7;
/// Where shadow tables are: no address of the guest's frames.
const SHADOWS: u64 = 0x100_0000;
/// Faults that one access may take: a table a time without room, and as often again because somebody may write there.
const PATIENCE: usize = 24;

/// The guest's memory by guest physical address, every word with its story, and where its pages are.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    pub(crate) words: RefCell<BTreeMap<u64, u64>>,
    stories: RefCell<BTreeMap<u64, Vec<(u64, u64)>>>,
    pub(crate) backings: RefCell<BTreeMap<u64, Backing>>,
    /// Whose each frame is or was: none is used twice.
    owners: RefCell<BTreeMap<u64, u64>>,
    pub(crate) logged: RefCell<BTreeSet<u64>>,
    clock: Cell<u64>,
}

impl Guest {
    pub(crate) fn get(&self, at: u64) -> u64 {
        self.words.borrow().get(&at).copied().unwrap_or(0)
    }

    pub(crate) fn set(&self, at: u64, word: u64) {
        self.clock.set(self.clock.get() + 1);
        let old = self.words.borrow_mut().insert(at, word).unwrap_or(0);
        let mut stories = self.stories.borrow_mut();
        stories.entry(at).or_insert_with(|| vec![(0, old)]).push((self.clock.get(), word));
    }

    /// What was at `at` at some time from `since` on.
    fn story(&self, at: u64, since: u64) -> Vec<u64> {
        let stories = self.stories.borrow();
        let Some(story) = stories.get(&at) else { return vec![self.get(at)] };
        let first = story.iter().rposition(|(when, _)| *when <= since).unwrap_or(0);
        story[first..].iter().map(|(_, word)| *word).collect()
    }

    fn now(&self) -> u64 {
        self.clock.get()
    }

    /// Gives the guest a page.
    pub(crate) fn back(&self, page: u64, backing: Backing) {
        self.backings.borrow_mut().insert(page, backing);
        self.owners.borrow_mut().insert(backing.frame.0 >> 12, page);
    }

    /// The pages around one that changes are no run any more.
    fn break_run(&self, page: u64) {
        for (_, backing) in self.backings.borrow_mut().range_mut(page >> 9 << 9..((page >> 9) + 1) << 9) {
            backing.shift = 12;
        }
    }

    /// The page that is in a frame now.
    fn in_frame(&self, frame: u64) -> Option<(u64, Backing)> {
        let page = *self.owners.borrow().get(&frame)?;
        let backing = *self.backings.borrow().get(&page)?;
        (backing.frame.0 >> 12 == frame).then_some((page, backing))
    }
}

impl TableMemory for Guest {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.backing(Gpa(at.0 >> 12 << 12)).ok_or(Outside(at))?;
        Ok(self.get(at.0))
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let found = self.read(at)?;
        if found == current {
            self.set(at.0, new);
        }
        Ok(found)
    }
}

impl P2m for Guest {
    fn backing(&self, page: Gpa) -> Option<Backing> {
        self.backings.borrow().get(&(page.0 >> 12)).copied()
    }

    fn log(&self, page: Gpa) {
        self.logged.borrow_mut().insert(page.0 >> 12);
    }
}

/// Where shadow tables are; remembers what was written.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) ram: Ram,
    changes: RefCell<Vec<(u64, u64, u64)>>,
}

impl Host {
    /// The level of the table that a word is in: sixteen frames for each, in order.
    fn level(at: u64) -> Level {
        Level(u8::try_from((at - SHADOWS) >> 16).expect("a shadow table") + 1)
    }

    /// All shadow leaves, and where they are.
    pub(crate) fn leaves(&self) -> Vec<(u64, Leaf)> {
        let decoded =
            self.ram.image().into_iter().map(|(at, word)| (at, Long4::decode(word, Self::level(at), &CAPS)));
        decoded
            .filter_map(|(at, entry)| if let Entry::Leaf(leaf) = entry { Some((at, leaf)) } else { None })
            .collect()
    }

    /// Whether a fence is enough for all that was written since this was asked last, by the manuals of both makers.
    fn is_enough(&self, fence: Fence) -> Result<(), String> {
        for (at, old, new) in self.changes.take() {
            let tag = Tag { owner: Owner::Guest(VPID), space: None };
            let first = Input((at >> 3 & 511) << Long4::shift(Self::level(at)));
            let change = Change::of::<Long4>(
                (Stage::First, tag, None),
                Long4::extend(first.0),
                Self::level(at),
                &CAPS,
                (old, new),
            );
            let change = change.ok_or("no canonical address")?;
            for (architecture, fence) in
                [(Architecture::Intel, fence.vmx(VPID)), (Architecture::Amd, fence.svm(VPID))]
            {
                let regime = Regime { architecture, stages: Stages::One, breaks: Breaks::Spared };
                tlb::check(&change, &regime, fence.as_slice(), Consequence::LostMark)
                    .map_err(|missing| format!("{old:#x} to {new:#x} at {at:#x}: {missing}"))?;
            }
        }
        Ok(())
    }
}

impl TableMemory for Host {
    type Error = Outside;

    fn read(&self, at: Output) -> Result<u64, Outside> {
        self.ram.read(at)
    }

    fn compare_exchange(&self, at: Output, current: u64, new: u64) -> Result<u64, Outside> {
        let found = self.ram.compare_exchange(at, current, new)?;
        if found == current {
            self.changes.borrow_mut().push((at.0, current, new));
        }
        Ok(found)
    }
}

/// What the host gets wrong on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    None,
    /// Returned fences are not executed.
    Unfenced,
    /// Emulated and devices' writes are not told.
    Untold,
    /// The guest's INVLPG is not.
    Uninvalidated,
    /// CR3 loads are taken for such as keep everything.
    Kept,
    /// Pages are taken behind the shadow's back.
    Stolen,
    /// Pages are logged again behind its back.
    Unlogged,
}

/// What happens.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Op {
    /// A processor accesses an address; a write leaves the word.
    Touch(usize, Input, Access, Mode, u64),
    /// It executes INVLPG.
    Invlpg(usize, Input),
    /// It flushes everything.
    Flush(usize),
    /// It loads CR3.
    Cr3(usize, u64, Load),
    /// It changes its control bits.
    Control(usize, Control),
    /// A device writes a word.
    Device(u64, u64),
    /// The host takes a page away.
    Take(u64),
    /// It gives the page again, elsewhere, with these rights and logged or not.
    Give(u64, Permissions, Writes),
    /// It wants to know of the next write.
    Log(u64),
    /// It wants tables back.
    Shrink(usize),
}

struct Processor<'s> {
    tlb: Tlb<'s>,
    registers: Registers,
    root: Output,
    /// What it goes on writing until a fence stops it.
    busy: Option<(Input, Mode, u64)>,
    /// The last fence for everything, and those for single pages.
    fenced: u64,
    pages: BTreeMap<u64, u64>,
}

impl Processor<'_> {
    fn since(&self, input: Input) -> u64 {
        self.fenced.max(self.pages.get(&(input.0 >> 12)).copied().unwrap_or(0))
    }

    fn tables<'m>(&self, memory: &'m Host) -> Tables<'m, Long4, Host> {
        let space = u16::try_from(self.root.0 >> 12 & 0xfff).ok();
        let tag = Tag { owner: Owner::Guest(VPID), space };
        let caps = CAPS;
        Tables { memory, root: self.root, caps, stage: Stage::First, tag }
    }
}

/// Whether rights by tables are enough under these control bits.
pub(crate) fn allows(control: Control, permissions: Permissions, access: Access, mode: Mode) -> bool {
    let user = permissions.contains(Permissions::USER);
    if mode == Mode::User {
        return user && permissions.contains(access.needs());
    }
    let excused = mode == Mode::Supervisor && control.contains(Control::ALIGNMENT_CHECK);
    let barred = user && control.contains(Control::SMAP) && !excused;
    match access {
        Access::Read => !barred,
        Access::Write => {
            let ignored = !control.contains(Control::WRITE_PROTECT);
            !barred && (ignored || permissions.contains(Permissions::WRITE))
        }
        Access::Fetch => {
            permissions.contains(Permissions::EXECUTE) && !(user && control.contains(Control::SMEP))
        }
    }
}

pub(crate) type Slots = [[Option<Found>; 16]; 4];

pub(crate) struct World<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) host: &'a Host,
    pub(crate) shadow: Shadow<'a, Long4, Host, Pools<16>>,
    processors: Vec<Processor<'a>>,
    mistake: Mistake,
    next_frame: u64,
    pub(crate) seen: Seen,
}

/// What a run came upon, so that a test can be sure that it tests something.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) accesses: u64,
    pub(crate) faults: u64,
    pub(crate) without_fault: u64,
    pub(crate) stale: u64,
    pub(crate) emulated: u64,
    pub(crate) refused: u64,
    pub(crate) missing: u64,
    pub(crate) fences: u64,
    pub(crate) late: u64,
    pub(crate) large: u64,
    pub(crate) zapped: u64,
}

impl Seen {
    /// This and other runs together.
    pub(crate) const fn with(self, other: Self) -> Self {
        Self {
            accesses: self.accesses + other.accesses,
            faults: self.faults + other.faults,
            without_fault: self.without_fault + other.without_fault,
            stale: self.stale + other.stale,
            emulated: self.emulated + other.emulated,
            refused: self.refused + other.refused,
            missing: self.missing + other.missing,
            fences: self.fences + other.fences,
            late: self.late + other.late,
            large: self.large + other.large,
            zapped: self.zapped + other.zapped,
        }
    }

    /// Whether a test that saw this has tested all that it is to test.
    pub(crate) fn is_everything(&self) -> bool {
        let Self { without_fault, stale, emulated, refused, missing, late, large, zapped, .. } = *self;
        [without_fault, stale, emulated, refused, missing, late, large, zapped]
            .into_iter()
            .all(|count| count > 10)
    }
}

/// What a world is made in.
pub(crate) struct Place {
    pub(crate) host: Host,
    pub(crate) frames: Pools<16>,
    pub(crate) records: Vec<Record>,
    heads: Vec<u32>,
    slots: Vec<Slots>,
}

impl Place {
    pub(crate) fn new(records: usize) -> Self {
        Self {
            host: Host { ram: Ram::new(1 << 40), changes: RefCell::default() },
            frames: pools::<16>(SHADOWS, 0x1000),
            records: vec![Record::EMPTY; records],
            heads: vec![0; Shadow::<Long4, Host, Pools<16>>::heads(records)],
            slots: vec![[[None; 16]; 4]; CPUS],
        }
    }
}

impl Place {
    /// Shadow tables without processors.
    pub(crate) fn shadow(&mut self, caps: Caps) -> Shadow<'_, Long4, Host, Pools<16>> {
        let Self { host, frames, records, heads, .. } = self;
        Shadow::new((records, heads), host, frames, caps).expect("enough heads")
    }
}

type Verdict = Result<(), String>;

impl<'a> World<'a> {
    pub(crate) fn new(guest: &'a Guest, place: &'a mut Place, cr3: u64, mistake: Mistake) -> Self {
        let Place { host, frames, records, heads, slots } = place;
        let host: &'a Host = host;
        let mut shadow = Shadow::new((records, heads), host, frames, CAPS).expect("enough heads");
        let control = Control::WRITE_PROTECT;
        let registers = Registers { cr3, control, pkru: 0, caps: CAPS };
        let mut processors = Vec::new();
        for [instruction, data, shared, structures] in slots {
            let root = loop {
                if let (Some(root), _) = shadow.load(guest, &registers, Load::Fences).expect("there is room")
                {
                    break root;
                }
            };
            let tlb = Tlb {
                instruction: Bank::new(&mut instruction[..4], 4).expect("one set"),
                data: Bank::new(&mut data[..8], 4).expect("two sets"),
                shared: Bank::new(shared, 4).expect("four sets"),
                structures: Bank::new(structures, 16).expect("one set"),
            };
            processors.push(Processor {
                tlb,
                registers,
                root,
                busy: None,
                fenced: 0,
                pages: BTreeMap::new(),
            });
        }
        Self { guest, host, shadow, processors, mistake, next_frame: 0x100, seen: Seen::default() }
    }

    fn fence(&mut self, fence: Fence) -> Verdict {
        self.host.is_enough(fence)?;
        self.execute(fence);
        Ok(())
    }

    fn execute(&mut self, fence: Fence) {
        let Some(fence) = fence.vmx(VPID).filter(|_| self.mistake != Mistake::Unfenced) else { return };
        self.seen.fences += 1;
        // Until it executes the fence, each goes on with what it has.
        for cpu in 0..CPUS {
            self.write_late(cpu);
        }
        for processor in &mut self.processors {
            processor.tlb.fence(&fence);
        }
    }

    /// A processor that has not heard of the fence yet writes once more what it wrote last, to the next page.
    fn write_late(&mut self, cpu: usize) {
        let processor = &mut self.processors[cpu];
        let Some((input, mode, word)) = processor.busy else { return };
        let tables = processor.tables(self.host);
        let found = processor.tlb.translate(&tables, input, Access::Write).ok();
        let hardware = processor.registers.control | Control::WRITE_PROTECT;
        let Some((output, _)) = found.filter(|(_, rights)| allows(hardware, *rights, Access::Write, mode))
        else {
            return;
        };
        let word = word ^ 0x1000;
        processor.busy = Some((input, mode, word));
        if let Some((page, _)) = self.guest.in_frame(output.0 >> 12) {
            self.seen.late += 1;
            self.guest.set(page << 12 | output.0 & 0xff8, word);
        }
    }

    pub(crate) fn step(&mut self, op: Op) -> Verdict {
        let now = self.guest.now();
        match op {
            Op::Touch(cpu, input, access, mode, word) => return self.touch(cpu, input, (access, mode), word),
            Op::Invlpg(cpu, input) => {
                self.processors[cpu].pages.insert(input.0 >> 12, now);
                if self.mistake != Mistake::Uninvalidated {
                    let fence = self.shadow.invalidate(self.guest, Invalidation::Address(input));
                    self.fence(fence.map_err(text)?)?;
                }
            }
            Op::Flush(cpu) => {
                self.processors[cpu].fenced = now;
                let fence = self.shadow.invalidate(self.guest, Invalidation::Everything);
                self.fence(fence.map_err(text)?)?;
            }
            Op::Cr3(cpu, cr3, load) => {
                let registers = Registers { cr3, ..self.processors[cpu].registers };
                self.load(cpu, registers, load)?;
                if load == Load::Fences {
                    self.processors[cpu].fenced = now;
                }
            }
            Op::Control(cpu, control) => {
                let registers = Registers { control, ..self.processors[cpu].registers };
                self.load(cpu, registers, Load::Keeps)?;
            }
            Op::Device(at, word) => {
                if self.guest.read(Output(at)).is_ok() {
                    self.guest.set(at, word);
                    self.told(at)?;
                }
            }
            Op::Take(page) => {
                self.guest.break_run(page);
                self.guest.backings.borrow_mut().remove(&page);
                if self.mistake != Mistake::Stolen {
                    let fence = self.shadow.taken(Gpa(page << 12), 1).map_err(text)?;
                    self.fence(fence)?;
                }
            }
            Op::Give(page, permissions, writes) => self.give(page, permissions, writes),
            Op::Log(page) => {
                self.guest.break_run(page);
                if let Some(backing) = self.guest.backings.borrow_mut().get_mut(&page) {
                    backing.writes = Writes::Logged;
                }
                self.guest.logged.borrow_mut().remove(&page);
                if self.mistake != Mistake::Unlogged {
                    let fence = self.shadow.protect(Gpa(page << 12), 1).map_err(text)?;
                    self.fence(fence)?;
                }
            }
            Op::Shrink(tables) => {
                let fence = self.shadow.shrink(tables).map_err(text)?;
                self.seen.zapped += u64::from(fence == Fence::All);
                self.fence(fence)?;
            }
        }
        Ok(())
    }

    /// Gives a page that is not there a frame which nobody had before.
    fn give(&mut self, page: u64, permissions: Permissions, writes: Writes) {
        if self.guest.backing(Gpa(page << 12)).is_none() {
            self.next_frame += 1;
            let (frame, permissions) = (Output(self.next_frame << 12), permissions | Permissions::READ);
            self.guest.back(page, Backing { frame, shift: 12, permissions, writes });
        }
    }

    fn load(&mut self, cpu: usize, registers: Registers, load: Load) -> Verdict {
        let load = if self.mistake == Mistake::Kept { Load::Keeps } else { load };
        for _ in 0..PATIENCE {
            let (root, fence) = self.shadow.load(self.guest, &registers, load).map_err(text)?;
            self.fence(fence)?;
            if let Some(root) = root {
                let old = self.processors[cpu].registers;
                self.shadow.unload(&old);
                let processor = &mut self.processors[cpu];
                (processor.registers, processor.root) = (registers, root);
                return Ok(());
            }
        }
        Err("a root is never loaded".into())
    }

    fn told(&mut self, at: u64) -> Verdict {
        if self.mistake != Mistake::Untold {
            let fence = self.shadow.wrote(self.guest, Gpa(at), 8).map_err(text)?;
            self.fence(fence)?;
        }
        Ok(())
    }

    fn touch(&mut self, cpu: usize, input: Input, (access, mode): (Access, Mode), word: u64) -> Verdict {
        self.seen.accesses += 1;
        for tries in 0..PATIENCE {
            let registers = self.processors[cpu].registers;
            let processor = &mut self.processors[cpu];
            let tables = processor.tables(self.host);
            let found = processor.tlb.translate(&tables, input, access).ok();
            let hardware = registers.control | Control::WRITE_PROTECT;
            let open = found.filter(|(_, permissions)| allows(hardware, *permissions, access, mode));
            if let Some((output, _)) = open {
                self.seen.without_fault += u64::from(tries == 0);
                let at = self.judge(cpu, input, (access, mode), output)?;
                if access == Access::Write {
                    self.guest.set(at & !7, word);
                    self.processors[cpu].busy = Some((input, mode, word));
                }
                return Ok(());
            }
            // A page fault drops what is cached of the address (SDM vol. 3, 4.10.4.1).
            if let Some(pcid) = tables.tag.space {
                let fence = X86::Invlpg { pcid, pages: Span::one(input) };
                processor.tlb.fence(&tlb::Fence::X86 { by: tables.tag.owner, fence });
            }
            if self.fault(cpu, input, (access, mode), word)? == Next::Over {
                return Ok(());
            }
        }
        Err(format!("{access:?} of {input} on {cpu} is allowed and faults forever"))
    }

    fn fault(
        &mut self,
        cpu: usize,
        input: Input,
        (access, mode): (Access, Mode),
        word: u64,
    ) -> Result<Next, String> {
        self.seen.faults += 1;
        let registers = self.processors[cpu].registers;
        let expected = self.copy();
        let walked = x86::walk::<Long4, _>(&expected, &registers, input, (access, mode), Marks::Set);
        let answer = self.shadow.fault(self.guest, &registers, input, (access, mode));
        let (outcome, fence) = answer.map_err(text)?;
        let same = expected.words.borrow().iter().all(|(at, word)| self.guest.get(*at) == *word);
        if !same {
            return Err(format!("{access:?} of {input} left other marks than a processor's"));
        }
        self.fence(fence)?;
        match outcome {
            Outcome::Resume => {
                walked.map_err(|fault| format!("resumed, and it is {fault}"))?;
                return Ok(Next::Again);
            }
            Outcome::Refused(fault) => {
                self.seen.refused += 1;
                if walked != Err(fault) {
                    return Err(format!("refused by {fault:?} instead of {walked:?}"));
                }
            }
            Outcome::Missing { at, .. } => {
                self.seen.missing += 1;
                let backing = self.guest.backing(Gpa(at.0 >> 12 << 12));
                if backing.is_some_and(|backing| backing.permissions.contains(access.needs())) {
                    return Err(format!("{at} is said to be missing"));
                }
            }
            Outcome::Emulate { at } => {
                self.seen.emulated += 1;
                let walked = walked.map_err(|fault| format!("emulated, and it is {fault}"))?;
                if walked.output.0 != at.0 || access != Access::Write {
                    return Err(format!("{access:?} of {input} is emulated at {at}"));
                }
                self.guest.logged.borrow_mut().insert(at.0 >> 12);
                self.guest.set(at.0 & !7, word);
                self.told(at.0 & !7)?;
            }
        }
        Ok(Next::Over)
    }

    fn copy(&self) -> Guest {
        let Guest { words, backings, .. } = self.guest;
        Guest { words: words.clone(), backings: backings.clone(), ..Guest::default() }
    }

    /// Where in the guest an access ended that went through; an error if it must not have.
    fn judge(
        &mut self,
        cpu: usize,
        input: Input,
        (access, mode): (Access, Mode),
        output: Output,
    ) -> Result<u64, String> {
        let what = format!("{access:?} by {mode:?} of {input} on {cpu}");
        let Some((page, backing)) = self.guest.in_frame(output.0 >> 12) else {
            return Err(format!("{what} reached {output}, not the guest's"));
        };
        if !backing.permissions.contains(access.needs()) {
            return Err(format!("{what} is more than the host lets be done"));
        }
        let unlogged = backing.writes == Writes::Logged && !self.guest.logged.borrow().contains(&page);
        if access == Access::Write && unlogged {
            return Err(format!("{what} was not logged"));
        }
        let (at, processor) = (page << 12 | output.0 & 0xfff, &self.processors[cpu]);
        let control = processor.registers.control;
        let way = Way { guest: self.guest, since: processor.since(input), input, at, access };
        let root = processor.registers.cr3 >> 12 << 12;
        let fits = |permissions| allows(control, permissions, access, mode);
        if !way.exists(root, Long4::root(), Permissions::all(), &fits) {
            return Err(format!("{what} reached {at:#x}, which no words since {} allow", way.since));
        }
        let fresh = Way { since: self.guest.now(), ..way };
        self.seen.stale += u64::from(!fresh.exists(root, Long4::root(), Permissions::all(), &fits));
        self.seen.large += u64::from(backing.shift > 12);
        Ok(at)
    }

    /// What shadow tables map, whoever can reach it, is the guest's now, with no right that the host does not give.
    pub(crate) fn nothing_foreign_is_mapped(&self) -> Verdict {
        for (at, leaf) in self.host.leaves() {
            for frame in leaf.output.0 >> 12..(leaf.output.0 >> 12) + (1 << (leaf.shift - 12)) {
                let mine = self.guest.in_frame(frame);
                let rights = mine.map(|(_, backing)| backing.permissions | Permissions::USER);
                if !rights.is_some_and(|rights| rights.contains(leaf.permissions)) {
                    return Err(format!("{leaf:?} at {at:#x} maps frame {frame:#x}, which is {mine:?}"));
                }
            }
        }
        Ok(())
    }
}

#[derive(PartialEq, Eq)]
enum Next {
    Again,
    Over,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A way through words that were there since some time.
#[derive(Clone, Copy)]
struct Way<'a> {
    guest: &'a Guest,
    since: u64,
    input: Input,
    at: u64,
    access: Access,
}

impl Way<'_> {
    fn exists(
        &self,
        table: u64,
        level: Level,
        permissions: Permissions,
        fits: &dyn Fn(Permissions) -> bool,
    ) -> bool {
        let words = self.guest.story(table | Long4::index(self.input, level) << 3, self.since);
        words.into_iter().any(|word| match (Long4::decode(word, level, &CAPS), level.below()) {
            (Entry::Table(next), Some(below)) => {
                next.accessed && self.exists(next.at.0, below, permissions & next.permissions, fits)
            }
            (Entry::Leaf(leaf), _) => {
                let inside = Long4::offset(self.input) & ((1 << leaf.shift) - 1);
                let there = leaf.output.0 | inside == self.at;
                let marked = leaf.accessed && (leaf.dirty || self.access != Access::Write);
                there && marked && fits(permissions & leaf.permissions)
            }
            _ => false,
        })
    }
}
