//! Hand-overs that no VMM of ours would make.
use crate::crash::{Random, seed};
use crate::fleet::{self, Fleet, Guest, MEMBERSHIP, PLENTY, explain, machine, zipf};
use crate::impostor::{Goods, NOWHERE, RAM_FEATURES};
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_guest::spec::WorkloadSpec;
use plimsoll_linux::uffd::probe::NoProbe;
use plimsoll_linux::uffd::wire::{DATAGRAM_MAX, Hello, MAGIC, Welcome};
use plimsoll_sys::ProcessId;
use plimsoll_sys::fdpass::{self, seqpacket_pair};
use plimsoll_sys::pidfd::Pidfd;
use plimsoll_types::{ByteCount, Gpa};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

const MIB2: u64 = 2 << 20;

/// A message, or none, with its descriptors, and what its refusal says.
type Case<'a> = (Option<&'a [u8]>, &'a [BorrowedFd<'a>], &'a str);

/// The message as raw numbers, so that it can hold any.
#[derive(Clone)]
struct Raw {
    magic: u64,
    version: u32,
    page_size: u32,
    features: u64,
    airlock_base: u64,
    airlock_slots: u32,
    announced: u32,
    shard: u32,
    shards: u32,
    name: Vec<u8>,
    /// gpa, hva, bytes.
    regions: Vec<[u64; 3]>,
}

impl Raw {
    fn good() -> Self {
        Self {
            magic: MAGIC,
            version: 3,
            page_size: 4096,
            features: RAM_FEATURES.bits(),
            airlock_base: 0x20_0000_0000,
            airlock_slots: 4,
            announced: 2,
            shard: 0,
            shards: 1,
            name: b"forged".to_vec(),
            regions: vec![[0, NOWHERE.0, 4 * MIB2], [1 << 32, NOWHERE.0 + (1 << 32), 4 * MIB2]],
        }
    }

    fn with(change: impl FnOnce(&mut Self)) -> Vec<u8> {
        let mut raw = Self::good();
        change(&mut raw);
        raw.bytes()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.magic.to_le_bytes().to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.page_size.to_le_bytes());
        bytes.extend(self.features.to_le_bytes());
        bytes.extend(self.airlock_base.to_le_bytes());
        bytes.extend(self.airlock_slots.to_le_bytes());
        bytes.extend(self.announced.to_le_bytes());
        bytes.extend(self.shard.to_le_bytes());
        bytes.extend(self.shards.to_le_bytes());
        bytes.extend(&self.name);
        bytes.resize(80, 0);
        bytes.extend(self.regions.iter().flatten().flat_map(|number| number.to_le_bytes()));
        bytes
    }
}

/// Sends the message, or closes the socket instead, and returns what the manager says of it.
fn offer(fleet: &mut Fleet, message: Option<&[u8]>, descriptors: &[BorrowedFd<'_>]) -> (String, OwnedFd) {
    let (socket, theirs) = seqpacket_pair().unwrap();
    let theirs = match message {
        Some(bytes) => {
            fdpass::send(&theirs, bytes, descriptors).unwrap();
            theirs
        }
        None => {
            drop(theirs);
            // Something open to return.
            File::open("/dev/null").unwrap().into()
        }
    };
    let process = Pidfd::open(ProcessId::own()).unwrap();
    let refused =
        fleet.manager().admit(socket, process, MEMBERSHIP).expect_err("a forged hand-over was accepted");
    (explain(&refused), theirs)
}

fn bystander(fleet: &mut Fleet) -> Guest {
    let guest = fleet.add(&machine("bystander", 32, WorkloadSpec { ops_per_second: 2000, ..zipf() }));
    guest.until_running();
    guest
}

/// Refusals by the message alone, and what they say.
fn messages() -> Vec<(Vec<u8>, &'static str)> {
    fn with(change: impl FnOnce(&mut Raw)) -> Vec<u8> {
        Raw::with(change)
    }
    let cut = |length| {
        let mut bytes = Raw::good().bytes();
        bytes.resize(length, 0);
        bytes
    };
    vec![
        (with(|raw| raw.magic ^= 1), "does not start with the hand-over magic"),
        (with(|raw| raw.version += 1), "speaks hand-over version 4, this build speaks 3"),
        (with(|raw| raw.version = 2), "speaks hand-over version 2, this build speaks 3"),
        (with(|raw| raw.version = 0), "speaks hand-over version 0, this build speaks 3"),
        (with(|raw| raw.page_size = 16384), "page size is 16384 bytes"),
        (with(|raw| raw.features = 0), "lacks features"),
        (cut(1), "has 1 bytes where 80 were expected"),
        (cut(79), "has 79 bytes where 80 were expected"),
        (cut(80), "has 80 bytes where 128 were expected"),
        (cut(127), "has 127 bytes where 128 were expected"),
        (cut(129), "has 129 bytes where 128 were expected"),
        (cut(DATAGRAM_MAX + 1), "longer than the 6168 bytes expected"),
        (with(|raw| raw.announced = 1), "has 128 bytes where 104 were expected"),
        (with(|raw| raw.announced = 0), "has 0 memory regions"),
        (with(|raw| raw.announced = 65), "has 65 memory regions"),
        (with(|raw| raw.announced = u32::MAX), "has 4294967295 memory regions"),
        (with(|raw| raw.shards = 0), "shard 0 of 0 cannot be"),
        (with(|raw| raw.shards = 65), "shard 0 of 65 cannot be"),
        (with(|raw| raw.shard = 1), "shard 1 of 1 cannot be"),
        (with(|raw| (raw.shard, raw.shards) = (u32::MAX, 64)), "shard 4294967295 of 64 cannot be"),
        (
            with(|raw| raw.airlock_slots = 0),
            "the range of 0 bytes at hva:0x2000000000 is empty, unaligned or wraps",
        ),
        (with(|raw| raw.airlock_slots = 17), "an airlock of 17 slots of 2 MiB is larger than the machine"),
        (with(|raw| raw.airlock_slots = u32::MAX), "is empty, unaligned or wraps"),
        (with(|raw| raw.airlock_base += 4096), "is empty, unaligned or wraps"),
        (with(|raw| raw.airlock_base = 0), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][1] += 8), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][1] = 0), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][1] = u64::MAX - 4095), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][1] = 0xffff_8880_0000_0000), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][2] = 0), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[0][2] = u64::MAX - 4095), "is empty, unaligned or wraps"),
        (with(|raw| raw.regions[1][1] = NOWHERE.0 + MIB2), "the host ranges at"),
        (with(|raw| raw.airlock_base = NOWHERE.0 + MIB2), "the host ranges at"),
        (with(|raw| raw.regions[1][0] = MIB2), "overlaps another, is out of order or wraps"),
        (with(|raw| raw.regions.swap(0, 1)), "overlaps another, is out of order or wraps"),
        (with(|raw| raw.regions[1][0] = u64::MAX - MIB2 + 1), "overlaps another, is out of order or wraps"),
        (with(|raw| raw.regions[1][0] += 4096), "not made of whole 2 MiB blocks"),
        (with(|raw| raw.regions[1][2] -= 4096), "not made of whole 2 MiB blocks"),
        (
            with(|raw| raw.regions[1] = [1 << 32, 1 << 45, 1 << 44]),
            "the guest physical layout is not acceptable: the machine has more than 16 TiB",
        ),
        (with(|raw| raw.name = b"caf\xe9".to_vec()), "name is not printable UTF-8"),
        (with(|raw| raw.name = b"two\nlines".to_vec()), "name is not printable UTF-8"),
        (with(|raw| raw.name = b"\x1b[2Jclear".to_vec()), "name is not printable UTF-8"),
    ]
}

pub(crate) fn malformed() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut bystander = bystander(&mut fleet);
    let file = File::open("/dev/null").unwrap();
    let goods = Goods::new("half");
    let (no, yes) = (file.as_fd(), goods.ram.as_fd());
    let good = Raw::good().bytes();
    let by_descriptors: [Case<'_>; 8] = [
        (None, &[], "closed the hand-over socket before it handed anything over"),
        (Some(&good), &[], "0 descriptors came with the message where 2 were expected"),
        (Some(&good), &[yes], "1 descriptors came with the message where 2 were expected"),
        (Some(&good), &[yes, yes, yes], "more than the 2 descriptors expected"),
        (Some(&good), &[no; 100], "more than the 2 descriptors expected"),
        (Some(&good), &[no, no], "expected a userfaultfd, found a descriptor of /dev/null"),
        (Some(&good), &[no, yes], "expected a userfaultfd, found a descriptor of /dev/null"),
        (Some(&good), &[yes, no], "expected a userfaultfd, found a descriptor of /dev/null"),
    ];
    let by_message = messages();
    let both: &[BorrowedFd<'_>] = &[yes, yes];
    let cases = by_message.iter().map(|(bytes, text)| (Some(&bytes[..]), both, *text));
    let before = (fleet::descriptors(), fleet::word_mappings());
    for (message, descriptors, expected) in cases.chain(by_descriptors) {
        let (found, socket) = offer(&mut fleet, message, descriptors);
        assert!(found.contains(expected), "{expected:?} was expected, found: {found}");
        drop(socket);
        assert_eq!((fleet::descriptors(), fleet::word_mappings()), before, "leaked by: {found}");
        assert_eq!(fleet.see().machines().len(), 1, "{found}");
    }
    bystander.goes_on();
    bystander.finish();
    assert_eq!(fleet.incidents(), []);
}

pub(crate) fn random() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let mut bystander = bystander(&mut fleet);
    let file = File::open("/dev/null").unwrap();
    let before = fleet::descriptors();
    let first = seed();
    for seed in first..first + 1000 {
        let mut random = Random(seed);
        let mut bytes = Raw::good().bytes();
        if random.below(2) == 0 {
            bytes = (0..1 + random.below(DATAGRAM_MAX)).map(|_| random.next().to_le_bytes()[0]).collect();
        } else {
            for _ in 0..1 + random.below(8) {
                let place = random.below(bytes.len());
                bytes[place] = random.next().to_le_bytes()[0];
            }
        }
        let descriptors = vec![file.as_fd(); random.below(4)];
        let (found, socket) = offer(&mut fleet, Some(&bytes), &descriptors);
        drop(socket);
        assert_eq!(fleet::descriptors(), before, "seed {seed} leaks; refused with: {found}");
    }
    bystander.goes_on();
    bystander.finish();
    assert_eq!((fleet.incidents(), fleet.see().machines().len()), (vec![], 1));
}

pub(crate) fn is_told_why() {
    let mut fleet = Fleet::new(PLENTY, Arc::new(NoProbe));
    let file = File::open("/dev/null").unwrap();
    let (_, socket) =
        offer(&mut fleet, Some(&Raw::with(|raw| raw.version = 3)), &[file.as_fd(), file.as_fd()]);
    let mut bytes = [0; DATAGRAM_MAX];
    let received = fdpass::recv(&socket, &mut bytes, 0).unwrap();
    let received = received.expect("the socket closed without a word").bytes;
    let welcome = Welcome::decode(&bytes[..received]).unwrap();
    assert!(
        matches!(&welcome, Welcome::Refused { reason } if reason.contains("not acceptable")),
        "{welcome:?}"
    );
}

pub(crate) fn tables_beyond_the_budget() {
    // 32 GiB need 64 MiB of page words alone.
    let claim = ByteCount::mib(32 << 10);
    let mut fleet = Fleet::new(ByteCount::mib(48), Arc::new(NoProbe));
    let goods = Goods::new("giant");
    let region = Region { start: Gpa(0), bytes: claim };
    let layout = GuestLayout::new(vec![region]).unwrap();
    let hello = Hello { layout, hvas: vec![NOWHERE], ..goods.hello.clone() };
    let (socket, theirs) = seqpacket_pair().unwrap();
    fdpass::send(&theirs, &hello.encode(), &[goods.ram.as_fd(), goods.airlock.as_fd()]).unwrap();
    let before = fleet::word_mappings();
    let process = Pidfd::open(ProcessId::own()).unwrap();
    let admitted = fleet.manager().admit(socket, process, MEMBERSHIP);
    let error = admitted.expect_err("a claim was accepted whose page words alone exceed the budget");
    println!("{}", explain(&error));
    assert_eq!(fleet::word_mappings(), before);
}
