//! What a program needs from the machine it runs on.
//!
//! The image implements it with volatile accesses and port I/O; the VMM implements it over its own managed
//! memory where there is no KVM; tests implement it over a vector. What must never happen: an implementation
//! answering a read from anywhere but the memory itself, because then nothing is verified.

use crate::abi::{BalloonTarget, Listing};

/// Words in a page.
pub const PAGE_WORDS: usize = 512;
/// A page as the programs see it: 512 words, the first at the lowest address.
pub type PageWords = [u64; PAGE_WORDS];

/// One vCPU of a guest with its memory, its clock and its line to the VMM.
///
/// Addresses are guest physical and come from [`crate::layout::Layout`]: words are 8-byte aligned and pages
/// 4096-byte aligned, all of it inside the regions of the parameter page and at or above
/// [`WORKLOAD_GPA`](crate::abi::WORKLOAD_GPA). No two vCPUs use the same page, the tables of the [frames](crate::frames) apart.
pub trait Machine {
    /// Reads a word.
    fn read_word(&mut self, gpa: u64) -> u64;
    /// Writes a word.
    fn write_word(&mut self, gpa: u64, value: u64);
    /// Reads a page.
    fn read_page(&mut self, gpa: u64, into: &mut PageWords);
    /// Writes a page.
    fn write_page(&mut self, gpa: u64, from: &PageWords);

    /// The clock: never goes back, `tsc_hz` of the parameter page to a second.
    fn now_ticks(&mut self) -> u64;
    /// Lets a few ticks pass without giving up the processor.
    fn relax(&mut self) {
        core::hint::spin_loop();
    }
    /// Gives up the processor for at most so long.
    fn idle(&mut self, ns: u64);

    /// Whether to end: [`STOP_NO`](crate::abi::STOP_NO) and its neighbours.
    fn stop(&mut self) -> u64;
    /// The number of the window that runs now.
    fn window(&mut self) -> u64;
    /// Passes a report on.
    fn report(&mut self, report: &crate::abi::Report);
    /// Says what became of the last command and waits for the next, or for a reason to look at [`stop`](Self::stop):
    /// the number is 0 then, and the answer may be given again.
    fn next_command(&mut self, answer: &crate::probe::Probed) -> crate::probe::ProbeCommand;
    /// Puts `new` in the place of `old` in a word of the [frames](crate::frames)' tables, which vCPUs and host share, or fails with
    /// what it holds.
    ///
    /// # Errors
    /// What the word holds instead of `old`.
    fn exchange_word(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64>;
    /// How much memory the balloon shall have.
    fn balloon(&mut self) -> BalloonTarget;
    /// Shows the host what the balloon gives or wants back.
    fn list(&mut self, listing: &Listing);
    /// Asks for a frame before it is touched.
    fn install(&mut self, gpa: u64);
    /// Gives whole pages back: they read as zero from now on.
    fn discard(&mut self, gpa: u64, len: u64);
}
