//! One state: the shipped extents, and beside them what processors, memory and guests really hold.
//!
//! Enters: an action of a guest or of the host. Leaves: the state after it. What is lawful is kept here by itself, from what
//! was asked and accepted, and never read back from the extents.
use plimsoll_core::frames::buddy::{Cpu, FrameEntry, Frames, Order};
use plimsoll_core::frames::extents::{Extents, Handle, Slot, Task, Work};
use plimsoll_core::frames::{Reach, Rights};
use plimsoll_types::{MachineId, PageCount, Pfn};

/// How many machines there are.
pub(crate) const MACHINES: usize = 3;
/// Most frames of a configuration.
pub(crate) const MAX_FRAMES: usize = 2;

type Core = Extents<Vec<FrameEntry>, Vec<Slot>, MACHINES>;

/// A set of machines, bit by bit.
pub(crate) type Machines = u8;

/// The machines of every configuration.
pub(crate) fn machines() -> impl Iterator<Item = MachineId> {
    (0..).take(MACHINES).map(MachineId)
}

const fn bit(machine: MachineId) -> Machines {
    1 << machine.0
}

/// What a processor goes by when it runs a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct View {
    /// The machine's tables.
    pub(crate) table: Rights,
    /// What its processors remember of them.
    pub(crate) tlb: Rights,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Frame {
    pub(crate) views: [View; MACHINES],
    /// Who wrote last, `None` for zeros.
    pub(crate) bytes: Option<MachineId>,
    /// Who may lawfully read that.
    pub(crate) readers: Machines,
    /// Whom an owner, or the host, let have it since.
    pub(crate) invited: Machines,
    /// Its owner and those it asked to share with: what one of them writes is for all of them.
    sharers: Machines,
    pub(crate) owner: Option<MachineId>,
    /// Owners it had.
    pub(crate) stories: u8,
}

/// A handle as it was told to an owner, and what it was told for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Told {
    pub(crate) handle: Handle,
    frame: usize,
    story: u8,
}

/// What happened at least once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Seen {
    pub(crate) lender_died: bool,
    pub(crate) borrower_died: bool,
    pub(crate) died_under_change: bool,
    pub(crate) donated: bool,
    /// A page lay in the cache of one processor only, and was granted by another.
    pub(crate) crossed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) core: Core,
    pub(crate) frames: [Frame; MAX_FRAMES],
    pub(crate) alive: Machines,
    pub(crate) told: Vec<Told>,
    pub(crate) grants_left: u8,
    pub(crate) asks_left: u8,
    pub(crate) deaths_left: u8,
    /// Which processor goes on.
    cpu: Option<Cpu>,
    pub(crate) seen: Seen,
    /// Set when the extents did what their documentation rules out.
    pub(crate) broken: Option<&'static str>,
}

/// What a guest may ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Ask {
    Donate(MachineId),
    Lend(MachineId),
    Share(MachineId, Rights),
    Reclaim,
    GiveBack,
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Grant(MachineId),
    /// Any machine with any handle that anybody was ever told.
    Ask(MachineId, usize, Ask),
    /// A processor that runs the machine translates the frame, through tables that the host fills on demand.
    Touch(MachineId, usize),
    Write(MachineId, usize),
    /// The host does a task and says so.
    Work(Task),
    Die(MachineId),
    /// Another of the host's processors goes on: what it takes and gives back goes by its own cache.
    Switch(Cpu),
}

/// An error seeded into the host, to show that the model finds such an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Mistake {
    SkipZero,
    SkipFence,
    SkipUnmap,
    /// Processors forget first, then the tables change.
    FenceBeforeUnmap,
    /// Maps for whoever reached the extent when the change began.
    MapDuringRevocation,
    /// Takes a handle by its slot, whatever its generation.
    ReuseGeneration,
}

/// One configuration.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) frames: usize,
    pub(crate) grants: u8,
    pub(crate) asks: u8,
    pub(crate) deaths: u8,
    /// Processors with a cache each; without one, all comes from the buddies.
    pub(crate) cpus: u32,
    pub(crate) mistake: Option<Mistake>,
}

impl Host {
    pub(crate) fn cpus(&self) -> impl Iterator<Item = Cpu> {
        (0..self.cpus).map(Cpu::new)
    }

    pub(crate) fn world(&self) -> World {
        let mut frames = Frames::new(vec![FrameEntry::default(); self.frames], Pfn(0));
        frames.add(Pfn(0), PageCount(self.frames as u64)).expect("the table has room");
        frames.serve(self.cpus().next());
        let mut core = Core::new(frames, vec![Slot::default(); self.frames]);
        machines().for_each(|machine| core.admit(machine).expect("there is room"));
        World {
            core,
            frames: [Frame::default(); MAX_FRAMES],
            alive: (1 << MACHINES) - 1,
            told: Vec::new(),
            grants_left: self.grants,
            asks_left: self.asks,
            deaths_left: self.deaths,
            cpu: self.cpus().next(),
            seen: Seen::default(),
            broken: None,
        }
    }
}

impl World {
    pub(crate) fn lives(&self, machine: MachineId) -> bool {
        self.alive & bit(machine) != 0
    }

    pub(crate) fn handle(&self, frame: usize) -> Option<Handle> {
        self.core.at(Pfn(frame as u64))
    }

    pub(crate) fn view(&self, machine: MachineId, frame: usize) -> View {
        self.frames[frame].views[machine.0 as usize]
    }

    /// The state after an action, or `None` when it changes nothing.
    pub(crate) fn after(&self, host: &Host, action: Action) -> Option<Self> {
        let mut next = self.clone();
        match action {
            Action::Grant(to) => next.grant(to)?,
            Action::Ask(by, told, ask) => next.ask(host, by, told, ask)?,
            Action::Touch(machine, frame) => next.touch(host, machine, frame),
            Action::Write(machine, frame) => next.write(machine, frame),
            Action::Work(task) => next.work(host, task),
            Action::Die(machine) => next.die(machine),
            Action::Switch(cpu) => {
                next.cpu = Some(cpu);
                next.core.frames_mut().serve(next.cpu);
            }
        }
        (next != *self).then_some(next)
    }

    fn grant(&mut self, to: MachineId) -> Option<()> {
        let frames = self.core.frames();
        let free = frames.free_pages();
        let others = |cpu: Cpu| (0..2).map(Cpu::new).filter(move |other| *other != cpu);
        let is_anothers = self.cpu.is_some_and(|cpu| {
            free > PageCount(0) && others(cpu).map(|other| frames.cached(other)).sum::<PageCount>() == free
        });
        let Ok(task) = self.core.grant(to, Order::PAGE) else {
            if free > PageCount(0) {
                self.broken = Some("a page is free, in whatever cache, and is refused");
            }
            return self.broken.map(|_| ());
        };
        self.seen.crossed |= is_anothers;
        self.grants_left -= 1;
        let frame = usize::try_from(task.piece.first.0).ok()?;
        self.tell(task.handle, frame, to);
        Some(())
    }

    /// A frame has a new owner, who is told its handle.
    fn tell(&mut self, handle: Handle, number: usize, owner: MachineId) {
        let frame = &mut self.frames[number];
        frame.stories += 1;
        (frame.owner, frame.invited, frame.sharers) = (Some(owner), bit(owner), 0);
        self.told.push(Told { handle, frame: number, story: frame.stories });
    }

    fn ask(&mut self, host: &Host, by: MachineId, told: usize, ask: Ask) -> Option<()> {
        let Told { handle, frame, story } = self.told[told];
        let handle = match host.mistake {
            Some(Mistake::ReuseGeneration) => self.handle(frame)?,
            _ => handle,
        };
        let before = self.core.clone();
        let answer = match ask {
            Ask::Donate(to) => self.core.donate(by, handle, to),
            Ask::Lend(to) => self.core.lend(by, handle, to, Rights::READ | Rights::WRITE),
            Ask::Share(to, rights) => self.core.share(by, handle, to, rights),
            Ask::Reclaim => self.core.reclaim(by, handle),
            Ask::GiveBack => self.core.give_back(by, handle),
            Ask::Release => self.core.release(by, handle),
        };
        if answer.is_err() {
            if self.core != before {
                self.broken = Some("a refusal changed something");
            }
            return self.broken.map(|_| ());
        }
        self.asks_left -= 1;
        let place = &mut self.frames[frame];
        if place.stories != story {
            self.broken = Some("a handle did something to what it was not told for");
        }
        if place.owner != Some(by) && ask != Ask::GiveBack {
            self.broken = Some("somebody else than the owner changed an extent");
        }
        match ask {
            Ask::Donate(to) | Ask::Lend(to) => {
                place.invited |= bit(to);
                place.sharers = 0;
            }
            Ask::Share(to, _) => {
                place.invited |= bit(to);
                place.readers |= bit(to);
                place.sharers |= bit(by) | bit(to);
            }
            Ask::Reclaim => (place.invited, place.sharers) = (bit(by), 0),
            Ask::GiveBack => {
                place.invited &= !bit(by);
                place.sharers &= !bit(by);
            }
            Ask::Release => (place.owner, place.invited, place.sharers) = (None, 0, 0),
        }
        Some(())
    }

    fn touch(&mut self, host: &Host, machine: MachineId, frame: usize) {
        let rights = self.handle(frame).map_or(Rights::empty(), |handle| match host.mistake {
            Some(Mistake::MapDuringRevocation) => self.core.reach(handle).of(machine),
            _ => self.core.rights(machine, handle),
        });
        let view = &mut self.frames[frame].views[machine.0 as usize];
        if view.tlb.is_empty() {
            if view.table.is_empty() {
                view.table = rights;
            }
            view.tlb = view.table;
        }
    }

    fn write(&mut self, machine: MachineId, frame: usize) {
        let reach = self.handle(frame).map_or(Reach::NOBODY, |handle| self.core.reach(handle));
        let place = &mut self.frames[frame];
        place.bytes = Some(machine);
        // Who loses it right now may still read what is written until the fence.
        place.readers = reach.iter().fold(bit(machine), |readers, (other, _)| readers | bit(other));
        if place.sharers & bit(machine) != 0 {
            place.readers |= place.sharers;
        }
    }

    fn work(&mut self, host: &Host, task: Task) {
        let frame = usize::try_from(task.piece.first.0).expect("frames are few");
        let is_reversed = host.mistake == Some(Mistake::FenceBeforeUnmap);
        let views = &mut self.frames[frame].views;
        match task.work {
            Work::Unmap(from) | Work::Fence(from) => {
                let is_unmap = matches!(task.work, Work::Unmap(_)) != is_reversed;
                let skips = if is_unmap { Mistake::SkipUnmap } else { Mistake::SkipFence };
                for (machine, _) in from.iter().filter(|_| host.mistake != Some(skips)) {
                    let view = &mut views[machine.0 as usize];
                    *(if is_unmap { &mut view.table } else { &mut view.tlb }) = Rights::empty();
                }
            }
            Work::Zero if host.mistake == Some(Mistake::SkipZero) => {}
            Work::Zero => self.frames[frame].bytes = None,
            Work::Nothing => {}
        }
        match self.core.done(task) {
            Err(_) => self.broken = Some("a task that was listed could not be reported"),
            Ok(next) if next.work == Work::Nothing => {
                let arrived =
                    self.core.owner(next.handle).filter(|owner| self.frames[frame].owner != Some(*owner));
                if let Some(owner) = arrived {
                    self.seen.donated = true;
                    self.tell(next.handle, frame, owner);
                }
            }
            Ok(_) => {}
        }
        if self.core.done(task).is_ok() {
            self.broken = Some("a task could be reported twice");
        }
    }

    fn die(&mut self, machine: MachineId) {
        for number in 0..MAX_FRAMES {
            let Some(handle) = self.handle(number) else { continue };
            let reach = self.core.reach(handle);
            self.seen.died_under_change |= self.core.tasks().any(|task| task.handle == handle);
            let frame = &mut self.frames[number];
            let is_lent = frame.owner.is_some_and(|owner| reach.of(owner).is_empty()) && !reach.is_nobody();
            if frame.owner == Some(machine) {
                self.seen.lender_died |= is_lent;
                (frame.owner, frame.invited, frame.sharers) = (None, 0, 0);
            } else {
                self.seen.borrower_died |= is_lent && !reach.of(machine).is_empty();
                frame.invited &= !bit(machine);
                frame.sharers &= !bit(machine);
            }
        }
        self.alive &= !bit(machine);
        self.deaths_left -= 1;
        if self.core.died(machine).is_err() {
            self.broken = Some("a death was refused");
        }
    }
}
