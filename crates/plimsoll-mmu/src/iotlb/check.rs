//! Whether a change, and the commands after it, leave something stale behind, and which commands would not have.
//!
//! Enters: what an entry was and is, a device, the commands that its unit was given since. Leaves: nothing, or what may remain, with
//! what it would do and the first of a table of sequences that is enough by the same test.
use super::command::{AmdVi, Command, Depth, Drain, Effect, Smmu, Vtd};
use super::{Kept, Kind};
use crate::address::{Input, Level, Output, Span};
use crate::entry::Entry;
use crate::format::{Feature, Format};
use crate::stale::{Items, left, places};
use crate::tlb::{Breaks, Caches, Consequence, consequence, must_break};
use core::fmt;

/// Whose unit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Maker {
    /// VT-d.
    Intel,
    /// AMD-Vi.
    Amd,
    /// SMMUv3.
    Arm,
}

/// What a unit may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Whose it is.
    pub maker: Maker,
    /// It keeps that an entry is absent: CAP.CM of VT-d, NpCache of AMD-Vi; units made by software do.
    pub absent: Feature,
    /// Live entries of other sizes, or to other memory, must be absent and forgotten in between ([`Format::break_before_make`]).
    pub breaks: Breaks,
}

/// A device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// What commands know it by.
    pub id: u16,
    /// ATS is on: it keeps translations of its own.
    pub remote: Feature,
}

/// A domain, as a device's context entry, device table entry or stream table entry has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its domain identifier or VMID.
    pub domain: u16,
    /// Its tables.
    pub root: Output,
}

/// A change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Of an entry of a domain's tables.
    Entry {
        /// The domain.
        domain: u16,
        /// All that the entry translates; of one that names a table, the part will do in which anything has been mapped: nothing is
        /// kept of the rest.
        span: Span,
        /// log2 of the smallest page, and of what an entry that names a table of pages translates.
        shifts: [u32; 2],
        /// What the entry said.
        old: Entry,
        /// What it says.
        new: Entry,
    },
    /// Of which tables a device has; `None` where it has none. That a domain's identifier is given to other tables is such a change of
    /// each device that had it.
    Device {
        /// What it had.
        old: Option<Context>,
        /// What it has.
        new: Option<Context>,
    },
}

impl Change {
    /// The change of the entry of `level` that translates `input` from the word `old` to `new`; `None` if the format does not
    /// translate it.
    pub fn of<F: Format>(
        domain: u16,
        input: Input,
        level: Level,
        caps: &F::Caps,
        (old, new): (u64, u64),
    ) -> Option<Self> {
        let shift = F::shift(level);
        let first = F::extend(F::offset(input) >> shift << shift);
        Some(Self::Entry {
            domain,
            span: Span::new(first, 1 << shift).filter(|_| F::accepts(input))?,
            shifts: [F::PAGE_SHIFT, F::shift(Level(2))],
            old: F::decode(old, level, caps),
            new: F::decode(new, level, caps),
        })
    }

    /// The domain by whose name stale things are kept.
    fn domain(&self) -> u16 {
        match *self {
            Self::Entry { domain, .. } => domain,
            Self::Device { old, .. } => domain_of(old),
        }
    }

    /// The addresses that it is about; `None` for all.
    fn span(&self) -> Option<Span> {
        match *self {
            Self::Entry { span, .. } => Some(span),
            Self::Device { .. } => None,
        }
    }
}

/// That a device has no tables is kept by the name of domain 0 (VT-d, 6.1 "Caching Mode").
fn domain_of(context: Option<Context>) -> u16 {
    context.map_or(0, |context| context.domain)
}

/// What may be stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remains {
    /// What is kept.
    pub kept: Kept,
    /// What it does.
    pub consequence: Consequence,
}

/// Why the commands are not enough.
#[expect(clippy::large_enum_variant, reason = "there is no allocator to put a part of it behind")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// Something stale may remain.
    Command {
        /// What.
        remains: Remains,
        /// The commands that would have been enough.
        needed: Option<Recipe>,
    },
    /// The entry had to be absent and forgotten before it said the new thing: no command makes up for it.
    Break {
        /// What the entry translates.
        span: Span,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Break { span } => {
                write!(
                    f,
                    "the entry of {span} was changed while it was live; make it absent, invalidate and wait first"
                )
            }
            Self::Command { remains: Remains { kept, consequence }, needed } => {
                write!(f, "{consequence}: {:?} may be kept", kept.kind)?;
                if let Some(pages) = kept.pages {
                    write!(f, " for {pages}")?;
                }
                match needed {
                    Some(recipe) => write!(f, "; give {:?}", recipe.as_slice()),
                    None => f.write_str("; no command drops it"),
                }
            }
        }
    }
}

impl core::error::Error for Missing {}

/// The longest sequence.
const LONGEST: usize = 6;

/// Commands, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    commands: [Command; LONGEST],
    count: usize,
}

impl Recipe {
    fn of<const N: usize>(commands: [Option<Command>; N]) -> Self {
        const { assert!(N <= LONGEST, "a recipe is no longer than this") };
        let mut recipe = Self { commands: [Command::Vtd(Vtd::Wait); LONGEST], count: 0 };
        for (place, command) in recipe.commands.iter_mut().zip(commands.into_iter().flatten()) {
            *place = command;
            recipe.count += 1;
        }
        recipe
    }

    /// The commands; none if none is needed.
    pub fn as_slice(&self) -> &[Command] {
        self.commands.get(..self.count).unwrap_or_default()
    }
}

/// Looks for what of a device's may be stale once its unit was given `commands` after a change, in this order. What is less bad than
/// `least` is not looked for.
///
/// # Errors
/// Something may be, or the change must not be made like this.
#[expect(clippy::result_large_err, reason = "there is no allocator to put it behind")]
pub fn check(
    change: &Change,
    unit: &Unit,
    device: &Device,
    commands: &[Command],
    least: Consequence,
) -> Result<(), Missing> {
    if let Change::Entry { span, old, new, .. } = change
        && must_break((old, new), unit.breaks)
    {
        return Err(Missing::Break { span: *span });
    }
    match stale(change, unit, device, commands, least) {
        None => Ok(()),
        Some(remains) => Err(Missing::Command { remains, needed: needed(change, unit, device, least) }),
    }
}

/// The commands that a change needs for everything at least as bad as `least` to be gone, the least of them; `None` if none are enough.
pub fn needed(change: &Change, unit: &Unit, device: &Device, least: Consequence) -> Option<Recipe> {
    let enough = |recipe: &Recipe| stale(change, unit, device, recipe.as_slice(), least).is_none();
    core::iter::once(Recipe::of([])).chain(candidates(change, unit, device)).find(enough)
}

/// The sequences that a maker's commands offer, those that drop least first.
fn candidates(change: &Change, unit: &Unit, device: &Device) -> impl Iterator<Item = Recipe> {
    let (domain, pages, id) = (change.domain(), change.span(), device.id);
    let moved = matches!(change, Change::Device { .. });
    let remote = device.remote == Feature::On;
    let maker = unit.maker;
    let sequence = move |(depth, apart)| match maker {
        Maker::Intel => {
            let drain = Drain::On;
            let vtd = |command| Some(Command::Vtd(command));
            Recipe::of([
                vtd(Vtd::ContextDevice { domain, device: id }).filter(|_| moved),
                match pages {
                    Some(pages) => vtd(Vtd::IotlbPages { domain, pages, depth, drain }),
                    None => vtd(Vtd::IotlbDomain { domain, drain }),
                },
                vtd(Vtd::DeviceTlb { device: id, pages }).filter(|_| remote),
                vtd(Vtd::Wait),
            ])
        }
        Maker::Amd => {
            let amd = |command| Some(Command::AmdVi(command));
            let wait = amd(AmdVi::CompletionWait);
            Recipe::of([
                amd(AmdVi::DevtabEntry { device: id }).filter(|_| moved),
                wait.filter(|_| moved),
                amd(AmdVi::Pages { domain, pages, depth }),
                wait.filter(|_| apart),
                amd(AmdVi::IotlbPages { device: id, pages }).filter(|_| remote),
                wait,
            ])
        }
        Maker::Arm => {
            let smmu = |command| Some(Command::Smmu(command));
            let sync = smmu(Smmu::Sync);
            Recipe::of([
                smmu(Smmu::CfgiSte { stream: id }).filter(|_| moved),
                sync.filter(|_| moved),
                match pages {
                    Some(pages) => smmu(Smmu::TlbiS2Ipa { vmid: domain, pages, depth }),
                    None => smmu(Smmu::TlbiS12Vmall { vmid: domain }),
                },
                sync.filter(|_| apart),
                smmu(Smmu::AtcInv { stream: id, pages }).filter(|_| remote),
                sync,
            ])
        }
    };
    // Whether the unit is waited for before the device is told.
    let ways = [(Depth::Leaves, false), (Depth::Leaves, true), (Depth::All, false), (Depth::All, true)];
    ways.into_iter().map(sequence)
}

/// What may be stale, and is at least so bad.
fn stale(
    change: &Change,
    unit: &Unit,
    device: &Device,
    commands: &[Command],
    least: Consequence,
) -> Option<Remains> {
    let found = match change {
        Change::Entry { old, new, .. } => {
            consequence((old, new), Caches { absent: unit.absent, unmarked: Feature::Off })
        }
        Change::Device { old, new } if old == new => None,
        // A unit that keeps what is absent keeps that a device has no tables.
        Change::Device { old: None, .. } => {
            (unit.absent == Feature::On).then_some(Consequence::NeedlessFault)
        }
        Change::Device { .. } => Some(Consequence::OtherMemory),
    };
    let consequence = found.filter(|found| *found >= least)?;
    let remaining = |legal: &Legal| run(legal, unit, commands).into_iter().flatten().next();
    let kept = match *change {
        Change::Entry { domain, span, shifts, old, new } => {
            let ranges = commands.iter().filter_map(|command| command.effect()?.pages());
            places(span, shifts, ranges).find_map(|at| {
                let legal = of_entry(device, domain, (at, span, shifts), (&old, &new));
                remaining(&legal)
            })
        }
        Change::Device { old, new } => remaining(&of_device(device, (old, new))),
    };
    kept.map(|kept| Remains { kept, consequence })
}

/// One of each kind at most.
const KINDS: usize = 5;
type Legal = Items<Kept, KINDS>;

/// All that may be kept of an entry that has changed, about the page at `at`: the smallest page, because whatever drops it drops a
/// larger one, and the entry that names a table of pages, because it is what entries further up lead to.
fn of_entry(
    device: &Device,
    domain: u16,
    (at, span, shifts): (Input, Span, [u32; 2]),
    (old, new): (&Entry, &Entry),
) -> Legal {
    let [page, table] = shifts.map(|shift| Span::new(Input(at.0 >> shift << shift), 1 << shift));
    // An absent entry that is kept stands in the way of what the new one is.
    let names_table = match (old, new) {
        (Entry::Table(_), _) => true,
        (Entry::Leaf(_), _) | (_, Entry::Leaf(_)) => false,
        _ => true,
    };
    let leaf = if names_table { page } else { Some(span) };
    let domain = Some(domain);
    let id = Some(device.id);
    let item = |kind, device, domain, pages| Some(Kept { kind, device, domain, pages });
    [
        item(Kind::Structure, None, domain, table).filter(|_| names_table),
        item(Kind::Leaf, None, domain, leaf),
        item(Kind::Remote, id, None, leaf).filter(|_| device.remote == Feature::On),
        item(Kind::Access, id, domain, leaf),
        None,
    ]
}

/// All that may be kept of which tables a device had.
fn of_device(device: &Device, (old, new): (Option<Context>, Option<Context>)) -> Legal {
    let domain = Some(domain_of(old));
    let id = Some(device.id);
    let item = |kind, device, domain| Some(Kept { kind, device, domain, pages: None });
    // What is kept by the name of a domain is right as long as the domain is what it was.
    let renamed = matches!((old, new), (Some(old), Some(new)) if old.domain == new.domain);
    [
        item(Kind::Context, id, domain),
        item(Kind::Structure, None, domain).filter(|_| renamed),
        item(Kind::Leaf, None, domain).filter(|_| renamed),
        item(Kind::Remote, id, None).filter(|_| old.is_some() && device.remote == Feature::On),
        item(Kind::Access, id, domain).filter(|_| old.is_some()),
    ]
}

/// What is left of `legal` after the commands: what the last wait is behind of counts, and no more.
fn run(legal: &Legal, unit: &Unit, commands: &[Command]) -> Legal {
    let waited = commands.iter().rposition(|command| command.effect().is_none()).unwrap_or(0);
    let mut present = *legal;
    let mut rest = commands.get(..waited).unwrap_or_default();
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(batch(rest, unit.maker));
        present = left(legal, &present, &|| batch.iter().filter_map(Command::effect));
        rest = after;
    }
    present
}

/// How many of the commands go before the others begin: those up to a wait, and with Intel those of the first rank, where the ranks up
/// to the wait never fall. Where they do, less is counted on than promised.
fn batch(commands: &[Command], maker: Maker) -> usize {
    let rank = |command: &Command| command.effect().as_ref().map(Effect::rank);
    let mut window = commands.split(|command| rank(command).is_none());
    match window.next() {
        Some(window @ [first, ..]) if maker == Maker::Intel && window.is_sorted_by_key(rank) => {
            window.iter().take_while(|command| rank(command) == rank(first)).count()
        }
        Some(window @ [_, ..]) => window.len(),
        _ => 1,
    }
}
