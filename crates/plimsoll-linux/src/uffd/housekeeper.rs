//! The housekeeper: a thread that packs cold pages densely, compacts stores, and makes huge pages of what became hot.
//!
//! Enters: the domains' stores, requests of pagers, how much of a processor it may take. Leaves: less memory for the same
//! pages, and [`Tidied`]. What must never happen: a pager that waits for it. So it takes a store's lock for short steps
//! only, compresses and asks the kernel without any, and sleeps after each slice of work for as long as its share of one
//! processor demands.
//!
//! A page grows cold in the store. Every object is looked at once in [`Housekeeping::cold_after`]; one that was there
//! already the time before is packed. So it has been cold for that long at least, and for twice as long at most.
use super::host::{Domain, Host, Incident};
use super::manager::Governed;
use crate::dense::Zstd;
use crate::slabs::MemfdSlabs;
use parking_lot::Mutex;
use plimsoll_core::replacement::Run;
use plimsoll_store::{Cold, DenseCodec, Fetched, PackError, Packer, Progress, Replacement};
use plimsoll_sys::heap;
use plimsoll_types::{ByteCount, DomainId, MachineId};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Records looked at under one hold of a store's lock: about 8 ns each.
pub(super) const RECORDS_PER_STEP: u32 = 1024;
/// Of compaction, in the unit of [`Store::compact`](plimsoll_store::Store::compact): about 32 objects moved.
const WORK_PER_STEP: u32 = 2048;
/// How long a store that is not worth compacting is left alone.
const COMPACT_EVERY: Duration = Duration::from_secs(2);
/// How many times longer stores are left alone while no pager does anything.
const PAUSES_MAX: u32 = 8;
/// How often freed memory is given back at most, when pagers have come to rest.
const TRIM_EVERY: Duration = Duration::from_secs(10);
/// CPU time of one slice of work.
const SLICE: Duration = Duration::from_millis(2);
/// How long it sleeps when there is nothing to do.
const IDLE: Duration = Duration::from_millis(100);

/// How the housekeeper works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Housekeeping {
    /// How long an object is in the store before it may be packed densely.
    pub cold_after: Duration,
    /// The share of one processor it takes at most, in thousandths.
    pub cpu_permille: u32,
}

impl Default for Housekeeping {
    /// Cold after a minute; a tenth of a processor packs some 3,500 pages a second.
    fn default() -> Self {
        Self { cold_after: Duration::from_secs(60), cpu_permille: 100 }
    }
}

/// What the housekeeper has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tidied {
    /// Objects packed densely.
    pub packed: u64,
    /// Objects that stayed as they were, because packing saved too little or they were gone by then.
    pub passed_over: u64,
    /// Objects moved by compaction.
    pub moved: u64,
    /// Slab memory given back by compaction.
    pub released: ByteCount,
    /// Blocks of which the kernel made huge pages.
    pub collapsed: u64,
    /// Blocks of which it would not.
    pub not_collapsed: u64,
    /// CPU time taken.
    pub cpu: Duration,
}

/// The domains there are. Weak, so that a store can be taken out of its domain when its manager stops.
pub(super) type Domains = Arc<Mutex<Vec<Weak<Domain<MemfdSlabs>>>>>;

/// Those that are still there. The others are forgotten: as long as anybody remembers one, its memory is not free.
pub(super) fn known(domains: &Domains) -> Vec<Arc<Domain<MemfdSlabs>>> {
    let mut known = Vec::new();
    domains.lock().retain(|domain| {
        let domain = domain.upgrade();
        let is_there = domain.is_some();
        known.extend(domain);
        is_there
    });
    known
}

/// Where the housekeeper is in one store.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// When the walk it is in began.
    walk: Instant,
    /// Not before then is the next one to begin.
    rests_until: Option<Instant>,
    compacts_at: Instant,
}

/// How long stores are left alone in which nothing was to be done: a host may have a thousand of them.
#[derive(Clone, Copy, Debug)]
struct Lull {
    shortest: Duration,
    pause: Duration,
    /// When nothing was to be done in any of them, and what pagers had done by then.
    in_vain: Option<(Instant, u64)>,
    /// When freed memory was given back last, and what pagers had done by then.
    trimmed: Option<(Instant, u64)>,
}

impl Lull {
    fn new(how: Housekeeping) -> Self {
        let shortest = COMPACT_EVERY.min(how.cold_after);
        Self { shortest, pause: shortest, in_vain: None, trimmed: None }
    }

    /// Whether stores are to be tended: where pagers have done something meanwhile, the pause is a short one.
    fn is_over(&self, now: Instant, happened: u64) -> bool {
        self.in_vain.is_none_or(|(since, before)| {
            now.duration_since(since) >= if before == happened { self.pause } else { self.shortest }
        })
    }

    /// All were tended, and something was done or not. Says whether pagers have come to rest, so that what they freed may be given back.
    fn tended(&mut self, is_done: bool, now: Instant, happened: u64) -> bool {
        let is_quiet = !is_done && self.in_vain.is_some_and(|(_, before)| before == happened);
        self.pause = if is_quiet { (self.pause * 2).min(self.shortest * PAUSES_MAX) } else { self.shortest };
        self.in_vain = (!is_done).then_some((now, happened));
        let is_fresh =
            |(when, then): (Instant, u64)| then == happened || now.duration_since(when) < TRIM_EVERY;
        let is_to_trim = is_quiet && !self.trimmed.is_some_and(is_fresh);
        if is_to_trim {
            self.trimmed = Some((now, happened));
        }
        is_to_trim
    }
}

/// Everything the thread has of its own.
struct Housekeeper<'a> {
    host: &'a Host,
    governed: &'a Governed,
    how: Housekeeping,
    places: BTreeMap<DomainId, Place>,
    packer: Packer,
    fetched: Fetched,
    /// `None` once it wrote something that it could not read.
    dense: Option<Box<dyn DenseCodec>>,
    lull: Lull,
}

/// Works until it is told to stop; whoever tells it unparks it.
pub(super) fn keep(
    host: &Host,
    governed: &Governed,
    domains: &Domains,
    how: Housekeeping,
    zstd: Zstd,
    stop: &AtomicBool,
) {
    let mut keeper = Housekeeper {
        host,
        governed,
        how,
        places: BTreeMap::new(),
        packer: Packer::new(),
        fetched: Fetched::new(),
        dense: Some(Box::new(zstd)),
        lull: Lull::new(how),
    };
    while !stop.load(Ordering::Relaxed) {
        let before = cpu_time();
        let mut worked = true;
        while worked && cpu_time().saturating_sub(before) < SLICE && !stop.load(Ordering::Relaxed) {
            worked = keeper.collapse() | keeper.tend_due(domains, Instant::now());
        }
        let took = cpu_time().saturating_sub(before);
        keeper.host.tidied(|tidied| tidied.cpu += took);
        let rest = took * 1000 / how.cpu_permille.max(1);
        std::thread::park_timeout(if worked { rest.saturating_sub(took) } else { rest.max(IDLE) });
    }
}

/// CPU time of this thread.
pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |part: i64| u64::try_from(part).unwrap_or(0);
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

impl Housekeeper<'_> {
    /// One step in each domain's store. False when there is nothing to do. What was remembered of domains that are gone is forgotten: one
    /// comes and goes with each machine that shares with nobody.
    fn tend_all(&mut self, domains: &Domains) -> bool {
        let known = known(domains);
        let worked = known.iter().fold(false, |worked, domain| self.tend(domain, Instant::now()) | worked);
        if self.places.len() > known.len() {
            self.places.retain(|id, _| known.iter().any(|domain| domain.id == *id));
        }
        worked
    }

    /// The same, unless nothing was to be done a moment ago.
    fn tend_due(&mut self, domains: &Domains, now: Instant) -> bool {
        let happened = self.host.bustle().count();
        if !self.lull.is_over(now, happened) {
            return false;
        }
        let worked = self.tend_all(domains);
        if self.lull.tended(worked, now, happened) {
            heap::trim();
        }
        worked
    }

    /// One step in a domain's store. False when there is nothing to do at `now`.
    fn tend(&mut self, domain: &Domain<MemfdSlabs>, now: Instant) -> bool {
        let fresh = Place { walk: now, rests_until: None, compacts_at: now };
        let mut place = *self.places.entry(domain.id).or_insert(fresh);
        let is_awake = place.rests_until.is_none_or(|until| until <= now);
        if is_awake && place.rests_until.take().is_some() {
            place.walk = now;
        }
        let packed = is_awake && self.dense.is_some() && self.pack(domain, &mut place);
        let compacted = place.compacts_at <= now && self.compact(domain, &mut place, now);
        self.places.insert(domain.id, place);
        if packed || compacted {
            // The group was added with the domain; a store that shrinks is never refused.
            let _ = domain.settle(self.host);
        }
        packed || compacted
    }

    /// Packs the next cold object.
    fn pack(&mut self, domain: &Domain<MemfdSlabs>, place: &mut Place) -> bool {
        let Some(dense) = &mut self.dense else { return false };
        match domain.store(|store| store.next_cold(RECORDS_PER_STEP, &mut self.fetched)) {
            Cold::NotYet => return true,
            Cold::Round => {
                place.rests_until = Some(place.walk + self.how.cold_after);
                return false;
            }
            Cold::Found => {}
        }
        let is_packed = match self.packer.pack(&self.fetched, &mut **dense) {
            Ok(packed) => {
                matches!(domain.store(|store| store.replace(&packed)), Ok(Replacement::Made))
            }
            Err(PackError::Unfaithful) => {
                self.dense = None;
                self.host.report(Incident::BadCodec { domain: domain.id });
                false
            }
            // Damage is found again, and reported, when the page is touched.
            Err(_) => false,
        };
        self.host.tidied(|tidied| {
            tidied.packed += u64::from(is_packed);
            tidied.passed_over += u64::from(!is_packed);
        });
        true
    }

    fn compact(&self, domain: &Domain<MemfdSlabs>, place: &mut Place, now: Instant) -> bool {
        let done = domain.store(|store| store.compact(WORK_PER_STEP));
        self.host.tidied(|tidied| {
            tidied.moved += done.moved;
            tidied.released += done.released;
        });
        let goes_on = done.progress == Progress::Working;
        if !goes_on {
            place.compacts_at = now + COMPACT_EVERY;
        }
        goes_on
    }

    /// Has the kernel make one huge page that a pager asked for.
    fn collapse(&self) -> bool {
        let Some((id, run)) = self.host.next_collapse() else { return false };
        let custody = self.governed.lock().get(&id).map(|controls| Arc::clone(&controls.custody));
        let is_huge = custody.is_some_and(|custody| custody.collapse(run));
        self.host.tidied(|tidied| {
            tidied.collapsed += u64::from(is_huge);
            tidied.not_collapsed += u64::from(!is_huge);
        });
        true
    }
}

/// Blocks that are to become huge pages, oldest first; few, because they may have cooled before their turn.
#[derive(Debug, Default)]
pub(super) struct Collapses(Vec<(MachineId, Run)>);

impl Collapses {
    /// Requests kept.
    const MOST: usize = 64;

    /// Adds a request, unless it is known or there are too many.
    pub(super) fn add(&mut self, id: MachineId, run: Run) {
        if self.0.len() < Self::MOST && !self.0.contains(&(id, run)) {
            self.0.push((id, run));
        }
    }

    /// The oldest.
    pub(super) fn next(&mut self) -> Option<(MachineId, Run)> {
        (!self.0.is_empty()).then(|| self.0.remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use plimsoll_core::ledger::Budget;
    use plimsoll_store::{DenseError, Encoder, Handle, Store};
    use plimsoll_types::{GroupId, PAGE_SIZE, PageBytes};
    use std::ops::Range;

    const GROUP: GroupId = GroupId(1);
    const WARM: Housekeeping = Housekeeping { cold_after: Duration::ZERO, cpu_permille: 1000 };

    /// What a codec does wrong.
    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Fault {
        /// It cannot compress.
        Fails,
        /// What it wrote does not come back.
        Lies,
    }

    struct Broken(Fault);

    impl DenseCodec for Broken {
        fn compress(&mut self, _: &PageBytes, into: &mut [u8]) -> Result<usize, DenseError> {
            if self.0 == Fault::Fails {
                return Err(DenseError);
            }
            into.first_mut().map(|byte| *byte = 1).map(|()| 1).ok_or(DenseError)
        }

        fn decompress(&mut self, _: &[u8], page: &mut PageBytes) -> Result<(), DenseError> {
            page.fill(1);
            Ok(())
        }
    }

    fn text(number: usize) -> PageBytes {
        let mut page = [0; PAGE_SIZE];
        for (place, byte) in page.iter_mut().enumerate() {
            *byte = b"a page of words, each of which comes again "[(place * 7 + place / 64 * number) % 43];
        }
        page[..8].copy_from_slice(&(number as u64).to_le_bytes());
        page
    }

    /// A host with one domain that holds `pages` pages.
    fn filled(pages: usize) -> (Host, Domain<MemfdSlabs>, Vec<Handle>) {
        let slabs = MemfdSlabs::create("test-keeper", ByteCount::mib(64)).unwrap();
        let domain = Domain::new(DomainId(1), GROUP, Store::new(slabs));
        let host = Host::new(Budget::of(ByteCount::mib(256)));
        host.ledger(|ledger| ledger.add_group(GROUP));
        let handles = put(&domain, 0..pages);
        (host, domain, handles)
    }

    fn put(domain: &Domain<MemfdSlabs>, numbers: Range<usize>) -> Vec<Handle> {
        let mut encoder = Encoder::new();
        let put =
            |number| domain.store(|store| store.put(&text(number), &mut encoder)).unwrap().unwrap().handle;
        numbers.map(put).collect()
    }

    fn keeper<'a>(
        host: &'a Host,
        governed: &'a Governed,
        how: Housekeeping,
        dense: Box<dyn DenseCodec>,
    ) -> Housekeeper<'a> {
        let (packer, fetched, lull) = (Packer::new(), Fetched::new(), Lull::new(how));
        let places = BTreeMap::new();
        Housekeeper { host, governed, how, places, packer, fetched, dense: Some(dense), lull }
    }

    /// Tends the domain until there is nothing left to do, twice round and more.
    fn tend(host: &Host, domain: &Domain<MemfdSlabs>, dense: Box<dyn DenseCodec>) {
        let governed = Governed::default();
        let mut keeper = keeper(host, &governed, WARM, dense);
        for _ in 0..4 {
            while keeper.tend(domain, Instant::now()) {}
        }
    }

    fn assert_all_read(domain: &Domain<MemfdSlabs>, handles: &[Handle]) {
        let (mut zstd, mut page) = (Zstd::new().unwrap(), [0; PAGE_SIZE]);
        for (number, handle) in handles.iter().enumerate() {
            domain.store(|store| store.get_with(*handle, &mut page, &mut zstd)).unwrap();
            assert_eq!(page, text(number), "page {number}");
        }
    }

    #[test]
    fn stores_in_which_nothing_is_to_be_done_are_left_alone_the_longer_the_less_happens() {
        let how = Housekeeping { cold_after: Duration::from_secs(60), ..WARM };
        let (mut lull, start) = (Lull::new(how), Instant::now());
        assert!(lull.is_over(start, 0), "nobody has looked");
        let mut now = start;
        let pauses = [2, 4, 8, 16, 16].map(|pause| {
            let is_trimmed = lull.tended(false, now, 7);
            let end = now + Duration::from_secs(pause);
            assert!(!lull.is_over(end - Duration::from_millis(1), 7) && lull.is_over(end, 7));
            assert!(lull.is_over(now + COMPACT_EVERY, 8), "something has happened");
            now = end;
            is_trimmed
        });
        assert_eq!(
            pauses,
            [false, true, false, false, false],
            "given back once, when pagers have come to rest"
        );
        assert!(!lull.tended(true, now, 7) && lull.is_over(now, 7), "there is more to do");
    }

    #[test]
    fn freed_memory_is_given_back_when_machines_have_ended() {
        let (host, governed, domains) =
            (Host::new(Budget::of(ByteCount::mib(64))), Governed::default(), Domains::default());
        let mut keeper = keeper(&host, &governed, WARM, Box::new(Zstd::new().unwrap()));
        let start = Instant::now();
        let mut at = |seconds| {
            let now = start + Duration::from_secs(seconds);
            keeper.tend_due(&domains, now);
            keeper.lull.trimmed.is_some_and(|(when, _)| when == now)
        };
        assert_eq!([0, 10, 30, 60].map(&mut at), [false, true, false, false]);
        host.bustle().count_ending();
        assert_eq!([90, 120, 150].map(&mut at), [false, true, false]);
    }

    #[test]
    fn nothing_is_remembered_of_a_domain_that_is_gone() {
        let (host, first, _) = filled(1);
        let second = Domain::new(
            DomainId(2),
            GROUP,
            Store::new(MemfdSlabs::create("test-keeper", ByteCount::mib(64)).unwrap()),
        );
        let [first, second] = [first, second].map(Arc::new);
        let domains: Domains = Arc::new(Mutex::new([&first, &second].map(Arc::downgrade).to_vec()));
        let governed = Governed::default();
        let mut keeper = keeper(&host, &governed, WARM, Box::new(Zstd::new().unwrap()));
        keeper.tend_all(&domains);
        assert_eq!(keeper.places.len(), 2);
        drop(first);
        keeper.tend_all(&domains);
        assert_eq!(keeper.places.keys().collect::<Vec<_>>(), [&DomainId(2)]);
        assert_eq!(domains.lock().len(), 1);
    }

    #[test]
    fn what_is_cold_is_packed_takes_less_and_reads_the_same() {
        let (host, domain, handles) = filled(2000);
        let before = domain.held();
        tend(&host, &domain, Box::new(Zstd::new().unwrap()));
        let tidied = host.tidied(|tidied| *tidied);
        assert!(tidied.packed > 1000, "{tidied:?}");
        assert!(domain.held() < before, "{} after {before}", domain.held());
        assert_eq!(host.ledger(|ledger| ledger.charged()), domain.held(), "the ledger has been told");
        assert_all_read(&domain, &handles);
    }

    #[test]
    fn an_object_is_packed_once_it_has_been_in_the_store_for_as_long_as_it_takes_to_grow_cold() {
        let (host, domain, _handles) = filled(50);
        let (governed, start) = (Governed::default(), Instant::now());
        let how = Housekeeping { cold_after: Duration::from_secs(60), ..WARM };
        let mut keeper = keeper(&host, &governed, how, Box::new(Zstd::new().unwrap()));
        let mut packed_by = |millis| {
            // Twice: what ends with nothing to do is not to begin anew.
            for _ in 0..2 {
                while keeper.tend(&domain, start + Duration::from_millis(millis)) {}
            }
            host.tidied(|tidied| tidied.packed)
        };
        assert_eq!(packed_by(0), 0, "they have just come");
        assert_eq!(packed_by(59_999), 0, "they are not cold yet");
        let first = packed_by(60_000);
        assert!(first > 40, "{first} of 50");
        put(&domain, 50..80);
        assert_eq!(packed_by(119_999), first);
        assert_eq!(packed_by(120_000), first, "the others are seen for the first time");
        assert_eq!(packed_by(179_999), first);
        let then = packed_by(180_000) - first;
        assert!(then > 20, "{then} of 30");
    }

    #[test]
    fn a_codec_that_fails_or_lies_harms_no_page_and_a_liar_is_dismissed() {
        for fault in [Fault::Fails, Fault::Lies] {
            let (host, domain, handles) = filled(200);
            tend(&host, &domain, Box::new(Broken(fault)));
            assert_eq!(host.tidied(|tidied| tidied.packed), 0);
            let told = host.take_incidents();
            let expected: &[Incident] =
                if fault == Fault::Lies { &[Incident::BadCodec { domain: DomainId(1) }] } else { &[] };
            assert_eq!(told, expected);
            assert_all_read(&domain, &handles);
        }
    }

    #[test]
    fn what_was_released_in_random_order_is_compacted() {
        let (host, domain, handles) = filled(4000);
        let kept: Vec<Handle> = handles.iter().copied().step_by(7).collect();
        for handle in handles.iter().filter(|handle| !kept.contains(handle)) {
            domain.store(|store| store.release(*handle)).unwrap();
        }
        let before = domain.held();
        tend(&host, &domain, Box::new(plimsoll_store::NoDense));
        let tidied = host.tidied(|tidied| *tidied);
        assert!(tidied.moved > 0 && tidied.released > ByteCount(0), "{tidied:?}");
        assert!(domain.held() < before);
        let (mut page, mut zstd) = ([0; PAGE_SIZE], Zstd::new().unwrap());
        for (number, handle) in (0..).step_by(7).zip(&kept) {
            domain.store(|store| store.get_with(*handle, &mut page, &mut zstd)).unwrap();
            assert_eq!(page, text(number));
        }
    }

    #[test]
    fn with_work_for_long_it_takes_its_share_of_a_processor_and_no_more() {
        let (host, domain, _handles) = filled(4000);
        let domain = Arc::new(domain);
        let domains = Arc::new(Mutex::new(vec![Arc::downgrade(&domain)]));
        let (governed, stop, start) = (Governed::default(), AtomicBool::new(false), Instant::now());
        let how = Housekeeping { cpu_permille: 100, ..WARM };
        std::thread::scope(|threads| {
            let keeper = threads.spawn(|| keep(&host, &governed, &domains, how, Zstd::new().unwrap(), &stop));
            while host.tidied(|tidied| tidied.packed) < 2000 && start.elapsed() < Duration::from_secs(60) {
                std::thread::park_timeout(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
            keeper.thread().unpark();
        });
        let (tidied, elapsed) = (host.tidied(|tidied| *tidied), start.elapsed());
        assert!(tidied.packed >= 2000, "{tidied:?}");
        // The last slice has not been rested for, and a slice ends with the step that it is in.
        assert!(tidied.cpu <= elapsed / 10 + 3 * SLICE, "{:?} of {elapsed:?}", tidied.cpu);
    }
}
