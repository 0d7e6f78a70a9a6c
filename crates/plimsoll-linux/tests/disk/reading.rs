//! Several reads under way, that end late, in another order, short, failed, or never.
use crate::faulty::Fault;
use crate::queued::{LIMIT, QueuedDisk};
use crate::world::{Held, World, page};
use plimsoll_linux::disk::reader::Reading;
use plimsoll_linux::uffd::far::{Far, Sight};
use plimsoll_store::{Fetched, HeapSlabs, NoDense};
use plimsoll_sys::eventfd::EventFd;
use plimsoll_types::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::sync::Arc;

/// Pages in a world, in one segment.
const PAGES: u64 = 240;
/// One page in so many is read: no first read has two of them.
const APART: usize = 8;

/// What a pager does with the disk.
pub(crate) struct Asker {
    far: Far<HeapSlabs>,
    kick: Arc<EventFd>,
    fetched: Fetched,
}

impl Asker {
    pub(crate) fn of(world: &World, domain: u32) -> Self {
        let kick = Arc::new(EventFd::new().unwrap());
        let (tier, domain) = (Arc::clone(&world.tier), Arc::clone(&world.domains[&domain]));
        Self { far: Far::new(tier, domain, Arc::clone(&kick)).unwrap(), kick, fetched: Fetched::new() }
    }

    /// Asks for a page, and has nothing of it yet.
    fn ask(&mut self, held: Held) {
        assert!(!self.far.has(held.handle), "{held:?} is there already");
    }

    /// What came of a page, which is waited for; wrong bytes are the one thing that must never be.
    pub(crate) fn read(&mut self, world: &World, held: Held) -> Result<(), String> {
        loop {
            match self.far.look(held.handle) {
                Sight::Read(Err(cause)) => return Err(cause),
                Sight::Read(Ok(read)) => {
                    let found = world.domains[&held.domain]
                        .store(|store| store.fetch(held.handle, &mut self.fetched));
                    found.map_err(|error| error.to_string())?;
                    assert!(self.fetched.adopt(read), "{held:?} is another object's");
                    let mut bytes = [0x55; PAGE_SIZE];
                    self.fetched.unpack(&mut bytes, &mut NoDense).unwrap();
                    assert!(bytes == page(held.seed), "{held:?} reads as something else");
                    return Ok(());
                }
                Sight::UnderWay => self.wait(),
            }
        }
    }

    fn wait(&self) {
        let limit = Timespec::try_from(LIMIT).unwrap();
        let ready = poll(&mut [PollFd::new(&self.kick.as_fd(), PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(ready, 1, "no kick came");
        self.kick.drain().unwrap();
    }
}

/// Pages of one domain on a disk whose queue has that depth.
fn away(depth: usize) -> (QueuedDisk, World) {
    many_away(depth, 16, PAGES)
}

/// So many, on one of so many MiB.
fn many_away(depth: usize, mib: u64, pages: u64) -> (QueuedDisk, World) {
    let disk = QueuedDisk::new(depth);
    let mut world = World::on(Box::new(disk.clone()), mib, None);
    put(&mut world, 1, 1..=pages);
    assert_eq!(world.demote_all().unwrap(), pages);
    (disk, world)
}

/// Pages that do not compress: those of even numbers.
fn put(world: &mut World, domain: u32, pages: RangeInclusive<u64>) {
    for page in pages {
        world.put(domain, 2 * page);
    }
}

/// Pages of which each costs a read of its own: nobody goes on who comes from behind.
fn scattered(world: &World) -> Vec<Held> {
    world.held.iter().rev().step_by(APART).copied().collect()
}

#[test]
fn reads_that_end_in_another_order_each_give_their_page() {
    let (disk, world) = away(8);
    let mut asker = Asker::of(&world, 1);
    assert_eq!(world.tier.reading(), Some(Reading::Ring));
    let pages = scattered(&world);
    disk.hold(true);
    pages.iter().for_each(|held| asker.ask(*held));
    // Half of the queue is one asker's, and is taken up again as often as a read ends, the last first.
    for _ in 0..pages.len() - 4 {
        assert_eq!(disk.until_held(4).len(), 4);
        disk.release(3);
    }
    assert_eq!(disk.most_under_way(), 4);
    disk.until_held(4);
    disk.release_all();
    pages.iter().for_each(|held| asker.read(&world, *held).unwrap());
    assert_eq!(world.tier.stats().reads, pages.len() as u64);
}

#[test]
fn a_page_is_not_read_twice_for_two_who_wait_and_what_came_with_it_needs_no_read() {
    let (disk, world) = away(4);
    let mut asker = Asker::of(&world, 1);
    disk.hold(true);
    // All of it is in the first 16 KiB, or begins there.
    world.held[..3].iter().for_each(|held| asker.ask(*held));
    assert_eq!(disk.until_held(1).len(), 1);
    disk.release_all();
    disk.hold(true);
    world.held[..3].iter().for_each(|held| asker.read(&world, *held).unwrap());
    asker.far.forget();
    world.held[..3].iter().for_each(|held| assert!(asker.far.has(held.handle), "{held:?}"));
    assert_eq!(world.tier.stats().reads, 1);
}

#[test]
fn short_and_interrupted_reads_go_on_and_one_that_fails_is_told_to_who_asked_for_it() {
    let (disk, world) = away(4);
    let mut asker = Asker::of(&world, 1);
    let pages = scattered(&world);
    disk.disk.fail_reads(&[Fault::Short, Fault::Short]);
    asker.read(&world, pages[0]).unwrap();
    disk.hold(true);
    let [own, other] = [world.held[40], world.held[41]];
    asker.ask(own);
    asker.ask(other);
    assert_eq!(disk.until_held(1).len(), 1, "one waits for what the other asked for");
    disk.disk.fail_reads(&[Fault::Failed]);
    disk.release(0);
    let told = std::thread::scope(|scope| {
        scope.spawn(|| {
            disk.until_held(1);
            disk.release_all();
        });
        asker.read(&world, other).unwrap();
        asker.read(&world, own)
    });
    let told = told.unwrap_err();
    assert!(told.contains("cannot be read"), "{told}");
    asker.read(&world, own).unwrap();
    // Bytes that are wrong are as good as none.
    let at = world.remote(pages[9]).unwrap().at.bits();
    assert!(disk.disk.flip((at >> 14 << 20) + (at & 0x3fff) * 64 + 20));
    let told = asker.read(&world, pages[9]).unwrap_err();
    assert!(told.contains("not what was written"), "{told}");
}

#[test]
fn whoever_has_gone_is_not_waited_for_and_the_others_go_on() {
    let (disk, mut world) = away(4);
    let mut gone = Asker::of(&world, 1);
    let pages = scattered(&world);
    disk.hold(true);
    pages.iter().for_each(|held| gone.ask(*held));
    disk.until_held(2);
    drop(gone);
    let domain = world.domains.remove(&1).unwrap();
    let domain = Arc::into_inner(domain).expect("nobody has the domain while the disk does not answer");
    world.domains.insert(1, Arc::new(domain));
    let mut other = Asker::of(&world, 1);
    other.ask(pages[20]);
    // What the one that has gone had begun, and of what it had not nothing.
    assert_eq!(disk.until_held(3).len(), 3);
    disk.release_all();
    other.read(&world, pages[20]).unwrap();
    disk.hold(true);
    other.ask(pages[21]);
    assert_eq!(disk.until_held(1).len(), 1);
}

#[test]
fn a_tier_ends_while_its_disk_does_not_answer() {
    let (disk, world) = away(4);
    let mut asker = Asker::of(&world, 1);
    disk.hold(true);
    asker.ask(world.held[0]);
    disk.until_held(1);
    let tier = Arc::downgrade(&world.tier);
    drop(asker);
    drop(world);
    assert_eq!(tier.strong_count(), 0);
    // It answers now: nobody hears it.
    disk.release_all();
}

#[test]
fn a_page_that_is_moved_while_it_is_read_is_read_where_it_has_come_to_be() {
    // All the segments that there are, of which half is enough.
    let (disk, mut world) = many_away(4, 6, 4 * PAGES);
    world.release_those(|place| place.is_multiple_of(2));
    let mut asker = Asker::of(&world, 1);
    let held = world.held[50];
    let before = world.remote(held).unwrap();
    disk.hold(true);
    asker.ask(held);
    disk.until_held(1);
    while world.clean().unwrap() > 0 {}
    assert_ne!(world.remote(held), Some(before), "it has been moved");
    // The old place is another's by then.
    put(&mut world, 2, 1..=4 * PAGES);
    assert!(world.demote_all().is_err(), "it is full again");
    disk.release_all();
    asker.read(&world, held).unwrap();
}

#[test]
fn a_page_that_is_released_while_it_is_read_is_not_given() {
    let (disk, mut world) = away(4);
    let mut asker = Asker::of(&world, 1);
    let held = world.held[0];
    disk.hold(true);
    asker.ask(held);
    disk.until_held(1);
    world.release(0);
    disk.release_all();
    assert!(asker.read(&world, held).is_err());
    let next = world.held[APART];
    asker.read(&world, next).unwrap();
}

#[test]
fn one_who_asks_for_much_leaves_room_for_another() {
    let (disk, world) = away(4);
    let (mut greedy, mut other) = (Asker::of(&world, 1), Asker::of(&world, 1));
    let pages = scattered(&world);
    disk.hold(true);
    pages.iter().for_each(|held| greedy.ask(*held));
    let greedy_s = disk.until_held(2);
    // A page that the first has not come to yet.
    let last = pages[pages.len() - 1];
    other.ask(last);
    let held = disk.until_held(3);
    assert!(!greedy_s.contains(&held[2]), "it did not wait for any of the {} before it", pages.len());
    disk.release(2);
    other.read(&world, last).unwrap();
    assert_eq!(disk.until_held(2), greedy_s, "and those are still under way");
    disk.release_all();
    pages.iter().for_each(|held| greedy.read(&world, *held).unwrap());
}

#[test]
fn a_queue_that_fails_is_given_up_for_threads_and_nothing_is_lost() {
    let (disk, world) = away(4);
    let mut asker = Asker::of(&world, 1);
    let pages = scattered(&world);
    disk.hold(true);
    pages.iter().for_each(|held| asker.ask(*held));
    disk.until_held(2);
    // Which is to be tried again.
    disk.refuse(io::ErrorKind::ResourceBusy);
    disk.release(0);
    disk.until_held(2);
    assert_eq!(world.tier.reading(), Some(Reading::Ring));
    disk.refuse(io::ErrorKind::PermissionDenied);
    pages.iter().for_each(|held| asker.read(&world, *held).unwrap());
    assert!(matches!(world.tier.reading(), Some(Reading::Threads { .. })));
    // What was under way in it has memory of its own, which may be written to.
    disk.release_all();
    asker.far.forget();
    pages.iter().for_each(|held| asker.read(&world, *held).unwrap());
}
