//! The tier over a real file.
use crate::reading::Asker;
use crate::world::World;
use plimsoll_linux::disk::device::{Disk, FileDisk};
use plimsoll_linux::disk::queue::Queue;
use plimsoll_linux::disk::reader::Reading;
use plimsoll_sys::ring::ReadRing;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// A directory whose file system is one that tiers are on: not the tmpfs that /tmp may be.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

#[test]
fn pages_on_a_real_file_come_back_to_the_next_manager_after_cleaning() {
    let directory = directory();
    let disk = FileDisk::create(&directory.path().join("tier")).unwrap();
    let kept = plimsoll_linux::disk::device::Disk::keepsake(&disk).unwrap().try_clone_to_owned().unwrap();
    let mut world = World::on(Box::new(disk), 8, None);
    for seed in 1..=1500 {
        world.put(1, seed);
    }
    world.demote_all().unwrap();
    world.read_all();
    world.release_those(|place| place.is_multiple_of(2));
    while world.clean().unwrap() > 0 {}
    world.read_all();
    let next = FileDisk::inherit(kept.as_fd().try_clone_to_owned().unwrap()).unwrap();
    world.restart(Box::new(next));
    world.read_all();
    world.audit();
}

/// Two askers at once read all pages of a tier, one of them from behind.
fn read_all_at_once(world: &World) {
    let mut backwards = world.held.clone();
    backwards.reverse();
    std::thread::scope(|scope| {
        for pages in [&world.held, &backwards] {
            scope.spawn(move || {
                let mut asker = Asker::of(world, 1);
                pages.iter().for_each(|held| asker.read(world, *held).unwrap());
            });
        }
    });
}

fn world_on(disk: Box<dyn Disk>) -> World {
    let mut world = World::on(disk, 8, None);
    for seed in 1..=1500 {
        world.put(1, seed);
    }
    world.demote_all().unwrap();
    world
}

#[test]
fn a_real_file_is_read_by_a_ring_one_of_its_own_or_one_that_was_there() {
    let directory = directory();
    let path = directory.path().join("tier");
    for is_there in [false, true] {
        // The lock of the first is gone with its ring.
        let world = world_on(Box::new(FileDisk::create(&path).unwrap()));
        let ring = is_there.then(|| ReadRing::new(2).unwrap());
        assert_eq!(world.tier.start_reading(ring).unwrap(), Reading::Ring);
        read_all_at_once(&world);
    }
}

/// A file, on a host that has no io_uring for it.
struct WithoutRing(FileDisk);

impl Disk for WithoutRing {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, into)
    }

    fn queue(&self, _: Option<ReadRing>) -> io::Result<Box<dyn Queue>> {
        Err(io::Error::from_raw_os_error(38))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_at(offset, bytes)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.reserve(offset, bytes)
    }

    fn shows_what_has_landed(&self) -> bool {
        self.0.shows_what_has_landed()
    }

    fn empty(&self) -> io::Result<()> {
        self.0.empty()
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        self.0.keepsake()
    }
}

#[test]
fn a_real_file_is_read_by_threads_where_there_is_no_ring_and_that_is_said() {
    let directory = directory();
    let path = directory.path().join("tier");
    let world = world_on(Box::new(WithoutRing(FileDisk::create(&path).unwrap())));
    let Reading::Threads { cause } = world.tier.start_reading(None).unwrap() else {
        panic!("there is no ring")
    };
    assert!(cause.contains("not implemented"), "{cause}");
    read_all_at_once(&world);
    let disk = Arc::downgrade(&world.tier);
    drop(world);
    assert_eq!(disk.strong_count(), 0);
    assert!(FileDisk::create(&path).is_ok(), "its threads have ended");
}
