//! Machines whose memory goes to a real disk, and comes back.
use crate::ahead::{Idle, SAMPLE_PERIOD};
use crate::crash::{Random, seed};
use crate::fleet::{DOMAIN, Fleet, Guest, machine, until, zipf};
use plimsoll_guest::content::Mix;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_linux::disk::device::{Blocks, Disk, FileDisk};
use plimsoll_linux::disk::reader::Reading;
use plimsoll_linux::disk::tier::{Limits, Tier};
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_types::ByteCount;
use plimsoll_vmm::config::VmmConfig;
use plimsoll_vmm::control::Command;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use tempfile::TempDir;

/// Times a machine is parked and its manager replaced.
const ROUNDS: usize = 8;

/// A tier of so many MiB in a directory on a disk.
fn tier(mib: u64) -> (TempDir, Tier) {
    let (directory, disk) = disk();
    let tier = tier_on(Box::new(disk), mib);
    assert_eq!(tier.start_reading(None).unwrap(), Reading::Ring);
    (directory, tier)
}

fn disk() -> (TempDir, FileDisk) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = FileDisk::create(&directory.path().join("tier")).unwrap();
    (directory, disk)
}

fn tier_on(disk: Box<dyn Disk>, mib: u64) -> Tier {
    Tier::create(disk, Limits { disk: ByteCount::mib(mib), domain: None }).unwrap()
}

/// A tier whose disk is read in that way, by threads.
fn tier_read_by<F>(mib: u64, read: F) -> (TempDir, Tier)
where
    F: Fn(&FileDisk, u64, &mut [u8]) -> io::Result<usize> + Send + Sync + 'static,
{
    let (directory, disk) = disk();
    (directory, tier_on(Box::new(ReadBy { disk, read }), mib))
}

struct ReadBy<F> {
    disk: FileDisk,
    read: F,
}

impl<F: Fn(&FileDisk, u64, &mut [u8]) -> io::Result<usize> + Send + Sync> Disk for ReadBy<F> {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        (self.read)(&self.disk, offset, into)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.disk.write_at(offset, bytes)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.disk.reserve(offset, bytes)
    }

    fn shows_what_has_landed(&self) -> bool {
        self.disk.shows_what_has_landed()
    }

    fn empty(&self) -> io::Result<()> {
        self.disk.empty()
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        self.disk.keepsake()
    }
}

fn on_disk(tier: Tier) -> Fleet {
    let mut fleet = Fleet::on_disk(tier);
    fleet.manager().govern(Box::new(Idle), SAMPLE_PERIOD).unwrap();
    fleet
}

/// Fills its memory, and then touches a few pages of it now and then.
fn idle() -> WorkloadSpec {
    WorkloadSpec { ops_per_second: 10, ..WorkloadSpec::new(WorkloadKind::Idle) }
}

/// Pages that are somebody's alone: of text and of random bytes.
fn unshared(mut config: VmmConfig) -> VmmConfig {
    config.workload.mix = Mix { zero: 0, duplicate: 0, text: 50, random: 50 };
    config
}

/// What of the machine is in memory: RAM, limbo and the whole store of its domain.
fn in_memory(fleet: &Fleet, guest: &Guest) -> ByteCount {
    let stats = fleet.view(guest.id).stats;
    stats.census.in_ram().bytes() + stats.limbo.bytes() + fleet.see().domain(DOMAIN).unwrap().held()
}

/// Objects that lie on the disk.
fn away(fleet: &Fleet) -> u64 {
    fleet.see().domain(DOMAIN).unwrap().store(|store| store.stats().away.0)
}

/// A machine of 128 MiB in less than four, and all of it right when it is wanted.
pub(crate) fn wakes_right() {
    let (_directory, tier) = tier(256);
    let mut fleet = on_disk(tier);
    let mut guest = fleet.add(&machine("sleeper", 128, idle()));
    guest.until_running();
    let before = in_memory(&fleet, &guest);
    fleet.see().park(guest.id);
    until("the machine to be on the disk", || {
        (in_memory(&fleet, &guest) <= ByteCount::mib(4) && away(&fleet) > 10_000).then_some(())
    });
    let stats = fleet.see().host().tier().unwrap().stats();
    println!(
        "{before} in memory before, {} parked; {} objects on disk: {stats:?}",
        in_memory(&fleet, &guest),
        away(&fleet)
    );
    guest.goes_on();
    fleet.see().wake(guest.id);
    until("what it uses to be back", || {
        (fleet.view(guest.id).stats.faults.stored > 0 || fleet.view(guest.id).stats.ahead.brought > 0)
            .then_some(())
    });
    guest.finish();
    let stats = fleet.see().host().tier().unwrap().stats();
    println!("{} pages in {} reads", stats.pages_read, stats.reads);
    assert!(stats.pages_read > 10_000 && stats.reads < stats.pages_read / 4, "{stats:?}");
    fleet.until_gone(guest.id);
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.see().host().tier().unwrap().stats().live, ByteCount(0), "nobody needs anything of it");
}

/// Managers replaced while pages are on their way out and back.
pub(crate) fn outlive_managers() {
    let mut random = Random(seed());
    let (_directory, tier) = tier(128);
    let mut fleet = on_disk(tier);
    let slow = WorkloadSpec { ops_per_second: 2000, ..zipf() };
    let mut guests = [fleet.add(&machine("idle", 64, idle())), fleet.add(&machine("serves", 48, slow))];
    guests.iter().for_each(Guest::until_running);
    for round in 0..ROUNDS {
        guests.iter().for_each(|guest| fleet.see().park(guest.id));
        // Or all there are: what the managers before this one have moved stays where it is.
        let enough = 1 + random.below(9000) as u64;
        until("objects to leave", || (away(&fleet) >= enough).then_some(()));
        println!("round {round}: {} objects on disk", away(&fleet));
        fleet.replace(Arc::new(NoProbe));
        fleet.manager().govern(Box::new(Idle), SAMPLE_PERIOD).unwrap();
        guests.iter().for_each(|guest| fleet.see().wake(guest.id));
        guests.iter().for_each(Guest::goes_on);
    }
    guests.iter_mut().for_each(Guest::finish);
    guests.iter().for_each(|guest| fleet.until_gone(guest.id));
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.see().host().tier().unwrap().stats().live, ByteCount(0));
}

/// What reads of a disk wait at while it is closed.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    is_closed: bool,
    waiting: usize,
}

impl Gate {
    fn set_closed(&self, is_closed: bool) {
        self.state.lock().unwrap().is_closed = is_closed;
        self.changed.notify_all();
    }

    fn waiting(&self) -> usize {
        self.state.lock().unwrap().waiting
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        state = self.changed.wait_while(state, |state| state.is_closed).unwrap();
        state.waiting -= 1;
    }
}

/// Opens it at the end, of a test that failed too: nobody can stop who waits for a disk.
struct Opens<'a>(&'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.set_closed(false);
    }
}

/// Has a vCPU do something with some of its pages.
fn probe(guest: &Guest, vcpu: u32, task: Task, first_page: u64, pages: u64) {
    let probe = ProbeCommand { first_page, pages, ..ProbeCommand::new(task, Order::Ascending) };
    guest.command(&Command::Probe { vcpu, probe });
}

fn until_answered(guest: &Guest, answers: usize) {
    until(&format!("answer {answers}"), || {
        assert_eq!(guest.state().died, None);
        (guest.state().probed == answers).then_some(())
    });
}

/// One vCPU waits for a disk that does not answer, and the other goes on.
pub(crate) fn slow_disk() {
    let gate = Arc::new(Gate::default());
    let passed = Arc::clone(&gate);
    let (_directory, tier) = tier_read_by(128, move |disk, offset, into| {
        passed.pass();
        disk.read_at(offset, into)
    });
    let mut fleet = on_disk(tier);
    let probes = WorkloadSpec::new(WorkloadKind::Probe);
    let mut guest = fleet.add(&unshared(VmmConfig { vcpus: 2, ..machine("probes", 64, probes) }));
    probe(&guest, 0, Task::Populate, 0, 5000);
    until_answered(&guest, 1);
    fleet.see().park(guest.id);
    until("the machine to be on the disk", || (away(&fleet) > 4500).then_some(()));
    fleet.see().wake(guest.id);
    // What the vCPUs and their VMM need to speak to each other comes back.
    for round in 0..3 {
        probe(&guest, 0, Task::Verify, 10 * round, 10);
        probe(&guest, 1, Task::Populate, 100 * round, 100);
    }
    until_answered(&guest, 7);
    let _opens = Opens(&gate);
    gate.set_closed(true);
    probe(&guest, 0, Task::Verify, 2000, 2000);
    until("a fault to wait for the disk", || (gate.waiting() > 0).then_some(()));
    // Into memory that nobody has touched.
    let before = fleet.view(guest.id).stats.faults.zero;
    let counted = fleet.see().host().bustle().served();
    probe(&guest, 1, Task::Populate, 300, 1500);
    until_answered(&guest, 8);
    until("faults to be served", || (fleet.view(guest.id).stats.faults.zero > before).then_some(()));
    assert!(fleet.see().host().bustle().served() > counted, "the host is not told of them");
    assert!(gate.waiting() > 0, "the disk still does not answer");
    gate.set_closed(false);
    until_answered(&guest, 9);
    assert_eq!(guest.state().summary.wrong_words, 0);
    guest.kill();
    fleet.until_gone(guest.id);
    assert_eq!(fleet.incidents(), []);
}

/// What finds no room on the disk is kept in memory, the operator is told once, and nothing is lost.
pub(crate) fn full_disk() {
    let (_directory, tier) = tier(8);
    let mut fleet = on_disk(tier);
    let mut guest = fleet.add(&unshared(machine("large", 64, idle())));
    guest.until_running();
    fleet.see().park(guest.id);
    let told = until("the operator to be told", || Some(fleet.incidents()).filter(|told| !told.is_empty()));
    let [Incident::Disk { cause }] = &told[..] else { panic!("{told:?}") };
    println!("{cause}");
    assert!(cause.contains("full"), "{cause}");
    let stats = fleet.see().host().tier().unwrap().stats();
    assert!(stats.used <= ByteCount::mib(6) && stats.live > ByteCount(0), "{stats:?}");
    guest.goes_on();
    fleet.see().wake(guest.id);
    guest.finish();
    fleet.until_gone(guest.id);
    assert_eq!(fleet.incidents(), [], "once");
}

/// Damage of the disk is the loss of what was there, and of nothing else.
pub(crate) fn bad_disk() {
    // How much of the disk has gone bad: the first block of whatever is read there is not what was written.
    let bad = Arc::new(AtomicU64::new(0));
    let bytes = Arc::clone(&bad);
    let (_directory, tier) = tier_read_by(256, move |disk, offset, into| {
        if offset < bytes.load(Ordering::Relaxed) {
            let mut rotten = Blocks::new(1);
            rotten.bytes_mut().fill(0xa5);
            disk.write_at(offset, rotten.bytes())?;
        }
        disk.read_at(offset, into)
    });
    let mut fleet = on_disk(tier);
    let mut other = fleet.add(&unshared(machine("other", 32, idle())));
    let mut victim = fleet.add(&unshared(machine("victim", 48, idle())));
    victim.until_running();
    other.until_running();
    // Even an idle guest wants a page now and then; nothing that was written before the other was parked is its.
    fleet.see().park(victim.id);
    until("the victim to be on the disk", || (away(&fleet) > 9000).then_some(()));
    let victims = fleet.see().host().tier().unwrap().stats().used;
    fleet.see().park(other.id);
    until("the other machine to be on the disk", || (away(&fleet) > 15_000).then_some(()));
    // Half of it, for what was being written then may have been for both.
    bad.store(victims.0 / 2, Ordering::Relaxed);
    fleet.see().wake(victim.id);
    let died = until("the guest to die of a page", || victim.state().died);
    assert!(died.contains("poisoned"), "{died}");
    bad.store(0, Ordering::Relaxed);
    victim.kill();
    fleet.until_gone(victim.id);
    let told = fleet.incidents();
    for incident in &told {
        let Incident::Poisoned { machine, page, cause } = incident else { panic!("{told:?}") };
        assert_eq!(*machine, victim.id);
        println!("{page} of {machine}: {cause}");
    }
    assert_ne!(told, [], "what a guest died of is told");
    fleet.manager().forget(victim.id);
    other.goes_on();
    fleet.see().wake(other.id);
    other.finish();
    fleet.until_gone(other.id);
    assert_eq!(fleet.incidents(), []);
}
