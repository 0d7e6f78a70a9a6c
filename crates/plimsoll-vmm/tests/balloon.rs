//! Guests that keep frames: their balloon up and down, frames taken behind their back.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]
mod common;

use common::{Started, accels, config};
use plimsoll_guest::frames::Plan;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_sys::pagemap::{Entry, Pagemap};
use plimsoll_sys::{HvaRange, ProcessId};
use plimsoll_types::{ByteCount, Hva};
use plimsoll_vmm::config::{AccelChoice, Hole, HugePages, VmmConfig};
use plimsoll_vmm::control::{BalloonPiece, Command, Event, FrameOrder, FrameVerb, Ram, StopMode};
use plimsoll_vmm::report::ProbeReport;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
/// Longer than any test takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(300);

/// A guest that keeps frames, seen from its starter.
struct Guest {
    machine: Started,
    ram: Vec<Ram>,
    plan: Plan,
}

fn frames(accel: AccelChoice) -> VmmConfig {
    let spec = WorkloadSpec { final_check: 1, ..WorkloadSpec::new(WorkloadKind::Frames) };
    VmmConfig { ram_bytes: RAM, ..config(spec, accel) }
}

/// One whose pages that are in RAM can be counted: khugepaged puts zeros wherever some pages of a block were dropped, when it comes there.
fn counted(accel: AccelChoice) -> VmmConfig {
    VmmConfig { huge_pages: HugePages::Never, ..frames(accel) }
}

impl Guest {
    fn start(config: VmmConfig) -> Self {
        let plan = *config.guest().unwrap().plan().unwrap();
        let mut machine = Started::new(config, None);
        let ram = machine.until(|event| match event {
            Event::Started { ram, .. } => Some(ram.clone()),
            _ => None,
        });
        Self { machine, ram, plan }
    }

    fn ask(&mut self, probe: ProbeCommand) -> ProbeReport {
        self.begin(0, probe);
        self.answer()
    }

    fn begin(&mut self, vcpu: u32, probe: ProbeCommand) {
        self.machine.command(Command::Probe { vcpu, probe });
    }

    fn answer(&mut self) -> ProbeReport {
        let report = self.machine.until(|event| match event {
            Event::Probed(report) => Some(report.clone()),
            Event::Died { reason, .. } => panic!("{reason}"),
            _ => None,
        });
        assert_eq!(report.wrong_words, 0);
        report
    }

    /// Sets the balloon's target and returns what it then has.
    fn balloon(&mut self, target_bytes: u64, piece: BalloonPiece) -> u64 {
        self.machine.command(Command::Balloon { target_bytes, piece });
        self.machine.until(|event| match event {
            Event::Ballooned { target_bytes: told, ballooned_bytes, .. } => {
                assert_eq!(*told, target_bytes);
                Some(*ballooned_bytes)
            }
            Event::Died { reason, .. } => panic!("{reason}"),
            _ => None,
        })
    }

    /// Bytes done, and bytes of them that were dropped.
    fn order(&mut self, order: FrameVerb, bytes: u64) -> (u64, u64) {
        let asked = FrameOrder { order, bytes };
        self.machine.command(Command::Frames(asked));
        self.machine.until(|event| match event {
            Event::Frames { order, done_bytes, dropped_bytes, refused, .. } => {
                assert_eq!((*order, refused), (asked, &None));
                Some((*done_bytes, *dropped_bytes))
            }
            Event::Died { reason, .. } => panic!("{reason}"),
            _ => None,
        })
    }

    /// Bytes of its memory that are in RAM by the page map.
    fn present(&self) -> u64 {
        let pagemap = Pagemap::open(ProcessId::own()).unwrap();
        let mut entries = Vec::new();
        let present = |ram: &Ram| {
            pagemap.read(HvaRange::new(Hva(ram.hva), ByteCount(ram.bytes)).unwrap(), &mut entries).unwrap();
            entries.iter().filter(|entry| entry.contains(Entry::PRESENT)).count() as u64 * 4096
        };
        self.ram.iter().map(present).sum()
    }

    /// What the machine's next report says the balloon has.
    fn reported(&mut self) -> u64 {
        self.machine.until(|event| match event {
            Event::Report(report) => Some(report.ballooned_bytes),
            _ => None,
        })
    }

    /// Has it verify everything it keeps and end.
    fn finish(mut self) {
        self.machine.stop(StopMode::Finish);
        let report = self.machine.end().unwrap();
        assert_eq!((report.died, report.abandoned), (None, 0));
        assert_eq!(report.summary.wrong_words, 0, "{:x?}", report.summary.wrong);
        assert_eq!(report.summary.checked_pages, report.summary.footprint_pages);
    }
}

fn pages(task: Task, pages: u64, stride: u64) -> ProbeCommand {
    ProbeCommand { pages, stride, ..ProbeCommand::new(task, Order::Ascending) }
}

const FOR_EVER: u64 = 0;

fn churn(most_pages: u64) -> ProbeCommand {
    ProbeCommand { passes: FOR_EVER, ..pages(Task::Churn, most_pages, 1) }
}

#[test]
fn the_balloon_rises_and_falls_in_either_piece_and_ram_falls_and_rises_with_it() {
    for accel in accels() {
        for (piece, stride) in
            [(BalloonPiece::Page, 1), (BalloonPiece::ScatteredPage, 1), (BalloonPiece::Frame, 512)]
        {
            let mut guest = Guest::start(counted(accel));
            let all = guest.plan.pages();
            // 8 MiB are kept throughout; the rest is touched and freed.
            assert_eq!(guest.ask(pages(Task::Allocate, 2048, 512)).pages, 2048);
            for is_first in [true, false] {
                assert_eq!(guest.ask(pages(Task::Allocate, u64::MAX, stride)).pages, all - 2048);
                assert_eq!(guest.ask(pages(Task::Free, all - 2048, 1)).pages, all - 2048);
                if is_first {
                    // It writes down what its balloon has: that memory is touched once for all that there can be.
                    assert_eq!(guest.balloon(u64::MAX >> 20 << 12, piece), (all - 2048) * 4096);
                    assert_eq!(guest.balloon(0, piece), 0);
                }
            }
            let full = guest.present();
            assert!(full >= all * 4096, "{accel:?} {piece:?}: {full}");
            assert_eq!(guest.balloon(32 * MIB, piece), 32 * MIB, "{accel:?} {piece:?}");
            assert_eq!(guest.reported(), 32 * MIB);
            assert_eq!(full - guest.present(), 32 * MIB, "{accel:?} {piece:?}");
            // More than there is: all but what is kept.
            assert_eq!(guest.balloon(u64::MAX >> 20 << 12, piece), (all - 2048) * 4096);
            assert_eq!(full - guest.present(), (all - 2048) * 4096);
            assert_eq!(guest.ask(pages(Task::Allocate, 1, 1)).pages, 0, "it has nothing left");
            assert_eq!(guest.balloon(8 * MIB, piece), 8 * MIB);
            assert_eq!(full - guest.present(), (all - 2048) * 4096, "memory comes when it is touched");
            let back = all - 2048 - 2048;
            assert_eq!(guest.ask(pages(Task::Allocate, u64::MAX, stride)).pages, back);
            assert_eq!(full - guest.present(), 8 * MIB);
            assert_eq!(guest.balloon(0, piece), 0);
            assert_eq!(guest.ask(pages(Task::Verify, 1, 1)).pages, all - 2048);
            guest.finish();
        }
    }
}

#[test]
fn frames_nobody_uses_are_taken_without_asking_and_come_back_by_asking_or_when_given_back() {
    for accel in accels() {
        let mut guest = Guest::start(counted(accel));
        let all = guest.plan.pages() * 4096;
        assert_eq!(guest.order(FrameVerb::TakeSoftly, u64::MAX), (0, 0), "it has nothing yet");
        guest.ask(pages(Task::Allocate, 2048, 512));
        let kept = guest.present();
        guest.ask(pages(Task::Allocate, 4096, 512));
        guest.ask(pages(Task::Free, 4096, 512));
        assert_eq!(guest.order(FrameVerb::TakeSoftly, 5 * MIB), (4 * MIB, 4 * MIB), "whole frames only");
        assert_eq!(guest.order(FrameVerb::TakeSoftly, u64::MAX), (12 * MIB, 12 * MIB));
        assert_eq!((guest.present(), guest.reported()), (kept, 0));
        assert_eq!(guest.ask(pages(Task::Allocate, 1024, 512)).pages, 1024);
        assert_eq!(guest.present(), kept + 4 * MIB);
        assert_eq!(guest.order(FrameVerb::TakeForGood, u64::MAX), (all - 12 * MIB, 0));
        assert_eq!(guest.reported(), all - 12 * MIB);
        assert_eq!(guest.ask(pages(Task::Allocate, 1, 1)).pages, 0, "everything is in use or held");
        assert_eq!(guest.order(FrameVerb::GiveBack, 2 * MIB), (2 * MIB, 0));
        assert_eq!(guest.ask(pages(Task::Allocate, u64::MAX, 1)).pages, 512);
        assert_eq!(guest.order(FrameVerb::GiveBack, u64::MAX), (all - 14 * MIB, 0));
        assert_eq!(guest.reported(), 0);
        guest.finish();
    }
}

#[test]
fn a_host_that_takes_and_inflates_while_every_vcpu_works_costs_no_page() {
    for accel in accels() {
        let mut guest = Guest::start(VmmConfig { vcpus: 2, ..frames(accel) });
        let half = guest.plan.pages() / 4;
        (0..2).for_each(|vcpu| guest.begin(vcpu, churn(half)));
        let (mut taken, mut dropped, mut round) = (0, 0, 0);
        let start = Instant::now();
        while round < 60 || dropped < 64 * MIB {
            assert!(
                start.elapsed() < PATIENCE,
                "{accel:?}: {taken} taken, {dropped} dropped in {round} rounds"
            );
            round += 1;
            let (done, freed) = match round % 3 {
                0 => guest.order(FrameVerb::TakeForGood, 16 * MIB),
                _ => guest.order(FrameVerb::TakeSoftly, u64::MAX),
            };
            (taken, dropped) = (taken + done, dropped + freed);
            let piece = if round % 2 == 1 { BalloonPiece::Page } else { BalloonPiece::Frame };
            guest.balloon([4, 0, 9, 2][round % 4] * MIB, piece);
            guest.order(FrameVerb::GiveBack, u64::MAX);
        }
        guest.balloon(0, BalloonPiece::Page);
        guest.machine.command(Command::Window { number: 1 });
        let done = guest.answer().pages + guest.answer().pages;
        assert!(done > 1000, "{accel:?}: {done} operations");
        assert_eq!(guest.reported(), 0);
        guest.finish();
    }
}

#[test]
fn a_guest_without_frames_refuses_the_balloon_in_words() {
    let config = config(WorkloadSpec::new(WorkloadKind::Probe), AccelChoice::InProcess);
    let mut machine = Started::new(config, None);
    let order = FrameOrder { order: FrameVerb::TakeSoftly, bytes: 0 };
    for command in [Command::Frames(order), Command::Balloon { target_bytes: 1, piece: BalloonPiece::Page }] {
        machine.command(command);
        let message = machine.until(|event| match event {
            Event::Error { message } => Some(message.clone()),
            _ => None,
        });
        assert_eq!(message, "this guest keeps no frames and has no balloon");
    }
    machine.stop(StopMode::Finish);
    assert_eq!(machine.end().unwrap().died, None);
}

#[test]
fn a_machine_with_a_hole_gives_frames_of_every_region() {
    let hole = Hole::At { start: 40 * MIB, bytes: 6 * MIB };
    let mut guest = Guest::start(VmmConfig { hole, ..frames(AccelChoice::InProcess) });
    let all = guest.plan.pages();
    guest.ask(pages(Task::Allocate, u64::MAX, 1));
    assert_eq!(guest.ask(pages(Task::Free, u64::MAX, 1)).pages, all);
    assert_eq!(guest.order(FrameVerb::TakeForGood, u64::MAX), (all * 4096, all * 4096));
    assert_eq!(guest.balloon(MIB, BalloonPiece::Page), all * 4096, "what is held counts as given");
    guest.finish();
}
