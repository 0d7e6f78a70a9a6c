//! Driving a pager: the loop of its thread.
//!
//! Enters: a pager and what the manager says. Leaves: turns, one after the other, and how it ended. What must never
//! happen: a thread that ends while its machine's pages are elsewhere, other than to make way for the next manager.
use super::manager::{Controls, LinuxPager, Origin};
use super::pager::{PagerError, Turn};
use super::space::SpaceError;
use super::waiting::Gaps;
use crate::explain;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long a pager with nothing to do sleeps at most while something may yet follow from time alone.
const IDLE_PATIENCE: Duration = Duration::from_millis(50);
/// How long it sleeps at most when nothing does: whoever has an order kicks it. A thousand idle machines would otherwise wake their
/// pagers 20,000 times a second, a quarter of a processor.
const REST_PATIENCE: Duration = Duration::from_secs(60);
/// How long it keeps what it works with when there is nothing to do: longer than between two faults of a guest that does anything.
const TOOLS_PATIENCE: Duration = Duration::from_secs(1);
/// How long a pager sleeps whose faults wait for memory.
const STALL_PATIENCE: Duration = Duration::from_millis(1);
/// How often a pager publishes its statistics.
const PUBLISH_PERIOD: Duration = Duration::from_millis(100);

/// How a pager thread ended.
pub(super) enum End {
    /// The VMM ended; everything of the machine has been freed.
    Gone,
    /// The manager is stopping, or a test killed the pager: the machine waits for the next manager.
    Left,
    /// All of the machine is its VMM's again.
    GivenBack,
}

/// Runs a pager until its machine ends or its manager does.
pub(super) fn drive(mut pager: Box<LinuxPager>, controls: &Controls, origin: Origin) -> End {
    let result = if origin == Origin::TakenOver { pager.resume() } else { Ok(()) };
    let result = result.and_then(|()| turns(&mut pager, controls));
    *controls.stats.lock() = pager.stats().clone();
    match result {
        Ok(Turned::LetGo) => {
            *controls.stats.lock() = pager.bury();
            controls.is_given_back.store(true, Ordering::Release);
            pager.host().bustle().count_ending();
            see_off(&mut pager, controls);
            return End::GivenBack;
        }
        Ok(Turned::Stopped) | Err(PagerError::Killed(_)) => return End::Left,
        Err(PagerError::Space(SpaceError::Gone)) => {}
        Err(error) => {
            controls.is_lost.store(true, Ordering::Release);
            pager.report_lost(explain(&error));
            // Fail closed: the guest waits, and what was handed over stays open, until its VMM is ended.
            if !wait_for_end(&pager, controls) {
                return End::Left;
            }
        }
    }
    *controls.stats.lock() = pager.bury();
    let host = Arc::clone(pager.host());
    // So that all of it has been freed.
    drop(pager);
    controls.is_buried.store(true, Ordering::Release);
    host.bustle().count_ending();
    End::Gone
}

/// Why a pager takes no more turns.
enum Turned {
    /// The manager is stopping.
    Stopped,
    /// Its machine was let go.
    LetGo,
}

fn turns(pager: &mut LinuxPager, controls: &Controls) -> Result<Turned, PagerError> {
    let mut gaps = Gaps::new();
    let result = turns_until_the_end(pager, controls, &mut gaps);
    gaps.end(pager.host().watchfulness());
    result
}

fn turns_until_the_end(
    pager: &mut LinuxPager,
    controls: &Controls,
    gaps: &mut Gaps,
) -> Result<Turned, PagerError> {
    let mut published = Instant::now();
    let host = Arc::clone(pager.host());
    let mut is_news = false;
    while !controls.orders.stop.load(Ordering::Relaxed) {
        if let Some(place) = controls.seat.take() {
            pager.store_at(place.memory);
        }
        let turn = pager.turn()?;
        if pager.is_news() {
            host.bustle().count_served();
            is_news = true;
        }
        let orders = &controls.orders;
        let is_to_go = orders.let_go.load(Ordering::Relaxed) && orders.is_home.load(Ordering::Relaxed);
        if is_to_go && pager.let_go()? {
            return Ok(Turned::LetGo);
        }
        if published.elapsed() >= PUBLISH_PERIOD {
            *controls.stats.lock() = pager.stats().clone();
            published = Instant::now();
        }
        // Whichever of the machine's shards has a stored page first.
        if controls.sabotage.swap(false, Ordering::Relaxed) && pager.sabotage().is_none() {
            controls.sabotage.store(true, Ordering::Relaxed);
        }
        let ended = match turn {
            Turn::Busy => continue,
            Turn::Stalled => sleep(pager, controls, STALL_PATIENCE)? == Woken::Ended,
            Turn::Idle if pager.is_at_rest() => {
                // What is seen of it while it rests is how it is.
                *controls.stats.lock() = pager.stats().clone();
                published = Instant::now();
                if std::mem::take(&mut is_news) {
                    // Whoever has looked since it was counted has seen how it was before.
                    host.bustle().count_served();
                }
                let patience = if pager.has_tools() { TOOLS_PATIENCE } else { REST_PATIENCE };
                let has_ended = wait(pager, controls, gaps, patience)?;
                if pager.has_tools() && published.elapsed() >= TOOLS_PATIENCE {
                    pager.put_tools_away();
                }
                has_ended
            }
            Turn::Idle => wait(pager, controls, gaps, IDLE_PATIENCE)?,
        };
        if ended {
            return Err(SpaceError::Gone.into());
        }
    }
    Ok(Turned::Stopped)
}

/// Waits until there is something to do, awake for a moment where that pays. True when the VMM has ended.
fn wait(
    pager: &mut LinuxPager,
    controls: &Controls,
    gaps: &mut Gaps,
    patience_asleep: Duration,
) -> Result<bool, PagerError> {
    let start = Instant::now();
    let host = Arc::clone(pager.host());
    let patience = gaps.patience(host.watchfulness());
    while start.elapsed() < patience {
        if pager.has_events()? {
            gaps.saw(start.elapsed(), host.watchfulness());
            return Ok(false);
        }
        // Whoever has something to do goes first.
        std::thread::yield_now();
    }
    let woken = sleep(pager, controls, patience_asleep)?;
    if woken != Woken::Otherwise {
        gaps.saw(start.elapsed(), host.watchfulness());
    }
    Ok(woken == Woken::Ended)
}

/// Why a pager woke up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    /// Events wait.
    Events,
    /// The VMM has ended.
    Ended,
    /// The governor, or time.
    Otherwise,
}

/// Sleeps until there is something to do.
fn sleep(pager: &LinuxPager, controls: &Controls, patience: Duration) -> Result<Woken, PagerError> {
    let custody = pager.space().custody();
    let (events, ended, kick) = (custody.events(), custody.ended(), controls.kick.as_fd());
    let mut polled = [&events, &ended, &kick].map(|descriptor| PollFd::new(descriptor, PollFlags::IN));
    let io = |source| PagerError::from(SpaceError::Io { what: "waiting for events", source });
    let limit = Timespec::try_from(patience).map_err(|error| io(std::io::Error::other(error)))?;
    controls.orders.is_waiting.store(true, Ordering::Relaxed);
    let waited = poll(&mut polled, Some(&limit));
    controls.orders.is_waiting.store(false, Ordering::Relaxed);
    match waited {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(io(errno.into())),
    }
    let is_ready = polled.map(|polled| !polled.revents().is_empty());
    if is_ready[2] {
        let _ = controls.kick.drain();
    }
    Ok(match is_ready {
        [_, true, _] => Woken::Ended,
        [true, ..] => Woken::Events,
        _ => Woken::Otherwise,
    })
}

/// Until the VMM has been told that it is alone: a discard that began before waits for somebody to read its event.
fn see_off(pager: &mut LinuxPager, controls: &Controls) {
    while !controls.orders.stop.load(Ordering::Relaxed) && pager.see_off().is_ok() {
        if !matches!(sleep(pager, controls, IDLE_PATIENCE), Ok(Woken::Events | Woken::Otherwise)) {
            return;
        }
    }
}

/// Waits until the VMM has ended (true) or the manager stops (false).
fn wait_for_end(pager: &LinuxPager, controls: &Controls) -> bool {
    let custody = pager.space().custody();
    while !controls.orders.stop.load(Ordering::Relaxed) {
        let (ended, kick) = (custody.ended(), controls.kick.as_fd());
        let mut polled = [&ended, &kick].map(|descriptor| PollFd::new(descriptor, PollFlags::IN));
        let _ = poll(&mut polled, None);
        let _ = controls.kick.drain();
        if !polled[0].revents().is_empty() {
            return true;
        }
    }
    false
}
