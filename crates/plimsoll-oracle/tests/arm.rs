//! Arm: QEMU's model agrees with the crate on every translation, fault, memory type and mark, through one stage and two.
mod common;

use common::{Mistake, check, is_wanting, notices, seed};
use plimsoll_mmu::arm::Control;
use plimsoll_mmu::format::arm::{Caps, Lower, Second, Upper};
use plimsoll_mmu::{Feature, Format};
use plimsoll_oracle::arm::{ArmCase, HARDWARE, Stages, run};
use plimsoll_oracle::{Chance, Outcome, Report, Run};

/// Cases of a format alone, and of two stages.
const CASES: usize = 10_000;
/// Of trees that the mapper made, at most.
const GROWN: usize = 500;

fn outcomes<F, S>(stages: Stages, count: usize) -> (Vec<ArmCase<F, S>>, Vec<Outcome>)
where
    F: Format<Caps = Caps>,
    S: Format<Caps = Caps>,
{
    let mut chance = Chance::new(seed());
    let cases: Vec<_> = (0..count).map(|_| ArmCase::<F, S>::draw(&mut chance, stages)).collect();
    let outcomes = execute(&cases);
    (cases, outcomes)
}

fn execute<F, S>(cases: &[ArmCase<F, S>]) -> Vec<Outcome>
where
    F: Format<Caps = Caps>,
    S: Format<Caps = Caps>,
{
    let run = Run { words: &run(), ..Run::default() };
    HARDWARE.execute(&run, cases).unwrap_or_else(|error| panic!("{error}"))
}

fn agree<F: Format<Caps = Caps>, S: Format<Caps = Caps>>() {
    if is_wanting(&HARDWARE) {
        return;
    }
    for stages in [Stages::First, Stages::Second, Stages::Both] {
        let (cases, outcomes) = outcomes::<F, S>(stages, CASES);
        check(&name::<F, S>(stages), &Report::new(&cases, &outcomes), CASES / 20);
    }
}

fn name<F: Format, S: Format>(stages: Stages) -> String {
    let (input, granule) = (F::INPUT_BITS, F::PAGE_SHIFT);
    let (input2, granule2) = (S::INPUT_BITS, S::PAGE_SHIFT);
    format!("{}, {input} bits, 2^{granule}; {}, {input2} bits, 2^{granule2}; {stages:?}", F::NAME, S::NAME)
}

#[test]
fn granules_of_4_kib_are_translated_as_the_model_translates_them() {
    agree::<Lower<12, 48>, Second<12, 40>>();
    agree::<Upper<12, 39>, Second<12, 48>>();
}

#[test]
fn granules_of_16_kib_are_translated_as_the_model_translates_them() {
    agree::<Lower<14, 47>, Second<14, 40>>();
}

#[test]
fn granules_of_64_kib_are_translated_as_the_model_translates_them() {
    agree::<Lower<16, 48>, Second<16, 42>>();
}

#[test]
fn granules_that_differ_by_stage_are_translated_as_the_model_translates_them() {
    agree::<Upper<16, 42>, Second<12, 44>>();
    agree::<Lower<12, 42>, Second<16, 48>>();
}

#[test]
fn trees_that_the_mapper_made_are_translated_as_the_model_translates_them() {
    fn agree<F: Format<Caps = Caps>, S: Format<Caps = Caps>>() {
        for stages in [Stages::First, Stages::Second] {
            let cases = ArmCase::<F, S>::grow(&mut Chance::new(seed()), stages, GROWN);
            let report = Report::new(&cases, &execute(&cases));
            check(&format!("{}, grown", name::<F, S>(stages)), &report, GROWN / 100);
        }
    }
    if is_wanting(&HARDWARE) {
        return;
    }
    agree::<Lower<12, 48>, Second<12, 40>>();
    agree::<Upper<14, 47>, Second<14, 40>>();
    agree::<Lower<16, 42>, Second<16, 48>>();
}

#[test]
fn a_crate_that_is_wrong_would_be_noticed() {
    if is_wanting(&HARDWARE) {
        return;
    }
    type Both = ArmCase<Lower<12, 48>, Second<12, 40>>;
    let notice = |stages, wrong: &[Mistake<Both>]| {
        let (cases, outcomes) = outcomes::<Lower<12, 48>, Second<12, 40>>(stages, CASES / 4);
        check("right", &Report::new(&cases, &outcomes), CASES / 80);
        notices(&cases, &outcomes, wrong);
    };
    notice(
        Stages::First,
        &[
            ("PAN", |case| case.first.control.remove(Control::PAN)),
            ("HPD", |case| case.first.hierarchy_off = Feature::Off),
        ],
    );
    notice(
        Stages::Both,
        &[
            ("PTW", |case| case.second.protected_walks = Feature::Off),
            ("FWB", |case| case.second.forced_write_back = Feature::Off),
            ("HA", |case| case.second.access_flag = Feature::On),
            ("HD", |case| case.second.caps.dirty_management = Feature::Off),
            ("IPS", |case| case.first.caps.physical_bits = 48),
        ],
    );
}
