//! Whole machines, in threads of this process, under KVM and without.
mod common;

use common::{Honesty, Inspector, Manager, PATIENCE, Started, accels, config, finite};
use plimsoll_guest::abi;
use plimsoll_guest::probe::{Order, ProbeCommand, Task};
use plimsoll_guest::spec::{WorkloadKind, WorkloadSpec};
use plimsoll_types::{Gpa, PAGE_SIZE};
use plimsoll_vmm::config::{AccelChoice, Hole, HugePages, Management, Prefault, VmmConfig};
use plimsoll_vmm::control::{Command, Event, MergeMode, MergeRange, Registers, StopMode};
use plimsoll_vmm::report::ProbeReport;
use plimsoll_vmm::supervise::ManagerEnd;
use plimsoll_vmm::{Accel, VmmError};
use std::sync::atomic::Ordering;
use std::time::Instant;

#[test]
fn every_workload_runs_to_its_end_without_a_wrong_word() {
    for accel in accels() {
        for kind in WorkloadKind::ALL {
            let operations = if kind == WorkloadKind::Idle { 50 } else { 20_000 };
            let machine = Started::new(config(finite(kind, operations), accel), None);
            let report = machine.end().unwrap();
            assert_eq!((report.died, report.abandoned), (None, 0), "{kind} {accel:?}");
            let summary = report.summary;
            assert_eq!((summary.wrong_words, summary.operations), (0, operations), "{kind} {accel:?}");
            assert_eq!(summary.phase, "done", "{kind} {accel:?}");
            assert_eq!(summary.populated_pages, summary.footprint_pages, "{kind} {accel:?}");
            assert_eq!(summary.checked_pages, summary.footprint_pages, "{kind} {accel:?}");
        }
    }
}

#[test]
fn a_machine_says_that_it_started_reports_and_stops_when_told() {
    for accel in accels() {
        let spec = WorkloadSpec { final_check: 1, ..WorkloadSpec::new(WorkloadKind::Zipf) };
        let mut machine = Started::new(VmmConfig { vcpus: 2, ..config(spec, accel) }, None);
        let started = machine.until(|event| match event {
            Event::Started { accel, tsc_hz, machine, .. } => Some((accel.clone(), *tsc_hz, *machine)),
            _ => None,
        });
        assert_eq!(matches!(started.0, Accel::Kvm { .. }), accel == AccelChoice::Kvm);
        assert!(started.1 > 0 && started.2.is_none());
        machine.until_running();
        // A window is complete when the next begins and every vCPU has seen it.
        let mut number = 0;
        let window = loop {
            number += 1;
            machine.command(Command::Window { number });
            let window = machine.until(|event| match event {
                Event::Report(report) => Some(report.window),
                _ => None,
            });
            if let Some(window) = window {
                break window;
            }
        };
        assert!(window.number < number && window.pages > 0, "{window:?}");
        machine.stop(StopMode::Finish);
        let report = machine.end().unwrap();
        assert_eq!(report.died, None);
        assert_eq!((report.summary.phase.as_str(), report.summary.wrong_words), ("done", 0));
        assert_eq!(report.summary.checked_pages, report.summary.footprint_pages);
        assert!(!report.summary.latency.buckets.is_empty());
    }
}

#[test]
fn a_probing_guest_does_what_its_starter_asks_and_answers_by_its_own_clock() {
    for accel in accels() {
        let config = config(WorkloadSpec::new(WorkloadKind::Probe), accel);
        let pages = config.guest().unwrap().layout().data_pages();
        let mut machine = Started::new(config, None);
        let mut ask = |probe| {
            machine.command(Command::Probe { vcpu: 0, probe });
            machine.until(|event| match event {
                Event::Probed(report) => Some(report.clone()),
                Event::Error { message } => Some(ProbeReport {
                    wrong_words: u64::from(message.contains("task has number 0")),
                    ..ProbeReport::default()
                }),
                _ => None,
            })
        };
        let populated = ask(ProbeCommand::new(Task::Populate, Order::Ascending));
        assert_eq!((populated.number, populated.pages), (1, pages), "{accel:?}");
        let read =
            ask(ProbeCommand { first_page: 10, pages: 500, ..ProbeCommand::new(Task::Read, Order::Random) });
        assert_eq!((read.number, read.pages), (2, 500));
        assert!(
            read.ns >= read.touch_ns && read.touch_ns >= read.touch_max_ns && read.touch_max_ns > 0,
            "{read:?}"
        );
        assert_eq!(read.latency.iter().map(|bucket| bucket.pages).sum::<u64>(), 500);
        let verified = ask(ProbeCommand::new(Task::Verify, Order::Ascending));
        assert_eq!((verified.pages, verified.wrong_words), (pages, 0));
        // Nonsense is answered by the machine, and the guest never sees it.
        assert_eq!(ask(ProbeCommand::default()).wrong_words, 1);
        machine.stop(StopMode::Finish);
        let report = machine.end().unwrap();
        assert_eq!((report.died, report.abandoned), (None, 0), "{accel:?}");
    }
}

#[test]
fn blocks_are_offered_to_ksm_and_withdrawn_on_request_and_nothing_outside_of_memory_is() {
    const BLOCK: u64 = 2 << 20;
    let config = config(WorkloadSpec::new(WorkloadKind::Probe), AccelChoice::InProcess);
    let mut machine = Started::new(config.clone(), None);
    let mut ask = |gpa, bytes, merging| {
        machine.command(Command::Merge(MergeRange { gpa, bytes, merging }));
        machine.until(|event| match event {
            Event::Merging { range, refused } if range.gpa == gpa => Some(refused.clone()),
            _ => None,
        })
    };
    assert_eq!(ask(BLOCK, 2 * BLOCK, MergeMode::Offered), None);
    assert_eq!(ask(BLOCK, BLOCK, MergeMode::Withdrawn), None);
    assert_eq!(ask(2 * BLOCK, BLOCK, MergeMode::Withdrawn), None);
    for gpa in [u64::MAX - BLOCK, 1 << 40] {
        let refused = ask(gpa, BLOCK, MergeMode::Offered).unwrap();
        assert!(refused.contains("do not lie in one region"), "{refused}");
    }
    let refused = ask(123, BLOCK, MergeMode::Offered).unwrap();
    assert!(refused.contains("MADV_MERGEABLE"), "{refused}");
    machine.stop(StopMode::Now);
    assert_eq!(machine.end().unwrap().died, None);
}

#[test]
fn vcpus_say_their_registers_while_they_work_and_while_they_wait_to_whoever_may_ask() {
    for (accel, kind) in accels().into_iter().flat_map(|accel| {
        [WorkloadKind::Zipf, WorkloadKind::Probe, WorkloadKind::Idle].map(|kind| (accel, kind))
    }) {
        let folder = tempfile::tempdir().unwrap();
        let inspect = folder.path().join("inspect.sock");
        let config =
            VmmConfig { vcpus: 2, inspect: Some(inspect.clone()), ..config(WorkloadSpec::new(kind), accel) };
        let mut machine = Started::new(config, None);
        let ram = machine.until(|event| match event {
            Event::Started { ram, .. } => Some(ram.clone()),
            _ => None,
        });
        let seen = |event: &Event, asked: u32| match event {
            Event::Registers { vcpu, registers, refused, stalled_ns } if *vcpu == asked => {
                println!("{kind} {accel:?}: vCPU {vcpu} stood still for {stalled_ns} ns");
                Some((registers.clone(), refused.clone()))
            }
            _ => None,
        };
        let is_kvm = accel == AccelChoice::Kvm;
        let check = |(registers, refused): (Option<Box<Registers>>, Option<String>)| {
            let registers = registers.map(|registers| (registers.control[2], registers.privilege));
            assert_eq!(
                registers,
                is_kvm.then_some((abi::PAGE_TABLES_GPA, 3)),
                "{kind} {accel:?} {refused:?}"
            );
        };
        // A host that was not there for a vCPU for a second is asked once more.
        let is_late =
            |refused: Option<&str>| refused.is_some_and(|why| why.contains("did not leave KVM within"));
        for vcpu in [0, 1, 0] {
            let found = loop {
                machine.command(Command::Registers { vcpu });
                let found = machine.until(|event| seen(event, vcpu));
                if !is_late(found.1.as_deref()) {
                    break found;
                }
            };
            check(found);
        }
        machine.command(Command::Registers { vcpu: 2 });
        assert!(machine.until(|event| seen(event, 2)).0.is_none(), "{kind} {accel:?}");
        // From the other socket, one client after the other; it obeys nothing else.
        for _ in 0..2 {
            let mut client = Inspector::connect(&inspect);
            let Event::Started { ram: found, .. } = client.event() else { panic!("no first line") };
            assert_eq!(found, ram);
            let found = loop {
                client.command(Command::Registers { vcpu: 1 });
                let found = seen(&client.event(), 1).unwrap();
                if !is_late(found.1.as_deref()) {
                    break found;
                }
            };
            check(found);
            client.command(Command::Stop { mode: StopMode::Now });
            assert!(matches!(client.event(), Event::Error { .. }));
        }
        machine.stop(StopMode::Now);
        assert_eq!(machine.end().unwrap().died, None, "{kind} {accel:?}");
    }
}

/// What a vCPU has in its registers, by an inspector. A host that was not there for it for a second is asked once more.
fn told(client: &mut Inspector, vcpu: u32) -> Registers {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        client.command(Command::Registers { vcpu });
        match client.event() {
            Event::Registers { registers: Some(registers), .. } => return *registers,
            Event::Registers { refused: Some(why), .. } if why.contains("did not leave KVM within") => {}
            other => panic!("{other:?}"),
        }
    }
    panic!("vCPU {vcpu} says nothing of its registers")
}

#[test]
fn vcpus_stand_still_for_an_inspector_until_it_releases_them_or_leaves() {
    for accel in accels() {
        let folder = tempfile::tempdir().unwrap();
        let inspect = folder.path().join("inspect.sock");
        let base = config(WorkloadSpec::new(WorkloadKind::Zipf), accel);
        // Nobody reads its reports meanwhile.
        let config = VmmConfig { vcpus: 2, report_ms: 1000, inspect: Some(inspect.clone()), ..base };
        let mut machine = Started::new(config, None);
        machine.until_running();
        for leaves in [false, true] {
            let mut client = Inspector::connect(&inspect);
            assert!(matches!(client.event(), Event::Started { .. }));
            client.command(Command::Hold);
            if accel != AccelChoice::Kvm {
                assert!(matches!(client.event(), Event::Error { .. }));
                continue;
            }
            loop {
                match client.event() {
                    Event::Held => break,
                    // A host that is busy.
                    Event::Error { message } if message.contains("did not leave KVM") => {
                        client.command(Command::Hold)
                    }
                    other => panic!("{other:?}"),
                }
            }
            let held = [0, 1].map(|vcpu| told(&mut client, vcpu));
            for _ in 0..20 {
                assert_eq!([0, 1].map(|vcpu| told(&mut client, vcpu)), held);
            }
            if leaves {
                drop(client);
                client = Inspector::connect(&inspect);
                assert!(matches!(client.event(), Event::Started { .. }));
            } else {
                client.command(Command::Release);
                assert!(matches!(client.event(), Event::Released));
                client.command(Command::Release);
                assert!(matches!(client.event(), Event::Error { .. }), "nobody holds it any more");
            }
            // It goes on, and sooner or later elsewhere.
            let deadline = Instant::now() + PATIENCE;
            while [0, 1].iter().zip(&held).any(|(vcpu, held)| told(&mut client, *vcpu) == *held) {
                assert!(Instant::now() < deadline, "it still stands where it was held");
            }
        }
        if accel == AccelChoice::Kvm {
            // One that no longer reads holds nothing, also when another one waits its turn.
            let mut deaf = Inspector::connect(&inspect);
            assert!(matches!(deaf.event(), Event::Started { .. }));
            deaf.command(Command::Hold);
            deaf.hear_no_more();
            let mut next = Inspector::connect(&inspect);
            assert!(matches!(next.event(), Event::Started { .. }));
            next.command(Command::Release);
            assert!(matches!(next.event(), Event::Error { .. }), "it came to a machine that was held");
        }
        machine.stop(StopMode::Now);
        assert_eq!(machine.end().unwrap().died, None, "{accel:?}");
    }
}

#[test]
fn a_starter_that_leaves_ends_the_machine() {
    for accel in accels() {
        let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
        drop(socket);
        let config = config(WorkloadSpec::new(WorkloadKind::Zipf), accel);
        let report = plimsoll_vmm::run(&config, None, other.into()).unwrap();
        assert_eq!((report.died, report.abandoned), (None, 0));
    }
}

#[test]
fn all_shapes_of_memory_work() {
    for accel in accels() {
        let spec = finite(WorkloadKind::Sweep, 3000);
        let base = VmmConfig { vcpus: 3, ..config(spec, accel) };
        for config in [
            VmmConfig { hole: Hole::None, ..base.clone() },
            VmmConfig { hole: Hole::At { start: 8 << 20, bytes: 5 << 30 }, ..base.clone() },
            VmmConfig { prefault: Prefault::All, ..base.clone() },
            VmmConfig { huge_pages: HugePages::Never, ..base.clone() },
        ] {
            let mut machine = Started::new(config.clone(), None);
            if config.prefault == Prefault::All {
                let first = machine.event();
                assert!(
                    matches!(first, Some(Event::Prefault { total_bytes, .. }) if total_bytes == config.ram_bytes)
                );
            }
            let report = machine.end().unwrap();
            assert_eq!((report.died, report.summary.wrong_words), (None, 0), "{config:?}");
            assert_eq!(report.summary.operations, 9000);
        }
    }
}

#[test]
fn what_a_guest_gives_back_reads_as_zero_and_nothing_else_does() {
    for accel in accels() {
        for management in [Management::Unmanaged, Management::Managed] {
            let spec = WorkloadSpec { discard_every_ops: 50, ..finite(WorkloadKind::Zipf, 20_000) };
            let config = VmmConfig { vcpus: 2, management, ..config(spec, accel) };
            let manager = (management == Management::Managed).then(|| Manager::start(Honesty::Honest));
            let (manager, socket) = manager.unzip();
            let report = Started::new(config, socket).end().unwrap();
            assert_eq!((report.died, report.summary.wrong_words), (None, 0), "{accel:?} {management:?}");
            assert!(report.summary.discarded_pages > 100);
            if let Some(manager) = manager {
                manager.quit();
            }
        }
    }
}

#[test]
fn a_managed_machine_whose_pages_come_and_go_reads_no_wrong_word() {
    for accel in accels() {
        let spec = WorkloadSpec { final_check: 1, ..WorkloadSpec::new(WorkloadKind::Zipf) };
        let (manager, socket) = Manager::start(Honesty::Honest);
        let config = VmmConfig { vcpus: 2, management: Management::Managed, ..config(spec, accel) };
        let mut machine = Started::new(config, Some(socket));
        let identity = machine.until(|event| match event {
            Event::Started { machine, .. } => Some(*machine),
            _ => None,
        });
        assert_eq!(identity, Some(42));
        machine.until_running();
        manager.take.store(64, Ordering::SeqCst);
        machine.until(|event| match event {
            Event::Report(_) => (manager.taken.load(Ordering::SeqCst) > 20_000).then_some(()),
            _ => None,
        });
        machine.stop(StopMode::Finish);
        let report = machine.end().unwrap();
        assert_eq!((report.died, report.abandoned, report.manager), (None, 0, ManagerEnd::Present));
        assert_eq!(report.summary.wrong_words, 0, "{:?}", report.summary.wrong);
        assert_eq!(report.summary.checked_pages, report.summary.footprint_pages);
        manager.quit();
    }
}

/// Runs a guest under a dishonest manager until it has returned a page.
fn tamper(accel: AccelChoice, honesty: Honesty) -> (Manager, Started) {
    let spec = WorkloadSpec { final_check: 1, write_permille: 0, ..WorkloadSpec::new(WorkloadKind::Sweep) };
    let (manager, socket) = Manager::start(honesty);
    let config = VmmConfig { management: Management::Managed, ..config(spec, accel) };
    let mut machine = Started::new(config, Some(socket));
    machine.until_running();
    manager.take.store(32, Ordering::SeqCst);
    (manager, machine)
}

#[test]
fn a_single_flipped_bit_is_found_by_the_guest_at_its_address() {
    for accel in accels() {
        let (manager, mut machine) = tamper(accel, Honesty::FlipsABit);
        let wrong = machine.until(|event| match event {
            Event::Report(report) => report.wrong.first().copied(),
            _ => None,
        });
        let layout = config(WorkloadSpec::new(WorkloadKind::Sweep), accel).check().unwrap();
        let page = layout.index_of(Gpa(wrong.gpa)).unwrap();
        assert!(manager.tampered.lock().unwrap().contains(&page), "{wrong:?} lies on a page nobody changed");
        // Byte 100 of the page.
        assert_eq!(wrong.gpa % PAGE_SIZE as u64, 96);
        machine.stop(StopMode::Now);
        let report = machine.end().unwrap();
        assert!(report.summary.wrong_words > 0);
        manager.quit();
    }
}

#[test]
fn a_poisoned_page_ends_the_machine_with_its_address() {
    for accel in accels() {
        let (manager, machine) = tamper(accel, Honesty::Poisons);
        let config = config(WorkloadSpec::new(WorkloadKind::Sweep), accel);
        let report = machine.end().unwrap();
        let layout = config.check().unwrap();
        let died = report.died.expect("the guest should have died");
        let tampered = manager.tampered.lock().unwrap().clone();
        let named = tampered.iter().any(|page| died.contains(&format!("{},", layout.gpa_of(*page).unwrap())));
        assert!(named && died.contains("poisoned"), "{died}");
        // The thread of an in-process guest cannot be freed from the access.
        assert_eq!(report.abandoned, usize::from(accel == AccelChoice::InProcess));
        manager.quit();
    }
}

#[test]
fn a_guest_whose_manager_is_gone_stalls_and_reads_no_zeros() {
    for accel in accels() {
        let spec = WorkloadSpec { write_permille: 0, ..WorkloadSpec::new(WorkloadKind::Sweep) };
        let (manager, socket) = Manager::start(Honesty::Honest);
        let config = VmmConfig { management: Management::Managed, ..config(spec, accel) };
        let mut machine = Started::new(config, Some(socket));
        machine.until_running();
        manager.take.store(64, Ordering::SeqCst);
        while manager.taken.load(Ordering::SeqCst) == 0 {
            machine.until(|event| matches!(event, Event::Report(_)).then_some(()));
        }
        // From here on the guest meets pages whose bytes only the manager had.
        manager.quit();
        machine.until(|event| matches!(event, Event::ManagerLost).then_some(()));
        machine.stop(StopMode::Now);
        let report = machine.end().unwrap();
        assert_eq!((report.summary.wrong_words, report.manager), (0, ManagerEnd::Lost));
        assert_eq!(report.died, None);
        if accel == AccelChoice::Kvm {
            assert_eq!(report.abandoned, 0, "a signal should free a vCPU that waits for a page");
        }
    }
}

#[test]
fn a_manager_that_refuses_or_is_missing_is_an_error_in_one_sentence() {
    let config = VmmConfig {
        management: Management::Managed,
        ..config(WorkloadSpec::new(WorkloadKind::Idle), AccelChoice::Auto)
    };
    let start = |socket| Started::new(config.clone(), socket).end().unwrap_err();
    assert!(matches!(start(None), VmmError::NoManager));
    let (manager, machine) = plimsoll_sys::fdpass::seqpacket_pair().unwrap();
    let refusal = plimsoll_linux::uffd::wire::Welcome::Refused { reason: "no room".into() };
    plimsoll_sys::fdpass::send(&manager, &refusal.encode(), &[]).unwrap();
    let error = start(Some(machine));
    let source = std::error::Error::source(&error).map(ToString::to_string);
    assert_eq!(source.as_deref(), Some("the manager refused the machine: no room"));
    let (manager, machine) = plimsoll_sys::fdpass::seqpacket_pair().unwrap();
    drop(manager);
    assert!(matches!(start(Some(machine)), VmmError::Dropped));
}
