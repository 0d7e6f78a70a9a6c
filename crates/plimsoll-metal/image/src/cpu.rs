//! The processor: descriptors, exceptions, the timer, and which features it has.
//!
//! Enters: nothing. Leaves: an exception as a screen and the end of the machine; the timer's ticks as a count. What must never
//! happen: an interrupt taken on the stack of the code it interrupts, for that code was compiled with a red zone. So every
//! vector has a stack of its own: one for all exceptions, which never return, one for faults in faults, one for the timer.
use crate::console::{End, end, say};
use core::arch::global_asm;
use core::arch::x86_64::__cpuid_count;
use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use plimsoll_mmu::Feature;
use plimsoll_mmu::format::x86::{Caps, Maker};
use x86_64::instructions::port::Port;
use x86_64::instructions::segmentation::{CS, DS, ES, SS, Segment};
use x86_64::instructions::tables::{lidt, load_tss};
use x86_64::structures::DescriptorTablePointer;
use x86_64::structures::gdt::{Descriptor, GlobalDescriptorTable};
use x86_64::structures::tss::TaskStateSegment;
use x86_64::{PrivilegeLevel, VirtAddr};

/// Interrupts of the timer in a second.
pub const TICKS_HZ: u64 = 100;
/// The PIT's own clock.
const PIT_HZ: u64 = 1_193_182;
/// Ticks over which the time-stamp counter is measured.
const CALIBRATION_TICKS: u64 = 10;
/// Where the interrupt controllers' sixteen lines begin, behind the exceptions.
const LINES: usize = 32;
const VECTORS: usize = LINES + 16;
/// The last byte of the interrupt table.
const IDT_LIMIT: u16 = 767;
const _: () = assert!(VECTORS * 16 - 1 == IDT_LIMIT as usize);
/// Double fault, machine check and NMI: they may come while an exception is on its way.
const FAULTS_IN_FAULTS: [usize; 3] = [2, 8, 18];
const EXCEPTION_STACK: usize = 16 << 10;

static TICKS: AtomicU64 = AtomicU64::new(0);

global_asm!(
    ".section .bss.vectors, \"aw\", @nobits",
    ".balign 16",
    ".skip {stack}",
    "exception_stack:",
    ".skip {stack}",
    "nested_stack:",
    ".skip {stack}",
    "timer_stack:",
    ".text",
    ".balign 16",
    "exception_entries:",
    ".set vector, 0",
    ".rept 32",
    ".balign 16",
    // Vectors 8, 10 to 14, 17, 21, 29 and 30 bring an error code.
    ".if (0x60227d00 >> vector) & 1 == 0",
    "push 0",
    ".endif",
    "push vector",
    "jmp exception_common",
    ".set vector, vector + 1",
    ".endr",
    "exception_common:",
    "push rax; push rcx; push rdx; push rbx; push rbp; push rsi; push rdi",
    "push r8; push r9; push r10; push r11; push r12; push r13; push r14; push r15",
    "cld",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {exception}",
    "ud2",
    ".balign 16",
    // The controllers end each interrupt by themselves.
    "timer_entry:",
    "inc qword ptr [{ticks}]",
    "iretq",
    ".balign 16",
    "unexpected_entry:",
    "iretq",
    stack = const EXCEPTION_STACK,
    exception = sym exception,
    ticks = sym TICKS,
);

unsafe extern "C" {
    static exception_stack: u8;
    static nested_stack: u8;
    static timer_stack: u8;
    static exception_entries: u8;
    static timer_entry: u8;
    static unexpected_entry: u8;
}

/// What an exception leaves on its stack, lowest address first.
#[repr(C)]
struct Trap {
    /// r15 down to rax, as pushed.
    general: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

const NAMES: [&str; 32] = [
    "divide error",
    "debug",
    "NMI",
    "breakpoint",
    "overflow",
    "bound range",
    "invalid opcode",
    "no coprocessor",
    "double fault",
    "vector 9",
    "invalid TSS",
    "segment not present",
    "stack fault",
    "general protection",
    "page fault",
    "vector 15",
    "x87 error",
    "alignment check",
    "machine check",
    "SIMD error",
    "virtualization",
    "control protection",
    "vector 22",
    "vector 23",
    "vector 24",
    "vector 25",
    "vector 26",
    "vector 27",
    "hypervisor injection",
    "VMM communication",
    "security",
    "vector 31",
];

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name =
            usize::try_from(self.vector).ok().and_then(|vector| NAMES.get(vector)).unwrap_or(&"exception");
        writeln!(f, "panic: {name} (vector {}, error {:#x}) at {:#x}", self.vector, self.error, self.rip)?;
        writeln!(
            f,
            "  rsp {:#018x}  rflags {:#010x}  cs {:#x}  ss {:#x}",
            self.rsp, self.rflags, self.cs, self.ss
        )?;
        let [r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax] = self.general;
        writeln!(f, "  rax {rax:#018x}  rbx {rbx:#018x}  rcx {rcx:#018x}  rdx {rdx:#018x}")?;
        writeln!(f, "  rsi {rsi:#018x}  rdi {rdi:#018x}  rbp {rbp:#018x}  r8  {r8:#018x}")?;
        writeln!(f, "  r9  {r9:#018x}  r10 {r10:#018x}  r11 {r11:#018x}  r12 {r12:#018x}")?;
        write!(f, "  r13 {r13:#018x}  r14 {r14:#018x}  r15 {r15:#018x}")
    }
}

/// Every exception is the hypervisor's own and the end of it: guests' are intercepted.
extern "C" fn exception(trap: &Trap) -> ! {
    say!("{trap}");
    if let (14, Ok(address)) = (trap.vector, x86_64::registers::control::Cr2::read()) {
        say!("  the address was {:#x}", address.as_u64());
    }
    end(End::Crashed)
}

/// One entry of the interrupt table: a gate in ring 0 with a stack of its own.
fn gate(handler: u64, stack: u16) -> u128 {
    let (handler, selector) = (u128::from(handler), u128::from(CODE.0));
    handler & 0xffff
        | selector << 16
        | u128::from(stack) << 32
        | 0x8e << 40
        | (handler >> 16 & 0xffff) << 48
        | handler >> 32 << 64
}

/// The code segment's selector: the first descriptor that is added.
const CODE: x86_64::structures::gdt::SegmentSelector =
    x86_64::structures::gdt::SegmentSelector::new(1, PrivilegeLevel::Ring0);

/// The tables a processor reads.
pub struct Tables {
    gdt: GlobalDescriptorTable,
    tss: TaskStateSegment,
    idt: [u128; VECTORS],
}

impl Tables {
    /// Tables with nothing in them.
    pub const fn new() -> Self {
        Self { gdt: GlobalDescriptorTable::new(), tss: TaskStateSegment::new(), idt: [0; VECTORS] }
    }

    /// Fills the tables and has the processor use them.
    ///
    /// # Safety
    /// `self` stays where it is, for as long as the machine runs.
    pub unsafe fn load(&mut self) {
        let address = |symbol: *const u8| symbol.addr() as u64;
        for (number, stack) in
            [&raw const exception_stack, &raw const nested_stack, &raw const timer_stack].iter().enumerate()
        {
            self.tss.interrupt_stack_table[number] = VirtAddr::new(address(*stack));
        }
        let entries = address(&raw const exception_entries);
        for (vector, (entry, place)) in (entries..).step_by(16).zip(&mut self.idt[..LINES]).enumerate() {
            *place = gate(entry, if FAULTS_IN_FAULTS.contains(&vector) { 2 } else { 1 });
        }
        self.idt[LINES..].fill(gate(address(&raw const unexpected_entry), 3));
        self.idt[LINES] = gate(address(&raw const timer_entry), 3);

        let code = self.gdt.append(Descriptor::kernel_code_segment());
        let data = self.gdt.append(Descriptor::kernel_data_segment());
        // SAFETY: the segment is where it will stay (the caller's promise).
        let tss = self.gdt.append(unsafe { Descriptor::tss_segment_unchecked(&raw const self.tss) });
        let idt = DescriptorTablePointer { limit: IDT_LIMIT, base: VirtAddr::from_ptr(self.idt.as_ptr()) };
        // SAFETY: the tables stay where they are (the caller's promise), the selectors are those of the descriptors just made,
        // and each gate leads to code above that expects what its vector pushes.
        unsafe {
            self.gdt.load_unsafe();
            CS::set_reg(code);
            SS::set_reg(data);
            DS::set_reg(data);
            ES::set_reg(data);
            load_tss(tss);
            lidt(&idt);
        }
    }
}

/// Starts the timer. Its interrupts come from now on, wherever they are enabled.
pub fn start_timer() {
    let divisor = const { (PIT_HZ / TICKS_HZ).to_le_bytes() };
    // ICW1 to ICW4 of both controllers: cascaded, lines from vector 32 on, interrupts end by themselves. All lines but the
    // timer's are masked. Then channel 0 of the PIT, as a rate generator.
    let writes: [(u16, u8); 13] = [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 32),
        (0xa1, 40),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 3),
        (0xa1, 3),
        (0x21, 0xfe),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, divisor[0]),
        (0x40, divisor[1]),
    ];
    for (port, value) in writes {
        // SAFETY: these ports are those of the interrupt controllers and of the PIT, which nobody else drives.
        unsafe { Port::new(port).write(value) };
    }
}

/// The timer's interrupts so far.
pub fn ticks() -> u64 {
    TICKS.load(Ordering::Relaxed)
}

/// The time-stamp counter.
pub fn now() -> u64 {
    // SAFETY: ring 0 may always read it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits for the next interrupt.
pub fn wait() {
    x86_64::instructions::interrupts::enable_and_hlt();
    x86_64::instructions::interrupts::disable();
}

/// How fast the time-stamp counter runs, by the timer.
pub fn measure_tsc_hz() -> u64 {
    let first = ticks();
    let until = |tick| {
        while ticks() < tick {
            wait();
        }
        now()
    };
    let start = until(first + 1);
    (until(first + 1 + CALIBRATION_TICKS) - start) * TICKS_HZ / CALIBRATION_TICKS
}

/// What the processor can do, as far as it matters here.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Bits of physical addresses, pages of 1 GiB.
    pub paging: Caps,
    /// SMEP, SMAP, UMIP: bits of CR4.
    pub guards: u64,
    /// Secure virtual machines, with nested paging.
    pub nested: bool,
    /// Flushing one guest's translations alone.
    pub flush_by_asid: bool,
    /// Address spaces, the host's own included.
    pub asids: u32,
}

impl Features {
    /// Asks the processor.
    pub fn read() -> Self {
        let most = __cpuid_count(0x8000_0000, 0).eax;
        let extended =
            |leaf| if leaf <= most { __cpuid_count(leaf, 0) } else { __cpuid_count(0x8000_0000, 0) };
        let known = extended(0x8000_0001);
        let svm = most >= 0x8000_000a && known.ecx >> 2 & 1 == 1;
        let virtual_machines = extended(0x8000_000a);
        let guards = __cpuid_count(7, 0);
        let guard = |found: u32, bit: u32, cr4: u32| u64::from(found >> bit & 1) << cr4;
        Self {
            paging: Caps {
                physical_bits: if most >= 0x8000_0008 { extended(0x8000_0008).eax & 0xff } else { 36 },
                gib_pages: if known.edx >> 26 & 1 == 1 { Feature::On } else { Feature::Off },
                no_execute: Feature::On,
                keys: Feature::Off,
                maker: Maker::Amd,
            },
            guards: guard(guards.ebx, 7, 20) | guard(guards.ebx, 20, 21) | guard(guards.ecx, 2, 11),
            nested: svm && virtual_machines.edx & 1 == 1,
            flush_by_asid: svm && virtual_machines.edx >> 6 & 1 == 1,
            asids: if svm { virtual_machines.ebx } else { 0 },
        }
    }
}
