//! The VMM's agent: a thread that does what managers ask, in order, one page at a time.
//!
//! It answers the dead, too: a request that was queued when its manager was killed is still done, whenever the agent
//! comes to it. Only the answer to a newer epoch proves that nothing of the kind is left.
use super::kernel::{Kernel, Op, Pin, Ram, Request, State, point};
use super::life::Flaw;
use plimsoll_linux::uffd::wire::{Item, Outcome, Stop};
use plimsoll_types::SlotPage;

/// Serves requests until the run is over.
pub(crate) fn serve(kernel: &Kernel, flaw: Flaw) {
    loop {
        let next = kernel.agent_waits(|state| match state.requests.pop_front() {
            Some(request) => Some(Some(request)),
            None => state.is_over.then_some(None),
        });
        let Some(request) = next else { return };
        let outcomes = execute(kernel, &request, flaw);
        kernel.state().replies.push((request.ticket, outcomes));
        kernel.ring();
    }
}

fn execute(kernel: &Kernel, request: &Request, flaw: Flaw) -> Vec<Outcome> {
    point();
    if request.op == Op::SetEpoch {
        let mut state = kernel.state();
        state.epoch = state.epoch.max(request.epoch);
    }
    let one = |item| match request.op {
        Op::Watch => watch(kernel, request, item, flaw),
        Op::Unwatch => unwatch(kernel, request, item),
        _ => page_by_page(kernel, request, item, flaw),
    };
    request.items.iter().map(one).collect()
}

fn pages_of(item: &Item) -> std::ops::Range<usize> {
    item.page().get()..(item.page().0 + item.pages) as usize
}

/// Registering takes the memory map for writing, so that discards nobody hears of have ended before.
fn watch(kernel: &Kernel, request: &Request, item: &Item, flaw: Flaw) -> Outcome {
    kernel.agent_waits(|state| {
        if request.epoch < state.epoch {
            return Some(Outcome { done: 0, stop: Some(Stop::StaleEpoch) });
        }
        if state.has_silent_discard() && flaw != Flaw::WatchHasty {
            return None;
        }
        if flaw != Flaw::WatchUndone {
            state.watched[pages_of(item)].fill(true);
        }
        state.note("watched", item.page().0, item.pages);
        Some(Outcome { done: item.pages, stop: None })
    })
}

/// Whoever waits there finds the kernel in the manager's place.
fn unwatch(kernel: &Kernel, request: &Request, item: &Item) -> Outcome {
    let mut state = kernel.state();
    if request.epoch < state.epoch {
        return Outcome { done: 0, stop: Some(Stop::StaleEpoch) };
    }
    state.watched[pages_of(item)].fill(false);
    state.wake(item.page().0, item.pages);
    state.note("unwatched", item.page().0, item.pages);
    Outcome { done: item.pages, stop: None }
}

fn page_by_page(kernel: &Kernel, request: &Request, item: &Item, flaw: Flaw) -> Outcome {
    for done in 0..item.pages {
        point();
        let mut state = kernel.state();
        let stop = if request.epoch < state.epoch {
            Some(Stop::StaleEpoch)
        } else {
            let (page, at) = (item.page().0 + done, SlotPage(item.slot().0 + done));
            match request.op {
                Op::SetEpoch | Op::Watch | Op::Unwatch => None,
                Op::MoveIn => move_in(&mut state, page, at),
                Op::MoveOut => move_out(&mut state, page, at),
                Op::Populate => populate(&mut state, page),
                Op::Zap => {
                    state.check_unnamed(at, "zap");
                    state.slots[at.get()] = None;
                    None
                }
            }
        };
        let hides = match flaw {
            Flaw::RefusalsHidden => Some(Op::MoveOut),
            Flaw::ReturnsHidden => Some(Op::MoveIn),
            _ => None,
        };
        let is_hidden = hides == Some(request.op) && matches!(stop, Some(Stop::Busy | Stop::Again));
        if stop.is_some() && !is_hidden {
            return Outcome { done, stop };
        }
    }
    Outcome { done: item.pages, stop: None }
}

fn move_out(state: &mut State, page: u32, at: SlotPage) -> Option<Stop> {
    if state.mischief(12) {
        return Some(Stop::Again);
    }
    let place = page as usize;
    match state.pins[place] {
        Pin::Device => return Some(Stop::Pinned),
        Pin::Kernel | Pin::Shared => return Some(Stop::Busy),
        Pin::Free if state.mischief(12) => return Some(Stop::Busy),
        Pin::Free => {}
    }
    let machine = state.machine;
    assert!(state.slots[at.get()].is_none(), "model: slot page {} of machine {machine} is occupied", at.0);
    match std::mem::replace(&mut state.ram[place], Ram::Absent) {
        Ram::Present(bytes) => {
            state.slots[at.get()] = Some(bytes);
            state.note("moved out", page, 1);
            None
        }
        other => {
            state.ram[place] = other;
            Some(Stop::Missing)
        }
    }
}

/// Back into RAM, which refuses while a discard changes the map. Wakes whoever waits.
fn move_in(state: &mut State, page: u32, at: SlotPage) -> Option<Stop> {
    if state.changing > 0 || state.mischief(24) {
        return Some(Stop::Again);
    }
    if state.mischief(24) {
        return Some(Stop::Busy);
    }
    let place = page as usize;
    assert!(state.watched[place], "model: page {page} is moved in where nothing is registered");
    if !matches!(state.ram[place], Ram::Absent) {
        return Some(Stop::Exists);
    }
    let Some(bytes) = state.slots[at.get()].take() else { return Some(Stop::Missing) };
    state.ram[place] = Ram::Present(bytes);
    state.wake(page, 1);
    state.note("moved in", page, 1);
    None
}

/// Pages that are there, while no discard is under way: so it never waits for the manager that waits for it.
fn populate(state: &mut State, page: u32) -> Option<Stop> {
    if !state.discards.is_empty() {
        return Some(Stop::Again);
    }
    let place = page as usize;
    match &state.ram[place] {
        Ram::Present(_) => {
            if state.pins[place] == Pin::Shared {
                state.pins[place] = Pin::Free;
            }
            None
        }
        _ => Some(Stop::Missing),
    }
}
