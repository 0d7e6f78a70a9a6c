//! `plimsoll dump` of stock guests: the bytes that they have, as debuggers read them, of one moment where that was asked for.
use crate::liar::{Liar, Lie};
use crate::manager::{Manager, PATIENCE, STOCK, alone, ask, bytes, can, sweep};
use crate::translate::{human, resume, stop};
use plimsoll_guest::versions::PageState;
use plimsoll_stock::{Command, Guest, Options, content};
use plimsoll_sys::process_memory::read;
use plimsoll_types::ByteCount;
use rustix::process::Signal;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

const PAGES: u64 = 10_000;

fn dump(guest: &Guest, file: &Path, words: &[&str]) -> (Option<i32>, Option<Value>, String) {
    let (process, qmp) = (guest.process().get().to_string(), guest.qmp().display().to_string());
    let file = file.to_str().unwrap();
    let (status, mut lines, said) =
        Manager::run("dump", &[&[&*process, "--qmp", &qmp, "-o", file], words].concat()).end();
    (status.code(), lines.pop(), said)
}

/// A core file that is read.
struct Core {
    bytes: Vec<u8>,
}

impl Core {
    fn read(file: &Path) -> Self {
        Self { bytes: fs::read(file).unwrap() }
    }

    fn number(&self, at: usize, width: usize) -> usize {
        let mut word = [0; 8];
        word[..width].copy_from_slice(&self.bytes[at..at + width]);
        usize::try_from(u64::from_le_bytes(word)).unwrap()
    }

    /// Kind, place, virtual and physical address and length of each segment.
    fn segments(&self) -> Vec<[usize; 5]> {
        let one = |place| {
            let at = 64 + 56 * place;
            let field = |field: usize| self.number(at + 8 + 8 * field, 8);
            [self.number(at, 4), field(0), field(1), field(2), field(3)]
        };
        (0..self.number(56, 2)).map(one).collect()
    }
}

fn register(guest: &mut Guest, name: &str) -> u64 {
    let text = human(guest, "info registers");
    let (_, rest) = text.split_once(&format!("{name}=")).unwrap();
    u64::from_str_radix(&rest[..16], 16).unwrap()
}

/// Stopped, with its processor in the kernel.
fn stop_in_kernel(guest: &mut Guest) {
    for _ in 0..200 {
        stop(guest);
        if human(guest, "info registers").contains("CPL=0") {
            return;
        }
        resume(guest);
        std::thread::sleep(std::time::Duration::from_millis(7));
    }
    panic!("the guest is never in its kernel");
}

fn gdb(file: &Path, commands: &[&str]) -> String {
    let mut gdb = std::process::Command::new("gdb");
    gdb.args(["-batch", "-nx", "-ex", &format!("core-file {}", file.display())]);
    commands.iter().for_each(|command| {
        gdb.args(["-ex", command]);
    });
    let output = gdb.output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// What pyelftools makes of a file: its kind, its notes, and the two words at an address.
fn pyelftools(file: &Path, gva: u64) -> String {
    const PROGRAM: &str = r#"
import struct, sys
from elftools.elf.elffile import ELFFile
core, gva = ELFFile(open(sys.argv[1], "rb")), int(sys.argv[2])
print(core["e_type"], core["e_machine"])
for segment in core.iter_segments():
    if segment["p_type"] == "PT_NOTE":
        print(*(note["n_type"] for note in segment.iter_notes()))
    elif segment["p_vaddr"] <= gva < segment["p_vaddr"] + segment["p_filesz"]:
        at = gva - segment["p_vaddr"]
        print(*(f"{word:#018x}" for word in struct.unpack("<2Q", segment.data()[at:at + 16])))
"#;
    let gva = gva.to_string();
    // Debian's, which has Debian's packages; there may be another before it.
    let mut python = std::process::Command::new("/usr/bin/python3");
    let output = python.args(["-c", PROGRAM, file.to_str().unwrap(), &gva]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_dump_of_all_holds_every_byte_and_nothing_is_overwritten() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("core");
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    ask(&mut guest, Command::Alloc { pages: PAGES });
    stop(&mut guest);
    let (code, line, said) = dump(&guest, &file, &[]);
    assert_eq!(code, Some(0), "{said}");
    let line = line.unwrap();
    let core = Core::read(&file);
    let [ram] = guest.ram().unwrap().try_into().unwrap();
    let mut sum = 0;
    for [kind, at, gva, gpa, len] in core.segments() {
        if kind != 1 {
            continue;
        }
        assert_eq!(gva, gpa);
        let mut there = vec![0; len];
        let hva = plimsoll_types::Hva(ram.start().0 + gpa as u64);
        assert_eq!(read(guest.process(), hva, &mut there).stop, None);
        assert!(core.bytes[at..at + len] == there, "{gpa:#x}");
        sum += len;
    }
    assert_eq!(sum as u64, 192 << 20);
    // The file is as large as the RAM and takes what is not zero.
    let taken = fs::metadata(&file).unwrap().blocks() * 512;
    assert!(taken < bytes(&line, "written_bytes") + (4 << 20), "{taken} {line}");
    let (code, line, said) = dump(&guest, &file, &[]);
    assert_eq!((code, line), (Some(2), None));
    assert!(said.contains("cannot make"), "{said}");
    assert!(Core::read(&file).bytes == core.bytes);
    resume(&mut guest);
    sweep(&mut guest);
}

#[test]
fn debuggers_read_registers_and_kernel_addresses_of_a_dump() {
    if !can(&STOCK) || !can(&["gdb", "pyelftools"]) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    stop_in_kernel(&mut guest);
    let [rip, rsp] = ["RIP", "RSP"].map(|name| register(&mut guest, name));
    let monitor = human(&mut guest, &format!("x /2gx {rsp:#x}"));
    let words: Vec<&str> = monitor.split_ascii_whitespace().skip(1).collect();
    for kind in ["kernel", "stacks"] {
        let file = folder.path().join(kind);
        let (code, line, said) = dump(&guest, &file, &["--kind", kind]);
        assert_eq!(code, Some(0), "{said} {line:?}");
        let shown = gdb(&file, &["info registers rip rsp", "x/2gx $rsp", "bt 3", "x/1i $rip"]);
        println!("{kind}: {}\n{shown}", line.unwrap());
        assert!(shown.contains(&format!("{rip:#x}")) && shown.contains(&format!("{rsp:#x}")), "{shown}");
        assert!(words.iter().all(|word| shown.contains(word)), "{words:?}: {shown}");
        assert!(shown.contains(&format!("#0  {rip:#018x} in ??")), "{shown}");
        assert!(!shown.contains("Cannot access memory"), "{shown}");
        let shown = pyelftools(&file, rsp);
        assert!(shown.starts_with("ET_CORE EM_X86_64\n") && shown.contains("NT_PRSTATUS"), "{shown}");
        assert!(words.iter().all(|word| shown.contains(word)), "{words:?}: {shown}");
        let taken = fs::metadata(&file).unwrap().blocks() * 512;
        assert!(kind == "kernel" || taken < 1 << 20, "{taken}");
    }
    resume(&mut guest);
}

#[test]
fn a_dump_that_fails_leaves_no_file_and_lets_the_machine_go_on() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("core");
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    // It is seen only after the machine was stopped that there is no such processor.
    let (code, line, said) = dump(&guest, &file, &["--paused", "--kind", "kernel", "--cpu", "7"]);
    assert_eq!((code, line), (Some(2), None));
    assert!(said.contains("no registers of processor 7") && !file.exists(), "{said}");
    assert!(human(&mut guest, "info status").contains("running"));
    // One that stood still before does so afterwards.
    stop(&mut guest);
    let (code, line, said) = dump(&guest, &file, &["--paused", "--kind", "stacks"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(line.unwrap()["paused_seconds"].is_null());
    assert!(human(&mut guest, "info status").contains("paused"));
    resume(&mut guest);
    // Without a monitor there are no registers, and nobody who could stop it.
    let process = guest.process().get().to_string();
    for words in [&["--paused"][..], &["--kind", "stacks"], &["--kind", "kernel"]] {
        let other = folder.path().join("other");
        let all = [&[&*process, "-o", other.to_str().unwrap()], words].concat();
        let (status, lines, said) = Manager::run("dump", &all).end();
        assert_eq!((status.code(), lines), (Some(2), Vec::new()));
        assert!(said.contains("--qmp") && !other.exists(), "{said}");
    }
    sweep(&mut guest);
}

#[test]
fn a_signal_while_the_machine_stands_still_lets_it_go_on() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let mut guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let process = guest.process().get().to_string();
    for signal in [Signal::QUIT, Signal::TERM] {
        let (file, socket) = (folder.path().join("core"), folder.path().join(format!("{signal:?}")));
        // The answer after the stop comes after the signal.
        let silent = Liar::start(&socket, &guest.qmp(), 192 << 20, Lie::SilentAt("query-cpus-fast"));
        let words = ["--qmp", socket.to_str().unwrap(), "-o", file.to_str().unwrap(), "--paused"];
        let run = Manager::run("dump", &[&[&*process], &words[..]].concat());
        let deadline = Instant::now() + PATIENCE;
        while human(&mut guest, "info status").contains("running") {
            assert!(Instant::now() < deadline, "it is never stopped");
        }
        // What a terminal suspends would leave it standing still.
        run.send(Signal::TSTP);
        run.send(signal);
        silent.turn_to(Lie::Nothing);
        let (status, lines, said) = run.end();
        assert_eq!((status.code(), lines.len()), (Some(2), 0), "{said}");
        assert!(said.contains("a signal asked for the end") && !file.exists(), "{said}");
        assert!(human(&mut guest, "info status").contains("running"));
        drop(silent);
    }
    sweep(&mut guest);
}

/// Versions of the guest's pages, wherever a page of the dump holds some of them.
fn versions(pages: &[&[u8]], seed: u64) -> BTreeMap<u64, PageState> {
    const PROBE: usize = 256;
    let mut found: BTreeMap<u64, PageState> = BTreeMap::new();
    for page in pages.iter().filter(|page| page.iter().any(|byte| *byte != 0)) {
        let words: Vec<u64> = page.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let is_one = |index: &u64| PageState::decode(words[PROBE], seed, *index).is_ok();
        let Some(index) = (0..PAGES).find(is_one) else { continue };
        for (place, word) in words.iter().enumerate() {
            let Some(index) = (index + place as u64).checked_sub(PROBE as u64) else { continue };
            if let Ok(state) = PageState::decode(*word, seed, index) {
                let newest = found.entry(index).or_insert(state);
                if state.version() > newest.version() {
                    *newest = state;
                }
            }
        }
    }
    found
}

#[test]
fn a_paused_dump_under_full_load_is_of_one_moment() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("core");
    let mut options = Options::new(ByteCount::mib(192));
    options.seed = 81;
    let (seed, mix) = (options.seed, options.mix);
    let mut guest = Guest::start(options).unwrap();
    ask(&mut guest, Command::Alloc { pages: PAGES });
    ask(&mut guest, Command::Hot { pages: PAGES, per_second: 1_000_000 });
    // Every fifth operation writes; by then hundreds of pages are not as they were first.
    let deadline = Instant::now() + PATIENCE;
    while guest.console().report(PATIENCE).unwrap().operations < 4000 {
        assert!(Instant::now() < deadline, "the guest does not work");
    }
    let (code, line, said) = dump(&guest, &file, &["--paused"]);
    assert_eq!(code, Some(0), "{said}");
    let line = line.unwrap();
    let status = human(&mut guest, "info status");
    assert!(status.contains("running"), "{status}");

    let core = Core::read(&file);
    let loads = core.segments();
    let loads = loads.iter().filter(|[kind, ..]| *kind == 1);
    let pages: Vec<&[u8]> =
        loads.flat_map(|[_, at, _, _, len]| core.bytes[*at..at + len].chunks(4096)).collect();
    let contents: HashSet<&[u8]> = pages.iter().copied().collect();
    let versions = versions(&pages, seed);
    let expected = content(seed, mix).unwrap();
    let (mut words, mut torn) = ([0; 512], Vec::new());
    for (index, state) in &versions {
        expected.fill(*index, state.version(), &mut words);
        let page: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_le_bytes()).collect();
        if !contents.contains(page.as_slice()) {
            torn.push((*index, state.version()));
        }
    }
    let written = versions.values().filter(|state| state.version() > 1).count();
    println!("{line}; {} versions, {written} rewritten, torn {torn:?}", versions.len());
    assert!(versions.len() as u64 > PAGES - 1100 && written > 100, "{} {written}", versions.len());
    // The one that the guest was writing.
    assert!(torn.len() <= 1, "{torn:?}");
    assert!(line["paused_seconds"].as_f64().unwrap() < 10.0, "{line}");
    ask(&mut guest, Command::Idle);
    sweep(&mut guest);
}
