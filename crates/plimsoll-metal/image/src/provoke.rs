//! What the hypervisor is asked to do to itself, so that a test sees it stopped.
//!
//! Enters: a provocation. Leaves: nothing, if there is none to be made; else the processor is to end in an exception's screen.
use crate::memory::address;
use crate::start::Parts;
use crate::wire::Provoke;
use core::ptr::{read_volatile, with_exposed_provenance, with_exposed_provenance_mut, write_volatile};

/// `ret`.
static DATA: [u8; 16] = [0xc3; 16];

/// Does it.
pub fn provoke(what: Provoke, parts: &Parts) {
    // SAFETY: none of these is sound, which is what they are for: each must end in a page fault before it has any effect. Should
    // one not, the machine is at its end in any case, for nothing else runs on it and no guest has been started.
    unsafe {
        match what {
            Provoke::Nothing => return,
            Provoke::WriteCode => write_volatile(with_exposed_provenance_mut::<u8>(address(parts.code)), 0),
            Provoke::ExecuteData => {
                core::mem::transmute::<*const u8, extern "C" fn()>(DATA.as_ptr())();
            }
            Provoke::ReadNull => drop(read_volatile(with_exposed_provenance::<u8>(core::hint::black_box(8)))),
            Provoke::Overflow => overflow(1),
        }
    }
    panic!("{what:?} was not stopped");
}

#[expect(unconditional_recursion, reason = "until the page below the stack")]
#[inline(never)]
fn overflow(depth: u64) {
    let room = core::hint::black_box([depth; 64]);
    overflow(room[7] + 1);
    core::hint::black_box(&room);
}
