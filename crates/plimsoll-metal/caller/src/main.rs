//! A guest that asks the hypervisor for extents, and gives, lends and shares them: roles told apart by the parameter page's seed.
//!
//! Enters: the parameter page. Leaves: a last report, or a message that says which promise was broken. Machine 1 is the owner, 2 the borrower,
//! 3 asks for what it must not have. They meet in a page that the owner shares with the borrower; handles need no telling,
//! for they are no secret: rights are what counts. Others are kernels: 4 and 5 have address spaces of their own ([`spaces`]), 5 by asking for
//! every entry; 6 to 8 ask so for what they must not have ([`forger`]). 9 owns a device ([`device`]); 10 to 12 write what they execute and
//! seal what they wrote ([`pages`]). 13 owns extents and asks for anything at random ([`fuzz`]).
//!
//! ```text
//! owner                                   borrower
//! grants A, writes it, shares it to read  maps A when it may, reads what was written
//! grants B, shares it to write            maps B, says 1 in it
//! reclaims A, writes it, says 1           may no longer map A; says 2
//! lends A, may no longer map it, says 2   maps A, finds zeros, writes it, then says 3 and dies of a stray access
//! maps A when it is back, finds zeros; releases both, after which no handle means anything
//! ```
#![no_std]
#![no_main]

mod device;
#[path = "../../../plimsoll-guest/image/src/entry.rs"]
mod entry;
mod forger;
mod fuzz;
#[path = "../../../plimsoll-guest/image/src/mem.rs"]
mod mem;
mod pages;
mod spaces;
mod tables;
#[path = "../../../plimsoll-guest/image/src/vcpu.rs"]
mod vcpu;

use core::arch::asm;
use core::fmt::Write;
use core::ops::Range;
use core::panic::PanicInfo;
use core::ptr::{read_volatile, with_exposed_provenance, with_exposed_provenance_mut, write_volatile};
use entry::Message;
use plimsoll_guest::Machine;
use plimsoll_guest::abi::{PAGE_SIZE, PAGE_TABLES_GPA, Phase, Report, STOP_NO};
use tables::{Asked, Own};
use vcpu::{Vcpu, address};

/// Where extents are mapped: the block behind this guest's memory, which has 16 MiB.
const WINDOW: u64 = 16 << 20;
const BLOCK: u64 = 2 << 20;
const WORDS: u64 = PAGE_SIZE / 8;
/// The first two extents there ever are: slot 0 and 1, generation 1.
const A: u64 = 1 << 32;
const B: u64 = A | 1;
const READ: u64 = 1;
const READ_WRITE: u64 = 3;
/// Statuses, as the hypervisor's `calls` has them.
const DONE: u64 = 0;
const INVALID: u64 = 2;
const NO_SUCH_EXTENT: u64 = 3;
const NOT_ALLOWED: u64 = 4;
const IN_USE: u64 = 5;
const NO_SUCH_CALL: u64 = 1;
const NO_ROOM: u64 = 6;
/// Calls, likewise.
const GRANT: u64 = 2;
const MAP: u64 = 3;
const UNMAP: u64 = 4;
const LEND: u64 = 6;
const SHARE: u64 = 7;
const RECLAIM: u64 = 8;
const RELEASE: u64 = 10;
const PAGES: u64 = 0;
const DISCARD: u64 = 1;
const SEAL: u64 = 15;
/// Of [`PAGES`].
const THERE: u64 = 7;
/// Calls that machine 3 makes.
const WRONG_CALLS: u64 = 20_000;

extern "C" fn guest_main() -> ! {
    // SAFETY: `_start` calls this once, on processor 0, the only one.
    let mut vcpu = unsafe { Vcpu::new(0) };
    let seed = vcpu.params().seed;
    // What kernels do is over before the others' work begins.
    let kernel = match seed {
        4 => Some(spaces::run(&mut Own)),
        5 => Some(spaces::run(&mut Asked::new())),
        6..=8 => forger::run(&mut vcpu, seed),
        _ => None,
    };
    if let Some((checks, sum)) = kernel {
        vcpu.done(&Report { operations: sum, ..report(Phase::Done, checks) });
    }
    vcpu.report(&report(Phase::Running, 0));
    // Maps the block behind this guest's memory to itself: present, writable, a user's, accessed, dirty, 2 MiB. What is
    // behind it is the hypervisor's to say.
    write(PAGE_TABLES_GPA + 0x2000 + WINDOW / BLOCK * 8, WINDOW | 0xe7);
    let checks = match seed {
        1 => own(&mut vcpu),
        2 => borrow(&mut vcpu),
        3 => ask_wrongly(),
        9 => device::own(&mut vcpu),
        10 => pages::run_known(&mut vcpu),
        11 => pages::run_unknown(),
        12 => pages::seal(&mut vcpu),
        // What is random is the workload's seed: that of the program is its role.
        13 => fuzz::run(vcpu.params().workload.seed),
        other => panic!("no role has seed {other}: use 1 to 13"),
    };
    vcpu.done(&report(Phase::Done, checks))
}

fn report(phase: Phase, checks: u64) -> Report {
    Report { sequence: 1, phase: phase as u32, verified_pages: checks, ..Report::EMPTY }
}

/// Asks the hypervisor. Status and value.
fn call(number: u64, first: u64, second: u64, third: u64) -> (u64, u64) {
    let (status, value);
    // SAFETY: leaves for the hypervisor, which changes rax and rdx, and memory only as this file expects.
    unsafe {
        asm!("vmmcall", inlateout("rax") number => status, in("rdi") first, in("rsi") second,
            inlateout("rdx") third => value, in("rcx") 0, options(nostack, preserves_flags));
    }
    (status, value)
}

fn read(gpa: u64) -> u64 {
    // SAFETY: callers pass aligned addresses that no Rust object is at, and that are mapped; where the hypervisor has nothing
    // behind one, it ends this guest.
    unsafe { read_volatile(with_exposed_provenance(address(gpa))) }
}

fn write(gpa: u64, word: u64) {
    // SAFETY: as in `read`.
    unsafe { write_volatile(with_exposed_provenance_mut(address(gpa)), word) };
}

/// Whether a page of this guest is in RAM, and not elsewhere.
fn is_there(gpa: u64) -> bool {
    call(PAGES, THERE, gpa, 0).1 == 1
}

/// Has others take what is not used until one of these pages is out: by using what is not among them.
fn until_taken(vcpu: &mut Vcpu, pages: Range<u64>, used: Range<u64>) {
    let mut turn = used.clone().step_by(address(PAGE_SIZE)).cycle();
    while pages.clone().step_by(address(PAGE_SIZE)).all(is_there) {
        turn.by_ref().take(64).for_each(|page| {
            let _ = read(page);
        });
        wait(vcpu);
    }
}

fn fill(gpa: u64, seed: u64) {
    (0..WORDS).for_each(|word| write(gpa + word * 8, seed + word));
}

fn holds(gpa: u64, word_of: impl Fn(u64) -> u64) -> bool {
    (0..WORDS).all(|word| read(gpa + word * 8) == word_of(word))
}

/// Lets others do what they must do first, as long as the work lasts.
fn wait(vcpu: &mut Vcpu) {
    vcpu.idle(1_000_000);
    assert!(vcpu.stop() == STOP_NO, "another guest has not done its part");
}

/// Asks until it is done.
fn until_done(vcpu: &mut Vcpu, number: u64, first: u64, second: u64) -> u64 {
    loop {
        match call(number, first, second, 0) {
            (DONE, value) => return value,
            _ => wait(vcpu),
        }
    }
}

fn until(vcpu: &mut Vcpu, gpa: u64, word: u64) {
    while read(gpa) != word {
        wait(vcpu);
    }
}

fn own(vcpu: &mut Vcpu) -> u64 {
    let (mine, meeting) = (WINDOW, WINDOW + PAGE_SIZE);
    assert_eq!(call(GRANT, 0, 0, 0), (DONE, A), "the first extent");
    assert_eq!(call(MAP, A, mine, 0), (DONE, 7), "an owner may do everything");
    assert!(holds(mine, |_| 0), "granted memory is zeroed");
    fill(mine, 1000);
    assert_eq!(call(SHARE, A, 2, READ), (DONE, A), "share");
    assert_eq!(call(GRANT, 0, 0, 0), (DONE, B), "the second extent");
    assert_eq!(call(MAP, B, meeting, 0).0, DONE, "map the second");
    assert_eq!(call(SHARE, B, 2, READ_WRITE).0, DONE, "share the second");
    until(vcpu, meeting, 1);
    assert_eq!(call(RELEASE, A, 0, 0).0, IN_USE, "what is shared is not released");
    assert_eq!(call(RECLAIM, A, 0, 0), (DONE, A), "reclaim");
    assert!(holds(mine, |word| 1000 + word), "a sharer may keep what it wrote");
    fill(mine, 5000);
    write(meeting + 8, 1);
    until(vcpu, meeting, 2);
    assert_eq!(call(LEND, A, 2, READ_WRITE), (DONE, A), "lend");
    assert_eq!(call(MAP, A, mine, 0).0, NO_SUCH_EXTENT, "a lender does not reach it");
    // Not before: the borrower gives it back by dying.
    write(meeting + 8, 2);
    until(vcpu, meeting, 3);
    // The borrower dies of its own doing, and only then it is ours again.
    assert_eq!(until_done(vcpu, MAP, A, mine), 7, "a lender has it back");
    assert!(holds(mine, |_| 0), "and it comes back zeroed");
    assert_eq!(call(RECLAIM, B, 0, 0).0, IN_USE, "the dead share nothing");
    assert_eq!((call(RELEASE, A, 0, 0).0, call(RELEASE, B, 0, 0).0), (DONE, DONE), "release");
    for old in [A, B] {
        assert_eq!(call(MAP, old, mine, 0).0, NO_SUCH_EXTENT, "a released extent's handle means nothing");
        assert_eq!(call(RELEASE, old, 0, 0).0, NO_SUCH_EXTENT, "nor when the call is replayed");
    }
    17
}

fn borrow(vcpu: &mut Vcpu) -> u64 {
    let (theirs, meeting) = (WINDOW, WINDOW + PAGE_SIZE);
    assert_eq!(until_done(vcpu, MAP, A, theirs), READ, "as was shared");
    assert!(holds(theirs, |word| 1000 + word), "what the owner wrote");
    assert_eq!(call(SHARE, A, 3, READ).0, NOT_ALLOWED, "only an owner shares");
    assert_eq!(call(MAP, A, WINDOW + 8 * PAGE_SIZE, 0).0, IN_USE, "once in each guest");
    until_done(vcpu, MAP, B, meeting);
    write(meeting, 1);
    until(vcpu, meeting + 8, 1);
    assert_eq!(call(UNMAP, A, 0, 0).0, NO_SUCH_EXTENT, "a reclaimed extent is mapped no more");
    assert_eq!(call(MAP, A, theirs, 0).0, NO_SUCH_EXTENT, "nor can it be");
    write(meeting, 2);
    assert_eq!(until_done(vcpu, MAP, A, theirs), READ_WRITE, "as was lent");
    assert!(holds(theirs, |_| 0), "not a word of the lender's");
    fill(theirs, 9000);
    until(vcpu, meeting + 8, 2);
    write(meeting, 3);
    // Nothing is behind the third page of the window: the guest ends here.
    read(WINDOW + 2 * PAGE_SIZE)
}

/// Makes calls with arguments of which each is wrong for a machine that owns nothing and was let have nothing.
fn ask_wrongly() -> u64 {
    let handles = [A, B, A | 7, A << 1, A << 1 | 1, 0xffff_ffff, u64::MAX, 11, 63, 1 << 63];
    let others =
        [0, 1, 2, 3, 4, 7, WINDOW, WINDOW + 1, WINDOW + PAGE_SIZE, 1 << 48, u64::MAX - 4095, u64::MAX];
    let pick = |from: &[u64], number: u64| from[address(number % from.len() as u64)];
    let mut state = 1u64;
    for number in 0..WRONG_CALLS {
        // A full-period generator (Knuth, MMIX); its upper bits.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let which = if number % 16 == 15 { state } else { state >> 40 & 15 };
        let (first, second, third) =
            (pick(&handles, state >> 50), pick(&others, state >> 33), pick(&others, state >> 24));
        let (status, value) = call(which, first, second, third);
        assert!(status != DONE, "call {which} of {first:#x}, {second:#x}, {third:#x} was done: {value:#x}");
    }
    assert_eq!(
        call(MAP, A, WINDOW + 1, 0).0,
        NO_SUCH_EXTENT,
        "an address is not looked at before rights are"
    );
    assert_eq!(call(DISCARD, WINDOW, PAGE_SIZE, 0).0, INVALID, "what is not its own is not discarded");
    WRONG_CALLS
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let mut message = Message::EMPTY;
    // What is too long is cut off: the rest has nowhere to go.
    let _ = write!(message, "{}", info.message());
    // SAFETY: the one processor; the other `Vcpu` is not used any more.
    unsafe { Vcpu::new(0) }.panicked(&message.bytes, message.len)
}
