//! What the tier does, one thing after the other.
use crate::faulty::{Fault, FaultyDisk, until_killed};
use crate::world::{Held, MIB, World};
use plimsoll_linux::disk::FetchError;
use plimsoll_linux::disk::device::BLOCK_SIZE;
use plimsoll_linux::disk::tier::{
    Keepsakes, Limits, Purpose, ReadError, SEGMENTS_MIN, Tier, TierError, WriteError,
};
use plimsoll_linux::disk::window::Window;
use plimsoll_store::{Away, Fetched, Handle, HeapSlabs, Remote, Replacement, Store};
use plimsoll_types::{ByteCount, DomainId, PAGE_SIZE};
use std::os::fd::BorrowedFd;

/// Pages that do not compress, of one domain.
fn filled(disk: &FaultyDisk, mib: u64, quota: Option<ByteCount>, pages: u64) -> World {
    let mut world = World::new(disk, mib, quota);
    for seed in 1..=pages {
        world.put(1, seed * 2);
    }
    world
}

#[test]
fn pages_leave_memory_and_come_back_and_few_reads_bring_many() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 500);
    let (held, before) = (world.domains[&1].held(), disk.writes_made());
    assert_eq!(world.demote_all().unwrap(), 500);
    let left = world.domains[&1].held();
    assert!(left.0 * 20 < held.0, "{left} of {held} are left in memory");
    world.read_all();
    let stats = world.tier.stats();
    assert_eq!(stats.pages_read, 500);
    assert!(stats.reads <= 500 / 30, "{} reads", stats.reads);
    assert_eq!(disk.writes_made() - before, 2, "whole segments are written");
    world.audit();
}

#[test]
fn nothing_of_a_guest_is_on_the_disk_in_clear() {
    let disk = FaultyDisk::default();
    let mut world = World::new(&disk, 10, None);
    let marker = b"MARKER that a guest has planted";
    let mut plain = Vec::new();
    for seed in 0..64_u8 {
        let mut bytes = [seed; PAGE_SIZE];
        for (place, byte) in (0_u64..).zip(&mut bytes) {
            *byte = (place * u64::from(seed) * 7919).to_le_bytes()[1];
        }
        for chunk in bytes.chunks_exact_mut(512) {
            chunk[..marker.len()].copy_from_slice(marker);
        }
        plain.push(bytes);
    }
    let mut mover = world.mover();
    let domain = &world.domains[&1];
    let mut handles = Vec::new();
    for bytes in &plain {
        let stored = domain.store(|store| store.put(bytes, &mut plimsoll_store::Encoder::new()));
        handles.push(stored.unwrap().unwrap().handle);
        assert!(mover.demote(domain, handles[handles.len() - 1], None).unwrap());
    }
    mover.flush().unwrap();
    let written = disk.bytes();
    assert!(written.len() > 64 * 64);
    let has = |what: &[u8]| written.windows(what.len()).any(|window| window == what);
    assert!(has(b"PLIMSEGM"), "what is looked at is what was written");
    assert!(!has(marker) && !has(&marker[..12]));
    // A handle has 14 bits of a page's hash: not even those.
    assert!(!handles.iter().any(|handle: &Handle| has(&handle.to_bits().to_le_bytes())));
    drop(std::mem::take(&mut world.held));
}

#[test]
fn a_change_of_any_byte_of_a_segment_is_found() {
    let disk = FaultyDisk::default();
    let mut world = World::new(&disk, 10, None);
    for seed in [1, 3, 5] {
        world.put(1, seed);
    }
    world.demote_all().unwrap();
    let places: Vec<_> =
        world.held.clone().into_iter().map(|held| (held, world.remote(held).unwrap())).collect();
    let first_byte = |remote: &Remote| (remote.at.bits() >> 14) * MIB + (remote.at.bits() & 0x3fff) * 64;
    let bytes_of = |remote: &Remote| first_byte(remote)..first_byte(remote) + 16 + remote.length as u64;
    let end = places.iter().map(|(_, remote)| bytes_of(remote).end).max().unwrap();
    let start = places.iter().map(|(_, remote)| bytes_of(remote).start).min().unwrap();
    let mut found = 0;
    for offset in start..end {
        assert!(disk.flip(offset));
        for (held, remote) in &places {
            let is_its = bytes_of(remote).contains(&offset);
            match world.read(*held) {
                Ok(()) => assert!(!is_its, "byte {offset} is of {held:?}"),
                Err(FetchError::Disk(ReadError::Damaged { .. })) => found += u64::from(is_its),
                Err(error) => panic!("byte {offset}: {error}"),
            }
            // What is in the window was read before the change is undone.
            world.restart(Box::new(disk.clone()));
        }
        disk.flip(offset);
    }
    let bytes: u64 = places.iter().map(|(_, remote)| 16 + remote.length as u64).sum();
    assert_eq!(found, bytes, "each byte of each entry");
    world.read_all();
}

#[test]
fn a_full_tier_takes_no_more_and_can_be_cleaned() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 254 * 6 + 200);
    let full = world.demote_all().unwrap_err();
    assert!(matches!(full, WriteError::Full { .. }), "{full}");
    assert_eq!(world.tier.stats().used, ByteCount(6 * MIB), "the reserve is kept");
    world.read_all();
    assert_eq!(world.clean().unwrap(), 0, "nothing is sparse: nothing would be won");
    // Half of everything goes: no segment is free by itself.
    world.release_those(|place| place.is_multiple_of(2));
    assert_eq!(world.tier.stats().used, ByteCount(6 * MIB));
    while world.clean().unwrap() > 0 {
        world.audit();
    }
    assert!(world.tier.stats().used <= ByteCount(5 * MIB), "{:?}", world.tier.stats());
    world.read_all();
    assert!(world.demote_all().unwrap() > 0);
    world.read_all();
    world.audit();
}

#[test]
fn a_disk_that_others_have_filled_is_told_left_alone_cleaned_and_tried_again() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 64, None, 254 * 5);
    // The reserve has its room; there is room for two segments more.
    disk.set_room(Some(512));
    let error = world.demote_all().unwrap_err();
    assert!(matches!(error, WriteError::NoSpace(_)), "{error}");
    world.read_all();
    let used = world.tier.stats().used;
    assert_eq!(used, ByteCount(2 * MIB));
    // Every third page stays: two segments of it fit into one.
    world.release_those(|place| !place.is_multiple_of(3));
    assert_eq!(world.clean().unwrap(), 1, "two into one of the reserve");
    assert_eq!(world.tier.stats().used, ByteCount(MIB));
    world.read_all();
    let before = disk.writes_made();
    disk.set_room(None);
    assert!(world.demote_all().unwrap() > 0, "there is room now");
    assert!(disk.writes_made() > before);
    world.read_all();
    world.audit();
}

#[test]
fn a_place_that_cannot_be_written_is_not_used_again_and_the_pages_go_elsewhere() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 20);
    disk.fail_writes(&[Fault::Failed, Fault::Torn]);
    assert_eq!(world.demote_all().unwrap(), 20, "the third place took them");
    assert_eq!(world.tier.stats().failed, ByteCount(2 * MIB));
    world.restart(Box::new(disk.clone()));
    assert_eq!(world.tier.stats().failed, ByteCount(2 * MIB), "the next manager knows");
    world.read_all();
    world.release_those(|_| true);
    assert_eq!(world.tier.stats().used, ByteCount(0));
}

/// Fills a small tier, of whose segments the disk has refused the first, and has what is left of it cleaned while the disk refuses
/// what was kept for that. Then what was refused is done after all.
fn nothing_is_lost_to_a_write_that_lands_late(wrong: Fault, restarts: bool) {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 254 * 5 + 100);
    disk.fail_writes(&[wrong]);
    (0..3).for_each(|_| drop(world.demote_all()));
    assert!(disk.late() > 0, "{wrong:?}");
    if restarts {
        world.restart(Box::new(disk.clone()));
    }
    world.release_those(|at| !at.is_multiple_of(3));
    disk.fail_writes(&[Fault::Failed, Fault::Failed]);
    let _ = world.clean();
    let _ = world.demote_all();
    world.read_all();
    disk.land();
    world.read_all();
    world.audit();
}

#[test]
fn a_write_that_the_disk_refused_and_does_later_is_done_over_nothing_that_came_meanwhile() {
    for wrong in [Fault::Late, Fault::Torn, Fault::Short] {
        nothing_is_lost_to_a_write_that_lands_late(wrong, false);
        nothing_is_lost_to_a_write_that_lands_late(wrong, true);
    }
}

#[test]
fn a_write_that_had_no_room_and_is_done_later_is_done_over_nothing_that_came_meanwhile() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 200);
    disk.fail_writes(&[Fault::NoSpace]);
    assert!(matches!(world.demote_all(), Err(WriteError::NoSpace(_))));
    assert_eq!(world.demote_all().unwrap(), 200);
    disk.land();
    world.read_all();
    world.audit();
}

#[test]
fn a_place_is_used_again_once_every_sector_of_what_was_refused_there_is_seen_and_not_one_sooner() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 4, None, 1);
    disk.fail_writes(&[Fault::Late]);
    assert_eq!(world.demote_all().unwrap(), 1);
    let failed = |world: &World| world.tier.stats().failed;
    // A page that takes a little of a block: behind it are sectors in which nothing of it is.
    while disk.late() > 0 {
        assert_eq!(world.clean().unwrap(), 0);
        assert_eq!(failed(&world), ByteCount(MIB), "{} sectors are under way", disk.late());
        disk.land_some(1);
    }
    assert_eq!(world.clean().unwrap(), 0);
    assert_eq!(failed(&world), ByteCount(0), "all of it is there: nothing is under way");
    world.read_all();
}

#[test]
fn a_disk_that_refuses_everything_for_long_costs_few_places() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 20);
    for _ in 0..50 {
        disk.fail_writes(&[Fault::Late; 3]);
        assert!(matches!(world.demote_all(), Err(WriteError::Failed(_))));
    }
    assert_eq!(world.tier.stats().failed, ByteCount(3 * MIB), "it is tried where it has refused before");
    disk.fail_writes(&[]);
    assert_eq!(world.demote_all().unwrap(), 20);
    world.read_all();
    disk.land();
    world.read_all();
    let _ = world.clean();
    world.put(1, 9000);
    world.demote_all().unwrap();
    world.read_all();
    world.audit();
}

#[test]
fn a_disk_without_room_costs_no_place() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 20);
    disk.set_room(Some(255));
    let before = disk.writes_made();
    for _ in 0..20 {
        assert!(matches!(world.demote_all(), Err(WriteError::NoSpace(_))));
    }
    assert_eq!(disk.writes_made(), before, "what has no room is not written: no part of it comes later");
    assert_eq!(world.tier.stats().failed, ByteCount(0));
    disk.set_room(Some(256));
    assert_eq!(world.demote_all().unwrap(), 20);
    world.read_all();
}

#[test]
fn a_disk_that_cannot_be_written_at_all_loses_nothing() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 20);
    disk.fail_writes(&[Fault::Failed, Fault::Torn, Fault::Failed]);
    assert!(matches!(world.demote_all(), Err(WriteError::Failed(_))));
    assert_eq!(world.domains[&1].store(|store| store.stats().away.0), 0);
    world.read_all();
    world.audit();
}

#[test]
fn what_a_killed_manager_was_writing_is_written_over_nothing_that_came_later() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 4, None, 20);
    disk.fail_writes(&[Fault::Killed]);
    assert!(until_killed(|| world.demote_all()).is_none());
    world.restart(Box::new(disk.clone()));
    assert_eq!(world.demote_all().unwrap(), 20);
    assert_eq!(world.tier.stats().failed, ByteCount(MIB));
    assert_eq!(world.clean().unwrap(), 0);
    assert_eq!(world.tier.stats().failed, ByteCount(MIB), "nobody has seen the write end");
    disk.land();
    world.read_all();
    assert_eq!(world.clean().unwrap(), 0);
    assert_eq!(world.tier.stats().failed, ByteCount(0), "all of it is there: nothing is under way");
    world.put(1, 9000);
    world.demote_all().unwrap();
    world.read_all();
    world.audit();
}

#[test]
fn cleaning_ends_where_what_was_lost_keeps_segments_full() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 250 * 6);
    world.demote_all().unwrap();
    // Of each segment a page is lost and one is needed.
    for at in (0..6).rev().map(|segment| segment * 250) {
        world.lose(at);
    }
    world.release_those(|at| !at.is_multiple_of(249));
    let rounds = (0..100).take_while(|_| world.clean().unwrap() > 0).count();
    assert!(rounds < 10, "{rounds} rounds");
    world.read_all();
    world.release_those(|_| true);
    world.restart(Box::new(disk.clone()));
    assert_eq!(world.tier.stats().used, ByteCount(0), "the next manager counts anew");
}

#[test]
fn a_full_tier_can_be_cleaned_after_any_number_of_errors_once_what_was_refused_has_been_seen() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 250 * 6);
    world.demote_all().unwrap();
    world.release_those(|at| !at.is_multiple_of(3));
    disk.fail_writes(&[Fault::Late, Fault::Late]);
    assert!(world.clean().is_err(), "there is no place left to write to");
    assert!((0..20).all(|_| world.clean().is_err()), "and none is taken that may still be written");
    world.read_all();
    disk.land();
    assert!((0..20).any(|_| world.clean().is_ok()));
    assert!((0..20).any(|_| world.clean().unwrap() == 0));
    assert_eq!(world.tier.stats().failed, ByteCount(0));
    assert!(world.tier.stats().used <= ByteCount(5 * MIB), "{:?}", world.tier.stats());
    world.read_all();
    world.audit();
}

#[test]
fn a_page_that_cannot_be_read_is_the_only_one() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 2);
    world.demote_all().unwrap();
    let [first, second] = [world.held[0], world.held[1]];
    // Once more, because its bytes might have moved meanwhile.
    disk.fail_reads(&[Fault::Failed]);
    let error = world.read(first).unwrap_err();
    assert!(matches!(error, FetchError::Disk(ReadError::Failed { .. })), "{error}");
    world.read(second).unwrap();
    disk.fail_reads(&[Fault::Short, Fault::Short]);
    world.restart(Box::new(disk.clone()));
    world.read(first).unwrap();
}

#[test]
fn a_domain_gets_its_part_and_no_more_and_others_are_not_kept_from_theirs() {
    let disk = FaultyDisk::default();
    let quota = ByteCount(MIB / 2);
    let mut world = filled(&disk, 16, Some(quota), 300);
    world.put(2, 9000);
    let error = world.demote_all().unwrap_err();
    assert!(matches!(error, WriteError::Quota { domain: DomainId(1), .. }), "{error}");
    let some: Vec<Held> = world.held.iter().copied().take(100).chain(world.held.last().copied()).collect();
    assert_eq!(world.demote(some).unwrap(), 101);
    assert!(world.tier.owned(DomainId(1)) <= quota);
    assert!(world.demote_all().is_err());
    assert!(world.tier.owned(DomainId(1)) <= quota);
    world.release(0);
    world.read_all();
    world.audit();
}

#[test]
fn what_others_want_as_well_stays_in_memory() {
    let disk = FaultyDisk::default();
    let mut world = World::new(&disk, 10, None);
    let handle = world.put(1, 1);
    assert_eq!(world.put(1, 1), handle);
    let mut mover = world.mover();
    assert!(!mover.demote(&world.domains[&1], handle, Some(1)).unwrap());
    assert!(mover.demote(&world.domains[&1], handle, Some(2)).unwrap());
    assert_eq!(mover.flush().unwrap(), 1);
}

#[test]
fn what_was_released_between_its_draft_and_its_segment_is_forgotten() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 3);
    let mut mover = world.mover();
    for held in world.held.clone() {
        assert!(mover.demote(&world.domains[&1], held.handle, None).unwrap());
    }
    world.release(0);
    assert_eq!(mover.flush().unwrap(), 2);
    world.read_all();
    world.audit();
}

#[test]
fn a_reader_whose_window_is_older_than_the_segment_reads_anew() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 4, None, 40);
    // The same two segments again and again, with other pages in the same places.
    for round in 0..6 {
        let held: Vec<Held> = world.held.clone();
        assert_eq!(world.demote(held).unwrap(), 40, "round {round}");
        world.read_all();
        world.release_those(|_| true);
        for seed in 1..=40 {
            world.put(1, 1000 * (round + 1) + seed * 2);
        }
    }
}

#[test]
fn what_a_store_that_could_not_be_put_together_has_stays_whatever_the_others_do() {
    let disk = FaultyDisk::default();
    let mut world = World::new(&disk, 8, None);
    // Three segments that have something of both, three of domain 1's alone, in a tier that has no more.
    for seed in 1..=250 * 6 {
        world.put(if seed <= 250 * 3 && seed % 2 == 0 { 2 } else { 1 }, seed * 2);
    }
    world.demote_all().unwrap();
    world.restart_without(Box::new(disk.clone()), Some(2));
    world.read_all();
    // Two thirds, and so all segments are sparse, then everything; in between the manager is replaced within its process.
    let press = |world: &mut World| {
        while world.clean().is_ok_and(|won| won > 0) {}
        for seed in 0..600 {
            world.put(1, 10_000 + seed * 2);
        }
        let _ = world.demote_all();
        world.read_all();
    };
    world.release_those(|place| !place.is_multiple_of(3));
    press(&mut world);
    world.succeed();
    press(&mut world);
    world.release_those(|_| true);
    world.succeed();
    press(&mut world);
    assert!(world.tier.stats().used >= ByteCount(3 * MIB), "{:?}", world.tier.stats());
    world.restart(Box::new(disk.clone()));
    world.read_all();
    world.audit();
    world.release_those(|_| true);
    assert_eq!(world.tier.stats().used, ByteCount(0), "the next manager knows all stores");
}

#[test]
fn what_was_kept_for_a_store_is_free_once_nobody_is_left_who_could_need_it_and_the_rest_is_as_before() {
    let disk = FaultyDisk::default();
    let mut world = World::new(&disk, 8, None);
    // Four segments, of which the other domain has every second page, or all of the last.
    for seed in 1..=250 * 4 {
        world.put(if seed > 250 * 3 || seed % 2 == 0 { 2 } else { 1 }, seed * 2);
    }
    world.demote_all().unwrap();
    let used = world.tier.stats().used;
    world.restart_without(Box::new(disk.clone()), Some(2));
    world.succeed();
    assert_eq!(world.tier.stats().used, used);
    world.give_up_absent();
    assert!(world.tier.stats().used < used, "{:?}", world.tier.stats());
    world.audit();
    world.read_all();
    world.release_those(|_| true);
    assert_eq!(world.tier.stats().used, ByteCount(0));
    // What is written later is not kept for anybody.
    world.put(1, 9000);
    world.demote_all().unwrap();
    world.give_up_absent();
    world.read_all();
}

#[test]
fn a_page_that_is_lost_gives_up_no_place_that_its_damaged_record_names() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 8, None, 252);
    world.demote_all().unwrap();
    let (first, last) = (world.held[0], world.held[251]);
    let [own, other] = [first, last].map(|held| world.remote(held).unwrap());
    assert_ne!(own.at.bits() >> 14, other.at.bits() >> 14, "the last page is alone in its segment");
    // A bit of the first page's record goes wrong: it names the last one's place.
    let mut fetched = Fetched::new();
    let domain = &world.domains[&1];
    domain.store(|store| store.fetch(first.handle, &mut fetched)).unwrap();
    let (ticket, _) = fetched.ticket().unwrap();
    assert_eq!(domain.store(|store| store.send_away(&ticket, other.at)), Replacement::Made);
    assert!(world.read(first).is_err());
    world.lose(0);
    world.read(last).unwrap();
    // Nobody has written over it when others come, either.
    for seed in 1000..1400 {
        world.put(1, seed * 2);
    }
    let _ = world.demote_all();
    world.read_all();
    world.restart(Box::new(disk.clone()));
    world.audit();
}

#[test]
fn no_record_can_make_the_tier_read_what_is_not_its() {
    let disk = FaultyDisk::default();
    let world = filled(&disk, 10, None, 40);
    world.demote_all().unwrap();
    let held = world.held[7];
    let good = world.remote(held).unwrap();
    let mut window = Window::default();
    let mut bytes = vec![0; good.length];
    let writing = world.tier.writing(good);
    world.tier.read(DomainId(1), good, writing, &mut bytes, &mut window).unwrap();
    assert!(
        world.tier.read(DomainId(2), good, writing, &mut bytes, &mut window).is_err(),
        "another domain's"
    );
    let other = writing.map(|writing| writing + 1);
    assert!(world.tier.read(DomainId(1), good, other, &mut bytes, &mut window).is_err(), "another writing's");
    assert!(world.tier.read(DomainId(1), good, None, &mut bytes, &mut window).is_err(), "no writing's");
    let places: Vec<Remote> = world.held.clone().into_iter().filter_map(|held| world.remote(held)).collect();
    let segment = good.at.bits() & !0x3fff;
    for bits in (segment..segment + (1 << 14)).chain([0, 1 << 20, (1 << 35) - 1]) {
        let remote = Remote { at: Away::new(bits).unwrap(), ..good };
        let read = world.tier.read(DomainId(1), remote, world.tier.writing(remote), &mut bytes, &mut window);
        assert_eq!(read.is_ok(), places.contains(&remote), "place {bits:#x}");
    }
    let short = Remote { length: good.length - 1, ..good };
    assert!(world.tier.read(DomainId(1), short, writing, &mut bytes[1..], &mut window).is_err());
}

#[test]
fn limits_that_make_no_tier_are_refused() {
    let tier = |mib: u64| {
        let limits = Limits { disk: ByteCount(mib * MIB), domain: None };
        Tier::create(Box::new(FaultyDisk::default()), limits)
    };
    assert!(matches!(tier(u64::from(SEGMENTS_MIN) - 1), Err(TierError::TooSmall { .. })));
    assert!(matches!(tier((2 << 20) + 1), Err(TierError::TooLarge { .. })));
    assert_eq!(tier(u64::from(SEGMENTS_MIN)).unwrap().stats().limit, ByteCount(4 * MIB));
}

#[test]
fn a_tier_that_was_ended_gives_nothing_back_and_cannot_be_gone_on_with() {
    let disk = FaultyDisk::default();
    let mut world = filled(&disk, 10, None, 3);
    world.demote_all().unwrap();
    world.tier.end().unwrap();
    assert!(disk.bytes().is_empty());
    assert!(world.read(world.held[0]).is_err());
    world.put(1, 9);
    assert!(matches!(world.demote_all(), Err(WriteError::Over)), "nothing is encrypted under a key of zeros");
    let Keepsakes { table, key, .. } = world.tier.keepsakes();
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().unwrap();
    let next = Tier::inherit(Box::new(disk), owned(table), key.map(owned), None);
    assert!(matches!(next, Err(TierError::Table(_))), "{next:?}");
}

#[test]
fn drafts_take_whole_segments_and_no_byte_more() {
    let disk = FaultyDisk::default();
    let world = World::new(&disk, 10, None);
    let mut store = Store::new(HeapSlabs::new(4));
    let handle = store.put(&[7; PAGE_SIZE], &mut plimsoll_store::Encoder::new()).unwrap().unwrap().handle;
    for length in [1, 47, 48, 49, 1000, 4096] {
        let mut draft = world.tier.draft();
        let mut added = 0;
        while world.tier.add(&mut draft, DomainId(1), handle, &vec![1; length], Purpose::Demote).is_ok() {
            added += 1;
        }
        let room = (length + 16).next_multiple_of(64) + 16;
        assert_eq!(added, ((1 << 20) - 128) / room, "of {length}");
        let segment = world.tier.write(draft, Purpose::Demote).unwrap();
        let image = world.tier.image(segment).unwrap();
        assert_eq!(image.lines().count(), added);
        for line in image.lines() {
            let mut bytes = vec![0; length];
            image.bytes(&world.tier, &line, &mut bytes).unwrap();
            assert_eq!(bytes, vec![1; length]);
        }
    }
    assert!(disk.bytes().len().is_multiple_of(BLOCK_SIZE));
}
