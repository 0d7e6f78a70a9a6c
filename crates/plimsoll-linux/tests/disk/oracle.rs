//! Random pages, demotions, releases, cleanings and deaths of the manager, over a disk that fails at random: whatever happens,
//! a page reads as what it is or, while the disk cannot be read, not at all.
use crate::faulty::{Fault, FaultyDisk, until_killed};
use crate::world::World;
use plimsoll_linux::disk::FetchError;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Put { domain: u32, pages: u64 },
    Release { at: usize, pages: usize },
    Demote { at: usize, pages: usize },
    Clean,
    Read { at: usize },
    Reads(Vec<Fault>),
    Writes(Vec<Fault>),
    Room(Option<u64>),
    Restart,
    Land { sectors: usize },
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        3 => Just(Fault::None),
        1 => Just(Fault::NoSpace),
        1 => Just(Fault::Failed),
        2 => Just(Fault::Late),
        2 => Just(Fault::Short),
        1 => Just(Fault::Torn),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1..3_u32, 1..20_u64).prop_map(|(domain, pages)| Step::Put { domain, pages }),
        5 => (any::<usize>(), 1..25_usize).prop_map(|(at, pages)| Step::Release { at, pages }),
        8 => (any::<usize>(), 1..30_usize).prop_map(|(at, pages)| Step::Demote { at, pages }),
        5 => Just(Step::Clean),
        3 => any::<usize>().prop_map(|at| Step::Read { at }),
        1 => vec(fault(), 0..6).prop_map(Step::Reads),
        2 => vec(prop_oneof![6 => fault(), 1 => Just(Fault::Killed)], 0..6).prop_map(Step::Writes),
        2 => prop_oneof![Just(usize::MAX), 1..2048_usize].prop_map(|sectors| Step::Land { sectors }),
        1 => prop_oneof![Just(None), (0..300_u64).prop_map(Some)].prop_map(Step::Room),
        2 => Just(Step::Restart),
    ]
}

fn apply(world: &mut World, disk: &FaultyDisk, step: Step, next: &mut u64) {
    match step {
        Step::Put { domain, pages } => {
            for _ in 0..pages {
                *next += 1;
                world.put(domain, *next);
            }
        }
        Step::Release { at, pages } => {
            for _ in 0..pages.min(world.held.len()) {
                world.release(at % world.held.len());
            }
        }
        Step::Demote { at, pages } => {
            let first = at.checked_rem(world.held.len()).unwrap_or(0);
            let chosen: Vec<_> = world.held.iter().skip(first).take(pages).copied().collect();
            // What was refused is in memory.
            if until_killed(|| world.demote(chosen)).is_none() {
                world.restart(Box::new(disk.clone()));
            }
        }
        Step::Clean => {
            if until_killed(|| world.clean()).is_none() {
                world.restart(Box::new(disk.clone()));
            }
        }
        Step::Read { at } => {
            let Some(at) = at.checked_rem(world.held.len()) else { return };
            let read = world.read(world.held[at]);
            assert!(matches!(read, Ok(()) | Err(FetchError::Disk(_))), "{read:?}");
        }
        Step::Reads(faults) => disk.fail_reads(&faults),
        Step::Writes(faults) => disk.fail_writes(&faults),
        Step::Room(blocks) => disk.set_room(blocks),
        Step::Land { sectors } => disk.land_some(sectors),
        Step::Restart => world.restart(Box::new(disk.clone())),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_page_is_lost_or_wrong_whatever_the_disk_and_the_manager_do(steps in vec(step(), 1..80)) {
        let disk = FaultyDisk::default();
        let (mut world, mut next) = (World::new(&disk, 10, None), 0);
        for step in steps {
            apply(&mut world, &disk, step, &mut next);
            world.audit();
        }
        disk.fail_reads(&[]);
        disk.fail_writes(&[]);
        disk.set_room(None);
        disk.land();
        world.read_all();
        world.restart(Box::new(disk.clone()));
        world.read_all();
        world.release_those(|_| true);
        world.audit();
        prop_assert_eq!(world.tier.stats().used.0, 0);
    }
}
