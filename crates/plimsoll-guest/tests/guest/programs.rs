//! Every program over plain memory: nothing wrong is reported where nothing is, and everything where
//! something is.
use crate::machine::{SEED, TSC_HZ, VecMachine, params};
use plimsoll_guest::abi::{
    BalloonTarget, Listing, PAGE_SIZE, Params, Phase, Report, STOP_FINISH, STOP_NOW, WORKLOAD_GPA,
};
use plimsoll_guest::content::{Mix, PageKind};
use plimsoll_guest::probe::{ProbeCommand, Probed};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_guest::{Guest, Machine, PAGE_WORDS};
use std::cell::Cell;
use std::rc::Rc;

fn run(params: &Params, machine: &mut VecMachine) -> Report {
    Guest::new(params).unwrap().run(0, machine).unwrap()
}

#[test]
fn every_program_runs_to_its_end_without_a_wrong_word() {
    for kind in WorkloadKind::ALL {
        let mut params = params(kind, 3, 3000);
        params.workload.discard_every_ops = 50;
        params.workload.burst_ops = 500;
        params.workload.phase_ops = 700;
        let guest = Guest::new(&params).unwrap();
        // The vCPUs run one after the other over the same memory: each checks at its end what the others left
        // alone.
        let mut machine = VecMachine::new(&params);
        for vcpu in 0..3 {
            let report = guest.run(vcpu, &mut machine).unwrap();
            assert_eq!(report.wrong_words, 0, "{kind}: {:x?}", report.wrong[0]);
            assert_eq!(Phase::from_wire(report.phase), Some(Phase::Done));
            assert_eq!(report.operations, 5000);
            assert_eq!(report.populated_pages, guest.layout().owned_pages(vcpu));
            assert_eq!(report.checked_pages, report.footprint_pages);
            assert!((800..1200).contains(&report.puts), "{kind}: {} puts", report.puts);
            assert!(report.discarded_pages > 0);
            assert_eq!(report.latency.iter().map(|&count| u64::from(count)).sum::<u64>(), 5000);
        }
    }
}

#[test]
fn the_same_seed_makes_the_same_run() {
    let params = params(WorkloadKind::Zipf, 1, 500);
    let (mut first, mut second) = (VecMachine::new(&params), VecMachine::new(&params));
    assert_eq!(run(&params, &mut first), run(&params, &mut second));
    assert_eq!(first.words(WORKLOAD_GPA, PAGE_WORDS), second.words(WORKLOAD_GPA, PAGE_WORDS));
}

#[test]
fn a_flipped_word_is_reported_once_with_its_address() {
    let mut params = params(WorkloadKind::Sweep, 1, 500);
    params.workload.write_permille = 0;
    let layout = Guest::new(&params).unwrap().layout().clone();
    let gpa = layout.data_gpa(123) + 8 * 17;
    let truth = Rc::new(Cell::new(0));
    let seen = Rc::clone(&truth);
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        let populated = machine.reports.last().is_some_and(|report| report.phase == Phase::Running as u32);
        if populated && seen.get() == 0 {
            let word = &mut machine.words(gpa, 1)[0];
            // The page is of a kind with contents, so 0 never stands here and can mean: not yet.
            seen.set(*word);
            *word ^= 1 << 40;
        }
    });
    assert_ne!(Guest::new(&params).unwrap().content().kind(123, 1), PageKind::Zero, "choose another page");

    let report = run(&params, &mut machine);

    assert_eq!((report.wrong_words, report.wrong_pages), (1, 1));
    let wrong = report.wrong[0];
    assert_eq!((wrong.gpa, wrong.expected, wrong.found), (gpa, truth.get(), truth.get() ^ 1 << 40));
    assert!(report.operations > 5 * 400, "the sweep must have come by again and found the page repaired");
}

#[test]
fn any_flipped_word_of_data_or_versions_is_found_by_the_final_check() {
    let mut params = params(WorkloadKind::Idle, 1, 200);
    params.workload.operations = 1;
    let layout = Guest::new(&params).unwrap().layout().clone();
    for round in 0..100 {
        let page = round * 7919 % layout.data_pages();
        let gpa = if round % 2 == 0 {
            layout.data_gpa(page) + round * 31 % 512 * 8
        } else {
            layout.version_gpa(0, page)
        };
        let mut flipped = false;
        let mut machine = VecMachine::with_meddle(&params, move |machine| {
            let last = machine.reports.last().map(|report| report.phase);
            if last == Some(Phase::Checking as u32) && !flipped {
                flipped = true;
                machine.words(gpa, 1)[0] ^= 1 << (round % 64);
            }
        });
        // The report that announces the check goes out, and the flip is made, before the first page is read.
        let report = run(&params, &mut machine);
        assert_eq!(report.wrong_words, 1, "seed {SEED}, round {round}, page {page}, {gpa:#x}");
        assert_eq!(report.wrong[0].gpa, gpa);
    }
}

#[test]
fn memory_that_came_back_as_zeros_everywhere_is_not_consistent_with_itself() {
    let mut params = params(WorkloadKind::Sweep, 1, 300);
    params.workload.operations = 1;
    let layout = Guest::new(&params).unwrap().layout().clone();
    let mut machine = VecMachine::with_meddle(&params, {
        let mut done = false;
        move |machine| {
            if machine.reports.last().is_some_and(|report| report.phase == Phase::Checking as u32) && !done {
                done = true;
                for page in 0..layout.data_pages() {
                    machine.words(layout.data_gpa(page), PAGE_WORDS).fill(0);
                    machine.words(layout.version_gpa(0, page), 1)[0] = 0;
                }
            }
        }
    });
    let report = run(&params, &mut machine);
    assert_eq!(report.wrong_pages, report.footprint_pages);
}

#[test]
fn an_old_version_of_a_page_is_found() {
    let mut params = params(WorkloadKind::Sweep, 1, 100);
    params.mix = Mix { zero: 0, duplicate: 0, text: 50, random: 50 };
    params.workload = WorkloadSpec { write_permille: 1000, operations: 500, ..params.workload };
    let gpa = Guest::new(&params).unwrap().layout().data_gpa(0);
    let mut old: Option<Vec<u64>> = None;
    let mut restored = false;
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        let phase = machine.reports.last().map(|report| report.phase);
        if phase == Some(Phase::Running as u32) && old.is_none() {
            old = Some(machine.words(gpa, PAGE_WORDS).to_vec());
        }
        if let (true, false, Some(old)) = (phase == Some(Phase::Checking as u32), restored, &old) {
            machine.words(gpa, PAGE_WORDS).copy_from_slice(old);
            restored = true;
        }
    });
    let report = run(&params, &mut machine);
    assert_eq!(report.wrong_pages, 1);
    assert!(report.wrong_words > 400, "{}", report.wrong_words);
    assert_eq!(report.wrong[15].gpa, gpa + 15 * 8, "the first sixteen are kept");
}

#[test]
fn what_is_given_back_reads_as_zero_and_is_missed_when_it_does_not() {
    let mut params = params(WorkloadKind::Zipf, 2, 1000);
    params.workload =
        WorkloadSpec { discard_every_ops: 10, discard_pages_max: 40, write_permille: 0, ..params.workload };
    let mut machine = VecMachine::new(&params);
    let report = run(&params, &mut machine);
    assert_eq!(report.wrong_words, 0);
    assert_eq!(machine.discards.iter().map(|(_, len)| len / PAGE_SIZE).sum::<u64>(), report.discarded_pages);
    for (gpa, len) in machine.discards.clone() {
        let words = usize::try_from(len / 8).unwrap();
        assert!(machine.words(gpa, words).iter().all(|&word| word == 0), "{gpa:#x}+{len:#x}");
    }

    /// Ignores what the guest gives back.
    struct Deaf(VecMachine);
    impl Machine for Deaf {
        fn read_word(&mut self, gpa: u64) -> u64 {
            self.0.read_word(gpa)
        }
        fn write_word(&mut self, gpa: u64, value: u64) {
            self.0.write_word(gpa, value);
        }
        fn read_page(&mut self, gpa: u64, into: &mut plimsoll_guest::PageWords) {
            self.0.read_page(gpa, into);
        }
        fn write_page(&mut self, gpa: u64, from: &plimsoll_guest::PageWords) {
            self.0.write_page(gpa, from);
        }
        fn now_ticks(&mut self) -> u64 {
            self.0.now_ticks()
        }
        fn idle(&mut self, ns: u64) {
            self.0.idle(ns);
        }
        fn stop(&mut self) -> u64 {
            self.0.stop()
        }
        fn window(&mut self) -> u64 {
            self.0.window()
        }
        fn report(&mut self, report: &Report) {
            self.0.report(report);
        }
        fn next_command(&mut self, answer: &Probed) -> ProbeCommand {
            self.0.next_command(answer)
        }
        fn exchange_word(&mut self, gpa: u64, old: u64, new: u64) -> Result<(), u64> {
            self.0.exchange_word(gpa, old, new)
        }
        fn balloon(&mut self) -> BalloonTarget {
            self.0.balloon()
        }
        fn list(&mut self, listing: &Listing) {
            self.0.list(listing);
        }
        fn install(&mut self, gpa: u64) {
            self.0.install(gpa);
        }
        fn discard(&mut self, _gpa: u64, _len: u64) {}
    }
    let mut deaf = Deaf(VecMachine::new(&params));
    let report = Guest::new(&params).unwrap().run(0, &mut deaf).unwrap();
    assert!(report.wrong_pages > 100, "{}", report.wrong_pages);
}

#[test]
fn windows_count_what_a_set_counts() {
    for kind in [WorkloadKind::Zipf, WorkloadKind::Sweep, WorkloadKind::Phases] {
        let mut params = params(kind, 2, 2000);
        params.workload.discard_every_ops = 100;
        let counts = Rc::new(Cell::new([0u64; 64]));
        let naive = Rc::clone(&counts);
        let mut operations = 0u64;
        let mut machine = VecMachine::with_meddle(&params, move |machine| {
            operations += 1;
            if operations.is_multiple_of(611) && machine.window < 64 {
                let mut counts = naive.get();
                counts[usize::try_from(machine.window).unwrap()] =
                    u64::try_from(std::mem::take(&mut machine.touched).len()).unwrap();
                naive.set(counts);
                machine.window += 1;
            }
        });
        let report = run(&params, &mut machine);
        assert_eq!(report.wrong_words, 0);
        let mut compared = 0;
        for report in machine.reports.iter().filter(|report| report.window > 1) {
            let window = usize::try_from(report.window).unwrap();
            // The guest has looked at the window's number already when the set is counted, so the operation
            // that follows belongs to one window there and to the next one here.
            let difference = report.window_pages.abs_diff(counts.get()[window]);
            assert!(
                difference <= 1,
                "{kind} window {window}: {} {:?}",
                report.window_pages,
                counts.get()[window]
            );
            compared += 1;
        }
        assert!(compared > 5, "{compared}");
    }
}

#[test]
fn a_window_whose_bits_were_lost_is_reported_as_wrong() {
    let params = params(WorkloadKind::Sweep, 1, 500);
    let gpa = Guest::new(&params).unwrap().layout().bitmap_gpa(0, 0);
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        // Population has touched the first pages, and comes to them no more in this window.
        if machine.window == 1 && machine.words(gpa, 1)[0] == u64::MAX {
            machine.words(gpa, 1)[0] = u64::MAX >> 1;
            machine.window = 2;
        }
    });
    let report = run(&params, &mut machine);
    assert_eq!(report.wrong_words, 1);
    let wrong = report.wrong[0];
    assert_eq!((wrong.gpa, wrong.expected - wrong.found), (gpa, 1));
}

#[test]
fn reports_come_at_least_every_fifty_milliseconds_even_asleep() {
    for kind in [WorkloadKind::Idle, WorkloadKind::Bursts, WorkloadKind::Zipf] {
        let mut params = params(kind, 1, 1000);
        params.workload.operations = 50;
        params.workload.burst_ops = 10;
        let mut machine = VecMachine::new(&params);
        run(&params, &mut machine);
        for pair in machine.reports.windows(2) {
            let apart = pair[1].now_ticks - pair[0].now_ticks;
            assert!(apart <= TSC_HZ / 20 + 100, "{kind}: {apart} us");
            assert_eq!(pair[1].sequence, pair[0].sequence + 1);
        }
        assert_eq!(machine.slept_ns > 0, kind != WorkloadKind::Zipf);
    }
}

#[test]
fn a_pace_is_kept() {
    let mut params = params(WorkloadKind::Zipf, 1, 100);
    params.workload = WorkloadSpec { ops_per_second: 200, operations: 1000, ..params.workload };
    let mut machine = VecMachine::new(&params);
    let report = run(&params, &mut machine);
    let seconds_milli = (report.now_ticks - report.running_ticks) / 1000;
    assert!((4_900..5_200).contains(&seconds_milli), "{seconds_milli}");
}

#[test]
fn a_stop_ends_population_and_work_and_only_the_hard_one_the_check() {
    for (stop, checked) in [(STOP_FINISH, true), (STOP_NOW, false)] {
        for at in [10, 800] {
            let mut params = params(WorkloadKind::Zipf, 1, 500);
            params.workload.operations = 0;
            let mut count = 0;
            let mut machine = VecMachine::with_meddle(&params, move |machine| {
                count += 1;
                if count == at {
                    machine.stop = stop;
                }
            });
            let report = run(&params, &mut machine);
            assert_eq!(Phase::from_wire(report.phase), Some(Phase::Done));
            assert_eq!(report.wrong_words, 0);
            assert_eq!(report.checked_pages, if checked { report.populated_pages } else { 0 });
            assert_eq!(report.populated_pages < report.footprint_pages, at == 10);
        }
    }
}

#[test]
fn the_mix_holds_while_pages_are_rewritten() {
    let mut params = params(WorkloadKind::Sweep, 1, 4000);
    params.workload = WorkloadSpec { write_permille: 1000, operations: 12_000, ..params.workload };
    let mut machine = VecMachine::new(&params);
    run(&params, &mut machine);
    let layout = Guest::new(&params).unwrap().layout().clone();
    let pages = layout.data_pages();
    let zero = (0..pages)
        .filter(|&page| machine.words(layout.data_gpa(page), PAGE_WORDS).iter().all(|&word| word == 0))
        .count();
    let percent = zero * 1000 / usize::try_from(pages).unwrap();
    assert!((230..=270).contains(&percent), "{percent} permille of zero pages instead of 250");
}
