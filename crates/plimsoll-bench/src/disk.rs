//! The disk tier's reads: several under way by io_uring, against one `pread` at a time.
//!
//! Enters: a folder on a disk. Leaves: ratios of pages a second. Each way has a tier of its own with the same pages, and reads them past
//! the page cache as a pager does: some pages wait, each that has come is decrypted, checked and unpacked, and another is asked for
//! in its place. What must never happen: a page counted that is not what was stored; a read that the page cache answered.
use crate::figures::float;
use crate::report::{Comparison, Machine, Report, Run, Sample, higher};
use crate::session::{BenchError, Interrupt};
use anyhow::{Context, Result, ensure};
use plimsoll_linux::disk::device::{Disk, FileDisk};
use plimsoll_linux::disk::mover::Mover;
use plimsoll_linux::disk::queue::{Ended, Queue, Read, made};
use plimsoll_linux::disk::tier::{Limits, Tier};
use plimsoll_linux::uffd::far::{Far, Sight};
use plimsoll_linux::uffd::host::Domain;
use plimsoll_store::{Encoder, Fetched, Handle, HeapSlabs, NoDense, Store};
use plimsoll_sys::eventfd::{Bell, EventFd};
use plimsoll_sys::ring::ReadRing;
use plimsoll_types::{ByteCount, DomainId, GroupId, PAGE_SIZE, PageBytes};
use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;
use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use std::{fs, io};

/// Pages of a tier, random bytes: 128 MiB.
const PAGES: usize = 32 << 10;
/// Pages read in a run.
const READ: usize = 4000;
/// Pages that wait at once: a guest of 16 vCPUs, or a piece that is brought ahead.
const WAITING: usize = 16;
const ROUNDS: usize = 7;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

const NOTES: [&str; 3] = [
    "the peer is what plimsoll had before: a thread that makes one read after the other, with the same windows, checks and bytes",
    "both read past the page cache; what the disk or the host below it caches is the same for both, and warm after the first rounds",
    "pages are of random bytes: each is read, decrypted, checked and copied, and nothing is decompressed",
];

/// How pages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Ring,
    Threads,
    /// One at a time.
    Single,
}

/// Which pages come after each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Random,
    Ascending,
}

const ROWS: [(&str, Way, Order); 4] = [
    ("ring/random", Way::Ring, Order::Random),
    ("ring/in-order", Way::Ring, Order::Ascending),
    ("threads/random", Way::Threads, Order::Random),
    ("threads/in-order", Way::Threads, Order::Ascending),
];

/// What to repeat the benchmark with.
#[derive(Debug, Serialize)]
struct Settings {
    pages: usize,
    read: usize,
    waiting: usize,
    rounds: usize,
    seed: u64,
    peer: &'static str,
}

/// Numbers that look random, the same in every run.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// A page that no other is equal to.
fn page(number: usize) -> PageBytes {
    let mut random = Random(SEED ^ (number as u64 + 1).wrapping_mul(0x2545_f491_4f6c_dd1d));
    let mut page = [0; PAGE_SIZE];
    page.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&random.next().to_le_bytes()));
    page
}

/// A disk that is read in one of the ways.
struct ReadIn {
    file: Arc<FileDisk>,
    way: Way,
}

impl Disk for ReadIn {
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(offset, into)
    }

    fn queue(&self, ring: Option<ReadRing>) -> io::Result<Box<dyn Queue>> {
        match self.way {
            Way::Ring => self.file.queue(ring),
            Way::Threads => Err(io::ErrorKind::Unsupported.into()),
            Way::Single => {
                let (file, bell) = (Arc::clone(&self.file), Arc::new(Bell::new()?));
                Ok(Box::new(Single { file, bell, next: None }))
            }
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(offset, bytes)
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.reserve(offset, bytes)
    }

    fn shows_what_has_landed(&self) -> bool {
        self.file.shows_what_has_landed()
    }

    fn empty(&self) -> io::Result<()> {
        self.file.empty()
    }

    fn keepsake(&self) -> Option<BorrowedFd<'_>> {
        self.file.keepsake()
    }
}

/// One read after the other, by whoever waits for it.
struct Single {
    file: Arc<FileDisk>,
    bell: Arc<Bell>,
    next: Option<Read>,
}

impl Queue for Single {
    fn bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    fn depth(&self) -> usize {
        1
    }

    fn begin(&mut self, read: Read) -> Result<(), Read> {
        if self.next.is_some() {
            return Err(read);
        }
        self.next = Some(read);
        Ok(())
    }

    fn wait(&mut self, ended: &mut Vec<Ended>) -> io::Result<()> {
        let Some(read) = self.next.take() else { return self.bell.wait() };
        ended.push(made(&*self.file, read));
        Ok(())
    }
}

/// A file that is gone in the end.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A tier, and a machine's place at it.
struct Side {
    domain: Arc<Domain<HeapSlabs>>,
    handles: Vec<Handle>,
    far: Far<HeapSlabs>,
    kick: Arc<EventFd>,
    fetched: Fetched,
    random: Random,
    _file: Removed,
}

impl Side {
    fn new(folder: &Path, way: Way) -> Result<Self, BenchError> {
        let path = folder.join(format!("disk-{way:?}"));
        let file = FileDisk::create(&path).context("there is no file for a tier")?;
        let removed = Removed(path);
        if !file.shows_what_has_landed() {
            let place = folder.display();
            return Err(BenchError::NotHere(format!(
                "{place} is not read past the page cache: name a folder on a disk"
            )));
        }
        let limits = Limits { disk: ByteCount::mib(256), domain: None };
        let tier = Tier::create(Box::new(ReadIn { file: Arc::new(file), way }), limits);
        let tier = Arc::new(tier.context("there is no tier")?);
        let store = Store::new(HeapSlabs::new(PAGES));
        let domain = Arc::new(Domain::new(DomainId(1), GroupId(1), store));
        let (mut encoder, mut mover, mut handles) =
            (Encoder::new(), Mover::new(Arc::clone(&tier)), Vec::new());
        for number in 0..PAGES {
            let stored = domain.store(|store| store.put(&page(number), &mut encoder));
            let handle = stored.context("the store takes no page")?.context("the store is full")?.handle;
            mover.demote(&domain, handle, None).context("the disk takes no page")?;
            handles.push(handle);
        }
        mover.flush().context("the disk takes no pages")?;
        let kick = Arc::new(EventFd::new().context("no eventfd")?);
        let far = Far::new(tier, Arc::clone(&domain), Arc::clone(&kick)).context("nobody reads")?;
        let (fetched, random) = (Fetched::new(), Random(SEED));
        Ok(Self { domain, handles, far, kick, fetched, random, _file: removed })
    }

    /// Pages a second.
    fn run(&mut self, order: Order) -> Result<f64> {
        let start = usize::try_from(self.random.next()).unwrap_or(0) % PAGES;
        let mut pages: VecDeque<usize> = (0..READ)
            .map(|step| match order {
                Order::Ascending => (start + step) % PAGES,
                Order::Random => usize::try_from(self.random.next()).unwrap_or(0) % PAGES,
            })
            .collect();
        let begun = Instant::now();
        let mut waiting: BTreeSet<usize> = BTreeSet::new();
        while !pages.is_empty() || !waiting.is_empty() {
            while waiting.len() < WAITING
                && let Some(next) = pages.pop_front()
            {
                waiting.insert(next);
            }
            let before = waiting.len();
            let there: Vec<usize> =
                waiting.iter().copied().filter(|page| self.far.has(self.handles[*page])).collect();
            for page in there {
                self.take(page)?;
                waiting.remove(&page);
            }
            if waiting.len() == before {
                poll(&mut [PollFd::new(&self.kick.as_fd(), PollFlags::IN)], None).context("no kick")?;
                self.kick.drain().context("no kick")?;
            }
        }
        self.far.forget();
        Ok(float(READ as u64) / begun.elapsed().as_secs_f64())
    }

    fn take(&mut self, number: usize) -> Result<()> {
        let handle = self.handles[number];
        self.domain.store(|store| store.fetch(handle, &mut self.fetched)).context("it is not stored")?;
        match self.far.look(handle) {
            Sight::Read(read) => {
                ensure!(self.fetched.adopt(read.map_err(anyhow::Error::msg)?), "another page's bytes")
            }
            Sight::UnderWay => anyhow::bail!("it was there a moment ago"),
        }
        let mut found = [0; PAGE_SIZE];
        self.fetched.unpack(&mut found, &mut NoDense).context("it does not unpack")?;
        ensure!(found[..8] == page(number)[..8], "page {number} reads as something else");
        Ok(())
    }
}

/// Measures the rows whose names begin so, with files in the folder.
pub(crate) fn run(prefix: &str, folder: &Path, interrupt: &Interrupt) -> Result<Report, BenchError> {
    let machine = Machine::here();
    println!("{READ} of {PAGES} pages, {WAITING} wait at once, {ROUNDS} rounds of peer, ours, peer");
    println!("{machine}");
    NOTES.iter().for_each(|note| println!("note: {note}"));
    let mut results = Vec::new();
    let mut peer = Side::new(folder, Way::Single)?;
    for way in [Way::Ring, Way::Threads] {
        let rows: Vec<_> =
            ROWS.iter().filter(|(name, of, _)| name.starts_with(prefix) && *of == way).collect();
        if rows.is_empty() {
            continue;
        }
        let mut ours = Side::new(folder, way)?;
        for (name, _, order) in rows {
            let mut runs = Vec::new();
            for round in 0..=ROUNDS {
                interrupt.check()?;
                let sample = |side: &mut Side| side.run(*order).map(Sample::untimed);
                let run = Run {
                    peer: sample(&mut peer)?,
                    ours: sample(&mut ours)?,
                    peer_again: sample(&mut peer)?,
                };
                // The first warms what is below.
                runs.extend((round > 0).then_some(run));
            }
            let comparison = Comparison::new(higher(name, "pages/s", None), runs)?;
            println!("  {comparison}");
            results.push(comparison);
        }
    }
    let settings = Settings {
        pages: PAGES,
        read: READ,
        waiting: WAITING,
        rounds: ROUNDS,
        seed: SEED,
        peer: "one pread at a time",
    };
    Ok(Report::new(machine, &settings, &NOTES, results)?)
}
