//! The walks of `plimsoll-mmu` against what KVM makes of a guest's own tables, by accesses and by KVM's own word (`KVM_TRANSLATE`).
//!
//! Enters: cases of `plimsoll-oracle`. Leaves: what they came to here. A program in ring 3 writes each case's words, so that KVM
//! sees the guest change its tables, and takes them back after the access with what they are by then. A fault ends the vCPU, as it does
//! in every machine of ours; CR2 says which. Where KVM pages in hardware this is the hardware, and elsewhere KVM's own code.
use super::{Host, Parts, VcpuFd};
use crate::config::HugePages;
use crate::memory::Memory;
use crate::probe::{self, Accel};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::VcpuExit;
use plimsoll_core::layout::{GuestLayout, Region};
use plimsoll_mmu::format::x86::{Long4, Maker};
use plimsoll_mmu::x86::{self, Control, Mode};
use plimsoll_mmu::{Access, Feature, Marks};
use plimsoll_oracle::x86::{Processor, USER, USER_PAGE, X86Case, own_tables};
use plimsoll_oracle::{Case, Chance, Expected, Outcome, Ram, Report};
use plimsoll_types::{ByteCount, Gpa};
use std::collections::BTreeMap;
use std::path::Path;

/// Of each kind.
const CASES: usize = 10_000;
/// Where the cases' RAM ends.
const RAM: ByteCount = ByteCount(2 << 30);
/// The tables of the program that swaps words: linear is physical there, and ring 3's.
const HOME: u64 = 0x30_0000;
/// Its code.
const SWAP: u64 = HOME + 0x3000;
/// Pairs of address and word.
const PAIRS: u64 = 4 << 20;
/// The port of all that ends as it should.
const PORT: u16 = 0x51f;
const RFLAGS_IOPL: u64 = 3 << 12;
/// What the program and the cases see of RAM below 2 GiB is mapped in pages of 2 MiB, which every processor has.
const USERS: u64 = HOME + 0x4000;
const SUPERVISORS: u64 = HOME + 0x6000;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = 0x23;
const ACCESSED_DIRTY_LARGE: u64 = 0xe3;
const FOR_USERS: u64 = 4;
/// In RAX before an access, and for an address that KVM does not translate: nothing that a case has in memory.
const NOTHING: u64 = 0xdead_0000_dead_0000;
const BREAKPOINT: u64 = 3;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
/// What a store writes (`plimsoll_oracle::x86`).
const STORED: u64 = 0x5354_4f52_4544_2121;

/// Swaps RCX words at the addresses at RSI with those beside them.
const SWAP_CODE: [u8; 25] = [
    0x48, 0x8b, 0x3e, // mov (%rsi), %rdi
    0x48, 0x8b, 0x46, 0x08, // mov 8(%rsi), %rax
    0x48, 0x87, 0x07, // xchg %rax, (%rdi)
    0x48, 0x89, 0x46, 0x08, // mov %rax, 8(%rsi)
    0x48, 0x83, 0xc6, 0x10, // add $16, %rsi
    0x48, 0xff, 0xc9, // dec %rcx
    0x75, 0xe9, // jnz back to the first
    0xef, // out %eax, %dx
    0xcc,
];
/// Eight bytes each: mov (%rdi), %rax; mov %rsi, (%rdi); jmp *%rdi, and out %eax, %dx.
const ACCESS_CODE: [u8; 24] = [
    0x48, 0x8b, 0x07, 0xef, 0xcc, 0xcc, 0xcc, 0xcc, 0x48, 0x89, 0x37, 0xef, 0xcc, 0xcc, 0xcc, 0xcc, 0xff,
    0xe7, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc,
];

/// "Guard hole, also reserved for hypervisor" (Linux, Documentation/arch/x86/x86_64/mm.rst).
const RESERVED: std::ops::Range<u64> = 0xffff_8000_0000_0000..0xffff_8800_0000_0000;

/// How KVM is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The guest accesses it.
    Access,
    /// `KVM_TRANSLATE`: a read in ring 0.
    Translate,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Port(u16),
    /// At a fault.
    Shutdown,
    /// At what KVM does not emulate, where it emulates ring 0: the breakpoint that is where fetches lead.
    NotEmulated,
}

/// A case as KVM is asked about it.
#[derive(Clone, Debug)]
struct Asked {
    case: X86Case<Long4>,
    way: Way,
}

impl Case for Asked {
    const OUTPUTS: [Option<&'static str>; 7] =
        [Some("vector"), None, Some("CR2"), Some("RAX, or the address"), None, None, None];

    fn head(&self) -> [u64; 8] {
        self.case.head()
    }

    fn memory(&self) -> &Ram {
        self.case.memory()
    }

    fn expect(&self) -> Expected {
        let mut expected = self.case.expect();
        if self.way == Way::Translate {
            let X86Case { registers, input, access, .. } = &self.case;
            let walked = x86::walk::<Long4, _>(self.memory(), registers, *input, *access, Marks::Leave);
            expected.outputs[2] = None;
            expected.outputs[3] = Some(walked.map_or(NOTHING, |walked| walked.output.0));
        }
        expected
    }

    fn path(&self) -> String {
        self.case.path()
    }
}

/// A machine with a vCPU that executes cases.
struct Bench {
    memory: Memory,
    vcpu: VcpuFd,
    home: kvm_sregs,
    processor: Processor,
    /// What of CR4 there is here.
    control: Control,
    /// `kvm_pvm` runs ring 3 in tables that have itself in the reserved range.
    is_pvm: bool,
}

impl Bench {
    /// `None` without KVM.
    fn new() -> Option<Self> {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        let layout = GuestLayout::new(vec![Region { start: Gpa(0), bytes: RAM }]).unwrap();
        let memory = Memory::map(layout, HugePages::Never, Vec::new(), &[]).unwrap();
        let mut words = own_tables();
        // In place of its pages of 1 GiB.
        for word in words.values_mut().filter(|word| **word & LARGE != 0) {
            *word = (SUPERVISORS + (*word >> 30 << 12)) | TABLE;
        }
        let upper = HOME + 0x1000;
        words.insert(HOME, upper | TABLE | FOR_USERS);
        for gib in 0..2 {
            words.insert(upper + gib * 8, (USERS + (gib << 12)) | TABLE | FOR_USERS);
        }
        for block in 0..RAM.0 >> 21 {
            let leaf = block << 21 | ACCESSED_DIRTY_LARGE;
            words.insert(USERS + block * 8, leaf | FOR_USERS);
            words.insert(SUPERVISORS + block * 8, leaf);
        }
        for (at, word) in words {
            memory.write_u64(Gpa(at), word).unwrap();
        }
        memory.write(Gpa(USER_PAGE), &ACCESS_CODE).unwrap();
        memory.write(Gpa(SWAP), &padded(&SWAP_CODE)).unwrap();
        let (processor, control) = processor(&host);
        let accel = probe::describe_kvm(Path::new("/sys/module"));
        let is_pvm = matches!(accel, Accel::Kvm { module, .. } if module == "kvm_pvm");
        let vcpu = Parts::create(&host, 1, 1).unwrap().attach(&memory, Gpa(SWAP)).unwrap().remove(0).fd;
        let home = kvm_sregs { cr3: HOME, ..vcpu.get_sregs().unwrap() };
        Some(Self { memory, vcpu, home, processor, control, is_pvm })
    }

    /// Cases that this processor can be asked, all accesses of which are an instruction's.
    fn cases(&self, seed: u64, way: Way) -> Vec<Asked> {
        let mut chance = Chance::new(seed);
        let mut cases = Vec::new();
        while cases.len() < CASES {
            let mut case = X86Case::<Long4>::draw(&mut chance, &self.processor);
            let before = case.expect().kind;
            case.registers.caps.keys = Feature::Off;
            case.registers.control &= self.control;
            // What the keys withheld may lead where no case goes.
            let is_same = case.expect().kind == before;
            if !is_same || case.access.1 == Mode::Implicit {
                continue;
            }
            if self.is_pvm && case.access.1 == Mode::User && RESERVED.contains(&case.input.0) {
                continue;
            }
            if way == Way::Translate {
                // KVM looks at as many bits as are translated.
                if before == "not canonical" {
                    continue;
                }
                case.access = (Access::Read, Mode::Supervisor);
                if case.expect().kind.starts_with("outside") {
                    continue;
                }
            }
            cases.push(Asked { case, way });
        }
        cases
    }

    fn enter(&self, special: &kvm_sregs, general: kvm_regs) {
        // Whatever was being delivered when the vCPU ended.
        self.vcpu.set_vcpu_events(&kvm_vcpu_events::default()).unwrap();
        self.vcpu.set_sregs(special).unwrap();
        self.vcpu.set_regs(&general).unwrap();
    }

    /// Runs to the port, or to a fault.
    fn run(&mut self) -> End {
        loop {
            let port = match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) => port,
                Ok(VcpuExit::Shutdown) => return End::Shutdown,
                Ok(VcpuExit::InternalError) => return End::NotEmulated,
                Ok(exit) => panic!("{exit:?}"),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => continue,
                Err(error) => panic!("KVM_RUN: {error}"),
            };
            // An exit is complete when the vCPU enters again, and not before.
            self.vcpu.set_kvm_immediate_exit(1);
            let left = self.vcpu.run().map(|exit| format!("{exit:?}"));
            assert_eq!(left.map_err(|error| error.errno()), Err(libc::EINTR));
            self.vcpu.set_kvm_immediate_exit(0);
            return End::Port(port);
        }
    }

    /// Has the guest swap so many words with those of the list.
    fn swap(&mut self, count: usize) {
        let general = kvm_regs {
            rip: SWAP,
            rsi: PAIRS,
            rcx: count as u64,
            rdx: u64::from(PORT),
            rflags: 2 | RFLAGS_IOPL,
            ..kvm_regs::default()
        };
        let home = self.home;
        self.enter(&home, general);
        assert_eq!(self.run(), End::Port(PORT), "{:?}", self.vcpu.get_regs());
    }

    fn execute(&mut self, asked: &Asked) -> Outcome {
        let words = asked.memory().words();
        let pairs: Vec<u8> =
            words.iter().flat_map(|(at, word)| [*at, *word]).flat_map(u64::to_le_bytes).collect();
        self.memory.write(Gpa(PAIRS), &pairs).unwrap();
        self.swap(words.len());
        let outputs = self.ask(asked);
        self.swap(words.len());
        let after = words.keys().zip(0..).map(|(at, number)| {
            let word = self.memory.read_u64(Gpa(PAIRS + number * 16 + 8)).unwrap();
            (*at, word)
        });
        Outcome { outputs, after: after.collect::<BTreeMap<_, _>>() }
    }

    fn ask(&mut self, asked: &Asked) -> [u64; 7] {
        let [_, input, cr3, cr0, cr4, efer, _, flags] = asked.head();
        let (access, mode) = asked.case.access;
        let mut special = kvm_sregs { cr0, cr2: 0, cr3, cr4, efer, ..self.home };
        let stub = match access {
            Access::Read => 0,
            Access::Write => 8,
            Access::Fetch => 16,
        };
        let mut rip = USER + stub;
        if mode == Mode::Supervisor {
            rip = USER_PAGE + stub;
            (special.cs.selector, special.cs.dpl) = (0x10, 0);
            (special.ss.selector, special.ss.dpl) = (0x18, 0);
        }
        let general = kvm_regs {
            rip,
            rax: NOTHING,
            rdx: u64::from(PORT),
            rdi: input,
            rsi: STORED,
            rflags: flags | RFLAGS_IOPL,
            ..kvm_regs::default()
        };
        self.enter(&special, general);
        if asked.way == Way::Translate {
            let found = self.vcpu.translate_gva(input).unwrap();
            return match found.valid {
                0 => [PAGE_FAULT, 0, 0, NOTHING, 0, 0, 0],
                _ => [BREAKPOINT, 0, 0, found.physical_address, 0, 0, 0],
            };
        }
        let ended = self.run();
        let (rax, fault) = (self.vcpu.get_regs().unwrap().rax, self.vcpu.get_sregs().unwrap().cr2);
        let vector = match (ended, access) {
            (End::Port(PORT), Access::Read | Access::Write) => BREAKPOINT,
            // What is there breaks, which ends the vCPU as well.
            (End::Shutdown | End::NotEmulated, Access::Fetch) if fault == 0 && rax != NOTHING => BREAKPOINT,
            (End::Shutdown, _) if fault == 0 => GENERAL_PROTECTION,
            (End::Shutdown, _) => PAGE_FAULT,
            (end, _) => panic!("{end:?} of {asked:?}: {:?}", self.vcpu.get_regs()),
        };
        [vector, 0, fault, rax, 0, 0, 0]
    }
}

/// What KVM lets a guest have of what walks depend on.
fn processor(host: &Host) -> (Processor, Control) {
    let cpuid = host.kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    let leaf =
        |function| cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == 0);
    let mut processor = Processor::default();
    let caps = &mut processor.caps;
    caps.physical_bits = leaf(0x8000_0008).map_or(36, |entry| entry.eax & 0xff);
    let has = |register: Option<u32>, bit: u32| register.is_some_and(|bits| bits >> bit & 1 == 1);
    caps.gib_pages = match has(leaf(0x8000_0001).map(|entry| entry.edx), 26) {
        true => Feature::On,
        false => Feature::Off,
    };
    // EBX of "AuthenticAMD" and "HygonGenuine".
    let vendor = leaf(0).map(|entry| entry.ebx.to_le_bytes());
    caps.maker = match vendor.as_ref().map(|vendor| &vendor[..]) {
        Some(b"Auth" | b"Hygo") => Maker::Amd,
        _ => Maker::Intel,
    };
    let features = leaf(7).map(|entry| entry.ebx);
    let mut control = Control::WRITE_PROTECT | Control::ALIGNMENT_CHECK;
    control.set(Control::SMEP, has(features, 7));
    control.set(Control::SMAP, has(features, 20));
    (processor, control)
}

/// Whole words.
fn padded(code: &[u8]) -> Vec<u8> {
    let mut bytes = code.to_vec();
    bytes.resize(code.len().next_multiple_of(8), 0xcc);
    bytes
}

/// Fails on any mismatch, and where hardly any case was translated, or faulted.
fn agree(way: Way) {
    let Some(mut bench) = Bench::new() else { return };
    let cases = bench.cases(1, way);
    let outcomes: Vec<Outcome> = cases.iter().map(|asked| bench.execute(asked)).collect();
    let report = Report::new(&cases, &outcomes);
    println!("{:?} {:?} {way:?}: {report}", bench.processor, bench.control);
    let first: Vec<String> = report.mismatches.iter().take(5).map(ToString::to_string).collect();
    assert!(report.mismatches.is_empty(), "{}", first.join("\n"));
    let translated = report.kinds.iter().filter(|(kind, _)| kind.starts_with("translated"));
    let translated: usize = translated.map(|(_, count)| count).sum();
    assert!((CASES / 10..=CASES * 9 / 10).contains(&translated), "{translated}");
    // The same outcomes against a crate that is wrong in one respect.
    let mut mistaken = cases;
    mistaken.iter_mut().for_each(|asked| asked.case.registers.caps.no_execute = Feature::On);
    let found = Report::new(&mistaken, &outcomes).mismatches.len();
    assert!(found > 0, "nobody would notice a crate that is wrong about NX");
}

#[test]
fn a_guests_accesses_and_faults_by_its_own_tables_are_what_the_walk_says() {
    agree(Way::Access);
}

#[test]
fn kvm_translates_by_a_guests_tables_as_the_walk_does() {
    agree(Way::Translate);
}
