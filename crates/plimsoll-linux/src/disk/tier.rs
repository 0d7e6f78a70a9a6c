//! The tier: which segment holds what, and for whom.
//!
//! Enters: drafts to be written, places to be read, places that nobody needs any more. Leaves: bytes that are what was written,
//! or an error that says what the disk did; segments worth cleaning. What must never happen: a segment that is written again
//! while a record names a place in it.
//!
//! # A segment's life
//! ```text
//! free -> being written -> written -> free     when nobody needs anything in it any more, by itself or by cleaning
//!               |           \-> kept
//!               \-> doubtful -> free           the disk refused it, or its manager died; when all of it is there
//!                      \-> spoilt              it was tried there whether the disk takes anything
//! ```
//! What may still be written to a segment, and when it is used again, is argued in `doubt`.
//!
//! *Kept* are segments that may have objects of a store that could not be put together at a take-over. What is in
//! them is counted by what the other stores name, which is not all, so none of them is cleaned or free until a manager
//! knows every store, or all whose pages could be in the others are gone. The first is one of a later process: a successor in
//! this one has the same tier, and keeps what it kept.
//!
//! A segment counts as written when the disk has taken all of it; only then does a record name a place in it, and only after
//! that is the page's memory given back. So whatever a write comes to, no page is lost to it. Nothing is ever synced: when the
//! host goes down the key goes with it, and a manager's death loses nothing that the kernel has.
//!
//! # Room
//! Segments that were written once have their room on the disk. [`RESERVE`] of them are kept for cleaning, from the
//! beginning: a disk that is full, because it has as many segments as it may or because others filled the file system, can
//! still be cleaned. Quotas are of domains, because an object is a domain's: a machine that shares with nobody is one.
//!
//! The lock is held for a few hundred instructions, for a look at some thousand segments where something is to be cleaned, and
//! never across I/O.
use super::device::{BLOCK_SIZE, Blocks, Disk, write_once};
use super::doubt::{Rest, Trouble};
use super::draft::{Closed, Draft};
pub use super::error::{ReadError, TierError, WriteError};
use super::format::{Place, ROOM, SEGMENT_SIZE, SEGMENTS_MAX, offset_of, room_of};
use super::look::Reads;
use super::table::{Holds, Table};
use parking_lot::Mutex;
use plimsoll_store::{Away, Handle, Remote};
use plimsoll_types::{ByteCount, DomainId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Segments kept for cleaning: one to write what several others have left, one because what was a segment's in several others
/// may not fill one exactly.
pub const RESERVE: u32 = 2;
/// The smallest tier: as much again as the reserve.
pub const SEGMENTS_MIN: u32 = 2 * RESERVE;
/// Segments cleaned in one go.
const VICTIMS_MAX: usize = 8;
/// Segments fuller than this, in hundredths, are not cleaned: ten of them would be read and nine written to win one.
const FULL_PERCENT: u64 = 90;
/// Segments looked at under one lock: some 20 us, of 2 million in the largest tier.
const LOOKED_AT: u32 = 4096;
/// A write is tried in so many places before the disk is left alone for a while: one may be bad.
const PLACES_MAX: usize = 3;
/// How long a disk without room, or with nothing but errors, is left alone: longer each time.
const PATIENCE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What a tier may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of the disk. Rounded down to segments of 1 MiB.
    pub disk: ByteCount,
    /// Of it, by one sharing domain; `None` for all.
    pub domain: Option<ByteCount>,
}

/// What a segment is written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To take what memory has.
    Demote,
    /// To take what other segments have, which are freed by it.
    Clean,
}

/// What a tier holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierStats {
    /// What it may take of the disk.
    pub limit: ByteCount,
    /// Segments in use.
    pub used: ByteCount,
    /// Of these, what somebody needs.
    pub live: ByteCount,
    /// Segments that the disk may still be writing, although it has refused that, or for a manager that is gone.
    pub failed: ByteCount,
    /// Bytes written, ever.
    pub written: ByteCount,
    /// Segments that cleaning has freed or gone over, ever.
    pub cleaned: u64,
    /// Reads of the disk, ever.
    pub reads: u64,
    /// Pages read, ever: several a read where they were written together.
    pub pages_read: u64,
    /// Times that the disk had no room, ever.
    pub no_room: u64,
    /// Writes that it refused for another reason, ever.
    pub refused: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Duty {
    Free,
    Writing,
    Written,
    /// Written, and not to be cleaned: something in it cannot be read.
    Stuck,
    /// Written, and perhaps needed by a store that is not known.
    Kept,
    /// The disk refused a write here, or a manager died in it, and it may still be under way.
    Doubtful,
    /// More than one may be.
    Spoilt,
}

impl Duty {
    /// True where objects are.
    const fn holds_objects(self) -> bool {
        matches!(self, Self::Written | Self::Stuck | Self::Kept)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) duty: Duty,
    /// Of [`ROOM`], what somebody needs.
    live: u32,
}

/// A segment that is worth cleaning, least worth first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sparse {
    worth: u64,
    number: u32,
    live: u64,
}

const UNUSED: Segment = Segment { duty: Duty::Free, live: 0 };

#[derive(Debug)]
pub(super) struct State {
    /// Those that were ever written or reserved: the rest are free and have no room on the disk yet.
    pub(super) segments: Vec<Segment>,
    /// Of these, those that are free.
    pub(super) free: BTreeSet<u32>,
    /// Those in doubt, the one that was looked at longest ago first.
    pub(super) doubtful: VecDeque<u32>,
    /// One in which it is tried whether the disk takes anything.
    pub(super) spoilt: Option<u32>,
    owned: BTreeMap<DomainId, u64>,
    pub(super) rest: Option<Rest>,
    /// Some segments are kept.
    keeps: bool,
    pub(super) stats: TierStats,
}

/// A segment that is to be written.
#[derive(Clone, Copy, Debug)]
struct Taken {
    number: u32,
    has_room: bool,
}

/// What the next manager goes on with.
#[derive(Clone, Copy, Debug)]
pub struct Keepsakes<'a> {
    /// The table.
    pub table: BorrowedFd<'a>,
    /// The page of secret memory that has the key; `None` where the kernel has no such memory, and the key is in the table.
    pub key: Option<BorrowedFd<'a>>,
    /// The disk; `None` where it ends with this process.
    pub disk: Option<BorrowedFd<'a>>,
}

/// See the file's head.
pub struct Tier {
    /// Ends before the disk does.
    pub(super) reads: Reads,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) table: Table,
    quota: Option<ByteCount>,
    pub(super) patience: [Duration; 2],
    pub(super) state: Mutex<State>,
}

impl Tier {
    /// An empty tier on a disk of its own.
    ///
    /// # Errors
    /// [`TierError`].
    pub fn create(disk: Box<dyn Disk>, limits: Limits) -> Result<Self, TierError> {
        let segments = limits.disk.0 / SEGMENT_SIZE as u64;
        let size_of = |segments: u32| ByteCount(offset_of(segments));
        if segments < u64::from(SEGMENTS_MIN) {
            return Err(TierError::TooSmall { limit: limits.disk, least: size_of(SEGMENTS_MIN) });
        }
        let segments = u32::try_from(segments).ok().filter(|segments| *segments <= SEGMENTS_MAX);
        let too_large = TierError::TooLarge { limit: limits.disk, most: size_of(SEGMENTS_MAX) };
        let table = Table::create(segments.ok_or(too_large)?)?;
        let reserve = size_of(RESERVE);
        // A file system that cannot promise room is written to, which takes it. What of that may be under way after an error is
        // under way in a file that is given up.
        let zeros = Blocks::new(SEGMENT_SIZE / BLOCK_SIZE);
        let write = |segment| write_once(&*disk, offset_of(segment), zeros.bytes());
        let reserved = disk.reserve(0, reserve.0).and_then(|()| (0..RESERVE).try_for_each(write));
        reserved.map_err(|source| TierError::Reserve { reserve, source })?;
        Ok(Self::of(disk, table, limits.domain))
    }

    /// Goes on with what a manager of another process has left. Everything that records name is to be
    /// [`claim`](Self::claim)ed, and then what is left [`settle`](Self::settle)d or [`kept`](Self::keep), before anything is written.
    ///
    /// # Errors
    /// [`TierError::Table`].
    pub fn inherit(
        disk: Box<dyn Disk>,
        table: OwnedFd,
        key: Option<OwnedFd>,
        quota: Option<ByteCount>,
    ) -> Result<Self, TierError> {
        Ok(Self::of(disk, Table::inherit(table, key)?, quota))
    }

    fn of(disk: Box<dyn Disk>, table: Table, quota: Option<ByteCount>) -> Self {
        let last = (0..table.segments()).rev().find(|segment| table.holds(*segment) != Holds::Nothing);
        let known = last.map_or(0, |last| last + 1).max(RESERVE).min(table.segments());
        let duty = |segment| match table.holds(segment) {
            Holds::Nothing => Duty::Free,
            Holds::Sequence(_) => Duty::Written,
            Holds::Writing(_) => Duty::Doubtful,
            Holds::Spoilt => Duty::Spoilt,
        };
        let segments: Vec<Segment> = (0..known).map(|at| Segment { duty: duty(at), live: 0 }).collect();
        let free = (0..known).filter(|at| duty(*at) == Duty::Free).collect();
        let doubtful = (0..known).filter(|at| duty(*at) == Duty::Doubtful).collect();
        let spoilt = (0..known).find(|at| duty(*at) == Duty::Spoilt);
        let stats = TierStats { limit: ByteCount(offset_of(table.segments())), ..TierStats::default() };
        let (owned, rest) = (BTreeMap::new(), None);
        let state = State { segments, free, doubtful, spoilt, owned, rest, keeps: false, stats };
        Self {
            reads: Reads::default(),
            disk: disk.into(),
            table,
            quota,
            patience: PATIENCE,
            state: Mutex::new(state),
        }
    }

    /// What one domain may have of it; `None` for all.
    pub const fn quota(&self) -> Option<ByteCount> {
        self.quota
    }

    /// How long a disk that refuses is left alone: at first and at most.
    pub fn set_patience(&mut self, patience: [Duration; 2]) {
        self.patience = patience;
    }

    /// For whoever keeps copies for the next manager.
    pub fn keepsakes(&self) -> Keepsakes<'_> {
        let (table, key) = self.table.keepsakes();
        Keepsakes { table, key, disk: self.disk.keepsake() }
    }

    /// The tier is over: nobody can read any more what it has written, nor go on with it, and the disk is emptied.
    ///
    /// # Errors
    /// When the disk could not be emptied. What is there cannot be read.
    pub fn end(&self) -> io::Result<()> {
        self.table.forget();
        self.disk.empty()
    }

    /// What it holds and has done.
    pub fn stats(&self) -> TierStats {
        let state = self.state.lock();
        let count = |duty: &[Duty]| {
            state.segments.iter().filter(|segment| duty.contains(&segment.duty)).count() * SEGMENT_SIZE
        };
        TierStats {
            used: ByteCount(count(&[Duty::Writing, Duty::Written, Duty::Stuck, Duty::Kept]) as u64),
            failed: ByteCount(count(&[Duty::Doubtful, Duty::Spoilt]) as u64),
            live: ByteCount(state.owned.values().sum()),
            ..state.stats
        }
    }

    /// What a domain has on the disk.
    pub fn owned(&self, domain: DomainId) -> ByteCount {
        ByteCount(self.state.lock().owned.get(&domain).copied().unwrap_or(0))
    }

    /// A segment to be filled.
    pub fn draft(&self) -> Draft {
        Draft::new(self.table.next_sequence())
    }

    /// Puts an object's encoded bytes into a draft; [`place`](Self::place) says later where they have come to be.
    ///
    /// # Errors
    /// [`WriteError::Complete`] where the draft is to be written first, [`WriteError::Quota`].
    pub fn add(
        &self,
        draft: &mut Draft,
        domain: DomainId,
        handle: Handle,
        bytes: &[u8],
        purpose: Purpose,
    ) -> Result<u16, WriteError> {
        if let (Some(quota), Purpose::Demote) = (self.quota, purpose) {
            let owned = self.owned(domain).0 + draft.owned(domain) + room_of(bytes.len()) as u64;
            if owned > quota.0 {
                return Err(WriteError::Quota { domain, quota });
            }
        }
        let added = self.table.with_key(|key| draft.add(key, domain, handle, bytes));
        added.ok_or(WriteError::Over)?.ok_or(WriteError::Complete)
    }

    /// Where an entry is of which [`add`](Self::add) gave the granule, in the segment that [`write`](Self::write) named.
    pub fn place(segment: u32, granule: u16) -> Option<Away> {
        Place { segment, granule }.to_away()
    }

    /// Writes a draft, and says where. Everything in it counts as needed from then on, until it is said to be
    /// [`forgotten`](Self::forget).
    ///
    /// # Errors
    /// [`WriteError`]; nothing of it is on the disk then.
    pub fn write(&self, draft: Draft, purpose: Purpose) -> Result<u32, WriteError> {
        // Its parts were seen to fit.
        let closed = self.table.with_key(|key| draft.close(key));
        let mut closed = closed.ok_or(WriteError::Over)?.ok_or(WriteError::Complete)?;
        let tried = self.try_out(&mut closed, purpose);
        tried.and_then(|()| self.write_somewhere(&mut closed, purpose)).inspect_err(|error| {
            if matches!(error, WriteError::Failed(_)) {
                self.rest(Trouble::Refused);
            }
        })
    }

    /// In one place after the other, as long as the disk refuses.
    fn write_somewhere(&self, closed: &mut Closed, purpose: Purpose) -> Result<u32, WriteError> {
        for _ in 1..PLACES_MAX {
            match self.write_to(self.take_segment(purpose, Instant::now())?, closed) {
                Err(WriteError::Failed(_)) => {}
                outcome => return outcome,
            }
        }
        self.write_to(self.take_segment(purpose, Instant::now())?, closed)
    }

    fn write_to(&self, taken: Taken, closed: &mut Closed) -> Result<u32, WriteError> {
        let Taken { number, has_room } = taken;
        if !has_room && let Err(error) = self.disk.reserve(offset_of(number), SEGMENT_SIZE as u64) {
            // Nothing was written.
            self.give_back(number);
            return Err(self.without_room(error, Trouble::NoRoom));
        }
        self.table.set(number, Holds::Writing(closed.draft.sequence));
        let bytes = closed.at(number);
        let length = bytes.len() as u64;
        match write_once(&*self.disk, offset_of(number), bytes) {
            Ok(()) => {
                self.written(number, &closed.draft, length);
                Ok(number)
            }
            Err(error) => {
                self.doubt(number);
                Err(self.without_room(error, Trouble::RoomRefused))
            }
        }
    }

    fn take_segment(&self, purpose: Purpose, now: Instant) -> Result<Taken, WriteError> {
        let mut state = self.state.lock();
        let rests = state.rest.filter(|rest| rest.until > now);
        if rests.is_some_and(|rest| rest.trouble == Trouble::Refused) {
            return Err(WriteError::Resting);
        }
        let known = u32::try_from(state.segments.len()).unwrap_or(u32::MAX);
        let has_more = known < self.table.segments();
        let spare = state.free.len() > RESERVE as usize;
        let free = state.free.first().map(|number| Taken { number: *number, has_room: true });
        let taken = match (purpose, free) {
            (Purpose::Clean, Some(_)) => free,
            (Purpose::Demote, Some(_)) if spare => free,
            (Purpose::Demote, _) if has_more && rests.is_some() => return Err(WriteError::Resting),
            _ if has_more && rests.is_none() => {
                state.segments.push(UNUSED);
                Some(Taken { number: known, has_room: false })
            }
            _ => None,
        };
        let taken = taken.ok_or(WriteError::Full { limit: state.stats.limit })?;
        state.free.remove(&taken.number);
        if let Some(segment) = state.segments.get_mut(taken.number as usize) {
            *segment = Segment { duty: Duty::Writing, live: 0 };
        }
        Ok(taken)
    }

    /// The segment got no room, and was not written.
    fn give_back(&self, number: u32) {
        let mut state = self.state.lock();
        if number as usize + 1 == state.segments.len() {
            state.segments.pop();
        }
    }

    fn written(&self, segment: u32, draft: &Draft, length: u64) {
        self.table.set(segment, Holds::Sequence(draft.sequence));
        let mut state = self.state.lock();
        state.rest = None;
        state.stats.written += ByteCount(length);
        let mut live = 0;
        for (domain, room) in draft.owners() {
            *state.owned.entry(domain).or_default() += room;
            live += room;
        }
        if let Some(written) = state.segments.get_mut(segment as usize) {
            // A segment has less room than that.
            *written = Segment { duty: Duty::Written, live: u32::try_from(live).unwrap_or(u32::MAX) };
        }
    }

    /// A new manager takes over: what is needed is what records name, whatever was counted before.
    pub fn recount(&self) {
        let mut state = self.state.lock();
        state.owned.clear();
        for segment in state.segments.iter_mut().filter(|segment| segment.duty.holds_objects()) {
            segment.live = 0;
            if segment.duty == Duty::Stuck {
                segment.duty = Duty::Written;
            }
        }
    }

    /// A record names the place: it was written by an earlier manager, and is needed.
    pub fn claim(&self, domain: DomainId, remote: Remote) {
        let place = Place::of(remote.at);
        let mut state = self.state.lock();
        // A damaged record may name anything. Reading it will tell.
        if let Some(segment) = state.segments.get_mut(place.segment as usize)
            && segment.duty.holds_objects()
        {
            segment.live = segment.live.saturating_add(share_of(remote));
            *state.owned.entry(domain).or_default() += u64::from(share_of(remote));
        }
    }

    /// Not everything that is needed could be claimed: what has been written so far stays as it is, until whoever may need it
    /// is [gone](Self::let_go), or another process looks again for what was not found.
    pub fn keep(&self) {
        let mut state = self.state.lock();
        state.keeps = true;
        for segment in state.segments.iter_mut().filter(|segment| segment.duty.holds_objects()) {
            segment.duty = Duty::Kept;
        }
    }

    /// Nobody is left who could need what was not claimed: what was [kept](Self::keep) is as anything else.
    pub fn let_go(&self) {
        let mut state = self.state.lock();
        if !std::mem::take(&mut state.keeps) {
            return;
        }
        for segment in state.segments.iter_mut().filter(|segment| segment.duty == Duty::Kept) {
            segment.duty = Duty::Written;
        }
        drop(state);
        self.settle();
    }

    /// Everything that is needed has been claimed, or is [`kept`](Self::keep): the rest is free.
    pub fn settle(&self) {
        let mut state = self.state.lock();
        let State { segments, free, .. } = &mut *state;
        for (number, segment) in (0..).zip(segments) {
            if segment.duty == Duty::Written && segment.live == 0 {
                self.set_free(number, segment, free);
            }
        }
    }

    /// Nobody needs what is at the place any more.
    pub fn forget(&self, domain: DomainId, remote: Remote) {
        let place = Place::of(remote.at);
        let mut state = self.state.lock();
        let State { segments, free, owned, .. } = &mut *state;
        let Some(segment) = segments.get_mut(place.segment as usize) else { return };
        if !segment.duty.holds_objects() {
            return;
        }
        segment.live = segment.live.saturating_sub(share_of(remote));
        if segment.live == 0 && segment.duty != Duty::Kept {
            self.set_free(place.segment, segment, free);
        }
        if let Some(room) = owned.get_mut(&domain) {
            *room = room.saturating_sub(u64::from(share_of(remote)));
            if *room == 0 {
                owned.remove(&domain);
            }
        }
    }

    pub(super) fn set_free(&self, number: u32, segment: &mut Segment, free: &mut BTreeSet<u32>) {
        self.table.set(number, Holds::Nothing);
        *segment = UNUSED;
        free.insert(number);
    }

    /// True where there is little room left: then cleaning is worth its while.
    pub fn is_short(&self) -> bool {
        let state = self.state.lock();
        let spare = state.free.len().saturating_sub(RESERVE as usize);
        let is_stuck = state.rest.is_some_and(|rest| rest.trouble != Trouble::Refused);
        let unused = if is_stuck { 0 } else { self.table.segments() as usize - state.segments.len() };
        spare + unused <= self.table.segments() as usize / 16
    }

    /// Segments to be cleaned together, because what they have fits into fewer: those first that give most for what is read
    /// and written and have been left longest, as their pages will not go by themselves. Empty where that wins nothing.
    /// Others may use the tier meanwhile: a segment may have come to be free, and then nothing is to be done there.
    pub fn victims(&self) -> Vec<u32> {
        let mut sparse: Vec<Sparse> = Vec::new();
        let mut next = 0;
        while let Some(some) = self.sparse(next..next + LOOKED_AT) {
            sparse.extend(some);
            sparse.sort_unstable_by(|one, other| other.cmp(one));
            sparse.truncate(VICTIMS_MAX);
            next += LOOKED_AT;
        }
        let mut live = 0;
        let wins = |(taken, sparse): (usize, &Sparse)| {
            live += sparse.live;
            (live.div_ceil(ROOM as u64) < taken as u64).then_some(taken)
        };
        let taken = (1..).zip(&sparse).find_map(wins);
        sparse.iter().take(taken.unwrap_or(0)).map(|sparse| sparse.number).collect()
    }

    /// Those of some segments that are worth cleaning; `None` behind the last.
    fn sparse(&self, some: Range<u32>) -> Option<Vec<Sparse>> {
        let now = self.table.now();
        let worth = |(number, segment): (u32, &Segment)| {
            let (live, room) = (u64::from(segment.live), ROOM as u64);
            let Holds::Sequence(sequence) = self.table.holds(number) else { return None };
            let is_sparse = segment.duty == Duty::Written && live * 100 <= room * FULL_PERCENT;
            // Rosenblum and Ousterhout's benefit to cost, (1 - u) * age / (1 + u).
            let age = now.saturating_sub(sequence).min(1 << 20);
            is_sparse.then(|| Sparse { worth: (room - live) * age * 1000 / (room + live), number, live })
        };
        let state = self.state.lock();
        let end = state.segments.len().min(some.end as usize);
        let segments = state.segments.get(some.start as usize..end).filter(|some| !some.is_empty())?;
        Some((some.start..).zip(segments).filter_map(worth).collect())
    }

    /// Reads a whole segment and its directory.
    ///
    /// # Errors
    /// [`ReadError`]; the segment is then left alone until its pages have gone by themselves.
    pub fn image(&self, segment: u32) -> Result<super::Image, ReadError> {
        let Holds::Sequence(sequence) = self.table.holds(segment) else { return Err(ReadError::Nothing) };
        let image = super::Image::read(&*self.disk, self, segment, sequence);
        self.state.lock().stats.cleaned += u64::from(image.is_ok());
        image.inspect_err(|_| self.set_stuck(segment))
    }

    /// True while that writing is what lies in the segment.
    pub(super) fn still_holds(&self, segment: u32, sequence: u64) -> bool {
        self.table.holds(segment) == Holds::Sequence(sequence)
    }

    /// Something in the segment cannot be read, or it is not free after all that is named in it has gone: cleaning it would
    /// win nothing.
    pub fn set_stuck(&self, segment: u32) {
        if let Some(segment) = self.state.lock().segments.get_mut(segment as usize)
            && segment.duty == Duty::Written
        {
            segment.duty = Duty::Stuck;
        }
    }
}

/// What an object takes of a segment.
fn share_of(remote: Remote) -> u32 {
    u32::try_from(room_of(remote.length)).unwrap_or(u32::MAX)
}

impl std::fmt::Debug for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tier").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
