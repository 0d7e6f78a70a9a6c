//! The program of a guest that keeps frames: allocates, verifies and frees what it is asked to, and serves the balloon.
//!
//! Enters: commands ([`Task`]), and the balloon's target, at which vCPU 0 looks between two pieces of work. Leaves: answers, and
//! listings of what the balloon has. What must never happen: a touch of memory that is not installed, or that the balloon has.
//!
//! An entry of what a vCPU keeps, see [`Plan`], names a piece and what it must contain:
//!
//! ```text
//!  0..32  page     the first, counted over all frames
//! 32..63  version  of the contents of all its pages, not 0
//!     63  frame    0: one page, 1: the 512 of a frame
//! ```
//!
//! An entry of the balloon's stack is the same with version 0.
use crate::abi::{
    BalloonTarget, Finds, Listed, Listing, PAGE_SIZE, Phase, Piece, STOP_NO, STOP_NOW, WrongWord,
};
use crate::frames::{Claim, Cursor, FRAME_PAGES, Frames, Plan, Words};
use crate::machine::Machine;
use crate::probe::{ProbeCommand, Probed, Task};
use crate::random::{Rng, hash3};
use crate::runner::{Runner, note_wrong};
use crate::spec::WorkloadKind;

/// Versions of contents; the one after the last is the first.
const VERSION_MAX: u32 = (1 << 31) - 1;
/// Of so many pieces that churn allocates, one is a frame.
const CHURN_FRAME_ONE_IN: u64 = 128;

/// The words of the allocator, through the machine.
struct Shared<'a, M> {
    machine: &'a mut M,
    plan: &'a Plan,
}

impl<M: Machine> Words for Shared<'_, M> {
    fn load(&mut self, word: u64) -> u64 {
        self.machine.read_word(self.plan.word_gpa(word))
    }

    fn exchange(&mut self, word: u64, old: u64, new: u64) -> Result<(), u64> {
        self.machine.exchange_word(self.plan.word_gpa(word), old, new)
    }
}

/// A piece of memory and the version of its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kept {
    page: u64,
    piece: Piece,
    version: u32,
}

impl Kept {
    const fn encode(self) -> u64 {
        self.page | (self.version as u64) << 32 | (self.piece as u64) << 63
    }

    const fn decode(word: u64) -> Self {
        let piece = if word >> 63 == 0 { Piece::Page } else { Piece::Frame };
        Self { page: word & 0xffff_ffff, piece, version: (word >> 32 & VERSION_MAX as u64) as u32 }
    }
}

/// What one vCPU has in hand.
struct Heap<'a> {
    plan: &'a Plan,
    cursor: Cursor,
    /// Entries of what it keeps, and the pages they have.
    kept: u64,
    kept_pages: u64,
    /// The version given last.
    version: u32,
    /// Entries of the balloon's stack, and the pages they have.
    given: u64,
    given_pages: u64,
    /// The target that was served last.
    served: BalloonTarget,
}

impl<M: Machine> Runner<'_, M> {
    /// Does what it is asked until it is told to stop, and then verifies what it keeps, if that is wanted.
    pub(crate) fn keep_frames(&mut self, plan: &Plan, final_check: bool) {
        let vcpu = u64::from(self.vcpu);
        let mut heap = Heap {
            plan,
            cursor: Cursor::at(vcpu * plan.kept_most() / FRAME_PAGES % plan.frames()),
            kept: 0,
            kept_pages: 0,
            version: 0,
            given: 0,
            given_pages: 0,
            served: BalloonTarget::default(),
        };
        self.report.footprint_pages = 0;
        self.enter(Phase::Running);
        self.report.running_ticks = self.machine.now_ticks();
        let mut answer = Probed::NONE;
        while self.attend() == STOP_NO {
            self.serve_balloon(&mut heap);
            let command = self.machine.next_command(&answer);
            answer = Probed { number: command.number, ..Probed::NONE };
            if command.number != 0
                && let Ok((task, _)) = command.check()
            {
                let wrong = (self.report.wrong_words, self.report.wrong_pages);
                let start_ticks = self.machine.now_ticks();
                answer.pages = self.do_task(&mut heap, task, &command);
                answer.ticks = self.machine.now_ticks().saturating_sub(start_ticks);
                answer.wrong_words = self.report.wrong_words - wrong.0;
                answer.wrong_pages = self.report.wrong_pages - wrong.1;
            }
        }
        if final_check {
            self.report.footprint_pages = heap.kept_pages;
            self.enter(Phase::Checking);
            self.verify_kept(&heap, STOP_NOW);
        }
    }

    /// Returns how many pages it was done with.
    fn do_task(&mut self, heap: &mut Heap<'_>, task: Task, command: &ProbeCommand) -> u64 {
        let mut done = 0;
        match task {
            Task::Allocate => {
                let piece = if command.stride == FRAME_PAGES { Piece::Frame } else { Piece::Page };
                while done < command.pages && self.goes_on(heap) && self.allocate(heap, piece) {
                    done += piece.pages();
                }
            }
            Task::Free => {
                while done < command.pages && heap.kept > 0 && self.goes_on(heap) {
                    done += self.free(heap, heap.kept - 1);
                }
            }
            Task::Verify => done = self.verify_kept(heap, STOP_NO + 1),
            Task::Churn => done = self.churn(heap, command),
            Task::Work => done = self.work_on_kept(heap, command),
            // For a guest whose pages are its own from the start.
            Task::Populate | Task::Read | Task::Write => {}
        }
        done
    }

    /// Compares pieces that are kept, in the order of a program, and writes some of them anew. Nothing where the program is none
    /// that works on its own, or nothing is kept.
    fn work_on_kept(&mut self, heap: &mut Heap<'_>, command: &ProbeCommand) -> u64 {
        let kind = u32::try_from(command.stride).ok().and_then(WorkloadKind::from_wire);
        let Some(kind) = kind.filter(|kind| WorkloadKind::ALL.contains(kind) && heap.kept > 0) else {
            return 0;
        };
        let guest = self.guest;
        let mut rng = Rng::new(hash3(guest.seed, guest.spec.seed, u64::from(self.vcpu)));
        let mut program = guest.program(kind, heap.kept, rng.word());
        let interval_ticks = self.interval_ticks();
        let window = self.machine.window();
        let start_ticks = self.machine.now_ticks();
        let (mut done, mut due) = (0, start_ticks);
        while self.goes_on(heap) {
            let is_over =
                if command.passes == 0 { self.machine.window() != window } else { done >= command.passes };
            if is_over || (interval_ticks != 0 && self.wait_until(due) != STOP_NO) {
                break;
            }
            if interval_ticks != 0 {
                due = self.next_due(due, interval_ticks);
            }
            let begun_ticks = self.machine.now_ticks();
            let entry = program.next_page(&mut rng, done, begun_ticks.saturating_sub(start_ticks));
            self.verify_entry(heap, entry);
            if rng.below(1000) < u64::from(guest.spec.write_permille) {
                self.renew(heap, entry);
            }
            self.report.operations += 1;
            done += 1;
            let end_ticks = self.machine.now_ticks();
            self.note_latency(end_ticks.saturating_sub(begun_ticks));
        }
        done
    }

    /// Serves the balloon, and says whether the guest goes on.
    fn goes_on(&mut self, heap: &mut Heap<'_>) -> bool {
        self.serve_balloon(heap);
        self.attend() == STOP_NO
    }

    /// Allocates a piece, has it installed, and writes all of it. False when there is none.
    fn allocate(&mut self, heap: &mut Heap<'_>, piece: Piece) -> bool {
        if heap.kept == heap.plan.kept_most() {
            return false;
        }
        let Some((page, is_installed)) = self.claim(heap, piece) else { return false };
        if !is_installed {
            self.machine.install(heap.plan.frame_gpa(page / FRAME_PAGES));
        }
        self.fill(heap, heap.kept, Kept { page, piece, version: 0 });
        heap.kept += 1;
        heap.kept_pages += piece.pages();
        self.report.operations += 1;
        true
    }

    /// Writes the contents of a version that has not been yet, and remembers it as that entry.
    fn fill(&mut self, heap: &mut Heap<'_>, entry: u64, kept: Kept) {
        heap.version = if heap.version == VERSION_MAX { 1 } else { heap.version + 1 };
        let Kept { page: first, piece, .. } = kept;
        for page in first..first + piece.pages() {
            self.guest.content.fill(page, heap.version, &mut self.expected);
            self.machine.write_page(heap.plan.page_gpa(page), &self.expected);
        }
        let kept = Kept { version: heap.version, ..kept };
        self.machine.write_word(heap.plan.kept_gpa(self.vcpu, entry), kept.encode());
        self.report.puts += 1;
    }

    /// Writes an entry anew.
    fn renew(&mut self, heap: &mut Heap<'_>, entry: u64) {
        let kept = self.kept(heap, entry);
        self.fill(heap, entry, kept);
    }

    /// The first page of a piece, and whether it may be touched.
    fn claim(&mut self, heap: &mut Heap<'_>, piece: Piece) -> Option<(u64, bool)> {
        let mut frames = self.frames(heap.plan);
        match piece {
            Piece::Page => {
                let Claim { number, is_installed } = frames.allocate_page(&mut heap.cursor)?;
                Some((number, is_installed))
            }
            Piece::Frame => {
                let Claim { number, is_installed } = frames.allocate_frame(&mut heap.cursor)?;
                Some((number * FRAME_PAGES, is_installed))
            }
        }
    }

    fn frames<'a>(&'a mut self, plan: &'a Plan) -> Frames<Shared<'a, M>> {
        Frames::new(Shared { machine: self.machine, plan }, plan.frames())
    }

    /// Frees an entry of what is kept; the last one takes its place. Returns its pages.
    fn free(&mut self, heap: &mut Heap<'_>, entry: u64) -> u64 {
        let kept = self.kept(heap, entry);
        heap.kept -= 1;
        if entry != heap.kept {
            let last = self.machine.read_word(heap.plan.kept_gpa(self.vcpu, heap.kept));
            self.machine.write_word(heap.plan.kept_gpa(self.vcpu, entry), last);
        }
        heap.kept_pages -= kept.piece.pages();
        self.release(heap, kept);
        self.report.operations += 1;
        kept.piece.pages()
    }

    /// Gives a piece back to the allocator. One that is not in use there means that its words are not what they were.
    fn release(&mut self, heap: &Heap<'_>, kept: Kept) {
        let mut frames = self.frames(heap.plan);
        let freed = match kept.piece {
            Piece::Page => frames.free_page(kept.page),
            Piece::Frame => frames.free_frame(kept.page / FRAME_PAGES),
        };
        if freed.is_err() {
            let word = kept.page / FRAME_PAGES;
            let (gpa, found) = (heap.plan.word_gpa(word), frames.entry(word).0);
            self.report.wrong_pages += 1;
            note_wrong(&mut self.report, WrongWord { gpa, expected: kept.encode(), found });
        }
    }

    fn kept(&mut self, heap: &Heap<'_>, entry: u64) -> Kept {
        Kept::decode(self.machine.read_word(heap.plan.kept_gpa(self.vcpu, entry)))
    }

    /// Compares all pages of an entry with what they must contain.
    fn verify_entry(&mut self, heap: &Heap<'_>, entry: u64) -> u64 {
        let Kept { page: first, piece, version } = self.kept(heap, entry);
        for page in first..first + piece.pages() {
            let gpa = heap.plan.page_gpa(page);
            self.machine.read_page(gpa, &mut self.found);
            self.guest.content.fill(page, version, &mut self.expected);
            self.report.verified_pages += 1;
            if self.found != self.expected {
                self.note_wrong_page(gpa);
                self.machine.write_page(gpa, &self.expected);
            }
        }
        piece.pages()
    }

    /// Compares everything that is kept, unless it is told to stop as much as `stop` or more.
    fn verify_kept(&mut self, heap: &Heap<'_>, stop: u64) -> u64 {
        let mut done = 0;
        for entry in 0..heap.kept {
            if self.attend() >= stop {
                break;
            }
            done += self.verify_entry(heap, entry);
        }
        self.report.checked_pages += if self.report.phase == Phase::Checking as u32 { done } else { 0 };
        done
    }

    /// Allocates, compares and frees pieces in random order. What is kept grows to the limit and shrinks to nothing in turn, so that
    /// frames become empty.
    fn churn(&mut self, heap: &mut Heap<'_>, command: &ProbeCommand) -> u64 {
        let mut rng = Rng::new(command.seed ^ u64::from(self.vcpu));
        let window = self.machine.window();
        let (mut done, mut grows) = (0, true);
        while self.goes_on(heap) {
            let is_over =
                if command.passes == 0 { self.machine.window() != window } else { done >= command.passes };
            if is_over {
                break;
            }
            done += 1;
            let piece = if rng.below(CHURN_FRAME_ONE_IN) == 0 { Piece::Frame } else { Piece::Page };
            let fits = heap.kept_pages + piece.pages() <= command.pages;
            grows = if grows { fits } else { heap.kept == 0 };
            let wants_more = fits && rng.below(4) < if grows { 3 } else { 1 };
            if wants_more && self.allocate(heap, piece) {
                continue;
            }
            if heap.kept > 0 {
                let entry = rng.below(heap.kept);
                self.verify_entry(heap, entry);
                self.free(heap, entry);
            }
        }
        done
    }

    /// Gives or takes back until the balloon has what the host wants, or nothing more can be had.
    fn serve_balloon(&mut self, heap: &mut Heap<'_>) {
        if self.vcpu != 0 {
            return;
        }
        let target = self.machine.balloon();
        if target == heap.served {
            return;
        }
        heap.served = target;
        while heap.given_pages != target.pages() && self.machine.stop() == STOP_NO {
            let before = heap.given_pages;
            if before < target.pages() {
                self.inflate(heap, target);
            } else {
                self.deflate(heap, target);
            }
            if heap.given_pages == before {
                break;
            }
        }
        self.machine.list(&Listing::new(Listed::Settled, target.piece()));
    }

    /// Gives up to a listing of pieces. They are not touched, so nothing has to be installed for it.
    fn inflate(&mut self, heap: &mut Heap<'_>, target: BalloonTarget) {
        let piece = target.piece();
        let mut listing = Listing::new(Listed::Given, piece);
        while !listing.is_full() && heap.given_pages + piece.pages() <= target.pages() {
            if target.finds() == Finds::Scattered {
                heap.cursor = heap.cursor.next(heap.plan.frames());
            }
            let Some((page, _)) = self.claim(heap, piece) else { break };
            let given = Kept { page, piece, version: 0 };
            self.machine.write_word(heap.plan.given_gpa(heap.given), given.encode());
            heap.given += 1;
            heap.given_pages += piece.pages();
            listing.push(self.number(heap, page));
        }
        if listing.count > 0 {
            self.machine.list(&listing);
        }
    }

    /// Takes up to a listing of pieces of one size back, the last given first. The host is told before they are used.
    fn deflate(&mut self, heap: &mut Heap<'_>, target: BalloonTarget) {
        let end = heap.given;
        let mut listing: Option<Listing> = None;
        while heap.given_pages > target.pages() && heap.given > 0 {
            let last = Kept::decode(self.machine.read_word(heap.plan.given_gpa(heap.given - 1)));
            let listed = listing.get_or_insert(Listing::new(Listed::WantedBack, last.piece));
            if listed.is_full() || listed.piece != last.piece as u32 {
                break;
            }
            heap.given -= 1;
            heap.given_pages -= last.piece.pages();
            listed.push(self.number(heap, last.page));
        }
        if let Some(listing) = listing {
            self.machine.list(&listing);
        }
        for entry in heap.given..end {
            let back = Kept::decode(self.machine.read_word(heap.plan.given_gpa(entry)));
            self.release(heap, back);
        }
    }

    /// The number of a page for the host. Memory ends below 16 TiB.
    fn number(&self, heap: &Heap<'_>, page: u64) -> u32 {
        u32::try_from(heap.plan.page_gpa(page) / PAGE_SIZE).unwrap_or(u32::MAX)
    }
}
