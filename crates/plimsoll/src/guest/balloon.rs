//! Bringing a balloon to where its guest has as much as is wanted.
//!
//! Enters: a size. Leaves: a balloon there, or as far as the guest can and will go. What must never happen: two managers that
//! pull at one balloon, or an ask that stays behind when a guest was given up.
use super::view::View;
use super::{End, Guest, PERIOD, Patience};
use plimsoll_attach::AttachLock;
use plimsoll_attach::balloon::{Controller, Observation, State, UNCOOPERATIVE, reserve};
use plimsoll_attach::control::{
    Balloon, Change, Control, ControlError, Cooperation, Fault, GuestStatistics, Migration, RunState,
};
use plimsoll_linux::explain;
use plimsoll_sys::procfs::major_faults;
use plimsoll_types::{ByteCount, PageCount};
use std::time::{Duration, Instant};

/// One look.
pub(super) struct Look {
    pub(super) seconds: f64,
    pub(super) memory: ByteCount,
    /// What the guest says is in the balloon.
    pub(super) actual: ByteCount,
    pub(super) asked: ByteCount,
    pub(super) target: ByteCount,
    pub(super) statistics: Option<GuestStatistics>,
    pub(super) state: State,
}

/// Drives the balloon until the guest has `wanted`. Nothing has been asked of the guest if this fails.
///
/// With `every` the guest tells its statistics so often from now on. Without, it does so until this returns, and then as often
/// as it did before.
pub(super) fn bring(
    guest: &mut Guest,
    wanted: ByteCount,
    every: Option<Duration>,
    view: &View,
) -> Result<End, String> {
    let _lock = AttachLock::acquire(&guest.held).map_err(|error| explain(&error))?;
    check_runs(&mut *guest.control)?;
    let before = have_told(&mut *guest.control, every.unwrap_or(PERIOD)).map_err(|error| explain(&error))?;
    let end = approach(guest, wanted, view);
    if let (None, Some(before)) = (every, before) {
        // An interface that was lost on the way has been told of.
        let _ = guest.control.poll_statistics(before);
    }
    end
}

/// Has the guest tell its statistics so often. Returns how often it did, unless it is to be driven without.
fn have_told(control: &mut dyn Control, every: Duration) -> Result<Option<Duration>, ControlError> {
    let before = control.statistics_interval();
    match before.and_then(|before| control.poll_statistics(every).map(|()| before)) {
        Ok(before) => Ok(Some(before)),
        Err(error) if error.fault() == Fault::Request => Ok(None),
        Err(error) => Err(error),
    }
}

fn approach(guest: &mut Guest, wanted: ByteCount, view: &View) -> Result<End, String> {
    let control = &mut *guest.control;
    let failed = |error: ControlError| explain(&error);
    let device = control.probe().map_err(failed)?.balloon;
    let device = device.ok_or_else(|| {
        format!("{} has no balloon: the machine would have to be started with one", control.interface())
    })?;
    let first = control.balloon().map_err(failed)?;
    check(wanted, first.memory)?;
    let held = first.actual.ok_or_else(|| {
        format!("{} does not say what the balloon holds while statistics are off", control.interface())
    })?;
    let inherited = first.target.unwrap_or(held);
    Ok(drive(guest, wanted, inherited, Controller::new(device.granularity, inherited), view))
}

/// A guest that does not run moves nothing, and one that moves away must not be disturbed.
fn check_runs(control: &mut dyn Control) -> Result<(), String> {
    match control.run_state().map_err(|error| explain(&error))? {
        RunState::Running => {}
        RunState::Paused => return Err("the machine is paused: resume it first".to_owned()),
        RunState::NotStarted => return Err("the machine was not started yet: start it first".to_owned()),
        RunState::Ended => return Err("the machine has ended".to_owned()),
    }
    match control.migration() {
        Ok(Migration::Active) => Err("the machine is being migrated: wait until it has arrived".to_owned()),
        Ok(Migration::Completed) => Err("the machine was migrated and runs elsewhere now".to_owned()),
        Ok(Migration::None | Migration::Failed) | Err(ControlError::Unsupported { .. }) => Ok(()),
        Err(error) => Err(explain(&error)),
    }
}

/// Whether a guest of `memory` can have `wanted`.
fn check(wanted: ByteCount, memory: ByteCount) -> Result<(), String> {
    let least = reserve(memory);
    if wanted > memory {
        return Err(format!("a balloon cannot give the guest {wanted}: without one it has {memory}"));
    }
    if wanted < least {
        return Err(format!("{wanted} is too little for a guest of {memory}: leave it {least} at least"));
    }
    Ok(())
}

fn drive(
    guest: &mut Guest,
    wanted: ByteCount,
    inherited: ByteCount,
    mut controller: Controller,
    view: &View,
) -> End {
    let (mut asked, mut cooperation, mut patience) = (inherited, Cooperation::default(), Patience::new());
    let start = Instant::now();
    loop {
        let now = Instant::now();
        let outcome = step(guest, wanted, &mut asked, &mut controller, now.duration_since(start));
        if let Some(Change::Lost { why, .. }) = cooperation.note(&outcome, now.duration_since(start)) {
            return End::Short(why);
        }
        match outcome {
            Ok(look) => {
                view.balloon(&look);
                let is_stuck = patience.is_over(look.actual, now, UNCOOPERATIVE);
                if let Some(end) = end(&look, is_stuck) {
                    return end;
                }
            }
            // What is refused now will be refused again.
            Err(error) if error.fault() == Fault::Request => return End::Short(explain(&error)),
            // One failure may be a pause; when cooperation is lost, the last word says why.
            Err(_) => {}
        }
        if let Err(why) = guest.wait_until(now + PERIOD) {
            return End::Short(why);
        }
    }
}

/// Looks, and asks for what the controller says.
fn step(
    guest: &mut Guest,
    wanted: ByteCount,
    asked: &mut ByteCount,
    controller: &mut Controller,
    now: Duration,
) -> Result<Look, ControlError> {
    let Balloon { memory, actual, .. } = guest.control.balloon()?;
    let actual = actual.unwrap_or(*asked);
    let statistics = guest.control.statistics().ok();
    // What the host had to bring back for the machine's process is at most its major faults: memory and program.
    let faults = major_faults(guest.held.process()).unwrap_or_default();
    let refaulted = PageCount(faults).bytes();
    let target = memory.saturating_sub(wanted);
    let step = controller.step(&Observation { now, memory, actual, statistics, refaulted }, target);
    if let Some(ask) = step.ask {
        guest.control.set_balloon(ask)?;
        *asked = ask;
    }
    let seconds = now.as_secs_f64();
    Ok(Look { seconds, memory, actual, asked: *asked, target, statistics, state: step.state })
}

/// Whether it is over. An inactive guest may yet go on; one that is uncooperative has been asked for no more than it holds.
fn end(look: &Look, is_stuck: bool) -> Option<End> {
    let has = look.memory.saturating_sub(look.actual);
    match look.state {
        State::Settled => Some(End::There(format!(
            "the guest has {has} of {}; the balloon holds {}",
            look.memory, look.actual
        ))),
        State::AtFloor | State::Strained(_) | State::Uncooperative => {
            Some(End::Short(format!("{}; the guest has {has}", look.state)))
        }
        State::Deflating if is_stuck => Some(End::Short(format!(
            "the guest has not taken memory out of its balloon for {} s; it has {has}",
            UNCOOPERATIVE.as_secs()
        ))),
        State::Inflating | State::Deflating | State::Inactive => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(state: State) -> Look {
        let (memory, actual) = (ByteCount::mib(512), ByteCount::mib(320));
        Look { seconds: 1.0, memory, actual, asked: actual, target: actual, statistics: None, state }
    }

    #[test]
    fn a_guest_can_have_what_there_is_and_keeps_its_reserve() {
        let memory = ByteCount::mib(512);
        assert_eq!(check(memory, memory), Ok(()));
        assert_eq!(check(ByteCount::mib(32), memory), Ok(()));
        let (over, under) = (check(ByteCount::mib(513), memory), check(ByteCount::mib(31), memory));
        assert_eq!(over.unwrap_err(), "a balloon cannot give the guest 513M: without one it has 512M");
        assert_eq!(under.unwrap_err(), "31M is too little for a guest of 512M: leave it 32M at least");
    }

    #[test]
    fn an_inactive_guest_is_waited_for_and_an_uncooperative_one_is_not() {
        for state in [State::Inflating, State::Deflating, State::Inactive] {
            assert!(end(&look(state), false).is_none(), "{state}");
        }
        assert!(matches!(end(&look(State::Settled), true), Some(End::There(_))));
        for (state, is_stuck) in
            [(State::Uncooperative, false), (State::AtFloor, false), (State::Deflating, true)]
        {
            let Some(End::Short(text)) = end(&look(state), is_stuck) else { panic!("{state}") };
            assert!(text.contains("192M"), "{text}");
        }
    }
}
