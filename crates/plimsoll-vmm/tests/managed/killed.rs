//! A VMM that is killed while its pages are on their way out.
use crate::fleet::{self, Fleet, PLENTY, machine, until, zipf};
use crate::probes::Gate;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::probe::Step;
use plimsoll_types::ByteCount;
use std::sync::Arc;

pub(crate) fn at_any_step_of_a_capture() {
    let gate = Arc::new(Gate::default());
    let mut fleet = Fleet::new(PLENTY, Arc::clone(&gate) as _);
    // Its hot part is a few hundred pages, so that between two operations nothing of it moves and its share of the
    // store can be told exactly.
    let calm = WorkloadSpec { hot_permille: 20, ops_per_second: 2000, ..zipf() };
    let mut other = fleet.add(&machine("other", 48, calm));
    other.until_running();
    for step in [Step::CaptureBegun, Step::Moved, Step::SlotRead, Step::ObjectInserted] {
        fleet.squeeze_until(other.id, "the other machine to have stored pages", || {
            fleet.stored(other.id) > 1000
        });
        let before = (fleet::descriptors(), fleet::word_mappings());
        let mut victim = fleet.add(&machine("victim", 48, zipf()));
        victim.until_running();
        fleet.squeeze_until(victim.id, "the victim to have stored pages", || fleet.stored(victim.id) > 1000);
        gate.arm(victim.id, &[step]);
        fleet.squeeze_until(victim.id, "the victim's pager to be held", || gate.is_holding());
        other.goes_on();
        victim.kill();
        other.goes_on();
        gate.open();
        fleet.until_gone(victim.id);
        until("the store to hold the other machine's pages and no more", || {
            (fleet.store_pages() == fleet.stored(other.id)).then_some(())
        });
        assert!(fleet.store_pages() > 0, "nothing of the other machine was in the store to be told apart");
        fleet.manager().forget(victim.id);
        drop(victim);
        assert_eq!(
            (fleet::descriptors(), fleet::word_mappings()),
            before,
            "{step:?}: descriptors, word mappings"
        );
        assert_eq!(fleet.incidents(), [], "{step:?}: the end of a VMM is no incident");
        other.goes_on();
        println!("killed at {step:?}: nothing left");
    }
    other.finish();
    fleet.until_gone(other.id);
    assert_eq!(fleet.store_pages(), 0);
    let charged = fleet.see().host().ledger(|ledger| ledger.charged());
    let empty = fleet.see().domain(fleet::DOMAIN).unwrap().held();
    assert_eq!(charged, empty, "nobody is left, so only the empty store is charged");
    assert!(empty < ByteCount::mib(4), "an empty store holds {empty}");
}
