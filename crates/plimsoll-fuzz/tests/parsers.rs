//! Every parser against what was never meant for it: what must hold of each is its body's business (`plimsoll_fuzz::TARGETS`).
//!
//! Enters: examples of what is right, and a seed. Leaves: nothing; the input where something did not hold. Inputs are examples with a
//! few changes each, the same in every run.
use plimsoll_fuzz::mutate::changed;
use plimsoll_fuzz::{TARGETS, Target, target};
use plimsoll_guest::random::Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Inputs a parser gets beside its examples,
const CHANGED: u64 = 20_000;
/// and those get that speak through sockets, set a disk up, or decide.
const CHANGED_SLOW: u64 = 1000;

/// Has a target read its examples, of which it must accept each, and so many changed ones.
fn endures(name: &str, inputs: u64) {
    let Target { body, examples, .. } = target(name).expect("no such target");
    let examples = examples();
    assert!(!examples.is_empty());
    for (number, example) in examples.iter().enumerate() {
        assert!(body(example), "example {number} is refused: {}", example.escape_ascii());
    }
    let mut random = Rng::new(examples.len() as u64);
    for input in 0..inputs {
        let bytes = changed(&examples, &mut random);
        let outcome = catch_unwind(AssertUnwindSafe(|| body(&bytes)));
        assert!(outcome.is_ok(), "input {input}: {}", bytes.escape_ascii());
    }
}

macro_rules! endures {
    ($($test:ident: $target:literal, $changed:expr;)+) => {
        $(#[test]
        fn $test() {
            endures($target, $changed);
        })+

        #[test]
        fn no_target_is_left_out() {
            let tested = [$($target),+];
            assert_eq!(TARGETS.map(|target| target.name), tested);
        }
    };
}

endures! {
    what_a_vmm_hands_over_and_a_manager_asks_is_refused_or_says_itself_again: "handover", CHANGED;
    what_a_manager_asks_its_keeper_is_refused_or_says_itself_again: "keeper", CHANGED;
    settings_of_an_operator_are_read_or_refused_with_a_place: "settings", CHANGED;
    what_clients_say_is_refused_or_says_itself_again: "requests", CHANGED;
    what_qemu_and_the_kernel_print_is_read_or_is_not: "prints", CHANGED;
    a_monitor_that_says_anything_and_hangs_up_keeps_nobody_waiting: "qmp", CHANGED_SLOW;
    a_server_that_answers_anything_and_hangs_up_keeps_nobody_waiting: "rest", CHANGED_SLOW;
    a_record_of_anything_is_read_and_decided_again_to_its_end: "records", CHANGED_SLOW;
    a_disk_that_somebody_else_writes_to_gives_back_what_was_stored_or_nothing: "disk", CHANGED_SLOW;
    a_page_word_is_one_that_a_transition_writes_or_none: "words", CHANGED;
    a_walk_through_any_tables_reads_no_more_entries_than_there_are_levels: "walks", CHANGED;
    a_visit_of_any_tables_ends_and_shows_what_a_walk_finds: "tables", CHANGED_SLOW;
    the_host_takes_a_frame_only_where_its_word_says_that_it_is_free: "frames", CHANGED;
    a_client_that_sends_anything_is_answered_in_whole_answers_or_hung_up_on: "http", CHANGED_SLOW;
    a_note_of_anybodys_is_refused_or_says_itself_again: "notes", CHANGED;
}

#[test]
fn libfuzzer_has_a_program_for_each_target() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/Cargo.toml");
    let manifest = std::fs::read_to_string(path).expect("fuzz/Cargo.toml is there");
    let programs: Vec<&str> =
        manifest.split("[[bin]]").skip(1).filter_map(|part| part.split('"').nth(1)).collect();
    assert_eq!(programs, TARGETS.map(|target| target.name));
}
