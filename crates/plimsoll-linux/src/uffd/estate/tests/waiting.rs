//! What cannot be had just now, or is not what it should be, and waits for a manager that knows better.
use super::*;
use crate::disk::device::FileDisk;
use crate::disk::tier::Limits;
use crate::uffd::host::Incident;
use std::sync::LazyLock;

/// A process that has ended and was reaped.
static ENDED: LazyLock<Pidfd> = LazyLock::new(|| {
    let mut child = start_process();
    let process = Pidfd::from_child(&mut child).unwrap();
    child.wait().unwrap();
    process
});

/// Puts another process in the slots of machines' processes.
fn mix_up_the_process(keeper: &Map, estate: &Estate, other: &Pidfd) {
    for (.., record) in estate.records().filter(|(.., record)| record.kind == SHARD) {
        let copy = other.as_fd().try_clone_to_owned().unwrap();
        keeper.0.lock().insert(record.slots[PROCESS], copy).unwrap();
    }
}

#[test]
fn a_machine_whose_kept_process_is_another_that_has_ended_lives_as_long_as_its_vmm_has_its_socket() {
    let ended = LazyLock::force(&ENDED);
    for shards in [1, 3] {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, agents)) = offered(&estate, shards) else { return };
        drop(machine);
        mix_up_the_process(&keeper, &estate, ended);
        drop(estate);
        let estate = keeper.open().unwrap();
        let inheritance = estate.inherit();
        assert!(inheritance.lost.is_empty(), "{}", explain(&inheritance.lost[0].1));
        let custody = &inheritance.machines[0].shards[0].custody;
        // Whoever has its end of the socket has been asked.
        assert_eq!((custody.process(), custody.has_ended(Duration::ZERO)), (ProcessId::own(), false));
        drop((inheritance, agents));
    }
}

#[test]
fn a_machine_of_whose_process_nothing_is_known_waits_until_nobody_has_its_socket() {
    let (mut vmm, ended) = (start_process(), LazyLock::force(&ENDED));
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    if let Some((machine, agents)) = machine_of(Pidfd::from_child(&mut vmm).unwrap(), 5, 1) {
        estate.offer(&machine, &[]).unwrap();
        estate.taken(machine.id);
        mix_up_the_process(&keeper, &estate, ended);
        drop((machine, estate));
        let held = keeper.slots_taken();
        // This process, which has the socket, is not the one that handed the machine over.
        let mut manager = manage(&keeper);
        manager.forget_gone();
        assert_eq!((manager.unmanaged(), manager.machines().len()), (1, 0));
        drop(manager.stop());
        assert_eq!(keeper.slots_taken(), held, "a machine whose VMM lives was buried");
        drop(agents);
        let mut manager = manage(&keeper);
        manager.forget_gone();
        assert_eq!((manager.unmanaged(), keeper.slots_taken()), (0, vec![REGISTER]));
    }
    let _ = vmm.kill();
    let _ = vmm.wait();
}

#[test]
fn nothing_of_machines_that_are_gone_or_cannot_be_had_stays_open_in_a_manager() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let (Some((left, _agents)), Some((lost, _others))) = (machine(5, 1), machine(7, 1)) else { return };
    for machine in [&left, &lost] {
        estate.offer(machine, &[]).unwrap();
        estate.taken(machine.id);
    }
    estate.leave(left.id);
    estate.place(1)[6].fetch_xor(1 << 40, Ordering::Relaxed);
    drop((left, lost, estate));
    let estate = keeper.open().unwrap();
    assert!(estate.kept.lock().len() >= 10);
    assert_eq!(estate.inherit().lost.len(), 1);
    assert_eq!(estate.kept.lock().len(), 0);
}

/// An empty tier whose file is in the directory.
fn tier(directory: &tempfile::TempDir) -> Tier {
    let disk = FileDisk::create(&directory.path().join("tier")).unwrap();
    Tier::create(Box::new(disk), Limits { disk: ByteCount::mib(8), domain: None }).unwrap()
}

#[test]
fn a_disk_tier_is_in_slots_of_the_daemons_own_and_one_that_cannot_be_had_is_there_for_a_later_manager() {
    let directory = tempfile::tempdir().unwrap();
    let keeper = Arc::new(Map::default());
    keeper.open().unwrap().enter_tier(&tier(&directory)).unwrap();
    let held = keeper.slots_taken();
    assert!(held.iter().all(|slot| *slot < RESERVED), "a tier counts as a machine: {held:?}");
    let vault =
        |keeper: &Arc<Map>| Vault::of_estate(keeper.open().unwrap(), Budget::of(ByteCount::mib(64)), LIMIT);
    for slot in TIER_SLOTS {
        let missing = keeper.0.lock().remove(&slot).unwrap();
        let without = vault(&keeper);
        assert!(without.has_tier() && without.tier().is_none(), "another may take its place");
        let manager = Manager::start(without, Arc::new(NoProbe)).unwrap();
        let told = manager.host().take_incidents();
        let [Incident::NoTier { cause }] = &told[..] else { panic!("{told:?}") };
        assert!(cause.contains(&format!("nothing in slot {slot}")), "{cause}");
        drop(manager.stop());
        keeper.0.lock().insert(slot, missing);
    }
    assert!(vault(&keeper).tier().is_some());
    // A record that may be its.
    let estate = keeper.open().unwrap();
    estate.place(0)[1].fetch_xor(1, Ordering::Relaxed);
    drop(estate);
    let without = vault(&keeper);
    assert!(without.has_tier() && without.tier().is_none());
    assert_eq!(keeper.slots_taken(), held);
}

#[test]
fn what_a_manager_left_that_died_before_its_disk_tier_was_entered_is_in_the_way_of_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    estate.keep_in(TIER_SLOTS[0], tier(&directory).keepsakes().table, &mut Vec::new()).unwrap();
    drop(estate);
    let estate = keeper.open().unwrap();
    assert!(estate.inherit().tier.is_none());
    assert_eq!(keeper.slots_taken(), [REGISTER]);
    estate.enter_tier(&tier(&directory)).unwrap();
}
