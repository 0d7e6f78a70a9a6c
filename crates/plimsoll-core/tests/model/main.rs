//! The shipped transitions, explored in every order: every state that small machines can reach, with the manager
//! dying between any two of its steps and the guest discarding at any moment.
//!
//! Enters: [`plimsoll_core::machine::Machine`] as it ships, driven step by step. Leaves: a proof by exhaustion, for
//! the configurations below, that no byte is lost, none comes back that the guest gave up, none reaches another
//! machine, and nothing leaks; or the shortest trace that shows otherwise.
//!
//! * [`world`]: one state; what counts as the same state; which values a page may lawfully show.
//! * [`step`]: what guests, kernel and agents may do, and what a crash takes away.
//! * [`driver`]: the manager's protocol, one change of words, kernel call or store call a step.
//! * [`properties`]: what must hold always, and what must have been seen.
//!
//! # Modelled
//! Guests that write, read and discard pages, in one configuration also from a second vCPU during their own discard.
//! The kernel: a discard queues an event, waits for it to be read and zaps at any later moment; COPY answers EAGAIN
//! while an event is queued and EEXIST over a present page; the agent moves the pages of a request one by one and
//! may be refused. The manager: faults, captures of runs, answers, storing, zapping, discards, pins, each cut where a
//! crash can fall. A store shared by all machines, content-addressed, with reference counts. A crash of all managers
//! at once, also during a takeover, and the takeover: barrier, scan, drained discards, counts rebuilt from words.
//! All of a machine is one block, which is left to the kernel while nothing of it is anywhere: then the kernel fills what
//! is touched, and discards make no event. The manager takes it back in two steps, register and look; registering waits
//! for discards without an event. All pages at once may go as a huge page, and are moved back page by page by one call,
//! which stops at a queued discard and, where refusals are modelled, anywhere.
//! A fault needs no waiting vCPU: a page that is not in RAM may be touched at any time, so it may be served at any time.
//!
//! # Lawful
//! A page shows what its guest wrote last, and zeros after a discard. During a discard: old bytes or zeros, and after
//! a racing write the new bytes or zeros. After a crash that took a discard with it that was read and not yet
//! zapped or applied: the guest's own bytes from before that discard.
//!
//! # Not modelled
//! Snapshot files, poison, never-page and device pins; fault-around; two discards of one page or two requests to one
//! agent at a time; page contents being damaged; a store that fails; the shared zero page; a second vCPU racing with a
//! discard across two crashes. Replacement's choice is replaced by any choice. Words are written by one thread, so memory
//! ordering is not explored here.
mod driver;
#[path = "../explore/mod.rs"]
mod explore;
mod properties;
mod step;
mod world;

use plimsoll_core::airlock::Shape;
use world::{Blocks, Drain, Mistake, MoveRule, Outcome, Pager, Race, Threads, Value};

/// Reached with any machine that may crash once.
const BASIC: &[&str] = &[
    "a page is stored",
    "a page comes back from limbo",
    "a page comes back from the store",
    "a new manager serves",
    "it dies idle",
    "it dies before COPY",
    "it dies after COPY",
    "it dies before a release",
    "it dies with intent written",
    "it dies during a move",
    "it dies with bytes put",
    "it dies after a zap",
];

/// Reached as well when the guest discards.
const DISCARDS: &[&str] = &[
    "a page is discarded under its capture",
    "a move brings a page that was discarded",
    "a move finds the page gone",
    "a discard returns before any word knows",
    "COPY finds a discard queued",
    "a resident word has nothing in RAM",
    "a discarded page may come back after a crash",
    "it dies with a discard read",
];

impl explore::Explored for Pager {}

/// Of what need not happen, `expected` must have.
fn explore(name: &str, pager: Pager, expected: &[&[&str]]) {
    explore::explore(name, pager, |seen| expected.iter().any(|names| names.contains(&seen)));
}

/// Explores until a rule is broken; returns which, or `None` when none can be.
fn broken_rule(pager: Pager) -> Option<&'static str> {
    explore::broken_rules(pager).first().copied()
}

/// One page of the machine's own and one that every guest has, so that the store shares it.
fn own_and_common(machine: u8) -> [Option<Value>; world::MAX_PAGES] {
    [Some(Value::Own(machine)), Some(Value::Common), None]
}

fn two_machines() -> Pager {
    Pager {
        machines: 2,
        populated: own_and_common,
        writes: Some(0),
        discards: Some(1),
        captures: Some(2),
        ..Pager::small()
    }
}

fn one_slot_of_two() -> Pager {
    Pager { shape: Shape { slots: 1, slot_pages: 2 }, run: 2, ..Pager::small() }
}

#[test]
fn two_machines_that_share_an_object_keep_their_bytes_through_a_crash() {
    let shared = ["two machines share an object", "it dies with bytes put", "it dies with a discard read"];
    explore("two machines", two_machines(), &[&shared]);
}

#[test]
fn two_machines_that_write_and_discard_never_see_each_others_bytes() {
    let pager = Pager { threads: Threads::OneForAll, writes: Some(1), ..two_machines() };
    explore("two machines that write", pager, &[&["two machines share an object", "a new manager serves"]]);
}

#[test]
fn one_machine_keeps_its_bytes_through_a_crash_anywhere() {
    explore("two pages", Pager::small(), &[BASIC, DISCARDS, &["both airlock slots are in use"]]);
}

#[test]
fn three_pages_compete_for_two_slots() {
    let pager = Pager { pages: 3, discards: Some(1), ..Pager::small() };
    explore("three pages", pager, &[BASIC, DISCARDS]);
}

#[test]
fn a_second_crash_during_the_takeover_changes_nothing() {
    let pager = Pager { discards: Some(1), crashes: 2, also_written: vec![Value::Common], ..Pager::small() };
    explore("two crashes", pager, &[BASIC, DISCARDS, &["it dies while taking over"]]);
}

#[test]
fn runs_refusals_pins_and_zero_pages_in_one_slot_of_two() {
    let pager = Pager {
        also_written: vec![Value::Zero],
        refusals: vec![Outcome::Busy, Outcome::Pinned],
        discards: Some(2),
        ..one_slot_of_two()
    };
    let more =
        ["a page is pinned", "both pages of a run are being moved", "a zero page leaves limbo for nowhere"];
    explore("one slot of two", pager, &[BASIC, DISCARDS, &more]);
}

#[test]
fn a_guest_that_races_with_its_own_discard_harms_only_itself() {
    let pager = Pager { race: Race::Allowed, discards: Some(2), ..Pager::small() };
    explore("racing guest", pager, &[BASIC, DISCARDS]);
}

#[test]
fn a_slot_that_stops_being_filled_is_not_lost() {
    let pager = Pager {
        shape: Shape { slots: 2, slot_pages: 2 },
        run: 2,
        refusals: vec![Outcome::Busy],
        discards: Some(0),
        crashes: 0,
        ..Pager::small()
    };
    explore("two slots of two", pager, &[&["a page is stored", "both pages of a run are being moved"]]);
}

#[test]
fn a_fault_after_a_discard_waits_for_the_move_under_it_by_the_cores_answer_alone() {
    let pager = Pager { move_rule: MoveRule::Core, crashes: 0, ..Pager::small() };
    explore("the core's answer", pager, &[&["a move finds the page gone"]]);
}

/// Its only block is left to the kernel at first, or at any later time when nothing of it is anywhere.
fn left_to_the_kernel() -> Pager {
    Pager { unwatches: Some(1), discards: Some(1), captures: Some(2), ..Pager::small() }
}

/// Its only block goes and comes back whole.
fn whole_blocks() -> Pager {
    Pager {
        blocks: Blocks::Whole,
        shape: Shape { slots: 2, slot_pages: 2 },
        run: 1,
        refusals: vec![Outcome::Busy],
        discards: Some(1),
        captures: Some(2),
        ..Pager::small()
    }
}

/// Reached with a block that is left to the kernel.
const KERNEL: &[&str] = &[
    "the kernel serves a page",
    "a discard that nobody hears of is under way",
    "a page is stored that the kernel had brought",
    "it dies with a block left to the kernel",
    "it dies with a block registered",
];

/// Reached with a block that goes whole.
const WHOLE: &[&str] =
    &["a block comes back whole", "a block comes back half", "it dies with a block moved back"];

#[test]
fn a_block_left_to_the_kernel_keeps_its_bytes_through_a_crash_anywhere() {
    let pager = Pager { discards: Some(2), ..left_to_the_kernel() };
    explore("left to the kernel", pager, &[BASIC, KERNEL]);
}

#[test]
fn a_guest_that_races_with_a_discard_nobody_hears_of_harms_only_itself() {
    let pager = Pager { race: Race::Allowed, ..left_to_the_kernel() };
    explore("racing with the kernel", pager, &[BASIC, KERNEL]);
}

#[test]
fn a_second_crash_before_a_block_is_registered_again_changes_nothing() {
    let pager = Pager { crashes: 2, captures: Some(1), ..left_to_the_kernel() };
    explore("two crashes and the kernel", pager, &[BASIC, KERNEL, &["it dies while taking over"]]);
}

#[test]
fn a_block_that_goes_and_comes_back_whole_keeps_its_bytes_through_a_crash_anywhere() {
    explore("whole blocks", whole_blocks(), &[BASIC, WHOLE]);
}

/// A discard may take its page away while the block is on its way back, long after its event was read: between an earlier
/// crash and a later one, or under a guest that goes on using what it discards.
#[test]
fn a_crash_with_a_block_moved_back_and_a_page_of_it_gone_loses_nothing() {
    let pager = Pager { crashes: 2, captures: Some(1), refusals: vec![], writes: Some(1), ..whole_blocks() };
    explore("whole blocks, two crashes", pager, &[&["a block comes back whole"]]);
}

#[test]
fn a_guest_that_races_with_its_discard_of_a_whole_block_harms_only_itself() {
    let pager = Pager { race: Race::Allowed, refusals: vec![], ..whole_blocks() };
    explore("racing guest, whole blocks", pager, &[&["a block comes back whole"]]);
}

#[test]
fn a_block_left_to_the_kernel_goes_and_comes_back_whole() {
    let pager = Pager { unwatches: Some(1), refusals: vec![], ..whole_blocks() };
    let more = ["a block comes back whole", "it dies with a block moved back"];
    explore("whole blocks and the kernel", pager, &[BASIC, KERNEL, &more]);
}

#[test]
fn taking_pages_of_a_block_that_is_not_registered_is_found() {
    let pager = Pager { mistake: Some(Mistake::LookWithoutRegister), ..left_to_the_kernel() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn a_new_manager_that_does_not_register_is_found() {
    let pager = Pager { mistake: Some(Mistake::TakeOverWithoutRegister), ..left_to_the_kernel() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn looking_at_a_block_before_it_is_registered_is_found() {
    let pager = Pager { mistake: Some(Mistake::LookBeforeRegister), ..left_to_the_kernel() };
    assert_eq!(broken_rule(pager), Some("what is in guest RAM a word says is there"));
}

#[test]
fn zapping_a_slot_page_before_its_word_changes_is_found() {
    let pager = Pager { mistake: Some(Mistake::ZapBeforeWord), ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn forgetting_queued_discards_is_found() {
    let pager = Pager { mistake: Some(Mistake::SkipDrain), ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn applying_discards_before_the_scan_is_found() {
    let mistake = Some(Mistake::DiscardBeforeScan);
    let pager = Pager { mistake, drain: Drain::BeforeScan, ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

/// A reading of a discard lets its zap happen. If the word still names a slot page although newer bytes were in RAM,
/// only the scan corrects it; a crash between the two brings back bytes older than those that were discarded.
#[test]
fn draining_before_the_scan_lets_a_second_crash_bring_back_older_bytes() {
    let pager = Pager {
        drain: Drain::BeforeScan,
        crashes: 2,
        discards: Some(1),
        also_written: vec![Value::Common],
        ..Pager::small()
    };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn asking_for_a_move_before_the_words_say_so_is_found() {
    let pager = Pager { mistake: Some(Mistake::MoveBeforeIntent), ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn a_move_of_the_old_manager_after_the_scan_is_found() {
    let pager = Pager { mistake: Some(Mistake::SkipBarrier), ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("every page reads as its guest last left it"));
}

#[test]
fn releasing_an_object_before_its_word_changes_is_found() {
    let pager = Pager { mistake: Some(Mistake::ReleaseBeforeWord), ..Pager::small() };
    assert_eq!(broken_rule(pager), Some("an object has a reference for every word that names it"));
}
