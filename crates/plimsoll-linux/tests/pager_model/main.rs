//! The shipped pager over a simulated kernel: guests, discards, agents and crashes in every order that shuttle finds.
//!
//! # What is simulated
//! The very same `Pager`, `Machine`, `Store` and `take_over` that run on Linux run here over [`sim_space::SimSpace`].
//! Below it is [`kernel::Kernel`]: guest RAM, fault and event queues, the rules of COPY, ZEROPAGE, MOVE and
//! `MADV_DONTNEED` as measured (FACTS.md), and the VMM's agent as a thread of its own with a queue that outlives a
//! manager. Two machines share one domain, each with vCPUs that read, write, give pages back and have devices hold
//! pages. Every byte that a vCPU reads is compared with what it may see ([`content::Expected`]). At the end everything
//! is evicted, read back and evicted again, and the machines are buried: the store must then be empty.
//! Each call, each step of the pager and each move of a guest is a scheduling point.
//!
//! # Interleavings that worry us
//! * A discard is read and its page goes later: meanwhile the page is touched, installed, captured.
//! * A discard is queued while a fault is being served: the install is refused, then must not be made from old knowledge.
//! * Two vCPUs wait for one page; one is served, the page is captured again, then the other's event is served.
//! * A wake-up removes an event that nobody has read.
//! * A page is refused half way through a run that is captured; the rest goes on.
//! * Two machines store, share and release the same object.
//! * A manager dies between any two steps, or in a call, or while it takes over, with requests queued at the agent that are done later.
//! * A slot page is zapped, by this manager or a dead one, and used again.
//! * A block is left to the kernel while vCPUs wait in it, a discard of it is queued, or the manager dies.
//! * A block is watched again while a discard that nobody hears of is taking pages out of it.
//! * A machine is given back while its guest works, and taken over again because nobody was told.
//! * A block that was taken whole has a page discarded, or is moved back half way, or was when the manager died.
//!
//! # What is not modelled
//! Which memory becomes huge (what is all there may be), discards across blocks, regions with holes, memory shortage (COPY never fails for want of memory), damage
//! to bytes, a hostile VMM, and weak memory orders: shuttle runs one thread at a time.
//!
//! # Running it
//! `PLIMSOLL_SHUTTLE_ITERATIONS` sets the runs of each test and scheduler, `PLIMSOLL_SHUTTLE_SEED` where they start. A
//! failure prints its schedule; put it into a file and name that in `PLIMSOLL_SHUTTLE_REPLAY` to run the one test again.
use kernel::one_in;
use life::{Fate, Flaw};
use plimsoll_core::airlock::Shape;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_linux::uffd::probe::Step;
use plimsoll_types::{ByteCount, Gpa};
use shuttle::rand::{Rng, thread_rng};
use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use world::{Parting, Plan, SEEN, Start};

mod agent;
mod content;
mod kernel;
mod life;
mod sim_space;
mod world;

/// Changes of priority in a PCT run: most bugs take two or three.
const PCT_DEPTH: usize = 4;

/// The steps of a block that is left to the kernel or moved back.
const BLOCK_STEPS: [Step; 3] = [Step::MovedBack, Step::Unwatched, Step::Watched];

/// What a run with blocks left to the kernel comes across.
const BLOCKS: [(&str, &AtomicU64); 5] = [
    ("a block left to the kernel", &SEEN.left),
    ("a block taken back from the kernel", &SEEN.watched),
    ("a touch served by the kernel", &SEEN.filled),
    ("a block taken whole", &SEEN.taken),
    ("a block moved back whole", &SEEN.returned),
];

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is no number: {text}")))
}

fn config(persistence: FailurePersistence) -> Config {
    let mut config = Config::new();
    config.stack_size = 256 << 10;
    config.max_steps = MaxSteps::FailAfter(200_000);
    config.failure_persistence = persistence;
    config.silence_warnings = true;
    config
}

/// Runs plans under both schedulers, half the runs each; or one schedule again.
fn explore(runs: usize, plan: impl Fn() -> Plan + Clone + Send + Sync + 'static) {
    let config = config(FailurePersistence::Print);
    if let Ok(path) = std::env::var("PLIMSOLL_SHUTTLE_REPLAY") {
        let schedule = ReplayScheduler::new_from_file(&path).expect("the schedule can be read");
        Runner::new(schedule, config).run(move || plan().run());
        return;
    }
    let seed = number("PLIMSOLL_SHUTTLE_SEED").unwrap_or(1);
    let asked = number("PLIMSOLL_SHUTTLE_ITERATIONS").and_then(|runs| usize::try_from(runs).ok());
    let runs = asked.unwrap_or(runs);
    println!("{runs} runs from seed {seed} under each scheduler");
    let again = plan.clone();
    Runner::new(RandomScheduler::new_from_seed(seed, runs), config.clone()).run(move || again().run());
    Runner::new(PctScheduler::new_from_seed(seed, PCT_DEPTH, runs), config).run(move || plan().run());
}

fn any_step() -> Step {
    Step::ALL[thread_rng().gen_range(0..Step::ALL.len())]
}

fn assert_seen(counts: &[(&str, &AtomicU64)]) {
    for (what, count) in counts {
        assert!(count.load(Ordering::Relaxed) > 0, "no run has come across {what}");
    }
}

#[test]
fn guests_see_what_they_wrote() {
    explore(250, Plan::default);
    assert_seen(&[
        ("a fault served from limbo", &SEEN.limbo),
        ("a fault served from the store", &SEEN.stored),
        ("two faults of one page", &SEEN.present),
        ("a refused move", &SEEN.refused),
        ("a duplicate page", &SEEN.duplicate),
        ("a zero page", &SEEN.zero),
    ]);
}

#[test]
fn what_a_guest_gave_back_reads_as_zeros() {
    explore(250, || Plan { discards: true, ..Plan::default() });
    assert_seen(&[("a discard", &SEEN.discarded)]);
}

#[test]
fn one_page_fought_over_by_three_vcpus_is_never_wrong() {
    explore(250, || Plan { discards: true, machines: 1, vcpus: 3, pages: 2, steps: 16, ..Plan::default() });
}

#[test]
fn a_fault_that_waited_through_a_discard_does_not_bring_the_old_bytes_back() {
    // Many vCPUs on one page: one is served, the other's install is refused because a discard is queued, then finds the
    // page still there because the discard has been read but has not taken it away yet.
    explore(300, || Plan { discards: true, machines: 1, vcpus: 5, pages: 1, steps: 12, ..Plan::default() });
}

#[test]
fn a_block_left_to_the_kernel_is_taken_back_without_losing_a_write() {
    explore(250, || Plan { start: Start::Writing, ..Plan::default() });
    assert_seen(&BLOCKS);
}

#[test]
fn what_is_given_back_while_the_kernel_serves_it_reads_as_zeros() {
    explore(250, || Plan { discards: true, start: Start::Writing, ..Plan::default() });
    assert_seen(&[("a discard nobody heard of", &SEEN.silent)]);
}

#[test]
fn a_small_block_that_goes_and_comes_back_whole_is_never_wrong() {
    // Few pages are all there more often: the block is taken whole and moved back time and again.
    explore(250, || Plan { discards: one_in(2), ..with_blocks() });
    assert_seen(&BLOCKS);
}

#[test]
fn a_manager_killed_at_any_step_loses_no_block() {
    explore(250, || {
        let mut random = thread_rng();
        let fate = |random: &mut shuttle::rand::rngs::ThreadRng| match random.gen_range(0..3) {
            0 => Fate::DiesIn(random.gen_range(1..60)),
            1 => Fate::DiesAt(any_step(), random.gen_range(1..8)),
            _ => Fate::DiesAt(BLOCK_STEPS[random.gen_range(0..BLOCK_STEPS.len())], 1),
        };
        let fates = (0..2).map(|_| fate(&mut random)).collect();
        Plan { discards: one_in(2), fates, ..with_blocks() }
    });
}

#[test]
fn a_machine_that_is_given_back_has_every_page_and_so_has_whoever_takes_it_over_again() {
    explore(250, || Plan { discards: one_in(2), parting: Parting::WhenHome, steps: 24, ..Plan::default() });
    explore(250, || {
        let mut random = thread_rng();
        let fate = |random: &mut shuttle::rand::rngs::ThreadRng| match random.gen_range(0..3) {
            0 => Fate::DiesIn(random.gen_range(1..60)),
            1 => Fate::DiesAt(any_step(), random.gen_range(1..8)),
            _ => Fate::DiesAt(Step::Unwatched, 1),
        };
        let fates = (0..2).map(|_| fate(&mut random)).collect();
        Plan { discards: one_in(2), parting: Parting::WhenHome, fates, ..with_blocks() }
    });
    assert_seen(&[
        ("a machine given back", &SEEN.given_back),
        ("a touch served by the kernel", &SEEN.filled),
    ]);
}

#[test]
fn a_machine_of_a_whole_block_behaves_the_same() {
    explore(20, || {
        let region = Region { start: Gpa(0), bytes: ByteCount::mib(2) };
        let layout = GuestLayout::new(vec![region]).expect("one block is a layout");
        Plan { discards: true, layout, airlock: Shape::blocks(3), steps: 8, ..Plan::default() }
    });
}

#[test]
fn a_pager_held_up_at_any_step_is_overtaken_without_harm() {
    explore(250, || Plan { discards: true, held_up: Some(any_step()), ..Plan::default() });
}

#[test]
fn a_manager_killed_at_any_step_loses_nothing() {
    explore(250, || {
        let mut random = thread_rng();
        let fates = (0..2).map(|_| Fate::DiesAt(any_step(), random.gen_range(1..12))).collect();
        Plan { fates, steps: 16, ..Plan::default() }
    });
}

#[test]
fn a_manager_killed_in_any_call_loses_nothing() {
    explore(250, || {
        let mut random = thread_rng();
        let fates = (0..3).map(|_| Fate::DiesIn(random.gen_range(1..60))).collect();
        Plan { fates, steps: 16, ..Plan::default() }
    });
    assert_seen(&[("a kill in a call", &life::KILLS_IN_CALLS), ("a take-over", &SEEN.takeovers)]);
}

#[test]
fn a_manager_killed_while_guests_give_pages_back_shows_zeros_or_their_own_bytes() {
    explore(250, || {
        let mut random = thread_rng();
        let fate = |random: &mut shuttle::rand::rngs::ThreadRng| match random.gen_range(0..3) {
            0 => Fate::DiesIn(random.gen_range(1..60)),
            _ => Fate::DiesAt(any_step(), random.gen_range(1..8)),
        };
        let fates = (0..2).map(|_| fate(&mut random)).collect();
        Plan { discards: true, fates, steps: 16, ..Plan::default() }
    });
}

#[test]
fn a_discard_read_again_after_its_block_was_left_to_the_kernel_takes_nothing_from_the_guest() {
    // It is queued when the block is left, read by a manager that dies of it, and over when the next one hears of it.
    explore(400, || {
        let fates = vec![Fate::DiesAt(Step::EventsRead, thread_rng().gen_range(1..4))];
        let (layout, airlock) = (GuestLayout::dense(2), Shape { slots: 3, slot_pages: 2 });
        let plan = Plan { discards: true, machines: 1, vcpus: 3, steps: 8, ..Plan::default() };
        Plan { layout, airlock, pages: 2, fates, ..plan }
    });
    assert_seen(&[("a discard read again", &SEEN.replayed)]);
}

#[test]
fn every_step_is_one_at_which_a_manager_was_killed() {
    for step in Step::ALL {
        let is_of_block = BLOCK_STEPS.contains(&step);
        explore(if is_of_block { 40 } else { 10 }, move || {
            let count = if is_of_block { 1 } else { thread_rng().gen_range(1..3) };
            let fates = vec![Fate::DiesAt(step, count)];
            let start = if is_of_block { Start::Writing } else { Start::Anyhow };
            Plan { discards: true, start, fates, steps: 16, ..Plan::default() }
        });
        let kills = life::KILLS[step as usize].load(Ordering::Relaxed);
        assert!(kills > 0, "no manager was killed at {step:?}");
    }
}

/// Runs a set-up that is wrong on purpose until a check of the model complains, or shuttle of a deadlock.
fn assert_noticed(flaw: Flaw, plan: impl Fn() -> Plan + Clone + Send + Sync + 'static) {
    let plan = move || Plan { flaw, ..plan() };
    let again = plan.clone();
    let config = config(FailurePersistence::None);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // PCT starves threads: an agent that comes late is what some flaws need.
        Runner::new(PctScheduler::new_from_seed(1, PCT_DEPTH, 2000), config.clone())
            .run(move || plan().run());
        Runner::new(RandomScheduler::new_from_seed(1, 2000), config).run(move || again().run());
    }));
    let Err(payload) = outcome else { panic!("nothing noticed {flaw:?}") };
    let text = payload.downcast_ref::<String>().cloned();
    let text =
        text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
    println!("{flaw:?} was noticed: {text}");
    assert!(
        text.contains("model:") || text.contains("deadlock"),
        "noticed {flaw:?}, but not by a check: {text}"
    );
}

fn with_crashes() -> Plan {
    let mut random = thread_rng();
    let fates = (0..3).map(|_| Fate::DiesIn(random.gen_range(1..60))).collect();
    Plan { discards: true, fates, steps: 16, ..Plan::default() }
}

#[test]
fn moves_reported_although_refused_are_noticed() {
    assert_noticed(Flaw::RefusalsHidden, Plan::default);
}

#[test]
fn faults_served_before_discards_are_noticed() {
    assert_noticed(Flaw::DiscardsLate, || Plan { discards: true, ..Plan::default() });
}

#[test]
fn an_install_reported_although_refused_is_noticed() {
    assert_noticed(Flaw::AgainHidden, Plan::default);
}

#[test]
fn a_take_over_without_a_barrier_is_noticed() {
    assert_noticed(Flaw::NoBarrier, || Plan { discards: false, ..with_crashes() });
}

#[test]
fn a_take_over_that_drops_waiting_discards_is_noticed() {
    assert_noticed(Flaw::DrainedDiscardsDropped, with_crashes);
}

#[test]
fn a_take_over_with_fresh_words_is_noticed() {
    assert_noticed(Flaw::WordsForgotten, || Plan { discards: false, ..with_crashes() });
}

#[test]
fn a_take_over_that_overlooks_the_airlock_is_noticed() {
    assert_noticed(Flaw::AirlockOverlooked, || Plan { discards: false, ..with_crashes() });
}

/// Machines whose blocks are left to the kernel, taken back, taken whole and moved back.
fn with_blocks() -> Plan {
    let (layout, airlock) = (GuestLayout::dense(3), Shape { slots: 3, slot_pages: 3 });
    Plan { start: Start::Writing, layout, airlock, pages: 3, steps: 20, ..Plan::default() }
}

#[test]
fn a_machine_given_back_before_it_is_home_is_noticed() {
    assert_noticed(Flaw::None, || Plan { parting: Parting::TooEarly, steps: 24, ..Plan::default() });
}

#[test]
fn a_block_reported_as_registered_that_is_not_is_noticed() {
    assert_noticed(Flaw::WatchUndone, with_blocks);
}

#[test]
fn registering_that_overtakes_a_discard_is_noticed() {
    assert_noticed(Flaw::WatchHasty, || Plan { discards: true, ..with_blocks() });
}

#[test]
fn a_take_over_that_leaves_blocks_to_the_kernel_is_noticed() {
    assert_noticed(Flaw::TakeOverUnwatched, || Plan { fates: with_crashes().fates, ..with_blocks() });
}

#[test]
fn blocks_reported_as_moved_back_although_refused_are_noticed() {
    assert_noticed(Flaw::ReturnsHidden, with_blocks);
}
