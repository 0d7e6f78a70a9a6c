//! Walk, iterate and harvest: what is mapped is looked at.
use super::{MapError, Mapper, slot, through};
use crate::address::{Input, Level, Output, Span, entry_at};
use crate::entry::{Entry, Leaf, Malformed, Permissions};
use crate::format::{Format, Row, Words};
use crate::memory::{Invalidate, TableFrames, TableMemory};
use crate::walk::{Dead, End, Found, Step, Walked, descend, output, translate};

/// A leaf and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The first address it translates.
    pub input: Input,
    /// Its level.
    pub level: Level,
    /// The leaf.
    pub leaf: Leaf,
    /// What all entries on the way to it allow together.
    pub permissions: Permissions,
}

/// What becomes of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// It goes there, by that leaf.
    Mapped(Output, Mapping),
    /// An entry is absent, or leaves levels out of which the address has bits set.
    Absent {
        /// The table's level.
        level: Level,
        /// The entry.
        at: Output,
    },
}

/// Which bits a harvest clears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Accessed.
    Accessed,
    /// Dirty.
    Dirty,
    /// Accessed and dirty.
    Both,
}

/// A leaf that was accessed or written since its bits were cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touched {
    /// The first address it translates.
    pub input: Input,
    /// The leaf as it was before anything was cleared.
    pub leaf: Leaf,
}

/// What the entries that name tables permit together: those that are plain by their words, the others by what they say.
#[derive(Clone, Copy)]
struct Rights {
    plain: Words,
    others: Permissions,
}

/// The entry because of which nothing is mapped, if that is why the way ended.
fn absent<E>(end: End<E>) -> Result<(Level, Output), MapError<E>> {
    let End { level, step: Step { at, .. }, dead, .. } = end;
    match dead {
        Dead::Absent | Dead::Malformed(Malformed::Skipped) => Ok((level, at)),
        Dead::Malformed(reason) => Err(MapError::Malformed { level, at, reason }),
        Dead::Memory(error) => Err(MapError::Memory { level, at, error }),
    }
}

impl<F: Format, M: TableMemory, P: TableFrames, I: Invalidate> Mapper<'_, F, M, P, I> {
    /// Where `input` goes, by the leaf's word and not by what it says: what lookups need. `None` where nothing is mapped; [`walk`](Self::walk)
    /// says which entry is why. Sets no bits.
    ///
    /// # Errors
    /// Those of [`walk`](Self::walk).
    #[inline(always)]
    pub fn translate(&self, input: Input) -> Result<Option<Found>, MapError<M::Error>> {
        if !F::accepts(input) {
            return Err(MapError::Span(Span::one(input)));
        }
        match translate::<F, M>(self.memory, self.root, (&self.caps, &self.plains), input) {
            Ok(found) => Ok(Some(found)),
            Err(end) => absent(end).map(|_| None),
        }
    }

    /// Where `input` goes. Sets no bits.
    ///
    /// # Errors
    /// The format does not translate the address, an entry is malformed, or the memory fails.
    pub fn walk(&self, input: Input) -> Result<Translation, MapError<M::Error>> {
        if !F::accepts(input) {
            return Err(MapError::Span(Span::one(input)));
        }
        match descend::<F, M>(self.memory, self.root, &self.caps, input) {
            Ok(walked) => {
                let Walked { leaf, level, permissions, output, .. } = walked;
                let shift = F::shift(level);
                let input = F::extend(F::offset(input) >> shift << shift);
                Ok(Translation::Mapped(output, Mapping { input, level, leaf, permissions }))
            }
            Err(end) => absent(end).map(|(level, at)| Translation::Absent { level, at }),
        }
    }

    /// Shows every leaf that translates an address of `span`, in order of addresses.
    ///
    /// # Errors
    /// An entry is malformed, or the memory fails: what came before it was shown.
    pub fn for_each(&self, span: Span, mut show: impl FnMut(&Mapping)) -> Result<(), MapError<M::Error>> {
        self.translate_range(span, |input, found| {
            if let Entry::Leaf(leaf) = F::decode(found.word, found.level, &self.caps) {
                show(&Mapping { input, level: found.level, leaf, permissions: found.permissions });
            }
        })
    }

    /// Shows the same, by the leaves' words and not by what they say: the first address that an entry translates, and where that goes.
    /// Each table is gone through once and each entry is read once, whatever other tables the entries name. Sets no bits.
    ///
    /// # Errors
    /// Those of [`for_each`](Self::for_each).
    pub fn translate_range(
        &self,
        span: Span,
        mut show: impl FnMut(Input, &Found),
    ) -> Result<(), MapError<M::Error>> {
        self.visit_span(span, &mut |_, input, found| {
            show(input, found);
            Ok(())
        })
    }

    /// Clears accessed or dirty bits of the leaves of `span` and shows those that had one of them set. A leaf that is
    /// larger than its part of the span is shown all the same.
    ///
    /// A page shown as not dirty may be taken as unchanged only after this has returned: until then a processor may
    /// write it without setting the bit.
    ///
    /// # Errors
    /// An entry is malformed, or the memory fails: what came before it was shown, and cleared.
    pub fn harvest(
        &mut self,
        span: Span,
        clear: Clear,
        mut show: impl FnMut(&Touched),
    ) -> Result<(), MapError<M::Error>> {
        let (accessed, dirty) = match clear {
            Clear::Accessed => (true, false),
            Clear::Dirty => (false, true),
            Clear::Both => (true, true),
        };
        let mut any = false;
        let result = self.visit_span(span, &mut |at, input, found| {
            let set = |leaf: &Leaf| (accessed && leaf.accessed) || (dirty && leaf.dirty);
            match F::decode(found.word, found.level, &self.caps) {
                Entry::Leaf(leaf) if set(&leaf) => {}
                _ => return Ok(()),
            }
            let leaf = self.change_leaf(found.level, at, |leaf| Leaf {
                accessed: leaf.accessed && !accessed,
                dirty: leaf.dirty && !dirty,
                ..leaf
            })?;
            any = true;
            show(&Touched { input, leaf });
            Ok(())
        });
        if any {
            self.caches.invalidate(span);
        }
        result
    }

    fn visit_span(
        &self,
        span: Span,
        show: &mut impl FnMut(Output, Input, &Found) -> Result<(), MapError<M::Error>>,
    ) -> Result<(), MapError<M::Error>> {
        let rights = Rights { plain: Words::NONE, others: Permissions::all() };
        self.visit((self.root, F::root()), Self::offsets(span)?, rights, show)
    }

    /// Shows each leaf of a range and where its entry is; `show` may end the visit.
    fn visit(
        &self,
        (table, level): (Output, Level),
        (first, last): (u64, u64),
        rights: Rights,
        show: &mut impl FnMut(Output, Input, &Found) -> Result<(), MapError<M::Error>>,
    ) -> Result<(), MapError<M::Error>> {
        let (Row { plain, .. }, shift) = (self.plains.at(level), F::shift(level));
        // Neighbours are alike but for where they lead: what they permit is found out once.
        let mut alike = None;
        for number in first >> shift..(last >> shift) + 1 {
            let at = entry_at(table, number & (F::entries(level) - 1));
            let word = self.read(level, at)?;
            if plain.leaf.fits(word) {
                let input = F::extend(number << shift);
                let output = output::<F>(word, shift, input);
                let said = word & !F::ADDRESS;
                let permissions = match alike {
                    Some((like, permissions)) if like == said => permissions,
                    _ => F::permits(rights.plain, word, &self.caps) & rights.others,
                };
                alike = Some((said, permissions));
                show(at, input, &Found { output, shift, level, permissions, word })?;
            } else {
                self.visit_entry((at, level, word), (number, first, last), rights, show)?;
            }
        }
        Ok(())
    }

    /// What is not a plain leaf: a table, nothing, or something that is decoded.
    fn visit_entry(
        &self,
        (at, level, word): (Output, Level, u64),
        (number, first, last): (u64, u64, u64),
        rights: Rights,
        show: &mut impl FnMut(Output, Input, &Found) -> Result<(), MapError<M::Error>>,
    ) -> Result<(), MapError<M::Error>> {
        let slot = slot::<F>(level, number, (first, last));
        match self.decode(level, at, word)? {
            Entry::Table(next) => {
                let Some((below, range)) = through::<F>(&next, level, &slot) else { return Ok(()) };
                let rights = match self.plains.at(level).plain.table.fits(word) {
                    true => Rights { plain: rights.plain.and(word), ..rights },
                    false => Rights { others: rights.others & next.permissions, ..rights },
                };
                self.visit((next.at, below), range, rights, show)
            }
            Entry::Leaf(leaf) => {
                let input = F::extend(number << F::shift(level));
                let inside = F::offset(input) & ((1 << leaf.shift) - 1);
                let found = Found {
                    output: Output(leaf.base().0 | inside),
                    shift: leaf.shift,
                    level,
                    permissions: F::through(rights.plain) & rights.others & leaf.permissions,
                    word,
                };
                show(at, input, &found)
            }
            _ => Ok(()),
        }
    }
}
