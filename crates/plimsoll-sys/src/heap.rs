//! What the C library keeps of memory that was freed.
//!
//! Enters: nothing. Leaves: whole pages of it, to the kernel. No byte that anybody owns changes.
#![expect(unsafe_code, reason = "the C library is asked to tidy up")]

/// Gives the kernel back whole pages that were freed, wherever they lie. Without this the C library keeps what lies below something
/// that is in use: a thread's buffers of a moment, once for each of many threads. Takes the locks of its arenas, one after the other, for
/// as long as it looks through each.
pub fn trim() {
    // SAFETY: it takes a number, may be called by any thread at any time, and touches only what is free.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}
