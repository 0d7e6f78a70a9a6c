//! A machine as far as memory goes: where its pages are, and how fast they can move.
//!
//! Enters: what the policy asks for, what the guest demands, how much time passes. Leaves: what the host sees of it, and
//! how long its processors waited. A guest's pages are in these places, the coldest leaving RAM first:
//!
//! ```text
//! contents   resident   in guest RAM; `merged` of them share their memory with a twin
//!            stored     compressed in the host's RAM: a part of each stays
//!            disk       on the host's disk
//!            squeezed   on the guest's own disk, because its balloon left it no room
//! freed      reported free, and still backed by the host
//! balloon    given to the balloon: nothing of the host's
//! ```
//!
//! What must not happen: a page in two places, or more consumed than was granted. Pages move at the rates of the scenario's
//! costs: the host takes with so many threads, a balloon as fast as it was measured, a guest that touches a page that
//! is elsewhere waits for it. What of a working set is in place decides how often that is ([`Locality`]); of what is taken a
//! part is wrongly chosen and comes back at once.
use crate::chance::{below, draw};
use crate::demand::{Curve, Demand, Locality, Part};
use crate::time::Millis;
use plimsoll_core::sampler::Sampler;
use plimsoll_policy::Costs;
use plimsoll_policy::settings::{Face, Hold, MachineSettings, Terms};
use plimsoll_policy::view::{GuestStatistics, MachineView, Phase, Reading};
use plimsoll_policy::{Ppm, Rung, Rungs, SLIVER};
use plimsoll_types::{ByteCount, GroupId, MachineId, PageCount, PageIndex};

/// Nanoseconds of a millisecond.
pub(crate) const NS: u64 = 1_000_000;

/// How memory moves on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Physics {
    /// What each rung costs.
    pub costs: Costs,
    /// The part of what is taken that is in use after all and comes back at once.
    pub mistakes: Ppm,
    /// Threads of the host that take memory.
    pub takers: u64,
}

impl Physics {
    /// What is wrongly taken where nobody says.
    pub const MISTAKES_USUAL: Ppm = Ppm::percent(5);
    /// Threads where nobody says.
    pub const TAKERS_USUAL: u64 = 4;
}

/// How working sets are estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Estimator {
    /// How long a drawn page may stay untouched before it counts as unused.
    pub period: Millis,
    /// Pages drawn a period.
    pub samples: u32,
}

/// How a guest boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Boot {
    /// How long it takes.
    pub lasts: Millis,
    /// What it touches meanwhile.
    pub touches: PageCount,
}

/// Machines that are alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    /// Its place among the classes of the scenario.
    pub index: usize,
    /// What it is called.
    pub name: String,
    /// How many there are on all hosts.
    pub count: u32,
    /// The group they belong to.
    pub group: Option<GroupId>,
    /// Their memory.
    pub face: Face,
    /// The dearest way to take memory from them that is allowed.
    pub highest: Rung,
    /// The share of time they may wait for memory.
    pub objective: Ppm,
    /// The ways to take memory that work for them.
    pub rungs: Rungs,
    /// What they demand.
    pub curve: Curve,
    /// What they keep contents in; `None` is what they are active in, or were if they do not report free memory.
    pub keeps: Option<PageCount>,
    /// Pages of the working set a guest touches a second, counting a page again only after others.
    pub touches: u64,
    /// How unevenly.
    pub locality: Locality,
    /// Pages a second a guest touches for the first time at most.
    pub grows: PageCount,
    /// Processors of a guest.
    pub processors: u64,
    /// The part of resident pages that have a twin in their sharing domain.
    pub twins: Ppm,
    /// How they start.
    pub boot: Boot,
    /// How they are met first.
    pub begin: Begin,
    /// Who keeps their memory.
    pub keeper: Keeper,
}

/// Who keeps the memory of a machine, and so whether the host can refuse it any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeper {
    /// A pager that has it wait where it is told to, or where nothing is free.
    Pager,
    /// The kernel, which gives whatever is touched: what the host may use is a number to keep, not all there is.
    Kernel,
}

/// How a machine is met first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It boots, at the time its placement gives it.
    Booting,
    /// It runs already.
    Running {
        /// From when on it is seen.
        at: Millis,
        /// Where its pages are then.
        places: Seen,
    },
}

/// Where the pages of a machine are that was not watched from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// In guest RAM.
    pub resident: PageCount,
    /// Compressed.
    pub stored: PageCount,
    /// Given to the balloon.
    pub balloon: PageCount,
}

impl Class {
    /// What a guest touches, how unevenly, how fast it grows and on how many processors, where nobody says.
    pub const TOUCHES_USUAL: u64 = 20_000;
    /// See [`Self::TOUCHES_USUAL`].
    pub const SKEW_USUAL: Ppm = Ppm::percent(80);
    /// See [`Self::TOUCHES_USUAL`].
    pub const GROWS_USUAL: ByteCount = ByteCount::mib(64);
    /// See [`Self::TOUCHES_USUAL`].
    pub const PROCESSORS_USUAL: u64 = 2;

    /// The RAM a guest of it owns.
    pub const fn size(&self) -> ByteCount {
        match self.face {
            Face::Guarantee { size, .. } | Face::Static { size } | Face::Dedicated { size } => size,
            Face::Dynamic { maximum, .. } => maximum,
        }
    }

    /// What the policy is told about one of them.
    pub fn settings(&self, id: MachineId) -> MachineSettings {
        MachineSettings {
            parent: self.group,
            highest: self.highest,
            stall_objective: self.objective,
            ..MachineSettings::new(id, self.face)
        }
    }
}

/// Where a guest's pages are; see the head of this file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places {
    resident: PageCount,
    merged: PageCount,
    stored: PageCount,
    disk: PageCount,
    squeezed: PageCount,
    freed: PageCount,
}

impl Places {
    fn out(&self) -> PageCount {
        self.stored + self.disk + self.squeezed
    }

    fn contents(&self) -> PageCount {
        self.resident + self.out()
    }

    /// What the guest's own RAM holds, wherever the host keeps it.
    fn inside(&self) -> PageCount {
        self.resident + self.stored + self.disk + self.freed
    }
}

/// What was counted since the host looked last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Since {
    taken: PageCount,
    returned: PageCount,
    waited_ns: u64,
    ran_ns: u64,
}

/// A running machine.
#[derive(Clone, Debug)]
pub(crate) struct Machine<'a> {
    pub(crate) id: MachineId,
    pub(crate) class: &'a Class,
    pub(crate) terms: Terms,
    seed: u64,
    started: Millis,
    places: Places,
    balloon: PageCount,
    asked: PageCount,
    /// What is to be taken on each rung.
    orders: [PageCount; Rung::ALL.len()],
    /// The policy has it wait.
    is_stalled: bool,
    /// Taken although in use.
    astray: PageCount,
    /// The most it was ever active in.
    crest: PageCount,
    since: Since,
    sampler: Sampler,
    sampled: Millis,
}

/// What a guest wants in an interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    demand: Demand,
    /// Contents it throws away.
    drops: PageCount,
    /// Of what it newly touches: out of what it had freed, out of memory that has to be granted, and what its balloon
    /// leaves no room for.
    reused: PageCount,
    fresh: PageCount,
    squeezed: PageCount,
    /// What comes back.
    from_store: PageCount,
    from_disk: PageCount,
    from_squeezed: PageCount,
    /// What it waits for that.
    pub(crate) waits_ns: u64,
    /// Memory that has to be granted.
    pub(crate) net: PageCount,
}

/// What an interval was like for a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spent {
    /// What its processors waited, of what they could have run.
    pub(crate) waited_ns: u64,
    pub(crate) ran_ns: u64,
    /// What it lacked of its guarantee, although it would have used it.
    pub(crate) below_guarantee: PageCount,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(id: MachineId, class: &'a Class, terms: Terms, seed: u64, now: Millis) -> Self {
        let seed = draw(seed, id.0.into());
        let pages = u32::try_from(terms.size.0).unwrap_or(u32::MAX);
        let seen = match (class.begin, terms.hold) {
            (_, Hold::Dedicated) => Seen { resident: terms.size, ..Seen::default() },
            (Begin::Running { at, places }, _) if at == now => places,
            _ => Seen::default(),
        };
        let places = Places { resident: seen.resident, stored: seen.stored, ..Places::default() };
        Self {
            id,
            class,
            terms,
            seed,
            started: now,
            places,
            balloon: seen.balloon,
            asked: seen.balloon,
            orders: [PageCount(0); Rung::ALL.len()],
            is_stalled: false,
            astray: PageCount(0),
            crest: PageCount(0),
            since: Since::default(),
            sampler: Sampler::new(pages, seed),
            sampled: now,
        }
    }

    /// Memory of the host's that it takes up.
    pub(crate) fn consumed(&self, physics: &Physics) -> ByteCount {
        let Places { resident, freed, merged, .. } = self.places;
        (resident + freed).saturating_sub(merged).bytes() + self.stored(physics)
    }

    fn stored(&self, physics: &Physics) -> ByteCount {
        ByteCount(physics.costs.of(Rung::Compress).keeps.apply(self.places.stored.bytes().0))
    }

    /// What it keeps contents in.
    pub(crate) fn contents(&self) -> ByteCount {
        self.places.contents().bytes()
    }

    pub(crate) fn demand(&self, now: Millis) -> Demand {
        let mut demand = self.class.curve.at(now, self.started, self.seed);
        if self.is_starting(now) {
            demand.active = demand.active.max(self.class.boot.touches);
        }
        demand.active = demand.active.min(self.terms.size);
        demand
    }

    fn is_starting(&self, now: Millis) -> bool {
        now < self.starts_until()
    }

    const fn starts_until(&self) -> Millis {
        Millis(self.started.0 + self.class.boot.lasts.0)
    }

    /// The next moment at which its demand jumps.
    pub(crate) fn next_event(&self, now: Millis) -> Option<Millis> {
        let boot = Some(self.starts_until()).filter(|end| *end > now);
        [boot, self.class.curve.jumps(now, self.seed)].into_iter().flatten().min()
    }

    /// Something that was asked for is not done yet. Not a few pages: so many are asked for all the time where others' demands rise
    /// smoothly, since what is due to it sinks by as many, and nothing waits to be decided then.
    pub(crate) fn is_busy(&self) -> bool {
        self.balloon != self.asked || self.is_stalled || self.orders.iter().any(|order| *order >= SLIVER)
    }

    /// What the host sees of it; what was counted starts anew.
    pub(crate) fn view(
        &mut self,
        now: Millis,
        shares_pages: bool,
        estimator: &Estimator,
        physics: &Physics,
    ) -> MachineView {
        self.sample(now, estimator);
        let since = std::mem::take(&mut self.since);
        let Places { resident, freed, merged, .. } = self.places;
        let twins = PageCount(self.class.twins.apply(resident.0)).saturating_sub(merged);
        let has_balloon = self.class.rungs.has(Rung::Balloon);
        let is_held = self.terms.hold == Hold::Dedicated;
        MachineView {
            phase: if self.is_starting(now) { Phase::Starting } else { Phase::Running },
            stored: self.stored(physics),
            pinned: if is_held { resident.bytes() } else { ByteCount(0) },
            reported_free: freed.bytes(),
            mergeable: if shares_pages { twins.bytes() } else { ByteCount(0) },
            active: self.sampler.estimate().map(|pages| Reading::of(pages.bytes(), now.0 - self.sampled.0)),
            guest: has_balloon.then(|| self.statistics()),
            taken: since.taken,
            returned: since.returned,
            stalled: Ppm::of(since.waited_ns, since.ran_ns).min(Ppm::WHOLE),
            balloon: has_balloon.then(|| self.balloon.bytes()),
            rungs: if is_held { Rungs::NONE } else { self.class.rungs },
            ..MachineView::new(self.id, self.consumed(physics))
        }
    }

    fn statistics(&self) -> GuestStatistics {
        let total = self.terms.size.saturating_sub(self.balloon);
        let kept = self.places.resident + self.places.stored + self.places.disk;
        let bytes = |pages: PageCount| i64::try_from(pages.bytes().0).unwrap_or(i64::MAX);
        GuestStatistics { total: bytes(total), free: bytes(total.saturating_sub(kept)), age_ms: 0 }
    }

    /// Draws samples, if the period is over. Of the periods of a long step, in which next to nothing changed, one is drawn:
    /// sampling is most of what a step costs here.
    fn sample(&mut self, now: Millis, estimator: &Estimator) {
        if now.0 - self.sampled.0 < estimator.period.0 {
            return;
        }
        let active = self.demand(now).active;
        // What is used is scattered over the machine, as a guest's pages are: samples of it err by chance.
        let (seed, size) = (self.seed, self.terms.size.0);
        self.sampler.turn(estimator.samples, |page: PageIndex| below(seed, page.0.into(), size) < active.0);
        self.sampled = now;
    }

    /// Takes in what the policy asks for.
    pub(crate) fn order(&mut self, rung: Rung, pages: PageCount) {
        self.orders[rung as usize] = pages;
    }

    pub(crate) fn drop_orders(&mut self) {
        self.orders = [PageCount(0); Rung::ALL.len()];
    }

    pub(crate) fn ask_balloon(&mut self, bytes: ByteCount) {
        self.asked = bytes.pages_floor().min(self.terms.size);
    }

    pub(crate) const fn stall(&mut self, is_stalled: bool) {
        self.is_stalled = is_stalled && !self.is_refused_nothing();
    }

    /// True when nobody can keep it from what it touches.
    pub(crate) const fn is_refused_nothing(&self) -> bool {
        matches!(self.class.keeper, Keeper::Kernel)
    }

    /// Does what was ordered, in `budget_ns` of the host's time at most; returns what is left of it.
    pub(crate) fn take(&mut self, mut budget_ns: u64, physics: &Physics) -> u64 {
        for rung in Rung::ALL {
            let order = self.orders[rung as usize];
            if order == PageCount(0) {
                continue;
            }
            let take_ns = physics.costs.of(rung).take_ns.max(1);
            let most = order.min(PageCount(budget_ns / take_ns));
            let taken = self.take_on(rung, most, physics.mistakes);
            budget_ns -= taken.0 * take_ns;
            // What is not there is not asked for again until the next plan.
            let is_done = taken < most;
            self.orders[rung as usize] = if is_done { PageCount(0) } else { order.saturating_sub(taken) };
        }
        budget_ns
    }

    fn take_on(&mut self, rung: Rung, most: PageCount, mistakes: Ppm) -> PageCount {
        let places = &mut self.places;
        let taken = match rung {
            Rung::GuestFree => shift(&mut places.freed, most),
            Rung::Balloon => PageCount(0),
            Rung::Sharing => {
                let twins =
                    PageCount(self.class.twins.apply(places.resident.0)).saturating_sub(places.merged);
                let merged = twins.min(most);
                places.merged += merged;
                merged
            }
            Rung::Compress => {
                let taken = shift(&mut places.resident, most);
                places.stored += taken;
                taken
            }
            Rung::Disk => {
                let taken = shift(&mut places.resident, most);
                let more = shift(&mut places.stored, most.saturating_sub(taken));
                places.disk += taken + more;
                taken + more
            }
        };
        places.merged = places.merged.min(places.resident);
        if rung.pages_out() {
            self.since.taken += taken;
            self.astray += PageCount(mistakes.apply(taken.0));
        }
        taken
    }

    /// The balloon goes where it was asked to, as far as the time allows.
    pub(crate) fn move_balloon(&mut self, time: Millis, physics: &Physics) {
        let cost = physics.costs.of(Rung::Balloon);
        let in_time = |ns: u64| PageCount(time.0 * NS / ns.max(1));
        if self.asked < self.balloon {
            self.balloon -= in_time(cost.back_ns).min(self.balloon.saturating_sub(self.asked));
            return;
        }
        let grows = in_time(cost.take_ns).min(self.asked.saturating_sub(self.balloon));
        let places = &mut self.places;
        let untouched = self.terms.size.saturating_sub(self.balloon + places.inside());
        self.balloon += grows;
        let mut left = grows.saturating_sub(untouched);
        left -= shift(&mut places.freed, left);
        for from in [&mut places.resident, &mut places.stored, &mut places.disk] {
            let squeezed = shift(from, left);
            left -= squeezed;
            places.squeezed += squeezed;
        }
        places.merged = places.merged.min(places.resident);
    }

    /// What the guest wants in an interval of that length that ends `now`.
    pub(crate) fn wants(&self, now: Millis, time: Millis, physics: &Physics) -> Wants {
        if self.terms.hold == Hold::Dedicated {
            return Wants::default();
        }
        let demand = self.demand(now);
        let keeps = self.keeps(demand);
        let contents = self.places.contents();
        let drops =
            if self.class.rungs.has(Rung::GuestFree) { contents.saturating_sub(keeps) } else { PageCount(0) };
        let grows = PageCount(self.class.grows.0.saturating_mul(time.0) / 1000);
        let new = keeps.saturating_sub(contents).min(grows);
        let room = self.terms.size.saturating_sub(self.balloon + self.places.inside());
        let reused = new.min(self.places.freed);
        let fresh = new.saturating_sub(reused).min(room);
        let squeezed = new.saturating_sub(reused + fresh);
        let mut wants = Wants { demand, drops, reused, fresh, squeezed, ..Wants::default() };
        self.want_back(&mut wants, keeps.min(contents + new), room.saturating_sub(fresh), time, physics);
        wants.net =
            wants.fresh + wants.from_disk + wants.from_squeezed + self.grown(wants.from_store, physics);
        wants
    }

    /// What memory pages cost that come back from being compressed.
    fn grown(&self, pages: PageCount, physics: &Physics) -> PageCount {
        ByteCount(physics.costs.of(Rung::Compress).keeps.rest().apply(pages.bytes().0)).pages_ceil()
    }

    fn keeps(&self, demand: Demand) -> PageCount {
        let reports = self.class.rungs.has(Rung::GuestFree);
        let usual = if reports { demand.active } else { demand.active.max(self.crest) };
        demand.keeps.or(self.class.keeps).unwrap_or(usual).max(demand.active).min(self.terms.size)
    }

    /// What of its working set, within `contents`, comes back: what was wrongly taken, and what it misses.
    fn want_back(
        &self,
        wants: &mut Wants,
        contents: PageCount,
        room: PageCount,
        time: Millis,
        physics: &Physics,
    ) {
        let out = self.places.out();
        if out == PageCount(0) {
            return;
        }
        let active = wants.demand.active;
        let missing = out.saturating_sub(contents.saturating_sub(active)).min(active);
        let misses = self.class.locality.misses(Part::of(active.saturating_sub(missing), active));
        let touches = PageCount(self.class.touches.saturating_mul(time.0) / 1000);
        let back = (self.astray + misses.part_of(touches).min(missing)).min(out);
        let share = |of: PageCount| part_of(back, of, out);
        let costs = &physics.costs;
        let (from_store, from_disk) = (share(self.places.stored), share(self.places.disk));
        let from_squeezed = back.saturating_sub(from_store + from_disk).min(self.places.squeezed);
        let (near, far) = (costs.of(Rung::Compress).back_ns, costs.of(Rung::Disk).back_ns);
        let waits_ns = from_store.0.saturating_mul(near) + (from_disk + from_squeezed).0.saturating_mul(far);
        // Processors that wait touch nothing: what comes back is at most what they can wait for.
        let most_ns = self.time_ns(time);
        let scale = |pages: PageCount| part_of(pages, PageCount(most_ns), PageCount(waits_ns.max(most_ns)));
        wants.from_store = scale(from_store);
        wants.from_disk = scale(from_disk);
        // Where its balloon leaves no room, each page that comes back drives another out.
        wants.from_squeezed = scale(from_squeezed).min(room);
        wants.waits_ns = waits_ns.min(most_ns);
    }

    pub(crate) const fn time_ns(&self, time: Millis) -> u64 {
        time.0 * NS * self.class.processors
    }

    /// What of `wants` is within its guarantee.
    pub(crate) fn guaranteed(&self, wants: &Wants, physics: &Physics) -> PageCount {
        wants.net.min(self.terms.floor.saturating_sub(self.consumed(physics).pages_ceil()))
    }

    /// True when the policy has it wait for whatever it wants.
    pub(crate) const fn must_wait(&self) -> bool {
        self.is_stalled
    }

    /// True when its balloon leaves it less room than it needs.
    pub(crate) fn is_squeezed(&self, wants: &Wants) -> bool {
        wants.squeezed > PageCount(0) || self.places.squeezed > PageCount(0)
    }

    /// Lets the interval pass, with `granted` of what it wants.
    pub(crate) fn pass(
        &mut self,
        wants: &Wants,
        granted: PageCount,
        time: Millis,
        physics: &Physics,
    ) -> Spent {
        let part = Part::of(granted, wants.net);
        let places = &mut self.places;
        let dropped = shift(&mut places.resident, wants.drops);
        places.freed += dropped;
        let rest = wants.drops.saturating_sub(dropped);
        let rest = rest.saturating_sub(shift(&mut places.stored, rest));
        shift(&mut places.disk, rest);
        let got = |pages: PageCount| part.part_of(pages);
        let [stored, disk, squeezed] = [
            (&mut places.stored, wants.from_store),
            (&mut places.disk, wants.from_disk),
            (&mut places.squeezed, wants.from_squeezed),
        ]
        .map(|(from, pages)| shift(from, got(pages)));
        let reused = shift(&mut places.freed, wants.reused);
        places.resident += got(wants.fresh) + reused + stored + disk + squeezed;
        places.squeezed += wants.squeezed;
        places.merged = places.merged.min(places.resident);
        self.astray = PageCount(0);
        self.crest = self.crest.max(wants.demand.active);
        self.since.returned += stored + disk;
        let ran_ns = self.time_ns(time);
        let denied_ns = part.rest().apply(ran_ns);
        let held_ns = self.hold_to_limit(physics);
        let waited_ns = (part.apply(wants.waits_ns) + denied_ns + held_ns).min(ran_ns);
        self.since.waited_ns += waited_ns;
        self.since.ran_ns += ran_ns;
        // What it would have taken up with all it asked for; less than its guarantee is no breach where it wants no more.
        let lacks = wants.net.saturating_sub(granted);
        let consumed = self.consumed(physics).pages_ceil();
        let below_guarantee = self.terms.floor.min(consumed + lacks).saturating_sub(consumed);
        Spent { waited_ns, ran_ns, below_guarantee }
    }

    /// What is beyond its limit is compressed while it waits, whoever keeps its budget. Returns what that takes.
    fn hold_to_limit(&mut self, physics: &Physics) -> u64 {
        let excess = self.consumed(physics).saturating_sub(self.terms.cap.bytes());
        let may_page = self.class.rungs.has(Rung::Compress) && self.terms.highest >= Rung::Compress;
        if excess == ByteCount(0) || !may_page {
            return 0;
        }
        let cost = physics.costs.of(Rung::Compress);
        let freed_a_page = u128::from(cost.keeps.rest().0.max(1));
        let bytes = u128::from(excess.0) * u128::from(Ppm::WHOLE.0) / freed_a_page;
        let pages = ByteCount(u64::try_from(bytes).unwrap_or(u64::MAX)).pages_ceil();
        self.take_on(Rung::Compress, pages, physics.mistakes).0 * cost.take_ns
    }
}

/// Takes up to `most` out of a place.
fn shift(from: &mut PageCount, most: PageCount) -> PageCount {
    let moved = most.min(*from);
    *from -= moved;
    moved
}

/// `amount * part / whole`, nothing of nothing.
fn part_of(amount: PageCount, part: PageCount, whole: PageCount) -> PageCount {
    let product = (u128::from(amount.0) * u128::from(part.0)).checked_div(u128::from(whole.0)).unwrap_or(0);
    PageCount(u64::try_from(product).unwrap_or(u64::MAX))
}
