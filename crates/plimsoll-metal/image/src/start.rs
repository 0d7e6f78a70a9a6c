//! From the loader to 64-bit code: the note that names the entry, the first instructions, and the first page tables.
//!
//! Enters: 32-bit protected mode without paging, `ebx` at the start information (Xen's x86/HVM direct boot ABI, "PVH").
//! Leaves: [`crate::main`], in long mode, on a stack, with the first 4 GiB mapped to themselves. What must never happen: a
//! compiled function called before SSE is on.
//!
//! PVH and not multiboot: QEMU's multiboot loader refuses 64-bit files, and PVH hands over the memory map as E820 has it,
//! all of its entries, beside the module that holds the settings.
use core::arch::global_asm;

/// Bytes of the stack the hypervisor runs on. The page below it is never mapped.
const STACK_SIZE: usize = 256 << 10;

global_asm!(
    // Name, length of what follows, type 18 (XEN_ELFNOTE_PHYS32_ENTRY).
    ".section .note.pvh, \"a\", @note",
    ".balign 4",
    ".long 4, 4, 18",
    ".asciz \"Xen\"",
    ".long _start",
    // Tables: PML4, PDPT, four directories. The stack's lowest page is its guard.
    ".section .bss.start, \"aw\", @nobits",
    ".balign 4096",
    "first_tables: .skip 6 * 4096",
    ".globl stack_guard",
    "stack_guard: .skip 4096",
    ".skip {stack}",
    "stack_top:",
    ".section .rodata.start, \"a\"",
    ".balign 8",
    // Null, 64-bit code, data.
    "first_gdt: .quad 0, 0x00209a0000000000, 0x0000920000000000",
    "first_gdt_pointer: .word 23",
    ".long first_gdt",
    ".section .text.start, \"ax\", @progbits",
    ".code32",
    ".globl _start",
    "_start:",
    "cli",
    "cld",
    "mov esi, ebx",
    "lea eax, [first_tables + 0x1003]",
    "mov dword ptr [first_tables], eax",
    "mov ecx, 4",
    "lea edi, [first_tables + 0x1000]",
    "2: add eax, 0x1000",
    "mov dword ptr [edi], eax",
    "add edi, 8",
    "loop 2b",
    // Four directories in a row: 2048 pages of 2 MiB, writable.
    "mov eax, 0x83",
    "mov ecx, 2048",
    "lea edi, [first_tables + 0x2000]",
    "3: mov dword ptr [edi], eax",
    "add eax, 0x200000",
    "add edi, 8",
    "loop 3b",
    "lea eax, [first_tables]",
    "mov cr3, eax",
    // PAE, OSFXSR, OSXMMEXCPT.
    "mov eax, 0x620",
    "mov cr4, eax",
    // EFER: LME, NXE.
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x900",
    "wrmsr",
    // PG, WP, NE, ET, MP, PE.
    "mov eax, 0x80010033",
    "mov cr0, eax",
    "lgdt [first_gdt_pointer]",
    "lea esp, [stack_top]",
    "push 8",
    "lea eax, [4f]",
    "push eax",
    "retf",
    ".code64",
    "4: mov ax, 16",
    "mov ds, ax",
    "mov es, ax",
    "mov ss, ax",
    "xor eax, eax",
    "mov fs, ax",
    "mov gs, ax",
    "lea rsp, [stack_top]",
    "mov edi, esi",
    "xor ebp, ebp",
    "call {main}",
    "ud2",
    ".text",
    stack = const STACK_SIZE,
    main = sym crate::main,
);

unsafe extern "C" {
    static image_start: u8;
    static constants_start: u8;
    static data_start: u8;
    static image_end: u8;
    static stack_guard: u8;
}

/// Where the parts of the image are; each begins a page.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// Code, read and executed.
    pub code: u64,
    /// Constants, read.
    pub constants: u64,
    /// Data, read and written, to [`Parts::end`].
    pub data: u64,
    /// The page below the stack: unmapped.
    pub guard: u64,
    /// Behind the last byte.
    pub end: u64,
}

/// The image's parts, by the linker.
pub fn parts() -> Parts {
    Parts {
        code: (&raw const image_start).addr() as u64,
        constants: (&raw const constants_start).addr() as u64,
        data: (&raw const data_start).addr() as u64,
        guard: (&raw const stack_guard).addr() as u64,
        end: (&raw const image_end).addr() as u64,
    }
}
