//! The two ways in which a kernel has its tables changed: it writes them, or it asks the hypervisor to.
//!
//! Enters: entries, and what they are to be. Leaves: the same tables either way. Who asks, asks for many at once: an entry is set when it is
//! looked at or used, or when there is no room for more, as kernels do it that know when their tables must be true.
use crate::vcpu::address;
use crate::{DONE, call, read, write};
use core::arch::asm;
use plimsoll_guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA};

/// Of an entry: where it leads.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Entry of each page of this guest's in the tables that it starts with, in a row, when they name frames.
const FRAMES: u64 = PAGE_TABLES_GPA + 3 * PAGE_SIZE;
/// Updates that wait, and behind them the addresses whose translations are to be forgotten then.
pub const BATCH: u64 = 0x70_0000;
const FORGOTTEN: u64 = BATCH + PAGE_SIZE;
const BATCH_MAX: u64 = PAGE_SIZE / 16;
/// Calls and a status, as the hypervisor's `direct` has them.
pub const UPDATE: u64 = 32;
pub const PIN: u64 = 33;
pub const UNPIN: u64 = 34;
pub const LOAD: u64 = 35;
pub const AGAIN: u64 = 7;
/// Present, and a user's.
pub const READABLE: u64 = 5;

/// What a kernel does with its tables.
pub trait Tables {
    /// What an entry has to say to lead to a page of this guest's.
    fn leads_to(&self, page: u64) -> u64;
    /// So many pages from here on are tables from now on; the roots are among them.
    fn begin(&mut self, first: u64, pages: u64, roots: &[u64]);
    /// An entry becomes this word, before [`settle`](Self::settle) returns. `shown` is the address that it has translated until then.
    fn set(&mut self, entry: u64, word: u64, shown: Option<u64>);
    /// An entry is what it was set to.
    fn settle(&mut self, entry: u64);
    /// The processor walks the tables from this root on.
    fn load(&mut self, root: u64);
}

/// Forgets a translation.
pub fn invalidate(at: u64) {
    // SAFETY: ring 0.
    unsafe { asm!("invlpg [{}]", in(reg) at, options(nostack, preserves_flags)) };
}

/// Tables that the kernel writes itself.
pub struct Own;

impl Tables for Own {
    fn leads_to(&self, page: u64) -> u64 {
        page
    }

    fn begin(&mut self, _: u64, _: u64, _: &[u64]) {}

    fn set(&mut self, entry: u64, word: u64, shown: Option<u64>) {
        write(entry, word);
        if let Some(at) = shown {
            invalidate(at);
        }
    }

    fn settle(&mut self, _: u64) {}

    fn load(&mut self, root: u64) {
        // SAFETY: ring 0; the root maps this program, its stack and all of its memory to themselves.
        unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
    }
}

/// The frame of a page, by the tables that this guest started with.
pub fn frame(page: u64) -> u64 {
    read(same(page)) & ADDRESS
}

/// The entry that maps a page to its own address.
pub fn same(page: u64) -> u64 {
    FRAMES + page / PAGE_SIZE * 8
}

/// Where the machine has a word of this guest's.
pub fn at(word: u64) -> u64 {
    frame(word & !(PAGE_SIZE - 1)) + word % PAGE_SIZE
}

/// Makes a call until it has been done, in however many parts.
pub fn again(number: u64, first: u64, second: u64) -> (u64, u64) {
    loop {
        match call(number, first, second, 0) {
            (AGAIN, _) => {}
            answer => return answer,
        }
    }
}

/// Tables that the hypervisor writes.
pub struct Asked {
    waiting: u64,
    /// Those of them that are in the one table to which entries are set, by their index.
    entries: [u64; 8],
}

impl Asked {
    pub const fn new() -> Self {
        Self { waiting: 0, entries: [0; 8] }
    }

    fn place(entry: u64) -> (usize, u64) {
        let index = entry % PAGE_SIZE / 8;
        (address(index / 64), 1 << (index % 64))
    }

    fn send(&mut self) {
        let mut sent = 0;
        while sent < self.waiting {
            let (status, done) = again(UPDATE, BATCH + sent * 16, self.waiting - sent);
            assert!(status == DONE, "update {sent} of {} is refused: {status}", self.waiting);
            sent += done;
        }
        for number in 0..self.waiting {
            match read(FORGOTTEN + number * 8) {
                0 => {}
                at => invalidate(at),
            }
        }
        *self = Self::new();
    }
}

impl Tables for Asked {
    fn leads_to(&self, page: u64) -> u64 {
        frame(page)
    }

    fn begin(&mut self, first: u64, pages: u64, roots: &[u64]) {
        for page in (first..).step_by(address(PAGE_SIZE)).take(address(pages)) {
            self.set(same(page), frame(page) | READABLE, Some(page));
            // Each of them may be in another table.
            self.send();
        }
        for root in roots {
            assert_eq!(again(PIN, frame(*root), 4).0, DONE, "the root at {root:#x} is pinned");
        }
    }

    fn set(&mut self, entry: u64, word: u64, shown: Option<u64>) {
        let number = self.waiting;
        write(BATCH + number * 16, at(entry));
        write(BATCH + number * 16 + 8, word);
        write(FORGOTTEN + number * 8, shown.unwrap_or(0));
        let (place, bit) = Self::place(entry);
        self.entries[place] |= bit;
        self.waiting += 1;
        if self.waiting == BATCH_MAX {
            self.send();
        }
    }

    fn settle(&mut self, entry: u64) {
        let (place, bit) = Self::place(entry);
        if self.entries[place] & bit != 0 {
            self.send();
        }
    }

    fn load(&mut self, root: u64) {
        self.send();
        assert_eq!(again(LOAD, frame(root), 0).0, DONE, "the root at {root:#x} is loaded");
    }
}
