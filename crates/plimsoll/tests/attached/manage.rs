//! Two machines under one settings file, and what the record of it says.
use crate::manager::{Manager, STOCK, alone, ask, bytes, can, swap, sweep};
use plimsoll_stock::{Command, Guest, Options};
use plimsoll_types::ByteCount;
use serde_json::Value;
use std::process::Output;

const MEMORY: ByteCount = ByteCount::mib(256);
const RESERVED: ByteCount = ByteCount::mib(96);

fn consumed(turn: &Value) -> ByteCount {
    turn["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|machine| ByteCount(bytes(machine, "consumed_bytes")))
        .sum()
}

fn of<'a>(turn: &'a Value, name: &str) -> &'a Value {
    let machines = turn["machines"].as_array().unwrap();
    machines.iter().find(|machine| machine["name"] == name).unwrap()
}

fn plimsoll(words: &[&str]) -> Output {
    std::process::Command::new(env!("CARGO_BIN_EXE_plimsoll")).args(words).output().unwrap()
}

fn said(words: &[&str]) -> String {
    let output = plimsoll(words);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn two_machines_come_within_the_memory_of_one_host_and_the_record_tells_why() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(1024));
    let (mut idle, mut busy) = (
        Guest::start(Options::new(ByteCount::mib(320))).unwrap(),
        Guest::start(Options::new(ByteCount::mib(320))).unwrap(),
    );
    for guest in [&mut idle, &mut busy] {
        ask(guest, Command::Alloc { pages: 30_000 });
    }
    ask(&mut busy, Command::Hot { pages: 8000, per_second: 2000 });
    let names = [&idle, &busy].map(|guest| format!("qemu-{}", guest.process().get()));
    let folder = tempfile::tempdir().unwrap();
    let (config, trace) = (folder.path().join("host.toml"), folder.path().join("trace"));
    let text = format!(
        "[host]\nmemory = \"256M\"\n[machine.{}]\nlimit = \"320M\"\n[machine.{}]\nreservation = \"96M\"\n",
        names[0], names[1]
    );
    std::fs::write(&config, text).unwrap();
    let (config, trace) = (config.to_str().unwrap(), trace.to_str().unwrap());
    let mut manager = Manager::run("manage", &["--config", config, &format!("--record={trace}")]);
    let first = manager.until("both to be managed", |line| {
        line["event"] == "turn" && line["machines"].as_array().unwrap().len() == 2
    });
    assert!(consumed(&first) > MEMORY, "there is nothing to do: {}", consumed(&first));
    let mut violations = 0;
    let last = manager.until("the host to have some memory free", |line| {
        let is_turn = line["event"] == "turn";
        if is_turn && ByteCount(bytes(of(line, &names[1]), "consumed_bytes")) < RESERVED {
            violations += 1;
        }
        is_turn && consumed(line) < MEMORY && (line["state"] == "soft" || line["state"] == "clear")
    });
    println!("took up {} at first, {} after {} ms", consumed(&first), consumed(&last), bytes(&last, "at_ms"));
    assert_eq!(violations, 0, "below its reservation");
    manager.interrupt();
    sweep(&mut idle);
    sweep(&mut busy);

    let replayed = said(&["replay", trace]);
    assert!(replayed.ends_with("decisions came out as recorded\n"), "{replayed}");
    let why = said(&["why", &names[0], "--trace", trace]);
    assert!(why.contains("it is taken from by compressing pages"), "{why}");
    let line = said(&["line", "--trace", trace]);
    assert!(line.contains("2 machines own") && line.contains("more may safely be reserved"), "{line}");
    let advice = said(&["advise", "--trace", trace]);
    println!("{why}\n{line}\n{advice}");
    for text in [why, line, advice] {
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
    let refused = plimsoll(&["why", "nobody", "--trace", trace]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains(&names[1]), "it names those it knows");
}
