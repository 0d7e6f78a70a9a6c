//! `virsh`: a stand-in that does as its domain's name says, and the real one with libvirt's own test driver.
use plimsoll_attach::control::{Balloon, Control, ControlError, Feature, Libvirt, Qmp, RunState, Virsh};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(180);
const STAND_IN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qmp/virsh");

fn domain(name: &str, patience: Duration) -> Virsh {
    Virsh::new(name, patience).with_program(STAND_IN)
}

#[test]
fn commands_reach_the_monitor_whole_and_answers_come_back() {
    let mut virsh = domain("web 1", PATIENCE).with_connection("qemu:///session");
    let arguments = json!({ "path": "/machine/peripheral/it's", "property": "\"quoted\" $HOME `id`" });
    let expected = json!({ "execute": "qom-get", "arguments": arguments.clone() });
    assert_eq!(virsh.execute("qom-get", arguments).unwrap(), expected);
    assert_eq!(virsh.execute("query-balloon", Value::Null).unwrap(), json!({ "execute": "query-balloon" }));
    assert!(matches!(virsh.events(), Err(ControlError::Unsupported { .. })));
}

#[test]
fn what_goes_wrong_is_told_apart() {
    let failed = |name: &str| domain(name, PATIENCE).execute("query-balloon", Value::Null).unwrap_err();
    let error = failed("away");
    assert!(matches!(error, ControlError::Unreachable { .. }), "{error}");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("libvirt-sock"));
    let error = failed("refused");
    assert!(
        error.to_string().contains("refused virsh qemu-monitor-command: error: this function is not"),
        "{error}"
    );
    let error = failed("full");
    assert!(error.to_string().ends_with("refused query-balloon: no free slots available"), "{error}");
    for name in ["nonsense", "loud"] {
        let error = failed(name);
        assert!(matches!(error, ControlError::Garbage { .. }) && error.to_string().len() < 1000, "{error}");
    }
    let mut missing = Virsh::new("x", PATIENCE).with_program("/nowhere/virsh");
    let error = missing.execute("query-balloon", Value::Null).unwrap_err();
    assert!(matches!(error, ControlError::Unreachable { .. }), "{error}");
}

#[test]
fn a_virsh_that_hangs_is_ended_at_its_deadline() {
    let start = Instant::now();
    let error =
        domain("stuck", Duration::from_millis(100)).execute("query-balloon", Value::Null).unwrap_err();
    assert!(matches!(error, ControlError::Stalled { .. }), "{error}");
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn without_the_monitor_there_are_balloon_statistics_and_pause() {
    let mut libvirt = Libvirt::new(domain("web1", PATIENCE));
    let found = libvirt.probe().unwrap();
    assert_eq!(found.balloon.unwrap().granularity, ByteCount(1024));
    assert_eq!(found.features, [Feature::Statistics, Feature::Pause].into());
    libvirt.set_balloon(ByteCount(ByteCount::mib(512).0 + 1023)).unwrap();
    let (memory, target) = (ByteCount::mib(1024), Some(ByteCount::mib(512)));
    assert_eq!(libvirt.balloon().unwrap(), Balloon { memory, target, actual: Some(ByteCount::mib(256)) });
    let said = libvirt.statistics().unwrap();
    assert_eq!(
        (said.available, said.total),
        (Some(ByteCount(400_000 << 10)), Some(ByteCount(700_000 << 10)))
    );
    assert_eq!((said.swapped_in, said.major_faults, said.caches), (Some(ByteCount(16 << 10)), Some(9), None));
    assert!(said.age.is_some_and(|age| age > Duration::from_secs(1_000_000)));
    assert_eq!(libvirt.statistics_interval().unwrap(), Duration::from_secs(5));
    libvirt.poll_statistics(Duration::from_secs(2)).unwrap();
    assert_eq!(libvirt.run_state().unwrap(), RunState::Paused);
    libvirt.resume().unwrap();
    libvirt.pause().unwrap();
    assert!(matches!(libvirt.hot_memory(), Err(ControlError::Unsupported { .. })));
    let error = libvirt.set_balloon(ByteCount::mib(1024)).unwrap_err();
    assert!(matches!(error, ControlError::OutOfRange { .. }), "{error}");
    assert_eq!(Libvirt::new(domain("nonsense", PATIENCE)).statistics_interval().unwrap(), Duration::ZERO);
    let error = Libvirt::new(domain("nonsense", PATIENCE)).balloon().unwrap_err();
    assert!(matches!(error, ControlError::Garbage { .. }), "{error}");
}

/// libvirt's test driver keeps an invented domain inside virsh itself, so it needs no daemon.
#[test]
fn the_real_virsh_is_understood() {
    let virsh = Virsh::new("test", PATIENCE).with_connection("test:///default");
    let mut libvirt = Libvirt::new(virsh.clone());
    let found = match libvirt.probe() {
        Err(error @ ControlError::Unreachable { .. }) => {
            let required = std::env::var("PLIMSOLL_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|name| name == "libvirt"), "{error}");
            return println!("SKIPPED: no virsh in PATH");
        }
        found => found.unwrap(),
    };
    assert!(found.balloon.is_some() && found.has(Feature::Statistics));
    let balloon = libvirt.balloon().unwrap();
    assert_eq!((balloon.memory, balloon.actual), (ByteCount::mib(8192), Some(ByteCount::mib(6144))));
    assert_eq!(libvirt.statistics().unwrap().available, Some(ByteCount::mib(1024)));
    assert_eq!(libvirt.run_state().unwrap(), RunState::Running);
    libvirt.set_balloon(ByteCount::mib(7168)).unwrap();
    libvirt.pause().unwrap();
    let error = virsh.clone().execute("query-balloon", Value::Null).unwrap_err();
    assert!(matches!(error, ControlError::Refused { .. }), "{error}");
    let error = Libvirt::new(Virsh::new("--nobody", PATIENCE).with_connection("test:///default")).pause();
    assert!(error.unwrap_err().to_string().contains("'--nobody'"));
}
