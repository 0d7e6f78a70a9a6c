//! A machine made of vectors, with a clock that advances by a fixed step each time it is read.
use plimsoll_guest::abi::{
    ABI_VERSION, BalloonTarget, Listing, MAX_REGIONS, PAGE_SIZE, PARAMS_MAGIC, Params, Region, Report,
    STOP_FINISH, STOP_NO, WORKLOAD_GPA,
};
use plimsoll_guest::content::Mix;
use plimsoll_guest::frames::{Frames, Plan, Words};
use plimsoll_guest::probe::{ProbeCommand, Probed};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_guest::{Machine, PAGE_WORDS, PageWords};
use std::collections::{BTreeSet, VecDeque};

pub(crate) const SEED: u64 = 0x51_1a_05;
/// One tick is a microsecond and each look at the clock takes one.
pub(crate) const TSC_HZ: u64 = 1_000_000;

/// Parameters over two regions with a hole between them, of about `pages` pages of workload memory.
pub(crate) fn params(kind: WorkloadKind, vcpus: u32, pages: u64) -> Params {
    let low = WORKLOAD_GPA + pages / 3 * PAGE_SIZE;
    let mut regions = [Region::default(); MAX_REGIONS];
    regions[0] = Region { gpa: 0, len: low };
    regions[1] = Region { gpa: low + 64 * PAGE_SIZE, len: (pages - pages / 3) * PAGE_SIZE };
    Params {
        magic: PARAMS_MAGIC,
        version: ABI_VERSION,
        vcpus,
        tsc_hz: TSC_HZ,
        seed: SEED,
        pool_seed: 77,
        pool_pages: 50,
        region_count: 2,
        reserved: 0,
        regions,
        mix: Mix::default(),
        workload: WorkloadSpec { operations: 5000, final_check: 1, ..WorkloadSpec::new(kind) },
    }
}

/// What a test does to the machine before each stop request is answered, that is, before each operation.
pub(crate) type Meddle = Box<dyn FnMut(&mut VecMachine)>;

pub(crate) struct VecMachine {
    regions: Vec<(u64, Vec<u64>)>,
    pub(crate) ticks: u64,
    pub(crate) stop: u64,
    pub(crate) window: u64,
    pub(crate) reports: Vec<Report>,
    pub(crate) discards: Vec<(u64, u64)>,
    pub(crate) slept_ns: u64,
    /// Commands for a probing guest, which is told to stop when there are none left, and its answers.
    pub(crate) commands: VecDeque<ProbeCommand>,
    pub(crate) answers: Vec<Probed>,
    plan: Option<Plan>,
    pub(crate) balloon: BalloonTarget,
    pub(crate) listings: Vec<Listing>,
    pub(crate) installs: Vec<u64>,
    /// Pages read or written as whole pages since a test last cleared it.
    pub(crate) touched: BTreeSet<u64>,
    meddle: Option<Meddle>,
}

impl VecMachine {
    pub(crate) fn new(params: &Params) -> Self {
        let regions = params.regions[..usize::try_from(params.region_count).unwrap()]
            .iter()
            .map(|region| (region.gpa, vec![0; usize::try_from(region.len / 8).unwrap()]))
            .collect();
        Self {
            regions,
            ticks: 0,
            stop: STOP_NO,
            window: 1,
            reports: Vec::new(),
            discards: Vec::new(),
            slept_ns: 0,
            commands: VecDeque::new(),
            answers: Vec::new(),
            plan: Plan::new(params),
            balloon: BalloonTarget::default(),
            listings: Vec::new(),
            installs: Vec::new(),
            touched: BTreeSet::new(),
            meddle: None,
        }
    }

    pub(crate) fn with_meddle(params: &Params, meddle: impl FnMut(&mut Self) + 'static) -> Self {
        Self { meddle: Some(Box::new(meddle)), ..Self::new(params) }
    }

    /// The allocator, as the host sees it.
    pub(crate) fn allocator(&mut self) -> Frames<HostWords<'_>> {
        let frames = self.plan.unwrap().frames();
        Frames::new(HostWords(self), frames)
    }

    /// The words from `gpa` on. Panics in a hole and below workload memory, where no program may go.
    pub(crate) fn words(&mut self, gpa: u64, count: usize) -> &mut [u64] {
        assert!(gpa >= WORKLOAD_GPA && gpa.is_multiple_of(8), "{gpa:#x}");
        let (start, words) = self.regions.iter_mut().rev().find(|(start, _)| *start <= gpa).unwrap();
        let first = usize::try_from((gpa - *start) / 8).unwrap();
        &mut words[first..first + count]
    }
}

/// The host's view of the words.
pub(crate) struct HostWords<'a>(&'a mut VecMachine);

impl Words for HostWords<'_> {
    fn load(&mut self, word: u64) -> u64 {
        let gpa = self.0.plan.unwrap().word_gpa(word);
        self.0.read_word(gpa)
    }

    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64> {
        let gpa = self.0.plan.unwrap().word_gpa(word);
        self.0.exchange_word(gpa, old, new)
    }
}

impl Machine for VecMachine {
    fn read_word(&mut self, gpa: u64) -> u64 {
        self.words(gpa, 1)[0]
    }

    fn write_word(&mut self, gpa: u64, value: u64) {
        self.words(gpa, 1)[0] = value;
    }

    fn read_page(&mut self, gpa: u64, into: &mut PageWords) {
        assert!(gpa.is_multiple_of(PAGE_SIZE));
        self.touched.insert(gpa);
        into.copy_from_slice(self.words(gpa, PAGE_WORDS));
    }

    fn write_page(&mut self, gpa: u64, from: &PageWords) {
        assert!(gpa.is_multiple_of(PAGE_SIZE));
        self.touched.insert(gpa);
        self.words(gpa, PAGE_WORDS).copy_from_slice(from);
    }

    fn now_ticks(&mut self) -> u64 {
        self.ticks += 1;
        self.ticks
    }

    fn idle(&mut self, ns: u64) {
        self.slept_ns += ns;
        self.ticks += ns / (1_000_000_000 / TSC_HZ);
    }

    fn stop(&mut self) -> u64 {
        if let Some(mut meddle) = self.meddle.take() {
            meddle(self);
            self.meddle = Some(meddle);
        }
        self.stop
    }

    fn window(&mut self) -> u64 {
        self.window
    }

    fn report(&mut self, report: &Report) {
        self.reports.push(*report);
    }

    fn next_command(&mut self, answer: &Probed) -> ProbeCommand {
        self.answers.push(*answer);
        self.commands.pop_front().unwrap_or_else(|| {
            self.stop = STOP_FINISH;
            ProbeCommand::default()
        })
    }

    fn exchange_word(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
        match self.words(gpa, 1) {
            [word] if *word == old => {
                *word = new;
                Ok(())
            }
            words => Err(words[0]),
        }
    }

    fn balloon(&mut self) -> BalloonTarget {
        self.balloon
    }

    fn list(&mut self, listing: &Listing) {
        self.listings.push(*listing);
    }

    fn install(&mut self, gpa: u64) {
        self.installs.push(gpa);
        let plan = self.plan.unwrap();
        let frame = plan.frame_at(gpa).expect("a frame starts there");
        self.allocator().install(frame);
    }

    fn discard(&mut self, gpa: u64, len: u64) {
        assert!(gpa.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) && len > 0);
        for page in (gpa..gpa + len).step_by(4096) {
            self.words(page, PAGE_WORDS).fill(0);
        }
        self.discards.push((gpa, len));
    }
}
