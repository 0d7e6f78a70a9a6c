//! Pages brought before they are touched, and huge pages made again, over real machines.
use crate::fleet::{Fleet, PLENTY, machine, sweep, until, zipf};
use crate::probes::Gate;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_linux::uffd::probe::{NoProbe, Step};
use plimsoll_types::ByteCount;
use plimsoll_vmm::control::StopMode;
use std::sync::Arc;
use std::time::Duration;

/// What a pager passes, in this order and with nothing between, when it brings pages.
const BRINGING: [Step; 4] = [Step::BringBegun, Step::SourceRead, Step::Copied, Step::InstalledMarked];
/// How a machine goes away.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Dead before the pager goes on.
    Killed,
    /// By itself, for which it may need pages.
    Ends,
}

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

/// A machine that is killed, or ends by itself, while its pages are on their way back is gone, not lost, and leaves
/// nothing in the store.
pub(crate) fn vanishes_meanwhile() {
    let gate = Arc::new(Gate::default());
    let mut fleet = Fleet::new(PLENTY, Arc::clone(&gate) as _);
    let ways = (1..=BRINGING.len()).flat_map(|steps| [(steps, Way::Killed), (steps, Way::Ends)]);
    for (steps, way) in ways {
        let (path, at) = (&BRINGING[..steps], BRINGING[steps - 1]);
        let mut guest = fleet.add(&machine("sweeps", 64, WorkloadSpec { ops_per_second: PACE, ..sweep() }));
        guest.until_running();
        fleet.see().park(guest.id);
        until("pages to be stored", || (fleet.stored(guest.id) > 4000).then_some(()));
        gate.arm(guest.id, path);
        fleet.see().wake(guest.id);
        until("the pager to be held while it brings pages", || gate.is_holding().then_some(()));
        assert!(fleet.store_pages() > 0, "{at:?}: all pages are back");
        match way {
            Way::Killed => drop(guest.kill()),
            Way::Ends => guest.tell(StopMode::Now),
        }
        gate.open();
        fleet.until_gone(guest.id);
        assert_eq!(fleet.incidents(), [], "{at:?}, {way:?}");
        assert_eq!(fleet.store_pages(), 0, "{at:?}, {way:?}");
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
