//! The serial port, and how the hypervisor ends.
//!
//! Enters: text. Leaves: bytes on COM1, and an exit status for whoever started QEMU. What must never happen: a line of a report
//! that another one is written into; there is one processor, and interrupts write nothing.
use core::fmt::{self, Write};
use x86_64::instructions::port::Port;

const COM1: u16 = 0x3f8;
/// Where QEMU's `isa-debug-exit` listens: the process ends with twice the number and one.
const EXIT: u16 = 0xf4;

/// How it ended. `(2 * number) | 1` is QEMU's exit status.
#[derive(Clone, Copy, Debug)]
#[repr(u32)]
pub enum End {
    /// All that was asked was done.
    Done = 0x10,
    /// It cannot be done here; the last line says why.
    Refused = 0x11,
    /// A bug, or hardware that contradicts itself.
    Crashed = 0x12,
}

/// The serial port. Set up by whoever started the machine; a write waits until there is room.
pub struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let (mut data, mut status) = (Port::<u8>::new(COM1), Port::<u8>::new(COM1 + 5));
        for byte in text.bytes() {
            // SAFETY: COM1's data and line status registers touch nothing but the serial line, and the hypervisor's ring 0 may
            // access every port.
            unsafe {
                while status.read() & 0x20 == 0 {}
                data.write(byte);
            }
        }
        Ok(())
    }
}

/// Writes a line to the console.
macro_rules! say {
    ($($part:tt)*) => {{
        use core::fmt::Write as _;
        // The serial port takes everything.
        let _ = writeln!($crate::console::Console, $($part)*);
    }};
}
pub(crate) use say;

/// Ends the machine.
pub fn end(how: End) -> ! {
    // SAFETY: under QEMU the port ends the process. Elsewhere nothing listens there.
    unsafe { Port::<u32>::new(EXIT).write(how as u32) };
    loop {
        x86_64::instructions::interrupts::disable();
        x86_64::instructions::hlt();
    }
}
