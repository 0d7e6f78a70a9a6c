//! Shadow tables and their entries: made, compared with the guest's, and dropped.
//!
//! Enters: a table, an entry, or a page of the guest's. Leaves: the fence that what was taken away asks for. A word of a shadow
//! table is written in [`Shadow::exchange`] and nowhere else.
use super::records::{EntryId, Id, Record, Sync};
use super::{Error, Fence, Kind, P2m, Role, Shadow};
use crate::address::{Level, Output, entry_at};
use crate::entry::{Entry, Permissions};
use crate::format::x86::X86Format;
use crate::memory::{TableFrames, TableMemory};
use crate::walk::Access;

impl<F: X86Format, M: TableMemory, P: TableFrames> Shadow<'_, F, M, P> {
    /// The shadow of a table or piece in a role, empty if it is new; `None` if there is no room until the fence was executed.
    ///
    /// Where the fence is not [`Fence::None`], nothing may be made yet of what the guest's table says: somebody may still write
    /// to it.
    pub(super) fn ensure(&mut self, page: u64, role: Role) -> Result<(Option<Id>, Fence), Error<M::Error>> {
        if let Some(table) = self.lists.find(page, &role) {
            self.lists.record_mut(table).used = self.now;
            return Ok((Some(table), Fence::None));
        }
        let frame = if self.lists.any_free() { self.frames.take(role.level) } else { None };
        let Some(frame) = frame else {
            // Without a record any table will do, without a frame it must be one of the same level.
            let level = self.lists.any_free().then_some(role.level);
            let oldest = self.oldest(level).ok_or(Error::Exhausted { level: role.level })?;
            return Ok((None, self.zap(oldest)?));
        };
        let table = self.lists.hire(page, role, frame, self.now);
        let fence = if role.kind == Kind::Table { self.withdraw(page)? } else { Fence::None };
        Ok((table, fence))
    }

    /// The table that was unused for longest, of those that no processor has as its root and that this call has not used. Looking at
    /// each record costs less than emptying the table that is found.
    pub(super) fn oldest(&self, level: Option<Level>) -> Option<Id> {
        let fits = |record: &Record| {
            record.pins == 0 && record.used < self.now && level.is_none_or(|level| record.role.level == level)
        };
        let candidates = self.lists.used().filter(|table| fits(self.lists.record(*table)));
        candidates.min_by_key(|table| self.lists.record(*table).used)
    }

    /// Drops a table: nothing names it, it says nothing, and after the fence its frame is given back.
    pub(super) fn zap(&mut self, table: Id) -> Result<Fence, Error<M::Error>> {
        while let Some(parent) = self.lists.first_parent(table) {
            let _ = self.drop_entry(parent)?;
        }
        let _ = self.clear(table)?;
        self.lists.drop_table(table);
        // Even if it was empty: processors keep where a table is apart from what it says.
        Ok(Fence::All)
    }

    /// Drops every entry of a table.
    pub(super) fn clear(&mut self, table: Id) -> Result<Fence, Error<M::Error>> {
        let mut fence = Fence::None;
        for index in 0..1 << Record::INDEX_BITS {
            fence = fence.max(self.drop_entry(EntryId::new(table, index))?);
        }
        Ok(fence)
    }

    pub(super) fn drop_entry(&mut self, entry: EntryId) -> Result<Fence, Error<M::Error>> {
        if !self.lists.is_linked(entry) {
            return Ok(Fence::None);
        }
        let fence = self.exchange(entry, |_| Ok(0))?;
        self.lists.unlink(entry);
        Ok(fence)
    }

    /// Where a shadow entry is, and its word.
    fn read(&self, entry: EntryId) -> Result<(Output, u64), Error<M::Error>> {
        let frame = self.lists.record(entry.table()).frame;
        let at = entry_at(frame, entry.index().into());
        let word = self.memory.read(at).map_err(|error| Error::Memory { at, error })?;
        Ok((at, word))
    }

    /// Makes a shadow entry say something else. Processors do not write to it: its accessed and dirty bits were set when it was
    /// made.
    pub(super) fn exchange(
        &self,
        entry: EntryId,
        new: impl FnOnce(u64) -> Result<u64, Error<M::Error>>,
    ) -> Result<Fence, Error<M::Error>> {
        let (at, old) = self.read(entry)?;
        let new = new(old)?;
        let found = self.memory.compare_exchange(at, old, new);
        if found.map_err(|error| Error::Memory { at, error })? != old {
            return Err(Error::Contended { at });
        }
        let level = self.lists.record(entry.table()).role.level;
        let [old, new] = [old, new].map(|word| F::decode(word, level, &self.caps));
        Ok(Fence::between(&old, &new))
    }

    pub(super) fn encode(&self, entry: &Entry, level: Level) -> Result<u64, Error<M::Error>> {
        F::encode(entry, level, &self.caps).map_err(|reason| Error::Unencodable { level, reason })
    }

    /// The first page that a shadow leaf maps.
    fn page_of(&self, entry: EntryId) -> Option<u64> {
        let record = self.lists.record(entry.table());
        let level = record.role.level;
        match record.role.kind {
            Kind::Piece { .. } => {
                Some(record.page + (u64::from(entry.index()) << (F::shift(level) - F::PAGE_SHIFT)))
            }
            Kind::Table => match F::decode(self.lists.node(entry).word, level, &record.role.caps) {
                Entry::Leaf(leaf) => Some(leaf.output.0 >> F::PAGE_SHIFT),
                _ => None,
            },
        }
    }

    /// Does something to every shadow leaf that maps a page: those of its own, and those of the 512 that it is one of.
    fn for_each_leaf(
        &mut self,
        page: u64,
        mut act: impl FnMut(&mut Self, EntryId) -> Result<Fence, Error<M::Error>>,
    ) -> Result<Fence, Error<M::Error>> {
        let mut fence = Fence::None;
        for (page, level) in [(page, Level::PAGES), (page >> 9 << 9, Level(2))] {
            let mut next = self.lists.first_leaf(page, level);
            while let Some(entry) = next {
                next = self.lists.next_leaf(entry);
                let same_level = self.lists.record(entry.table()).role.level == level;
                if same_level && self.page_of(entry) == Some(page) {
                    fence = fence.max(act(self, entry)?);
                }
            }
        }
        Ok(fence)
    }

    /// Nothing maps the page any more.
    pub(super) fn unmap(&mut self, page: u64) -> Result<Fence, Error<M::Error>> {
        self.for_each_leaf(page, Self::drop_entry)
    }

    /// Nothing maps the page writable any more, nor in one large leaf with others.
    pub(super) fn withdraw(&mut self, page: u64) -> Result<Fence, Error<M::Error>> {
        self.for_each_leaf(page, |shadow, entry| {
            let level = shadow.lists.record(entry.table()).role.level;
            if level > Level::PAGES {
                return shadow.drop_entry(entry);
            }
            shadow.exchange(entry, |word| match F::decode(word, level, &shadow.caps) {
                Entry::Leaf(mut leaf) => {
                    leaf.permissions.remove(Permissions::WRITE);
                    shadow.encode(&Entry::Leaf(leaf), level)
                }
                _ => Ok(word),
            })
        })
    }

    /// Whether some shadow leaf maps the page writable.
    fn is_writable(&mut self, page: u64) -> Result<bool, Error<M::Error>> {
        let mut writable = false;
        let _ = self.for_each_leaf(page, |shadow, entry| {
            let level = shadow.lists.record(entry.table()).role.level;
            let says = F::decode(shadow.read(entry)?.1, level, &shadow.caps);
            writable |= matches!(says, Entry::Leaf(leaf) if leaf.permissions.contains(Permissions::WRITE));
            Ok(Fence::None)
        })?;
        Ok(writable)
    }

    /// Drops a shadow entry whose guest entry no longer says what it was made of.
    pub(super) fn compare<G: P2m>(
        &mut self,
        guest: &G,
        table: Id,
        index: u64,
    ) -> Result<Fence, Error<M::Error>> {
        let entry = EntryId::new(table, index);
        if !self.lists.is_linked(entry) {
            return Ok(Fence::None);
        }
        let record = self.lists.record(table);
        let (level, caps) = (record.role.level, record.role.caps);
        let was = self.lists.node(entry).word;
        let is = guest.read(entry_at(Output(record.page << 12), entry.index().into())).ok();
        // A page that was written meanwhile, by way of another role of the table, is no other page.
        let written = F::marked(was, level, &caps, Access::Write);
        if is.is_some_and(|is| is == was || is == written) {
            return Ok(Fence::None);
        }
        self.drop_entry(entry)
    }

    /// A fence of the guest's for everything: the shadows of unsync tables say what the tables say. Those that nobody was able to write to
    /// since the fence before are protected again.
    pub(super) fn synchronize<G: P2m>(&mut self, guest: &G) -> Result<Fence, Error<M::Error>> {
        let mut fence = Fence::None;
        // All are looked at before rights go: two may be of one page.
        let mut next = self.lists.first_unsync();
        while let Some(table) = next {
            next = self.lists.next_unsync(table);
            let open = self.is_writable(self.lists.record(table).page)?;
            self.lists.record_mut(table).sync = Sync::Unsync { open };
        }
        let mut next = self.lists.first_unsync();
        while let Some(table) = next {
            next = self.lists.next_unsync(table);
            fence = fence.max(self.withdraw(self.lists.record(table).page)?);
            for index in 0..1 << Record::INDEX_BITS {
                fence = fence.max(self.compare(guest, table, index)?);
            }
            if self.lists.record(table).sync == (Sync::Unsync { open: false }) {
                self.lists.set_sync(table, Sync::Protected);
            }
        }
        Ok(fence)
    }

    /// Whether the guest may have the right to write to this page: no table that is shadowed is in it, or only such as are unsync.
    /// Those of the last level become that at a write.
    pub(super) fn let_go(&mut self, page: u64, access: Access) -> bool {
        let mut next = self.lists.first_of_page(page);
        while let Some(table) = next {
            next = self.lists.next_of_page(table, page);
            let record = self.lists.record(table);
            let free = matches!(record.sync, Sync::Unsync { .. }) || access == Access::Write;
            if record.role.level > Level::PAGES || !free {
                return false;
            }
        }
        let mut next = self.lists.first_of_page(page);
        while let Some(table) = next {
            next = self.lists.next_of_page(table, page);
            self.lists.set_sync(table, Sync::Unsync { open: true });
        }
        true
    }
}
