//! x86-64: QEMU's model agrees with the crate on every access, fault, accessed and dirty bit; and a wrong crate would be found.
mod common;

use common::{Mistake, check, is_wanting, notices, seed};
use plimsoll_mmu::format::x86::{Long4, Long5, X86Format};
use plimsoll_mmu::x86::Control;
use plimsoll_mmu::{Feature, Format};
use plimsoll_oracle::x86::{HARDWARE, Processor, X86Case, own_tables};
use plimsoll_oracle::{Chance, Outcome, Report, Run};

/// Cases of a format.
const CASES: usize = 20_000;
/// Of trees that the mapper made.
const GROWN: usize = 1_000;

fn execute<F: X86Format>(processor: &Processor, cases: &[X86Case<F>]) -> Vec<Outcome> {
    let (options, words) = (processor.options(), processor.run::<F>());
    let run = Run { options: &options, words: &words, memory: own_tables() };
    HARDWARE.execute(&run, cases).unwrap_or_else(|error| panic!("{error}"))
}

fn drawn<F: X86Format>(processor: &Processor, count: usize) -> Vec<X86Case<F>> {
    let mut chance = Chance::new(seed());
    (0..count).map(|_| X86Case::draw(&mut chance, processor)).collect()
}

#[test]
fn four_levels_are_translated_as_the_model_translates_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let processor = Processor::default();
    let cases = drawn::<Long4>(&processor, CASES);
    let outcomes = execute(&processor, &cases);
    check(Long4::NAME, &Report::new(&cases, &outcomes), 1000);
    // The same outcomes against a crate that is wrong in one respect each.
    let wrong: [Mistake<X86Case<Long4>>; 7] = [
        ("WP", |case| case.registers.control.toggle(Control::WRITE_PROTECT)),
        ("SMEP", |case| case.registers.control.remove(Control::SMEP)),
        ("SMAP", |case| case.registers.control.remove(Control::SMAP)),
        ("AC", |case| case.registers.control.remove(Control::ALIGNMENT_CHECK)),
        ("keys", |case| case.registers.caps.keys = Feature::Off),
        ("NX", |case| case.registers.caps.no_execute = Feature::On),
        ("MAXPHYADDR", |case| case.registers.caps.physical_bits = 41),
    ];
    notices(&cases, &outcomes, &wrong);
}

#[test]
fn five_levels_are_translated_as_the_model_translates_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let processor = Processor::default();
    let cases = drawn::<Long5>(&processor, CASES);
    check(Long5::NAME, &Report::new(&cases, &execute(&processor, &cases)), 1000);
}

#[test]
fn trees_that_the_mapper_made_are_translated_as_the_model_translates_them() {
    fn agree<F: X86Format>(processor: &Processor) {
        let cases = X86Case::<F>::grow(&mut Chance::new(seed()), processor, GROWN);
        check(&format!("{}, grown", F::NAME), &Report::new(&cases, &execute(processor, &cases)), GROWN / 10);
    }
    if is_wanting(&HARDWARE) {
        return;
    }
    let processor = Processor::default();
    agree::<Long4>(&processor);
    agree::<Long5>(&processor);
}

#[test]
fn a_processor_without_pages_of_1_gib_refuses_them() {
    if is_wanting(&HARDWARE) {
        return;
    }
    let mut processor = Processor::default();
    processor.caps.gib_pages = Feature::Off;
    let cases = drawn::<Long4>(&processor, CASES / 4);
    check("without 1 GiB", &Report::new(&cases, &execute(&processor, &cases)), 250);
}
