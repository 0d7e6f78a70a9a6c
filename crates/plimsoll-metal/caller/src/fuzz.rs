//! A guest that owns extents and asks for anything, at random.
//!
//! Enters: a seed. Leaves: how many calls it made, or a message that says which answer was wrong. Handles are those it was told, also those of the
//! past, others with a bit turned, and guesses that meet those of its neighbours; addresses are in its window, beside it, unaligned, in
//! nobody's memory and wrapping around. What must never happen: an answer that is no status, a call that is done again when it is
//! replayed, granted memory with anything in it, and the end of the host.
use crate::spaces::Random;
use crate::vcpu::address;
use crate::{
    DISCARD, DONE, GRANT, IN_USE, INVALID, MAP, NO_ROOM, NO_SUCH_CALL, NO_SUCH_EXTENT, NOT_ALLOWED, PAGES,
    RELEASE, WINDOW, call, read, write,
};
use plimsoll_guest::abi::PAGE_SIZE;

/// Calls that it makes.
const CALLS: u64 = 20_000;
/// Handles that it remembers.
const KNOWN: usize = 32;
/// Its own memory from here on is in use by nobody: it may go.
const SPARE: u64 = 8 << 20;
const DONATE: u64 = 5;
/// One behind the last call there is.
const CALLS_END: u64 = 17;

/// What it knows.
struct Fuzz {
    chance: Random,
    handles: [u64; KNOWN],
    told: usize,
    /// How often it had which answer.
    answers: [u64; 7],
}

/// Makes all calls.
pub(crate) fn run(seed: u64) -> u64 {
    let mut fuzz = Fuzz { chance: Random(seed), handles: [0; KNOWN], told: 0, answers: [0; 7] };
    (0..CALLS).for_each(|_| fuzz.step());
    // Who is refused everything for one reason tries nothing.
    for status in [DONE, NO_SUCH_CALL, INVALID, NO_SUCH_EXTENT, NOT_ALLOWED, IN_USE, NO_ROOM] {
        let count = fuzz.answers[address(status)];
        assert!(count >= 10, "status {status} came {count} times");
    }
    CALLS
}

impl Fuzz {
    fn below(&mut self, end: u64) -> u64 {
        self.chance.below(end)
    }

    fn handle(&mut self) -> u64 {
        let which = self.below(KNOWN as u64);
        let known = self.handles[address(which)];
        match self.below(6) {
            0 => known ^ 1 << self.below(64),
            1 => self.below(40) | self.below(6) << 32,
            _ => known,
        }
    }

    fn address(&mut self) -> u64 {
        match self.below(6) {
            0 | 1 => WINDOW + self.below(512) * PAGE_SIZE,
            2 => WINDOW + self.below(1 << 22),
            3 => SPARE + self.below(1024) * PAGE_SIZE,
            4 => self.below(1 << 31) << 33 | self.below(1 << 31),
            _ => self.below(8192).wrapping_neg(),
        }
    }

    fn step(&mut self) {
        let number = self.below(CALLS_END + 1);
        let (handle, at) = (self.handle(), self.address());
        let (first, second, third) = match number {
            PAGES => (self.below(9), at, 0),
            GRANT if self.below(32) == 0 => (self.below(70), 0, 0),
            GRANT => (self.below(4), 0, 0),
            MAP => (handle, at, 0),
            // What is not its spare memory is kept for the program itself; unaligned, it is refused anyhow.
            DISCARD | 11..=15 => {
                (at.max(SPARE), self.below(64) * PAGE_SIZE + self.below(8) / 7, self.below(5))
            }
            _ => (handle, self.below(6), self.below(9)),
        };
        let (status, value) = self.ask(number, first, second, third);
        if status != DONE {
            return;
        }
        match number {
            GRANT => self.granted(value, first),
            DONATE | RELEASE => {
                let (again, _) = self.ask(number, first, second, third);
                assert!(again == NO_SUCH_EXTENT, "call {number} of {first:#x} was replayed: {again}");
            }
            6..=8 => self.remember(value),
            _ => {}
        }
    }

    fn ask(&mut self, number: u64, first: u64, second: u64, third: u64) -> (u64, u64) {
        let (status, value) = call(number, first, second, third);
        let Some(count) = self.answers.get_mut(address(status)) else {
            panic!("call {number} of {first:#x}, {second:#x}, {third:#x}: no status: {status:#x}");
        };
        *count += 1;
        (status, value)
    }

    fn remember(&mut self, handle: u64) {
        self.handles[self.told % KNOWN] = handle;
        self.told += 1;
    }

    /// Nobody else was told of it yet: it may be looked at.
    fn granted(&mut self, handle: u64, order: u64) {
        self.remember(handle);
        let bytes = PAGE_SIZE << order;
        // Its tables map a block of the window.
        if order > 9 {
            return;
        }
        let at = WINDOW + self.below(512) * PAGE_SIZE / bytes * bytes;
        if self.ask(MAP, handle, at, 0).0 != DONE {
            return;
        }
        for word in (at..at + bytes).step_by(address(PAGE_SIZE)).flat_map(|page| [page, page + PAGE_SIZE - 8])
        {
            assert!(read(word) == 0, "granted memory holds {:#x}", read(word));
            write(word, handle);
        }
    }
}
