//! NUMA nodes: on which one this thread's memory is taken, and on which one a process's pages lie.
//!
//! Enters: a node. Leaves: memory taken there as long as it has any: a preference, never a demand, so that nobody fails for want of memory
//! of one node. What must never happen: a policy that somebody else has set being lost. So a thread's policy is set here only over
//! the kernel's own ([`is_free_to_prefer`]), and what is set for a moment is taken back.
//!
//! A policy of the thread and not of a range: memory of a file in memory (slabs) is taken by the policy of whoever takes it where the file has
//! none (`shmem_get_pgoff_policy`), while mbind(2) on a part of its mapping cuts the mapping, once for each change of node.
#![expect(unsafe_code, reason = "policies and whereabouts are asked for with pointers to masks and lists")]

use crate::ProcessId;
use core::fmt;
use plimsoll_types::Hva;
use std::cell::Cell;
use std::ffi::{c_int, c_ulong};
use std::io;
use std::ptr;

/// Nodes that a kernel may be built for (NODES_SHIFT is 10 at most).
pub const NODES_MAX: usize = 1024;

const MASK_WORDS: usize = NODES_MAX / u64::BITS as usize;
/// The kernel takes one off before it looks at the mask.
const MASK_BITS: c_ulong = NODES_MAX as c_ulong + 1;

/// A NUMA node, as the kernel counts them: numbers may be missing in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u16);

impl NodeId {
    /// The node of that number, below [`NODES_MAX`].
    pub const fn new(number: u16) -> Option<Self> {
        if (number as usize) < NODES_MAX { Some(Self(number)) } else { None }
    }

    /// Its number.
    pub const fn number(self) -> u16 {
        self.0
    }

    /// A mask in which it is alone.
    pub(crate) fn mask(self) -> Mask {
        let mut mask = [0; MASK_WORDS];
        let place = usize::from(self.0);
        mask[place / u64::BITS as usize] = 1 << (place % u64::BITS as usize);
        Mask(mask)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// A set of nodes as the kernel takes it.
pub(crate) struct Mask([u64; MASK_WORDS]);

impl Mask {
    pub(crate) const fn as_ptr(&self) -> *const u64 {
        self.0.as_ptr()
    }

    /// What the kernel is told of its length.
    pub(crate) const BITS: c_ulong = MASK_BITS;
}

thread_local! {
    static PREFERRED: Cell<Option<NodeId>> = const { Cell::new(None) };
}

/// True where this thread takes memory as the kernel does of itself: nobody, `numactl` for one, has said otherwise. False on a kernel
/// that knows no nodes.
pub fn is_free_to_prefer() -> bool {
    const NONE: c_ulong = 0;
    let mut mode: c_int = 0;
    let nodes = ptr::null_mut::<c_ulong>();
    // SAFETY: the kernel writes one int to the address of a local; no mask and no address are asked about.
    let status = unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, nodes, NONE, NONE, NONE) };
    status == 0 && mode == libc::MPOL_DEFAULT
}

/// Has this thread take memory on a node while it has any, on the nearest others when it has none; with `None`, on the node it runs on,
/// as every thread does of itself. Threads it starts later inherit that.
///
/// # Errors
/// What the kernel said: no such node, none of its memory allowed to this process, no NUMA, a filter.
pub fn prefer(node: Option<NodeId>) -> io::Result<()> {
    if PREFERRED.get() == node {
        return Ok(());
    }
    let mask = node.map(NodeId::mask);
    let (mode, nodes, bits) = match &mask {
        Some(mask) => (libc::MPOL_PREFERRED, mask.as_ptr(), MASK_BITS),
        None => (libc::MPOL_DEFAULT, ptr::null(), 0),
    };
    // SAFETY: the mask is read only, has as many bits as the kernel is told less the one it takes off, and lives until after the call.
    if unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes, bits) } != 0 {
        return Err(io::Error::last_os_error());
    }
    PREFERRED.set(node);
    Ok(())
}

/// What [`prefer`] was told last on this thread.
pub fn preferred() -> Option<NodeId> {
    PREFERRED.get()
}

/// Does something that takes memory on a node. Costs nothing where the thread prefers that one anyway; where the kernel refuses, it
/// is done with the preference that there is.
pub fn preferring<T>(node: NodeId, with: impl FnOnce() -> T) -> T {
    let before = PREFERRED.get();
    let is_set = prefer(Some(node)).is_ok();
    let done = with();
    if is_set {
        // It was in force a moment ago.
        let _ = prefer(before);
    }
    done
}

/// On which node each of a process's pages lies; `None` where there is no page, or none of the process's own.
///
/// # Errors
/// What the kernel said: no such process, no right to look at it (CAP_SYS_PTRACE), no NUMA.
pub fn whereabouts(process: ProcessId, pages: &[Hva]) -> io::Result<Vec<Option<NodeId>>> {
    let addresses: Vec<u64> = pages.iter().map(|page| page.0).collect();
    let mut status: Vec<c_int> = vec![-1; addresses.len()];
    // SAFETY: with no nodes given nothing is moved. The kernel reads as many addresses, and writes as many ints, as the lists have, and
    // looks up the addresses without touching what is there.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            process.as_raw(),
            addresses.len(),
            addresses.as_ptr(),
            ptr::null::<c_int>(),
            status.as_mut_ptr(),
            0,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status.into_iter().map(|node| u16::try_from(node).ok().and_then(NodeId::new)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mapping::{AnonymousMapping, HugePages};
    use plimsoll_types::{ByteCount, PAGE_SIZE};

    const FIRST: NodeId = NodeId(0);

    #[test]
    fn a_node_is_one_bit_of_a_mask() {
        assert_eq!(NodeId(0).mask().0[0], 1);
        assert_eq!(NodeId(65).mask().0[..2], [0, 2]);
        assert_eq!(NodeId(1023).mask().0[15], 1 << 63);
        assert_eq!(NodeId::new(1024), None);
    }

    #[test]
    fn a_preference_holds_for_its_thread_and_one_for_a_moment_is_taken_back() {
        if !is_free_to_prefer() {
            return println!(
                "not looked at: this kernel knows no nodes, or this process runs under a policy"
            );
        }
        let thread = std::thread::spawn(|| {
            preferring(FIRST, || assert!(!is_free_to_prefer() && preferred() == Some(FIRST)));
            assert!(is_free_to_prefer() && preferred().is_none());
            prefer(Some(FIRST)).unwrap();
            assert!(!is_free_to_prefer());
            preferring(FIRST, || assert_eq!(preferred(), Some(FIRST)));
            assert_eq!(preferred(), Some(FIRST));
            assert!(prefer(NodeId::new(1023)).is_err(), "there is no such node");
            assert_eq!(preferring(NodeId(1023), preferred), Some(FIRST), "done all the same");
        });
        thread.join().unwrap();
        assert!(is_free_to_prefer());
    }

    #[test]
    fn a_page_that_was_written_is_on_a_node_and_one_that_was_not_is_nowhere() {
        if !is_free_to_prefer() {
            return println!(
                "not looked at: this kernel knows no nodes, or this process runs under a policy"
            );
        }
        let mapping = AnonymousMapping::new(ByteCount(2 * PAGE_SIZE as u64), HugePages::Never).unwrap();
        mapping.bind(mapping.range(), FIRST).unwrap();
        mapping.write_u64(ByteCount(0), 1).unwrap();
        let second = mapping.base().checked_add(PAGE_SIZE as u64).unwrap();
        let found = whereabouts(ProcessId::own(), &[mapping.base(), second]).unwrap();
        assert_eq!(found, [Some(FIRST), None]);
    }
}
