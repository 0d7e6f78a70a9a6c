//! The estate with a keeper that is a map, and managers that "die" by being dropped.
use super::*;
use crate::explain;
use crate::uffd::linux_space::{AGENT_PATIENCE, Custody, LinuxSpace};
use crate::uffd::manager::{AdmitError, Manager, Membership, Vault};
use crate::uffd::probe::NoProbe;
use crate::uffd::shards::MemfdWords;
use crate::uffd::space::{Space, SpaceError};
use crate::uffd::stats::MachineStats;
use crate::uffd::wire::{self, DATAGRAM_MAX, FEATURES_NEEDED, Hello, Outcome, Welcome};
use parking_lot::Condvar;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_core::ledger::Budget;
use plimsoll_core::map::Words;
use plimsoll_core::word::{ObjectRef, PageState, PageWord};
use plimsoll_store::{Encoder, SlabKind, SlabMemory, SlabTag, Store};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::uffd::{Mode, Userfaultfd};
use plimsoll_sys::{ProcessId, fdpass};
use plimsoll_types::{Gpa, Hva};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

mod waiting;

/// Holds copies, as the keeper does. While there is one, no test of this library starts a process: that would have copies of everything,
/// locks and sockets among it, until it runs its program.
struct Map(Mutex<BTreeMap<u32, OwnedFd>>);

static MAPS: Mutex<usize> = Mutex::new(0);
static NO_MAPS: Condvar = Condvar::new();

impl Default for Map {
    fn default() -> Self {
        *MAPS.lock() += 1;
        Self(Mutex::default())
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        *MAPS.lock() -= 1;
        NO_MAPS.notify_all();
    }
}

/// Starts a process. To be called by those who have no [`Map`].
pub(crate) fn spawn(command: &mut Command) -> Child {
    let mut maps = MAPS.lock();
    NO_MAPS.wait_while(&mut maps, |maps| *maps > 0);
    command.spawn().unwrap()
}

/// One that ends with its input.
fn start_process() -> Child {
    spawn(Command::new("cat").stdin(Stdio::piped()))
}

impl Map {
    fn slots_taken(&self) -> Vec<u32> {
        self.0.lock().keys().copied().collect()
    }

    /// What the next manager gets.
    fn copies(&self) -> BTreeMap<u32, OwnedFd> {
        self.0.lock().iter().map(|(slot, fd)| (*slot, fd.try_clone().unwrap())).collect()
    }

    fn open(self: &Arc<Self>) -> Result<Estate, EstateError> {
        Estate::open(Arc::clone(self) as Arc<dyn Keep>, self.copies())
    }
}

impl Keep for Map {
    fn keep(&self, slot: u32, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        assert!(
            self.0.lock().insert(slot, descriptor.try_clone_to_owned()?).is_none(),
            "slot {slot} is taken"
        );
        Ok(())
    }

    fn let_go(&self, slot: u32) -> io::Result<()> {
        assert!(self.0.lock().remove(&slot).is_some(), "slot {slot} is empty");
        Ok(())
    }

    fn slots(&self) -> u32 {
        64
    }
}

const LIMIT: ByteCount = ByteCount::mib(4);

/// A machine of so many shards, of this process, and its VMM's ends of the sockets. `None` where there is no userfaultfd.
fn machine(id: u32, shards: u32) -> Option<(MachineVault, Vec<OwnedFd>)> {
    machine_of(Pidfd::open(ProcessId::own()).unwrap(), id, shards)
}

fn machine_of(process: Pidfd, id: u32, shards: u32) -> Option<(MachineVault, Vec<OwnedFd>)> {
    let process = Arc::new(process);
    let (mut vaults, mut agents) = (Vec::new(), Vec::new());
    for shard in 0..shards {
        let at = u64::from(shard) << 30;
        let region = Region { start: Gpa(at), bytes: ByteCount::mib(2) };
        let hello = Hello {
            name: "m".to_owned(),
            shard,
            shards,
            layout: GuestLayout::new(vec![region]).unwrap(),
            hvas: vec![Hva((1 << 40) + at)],
            airlock_base: Hva((1 << 41) + at),
            airlock_slots: 1,
            features: FEATURES_NEEDED,
        };
        let uffd =
            || Userfaultfd::open(Mode::UserOnly).inspect_err(|error| println!("SKIPPED: {}", explain(error)));
        let uffds = [uffd().ok()?, uffd().ok()?];
        let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
        let words = Arc::new(MemfdWords::create(hello.layout.page_limit().get()).unwrap());
        words.words()[5].store(77, Ordering::Relaxed);
        let custody = Arc::new(Custody::new(hello, Arc::clone(&process), uffds, ours));
        vaults.push(ShardVault { id: MachineId(id + shard), custody, words, stats: MachineStats::default() });
        agents.push(theirs);
    }
    let membership = Membership { group: GroupId(1), domain: DomainId(2), reservation: ByteCount::mib(1) };
    Some((MachineVault { id: MachineId(id), membership, shards: vaults }, agents))
}

/// Does whatever it is asked, until nobody can ask any more.
fn serve(agent: OwnedFd) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut bytes, mut reply) = ([0; DATAGRAM_MAX], Vec::new());
        while let Ok(Some(received)) = fdpass::recv(&agent, &mut bytes, 0) {
            let (ticket, items) = wire::decode_request(&bytes[..received.bytes]).unwrap();
            let done: Vec<Outcome> =
                items.iter().map(|item| Outcome { done: item.pages, stop: None }).collect();
            wire::encode_reply(&mut reply, ticket, &done);
            let _ = fdpass::send(&agent, &reply, &[]);
        }
    })
}

/// A manager of this process as the keeper's next one.
fn manage(keeper: &Arc<Map>) -> Manager {
    let vault = Vault::of_estate(keeper.open().unwrap(), Budget::of(ByteCount::mib(64)), LIMIT);
    Manager::start(vault, Arc::new(NoProbe)).unwrap()
}

/// What comes of handing that machine over to the manager, and the VMM's end of the socket.
fn admit(manager: &mut Manager, machine: &MachineVault) -> (Result<MachineId, AdmitError>, OwnedFd) {
    let custody = &machine.shards[0].custody;
    let (ours, theirs) = fdpass::seqpacket_pair().unwrap();
    fdpass::send(&theirs, &custody.hello.encode(), &custody.descriptors()[..2]).unwrap();
    (manager.admit(ours, Pidfd::open(ProcessId::own()).unwrap(), machine.membership), theirs)
}

fn heard(agent: &OwnedFd) -> Option<(Welcome, usize)> {
    let mut ready = [rustix::event::PollFd::new(agent, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut ready, Some(&now)).ok().filter(|ready| *ready > 0)?;
    let mut bytes = [0; DATAGRAM_MAX];
    let received = fdpass::recv(agent, &mut bytes, 64).unwrap()?;
    Some((Welcome::decode(&bytes[..received.bytes]).unwrap(), received.descriptors.len()))
}

#[test]
fn a_domain_comes_back_with_its_slabs_and_is_gone_when_it_was_struck() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let mut slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    let slab = slabs.acquire(SlabTag::new(SlabKind::Records { sequence: 0 })).unwrap();
    slabs.bytes_mut(slab).fill(9);
    estate.set_epoch(7);
    estate.set_next_id(12);
    let early = keeper.open().unwrap().inherit();
    assert!(early.domains.is_empty() && early.lost.len() == 1, "taken from a manager that lives");
    drop((slabs, estate, early));

    let estate = keeper.open().unwrap();
    assert_eq!((estate.epoch(), estate.next_id()), (7, 12));
    let mut inheritance = estate.inherit();
    let (id, group, slabs) = inheritance.domains.pop().unwrap();
    assert_eq!((id, group, slabs.held()), (DomainId(2), GroupId(1), 1));
    assert!(slabs.bytes(slab).iter().all(|byte| *byte == 9));
    estate.strike_domain(id);
    assert_eq!(keeper.slots_taken(), [REGISTER]);
    drop((slabs, estate));
    assert!(keeper.open().unwrap().inherit().domains.is_empty());
}

#[test]
fn a_domain_whose_machines_ended_before_they_could_be_taken_over_does_not_stay() {
    let keeper = Arc::new(Map::default());
    let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    keeper.open().unwrap().enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    drop(slabs);
    let mut manager = manage(&keeper);
    assert_eq!(manager.domains().count(), 1);
    assert!(manager.forget_gone().is_empty());
    assert_eq!((manager.domains().count(), keeper.slots_taken()), (0, vec![REGISTER]));
    assert_eq!(manager.host().ledger(|ledger| ledger.charged()), ByteCount(0));
}

/// A machine 5 that was offered to the next manager, and its agents' ends.
fn offered(estate: &Estate, shards: u32) -> Option<(MachineVault, Vec<OwnedFd>)> {
    let (machine, agents) = machine(5, shards)?;
    let further: Vec<OwnedFd> = agents.iter().skip(1).map(|agent| agent.try_clone().unwrap()).collect();
    estate.offer(&machine, &further).unwrap();
    Some((machine, agents))
}

#[test]
fn a_machine_comes_back_with_everything_and_one_that_was_offered_is_welcomed_again() {
    for shards in [1, 3] {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, agents)) = offered(&estate, shards) else { return };
        drop((machine, estate));

        let estate = keeper.open().unwrap();
        let mut machines = estate.inherit().machines;
        let inherited = machines.pop().unwrap();
        assert_eq!((inherited.id, inherited.shards.len()), (MachineId(5), shards as usize));
        assert_eq!(inherited.membership.domain, DomainId(2));
        assert_eq!(inherited.membership.reservation, ByteCount::mib(1));
        for (shard, index) in inherited.shards.iter().zip(0..) {
            assert_eq!((shard.id, shard.custody.hello.shard), (MachineId(5 + index), index));
            assert_eq!(shard.words.words()[5].load(Ordering::Relaxed), 77);
            assert_eq!(shard.custody.process(), ProcessId::own());
        }
        let welcome = Welcome::Accepted { machine: 5, epoch: 0 };
        assert_eq!(heard(&agents[0]), Some((welcome, shards as usize - 1)));
        drop((inherited, estate));

        // Now it counts as taken.
        let estate = keeper.open().unwrap();
        assert_eq!(estate.inherit().machines.len(), 1);
        assert_eq!(heard(&agents[0]), None);
        estate.strike(MachineId(5));
        assert_eq!(keeper.slots_taken(), [REGISTER]);
    }
}

#[test]
fn a_machine_that_was_left_is_told_so_by_the_next_manager_and_by_none_after_it() {
    for shards in [1, 3] {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, agents)) = offered(&estate, shards) else { return };
        estate.taken(machine.id);
        estate.leave(machine.id);
        // The manager that left it has come to tell the first of the shards, whose agent has gone.
        assert_eq!(heard(&agents[0]), None);
        rustix::net::shutdown(&agents[0], rustix::net::Shutdown::Both).unwrap();
        drop((machine, estate));

        let estate = keeper.open().unwrap();
        let inheritance = estate.inherit();
        assert!(inheritance.machines.is_empty() && inheritance.lost.is_empty());
        for agent in agents.iter().skip(1) {
            assert_eq!(heard(agent), Some((Welcome::GivenBack, 0)));
        }
        assert_eq!(keeper.slots_taken(), [REGISTER], "something of it is kept");
        drop(estate);
        assert!(keeper.open().unwrap().inherit().machines.is_empty());
    }
}

#[test]
fn a_machine_that_ends_takes_nothing_of_one_that_came_later_with_it() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let (Some((first, mut agents)), Some((second, _second_agent))) = (machine(5, 2), machine(7, 1)) else {
        return;
    };
    estate.offer(&first, &[agents.remove(1)]).unwrap();
    estate.taken(first.id);
    // The slot of the agent's end is free by now, and the next descriptor's.
    estate.offer(&second, &[]).unwrap();
    estate.taken(second.id);
    estate.strike(first.id);
    drop((first, second, estate));
    let inheritance = keeper.open().unwrap().inherit();
    assert!(inheritance.lost.is_empty(), "{}", explain(&inheritance.lost[0].1));
    assert_eq!(inheritance.machines.len(), 1);
    assert_eq!(keeper.slots_taken().len(), 1 + 5);
}

#[test]
fn a_machine_whose_manager_died_while_it_was_marked_as_taken_keeps_its_agents_end_no_longer() {
    for marked in 0..=2 {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, mut agents)) = machine(5, 2) else { return };
        estate.offer(&machine, &[agents.remove(1)]).unwrap();
        (0..marked).for_each(|record| estate.state(record).store(TAKEN, Ordering::Release));
        drop((machine, estate));
        assert_eq!(keeper.slots_taken().len(), 1 + 2 * 5 + 1);
        assert_eq!(keeper.open().unwrap().inherit().machines.len(), 1);
        assert_eq!(keeper.slots_taken().len(), 1 + 2 * 5, "{marked} records were marked");
        // One that had been told of all its agents is not told again.
        assert_eq!(heard(&agents[0]).is_some(), marked == 0);
    }
}

#[test]
fn what_no_record_names_is_let_go_and_a_machine_entered_by_half_does_not_count() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let Some((machine, agents)) = machine(5, 2) else { return };
    // As a manager leaves it that dies between two records.
    let mut slots = Vec::new();
    let record = estate.record(&machine, &machine.shards[0], None, &mut slots).unwrap();
    estate.enter(&[record], OFFERED).unwrap();
    estate.keep(agents[0].as_fd(), &mut slots).unwrap();
    assert_eq!(keeper.slots_taken().len(), 1 + 5 + 1);
    drop((machine, estate));
    let inheritance = keeper.open().unwrap().inherit();
    assert!(inheritance.machines.is_empty() && inheritance.lost.is_empty());
    assert_eq!(keeper.slots_taken(), [REGISTER]);
    assert!(keeper.open().unwrap().records().next().is_none());
}

#[test]
fn an_agent_that_answers_each_request_in_time_and_all_of_them_too_late_is_waited_for_no_longer_than_said() {
    /// What each answer takes; a busy machine is to come to one of ten.
    const EACH: Duration = Duration::from_millis(150);
    let Some((machine, agents)) = machine(5, 1) else { return };
    let shard = &machine.shards[0];
    let mut space = LinuxSpace::new(Arc::clone(&shard.custody), shard.words.journal().unwrap(), 3);
    let agent = std::thread::spawn(move || {
        let (mut bytes, mut reply) = ([0; DATAGRAM_MAX], Vec::new());
        let mut answered = 0;
        while let Ok(Some(received)) = fdpass::recv(&agents[0], &mut bytes, 0) {
            let (ticket, _) = wire::decode_request(&bytes[..received.bytes]).unwrap();
            std::thread::sleep(EACH);
            wire::encode_reply(&mut reply, ticket, &[]);
            answered += u32::from(fdpass::send(&agents[0], &reply, &[]).is_ok());
        }
        answered
    });
    let start = Instant::now();
    space.expect_answers_by(Some(start + 10 * EACH));
    let refused = (0..1000).map(|_| space.begin_epoch(3)).find_map(Result::err);
    assert!(matches!(refused, Some(SpaceError::Silent { .. })), "{refused:?}");
    assert!(start.elapsed() < AGENT_PATIENCE, "it waited for the last answer as for the first");
    drop((space, machine));
    assert!((1..=10).contains(&agent.join().unwrap()));
}

#[test]
fn nothing_is_let_go_because_of_a_damaged_record() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let Some((machine, _agents)) = machine(5, 1) else { return };
    estate.offer(&machine, &[]).unwrap();
    let held = keeper.slots_taken();
    estate.place(0)[6].fetch_xor(1 << 40, Ordering::Relaxed);
    drop((machine, estate));
    let inheritance = keeper.open().unwrap().inherit();
    assert_eq!((inheritance.machines.len(), inheritance.lost.len()), (0, 1));
    assert_eq!(keeper.slots_taken(), held);
}

#[test]
fn a_machine_of_which_one_record_is_damaged_keeps_what_its_other_records_name() {
    for damaged in 0..2 {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, mut agents)) = machine(5, 2) else { return };
        estate.offer(&machine, &[agents.remove(1)]).unwrap();
        let held = keeper.slots_taken();
        estate.place(damaged)[6].fetch_xor(1 << 40, Ordering::Relaxed);
        drop((machine, estate));
        let inheritance = keeper.open().unwrap().inherit();
        assert!(inheritance.machines.is_empty());
        assert_eq!(keeper.slots_taken(), held, "with record {damaged} damaged");
        let lost: Vec<String> = inheritance.lost.iter().map(|(_, error)| explain(error)).collect();
        assert_eq!(inheritance.lost.len(), 2, "{lost:?}");
        assert!(inheritance.lost.iter().all(|(id, _)| *id == MachineId(5)), "{lost:?}");
        assert!(lost.iter().any(|cause| cause.contains("records of it are missing")), "{lost:?}");
        // The next manager finds it as this one did.
        assert_eq!(keeper.open().unwrap().inherit().lost.len(), 2);
    }
}

#[test]
fn a_domain_whose_record_is_damaged_gets_no_second_store_while_its_machines_wait() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let (Some((first, mut agents)), Some((second, _))) = (machine(5, 1), machine(7, 1)) else { return };
    let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    first.shards[0].words.words()[5].store(0, Ordering::Relaxed);
    estate.offer(&first, &[]).unwrap();
    estate.taken(first.id);
    let agent = serve(agents.remove(0));
    let held = keeper.slots_taken();
    estate.place(0)[6].fetch_xor(1 << 40, Ordering::Relaxed);
    drop((first, slabs, estate));
    for _ in 0..2 {
        let mut manager = manage(&keeper);
        let (admitted, vmm) = admit(&mut manager, &second);
        let found = explain(&admitted.expect_err("a second store was made"));
        assert!(found.contains("could not be taken over, and its machines wait"), "{found}");
        assert_eq!(heard(&vmm), Some((Welcome::Refused { reason: found }, 0)));
        assert_eq!((manager.unmanaged(), manager.machines().len()), (1, 0));
        drop(manager.stop());
        assert_eq!(keeper.slots_taken(), held);
    }
    drop(keeper);
    agent.join().unwrap();
}

#[test]
fn of_two_stores_of_a_domain_none_is_taken_for_the_right_one() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    for _ in 0..2 {
        let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
        estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    }
    drop(estate);
    let inheritance = keeper.open().unwrap().inherit();
    assert_eq!((inheritance.domains.len(), inheritance.lost.len()), (0, 1));
    assert_eq!(keeper.slots_taken().len(), 1 + 2);
    // Nobody needs them: the next machine of the domain gets a store of its own, the only one.
    let Some((machine, _)) = machine(5, 1) else { return };
    let mut manager = manage(&keeper);
    let (admitted, _vmm) = admit(&mut manager, &machine);
    admitted.unwrap();
    drop(manager.stop());
    assert_eq!(keeper.slots_taken().len(), 1 + 1 + 5);
    assert_eq!(keeper.open().unwrap().inherit().domains.len(), 1);
}

#[test]
fn a_machine_that_cannot_be_put_together_counts_until_its_vmm_is_known_to_have_ended() {
    // Of two shards the sound one names the process; of one nobody knows it.
    for (shards, left) in [(2, 0), (1, 1)] {
        // Ends with this test, whatever becomes of that.
        let mut vmm = start_process();
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let machine = machine_of(Pidfd::from_child(&mut vmm).unwrap(), 5, shards);
        if let Some((machine, mut agents)) = machine {
            let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
            estate.offer(&machine, &agents.split_off(1)).unwrap();
            estate.taken(machine.id);
            estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
            estate.place(0)[6].fetch_xor(1 << 40, Ordering::Relaxed);
            drop((machine, slabs, estate));
            let mut manager = manage(&keeper);
            manager.forget_gone();
            assert_eq!((manager.unmanaged(), manager.machines().len()), (1, 0));
            // Its process is asked, not its records.
            vmm.kill().unwrap();
            vmm.wait().unwrap();
            assert_eq!(manager.unmanaged(), left, "of {shards} shards");
            manager.forget_gone();
            assert_eq!(manager.domains().count(), left, "its store is there as long as it may need it");
            drop(manager.stop());
            assert_eq!(manage(&keeper).unmanaged(), left);
        }
        let _ = vmm.kill();
        let _ = vmm.wait();
    }
}

#[test]
fn what_was_kept_for_a_machine_that_could_not_be_put_together_goes_with_its_vmm_and_nothing_of_others_does() {
    let mut vmm = start_process();
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let process = Pidfd::from_child(&mut vmm).unwrap();
    if let (Some((first, mut agents)), Some((second, mut others))) =
        (machine_of(process, 5, 2), machine(9, 1))
    {
        let mut store = Store::new(MemfdSlabs::create("test-slabs", LIMIT).unwrap());
        let handles = [3_u8, 5].map(|step| {
            let page = std::array::from_fn(|place| u8::try_from(place / 16).unwrap().wrapping_mul(step));
            store.put(&page, &mut Encoder::new()).unwrap().unwrap().handle
        });
        for (machine, handle) in [&first, &second].into_iter().zip(handles) {
            let word = PageWord::new(PageState::Stored(ObjectRef::new(handle.to_bits()).unwrap()));
            machine.shards[0].words.words()[5].store(word.0, Ordering::Relaxed);
        }
        estate.offer(&first, &agents.split_off(1)).unwrap();
        estate.offer(&second, &[]).unwrap();
        [first.id, second.id].into_iter().for_each(|id| estate.taken(id));
        let slabs = store.into_memory();
        estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
        estate.place(0)[6].fetch_xor(1 << 40, Ordering::Relaxed);
        drop((first, second, slabs, estate));
        let agent = serve(others.remove(0));
        let mut manager = manage(&keeper);
        let stored = |manager: &Manager| {
            let is_stored =
                |handle| manager.domain(DomainId(2)).unwrap().store(|store| store.whereabouts(handle));
            handles.map(|handle| is_stored(handle).is_ok())
        };
        manager.forget_gone();
        assert_eq!(stored(&manager), [true, true]);
        vmm.kill().unwrap();
        vmm.wait().unwrap();
        manager.forget_gone();
        assert_eq!(stored(&manager), [false, true]);
        drop((manager, keeper));
        agent.join().unwrap();
    }
    let _ = vmm.kill();
    let _ = vmm.wait();
}

#[test]
fn a_machine_that_a_manager_could_not_put_together_finds_its_pages_in_the_store_all_the_same() {
    for is_damaged in [false, true] {
        let keeper = Arc::new(Map::default());
        let estate = keeper.open().unwrap();
        let Some((machine, mut agents)) = machine(5, 1) else { return };
        let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
        estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
        let (mut store, page) =
            (Store::new(slabs), std::array::from_fn(|place| u8::try_from(place / 16).unwrap()));
        let handle = store.put(&page, &mut Encoder::new()).unwrap().unwrap().handle;
        let object = ObjectRef::new(handle.to_bits()).unwrap();
        let word = PageWord::new(PageState::Stored(object));
        machine.shards[0].words.words()[5].store(word.0, Ordering::Relaxed);
        estate.offer(&machine, &[]).unwrap();
        estate.taken(machine.id);
        drop((machine, store, estate));
        let is_stored = |manager: &Manager| {
            let mut found = [0; PAGE_SIZE];
            let read = manager.domain(DomainId(2)).unwrap().store(|store| store.get(handle, &mut found));
            read.is_ok() && found == page
        };
        let records = keeper.open().unwrap();
        let (place, .., record) = records.records().find(|(.., record)| record.kind == SHARD).unwrap();
        let words = record.slots[3];
        // Nobody knows whose its record is; or its words are not to be had for a moment, as when the host is short of memory.
        let spoil = || {
            records.place(place)[6].fetch_xor(1 << 40, Ordering::Relaxed);
        };
        let missing = if is_damaged { None } else { keeper.0.lock().remove(&words) };
        if is_damaged {
            spoil();
        }
        let mut manager = manage(&keeper);
        manager.forget_gone();
        assert_eq!((manager.unmanaged(), manager.machines().len()), (1, 0));
        assert!(is_stored(&manager), "damaged: {is_damaged}");
        drop(manager.stop());
        if is_damaged {
            spoil();
        }
        keeper.0.lock().extend(missing.map(|missing| (words, missing)));
        // Then it is taken for what it is, as far as this machine without memory can be.
        assert_eq!(keeper.open().unwrap().inherit().machines.len(), 1);
        let agent = serve(agents.remove(0));
        assert!(is_stored(&manage(&keeper)));
        drop((records, keeper));
        agent.join().unwrap();
    }
}

#[test]
fn what_is_in_use_beside_machines_is_known_before_the_first_fault_is_served() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    drop((slabs, estate));
    let used = ByteCount::mib(7);
    let mut vault = Vault::of_estate(keeper.open().unwrap(), Budget::of(ByteCount::mib(64)), LIMIT);
    vault.set_used(used);
    for _ in 0..2 {
        let manager = Manager::start(vault, Arc::new(NoProbe)).unwrap();
        let (counted, charged) = manager.host().ledger(|ledger| (ledger.used(), ledger.charged()));
        assert_eq!((counted, charged > ByteCount(0)), (used, true), "the store is charged once");
        // The next one in this process goes on with what this one knew.
        vault = manager.stop();
    }
}

#[test]
fn a_domain_of_which_only_the_record_is_damaged_is_no_machine() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    estate.place(0)[6].fetch_xor(1 << 40, Ordering::Relaxed);
    drop((slabs, estate));
    assert_eq!(manage(&keeper).unmanaged(), 0);
}

#[test]
fn a_damaged_record_is_not_struck_with_whom_it_has_come_to_name() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let (Some((first, _agent)), Some((second, _second_agent))) = (machine(5, 1), machine(7, 1)) else {
        return;
    };
    let slabs = MemfdSlabs::create("test-slabs", LIMIT).unwrap();
    estate.enter_domain(DomainId(2), GroupId(1), &slabs, LIMIT).unwrap();
    estate.offer(&first, &[]).unwrap();
    let held = keeper.slots_taken();
    estate.offer(&second, &[]).unwrap();
    // Machine 5 says that it is machine 7, and domain 2 that it is domain 3.
    estate.place(1)[1].fetch_xor(2 << 32, Ordering::Relaxed);
    estate.place(0)[3].fetch_xor(1, Ordering::Relaxed);
    assert_eq!(estate.records().map(|(.., record)| record.machine).collect::<Vec<_>>(), [0, 7, 7]);
    estate.taken(second.id);
    estate.strike(second.id);
    estate.strike_domain(DomainId(3));
    assert_eq!(keeper.slots_taken(), held);
    // Nor with whom it may have named.
    estate.strike(first.id);
    assert_eq!(keeper.slots_taken(), held);
}

#[test]
fn a_register_of_another_version_or_none_is_refused_and_left_alone() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let refused = |bytes: &[u8]| {
        let register = Memfd::create("test", ByteCount(bytes.len() as u64)).unwrap();
        let memory = SharedMapping::new(&register).unwrap();
        for (word, bytes) in memory.as_atomic_u64s().iter().zip(bytes.as_chunks().0) {
            word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
        }
        keeper.0.lock().insert(REGISTER, register.as_fd().try_clone_to_owned().unwrap());
        let refused = keeper.open().unwrap_err();
        assert!(
            memory
                .as_atomic_u64s()
                .iter()
                .zip(bytes.as_chunks().0)
                .all(|(word, bytes)| { word.load(Ordering::Relaxed) == u64::from_le_bytes(*bytes) })
        );
        assert_eq!(keeper.slots_taken(), [REGISTER]);
        recognise(register.into()).unwrap_err();
        refused
    };
    // As its writers wrote the first page of versions 1 to 3: epoch 7, the next identity 9, and then as many bytes as those had. Of a newer
    // one nobody knows how many it has.
    let older = [1, 2, 3].map(|version| (version, SIZE));
    for (version, size) in older.into_iter().chain([(VERSION + 1, SIZE), (VERSION + 1, 2 * SIZE), (9, 4096)])
    {
        let mut bytes = vec![0; size];
        bytes[..8].copy_from_slice(b"PLIMREGI");
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        bytes[12..16].copy_from_slice(&4096_u32.to_le_bytes());
        bytes[16..32].copy_from_slice(&[7_u64.to_le_bytes(), 9_u64.to_le_bytes()].concat());
        let error = refused(&bytes);
        assert!(matches!(error, EstateError::Version { found } if found == version), "{error}");
    }
    let mut bytes = vec![0; 4096];
    assert!(matches!(refused(&bytes), EstateError::Magic { found: 0 }));
    bytes[..8].copy_from_slice(b"PLIMREGI");
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    assert!(matches!(refused(&bytes), EstateError::Memory(_)));
    drop(estate);
}

#[test]
fn an_estate_that_is_full_says_so_and_keeps_nothing_of_what_did_not_fit() {
    let keeper = Arc::new(Map::default());
    let estate = keeper.open().unwrap();
    let mut held = Vec::new();
    for id in 0.. {
        let Some((machine, agents)) = machine(id, 1) else { return };
        let before = keeper.slots_taken();
        match estate.offer(&machine, &[]) {
            Ok(()) => held.push((machine, agents)),
            Err(error) => {
                assert!(matches!(error, EstateError::Full { slots: 64 }), "{error}");
                assert_eq!(keeper.slots_taken(), before);
                break;
            }
        }
    }
    assert_eq!(held.len(), (64 - RESERVED as usize) / 5);
}
