//! RISC-V with the H extension: what VS and VU mode, and the hypervisor's own loads and stores, see through one stage and two.
//!
//! Enters: a seed. Leaves: cases: one access to one address, through vsatp's tables, hgatp's, or both. Compared are the cause, stval,
//! htval, htinst of faults on the way through a guest's tables, what was read or executed, what was written and where, and A
//! and D of every entry.
//!
//! # Rules for what is not compared, and not drawn
//!
//! QEMU 7.2 is not the manual everywhere (all in target/riscv/cpu_helper.c, `get_physical_address` and `riscv_cpu_tlb_fill`):
//!
//! * HLV and HSV take vsstatus.SUM as set, so that they are drawn with it set. HLVX is taken for a load, and is not drawn: fetches
//!   are.
//! * MXR of sstatus counts for the first stage of HLV only, and the second stage asks vsstatus; the manual has sstatus.MXR count for
//!   both stages and vsstatus.MXR for the first. Both are drawn equal.
//! * A fault of the second stage at a guest's table is a load guest-page fault whatever the access was, where the manual has the
//!   cause of the original access: the cause is compared for loads. That it was a fault of this kind says htinst.
//! * A and D of a guest's entry are set without asking the second stage whether it may be written, and without marking that
//!   stage's entry dirty. Cases in which they would have to be are drawn through one stage only.
//! * Bits 60:54 of entries, and memory type 3, are not looked at where the hart has Svnapot or Svpbmt. They are damaged where it has
//!   neither.
//! * Guest physical addresses have to be sign-extended, where the manual has zeros above the translated bits. The highest
//!   translated bit is drawn as zero, and addresses that are too long are not all ones.
//!
//! * A page fault of HLV or HSV is an access fault where satp is bare, so that the program runs through tables of its own.
//!
//! Besides: VS and VU mode fetch through the tables that are looked at, so that a guest's root which the second stage refuses is
//! drawn for fetches, HLV and HSV only. After a fault, A and D of an entry may have been set. Tables outside of RAM are not drawn, nor is anything else.
use crate::Chance;
use crate::grown::grow;
use crate::hardware::{Hardware, Source};
use crate::memory::{Outside, Ram, Region};
use crate::tree::{self, Dress, Frames, Moved, Size, Tree};
use crate::verdict::{Case, Expected};
use plimsoll_mmu::format::riscv::Caps;
use plimsoll_mmu::nested::{self, GuestMemory, GuestMemoryFault, Purpose, SecondStage};
use plimsoll_mmu::riscv::{self, Control, GuestPageFault, Kind, Mode, Operation, Registers, Stage};
use plimsoll_mmu::{
    Access, Entry, Feature, Format, Input, Leaf, Level, Malformed, Marks, Memory, Output, Permissions, Table,
    TableMemory,
};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// A board with 2 GiB of RAM and nothing in ROM.
pub const HARDWARE: Hardware = Hardware {
    qemu: "qemu-system-riscv64",
    arguments: &["-machine", "virt,memory-backend=ram,mem-merge=off", "-bios", "none"],
    binutils: "riscv64-linux-gnu-",
    flags: &["-mno-relax"],
    program: Source { text: include_str!("../programs/riscv.s"), at: BASE },
    firmware: None,
    ram: BASE,
    ram_mib: 2048,
    status: 0,
};
const BASE: u64 = 0x8000_0000;
/// The page of the program that VS and VU mode run.
const GUEST_PAGE: u64 = BASE + 0x1000;
/// Where the first stage has it, for VS mode and for VU mode.
const GUEST_AT: [u64; 2] = [0x1000, 0x2000];
/// Where the program's stores begin in that page.
const STORE_AT: u64 = 0x10;
/// Tables that lead to it: level 4 and down, of the first stage and of the second, which is the identity.
const OWN_FIRST: u64 = BASE + 0x20_0000;
const OWN_SECOND: u64 = BASE + 0x21_0000;
/// The identity for HS mode, in Sv39.
const OWN_HOST: u64 = BASE + 0x22_0000;
/// What cases have of RAM: below are program, batch and what the board leaves there.
const RAM: Region = Region { first: BASE + (128 << 20), bytes: 1920 << 20 };
const TABLES: Region = Region { first: BASE + (384 << 20), bytes: 64 << 20 };
const ARENA: Region = Region { first: BASE + (512 << 20), bytes: 1536 << 20 };
const STORED: u64 = 0x5354_4f52_4544_2121;

const POINTER: u64 = 1;
const OWN_LEAF: u64 = 0xcf;
const USER: u64 = 1 << 4;
const MARKS: u64 = 3 << 6;
const SUM: u64 = 1 << 18;
const MXR: u64 = 1 << 19;
const UXL: u64 = 2 << 32;
const SPP: u64 = 1 << 8;
const SPV: u64 = 1 << 7;
const SPVP: u64 = 1 << 8;
const VSXL: u64 = 2 << 32;
const BREAKPOINT: u64 = 3;

/// Which stages translate; the other is bare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stages {
    /// vsatp's.
    First,
    /// hgatp's.
    Second,
    /// Both.
    Both,
}

/// Options of QEMU for a hart with these extensions.
pub fn options(caps: Caps) -> [&'static str; 2] {
    match caps.napot {
        Feature::On => ["-cpu", "rv64,h=true,svnapot=true,svpbmt=true"],
        Feature::Off => ["-cpu", "rv64,h=true,svnapot=false,svpbmt=false"],
    }
}

const fn page_number(at: u64) -> u64 {
    at >> 12 << 10
}

/// What is in memory in every run: tables below the roots that lead to the program's page for guests, and those of HS mode.
pub fn own_tables() -> BTreeMap<u64, u64> {
    let frame = |own: u64, level: u64| own + (level - 1) * 4096;
    let down = |own: u64, level: u64| (frame(own, level), page_number(frame(own, level - 1)) | POINTER);
    let first = [4, 3, 2].map(|level| down(OWN_FIRST, level));
    let code = page_number(GUEST_PAGE) | OWN_LEAF;
    let pages = [
        (frame(OWN_FIRST, 1) + (GUEST_AT[0] >> 12) * 8, code),
        (frame(OWN_FIRST, 1) + (GUEST_AT[1] >> 12) * 8, code | USER),
    ];
    let gib = (frame(OWN_SECOND, 3) + (BASE >> 30) * 8, page_number(BASE) | OWN_LEAF | USER);
    let host = [0, 2, 3].map(|gib| (OWN_HOST + gib * 8, page_number(gib << 30) | OWN_LEAF));
    first.into_iter().chain(pages).chain([down(OWN_SECOND, 4), gib]).chain(host).collect()
}

/// The root's entry that leads to them, and the address of memory that it has to be at.
fn own_link<F: Format>(stages: Stages) -> (u64, u64) {
    let below = u64::from(F::LEVELS) - 1;
    match stages {
        Stages::Second if F::LEVELS == 3 => (page_number(BASE) | OWN_LEAF | USER, BASE),
        Stages::Second => (page_number(OWN_SECOND + (below - 1) * 4096) | POINTER, BASE),
        _ => (page_number(OWN_FIRST + (below - 1) * 4096) | POINTER, 0),
    }
}

/// A second stage's root that has the program's tables.
fn with_own_link<S: Format>(chance: &mut Chance, frames: &Frames, ram: &Ram) -> Output {
    let root = frames.take(chance, 16 << 10);
    let (word, at) = own_link::<S>(Stages::Second);
    ram.set(Output(root.0 | S::index(Input(at), S::root()) << 3), word);
    root
}

/// The mode field of vsatp and hgatp.
const fn mode<F: Format>() -> u64 {
    (F::LEVELS as u64 + 5) << 60
}

/// One access through tables of the formats `F` and `S`.
#[derive(Clone, Debug)]
pub struct RiscvCase<F, S> {
    /// What translates.
    pub stages: Stages,
    /// Of the first stage.
    pub first: Registers,
    /// Of the second stage.
    pub second: Registers,
    /// The address.
    pub input: Input,
    /// What is done there.
    pub operation: Operation,
    /// By whom.
    pub mode: Mode,
    /// By HLV or HSV.
    pub by_hypervisor: bool,
    memory: Ram,
    formats: PhantomData<(F, S)>,
}

struct Entries<T> {
    /// Makes places for tables.
    place: T,
    caps: Caps,
    /// Leaves are a user's in any case: the second stage's.
    user: bool,
}

impl<F: Format, T: FnMut(&mut Chance) -> Output> Dress<F> for Entries<T> {
    fn table(&mut self, chance: &mut Chance, _: Level) -> Entry {
        let table = Table::new((self.place)(chance), Permissions::all(), Memory::Physical);
        Entry::Table(Table { global: chance.percent(30), software: chance.bits() & 3 << 8, ..table })
    }

    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry {
        let memory = match self.caps.memory_types {
            Feature::On => chance.of(&[Memory::Physical, Memory::NonCacheable, Memory::Io]),
            Feature::Off => Memory::Physical,
        };
        let mut permissions = chance.of(&[
            Permissions::all(),
            Permissions::all(),
            Permissions::READ,
            Permissions::READ | Permissions::WRITE,
            Permissions::READ | Permissions::EXECUTE,
            Permissions::EXECUTE,
        ]);
        permissions.set(Permissions::USER, self.user || chance.percent(50));
        Entry::Leaf(Leaf {
            accessed: chance.percent(60),
            dirty: chance.percent(60),
            global: chance.percent(30),
            software: chance.bits() & 3 << 8,
            ..Leaf::new(Output(size.join(target.0, 0)), size.shift, permissions, memory)
        })
    }
}

/// One bit of an entry turned over.
fn damaged(chance: &mut Chance, word: u64, caps: Caps) -> u64 {
    let any = chance.below(64);
    let any = if caps.napot == Feature::On && (54..=60).contains(&any) { any - 50 } else { any };
    let bit = chance.of(&[0, 1, 2, 3, 4, 6, 7, 10 + any % 10, 61 + any % 3, any, any]);
    word ^ 1 << bit
}

fn size<F: Format>(chance: &mut Chance, caps: Caps) -> Size {
    let mut size = Size::of::<F>(Level(chance.of(&[1, 1, 1, 2, 3, F::LEVELS])));
    if size.level == Level::PAGES && caps.napot == Feature::On && chance.percent(40) {
        size.shift = 16;
    }
    size
}

/// An address of the second stage that QEMU takes, below 2^56, which is all that an entry can name, and not where the program is.
fn second_input<S: Format>(chance: &mut Chance) -> u64 {
    let bits = (S::INPUT_BITS - 1).min(56);
    let own = S::index(Input(BASE), S::root());
    loop {
        let input = tree::input::<S>(chance).0 & ((1 << bits) - 1);
        if S::index(Input(input), S::root()) != own {
            return input;
        }
    }
}

impl<F: Format<Caps = Caps>, S: Format<Caps = Caps>> RiscvCase<F, S> {
    /// A case that can be compared.
    pub fn draw(chance: &mut Chance, stages: Stages, caps: Caps) -> Self {
        chance.until(|chance| Self::attempt(chance, stages, caps).filter(Self::is_comparable))
    }

    fn attempt(chance: &mut Chance, stages: Stages, caps: Caps) -> Option<Self> {
        let frames = Frames::new(TABLES);
        let ram = Ram::new(RAM);
        let second_root = with_own_link::<S>(chance, &frames, &ram);

        // Where it all leads, and what the first stage calls it.
        let target = ARENA.word(chance);
        let final_size = size::<S>(chance, caps);
        let middle = match stages {
            Stages::First => target.0,
            _ => final_size.join(second_input::<S>(chance), target.0),
        };
        let mut moved = Moved::default();
        let (mut first_root, mut input, mut places) = (Output(0), Input(middle), Vec::new());
        let guest = Ram::new(RAM);
        if stages != Stages::Second {
            let place = |chance: &mut Chance| {
                let host = frames.take(chance, 4096);
                if stages == Stages::First {
                    return host;
                }
                let size = size::<S>(chance, caps);
                let gpa = Output(size.join(second_input::<S>(chance), host.0));
                moved.add((gpa, host), 4096, size);
                gpa
            };
            let mut entries = Entries { place, caps, user: false };
            first_root = (entries.place)(chance);
            let ram = if stages == Stages::First { &ram } else { &guest };
            ram.set(first_root, own_link::<F>(Stages::First).0);
            let size = size::<F>(chance, caps);
            input = Input(size.join(tree::input::<F>(chance).0, middle));
            if F::index(input, F::root()) == 0 {
                return None;
            }
            let tree = Tree::<F> { ram, root: first_root, caps };
            places = tree.lead(chance, &mut entries, (input, Output(middle), size))?.1;
        }
        if stages != Stages::First {
            let tree = Tree::<S> { ram: &ram, root: second_root, caps };
            let mut entries = Entries { place: frames.pages(), caps, user: true };
            let last = (Output(middle), target, final_size);
            places = moved.lead((&tree, chance), &mut entries, (&guest, &places), last)?;
        }
        if chance.percent(45) {
            let at = chance.of(&places);
            ram.set(at, damaged(chance, ram.get(at), caps));
        }
        if chance.percent(3) {
            let bits = if stages == Stages::Second { S::INPUT_BITS } else { F::INPUT_BITS };
            input.0 ^= 1 << (u64::from(bits) + chance.below(u64::from(64 - bits)));
        }
        Self::finish(chance, (stages, caps), (first_root, second_root), input, ram)
    }

    /// Cases, at least so many, whose tables the mapper made: those of the stage that translates alone.
    pub fn grow(chance: &mut Chance, stages: Stages, caps: Caps, count: usize) -> Vec<Self> {
        let mut cases = Vec::new();
        while cases.len() < count {
            let frames = Frames::new(TABLES);
            let ram = Ram::new(RAM);
            let second_root = with_own_link::<S>(chance, &frames, &ram);
            let first_root = frames.take(chance, 4096);
            ram.set(first_root, own_link::<F>(Stages::First).0);
            let target = ARENA.word(chance);
            let mut entries = Entries { place: frames.pages(), caps, user: stages == Stages::Second };
            let looks = if stages == Stages::Second {
                let size = size::<S>(chance, caps);
                let input = Input(size.join(second_input::<S>(chance), target.0));
                let tree = Tree::<S> { ram: &ram, root: second_root, caps };
                grow(chance, (&tree, &frames), &mut entries, (input, target, size))
            } else {
                let size = size::<F>(chance, caps);
                let input = Input(size.join(tree::input::<F>(chance).0, target.0));
                if F::index(input, F::root()) == 0 {
                    continue;
                }
                let tree = Tree::<F> { ram: &ram, root: first_root, caps };
                grow(chance, (&tree, &frames), &mut entries, (input, target, size))
            };
            for look in looks.into_iter().flatten() {
                let case = Self::finish(chance, (stages, caps), (first_root, second_root), look, ram.clone());
                cases.extend(case.filter(Self::is_comparable));
            }
        }
        cases
    }

    /// Registers and an access for tables that are there, if the walk stays in RAM.
    fn finish(
        chance: &mut Chance,
        (stages, caps): (Stages, Caps),
        (first_root, second_root): (Output, Output),
        input: Input,
        ram: Ram,
    ) -> Option<Self> {
        let by_hypervisor = chance.percent(30);
        let operation = match by_hypervisor {
            true => chance.of(&[Operation::Load, Operation::Store]),
            false => chance.of(&[Operation::Load, Operation::Store, Operation::Fetch]),
        };
        let mut control = Control::empty();
        control.set(Control::SUM, by_hypervisor || chance.percent(50));
        control.set(Control::MXR, chance.percent(30));
        let registers = |root| Registers { root, control, updates: Feature::On, caps };
        let case = Self {
            stages,
            first: registers(first_root),
            second: registers(second_root),
            input,
            operation,
            mode: chance.of(&[Mode::User, Mode::Supervisor]),
            by_hypervisor,
            memory: ram,
            formats: PhantomData,
        };
        if let Ok(output) = case.walk(&case.memory.clone()) {
            if !ARENA.has(output.0) {
                return None;
            }
            case.memory.set(output, target_word(output));
        }
        Some(case)
    }

    /// Not one of those that the rules above leave out.
    fn is_comparable(&self) -> bool {
        let after = self.memory.clone();
        match self.walk(&after) {
            Err(Exception { kind: Some(Kind::Access) | None, .. }) => return false,
            Err(Exception { left_out: true, .. }) => return false,
            _ => {}
        }
        // A program that is to load or store has to be there.
        if self.stages == Stages::Both && !self.by_hypervisor && self.operation != Operation::Fetch {
            let memory = self.memory.clone();
            let second = Stage::<S, _>::new(&memory, self.second);
            let guest = GuestMemory { second, memory: &memory };
            if guest.read(self.first.root) != Ok(own_link::<F>(Stages::First).0) {
                return false;
            }
        }
        // Marks of a guest's entry are a write of its table to the second stage.
        self.stages != Stages::Both || !self.guest_is_marked(&after)
    }

    fn guest_is_marked(&self, after: &Ram) -> bool {
        let before = self.memory.words();
        // A guest's entry is not a user's leaf of the second stage: its words are found by walking both memories.
        let way = |ram: &Ram| {
            let stage = Stage::<S, _>::new(ram, self.second);
            let guest = GuestMemory { second: stage, memory: ram };
            let walked = riscv::walk::<F, _>(
                &guest,
                &self.first,
                self.input,
                (self.operation, self.mode),
                Marks::Leave,
            );
            walked.ok().map(|walked| walked.step(walked.level).raw)
        };
        let fresh = Ram::new(RAM);
        before.iter().for_each(|(at, word)| fresh.set(Output(*at), *word));
        way(&fresh) != way(after)
    }

    fn walk(&self, ram: &Ram) -> Result<Output, Exception> {
        let how = (self.operation, self.mode);
        let stage = Stage::<S, _>::new(ram, self.second);
        match self.stages {
            Stages::First => riscv::walk::<F, _>(ram, &self.first, self.input, how, Marks::Set)
                .map(|walked| walked.output)
                .map_err(|fault| Exception::of(fault.kind(), self.operation, reserved(&fault))),
            Stages::Second => stage
                .translate(self.input, self.operation.access(), Purpose::Final)
                .map(|walked| walked.output)
                .map_err(|fault| Exception::second(&fault, self.operation)),
            Stages::Both => {
                let guest = GuestMemory { second: stage, memory: ram };
                let first = |guest: &GuestMemory<'_, Stage<'_, S, Ram>, Ram>| {
                    riscv::walk::<F, _>(guest, &self.first, self.input, how, Marks::Set)
                };
                let walked = nested::walk(&guest, self.operation.access(), first);
                walked.map(|walked| walked.second.output).map_err(|fault| match fault {
                    nested::Fault::Second(fault)
                    | nested::Fault::First(riscv::Fault::Memory {
                        error: GuestMemoryFault::Second(fault),
                        ..
                    }) => Exception::second(&fault, self.operation),
                    nested::Fault::First(fault) => {
                        Exception::of(fault.kind(), self.operation, reserved(&fault))
                    }
                })
            }
        }
    }
}

/// Whether a fault is one for memory type 3.
fn reserved<E>(fault: &riscv::Fault<E>) -> bool {
    matches!(fault, riscv::Fault::Page(page) if matches!(page.why, riscv::Why::Malformed(Malformed::MemoryType(_))))
}

/// An exception as the hart reports it.
#[derive(Clone, Copy, Debug)]
struct Exception {
    kind: Option<Kind>,
    cause: Option<u64>,
    htval: u64,
    /// Of a fault at a guest's table.
    htinst: Option<u64>,
    /// By a rule above.
    left_out: bool,
}

impl Exception {
    fn of(kind: Option<Kind>, operation: Operation, left_out: bool) -> Self {
        Self { kind, cause: kind.map(|kind| kind.cause(operation)), htval: 0, htinst: None, left_out }
    }

    fn second(fault: &GuestPageFault<Outside>, operation: Operation) -> Self {
        let htinst = fault.htinst();
        let marks = fault.purpose == Purpose::GuestTable && fault.access == Access::Write;
        let plain = Self::of(fault.kind(), operation, marks || reserved(&fault.fault));
        let cause = plain.cause.filter(|_| htinst.is_none() || operation == Operation::Load);
        Self { htval: fault.htval(), htinst, cause, ..plain }
    }
}

/// What is in memory where an address leads: `lui a0, N; ebreak`, with an N that says where.
fn target_word(at: Output) -> u64 {
    (at.0 >> 3 & 0xf_ffff) << 12 | 10 << 7 | 0x37 | 0x0010_0073 << 32
}

/// What `lui` makes of it.
fn target_value(at: Output) -> u64 {
    let upper = (at.0 >> 3 & 0xf_ffff) << 12;
    if upper & 1 << 31 == 0 { upper } else { upper | 0xffff_ffff << 32 }
}

impl<F: Format<Caps = Caps>, S: Format<Caps = Caps>> Case for RiscvCase<F, S> {
    const OUTPUTS: [Option<&'static str>; 7] =
        [Some("scause"), Some("stval"), Some("htval"), Some("htinst"), Some("a0"), Some("sepc"), None];

    fn head(&self) -> [u64; 8] {
        let control = self.first.control;
        let mxr = if control.contains(Control::MXR) { MXR } else { 0 };
        let sum = if control.contains(Control::SUM) { SUM } else { 0 };
        let supervisor = self.mode == Mode::Supervisor;
        let first = mode::<F>() | self.first.root.0 >> 12;
        let second = mode::<S>() | self.second.root.0 >> 12;
        let code = match self.stages {
            Stages::Second => GUEST_PAGE,
            _ => GUEST_AT[usize::from(!supervisor)],
        };
        let (number, begin) = match (self.by_hypervisor, self.operation) {
            (true, Operation::Store) => (2, 0),
            (true, _) => (1, 0),
            (false, Operation::Store) => (0, code + STORE_AT),
            (false, Operation::Load) => (0, code),
            (false, _) => (0, self.input.0),
        };
        [
            number,
            self.input.0,
            if self.stages == Stages::Second { 0 } else { first },
            if self.stages == Stages::First { 0 } else { second },
            UXL | mxr | sum,
            VSXL | SPV | if supervisor { SPVP } else { 0 },
            mxr | if supervisor { SPP } else { 0 },
            begin,
        ]
    }

    fn memory(&self) -> &Ram {
        &self.memory
    }

    fn expect(&self) -> Expected {
        let after = self.memory.clone();
        let (kind, outputs, may_be_set) = match self.walk(&after) {
            Ok(output) => {
                let value = match self.operation {
                    Operation::Load | Operation::LoadExecutable => Some(after.get(output)),
                    Operation::Store => {
                        after.set(output, STORED);
                        None
                    }
                    Operation::Fetch => Some(target_value(output)),
                };
                let next = (self.operation == Operation::Fetch).then(|| self.input.0.wrapping_add(4));
                let outputs = [Some(BREAKPOINT), None, None, None, value, next, None];
                (format!("translated, {:?}", self.operation), outputs, 0)
            }
            Err(Exception { kind, cause, htval, htinst, .. }) => {
                let name = kind.map_or("none".to_owned(), |kind| format!("{kind:?} fault"));
                let place = if htinst.is_some() { " at a guest's table" } else { "" };
                let outputs = [cause, Some(self.input.0), Some(htval), htinst, None, None, None];
                (format!("{name}{place}, {:?}", self.operation), outputs, MARKS)
            }
        };
        Expected { kind, outputs, after: after.words(), may_be_set }
    }

    fn path(&self) -> String {
        let (first, second) = ((self.first.root, &self.first.caps), (self.second.root, &self.second.caps));
        let memory = self.memory.clone();
        match self.stages {
            Stages::First => tree::path::<F>(&memory, first, self.input, Some).0,
            Stages::Second => tree::path::<S>(&memory, second, self.input, Some).0,
            Stages::Both => {
                let stage = Stage::<S, _>::new(&memory, self.second);
                tree::nested_path::<F, S>(&memory, &stage, first, second, self.input)
            }
        }
    }
}
