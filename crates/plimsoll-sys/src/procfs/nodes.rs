//! On which NUMA nodes a process may have memory, and has said that it wants it: lines of status and numa_maps enter, nodes leave.
//!
//! numa_maps is the only place where the kernel tells another process's policies. It counts pages on the way, so it costs a walk through
//! all page tables of the process: to be read once, and by nobody for whom a guest waits.

use super::ProcfsError;
use crate::ProcessId;
use crate::numa::NodeId;
use plimsoll_types::Hva;
use std::collections::BTreeSet;

/// The highest number in a list of the kernel's that is believed: it has fewer CPUs and nodes by far.
const NUMBER_MAX: u32 = u16::MAX as u32;

/// Mappings of a process by where they start, in ascending order, and the one node that new pages of each come from first; `None` where it
/// is several, or whichever the toucher is on.
pub type Policies = Vec<(Hva, Option<NodeId>)>;

/// What policies a process's mappings have.
pub fn policies(process: ProcessId) -> Result<Policies, ProcfsError> {
    parse_policies(&super::read(process, "numa_maps")?)
}

/// The nodes a process may have memory of at all, by its cpuset. All there are, for one who asks for them, where the kernel has none.
pub fn allowed(process: ProcessId) -> Result<BTreeSet<NodeId>, ProcfsError> {
    parse_allowed(&super::read(process, "status")?)
}

/// Parses the text of numa_maps.
pub fn parse_policies(text: &str) -> Result<Policies, ProcfsError> {
    let mapping = |line: &str| {
        let (start, rest) = line.split_once(' ')?;
        // "prefer (many):0-1" has a space, and is no single node either.
        let policy = rest.split_ascii_whitespace().next()?;
        Some((Hva(u64::from_str_radix(start, 16).ok()?), sole_node(policy)))
    };
    let malformed = |found: &str| ProcfsError::Malformed {
        file: "numa_maps",
        field: "a mapping's start and policy",
        found: found.to_owned(),
    };
    text.lines().map(|line| mapping(line).ok_or_else(|| malformed(line))).collect()
}

/// The node of `bind:1` or `prefer=static:1`.
fn sole_node(policy: &str) -> Option<NodeId> {
    let (mode, nodes) = policy.split_once(':')?;
    let is_narrow = matches!(mode.split('=').next(), Some("bind" | "prefer"));
    let nodes = parse_list(nodes).filter(|nodes| is_narrow && nodes.len() == 1)?;
    node(*nodes.first()?)
}

fn parse_allowed(text: &str) -> Result<BTreeSet<NodeId>, ProcfsError> {
    const FIELD: &str = "Mems_allowed_list";
    let line = text.lines().find_map(|line| line.strip_prefix(FIELD)?.strip_prefix(':'));
    let list = line.ok_or(ProcfsError::Missing { file: "status", field: FIELD })?;
    let malformed = || ProcfsError::Malformed { file: "status", field: FIELD, found: list.to_owned() };
    Ok(parse_list(list).ok_or_else(malformed)?.into_iter().filter_map(node).collect())
}

fn node(number: u32) -> Option<NodeId> {
    NodeId::new(u16::try_from(number).ok()?)
}

/// Parses a list as the kernel prints sets of CPUs and nodes, such as `0-3,8,10-11`; nothing is an empty set. `None` where it is none.
pub fn parse_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut numbers = BTreeSet::new();
    for range in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > NUMBER_MAX {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(number: u16) -> Option<NodeId> {
        NodeId::new(number)
    }

    #[test]
    fn policies_that_name_one_node_are_told_from_all_others() {
        let text = "\
7f0000000000 default file=/usr/lib/libc.so.6 mapped=4 N0=4 kernelpagesize_kB=4
7f1000000000 bind:1 anon=512 dirty=512 N1=512 kernelpagesize_kB=4
7f2000000000 prefer=static:3
7f3000000000 bind:0-1
7f4000000000 interleave:0
7f5000000000 prefer (many):0-1
7f6000000000 weighted interleave:0-1
7f7000000000 local
7f8000000000 bind=relative:5
";
        let found: Vec<_> = parse_policies(text).unwrap().into_iter().map(|(_, node)| node).collect();
        assert_eq!(found, [None, one(1), one(3), None, None, None, None, None, one(5)]);
        assert_eq!(parse_policies(text).unwrap()[1].0, Hva(0x7f10_0000_0000));
        assert!(parse_policies("nonsense\n").is_err());
    }

    #[test]
    fn lists_of_the_kernel_are_sets() {
        let list = |text| parse_list(text).map(|numbers| numbers.into_iter().collect::<Vec<_>>());
        assert_eq!(list("0-1,4\n"), Some(vec![0, 1, 4]));
        assert_eq!(list("\n"), Some(vec![]));
        for wrong in ["1-", "a", "3-1", "0,,1", "0-4294967295", "-1"] {
            assert_eq!(list(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_nodes_a_process_may_use_are_read_from_its_status() {
        let nodes = |text| parse_allowed(text).map(|nodes| nodes.into_iter().collect::<Vec<_>>());
        let text = "Name:\tx\nMems_allowed:\t1\nMems_allowed_list:\t0-1,4\nThreads:\t1\n";
        assert_eq!(nodes(text).unwrap(), [0, 1, 4].map(NodeId::new).map(Option::unwrap));
        assert!(nodes("Name:\tx\n").is_err() && nodes("Mems_allowed_list:\tx\n").is_err());
    }

    #[test]
    fn this_process_has_mappings_and_a_node() {
        let own = ProcessId::own();
        assert!(!allowed(own).unwrap().is_empty());
        let starts: Vec<Hva> = policies(own).unwrap().into_iter().map(|(start, _)| start).collect();
        assert!(starts.len() > 3 && starts.is_sorted());
    }
}
