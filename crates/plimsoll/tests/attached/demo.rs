//! `plimsoll demo --linux`, small.
use crate::manager::{Manager, STOCK, alone, can};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[test]
fn the_demo_with_stock_guests_passes_and_leaves_nothing() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report.json");
    let swaps = || std::fs::read_to_string("/proc/swaps").unwrap().lines().count();
    let before = swaps();
    let words = [
        "demo",
        "--linux",
        "--guests",
        "2",
        "--size",
        "192M",
        "--budget",
        "220M",
        "--seconds",
        "20",
        "--json",
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_plimsoll"));
    let mut demo =
        command.args(words).arg(&report).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut text = String::new();
    let mut lines = BufReader::new(demo.stdout.take().unwrap()).lines();
    let mut until = |part: &str| loop {
        let line = lines.next().unwrap_or_else(|| panic!("it ended before it said {part:?}")).unwrap();
        text.push_str(&line);
        if line.contains(part) {
            return line;
        }
    };
    // Its machines are its own meanwhile.
    let booted = until("linux1 booted");
    let process = booted.rsplit("pid ").next().unwrap();
    let (status, _, said) = Manager::attach(&[process]).end();
    assert_eq!(status.code(), Some(2), "{said}");
    assert!(said.contains("is attached already"), "{said}");
    until("wrong words");
    lines.map_while(Result::ok).for_each(|line| text.push_str(&line));
    let output = demo.wait_with_output().unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("0 wrong words"), "{text}");
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report).unwrap()).unwrap();
    assert_eq!((&report["wrong_words"], report["guests"].as_array().unwrap().len()), (&0.into(), 2));
    let guests = report["guests"].as_array().unwrap();
    assert!(guests.iter().all(|guest| guest["operations"].as_u64().unwrap() > 100), "{report}");
    // From whom is the choice of the herd.
    assert!(
        guests.iter().map(|guest| guest["taken_pages"].as_u64().unwrap()).sum::<u64>() > 1000,
        "{report}"
    );
    assert!(report["taken_bytes"].as_u64() <= report["budget_bytes"].as_u64().map(|budget| budget / 20 * 21));
    assert_eq!(swaps(), before, "swap is left");
}
