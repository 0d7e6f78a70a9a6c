//! The program that keeps frames, over plain memory, with a host that takes and inflates between its operations.
use crate::machine::{VecMachine, params};
use plimsoll_guest::Guest;
use plimsoll_guest::abi::{Finds, LISTED_MAX, Listed, Piece};
use plimsoll_guest::frames::Take;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::WorkloadKind;

const PAGES: u64 = 6000;

fn command(number: u64, task: Task) -> ProbeCommand {
    ProbeCommand { number, ..ProbeCommand::new(task, Order::Ascending) }
}

fn given(machine: &VecMachine, what: Listed) -> u64 {
    let listings = machine.listings.iter().filter(|listing| listing.what == what as u32);
    listings.map(|listing| u64::from(listing.count) * Piece::from_wire(listing.piece).unwrap().pages()).sum()
}

#[test]
fn what_is_allocated_is_verified_and_freed_and_each_frame_is_asked_for_once() {
    let params = params(WorkloadKind::Frames, 1, PAGES);
    let guest = Guest::new(&params).unwrap();
    let frames = guest.plan().unwrap().frames();
    // Windows pass meanwhile.
    let mut machine = VecMachine::with_meddle(&params, |machine| machine.window += 1);
    machine.commands = [
        ProbeCommand { pages: 1024, stride: 512, ..command(1, Task::Allocate) },
        ProbeCommand { pages: 300, ..command(2, Task::Allocate) },
        command(3, Task::Verify),
        ProbeCommand { pages: 300, ..command(4, Task::Free) },
        ProbeCommand { passes: 4000, pages: 900, ..command(5, Task::Churn) },
        command(6, Task::Allocate),
    ]
    .into();
    let report = guest.run(0, &mut machine).unwrap();
    let pages: Vec<u64> = machine.answers.iter().map(|answer| answer.pages).collect();
    assert_eq!(pages[..6], [0, 1024, 300, 1324, 300, 4000]);
    assert_eq!((report.wrong_words, report.wrong_pages), (0, 0));
    // In the end everything is in use, and was checked.
    assert_eq!((report.footprint_pages, report.checked_pages), (frames * 512, frames * 512));
    let mut asked = machine.installs.clone();
    asked.sort_unstable();
    asked.dedup();
    assert_eq!((asked.len(), machine.installs.len() as u64), (machine.installs.len(), frames));
}

#[test]
fn the_balloon_is_filled_and_emptied_by_listings_of_either_piece() {
    for (piece, finds) in
        [(Piece::Page, Finds::InOrder), (Piece::Page, Finds::Scattered), (Piece::Frame, Finds::InOrder)]
    {
        let params = params(WorkloadKind::Frames, 1, PAGES);
        let guest = Guest::new(&params).unwrap();
        let mut step = 0;
        // Twice as much as fits after 600 pages, then a little, then nothing.
        let mut machine = VecMachine::with_meddle(&params, move |machine| {
            step += 1;
            match step {
                100 => machine.balloon = machine.balloon.next(2 * PAGES, piece, finds),
                2000 => machine.balloon = machine.balloon.next(1024, piece, finds),
                3000 => machine.balloon = machine.balloon.next(0, piece, finds),
                _ => {}
            }
        });
        let mut pieces = [command(1, Task::Allocate), command(2, Task::Verify), command(3, Task::Verify)];
        pieces[0].pages = 600;
        machine.commands = pieces.into();
        let churn = ProbeCommand { passes: 4000, pages: 500, ..command(4, Task::Churn) };
        machine.commands.push_back(churn);
        let report = guest.run(0, &mut machine).unwrap();
        assert_eq!(report.wrong_words, 0, "{piece:?}");
        let settled =
            machine.listings.iter().filter(|listing| listing.what == Listed::Settled as u32).count();
        assert_eq!(settled, 3, "{piece:?}");
        let (gave, took) = (given(&machine, Listed::Given), given(&machine, Listed::WantedBack));
        let all = guest.plan().unwrap().pages();
        assert_eq!(gave, took, "{piece:?}");
        assert!(gave >= all / 2 && gave < all, "{piece:?}: {gave} of {all}");
        if finds == Finds::Scattered {
            let first = machine.listings.iter().find(|listing| listing.what == Listed::Given as u32).unwrap();
            let pages = first.pages.windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
            assert_eq!(pages, 0, "neighbours in a scattered listing");
        }
        let full = |listing: &&plimsoll_guest::abi::Listing| listing.count as usize == LISTED_MAX;
        assert_eq!(machine.listings.iter().any(|listing| full(&listing)), piece == Piece::Page);
    }
}

#[test]
fn work_goes_over_what_is_kept_and_serves_the_balloon_meanwhile() {
    let mut params = params(WorkloadKind::Frames, 1, PAGES);
    params.workload.write_permille = 250;
    let guest = Guest::new(&params).unwrap();
    let mut step = 0;
    let mut machine = VecMachine::with_meddle(&params, move |machine| {
        step += 1;
        if step == 2000 {
            machine.balloon = machine.balloon.next(1024, Piece::Frame, Finds::InOrder);
        }
    });
    let work = |number, kind: WorkloadKind, passes| ProbeCommand {
        stride: u64::from(kind as u32),
        passes,
        ..command(number, Task::Work)
    };
    machine.commands = [
        work(1, WorkloadKind::Zipf, 10),
        ProbeCommand { pages: 400, ..command(2, Task::Allocate) },
        work(3, WorkloadKind::Zipf, 4000),
        work(4, WorkloadKind::Sweep, 400),
        work(5, WorkloadKind::Frames, 10),
        command(6, Task::Verify),
    ]
    .into();
    let report = guest.run(0, &mut machine).unwrap();
    let done: Vec<u64> = machine.answers.iter().map(|answer| answer.pages).collect();
    assert_eq!(done[1..6], [0, 400, 4000, 400, 0]);
    assert_eq!((report.wrong_words, given(&machine, Listed::Given)), (0, 1024));
    // Each operation compares a page, and a quarter writes one.
    assert!(report.verified_pages >= 4400 + 400);
    assert!((1300..1700).contains(&report.puts), "{} of 4400 operations and 400 allocations", report.puts);
    assert_eq!(report.latency.iter().sum::<u32>(), 4400);
}

#[test]
fn a_host_that_takes_at_every_step_costs_the_guest_nothing_but_questions() {
    for take in [Take::Softly, Take::ForGood] {
        let params = params(WorkloadKind::Frames, 1, PAGES);
        let guest = Guest::new(&params).unwrap();
        let plan = *guest.plan().unwrap();
        let mut held = Vec::new();
        let mut machine = VecMachine::with_meddle(&params, move |machine| {
            for frame in 0..plan.frames() {
                if machine.allocator().take(frame, take).is_some() {
                    plimsoll_guest::Machine::discard(machine, plan.frame_gpa(frame), 512 * 4096);
                    held.push(frame);
                }
            }
            // One at a time goes back, so that the guest always finds some.
            if take == Take::ForGood {
                for frame in held.drain(..) {
                    machine.allocator().give_back(frame).unwrap();
                }
            }
        });
        machine.commands = [ProbeCommand { passes: 1500, pages: 700, ..command(1, Task::Churn) }].into();
        let report = guest.run(0, &mut machine).unwrap();
        assert_eq!(report.wrong_words, 0, "{take:?}");
        assert!(machine.installs.len() > 3, "{take:?}: {} installs", machine.installs.len());
        assert!(report.verified_pages > 1000);
    }
}
