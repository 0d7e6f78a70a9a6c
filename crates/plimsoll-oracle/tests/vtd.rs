//! VT-d: QEMU's model agrees with the crate on every transfer and recorded fault; and a wrong crate would be found.
mod common;

use common::{Mistake, check, is_wanting, notices, seed};
use plimsoll_mmu::format::vtd::{Second3, Second4, VtdFormat};
use plimsoll_mmu::vtd::Request;
use plimsoll_mmu::{Feature, Format, Level};
use plimsoll_oracle::vtd::{HARDWARE, VtdCase, options, own_tables, run};
use plimsoll_oracle::{Chance, Outcome, Report, Run};

/// Cases of a format.
const CASES: usize = 5_000;
/// Of trees that the mapper made.
const GROWN: usize = 500;

fn execute<F: VtdFormat>(cases: &[VtdCase<F>]) -> Vec<Outcome> {
    let run = Run { options: &options::<F>(), words: &run::<F>(), memory: own_tables() };
    HARDWARE.execute(&run, cases).unwrap_or_else(|error| panic!("{error}"))
}

/// Drawn ones, and then grown ones.
fn cases<F: VtdFormat>() -> Vec<VtdCase<F>> {
    let mut chance = Chance::new(seed());
    let drawn = (0..CASES).map(|_| VtdCase::draw(&mut chance)).collect();
    [drawn, VtdCase::grow(&mut Chance::new(seed()), GROWN)].concat()
}

#[test]
fn devices_with_three_levels_reach_what_the_model_lets_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let cases = cases::<Second3>();
    check(Second3::NAME, &Report::new(&cases, &execute(&cases)), 1000);
}

#[test]
fn devices_with_four_levels_reach_what_the_model_lets_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let cases = cases::<Second4>();
    let outcomes = execute(&cases);
    check(Second4::NAME, &Report::new(&cases, &outcomes), 1000);
    // The same outcomes against a crate that is wrong in one respect each.
    let wrong: [Mistake<VtdCase<Second4>>; 6] = [
        ("HAW", |case| case.registers.caps.physical_bits = 49),
        ("MGAW", |case| case.registers.caps.input_bits = 47),
        ("pages of 1 GiB", |case| case.registers.caps.largest_leaf = Level(2)),
        ("snoop control", |case| case.registers.caps.snoop_control = Feature::Off),
        ("TM", |case| case.registers.caps.transient = Feature::On),
        ("reads and writes", |case| case.request = Request::Read),
    ];
    notices(&cases, &outcomes, &wrong);
}
