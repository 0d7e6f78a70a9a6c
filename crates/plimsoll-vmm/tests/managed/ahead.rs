//! Pages brought before they are touched, and huge pages made again, over real machines.
use crate::fleet::{Fleet, Guest, PLENTY, machine, sweep, until, zipf};
use plimsoll_core::word::StateKind;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::StopMode;
use std::sync::Arc;
use std::time::Duration;

/// Odd ones end by themselves, the others are killed.
const ROUNDS: u32 = 8;
/// Slow enough that a machine that is parked while it sweeps has most of its pages in the store at some moment.
const PACE: u64 = 4000;
pub(crate) const SAMPLE_PERIOD: Duration = Duration::from_millis(100);

/// Nobody is ever short.
pub(crate) struct Idle;

impl Meter for Idle {
    fn used(&mut self) -> ByteCount {
        ByteCount(0)
    }
}

fn stored(fleet: &Fleet, guest: &Guest) -> u64 {
    fleet.view(guest.id).stats.census.of(StateKind::Stored).0
}

/// A machine that goes away while its pages are on their way back is gone, not lost, and leaves nothing in the store.
pub(crate) fn vanishes_meanwhile() {
    for round in 0..ROUNDS {
        let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
        let mut guest = fleet.add(&machine("sweeps", 64, WorkloadSpec { ops_per_second: PACE, ..sweep() }));
        guest.until_running();
        fleet.see().park(guest.id);
        until("pages to be stored", || (stored(&fleet, &guest) > 4000).then_some(()));
        let before = fleet.view(guest.id).stats.ahead.brought;
        fleet.see().wake(guest.id);
        until("pages to be brought ahead", || {
            (fleet.view(guest.id).stats.ahead.brought > before).then_some(())
        });
        if round % 2 == 0 {
            let _ = guest.kill();
        } else {
            guest.tell(StopMode::Now);
        }
        fleet.until_gone(guest.id);
        assert_eq!(fleet.incidents(), [], "round {round}");
        assert_eq!(fleet.store_pages(), 0, "round {round}");
    }
}

/// Small pages that came back and are all used become huge again, and hold what they held.
pub(crate) fn hot_blocks_become_huge() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    fleet.manager().govern(Box::new(Idle), SAMPLE_PERIOD).unwrap();
    let mut guest = fleet.add(&machine("hot", 24, zipf()));
    guest.until_running();
    until("pages to be taken and to come back", || {
        fleet.see().squeeze(guest.id, 2048);
        (fleet.view(guest.id).stats.faults.stored > 2000).then_some(())
    });
    fleet.see().squeeze(guest.id, 0);
    until("a block to be made huge again", || {
        (fleet.see().host().tidied(|tidied| tidied.collapsed) > 0).then_some(())
    });
    guest.finish();
    fleet.until_gone(guest.id);
    assert_eq!(fleet.incidents(), []);
}
