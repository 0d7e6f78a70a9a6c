//! The shipped pager over a simulated kernel, with guests and crashes at every interleaving we can think of.
use plimsoll_linux::uffd::probe::Step;
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

mod agent;
mod content;
mod kernel;
mod life;
mod sim_space;
mod world;

use life::{Fate, Flaw};
use world::Plan;

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.max_steps = MaxSteps::FailAfter(200_000);
    config
}

fn explore(plan: Plan, n: usize) {
    let p = plan.clone();
    Runner::new(RandomScheduler::new_from_seed(1, n), config()).run(move || p.run());
    Runner::new(PctScheduler::new_from_seed(1, 3, n), config()).run(move || plan.run());
}

#[test]
fn plain() {
    explore(Plan::default(), 300);
}

#[test]
fn discards() {
    explore(Plan { discards: true, ..Plan::default() }, 300);
}
