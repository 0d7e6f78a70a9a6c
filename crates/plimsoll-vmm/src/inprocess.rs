//! The guest program run by a thread of this process, where there is no KVM.
//!
//! Enters: the same parameter page. Leaves: the same reports. Every access goes to the same managed memory by relaxed
//! atomic operations on words, so an absent page is the same fault to the manager, only in user mode. What must never
//! happen: an access answered from anywhere else. The program is trusted here, as code of this process; its addresses
//! are checked all the same, and one outside ends the machine.
use crate::machine::{Death, End, Going, Machine};
use crate::memory::MemoryError;
use plimsoll_guest::abi::{BalloonTarget, Listing};
use plimsoll_guest::probe::{ProbeCommand, Probed};
use plimsoll_guest::{Guest, Machine as GuestMachine, PageWords, abi};
use plimsoll_types::Gpa;
use std::time::Instant;

/// Ticks of an in-process guest's clock in a second: nanoseconds.
pub(crate) const TICKS_PER_SECOND: u64 = 1_000_000_000;

/// Runs one vCPU to its end.
pub(crate) fn run(machine: &Machine, params: &abi::Params, index: u32, start: Instant) -> End {
    let mut vcpu = Vcpu { machine, index, start, failure: None };
    let last = Guest::new(params).and_then(|guest| guest.run(index, &mut vcpu));
    match (vcpu.failure, last) {
        (Some(death), _) => End::Died(death),
        (None, Err(error)) => End::Died(Death::Program(error)),
        (None, Ok(report)) => {
            machine.report(index, &report);
            if machine.going() == Going::Leaving { End::Left } else { End::Done }
        }
    }
}

struct Vcpu<'a> {
    machine: &'a Machine,
    index: u32,
    start: Instant,
    /// The first thing that went wrong. The program is told to stop, and what it says after that does not count.
    failure: Option<Death>,
}

impl Vcpu<'_> {
    fn note<T: Default>(&mut self, result: Result<T, MemoryError>) -> T {
        result.unwrap_or_else(|error| {
            self.failure.get_or_insert(Death::Memory(error));
            T::default()
        })
    }

    fn channel_word(&mut self, offset: u64) -> u64 {
        let word = self.machine.memory.read_u64(Gpa(abi::channel_gpa(self.index) + offset));
        self.note(word)
    }
}

/// The bytes of a page, on their way between words and memory.
fn page_bytes() -> [u8; plimsoll_types::PAGE_SIZE] {
    [0; plimsoll_types::PAGE_SIZE]
}

impl GuestMachine for Vcpu<'_> {
    fn read_word(&mut self, gpa: u64) -> u64 {
        let word = self.machine.memory.read_u64(Gpa(gpa));
        self.note(word)
    }

    fn write_word(&mut self, gpa: u64, value: u64) {
        let done = self.machine.memory.write_u64(Gpa(gpa), value);
        self.note(done);
    }

    fn read_page(&mut self, gpa: u64, into: &mut PageWords) {
        let mut bytes = page_bytes();
        let done = self.machine.memory.read(Gpa(gpa), &mut bytes);
        self.note(done);
        let (words, _) = bytes.as_chunks();
        for (word, bytes) in into.iter_mut().zip(words) {
            *word = u64::from_le_bytes(*bytes);
        }
    }

    fn write_page(&mut self, gpa: u64, from: &PageWords) {
        let mut bytes = page_bytes();
        let (words, _) = bytes.as_chunks_mut();
        for (bytes, word) in words.iter_mut().zip(from) {
            *bytes = word.to_le_bytes();
        }
        let done = self.machine.memory.write(Gpa(gpa), &bytes);
        self.note(done);
    }

    fn now_ticks(&mut self) -> u64 {
        // 584 years.
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn idle(&mut self, ns: u64) {
        self.machine.idle(self.index, ns);
    }

    fn stop(&mut self) -> u64 {
        if self.failure.is_some() || self.machine.going() == Going::Leaving {
            return abi::STOP_NOW;
        }
        self.channel_word(0)
    }

    fn window(&mut self) -> u64 {
        self.channel_word(8)
    }

    fn report(&mut self, report: &abi::Report) {
        self.machine.report(self.index, report);
    }

    fn next_command(&mut self, answer: &Probed) -> ProbeCommand {
        self.machine.next_command(self.index, answer)
    }

    fn exchange_word(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        let done = self.machine.memory.exchange_u64(Gpa(gpa), old, new);
        // A failure ends the program; until it notices, the word counts as changed.
        done.unwrap_or_else(|error| {
            self.failure.get_or_insert(Death::Memory(error));
            Ok(())
        })
    }

    fn balloon(&mut self) -> BalloonTarget {
        BalloonTarget(self.channel_word(abi::BALLOON_OFFSET))
    }

    fn list(&mut self, listing: &Listing) {
        let done = self.machine.listed(listing);
        self.failure = self.failure.take().or(done.err());
    }

    fn install(&mut self, gpa: u64) {
        let done = self.machine.balloon.install(&self.machine.memory, gpa);
        self.failure = self.failure.take().or(done.err());
    }

    fn discard(&mut self, gpa: u64, len: u64) {
        if let Err(error) = self.machine.memory.discard(Gpa(gpa), len) {
            self.failure.get_or_insert(Death::Discard(error));
        }
    }
}
