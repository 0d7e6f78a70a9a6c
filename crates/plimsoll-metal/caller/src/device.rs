//! Owns QEMU's `edu` device and drives it by its registers: it copies between its own buffer and memory, at any address it is told.
//!
//! Enters: nothing. Leaves: how many checks were made. What it may reach is copied; what it may not is refused, counted, and as it was: pages
//! that were not named or no longer are, the wrong direction, memory of others.
//!
//! ```text
//! device   0 identity | 0x80 from | 0x88 to | 0x90 bytes | 0x98 command: 1 go, 2 to memory    (QEMU, docs/specs/edu)
//!          its buffer of 4 KiB is at 0x40000
//! ```
use crate::vcpu::{Vcpu, address};
use crate::{
    DISCARD, DONE, IN_USE, INVALID, NO_ROOM, NOT_ALLOWED, PAGES, READ, READ_WRITE, SEAL, WINDOW, call,
    is_there, read, until_taken, wait, write,
};
use core::ops::Range;
use core::ptr::{read_volatile, with_exposed_provenance};
use plimsoll_guest::abi::PAGE_SIZE;

const SHOW: u64 = 11;
const REACH: u64 = 12;
const PART: u64 = 13;
const REFUSED: u64 = 14;
const WRITE: u64 = 2;
/// Of [`PAGES`]: what the device reaches.
const REACHED: u64 = 5;

const IDENTITY: u32 = 0x0100_00ed;
const BUFFER: u64 = 0x4_0000;
const GO: u64 = 1;
const TO_MEMORY: u64 = 2;
/// What is copied at once: less than the buffer, of which some versions do not let all be copied.
const BYTES: u64 = 2048;
const WORDS: u64 = BYTES / 8;

/// Pages of this guest.
const SOURCE: u64 = 7 << 20;
const TARGET: u64 = SOURCE + PAGE_SIZE;
/// Behind the target, and never reached.
const SECRET: u64 = TARGET + PAGE_SIZE;
const SEALED: u64 = SECRET + PAGE_SIZE;
/// Many pages, side by side, and more that are used meanwhile.
const MANY: u64 = 9 << 20;
const MANY_PAGES: u64 = 256;
const USED: Range<u64> = 10 << 20..16 << 20;
/// The machine's memory, and a stride that meets the hypervisor's image at 2 MiB.
const MACHINE: u64 = 40 << 20;
const STRIDE: u64 = 6 << 20;

/// What a word of a page is filled with.
const fn word_of(page: u64, word: u64) -> u64 {
    page << 12 | word
}

fn fill(page: u64) {
    crate::fill(page, word_of(page, 0));
}

fn holds(page: u64, words: Range<u64>, word_of: impl Fn(u64) -> u64) -> bool {
    words.into_iter().all(|word| read(page + word * 8) == word_of(word))
}

/// Has the device copy, and waits until it has.
fn copy(vcpu: &mut Vcpu, from: u64, to: u64, command: u64) {
    for (register, value) in [(0x80, from), (0x88, to), (0x90, BYTES), (0x98, command | GO)] {
        write(WINDOW + register, value);
    }
    while read(WINDOW + 0x98) & GO != 0 {
        wait(vcpu);
    }
}

fn put(vcpu: &mut Vcpu, to: u64) {
    copy(vcpu, BUFFER, to, TO_MEMORY);
}

fn get(vcpu: &mut Vcpu, from: u64) {
    copy(vcpu, from, BUFFER, 0);
}

fn refused() -> u64 {
    call(REFUSED, 0, 0, 0).1
}

/// Runs it.
pub fn own(vcpu: &mut Vcpu) -> u64 {
    assert_eq!(call(SHOW, SOURCE, 0, 0).0, INVALID, "registers are not put over memory");
    assert_eq!(call(SHOW, WINDOW, 0, 0), (DONE, 1 << 20), "its registers");
    assert_eq!(call(SHOW, WINDOW, 0, 0).0, IN_USE, "once");
    // SAFETY: the device's registers are there, mapped a moment ago; this one must be read in a word of four bytes.
    let identity = unsafe { read_volatile::<u32>(with_exposed_provenance(address(WINDOW))) };
    assert_eq!(identity, IDENTITY, "it is the device");
    [SOURCE, TARGET, SECRET].into_iter().for_each(fill);
    let mut checks = reach_and_revoke(vcpu);
    checks += reach_nobody_else(vcpu);
    checks + hold_and_let_go(vcpu)
}

/// What it was let reach it reaches, in the direction that was said, as long as was said.
fn reach_and_revoke(vcpu: &mut Vcpu) -> u64 {
    for (gpa, bytes, rights, status) in [
        (SOURCE, PAGE_SIZE, 0, INVALID),
        (SOURCE, PAGE_SIZE, 4, INVALID),
        (SOURCE + 8, PAGE_SIZE, READ, INVALID),
        (WINDOW - PAGE_SIZE, 2 * PAGE_SIZE, READ, INVALID),
        (MANY, 1025 * PAGE_SIZE, READ, NO_ROOM),
        (SOURCE, PAGE_SIZE, READ, DONE),
        (SOURCE, PAGE_SIZE, WRITE, IN_USE),
        (TARGET, PAGE_SIZE, WRITE, DONE),
    ] {
        assert_eq!(call(REACH, gpa, bytes, rights).0, status, "{gpa:#x}, {bytes:#x}, {rights}");
    }
    // QEMU's unit records no fault where a translation that it keeps lacks the right: so what is refused comes first.
    get(vcpu, TARGET);
    assert_eq!(refused(), 1, "what it may only write it does not read");
    put(vcpu, SOURCE);
    assert_eq!(refused(), 2, "what it may only read it does not write");
    assert!(holds(SOURCE, 0..512, |word| word_of(SOURCE, word)), "nor change");
    // Half in what it reaches, half behind it; what is in its buffer is nothing that it may not have.
    put(vcpu, TARGET + PAGE_SIZE - BYTES / 2);
    assert_eq!(refused(), 3, "a copy is stopped where its right ends");
    for word in 0..WORDS / 2 {
        let found = read(TARGET + PAGE_SIZE - BYTES / 2 + word * 8);
        assert!(found != word_of(TARGET, word), "it had not read what it was refused");
        assert!(found != word_of(TARGET, 512 - WORDS / 2 + word), "up to there it is done");
    }
    assert!(holds(SECRET, 0..512, |word| word_of(SECRET, word)), "and not behind");

    fill(TARGET);
    get(vcpu, SOURCE);
    put(vcpu, TARGET);
    assert_eq!(refused(), 3, "nothing of that is refused");
    assert!(holds(TARGET, 0..WORDS, |word| word_of(SOURCE, word)), "it was copied");
    assert!(holds(TARGET, WORDS..512, |word| word_of(TARGET, word)), "and no more");

    fill(TARGET);
    assert_eq!(call(DISCARD, TARGET, PAGE_SIZE, 0).0, IN_USE, "what a device reaches is not given back");
    assert_eq!(call(SEAL, TARGET, PAGE_SIZE, 0).0, IN_USE, "nor sealed");
    assert_eq!(call(PART, SECRET, PAGE_SIZE, 0).0, INVALID, "it has no part of that");
    assert_eq!(call(PART, TARGET, PAGE_SIZE, 0).0, DONE, "part");
    put(vcpu, TARGET);
    assert_eq!(refused(), 4, "what it has parted from it does not write");
    assert!(holds(TARGET, 0..512, |word| word_of(TARGET, word)), "not by an old translation either");
    assert_eq!(call(DISCARD, TARGET, PAGE_SIZE, 0).0, DONE, "now it can be given back");
    put(vcpu, TARGET);
    assert!(refused() == 5 && holds(TARGET, 0..512, |_| 0), "and stays what it is");

    fill(SEALED);
    assert_eq!(call(SEAL, SEALED, PAGE_SIZE, 0).0, DONE, "seal");
    assert_eq!(call(REACH, SEALED, PAGE_SIZE, READ_WRITE).0, NOT_ALLOWED, "what is sealed no device writes");
    assert_eq!(call(REACH, SEALED, PAGE_SIZE, READ).0, DONE, "but reads");
    put(vcpu, SEALED);
    assert!(refused() == 6 && holds(SEALED, 0..512, |word| word_of(SEALED, word)), "and no more");
    30
}

/// All over the machine's memory, by the machine's addresses: the hypervisor, other guests, this one's own frames.
fn reach_nobody_else(vcpu: &mut Vcpu) -> u64 {
    let before = refused();
    let mut tried = 0;
    for at in (2 << 20..MACHINE).step_by(address(STRIDE)) {
        put(vcpu, at);
        tried += 1;
        assert_eq!(refused(), before + tried, "{at:#x} is refused");
    }
    tried
}

/// What it reaches stays in memory, and goes when it is let go.
fn hold_and_let_go(vcpu: &mut Vcpu) -> u64 {
    let many = MANY..MANY + MANY_PAGES * PAGE_SIZE;
    let pages = || many.clone().step_by(address(PAGE_SIZE));
    pages().chain(USED.step_by(address(PAGE_SIZE))).for_each(fill);
    assert_eq!(call(REACH, MANY, many.end - MANY, READ_WRITE).0, DONE, "many pages");
    assert_eq!(call(PAGES, REACHED, 0, 0).1, MANY_PAGES + 2, "all of them are counted");
    // Others need memory, and what is used goes, since nothing else may.
    until_taken(vcpu, USED, MANY..MANY + PAGE_SIZE);
    assert!(pages().all(is_there), "what a device reaches is not taken");
    get(vcpu, SOURCE);
    put(vcpu, many.end - PAGE_SIZE);
    assert!(holds(many.end - PAGE_SIZE, 0..WORDS, |word| word_of(SOURCE, word)), "it is reached");
    assert_eq!(call(PART, MANY, many.end - MANY, 0).0, DONE, "part from all");
    until_taken(vcpu, many.clone(), USED);
    for page in pages().take(address(MANY_PAGES - 1)) {
        assert!(holds(page, 0..512, |word| word_of(page, word)), "{page:#x} came back as it was");
    }
    MANY_PAGES
}
