//! RISC-V: QEMU's model agrees with the crate on every access, fault, A and D, through one stage and two.
mod common;

use common::{Mistake, check, is_wanting, notices, seed};
use plimsoll_mmu::format::riscv::{Caps, Sv39, Sv39x4, Sv48, Sv48x4, Sv57, Sv57x4};
use plimsoll_mmu::riscv::{Control, Mode};
use plimsoll_mmu::{Feature, Format};
use plimsoll_oracle::riscv::{HARDWARE, RiscvCase, Stages, options, own_tables};
use plimsoll_oracle::{Chance, Outcome, Report, Run};

/// Cases of a format alone, and of two stages.
const CASES: usize = 10_000;
/// Of trees that the mapper made.
const GROWN: usize = 500;
const PLAIN: Caps = Caps { napot: Feature::Off, memory_types: Feature::Off };

fn outcomes<F, S>(stages: Stages, caps: Caps, count: usize) -> (Vec<RiscvCase<F, S>>, Vec<Outcome>)
where
    F: Format<Caps = Caps>,
    S: Format<Caps = Caps>,
{
    let mut chance = Chance::new(seed());
    let cases: Vec<_> = (0..count).map(|_| RiscvCase::<F, S>::draw(&mut chance, stages, caps)).collect();
    let outcomes = execute(&cases, caps);
    (cases, outcomes)
}

fn execute<F, S>(cases: &[RiscvCase<F, S>], caps: Caps) -> Vec<Outcome>
where
    F: Format<Caps = Caps>,
    S: Format<Caps = Caps>,
{
    let run = Run { options: &options(caps), words: &[], memory: own_tables() };
    HARDWARE.execute(&run, cases).unwrap_or_else(|error| panic!("{error}"))
}

fn agree<F: Format<Caps = Caps>, S: Format<Caps = Caps>>() {
    if is_wanting(&HARDWARE) {
        return;
    }
    for (stages, caps) in [
        (Stages::First, Caps::FULL),
        (Stages::Second, Caps::FULL),
        (Stages::Both, Caps::FULL),
        (Stages::First, PLAIN),
        (Stages::Second, PLAIN),
    ] {
        let count = if caps == PLAIN { CASES / 4 } else { CASES };
        let (cases, outcomes) = outcomes::<F, S>(stages, caps, count);
        let name = format!("{} and {}, {stages:?}, {caps:?}", F::NAME, S::NAME);
        check(&name, &Report::new(&cases, &outcomes), count / 20);
    }
}

#[test]
fn three_levels_are_translated_as_the_model_translates_them() {
    agree::<Sv39, Sv39x4>();
}

#[test]
fn four_levels_are_translated_as_the_model_translates_them() {
    agree::<Sv48, Sv48x4>();
}

#[test]
fn five_levels_are_translated_as_the_model_translates_them() {
    agree::<Sv57, Sv57x4>();
}

#[test]
fn trees_that_the_mapper_made_are_translated_as_the_model_translates_them() {
    fn agree<F: Format<Caps = Caps>, S: Format<Caps = Caps>>() {
        for stages in [Stages::First, Stages::Second] {
            let cases = RiscvCase::<F, S>::grow(&mut Chance::new(seed()), stages, Caps::FULL, GROWN);
            let outcomes = execute(&cases, Caps::FULL);
            let name = format!("{} and {}, {stages:?}, grown", F::NAME, S::NAME);
            check(&name, &Report::new(&cases, &outcomes), GROWN / 20);
        }
    }
    if is_wanting(&HARDWARE) {
        return;
    }
    agree::<Sv39, Sv39x4>();
    agree::<Sv48, Sv48x4>();
    agree::<Sv57, Sv57x4>();
}

#[test]
fn a_crate_that_is_wrong_would_be_noticed() {
    if is_wanting(&HARDWARE) {
        return;
    }
    type Both = RiscvCase<Sv39, Sv39x4>;
    let (cases, outcomes) = outcomes::<Sv39, Sv39x4>(Stages::Both, Caps::FULL, CASES / 4);
    check("right", &Report::new(&cases, &outcomes), CASES / 80);
    let wrong: [Mistake<Both>; 5] = [
        ("SUM", |case| case.first.control.toggle(Control::SUM)),
        ("MXR", |case| case.second.control.toggle(Control::MXR)),
        ("the mode", |case| case.mode = Mode::User),
        ("Svnapot", |case| case.second.caps.napot = Feature::Off),
        ("who keeps A and D", |case| case.second.updates = Feature::Off),
    ];
    notices(&cases, &outcomes, &wrong);
}
