//! Map, unmap and protect: what is mapped changes.
use super::{Covered, Dropped, MapError, Mapper, Need, Slot, slot, slots, through};
use crate::address::{Level, Output, Span, entry_at};
use crate::entry::{Entry, Leaf, Permissions, Unencodable};
use crate::format::Format;
use crate::memory::{Invalidate, TableFrames, TableMemory};

/// What to map: the leaf of the range's first address, with which every other is in line.
struct Request {
    span: Span,
    first: u64,
    leaf: Leaf,
}

impl Request {
    /// The leaf of `level` that maps all of `slot`, if one can.
    fn leaf<F: Format>(&self, level: Level, slot: &Slot, caps: &F::Caps) -> Option<Leaf> {
        let shift = F::shift(level);
        let output = Output(self.leaf.output.0.checked_add(slot.first - self.first)?);
        let fits = slot.covered == Covered::Wholly
            && level <= F::largest_leaf(caps)
            && (shift <= self.leaf.shift || level == Level::PAGES)
            && output.0.is_multiple_of(1 << shift);
        fits.then_some(Leaf { output, shift, ..self.leaf })
    }
}

/// Entries of one table, side by side, each of which a leaf maps.
struct Row {
    /// The first address that they translate, and the last.
    first: u64,
    last: u64,
    /// The first one's word, and how much more each other's is.
    word: u64,
    step: u64,
}

impl Row {
    /// The parts of a range that are outside of it.
    fn outside(&self, (first, last): (u64, u64)) -> [Option<(u64, u64)>; 2] {
        let before = (first < self.first).then(|| (first, self.first - 1));
        let after = (self.last < last).then(|| (self.last + 1, last));
        [before, after]
    }

    const fn contains(&self, slot: &Slot) -> bool {
        self.first <= slot.first && slot.last <= self.last
    }
}

impl Request {
    /// All entries of a table of `level` that the range covers wholly, if leaves of that level can map them. The format can say all of
    /// them when it can say the first and the last.
    fn row<F: Format>(
        &self,
        level: Level,
        (first, last): (u64, u64),
        caps: &F::Caps,
    ) -> Result<Option<Row>, Unencodable> {
        let shift = F::shift(level);
        let (begin, end) = (first.div_ceil(1 << shift), (last + 1) >> shift);
        if begin >= end {
            return Ok(None);
        }
        let [one, other] = [begin, end - 1]
            .map(|number| self.leaf::<F>(level, &slot::<F>(level, number, (first, last)), caps));
        let (Some(one), Some(other)) = (one, other) else { return Ok(None) };
        F::encode(&Entry::Leaf(other), level, caps)?;
        let word = F::encode(&Entry::Leaf(one), level, caps)?;
        Ok(Some(Row { first: begin << shift, last: (end << shift) - 1, word, step: F::step(level) }))
    }
}

/// Where the entries of a table are that may not be there yet.
#[derive(Clone, Copy)]
enum Source {
    /// In memory.
    Table(Output),
    /// Nowhere: all are absent.
    New,
    /// Nowhere: the first will be this word, which leaves levels out, the others absent.
    Over(u64),
}

impl<F: Format, M: TableMemory, P: TableFrames, I: Invalidate> Mapper<'_, F, M, P, I> {
    /// Maps `span` to consecutive memory from `leaf.output` on, with leaves as large as alignment, the processor and
    /// `leaf.shift` allow, which otherwise say what `leaf` says.
    ///
    /// # Errors
    /// A page of the range is mapped, a frame is missing, the format cannot say it: then nothing was changed. Or the
    /// tables' memory fails.
    pub fn map(&mut self, span: Span, leaf: Leaf) -> Result<(), MapError<M::Error>> {
        let (first, last) = Self::offsets(span)?;
        let request = Request { span, first, leaf };
        let mut need = Need::default();
        self.check_map(Source::Table(self.root), F::root(), (first, last), &request, &mut need)?;
        self.afford(&need)?;
        self.fill(self.root, F::root(), (first, last), &request)
    }

    /// Counts the tables that mapping takes.
    fn check_map(
        &self,
        source: Source,
        level: Level,
        (first, last): (u64, u64),
        request: &Request,
        need: &mut Need,
    ) -> Result<(), MapError<M::Error>> {
        let row = self.row(level, (first, last), request)?;
        let parts = match (source, &row) {
            (Source::New, Some(row)) => row.outside((first, last)),
            _ => [Some((first, last)), None],
        };
        for slot in parts.into_iter().flatten().flat_map(|(first, last)| slots::<F>(level, first, last)) {
            let (raw, entry) = match source {
                Source::Table(table) => {
                    let at = entry_at(table, slot.index);
                    match self.read(level, at)? {
                        0 if row.as_ref().is_some_and(|row| row.contains(&slot)) => continue,
                        raw => (raw, self.decode(level, at, raw)?),
                    }
                }
                Source::Over(word) if slot.index == 0 => (word, F::decode(word, level, &self.caps)),
                Source::New | Source::Over(_) => (0, Entry::Absent { software: 0 }),
            };
            let range = (slot.first, slot.last);
            match (entry, level.below()) {
                (Entry::Table(next), Some(below)) => match through::<F>(&next, level, &slot) {
                    Some((lower, part)) if part == range => {
                        self.check_map(Source::Table(next.at), lower, range, request, need)?;
                    }
                    _ => {
                        need[below.subscript()] += 1;
                        self.check_map(Source::Over(raw), below, range, request, need)?;
                    }
                },
                (Entry::Absent { .. }, below) => {
                    if let Some(leaf) = request.leaf::<F>(level, &slot, &self.caps) {
                        self.encode(&Entry::Leaf(leaf), level)?;
                    } else if let Some(below) = below {
                        need[below.subscript()] += 1;
                        self.check_map(Source::New, below, range, request, need)?;
                    } else {
                        // Not even a page: the output is not aligned, or ends before the range does.
                        let reason = Unencodable::Address(request.leaf.output);
                        return Err(MapError::Unencodable { level, reason });
                    }
                }
                _ => {
                    let there = slot.span::<F>(level).unwrap_or(request.span);
                    return Err(MapError::Mapped { wanted: request.span, there });
                }
            }
        }
        Ok(())
    }

    fn row(
        &self,
        level: Level,
        range: (u64, u64),
        request: &Request,
    ) -> Result<Option<Row>, MapError<M::Error>> {
        let row = request.row::<F>(level, range, &self.caps);
        row.map_err(|reason| MapError::Unencodable { level, reason })
    }

    fn fill(
        &mut self,
        table: Output,
        level: Level,
        range: (u64, u64),
        request: &Request,
    ) -> Result<(), MapError<M::Error>> {
        let mut parts = [Some(range), None];
        if let Some(row) = self.row(level, range, request)? {
            let mut word = row.word;
            let shift = F::shift(level);
            let mask = F::entries(level) - 1;
            for number in row.first >> shift..=row.last >> shift {
                if self.exchange(level, entry_at(table, number & mask), 0, word)? != 0 {
                    // A table, or what software kept in an absent entry.
                    self.fill_slot(table, level, &slot::<F>(level, number, (row.first, row.last)), request)?;
                }
                word = word.wrapping_add(row.step);
            }
            parts = row.outside(range);
        }
        for slot in parts.into_iter().flatten().flat_map(|(first, last)| slots::<F>(level, first, last)) {
            self.fill_slot(table, level, &slot, request)?;
        }
        Ok(())
    }

    fn fill_slot(
        &mut self,
        table: Output,
        level: Level,
        slot: &Slot,
        request: &Request,
    ) -> Result<(), MapError<M::Error>> {
        let at = entry_at(table, slot.index);
        let range = (slot.first, slot.last);
        let (raw, entry) = self.entry(level, at)?;
        match (entry, level.below()) {
            (Entry::Table(next), Some(below)) => {
                let (next, below) = match through::<F>(&next, level, slot) {
                    Some((lower, part)) if part == range => (next.at, lower),
                    _ => (self.put_between(level, at, below, slot)?, below),
                };
                self.fill(next, below, range, request)
            }
            (Entry::Absent { .. }, below) => {
                let word = match (request.leaf::<F>(level, slot, &self.caps), below) {
                    (Some(leaf), _) => self.encode(&Entry::Leaf(leaf), level)?,
                    (None, Some(below)) => {
                        let new = self.take(below)?;
                        self.fill(new, below, range, request)?;
                        self.table_word(new, level)?
                    }
                    (None, None) => return Err(MapError::Contended { level, at }),
                };
                self.replace(level, at, raw, word)
            }
            _ => Err(MapError::Contended { level, at }),
        }
    }

    /// Puts a table of `below` between the entry at `at`, which leaves that level out, and the table it names.
    fn put_between(
        &mut self,
        level: Level,
        at: Output,
        below: Level,
        slot: &Slot,
    ) -> Result<Output, MapError<M::Error>> {
        let table = self.take(below)?;
        let word = self.table_word(table, level)?;
        self.change(level, at, |found| {
            self.write(below, table, found)?;
            Ok(word)
        })?;
        // What is cached of the entry has levels left out still.
        self.forget(slot.span::<F>(level));
        Ok(table)
    }

    /// Unmaps what is mapped in `span`, splits larger leaves at its ends, and gives back tables that became empty. What
    /// software kept in absent entries of the range is gone too. Returns how many leaves were removed.
    ///
    /// # Errors
    /// A frame for splitting is missing: then nothing was changed. Or an entry is malformed, or the memory fails.
    pub fn unmap(&mut self, span: Span) -> Result<u64, MapError<M::Error>> {
        let (first, last) = Self::offsets(span)?;
        self.check_edges(self.root, F::root(), (first, last))?;
        let mut dropped = Dropped::default();
        let removed = self.clear(self.root, F::root(), (first, last), &mut dropped);
        // Also after an error: what was dropped until then must not be lost.
        self.settle(span, &dropped)?;
        removed
    }

    fn clear(
        &mut self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
        dropped: &mut Dropped,
    ) -> Result<u64, MapError<M::Error>> {
        let mut removed = 0;
        let shift = F::shift(level);
        let mut numbers = first >> shift..=last >> shift;
        while let Some(number) = numbers.next() {
            let slot = slot::<F>(level, number, (first, last));
            let at = entry_at(table, slot.index);
            let (raw, entry) = self.entry(level, at)?;
            match (entry, level.below()) {
                (Entry::Absent { .. }, _) if raw == 0 || slot.covered == Covered::Partly => {}
                (Entry::Absent { .. }, _) => self.replace(level, at, raw, 0)?,
                (Entry::Leaf(leaf), _) if slot.covered == Covered::Wholly => {
                    self.ungroup(table, level, (&slot, &leaf), (first, last))?;
                    self.write(level, at, 0)?;
                    removed += 1;
                    if leaf.shift == shift {
                        let more = self.clear_row(table, level, (number + 1, (last + 1) >> shift), raw)?;
                        removed += more;
                        numbers = number + 1 + more..=last >> shift;
                    }
                }
                (Entry::Leaf(leaf), Some(below)) => {
                    let next = self.split_entry(table, level, below, (&slot, &leaf))?;
                    removed += self.clear(next, below, (slot.first, slot.last), dropped)?;
                }
                (Entry::Table(next), Some(_)) => {
                    let Some((below, range)) = through::<F>(&next, level, &slot) else { continue };
                    removed += self.clear(next.at, below, range, dropped)?;
                    if slot.covered == Covered::Wholly || self.is_empty(next.at, below, range)? {
                        self.write(level, at, 0)?;
                        self.drop_table(dropped, below, next.at)?;
                    }
                }
                _ => return Err(MapError::Contended { level, at }),
            }
        }
        Ok(removed)
    }

    /// Clears entries by number as long as each is the leaf that goes on where the one before it ended, which was `raw`. Returns how many
    /// were.
    fn clear_row(
        &self,
        table: Output,
        level: Level,
        (begin, end): (u64, u64),
        raw: u64,
    ) -> Result<u64, MapError<M::Error>> {
        let mask = F::entries(level) - 1;
        let mut expected = raw;
        for number in begin..end {
            expected = expected.wrapping_add(F::step(level));
            if self.exchange(level, entry_at(table, number & mask), expected, 0)? != expected {
                return Ok(number - begin);
            }
        }
        Ok(end.saturating_sub(begin))
    }

    /// Whether every word of a table is zero that does not translate a whole part of a range.
    fn is_empty(
        &self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
    ) -> Result<bool, MapError<M::Error>> {
        let shift = F::shift(level);
        let mask = F::entries(level) - 1;
        let (begin, end) = (first.div_ceil(1 << shift), (last + 1) >> shift);
        let head = (first >> shift) & !mask;
        let cleared = if begin < end { begin - head..end - head } else { 0..0 };
        for index in (0..cleared.start).chain(cleared.end..mask + 1) {
            if self.read(level, entry_at(table, index))? != 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives what is mapped in `span` other permissions and splits larger leaves at its ends. Returns how many leaves
    /// were changed.
    ///
    /// # Errors
    /// As [`unmap`](Self::unmap), or the format cannot say these permissions.
    pub fn protect(&mut self, span: Span, permissions: Permissions) -> Result<u64, MapError<M::Error>> {
        let (first, last) = Self::offsets(span)?;
        self.check_edges(self.root, F::root(), (first, last))?;
        let changed = self.permit(self.root, F::root(), (first, last), permissions);
        self.caches.invalidate(span);
        changed
    }

    fn permit(
        &mut self,
        table: Output,
        level: Level,
        (first, last): (u64, u64),
        permissions: Permissions,
    ) -> Result<u64, MapError<M::Error>> {
        let mut changed = 0;
        for slot in slots::<F>(level, first, last) {
            let at = entry_at(table, slot.index);
            match (self.entry(level, at)?.1, level.below()) {
                (Entry::Absent { .. }, _) => {}
                (Entry::Leaf(leaf), _) if slot.covered == Covered::Wholly => {
                    self.ungroup(table, level, (&slot, &leaf), (first, last))?;
                    self.change_leaf(level, at, |leaf| Leaf { permissions, ..leaf })?;
                    changed += 1;
                }
                (Entry::Leaf(leaf), Some(below)) => {
                    // Before the split: permissions that cannot be said change nothing.
                    self.encode(&Entry::Leaf(Leaf { permissions, ..leaf }), level)?;
                    let next = self.split_entry(table, level, below, (&slot, &leaf))?;
                    changed += self.permit(next, below, (slot.first, slot.last), permissions)?;
                }
                (Entry::Table(next), Some(_)) => {
                    if let Some((below, range)) = through::<F>(&next, level, &slot) {
                        changed += self.permit(next.at, below, range, permissions)?;
                    }
                }
                _ => return Err(MapError::Contended { level, at }),
            }
        }
        Ok(changed)
    }

    /// Makes sure that leaves across the ends of a range can be split.
    fn check_edges(&self, table: Output, level: Level, range: (u64, u64)) -> Result<(), MapError<M::Error>> {
        let mut need = Need::default();
        self.count_edges(Some(table), level, range, &mut need)?;
        self.afford(&need)
    }

    /// Counts the tables that splitting takes; `None` stands for one that a split makes.
    fn count_edges(
        &self,
        table: Option<Output>,
        level: Level,
        (first, last): (u64, u64),
        need: &mut Need,
    ) -> Result<(), MapError<M::Error>> {
        let Some(below) = level.below() else { return Ok(()) };
        let shift = F::shift(level);
        let ends = [first, last].map(|end| slots::<F>(level, first.max(end >> shift << shift), last).next());
        let [Some(low), Some(high)] = ends else { return Ok(()) };
        let both = if low.index == high.index { &[low][..] } else { &[low, high][..] };
        for slot in both.iter().filter(|slot| slot.covered == Covered::Partly) {
            let Some((next, below, range)) = self.under(table, level, below, slot)? else { continue };
            if next.is_none() {
                need[below.subscript()] += 1;
            }
            self.count_edges(next, below, range, need)?;
        }
        Ok(())
    }
}
