//! Single properties of shadow tables, each shown by one guest.
use crate::world::{CAPS, Guest, Mistake, Op, Place, World};
use crate::{BLOCK, DIRTY, PRESENT, ROOTS, USER, address, direct, guest};
use plimsoll_mmu::format::Feature;
use plimsoll_mmu::format::x86::{Caps, Long4};
use plimsoll_mmu::shadow::{Backing, Error, Load, Outcome, P2m, Shadow, Writes};
use plimsoll_mmu::x86::{Control, Mode, Registers};
use plimsoll_mmu::{Access, Input, Level};
use plimsoll_types::Gpa;

fn world<'a>(guest: &'a Guest, place: &'a mut Place) -> World<'a> {
    World::new(guest, place, ROOTS[0] << 12, Mistake::None)
}

fn touch(world: &mut World<'_>, input: Input, access: Access) {
    let word = PRESENT | USER | 12 << 12;
    world.step(Op::Touch(0, input, access, Mode::Supervisor, word)).expect("as on real tables");
}

#[test]
fn a_table_has_one_shadow_whatever_address_spaces_lead_to_it() {
    let (guest, mut place) = (guest(), Place::new(16));
    let mut world = world(&guest, &mut place);
    touch(&mut world, address([0, 0, 0, 1], 0), Access::Read);
    let leaves = world.host.leaves();
    world.step(Op::Cr3(0, ROOTS[1] << 12, Load::Keeps)).expect("there is room");
    touch(&mut world, address([0, 0, 0, 1], 0), Access::Read);
    assert_eq!(world.host.leaves(), leaves, "the other root leads to the same leaf");
}

#[test]
fn a_table_of_pages_is_written_without_faults_until_it_rests_for_a_fence() {
    let (guest, mut place) = (guest(), Place::new(16));
    let mut world = world(&guest, &mut place);
    let entry = direct(7 << 12);
    touch(&mut world, address([0, 0, 0, 1], 0), Access::Read);
    touch(&mut world, entry, Access::Write);
    let faults = world.seen.faults;
    for _ in 0..10 {
        touch(&mut world, entry, Access::Write);
    }
    assert_eq!(world.seen.faults, faults, "unsync");
    let protected = |world: &World<'_>| {
        world.host.leaves().iter().any(|(_, leaf)| {
            leaf.output.0 == (0x40 + 7) << 12 && !leaf.permissions.contains(plimsoll_mmu::Permissions::WRITE)
        })
    };
    assert!(!protected(&world));
    world.step(Op::Flush(0)).expect("a fence");
    assert!(protected(&world), "the right to write is gone");
    touch(&mut world, entry, Access::Read);
    touch(&mut world, entry, Access::Write);
    assert_eq!(world.seen.emulated, 0);
    world.step(Op::Flush(0)).expect("a fence");
    world.step(Op::Flush(0)).expect("a fence");
    let faults = world.seen.faults;
    touch(&mut world, entry, Access::Read);
    touch(&mut world, entry, Access::Write);
    assert!(world.seen.faults > faults, "the first write is seen again");
}

#[test]
fn a_write_between_a_fence_of_the_guest_and_the_hosts_is_seen_at_the_next() {
    let (guest, mut place) = (guest(), Place::new(16));
    let mut world = world(&guest, &mut place);
    let (page, entry) = (address([0, 0, 0, 1], 0), direct(7 << 12 | 8));
    let edit = Op::Touch(1, entry, Access::Write, Mode::Supervisor, PRESENT | USER | 12 << 12);
    touch(&mut world, page, Access::Read);
    world.step(edit).expect("the table is unsync");
    world.step(Op::Flush(0)).expect("a fence");
    world.step(edit).expect("the table is writable again");
    touch(&mut world, page, Access::Read);
    let late = world.seen.late;
    world.step(Op::Flush(0)).expect("a fence");
    assert!(world.seen.late > late, "the other processor wrote before it heard of it");
    world.step(Op::Flush(0)).expect("a fence");
    // The judge says if this goes where the entry said before the late write.
    touch(&mut world, page, Access::Read);
}

#[test]
fn a_large_page_is_one_leaf_until_a_table_in_it_is_shadowed() {
    let (guest, mut place) = (guest(), Place::new(16));
    let mut world = world(&guest, &mut place);
    let large = |world: &World<'_>| world.host.leaves().iter().filter(|(_, leaf)| leaf.shift == 21).count();
    touch(&mut world, address([0, 0, 2, 5], 0), Access::Write);
    assert_eq!(large(&world), 1);
    // By way of a table in page 2 of the block, which maps the block as well.
    touch(&mut world, address([1, 1, 0, 5], 0), Access::Read);
    assert_eq!(large(&world), 0);
    touch(&mut world, address([0, 0, 2, 5], 0), Access::Write);
    assert_eq!(large(&world), 0);
    touch(&mut world, address([0, 0, 2, 2], 0), Access::Write);
    assert_eq!(world.seen.emulated, 1, "a write to the table itself");
    assert_eq!(guest.get((BLOCK + 2) << 12), PRESENT | USER | 12 << 12);
}

#[test]
fn a_large_page_whose_writes_are_logged_is_in_pieces_and_each_is_logged() {
    let guest = guest();
    for page in BLOCK..BLOCK + 512 {
        let backing = guest.backing(Gpa(page << 12)).expect("the block is there");
        guest.back(page, Backing { writes: Writes::Logged, ..backing });
    }
    let mut place = Place::new(16);
    let mut world = world(&guest, &mut place);
    let logged = || guest.logged.borrow().iter().copied().collect::<Vec<_>>();
    for (pages, page) in (1..).zip([5, 6, 9]) {
        touch(&mut world, address([0, 0, 2, page], 0), Access::Read);
        assert_eq!(logged().len(), pages - 1, "a read is no write");
        touch(&mut world, address([0, 0, 2, page], 0), Access::Write);
        assert_eq!(logged().len(), pages, "{:?}", logged());
    }
    assert!(world.host.leaves().iter().all(|(_, leaf)| leaf.shift == 12));
}

#[test]
fn dirty_is_set_by_the_first_write_and_by_no_read() {
    let (guest, mut place) = (guest(), Place::new(16));
    let mut world = world(&guest, &mut place);
    let entry = 7 << 12 | 8;
    for _ in 0..2 {
        touch(&mut world, address([0, 0, 0, 1], 0), Access::Read);
        assert_eq!(guest.get(entry) & DIRTY, 0);
    }
    touch(&mut world, address([0, 0, 0, 1], 0), Access::Write);
    assert_eq!(guest.get(entry) & DIRTY, DIRTY);
}

/// What becomes of a supervisor's write to a user's page that is read-only, where CR0.WP is clear.
fn write_without_wp(caps: Caps, control: Control) -> Outcome<crate::common::Outside> {
    let guest = guest();
    let read_only = PRESENT | USER;
    guest.set(7 << 12 | 8, 11 << 12 | read_only);
    let mut place = Place::new(16);
    let mut shadow = place.shadow(caps);
    let registers = Registers { cr3: ROOTS[0] << 12, control, pkru: 0, caps };
    let (root, _) = shadow.load(&guest, &registers, Load::Fences).expect("there is room");
    assert!(root.is_some());
    let access = (Access::Write, Mode::Supervisor);
    let (outcome, _) =
        shadow.fault(&guest, &registers, address([0, 0, 0, 1], 8), access).expect("there is room");
    outcome
}

#[test]
fn what_tables_cannot_say_without_wp_is_emulated() {
    let keys = Caps { keys: Feature::On, ..CAPS };
    let emulate = Outcome::Emulate { at: Gpa(11 << 12 | 8) };
    assert_eq!(write_without_wp(CAPS, Control::empty()), Outcome::Resume);
    assert_eq!(write_without_wp(CAPS, Control::SMEP), Outcome::Resume);
    assert_eq!(write_without_wp(CAPS, Control::SMAP | Control::ALIGNMENT_CHECK), emulate);
    assert_eq!(write_without_wp(keys, Control::empty()), emulate);
}

#[test]
fn too_few_records_are_an_error_that_says_so() {
    let guest = guest();
    let mut place = Place::new(3);
    let mut shadow = place.shadow(CAPS);
    let control = Control::WRITE_PROTECT;
    let registers = Registers { cr3: ROOTS[0] << 12, control, pkru: 0, caps: CAPS };
    let access = (Access::Read, Mode::User);
    let input = address([0, 0, 0, 1], 0);
    let not_loaded = shadow.fault(&guest, &registers, input, access);
    assert_eq!(not_loaded.err(), Some(Error::NotLoaded { cr3: registers.cr3 }));
    let (root, _) = shadow.load(&guest, &registers, Load::Fences).expect("there is room for one");
    assert!(root.is_some());
    let exhausted = shadow.fault(&guest, &registers, input, access);
    assert_eq!(exhausted.err(), Some(Error::Exhausted { level: Level(1) }));
    let mut place = Place::new(0);
    let storage =
        Shadow::<Long4, _, _>::new((&mut place.records, &mut []), &place.host, &mut place.frames, CAPS);
    assert!(matches!(storage, Err(Error::Storage { records: 0, heads: 0 })));
}
