//! Stored bytes that go bad.
use crate::fleet::{Fleet, PLENTY, machine, sweep, until, zipf};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_vmm::config::VmmConfig;
use std::sync::Arc;

/// No page of one machine equals one of another: what is damaged is one machine's alone.
fn unshared(mut config: VmmConfig) -> VmmConfig {
    config.workload.mix = Mix { zero: 0, duplicate: 0, text: 50, random: 50 };
    config
}

pub(crate) fn a_damaged_page() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    // Slow enough that most of its pages are away at some moment, fast enough to come to all of them in seconds.
    let reader = WorkloadSpec { write_permille: 0, ops_per_second: 4000, ..sweep() };
    let mut victim = fleet.add(&unshared(machine("victim", 48, reader)));
    let mut other =
        fleet.add(&unshared(machine("other", 48, WorkloadSpec { ops_per_second: 2000, ..zipf() })));
    victim.until_running();
    other.until_running();
    fleet.squeeze_until(other.id, "the other machine to have stored pages", || fleet.stored(other.id) > 1000);
    fleet.squeeze_until(victim.id, "the victim to have stored pages", || fleet.stored(victim.id) > 3000);
    fleet.see().sabotage(victim.id);
    // Nothing more is taken: the sweep comes to every page that is away.
    let reported =
        until("the damage to be noticed", || Some(fleet.incidents()).filter(|list| !list.is_empty()));
    let [Incident::Poisoned { machine, page, cause }] = &reported[..] else { panic!("{reported:?}") };
    assert_eq!(*machine, victim.id);
    println!("{page} of {machine}: {cause}");
    let died = until("the guest to die of the page or to find a wrong word", || {
        let state = victim.state();
        (state.summary.wrong_words > 0).then_some("a wrong word".to_owned()).or(state.died)
    });
    assert!(died.contains("poisoned") || died == "a wrong word", "{died}");
    println!("the guest: {died}");
    victim.kill();
    fleet.until_gone(victim.id);
    fleet.manager().forget(victim.id);
    other.goes_on();
    other.finish();
    fleet.until_gone(other.id);
    assert_eq!(fleet.incidents(), []);
    assert_eq!(fleet.store_pages(), 0, "the damaged object was released with the others");
}
