//! Arm's VMSAv8-64: what the hypervisor is told when it has addresses translated for EL1 and EL0, through one stage and two.
//!
//! Enters: a seed. Leaves: cases: one address through stage 1, stage 2 or both, with granules of 4, 16 and 64 KiB. Compared are
//! PAR_EL1 (fault status with its level, stage, and whether it was on a walk; or address, memory type and shareability) and
//! every entry, whose access flag and dirty state hardware may manage.
//!
//! # Rules for what is not compared, and not drawn
//!
//! * Instructions that translate have no form for fetches, so that what may be executed is not compared.
//! * A contiguous hint on an entry that does not fit its neighbours (DDI 0487, D8.7.1: constrained unpredictable) is not drawn. QEMU
//!   ignores the hint.
//! * Of normal memory's type the caching is compared, and not the hints about allocation.
//! * QEMU 7.2 has no FEAT_PAN3: EPAN is off.
//! * QEMU 7.2 (target/arm/ptw.c) is not the manual everywhere: a fault of stage 2 on a walk has the level of stage 1's entry, so that the
//!   level of these is not compared; blocks at levels that have none are translated, and not drawn; of devices and of what is not
//!   cached stage 1 alone reports the shareability that the entry says, so that it is not compared. Of two stages' memory types
//!   it takes the second's kind of device under FWB whatever the first's is (`combined_attrs_fwb`; the manual's S2ApplyFWBMemAttrs
//!   combines them), and a device in one stage for nGnRE where the other has memory that inner caches do not keep
//!   (`combined_attrs_nofwb`): these types are not compared.
//! * What a reserved shareability comes to is not compared. Reserved MemAttr values, which MemAttr\[3\] makes of others under FWB, are not drawn.
//! * VTCR_EL2.PS says no fewer bits than stage 2 translates (constrained unpredictable).
//! * After a fault, the access flag and dirty state of an entry may have been set.
use crate::Chance;
use crate::grown::grow;
use crate::hardware::{Hardware, Source};
use crate::memory::{Outside, Ram, Region};
use crate::tree::{self, Dress, Frames, Moved, Size, Tree};
use crate::verdict::{Case, Expected};
use plimsoll_mmu::arm::{
    self, Attributes, Caching, Control, Fault, Kind, Mode, Registers, SecondFault, SecondRegisters, Stage,
};
use plimsoll_mmu::format::arm::Caps;
use plimsoll_mmu::nested::{self, GuestMemory, Purpose, SecondStage};
use plimsoll_mmu::{
    Access, Entry, Feature, Format, Input, Leaf, Level, Malformed, Marks, Memory, Output, Permissions,
    Shareability, Table,
};
use std::marker::PhantomData;

/// A board with 2 GiB of RAM whose processor starts in EL2, at the program.
pub const HARDWARE: Hardware = Hardware {
    qemu: "qemu-system-aarch64",
    arguments: &[
        "-machine",
        "virt,virtualization=on,memory-backend=ram,mem-merge=off",
        "-cpu",
        "max",
        "-device",
        "loader,addr=0x40200000,cpu-num=0",
    ],
    binutils: "aarch64-linux-gnu-",
    flags: &[],
    // The board leaves its description of itself where RAM begins.
    program: Source { text: include_str!("../programs/arm.s"), at: BASE + 0x20_0000 },
    firmware: None,
    ram: BASE,
    ram_mib: 2048,
    status: 0,
};
const BASE: u64 = 0x4000_0000;
/// What cases have of RAM: below are program, batch and what the board leaves there.
const RAM: Region = Region { first: BASE + (128 << 20), bytes: 1920 << 20 };
const TABLES: Region = Region { first: BASE + (384 << 20), bytes: 64 << 20 };
const ARENA: Region = Region { first: BASE + (512 << 20), bytes: 1536 << 20 };

/// MAIR_EL1: devices of three kinds, not cached, written through, written back.
const MAIR: [u8; 8] = [0x00, 0x04, 0x0c, 0x44, 0xbb, 0xff, 0x4f, 0xee];
/// MemAttr values that are not reserved, without FWB and with it.
const MEMORY: [u8; 10] = [0, 1, 2, 3, 5, 6, 7, 10, 13, 15];
const FORCED_MEMORY: [u8; 7] = [0, 1, 2, 3, 5, 6, 7];

/// SCTLR_EL1: bits that are one, and M.
const SCTLR: u64 = 0x30d0_0800;
const SCTLR_M: u64 = 1;
const HCR_VM: u64 = 1;
const HCR_PTW: u64 = 1 << 2;
const HCR_RW: u64 = 1 << 31;
const HCR_FWB: u64 = 1 << 46;
const VTCR: u64 = 1 << 31;
const PAN: u64 = 1 << 8;
/// PAR_EL1.PTW.
const WALK: u64 = 1 << 8;
const MARKS: u64 = 1 << 10 | 1 << 7;

/// Words of a batch whose tables the mapper made, about: with granules of 64 KiB a tree has thousands.
const GROWN_WORDS: usize = 1_000_000;

/// Which stages translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stages {
    /// Stage 1.
    First,
    /// Stage 2; stage 1 is off.
    Second,
    /// Both.
    Both,
}

/// What the program is told once: MAIR_EL1.
pub fn run() -> [u64; 1] {
    [u64::from_le_bytes(MAIR)]
}

/// One address through tables of the formats `F` and `S`.
#[derive(Clone, Debug)]
pub struct ArmCase<F, S> {
    /// What translates.
    pub stages: Stages,
    /// Of stage 1.
    pub first: Registers,
    /// Of stage 2.
    pub second: SecondRegisters,
    /// The address.
    pub input: Input,
    /// What is asked for.
    pub access: (Access, Mode),
    memory: Ram,
    formats: PhantomData<(F, S)>,
}

struct Entries<T> {
    place: T,
    second: bool,
    memory: &'static [u8],
    dirty_management: bool,
}

impl<F: Format, T: FnMut(&mut Chance, u64) -> Output> Dress<F> for Entries<T> {
    fn table(&mut self, chance: &mut Chance, level: Level) -> Entry {
        let below = level.below().map_or(0, F::entries);
        let mut permissions = Permissions::all();
        if !self.second && chance.percent(30) {
            permissions.set(Permissions::WRITE, chance.percent(50));
            permissions.set(Permissions::USER, chance.percent(50));
            permissions.set(Permissions::EXECUTE_USER, chance.percent(50));
        }
        let table = Table::new((self.place)(chance, below * 8), permissions, Memory::Physical);
        Entry::Table(Table { software: chance.bits() & 0x7f << 52, ..table })
    }

    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry {
        let own = F::shift(size.level);
        let share = chance.of(&[Shareability::Non, Shareability::Outer, Shareability::Inner]);
        let memory = chance.of(self.memory);
        let mut permissions = Permissions::all();
        permissions.set(Permissions::WRITE, chance.percent(65));
        if self.second {
            permissions.set(Permissions::READ, chance.percent(85));
        } else {
            permissions.set(Permissions::USER, chance.percent(60));
        }
        if chance.percent(50) {
            permissions.remove(Permissions::EXECUTE);
        }
        Entry::Leaf(Leaf {
            accessed: chance.percent(80),
            dirty: self.dirty_management && chance.percent(50),
            global: !self.second && chance.percent(50),
            ..Leaf::new(
                Output(target.0 >> own << own),
                size.shift,
                permissions,
                if self.second { Memory::MemAttr(memory, share) } else { Memory::Mair(memory, share) },
            )
        })
    }
}

const INDICES: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// One bit of an entry turned over.
fn damaged(chance: &mut Chance, word: u64) -> u64 {
    let any = chance.below(64);
    word ^ 1 << chance.of(&[0, 1, 6, 7, 10, 36 + any % 12, 51, any, any])
}

/// An address with a bit that no tree translates. Bit 55 chooses the half, and would be another tree's. Without stage 1,
/// addresses are physical ones before stage 2 has them.
fn too_long<F: Format, S: Format>(chance: &mut Chance, stages: Stages, input: Input) -> Input {
    let (bits, end) = if stages == Stages::Second { (S::INPUT_BITS, 48_u32) } else { (F::INPUT_BITS, 55) };
    let free = u64::from(end.saturating_sub(bits));
    if free == 0 { input } else { Input(input.0 ^ 1 << (u64::from(bits) + chance.below(free))) }
}

/// Whether it may be a leaf whose MemAttr is reserved.
fn is_reserved<S: Format<Caps = Caps>>(word: u64, caps: &Caps, forced_write_back: Feature) -> bool {
    (1..=S::LEVELS).map(Level).any(|level| match S::decode(word, level, caps) {
        Entry::Leaf(Leaf { memory: Memory::MemAttr(number, _), .. }) => {
            Attributes::second(number, forced_write_back).is_none()
        }
        _ => false,
    })
}

/// A size that the format has, sometimes that of a group.
fn size<F: Format<Caps = Caps>>(chance: &mut Chance, caps: &Caps) -> Size {
    let largest = F::largest_leaf(caps);
    let level = Level(chance.of(&[1, 1, 2, 3]).min(largest.0));
    let size = Size::of::<F>(level);
    let joins = match (F::PAGE_SHIFT, level) {
        (12, _) => 4,
        (14, Level::PAGES) => 7,
        _ => 5,
    };
    let fits = F::entries(level) >> joins != 0;
    if fits && chance.percent(35) { Size { shift: size.shift + joins, ..size } } else { size }
}

const fn encoded_bits(bits: u32) -> u64 {
    match bits {
        32 => 0,
        36 => 1,
        40 => 2,
        42 => 3,
        44 => 4,
        _ => 5,
    }
}

/// TG0, TG1.
const fn granules(shift: u32) -> (u64, u64) {
    match shift {
        12 => (0, 2),
        14 => (2, 1),
        _ => (1, 3),
    }
}

fn on(chance: &mut Chance, percent: u64) -> Feature {
    if chance.percent(percent) { Feature::On } else { Feature::Off }
}

/// Hardware manages the access flag, and dirty state only if so.
fn managed(chance: &mut Chance, least_bits: u32) -> (Feature, Caps) {
    let access_flag = on(chance, 50);
    let dirty_management = if access_flag == Feature::On { on(chance, 50) } else { Feature::Off };
    let physical_bits = chance.of(&[36, 40, 42, 44, 48]).max(least_bits);
    (
        access_flag,
        Caps { physical_bits, dirty_management, separate_execute: Feature::On, direct_resize: Feature::Off },
    )
}

/// What entries can say, and who keeps what in them.
struct Setting {
    first: (Feature, Caps),
    second: (Feature, Caps),
    forced_write_back: Feature,
}

impl Setting {
    fn draw<S: Format>(chance: &mut Chance) -> Self {
        let (first, second) = (managed(chance, 0), managed(chance, S::INPUT_BITS));
        Self { first, second, forced_write_back: on(chance, 30) }
    }

    fn second_input<S: Format>(&self, chance: &mut Chance) -> u64 {
        let bits = S::INPUT_BITS.min(self.first.1.physical_bits);
        tree::input::<S>(chance).0 & ((1 << bits) - 1)
    }

    fn first_entries<T>(&self, place: T) -> Entries<T> {
        let dirty_management = self.first.1.dirty_management == Feature::On;
        Entries { place, second: false, memory: &INDICES, dirty_management }
    }

    fn second_entries<T>(&self, place: T) -> Entries<T> {
        let forced = self.forced_write_back == Feature::On;
        let dirty_management = self.second.1.dirty_management == Feature::On;
        let memory = if forced { &FORCED_MEMORY[..] } else { &MEMORY[..] };
        Entries { place, second: true, memory, dirty_management }
    }
}

/// Where a table is put.
fn place(frames: &Frames) -> impl FnMut(&mut Chance, u64) -> Output {
    |chance, bytes| frames.take(chance, bytes.max(4096))
}

impl<F: Format<Caps = Caps>, S: Format<Caps = Caps>> ArmCase<F, S> {
    /// A case that can be compared.
    pub fn draw(chance: &mut Chance, stages: Stages) -> Self {
        chance.until(|chance| Self::attempt(chance, stages))
    }

    fn attempt(chance: &mut Chance, stages: Stages) -> Option<Self> {
        let frames = Frames::new(TABLES);
        let ram = Ram::new(RAM);
        let setting = Setting::draw::<S>(chance);
        let second_root = place(&frames)(chance, S::entries(S::root()) * 8);

        let target = Output(ARENA.first + chance.below(ARENA.bytes));
        let final_size = size::<S>(chance, &setting.second.1);
        let middle = match stages {
            Stages::First => target.0,
            _ => final_size.join(setting.second_input::<S>(chance), target.0),
        };
        let mut moved = Moved::default();
        let (mut first_root, mut input, mut places) = (Output(0), Input(middle), Vec::new());
        let guest = Ram::new(RAM);
        if stages != Stages::Second {
            let place = |chance: &mut Chance, bytes: u64| {
                let host = place(&frames)(chance, bytes);
                if stages == Stages::First {
                    return host;
                }
                let size = size::<S>(chance, &setting.second.1);
                // A table can be larger than what leads to a part of it.
                let aligned = Size { shift: size.shift.max(bytes.ilog2()), ..size };
                let ipa = Output(aligned.join(setting.second_input::<S>(chance), host.0));
                moved.add((ipa, host), bytes, size);
                ipa
            };
            let mut entries = setting.first_entries(place);
            first_root = (entries.place)(chance, F::entries(F::root()) * 8);
            let size = size::<F>(chance, &setting.first.1);
            input = Input(size.join(tree::input::<F>(chance).0, middle));
            let ram = if stages == Stages::First { &ram } else { &guest };
            let tree = Tree::<F> { ram, root: first_root, caps: setting.first.1 };
            places = tree.lead(chance, &mut entries, (input, Output(middle), size))?.1;
        }
        let of_guest = places.len();
        if stages != Stages::First {
            let tree = Tree::<S> { ram: &ram, root: second_root, caps: setting.second.1 };
            let mut entries = setting.second_entries(place(&frames));
            let last = (Output(middle), target, final_size);
            places = moved.lead((&tree, chance), &mut entries, (&guest, &places), last)?;
        }
        if chance.percent(45) {
            let at = chance.of(&places);
            let word = damaged(chance, ram.get(at));
            ram.set(at, word);
            let of_second = places.iter().skip(of_guest).any(|place| *place == at);
            if of_second && is_reserved::<S>(word, &setting.second.1, setting.forced_write_back) {
                return None;
            }
        }
        if chance.percent(3) {
            input = too_long::<F, S>(chance, stages, input);
        }
        Some(Self::finish(chance, (stages, &setting), (first_root, second_root), input, ram))
            .filter(Self::is_comparable)
    }

    /// Cases, at most so many, whose tables the mapper made: those of the stage that translates alone.
    pub fn grow(chance: &mut Chance, stages: Stages, count: usize) -> Vec<Self> {
        let (mut cases, mut words) = (Vec::new(), 0);
        while cases.len() < count && words < GROWN_WORDS {
            let frames = Frames::new(TABLES);
            let ram = Ram::new(RAM);
            let setting = Setting::draw::<S>(chance);
            let first_root = place(&frames)(chance, F::entries(F::root()) * 8);
            let second_root = place(&frames)(chance, S::entries(S::root()) * 8);
            let target = Output(ARENA.first + chance.below(ARENA.bytes));
            let looks = if stages == Stages::Second {
                let size = size::<S>(chance, &setting.second.1);
                let input = Input(size.join(setting.second_input::<S>(chance), target.0));
                let tree = Tree::<S> { ram: &ram, root: second_root, caps: setting.second.1 };
                let mut entries = setting.second_entries(place(&frames));
                grow(chance, (&tree, &frames), &mut entries, (input, target, size))
            } else {
                let size = size::<F>(chance, &setting.first.1);
                let input = Input(size.join(tree::input::<F>(chance).0, target.0));
                let tree = Tree::<F> { ram: &ram, root: first_root, caps: setting.first.1 };
                let mut entries = setting.first_entries(place(&frames));
                grow(chance, (&tree, &frames), &mut entries, (input, target, size))
            };
            for look in looks.into_iter().flatten() {
                let roots = (first_root, second_root);
                let case = Self::finish(chance, (stages, &setting), roots, look, ram.clone());
                words += case.memory.len();
                cases.extend(Some(case).filter(Self::is_comparable));
            }
        }
        cases
    }

    /// Registers and an access for tables that are there.
    fn finish(
        chance: &mut Chance,
        (stages, setting): (Stages, &Setting),
        (first_root, second_root): (Output, Output),
        input: Input,
        ram: Ram,
    ) -> Self {
        let mut control = Control::empty();
        control.set(Control::PAN, stages == Stages::First && chance.percent(30));
        let user = !control.contains(Control::PAN) && chance.percent(50);
        let mode = if user { Mode::User } else { Mode::Privileged };
        Self {
            stages,
            first: Registers {
                root: first_root,
                control,
                access_flag: setting.first.0,
                hierarchy_off: on(chance, 50),
                caps: setting.first.1,
            },
            second: SecondRegisters {
                root: second_root,
                access_flag: setting.second.0,
                protected_walks: on(chance, 20),
                forced_write_back: setting.forced_write_back,
                caps: setting.second.1,
            },
            input,
            access: (chance.of(&[Access::Read, Access::Write]), mode),
            memory: ram,
            formats: PhantomData,
        }
    }

    /// Not one of those that the rules above leave out.
    fn is_comparable(&self) -> bool {
        !matches!(self.walk(&self.memory.clone()), Err(End { left_out: true, .. })) && self.hints_fit()
    }

    /// Every contiguous hint is on an entry that leads where its group does.
    fn hints_fit(&self) -> bool {
        let words = self.memory.words();
        words.iter().all(|(at, word)| {
            let hint = word & 1 << 52 != 0 && word & 1 != 0;
            !hint
                || self.fits::<F>(*at, *word, &self.first.caps)
                    && self.fits::<S>(*at, *word, &self.second.caps)
        })
    }

    fn fits<X: Format<Caps = Caps>>(&self, at: u64, word: u64, caps: &Caps) -> bool {
        (1..=X::LEVELS).map(Level).all(|level| match X::decode(word, level, caps) {
            Entry::Leaf(leaf) if leaf.shift > X::shift(level) => {
                let place = (at >> 3) & ((1 << (leaf.shift - X::shift(level))) - 1);
                leaf.output.0 - leaf.base().0 == place << X::shift(level)
            }
            _ => true,
        })
    }

    fn walk(&self, ram: &Ram) -> Result<Found, End> {
        let stage = Stage::<S, _>::new(ram, self.second, self.access.1);
        let attributes = |memory| match memory {
            Memory::Mair(index, share) => {
                Attributes::first(MAIR[usize::from(index)]).map(|attributes| (attributes, share))
            }
            Memory::MemAttr(number, share) => Attributes::second(number, self.second.forced_write_back)
                .map(|attributes| (attributes, share)),
            _ => None,
        };
        // What stage 1 says when it is off (D8.6: data accesses are to a device of the strictest kind).
        let off = (Attributes::Device(arm::Device::NGnRnE), Shareability::Non);
        let as_first = (Attributes::AsFirst, Shareability::Non);
        let found = |output, first: Option<(Attributes, Shareability)>, second: Option<_>| {
            let ((first, share), (second, share2)) = (first?, second?);
            let forced = self.second.forced_write_back;
            let attributes = first.combine(second, forced);
            let is_device = |one| matches!(one, Attributes::Device(_));
            let uncached = |one| matches!(one, Attributes::Normal { inner: Caching::NonCacheable, .. });
            let misjudged = match (is_device(first), is_device(second)) {
                (true, true) => forced == Feature::On,
                (true, false) => uncached(second),
                (false, true) => uncached(first),
                (false, false) => false,
            };
            Some(Found { output, attributes, misjudged, share: attributes.shareability(share, share2) })
        };
        let left_out = End { left_out: true, status: 0, second: false, walk: false };
        match self.stages {
            Stages::First => {
                let walked = arm::walk::<F, _>(ram, &self.first, self.input, self.access, Marks::Set);
                let walked = walked.map_err(|fault| End::first(&fault))?;
                found(walked.output, attributes(walked.leaf.memory), Some(as_first)).ok_or(left_out)
            }
            Stages::Second => {
                let walked = stage.translate(self.input, self.access.0, Purpose::Final);
                let walked = walked.map_err(|fault| End::second(&fault))?;
                found(walked.output, Some(off), attributes(walked.leaf.memory)).ok_or(left_out)
            }
            Stages::Both => {
                let guest = GuestMemory { second: stage, memory: ram };
                let walked = nested::walk(&guest, self.access.0, |guest| {
                    arm::walk::<F, _>(guest, &self.first, self.input, self.access, Marks::Set)
                });
                let walked = walked.map_err(|fault| match (arm::second_fault(&fault), fault) {
                    (Some(second), _) => End::second(&second),
                    (None, nested::Fault::First(first)) => End::first(&first),
                    (None, nested::Fault::Second(second)) => End::second(&second),
                })?;
                let (first, second) = (walked.first.leaf.memory, walked.second.leaf.memory);
                found(walked.second.output, attributes(first), attributes(second)).ok_or(left_out)
            }
        }
    }
}

/// Where an address goes, and what kind of memory is there.
#[derive(Clone, Copy, Debug)]
struct Found {
    output: Output,
    attributes: Attributes,
    /// By a rule above.
    misjudged: bool,
    share: Shareability,
}

/// A fault as PAR_EL1 has it.
#[derive(Clone, Copy, Debug)]
struct End {
    status: u8,
    second: bool,
    walk: bool,
    /// By a rule above.
    left_out: bool,
}

impl End {
    fn first<E>(fault: &Fault<E>) -> Self {
        let block = fault.malformed == Some(Malformed::LeafAtThisLevel) && fault.level > Level::PAGES;
        let left_out = block || matches!(fault.kind, Kind::External | Kind::UnsupportedUpdate);
        Self { status: fault.status(), second: false, walk: false, left_out }
    }

    fn second(fault: &SecondFault<Outside>) -> Self {
        Self { second: true, walk: fault.on_a_walk(), ..Self::first(&fault.fault) }
    }

    fn par(self) -> u64 {
        1 | u64::from(self.status) << 1 | if self.walk { WALK } else { 0 } | u64::from(self.second) << 9
    }
}

const fn without_level_on_a_walk(par: u64) -> u64 {
    if par & WALK != 0 { par & !6 } else { par }
}

const fn share_bits(share: Shareability) -> u64 {
    match share {
        Shareability::Non => 0,
        Shareability::Reserved => 1,
        Shareability::Outer => 2,
        Shareability::Inner => 3,
    }
}

/// A number for each type of memory.
const fn type_number(attributes: Attributes) -> u64 {
    const fn caching(caching: Caching) -> u64 {
        match caching {
            Caching::NonCacheable => 1,
            Caching::WriteThrough => 2,
            Caching::WriteBack => 3,
        }
    }
    match attributes {
        Attributes::Device(device) => device as u64,
        Attributes::Normal { inner, outer } => caching(outer) << 4 | caching(inner) << 8,
        Attributes::AsFirst => 0xfff,
    }
}

impl<F: Format<Caps = Caps>, S: Format<Caps = Caps>> Case for ArmCase<F, S> {
    const OUTPUTS: [Option<&'static str>; 7] = [
        Some("the fault in PAR_EL1"),
        Some("ESR_EL2"),
        Some("the address in PAR_EL1"),
        Some("the memory type"),
        Some("shareability"),
        None,
        None,
    ];

    fn head(&self) -> [u64; 8] {
        let if_on = |feature, bit: u64| if feature == Feature::On { bit } else { 0 };
        let (tg0, tg1) = granules(F::PAGE_SHIFT);
        let Registers { root, control, access_flag, hierarchy_off, caps } = self.first;
        let size = u64::from(64 - F::INPUT_BITS);
        let tcr = size
            | tg0 << 14
            | size << 16
            | tg1 << 30
            | encoded_bits(caps.physical_bits) << 32
            | if_on(access_flag, 1 << 39)
            | if_on(caps.dirty_management, 1 << 40)
            | if_on(hierarchy_off, 3 << 41);
        let second = &self.second;
        let start = u64::from(S::LEVELS) - if S::PAGE_SHIFT == 12 { 2 } else { 1 };
        let vtcr = VTCR
            | u64::from(64 - S::INPUT_BITS)
            | start << 6
            | granules(S::PAGE_SHIFT).0 << 14
            | encoded_bits(second.caps.physical_bits) << 16
            | if_on(second.access_flag, 1 << 21)
            | if_on(second.caps.dirty_management, 1 << 22);
        let hcr = HCR_RW
            | match self.stages {
                Stages::First => 0,
                _ => {
                    HCR_VM | if_on(second.protected_walks, HCR_PTW) | if_on(second.forced_write_back, HCR_FWB)
                }
            };
        let writes = u64::from(self.access.0 == Access::Write);
        let (users, both) = match self.access.1 {
            Mode::User => (2, 4),
            Mode::Privileged => (0, 4),
        };
        let operation = match self.stages {
            Stages::First if control.contains(Control::PAN) => (8 + writes) | PAN,
            Stages::First => users + writes,
            _ => both + users + writes,
        };
        let sctlr = if self.stages == Stages::Second { SCTLR } else { SCTLR | SCTLR_M };
        [operation, self.input.0, root.0, sctlr, tcr, second.root.0, vtcr, hcr]
    }

    fn memory(&self) -> &Ram {
        &self.memory
    }

    fn outputs(&self, [par, syndrome, ..]: [u64; 7]) -> [u64; 7] {
        if par & 1 != 0 {
            return [without_level_on_a_walk(par & 0x37f), syndrome, 0, 0, 0, 0, 0];
        }
        let attributes = Attributes::first(par.to_le_bytes()[7]).map_or(u64::MAX, type_number);
        [0, syndrome, par & 0x0000_ffff_ffff_f000, attributes, par >> 7 & 3, 0, 0]
    }

    fn expect(&self) -> Expected {
        let after = self.memory.clone();
        let (kind, outputs, may_be_set) = match self.walk(&after) {
            Ok(Found { output, attributes, misjudged, share }) => {
                let not = Caching::NonCacheable;
                let uncached = match attributes {
                    Attributes::Normal { inner, outer } => inner == not && outer == not,
                    _ => true,
                };
                let hidden = (self.stages == Stages::First && uncached) || share == Shareability::Reserved;
                let outputs = [
                    Some(0),
                    Some(0),
                    Some(output.0 & !0xfff),
                    Some(type_number(attributes)).filter(|_| !misjudged),
                    Some(share_bits(share)).filter(|_| !hidden),
                    None,
                    None,
                ];
                (format!("translated, {:?}", self.access.0), outputs, 0)
            }
            Err(end) => {
                let outputs =
                    [Some(without_level_on_a_walk(end.par())), Some(0), None, None, None, None, None];
                let kinds = ["address size", "translation", "access flag", "permission"];
                let kind = kinds.get(usize::from(end.status >> 2)).unwrap_or(&"other");
                let stage = if end.second { 2 } else { 1 };
                let walk = if end.walk { " on a walk" } else { "" };
                (format!("{kind} fault of stage {stage}{walk}, level {}", end.status & 3), outputs, MARKS)
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
                let stage = Stage::<S, _>::new(&memory, self.second, self.access.1);
                tree::nested_path::<F, S>(&memory, &stage, first, second, self.input)
            }
        }
    }
}
