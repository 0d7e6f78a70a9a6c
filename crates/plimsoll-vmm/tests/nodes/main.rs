//! A machine whose memory is bound to NUMA nodes, and where its pagers, its slabs and its pages are then.
//!
//! Enters: nothing, or a role and its configuration when this program starts itself as the machine. Leaves: the standard harness's lines.
//! On a host of one node: that nothing is done. `cargo xtask nodes` runs it on one of two. The guest is threads over real
//! userfaultfds, so no KVM is needed.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

#[path = "../managed/fleet.rs"]
#[expect(dead_code, reason = "machines of other tests are asked for more")]
mod fleet;
#[path = "../managed/harness.rs"]
mod harness;

use fleet::{DOMAIN, Fleet, Guest, PLENTY, machine, until, zipf};
use harness::{Missing, Test};
use plimsoll_linux::nodes::{Place, of_tag};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_store::{SlabKind, SlabMemory};
use plimsoll_sys::numa::{self, NodeId};
use plimsoll_sys::procfs::nodes::parse_list;
use plimsoll_sys::uffd::{Mode, Userfaultfd};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva, MachineId, PAGE_SIZE};
use plimsoll_vmm::config::{AccelChoice, Hole, Sandbox, VmmConfig};
use rustix::thread::{CpuSet, Pid, sched_getaffinity};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::ExitCode;
use std::sync::Arc;

const TESTS: [Test; 2] = [
    ("pagers_slabs_and_pages_are_on_the_nodes_that_memory_is_bound_to", bound),
    ("a_machine_that_takes_its_memory_on_a_node_is_served_and_refilled_there", elsewhere),
];
/// A machine of this name is started under a policy of its process, as numactl would.
const ELSEWHERE: &str = "elsewhere";
/// The node of that policy, where there are two.
const SECOND: u16 = 1;
const MIB: u64 = 32;
/// So many pages of each part of a machine are looked at, and as many have to be brought back: few, because all of this may be emulated.
const ENOUGH: usize = 200;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [fleet::ROLE, config, handover] = &arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        if serde_json::from_str::<VmmConfig>(config).unwrap().name == ELSEWHERE {
            numa::prefer(NodeId::new(SECOND)).unwrap();
        }
        return fleet::child(config, handover.parse().unwrap());
    }
    harness::run(&arguments, &TESTS, missing)
}

fn missing() -> Option<Missing> {
    let error = Userfaultfd::open(Mode::KernelAndUser).err()?;
    Some(Missing { name: "userfaultfd", why: error.to_string() })
}

/// The nodes that have memory, each with its CPUs.
fn nodes() -> BTreeMap<NodeId, BTreeSet<u32>> {
    let read =
        |name: &str| fs::read_to_string(format!("/sys/devices/system/node/{name}")).unwrap_or_default();
    let with_memory = parse_list(&read("has_memory")).unwrap();
    let node = |number: u32| {
        (
            NodeId::new(number.try_into().unwrap()).unwrap(),
            parse_list(&read(&format!("node{number}/cpulist"))).unwrap(),
        )
    };
    with_memory.into_iter().map(node).collect()
}

/// A guest of threads, of two shards at least.
fn config(name: &str, nodes: Vec<u16>) -> VmmConfig {
    let choices = (AccelChoice::InProcess, Hole::None, Sandbox::Off);
    let (accel, hole, sandbox) = choices;
    VmmConfig { accel, hole, sandbox, shards: Some(2), nodes, ..machine(name, MIB, zipf()) }
}

/// The CPUs that the pager of each shard may run on.
fn affinity(shard: MachineId) -> BTreeSet<u32> {
    let name = format!("pager-{}\n", shard.0);
    let tasks = fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let is_it =
        |path: &std::path::PathBuf| fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm == name);
    let task = tasks.into_iter().find(is_it).expect("its thread runs");
    cpus(Pid::from_raw(task.file_name().unwrap().to_str().unwrap().parse().unwrap()))
}

fn cpus(thread: Option<Pid>) -> BTreeSet<u32> {
    let set = sched_getaffinity(thread).unwrap();
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).map(|cpu| u32::try_from(cpu).unwrap()).collect()
}

/// Waits until every pager of the machine is at its node, which is this one of its shard's.
fn until_seated(fleet: &Fleet, guest: &Guest, homes: &[NodeId]) {
    let seated = until("every pager to be at its node", || {
        let seats = fleet.see().seats(guest.id);
        let places: Option<Vec<(MachineId, Place)>> =
            seats.into_iter().map(|(shard, place)| Some((shard, place?))).collect();
        places
    });
    let nodes = nodes();
    assert_eq!(seated.len(), homes.len());
    for ((shard, place), home) in seated.into_iter().zip(homes) {
        println!("{shard}: {place:?}");
        assert_eq!((place.node, place.memory), (*home, Some(*home)));
        assert_eq!(affinity(shard), nodes[home], "{shard} is of {home}");
        assert_eq!(place.cpus.as_ref(), Some(&nodes[home]));
    }
    assert_eq!(cpus(None), nodes.into_values().flatten().collect(), "this thread was left alone");
}

/// Nodes of the slabs that hold data, by their tags, each of which is where all pages of the slab are.
fn slabs(fleet: &Fleet) -> BTreeMap<Option<NodeId>, usize> {
    let mut counts = BTreeMap::new();
    fleet.see().domain(DOMAIN).unwrap().store(|store| {
        for (slab, tag) in store.memory().live() {
            let Some(SlabKind::Data { .. }) = tag.kind() else { continue };
            *counts.entry(of_tag(tag)).or_default() += 1;
            let Some(node) = of_tag(tag) else { continue };
            let bytes = store.memory().bytes(slab);
            let pages: Vec<Hva> =
                bytes.chunks(PAGE_SIZE).map(|page| Hva(page.as_ptr().addr() as u64)).collect();
            let found = numa::whereabouts(ProcessId::own(), &pages).unwrap();
            assert_eq!(found, vec![Some(node); pages.len()], "{slab}");
        }
    });
    counts
}

/// Nodes of the guest's pages that are in RAM, of each of so many equal parts of its memory.
fn pages(guest: &Guest, parts: u64) -> Vec<BTreeMap<NodeId, usize>> {
    let ram = until("the machine to say where its memory is", || guest.state().ram.first().copied());
    let part = |index: u64| {
        let start = Hva(ram.hva + ram.bytes / parts * index);
        let range = HvaRange::new(start, ByteCount(ram.bytes / parts)).unwrap();
        let pages: Vec<Hva> = (range.start().0..range.end().0).step_by(PAGE_SIZE).map(Hva).collect();
        let mut counts = BTreeMap::new();
        for node in numa::whereabouts(guest.process(), &pages).unwrap().into_iter().flatten() {
            *counts.entry(node).or_default() += 1;
        }
        counts
    };
    (0..parts).map(part).collect()
}

/// Has what the machine has taken, and waits until it has brought some of it back.
fn go_round(fleet: &Fleet, guest: &Guest) {
    let before = fleet.view(guest.id).stats.faults.stored;
    fleet.squeeze_until(guest.id, "pages to be stored and brought back", || {
        fleet.view(guest.id).stats.faults.stored > before + 2 * ENOUGH as u64
    });
    until("enough pages to be there to be looked at", || {
        pages(guest, 2).iter().all(|part| part.values().sum::<usize>() > ENOUGH).then_some(())
    });
}

fn bound() {
    let nodes: Vec<NodeId> = nodes().into_keys().collect();
    if nodes.is_empty() {
        return println!("this kernel knows no nodes: there is one node");
    }
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let [first, second] = match nodes[..] {
        [first, second] => [first, second],
        // All that there is; bound all the same.
        _ => [nodes[0]; 2],
    };
    let mut guest = fleet.add(&config("bound", [first, second].map(NodeId::number).to_vec()));
    guest.until_running();
    for manager in 0..2 {
        // The second takes over what the first has left.
        if first == second {
            go_round(&fleet, &guest);
            let seats = fleet.see().seats(guest.id);
            assert!(seats.len() == 2 && seats.iter().all(|(_, place)| place.is_none()), "{seats:?}");
            seats.iter().for_each(|(shard, _)| assert_eq!(affinity(*shard), cpus(None)));
            assert_eq!(slabs(&fleet).into_keys().collect::<Vec<_>>(), [None]);
        } else {
            until_seated(&fleet, &guest, &[first, second]);
            go_round(&fleet, &guest);
            let slabs = slabs(&fleet);
            println!("manager {manager}: slabs {slabs:?}");
            assert_eq!(slabs.into_keys().collect::<Vec<_>>(), [Some(first), Some(second)]);
            let pages = pages(&guest, 2);
            println!("manager {manager}: pages {pages:?}");
            for (part, node) in pages.iter().zip([first, second]) {
                assert_eq!(part.keys().collect::<Vec<_>>(), [&node]);
            }
        }
        fleet.replace(Arc::new(NoProbe));
    }
    guest.finish();
    fleet.until_gone(guest.id);
}

fn elsewhere() {
    let second = NodeId::new(SECOND).unwrap();
    if !nodes().contains_key(&second) {
        return println!("there is one node: nothing is elsewhere");
    }
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&config(ELSEWHERE, Vec::new()));
    guest.until_running();
    until_seated(&fleet, &guest, &[second; 2]);
    go_round(&fleet, &guest);
    let (slabs, pages) = (slabs(&fleet), pages(&guest, 1));
    println!("slabs {slabs:?}, pages {pages:?}");
    assert_eq!(slabs.into_keys().collect::<Vec<_>>(), [Some(second)]);
    // No policy of the memory's says so: what was brought before its pager was there may be anywhere.
    let here: usize = pages[0].values().sum();
    assert!(pages[0][&second] * 10 > here * 9, "{pages:?}");
    guest.finish();
    fleet.until_gone(guest.id);
}
