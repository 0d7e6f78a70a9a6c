//! `plimsoll translate` of a stock kernel's addresses, against what its own QEMU says of them.
use crate::manager::{Manager, STOCK, alone, can};
use plimsoll_guest::random::Rng;
use plimsoll_stock::{Backing, Guest, Node, Options};
use plimsoll_types::ByteCount;
use serde_json::{Value, json};

/// Addresses of the guest kernel's that are looked up.
const ADDRESSES: usize = 600;
/// Of these, how many are compared with QEMU's own look at its page map, one question each.
const FRAMES: usize = 60;

/// A command of the human monitor, over the guest's own connection.
pub(crate) fn human(guest: &mut Guest, line: &str) -> String {
    let arguments = json!({ "command-line": line, "cpu-index": 0 });
    let answer = guest.monitor().unwrap().call("human-monitor-command", &arguments).unwrap();
    answer.as_str().unwrap().to_owned()
}

/// An address as JSON has it.
pub(crate) fn address(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok()
}

pub(crate) fn stop(guest: &mut Guest) {
    guest.monitor().unwrap().call("stop", &json!({})).unwrap();
}

pub(crate) fn resume(guest: &mut Guest) {
    guest.monitor().unwrap().call("cont", &json!({})).unwrap();
}

/// A mapping that QEMU's `info tlb` shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shown {
    pub(crate) gva: u64,
    pub(crate) gpa: u64,
    pub(crate) size: u64,
}

/// What the guest maps in the upper half, by `info tlb`: `GVA: GPA XGPDACTUW`. All large pages have
/// P, so one of 1 GiB counts as one of 2 MiB here: addresses within it are right all the same.
pub(crate) fn kernel_mappings(guest: &mut Guest) -> Vec<Shown> {
    let text = human(guest, "info tlb");
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let rows = text.lines().filter_map(|line| {
        let (gva, rest) = line.trim().split_once(": ")?;
        let (gpa, flags) = rest.split_once(' ')?;
        let size = if flags.as_bytes().get(2) == Some(&b'P') { 2 << 20 } else { 4096 };
        Some(Shown { gva: hex(gva), gpa: hex(gpa) & ((1 << 52) - 1), size })
    });
    rows.filter(|shown| shown.gva >> 63 == 1).collect()
}

/// `plimsoll translate --json` of many addresses.
fn translate(guest: &Guest, words: &[&str], gvas: &[u64]) -> (Option<i32>, Vec<Value>) {
    let process = guest.process().get().to_string();
    let gvas: Vec<String> = gvas.iter().map(|gva| format!("{gva:#x}")).collect();
    let all: Vec<&str> =
        [&*process].into_iter().chain(gvas.iter().map(String::as_str)).chain(words.iter().copied()).collect();
    let (status, lines, said) = Manager::run("translate", &all).end();
    assert_eq!(lines.len(), gvas.len(), "{said}");
    (status.code(), lines)
}

/// Random addresses of the guest kernel's, with where QEMU says they lead.
fn sample(mappings: &[Shown], rng: &mut Rng) -> Vec<(u64, u64)> {
    let one = |rng: &mut Rng| {
        let shown = mappings[usize::try_from(rng.below(mappings.len() as u64)).unwrap()];
        let inside = rng.below(shown.size);
        (shown.gva + inside, shown.gpa + inside)
    };
    (0..ADDRESSES).map(|_| one(rng)).collect()
}

fn agrees(mut options: Options, seed: u64) {
    options.seed = seed;
    let mut guest = Guest::start(options).unwrap();
    let qmp = guest.qmp().display().to_string();
    // Nothing changes its tables from here on.
    stop(&mut guest);
    let mappings = kernel_mappings(&mut guest);
    assert!(mappings.len() > 500, "a kernel maps more than {mappings:?}");
    let mut rng = Rng::new(seed);
    let wanted = sample(&mappings, &mut rng);
    let gvas: Vec<u64> = wanted.iter().map(|(gva, _)| *gva).collect();
    let (_, lines) = translate(&guest, &["--qmp", &qmp], &gvas);
    let mut in_ram = 0_usize;
    for (line, (gva, gpa)) in lines.iter().zip(&wanted) {
        assert_eq!(address(&line["gpa"]), Some(*gpa), "seed {seed}: {gva:#x}: {line}");
        in_ram += usize::from(!line["host"].is_null());
    }
    // What QEMU's own walk says of a part of them, and its own look into its page map.
    let mut frames = 0;
    for (line, (gva, gpa)) in lines.iter().zip(&wanted).take(FRAMES) {
        assert_eq!(human(&mut guest, &format!("gva2gpa {gva:#x}")).trim(), format!("gpa: {gpa:#x}"));
        if let Some(physical) = address(&line["host"]["physical"]) {
            let said = human(&mut guest, &format!("gpa2hpa {gpa:#x}"));
            // The host's kernel may move a page at any time: then both are asked again.
            let same = said.trim().ends_with(&format!(" is {physical:#x}"))
                || address(&translate(&guest, &["--qmp", &qmp], &[*gva]).1[0]["host"]["physical"])
                    .is_some_and(|again| {
                        human(&mut guest, &format!("gpa2hpa {gpa:#x}"))
                            .trim()
                            .ends_with(&format!(" is {again:#x}"))
                    });
            assert!(same, "seed {seed}: {gva:#x}: {said}, not {physical:#x}");
            frames += 1;
        }
    }
    assert!(in_ram > ADDRESSES / 2 && frames > FRAMES / 4, "{in_ram} in RAM, {frames} frames");

    // Without a monitor, by the rule of the machine and a CR3 that somebody knows: the same in everything.
    let cr3 = lines[0]["cr3"].as_str().unwrap().to_owned();
    let (_, by_rule) = translate(&guest, &["--cr3", &cr3], &gvas);
    for (one, other) in lines.iter().zip(&by_rule) {
        // By rule the part of the first MiB that may be a device's is nobody's.
        if address(&one["gpa"]).is_some_and(|gpa| (0xa_0000..0x10_0000).contains(&gpa)) {
            continue;
        }
        assert_eq!(
            (&one["gpa"], &one["host"]["hva"]),
            (&other["gpa"], &other["host"]["hva"]),
            "{one} {other}"
        );
    }

    // What is mapped nowhere: a hole of the canonical space's, and an address that is not in it.
    let hole = (1..)
        .map(|page| wanted[0].0 & !0xfff ^ page << 40)
        .find(|gva| gva >> 63 == 1 && human(&mut guest, &format!("gva2gpa {gva:#x}")).contains("Unmapped"));
    let (code, lines) = translate(&guest, &["--qmp", &qmp], &[hole.unwrap(), 1 << 62]);
    assert_eq!(code, Some(1));
    assert!(lines[0]["gpa"].is_null() && lines[0]["fault"]["level"].is_u64(), "{}", lines[0]);
    assert!(lines[1]["fault"]["text"].as_str().unwrap().contains("not canonical"), "{}", lines[1]);
    println!(
        "seed {seed}: {} mappings, {ADDRESSES} addresses alike, {in_ram} in RAM, {frames} frames",
        mappings.len()
    );
    resume(&mut guest);
}

#[test]
fn a_kernels_addresses_go_where_its_qemu_says() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    agrees(Options::new(ByteCount::mib(192)), 71);
}

#[test]
fn a_machine_with_several_blocks_is_seen_through_as_well() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let node = |mib, backing| Node { size: ByteCount::mib(mib), backing };
    let mut options = Options::new(ByteCount::mib(192));
    options.nodes =
        vec![node(96, Backing::Anonymous), node(64, Backing::Memfd), node(32, Backing::Anonymous)];
    agrees(options, 72);
}

#[test]
fn what_cannot_be_told_from_outside_is_asked_for() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let guest = Guest::start(Options::new(ByteCount::mib(192))).unwrap();
    let process = guest.process().get().to_string();
    let qmp = guest.qmp().display().to_string();
    for (words, part) in [
        (&[][..], "give its monitor with --qmp, its inspection socket with --inspect, or a CR3 with --cr3"),
        (&["--qmp", &qmp, "--cpu", "7"], "has no processor 7"),
        (&["--qmp", "/nowhere"], "there is no QMP socket"),
    ] {
        let (status, lines, said) = Manager::run("translate", &[&[&*process, "0x0"], words].concat()).end();
        assert_eq!((status.code(), lines), (Some(2), Vec::new()));
        assert!(said.contains(part) && said.lines().count() == 1, "{said}");
    }
    // A CR3 that leads out of its RAM is an error with level and entry.
    let (status, lines, _) =
        Manager::run("translate", &[&process, "0x1000", "--cr3", "0xfffffffff000"]).end();
    assert_eq!(status.code(), Some(1));
    assert_eq!(
        (&lines[0]["fault"]["level"], &lines[0]["fault"]["at"]),
        (&4.into(), &"0xfffffffff000".into())
    );
    assert!(lines[0]["fault"]["text"].as_str().unwrap().contains("not in the guest's RAM"), "{}", lines[0]);
}
