//! Parsers of what a VMM, a manager, a client or an operator says, against what was never meant for them.
//!
//! Enters: examples of what is right, and a seed. Leaves: nothing; the input's number where a parser panicked, or believed something that it
//! does not say itself. Inputs are examples with a few changes each, the same in every run.
#![expect(clippy::unwrap_used, reason = "a step that cannot be taken fails its test")]

use plimsoll_attach::parse_range;
use plimsoll_attach::qmp::{parse_flat_view, parse_ram_blocks, parse_registers};
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_host::config::Config;
use plimsoll_host::daemon::status;
use plimsoll_host::keeper::protocol::{
    LISTING_MAX, LISTING_SIZE, Request, Status, decode_listing, encode_listing,
};
use plimsoll_linux::uffd::wire::{
    FEATURES_NEEDED, Hello, Item, Op, Ticket, Welcome, decode_request, encode_request,
};
use plimsoll_sys::procfs::{parse_smaps_rollup, parse_status};
use plimsoll_types::{ByteCount, Gpa, Hva, PageIndex, SlotPage};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Inputs a parser gets beside its examples.
const CHANGED: u64 = 20_000;
/// Bytes that mean something to one parser or another.
const TELLING: [u8; 16] = *b"\0\x01\x7f\x80\xff09af-=:\n\" [";

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next()).unwrap() % limit
    }
}

/// Changes a few things.
fn change(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            bytes.push(0);
        }
        let at = random.below(bytes.len());
        match random.below(6) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = TELLING[random.below(TELLING.len())],
            2 => bytes.truncate(at),
            3 => bytes.insert(at, TELLING[random.below(TELLING.len())]),
            4 => {
                // A part once more, somewhere else.
                let end = at + random.below(bytes.len() - at + 1).min(64);
                let part = bytes[at..end].to_vec();
                let to = random.below(bytes.len());
                bytes.splice(to..to, part);
            }
            _ => {
                // A number at its limit.
                let number = [0, u64::MAX, 1 << 63, u64::MAX >> 1][random.below(4)].to_le_bytes();
                let end = (at + [4, 8][random.below(2)]).min(bytes.len());
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
        }
    }
}

/// Has `parse` read the examples, of which it must accept each, and changed ones. It says whether it accepted.
fn endures(examples: &[Vec<u8>], parse: impl Fn(&[u8]) -> bool) {
    let mut random = Random(examples.len() as u64);
    for (number, example) in (0..).zip(examples) {
        assert!(parse(example), "example {number} is refused");
        for input in 0..CHANGED / examples.len() as u64 {
            let mut bytes = example.clone();
            change(&mut bytes, &mut random);
            let outcome = catch_unwind(AssertUnwindSafe(|| parse(&bytes)));
            assert!(
                outcome.is_ok(),
                "example {number}, input {input}: {:?}",
                bytes.escape_ascii().to_string()
            );
        }
    }
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn hello(shard: u32) -> Hello {
    let region = Region { start: Gpa(u64::from(shard) << 30), bytes: ByteCount(1 << 30) };
    Hello {
        name: "machine".to_owned(),
        shard,
        shards: 2,
        layout: GuestLayout::new(vec![region]).unwrap(),
        hvas: vec![Hva((1 << 40) + (u64::from(shard) << 30))],
        airlock_base: Hva(1 << 41),
        airlock_slots: 4,
        features: FEATURES_NEEDED,
    }
}

#[test]
fn what_a_vmm_hands_over_is_refused_or_says_itself_again() {
    endures(&[hello(0).encode(), hello(1).encode()], |bytes| {
        let Ok(hello) = Hello::decode(bytes, 2) else { return false };
        assert_eq!(Hello::decode(&hello.encode(), 2).as_ref(), Ok(&hello));
        true
    });
    let words =
        [Welcome::Accepted { machine: 3, epoch: 7 }, Welcome::Refused { reason: "no room".to_owned() }];
    endures(&words.map(|word| word.encode()), |bytes| {
        let Ok(welcome) = Welcome::decode(bytes) else { return false };
        assert_eq!(Welcome::decode(&welcome.encode()).as_ref(), Ok(&welcome));
        true
    });
}

#[test]
fn what_a_manager_asks_its_keeper_is_refused_or_says_itself_again() {
    let requests = [Request::Keep(9), Request::LetGo(9), Request::List, Request::Serving, Request::Staying];
    endures(&requests.map(|request| request.encode().to_vec()), |bytes| {
        let found = [0, 1].map(|descriptors| Request::decode(bytes, descriptors));
        assert!(found.iter().flatten().all(|request| request.encode() == *bytes));
        found.iter().any(Option::is_some)
    });
    endures(&[Status::Done.encode(9).to_vec(), Status::Refused.encode(9).to_vec()], |bytes| {
        Status::decode(bytes).is_some()
    });
    let mut listing = [0; LISTING_SIZE];
    let length = encode_listing(&mut listing, 100, &[1, 2, 7]);
    endures(&[listing[..length].to_vec()], |bytes| {
        let Some((_, listed)) = decode_listing(bytes, 3) else { return false };
        assert!(listed.len() == 3 && listed.len() <= LISTING_MAX);
        true
    });
}

#[test]
fn a_request_to_an_agent_that_nobody_sent_is_no_request() {
    let mut bytes = Vec::new();
    let ticket = Ticket { epoch: 3, sequence: 9, op: Op::MoveOut };
    let items = [5, 700].map(|page| Item::new(PageIndex(page), SlotPage(1), 2));
    encode_request(&mut bytes, ticket, &items);
    endures(&[bytes], |bytes| {
        let Ok((ticket, items)) = decode_request(bytes) else { return false };
        let mut again = Vec::new();
        encode_request(&mut again, ticket, &items);
        assert_eq!(decode_request(&again), Ok((ticket, items)));
        true
    });
}

#[test]
fn settings_and_requests_of_an_operator_are_refused_or_read() {
    let config = "[host]\nmemory = \"24G\"\nidle-tax = \"75%\"\n[group.tenant]\nreservation = \"4G\"\nlimit = \"12G\"\n\
                  shares = 5000\nsharing = true\n[machine.web]\ngroup = \"tenant\"\nreservation = \"1G\"\nlimit = \"4G\"\n\
                  highest = \"compress\"\n[machine.db]\nstartup = \"2G\"\nminimum = \"1G\"\nmaximum = \"8G\"\nbuffer = \"20%\"\n";
    endures(&[config.into()], |bytes| Config::parse(&text(bytes), "host.toml").is_ok());
    let requests = [r#"{"do":"status"}"#, r#"{"do":"squeeze","machine":3,"pages":1000}"#];
    endures(&requests.map(Vec::from), |bytes| serde_json::from_slice::<status::Request>(bytes).is_ok());
}

#[test]
fn what_qemu_and_the_kernel_print_is_read_or_is_not() {
    let blocks = "              Block Name    PSize              Offset               Used              Total\n\
                  \x20                pc.ram    4 KiB  0x0000000000000000 0x0000000020000000 0x0000000020000000\n";
    endures(&[blocks.into()], |bytes| parse_ram_blocks(&text(bytes)).is_some());
    let view = "FlatView #1\r\n AS \"memory\", root: system\r\n Root memory region: system\r\n  \
                0000000000000000-00000000000bffff (prio 0, ram): pc.ram\r\n  \
                00000000000e0000-00000000000fffff (prio 0, rom): pc.bios @0000000000020000\r\n";
    endures(&[view.into()], |bytes| parse_flat_view(&text(bytes)).is_some());
    let mut registers = String::new();
    for name in
        plimsoll_attach::qmp::GENERAL.iter().chain(&["RIP", "RFL", "CR0", "CR2", "CR3", "CR4", "EFER"])
    {
        registers += &format!("{name:<3}=0000000000000010 ");
    }
    registers += "CPL=0\n";
    for name in plimsoll_attach::qmp::SEGMENTS {
        registers += &format!("{name:<3}=0010 0000000000000000 ffffffff 00a09b00\n");
    }
    registers += "GDT=     fffffe0000001000 0000007f\nIDT=     fffffe0000000000 00000fff\n";
    endures(&[registers.into()], |bytes| parse_registers(&text(bytes)).is_some());
    endures(&["7f0000000000-7f0000001000".into()], |bytes| parse_range(&text(bytes)).is_ok());
    let own = |name| std::fs::read(format!("/proc/self/{name}")).unwrap();
    endures(&[own("smaps_rollup")], |bytes| parse_smaps_rollup(&text(bytes)).is_ok());
    endures(&[own("status")], |bytes| parse_status(&text(bytes)).is_ok());
}
