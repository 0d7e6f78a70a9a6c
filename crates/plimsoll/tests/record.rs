//! A record has two readers, one that decides again and one that simulates: both read what the recorder writes.
use plimsoll_host::backend::{Done, Refused};
use plimsoll_host::control::Outcome;
use plimsoll_host::trace::{Basis, Reader, Recorder, Tick, replay};
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{GuestStatistics, HostView, MachineView, Reading};
use plimsoll_policy::{PolicyState, Ppm, Rung, Rungs, decide};
use plimsoll_types::{ByteCount, MachineId, PageCount};

const MIB: fn(u64) -> ByteCount = ByteCount::mib;

#[test]
fn what_the_recorder_writes_is_decided_again_and_simulated() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace");
    let mut recorder = Recorder::create(&path).unwrap();
    let mut settings = Settings::new(MIB(1024));
    for id in [1, 2] {
        let (size, reservation) = (MIB(1024), MIB(128));
        let face = Face::Guarantee { size, reservation, limit: size, shares: Shares::NORMAL };
        settings.machines.push(MachineSettings::new(MachineId(id), face));
    }
    let mut state = PolicyState::new(Tree::new(settings).unwrap());
    let names = vec![(MachineId(1), "web".to_owned()), (MachineId(2), "database".to_owned())];
    recorder.settings(&Basis { state: state.clone(), names, own: MIB(64) }).unwrap();
    for now_ms in [1000, 2000] {
        // Whatever a view can say is said, so that neither reader can stumble over a part only real machines have.
        let machine = |id| MachineView {
            stored: MIB(32),
            active: Some(Reading { bytes: 200 << 20, age_ms: 7 }),
            guest: Some(GuestStatistics { total: 1 << 30, free: 300 << 20, age_ms: 900 }),
            taken: PageCount(10),
            returned: PageCount(5),
            stalled: Ppm(300),
            balloon: Some(MIB(64)),
            rungs: Rungs::NONE.with(Rung::Compress).with(Rung::Balloon),
            ..MachineView::new(MachineId(id), MIB(480))
        };
        let view = HostView::of(now_ms, MIB(1024), MIB(984), vec![machine(1), machine(2)]);
        let plan = decide(&view, &mut state);
        let refused = |action: &plimsoll_policy::Action| Outcome {
            machine: action.machine,
            step: action.step,
            done: Done::Refused(Refused::Short("no swap".to_owned())),
        };
        let outcomes = plan.actions.iter().map(refused).collect();
        recorder.tick(&Tick { view, plan, outcomes, overheads: Vec::new() }).unwrap();
    }
    recorder.finish().unwrap();

    let replayed = replay(Reader::open(&path).unwrap());
    assert!(replayed.identical == 2 && replayed.difference.is_none(), "{replayed:?}");

    let comparison = plimsoll_sim::trace::Record::read(&path).unwrap().compare();
    let read: Vec<_> = comparison.machines.iter().map(|one| (&*one.machine, one.decisions)).collect();
    assert_eq!(read, [("web", 2), ("database", 2)]);
    for machine in &comparison.machines {
        assert_eq!((machine.consumed.recorded, machine.stall.recorded), (MIB(480).0, 300), "{comparison}");
    }
}

/// Recorded before losses were measured, of two Debians under QEMU: where none is known, price alone decides as it did.
#[test]
fn a_record_of_version_1_is_decided_as_it_was() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/two-guests.zst");
    let replayed = replay(Reader::open(&path).unwrap());
    assert!(replayed.identical == 91 && replayed.difference.is_none(), "{replayed:?}");
}
