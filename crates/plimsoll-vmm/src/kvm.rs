//! The machine as KVM runs it: memory slots, vCPU state, exits.
//!
//! Enters: mapped memory and an entry point. Leaves: vCPUs that start in 64-bit user mode, and how each ended. What must
//! never happen: a slot outliving the mapping behind it, or an exit being ignored because it was not expected.
//!
//! # State of a vCPU at its start
//! CPL 3 and IOPL 3 in long mode: on a host without hardware paging ring 3 runs natively and ring 0 is emulated an
//! instruction at a time, and `out` at IOPL 3 needs no ring 0 at all. Flat segments with the selectors of an ordinary
//! kernel's user mode (code 0x33, data 0x2b), paging and SSE on. Both descriptor tables are empty: nothing loads a
//! segment, and every exception is a triple fault that ends the machine.
//!
//! # Getting a vCPU out
//! A signal interrupts `KVM_RUN`, also while it waits for a page. The thread looks at the order to leave before it enters
//! again. A signal that arrives between the look and the entry is lost, so whoever kicks repeats it until the thread has
//! answered.
#![expect(unsafe_code, reason = "a memory slot is an address that KVM writes through")]

#[cfg(test)]
mod walks;

use crate::control::{Registers, Segment};
use crate::machine::{Death, End, Going, Machine};
use crate::memory::Memory;
use kvm_bindings::{
    KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES, kvm_dtable, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use plimsoll_guest::abi;
use plimsoll_types::Gpa;
use std::io;
use std::time::Instant;
use thiserror::Error;

/// Protection enabled, coprocessor state as SSE needs it (MP, ET, NE), write protection, alignment mask, paging.
const CR0: u64 = 0x8005_0033;
/// Physical address extension, SSE instructions and their exceptions.
const CR4: u64 = 0x620;
/// Long mode enabled and active, no-execute.
const EFER: u64 = 0xd00;
/// IOPL 3 and the bit that is always set.
const RFLAGS: u64 = 0x3002;
/// `KVM_CREATE_VM` is interrupted by any signal; more attempts than signals ever arrive.
const CREATE_ATTEMPTS: u32 = 100;

/// KVM cannot run the machine. The host is at fault.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is no device.
    #[error("/dev/kvm does not exist: load the KVM module, or enable nested virtualisation for this host")]
    NoDevice,
    /// The device is not for this user.
    #[error(
        "no permission to open /dev/kvm: add this user to the group that owns it (usually kvm), or run as root"
    )]
    Denied,
    /// Another interface than the one everybody has had since 2007.
    #[error("KVM speaks API version {found} instead of {KVM_API_VERSION}")]
    Version {
        /// What it speaks.
        found: i32,
    },
    /// A capability is missing.
    #[error("KVM lacks the capability {name}")]
    Capability {
        /// Its name in the kernel.
        name: &'static str,
    },
    /// Too few memory slots.
    #[error("the machine needs {needed} memory slots and KVM has {found}")]
    Slots {
        /// As laid out.
        needed: usize,
        /// As KVM says.
        found: usize,
    },
    /// Too many vCPUs.
    #[error("the machine has {asked} vCPUs; KVM runs at most {found} here")]
    Vcpus {
        /// As configured.
        asked: u32,
        /// As KVM says.
        found: usize,
    },
    /// KVM keeps the speed of the time-stamp counter to itself.
    #[error("KVM does not say how fast the time-stamp counter runs")]
    NoClock,
    /// A call failed.
    #[error("{call} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call { call, source: io::Error::from_raw_os_error(error.errno()) }
}

/// An open `/dev/kvm` whose capabilities suffice.
pub(crate) struct Host {
    kvm: Kvm,
}

impl Host {
    /// Opens it and checks what it can do.
    pub(crate) fn open() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::NoDevice,
            libc::EACCES | libc::EPERM => KvmError::Denied,
            _ => failed("opening /dev/kvm")(error),
        })?;
        let version = kvm.get_api_version();
        if u32::try_from(version) != Ok(KVM_API_VERSION) {
            return Err(KvmError::Version { found: version });
        }
        for (cap, name) in [
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Capability { name });
            }
        }
        Ok(Self { kvm })
    }

    fn create_vm(&self) -> Result<VmFd, KvmError> {
        let mut attempts = 0;
        loop {
            match self.kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR && attempts < CREATE_ATTEMPTS => attempts += 1,
                result => return result.map_err(failed("KVM_CREATE_VM")),
            }
        }
    }
}

/// Whether KVM can create a machine at all.
pub(crate) fn check() -> Result<(), KvmError> {
    Host::open()?.create_vm().map(|_| ())
}

/// A machine of KVM's. Its slots point into [`Memory`], so it must not outlive that: see [`Parts::attach`].
pub(crate) struct Parts {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    tsc_hz: u64,
}

/// One vCPU, and the machine it belongs to.
pub(crate) struct Vcpu {
    fd: VcpuFd,
    index: u32,
}

impl Parts {
    /// Creates the machine and its vCPUs, without memory.
    pub(crate) fn create(host: &Host, vcpus: u32, regions: usize) -> Result<Self, KvmError> {
        let found = host.kvm.get_nr_memslots();
        if regions > found {
            return Err(KvmError::Slots { needed: regions, found });
        }
        let found = host.kvm.get_max_vcpus();
        if usize::try_from(vcpus).map_or(true, |asked| asked > found) {
            return Err(KvmError::Vcpus { asked: vcpus, found });
        }
        let vm = host.create_vm()?;
        let cpuid =
            host.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        let create = |index: u32| {
            let vcpu = vm.create_vcpu(u64::from(index)).map_err(failed("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
            Ok(vcpu)
        };
        let vcpus = (0..vcpus).map(create).collect::<Result<Vec<_>, KvmError>>()?;
        let khz = vcpus.first().and_then(|vcpu| vcpu.get_tsc_khz().ok()).filter(|khz| *khz > 0);
        let tsc_hz = u64::from(khz.ok_or(KvmError::NoClock)?) * 1000;
        Ok(Self { vm, vcpus, tsc_hz })
    }

    /// Ticks of the guest's clock in a second.
    pub(crate) const fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Gives the machine its memory and its vCPUs their state. The vCPUs returned must run only while `memory` lives.
    pub(crate) fn attach(self, memory: &Memory, entry: Gpa) -> Result<Vec<Vcpu>, KvmError> {
        let regions = memory.layout().regions().iter().zip(memory.mappings());
        for ((region, mapping), slot) in regions.zip(0u32..) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start.0,
                memory_size: region.bytes.0,
                userspace_addr: mapping.base().0,
            };
            // SAFETY: the mapping is exactly as long as its region, was made for it, and is accessed by this program
            // with atomics only, so the guest's writes contradict no reference. Regions of a layout do not overlap.
            // When `memory` is dropped the kernel takes the pages away and the slot then points at nothing that KVM
            // would touch without a vCPU running; vCPUs run on threads that hold `memory`. Should other memory be
            // mapped there later, only a `KVM_RUN` of these very vCPUs could reach it, and they are gone by then.
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let start = |(fd, index): (VcpuFd, u32)| {
            set_state(&fd, index, entry)?;
            Ok(Vcpu { fd, index })
        };
        self.vcpus.into_iter().zip(0..).map(start).collect()
    }
}

fn set_state(vcpu: &VcpuFd, index: u32, entry: Gpa) -> Result<(), KvmError> {
    let mut special = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x2b,
        // Writable data, accessed.
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..kvm_segment::default()
    };
    // Readable code, accessed; 64-bit, which excludes the default size bit.
    special.cs = kvm_segment { selector: 0x33, type_: 11, db: 0, l: 1, ..flat };
    for segment in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
        *segment = flat;
    }
    special.gdt.limit = 0;
    special.idt.limit = 0;
    special.cr0 = CR0;
    special.cr3 = abi::PAGE_TABLES_GPA;
    special.cr4 = CR4;
    special.efer = EFER;
    vcpu.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
    let general = kvm_regs {
        rip: entry.0,
        rdi: u64::from(index),
        rsp: abi::stack_top(index),
        rflags: RFLAGS,
        ..kvm_regs::default()
    };
    vcpu.set_regs(&general).map_err(failed("KVM_SET_REGS"))
}

/// A segment with the descriptor's bits where they are in its upper half.
fn segment(segment: kvm_segment) -> Segment {
    let flags = [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ];
    Segment {
        selector: u64::from(segment.selector),
        base: segment.base,
        limit: u64::from(segment.limit),
        flags: flags.into_iter().map(|(bits, place)| u64::from(bits) << place).sum(),
    }
}

/// What an exit asks for, free of the vCPU it came from.
enum Exit {
    Out { port: u16, bytes: usize },
    Memory { gpa: Gpa },
    Shutdown,
    Other(String),
}

impl Vcpu {
    /// Runs the guest until it ends or the machine is told to leave.
    pub(crate) fn run(&mut self, machine: &Machine) -> End {
        while machine.going() == Going::On {
            if machine.is_asked(self.index) {
                let since = Instant::now();
                machine.tell(
                    self.index,
                    self.registers().map_err(|error| plimsoll_linux::explain(&error)),
                    since,
                );
            }
            if !machine.enter() {
                machine.stand(self.index);
                continue;
            }
            let ran = self.fd.run();
            let exit = match ran {
                Ok(VcpuExit::IoOut(port, data)) => Exit::Out { port, bytes: data.len() },
                Ok(VcpuExit::MmioRead(gpa, _) | VcpuExit::MmioWrite(gpa, _)) => {
                    Exit::Memory { gpa: Gpa(gpa) }
                }
                Ok(VcpuExit::MemoryFault { gpa, .. }) => Exit::Memory { gpa: Gpa(gpa) },
                Ok(VcpuExit::Shutdown) => Exit::Shutdown,
                Ok(other) => Exit::Other(format!("{other:?}")),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    machine.exit();
                    match machine.poisoned() {
                        Some(death) => return End::Died(death),
                        None => continue,
                    }
                }
                Err(error) => Exit::Other(format!("KVM_RUN failed: {error}")),
            };
            let end = match exit {
                Exit::Out { port, bytes } => machine.port(self.index, port, bytes, || self.rip()),
                Exit::Memory { gpa } => Some(End::Died(Death::OutsideRam { gpa, rip: self.rip() })),
                Exit::Shutdown => Some(End::Died(Death::Faulted { rip: self.rip(), fault: self.fault() })),
                Exit::Other(exit) => Some(End::Died(Death::Kvm { exit, rip: self.rip() })),
            };
            // What a guest asks for changes its memory, too: it is out once that is done.
            machine.exit();
            if let Some(end) = end {
                return end;
            }
        }
        End::Left
    }

    /// All that a debugger would ask for.
    fn registers(&self) -> Result<Registers, KvmError> {
        let general = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let special = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let [es, cs, ss, ds] = [special.es, special.cs, special.ss, special.ds];
        let segments = [es, cs, ss, ds, special.fs, special.gs, special.ldt, special.tr].map(segment);
        let table = |table: kvm_dtable| (table.base, u64::from(table.limit));
        Ok(Registers {
            general: [
                general.rax,
                general.rbx,
                general.rcx,
                general.rdx,
                general.rsi,
                general.rdi,
                general.rbp,
                general.rsp,
                general.r8,
                general.r9,
                general.r10,
                general.r11,
                general.r12,
                general.r13,
                general.r14,
                general.r15,
            ],
            rip: general.rip,
            rflags: general.rflags,
            segments,
            tables: [table(special.gdt), table(special.idt)],
            control: [special.cr0, special.cr2, special.cr3, special.cr4],
            efer: special.efer,
            privilege: u64::from(ss.dpl),
        })
    }

    /// Where the guest is, 0 if KVM does not say. For messages.
    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |registers| registers.rip)
    }

    /// The last address that had no mapping, 0 if KVM does not say. For messages.
    fn fault(&self) -> u64 {
        self.fd.get_sregs().map_or(0, |registers| registers.cr2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot;
    use crate::config::HugePages;
    use crate::signals;
    use plimsoll_core::layout::{GuestLayout, Region};
    use plimsoll_sys::eventfd::EventFd;
    use plimsoll_types::ByteCount;
    use std::sync::Arc;
    use std::thread;
    use vmm_sys_util::signal::Killable;

    const ENTRY: u64 = abi::IMAGE_GPA;

    /// A machine with one vCPU that will execute `code`, or `None` where there is no KVM.
    fn machine(code: &[u8]) -> Option<(Arc<Machine>, Vcpu)> {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                println!("SKIPPED: {error}");
                return None;
            }
        };
        signals::install().unwrap();
        let region = |mib: u64, len| Region { start: Gpa(mib << 20), bytes: ByteCount::mib(len) };
        let layout = GuestLayout::new(vec![region(0, 6), region(16, 2)]).unwrap();
        let memory = Memory::map(layout, HugePages::Never, Vec::new(), &[]).unwrap();
        let tables = boot::page_tables(memory.layout()).unwrap();
        memory.write(tables.start, &tables.bytes).unwrap();
        let mut bytes = code.to_vec();
        bytes.resize(64, 0x90);
        memory.write(Gpa(ENTRY), &bytes).unwrap();
        let mut vcpus = Parts::create(&host, 1, 2).unwrap().attach(&memory, Gpa(ENTRY)).unwrap();
        memory.pin_for_life(Gpa(abi::PARAMS_GPA), ByteCount(2 * abi::PAGE_SIZE)).unwrap();
        Some((Arc::new(Machine::new(memory, None, 1, 1, EventFd::new().unwrap())), vcpus.remove(0)))
    }

    fn death(code: &[u8]) -> Option<Death> {
        let (machine, mut vcpu) = machine(code)?;
        match vcpu.run(&machine) {
            End::Died(death) => Some(death),
            end => panic!("the guest should have died, not {end:?}"),
        }
    }

    #[test]
    fn an_access_to_a_hole_ends_the_guest_with_place_and_address() {
        // mov rax, [12 MiB]; in the hole, which the page tables do not map
        let code = [0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0xc0, 0x00];
        match death(&code) {
            None | Some(Death::Faulted { rip: ENTRY, fault: 0xc0_0000 }) => {}
            Some(other) => panic!("{other}"),
        }
    }

    #[test]
    fn a_page_table_that_points_into_a_hole_ends_the_guest_too() {
        // mov qword [first directory's entry for 12 MiB], 12 MiB | user, writable, present, large; mov rax, [12 MiB]
        let code = [
            0x48, 0xc7, 0x04, 0x25, 0x30, 0x20, 0x10, 0x00, 0xe7, 0x00, 0xc0, 0x00, //
            0x48, 0x8b, 0x04, 0x25, 0x00, 0x00, 0xc0, 0x00,
        ];
        match death(&code) {
            None => {}
            Some(Death::OutsideRam { gpa: Gpa(0xc0_0000), .. }) => {}
            Some(other) => panic!("{other}"),
        }
    }

    #[test]
    fn ports_that_mean_nothing_and_writes_of_other_sizes_end_the_guest() {
        // mov edx, 0x80; out dx, eax
        let code = [0xba, 0x80, 0x00, 0x00, 0x00, 0xef];
        assert!(matches!(death(&code), None | Some(Death::Port { port: 0x80, bytes: 4, .. })));
        // mov edx, PORT_REPORT; out dx, al
        let code = [0xba, 0x10, 0x05, 0x00, 0x00, 0xee];
        assert!(matches!(death(&code), None | Some(Death::Port { port: abi::PORT_REPORT, bytes: 1, .. })));
    }

    #[test]
    fn a_guest_that_gives_back_what_the_vmm_uses_or_what_is_not_its_own_dies() {
        // The channel page: request_gpa = 0x1000, request_len = 0x1000; then mov edx, PORT_DISCARD; out dx, eax
        let discard = |gpa: u8, len: u8| {
            let channel = [0x48, 0xc7, 0x04, 0x25];
            let mut code = channel.to_vec();
            code.extend([0x40, 0x20, 0, 0, 0, gpa, 0, 0]);
            code.extend(channel);
            code.extend([0x48, 0x20, 0, 0, 0, len, 0, 0]);
            code.extend([0xba, 0x11, 0x05, 0, 0, 0xef]);
            death(&code)
        };
        for (gpa, len) in [(0x10, 0x10), (0x20, 0x10)] {
            let death = discard(gpa, len);
            assert!(
                matches!(death, None | Some(Death::Discard(crate::DiscardError::Pinned { .. }))),
                "{death:?}"
            );
        }
        let death = discard(0x40, 0x08);
        assert!(
            matches!(death, None | Some(Death::Discard(crate::DiscardError::NotPages { .. }))),
            "{death:?}"
        );
    }

    #[test]
    fn a_vcpu_that_never_exits_leaves_when_kicked() {
        // jmp to itself
        let Some((machine, mut vcpu)) = machine(&[0xeb, 0xfe]) else { return };
        let shared = Arc::clone(&machine);
        let thread = thread::spawn(move || vcpu.run(&shared));
        machine.leave();
        while !thread.is_finished() {
            thread.kill(signals::kick_number()).unwrap();
            thread::yield_now();
        }
        assert!(matches!(thread.join().unwrap(), End::Left));
    }

    /// Where an address leads by the tables that these registers name, as far as the guest's memory has them: large pages count.
    fn walk(machine: &Machine, registers: &Registers, gva: u64) -> Option<u64> {
        const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
        let mut table = registers.control[2] & ADDRESS;
        for shift in [39, 30, 21, 12] {
            let entry = machine.memory.read_u64(Gpa(table | (gva >> shift & 0x1ff) << 3)).unwrap();
            let inside = (1 << shift) - 1;
            match (entry & 1, shift == 12 || entry & 0x80 != 0) {
                (0, _) => return None,
                (_, true) => return Some((entry & ADDRESS & !inside) | (gva & inside)),
                (_, false) => table = entry & ADDRESS,
            }
        }
        None
    }

    #[test]
    fn registers_of_a_vcpu_that_never_exits_lead_to_what_it_wrote_by_tables_of_its_own() {
        // mov qword [first directory's entry for 12 MiB], 4 MiB | user, writable, present, large; mov rax, N;
        // mov [12 MiB + 0x1238], rax; jmp to itself
        let code = [
            0x48, 0xc7, 0x04, 0x25, 0x30, 0x20, 0x10, 0x00, 0xe7, 0x00, 0x40, 0x00, //
            0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8, //
            0x48, 0x89, 0x04, 0x25, 0x38, 0x12, 0xc0, 0x00, //
            0xeb, 0xfe,
        ];
        let end = ENTRY + code.len() as u64 - 2;
        let (gva, written) = (0xc0_1238, 0x0807_0605_0403_0201);
        let Some((machine, mut vcpu)) = machine(&code) else { return };
        let shared = Arc::clone(&machine);
        let thread = thread::spawn(move || vcpu.run(&shared));
        let since = Instant::now();
        let registers = loop {
            machine.ask(0);
            let told = loop {
                assert!(since.elapsed().as_secs() < 60, "the vCPU does not say its registers");
                thread.kill(signals::kick_number()).unwrap();
                match machine.told() {
                    Some(told) => break told,
                    None => thread::yield_now(),
                }
            };
            let registers = told.registers.unwrap();
            if registers.rip == end {
                break registers;
            }
        };
        assert_eq!((registers.general[0], registers.privilege), (written, 3));
        assert_eq!((registers.control[0], registers.control[3], registers.efer), (CR0, CR4, EFER));
        assert_eq!((registers.segments[1].selector, registers.segments[1].flags), (0x33, 0x00a0_fb00));
        let gpa = walk(&machine, &registers, gva).unwrap();
        assert_eq!((gpa, machine.memory.read_u64(Gpa(gpa)).unwrap()), (0x40_1238, written));
        assert_eq!(walk(&machine, &registers, 0x80_0000), None);
        machine.leave();
        while !thread.is_finished() {
            thread.kill(signals::kick_number()).unwrap();
            thread::yield_now();
        }
        assert!(matches!(thread.join().unwrap(), End::Left));
    }

    #[test]
    fn more_than_kvm_offers_is_refused_with_its_number() {
        let Ok(host) = Host::open() else {
            println!("SKIPPED: no KVM");
            return;
        };
        let vcpus = Parts::create(&host, 1 << 20, 1).err();
        assert!(matches!(vcpus, Some(KvmError::Vcpus { asked: 0x10_0000, .. })));
        let slots = Parts::create(&host, 1, 1 << 20).err();
        assert!(matches!(slots, Some(KvmError::Slots { needed: 0x10_0000, .. })));
    }
}
