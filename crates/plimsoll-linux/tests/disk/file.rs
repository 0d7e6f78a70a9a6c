//! The tier over a real file.
use crate::world::World;
use plimsoll_linux::disk::device::FileDisk;
use std::os::fd::AsFd;

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
