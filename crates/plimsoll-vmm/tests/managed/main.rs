//! The shipped manager over real machines: KVM guests in processes of their own, real userfaultfds, real kills.
//!
//! Enters: the names of tests to run, or a role and its configuration when this program starts itself as one of the
//! machines ([`fleet`]) or as a VMM that breaks the protocol ([`impostor`]). Leaves: the standard harness's lines.
//! Tests run one after the other on the main thread, because they count this process's descriptors, and because a
//! child's parent-death signal belongs to the thread that started it.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

mod ahead;
mod balloon;
mod crash;
mod evict;
mod fleet;
mod giveback;
#[expect(dead_code, reason = "slots are kept; only machines of other tests look into theirs")]
mod goods;
mod handover;
mod harness;
mod hostile;
mod impostor;
mod killed;
mod merged;
mod parked;
mod poison;
mod probes;
mod sharded;
mod sharing;

use harness::{Missing, Test};
use plimsoll_sys::uffd::{Mode, Userfaultfd};
use plimsoll_vmm::{Accel, probe};
use std::process::ExitCode;

const TESTS: [Test; 37] = [
    ("a_machine_that_vanishes_while_its_pages_are_brought_leaves_nothing", ahead::vanishes_meanwhile),
    ("small_pages_that_became_hot_are_made_huge_again", ahead::hot_blocks_become_huge),
    ("a_vmm_killed_at_any_step_of_a_capture_leaves_nothing_behind", killed::at_any_step_of_a_capture),
    ("a_damaged_page_is_reported_and_harms_only_its_machine", poison::a_damaged_page),
    ("guests_evicted_again_and_again_read_no_wrong_word", evict::again_and_again),
    ("a_guest_of_which_everything_is_wanted_still_goes_on", evict::under_a_standing_order),
    ("guests_outlive_manager_crashes_without_a_wrong_word", crash::guests_outlive_manager_crashes),
    ("malformed_hand_overs_are_refused_by_name_and_leak_nothing", handover::malformed),
    ("random_hand_overs_are_refused_and_leak_nothing", handover::random),
    ("a_vmm_whose_hand_over_is_refused_is_told_why", handover::is_told_why),
    ("a_claim_whose_tables_exceed_the_budget_is_refused", handover::tables_beyond_the_budget),
    ("a_sharded_guest_outlives_manager_crashes_without_a_wrong_word", sharded::outlives_managers),
    ("a_sharded_vmm_that_is_killed_leaves_nothing_behind", sharded::is_killed),
    ("a_damaged_page_of_any_shard_is_named_by_its_place_in_the_machine", sharded::is_damaged),
    ("a_machine_of_which_one_shard_cannot_be_taken_over_is_lost_whole", sharded::is_lost_whole),
    ("a_hand_over_of_shards_that_are_no_machine_leaks_nothing", sharded::is_no_machine),
    ("an_agent_that_breaks_the_protocol_loses_its_machine_only", hostile::breaks_the_protocol),
    ("an_agent_that_lies_about_a_move_holds_nobody_up_after_its_end", hostile::lies),
    ("a_live_vmm_that_closes_its_socket_is_reported_and_stays_charged", hostile::closes_and_lives),
    ("a_guest_that_touches_everything_does_not_starve_the_others", sharing::fairness),
    ("at_a_steady_rate_faults_rarely_wait_for_a_capture", sharing::rarely_waits),
    ("the_hard_line_holds_while_guests_populate_three_budgets", sharing::hard_line),
    (
        "the_hard_line_holds_although_nothing_is_stored_before_somebody_is_about_to_wait",
        sharing::hard_line_on_demand,
    ),
    ("storing_ahead_of_demand_takes_its_share_of_a_processor_and_nobody_waits", sharing::storing_is_budgeted),
    ("a_machine_that_is_given_back_goes_on_alone_with_every_page", giveback::goes_on_alone),
    ("a_machine_that_was_to_be_given_back_and_is_not_is_managed_as_before", giveback::stays_after_all),
    (
        "a_manager_that_crashes_while_it_gives_back_leaves_the_machine_to_the_next",
        giveback::is_taken_over_in_the_middle,
    ),
    ("pages_that_ksm_has_merged_are_captured_and_come_back_right", merged::are_captured),
    ("what_the_balloon_has_is_neither_stored_nor_in_limbo", balloon::is_not_kept),
    ("what_a_guest_gave_is_counted_by_how_whoever_manages", balloon::is_counted_apart),
    ("a_balloon_and_taken_frames_outlive_manager_crashes_without_a_wrong_word", balloon::outlives_managers),
    ("bookkeeping_stays_within_its_promise", sharing::bookkeeping),
    ("a_parked_machine_goes_to_the_disk_whole_and_wakes_right", parked::wakes_right),
    ("parked_guests_outlive_managers_without_a_wrong_word", parked::outlive_managers),
    ("a_fault_that_waits_for_the_disk_keeps_no_other_waiting", parked::slow_disk),
    ("what_a_full_disk_does_not_take_stays_in_the_store", parked::full_disk),
    ("a_page_that_went_bad_on_the_disk_is_poisoned_and_no_other_machine_is_harmed", parked::bad_disk),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [fleet::ROLE, config, handover] => return fleet::child(config, handover.parse().unwrap()),
        [impostor::ROLE, conduct, handover] => return impostor::child(conduct, handover.parse().unwrap()),
        _ => {}
    }
    harness::run(&arguments, &TESTS, missing)
}

fn missing() -> Option<Missing> {
    if let Err(error) = Userfaultfd::open(Mode::KernelAndUser) {
        return Some(Missing { name: "userfaultfd", why: fleet::explain(&error) });
    }
    match probe() {
        Accel::Kvm { .. } => None,
        accel => Some(Missing { name: "kvm", why: accel.to_string() }),
    }
}
