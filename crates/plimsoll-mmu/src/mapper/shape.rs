//! Split and merge: what is mapped stays, the size of the leaves changes.
use super::{Covered, MapError, Mapper, Need, Slot, new_table, slots, through};
use crate::address::{Level, Output, Span, entry_at};
use crate::entry::{Entry, Leaf, Table};
use crate::format::Format;
use crate::memory::{Invalidate, TableFrames, TableMemory};

/// The most entries a group has: 128 pages of 16 KiB (Arm).
const MAX_GROUP: usize = 128;

impl<F: Format, M: TableMemory, P: TableFrames, I: Invalidate> Mapper<'_, F, M, P, I> {
    /// Splits leaves of `span` until none is at a higher level than `to`. Returns how many were split.
    ///
    /// # Errors
    /// A frame is missing: then nothing was changed. Or an entry is malformed, or the memory fails.
    pub fn split(&mut self, span: Span, to: Level) -> Result<u64, MapError<M::Error>> {
        let range = Self::offsets(span)?;
        let mut need = Need::default();
        self.count_splits(Some(self.root), F::root(), range, to, &mut need)?;
        self.afford(&need)?;
        let split = self.split_range(self.root, F::root(), range, to);
        self.caches.invalidate(span);
        split
    }

    fn count_splits(
        &self,
        table: Option<Output>,
        level: Level,
        (first, last): (u64, u64),
        to: Level,
        need: &mut Need,
    ) -> Result<(), MapError<M::Error>> {
        let Some(below) = level.below().filter(|_| level > to) else { return Ok(()) };
        for slot in slots::<F>(level, first, last) {
            let Some((next, below, range)) = self.under(table, level, below, &slot)? else { continue };
            if next.is_none() {
                need[below.subscript()] += 1;
            }
            self.count_splits(next, below, range, to, need)?;
        }
        Ok(())
    }

    /// The table that a leaf of `slot` will have been split into, `None`, or the one that its entry names, its level, and the part of
    /// the range that goes through it; nothing if none does. `table` is `None` for one that a split will make.
    #[expect(clippy::type_complexity, reason = "it is taken apart where it is made")]
    pub(super) fn under(
        &self,
        table: Option<Output>,
        level: Level,
        below: Level,
        slot: &Slot,
    ) -> Result<Option<(Option<Output>, Level, (u64, u64))>, MapError<M::Error>> {
        let split = Some((None, below, (slot.first, slot.last)));
        let Some(table) = table else { return Ok(split) };
        Ok(match self.entry(level, entry_at(table, slot.index))?.1 {
            Entry::Table(next) => {
                through::<F>(&next, level, slot).map(|(below, range)| (Some(next.at), below, range))
            }
            Entry::Leaf(_) => split,
            _ => None,
        })
    }

    fn split_range(
        &mut self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
        to: Level,
    ) -> Result<u64, MapError<M::Error>> {
        let Some(below) = level.below().filter(|_| level > to) else { return Ok(0) };
        let mut split = 0;
        for slot in slots::<F>(level, first, last) {
            let at = entry_at(table, slot.index);
            match self.entry(level, at)?.1 {
                Entry::Table(next) => {
                    if let Some((below, range)) = through::<F>(&next, level, &slot) {
                        split += self.split_range(next.at, below, range, to)?;
                    }
                }
                Entry::Leaf(leaf) => {
                    let next = self.split_entry(table, level, below, (&slot, &leaf))?;
                    split += 1 + self.split_range(next, below, (slot.first, slot.last), to)?;
                }
                _ => {}
            }
        }
        Ok(split)
    }

    /// Replaces `leaf`, which is that of `slot`, in `table` by a table of leaves that say the same. The caller invalidates.
    pub(super) fn split_entry(
        &mut self,
        table: Output,
        level: Level,
        below: Level,
        (slot, leaf): (&Slot, &Leaf),
    ) -> Result<Output, MapError<M::Error>> {
        let at = entry_at(table, slot.index);
        self.ungroup(table, level, (slot, leaf), (slot.first, slot.last))?;
        let table = self.take(below)?;
        let word = self.table_word(table, level)?;
        let breaks = F::break_before_make(&self.caps);
        // Anew from each word that is found: an accessed or dirty bit set meanwhile is in all the parts.
        let result = self.change(level, at, |raw| {
            let Entry::Leaf(leaf) = F::decode(raw, level, &self.caps) else {
                return Err(MapError::Contended { level, at });
            };
            let shift = F::shift(below);
            for index in 0..F::entries(below) {
                let part = Leaf { output: Output(leaf.output.0 + (index << shift)), shift, ..leaf };
                let part = self.encode(&Entry::Leaf(part), below)?;
                self.write(below, entry_at(table, index), part)?;
            }
            Ok(if breaks { 0 } else { word })
        });
        if let Err(error) = result {
            self.zero(table, below)?;
            self.frames.give(below, table);
            return Err(error);
        }
        if breaks {
            self.forget(slot.span::<F>(level));
            self.write(level, at, word)?;
        }
        Ok(table)
    }

    fn zero(&self, table: Output, level: Level) -> Result<(), MapError<M::Error>> {
        for index in 0..F::entries(level) {
            self.write(level, entry_at(table, index), 0)?;
        }
        Ok(())
    }

    /// Where `leaf`, which is `slot`'s, is one of a naturally aligned group that maps one run (Svnapot, Arm's contiguous hint) and the
    /// range does not cover the group, makes each entry of the group speak for itself. The caller invalidates.
    pub(super) fn ungroup(
        &mut self,
        table: Output,
        level: Level,
        (slot, leaf): (&Slot, &Leaf),
        (first, last): (u64, u64),
    ) -> Result<(), MapError<M::Error>> {
        let shift = F::shift(level);
        let begin = slot.first >> leaf.shift << leaf.shift;
        if leaf.shift == shift || (first <= begin && begin + ((1 << leaf.shift) - 1) <= last) {
            return Ok(());
        }
        let size = 1 << (leaf.shift - shift);
        let head = slot.index & !(size - 1);
        let alone = |member: u64, found: Leaf| Leaf {
            output: Output(found.base().0 + (member << shift)),
            shift,
            ..found
        };
        let joined = |entry| match entry {
            Entry::Leaf(found) if found.shift == leaf.shift => Some(found),
            _ => None,
        };
        if !F::break_before_make(&self.caps) {
            for member in 0..size {
                let at = entry_at(table, head + member);
                if joined(self.entry(level, at)?.1).is_some() {
                    self.change_leaf(level, at, |found| alone(member, found))?;
                }
            }
            return Ok(());
        }
        let mut broken = [None; MAX_GROUP];
        for (member, place) in (0..size).zip(&mut broken) {
            let (raw, entry) = self.entry(level, entry_at(table, head + member))?;
            if let Some(found) = joined(entry) {
                // Before anything is broken: what cannot be said alone stays as it is.
                self.encode(&Entry::Leaf(alone(member, found)), level)?;
                *place = Some(raw);
            }
        }
        for (member, raw) in (0..size).zip(&mut broken) {
            if let Some(raw) = raw {
                *raw = self.write(level, entry_at(table, head + member), 0)?;
            }
        }
        self.forget(Span::new(F::extend(begin), 1 << leaf.shift));
        for (member, raw) in (0..size).zip(broken) {
            // As it was when it was broken: a processor may have set bits in it until then.
            if let Some(Entry::Leaf(found)) = raw.map(|raw| F::decode(raw, level, &self.caps)) {
                let word = self.encode(&Entry::Leaf(alone(member, found)), level)?;
                self.write(level, entry_at(table, head + member), word)?;
            }
        }
        Ok(())
    }

    /// Replaces each table wholly inside `span` whose leaves make up one larger leaf. A part that was accessed or dirty makes
    /// the whole so. Returns how many were replaced.
    ///
    /// # Errors
    /// An entry is malformed, or the memory fails.
    pub fn merge(&mut self, span: Span) -> Result<u64, MapError<M::Error>> {
        let range = Self::offsets(span)?;
        self.merge_range(self.root, F::root(), range)
    }

    fn merge_range(
        &mut self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
    ) -> Result<u64, MapError<M::Error>> {
        let Some(below) = level.below() else { return Ok(0) };
        let mut merged = 0;
        for slot in slots::<F>(level, first, last) {
            let at = entry_at(table, slot.index);
            let Entry::Table(next) = self.entry(level, at)?.1 else { continue };
            if let Some((lower, range)) = through::<F>(&next, level, &slot) {
                merged += self.merge_range(next.at, lower, range)?;
            }
            if slot.covered == Covered::Wholly && self.merge_entry(level, below, at, &next, &slot)? {
                merged += 1;
            }
        }
        Ok(merged)
    }

    /// The leaf that says what all the leaves of a table say, if there is one.
    fn whole(&self, table: &Table, level: Level, below: Level) -> Result<Option<Leaf>, MapError<M::Error>> {
        let (part, shift) = (F::shift(below), F::shift(level));
        let plain = Table { accessed: false, ..*table } == new_table::<F>(table.at);
        if !plain || level > F::largest_leaf(&self.caps) {
            return Ok(None);
        }
        let mut whole: Option<Leaf> = None;
        for index in 0..F::entries(below) {
            let Entry::Leaf(leaf) = self.entry(below, entry_at(table.at, index))?.1 else { return Ok(None) };
            let sum = whole.get_or_insert(Leaf { shift, ..leaf });
            let expected = Leaf {
                output: Output(sum.output.0 + (index << part)),
                shift: part,
                accessed: leaf.accessed,
                dirty: leaf.dirty,
                ..*sum
            };
            if leaf != expected {
                return Ok(None);
            }
            sum.accessed |= leaf.accessed;
            sum.dirty |= leaf.dirty;
        }
        Ok(whole.filter(|leaf| F::encode(&Entry::Leaf(*leaf), level, &self.caps).is_ok()))
    }

    fn merge_entry(
        &mut self,
        level: Level,
        below: Level,
        at: Output,
        table: &Table,
        slot: &Slot,
    ) -> Result<bool, MapError<M::Error>> {
        let Some(leaf) = self.whole(table, level, below)? else { return Ok(false) };
        let word = self.encode(&Entry::Leaf(leaf), level)?;
        let breaks = F::break_before_make(&self.caps);
        self.write(level, at, if breaks { 0 } else { word })?;
        self.forget(slot.span::<F>(level));
        // Until then a processor may have set bits in the parts.
        let (mut accessed, mut dirty) = (false, false);
        for index in 0..F::entries(below) {
            let raw = self.write(below, entry_at(table.at, index), 0)?;
            if let Entry::Leaf(part) = F::decode(raw, below, &self.caps) {
                accessed |= part.accessed;
                dirty |= part.dirty;
            }
        }
        if breaks {
            self.write(level, at, word)?;
        }
        self.change_leaf(level, at, |leaf| Leaf {
            accessed: leaf.accessed | accessed,
            dirty: leaf.dirty | dirty,
            ..leaf
        })?;
        self.frames.give(below, table.at);
        Ok(true)
    }
}
