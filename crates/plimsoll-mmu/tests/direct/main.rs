//! The shipped counting of kinds, explored in every order: a guest that asks for anything at any time and writes whatever it can
//! write, on a processor that caches whatever it can cache.
//!
//! Enters: [`plimsoll_mmu::direct::Direct`] as it ships, over a made-up format with a few entries to a table. Leaves: a proof by
//! exhaustion, for the configurations below, that no table is writable and nothing foreign is mapped; or the shortest way there.
//!
//! # Not modelled
//! Accessed and dirty bits that a processor sets. Several processors apart: their caches together hold no more than one that
//! caches everything. Large frames: a table has one or two entries.
#[path = "../common/mod.rs"]
#[expect(dead_code, reason = "these tests use a part of it")]
mod common;
mod long;
mod world;

use plimsoll_mmu::Level;
use plimsoll_mmu::direct::{Frame, Kind};
use stateright::{Checker, Expectation, HasDiscoveries, Model, Property};
use std::time::Instant;
use world::{Action, Cached, GUEST, Host, OTHER, Sight, World};

const TABLES_READ_ONLY: &str = "no table is writable by its guest";
const TABLES_STAY: &str = "what a processor takes for a table is one";
const NOTHING_FOREIGN: &str = "no frame of others is mapped";
const HOST_WRITES_NO_TABLE: &str = "what the host writes to is no table";
const COUNTED: &str = "uses and needs are what entries, pins, roots and the host are";

impl<const LEVELS: u8, const BITS: u32> Model for Host<LEVELS, BITS> {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.world()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for (frame, record) in world.records.iter().enumerate() {
            if record.owner().is_none() {
                actions.extend([GUEST, OTHER].map(|owner| Action::Give(owner, frame)));
            }
            for level in (1..=LEVELS).map(Level) {
                actions.extend([1, 1000].map(|budget| Action::Pin(frame, level, budget)));
            }
            actions.extend([Action::Unpin(frame), Action::Load(frame, 1000), Action::Release(frame)]);
            let table = matches!(record.kind(), Kind::Table(_)) && record.needed() > 0;
            let writable = world.cached.contains(&Cached::Page(frame, true));
            // What is in a frame before anybody uses it is anything.
            let loading = record.owner() == Some(GUEST) && record.kind() == Kind::Fresh && record.uses() == 0;
            for index in 0..1 << BITS {
                for word in self.alphabet() {
                    if table {
                        actions.push(Action::Update(frame, index, word));
                    }
                    if writable || loading {
                        actions.push(Action::Write(frame, index, word));
                    }
                }
            }
        }
        // One frame is enough to see what that does.
        actions.extend([Action::Unload, Action::Fence, Action::Work, Action::Keep(0), Action::Unkeep(0)]);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        self.after(world, action)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(TABLES_READ_ONLY, |_, world: &World| {
                let is_table = |frame: usize| {
                    let record = &world.records[frame];
                    matches!(record.kind(), Kind::Table(_)) && (record.needed() > 0 || record.held() > 0)
                };
                !world.cached.iter().any(|it| matches!(it, Cached::Page(frame, true) if is_table(*frame)))
            }),
            Property::always(TABLES_STAY, |_, world: &World| {
                world.cached.iter().all(|it| match it {
                    Cached::Table(level, frame) => world.records[*frame].kind() == Kind::Table(Level(*level)),
                    Cached::Page(..) => true,
                })
            }),
            Property::always(NOTHING_FOREIGN, |_, world: &World| {
                world.cached.iter().all(|it| {
                    let (Cached::Table(_, frame) | Cached::Page(frame, _)) = it;
                    world.records[*frame].owner() == Some(GUEST)
                })
            }),
            Property::always(HOST_WRITES_NO_TABLE, |_, world: &World| {
                world.records.iter().all(|record| !record.kept() || record.kind() == Kind::Writable)
            }),
            Property::always(COUNTED, |host: &Self, world: &World| {
                let counts = world.records.iter().map(|frame| (frame.uses(), frame.needed()));
                counts.eq(host.counted(world))
            }),
            Property::sometimes("a guest writes a page while it runs", |_, world: &World| {
                world.cached.iter().any(|it| matches!(it, Cached::Page(_, true)))
            }),
            Property::sometimes("a guest reads its own table", |_, world: &World| {
                world.cached.iter().any(|it| match it {
                    Cached::Page(frame, false) => world.records[*frame].kind() == Kind::Table(Level(1)),
                    _ => false,
                })
            }),
            Property::sometimes("the host writes to a page while the guest runs", |_, world: &World| {
                world.root.is_some() && world.records.iter().any(Frame::kept)
            }),
            Property::sometimes("a table is half made", |_, world: &World| {
                world.records.iter().any(|frame| frame.held() > 0 && frame.needed() == 0)
            }),
            Property::sometimes("a frame changes hands", |_, world: &World| {
                world.root.is_some() && world.records.iter().any(|frame| frame.owner() == Some(OTHER))
            }),
        ]
    }
}

/// How far a model is explored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Far {
    /// Every state that can be reached.
    ToTheEnd,
    /// Every sequence of fewer actions than this.
    Actions(usize),
}

fn explore<const LEVELS: u8, const BITS: u32>(host: Host<LEVELS, BITS>, far: Far) {
    let start = Instant::now();
    let mut builder = host.checker().threads(2).finish_when(HasDiscoveries::AnyFailures);
    if let Far::Actions(actions) = far {
        builder = builder.target_max_depth(actions);
    }
    let checker = builder.spawn_bfs().join();
    let (unique, steps, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    println!("{host:?}: {unique} unique states, {steps} steps, depth {depth}, {:.1?}", start.elapsed());
    let found = checker.discoveries();
    for property in host.properties() {
        match (property.expectation, found.get(property.name)) {
            (Expectation::Always, Some(path)) => {
                panic!(
                    "not so: {}\n{:#?}\n{:#?}",
                    property.name,
                    path.clone().into_actions(),
                    path.last_state()
                );
            }
            (Expectation::Sometimes, None) if far == Far::ToTheEnd => panic!("never seen: {}", property.name),
            _ => {}
        }
    }
}

/// The rule that a mistake breaks first.
fn broken<const LEVELS: u8, const BITS: u32>(host: Host<LEVELS, BITS>) -> Vec<&'static str> {
    let checker = host.checker().threads(2).finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries();
    let rules = host.properties().into_iter().filter(|rule| rule.expectation == Expectation::Always);
    let broken: Vec<_> = rules.map(|rule| rule.name).filter(|rule| found.contains_key(rule)).collect();
    broken.iter().for_each(|rule| println!("{host:?}, {rule}: {:?}", found[rule].clone().into_actions()));
    broken
}

const RIGHT: Host<2, 1> = right(3);

const fn right<const LEVELS: u8, const BITS: u32>(frames: usize) -> Host<LEVELS, BITS> {
    Host { frames, sight: Sight::Clear, unfenced: false }
}

#[test]
fn no_sequence_makes_a_table_writable_with_two_levels_of_one_entry() {
    explore(right::<2, 0>(3), Far::ToTheEnd);
}

#[test]
fn no_short_sequence_makes_a_table_writable_with_two_levels_of_two_entries() {
    explore(right::<2, 1>(3), Far::Actions(6));
}

#[test]
fn no_short_sequence_makes_a_table_writable_with_three_levels() {
    explore(right::<3, 0>(4), Far::Actions(6));
}

#[test]
fn a_fence_that_is_only_reported_is_found() {
    assert!(!broken(Host { unfenced: true, ..RIGHT }).is_empty());
}

#[test]
fn a_level_that_is_not_looked_at_is_found() {
    for level in [1, 2] {
        assert!(!broken(Host { sight: Sight::Blind(Level(level)), ..RIGHT }).is_empty(), "level {level}");
    }
}

#[test]
fn rights_to_write_that_are_not_counted_are_found() {
    assert_eq!(broken(Host { sight: Sight::Writeless, ..RIGHT }), [TABLES_READ_ONLY]);
}
