//! Agents that break the protocol, beside a machine that does not.
use crate::fleet::{self, Fleet, Guest, PLENTY, machine, start, until, zipf};
use crate::impostor::{self, Conduct};
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::host::Incident;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_types::{ByteCount, MachineId};
use std::os::unix::net::UnixStream;
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An impostor, killed and reaped on drop. Its standard input closes with it.
struct Impostor {
    id: MachineId,
    child: Child,
    _control: UnixStream,
}

impl Impostor {
    /// Starts one whose memory is all in place, and asks it for pages.
    fn provoke(fleet: &mut Fleet, conduct: Conduct) -> Self {
        let (mut child, control, socket) = start(impostor::ROLE, &conduct.name());
        let id = fleet.admit(socket, &mut child).unwrap();
        let it = Self { id, child, _control: control };
        until("the impostor to fill its memory", || {
            (fleet.view(id).stats.census.in_ram().bytes() == impostor::RAM).then_some(())
        });
        fleet.squeeze(id);
        it
    }

    fn kill(&mut self) {
        // Once more does no harm.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn honest(fleet: &mut Fleet) -> Guest {
    let guest = fleet.add(&machine("honest", 32, WorkloadSpec { ops_per_second: 2000, ..zipf() }));
    guest.until_running();
    // What a pager opens only when it takes pages is open from now on, so that descriptors can be counted.
    fleet.squeeze_until(guest.id, "the honest machine's first pages to be taken", || {
        fleet.stored(guest.id) > 0
    });
    guest
}

/// The one incident that `machine` is lost, and why.
fn lost(fleet: &Fleet, machine: MachineId) -> String {
    let incidents =
        until(&format!("{machine} to be lost"), || Some(fleet.incidents()).filter(|list| !list.is_empty()));
    match &incidents[..] {
        [Incident::Lost { machine: found, cause }] if *found == machine => cause.clone(),
        _ => panic!("{incidents:?}"),
    }
}

/// Ends it and insists that nothing of it is left.
fn bury(fleet: &mut Fleet, mut impostor: Impostor, before: &(Vec<String>, usize)) {
    impostor.kill();
    fleet.until_gone(impostor.id);
    fleet.manager().forget(impostor.id);
    drop(impostor);
    assert_eq!((fleet::descriptors(), fleet::word_mappings()), *before, "descriptors, word mappings");
}

pub(crate) fn breaks_the_protocol() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut other = honest(&mut fleet);
    let first = (fleet::descriptors(), fleet::word_mappings());
    // The manager waits half a minute for it; meanwhile the others have their turn.
    let silent = Impostor::provoke(&mut fleet, Conduct::Silent);
    let before = (fleet::descriptors(), fleet::word_mappings());
    for (conduct, cause) in [
        (Conduct::Nonsense, "announces 2779096485 items"),
        (Conduct::OneByte, "has 1 bytes where 24 were expected"),
        (Conduct::UnknownOp, "operation 99 is not known"),
        (Conduct::UnknownStop, "stop reason 77 is not known"),
        (Conduct::Overdone, "pages done of an item of"),
        (Conduct::Unexplained, "pages done of an item of"),
        (Conduct::TellsOfNone, "pages done of an item of"),
        (Conduct::OutOfStep, "the reply is to request"),
        (Conduct::LaterEpoch, "the reply is to request"),
        (Conduct::Short, "where 1 were expected"),
        (Conduct::TooMany, "announces 4294967295 items"),
        (Conduct::Occupied, "Exists"),
    ] {
        let impostor = Impostor::provoke(&mut fleet, conduct);
        let found = lost(&fleet, impostor.id);
        println!("{conduct:?}: {found}");
        assert!(found.contains(cause), "{conduct:?}: {found}");
        // As long as it lives, what it holds is charged.
        assert!(
            fleet.see().host().ledger(|ledger| ledger.usage(impostor.id)).unwrap().total() >= impostor::RAM
        );
        other.goes_on();
        bury(&mut fleet, impostor, &before);
    }
    let found = lost(&fleet, silent.id);
    assert!(found.contains("did not answer within 30 s"), "{found}");
    println!("Silent: {found}");
    bury(&mut fleet, silent, &first);
    other.goes_on();
    other.finish();
    assert_eq!(fleet.incidents(), []);
}

pub(crate) fn closes_and_lives() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut other = honest(&mut fleet);
    let before = (fleet::descriptors(), fleet::word_mappings());
    let impostor = Impostor::provoke(&mut fleet, Conduct::Closes);
    // Its process lives and its memory is in use, whatever its socket says.
    let incidents = until("the manager to say or do something about the closed socket", || {
        let incidents = fleet.incidents();
        (!incidents.is_empty() || fleet.see().is_gone(impostor.id)).then_some(incidents)
    });
    println!("{incidents:?}");
    assert!(
        matches!(&incidents[..], [Incident::Lost { machine, .. }] if *machine == impostor.id),
        "a live VMM has closed its socket and the operator was told {incidents:?}"
    );
    assert!(!fleet.see().is_gone(impostor.id), "a live VMM counts as ended");
    let charged = fleet.see().host().ledger(|ledger| ledger.usage(impostor.id)).unwrap();
    assert!(charged.total() >= ByteCount::mib(4), "{charged:?}");
    other.goes_on();
    bury(&mut fleet, impostor, &before);
    other.finish();
}

pub(crate) fn lies() {
    const PATIENCE: Duration = Duration::from_secs(60);
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut other = honest(&mut fleet);
    let before = (fleet::descriptors(), fleet::word_mappings());
    // Its pages are not in the airlock, where the pager now reads them. That may take until the liar ends, no longer.
    let mut liar = Impostor::provoke(&mut fleet, Conduct::Lies);
    fleet.squeeze_until(other.id, "the honest machine's pages to be taken", || fleet.stored(other.id) > 500);
    other.goes_on();
    liar.kill();
    let killed = Instant::now();
    while !fleet.see().is_gone(liar.id) && killed.elapsed() < PATIENCE {
        std::thread::sleep(fleet::LOOK_EVERY);
    }
    if !fleet.see().is_gone(liar.id) {
        // To stop the manager would wait for the pager that never ends.
        std::mem::forget(fleet);
        panic!("the pager of a VMM that lied still waits, {PATIENCE:?} after the VMM was killed");
    }
    bury(&mut fleet, liar, &before);
    other.finish();
}
