//! `plimsoll maps` of stock guests whose memory is of several kinds, and partly in swap.
use crate::manager::{Manager, STOCK, alone, ask, bytes, can, page_out, swap};
use crate::translate::{address, human};
use plimsoll_stock::{Backing, Command, Guest, Node, Options};
use plimsoll_types::ByteCount;
use serde_json::Value;

const STATES: [&str; 4] = ["present_bytes", "zero_bytes", "swapped_bytes", "absent_bytes"];

fn maps(guest: &Guest, words: &[&str]) -> Value {
    let process = guest.process().get().to_string();
    let (status, lines, said) = Manager::run("maps", &[&[&*process], words].concat()).end();
    assert!(status.success() && lines.len() == 1, "{said}");
    // Whatever the guest does meanwhile, the states of a piece add up to its size.
    for piece in lines[0]["pieces"].as_array().unwrap() {
        let sum: u64 = STATES.iter().map(|state| bytes(&piece["states"], state)).sum();
        assert_eq!(sum, bytes(piece, "size"), "{piece}");
        assert!(bytes(&piece["states"], "huge_bytes") <= bytes(&piece["states"], "present_bytes"), "{piece}");
    }
    lines.into_iter().next().unwrap()
}

/// What of the guest's physical address space its blocks ram0 and ram1 are under, as `info mtree -f` has it. A part of the first MiB
/// is theirs and cannot be written by the guest: firmware was copied there.
fn ram_by_monitor(guest: &mut Guest) -> Vec<(u64, u64)> {
    let text = human(guest, "info mtree -f");
    let view = text.split("FlatView #").find(|view| view.contains("AS \"memory\",")).unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let rows = view.lines().filter(|line| line.contains("): ram"));
    rows.map(|line| {
        let (first, last) = line.trim().split(' ').next().unwrap().split_once('-').unwrap();
        (hex(first), hex(last) - hex(first) + 1)
    })
    .collect()
}

fn pieces(maps: &Value) -> Vec<(u64, u64)> {
    let pieces = maps["pieces"].as_array().unwrap().iter();
    pieces.map(|piece| (address(&piece["gpa"]).unwrap(), bytes(piece, "size"))).collect()
}

#[test]
fn a_guests_map_is_what_its_qemu_says_and_states_follow_its_memory() {
    if !can(&STOCK) {
        return;
    }
    let _alone = alone();
    let _swap = swap(ByteCount::mib(512));
    let node = |mib, backing| Node { size: ByteCount::mib(mib), backing };
    let mut options = Options::new(ByteCount::mib(192));
    options.nodes = vec![node(128, Backing::Anonymous), node(96, Backing::Memfd)];
    options.work = vec![Command::Alloc { pages: 10_000 }];
    let mut guest = Guest::start(options).unwrap();
    let qmp = guest.qmp().display().to_string();
    let before = maps(&guest, &["--qmp", &qmp]);
    assert_eq!(pieces(&before), ram_by_monitor(&mut guest), "{before}");
    assert_eq!(
        (&before["layout"], &before["direct_devices"]),
        (&"monitor".into(), &Value::Array(Vec::new()))
    );
    let backings: Vec<&str> =
        before["pieces"].as_array().unwrap().iter().map(|piece| piece["backing"].as_str().unwrap()).collect();
    assert!(backings.iter().any(|backing| backing.starts_with("private anonymous")), "{backings:?}");
    assert!(backings.iter().any(|backing| backing.starts_with("shared memory")), "{backings:?}");
    let present = bytes(&before["states"], "present_bytes");
    assert!(present > 10_000 * 4096, "{before}");

    // By rule: the same without the part of the first MiB that may be a device's.
    let by_rule = maps(&guest, &[]);
    assert_eq!((&by_rule["layout"], pieces(&by_rule)[0]), (&"rule".into(), (0, 0xa_0000)));
    assert_eq!(pieces(&by_rule)[1..].iter().map(|(_, len)| len).sum::<u64>(), (223 << 20));

    // What is taken shows as swapped, of private memory; shared memory in swap shows nothing at all.
    page_out(&guest);
    let after = maps(&guest, &["--qmp", &qmp]);
    assert!(bytes(&after["states"], "swapped_bytes") > 16 << 20, "{after}");
    assert!(bytes(&after["states"], "present_bytes") < present / 2, "{after}");
    ask(&mut guest, Command::Sweep);
    let again = maps(&guest, &["--qmp", &qmp]);
    assert!(bytes(&again["states"], "present_bytes") > bytes(&after["states"], "present_bytes"), "{again}");
    println!("before {}, paged out {}, swept {}", before["states"], after["states"], again["states"]);
}
