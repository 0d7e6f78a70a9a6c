//! A small kernel: two address spaces that share a window, into which pages are mapped, and out of it again, at random.
//!
//! Enters: nothing. Leaves: how often memory and the marks in its tables were what they must be, and a sum of all that was read, which is the
//! same however its addresses are translated. It runs in ring 0, and loads roots, changes its tables and fences as a kernel does: by itself, or
//! by asking ([`Tables`]).
//!
//! ```text
//! ROOTS          two PML4s: entry 0 is the hypervisor's first, entry 1 leads to the window
//! ROOTS + 0x2000 for each space a PDPT, a directory, and the table of the window's 512 pages
//! PAGES          the pages that are mapped there, each with words of its own
//! ```
use crate::tables::{ADDRESS, READABLE, Tables};
use crate::vcpu::address;
use crate::{call, read, write};
use core::arch::asm;
use plimsoll_guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA};

const ROOTS: u64 = 0x60_0000;
const PAGES: u64 = 0x80_0000;
const WINDOW: u64 = 1 << 39;
const SPACES: usize = 2;
const SLOTS: usize = 512;
/// Of the pages, 7 MiB.
const COUNT: u64 = 1792;
const ROUNDS: u32 = 12_000;
/// Entries: present, writable, a user's; accessed; dirty.
const TABLE: u64 = 7;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const GLOBAL_PAGES: u64 = 1 << 7;

/// What a slot of the window shows.
#[derive(Clone, Copy)]
struct Slot {
    /// The page, if any.
    page: Option<u64>,
    /// Whether it was touched since it was mapped.
    touched: bool,
}

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        // A full-period generator (Knuth, MMIX); its upper bits.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

const fn root(space: usize) -> u64 {
    ROOTS + space as u64 * PAGE_SIZE
}

const fn table(space: usize, level: u64) -> u64 {
    ROOTS + 0x2000 + (space as u64 * 3 + 3 - level) * PAGE_SIZE
}

const fn entry(space: usize, slot: usize) -> u64 {
    table(space, 1) + slot as u64 * 8
}

const fn seen_at(slot: usize) -> u64 {
    WINDOW + slot as u64 * PAGE_SIZE
}

/// Everything is forgotten, as a kernel does it that has global pages.
fn invalidate_everything() {
    // SAFETY: ring 0; global pages are switched on and off again, and there are none.
    unsafe {
        asm!("mov {old}, cr4", "mov {new}, {old}", "or {new}, {global}", "mov cr4, {new}", "mov cr4, {old}",
            old = out(reg) _, new = out(reg) _, global = const GLOBAL_PAGES, options(nostack));
    }
}

fn current() -> u64 {
    let root;
    // SAFETY: ring 0; reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) root, options(nomem, nostack, preserves_flags)) };
    root
}

/// Runs it. Checks that were made, and the sum.
pub fn run(tables: &mut impl Tables) -> (u64, u64) {
    for space in 0..SPACES {
        write(root(space), read(PAGE_TABLES_GPA));
        write(root(space) + 8, tables.leads_to(table(space, 3)) | TABLE);
        write(table(space, 3), tables.leads_to(table(space, 2)) | TABLE);
        write(table(space, 2), tables.leads_to(table(space, 1)) | TABLE);
    }
    tables.begin(ROOTS, 8, &[root(0), root(1)]);
    for page in 0..COUNT {
        (0..8).for_each(|word| write(PAGES + page * PAGE_SIZE + word * 512, page << 8 | word));
    }
    let mut spaces = [[Slot { page: None, touched: false }; SLOTS]; SPACES];
    let (mut random, mut checks, mut sum, mut now) = (Random(1), 0, 0u64, 0);
    tables.load(root(now));
    for round in 0..ROUNDS {
        let slot = address(random.below(SLOTS as u64));
        let shown = &mut spaces[now][slot];
        let what = random.below(16);
        if what != 5 && shown.page.is_some() {
            tables.settle(entry(now, slot));
        }
        match (what, shown.page) {
            // Another page, often the one that the other space shows, or none.
            (0..5, old) => {
                let page = (random.below(8) > 0).then(|| random.below(COUNT));
                let rights = if random.below(4) == 0 { READABLE } else { TABLE };
                let word = page.map_or(0, |page| tables.leads_to(PAGES + page * PAGE_SIZE) | rights);
                if let Some(old) = old {
                    let was = read(entry(now, slot));
                    let old = tables.leads_to(PAGES + old * PAGE_SIZE);
                    assert_eq!(was & ADDRESS, old, "round {round}: {was:#x}'s page");
                    assert_eq!(was & ACCESSED != 0, shown.touched, "round {round}: {was:#x}'s accessed bit");
                    checks += 1;
                }
                tables.set(entry(now, slot), word, old.map(|_| seen_at(slot)));
                *shown = Slot { page, touched: false };
            }
            (5, _) => {
                now = 1 - now;
                tables.load(root(now));
                assert_eq!(current(), tables.leads_to(root(now)), "round {round}: CR3 is what was loaded");
            }
            (6, _) if round % 16 == 0 => invalidate_everything(),
            (6..11, Some(page)) => {
                let word = random.below(8) * 512;
                let found = read(seen_at(slot) + word);
                assert_eq!(
                    found,
                    read(PAGES + page * PAGE_SIZE + word),
                    "round {round}: slot {slot} of space {now}"
                );
                (shown.touched, checks, sum) = (true, checks + 1, sum.rotate_left(7) ^ found);
            }
            (11.., Some(page)) if read(entry(now, slot)) & 2 != 0 => {
                let (word, new) = (random.below(8) * 512, u64::from(round) << 32 | page);
                write(seen_at(slot) + word, new);
                assert_eq!(read(PAGES + page * PAGE_SIZE + word), new, "round {round}: what was written");
                assert!(
                    read(entry(now, slot)) & (ACCESSED | DIRTY) == ACCESSED | DIRTY,
                    "round {round}: marks"
                );
                (shown.touched, checks) = (true, checks + 2);
            }
            _ => {}
        }
    }
    // What is in limbo and in the store of this guest depends on the time; what it reads does not.
    assert!(call(0, 0, 0, 0).1 > COUNT, "it owns more than these pages");
    (checks, sum)
}
