//! The first instruction of a program in a guest, and the text of its last words.
//!
//! Enters: the vCPU's index, as its first argument. Leaves: [`crate::guest_main`]; and a message that fits the channel page.
//! What must never happen: a compiled function called on a stack that is not aligned as the ABI has it.
use core::arch::global_asm;
use core::fmt;
use plimsoll_guest::abi::MESSAGE_SIZE;

// rdi holds the vCPU's index and stays where it is: the first argument. A call leaves rsp 8 below a multiple
// of 16, as the System V ABI has it at a function's first instruction. rbp 0 ends the chain of frames for a
// debugger.
global_asm!(
    ".section .text.start, \"ax\", @progbits",
    ".globl _start",
    "_start:",
    "cld",
    "xor ebp, ebp",
    "and rsp, -16",
    "call {main}",
    "ud2",
    ".text",
    main = sym crate::guest_main,
);

/// Text for the channel page; what does not fit is cut off at a character's end.
pub struct Message {
    /// The text, and zeros behind it.
    pub bytes: [u8; MESSAGE_SIZE],
    /// Bytes of text.
    pub len: usize,
}

impl Message {
    /// No text yet.
    pub const EMPTY: Self = Self { bytes: [0; MESSAGE_SIZE], len: 0 };
}

impl fmt::Write for Message {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = self.bytes.get_mut(self.len..).unwrap_or_default();
        let fits = text.floor_char_boundary(room.len());
        for (place, byte) in room.iter_mut().zip(text.bytes().take(fits)) {
            *place = byte;
        }
        self.len += fits;
        if fits == text.len() { Ok(()) } else { Err(fmt::Error) }
    }
}
