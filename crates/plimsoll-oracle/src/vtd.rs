//! VT-d's second stage: what a device's DMA reaches, and what is recorded of what it does not.
//!
//! Enters: a seed. Leaves: cases: eight bytes that a device reads or writes, through tables of three or four levels, in legacy mode. Compared
//! are the fault recording register (reason, read or write, the page, who), whether it says that there is one, what was read,
//! what was written and where, and that no entry is changed.
//!
//! # Rules for what is not compared, and not drawn
//!
//! * QEMU judges the right of each entry before its reserved bits, and before it goes on (`vtd_iova_to_slpte` in hw/i386/intel_iommu.c). The
//!   crate judges rights at the end, of which the manual says nothing. Where the crate finds a reserved bit or a table that is not there, and
//!   an entry up to that lacks the right, the missing right is expected.
//! * QEMU writes a PASID of all ones into the record of a request that had none (`vtd_record_frcd`). The field counts where PP is set.
//! * QEMU's unit has as many bits of host addresses as of devices': what it calls AW is MGAW and HAW.
//! * It has neither five levels, nor accessed and dirty bits in legacy mode.
//! * Addresses at 0xFEEx_xxxx are interrupts, and not drawn. What leads out of RAM is not drawn: the unit translates it, and nobody answers.
//!   Tables beyond 4 GiB are drawn: nothing is there.
use crate::Chance;
use crate::grown::grow;
use crate::hardware::{Hardware, Source};
use crate::memory::{Outside, Ram};
use crate::tree::{self, Dress, Frames, Size, Tree};
use crate::verdict::{Case, Expected};
use crate::x86::{self as plain, ARENA, PROGRAM, RAM, STORED, TABLES};
use plimsoll_mmu::format::vtd::{Caps, VtdFormat};
use plimsoll_mmu::vtd::{self, Fault, Mode, Registers, Request};
use plimsoll_mmu::{Entry, Feature, Input, Leaf, Level, Marks, Memory, Output, Permissions, Table};
use std::collections::BTreeMap;
use std::marker::PhantomData;

/// The PC of [`crate::x86`]. Its clock counts instructions, and jumps while the processor is halted.
pub const HARDWARE: Hardware = Hardware {
    program: Source {
        text: concat!(include_str!("../programs/x86-case.s"), include_str!("../programs/vtd.s")),
        at: PROGRAM,
    },
    ..plain::HARDWARE
};

/// The processor's own tables: a root, and four pages of 1 GiB.
const OWN_TABLES: [u64; 2] = [0x20_0000, 0x20_1000];
/// The device's own, levels 4 and 3: the same memory.
const DEVICES_TABLES: [u64; 2] = [0x22_2000, 0x22_3000];
/// The unit's root table and the context table of bus 0.
const ROOTS: u64 = 0x22_0000;
const CONTEXTS: u64 = 0x22_1000;
/// What the device is to write is there before the program starts.
const STORED_AT: u64 = 0x23_0008;
/// Device 4, function 0.
const SOURCE_ID: u64 = 0x20;

const PAGE_OF_1_GIB: u64 = 0x83;
const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
/// What entries may have in bits that the unit ignores: all that it does not know, and accessed and dirty.
const IGNORED: u64 = 0x1f << 2 | 7 << 8 | 0x3ff << 52 | 1 << 63;
/// Beyond all RAM.
const NOWHERE: u64 = 1 << 32;

/// Of the fault recording register: a fault, of a read.
const FAULT: u64 = 1 << 63;
const OF_A_READ: u64 = 1 << 62;
/// There, whether the request had a PASID (PP), and which.
const WITH_PASID: u64 = 1 << 31;
const PASID: u64 = 0xf_ffff << 40;
/// The fault status register: one is pending.
const PENDING: u64 = 1 << 1;

/// A unit with tables of this format.
pub fn caps<F: VtdFormat>() -> Caps {
    let bits = F::INPUT_BITS;
    // Each has one value of it.
    let snoop_control = if F::LEVELS == 4 { Feature::On } else { Feature::Off };
    Caps { physical_bits: bits, input_bits: bits, snoop_control, accessed_dirty: Feature::Off, ..Caps::FULL }
}

/// Options of QEMU for it.
pub fn options<F: VtdFormat>() -> [&'static str; 8] {
    let unit = match F::LEVELS {
        4 => "intel-iommu,intremap=off,aw-bits=48,snoop-control=on",
        _ => "intel-iommu,intremap=off,aw-bits=39",
    };
    let device = "edu,addr=4.0,dma_mask=0xffffffffffffffff";
    ["-cpu", "max", "-icount", "shift=8,sleep=off", "-device", unit, "-device", device]
}

/// What the program is told once: CR3, the device's own tables, and the context entry's upper half.
pub fn run<F: VtdFormat>() -> [u64; 3] {
    let levels = u64::from(F::LEVELS);
    [OWN_TABLES[0], DEVICES_TABLES[if F::LEVELS == 4 { 0 } else { 1 }], (levels - 2) | 1 << 8]
}

/// What is in memory in every run.
pub fn own_tables() -> BTreeMap<u64, u64> {
    let [four, three] = OWN_TABLES;
    let [devices_four, devices_three] = DEVICES_TABLES;
    let gib = |table: u64, number: u64| (table + number * 8, number << 30 | PAGE_OF_1_GIB);
    let processors = (0..4).map(|number| gib(three, number));
    let devices = (0..2).map(|number| gib(devices_three, number));
    let links =
        [(four, three | 3), (devices_four, devices_three | 3), (ROOTS, CONTEXTS | 1), (STORED_AT, STORED)];
    links.into_iter().chain(processors).chain(devices).collect()
}

/// One transfer of a device whose tables are of the format `F`.
#[derive(Clone, Debug)]
pub struct VtdCase<F> {
    /// The device's tables.
    pub registers: Registers,
    /// The device's address.
    pub input: Input,
    /// What it does there.
    pub request: Request,
    memory: Ram,
    format: PhantomData<F>,
}

struct Entries<'a> {
    frames: &'a Frames,
    snoop_control: Feature,
}

/// Sometimes less than all.
fn permissions(chance: &mut Chance, percent: u64) -> Permissions {
    match chance.percent(percent) {
        true => Permissions::all() - chance.of(&[Permissions::READ, Permissions::WRITE]),
        false => Permissions::all(),
    }
}

impl<F: VtdFormat> Dress<F> for Entries<'_> {
    fn table(&mut self, chance: &mut Chance, _: Level) -> Entry {
        let at = self.frames.take(chance, 4096);
        let table = Table::new(at, permissions(chance, 15), Memory::Physical);
        Entry::Table(Table { software: chance.bits() & IGNORED, ..table })
    }

    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry {
        let snooped = self.snoop_control == Feature::On && chance.percent(50);
        let memory = if snooped { Memory::Snooped } else { Memory::Physical };
        let output = Output(size.join(target.0, 0));
        let leaf = Leaf::new(output, size.shift, permissions(chance, 40), memory);
        Entry::Leaf(Leaf { software: chance.bits() & IGNORED, ..leaf })
    }
}

/// One bit of an entry turned over.
fn damaged(chance: &mut Chance, word: u64) -> u64 {
    let (any, address) = (chance.below(64), 12 + chance.below(40));
    word ^ 1 << chance.of(&[0, 1, 7, 11, 62, address, address, any])
}

/// An address, where it is to go, and by what size of leaf.
fn way<F: VtdFormat>(chance: &mut Chance, caps: &Caps) -> (Input, Output, Size) {
    let size = Size::draw::<F>(chance, caps);
    let target = ARENA.word(chance);
    (Input(size.join(tree::input::<F>(chance).0, target.0)), target, size)
}

impl<F: VtdFormat> VtdCase<F> {
    /// A case that can be compared.
    pub fn draw(chance: &mut Chance) -> Self {
        chance.until(|chance| Self::attempt(chance))
    }

    fn attempt(chance: &mut Chance) -> Option<Self> {
        let caps = caps::<F>();
        let frames = Frames::new(TABLES);
        let ram = Ram::new(RAM);
        let root = frames.take(chance, 4096);
        let mut way = way::<F>(chance, &caps);
        let mut entries = Entries { frames: &frames, snoop_control: caps.snoop_control };
        let tree = Tree::<F> { ram: &ram, root, caps };
        let (_, places) = tree.lead(chance, &mut entries, way)?;
        if chance.percent(45) {
            let at = chance.of(&places);
            ram.set(at, damaged(chance, ram.get(at)));
        }
        if chance.percent(3) {
            way.0.0 ^= 1 << (u64::from(F::INPUT_BITS) + chance.below(u64::from(64 - F::INPUT_BITS)));
        }
        let nowhere = if chance.percent(1) { NOWHERE << chance.below(4) } else { 0 };
        Self::finish(chance, Output(root.0 | nowhere), way.0, ram)
    }

    /// Cases, at least so many, whose tables the mapper made.
    pub fn grow(chance: &mut Chance, count: usize) -> Vec<Self> {
        let caps = caps::<F>();
        let mut cases = Vec::new();
        while cases.len() < count {
            let frames = Frames::new(TABLES);
            let ram = Ram::new(RAM);
            let root = frames.take(chance, 4096);
            let mut entries = Entries { frames: &frames, snoop_control: caps.snoop_control };
            let tree = Tree::<F> { ram: &ram, root, caps };
            let way = way::<F>(chance, &caps);
            for look in grow(chance, (&tree, &frames), &mut entries, way).into_iter().flatten() {
                cases.extend(Self::finish(chance, root, look, ram.clone()));
            }
        }
        cases
    }

    /// A transfer through tables that are there, if it can be compared.
    fn finish(chance: &mut Chance, root: Output, input: Input, ram: Ram) -> Option<Self> {
        let registers = Registers { root, caps: caps::<F>() };
        let request = chance.of(&[Request::Read, Request::Write]);
        let case = Self { registers, input, request, memory: ram, format: PhantomData };
        match case.walk() {
            Ok((_, output)) if ARENA.has(output.0) => case.memory.set(output, target_word(output)),
            Err(Fault::TooLong(_) | Fault::Refused { .. } | Fault::Reserved { .. }) => {}
            Err(Fault::Root { at, .. } | Fault::Memory { at, .. }) if at.0 >= NOWHERE => {}
            _ => return None,
        }
        Some(case)
    }

    fn walk(&self) -> Result<(Level, Output), Fault<Outside>> {
        let walked = vtd::walk::<F, _>(&self.memory, &self.registers, self.input, self.request, Marks::Set)?;
        Ok((walked.level, walked.output))
    }

    /// The reason as QEMU finds it, by the first rule above.
    fn reason(&self, fault: &Fault<Outside>) -> Option<u8> {
        let end = match fault {
            Fault::Reserved { level, .. } => *level,
            // A table that is not there is named by the entry above.
            Fault::Memory { level, .. } => Level(level.0 + 1),
            other => return other.reason(Mode::Legacy),
        };
        let (right, lacking) = match self.request {
            Request::Read => (READ, 0x6),
            _ => (WRITE, 0x5),
        };
        let mut table = self.registers.root;
        for level in (end.0..=F::LEVELS).rev().map(Level) {
            let word = self.memory.get(Output(table.0 | F::index(self.input, level) << 3));
            if word & right == 0 {
                return Some(lacking);
            }
            table = Output(word & F::ADDRESS);
        }
        fault.reason(Mode::Legacy)
    }
}

/// What is in memory where an address leads: something that says where.
const fn target_word(at: Output) -> u64 {
    0x5245_4144_0000_0000 | at.0 >> 3
}

impl<F: VtdFormat> Case for VtdCase<F> {
    const OUTPUTS: [Option<&'static str>; 7] = [
        Some("fault status"),
        Some("faulting page"),
        Some("fault record"),
        Some("what was read"),
        None,
        None,
        None,
    ];

    fn head(&self) -> [u64; 8] {
        let number = u64::from(self.request == Request::Write);
        [number, self.input.0, self.registers.root.0, 0, 0, 0, 0, 0]
    }

    fn memory(&self) -> &Ram {
        &self.memory
    }

    fn outputs(&self, mut written: [u64; 7]) -> [u64; 7] {
        if written[2] & WITH_PASID == 0 {
            written[2] &= !PASID;
        }
        written
    }

    fn expect(&self) -> Expected {
        let after = self.memory.clone();
        let (kind, outputs) = match self.walk() {
            Ok((level, output)) => {
                let value = match self.request {
                    Request::Read => Some(after.get(output)),
                    _ => {
                        after.set(output, STORED);
                        None
                    }
                };
                let kind = format!("translated at {level}, {:?}", self.request);
                (kind, [Some(0), None, None, value, None, None, None])
            }
            Err(fault) => {
                let reason = self.reason(&fault);
                let of = if self.request == Request::Read { OF_A_READ } else { 0 };
                let record = reason.map(|reason| FAULT | of | u64::from(reason) << 32 | SOURCE_ID);
                let kind = format!("reason {:#x}, {:?}", reason.unwrap_or(0), self.request);
                (kind, [Some(PENDING), Some(self.input.0 & !0xfff), record, None, None, None, None])
            }
        };
        Expected { kind, outputs, after: after.words(), may_be_set: 0 }
    }

    fn path(&self) -> String {
        tree::path::<F>(&self.memory, (self.registers.root, &self.registers.caps), self.input, Some).0
    }
}
