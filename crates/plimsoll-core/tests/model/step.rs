//! What can happen next, and what then is: guests, kernel and agents.
//!
//! Enters: a state and an action. Leaves: the actions that are possible and the state after one. The managers' own
//! steps are in [`crate::driver`].
use crate::driver;
use crate::world::{
    Allowance, At, Blocks, DiedAt, Discard, Host, Keeper, Manager, Mistake, MoveRule, Outcome, Pager, Race,
    Threads, Value, Values, World,
};
use plimsoll_core::map::{HeapWords, Words};
use plimsoll_core::word::{PageState, PageWord};
use plimsoll_types::BlockIndex;
use stateright::{Model, Property};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Something that happens. `machine` numbers the machine it happens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// The guest writes a page that is in its RAM.
    Write { machine: u8, page: u32, value: Value },
    /// The guest reads a page that more than one value would be lawful for: from now on only this one is.
    Read { machine: u8, page: u32 },
    /// The guest starts to discard a page.
    Discard { machine: u8, page: u32 },
    /// The kernel carries the discard out.
    Zap { machine: u8, page: u32 },
    /// The kernel brings a page of zeros, because nothing is registered.
    Fill { machine: u8, page: u32 },
    /// The kernel stops moving a block back before all of it is there.
    StopMoveIn { machine: u8 },
    /// The kernel moves the next page of the agent's request.
    Move { machine: u8, outcome: Outcome },
    /// An idle manager takes up work.
    Begin { machine: u8, work: Work },
    /// A manager does the next step of what it is at.
    Continue { machine: u8 },
    /// The process with all managers dies.
    Crash,
    /// The store's counts are rebuilt from the words and the new managers start to serve.
    Rebuild,
}

/// What a manager can take up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Work {
    Fault {
        page: u32,
    },
    ReadDiscard {
        page: u32,
    },
    Capture {
        first: u32,
        pages: u32,
    },
    /// All pages, which are one huge page.
    CaptureBlock,
    Unwatch,
    Watch,
    /// The first page of the agent's answer.
    Answer,
    Store {
        page: u32,
        slot: u32,
    },
    ZapSlots,
    Unpin,
    Close,
}

/// All pages of a machine.
pub(crate) const BLOCK: BlockIndex = BlockIndex(0);

fn has_left(allowance: Allowance) -> bool {
    allowance != Some(0)
}

impl Model for Pager {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.world()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // A broken state is reported by a property; nothing after it means anything.
        if world.broken.is_some() {
            return;
        }
        for (machine, host) in (0..).zip(&world.hosts) {
            self.guest_actions(world, machine, host, actions);
            self.agent_actions(machine, host, actions);
            match host.at {
                At::Idle if self.is_busy_elsewhere(world) => {}
                At::Idle => self.work(world, machine, host, actions),
                At::Ready => {}
                // Registering waits for discards that nobody hears of.
                At::Barred if host.keeper == Keeper::Kernel && host.has_silent_discard() => {}
                At::Looked { .. } if host.has_silent_discard() => {}
                At::MoveIn { done, .. } => {
                    actions.push(Action::Continue { machine });
                    if done < self.pages && !self.refusals.is_empty() {
                        actions.push(Action::StopMoveIn { machine });
                    }
                }
                At::Dead(_) | At::Barred | At::Drained { .. } | At::Scanned | At::Recovered { .. } => {
                    // New managers take over one machine after the other.
                    if world.hosts[..usize::from(machine)].iter().all(|other| other.at == At::Ready) {
                        actions.push(Action::Continue { machine });
                    }
                }
                _ => actions.push(Action::Continue { machine }),
            }
        }
        if world.crashes_left > 0 && !world.hosts.iter().any(|host| matches!(host.at, At::Dead(_))) {
            actions.push(Action::Crash);
        }
        if world.hosts.iter().all(|host| host.at == At::Ready) {
            actions.push(Action::Rebuild);
        }
    }

    fn next_state(&self, before: &World, action: Action) -> Option<World> {
        let mut world = before.clone();
        match action {
            Action::Write { machine, page, value } => {
                world.writes_left = world.writes_left.map(|left| left - 1);
                write(world.host(machine), page, value);
            }
            Action::Read { machine, page } => {
                let page = &mut world.host(machine).pages[page as usize];
                page.lawful = Values::only(page.ram?);
            }
            Action::Discard { machine, page } => {
                world.discards_left = world.discards_left.map(|left| left - 1);
                let host = world.host(machine);
                let page = &mut host.pages[page as usize];
                match host.keeper {
                    Keeper::Kernel => page.discard = Discard::Silent,
                    Keeper::Manager => {
                        page.discard = Discard::Queued;
                        page.undone = page.undone.and(page.lawful);
                    }
                }
                page.lawful = page.lawful.and(Values::only(Value::Zero));
            }
            Action::Zap { machine, page } => zap(world.host(machine), page),
            Action::Fill { machine, page } => {
                world.host(machine).pages[page as usize].ram = Some(Value::Zero);
            }
            Action::StopMoveIn { machine } => {
                let host = world.host(machine);
                if let At::MoveIn { slot, done } = host.at {
                    host.at = At::MovedIn { slot, done };
                }
            }
            Action::Move { machine, outcome } => {
                if move_next(world.host(machine), outcome).is_none() {
                    world.broken = Some("a page was moved onto another one");
                }
            }
            Action::Begin { machine, work } => driver::begin(self, &mut world, machine, work),
            Action::Continue { machine } => driver::proceed(self, &mut world, machine),
            Action::Crash => crash(&mut world, self.pages),
            Action::Rebuild => driver::rebuild(&mut world, self.pages),
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        crate::properties::all()
    }
}

impl Pager {
    fn guest_actions(&self, world: &World, machine: u8, host: &Host, actions: &mut Vec<Action>) {
        for (number, page) in (0..self.pages).zip(&host.pages) {
            let touches = page.discard == Discard::Idle || self.race == Race::Allowed;
            if page.ram.is_none() && touches && host.keeper == Keeper::Kernel {
                actions.push(Action::Fill { machine, page: number });
            }
            if let Some(value) = page.ram {
                let own = [Value::Own(machine)];
                for written in own.iter().chain(&self.also_written) {
                    let changes = *written != value || page.lawful != Values::only(value);
                    if touches && changes && has_left(world.writes_left) {
                        actions.push(Action::Write { machine, page: number, value: *written });
                    }
                }
                if page.discard == Discard::Idle && !page.lawful.is_one() {
                    actions.push(Action::Read { machine, page: number });
                }
            }
            match page.discard {
                Discard::Idle if has_left(world.discards_left) && !host.will_be_discarded(number) => {
                    // Discarding what nobody has touched since it was last empty changes nothing.
                    let empty = matches!(
                        host.state(number),
                        Some(PageState::Zero | PageState::Absent | PageState::Unwatched)
                    );
                    if page.ram.is_some() || !empty {
                        actions.push(Action::Discard { machine, page: number });
                    }
                }
                Discard::ToZap | Discard::Silent => actions.push(Action::Zap { machine, page: number }),
                Discard::Idle | Discard::Queued => {}
            }
        }
    }

    fn agent_actions(&self, machine: u8, host: &Host, actions: &mut Vec<Action>) {
        let Some(next) = host.moves.iter().find(|asked| asked.outcome.is_none()) else { return };
        if host.pages[next.page as usize].ram.is_none() {
            actions.push(Action::Move { machine, outcome: Outcome::Missing });
        } else {
            let outcomes = [Outcome::Moved].into_iter().chain(self.refusals.iter().copied());
            actions.extend(outcomes.map(|outcome| Action::Move { machine, outcome }));
        }
    }

    fn is_busy_elsewhere(&self, world: &World) -> bool {
        self.threads == Threads::OneForAll && world.hosts.iter().any(|host| host.at != At::Idle)
    }

    fn work(&self, world: &World, machine: u8, host: &Host, actions: &mut Vec<Action>) {
        let Some(core) = host.machine() else { return };
        let mut begin = |work| actions.push(Action::Begin { machine, work });
        let state = |page: u32| host.state(page);
        for (number, page) in (0..self.pages).zip(&host.pages) {
            let touched = page.discard == Discard::Idle || self.race == Race::Allowed;
            let served = self.move_rule == MoveRule::Core || !host.is_moving(number);
            let waits = matches!(state(number), Some(PageState::Capturing(_)));
            if page.ram.is_none() && touched && served && !waits {
                begin(Work::Fault { page: number });
            }
            if page.discard == Discard::Queued {
                begin(Work::ReadDiscard { page: number });
            }
            let may_capture = host.moves.is_empty() && has_left(world.captures_left);
            for pages in (1..=self.run).filter(|pages| number + pages <= self.pages && may_capture) {
                if (number..number + pages).all(|page| state(page) == Some(PageState::Resident)) {
                    begin(Work::Capture { first: number, pages });
                }
            }
        }
        let all = |kind: PageState| (0..self.pages).all(|page| state(page) == Some(kind));
        if self.blocks == Blocks::Whole
            && host.moves.is_empty()
            && has_left(world.captures_left)
            && all(PageState::Resident)
        {
            begin(Work::CaptureBlock);
        }
        if host.moves.is_empty() && has_left(world.unwatches_left) && core.is_untouched(BLOCK) {
            begin(Work::Unwatch);
        }
        let looks_first = self.mistake == Some(Mistake::LookBeforeRegister);
        if core.is_unwatched(BLOCK) && (looks_first || !host.has_silent_discard()) {
            begin(Work::Watch);
        }
        if host.moves.first().is_some_and(|asked| asked.outcome.is_some()) {
            begin(Work::Answer);
        }
        for (slot, page) in core.oldest_limbo(usize::MAX) {
            begin(Work::Store { page: page.0, slot: slot.0 });
        }
        if !core.zap_runs(1).is_empty() {
            begin(Work::ZapSlots);
        }
        if (0..self.pages).any(|page| matches!(state(page), Some(PageState::Pinned(_)))) {
            begin(Work::Unpin);
        }
        // A slot of one page is full as soon as it is opened: there is nothing to close.
        if self.shape.slot_pages > 1 {
            begin(Work::Close);
        }
    }
}

impl World {
    pub(crate) fn host(&mut self, machine: u8) -> &mut Host {
        Arc::make_mut(&mut self.hosts[usize::from(machine)])
    }
}

fn write(host: &mut Host, page: u32, value: Value) {
    let page = &mut host.pages[page as usize];
    page.ram = Some(value);
    page.lawful = Values::only(value);
    match page.discard {
        Discard::Idle => page.undone = Values::NONE,
        Discard::Queued | Discard::ToZap | Discard::Silent => {
            // The guest races with itself: the discard may still take this away.
            page.lawful = page.lawful.and(Values::only(Value::Zero));
            page.loose = true;
        }
    }
}

/// The memory goes away and the guest that asked for it goes on.
fn zap(host: &mut Host, number: u32) {
    let page = &mut host.pages[number as usize];
    page.ram = None;
    page.discard = Discard::Idle;
    if !page.loose {
        page.lawful = Values::only(Value::Zero);
    }
    host.settle(number);
}

/// `None` when the slot page is taken: the kernel would refuse, and the manager should never have asked.
fn move_next(host: &mut Host, outcome: Outcome) -> Option<()> {
    let next = host.moves.iter_mut().find(|asked| asked.outcome.is_none())?;
    next.outcome = Some(outcome);
    if outcome == Outcome::Moved {
        let slot = &mut host.slots[next.at as usize];
        if slot.is_some() {
            return None;
        }
        *slot = host.pages[next.page as usize].ram.take();
    }
    Some(())
}

/// Every manager dies. What was read and not applied is gone, and so is the knowledge that a zap is to come.
fn crash(world: &mut World, pages: u32) {
    world.crashes_left -= 1;
    for machine in 0..world.hosts.len() {
        let host = Arc::make_mut(&mut world.hosts[machine]);
        for number in 0..pages {
            let page = &mut host.pages[number as usize];
            if page.discard != Discard::Queued && page.undone != Values::NONE {
                // The one lawful weakening: the discard may turn out not to have been.
                page.lawful = page.lawful.and(page.undone);
                page.loose = true;
            }
        }
        let words = HeapWords::new(pages as usize);
        for (page, word) in (0..pages).zip(words.words()) {
            match host.state(page) {
                Some(state) => word.store(PageWord::new(state).0, Ordering::Relaxed),
                None => world.broken = Some("a word that no transition writes"),
            }
        }
        let died = match host.at {
            At::Idle if host.moves.is_empty() => DiedAt::Idle,
            At::Idle => DiedAt::Moving,
            At::Copy { .. } => DiedAt::Copy,
            At::Copied { .. } => DiedAt::Copied,
            At::Release { .. } => DiedAt::Release,
            At::Send { .. } | At::Sent { .. } => DiedAt::Send,
            At::Put { .. } => DiedAt::Put,
            At::Zapped { .. } => DiedAt::Zapped,
            At::ReadDiscard { .. } => DiedAt::ReadDiscard,
            At::Unwatched => DiedAt::Unwatched,
            At::Registered | At::Looked { .. } => DiedAt::Watching,
            At::MoveIn { .. } | At::MovedIn { .. } => DiedAt::MoveIn,
            At::Dead(_)
            | At::Barred
            | At::Drained { .. }
            | At::Scanned
            | At::Recovered { .. }
            | At::Ready => DiedAt::Recovering,
        };
        host.manager = Manager::Down(words);
        host.at = At::Dead(died);
        (0..pages).for_each(|page| host.settle(page));
    }
}
