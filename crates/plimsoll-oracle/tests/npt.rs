//! Nested paging: QEMU's model agrees with the crate on every access, exit, accessed and dirty bit of both stages.
mod common;

use common::{Mistake, check, is_wanting, notices, seed};
use plimsoll_mmu::format::x86::{Long4, Long5, X86Format};
use plimsoll_mmu::x86::Control;
use plimsoll_mmu::{Feature, Format};
use plimsoll_oracle::npt::{HARDWARE, NptCase, OPTIONS};
use plimsoll_oracle::x86::{Processor, own_tables};
use plimsoll_oracle::{Chance, Outcome, Report, Run};

/// Cases of a format.
const CASES: usize = 10_000;
/// Of trees that the mapper made.
const GROWN: usize = 1_000;

fn execute<F: X86Format>(cases: &[NptCase<F>]) -> Vec<Outcome> {
    // The host's own tables have four levels.
    let words = Processor::default().run::<Long4>();
    let run = Run { options: &OPTIONS, words: &words[1..], memory: own_tables() };
    HARDWARE.execute(&run, cases).unwrap_or_else(|error| panic!("{error}"))
}

fn drawn<F: X86Format>() -> Vec<NptCase<F>> {
    let mut chance = Chance::new(seed());
    (0..CASES).map(|_| NptCase::draw(&mut chance, Processor::default().caps)).collect()
}

#[test]
fn guests_of_four_levels_see_what_the_model_shows_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let cases = drawn::<Long4>();
    let outcomes = execute(&cases);
    check(&format!("{}, nested", Long4::NAME), &Report::new(&cases, &outcomes), 1000);
    // The same outcomes against a crate that is wrong in one respect each.
    let wrong: [Mistake<NptCase<Long4>>; 7] = [
        ("the host's NX", |case| case.host.caps.no_execute = Feature::On),
        ("the guest's NX", |case| case.guest.caps.no_execute = Feature::On),
        ("nested MAXPHYADDR", |case| case.host.caps.physical_bits = 41),
        ("nested pages of 1 GiB", |case| case.host.caps.gib_pages = Feature::Off),
        ("nested SMEP", |case| case.host.control.insert(Control::SMEP)),
        ("WP", |case| case.guest.control.toggle(Control::WRITE_PROTECT)),
        ("keys", |case| case.guest.caps.keys = Feature::Off),
    ];
    notices(&cases, &outcomes, &wrong);
}

#[test]
fn guests_of_five_levels_see_what_the_model_shows_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let cases = drawn::<Long5>();
    check(&format!("{}, nested", Long5::NAME), &Report::new(&cases, &execute(&cases)), 1000);
}

#[test]
fn guests_see_through_trees_that_the_mapper_made_what_the_model_shows_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let cases = NptCase::<Long4>::grow(&mut Chance::new(seed()), Processor::default().caps, GROWN);
    check("nested, grown", &Report::new(&cases, &execute(&cases)), GROWN / 20);
}
