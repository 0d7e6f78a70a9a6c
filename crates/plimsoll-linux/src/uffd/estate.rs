//! What a manager leaves to one in another process: a register in a file in memory, and descriptors that somebody keeps.
//!
//! Enters: machines and domains as they are taken, descriptors from an earlier manager. Leaves: the same machines and domains, for
//! whoever manages them next. What must never happen: a machine of which the register knows and whose descriptors are gone, or
//! a descriptor that is let go while a page of its guest is elsewhere.
//!
//! The keeper ([`Keep`]) understands nothing of this. It holds descriptors in numbered slots, the register in slot
//! `REGISTER`, and gives all of them to the next manager. Everything a manager can die in the middle of is ordered so that the
//! next one can tell:
//!
//! ```text
//! take  1 descriptors into slots           that no record names: let go by the next manager, the VMM sees its socket close
//!       2 records written, state offered   all of a machine's, or the machine does not count
//!       3 Welcome sent                     sent again by the next manager: an agent that has had it ignores it
//!       4 state taken
//! end   1 state free                       the rest as in 1 above
//!       2 descriptors let go
//! leave 1 state left                       all of the machine is its VMM's: there is no way back
//!       2 VMM told, shard by shard         told again by the next manager, which ends it as above
//! ```
//!
//! The file, all integers little endian:
//!
//! ```text
//! 0      magic u64 | 8 version u32 | 12 records u32 | 16 epoch u64 | 24 next identity u64
//! 4096   state u64 of record 0, 1, ...                       (0 free, 1 offered, 2 taken, 3 left), padded to a page
//! then   record 0, 1, ..., 2048 bytes each
//! Record 0 check u64 | 8 kind u32 (1 shard, 2 domain, 4 tier) | 12 machine u32 | 16 shard's identity u32 | 20 group u32
//!        24 domain u32 | 28 process u32 | 32 amount u64 (reservation, the store's limit, or a domain's part of the tier) | 40 slots [u32; 6]
//!        64 bytes of hello u32 | 68 zero u32 | 72 hello, as it was handed over, to the end
//! ```
//!
//! A record's check is xxh3 over the rest of it, and a record does not change while its state is not free. Epoch, next
//! identity and states are single words. How the next manager puts machines together from that: `inherit`.
use super::shards::{MachineVault, ShardVault};
use crate::disk::tier::{Keepsakes, Tier};
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_sys::mapping::{Memfd, MemfdError, SharedMapping};
use plimsoll_types::{ByteCount, DomainId, GroupId, MachineId, PAGE_SIZE};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

mod inherit;

pub(super) use self::inherit::{Fragment, Inheritance};

/// The slot of the register.
pub const REGISTER: u32 = 0;
/// The slots of the disk tier's table, its disk, and its key: what is there is no machine's.
const TIER_SLOTS: [u32; 3] = [5, 6, 7];
/// Slots below this one are the daemon's own.
pub const RESERVED: u32 = 16;

const MAGIC: u64 = u64::from_le_bytes(*b"PLIMREGI");
/// The version of the register that this build writes, and the only one it reads: before 3 the disk tier had no key of its own, and
/// machines were in slots that are the daemon's now; before 4 page words did not say how a page was given, and VMMs cannot be asked.
const VERSION: u32 = 4;
const RECORDS: u32 = 4096;
const RECORD_SIZE: usize = 2048;
const HELLO_MAX: usize = RECORD_SIZE - 72;
const STATES_OFFSET: usize = PAGE_SIZE;
const RECORDS_OFFSET: usize =
    STATES_OFFSET + (RECORDS as usize * size_of::<u64>()).next_multiple_of(PAGE_SIZE);
const SIZE: usize = RECORDS_OFFSET + RECORDS as usize * RECORD_SIZE;
/// Words of the head.
const HEAD_VERSION: usize = 1;
const HEAD_EPOCH: usize = 2;
const HEAD_NEXT_ID: usize = 3;

const FREE: u64 = 0;
const OFFERED: u64 = 1;
const TAKEN: u64 = 2;
const LEFT: u64 = 3;

const SHARD: u32 = 1;
const DOMAIN: u32 = 2;
/// No single bit makes one of the three another.
const TIER: u32 = 4;
/// A slot that a record does not use.
const NO_SLOT: u32 = u32::MAX;
/// Which of a shard's slots is that of its process.
const PROCESS: usize = 4;
/// Which of them is that of its socket.
const SOCKET: usize = 2;
/// Which of a shard's slots is that of the agent's end of its socket.
const AGENT: usize = 5;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Record {
    check: u64,
    kind: u32,
    machine: u32,
    shard: u32,
    group: u32,
    domain: u32,
    process: u32,
    amount: u64,
    /// Of a shard: RAM's userfaultfd, the airlock's, socket, words, process; and, until it is taken, the agent's end of the
    /// socket. Of a domain: the slabs. Of the disk tier: its table, its disk, and its key where that is not in the table.
    slots: [u32; 6],
    hello_bytes: u32,
    zero: u32,
    hello: [u8; HELLO_MAX],
}
const _: () = assert!(size_of::<Record>() == RECORD_SIZE);

impl Record {
    fn sealed(mut self) -> Self {
        self.check = self.sum();
        self
    }

    fn sum(&self) -> u64 {
        xxh3_64(&self.as_bytes()[size_of::<u64>()..])
    }

    fn is_damaged(&self) -> bool {
        self.check != self.sum()
    }

    /// Slots that hold something of it while it is in that state. The agent's end is let go when the machine has been taken:
    /// from then on its slot may be another machine's, although the record still has its number.
    fn held(&self, state: u64) -> impl Iterator<Item = u32> {
        let held = if state == OFFERED { self.slots.len() } else { AGENT };
        self.slots.into_iter().take(held).filter(|slot| *slot != NO_SLOT)
    }

    fn agent(&self) -> Option<u32> {
        self.slots.get(AGENT).copied().filter(|slot| *slot != NO_SLOT)
    }
}

/// Holds descriptors from one manager to the next.
pub trait Keep: Send + Sync {
    /// Puts a copy of a descriptor into a slot that is free, and returns when it is there.
    ///
    /// # Errors
    /// When there is no keeper any more, or it cannot.
    fn keep(&self, slot: u32, descriptor: BorrowedFd<'_>) -> io::Result<()>;

    /// Closes what a slot holds.
    ///
    /// # Errors
    /// When there is no keeper any more.
    fn let_go(&self, slot: u32) -> io::Result<()>;

    /// How many slots there are.
    fn slots(&self) -> u32;
}

/// The estate could not be opened, or something could not be entered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EstateError {
    /// The register is of another version.
    #[error(
        "the machines' register is of version {found}, and this build knows {VERSION}: start the plimsoll again that wrote it"
    )]
    Version {
        /// What it says.
        found: u32,
    },
    /// The register is none.
    #[error("what was kept as the machines' register is none: it begins with {found:#x}")]
    Magic {
        /// What it begins with.
        found: u64,
    },
    /// No memory for the register, or what was kept cannot be mapped.
    #[error("the machines' register cannot be mapped")]
    Memory(#[from] MemfdError),
    /// A descriptor could not be kept.
    #[error("the keeper cannot keep what belongs to the machine")]
    Keep(#[source] io::Error),
    /// All records or slots are taken.
    #[error(
        "the register is full: it has room for {RECORDS} shards and domains, and the keeper for {slots} descriptors"
    )]
    Full {
        /// The keeper's slots.
        slots: u32,
    },
    /// A record is damaged, or what it names is not there.
    #[error("{what}")]
    Damaged {
        /// What was found.
        what: String,
    },
}

/// Whether this build can go on with what such a register says. Nothing is changed.
///
/// # Errors
/// [`EstateError`], where it cannot.
pub fn recognise(register: OwnedFd) -> Result<(), EstateError> {
    recognised(register).map(drop)
}

/// What it is is asked first: a register of another version may well be of another size.
fn recognised(register: OwnedFd) -> Result<SharedMapping, EstateError> {
    let memory = SharedMapping::new(&Memfd::try_from(register)?)?;
    let words = memory.as_atomic_u64s();
    let head = |word: usize| words.get(word).map_or(0, |word| word.load(Ordering::Acquire));
    let magic = head(0);
    if magic != MAGIC {
        return Err(EstateError::Magic { found: magic });
    }
    let [version, _] = halves(head(HEAD_VERSION));
    if version != VERSION {
        return Err(EstateError::Version { found: version });
    }
    if words.len() * size_of::<u64>() != SIZE {
        return Err(MemfdError::Size { size: memory.size() }.into());
    }
    Ok(memory)
}

/// The register and the keeper.
pub struct Estate {
    keeper: Arc<dyn Keep>,
    memory: SharedMapping,
    /// Slots that hold something.
    taken: Mutex<BTreeSet<u32>>,
    /// What was kept, until the machines have been put together.
    kept: Mutex<BTreeMap<u32, OwnedFd>>,
}

impl Estate {
    /// Goes on with what a keeper has: nothing, or what an earlier manager left. Slots below [`RESERVED`], the register's and
    /// the disk tier's apart, are left alone.
    ///
    /// # Errors
    /// [`EstateError`].
    pub fn open(keeper: Arc<dyn Keep>, mut kept: BTreeMap<u32, OwnedFd>) -> Result<Self, EstateError> {
        let memory = match kept.remove(&REGISTER) {
            Some(file) => recognised(file)?,
            None => Self::found(&*keeper)?,
        };
        let is_ours = |slot: &u32| *slot >= RESERVED || TIER_SLOTS.contains(slot);
        let taken = kept.keys().copied().filter(is_ours).collect();
        Ok(Self { keeper, memory, taken: Mutex::new(taken), kept: Mutex::new(kept) })
    }

    fn found(keeper: &dyn Keep) -> Result<SharedMapping, EstateError> {
        let file = Memfd::create("plimsoll-register", ByteCount(SIZE as u64))?;
        let memory = SharedMapping::new(&file)?;
        let words = memory.as_atomic_u64s();
        words[HEAD_VERSION].store(u64::from(VERSION) | u64::from(RECORDS) << 32, Ordering::Relaxed);
        words[HEAD_NEXT_ID].store(1, Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
        // Whole before it is kept: a manager that dies before this leaves nothing.
        keeper.keep(REGISTER, file.as_fd()).map_err(EstateError::Keep)?;
        Ok(memory)
    }

    fn head(&self, word: usize) -> &AtomicU64 {
        &self.memory.as_atomic_u64s()[word]
    }

    /// The epoch of the last manager.
    pub(super) fn epoch(&self) -> u64 {
        self.head(HEAD_EPOCH).load(Ordering::Acquire)
    }

    /// Written before it is used.
    pub(super) fn set_epoch(&self, epoch: u64) {
        self.head(HEAD_EPOCH).store(epoch, Ordering::Release);
    }

    pub(super) fn next_id(&self) -> u32 {
        u32::try_from(self.head(HEAD_NEXT_ID).load(Ordering::Acquire)).unwrap_or(u32::MAX)
    }

    /// Identities below `next` may be in use.
    pub(super) fn set_next_id(&self, next: u32) {
        self.head(HEAD_NEXT_ID).store(u64::from(next), Ordering::Release);
    }

    fn state(&self, record: usize) -> &AtomicU64 {
        &self.memory.as_atomic_u64s()[STATES_OFFSET / size_of::<u64>() + record]
    }

    fn place(&self, record: usize) -> &[AtomicU64] {
        let first = (RECORDS_OFFSET + record * RECORD_SIZE) / size_of::<u64>();
        &self.memory.as_atomic_u64s()[first..first + RECORD_SIZE / size_of::<u64>()]
    }

    /// The records that are not free, with their states.
    fn records(&self) -> impl Iterator<Item = (usize, u64, Record)> + '_ {
        let states = (0..RECORDS as usize).map(|at| (at, self.state(at).load(Ordering::Acquire)));
        states.filter(|(_, state)| *state != FREE).map(|(at, state)| {
            let bytes: Vec<u8> =
                self.place(at).iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect();
            (at, state, Record::read_from_bytes(&bytes).unwrap_or_else(|_| Record::new_zeroed()))
        })
    }

    /// Writes records into places that are free, then their states.
    fn enter(&self, records: &[Record], state: u64) -> Result<(), EstateError> {
        let free = (0..RECORDS as usize).filter(|at| self.state(*at).load(Ordering::Acquire) == FREE);
        let places: Vec<usize> = free.take(records.len()).collect();
        if places.len() < records.len() {
            return Err(EstateError::Full { slots: self.keeper.slots() });
        }
        for (at, record) in places.iter().zip(records) {
            let (words, _) = record.as_bytes().as_chunks();
            for (word, bytes) in self.place(*at).iter().zip(words) {
                word.store(u64::from_le_bytes(*bytes), Ordering::Relaxed);
            }
        }
        places.iter().for_each(|at| self.state(*at).store(state, Ordering::Release));
        Ok(())
    }

    /// Has a descriptor kept in a slot that is free.
    fn keep(&self, descriptor: BorrowedFd<'_>, slots: &mut Vec<u32>) -> Result<u32, EstateError> {
        let full = EstateError::Full { slots: self.keeper.slots() };
        let free = |taken: &BTreeSet<u32>| (RESERVED..self.keeper.slots()).find(|slot| !taken.contains(slot));
        let mut taken = self.taken.lock();
        let slot = free(&taken).ok_or(full)?;
        // Nobody else's from here on.
        taken.insert(slot);
        drop(taken);
        self.keep_in(slot, descriptor, slots)
    }

    fn keep_in(
        &self,
        slot: u32,
        descriptor: BorrowedFd<'_>,
        slots: &mut Vec<u32>,
    ) -> Result<u32, EstateError> {
        self.taken.lock().insert(slot);
        slots.push(slot);
        self.keeper.keep(slot, descriptor).map_err(EstateError::Keep)?;
        Ok(slot)
    }

    fn let_go(&self, slots: impl IntoIterator<Item = u32>) {
        for slot in slots {
            // Without a keeper nobody holds it but this process.
            let _ = self.keeper.let_go(slot);
            self.taken.lock().remove(&slot);
        }
    }

    /// Enters a domain whose store is empty.
    pub(super) fn enter_domain(
        &self,
        id: DomainId,
        group: GroupId,
        slabs: &MemfdSlabs,
        limit: ByteCount,
    ) -> Result<(), EstateError> {
        let mut slots = Vec::new();
        let entered = self.keep(slabs.keepsake(), &mut slots).and_then(|slot| {
            let record = Record {
                kind: DOMAIN,
                group: group.0,
                domain: id.0,
                amount: limit.0,
                slots: [slot, NO_SLOT, NO_SLOT, NO_SLOT, NO_SLOT, NO_SLOT],
                ..Record::new_zeroed()
            };
            self.enter(&[record.sealed()], TAKEN)
        });
        entered.inspect_err(|_| self.let_go(slots))
    }

    /// Enters the disk tier, on which nothing is yet.
    pub(super) fn enter_tier(&self, tier: &Tier) -> Result<(), EstateError> {
        let Keepsakes { table, key, disk } = tier.keepsakes();
        let what = || EstateError::Damaged { what: "the disk tier's disk ends with this process".to_owned() };
        let disk = disk.ok_or_else(what)?;
        let mut slots = Vec::new();
        let [in_table, in_disk, in_key] = TIER_SLOTS;
        let mut keep = |slot, descriptor| self.keep_in(slot, descriptor, &mut slots);
        let mut keep_all = || {
            let key = key.map(|key| keep(in_key, key)).transpose()?;
            Ok([keep(in_table, table)?, keep(in_disk, disk)?, key.unwrap_or(NO_SLOT)])
        };
        let entered = keep_all().and_then(|[table, disk, key]| {
            let record = Record {
                kind: TIER,
                amount: tier.quota().map_or(0, |quota| quota.0),
                slots: [table, disk, key, NO_SLOT, NO_SLOT, NO_SLOT],
                ..Record::new_zeroed()
            };
            self.enter(&[record.sealed()], TAKEN)
        });
        entered.inspect_err(|_| self.let_go(slots))
    }

    /// Enters a machine that is about to be welcomed; `agents` are the agents' ends of all sockets but the first.
    pub(super) fn offer(&self, machine: &MachineVault, agents: &[OwnedFd]) -> Result<(), EstateError> {
        let mut slots = Vec::new();
        let agents = [None].into_iter().chain(agents.iter().map(Some));
        let records = machine.shards.iter().zip(agents).map(|(shard, agent)| {
            let agent = agent.map(|agent| self.keep(agent.as_fd(), &mut slots)).transpose()?;
            self.record(machine, shard, agent, &mut slots)
        });
        let records: Result<Vec<Record>, EstateError> = records.collect();
        let entered = records.and_then(|records| self.enter(&records, OFFERED));
        entered.inspect_err(|_| self.let_go(slots))
    }

    fn record(
        &self,
        machine: &MachineVault,
        shard: &ShardVault,
        agent: Option<u32>,
        slots: &mut Vec<u32>,
    ) -> Result<Record, EstateError> {
        let custody = &shard.custody;
        let mut hello = [0; HELLO_MAX];
        let encoded = custody.hello.encode();
        let Some(room) = hello.get_mut(..encoded.len()) else {
            return Err(EstateError::Damaged { what: format!("a hand-over of {} bytes", encoded.len()) });
        };
        room.copy_from_slice(&encoded);
        let [ram, airlock, socket, process] = custody.descriptors();
        // A supervisor that keeps what the keeper has keeps each open file once. All shards have one process.
        let reopened = custody.process_reopened();
        let process = reopened.as_ref().map_or(process, AsFd::as_fd);
        let mut keep = |descriptor| self.keep(descriptor, slots);
        let kept = [keep(ram)?, keep(airlock)?, keep(socket)?, keep(shard.words.keepsake())?, keep(process)?];
        let [ram, airlock, socket, words, process] = kept;
        let record = Record {
            kind: SHARD,
            machine: machine.id.0,
            shard: shard.id.0,
            group: machine.membership.group.0,
            domain: machine.membership.domain.0,
            process: custody.process().get(),
            amount: machine.membership.reservation.0,
            slots: [ram, airlock, socket, words, process, agent.unwrap_or(NO_SLOT)],
            hello_bytes: u32::try_from(encoded.len()).unwrap_or(u32::MAX),
            hello,
            ..Record::new_zeroed()
        };
        Ok(record.sealed())
    }

    /// The machine has been welcomed.
    pub(super) fn taken(&self, machine: MachineId) {
        self.records_of(machine).for_each(|(at, state, record)| self.take(at, state, &record));
    }

    /// Marks an offered record as taken.
    fn take(&self, at: usize, state: u64, record: &Record) {
        if state == OFFERED {
            self.state(at).store(TAKEN, Ordering::Release);
            self.let_go(record.agent());
        }
    }

    /// All of the machine is its VMM's again. Whoever finds that written tells it so, and takes nothing over.
    pub(super) fn leave(&self, machine: MachineId) {
        self.records_of(machine).for_each(|(at, ..)| self.state(at).store(LEFT, Ordering::Release));
    }

    /// Nothing of the machine is to be kept any more.
    pub(super) fn strike(&self, machine: MachineId) {
        self.strike_all(&self.records_of(machine).collect::<Vec<_>>());
    }

    /// Nothing of the domain, whose machines are gone, is to be kept any more.
    pub(super) fn strike_domain(&self, domain: DomainId) {
        let is_its = |record: &Record| record.kind == DOMAIN && record.domain == domain.0;
        self.strike_all(&self.sound().filter(|(.., record)| is_its(record)).collect::<Vec<_>>());
    }

    fn strike_all(&self, records: &[(usize, u64, Record)]) {
        records.iter().for_each(|(at, ..)| self.state(*at).store(FREE, Ordering::Release));
        records.iter().for_each(|(_, state, record)| self.let_go(record.held(*state)));
    }

    fn records_of(&self, machine: MachineId) -> impl Iterator<Item = (usize, u64, Record)> + '_ {
        self.sound().filter(move |(_, _, record)| record.kind == SHARD && record.machine == machine.0)
    }

    /// The records that can be believed: a damaged one may name another machine, or its slots.
    fn sound(&self) -> impl Iterator<Item = (usize, u64, Record)> + '_ {
        self.records().filter(|(.., record)| !record.is_damaged())
    }
}

impl std::fmt::Debug for Estate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Estate").field("epoch", &self.epoch()).finish_non_exhaustive()
    }
}

/// The lower and the upper half of a word.
const fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

#[cfg(test)]
pub(crate) mod tests;
