//! Whether a change of an entry, and the fences after it, leave a stale translation behind.
//!
//! Enters: what the entry was and is, who may have cached it, the fences that one processor executed since. Leaves: nothing,
//! or what may remain, with what it would do and the cheapest fences that would have been enough.
//!
//! All that could be cached of the old entry is taken to be cached. Of what differs in nothing that a fence looks at, one is
//! followed: the smallest page, because whatever drops it drops a larger one; the entry that names a table of pages,
//! because it is what entries further up lead to. Fences differ along addresses only where a range begins or ends, so each
//! such place is looked at and not each page.
use super::fence::{Effect, Fence, Step};
use super::recipe::{Recipe, needed};
use super::{Cached, Kind, Tag, Through};
use crate::address::{Input, Level, Output, Span};
use crate::entry::{Entry, Leaf};
use crate::format::{Feature, Format};
use crate::stale::{Item, Items, left, places};
use core::fmt;

/// Whose manual counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// SDM.
    Intel,
    /// APM.
    Amd,
    /// Arm ARM, regime EL1&0.
    Arm,
    /// RISC-V privileged architecture.
    RiscV,
}

/// Whether a host's stage follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stages {
    /// There is one stage.
    One,
    /// A second follows the first.
    Two,
}

/// Whether live entries of other sizes, or to other memory, must be absent and forgotten in between
/// ([`Format::break_before_make`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Breaks {
    /// They must.
    Required,
    /// They need not.
    Spared,
}

/// What processors may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Regime {
    /// Whose they are.
    pub architecture: Architecture,
    /// How addresses are translated.
    pub stages: Stages,
    /// What they ask of a change.
    pub breaks: Breaks,
}

/// Which stage a table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// Virtual addresses to (guest) physical ones.
    First,
    /// Guest physical addresses to physical ones.
    Second,
}

/// A change of one entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The stage of its table.
    pub stage: Stage,
    /// Who may have walked through it. Tables that several address spaces, or several guests, lead to belong to none.
    pub tag: Tag,
    /// Intel, second stage: the root (EP4TA).
    pub root: Option<Output>,
    /// All that the entry translates.
    pub span: Span,
    /// log2 of the smallest page.
    pub page_shift: u32,
    /// log2 of what an entry that names a table of pages translates.
    pub table_shift: u32,
    /// What the entry said. On RISC-V it is global if an entry on the way to it is.
    pub old: Entry,
    /// What it says.
    pub new: Entry,
}

impl Change {
    /// The change of the entry of `level` that translates `input` from the word `old` to `new`; `None` if the format does not
    /// translate it.
    pub fn of<F: Format>(
        (stage, tag, root): (Stage, Tag, Option<Output>),
        input: Input,
        level: Level,
        caps: &F::Caps,
        (old, new): (u64, u64),
    ) -> Option<Self> {
        let shift = F::shift(level);
        let first = F::extend(F::offset(input) >> shift << shift);
        Some(Self {
            stage,
            tag,
            root,
            span: Span::new(first, 1 << shift).filter(|_| F::accepts(input))?,
            page_shift: F::PAGE_SHIFT,
            table_shift: F::shift(Level(2)),
            old: F::decode(old, level, caps),
            new: F::decode(new, level, caps),
        })
    }
}

/// What a stale translation does, from what can be lived with to what cannot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Consequence {
    /// A fault although the tables allow the access; harmless where the handler looks again and fences.
    NeedlessFault,
    /// Accesses that set no accessed or dirty bit.
    LostMark,
    /// An access that the tables no longer allow.
    MoreRights,
    /// An access to memory that is no longer mapped there, or with other attributes or sizes.
    OtherMemory,
}

impl fmt::Display for Consequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NeedlessFault => "accesses that are allowed fault",
            Self::LostMark => "accesses leave no accessed or dirty bit",
            Self::MoreRights => "accesses succeed that are no longer allowed",
            Self::OtherMemory => "accesses reach memory that is no longer mapped there",
        })
    }
}

/// What may be stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remains {
    /// What is cached, from the first address that the fences leave out.
    pub cached: Cached,
    /// What it does.
    pub consequence: Consequence,
}

/// Why the fences are not enough.
#[expect(clippy::large_enum_variant, reason = "there is no allocator to put a part of it behind")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// A stale translation may remain.
    Fence {
        /// Which.
        remains: Remains,
        /// The cheapest fences that would have been enough, if any of this processor's are.
        needed: Option<Recipe>,
    },
    /// The entry had to be absent and forgotten before it said the new thing (Arm ARM D8.16 "Translation table
    /// maintenance": break-before-make): no fence makes up for it.
    Break {
        /// What the entry translates.
        span: Span,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Break { span } => {
                write!(f, "the entry of {span} was changed while it was live; make it absent and fence first")
            }
            Self::Fence { remains: Remains { cached, consequence }, needed } => {
                write!(f, "{consequence}: {:?} of {:?} may be cached", cached.kind, cached.through)?;
                if let Some(span) = cached.first.or(cached.second) {
                    write!(f, " for {span}")?;
                }
                match needed {
                    Some(recipe) => write!(f, "; execute {:?}", recipe.as_slice()),
                    None => f.write_str("; no fence of this architecture drops it"),
                }
            }
        }
    }
}

impl core::error::Error for Missing {}

/// The most that can be cached of one change: by stages, kind, and whether it is global.
const SORTS: usize = 12;
type Legal = Items<Cached, SORTS>;

/// Looks for what may be stale once a processor has executed `fences` after a change, in this order. What is less bad than
/// `least` is not looked for.
///
/// # Errors
/// Something may be, or the change must not be made like this.
#[expect(clippy::result_large_err, reason = "there is no allocator to put it behind")]
pub fn check(change: &Change, regime: &Regime, fences: &[Fence], least: Consequence) -> Result<(), Missing> {
    if must_break((&change.old, &change.new), regime.breaks) {
        return Err(Missing::Break { span: change.span });
    }
    match stale(change, regime, fences, least) {
        None => Ok(()),
        Some(remains) => Err(Missing::Fence { remains, needed: needed(change, regime, least) }),
    }
}

/// What may be stale, and is at least so bad.
pub(super) fn stale(
    change: &Change,
    regime: &Regime,
    fences: &[Fence],
    least: Consequence,
) -> Option<Remains> {
    let found = consequence((&change.old, &change.new), Caches::of(regime.architecture));
    let consequence = found.filter(|found| *found >= least)?;
    let remaining = |at: Input| {
        let items = run(&cached(change, regime, at), fences);
        items.into_iter().flatten().next().map(|cached| Remains { cached, consequence })
    };
    let ranges = fences.iter().filter_map(|fence| match fence.step() {
        Step::Now(effect) | Step::Open(effect) => effect.pages(),
        _ => None,
    });
    places(change.span, [change.page_shift, change.table_shift], ranges).find_map(remaining)
}

/// Whether the entry was live before and after with other sizes or other memory, where that is forbidden.
pub(crate) fn must_break((old, new): (&Entry, &Entry), breaks: Breaks) -> bool {
    let other = match (old, new) {
        (Entry::Leaf(old), Entry::Leaf(new)) => leads_elsewhere(old, new),
        (Entry::Table(old), Entry::Table(new)) => (old.at, old.skips) != (new.at, new.skips),
        (Entry::Leaf(_), Entry::Table(_)) | (Entry::Table(_), Entry::Leaf(_)) => true,
        _ => false,
    };
    other && breaks == Breaks::Required
}

/// What some cache besides entries that lead somewhere and are marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caches {
    /// That an entry is absent.
    pub(crate) absent: Feature,
    /// That a mark is missing, where software sets the marks and an access without one faults.
    pub(crate) unmarked: Feature,
}

impl Caches {
    /// An entry that faults is not cached (SDM vol. 3, 4.10.2.3 and 4.10.3.1; Arm ARM D8.17 "TLB lookup"; APM vol. 2, 5.5.3). It may
    /// be on RISC-V (12.2.1: "an implementation may ... speculatively", even if V is clear).
    const fn of(architecture: Architecture) -> Self {
        let (absent, unmarked) = match architecture {
            Architecture::Intel | Architecture::Amd => (Feature::Off, Feature::Off),
            Architecture::Arm => (Feature::Off, Feature::On),
            Architecture::RiscV => (Feature::On, Feature::On),
        };
        Self { absent, unmarked }
    }
}

/// The worst that something cached of the old entry can do.
pub(crate) fn consequence((old, new): (&Entry, &Entry), caches: Caches) -> Option<Consequence> {
    use Consequence::{LostMark, MoreRights, NeedlessFault, OtherMemory};
    match (old, new) {
        (Entry::Absent { .. } | Entry::Malformed(_), new) => {
            let valid = matches!(new, Entry::Table(_) | Entry::Leaf(_));
            (caches.absent == Feature::On && valid).then_some(NeedlessFault)
        }
        (Entry::Table(old), Entry::Table(new)) => {
            if (old.at, old.memory, old.skips) != (new.at, new.memory, new.skips) {
                Some(OtherMemory)
            } else if !new.permissions.contains(old.permissions) || (old.global && !new.global) {
                Some(MoreRights)
            } else if old.accessed && !new.accessed {
                Some(LostMark)
            } else {
                (old.permissions != new.permissions).then_some(NeedlessFault)
            }
        }
        (Entry::Leaf(old), Entry::Leaf(new)) => {
            let lost = (old.accessed && !new.accessed) || (old.dirty && !new.dirty);
            let marked = (!old.accessed && new.accessed) || (!old.dirty && new.dirty);
            if leads_elsewhere(old, new) {
                Some(OtherMemory)
            } else if !new.permissions.contains(old.permissions) || leaks(old, new) {
                Some(MoreRights)
            } else if lost {
                Some(LostMark)
            } else if old.permissions != new.permissions {
                Some(NeedlessFault)
            } else {
                // Where software sets the marks, a processor may have cached that they are missing, and fault for it.
                (marked && caches.unmarked == Feature::On).then_some(NeedlessFault)
            }
        }
        // Whoever splits a leaf does so to change a part: the whole must not stay. Merged leaves are changed as one.
        (Entry::Table(_) | Entry::Leaf(_), _) => Some(OtherMemory),
    }
}

/// Whether leaves differ in size, or in what memory they map, or how.
fn leads_elsewhere(old: &Leaf, new: &Leaf) -> bool {
    (old.base(), old.shift, old.memory) != (new.base(), new.shift, new.memory)
}

/// Whether a leaf was in reach of more than it is: of every address space, or of another protection key's holders.
fn leaks(old: &Leaf, new: &Leaf) -> bool {
    (old.global && !new.global) || old.key != new.key
}

/// All that may be cached of the old entry, about one page at `at`.
fn cached(change: &Change, regime: &Regime, at: Input) -> Legal {
    let block = |shift: u32| Span::new(Input(at.0 >> shift << shift), 1 << shift);
    let (page, table) = (block(change.page_shift), block(change.table_shift));
    // An absent entry that is cached stands in the way of what the new one is.
    let table_like = match (&change.old, &change.new) {
        (Entry::Table(_), _) => true,
        (Entry::Leaf(_), _) | (_, Entry::Leaf(_)) => false,
        _ => true,
    };
    let leaf = if table_like { page } else { Some(change.span) };
    let global = match change.old {
        Entry::Leaf(leaf) => Some(leaf.global),
        Entry::Table(table) if table.global => Some(true),
        Entry::Table(_) => None,
        // What is cached of it stands in the way of the new one, and stays where that would.
        Entry::Absent { .. } | Entry::Malformed(_) => {
            Some(matches!(change.new, Entry::Leaf(Leaf { global: true, .. })))
        }
    };
    let mut items = [None; SORTS];
    let mut all = items.iter_mut();
    for through in throughs(change.stage, regime) {
        for kind in [Kind::Structure, Kind::Leaf] {
            for globally in [false, true] {
                let Some(item) = all.next() else { return items };
                // Through a leaf of the second stage the guest's tables are read, whose places are cached as well.
                let guest_table = change.stage == Stage::Second && through == Through::Both;
                let kind_fits = kind == Kind::Leaf || table_like || guest_table;
                let global_fits = match (change.stage, kind) {
                    (Stage::Second, _) => !globally || through == Through::Both && kind == Kind::Leaf,
                    // Only RISC-V has global tables.
                    (Stage::First, Kind::Structure) if regime.architecture != Architecture::RiscV => {
                        !globally
                    }
                    // The entry itself, if it is the lowest that names a table.
                    (Stage::First, Kind::Structure) if table == Some(change.span) => {
                        globally == global.unwrap_or(false)
                    }
                    (Stage::First, _) => global.is_none_or(|global| global == globally),
                };
                if !kind_fits || !global_fits {
                    continue;
                }
                let span = if kind == Kind::Structure && table_like && !guest_table { table } else { leaf };
                let (first, second) = match change.stage {
                    Stage::First => (span, None),
                    Stage::Second => (None, span),
                };
                // Nobody knows in which address space a guest uses what the host maps.
                let space = change.tag.space.filter(|_| change.stage == Stage::First);
                let tag = Tag { space, ..change.tag };
                *item =
                    Some(Cached { through, kind, tag, root: change.root, global: globally, first, second });
            }
        }
    }
    items
}

/// Through which stages a translation can have gone that depends on an entry of `stage`.
fn throughs(stage: Stage, regime: &Regime) -> impl Iterator<Item = Through> {
    let two = regime.stages == Stages::Two;
    // SDM vol. 3, 29.4.2: no linear mappings are made or used while EPT is in use. No other manual says so.
    let first = stage == Stage::First && !(two && regime.architecture == Architecture::Intel);
    let second = stage == Stage::Second;
    [(first, Through::First), (second, Through::Second), (two || second, Through::Both)]
        .into_iter()
        .filter_map(|(may, through)| may.then_some(through))
}

/// What is left of `legal` after the fences.
fn run(legal: &Legal, fences: &[Fence]) -> Legal {
    let mut present = *legal;
    let mut visible = false;
    let mut open = 0;
    let mut pending = false;
    for (index, fence) in fences.iter().enumerate() {
        match fence.step() {
            // Alone among its like; with others open, one of them.
            Step::Now(_) if pending => {}
            Step::Now(_) => {
                let batch = Batch { fences: fences.get(open..=index).unwrap_or_default(), closed: false };
                present = batch.leaves(legal, &present);
                open = index + 1;
            }
            // Before the change is seen, what is dropped is read again as it was.
            Step::Open(_) if !visible => open = index + 1,
            Step::Open(_) => pending = true,
            Step::Opens => {
                visible = true;
                open = if pending { open } else { index + 1 };
            }
            step @ (Step::Closes | Step::ClosesAndOpens) => {
                let batch = Batch { fences: fences.get(open..index).unwrap_or_default(), closed: true };
                present = batch.leaves(legal, &present);
                (open, pending) = (index + 1, false);
                visible |= step == Step::ClosesAndOpens;
            }
        }
    }
    let rest = Batch { fences: fences.get(open..).unwrap_or_default(), closed: false };
    rest.leaves(legal, &present)
}

/// Fences whose order is open.
struct Batch<'a> {
    fences: &'a [Fence],
    /// Whether those are done that have to be waited for.
    closed: bool,
}

impl Batch<'_> {
    fn effects(&self) -> impl Iterator<Item = Effect> {
        self.fences.iter().filter_map(|fence| match fence.step() {
            Step::Now(effect) => Some(effect),
            Step::Open(effect) => Some(effect).filter(|_| self.closed),
            _ => None,
        })
    }

    fn leaves(&self, legal: &Legal, present: &Legal) -> Legal {
        left(legal, present, &|| self.effects())
    }
}

impl Item for Cached {
    /// Whether a processor that walks through this, and no other stale entry, may come to cache `item`.
    fn makes(&self, item: &Self) -> bool {
        match (self.through, item.through) {
            // What goes through a stale entry of the second stage is as stale.
            (Through::Second, Through::Second) => self.kind == Kind::Structure && item.kind == Kind::Leaf,
            (Through::Second, Through::Both) => true,
            (Through::Second, Through::First) | (_, Through::Second) => false,
            // A table of the second stage's own: what it names has gone through no table of the first.
            (Through::Both, _) if self.second.is_some() => false,
            // Tables of the first stage lead to tables, global or not as these are, and to pages. Once global, so is what is below.
            (Through::First | Through::Both, _) => {
                let by_table = self.kind == Kind::Structure && (item.global || !self.global);
                let by_page = (self.through, item.through) == (Through::First, Through::Both)
                    && (self.kind, self.global) == (item.kind, item.global);
                by_table || by_page
            }
        }
    }
}
