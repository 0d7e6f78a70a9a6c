//! What may be done with a machine's memory, and why not the rest. What was found enters as hazards; which rungs they
//! turn off is a table. Nothing is looked up here.

use core::fmt;
use plimsoll_types::ByteCount;
use serde::{Serialize, Serializer};

/// A way to get memory from a machine, cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// Memory that the guest itself reports as free.
    GuestFree,
    /// Memory that a balloon in the guest gives up.
    Balloon,
    /// Equal pages kept once.
    ResidentSharing,
    /// Pages taken through the kernel and kept in zram or zswap.
    KernelPaging,
    /// Pages that go on to a disk.
    Disk,
}

impl Rung {
    /// All, in the order in which they are used.
    pub const ALL: [Self; 5] =
        [Self::GuestFree, Self::Balloon, Self::ResidentSharing, Self::KernelPaging, Self::Disk];
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::GuestFree => "guest-free",
            Self::Balloon => "balloon",
            Self::ResidentSharing => "resident-sharing",
            Self::KernelPaging => "kernel-paging",
            Self::Disk => "disk",
        })
    }
}

/// Something that makes a rung unsafe or useless. As text: what was found, and what would change it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Hazard {
    /// A device reads and writes guest RAM by physical address: every page is pinned, and one that the guest gave
    /// back would be missing under the device.
    #[error("{file} is open: a device has direct access to guest RAM, which pins it; detach the device")]
    DirectDevice {
        /// The open file that shows it.
        file: String,
    },
    /// Guest RAM is locked, so that neither reclaim takes nor MADV_DONTNEED frees a page.
    #[error(
        "guest RAM is locked in memory ({locked} of it): start it without mlock (QEMU: -overcommit mem-lock=off; \
         libvirt: no <locked/>)"
    )]
    Locked {
        /// How much of it.
        locked: ByteCount,
    },
    /// The pages are hugetlbfs's, which the kernel neither swaps nor merges, nor frees in pieces.
    #[error("guest RAM lies in hugetlbfs pages, which cannot be swapped: use transparent huge pages instead")]
    HugeTlb,
    /// The guest's memory is encrypted or kept from the host.
    #[error("the guest's memory is protected from the host ({evidence})")]
    Confidential {
        /// What shows it.
        evidence: String,
    },
    /// Its cgroup leaves it no swap.
    #[error(
        "its cgroup {cgroup} forbids swap: raise memory.swap.max (v1: memory.swappiness and memory.memsw.limit_in_bytes) \
         there, or above it"
    )]
    SwapForbidden {
        /// The cgroup's directory.
        cgroup: String,
    },
    /// There is nowhere to page to. Nothing of the machine's: it is for whoever shows a dossier.
    #[error("this host has no swap: set it up with `plimsoll host prepare`, or add some of your own")]
    NoSwap,
    /// Somebody serves the faults of guest RAM.
    #[error(
        "a userfaultfd is registered on guest RAM: a postcopy migration, a background snapshot, a lazy restore or a \
         pager serves its faults; wait for it to end"
    )]
    Userfaultfd,
    /// The machine was born under plimsoll.
    #[error("plimsoll's own pager manages this machine's memory already")]
    OwnPager,
    /// Pages go back to a file on a disk and not to swap.
    #[error(
        "guest RAM is the file {path}, mapped shared: pages taken would be written to that file, uncompressed, not to \
         swap; use memory-backend-memfd, or a file on tmpfs"
    )]
    DiskFile {
        /// The file.
        path: String,
    },
    /// Pages of shared memory are not KSM's to merge.
    #[error("guest RAM is mapped shared, and KSM merges private anonymous pages only")]
    SharedPages,
    /// The machine is on its way to or from another host.
    #[error("a migration is {status}: attach again when it has ended")]
    Migrating {
        /// The VMM's word for its state.
        status: String,
    },
    /// This process lacks a right.
    #[error("this process lacks {capability}, which process_madvise(2) asks for: run as root, or grant it")]
    MissingCapability {
        /// The capability's name.
        capability: &'static str,
    },
}

impl Hazard {
    /// True for one that ends of itself, and shows in no mapping when it does: whoever follows the machine looks again.
    pub const fn is_passing(&self) -> bool {
        matches!(self, Self::Migrating { .. } | Self::Userfaultfd)
    }

    /// The rungs that it turns off.
    pub const fn rungs_off(&self) -> &'static [Rung] {
        use Rung::{Balloon, Disk, KernelPaging, ResidentSharing};
        match self {
            Self::DirectDevice { .. }
            | Self::Locked { .. }
            | Self::Confidential { .. }
            | Self::Userfaultfd
            | Self::OwnPager
            | Self::Migrating { .. } => &Rung::ALL,
            // Free-page reports come in units that a huge page fits into; a balloon's single pages free none.
            Self::HugeTlb => &[Balloon, ResidentSharing, KernelPaging, Disk],
            Self::DiskFile { .. } => &[ResidentSharing, KernelPaging, Disk],
            Self::SharedPages => &[ResidentSharing],
            Self::SwapForbidden { .. } | Self::NoSwap | Self::MissingCapability { .. } => {
                &[KernelPaging, Disk]
            }
        }
    }
}

impl Serialize for Hazard {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Which rungs are allowed, and for each that is not, why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rungs {
    off: Vec<(Rung, Hazard)>,
}

impl Rungs {
    /// The rungs under all of those hazards. Of several reasons against a rung, the first counts.
    pub fn under<'a>(hazards: impl Iterator<Item = &'a Hazard> + Clone) -> Self {
        let reason = |rung: Rung| hazards.clone().find(|hazard| hazard.rungs_off().contains(&rung));
        Self { off: Rung::ALL.into_iter().filter_map(|rung| Some((rung, reason(rung)?.clone()))).collect() }
    }

    /// The rungs of a whole: one is off if it is off in every part.
    pub fn of_parts(parts: &[Self]) -> Self {
        let Some((first, others)) = parts.split_first() else { return Self::default() };
        let everywhere = |rung| others.iter().all(|part| !part.allows(rung));
        Self { off: first.off.iter().filter(|(rung, _)| everywhere(*rung)).cloned().collect() }
    }

    /// Why the rung is off, or `None` if it is allowed.
    pub fn off(&self, rung: Rung) -> Option<&Hazard> {
        self.off.iter().find(|(other, _)| *other == rung).map(|(_, hazard)| hazard)
    }

    /// True when the rung may be used.
    pub fn allows(&self, rung: Rung) -> bool {
        self.off(rung).is_none()
    }
}

impl Serialize for Rungs {
    /// Each rung with `null`, or with the reason why it is off.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Rung::ALL.map(|rung| (rung, self.off(rung))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rung_is_off_for_the_first_hazard_that_names_it() {
        let hazards =
            [Hazard::SharedPages, Hazard::SwapForbidden { cgroup: "/a".to_owned() }, Hazard::HugeTlb];
        let rungs = Rungs::under(hazards.iter());
        assert_eq!(rungs.off(Rung::ResidentSharing), Some(&hazards[0]));
        assert_eq!(rungs.off(Rung::KernelPaging), Some(&hazards[1]));
        assert_eq!(rungs.off(Rung::Balloon), Some(&hazards[2]));
        assert!(rungs.allows(Rung::GuestFree));
        assert!(Rung::ALL.into_iter().all(|rung| Rungs::default().allows(rung)));
    }

    #[test]
    fn a_rung_of_the_whole_is_off_only_where_every_part_has_it_off() {
        let (huge, shared) = ([Hazard::HugeTlb], [Hazard::SharedPages]);
        let whole = Rungs::of_parts(&[Rungs::under(huge.iter()), Rungs::under(shared.iter())]);
        assert_eq!(whole.off(Rung::ResidentSharing), Some(&Hazard::HugeTlb));
        assert!(whole.allows(Rung::KernelPaging) && whole.allows(Rung::GuestFree));
    }
}
