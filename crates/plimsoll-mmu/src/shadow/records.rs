//! What is known of each shadow table, and the lists that find it: by the guest's page, by what maps a page, by what names a table.
//!
//! Enters: slices of the caller's. Leaves: records, each on the lists it belongs to and on no other. No address and no word is looked
//! at here.
//!
//! ```text
//! heads   free | dropped | unsync | parents, one a record | buckets of leaves | as many buckets of tables
//! ```
//!
//! Lists are linked in both directions, so that an entry leaves its list without a search. What comes before the first of a list is
//! its head, as a number with the highest bit set.
use super::{Kind, Role};
use crate::address::{Level, Output};
use crate::entry::Permissions;
use crate::format::Feature;
use crate::format::x86::{Caps, Maker};
use crate::x86::Control;

/// Ends a list, and is before what is on none.
const END: u32 = u32::MAX;
const HEAD: u32 = 1 << 31;
const FREE: usize = 0;
const DROPPED: usize = 1;
const UNSYNC: usize = 2;
const PARENTS: usize = 3;
/// Entries are numbered in 31 bits, and `END` is none of them.
const MOST_RECORDS: usize = 1 << 20;

/// A place on a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    next: u32,
    before: u32,
}

impl Link {
    const NONE: Self = Self { next: END, before: END };
}

/// A shadow entry: what the guest's entry said that it was made of, and its place among the entries for the same page or table. It is
/// on a list if and only if it is not zero.
#[derive(Clone, Copy, Debug)]
pub(super) struct Node {
    pub(super) word: u64,
    link: Link,
}

/// Whether the guest can write a table without a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// It cannot, and the shadow is what the table says.
    Protected,
    /// It could, and the shadow is what the table said at a fence or later. `open`: it still can, when last looked at.
    Unsync { open: bool },
}

/// What is kept about one shadow table besides its words: 8 KiB, mostly for the entries' places on lists.
#[derive(Clone, Debug)]
pub struct Record {
    /// Of the guest's table or of the first page of a piece.
    pub(super) page: u64,
    pub(super) role: Role,
    pub(super) frame: Output,
    pub(super) sync: Sync,
    /// How often it is loaded as a root.
    pub(super) pins: u32,
    /// The call that used it last.
    pub(super) used: u64,
    /// Free, dropped or in a bucket of tables.
    place: Link,
    unsync: Link,
    pub(super) nodes: [Node; 1 << Self::INDEX_BITS],
}

impl Record {
    /// log2 of the entries of a table.
    pub(super) const INDEX_BITS: u32 = 9;

    /// A record of no table.
    pub const EMPTY: Self = Self {
        page: 0,
        role: Role {
            level: Level::PAGES,
            kind: Kind::Table,
            inherited: Permissions::empty(),
            control: Control::empty(),
            caps: Caps {
                physical_bits: 52,
                gib_pages: Feature::Off,
                no_execute: Feature::Off,
                keys: Feature::Off,
                maker: Maker::Intel,
            },
        },
        frame: Output(0),
        sync: Sync::Protected,
        pins: 0,
        used: 0,
        place: Link::NONE,
        unsync: Link::NONE,
        nodes: [Node { word: 0, link: Link::NONE }; 1 << Self::INDEX_BITS],
    };
}

/// The number of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Id(u32);

/// The number of a shadow entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EntryId(u32);

impl EntryId {
    /// The entry of `table` at `index`, of which the low bits count.
    pub(super) fn new(table: Id, index: u64) -> Self {
        let [low, high, ..] = index.to_le_bytes();
        Self(table.0 << Record::INDEX_BITS | u32::from(u16::from_le_bytes([low, high & 1])))
    }

    pub(super) const fn table(self) -> Id {
        Id(self.0 >> Record::INDEX_BITS)
    }

    pub(super) const fn index(self) -> u32 {
        self.0 & ((1 << Record::INDEX_BITS) - 1)
    }
}

/// Which of its links a list goes through.
#[derive(Clone, Copy)]
enum Through {
    Entries,
    Places,
    Unsync,
}

/// All records, by number and by list.
#[derive(Debug)]
pub(super) struct Lists<'a> {
    records: &'a mut [Record],
    heads: &'a mut [u32],
}

impl<'a> Lists<'a> {
    /// A bucket of tables for each record, and as many of leaves, which are few to a bucket where few are used at a time.
    pub(super) const fn heads(records: usize) -> usize {
        PARENTS + records * 9
    }

    pub(super) fn new(records: &'a mut [Record], heads: &'a mut [u32]) -> Option<Self> {
        let fits = (1..=MOST_RECORDS).contains(&records.len()) && heads.len() >= PARENTS + records.len() + 2;
        if !fits || u32::try_from(heads.len()).is_ok_and(|heads| heads >= HEAD) {
            return None;
        }
        records.fill(Record::EMPTY);
        heads.fill(END);
        let mut lists = Self { records, heads };
        for id in (0..lists.records.len()).rev().filter_map(|id| u32::try_from(id).ok()) {
            lists.push(Through::Places, FREE, id);
        }
        Some(lists)
    }

    pub(super) fn record(&self, id: Id) -> &Record {
        &self.records[id.0 as usize]
    }

    pub(super) fn record_mut(&mut self, id: Id) -> &mut Record {
        &mut self.records[id.0 as usize]
    }

    pub(super) fn node(&self, entry: EntryId) -> &Node {
        &self.record(entry.table()).nodes[entry.index() as usize]
    }

    /// Every record that stands for a table.
    pub(super) fn used(&self) -> impl Iterator<Item = Id> + '_ {
        let numbers = 0..self.records.len();
        numbers.filter_map(|id| u32::try_from(id).ok()).map(Id).filter(|id| {
            // What is free or dropped was used by no call.
            self.record(*id).used != 0
        })
    }

    fn link(&mut self, through: Through, item: u32) -> &mut Link {
        match through {
            Through::Entries => {
                let entry = EntryId(item);
                &mut self.record_mut(entry.table()).nodes[entry.index() as usize].link
            }
            Through::Places => &mut self.record_mut(Id(item)).place,
            Through::Unsync => &mut self.record_mut(Id(item)).unsync,
        }
    }

    fn push(&mut self, through: Through, head: usize, item: u32) {
        let next = core::mem::replace(&mut self.heads[head], item);
        let before = u32::try_from(head).map_or(END, |head| head | HEAD);
        *self.link(through, item) = Link { next, before };
        if next != END {
            self.link(through, next).before = item;
        }
    }

    fn remove(&mut self, through: Through, item: u32) {
        let Link { next, before } = core::mem::replace(self.link(through, item), Link::NONE);
        if before == END {
            return;
        }
        if before & HEAD == 0 {
            self.link(through, before).next = next;
        } else {
            self.heads[(before & !HEAD) as usize] = next;
        }
        if next != END {
            self.link(through, next).before = before;
        }
    }

    fn first(&self, head: usize) -> Option<u32> {
        Some(self.heads[head]).filter(|first| *first != END)
    }

    fn buckets(&self) -> usize {
        (self.heads.len() - PARENTS - self.records.len()) / 2
    }

    fn bucket(&self, key: u64) -> usize {
        // Fibonacci hashing: the high bits of the product are spread whatever the keys' stride.
        let spread = key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        usize::try_from(spread).unwrap_or(0) % self.buckets()
    }

    fn leaves_head(&self, page: u64, level: Level) -> usize {
        PARENTS + self.records.len() + self.bucket(page << 2 | u64::from(level.0))
    }

    fn tables_head(&self, page: u64) -> usize {
        PARENTS + self.records.len() + self.buckets() + self.bucket(page >> 9)
    }

    const fn parents_head(table: Id) -> usize {
        PARENTS + table.0 as usize
    }

    // Tables.

    /// A free record becomes that of a table.
    pub(super) fn hire(&mut self, page: u64, role: Role, frame: Output, now: u64) -> Option<Id> {
        let id = Id(self.first(FREE)?);
        self.remove(Through::Places, id.0);
        let record = self.record_mut(id);
        (record.page, record.role, record.frame) = (page, role, frame);
        (record.sync, record.pins, record.used) = (Sync::Protected, 0, now);
        self.push(Through::Places, self.tables_head(page), id.0);
        Some(id)
    }

    /// Whether a record is free.
    pub(super) fn any_free(&self) -> bool {
        self.first(FREE).is_some()
    }

    /// A record whose table is empty, and named by nobody, waits for the fence.
    pub(super) fn drop_table(&mut self, id: Id) {
        self.set_sync(id, Sync::Protected);
        self.remove(Through::Places, id.0);
        self.record_mut(id).used = 0;
        self.push(Through::Places, DROPPED, id.0);
    }

    /// A record that has waited is free, and its frame is the caller's.
    pub(super) fn bury(&mut self) -> Option<(Level, Output)> {
        let id = Id(self.first(DROPPED)?);
        self.remove(Through::Places, id.0);
        self.push(Through::Places, FREE, id.0);
        let record = self.record(id);
        Some((record.role.level, record.frame))
    }

    fn in_bucket(&self, mut next: u32, fits: impl Fn(&Record) -> bool) -> Option<Id> {
        while next != END {
            let record = self.record(Id(next));
            if fits(record) {
                return Some(Id(next));
            }
            next = record.place.next;
        }
        None
    }

    /// The table of a page in a role.
    pub(super) fn find(&self, page: u64, role: &Role) -> Option<Id> {
        let fits = |record: &Record| record.page == page && record.role == *role;
        self.in_bucket(self.heads[self.tables_head(page)], fits)
    }

    /// The first shadow of the guest's table in a page.
    pub(super) fn first_of_page(&self, page: u64) -> Option<Id> {
        let fits = |record: &Record| record.page == page && record.role.kind == Kind::Table;
        self.in_bucket(self.heads[self.tables_head(page)], fits)
    }

    /// The next such.
    pub(super) fn next_of_page(&self, table: Id, page: u64) -> Option<Id> {
        let fits = |record: &Record| record.page == page && record.role.kind == Kind::Table;
        self.in_bucket(self.record(table).place.next, fits)
    }

    /// Whether a table of the guest's that is shadowed lies in the same 512 pages.
    pub(super) fn any_in_block(&self, page: u64) -> bool {
        let fits = |record: &Record| record.page >> 9 == page >> 9 && record.role.kind == Kind::Table;
        self.in_bucket(self.heads[self.tables_head(page)], fits).is_some()
    }

    pub(super) fn set_sync(&mut self, table: Id, sync: Sync) {
        self.remove(Through::Unsync, table.0);
        self.record_mut(table).sync = sync;
        if sync != Sync::Protected {
            self.push(Through::Unsync, UNSYNC, table.0);
        }
    }

    pub(super) fn first_unsync(&self) -> Option<Id> {
        self.first(UNSYNC).map(Id)
    }

    pub(super) fn next_unsync(&self, table: Id) -> Option<Id> {
        Some(self.record(table).unsync.next).filter(|next| *next != END).map(Id)
    }

    // Entries.

    pub(super) fn is_linked(&self, entry: EntryId) -> bool {
        self.node(entry).link.before != END
    }

    fn link_entry(&mut self, entry: EntryId, word: u64, head: usize) {
        self.unlink(entry);
        self.record_mut(entry.table()).nodes[entry.index() as usize].word = word;
        self.push(Through::Entries, head, entry.0);
    }

    /// The entry maps a page, or the 512 from it on: its level says which.
    pub(super) fn link_leaf(&mut self, entry: EntryId, word: u64, page: u64) {
        let head = self.leaves_head(page, self.record(entry.table()).role.level);
        self.link_entry(entry, word, head);
    }

    /// The entry names a table.
    pub(super) fn link_parent(&mut self, entry: EntryId, word: u64, child: Id) {
        self.link_entry(entry, word, Self::parents_head(child));
    }

    pub(super) fn unlink(&mut self, entry: EntryId) {
        self.remove(Through::Entries, entry.0);
    }

    pub(super) fn first_parent(&self, child: Id) -> Option<EntryId> {
        self.first(Self::parents_head(child)).map(EntryId)
    }

    /// The first entry of the bucket where those are that map `page` at `level`, among others.
    pub(super) fn first_leaf(&self, page: u64, level: Level) -> Option<EntryId> {
        self.first(self.leaves_head(page, level)).map(EntryId)
    }

    pub(super) fn next_leaf(&self, entry: EntryId) -> Option<EntryId> {
        Some(self.node(entry).link.next).filter(|next| *next != END).map(EntryId)
    }
}
