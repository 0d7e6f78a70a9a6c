//! One state of the model: guests, kernel, agents, managers and the store, and what a touch of a page would show.
//!
//! Enters: the shape of a model. Leaves: its initial state, and views of a state for the properties. Nothing here
//! changes a state.
//!
//! Two states are the same when nothing that a later step depends on differs. So a machine counts by its words, its
//! census and its airlock; the credits of replacement, the sampler and the anomaly counters are left out, because no
//! method that changes a word or a slot reads them (the model chooses its captures freely instead).
use plimsoll_core::airlock::Shape;
use plimsoll_core::layout::GuestLayout;
use plimsoll_core::machine::Machine;
use plimsoll_core::map::{HeapWords, Words};
use plimsoll_core::word::{ObjectRef, PageState, PageWord};
use plimsoll_types::{PageIndex, SlotPage};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Most pages of a machine in any configuration.
pub(crate) const MAX_PAGES: usize = 3;
/// Most slot pages of a machine in any configuration.
pub(crate) const MAX_SLOT_PAGES: usize = 4;
/// Different page contents: zeros, one that both guests write, and one for each guest alone.
pub(crate) const VALUES: usize = 4;

/// What a page contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Value {
    Zero,
    /// The same bytes in every guest, so that the store shares them.
    Common,
    /// Bytes that only this machine's guest ever writes.
    Own(u8),
}

impl Value {
    pub(crate) const fn index(self) -> usize {
        match self {
            Self::Zero => 0,
            Self::Common => 1,
            Self::Own(machine) => 2 + machine as usize,
        }
    }

    /// The store is content-addressed: equal bytes, same object.
    pub(crate) fn object(self) -> ObjectRef {
        ObjectRef::new(self.index() as u64).expect("a small number fits in a word")
    }

    pub(crate) fn of_object(object: ObjectRef) -> Option<Self> {
        let machine = |bits: u64| u8::try_from(bits - 2).ok().map(Self::Own);
        match object.bits() {
            0 => Some(Self::Zero),
            1 => Some(Self::Common),
            bits => machine(bits),
        }
    }
}

/// A set of values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Values(u8);

impl Values {
    pub(crate) const NONE: Self = Self(0);

    pub(crate) const fn only(value: Value) -> Self {
        Self(1 << value.index())
    }

    pub(crate) const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    pub(crate) const fn has(self, value: Value) -> bool {
        self.0 & Self::only(value).0 != 0
    }

    pub(crate) const fn is_one(self) -> bool {
        self.0.count_ones() == 1
    }
}

/// How far the guest's own discard of a page has come in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Discard {
    Idle,
    /// The event is queued; the caller waits for it to be read and COPY into the machine returns EAGAIN.
    Queued,
    /// The event was read; the memory goes away at some later moment, then the caller goes on.
    ToZap,
    /// It began where nothing is registered: there is no event, and whoever registers waits for its end.
    Silent,
}

/// A guest page as kernel and guest know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Page {
    /// What guest RAM holds there.
    pub(crate) ram: Option<Value>,
    /// What the guest may find there.
    pub(crate) lawful: Values,
    /// What a crash may still bring back: what was there before the discard that is not yet wholly done.
    pub(crate) undone: Values,
    /// The end of the discard says nothing of what is there: the guest wrote meanwhile, or a crash lost the event.
    pub(crate) loose: bool,
    pub(crate) discard: Discard,
}

/// What the agent found when it moved a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    Moved,
    /// Refused without a lasting cause.
    Busy,
    /// Refused because something holds the page.
    Pinned,
    Missing,
}

/// One page of a request to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Move {
    pub(crate) page: u32,
    pub(crate) at: u32,
    /// `None` until the kernel has done it.
    pub(crate) outcome: Option<Outcome>,
}

/// Where a manager is. Each step does one thing: change words, call the kernel or call the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum At {
    Idle,
    /// The bytes for a fault are in hand; COPY comes next. `reports` when [`Machine::installed`] follows it.
    Copy {
        page: u32,
        value: Value,
        reports: bool,
    },
    /// COPY was done; the word does not say so yet.
    Copied {
        page: u32,
    },
    /// No word names the object any more; its reference is still counted.
    Release {
        object: Value,
    },
    /// The words say *capturing*; the agent has not been asked.
    Send {
        first: u32,
        pages: u32,
        slot: u32,
    },
    /// The agent has been asked; the words do not say so. Only by [`Mistake::MoveBeforeIntent`].
    Sent {
        first: u32,
        pages: u32,
    },
    /// The bytes are in the store; the word still names the slot page.
    Put {
        page: u32,
        slot: u32,
        value: Value,
    },
    /// The block is no longer registered; its words do not say so.
    Unwatched,
    /// The block is registered again; nobody has looked.
    Registered,
    /// These pages, bit by bit, were found in guest RAM; the words do not say so.
    Looked {
        present: u8,
    },
    /// The agent moves the block back from the slot pages from `slot`; `done` pages have been.
    MoveIn {
        slot: u32,
        done: u32,
    },
    /// It has stopped; the words do not say so.
    MovedIn {
        slot: u32,
        done: u32,
    },
    /// The slot pages' memory was given back; the airlock does not know.
    Zapped {
        slot: u32,
        pages: u32,
    },
    /// A discard event was read and not yet applied.
    ReadDiscard {
        page: u32,
    },
    /// The manager is dead; it died there.
    Dead(DiedAt),
    /// The agent has nothing of the old manager left to do.
    Barred,
    /// The queued discards were read: a set of pages, bit by bit.
    Drained {
        pages: u8,
    },
    /// The machine is rebuilt; the queued discards are still to be read.
    Scanned,
    /// The machine is rebuilt; these discards remain to be applied.
    Recovered {
        pages: u8,
    },
    /// Waits for the other machines and the store's counts.
    Ready,
}

/// Where a manager can die. Named apart from [`At`] so that every one can be asked for by a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DiedAt {
    Idle,
    Copy,
    Copied,
    Release,
    Send,
    Moving,
    Put,
    Zapped,
    ReadDiscard,
    Unwatched,
    Watching,
    MoveIn,
    Recovering,
}

/// A manager's machine, or the words alone when it is dead: they outlive it.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all states hold a machine, and a box costs each an allocation"
)]
pub(crate) enum Manager {
    Up(Machine<HeapWords>),
    Down(HeapWords),
}

/// One machine with everything that is its own.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) manager: Manager,
    pub(crate) pages: [Page; MAX_PAGES],
    pub(crate) slots: [Option<Value>; MAX_SLOT_PAGES],
    /// What the agent was asked to move and the manager has not yet been told about.
    pub(crate) moves: Vec<Move>,
    pub(crate) at: At,
    /// Who brings absent pages.
    pub(crate) keeper: Keeper,
}

/// Who brings the absent pages of a machine: all of it is one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Keeper {
    /// Its manager: guest RAM is registered.
    Manager,
    /// The kernel brings zeros.
    Kernel,
}

impl Host {
    pub(crate) fn machine(&self) -> Option<&Machine<HeapWords>> {
        match &self.manager {
            Manager::Up(machine) => Some(machine),
            Manager::Down(_) => None,
        }
    }

    /// What the word says, `None` if it is not a word.
    pub(crate) fn state(&self, page: u32) -> Option<PageState> {
        match &self.manager {
            Manager::Up(machine) => machine.state(PageIndex(page)).ok(),
            Manager::Down(words) => {
                PageWord(words.words().get(page as usize)?.load(Ordering::Relaxed)).state()
            }
        }
    }

    pub(crate) fn is_moving(&self, page: u32) -> bool {
        self.moves.iter().any(|asked| asked.page == page)
    }

    /// True when a discard of the page is known to the kernel or was read, and no word says so yet, but will.
    pub(crate) fn will_be_discarded(&self, page: u32) -> bool {
        let read = match self.at {
            At::ReadDiscard { page: read } => read == page,
            At::Drained { pages } | At::Recovered { pages } => pages & 1 << page != 0,
            _ => false,
        };
        read || self.pages[page as usize].discard == Discard::Queued
    }

    /// True while a discard is under way that no manager hears of.
    pub(crate) fn has_silent_discard(&self) -> bool {
        self.pages.iter().any(|page| page.discard == Discard::Silent)
    }

    /// The pages that are in guest RAM, bit by bit.
    pub(crate) fn present(&self) -> u8 {
        let pages = self.pages.iter().enumerate();
        pages.map(|(bit, page)| u8::from(page.ram.is_some()) << bit).sum()
    }

    /// Forgets the discard of a page once kernel, manager and word all agree about it.
    pub(crate) fn settle(&mut self, number: u32) {
        let is_open = self.will_be_discarded(number) || self.at == (At::Copied { page: number });
        let page = &mut self.pages[number as usize];
        if page.discard == Discard::Idle && !is_open {
            page.undone = Values::NONE;
            page.loose = false;
        }
    }

    /// What the guest would find if it touched the page now and everybody went on without a crash or another discard;
    /// `None` when the touch would fail.
    pub(crate) fn touch(&self, page: u32, is_kept: impl Fn(Value) -> bool) -> Option<Value> {
        if let Some(value) = self.pages[page as usize].ram {
            return Some(value);
        }
        if self.keeper == Keeper::Kernel {
            return Some(Value::Zero);
        }
        // The word is about to say *absent*, or *resident* with nothing there.
        if self.will_be_discarded(page) || self.at == (At::Copied { page }) {
            return Some(Value::Zero);
        }
        let slot = |at: SlotPage| self.slots.get(at.get()).copied().flatten();
        match self.state(page)? {
            PageState::Limbo(at) => slot(at),
            // Nothing in RAM and nothing moved: the guest discarded the page before the move could find it.
            PageState::Capturing(at) => Some(slot(at).unwrap_or(Value::Zero)),
            PageState::Stored(object) => Value::of_object(object).filter(|value| is_kept(*value)),
            PageState::Zero
            | PageState::Absent
            | PageState::Given(_)
            | PageState::Resident
            | PageState::Pinned(_)
            | PageState::NeverPage
            | PageState::Unwatched => Some(Value::Zero),
            PageState::File(_) | PageState::Poisoned => None,
        }
    }
}

impl Host {
    /// What the machine counts by, see the top of the file.
    fn core_eq(&self, other: &Self) -> bool {
        match (&self.manager, &other.manager) {
            (Manager::Up(left), Manager::Up(right)) => {
                let pages = 0..left.layout().page_limit().0;
                pages.map(PageIndex).all(|page| left.state(page) == right.state(page))
                    && left.census() == right.census()
                    && left.airlock() == right.airlock()
            }
            (Manager::Down(left), Manager::Down(right)) => left == right,
            _ => false,
        }
    }
}

impl PartialEq for Host {
    fn eq(&self, other: &Self) -> bool {
        self.core_eq(other)
            && (self.pages, self.slots, &self.moves, self.at, self.keeper)
                == (other.pages, other.slots, &other.moves, other.at, other.keeper)
    }
}

impl Eq for Host {}

impl Hash for Host {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        match &self.manager {
            Manager::Up(machine) => {
                for page in 0..machine.layout().page_limit().0 {
                    machine.state(PageIndex(page)).ok().hash(hasher);
                }
                machine.census().hash(hasher);
                machine.airlock().hash(hasher);
            }
            Manager::Down(words) => words.hash(hasher),
        }
        (self.pages, self.slots, &self.moves, self.at, self.keeper).hash(hasher);
    }
}

/// How often something may happen along one path; `None` for any number of times.
pub(crate) type Allowance = Option<u8>;

/// One state of the model.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) hosts: Vec<Arc<Host>>,
    /// References counted by the store, per value. An object without any is gone.
    pub(crate) references: [u8; VALUES],
    pub(crate) crashes_left: u8,
    pub(crate) writes_left: Allowance,
    pub(crate) discards_left: Allowance,
    pub(crate) captures_left: Allowance,
    pub(crate) unwatches_left: Allowance,
    /// Set when the core answered what its documentation says it cannot.
    pub(crate) broken: Option<&'static str>,
}

/// What a guest may do to a page while its own discard of it is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Race {
    /// Nothing: whoever discards has stopped using the page.
    Forbidden,
    /// Touch and write it from another vCPU.
    Allowed,
}

/// When a new manager reads the discards that are queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Drain {
    /// Before it looks at what is present.
    BeforeScan,
    /// After. Until then nothing that is queued can be zapped, so what it sees stays.
    AfterScan,
}

/// How many threads the managers have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Threads {
    OnePerMachine,
    /// No machine's step is begun while another's is under way.
    OneForAll,
}

/// How all pages of a machine go, when they are taken at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Blocks {
    /// As pages: they come back one by one.
    Apart,
    /// As a huge page or as pages.
    Whole,
}

/// Who keeps a fault waiting on a page that the guest discarded while the agent was asked to move it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum MoveRule {
    /// The driver: it serves no fault on a page of an unanswered request, whatever the word says.
    Driver,
    /// The core's answer to the fault alone.
    Core,
}

/// An error seeded into the driver, to show that the model finds such an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mistake {
    /// Gives the slot page back before the word names the object.
    ZapBeforeWord,
    /// A new manager reads the queued discards and forgets them.
    SkipDrain,
    /// Applies the drained discards to the words, then looks at what is present.
    DiscardBeforeScan,
    /// Asks the agent before the words say so.
    MoveBeforeIntent,
    /// Does not wait for, or cancel, what the old manager asked of the agent.
    SkipBarrier,
    /// Gives an object's reference back before the word stops naming it.
    ReleaseBeforeWord,
    /// Marks what it finds of a block that was left to the kernel, and does not register it.
    LookWithoutRegister,
    /// Looks at a block that was left to the kernel, then registers it.
    LookBeforeRegister,
    /// A new manager does not register what was left to the kernel.
    TakeOverWithoutRegister,
}

/// One configuration of the model.
#[derive(Clone, Debug)]
pub(crate) struct Pager {
    pub(crate) machines: u8,
    pub(crate) pages: u32,
    pub(crate) shape: Shape,
    /// What the guests write, beside their own value.
    pub(crate) also_written: Vec<Value>,
    /// Longest run taken at once.
    pub(crate) run: u32,
    pub(crate) race: Race,
    pub(crate) crashes: u8,
    pub(crate) writes: Allowance,
    pub(crate) discards: Allowance,
    pub(crate) captures: Allowance,
    /// How often an untouched machine is left to the kernel.
    pub(crate) unwatches: Allowance,
    pub(crate) blocks: Blocks,
    /// How the agent may refuse.
    pub(crate) refusals: Vec<Outcome>,
    pub(crate) move_rule: MoveRule,
    pub(crate) drain: Drain,
    pub(crate) threads: Threads,
    /// What guest RAM holds at first, for every machine; `None` where it was never touched.
    pub(crate) populated: fn(u8) -> [Option<Value>; MAX_PAGES],
    pub(crate) mistake: Option<Mistake>,
}

impl Pager {
    /// Small enough for every test; the tests state what differs.
    pub(crate) fn small() -> Self {
        Self {
            machines: 1,
            pages: 2,
            shape: Shape { slots: 2, slot_pages: 1 },
            also_written: vec![],
            run: 1,
            race: Race::Forbidden,
            crashes: 1,
            writes: None,
            discards: None,
            captures: None,
            unwatches: Some(0),
            blocks: Blocks::Apart,
            refusals: vec![],
            move_rule: MoveRule::Driver,
            drain: Drain::AfterScan,
            threads: Threads::OnePerMachine,
            populated: |_| [None; MAX_PAGES],
            mistake: None,
        }
    }

    pub(crate) fn layout(&self) -> GuestLayout {
        GuestLayout::dense(self.pages)
    }

    fn host(&self, machine: u8) -> Host {
        let ram = (self.populated)(machine);
        let words = HeapWords::new(self.pages as usize);
        let core = Machine::new(self.layout(), words, self.shape, 0, |page| ram[page.get()].is_some());
        let page = |ram: Option<Value>| Page {
            ram,
            lawful: Values::only(ram.unwrap_or(Value::Zero)),
            undone: Values::NONE,
            loose: false,
            discard: Discard::Idle,
        };
        Host {
            manager: Manager::Up(core.expect("fresh words make a machine")),
            pages: ram.map(page),
            slots: [None; MAX_SLOT_PAGES],
            moves: Vec::new(),
            at: At::Idle,
            keeper: Keeper::Manager,
        }
    }

    pub(crate) fn world(&self) -> World {
        World {
            hosts: (0..self.machines).map(|machine| Arc::new(self.host(machine))).collect(),
            references: [0; VALUES],
            crashes_left: self.crashes,
            writes_left: self.writes,
            discards_left: self.discards,
            captures_left: self.captures,
            unwatches_left: self.unwatches,
            broken: None,
        }
    }
}

impl World {
    pub(crate) fn is_kept(&self, value: Value) -> bool {
        self.references[value.index()] > 0
    }

    /// Words that name each object, over all machines.
    pub(crate) fn named(&self, pages: u32) -> [u8; VALUES] {
        let mut named = [0; VALUES];
        for (host, page) in self.hosts.iter().flat_map(|host| (0..pages).map(move |page| (host, page))) {
            if let Some(PageState::Stored(object)) = host.state(page)
                && let Some(value) = Value::of_object(object)
            {
                named[value.index()] += 1;
            }
        }
        named
    }
}
