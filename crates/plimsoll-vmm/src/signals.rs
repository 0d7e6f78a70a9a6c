//! The two signals a machine uses: one to get vCPU threads out of KVM, and `SIGBUS`, by which the kernel says that a
//! page is poisoned.
//!
//! Enters: signals. Leaves: the address of the last poisoned page any thread touched. Handlers do nothing but atomic
//! operations and, for a thread that would touch the same poisoned page for ever, sleep.
//!
//! A thread in `KVM_RUN` gets `SIGBUS` on its way out; its handler returns and the thread finds the address noted. A
//! thread of an in-process guest gets it *at* the access: returning would repeat it. The second time in a row for one
//! address and thread the handler therefore never returns: the thread sleeps until the process ends, and the main thread,
//! which looks here at every report interval, ends the machine.
#![expect(unsafe_code, reason = "reads the fault address from the siginfo the kernel passes to a handler")]

use plimsoll_types::Hva;
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The last poisoned address. One for the process: signal handlers have no other place.
static POISONED_AT: AtomicU64 = AtomicU64::new(0);
/// How often a poisoned page was touched, so that each machine of a process can tell what came before it.
static TOUCHES: AtomicU64 = AtomicU64::new(0);

thread_local! {
    /// The last poisoned address this thread touched. Constant at the start and without a destructor, so that a
    /// handler may use it.
    static OWN_POISONED_AT: Cell<u64> = const { Cell::new(0) };
}

/// Installs both handlers.
pub(crate) fn install() -> io::Result<()> {
    register_signal_handler(kick_number(), on_kick)?;
    register_signal_handler(libc::SIGBUS, on_sigbus)?;
    Ok(())
}

/// The signal that interrupts `KVM_RUN`.
pub(crate) fn kick_number() -> c_int {
    SIGRTMIN()
}

/// How often any thread of this process has touched a poisoned page so far.
pub(crate) fn touches() -> u64 {
    TOUCHES.load(Ordering::SeqCst)
}

/// The last poisoned page any thread of this process touched, if that was after the first `touches`.
pub(crate) fn poisoned_after(touches: u64) -> Option<Hva> {
    (TOUCHES.load(Ordering::SeqCst) > touches).then(|| Hva(POISONED_AT.load(Ordering::SeqCst)))
}

/// Delivery alone interrupts the system call.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

extern "C" fn on_sigbus(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the handler was installed with SA_SIGINFO, so `info` points to a siginfo that lives until the handler
    // returns; for SIGBUS its address field is set by the kernel.
    let address = unsafe { (*info).si_addr() }.addr() as u64;
    POISONED_AT.store(address, Ordering::SeqCst);
    TOUCHES.fetch_add(1, Ordering::SeqCst);
    if OWN_POISONED_AT.replace(address) == address {
        loop {
            // Nothing but nanosleep(2): safe in a handler.
            std::thread::sleep(Duration::from_secs(60));
        }
    }
}
