//! Machines that share a budget: who pays, what is never exceeded, and what the bookkeeping costs.
use crate::ahead::Idle;
use crate::evict::audit;
use crate::fleet::{DOMAIN, Fleet, Guest, PLENTY, machine, sweep, until, zipf};
use plimsoll_core::ledger::{Budget, Kind, Usage};
use plimsoll_guest::content::Mix;
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::host::Host;
use plimsoll_linux::uffd::manager::Meter;
use plimsoll_linux::uffd::probe::{Killed, NoProbe, Probe, Step};
use plimsoll_linux::uffd::stats::StoredCounts;
use plimsoll_types::ByteCount;
use plimsoll_vmm::config::{Prefault, VmmConfig};
use plimsoll_vmm::control::StopMode;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

const SAMPLE_PERIOD: Duration = Duration::from_millis(500);

/// What a machine may have above the line all the same. A page in limbo does not wait for memory: where there is none, it is there
/// twice until the next one comes. And tables are charged as they are found to have grown: a slot of the airlock and what is
/// remembered of pages that left together take 2 KiB each.
const EACH: ByteCount = ByteCount(4 * 4096);

/// The most that was charged, by the ledger, at any step of any pager.
#[derive(Default)]
struct Highest {
    host: OnceLock<Arc<Host>>,
    most: Mutex<Usage>,
}

impl Highest {
    fn look(&self) {
        let Some(host) = self.host.get() else { return };
        let usage = host.ledger(|ledger| ledger.host_usage());
        let mut most = self.most.lock().unwrap();
        if usage.total() > most.total() {
            *most = usage;
        }
    }
}

impl Probe for Highest {
    fn reached(&self, _step: Step) -> Result<(), Killed> {
        self.look();
        Ok(())
    }
}

/// Counts what the ledger counts.
struct Charged(Arc<Highest>);

impl Meter for Charged {
    fn used(&mut self) -> ByteCount {
        self.0.look();
        self.0.host.get().map_or(ByteCount(0), |host| host.ledger(|ledger| ledger.charged()))
    }
}

/// A fleet whose governor works, and the most that was charged.
fn governed(budget: ByteCount) -> (Fleet, Arc<Highest>) {
    let highest: Arc<Highest> = Arc::default();
    let mut fleet = Fleet::new(budget, Arc::clone(&highest) as Arc<dyn Probe>);
    let _ = highest.host.set(Arc::clone(fleet.see().host()));
    fleet.manager().govern(Box::new(Charged(Arc::clone(&highest))), SAMPLE_PERIOD).unwrap();
    (fleet, highest)
}

/// Half of it compresses to nothing or to a share of a small pool, so that everything fits when it is stored.
fn compressible(mut config: VmmConfig) -> VmmConfig {
    config.workload.mix = Mix { zero: 30, duplicate: 40, text: 30, random: 0 };
    config
}

/// At the pace they keep, guests of nearly twice the budget have something brought back all the time, and reclaim, which begins
/// 1/32 below the line and not at it, has freed the memory for it: of 4,000 faults none waited. With marks a page below the line
/// 250 did, and 340 at nearly three times the pace: whoever waits has 64 pages freed, and the next waits after these.
pub(crate) fn rarely_waits() {
    /// Faults that needed memory, to be looked at.
    const FAULTS: u64 = 2000;
    /// Of a thousand of them, may wait.
    const WAIT_MAX: u64 = 10;
    const WINDOWS: usize = 3;
    let (mut fleet, _) = governed(ByteCount::mib(96));
    let paced = WorkloadSpec { ops_per_second: 3000, ..zipf() };
    let names = ["steady1", "steady2", "steady3"];
    let mut guests: Vec<Guest> =
        names.iter().map(|name| fleet.add(&compressible(machine(name, 64, paced)))).collect();
    guests.iter().for_each(Guest::until_running);
    // Faults of all guests that needed memory, those of them that waited for it, and pages captured.
    let counts = || {
        let stats = guests.iter().map(|guest| fleet.view(guest.id).stats);
        stats.fold([0, 0, 0], |[needed, waited, captured], stats| {
            let needs = stats.faults.zero + stats.faults.stored;
            [needed + needs, waited + stats.stalls, captured + stats.captured]
        })
    };
    let after = |begun: [u64; 3], faults| {
        let ended = || Some(counts()).filter(|[needed, ..]| *needed >= begun[0] + faults);
        let ended = until("guests to miss pages", ended);
        [0, 1, 2].map(|place| ended[place] - begun[place])
    };
    // Population, which fills memory at full speed, is over, and so is what it left to be done.
    after(counts(), FAULTS / 4);
    // A governor or a pager that had no processor for a while is no fault of theirs: the middle of three counts.
    let mut windows: Vec<[u64; 3]> = (0..WINDOWS).map(|_| after(counts(), FAULTS)).collect();
    println!("of faults that needed memory so many waited, while so many pages were captured: {windows:?}");
    // Limbo has a tenth of what is there, as many pages as are needed in a window: one may live on what was captured in another.
    let [brought, captured] = [0, 2].map(|place| windows.iter().map(|window| window[place]).sum::<u64>());
    windows.sort_by_key(|[needed, waited, _]| waited * 1_000_000 / needed);
    let [needed, waited, _] = windows[WINDOWS / 2];
    guests.iter().for_each(|guest| guest.tell(StopMode::Finish));
    guests.iter_mut().for_each(Guest::finished);
    assert!(captured > brought / 4, "memory was not short: {captured} pages captured, {brought} brought");
    assert!(waited * 1000 <= needed * WAIT_MAX, "{waited} of {needed} faults waited for a capture");
    assert_eq!(fleet.incidents(), []);
}

/// Between its high mark and its line, a host stores pages within the share that was said: none without one. Nobody waits for that,
/// and what is wanted all the time is stored all the same, later.
pub(crate) fn storing_is_budgeted() {
    const SHARE_PPM: u32 = 20_000;
    /// CPU time of storing to be looked at: five times as long as one batch of pages may take that was interrupted.
    const TAKEN: Duration = Duration::from_millis(50);
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    fleet.manager().govern(Box::new(Idle), SAMPLE_PERIOD).unwrap();
    let host = Arc::clone(fleet.see().host());
    host.limit_storing(0);
    // All that the guest has is wanted of it, and the line is far away.
    let (high, low) = (ByteCount::mib(8), ByteCount::mib(4));
    host.ledger(|ledger| ledger.set_budget(Budget { high, low, ..ledger.budget() }));
    let paced = WorkloadSpec { ops_per_second: 1000, ..zipf() };
    let mut guest = fleet.add(&machine("packed", 64, paced));
    guest.until_running();
    let stats = || fleet.view(guest.id).stats;
    until("limbo to be full and touched", || (stats().faults.limbo > 100).then_some(()));
    guest.goes_on();
    assert_eq!((stats().stored, host.storing().ahead), (StoredCounts::default(), Duration::ZERO));
    let begun = Instant::now();
    host.limit_storing(SHARE_PPM);
    let ahead = until("pages to be stored", || Some(host.storing().ahead).filter(|ahead| *ahead >= TAKEN));
    let elapsed = begun.elapsed();
    println!("storing took {ahead:?} of {elapsed:?}: {:?}", stats().stored);
    let share = elapsed * SHARE_PPM / 1_000_000;
    assert!(ahead <= share + TAKEN / 2, "{ahead:?} of {elapsed:?}");
    assert_eq!((stats().stalls, host.storing().demand), (0, Duration::ZERO), "somebody waited");
    // An operator waits for no share.
    host.limit_storing(0);
    fleet.squeeze_until(guest.id, "pages to be stored at once", || host.storing().demand >= TAKEN / 10);
    host.ledger(|ledger| ledger.set_budget(Budget::of(PLENTY)));
    guest.finish();
    assert_eq!(fleet.incidents(), []);
}

/// Operations of each guest in a window.
fn window(guests: &[Guest]) -> Vec<u64> {
    const WINDOW: Duration = Duration::from_secs(3);
    let before: Vec<u64> = guests.iter().map(Guest::operations).collect();
    std::thread::sleep(WINDOW);
    guests.iter().zip(before).map(|(guest, before)| guest.operations() - before).collect()
}

fn median(windows: [Vec<u64>; 3], guest: usize) -> u64 {
    let mut counts = windows.map(|window| window[guest]);
    counts.sort_unstable();
    counts[1]
}

/// The paced guests' hot parts and what the noisy guest must keep fit the budget, all footprints are twice of it. Two
/// processors carry three guests and three pagers, so a paced guest waits for the processor as well as for memory, and
/// 0.8 of its undisturbed pace leaves room for that. Without fairness it would not come near: its pages would be
/// taken as fast as the noisy guest's, and each operation would wait for a page, which here is some hundred a second.
pub(crate) fn fairness() {
    const SHARE: f64 = 0.8;
    const PATIENCE: Duration = Duration::from_secs(90);
    let (mut fleet, _) = governed(ByteCount::mib(96));
    let paced = WorkloadSpec { ops_per_second: 1000, hot_permille: 300, ..zipf() };
    let mut guests: Vec<Guest> =
        ["paced1", "paced2"].iter().map(|name| fleet.add(&compressible(machine(name, 64, paced)))).collect();
    guests.iter().for_each(Guest::until_running);
    let alone = [window(&guests), window(&guests), window(&guests)];
    let noisy = fleet.add(&compressible(machine("noisy", 96, sweep())));
    noisy.until_running();
    let before = noisy.operations();
    let shares = || {
        let beside = [window(&guests), window(&guests), window(&guests)];
        println!("operations in 3 s alone: {alone:?}; beside a sweep: {beside:?}");
        let share = |place| median(beside.clone(), place) as f64 / median(alone.clone(), place) as f64;
        [share(0), share(1)]
    };
    // What else this machine does meanwhile is no neighbour's fault: it is measured until that leaves the guests alone.
    let begun = Instant::now();
    let mut least = shares().into_iter().fold(1.0, f64::min);
    while least < SHARE && begun.elapsed() < PATIENCE {
        println!("one kept {least:.3} of its pace; once more");
        least = shares().into_iter().fold(1.0, f64::min);
    }
    println!("the sweep did {} operations meanwhile", noisy.operations() - before);
    let stats = fleet.view(noisy.id).stats;
    let limit = fleet.view(noisy.id).size.pages_floor().0 * 7 / 10;
    println!("noisy: {:?}, {} captured, stalled {:?}", stats.census, stats.captured, stats.stalled);
    assert!(stats.captured > 1000 && stats.census.in_ram().0 < limit, "the noisy guest was never short");
    assert!(least >= SHARE, "one kept {least:.3} of its pace beside a guest that touches everything");
    audit(&fleet);
    guests.push(noisy);
    guests.iter().for_each(|guest| guest.tell(StopMode::Finish));
    guests.iter_mut().for_each(Guest::finished);
    assert_eq!(fleet.incidents(), []);
}

pub(crate) fn hard_line() {
    let host = populate_three_budgets(None);
    assert!(host.storing().ahead > Duration::ZERO, "{:?}", host.storing());
}

/// Where nothing is ever stored ahead of demand, demand does all of it, and nothing else changes.
pub(crate) fn hard_line_on_demand() {
    let host = populate_three_budgets(Some(0));
    let storing = host.storing();
    assert!(storing.ahead == Duration::ZERO && storing.demand > Duration::ZERO, "{storing:?}");
}

/// With that share of a processor for storing pages ahead of demand, or the usual one.
fn populate_three_budgets(share_ppm: Option<u32>) -> Arc<Host> {
    let budget = ByteCount::mib(64);
    let (mut fleet, highest) = governed(budget);
    let host = Arc::clone(fleet.see().host());
    share_ppm.into_iter().for_each(|ppm| host.limit_storing(ppm));
    let guests = ["fills1", "fills2", "fills3"];
    let mut guests: Vec<Guest> =
        guests.iter().map(|name| fleet.add(&compressible(machine(name, 72, sweep())))).collect();
    until("the guests to have populated three budgets", || {
        let populated = |guest: &Guest| guest.state().summary.populated_pages;
        let pages: u64 = guests.iter().map(populated).sum();
        guests.iter().for_each(|guest| assert_eq!(guest.state().died, None));
        (pages * 4096 >= 3 * budget.0).then_some(())
    });
    guests.iter().for_each(Guest::until_running);
    guests.iter().for_each(Guest::goes_on);
    let usage = host.ledger(|ledger| ledger.host_usage());
    let most = *highest.most.lock().unwrap();
    println!("most charged: {} of {budget}: {most:?}; at last {usage:?}; {:?}", most.total(), host.storing());
    audit(&fleet);
    guests.iter().for_each(|guest| guest.tell(StopMode::Finish));
    guests.iter_mut().for_each(Guest::finished);
    assert_eq!(fleet.incidents(), []);
    let (most, each) = (most.total(), ByteCount(EACH.0 * guests.len() as u64));
    assert!(
        most <= budget + each,
        "{most} were charged; the hard line is {budget}, and {each} may be above it"
    );
    assert!(most > budget - ByteCount(budget.0 / 8), "{most} of {budget}: nobody was ever short");
    host
}

pub(crate) fn bookkeeping() {
    // The store takes and keeps whole slabs of records.
    const SLAB: ByteCount = ByteCount::mib(2);
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let paced = WorkloadSpec { ops_per_second: 200, hot_permille: 20, ..zipf() };
    let config = VmmConfig { prefault: Prefault::All, ..machine("large", 256, paced) };
    let mut guest = fleet.add(&config);
    guest.until_running();
    fleet.squeeze_until(guest.id, "most pages to be stored", || fleet.stored(guest.id) > 40_000);
    let (view, store) =
        (fleet.view(guest.id), fleet.see().domain(DOMAIN).unwrap().store(|store| store.stats()));
    let words = view.size.pages_floor().0 * 8;
    let tables = ByteCount(words + u64::try_from(view.stats.table_bytes).unwrap());
    let (objects, pages) = (store.objects(), store.pages.0);
    println!(
        "words and tables: {tables} of {} ({:.3} %); store: {} for {objects} objects ({pages} pages), {} in slabs of records",
        view.size,
        tables.0 as f64 * 100.0 / view.size.0 as f64,
        store.metadata,
        store.record_slabs
    );
    assert!(tables.0 * 200 <= view.size.0, "{tables} for {}", view.size);
    assert!(store.metadata.0 <= objects * 32 + SLAB.0, "{} for {objects} objects", store.metadata);
    let charged = fleet.see().host().ledger(|ledger| ledger.host_usage());
    assert!(charged.of(Kind::Tables).0 >= words && charged.of(Kind::Store) >= store.metadata, "{charged:?}");
    audit(&fleet);
    guest.finish();
}
