//! A machine that is served in shards: by as many pagers, and to its operator as one.
use crate::crash::{Random, seed};
use crate::fleet::{self, DOMAIN, Fleet, Guest, MEMBERSHIP, PLENTY, explain, machine, sweep, until, zipf};
use crate::impostor::{self, Goods};
use crate::probes::Crash;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::manager::Membership;
use plimsoll_linux::uffd::probe::{Killed, NoProbe, Probe, Step};
use plimsoll_linux::uffd::wire::{self, DATAGRAM_MAX, Hello, Outcome, Welcome};
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass::{self, seqpacket_pair};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, Gpa, Hva, MachineId};
use plimsoll_vmm::config::VmmConfig;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const SHARDS: u32 = 3;
/// Managers that are replaced at least, of which half are to crash. Where their steps come seldom, as on a busy machine, there are more.
const MANAGERS: u64 = 12;
/// How long a manager works whose step does not come.
const LASTS: Duration = Duration::from_millis(700);

/// The names of the threads that brought a page from the store, or took one there.
#[derive(Default)]
struct Witness {
    served: Mutex<BTreeSet<String>>,
    took: Mutex<BTreeSet<String>>,
}

impl Probe for Witness {
    fn reached(&self, step: Step) -> Result<(), Killed> {
        let seen = match step {
            Step::InstalledMarked => &self.served,
            Step::StoredMarked => &self.took,
            _ => return Ok(()),
        };
        seen.lock().unwrap().extend(std::thread::current().name().map(str::to_owned));
        Ok(())
    }
}

/// A thread names itself once it runs, and is seen for a moment after it was joined.
fn pager_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path().join("comm"));
    // A thread may end while it is looked at.
    tasks
        .filter_map(|comm| std::fs::read_to_string(comm).ok())
        .filter(|name| name.starts_with("pager-"))
        .count()
}

fn until_pager_threads(count: usize) {
    until(&format!("{count} threads of pagers"), || (pager_threads() == count).then_some(()));
}

fn sharded(name: &str) -> VmmConfig {
    let spec = WorkloadSpec { discard_every_ops: 200, ..zipf() };
    VmmConfig { vcpus: 2, shards: Some(SHARDS), ..machine(name, 50, spec) }
}

fn shards_of(guest: &Guest) -> Vec<MachineId> {
    (guest.id.0..guest.id.0 + SHARDS).map(MachineId).collect()
}

pub(crate) fn outlives_managers() {
    let mut random = Random(seed());
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&sharded("sharded"));
    guest.until_running();
    until_pager_threads(3);
    let (mut crashes, mut managers, begun) = (0, 0, Instant::now());
    while managers < MANAGERS || crashes < MANAGERS / 2 {
        assert!(begun.elapsed() < fleet::PATIENCE, "only {crashes} of {managers} managers crashed");
        let (step, nth) = random.crash();
        println!("manager {managers}: to crash at the {nth}. {step:?}");
        managers += 1;
        let crash = Arc::new(Crash::new(step, nth, shards_of(&guest)));
        fleet.replace(Arc::clone(&crash) as _);
        let start = Instant::now();
        while !crash.happened() && start.elapsed() < LASTS {
            fleet.squeeze(guest.id);
            std::thread::sleep(Duration::from_millis(50));
        }
        crashes += u64::from(crash.happened());
        assert_eq!(fleet.view(guest.id).stats.anomalies.lost, 0);
        assert_eq!(fleet.incidents(), []);
    }
    let witness = Arc::new(Witness::default());
    fleet.replace(Arc::clone(&witness) as _);
    let all: BTreeSet<String> = shards_of(&guest).iter().map(|id| format!("pager-{}", id.0)).collect();
    fleet.squeeze_until(guest.id, "every shard to be served by its own thread", || {
        [&witness.served, &witness.took].iter().all(|seen| *seen.lock().unwrap() == all)
    });
    until_pager_threads(3);
    fleet.see().host().ledger(|ledger| {
        for shard in shards_of(&guest) {
            assert!(ledger.ram(shard).unwrap() > ByteCount(0), "{shard} holds nothing");
        }
    });
    fleet.squeeze_until(guest.id, "pages to be given back, and to be brought back, in number", || {
        let stats = fleet.view(guest.id).stats;
        stats.discarded > 100 && stats.faults.stored > 1000
    });
    guest.goes_on();
    until("all statistics to be published", || {
        (fleet.view(guest.id).stats.census.total().bytes() == fleet.view(guest.id).size).then_some(())
    });
    let views = fleet.see().machines();
    let takeovers = views[0].stats.takeovers;
    assert_eq!((views.len(), views[0].size, takeovers), (1, ByteCount::mib(50), managers + 1));
    let stats = &views[0].stats;
    println!("{crashes} crashes; {:?}, {:?}, {} given back", stats.faults, stats.anomalies, stats.discarded);
    assert!(!guest.state().manager_lost, "a socket was closed between two managers");
    guest.finish();
    for shard in shards_of(&guest) {
        fleet.until_gone(shard);
    }
    fleet.until_gone(guest.id);
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.store_pages(), 0, "objects outlived the machine that named them");
}

pub(crate) fn is_killed() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut first = fleet.add(&sharded("first"));
    first.until_running();
    first.kill();
    fleet.until_gone(first.id);
    fleet.manager().forget(first.id);
    // Threads have what they have until they have ended.
    until_pager_threads(0);
    // The empty store stays; what there was before it does not matter.
    let before = (fleet::descriptors(), fleet::word_mappings());
    for again in 0..3 {
        let mut victim = fleet.add(&sharded("victim"));
        victim.until_running();
        fleet.squeeze_until(victim.id, "the victim to have stored pages", || fleet.stored(victim.id) > 1000);
        if again == 2 {
            // Nobody manages it when it ends.
            fleet.replace_after(|| {
                victim.kill();
            });
        } else {
            victim.kill();
        }
        shards_of(&victim).into_iter().for_each(|shard| fleet.until_gone(shard));
        fleet.until_gone(victim.id);
        fleet.manager().forget(victim.id);
        drop(victim);
        until_pager_threads(0);
        assert_eq!((fleet::descriptors(), fleet::word_mappings()), before, "descriptors, word mappings");
        assert_eq!(fleet.store_pages(), 0);
        assert_eq!(fleet.incidents(), [], "the end of a VMM is no incident");
    }
    let charged = fleet.see().host().ledger(|ledger| ledger.charged());
    assert_eq!(charged, fleet.see().domain(DOMAIN).unwrap().held(), "only the empty store is charged");
}

pub(crate) fn is_damaged() {
    // The pager that is at work damages a page of its shard, most often. One of these shall not be the first shard's.
    for attempt in 0.. {
        assert!(attempt < 12, "it was always the first shard");
        let witness = Arc::new(Witness::default());
        let mut fleet = Fleet::new(PLENTY, Arc::clone(&witness) as _);
        let reader = WorkloadSpec { write_permille: 0, ops_per_second: 8000, ..sweep() };
        let config = VmmConfig { shards: Some(SHARDS), ..machine("damaged", 48, reader) };
        let mut victim = fleet.add(&config);
        victim.until_running();
        fleet.squeeze_until(victim.id, "pages to be stored", || fleet.stored(victim.id) > 3000);
        witness.served.lock().unwrap().clear();
        let second = format!("pager-{}", victim.id.0 + 1);
        until("the sweep to be in the second shard", || {
            witness.served.lock().unwrap().contains(&second).then_some(())
        });
        fleet.see().sabotage(victim.id);
        let reported =
            until("the damage to be noticed", || Some(fleet.incidents()).filter(|list| !list.is_empty()));
        let page = match &reported[0] {
            Incident::Poisoned { machine, page, .. } if *machine == victim.id => *page,
            other => panic!("{other:?}"),
        };
        let died = until("the guest to die of the page", || victim.state().died);
        println!("{page}: {died}");
        let place = config.check().unwrap().gpa_of(page).unwrap();
        assert!(died.contains(&format!("{place},")), "{page} is at {place}: {died}");
        victim.kill();
        fleet.until_gone(victim.id);
        if page.0 >= 48 * 256 / SHARDS {
            return;
        }
    }
}

/// Shards of 4 MiB that lie nowhere.
fn forged(goods: &Goods) -> Vec<Hello> {
    let shard = |shard: u32| {
        let at = u64::from(shard) * ByteCount::mib(4).0;
        let layout = GuestLayout::new(vec![Region { start: Gpa(at), bytes: ByteCount::mib(4) }]).unwrap();
        let hvas = vec![Hva(0x10_0000_0000 + at)];
        let airlock_base = Hva(0x20_0000_0000 + at);
        Hello { shard, shards: SHARDS, layout, hvas, airlock_base, ..goods.hello.clone() }
    };
    (0..SHARDS).map(shard).collect()
}

pub(crate) fn is_no_machine() {
    let mut fleet = Fleet::new(ByteCount::mib(48), Arc::new(NoProbe));
    let goods = Goods::new("forged");
    let fds = [goods.ram.as_fd(), goods.airlock.as_fd()];
    let changed = |change: fn(&mut Vec<Hello>)| {
        let mut hellos = forged(&goods);
        change(&mut hellos);
        hellos
    };
    let huge = |all: &mut Vec<Hello>| {
        for (hello, at) in all.iter_mut().zip(1..) {
            let region = Region { start: Gpa(at << 40), bytes: ByteCount(2 << 30) };
            (hello.layout, hello.hvas) = (GuestLayout::new(vec![region]).unwrap(), vec![Hva(at << 40)]);
        }
    };
    let cases = [
        (changed(|all| drop(all.pop())), "closed the hand-over socket"),
        (
            changed(|all| all[1].shard = 2),
            "shard 2 of 3 was handed over as \"forged\" where shard 1 of 3 was due",
        ),
        (changed(|all| all[2].name = "other".into()), "shard 2 of 3 was handed over as \"other\""),
        (changed(|all| all[2].hvas[0] = all[0].airlock_base), "the host ranges at"),
        (changed(|all| all[2].layout = all[0].layout.clone()), "overlaps another, is out of order or wraps"),
        (changed(huge), "a machine of this host may own at most"),
    ];
    let before = (fleet::descriptors(), fleet::word_mappings());
    for (hellos, expected) in cases {
        let (socket, theirs) = seqpacket_pair().unwrap();
        for hello in &hellos {
            fdpass::send(&theirs, &hello.encode(), &fds).unwrap();
        }
        if hellos.len() < 3 {
            rustix::net::shutdown(&theirs, rustix::net::Shutdown::Write).unwrap();
        }
        let process = Pidfd::open(ProcessId::own()).unwrap();
        let refused = fleet.manager().admit(socket, process, MEMBERSHIP);
        let found = explain(&refused.expect_err("a forged hand-over was accepted"));
        assert!(found.contains(expected), "{expected:?} was expected, found: {found}");
        let mut bytes = [0; DATAGRAM_MAX];
        let heard = fdpass::recv(&theirs, &mut bytes, 0).unwrap().expect("the socket closed without a word");
        let welcome = Welcome::decode(&bytes[..heard.bytes]).unwrap();
        assert!(matches!(welcome, Welcome::Refused { .. }), "{welcome:?}");
        drop(theirs);
        assert_eq!((fleet::descriptors(), fleet::word_mappings()), before, "leaked by: {found}");
        assert_eq!(fleet.see().machines().len(), 0);
        until_pager_threads(0);
    }
    assert_eq!(fleet.see().host().ledger(|ledger| ledger.charged()), ByteCount(0));
}

/// Answers every request, saying that it was done.
fn oblige(socket: &OwnedFd) {
    let (mut bytes, mut reply) = ([0; DATAGRAM_MAX], Vec::new());
    while let Ok(Some(received)) = fdpass::recv(socket, &mut bytes, 0) {
        let (ticket, items) = wire::decode_request(&bytes[..received.bytes]).unwrap();
        let done: Vec<_> = items.iter().map(|item| Outcome { done: item.pages, stop: None }).collect();
        wire::encode_reply(&mut reply, ticket, &done);
        if fdpass::send(socket, &reply, &[]).is_err() {
            return;
        }
    }
}

pub(crate) fn is_lost_whole() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let goods = [Goods::new("halved"), Goods::new("halved")];
    let (socket, theirs) = seqpacket_pair().unwrap();
    for (goods, shard) in goods.iter().zip(0..) {
        let start = Gpa(u64::from(shard) * impostor::RAM.0);
        let layout = GuestLayout::new(vec![Region { start, bytes: impostor::RAM }]).unwrap();
        let hello = Hello { shard, shards: 2, layout, ..goods.hello.clone() };
        fdpass::send(&theirs, &hello.encode(), &[goods.ram.as_fd(), goods.airlock.as_fd()]).unwrap();
    }
    let reservation = ByteCount::mib(3);
    let process = Pidfd::open(ProcessId::own()).unwrap();
    let membership = Membership { reservation, ..MEMBERSHIP };
    let id = fleet.manager().admit(socket, process, membership).unwrap();
    let mut bytes = [0; DATAGRAM_MAX];
    let mut further = fdpass::recv(&theirs, &mut bytes, 1).unwrap().unwrap().descriptors;
    let obliging = std::thread::spawn(move || oblige(&theirs));
    until_pager_threads(2);
    assert_eq!((further.len(), fleet.incidents()), (1, vec![]));
    // The second shard has no agent any more. The first one could well be taken over.
    drop(further.pop());
    for _ in 0..2 {
        fleet.replace(Arc::new(NoProbe));
        let incidents = fleet.incidents();
        assert!(
            matches!(&incidents[..], [Incident::Lost { machine, .. }] if *machine == id),
            "{incidents:?}"
        );
        until_pager_threads(0);
        assert_eq!(fleet.see().machines().len(), 0, "a part of it is still managed");
        assert!(!fleet.see().is_gone(id), "its process lives");
        fleet.see().host().ledger(|ledger| {
            assert!(
                ledger.usage(id).is_ok() && ledger.usage(MachineId(id.0 + 1)).is_ok(),
                "its promise is kept"
            );
        });
    }
    drop(fleet);
    obliging.join().unwrap();
}
