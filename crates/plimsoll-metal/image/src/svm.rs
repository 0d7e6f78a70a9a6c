//! Guests on the processor: the control block, the world switch, and why it came back.
//!
//! Enters: a virtual processor's state. Leaves: the same, later, and an [`Exit`]. AMD APM vol. 2, chapter 15; the control block's
//! layout is appendix B. What must never happen: a guest entered with an instruction, port or register of the machine's that
//! is not intercepted and could reach anything beside its own memory; a guest entered with translations of pages that were
//! taken from it.
//!
//! The guest programs take no interrupts and handle no exceptions, so every exception is intercepted; one that is not the shadow tables'
//! own ends the guest.
use crate::cpu::Features;
use crate::memory::{Frame, Memory};
use alloc::boxed::Box;
use core::arch::global_asm;
use core::mem::offset_of;
use plimsoll_core::frames::buddy::{FramesError, Kind};
use plimsoll_guest::abi;
use plimsoll_mmu::Access;
use plimsoll_types::{Gpa, Hpa};
use x86_64::registers::model_specific::{Efer, EferFlags, Msr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

const VM_CR: u32 = 0xc001_0114;
/// VM_CR: SVM is switched off, and cannot be switched on.
const SVM_DISABLED: u64 = 1 << 4;
const VM_HSAVE_PA: u32 = 0xc001_0117;

/// Paging, write protection, x87 errors as exceptions, protected mode.
const CR0: u64 = 0x8005_0033;
/// PAE, SSE and its exceptions.
const CR4: u64 = 0x620;
/// NXE, LMA, LME, and SVME, which a guest must have set.
const EFER: u64 = 0x1d00;
/// Global pages.
const CR4_GLOBAL: u64 = 1 << 7;
const TRAP: u64 = 1 << 8;
/// IOPL 3, and the bit that is always set.
const RFLAGS: u64 = 0x3002;
/// What the PAT is after reset.
const PAT: u64 = 0x0007_0406_0007_0406;

const READ_CR3: u32 = 1 << 3;
const WRITE_CR3: u32 = 1 << 19;
/// INTR, NMI, INIT; CPUID, INVD, HLT; INVLPG, INVLPGA; ports, MSRs; shutdown.
const INTERCEPT_3: u32 =
    1 | 1 << 1 | 1 << 3 | 1 << 18 | 1 << 22 | 1 << 24 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31;
const INVLPG: u32 = 1 << 25;
/// All of SVM's own instructions, WBINVD, MONITOR, MWAIT, XSETBV.
const INTERCEPT_4: u32 = 0x7f | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 13;
/// The host's interrupt flag counts, not the guest's.
const V_INTR_MASKING: u64 = 1 << 24;

/// A bitmap of ports, or of MSRs, that intercepts all.
#[repr(C, align(4096))]
struct All<const BYTES: usize>([u8; BYTES]);
static ALL_PORTS: All<{ 3 << 12 }> = All([0xff; 3 << 12]);
static ALL_MSRS: All<{ 2 << 12 }> = All([0xff; 2 << 12]);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Segment {
    selector: u16,
    /// Bits 47:40 and 55:52 of a descriptor.
    attributes: u16,
    limit: u32,
    base: u64,
}

/// The control block, with names for what is used here.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Vmcb {
    intercept_registers: [u32; 2],
    intercept_exceptions: u32,
    intercept_3: u32,
    intercept_4: u32,
    reserved_1: [u32; 11],
    io_map: u64,
    msr_map: u64,
    tsc_offset: u64,
    asid: u32,
    tlb_control: u32,
    virtual_interrupts: u64,
    interrupt_shadow: u64,
    exit_code: u64,
    exit_info: [u64; 2],
    exit_interrupt: u64,
    nested_paging: u64,
    reserved_2: [u64; 2],
    event: u64,
    nested_root: u64,
    reserved_3: [u64; 105],
    /// ES, CS, SS, DS, FS, GS, GDTR, LDTR, IDTR, TR.
    segments: [Segment; 10],
    reserved_4: [u8; 43],
    cpl: u8,
    reserved_5: u32,
    efer: u64,
    reserved_6: [u64; 14],
    cr4: u64,
    cr3: u64,
    cr0: u64,
    dr7: u64,
    dr6: u64,
    rflags: u64,
    rip: u64,
    reserved_7: [u64; 11],
    rsp: u64,
    reserved_8: [u64; 3],
    rax: u64,
    reserved_9: [u64; 8],
    cr2: u64,
    reserved_10: [u64; 4],
    pat: u64,
    reserved_11: [u64; 306],
}

const _: () = {
    assert!(offset_of!(Vmcb, io_map) == 0x40 && offset_of!(Vmcb, asid) == 0x58);
    assert!(offset_of!(Vmcb, exit_code) == 0x70 && offset_of!(Vmcb, nested_paging) == 0x90);
    assert!(offset_of!(Vmcb, event) == 0xa8 && offset_of!(Vmcb, nested_root) == 0xb0);
    assert!(offset_of!(Vmcb, segments) == 0x400 && offset_of!(Vmcb, cpl) == 0x4cb);
    assert!(offset_of!(Vmcb, efer) == 0x4d0 && offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, rip) == 0x578 && offset_of!(Vmcb, rsp) == 0x5d8);
    assert!(offset_of!(Vmcb, rax) == 0x5f8 && offset_of!(Vmcb, cr2) == 0x640);
    assert!(offset_of!(Vmcb, pat) == 0x668 && size_of::<Vmcb>() == 4096);
};

/// The registers that the world switch does not exchange by itself.
#[repr(C, align(16))]
struct Registers {
    /// rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    general: [u64; 14],
    guest_sse: [u8; 512],
    host_sse: [u8; 512],
    /// The time-stamp counter before and after the guest ran, `SWITCH_INSTRUCTIONS` (`plimsoll_metal::run`) of the hypervisor's own between.
    entered: u64,
    left: u64,
}

const GUEST_SSE: usize = offset_of!(Registers, guest_sse);
const HOST_SSE: usize = offset_of!(Registers, host_sse);
const ENTERED: usize = offset_of!(Registers, entered);
const LEFT: usize = offset_of!(Registers, left);

const RDX: usize = 2;

/// Where a general register is kept.
#[derive(Clone, Copy)]
enum Place {
    Rax,
    Rsp,
    General(usize),
}

/// By their numbers: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
const PLACES: [Place; 16] = {
    use Place::General;
    let mut places = [General(0); 16];
    let low =
        [Place::Rax, General(1), General(2), General(0), Place::Rsp, General(5), General(3), General(4)];
    let mut number = 0;
    while number < 16 {
        places[number] = if number < 8 { low[number] } else { General(number - 2) };
        number += 1;
    }
    places
};

impl Registers {
    fn new() -> Self {
        let mut sse = [0; 512];
        // FCW and MXCSR as after reset: everything masked.
        sse[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        sse[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self { general: [0; 14], guest_sse: sse, host_sse: sse, entered: 0, left: 0 }
    }
}

// rdi: Registers, rsi: the guest's control block, rdx: the host's. Interrupts come while the guest runs, as exits, and again as
// soon as the global flag is set: then they are taken, on a stack of their own.
global_asm!(
    ".text",
    ".balign 16",
    "enter_guest:",
    "push rbx; push rbp; push r12; push r13; push r14; push r15",
    "push rdx",
    "push rdi",
    "push rsi",
    "fxsave64 [rdi + {host_sse}]",
    "fxrstor64 [rdi + {guest_sse}]",
    "clgi",
    "mov rax, rdx",
    "vmsave rax",
    "mov rax, rsi",
    "vmload rax",
    "rdtsc",
    "shl rdx, 32",
    "or rdx, rax",
    "mov [rdi + {entered}], rdx",
    "mov rax, rsi",
    "mov rbx, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rsi, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov r8, [rdi + 48]",
    "mov r9, [rdi + 56]",
    "mov r10, [rdi + 64]",
    "mov r11, [rdi + 72]",
    "mov r12, [rdi + 80]",
    "mov r13, [rdi + 88]",
    "mov r14, [rdi + 96]",
    "mov r15, [rdi + 104]",
    "mov rdi, [rdi + 32]",
    "sti",
    "vmrun rax",
    "vmsave rax",
    "mov rax, [rsp + 8]",
    "mov [rax], rbx",
    "mov [rax + 8], rcx",
    "mov [rax + 16], rdx",
    "mov [rax + 24], rsi",
    "mov [rax + 32], rdi",
    "mov [rax + 40], rbp",
    "mov [rax + 48], r8",
    "mov [rax + 56], r9",
    "mov [rax + 64], r10",
    "mov [rax + 72], r11",
    "mov [rax + 80], r12",
    "mov [rax + 88], r13",
    "mov [rax + 96], r14",
    "mov [rax + 104], r15",
    "mov rbx, rax",
    "rdtsc",
    "shl rdx, 32",
    "or rdx, rax",
    "mov rax, rbx",
    "mov [rax + {left}], rdx",
    "fxsave64 [rax + {guest_sse}]",
    "fxrstor64 [rax + {host_sse}]",
    "mov rax, [rsp + 16]",
    "vmload rax",
    "stgi",
    "nop",
    "cli",
    "add rsp, 24",
    "pop r15; pop r14; pop r13; pop r12; pop rbp; pop rbx",
    "ret",
    guest_sse = const GUEST_SSE,
    host_sse = const HOST_SSE,
    entered = const ENTERED,
    left = const LEFT,
);

unsafe extern "C" {
    fn enter_guest(registers: *mut Registers, guest: u64, host: u64);
}

/// SVM, switched on.
pub struct Svm {
    /// What VMSAVE puts aside of the host, and what VMRUN does.
    host: Frame,
    _saved: Frame,
    flush_by_asid: bool,
}

impl Svm {
    /// Switches it on; `None` when firmware forbids it.
    ///
    /// # Errors
    /// There is no memory.
    pub fn start(memory: &mut Memory, features: &Features) -> Result<Option<Self>, FramesError> {
        let (host, saved) = (memory.take_zeroed(Kind::Host)?, memory.take_zeroed(Kind::Host)?);
        // SAFETY: processors with SVM (checked before) have this register.
        if unsafe { Msr::new(VM_CR).read() } & SVM_DISABLED != 0 {
            return Ok(None);
        }
        // SAFETY: the processor has SVM; the frame for what VMRUN saves is the processor's from now on, for it is never given
        // back.
        unsafe {
            Efer::update(|flags| flags.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE));
            Msr::new(VM_HSAVE_PA).write(saved.at().0);
        }
        Ok(Some(Self { host, _saved: saved, flush_by_asid: features.flush_by_asid }))
    }
}

/// Whether translations of the guest's that the processor keeps are still right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translations {
    /// They are.
    Good,
    /// Some are of what its tables said before.
    Stale,
}

/// How a guest's addresses are translated.
#[derive(Clone, Copy, Debug)]
pub enum Stages {
    /// By its own tables, and by these.
    Nested {
        /// Where they are.
        root: Hpa,
    },
    /// By these alone.
    One {
        /// Where they are.
        root: Hpa,
    },
    /// By its own tables alone, once it has a root ([`Vcpu::set_cr3`]).
    Own,
}

/// Where a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Ring {
    /// As a kernel.
    Kernel = 0,
    /// As a user's program.
    User = 3,
}

/// Why a guest left the processor.
#[derive(Clone, Copy, Debug)]
pub enum Exit {
    /// The timer.
    Timer,
    /// A page it does not have, or may not use that way.
    Page {
        /// What it wanted to reach.
        gpa: Gpa,
        /// How.
        access: Access,
    },
    /// It wrote to a port.
    Out {
        /// Which.
        port: u16,
        /// How many bytes.
        bytes: u8,
    },
    /// It called.
    Call,
    /// It reads or writes CR3 or CR4, or has a translation forgotten.
    Privileged,
    /// An exception of its own.
    Exception {
        /// Which.
        vector: u64,
        /// With what error code.
        error: u64,
        /// Of a page fault, where.
        address: u64,
    },
    /// Anything else.
    Other {
        /// The exit's number.
        code: u64,
    },
}

/// A virtual processor.
pub struct Vcpu {
    vmcb: Frame,
    registers: Box<Registers>,
    /// Where it goes on after an instruction that was done for it.
    next: u64,
}

/// What a nested page fault's error code says of the access: bit 1 a write, bit 4 a fetch.
const fn access(error: u64) -> Access {
    match error {
        _ if error & 1 << 4 != 0 => Access::Fetch,
        _ if error & 1 << 1 != 0 => Access::Write,
        _ => Access::Read,
    }
}

impl Vcpu {
    /// A processor that will start the guest program as its ABI says, in this ring and with its addresses translated like this.
    ///
    /// # Errors
    /// There is no memory.
    pub fn new(memory: &mut Memory, asid: u32, stages: Stages, ring: Ring) -> Result<Self, FramesError> {
        let mut vcpu =
            Self { vmcb: memory.take_zeroed(Kind::Host)?, registers: Box::new(Registers::new()), next: 0 };
        let Some(vmcb) = vcpu.vmcb() else { return Ok(vcpu) };
        vmcb.intercept_exceptions = u32::MAX;
        vmcb.intercept_registers = [u32::MAX; 2];
        (vmcb.intercept_3, vmcb.intercept_4) = (INTERCEPT_3, INTERCEPT_4);
        vmcb.io_map = (&raw const ALL_PORTS).addr() as u64;
        vmcb.msr_map = (&raw const ALL_MSRS).addr() as u64;
        vmcb.asid = asid;
        vmcb.virtual_interrupts = V_INTR_MASKING;
        (vmcb.nested_paging, vmcb.nested_root, vmcb.cr3) = match stages {
            Stages::Nested { root } => (1, root.0, abi::PAGE_TABLES_GPA),
            Stages::One { root } => (0, 0, root.0),
            Stages::Own => (0, 0, 0),
        };
        // What is the guest's own business: translations of its own tables, and which they are.
        let (free, free_3) = match stages {
            Stages::Nested { .. } => (READ_CR3 | WRITE_CR3, INVLPG),
            Stages::One { .. } => (0, 0),
            Stages::Own => (READ_CR3, INVLPG),
        };
        vmcb.intercept_registers[0] &= !free;
        vmcb.intercept_3 &= !free_3;
        // Flat: present, of the ring's privilege; code is 64-bit.
        let ring = ring as u16;
        let data = Segment { selector: 0x28 | ring, attributes: 0xc93 | ring << 5, limit: u32::MAX, base: 0 };
        let code = Segment { selector: 0x30 | ring, attributes: 0xa9b | ring << 5, ..data };
        vmcb.segments[..6].copy_from_slice(&[data, code, data, data, data, data]);
        vmcb.cpl = ring.to_le_bytes()[0];
        (vmcb.efer, vmcb.cr4, vmcb.cr0) = (EFER, CR4, CR0);
        (vmcb.rflags, vmcb.rip, vmcb.rsp) = (RFLAGS, abi::IMAGE_GPA, abi::stack_top(0));
        (vmcb.dr6, vmcb.dr7, vmcb.pat) = (0xffff_0ff0, 0x400, PAT);
        Ok(vcpu)
    }

    fn vmcb(&mut self) -> Option<&mut Vmcb> {
        // As large as a page, and any bytes are one.
        Vmcb::mut_from_bytes(self.vmcb.bytes_mut()).ok()
    }

    /// Takes the memory back.
    ///
    /// # Errors
    /// [`FramesError`]: a bug.
    pub fn end(self, memory: &mut Memory) -> Result<(), FramesError> {
        memory.give(self.vmcb, Kind::Host)
    }

    /// Runs the guest until it leaves.
    pub fn run(&mut self, svm: &Svm, translations: Translations) -> Exit {
        let (guest, host) = (self.vmcb.at().0, svm.host.at().0);
        let flush = match translations {
            Translations::Good => 0,
            // "Flush this guest's", where there is that; else everybody's.
            Translations::Stale if svm.flush_by_asid => 3,
            Translations::Stale => 1,
        };
        let Some(vmcb) = self.vmcb() else { return Exit::Other { code: u64::MAX } };
        vmcb.tlb_control = flush;
        // SAFETY: SVM is on (there is an `Svm`), both blocks are frames of their own. The guest's state is consistent (`new`;
        // only rip, rax and what guests may change has changed). All it can reach is what tables name that the hypervisor made or looked
        // at: ports, MSRs and everything privileged is intercepted, and host registers are saved and restored around it.
        unsafe { enter_guest(&raw mut *self.registers, guest, host) };
        self.exit()
    }

    fn exit(&mut self) -> Exit {
        let Some(vmcb) = self.vmcb() else { return Exit::Other { code: u64::MAX } };
        let (code, [first, second], rip) = (vmcb.exit_code, vmcb.exit_info, vmcb.rip);
        let (exit, next) = match code {
            0x60 => (Exit::Timer, rip),
            0x400 => (Exit::Page { gpa: Gpa(second), access: access(first) }, rip),
            0x40..=0x5f => (Exit::Exception { vector: code - 0x40, error: first, address: second }, rip),
            0x03 | 0x04 | 0x13 | 0x14 | 0x79 => (Exit::Privileged, rip),
            // VMMCALL is three bytes long.
            0x81 => (Exit::Call, rip + 3),
            // Bit 0: in. Bit 2: a string. Bits 6:4: four, two, one bytes.
            0x7b if first & 5 == 0 => {
                let [_, _, low, high, ..] = first.to_le_bytes();
                let bytes = first.to_le_bytes()[0] >> 4 & 7;
                (Exit::Out { port: u16::from_le_bytes([low, high]), bytes }, second)
            }
            code => (Exit::Other { code }, rip),
        };
        self.next = next;
        exit
    }

    /// Ticks of the time-stamp counter that passed when it last ran.
    pub fn ticks(&self) -> u64 {
        self.registers.left.saturating_sub(self.registers.entered)
    }

    /// Where its instruction is.
    pub fn rip(&mut self) -> u64 {
        self.vmcb().map_or(0, |vmcb| vmcb.rip)
    }

    /// It goes on there, once it is [skipped](Self::skip).
    pub const fn goes_on_at(&mut self, rip: u64) {
        self.next = rip;
    }

    /// The processor's CR3: the guest's own, or that of its shadows.
    pub fn cr3(&mut self) -> u64 {
        self.vmcb().map_or(0, |vmcb| vmcb.cr3)
    }

    /// Sets it.
    pub fn set_cr3(&mut self, root: u64) {
        if let Some(vmcb) = self.vmcb() {
            vmcb.cr3 = root;
        }
    }

    /// In which ring it is.
    pub fn privilege(&mut self) -> u8 {
        self.vmcb().map_or(u8::MAX, |vmcb| vmcb.cpl)
    }

    /// CR4.
    pub fn cr4(&mut self) -> u64 {
        self.vmcb().map_or(0, |vmcb| vmcb.cr4)
    }

    /// Changes global pages in it, the one thing a guest may change; whether that is so.
    pub fn set_cr4(&mut self, cr4: u64) -> bool {
        if cr4 & !CR4_GLOBAL != CR4 {
            return false;
        }
        if let Some(vmcb) = self.vmcb() {
            vmcb.cr4 = cr4;
        }
        true
    }

    /// Has it leave after every instruction, or no longer.
    pub fn single_step(&mut self, step: bool) {
        if let Some(vmcb) = self.vmcb() {
            vmcb.rflags = vmcb.rflags & !TRAP | if step { TRAP } else { 0 };
        }
    }

    /// A general register by its number in instructions, 0 to 15.
    pub fn register(&mut self, number: u8) -> u64 {
        match PLACES.get(usize::from(number)) {
            Some(Place::General(place)) => self.registers.general[*place],
            Some(Place::Rax) => self.vmcb().map_or(0, |vmcb| vmcb.rax),
            Some(Place::Rsp) => self.vmcb().map_or(0, |vmcb| vmcb.rsp),
            None => 0,
        }
    }

    /// Sets it.
    pub fn set_register(&mut self, number: u8, value: u64) {
        match PLACES.get(usize::from(number)) {
            Some(Place::General(place)) => self.registers.general[*place] = value,
            Some(Place::Rax) => {
                if let Some(vmcb) = self.vmcb() {
                    vmcb.rax = value;
                }
            }
            Some(Place::Rsp) => {
                if let Some(vmcb) = self.vmcb() {
                    vmcb.rsp = value;
                }
            }
            None => {}
        }
    }

    /// The instruction that made the guest leave was done for it.
    pub fn skip(&mut self) {
        let next = self.next;
        if let Some(vmcb) = self.vmcb() {
            vmcb.rip = next;
        }
    }

    /// What the guest calls with: rax, rdi, rsi, rdx, rcx.
    pub fn arguments(&mut self) -> [u64; 5] {
        let rax = self.vmcb().map_or(0, |vmcb| vmcb.rax);
        let [_, rcx, rdx, rsi, rdi, ..] = self.registers.general;
        [rax, rdi, rsi, rdx, rcx]
    }

    /// What its call came to: rax and rdx. It goes on behind the call.
    pub fn answer(&mut self, status: u64, value: u64) {
        self.registers.general[RDX] = value;
        if let Some(vmcb) = self.vmcb() {
            vmcb.rax = status;
        }
        self.skip();
    }
}
