//! AMD's nested paging: what a guest in ring 0 and ring 3 sees, and what its host is told.
//!
//! Enters: a seed. Leaves: cases: one access of a guest's, through its own tables of four or five levels, in memory that goes through
//! nested tables, as the guest's registers and the host's EFER.NXE happen to be. Compared are the exit's code, EXITINFO1 and EXITINFO2
//! (of a #NPF: error code, whether it was at a guest's table or at the final address, and the guest physical address), what was read
//! or executed, what was written and where, where the guest was, and A and D of every entry of both stages.
//!
//! Every exception of the guest's is an exit, so that it needs no memory but for what it executes. For a read or a write that is an
//! access of its own, judged first: what becomes of it is compared like the other's.
//!
//! # Rules for what is not compared
//!
//! * Those of [`crate::x86`] for accessed bits after a fault, in both stages, and for P beside RSVD, also of a #NPF. Nothing implicit is
//!   accessed.
//! * EXITINFO2 counts for page faults, the guest's and nested ones: of other exceptions it is undefined (APM vol. 2, 15.12). QEMU leaves the
//!   address of a #GP there.
//! * What a guest executes ends with an undefined instruction. QEMU takes INT3 for an INTn, which another intercept is for.
//! * Nested tables have four levels: they have as many as the host's own. Bit 8 of nested entries of level 4 is ignored, as in [`crate::x86`].
use crate::Chance;
use crate::grown::grow;
use crate::hardware::{Hardware, Source};
use crate::memory::{Outside, Ram};
use crate::tree::{self, Dress, Frames, Moved, Size, Tree};
use crate::verdict::{Case, Expected};
use crate::x86::{self as plain, ARENA, Entries, PAGE_FAULT, PROGRAM, RAM, STORED, Switches, TABLES};
use plimsoll_mmu::format::x86::{Caps, Npt, X86Format};
use plimsoll_mmu::nested::{self, GuestMemory, GuestMemoryFault, NestedPageFault, NptStage, Purpose};
use plimsoll_mmu::x86::{self, Control, Fault, Mode, Registers};
use plimsoll_mmu::{Access, Entry, Feature, Input, Leaf, Level, Marks, Output, Permissions, Table};
use std::marker::PhantomData;

/// The PC of [`crate::x86`], whose processor can have guests.
pub const HARDWARE: Hardware = Hardware {
    program: Source {
        text: concat!(include_str!("../programs/x86-case.s"), include_str!("../programs/npt.s")),
        at: PROGRAM,
    },
    ..plain::HARDWARE
};
/// Options of QEMU for it.
pub const OPTIONS: [&str; 2] = ["-cpu", "max,+svm"];

/// What a guest executes, at this place in memory, host's and guest's; and where its tables have it, for ring 0 and ring 3.
const CODE: u64 = PROGRAM + 0x2000;
const CODE_AT: [u64; 2] = [0, 0x1000];
/// Where the program's writes begin in that page.
const WRITE_AT: u64 = 0x10;
/// Below this, a guest's memory is where the host's is.
const SAME_BELOW: u64 = 1 << 30;
/// Guest physical addresses have as many bits as an entry of the guest's can name.
const GUEST_PHYSICAL_BITS: u32 = 40;

/// What nested entries permit at least.
const EVERYBODY: Permissions = Permissions::USER.union(Permissions::READ);
const TABLE: u64 = 7;
const USER: u64 = 4;
/// EFER.SVME, which a guest must have too.
const SECURE: u64 = 1 << 12;
/// How long the instructions are that access memory, and the one that is fetched.
const ACCESS_BYTES: u64 = 3;
const FETCHED_BYTES: u64 = 5;

const EXIT_EXCEPTION: u64 = 0x40;
const UNDEFINED: u64 = EXIT_EXCEPTION + 6;
const EXIT_NESTED: u64 = 0x400;

/// One access of a guest whose tables are of the format `F`.
#[derive(Clone, Debug)]
pub struct NptCase<F> {
    /// The guest's state.
    pub guest: Registers,
    /// nCR3 and the host's EFER.NXE.
    pub host: Registers,
    /// The guest's address.
    pub input: Input,
    /// What is done there, and by whom.
    pub access: (Access, Mode),
    memory: Ram,
    format: PhantomData<F>,
}

/// A fault of the host's stage, and one of the guest's.
type Host = NestedPageFault<Outside>;
type Guest = Fault<GuestMemoryFault<Host, Outside>>;

/// Why an access was not made.
#[derive(Clone, Copy, Debug)]
enum Exit {
    Guest(Guest),
    Nested(Host),
}

impl From<nested::Fault<Guest, Host>> for Exit {
    fn from(fault: nested::Fault<Guest, Host>) -> Self {
        match fault {
            nested::Fault::First(Fault::Memory { error: GuestMemoryFault::Second(fault), .. })
            | nested::Fault::Second(fault) => Self::Nested(fault),
            nested::Fault::First(fault) => Self::Guest(fault),
        }
    }
}

/// Nested entries at random, few of which keep a guest's tables from it: each access takes a dozen of them.
struct Nested<T>(Entries<T>);

impl<T: FnMut(&mut Chance) -> Output> Dress<Npt> for Nested<T> {
    fn table(&mut self, chance: &mut Chance, level: Level) -> Entry {
        match Dress::<Npt>::table(&mut self.0, chance, level) {
            Entry::Table(table) if chance.percent(90) => {
                Entry::Table(Table { permissions: Permissions::all(), ..table })
            }
            entry => entry,
        }
    }

    fn leaf(&mut self, chance: &mut Chance, target: Output, size: Size) -> Entry {
        match Dress::<Npt>::leaf(&mut self.0, chance, target, size) {
            Entry::Leaf(leaf) if TABLES.has(target.0) && chance.percent(90) => {
                Entry::Leaf(Leaf { permissions: Permissions::all(), ..leaf })
            }
            entry => entry,
        }
    }
}

/// A guest physical address that is not the host's own.
fn middle(chance: &mut Chance) -> u64 {
    loop {
        let input = tree::input::<Npt>(chance).0 & ((1 << GUEST_PHYSICAL_BITS) - 1);
        if input >= SAME_BELOW {
            return input;
        }
    }
}

/// An address of the guest's that is to go to `last`, and by what size of leaf; `None` if what it executes is in its place.
fn first_way<F: X86Format>(chance: &mut Chance, caps: &Caps, last: Output) -> Option<(Input, Size)> {
    let size = Size::draw::<F>(chance, caps);
    let input = Input(size.join(tree::input::<F>(chance).0, last.0));
    (F::index(input, F::root()) != 0).then_some((input, size))
}

impl<F: X86Format> NptCase<F> {
    /// A case whose walks stay in RAM.
    pub fn draw(chance: &mut Chance, caps: Caps) -> Self {
        chance.until(|chance| Self::attempt(chance, caps))
    }

    fn attempt(chance: &mut Chance, caps: Caps) -> Option<Self> {
        let frames = Frames::new(TABLES);
        let ram = Ram::new(RAM);
        let host_root = same_below(chance, &ram, &frames);

        let target = ARENA.word(chance);
        let final_size = Size::draw::<Npt>(chance, &caps);
        let last = Output(final_size.join(middle(chance), target.0));

        // The guest's tables: those of its code where the host has them, the others anywhere.
        let guest = Ram::new(RAM);
        let mut moved = Moved::default();
        let code = code_tables::<F>(chance, &ram, &frames);
        let place = |chance: &mut Chance| {
            let host = frames.take(chance, 4096);
            let size = Size::draw::<Npt>(chance, &caps);
            let at = Output(size.join(middle(chance), host.0));
            moved.add((at, host), 4096, size);
            at
        };
        let mut entries = Entries { place, least: Permissions::READ };
        let guest_root = (entries.place)(chance);
        guest.set(guest_root, code.0 | TABLE);
        let (input, first_size) = first_way::<F>(chance, &caps, last)?;
        let tree = Tree::<F> { ram: &guest, root: guest_root, caps };
        let (_, places) = tree.lead(chance, &mut entries, (input, last, first_size))?;

        let tree = Tree::<Npt> { ram: &ram, root: host_root, caps };
        let mut entries = Nested(Entries { place: frames.pages(), least: EVERYBODY });
        let last = (last, target, final_size);
        let places = moved.lead((&tree, chance), &mut entries, (&guest, &places), last)?;
        if chance.percent(45) {
            let at = chance.of(&places);
            ram.set(at, plain::damaged(chance, ram.get(at)));
        }
        Self::finish(chance, caps, (guest_root, host_root), input, ram)
    }

    /// Cases, at least so many, whose tables the mapper made, the guest's and those below.
    pub fn grow(chance: &mut Chance, caps: Caps, count: usize) -> Vec<Self> {
        let mut cases = Vec::new();
        while cases.len() < count {
            cases.extend(Self::grown(chance, caps).into_iter().flatten());
        }
        cases
    }

    fn grown(chance: &mut Chance, caps: Caps) -> Option<Vec<Self>> {
        let frames = Frames::new(TABLES);
        let ram = Ram::new(RAM);
        let host_root = same_below(chance, &ram, &frames);
        let target = ARENA.word(chance);
        let final_size = Size::draw::<Npt>(chance, &caps);
        let last = Output(final_size.join(middle(chance), target.0));

        // Where the guest's tables are, the host's addresses are the guest's.
        let mut entries = Entries { place: frames.pages(), least: Permissions::READ };
        let guest_root = (entries.place)(chance);
        ram.set(guest_root, code_tables::<F>(chance, &ram, &frames).0 | TABLE);
        let (input, first_size) = first_way::<F>(chance, &caps, last)?;
        let tree = Tree::<F> { ram: &ram, root: guest_root, caps };
        let looks = grow(chance, (&tree, &frames), &mut entries, (input, last, first_size))?;

        let mut entries = Nested(Entries { place: frames.pages(), least: EVERYBODY });
        let tree = Tree::<Npt> { ram: &ram, root: host_root, caps };
        grow(chance, (&tree, &frames), &mut entries, (last.as_input(), target, final_size))?;
        let mut finish = |look| Self::finish(chance, caps, (guest_root, host_root), look, ram.clone());
        Some(looks.into_iter().filter_map(&mut finish).collect())
    }

    /// Registers and an access for tables that are there, if the walks stay in RAM.
    fn finish(
        chance: &mut Chance,
        caps: Caps,
        (guest_root, host_root): (Output, Output),
        input: Input,
        ram: Ram,
    ) -> Option<Self> {
        let not_canonical = chance.percent(3);
        let wrong = u64::from(not_canonical) << (u64::from(F::INPUT_BITS) + chance.below(7));
        let guest = plain::registers(chance, guest_root, caps);
        let no_execute = if chance.percent(85) { Feature::On } else { Feature::Off };
        let case = Self {
            guest,
            host: Registers {
                cr3: host_root.0,
                control: Control::empty(),
                pkru: 0,
                caps: Caps { keys: Feature::Off, no_execute, ..caps },
            },
            input: Input(input.0 ^ wrong),
            access: (
                chance.of(&[Access::Read, Access::Write, Access::Fetch]),
                chance.of(&[Mode::User, Mode::Supervisor]),
            ),
            memory: ram,
            format: PhantomData,
        };
        match case.walk(&case.memory.clone()) {
            Ok(output) if ARENA.has(output.0) => case.memory.set(output, target_word(output)),
            Ok(output) if case.access.0 == Access::Read && TABLES.has(output.0) => {}
            Ok(_) => return None,
            Err(Exit::Nested(NestedPageFault { fault: Fault::Page(_), .. })) => {}
            Err(Exit::Guest(Fault::Page(_) | Fault::NotCanonical(_))) => {}
            Err(_) => return None,
        }
        Some(case)
    }

    /// Where the guest is: at what it executes, or at what is to be fetched.
    fn begin(&self) -> Input {
        let at = CODE_AT[usize::from(self.access.1 == Mode::User)];
        match self.access.0 {
            Access::Read => Input(at),
            Access::Write => Input(at + WRITE_AT),
            Access::Fetch => self.input,
        }
    }

    /// Where the address leads, once the guest has read what it executes.
    fn walk(&self, ram: &Ram) -> Result<Output, Exit> {
        let (access, mode) = self.access;
        let guest = GuestMemory { second: NptStage { memory: ram, registers: self.host }, memory: ram };
        let go = |input, access| {
            let walked = nested::walk(&guest, access, |guest| {
                x86::walk::<F, _>(guest, &self.guest, input, (access, mode), Marks::Set)
            });
            walked.map(|walked| walked.second.output).map_err(Exit::from)
        };
        if access != Access::Fetch {
            go(self.begin(), Access::Fetch)?;
        }
        go(self.input, access)
    }
}

/// Nested tables that lead the first GiB to itself.
fn same_below(chance: &mut Chance, ram: &Ram, frames: &Frames) -> Output {
    let [root, below] = [(); 2].map(|()| frames.take(chance, 4096));
    ram.set(root, below.0 | TABLE);
    ram.set(below, plain::LARGE | TABLE);
    root
}

/// A guest's tables below its root that lead to what it executes.
fn code_tables<F: X86Format>(chance: &mut Chance, ram: &Ram, frames: &Frames) -> Output {
    let mut place = frames.pages();
    let first = place(chance);
    let mut table = first;
    for _ in 2..F::LEVELS {
        let below = place(chance);
        ram.set(table, below.0 | TABLE);
        table = below;
    }
    for (at, user) in CODE_AT.into_iter().zip([0, USER]) {
        ram.set(Output(table.0 + (at >> 12) * 8), CODE | TABLE & !USER | user);
    }
    first
}

/// What is in memory where an address leads: `mov $N, %eax; ud2`, with an N that says where.
fn target_word(at: Output) -> u64 {
    0xb8 | (at.0 >> 3 & 0xffff_ffff) << 8 | 0x0090_0b0f << 40
}

impl<F: X86Format> Case for NptCase<F> {
    const OUTPUTS: [Option<&'static str>; 7] =
        [Some("exit code"), Some("EXITINFO1"), Some("EXITINFO2"), Some("RAX"), Some("RIP"), None, None];

    fn head(&self) -> [u64; 8] {
        let Switches { cr0, cr4, efer, flags } = Switches::of::<F>(&self.guest);
        let host = Switches::of::<Npt>(&self.host);
        let ring = if self.access.1 == Mode::User { 3 } else { 0 };
        [
            self.begin().0,
            self.input.0,
            self.guest.cr3,
            self.host.cr3,
            cr0 | ring << 32,
            cr4,
            efer | SECURE | (host.efer | SECURE) << 32,
            flags | u64::from(self.guest.pkru) << 32,
        ]
    }

    fn memory(&self) -> &Ram {
        &self.memory
    }

    fn outputs(&self, mut written: [u64; 7]) -> [u64; 7] {
        if [EXIT_NESTED, EXIT_EXCEPTION + PAGE_FAULT].contains(&written[0]) {
            written[1] = plain::with_present(written[1]);
        }
        written
    }

    fn expect(&self) -> Expected {
        let after = self.memory.clone();
        let begin = Some(self.begin().0);
        let (kind, outputs, may_be_set) = match self.walk(&after) {
            Ok(output) => {
                let (value, next) = match self.access.0 {
                    Access::Read => (Some(after.get(output)), self.begin().0 + ACCESS_BYTES),
                    Access::Write => {
                        after.set(output, STORED);
                        (None, self.begin().0 + ACCESS_BYTES)
                    }
                    Access::Fetch => {
                        (Some(output.0 >> 3 & 0xffff_ffff), self.input.0.wrapping_add(FETCHED_BYTES))
                    }
                };
                let outputs = [Some(UNDEFINED), Some(0), None, value, Some(next), None, None];
                (format!("translated, {:?}", self.access.0), outputs, 0)
            }
            Err(Exit::Guest(Fault::Page(fault))) => {
                let code = u64::from(fault.code.bits());
                let exit = EXIT_EXCEPTION + PAGE_FAULT;
                let outputs = [Some(exit), Some(code), Some(fault.input.0), None, begin, None, None];
                (format!("page fault, {:?}", fault.code), outputs, plain::ACCESSED)
            }
            Err(Exit::Guest(Fault::NotCanonical(_))) => {
                let exit = EXIT_EXCEPTION + plain::GENERAL_PROTECTION;
                // What the guest's code took is marked by now.
                ("not canonical".to_owned(), [Some(exit), Some(0), None, None, begin, None, None], 0)
            }
            Err(Exit::Nested(fault @ NestedPageFault { purpose, fault: Fault::Page(page) })) => {
                let place = match purpose {
                    Purpose::GuestTable => "a guest's table",
                    Purpose::Final => "the final address",
                };
                let outputs =
                    [Some(EXIT_NESTED), fault.exit_info(), Some(page.input.0), None, begin, None, None];
                (format!("nested page fault at {place}, {:?}", page.code), outputs, plain::ACCESSED)
            }
            Err(other) => (format!("outside of RAM: {other:?}"), [None; 7], plain::ACCESSED),
        };
        Expected { kind, outputs, after: after.words(), may_be_set }
    }

    fn path(&self) -> String {
        let nested = (Output(self.host.cr3), &self.host.caps);
        let memory = self.memory.clone();
        let stage = NptStage { memory: &memory, registers: self.host };
        let guest = (Output(self.guest.cr3), &self.guest.caps);
        tree::nested_path::<F, Npt>(&memory, &stage, guest, nested, self.input)
    }
}
