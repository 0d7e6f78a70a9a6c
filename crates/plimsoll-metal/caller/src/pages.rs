//! Writes what it executes, and seals what it has written.
//!
//! Enters: nothing. Leaves: how many checks were made, or a death by its own doing. The code that it writes is a page that the settings
//! name by its digest: the same bytes are in `tests/metal/guard.rs`.
use crate::vcpu::{Vcpu, address};
use crate::{
    DISCARD, DONE, IN_USE, INVALID, NOT_ALLOWED, PAGES, SEAL, WINDOW, call, is_there, read, until_taken,
    write,
};
use core::hint::black_box;
use core::ops::Range;
use core::ptr::with_exposed_provenance;
use plimsoll_guest::abi::{PAGE_SIZE, channel_gpa};

/// Of [`PAGES`]: how often a page was found to be known when it was executed.
const VERIFIED: u64 = 6;
const CODE: u64 = 8 << 20;
/// What is used meanwhile.
const USED: Range<u64> = 9 << 20..16 << 20;
/// Memory that is sealed.
const SEALED: u64 = 9 << 20;
const SEALED_PAGES: u64 = 1536;

/// A page that answers `answer`: mov eax, answer; ret; and breakpoints behind it.
fn compile(answer: u32) {
    write(CODE, 0xcccc_c300_0000_00b8 | u64::from(answer) << 8);
    (1..512).for_each(|word| write(CODE + word * 8, u64::MAX / 255 * 0xcc));
}

fn execute() -> u32 {
    let code = with_exposed_provenance::<()>(address(CODE));
    // SAFETY: `compile` has put a function of this kind there, and the guest's own tables let it be executed. Where the hypervisor
    // does not, it ends this guest.
    unsafe { core::mem::transmute::<*const (), extern "C" fn() -> u32>(code)() }
}

fn verified() -> u64 {
    call(PAGES, VERIFIED, 0, 0).1
}

/// Executes what is known, however often it is written, taken and brought back.
pub fn run_known(vcpu: &mut Vcpu) -> u64 {
    assert!(verified() > 0, "this program is executed, so it was looked at");
    // Twice, because this program is code, too: of what it runs here itself some may lie in a page that was not looked at before.
    for round in 0..black_box(2) {
        compile(42);
        let before = verified();
        assert_eq!(execute(), 42, "known code runs");
        assert_eq!(execute(), 42, "and again");
        let looks = verified() - before;
        compile(7);
        assert_eq!(read(CODE + 8), u64::MAX / 255 * 0xcc, "what was executed can be written");
        compile(42);
        assert_eq!(execute(), 42, "it is what it was");
        let again = verified() - before - looks;
        assert!(round == 0 || (looks, again) == (1, 1), "it is looked at once, and again: {looks}, {again}");
    }
    USED.step_by(address(PAGE_SIZE)).for_each(|page| write(page, page));
    for again in 1..=2 {
        // Others need memory, and take it while nobody runs it.
        until_taken(vcpu, CODE..CODE + PAGE_SIZE, USED);
        let seen = verified();
        assert_eq!(execute(), 42, "it came back as it was");
        assert!(verified() > seen, "and was looked at again, {again}");
    }
    verified()
}

/// Executes one known page, changes it to one that is not, and executes that.
pub fn run_unknown() -> u64 {
    compile(42);
    assert_eq!(execute(), 42, "known code runs");
    compile(43);
    u64::from(execute())
}

fn word_of(word: u64) -> u64 {
    word / 8 + 1
}

fn holds() -> bool {
    (0..SEALED_PAGES * 512).step_by(8).all(|word| read(SEALED + word * 8) == word_of(word))
}

/// Seals memory, finds it as it was after it was taken, and dies of writing it.
pub fn seal(vcpu: &mut Vcpu) -> u64 {
    let bytes = SEALED_PAGES * PAGE_SIZE;
    (0..SEALED_PAGES * 512).for_each(|word| write(SEALED + word * 8, word_of(word)));
    for (gpa, bytes, status) in [
        (SEALED + 1, PAGE_SIZE, INVALID),
        (SEALED, PAGE_SIZE + 1, INVALID),
        (SEALED, 0, INVALID),
        (WINDOW - PAGE_SIZE, 2 * PAGE_SIZE, INVALID),
        (u64::MAX - 4095, 2 * PAGE_SIZE, INVALID),
        (channel_gpa(0), PAGE_SIZE, IN_USE),
        (SEALED, bytes, DONE),
        (SEALED, bytes, DONE),
    ] {
        assert_eq!(call(SEAL, gpa, bytes, 0).0, status, "{gpa:#x}, {bytes:#x}");
    }
    assert_eq!(call(DISCARD, SEALED + PAGE_SIZE, PAGE_SIZE, 0).0, NOT_ALLOWED, "it is not given back");
    until_taken(vcpu, SEALED..SEALED + bytes, SEALED..SEALED + PAGE_SIZE);
    let mut pages = (SEALED..SEALED + bytes).step_by(address(PAGE_SIZE));
    let Some(taken) = pages.find(|page| !is_there(*page)) else { panic!("it came back by itself") };
    assert!(holds(), "it was taken and came back as it was");
    // And sealed.
    write(taken + PAGE_SIZE - 8, 0);
    0
}
