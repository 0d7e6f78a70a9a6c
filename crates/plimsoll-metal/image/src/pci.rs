//! A device on the PCI buses, by the ports of configuration mechanism 1.
//!
//! Enters: where it is. Leaves: its registers' place, and whether it may access memory. What must never happen: a device that may access
//! memory (bus mastering) before remapping hardware says which; an interrupt of one, which nobody here takes.
use crate::wire::Device;
use plimsoll_types::{ByteCount, Hpa, PAGE_SIZE};
use x86_64::instructions::port::Port;

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;
const ENABLE: u32 = 1 << 31;

/// Offsets.
const IDENTITY: u8 = 0;
const COMMAND: u8 = 4;
const HEADER: u8 = 12;
const BASE: u8 = 16;

/// Bits of the command register.
const MEMORY: u32 = 1 << 1;
const MASTER: u32 = 1 << 2;
const NO_INTERRUPTS: u32 = 1 << 10;

/// A device that is there.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Where it is.
    pub at: Device,
    /// Its first registers in memory.
    pub registers: Hpa,
    /// How many bytes of them.
    pub bytes: ByteCount,
}

fn select(at: Device, offset: u8) -> Port<u32> {
    let address = ENABLE | u32::from(at.requester()) << 8 | u32::from(offset);
    // SAFETY: these two ports choose and show a word of a device's configuration; nobody else uses them.
    unsafe { Port::new(ADDRESS).write(address) };
    Port::new(DATA)
}

fn read(at: Device, offset: u8) -> u32 {
    // SAFETY: reading configuration space changes nothing.
    unsafe { select(at, offset).read() }
}

fn write(at: Device, offset: u8, word: u32) {
    // SAFETY: callers write the command register, or a base address while the device answers to none.
    unsafe { select(at, offset).write(word) };
}

impl Function {
    /// The device there, which may access no memory from now on; `None` if there is none with registers in memory.
    pub fn find(at: Device) -> Option<Self> {
        // A bridge has another header, and the host's has number 0.
        if at.requester() == 0 || u64::from(at.requester()) != at.0 {
            return None;
        }
        if read(at, IDENTITY) & 0xffff == 0xffff || read(at, HEADER) >> 16 & 0x7f != 0 {
            return None;
        }
        write(at, COMMAND, NO_INTERRUPTS);
        let base = read(at, BASE);
        let is_wide = base >> 1 & 3 == 2;
        write(at, BASE, u32::MAX);
        let mask = read(at, BASE) & !0xf;
        write(at, BASE, base);
        let high = if is_wide { u64::from(read(at, BASE + 4)) } else { 0 };
        let registers = Hpa(high << 32 | u64::from(base & !0xf));
        let bytes = ByteCount(u64::from(mask.wrapping_neg()));
        let has_pages = bytes.0 >= PAGE_SIZE as u64 && registers.0 > 0 && registers.0.is_multiple_of(bytes.0);
        (base & 1 == 0 && mask != 0 && has_pages).then_some(Self { at, registers, bytes })
    }

    /// Lets it access memory.
    pub fn start(&self) {
        write(self.at, COMMAND, MEMORY | MASTER | NO_INTERRUPTS);
    }

    /// It accesses no memory any more, and answers to nobody.
    pub fn stop(&self) {
        write(self.at, COMMAND, NO_INTERRUPTS);
    }
}
