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
    request.items.iter().map(|item| one(kernel, request, item, flaw)).collect()
}

fn one(kernel: &Kernel, request: &Request, item: &Item, flaw: Flaw) -> Outcome {
    for done in 0..item.pages {
        point();
        let mut state = kernel.state();
        let stop = if request.epoch < state.epoch {
            Some(Stop::StaleEpoch)
        } else {
            let (page, at) = (item.page().0 + done, SlotPage(item.slot().0 + done));
            match request.op {
                Op::SetEpoch => None,
                Op::MoveOut => move_out(&mut state, page, at),
                Op::Populate => populate(&mut state, page),
                Op::Zap => {
                    state.check_unnamed(at, "zap");
                    state.slots[at.get()] = None;
                    None
                }
            }
        };
        let is_hidden = flaw == Flaw::RefusalsHidden && matches!(stop, Some(Stop::Busy | Stop::Again));
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
