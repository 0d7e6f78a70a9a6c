//! plimsoll's bare-metal host: a hypervisor for AMD SVM that owns a machine's memory from the firmware's map on.
//!
//! Enters: a memory map and settings, by PVH. Leaves: a report on the serial port. The memory manager in it is the one that runs on
//! Linux: `plimsoll-core` decides, `plimsoll-store` keeps pages, `plimsoll-mmu` writes the tables; here is what they have no
//! hands for. What must never happen: a frame of one guest reached by another, more memory used than firmware gave, a guest
//! that reads a byte it has not written.
//!
//! | file | what it is |
//! |---|---|
//! | `start`, `boot` | from the loader to Rust; what it left |
//! | `cpu`, `console` | exceptions, timer, features; the serial port |
//! | `memory`, `paging` | frames, and the hypervisor's own tables |
//! | `svm`, `nested` | a virtual processor, and the second stage of its memory |
//! | `shadow`, `decode` | a processor without that stage, and what is done for it |
//! | `direct` | one that walks the guest's own tables, which the guest does not write |
//! | `paged`, `slabs` | the core's decisions done with frames; the store's memory |
//! | `guest`, `host` | what a guest's program asks for; turns, budgets, reclaim |
//! | `calls` | memory that guests own, give, lend and share |
//! | `paged::guard` | what guests may do with their pages: write, execute, seal |
//! | `policy` | how much each guest is to have, as on Linux |
//! | `device`, `vtd`, `pci`, `acpi` | devices that guests own, and what these reach |
//! | `report` | what came of it |
//!
//! One processor. An interrupt does nothing but count; everything else happens between two runs of guests.
#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod boot;
mod calls;
mod console;
mod cpu;
mod decode;
mod device;
#[path = "../../src/digest.rs"]
mod digest;
mod direct;
mod guest;
mod host;
#[path = "../../../plimsoll-guest/image/src/mem.rs"]
mod mem;
mod memory;
mod nested;
mod paged;
mod paging;
mod pci;
mod policy;
mod provoke;
mod report;
mod shadow;
mod slabs;
mod start;
mod svm;
mod vtd;
#[path = "../../src/wire.rs"]
mod wire;

use alloc::rc::Rc;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use boot::{BootError, Left, Settings};
use console::{End, say};
use core::cell::RefCell;
use core::fmt;
use core::panic::PanicInfo;
use cpu::Features;
use device::Devices;
use digest::Digest;
use guest::{Guest, StartError};
use host::Host;
use memory::{Memory, MemoryError, address};
use paged::Pool;
use paging::{PagingError, Space};
use plimsoll_core::frames::buddy::FramesError;
use plimsoll_core::frames::extents::ExtentError;
use plimsoll_core::frames::firmware::Repairs;
use plimsoll_core::ledger::LedgerError;
use plimsoll_types::{ByteCount, PAGE_SIZE, PageCount};
use policy::{Decider, PolicyError};
use report::Seen;
use slabs::Slabs;
use svm::Svm;
use vtd::{Unit, UnitError};
use wire::{Device, GuestSettings, Paging};

/// The hypervisor's heap beside what each page of guests takes there.
const HEAP_LEAST: ByteCount = ByteCount::mib(2);
/// Of each page that guests own: its word (8), credit, heat and ghosts (1.7), its part of slots (3), and of the store's index (8 to 12).
const HEAP_PER_PAGE: u64 = 24;
/// The least in which a guest gets anywhere: its program, its stack, and a block or two to work in.
const GUEST_LEAST: ByteCount = ByteCount::mib(6);

/// Why nothing was started. The sentence is the last line on the console.
#[derive(Debug)]
enum Refusal {
    /// The loader.
    Boot(BootError),
    /// Memory.
    Memory(MemoryError),
    /// The hypervisor's own tables.
    Paging(PagingError),
    /// The processor.
    NoSvm,
    /// Firmware forbids it.
    SvmForbidden,
    /// More guests than the processor tells apart.
    AddressSpaces {
        /// Guests.
        guests: usize,
        /// Address spaces, the hypervisor's included.
        found: u32,
    },
    /// Devices are to be given to guests, and nothing says what contains them.
    NoRemapping,
    /// What contains them cannot be used.
    Remapping(UnitError),
    /// A guest.
    Guest {
        /// Its place among them.
        number: u32,
        /// Why.
        why: StartError,
    },
    /// What is decided by.
    Policy(PolicyError),
    /// A guest is not admitted.
    Ledger(LedgerError),
    /// At the end, extents and frames contradict each other.
    Audit(ExtentError),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot(error) => write!(f, "{error}"),
            Self::Memory(error) => write!(f, "{error}"),
            Self::Paging(error) => write!(f, "{error}"),
            Self::NoSvm => f.write_str(
                "this processor has no AMD SVM with nested paging; run it on one that has, or under qemu-system-x86_64 -accel tcg -cpu max,+svm",
            ),
            Self::SvmForbidden => f.write_str("firmware has switched AMD SVM off; switch it on in its set-up"),
            Self::AddressSpaces { guests, found } => write!(
                f,
                "{guests} guests need {} address spaces and this processor has {found}; use fewer guests",
                guests + 1
            ),
            Self::NoRemapping => f.write_str(
                "a guest is to own a device, and firmware names no remapping hardware (ACPI's DMAR table); use a machine that has some, or qemu-system-x86_64 -machine q35 -device intel-iommu,aw-bits=48",
            ),
            Self::Remapping(error) => write!(f, "{error}"),
            Self::Guest { number, why } => write!(f, "guest {number}: {why}"),
            Self::Policy(error) => write!(f, "{error}"),
            Self::Ledger(error) => write!(f, "{error}"),
            Self::Audit(error) => write!(f, "{error}"),
        }
    }
}

impl From<FramesError> for Refusal {
    fn from(error: FramesError) -> Self {
        Self::Memory(error.into())
    }
}

impl From<UnitError> for Refusal {
    fn from(error: UnitError) -> Self {
        Self::Remapping(error)
    }
}

impl From<BootError> for Refusal {
    fn from(error: BootError) -> Self {
        Self::Boot(error)
    }
}

impl From<MemoryError> for Refusal {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

impl From<PagingError> for Refusal {
    fn from(error: PagingError) -> Self {
        Self::Paging(error)
    }
}

/// Where the first instructions lead.
extern "C" fn main(start: u64) -> ! {
    let mut tables = cpu::Tables::new();
    // SAFETY: this function never returns, and moves the tables nowhere.
    unsafe { tables.load() };
    match run(start) {
        Ok(()) => console::end(End::Done),
        Err(refusal) => {
            say!("refused: {refusal}");
            console::end(End::Refused)
        }
    }
}

fn run(start: u64) -> Result<(), Refusal> {
    say!("plimsoll-metal: booted");
    let features = Features::read();
    let parts = start::parts();
    // SAFETY: what the loader passed, as it left it: only the image's own memory was written since. What it left is reserved by
    // firmware's map or by `Memory::of`.
    let left = unsafe { Left::read(start) }?;
    let settings = Settings::read(left.settings)?;
    if !features.nested {
        return Err(Refusal::NoSvm);
    }
    if settings.guests.len() >= address(u64::from(features.asids)) {
        return Err(Refusal::AddressSpaces { guests: settings.guests.len(), found: features.asids });
    }
    let pages = settings.guests.iter().map(pages_of).fold(0, u64::saturating_add);
    let shadows = settings.guests.iter().filter(|guest| guest.paging == Paging::SHADOW);
    let shadows = shadows.map(|guest| shadow::heap_bytes(PageCount(pages_of(guest))).0);
    let decisions = policy::heap_bytes(settings.policy).0;
    let heap = HEAP_LEAST.0.saturating_add(pages.saturating_mul(HEAP_PER_PAGE)).saturating_add(decisions);
    let heap = shadows.fold(heap, u64::saturating_add);
    let names_frames = settings.guests.iter().any(|guest| guest.paging == Paging::DIRECT);
    let kinds = |end| if names_frames { direct::heap_bytes(end).0 } else { 0 };
    let heap = |end| ByteCount(heap.saturating_add(kinds(end)));
    let least = settings.guests.iter().map(least_of).fold(0, u64::saturating_add);
    // SAFETY: once, here, with nothing allocated before; the claims are firmware's.
    let found = unsafe { Memory::of(left.claims(), &parts, left.settings, heap, ByteCount(least)) }?;
    let mut memory = found.memory;
    // The settings lie where the hypervisor's own tables do not reach.
    let guests: Vec<_> = settings.each().map(|(guest, code)| (*guest, code.to_vec())).collect();
    let (seconds, provoke) = (settings.seconds, settings.provoke);
    let policy = settings.policy.to_string();
    let devices = guests.iter().map(|(guest, _)| guest.device).filter(|device| *device != Device::NONE);
    let devices: Vec<_> = devices.collect();
    let unit = match devices.is_empty() {
        true => None,
        // SAFETY: what the loader passed; the first tables are in use, and nobody writes to firmware's tables, which are no memory.
        false => Some(unsafe { acpi::remapping_unit(left.acpi, &devices) }?.ok_or(Refusal::NoRemapping)?),
    };
    let space = Space::enter(&mut memory, &found.regions, &parts, &features)?;
    let (total, used) = (memory.total().bytes(), memory.used().bytes());
    say!("memory: {total} of which {used} in use");
    let Repairs { empty, wrapped, beyond, overlapping } = found.repairs;
    if found.repairs != Repairs::default() {
        say!(
            "firmware's map was repaired: {empty} claims to nothing, {wrapped} that wrap around, {beyond} beyond the last address, \
             {} claimed twice",
            overlapping.bytes()
        );
    }
    provoke::provoke(provoke, &parts);
    let svm = Svm::start(&mut memory, &features)?.ok_or(Refusal::SvmForbidden)?;
    let unit = unit.map(|unit| Unit::start(&mut memory, &space, unit, devices.into_iter())).transpose()?;
    cpu::start_timer();
    let tsc_hz = cpu::measure_tsc_hz();
    say!("processor: {} MHz, {} address spaces", tsc_hz / 1_000_000, features.asids);
    work(memory, space, (svm, unit), (&guests, policy), &features, (seconds, tsc_hz))
}

/// Pages that settings say a guest owns; whether they may is found out when it is made.
fn pages_of(guest: &GuestSettings) -> u64 {
    guest.params.regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.len / PAGE_SIZE as u64))
}

/// The least in which a guest gets anywhere: all of its memory, if none of it can be taken.
fn least_of(guest: &GuestSettings) -> u64 {
    match guest.paging {
        Paging::DIRECT => pages_of(guest).saturating_mul(PAGE_SIZE as u64),
        _ => GUEST_LEAST.0,
    }
}

/// Runs the guests, says what came of it, and gives everything back.
fn work(
    memory: Memory,
    space: Space,
    (svm, unit): (Svm, Option<Unit>),
    (guests, policy): (&[(GuestSettings, Vec<Digest>)], String),
    features: &Features,
    (seconds, tsc_hz): (u32, u64),
) -> Result<(), Refusal> {
    let memory = Rc::new(RefCell::new(memory));
    let mut host =
        Host::new(Pool::new(Rc::clone(&memory), Slabs::new(Rc::clone(&memory), space)), svm, tsc_hz);
    // What waits to be tables is the same before and after.
    memory.borrow_mut().stock_tables()?;
    let before = memory.borrow().used();
    host.devices = unit.map(Devices::new);
    host.decider = Decider::of(&policy, tsc_hz).map_err(Refusal::Policy)?;
    drop(policy);
    for ((settings, code), number) in guests.iter().zip(1..) {
        let refused = |why| Refusal::Guest { number, why };
        let guest =
            Guest::new(&mut host.pool, number, (settings, code), features, tsc_hz).map_err(refused)?;
        host.give_device(settings.device, guest.id).map_err(refused)?;
        host.admit(guest).map_err(Refusal::Ledger)?;
    }
    let mut seen = Seen::default();
    host.run(seconds, |host| seen = Seen::look(host, tsc_hz));
    seen.say(&host);
    let Host { mut pool, guests, .. } = host;
    for guest in guests {
        let name = guest.name.clone();
        let ended = guest.paged.audit().and_then(|()| guest.end(&mut pool));
        if let Err(error) = ended {
            say!("failure: {name} did not give everything back: {error}");
        }
    }
    drop(pool.store.dismantle());
    let memory = memory.borrow();
    memory.audit().map_err(Refusal::Audit)?;
    let left = memory.used().saturating_sub(before);
    say!("returned: all but {} that {} of tables wait in", left.bytes(), memory.pooled().bytes());
    Ok(())
}

/// What precompiled `alloc` would unwind by. A panic ends the machine first.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    console::end(End::Crashed)
}

/// A bug: said, and the end.
#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("panic: {info}");
    console::end(End::Crashed)
}
