//! Walk, iterate and harvest: what is mapped is looked at.
use super::{MapError, Mapper, slots, through};
use crate::address::{Input, Level, Output, Span, entry_at};
use crate::entry::{Entry, Leaf, Malformed, Permissions};
use crate::format::Format;
use crate::memory::{Invalidate, TableFrames, TableMemory};
use crate::walk::{Dead, End, Found, Step, Walked, descend, translate};

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

/// Is shown each leaf and where its entry is, and may end the visit.
type Visitor<'a, E> = dyn FnMut(Output, &Mapping) -> Result<(), MapError<E>> + 'a;

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
        let range = Self::offsets(span)?;
        self.visit(self.root, F::root(), range, Permissions::all(), &mut |_, mapping| {
            show(mapping);
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
        let range = Self::offsets(span)?;
        let (accessed, dirty) = match clear {
            Clear::Accessed => (true, false),
            Clear::Dirty => (false, true),
            Clear::Both => (true, true),
        };
        let mut any = false;
        let result = self.visit(self.root, F::root(), range, Permissions::all(), &mut |at, mapping| {
            let set = |leaf: &Leaf| (accessed && leaf.accessed) || (dirty && leaf.dirty);
            if !set(&mapping.leaf) {
                return Ok(());
            }
            let leaf = self.change_leaf(mapping.level, at, |leaf| Leaf {
                accessed: leaf.accessed && !accessed,
                dirty: leaf.dirty && !dirty,
                ..leaf
            })?;
            any = true;
            show(&Touched { input: mapping.input, leaf });
            Ok(())
        });
        if any {
            self.caches.invalidate(span);
        }
        result
    }

    fn visit(
        &self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
        permissions: Permissions,
        show: &mut Visitor<'_, M::Error>,
    ) -> Result<(), MapError<M::Error>> {
        for slot in slots::<F>(level, first, last) {
            let at = entry_at(table, slot.index);
            match self.entry(level, at)?.1 {
                Entry::Table(next) => {
                    if let Some((below, range)) = through::<F>(&next, level, &slot) {
                        self.visit(next.at, below, range, permissions & next.permissions, show)?;
                    }
                }
                Entry::Leaf(leaf) => {
                    let shift = F::shift(level);
                    let input = F::extend(slot.first >> shift << shift);
                    let permissions = permissions & leaf.permissions;
                    show(at, &Mapping { input, level, leaf, permissions })?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}
