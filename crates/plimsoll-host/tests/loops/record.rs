//! Records: what was decided is decided again, and what is not a whole record is said to be none.
use super::fake::Host;
use plimsoll_host::advise::{Report, advise};
use plimsoll_host::backend::Trouble;
use plimsoll_host::line::Line;
use plimsoll_host::trace::{Basis, Reader, Record, Recorder, Tick, TraceError, replay};
use plimsoll_policy::costs::Cost;
use plimsoll_policy::{Ppm, Reason, Rung};
use plimsoll_types::ByteCount;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Thirty decisions about two machines, the second of which goes after twenty.
fn recorded(folder: &Path) -> PathBuf {
    let path = folder.join("trace");
    let mut host = Host::new(1536, &[(1024, 128, 900, 100), (1024, 128, 300, 1000)]);
    host.control.record(Recorder::create(&path).unwrap());
    (0..20).for_each(|_| drop(host.turn()));
    host.set(1, |body| body.trouble = Some(Trouble::Gone("it ended".to_owned())));
    (0..10).for_each(|_| drop(host.turn()));
    host.control.finish().unwrap();
    path
}

fn read(path: &Path) -> (Basis, Vec<Tick>) {
    let (mut basis, mut ticks) = (None, Vec::new());
    for record in Reader::open(path).unwrap() {
        match record.unwrap() {
            Record::Settings(last) => basis = Some(*last),
            Record::Tick(tick) => ticks.push(*tick),
        }
    }
    (basis.unwrap(), ticks)
}

#[test]
fn a_record_replays_through_machines_that_come_and_go() {
    let folder = folder();
    let replayed = replay(Reader::open(&recorded(folder.path())).unwrap());
    assert_eq!(replayed.identical, 30);
    assert!(replayed.difference.is_none() && replayed.damage.is_none(), "{replayed:?}");
}

/// Takes what `cargo xtask bench cost` measures out of all costs below, as they were before it was.
fn without_losses(value: &mut Value) {
    match value {
        Value::Object(members) => {
            for cost in members.get_mut("costs").and_then(Value::as_array_mut).into_iter().flatten() {
                cost.as_object_mut().unwrap().retain(|key, _| key != "busy" && key != "idle");
            }
            members.values_mut().for_each(without_losses);
        }
        Value::Array(values) => values.iter_mut().for_each(without_losses),
        _ => {}
    }
}

#[test]
fn a_record_of_version_1_replays() {
    let folder = folder();
    let path = recorded(folder.path());
    let text = zstd::decode_all(&*fs::read(&path).unwrap()).unwrap();
    let mut lines: Vec<Value> =
        text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
    lines[0]["begin"]["version"] = 1.into();
    lines.iter_mut().for_each(without_losses);
    let older: String = lines.iter().map(|line| format!("{line}\n")).collect();
    assert!(!older.contains("busy"), "{older}");
    fs::write(&path, zstd_of(&older)).unwrap();
    let replayed = replay(Reader::open(&path).unwrap());
    assert_eq!(replayed.identical, 30, "{replayed:?}");
    assert!(replayed.difference.is_none() && replayed.damage.is_none(), "{replayed:?}");
}

/// Whatever is built in by then.
#[test]
fn a_record_replays_by_the_costs_it_was_made_with() {
    let folder = folder();
    let path = folder.path().join("trace");
    let mut host = Host::new(1536, &[(1024, 128, 900, 100), (1024, 128, 300, 1000)]);
    let mut settings = host.control.tree().settings().clone();
    settings.costs.0[Rung::Compress as usize] = Cost::new(40_000, 90_000, Ppm::percent(20));
    host.control.settle(settings.clone()).unwrap();
    host.control.record(Recorder::create(&path).unwrap());
    (0..20).for_each(|_| drop(host.turn()));
    host.control.finish().unwrap();
    let (basis, ticks) = read(&path);
    assert_eq!(basis.state.tree().settings().costs, settings.costs);
    let priced = |reason: &Reason| matches!(reason, Reason::Taken { price_ns, .. } if *price_ns >= 50_000);
    assert!(ticks.iter().flat_map(|tick| &tick.plan.actions).any(|action| priced(&action.reason)));
    let replayed = replay(Reader::open(&path).unwrap());
    assert_eq!((replayed.identical, replayed.difference.is_none()), (20, true));
}

#[test]
fn a_view_that_was_changed_afterwards_shows_as_the_first_difference() {
    let folder = folder();
    let path = recorded(folder.path());
    let records: Vec<Record> = Reader::open(&path).unwrap().map(Result::unwrap).collect();
    let mut recorder = Recorder::create(&path).unwrap();
    let mut number = 0;
    for record in records {
        match record {
            Record::Settings(basis) => recorder.settings(&basis).unwrap(),
            Record::Tick(mut tick) => {
                number += 1;
                if number == 7 {
                    tick.view.machines[1].consumed += ByteCount::mib(64);
                }
                recorder.tick(&tick).unwrap();
            }
        }
    }
    recorder.finish().unwrap();
    let replayed = replay(Reader::open(&path).unwrap());
    let difference = replayed.difference.unwrap();
    assert_eq!((replayed.identical, difference.tick, difference.at_ms), (6, 7, 7000));
    assert!(difference.recorded != difference.decided, "{difference:?}");
}

#[test]
fn a_record_whose_recorder_was_killed_can_be_read_up_to_there() {
    let folder = folder();
    let path = recorded(folder.path());
    let whole = fs::read(&path).unwrap();
    let mut seen = Vec::new();
    for part in [4, 3, 2] {
        fs::write(&path, &whole[..whole.len() * (part - 1) / part]).unwrap();
        let replayed = replay(Reader::open(&path).unwrap());
        assert!(replayed.difference.is_none());
        match replayed.damage {
            Some(TraceError::Truncated { ticks, .. }) => assert_eq!(ticks, replayed.identical),
            other => panic!("{other:?}"),
        }
        seen.push(replayed.identical);
    }
    assert!(seen[0] >= seen[1] && seen[1] >= seen[2] && seen[0] > 0, "{seen:?}");
    // It was flushed, and never ended: what a kill leaves.
    let mut host = Host::new(1536, &[(1024, 128, 900, 100)]);
    host.control.record(Recorder::create(&path).unwrap());
    (0..5).for_each(|_| drop(host.turn()));
    let replayed = replay(Reader::open(&path).unwrap());
    assert!(matches!(replayed.damage, Some(TraceError::Truncated { ticks: 5, .. })), "{replayed:?}");
    let text = replayed.damage.unwrap().to_string();
    assert!(text.contains("cut off after 5 whole decisions"), "{text}");
}

#[test]
fn damage_foreign_files_and_newer_records_get_one_sentence_each() {
    let folder = folder();
    let path = recorded(folder.path());
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 40].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let damage = match Reader::open(&path) {
        Ok(reader) => replay(reader).damage.unwrap(),
        Err(error) => error,
    };
    assert!(matches!(damage, TraceError::Corrupt { .. }), "{damage:?}");
    assert!(damage.to_string().ends_with("use a copy that is not"), "{damage}");
    for foreign in [&b"hello\n"[..], b"", &zstd_of("{\"hello\": 1}\n"), &zstd_of("")] {
        fs::write(&path, foreign).unwrap();
        let text = Reader::open(&path).unwrap_err().to_string();
        assert!(text.contains("is no record of decisions"), "{text}");
    }
    fs::write(&path, zstd_of("{\"begin\":{\"version\":3,\"by\":\"plimsoll 9\",\"more\":1}}\n")).unwrap();
    let text = Reader::open(&path).unwrap_err().to_string();
    assert!(
        text.ends_with("is a record of version 3, and this plimsoll reads up to 2: use a newer one"),
        "{text}"
    );
    let text = Reader::open("/no/such/trace".as_ref()).unwrap_err().to_string();
    assert_eq!(text, "the record \"/no/such/trace\" cannot be used");
}

fn zstd_of(text: &str) -> Vec<u8> {
    zstd::encode_all(text.as_bytes(), 1).unwrap()
}

#[test]
fn the_line_says_what_is_promised_and_what_breaks_first() {
    let folder = folder();
    let (basis, ticks) = read(&recorded(folder.path()));
    let line = Line::of(ticks.last().unwrap(), &basis);
    assert_eq!((line.machines, line.reserved, line.owned), (1, ByteCount::mib(128), ByteCount::mib(1024)));
    assert_eq!(line.saved + line.consumed, line.owned);
    assert!(line.breaks.is_sorted() && line.breaks.len() == 3, "{line:?}");
    assert!(line.to_string().lines().all(|line| line.chars().count() <= 100), "{line}");
}

#[test]
fn advice_gives_the_idle_machine_less_and_is_checked_on_the_same_demand() {
    let folder = folder();
    let path = folder.path().join("trace");
    let mut host = Host::new(4096, &[(2048, 1024, 300, 200), (1024, 128, 900, 800)]);
    host.control.record(Recorder::create(&path).unwrap());
    (0..600).for_each(|_| drop(host.turn()));
    host.control.finish().unwrap();
    let report = advise(Reader::open(&path).unwrap()).unwrap();
    let [idle, busy] = &report.machines[..] else { panic!("{report:?}") };
    assert_eq!(idle.used.high, ByteCount::mib(200));
    assert_eq!((idle.advised.low, idle.advised.high), (ByteCount::mib(208), ByteCount::mib(240)));
    assert_eq!(busy.advised.low, ByteCount::mib(800));
    assert!(report.limits.1 < report.limits.0);
    assert_eq!(report.after.as_ref().unwrap().violations, 0);
    // Ten minutes: 1 - 0.99^10.
    assert_eq!(idle.certainty.0 / 10_000, 9, "{:?}", idle.certainty);
    assert!(report.to_string().lines().all(|line| line.chars().count() <= 100), "{report}");
}

/// What is advised where a machine needs five times as much in one second of two hundred.
fn advised_on_rare_need(mut host: Host) -> Report {
    let folder = folder();
    let path = folder.path().join("trace");
    host.control.record(Recorder::create(&path).unwrap());
    for second in 0..600 {
        let uses = if second % 200 == 199 { 1000 } else { 200 };
        host.set(0, |body| body.active = uses << 20);
        host.turn();
    }
    host.control.finish().unwrap();
    advise(Reader::open(&path).unwrap()).unwrap()
}

/// A limit that leaves that out costs the machine, and it shows.
#[test]
fn advice_that_would_have_made_a_machine_wait_is_seen_to_on_the_same_demand() {
    let report = advised_on_rare_need(Host::new(4096, &[(2048, 128, 300, 200)]));
    assert_eq!(report.machines[0].advised.high, ByteCount::mib(240));
    let after = report.after.unwrap();
    assert!(after.stalled > report.before.stalled, "{after:?} after {:?}", report.before);
}

#[test]
fn what_advice_has_machines_wait_is_by_the_costs_on_record() {
    let stalled = |back_ns| {
        let mut host = Host::new(4096, &[(2048, 128, 300, 200)]);
        let mut settings = host.control.tree().settings().clone();
        settings.costs.0[Rung::Compress as usize].back_ns = back_ns;
        host.control.settle(settings).unwrap();
        advised_on_rare_need(host).after.unwrap().stalled
    };
    assert_eq!(stalled(0), Ppm::ZERO);
    assert!(stalled(11_000) > Ppm::ZERO);
}

#[test]
fn advice_that_the_host_has_no_room_for_is_said_to_be_such() {
    let folder = folder();
    let path = folder.path().join("trace");
    let mut host = Host::new(1536, &[(1024, 128, 600, 900), (1024, 128, 600, 900)]);
    host.control.record(Recorder::create(&path).unwrap());
    (0..60).for_each(|_| drop(host.turn()));
    host.control.finish().unwrap();
    let report = advise(Reader::open(&path).unwrap()).unwrap();
    let why = report.after.as_ref().unwrap_err();
    assert_eq!(*why, "the host has 1.5G for machines, but 1.7G is reserved: lower a reservation");
    assert!(
        report.to_string().ends_with(&format!("the advice cannot be followed as a whole: {why}\n")),
        "{report}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_happens_a_record_replays(
        total in 512_u64..4096,
        machines in vec((64_u64..2048, 0_u64..64, 0_u64..2048, 0_u64..2048), 1..6),
        moments in vec((0_u64..5000, any::<prop::sample::Index>(), any::<i64>(), 0_u64..4096), 1..40),
    ) {
        let folder = folder();
        let path = folder.path().join("trace");
        let machines: Vec<_> = machines.into_iter().map(|(size, kept, has, uses)| (size, kept.min(size), has.min(size), uses)).collect();
        let mut host = Host::new(total + 1024, &machines);
        host.control.record(Recorder::create(&path).unwrap());
        for (pause, which, active, consumed) in &moments {
            let place = which.index(machines.len());
            host.set(place, |body| (body.active, body.consumed) = (*active, ByteCount::mib(*consumed)));
            host.now += Duration::from_millis(*pause);
            host.control.turn(host.now);
        }
        host.control.finish().unwrap();
        let replayed = replay(Reader::open(&path).unwrap());
        prop_assert_eq!(replayed.identical, moments.len() as u64);
        prop_assert!(replayed.difference.is_none() && replayed.damage.is_none());
    }
}
