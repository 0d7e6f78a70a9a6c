//! Where a guest's RAM lies in QEMU's process.
//!
//! Enters: /proc/PID/maps and the sizes that were asked for. Leaves: one mapping for each piece. This is a test bed's finder: it
//! knows how its guests were made. What must never happen: a guess, where more or fewer mappings fit than there are pieces.
use crate::options::{Backing, Node};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva};
use std::fs;
use std::io;

/// RAM was not found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The mappings cannot be read.
    #[error("cannot read the mappings of {process}")]
    Read {
        /// QEMU.
        process: ProcessId,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Mappings and pieces of RAM do not correspond.
    #[error("{process} has {found} mappings of {size} that could be guest RAM, where {wanted} should be")]
    Ambiguous {
        /// QEMU.
        process: ProcessId,
        /// The size of the piece.
        size: ByteCount,
        /// How many mappings fit.
        found: usize,
        /// How many pieces have this size and backing.
        wanted: usize,
    },
}

/// A mapping that may be guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    range: HvaRange,
    backing: Backing,
}

/// The mapping of each piece. Pieces alike are given in the order of their addresses.
pub(crate) fn find(process: ProcessId, nodes: &[Node]) -> Result<Vec<HvaRange>, RamError> {
    let text = fs::read_to_string(format!("/proc/{}/maps", process.get()))
        .map_err(|source| RamError::Read { process, source })?;
    let mappings: Vec<Mapping> = text.lines().filter_map(parse).collect();
    let mut ranges = Vec::new();
    for (place, node) in nodes.iter().enumerate() {
        let fits = |mapping: &&Mapping| mapping.range.len() == node.size && mapping.backing == node.backing;
        let fitting: Vec<&Mapping> = mappings.iter().filter(fits).collect();
        let alike = nodes.iter().filter(|other| *other == node).count();
        let before = nodes[..place].iter().filter(|other| *other == node).count();
        let (Some(mapping), true) = (fitting.get(before), fitting.len() == alike) else {
            let (size, found) = (node.size, fitting.len());
            return Err(RamError::Ambiguous { process, size, found, wanted: alike });
        };
        ranges.push(mapping.range);
    }
    Ok(ranges)
}

/// `7f0000000000-7f0010000000 rw-p 00000000 00:00 0   [anon:name]`: a mapping that may be written and not executed.
fn parse(line: &str) -> Option<Mapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok().map(Hva);
    let range = HvaRange::between(address(start)?, address(end)?)?;
    let permissions = words.next()?;
    let name = words.nth(3).unwrap_or_default();
    let backing = match (permissions, name.starts_with("/memfd:")) {
        ("rw-p", false) => Backing::Anonymous,
        ("rw-s", true) => Backing::Memfd,
        _ => return None,
    };
    Some(Mapping { range, backing })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_memory_is_ram() {
        let anonymous = parse("7f0000000000-7f0010000000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((anonymous.range.len(), anonymous.backing), (ByteCount::mib(256), Backing::Anonymous));
        let memfd = parse("7f0000000000-7f0000001000 rw-s 0 00:01 5    /memfd:ram (deleted)").unwrap();
        assert_eq!(memfd.backing, Backing::Memfd);
        for other in [
            "7f0000000000-7f0010000000 rwxp 00000000 00:00 0",
            "7f0000000000-7f0010000000 ---p 00000000 00:00 0",
            "7f0000000000-7f0010000000 rw-s 00000000 00:00 0 /dev/zero",
            "",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_not_there_is_not_guessed() {
        let node = Node { size: ByteCount(12345 << 30), backing: Backing::Anonymous };
        let error = find(ProcessId::own(), &[node]).unwrap_err();
        assert!(matches!(error, RamError::Ambiguous { found: 0, wanted: 1, .. }), "{error}");
    }
}
