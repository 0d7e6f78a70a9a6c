//! The manager's side of the protocol, cut into steps between which it can die.
//!
//! Enters: a state in which a manager is idle and work for it, or one in which it is at something. Leaves: the state
//! after its next single step: a change of words, a call of the kernel or a call of the store. Every change of words
//! is the shipped [`Machine`]'s own. An answer that its documentation rules out sets [`World::broken`].
use crate::step::{BLOCK, Work};
use crate::world::{
    At, Discard, Drain, Host, Keeper, MAX_PAGES, Manager, Mistake, Move, Outcome, Pager, Value, World,
};
use plimsoll_core::machine::{FaultEffect, Machine, Released, Source};
use plimsoll_core::map::{HeapWords, MapError, Words};
use plimsoll_core::replacement::Run;
use plimsoll_core::word::{ObjectRef, PageState, PageWord, PinCause};
use plimsoll_types::{PageIndex, SlotPage};
use std::sync::atomic::Ordering;

type Core = Machine<HeapWords>;
/// What a step leads to, or what was wrong with it.
type Step = Result<At, &'static str>;

/// An idle manager takes up work.
pub(crate) fn begin(pager: &Pager, world: &mut World, machine: u8, work: Work) {
    let kept = world.references.map(|count| count > 0);
    let host = world.host(machine);
    let step = match work {
        Work::Fault { page } => fault(host, page, |value| kept[value.index()]),
        Work::ReadDiscard { page } => {
            host.pages[page as usize].discard = Discard::ToZap;
            Ok(At::ReadDiscard { page })
        }
        Work::Capture { first, pages } => {
            let step = capture(pager, host, first, pages);
            if host.at != At::Idle || step != Ok(At::Idle) {
                world.captures_left = world.captures_left.map(|left| left - 1);
            }
            step
        }
        Work::CaptureBlock => {
            let step = capture_block(host);
            if step != Ok(At::Idle) {
                world.captures_left = world.captures_left.map(|left| left - 1);
            }
            step
        }
        Work::Unwatch => {
            host.keeper = Keeper::Kernel;
            world.unwatches_left = world.unwatches_left.map(|left| left - 1);
            Ok(At::Unwatched)
        }
        Work::Watch => Ok(match pager.mistake {
            Some(Mistake::LookBeforeRegister) => At::Looked { present: host.present() },
            Some(Mistake::LookWithoutRegister) => At::Registered,
            _ => {
                host.keeper = Keeper::Manager;
                At::Registered
            }
        }),
        Work::Answer => answer(host),
        Work::Store { page, slot } => store(pager, world, machine, page, slot),
        Work::ZapSlots => zap_slots(host),
        Work::Unpin => core(host).and_then(|core| must(core.unpin(), "unpin failed")).map(|()| At::Idle),
        Work::Close => core(host).map(|core| {
            core.close_limbo();
            At::Idle
        }),
    };
    settle(world, machine, step);
}

/// The manager's next step in what it is at.
pub(crate) fn proceed(pager: &Pager, world: &mut World, machine: u8) {
    let host = world.host(machine);
    let step = match host.at {
        At::Idle | At::Ready => Ok(host.at),
        At::Copy { page, value, reports } => copy(pager, world, machine, page, value, reports),
        At::Copied { page } => installed(pager, host, page),
        At::Release { object } => release(world, object),
        At::Send { first, pages, slot } => {
            ask(host, first, pages, slot);
            Ok(At::Idle)
        }
        At::Sent { first, pages } => begin_capture(host, first, pages).map(|_| At::Idle),
        At::Put { page, slot, value } => core(host).and_then(|core| {
            let stored = core.stored(PageIndex(page), SlotPage(slot), value.object());
            must(stored, "a page in limbo could not be stored").map(|()| At::Idle)
        }),
        At::Unwatched => core(host)
            .and_then(|core| must(core.unwatched(BLOCK), "an untouched block could not be left"))
            .map(|()| At::Idle),
        At::Registered => Ok(At::Looked { present: host.present() }),
        At::Looked { present } => watched(pager, host, present),
        At::MoveIn { slot, done } => Ok(move_in(pager, host, slot, done)),
        At::MovedIn { slot, done } => returned(pager, host, slot, done),
        At::Zapped { slot, pages } => core(host).map(|core| {
            core.zapped(SlotPage(slot), pages);
            At::Idle
        }),
        At::ReadDiscard { page } => discard(host, page).map(|released| match released {
            Some(object) => At::Release { object },
            None => At::Idle,
        }),
        At::Dead(_) => {
            // What was executed stays executed; the rest carries an old epoch and is dropped.
            if pager.mistake != Some(Mistake::SkipBarrier) {
                host.moves.clear();
            }
            Ok(At::Barred)
        }
        At::Barred
            if host.keeper == Keeper::Kernel && pager.mistake != Some(Mistake::TakeOverWithoutRegister) =>
        {
            host.keeper = Keeper::Manager;
            Ok(At::Barred)
        }
        At::Barred => match pager.drain {
            Drain::BeforeScan => Ok(At::Drained { pages: drain(pager, host) }),
            Drain::AfterScan => recover(pager, host, 0).map(|()| At::Scanned),
        },
        At::Drained { pages } => recover(pager, host, pages)
            .map(|()| recovered(if pager.mistake == Some(Mistake::DiscardBeforeScan) { 0 } else { pages })),
        At::Scanned => Ok(recovered(drain(pager, host))),
        At::Recovered { pages } => {
            // Counts are rebuilt after this, so what it releases is not counted down.
            let page = pages.trailing_zeros();
            discard(host, page).map(|_| recovered(pages & !(1 << page)))
        }
    };
    settle(world, machine, step);
}

/// The store counts the references that words hold, and the new managers serve.
pub(crate) fn rebuild(world: &mut World, pages: u32) {
    world.references = world.named(pages);
    for machine in (0..).take(world.hosts.len()) {
        world.host(machine).at = At::Idle;
    }
}

fn settle(world: &mut World, machine: u8, step: Step) {
    match step {
        Ok(at) => {
            let host = world.host(machine);
            host.at = at;
            (0..).take(MAX_PAGES).for_each(|page| host.settle(page));
        }
        Err(broken) => world.broken = Some(broken),
    }
}

fn core(host: &mut Host) -> Result<&mut Core, &'static str> {
    match &mut host.manager {
        Manager::Up(core) => Ok(core),
        Manager::Down(_) => Err("a dead manager took a step"),
    }
}

fn must<T>(result: Result<T, MapError>, broken: &'static str) -> Result<T, &'static str> {
    result.map_err(|_| broken)
}

fn fault(host: &mut Host, page: u32, is_kept: impl Fn(Value) -> bool) -> Step {
    let effect = must(core(host)?.fault(PageIndex(page)), "a fault was refused")?;
    let source = match effect {
        FaultEffect::Install(source) => source,
        FaultEffect::InstallIfMissing => return Ok(At::Copy { page, value: Value::Zero, reports: false }),
        FaultEffect::Return { at, .. } => {
            let core = core(host)?;
            let begun = core.begin_return(core.block(BLOCK), at);
            return must(begun, "a block in limbo could not go back")
                .map(|()| At::MoveIn { slot: at.0, done: 0 });
        }
        FaultEffect::Wait | FaultEffect::Nothing => return Ok(At::Idle),
        FaultEffect::Poison => return Err("a page was poisoned"),
    };
    let value = match source {
        Source::Zero => Some(Value::Zero),
        Source::Limbo(slot) => host.slots.get(slot.get()).copied().flatten(),
        Source::Stored(object) => Value::of_object(object).filter(|value| is_kept(*value)),
        Source::File(_) => None,
    };
    let value = value.ok_or("a page's bytes are not where its word says")?;
    Ok(At::Copy { page, value, reports: true })
}

fn copy(pager: &Pager, world: &mut World, machine: u8, page: u32, value: Value, reports: bool) -> Step {
    let host = world.host(machine);
    // EAGAIN: the event has to be read first, then the fault is asked about anew.
    let again = host.pages.iter().any(|page| page.discard == Discard::Queued);
    // EEXIST: the waiter is woken; the word is left to whoever put the bytes there.
    if again || host.pages[page as usize].ram.is_some() {
        return Ok(At::Idle);
    }
    host.pages[page as usize].ram = Some(value);
    if !reports {
        core(host)?.confirmed(PageIndex(page));
        return Ok(At::Idle);
    }
    let state = host.state(page);
    if pager.mistake == Some(Mistake::ReleaseBeforeWord)
        && let Some(PageState::Stored(_)) = state
    {
        release(world, value)?;
    }
    Ok(At::Copied { page })
}

fn installed(pager: &Pager, host: &mut Host, page: u32) -> Step {
    let released = must(core(host)?.installed(PageIndex(page)), "a page could not be installed")?;
    match released {
        Released::Object(_) if pager.mistake == Some(Mistake::ReleaseBeforeWord) => Ok(At::Idle),
        Released::Object(object) => Ok(At::Release { object: known(object)? }),
        Released::Nothing => Ok(At::Idle),
    }
}

fn known(object: ObjectRef) -> Result<Value, &'static str> {
    Value::of_object(object).ok_or("an object that was never stored")
}

fn release(world: &mut World, object: Value) -> Step {
    let count = &mut world.references[object.index()];
    *count = count.checked_sub(1).ok_or("an object was released more often than it was named")?;
    Ok(At::Idle)
}

fn begin_capture(host: &mut Host, first: u32, pages: u32) -> Result<Option<SlotPage>, &'static str> {
    let run = Run { first: PageIndex(first), pages };
    let start = must(core(host)?.begin_capture(run), "resident pages could not be captured")?;
    if let Some(start) = start {
        let mut slots = host.slots.iter().skip(start.get()).take(pages as usize);
        // Only the mistake of asking first has filled it already.
        if host.moves.is_empty() && slots.any(Option::is_some) {
            return Err("a slot page was handed out that still holds memory");
        }
    }
    Ok(start)
}

fn ask(host: &mut Host, first: u32, pages: u32, slot: u32) {
    let asked = (first..first + pages).zip(slot..);
    host.moves.extend(asked.map(|(page, at)| Move { page, at, outcome: None }));
}

fn capture(pager: &Pager, host: &mut Host, first: u32, pages: u32) -> Step {
    if pager.mistake == Some(Mistake::MoveBeforeIntent) {
        let mut rehearsal = host.clone();
        let Some(start) = begin_capture(&mut rehearsal, first, pages)? else { return Ok(At::Idle) };
        ask(host, first, pages, start.0);
        return Ok(At::Sent { first, pages });
    }
    Ok(match begin_capture(host, first, pages)? {
        Some(start) => At::Send { first, pages, slot: start.0 },
        None => At::Idle,
    })
}

fn capture_block(host: &mut Host) -> Step {
    let run = core(host)?.block(BLOCK);
    let Some(start) = begin_capture(host, run.first.0, run.pages)? else { return Ok(At::Idle) };
    core(host)?.keep_whole(start);
    Ok(At::Send { first: run.first.0, pages: run.pages, slot: start.0 })
}

fn watched(pager: &Pager, host: &mut Host, present: u8) -> Step {
    if pager.mistake == Some(Mistake::LookBeforeRegister) {
        host.keeper = Keeper::Manager;
    }
    let told = core(host)?.watched(BLOCK, |page| present & 1 << page.0 != 0);
    must(told, "a block could not be taken back from the kernel").map(|()| At::Idle)
}

/// The agent moves the next page of a block back; EAGAIN if a discard is queued.
fn move_in(pager: &Pager, host: &mut Host, slot: u32, done: u32) -> At {
    let again = host.pages.iter().any(|page| page.discard == Discard::Queued);
    let place = done as usize;
    if again || done == pager.pages || host.pages[place].ram.is_some() {
        return At::MovedIn { slot, done };
    }
    host.pages[place].ram = host.slots[slot as usize + place].take();
    At::MoveIn { slot, done: done + 1 }
}

fn returned(pager: &Pager, host: &mut Host, slot: u32, done: u32) -> Step {
    let core = core(host)?;
    for (page, at) in (0..pager.pages).map(PageIndex).zip((slot..).map(SlotPage)) {
        let told = if page.0 < done { core.returned(page, at) } else { core.stayed(page, at) };
        must(told, "where a page is after a block was to go back could not be marked")?;
    }
    if (1..pager.pages).contains(&done) {
        core.keep_apart(SlotPage(slot));
    }
    Ok(At::Idle)
}

fn answer(host: &mut Host) -> Step {
    let Move { page, at, outcome } = host.moves.remove(0);
    let (page, at) = (PageIndex(page), SlotPage(at));
    let core = core(host)?;
    let told = match outcome {
        Some(Outcome::Moved) => core.captured(page, at),
        Some(Outcome::Busy) => core.refused(page, at, None),
        Some(Outcome::Pinned) => core.refused(page, at, Some(PinCause::Kernel)),
        Some(Outcome::Missing) => core.vanished(page, at),
        None => return Err("an answer that was not given"),
    };
    must(told, "the agent's answer was refused").map(|()| At::Idle)
}

fn store(pager: &Pager, world: &mut World, machine: u8, page: u32, slot: u32) -> Step {
    let host = world.host(machine);
    let value = host.slots[slot as usize].ok_or("a slot page in limbo is empty")?;
    if value == Value::Zero {
        let found = core(host)?.found_zero(PageIndex(page), SlotPage(slot));
        return must(found, "a page in limbo could not be dropped").map(|()| At::Idle);
    }
    if pager.mistake == Some(Mistake::ZapBeforeWord) {
        host.slots[slot as usize] = None;
    }
    world.references[value.index()] += 1;
    Ok(At::Put { page, slot, value })
}

fn zap_slots(host: &mut Host) -> Step {
    let Some((start, pages)) = core(host)?.zap_runs(1).first().copied() else { return Ok(At::Idle) };
    for slot in start.0..start.0 + pages {
        host.slots[slot as usize] = None;
    }
    Ok(At::Zapped { slot: start.0, pages })
}

/// Tells the core of a discard; returns the object that no word of this page names any more.
fn discard(host: &mut Host, page: u32) -> Result<Option<Value>, &'static str> {
    let mut released = None;
    let told = core(host)?.discarded(page..page + 1, |object| released = Some(object));
    must(told, "a discard was refused")?;
    released.map(known).transpose()
}

fn drain(pager: &Pager, host: &mut Host) -> u8 {
    let mut drained = 0;
    for (bit, page) in host.pages.iter_mut().enumerate() {
        if page.discard == Discard::Queued {
            page.discard = Discard::ToZap;
            drained |= 1 << bit;
        }
    }
    if pager.mistake == Some(Mistake::SkipDrain) { 0 } else { drained }
}

const fn recovered(pages: u8) -> At {
    if pages == 0 { At::Ready } else { At::Recovered { pages } }
}

/// Rebuilds the machine from its words and what is present. `drained` are the discards read before.
fn recover(pager: &Pager, host: &mut Host, drained: u8) -> Result<(), &'static str> {
    let Manager::Down(words) = &host.manager else { return Err("a living manager was recovered") };
    let words = words.clone();
    if pager.mistake == Some(Mistake::DiscardBeforeScan) {
        for page in (0..pager.pages).filter(|page| drained & 1 << page != 0) {
            words.words()[page as usize].store(PageWord::new(PageState::Absent).0, Ordering::Relaxed);
        }
    }
    let core = Machine::recover(
        pager.layout(),
        words,
        pager.shape,
        0,
        |page| host.pages[page.get()].ram.is_some(),
        |slot| host.slots.get(slot.get()).copied().flatten().is_some(),
    );
    let core = must(core, "recovery found a damaged word")?;
    if core.anomalies().lost > 0 {
        return Err("recovery found a lost page");
    }
    host.manager = Manager::Up(core);
    Ok(())
}
