//! One vCPU: memory by volatile accesses, the VMM by ports, time by the time-stamp counter.
//!
//! Volatile, because the machine under the guest takes pages away and brings them back: a compiler that
//! answered a read from what was written before would verify itself.
//! No other file touches guest memory.
use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::ptr::{read_volatile, with_exposed_provenance, with_exposed_provenance_mut, write_volatile};
use core::sync::atomic::{AtomicU64, Ordering};
use plimsoll_guest::abi::{
    BalloonTarget, Channel, LISTING_GPA, Listing, MESSAGE_SIZE, PAGE_SIZE, PARAMS_GPA, PORT_BALLOON,
    PORT_COMMAND, PORT_DISCARD, PORT_DONE, PORT_IDLE, PORT_INSTALL, PORT_PANIC, PORT_REPORT, Params, Report,
    channel_gpa,
};
use plimsoll_guest::probe::{ProbeCommand, Probed};
use plimsoll_guest::{Machine, PAGE_WORDS, PageWords};

/// The vCPU this code runs on.
pub struct Vcpu {
    index: u32,
    channel: *mut Channel,
}

impl Vcpu {
    /// The vCPU with this index.
    ///
    /// # Safety
    ///
    /// The code runs on that vCPU, the index is below `MAX_VCPUS`, and no other `Vcpu` of it is used any more.
    pub unsafe fn new(index: u32) -> Self {
        Self { index, channel: with_exposed_provenance_mut(address(channel_gpa(index))) }
    }

    /// The parameter page.
    pub fn params(&self) -> Params {
        // SAFETY: PARAMS_GPA is identity mapped, page aligned, written by the VMM before the start and by
        // nobody after it; any bytes are a `Params`.
        unsafe { read_volatile(with_exposed_provenance(address(PARAMS_GPA))) }
    }

    /// Leaves for good with a last report.
    pub fn done(&mut self, report: &Report) -> ! {
        self.put_report(report);
        loop {
            self.out(PORT_DONE);
        }
    }

    /// Leaves for good with a message.
    pub fn panicked(&mut self, message: &[u8; MESSAGE_SIZE], len: usize) -> ! {
        // SAFETY: the channel page belongs to this vCPU (`new`), is identity mapped and aligned for
        // `Channel`; the VMM reads these fields only while the vCPU waits in a port exit.
        unsafe {
            write_volatile(&raw mut (*self.channel).message, *message);
            write_volatile(&raw mut (*self.channel).message_len, len as u64);
        }
        loop {
            self.out(PORT_PANIC);
        }
    }

    fn put_report(&mut self, report: &Report) {
        // SAFETY: as in `panicked`.
        unsafe { write_volatile(&raw mut (*self.channel).report, *report) };
    }

    /// Leaves the guest through a port and comes back when the VMM resumes it.
    fn out(&mut self, port: u16) {
        // SAFETY: IOPL is 3, so `out` is permitted; it exits to the VMM, which changes no register. The VMM
        // does read the channel page and may change memory, so this is no `nomem`.
        unsafe {
            asm!("out dx, eax", in("dx") port, in("eax") self.index, options(nostack, preserves_flags))
        };
    }
}

impl Machine for Vcpu {
    #[inline]
    fn read_word(&mut self, gpa: u64) -> u64 {
        // SAFETY: the trait's callers pass aligned addresses of workload memory that this vCPU owns; all of
        // it is identity mapped and any bytes are a word.
        unsafe { read_volatile(with_exposed_provenance(address(gpa))) }
    }

    #[inline]
    fn write_word(&mut self, gpa: u64, value: u64) {
        // SAFETY: as in `read_word`; workload memory is writable and holds no Rust object.
        unsafe { write_volatile(with_exposed_provenance_mut(address(gpa)), value) };
    }

    #[inline]
    fn read_page(&mut self, gpa: u64, into: &mut PageWords) {
        let page: *const u64 = with_exposed_provenance(address(gpa));
        for (index, word) in into.iter_mut().enumerate() {
            debug_assert!(index < PAGE_WORDS);
            // SAFETY: `gpa` is the start of a page this vCPU owns (trait), so its 512 words are readable as in
            // `read_word`.
            *word = unsafe { read_volatile(page.add(index)) };
        }
    }

    #[inline]
    fn write_page(&mut self, gpa: u64, from: &PageWords) {
        let page: *mut u64 = with_exposed_provenance_mut(address(gpa));
        for (index, &word) in from.iter().enumerate() {
            // SAFETY: as in `read_page` and `write_word`.
            unsafe { write_volatile(page.add(index), word) };
        }
    }

    #[inline]
    fn now_ticks(&mut self) -> u64 {
        // SAFETY: the VMM leaves CR4.TSD clear, so user mode may read the counter; it has no other
        // precondition.
        unsafe { _rdtsc() }
    }

    fn idle(&mut self, ns: u64) {
        // SAFETY: as in `panicked`.
        unsafe { write_volatile(&raw mut (*self.channel).request_ns, ns) };
        self.out(PORT_IDLE);
    }

    #[inline]
    fn stop(&mut self) -> u64 {
        // SAFETY: the channel page is mapped and aligned (`new`). The VMM may store this word at the same
        // time, by a single aligned 8-byte store, and an aligned 8-byte volatile load never sees half of it.
        unsafe { read_volatile(&raw const (*self.channel).stop) }
    }

    #[inline]
    fn window(&mut self) -> u64 {
        // SAFETY: as in `stop`.
        unsafe { read_volatile(&raw const (*self.channel).window) }
    }

    fn report(&mut self, report: &Report) {
        self.put_report(report);
        self.out(PORT_REPORT);
    }

    fn next_command(&mut self, answer: &Probed) -> ProbeCommand {
        // SAFETY: as in `panicked`.
        unsafe { write_volatile(&raw mut (*self.channel).probed, *answer) };
        self.out(PORT_COMMAND);
        // SAFETY: as in `panicked`; the VMM wrote it while this vCPU waited, and any bytes are a `ProbeCommand`.
        unsafe { read_volatile(&raw const (*self.channel).command) }
    }

    #[inline]
    fn exchange_word(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        // SAFETY: the trait's callers pass the aligned address of a word of the frames' tables, identity mapped for as long as
        // the guest runs. vCPUs and host access it by whole words at once: this and `read_word`, which is a plain load of the
        // hardware and tears nothing.
        let word = unsafe { AtomicU64::from_ptr(with_exposed_provenance_mut(address(gpa))) };
        word.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).map(|_| ())
    }

    #[inline]
    fn balloon(&mut self) -> BalloonTarget {
        // SAFETY: as in `stop`.
        BalloonTarget(unsafe { read_volatile(&raw const (*self.channel).balloon) })
    }

    fn list(&mut self, listing: &Listing) {
        // SAFETY: the listing's page is identity mapped and vCPU 0's alone (`Machine::list` is called for it only); the VMM
        // reads it while this vCPU waits in the port exit.
        unsafe { write_volatile(with_exposed_provenance_mut(address(LISTING_GPA)), *listing) };
        self.out(PORT_BALLOON);
    }

    fn install(&mut self, gpa: u64) {
        // SAFETY: as in `panicked`.
        unsafe { write_volatile(&raw mut (*self.channel).request_gpa, gpa) };
        self.out(PORT_INSTALL);
    }

    fn discard(&mut self, gpa: u64, len: u64) {
        debug_assert!(gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE));
        // SAFETY: as in `panicked`.
        unsafe {
            write_volatile(&raw mut (*self.channel).request_gpa, gpa);
            write_volatile(&raw mut (*self.channel).request_len, len);
        }
        self.out(PORT_DISCARD);
    }
}

/// A guest physical address as a pointer's: memory is identity mapped and this machine has 64 bits.
#[expect(clippy::cast_possible_truncation, reason = "the image exists for x86-64 only")]
pub const fn address(gpa: u64) -> usize {
    gpa as usize
}
