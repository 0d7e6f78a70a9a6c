//! The way of an address through the tables, in any format, as a processor goes it.
//!
//! Enters: an address. Leaves: the leaf and the entries on the way to it, or the entry where the way ends. Each step goes
//! one level down, so that tables that name themselves or each other end like any others. What may be done through the
//! leaf, and what it is called when it may not, is for the architectures: [`crate::x86`], [`crate::ept`].
//!
//! All walks go by plain words ([`crate::format::Plain`]) as far as there are such, which is to the end almost always. What is not
//! plain is decoded, and so is the rest of the way behind it: what is rare or wrong costs more, and comes to the same.
use crate::address::{Input, Level, MAX_LEVELS, Output, entry_at};
use crate::entry::{Entry, Leaf, Malformed, Permissions, Table};
use crate::format::{Format, Plains, Row, Words};
use crate::memory::TableMemory;

/// How often a walk begins again because an entry changed before its accessed bit was set.
const TRIES: usize = 8;

/// What an instruction does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// It reads data.
    Read,
    /// It writes data.
    Write,
    /// It is fetched.
    Fetch,
}

impl Access {
    /// What an entry must permit for it.
    pub const fn needs(self) -> Permissions {
        match self {
            Self::Read => Permissions::READ,
            Self::Write => Permissions::WRITE,
            Self::Fetch => Permissions::EXECUTE,
        }
    }
}

/// Whether a walk leaves accessed and dirty bits behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// As a processor does.
    Set,
    /// For an observer.
    Leave,
}

/// An entry on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Where it is.
    pub at: Output,
    /// Its word.
    pub raw: u64,
}

/// Where an address goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walked {
    /// The address after this stage.
    pub output: Output,
    /// The leaf, as it was found.
    pub leaf: Leaf,
    /// The leaf's level.
    pub level: Level,
    /// What all entries on the way permit together.
    pub permissions: Permissions,
    steps: [Step; MAX_LEVELS],
}

impl Walked {
    /// The entry of `level` on the way; nothing useful below the leaf's level or above the root's.
    pub fn step(&self, level: Level) -> Step {
        self.steps.get(level.subscript()).copied().unwrap_or_default()
    }
}

/// Why a walk did not reach a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dead<E> {
    /// The entry is absent.
    Absent,
    /// The entry is malformed.
    Malformed(Malformed),
    /// The entry cannot be read.
    Memory(E),
}

/// Where a walk ended before it reached a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End<E> {
    /// The table's level.
    pub level: Level,
    /// The entry and its word; 0 where it could not be read.
    pub step: Step,
    /// What the entries before it permit together.
    pub permissions: Permissions,
    /// Why.
    pub dead: Dead<E>,
}

/// Where an address goes, by the word of its leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The address after this stage.
    pub output: Output,
    /// log2 of the bytes of the page it is in: the level's, or more where a group of neighbours maps one run.
    pub shift: u32,
    /// The leaf's level.
    pub level: Level,
    /// What all entries on the way permit together.
    pub permissions: Permissions,
    /// The leaf's word. [`Format::decode`] has it say memory type, key, marks and software's bits.
    pub word: u64,
}

/// Where plain words lead: the entry of `level` at `step`, through the table at `table`.
#[derive(Clone, Copy)]
struct Way {
    table: Output,
    level: Level,
    step: Step,
    tables: Words,
}

/// Why plain words do not lead to a leaf: the word there is not plain, or cannot be read.
struct Halt<E> {
    way: Way,
    unread: Option<E>,
}

/// Goes the way of `input` by plain words alone. `passed` is shown each entry that was read.
#[inline(always)]
fn plainly<F: Format, M: TableMemory>(
    memory: &M,
    root: Output,
    rows: impl Fn(Level) -> Row,
    input: Input,
    mut passed: impl FnMut(Level, Step),
) -> Result<(Way, u32), Halt<M::Error>> {
    let (mut table, mut level, mut tables) = (root, F::root(), Words::NONE);
    // Counted, so that the compiler writes the levels out one after the other.
    for _ in 1..F::LEVELS {
        let (step, Row { plain, shift }) = match pass::<F, M>(memory, (table, level), &rows, input) {
            Ok(passed) => passed,
            Err((step, error)) => {
                return Err(Halt { way: Way { table, level, step, tables }, unread: Some(error) });
            }
        };
        passed(level, step);
        if !plain.table.fits(step.raw) {
            let way = Way { table, level, step, tables };
            return if plain.leaf.fits(step.raw) {
                Ok((way, shift))
            } else {
                Err(Halt { way, unread: None })
            };
        }
        tables = tables.and(step.raw);
        table = Output((step.raw & F::ADDRESS) << F::ADDRESS_DOWN);
        level = Level(level.0 - 1);
    }
    let (step, Row { plain, shift }) = match pass::<F, M>(memory, (table, level), &rows, input) {
        Ok(passed) => passed,
        Err((step, error)) => {
            return Err(Halt { way: Way { table, level, step, tables }, unread: Some(error) });
        }
    };
    passed(level, step);
    let way = Way { table, level, step, tables };
    if plain.leaf.fits(step.raw) { Ok((way, shift)) } else { Err(Halt { way, unread: None }) }
}

/// Reads the entry of `input` in a table.
#[inline(always)]
fn pass<F: Format, M: TableMemory>(
    memory: &M,
    (table, level): (Output, Level),
    rows: &impl Fn(Level) -> Row,
    input: Input,
) -> Result<(Step, Row), (Step, M::Error)> {
    let at = entry_at(table, F::index(input, level));
    match memory.read(at) {
        Ok(raw) => Ok((Step { at, raw }, rows(level))),
        Err(error) => Err((Step { at, raw: 0 }, error)),
    }
}

/// Where a plain leaf of 2^`shift` bytes leads.
#[inline(always)]
pub(crate) fn output<F: Format>(word: u64, shift: u32, input: Input) -> Output {
    let base = (word & F::ADDRESS) << F::ADDRESS_DOWN;
    Output(base ^ (base ^ input.0) & ((1 << shift) - 1))
}

/// Where `input` goes, which the format translates, from the table at `root`, which is aligned to its size.
#[inline(always)]
pub(crate) fn translate<F: Format, M: TableMemory>(
    memory: &M,
    root: Output,
    (caps, plains): (&F::Caps, &Plains),
    input: Input,
) -> Result<Found, End<M::Error>> {
    match plainly::<F, M>(memory, root, |level| plains.at(level), input, |_, _| {}) {
        Ok((Way { level, step, tables, .. }, shift)) => Ok(Found {
            output: output::<F>(step.raw, shift, input),
            shift,
            level,
            permissions: F::permits(tables, step.raw, caps),
            word: step.raw,
        }),
        Err(halt) => go_on::<F, M>(memory, halt, NO_STEPS, caps, input).map(|walked| Found {
            output: walked.output,
            shift: walked.leaf.shift,
            level: walked.level,
            permissions: walked.permissions,
            word: walked.step(walked.level).raw,
        }),
    }
}

const NO_STEPS: [Step; MAX_LEVELS] = [Step { at: Output(0), raw: 0 }; MAX_LEVELS];

/// Goes the way of `input`, which the format translates, from the table at `root`, which is aligned to its size, and keeps all of it.
#[inline(always)]
pub(crate) fn descend<F: Format, M: TableMemory>(
    memory: &M,
    root: Output,
    caps: &F::Caps,
    input: Input,
) -> Result<Walked, End<M::Error>> {
    let mut steps = NO_STEPS;
    let way = plainly::<F, M>(
        memory,
        root,
        |level| Row::of::<F>(level, caps),
        input,
        |level, step| {
            if let Some(place) = steps.get_mut(level.subscript()) {
                *place = step;
            }
        },
    );
    let halt = match way {
        Ok((way, shift)) => match F::decode(way.step.raw, way.level, caps) {
            Entry::Leaf(leaf) => {
                let Way { level, step, tables, .. } = way;
                let (output, permissions) =
                    (output::<F>(step.raw, shift, input), F::through(tables) & leaf.permissions);
                return Ok(Walked { output, leaf, level, permissions, steps });
            }
            // No format has plain leaves that are something else.
            _ => Halt { way, unread: None },
        },
        Err(halt) => halt,
    };
    go_on::<F, M>(memory, halt, steps, caps, input)
}

/// Goes on by decoding where plain words ended.
#[cold]
#[inline(never)]
fn go_on<F: Format, M: TableMemory>(
    memory: &M,
    halt: Halt<M::Error>,
    steps: [Step; MAX_LEVELS],
    caps: &F::Caps,
    input: Input,
) -> Result<Walked, End<M::Error>> {
    let Halt { way: Way { table, level, step, tables }, unread } = halt;
    let permissions = F::through(tables);
    if let Some(error) = unread {
        return Err(End { level, step, permissions, dead: Dead::Memory(error) });
    }
    let begin = Begin { word: Some(step.raw), steps, ..Begin::at(table, level, permissions) };
    descend_from::<F, M>(memory, begin, caps, input, |_, _, _| {})
}

/// Where the rest of a way begins.
pub(crate) struct Begin {
    /// A table, aligned to its size.
    table: Output,
    /// The table's level.
    level: Level,
    /// What the entries before it permit together.
    permissions: Permissions,
    /// The entry in it, if that was read.
    word: Option<u64>,
    /// The entries before it, as far as they are to be kept.
    steps: [Step; MAX_LEVELS],
}

impl Begin {
    /// At a table of `level`, behind entries that permit this together.
    pub(crate) const fn at(table: Output, level: Level, permissions: Permissions) -> Self {
        Self { table, level, permissions, word: None, steps: NO_STEPS }
    }
}

/// Goes the rest of the way of `input`, decoding each entry. `passed` is shown each on it that names a table, its level, and what the
/// entries up to it permit together.
pub(crate) fn descend_from<F: Format, M: TableMemory>(
    memory: &M,
    begin: Begin,
    caps: &F::Caps,
    input: Input,
    mut passed: impl FnMut(Level, &Table, Permissions),
) -> Result<Walked, End<M::Error>> {
    let Begin { mut table, mut level, mut permissions, mut word, mut steps } = begin;
    loop {
        let mut step = Step { at: entry_at(table, F::index(input, level)), raw: 0 };
        let end = |step, dead| End { level, step, permissions, dead };
        step.raw = match word.take() {
            Some(word) => word,
            None => memory.read(step.at).map_err(|error| end(step, Dead::Memory(error)))?,
        };
        if let Some(place) = steps.get_mut(level.subscript()) {
            *place = step;
        }
        match F::decode(step.raw, level, caps) {
            Entry::Absent { .. } => return Err(end(step, Dead::Absent)),
            Entry::Malformed(reason) => return Err(end(step, Dead::Malformed(reason))),
            Entry::Table(next) => {
                let Some(below) = next.leads_to(level) else {
                    return Err(end(step, Dead::Malformed(Malformed::TableAtLastLevel)));
                };
                if !F::passes(input, level, &next) {
                    return Err(end(step, Dead::Malformed(Malformed::Skipped)));
                }
                permissions &= next.permissions;
                passed(level, &next, permissions);
                (table, level) = (next.at, below);
            }
            Entry::Leaf(leaf) => {
                permissions &= leaf.permissions;
                let inside = F::offset(input) & ((1 << leaf.shift) - 1);
                return Ok(Walked {
                    output: Output(leaf.base().0 | inside),
                    leaf,
                    level,
                    permissions,
                    steps,
                });
            }
        }
    }
}

/// Goes the way of `input` and marks it as the access does that `judge` answers with; as none where it answers `None`. Begins
/// again when an entry changed meanwhile. `None` when the entries change faster than they can be walked.
#[inline]
pub(crate) fn attempt<F: Format, M: TableMemory, E>(
    memory: &M,
    root: Output,
    caps: &F::Caps,
    input: Input,
    ended: impl Fn(End<M::Error>) -> E,
    judge: impl Fn(&Walked) -> Result<Option<Access>, E>,
) -> Result<Option<Walked>, E> {
    for _ in 0..TRIES {
        let walked = descend::<F, M>(memory, root, caps, input).map_err(&ended)?;
        let marked = match judge(&walked)? {
            None => Marked::Done,
            Some(access) => mark::<F, M>(memory, caps, &walked, access).map_err(&ended)?,
        };
        if marked == Marked::Done {
            return Ok(Some(walked));
        }
    }
    Ok(None)
}

/// Whether a mark could be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marked {
    /// All are.
    Done,
    /// An entry is not what the walk read: walk again.
    Changed,
}

/// Sets the accessed bit in every entry on the way that keeps one, from the root on, and the dirty bit in the leaf after a
/// write.
fn mark<F: Format, M: TableMemory>(
    memory: &M,
    caps: &F::Caps,
    walked: &Walked,
    access: Access,
) -> Result<Marked, End<M::Error>> {
    for level in (walked.level.0..=F::LEVELS).rev().map(Level) {
        let step = walked.step(level);
        let new = F::marked(step.raw, level, caps, access);
        if new == step.raw {
            continue;
        }
        let found = memory.compare_exchange(step.at, step.raw, new).map_err(|error| End {
            level,
            step,
            permissions: walked.permissions,
            dead: Dead::Memory(error),
        })?;
        if found != step.raw {
            return Ok(Marked::Changed);
        }
    }
    Ok(Marked::Done)
}
