//! The tools that see through both stages, on a machine of our own that a daemon keeps in less memory than it uses.
use super::daemon::{Directory, Machine, start, stored_by_all};
use super::run::{Ended, GOING, Run, alone, can, wait_until};
use plimsoll_guest::abi;
use plimsoll_host::api::Table;
use plimsoll_host::api::client::Client;
use plimsoll_inspect::PageStates;
use plimsoll_vmm::control::Command;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

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

    wait_until("a part of it is stored", || stored_by_all(&directory) > 16 << 20);
    every_page_has_the_state_that_is_counted(&directory, &machine.inspect, &process);
    dumps(&directory, &socket, &process);
    tables_that_nobody_has(&directory, &socket);
    // It went on, and all that was brought for the tools is what it had written.
    machine.verifies(1000);
    machine.finish();
    daemon.signal(rustix::process::Signal::TERM);
    daemon.wait().expect_code(0);
}

/// While the guest stands still and its pagers have come to rest, the pages that the daemon shows add up to what it says of the machine.
fn every_page_has_the_state_that_is_counted(directory: &Directory, socket: &Path, process: &str) {
    let mut held = UnixStream::connect(socket).unwrap();
    held.set_read_timeout(Some(GOING)).unwrap();
    let mut hears = BufReader::new(held.try_clone().unwrap()).lines();
    writeln!(held, "{}", serde_json::to_string(&Command::Hold).unwrap()).unwrap();
    let is_held = hears.any(|line| line.expect("the machine says nothing").contains(r#""held""#));
    assert!(is_held, "the machine does not stand still");
    let client = Client::of(&directory.0);
    wait_until("pages and sums agree", || {
        let table: Table = client.get(&format!("/v1/machines/{process}/pages")).unwrap();
        let machine: Value = client.get(&format!("/v1/machines/{process}")).unwrap();
        assert_eq!((table.pages, table.states.len() as u64), (RAM >> 12, RAM >> 12));
        let bytes = |names: &[&str]| {
            let is_one = |digit: &char| {
                let name = digit.to_digit(16).map(|number| &*table.names[number as usize]);
                name.is_some_and(|name| names.contains(&name))
            };
            (table.states.chars().filter(is_one).count() as u64) << 12
        };
        let said = |name: &str| machine["pages"][format!("{name}_bytes")].as_u64().unwrap();
        let shown = [
            bytes(&["resident", "pinned", "never-page", "unwatched"]),
            bytes(&["capturing", "limbo"]),
            bytes(&["stored"]),
            bytes(&["zero", "absent"]),
        ];
        assert_eq!(shown.iter().sum::<u64>(), RAM);
        shown == ["resident", "limbo", "stored", "free"].map(said)
    });
}

/// What the manager says of pages is not to be had of nobody, and of no daemon that has another machine; and no file is left.
fn tables_that_nobody_has(directory: &Directory, socket: &str) {
    let path = directory.0.join("none.core");
    let dump = |elsewhere: &str| {
        let words = ["dump", "lonely", "--inspect", socket, "--tables", "--directory", elsewhere, "-o"];
        let ended = verb(&[&words[..], &[path.to_str().unwrap()]].concat());
        assert!(!path.exists() && ended.stderr.trim().lines().count() == 1, "{}", ended.stderr);
        ended.expect_code(2).stderr.clone()
    };
    let said = dump("/nonexistent");
    assert!(said.contains("no daemon answers at \"/nonexistent/api.sock\""), "{said}");
    let other = Directory::new("inspect-other");
    let daemon = start(&other);
    let mut said = String::new();
    wait_until("the other daemon has decided something", || {
        said = dump(other.text());
        !said.contains("nothing was decided yet")
    });
    assert!(said.contains("is not managed by that daemon") && said.contains("leave --tables out"), "{said}");
    daemon.signal(rustix::process::Signal::TERM);
    daemon.wait().expect_code(0);
}

/// The manager's note among these, whose first has what another reader looks for.
fn tables(mut notes: &[u8]) -> PageStates {
    let number = |at: usize| u32::from_le_bytes(notes[at..at + 4].try_into().unwrap()) as usize;
    let description = 12 + number(0).next_multiple_of(4);
    let (size, is_it) = (number(4), notes[12..].starts_with(b"PLIMSOLL\0"));
    if is_it {
        return PageStates::parse(&notes[description..description + size]).unwrap();
    }
    notes = &notes[description + size.next_multiple_of(4)..];
    tables(notes)
}

/// What the manager says is where is where the guest's memory says so, in a file of one moment.
fn expect_pages_where_they_are(core: &[u8], segments: &[[u64; 4]], said: &PageStates) {
    let at = |gpa: u64| {
        let load =
            segments.iter().find(|[kind, _, start, len]| *kind == 1 && (*start..start + len).contains(&gpa));
        let [_, place, start, _] = load.expect("it is RAM");
        usize::try_from(place + gpa - start).unwrap()
    };
    let gpas = said.regions.iter().flat_map(|(gpa, pages)| (0..*pages).map(|page| gpa.0 + (page << 12)));
    let mut found = [0; 2];
    for (gpa, state) in gpas.zip(&said.states) {
        let is_zero = core[at(gpa)..][..4096].iter().all(|byte| *byte == 0);
        match &*said.names[usize::from(*state)] {
            "zero" | "absent" => {
                assert!(is_zero, "the page at {gpa:#x} is nowhere, and not zero");
                found[0] += 1;
            }
            "stored" => {
                assert!(!is_zero, "the page at {gpa:#x} is stored, and zero");
                found[1] += 1;
            }
            _ => {}
        }
    }
    assert!(found.iter().all(|pages| *pages > 256), "{found:?} pages are nowhere and stored");
}

/// Core files of the machine, paused and running: its memory as it is, and registers.
fn dumps(directory: &Directory, socket: &str, process: &str) {
    for (kind, paused) in [("all", true), ("all", false), ("stacks", true), ("kernel", false)] {
        let path = directory.0.join(format!("{kind}-{paused}.core"));
        let mut words = vec!["dump", process, "--kind", kind, "--inspect", socket, "--json", "-o"];
        words.push(path.to_str().unwrap());
        words.extend(paused.then_some("--paused"));
        // The manager's tables with all memory, from one reading and from none.
        let with_tables = kind == "all";
        if with_tables {
            words.extend(["--tables", "--directory", directory.text()]);
        }
        let ended = verb(&words);
        // Nothing of it is in the upper half of its addresses.
        ended.expect_code(if kind == "kernel" { 1 } else { 0 });
        let told = lines(&ended).remove(0);
        assert_eq!(told["paused_seconds"].is_f64(), paused, "{told}");
        let core = fs::read(&path).unwrap();
        fs::remove_file(path).unwrap();
        let segments = segments(&core);
        let [_, notes, _, notes_len] =
            *segments.iter().find(|[kind, ..]| *kind == 4).expect("there are notes");
        // NT_PRSTATUS of one processor behind its name: RIP behind sixteen registers, in the image.
        let status = notes + 12 + 8;
        let rip = number(&core, status + 112 + 16 * 8, 8);
        assert!((abi::IMAGE_GPA..abi::IMAGE_END).contains(&rip), "{rip:#x}");
        assert_eq!(told["tables"].is_object(), with_tables, "{told}");
        if with_tables {
            let range = [notes, notes + notes_len].map(|at| usize::try_from(at).unwrap());
            let said = tables(&core[range[0]..range[1]]);
            assert_eq!((said.stood_still, said.states.len() as u64), (paused, RAM >> 12));
            let counts: serde_json::Map<String, Value> =
                said.counts().map(|(name, pages)| (name.to_owned(), pages.into())).collect();
            assert_eq!(told["tables"], Value::Object(counts));
            if paused {
                expect_pages_where_they_are(&core, &segments, &said);
            }
        }
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
