//! Everything taken again and again from guests that discard and verify.
use crate::fleet::{Fleet, Guest, PATIENCE, PLENTY, machine, sweep, until, zipf};
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_vmm::config::VmmConfig;
use plimsoll_vmm::control::StopMode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LASTS: Duration = Duration::from_secs(6);

/// Sums that hold at every moment, whatever is on its way.
pub(crate) fn audit(fleet: &Fleet) {
    for view in fleet.see().machines() {
        assert_eq!(view.stats.census.total().bytes(), view.size, "{}: states and size", view.name);
    }
    fleet.see().host().ledger(|ledger| ledger.audit()).unwrap();
}

pub(crate) fn again_and_again() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let discarding = |spec| WorkloadSpec { discard_every_ops: 200, ..spec };
    let smp = VmmConfig { vcpus: 2, ..machine("zipf2", 48, zipf()) };
    let mut guests: Vec<Guest> = [
        machine("sweep-d", 48, discarding(sweep())),
        VmmConfig { vcpus: 2, ..machine("zipf2-d", 48, discarding(zipf())) },
        smp,
    ]
    .iter()
    .map(|config| fleet.add(config))
    .collect();
    guests.iter().for_each(Guest::until_running);
    // On a busy machine it takes longer until enough has gone and come back.
    let is_enough = |guest: &Guest| {
        let (stats, summary) = (fleet.view(guest.id).stats, guest.state().summary);
        let gives = summary.discarded_pages > 1000 && stats.discarded > 100;
        stats.captured > 3 * summary.footprint_pages / 2
            && stats.faults.stored > 500
            && (gives || !guest.name.ends_with("-d"))
    };
    let start = Instant::now();
    while start.elapsed() < LASTS || start.elapsed() < PATIENCE && !guests.iter().all(is_enough) {
        guests.iter().for_each(|guest| fleet.squeeze(guest.id));
        for _ in 0..20 {
            std::thread::sleep(Duration::from_millis(20));
            audit(&fleet);
        }
    }
    guests.iter().for_each(Guest::goes_on);
    for guest in &guests {
        fleet.see().squeeze(guest.id, 0);
        guest.tell(StopMode::Finish);
    }
    for guest in &mut guests {
        guest.finished();
        fleet.until_gone(guest.id);
        let (stats, summary) = (fleet.view(guest.id).stats, guest.state().summary);
        println!(
            "{}: {} operations, {} pages given back, {} captured, {:?}, {:?}, {:?}",
            guest.name,
            summary.operations,
            summary.discarded_pages,
            stats.captured,
            stats.stored,
            stats.faults,
            stats.anomalies
        );
        assert!(stats.captured > 3 * summary.footprint_pages / 2, "{}: too little was taken", guest.name);
        assert!(stats.faults.stored > 500, "{}: too little came back from the store", guest.name);
        assert_eq!(stats.anomalies.lost, 0, "{}", guest.name);
        if guest.name.ends_with("-d") {
            // Of those in a block that is left to the kernel nobody hears.
            assert!(summary.discarded_pages > 1000 && stats.discarded > 100, "{}", guest.name);
        } else {
            assert_eq!(stats.anomalies.missing, 0, "{}", guest.name);
        }
    }
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.store_pages(), 0);
}

pub(crate) fn under_a_standing_order() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&machine("wanted", 48, zipf()));
    guest.until_running();
    // What a governor asks, each time it looks, of the only machine of a host whose store alone is beyond the mark.
    fleet.see().squeeze(guest.id, u32::MAX);
    let so_far = || (guest.operations(), fleet.view(guest.id).stats.captured);
    until("it to be taken", || (so_far().1 > 10_000).then_some(()));
    // Counted in pages, not in seconds: how many are taken and come back in one is this machine's affair.
    let (operations, captured) = so_far();
    until("pages to be taken again and again", || (so_far().1 > captured + 30_000).then_some(()));
    let (done, taken) = (guest.operations() - operations, fleet.view(guest.id).stats.captured - captured);
    let stats = fleet.view(guest.id).stats;
    println!("{done} operations while {taken} pages were taken; {:?}, {:?}", stats.census, stats.faults);
    fleet.see().squeeze(guest.id, 0);
    guest.finish();
    // 62 pages an operation were measured.
    assert!(done * 800 >= taken, "{done} operations: of {taken} pages few were used before they were taken");
}
