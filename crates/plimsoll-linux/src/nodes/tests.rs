use super::*;
use crate::system::FirstPage;
use plimsoll_store::SizeClass;
use plimsoll_sys::swap::{SwapError, SwapPriority};
use plimsoll_types::{ByteCount, Hva};
use proptest::prelude::*;
use std::io;

/// Files and nothing else.
#[derive(Clone, Default)]
struct Tree(BTreeMap<String, String>);

impl Tree {
    fn with(mut self, name: &str, text: impl Into<String>) -> Self {
        self.0.insert(format!("{FOLDER}/{name}"), text.into());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.0.remove(&format!("{FOLDER}/{name}"));
        self
    }

    fn seen_by(&self, cpus: &str, nodes: Option<&str>) -> Option<Topology> {
        let nodes = nodes.map(|list| parse_list(list).unwrap().into_iter().map(node).collect());
        Topology::read(self, &Allowed { cpus: set(cpus), nodes })
    }
}

impl System for Tree {
    fn read(&self, path: &Path) -> io::Result<String> {
        self.0.get(path.to_str().unwrap()).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn read_once(&self, path: &Path) -> io::Result<String> {
        self.read(path)
    }
    fn write(&self, _: &Path, _: &str) -> io::Result<()> {
        unreachable!("nothing is set")
    }
    fn list(&self, _: &Path) -> io::Result<Vec<String>> {
        unreachable!("files are named")
    }
    fn exists(&self, _: &Path) -> bool {
        unreachable!("what is missing cannot be read")
    }
    fn first_page(&self, _: &Path, _: u64) -> io::Result<FirstPage> {
        unreachable!("no disk")
    }
    fn write_first_page(&self, _: &Path, _: u64, _: &FirstPage) -> io::Result<()> {
        unreachable!("no disk")
    }
    fn swapon(&self, _: &Path, _: SwapPriority) -> Result<(), SwapError> {
        unreachable!("no swap")
    }
    fn swapoff(&self, _: &Path) -> Result<(), SwapError> {
        unreachable!("no swap")
    }
}

fn node(number: u32) -> NodeId {
    NodeId::new(u16::try_from(number).unwrap()).unwrap()
}

fn set(list: &str) -> Cpus {
    parse_list(list).unwrap()
}

/// Two sockets, numbered 0 and 2, and memory without CPUs behind the second of them.
fn host() -> Tree {
    Tree::default()
        .with("online", "0,2,5\n")
        .with("has_memory", "0,2,5\n")
        .with("node0/cpulist", "0-3,8-11\n")
        .with("node0/distance", "10 21 34\n")
        .with("node2/cpulist", "4-7,12-15\n")
        .with("node2/distance", "21 10 17\n")
        .with("node5/cpulist", "\n")
        .with("node5/distance", "34 17 10\n")
}

#[test]
fn a_pager_belongs_to_the_cpus_of_its_node() {
    let host = host().seen_by("0-15", None).unwrap();
    assert_eq!(host.nodes().collect::<Vec<_>>(), [0, 2, 5].map(node));
    let second = Place { node: node(2), cpus: Some(set("4-7,12-15")), memory: Some(node(2)) };
    assert_eq!(host.place(node(2)), second);
    let behind_it = Place { node: node(5), cpus: Some(set("4-7,12-15")), memory: Some(node(5)) };
    assert_eq!(host.place(node(5)), behind_it, "a node without CPUs is served from the nearest");
}

#[test]
fn what_this_process_may_not_use_is_not_used() {
    // Housekeeping on two CPUs of the first socket, and one of the second.
    let place = |cpus, nodes, number| host().seen_by(cpus, nodes).unwrap().place(node(number));
    assert_eq!(place("0-1,4", None, 2).cpus, Some(set("4")));
    assert_eq!(place("0-1,12-13", None, 5).cpus, Some(set("12-13")));
    assert_eq!(place("0-1", None, 2).cpus, None, "all that there are");
    assert_eq!(place("0-1", None, 2).memory, Some(node(2)), "memory is another matter");
    assert_eq!(place("0-15", Some("0,5"), 2), Place { memory: None, ..place("0-15", None, 2) });
    // Offline ones are in no list, and in nobody's affinity.
    assert_eq!(
        host().with("node2/cpulist", "4-6\n").seen_by("0-15", None).unwrap().place(node(2)).cpus,
        Some(set("4-6"))
    );
}

#[test]
fn a_node_without_memory_gives_none() {
    let host = host().with("has_memory", "0,5\n").seen_by("0-15", None).unwrap();
    assert_eq!(host.place(node(2)).memory, None);
    assert_eq!(
        host.place(node(9)),
        Place { node: node(9), cpus: Some(set("0-3,8-11")), memory: None },
        "no such node"
    );
}

#[test]
fn a_host_of_one_node_has_no_topology() {
    let one = Tree::default().with("online", "0\n").with("has_memory", "0\n");
    let one = one.with("node0/cpulist", "0-1\n").with("node0/distance", "10\n");
    assert_eq!(one.seen_by("0-1", None), None);
    for missing in ["online", "node0/cpulist", "node2/cpulist"] {
        assert_eq!(host().without(missing).seen_by("0-15", None), None, "{missing}");
    }
    for (name, nonsense) in [("online", "none\n"), ("node0/cpulist", "0-\n"), ("online", "0,70000\n")] {
        assert_eq!(host().with(name, nonsense).seen_by("0-15", None), None, "{name}");
    }
    assert_eq!(host().seen_by("0-3", Some("0")), None, "of which this process may use one");
    assert_eq!(Tree::default().seen_by("0-3", None), None);
}

#[test]
fn distances_that_make_no_sense_are_none() {
    for broken in [host().without("node5/distance"), host().with("node5/distance", "34 17\n")] {
        let place = broken.seen_by("0-15", None).unwrap().place(node(5));
        assert_eq!(place.cpus, Some(set("0-3,8-11")), "the first that has CPUs");
    }
    let host = host().without("has_memory").seen_by("0-15", None).unwrap();
    assert_eq!(host.place(node(5)).memory, Some(node(5)), "an old kernel has no such file");
}

#[test]
fn this_machine_is_taken_as_it_is() {
    let nodes = Linux.read(&Path::new(FOLDER).join("online")).ok().and_then(|list| parse_list(&list));
    if nodes.is_none_or(|nodes| nodes.len() == 1) {
        assert_eq!(Topology::own(), None);
    }
}

#[test]
fn a_lane_is_a_node_and_the_first_is_none() {
    let class = SizeClass::from_number(3).unwrap();
    let tag = |lane| SlabTag::new(SlabKind::Data { class, lane });
    for number in [0, 1, 254] {
        assert_eq!(of_tag(tag(lane_of(Some(node(number))))), Some(node(number)));
    }
    for unknown in [None, Some(node(255)), Some(node(1023))] {
        assert_eq!(of_tag(tag(lane_of(unknown))), None);
    }
    assert_eq!(of_tag(SlabTag::new(SlabKind::Records { sequence: 256 })), None);
}

fn range(start: u64, end: u64) -> HvaRange {
    HvaRange::new(Hva(start), ByteCount(end - start)).unwrap()
}

#[test]
fn a_shard_that_is_on_two_nodes_has_no_place() {
    let host = host().seen_by("0-15", None).unwrap();
    let policies = [(0x1000, Some(0)), (0x5000, Some(2)), (0x9000, None), (0xd000, Some(2))];
    let policies = policies.map(|(start, number)| (Hva(start), number.map(node))).to_vec();
    let bound = Bindings { policies, allowed: [0, 2, 5].map(node).into() };
    let homes = |ranges: &[(u64, u64)]| {
        let ranges = ranges.iter().map(|(start, end)| range(*start, *end)).collect();
        plan(&host, &bound, &[ranges])[0].clone().map(|place| u32::from(place.node.number()))
    };
    assert_eq!(homes(&[(0x1000, 0x5000)]), Some(0));
    assert_eq!(homes(&[(0x2000, 0x3000)]), Some(0), "inside of a mapping");
    assert_eq!(homes(&[(0x5000, 0x9000), (0xd000, 0xf000)]), Some(2));
    assert_eq!(homes(&[(0x4000, 0x6000)]), None);
    assert_eq!(homes(&[(0x1000, 0x2000), (0x5000, 0x6000)]), None);
    assert_eq!(homes(&[(0x5000, 0xa000)]), None, "a part of it is anywhere");
    assert_eq!(homes(&[(0, 0x1000)]), None, "nothing is mapped there");
    assert_eq!(homes(&[]), None);
    let confined = Bindings { allowed: [node(5)].into(), ..Bindings::default() };
    let place = plan(&host, &confined, &[vec![range(0x1000, 0x2000)]]);
    assert_eq!(place, [Some(host.place(node(5)))], "its cpuset allows of one node only");
}

proptest! {
    /// Pages with a node each, mappings and shards over them, whatever this process may use: the plan against what follows page by page.
    #[test]
    fn plans_keep_to_the_nodes_of_pages_and_to_what_is_allowed(
        owners in prop::collection::vec(prop::option::of(0..4u32), 1..40),
        cuts in prop::collection::vec(0..40usize, 0..4),
        nodes in prop::collection::vec((0..8u32, 0..5u32, any::<bool>()), 4),
        distances in prop::collection::vec(10..40u32, 16),
        allowed in prop::collection::btree_set(0..40u32, 1..12),
    ) {
        let mut tree = Tree::default().with("online", "0-3\n");
        let with: Vec<String> = (0..4).filter(|id| nodes[*id].2).map(|id| id.to_string()).collect();
        tree = tree.with("has_memory", with.join(","));
        for (id, (first, count, _)) in nodes.iter().enumerate() {
            let cpus = (0..*count).map(|cpu| cpu_of(id, first + cpu).to_string());
            let cpus: Vec<String> = cpus.collect();
            let row: Vec<String> = distances[id * 4..][..4].iter().map(ToString::to_string).collect();
            tree = tree.with(&format!("node{id}/cpulist"), cpus.join(","));
            tree = tree.with(&format!("node{id}/distance"), row.join(" "));
        }
        let own = Allowed { cpus: allowed.clone(), nodes: None };
        let Some(topology) = Topology::read(&tree, &own) else {
            let populated = with_cpus(&nodes, &allowed);
            prop_assert!(with.len() < 2 && populated < 2);
            return Ok(());
        };
        let page = |index: usize| 0x10_0000 + index as u64 * 0x1000;
        let policies = owners.iter().enumerate().map(|(index, owner)| (Hva(page(index)), owner.map(node)));
        let bindings = Bindings { policies: policies.collect(), allowed: [0, 1, 2, 3].map(node).into() };
        let mut bounds: Vec<usize> = cuts.into_iter().map(|cut| cut.min(owners.len())).collect();
        bounds.extend([0, owners.len()]);
        bounds.sort_unstable();
        bounds.dedup();
        let shards: Vec<_> = bounds.windows(2).map(|pair| vec![range(page(pair[0]), page(pair[1]))]).collect();
        for (place, pair) in plan(&topology, &bindings, &shards).into_iter().zip(bounds.windows(2)) {
            let of_shard: BTreeSet<Option<u32>> = owners[pair[0]..pair[1]].iter().copied().collect();
            let expected = of_shard.first().copied().flatten().filter(|_| of_shard.len() == 1);
            prop_assert_eq!(place.as_ref().map(|place| u32::from(place.node.number())), expected);
            let Some(Place { cpus, memory, node: home }) = place else { continue };
            let id = usize::from(home.number());
            prop_assert_eq!(memory.is_some(), nodes[id].2);
            let (first, count, _) = nodes[id];
            let all: Cpus = (0..count).map(|cpu| cpu_of(id, first + cpu)).collect();
            let local: Cpus = all.intersection(&allowed).copied().collect();
            if let Some(cpus) = cpus {
                prop_assert!(!cpus.is_empty() && cpus.is_subset(&allowed));
                prop_assert!(local.is_empty() || cpus == local);
            } else {
                prop_assert!(local.is_empty() || local == allowed);
            }
        }
    }
}

/// A CPU of a node: ten have theirs.
fn cpu_of(node: usize, number: u32) -> u32 {
    u32::try_from(node).unwrap() * 10 + number
}

/// Nodes that have CPUs this process may use.
fn with_cpus(nodes: &[(u32, u32, bool)], allowed: &Cpus) -> usize {
    let has = |(id, (first, count, _)): (usize, &(u32, u32, bool))| {
        (0..*count).any(|cpu| allowed.contains(&cpu_of(id, first + cpu)))
    };
    nodes.iter().enumerate().filter(|one| has(*one)).count()
}
