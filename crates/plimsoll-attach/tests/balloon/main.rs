//! The balloon's controller against simulated guests: the cases an operator would ask about, and properties of all others.
mod guest;
mod properties;

use guest::{Guest, Kind};
use plimsoll_attach::balloon::{Controller, INACTIVE, Observation, REST_MIN, State, Strain, UNCOOPERATIVE};
use plimsoll_types::ByteCount;
use std::time::Duration;

const MEMORY: ByteCount = ByteCount::mib(4096);

fn controller() -> Controller {
    Controller::new(ByteCount(4096), ByteCount(0))
}

#[test]
fn a_willing_guest_gives_half_of_its_memory_within_half_a_minute_and_then_nothing_moves() {
    let mut guest = Guest::new(Kind::Honest, MEMORY, ByteCount::mib(512));
    let seen = guest.follow(&mut controller(), ByteCount::mib(2048), 90);
    let arrived = seen.iter().position(|(_, state)| *state == State::Settled).unwrap();
    assert!(arrived < 30, "{arrived} s");
    assert!(seen[arrived..].iter().all(|step| *step == (ByteCount::mib(2048), State::Settled)), "{seen:?}");
    assert!(seen.is_sorted_by_key(|(asked, _)| *asked), "{seen:?}");
}

#[test]
fn a_balloon_stops_where_the_guest_keeps_its_reserve() {
    let mut guest = Guest::new(Kind::Honest, MEMORY, ByteCount::mib(3000));
    let seen = guest.follow(&mut controller(), ByteCount::mib(3500), 90);
    let (asked, state) = seen[89];
    assert_eq!(state, State::AtFloor);
    assert!(state.falls_short());
    let spare = ByteCount::mib(4096 - 3000 - 256);
    assert!(asked <= spare && asked + guest.band() >= spare, "{asked} of {spare}");
}

#[test]
fn memory_that_is_needed_is_given_back_whole_and_at_once() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100)), controller());
    guest.follow(&mut controller, ByteCount::mib(3000), 60);
    guest.run(Duration::from_millis(10));
    let step = guest.look(&mut controller, ByteCount(0));
    assert_eq!((step.ask, step.state), (Some(ByteCount(0)), State::Deflating));
}

#[test]
fn a_guest_without_a_driver_is_inactive_after_5_s_uncooperative_after_20_and_asked_less_and_less() {
    let (mut guest, mut controller) = (Guest::new(Kind::Stuck, MEMORY, ByteCount::mib(100)), controller());
    let seen = guest.follow(&mut controller, ByteCount::mib(2048), 1200);
    let when = |wanted| u64::try_from(seen.iter().position(|(_, state)| *state == wanted).unwrap()).unwrap();
    let asked = when(State::Inflating);
    assert_eq!(when(State::Inactive) - asked, INACTIVE.as_secs());
    assert_eq!(when(State::Uncooperative) - asked, UNCOOPERATIVE.as_secs());
    let states: Vec<State> = seen.iter().map(|(_, state)| *state).collect();
    let rests: Vec<usize> =
        states.chunk_by(|a, b| a == b).filter(|run| run[0] == State::Uncooperative).map(<[_]>::len).collect();
    assert_eq!(rests[..5], [10, 20, 40, 80, 160], "{rests:?}");
    // Others may take over as soon as it is inactive; what it was asked for is withdrawn only when it is uncooperative.
    assert!(seen.iter().all(|(_, state)| state.falls_short() == !matches!(state, State::Inflating)));
    assert!(seen.iter().any(|(asked, state)| *state == State::Inactive && asked.0 > 0));
    assert!(seen.iter().filter(|(_, state)| *state == State::Uncooperative).all(|(asked, _)| asked.0 == 0));
}

#[test]
fn a_guest_that_gives_only_a_part_keeps_the_rest_and_is_not_pressed_for_it() {
    let most = ByteCount::mib(700);
    let mut guest = Guest::new(Kind::Partial(most), MEMORY, ByteCount::mib(100));
    let seen = guest.follow(&mut controller(), ByteCount::mib(2048), 400);
    assert_eq!(guest.balloon, most);
    let pressed = seen.iter().filter(|(asked, _)| *asked > most + guest.band()).count();
    assert!(pressed < 140, "{pressed} s of 400 s");
}

#[test]
fn a_guest_that_takes_memory_back_is_left_alone_longer_each_time() {
    // The guest says nothing, so only its deeds tell that it uses 3 of 4 GiB.
    let mut guest = Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100));
    guest.tells = false;
    let mut controller = controller();
    guest.follow(&mut controller, ByteCount::mib(3000), 60);
    assert_eq!(guest.balloon, ByteCount::mib(3000));
    (guest.kind, guest.used) = (Kind::DeflatesOnOom, ByteCount::mib(3072));
    let seen = guest.follow(&mut controller, ByteCount::mib(3000), 300);
    assert_eq!(seen[0], (ByteCount::mib(1024), State::Strained(Strain::TookBack)));
    let resting = State::Strained(Strain::TookBack);
    assert!(seen[..usize::try_from(REST_MIN.as_secs()).unwrap()].iter().all(|(_, state)| *state == resting));
    let swings = reversals(&seen);
    assert!(swings <= 14, "{swings} reversals in 300 s");
}

#[test]
fn a_balloon_rests_while_the_host_brings_pages_back() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100)), controller());
    guest.follow(&mut controller, ByteCount::mib(3000), 4);
    let (before, mut refaulted) = (guest.asked, ByteCount(0));
    for _ in 0..60 {
        guest.run(Duration::from_secs(1));
        refaulted += ByteCount::mib(5);
        let seen = Observation { refaulted, ..guest.observation() };
        let step = controller.step(&seen, ByteCount::mib(3000));
        guest.asked = step.ask.unwrap_or(guest.asked);
        assert!(guest.asked <= before);
    }
    let seen = guest.follow(&mut controller, ByteCount::mib(3000), 60);
    assert_eq!(seen[5].1, State::Strained(Strain::HostRefaults));
    assert_eq!(seen[59].1, State::Settled);
}

#[test]
fn a_guest_whose_load_grows_gets_its_reserve_back_before_it_pages() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(512)), controller());
    guest.follow(&mut controller, ByteCount::mib(3000), 60);
    // 4096 - 3000 - 1000 leaves 96 MiB: less than half of 256.
    guest.used = ByteCount::mib(1000);
    guest.run(Duration::from_secs(1));
    let step = guest.look(&mut controller, ByteCount::mib(3000));
    assert_eq!(step.ask, Some(ByteCount::mib(4096 - 1000 - 256)));
    assert_eq!(step.state, State::Strained(Strain::Low));
}

#[test]
fn statistics_that_stay_the_same_do_not_let_the_balloon_grow_past_what_they_allowed() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(3000)), controller());
    let frozen = guest.statistics();
    for _ in 0..200 {
        guest.run(Duration::from_secs(1));
        let seen = Observation { statistics: Some(frozen), ..guest.observation() };
        let step = controller.step(&seen, ByteCount::mib(3900));
        guest.asked = step.ask.unwrap_or(guest.asked);
    }
    assert!(guest.asked <= ByteCount::mib(4096 - 3000 - 256), "{}", guest.asked);
}

#[test]
fn a_guest_that_was_restarted_is_not_squeezed_while_it_boots() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100)), controller());
    guest.follow(&mut controller, ByteCount::mib(2000), 60);
    (guest.balloon, guest.asked) = (ByteCount(0), ByteCount(0));
    let step = guest.look(&mut controller, ByteCount::mib(2000));
    assert_eq!((step.ask, step.state), (Some(ByteCount(0)), State::Strained(Strain::TookBack)));
}

#[test]
fn a_machine_that_nobody_looked_at_is_not_judged_for_that_time() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100)), controller());
    guest.run(Duration::from_secs(1));
    assert_eq!(guest.look(&mut controller, ByteCount::mib(2048)).state, State::Inflating);
    // It was paused for an hour, so its balloon did not move.
    guest.now += Duration::from_secs(3600);
    assert_eq!(guest.look(&mut controller, ByteCount::mib(2048)).state, State::Inactive);
    let seen = guest.follow(&mut controller, ByteCount::mib(2048), 60);
    assert_eq!(seen[0].1, State::Inflating);
    assert_eq!(seen[59].1, State::Settled);
}

#[test]
fn a_machine_that_pages_though_its_balloon_is_where_it_should_be_falls_short_of_nothing() {
    let (mut guest, mut controller) = (Guest::new(Kind::Honest, MEMORY, ByteCount::mib(100)), controller());
    guest.follow(&mut controller, ByteCount::mib(2000), 60);
    guest.run(Duration::from_secs(1));
    let paging = Observation { refaulted: ByteCount::mib(500), ..guest.observation() };
    assert_eq!(controller.step(&paging, ByteCount::mib(2000)).state, State::Settled);
    // But it is not asked for more now.
    guest.run(Duration::from_secs(1));
    let seen = Observation { refaulted: ByteCount::mib(500), ..guest.observation() };
    assert_eq!(controller.step(&seen, ByteCount::mib(3000)).state, State::Strained(Strain::HostRefaults));
}

/// How often an ask that went one way went the other.
fn reversals(seen: &[(ByteCount, State)]) -> usize {
    let asks: Vec<ByteCount> = seen.iter().map(|(asked, _)| *asked).collect();
    let moves: Vec<bool> =
        asks.windows(2).filter(|pair| pair[0] != pair[1]).map(|pair| pair[0] < pair[1]).collect();
    moves.windows(2).filter(|pair| pair[0] != pair[1]).count()
}
