//! The shipped extents, explored in every order: every state that a few machines and frames can reach, with guests
//! that use every handle anybody was ever told, processors that translate and write at any moment, and machines that die
//! between any two steps of a change.
//!
//! Enters: [`plimsoll_core::frames::extents::Extents`] as it ships. Leaves: a proof by exhaustion, for the configurations
//! below, that an extent has one owner, that no translation outlives its revocation, that nobody reads what was not written
//! for it, and that nothing is lost; or the shortest trace that shows otherwise.
//!
//! # Modelled
//! Tables and translation caches apart: a cache is filled from the tables and forgets only when it is told to. A host that
//! maps on touch, by what the extents say at that moment. Extents of one page. Processors that take turns, each with its cache of
//! free pages.
//!
//! # Not modelled
//! Several processors of one machine apart: they are one cache that holds what any of them does. A task that is only half
//! done. A processor that forgets by itself: it does no less than one that remembers. Zeroing while another processor
//! writes, which the fence before it rules out.
#[path = "../explore/mod.rs"]
mod explore;
mod world;

use plimsoll_core::frames::Rights;
use stateright::{Model, Property};
use world::{Action, Ask, Host, MACHINES, Mistake, World, machines};

impl Model for Host {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.world()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let alive = || machines().filter(|machine| world.lives(*machine));
        for machine in alive() {
            if world.grants_left > 0 {
                actions.push(Action::Grant(machine));
            }
            if world.deaths_left > 0 {
                actions.push(Action::Die(machine));
            }
            for frame in 0..self.frames {
                actions.push(Action::Touch(machine, frame));
                if world.view(machine, frame).tlb.contains(Rights::WRITE) {
                    actions.push(Action::Write(machine, frame));
                }
            }
            for told in (0..world.told.len()).filter(|_| world.asks_left > 0) {
                let to_others = machines().flat_map(|to| {
                    let both = Rights::READ | Rights::WRITE;
                    [Ask::Donate(to), Ask::Lend(to), Ask::Share(to, Rights::READ), Ask::Share(to, both)]
                });
                let asks = to_others.chain([Ask::Reclaim, Ask::GiveBack, Ask::Release]);
                actions.extend(asks.map(|ask| Action::Ask(machine, told, ask)));
            }
        }
        actions.extend(world.core.tasks().map(Action::Work));
        actions.extend(self.cpus().map(Action::Switch));
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        world.after(self, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(ONE_OWNER, |_, world: &World| world.core.audit().is_ok()),
            Property::always(NO_STALE_MAPPING, has_no_stale_mapping),
            Property::always(NO_FOREIGN_BYTE, reads_no_foreign_byte),
            Property::always("nobody reaches what it was not let have", reaches_as_invited),
            Property::always("owners are those who were given it", owners_agree),
            Property::always(AS_DOCUMENTED, |_, world: &World| world.broken.is_none()),
            Property::always("when all are dead, everything is free", leaves_nothing),
            Property::sometimes("an extent is lent", is_lent),
            Property::sometimes(ALL_SHARE, |host, world: &World| {
                (0..host.frames).any(|frame| reach(world, frame) == MACHINES)
            }),
            Property::sometimes("a donation arrives", |_, world: &World| world.seen.donated),
            Property::sometimes("a lender dies", |_, world: &World| world.seen.lender_died),
            Property::sometimes("a borrower dies", |_, world: &World| world.seen.borrower_died),
            Property::sometimes(CROSSED, |_, world: &World| world.seen.crossed),
            Property::sometimes("somebody dies under a change", |_, world: &World| {
                world.seen.died_under_change
            }),
            Property::sometimes("a frame is granted again after its owner wrote it", |_, world: &World| {
                world.frames.iter().any(|frame| frame.stories > 1 && frame.bytes.is_some())
            }),
        ]
    }
}

const ONE_OWNER: &str = "a frame is free or has one owner";
const NO_STALE_MAPPING: &str = "no translation outlives its revocation";
const NO_FOREIGN_BYTE: &str = "nobody reads what was not written for it";
const ALL_SHARE: &str = "all machines share a frame";
const CROSSED: &str = "a page goes from one processor's cache to another processor's machine";
const AS_DOCUMENTED: &str = "the extents answer as documented";

fn each(host: &Host, holds: impl Fn(plimsoll_types::MachineId, usize) -> bool) -> bool {
    (0..host.frames).all(|frame| machines().all(|machine| holds(machine, frame)))
}

fn has_no_stale_mapping(host: &Host, world: &World) -> bool {
    each(host, |machine, frame| {
        let view = world.view(machine, frame);
        let may = world.handle(frame).map_or(Rights::empty(), |handle| world.core.reach(handle).of(machine));
        may.contains(view.table | view.tlb)
    })
}

fn reads_no_foreign_byte(host: &Host, world: &World) -> bool {
    each(host, |machine, frame| {
        let place = &world.frames[frame];
        let reads = world.lives(machine) && world.view(machine, frame).tlb.contains(Rights::READ);
        !reads || place.bytes.is_none() || place.readers >> machine.0 & 1 == 1
    })
}

fn reaches_as_invited(host: &Host, world: &World) -> bool {
    each(host, |machine, frame| {
        let may = world.handle(frame).map_or(Rights::empty(), |handle| world.core.rights(machine, handle));
        may.is_empty() || world.frames[frame].invited >> machine.0 & 1 == 1
    })
}

fn owners_agree(host: &Host, world: &World) -> bool {
    (0..host.frames).all(|frame| match world.frames[frame].owner {
        Some(owner) => world.handle(frame).and_then(|handle| world.core.owner(handle)) == Some(owner),
        None => true,
    })
}

fn leaves_nothing(host: &Host, world: &World) -> bool {
    let is_over = world.alive == 0 && world.core.tasks().next().is_none();
    !is_over || world.core.frames().free_pages().0 == host.frames as u64
}

fn reach(world: &World, frame: usize) -> usize {
    world.handle(frame).map_or(0, |handle| world.core.reach(handle).iter().count())
}

fn is_lent(host: &Host, world: &World) -> bool {
    (0..host.frames).any(|frame| {
        world.handle(frame).is_some_and(|handle| {
            let owner = world.core.owner(handle);
            let is_owners = owner.is_some_and(|owner| !world.core.reach(handle).of(owner).is_empty());
            reach(world, frame) > 0 && !is_owners
        })
    })
}

impl explore::Explored for Host {}

fn explore(name: &str, host: Host) {
    // What cannot be with fewer caches, or fewer requests.
    let (cpus, asks) = (host.cpus, host.asks);
    explore::explore(name, host, |rule| (rule != CROSSED || cpus > 1) && (rule != ALL_SHARE || asks > 1));
}

fn broken_rules(mistake: Mistake) -> Vec<&'static str> {
    explore::broken_rules(Host { mistake: Some(mistake), ..one_frame() })
}

fn one_frame() -> Host {
    Host { frames: 1, grants: 2, asks: 3, deaths: 3, cpus: 0, mistake: None }
}

#[test]
fn one_frame_between_three_machines_stays_whose_it_is() {
    explore("one frame", one_frame());
}

#[test]
fn two_frames_between_three_machines_stay_whose_they_are() {
    explore("two frames", Host { frames: 2, grants: 2, asks: 2, deaths: 1, cpus: 0, mistake: None });
}

#[test]
fn frames_that_go_through_the_caches_of_two_processors_stay_whose_they_are() {
    explore("two caches", Host { asks: 2, deaths: 2, cpus: 2, ..one_frame() });
    explore("two frames and two caches", Host { frames: 2, asks: 1, deaths: 1, cpus: 2, ..one_frame() });
}

#[test]
fn memory_that_is_not_zeroed_is_found() {
    assert_eq!(broken_rules(Mistake::SkipZero), [NO_FOREIGN_BYTE]);
}

#[test]
fn a_fence_that_is_only_reported_is_found() {
    assert_eq!(broken_rules(Mistake::SkipFence), [NO_STALE_MAPPING]);
}

#[test]
fn tables_that_are_left_as_they_were_are_found() {
    assert_eq!(broken_rules(Mistake::SkipUnmap), [NO_STALE_MAPPING]);
}

#[test]
fn a_fence_before_the_unmapping_is_found() {
    assert_eq!(broken_rules(Mistake::FenceBeforeUnmap), [NO_STALE_MAPPING]);
}

#[test]
fn mapping_what_is_being_taken_away_is_found() {
    assert_eq!(broken_rules(Mistake::MapDuringRevocation), [NO_STALE_MAPPING]);
}

#[test]
fn a_handle_whose_generation_is_not_looked_at_is_found() {
    assert_eq!(broken_rules(Mistake::ReuseGeneration), [AS_DOCUMENTED]);
}
