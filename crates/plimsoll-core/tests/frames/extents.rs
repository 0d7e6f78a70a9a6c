//! Extents as machines see them: what each may ask for, and what becomes of it.
#![expect(clippy::unwrap_used, reason = "an unexpected refusal is a failure of the test")]
use plimsoll_core::frames::buddy::{FrameEntry, Frames, Kind, Order};
use plimsoll_core::frames::extents::{ExtentError, Extents, Handle, Slot, Task, Work};
use plimsoll_core::frames::{REACH_MAX, Rights};
use plimsoll_types::{MachineId, PageCount, Pfn};

type Host = Extents<Vec<FrameEntry>, Vec<Slot>, 8>;
type Answer = Result<Task, ExtentError>;

const ALICE: MachineId = MachineId(1);
const BOB: MachineId = MachineId(2);
const CAROL: MachineId = MachineId(3);
const NOBODY: MachineId = MachineId(99);
const READ: Rights = Rights::READ;

fn host() -> Host {
    let mut frames = Frames::new(vec![FrameEntry::default(); 64], Pfn(0));
    frames.add(Pfn(0), PageCount(64)).unwrap();
    let mut host = Extents::new(frames, vec![Slot::default(); 8]);
    [ALICE, BOB, CAROL].into_iter().for_each(|machine| host.admit(machine).unwrap());
    host
}

/// Does what the change needs, and returns what that was and the handle that holds then.
fn finish(host: &mut Host, answer: Answer) -> (Vec<&'static str>, Handle) {
    let mut task = answer.unwrap();
    let mut done = Vec::new();
    while task.work != Work::Nothing {
        done.push(match task.work {
            Work::Unmap(_) => "unmap",
            Work::Fence(_) => "fence",
            Work::Zero => "zero",
            Work::Nothing => unreachable!("left out above"),
        });
        host.audit().unwrap();
        task = host.done(task).unwrap();
    }
    host.audit().unwrap();
    (done, task.handle)
}

fn next_task(host: &Host) -> Option<Task> {
    host.tasks().next()
}

fn finish_all(host: &mut Host) {
    while let Some(task) = next_task(host) {
        finish(host, Ok(task));
    }
}

fn granted(host: &mut Host, to: MachineId) -> Handle {
    let answer = host.grant(to, Order::PAGE);
    finish(host, answer).1
}

#[test]
fn memory_is_zeroed_before_its_first_owner_reaches_it() {
    let mut host = host();
    let task = host.grant(ALICE, Order::new(3).unwrap()).unwrap();
    assert_eq!(task.work, Work::Zero);
    assert_eq!(host.rights(ALICE, task.handle), Rights::empty());
    let task = host.done(task).unwrap();
    assert_eq!((task.work, host.rights(ALICE, task.handle)), (Work::Nothing, Rights::all()));
    assert_eq!(host.owned_pages(ALICE), PageCount(8));
    assert_eq!(host.at(Pfn(task.piece.first.0 + 5)), Some(task.handle));
}

#[test]
fn a_donation_is_unmapped_fenced_and_zeroed_and_the_givers_handle_is_of_the_past() {
    let mut host = host();
    let old = granted(&mut host, ALICE);
    let answer = host.donate(ALICE, old, BOB);
    let (done, new) = finish(&mut host, answer);
    assert_eq!(done, ["unmap", "fence", "zero"]);
    assert_eq!(host.owner(new), Some(BOB));
    assert_ne!(old, new);
    for by in [ALICE, BOB] {
        assert_eq!(host.release(by, old), Err(ExtentError::NoSuchExtent { handle: old }));
    }
    assert_eq!(host.rights(ALICE, new), Rights::empty());
    assert_eq!((host.owned_pages(ALICE), host.owned_pages(BOB)), (PageCount(0), PageCount(1)));
}

#[test]
fn a_loan_is_the_borrowers_alone_and_zeroed_on_both_ways() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let answer = host.lend(ALICE, handle, BOB, READ);
    let (done, same) = finish(&mut host, answer);
    assert_eq!((done, same), (vec!["unmap", "fence", "zero"], handle));
    assert_eq!((host.rights(ALICE, handle), host.rights(BOB, handle)), (Rights::empty(), READ));
    assert_eq!(host.donate(ALICE, handle, CAROL), Err(ExtentError::InUse { handle }));
    assert_eq!(host.share(ALICE, handle, CAROL, READ), Err(ExtentError::InUse { handle }));
    assert_eq!(host.release(ALICE, handle), Err(ExtentError::InUse { handle }));
    assert_eq!(host.lend(BOB, handle, CAROL, READ), Err(ExtentError::NotOwner { by: BOB, handle }));
    let answer = host.give_back(BOB, handle);
    assert_eq!(finish(&mut host, answer).0, ["unmap", "fence", "zero"]);
    assert_eq!((host.rights(ALICE, handle), host.rights(BOB, handle)), (Rights::all(), Rights::empty()));
    assert_eq!(host.reclaim(ALICE, handle), Err(ExtentError::NotInUse { handle }));
    assert_eq!(host.give_back(BOB, handle), Err(ExtentError::NoSuchExtent { handle }));
}

#[test]
fn sharing_takes_nothing_from_the_owner_and_reclaiming_zeroes_nothing() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let answer = host.share(ALICE, handle, BOB, Rights::all());
    assert_eq!(finish(&mut host, answer).0, [""; 0]);
    let answer = host.share(ALICE, handle, CAROL, READ);
    assert_eq!(finish(&mut host, answer).0, [""; 0]);
    // Fewer rights are a revocation; what is left can be mapped anew afterwards.
    let task = host.share(ALICE, handle, BOB, READ).unwrap();
    assert_eq!(host.rights(BOB, handle), Rights::empty());
    assert_eq!(finish(&mut host, Ok(task)).0, ["unmap", "fence"]);
    let rights = [ALICE, BOB, CAROL].map(|machine| host.rights(machine, handle));
    assert_eq!(rights, [Rights::all(), READ, READ]);
    let answer = host.reclaim(ALICE, handle);
    assert_eq!(finish(&mut host, answer).0, ["unmap", "fence"]);
    assert_eq!(host.reach(handle).iter().collect::<Vec<_>>(), [(ALICE, Rights::all())]);
}

#[test]
fn frames_are_not_reusable_before_the_fence_was_reported() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let unmap = host.release(ALICE, handle).unwrap();
    assert!(matches!(unmap.work, Work::Unmap(from) if from.of(ALICE) == Rights::all()));
    assert_eq!(host.frames().free_pages(), PageCount(63));
    let fence = host.done(unmap).unwrap();
    assert!(matches!(fence.work, Work::Fence(_)));
    assert_eq!(host.frames().free_pages(), PageCount(63));
    assert_eq!(host.done(unmap), Err(ExtentError::Outdated { handle }));
    assert_eq!(host.frames_mut().free(fence.piece, Kind::Host).map_err(|_| ()), Err(()));
    assert_eq!(host.done(fence).unwrap().work, Work::Nothing);
    assert_eq!(host.frames().free_pages(), PageCount(64));
    assert_eq!(host.done(fence), Err(ExtentError::Outdated { handle }));
}

#[test]
fn a_dead_borrower_leaves_zeroed_frames_to_their_owner() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let answer = host.lend(ALICE, handle, BOB, Rights::all());
    finish(&mut host, answer);
    host.died(BOB).unwrap();
    let task = next_task(&host).unwrap();
    assert_eq!(host.reclaim(ALICE, handle), Err(ExtentError::Changing { handle }));
    assert_eq!(finish(&mut host, Ok(task)), (vec!["unmap", "fence", "zero"], handle));
    assert_eq!(host.rights(ALICE, handle), Rights::all());
    assert_eq!(host.died(BOB), Err(ExtentError::NotTo { machine: BOB }));
}

#[test]
fn no_loan_outlives_its_lender() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let answer = host.lend(ALICE, handle, BOB, Rights::all());
    finish(&mut host, answer);
    host.died(ALICE).unwrap();
    assert_eq!(host.rights(BOB, handle), Rights::empty());
    finish_all(&mut host);
    assert_eq!(host.frames().free_pages(), PageCount(64));
    assert_eq!(host.give_back(BOB, handle), Err(ExtentError::NoSuchExtent { handle }));
}

#[test]
fn a_donation_to_the_dying_stays_with_the_giver_and_one_of_the_dying_is_freed() {
    for (dies, owner, free) in [(BOB, Some(ALICE), 63), (ALICE, None, 64)] {
        let mut host = host();
        let handle = granted(&mut host, ALICE);
        let task = host.donate(ALICE, handle, BOB).unwrap();
        let fence = host.done(task).unwrap();
        host.died(dies).unwrap();
        // What was under way is still to be reported.
        assert_eq!(next_task(&host), Some(fence));
        finish_all(&mut host);
        host.audit().unwrap();
        assert_eq!((host.owner(handle), host.frames().free_pages()), (owner, PageCount(free)));
    }
}

#[test]
fn forged_handles_wrong_rights_and_wrong_machines_are_refused() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    let before = host.clone();
    for bits in [0, u64::MAX, handle.to_bits() + 1, handle.to_bits() + (1 << 32), 1 << 31] {
        let forged = Handle::from_bits(bits);
        assert_eq!(host.release(ALICE, forged), Err(ExtentError::NoSuchExtent { handle: forged }));
    }
    assert_eq!(host.release(CAROL, handle), Err(ExtentError::NoSuchExtent { handle }));
    for machine in [ALICE, NOBODY] {
        assert_eq!(host.lend(ALICE, handle, machine, READ), Err(ExtentError::NotTo { machine }));
    }
    for rights in [Rights::empty(), Rights::WRITE, Rights::WRITE | Rights::EXECUTE] {
        assert_eq!(host.share(ALICE, handle, BOB, rights), Err(ExtentError::Unmappable { rights }));
    }
    assert_eq!(host.give_back(ALICE, handle), Err(ExtentError::Owner { by: ALICE, handle }));
    assert_eq!(host.grant(NOBODY, Order::PAGE), Err(ExtentError::NotTo { machine: NOBODY }));
    assert!(matches!(host.grant(BOB, Order::BLOCK), Err(ExtentError::Frames(_))));
    assert_eq!(host, before);
}

#[test]
fn slots_machines_and_sharers_have_a_last_one() {
    let mut host = host();
    let handle = granted(&mut host, ALICE);
    for _ in 1..8 {
        granted(&mut host, ALICE);
    }
    assert_eq!(host.grant(ALICE, Order::PAGE), Err(ExtentError::NoSlot));
    assert_eq!(host.admit(ALICE), Err(ExtentError::NoRoom { machine: ALICE }));
    let more: Vec<_> = (10..15).map(MachineId).collect();
    more.iter().for_each(|machine| host.admit(*machine).unwrap());
    assert_eq!(host.admit(MachineId(15)), Err(ExtentError::NoRoom { machine: MachineId(15) }));
    for machine in more.iter().take(REACH_MAX - 1) {
        let answer = host.share(ALICE, handle, *machine, READ);
        finish(&mut host, answer);
    }
    assert_eq!(host.share(ALICE, handle, BOB, READ), Err(ExtentError::TooManySharers { handle }));
}
