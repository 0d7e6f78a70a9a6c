//! The kernel's userfaultfd structures and numbers, as `linux/userfaultfd.h` of Linux 6.18 has them (headers of a
//! distribution are often older and lack MOVE and POISON). Layouts and request numbers are asserted at compile time
//! against the numbers themselves, so that a wrong field is a build error, not a call to something else.

use rustix::ioctl::{Opcode, opcode};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The API version and also the ioctl type byte of userfaultfd.
pub(super) const UFFD_API: u64 = 0xaa;
const TYPE: u8 = 0xaa;

/// Asks for faults of user mode only (flag of userfaultfd(2) and of USERFAULTFD_IOC_NEW).
pub(super) const UFFD_USER_MODE_ONLY: u32 = 1;
/// On /dev/userfaultfd: a new descriptor; its argument is the flags, by value.
pub(super) const USERFAULTFD_IOC_NEW: Opcode = opcode::none(TYPE, 0);

/// A structure that is the argument of exactly one userfaultfd ioctl.
///
/// # Safety
///
/// `OPCODE` is the request for which the kernel reads and writes `size_of::<Self>()` bytes at its argument, and any
/// bytes it writes there are a valid `Self` (hence `FromBytes`).
#[expect(unsafe_code, reason = "the trait's promise is what makes the generic ioctl call correct")]
pub(super) unsafe trait Request: FromBytes + IntoBytes {
    const OPCODE: Opcode;
}

macro_rules! request {
    (
        $(#[$doc:meta])* $name:ident = $direction:ident $number:literal, $opcode:literal {
            $($field:ident: $type:ty),+ $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(super) struct $name { $(pub(super) $field: $type),+ }

        // SAFETY: the fields are those of the header's structure in its order, and the assertion below ties the
        // request number, which encodes the structure's size, to the one the kernel compares with.
        #[expect(unsafe_code, reason = "see the trait")]
        unsafe impl Request for $name {
            const OPCODE: Opcode = opcode::$direction::<Self>(TYPE, $number);
        }

        const _: () = assert!(<$name as Request>::OPCODE == $opcode);
    };
}

request!(Api = read_write 0x3f, 0xc018_aa3f { api: u64, features: u64, ioctls: u64 });
request!(Register = read_write 0x00, 0xc020_aa00 { start: u64, len: u64, mode: u64, ioctls: u64 });
request!(Unregister = read 0x01, 0x8010_aa01 { start: u64, len: u64 });
request!(WakeUp = read 0x02, 0x8010_aa02 { start: u64, len: u64 });
request!(Copy = read_write 0x03, 0xc028_aa03 { dst: u64, src: u64, len: u64, mode: u64, copied: i64 });
request!(ZeroPage = read_write 0x04, 0xc020_aa04 { start: u64, len: u64, mode: u64, zeroed: i64 });
request!(Move = read_write 0x05, 0xc028_aa05 { dst: u64, src: u64, len: u64, mode: u64, moved: i64 });
request!(WriteProtect = read_write 0x06, 0xc018_aa06 { start: u64, len: u64, mode: u64 });
request!(Continue = read_write 0x07, 0xc020_aa07 { start: u64, len: u64, mode: u64, mapped: i64 });
request!(Poison = read_write 0x08, 0xc020_aa08 { start: u64, len: u64, mode: u64, updated: i64 });

const _: () = assert!(USERFAULTFD_IOC_NEW == 0xaa00);

/// COPY, ZEROPAGE, MOVE, CONTINUE and POISON all use bit 0 for "do not wake".
pub(super) const MODE_DONTWAKE: u64 = 1;
/// WRITEPROTECT has it at bit 1, since bit 0 says "protect".
pub(super) const WRITEPROTECT_MODE_DONTWAKE: u64 = 2;
/// WRITEPROTECT: protect rather than release.
pub(super) const WRITEPROTECT_MODE_WP: u64 = 1;
/// MOVE: a hole in the source leaves a hole in the destination instead of ending the call.
pub(super) const MOVE_MODE_ALLOW_SRC_HOLES: u64 = 2;

/// One event as read from the descriptor:
///
/// ```text
/// byte  0      1..8       8..16     16..24    24..32
///       event  reserved   arg[0]    arg[1]    arg[2]
/// PAGEFAULT               flags     address   thread id (low 4 bytes)
/// FORK                    descriptor (low 4 bytes)
/// REMAP                   from      to        len
/// REMOVE, UNMAP           start     end
/// ```
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Message {
    pub(super) event: u8,
    pub(super) reserved: [u8; 7],
    pub(super) arg: [u64; 3],
}

const _: () = assert!(size_of::<Message>() == 32);

pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const EVENT_FORK: u8 = 0x13;
pub(super) const EVENT_REMAP: u8 = 0x14;
pub(super) const EVENT_REMOVE: u8 = 0x15;
pub(super) const EVENT_UNMAP: u8 = 0x16;

pub(super) const PAGEFAULT_FLAG_WRITE: u64 = 1;
pub(super) const PAGEFAULT_FLAG_WP: u64 = 2;
pub(super) const PAGEFAULT_FLAG_MINOR: u64 = 4;
