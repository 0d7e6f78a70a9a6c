//! Records of decisions: a record ends, and what is in it is decided again without harm.
use plimsoll_host::trace::{Basis, Reader, Record, Tick, VERSION, replay};
use plimsoll_policy::settings::{Face, MachineSettings, Settings, Shares};
use plimsoll_policy::tree::Tree;
use plimsoll_policy::view::{HostView, MachineView, Reading};
use plimsoll_policy::{PolicyState, Rung, Rungs, decide};
use plimsoll_types::{ByteCount, MachineId};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

/// A file of these bytes, and its path.
fn file(bytes: &[u8]) -> (File, PathBuf) {
    let mut file = File::from(memfd_create("record", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path.into())
}

/// Reads bytes as a file, and, because few that are changed at random can be unpacked, as what is in one.
pub(crate) fn read(bytes: &[u8]) -> bool {
    is_record(bytes, usize::MAX);
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    zstd::bulk::compress(bytes, 1).is_ok_and(|packed| is_record(&packed, lines))
}

/// Whether the file is one, from beginning to end. It has no more than `lines` lines.
fn is_record(bytes: &[u8], lines: usize) -> bool {
    let (_file, path) = file(bytes);
    let Ok(reader) = Reader::open(&path) else { return false };
    let (mut records, mut is_whole) = (0, true);
    for record in reader {
        match record {
            Ok(Record::Settings(_) | Record::Tick(_)) => records += 1,
            Err(_) => is_whole = false,
        }
    }
    assert!(records <= lines, "{records} records in {lines} lines");
    if let Ok(reader) = Reader::open(&path) {
        let replayed = replay(reader);
        assert!(replayed.identical <= records as u64);
    }
    is_whole
}

/// Two machines, the first of which takes more than it uses, and a few decisions about them.
fn decisions() -> String {
    let size = ByteCount::mib(1024);
    let settings = |id| {
        let face =
            Face::Guarantee { size, reservation: ByteCount::mib(128), limit: size, shares: Shares::NORMAL };
        MachineSettings::new(MachineId(id), face)
    };
    let machine = |id, consumed, active: i64| MachineView {
        active: Some(Reading { bytes: active << 20, age_ms: 0 }),
        rungs: Rungs::NONE.with(Rung::Compress),
        ..MachineView::new(MachineId(id), ByteCount::mib(consumed))
    };
    let total = ByteCount::mib(1536);
    let tree = Settings { machines: vec![settings(1), settings(2)], ..Settings::new(total) };
    let mut state = PolicyState::new(Tree::new(tree).unwrap());
    let names = vec![(MachineId(1), "web".to_owned()), (MachineId(2), "db".to_owned())];
    let basis = Basis { state: state.clone(), names, own: ByteCount(0) };
    let mut text = json!({ "settings": basis }).to_string() + "\n";
    for (second, consumed) in [1000, 900, 800].into_iter().enumerate() {
        let machines = vec![machine(1, consumed, 100), machine(2, 500, 450)];
        let view = HostView::of(second as u64 * 1000, total, ByteCount::mib(consumed + 500), machines);
        let plan = decide(&view, &mut state);
        let tick = Tick { view, plan, outcomes: Vec::new(), overheads: Vec::new() };
        text += &(json!({ "tick": tick }).to_string() + "\n");
    }
    text
}

pub(crate) fn examples() -> Vec<Vec<u8>> {
    let begin = format!("{{\"begin\":{{\"version\":{VERSION},\"by\":\"plimsoll\"}}}}\n");
    vec![begin.clone().into_bytes(), (begin + &decisions()).into_bytes()]
}
