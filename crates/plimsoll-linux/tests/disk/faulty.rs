//! A disk in memory that does what it is told to do wrong, and watches what it is given.
use parking_lot::Mutex;
use plimsoll_linux::disk::device::{BLOCK_SIZE, Disk};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

/// What the disk does wrong with a call. What is said to be done later is done when it [lands](FaultyDisk::land).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing, this time.
    None,
    /// It has no room, and says so; a write is done later all the same.
    NoSpace,
    /// It fails, and that is all.
    Failed,
    /// It fails to say so in time: a write is done later.
    Late,
    /// It does a part, and says so; the rest of a write is done later.
    Short,
    /// It does a part, and fails; the rest of a write is done later.
    Torn,
    /// Whoever writes is killed meanwhile, and the write is done later.
    Killed,
}

/// What a killed writer unwinds with.
struct Dead;

/// Does what a killed manager may have been at; `None` if it was killed.
pub(crate) fn until_killed<T>(work: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => Some(done),
        Err(cause) if cause.is::<Dead>() => None,
        Err(cause) => resume_unwind(cause),
    }
}

#[derive(Debug, Default)]
struct State {
    blocks: BTreeMap<u64, Vec<u8>>,
    /// For the next calls, one each.
    reads: VecDeque<Fault>,
    writes: VecDeque<Fault>,
    /// Blocks there is room for, beyond those that are there.
    room: Option<u64>,
    /// By sequence number, what was encrypted under it.
    encrypted: BTreeMap<u64, u64>,
    writes_made: u64,
    /// Sectors of writes that were refused, or whose writers are dead, and that have not been done yet.
    late: VecDeque<(u64, Vec<u8>)>,
}

impl State {
    fn store(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        for (number, block) in (offset / BLOCK_SIZE as u64..).zip(bytes.chunks(BLOCK_SIZE)) {
            if !self.blocks.contains_key(&number) {
                match &mut self.room {
                    Some(0) => return Err(io::ErrorKind::StorageFull.into()),
                    Some(room) => *room -= 1,
                    None => {}
                }
            }
            let room = self.blocks.entry(number).or_insert_with(|| vec![0; BLOCK_SIZE]);
            room[..block.len()].copy_from_slice(block);
        }
        Ok(())
    }

    fn delay(&mut self, offset: u64, bytes: &[u8]) {
        let sectors = (offset..).step_by(SECTOR_SIZE).zip(bytes.chunks(SECTOR_SIZE));
        self.late.extend(sectors.map(|(offset, sector)| (offset, sector.to_vec())));
    }

    /// A sector of a late write, if there is room for it.
    fn land(&mut self, offset: u64, sector: &[u8]) {
        let (number, at) = (offset / BLOCK_SIZE as u64, usize::try_from(offset).unwrap() % BLOCK_SIZE);
        let mut block = self.blocks.get(&number).cloned().unwrap_or_else(|| vec![0; BLOCK_SIZE]);
        block[at..at + sector.len()].copy_from_slice(sector);
        let _ = self.store(number * BLOCK_SIZE as u64, &block);
    }
}

/// What a disk writes whole or not at all.
const SECTOR_SIZE: usize = 512;

/// See the file's head. Clones are the same disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct FaultyDisk(Arc<Mutex<State>>);

impl FaultyDisk {
    pub(crate) fn fail_reads(&self, faults: &[Fault]) {
        self.0.lock().reads = faults.iter().copied().collect();
    }

    pub(crate) fn fail_writes(&self, faults: &[Fault]) {
        self.0.lock().writes = faults.iter().copied().collect();
    }

    /// It has room for so many blocks more; `None` for any number.
    pub(crate) fn set_room(&self, blocks: Option<u64>) {
        self.0.lock().room = blocks;
    }

    /// Does all that was to be done later, as far as there is room.
    pub(crate) fn land(&self) {
        self.land_some(usize::MAX);
    }

    /// Does so many sectors of what was to be done later, in the order in which they were given.
    pub(crate) fn land_some(&self, sectors: usize) {
        let mut state = self.0.lock();
        for _ in 0..sectors {
            let Some((offset, sector)) = state.late.pop_front() else { return };
            state.land(offset, &sector);
        }
    }

    /// Sectors that are still to be done.
    pub(crate) fn late(&self) -> usize {
        self.0.lock().late.len()
    }

    /// Changes a byte; false where there is none.
    pub(crate) fn flip(&self, offset: u64) -> bool {
        let mut state = self.0.lock();
        let block = state.blocks.get_mut(&(offset / BLOCK_SIZE as u64));
        let byte = block.and_then(|block| block.get_mut(usize::try_from(offset).unwrap() % BLOCK_SIZE));
        byte.map(|byte| *byte ^= 0x10).is_some()
    }

    /// Everything that is on it.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.lock().blocks.values().flatten().copied().collect()
    }

    pub(crate) fn writes_made(&self) -> u64 {
        self.0.lock().writes_made
    }
}

/// The part of a call that is done.
fn part(length: usize, fault: Fault) -> usize {
    match fault {
        // Not even whole blocks.
        Fault::Short | Fault::Torn => {
            (length * 2 / 3).max(BLOCK_SIZE.min(length)) / SECTOR_SIZE * SECTOR_SIZE
        }
        Fault::None => length,
        Fault::NoSpace | Fault::Failed | Fault::Late | Fault::Killed => 0,
    }
}

fn error_of(fault: Fault) -> Option<io::Error> {
    match fault {
        Fault::None | Fault::Short => None,
        Fault::NoSpace => Some(io::ErrorKind::StorageFull.into()),
        Fault::Failed | Fault::Late | Fault::Torn | Fault::Killed => Some(io::Error::from_raw_os_error(5)),
    }
}

impl Disk for FaultyDisk {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        assert!(is_direct(offset, into), "direct I/O takes whole blocks only");
        let mut state = self.0.lock();
        let fault = state.reads.pop_front().unwrap_or(Fault::None);
        if let Some(error) = error_of(fault) {
            return Err(error);
        }
        let length = part(into.len(), fault);
        let mut done = 0;
        for (number, room) in (offset / BLOCK_SIZE as u64..).zip(into[..length].chunks_mut(BLOCK_SIZE)) {
            // Behind a hole there may be more; behind the last block there is nothing.
            if state.blocks.last_key_value().is_none_or(|(last, _)| *last < number) {
                break;
            }
            let zeros = vec![0; BLOCK_SIZE];
            room.copy_from_slice(&state.blocks.get(&number).unwrap_or(&zeros)[..room.len()]);
            done += room.len();
        }
        Ok(done)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        assert!(is_direct(offset, bytes), "direct I/O takes whole blocks only");
        let mut state = self.0.lock();
        state.writes_made += 1;
        let fault = state.writes.pop_front().unwrap_or(Fault::None);
        if bytes.starts_with(b"PLIMSEGM") {
            let sequence = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
            let content = xxh3_64(&bytes[64..]);
            let before = *state.encrypted.entry(sequence).or_insert(content);
            assert_eq!(before, content, "sequence number {sequence} was used for two segments");
        }
        let length = part(bytes.len(), fault);
        if fault != Fault::Failed {
            state.delay(offset + length as u64, &bytes[length..]);
        }
        if fault == Fault::Killed {
            drop(state);
            resume_unwind(Box::new(Dead));
        }
        state.store(offset, &bytes[..length])?;
        error_of(fault).map_or(Ok(length), Err)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let mut state = self.0.lock();
        let wanted = offset / BLOCK_SIZE as u64..(offset + bytes) / BLOCK_SIZE as u64;
        let missing: Vec<u64> = wanted.filter(|number| !state.blocks.contains_key(number)).collect();
        if let Some(room) = &mut state.room {
            *room = room.checked_sub(missing.len() as u64).ok_or(io::ErrorKind::StorageFull)?;
        }
        state.blocks.extend(missing.into_iter().map(|number| (number, vec![0; BLOCK_SIZE])));
        Ok(())
    }

    fn shows_what_has_landed(&self) -> bool {
        true
    }

    fn empty(&self) -> io::Result<()> {
        self.0.lock().blocks.clear();
        Ok(())
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

fn is_direct(offset: u64, bytes: &[u8]) -> bool {
    let aligned = |number: usize| number.is_multiple_of(BLOCK_SIZE);
    offset.is_multiple_of(BLOCK_SIZE as u64) && aligned(bytes.len()) && aligned(bytes.as_ptr().addr())
}
