//! A model explored to its end, whatever it is a model of.
//!
//! Enters: a model whose properties say what must hold always and what must have been seen. Leaves: nothing, or a panic with the
//! shortest trace to what must not be.
use core::fmt::Debug;
use core::hash::Hash;
use stateright::{Checker, Expectation, HasDiscoveries, Model};
use std::time::Instant;

/// What a model has to be.
pub(crate) trait Explored:
    Model<State: Clone + Debug + Hash + PartialEq + Send + Sync, Action: Clone + Debug + PartialEq>
    + Send
    + Sync
    + 'static
{
}

/// Explores every state and fails on a broken rule, or on something that never happened and `is_expected` to by its name.
pub(crate) fn explore<M: Explored>(name: &str, model: M, is_expected: impl Fn(&'static str) -> bool) {
    let start = Instant::now();
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    println!(
        "{name}: {} unique states, {} steps, depth {}, {:.1?}",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        start.elapsed()
    );
    let found = checker.discoveries();
    for property in checker.model().properties() {
        let path = found.get(property.name);
        match (property.expectation, path) {
            (Expectation::Always, Some(path)) => {
                let state = path.last_state();
                let trace = path.clone().into_actions();
                panic!("{name}: not so: {}\n{trace:#?}\n{state:#?}", property.name);
            }
            (Expectation::Sometimes, None) if is_expected(property.name) => {
                panic!("{name}: never seen: {}", property.name);
            }
            _ => {}
        }
    }
}

/// Explores until a rule is broken; returns which ones are, at the first state that breaks any.
pub(crate) fn broken_rules<M: Explored>(model: M) -> Vec<&'static str> {
    let checker = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let found = checker.discoveries();
    let rules = checker.model().properties().into_iter();
    let rules = rules.filter(|rule| matches!(rule.expectation, Expectation::Always));
    let broken: Vec<_> = rules.map(|rule| rule.name).filter(|rule| found.contains_key(rule)).collect();
    broken.iter().for_each(|rule| println!("{rule}: {:?}", found[rule].clone().into_actions()));
    broken
}
