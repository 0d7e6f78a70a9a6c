//! The tools that see through both stages, on a machine of our own that a daemon keeps in less memory than it uses.
use super::daemon::{Directory, Machine, start};
use super::run::{Ended, Run, alone, can};
use plimsoll_guest::abi;
use serde_json::Value;
use std::fs;

const RAM: u64 = 96 << 20;
/// Half of it is below the hole that a PC has, and half above.
const HALF: u64 = 48 << 20;
const END: u64 = (304 << 20) + HALF;
const BLOCK: u64 = 2 << 20;

fn verb(words: &[&str]) -> Ended {
    Run::new(words).output()
}

/// Its lines, each an object.
fn lines(ended: &Ended) -> Vec<Value> {
    ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(bytes: &[u8], at: u64, len: usize) -> u64 {
    let at = usize::try_from(at).unwrap();
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The segments of a core file: type, place in the file, physical address, bytes in the file.
fn segments(core: &[u8]) -> Vec<[u64; 4]> {
    assert_eq!(&core[..6], b"\x7fELF\x02\x01");
    let (first, count) = (number(core, 32, 8), number(core, 56, 2));
    let one = |which: u64| {
        let at = first + which * 56;
        [number(core, at, 4), number(core, at + 8, 8), number(core, at + 24, 8), number(core, at + 32, 8)]
    };
    (0..count).map(one).collect()
}

#[test]
fn the_tools_look_through_both_stages_of_a_machine_under_a_daemon() {
    let _alone = alone();
    if !can("userfaultfd") || !can("root") || !can("kvm") {
        return;
    }
    let directory = Directory::new("inspect");
    let daemon = start(&directory);
    let mut machine = Machine::that_says_little(&directory, 80 << 20);
    machine.verifies(1000);
    let process = machine.process().to_string();
    let socket = machine.inspect.to_str().unwrap().to_owned();

    // All of it is mapped where it is, in large pages; nothing else is mapped.
    let gvas = [0x1000, abi::WORKLOAD_GPA + 0x1238, END - 8, HALF, 1 << 40].map(|gva| format!("{gva:#x}"));
    let asked = |name: &str| {
        let gvas = gvas.iter().map(String::as_str);
        let words = ["translate", name].into_iter().chain(gvas);
        verb(&words.chain(["--inspect", &socket, "--json"]).collect::<Vec<_>>())
    };
    for name in [&*process, "lonely"] {
        let answer = asked(name);
        answer.expect_code(1);
        let found = lines(&answer);
        for (line, gva) in found.iter().zip(&gvas).take(3) {
            assert_eq!(
                (&line["gpa"], &line["guest_page"]),
                (&Value::from(gva.as_str()), &BLOCK.into()),
                "{line}"
            );
            assert_eq!((&line["cr3"], &line["layout"]), (&"0x100000".into(), &"machine".into()), "{line}");
            assert!(line["host"]["hva"].is_string() && line["may"].is_array(), "{line}");
        }
        assert!(found[3..].iter().all(|line| line["fault"]["level"].is_u64() && line["host"].is_null()));
    }
    let said = verb(&["translate", "lonely", "0x600000", "--inspect", &socket]);
    assert!(said.expect_code(0).stdout.contains("RAM as it says itself"), "{}", said.stdout);
    let other = verb(&["translate", "somebody", "0", "--inspect", &socket]);
    assert!(other.expect_code(2).stderr.contains("is of lonely"), "{}", other.stderr);

    let maps = lines(verb(&["maps", "lonely", "--inspect", &socket, "--json"]).expect_code(0)).remove(0);
    let states = ["present_bytes", "zero_bytes", "swapped_bytes", "absent_bytes"];
    let states: u64 = states.iter().map(|state| maps["states"][state].as_u64().unwrap()).sum();
    assert_eq!((states, &maps["size"]), (RAM, &RAM.into()), "{maps}");
    // It uses more than the daemon lets it have.
    assert!(maps["states"]["absent_bytes"].as_u64().unwrap() > 16 << 20, "{maps}");

    let splinter = lines(verb(&["splinter", "lonely", "--inspect", &socket, "--json"]).expect_code(0));
    assert_eq!(splinter[0]["user"]["large"], RAM / BLOCK, "{}", splinter[0]);

    let audit = verb(&["audit", "--inspect", &socket, "--json"]);
    let audit = lines(audit.expect_code(0)).remove(0);
    assert_eq!(audit["machines"][0]["name"], "lonely", "{audit}");
    let twice = verb(&["audit", "--inspect", &socket, "--inspect", &socket]);
    assert!(twice.expect_code(2).stderr.contains("lonely is named twice"), "{}", twice.stderr);

    dumps(&directory, &socket, &process);
    // It went on, and all that was brought for the tools is what it had written.
    machine.verifies(1000);
    machine.finish();
    daemon.signal(rustix::process::Signal::TERM);
    daemon.wait().expect_code(0);
}

/// Core files of the machine, paused and running: its memory as it is, and registers.
fn dumps(directory: &Directory, socket: &str, process: &str) {
    for (kind, paused) in [("all", true), ("all", false), ("stacks", true), ("kernel", false)] {
        let path = directory.0.join(format!("{kind}-{paused}.core"));
        let mut words = vec!["dump", process, "--kind", kind, "--inspect", socket, "--json", "-o"];
        words.push(path.to_str().unwrap());
        words.extend(paused.then_some("--paused"));
        let ended = verb(&words);
        // Nothing of it is in the upper half of its addresses.
        ended.expect_code(if kind == "kernel" { 1 } else { 0 });
        let told = lines(&ended).remove(0);
        assert_eq!(told["paused_seconds"].is_f64(), paused, "{told}");
        let core = fs::read(&path).unwrap();
        fs::remove_file(path).unwrap();
        let segments = segments(&core);
        let [_, notes, ..] = *segments.iter().find(|[kind, ..]| *kind == 4).expect("there are notes");
        // NT_PRSTATUS of one processor behind its name: RIP behind sixteen registers, in the image.
        let status = notes + 12 + 8;
        let rip = number(&core, status + 112 + 16 * 8, 8);
        assert!((abi::IMAGE_GPA..abi::IMAGE_END).contains(&rip), "{rip:#x}");
        let loads = || segments.iter().filter(|[kind, ..]| *kind == 1);
        match kind {
            "all" => {
                assert_eq!(loads().map(|[.., bytes]| bytes).sum::<u64>(), RAM);
                let [_, place, ..] = *loads().find(|[_, _, gpa, _]| *gpa == 0).unwrap();
                assert_eq!(number(&core, place + abi::PARAMS_GPA, 8), abi::PARAMS_MAGIC);
                assert_eq!(number(&core, place + abi::PAGE_TABLES_GPA, 8), 0x10_1027);
            }
            "stacks" => {
                let stack = abi::stack_top(0) - abi::PAGE_SIZE;
                assert!(loads().any(|[_, _, gpa, bytes]| (*gpa..gpa + bytes).contains(&stack)));
            }
            _ => assert_eq!(loads().count(), 0),
        }
    }
}
