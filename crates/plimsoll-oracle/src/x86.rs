//! x86-64 with four and five levels: what a program in ring 0 and ring 3 sees.
//!
//! Enters: a seed. Leaves: cases: one access to one address, as CR0.WP, CR4.SMEP, SMAP and PKE, EFER.NXE, EFLAGS.AC and PKRU happen
//! to be. Compared are the vector, the error code, CR2, what was read or executed, what was written and where, and accessed and dirty
//! bits of every entry.
//!
//! # Rules for what is not compared
//!
//! * After a fault, accessed bits of entries above the last one may be set or not: "the processor may set the accessed flag"
//!   whether or not the access is carried out (SDM vol. 3, 4.8). QEMU sets them as it goes.
//! * The error code's P is not compared where RSVD is set: QEMU leaves it clear (`do_fault_rsvd` in `mmu_translate`,
//!   target/i386/tcg/sysemu/excp_helper.c), where the SDM says that RSVD "can be set only if bit 0 is also set" (4.7).
//! * An implicit access is made from ring 3 (LAR through a table of descriptors at the address). From ring 0 with EFLAGS.AC, QEMU
//!   7.2 lets it pass SMAP (`cpu_mmu_index_kernel` in target/i386/cpu.h), where the SDM does not (4.6.1).
//! * CR4.PGE and PCIDE are off: a TLB is not what is compared here.
use crate::Chance;
use crate::grown::grow;
use crate::hardware::{Hardware, Source};
use crate::memory::{Ram, Region};
use crate::tree::{self, Dress, Frames, Size, Tree};
use crate::verdict::{Case, Expected};
use plimsoll_mmu::format::x86::{Caps, Maker, X86Format};
use plimsoll_mmu::x86::{self, Control, ErrorCode, Fault, Mode, Registers};
use plimsoll_mmu::{Access, Entry, Feature, Input, Leaf, Level, Marks, Memory, Output, Permissions, Table};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// A PC without firmware of its own.
pub const HARDWARE: Hardware = Hardware {
    qemu: "qemu-system-x86_64",
    arguments: &[
        "-machine",
        "q35,memory-backend=ram,mem-merge=off",
        "-bios",
        "FOLDER/firmware",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
    ],
    binutils: "",
    flags: &["--64"],
    program: Source {
        text: concat!(include_str!("../programs/x86-case.s"), include_str!("../programs/x86.s")),
        at: PROGRAM,
    },
    firmware: Some(Source { text: include_str!("../programs/x86-reset.s"), at: 0xffff_0000 }),
    ram: 0,
    ram_mib: 2048,
    // isa-debug-exit, of the 0x10 that the program writes.
    status: 0x21,
};
pub(crate) const PROGRAM: u64 = 1 << 20;
/// What runs in ring 3 is here in the program.
pub const USER_PAGE: u64 = PROGRAM + 0x2000;
/// Where that is in every tree.
pub const USER: u64 = 0xc000_0000;
/// Tables through which the program sees itself: a root, level 4 below a fifth, and so on down.
const OWN_TABLES: [u64; 5] = [0x20_0000, 0x20_1000, 0x20_2000, 0x20_3000, 0x20_4000];
/// What cases have of RAM: below are program and batch.
pub(crate) const RAM: Region = Region { first: 128 << 20, bytes: 1920 << 20 };
pub(crate) const TABLES: Region = Region { first: 384 << 20, bytes: 64 << 20 };
/// Where addresses lead.
pub(crate) const ARENA: Region = Region { first: 512 << 20, bytes: 1536 << 20 };
/// What a store writes.
pub(crate) const STORED: u64 = 0x5354_4f52_4544_2121;

const PRESENT_WRITABLE_USER_ACCESSED: u64 = 0x27;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
/// What entries may have in bits that the processor ignores; GLOBAL not in the upper levels, where AMD's does not.
const TABLE_IGNORED: u64 = 1 << 6 | GLOBAL | LEAF_IGNORED | 0xf << 59;
const LEAF_IGNORED: u64 = 7 << 9 | 0x7f << 52;
const PRESENT_WRITABLE_ACCESSED_DIRTY: u64 = 0x63;
const CR0: u64 = 0x8000_0033;
const CR0_WP: u64 = 1 << 16;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER: u64 = 0x500;
const EFER_NXE: u64 = 1 << 11;
const FLAGS: u64 = 2;
const FLAGS_AC: u64 = 1 << 18;

const BREAKPOINT: u64 = 3;
pub(crate) const GENERAL_PROTECTION: u64 = 13;
pub(crate) const PAGE_FAULT: u64 = 14;

/// The processor of a run.
#[derive(Clone, Copy, Debug)]
pub struct Processor {
    /// What it has. QEMU's has 40 bits of physical addresses, and does not fault on bit 8 in the upper levels.
    pub caps: Caps,
}

impl Default for Processor {
    fn default() -> Self {
        let caps = Caps {
            physical_bits: 40,
            gib_pages: Feature::On,
            no_execute: Feature::On,
            keys: Feature::On,
            maker: Maker::Intel,
        };
        Self { caps }
    }
}

impl Processor {
    /// Options of QEMU for it.
    pub fn options(&self) -> [&'static str; 2] {
        match self.caps.gib_pages {
            Feature::On => ["-cpu", "max"],
            Feature::Off => ["-cpu", "max,-pdpe1gb"],
        }
    }

    /// What the program is told once: CR4 and CR3.
    pub fn run<F: X86Format>(&self) -> [u64; 2] {
        [cr4::<F>(), OWN_TABLES[if F::LEVELS == 5 { 0 } else { 1 }]]
    }
}

const fn cr4<F: X86Format>() -> u64 {
    if F::LEVELS == 5 { CR4_PAE | CR4_LA57 } else { CR4_PAE }
}

/// What registers are called by the processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Switches {
    pub(crate) cr0: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    pub(crate) flags: u64,
}

impl Switches {
    /// Those that a walk depends on.
    pub(crate) fn of<F: X86Format>(registers: &Registers) -> Self {
        let if_set = |flag, bit| if registers.control.contains(flag) { bit } else { 0 };
        let if_on = |feature, bit| if feature == Feature::On { bit } else { 0 };
        Self {
            cr0: CR0 | if_set(Control::WRITE_PROTECT, CR0_WP),
            cr4: cr4::<F>()
                | if_set(Control::SMEP, CR4_SMEP)
                | if_set(Control::SMAP, CR4_SMAP)
                | if_on(registers.caps.keys, CR4_PKE),
            efer: EFER | if_on(registers.caps.no_execute, EFER_NXE),
            flags: FLAGS | if_set(Control::ALIGNMENT_CHECK, FLAGS_AC),
        }
    }
}

/// One access in the format `F`.
#[derive(Clone, Debug)]
pub struct X86Case<F> {
    /// The processor's state.
    pub registers: Registers,
    /// The address.
    pub input: Input,
    /// What is done there, and by whom.
    pub access: (Access, Mode),
    memory: Ram,
    format: PhantomData<F>,
}

/// What is in memory in every run: the tables through which the program sees itself, which is memory as it is up to 2 GiB and a
/// page for ring 3. A root's first entry leads to them in every case.
pub fn own_tables() -> BTreeMap<u64, u64> {
    let [five, four, three, two, one] = OWN_TABLES;
    let gib = |number: u64| (three + number * 8, number << 30 | LARGE | PRESENT_WRITABLE_ACCESSED_DIRTY);
    const { assert!(USER == 3 << 30) };
    let links = [(five, four), (four, three), (three + 3 * 8, two), (two, one), (one, USER_PAGE)];
    let links = links.map(|(at, to)| (at, to | PRESENT_WRITABLE_USER_ACCESSED));
    links.into_iter().chain([gib(0), gib(1)]).collect()
}

/// The root's first entry.
const fn own_link<F: X86Format>() -> u64 {
    OWN_TABLES[if F::LEVELS == 5 { 1 } else { 2 }] | PRESENT_WRITABLE_USER_ACCESSED
}

/// Entries at random.
pub(crate) struct Entries<T> {
    /// Makes places for tables.
    pub(crate) place: T,
    /// What all entries permit: for everybody in a second stage, whose accesses are a user's.
    pub(crate) least: Permissions,
}

impl<F: X86Format, T: FnMut(&mut Chance) -> Output> Dress<F> for Entries<T> {
    fn table(&mut self, chance: &mut Chance, level: Level) -> Entry {
        let at = (self.place)(chance);
        let full = chance.percent(75);
        let ignored = TABLE_IGNORED & if level >= Level(4) { !GLOBAL } else { u64::MAX };
        let permissions = if full { Permissions::all() } else { permissions(chance) | self.least };
        let table = Table::new(at, permissions, Memory::Pat(chance.of(&[0, 1, 2, 3])));
        Entry::Table(Table { accessed: chance.percent(50), software: chance.bits() & ignored, ..table })
    }

    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry {
        Entry::Leaf(Leaf {
            accessed: chance.percent(50),
            dirty: chance.percent(50),
            global: chance.percent(50),
            key: chance.of(&[0, 1, 2, 7, 14, 15]),
            software: chance.bits() & LEAF_IGNORED,
            ..Leaf::new(
                Output(size.join(target.0, 0)),
                size.shift,
                if chance.percent(40) { Permissions::all() } else { permissions(chance) | self.least },
                Memory::Pat(chance.of(&[0, 1, 2, 3, 4, 5, 6, 7])),
            )
        })
    }
}

fn permissions(chance: &mut Chance) -> Permissions {
    let all = [Permissions::WRITE, Permissions::USER, Permissions::EXECUTE];
    all.into_iter().filter(|_| chance.percent(50)).fold(Permissions::READ, |some, one| some | one)
}

/// One bit of an entry turned over: what makes it absent, reserved, another kind, or any.
pub(crate) fn damaged(chance: &mut Chance, word: u64) -> u64 {
    let reserved = 40 + chance.below(12);
    let any = chance.below(64);
    word ^ 1 << chance.of(&[0, reserved, 7, 63, 12 + any % 9, any, any])
}

fn control(chance: &mut Chance) -> Control {
    let all = [Control::WRITE_PROTECT, Control::SMEP, Control::SMAP, Control::ALIGNMENT_CHECK];
    all.into_iter().filter(|_| chance.percent(50)).fold(Control::empty(), |some, one| some | one)
}

/// What decides about rights, at random.
pub(crate) fn registers(chance: &mut Chance, root: Output, caps: Caps) -> Registers {
    let on = |chance: &mut Chance| if chance.percent(85) { Feature::On } else { Feature::Off };
    let caps = Caps { no_execute: on(chance), keys: on(chance), ..caps };
    // Where there are keys, most forbid nothing.
    let pkru = low_half(chance.bits() & chance.bits());
    Registers { cr3: root.0, control: control(chance), pkru, caps }
}

/// The lower 32 bits.
fn low_half(bits: u64) -> u32 {
    u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default()
}

/// A root that has the program's tables.
fn with_own_link<F: X86Format>(chance: &mut Chance, frames: &Frames) -> (Ram, Output) {
    let root = frames.take(chance, 4096);
    let ram = Ram::new(RAM);
    ram.set(root, own_link::<F>());
    (ram, root)
}

/// An address, where it is to go, and by what size of leaf; `None` if the program's tables are in its place.
fn way<F: X86Format>(chance: &mut Chance, processor: &Processor) -> Option<(Input, Output, Size)> {
    let size = Size::draw::<F>(chance, &processor.caps);
    let target = ARENA.word(chance);
    let target = if chance.percent(10) { Output(target.0 | 0xff8) } else { target };
    let input = Input(size.join(tree::input::<F>(chance).0, target.0));
    (F::index(input, F::root()) != 0).then_some((input, target, size))
}

const ACCESSES: [(Access, Mode); 7] = [
    (Access::Read, Mode::Supervisor),
    (Access::Write, Mode::Supervisor),
    (Access::Fetch, Mode::Supervisor),
    (Access::Read, Mode::User),
    (Access::Write, Mode::User),
    (Access::Fetch, Mode::User),
    (Access::Read, Mode::Implicit),
];

impl<F: X86Format> X86Case<F> {
    /// A case whose walk stays in RAM.
    pub fn draw(chance: &mut Chance, processor: &Processor) -> Self {
        chance.until(|chance| Self::attempt(chance, processor))
    }

    fn attempt(chance: &mut Chance, processor: &Processor) -> Option<Self> {
        let frames = Frames::new(TABLES);
        let (ram, root) = with_own_link::<F>(chance, &frames);
        let way = way::<F>(chance, processor)?;
        let mut entries = Entries { place: frames.pages(), least: Permissions::READ };
        let tree = Tree::<F> { ram: &ram, root, caps: processor.caps };
        let (_, places) = tree.lead(chance, &mut entries, way)?;
        if chance.percent(45) {
            let at = chance.of(&places);
            ram.set(at, damaged(chance, ram.get(at)));
        }
        let not_canonical = chance.percent(3);
        let wrong = u64::from(not_canonical) << (u64::from(F::INPUT_BITS) + chance.below(7));
        let accesses = if not_canonical { &ACCESSES[..6] } else { &ACCESSES };
        Self::finish(chance, processor, root, (Input(way.0.0 ^ wrong), accesses), ram)
    }

    /// Cases, at least so many, whose tables the mapper made.
    pub fn grow(chance: &mut Chance, processor: &Processor, count: usize) -> Vec<Self> {
        let mut cases = Vec::new();
        while cases.len() < count {
            let frames = Frames::new(TABLES);
            let (ram, root) = with_own_link::<F>(chance, &frames);
            let Some(way) = way::<F>(chance, processor) else { continue };
            let mut entries = Entries { place: frames.pages(), least: Permissions::READ };
            let tree = Tree::<F> { ram: &ram, root, caps: processor.caps };
            for input in grow(chance, (&tree, &frames), &mut entries, way).into_iter().flatten() {
                cases.extend(Self::finish(chance, processor, root, (input, &ACCESSES), ram.clone()));
            }
        }
        cases
    }

    /// Registers and an access for tables that are there, if the walk stays in RAM.
    fn finish(
        chance: &mut Chance,
        processor: &Processor,
        root: Output,
        (input, accesses): (Input, &[(Access, Mode)]),
        ram: Ram,
    ) -> Option<Self> {
        let access = chance.of(accesses);
        let registers = registers(chance, root, processor.caps);
        let case = Self { registers, input, access, memory: ram, format: PhantomData };
        match case.walk(&case.memory) {
            // What is executed is in the arena, and so is what is written; tables can be read as well.
            Ok(output) if ARENA.has(output.0) => case.memory.set(output, target_word(output)),
            Ok(output) if access.0 == Access::Read && TABLES.has(output.0) => {}
            Ok(_) | Err(Fault::Memory { .. }) => return None,
            Err(_) => {}
        }
        Some(case)
    }

    fn walk(&self, ram: &Ram) -> Result<Output, Fault<crate::Outside>> {
        x86::walk::<F, _>(ram, &self.registers, self.input, self.access, Marks::Leave)
            .map(|walked| walked.output)
    }
}

/// An error code as it should be, by a rule above.
pub(crate) fn with_present(code: u64) -> u64 {
    let [reserved, present] = [ErrorCode::RESERVED, ErrorCode::PRESENT].map(|bit| u64::from(bit.bits()));
    if code & reserved != 0 { code | present } else { code }
}

/// What is in memory where an address leads: `mov $N, %eax; int3`, with an N that says where.
fn target_word(at: Output) -> u64 {
    0xb8 | (at.0 >> 3 & 0xffff_ffff) << 8 | 0x0090_90cc << 40
}

impl<F: X86Format> Case for X86Case<F> {
    const OUTPUTS: [Option<&'static str>; 7] =
        [Some("vector"), Some("error code"), Some("CR2"), Some("RAX"), Some("RIP"), None, None];

    fn head(&self) -> [u64; 8] {
        let Switches { cr0, cr4, efer, flags } = Switches::of::<F>(&self.registers);
        let operation = ACCESSES.iter().position(|access| *access == self.access);
        let operation = operation.map_or(0, |number| if number < 3 { number } else { number + 1 });
        [
            operation as u64,
            self.input.0,
            self.registers.cr3,
            cr0,
            cr4,
            efer,
            u64::from(self.registers.pkru),
            flags,
        ]
    }

    fn memory(&self) -> &Ram {
        &self.memory
    }

    fn outputs(&self, mut written: [u64; 7]) -> [u64; 7] {
        if written[0] == PAGE_FAULT {
            written[1] = with_present(written[1]);
        }
        written
    }

    fn expect(&self) -> Expected {
        let after = self.memory.clone();
        let walked = x86::walk::<F, _>(&after, &self.registers, self.input, self.access, Marks::Set);
        let (kind, outputs, may_be_set) = match walked {
            Ok(walked) => {
                let value = match self.access {
                    (Access::Read, Mode::Implicit) => None,
                    (Access::Read, _) => Some(after.get(walked.output)),
                    (Access::Write, _) => {
                        after.set(walked.output, STORED);
                        None
                    }
                    (Access::Fetch, _) => Some(walked.output.0 >> 3 & 0xffff_ffff),
                };
                let next = (self.access.0 == Access::Fetch).then_some(self.input.0.wrapping_add(6));
                let kind = format!("translated at {}", walked.level);
                (kind, [Some(BREAKPOINT), Some(0), Some(0), value, next, None, None], 0)
            }
            Err(Fault::Page(fault)) => {
                let outputs = [
                    Some(PAGE_FAULT),
                    Some(u64::from(fault.code.bits())),
                    Some(fault.input.0),
                    None,
                    None,
                    None,
                    None,
                ];
                (format!("page fault, {:?}", fault.code), outputs, ACCESSED)
            }
            Err(Fault::NotCanonical(_)) => {
                let outputs = [Some(GENERAL_PROTECTION), Some(0), Some(0), None, None, None, None];
                ("not canonical".to_owned(), outputs, 0)
            }
            Err(other) => (format!("outside of RAM: {other}"), [None; 7], ACCESSED),
        };
        Expected { kind, outputs, after: after.words(), may_be_set }
    }

    fn path(&self) -> String {
        let tree = (Output(self.registers.cr3), &self.registers.caps);
        tree::path::<F>(&self.memory, tree, self.input, Some).0
    }
}
