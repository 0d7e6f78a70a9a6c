//! Whether a dump fits into memory: what of the machine is where enters, a refusal with its numbers leaves.
//!
//! Whoever is killed for want of memory cannot let a machine go on. A copy is this process's to pay for; what the reading brings into
//! RAM, a page from swap or one of shared memory that was never touched, is the VMM's, so both cgroups are asked. Their limits count
//! their files' pages as used, which the kernel would give up first: so this refuses too early rather than too late.
use super::super::machine::Machine;
use super::super::said;
use plimsoll_attach::RamBacking;
use plimsoll_inspect::Census;
use plimsoll_linux::cgroup::foreign::ProcessCgroup;
use plimsoll_sys::ProcessId;
use plimsoll_sys::procfs::parse_meminfo;
use plimsoll_types::ByteCount;
use std::ops::AddAssign;

/// The most that a dump takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cost {
    /// Copies, in this process.
    copy: ByteCount,
    /// Pages that come into RAM as they are read, of the VMM's.
    fill: ByteCount,
    /// Of what fills, what need not be copied: it was never touched, or is in RAM and the page map does not show it.
    either: ByteCount,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        let Self { copy, fill, either } = other;
        self.copy += copy;
        self.fill += fill;
        self.either += either;
    }
}

impl Cost {
    /// Of shared memory the page map shows neither what is in swap nor what is in RAM and not mapped, so all of it is read.
    fn of(backing: Option<&RamBacking>, taken: &Census) -> Self {
        let all = taken.total();
        match backing {
            Some(RamBacking::PrivateAnonymous) => {
                Self { copy: taken.present + taken.swapped, fill: taken.swapped, either: ByteCount(0) }
            }
            // What its pager brings back finds room in the pager's budget; the page map does not show it, so all may be copied.
            Some(RamBacking::Paged) => Self { copy: all, fill: taken.swapped, either: ByteCount(0) },
            // The kernel gives up what it read of a file, and huge pages are set aside.
            Some(
                RamBacking::SharedFile { .. } | RamBacking::PrivateFile { .. } | RamBacking::HugeTlb { .. },
            ) => Self { copy: all, ..Self::default() },
            _ => {
                let rest = all.saturating_sub(taken.present);
                Self { copy: all, fill: rest, either: rest }
            }
        }
    }

    /// Both, where so much is in swap in all: only what comes from there is paid for twice.
    fn both(&self, in_swap: ByteCount) -> ByteCount {
        (self.copy + self.fill).saturating_sub(self.either.saturating_sub(in_swap))
    }
}

/// Fails where a dump, with a copy or without, might not fit.
pub(super) fn check(machine: &Machine, is_copied: bool) -> Result<(), String> {
    let process = machine.dossier.identity.process;
    let mut cost = Cost::default();
    for piece in machine.ram.pieces() {
        let ram = machine.dossier.range_with(piece.hva);
        let taken = Census::take(&machine.pagemap, piece.hva).map_err(said)?;
        cost += Cost::of(ram.map(|ram| &ram.backing), &taken);
    }
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| format!("/proc/meminfo: {error}"))?;
    let field = |name| parse_meminfo(&text, name).ok_or_else(|| format!("/proc/meminfo does not say {name}"));
    let in_swap = field("SwapTotal")?.saturating_sub(field("SwapFree")?);
    // While nothing stands still, what came back from swap can go there again: one that is looked at slowly is no harm.
    let (of_all, fill) = if is_copied { (cost.both(in_swap), cost.fill) } else { (cost.either, cost.either) };
    let mut wanted = vec![(of_all, Some(field("MemAvailable")?), "on this host")];
    wanted.push((fill, headroom(process), "in the VMM's memory cgroup"));
    if is_copied {
        wanted.push((cost.copy, headroom(ProcessId::own()), "in this process's memory cgroup"));
    }
    match wanted.into_iter().find(|(needed, room, _)| room.is_some_and(|room| *needed > room)) {
        None => Ok(()),
        Some((needed, room, place)) => {
            let (name, room) = (&machine.dossier.name, room.unwrap_or_default());
            Err(format!(
                "a dump of {name} takes up to {needed} of memory, and {room} are available {place}: {}",
                match is_copied {
                    true => "dump it without --paused, or stop it yourself meanwhile",
                    false =>
                        "what is in swap comes back as it is read, and so does shared memory that was never touched",
                }
            ))
        }
    }
}

/// What is left of a cgroup's limit; `None` where there is no limit, or none that can be read.
fn headroom(process: ProcessId) -> Option<ByteCount> {
    let numbers = ProcessCgroup::of(process).ok()?.numbers().ok()?;
    Some(numbers.limit?.saturating_sub(numbers.used))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_swap_is_paid_for_twice_and_shared_or_paged_memory_as_a_whole() {
        let gib = |count: u64| ByteCount(count << 30);
        let taken = Census { present: gib(2), huge: gib(1), zero: gib(1), swapped: gib(3), absent: gib(10) };
        let private = Cost::of(Some(&RamBacking::PrivateAnonymous), &taken);
        assert_eq!((private.copy, private.fill, private.both(gib(3))), (gib(5), gib(3), gib(8)));
        let shown = Census { present: gib(2), absent: gib(14), ..Census::default() };
        let shared = Cost::of(Some(&RamBacking::SharedMemory { name: String::new() }), &shown);
        assert_eq!((shared.copy, shared.fill), (gib(16), gib(14)));
        // All of the rest is never touched, a part of it in swap, or any of it.
        assert_eq!([0, 4, 40].map(|swap| shared.both(gib(swap))), [gib(16), gib(20), gib(30)]);
        // What is with a pager is copied and takes no room; what the host has put into swap does.
        let paged = Cost::of(Some(&RamBacking::Paged), &shown);
        assert_eq!((paged.copy, paged.fill, paged.either), (gib(16), gib(0), gib(0)));
        assert_eq!([0, 40].map(|swap| paged.both(gib(swap))), [gib(16), gib(16)]);
        let paged = Cost::of(Some(&RamBacking::Paged), &taken);
        assert_eq!((paged.copy, paged.fill, paged.both(gib(3))), (gib(16), gib(3), gib(19)));
        let file = Cost::of(Some(&RamBacking::SharedFile { path: String::new() }), &shown);
        assert_eq!((file.copy, file.fill, file.both(gib(4))), (gib(16), gib(0), gib(16)));
    }
}
