//! A kernel that asks for every entry of its tables, and for many that it must not have.
//!
//! Enters: which part it has. Leaves: how often it was refused with the status that it must be; at the end it writes to one of its tables,
//! which ends it. Part 6 does all of that, 7 switches write protection off, 8 loads a root that nobody has looked at.
//!
//! ```text
//! SCRATCH   pages for tables and what they name, zero at first
//! ```
use crate::spaces::Random;
use crate::tables::{AGAIN, BATCH, LOAD, PIN, READABLE, UNPIN, UPDATE, again, at, frame, invalidate, same};
use crate::vcpu::{Vcpu, address};
use crate::{A, DONE, IN_USE, INVALID, NO_SUCH_CALL, NOT_ALLOWED, call, fill, holds, read, report, write};
use core::arch::asm;
use plimsoll_guest::Machine;
use plimsoll_guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA, Phase, channel_gpa};

const SCRATCH: u64 = 0x80_0000;
/// Of this guest's memory.
const PAGES: u64 = (16 << 20) / PAGE_SIZE;
/// More frames than the machine has.
const FRAMES: u64 = (80 << 20) / PAGE_SIZE;
/// Present, writable, a user's.
const WRITABLE: u64 = 7;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
/// Write-through, and not cached at all.
const UNCACHED: u64 = 0x18;
/// Beyond all physical addresses.
const RESERVED: u64 = 1 << 51;
/// CR0 as it is, less write protection.
const UNPROTECTED: u64 = 0x8004_0033;
/// Tables with more entries than one call looks at.
const MANY: u64 = 40;
const RANDOM_CALLS: u64 = 6_000;

/// What was checked so far.
struct Checks(u64);

impl Checks {
    /// A call's status must be this.
    fn must(&mut self, found: (u64, u64), status: u64, what: &str) {
        assert!(found.0 == status, "{what}: {} instead of {status}", found.0);
        self.0 += 1;
    }

    /// An entry cannot become this word, and is what it was.
    fn cannot(&mut self, entry: u64, word: u64, status: u64, what: &str) {
        let before = read(entry);
        self.must(set(at(entry), word), status, what);
        assert!(read(entry) == before, "{what}: and yet it was written");
    }
}

const fn scratch(page: u64) -> u64 {
    SCRATCH + page * PAGE_SIZE
}

/// Asks for one entry, by its address in the machine's memory.
fn set(place: u64, word: u64) -> (u64, u64) {
    write(BATCH, place);
    write(BATCH + 8, word);
    again(UPDATE, BATCH, 1)
}

/// What this guest may do with a page by its own address.
fn allow(page: u64, rights: u64) -> (u64, u64) {
    let answer = set(at(same(page)), frame(page) | rights);
    invalidate(page);
    answer
}

/// Pages can only be read from now on, so that they can be tables.
fn protect(pages: impl Iterator<Item = u64>) {
    pages.for_each(|page| assert!(allow(page, READABLE).0 == DONE, "{page:#x} is only read from now on"));
}

/// Runs its part. What was checked, if it lives to say so.
pub fn run(vcpu: &mut Vcpu, part: u64) -> Option<(u64, u64)> {
    let mut checks = Checks(0);
    match part {
        6 => {
            let mut own = (200..240).map(scratch);
            own.clone().for_each(|page| fill(page, page));
            kinds(&mut checks);
            foreign(&mut checks);
            words(&mut checks);
            batches(&mut checks);
            trees(&mut checks);
            others(&mut checks);
            at_random(&mut checks);
            assert!(own.all(|page| holds(page, |word| page + word)), "its memory is what it was");
            as_a_user(&mut checks);
            vcpu.report(&report(Phase::Running, checks.0));
            // It reads it, and does not write it.
            write(PAGE_TABLES_GPA, read(PAGE_TABLES_GPA));
        }
        7 => {
            // SAFETY: ring 0; the hypervisor ends this guest here.
            unsafe { asm!("mov cr0, {}", in(reg) UNPROTECTED, options(nostack, preserves_flags)) };
        }
        8 => {
            // SAFETY: as above.
            unsafe { asm!("mov cr3, {}", in(reg) frame(SCRATCH), options(nostack, preserves_flags)) };
        }
        other => panic!("no part has seed {other}"),
    }
    Some((checks.0, 0))
}

/// A page is a table, or it is written.
fn kinds(checks: &mut Checks) {
    let table = scratch(0);
    let number = frame(table);
    checks.must(again(PIN, number, 1), IN_USE, "a table that is mapped to be written");
    protect([table].into_iter());
    checks.must(again(PIN, number, 1), DONE, "a table");
    checks.must(again(PIN, number, 1), IN_USE, "the same again");
    checks.must(again(PIN, number, 2), IN_USE, "the same of another level");
    checks.cannot(same(table), number | WRITABLE, IN_USE, "a table mapped to be written");
    checks.cannot(table, number | WRITABLE, IN_USE, "the same, in itself");
    checks.must(set(at(table), number | READABLE), DONE, "a table that maps itself to be read");
    checks.must(again(LOAD, number, 0), IN_USE, "a root that is no root");
    checks.must(again(UNPIN, number, 0), DONE, "it is unpinned");
    checks.must(again(UNPIN, number, 0), INVALID, "and again");
    checks.must(again(UNPIN, frame(scratch(1)), 0), INVALID, "what was never pinned");
    checks.must(allow(table, WRITABLE), DONE, "what was a table is written");
    write(table, 0);
    let channel = channel_gpa(0);
    checks.must(allow(channel, READABLE), DONE, "the channel is not written for a while");
    checks.must(again(PIN, frame(channel), 1), IN_USE, "a table to which the hypervisor writes");
    checks.must(allow(channel, WRITABLE), DONE, "the channel is written again");
    for level in [0, 5, 255, 256, u64::MAX] {
        checks.must(again(PIN, frame(scratch(1)), level), INVALID, "a level that there is not");
    }
}

/// Frames of others: of the hypervisor, of other guests, of nobody.
fn foreign(checks: &mut Checks) {
    let mut own = [0u64; address(FRAMES / 64)];
    for page in 0..PAGES {
        let number = frame(page * PAGE_SIZE) / PAGE_SIZE;
        own[address(number / 64)] |= 1 << (number % 64);
    }
    let (entry, root) = (same(scratch(2)), PAGE_TABLES_GPA + 8 * 7);
    let foreign = (0..FRAMES).filter(|number| own[address(number / 64)] >> (number % 64) & 1 == 0);
    let far = [1 << 32, 1 << 39, ((1 << 40) - PAGE_SIZE)];
    for (count, theirs) in foreign.map(|number| number * PAGE_SIZE).chain(far).enumerate() {
        checks.must(set(at(entry), theirs | READABLE), NOT_ALLOWED, "another's frame, to be read");
        if count % 16 > 0 {
            continue;
        }
        checks.must(set(at(entry), theirs | WRITABLE), NOT_ALLOWED, "another's frame, to be written");
        checks.must(set(at(root), theirs | WRITABLE), NOT_ALLOWED, "another's frame as a table");
        checks.must(set(theirs, frame(scratch(2)) | WRITABLE), NOT_ALLOWED, "an entry in another's frame");
        checks.must(again(PIN, theirs, 1), NOT_ALLOWED, "another's table is pinned");
        checks.must(again(UNPIN, theirs, 0), NOT_ALLOWED, "another's table is unpinned");
        checks.must(again(LOAD, theirs, 0), NOT_ALLOWED, "another's root");
    }
    assert!(read(entry) & !0x60 == frame(scratch(2)) | WRITABLE, "its entry is what it was");
}

/// Words that no entry may be, and places where no entry is.
fn words(checks: &mut Checks) {
    let (page, number) = (scratch(2), frame(scratch(2)));
    let (leaf, directory) = (same(page), PAGE_TABLES_GPA + 2 * PAGE_SIZE + 8 * 300);
    checks.cannot(leaf, number | WRITABLE | GLOBAL, INVALID, "a global page");
    checks.cannot(leaf, number | WRITABLE | UNCACHED, INVALID, "a page that is not cached");
    checks.cannot(leaf, number | WRITABLE | LARGE, INVALID, "a page with the PAT's upper half");
    checks.cannot(leaf, number | WRITABLE | RESERVED, INVALID, "a reserved bit");
    checks.cannot(directory, WRITABLE | LARGE, INVALID, "a large page");
    checks.cannot(directory, number | WRITABLE | UNCACHED, INVALID, "a table that is not cached");
    checks.cannot(directory, number | WRITABLE, IN_USE, "a table that is written");
    checks.must(set(number, 0), INVALID, "an entry of what is no table");
    for wrong in [1, 4, 5, 7] {
        checks.must(set(at(leaf) + wrong, number | WRITABLE), INVALID, "where no entry begins");
    }
    checks.must(set(u64::MAX - 7, 0), NOT_ALLOWED, "an entry beyond everything");
}

/// Batches that are too long, elsewhere, or wrong in the middle.
fn batches(checks: &mut Checks) {
    let (page, number) = (scratch(2), frame(scratch(2)));
    for (place, count) in [
        (BATCH, 0),
        (BATCH, 257),
        (BATCH, u64::MAX),
        (BATCH, 1 << 60),
        (BATCH + 8, 1),
        (BATCH + 1, 1),
        (BATCH + 16, 256),
        (BATCH + PAGE_SIZE - 8, 1),
        (PAGES * PAGE_SIZE, 1),
        (1 << 47, 1),
        (u64::MAX - 15, 1),
        (u64::MAX, 1),
        (frame(BATCH) | 1 << 52, 1),
    ] {
        checks.must(again(UPDATE, place, count), INVALID, "a batch that is none");
    }
    for (place, word) in (0..).zip([WRITABLE, READABLE, WRITABLE | GLOBAL, WRITABLE]) {
        write(BATCH + place * 16, at(same(page)));
        write(BATCH + place * 16 + 8, number | word);
    }
    let answer = again(UPDATE, BATCH, 4);
    assert!(answer == (DONE, 2), "a batch is done up to what is refused: {answer:?}");
    checks.must(again(UPDATE, BATCH + 32, 2), INVALID, "and what follows begins with why");
    assert!(read(same(page)) == number | READABLE, "the last that was done counts");
    checks.must(again(UPDATE, BATCH + 48, 1), DONE, "what was behind it");
}

/// Tables that name each other as they must not, that name what is another's, or that are many.
fn trees(checks: &mut Checks) {
    let upper = scratch(3);
    write(upper, frame(upper) | WRITABLE);
    protect([upper].into_iter());
    checks.must(again(PIN, frame(upper), 2), IN_USE, "a table that is below itself");
    checks.must(allow(upper, WRITABLE), DONE, "what was not made a table is written");
    write(upper, 0);
    write(scratch(4) + 511 * 8, 0x20_0000 | READABLE);
    write(upper + 8, frame(scratch(4)) | WRITABLE);
    protect([upper, scratch(4)].into_iter());
    checks.must(again(PIN, frame(upper), 2), NOT_ALLOWED, "a table with the hypervisor in it");
    checks.must(allow(scratch(4), WRITABLE), DONE, "it is written");
    write(scratch(4) + 511 * 8, 0);
    protect([scratch(4)].into_iter());
    checks.must(again(PIN, frame(upper), 2), DONE, "and then it is one");
    checks.must(again(PIN, frame(scratch(4)), 1), DONE, "with one below it that is pinned, too");
    checks.must(again(UNPIN, frame(upper), 0), DONE, "which stays when the upper one goes");
    checks.cannot(same(scratch(4)), frame(scratch(4)) | WRITABLE, IN_USE, "and is not written");

    let (top, lower) = (scratch(8), || (0..MANY).map(|table| scratch(9 + table)));
    lower().zip(0..).for_each(|(table, index)| write(top + index * 8, frame(table) | WRITABLE));
    lower().for_each(|table| write(table, frame(scratch(2)) | WRITABLE));
    protect(lower().chain([top]));
    let mut parts = 1;
    while call(PIN, frame(top), 2, 0).0 == AGAIN {
        parts += 1;
    }
    assert!(parts > 1, "so many tables are looked at in parts");
    checks.must(again(PIN, frame(top), 2), IN_USE, "they are pinned");
    checks.must(again(UNPIN, frame(top), 0), DONE, "and unpinned");
    for table in lower() {
        checks.must(allow(table, WRITABLE), DONE, "and are memory again");
    }
}

/// What such a guest is not there for.
fn others(checks: &mut Checks) {
    for number in (1..32).chain([36, 64, 1 << 32, u64::MAX]) {
        checks.must(call(number, A, SCRATCH, PAGE_SIZE), NO_SUCH_CALL, "a call that it has not");
    }
}

/// Anything with everything, in a few pages that it can do without. What is left of it at the end the hypervisor has to undo.
fn at_random(checks: &mut Checks) {
    protect((60..68).map(scratch));
    let mut random = Random(1);
    let mut next = |limit: u64| random.below(limit);
    let mut done = 0;
    for _ in 0..RANDOM_CALLS {
        let page = scratch(60 + next(8));
        let (target, odd) = (scratch(60 + next(9)), next(12));
        let flags = [0, WRITABLE, WRITABLE, READABLE, WRITABLE | LARGE, next(1 << 12)][address(next(6))];
        let word = match odd {
            0 => next(1 << 31) << 33 | next(1 << 31),
            1 => (next(FRAMES) * PAGE_SIZE) | flags,
            _ => frame(target) | flags,
        };
        let place = if odd == 2 { same(page) } else { page + next(3) * 8 };
        let (status, _) = match next(8) {
            0 | 1 => call(PIN, frame(page), next(6), 0),
            2 => call(UNPIN, frame(page), 0, 0),
            _ if odd == 2 => {
                let answer = set(at(place), frame(page) | [READABLE, WRITABLE][address(next(2))]);
                invalidate(page);
                answer
            }
            _ => set(at(place), word),
        };
        if status == DONE {
            done += 1;
        }
    }
    assert!(done > 100, "some of it is not refused: {done}");
    checks.0 += RANDOM_CALLS;
}

/// Of a descriptor table: nothing, a user's 64-bit code, a user's data; both used before, so that the processor does not write here.
static DESCRIPTORS: [u64; 3] = [0, 0x00af_fb00_0000_ffff, 0x00cf_f300_0000_ffff];

#[repr(C, packed)]
struct DescriptorTable {
    limit: u16,
    first: *const u64,
}

/// The kernel becomes a user, who may ask for nothing.
fn as_a_user(checks: &mut Checks) {
    let table = DescriptorTable { limit: 23, first: DESCRIPTORS.as_ptr() };
    // SAFETY: ring 0. All pages are users', and the stack stays where it is: only the ring changes. Ports are a user's, too.
    unsafe {
        asm!("lgdt [{table}]", "mov {stack}, rsp", "push 0x13", "push {stack}", "pushfq", "push 0x0b",
            "lea {next}, [rip + 2f]", "push {next}", "iretq", "2:",
            table = in(reg) &raw const table, stack = out(reg) _, next = out(reg) _);
    }
    checks.must(set(at(same(SCRATCH)), 0), NOT_ALLOWED, "a user's update");
    checks.must(call(LOAD, frame(PAGE_TABLES_GPA), 0, 0), NOT_ALLOWED, "a user's root");
}
