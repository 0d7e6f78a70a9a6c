//! Machines that are given back to their VMMs, with all their pages, while their guests run.
use crate::fleet::{self, Fleet, Guest, PLENTY, machine, until, zipf};
use crate::probes::Crash;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::probe::{NoProbe, Step};
use plimsoll_types::ByteCount;
use plimsoll_vmm::config::VmmConfig;
use std::sync::Arc;

/// A guest that gives memory back all the time, served by so many pagers.
fn busy(name: &str, shards: u32) -> VmmConfig {
    let spec = WorkloadSpec { discard_every_ops: 200, ..zipf() };
    VmmConfig { vcpus: 2, shards: Some(shards), ..machine(name, 50, spec) }
}

fn squeeze(fleet: &Fleet, guest: &Guest) {
    fleet.squeeze_until(guest.id, "pages to be stored", || fleet.stored(guest.id) > 1000);
}

fn bring_home(fleet: &Fleet, guest: &Guest) {
    fleet.see().go_home(guest.id, true);
    until("the machine to be home", || fleet.see().is_home(guest.id).then_some(()));
    assert_eq!(fleet.store_pages(), 0, "pages of a machine that is home");
}

pub(crate) fn goes_on_alone() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guests = Vec::new();
    for shards in [1, 3] {
        let before = (fleet::descriptors(), fleet::word_mappings());
        let guest = fleet.add(&busy("leaves", shards));
        guest.until_running();
        squeeze(&fleet, &guest);
        assert!(!fleet.see().let_go(guest.id), "its pages are elsewhere");
        bring_home(&fleet, &guest);
        guest.goes_on();
        assert!(fleet.see().is_home(guest.id), "a guest that works is home all the same");
        assert!(fleet.see().let_go(guest.id));
        // There is no way back.
        fleet.see().go_home(guest.id, false);
        until("the machine to be forgotten", || {
            fleet.manager().forget_gone().iter().any(|(id, _)| *id == guest.id).then_some(())
        });
        fleet.until_gone(guest.id);
        until("the VMM to say so", || guest.state().is_given_back.then_some(()));
        let after = (fleet::descriptors(), fleet::word_mappings());
        // The test's own end of the control socket stays, and its copy for the reader.
        assert_eq!(after.1, before.1);
        assert_eq!(after.0.len(), before.0.len() + 2, "{before:?} {after:?}");
        guests.push(guest);
    }
    assert_eq!((fleet.incidents(), fleet.see().machines().len()), (Vec::new(), 0));
    drop(fleet);
    for guest in &mut guests {
        guest.goes_on();
        guest.finish();
        let state = guest.state();
        assert!(!state.manager_lost);
    }
}

pub(crate) fn stays_after_all() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&busy("stays", 3));
    guest.until_running();
    for _ in 0..2 {
        squeeze(&fleet, &guest);
        bring_home(&fleet, &guest);
        fleet.see().go_home(guest.id, false);
        until("the order to be withdrawn", || (!fleet.see().is_home(guest.id)).then_some(()));
    }
    squeeze(&fleet, &guest);
    guest.finish();
    fleet.until_gone(guest.id);
    assert!(!guest.state().is_given_back);
    assert_eq!(fleet.incidents(), []);
}

pub(crate) fn is_taken_over_in_the_middle() {
    const SHARDS: u32 = 3;
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut guest = fleet.add(&busy("torn", SHARDS));
    guest.until_running();
    // Of the guest's blocks none is untouched any more: the step is that of letting go.
    for nth in 1..=u64::from(SHARDS) {
        let crash = Arc::new(Crash::new(Step::Unwatched, nth, Vec::new()));
        fleet.replace(Arc::clone(&crash) as _);
        squeeze(&fleet, &guest);
        bring_home(&fleet, &guest);
        assert!(!crash.happened() && fleet.see().let_go(guest.id));
        until("the manager to crash", || crash.happened().then_some(()));
        // The guest goes on where it is alone, and the next manager finds what it did there.
        fleet.replace(Arc::new(NoProbe));
        guest.goes_on();
        squeeze(&fleet, &guest);
        assert_eq!(fleet.view(guest.id).stats.anomalies.lost, 0, "crashed at the {nth}. shard");
        assert_eq!(fleet.view(guest.id).size, ByteCount::mib(50));
    }
    let state = guest.state();
    assert!(!state.manager_lost && !state.is_given_back);
    guest.finish();
    fleet.until_gone(guest.id);
    assert_eq!((fleet.incidents(), fleet.store_pages()), (Vec::new(), 0));
}
