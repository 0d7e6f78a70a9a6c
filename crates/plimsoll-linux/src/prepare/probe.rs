//! What this process may do and what the kernel does for it, tried on memory of its own.
//!
//! Nothing enters but what only a higher room can find out about KVM. What leaves is old the moment it is there. What must
//! never happen here: a look into, or a touch of, another process.
use crate::explain;
use plimsoll_sys::ProcessId;
use plimsoll_sys::mapping::{AnonymousMapping, HugePages};
use plimsoll_sys::pagemap::{Categories, Filter, Pagemap, PagemapError};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_sys::process::{CapabilitySet, effective_capabilities};
use plimsoll_sys::process_memory::{Advice, advise};
use plimsoll_sys::uffd::{Features, Mode, Userfaultfd};
use plimsoll_types::{BLOCK_SIZE, ByteCount, PAGE_SIZE};

/// The advice that paging from outside is made of.
pub(super) const ADVICE: [(Advice, &str); 3] =
    [(Advice::PageOut, "PAGEOUT"), (Advice::Cold, "COLD"), (Advice::Collapse, "COLLAPSE")];

/// What reading a page map gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageMap {
    /// PAGEMAP_SCAN works.
    Scan,
    /// Only entries can be read.
    EntriesOnly,
    /// Nothing, and why.
    Refused(String),
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Own {
    /// What runs guests, or why nothing can but threads.
    pub kvm: Result<String, String>,
    /// What userfaultfd can do, or why there is none that catches the kernel's faults, too.
    pub userfaultfd: Result<Features, String>,
    /// For each of PAGEOUT, COLD, COLLAPSE: why the kernel refused it, if it did.
    pub refused: [Option<String>; 3],
    /// What the page map gives.
    pub page_map: PageMap,
    /// What this process may do.
    pub rights: CapabilitySet,
}

impl Own {
    /// Tries everything. Takes a few megabytes for a moment.
    pub fn probe(kvm: Result<String, String>) -> Self {
        let userfaultfd = Userfaultfd::open(Mode::KernelAndUser)
            .map_err(|error| explain(&error))
            .and_then(|uffd| uffd.handshake(Features::empty()).map_err(|error| explain(&error)))
            .map(|reply| reply.features);
        Self {
            kvm,
            userfaultfd,
            refused: ADVICE.map(|(advice, _)| try_advice(advice).err()),
            page_map: try_page_map(),
            rights: effective_capabilities().unwrap_or(CapabilitySet::empty()),
        }
    }
}

/// Memory with something in it that contains a whole block.
fn memory() -> Result<AnonymousMapping, String> {
    let size = ByteCount(2 * BLOCK_SIZE as u64);
    let memory = AnonymousMapping::new(size, HugePages::Never).map_err(|error| explain(&error))?;
    // Some of each block: as much as the probes need, and no more to page out than that.
    for page in 0..16_u64 {
        memory.write_u64(ByteCount(page * PAGE_SIZE as u64), page + 1).map_err(|error| explain(&error))?;
    }
    Ok(memory)
}

fn try_advice(advice: Advice) -> Result<(), String> {
    let memory = memory()?;
    let range = memory.range();
    if advice == Advice::Collapse {
        memory.populate_write(range).map_err(|error| explain(&error))?;
        memory.advise_huge_pages(range, HugePages::Prefer).map_err(|error| explain(&error))?;
    }
    let own = Pidfd::open(ProcessId::own()).map_err(|error| explain(&error))?;
    match advise(&own, &[range], advice).stop {
        None => Ok(()),
        Some(refusal) => Err(refusal.to_string()),
    }
}

fn try_page_map() -> PageMap {
    let refused = |error: &dyn std::error::Error| PageMap::Refused(explain(error));
    let memory = match memory() {
        Ok(memory) => memory,
        Err(why) => return PageMap::Refused(why),
    };
    let map = match Pagemap::open(ProcessId::own()) {
        Ok(map) => map,
        Err(error) => return refused(&error),
    };
    let filter = Filter {
        all_of: Categories::empty(),
        any_of: Categories::PRESENT | Categories::SWAPPED,
        report: Categories::PRESENT,
    };
    match map.scan(memory.range(), filter, |_| {}) {
        Ok(()) => PageMap::Scan,
        Err(PagemapError::NoScan) => match map.read(memory.range(), &mut Vec::new()) {
            Ok(()) => PageMap::EntriesOnly,
            Err(error) => refused(&error),
        },
        Err(error) => refused(&error),
    }
}
