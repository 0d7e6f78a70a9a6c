//! Machines whose pages KSM has merged, under the pager.
//!
//! UFFDIO_MOVE refuses a merged page until it is its machine's own again. What must never happen: one that stays
//! behind for good, or comes back with other bytes.
use crate::evict::audit;
use crate::fleet::{DOMAIN, Fleet, Guest, PLENTY, explain, machine, until, zipf};
use plimsoll_core::word::StateKind;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::ksm::{Guide, Marker, Member, Merged, Options};
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_sys::mapping::Merging;
use plimsoll_sys::{HvaRange, procfs};
use plimsoll_types::{ByteCount, Hva};
use plimsoll_vmm::config::{HugePages, VmmConfig};
use plimsoll_vmm::control::{Command, MergeRange};
use std::io;
use std::sync::Arc;

/// Asks a machine over its control socket, and waits for its answer.
struct Asked(Arc<Guest>);

impl Marker for Asked {
    fn mark(&mut self, range: HvaRange, merging: Merging) -> io::Result<()> {
        let before = self.0.state();
        let asked = MergeRange::in_guest(&before.ram, range, merging);
        let asked = asked.ok_or_else(|| io::Error::other("not the machine's memory"))?;
        self.0.command(&Command::Merge(asked));
        until("an answer about merging", || (self.0.state().merging > before.merging).then_some(()));
        self.0.state().died.map_or(Ok(()), |why| Err(io::Error::other(why)))
    }
}

fn member(guest: &Arc<Guest>) -> Member {
    let ram = guest.state().ram;
    let ranges = ram.iter().filter_map(|ram| HvaRange::new(Hva(ram.hva), ByteCount(ram.bytes)));
    Member {
        id: guest.id,
        name: guest.name.clone(),
        process: guest.process(),
        domain: Some(DOMAIN),
        ranges: ranges.collect(),
        marker: Some(Box::new(Asked(Arc::clone(guest)))),
    }
}

fn merging(guests: &[Arc<Guest>]) -> u64 {
    guests.iter().map(|guest| procfs::ksm_stat(guest.process()).unwrap().merging.0).sum()
}

pub(crate) fn are_captured() {
    // Few operations, so that pages keep still; each reads one page or writes it anew.
    let calm = WorkloadSpec { ops_per_second: 20, hot_permille: 20, ..zipf() };
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let alike = |name: &str| {
        let mut config = VmmConfig { huge_pages: HugePages::Never, ..machine(name, 48, calm) };
        (config.workload.seed, config.workload.spec.seed) = (77, 77);
        config
    };
    let guests = ["merged1", "merged2"].map(|name| Arc::new(fleet.add(&alike(name))));
    let plain = Arc::new(fleet.add(&alike("plain")));
    guests.iter().chain([&plain]).for_each(|guest| guest.until_running());
    let mut guide = match Guide::start(guests.iter().map(member).collect(), Options::default()) {
        Ok(guide) => guide,
        Err(error) => {
            let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name == "ksm"), "{}", explain(&error));
            return println!("SKIPPED: {}", explain(&error));
        }
    };
    until("most pages to be merged", || {
        guide.round().unwrap();
        guide.tick().unwrap();
        (merging(&guests) > 10_000).then_some(())
    });
    println!("{:?}", guide.report().unwrap());
    // From here on nothing is merged any more; what is merged stays so.
    guide.end(Merged::Keep).unwrap();
    let before = merging(&guests);
    for guest in guests.iter().chain([&plain]) {
        let floor = fleet.view(guest.id).size.pages_floor().0 / 1024;
        fleet.squeeze_until(guest.id, "every page to be captured", || {
            let census = fleet.view(guest.id).stats.census;
            census.of(StateKind::Resident).0 + census.of(StateKind::Unwatched).0 <= 2 * floor
        });
    }
    // The VMM holds some pages for itself, merged or not: as many as those of a machine that was never merged.
    let pinned = |guest: &Guest| {
        let stats = fleet.view(guest.id).stats;
        println!(
            "{}: {:?}, {} captured, {} refused",
            guest.name, stats.census, stats.captured, stats.refused
        );
        stats.census.of(StateKind::Pinned)
    };
    let own = pinned(&plain);
    assert!(own.0 < 8, "{own} of a machine that was never merged");
    guests.iter().for_each(|guest| assert_eq!(pinned(guest), own, "a merged page of {} stayed", guest.name));
    println!("{before} pages were merged, {} are still counted so", merging(&guests));
    audit(&fleet);
    for guest in guests.into_iter().chain([plain]) {
        Arc::into_inner(guest).unwrap().finish();
    }
    assert_eq!(fleet.incidents(), []);
}
